"""Every tensor is made on the model's device.  Torch's meta device, which has shapes and no values,
stands in for a GPU: an operator that makes a tensor elsewhere fails the test.

Patched: what reads a value (the check of loss and gradient), what does not know the meta device
(autocast, AdamW's fused kernel), what refuses it (add_lora), and what makes a batch on the CPU, to
bring it to the device (on_device, which has a test of its own).
"""

import contextlib
import os
import sys
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bilora
import train_glue
import train_gsm8k
from bilora import add_lora, clip_perturbation_, lora_layers, merge_lora_, perturbation_norm
from model import Transformer
from test_text_to_text import GOLDEN
from train_glue import METHODS

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
import methods  # noqa: E402

SCALARS = {"lift_fresh", "_local_scalar_dense", "scalar_tensor", "detach"}  # of Python's numbers


class OneDevice(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                name = operator.overloadpacket.__name__
                assert tensor.dim() == 0 and name in SCALARS, f"{operator} makes {tensor.device}"
        return out


@pytest.fixture(autouse=True)
def meta_can_train(monkeypatch):
    monkeypatch.setattr(torch, "isfinite", lambda tensor: True)
    monkeypatch.setattr(train_glue, "on_device", lambda x, device: torch.tensor(x, device=device))
    monkeypatch.setattr(bilora, "_require_plain", lambda name, linear: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, fused, **words: adamw(
        params, foreach=True, capturable=False, **words))


ON_DEVICE = train_glue.on_device  # before it is patched


def on_meta(family):
    labels = 3 if family in ("bert", "roberta") else None
    return Transformer.from_pretrained(os.path.join(GOLDEN, family), labels).to("meta")


FAMILIES = ("bert", "roberta", "t5", "flan-t5", "llama2", "llama3", "qwen2")
MODELS = {family: on_meta(family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_pass_of_each_family(family):
    model = MODELS[family].eval()
    ids = torch.ones(2, 5, dtype=torch.int64, device="meta")
    mask, more = torch.ones_like(ids), {}
    if model.encoder is not None and model.decoder is not None:
        more = {"decoder_input_ids": ids[:, :3]}
    with OneDevice():
        assert model(ids, mask, **more).device.type == "meta"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES[2:])
def test_generate(family, temperature, monkeypatch):
    """No row ends, which would be a value that is read."""
    monkeypatch.setattr(torch.Tensor, "all", lambda tensor: True)
    model, ids = MODELS[family].eval(), torch.ones(2, 5, dtype=torch.int64, device="meta")
    with OneDevice():
        new = model.generate(ids, torch.ones_like(ids), 3, [2, 4], temperature)
    assert new.device.type == "meta" and new.shape == (2, 3)


@pytest.mark.parametrize("method", ["lora-sam", "bi-lora"])  # LoRA's step is a part of both
@pytest.mark.parametrize("script, model", [(train_glue, "bert"), (train_glue, "t5"),
                                           (train_gsm8k, "llama3")])
def test_a_step_of_both_scripts(script, model, method, small_demos, tmp_path):
    """Model, optimizers, closure with micro-batches, step, schedule."""
    args, _ = methods.parse(script, ["--micro-batch", "2", "--rank", "2", "--aux-rank", "2",
                                     "--out", str(tmp_path)])
    args.device = "meta"
    data = train_glue.SimpleNamespace(pad_id=0, answers=[], task=train_glue.TASKS["demo"])
    if script is train_gsm8k:
        batch = [([7, 8, 9], [9, 5], None), ([7, 8], [6], None), ([9], [7, 8, 5], None)]
    else:
        batch = [([7, 8, 9], [0, 0, 0], 1), ([7, 8], [0, 0], 0), ([9], [0], 1)]
        data.answers = [[7, 5], [8, 9, 5]] if model == "t5" else []
    run = train_glue.prepare(args, method, 0, partial(on_meta, model), "", 2)
    assert {p.device.type for p in run.model.parameters()} == {"meta"}
    closure = partial(script.forward_backward, args, run.model.train(), data, batch)
    for _ in range(2):
        with OneDevice():
            logged = METHODS[method].step(run, closure)
        for schedule in run.schedules:
            schedule.step()
    assert logged["loss"].device.type == "meta"
    assert perturbation_norm(run.layers).device.type == "meta" or method != "bi-lora"


def test_a_batch_is_brought_to_the_device():
    assert ON_DEVICE([[1, 2], [3, 4]], "meta").device.type == "meta"


@pytest.mark.parametrize("device, pinned", [("cuda", 1), ("cuda:1", 1), ("meta", 0)])
def test_a_gpus_batch_is_pinned_and_copied_without_a_wait(device, pinned, monkeypatch):
    """A copy from memory that is not pinned would go on too, but through a buffer of CUDA's own:
    tests/test_cuda.py cannot see it."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append("pinned") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *where, **how: calls.append((where, how)))
    ON_DEVICE([1, 2], device)
    assert calls == ["pinned"] * pinned + [((device,), {"non_blocking": True})]


def test_new_pairs_clip_and_merge():
    """A pair is drawn on the CPU, the same on every device, and then brought there."""
    model = on_meta("bert")
    layers = add_lora(model, 2, 6, 2)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with OneDevice():
        assert clip_perturbation_(layers, 0.1).device.type == "meta"
        assert not lora_layers(merge_lora_(model))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_tensor_on_another_device_is_noticed():
    with OneDevice(), pytest.raises(AssertionError, match="aten.zeros.default makes cpu"):
        torch.zeros(2)

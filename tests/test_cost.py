"""What a step asks of the device: kernels and waits, counted by torch.profiler.  No times.  And
what several processes send each other, against sums by hand.

Counts are of operators that compute or copy.  Views and what only Python sees are left out.  Two
depths of one model are compared, so that what does not grow with the layers cancels.
"""

import os
import sys
from collections import Counter

import pytest
import torch
import torch.nn as nn
from torch.profiler import ProfilerActivity, profile

import train_glue
import train_gsm8k
from bilora import (add_lora, bilora_optimizers, bilora_step, lora_sam_step, lora_step,
                    primary_parameters)
from model import Config
from train_glue import METHODS

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
import memory  # noqa: E402
import traffic  # noqa: E402

VIEWS = set("""t transpose permute view _unsafe_view reshape narrow slice select as_strided detach
    detach_ alias expand unsqueeze squeeze to promote_types lift_fresh empty empty_strided
    new_empty_strided empty_like result_type item is_nonzero _local_scalar_dense resize_
    resolve_conj""".split())


def events_of(method, layers):
    """Those of one step, after a first one that makes the optimizers' states."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(layers)])
    adapted = add_lora(net, 2, 4, aux_rank=2 if method == "bi-lora" else 0)
    descent, ascent = bilora_optimizers(net, 1e-2)
    x = torch.randn(4, 8)

    def closure():
        loss = net(x).square().mean()
        loss.backward()
        return loss

    def step():
        if method == "bi-lora":
            return bilora_step(descent, ascent, closure, adapted, rho=1e-6)
        if method == "lora-sam":
            return lora_sam_step(descent, closure, 0.05, primary_parameters(net))
        return lora_step(descent, closure)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    return found.events()


def ancestors(event):
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def kernels(events):
    """Operators that call no other one but views.  One over a list of tensors counts once: a GPU
    has one kernel for it, a CPU goes through the list."""
    names = Counter()
    for event in events:
        name = event.name.removeprefix("aten::")
        inner = [child.name for child in event.cpu_children if child.name.startswith("aten::")]
        leaf = all(child.removeprefix("aten::") in VIEWS for child in inner)
        whole = name.startswith("_foreach") or leaf and name not in VIEWS
        in_list = any(outer.startswith("aten::_foreach") for outer in ancestors(event))
        if event.name.startswith("aten::") and whole and not in_list:
            names[name] += 1
    return names


def per_layer(method):
    counts = [sum(kernels(events_of(method, layers)).values()) for layers in (3, 5)]
    return (counts[1] - counts[0]) / 2


def test_kernels_per_layer():
    lora, sam, bi = (per_layer(method) for method in ("lora", "lora-sam", "bi-lora"))
    assert lora > 4  # two products of the pair, forward and backward
    assert kernels(events_of("lora", 3))["cat"] < 3  # a single pair is used as it is
    assert bi - lora <= 10
    assert sam - 2 * lora <= 8  # for each of two tensors: keep, add eps, put back, and one more


def waits(events):
    """Where the host reads a number, but for AdamW's own counters: they lie on the CPU wherever the
    weights are."""
    return [event for event in events if event.name == "aten::_local_scalar_dense"
            and not any(name.startswith("Optimizer.step") for name in ancestors(event))]


@pytest.mark.parametrize("method, passes", [("lora", 1), ("lora-sam", 2), ("bi-lora", 1)])
def test_one_wait_a_pass(method, passes):
    """For the check of loss and gradient; none in norms, clip or ascent."""
    assert len(waits(events_of(method, 3))) == passes


def test_what_processes_send():
    """A model of two square matrices a block, by hand; and the bound operations over bytes."""
    tiny = Config(vocab_size=7, d_model=4, d_ff=8, heads=1, decoder_layers=3, bias=False,
                  qkv_bias=False, norm="rms", positions="rotary")
    frozen, pairs = 3 * (4 * 4 * 4 + 2 * 4 * 8), 2 * 3 * (4 * (4 + 4) + 2 * (4 + 8))
    parameters, _ = memory.adapted(tiny)
    assert parameters == frozen + 7 * 4 + (3 * 2 + 1) * 4
    for method, passes, both in (("lora", 1, 1), ("lora-sam", 2, 1), ("bi-lora", 1, 2)):
        megabytes, gigabytes, few, many = traffic.traffic(tiny, method, 4, 2, 3e12, 1e9).values()
        gradients, weights = 1.5 * 4 * both * pairs, 1.5 * 2 * frozen
        assert megabytes == pytest.approx(passes * gradients / 1e6)
        assert gigabytes == pytest.approx(passes * weights / 1e9)
        assert few == pytest.approx(gradients / 1e9 / (4 * parameters / 3e12))
        assert many == pytest.approx((gradients + weights) / 1e9 / (4 * parameters / 3e12))


@pytest.mark.parametrize("script", [train_glue, train_gsm8k])
@pytest.mark.parametrize("method, passes", [("lora", 1), ("lora-sam", 2), ("bi-lora", 1)])
def test_the_loop_waits_in_the_passes_alone(small_demos, tmp_path, monkeypatch, script, method,
                                            passes):
    """From the beginning of one step to that of the next: the log's numbers are read later."""
    whole, found = METHODS[method].step, profile(activities=[ProfilerActivity.CPU])

    def watched(run, closure):
        if len(run.log) == 2:
            found.start()
        if len(run.log) == 3:
            found.stop()
        return whole(run, closure)
    monkeypatch.setitem(METHODS, method, METHODS[method]._replace(step=watched))
    script.main(["--method", method, "--seeds", "0", "--limit", "40", "--batch-size", "8",
                 "--epochs", "1", "--jobs", "1", "--device", "cpu", "--out", str(tmp_path)])
    assert len(waits(found.events())) == passes


@pytest.mark.parametrize("script", [train_glue, train_gsm8k])
def test_a_saved_state_has_the_logs_numbers(small_demos, tmp_path, monkeypatch, script):
    """Not the device's tensors, which another device could not read."""
    whole = METHODS["bi-lora"].step

    def killed(run, closure):
        if len(run.log) == 2:
            raise KeyboardInterrupt
        return whole(run, closure)
    monkeypatch.setitem(METHODS, "bi-lora", METHODS["bi-lora"]._replace(step=killed))
    with pytest.raises(SystemExit):
        script.main(["--method", "bi-lora", "--seeds", "0", "--limit", "40", "--batch-size", "8",
                     "--save-every", "1", "--jobs", "1", "--device", "cpu", "--out", str(tmp_path)])
    log = torch.load(tmp_path / "bi-lora-seed0/state.pt", weights_only=True)["log"]
    assert len(log) == 2 and {"loss", "perturbation", "clipped"} <= log[0].keys()
    assert {type(value) for row in log for value in row.values()} <= {int, float}

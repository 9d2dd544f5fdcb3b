"""The 4-bit base of notes/quantized.py.

Oracles: the levels that bitsandbytes publishes; the nearest of them by trying all 16, in float64;
F.linear and plain matrices on the dequantized W; the same net with a plain LoRALinear on that W;
and, from end to end, a run on a checkpoint whose weights are that W.
"""

import copy
import gc
import json
import os
import pickle
import sys
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import train_glue
import train_gsm8k
from bilora import (LoRALinear, add_lora, auxiliary_parameters, bilora_step, load_adapter,
                    lora_layers, lora_sam_step, lora_step, merge_lora_, primary_parameters,
                    save_adapter)
from model import Transformer, read_json, read_safetensors, save_pretrained
from test_steps import LAYERS, Net, assert_close, closure_of, sgd_pair, snapshot

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
import benchmark  # noqa: E402
import methods  # noqa: E402
import quantized  # noqa: E402
import sharpness  # noqa: E402
from quantized import NF4Linear, dequantize, levels, quantize  # noqa: E402

PUBLISHED = torch.tensor([  # bitsandbytes' functional.py, float32
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0])
SHAPES = [(64, 64), (5, 6), (7, 9), (1, 1), (3, 64), (129, 3)]  # full, part-filled and odd blocks
CPU = torch.device("cpu")


def both(aux_rank=0, double=True):
    """(a Net with 4-bit layers, the same with plain ones on the dequantized W), with the same
    adapters away from their initial values."""
    torch.manual_seed(0)
    net = Net()
    plain = copy.deepcopy(net)
    layers = add_lora(net, 2, 6, aux_rank, layer=NF4Linear)
    add_lora(plain, 2, 6, aux_rank)
    if double:
        net.double()
        plain.double()
    with torch.no_grad():
        for name, layer in zip(LAYERS, layers):
            getattr(plain, name).weight.copy_(layer.weight)
        for a, b in zip(trained(net), trained(plain), strict=True):
            a.copy_(0.5 * torch.randn_like(a))
            b.copy_(a)
    return net.train(), plain.train()


def trained(net):
    return [*primary_parameters(net), *auxiliary_parameters(net)]


# ------------------------------------------------------------------------------- levels and codes

def test_the_levels_are_the_published_ones():
    assert torch.equal(levels(CPU), PUBLISHED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_entry_gets_the_nearest_level_of_its_block(shape, dtype):
    """But for rounding in float32; then to the dtype of W."""
    torch.manual_seed(0)
    W = (0.02 * torch.randn(shape)).to(dtype)
    codes, absmax = quantize(W)
    found, eps = dequantize(codes, absmax.float(), W.shape), torch.finfo(torch.float32).eps
    assert found.shape == shape
    for block, kept in zip(W.double().flatten().split(64), found.double().flatten().split(64)):
        candidates = block.abs().max() * PUBLISHED.double()
        best = (block[:, None] - candidates).abs().amin(1)
        assert ((block - kept).abs() <= best + 2 * eps * block.abs().max()).all()
        assert (block - kept).abs().max() > 0 or len(block) == 1
    rounded = dequantize(codes, absmax, W.shape)
    assert rounded.dtype == dtype and torch.equal(rounded, found.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_quantized_stays_as_it_is(shape, dtype):
    torch.manual_seed(0)
    W = torch.randn(shape).to(dtype)
    once = dequantize(*quantize(W), W.shape)
    codes, absmax = quantize(once)
    assert torch.equal(dequantize(codes, absmax, W.shape), once)
    assert torch.equal(absmax, torch.stack([b.abs().max() for b in W.flatten().split(64)]))
    assert codes.dtype == torch.uint8 and len(codes) == 32 * len(absmax)


def test_the_codes_by_hand():
    """The number of a level, the first of two in the high half of the byte; the rest are zeros."""
    W = torch.cat([3 * PUBLISHED, torch.zeros(48), torch.zeros(64), -2 * torch.ones(1)])
    codes, absmax = quantize(W.view(1, -1))
    numbers = [*range(16), *[7] * 48, *[7] * 64, 0, *[7] * 63]
    assert codes.tolist() == [16 * a + b for a, b in zip(numbers[::2], numbers[1::2])]
    assert absmax.tolist() == [3, 0, 2]
    assert torch.equal(dequantize(codes, absmax, torch.Size((1, 129)))[0], W)


# ---------------------------------------------------------------------------------------- the layer

@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_those_of_w_written_out(bias):
    torch.manual_seed(0)
    layer = NF4Linear(nn.Linear(9, 7, bias=bias), 2, 6, 2).double()
    names = ["lora_B", "lora_A", "aux_B", "aux_A", *(["bias"] if bias else [])]
    own = {name: getattr(layer, name).requires_grad_() for name in names}
    with torch.no_grad():
        for p in own.values():
            p.copy_(torch.randn_like(p))
    x = torch.randn(4, 3, 9, dtype=torch.float64, requires_grad=True)
    W = layer.weight + 3 * (own["lora_B"] @ own["lora_A"] + own["aux_B"] @ own["aux_A"])
    assert W.dtype == torch.float64
    found, expected = layer(x), F.linear(x, W, layer.bias)
    assert_close(found, expected, "forward")
    assert_close(layer.merged_weight(training=True), W, "merged_weight")
    weights = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), [x, *own.values()])
                    for y in (found, expected))
    for name, a, b in zip(["x", *own], ours, theirs, strict=True):
        assert_close(a, b, name)
        assert b.norm() > 0.1


@pytest.mark.parametrize("base, rows, autocast", [
    (torch.float32, torch.float32, False), (torch.float32, torch.float32, True),
    (torch.bfloat16, torch.bfloat16, False), (torch.bfloat16, torch.float32, True)])
def test_the_bits_are_those_of_a_plain_layer_on_the_dequantized_w(base, rows, autocast):
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 80).to(base), torch.randn(5, 96).to(rows)
    layer = NF4Linear(copy.deepcopy(linear), 2, 6)
    assert layer.weight.dtype == base
    with torch.no_grad():
        linear.weight.copy_(layer.weight)
        layer.lora_B.normal_()
    plain, found = LoRALinear(linear, 2, 6), []
    plain.load_state_dict({**plain.state_dict(), "lora_A": layer.lora_A, "lora_B": layer.lora_B})
    for each in (layer, plain):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = each(own)
        y.float().square().sum().backward()
        found.append((y, own.grad, each.lora_A.grad, each.lora_B.grad))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert found[0][0].dtype == (torch.bfloat16 if autocast else rows)


def test_autograd_keeps_no_dequantized_w(monkeypatch):
    """A plain layer's W is kept: the hooks see it.  They do not see all that a Function may keep;
    what dequantize returned is gone after each pass."""
    torch.manual_seed(0)
    x, kept = torch.randn(3, 64, requires_grad=True), {}
    for kind in (NF4Linear, LoRALinear):
        layer, seen = kind(nn.Linear(64, 48), 2, 6, 2), []
        with saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            layer(x)
        kept[kind] = [t.numel() for t in seen if t.is_floating_point()]
        bits = [t for t in seen if t.dtype == torch.uint8]
        assert [t.data_ptr() for t in bits] == (
            [layer.codes.data_ptr()] if kind is NF4Linear else [])
    assert max(kept[NF4Linear]) < 64 * 48 and max(kept[LoRALinear]) == 64 * 48
    layer, made = NF4Linear(nn.Linear(64, 48), 2, 6), []

    def noted(*arguments):
        W = dequantize(*arguments)
        made.append(weakref.ref(W))
        return W
    monkeypatch.setattr(quantized, "dequantize", noted)
    loss = layer(x).sum()
    assert len(made) == 1 and made[0]() is None
    loss.backward()
    assert len(made) == 2 and made[1]() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_that_a_layer_stores(dtype):
    """Half a byte an entry, and one absmax a block; the weight of the nn.Linear is freed."""
    model = nn.Sequential(nn.Linear(64, 48, bias=False, dtype=dtype))
    whole, m, n = weakref.ref(model[0].weight), 48, 64
    (layer,) = add_lora(model, 2, 6, 2, layer=NF4Linear)
    gc.collect()
    assert whole() is None
    frozen = [p for p in layer.parameters() if not p.requires_grad] + list(layer.buffers())
    size = torch.finfo(dtype).bits // 8
    assert sum(p.nbytes for p in frozen) == m * n // 2 + size * m * n // 64
    assert layer.state_dict().keys() == {"codes", "absmax", "lora_A", "lora_B", "aux_A", "aux_B"}
    stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in frozen}
    assert sum(stored.values()) == m * n // 2 + size * m * n // 64


def test_a_layer_is_copied_pickled_moved_and_loaded():
    net, _ = both(aux_rank=2, double=False)
    layer, x = net.first, torch.randn(7, 6)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
        assert other.codes.data_ptr() != layer.codes.data_ptr()
    torch.manual_seed(1)
    other = NF4Linear(nn.Linear(6, 5), 2, 6, 2)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    assert layer.to("meta")(x.to("meta")).shape == (7, 5)
    assert layer.weight.is_meta and layer.weight.shape == (5, 6)


def test_a_layer_made_in_inference_mode_can_be_trained():
    net = Net()
    levels.cache_clear()
    with torch.inference_mode():
        add_lora(net, 2, 6, layer=NF4Linear)
        net(torch.randn(3, 6))
    net(torch.randn(3, 6)).square().sum().backward()
    assert net.first.lora_B.grad.norm() > 0


# ----------------------------------------------------------------------------- with the three steps

@pytest.mark.parametrize("method", ["lora", "lora-sam", "bi-lora"])
def test_steps_are_those_on_the_dequantized_base(method, batch):
    nets, losses = both(2 if method == "bi-lora" else 0), []
    before = snapshot(nets[0])
    for net in nets:
        closure, layers = closure_of(net, batch), lora_layers(net)
        descent, ascent = sgd_pair(net, 0.1, 0.1) if method == "bi-lora" else (
            torch.optim.AdamW(primary_parameters(net), lr=0.1), None)
        for _ in range(3):
            if method == "lora":
                losses.append(lora_step(descent, closure))
            elif method == "lora-sam":
                losses.append(lora_sam_step(descent, closure, 0.2))
            else:
                losses.append(bilora_step(descent, ascent, closure, layers, 0.2))
    for ours, theirs in zip(losses[:3], losses[3:]):
        assert_close(ours, theirs, "loss")
    for ours, theirs in zip(*map(trained, nets), strict=True):
        assert_close(ours, theirs, method)
    after = snapshot(nets[0])
    for name in LAYERS:
        assert torch.equal(after[f"{name}.codes"], before[f"{name}.codes"])
        assert torch.equal(after[f"{name}.absmax"], before[f"{name}.absmax"])
        assert (after[f"{name}.lora_B"] - before[f"{name}.lora_B"]).norm() > 0.01


# ---------------------------------------------------------------------------------------- the files

def test_saved_loaded_and_merged(tmp_path, batch):
    """The base is the dequantized one: an adapter goes from one net to the other, no further."""
    net, plain = both()
    save_adapter(net, tmp_path)
    for fresh in both():
        with torch.no_grad():
            for p in primary_parameters(fresh):
                p.zero_()
        load_adapter(fresh, tmp_path)
        for a, b in zip(primary_parameters(fresh), primary_parameters(net), strict=True):
            assert torch.equal(a, b)
    torch.manual_seed(0)
    original = Net().double()
    add_lora(original, 2, 6)
    with pytest.raises(ValueError, match="base_fingerprint.txt: the base is"):
        load_adapter(original, tmp_path)
    expected = {name: getattr(plain, name).merged_weight() for name in LAYERS}
    logits = net.eval()(batch[0])
    merge_lora_(net)
    assert_close(net(batch[0]), logits, "logits")
    for name in LAYERS:
        assert type(getattr(net, name)) is nn.Linear
        assert_close(getattr(net, name).weight, expected[name], name)


def test_the_fingerprint_is_one_for_a_base_in_either_dtype(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        net = Net().bfloat16().to(dtype)
        add_lora(net, 2, 6, layer=NF4Linear)
        save_adapter(net, tmp_path / str(dtype))
    load_adapter(net, tmp_path / str(torch.float32))


# -------------------------------------------------------------------------------------- the scripts

def command(script, folder, *words):
    return [script, "--seeds", "0", "--limit", "32", "--epochs", "2", "--batch-size", "16",
            "--jobs", "1", "--rank", "4", "--out", str(folder), *words]


def losses_of(folder):
    with open(folder / "log.jsonl") as file:
        return [json.loads(line)["loss"] for line in file]


def test_a_run_is_that_on_a_checkpoint_of_the_dequantized_weights(small_demos, tmp_path):
    words = ["--method", "lora", "lora-sam", "bi-lora"]
    report = methods.main(command("train_glue.py", tmp_path / "nf4", *words, "--nf4"))
    source = report["model"]
    base = Transformer.from_pretrained(source, num_labels=2)
    add_lora(base, 2, 6, layer=NF4Linear)
    save_pretrained(merge_lora_(base), str(tmp_path / "base"), source, "float32")
    methods.main(command("train_glue.py", tmp_path / "plain", *words, "--model",
                         str(tmp_path / "base")))
    methods.main(command("train_glue.py", tmp_path / "original", *words[:2]))
    assert report["config"]["nf4"] and "rise" not in report["results"][0]["metrics"]
    for result in report["results"]:
        name = f"{result['method']}-seed0"
        ours, theirs = (losses_of(tmp_path / out / name) for out in ("nf4", "plain"))
        assert ours == theirs
        tensors = [read_safetensors(tmp_path / out / name / "adapter_model.safetensors")
                   for out in ("nf4", "plain")]
        assert tensors[0].keys() == tensors[1].keys()
        for key, tensor in tensors[0].items():
            assert torch.equal(tensor, tensors[1][key]), key
        assert result["parameters"]["base"] == 0
    assert losses_of(tmp_path / "original" / "lora-seed0") != losses_of(
        tmp_path / "nf4" / "lora-seed0")


def test_a_decoder_is_trained_and_its_adapter_loads(small_demos, tmp_path):
    words = command("train_gsm8k.py", tmp_path, "--method", "lora", "bi-lora", "--bf16",
                    "--checkpointing", "--nf4", "--max-new-tokens", "8")
    report = methods.main(words)
    args, _ = methods.parse(train_gsm8k, words[1:])
    data = train_gsm8k.load(args)
    for result in report["results"]:
        run = train_glue.prepare(args, result["method"], 0,
                                 methods.builder(train_gsm8k, args, data), "", 1)
        assert all(type(layer) is NF4Linear for layer in run.layers)
        assert {layer.absmax.dtype for layer in run.layers} == {torch.bfloat16}
        load_adapter(run.model, tmp_path / f"{result['method']}-seed0", run.model.module_names,
                     read_safetensors)
        assert min(layer.delta().norm() for layer in run.layers) > 0


def test_killed_and_resumed_bit_for_bit(small_demos, tmp_path, monkeypatch):
    """The saved state holds no weight of the base.  An older run, without the option, goes on."""
    words = ["--method", "bi-lora", "--save-every", "1"]
    step, folders = methods.METHODS["bi-lora"].step, {True: ["--nf4"], False: []}

    def killed(run, closure):
        if len(run.log) == 2:
            raise KeyboardInterrupt
        return step(run, closure)
    for nf4, option in folders.items():
        methods.main(command("train_glue.py", tmp_path / f"whole{nf4}", *words, *option))
        out = tmp_path / f"killed{nf4}"
        with monkeypatch.context() as patch:
            patch.setitem(methods.METHODS, "bi-lora",
                          methods.METHODS["bi-lora"]._replace(step=killed))
            with pytest.raises(SystemExit):
                methods.main(command("train_glue.py", out, *words, *option))
        state = torch.load(out / "bi-lora-seed0" / "state.pt", weights_only=True)
        assert not [name for name in state["trained"] if name.endswith(("codes", "absmax"))]
        if not nf4:
            for path in (out / "config.json", out / "bi-lora-seed0" / "config.json"):
                config = read_json(path)
                del config["nf4"]
                path.write_text(json.dumps(config))
        methods.main(command("train_glue.py", out, *words, *option, "--resume"))
        assert losses_of(out / "bi-lora-seed0") == losses_of(
            tmp_path / f"whole{nf4}" / "bi-lora-seed0")
    assert losses_of(tmp_path / "killedTrue" / "bi-lora-seed0") != losses_of(
        tmp_path / "killedFalse" / "bi-lora-seed0")


@pytest.mark.parametrize("words, reason", [
    (["--method", "full"], "full fine-tuning has no adapters; expected no"),
    (["--method", "flat-lora"], "this method perturbs W, which --nf4 keeps in 4 bits"),
    (["--method", "rwp-full"], "this method perturbs W, which --nf4 keeps in 4 bits"),
    (["--init", "pissa"], "--nf4 has layers of its own"),
    (["--init", "lora-ga"], "--nf4 has layers of its own"),
    (["--dora"], "--nf4 has layers of its own"), (["--rslora"], "--nf4 has layers of its own")])
def test_what_reads_w_itself_is_refused(words, reason, small_demos, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        methods.main(command("train_glue.py", tmp_path / "out", "--nf4", *words))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert reason in error.splitlines()[-1]
    assert not list(tmp_path.glob("out/*/metrics.json"))


def test_the_laboratory_refuses_such_a_run(small_demos, tmp_path, capsys):
    methods.main(command("train_glue.py", tmp_path / "runs", "--method", "lora", "--nf4"))
    with pytest.raises(SystemExit) as stop:
        sharpness.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "nf4 is true; the parts move W, which --nf4 keeps in 4 bits" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_benchmark_passes_the_option_on(small_demos):
    words = ["--device", "cpu", "--layers", "1", "--shape", "minilm", "--batch-size", "2",
             "--length", "8", "--rounds", "2", "--warmup", "0", "--rank", "2", "--nf4"]
    options = benchmark.parse_arguments(words)
    base = benchmark.build(options)
    run, _ = benchmark.prepared("bi-lora", base, options)
    assert len(run.layers) == 7 and all(type(layer) is NF4Linear for layer in run.layers)
    steps, left_out = benchmark.steps_of(["lora", "flat-lora", "full", "floor"], options)
    assert list(steps) == ["lora", "floor"] and "4 bits" in left_out["flat-lora"]
    assert "no adapters" in left_out["full"]

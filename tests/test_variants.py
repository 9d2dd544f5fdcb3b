"""Starts and layers of notes/variants.py: PiSSA, LoRA-GA, DoRA, rsLoRA.

Oracles: W written out in float64 from B, A, m, s and the start, with torch's autograd on it;
numpy's singular value decomposition; and adapters that PEFT saved, with its logits
(tests/golden/bert/variants).
"""

import json
import math
import os
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import train_glue
import train_gsm8k
from bilora import (add_lora, auxiliary_parameters, load_adapter, lora_layers, merge_lora_,
                    primary_parameters, save_adapter)
from model import Transformer, read_json, read_safetensors
from test_steps import (LAYERS, Net, assert_close, closure_of, global_norm, plain_gradients,
                        sgd_pair, snapshot)
from train_glue import METHODS

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
import methods  # noqa: E402
from variants import VariantLinear, lora_ga_, pissa_  # noqa: E402

TENSORS = ("lora_B", "lora_A", "magnitude", "aux_B", "aux_A")
KINDS = {"rslora": dict(rslora=True), "dora": dict(dora=True), "start": dict(start=True),
         "all": dict(start=True, dora=True, rslora=True)}
GOLDEN = os.path.join(os.path.dirname(__file__), "golden")


def variant(kind, aux_rank=0, rank=2, alpha=6, trained=True):
    """A float64 Net with such layers; trained: away from the initial values."""
    torch.manual_seed(0)
    net = Net()
    layers = add_lora(net, rank, alpha, aux_rank, layer=partial(VariantLinear, **KINDS[kind]))
    net.double().train()
    with torch.no_grad():
        if "start" in KINDS[kind]:
            pissa_(layers)
        if trained:
            for p in [*primary_parameters(net), *auxiliary_parameters(net)]:
                p.add_(0.5 * torch.randn_like(p))
    return net


def weight_of(layer, kind, training, values=None):
    """W by the formulas of variants.py's header.  values: in place of the layer's tensors."""
    t = {name: getattr(layer, name) for name in TENSORS} | (values or {})
    s = 6 / math.sqrt(2) if "rslora" in KINDS[kind] else 6 / 2
    V = layer.weight + s * t["lora_B"] @ t["lora_A"]
    if "start" in KINDS[kind]:
        V = V - s * layer.start_B @ layer.start_A
    if training and t["aux_B"] is not None:
        V = V + s * t["aux_B"] @ t["aux_A"]
    if "dora" in KINDS[kind]:
        V = t["magnitude"][:, None] * V / V.square().sum(1, keepdim=True).sqrt().detach()
    return V


# ---------------------------------------------------------------------------------------- the layer

@pytest.mark.parametrize("aux_rank", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_merge_are_those_of_w_written_out(kind, aux_rank):
    net, x = variant(kind, aux_rank), torch.randn(7, 2, 6, dtype=torch.float64)
    layer = net.first
    for training in (True, False):
        W = weight_of(layer, kind, training)
        assert_close(layer.train(training)(x), x @ W.T + layer.bias, f"{kind}, {training}")
        assert_close(layer.merged_weight(training), W, "merged_weight")
    assert_close(layer.delta(), W - layer.weight, "delta")
    assert layer.delta().norm() > 0.1
    before = net.eval()(x)
    merge_lora_(net)
    assert type(net.first) is nn.Linear
    assert_close(net.first.weight, W, "merged")
    assert_close(net(x), before, "the merged model")


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_a_fresh_adapter_without_a_start_changes_no_bit(kind):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(7, 6)
    before = net(x)
    add_lora(net, 2, 6, 2, layer=partial(VariantLinear, **KINDS[kind]))
    assert torch.equal(net.train()(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_leaves_w0_alone_and_w_at_w0(dtype):
    torch.manual_seed(0)
    net, x = Net().to(dtype), torch.randn(7, 6).to(dtype)
    weights, expected = [net.first.weight, net.last.weight], net(x)
    before = [W.clone() for W in weights]
    pissa_(add_lora(net, 2, 6, 2, layer=partial(VariantLinear, start=True)))
    assert net.first.weight is weights[0]
    for W, old in zip(weights, before):
        assert torch.equal(W, old)
    assert net.first.lora_B.norm() > 0.1
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(net(x), expected, rtol=8 * eps, atol=8 * eps)


def tensors_of(net):
    """{(layer, name): tensor} of all that the adapters train."""
    return {(layer, name): getattr(getattr(net, layer), name).detach().clone() for layer in LAYERS
            for name in TENSORS if getattr(net.first, name) is not None}


def gradients_of(net, kind, batch, moves=None):
    """{(layer, name): gradient} in training mode at W written out, the tensors moved by `moves`."""
    own, h = tensors_of(net), batch[0]
    own = {key: (t + moves[key] if moves else t).requires_grad_() for key, t in own.items()}
    for layer in ("first", "shared", "shared", "last"):
        values = {name: t for (owner, name), t in own.items() if owner == layer}
        module = getattr(net, layer)
        h = torch.tanh(h @ weight_of(module, kind, True, values).T + module.bias)
    loss = F.cross_entropy(net.head(h), batch[1])
    return dict(zip(own, torch.autograd.grad(loss, list(own.values()))))


def test_the_magnitude_is_not_rounded_to_half_precision():
    """Its ratio to the norm is near 1, where bfloat16 has steps of 1/128."""
    torch.manual_seed(0)
    net, x = Net().bfloat16(), torch.randn(64, 6).bfloat16()
    add_lora(net, 2, 6, layer=partial(VariantLinear, dora=True))
    layer = net.first
    with torch.no_grad():
        before = layer(x).float() - layer.bias.float()
        layer.magnitude.mul_(1.003)
        after = layer(x).float() - layer.bias.float()
    assert layer(x).dtype == torch.bfloat16
    share = (after * before).sum() / before.square().sum()  # least squares over all entries
    assert share.item() == pytest.approx(1.003, abs=1e-3)


def test_what_has_no_place_for_a_start_is_refused(batch):
    net = Net()
    layers = add_lora(net, 2, 6, layer=VariantLinear)
    before = snapshot(net)
    for start in (pissa_, lambda layers: lora_ga_(layers, closure_of(net, batch))):
        with pytest.raises(ValueError, match="no place for a start"):
            start(layers)
    net = Net()
    net.last.weight.data[1] = 0
    with pytest.raises(ValueError, match="norm of each row of W0; one of them is 0"):
        add_lora(net, 2, 6, layer=partial(VariantLinear, dora=True))
    assert before["first.lora_B"].abs().max() == 0


def test_lora_ga_needs_every_layer():
    net = Net().double()
    layers = add_lora(net, 2, 6, layer=partial(VariantLinear, start=True))
    net.double()
    x = torch.randn(3, 6, dtype=torch.float64)

    def closure():
        loss = net.first(x).square().mean()
        loss.backward()
        return loss
    with pytest.raises(ValueError, match="does not depend on every adapted layer"):
        lora_ga_(layers, closure)
    assert not any(layer.start_A.any() for layer in layers)
    assert not any(layer.weight.requires_grad for layer in layers)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_the_norm_as_a_constant(kind, batch):
    """As DoRA's section 4.3 has it; finite differences would see the norm move."""
    net = variant(kind, aux_rank=2)
    closure_of(net, batch)()
    for (layer, name), g in gradients_of(net, kind, batch).items():
        assert_close(getattr(getattr(net, layer), name).grad, g, f"{layer}.{name}")
        assert g.norm() > 0


def test_a_layer_names_what_it_trains_once():
    """What descends, what is counted and what is saved is the same list."""
    net = variant("all")
    own = [n for n, p in net.named_parameters() if p.requires_grad]
    assert len(own) == 9 and len(primary_parameters(net)) == 9
    assert {id(p) for p in primary_parameters(net)} == {
        id(p) for n, p in net.named_parameters() if p.requires_grad}
    assert "first.start_B" in snapshot(net) and not net.first.start_B.requires_grad


# --------------------------------------------------------------------------------------- the starts

@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_at_the_best_approximation(rslora):
    torch.manual_seed(0)
    net = Net().double()
    layers = add_lora(net, 2, 6, layer=partial(VariantLinear, start=True, rslora=rslora))
    net.double()
    pissa_(layers)
    s = 6 / math.sqrt(2) if rslora else 3
    for layer in layers:
        U, S, Vh = np.linalg.svd(layer.weight.detach().numpy())
        best = torch.tensor(U[:, :2] @ np.diag(S[:2]) @ Vh[:2])
        assert_close(s * layer.lora_B @ layer.lora_A, best, "s B0 A0")
        assert_close(layer.lora_B.T @ layer.lora_B, torch.tensor(np.diag(S[:2] / s)), "B0")
        assert_close(layer.lora_A @ layer.lora_A.T, torch.tensor(np.diag(S[:2] / s)), "A0")
        assert torch.equal(layer.lora_B, layer.start_B) and torch.equal(layer.lora_A, layer.start_A)


def test_lora_ga_starts_along_the_gradient_of_w0(batch):
    """A0 has the first r right singular vectors of G, B0 the next r left ones."""
    torch.manual_seed(0)
    net = Net(p=0.0)
    layers = add_lora(net, 2, 6, layer=partial(VariantLinear, start=True))
    net.double().train()
    G, calls = plain_gradients(net, *batch), []

    def closure():
        calls.append(torch.rand(1))  # as dropout draws
        return closure_of(net, batch)()
    random, before = torch.get_rng_state(), snapshot(net)
    lora_ga_(layers, closure)
    assert len(calls) == 1 and torch.equal(torch.get_rng_state(), random)
    for name in LAYERS:
        layer = getattr(net, name)
        U, _, Vh = (torch.tensor(a) for a in np.linalg.svd(G[name].numpy()))
        size = layer.weight.shape[0] ** 0.25 / 4
        for found, vectors in ((layer.lora_A / size, Vh[:2]), (layer.lora_B.T / size, U.T[2:4])):
            signs = (found * vectors).sum(1)
            assert_close(signs.abs(), torch.ones(2).double(), name)
            assert_close(found, signs[:, None] * vectors, name)
        assert torch.equal(layer.weight, before[f"{name}.weight"])
        assert not layer.weight.requires_grad and layer.weight.grad is None
        assert_close(layer.merged_weight(), layer.weight, name)


def test_lora_ga_refuses_a_rank_without_singular_vectors(batch):
    net = Net()
    layers = add_lora(net, 3, 6, layer=partial(VariantLinear, start=True))
    with pytest.raises(ValueError, match="rank is 3, a layer of shape .5, 6. has 5"):
        lora_ga_(layers, closure_of(net, batch))


# ----------------------------------------------------------------------------- with the three steps



@pytest.mark.parametrize("method", ["lora", "lora-sam", "bi-lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_of_every_method_written_out(kind, method, batch):
    net, rho, eta = variant(kind, 2 if METHODS[method].auxiliary else 0), 0.2, 0.1
    descent, ascent = sgd_pair(net, eta, eta) if METHODS[method].auxiliary else (
        torch.optim.SGD(primary_parameters(net), lr=eta), None)
    before, g = tensors_of(net), gradients_of(net, kind, batch)
    if method == "lora-sam":  # one radius over all that is trained, the magnitudes included
        norm = global_norm(g.values())
        g = gradients_of(net, kind, batch, {key: rho * t / norm for key, t in g.items()})
    run = SimpleNamespace(model=net, layers=lora_layers(net), descent=descent, ascent=ascent,
                          rho=rho, args=SimpleNamespace(snapshots=0, init="default"), log=[],
                          steps=1)
    METHODS[method].step(run, closure_of(net, batch))
    expected = {key: t - eta * g[key] * (-1 if "aux" in key[1] else 1) for key, t in before.items()}
    if ascent:
        c = global_norm(expected[layer, "aux_B"] @ expected[layer, "aux_A"] for layer in LAYERS)
        assert c > rho
    for (layer, name), t in expected.items():
        factor = math.sqrt(rho / c) if "aux" in name else 1.0
        found = getattr(getattr(net, layer), name)
        assert_close(found, factor * t, f"{layer}.{name}", rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------------------- the files

def test_wrong_words(small_demos, tmp_path, capsys):
    for words, message in ((["--init", "lora-ga", "--rank", "60", "--aux-rank", "4"],
                            "LoRA-GA takes 2 r singular vectors; rank is 60"),
                           (["--method", "lora", "full", "--dora"],
                            "full fine-tuning has no adapters")):
        with pytest.raises(SystemExit) as stop:
            methods.main(["train_glue.py", "--limit", "32", "--jobs", "1", "--seeds", "0", "--out",
                          str(tmp_path / words[0].strip("-")), *words])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    assert not (tmp_path / "method").exists()  # nothing was trained


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_without_a_change(kind, tmp_path):
    net, x = variant(kind, 2).float(), torch.randn(7, 6)
    save_adapter(net, tmp_path)
    fresh = variant(kind, 2, trained=False).float()
    load_adapter(fresh, tmp_path)
    for name, t in snapshot(net).items():
        if "aux" not in name:
            assert torch.equal(snapshot(fresh)[name], t), name
    assert torch.equal(fresh.eval()(x), net.eval()(x))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    rank = 4 if "start" in KINDS[kind] else 2
    scale = settings["lora_alpha"] / (math.sqrt(rank) if "rslora" in KINDS[kind] else rank)
    assert settings["r"] == rank and math.isclose(scale, net.first.scale)
    assert settings.get("use_dora", False) == ("dora" in KINDS[kind])
    assert settings.get("use_rslora", False) == ("rslora" in KINDS[kind])


def test_a_started_adapter_is_a_plain_one_of_twice_the_rank(tmp_path):
    net, x = variant("start").float(), torch.randn(7, 6)
    save_adapter(net, tmp_path)
    torch.manual_seed(0)
    plain = Net()
    add_lora(plain, 4, 12)
    load_adapter(plain, tmp_path)  # the fingerprint is that of the original base
    torch.testing.assert_close(plain.eval()(x), net.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind, key", [
    ("rslora", "use_rslora is True"), ("dora", "use_dora is True"), ("start", "r is 4")])
def test_another_kind_of_layer_is_refused(kind, key, tmp_path):
    save_adapter(variant(kind), tmp_path)
    torch.manual_seed(0)
    plain = Net().double()
    add_lora(plain, 2, 6)
    with pytest.raises(ValueError, match=key):
        load_adapter(plain, tmp_path)
    save_adapter(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match="the model's is"):
        load_adapter(variant(kind), tmp_path / "plain")


EXPECTED = torch.load(os.path.join(GOLDEN, "bert", "variants", "expected.pt"), weights_only=True)


@pytest.mark.parametrize("name, words", [("rslora", dict(rslora=True)), ("dora", dict(dora=True)),
                                         ("pissa", dict(start=True)), ("lora-ga", dict(start=True)),
                                         ("pissa", None), ("lora-ga", None)])
def test_pefts_adapters_give_pefts_logits(name, words):
    """words None: PEFT's difference to the start, into a plain LoRA of twice the rank."""
    model = Transformer.from_pretrained(os.path.join(GOLDEN, "bert"), num_labels=3)
    targets = r"attention\.(q|v)$"
    if words is None:
        add_lora(model, 4, 12, targets=targets)
    else:
        add_lora(model, 2, 6, targets=targets, layer=partial(VariantLinear, **words))
    load_adapter(model, os.path.join(GOLDEN, "bert", "variants", name), model.module_names,
                 read_safetensors)
    rows = torch.load(os.path.join(GOLDEN, "bert", "expected.pt"), weights_only=True)
    found = torch.cat([model.eval()(row[None]) for row in rows["rows"]])
    torch.testing.assert_close(found, EXPECTED[name]["logits"], rtol=0, atol=1e-5)
    assert (found - rows["logits"]).abs().max() > 0.01


def test_pissa_starts_where_pefts_does():
    model = Transformer.from_pretrained(os.path.join(GOLDEN, "bert"), num_labels=3)
    layers = add_lora(model, 2, 6, targets=r"attention\.(q|v)$",
                      layer=partial(VariantLinear, start=True))
    pissa_(layers)
    product = layers[0].scale * layers[0].lora_B @ layers[0].lora_A
    torch.testing.assert_close(product, EXPECTED["pissa"]["start"], rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------- without adapters

def full_command(out, *more):
    return ["train_glue.py", "--method", "lora", "full", "full-sam", "--seeds", "0", "--limit",
            "64", "--epochs", "2", "--batch-size", "16", "--jobs", "1", "--out", str(out), *more]


def test_full_fine_tuning_is_paired_saved_and_loaded(small_demos, tmp_path):
    report = methods.main(full_command(tmp_path))
    assert report["difference"].keys() == {"full", "full-sam"}
    args, _ = methods.parse(train_glue, full_command(tmp_path)[1:])
    data = train_glue.load(args)
    for result in report["results"][1:]:
        folder = tmp_path / f"{result['method']}-seed0"
        assert not (folder / "adapter_config.json").exists() and not (folder / "state.pt").exists()
        model = Transformer.from_pretrained(str(folder / "model"), num_labels=2)
        assert model.config.labels == data.names
        scores = train_glue.evaluate(args, model, data)["scores"]
        assert scores["accuracy"] == result["metrics"]["accuracy"]
        assert read_json(folder / "model" / "config.json")["dtype"] == "float32"
        tensors = read_safetensors(folder / "model" / "model.safetensors").values()
        assert {t.dtype for t in tensors} == {torch.float32}  # the demo's own is bfloat16
        sizes = {"base": sum(p.numel() for p in model.parameters()), "head": 0}
        sizes["head"] = sum(p.numel() for p in model.classifier.parameters())
        sizes["base"] -= sizes["head"]
        assert result["parameters"] == {"primary": 0, "auxiliary": 0, **sizes}
        start = Transformer.from_pretrained(data.source, num_labels=2)
        moved = [n for (n, p), q in zip(model.named_parameters(), start.parameters())
                 if not torch.equal(p, q)]
        assert {n.split(".")[0] for n in moved} == {n.split(".")[0] for n, _ in
                                                    model.named_parameters()}
    rates = [json.loads(line)["lr"] for line in open(tmp_path / "full-seed0" / "log.jsonl")]
    assert max(rates) == pytest.approx(args.lr / 5)


def test_full_sam_perturbs_all_weights_by_one_radius(small_demos, tmp_path):
    args, _ = methods.parse(train_glue, full_command(tmp_path, "--rho", "0.3")[1:])
    data, seen = train_glue.load(args), []
    run = train_glue.prepare(args, "full-sam", 0, methods.builder(train_glue, args, data), "", 2)
    closure = partial(train_glue.forward_backward, args, run.model.train(), data, data.rows[:8])

    def watched():
        seen.append([p.detach().double().clone() for p in run.model.parameters()])
        loss = closure()
        gradients.append([p.grad.clone() for p in run.model.parameters() if p.grad is not None])
        return loss
    gradients = []
    METHODS["full-sam"].step(run, watched)
    eps = [b - a for a, b in zip(*seen)]
    assert global_norm(eps) == pytest.approx(0.3, rel=1e-3)
    moved = [e for e in eps if e.norm() > 0]
    size = global_norm(gradients[0])
    for e, g in zip(moved, [g for g in gradients[0] if g.norm() > 0], strict=True):
        torch.testing.assert_close(e, 0.3 * g.double() / size, rtol=1e-2, atol=1e-6)


def test_full_fine_tuning_trains_float32_weights_and_a_tenth_for_a_decoder(small_demos, tmp_path):
    words = ["--method", "full", "--bf16", "--out", str(tmp_path)]
    args, _ = methods.parse(train_gsm8k, words)
    data = train_gsm8k.load(args)
    run = train_glue.prepare(args, "full", 0, methods.builder(train_gsm8k, args, data), "", 10)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert run.schedules[0].base_lrs == [args.lr / 10]
    args.full_lr = 0.125
    run = train_glue.prepare(args, "full", 0, methods.builder(train_gsm8k, args, data), "", 10)
    assert run.schedules[0].base_lrs == [0.125]


# -------------------------------------------------------------------------------------- the scripts

WORDS = {"pissa": ["--init", "pissa"], "lora-ga": ["--init", "lora-ga", "--dropout", "0.1"],
         "all": ["--init", "pissa", "--dora", "--rslora"]}


@pytest.mark.parametrize("name", WORDS)
def test_runs_of_both_methods_and_their_adapters(name, small_demos, tmp_path):
    words = ["--method", "lora", "bi-lora", "--seeds", "0", "--limit", "64", "--epochs", "1",
             "--jobs", "1", "--rank", "4", "--out", str(tmp_path), *WORDS[name]]
    report = methods.main(["train_glue.py", *words])
    args, _ = methods.parse(train_glue, words)
    data = train_glue.load(args)
    for result in report["results"]:
        assert math.isfinite(result["metrics"]["rise"]) and result["epochs"][0]["loss"] > 0
        run = train_glue.prepare(args, result["method"], 0, methods.builder(train_glue, args, data),
                                 "", 1)
        trained = sum(p.numel() for p in primary_parameters(run.model))
        assert result["parameters"]["primary"] == trained
        load_adapter(run.model, os.path.join(tmp_path, f"{result['method']}-seed0"),
                     run.model.module_names, read_safetensors)
        scores = train_glue.evaluate(args, run.model, data)["scores"]
        assert scores["accuracy"] == result["metrics"]["accuracy"]
        settings = read_json(tmp_path / f"{result['method']}-seed0" / "adapter_config.json")
        assert settings.get("use_dora", False) == ("--dora" in words)
        assert settings.get("use_rslora", False) == ("--rslora" in words)
        assert settings["r"] == (8 if "--init" in words else 4)
        moved = [layer.delta().norm() for layer in run.layers]
        assert min(moved) > 0
        if "--init" in words:  # a step of a loaded run, as sharpness.py takes it, keeps the start
            starts = [layer.start_A.clone() for layer in run.layers]
            METHODS[result["method"]].step(run, partial(
                train_glue.forward_backward, args, run.model.train(), data, data.rows[:8]))
            for layer, start in zip(run.layers, starts, strict=True):
                assert start.any() and torch.equal(layer.start_A, start)


@pytest.mark.parametrize("name, method", [*((name, "bi-lora") for name in WORDS),
                                          ("default", "full-sam")])
def test_killed_and_resumed_bit_for_bit(name, method, small_demos, tmp_path, monkeypatch):
    def command(folder, *more):
        return ["train_glue.py", "--method", method, "--seeds", "0", "--limit", "64", "--epochs",
                "2", "--batch-size", "16", "--jobs", "1", "--rank", "4", "--save-every", "3",
                "--out", str(tmp_path / folder), *WORDS.get(name, []), *more]
    methods.main(command("whole"))
    step = METHODS[method].step

    def killed(run, closure):
        if len(run.log) == 5:
            raise KeyboardInterrupt
        return step(run, closure)
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, method, METHODS[method]._replace(step=killed))
        with pytest.raises(SystemExit):
            methods.main(command("killed"))
    methods.main(command("killed", "--resume"))
    file = "model/model.safetensors" if method == "full-sam" else "adapter_model.safetensors"
    whole, killed = (read_safetensors(tmp_path / f / f"{method}-seed0" / file)
                     for f in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, killed[key]), key

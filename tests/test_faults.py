"""What an adapter, a step or a file cannot serve is refused by name before anything has changed;
what it can serve is served exactly.

Oracles: the layer before it was adapted; float64 in place of half precision; dense gradients in
place of sparse ones; PEFT's rules for names, written out here.
"""

import copy
import json
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from bilora import (LoRALinear, add_lora, bilora_optimizers, bilora_step, clip_perturbation_,
                    load_adapter, lora_sam_step, lora_step, perturbation_norm, primary_parameters,
                    save_adapter)


def net(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), *more, nn.Linear(4, 3))


# ----------------------------------------------------------------------- modules that are more


class Half(nn.Linear):
    def forward(self, x):
        return nn.Linear.forward(self, x) / 2


class Called(nn.Linear):
    def __call__(self, x):
        return nn.Linear.__call__(self, x) / 2


class Gain(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(()))


def with_layer(layer):
    model = net()
    model[0] = layer
    return model


def hooked(register, hook):
    model = net()
    getattr(model[0], register)(hook)
    return model


def without_values():
    model = net()
    model[0].to("meta")
    return model


def own_forward():
    model = net()
    model[0].forward = lambda x: F.linear(x, model[0].weight)
    return model


def plain_tensor():
    model = net()
    del model[0].weight
    model[0].weight = torch.randn(4, 5)
    return model


def pruned():
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def in_inference_mode():
    with torch.inference_mode():
        return net()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("make, named", [
    (lambda: with_layer(parametrizations.weight_norm(nn.Linear(5, 4))), "lose .*parametrizations"),
    (lambda: with_layer(parametrizations.orthogonal(nn.Linear(5, 4))), "lose .*parametrizations"),
    (lambda: with_layer(nn.utils.weight_norm(nn.Linear(5, 4))), "lose .*weight_g, weight_v"),
    (lambda: with_layer(nn.utils.spectral_norm(nn.Linear(5, 4))), "lose .*weight_orig"),
    (pruned, "lose .*weight_mask, weight_orig"), (plain_tensor, "lose weight"),
    (lambda: with_layer(Half(5, 4)), "lose the forward of Half"), (own_forward, "lose the forward"),
    (lambda: with_layer(Called(5, 4)), "lose the forward of Called"),
    (lambda: with_layer(Gain(5, 4)), "lose gain"),
    (lambda: hooked("register_forward_hook", lambda *a: None), "lose _forward_hooks"),
    (lambda: hooked("register_forward_pre_hook", lambda *a: None), "lose _forward_pre_hooks"),
    (lambda: hooked("register_full_backward_hook", lambda *a: None), "lose _backward_hooks"),
    (without_values, "Parameter of torch.float32 on meta"),
    (lambda: with_layer(nn.LazyLinear(4)), "lose _forward_pre_hooks"),
    (in_inference_mode, "made in inference mode")])
def test_what_an_adapter_would_lose_is_refused(make, named):
    """The first layer is such a module, the second one is plain: neither changes."""
    model = make()
    before, kind, state = dict(model.named_modules()), type(model[0]), torch.get_rng_state()
    for targets in (None, ["1", "0"]):
        with pytest.raises(ValueError, match=f"0 cannot be adapted: .*{named}"):
            add_lora(model, 2, 4, targets=targets)
    with pytest.raises(ValueError, match=f"linear cannot be adapted: .*{named}"):
        LoRALinear(model[0], 2, 4)
    assert dict(model.named_modules()) == before and type(model[0]) is kind
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in model[-1].parameters())


def test_an_integer_weight_is_refused():
    model = net()
    model[0].weight = nn.Parameter(torch.zeros(4, 5, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="0 cannot be adapted: .*Parameter of torch.int8"):
        add_lora(model, 2, 4)


def test_a_weight_of_another_class_is_refused():
    """Quantized weights are such classes: what they compute is not what W0 says."""
    class Packed(nn.Parameter):
        pass

    model = net()
    model[0].weight = Packed(torch.randn(4, 5))
    with pytest.raises(ValueError, match="0 cannot be adapted: its weight is a Packed"):
        add_lora(model, 2, 4)


def test_a_subclass_that_computes_as_linear_does_is_adapted():
    class Named(nn.Linear):
        pass

    model = with_layer(Named(5, 4))
    x = torch.randn(2, 5)
    expected = model(x)
    assert len(add_lora(model, 2, 4)) == 2 and torch.equal(model(x), expected)


# ----------------------------------------------------------------------- torch's ambient state


@pytest.mark.parametrize("ambient", [
    lambda: torch.device("meta"), torch.inference_mode, torch.no_grad,
    lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_pairs_do_not_depend_on_ambient_state(ambient):
    """Device, grad mode and autocast around add_lora: the same bits, and a pair that can learn."""
    plain, model = net(), net()
    torch.manual_seed(1)
    expected = add_lora(plain, 2, 4, 2)
    torch.manual_seed(1)
    with ambient():
        layers = add_lora(model, 2, 4, 2)
    for i, (layer, other) in enumerate(zip(layers, expected)):
        for name in ("lora_A", "lora_B", "aux_A", "aux_B"):
            assert torch.equal(getattr(layer, name), getattr(other, name)), f"layer {i}, {name}"
    descent, ascent = bilora_optimizers(model, 0.1)
    x = torch.randn(3, 5)
    bilora_step(descent, ascent, lambda: backward(model, x), layers, 0.1)
    assert layers[0].lora_B.any() and layers[0].aux_B.any()


def test_the_default_dtype_is_not_the_adapters():
    torch.set_default_dtype(torch.float64)
    try:
        layers = add_lora(net(), 2, 4, 2)
        assert {p.dtype for layer in layers for p in (layer.lora_A, layer.aux_B)} == {torch.float32}
        assert perturbation_norm([]).item() == 0
    finally:
        torch.set_default_dtype(torch.float32)


def backward(model, x):
    loss = model(x).square().mean()
    loss.backward()
    return loss


# --------------------------------------------------------------------- arguments of another kind


@pytest.mark.parametrize("targets", [5, [["0"]], ["0", None], "(", "[0", [], {}, b"0", True])
def test_targets_of_another_kind(targets):
    model = net()
    with pytest.raises(ValueError, match="targets.* expected a regular expression or name endings"):
        add_lora(model, 2, 4, targets=targets)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("alpha", [0, -1, None, "16", float("nan"), float("inf")])
def test_alpha_of_another_kind(alpha):
    model = net()
    with pytest.raises(ValueError, match="alpha is .*; expected a number above 0"):
        add_lora(model, 2, alpha)
    assert all(p.requires_grad for p in model.parameters()) and type(model[0]) is nn.Linear


def test_a_bool_is_no_rank():
    with pytest.raises(ValueError, match="rank is True"):
        add_lora(net(), True, 4)


def test_a_name_ending_is_no_pattern():
    """The point of "a.q" is a point."""
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(4, 4)}), "a_q": nn.Linear(4, 4)})
    assert add_lora(model, 2, 4, targets=["a.q"]) == [model["a"]["q"]]
    assert type(model["a_q"]) is nn.Linear


def test_params_of_another_kind():
    model = net()
    add_lora(model, 2, 4)
    optimizer = torch.optim.SGD(primary_parameters(model), lr=0.1)
    for params in (["0.lora_A"], [model], []):
        with pytest.raises(ValueError, match="params is .*expected the parameters to perturb"):
            lora_sam_step(optimizer, lambda: None, 0.1, params)


def test_lbfgs_is_refused_in_a_sentence():
    model, x = net(), torch.randn(3, 5)
    layers = add_lora(model, 2, 4, 2)
    optimizer = torch.optim.LBFGS(primary_parameters(model))
    ascent = bilora_optimizers(model, 0.1)[1]
    steps = [lambda: lora_step(optimizer, lambda: backward(model, x)),
             lambda: lora_sam_step(optimizer, lambda: backward(model, x), 0.1),
             lambda: bilora_step(optimizer, ascent, lambda: backward(model, x), layers, 0.1)]
    for step in steps:
        with pytest.raises(ValueError, match="LBFGS calls closure"):
            step()


@pytest.mark.parametrize("sam", [False, True])
def test_sparse_gradients_are_those_of_a_dense_embedding(sam):
    """One row is looked up twice: its gradient is the sum of two entries."""
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 6, sparse=sparse), nn.Linear(6, 3))
        add_lora(model, 2, 4)
        model[0].requires_grad_(True)
        rows = [p for p in model.parameters() if p.requires_grad]
        optimizer, ids = torch.optim.SGD(rows, lr=0.5), torch.tensor([1, 7, 7, 3])
        for _ in range(2):
            closure = lambda: backward(model, ids)
            loss = lora_sam_step(optimizer, closure, 0.3) if sam else lora_step(optimizer, closure)
        results.append([loss, *rows])
    assert results[1][1].grad.is_sparse
    for dense, sparse in zip(*results):
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------ steps with no work to do


def test_a_descent_made_before_the_adapters():
    """It trains the head alone, so that the loss moves, and the adapters never do."""
    model, x = net(), torch.randn(3, 5)
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = add_lora(model, 2, 4, 2, targets=["0"])
    model[1].requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    _, ascent = bilora_optimizers(model, 0.1)
    with pytest.raises(ValueError, match="descent lacks 2 of the layers' primary parameters"):
        bilora_step(early, ascent, lambda: backward(model, x), layers, 0.1)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning",
                            "ignore:None of the inputs:UserWarning")
@pytest.mark.parametrize("method", ["lora-sam", "bi-lora"])
def test_reentrant_checkpointing_of_a_frozen_base(method):
    """The head gets a gradient, the adapters inside the checkpoint get none."""
    model, x = net(), torch.randn(3, 5)
    layers = add_lora(model, 2, 4, 2 if method == "bi-lora" else 0, targets=["0"])
    model[1].requires_grad_(True)
    descent, ascent = bilora_optimizers(model, 0.1)

    def closure(reentrant=True):
        loss = model[1](checkpoint(model[0], x, use_reentrant=reentrant)).square().mean()
        loss.backward()
        return loss

    def step(closure):
        if method == "bi-lora":
            return bilora_step(descent, ascent, closure, layers, 0.1)
        return lora_sam_step(descent, closure, 0.1, primary_parameters(model))

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="left none of 2 parameters .*no reentrant checkpointing"):
        step(closure)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    step(lambda: closure(reentrant=False))
    assert layers[0].lora_B.any()


# --------------------------------------------------------------------------------- half precision


def halves(spread, dtype):
    """Layers with pairs of a dtype, and c of the same values in float64."""
    model = net()
    layers, squares = add_lora(model, 2, 4, 2), 0.0
    with torch.no_grad():
        for layer in layers:
            layer.aux_B.normal_(std=spread)
            layer.aux_A.normal_(std=spread)
    model.to(dtype)
    for layer in layers:
        squares += (layer.aux_B.double() @ layer.aux_A.double()).square().sum().item()
    return layers, squares ** 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [2e-3, 1.0, 12.0, 100.0])
def test_the_norm_and_the_clip_of_half_precision_pairs(dtype, spread):
    layers, c = halves(spread, dtype)
    rho = c / 1e10
    assert perturbation_norm(layers).item() == pytest.approx(c, rel=1e-5)
    old = [p.double() for layer in layers for p in (layer.aux_B, layer.aux_A)]
    assert clip_perturbation_(layers, rho).item() == pytest.approx(c, rel=1e-5)
    new = [p for layer in layers for p in (layer.aux_B, layer.aux_A)]
    for i, (a, b) in enumerate(zip(old, new)):  # each value within one rounding of a / 1e5
        expected = (a / 1e5).to(dtype).double()
        bound = expected.abs() * torch.finfo(dtype).eps + 6e-8
        assert ((b.double() - expected).abs() <= bound).all(), f"layer {i // 2}, {'BA'[i % 2]}2"


def test_an_infinite_norm_does_not_wipe_the_pair():
    (layer, _), _ = halves(1.0, torch.float32)
    with torch.no_grad():
        layer.aux_B[0, 0] = 1e30
    before = layer.aux_B.clone(), layer.aux_A.clone()
    assert clip_perturbation_([layer], 0.1).isinf()
    assert torch.equal(layer.aux_B, before[0]) and torch.equal(layer.aux_A, before[1])


@pytest.mark.parametrize("size", [1e-6, 1e-3, 50.0])
def test_the_perturbation_of_float16_weights(size):
    """eps = rho g / ||g||, with norm, quotient and product in float32: one rounding of w + eps."""
    torch.manual_seed(0)
    g = (size * (1 + torch.rand(40))).half()
    w, seen = nn.Parameter(torch.randn(40).half()), []

    def closure():
        seen.append(w.detach().clone())
        w.grad = g.clone()
        return torch.tensor(1.0)

    lora_sam_step(torch.optim.SGD([w], lr=0.0), closure, 0.7)
    exact = seen[0].double() + 0.7 * g.double() / g.double().norm()
    assert torch.equal(seen[1], exact.half()) and torch.equal(w, seen[0])


# ------------------------------------------------------------------- saved through a wrapper


class Alone(nn.Module):
    """What data parallel does to names, without a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def trained(model, head="1"):
    layers = add_lora(model, 2, 4, targets=["0"])
    model.get_submodule(head).requires_grad_(True)
    torch.manual_seed(3)
    with torch.no_grad():
        layers[0].lora_B.normal_()
    return model


def inner_wrapped(name):
    """The first layer inside a module that holds it by `name`."""
    def wrap(model):
        inner = model[0]
        model[0] = nn.Module()
        model[0].add_module(name, inner)
        return model
    return wrap


def inner_compiled(model):
    model[0] = torch.compile(model[0])
    return model


@pytest.mark.parametrize("wrap", [
    torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m)), inner_compiled,
    lambda m: torch.compile(nn.DataParallel(m)), inner_wrapped("_fsdp_wrapped_module"),
    inner_wrapped("_checkpoint_wrapped_module"),
    torch.optim.swa_utils.AveragedModel])
def test_a_wrapper_leaves_no_trace_in_the_file(tmp_path, wrap):
    model = trained(net())
    save_adapter(model, str(tmp_path / "plain"))
    expected = torch.load(tmp_path / "plain/adapter_model.bin", weights_only=True)
    wrapped = wrap(model)
    save_adapter(wrapped, str(tmp_path / "wrapped"))
    found = torch.load(tmp_path / "wrapped/adapter_model.bin", weights_only=True)
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key]), key
    for name in ("adapter_config.json", "base_fingerprint.txt"):
        assert (tmp_path / "plain" / name).read_text() == (tmp_path / "wrapped" / name).read_text()
    other = trained(net())
    with torch.no_grad():
        other[0].lora_B.zero_()
    wrapped = wrap(other)
    load_adapter(wrapped, str(tmp_path / "plain"))
    (loaded,) = [p for name, p in wrapped.named_parameters() if name.endswith("lora_B")]
    (expected,) = [p for name, p in model.named_parameters() if name.endswith("lora_B")]
    assert torch.equal(loaded, expected)


def test_a_module_that_is_called_module_keeps_its_name(tmp_path):
    model = Alone(trained(net()))
    save_adapter(model, str(tmp_path))
    keys = torch.load(tmp_path / "adapter_model.bin", weights_only=True).keys()
    assert "base_model.model.module.0.lora_A.weight" in keys


def test_sharded_parameters_are_gathered(tmp_path):
    """A mesh of one process: the file is that of the plain model; a sharded model loads nothing."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    model = trained(net())
    save_adapter(model, str(tmp_path / "plain"))
    expected = torch.load(tmp_path / "plain/adapter_model.bin", weights_only=True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0,
                            world_size=1)
    try:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        save_adapter(model, str(tmp_path / "sharded"))
        with pytest.raises(ValueError, match="is sharded; load before"):
            load_adapter(model, str(tmp_path / "plain"))
    finally:
        dist.destroy_process_group()
    found = torch.load(tmp_path / "sharded/adapter_model.bin", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(type(found[key]) is torch.Tensor and torch.equal(found[key], expected[key])
               for key in expected)


# -------------------------------------------------------------------------- as PEFT reads a file


def as_peft_reads(settings, names):
    """(modules that get an adapter, modules that are replaced by saved ones), by PEFT's rules."""
    targets, heads = settings["target_modules"], settings["modules_to_save"] or []
    saved = {name for name in names if name.endswith(tuple(heads))}
    if isinstance(targets, str):
        adapted = {name for name in names if re.fullmatch(targets, name)}
    else:
        adapted = {name for name in names
                   if name in targets or name.endswith(tuple("." + target for target in targets))}
    return {name for name in adapted
            if not any(re.match(rf"(^|.*\.){head}($|\..*)", name) for head in heads)}, saved


def test_names_that_end_alike_are_written_exactly(tmp_path):
    """q is adapted, inner.q is not."""
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "inner": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    add_lora(model, 2, 4, targets="^q$")
    names = [name for name, _ in model.named_modules() if name]
    save_adapter(model, str(tmp_path))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert as_peft_reads(settings, names) == ({"q"}, set())
    load_adapter(model, str(tmp_path))


@pytest.mark.parametrize("kind, message", [
    ("tied head", "a trained tensor is part of two modules"),
    ("head of another's end", "outlook: PEFT would take it for a part of the head look"),
    ("layer that ends like a head", "a.look: PEFT would take it"),
    ("layer inside a head", "body.q: PEFT would take it for a part of the head body"),
    ("two ranks", "several .rank, alpha.*a file has one"), ("two scales", "several .rank, alpha"),
    ("a scale of its own", "scales are .5.0.; a file has alpha / rank"),
    ("a trained bias", "q: its W0 or bias is trained"),
    ("two names", "one layer has two names, among .'q', 'again'")])
def test_what_peft_would_read_otherwise_is_refused(tmp_path, kind, message):
    linear = lambda: nn.Linear(4, 4)
    model = nn.ModuleDict({"q": linear(), "look": linear(), "outlook": linear(),
                           "a": nn.ModuleDict({"look": linear()}), "body": linear()})
    targets = {"layer that ends like a head": r"^a\.look$", "layer inside a head": "body.q"}
    if kind == "layer inside a head":
        model["body"] = nn.ModuleDict({"q": linear()})
        model["body"].gate = nn.Parameter(torch.ones(1))
        model["body"].gate.requires_grad_(False)
    (layer,) = add_lora(model, 2, 4, targets=targets.get(kind, "^q$"))
    if kind == "tied head":
        model["tokens"] = nn.Embedding(4, 4)
        model["tokens"].weight = model["outlook"].weight
        model["outlook"].requires_grad_(True)
    elif kind == "two ranks":
        model["body"] = LoRALinear(linear(), 3, 6)
    elif kind == "two scales":
        model["body"] = LoRALinear(linear(), 2, 8)
    elif kind == "a scale of its own":
        layer.scale = 5.0
    elif kind == "a trained bias":
        layer.bias.requires_grad_(True)
    elif kind == "two names":
        model["again"] = layer
    elif kind == "layer inside a head":
        model["body"].gate.requires_grad_(True)
    else:
        model["look"].requires_grad_(True)
    with pytest.raises(ValueError, match=message):
        save_adapter(model, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def saved_with(folder, initial):
    """A model whose adapter is saved with this init_lora_weights."""
    model, path = trained(net()), folder / "adapter_config.json"
    save_adapter(model, str(folder))
    settings = {**json.loads(path.read_text()), "init_lora_weights": initial}
    path.write_text(json.dumps(settings))
    return model


@pytest.mark.parametrize("initial", ["orthogonal", "eva", "gaussian", True, False])
def test_starts_of_peft_that_leave_the_base_alone_are_loaded(tmp_path, initial):
    model, other = saved_with(tmp_path, initial), trained(net())
    with torch.no_grad():
        other[0].lora_B.zero_()
    load_adapter(other, str(tmp_path))
    assert torch.equal(other[0].lora_B, model[0].lora_B)


@pytest.mark.parametrize("initial",
                         ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_starts_of_peft_that_move_the_base_are_refused(tmp_path, initial):
    model = saved_with(tmp_path, initial)
    with pytest.raises(ValueError, match=f"init_lora_weights is {initial}"):
        load_adapter(model, str(tmp_path))


# ---------------------------------------------------------------------------- stacked adapters


def test_vmap_over_stacked_adapters():
    """Three adapters of one base in one call, against one after the other; gradients too."""
    model, x = net(nn.Tanh()), torch.randn(6, 5)
    add_lora(model, 2, 4)
    torch.manual_seed(2)
    stacked = {name: torch.randn(3, *p.shape, requires_grad=True)
               for name, p in model.named_parameters() if p.requires_grad}

    def outputs(factors):
        return torch.func.functional_call(model, factors, (x,))

    together = torch.func.vmap(outputs)(stacked)
    alone = [outputs({name: p[i] for name, p in stacked.items()}) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone))
    found = torch.autograd.grad(together.square().sum(), list(stacked.values()))
    expected = torch.autograd.grad(torch.stack(alone).square().sum(), list(stacked.values()))
    for name, a, b in zip(stacked, found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_a_step_writes_no_tensor_as_text(monkeypatch):
    """It would read every value back from the device, in every step."""
    model, x = net(), torch.randn(3, 5)
    layers = add_lora(model, 2, 4, 2)
    descent, ascent = bilora_optimizers(model, 0.1)

    def written(*args, **more):
        raise AssertionError("a tensor was written as text")

    monkeypatch.setattr(torch.Tensor, "__repr__", written)
    monkeypatch.setattr(torch.Tensor, "__format__", written)
    closure = lambda: backward(model, x)
    lora_step(descent, closure)
    lora_sam_step(descent, closure, 0.1, primary_parameters(model))
    bilora_step(descent, ascent, closure, layers, 0.1)

"""The adapted layer and the three steps, against equations written out in float64.

The oracle is a network of plain weight matrices (`plain_loss`): torch's autograd gives G = dL/dW of
each matrix, and the test writes from it what a step has to do.  No oracle calls bilora.py.  Float64
throughout, so the tolerance is 1e-10 relative unless a test says why it is another.
"""

import copy
import math
import os
import pickle
import re
import sys
from functools import partial, partialmethod

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bilora
from bilora import (LoRALinear, add_lora, auxiliary_parameters, bilora_optimizers, bilora_step,
                    clip_perturbation_, lora_layers, lora_sam_step, lora_step,
                    one_pass, perturbation_norm, perturbed, primary_parameters, scaled)

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
from methods import bilora_power_step  # noqa: E402

LAYERS = ("first", "shared", "last")
close = dict(rtol=1e-10, atol=1e-13)


class Net(nn.Module):
    """Three adapted layers of different shapes, one of them used twice, and a head."""

    def __init__(self, p=0.0):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.head, self.dropout = nn.Linear(4, 3), nn.Dropout(p)

    def forward(self, x):
        for layer in (self.first, self.shared, self.shared, self.last):
            x = self.dropout(torch.tanh(layer(x)))
        return self.head(x)


def plain_loss(weights, net, x, y):
    """The loss of Net with the matrices of `weights` in place of its adapted layers' W."""
    for name in ("first", "shared", "shared", "last"):
        x = torch.tanh(x @ weights[name].T + getattr(net, name).bias)
    return F.cross_entropy(x @ net.head.weight.T + net.head.bias, y)


def plain_gradients(net, x, y, auxiliary=False, eps=None):
    """{layer: G} at W0 + s B1 A1 [+ s B2 A2] [+ eps], by torch's autograd on plain matrices."""
    weights = {}
    for name in LAYERS:
        layer = getattr(net, name)
        w = layer.weight + layer.alpha / layer.rank * layer.lora_B @ layer.lora_A
        if auxiliary:
            w = w + layer.alpha / layer.rank * layer.aux_B @ layer.aux_A
        weights[name] = (w if eps is None else w + eps[name]).detach().requires_grad_()
    grads = torch.autograd.grad(plain_loss(weights, net, x, y), list(weights.values()))
    return dict(zip(LAYERS, grads))


def adapted(rank=2, alpha=6, aux_rank=0, spread=0.5, p=0.0):
    """A float64 Net with adapters away from their initial values, so that no gradient vanishes."""
    torch.manual_seed(0)
    net = Net(p)
    add_lora(net, rank, alpha, aux_rank)
    net.double().train()
    with torch.no_grad():
        for param in [*primary_parameters(net), *auxiliary_parameters(net)]:
            param.copy_(spread * torch.randn_like(param))
    return net


def closure_of(net, batch, scale=1.0, seen=None):
    def closure():
        loss = F.cross_entropy(net(batch[0]), batch[1])
        (scale * loss).backward()
        if seen is not None:
            seen.append({name: p.detach().clone() for name, p in net.named_parameters()})
        return loss
    return closure


def sgd_pair(net, eta1=0.1, eta2=0.1):
    """(descent, ascent): plain gradient steps for the primary and for the auxiliary pairs, as (9)
    is printed."""
    return (torch.optim.SGD(primary_parameters(net), lr=eta1),
            torch.optim.SGD(auxiliary_parameters(net), lr=eta2, maximize=True))


def global_norm(tensors):
    return math.sqrt(sum(t.detach().double().square().sum().item() for t in tensors))


def snapshot(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_close(found, expected, where, rtol=1e-10, atol=1e-13):
    """The message begins with `where`, equation, layer and factor, and says by how much."""
    assert isinstance(found, torch.Tensor), f"{where}: {found!r}; expected a tensor"
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=rtol, atol=atol,
                               msg=lambda text: f"{where}: {difference(found, expected)}\n{text}")


def difference(found, expected):
    if found.shape != expected.shape:
        return f"the shape is {tuple(found.shape)}; expected {tuple(expected.shape)}"
    off = (found.double() - expected.double()).abs().max().item()
    return f"off by up to {off:.3g}; the largest expected value is {expected.abs().max():.3g}"


def assert_same_bits(model, before):
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), f"{name} has changed: {difference(t, before[name])}"


# ---------------------------------------------------------------------------------------- the layer


def test_scale_and_forward_by_hand():
    linear = nn.Linear(2, 2)
    layer = LoRALinear(linear, rank=1, alpha=3)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        linear.bias.copy_(torch.tensor([10.0, 20.0]))
        layer.lora_B.copy_(torch.tensor([[1.0], [-1.0]]))
        layer.lora_A.copy_(torch.tensor([[2.0, 5.0]]))
    assert layer.scale == 3.0, f"Eq. (1): s is {layer.scale}; expected alpha / rank = 3"
    # W = [[1, 2], [3, 4]] + 3 [[2, 5], [-2, -5]] = [[7, 17], [-3, -11]]
    assert_close(layer.delta(), torch.tensor([[6.0, 15.0], [-6.0, -15.0]]), "Eq. (1), s B A")
    assert_close(layer(torch.ones(1, 2)), torch.tensor([[34.0, 6.0]]), "Eq. (1), y = W x + bias")


@pytest.mark.parametrize("auxiliary", [False, True])
def test_forward_equals_dense_weight(auxiliary):
    net = adapted(aux_rank=3)
    layer, x = net.first, torch.randn(2, 3, 6, dtype=torch.float64)
    layer.train(auxiliary)  # the auxiliary pair takes part in training mode and in no other
    dense = layer.weight + 3.0 * layer.lora_B @ layer.lora_A
    if auxiliary:
        dense = dense + 3.0 * layer.aux_B @ layer.aux_A
    assert_close(layer(x), x @ dense.T + layer.bias, f"Eq. (7), y, training mode {auxiliary}")
    assert_close(layer.aux_delta(), 3.0 * layer.aux_B @ layer.aux_A, "Eq. (7), s B2 A2")


@pytest.mark.parametrize("auxiliary", [False, True])
def test_gradients_eq_2_and_9(batch, auxiliary):
    net = adapted(aux_rank=3 if auxiliary else 0)
    closure_of(net, batch)()
    for name, G in plain_gradients(net, *batch, auxiliary).items():
        layer = getattr(net, name)
        assert_close(layer.lora_B.grad, 3.0 * G @ layer.lora_A.T, f"Eq. (2), {name}.lora_B.grad")
        assert_close(layer.lora_A.grad, 3.0 * layer.lora_B.T @ G, f"Eq. (2), {name}.lora_A.grad")
        if auxiliary:
            assert_close(layer.aux_B.grad, 3.0 * G @ layer.aux_A.T, f"Eq. (9), {name}.aux_B.grad")
            assert_close(layer.aux_A.grad, 3.0 * layer.aux_B.T @ G, f"Eq. (9), {name}.aux_A.grad")


class Watch(TorchDispatchMode):
    """Notes how many numbers each operation gives; a view gives none."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.counts.append(out.numel())
        return out


def test_forward_forms_no_full_matrix():
    """Of a weight of 200 x 300 the forward pass of one row makes at most vectors and factors."""
    layer = LoRALinear(nn.Linear(300, 200), 4, 8, 4)
    with Watch() as watch:
        layer(torch.ones(1, 300))
    most = max(watch.counts)
    assert most <= 8 * 300, f"Eq. (7): the forward pass formed {most} numbers; W has 60000"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("aux_rank", [0, 3])
@pytest.mark.parametrize("training", [False, True])
def test_fresh_adapter_changes_no_output_bit(dtype, aux_rank, training):
    torch.manual_seed(0)
    net, x = Net().to(dtype).train(training), torch.randn(8, 6).to(dtype)
    before = net(x)
    layers = add_lora(net, 2, 4, aux_rank)
    assert torch.equal(net(x), before)
    assert all(layer.training is training for layer in layers)
    assert all(p.dtype == torch.float32
               for p in [*primary_parameters(net), *auxiliary_parameters(net)])


def test_initial_A_is_kaiming_uniform():
    """Uniform on +-1 / sqrt(n), so of standard deviation 1 / sqrt(3 n), whatever the global default
    dtype."""
    layer = LoRALinear(nn.Linear(300, 200), 50, 4, 60)
    for A in (layer.lora_A, layer.aux_A):
        assert A.abs().max() <= 300**-0.5 and A.std().item() == pytest.approx(900**-0.5, rel=0.02)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_forward(training, autocast):
    """A bfloat16 base, or a float32 one under autocast: the dense product of the same numbers, to
    bfloat16's rounding."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48).to(torch.float32 if autocast else torch.bfloat16)
    # a scale that is no whole number
    layer = LoRALinear(linear, rank=4, alpha=6, aux_rank=2).train(training)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.aux_B.normal_()
    x = torch.randn(3, 5, 64).to(linear.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
        delta = layer.delta()
    W = linear.weight.double() + 1.5 * layer.lora_B.double() @ layer.lora_A.double()
    if training:
        W = W + 1.5 * layer.aux_B.double() @ layer.aux_A.double()
    expected = x.double() @ W.T + linear.bias.double()
    assert y.dtype == torch.bfloat16 and (y.double() - expected).norm() < 0.01 * expected.norm()
    # in float32, also under autocast
    torch.testing.assert_close(delta, 1.5 * layer.lora_B @ layer.lora_A)


def test_auxiliary_rank_does_not_change_the_primary_initialisation():
    def primary(aux_rank):
        torch.manual_seed(3)
        net = Net()
        add_lora(net, 2, 4, aux_rank)
        return primary_parameters(net)
    assert all(torch.equal(a, b) for a, b in zip(primary(0), primary(3)))


def test_train_and_eval_never_touch_a_weight():
    net = adapted(aux_rank=3)
    before, storage = snapshot(net), net.first.weight.data_ptr()
    for _ in range(20):
        net.eval()
        net.train()
    assert_same_bits(net, before)
    assert net.first.weight.data_ptr() == storage


def test_deepcopy_and_pickle_keep_the_function(batch):
    net = adapted(aux_rank=2)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(batch[0]), net(batch[0]))
        with torch.no_grad():
            lora_layers(other)[0].lora_B.add_(1.0)  # the copy has weights of its own
        assert not torch.equal(other(batch[0]), net(batch[0]))


# ----------------------------------------------------------------------------------------- add_lora


def test_add_lora_freezes_all_but_adapters_and_skips_heads():
    net = Net()
    layers = add_lora(net, 2, 4, 1)
    assert layers == lora_layers(net) == [net.first, net.shared, net.last]
    assert type(net.head) is nn.Linear
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"{layer}.{p}" for layer in LAYERS
                         for p in ("lora_A", "lora_B", "aux_A", "aux_B")}


def test_add_lora_targets():
    net = Net()
    assert add_lora(net, 2, 4, targets="^(last|head)$") == [net.last, net.head]
    assert add_lora(Net(), 2, 4, targets="hare")[0].in_features == 5  # searched for, not matched
    with pytest.raises(ValueError, match="already"):
        add_lora(net, 2, 4)
    with pytest.raises(ValueError, match="'query.*first, shared, last, head"):
        add_lora(Net(), 2, 4, targets="query")


def test_targets_may_be_a_list_of_name_endings():
    """As PEFT reads a list: the whole name, or what follows a point; each ending has to find
    something."""
    def net():
        a = nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4), "seq": nn.Linear(4, 4)})
        return nn.ModuleDict({"a": a,
                              "b": nn.ModuleDict({"q": nn.Linear(4, 4)}), "head": nn.Linear(4, 4)})
    names = lambda model: [name for name, module in model.named_modules()
                           if isinstance(module, LoRALinear)]
    for targets, expected in ((["q", "v"], ["a.q", "a.v", "b.q"]),
                              (("a.q", "head"), ["a.q", "head"]), ({"seq"}, ["a.seq"])):
        model = net()
        add_lora(model, 2, 4, targets=targets)
        assert names(model) == expected
    for targets, message in ((["q", "k"], "'k' matches no nn.Linear of a.q, a.v"),
                             ([], r"targets is \[\]; expected")):
        model = net()
        with pytest.raises(ValueError, match=message):
            add_lora(model, 2, 4, targets=targets)
        assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_heads_are_left_out_at_any_depth():
    linear = lambda: nn.Linear(4, 4)
    net = nn.ModuleDict({"body": nn.ModuleDict({"header": linear(), "score": linear()}),
                         "lm_head": linear(), "head": linear(),
                         "classifier": nn.Sequential(linear(), nn.Tanh(), linear())})
    assert add_lora(net, 2, 4) == [net["body"]["header"]]


@pytest.mark.parametrize(
    "make", [lambda: nn.TransformerEncoderLayer(8, 2, 16), lambda: nn.MultiheadAttention(8, 2)])
def test_add_lora_refuses_layers_whose_weight_is_read_elsewhere(make):
    """torch's own transformer layers read out_proj.weight themselves, so that an adapter there
    would do nothing."""
    net = nn.ModuleDict({"inner": make()})
    with pytest.raises(ValueError, match="inner.*reads its weight itself"):
        add_lora(net, 2, 4)


def test_a_failed_add_lora_changes_nothing():
    net = Net()
    for settings in ({"rank": 5}, {"rank": 2, "aux_rank": 5}, {"rank": 2, "aux_rank": -1},
                     {"rank": 1.5},
                     {"rank": 2, "aux_rank": None}):
        # the last layer is (4, 5), the first (5, 6)
        with pytest.raises(ValueError, match="rank is"):
            add_lora(net, alpha=4, **settings)
        assert not lora_layers(net), f"{settings} was refused, and a layer was put in"
        assert all(p.requires_grad for p in net.parameters()), f"{settings} was refused, and froze"


def test_add_lora_adapts_a_linear_under_two_names_once():
    net = nn.ModuleDict({"a": nn.Linear(3, 3)})
    net["b"] = net["a"]
    layers = add_lora(net, 2, 4)
    assert len(layers) == 1, f"one layer stands under two names; add_lora returned {len(layers)}"
    assert net["a"] is net["b"], "one layer stood under two names, and only one was replaced"


def test_add_lora_refuses_a_tied_embedding():
    net = nn.ModuleDict(
        {"tokens": nn.Embedding(7, 4), "out": nn.Linear(4, 7), "mid": nn.Linear(4, 4)})
    net["out"].weight = net["tokens"].weight
    with pytest.raises(ValueError, match="out cannot be adapted: an embedding"):
        add_lora(net, 2, 4)
    assert type(net["mid"]) is nn.Linear


@pytest.mark.parametrize("rank, aux_rank, named", [(0, 0, "rank is 0"), (5, 0, "rank is 5"),
                                                   (2, 5, "aux_rank is 5"),
                                                   (2, -1, "aux_rank is -1")])
def test_impossible_ranks(rank, aux_rank, named):
    with pytest.raises(ValueError, match=named):
        LoRALinear(nn.Linear(6, 4), rank, 4, aux_rank)


@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6), (2, 6), (6,), (2, 3, 6)])
def test_shapes_of_a_batch_are_those_of_nn_linear(shape):
    """An empty batch passes, forward and backward, and leaves gradients of zero; a wrong width is
    refused, full or empty."""
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(6, 4), 2, 4, 3).train(), torch.randn(shape)
    y = layer(x)
    assert y.shape == F.linear(x, layer.weight, layer.bias).shape
    y.sum().backward()
    assert all(p.grad is not None and (x.numel() > 0 or not p.grad.any())
               for p in (layer.lora_B, layer.lora_A, layer.aux_B))
    for wrong in ((0, 5), (4, 3)):
        with pytest.raises(RuntimeError, match="shapes"):
            layer(torch.empty(wrong))


def test_only_a_linear_layer_is_wrapped():
    with pytest.raises(ValueError, match="Embedding"):
        LoRALinear(nn.Embedding(6, 4), 2, 4)


# ------------------------------------------------------------------------------------------ LoRA


def test_lora_step_eq_2(batch):
    net = adapted()
    optimizer = torch.optim.SGD(primary_parameters(net), lr=0.1)
    expected = {}
    for name, G in plain_gradients(net, *batch).items():
        layer = getattr(net, name)
        expected[name] = (layer.lora_B - 0.1 * 3.0 * G @ layer.lora_A.T,
                          layer.lora_A - 0.1 * 3.0 * layer.lora_B.T @ G)
    first = F.cross_entropy(net(batch[0]), batch[1])
    for p in primary_parameters(net):
        p.grad = torch.ones_like(p)  # a stale gradient: the step zeroes it
    assert_close(lora_step(optimizer, closure_of(net, batch)), first, "Eq. (2), the loss returned")
    for name, (B, A) in expected.items():
        assert_close(getattr(net, name).lora_B, B, f"Eq. (2), {name}.lora_B")
        assert_close(getattr(net, name).lora_A, A, f"Eq. (2), {name}.lora_A")


# ------------------------------------------------------------------------------------ SAM, LoRA-SAM


@pytest.mark.parametrize("rho", [0.0, 1e-3, 0.05, 0.5, 5.0])
@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
                                  lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1)])
def test_plain_sam_eq_a2_a3(batch, rho, make):
    """Every weight of a plain network: torch's optimizer is fed the gradient at w + rho g / ||g||,
    two steps."""
    torch.manual_seed(0)
    net, x, y = Net().double(), *batch
    other = copy.deepcopy(net)
    ours, theirs = make(net.parameters()), make(other.parameters())
    for _ in range(2):
        lora_sam_step(ours, closure_of(net, batch), rho)
        w = [p.detach().clone() for p in other.parameters()]
        loss = lambda ws: F.cross_entropy(torch.func.functional_call(
            other, dict(zip(dict(other.named_parameters()), ws)), x), y)
        g = torch.autograd.grad(loss(w := [t.requires_grad_() for t in w]), w)
        F_ = global_norm(g)
        moved = [(t + rho * d / F_).detach().requires_grad_() for t, d in zip(w, g)]
        for p, d in zip(other.parameters(), torch.autograd.grad(loss(moved), moved)):
            p.grad = d
        theirs.step()
    for (name, p), q in zip(net.named_parameters(), other.parameters()):
        # Adam divides by small roots
        assert_close(p, q, f"Eq. (A2), (A3), {name}", rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("rho", [1e-3, 0.05, 0.5, 5.0])
def test_lora_sam_step_eq_4(batch, rho):
    net, lr = adapted(), 0.1
    B, A = ({n: getattr(getattr(net, n), f).detach().clone() for n in LAYERS}
            for f in ("lora_B", "lora_A"))
    W0 = {n: getattr(net, n).weight for n in LAYERS}

    def factor_gradients(B, A):
        W = {n: (W0[n] + 3.0 * B[n] @ A[n]).detach().requires_grad_() for n in LAYERS}
        G = dict(zip(LAYERS, torch.autograd.grad(plain_loss(W, net, *batch), list(W.values()))))
        return {n: 3.0 * G[n] @ A[n].T for n in LAYERS}, {n: 3.0 * B[n].T @ G[n] for n in LAYERS}

    gB, gA = factor_gradients(B, A)
    F_ = global_norm([*gB.values(), *gA.values()])
    gB2, gA2 = factor_gradients({n: B[n] + rho * gB[n] / F_ for n in LAYERS},
                                {n: A[n] + rho * gA[n] / F_ for n in LAYERS})
    first, seen = F.cross_entropy(net(batch[0]), batch[1]), []
    optimizer = torch.optim.SGD([{"params": primary_parameters(net)}], lr=lr)
    assert_close(lora_sam_step(optimizer, closure_of(net, batch, seen=seen), rho), first,
                 "Eq. (4), the loss returned, that of pass 1")
    for n in LAYERS:
        for factor, w, g in (("lora_B", B, gB), ("lora_A", A, gA)):
            assert_close(seen[1][f"{n}.{factor}"], w[n] + rho * g[n] / F_,
                         f"Eq. (4), w + eps in pass 2, {n}.{factor}")
    for n in LAYERS:
        for factor, w, g in (("lora_B", B, gB2), ("lora_A", A, gA2)):
            assert_close(getattr(getattr(net, n), factor), w[n] - lr * g[n],
                         f"Eq. (4), the step along the gradient at w + eps, {n}.{factor}")


def test_at_the_start_lora_sam_moves_A_against_lora():
    """At B = 0 only eps_B gives A a gradient.  On a loss <G, W> with a constant G plain descent
    takes A along -A G^T G, LoRA's second step along +A G^T G; AdamW's step is a whole one."""
    def moved(step, steps, make):
        torch.manual_seed(0)
        layer = LoRALinear(nn.Linear(6, 5, bias=False, dtype=torch.float64), 2, 6).double()
        G, x = torch.randn(5, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
        before, optimizer = layer.lora_A.detach().clone(), make([layer.lora_B, layer.lora_A])

        def closure():
            loss = (layer(x) * G.T).sum()  # <G, W>
            loss.backward()
            return loss

        for _ in range(steps):
            step(optimizer, closure)
        return layer.lora_A.detach() - before, before, G

    lr, rho, s = 0.01, 1e-3, 3.0
    plain, adamw = partial(torch.optim.SGD, lr=lr), partial(torch.optim.AdamW, lr=lr,
                                                            weight_decay=0.0)
    change, A, G = moved(partial(lora_sam_step, rho=rho), 1, plain)
    length = s * (G @ A.T).norm()
    torch.testing.assert_close(change, -lr * rho * s ** 2 / length * A @ G.T @ G, **close)
    later, *_ = moved(lora_step, 2, plain)
    torch.testing.assert_close(later, lr ** 2 * s ** 2 * A @ G.T @ G, **close)
    whole, *_ = moved(partial(lora_sam_step, rho=rho), 1, adamw)
    torch.testing.assert_close(whole, lr * change.sign(), rtol=1e-3, atol=0.0)


def test_lora_sam_perturbs_only_params(batch):
    """The head trains, but eps and its norm F are those of the given parameters; a generator
    serves, once."""
    net = adapted()
    net.head.requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    seen, before = [], snapshot(net)
    lora_sam_step(optimizer, closure_of(net, batch, seen=seen), 0.3,
                  params=(p for p in primary_parameters(net)))
    eps = {name: seen[1][name] - seen[0][name] for name in seen[0]}
    size = global_norm(eps.values())
    assert size == pytest.approx(0.3, rel=1e-10), f"Eq. (4): the norm of eps is {size}, rho is 0.3"
    for name in ("head.weight", "first.weight"):
        assert not eps[name].any(), f"Eq. (4): {name} is not among params, and was perturbed"
    assert not torch.equal(net.head.weight, before["head.weight"])


def test_a_parameter_given_twice_is_perturbed_once(batch):
    net, seen = adapted(), []
    params = primary_parameters(net)
    lora_sam_step(torch.optim.SGD(params, lr=0.0), closure_of(net, batch, seen=seen), 0.3,
                  params + params[:2])
    assert global_norm(seen[1][name] - seen[0][name]
                       for name in seen[0]) == pytest.approx(0.3, rel=1e-10)


def test_parameters_outside_the_optimizer_start_from_zero_gradients(batch):
    """The head is perturbed but not stepped: each step's eps is that of this step's gradient
    alone."""
    def perturbation(steps):
        net, seen = adapted(), []
        net.head.requires_grad_(True)
        optimizer = torch.optim.SGD(primary_parameters(net), lr=0.0)
        for _ in range(steps):
            lora_sam_step(optimizer, closure_of(net, batch, seen=seen), 0.3,
                          [*net.head.parameters()])
        return seen[-1]["head.weight"] - seen[-2]["head.weight"]
    torch.testing.assert_close(perturbation(2), perturbation(1), **close)


def test_perturbation_does_not_depend_on_the_loss_scale(batch):
    def perturbation(scale):
        net, seen = adapted(), []
        lora_sam_step(torch.optim.SGD(primary_parameters(net), lr=0.1),
                      closure_of(net, batch, scale, seen), 0.05)
        return torch.cat([(seen[1][n] - seen[0][n]).flatten() for n in seen[0]])
    for scale in (2.0**16, 2.0**-16):
        assert_close(perturbation(scale), perturbation(1.0), f"Eq. (4), eps of {scale} times the "
                     "loss", rtol=1e-8, atol=1e-12)


class Stop(Exception):
    pass


@pytest.mark.parametrize("how",
                         ["returns", "raises", "no gradient in pass 2", "no gradient in pass 1"])
def test_weights_come_back_bit_for_bit_in_their_own_storage(batch, how):
    net = adapted().float()
    batch = (batch[0].float(), batch[1])
    params = primary_parameters(net)
    optimizer = torch.optim.SGD(params, lr=0.0)
    before, where, calls = snapshot(net), [p.data_ptr() for p in params], []

    def closure():
        loss = closure_of(net, batch)()
        calls.append([p.detach().clone() for p in params])
        if how == "raises" and len(calls) == 2:
            raise Stop
        if how == f"no gradient in pass {len(calls)}":
            params[0].grad = None
        return loss

    if how == "raises":
        with pytest.raises(Stop):
            lora_sam_step(optimizer, closure, 0.05)
    else:
        lora_sam_step(optimizer, closure, 0.05)
    moved = [not torch.equal(a, b) for a, b in zip(*calls)]
    assert moved == [how != "no gradient in pass 1"] + [True] * (len(params) - 1), "Eq. (4), eps"
    assert_same_bits(net, before)
    assert [p.data_ptr() for p in params] == where


def test_parameter_without_gradient_in_pass_2_is_not_stepped(batch):
    net = adapted()
    params, before, calls = primary_parameters(net), snapshot(net), []

    def closure():
        loss = closure_of(net, batch)()
        calls.append(0)
        if len(calls) == 2:
            params[0].grad = None
        return loss

    lora_sam_step(torch.optim.SGD(params, lr=0.1), closure, 0.05)
    after = net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(params) - 1


def test_all_zero_gradient_gives_no_perturbation(batch):
    net, seen = adapted(), []
    lora_sam_step(torch.optim.SGD(primary_parameters(net), lr=0.1),
                  closure_of(net, batch, 0.0, seen), 0.05)
    for name in seen[0]:
        assert torch.equal(seen[0][name], seen[1][name]), f"Eq. (4): g is 0, and {name} moved"


def test_both_passes_draw_the_same_dropout_masks(batch):
    net, losses = adapted(p=0.5), []

    def closure():
        loss = closure_of(net, batch)()
        losses.append(loss.item())
        return loss

    torch.manual_seed(11)
    lora_sam_step(torch.optim.SGD(primary_parameters(net), lr=0.0), closure, 0.0)
    after_two_passes = torch.rand(())
    torch.manual_seed(11)
    assert losses[0] == losses[1], "the two passes have other losses at eps = 0: other masks"
    assert losses[0] == F.cross_entropy(net(batch[0]), batch[1]).item()
    assert torch.rand(()) == after_two_passes  # the generator stands where one pass leaves it
    # dropout does something here
    assert F.cross_entropy(net(batch[0]), batch[1]).item() != losses[0]


def test_perturbation_reaches_a_surrounding_autocast_region(batch):
    """Autocast keeps bfloat16 copies of weights; the second pass must not read those of the
    first."""
    net, losses = Net(), []
    batch = (batch[0].float(), batch[1])

    def closure():
        loss = F.cross_entropy(net(batch[0]).float(), batch[1])
        loss.backward()
        losses.append(loss.item())
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        lora_sam_step(torch.optim.SGD(net.parameters(), lr=0.0), closure, 1.0)
        after = F.cross_entropy(net(batch[0]).float(), batch[1]).item()
        assert losses[1] > losses[0] + 0.1 and after == losses[0]
        for _ in range(10):
            lora_step(torch.optim.SGD(net.parameters(), lr=0.5), closure)
    assert losses[-1] < losses[2] - 0.1


# ---------------------------------------------------------------------------- Eq. (5), (6), Prop. 1


@pytest.mark.parametrize("rho", [0.01, 0.5])
def test_lora_sam_in_weight_space_eq_5_6(batch, rho):
    net, seen = adapted(), []
    G = plain_gradients(net, *batch)
    lora_sam_step(torch.optim.SGD(primary_parameters(net), lr=0.0),
                  closure_of(net, batch, seen=seen), rho)
    s = 3.0
    F_ = global_norm([g for n in LAYERS for g in (s * G[n] @ seen[0][f"{n}.lora_A"].T,
                                                 s * seen[0][f"{n}.lora_B"].T @ G[n])])
    for n in LAYERS:
        (B, A), (B2, A2) = ((at[f"{n}.lora_B"], at[f"{n}.lora_A"]) for at in seen)
        # what pass 2 saw
        eps_W = s * (B2 @ A2 - B @ A)
        eps_B, eps_A = rho * s * G[n] @ A.T / F_, rho * s * B.T @ G[n] / F_
        assert_close(eps_W, s * (B @ eps_A + eps_B @ A + eps_B @ eps_A), f"(5), {n}")
        c = s**2 * rho / F_
        linear = c * (B @ B.T @ G[n] + G[n] @ A.T @ A)                                         # (6)
        assert_close(eps_W - s * eps_B @ eps_A, linear, f"(6), {n}", rtol=1e-8, atol=1e-12)
        # Prop. 1: outside Col(B) and outside Row(A) nothing of the first-order term is left
        outside_B = torch.eye(len(B), dtype=B.dtype) - B @ torch.linalg.pinv(B)
        outside_A = torch.eye(A.shape[1], dtype=A.dtype) - torch.linalg.pinv(A) @ A
        assert (outside_B @ linear @ outside_A).norm() < 1e-12 < (
            outside_B @ G[n] @ outside_A).norm()


def test_first_lora_sam_step_stays_in_row_space_of_A(batch):
    """Prop. 1 at B = 0: rank at most r, and rows in Row(A) only, although G has higher rank."""
    net, seen = adapted(), []
    with torch.no_grad():
        for layer in lora_layers(net):
            layer.lora_B.zero_()
    G = plain_gradients(net, *batch)
    lora_sam_step(torch.optim.SGD(primary_parameters(net), lr=0.0),
                  closure_of(net, batch, seen=seen), 0.5)
    for n in LAYERS:
        A = seen[0][f"{n}.lora_A"]
        eps_W = seen[1][f"{n}.lora_B"] @ seen[1][f"{n}.lora_A"]
        assert torch.linalg.matrix_rank(eps_W) == 2 < torch.linalg.matrix_rank(G[n])
        assert (eps_W - eps_W @ torch.linalg.pinv(A) @ A).norm() < 1e-12 * eps_W.norm()


# ------------------------------------------------------------------------------------------ Bi-LoRA


@pytest.mark.parametrize("rho", [1e-3, 0.3, 1.3, 1e3])
def test_bilora_step_eq_9_10(batch, rho):
    """Three steps with plain gradients, written out from G; the largest radius never clips, the
    smallest always does."""
    net, s, eta1, eta2 = adapted(aux_rank=3), 3.0, 0.1, 0.2
    descent, ascent = sgd_pair(net, eta1, eta2)
    clipped = []
    for _ in range(3):
        G = plain_gradients(net, *batch, auxiliary=True)
        new = {}
        for n in LAYERS:
            layer = getattr(net, n)
            B1, A1, B2, A2 = (getattr(layer, f).detach().clone()
                              for f in ("lora_B", "lora_A", "aux_B", "aux_A"))
            new[n] = [B1 - eta1 * s * G[n] @ A1.T, A1 - eta1 * s * B1.T @ G[n],   # (9)
                      B2 + eta2 * s * G[n] @ A2.T, A2 + eta2 * s * B2.T @ G[n]]   # (9)
        c = global_norm([B2 @ A2 for _, _, B2, A2 in new.values()])               # without s
        if c > rho:                                                               # (10)
            new = {n: [B1, A1, B2 * math.sqrt(rho / c), A2 * math.sqrt(rho / c)]
                   for n, (B1, A1, B2, A2) in new.items()}
        first = F.cross_entropy(net(batch[0]), batch[1])
        loss = bilora_step(descent, ascent, closure_of(net, batch), lora_layers(net), rho)
        assert_close(loss, first, "Eq. (9), the loss returned")
        for n, values in new.items():
            for field, value in zip(("lora_B", "lora_A", "aux_B", "aux_A"), values):
                assert_close(getattr(getattr(net, n), field), value, f"Eq. (9), (10), {n}.{field}")
        clipped.append(c > rho)
    assert clipped[0] if rho < 1e3 else not any(clipped)


@pytest.mark.parametrize("ascent, oracle", [
    ("sgd", lambda params: torch.optim.SGD(params, lr=0.02)),
    ("adamw", lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.0))])
def test_bilora_optimizers_are_torchs_own_with_the_sign_flipped(batch, ascent, oracle):
    """Two optimizers of torch's own, one fed the ascent's gradient with its sign changed by
    hand."""
    net = adapted(aux_rank=3)
    net.head.requires_grad_(True)
    other = copy.deepcopy(net)
    ours = bilora_optimizers(net, lr=0.01, aux_lr=0.02, ascent=ascent, weight_decay=0.1)
    down = [p for n, p in other.named_parameters() if p.requires_grad and "aux" not in n]
    theirs = [torch.optim.AdamW(down, lr=0.01, weight_decay=0.1),
              oracle(auxiliary_parameters(other))]
    for _ in range(3):
        bilora_step(*ours, closure_of(net, batch), lora_layers(net), 1e9)
        other.zero_grad()
        closure_of(other, batch)()
        for p in auxiliary_parameters(other):
            p.grad.neg_()
        for optimizer in theirs:
            optimizer.step()
    for (name, p), q in zip(net.named_parameters(), other.parameters()):
        assert_close(p, q, name, rtol=1e-9, atol=1e-12)


def test_every_trainable_parameter_is_in_exactly_one_optimizer():
    net = adapted(aux_rank=2)
    net.head.requires_grad_(True)
    descent, ascent = bilora_optimizers(net, lr=1e-3, aux_lr=2e-3)
    assert (type(descent), type(ascent)) == (torch.optim.AdamW, torch.optim.SGD)
    (down,), (up,) = descent.param_groups, ascent.param_groups
    assert not down["maximize"] and up["maximize"] and (down["lr"], up["lr"]) == (1e-3, 2e-3)
    assert down["weight_decay"] == up["weight_decay"] == up["momentum"] == 0
    assert {id(p) for p in up["params"]} == {id(p) for p in auxiliary_parameters(net)}
    both = [id(p) for p in down["params"] + up["params"]]
    assert len(both) == len(set(both)) == 14
    assert set(both) == {id(p) for p in net.parameters() if p.requires_grad}
    assert bilora_optimizers(adapted(aux_rank=2), lr=1e-3)[1].param_groups[0]["lr"] == 1e-3
    assert bilora_optimizers(adapted(), lr=1e-3)[1] is None


def test_bilora_optimizers_refuse():
    with pytest.raises(ValueError, match="ascent is 'adam'; expected 'sgd' or 'adamw'"):
        bilora_optimizers(adapted(), 0.1, ascent="adam")
    with pytest.raises(ValueError, match="nothing to train"):
        bilora_optimizers(Net().requires_grad_(False), 0.1)


def ascents(net):
    """{what is wrong with it: (descent, ascent, message)}."""
    up, down, sgd = auxiliary_parameters(net), primary_parameters(net), torch.optim.SGD
    good = sgd(up, lr=0.1, maximize=True)
    groups = [{"params": up[:1], "maximize": False}, {"params": up[1:]}]
    return {
        "descends": (sgd(down, lr=0.1), sgd(up, lr=0.1), "maximize=True in every group"),
        "one group descends": (sgd(down, lr=0.1), sgd(groups, lr=0.1, maximize=True),
                               "maximize=True in every group"),
        "takes the key and descends": (sgd(down, lr=0.1),
                                       torch.optim.Muon([{"params": up, "maximize": True}], lr=0.1),
                                       "that knows the option, not this Muon"),
        "one is missing": (sgd(down, lr=0.1), sgd(up[1:], lr=0.1, maximize=True),
                           "5 of the layers' 6 .* 0 others, descent 0"),
        "one is foreign": (sgd(down[1:], lr=0.1), sgd([*up, down[0]], lr=0.1, maximize=True),
                           "6 of .* 1 others, descent 0"),
        "in both": (sgd([*down, up[0]], lr=0.1), good, "6 of .* 0 others, descent 1"),
        "the descent ascends": (sgd(down, lr=0.1, maximize=True), good,
                                "descent: expected no group"),
        "there is none": (sgd(down, lr=0.1), None, "ascent is None; expected the optimizer")}


def test_what_does_not_ascend_is_refused_before_anything_moves(batch):
    net = adapted(aux_rank=2)
    before = snapshot(net)
    for descent, ascent, message in ascents(net).values():
        with pytest.raises(ValueError, match=message):
            bilora_step(descent, ascent, closure_of(net, batch), lora_layers(net), 0.1)
        assert_same_bits(net, before)
        assert all(p.grad is None for p in net.parameters())  # no pass was made either


def test_bilora_step_wants_layers_with_auxiliary_pairs(batch):
    net = adapted()
    with pytest.raises(ValueError, match="no layer has an auxiliary pair"):
        bilora_step(*bilora_optimizers(net, 0.1), closure_of(net, batch), lora_layers(net), 0.1)
    net = adapted(aux_rank=2)
    for model in (net, nn.Sequential(net)):  # the second could be iterated over
        for call in (lambda: bilora_step(*sgd_pair(net), closure_of(net, batch), model, 0.1),
                     lambda: perturbation_norm(model), lambda: clip_perturbation_(model, 0.1)):
            with pytest.raises(ValueError,
                               match=f"layers is a {type(model).__name__}; expected the list"):
                call()


def test_another_clip_stands_in_the_place_of_eq_10(batch):
    """It is called once, after both optimizers have moved, with the layers and the radius."""
    net, twin, seen = adapted(aux_rank=2), adapted(aux_rank=2), []
    bilora_step(*sgd_pair(net), closure_of(net, batch), lora_layers(net), 0.01,
                clip=lambda *given: seen.append(given))
    bilora_step(*sgd_pair(twin), closure_of(twin, batch), lora_layers(twin), 1e9)  # never clips
    assert seen == [(lora_layers(net), 0.01)]
    assert_same_bits(net, snapshot(twin))


def test_layers_may_be_any_iterable_and_name_a_layer_twice(batch):
    net, other = adapted(aux_rank=2), adapted(aux_rank=2)
    bilora_step(*sgd_pair(net), closure_of(net, batch), (layer for layer in lora_layers(net)), 0.01)
    bilora_step(*sgd_pair(other), closure_of(other, batch), lora_layers(other) * 2, 0.01)
    for model in (net, other):
        assert perturbation_norm(layer for layer in lora_layers(model)).item() == pytest.approx(
            0.01, rel=1e-9)
    assert clip_perturbation_((layer for layer in lora_layers(net)),
                              0.005).item() == pytest.approx(0.01, rel=1e-9)
    assert perturbation_norm(lora_layers(net)).item() == pytest.approx(0.005, rel=1e-9)


def test_evaluation_does_not_see_the_auxiliary_pair(batch):
    net = adapted(aux_rank=3)
    plain = adapted(aux_rank=3)
    with torch.no_grad():
        for p in auxiliary_parameters(plain):
            p.zero_()
    torch.testing.assert_close(net.eval()(batch[0]), plain(batch[0]), **close)
    assert not torch.allclose(net.train()(batch[0]), plain(batch[0]))


# ---------------------------------------------------------------------------- the norm and the clip


@pytest.mark.parametrize("dtype, rtol",
                         [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5),
                                         (torch.float16, 1e-5)])
@pytest.mark.parametrize("size", [1.0, 1e-3, 50.0])
def test_gram_norm_equals_dense_norm(dtype, rtol, size):
    """c has no s in it (s is 3 here), and is computed in float32 or wider: in float16 its square
    would be 0 or infinite."""
    net = adapted(aux_rank=3)
    with torch.no_grad():
        for p in auxiliary_parameters(net):
            p.mul_(size)
    net.to(dtype)
    dense = global_norm([layer.aux_B.double() @ layer.aux_A.double() for layer in lora_layers(net)])
    norm = perturbation_norm(lora_layers(net))
    assert norm.shape == () and norm.dtype in (torch.promote_types(dtype, torch.float32),
                                               torch.float64), "Eq. (10), c: float32 or wider"
    assert norm.item() == pytest.approx(dense, rel=rtol), f"Eq. (10): c is {norm}, not {dense}"
    with torch.autocast("cpu", torch.bfloat16):
        assert perturbation_norm(lora_layers(net)) == norm, "Eq. (10): under autocast c is another"
    assert perturbation_norm(lora_layers(adapted())).item() == 0.0


def test_gram_norm_forms_no_full_matrix():
    """No operation of the norm gives more than r2 x r2 numbers, for a product of 2,000 x 3,000."""
    layer = LoRALinear(nn.Linear(3000, 2000), 1, 1, 7)
    with torch.no_grad():
        layer.aux_B.normal_()
    with Watch() as watch:
        norm = perturbation_norm([layer])
    most = max(watch.counts)
    assert most == 49, f"Eq. (10): c formed {most} numbers; r2 x r2 is 49"
    assert norm.item() == pytest.approx(
        (layer.aux_B.double() @ layer.aux_A.double()).norm().item(), rel=1e-5)


def dense_products(net):
    return torch.cat([(layer.aux_B @ layer.aux_A).flatten() for layer in lora_layers(net)]).detach()


def test_clip_is_global_acts_only_outside_and_lands_on_the_ball():
    net = adapted(aux_rank=3)
    with torch.no_grad():
        # one layer far smaller than the others: a clip per layer would leave it alone
        net.first.aux_B.mul_(0.01)
    before, bits = dense_products(net), snapshot(net)
    c = before.norm().item()
    for rho in (c * 1.001, 10 * c, math.inf):
        found = clip_perturbation_(lora_layers(net), rho)
        assert_close(found, before.norm(), "Eq. (10), c, which the clip returns")
        assert_same_bits(net, bits)
    found = clip_perturbation_(lora_layers(net), c / 7)
    assert_close(found, before.norm(), "Eq. (10), c before the clip, which it returns")
    # one factor for all layers
    assert_close(dense_products(net), before / 7, "Eq. (10), all B2 A2 at rho = c / 7")
    for name, value in net.state_dict().items():  # both factors alike, by the root
        root = math.sqrt(7) if "aux" in name else 1
        assert_close(value, bits[name] / root, f"Eq. (10), {name}")
    clip_perturbation_(lora_layers(net), 0.0)
    assert not dense_products(net).any()
    clip_perturbation_(lora_layers(net), 0.0)  # 0 / 0 is no clip
    assert not dense_products(net).any()


def test_an_infinite_c_scales_nothing():
    """Of pairs that have overflowed: rho / c would be 0, and the product NaN."""
    net = adapted(aux_rank=2)
    layers = lora_layers(net)
    with torch.no_grad():
        layers[0].aux_B[0, 0] = math.inf
    before = snapshot(net)
    assert clip_perturbation_(layers, 0.1).isinf()
    assert_same_bits(net, before)


def test_clip_needs_no_value_on_the_host(monkeypatch):
    """Every way of reading a tensor's value, which on a GPU waits for the device, is made to
    raise."""
    layers = lora_layers(adapted(aux_rank=2))

    def read(tensor, name, *args):
        raise AssertionError(f"a value was read, by {name}")

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__",
                 "__format__"):
        monkeypatch.setattr(torch.Tensor, name, partialmethod(read, name))
    c = clip_perturbation_(layers, 0.1)
    with pytest.raises(AssertionError, match="a value was read"):
        bool(c > 0.1)


STEPS = {  # each: (net, descent, ascent, closure, rho)
    "LoRA": lambda net, down, up, closure, rho=0.05: lora_step(down, closure),
    "LoRA-SAM": lambda net, down, up, closure, rho=0.05: lora_sam_step(down, closure, rho),
    "Bi-LoRA": lambda net, down, up, closure, rho=0.05: bilora_step(
        down, up, closure, lora_layers(net), rho),
    "Bi-LoRA, power rule": lambda net, down, up, closure, rho=0.05: bilora_power_step(
        down, closure, lora_layers(net), rho)}


@pytest.mark.parametrize("rho", [-0.1, math.nan])
def test_negative_radius(batch, rho):
    net = adapted(aux_rank=2)
    before = snapshot(net)
    for method in [method for method in STEPS if method != "LoRA"]:
        with pytest.raises(ValueError, match="rho is (-0.1|nan)"):
            STEPS[method](net, *bilora_optimizers(net, 0.1), closure_of(net, batch), rho)
    with pytest.raises(ValueError, match="rho is (-0.1|nan)"):
        clip_perturbation_(lora_layers(net), rho)
    assert_same_bits(net, before)


# ------------------------------------------------------------------ steps that cannot do their work


@pytest.mark.parametrize("method, bad_pass", [("LoRA", 1), ("LoRA-SAM", 1), ("LoRA-SAM", 2),
                                              ("Bi-LoRA", 1), ("Bi-LoRA, power rule", 1)])
@pytest.mark.parametrize(
    "how", ["no backward", "no backward, with old gradients", "optimizer made before the adapters"])
def test_a_closure_that_leaves_no_gradient(batch, method, bad_pass, how):
    """Nothing would be trained, and nothing would say so."""
    torch.manual_seed(0)
    net, calls = Net().double(), []
    early = torch.optim.SGD(net.parameters(), lr=0.1)
    add_lora(net, 2, 4, 2)
    net.double().train()
    down, up = bilora_optimizers(net, 0.1)
    if how == "optimizer made before the adapters":
        down = early
    before = snapshot(net)

    def closure():
        calls.append(1)
        loss = F.cross_entropy(net(batch[0]), batch[1])
        if len(calls) < bad_pass or how == "optimizer made before the adapters":
            loss.backward()
        return loss

    if how == "no backward, with old gradients":
        for p in [*primary_parameters(net), *auxiliary_parameters(net)]:
            p.grad = torch.ones_like(p)
    message = f"{method}.*closure\\(\\) left none of .* a gradient; expected it to call backward"
    if (how, method) == ("optimizer made before the adapters", "Bi-LoRA"):
        message = "descent lacks 6 of the layers' primary parameters"
    with pytest.raises(ValueError, match=message):
        STEPS[method](net, down, up, closure)
    assert_same_bits(net, before)
    assert not down.state


def test_an_auxiliary_pair_that_gets_no_gradient(batch):
    """The ascent would stand still: the forward pass does not use the layers that it is given."""
    net, other = adapted(aux_rank=2), adapted(aux_rank=2)
    before = snapshot(net)
    descent, _ = sgd_pair(net)
    descent.add_param_group({"params": primary_parameters(other)})
    with pytest.raises(ValueError, match="Bi-LoRA: closure.* left none of 6 parameters"):
        bilora_step(descent, sgd_pair(other)[1], closure_of(net, batch), lora_layers(other), 0.1)
    assert_same_bits(net, before)


@pytest.mark.parametrize("method", ["LoRA", "LoRA-SAM"])
def test_everything_frozen(batch, method):
    net = adapted()
    optimizer = torch.optim.SGD(primary_parameters(net), lr=0.1)
    x = batch[0].clone().requires_grad_()  # so that backward() itself does not complain
    net.requires_grad_(False)

    def closure():
        loss = F.cross_entropy(net(x), batch[1])
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"left none of 6 parameters \(6 of them frozen\)"):
        STEPS[method](net, optimizer, None, closure)


@pytest.mark.parametrize("method, bad_pass", [("LoRA", 1), ("LoRA-SAM", 1), ("LoRA-SAM", 2),
                                              ("Bi-LoRA", 1), ("Bi-LoRA, power rule", 1)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite(batch, method, bad_pass, value, where):
    net, calls = adapted(aux_rank=2), []
    down, up = bilora_optimizers(net, 0.1)
    STEPS[method](net, down, up, closure_of(net, batch))
    before, state = snapshot(net), copy.deepcopy(down.state_dict())

    def closure():
        loss = closure_of(net, batch)()
        calls.append(0)
        if len(calls) == bad_pass:
            if where == "loss":
                return loss * value
            net.last.lora_B.grad[0, 0] = value
        return loss

    with pytest.raises(FloatingPointError, match=f"{method}.*step 2"):
        STEPS[method](net, down, up, closure)
    assert len(calls) == bad_pass
    assert_same_bits(net, before)
    torch.testing.assert_close(down.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["Bi-LoRA", "Bi-LoRA, power rule"])
def test_a_nan_in_an_auxiliary_gradient_alone(batch, method):
    """The descent does not hold the pair, and the loss is finite."""
    net = adapted(aux_rank=2)
    before = snapshot(net)

    def closure():
        loss = closure_of(net, batch)()
        net.last.aux_A.grad[0, 0] = math.nan
        return loss

    with pytest.raises(FloatingPointError, match=f"{method}, step 1"):
        STEPS[method](net, *bilora_optimizers(net, 0.1), closure)
    assert_same_bits(net, before)


def test_not_finite_outside_the_optimizer_and_without_a_step_count(batch):
    net = adapted()
    net.head.requires_grad_(True)
    optimizer, before = torch.optim.SGD(primary_parameters(net), lr=0.1), snapshot(net)

    def closure():
        loss = closure_of(net, batch)()
        net.head.weight.grad[0, 0] = math.nan
        return loss

    with pytest.raises(FloatingPointError, match="LoRA-SAM, pass 1, a step not counted"):
        lora_sam_step(optimizer, closure, 0.1, list(net.head.parameters()))
    assert_same_bits(net, before)


@pytest.mark.parametrize("method", STEPS)
def test_closures_that_return_no_loss(batch, method):
    for value in (None, 0.5, torch.ones(3)):
        net = adapted(aux_rank=2)
        with pytest.raises(ValueError, match="expected the loss, a tensor of one number"):
            STEPS[method](net, *bilora_optimizers(net, 0.1), lambda: value)
    net = adapted(aux_rank=2)
    loss = STEPS[method](net, *bilora_optimizers(net, 0.1), closure_of(net, batch))
    assert loss.shape == () and not loss.requires_grad


def test_no_parameters_to_perturb(batch):
    net = adapted()
    with pytest.raises(ValueError, match="params is .*expected the parameters"):
        lora_sam_step(torch.optim.SGD(net.parameters(), lr=0.1), closure_of(net, batch), 0.1, [])


def test_the_norm_of_bfloat16_gradients_is_not_rounded_to_bfloat16():
    """g = (1, x), ||g|| = 1.0039: eps_1 = 1 / 1.0039 rounds to 255 / 256, and to 1 where the norm
    was rounded first."""
    w, seen = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True), []

    def closure():
        seen.append(w.detach().clone())
        loss = w[0] + 181 / 2048 * w[1]
        loss.backward()
        return loss

    lora_sam_step(torch.optim.SGD([w], lr=0.0), closure, 1.0)
    assert seen[1][0].item() == 255 / 256


# ----------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", STEPS)
def test_training_lowers_the_loss_and_leaves_the_base_alone(batch, method):
    net = adapted(aux_rank=2 if method.startswith("Bi-LoRA") else 0, spread=0.1).float()
    batch = (batch[0].float(), batch[1])
    optimizers, before = bilora_optimizers(net, 0.02, aux_lr=1.0), snapshot(net)
    losses, sizes = [], []
    for _ in range(100):
        losses.append(STEPS[method](net, *optimizers, closure_of(net, batch)).item())
        sizes.append(perturbation_norm(lora_layers(net)).item())
    assert losses[-1] < losses[0] - 0.2
    after = net.state_dict()
    for name in before:
        moved = not torch.equal(after[name], before[name])
        assert moved == ("lora" in name or "aux" in name), name
    if method.startswith("Bi-LoRA"):
        assert max(sizes) == pytest.approx(0.05, rel=1e-5)  # float32; never outside, at times on it


@pytest.mark.parametrize("method", STEPS)
def test_micro_batches_equal_one_batch(batch, method):
    """The closure adds gradients up; one perturbation serves the whole batch."""
    whole, parts = (adapted(aux_rank=2) for _ in range(2))

    def accumulate():
        total = 0
        for i in range(0, 8, 2):
            loss = F.cross_entropy(parts(batch[0][i:i + 2]), batch[1][i:i + 2]) / 4
            loss.backward()
            total += loss.detach()
        return total

    for net, closure in ((whole, closure_of(whole, batch)), (parts, accumulate)):
        STEPS[method](net, *sgd_pair(net), closure)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters()):
        assert_close(p, q, name, rtol=1e-6, atol=1e-12)


def test_a_list_is_scaled_by_one_factor():
    """3, 4 and 12 have the norm 13; half precision is added up in float32."""
    found = scaled([torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])], 26)
    assert [t.tolist() for t in found] == [[6.0, 8.0], [[24.0]]]
    many = [torch.full((1000,), 300.0, dtype=torch.bfloat16)] * 40
    assert bilora.global_norm(many).item() == pytest.approx(60000, rel=1e-5)
    assert scaled(many, 1.0)[0].dtype == torch.float32
    assert [t.tolist() for t in scaled([torch.zeros(2)], 1.0)] == [[0.0, 0.0]]


def test_perturbed_rounds_once_and_restores_whatever_happens():
    """Oracle: the sum in float32, rounded by torch."""
    torch.manual_seed(0)
    weights = [torch.randn(999).bfloat16(), torch.randn(3, dtype=torch.float64)]
    before, eps = [w.clone() for w in weights], [torch.randn(999), torch.ones(3)]
    with perturbed(weights, iter(eps)):
        assert torch.equal(weights[0], (before[0].float() + eps[0]).bfloat16())
        assert torch.equal(weights[1], before[1] + 1)
    for wrong in ([eps[0], torch.ones(4)], eps[:1], [*eps, eps[0]]):
        with pytest.raises((ValueError, RuntimeError)), perturbed(weights, wrong):
            pass
        assert all(torch.equal(w, b) for w, b in zip(weights, before))


def test_a_pass_of_your_own():
    """It returns the loss without a graph, and every list has to get a gradient."""
    w, v = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)

    def closure():
        loss = (w * torch.tensor([3.0, 4.0])).sum()
        loss.backward()
        return loss
    for _ in range(2):
        loss = one_pass("mine", closure, optimizer)
        assert loss.item() == 7 and not loss.requires_grad and w.grad.tolist() == [3, 4]
    with pytest.raises(ValueError, match=r"^mine: closure\(\) left none of 1 parameters"):
        one_pass("mine", closure, optimizer, [v])


def test_a_star_brings_the_public_functions_alone():
    """Every function and class of the module without an underscore, and nothing else."""
    found = {}
    exec("from bilora import *", found)
    public = {name for name, value in vars(bilora).items()
              if getattr(value, "__module__", None) == "bilora" and not name.startswith("_")}
    assert found.keys() - {"__builtins__"} == public and len(public) == 18


def test_the_module_prints_nothing_and_imports_only_torch():
    source = open(bilora.__file__).read()
    imports = {line.split()[1].split(".")[0]
               for line in source.splitlines() if line.startswith(("import", "from"))}
    assert imports - {"torch"} <= set(sys.stdlib_module_names)
    assert not re.search(r"\bprint\(", source)


def test_bilora_step_in_eval_mode_is_refused():
    """The auxiliary pair would not be seen: the step would be LoRA's."""
    net = adapted(aux_rank=2).eval()
    before, optimizers = snapshot(net), bilora_optimizers(net, 0.1)
    with pytest.raises(ValueError, match="in training mode: call model.train"):
        bilora_step(*optimizers, lambda: net(torch.ones(1, 6, dtype=torch.float64)).sum(),
                    lora_layers(net), 0.3)
    assert_same_bits(net, before)

"""The adapted layer and the three steps, against equations written out in float64.

The oracle is a network of plain weight matrices (`plain_loss`): torch's autograd gives G = dL/dW of each matrix, and the
test writes from it what a step has to do.  No oracle calls bilora.py.  Float64 throughout, so the tolerance is 1e-10
relative unless a test says why it is another.
"""

import copy
import math
import pickle
import re
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bilora
from bilora import (LoRALinear, add_lora, auxiliary_parameters, bilora_optimizer, bilora_power_step, bilora_step,
                    clip_perturbation_, lora_layers, lora_sam_step, lora_step, perturbation_norm,
                    primary_parameters)

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


@pytest.fixture
def batch():
    torch.manual_seed(7)
    return torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 3, (8,))


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


def global_norm(tensors):
    return math.sqrt(sum(t.detach().double().square().sum().item() for t in tensors))


def snapshot(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same_bits(model, before):
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name


# ------------------------------------------------------------------------------------------ the layer


def test_scale_and_forward_by_hand():
    linear = nn.Linear(2, 2)
    layer = LoRALinear(linear, rank=1, alpha=3)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        linear.bias.copy_(torch.tensor([10.0, 20.0]))
        layer.lora_B.copy_(torch.tensor([[1.0], [-1.0]]))
        layer.lora_A.copy_(torch.tensor([[2.0, 5.0]]))
    assert layer.scale == 3.0
    # W = [[1, 2], [3, 4]] + 3 [[2, 5], [-2, -5]] = [[7, 17], [-3, -11]]
    assert torch.equal(layer.delta(), torch.tensor([[6.0, 15.0], [-6.0, -15.0]]))
    assert torch.equal(layer(torch.tensor([[1.0, 1.0]])), torch.tensor([[34.0, 6.0]]))


@pytest.mark.parametrize("auxiliary", [False, True])
def test_forward_equals_dense_weight(auxiliary):
    net = adapted(aux_rank=3)
    layer, x = net.first, torch.randn(2, 3, 6, dtype=torch.float64)
    layer.train(auxiliary)  # the auxiliary pair takes part in training mode and in no other
    dense = layer.weight + 3.0 * layer.lora_B @ layer.lora_A
    if auxiliary:
        dense = dense + 3.0 * layer.aux_B @ layer.aux_A
    torch.testing.assert_close(layer(x), x @ dense.T + layer.bias, **close)
    torch.testing.assert_close(layer.aux_delta(), 3.0 * layer.aux_B @ layer.aux_A, **close)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_gradients_eq_2_and_9(batch, auxiliary):
    net = adapted(aux_rank=3 if auxiliary else 0)
    closure_of(net, batch)()
    for name, G in plain_gradients(net, *batch, auxiliary).items():
        layer = getattr(net, name)
        torch.testing.assert_close(layer.lora_B.grad, 3.0 * G @ layer.lora_A.T, **close)
        torch.testing.assert_close(layer.lora_A.grad, 3.0 * layer.lora_B.T @ G, **close)
        if auxiliary:
            torch.testing.assert_close(layer.aux_B.grad, 3.0 * G @ layer.aux_A.T, **close)
            torch.testing.assert_close(layer.aux_A.grad, 3.0 * layer.aux_B.T @ G, **close)


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
    assert all(p.dtype == torch.float32 for p in [*primary_parameters(net), *auxiliary_parameters(net)])


def test_initial_A_is_kaiming_uniform():
    """Uniform on +-1 / sqrt(n), so of standard deviation 1 / sqrt(3 n), whatever the global default dtype."""
    layer = LoRALinear(nn.Linear(300, 200), 50, 4, 60)
    for A in (layer.lora_A, layer.aux_A):
        assert A.abs().max() <= 300**-0.5 and A.std().item() == pytest.approx(900**-0.5, rel=0.02)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_forward(training, autocast):
    """A bfloat16 base, or a float32 one under autocast: the dense product of the same numbers, to bfloat16's rounding."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48).to(torch.float32 if autocast else torch.bfloat16)
    layer = LoRALinear(linear, rank=4, alpha=6, aux_rank=2).train(training)  # a scale that is no whole number
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
    torch.testing.assert_close(delta, 1.5 * layer.lora_B @ layer.lora_A)  # in float32, also under autocast


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


# ------------------------------------------------------------------------------------------ add_lora


def test_add_lora_freezes_all_but_adapters_and_skips_heads():
    net = Net()
    layers = add_lora(net, 2, 4, 1)
    assert layers == lora_layers(net) == [net.first, net.shared, net.last]
    assert type(net.head) is nn.Linear
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"{layer}.{p}" for layer in LAYERS for p in ("lora_A", "lora_B", "aux_A", "aux_B")}


def test_add_lora_targets():
    net = Net()
    assert add_lora(net, 2, 4, targets="^(last|head)$") == [net.last, net.head]
    assert add_lora(Net(), 2, 4, targets="hare")[0].in_features == 5  # searched for, not matched
    with pytest.raises(ValueError, match="already"):
        add_lora(net, 2, 4)
    with pytest.raises(ValueError, match="'query.*first, shared, last, head"):
        add_lora(Net(), 2, 4, targets="query")


def test_heads_are_left_out_at_any_depth():
    linear = lambda: nn.Linear(4, 4)
    net = nn.ModuleDict({"body": nn.ModuleDict({"header": linear(), "score": linear()}), "lm_head": linear(),
                         "classifier": nn.Sequential(linear(), nn.Tanh(), linear()), "head": linear()})
    assert add_lora(net, 2, 4) == [net["body"]["header"]]


@pytest.mark.parametrize("make", [lambda: nn.TransformerEncoderLayer(8, 2, 16), lambda: nn.MultiheadAttention(8, 2)])
def test_add_lora_refuses_layers_whose_weight_is_read_elsewhere(make):
    """torch's own transformer layers read out_proj.weight themselves, so that an adapter there would do nothing."""
    net = nn.ModuleDict({"inner": make()})
    with pytest.raises(ValueError, match="inner.*reads its weight itself"):
        add_lora(net, 2, 4)


def test_a_failed_add_lora_changes_nothing():
    net = Net()
    for settings in ({"rank": 5}, {"rank": 2, "aux_rank": 5}, {"rank": 2, "aux_rank": -1}, {"rank": 1.5},
                     {"rank": 2, "aux_rank": None}):
        with pytest.raises(ValueError, match="rank is"):  # the last layer is (4, 5), the first (5, 6)
            add_lora(net, alpha=4, **settings)
        assert not lora_layers(net) and all(p.requires_grad for p in net.parameters())


def test_add_lora_adapts_a_linear_under_two_names_once():
    net = nn.ModuleDict({"a": nn.Linear(3, 3)})
    net["b"] = net["a"]
    assert len(add_lora(net, 2, 4)) == 1 and net["a"] is net["b"]


def test_add_lora_refuses_a_tied_embedding():
    net = nn.ModuleDict({"tokens": nn.Embedding(7, 4), "out": nn.Linear(4, 7), "mid": nn.Linear(4, 4)})
    net["out"].weight = net["tokens"].weight
    with pytest.raises(ValueError, match="out cannot be adapted: an embedding"):
        add_lora(net, 2, 4)
    assert type(net["mid"]) is nn.Linear


@pytest.mark.parametrize("rank, aux_rank, named", [(0, 0, "rank is 0"), (5, 0, "rank is 5"),
                                                   (2, 5, "aux_rank is 5"), (2, -1, "aux_rank is -1")])
def test_impossible_ranks(rank, aux_rank, named):
    with pytest.raises(ValueError, match=named):
        LoRALinear(nn.Linear(6, 4), rank, 4, aux_rank)


def test_empty_batch_and_wrong_module():
    with pytest.raises(ValueError, match=r"empty batch, shape \(0, 6\)"):
        LoRALinear(nn.Linear(6, 4), 2, 4)(torch.empty(0, 6))
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
    torch.testing.assert_close(lora_step(optimizer, closure_of(net, batch)), first, **close)
    for name, (B, A) in expected.items():
        torch.testing.assert_close(getattr(net, name).lora_B.detach(), B.detach(), **close)
        torch.testing.assert_close(getattr(net, name).lora_A.detach(), A.detach(), **close)


# ------------------------------------------------------------------------------------------ SAM, LoRA-SAM


@pytest.mark.parametrize("rho", [0.0, 1e-3, 0.05, 0.5, 5.0])
@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
                                  lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1)])
def test_plain_sam_eq_a2_a3(batch, rho, make):
    """Every weight of a plain network: torch's optimizer is fed the gradient at w + rho g / ||g||, two steps."""
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
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11, msg=name)  # Adam divides by small roots


@pytest.mark.parametrize("rho", [1e-3, 0.05, 0.5, 5.0])
def test_lora_sam_step_eq_3_4(batch, rho):
    net, lr = adapted(), 0.1
    B, A = ({n: getattr(getattr(net, n), f).detach().clone() for n in LAYERS} for f in ("lora_B", "lora_A"))
    W0 = {n: getattr(net, n).weight for n in LAYERS}

    def factor_gradients(B, A):
        W = {n: (W0[n] + 3.0 * B[n] @ A[n]).detach().requires_grad_() for n in LAYERS}
        G = dict(zip(LAYERS, torch.autograd.grad(plain_loss(W, net, *batch), list(W.values()))))
        return {n: 3.0 * G[n] @ A[n].T for n in LAYERS}, {n: 3.0 * B[n].T @ G[n] for n in LAYERS}

    gB, gA = factor_gradients(B, A)
    F_ = global_norm([*gB.values(), *gA.values()])
    gB2, gA2 = factor_gradients({n: B[n] + rho * gB[n] / F_ for n in LAYERS},
                                {n: A[n] + rho * gA[n] / F_ for n in LAYERS})
    first = F.cross_entropy(net(batch[0]), batch[1])
    optimizer = torch.optim.SGD([{"params": primary_parameters(net)}], lr=lr)
    torch.testing.assert_close(lora_sam_step(optimizer, closure_of(net, batch), rho), first, **close)
    for n in LAYERS:
        torch.testing.assert_close(getattr(net, n).lora_B.detach(), B[n] - lr * gB2[n], **close)
        torch.testing.assert_close(getattr(net, n).lora_A.detach(), A[n] - lr * gA2[n], **close)


def test_lora_sam_perturbs_only_params(batch):
    """The head trains, but eps and its norm F are those of the given parameters; a generator serves, once."""
    net = adapted()
    net.head.requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    seen, before = [], snapshot(net)
    lora_sam_step(optimizer, closure_of(net, batch, seen=seen), 0.3, params=(p for p in primary_parameters(net)))
    eps = {name: seen[1][name] - seen[0][name] for name in seen[0]}
    assert global_norm(eps.values()) == pytest.approx(0.3, rel=1e-10)
    assert not eps["head.weight"].any() and not eps["first.weight"].any()
    assert not torch.equal(net.head.weight, before["head.weight"])


def test_a_parameter_given_twice_is_perturbed_once(batch):
    net, seen = adapted(), []
    params = primary_parameters(net)
    lora_sam_step(torch.optim.SGD(params, lr=0.0), closure_of(net, batch, seen=seen), 0.3, params + params[:2])
    assert global_norm(seen[1][name] - seen[0][name] for name in seen[0]) == pytest.approx(0.3, rel=1e-10)


def test_parameters_outside_the_optimizer_start_from_zero_gradients(batch):
    """The head is perturbed but not stepped: each step's eps is that of this step's gradient alone."""
    def perturbation(steps):
        net, seen = adapted(), []
        net.head.requires_grad_(True)
        optimizer = torch.optim.SGD(primary_parameters(net), lr=0.0)
        for _ in range(steps):
            lora_sam_step(optimizer, closure_of(net, batch, seen=seen), 0.3, [*net.head.parameters()])
        return seen[-1]["head.weight"] - seen[-2]["head.weight"]
    torch.testing.assert_close(perturbation(2), perturbation(1), **close)


def test_perturbation_does_not_depend_on_the_loss_scale(batch):
    def perturbation(scale):
        net, seen = adapted(), []
        lora_sam_step(torch.optim.SGD(primary_parameters(net), lr=0.1), closure_of(net, batch, scale, seen), 0.05)
        return torch.cat([(seen[1][n] - seen[0][n]).flatten() for n in seen[0]])
    for scale in (2.0**16, 2.0**-16):
        torch.testing.assert_close(perturbation(scale), perturbation(1.0), rtol=1e-8, atol=1e-12)


class Stop(Exception):
    pass


@pytest.mark.parametrize("how", ["returns", "raises", "no gradient in pass 2", "no gradient in pass 1"])
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
    assert moved == [how != "no gradient in pass 1"] + [True] * (len(params) - 1)
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
    lora_sam_step(torch.optim.SGD(primary_parameters(net), lr=0.1), closure_of(net, batch, 0.0, seen), 0.05)
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])


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
    assert losses[0] == losses[1] == F.cross_entropy(net(batch[0]), batch[1]).item()
    assert torch.rand(()) == after_two_passes  # the generator stands where one pass leaves it
    assert F.cross_entropy(net(batch[0]), batch[1]).item() != losses[0]  # dropout does something here


def test_perturbation_reaches_a_surrounding_autocast_region(batch):
    """Autocast keeps bfloat16 copies of weights; the second pass must not read those of the first."""
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


# ------------------------------------------------------------------------------------------ Eq. (5), (6), Prop. 1


@pytest.mark.parametrize("rho", [0.01, 0.5])
def test_lora_sam_in_weight_space_eq_5_6(batch, rho):
    net, seen = adapted(), []
    G = plain_gradients(net, *batch)
    lora_sam_step(torch.optim.SGD(primary_parameters(net), lr=0.0), closure_of(net, batch, seen=seen), rho)
    s = 3.0
    F_ = global_norm([g for n in LAYERS for g in (s * G[n] @ seen[0][f"{n}.lora_A"].T,
                                                 s * seen[0][f"{n}.lora_B"].T @ G[n])])
    for n in LAYERS:
        (B, A), (B2, A2) = ((at[f"{n}.lora_B"], at[f"{n}.lora_A"]) for at in seen)
        eps_W = s * (B2 @ A2 - B @ A)                                                          # what pass 2 saw
        eps_B, eps_A = rho * s * G[n] @ A.T / F_, rho * s * B.T @ G[n] / F_
        torch.testing.assert_close(eps_W, s * (B @ eps_A + eps_B @ A + eps_B @ eps_A), **close)  # (5)
        c = s**2 * rho / F_
        linear = c * (B @ B.T @ G[n] + G[n] @ A.T @ A)                                         # (6)
        torch.testing.assert_close(eps_W - s * eps_B @ eps_A, linear, rtol=1e-8, atol=1e-12)
        # Prop. 1: outside Col(B) and outside Row(A) nothing of the first-order term is left
        outside_B = torch.eye(len(B), dtype=B.dtype) - B @ torch.linalg.pinv(B)
        outside_A = torch.eye(A.shape[1], dtype=A.dtype) - torch.linalg.pinv(A) @ A
        assert (outside_B @ linear @ outside_A).norm() < 1e-12 < (outside_B @ G[n] @ outside_A).norm()


def test_first_lora_sam_step_stays_in_row_space_of_A(batch):
    """Prop. 1 at B = 0: rank at most r, and rows in Row(A) only, although G has higher rank."""
    net, seen = adapted(), []
    with torch.no_grad():
        for layer in lora_layers(net):
            layer.lora_B.zero_()
    G = plain_gradients(net, *batch)
    lora_sam_step(torch.optim.SGD(primary_parameters(net), lr=0.0), closure_of(net, batch, seen=seen), 0.5)
    for n in LAYERS:
        A = seen[0][f"{n}.lora_A"]
        eps_W = seen[1][f"{n}.lora_B"] @ seen[1][f"{n}.lora_A"]
        assert torch.linalg.matrix_rank(eps_W) == 2 < torch.linalg.matrix_rank(G[n])
        assert (eps_W - eps_W @ torch.linalg.pinv(A) @ A).norm() < 1e-12 * eps_W.norm()


# ------------------------------------------------------------------------------------------ Bi-LoRA


@pytest.mark.parametrize("rho", [1e-3, 0.3, 4.0, 1e3])
def test_bilora_step_eq_8_9_10(batch, rho):
    """Three steps with plain gradients, written out from G; the largest radius never clips, the smallest always does."""
    net, s, eta1, eta2 = adapted(aux_rank=3), 3.0, 0.1, 0.2
    optimizer = torch.optim.SGD([{"params": primary_parameters(net), "lr": eta1},
                                 {"params": auxiliary_parameters(net), "lr": eta2, "maximize": True}])
    clipped = []
    for _ in range(3):
        G = plain_gradients(net, *batch, auxiliary=True)
        new = {}
        for n in LAYERS:
            layer = getattr(net, n)
            B1, A1, B2, A2 = (getattr(layer, f).detach().clone() for f in ("lora_B", "lora_A", "aux_B", "aux_A"))
            new[n] = [B1 - eta1 * s * G[n] @ A1.T, A1 - eta1 * s * B1.T @ G[n],   # (8)
                      B2 + eta2 * s * G[n] @ A2.T, A2 + eta2 * s * B2.T @ G[n]]   # (9)
        c = global_norm([s * B2 @ A2 for _, _, B2, A2 in new.values()])
        if c > rho:                                                               # (10)
            new = {n: [B1, A1, B2 * math.sqrt(rho / c), A2 * math.sqrt(rho / c)] for n, (B1, A1, B2, A2) in new.items()}
        first = F.cross_entropy(net(batch[0]), batch[1])
        loss = bilora_step(optimizer, closure_of(net, batch), lora_layers(net), rho)
        torch.testing.assert_close(loss, first.detach(), **close)
        for n, values in new.items():
            for field, value in zip(("lora_B", "lora_A", "aux_B", "aux_A"), values):
                torch.testing.assert_close(getattr(getattr(net, n), field).detach(), value, **close)
        clipped.append(c > rho)
    assert clipped[0] if rho < 1e3 else not any(clipped)


def test_bilora_optimizer_is_adamw_with_the_sign_flipped(batch):
    """Two AdamW of torch's own, one fed G's ascent gradient with its sign changed by hand."""
    net = adapted(aux_rank=3)
    net.head.requires_grad_(True)
    other = copy.deepcopy(net)
    ours = bilora_optimizer(net, lr=0.01, aux_lr=0.02, weight_decay=0.1)
    down = [p for n, p in other.named_parameters() if p.requires_grad and "aux" not in n]
    theirs = [torch.optim.AdamW(down, lr=0.01, weight_decay=0.1),
              torch.optim.AdamW(auxiliary_parameters(other), lr=0.02, weight_decay=0.0)]
    for _ in range(3):
        bilora_step(ours, closure_of(net, batch), lora_layers(net), 1e9)
        other.zero_grad()
        closure_of(other, batch)()
        for p in auxiliary_parameters(other):
            p.grad.neg_()
        for optimizer in theirs:
            optimizer.step()
    for (name, p), q in zip(net.named_parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)


def test_every_trainable_parameter_is_in_exactly_one_group():
    net = adapted(aux_rank=2)
    net.head.requires_grad_(True)
    down, up = bilora_optimizer(net, lr=1e-3, aux_lr=2e-3).param_groups
    assert not down["maximize"] and up["maximize"] and (down["lr"], up["lr"]) == (1e-3, 2e-3)
    assert {id(p) for p in up["params"]} == {id(p) for p in auxiliary_parameters(net)}
    both = [id(p) for p in down["params"] + up["params"]]
    assert len(both) == len(set(both)) == 14
    assert set(both) == {id(p) for p in net.parameters() if p.requires_grad}
    assert bilora_optimizer(adapted(aux_rank=2), lr=1e-3).param_groups[1]["lr"] == 1e-3
    assert len(bilora_optimizer(adapted(), lr=1e-3).param_groups) == 1


def test_bilora_step_wants_an_ascending_group(batch):
    net = adapted(aux_rank=2)
    for params in (list(net.parameters()), primary_parameters(net)):
        optimizer = torch.optim.SGD(params, lr=0.1)
        with pytest.raises(ValueError, match="maximize=True; 0 of 6 are"):
            bilora_step(optimizer, closure_of(net, batch), lora_layers(net), 0.1)
    net = adapted()
    with pytest.raises(ValueError, match="0 of 0"):
        bilora_step(bilora_optimizer(net, 0.1), closure_of(net, batch), lora_layers(net), 0.1)


def test_bilora_step_wants_every_auxiliary_parameter_to_ascend_and_no_other(batch):
    net = adapted(aux_rank=2)
    up, down = auxiliary_parameters(net), primary_parameters(net)
    optimizer = torch.optim.SGD([{"params": down + up[:1]}, {"params": up[1:], "maximize": True}], lr=0.1)
    with pytest.raises(ValueError, match="5 of 6 are"):
        bilora_step(optimizer, closure_of(net, batch), lora_layers(net), 0.1)
    with pytest.raises(ValueError, match="primary parameters to descend"):
        bilora_step(torch.optim.SGD(down + up, lr=0.1, maximize=True), closure_of(net, batch), lora_layers(net), 0.1)


def test_layers_may_be_any_iterable_and_name_a_layer_twice(batch):
    net, other = adapted(aux_rank=2), adapted(aux_rank=2)
    bilora_step(bilora_optimizer(net, 0.1), closure_of(net, batch), (layer for layer in lora_layers(net)), 0.01)
    bilora_step(bilora_optimizer(other, 0.1), closure_of(other, batch), lora_layers(other) * 2, 0.01)
    for model in (net, other):
        assert perturbation_norm(layer for layer in lora_layers(model)).item() == pytest.approx(0.01, rel=1e-9)
    assert clip_perturbation_((layer for layer in lora_layers(net)), 0.005).item() == pytest.approx(0.01, rel=1e-9)
    assert perturbation_norm(lora_layers(net)).item() == pytest.approx(0.005, rel=1e-9)


def test_bilora_optimizer_passes_settings_on():
    defaults = bilora_optimizer(adapted(aux_rank=2), 0.1, betas=(0.5, 0.6), eps=0.1, fused=False).param_groups
    assert all(group["betas"] == (0.5, 0.6) and group["eps"] == 0.1 and not group["fused"] for group in defaults)


def test_evaluation_does_not_see_the_auxiliary_pair(batch):
    net = adapted(aux_rank=3)
    plain = adapted(aux_rank=3)
    with torch.no_grad():
        for p in auxiliary_parameters(plain):
            p.zero_()
    torch.testing.assert_close(net.eval()(batch[0]), plain(batch[0]), **close)
    assert not torch.allclose(net.train()(batch[0]), plain(batch[0]))


# ------------------------------------------------------------------------------------------ the norm and the clip


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gram_norm_equals_dense_norm(dtype, rtol):
    net = adapted(aux_rank=3).to(dtype)
    dense = global_norm([3.0 * layer.aux_B.double() @ layer.aux_A.double() for layer in lora_layers(net)])
    norm = perturbation_norm(lora_layers(net))
    assert norm.shape == () and norm.item() == pytest.approx(dense, rel=rtol)
    with torch.autocast("cpu", torch.bfloat16):
        assert perturbation_norm(lora_layers(net)).item() == norm.item()
    assert perturbation_norm(lora_layers(adapted())).item() == 0.0


def test_gram_norm_forms_no_full_matrix():
    """No operation of the norm gives more than r2 x r2 numbers, for a product of 2,000 x 3,000."""
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function.overloadpacket not in (torch.ops.aten.t, torch.ops.aten.detach):  # views
                largest.append(out.numel())
            return out

    layer = LoRALinear(nn.Linear(3000, 2000), 1, 1, 7)
    with torch.no_grad():
        layer.aux_B.normal_()
    with Watch():
        norm = perturbation_norm([layer])
    assert max(largest) == 49 and norm.item() == pytest.approx(layer.aux_delta().double().norm().item(), rel=1e-5)


def dense_products(net):
    return torch.cat([(3.0 * layer.aux_B @ layer.aux_A).flatten() for layer in lora_layers(net)]).detach()


def test_clip_is_global_acts_only_outside_and_lands_on_the_ball():
    net = adapted(aux_rank=3)
    with torch.no_grad():
        net.first.aux_B.mul_(0.01)  # one layer far smaller than the others: a clip per layer would leave it alone
    before, bits = dense_products(net), snapshot(net)
    c = before.norm().item()
    for rho in (c * 1.001, 10 * c, math.inf):
        assert clip_perturbation_(lora_layers(net), rho).item() == pytest.approx(c, rel=1e-12)
        assert_same_bits(net, bits)
    clip_perturbation_(lora_layers(net), c / 7)
    torch.testing.assert_close(dense_products(net), before / 7, **close)  # one factor for all layers
    for name, value in net.state_dict().items():  # both factors alike, by the root
        torch.testing.assert_close(value, bits[name] / (math.sqrt(7) if "aux" in name else 1), **close)
    clip_perturbation_(lora_layers(net), 0.0)
    assert not dense_products(net).any()
    clip_perturbation_(lora_layers(net), 0.0)  # 0 / 0 is no clip
    assert not dense_products(net).any()


def test_clip_needs_no_value_on_the_host(monkeypatch):
    """Every way of reading a tensor's value, which on a GPU waits for the device, is made to raise."""
    layers = lora_layers(adapted(aux_rank=2))

    def read(tensor, *args):
        raise AssertionError("a value was read")

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__format__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    c = clip_perturbation_(layers, 0.1)
    with pytest.raises(AssertionError, match="a value was read"):
        bool(c > 0.1)


@pytest.mark.parametrize("step", [lambda n, o, c: lora_sam_step(o, c, -0.1), lambda n, o, c: lora_sam_step(o, c, math.nan),
                                  lambda n, o, c: bilora_step(o, c, lora_layers(n), -0.1),
                                  lambda n, o, c: clip_perturbation_(lora_layers(n), -0.1)])
def test_negative_radius(batch, step):
    net = adapted(aux_rank=2)
    before = snapshot(net)
    with pytest.raises(ValueError, match="rho is (-0.1|nan)"):
        step(net, bilora_optimizer(net, 0.1), closure_of(net, batch))
    assert_same_bits(net, before)


# ------------------------------------------------------------------------------------------ NaN and infinity

STEPS = {"LoRA": lambda n, o, c: lora_step(o, c), "LoRA-SAM": lambda n, o, c: lora_sam_step(o, c, 0.05),
         "Bi-LoRA": lambda n, o, c: bilora_step(o, c, lora_layers(n), 0.05),
         "Bi-LoRA, power rule": lambda n, o, c: bilora_power_step(o, c, lora_layers(n), 0.05)}


@pytest.mark.parametrize("method, bad_pass", [("LoRA", 1), ("LoRA-SAM", 1), ("LoRA-SAM", 2), ("Bi-LoRA", 1), ("Bi-LoRA, power rule", 1)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite(batch, method, bad_pass, value, where):
    net, calls = adapted(aux_rank=2), []
    optimizer = bilora_optimizer(net, 0.1)
    STEPS[method](net, optimizer, closure_of(net, batch))
    before, state = snapshot(net), copy.deepcopy(optimizer.state_dict())

    def closure():
        loss = closure_of(net, batch)()
        calls.append(0)
        if len(calls) == bad_pass:
            if where == "loss":
                return loss * value
            net.last.lora_B.grad[0, 0] = value
        return loss

    with pytest.raises(FloatingPointError, match=f"{method}.*step 2"):
        STEPS[method](net, optimizer, closure)
    assert len(calls) == bad_pass
    assert_same_bits(net, before)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


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
            STEPS[method](net, bilora_optimizer(net, 0.1), lambda: value)
    net = adapted(aux_rank=2)
    loss = STEPS[method](net, bilora_optimizer(net, 0.1), closure_of(net, batch))
    assert loss.shape == () and not loss.requires_grad


def test_no_parameters_to_perturb(batch):
    net = adapted()
    with pytest.raises(ValueError, match="params is empty"):
        lora_sam_step(torch.optim.SGD(net.parameters(), lr=0.1), closure_of(net, batch), 0.1, [])


def test_the_norm_of_bfloat16_gradients_is_not_rounded_to_bfloat16():
    """g = (1, x), ||g|| = 1.0039: eps_1 = 1 / 1.0039 rounds to 255 / 256, and to 1 where the norm was rounded first."""
    w, seen = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True), []

    def closure():
        seen.append(w.detach().clone())
        loss = w[0] + 181 / 2048 * w[1]
        loss.backward()
        return loss

    lora_sam_step(torch.optim.SGD([w], lr=0.0), closure, 1.0)
    assert seen[1][0].item() == 255 / 256


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("method", STEPS)
def test_training_lowers_the_loss_and_leaves_the_base_alone(batch, method):
    net = adapted(aux_rank=2 if method.startswith("Bi-LoRA") else 0, spread=0.1).float()
    batch = (batch[0].float(), batch[1])
    optimizer, before = bilora_optimizer(net, 0.05), snapshot(net)
    losses = [STEPS[method](net, optimizer, closure_of(net, batch)).item() for _ in range(100)]
    assert losses[-1] < losses[0] - 0.2
    after = net.state_dict()
    for name in before:
        moved = not torch.equal(after[name], before[name])
        assert moved == ("lora" in name or "aux" in name), name
    if method.startswith("Bi-LoRA"):
        assert perturbation_norm(lora_layers(net)).item() == pytest.approx(0.05, rel=1e-5)  # float32


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
        optimizer = torch.optim.SGD([{"params": primary_parameters(net)},
                                     {"params": auxiliary_parameters(net), "maximize": True}], lr=0.1)
        STEPS[method](net, optimizer, closure)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-12, msg=name)


def test_the_module_prints_nothing_and_imports_only_torch():
    source = open(bilora.__file__).read()
    imports = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import", "from"))}
    assert imports - {"torch"} <= set(sys.stdlib_module_names)
    assert not re.search(r"\bprint\(", source)


def test_bilora_step_in_eval_mode_is_refused():
    """The auxiliary pair would not be seen: the step would be LoRA's."""
    net = adapted(aux_rank=2).eval()
    before, optimizer = snapshot(net), bilora_optimizer(net, 0.1)
    with pytest.raises(ValueError, match="in training mode: call model.train"):
        bilora_step(optimizer, lambda: net(torch.ones(1, 6, dtype=torch.float64)).sum(), lora_layers(net), 0.3)
    assert_same_bits(net, before)

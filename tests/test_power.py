"""The power rule: its optimum at a fixed gradient, one step of it written out, and what it leaves
alone.

Oracles: the singular value decomposition of G; projectors from pseudo-inverses, where the code has
a QR; gradients of plain matrices (test_steps.py).  Float64.  The ball is that of (10): the norm of
B2 A2, without s.
"""

import os
import sys

import pytest
import torch
import torch.nn as nn

from bilora import (LoRALinear, auxiliary_parameters, bilora_optimizers, lora_layers,
                    perturbation_norm, primary_parameters)
from test_propositions import RHO, best_of_rank, product
from test_steps import (LAYERS, adapted, assert_close, assert_same_bits, closure_of, global_norm,
                        plain_gradients, snapshot)

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
from methods import bilora_power_step, turn_perturbation_  # noqa: E402


def linear_loss(shapes, aux_rank, alphas=(2, 3)):
    """(Gs, layers, closure) of a loss sum <G_i, W_i>: dL/dW_i is G_i wherever the weights are."""
    torch.manual_seed(0)
    Gs = [(i + 1) * torch.randn(shape, dtype=torch.float64) for i, shape in enumerate(shapes)]
    layers = [LoRALinear(nn.Linear(n, m, bias=False), 1, alpha, aux_rank).double().train()
              for (m, n), alpha in zip(shapes, alphas)]

    def closure():
        loss = sum((G * layer(torch.eye(G.shape[1], dtype=torch.float64)).T).sum()
                   for G, layer in zip(Gs, layers))
        loss.backward()
        return loss
    return Gs, layers, closure


def still(layers):
    return torch.optim.SGD([p for layer in layers for p in (layer.lora_B, layer.lora_A)], lr=0.0)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("aux_rank", [1, 4])
def test_at_a_fixed_gradient_it_reaches_the_optimum_of_prop_3(aux_rank, momentum):
    """B2 A2_i = rho s_i G_{i,r} / sqrt(sum ||s_i G_{i,r}||^2), two layers with scales s_i of their
    own under one radius.

    The rest of each G, beyond rank r, is halved: a gap, for few iterations.
    """
    Gs, layers, closure = linear_loss([(12, 9), (7, 10)], aux_rank)
    best = [best_of_rank(G, aux_rank) for G in Gs]
    for G, kept in zip(Gs, best):
        G.copy_((G + kept) / 2)
    for _ in range(150):
        bilora_power_step(still(layers), closure, layers, RHO, momentum)
    best = [layer.alpha * right for layer, right in zip(layers, best)]  # rank is 1: s is alpha
    for i, (layer, right) in enumerate(zip(layers, best)):
        expected = RHO * right / global_norm(best)
        assert_close(product(layer), expected, f"Eq. (A18), s B2 A2 of layer {i}", rtol=0,
                     atol=1e-6 * RHO)
    gain = sum((G * layer.aux_delta()).sum() for G, layer in zip(Gs, layers)).item()
    assert gain == pytest.approx(RHO * global_norm(best), rel=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_every_step_keeps_the_rows_orthonormal_and_the_radius(batch, momentum):
    net = adapted(aux_rank=3)
    optimizer, _ = bilora_optimizers(net, 0.1)
    for _ in range(5):
        before = {n: product(getattr(net, n)) for n in LAYERS}
        bilora_power_step(optimizer, closure_of(net, batch), lora_layers(net), RHO, momentum)
        for n in LAYERS:
            A = getattr(net, n).aux_A.detach()
            assert_close(A @ A.T, torch.eye(3, dtype=torch.float64), f"rows of {n}.aux_A", rtol=0,
                         atol=1e-12)
            assert not torch.allclose(product(getattr(net, n)), before[n])
        c = global_norm([product(getattr(net, n)) for n in LAYERS])
        assert c == pytest.approx(RHO, rel=1e-12), f"c after a step is {c}, not rho"


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_one_step_written_out(batch, momentum):
    """B2' A2' = X A2 P scaled to rho: X and P, the projector on the new rows, from G by their
    definitions; and (8)."""
    net, lr, s, mu = adapted(aux_rank=2), 0.1, 3.0, momentum
    G = plain_gradients(net, *batch, auxiliary=True)
    B, A = ({n: getattr(getattr(net, n), name).detach().clone() for n in LAYERS}
            for name in ("aux_B", "aux_A"))
    primary = {n: (getattr(net, n).lora_B.detach().clone(), getattr(net, n).lora_A.detach().clone())
               for n in LAYERS}
    old, new = global_norm(B.values()), global_norm([G[n] @ A[n].T for n in LAYERS])
    turned = {}
    for n in LAYERS:
        X = mu * B[n] / old + (1 - mu) * G[n] @ A[n].T / new
        M = B[n].T @ G[n]
        Y = mu * A[n] / A[n].norm() + (1 - mu) * M / M.norm()
        turned[n] = X @ A[n] @ torch.linalg.pinv(Y) @ Y
    optimizer = torch.optim.SGD(primary_parameters(net), lr=lr)
    loss = bilora_power_step(optimizer, closure_of(net, batch), lora_layers(net), RHO, mu)
    assert loss.ndim == 0 and not loss.requires_grad
    for n in LAYERS:
        layer, (B1, A1) = getattr(net, n), primary[n]
        assert_close(product(layer), RHO * turned[n] / global_norm(turned.values()),
                     f"(A18), {n}: B2 A2 after one step")
        assert_close(layer.lora_B, B1 - lr * s * G[n] @ A1.T, f"{n}.lora_B")
        assert_close(layer.lora_A, A1 - lr * s * B1.T @ G[n], f"{n}.lora_A")


def test_with_enough_rank_its_descent_gradient_is_full_sams(batch):
    """r2 = rank(G), G held fixed while the pair turns: the next gradient is that at W + rho G /
    ||G||."""
    few = batch[0][:2], batch[1][:2]  # two examples: rank(G) <= 2 in first and last, <= 4 in shared
    net, s, lr = adapted(aux_rank=4), 3.0, 0.1
    layers, G = lora_layers(net), plain_gradients(net, *few)

    def linearised():
        loss = sum((G[n] * (getattr(net, n).delta() + getattr(net, n).aux_delta())).sum()
                   for n in LAYERS)
        loss.backward()
        return loss

    for _ in range(60):
        bilora_power_step(still(layers), linearised, layers, RHO, 0.0)
    # s B2 A2 moves W
    sam = plain_gradients(net, *few,
                          eps={n: s * RHO * G[n] / global_norm(G.values()) for n in LAYERS})
    expected = {}
    for n in LAYERS:
        B, A = getattr(net, n).lora_B.detach(), getattr(net, n).lora_A.detach()
        expected[n] = B - lr * s * sam[n] @ A.T, A - lr * s * B.T @ sam[n]
    bilora_power_step(torch.optim.SGD(primary_parameters(net), lr=lr), closure_of(net, few), layers,
                      RHO)
    for n, (B, A) in expected.items():
        assert not torch.allclose(sam[n], G[n], rtol=1e-2)
        assert_close(getattr(net, n).lora_B, B, f"{n}.lora_B", rtol=1e-7, atol=1e-9)
        assert_close(getattr(net, n).lora_A, A, f"{n}.lora_A", rtol=1e-7, atol=1e-9)


def test_the_optimizer_keeps_no_state_for_the_pairs_and_steps_the_rest(batch):
    """Primary pairs and head end where torch's AdamW takes them at the same gradients."""
    net = adapted(aux_rank=2)
    net.head.requires_grad_(True)
    optimizer, _ = bilora_optimizers(net, 0.01)
    twin = {n: p.detach().clone().requires_grad_()
            for n, p in net.named_parameters() if p.requires_grad and "aux" not in n}
    other = torch.optim.AdamW(twin.values(), lr=0.01, weight_decay=0.0)
    for _ in range(3):
        params = dict(net.named_parameters())
        grads = torch.autograd.grad(nn.functional.cross_entropy(net(batch[0]), batch[1]),
                                    [params[n] for n in twin])
        bilora_power_step(optimizer, closure_of(net, batch), lora_layers(net), RHO)
        for p, g in zip(twin.values(), grads):
            p.grad = g
        other.step()
    for n, p in net.named_parameters():
        if n in twin:
            assert_close(p, twin[n], n, rtol=1e-9, atol=1e-12)
    assert not any(id(p) in set(map(id, optimizer.state)) for p in auxiliary_parameters(net))


def test_without_a_gradient_the_perturbation_keeps_its_direction():
    """All of them zero or missing, and one layer's alone."""
    for missing in (True, False):
        net = adapted(aux_rank=2)
        before = {n: product(getattr(net, n)) for n in LAYERS}
        for p in auxiliary_parameters(net):
            p.grad = None if missing else torch.zeros_like(p)
        turn_perturbation_(lora_layers(net), RHO, 0.0)
        for n in LAYERS:
            expected = RHO * before[n] / global_norm(before.values())
            assert_close(product(getattr(net, n)), expected, n)
    net.first.aux_B.grad = torch.randn_like(net.first.aux_B)
    turn_perturbation_(lora_layers(net), RHO, 0.0)
    assert product(net.last).norm() == 0
    assert perturbation_norm(lora_layers(net)).item() == pytest.approx(RHO, rel=1e-12)


def test_a_fresh_pair_and_no_radius(batch):
    net = adapted(aux_rank=2)
    for n in LAYERS:
        nn.init.zeros_(getattr(net, n).aux_B)
    for rho in (0.0, RHO):
        bilora_power_step(bilora_optimizers(net, 0.1)[0], closure_of(net, batch), lora_layers(net),
                          rho)
        assert perturbation_norm(lora_layers(net)).item() == pytest.approx(rho, rel=1e-12)
    turn_perturbation_([], RHO)


@pytest.mark.parametrize("spoil, named", [
    (dict(rho=-1), "rho is -1"), (dict(momentum=1.0), "momentum is 1.0"),
    (dict(momentum=-0.1), "momentum is -0.1"),
    (dict(layers=[]), "auxiliary pair"), (dict(eval=True), "training mode"),
    (dict(scale=float("nan")), "not moved")])
def test_what_it_refuses_and_then_nothing_has_moved(batch, spoil, named):
    net = adapted(aux_rank=2)
    before, (optimizer, _) = snapshot(net), bilora_optimizers(net, 0.1)
    if spoil.get("eval"):
        net.eval()
    with pytest.raises(FloatingPointError if "scale" in spoil else ValueError, match=named):
        bilora_power_step(optimizer, closure_of(net, batch, spoil.get("scale", 1.0)),
                          spoil.get("layers", lora_layers(net)),
                          spoil.get("rho", RHO), spoil.get("momentum", 0.5))
    assert_same_bits(net, before)
    assert not optimizer.state


def test_a_descent_that_holds_the_pairs_is_refused(batch):
    net = adapted(aux_rank=2)
    before = snapshot(net)
    with pytest.raises(ValueError, match="descent holds auxiliary parameters"):
        bilora_power_step(torch.optim.SGD(auxiliary_parameters(net)[:1], lr=0.1),
                          closure_of(net, batch), lora_layers(net), RHO)
    assert_same_bits(net, before)


def test_a_surrounding_autocast_region_does_not_round_it(batch):
    net = adapted(aux_rank=3).float()
    x, y = batch[0].float(), batch[1]
    with torch.autocast("cpu", torch.bfloat16):
        bilora_power_step(bilora_optimizers(net, 0.1)[0], closure_of(net, (x, y)), lora_layers(net),
                          RHO)
    for n in LAYERS:
        A = getattr(net, n).aux_A.detach()
        assert_close(A @ A.T, torch.eye(3), n, rtol=0, atol=1e-5)
    assert global_norm([product(getattr(net, n)) for n in LAYERS]) == pytest.approx(RHO, rel=1e-5)


def test_it_does_not_depend_on_the_loss_scale_or_on_old_gradients(batch):
    """The optimizer holds the primary pairs only, so that the step itself has to clear the
    auxiliary gradients."""
    ends = []
    for scale, old in ((1.0, None), (2.0**16, 1.0)):
        net = adapted(aux_rank=2)
        for p in auxiliary_parameters(net):
            p.grad = None if old is None else torch.full_like(p, old)
        bilora_power_step(torch.optim.SGD(primary_parameters(net), lr=0.0),
                          closure_of(net, batch, scale), lora_layers(net), RHO)
        ends.append(torch.cat([product(getattr(net, n)).flatten() for n in LAYERS]))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-15)

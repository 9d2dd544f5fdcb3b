"""Propositions 2 and 3: what holds, what does not, and what the algorithm itself does.

Oracles: the singular value decomposition of G, gradients of plain matrices (test_steps.py), and the
second-order term of a product worked out by hand.  Float64.  Proposition 1 is in test_steps.py,
beside equations (5) and (6).  Two tests check the right statement of Proposition 3 alone, not code:
the optimum, and how several layers share the radius.
"""

import pytest
import torch
import torch.nn as nn

from bilora import LoRALinear, bilora_step, clip_perturbation_, lora_layers
from test_steps import LAYERS, adapted, assert_close, closure_of, global_norm, plain_gradients

RHO = 0.3


def sgd(layers, primary_lr, auxiliary_lr):
    """(descent, ascent)."""
    return (torch.optim.SGD([p for layer in layers for p in (layer.lora_B, layer.lora_A)],
                            lr=primary_lr),
            torch.optim.SGD([p for layer in layers for p in (layer.aux_B, layer.aux_A)],
                            lr=auxiliary_lr, maximize=True))


def product(layer):
    """B2 A2, without s: what the ball is about."""
    return layer.aux_B.detach() @ layer.aux_A.detach()


def fixed_gradient(m=12, n=9, aux_rank=4, alpha=2):
    """(G, a layer whose loss is <G, W>, so that dL/dW = G wherever its weights are, closure)."""
    torch.manual_seed(0)
    G = torch.randn(m, n, dtype=torch.float64) / 4
    layer = LoRALinear(nn.Linear(n, m, bias=False), 1, alpha, aux_rank).double().train()

    def closure():
        loss = (G * layer(torch.eye(n, dtype=torch.float64)).T).sum()
        loss.backward()
        return loss

    return G, layer, closure


def best_of_rank(G, r):
    """G_r, by the SVD."""
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def set_auxiliary(layer, eps):
    """Set s B2 A2 = eps, whose rank must not exceed r2."""
    U, S, Vh = torch.linalg.svd(eps / layer.scale, full_matrices=False)
    r2 = len(layer.aux_A)
    assert (S[r2:] < 1e-12).all()
    with torch.no_grad():
        layer.aux_B.copy_(U[:, :r2] * S[:r2].sqrt())
        layer.aux_A.copy_(S[:r2].sqrt()[:, None] * Vh[:r2])


def test_prop_2_one_ascent_step_gains_to_first_order(batch):
    """<G, eps' - eps> = eta2 s^2 (||G A2^T||^2 + ||B2^T G||^2) + eta2^2 (...): the rest falls by
    four as eta2 halves."""
    s, rests = 3.0, []
    for eta2 in (0.02, 0.01, 0.005):
        net = adapted(aux_rank=3)
        G = plain_gradients(net, *batch, auxiliary=True)
        before = {n: getattr(net, n).aux_delta() for n in LAYERS}
        first = sum(eta2 * s**2 * ((G[n] @ getattr(net, n).aux_A.T).square().sum()
                                   + (getattr(net, n).aux_B.T @ G[n]).square().sum())
                                   for n in LAYERS).item()
        bilora_step(*sgd(lora_layers(net), 0.0, eta2), closure_of(net, batch), lora_layers(net),
                    float("inf"))
        gain = sum((G[n] * (getattr(net, n).aux_delta() - before[n])).sum() for n in LAYERS).item()
        assert gain > 0 and gain == pytest.approx(first, rel=20 * eta2)
        rests.append(gain - first)
    assert rests[0] / rests[1] == pytest.approx(4, rel=1e-6)
    assert rests[1] / rests[2] == pytest.approx(4, rel=1e-6)


def test_prop_3_no_feasible_perturbation_gains_more(r=4):
    """Over rank <= r and ||eps|| <= rho: <G, eps> <= rho sqrt(sigma_1^2 + ... + sigma_r^2), random
    or climbed."""
    G, layer, _ = fixed_gradient(aux_rank=r)
    S = torch.linalg.svdvals(G)
    bound = RHO * S[:r].square().sum().sqrt().item()
    for trial in range(500):
        with torch.no_grad():
            layer.aux_A.normal_()
            layer.aux_B.copy_(G @ layer.aux_A.T if trial % 2 else torch.randn_like(layer.aux_B))
        clip_perturbation_([layer], RHO)
        eps = product(layer)
        assert eps.norm() <= RHO * (1 + 1e-12) and (G * eps).sum().item() <= bound * (1 + 1e-12)
    climber = torch.optim.Adam([layer.aux_A, layer.aux_B], lr=0.05, maximize=True)
    for _ in range(400):
        climber.zero_grad()
        eps = layer.aux_delta()
        gain = (G * eps).sum() * RHO / eps.norm()
        gain.backward()
        climber.step()
        assert gain.item() <= bound * (1 + 1e-12)
    assert gain.item() == pytest.approx(bound, rel=1e-4)  # and the bound is reached


def test_prop_3_the_optimum_and_the_one_that_the_paper_names(r=4):
    G, _, _ = fixed_gradient()
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    right = RHO * best_of_rank(G, r) / best_of_rank(G, r).norm()
    assert right.norm().item() == pytest.approx(RHO, rel=1e-12)
    assert torch.linalg.matrix_rank(right) == r
    assert (G * right).sum().item() == pytest.approx(RHO * S[:r].square().sum().sqrt().item(),
                                                     rel=1e-12)
    papers = RHO * U[:, :r] @ Vh[:r]
    # outside the ball
    assert papers.norm().item() == pytest.approx(RHO * r**0.5, rel=1e-12)
    # the Ky Fan r-norm
    assert (G * papers).sum().item() == pytest.approx(RHO * S[:r].sum().item(), rel=1e-12)
    inside = papers / r**0.5
    assert (G * inside).sum().item() < (G * right).sum().item()
    full = RHO * best_of_rank(G, len(S)) / G.norm()
    # r = rank(G): SAM's
    assert (G * full).sum().item() == pytest.approx(RHO * G.norm().item(), rel=1e-12)


def test_prop_3_over_several_layers_the_budget_follows_the_gradients():
    """One ball for all layers: eps_i in proportion to G_{i,r}; giving each layer the same share
    gains less."""
    torch.manual_seed(1)
    Gs = [torch.randn(6, 5, dtype=torch.float64), 4 * torch.randn(7, 3, dtype=torch.float64)]
    best = [best_of_rank(G, 2) for G in Gs]
    total = global_norm(best)
    gain = sum((G * (RHO * g / total)).sum() for G, g in zip(Gs, best)).item()
    assert gain == pytest.approx(RHO * total, rel=1e-12)
    equal_shares = sum((G * (RHO / 2**0.5 * g / g.norm())).sum() for G, g in zip(Gs, best)).item()
    assert equal_shares < gain


def test_with_enough_rank_the_descent_gradient_is_full_sams(batch):
    """s B2 A2 = rho G / ||G||, r2 >= rank(G): the primary pair then moves as LoRA under full-space
    SAM does."""
    few = batch[0][:2], batch[1][:2]  # two examples: rank(G) <= 4, also where a layer is used twice
    net, s, lr = adapted(aux_rank=4), 3.0, 0.1
    G = plain_gradients(net, *few)
    eps = {n: RHO * G[n] / global_norm(G.values()) for n in LAYERS}
    for n in LAYERS:
        set_auxiliary(getattr(net, n), eps[n])
    sam = plain_gradients(net, *few, eps=eps)
    expected = {}
    for n in LAYERS:
        B, A = getattr(net, n).lora_B.detach().clone(), getattr(net, n).lora_A.detach().clone()
        expected[n] = B - lr * s * sam[n] @ A.T, A - lr * s * B.T @ sam[n]
        assert not torch.allclose(sam[n], G[n], rtol=1e-2)  # SAM's gradient is not the plain one
    bilora_step(*sgd(lora_layers(net), lr, 0.0), closure_of(net, few), lora_layers(net), RHO)
    for n, (B, A) in expected.items():
        assert_close(getattr(net, n).lora_B, B, f"{n}.lora_B", rtol=1e-9, atol=1e-12)
        assert_close(getattr(net, n).lora_A, A, f"{n}.lora_A", rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eta2", [0.05, 0.2])
@pytest.mark.parametrize("aux_rank", [2, 4])
def test_at_a_fixed_gradient_the_ascent_ends_at_the_top_singular_pair(eta2, aux_rank):
    """(9) and (10) iterated: rank 1 and gain rho sigma_1 whatever r2 is, not the optimum of Prop.
    3."""
    G, layer, closure = fixed_gradient(aux_rank=aux_rank)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    optimizers = sgd([layer], 0.0, eta2)
    for _ in range(round(20 / eta2)):
        bilora_step(*optimizers, closure, [layer], RHO)
    eps = product(layer)
    torch.testing.assert_close(eps, RHO * U[:, :1] @ Vh[:1], rtol=0, atol=1e-4 * RHO)
    assert (G * eps).sum().item() == pytest.approx(RHO * S[0].item(), rel=1e-6)
    assert RHO * S[0] < 0.95 * RHO * S[:aux_rank].square().sum().sqrt()

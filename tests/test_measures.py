"""notes/measures.py: each quantity against a dense computation, a closed form, or torch's own
Hessian.  Float64."""

import math
import os
import sys

import pytest
import torch
import torch.nn.functional as F

from bilora import lora_layers, perturbed, primary_parameters, scaled
from test_propositions import best_of_rank
from test_steps import (LAYERS, adapted, assert_close, assert_same_bits, close, plain_gradients,
                        plain_loss, snapshot)

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
import measures  # noqa: E402


def quadratic(H, b):
    """([losses in two shares], [w]): L = w^T H w / 2 + b^T w at w = 0."""
    w = torch.zeros(len(b), dtype=torch.float64, requires_grad=True)
    return [lambda: w @ H @ w / 2, lambda: b @ w], [w]


def symmetric(eigenvalues):
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64)).Q
    return Q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ Q.T


def losses_of(net, batch):
    """The mean loss of a net in two shares."""
    x, y = batch
    return [lambda part=part: F.cross_entropy(net(x[part]), y[part], reduction="sum") / len(y)
            for part in (slice(0, 3), slice(3, 8))]


def pairs(*ranks, m=7, n=5, seed=0):
    torch.manual_seed(seed)
    return [(torch.randn(m, r, dtype=torch.float64), torch.randn(r, n, dtype=torch.float64))
            for r in ranks]


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def test_inner_products_and_lengths():
    a, b = ([torch.randn(3, 2), torch.randn(4)] for _ in range(2))
    assert measures.inner(a, b) == pytest.approx((flat(a) @ flat(b)).item(), rel=1e-5)
    assert measures.cosine(a, b) == pytest.approx(
        F.cosine_similarity(flat(a), flat(b), dim=0).item(), rel=1e-5)
    assert measures.norm(scaled(a, 3.0)) == pytest.approx(3.0, rel=1e-6)
    zero = [torch.zeros_like(x) for x in a]
    assert measures.cosine(a, zero) is None and measures.norm(scaled(zero, 3.0)) == 0


def test_weights_come_back_bit_for_bit_also_after_an_exception(batch):
    net = adapted().float()
    before, params = snapshot(net), primary_parameters(net)
    with pytest.raises(KeyError), perturbed(params, [1e5 * torch.randn_like(p) for p in params]):
        assert not torch.equal(params[0], before["first.lora_B"])
        raise KeyError
    assert_same_bits(net, before)


@pytest.mark.parametrize("space", ["LoRA", "full"])
def test_gradient_in_both_spaces(batch, space):
    """In full space it is G, of the frozen weights, which stay frozen."""
    net = adapted()
    weights = [getattr(net, n).weight for n in LAYERS]
    params = primary_parameters(net) if space == "LoRA" else weights
    loss, g = measures.gradient(losses_of(net, batch), params)
    G = plain_gradients(net, *batch)
    expected = list(G.values()) if space == "full" else [t for n in LAYERS for t in (
        3.0 * G[n] @ getattr(net, n).lora_A.T, 3.0 * getattr(net, n).lora_B.T @ G[n])]
    for i, (found, right) in enumerate(zip(g, expected, strict=True)):
        assert_close(found, right, f"{space}, tensor {i}")
    assert loss == pytest.approx(F.cross_entropy(net(batch[0]), batch[1]).item(), rel=1e-12)
    assert all(p.grad is None for p in net.parameters()) and not net.first.weight.requires_grad


def test_filter_normalised_directions():
    weights = [torch.randn(4, 3, dtype=torch.float64), 5 * torch.randn(2, 6, dtype=torch.float64),
               torch.randn(7, dtype=torch.float64)]  # a vector is one row
    one, two = (measures.filter_normalised(weights, torch.Generator().manual_seed(seed))
                for seed in (1, 1))
    for d, e, w in zip(one, two, weights):
        assert_close(d.norm(dim=-1), w.norm(dim=-1), "norms of the rows of a direction")
        assert torch.equal(d, e) and not torch.allclose(d, w)
    other = measures.filter_normalised(weights, torch.Generator().manual_seed(2))
    assert not torch.allclose(other[0], one[0])


def test_landscape_and_contour():
    H, b = symmetric([3.0, -1.0, 0.5]), torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    losses, params = quadratic(H, b)
    one, two = torch.eye(3, dtype=torch.float64)[:2]
    value = lambda w: (w @ H @ w / 2 + b @ w).item()
    assert measures.landscape(losses, params, [one], [-1.0, 0.0, 2.0]) == pytest.approx(
        [value(-one), 0.0, value(2 * one)], rel=1e-12)
    grid = measures.contour(losses, params, [one], [two], [-1.0, 3.0])
    assert grid == [pytest.approx([value(a * one + c * two) for a in (-1, 3)], rel=1e-12)
                    for c in (-1, 3)]
    assert torch.equal(params[0], torch.zeros(3, dtype=torch.float64))


def test_worst_case_of_a_linear_loss_is_its_slope():
    losses, params = quadratic(torch.zeros(4, 4, dtype=torch.float64),
                               torch.tensor([1.0, 2.0, 2.0, 4.0], dtype=torch.float64))
    for rho in (0.1, 3.0):
        assert measures.worst_case(losses, params, rho, 5) == pytest.approx(5 * rho, rel=1e-12)


def test_worst_case_is_the_best_that_was_met():
    """3 w - 2 w^2, radius 1: the first step goes to w = 1, where it is 1, the second back to 0."""
    losses, params = quadratic(torch.tensor([[-4.0]], dtype=torch.float64),
                               torch.tensor([3.0], dtype=torch.float64))
    assert measures.worst_case(losses, params, 1.0, 2) == pytest.approx(1.0)


@pytest.mark.parametrize("eigenvalues", [[4.0, 1.0, 0.5, 0.1], [2.0, -1.0, -3.0, 0.1]])
def test_worst_case_of_a_quadratic(eigenvalues):
    """The maximum over the ball: eps = (lambda I - H)^-1 b, lambda >= max eigenvalue, such that
    ||eps|| = rho; by bisection."""
    H, rho = symmetric(eigenvalues), 1.5
    b = torch.tensor([1.0, -0.5, 0.3, 0.2], dtype=torch.float64)
    low, high = max(eigenvalues), 1e3
    for _ in range(200):
        mid = (low + high) / 2
        eps = torch.linalg.solve(mid * torch.eye(4, dtype=torch.float64) - H, b)
        low, high = (mid, high) if eps.norm() > rho else (low, mid)
    best = (eps @ H @ eps / 2 + b @ eps).item()
    losses, params = quadratic(H, b)
    found = measures.worst_case(losses, params, rho, 20)
    assert 0.96 * best <= found <= best * (1 + 1e-9)  # 20 steps of a tenth of the radius
    one_step = measures.worst_case(losses, params, rho, 1)
    assert one_step == pytest.approx((rho * b.norm() + rho**2 * b @ H @ b / (2 * b @ b)).item(),
                                     rel=1e-9)
    assert one_step < found


@pytest.mark.parametrize("space", ["LoRA", "full"])
def test_hessian_against_the_dense_one(batch, space):
    """H of a plain function of the matrices, by torch.autograd.functional.hessian: products with H
    and its largest eigenvalue."""
    net, (x, y) = adapted(rank=1), batch
    weights = [getattr(net, n).weight for n in LAYERS]
    params = primary_parameters(net) if space == "LoRA" else weights
    shapes = [p.shape for p in params]

    def plain(vector):
        parts = [v.view(shape)
                 for v, shape in zip(vector.split([s.numel() for s in shapes]), shapes)]
        if space == "LoRA":
            parts = [getattr(net, n).weight + 6.0 * B @ A
                     for n, B, A in zip(LAYERS, parts[::2], parts[1::2])]
        else:
            parts = [w + 6.0 * getattr(net, n).lora_B.detach() @ getattr(net, n).lora_A.detach()
                     for n, w in zip(LAYERS, parts)]
        return plain_loss(dict(zip(LAYERS, parts)), net, x, y)

    H = torch.autograd.functional.hessian(plain, flat(params))
    v = [torch.randn_like(p) for p in params]
    torch.testing.assert_close(flat(measures.hessian_vector(losses_of(net, batch), params, v)),
                               H @ flat(v), rtol=1e-8, atol=1e-11)
    found, rest = measures.top_eigenvalue(losses_of(net, batch), params, 3000,
                                          torch.Generator().manual_seed(0))
    assert found == pytest.approx(torch.linalg.eigvalsh(H).max().item(), rel=1e-6)
    assert rest < 1e-3 * found


def test_the_largest_eigenvalue_is_not_the_largest_in_size():
    losses, params = quadratic(symmetric([2.0, 0.5, -7.0, 0.1]), torch.ones(4, dtype=torch.float64))
    value, rest = measures.top_eigenvalue(losses, params, 400, torch.Generator().manual_seed(0))
    assert value == pytest.approx(2.0, rel=1e-6) and rest < 1e-3


def test_lora_sam_terms(batch):
    """Their sum is what W gains when B and A move by rho g / ||g||."""
    net, rho = adapted(), 0.3
    layers, params = lora_layers(net), primary_parameters(net)
    _, g = measures.gradient(losses_of(net, batch), params)
    total = flat(g).norm()
    terms = measures.lora_sam_terms(layers, [rho * x / total for x in g])
    for i, layer in enumerate(layers):
        B, A = layer.lora_B + rho * g[2 * i] / total, layer.lora_A + rho * g[2 * i + 1] / total
        gained = 3.0 * (B @ A - layer.lora_B @ layer.lora_A)
        assert_close(sum(term[i] for term in terms), gained, f"layer {i}")
        assert_close(terms[0][i], 3.0 * layer.lora_B @ (A - layer.lora_A), f"layer {i}, B eps_A")
        assert_close(terms[1][i], 3.0 * (B - layer.lora_B) @ layer.lora_A, f"layer {i}, eps_B A")


def test_low_rank_products_without_the_products():
    one, two = pairs(2, 3), pairs(2, 4, seed=1)
    dense = [flat([B @ A for B, A in part]) for part in (one, two)]
    assert measures.low_rank_inner(one, two) == pytest.approx((dense[0] @ dense[1]).item(),
                                                              rel=1e-12)
    assert measures.low_rank_cosine(one, two) == pytest.approx(
        F.cosine_similarity(*dense, dim=0).item(), rel=1e-12)
    assert measures.low_rank_cosine(one, [(0 * B, A) for B, A in two]) is None
    B, A = one[1]
    torch.testing.assert_close(measures.singular_values(B, A), torch.linalg.svdvals(B @ A)[:3],
                               **close)


def test_effective_rank():
    eye = torch.eye(6, dtype=torch.float64)
    flat4 = (eye[:, :4], 2 * eye[:4])
    assert measures.effective_rank([flat4]) == pytest.approx(4.0, rel=1e-12)
    assert measures.effective_rank(pairs(1)) == pytest.approx(1.0, rel=1e-12)
    two = (eye[:, :2] * torch.tensor([3.0, 1.0], dtype=torch.float64), eye[:2])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert measures.effective_rank([two]) == pytest.approx(math.exp(entropy), rel=1e-12)
    weights = 16.0, 10.0  # ||B A||^2
    assert measures.effective_rank([flat4, two]) == pytest.approx(
        (4 * weights[0] + math.exp(entropy) * weights[1]) / sum(weights), rel=1e-12)
    assert measures.effective_rank([(0 * eye, eye)]) is None


def test_reachable_energy_by_least_squares():
    """The part of G that B X + Y A can be, X and Y solved for as one linear system."""
    G, ((B, A),) = torch.randn(7, 5, dtype=torch.float64), pairs(2)
    eye_m, eye_n = torch.eye(7, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    # of the row-major X, Y
    design = torch.cat([torch.kron(B, eye_n), torch.kron(eye_m, A.T.contiguous())], dim=1)
    fitted = design @ torch.linalg.pinv(design) @ G.flatten()
    share = (fitted @ fitted / G.flatten().dot(G.flatten())).item()
    assert measures.reachable_energy([G], [(B, A)]) == pytest.approx(share, rel=1e-9)
    rows = (G @ torch.linalg.pinv(A) @ A).norm() ** 2 / G.norm() ** 2
    # B = 0: rows alone
    assert measures.reachable_energy([G], [(0 * B, A)]) == pytest.approx(rows.item(), rel=1e-9)
    both = measures.reachable_energy([G, 2 * G], [(B, A), (0 * B, A)])
    assert both == pytest.approx((share + 4 * rows.item()) / 5, rel=1e-9)


def test_best_rank_energy():
    Gs = [torch.randn(7, 5, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)]
    share = sum(best_of_rank(G, 2).norm() ** 2 for G in Gs) / sum(G.norm() ** 2 for G in Gs)
    assert measures.best_rank_energy(Gs, 2) == pytest.approx(share.item(), rel=1e-9)

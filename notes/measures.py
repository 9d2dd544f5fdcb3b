"""Flatness and perturbations, measured: one function a quantity, with what it is in a formula.

A point in a space is a list of tensors.  A *space* of an adapted model is the list of what may be
moved in it: LoRA space is every B1 and A1, full space every adapted W (moving the frozen W0 moves
W = W0 + s B1 A1 by as much).  A loss is given as a list of functions, each of which returns its
share, 0-dim.  The shares add up to the loss, and are computed one after the other to save memory.
<a, b> and ||a|| run over all tensors of a list.  Whatever is moved is put back bit for bit.
"""

import contextlib
import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilora import perturbed, scaled


def inner(a, b):
    """<a, b> over two lists of tensors, a float, summed in float64."""
    return sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)).item()


def norm(a):
    return math.sqrt(inner(a, a))


def cosine(a, b):
    """<a, b> / (||a|| ||b||), or None where one of them is zero."""
    size = norm(a) * norm(b)
    return inner(a, b) / size if size > 0 else None


@contextlib.contextmanager
def with_gradients(params):
    """Gradients are taken with respect to `params` inside, frozen or not."""
    before = [p.requires_grad for p in params]
    try:
        for p in params:
            p.requires_grad_(True)
        yield
    finally:
        for p, required in zip(params, before):
            p.requires_grad_(required)


@torch.no_grad()
def loss_of(losses):
    return sum(loss().double() for loss in losses).item()


def gradient(losses, params):
    """(loss, [dL/dp]); a tensor that the loss does not depend on gets zeros.  Nobody's .grad is
    touched."""
    total, sums = 0.0, [torch.zeros_like(p) for p in params]
    with with_gradients(params):
        for loss in losses:
            value = loss()
            parts = torch.autograd.grad(value, params, allow_unused=True)
            total += value.item()
            sums = [a if g is None else a + g for a, g in zip(sums, parts)]
    return total, sums


# ------------------------------------------------------------------------------ flatness


def filter_normalised(weights, generator):
    """A Gaussian direction each row of which is as long as the same row of the weight (Li et al.
    2018, 1712.09913).  A vector, such as DoRA's m, is one row."""
    directions = []
    for w in weights:
        d = torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device)
        directions.append(d * w.norm(dim=-1, keepdim=True) / d.norm(dim=-1, keepdim=True))
    return directions


def landscape(losses, params, direction, alphas):
    """[L(w + alpha d)] for each alpha."""
    values = []
    for alpha in alphas:
        with perturbed(params, [alpha * d for d in direction]):
            values.append(loss_of(losses))
    return values


def contour(losses, params, one, two, alphas):
    """L(w + a one + b two): a list for each b of the values for each a."""
    rows = []
    for b in alphas:
        with perturbed(params, [b * d for d in two]):
            rows.append(landscape(losses, params, one, alphas))
    return rows


def worst_case(losses, params, rho, steps=5):
    """The largest L(w + eps) - L(w) met by `steps` steps of normalised ascent in the ball
    ||eps|| <= rho.  It is a lower bound of SAM's inner maximum, Eq. (A1): few steps do not get all
    the way.

    eps <- eps + (2 rho / steps) g / ||g||, pulled back onto the ball where it has left it; the
    first step goes to the sphere.
    """
    best, start, eps = 0.0, loss_of(losses), [torch.zeros_like(p) for p in params]
    for step in range(steps):
        with perturbed(params, eps):
            _, g = gradient(losses, params)
        eps = [e + d for e, d in zip(eps, scaled(g, rho if step == 0 else 2 * rho / steps))]
        if norm(eps) > rho:
            eps = scaled(eps, rho)
        with perturbed(params, eps):
            best = max(best, loss_of(losses) - start)
    return best


def hessian_vector(losses, params, v):
    """[H v], H the Hessian of the loss with respect to all of `params` together, by two backward
    passes."""
    total = [torch.zeros_like(p) for p in params]
    # the fused kernels of attention have no second derivative
    with with_gradients(params), sdpa_kernel(SDPBackend.MATH):
        for loss in losses:
            first = torch.autograd.grad(loss(), params, create_graph=True, allow_unused=True)
            used = [(g, d) for g, d in zip(first, v) if g is not None and g.requires_grad]
            if not used:  # a linear loss
                continue
            slope = sum((g * d).sum() for g, d in used)
            second = torch.autograd.grad(slope, params, allow_unused=True)
            total = [a if g is None else a + g for a, g in zip(total, second)]
    return total


def top_eigenvalue(losses, params, iterations=15, generator=None, shift=0.0):
    """(lambda, ||H v - lambda v||): the largest eigenvalue of the Hessian and what is left of the
    equation, by power iteration.

    Power iteration finds the eigenvalue that is largest in size; if that one is negative, a second
    run on H - lambda I finds the largest one.
    """
    v = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in params]
    v = scaled(v, 1.0)
    for _ in range(iterations):
        hv = [h - shift * d for h, d in zip(hessian_vector(losses, params, v), v)]
        value = inner(v, hv)
        rest = norm([h - value * d for h, d in zip(hv, v)])
        v = scaled(hv, 1.0)
        if norm(hv) == 0 or rest < 1e-9 * abs(value):
            break
    if value < 0 and shift == 0.0:
        return top_eigenvalue(losses, params, iterations, generator, shift=value)
    return value + shift, rest


# ------------------------------------------------------------------------------ perturbations


def lora_sam_terms(layers, eps):
    """(s B eps_A, s eps_B A, s eps_B eps_A), a list of (m, n) each: what a perturbation of B1 and
    A1 is in W, Eq. (5).

    eps: (eps_B, eps_A) of one layer after the other, as primary_parameters lists them.
    """
    pairs = list(zip(layers, eps[::2], eps[1::2], strict=True))
    return ([layer.scale * layer.lora_B.detach() @ a for layer, _, a in pairs],
            [layer.scale * b @ layer.lora_A.detach() for layer, b, _ in pairs],
            [layer.scale * b @ a for layer, b, a in pairs])


def low_rank_inner(one, two):
    """<B A, B' A'> of two lists of pairs (B, A), through Gram matrices."""
    total = 0.0
    for (B, A), (B2, A2) in zip(one, two, strict=True):
        total = total + ((B.t() @ B2) * (A @ A2.t())).sum().double()
    return total.item()


def low_rank_cosine(one, two):
    size = math.sqrt(max(0.0, low_rank_inner(one, one)) * max(0.0, low_rank_inner(two, two)))
    return low_rank_inner(one, two) / size if size > 0 else None


def singular_values(B, A):
    """Those of B A, (r,), through an r x r matrix."""
    return torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.t()).R.t())


def effective_rank(pairs):
    """exp of the entropy of sigma_i / sum sigma (Roy and Vetterli 2007), averaged over the layers
    with their ||B A||^2."""
    ranks, weights = [], []
    for B, A in pairs:
        sigma = singular_values(B, A).double()
        if sigma.sum() > 0:
            p = sigma / sigma.sum()
            ranks.append(torch.exp(-torch.special.xlogy(p, p).sum()).item())
            weights.append((sigma**2).sum().item())
    return sum(r * w for r, w in zip(ranks, weights)) / sum(weights) if ranks else None


def reachable_energy(G, pairs):
    """Share of ||G||^2 in {B X + Y A}, over all layers: the subspace of Proposition 1, Eq. (6)."""
    left = 0.0
    for g, (B, A) in zip(G, pairs, strict=True):
        U, V = basis(B), basis(A.t())
        out = g - U @ (U.t() @ g)
        out = out - (out @ V) @ V.t()
        left += inner([out], [out])
    return 1 - left / inner(G, G)


def basis(B):
    """Orthonormal columns with the span of B's; none for B = 0."""
    U, sigma, _ = torch.linalg.svd(B, full_matrices=False)
    return U[:, sigma > 1e-6 * sigma.max()] if sigma.max() > 0 else U[:, :0]


def best_rank_energy(G, rank):
    """Share of ||G||^2 that a matrix of this rank can hold: sum_(i <= rank) sigma_i^2 / ||G||^2,
    over all layers.

    Its root, times rho ||G||, is the maximum of <G, eps> over the ball and the rank, Eq. (A16-A19),
    put right.
    """
    held = sum((torch.linalg.svdvals(g)[:rank].double() ** 2).sum().item() for g in G)
    return held / inner(G, G)

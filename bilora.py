"""LoRA, LoRA-SAM and Bi-LoRA: an adapted linear layer, and three steps that differ in a few lines.

Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models, arXiv
2508.19564 v2; Eq. (n) is that paper's equation n.  LoRA: arXiv 2106.09685.  SAM: arXiv 2010.01412.

symbol   name in code     shape             meaning
W0       weight           (m, n)            frozen weight of the base: m outputs, n inputs
B1, A1   lora_B, lora_A   (m, r), (r, n)    primary pair: learns the task, by descent
B2, A2   aux_B, aux_A     (m, r2), (r2, n)  auxiliary pair: the adversarial perturbation, by ascent
s        scale            number            alpha / r, on both pairs, in the forward pass
G        -                (m, n)            dL/dW at the weights that the forward pass used
rho      rho              number            radius over all layers, of eps or of B2 A2
F        norm             0-dim             ||g||, norm of the gradients LoRA-SAM moves along
c        c                0-dim             sqrt(sum_i ||B2_i A2_i||^2) over the layers i, without s

What the paper leaves open, and what is done here:
1. Optimizers.  The equations are plain gradient steps.  bilora_optimizers descends by AdamW and
   ascends by plain SGD, as the authors' code is reported to do; ascent="adamw" is another choice.
2. Weight decay: 0 by default, and always 0 for the auxiliary pairs.
3. Initialisation: A1 and A2 Kaiming-uniform, B1 and B2 zero, so that W = W0 at the start.
4. Eq. (4) is printed for one pair; here one radius covers all layers, as in Eq. (10).
5. Gradient clipping: none.
6. A head that is trained in full descends, and is not perturbed unless `params` names it.

Where this file goes beyond the paper:
7. Eq. (4) divides by F; where every gradient is zero, eps is zero.
8. Both passes of LoRA-SAM draw the same random numbers from torch's CPU and CUDA generators, so the
   same dropout masks.  (BatchNorm's running statistics see both passes.)
9. A parameter without a gradient in pass 1 is not perturbed; without one in pass 2, not stepped.
10. A step that cannot do its work ends before an optimizer has moved: a loss or gradient that is
    NaN or infinite, and a closure that leaves no gradient.
"""

import contextlib
import hashlib
import json
import math
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import get_total_norm

HEADS = {"lm_head", "classifier", "score", "head"}  # adapted only where `targets` asks for it


# ------------------------------------------------------------------------------ the adapted layer


class LoRALinear(nn.Module):
    """A frozen nn.Linear plus low-rank pairs, Eq. (1, 7): y = x W^T + bias with
    W = W0 + s B1 A1 in eval mode, W0 + s B1 A1 + s B2 A2 in training mode.

    x: (..., n) -> y: (..., m).  The pairs are float32 whatever the dtype of `linear`.  train() and
    eval() touch no weight.  Raises ValueError for rank < 1, aux_rank < 0 and either above min(m, n).
    """

    def __init__(self, linear, rank, alpha, aux_rank=0):
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"LoRALinear wraps an nn.Linear, not {type(linear).__name__}")
        self.out_features, self.in_features = linear.weight.shape
        _require_ranks(linear, rank, aux_rank)
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.lora_A, self.lora_B = self._new_pair(rank)
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.aux_A = self.aux_B = None
        self.add_auxiliary(aux_rank)
        self.train(linear.training)

    def add_auxiliary(self, aux_rank):
        """Give the layer a fresh auxiliary pair of rank r2 = aux_rank; nothing for aux_rank 0."""
        if aux_rank:
            self.aux_A, self.aux_B = self._new_pair(aux_rank)

    def _new_pair(self, rank):
        """A (rank, n) Kaiming-uniform, drawn on the CPU so that a seed gives one adapter on any
        device; B (m, rank) zero."""
        m, n = self.weight.shape
        A, B = torch.empty(rank, n, dtype=torch.float32), torch.zeros(m, rank, dtype=torch.float32)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return nn.Parameter(A.to(self.weight.device)), nn.Parameter(B.to(self.weight.device))

    def forward(self, x):
        A, B = self.lora_A, self.lora_B
        if self.training and self.aux_A is not None:  # two pairs are one pair of rank r + r2
            A, B = torch.cat([A, self.aux_A]), torch.cat([B, self.aux_B], dim=1)
        rows = x.reshape(-1, x.shape[-1])
        out = F.linear(rows, self.weight, self.bias)
        low = F.linear(rows, A.to(rows.dtype)).to(out.dtype)
        out.addmm_(low, B.to(out.dtype).t(), alpha=self.scale)  # out += s (x A^T) B^T
        return out.view(*x.shape[:-1], self.out_features)

    def delta(self):
        """s B1 A1, (m, n): what training adds to W0, and what a merge keeps."""
        return self._product(self.lora_B, self.lora_A)

    def aux_delta(self):
        """s B2 A2, (m, n): this layer's perturbation; zero where it has no auxiliary pair."""
        if self.aux_A is None:
            return torch.zeros_like(self.weight, dtype=self.lora_A.dtype)
        return self._product(self.aux_B, self.aux_A)

    def _product(self, B, A):
        with torch.autocast(B.device.type, enabled=False):
            return self.scale * B @ A

    def extra_repr(self):
        return (f"{self.in_features}, {self.out_features}, rank={self.rank}, alpha={self.alpha}, "
                f"aux_rank={0 if self.aux_A is None else len(self.aux_A)}")


def add_lora(model, rank=8, alpha=16, aux_rank=0, targets=None):
    """Put a LoRALinear in place of each targeted nn.Linear, freeze every other parameter, and
    return the new layers.

    targets: a regular expression searched for in the module names, or a list of name endings
    (["q", "v"] takes every layer called q or v); by default every nn.Linear but those under a
    module called lm_head, classifier, score or head.  An nn.Linear with two names becomes one
    LoRALinear.  All primary pairs are drawn (from torch's default generator) before the auxiliary
    ones: a seed gives the same primary pairs whatever aux_rank is.
    Raises ValueError where the expression, or an ending, matches nothing (listing the names there
    are), for a target that cannot be adapted, a rank that does not fit and a model with adapters;
    nothing has changed then.
    """
    if lora_layers(model):
        raise ValueError("the model has LoRA adapters already; merge_lora_ them first")
    linears = {name: module for name, module in model.named_modules(remove_duplicate=False)
               if name and isinstance(module, nn.Linear)}
    names = _targeted(list(linears), targets)
    _require_adaptable(model, {name: linears[name] for name in names})
    for name in names:
        _require_ranks(linears[name], rank, aux_rank, f"{name}: ")
    adapted = {linears[name]: LoRALinear(linears[name], rank, alpha) for name in names}
    for layer in adapted.values():
        layer.add_auxiliary(aux_rank)
    model.requires_grad_(False)  # the adapters, which stay trainable, are not part of it yet
    for name in names:
        _replace(model, name, adapted[linears[name]])
    return list(adapted.values())


def _targeted(names, targets):
    """Those of the names that targets asks for, in the order of `names`."""
    if targets is None:
        wanted = {"the default": [name for name in names if not HEADS & set(name.split("."))]}
    elif isinstance(targets, str):
        wanted = {repr(targets): [name for name in names if re.search(targets, name)]}
    else:
        wanted = {repr(end): [name for name in names if f".{name}".endswith(f".{end}")]
                  for end in targets}
    for target, found in wanted.items():
        if not found:
            raise ValueError(f"targets: {target} matches no nn.Linear of {', '.join(names) or 'none'}")
    if not wanted:
        raise ValueError(f"targets is {targets!r}; expected a regular expression or name endings")
    return [name for name in names if any(name in found for found in wanted.values())]


def _require_ranks(linear, rank, aux_rank, where=""):
    shape = tuple(linear.weight.shape)
    for name, value, least in (("rank", rank, 1), ("aux_rank", aux_rank, 0)):
        if not isinstance(value, int) or not least <= value <= min(shape):
            raise ValueError(f"{where}{name} is {value}; a {shape} weight takes {least} to "
                             f"{min(shape)}" + ("; `targets` can leave it out" if where else ""))


def _require_adaptable(model, linears):
    """ValueError for a weight that is an embedding's too, or that torch's own transformer layers
    read without calling the nn.Linear."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    readers = [m for m in model.modules()
               if isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoderLayer))]
    read = {child: type(reader).__name__ for reader in readers for child in reader.modules()}
    for name, linear in linears.items():
        if id(linear.weight) in embeddings:
            raise ValueError(f"{name} cannot be adapted: an embedding shares its weight; "
                             "`targets` can leave it out")
        if linear in read:
            raise ValueError(f"{name} cannot be adapted: {read[linear]} reads its weight itself; "
                             "`targets` can leave it out")


def _replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def lora_layers(model):
    """List of the LoRALinear in a model, each once."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def primary_parameters(model):
    """List of B1 and A1 of every adapted layer: they descend, and are kept."""
    return [p for layer in lora_layers(model) for p in (layer.lora_B, layer.lora_A)]


def auxiliary_parameters(model):
    """List of B2 and A2 of every adapted layer that has them: they ascend, and are thrown away."""
    layers = _perturbed_layers(lora_layers(model))
    return [p for layer in layers for p in (layer.aux_B, layer.aux_A)]


def _perturbed_layers(layers):
    """Those with an auxiliary pair, each once."""
    if isinstance(layers, nn.Module):
        raise ValueError(f"layers is a {type(layers).__name__}; expected the list that add_lora "
                         "returned, or lora_layers(model)")
    return [layer for layer in dict.fromkeys(layers) if layer.aux_A is not None]


# ------------------------------------------------------------------------------ the perturbation


@torch.no_grad()
def perturbation_norm(layers):
    """c = sqrt(sum_i ||B2_i A2_i||_F^2), without s as in Eq. (10); 0-dim, float32 or wider.  A layer
    without an auxiliary pair adds nothing.

    ||B A||^2 = <B^T B, A A^T>: two r2 x r2 Gram matrices a layer are enough, O((m + n) r2^2).
    """
    layers = _perturbed_layers(layers)
    if not layers:
        return torch.tensor(0.0)
    device, squares = layers[0].aux_A.device, []
    with torch.autocast(device.type, enabled=False):
        for layer in layers:
            wide = torch.promote_types(layer.aux_A.dtype, torch.float32)
            B, A = layer.aux_B.to(wide), layer.aux_A.to(wide)
            squares.append(((B.t() @ B) * (A @ A.t())).sum().to(device))
    return torch.stack(squares).sum().clamp(min=0).sqrt()


@torch.no_grad()
def clip_perturbation_(layers, rho):
    """Eq. (10): only if c > rho, multiply every A2 and B2 by sqrt(rho / c), so that c becomes rho.

    One radius for all layers together.  In place, with no value read on the host.  Returns c as it
    was before, 0-dim.  Raises ValueError for rho < 0.
    """
    _require_radius(rho)
    layers = _perturbed_layers(layers)
    c = perturbation_norm(layers)
    factor = torch.where(c > rho, torch.sqrt(rho / c), 1.0)
    for layer in layers:
        layer.aux_B.mul_(factor.to(layer.aux_B.device))
        layer.aux_A.mul_(factor.to(layer.aux_A.device))
    return c


# ------------------------------------------------------------------------------ the three steps
# closure() runs forward and backward on the current batch (all its micro-batches), returns the loss


def lora_step(optimizer, closure):
    """One step of LoRA: descend along g, the gradient at w, Eq. (2).  One pass.

    Returns the loss, 0-dim.  Raises ValueError for a closure that leaves the optimizer's parameters
    without a gradient, FloatingPointError for a NaN or infinite loss or gradient, and has moved
    nothing then.
    """
    _start_pass(_parameters(optimizer))
    loss = closure()                                                # g = dL/dw at w, (2)
    _require_gradient("LoRA", loss, optimizer)
    optimizer.step()
    return loss.detach()


def lora_sam_step(optimizer, closure, rho, params=None):
    """One step of LoRA-SAM, whose objective is Eq. (3): descend along the gradient at w + eps,
    eps = rho g / F, Eq. (4).  Two passes, with the same batch and the same dropout masks.

    rho: Frobenius norm of eps over all of `params` together, by default all that the optimizer
    holds; where those are all weights of a model, this is plain SAM, Eq. (A1-A3).  The weights are
    put back bit for bit, in their own storage, before the optimizer moves them or an exception
    leaves.
    Returns the loss of the first pass, 0-dim.  Raises ValueError for rho < 0, no params and a
    closure that leaves no gradient, FloatingPointError for a NaN or infinite loss or gradient in
    either pass, and has moved nothing then.
    """
    _require_radius(rho)
    params = list(dict.fromkeys(_parameters(optimizer) if params is None else params))
    if not params:
        raise ValueError("params is empty; expected the parameters to perturb")
    _start_pass([*_parameters(optimizer), *params])
    with _random_state_restored_after(params):
        loss = closure()                                            # pass 1: g = dL/dw at w
    _require_gradient("LoRA-SAM, pass 1", loss, optimizer, params)
    with _perturbed(params, rho):                                   # (4) w + rho g / F
        _start_pass([*_parameters(optimizer), *params])
        second = closure()                                          # pass 2: dL/dw at w + eps
        _require_gradient("LoRA-SAM, pass 2", second, optimizer)
    optimizer.step()
    return loss.detach()


def bilora_step(descent, ascent, closure, layers, rho, clip=clip_perturbation_):
    """One step of Bi-LoRA, whose objective is Eq. (8): from the gradients of one pass (B1, A1)
    descend and (B2, A2) ascend, Eq. (9, A5); then the perturbation is clipped, Eq. (10).

    descent: optimizer of all that descends.  ascent: optimizer of the auxiliary pairs of `layers`,
    and of nothing else, each of its groups with maximize=True (bilora_optimizers makes both).
    layers: the adapted layers, in training mode: eval mode ignores the auxiliary pair.
    rho: largest c = sqrt(sum_i ||B2_i A2_i||^2).  clip: another function of (layers, rho),
    to record the c that clip_perturbation_ returns or to try another rule.
    Returns the loss, 0-dim.  Raises ValueError for rho < 0, for a layer in eval mode, where not all
    auxiliary pairs ascend or something else does and for a closure that leaves no gradient,
    FloatingPointError for a NaN or infinite loss or gradient, and has moved nothing then.
    """
    _require_radius(rho)
    layers = _perturbed_layers(layers)
    _require_game(descent, ascent, layers)
    _start_pass([*_parameters(descent), *_parameters(ascent)])
    loss = closure()                                                # G at W + s B2 A2, (A4)
    _require_gradient("Bi-LoRA", loss, descent, _parameters(ascent))
    descent.step()                                                  # (9) B1 and A1
    ascent.step()                                                   # (9) B2 and A2
    clip(layers, rho)                                               # (10)
    return loss.detach()


def bilora_power_step(descent, closure, layers, rho, momentum=0.5):
    """One step of Bi-LoRA's objective, Eq. (8), with another ascent: a step of block power
    iteration stands in place of the paper's ascent and clip.  It is NOT the paper's rule.  One pass.

    At a fixed G, and one s for all layers, B2 A2 converges to rho G_r / ||G_r||, G_r the best
    approximation of G of rank r2: the maximizer of <G, eps> in the ball, Eq. (A18) put right, and
    with r2 = rank(G) that of SAM.  The paper's ascent ends at rank 1 instead.

    descent: optimizer without the auxiliary pairs.  layers: the adapted layers, in training mode.
    rho: c after the step.  momentum: share, from 0 to under 1, of the old perturbation in the new.
    Returns the loss, 0-dim.  Raises ValueError for rho < 0, another momentum, a layer in eval mode
    and no auxiliary pairs, FloatingPointError for a NaN or infinite loss or gradient, and has moved
    nothing then.
    """
    _require_radius(rho)
    layers = _perturbed_layers(layers)
    _require_perturbable(layers, momentum)
    auxiliary = [p for layer in layers for p in (layer.aux_B, layer.aux_A)]
    if not set(auxiliary).isdisjoint(_parameters(descent)):
        raise ValueError("descent holds auxiliary parameters; the power rule turns them itself")
    _start_pass([*_parameters(descent), *auxiliary])
    loss = closure()                                                # at W0 + s B1 A1 + s B2 A2
    _require_gradient("Bi-LoRA, power rule", loss, descent, auxiliary)
    turn_perturbation_(layers, rho, momentum)                       # not the paper's ascent and clip
    descent.step()                                                  # (9) B1 and A1
    return loss.detach()


def bilora_optimizers(model, lr, aux_lr=None, ascent="sgd", weight_decay=0.0):
    """(descent, ascent): AdamW over all that is trainable but the auxiliary pairs, with rate
    eta1 = lr, and plain SGD with maximize=True over those, with rate eta2 = aux_lr, by default lr.

    ascent="adamw" makes the second one AdamW too.  Whatever else is trainable, such as a head,
    descends.  A model without auxiliary pairs gets (descent, None).  Raises ValueError for another
    ascent and for a model with nothing to train.
    """
    if ascent not in ("sgd", "adamw"):
        raise ValueError(f"ascent is {ascent!r}; expected 'sgd' or 'adamw'")
    auxiliary = auxiliary_parameters(model)
    ascending = set(auxiliary)
    descending = [p for p in model.parameters() if p.requires_grad and p not in ascending]
    if not descending:
        raise ValueError("the model has nothing to train; add_lora gives it adapters")
    descent = torch.optim.AdamW(descending, lr=lr, weight_decay=weight_decay, fused=True)
    if not auxiliary:
        return descent, None
    aux_lr = lr if aux_lr is None else aux_lr
    if ascent == "sgd":
        return descent, torch.optim.SGD(auxiliary, lr=aux_lr, maximize=True)
    return descent, torch.optim.AdamW(auxiliary, lr=aux_lr, weight_decay=0.0, maximize=True,
                                      fused=True)


@torch.no_grad()
def turn_perturbation_(layers, rho, momentum=0.5):
    """A2' = orthonormal rows of B2^T G, and B2' A2' = rho P / ||P|| with P = s G A2^T A2 A2'^T A2',
    ||.|| over all layers together, so that c becomes rho.

    With A2's rows orthonormal, s G A2^T, which is dL/dB2, is the best B2 for them; it is carried
    over into the new rows.  s B2^T G, which is dL/dA2, turns the rows towards the leading right
    singular vectors of G.  Both are blended with the old pair, momentum to 1 - momentum.  Reads
    the gradients of the pairs; in place, with no value read on the host.  Where there is no
    gradient, the perturbation keeps its direction.
    """
    layers = _perturbed_layers(layers)
    if not layers:
        return
    with torch.autocast(layers[0].aux_A.device.type, enabled=False):
        products = _blend([layer.aux_B for layer in layers],
                          [_gradient(layer.aux_B) for layer in layers], momentum)
        for layer, X in zip(layers, products):                      # X = s G A2^T, (m, r2)
            (rows,) = _blend([layer.aux_A], [_gradient(layer.aux_A)], momentum)  # B2^T G, (r2, n)
            A = torch.linalg.qr(rows.t()).Q.t()
            layer.aux_B.copy_(X @ (layer.aux_A @ A.t()))            # X in the new rows
            layer.aux_A.copy_(A)
        c = perturbation_norm(layers)
        factor = torch.where(c > 0, rho / c, 0.0)
        for layer in layers:
            layer.aux_B.mul_(factor.to(layer.aux_B.device))


def _blend(old, new, momentum):
    """momentum old / ||old|| + (1 - momentum) new / ||new||, the norms over a whole list; old alone
    where new is zero."""
    norms = [get_total_norm(tensors) for tensors in (old, new)]
    smallest, moved = torch.finfo(norms[0].dtype).tiny, norms[1] > 0
    a, b = (1 / norm.clamp(min=smallest) for norm in norms)
    a, b = torch.where(moved, momentum * a, a), torch.where(moved, (1 - momentum) * b, 0.0)
    return [a.to(x.device) * x + b.to(x.device) * y for x, y in zip(old, new)]


def _gradient(p):
    return torch.zeros_like(p) if p.grad is None else p.grad


# ------------------------------------------------------------------------------ what the steps need


def _start_pass(params):
    """Clear old gradients, and copies of old weights that a surrounding autocast region keeps."""
    for p in params:
        p.grad = None
    torch.clear_autocast_cache()


@contextlib.contextmanager
def _perturbed(params, rho):
    """w + rho g / ||g|| inside, for the g that params hold; w bit for bit afterwards."""
    params = [p for p in params if p.grad is not None]
    norm = _gradient_norm(params)
    factor = torch.where(norm > 0, rho / norm, 0.0)
    backup = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p in params:
                p.addcmul_(p.grad, factor.to(p.device))
        yield
    finally:
        with torch.no_grad():
            for p, w in zip(params, backup):
                p.copy_(w)
        torch.clear_autocast_cache()


def _random_state_restored_after(params):
    """A context that leaves the generators where it found them: pass 2 draws pass 1's masks."""
    return torch.random.fork_rng({p.device for p in params if p.device.type == "cuda"})


def _gradient_norm(params):
    """Global norm of the gradients there are, 0-dim, in float32 at least."""
    grads = [p.grad for p in params if p.grad is not None]
    return get_total_norm([g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads])


def _require_gradient(method, loss, optimizer, params=()):
    """ValueError unless the closure gave a loss, and gradients both to the optimizer and, where
    there are any, to `params`; FloatingPointError unless all are finite.  One host synchronisation.
    """
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(f"closure() returned {loss!r}; expected the loss, a tensor of one number")
    for group in (_parameters(optimizer), params):
        if group and all(p.grad is None for p in group):
            frozen = sum(not p.requires_grad for p in group)
            raise ValueError(f"{method}: closure() left none of {len(group)} parameters ({frozen} of "
                             "them frozen) a gradient; expected it to call backward(), and an "
                             "optimizer made after add_lora")
    norm = _gradient_norm([*_parameters(optimizer), *params])
    if not torch.isfinite(loss.detach().to(norm.device) + norm):
        counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
        counted = counts or "betas" in optimizer.defaults  # Adam and its like count their steps
        step = f"step {max(counts, default=0) + 1}" if counted else "a step not counted"
        raise FloatingPointError(f"{method}, {step}: the loss is {loss.item()}, the norm of the "
                                 f"gradient {norm.item()}; the optimizer has not moved")


def _require_radius(rho):
    if not rho >= 0:
        raise ValueError(f"rho is {rho}; expected a radius of 0 or more")


def _require_perturbable(layers, momentum):
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; expected 0 or more, and less than 1")
    if not layers:
        raise ValueError("no layer has an auxiliary pair; add_lora gives them one with aux_rank")
    if not all(layer.training for layer in layers):
        raise ValueError("bilora_power_step expects the layers in training mode: call model.train()")


def _require_game(descent, ascent, layers):
    """ValueError unless the auxiliary pairs of `layers`, all of them and nothing else, ascend."""
    pairs = {p for layer in layers for p in (layer.aux_B, layer.aux_A)}
    if not pairs:
        raise ValueError("no layer has an auxiliary pair; add_lora gives them one with aux_rank")
    if not all(layer.training for layer in layers):
        raise ValueError("bilora_step expects the layers in training mode: call model.train()")
    if not isinstance(ascent, torch.optim.Optimizer):
        raise ValueError(f"ascent is {ascent!r}; expected the optimizer of the auxiliary pairs")
    if "maximize" not in ascent.defaults:
        raise ValueError(f"ascent: {type(ascent).__name__} does not know the option maximize; "
                         "expected an optimizer that does, such as torch.optim.SGD")
    if not all(group["maximize"] for group in ascent.param_groups):
        raise ValueError("ascent: expected maximize=True in every group")
    if any(group.get("maximize") for group in descent.param_groups):
        raise ValueError("descent: expected no group with maximize=True")
    up, down = set(_parameters(ascent)), set(_parameters(descent))
    if up != pairs or down & pairs:
        raise ValueError(f"ascent holds {len(up & pairs)} of the layers' {len(pairs)} auxiliary "
                         f"parameters and {len(up - pairs)} others, descent {len(down & pairs)}; "
                         f"expected {len(pairs)}, 0 and 0")


def _parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


# ------------------------------------------------------------------------------ after training


@torch.no_grad()
def merge_lora_(model):
    """Put plain nn.Linear back, with W = W0 + s B1 A1 computed in float32 (float64 for a float64
    base) and rounded once to W0's dtype.  The auxiliary pairs are dropped.

    Changes the model in place and returns it (a LoRALinear itself becomes a new nn.Linear).  The
    merged weights stay frozen; the base's tensors are not written to, for others may share them.
    """
    if isinstance(model, LoRALinear):
        return _merged(model)
    merged = {layer: _merged(layer) for layer in lora_layers(model)}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in merged:
            _replace(model, name, merged[module])
    return model


def _merged(layer):
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    W = layer.weight.to(wide) + layer._product(layer.lora_B.to(wide), layer.lora_A.to(wide))
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(W.to(layer.weight.dtype), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)


def save_adapter(model, folder, rename=None):
    """Write every trained tensor but the auxiliary pairs to adapter_model.bin, and what they fit to
    adapter_config.json, in PEFT's layout.

    rename: function or dict from this model's module names to another tree's.  Each file is
    written under a temporary name and renamed.  Raises ValueError for a model without adapters,
    where rename gives two modules one name, and where PEFT would find another adapter first.
    """
    config, slots = _adapter_layout(model, rename)
    os.makedirs(folder, exist_ok=True)
    settings, binary, safetensors = _adapter_files(folder)
    if os.path.exists(safetensors):
        raise ValueError(f"{safetensors}: another adapter is here, and PEFT reads that file first")
    torch.save({key: p.detach().cpu().contiguous() for key, p in slots.items()}, binary + ".tmp")
    with open(settings + ".tmp", "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
    os.replace(binary + ".tmp", binary)
    os.replace(settings + ".tmp", settings)


@torch.no_grad()
def load_adapter(model, folder, rename=None, read=None):
    """Copy a saved adapter's values into a model that add_lora has prepared in the same way.

    rename: as in save_adapter.  read: function from the path of adapter_model.safetensors, which
    PEFT writes, to {name: tensor}; it is used where there is no adapter_model.bin.
    Everything is compared before anything is copied; only PEFT's own files name no base.  Raises
    ValueError, naming the file and the setting that differs, or changes what W is, or the tensor
    that is missing, unexpected or misshapen.
    """
    config, slots = _adapter_layout(model, rename)
    settings, path, safetensors = _adapter_files(folder)
    with open(settings, encoding="utf-8") as file:
        try:
            saved = dict(json.load(file))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{settings}: not a JSON object: {error}") from None
    _require_same_adapter(settings, saved, config)
    if read is None and not os.path.exists(path) and os.path.exists(safetensors):
        raise ValueError(f"{safetensors}: expected `read`, a function that reads this format")
    if read is not None and not os.path.exists(path):
        path, tensors = safetensors, read(safetensors)
    else:
        tensors = _unpickled(path)
    for key in [*slots, *tensors]:
        if key not in tensors or key not in slots:
            raise ValueError(f"{path}: {key} is " + ("unexpected: nothing trainable here has this "
                             "name" if key in tensors else "missing"))
        found, shape = tensors[key], tuple(slots[key].shape)
        if not isinstance(found, torch.Tensor) or found.shape != shape:
            raise ValueError(f"{path}: {key} is not a tensor of shape {shape}")
        if not found.is_floating_point() or found.layout != torch.strided or found.is_meta:
            raise ValueError(f"{path}: {key} is not a dense tensor of floating-point numbers")
    for key, p in slots.items():
        p.copy_(tensors[key])


def _adapter_files(folder):
    names = ("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors")
    return [os.path.join(folder, name) for name in names]


def _unpickled(path):
    with open(path, "rb") as file:
        try:
            return dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # whatever a broken file makes the unpickler stumble over
            raise ValueError(f"{path}: not a file of tensors ({type(error).__name__})") from None


HARMLESS = {  # of PEFT's settings: those that leave W = W0 + s B1 A1 as it is
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"}


def _require_same_adapter(path, saved, config):
    ours = ("target_modules", "base_fingerprint") if "base_fingerprint" in saved else ()
    for key in ("peft_type", "r", "lora_alpha", "bias", *ours):
        if saved.get(key) != config[key]:
            hint = {"target_modules": "; `rename` maps the model's module names to the file's",
                    "base_fingerprint": "; the adapter was trained on another base"}.get(key, "")
            raise ValueError(f"{path}: {key} is {str(saved.get(key))[:70]}, the model's is "
                             f"{str(config[key])[:70]}{hint}")
    initial = saved.get("init_lora_weights")  # some move a part of W0 into the adapter
    if initial not in (None, True, False, "gaussian"):
        raise ValueError(f"{path}: init_lora_weights is {initial!r}; expected true or gaussian")
    for key, value in saved.items():
        if value and key not in HARMLESS | config.keys() | {"init_lora_weights"}:
            raise ValueError(f"{path}: {key} is {str(value)[:70]}; expected a plain LoRA")


def _adapter_layout(model, rename):
    """(config, {PEFT's name: parameter}) of a model's adapter, without B2 and A2."""
    layers = {n: module for n, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRA adapters; add_lora puts them in")

    def renamed(name):
        if rename is None:
            return name
        return rename(name) if callable(rename) else rename.get(name, name)

    slots, inside = {}, {id(p) for layer in layers.values() for p in layer.parameters()}
    for name, layer in layers.items():
        slots[renamed(name), "lora_A.weight"] = layer.lora_A
        slots[renamed(name), "lora_B.weight"] = layer.lora_B
    full = [(*name.rpartition(".")[::2], p) for name, p in model.named_parameters()
            if p.requires_grad and id(p) not in inside]
    slots |= {(renamed(module), name): p for module, name, p in full}
    if len(slots) != 2 * len(layers) + len(full):
        raise ValueError("rename gives two modules one name")
    rank, alpha = next((layer.rank, layer.alpha) for layer in layers.values())
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0,
              "bias": "none", "inference_mode": True,
              "target_modules": sorted(renamed(name) for name in layers),
              "modules_to_save": sorted({renamed(module) for module, *_ in full} - {""}) or None,
              "base_fingerprint": _fingerprint({renamed(n): layer for n, layer in layers.items()})}
    prefix = "base_model.model"
    return config, {".".join(filter(None, (prefix, *key))): p for key, p in slots.items()}


def _fingerprint(layers):
    """Hash of the adapted layers' names, W0 and biases, rounded to bfloat16, so that a base has the
    same one in float64, float32 and bfloat16."""
    digest = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        digest.update(name.encode())
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                bits = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
                digest.update(bits.numpy())
    return digest.hexdigest()

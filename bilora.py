"""LoRA, LoRA-SAM and Bi-LoRA: an adapted linear layer, and three steps that differ in a few lines.

Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models, arXiv
2508.19564; Eq. (n) is that paper's equation n.  LoRA: arXiv 2106.09685.  SAM: arXiv 2010.01412.

symbol   name in code     shape             meaning
W0       weight           (m, n)            frozen weight of the base: m outputs, n inputs
B1, A1   lora_B, lora_A   (m, r), (r, n)    primary pair: learns the task, by descent
B2, A2   aux_B, aux_A     (m, r2), (r2, n)  auxiliary pair: the adversarial perturbation, by ascent
s        scale            number            alpha / r, on both pairs
G        -                (m, n)            dL/dW at the weights that the forward pass used
rho      rho              number            radius over all layers, of eps or of c
F        norm             0-dim             ||g||, norm of the gradients LoRA-SAM moves along
c        c                0-dim             sqrt(sum_i ||s B2_i A2_i||^2) over the adapted layers i

Where the paper leaves something open, or this file deviates from it:
1. The paper drops s "for simplicity".  Here s stays, so that c measures what W really receives.
2. eps = rho g / ||g|| has no constant in its denominator; where all of g is zero, eps is zero.
3. Both passes of LoRA-SAM draw the same random numbers from torch's CPU and CUDA generators, so the
   same dropout masks.  (BatchNorm's running statistics see both passes.)
4. A parameter without a gradient in pass 1 is not perturbed; without one in pass 2, not stepped.
5. A loss or gradient that is NaN or infinite ends the step before the optimizer has moved.
6. A2 starts Kaiming-uniform and B2 at zero, as A1 and B1 do.  They have no weight decay.
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
    eval() touch no weight.  Raises ValueError for rank < 1, aux_rank < 0, either above min(m, n),
    and for an empty x.
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
        if x.numel() == 0:
            raise ValueError(f"LoRALinear got an empty batch, shape {tuple(x.shape)}")
        A, B = self.lora_A, self.lora_B
        if self.training and self.aux_A is not None:  # two pairs are one pair of rank r + r2
            A, B = torch.cat([A, self.aux_A]), torch.cat([B, self.aux_B], dim=1)
        rows = x.reshape(-1, self.in_features)
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

    targets: a regular expression searched for in the module names; by default every nn.Linear but
    those under a module called lm_head, classifier, score or head.  An nn.Linear with two names
    becomes one LoRALinear.  All primary pairs are drawn (from torch's default generator) before
    the auxiliary ones: a seed gives the same primary pairs whatever aux_rank is.
    Raises ValueError where nothing matches (listing the names there are), for a target that cannot
    be adapted, a rank that does not fit and a model with adapters; nothing has changed then.
    """
    if lora_layers(model):
        raise ValueError("the model has LoRA adapters already; merge_lora_ them first")
    linears = {name: module for name, module in model.named_modules(remove_duplicate=False)
               if name and isinstance(module, nn.Linear)}
    if targets is None:
        names = [name for name in linears if not HEADS & set(name.split("."))]
    else:
        names = [name for name in linears if re.search(targets, name)]
    if not names:
        raise ValueError(f"targets={targets!r} matches no nn.Linear of {', '.join(linears) or 'none'}")
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
    return [layer for layer in dict.fromkeys(layers) if layer.aux_A is not None]


# ------------------------------------------------------------------------------ the three steps
# closure() runs forward and backward on the current batch (all its micro-batches), returns the loss


def lora_step(optimizer, closure):
    """One step of LoRA, Eq. (2): descend along g, the gradient at w.  One pass.

    Returns the loss, 0-dim.  Raises FloatingPointError for a NaN or infinite loss or gradient,
    and has moved nothing then.
    """
    _start_pass(optimizer)
    loss = closure()                                                # g = dL/dw at w
    _require_finite("LoRA", optimizer, loss)
    optimizer.step()
    return loss.detach()


def lora_sam_step(optimizer, closure, rho, params=None):
    """One step of LoRA-SAM, Eq. (3, 4), or of SAM, Eq. (A2, A3): descend along the gradient at
    w + eps, eps = rho g / F.  Two passes, with the same batch and the same dropout masks.

    rho: Frobenius norm of eps over all of `params` together, by default all that the optimizer
    holds; where those are all weights of a model, this is plain SAM.  The weights are put back bit
    for bit, in their own storage, before the optimizer moves them or an exception leaves.
    Returns the loss of the first pass, 0-dim.  Raises ValueError for rho < 0 and for no params,
    FloatingPointError for a NaN or infinite loss or gradient in either pass, and has moved nothing
    then.
    """
    _require_radius(rho)
    params = list(dict.fromkeys(_parameters(optimizer) if params is None else params))
    if not params:
        raise ValueError("params is empty; expected the parameters to perturb")
    _start_pass(optimizer, params)
    with _random_state_restored_after(params):
        loss = closure()                                            # pass 1: g = dL/dw at w
    _require_finite("LoRA-SAM, pass 1", optimizer, loss, params)
    with _perturbed(params, rho):                                   # (3) w + rho g / F
        _start_pass(optimizer, params)
        _require_finite("LoRA-SAM, pass 2", optimizer, closure())   # pass 2: dL/dw at w + eps
    optimizer.step()                                                # (4)
    return loss.detach()


def bilora_step(optimizer, closure, layers, rho):
    """One step of Bi-LoRA, Eq. (8-10): (B1, A1) descend and (B2, A2) ascend along the gradients of
    the same pass; then the perturbation is clipped.  One pass.

    layers: the adapted layers, whose auxiliary pairs the optimizer holds in a group with
    maximize=True (bilora_optimizer makes one), in training mode, for in eval mode such a pair is
    not seen.  rho: largest c = sqrt(sum_i ||s B2_i A2_i||^2).
    Returns the loss, 0-dim.  Raises ValueError for rho < 0, for a layer in eval mode and where not
    all auxiliary pairs ascend or a primary one does, FloatingPointError for a NaN or infinite loss
    or gradient, and has moved nothing then.
    """
    _require_radius(rho)
    layers = _perturbed_layers(layers)
    _require_ascent(optimizer, layers)
    _start_pass(optimizer)
    loss = closure()                                                # at W0 + s B1 A1 + s B2 A2
    _require_finite("Bi-LoRA", optimizer, loss)
    optimizer.step()                                                # (8) descent, (9) ascent
    clip_perturbation_(layers, rho)                                 # (10)
    return loss.detach()


def bilora_power_step(optimizer, closure, layers, rho, momentum=0.5):
    """One step of Bi-LoRA, Eq. (8), with another ascent: a step of block power iteration stands in
    place of the paper's ascent and clip.  It is NOT the paper's rule.  One pass.

    At a fixed G the perturbation converges to rho G_r / ||G_r||, G_r the best approximation of G of
    rank r2: the maximizer of <G, eps> in the ball, Eq. (A18) put right, and with r2 = rank(G) that
    of SAM, Eq. (A21).  The paper's ascent ends at rank 1 instead.

    layers: the adapted layers, in training mode.  The optimizer may hold their auxiliary pairs, but
    does not step them and keeps no state for them.  rho: c after the step.  momentum: share, from 0
    to under 1, of the old perturbation in the new one.
    Returns the loss, 0-dim.  Raises ValueError for rho < 0, another momentum, a layer in eval mode
    and no auxiliary pairs, FloatingPointError for a NaN or infinite loss or gradient, and has moved
    nothing then.
    """
    _require_radius(rho)
    layers = _perturbed_layers(layers)
    _require_perturbable(layers, momentum)
    auxiliary = [p for layer in layers for p in (layer.aux_B, layer.aux_A)]
    _start_pass(optimizer, auxiliary)
    loss = closure()                                                # at W0 + s B1 A1 + s B2 A2
    _require_finite("Bi-LoRA, power rule", optimizer, loss, auxiliary)
    turn_perturbation_(layers, rho, momentum)                       # not the paper's ascent and clip
    for p in auxiliary:
        p.grad = None                                               # the optimizer passes them by
    optimizer.step()                                                # (8)
    return loss.detach()


def bilora_optimizer(model, lr, aux_lr=None, weight_decay=0.0, **adamw):
    """AdamW with two groups: trainable parameters descend with eta1 = lr, auxiliary ones ascend
    (maximize=True) with eta2 = aux_lr, by default lr.

    Whatever else is trainable, such as a head, descends.  A model without auxiliary pairs gets the
    first group alone, so that the same call serves all three steps.
    """
    auxiliary = auxiliary_parameters(model)
    ascending = {id(p) for p in auxiliary}
    descending = [p for p in model.parameters() if p.requires_grad and id(p) not in ascending]
    groups = [{"params": descending, "lr": lr, "weight_decay": weight_decay}]
    if auxiliary:
        groups.append({"params": auxiliary, "lr": lr if aux_lr is None else aux_lr,
                       "weight_decay": 0.0, "maximize": True})
    return torch.optim.AdamW(groups, **{"fused": True, **adamw})


@torch.no_grad()
def perturbation_norm(layers):
    """c = sqrt(sum_i ||s B2_i A2_i||_F^2), 0-dim.  A layer without an auxiliary pair adds nothing.

    ||B A||^2 = <B^T B, A A^T>, so that two r2 x r2 Gram matrices a layer do, O((m + n) r2^2).
    """
    layers = _perturbed_layers(layers)
    if not layers:
        return torch.tensor(0.0)
    device, squares = layers[0].aux_A.device, []
    with torch.autocast(device.type, enabled=False):
        for layer in layers:
            gram_B, gram_A = layer.aux_B.t() @ layer.aux_B, layer.aux_A @ layer.aux_A.t()
            squares.append((layer.scale**2 * (gram_B * gram_A).sum()).to(device))
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


@torch.no_grad()
def turn_perturbation_(layers, rho, momentum=0.5):
    """A2' = orthonormal rows of B2^T G, and s B2' A2' = rho P / ||P|| with P = G A2^T A2 A2'^T A2',
    ||.|| over all layers together, so that c becomes rho.

    With A2's rows orthonormal, G A2^T, which is dL/dB2 / s, is the best B2 for them; it is carried
    over into the new rows.  B2^T G, which is dL/dA2 / s, turns the rows towards the leading right
    singular vectors of G.  Both are blended with the old pair, momentum to 1 - momentum.  Reads
    the gradients of the pairs; in place, with no value read on the host.  Where there is no
    gradient, the perturbation keeps its direction.
    """
    layers = _perturbed_layers(layers)
    if not layers:
        return
    with torch.autocast(layers[0].aux_A.device.type, enabled=False):
        products = _blend([layer.scale * layer.aux_B for layer in layers],
                          [_gradient(layer.aux_B) / layer.scale for layer in layers], momentum)
        for layer, X in zip(layers, products):                      # X = G A2^T, (m, r2)
            (rows,) = _blend([layer.aux_A], [_gradient(layer.aux_A)], momentum)  # B2^T G, (r2, n)
            A = torch.linalg.qr(rows.t()).Q.t()
            layer.aux_B.copy_(X @ (layer.aux_A @ A.t()) / layer.scale)  # X in the new rows
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


def _start_pass(optimizer, params=()):
    """Clear old gradients, and copies of old weights that a surrounding autocast region keeps."""
    optimizer.zero_grad()
    for p in params:  # they need not all be the optimizer's
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


def _require_finite(method, optimizer, loss, params=()):
    """FloatingPointError unless loss and gradients are finite.  One host synchronisation."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(f"closure() returned {loss!r}; expected the loss, a tensor of one number")
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


def _require_ascent(optimizer, layers):
    groups = [group["params"] for group in optimizer.param_groups if group.get("maximize")]
    up = {id(p) for params in groups for p in params}
    if not all(layer.training for layer in layers):
        raise ValueError("bilora_step expects the layers in training mode: call model.train()")
    ascending = [id(p) in up for layer in layers for p in (layer.aux_B, layer.aux_A)]
    if not ascending or not all(ascending):
        raise ValueError("bilora_step expects the auxiliary parameters in a group with "
                         f"maximize=True; {sum(ascending)} of {len(ascending)} are")
    if any(id(p) in up for layer in layers for p in (layer.lora_B, layer.lora_A)):
        raise ValueError("bilora_step expects the primary parameters to descend; some have "
                         "maximize=True")


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

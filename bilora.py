"""LoRA, LoRA-SAM and Bi-LoRA: an adapted linear layer and three training steps that differ by a few lines.

Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models (arXiv 2508.19564); its equation
numbers are the ones cited here.  LoRA: arXiv 2106.09685.  SAM: arXiv 2010.01412.

symbol   attribute         shape     meaning
W0       weight            (m, n)    frozen weight of the base; m = out_features, n = in_features
B1, A1   lora_B, lora_A    (m, r), (r, n)     primary pair: learns the task, by descent
B2, A2   aux_B, aux_A      (m, r2), (r2, n)   auxiliary pair: the adversarial perturbation, by ascent
s        scale             number    alpha / r, on both pairs
G        -                 (m, n)    dL/dW at the weights that the forward pass used
rho      rho               number    radius: Frobenius norm over all perturbed tensors together
F        norm              0-dim     sqrt of the summed squared norms of all gradients that LoRA-SAM perturbs along
c        -                 0-dim     sqrt(sum_i ||s B2_i A2_i||^2), over the adapted layers i

Where this file decides what the paper leaves open, or deviates:
1. The paper drops s "for simplicity".  Here s stays, and c measures what is really added to the weights, s B2 A2.
2. SAM's eps = rho g / ||g|| has no constant in the denominator; where all of g is zero there is no perturbation.
3. Both passes of LoRA-SAM draw the same dropout masks.  (Running statistics, as BatchNorm's, see both passes.)
4. A parameter without a gradient is not perturbed in pass 1 and not stepped in pass 2.
5. A loss or gradient that is NaN or infinite ends the step before the optimizer moves.
6. The auxiliary pair starts as the primary does, A2 Kaiming-uniform and B2 = 0, and has no weight decay.
"""

import contextlib
import hashlib
import json
import math
import os
import pickle
import re
from collections.abc import Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import get_total_norm

HEADS = {"lm_head", "classifier", "score", "head"}  # never adapted unless `targets` names them


# ---------------------------------------------------------------------------------------------- the adapted layer


class LoRALinear(nn.Module):
    """A frozen nn.Linear plus low-rank pairs: y = x (W0 + s B1 A1 [+ s B2 A2 in training])^T + bias.  Eq. (1), (7)

    x: (..., n) -> (..., m).  The adapter is float32 whatever the dtype of `linear`; alpha / rank is `scale`.
    train() and eval() never touch a weight: the auxiliary pair only takes part in the forward pass in training mode.
    Raises ValueError for rank < 1, aux_rank < 0, either above min(m, n), and for an empty input.
    """

    def __init__(self, linear, rank, alpha, aux_rank=0):
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"LoRALinear wraps an nn.Linear, not a {type(linear).__name__}")
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.rank, self.alpha, self.scale = rank, alpha, alpha / self._require_rank("rank", rank, 1)
        self.lora_A, self.lora_B = self._new_pair(rank)
        self.aux_A = self.aux_B = None
        self.add_auxiliary(aux_rank)
        self.train(linear.training)

    def add_auxiliary(self, aux_rank):
        """Give the layer a fresh auxiliary pair of rank r2 = aux_rank (0: none)."""
        if self._require_rank("aux_rank", aux_rank, 0):
            self.aux_A, self.aux_B = self._new_pair(aux_rank)

    def _require_rank(self, name, rank, least):
        if not least <= rank <= min(self.weight.shape):
            shape = tuple(self.weight.shape)
            raise ValueError(f"{name} is {rank}; a {shape} weight takes {least} to {min(shape)}")
        return rank

    def _new_pair(self, rank):
        A = nn.init.kaiming_uniform_(torch.empty(rank, self.in_features), a=math.sqrt(5))  # drawn on the CPU: one seed,
        B = torch.zeros(self.out_features, rank)                                           # one adapter on any device
        return (nn.Parameter(tensor.to(self.weight.device)) for tensor in (A, B))

    def forward(self, x):
        if x.numel() == 0:
            raise ValueError(f"LoRALinear got an empty batch, shape {tuple(x.shape)}")
        A, B = self.lora_A, self.lora_B
        if self.training and self.aux_A is not None:  # two pairs cost what one of rank r + r2 does
            A, B = torch.cat([A, self.aux_A]), torch.cat([B, self.aux_B], dim=1)  # (r + r2, n), (m, r + r2)
        rows = x.reshape(-1, self.in_features)
        out = F.linear(rows, self.weight, self.bias)
        low = F.linear(rows, A.to(rows.dtype))
        out.addmm_(low.to(out.dtype), B.to(out.dtype).t(), alpha=self.scale)  # out += s (x A^T) B^T, in place
        return out.view(*x.shape[:-1], self.out_features)

    def delta(self):
        """s B1 A1, (m, n): what training adds to W0, and what a merge keeps."""
        return self._product(self.lora_B, self.lora_A)

    def aux_delta(self):
        """s B2 A2, (m, n): the perturbation of this layer; zeros where there is no auxiliary pair."""
        return torch.zeros_like(self.delta()) if self.aux_A is None else self._product(self.aux_B, self.aux_A)

    def _product(self, B, A):
        with torch.autocast(B.device.type, enabled=False):
            return self.scale * B @ A

    def extra_repr(self):
        aux_rank = 0 if self.aux_A is None else len(self.aux_A)
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, alpha={self.alpha}, aux_rank={aux_rank}"


def add_lora(model, rank=8, alpha=16, aux_rank=0, targets=None):
    """Put a LoRALinear in place of each targeted nn.Linear, freeze every other parameter, return the new layers.

    targets: a regular expression, searched for in the module names; by default every nn.Linear that is not under a
    module called lm_head, classifier, score or head.  One nn.Linear under two names becomes one LoRALinear.  The
    primary pairs are drawn from torch's default generator before the auxiliary ones, so that a seed gives the same
    primary pairs whatever aux_rank is.
    Raises ValueError where nothing matches (listing the names there are), where a target is tied to an embedding,
    and where the model has adapters already.
    """
    if lora_layers(model):
        raise ValueError("the model has LoRA adapters already; merge_lora_ them before adding others")
    linears = {name: module for name, module in model.named_modules(remove_duplicate=False)
               if name and isinstance(module, nn.Linear)}
    matching = [name for name in linears
                if (not HEADS & set(name.split(".")) if targets is None else re.search(targets, name))]
    if not matching:
        raise ValueError(f"no nn.Linear matches targets={targets!r}; there are: {', '.join(linears) or 'none'}")
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tied = [name for name in matching if id(linears[name].weight) in embeddings]
    if tied:
        raise ValueError(f"{tied[0]} shares its weight with an embedding and cannot be adapted")
    adapted = {linears[name]: LoRALinear(linears[name], rank, alpha) for name in matching}
    for layer in adapted.values():
        layer.add_auxiliary(aux_rank)
    model.requires_grad_(False)  # before the adapters, which stay trainable, are part of the model
    for name in matching:
        _replace(model, name, adapted[linears[name]])
    return list(adapted.values())


def _replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def lora_layers(model):
    """The LoRALinear of a model, each once, in module order."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def primary_parameters(model):
    """[B1, A1 of every adapted layer]: what descends, and what is kept."""
    return [p for layer in lora_layers(model) for p in (layer.lora_B, layer.lora_A)]


def auxiliary_parameters(model):
    """[B2, A2 of every adapted layer that has them]: what ascends, and is thrown away after training."""
    return [p for layer in _perturbed_layers(lora_layers(model)) for p in (layer.aux_B, layer.aux_A)]


def _perturbed_layers(layers):
    return [layer for layer in layers if layer.aux_A is not None]


# ---------------------------------------------------------------------------------------------- the three steps
# closure() runs forward and backward on the current batch, all its micro-batches, and returns the loss.


def lora_step(optimizer, closure):
    """One step of LoRA, Eq. (2): descend along g = dL/dw.  One pass.

    Returns the loss, 0-dim.  Raises FloatingPointError for a NaN or infinite loss or gradient; nothing has moved then.
    """
    optimizer.zero_grad()
    loss = closure()                                                    # one pass: L(w) and g
    _require_finite("LoRA", optimizer, loss)
    optimizer.step()
    return loss.detach()


def lora_sam_step(optimizer, closure, rho, params=None):
    """One step of LoRA-SAM, Eq. (3, 4) and (A2, A3): descend along dL/dw at w + eps, eps = rho g / F.  Two passes.

    rho: Frobenius norm of eps over all of `params` together (default: every parameter of the optimizer, which makes
    it plain SAM where the optimizer holds all weights).  Both passes see the same batch and the same dropout masks.
    The weights are back bit for bit, in their own storage, before the optimizer moves them, and also when the second
    pass raises.  Returns the loss of the first pass, 0-dim.
    Raises ValueError for rho < 0, FloatingPointError for a NaN or infinite loss or gradient in either pass.
    """
    _require_radius(rho)
    params = _unique(_parameters(optimizer) if params is None else params)
    _zero_grad(optimizer, params)
    with _same_random_numbers_again(params):
        loss = closure()                                                # pass 1: L(w) and g
    _require_finite("LoRA-SAM, pass 1", optimizer, loss)
    with _perturbed(params, rho):                                       # w + rho g / F
        _zero_grad(optimizer, params)
        _require_finite("LoRA-SAM, pass 2", optimizer, closure())       # pass 2: dL/dw at w + eps
    optimizer.step()
    return loss.detach()


def bilora_step(optimizer, closure, layers, rho):
    """One step of Bi-LoRA, Eq. (8-10): (B1, A1) descend, (B2, A2) ascend, then the ascent is clipped.  One pass.

    The optimizer must hold the auxiliary pairs of `layers` in a group with maximize=True (see bilora_optimizer).
    rho: largest Frobenius norm of the perturbation, sqrt(sum_i ||s B2_i A2_i||^2).  Returns the loss, 0-dim.
    Raises ValueError for rho < 0 and for auxiliary pairs missing or not ascending, FloatingPointError for a NaN or
    infinite loss or gradient; nothing has moved then.
    """
    _require_radius(rho)
    _require_ascent(optimizer, layers)
    optimizer.zero_grad()
    loss = closure()                                                    # one pass: both gradients, at W0 + s (B1 A1 + B2 A2)
    _require_finite("Bi-LoRA", optimizer, loss)
    optimizer.step()                                                    # (8) descent and (9) ascent: maximize=True
    clip_perturbation_(layers, rho)                                     # (10)
    return loss.detach()


def bilora_optimizer(model, lr, aux_lr=None, weight_decay=0.0, **adamw):
    """AdamW in two groups: what trains descends with eta1 = lr, the auxiliary pairs ascend with eta2 = aux_lr.

    aux_lr defaults to lr.  Every trainable parameter that is not auxiliary (a head trained in full, say) is in the
    first group.  A model without auxiliary pairs gets that group alone, and the same optimizer serves all three steps.
    """
    auxiliary = auxiliary_parameters(model)
    ascending = {id(p) for p in auxiliary}
    groups = [{"params": [p for p in model.parameters() if p.requires_grad and id(p) not in ascending],
               "weight_decay": weight_decay}]
    if auxiliary:
        groups.append({"params": auxiliary, "lr": lr if aux_lr is None else aux_lr, "maximize": True,
                       "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=lr, **{"fused": True, **adamw})


@torch.no_grad()
def perturbation_norm(layers):
    """c = sqrt(sum_i ||s B2_i A2_i||_F^2), 0-dim; s is in it.  Layers without an auxiliary pair add nothing.

    ||B A||^2 = tr(A^T B^T B A) = <B^T B, A A^T>: two r2 x r2 Gram matrices, O((m + n) r2^2), never an (m, n) product.
    """
    squares = []
    for layer in _perturbed_layers(layers):
        A, B = layer.aux_A, layer.aux_B
        with torch.autocast(A.device.type, enabled=False):
            squares.append(layer.scale**2 * ((B.t() @ B) * (A @ A.t())).sum().clamp(min=0))
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt() if squares else torch.tensor(0.0)


@torch.no_grad()
def clip_perturbation_(layers, rho):
    """Eq. (10): only where c > rho, multiply every A2 and B2 by sqrt(rho / c), which puts c on rho.  In place.

    One radius for all layers.  Returns c before the clip, 0-dim; no host synchronisation.  ValueError for rho < 0.
    """
    _require_radius(rho)
    c = perturbation_norm(layers)
    factor = torch.where(c > rho, torch.sqrt(rho / c), 1.0)
    for layer in _perturbed_layers(layers):
        layer.aux_A.mul_(factor.to(layer.aux_A.device))
        layer.aux_B.mul_(factor.to(layer.aux_B.device))
    return c


# ---------------------------------------------------------------------------------------------- what the steps need


@contextlib.contextmanager
def _perturbed(params, rho):
    """Inside, the weights are w + eps, eps = rho g / ||g||; afterwards w bit for bit, also after an exception."""
    params = [p for p in params if p.grad is not None]
    norm = get_total_norm([p.grad for p in params])
    factor = torch.where(norm > 0, rho / norm, 0.0)
    backup = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p in params:
                p.addcmul_(p.grad, factor.to(p.device))
        torch.clear_autocast_cache()  # a caller's autocast region may hold low-precision copies of w
        yield
    finally:
        with torch.no_grad():
            for p, w in zip(params, backup):
                p.copy_(w)
        torch.clear_autocast_cache()


def _same_random_numbers_again(params):
    """A context after which the generators stand where they stood before it: the next pass draws the same masks."""
    return torch.random.fork_rng({p.device for p in params if p.device.type == "cuda"})


def _require_finite(method, optimizer, loss):
    """Raise FloatingPointError unless the loss and all gradients are finite.  One host synchronisation."""
    norm = get_total_norm([p.grad for p in _parameters(optimizer) if p.grad is not None])
    if not torch.isfinite(loss.detach().to(norm.device) + norm):
        counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
        step = f"step {max(counts) + 1}" if counts else "the first step, or one the optimizer does not count"
        raise FloatingPointError(f"{method}, {step}: the loss is {loss.item()} and the gradient's norm {norm.item()}; "
                                 "the optimizer has not moved")


def _require_radius(rho):
    if not rho >= 0:
        raise ValueError(f"rho is {rho}; expected a radius of 0 or more")


def _require_ascent(optimizer, layers):
    """Raise ValueError unless every auxiliary pair is in a group with maximize=True."""
    ascending = {id(p) for group in optimizer.param_groups if group.get("maximize") for p in group["params"]}
    auxiliary = [p for layer in _perturbed_layers(layers) for p in (layer.aux_B, layer.aux_A)]
    if not auxiliary or not all(id(p) in ascending for p in auxiliary):
        raise ValueError(f"bilora_step expects the auxiliary parameters in a group with maximize=True; of "
                         f"{len(auxiliary)}, {sum(id(p) in ascending for p in auxiliary)} are (use bilora_optimizer)")


def _parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def _unique(params):
    return list({id(p): p for p in params}.values())


def _zero_grad(optimizer, params):
    optimizer.zero_grad()
    for p in params:
        p.grad = None


# ---------------------------------------------------------------------------------------------- after training


@torch.no_grad()
def merge_lora_(model):
    """Put plain nn.Linear back with W = W0 + s B1 A1, computed in float32 (or wider) and rounded once to W0's dtype.

    The auxiliary pairs are dropped.  Returns the model, changed in place.
    """
    merged = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, LoRALinear):
            if layer not in merged:
                merged[layer] = _merged(layer)
            _replace(model, name, merged[layer])
    return model


def _merged(layer):
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    weight = layer.weight.to(wide) + layer._product(layer.lora_B.to(wide), layer.lora_A.to(wide))
    linear.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)


def save_adapter(model, folder, rename=None):
    """Write adapter_model.bin (every trained tensor but the auxiliary pairs) and adapter_config.json, PEFT's layout.

    rename: a function or dict from this model's module names to another tree's.  Each file is written under a
    temporary name and renamed.  Returns nothing.  ValueError where the model has no adapters.
    """
    config, slots = _adapter_layout(model, rename)
    os.makedirs(folder, exist_ok=True)
    tensors = {key: p.detach().cpu().contiguous().clone() for key, p in slots.items()}
    path = os.path.join(folder, "adapter_model.bin")
    torch.save(tensors, path + ".tmp")
    os.replace(path + ".tmp", path)
    path = os.path.join(folder, "adapter_config.json")
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
    os.replace(path + ".tmp", path)


@torch.no_grad()
def load_adapter(model, folder, rename=None):
    """Copy a saved adapter's values into a model that add_lora has prepared in the same way, in place.

    Everything is compared before anything is copied: ValueError names the file and the setting (rank, alpha, targets,
    base) that differs, or the tensor that is missing, unexpected or misshapen.  rename: as in save_adapter.
    """
    config, slots = _adapter_layout(model, rename)
    path = os.path.join(folder, "adapter_config.json")
    try:
        with open(path, encoding="utf-8") as file:
            saved = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    for key in ("r", "lora_alpha", "target_modules", "base_fingerprint"):
        if not isinstance(saved, dict) or saved.get(key) != config[key]:
            raise ValueError(f"{path}: {key} is {_short(saved, key)}, this model's is {_short(config, key)}")
    path = os.path.join(folder, "adapter_model.bin")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a file of tensors: {str(error).splitlines()[0]}") from None
    for key in [*slots, *tensors]:
        if key not in tensors or key not in slots:
            raise ValueError(f"{path}: {key} is {'missing' if key not in tensors else 'unexpected'}")
        if tensors[key].shape != slots[key].shape:
            raise ValueError(f"{path}: {key} has shape {tuple(tensors[key].shape)}, expected {tuple(slots[key].shape)}")
    for key, p in slots.items():
        p.copy_(tensors[key])


def _adapter_layout(model, rename):
    """(config, {PEFT's tensor name: parameter}) of a model with adapters: what is saved, and what loading expects."""
    rename = (lambda name: name) if rename is None else rename
    renamed = (lambda name: rename.get(name, name)) if isinstance(rename, Mapping) else rename
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRA adapters; add_lora puts them in")
    slots, in_layers = {}, {id(p) for layer in layers.values() for p in layer.parameters()}
    for name, layer in layers.items():
        slots[f"base_model.model.{renamed(name)}.lora_A.weight"] = layer.lora_A
        slots[f"base_model.model.{renamed(name)}.lora_B.weight"] = layer.lora_B
    full = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in in_layers]
    for name in full:
        module, _, tensor = name.rpartition(".")
        slots[f"base_model.model.{renamed(module)}.{tensor}"] = model.get_parameter(name)
    some = next(iter(layers.values()))
    return {"peft_type": "LORA", "r": some.rank, "lora_alpha": some.alpha, "lora_dropout": 0.0, "bias": "none",
            "fan_in_fan_out": False, "inference_mode": True, "task_type": None, "base_model_name_or_path": None,
            "target_modules": sorted(renamed(name) for name in layers),
            "modules_to_save": sorted({renamed(name.rpartition(".")[0]) for name in full}) or None,
            "base_fingerprint": _fingerprint(layers.values())}, slots


def _fingerprint(layers):
    """A hash of the adapted W0, rounded to bfloat16 so that the same base in another dtype has the same one."""
    digests = [hashlib.sha256(layer.weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy())
               .hexdigest() for layer in layers]
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _short(config, key):
    text = json.dumps(config.get(key)) if isinstance(config, dict) else "missing"
    return text if len(text) < 80 else text[:60] + " ..."

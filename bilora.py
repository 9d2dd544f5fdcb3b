"""LoRA, LoRA-SAM and Bi-LoRA: an adapted linear layer, and three steps that differ in a few lines.
Bi-LoRA: arXiv 2508.19564 v2; Eq. (n) is its equation n.  LoRA: 2106.09685.  SAM: 2010.01412.

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
1. Optimizers: AdamW descends, plain SGD ascends, as the authors' code is reported to do.
2. Weight decay: 0 by default, and always 0 for the auxiliary pairs.  Gradient clipping: none.
3. Initialisation: A1 and A2 Kaiming-uniform, B1 and B2 zero, so that W = W0 at the start.
4. Eq. (4) is printed for one pair.  Here one radius covers all layers, as in Eq. (10).
5. A head that is trained in full descends, and is not perturbed unless `params` names it.
6. Both passes of LoRA-SAM draw the same dropout masks.  BatchNorm's statistics see both passes.
7. A parameter without a gradient in pass 1 is not perturbed; without one in pass 2, not stepped."""

import contextlib
import hashlib
import json
import math
import re
import tempfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["LoRALinear", "add_lora", "lora_layers", "primary_parameters", "auxiliary_parameters",
           "perturbation_norm", "clip_perturbation_", "lora_step", "lora_sam_step", "bilora_step",
           "one_pass", "perturbed", "scaled", "global_norm", "bilora_optimizers", "merge_lora_",
           "save_adapter", "load_adapter"]


def _require(condition, message):
    if not condition:
        raise ValueError(message)

def _wide(tensor):
    """In float32 at least, and dense: there norms, factors and sums of half precision are made."""
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    return dense.to(torch.promote_types(dense.dtype, torch.float32))


# ------------------------------------------------------------------------------ the adapted layer

class LoRALinear(nn.Module):
    """A frozen nn.Linear plus low-rank pairs, Eq. (1, 7): y = x W^T + bias, x (..., n), y (..., m),
    with W = W0 + s B1 A1 in eval mode and W0 + s B1 A1 + s B2 A2 in training mode."""

    def __init__(self, linear, rank, alpha, aux_rank=0):
        super().__init__()
        _require(isinstance(linear, nn.Linear), f"linear is {linear}; expected an nn.Linear")
        _require_plain("linear", linear)
        _require_ranks("linear", linear, rank, aux_rank, alpha)
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.lora_A, self.lora_B = self._new_pair(rank)
        self.aux_A, self.aux_B = self._new_pair(aux_rank)
        self.train(linear.training)

    def _new_pair(self, rank):
        if rank == 0:
            return None, None
        (m, n), device = self.weight.shape, self.weight.device
        with torch.inference_mode(False):  # what is made in that mode can never be trained
            A = torch.empty(rank, n, dtype=torch.float32, device="cpu")
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # a seed gives one A on any device
            B = torch.zeros(m, rank, dtype=torch.float32, device=device)
            return nn.Parameter(A.to(device)), nn.Parameter(B)

    def pairs(self, training):
        """[(B, A)] of the forward pass."""
        if training and self.aux_A is not None:
            return [(self.lora_B, self.lora_A), (self.aux_B, self.aux_A)]
        return [(self.lora_B, self.lora_A)]

    def forward(self, x):
        pairs = self.pairs(self.training)
        B, A = pairs[0]
        if len(pairs) > 1:  # two pairs are one pair of rank r + r2
            B, A = torch.cat([B for B, _ in pairs], dim=1), torch.cat([A for _, A in pairs])
        rows = x.reshape(-1, x.shape[-1])                           # (rows, n)
        out = self.frozen(rows)                                     # (rows, m)
        low = F.linear(rows, A.to(rows.dtype)).to(out.dtype)        # (rows, r + r2)
        out = torch.addmm(out, low, B.to(out.dtype).t(), alpha=self.scale)  # + s (x A^T) B^T
        return out.view(*x.shape[:-1], self.out_features)

    def frozen(self, rows):
        """x W0^T + bias, the product that an adapter is added to."""
        return F.linear(rows, self.weight, self.bias)

    def merged_weight(self, training=False, dtype=torch.float32):
        """W of the forward pass in eval mode, or in training mode; (m, n), in dtype or wider."""
        W = self.weight.to(torch.promote_types(self.weight.dtype, dtype))
        for B, A in self.pairs(training):
            W = W + self._product(B.to(W.dtype), A.to(W.dtype))
        return W

    def trained(self):
        """{name in PEFT's file: parameter}: what of the layer descends, and is kept."""
        return {"lora_B.weight": self.lora_B, "lora_A.weight": self.lora_A}

    def saved(self):
        """({name in PEFT's file: tensor}, the layer's part of adapter_config.json)."""
        return self.trained(), {"r": self.rank, "lora_alpha": self.alpha}

    def load(self, tensors):
        """Take in what `saved` gave."""
        for name, p in self.trained().items():
            p.copy_(tensors[name])

    def delta(self):
        """s B1 A1, (m, n): what training adds to W0, and what a merge keeps."""
        return self._product(self.lora_B, self.lora_A)

    def aux_delta(self):
        """s B2 A2, (m, n): this layer's perturbation; zero without an auxiliary pair."""
        if self.aux_A is None:
            return torch.zeros_like(self.delta())
        return self._product(self.aux_B, self.aux_A)

    def _product(self, B, A):
        with torch.autocast(B.device.type, enabled=False):
            return self.scale * B @ A

def _require_ranks(name, linear, rank, aux_rank, alpha):
    good = isinstance(alpha, (int, float)) and 0 < alpha < math.inf
    _require(good, f"alpha is {alpha!r}; expected a number above 0")
    shape = tuple(linear.weight.shape)
    for what, value, least in (("rank", rank, 1), ("aux_rank", aux_rank, 0)):
        fits = type(value) is int and least <= value <= min(shape)
        _require(fits, f"{what} is {value}; layer {name} of shape {shape} takes {least} to "
                 f"{min(shape)}")

def add_lora(model, rank=8, alpha=16, aux_rank=0, targets=None, layer=LoRALinear):
    """Put a LoRALinear in place of each targeted nn.Linear, freeze all else, return the new layers.
    layer: another class of them, or a function of (linear, rank, alpha).
    targets: a regular expression searched for in the module names, or a list of name endings
    (["q", "v"] takes every layer called q or v).  Default: every nn.Linear but those under a
    module called lm_head, classifier, score or head.  Raises ValueError, and changes nothing, where
    a target matches nothing or cannot be adapted, or a rank does not fit."""
    _require(not lora_layers(model), "the model has LoRA adapters already; merge_lora_ them first")
    linears = {name: module for name, module in model.named_modules(remove_duplicate=False)
               if name and isinstance(module, nn.Linear)}
    chosen = {name: linears[name] for name in _targeted(list(linears), targets)}
    for name, linear in chosen.items():
        _require_plain(name, linear)
        _require_read_by_itself(model, name, linear)
        _require_ranks(name, linear, rank, aux_rank, alpha)
    adapted = {linear: layer(linear, rank, alpha) for linear in chosen.values()}
    for new in adapted.values():
        new.aux_A, new.aux_B = new._new_pair(aux_rank)  # aux_rank changes no primary pair
    model.requires_grad_(False)  # the adapters, which stay trainable, are not part of it yet
    for name, linear in chosen.items():
        model.set_submodule(name, adapted[linear])
    return list(adapted.values())

def _targeted(names, targets):
    """Those of the names that `targets` asks for, in their order."""
    if targets is None:
        targets = r"^(?!(.*\.)?(lm_head|classifier|score|head)(\.|$))"  # in no head
    try:
        if isinstance(targets, str):
            patterns = {targets: re.compile(targets)}
        else:
            patterns = {end: re.compile(rf"(^|\.){re.escape(end)}$") for end in targets}
    except (re.error, TypeError):
        patterns = {}
    _require(patterns, f"targets is {targets!r}; expected a regular expression or name endings")
    for target, pattern in patterns.items():
        _require(any(re.search(pattern, name) for name in names),
                 f"targets: {target!r} matches no nn.Linear of {', '.join(names)}")
    return [name for name in names if any(re.search(p, name) for p in patterns.values())]

def _require_plain(name, linear):
    """ValueError where the module is more than the weight and the bias that an adapter takes, or
    the weight has no values that gradients can pass."""
    lost = {*linear._parameters, *linear._buffers, *linear._modules} ^ {"weight", "bias"}
    lost |= {key for key, value in vars(linear).items() if key.endswith("_hooks") and value}
    kind, plain = type(linear), nn.Linear
    own = kind.forward is not plain.forward or kind.__call__ is not plain.__call__
    if own or "forward" in vars(linear):
        lost.add(f"the forward of {kind.__name__}")
    _require(not lost, f"{name} cannot be adapted: an adapter would lose {', '.join(sorted(lost))}")
    W = linear.weight
    whole = type(W) is nn.Parameter and W.is_floating_point() and not W.is_meta
    _require(whole and not W.is_inference(), f"{name} cannot be adapted: its weight is a "
             f"{type(W).__name__} of {W.dtype} on {W.device}, or made in inference mode")

def _require_read_by_itself(model, name, linear):
    """ValueError where another module reads the weight without calling the nn.Linear."""
    readers = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    for module in model.modules():
        tied = isinstance(module, nn.Embedding) and module.weight is linear.weight
        read = isinstance(module, readers) and linear in module.modules()
        _require(not tied, f"{name} cannot be adapted: an embedding shares its weight")
        _require(not read, f"{name} cannot be adapted: its parent reads its weight itself")

def lora_layers(model):
    """List of the LoRALinear in a model, each once."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]

def primary_parameters(model):
    """List of what every adapted layer trains, B1 and A1: they descend, and are kept."""
    return _primary(lora_layers(model))

def auxiliary_parameters(model):
    """List of B2 and A2 of every adapted layer that has them: they ascend, and are thrown away."""
    return _auxiliary(_perturbed_layers(lora_layers(model)))

def _primary(layers):
    return [p for layer in layers for p in layer.trained().values()]

def _auxiliary(layers):
    return [p for layer in layers for p in (layer.aux_B, layer.aux_A)]

def _perturbed_layers(layers):
    """Those with an auxiliary pair, each once."""
    _require(not isinstance(layers, nn.Module), f"layers is a {type(layers).__name__}; expected "
             "the list of them, which add_lora returned")
    return [layer for layer in dict.fromkeys(layers) if layer.aux_A is not None]


# ------------------------------------------------------------------------------ the perturbation

@torch.no_grad()
def perturbation_norm(layers):
    """c = sqrt(sum_i ||B2_i A2_i||_F^2), without s as in Eq. (10); 0-dim, float32 or wider, under
    autocast too; 0 without auxiliary pairs.
    ||B A||^2 = <B^T B, A A^T>: two r2 x r2 Gram matrices a layer are enough, O((m + n) r2^2)."""
    layers = _perturbed_layers(layers)
    if not layers:
        return torch.tensor(0.0)
    device, squares = layers[0].aux_A.device, []
    with torch.autocast(device.type, enabled=False):
        for layer in layers:
            B, A = _wide(layer.aux_B), _wide(layer.aux_A)
            squares.append(((B.t() @ B) * (A @ A.t())).sum().to(device))
    return torch.stack(squares).sum().clamp(min=0).sqrt()

@torch.no_grad()
def clip_perturbation_(layers, rho):
    """Eq. (10): only if c > rho, multiply every B2 and A2 by sqrt(rho / c), so that c becomes rho.
    In place, with no value read on the host.  Returns c as it was before, 0-dim.  An infinite c
    leaves the pairs as they are: the next loss tells."""
    _require_radius(rho)
    layers = _perturbed_layers(layers)
    c = perturbation_norm(layers)
    factor = torch.where((c > rho) & c.isfinite(), torch.sqrt(rho / c), 1.0)
    pairs = _auxiliary(layers)
    for device in {p.device for p in pairs}:
        torch._foreach_mul_([p for p in pairs if p.device == device], factor.to(device))
    return c

def _require_radius(rho):
    _require(rho >= 0, f"rho is {rho}; expected a radius of 0 or more")


# ------------------------------------------------------------------------------ the three steps
# closure() runs forward and backward on the current batch, all its micro-batches, and returns the
# loss.  A step returns that of its first pass.  Where arguments do not fit or no gradient is left
# (ValueError), or loss or gradient is NaN or infinite (FloatingPointError), nothing has moved.

def lora_step(optimizer, closure):
    """One step of LoRA: descend along g, the gradient at w, Eq. (2).  One pass."""
    loss = one_pass("LoRA", closure, optimizer)                     # g = dL/dw at w, (2)
    optimizer.step()
    return loss

def lora_sam_step(optimizer, closure, rho, params=None):
    """One step of LoRA-SAM, whose objective is Eq. (3): descend along the gradient at w + eps,
    eps = rho g / F, Eq. (4).  Two passes, with the same batch and the same dropout masks.

    rho: Frobenius norm of eps over all of `params` together, by default those of the optimizer.
    With all weights of a model it is plain SAM, Eq. (A1-A3).  The weights come back bit for bit."""
    _require_radius(rho)
    params = list(dict.fromkeys(_parameters(optimizer) if params is None else params))
    if not params or not all(isinstance(p, torch.Tensor) for p in params):
        raise ValueError(f"params is {str(params)[:60]!r}; expected the parameters to perturb")
    with torch.random.fork_rng({p.device for p in params if p.is_cuda}):
        loss = one_pass("LoRA-SAM, pass 1", closure, optimizer, params)     # g = dL/dw at w
    moving = [p for p in params if p.grad is not None]
    with perturbed(moving, scaled([p.grad for p in moving], rho)):          # (4) eps = rho g / F
        one_pass("LoRA-SAM, pass 2", closure, optimizer, params)            # dL/dw at w + eps
    optimizer.step()
    return loss

def bilora_step(descent, ascent, closure, layers, rho, clip=clip_perturbation_):
    """One step of Bi-LoRA, whose objective is Eq. (8): from the gradients of one pass (B1, A1)
    descend and (B2, A2) ascend, Eq. (9, A5); then the perturbation is clipped, Eq. (10).

    descent, ascent: those of bilora_optimizers.  layers: the adapted layers, in training mode.
    rho: largest c.  clip: another function of (layers, rho), to record c or to try another rule."""
    _require_radius(rho)
    layers = _perturbed_layers(layers)
    _require_game(descent, ascent, layers)
    pairs = _primary(layers), _auxiliary(layers)
    loss = one_pass("Bi-LoRA", closure, descent, *pairs)            # G at W + s B2 A2, (A4)
    descent.step()                                                  # (9) B1 and A1
    ascent.step()                                                   # (9) B2 and A2
    clip(layers, rho)                                               # (10)
    return loss


# ------------------------------------------------- what steps are made of, also one of your own

def one_pass(method, closure, optimizer, *others):
    """Run the closure on fresh gradients, check what it leaves, and return the loss, detached.

    others: more lists of parameters.  Of each, and of the optimizer's, some parameter has to get a
    gradient (ValueError).  method: the name in the message of a NaN or infinite loss or gradient
    (FloatingPointError)."""
    _require(not isinstance(optimizer, torch.optim.LBFGS), f"{method}: LBFGS calls closure() by "
             "itself, several times a step; expected an optimizer that steps along a gradient")
    groups = [_parameters(optimizer), *others]
    params = list(dict.fromkeys(p for group in groups for p in group))
    for p in params:
        p.grad = None
    torch.clear_autocast_cache()  # a surrounding autocast region keeps copies of old weights
    loss = closure()
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(f"closure() returned {loss!r}; expected the loss, a tensor of one number")
    for group in groups:
        if group and all(p.grad is None for p in group):
            frozen = sum(not p.requires_grad for p in group)
            raise ValueError(f"{method}: closure() left none of {len(group)} parameters ({frozen} "
                             "of them frozen) a gradient; expected it to call backward(), an "
                             "optimizer made after add_lora, and no reentrant checkpointing")
    norm = global_norm(p.grad for p in params if p.grad is not None)
    if not torch.isfinite(loss.detach().to(norm.device) + norm):    # the one wait for the device
        raise FloatingPointError(f"{method}, {_step_number(optimizer)}: the loss is {loss.item()}, "
                                 f"the gradient's norm {norm.item()}; the optimizer has not moved")
    return loss.detach()

def _parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]

def global_norm(tensors):
    """Frobenius norm of all tensors together, 0-dim, in float32 at least."""
    return nn.utils.get_total_norm([_wide(t) for t in tensors])

@torch.no_grad()
def scaled(tensors, length):
    """A list of the tensors, all times one factor, so that their global norm is `length`; in
    float32 at least.  Zeros stay zeros."""
    norm = global_norm(tensors)
    factor = torch.where(norm > 0, length / norm, 0.0)
    return [_wide(t) * factor.to(t.device) for t in tensors]

@contextlib.contextmanager
def perturbed(params, eps):
    """w + eps inside, for each parameter w and its own eps; w bit for bit afterwards, also after an
    exception."""
    backup = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, e in zip(params, eps, strict=True):
                p.add_(e)  # rounded once, where e is wider than p
        del eps  # its memory is free while w + eps is used
        yield
    finally:
        with torch.no_grad():
            for p, w in zip(params, backup, strict=True):
                p.copy_(w)
        torch.clear_autocast_cache()

def _step_number(optimizer):
    counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    if not counts and "betas" not in optimizer.defaults:  # only Adam and its like count
        return "a step not counted"
    return f"step {max(counts, default=0) + 1}"

def _require_game(descent, ascent, layers):
    """ValueError unless the auxiliary pairs of `layers`, all of them and nothing else, ascend."""
    _require(layers, "no layer has an auxiliary pair; add_lora gives them one with aux_rank")
    _require(all(x.training for x in layers), "layers not in training mode: call model.train()")
    _require(ascent is not None, "ascent is None; expected the optimizer of the auxiliary pairs")
    up = "maximize" in ascent.defaults and all(group["maximize"] for group in ascent.param_groups)
    _require(up, "ascent: expected maximize=True in every group of an optimizer that knows the "
             f"option, not this {type(ascent).__name__}")
    _require(not any(group.get("maximize") for group in descent.param_groups),
             "descent: expected no group with maximize=True")
    pairs, up, down = set(_auxiliary(layers)), set(_parameters(ascent)), set(_parameters(descent))
    _require(up == pairs and not down & pairs,
             f"ascent holds {len(up & pairs)} of the layers' {len(pairs)} auxiliary parameters and "
             f"{len(up - pairs)} others, descent {len(down & pairs)}; expected all, 0 and 0")
    missing = sum(p.requires_grad and p not in down for p in _primary(layers))
    _require(not missing, f"descent lacks {missing} of the layers' primary parameters; expected an "
             "optimizer made after add_lora")

def bilora_optimizers(model, lr, aux_lr=None, ascent="sgd", weight_decay=0.0):
    """(descent, ascent): AdamW with rate eta1 = lr over all that is trainable but the auxiliary
    pairs, and over those plain SGD with maximize=True and rate eta2 = aux_lr, by default lr.
    ascent="adamw" makes the second one AdamW too.  Without auxiliary pairs it is None."""
    _require(ascent in ("sgd", "adamw"), f"ascent is {ascent!r}; expected 'sgd' or 'adamw'")
    pairs = dict.fromkeys(auxiliary_parameters(model))
    rest = [p for p in model.parameters() if p.requires_grad and p not in pairs]
    _require(rest, "the model has nothing to train; add_lora gives it adapters")
    descent = torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, fused=True)
    if not pairs:
        return descent, None
    eta2 = lr if aux_lr is None else aux_lr
    if ascent == "sgd":
        return descent, torch.optim.SGD(pairs, lr=eta2, maximize=True, foreach=True)
    return descent, torch.optim.AdamW(pairs, lr=eta2, weight_decay=0.0, maximize=True, fused=True)


# ------------------------------------------------------------------------------ after training

@torch.no_grad()
def merge_lora_(model):
    """Put frozen nn.Linear back, with W = W0 + s B1 A1 computed in float32 or wider and rounded
    once.  Returns the model.  W0 is not written to: other modules may share it."""
    merged = {layer: _merged(layer) for layer in lora_layers(model)}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in merged:
            model.set_submodule(name, merged[module])
    return model

def _merged(layer):
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.merged_weight().to(layer.weight.dtype),
                                 requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel,
            torch.optim.swa_utils.AveragedModel)
WRAPPED = re.compile(r"(^|\.)_(orig_mod|checkpoint_wrapped_module|fsdp_wrapped_module)\b")
CONFIG, FINGERPRINT = "adapter_config.json", "base_fingerprint.txt"
BIN, SAFETENSORS = "adapter_model.bin", "adapter_model.safetensors"
HARMLESS = {  # settings of PEFT's that leave W = W0 + s B1 A1 as it is
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
    "lora_ga_config"}

def save_adapter(model, folder, rename=None, write=None):
    """Write every trained tensor but the auxiliary pairs to `folder`, in PEFT's layout.
    write: function of (path, {name: tensor}) that writes adapter_model.safetensors; without it
    torch.save writes adapter_model.bin.  rename: dict or function from this model's module names
    to another tree's.  An older adapter stays until every new file is written.  ValueError for
    what PEFT would read otherwise.  Sharded parameters are gathered: call it on every rank."""
    slots, _, settings, fingerprint = _adapter(model, rename)
    name, other = (BIN, SAFETENSORS) if write is None else (SAFETENSORS, BIN)
    _require(not Path(folder, other).exists(), f"{folder}: {name} cannot stand beside {other}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {key: _whole(p).contiguous() for key, p in slots.items()}
    with tempfile.TemporaryDirectory(dir=folder) as new:
        if write is None:
            torch.save(tensors, Path(new, name))
        else:
            write(Path(new, name), tensors)
        Path(new, CONFIG).write_text(json.dumps(settings, indent=2))
        Path(new, FINGERPRINT).write_text(fingerprint)
        for file in (name, CONFIG, FINGERPRINT):
            Path(new, file).replace(Path(folder, file))

@torch.no_grad()
def load_adapter(model, folder, rename=None, read=None):
    """Copy a saved adapter's values into a model that add_lora has prepared in the same way.
    read: function from the path of adapter_model.safetensors to {name: tensor}.  rename: as above.
    Raises ValueError, and copies nothing, for another setting, another base under the adapted
    layers (PEFT's folders name none), a tensor that is missing, unexpected or misshapen, and two
    adapter files."""
    slots, layers, settings, fingerprint = _adapter(model, rename)
    base = Path(folder, FINGERPRINT)
    _require_settings(Path(folder, CONFIG), settings)
    path, tensors = _read_tensors(Path(folder, BIN), Path(folder, SAFETENSORS), read)
    _require_equal(path, _shapes(tensors), _shapes(slots))
    if base.exists():
        _require_equal(base, {"the base": base.read_text()}, {"the base": fingerprint})
    for key, p in slots.items():
        _require(not hasattr(p, "full_tensor"), f"{key} is sharded; load before fully_shard")
    for name, layer in layers.items():
        layer.load({last: tensors.pop(_key(name, last)) for last in layer.saved()[0]})
    for key, tensor in tensors.items():  # of the heads
        slots[key].copy_(tensor)

def _adapter(model, rename):
    """({name in the file: tensor}, {name: adapted layer}, what adapter_config.json says, the base's
    fingerprint)."""
    slots, layers, heads, others = {}, {}, [], []
    while isinstance(model, WRAPPERS) or "_orig_mod" in model._modules:
        model = model._modules.get("_orig_mod") or model.module
    twice = [name for name, module in model.named_modules(remove_duplicate=False)
             if isinstance(module, LoRALinear)]
    _require(len(twice) == len(lora_layers(model)), f"one layer has two names, among {twice}; PEFT "
             "would adapt one of them")
    for name, module in model.named_modules():
        name = WRAPPED.sub("", name).lstrip(".")
        if rename is not None:
            name = rename(name) if callable(rename) else rename.get(name, name)
        kept = {last: p for last, p in module.named_parameters(recurse=False) if p.requires_grad}
        if isinstance(module, LoRALinear):
            _require(not kept.keys() & {"weight", "bias"}, f"{name}: its W0 or bias is trained, "
                     "which an adapter cannot keep")
            kept, layers[name] = dict(sorted(module.saved()[0].items())), module
        elif name:
            (heads if kept else others).append(name)
        for last, p in kept.items():
            key = _key(name, last)
            _require(key not in slots, f"rename gives two modules one name, {name}")
            slots[key] = p
    _require(layers, "the model has no LoRA adapters; add_lora puts them in")
    _require(len(set(slots.values())) == len(slots), "a trained tensor is part of two modules (a "
             "tied head?); PEFT would load it as two")
    return slots, layers, _settings(layers, sorted(heads), others), _fingerprint(layers)

def _key(name, last):
    return ".".join(filter(None, ("base_model.model", name, last)))

def _settings(layers, heads, others):
    """adapter_config.json.  ValueError where PEFT would take another module, or another scale."""
    found = [layer.saved()[1] for layer in layers.values()]
    (first, *_), targets = found, sorted(layers)
    _require(all(own == first for own in found), f"layers with several (rank, alpha) or kinds: "
             f"{first} and {[own for own in found if own != first][:1]}; a file has one")
    root = math.sqrt(first["r"]) if first.get("use_rslora") else first["r"]
    scales = {layer.scale for layer in layers.values()}
    _require(all(math.isclose(scale, first["lora_alpha"] / root) for scale in scales),
             f"scales are {scales}; a file has alpha / rank alone")
    for name in [*layers, *others]:
        for head in heads:  # PEFT takes what ends in its name, and adapts no layer inside it
            taken = name.endswith(head) or name in layers and f".{head}." in f".{name}"
            _require(not taken, f"{name}: PEFT would take it for a part of the head {head}")
    if any(name.endswith(tuple("." + layer for layer in layers)) for name in others):
        targets = "|".join(map(re.escape, targets))  # PEFT matches a string as a whole
    return {"peft_type": "LORA", **first, "bias": "none", "target_modules": targets,
            "modules_to_save": heads or None, "lora_dropout": 0.0, "inference_mode": True}

def _whole(tensor):
    """On the CPU; a sharded one, a DTensor, gathered from all ranks."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()

def _fingerprint(layers):
    """Hash of names, W0 and biases, rounded to bfloat16: it is that of the base in any dtype."""
    digest = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        digest.update(name.encode())
        for tensor in filter(torch.is_tensor, (layer.weight, layer.bias)):
            bits = _whole(tensor.to(torch.bfloat16)).contiguous().view(torch.uint8)
            digest.update(bits.numpy())
    return digest.hexdigest()

def _require_settings(path, ours):
    """ValueError unless adapter_config.json is that of a plain LoRA with our r and alpha."""
    try:
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON object: {error}") from None
    initial = saved.pop("init_lora_weights", None)  # some move a part of W0 into the adapter
    _require(initial in (None, True, False, "gaussian", "orthogonal", "eva"),
             f"{path}: init_lora_weights is {initial}")
    saved = {key: value for key, value in saved.items() if value and key not in HARMLESS}
    _require_equal(path, saved, {k: v for k, v in ours.items() if k not in HARMLESS})

def _read_tensors(binary, safetensors, read):
    """(path, {name: tensor}) of the one adapter file that is there."""
    if safetensors.exists():
        _require(not binary.exists(), f"{safetensors} cannot stand beside {BIN}")
        _require(read is not None, f"{safetensors}: expected `read`, a function that reads it")
        return safetensors, read(safetensors)
    with open(binary, "rb") as file:
        try:
            return binary, dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # whatever a broken file makes the unpickler stumble over
            raise ValueError(f"{binary}: not a file of tensors ({type(error).__name__})") from None

def _shapes(tensors):
    return {key: tuple(t.shape) if torch.is_tensor(t) and t.is_floating_point() else str(t)[:40]
            for key, t in tensors.items()}

def _require_equal(path, saved, ours):
    for key in [*ours, *saved]:
        found, expected = saved.get(key, "missing"), ours.get(key, "missing")
        _require(found == expected, f"{path}: {key} is {found}, the model's is {expected}")

"""Methods that are not the paper's, for both scripts; and snapshots of what a run trains.

    python notes/methods.py train_glue.py --method bi-lora bi-lora-power --seeds 0 1 2
    python notes/methods.py train_gsm8k.py --method bi-lora-power --momentum 0.9
    python notes/methods.py train_glue.py --snapshots 21        # the paper's three, with snapshots

The first word is the script; what follows are its options, and those that OPTIONS adds here.

A method is one function and one line.  The function takes one training step and returns what the
log keeps of it; "loss" is one of these.

    def mine(run, closure):
        return {"loss": lora_step(run.descent, closure)}

    add({"mine": Method(mine)})             # Method(mine, auxiliary=True): the layers get B2 and A2

`run` has model, layers, descent, ascent, rho, args, log and steps.  closure() runs forward and
backward on the step's batch and returns the loss.  What a method keeps from step to step goes into
the dict run.state, as numbers and tensors: it is saved and restored with the run.

Under torchrun closure() sums loss and gradients over the processes, so a step that reads nothing
else is right as it is; what is drawn or kept has to be the same in all of them.  A method that
reads the rows of the batch is refused there by Method(mine, alone=True).
"""

import math
import os
import sys
from argparse import RawDescriptionHelpFormatter
from functools import partial

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_glue  # noqa: E402
import train_gsm8k  # noqa: E402
from bilora import (LoRALinear, _parameters, _perturbed_layers, _require_radius,  # noqa: E402
                    _targeted, _wide, auxiliary_parameters, bilora_step, clip_perturbation_,
                    global_norm, lora_sam_step, lora_step, one_pass, perturbation_norm, perturbed,
                    primary_parameters, scaled)
from quantized import NF4Linear  # noqa: E402
from train_glue import (METHODS, OPTIONS, SHARE, Method, Parser, number,  # noqa: E402
                        trained_tensors)
from variants import VariantLinear, lora_ga_, pissa_  # noqa: E402

TINY = torch.finfo(torch.float32).tiny
SCRIPTS = {"train_glue.py": train_glue, "train_gsm8k.py": train_gsm8k}
OPTIONS += [
    ("method", "init", {"choices": ("default", "pissa", "lora-ga")}, "default",
     "start of the primary pairs (notes/variants.py)"),
    ("method", "dora", bool, False, "train the norms of W's rows beside the pairs"),
    ("method", "rslora", bool, False, "the scale is alpha / sqrt(rank)"),
    ("method", "nf4", bool, False, "keep the adapted W0 in 4 bits (notes/quantized.py)"),
    ("method", "full-lr", float, None, "of full fine-tuning (default: lr / 5, and lr / 10 for a "
     "decoder alone, as in the paper)"),
    ("method", "momentum", SHARE, 0.5, "of bi-lora-power: share of the old perturbation"),
    ("run", "snapshots", {"type": partial(number, int, 0)}, 0, "moments, evenly from before the "
     "first step to after the last, at which all that is trained is saved in the run folder")]


# ----------------------------------------------------------------------------------- the power rule

def bilora_power_step(descent, closure, layers, rho, momentum=0.5):
    """One step of Bi-LoRA's objective, Eq. (8), with another ascent: a step of block power
    iteration stands in place of the paper's ascent and clip.  It is NOT the paper's rule.

    At a fixed G, and one s for all layers, B2 A2 converges to rho G_r / ||G_r||, G_r the best
    approximation of G of rank r2: the maximizer of <G, eps> in the ball, Eq. (A18) put right, and
    with r2 = rank(G) that of SAM.  The paper's ascent ends at rank 1 instead.

    descent: optimizer without the auxiliary pairs.  layers: the adapted layers, in training mode.
    rho: c after the step.  momentum: share, from 0 to under 1, of the old perturbation in the new.
    Returns the loss, 0-dim.  Raises ValueError for rho < 0, another momentum, a layer in eval mode,
    no auxiliary pairs and a descent that holds them, FloatingPointError for a NaN or infinite loss
    or gradient, and has moved nothing then.
    """
    _require_radius(rho)
    layers = _perturbed_layers(layers)
    _require_perturbable(layers, momentum)
    auxiliary = [p for layer in layers for p in (layer.aux_B, layer.aux_A)]
    if not set(auxiliary).isdisjoint(_parameters(descent)):
        raise ValueError("descent holds auxiliary parameters; the power rule turns them itself")
    loss = one_pass("Bi-LoRA, power rule", closure, descent, auxiliary)  # at W + s B2 A2
    turn_perturbation_(layers, rho, momentum)                  # not the paper's ascent and clip
    descent.step()                                             # (9) B1 and A1
    return loss

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
    norms = [global_norm(tensors) for tensors in (old, new)]
    smallest, moved = torch.finfo(norms[0].dtype).tiny, norms[1] > 0
    a, b = (1 / norm.clamp(min=smallest) for norm in norms)
    a, b = torch.where(moved, momentum * a, a), torch.where(moved, (1 - momentum) * b, 0.0)
    return [a.to(x.device) * x + b.to(x.device) * y for x, y in zip(old, new)]

def _gradient(p):
    return torch.zeros_like(p) if p.grad is None else p.grad

def _require_perturbable(layers, momentum):
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; expected 0 or more, and less than 1")
    if not layers:
        raise ValueError("no layer has an auxiliary pair; add_lora gives them one with aux_rank")
    if not all(layer.training for layer in layers):
        raise ValueError("layers not in training mode: call model.train()")


# ------------------------------------------------------------------------------ what they share

def step_seed(run):
    """Of the generators: a resumed run draws the same, and no dropout mask changes."""
    return run.seed * 1_000_003 + len(run.log)

def noise(run, tensors, stds):
    """N(0, std^2) of each tensor's shape, drawn by the seed and the step alone."""
    drawn, seed = [], step_seed(run)
    require_whole(tensors)
    generators = {t.device: torch.Generator(t.device).manual_seed(seed) for t in tensors}
    for t, std in zip(tensors, stds):
        z = torch.randn(t.shape, generator=generators[t.device], device=t.device)
        drawn.append((std * z).to(t.dtype))
    return drawn

def require_whole(tensors):
    if any(hasattr(t, "full_tensor") for t in tensors):
        raise ValueError("this method perturbs W, which --fsdp deals out; expected no --fsdp")
    if not all(isinstance(t, torch.nn.Parameter) for t in tensors):  # made anew at each call
        raise ValueError("this method perturbs W, which --nf4 keeps in 4 bits; expected no --nf4")

def gradients(params):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]

def still(run):
    """No ascent: a step without gradients moves nothing, and its schedule expects the call."""
    run.ascent.zero_grad()
    run.ascent.step()

def labels_of(data, batch):
    """The classes, or the tokens of the answers, that a batch is scored on, in their order."""
    if not hasattr(data, "task"):
        return [token for _, answer, _ in batch for token in answer]          # GSM8K
    if data.answers:
        return [token for *_, label in batch for token in data.answers[label]]
    return [label for *_, label in batch]

def with_logits(change, closure):
    """A closure whose loss is that of change(H, Z, y) in place of the logits Z (T, V) of the head:
    H (T, D) are the features it reads, y (T,) the classes or tokens it is scored on."""
    _, model, data, batch = closure.args
    labels = torch.tensor(labels_of(data, batch))

    def changed():
        place = 0

        def replace(H, Z):
            nonlocal place
            y = labels[place:place + len(Z)].to(Z.device)
            place += len(Z)
            return change(_wide(H), _wide(Z), y)

        if model.classifier is None:  # a method of the model, not a module
            whole, model.logits = model.logits, lambda h: replace(h, whole(h))
        else:
            head = getattr(model.classifier, "out_proj", model.classifier)
            hook = head.register_forward_hook(lambda _, inputs, Z: replace(inputs[0], Z))
        try:
            return closure()
        finally:
            if model.classifier is None:
                del model.logits
            else:
                hook.remove()
    return changed


# ------------------------------------------------------------- random and stale perturbations

def flat_lora(run, closure):
    """Flat-LoRA: the gradient at W + noise.  Row i of the noise has the standard deviation
    f rho ||W_i|| / sqrt(n), W the merged weight, f = (1 - cos(pi t / T)) / 2 at step t of T."""
    f = (1 - math.cos(math.pi * len(run.log) / run.steps)) / 2
    weights, stds = [layer.weight for layer in run.layers], []
    require_whole(weights)
    with torch.no_grad():
        for layer in run.layers:
            W = layer.merged_weight()
            stds.append(f * run.rho * W.norm(dim=1, keepdim=True) / math.sqrt(W.shape[1]))
    eps = noise(run, weights, stds)
    with perturbed(weights, eps):
        loss = one_pass("Flat-LoRA", closure, run.descent)
    run.descent.step()
    return {"loss": loss, "perturbation": global_norm(eps)}

def rwp_full(run, closure):
    """RWP: the gradient at W + N(0, rho^2), the noise over every entry of the adapted W."""
    return random_perturbation(run, closure, [layer.weight for layer in run.layers])

def rwp_lora(run, closure):
    """The same over the entries of B1 and A1."""
    return random_perturbation(run, closure, primary_parameters(run.model))

def random_perturbation(run, closure, tensors):
    eps = noise(run, tensors, [run.rho] * len(tensors))
    with perturbed(tensors, eps):
        loss = one_pass("RWP", closure, run.descent)
    run.descent.step()
    return {"loss": loss, "perturbation": global_norm(eps)}

def rop(run, closure):
    """Random output perturbation: rho N(0, 1) is added to the logits, in training alone."""
    generator = torch.Generator().manual_seed(step_seed(run))

    def noisy(H, Z, y):
        return Z + run.rho * torch.randn(Z.shape, generator=generator).to(Z)
    return {"loss": lora_step(run.descent, with_logits(noisy, closure))}

def s2sam(run, closure):
    """S2SAM: the gradient at w + rho g / ||g|| with the g of the step before.  One pass."""
    params = primary_parameters(run.model)
    old = run.state.get("previous", [torch.zeros_like(p) for p in params])
    eps = scaled([g.to(p) for g, p in zip(old, params)], run.rho)
    with perturbed(params, eps):
        loss = one_pass("S2SAM", closure, run.descent)
    run.state["previous"] = gradients(params)
    run.descent.step()
    return {"loss": loss, "perturbation": global_norm(eps)}


# ------------------------------------------------------------------------- relatives of SAM

def looksam(run, closure, every=5, alpha=0.7):
    """LookSAM: each fifth step is LoRA-SAM's, with gradient g at w and gs at w + eps, and keeps
    gv = gs - (<gs, g> / ||g||^2) g.  The others step along g + alpha (||g|| / ||gv||) gv."""
    params = primary_parameters(run.model)
    if len(run.log) % every == 0:
        both = []
        loss = lora_sam_step(run.descent, recorded(closure, params, both), run.rho, params)
        g, gs = both
        share = inner(gs, g) / inner(g, g).clamp(min=TINY)
        run.state["gv"] = [b - share * a for a, b in zip(g, gs)]
        return {"loss": loss, "perturbation": run.rho}
    loss, gv = one_pass("LookSAM", closure, run.descent), run.state["gv"]
    factor = alpha * global_norm(gradients(params)) / global_norm(gv).clamp(min=TINY)
    for p, v in zip(params, gv):
        if p.grad is not None:
            p.grad.add_(v.to(p) * factor)
    run.descent.step()
    return {"loss": loss}

def inner(a, b):
    return sum((_wide(x) * _wide(y)).sum() for x, y in zip(a, b))

def recorded(closure, params, passes):
    def recording():
        loss = closure()
        passes.append(gradients(params))
        return loss
    return recording

def wsam(run, closure, gamma=0.8):
    """WSAM: descend along (1 - 2 gamma) / (1 - gamma) g + gamma / (1 - gamma) gs, g at w and gs at
    w + eps.  gamma = 1 / 2 is LoRA-SAM, 0 is LoRA."""
    params, both = primary_parameters(run.model), []
    record = recorded(closure, params, both)

    def weighted():
        loss = record()
        if len(both) == 2:
            for p, g in zip(params, both[0]):
                if p.grad is not None:
                    p.grad.mul_(gamma / (1 - gamma)).add_(g, alpha=(1 - 2 * gamma) / (1 - gamma))
        return loss
    loss = lora_sam_step(run.descent, weighted, run.rho, params)
    return {"loss": loss, "perturbation": run.rho}

def esam(run, closure, share=0.5):
    """ESAM: half of the tensors, drawn once a step, are perturbed, and the second pass sees the
    half of the rows whose loss rises most.  Two forward passes without gradients find these."""
    args, model, data, batch = closure.args
    generator = torch.Generator().manual_seed(step_seed(run))
    params = primary_parameters(run.model)
    order = torch.randperm(len(params), generator=generator).tolist()
    chosen = [params[i] for i in order[:max(1, round(share * len(params)))]]
    row_losses = sys.modules[closure.func.__module__].row_losses
    rises, calls = [], []

    def selective():
        calls.append(1)
        if len(calls) == 1:
            rises.extend(-x for x in losses_of(row_losses, *closure.args))
            return closure()
        rises[:] = [a + b for a, b in zip(rises, losses_of(row_losses, *closure.args))]
        steepest = sorted(range(len(batch)), key=lambda i: -rises[i])
        kept = sorted(steepest[:max(1, round(share * len(batch)))])
        return closure.func(args, model, data, [batch[i] for i in kept])
    loss = lora_sam_step(run.descent, selective, run.rho, chosen)
    return {"loss": loss, "perturbation": run.rho}

@torch.no_grad()
def losses_of(row_losses, args, model, data, batch):
    """Loss of each row, a list; the dropout masks are those of the pass that follows."""
    own, size, losses = [], args.micro_batch or len(batch), torch.zeros(len(batch)).double()
    share = slice(train_glue.RANK, None, train_glue.WORLD)  # of this process
    with torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda}):
        for start in range(0, len(batch[::train_glue.WORLD]), size):
            part = batch[share][start:start + size]
            with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
                own += row_losses(model, data, part or batch[:1]).tolist()[:len(part)]
    losses[share] = torch.tensor(own).double()
    losses = losses.to(args.device)
    train_glue.sum_over_processes([losses])
    return losses.tolist()

def bar(run, closure, larger_gradient, alpha=0.25):
    """oBAR and nBAR: before the step one factor of each pair is multiplied by 1 + alpha eta1, the
    other one by 1 - alpha eta1.  Up goes A1 where ||A1|| < ||B1|| (oBAR: the smaller factor), or
    where ||dL/dA1|| >= ||dL/dB1|| (nBAR: the larger gradient)."""
    loss = one_pass("BAR", closure, run.descent)
    change = alpha * run.descent.param_groups[0]["lr"]
    with torch.no_grad():
        for layer in run.layers:
            B, A = layer.lora_B, layer.lora_A
            up = A.norm() < B.norm()
            if larger_gradient:
                up = gradients([A])[0].norm() >= gradients([B])[0].norm()
            sign = torch.where(up, 1.0, -1.0)
            A.mul_(1 + change * sign)
            B.mul_(1 - change * sign)
    run.descent.step()
    return {"loss": loss}


# --------------------------------------------------------------- SAM on the head in closed form

def head_sam(run, closure, relative=False):
    """SAM over the head's parameters alone, in one pass (head_logits).  relative: a classifier's
    radius is rho times the norm of the head's weight."""
    rho = run.rho
    if relative:
        head = getattr(run.model.classifier, "out_proj", run.model.classifier)
        if head is None:
            raise ValueError("head-sam-relative needs a model with a classifier; head-sam does not")
        rho = rho * head.weight.detach().norm()
    change = partial(head_logits, rho=rho, bias=has_bias(run.model))
    return {"loss": lora_step(run.descent, with_logits(change, closure)), "perturbation": rho}

def bi_lora_head(run, closure):
    """Bi-LoRA, and head_sam's logits in the same pass."""
    change = partial(head_logits, rho=run.rho, bias=has_bias(run.model))
    return METHODS["bi-lora"].step(run, with_logits(change, closure))

def has_bias(model):
    head = getattr(model.classifier, "out_proj", model.classifier)
    return getattr(head, "bias", None) is not None

def head_logits(H, Z, y, rho, bias):
    """The logits (T, V) at the head moved by rho G / ||G||, without forming G.

    With P = softmax(Z), E = P - Y, the gradient of the mean loss in the head's weight is
    G = E^T H / T, in its bias E^T 1 / T.  The moved head adds (rho / ||G||) H G^T =
    (rho / (T ||G||)) K E to Z, K = H H^T (T, T); a bias adds 1 to every entry of K.
    ||G||^2 = <K, E E^T> / T^2.  The coefficients are held constant, as SAM holds eps; the gradient
    flows through Z and through the row of K that belongs to the features that are scored.
    """
    with torch.no_grad():
        E = Z.softmax(-1)
        E[torch.arange(len(y), device=y.device), y] -= 1
        fixed = H.detach()
        K = fixed @ fixed.T + float(bias)
        size = (K * (E @ E.T)).sum().clamp(min=0).sqrt()                       # T ||G||
        E *= torch.where(size > 0, rho / size, 0.0)
    return Z + (H @ fixed.T + float(bias)) @ E


# ------------------------------------------------------------------------- without adapters

def whole(args, model, auxiliary):
    """All weights of the model, in float32, and AdamW over them; the layers are those that LoRA
    would adapt."""
    require_adapters(args, ["full"])
    model.float().requires_grad_(True)
    linears = {name: module for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear)}
    lr = args.full_lr
    if lr is None:
        lr = args.lr / (10 if model.encoder is None else 5)
    descent = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    return [linears[name] for name in _targeted(list(linears), None)], descent, None

def require_adapters(args, names):
    """ValueError where an option speaks of adapters that a method does not have, or of two kinds of
    layers."""
    variant = args.init != "default" or args.dora or args.rslora
    if any(METHODS[name].setup is whole for name in names):
        if variant or args.nf4:
            raise ValueError("full fine-tuning has no adapters; expected no --init, --dora, "
                             "--rslora, --nf4")
    if args.nf4 and (variant or args.fsdp):
        raise ValueError("--nf4 has layers of its own, each whole in every process; expected no "
                         "--init, --dora, --rslora, --fsdp")

def full_sam(run, closure):
    """Plain SAM, over all weights."""
    loss = lora_sam_step(run.descent, closure, run.rho)
    return {"loss": loss, "perturbation": run.rho}


# ------------------------------------------------------------------------------- ablations

def bi_lora_power(run, closure):
    """A step of block power iteration stands in the place of the paper's ascent and clip."""
    loss = bilora_power_step(run.descent, closure, run.layers, run.rho, run.args.momentum)
    still(run)
    return {"loss": loss, "perturbation": run.rho}

def two_pairs(run, closure):
    """Both pairs descend; the second one by plain gradient steps, under the global clip."""
    def negated():
        loss = closure()
        for p in auxiliary_parameters(run.model):
            if p.grad is not None:
                p.grad.neg_()
        return loss
    return METHODS["bi-lora"].step(run, negated)

def no_clip(run, closure):
    """Bi-LoRA without its clip."""
    return clipped_by(run, closure, lambda layers, rho: perturbation_norm(layers))

def layer_clip(run, closure):
    """Bi-LoRA with a clip of each layer alone, each to rho."""
    def clip(layers, rho):
        return torch.stack([clip_perturbation_([layer], rho) for layer in layers]).max()
    return clipped_by(run, closure, clip)

def clipped_by(run, closure, clip):
    norms = []

    def noted(layers, rho):
        norms.append(clip(layers, rho))
    loss = bilora_step(run.descent, run.ascent, closure, run.layers, run.rho, noted)
    return {"loss": loss, "perturbation": norms[0]}

def noise_fresh(run, closure):
    """B2 A2 drawn anew each step, with c = rho, in place of the ascent."""
    draw_pairs_(run, run.rho)
    return at_the_pair(run, closure)

def noise_kept(run, closure):
    """B2 A2 drawn once, with c = rho, and kept."""
    if not run.log:
        draw_pairs_(run, run.rho)
    return at_the_pair(run, closure)

@torch.no_grad()
def draw_pairs_(run, rho):
    pairs = auxiliary_parameters(run.model)
    for p, z in zip(pairs, noise(run, pairs, [1.0] * len(pairs))):
        p.copy_(z)
    factor = (rho / perturbation_norm(run.layers)).sqrt()
    for p in pairs:
        p.mul_(factor)

def at_the_pair(run, closure):
    loss = one_pass("noise", closure, run.descent)
    run.descent.step()
    still(run)
    return {"loss": loss, "perturbation": perturbation_norm(run.layers)}


# --------------------------------------------------------------------------------- the table

def add(table):
    """Put methods into the scripts' table.  They get the layers that --init, --dora, --rslora and
    --nf4 ask for, and their steps take the snapshots that --snapshots asks for."""
    for name, method in table.items():
        setup = variants if method.setup is train_glue.adapters else method.setup
        step = partial(step_with_snapshots, method.step)
        METHODS[name] = method._replace(step=step, setup=setup)

def variants(args, model, auxiliary):
    """train_glue.adapters, with layers of notes/variants.py or notes/quantized.py where an option
    asks for them."""
    start = args.init != "default"
    layer = NF4Linear if args.nf4 else LoRALinear
    if start or args.dora or args.rslora:
        layer = partial(VariantLinear, start=start, dora=args.dora, rslora=args.rslora)
    layers, *optimizers = train_glue.adapters(args, model, auxiliary, layer)
    if args.init == "pissa":
        pissa_(layers)
    return layers, *optimizers

def step_with_snapshots(step, run, closure):
    if run.args.init == "lora-ga" and not run.log and not run.layers[0].start_A.any():
        lora_ga_(run.layers, closure)
    count, done = run.args.snapshots, len(run.log)
    moments = {round(i * run.steps / max(1, count - 1)) for i in range(count)}
    if done in moments:
        save_snapshot(run, done)
    logged = step(run, closure)
    if done + 1 == run.steps and run.steps in moments:
        save_snapshot(run, run.steps)
    return logged

def save_snapshot(run, step):
    if train_glue.RANK > 0:
        return
    folder = os.path.join(run.folder, "snapshots")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"step-{step:06d}.pt")
    try:
        torch.save(trained_tensors(run.model), path + ".tmp")
    except RuntimeError as error:  # torch's own of a full disk
        raise OSError(f"{path}.tmp: {str(error).splitlines()[0]}") from None
    os.replace(path + ".tmp", path)

# At import: the processes of --jobs import this file too.  The radii are ours, but for RWP's.
add({**METHODS,
     "bi-lora-power": Method(bi_lora_power, auxiliary=True),
     "flat-lora": Method(flat_lora, rho=0.05), "rwp-full": Method(rwp_full, rho=0.001 ** 0.5),
     "rwp-lora": Method(rwp_lora, rho=0.001 ** 0.5), "rop": Method(rop, rho=0.1, alone=True),
     "obar": Method(partial(bar, larger_gradient=False)),
     "nbar": Method(partial(bar, larger_gradient=True)),
     "looksam": Method(looksam), "esam": Method(esam), "s2sam": Method(s2sam),
     "wsam": Method(wsam), "head-sam": Method(head_sam, rho=0.1, alone=True),
     "head-sam-relative": Method(partial(head_sam, relative=True), rho=0.4, alone=True),
     "bi-lora-head-sam": Method(bi_lora_head, auxiliary=True, rho=0.1, alone=True),
     "two-pairs": Method(two_pairs, auxiliary=True), "no-clip": Method(no_clip, auxiliary=True),
     "layer-clip": Method(layer_clip, auxiliary=True),
     "noise-fresh": Method(noise_fresh, auxiliary=True),
     "noise-kept": Method(noise_kept, auxiliary=True),
     "full": Method(train_glue.lora, setup=whole),
     "full-sam": Method(full_sam, rho=0.05, setup=whole)})


# ------------------------------------------------------------- what the other files here ask of it

def parse(script, argv):
    """(arguments, fail) of a script, as its main reads them."""
    if script is train_glue:
        words = script.SETTINGS, script.GLUE_OPTIONS
    else:
        words = script.TASKS, script.OPTIONS
    args, fail = script.parse_arguments(argv, script.__doc__, *words)
    try:
        require_adapters(args, args.method)
    except ValueError as error:
        fail(str(error))
    return args, fail

def builder(script, args, data):
    """The function that reads the pretrained model: what `prepare` calls `build`."""
    if script is train_glue:
        return partial(script.build_model, data)
    return partial(script.build_model, args, data)

def expanded(argv):
    """The word "all" stands for every method."""
    return [part for word in argv for part in (METHODS if word == "all" else [word])]

def main(argv=None):
    argv = expanded(sys.argv[1:] if argv is None else argv)
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=SCRIPTS, help="whose options follow")
    script = SCRIPTS[parser.parse_args(argv[:1]).script]
    parse(script, argv[1:])  # what cannot go together is refused before anything is trained
    return script.main(argv[1:])

if __name__ == "__main__":
    main()

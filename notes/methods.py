"""Methods that are not the paper's, for both scripts; and snapshots of what a run trains.

    python notes/methods.py train_glue.py --method bi-lora bi-lora-power --seeds 0 1 2
    python notes/methods.py train_gsm8k.py --method bi-lora-power --momentum 0.9
    python notes/methods.py train_glue.py --snapshots 21        # the paper's three, with snapshots

The first word is the script; what follows are its options and those that stand below.

A method is one function and one line.  The function takes one training step and returns what the
log keeps of it; "loss" is one of these.

    def mine(run, closure):
        return {"loss": lora_step(run.descent, closure)}

    add({"mine": Method(mine)})             # Method(mine, auxiliary=True): the layers get B2 and A2

`run` has model, layers, descent, ascent, rho, args, log and steps.  closure() runs forward and
backward on the step's batch and returns the loss.  What a method keeps from step to step goes into
the dict run.state, as numbers and tensors: it is saved and restored with the run.
"""

import os
import sys
from argparse import RawDescriptionHelpFormatter
from functools import partial

import torch
from torch.nn.utils import get_total_norm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_glue  # noqa: E402
import train_gsm8k  # noqa: E402
from bilora import (_one_pass, _parameters, _perturbed_layers, _require_radius,  # noqa: E402
                    bilora_step, lora_sam_step, lora_step, perturbation_norm)  # noqa: F401
from train_glue import (METHODS, OPTIONS, SHARE, Method, Parser, number,  # noqa: E402
                        trained_tensors)

SCRIPTS = {"train_glue.py": train_glue, "train_gsm8k.py": train_gsm8k}
OPTIONS += [
    ("method", "momentum", SHARE, 0.5, "of bi-lora-power: share of the old perturbation"),
    ("run", "snapshots", {"type": partial(number, int, 0)}, 0, "moments, evenly from before the "
     "first step to after the last, at which all that is trained is saved in the run folder")]


# ----------------------------------------------------------------------------------- the power rule


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
    loss = _one_pass("Bi-LoRA, power rule", closure, descent, auxiliary)  # at W + s B2 A2
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
    norms = [get_total_norm(tensors) for tensors in (old, new)]
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
        raise ValueError("bilora_power_step expects the layers in training mode: call model.train()")


# --------------------------------------------------------------------------------------- methods


def bi_lora_power(run, closure):
    """A step of block power iteration stands in the place of the paper's ascent and clip."""
    loss = bilora_power_step(run.descent, closure, run.layers, run.rho, run.args.momentum)
    run.ascent.zero_grad()
    run.ascent.step()  # without gradients it moves nothing; its schedule expects the call
    return {"loss": loss, "perturbation": run.rho}


def add(table):
    """Put methods into the scripts' table.  Their steps take the snapshots that --snapshots asks
    for."""
    for name, method in table.items():
        METHODS[name] = method._replace(step=partial(step_with_snapshots, method.step))


def step_with_snapshots(step, run, closure):
    count, done = run.args.snapshots, len(run.log)
    moments = {round(i * run.steps / max(1, count - 1)) for i in range(count)}
    if done in moments:
        save_snapshot(run, done)
    logged = step(run, closure)
    if done + 1 == run.steps and run.steps in moments:
        save_snapshot(run, run.steps)
    return logged


def save_snapshot(run, step):
    folder = os.path.join(run.folder, "snapshots")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"step-{step:06d}.pt")
    try:
        torch.save(trained_tensors(run.model), path + ".tmp")
    except RuntimeError as error:  # torch's own of a full disk
        raise OSError(f"{path}.tmp: {str(error).splitlines()[0]}") from None
    os.replace(path + ".tmp", path)


# At import: the processes of --jobs import this file too.
add({**METHODS, "bi-lora-power": Method(bi_lora_power, auxiliary=True)})


# ------------------------------------------------------------- what the other files here ask of it


def parse(script, argv):
    """(arguments, fail) of a script, as its main reads them."""
    if script is train_glue:
        return script.parse_arguments(argv, script.__doc__, script.SETTINGS, script.GLUE_OPTIONS)
    return script.parse_arguments(argv, script.__doc__, script.TASKS, script.OPTIONS)


def builder(script, args, data):
    """The function that reads the pretrained model: what `prepare` calls `build`."""
    if script is train_glue:
        return partial(script.build_model, data)
    return partial(script.build_model, args, data)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=SCRIPTS, help="whose options follow")
    return SCRIPTS[parser.parse_args(argv[:1]).script].main(argv[1:])


if __name__ == "__main__":
    main()

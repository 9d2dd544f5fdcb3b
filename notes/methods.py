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

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_glue  # noqa: E402
import train_gsm8k  # noqa: E402
from bilora import bilora_power_step, turn_perturbation_  # noqa: E402, F401
from train_glue import INF, METHODS, OPTIONS, Method, Parser, trained_tensors  # noqa: E402

SCRIPTS = {"train_glue.py": train_glue, "train_gsm8k.py": train_gsm8k}
OPTIONS += [
    ("method", "momentum", float, 0, 1, 0.5, "of bi-lora-power: share of the old perturbation"),
    ("run", "snapshots", int, 0, INF, 0, "moments, evenly from before the first step to after the "
     "last, at which all that is trained is saved in the run folder's snapshots")]


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
        settings = {name: task.settings for name, task in script.TASKS.items()}
        return script.parse_arguments(argv, script.__doc__, settings, script.GLUE_OPTIONS)
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

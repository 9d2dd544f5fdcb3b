"""H5 of notes/9_study.md: the largest eigenvalue of the Hessian at equal training loss, in the
space of all adapted W.  `python notes/study.py flat CELL` calls it.

A method that fits less is flatter because of that.  So each run of a seed is taken at the first
epoch whose loss is below the largest last loss of all of them; the run that has the largest loss is
taken at its last epoch.  The loss is that at W0 + s B1 A1, over all rows that the run was trained
on, with the labels that it saw.  The Hessian is that of ROWS of them.  All is computed in float32.
"""

import sharpness
from measures import loss_of, top_eigenvalue

ROWS, ITERATIONS = 250, 15


def measure(folders, device):
    """{row: {"losses": one an epoch, "epoch", "loss", "eigenvalue", "residual"}} of the runs of one
    seed: {row: run folder with a snapshot an epoch}."""
    words = [*folders.values(), "--device", device, "--rows", str(ROWS)]
    loaded = sharpness.load_runs(sharpness.parse_arguments(words)[1])
    runs = dict(zip(folders, loaded, strict=True))
    losses = {row: losses_of(run) for row, run in runs.items()}
    level, found = max(values[-1] for values in losses.values()), {}
    for row, run in runs.items():
        epoch = epoch_below(losses[row], level)
        value, residual = eigenvalue_at(run, epoch)
        found[row] = {"losses": losses[row], "epoch": epoch, "loss": losses[row][epoch - 1],
                      "eigenvalue": value, "residual": residual}
    return found


def epoch_below(losses, level):
    """The first epoch, counted from 1, whose loss is below the level; where none is, the last."""
    return next((i for i, loss in enumerate(losses, 1) if loss < level), len(losses))


def losses_of(run):
    """[loss after each epoch]."""
    found, shares = [], run.losses(run.rows)
    for _, path in run.snapshots()[1:]:  # the first one is the start
        run.put(path)
        found.append(loss_of(shares))
    run.drop()
    return found


def eigenvalue_at(run, epoch):
    """(largest eigenvalue, its residual) after an epoch."""
    run.put(run.snapshots()[epoch][1])
    weights, _ = run.space("full")
    found = top_eigenvalue(run.losses(run.sample), weights, ITERATIONS, run.generator())
    run.drop()
    return found

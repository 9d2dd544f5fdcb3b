"""What notes/9_study.md says, as tables: rows, cells, contrasts; and the steps of the controls that
only this study has.  notes/study.py runs it, notes/study_tables.py evaluates it.
"""

import itertools
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import methods
import train_glue
import train_gsm8k
from bilora import lora_sam_step, one_pass, perturbed, primary_parameters, scaled
from train_glue import SETTINGS, TASKS, Method, logits_of

TUNING_SEEDS = (100, 101, 102)


# ---------------------------------------------------------------------------------- controls
# Methods of this study alone.  --rho carries the one number that each of them has.

def label_smoothing(run, closure):
    """(1 - rho) of a label's weight is its own class's, rho is shared out over all classes."""
    args, model, data, batch = closure.args

    def smoothed():
        labels = torch.tensor([label for *_, label in batch], device=args.device)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            logits = logits_of(model, data, batch)
            loss = F.cross_entropy(logits, labels, label_smoothing=run.rho)
        loss.backward()
        return loss
    loss = one_pass("label smoothing", smoothed, run.descent)
    run.descent.step()
    return {"loss": loss}

def head_decay(run, closure):
    """AdamW's decoupled weight decay rho, on the head alone."""
    loss = one_pass("head decay", closure, run.descent)
    with torch.no_grad():
        for p in run.model.classifier.parameters():
            p.mul_(1 - run.descent.param_groups[0]["lr"] * run.rho)
    run.descent.step()
    return {"loss": loss}

def rwp_norm(run, closure):
    """RWP on B1 and A1 with noise of norm rho."""
    params = primary_parameters(run.model)
    z = methods.noise(run, params, [1.0] * len(params))
    with perturbed(params, scaled(z, run.rho)):
        loss = one_pass("RWP", closure, run.descent)
    run.descent.step()
    return {"loss": loss, "perturbation": run.rho}

def sam_other(run, closure):
    """LoRA-SAM whose eps comes from the batch of the step before, at the weights of this step."""
    batch = closure.args[-1]
    other, run.state["batch"] = run.state.get("batch", batch), batch
    return sam_from(run, closure, other)

def sam_half(run, closure):
    """LoRA-SAM whose eps comes from every other row of the batch."""
    return sam_from(run, closure, closure.args[-1][::2])

def sam_from(run, closure, other):
    """LoRA-SAM with eps from the rows `other`; the logged loss is theirs."""
    passes = iter([partial(closure.func, *closure.args[:-1], other), closure])
    loss = lora_sam_step(run.descent, lambda: next(passes)(), run.rho,
                         primary_parameters(run.model))
    return {"loss": loss, "perturbation": run.rho}

CONTROLS = {"label-smoothing": Method(label_smoothing, alone=True),
            "head-decay": Method(head_decay), "rwp-norm": Method(rwp_norm),
            "sam-other": Method(sam_other, alone=True), "sam-half": Method(sam_half, alone=True)}


# ---------------------------------------------------------------------------- rows and cells

class Row(NamedTuple):
    method: str
    grid: dict       # {option: values}, rho first and rising; one combination is no choice; rate is
                     # that of eta1 to the cell's own, ratio of eta2 to it, others are options
    like: str = None  # the row whose radius it takes instead

RADII, RATIOS, SLOWER = (0.01, 0.05, 0.2), (1, 10, 100, 1000), (0.1, 0.3, 1)
ROWS = {
    "lora": Row("lora", {}),
    "lora-sam-paper": Row("lora-sam", {"rho": (0.01,)}),
    "lora-sam": Row("lora-sam", {"rho": RADII}),
    "bi-lora-paper": Row("bi-lora", {"rho": (0.05,), "ratio": (1,)}),
    "bi-lora": Row("bi-lora", {"rho": RADII, "ratio": RATIOS}),
    "head-sam": Row("head-sam", {"rho": (0.03, 0.1, 0.3)}),
    "label-smoothing": Row("label-smoothing", {"rho": (0.1, 0.2, 0.4)}),
    "head-decay": Row("head-decay", {"rho": (1, 10, 100)}),
    "bi-lora-adamw": Row("bi-lora", {"rho": RADII, "ratio": (1,), "ascent": ("adamw",)}),
    "noise-fresh": Row("noise-fresh", {}, "bi-lora"),
    "noise-kept": Row("noise-kept", {}, "bi-lora"),
    "rwp-lora": Row("rwp-lora", {"rho": RADII}),
    "s2sam": Row("s2sam", {"rho": RADII}),
    "bi-lora-power": Row("bi-lora-power", {"rho": RADII}),
    "rwp-norm": Row("rwp-norm", {}, "lora-sam"),
    "s2sam-same": Row("s2sam", {}, "lora-sam"),
    "sam-other": Row("sam-other", {}, "lora-sam"),
    "sam-half": Row("sam-half", {}, "lora-sam"),
    "head-sam-untuned": Row("head-sam", {"rho": (0.1,)}),
    "lora-rate": Row("lora", {"rate": SLOWER}),
    "lora-sam-rate": Row("lora-sam", {"rho": RADII, "rate": SLOWER}),
    "bi-lora-100": Row("bi-lora", {"rho": (0.05,), "ratio": (100,)}),  # its clip acts, as AdamW's
    "noise-fresh-adamw": Row("noise-fresh", {}, "bi-lora-adamw"),
    "noise-kept-adamw": Row("noise-kept", {}, "bi-lora-adamw")}
BINDS = ("bi-lora-100", "noise-fresh-adamw", "noise-kept-adamw")
UNTUNED = ("lora", "lora-sam-paper", "bi-lora-paper", "head-sam-untuned")
ALL = tuple(name for name in ROWS if name not in ("head-sam-untuned", *BINDS))
MAIN = (*ALL[:7], "rwp-lora", "lora-rate")
PAPERS, RATES = ALL[:6], ("lora-rate", "lora-sam-rate")

class Cell(NamedTuple):
    task: str
    seeds: int
    rows: tuple
    settings: dict           # beside the task's own
    parts: dict = {}         # {name: rows split off the training file}; train: at most so many
    tuned_on: str = None     # the cell whose choices it takes

def of_glue(task, limit, noise, rows, parts, tuned_on=None):
    settings = {"limit": limit, "label_noise": noise, "epochs": 10, "bf16": True, "jobs": 1}
    return Cell(task, 10, rows, settings, parts, tuned_on)

NOISY = "sst2-1000-noise30"
SST2 = partial(of_glue, "sst2", parts={"held": 1000, "rest": 2000, "train": 10_000})
COLA = partial(of_glue, "cola", parts={"held": 1000, "rest": 2000})
CELLS = {
    "demo": Cell("demo", 20, (*ALL, *BINDS), {}, {"held": 1000}),
    NOISY: SST2(1000, 0.3, ALL), "sst2-1000": SST2(1000, 0.0, (*ALL, *BINDS[1:])),
    "mrpc": of_glue("mrpc", None, 0.0, (*PAPERS, *RATES), {}, "sst2-1000")._replace(seeds=5),
    "gsm8k": Cell("gsm8k", 3, UNTUNED, {"limit": 500, "eval_limit": 1000, "max_new_tokens": 256,
                                        "eval_batch_size": 100}),
    "cola-2000": COLA(2000, 0.0, MAIN), "cola-2000-noise30": COLA(2000, 0.3, MAIN),
    "sst2-250-noise30": SST2(250, 0.3, MAIN, tuned_on=NOISY),
    "sst2-4000-noise30": SST2(4000, 0.3, MAIN, tuned_on=NOISY),
    "sst2-1000-noise15": SST2(1000, 0.15, MAIN, tuned_on=NOISY)}

def of_rank(rank, aux_rank, rows):
    """The demo with other ranks; s = alpha / r stays 2."""
    settings = {"rank": rank, "alpha": 2 * rank, "aux_rank": aux_rank}
    return CELLS["demo"]._replace(rows=rows, settings=settings, tuned_on="demo")

CELLS |= {f"demo-r{r}": of_rank(r, r, ("lora", "lora-sam", "bi-lora")) for r in (2, 4, 16)}
CELLS |= {f"demo-aux{r}": of_rank(8, r, ("lora", "bi-lora")) for r in (2, 4, 16)}
RANKS = ("demo-r2", "demo-r4", "demo", "demo-r16", "demo-aux2", "demo-aux4", "demo-aux16")

GAINS = ("lora-sam", "bi-lora", "rwp-lora", "head-sam")  # H4's methods

def of_demo(**settings):
    """The demo with another n or another share of wrong labels, and its choices."""
    return CELLS["demo"]._replace(rows=("lora", *GAINS, *RATES), settings=settings,
                                  tuned_on="demo")

CELLS |= {f"demo-{n}": of_demo(limit=n) for n in (500, 4000)}
CELLS |= {"demo-noise0": of_demo(label_noise=0.0), "demo-noise15": of_demo(label_noise=0.15)}
CELLS["mrpc-float32"] = CELLS["mrpc"]._replace(  # for CPUs without bfloat16's instructions
    rows=("lora", "lora-rate"), settings={**CELLS["mrpc"].settings, "bf16": False})

def sets_of(cell):
    """Names of the evaluation files; the first one is scored in every epoch of every method."""
    return ("dev", *(name for name in ("rest", "held") if name in cell.parts))

def script_of(cell):
    return train_gsm8k if cell.task == "gsm8k" else train_glue

def full_settings(cell):
    """{option: value} of a cell of sentences: its task's own, and its own above them."""
    return {**TASKS[cell.task].settings, **cell.settings}

def install():
    """Put cells and controls into the scripts' tables, in this process."""
    for name, cell in CELLS.items():
        if cell.task == "gsm8k":
            train_gsm8k.TASKS["study-" + name] = {**train_gsm8k.TASKS["gsm8k"], **cell.settings}
            continue
        task, settings = TASKS[cell.task], full_settings(cell)
        TASKS["study-" + name] = task._replace(folder="", dev=sets_of(cell), settings=settings)
        SETTINGS["study-" + name] = settings
    methods.add(CONTROLS)

def combinations(row):
    """[{option: value}] of its grid, in the order in which a tie is decided."""
    return [dict(zip(row.grid, values)) for values in itertools.product(*row.grid.values())]

def folder_name(method, setting):
    """Name of the folder: lora-sam_rho-0.2."""
    return "_".join([method, *(f"{name}-{value}" for name, value in setting.items())])

def setting_in(name, row, chosen):
    """{option: value} of a row in a cell, or None where it needs a choice that is not made."""
    choices, entry = chosen.get(CELLS[name].tuned_on or name, {}), ROWS[row]
    if entry.like:
        return {"rho": choices[entry.like]["setting"]["rho"]} if entry.like in choices else None
    if len(combinations(entry)) > 1:
        return choices[row]["setting"] if row in choices else None
    return combinations(entry)[0]


# --------------------------------------------------------------------------------- contrasts

FIRST = ("demo", NOISY)
CONTRASTS = {  # {hypothesis: [[(cell, row, row that is subtracted), and one that is subtracted]]}
    "H1": [[(cell, "bi-lora-paper", "lora")] for cell in (*FIRST, "sst2-1000", "mrpc")],
    "H2": [[(cell, "bi-lora", noise)] for cell in (*FIRST, "sst2-1000")
           for noise in ("noise-fresh", "noise-kept")],
    "H3": [[(cell, "lora-sam", row)] for cell in FIRST for row in ("lora", "lora-sam-paper")],
    "H4": [[(more, row, "lora"), (less, row, "lora")] for row in GAINS for more, less in (
        (NOISY, "sst2-1000"), ("sst2-250-noise30", "sst2-4000-noise30"))],
    "H6": [[(cell, a, b)] for cell in FIRST for a, b in (
        ("lora-sam", "sam-other"), ("lora-sam", "s2sam-same"), ("lora-sam", "rwp-norm"),
        ("sam-half", "sam-other"))]}
NOT_PLANNED = {  # H2 where the clip acts; H4's changes on the demo; MRPC beside a smaller rate
    "H2, not the plan's": [
        *([("demo", "bi-lora-100", noise)] for noise in ("noise-fresh", "noise-kept")),
        *([(cell, "bi-lora-adamw", noise)] for cell in ("demo", "sst2-1000")
          for noise in BINDS[1:])],
    "not the plan's": [
        *([(more, row, "lora"), (less, row, "lora")] for row in (*GAINS, *RATES)
          for more, less in (("demo", "demo-noise0"), ("demo-500", "demo-4000"))),
        [("mrpc", "lora-sam", "lora"), ("mrpc-float32", "lora-rate", "lora")]]}

FLAT = ("lora", "lora-sam", "bi-lora", "rwp-lora", "head-sam")  # H5's rows, in cell 2
FLAT_SEEDS = 3
LAB = (*ALL[:5], "bi-lora-adamw", "bi-lora-power", *RATES)  # what notes 3 to 6 look into

CURVES = {  # {a panel's title: (the setting on its axis, cells)}
    "demo, 2,000 rows": ("label_noise", ("demo-noise0", "demo-noise15", "demo")),
    "SST-2, 1,000 rows": ("label_noise", ("sst2-1000", "sst2-1000-noise15", NOISY)),
    "demo, 30 % wrong": ("limit", ("demo-500", "demo", "demo-4000")),
    "SST-2, 30 % wrong": ("limit", ("sst2-250-noise30", NOISY, "sst2-4000-noise30"))}

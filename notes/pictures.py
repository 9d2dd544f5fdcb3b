"""The pictures of sharpness.py: one function a part, each of {method: {seed: what the part measured}}.

A line is the mean over the seeds, a band one standard error around it.
"""

import math
import os

import numpy as np
from matplotlib.figure import Figure

from tables import SPACES, mean_of
from train_glue import mean_stderr

COLOURS = {"lora": "C0", "lora-sam": "C1", "bi-lora": "C2", "bi-lora-power": "C3"}
LAGS = (1, 2, 4, 8, 16, 32)  # steps between


def picture(path, columns, rows=1, height=3.2):
    """(figure, its axes row by row, a function that writes it)."""
    figure = Figure(figsize=(4.2 * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)

    def write():
        figure.savefig(path + ".tmp", format="png", dpi=90)
        os.replace(path + ".tmp", path)
    return figure, axes, write


def band(axis, x, curves, label, **style):
    """The mean of some curves, with a band of one standard error; what is None is left out."""
    curves = np.array(curves, dtype=float)
    kept = ~np.isnan(curves).any(0)
    x, curves = np.array(x)[kept], curves[:, kept]
    mean = curves.mean(0)
    (line,) = axis.plot(x, mean, label=label, **style)
    if len(curves) > 1:
        error = curves.std(0, ddof=1) / math.sqrt(len(curves))
        axis.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)


def named(axis, x, y, title=""):
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, fontsize=10)


def draw_a(results, path):
    _, ((*axes,),), write = picture(path, 2)
    for axis, space in zip(axes, SPACES):
        for method, runs in results.items():
            curves = [np.mean(run[space]["losses"], 0) for run in runs.values()]
            band(axis, next(iter(runs.values()))[space]["alphas"], curves, method, color=COLOURS[method])
        named(axis, "alpha", "training loss", f"{space} space")
    axes[0].legend()
    write()


def draw_contour(results, path):
    _, axes, write = picture(path, len(results), 2)
    for row, space in zip(axes, SPACES):
        runs = {method: next(iter(seeds.values()))[space] for method, seeds in results.items()}
        top = max(np.max(run["losses"]) for run in runs.values())
        for axis, (method, run) in zip(row, runs.items()):
            drawn = axis.contour(run["alphas"], run["alphas"], run["losses"], levels=np.linspace(0, top, 16))
            axis.clabel(drawn, drawn.levels[1::3], fontsize=7)
            named(axis, "first direction", "second direction", f"{method}, {space} space")
    write()


def draw_b(results, path):
    metric = [key for key in next(iter(next(iter(results.values())).values()))["full"] if key not in ("alphas", "loss")][0]
    _, axes, write = picture(path, 2, 2)
    for row, space in zip(axes, SPACES):
        for axis, key in zip(row, ("loss", metric)):
            for method, runs in results.items():
                band(axis, next(iter(runs.values()))[space]["alphas"], [run[space][key] for run in runs.values()], method,
                     color=COLOURS[method], marker=".")
            named(axis, "alpha", "training loss" if key == "loss" else f"{key}, evaluation set", f"{space} space")
    axes[0, 0].legend()
    write()


def draw_c(results, path):
    _, axes, write = picture(path, 2, 2)
    for row, space in zip(axes, SPACES):
        for i, (method, runs) in enumerate(results.items()):
            band(row[0], next(iter(runs.values()))[space]["radii"], [run[space]["increase"] for run in runs.values()], method,
                 color=COLOURS[method], marker=".")
            values = mean_stderr([run[space]["eigenvalue"] for run in runs.values()])
            row[1].bar([i], [values["mean"]], yerr=[values["stderr"] or 0], color=COLOURS[method])
        row[1].set_xticks(range(len(results)), list(results), fontsize=8)
        named(row[0], "radius", "worst loss increase", f"{space} space")
        row[0].set_xscale("log")
        row[0].set_yscale("log")
        named(row[1], "", "largest Hessian eigenvalue", f"{space} space")
    axes[0, 0].legend()
    write()


def draw_d(results, path):
    _, axes, write = picture(path, 2, 2)
    axes = axes.flatten()
    terms = {"B_epsA": "s B eps_A", "epsB_A": "s eps_B A", "epsB_epsA": "s eps_B eps_A", "ratio": "first two / third"}
    for key, label in terms.items():
        for runs in [results[method] for method in results if method == "lora-sam"]:
            band(axes[0], steps_of(runs), [run[key] for run in runs.values()], label, linestyle="--" if key == "ratio" else "-")
    axes[0].set_yscale("log")
    named(axes[0], "step", "norm", "LoRA-SAM's perturbation")
    modules = {"B": "B1", "A": "A1", "primary": "B1 A1", "auxiliary": "B2 A2", "between": "B1 A1 with B2 A2"}
    for axis, method in zip(axes[1:], ("lora-sam", "bi-lora", "bi-lora-power")):
        runs = results.get(method, {})
        for key, label in modules.items():
            if runs and key in next(iter(runs.values())) and (method == "lora-sam" or key not in "BA"):
                band(axis, steps_of(runs), [run[key] for run in runs.values()], label)
        named(axis, "step", "cosine with last value", method)
    for axis in axes:
        if axis.lines:
            axis.legend(fontsize=8)
    write()


def steps_of(runs):
    return next(iter(runs.values()))["step"]


def draw_e(results, path):
    _, axes, write = picture(path, 2, 2)
    labels = {"cosine_batch": "cosine with G of the batch", "cosine_sample": "cosine with G over the sample",
              "gain_batch": "share of SAM's increase, batch", "gain_sample": "share of SAM's increase, sample"}
    for axis, (key, label) in zip(axes.flat, labels.items()):
        for method, runs in results.items():
            runs = {seed: run for seed, run in runs.items() if run}
            for prefix, style in (("", "-"), ("random_", ":")):
                if runs:
                    band(axis, steps_of(runs), [run[prefix + key] for run in runs.values()], method if not prefix else None,
                         color=COLOURS[method], linestyle=style)
        axis.axhline(0, color="grey", linewidth=0.5)
        named(axis, "step", label)
    axes[0, 0].legend(title="dotted: random", fontsize=8)
    write()


def draw_f(results, path):
    _, axes, write = picture(path, 2, 2)
    (runs,) = results.values()
    for rule in next(iter(runs.values())):
        curves = [run[rule] for run in runs.values()]
        steps = range(len(curves[0]["rank"]))
        for axis, key in ((axes[0, 0], "rank"), (axes[0, 1], "final")):
            band(axis, steps, [curve[key] for curve in curves], rule)
        band(axes[1, 0], LAGS, [[mean_of(curve[f"lag {lag}"]) for lag in LAGS] for curve in curves], rule, marker=".")
        sampled = [i for i in steps if curves[0]["cosine_sample"][i] is not None]
        band(axes[1, 1], sampled, [[curve["cosine_sample"][i] for i in sampled] for curve in curves], rule)
    named(axes[0, 0], "step", "effective rank of s B2 A2")
    named(axes[0, 1], "step", "cosine with last value")
    named(axes[1, 0], "steps between", "cosine with itself, second half")
    named(axes[1, 1], "step", "cosine with G over the sample")
    axes[1, 0].set_xscale("log")
    axes[0, 0].legend(fontsize=7)
    write()


def draw_g(results, path):
    _, ((*axes,),), write = picture(path, 3)
    for axis, keys, label in zip(axes, (("training loss", "evaluation loss"), ("training score", "evaluation score"), ("gap",)),
                                 ("loss (dotted: training rows)", "score (dotted: training rows)", "gap of the losses")):
        for method, runs in results.items():
            for key in keys:
                dotted = key.startswith("training")
                band(axis, steps_of(runs), [run[key] for run in runs.values()], None if dotted else method, color=COLOURS[method],
                     linestyle=":" if dotted else "-")
        named(axis, "step", label)
    axes[0].legend(fontsize=8)
    write()


DRAWINGS = {"a": ("landscapes", draw_a), "contour": ("contour", draw_contour), "b": ("adversarial", draw_b),
            "c": ("worst-case", draw_c), "d": ("perturbations", draw_d), "e": ("adversity", draw_e),
            "f": ("ascent", draw_f), "g": ("gap", draw_g)}

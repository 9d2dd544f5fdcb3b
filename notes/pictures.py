"""The pictures of sharpness.py: one function a part, each of {method: {seed: what the part
measured}}.  As a script: draw those that are in notes/figures again, from the JSON files there.

    python notes/pictures.py

A line is the mean over the seeds, a band one standard error around it.  A method has the colour of
its place among the methods of its picture.
"""

import glob
import json
import math
import os

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from tables import NOTES, SPACES, mean_of
from train_glue import mean_stderr

LAGS = (1, 2, 4, 8, 16, 32)  # steps between


def picture(path, columns, rows=1, height=3.2):
    """(axes row by row, a function that puts one legend below all of them and writes the file)."""
    figure = Figure(figsize=(4.2 * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)

    def write(title=None):
        lines = {}
        for axis in axes.flat:
            for line, label in zip(*axis.get_legend_handles_labels()):
                lines.setdefault(label, line)
        if lines:
            figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, fontsize=8,
                          title=title, title_fontsize=8)
        figure.savefig(path + ".tmp", format="png", dpi=90)
        os.replace(path + ".tmp", path)
    return axes, write


def first(runs):
    """What was measured with the first seed."""
    return next(iter(runs.values()))


def band(axis, x, curves, label, **style):
    """The mean of some curves, with a band of one standard error; what is None is left out."""
    curves = np.array(curves, dtype=float)
    kept = ~np.isnan(curves).any(0)
    x, curves = np.array(x)[kept], curves[:, kept]
    mean = curves.mean(0)
    (line,) = axis.plot(x, mean, label=label, **style)
    if len(curves) > 1:
        error = curves.std(0, ddof=1) / math.sqrt(len(curves))
        axis.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.2,
                          linewidth=0)


def bands(axis, results, x, y, label=lambda method: method, **style):
    """A band for each method.  x and y: functions from what was measured in a run to a list.  A run
    in which there was nothing to measure, {}, is left out."""
    for place, (method, runs) in enumerate(results.items()):
        found = [run for run in runs.values() if run]
        if found:
            curves = [y(run) for run in found]
            band(axis, x(found[0]), curves, label(method), color=f"C{place}", **style)


def steps(run):
    return run["step"]


def named(axis, x, y, title=""):
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, fontsize=10)


def draw_a(results, path):
    axes, write = picture(path, 2)
    for axis, space in zip(axes[0], SPACES):
        bands(axis, results, lambda run: run[space]["alphas"],
              lambda run: np.mean(run[space]["losses"], 0))
        named(axis, "alpha", "training loss", f"{space} space")
    write()


def draw_contour(results, path):
    axes, write = picture(path, len(results), 2)
    for row, space in zip(axes, SPACES):
        runs = {method: first(seeds)[space] for method, seeds in results.items()}
        losses = [run["losses"] for run in runs.values()]
        levels = np.linspace(np.min(losses), np.max(losses), 16)
        for axis, (method, run) in zip(row, runs.items()):
            drawn = axis.contour(run["alphas"], run["alphas"], run["losses"], levels=levels)
            axis.clabel(drawn, drawn.levels[1::3], fmt="%.2f", fontsize=7)
            named(axis, "first direction", "second direction", f"{method}, {space} space")
    write()


def draw_b(results, path):
    found = first(first(results))["full"]
    metric = [key for key in found if key not in ("alphas", "loss")][0]
    axes, write = picture(path, 2, 2)
    for row, space in zip(axes, SPACES):
        for axis, key in zip(row, ("loss", metric)):
            bands(axis, results, lambda run: run[space]["alphas"], lambda run: run[space][key],
                  marker=".")
            label = "training loss" if key == "loss" else f"{key}, evaluation set"
            named(axis, "alpha", label, f"{space} space")
    write()


def draw_c(results, path):
    axes, write = picture(path, 2, 2)
    for (left, right), space in zip(axes, SPACES):
        bands(left, results, lambda run: run[space]["radii"], lambda run: run[space]["increase"],
              marker=".")
        for i, runs in enumerate(results.values()):
            values = mean_stderr([run[space]["eigenvalue"] for run in runs.values()])
            right.bar([i], [values["mean"]], yerr=[values["stderr"] or 0], color=f"C{i}")
        right.set_xticks(range(len(results)), list(results),
                         fontsize=8, rotation=30, ha="right")
        named(left, "radius", "worst loss increase", f"{space} space")
        radii = first(first(results))[space]["radii"]
        left.set_xscale("log")
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter("{x:g}")
        left.minorticks_off()
        left.set_xticks(radii, [f"{rho:g}" for rho in radii])
        named(right, "", "largest Hessian eigenvalue", f"{space} space")
    write()


MODULES = {"B": "B1 with its last value", "A": "A1 with its last value",
           "primary": "B1 A1 with its last value", "auxiliary": "B2 A2 with its last value",
           "between": "B1 A1 with B2 A2"}
TERMS = {"B_epsA": "s B eps_A", "epsB_A": "s eps_B A", "epsB_epsA": "s eps_B eps_A"}


def draw_d(results, path):
    """A panel for each method, the cosines of its pairs; then two for each that perturbs B1 and A1:
    the terms of its perturbation of W, and the ratio of the first two to the third."""
    terms = {method: runs for method, runs in results.items() if "ratio" in first(runs)}
    count = len(results) + 2 * len(terms)
    columns = min(3, count)
    axes, write = picture(path, columns, math.ceil(count / columns))
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    for axis, (method, runs) in zip(axes.flat, results.items()):
        draw_lines(axis, runs, MODULES, 0)
        named(axis, "step", "cosine", method)
    for i, (method, runs) in enumerate(terms.items()):
        norms, ratios = axes.flat[len(results) + 2 * i:][:2]
        draw_lines(norms, runs, TERMS, len(MODULES))
        named(norms, "step", "norm", f"{method}: terms of its perturbation")
        draw_ratios(ratios, runs)
        named(ratios, "step", "first two terms / third", f"{method}: single layers")
        for axis in (norms, ratios):
            axis.set_yscale("log", nonpositive="mask")  # the first term is zero at the start
    write()


def draw_ratios(axis, runs):
    """A line for each layer, the first seed's."""
    ratios = np.array(first(runs)["layers"], dtype=float)
    axis.plot(first(runs)["step"], ratios, color="grey", linewidth=0.5)


def draw_lines(axis, runs, labels, first_colour):
    for i, (key, label) in enumerate(labels.items(), first_colour):
        if key in first(runs):
            curves = [run[key] for run in runs.values()]
            band(axis, first(runs)["step"], curves, label, color=f"C{i}")


def draw_e(results, path):
    axes, write = picture(path, 2, 2)
    labels = {"cosine_batch": "cosine with G of the batch",
              "cosine_sample": "cosine with G over the sample",
              "gain_batch": "share of SAM's increase, batch",
              "gain_sample": "share of SAM's increase, sample"}
    for axis, (key, label) in zip(axes.flat, labels.items()):
        bands(axis, results, steps, lambda run: run[key])
        bands(axis, results, steps, lambda run: run[f"random_{key}"], lambda method: None,
              linestyle=":")
        axis.axhline(0, color="grey", linewidth=0.5)
        named(axis, "step", label)
    write("dotted: a random perturbation of the same length")


def draw_f(results, path):
    axes, write = picture(path, 2, 2)
    runs = list(first(results).values())
    for rule in runs[0]:
        curves = [run[rule] for run in runs]
        every = range(len(curves[0]["rank"]))
        sampled = [i for i in every if curves[0]["cosine_sample"][i] is not None]
        lags = [[mean_of(curve[f"lag {lag}"]) for lag in LAGS] for curve in curves]
        band(axes[1, 0], LAGS, lags, rule, marker=".")
        band(axes[0, 0], every, [curve["rank"] for curve in curves], rule)
        band(axes[0, 1], every, [curve["final"] for curve in curves], rule)
        cosines = [[curve["cosine_sample"][i] for i in sampled] for curve in curves]
        band(axes[1, 1], sampled, cosines, rule)
    named(axes[0, 0], "step", "effective rank of s B2 A2")
    named(axes[0, 1], "step", "cosine with last value")
    named(axes[1, 0], "steps between", "cosine with itself, second half")
    named(axes[1, 1], "step", "cosine with G over the sample")
    axes[1, 0].set_xscale("log", base=2)
    write()


def draw_g(results, path):
    axes, write = picture(path, 3)
    for axis, key in zip(axes[0], ("loss", "score")):
        bands(axis, results, steps, lambda run: run[f"evaluation {key}"])
        bands(axis, results, steps, lambda run: run[f"training {key}"], lambda method: None,
              linestyle=":")
        named(axis, "step", key)
    bands(axes[0, 2], results, steps, lambda run: run["gap"])
    named(axes[0, 2], "step", "gap of the losses")
    write("dotted: training rows")


DRAWINGS = {"a": ("landscapes", draw_a), "contour": ("contour", draw_contour),
            "b": ("adversarial", draw_b), "c": ("worst-case", draw_c),
            "d": ("perturbations", draw_d), "e": ("adversity", draw_e), "f": ("ascent", draw_f),
            "g": ("gap", draw_g)}


def main():
    for path in sorted(glob.glob(os.path.join(NOTES, "figures", "*-sharpness.json"))):
        with open(path, encoding="utf-8") as file:
            measured = json.load(file)["measured"]
        for part, found in measured.items():
            name, draw = DRAWINGS[part]
            place = path.replace("sharpness.json", f"{name}.png")
            if os.path.exists(place):
                draw(found, place)


if __name__ == "__main__":
    main()

"""Runs of either script over a grid of one or two options, and a heat map of the scores for each
method.

    python notes/sweep.py train_glue.py --x rho 0.01 0.05 --y aux-rank 2 4 8 -- --seeds 100 101
    python notes/sweep.py train_glue.py --x aux-lr 2e-4 2e-3 --out runs/sweep -- --method bi-lora

After -- come the script's own options, which all cells share.  The same command takes finished runs
(OUT/rho-0.05_aux-rank-8/METHOD-seed100) as they are: it goes on where it was interrupted, and
values and seeds can be added.  OUT gets sweep.json and sweep-METHOD.png.  The score is the task's
first metric after the last epoch.  "diverged", in the JSON file null, stands where the loss of a
run was infinite or NaN; the same command tries it again.

Choose on other seeds than those you report: the set that a setting was chosen on is no test set,
and the best of many cells scores too high on it.  rank also changes the scale s = alpha / rank, and
lr is aux-lr too where that is not given.
"""

import argparse
import itertools
import json
import math
import os
import sys
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import methods
from model import write_text
from tables import number_of
from train_glue import Parser, begin, mean_stderr, run_all

SHARED = ("task", "data", "model", "revision", "limit", "label-noise", "max-length",
          "max-new-tokens", "eval-limit", "bf16", "device", "method", "seeds", "jobs", "snapshots",
          "out", "resume", "overwrite")


class Cell(NamedTuple):
    values: list  # [x] or [x, y]
    args: object  # the script's, with the cell's folder as their out


def grid(script, axes, out, rest, parser):
    """[Cell], row by row.  The script parses each; it ends the program at a wrong name or value."""
    cells = {}
    for texts in itertools.product(*reversed(axes.values())):
        words = [f"--{name}={text}" for name, text in zip(axes, reversed(texts))]
        args, _ = methods.parse(script, [*rest, *words, "--resume"])
        keys = [name.replace("-", "_") for name in axes]
        if not vars(args).keys() >= {*keys}:  # the script takes --ran for --rank
            parser.error(f"{' '.join(axes)}: expected each option's name in full")
        values = [getattr(args, key) for key in keys]
        values = [value[0] if isinstance(value, list) else value for value in values]
        name = "_".join(f"{name}-{value}" for name, value in zip(axes, values))
        args.out = os.path.join(out, name)
        cells[name] = Cell(values, args)  # 0.05 and 5e-2 are one cell
    return list(cells.values())


def require_ranks(script, cells, data):
    """ValueError, before anything is trained, for a rank that the model's layers do not have."""
    args = argparse.Namespace(**{**vars(cells[0].args), "resume": False})
    for key in ("rank", "aux_rank"):
        setattr(args, key, max(getattr(cell.args, key) for cell in cells))
    method = max(args.method, key=lambda name: methods.METHODS[name].auxiliary)
    script.prepare(args, method, 0, methods.builder(script, args, data), "", 1)


def attempt(train, settings, args, method, seed, data, folder, progress):
    """The run of one folder, or None where it diverges.  settings: {folder: the script's args}."""
    try:
        return train(settings[folder], method, seed, data, folder, progress)
    except FloatingPointError as error:
        tqdm.write(f"{folder}: {error}")


def folder_of(cell, method, seed):
    return os.path.join(cell.args.out, f"{method}-seed{seed}")


def report_of(script, axes, cells, results):
    """What is in sweep.json.  results: {folder: what the script says of the run, or None}.  Cells
    whose seeds are not all there yet are left out."""
    args = cells[0].args
    finished = [result["metrics"] for result in results.values() if result]
    metric = next(iter(finished[0])) if finished else "score"
    others = {*(name.replace("-", "_") for name in axes), "out", "resume", "overwrite", "defaults"}
    config = {key: value for key, value in vars(args).items() if key not in others}
    columns = [list(dict.fromkeys(values)) for values in zip(*(cell.values for cell in cells))]
    both = [{"name": name, "values": column} for name, column in zip(axes, columns)]
    report = {"x": both[0], "y": both[1] if len(both) > 1 else None, "metric": metric,
              "config": {"script": script.__name__, **config}, "cells": []}
    for cell, method in itertools.product(cells, args.method):
        runs = {seed: folder_of(cell, method, seed) for seed in args.seeds}
        if not results.keys() >= set(runs.values()):
            continue
        scores = {str(seed): results[folder] and results[folder]["metrics"][metric]
                  for seed, folder in runs.items()}
        finite = [score for score in scores.values() if score is not None]
        summary = {"mean": None, "stderr": None, "n": len(finite)}
        if len(finite) == len(scores):
            summary = mean_stderr(finite)
        x, y = [*cell.values, None][:2]
        report["cells"].append({"x": x, "y": y, "method": method, "scores": scores, **summary})
    return report


def run(script, axes, out, cells):
    """Train what is not finished yet.  Returns the report, which is written after each run."""
    args, settings, results, todo, steps = cells[0].args, {}, {}, {}, 0
    data = script.load(args)
    require_ranks(script, cells, data)
    rows = min(args.limit or len(data.rows), len(data.rows))
    for number, cell in enumerate(cells):
        own = {(seed, method): folder_of(cell, method, seed)
               for method in args.method for seed in args.seeds}
        done = begin(cell.args, data.files, own)
        results |= {own[key]: result for key, result in done.items() if key in own}
        left = {(*key, number): folder for key, folder in own.items() if key not in done}
        todo |= left
        settings |= dict.fromkeys(left.values(), cell.args)
        steps += len(left) * cell.args.epochs * math.ceil(rows / cell.args.batch_size)
    train = partial(attempt, script.train, settings)
    with tqdm(total=steps, desc="all cells", unit="step", disable=None) as bar:
        for key, result in run_all(args, script.load, train, data, todo, bar.update):
            results[todo[key]] = result
            report = report_of(script, axes, cells, results)
            write_text(os.path.join(out, "sweep.json"), json.dumps(report, indent=2))
    report = report_of(script, axes, cells, results)
    write_text(os.path.join(out, "sweep.json"), json.dumps(report, indent=2))
    return report


# ----------------------------------------------------------------------------- picture and table


def rows_of(report, method):
    entries = [entry for entry in report["cells"] if entry["method"] == method]
    columns = len(report["x"]["values"])
    return [entries[i:i + columns] for i in range(0, len(entries), columns)]


def text_of(entry, between=" "):
    if entry["mean"] is None:
        return "diverged"
    return number_of(entry).replace(" ± ", f"{between}± ")


def draw(report, method, path):
    rows, x, y = rows_of(report, method), report["x"], report["y"] or {"name": "", "values": [""]}
    means = np.array([[entry["mean"] for entry in row] for row in rows], dtype=float)  # None: NaN
    size = 2.4 + 1.2 * len(x["values"]), 1.3 + 0.8 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(means, aspect="auto")
    figure.colorbar(picture, label=report["metric"])
    for i, j in np.ndindex(means.shape):
        colour = "white" if picture.norm(means[i, j]) < 0.5 else "black"
        axes.text(j, i, text_of(rows[i][j], "\n"), ha="center", va="center", color=colour)
    axes.set(xticks=range(len(x["values"])), xticklabels=x["values"], xlabel=x["name"],
             yticks=range(len(rows)), yticklabels=y["values"], ylabel=y["name"], title=method)
    figure.savefig(path + ".tmp", format="png", dpi=100)
    os.replace(path + ".tmp", path)


def print_table(report, method):
    x, y, corner = report["x"], report["y"], report["x"]["name"]
    if y is None:
        y = {"values": [report["metric"]]}
    else:
        corner = f"{y['name']} \\ {corner}"
    seeds = ", ".join(map(str, report["config"]["seeds"]))
    print(f"\n{method}, {report['metric']}: mean ± standard error; seeds {seeds}\n")
    print(f"| {corner} | " + " | ".join(map(str, x["values"])) + " |")
    print("|---" * (len(x["values"]) + 1) + "|")
    for value, row in zip(y["values"], rows_of(report, method)):
        print(f"| {value} | " + " | ".join(map(text_of, row)) + " |")


# ------------------------------------------------------------------------------------- arguments


def parse_arguments(argv):
    """(parser, script, {option: values}, out, the script's own options)."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=methods.SCRIPTS, help="whose runs these are")
    parser.add_argument("--x", nargs="+", required=True, metavar=("NAME", "VALUE"),
                        help="an option of the script, without dashes, and its values")
    parser.add_argument("--y", nargs="+", metavar=("NAME", "VALUE"),
                        help="another one (default: one row)")
    parser.add_argument("--out", help="folder of the results (default: runs/sweep-NAME-NAME)")
    options, rest = parser.parse_args(argv[:split]), argv[split + 1:]
    axes = {name: values for name, *values in (options.x, options.y or options.x)}
    for name, values in axes.items():
        if name in SHARED:
            parser.error(f"{name} is the same for all cells; it goes after --, --out before it")
        if not values or options.y and len(axes) == 1:
            parser.error(f"{name}: expected the name of an option and its values, and for --x and "
                         "--y different ones")
    for word in rest:
        name = word.split("=")[0]
        if name.startswith("--") and ("--out".startswith(name) or "--resume".startswith(name)):
            parser.error(f"{word}: expected before --, as --out; finished runs are taken anyway")
    out = options.out or os.path.join("runs", "-".join(["sweep", *axes]))
    return parser, methods.SCRIPTS[options.script], axes, out, rest


def main(argv=None):
    parser, script, axes, out, rest = parse_arguments(sys.argv[1:] if argv is None else argv)
    cells = grid(script, axes, out, rest, parser)
    try:
        report = run(script, axes, out, cells)
        for method in report["config"]["method"]:
            draw(report, method, os.path.join(out, f"sweep-{method}.png"))
            print_table(report, method)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return report


if __name__ == "__main__":
    main()

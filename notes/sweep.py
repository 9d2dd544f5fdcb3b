"""Runs of either script over a grid of one or two options, and a heat map of their scores for each method.

    python notes/sweep.py train_glue.py --x rho 0.01 0.05 0.2 --y aux-rank 2 4 8 -- --method bi-lora --seeds 100 101
    python notes/sweep.py train_glue.py --x aux-lr 2e-5 2e-4 2e-3 --out runs/sweep -- --method bi-lora

After -- come the script's own options, which all cells share; data and pretrained base are loaded once.  The same command
takes finished runs (OUT/rho-0.05_aux-rank-8/bi-lora-seed100) as they are: it goes on where it was interrupted, and values and
seeds can be added.  OUT gets sweep.json and sweep-METHOD.png.  The score is the task's first metric after the last epoch;
"diverged", in the JSON file null, stands where the loss of a run was infinite or NaN, which the same command tries again.

Choose on other seeds than those you report: the set that a setting was chosen on is no test set, and the best of many
cells scores too high on it.  rank also changes the scale s = alpha / rank, and lr is aux-lr too where that is not given.
"""

import argparse
import copy
import itertools
import json
import os
import sys
from collections import namedtuple

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_glue  # noqa: E402
import train_gsm8k  # noqa: E402
from train_glue import finished_run, mean_stderr, run_config, write_text  # noqa: E402

SCRIPTS = {"train_glue.py": train_glue, "train_gsm8k.py": train_gsm8k}
SHARED = ("task", "data", "model", "revision", "limit", "label-noise", "pretraining-steps", "max-length", "max-new-tokens",
          "eval-limit", "bf16", "device", "method", "seeds", "out", "resume")
Cell = namedtuple("Cell", "name values args")  # its folder's name, [x] or [x, y], the script's arguments


def grid(script, axes, out, rest, parser):
    """[Cell], row by row.  Each is parsed by the script, which ends the program at a wrong name or value."""
    cells = {}
    for texts in itertools.product(*reversed(axes.values())):
        words = [f"--{name}={text}" for name, text in zip(axes, reversed(texts))]
        _, args = script.parse_arguments([*rest, *words, f"--resume={out}"])  # train() goes on from a saved state, if any
        keys = [name.replace("-", "_") for name in axes]
        if not vars(args).keys() >= {*keys}:  # the script takes --ran for --rank
            parser.error(f"{' '.join(axes)}: expected each option's name in full")
        values = [value[0] if isinstance(value := getattr(args, key), list) else value for key in keys]
        name = "_".join(f"{name}-{value}" for name, value in zip(axes, values))
        cells[name] = Cell(name, values, args)  # 0.05 and 5e-2 are one cell
    return list(cells.values())


def built_once(build):
    """`build`, once a seed, and copies from then on.  It draws a head: the random state after it is put back too."""
    kept = {}

    def copied():
        seed = torch.initial_seed()  # train_glue.prepare has just set it
        if seed not in kept:
            kept[seed] = build(), torch.get_rng_state()
        torch.set_rng_state(kept[seed][1])
        return copy.deepcopy(kept[seed][0])
    return copied


def summarize(cells, methods, seeds, scores):
    """[{x, y, method, scores, mean, stderr, n}] where no seed is missing in scores, {(cell, method, seed): score or None}."""
    result = []
    for cell, method in itertools.product(cells, methods):
        found = {str(seed): scores[cell.name, method, seed] for seed in seeds if (cell.name, method, seed) in scores}
        if len(found) == len(seeds):
            finite = [score for score in found.values() if score is not None]
            summary = mean_stderr(finite) if len(finite) == len(seeds) else {"mean": None, "stderr": None, "n": len(finite)}
            result.append({**dict(zip("xy", [*cell.values, None])), "method": method, "scores": found, **summary})
    return result


def rows_of(report, method):
    entries, columns = [entry for entry in report["cells"] if entry["method"] == method], len(report["x"]["values"])
    return [entries[i:i + columns] for i in range(0, len(entries), columns)]


def text_of(entry, between=" "):
    error = "" if entry["stderr"] is None else f"{between}± {entry['stderr']:.4f}"
    return "diverged" if entry["mean"] is None else f"{entry['mean']:.4f}{error}"


def draw(report, method, path):
    rows, x, y = rows_of(report, method), report["x"], report["y"] or {"name": "", "values": [""]}
    means = np.array([[entry["mean"] for entry in row] for row in rows], dtype=float)  # None: NaN
    figure = Figure(figsize=(2.4 + 1.2 * len(x["values"]), 1.3 + 0.8 * len(rows)), layout="constrained")
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
    x, y = report["x"], report["y"] or {"values": [report["metric"]]}
    corner = f"{y['name']} \\ {x['name']}" if "name" in y else x["name"]
    print(f"\n{method}, {report['metric']}: mean ± standard error over {len(report['config']['seeds'])} seeds\n")
    print(f"| {corner} | " + " | ".join(map(str, x["values"])) + " |\n" + "|---" * (len(x["values"]) + 1) + "|")
    for value, row in zip(y["values"], rows_of(report, method)):
        print(f"| {value} | " + " | ".join(map(text_of, row)) + " |")


def parse_arguments(argv):
    """(parser, script, {option: values}, out, the script's own options)."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = train_glue.Parser(prog="sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=SCRIPTS, help="whose runs these are")
    for flag, text in (("--x", "an option of the script, without dashes, and its values"), ("--y", "another (default: one row)")):
        parser.add_argument(flag, nargs="+", required=flag == "--x", metavar=("NAME", "VALUE"), help=text)
    parser.add_argument("--out", help="folder for runs and results (default: runs/sweep-NAME-NAME)")
    options, rest = parser.parse_args(argv[:split]), argv[split + 1:]
    axes = {name: values for name, *values in (options.x, options.y or options.x)}
    for name, values in axes.items():
        if name in SHARED:
            parser.error(f"{name} is the same for all cells; it goes after --, and --out before it")
        if not values or options.y and len(axes) == 1:
            parser.error(f"{name}: expected the name of an option and its values, and for --x and --y different ones")
    if given := [word for word in rest if word.startswith("--") and word[2:].split("=")[0] in ("out", "resume")]:
        parser.error(f"{given[0]}: expected before --, as --out; finished runs are taken anyway")
    return parser, SCRIPTS[options.script], axes, options.out or os.path.join("runs", "-".join(["sweep", *axes])), rest


def main(argv=None):
    parser, script, axes, out, rest = parse_arguments(sys.argv[1:] if argv is None else argv)
    cells = grid(script, axes, out, rest, parser)
    shared = {key: value for key, value in vars(cells[0].args).items() if key.replace("_", "-") not in (*axes, "out", "resume")}
    runs = {(cell.name, *run): cell.args for cell, *run in itertools.product(cells, shared["method"], shared["seeds"])}
    folders = {key: os.path.join(out, key[0], f"{key[1]}-seed{key[2]}") for key in runs}
    try:
        largest = {key: max(getattr(args, key) for args in runs.values()) for key in ("rank", "aux_rank")}  # load() checks them
        experiment = script.load(argparse.Namespace(**{**vars(cells[0].args), **largest}))
        experiment.build, metric = built_once(experiment.build), experiment.metrics[0]
        configs = {key: run_config(args, *key[1:], experiment) for key, args in runs.items()}
        scores = {key: run["metrics"][metric] for key in runs if (run := finished_run(configs[key], folders[key]))}
        values = [list(dict.fromkeys(column)) for column in zip(*(cell.values for cell in cells))]
        x, y = [*({"name": name, "values": column} for name, column in zip(axes, values)), None][:2]
        report = {"x": x, "y": y, "metric": metric, "config": {"script": script.__name__, **shared}}
        for key in (bar := tqdm(runs, disable=None)):
            bar.set_description("{}, {}, seed {}".format(*key))
            if key not in scores:
                os.makedirs(folders[key], exist_ok=True)
                write_text(os.path.join(folders[key], "config.json"), json.dumps(configs[key], indent=2))
                try:
                    scores[key] = train_glue.train(runs[key], *key[1:], experiment, folders[key])["metrics"][metric]
                except FloatingPointError as error:
                    scores[key] = None
                    tqdm.write("{}, {}, seed {}: {}".format(*key, error))
            report["cells"] = summarize(cells, shared["method"], shared["seeds"], scores)
            write_text(os.path.join(out, "sweep.json"), json.dumps(report, indent=2))
        for method in shared["method"]:
            draw(report, method, os.path.join(out, f"sweep-{method}.png"))
            print_table(report, method)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return report


if __name__ == "__main__":
    main()

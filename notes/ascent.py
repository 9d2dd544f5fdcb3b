"""How far does the ascent get?  c over training for several eta2 / eta1, beside what the gradients
of a run without ascent predict (note 4).

    python notes/methods.py train_glue.py --snapshots 21 --method lora --out runs/base
    python notes/methods.py train_glue.py --snapshots 21 --method bi-lora --aux-lr 0.2 --out runs/up
    python notes/ascent.py runs/base runs/up --out notes/figures

RUN is the --out of a command.  There is one of the table's first method and one for each ascent of
another, of the same task and the same seeds.  Measured: c before the clip, and how often the clip
acts (from the logs); over snapshots of the second half, effective rank of B2 A2 and its cosine with
G at W, of a batch and over a sample of training rows; the score minus the first method's, seed by
seed.  The prediction needs the first method's runs alone:
c_T = (s / 3) sqrt(sum_i (r2 / n_i) ||sum_t eta2_t G_it||^2), G over --rows training rows at each
snapshot.  OUT gets TASK-ascent-c.json, .md (tables) and .png.
"""

import json
import math
import os
import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import sharpness
from measures import cosine, effective_rank, gradient, inner
from model import read_json, write_text
from tables import number_of
from train_glue import METHODS, mean_stderr

BASE = next(iter(METHODS))  # the method that the others are compared with


def name_of(run):
    if run.method == BASE:
        return BASE
    ratio = (run.args.aux_lr or run.args.lr) / run.args.lr
    return f"{run.args.ascent}, {ratio:g}"


def read_log(run):
    with open(os.path.join(run.folder, "log.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ------------------------------------------------------ one run of the first method: the prediction


def batch_gradients(run, rows):
    """(mean over the batches of G, E ||G of a batch - mean||^2), an entry a layer each; batches as
    large as the run's."""
    weights, size = [layer.weight for layer in run.layers], run.args.batch_size
    batches = [rows[i:i + size] for i in range(0, len(rows) - size + 1, size)]
    mean, squares = [torch.zeros_like(w) for w in weights], np.zeros(len(weights))
    for batch in batches:
        _, g = gradient(run.losses(batch), weights)
        squares += [inner([x], [x]) for x in g]
        mean = [a + x / len(batches) for a, x in zip(mean, g)]
    variance = squares / len(batches) - [inner([x], [x]) for x in mean]
    return mean, variance * len(batches) / max(1, len(batches) - 1)


def predict(run, aux_rank):
    """[(step, c / (eta2 / eta1))] from the gradients along a run without ascent.

    With all training rows, sum_t eta_t G_t is that of their mean gradient.  Of a sample the mean
    has a noise of its own, which would add up over the steps: then ||sum_t eta_t G_t||^2 =
    <a, b> + sum_t eta_t^2 var, where a and b are the sums of two halves of the sample, whose noise
    is independent, and var is the variance of a batch's G.
    """
    rates = [row["lr"] for row in read_log(run)]
    snapshots, rows = run.snapshots()[:-1], run.sample
    whole = len(rows) == len(run.rows)
    parts = [rows] if whole else [rows[:len(rows) // 2], rows[len(rows) // 2:]]
    ends = [step for step, _ in snapshots[1:]] + [len(rates)]
    sums, noise, found = [[0.0] * len(run.layers) for _ in parts], 0.0, {}
    shares = [aux_rank / layer.in_features for layer in run.layers]
    bar = tqdm(list(zip(snapshots, ends)), desc=f"gradients, seed {run.seed}", leave=False,
               disable=None)
    for (step, path), end in bar:
        run.put(path)
        spent = rates[step:end]
        for i, part in enumerate(parts):
            mean, variance = batch_gradients(run, part)
            sums[i] = [a + sum(spent) * x for a, x in zip(sums[i], mean)]
            noise = noise + sum(rate**2 for rate in spent) * variance / len(parts)
        squares = np.array([inner([a], [b]) for a, b in zip(sums[0], sums[-1])])
        if not whole:
            squares = squares + noise
        found[end] = run.layers[0].scale / 3 * math.sqrt(max(0.0, float(np.dot(shares, squares))))
    run.drop()
    return list(found.items())


# ------------------------------------------------------------------------- one run with an ascent


def watch(run):
    """{quantity: number} of one run."""
    log, rows = read_log(run), []
    later = [path for step, path in run.moments() if 2 * step >= len(log)]
    for path in tqdm(later, desc=f"{name_of(run)}, seed {run.seed}", leave=False, disable=None):
        run.put(path)
        weights = [layer.weight for layer in run.layers]
        eps = [layer.aux_delta().detach() for layer in run.layers]
        each = [cosine(eps, gradient(run.losses(batch), weights)[1]) for batch in run.batches]
        _, G = gradient(run.losses(run.sample), weights)
        rows.append({"effective rank": effective_rank(run.auxiliary()),
                     "cosine with G of a batch": np.mean(each).item(),
                     "cosine with G over the sample": cosine(eps, G)})
    run.drop()
    clipped = [row["step"] for row in log if row.get("clipped")]
    return {"largest c": max(row["perturbation"] for row in log),
            "steps clipped": len(clipped) / len(log),
            "first step clipped": clipped[0] if clipped else None,
            **{key: np.mean([row[key] for row in rows]).item() for key in rows[0]}}


SETTINGS = ("rows", "seed", "batches", "moments")


def kept(run, what, measure, *arguments):
    """What was measured in a run folder before, if its settings were the same; else
    measure(run, ...)."""
    path = os.path.join(run.folder, "ascent.json")
    settings = {**what, **{key: getattr(run.options, key) for key in SETTINGS}}
    known = read_json(path) if os.path.exists(path) else {}
    if known.get("settings") != settings:
        known = {"settings": settings, "result": measure(run, *arguments)}
        write_text(path, json.dumps(known))
    return known["result"]


# ------------------------------------------------------------------------------ all of them


def tables(report):
    """Two Markdown tables: how far the ascent gets and what it costs; what the perturbation is
    like."""
    score, text = f"{report['metric']} minus {BASE}'s", []
    how_far = ("predicted c", "largest c", "steps clipped", score)
    how = ("effective rank", "cosine with G of a batch", "cosine with G over the sample")
    for columns in (how_far, how):
        text.append("| ascent, η₂ / η₁ | " + " | ".join(columns) + " |")
        text.append("|---" * (len(columns) + 1) + "|")
        for name, rows in report["ascents"].items():
            cells = [number_of(rows[key]) if key in rows else "" for key in columns]
            text.append(f"| {name} | " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def draw(report, path):
    """c before the clip over the steps, mean over the seeds; dashed: predicted; dotted: rho."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(report["curves"].items()):
        axes.plot(range(1, len(values) + 1), values, color=f"C{i}", label=name)
        if name in report["predicted"]:
            ends, values = zip(*report["predicted"][name])
            axes.plot(ends, values, "--", color=f"C{i}")
    axes.axhline(report["rho"], color="grey", linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="c before the clip",
             title=f"{report['task']}: ascent, η₂ / η₁")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8,
                  title="dashed: predicted; dotted: ρ", title_fontsize=8)
    figure.savefig(path + ".tmp", format="png", dpi=100)
    os.replace(path + ".tmp", path)


def study(runs, options):
    """What is in OUT/TASK-ascent-c.json; "curves" has c of each step, the mean over the seeds."""
    groups = {}
    for run in runs:
        groups.setdefault(name_of(run), {})[run.seed] = run
    others = {run.method for run in runs} - {BASE}
    if BASE not in groups or len(others) != 1 or len({run.task for run in runs}) > 1:
        raise ValueError(f"expected runs of one task, by {BASE} and by one other method")
    base = groups.pop(BASE)
    if any(seeds.keys() != base.keys() for seeds in groups.values()):
        raise ValueError(f"expected every RUN to have the seeds of {BASE}'s")
    for run in runs:
        if run.method != BASE and not METHODS[run.method].auxiliary:
            raise ValueError(f"{run.method} has no auxiliary pair; expected a method that has one")
    scores = {run.folder: read_json(os.path.join(run.folder, "metrics.json"))["metrics"]
              for run in runs}
    metric = next(iter(scores[runs[0].folder]))
    aux_rank = runs[0].args.aux_rank
    predicted = [kept(run, {"aux_rank": aux_rank}, predict, aux_rank) for run in base.values()]
    report = {"task": runs[0].task, "metric": metric, "rho": None, "predicted": {}, "ascents": {},
              "curves": {},
              "base": mean_stderr([scores[run.folder][metric] for run in base.values()]),
              "settings": {key: getattr(options, key) for key in SETTINGS}}
    for name, seeds in groups.items():
        found = [kept(run, {}, watch) for run in seeds.values()]
        rows = {key: mean_stderr([each[key] for each in found]) for key in found[0]
                if all(each[key] is not None for each in found)}
        gains = [scores[run.folder][metric] - scores[base[seed].folder][metric]
                 for seed, run in seeds.items()]
        rows[f"{metric} minus {BASE}'s"] = mean_stderr(gains)
        if name.startswith("sgd"):
            ratio = float(name.split(", ")[1])
            rows["predicted c"] = mean_stderr([ratio * curve[-1][1] for curve in predicted])
            report["predicted"][name] = [
                (points[0][0], ratio * np.mean([value for _, value in points]).item())
                for points in zip(*predicted)]
        report["ascents"][name], report["rho"] = rows, next(iter(seeds.values())).args.rho[-1]
        curves = [[row["perturbation"] for row in read_log(run)] for run in seeds.values()]
        report["curves"][name] = np.mean(curves, axis=0).tolist()
    return report


def main(argv=None):
    parser, options = sharpness.parse_arguments(sys.argv[1:] if argv is None else argv)
    out = options.out or options.run[0]
    try:
        report = study(sharpness.load_runs(options), options)
        path = os.path.join(out, f"{report['task']}-ascent-c")
        os.makedirs(out, exist_ok=True)
        write_text(path + ".json", json.dumps(report, indent=1))
        write_text(path + ".md", tables(report))
        draw(report, path + ".png")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(tables(report))
    return report


if __name__ == "__main__":
    main()

"""How the cost of a step grows: with batch, length, rank, layers and the number of adapters.

    python notes/growth.py --bf16                       # a random encoder of MiniLM's shape
    python notes/growth.py --bf16 --shape smollm2 --axis rank layers

One quantity grows, and the others stay at their value in START.  Each point is the median of
steps that are interleaved, as benchmark.py has them.  To each line t = a + b x is fitted, with
equal weight for equal relative errors; in length t = a + b x + c x^2, since attention compares all
pairs of positions.  `exponent` is that of x between the last point and the one at half its x: at
most 1 where nothing grows faster than x.
"""

import argparse
import json
import math
import os
import statistics
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure

import benchmark
import train_glue
from bilora import add_lora
from model import write_text
from train_glue import METHODS

AXES = {"batch-size": [4, 8, 16, 32, 64], "length": [32, 64, 128, 256, 512],
        "rank": [1, 2, 4, 8, 16, 32, 64, 128], "layers": [1, 2, 3, 4, 5, 6],
        "adapters": [1, 6, 12, 18, 24, 30, 36]}
START = {"batch-size": 8, "length": 64, "rank": 8, "layers": 6, "adapters": None}  # None: all
NAMES = list(METHODS)[:3]


def point(axis, value, options):
    """{method: median seconds of a step}.  ValueError: a method that cannot take one."""
    settings = {**START, axis: value}
    own = {name.replace("-", "_"): number for name, number in settings.items()}
    own = SimpleNamespace(**{**vars(options), **own})
    adapt = add_lora if own.adapters is None else partial(first_adapted, own.adapters)
    with mock.patch.object(train_glue, "add_lora", adapt):
        steps, left_out = benchmark.steps_of(NAMES, own)
    if left_out:
        name, reason = next(iter(left_out.items()))
        raise ValueError(f"{axis} {value}, {name}: {reason}")
    seconds = benchmark.time_rows(steps, own)
    return {name: statistics.median(values) for name, values in seconds.items()}


def first_adapted(count, model, *ranks, layer):
    """add_lora on the first `count` linear layers of the blocks."""
    names = [name for name, module in model.named_modules()
             if isinstance(module, torch.nn.Linear) and ".blocks." in name]
    if count > len(names):
        raise ValueError(f"{count} adapters; the blocks have {len(names)} linear layers")
    return add_lora(model, *ranks, targets=names[:count], layer=layer)


def fit(x, t, degree):
    """(coefficients, the constant first; largest deviation relative to t), by least squares of the
    relative errors."""
    x, t = np.array(x, float), np.array(t, float)
    powers = np.stack([x**k for k in range(degree + 1)], axis=1)
    coefficients = np.linalg.lstsq(powers / t[:, None], np.ones_like(t))[0]
    return coefficients.tolist(), float(np.abs(powers @ coefficients / t - 1).max())


def growth(axis, values, points):
    """{method: its line, the fit, and how it grows at the end}."""
    found = {}
    for name in NAMES:
        t = [seconds[name] for seconds in points]
        coefficients, deviation = fit(values, t, 2 if axis == "length" else 1)
        half = min(range(len(values)), key=lambda i: abs(values[i] - values[-1] / 2))
        exponent = math.log(t[-1] / t[half]) / math.log(values[-1] / values[half])
        found[name] = {"seconds": t, "fit": coefficients, "deviation": deviation,
                       "exponent": exponent}
    return found


def draw(report, path):
    """A panel an axis; dots are measured, lines fitted."""
    axes = {axis: part for axis, part in report.items() if axis in AXES}
    figure = Figure(figsize=(3.2 * len(axes), 3), layout="constrained")
    panels = figure.subplots(1, len(axes), squeeze=False)[0]
    for panel, (axis, part) in zip(panels, axes.items()):
        x = np.linspace(0, part["values"][-1], 100)
        for i, (name, line) in enumerate(part["methods"].items()):
            y = sum(c * x**k for k, c in enumerate(line["fit"]))
            panel.plot(part["values"], line["seconds"], ".", color=f"C{i}")
            panel.plot(x, y, color=f"C{i}", linewidth=1, label=name)
        panel.set(xlabel=axis, ylim=(0, None))
    panels[0].set(ylabel="seconds a step")
    panels[0].legend()
    figure.savefig(path + ".tmp", format="png", dpi=100)
    os.replace(path + ".tmp", path)


def show(axis, part):
    for name, line in part["methods"].items():
        numbers = " + ".join(f"{1000 * c:.3g}{('', ' x', ' x^2')[k]}"
                             for k, c in enumerate(line["fit"]))
        print(f"| {axis} | {name} | {numbers} | {100 * line['deviation']:.0f} % | "
              f"{line['exponent']:.2f} |", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=benchmark.SHAPES, default="minilm",
                        help="default: %(default)s")
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES),
                        help="default: all of them")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: %(default)s")
    parser.add_argument("--rounds", type=partial(train_glue.number, int, 1), default=7,
                        help="default: %(default)s")
    parser.add_argument("--out", help="write growth.json and growth.png to this folder")
    options = parser.parse_args(argv)
    benchmark.require_device(options.device, parser.error)
    try:
        if options.out:
            os.makedirs(options.out, exist_ok=True)
        return measured(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def measured(options):
    """Time, fit, print, and write what --out asks for."""
    options.model, options.warmup, options.rest = None, 1, []
    report = {"machine": benchmark.machine(options.device), "config": vars(options)}
    print(f"{options.shape}, bf16 {options.bf16}; {report['machine']}")
    print("| x | method | milliseconds | largest deviation | exponent |\n|---|---|---|---|---|")
    for axis in options.axis:
        points = [point(axis, value, options) for value in AXES[axis]]
        report[axis] = {"values": AXES[axis], "methods": growth(axis, AXES[axis], points)}
        show(axis, report[axis])
    if options.out:
        write_text(os.path.join(options.out, "growth.json"), json.dumps(report, indent=1))
        draw(report, os.path.join(options.out, "growth.png"))
    return report


if __name__ == "__main__":
    main()

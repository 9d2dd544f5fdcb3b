"""The tables of sharpness.py.  As a script: write them into the notes and README, between marks,
from its JSON files.

    python notes/sharpness.py runs/demo --out notes/figures && python notes/tables.py

A mark is a line `<!-- table: TASKS PART METHODS "START" ... -->`, its end a line `<!-- end -->`.
TASKS and METHODS are names with commas between them, or *.  The rows are the quantities of the part
whose names begin with one of the STARTs, or all of them.  A cell is mean ± standard error over the
seeds; after it, in brackets, that of the difference to the first method of the table, seed by seed.
"""

import glob
import json
import os
import re
import shlex

import numpy as np

import methods  # noqa: F401  all methods of the table, and the path to train_glue
from model import write_text
from train_glue import METHODS, mean_stderr

SPACES = ("LoRA", "full")
NOTES = os.path.dirname(os.path.abspath(__file__))
MARK = re.compile(r"^<!-- table: (.*?) -->\n.*?^<!-- end -->\n", re.DOTALL | re.MULTILINE)


def mean_of(values):
    """Of the second half of the steps, where there are values."""
    values = [value for value in values[len(values) // 2:] if value is not None]
    return sum(values) / len(values) if values else None


def quantities(part, result):
    """{what: number} of one run and part: the rows of its table."""
    return QUANTITIES[part](result)


def quantities_a(result):
    rows = {}
    for space, found in result.items():
        rises = [(losses[0] + losses[-1]) / 2 - losses[len(losses) // 2]
                 for losses in found["losses"]]
        name = f"{space} space, mean increase at alpha = ±{found['alphas'][-1]:g}"
        rows[name] = np.mean(rises).item()
    return rows


def quantities_b(result):
    return {f"{space} space, {key} at {alpha:g}": value for space, found in result.items()
            for key in found if key != "alphas"
            for alpha, value in zip(found["alphas"], found[key])}


def quantities_c(result):
    rows = {f"{space} space, worst increase within {rho:g}": value
            for space, found in result.items()
            for rho, value in zip(found["radii"], found["increase"])}
    for space, found in result.items():
        rows[f"{space} space, largest eigenvalue"] = found["eigenvalue"]
        rows[f"{space} space, residual of the eigenvalue"] = found["residual"]
    return rows


def quantities_d(result):
    half = next(i for i, step in enumerate(result["step"]) if 2 * step >= result["step"][-1])
    names = {"B": "B1, half-way, with its last value", "A": "A1, half-way, with its last value",
             "primary": "B1 A1, half-way, with its last value",
             "auxiliary": "B2 A2, half-way, with its last value",
             "between": "B1 A1 with B2 A2, half-way"}
    rows = {name: result[key][half] for key, name in names.items() if key in result}
    if "ratio" in result:
        ratios = np.array(result["ratio"], dtype=float)
        rows["first-order terms / third, median"] = np.nanmedian(ratios).item()
    return rows


def quantities_e(result):
    rows = {key.replace("_", " "): np.mean(values).item() for key, values in result.items()
            if key != "step"}
    for key in [key for key in result if "cosine" in key]:
        name = key.replace("_", " ") + ", root mean square"
        rows[name] = np.sqrt(np.mean(np.square(result[key]))).item()
    return rows


def quantities_f(result):
    rows = {}
    for rule, found in result.items():
        rows[f"{rule}: effective rank"] = mean_of(found["rank"])
        for lag in (1, 8, 32):
            rows[f"{rule}: with itself {lag} steps ago"] = mean_of(found[f"lag {lag}"])
        half = len(found["final"]) // 2
        rows[f"{rule}: cosine half-way with its last value"] = found["final"][half]
        rows[f"{rule}: cosine with G of the batch"] = mean_of(found["cosine_batch"])
        rows[f"{rule}: cosine with G over the sample"] = mean_of(found["cosine_sample"])
    return rows


def quantities_g(result):
    return {f"{key}, at the end": values[-1] for key, values in result.items() if key != "step"}


QUANTITIES = {"a": quantities_a, "b": quantities_b, "c": quantities_c, "d": quantities_d,
              "e": quantities_e, "f": quantities_f, "g": quantities_g}


def tables(results, finished):
    """(Markdown, the same numbers): mean and standard error over the seeds, and of the difference
    to the first method of the table, seed by seed.

    results: {part: {method: {seed: what was measured}}}.  finished: the metrics.json of each run.
    """
    text, numbers, scores = [], {}, {}
    for run in finished:
        scores.setdefault(run["method"], {})[run["seed"]] = run["metrics"]
    found = {"scores": {method: scores[method] for method in METHODS if method in scores}}
    for part in [part for part in results if part != "contour"]:
        found[part] = {method: {seed: quantities(part, result) for seed, result in seeds.items()}
                       for method, seeds in results[part].items()}
    for part, runs in found.items():
        runs = {method: seeds for method, seeds in runs.items() if any(seeds.values())}
        names = dict.fromkeys(name for seeds in runs.values() for values in seeds.values()
                              for name in values)
        text += ["", f"| {part} | " + " | ".join(runs) + " |", "|---" * (len(runs) + 1) + "|"]
        for name in names:
            entries = {method: entry_of(runs, method, name) for method in runs}
            numbers.setdefault(part, {})[name] = entries
            text.append(f"| {name} | " + " | ".join(map(text_of, entries.values())) + " |")
    return "\n".join(text) + "\n", numbers


def entry_of(runs, method, name):
    """{"value", and "difference" to the first method of the table} of one quantity, where there are
    such numbers."""
    values = {seed: row[name] for seed, row in runs[method].items() if row.get(name) is not None}
    entry = {"value": mean_stderr(list(values.values()))} if values else {}
    first = next(iter(METHODS))
    if method != first:
        base = {seed: row.get(name) for seed, row in runs.get(first, {}).items()}
        paired = [values[seed] - base[seed] for seed in values if base.get(seed) is not None]
        if paired:
            entry["difference"] = mean_stderr(paired)
    return entry


def text_of(entry):
    """A cell: mean ± standard error, and in brackets that of the difference; nothing where nothing
    was measured."""
    parts = [number_of(entry["value"])] if "value" in entry else []
    if "difference" in entry:
        parts.append(f"({number_of(entry['difference'], '+')})")
    return " ".join(parts)


def number_of(value, sign=""):
    error = "" if value["stderr"] is None else f" ± {value['stderr']:.2g}"
    return f"{value['mean']:{sign}.4g}{error}"


# ------------------------------------------------------------------------------ the notes


def measured():
    """{task: {part: {quantity: {method: entry}}}}."""
    found = {}
    for path in sorted(glob.glob(os.path.join(NOTES, "figures", "*-sharpness.json"))):
        with open(path, encoding="utf-8") as file:
            task = os.path.basename(path).removesuffix("-sharpness.json")
            found[task] = json.load(file)["tables"]
    return found


def table(mark, numbers):
    """The Markdown lines that belong between a mark and its end."""
    tasks, part, columns, *starts = shlex.split(mark)
    tasks = list(numbers) if tasks == "*" else tasks.split(",")
    wanted = list(METHODS) if columns == "*" else columns.split(",")
    found = {task: numbers[task].get(part, {}) for task in tasks}
    names = dict.fromkeys(name for rows in found.values() for name in rows)
    rows = [name for name in names if name.startswith(tuple(starts or [""]))]
    for start in starts or [""]:
        if not any(name.startswith(start) for name in names):
            raise ValueError(f"<!-- table: {mark} -->: nothing that was measured begins with "
                             f"{start!r}")
    columns = [(task, method) for task in tasks for method in wanted
               if any(found[task].get(name, {}).get(method) for name in rows)]
    if not columns:
        raise ValueError(f"<!-- table: {mark} -->: none of these methods was measured")
    heads = [f"{task}, {method}" for task, method in columns]
    if len(tasks) == 1:
        heads = [method for _, method in columns]
    elif len(wanted) == 1:
        heads = [task for task, _ in columns]
    lines = [["", *heads], ["---"] * (len(columns) + 1)]
    for name in rows:
        cells = [found[task].get(name, {}).get(method, {}) for task, method in columns]
        lines.append([name, *map(text_of, cells)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def filled(text, numbers):
    def new(match):
        return f"<!-- table: {match[1]} -->\n{table(match[1], numbers)}<!-- end -->\n"
    return MARK.sub(new, text)


def main():
    numbers = measured()
    pages = sorted(glob.glob(os.path.join(NOTES, "*.md")))
    for path in [*pages, os.path.join(NOTES, "..", "README.md")]:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        write_text(path, filled(text, numbers))


if __name__ == "__main__":
    main()

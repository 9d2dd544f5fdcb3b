"""The tables of sharpness.py.  As a script: write them into the notes and README, between marks,
from its JSON files, and the full tables into notes/figures/*-sharpness.md.

    python notes/sharpness.py runs/demo --out notes/figures && python notes/tables.py

A mark is a line `<!-- table: TASKS PART METHODS "NAME" ... -->`, its end a line `<!-- end -->`.
TASKS and METHODS are names with commas between them, or *.  A NAME is that of a quantity, or a
pattern with * in it; without one, all quantities of the part are taken.  They are the rows, and the
methods are the columns; of one method the tasks are.  With `pivot:` in place of `table:`
the quantities are the columns, and the runs (and the rules of part f) are the rows.

A cell is mean ± standard error over the seeds.  Where a row of a table begins with the first
method's value, its other cells are the differences to that value, seed by seed.
"""

import glob
import json
import os
import re
import shlex
from fnmatch import fnmatchcase

import numpy as np

import methods  # noqa: F401  the path to train_glue
from model import write_text
from train_glue import METHODS, mean_stderr

SPACES = ("LoRA", "full")
NOTES = os.path.dirname(os.path.abspath(__file__))
MARK = re.compile(r"^<!-- (table|pivot): (.*?) -->\n.*?^<!-- end -->\n", re.DOTALL | re.MULTILINE)
FIRST = next(iter(METHODS))  # the method that the others are compared with
MOST_PLACES = 5  # digits after the point


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
             "between": "B1 A1 with B2 A2, half-way", "rank": "effective rank of B2 A2, half-way"}
    rows = {name: result[key][half] for key, name in names.items() if key in result}
    if "ratio" in result:
        ratios = np.array(result["ratio"], dtype=float)
        rows["first-order terms / third, median"] = np.nanmedian(ratios).item()
        layers = np.nanmedian(np.array(result["layers"], dtype=float), 0)
        for name, of in (("median", np.median), ("smallest", np.min), ("largest", np.max)):
            rows[f"first-order terms / third, single layers, {name}"] = of(layers).item()
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


def tables(results, scores):
    """{part: {quantity: {method: entry}}}, an entry as entry_of's.

    results: {part: {method: {seed: what was measured}}}.  scores: {method: {seed: metrics}}.
    """
    numbers = {}
    found = {"scores": scores}
    for part in [part for part in results if part != "contour"]:
        found[part] = {method: {seed: quantities(part, result) for seed, result in seeds.items()}
                       for method, seeds in results[part].items()}
    for part, runs in found.items():
        runs = {method: seeds for method, seeds in runs.items() if any(seeds.values())}
        names = dict.fromkeys(name for seeds in runs.values() for values in seeds.values()
                              for name in values)
        if names:
            numbers[part] = {name: {method: entry_of(runs, method, name) for method in runs}
                             for name in names}
    return numbers


def entry_of(runs, method, name):
    """{"value", and "difference" to the first method of the table} of one quantity, where there are
    such numbers."""
    values = {seed: row[name] for seed, row in runs[method].items() if row.get(name) is not None}
    entry = {"value": mean_stderr(list(values.values()))} if values else {}
    if method != FIRST:
        base = {seed: row.get(name) for seed, row in runs.get(FIRST, {}).items()}
        paired = [values[seed] - base[seed] for seed in values if base.get(seed) is not None]
        if paired:
            entry["difference"] = mean_stderr(paired)
    return entry


def number_of(entry, digits=1, sign=""):
    """Mean ± standard error: the error's first `digits` significant digits say where both end.

    sign: "+" writes it before a mean that is not negative, too.
    """
    mean, error = entry["mean"], entry["stderr"]
    if not error:
        text = f"{mean:{sign}.3g}"
        return text if error is None else f"{text} ± 0"
    exponent = int(f"{error:.{digits - 1}e}".split("e")[1])  # of the error as it is rounded
    places = min(MOST_PLACES, digits - 1 - exponent)
    mean, error = round(mean, places) + 0.0, round(error, places)  # + 0.0: no -0
    shown = max(0, places)
    return f"{mean:{sign}.{shown}f} ± {error:.{shown}f}"


def line_of(cells):
    return "| " + " | ".join(cells) + " |\n"


def all_tables(task, numbers):
    """A page of Markdown: every part, every quantity, two digits of each error; in brackets the
    difference to the first method, seed by seed."""
    text = f"# {task}: what sharpness.py measured\n"
    for part, rows in numbers.items():
        columns = list(dict.fromkeys(method for row in rows.values() for method in row))
        text += "\n" + line_of([part, *columns]) + line_of(["---"] * (len(columns) + 1))
        for name, row in rows.items():
            text += line_of([name, *(value_and_difference(row.get(key, {})) for key in columns)])
    return text


def value_and_difference(entry):
    """Nothing where nothing was measured."""
    parts = [number_of(entry["value"], 2)] if "value" in entry else []
    if "difference" in entry:
        parts.append(f"({number_of(entry['difference'], 2, '+')})")
    return " ".join(parts)


# ------------------------------------------------------------------------------ the notes


def measured():
    """{task: {part: {quantity: {method: entry}}}}."""
    found = {}
    for path in sorted(glob.glob(os.path.join(NOTES, "figures", "*-sharpness.json"))):
        with open(path, encoding="utf-8") as file:
            task = os.path.basename(path).removesuffix("-sharpness.json")
            found[task] = json.load(file)["tables"]
    return found


def table(kind, mark, numbers):
    """The Markdown lines that belong between a mark and its end.  kind: table or pivot."""
    tasks, part, wanted, *patterns = shlex.split(mark)
    tasks = list(numbers) if tasks == "*" else tasks.split(",")
    several = wanted == "*" or "," in wanted
    cells = {}  # {(task, method, quantity): entry}
    for task in tasks:
        for name, row in numbers[task].get(part, {}).items():
            own = row if wanted == "*" else wanted.split(",")
            cells |= {(task, method, name): row[method] for method in own if row.get(method)}
    names = list(dict.fromkeys(name for *_, name in cells))
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"<!-- {kind}: {mark} -->: nothing that was measured is called "
                             f"{pattern!r}")
    names = [name for name in names if matches(name, patterns or ["*"])]
    cells = {key: entry for key, entry in cells.items() if key[2] in names}
    if not cells:
        raise ValueError(f"<!-- {kind}: {mark} -->: none of these methods was measured")
    if kind == "pivot":
        return laid_out(*pivoted(cells, len(tasks) > 1, several))
    if not several:
        return laid_out(*by_task(cells))
    return laid_out(*by_method(cells, names, len(tasks) > 1))


def matches(name, patterns):
    """Is it one of these, or, in part f, what stands after the rule?"""
    return any(fnmatchcase(text, pattern) for pattern in patterns
               for text in (name, name.split(": ")[-1]))


def by_task(cells):
    """(rows, columns, {(row, column): text}): the quantities, the tasks."""
    texts = {(name, task): number_of(entry["value"]) for (task, _, name), entry in cells.items()}
    rows, columns = zip(*texts)
    return rows, columns, texts


def by_method(cells, names, several):
    """The quantities (of each task, where there are several), the methods."""
    texts = {}
    tasks = dict.fromkeys(task for task, *_ in cells)
    rows = [(task, name) for task in tasks for name in names]
    measured = dict.fromkeys(method for _, method, _ in cells)
    for task, name in rows:
        row = f"{task}, {name}" if several else name
        for method in measured:
            entry = cells.get((task, method, name), {})
            if FIRST not in measured or method == FIRST:
                if "value" in entry:
                    texts[row, method] = number_of(entry["value"])
            elif "difference" in entry:
                texts[row, f"{method} minus {FIRST}"] = number_of(entry["difference"], sign="+")
    rows, columns = zip(*texts)
    return rows, columns, texts


def pivoted(cells, several_tasks, several_methods):
    """The runs and rules, the quantities."""
    texts = {}
    for (task, method, name), entry in cells.items():
        *row, what = name.split(": ")
        if several_methods:
            row = [method, *row]
        if several_tasks:
            row = [task, *row]
        texts[", ".join(row or [method]), what] = number_of(entry["value"])
    rows, columns = zip(*texts)
    return rows, columns, texts


def laid_out(rows, columns, texts):
    rows, columns = dict.fromkeys(rows), dict.fromkeys(columns)
    lines = line_of(["", *columns]) + line_of(["---"] * (len(columns) + 1))
    return lines + "".join(line_of([row, *(texts.get((row, column), "") for column in columns)])
                           for row in rows)


def filled(text, numbers):
    def new(match):
        kind, mark = match.groups()
        return f"<!-- {kind}: {mark} -->\n{table(kind, mark, numbers)}<!-- end -->\n"
    return MARK.sub(new, text)


def main():
    numbers = measured()
    for task, found in numbers.items():
        write_text(os.path.join(NOTES, "figures", f"{task}-sharpness.md"), all_tables(task, found))
    pages = sorted(glob.glob(os.path.join(NOTES, "*.md")))
    for path in [*pages, os.path.join(NOTES, "..", "README.md")]:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        write_text(path, filled(text, numbers))


if __name__ == "__main__":
    main()

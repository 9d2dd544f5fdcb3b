"""Write the measured tables into the notes and README: every number between two marks comes from a JSON file that sharpness.py wrote.

    python notes/sharpness.py runs/embedded --out notes/figures && python notes/tables.py

A mark is a line `<!-- table: TASKS PART METHODS "START" ... -->`, its end a line `<!-- end -->`.  TASKS and METHODS are names with commas
between them, or *; the rows are the quantities of the part whose names begin with one of the STARTs, all where there is none.
A cell is mean ± standard error over the seeds; after it, in brackets, that of the difference to LoRA, seed by seed.
"""

import glob
import json
import os
import re
import shlex
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from sharpness import cell  # noqa: E402
from train_glue import METHODS, write_text  # noqa: E402

NOTES = os.path.dirname(os.path.abspath(__file__))
MARK = re.compile(r"^<!-- table: (.*?) -->\n.*?^<!-- end -->\n", re.DOTALL | re.MULTILINE)


def measured():
    """{task: {part: {quantity: {method: entry}}}}."""
    found = {}
    for path in sorted(glob.glob(os.path.join(NOTES, "figures", "*-sharpness.json"))):
        with open(path, encoding="utf-8") as file:
            found[os.path.basename(path).removesuffix("-sharpness.json")] = json.load(file)["tables"]
    return found


def table(mark, numbers):
    """The Markdown lines that belong between a mark and its end."""
    tasks, part, methods, *starts = shlex.split(mark)
    tasks = list(numbers) if tasks == "*" else tasks.split(",")
    methods = METHODS if methods == "*" else methods.split(",")
    rows = list(dict.fromkeys(name for task in tasks for name in numbers[task].get(part, {}) if name.startswith(tuple(starts or [""]))))
    columns = [(task, method) for task in tasks for method in methods
               if any(numbers[task].get(part, {}).get(name, {}).get(method) for name in rows)]
    label = lambda task, method: ", ".join([task] * (len(tasks) > 1) + [method] * (len(methods) > 1 or len(tasks) == 1))
    lines = ["|  | " + " | ".join(label(*column) for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in rows:
        entries = [numbers[task].get(part, {}).get(name, {}).get(method) or {} for task, method in columns]
        lines.append(f"| {name} | " + " | ".join(" ".join([cell(e["value"])] * ("value" in e) + ["(" + cell(e["minus_lora"], "+") + ")"] * ("minus_lora" in e))
                                                for e in entries) + " |")
    return "".join(line + "\n" for line in lines)


def filled(text, numbers):
    return MARK.sub(lambda match: f"<!-- table: {match[1]} -->\n{table(match[1], numbers)}<!-- end -->\n", text)


def main():
    for path in [*sorted(glob.glob(os.path.join(NOTES, "*.md"))), os.path.join(NOTES, "..", "README.md")]:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        write_text(path, filled(text, measured()))


if __name__ == "__main__":
    main()

"""The study of notes/9_study.md: its tuning, its runs, its tables and figures.  Rows, cells and
contrasts are in study_plan.py, the statistics in study_tables.py.

    python notes/study.py tune demo --jobs 2
    python notes/study.py run demo --jobs 2
    python notes/study.py run sst2-1000 --model DIR --data GLUE --row lora lora-sam
    python notes/study.py flat sst2-1000-noise30 --model DIR --data GLUE
    python notes/study.py lab demo -- --parts a b
    python notes/study.py table

A cell is a task with a number of rows and a share of wrong labels.  A row is a method with a rule
for its settings: one setting, a grid from which `tune` chooses, or another row's radius.  A run's
folder is OUT/CELL/SETTING/METHOD-seedN, so rows with one setting share their runs.  Every command
takes finished runs as they are; with --recorded, `tune` and `run` take those of
notes/figures/study.json too.  `flat` trains H5's rows again, with snapshots, in OUT/flat, and
measures them (study_flat.py).  `lab` trains the laboratory's rows there, and has sharpness.py
measure them; what follows -- are its options.  `table` adds all runs of OUT to the record
notes/figures/study.json, and reads that file alone.
"""

import argparse
import functools
import glob
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from concurrent.futures import BrokenExecutor
from functools import partial
from types import SimpleNamespace

import torch
from tqdm import tqdm

import methods
import sharpness
import study_flat
import train_glue
import train_gsm8k
from bilora import add_lora, load_adapter
from model import read_json, read_safetensors, require, write_text
from study_plan import (CELLS, FLAT, FLAT_SEEDS, LAB, ROWS, TUNING_SEEDS, combinations,
                        folder_name, full_settings, install, script_of, setting_in)
from study_tables import all_tables, counting_set, draw_curves, draw_fit, draw_gains, filled
from train_glue import SETTINGS, TASKS, Parser, begin, evaluate, read_tsv, run_all

NOTES = os.path.dirname(os.path.abspath(__file__))
FIGURES = os.path.join(NOTES, "figures")
PAGES = (os.path.join(NOTES, "9_study.md"), os.path.join(NOTES, "..", "README.md"))
GENERATED = 300  # test problems of GSM8K that are answered; the loss of gold answers is on all
TIMES = {"rate": "lr", "ratio": "aux-lr"}  # settings that are times the cell's own rate
PROBE = 100  # rows that stand in for the evaluation sets in every epoch, where these are large


# -------------------------------------------------------------------------------------- data

def write_parts(cell, source, folder):
    """The cell's files in the task's own layout: parts of source/train.tsv, which share no text
    with each other or with dev.tsv, and dev.tsv as it is."""
    task = TASKS[cell.task]
    noise = full_settings(cell).get("label_noise", 0.0)
    header, lines = distinct_lines(task, source)
    random.Random("study").shuffle(lines)
    os.makedirs(folder, exist_ok=True)
    for name in ("held", "rest"):
        if name in cell.parts:
            part, lines = lines[:cell.parts[name]], lines[cell.parts[name]:]
            require(len(part) == cell.parts[name], f"{source}: too few rows for {name}.tsv")
            if name == "held":
                part = with_wrong_labels(task, header, part, noise)
            write_bytes(os.path.join(folder, name + ".tsv"), header + part)
    with open(os.path.join(source, "dev.tsv"), "rb") as file:
        write_bytes(os.path.join(folder, "dev.tsv"), file.readlines())
    write_bytes(os.path.join(folder, "train.tsv"), header + lines[:cell.parts.get("train")])

def distinct_lines(task, source):
    """([header] or [], the lines of train.tsv whose text is new and not in dev.tsv), as bytes."""
    path = os.path.join(source, "train.tsv")
    seen = {text for text, _ in read_tsv(task, os.path.join(source, "dev.tsv"))}
    rows, kept = read_tsv(task, path), []
    with open(path, "rb") as file:
        lines = [line.rstrip(b"\r\n") + b"\n" for line in file]
    start = int(isinstance(task.label, str))
    for line, (text, _) in zip(lines[start:], rows):
        if text not in seen:
            kept.append(line)
        seen.add(text)
    return lines[:start], kept

def with_wrong_labels(task, header, lines, share):
    """The same lines, a share of them with another label."""
    column, rng, lines = task.label, random.Random("held"), list(lines)
    if header:
        names = header[0].decode("utf-8-sig").rstrip("\n").split("\t")
        column = names.index(task.label)
    for i in rng.sample(range(len(lines)), round(share * len(lines))):
        fields = lines[i].rstrip(b"\n").split(b"\t")
        others = [label for label in task.labels if label.encode() != fields[column]]
        fields[column] = rng.choice(others).encode()
        lines[i] = b"\t".join(fields) + b"\n"
    return lines

def write_bytes(path, lines):
    with open(path + ".tmp", "wb") as file:
        file.writelines(lines)
    os.replace(path + ".tmp", path)

def data_of(name, options):
    """The folder of a cell's files, which are made once."""
    cell = CELLS[name]
    if cell.task == "gsm8k":
        return options.data or os.environ.get("GSM8K_DATA")
    task, folder = TASKS[cell.task], os.path.join(options.out, "data", name)
    if not os.path.exists(os.path.join(folder, "train.tsv")):  # which is written last
        data = task.settings.get("data") or options.data or os.environ.get("GLUE_DATA")
        source = train_glue.data_folder(SimpleNamespace(data=data, task=cell.task), task)
        write_parts(cell, source, folder)
    return folder


# -------------------------------------------------------------------------------------- runs

def load(args):
    """What `run_all` calls in each process: there the tables are new."""
    install()
    return script_named(args).load(args)

def script_named(args):
    return train_glue if args.task in TASKS else train_gsm8k

def arguments(name, method, options, setting, more=()):
    """The script's own, of one cell, method and setting; more: words of its command line."""
    cell, words = CELLS[name], [*more]
    script = script_of(cell)
    for key, value in setting.items():
        if key in TIMES:
            tasks = train_gsm8k.TASKS if cell.task == "gsm8k" else SETTINGS
            key, value = TIMES[key], f"{value * tasks['study-' + name]['lr']:g}"
        words += ["--" + key, str(value)]
    if options.model and cell.task != "demo":
        words += ["--model", options.model]
    folder = os.path.join(options.out, name, folder_name(method, setting))
    return methods.parse(script, [
        "--task", "study-" + name, "--method", method, "--out", folder, "--resume",
        "--data", data_of(name, options), "--device", options.device, "--jobs", str(options.jobs),
        *words])[0]

def perform(name, wanted, seeds, options, more=()):
    """Train what is not finished of [(method, setting)], all seeds of one before the next."""
    jobs, todo = {}, {}
    known = record(options)["runs"].get(name, {}) if options.recorded else {}
    for method, setting in wanted:
        args = arguments(name, method, options, setting, more)
        have = known.get(folder_name(method, setting), {})
        for seed in seeds:
            folder = os.path.join(args.out, f"{method}-seed{seed}")
            if str(seed) not in have and not os.path.exists(os.path.join(folder, "study.json")):
                jobs[folder], todo[seed, method, args.out] = args, folder
    print(f"{name}: {len(todo)} runs to train in {options.out}")
    if not todo:
        return
    data = load(next(iter(jobs.values())))
    for out in dict.fromkeys(out for *_, out in todo):
        own = {key[:2]: folder for key, folder in todo.items() if key[2] == out}
        begin(jobs[next(iter(own.values()))], data.files, own)
    train = partial(train_and_record, jobs)
    with tqdm(total=len(todo), desc=name, unit="run", disable=None) as bar:
        for key, _ in run_all(next(iter(jobs.values())), load, train, data, todo, nothing):
            bar.update()
            bar.write(todo[key])  # without its score: who decides when to stop sees none

def nothing(steps):
    """A run's steps are too short to be shown."""

def train_and_record(jobs, _, method, seed, data, folder, progress):
    """One run, and what the study keeps of it, in the run folder's study.json.  A run that diverges
    counts as the most frequent label."""
    args, done = jobs[folder], os.path.join(folder, "metrics.json")
    script = script_named(args)
    sets, last = scored_sets(data, os.path.basename(args.out), seed)
    try:
        if os.path.exists(done):
            result = read_json(done)
        else:
            part = SimpleNamespace(**{**vars(data), "sets": sets})
            result = script.train(args, method, seed, part, folder, progress)
        kept = kept_of(script, args, result, sets, last, data, folder)
    except FloatingPointError as error:
        scores = {name: [data.majority.get(key, 0.0)] for name, key in keys(data, data.sets)}
        kept = {"diverged": str(error), "scores": scores}
    kept |= {"commit": commit(), "machine": machine(args)}
    write_text(os.path.join(folder, "study.json"), json.dumps(kept))
    return kept

def scored_sets(data, setting, seed):
    """({name: rows} that are scored at every epoch's end, names of those that are scored after the
    last one).  Of the row `lora` all are scored in every epoch, which the choice of its epoch
    needs; while tuning nothing that is reported."""
    names = [name for name in data.sets if name != "held"]
    if seed in TUNING_SEEDS:
        names = ["held"]
    elif setting == "lora":
        names = list(data.sets)
    if "rest" in data.sets and setting != "lora":  # every epoch would cost as much as training
        return {"probe": data.sets["held"][:PROBE]}, names
    return {name: data.sets[name][:GENERATED if name == "test" else None] for name in names}, []

def keys(data, sets):
    """[(set, name of its first metric in a run's scores)]."""
    metric = data.task.metrics[0] if hasattr(data, "task") else "accuracy"
    return [(name, f"{metric}_{name}" if len(sets) > 1 else metric) for name in sets]

def kept_of(script, args, result, sets, last, data, folder):
    """The run's line of the record.  last: names of sets that its saved adapter is scored on."""
    scores = {name: [row[key] for row in result["epochs"]] for name, key in keys(data, sets)
              if name != "probe"}
    if last:
        part = SimpleNamespace(**{**vars(data), "sets": {name: data.sets[name] for name in last}})
        found = evaluate(args, adapted(script, args, data, folder), part)["scores"]
        scores |= {name: [found[key]] for name, key in keys(data, last)}
    if script is train_gsm8k:
        scores["gold"] = [gold_loss(args, adapted(script, args, data, folder), data)]
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as file:
        steps = [json.loads(line).get("perturbation", 0.0) for line in file]
    kept = {"scores": scores, "loss": [row["loss"] for row in result["epochs"]],
            "perturbation": statistics.fmean(steps), "clipped": result["clipped_fraction"],
            "rise": result["metrics"].get("rise"), "seconds": result["step_seconds"]}
    return json.loads(json.dumps(kept), parse_float=five_digits)

def five_digits(text):
    return float(f"{float(text):.5g}")

def adapted(script, args, data, folder):
    """The model with the adapter and head that a run left."""
    model = methods.builder(script, args, data)()
    add_lora(model, args.rank, args.alpha)
    if model.classifier is not None:
        model.classifier.requires_grad_(True)
    load_adapter(model, folder, model.module_names, read_safetensors)
    return model.to(args.device).eval()

@torch.no_grad()
def gold_loss(args, model, data):
    """Mean -log p of a token of the test problems' own answers."""
    total, kind = 0.0, torch.device(args.device).type
    rows = sorted(data.sets["test"], key=train_gsm8k.row_length)  # less padding
    for start in range(0, len(rows), 16):
        with torch.autocast(kind, torch.bfloat16, enabled=args.bf16):
            total += train_gsm8k.row_losses(model, data, rows[start:start + 16]).sum().item()
    return total / sum(len(answer) for _, answer, _ in rows)

@functools.cache
def commit():
    command = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"

def machine(args):
    if torch.device(args.device).type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = models[0] if models else name
    kind = torch.backends.cpu.get_cpu_capability()  # it decides how sums are rounded
    return f"{name}, {kind}, torch {torch.__version__}"


# ------------------------------------------------------------------------------------ choices

def finished(out, name):
    """{setting: {seed: what is kept of the run}} of a cell's folder."""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(out), name, "*", "*", "study.json"))):
        folder = os.path.dirname(path)
        setting, seed = os.path.basename(os.path.dirname(folder)), folder.rsplit("-seed", 1)[1]
        found.setdefault(setting, {})[seed] = read_json(path)
    return found

def choose(row, runs):
    """{"setting": the combination with the highest mean score on the held-out rows, of equal ones
    the first, "means": {setting: mean}}; None where runs are missing."""
    means, options = {}, combinations(row)
    for setting in options:
        name = folder_name(row.method, setting)
        own = [runs.get(name, {}).get(str(seed)) for seed in TUNING_SEEDS]
        if None in own:
            return None
        means[name] = round(statistics.fmean(run["scores"]["held"][-1] for run in own), 9)
    best = max(options, key=lambda setting: means[folder_name(row.method, setting)])
    return {"setting": best, "means": means}

def tuned_rows(rows):
    return [name for name in rows if len(combinations(ROWS[name])) > 1]

def tune(name, rows, options):
    """Run the grids of a cell's rows, and write the choices."""
    rows = tuned_rows(rows)
    require(CELLS[name].tuned_on is None, f"{name} takes the choices of {CELLS[name].tuned_on}; "
            "tune that cell")
    wanted = [(ROWS[row].method, setting) for row in rows for setting in combinations(ROWS[row])]
    perform(name, wanted, TUNING_SEEDS, options)
    runs = finished(options.out, name)
    if options.recorded:
        runs = record(options)["runs"].get(name, {})
    made = {row: choose(ROWS[row], runs) for row in tuned_rows(CELLS[name].rows)}
    made = {row: choice for row, choice in made.items() if choice}
    os.makedirs(os.path.join(options.out, name), exist_ok=True)
    write_text(os.path.join(options.out, name, "chosen.json"), json.dumps(made, indent=2))
    for row, choice in made.items():
        print(f"{row}: {choice['setting']}")

def choices_in(out):
    """{cell: {row: choice}} of all chosen.json."""
    paths = glob.glob(os.path.join(glob.escape(out), "*", "chosen.json"))
    return {os.path.basename(os.path.dirname(path)): read_json(path) for path in paths}

def run(name, rows, seeds, options):
    """The reported runs of a cell's rows."""
    wanted = settings_of(name, rows, options).values()
    perform(name, list({folder_name(*pair): pair for pair in wanted}.values()), seeds, options)

def settings_of(name, rows, options):
    """{row: (method, setting)}."""
    chosen, wanted = record(options)["chosen"], {}
    for row in rows:
        found = setting_in(name, row, chosen)
        require(found is not None, f"{row}: no choice; run `tune {CELLS[name].tuned_on or name}` "
                "first")
        wanted[row] = ROWS[row].method, found
    return wanted

def watched(name, rows, seeds, options):
    """Train the rows with a snapshot an epoch, in OUT/flat; {row: {seed: run folder}}."""
    own = SimpleNamespace(**{**vars(options), "out": os.path.join(options.out, "flat"),
                             "recorded": False})
    wanted, epochs = settings_of(name, rows, options), SETTINGS["study-" + name]["epochs"]
    perform(name, list(wanted.values()), seeds, own, ["--snapshots", str(epochs + 1)])
    return {row: {seed: os.path.join(own.out, name, folder_name(*pair), f"{pair[0]}-seed{seed}")
                  for seed in seeds} for row, pair in wanted.items()}

def lab(name, rows, seeds, options, words):
    """sharpness.py on the rows, under their names."""
    runs = watched(name, rows, seeds, options)
    sharpness.main([f"{row}={folder}" for row, folders in runs.items()
                    for folder in folders.values()]
                   + ["--device", options.device, "--out", options.figures, *words])

def flat(name, seeds, options):
    """H5: its rows, and OUT/flat/CELL/flat.json, {seed: {row: what study_flat.measure finds, and
    the score that counts}}."""
    runs, found = watched(name, FLAT, seeds, options), {}
    path = os.path.join(options.out, "flat", name, "flat.json")
    if os.path.exists(path):
        found = read_json(path)
    for seed in map(str, seeds):
        if seed in found:
            continue
        folders = {row: folders[int(seed)] for row, folders in runs.items()}
        measured = study_flat.measure(folders, options.device)
        for row, folder in folders.items():
            kept = read_json(os.path.join(folder, "study.json"))
            measured[row]["score"] = kept["scores"][counting_set(name)][-1]
        found[seed] = measured
        write_text(path, json.dumps(found))

def record(options):
    """{"chosen": {cell: {row: choice}}, "runs": {cell: {setting: {seed: kept}}}, "flat": {cell:
    {seed: {row: measured}}}}: that of study.json, and on top what OUT has."""
    path, found = os.path.join(options.figures, "study.json"), {"chosen": {}, "runs": {}}
    if os.path.exists(path):
        found = read_json(path)
    found.setdefault("flat", {})
    for cell, choices in choices_in(options.out).items():
        found["chosen"].setdefault(cell, {}).update(choices)
    for cell in CELLS:
        for name, runs in finished(options.out, cell).items():
            found["runs"].setdefault(cell, {}).setdefault(name, {}).update(runs)
        path = os.path.join(options.out, "flat", cell, "flat.json")
        if os.path.exists(path):
            found["flat"].setdefault(cell, {}).update(read_json(path))
    return found

def report(options):
    """Merge OUT into the record, and write its tables and figures, those of the notes too."""
    found = record(options)
    os.makedirs(options.figures, exist_ok=True)
    write_text(os.path.join(options.figures, "study.json"), json.dumps(found) + "\n")
    text = all_tables(found)
    write_text(os.path.join(options.figures, "study.md"), text)
    draw_gains(found, os.path.join(options.figures, "study.png"))
    draw_curves(found, os.path.join(options.figures, "study-curves.png"))
    draw_fit(found, os.path.join(options.figures, "study-fit.png"))
    for path in (PAGES if options.figures == FIGURES else ()):
        with open(path, encoding="utf-8") as file:
            page = file.read()
        write_text(path, filled(page, found))
    print(text)


# ---------------------------------------------------------------------------------- arguments

def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "run", "flat", "lab", "table"))
    parser.add_argument("cell", nargs="?", choices=CELLS)
    parser.add_argument("--row", nargs="+", choices=ROWS, help="default: all of the cell")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: all of the cell")
    parser.add_argument("--recorded", action=argparse.BooleanOptionalAction, default=False,
                        help="tune, run: do not make a run again that study.json has")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--model", help="folder of MiniLM, for gsm8k of SmolLM2")
    parser.add_argument("--data", help="GLUE's root (default: GLUE_DATA), or GSM8K's (GSM8K_DATA)")
    parser.add_argument("--out", default=os.path.join("runs", "study"))
    parser.add_argument("--figures", default=FIGURES, help="folder of study.json; "
                        "`table` leaves the notes alone where it is another than theirs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    options, words = parser.parse_args(argv[:split]), argv[split + 1:]
    if words and options.command != "lab":
        parser.error(f"{words[0]}: only lab takes options after --")
    return parser, options, words

def main(argv=None):
    parser, options, words = parse_arguments(argv)
    try:
        if options.command == "table":
            report(options)
            return
        require(options.cell, f"{options.command} needs a cell: {', '.join(CELLS)}")
        install()
        cell = CELLS[options.cell]
        own = {"flat": FLAT, "lab": LAB}.get(options.command, cell.rows)
        count = FLAT_SEEDS if options.command in ("flat", "lab") else cell.seeds
        rows, seeds = options.row or own, options.seeds or range(count)
        for row in rows:
            require(row in cell.rows, f"{row} is no row of {options.cell}: {', '.join(cell.rows)}")
        require(not options.seeds or set(options.seeds) <= set(range(min(TUNING_SEEDS))),
                f"--seeds: expected 0 to {min(TUNING_SEEDS) - 1}; higher ones are for tuning")
        if options.command == "tune":
            tune(options.cell, rows, options)
        elif options.command == "flat":
            require(options.row is None, f"flat has rows of its own: {', '.join(FLAT)}")
            flat(options.cell, seeds, options)
        elif options.command == "lab":
            lab(options.cell, rows, seeds, options, words)
        else:
            run(options.cell, rows, seeds, options)
    except (ValueError, OSError, BrokenExecutor) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on")

if __name__ == "__main__":
    main()

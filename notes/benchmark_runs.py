"""What a whole run costs: this project's, and a plain loop of transformers and PEFT with the same
settings, in turn.

    pip install transformers==5.24.0 peft==0.21.2
    python notes/benchmark_runs.py glue --model all-MiniLM-L6-v2 --data DIR
    python notes/benchmark_runs.py gsm8k --model SmolLM2-135M --data DIR --rows 128

`glue` is an epoch of MRPC.  `gsm8k` is an epoch of the first rows of GSM8K, and short answers to
the first prompts of its test file.  Both are LoRA in bfloat16 autocast.  Ours is the main of the
training script; the other loop is plain_peft.py.

A run begins before anything is read; it ends when the adapter and the scores are saved.  Ours draws
curves too, and on GLUE it measures the rise.  Imports are in neither: a short run of each, which is
not counted, comes first.  The seconds of training are those of its steps; those of generation are
spent in `generate`.  Tokens a second leave out padding, and what follows a row's end.

Reported are medians over the rounds, and the ratio of ours to PEFT's in each round.
"""

import argparse
import contextlib
import gc
import importlib
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from itertools import islice
from types import SimpleNamespace
from unittest import mock

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_glue  # noqa: E402
import train_gsm8k  # noqa: E402
from model import Transformer, as_list, read_config, write_text  # noqa: E402

SCRIPTS = {"glue": (train_glue, "mrpc", train_glue.SETTINGS, train_glue.GLUE_OPTIONS),
           "gsm8k": (train_gsm8k, "gsm8k", train_gsm8k.TASKS, train_gsm8k.OPTIONS)}
SAME = ("parameters", "tokens")  # that are trained, and that training reads: equal, or no result
PROMPTS, NEW_TOKENS = 32, 64
SHORT = 16  # rows of the run that is not counted


def cut(task, source, folder, rows):
    """Copy the first rows of the data's files into the folder, but PROMPTS of GSM8K's test."""
    counts = {"train.jsonl": rows, "test.jsonl": min(rows, PROMPTS)}
    if task == "glue":
        source = train_glue.data_folder(SimpleNamespace(data=source), train_glue.TASKS["mrpc"])
        counts = {"train.tsv": 1 + rows, "dev.tsv": 1 + rows}  # after a header
    for name, count in counts.items():
        with open(os.path.join(source, name), "rb") as file:
            lines = list(islice(file, count))
        with open(os.path.join(folder, name), "wb") as file:
            file.writelines(lines)


def settings(options, data, out, seed):
    """(words, arguments) of our script's command."""
    script, task, *known = SCRIPTS[options.task]
    words = ["--task", task, "--method", "lora", "--epochs", "1", "--bf16", "--seeds", str(seed),
             "--model", options.model, "--data", data, "--out", out]
    if options.task == "gsm8k":
        words += ["--max-new-tokens", str(NEW_TOKENS)]
    return words, train_glue.parse_arguments(words, script.__doc__, *known)[0]


def ours(options, words, args):
    """The main of our script, and what plain_peft.run returns."""
    script, generated = SCRIPTS[options.task][0], []
    generate = timed(Transformer.generate, generated)
    with mock.patch.object(Transformer, "generate", generate), \
            contextlib.redirect_stdout(io.StringIO()):
        result, = script.main(words)["results"]
    with open(os.path.join(args.out, f"lora-seed{args.seeds[0]}", "log.jsonl")) as file:
        log = [json.loads(line) for line in file]
    scores = {name: result["metrics"][name] for name in ("accuracy", "f1") if not generated}
    return SimpleNamespace(losses=[row["loss"] for row in log], scores=scores, generated=generated,
                           training=sum(row["seconds"] for row in log),
                           parameters=sum(result["parameters"].values()))


def timed(generate, generated):
    """`generate`, which adds (seconds, new ids) of each call to `generated`."""
    def noted(*arguments):
        begin = time.perf_counter()
        ids = generate(*arguments)
        ids[0, 0].item()  # waits for the device
        generated.append((time.perf_counter() - begin, ids))
        return ids
    return noted


def theirs(options, words, args):
    import plain_peft
    return plain_peft.run(options.task, args)


RUNS = {"ours": ours, "PEFT": theirs}


# ------------------------------------------------------------------------------ what is counted
def count_read(task, args):
    """Tokens of an epoch: texts, or prompts and answers."""
    rows = SCRIPTS[task][0].load(args).rows
    if task == "glue":
        return sum(len(ids) for ids, *_ in rows)
    return sum(len(prompt) + len(answer) for prompt, answer, _ in rows)


def count_new(ids, ends):
    """Tokens of generated ids, (B, L): those of a row up to its first end, which is one of them."""
    end = torch.isin(ids, torch.tensor(ends, device=ids.device)).int()
    return (end.cumsum(1) - end == 0).sum().item()


def quantities(run, ends):
    """{what: number} of a run."""
    half = max(1, len(run.losses) // 2)
    found = {"parameters": run.parameters, "tokens": run.tokens, "run, s": run.seconds,
             "training, s": run.training, "training, tokens/s": run.tokens / run.training}
    if run.generated:
        seconds = sum(spent for spent, _ in run.generated)
        new = sum(count_new(ids, ends) for _, ids in run.generated)
        found |= {"generation, s": seconds, "generation, tokens/s": new / seconds}
    return {**found, "loss, first half": statistics.fmean(run.losses[:half]),
            "loss, second half": statistics.fmean(run.losses[-half:]), **run.scores}


# ----------------------------------------------------------------------------------- the rounds
def one_round(options, data, number):
    """{whose: its quantities}; who is first changes from round to round.  ValueError unless both
    trained as many parameters on as many tokens."""
    names, found = list(RUNS), {}
    for name in names[number % 2:] + names[:number % 2]:
        gc.collect()
        with tempfile.TemporaryDirectory() as out:
            words, args = settings(options, data, out, number)
            begin = time.perf_counter()
            run = RUNS[name](options, words, args)
            run.seconds = time.perf_counter() - begin
            if name == "ours":
                run.tokens = count_read(options.task, args)
            found[name] = quantities(run, as_list(read_config(args.model)[0].eos_id))
    for what in SAME:
        values = [found[name][what] for name in names]
        if values[0] != values[1]:
            raise ValueError(f"{what}: {values[0]} in our run, {values[1]} in PEFT's")
    return {name: found[name] for name in names}


def summary(rounds):
    """{what: the medians of both, that of the ratio, the ratio of each round}."""
    table = {}
    for what in rounds[0]["ours"]:
        pairs = [(row["ours"][what], row["PEFT"][what]) for row in rounds]
        ratios = [a / b for a, b in pairs]
        medians = [statistics.median(part) for part in (*zip(*pairs), ratios)]
        table[what] = dict(zip((*RUNS, "ratio"), medians)) | {"ratios": ratios}
    return table


def print_table(table):
    print(f"{'median':<22}{'ours':>10}{'PEFT':>10}{'ratio':>8}   of each round")
    for what, row in table.items():
        cells = [f"{row[name]:>10.0f}" if row[name] >= 1000 else f"{row[name]:>10.3f}"
                 for name in RUNS]
        ratios = " ".join(f"{ratio:.2f}" for ratio in row["ratios"])
        print(f"{what:<22}{''.join(cells)}{row['ratio']:>8.3f}   {ratios}")


def parse_arguments(argv):
    """The options.  What is not there ends the program before anything is timed."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=SCRIPTS)
    parser.add_argument("--model", required=True, help="folder of a checkpoint")
    parser.add_argument("--data", required=True, help="folder of the task's files")
    for name, least, default, text in (("rounds", 1, 5, "runs of each"),
                                       ("rows", SHORT, 10**6, "of a file, at most")):
        parser.add_argument(f"--{name}", type=partial(train_glue.number, int, least),
                            default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    options = parser.parse_args(argv)
    if options.out and not os.path.isdir(os.path.dirname(options.out) or "."):
        parser.error(f"--out is {options.out}; expected a file in a folder that exists")
    return options, parser.error


def require_libraries(fail):
    try:
        importlib.import_module("plain_peft")
    except ImportError as error:
        fail(f"{error}; run pip install transformers==5.24.0 peft==0.21.2")


def measured(options):
    """The rounds, after a short one."""
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as data:
        cut(options.task, options.data, few, SHORT)
        cut(options.task, options.data, data, options.rows)
        one_round(options, few, 0)
        return [one_round(options, data, i) for i in range(options.rounds)]


def main(argv=None):
    options, fail = parse_arguments(argv)
    require_libraries(fail)
    try:
        rounds = measured(options)
    except (ValueError, OSError) as error:
        fail(str(error))
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    table = summary(rounds)
    print(f"{options.task}, {options.model}, {options.rounds} rounds; {machine}, "
          + ", ".join(f"{name} {number}" for name, number in versions.items()))
    print_table(table)
    if options.out:
        report = {"config": vars(options), "machine": machine, "versions": versions,
                  "summary": table, "rounds": rounds}
        write_text(options.out, json.dumps(report, indent=2))
    return table


if __name__ == "__main__":
    main()

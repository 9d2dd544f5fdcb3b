"""What a step costs: methods of the table on the same encoder and batch, interleaved step by step.

    python notes/benchmark.py --bf16                       # a random encoder of MiniLM's shape
    python notes/benchmark.py --bf16 --model DIR           # a BERT folder
    python notes/benchmark.py --bf16 --method all          # every method of methods.py
    python notes/benchmark.py --bf16 --peft                # PEFT's LoRA layers too, if installed

Reported are the median over the rounds of a step's seconds, and of its ratio to the step of the
table's first method in the same round, which a drift of the machine's speed does not touch.  Peak
memory is that of a process which runs one method alone.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch

import methods
import train_glue
from bilora import bilora_optimizers
from model import Config, Transformer, write_text
from train_glue import METHODS, TASKS, Method, forward_backward, peak_memory, prepare

MINILM = Config(vocab_size=30522, d_model=384, d_ff=1536, heads=12, encoder_layers=6,
                token_types=2, norm_first=False, embedding_norm=True, pooler=True, eps=1e-12,
                num_labels=2)
FIRST = next(iter(METHODS))


def build(folder):
    if folder:
        return Transformer.from_pretrained(folder, num_labels=2)
    return Transformer(MINILM)


def peft_layers(args, model, auxiliary):
    """Set up PEFT's layers, in float32 as its get_peft_model has them, in place of ours."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype
    targets = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)
               and not {"classifier", "lm_head"} & set(name.split("."))]
    model.requires_grad_(False)
    config = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=targets)
    cast_adapter_dtype(inject_adapter_in_model(config, model), "default")
    if model.classifier is not None:
        model.classifier.requires_grad_(True)
    return [], *bilora_optimizers(model, args.lr)


OTHERS = {"peft": Method(METHODS[FIRST].step, setup=peft_layers)}  # of this file alone


def build_step(method, options):
    """A function of no argument that takes one training step of the method."""
    steps = options.warmup + options.rounds
    words = ["--task", "mrpc", "--model", options.model or "random", "--device", options.device,
             "--rank", str(options.rank), "--aux-rank", str(options.rank),
             "--alpha", str(2 * options.rank), "--micro-batch", str(options.batch_size)]
    args, _ = methods.parse(train_glue, words + ["--bf16"] * options.bf16)
    with mock.patch.dict(METHODS, OTHERS):
        run = prepare(args, method, 0, partial(build, options.model), "", steps)
        step = METHODS[method].step
    generator = torch.Generator().manual_seed(0)
    shortest, longest = options.length // 2, options.length
    lengths = torch.randint(shortest, longest + 1, (options.batch_size,), generator=generator)
    tokens = run.model.config.vocab_size
    rows = [(torch.randint(tokens, (n,), generator=generator).tolist(), [0] * n, n % 2)
            for n in lengths.tolist()]
    data = SimpleNamespace(task=TASKS["mrpc"], answers=None, pad_id=0)
    closure = partial(forward_backward, args, run.model.train(), data, rows)

    def timed():
        logged = step(run, closure)
        float(logged["loss"])  # waits for the device
        run.log.append(logged)
        if torch.device(options.device).type == "cuda":
            torch.cuda.synchronize()
    return timed


def time_methods(names, options):
    """{method: [seconds a round]}; the order rotates from round to round."""
    steps = {name: build_step(name, options) for name in names}
    seconds = {name: [] for name in names}
    for i in range(options.warmup + options.rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            begin = time.perf_counter()
            steps[name]()
            if i >= options.warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def memory_alone(method, argv):
    command = [sys.executable, os.path.abspath(__file__), *argv, "--memory-of", method]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="BERT folder (default: random weights)")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: %(default)s")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS)[:3],
                        help="beside the table's first one (default: %(default)s; all: every one)")
    parser.add_argument("--peft", action="store_true", help="time PEFT's LoRA as well")
    parser.add_argument("--memory-of", choices=(*METHODS, *OTHERS), help=argparse.SUPPRESS)
    for name, default, text in (("rounds", 40, ""), ("warmup", 3, "rounds not counted "),
                                ("batch-size", 32, ""), ("length", 64, "longest row, tokens "),
                                ("rank", 8, "r = r2 ")):
        parser.add_argument("--" + name, type=int, default=default,
                            help=text + "(default: %(default)s)")
    return parser.parse_args(methods.expanded(argv))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options, report = parse_arguments(argv), {}
    if options.memory_of:
        step = build_step(options.memory_of, options)
        for _ in range(3):
            step()
        print(json.dumps(peak_memory(options.device)))  # null where the system does not tell
        return None
    names = list(dict.fromkeys([FIRST, *options.method, *(OTHERS if options.peft else [])]))
    seconds = time_methods(names, options)
    machine = f"{platform.machine()} CPU"
    if torch.device(options.device).type == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, bf16 "
          f"{options.bf16}, batch {options.batch_size} x {options.length}, rank {options.rank}, "
          f"{options.rounds} rounds")
    print(f"{'method':<14} {'s/step':<8} {'/ ' + FIRST:<8} {'middle half':<16} peak MiB")
    for name in names:
        ratios = [b / a for a, b in zip(seconds[FIRST], seconds[name])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        memory, typical = memory_alone(name, argv), statistics.median(seconds[name])
        report[name] = {"seconds": typical, "ratio": middle, "quartiles": [low, high],
                        "peak_memory_bytes": memory}
        spread = f"{low:.3f} - {high:.3f}"
        print(f"{name:<14} {typical:<8.4f} {middle:<8.3f} {spread:<16} {(memory or 0) / 2**20:.0f}")
    if options.out:
        result = {"config": vars(options), "machine": machine, "methods": report}
        write_text(options.out, json.dumps(result, indent=2))
    return report


if __name__ == "__main__":
    main()

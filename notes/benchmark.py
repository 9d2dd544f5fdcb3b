"""What a step costs: methods of the table on the same model and batch, interleaved step by step.

    python notes/benchmark.py --bf16                         # a random encoder of MiniLM's shape
    python notes/benchmark.py --bf16 --shape llama-8b --layers 2    # random, and two layers of 32
    python notes/benchmark.py --bf16 --method all            # every method of methods.py
    python notes/benchmark.py --bf16 --model DIR --peft      # a checkpoint; PEFT's layers too
    python notes/benchmark.py --bf16 --dora                  # what else there is: of the script
    python notes/benchmark.py --bf16 --profile               # where the time goes, by operator

An encoder takes the step of train_glue.py.  So does an encoder-decoder, with answers in text.  A
decoder alone takes that of train_gsm8k.py; half of each of its rows is the answer.  Two more rows,
`floor` and `matmuls`, are those of floors.py: the passes without an adapter, and their matrix
products alone.

Reported are the median over the rounds of a step's seconds, and of its ratio to the step of the
table's first method in the same round, which a drift of the machine's speed does not touch.  Tokens
a second are those of the batch, without padding, over the median.  Peak memory is that of a process
which runs one row alone, over its steps: what building the model took and gave back does not count.
"""

import argparse
import contextlib
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch.profiler import profile

import methods
import train_glue
import train_gsm8k
from bilora import bilora_optimizers
from floors import FLOORS
from model import Config, Transformer, local_folder, read_config, write_text
from train_glue import METHODS, TASKS, Method, number, peak_memory, prepare

LLAMA = partial(Config, positions="rotary", norm="rms", gated=True, activation="silu", bias=False,
                qkv_bias=False)
SHAPES = {  # as published; what costs no time keeps its default
    "minilm": Config(vocab_size=30522, d_model=384, d_ff=1536, heads=12, encoder_layers=6,
                     token_types=2, norm_first=False, embedding_norm=True, pooler=True, eps=1e-12,
                     num_labels=2),
    "t5-base": Config(vocab_size=32128, d_model=768, d_ff=3072, heads=12, encoder_layers=12,
                      decoder_layers=12, positions="relative", max_length=None, norm="rms",
                      activation="relu", bias=False, qkv_bias=False),
    "smollm2": LLAMA(vocab_size=49152, d_model=576, d_ff=1536, heads=9, kv_heads=3,
                     decoder_layers=30, max_length=8192),
    "llama-1b": LLAMA(vocab_size=128256, d_model=2048, d_ff=8192, heads=32, kv_heads=8,
                      decoder_layers=16, max_length=131072),
    "llama-8b": LLAMA(vocab_size=128256, d_model=4096, d_ff=14336, heads=32, kv_heads=8,
                      decoder_layers=32, max_length=131072, tied=False)}
FIRST = next(iter(METHODS))


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


OTHERS = {"peft": Method(METHODS[FIRST].step, setup=peft_layers), **FLOORS}  # of this file alone


def shape(options):
    """The Config of --shape, with at most --layers layers in each stack."""
    config = SHAPES[options.shape]
    if options.layers is None:
        return replace(config)
    return replace(config, encoder_layers=min(config.encoder_layers, options.layers),
                   decoder_layers=min(config.decoder_layers, options.layers))


def config_of(options):
    """That of --model, or else of --shape."""
    return read_config(local_folder(options.model))[0] if options.model else shape(options)


def build(options):
    """The model that all rows share.  With --bf16 a decoder alone is in bfloat16, as
    train_gsm8k.py has it."""
    folder = local_folder(options.model) if options.model else None
    config = config_of(options)
    dtype = torch.bfloat16 if options.bf16 and not config.encoder_layers else torch.float32
    if folder:
        labels = None if config.decoder_layers else 2
        return Transformer.from_pretrained(folder, labels, dtype).to(options.device)
    torch.set_default_dtype(dtype)  # never in float32 first: that would be the peak of the memory
    try:
        with torch.device(options.device):
            return Transformer(config)
    finally:
        torch.set_default_dtype(torch.float32)


def copy_of(base):
    """The model again, on the same weights but for a classifier, which is trained.  (Full
    fine-tuning trains them all, for the other rows too; no time depends on their values.)"""
    shared = {id(p): torch.nn.Parameter(p.detach()) for name, p in base.named_parameters()
              if not name.startswith("classifier.")}
    return copy.deepcopy(base, shared)


def example(options, config):
    """(script, its task, data, rows): what a batch of random tokens is for such a model."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(options.length // 2, options.length + 1, (options.batch_size,),
                            generator=generator).tolist()

    def tokens(n):
        return torch.randint(config.vocab_size, (n,), generator=generator).tolist()

    if not config.encoder_layers:
        rows = [(tokens(n - n // 2), tokens(n // 2), None) for n in lengths]
        return train_gsm8k, "gsm8k", SimpleNamespace(pad_id=0), rows
    rows = [(tokens(n), [0] * n, n % 2) for n in lengths]
    answers = [tokens(2), tokens(2)] if config.decoder_layers else []  # a word and the end
    return train_glue, "mrpc", SimpleNamespace(task=TASKS["mrpc"], answers=answers, pad_id=0), rows


def batch_tokens(options, config):
    """Tokens of the batch: its answers in text count too, padding does not."""
    script, _, data, rows = example(options, config)
    if script is train_gsm8k:
        return sum(len(prompt) + len(answer) for prompt, answer, _ in rows)
    answers = sum(len(data.answers[label]) for *_, label in rows) if data.answers else 0
    return answers + sum(len(ids) for ids, *_ in rows)


def prepared(name, base, options):
    """(run, closure) of a row, as the script has them at each step."""
    script, task, data, rows = example(options, base.config)
    words = ["--task", task, "--model", "random", "--device", options.device,
             "--bf16" if options.bf16 else "--no-bf16", "--rank", str(options.rank),
             "--aux-rank", str(options.rank), "--alpha", str(2 * options.rank),
             "--micro-batch", str(options.batch_size), *options.rest]
    args, _ = methods.parse(script, words)
    steps = 1 + options.warmup + options.rounds
    with mock.patch.dict(METHODS, OTHERS):
        run = prepare(args, name, 0, partial(copy_of, base), "", steps)
    return run, partial(script.forward_backward, args, run.model.train(), data, rows)


def build_step(name, base, options):
    """A function of no argument that takes one training step of the row."""
    run, closure = prepared(name, base, options)
    step = {**METHODS, **OTHERS}[name].step

    def timed():
        logged = step(run, closure)
        float(logged["loss"])  # waits for the device
        run.log.append(logged)
        if torch.device(options.device).type == "cuda":
            torch.cuda.synchronize()
    return timed


def steps_of(names, options):
    """({row: its step}, {row: why it is left out}).  Each takes a first step here, untimed."""
    base, steps, left_out = build(options), {}, {}
    for name in names:
        try:
            step = build_step(name, base, options)
            step()
            steps[name] = step
        except ValueError as error:
            left_out[name] = str(error)
    return steps, left_out


def time_rows(steps, options):
    """{row: [seconds a round]}; the order rotates from round to round."""
    names, seconds = list(steps), {name: [] for name in steps}
    for i in range(options.warmup + options.rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            begin = time.perf_counter()
            steps[name]()
            if i >= options.warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def machine(device):
    """What the steps ran on, in words."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} threads, torch {torch.__version__}"


def memory_alone(name, argv):
    command = [sys.executable, os.path.abspath(__file__), *argv, "--memory-of", name]
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives freed tensors back
    printed = subprocess.run(command, check=True, capture_output=True, text=True,
                             env=settings).stdout
    return json.loads(printed.splitlines()[-1])


def profiled(steps, rounds=5, rows=12):
    """Print the operators that take longest, in milliseconds a step of each row."""
    times, together = {}, {}
    for name, step in steps.items():
        with profile() as found:
            for _ in range(rounds):
                step()
        for event in found.key_averages():
            spent = event.self_cpu_time_total + event.self_device_time_total
            times.setdefault(event.key, {})[name] = spent / 1000 / rounds
        together[name] = sum(own.get(name, 0.0) for own in times.values())
    longest = sorted(times.items(), key=lambda item: -max(item[1].values()))[:rows]
    print("".join(f"{word:<26}" for word in ("ms a step", *steps)))
    for key, own in [*longest, ("together", together)]:
        numbers = "".join(f"{own.get(name, 0.0):<26.1f}" for name in steps)
        print(f"{key:<26}{numbers}")


def forget_peak():
    """On Linux peak_memory begins anew at the resident size there is.  (On a GPU `prepare` sees to
    it.)"""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measured(name, seconds, tokens, argv):
    """The row's numbers, which are printed too."""
    ratios = [b / a for a, b in zip(seconds[FIRST], seconds[name])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    memory, typical = memory_alone(name, argv), statistics.median(seconds[name])
    spread = f"{low:.3f} - {high:.3f}"
    print(f"{name:<18} {typical:<8.4f} {tokens / typical:<9.0f} {middle:<8.3f} {spread:<16} "
          f"{(memory or 0) / 2**20:.0f}")
    return {"seconds": typical, "tokens_per_second": tokens / typical, "ratio": middle,
            "quartiles": [low, high], "peak_memory_bytes": memory}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="a checkpoint: folder or id on the hub")
    source.add_argument("--shape", choices=SHAPES, default="minilm",
                        help="random weights of that shape (default: %(default)s)")
    parser.add_argument("--layers", type=int, choices=range(1, 33), metavar="N",
                        help="of --shape, the first N in each stack (default: all)")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: %(default)s")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS)[:3],
                        help="beside the table's first one (default: %(default)s; all: every one)")
    parser.add_argument("--peft", action="store_true", help="time PEFT's LoRA as well")
    parser.add_argument("--profile", action="store_true",
                        help="print the operators that take longest, and time nothing else")
    parser.add_argument("--memory-of", choices=(*METHODS, *OTHERS), help=argparse.SUPPRESS)
    for name, least, default, text in (  # quartiles need two rounds
            ("rounds", 2, 40, ""), ("warmup", 0, 3, "rounds not counted "),
            ("batch-size", 1, 32, ""), ("length", 2, 64, "longest row, tokens "),
            ("rank", 1, 8, "r = r2 ")):
        parser.add_argument("--" + name, type=partial(number, int, least), default=default,
                            help=text + "(default: %(default)s)")
    options, rest = parser.parse_known_args(methods.expanded(argv))
    options.rest = rest  # of the script: --dora, --init pissa, --checkpointing
    require_possible(options, parser.error)
    return options


def require_possible(options, fail):
    """What argparse does not see."""
    if options.model and options.layers:
        fail("--layers goes with --shape, not with --model")
    if options.out and not os.path.isdir(os.path.dirname(options.out) or "."):
        fail(f"--out is {options.out}; expected a file in a folder that exists")
    try:
        config_of(options)
    except (ValueError, OSError) as error:
        fail(str(error))
    require_device(options.device, fail)


def require_device(device, fail):
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {device}: {str(error).splitlines()[0]}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options, report = parse_arguments(argv), {}
    if options.memory_of:
        step = build_step(options.memory_of, build(options), options)
        forget_peak()
        for _ in range(3):
            step()
        print(json.dumps(peak_memory(options.device)))  # null where the system does not tell
        return None
    names = dict.fromkeys([FIRST, *options.method, *(OTHERS if options.peft else FLOORS)])
    steps, left_out = steps_of(names, options)
    if FIRST in left_out:
        print(f"error: {FIRST}: {left_out[FIRST]}", file=sys.stderr)
        raise SystemExit(2)
    if options.profile:
        return profiled(steps)
    seconds, tokens = time_rows(steps, options), batch_tokens(options, config_of(options))
    print(f"{options.model or options.shape}, {options.layers or 'all'} layers, batch "
          f"{options.batch_size} x {options.length}, rank {options.rank}, bf16 {options.bf16}, "
          f"{options.rounds} rounds; {machine(options.device)}")
    print(f"{'method':<18} {'s/step':<8} {'tokens/s':<9} {'/ ' + FIRST:<8} {'middle half':<16} "
          "peak MiB")
    for name in names:
        if name in left_out:
            report[name] = {"left_out": left_out[name]}
            print(f"{name:<18} left out: {left_out[name]}")
        else:
            report[name] = measured(name, seconds, tokens, argv)
    if options.out:
        result = {"config": vars(options), "machine": machine(options.device), "methods": report}
        write_text(options.out, json.dumps(result, indent=2))
    return report


if __name__ == "__main__":
    main()

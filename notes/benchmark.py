"""What a step costs: LoRA, LoRA-SAM and Bi-LoRA on the same encoder and batch, interleaved step by step.

    python notes/benchmark.py --bf16                       # a random encoder of MiniLM's shape
    python notes/benchmark.py --bf16 --model DIR           # a BERT folder
    python notes/benchmark.py --bf16 --peft                # PEFT's LoRA layers in the same encoder too, if installed

Reported are the median over the rounds of a step's seconds, and of its ratio to the LoRA step of the same round, which a
drift of the machine's speed does not touch.  Peak memory is that of a process which runs one method alone.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from bilora import (add_lora, bilora_optimizers, bilora_power_step, bilora_step, lora_sam_step, lora_step,  # noqa: E402
                    primary_parameters)
from model import Config, Transformer  # noqa: E402
from train_glue import METHODS, TASKS, Experiment, forward_backward, peak_memory, reset_peak_memory  # noqa: E402

MINILM = Config(vocab_size=30522, d_model=384, d_ff=1536, heads=12, encoder_layers=6, token_types=2, norm_first=False,
                embedding_norm=True, pooler=True, eps=1e-12, num_labels=2)


def build_step(method, args):
    """A function of no argument that takes one training step of the method."""
    torch.manual_seed(0)
    model = Transformer.from_pretrained(args.model, num_labels=2) if args.model else Transformer(MINILM)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.to(args.device)
    if method == "peft":
        from peft import LoraConfig, inject_adapter_in_model
        targets = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "classifier"]
        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=targets), model)
        layers = []
    else:
        layers = add_lora(model, args.rank, 2 * args.rank, args.rank if method.startswith("bi-lora") else 0)
    model.classifier.requires_grad_(True)
    model.train()
    (descent, ascent), primary = bilora_optimizers(model, 5e-4), primary_parameters(model)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(args.length // 2, args.length + 1, (args.batch_size,), generator=generator).tolist()
    experiment = Experiment(TASKS["mrpc"], None, None, 0, "accuracy", [])
    examples = [(torch.randint(1000, 20000, (n,), generator=generator).tolist(), [0] * n, n % 2) for n in lengths]

    def closure():
        return forward_backward(model, experiment, examples, args)

    def step():
        if method in ("lora", "peft"):
            lora_step(descent, closure).item()
        elif method == "lora-sam":
            lora_sam_step(descent, closure, 0.01, primary).item()
        elif method == "bi-lora":
            bilora_step(descent, ascent, closure, layers, 0.05).item()
        elif method == "bi-lora-power":
            bilora_power_step(descent, closure, layers, 0.05).item()
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
    return step


def time_methods(methods, args):
    """{method: [seconds a round]}; the order rotates from round to round."""
    steps, seconds = {method: build_step(method, args) for method in methods}, {method: [] for method in methods}
    for i in range(args.warmup + args.rounds):
        for method in methods[i % len(methods):] + methods[:i % len(methods)]:
            begin = time.perf_counter()
            steps[method]()
            if i >= args.warmup:
                seconds[method].append(time.perf_counter() - begin)
    return seconds


def memory_alone(method, argv):
    command = [sys.executable, os.path.abspath(__file__), *argv, "--memory-of", method]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="BERT folder (default: random weights)")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--warmup", type=int, default=3, help="rounds not counted (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=64, help="longest row, tokens (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="r = r2 (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--peft", action="store_true", help="time PEFT's LoRA as well")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    parser.add_argument("--memory-of", choices=(*METHODS, "peft"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.micro_batch = None
    if args.memory_of:
        step = build_step(args.memory_of, args)
        reset_peak_memory(args.device)
        for _ in range(3):
            step()
        print(json.dumps(peak_memory(args.device)))  # null where the system does not tell
        return None
    methods = [*METHODS, *(["peft"] if args.peft else [])]
    seconds = time_methods(methods, args)
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()} CPU"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, bf16 {args.bf16}, batch "
          f"{args.batch_size} x {args.length}, rank {args.rank}, {args.rounds} rounds")
    print(f"{'method':<14} {'s/step':<8} {'/ LoRA':<8} {'middle half':<16} peak MiB")
    report = {}
    for method in methods:
        ratios = [b / a for a, b in zip(seconds["lora"], seconds[method])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        report[method] = {"seconds": statistics.median(seconds[method]), "ratio": middle, "quartiles": [low, high],
                          "peak_memory_bytes": memory_alone(method, argv)}
        print(f"{method:<14} {report[method]['seconds']:<8.4f} {middle:<8.3f} {f'{low:.3f} - {high:.3f}':<16} "
              f"{(report[method]['peak_memory_bytes'] or 0) / 2**20:.0f}")
    if args.out:
        with open(args.out + ".tmp", "w") as file:
            json.dump({"config": vars(args), "machine": machine, "methods": report}, file, indent=2)
        os.replace(args.out + ".tmp", args.out)
    return report


if __name__ == "__main__":
    main()

"""What several processes send each other in a step, computed from a model's shape alone.

    python notes/traffic.py                       # Llama-2-7B and 70B, eight processes
    python notes/traffic.py --gigabytes 400       # of a faster link

Each process sends 2 (N - 1) / N times the gradients of what is trained, in float32, once a pass: an
all-reduce around a ring.  With --fsdp it also gets (N - 1) / N of the blocks' frozen weights, in
bfloat16, once for the forward and once for the backward pass of each micro-batch.

A pass takes 4 P operations a token: 2 P forward, and 2 P for the gradient of the activations, since
no weight of the base has one.  The last two rows are the tokens at which sending takes as long as
computing.  With fewer, the link is what a step waits for.
"""

import argparse
from dataclasses import replace

from memory import LLAMA_2_7B, METHODS, adapted, pair_parameters

MODELS = {"Llama-2-7B": LLAMA_2_7B,
          "Llama-2-70B": replace(LLAMA_2_7B, d_model=8192, d_ff=28672, heads=64, kv_heads=8,
                                 decoder_layers=80)}


def traffic(config, method, count, rank, flops, speed):
    """{what: number}; flops and speed: operations and bytes a second."""
    parameters, linears = adapted(config)
    passes = 2 if method == "lora-sam" else 1
    pairs = pair_parameters(linears, rank) * (2 if method == "bi-lora" else 1)
    ring, frozen = (count - 1) / count, sum(linear.weight.numel() for linear in linears)
    gradients, weights = 2 * ring * 4 * pairs, 2 * ring * 2 * frozen  # a pass
    token = 4 * parameters / flops  # seconds
    return {"gradients, MB a step": passes * gradients / 1e6,
            "--fsdp: weights, GB a step of one micro-batch": passes * weights / 1e9,
            "tokens a process and step": gradients / speed / token,
            "--fsdp: tokens a micro-batch": (gradients + weights) / speed / token}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default, text in (
            ("processes", int, 8, ""), ("rank", int, 8, "r = r2 "),
            ("teraflops", float, 400, "of one GPU, reached in bfloat16; assumed "),
            ("gigabytes", float, 25, "a second of the link of one GPU; assumed ")):
        parser.add_argument(f"--{name}", type=kind, default=default,
                            help=text + "(default: %(default)s)")
    args, report = parser.parse_args(argv), {}
    for name, config in MODELS.items():
        report[name] = [traffic(config, method, args.processes, args.rank, args.teraflops * 1e12,
                                args.gigabytes * 1e9) for method in METHODS]
        print(f"| {name} | {' | '.join(METHODS)} |\n|---|---|---|---|")
        for what in report[name][0]:
            print(f"| {what} | " + " | ".join(f"{row[what]:.3g}" for row in report[name]) + " |")
    return report


if __name__ == "__main__":
    main()

"""What a training step keeps in memory, computed from a model's shape alone.

    python notes/memory.py                                # Llama-2-7B with the paper's settings
    python notes/memory.py --config DIR/config.json --micro-batch 2 --max-length 512

The base is frozen, in bfloat16.  The adapters, their gradients and AdamW's two moments are in
float32; plain SGD, which ascends, keeps no state.  With --checkpointing each block keeps its input
alone, and one block at a time keeps what its backward pass needs.  The logits are computed for the
answers' tokens alone, here for half of the row: in bfloat16, and twice in float32 for the loss and
its gradient.  Left out: what the allocator and the kernels take for themselves, about 1 to 2 GB on
a GPU.
"""

import argparse
import os
import sys

import torch
import torch.nn as nn

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from model import Config, Transformer, read_config  # noqa: E402

LLAMA_2_7B = Config(vocab_size=32000, d_model=4096, d_ff=11008, heads=32, decoder_layers=32,
                    positions="rotary", norm="rms", gated=True, activation="silu", bias=False,
                    qkv_bias=False, max_length=4096, tied=False)
METHODS = ("lora", "lora-sam", "bi-lora")


def adapted(config):
    """(parameters of the base, the nn.Linear that add_lora would adapt); their shapes alone."""
    with torch.device("meta"):
        model = Transformer(config)
    linears = [module for name, module in model.named_modules() if isinstance(module, nn.Linear)
               and not {"lm_head", "classifier"} & set(name.split("."))]
    return sum(p.numel() for p in model.parameters()), linears


def pair_parameters(linears, rank):
    """B (m, rank) and A (rank, n) of each."""
    return sum(rank * (linear.out_features + linear.in_features) for linear in linears)


def block_bytes(config, tokens, low):
    """Of one block's tensors that its backward pass reads, in bfloat16: the inputs of its linear
    layers and their low-rank products, `low` numbers a token; queries, keys, values and the
    attention's output, the MLP's two branches and their product, and the norms' inputs."""
    E = config.head_dim or config.d_model // config.heads
    attention = (2 * config.heads + 2 * (config.kv_heads or config.heads)) * E
    mlp = 4 * config.d_ff if config.gated else 2 * config.d_ff
    return 2 * tokens * (6 * config.d_model + attention + mlp + low)


def budget(config, method, rank, aux_rank, micro_batch, max_length):
    """{what: bytes}"""
    if method != "bi-lora":
        aux_rank = 0
    parameters, linears = adapted(config)
    descending = 4 * pair_parameters(linears, rank)
    adapters = descending + 4 * pair_parameters(linears, aux_rank)
    copies = adapters if method == "lora-sam" else 0  # to go back to
    tokens, blocks = micro_batch * max_length, config.encoder_layers + config.decoder_layers
    low = len(linears) // blocks * (rank + aux_rank)
    return {"base, bfloat16": 2 * parameters, "adapters, float32": adapters,
            "their gradients": adapters, "AdamW's moments": 2 * descending,
            "copies of the adapters": copies,
            "inputs of the blocks": blocks * tokens * config.d_model * 2,
            "one block": block_bytes(config, tokens, low),
            "logits and their gradient": tokens // 2 * config.vocab_size * (2 + 4 + 4)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config",
                        help="config.json of a checkpoint (default: Llama-2-7B's shape)")
    for name, default in (("rank", 8), ("aux-rank", 8), ("micro-batch", 4), ("max-length", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args, config = parser.parse_args(argv), LLAMA_2_7B
    if args.config:
        config, _ = read_config(os.path.dirname(args.config) or ".")
    sizes = args.rank, args.aux_rank, args.micro_batch, args.max_length
    rows = [budget(config, method, *sizes) for method in METHODS]
    print("| GB | " + " | ".join(METHODS) + " |\n|---|---|---|---|")
    for what in rows[0]:
        print(f"| {what} | " + " | ".join(f"{row[what] / 1e9:.2f}" for row in rows) + " |")
    sums = [f"**{sum(row.values()) / 1e9:.2f}**" for row in rows]
    print("| **together** | " + " | ".join(sums) + " |")
    return rows


if __name__ == "__main__":
    main()

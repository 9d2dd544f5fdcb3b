"""What a training step keeps in memory, computed from a model's shape alone.

    python notes/memory.py                                # Llama-2-7B with the paper's settings
    python notes/memory.py --config DIR/config.json --micro-batch 2 --max-length 512

The base is in bfloat16 and frozen, the adapters, their gradients and AdamW's two moments are in float32; plain SGD, which
ascends, keeps no state.  With
--checkpointing each block keeps its input alone, and one block at a time keeps what its backward pass needs; the logits
are computed for the answers' tokens alone, here for half of the row, in bfloat16 and, for the loss and its gradient, twice
in float32.  Left out: what the allocator and the kernels take for themselves, about 1 to 2 GB on a GPU.
"""

import argparse
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from bilora import add_lora, auxiliary_parameters, primary_parameters  # noqa: E402
from model import Config, Transformer, read_config  # noqa: E402

LLAMA_2_7B = Config(vocab_size=32000, d_model=4096, d_ff=11008, heads=32, decoder_layers=32, positions="rotary", norm="rms",
                    gated=True, activation="silu", bias=False, qkv_bias=False, max_length=4096, tied=False)


def block_bytes(config, tokens, linears):
    """Of one block's tensors that its backward pass reads, in bfloat16: the inputs and low-rank products of its linear layers,
    queries, keys, values and the attention's output, the MLP's two branches and their product, and the norms' inputs."""
    E = config.head_dim or config.d_model // config.heads
    attention = (2 * config.heads + 2 * (config.kv_heads or config.heads)) * E
    mlp = 4 * config.d_ff if config.gated else 2 * config.d_ff
    low = sum(layer.rank + (0 if layer.aux_A is None else len(layer.aux_A)) for layer in linears)
    return 2 * tokens * (6 * config.d_model + attention + mlp + low)


def budget(config, method, rank, aux_rank, micro_batch, max_length):
    """{what: bytes}"""
    with torch.device("meta"):
        model = Transformer(config)
    layers = add_lora(model, rank, 2 * rank, aux_rank if method == "bi-lora" else 0)
    descending = 4 * sum(p.numel() for p in primary_parameters(model))
    adapters = descending + 4 * sum(p.numel() for p in auxiliary_parameters(model))
    base = 2 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    tokens, blocks = micro_batch * max_length, config.encoder_layers + config.decoder_layers
    return {"base, bfloat16": base, "adapters, float32": adapters, "their gradients": adapters, "AdamW's moments": 2 * descending,
            "copies of the adapters": adapters if method == "lora-sam" else 0,  # to go back to
            "inputs of the blocks": blocks * tokens * config.d_model * 2,
            "one block": block_bytes(config, tokens, layers[:len(layers) // blocks]),
            "logits and their gradient": tokens // 2 * config.vocab_size * (2 + 4 + 4)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="config.json of a checkpoint (default: Llama-2-7B's shape)")
    for name, default in (("rank", 8), ("aux-rank", 8), ("micro-batch", 4), ("max-length", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args(argv)
    config = read_config(os.path.dirname(args.config) or ".")[0] if args.config else LLAMA_2_7B
    methods = ("lora", "lora-sam", "bi-lora")
    rows = [budget(config, method, args.rank, args.aux_rank, args.micro_batch, args.max_length) for method in methods]
    print("| GB | " + " | ".join(methods) + " |\n|---|---|---|---|")
    for what in rows[0]:
        print(f"| {what} | " + " | ".join(f"{row[what] / 1e9:.2f}" for row in rows) + " |")
    print("| **together** | " + " | ".join(f"**{sum(row.values()) / 1e9:.2f}**" for row in rows) + " |")
    return rows


if __name__ == "__main__":
    main()

"""A small Llama-like checkpoint that has read GSM8K's training file, for trying train_gsm8k.py on
real text.

    python notes/tiny_decoder.py DATA OUT

DATA has train.jsonl; OUT gets config.json, weights and tokenizer.json.  A byte-level BPE tokenizer
of 2,000 tokens is trained on the file, then a decoder of 4 layers, 256 wide, on its problems.
"""

import argparse
import json
import math
import os
import sys
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from model import Transformer, module_names, read_config, write_safetensors  # noqa: E402
from train_glue import answer_losses, cosine_schedule, plan_batches  # noqa: E402
from train_gsm8k import encode, read_jsonl  # noqa: E402

EOS = 1
CONFIG = {"model_type": "llama", "vocab_size": 2000, "hidden_size": 256, "intermediate_size": 704,
          "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
          "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
          "hidden_act": "silu", "rope_theta": 10000.0, "eos_token_id": EOS, "bos_token_id": None}


def train_tokenizer(rows):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=CONFIG["vocab_size"], show_progress=False,
                                  special_tokens=["<pad>", "<eos>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([text for row in rows for text in row], trainer)
    return tokenizer


def train_model(model, examples, steps):
    """On batches of 16 problems, in bfloat16, by the loss of the answers' tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, fused=True)
    schedule = cosine_schedule(optimizer, steps, warmup=0.05)
    settings = SimpleNamespace(batch_size=16, epochs=math.ceil(16 * steps / len(examples)))
    plan = plan_batches(settings, 0, [len(row[0]) for row in examples])[:steps]
    for step, (_, batch) in enumerate(tqdm(plan, disable=None), 1):
        prompts, answers, _ = zip(*(examples[i] for i in batch))
        with torch.autocast("cpu", torch.bfloat16):
            losses = answer_losses(model, prompts, answers, 0, torch.device("cpu"))
            loss = losses.sum() / sum(map(len, answers))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in (1, 10, 100, steps):
            print(f"step {step}: loss {loss.item():.3f} a token of the answers", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=600,
                        help="of 16 problems (default: %(default)s)")
    args = parser.parse_args()
    rows = read_jsonl(os.path.join(args.data, "train.jsonl"))
    tokenizer = train_tokenizer(rows)
    os.makedirs(args.out, exist_ok=True)
    tokenizer.save(os.path.join(args.out, "tokenizer.json"))
    with open(os.path.join(args.out, "config.json"), "w") as file:
        json.dump(CONFIG, file)
    config, family = read_config(args.out)
    torch.manual_seed(0)
    model, examples = Transformer(config).train(), encode(tokenizer, rows, EOS)
    prompts, answers = (sum(len(row[i]) for row in examples) for i in (0, 1))
    print(f"{len(rows)} problems, {prompts + answers} tokens, {answers} of them in answers; "
          f"{sum(p.numel() for p in model.parameters())} parameters")
    train_model(model, examples, args.steps)
    theirs = {ours: theirs for theirs, ours in module_names(config, family).items()}
    tensors = {f"{theirs[name.rpartition('.')[0]]}.weight": p.detach()
               for name, p in model.named_parameters()}
    write_safetensors(os.path.join(args.out, "model.safetensors"), tensors)


if __name__ == "__main__":
    main()

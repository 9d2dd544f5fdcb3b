"""What generation costs: greedy, with a cache, beside transformers' own on the same weights,
interleaved round by round.

    pip install transformers==5.23.0 && python notes/benchmark_generate.py --bf16

The model is a random decoder of SmolLM2-135M's shape.  The prompts are of 32 to 64 tokens, padded
on the left.  Reported are the medians over the rounds: of the new tokens a second, and of the ratio
of the two in the same round.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time

import torch
import transformers

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from model import Transformer, write_text  # noqa: E402

SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
               num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
               tie_word_embeddings=True, eos_token_id=None, bos_token_id=None)
LONGEST = 64  # tokens of a prompt; the shortest has half


def models(args):
    """(ours, theirs): the same random weights."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = Transformer.from_pretrained(folder, dtype=dtype).to(args.device)
    return ours, theirs.to(args.device, dtype).eval()


def prompts(args):
    """(ids, mask)."""
    lengths = torch.linspace(LONGEST // 2, LONGEST, args.batch_size).long()
    mask = (torch.arange(LONGEST)[None] >= LONGEST - lengths[:, None]).long().to(args.device)
    ids = torch.randint(0, SMOLLM2["vocab_size"], mask.shape, device=args.device) * mask
    return ids, mask


def generators(args):
    """{name: a function of no argument that returns the new ids}."""
    (ours, theirs), (ids, mask) = models(args), prompts(args)

    def generate():
        return ours.generate(ids, mask, args.new_tokens)

    def generate_theirs():
        found = theirs.generate(input_ids=ids, attention_mask=mask, do_sample=False,
                                max_new_tokens=args.new_tokens, pad_token_id=0)
        return found[:, ids.shape[1]:]
    return {"ours": generate, "transformers": generate_theirs}


def time_rounds(functions, rounds):
    """{name: [seconds a round]}; the order changes from round to round."""
    names, seconds = list(functions), {name: [] for name in functions}
    for i in range(rounds):
        for name in names[i % 2:] + names[:i % 2]:
            begin = time.perf_counter()
            functions[name]()[0, 0].item()  # waits for the device
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 7), ("batch-size", 16), ("new-tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: %(default)s")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False,
                        help="weights in bfloat16")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    functions = generators(args)
    ours, theirs = (function() for function in functions.values())  # a round that is not counted
    agree = (ours == theirs).float().mean().item()
    seconds = time_rounds(functions, args.rounds)
    machine = f"{platform.machine()} CPU"
    if args.device.startswith("cuda"):
        machine = torch.cuda.get_device_name()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}, bf16 {args.bf16}, batch {args.batch_size}, "
          f"{args.new_tokens} new tokens, {args.rounds} rounds; {100 * agree:.1f} % of the tokens "
          "agree")
    tokens = args.batch_size * args.new_tokens
    rate = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["transformers"])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"ours {rate['ours']:.0f} tokens/s, transformers {rate['transformers']:.0f} tokens/s, "
          f"ratio {middle:.2f} ({low:.2f} - {high:.2f})")
    if args.out:
        report = {"config": vars(args), "machine": machine, "tokens_per_second": rate,
                  "ratios": ratios, "agree": agree}
        write_text(args.out, json.dumps(report))


if __name__ == "__main__":
    main()

"""What generation costs: greedy, with a cache, beside transformers' own on the same weights, interleaved round by round.

    pip install transformers==5.23.0 && python notes/benchmark_generate.py --bf16

The model is a random decoder of SmolLM2-135M's shape, the prompts are of 32 to 64 tokens, padded on the left.  Reported are
the median over the rounds of the new tokens a second, and of the ratio of the two in the same round.
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
from model import Transformer  # noqa: E402

SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False, help="weights in bfloat16")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    args = parser.parse_args(argv)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = Transformer.from_pretrained(folder, dtype=dtype).to(args.device)
    theirs = theirs.to(args.device, dtype).eval()
    lengths = torch.linspace(32, 64, args.batch_size).long()
    mask = (torch.arange(64)[None] >= 64 - lengths[:, None]).long().to(args.device)
    ids = torch.randint(0, SMOLLM2["vocab_size"], mask.shape, device=args.device) * mask

    def run(name):
        if name == "ours":
            return ours.generate(ids, mask, args.new_tokens)
        return theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=args.new_tokens, do_sample=False,
                               pad_token_id=0)[:, ids.shape[1]:]

    names, seconds = ["ours", "transformers"], {"ours": [], "transformers": []}
    agree = (run("ours") == run("transformers")).float().mean().item()  # and a round that is not counted
    for i in range(args.rounds):
        for name in names[i % 2:] + names[:i % 2]:
            begin = time.perf_counter()
            run(name)[0, 0].item()
            seconds[name].append(time.perf_counter() - begin)
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()} CPU"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"bf16 {args.bf16}, batch {args.batch_size}, {args.new_tokens} new tokens, {args.rounds} rounds; "
          f"{100 * agree:.1f} % of the tokens agree")
    rate = {name: args.batch_size * args.new_tokens / statistics.median(seconds[name]) for name in names}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["transformers"])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"ours {rate['ours']:.0f} tokens/s, transformers {rate['transformers']:.0f} tokens/s, ratio {middle:.2f} ({low:.2f} - {high:.2f})")
    if args.out:
        with open(args.out + ".tmp", "w") as file:
            json.dump({"config": vars(args), "machine": machine, "tokens_per_second": rate, "ratios": ratios, "agree": agree}, file)
        os.replace(args.out + ".tmp", args.out)


if __name__ == "__main__":
    main()

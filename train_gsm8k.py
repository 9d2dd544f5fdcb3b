"""Fine-tune a decoder on grade-school word problems with LoRA, LoRA-SAM and Bi-LoRA, and score what
it generates.

    python train_gsm8k.py                                               # the demo: minutes on a CPU
    python train_gsm8k.py --task gsm8k --model meta-llama/Llama-3.2-1B  # downloaded once
    python train_gsm8k.py --task metamath --model DIR --data DIR        # no network

A problem is right when the number after the answer's mark, ####, is the one that was asked for.
The demo is such a task too: a small decoder that was pretrained on arithmetic and on problems of
other kinds than those it is fine-tuned on; both are in notes/demo.
"""

import itertools
import json
import os
import random
import re
import time
from decimal import Decimal
from functools import partial
from types import SimpleNamespace

import torch
from huggingface_hub import hf_hub_download

from model import (Transformer, as_list, checkpoint_files, encode_texts, load_tokenizer,
                   local_folder, naming, read_config, require, require_room)
from train_glue import (METHODS, RANK, WORLD, answer_losses, compare, finish_run, parse_arguments,
                        plan_batches, prepare, save_state, sum_over_processes)


# -------------------------------------------------------------------------------------- training
# METHODS is the table of train_glue.py: one step of a method, (run, closure) -> what is logged.

def train(args, method, seed, data, folder, progress):
    """One method, one seed: train, score, leave a run folder.  Returns what is in metrics.json."""
    count = min(args.limit or len(data.rows), len(data.rows))
    rows = random.Random(f"limit-{seed}").sample(data.rows, count)
    plan = plan_batches(args, seed, [row_length(row) for row in rows])  # every batch of every epoch
    run = prepare(args, method, seed, partial(build_model, args, data), folder, len(plan))
    progress(len(run.log))
    for step in range(len(run.log), len(plan)):  # a resumed run begins where its log ends
        epoch, batch = plan[step][0], [rows[i] for i in plan[step][1]]
        closure = partial(forward_backward, args, run.model.train(), data, batch)
        begin, lr = time.perf_counter(), run.schedules[0].get_last_lr()[0]
        logged = METHODS[method].step(run, closure)
        seconds = time.perf_counter() - begin
        for schedule in run.schedules:
            schedule.step()
        run.log.append({"step": step + 1, "epoch": epoch, "lr": lr, "seconds": seconds, **logged})
        if args.save_every and (len(run.log) % args.save_every == 0 or step + 1 == len(plan)):
            save_state(run)
        progress(1)
    predictions = evaluate(args, run.model, data)
    run.log[-1]["scores"] = scores_of(predictions)
    text = "".join(json.dumps(row) + "\n" for row in predictions)
    return finish_run(run, files=[("predictions.jsonl", text)])

def forward_backward(args, model, data, batch):
    """Mean loss over the tokens of the batch's answers, 0-dim; the prompts' tokens have none.  Its
    gradient adds up micro-batch by micro-batch, and process by process."""
    device, size = torch.device(args.device), args.micro_batch or len(batch)
    count = sum(len(answer) for _, answer, _ in batch)
    total, share = torch.zeros((), device=device), batch[RANK::WORLD]  # of this process
    for start in range(0, len(batch[::WORLD]), size):
        rows = share[start:start + size]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            losses = row_losses(model, data, rows or batch[:1])  # --fsdp: all take as many passes
            loss = losses[:len(rows)].sum() / count
        loss.backward()
        total = total + loss.detach()
    sum_over_processes([total], model)
    return total

def row_length(row):
    """Tokens of prompt and answer."""
    prompt, answer, _ = row
    return len(prompt) + len(answer)

def row_losses(model, data, batch):
    """-log p(answer | prompt) of each row, (B,), summed over the answer's tokens."""
    prompts, answers, _ = zip(*batch)
    return answer_losses(model, prompts, answers, data.pad_id, next(model.parameters()).device)

def build_model(args, data):
    return Transformer.from_pretrained(data.source, dtype=torch.bfloat16 if args.bf16 else None)


# ---------------------------------------------------------------------------- generation and scores
def evaluate(args, model, data):
    """A row for each test problem: prompt, what was generated, the numbers found in it."""
    (examples,), rows = data.sets.values(), []
    texts = generate(args, model, data, [prompt for prompt, *_ in examples])
    for (prompt, _, gold), text in zip(examples, texts):
        strict, flexible = extract_answer(text), extract_answer(text, strict=False)
        rows.append({"prompt": data.tokenizer.decode(prompt), "generated": text, "gold": gold,
                     "strict": strict, "flexible": flexible, "right": is_right(strict, gold),
                     "flexibly_right": is_right(flexible, gold)})
    return rows

def scores_of(rows):
    """accuracy: the number after #### is the right one.  flexible: the text's last number is.
    no_marker: no number stands after a ####."""
    count = len(rows)
    return {"accuracy": sum(row["right"] for row in rows) / count,
            "flexible": sum(row["flexibly_right"] for row in rows) / count,
            "no_marker": sum(row["strict"] is None for row in rows) / count}

def generate(args, model, data, prompts):
    """The text that follows each prompt, greedily; prompts of similar length share a batch and are
    padded on the left."""
    model.eval()
    device, ends, texts = torch.device(args.device), as_list(model.config.eos_id), []
    tokens = torch.zeros(len(prompts), args.max_new_tokens, dtype=torch.int64, device=device)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the largest batch first
    starts = range(0, len(order), args.eval_batch_size)
    for start in starts if args.fsdp else starts[RANK::WORLD]:
        batch = order[start:start + args.eval_batch_size]
        length = max(len(prompts[i]) for i in batch)
        pads = [length - len(prompts[i]) for i in batch]
        ids = [[data.pad_id] * pad + prompts[i] for pad, i in zip(pads, batch)]
        mask = [[0] * pad + [1] * (length - pad) for pad in pads]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            ids, mask = torch.tensor(ids, device=device), torch.tensor(mask, device=device)
            new = model.generate(ids, mask, args.max_new_tokens)
        tokens[batch, :new.shape[1]] = new
    if not args.fsdp:
        sum_over_processes([tokens])  # those of the other processes' prompts are 0
    for row in tokens.tolist():
        row = itertools.takewhile(lambda token: token not in ends, row)  # then comes padding
        texts.append(data.tokenizer.decode(list(row)))
    return texts

# A minus after an operand is a subtraction, commas part thousands.
MINUS = r"(?<![\w)\]])(?<![0-9][%$€£¥])(?<![0-9)\]%] )-"
NUMBER = (rf"[$€£¥]?(?:{MINUS})?[$€£¥]?(?:(?:[0-9]{{1,3}}(?:,[0-9]{{3}})+(?![0-9])|[0-9]+)"
          r"(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)(?:[%€£¥]|\$(?![0-9]))?")
# What a number goes on with, if it is none: a fraction, a date, a time or ratio, a power.
FRACTION = rf" ?/ ?{NUMBER}| [0-9]+ ?/ ?[0-9]+| ?[\u00bc-\u00be\u2150-\u215e]"
LONGER = (rf"{FRACTION}|(?:-[0-9]{{2}}){{2}}(?![0-9])|(?:[:.]|(?:\^|\*\*)[{{(]?)-?[0-9]+[)}}]?"
          r"|[eE][+-]?[0-9]+|(?:,[0-9]{2})+,[0-9]{3}")
QUANTITY = (rf"(?:[/^] ?)?{NUMBER}(?:{LONGER})*|{FRACTION}"
            r"|\\[dt]?frac(?: *{[^{}]*} *{[^{}]*}|[0-9]{2})")

def extract_answer(text, strict=True):
    """The number a solution ends with, as text without commas and currency sign, or None.

    strict: the number right after ####, as GSM8K writes it.  Otherwise the last number in the text.
    Where a fraction, a date, a time, a ratio or a power stands in its place, the answer is None.
    """
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{FRACTION SLASH}", "/")
    text = text.replace(r"\$", "$")
    found = re.findall(rf"####[\s*]*({QUANTITY})" if strict else QUANTITY, text)
    if not found or not re.fullmatch(NUMBER, found[0 if strict else -1]):
        return None
    return re.sub("[^0-9.-]", "", found[0 if strict else -1])

def is_right(found, gold):
    """Are both there, and the same number?"""
    return found is not None and gold is not None and Decimal(found) == Decimal(gold)


# ------------------------------------------------------------------------------------------ data
GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
DOWNLOADS = {  # file: sha256
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}
METAMATH = "MetaMathQA-395K.json"
METAMATH_ROWS, METAMATH_TOKENS = 100_000, 512  # the first rows of GSM8K's kind of at most so many

def load(args):
    """What a command reads: rows and test rows, (prompt ids, answer ids, number asked for) each,
    tokenizer, pad id, the checkpoint's folder, files.  ValueError or OSError where that fails."""
    source = local_folder(args.model, args.revision)
    config, family = read_config(source)
    if config.encoder_layers:
        raise ValueError(f"{source}: a model of the family {family} has an encoder; expected a "
                         "decoder alone, such as Llama")
    if not as_list(config.eos_id):
        raise ValueError(f"{os.path.join(source, 'config.json')}: no eos_token_id; expected one: "
                         "an answer has to end")
    tokenizer = load_tokenizer(source)
    train_file = data_file(args, METAMATH if args.task == "metamath" else "train.jsonl")
    test_file = data_file(args, "test.jsonl")
    if args.task == "metamath":
        examples = read_metamath(train_file, tokenizer, config.eos_id)
    else:
        examples = encode(tokenizer, read_jsonl(train_file), config.eos_id)
    rows = [row for row in examples if row_length(row) <= args.max_length]
    notes = []
    if len(rows) < len(examples):
        notes.append(f"{train_file}: {len(examples) - len(rows)} rows of more than "
                     f"{args.max_length} tokens are left out")
    tests = encode(tokenizer, read_jsonl(test_file)[:args.eval_limit], config.eos_id)
    if not rows:
        raise ValueError(f"--max-length is {args.max_length}; every row is longer")
    tokens = [ids for row in [*rows, *tests] for ids in row[:2]]
    row = max(len(prompt) + len(answer) for prompt, answer, _ in rows) - 1  # the end is not read
    prompt = max(len(prompt) for prompt, *_ in tests) + args.max_new_tokens - 1
    require_room(config, source, tokens, [[0]], {
        "the longest row": row, "the longest prompt and --max-new-tokens": prompt})
    return SimpleNamespace(rows=rows, sets={"test": tests}, tokenizer=tokenizer, majority={},
                           pad_id=config.pad_id, source=source, notes=notes,
                           files=[train_file, test_file, *checkpoint_files(source)])

def encode(tokenizer, rows, eos_id):
    """[(prompt ids, answer ids, the number asked for)] of [(question, answer)].  The only place
    that knows the format.  The prompt is tokenized by itself: no token spans its end."""
    ends = as_list(eos_id)
    prompts = encode_texts(tokenizer, [f"Q: {question}\nA: " for question, _ in rows], ends)
    answers = encode_texts(tokenizer, [answer for _, answer in rows], template=False)
    return [(prompt, answer + ends[:1], extract_answer(text))
            for (prompt, _), (answer, _), (_, text) in zip(prompts, answers, rows)]

def data_file(args, name):
    """Path of a data file: in --data, or downloaded once into the cache."""
    if args.data:
        return os.path.join(args.data, name)
    home = os.path.join(os.path.expanduser("~"), ".cache", "bilora")
    folder = os.path.join(os.environ.get("BILORA_CACHE") or home, "gsm8k")
    path = os.path.join(folder, name)
    try:
        if name == METAMATH:
            return hf_hub_download("meta-math/MetaMathQA", name, repo_type="dataset")
        if not os.path.exists(path):
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(GSM8K + name, path, hash_prefix=DOWNLOADS[name])
    except Exception as error:  # of several libraries
        raise ValueError(f"{name}: not available ({' '.join(str(error).split())}); connect to the "
                         "network, or give a folder that has the file with --data") from None
    return path

def read_jsonl(path):
    """[(question, answer)] of GSM8K's file.  Blank lines at the end are no rows, elsewhere an
    error.  ValueError names file, line and value."""
    with open(path, "rb") as file, naming(path):
        lines, rows = file.readlines(), []
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        require(line.strip(), f"{where}: a blank line before the last row")
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8: {error}") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from None
        rows.append(texts_of(row, "question", "answer", where))
        require(extract_answer(rows[-1][1]) is not None,
                f"{where}: the answer has no #### and number: {rows[-1][1][-60:]!r}")
    require(rows, f"{path}: no rows")
    return rows

def texts_of(row, question, answer, where):
    texts = ()
    if isinstance(row, dict):
        texts = row.get(question), row.get(answer)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: expected an object with the texts {question} and {answer}, got "
                         f"{str(row)[:60]}")
    return texts

def metamath_rows(path):
    """(question, answer) of each row whose type has GSM in it and whose response has a #### line,
    which then ends the answer."""
    for number, row in enumerate(json_array(path), 1):
        question, answer = texts_of(row, "query", "response", f"{path}, row {number}")
        if "GSM" in str(row.get("type")) and extract_answer(answer) is not None:
            yield question, answer.partition("\nThe answer is:")[0]

def read_metamath(path, tokenizer, eos_id, count=METAMATH_ROWS, longest=METAMATH_TOKENS):
    """encode's examples of the first `count` rows that have at most `longest` tokens, the end token
    included."""
    rows, examples = metamath_rows(path), []
    while len(examples) < count and (part := list(itertools.islice(rows, 1000))):
        encoded = encode(tokenizer, part, eos_id)
        examples += [row for row in encoded if len(row[0]) + len(row[1]) <= longest]
    if not examples:
        raise ValueError(f"{path}: no row of at most {longest} tokens whose type has GSM in it and "
                         "whose response has a #### line")
    return examples[:count]

def json_array(path, chunk=2**20, largest=2**24):
    """The values of a JSON array, one after the other: the file never is in memory as a whole."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    with open(path, encoding="utf-8-sig") as file:
        with naming(path):
            text = file.read(chunk)
        if not text.lstrip().startswith("["):
            raise ValueError(f"{path}: not a JSON array")
        place = text.index("[") + 1
        for number in itertools.count(1):
            while True:
                place = between.match(text, place).end()
                try:
                    value, place = decoder.raw_decode(text, place)
                    break
                except (ValueError, RecursionError) as error:
                    if text[place:place + 1] == "]":
                        return
                    more = file.read(chunk)
                    if not more or len(text) - place > largest:
                        raise ValueError(f"{path}, row {number}: {error}") from None
                    text, place = text[place:] + more, 0
            yield value


# -------------------------------------------------------------------------------------- arguments
DEMO = os.path.join(os.path.dirname(os.path.abspath(__file__)), "notes", "demo", "problems")
JOBS = 1 if torch.cuda.is_available() else os.cpu_count()  # of the demo
PAPERS = {"lr": 5e-4, "rho": [0.01, 0.05], "epochs": 2, "batch_size": 32, "micro_batch": 4,
          "seeds": [0, 1, 2]}  # for metamath; and our choice for gsm8k
REAL = {**PAPERS, "bf16": True, "max_new_tokens": 512, "eval_batch_size": 16}
TASKS = {"demo": {"lr": 6e-3, "rho": [0.05, 0.05], "epochs": 5, "batch_size": 8, "limit": 300,
                  "seeds": [0, 1, 2], "model": DEMO, "data": DEMO, "jobs": JOBS,
                  "out": os.path.join("runs", "gsm8k-demo"),
                  "max_new_tokens": 110, "eval_batch_size": 250},
         "gsm8k": REAL, "metamath": REAL}
OPTIONS = [
    ("task", "max-length", int, 1024, "tokens a row; longer ones are left out"),
    ("task", "eval-limit", int, None, "test problems (default: all)"),
    ("task", "eval-batch-size", int, 16, "prompts at a time"),
    ("task", "max-new-tokens", int, 512, "generated for a prompt")]

def show_generations(args, report):
    print("\nA few generations:")
    for run in report["results"][:len(args.method)]:
        path = os.path.join(args.out, f"{run['method']}-seed{run['seed']}", "predictions.jsonl")
        with open(path, encoding="utf-8") as file:
            row = json.loads(file.readline())
        print(f"\n{run['method']}, seed {run['seed']}; expected {row['gold']}\n{row['prompt']}"
              f"{row['generated']}")
    print()

def main(argv=None):
    args, fail = parse_arguments(argv, __doc__, TASKS, OPTIONS)
    return compare(args, fail, load, train, show_generations)

if __name__ == "__main__":
    main()

"""Fine-tune a decoder on grade-school word problems with LoRA, LoRA-SAM and Bi-LoRA, and score what it generates.

    python train_gsm8k.py                                               # the embedded task: minutes on a CPU
    python train_gsm8k.py --task gsm8k --model meta-llama/Llama-3.2-1B  # model and data are downloaded once
    python train_gsm8k.py --task metamath --model DIR --data DIR        # files that are there: no network

The embedded task is the paper's in miniature: a small decoder is pretrained on the spot on arithmetic and on generated
problems of some kinds (once; it is cached), then fine-tuned on few problems of other kinds.  A problem is right when the
number after the answer's mark, ####, is the one that was asked for.
"""

import itertools
import json
import os
import random
import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import partial

import torch
import torch.nn as nn
from huggingface_hub import hf_hub_download
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from model import Config, Transformer, as_list, load_tokenizer, local_folder, read_config
from train_glue import (Parser, add_shared_arguments, answer_losses, argparse, batch_order, cache_folder, compare, decode, download,
                        file_stamps, fill_in, number, precision, pretrained, require_ranks_that_fit)

# ---------------------------------------------------------------------------------------------- answers

# A minus sign after a digit is a subtraction, commas part thousands, and a fraction is no number that is asked for.
NUMBER = r"\$?(?:(?<![0-9] )(?<![0-9])-)?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]+)?(?![0-9]|/[0-9])"


def extract_answer(text, strict=True):
    """The number a solution ends with, as text without commas and currency sign, or None.

    strict: the number right after ####, as GSM8K writes it.  Otherwise the last number in the text.
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    found = re.findall(rf"####[\s*]*({NUMBER})" if strict else NUMBER, text)
    return found[-1 if not strict else 0].replace(",", "").replace("$", "") if found else None


def is_right(found, gold):
    """Are both there, and the same number?"""
    return found is not None and gold is not None and Decimal(found) == Decimal(gold)


def encode(tokenizer, rows, eos_id):
    """[(prompt ids, answer ids, the number asked for)] of [(question, answer)].  The only place that knows the format: training
    and evaluation read the same prompt, and it is tokenized by itself, so that no token spans its end."""
    examples, ends = [], as_list(eos_id)
    for start in range(0, len(rows), 1000):  # few at a time: tokenizers keeps more than the ids of each
        part = rows[start:start + 1000]
        try:
            prompts = tokenizer.encode_batch([f"Q: {question}\nA: " for question, _ in part])
            answers = tokenizer.encode_batch([answer for _, answer in part], add_special_tokens=False)
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(f"the tokenizer: {error}") from None
        for prompt, answer, (_, text) in zip(prompts, answers, part):
            ids = prompt.ids[:-1] if prompt.ids and prompt.ids[-1] in ends else prompt.ids  # some tokenizers end every text
            if not ids or not answer.ids:
                raise ValueError(f"the tokenizer gives no token for a question or for its answer {text[-60:]!r}")
            examples.append((ids, answer.ids + ends[:1], extract_answer(text)))
    return examples


# ---------------------------------------------------------------------------------------------- data

GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
DOWNLOADS = {  # file: (bytes, sha256)
    "train.jsonl": (4166206, "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    "test.jsonl": (749738, "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
}
METAMATH = "MetaMathQA-395K.json"
METAMATH_ROWS, METAMATH_TOKENS = 100_000, 512  # the first rows made from GSM8K that have at most so many tokens


def data_file(args, name):
    """Path of a data file: in --data, or downloaded once into the cache."""
    if args.data:
        return os.path.join(args.data, name)
    if name == METAMATH:
        try:
            return hf_hub_download("meta-math/MetaMathQA", name, repo_type="dataset")
        except Exception as error:  # of several libraries
            raise ValueError(f"{name}: could not be had from the hub ({' '.join(str(error).split())}); connect to the "
                             "network, or give a folder that has the file with --data") from None
    path = os.path.join(cache_folder(), "gsm8k", name)
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        download(GSM8K + name, *DOWNLOADS[name], path)
    return path


def read_jsonl(path):
    """[(question, answer)] of GSM8K's file.  ValueError names file, line and value."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(decode(line, f"{path}, line {number}"))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            rows.append(texts_of(row, "question", "answer", f"{path}, line {number}"))
            if extract_answer(rows[-1][1]) is None:
                raise ValueError(f"{path}, line {number}: the answer has no #### and number: {rows[-1][1][-60:]!r}")
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def texts_of(row, question, answer, where):
    texts = tuple(row.get(key) for key in (question, answer)) if isinstance(row, dict) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: expected an object with the texts {question} and {answer}, got {str(row)[:60]}")
    return texts


def metamath_rows(path):
    """(question, answer) of each row whose type has GSM in it and whose response has a #### line, which then ends the answer."""
    for number, row in enumerate(json_array(path), 1):
        question, answer = texts_of(row, "query", "response", f"{path}, row {number}")
        if "GSM" in str(row.get("type")) and extract_answer(answer) is not None:
            yield question, answer.partition("\nThe answer is:")[0]


def read_metamath(path, tokenizer, eos_id, count=METAMATH_ROWS, longest=METAMATH_TOKENS):
    """encode's examples of the first `count` rows that have at most `longest` tokens, the end token included."""
    rows, examples = metamath_rows(path), []
    while len(examples) < count and (part := list(itertools.islice(rows, 1000))):
        encoded = encode(tokenizer, part, eos_id)
        examples += [example for example in encoded if len(example[0]) + len(example[1]) <= longest]
    if not examples:
        raise ValueError(f"{path}: no row of at most {longest} tokens whose type has GSM in it and whose response has a #### line")
    return examples[:count]


def json_array(path, chunk=2**20, largest=2**24):
    """The values of a JSON array, one after the other: the file never is in memory as a whole."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    with open(path, encoding="utf-8-sig") as file:
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


# ---------------------------------------------------------------------------------------------- the embedded task

# A kind of problem is (ranges, question, solution).  ranges: where each number is drawn from, "a=2-9".  In the texts {thing}
# stands for a word of WORDS, {a} for a number, (x|y) for a choice of wording, [d=a*b] for a step of arithmetic.  The kinds
# in TRANSFER combine steps as none in PRETRAINING does, in the same words.
WORDS = {
    "name": "Tom Anna Ben Lucy Sam Maria Jack Emma",
    "friend": "Peter Alice Simon Rosa Hugo Ellen",
    "thing": "apples cookies pencils marbles stickers cards shells books",
    "other": "pens eggs candles plums cups stamps",
    "box": "boxes bags packs baskets",
    "place": "school market park farm",
}
PRETRAINING = [
    ("a=2-9 b=2-12 c=2-30",  # a * b - c
     "{name} (buys|gets) {a} {box} of {thing} with {b} in each. {name} gives {c} {thing} to {friend}. How many {thing} "
     "(are left|does {name} have left)?",
     "{name} gets [d=a*b] {thing}.\n{name} has [e=d-c] left."),
    ("a=2-9 b=2-9 c=2-9 d=2-9",  # a * b + c * d
     "At the {place} {thing} cost ${b} each and {other} cost ${d} each. {name} buys {a} {thing} and {c} {other}. How much "
     "does {name} (pay|spend) in total?",
     "The {thing} cost $[e=a*b].\nThe {other} cost $[f=c*d].\nIn total that is $[g=e+f]."),
    ("a=3-40 b=3-30 c=2-9",  # (a + b) / c
     "{name} has {a} {thing} and {friend} has {b}. They (put|pack) all {thing} into {c} {box}, the same number in each. How "
     "many (are|{thing} are) in each?",
     "Together they have [d=a+b].\nEach holds [e=d/c] {thing}."),
    ("a=3-30 b=2-20 c=2-20",  # a + (a + b) - c
     "{name} has {a} {thing} and {friend} has {b} more than {name}. They (sell|lose) {c} {thing} (at the {place}|today). How "
     "many do they have left?",
     "{friend} has [d=a+b] {thing}.\nTogether they have [e=a+d].\nThey have [f=e-c] left."),
    ("a=2-90 b=2-9 c=2-12",  # a / b * c
     "{b} {box} of {thing} cost ${a} at the {place}. How much (do|would) {c} {box} cost?",
     "Each costs $[d=a/b].\nIn total that is $[e=d*c]."),
    ("a=2-9 b=2-12 c=2-30 d=2-9",  # (a * b - c) / d
     "There are {a} {box} with {b} {thing} each (at|in) the {place}. {c} {thing} are (broken|bad). {d} workers share the "
     "others. How many {thing} does each (get|have)?",
     "There are [e=a*b] {thing}.\nOf these [f=e-c] are good.\nEach gets [g=f/d] {thing}."),
    ("a=4-40 b=2-30",  # a + a / 2 + b
     "{name} (sold|made) {a} {thing} on Monday, half as many on Tuesday and {b} on Friday. How many {thing} (is that in "
     "total|has {name} (sold|made))?",
     "On Tuesday that is [c=a/2].\nTogether that is [d=a+c].\nIn total that is [e=d+b] {thing}."),
    ("a=2-9 b=2-9 c=2-9 d=2-9 e=2-30",  # a * b + c * d - e
     "{name} works {a} hours on Monday for ${b} (an|per) hour and {c} hours on Friday for ${d} (an|per) hour. {name} spends "
     "${e} at the {place}. How much money is left?",
     "On Monday that is $[f=a*b].\nOn Friday that is $[g=c*d].\nTogether that is $[h=f+g].\n{name} has $[i=h-e] left."),
]
TRANSFER = [
    ("a=2-9 b=2-12 c=2-9 d=2-12",  # a * b / c - d
     "{name} made {a} {box} of {thing} with {b} in each. {c} workers share all {thing}. (Each|Of these each) (gives|spends) "
     "{d}. How many {thing} (are left in each|does each have left)?",
     "There are [e=a*b] {thing}.\nEach gets [f=e/c].\nEach has [g=f-d] {thing} left."),
    ("a=5-30 b=2-25 c=2-9 d=2-30",  # (a - b) * c + d
     "{name} has {a} {thing} and {b} are (broken|bad). {name} sold the others for ${c} each (at the {place}|today). {friend} "
     "gives {name} ${d} more. How much money does {name} (get|have)?",
     "Of these [e=a-b] are good.\nThe {thing} cost $[f=e*c].\nIn total {name} has $[g=f+d]."),
    ("a=2-9 b=2-9 c=2-9 d=2-9",  # (a * b - c * d) / 2
     "{name} works {a} hours for ${b} per hour and {friend} works {c} hours for ${d} per hour. {name} spends half as much as "
     "{name} (gets|has) more than {friend}. How much (is that|does {name} spend)?",
     "{name} gets $[e=a*b].\n{friend} gets $[f=c*d].\n{name} has $[g=e-f] more.\n{name} spends $[h=g/2]."),
    ("a=20-100 b=2-9 c=2-9 d=2-9",  # (a - b * c) / d
     "{name} has ${a}. {name} buys {b} {thing} for ${c} each and spends all that is left on {other} (for|that cost) ${d} "
     "each. How many {other} does {name} (get|have)?",
     "The {thing} cost $[e=b*c].\n{name} has $[f=a-e] left.\n{name} gets [g=f/d] {other}."),
]
OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
CHOICE, STEP, LARGEST = re.compile(r"\(([^()]*)\)"), re.compile(r"\[(\w)=(\w)(.)(\w)\]"), 250


def calculate(a, operator, b):
    """The result; None unless it is a whole number from 0 to LARGEST, and above 0 where something is taken or shared."""
    if operator == "/" and a % b:
        return None
    result = OPERATORS[operator](a, b)
    return result if (operator in "-/") <= result <= LARGEST else None


def draw_numbers(rng, ranges, solution):
    """{letter: number}: drawn from the ranges, then computed step by step; all anew until every result is allowed."""
    while True:
        numbers = {letter: rng.randint(int(low), int(high)) for letter, low, high in
                   re.findall(r"(\w)=(\d+)-(\d+)", ranges)}
        for result, a, operator, b in STEP.findall(solution):
            numbers[result] = calculate(numbers[a], operator, numbers.get(b) or int(b))
            if numbers[result] is None:
                break
        else:
            return numbers


def calculation(a, operator, b, result):
    return f"{a}{operator}{b}=<<{a}{operator}{b}={result}>>{result}"


def problem(rng, templates):
    """(question, answer) of a template drawn at random."""
    ranges, question, solution = rng.choice(templates)
    numbers = draw_numbers(rng, ranges, solution)
    words = {kind: rng.choice(choices.split()) for kind, choices in WORDS.items()}
    while CHOICE.search(question):
        question = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), question)
    answer = STEP.sub(lambda match: calculation(numbers[match[2]], match[3], numbers.get(match[4], match[4]),
                                                numbers[match[1]]), solution)
    last = numbers[STEP.findall(solution)[-1][0]]
    return question.format(**words, **numbers), f"{answer}\n#### {last}".format(**words)


def fact_sheet(rng, count=3):
    """(question, answer) without words: ("7*8, 9/3", "7*8=<<7*8=56>>56\\n9/3=<<9/3=3>>3")."""
    facts = []
    while len(facts) < count:
        operator = rng.choice("+-*/")
        a, b = (rng.randint(2, 100), rng.randint(2, 60)) if operator in "+-" else (rng.randint(2, 30), rng.randint(2, 12))
        a = a * b if operator == "/" else a
        result = calculate(a, operator, b)
        if result is not None and a <= LARGEST:
            facts.append((a, operator, b, result))
    return ", ".join(f"{a}{operator}{b}" for a, operator, b, _ in facts), "\n".join(calculation(*f) for f in facts)


def embedded_tokenizer():
    """A token for each word, with the space before it, for << >> ####, and for every other character.

    decode() gives back exactly the text that was encoded, if it is made of these.
    """
    texts = " ".join(part for template in PRETRAINING + TRANSFER for part in template[1:])
    words = {*re.findall("[A-Za-z]+", re.sub(r"\{\w+\}|\[[^]]*\]", " ", texts)), *" ".join(WORDS.values()).split()}
    starts = {word for word in words if word[0].isupper()} | {"Q", "A"}  # may stand where no space is before them
    pieces = ["<pad>", "<eos>", "<unk>", "<<", ">>", "####", *"\n 0123456789+-*/=.,?:$", *sorted(starts),
              *sorted(" " + word for word in words)]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<<|>>|####| ?[A-Za-z]+|[^A-Za-z]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(pieces[:3])
    return tokenizer


EOS = 1  # <eos> in the vocabulary; 0 is <pad>
EMBEDDED_TRAIN, EMBEDDED_TEST = 300, 500  # problems
EMBEDDED_CONFIG = Config(vocab_size=embedded_tokenizer().get_vocab_size(), d_model=128, d_ff=512, heads=4, decoder_layers=3,
                         positions="rotary", norm="rms", activation="relu", max_length=256, bias=False, qkv_bias=False, eos_id=EOS)
PRETRAINING_SETTINGS = {"steps": 1800, "batch_size": 16, "muon_lr": 1e-2, "lr": 5e-3, "facts": 0.25}
EMBEDDED_DEFAULTS = {"lr": 6e-3, "epochs": 5, "batch_size": 8, "micro_batch": None, "limit": EMBEDDED_TRAIN,
                     "eval_limit": EMBEDDED_TEST, "eval_batch_size": 250, "max_new_tokens": 110, "out": os.path.join("runs", "gsm8k-embedded")}


def embedded_rows(seed, split, count):
    """[(question, answer)] of the kinds in TRANSFER; another stream of numbers for each seed and split."""
    rng = random.Random(f"{split}-{seed}")
    return [problem(rng, TRANSFER) for _ in range(count)]


def pretrained_base(args):
    """Path of the embedded task's base, a state dict; pretrained now, on facts and problems, if runs/ does not have it."""
    tokenizer, rng, size = embedded_tokenizer(), random.Random(0), PRETRAINING_SETTINGS["batch_size"]
    sheets = [fact_sheet(random.Random(i)) for i in range(50)]  # another arithmetic, another base
    settings = [asdict(EMBEDDED_CONFIG), PRETRAINING_SETTINGS, PRETRAINING, WORDS, LARGEST, sheets, tokenizer.to_str(),
                args.pretraining_steps, args.bf16]

    def batches():  # sheets of facts, which need no reading, among the problems
        while True:  # rows of similar length in one batch
            rows = [fact_sheet(rng) if rng.random() < PRETRAINING_SETTINGS["facts"] else problem(rng, PRETRAINING)
                    for _ in range(16 * size)]
            examples = encode(tokenizer, rows, EOS)
            for batch in batch_order(examples, size, rng):
                yield [examples[i] for i in batch]

    def loss(model, examples, device):
        prompts, answers, _ = zip(*examples)
        return answer_losses(model, prompts, answers, 0, device).sum() / sum(map(len, answers))

    def build():
        model = Transformer(EMBEDDED_CONFIG)
        for module in model.modules():
            if isinstance(module, nn.Linear):  # larger than a checkpoint's beginning: few steps have to do
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        return model

    def optimizers(model):
        matrices = [p for p in model.decoder.blocks.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
        return [torch.optim.Muon(matrices, lr=PRETRAINING_SETTINGS["muon_lr"], weight_decay=0.1, ns_steps=4,
                                 adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(others, lr=PRETRAINING_SETTINGS["lr"], weight_decay=0.0, betas=(0.9, 0.98), fused=True)]

    return pretrained(settings, build, optimizers, batches(), loss, args)


# ---------------------------------------------------------------------------------------------- the experiment


@dataclass
class Experiment:
    """What train_glue.compare needs of a task."""
    build: object        # () -> the pretrained decoder
    data: object         # seed -> (training examples, {name: test examples}), each (prompt ids, answer ids)
    tokenizer: Tokenizer
    pad_id: int
    files: list          # what was read: [path, size, time of change]
    source: str = None   # the checkpoint's folder
    metrics = ("accuracy", "flexible", "no_marker")
    every_epoch = False  # scored after the last epoch alone

    def loss(self, model, examples, device):
        """Summed over the answers' tokens, 0-dim; the prompts' tokens have no loss, and no logits are computed for them."""
        prompts, answers, _ = zip(*examples)
        return answer_losses(model, prompts, answers, self.pad_id, device).sum()

    def count(self, examples):
        return sum(len(answer) for _, answer, _ in examples)

    def majority(self, examples, sets):
        return {}

    def evaluate(self, model, sets, args):
        """({metric: value}, {"samples": three rows}, {"predictions.jsonl": all of them}).

        accuracy: the number after #### is the right one.  flexible: the last number is.  no_marker: there is none after a ####.
        """
        (examples,) = sets.values()
        texts = generate(model, self, [prompt for prompt, *_ in examples], args)
        rows = []
        for (prompt, _, gold), text in zip(examples, texts):
            found = {"strict": extract_answer(text), "flexible": extract_answer(text, strict=False)}
            rows.append({"prompt": self.tokenizer.decode(prompt), "generated": text, "gold": gold, **found,
                         "right": is_right(found["strict"], gold), "flexibly_right": is_right(found["flexible"], gold)})
        mean = lambda values: sum(values) / len(rows)
        metrics = {"accuracy": mean(row["right"] for row in rows), "flexible": mean(row["flexibly_right"] for row in rows),
                   "no_marker": mean(row["strict"] is None for row in rows)}
        return metrics, {"samples": rows[:3]}, {"predictions.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}


def generate(model, experiment, prompts, args):
    """The text that follows each prompt, greedily: prompts of similar length in one batch, padded on the left."""
    model.eval()
    device, texts = torch.device(args.device), [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # if memory is short, then at once
    for start in tqdm(range(0, len(order), args.eval_batch_size), desc="generating", leave=False, disable=None):
        batch = order[start:start + args.eval_batch_size]
        length = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[experiment.pad_id] * (length - len(prompts[i])) + prompts[i] for i in batch], device=device)
        mask = torch.tensor([[0] * (length - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
        with precision(device, args.bf16):
            new = model.generate(ids, mask, args.max_new_tokens)
        ends = set(as_list(model.config.eos_id))
        for i, row in zip(batch, new.tolist()):
            row = list(itertools.takewhile(lambda token: token not in ends, row))  # what follows is padding
            texts[i] = experiment.tokenizer.decode(row)
    return texts


def load(args):
    """The experiment that the arguments describe.  ValueError or OSError for files that do not fit."""
    return load_embedded(args) if args.task == "embedded" else load_decoder(args)


def load_embedded(args):
    tokenizer = embedded_tokenizer()
    require_ranks_that_fit(args, partial(Transformer, EMBEDDED_CONFIG))  # before minutes of pretraining
    path = pretrained_base(args)
    state = torch.load(path, map_location=args.device, weights_only=True)

    def build():
        model = Transformer(EMBEDDED_CONFIG)
        model.load_state_dict(state)
        return model

    def data(seed):
        return (encode(tokenizer, embedded_rows(seed, "train", args.limit), EOS),
                {"test": encode(tokenizer, embedded_rows(seed, "test", args.eval_limit), EOS)})

    return Experiment(build, data, tokenizer, 0, file_stamps(path))


def load_decoder(args):
    source = local_folder(args.model, args.revision)
    config, family = read_config(source)
    if config.encoder_layers:
        raise ValueError(f"{source}: a model of the family {family} has an encoder; expected a decoder alone, such as Llama")
    if not as_list(config.eos_id):
        raise ValueError(f"{os.path.join(source, 'config.json')}: no eos_token_id; expected one, for an answer has to end")
    build = partial(Transformer.from_pretrained, source, dtype=torch.bfloat16 if args.bf16 else None)
    require_ranks_that_fit(args, build)
    tokenizer = load_tokenizer(source)
    pad_id = tokenizer.padding["pad_id"]
    tokenizer.no_padding()
    train, test = (data_file(args, name) for name in (METAMATH if args.task == "metamath" else "train.jsonl", "test.jsonl"))
    if args.task == "metamath":
        examples = read_metamath(train, tokenizer, config.eos_id)
    else:
        examples = encode(tokenizer, read_jsonl(train), config.eos_id)
    short = [row for row in examples if len(row[0]) + len(row[1]) <= args.max_length]
    if len(short) < len(examples):
        print(f"{train}: {len(examples) - len(short)} rows of more than {args.max_length} tokens are left out")
    tests = encode(tokenizer, read_jsonl(test)[:args.eval_limit], config.eos_id)
    require_room(args, source, config, short, tests, pad_id)

    def data(seed):
        return random.Random(f"limit-{seed}").sample(short, min(args.limit or len(short), len(short))), {"test": tests}

    checkpoint = [os.path.join(source, name) for name in sorted(os.listdir(source))]
    return Experiment(build, data, tokenizer, pad_id, file_stamps(train, test, *filter(os.path.isfile, checkpoint)), source)


def require_room(args, source, config, examples, tests, pad_id):
    """ValueError for tokens, or places, that the model does not have."""
    if not examples:
        raise ValueError(f"--max-length is {args.max_length}; every row is longer")
    token = max(pad_id, *(max(*prompt, *answer) for prompt, answer, _ in [*examples, *tests]))
    if token >= config.vocab_size:
        raise ValueError(f"{os.path.join(source, 'tokenizer.json')}: gives token {token}; the model has {config.vocab_size}")
    for what, length in (("the longest row", max(len(a) + len(b) - 1 for a, b, _ in examples)),
                         ("the longest prompt and --max-new-tokens", max(len(a) for a, *_ in tests) + args.max_new_tokens - 1)):
        if config.max_length is not None and length > config.max_length:
            raise ValueError(f"{what}: {length} tokens; the model has {config.max_length} positions")


# ---------------------------------------------------------------------------------------------- arguments and main


DEFAULTS = {"lr": 5e-4, "rho": [0.01, 0.05], "epochs": 2, "batch_size": 32, "micro_batch": 4, "seeds": [0, 1, 2], "bf16": True,
            "max_length": 1024, "max_new_tokens": 512, "eval_batch_size": 16}


SOURCES = """Whose the settings are.  The paper's: rank, aux-rank, alpha, aux-lr = lr, warm-up over 0.03 of the steps and
half a cosine, adapters on all linear layers without dropout, and of the defaults for gsm8k and metamath lr, batch size,
micro-batch, epochs, rho, max-length and the number of seeds (printed for metamath; on gsm8k they are used as they are).  The
code that the paper follows (LoRA-GA, Flat-LoRA): AdamW without weight decay, the prompt, the first 100,000 rows of at most
512 tokens.  The authors' code, as reported: ascent sgd.  Ours: no gradient clipping (the followed code clips at 1), bfloat16,
prompt and answer tokenized apart (the followed code joins them by a space first), batches of similar length, the embedded
task, and every default not named here.
"""


def parse_arguments(argv):
    epilog = SOURCES + "\nDefaults by task:\n" + "".join(
        f"  {name:<17} --lr {d['lr']} --batch-size {d['batch_size']} --micro-batch {d['micro_batch'] or d['batch_size']} --epochs "
        f"{d['epochs']} --rho {d['rho'][0]} {d['rho'][1]} --seeds {' '.join(map(str, d['seeds']))} ({source})\n"
        for name, source, d in (("embedded", "ours; rho the paper's", {**DEFAULTS, **EMBEDDED_DEFAULTS}),
                                ("gsm8k, metamath", "the paper's, for metamath", DEFAULTS)))
    parser = Parser(prog="train_gsm8k.py", description=__doc__, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("task")
    group.add_argument("--task", choices=("embedded", "gsm8k", "metamath"), default="embedded",
                       help="training problems; gsm8k and metamath are scored on GSM8K's test file (default: %(default)s, ours)")
    group.add_argument("--data", help=f"folder with train.jsonl or {METAMATH}, and test.jsonl (default: downloaded once)")
    group.add_argument("--model", help="not embedded: folder with config.json, model.safetensors and tokenizer.json, or the "
                                       "id of a model on the Hugging Face hub; a decoder")
    group.add_argument("--revision", help="of the model on the hub: a branch, tag or commit (default: main)")
    group.add_argument("--limit", type=number(int, 1), help=f"training problems (default: all; embedded: {EMBEDDED_TRAIN}, ours)")
    group.add_argument("--max-length", type=number(int, 1),
                       help="tokens a row; longer ones are left out (default: 1024, the paper's)")
    group.add_argument("--pretraining-steps", type=number(int, 0), default=PRETRAINING_SETTINGS["steps"],
                       help="of the embedded task's base; 0: a random base (default: %(default)s, ours)")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-limit", type=number(int, 1), help=f"test problems (default: all; embedded: {EMBEDDED_TEST}, ours)")
    group.add_argument("--eval-batch-size", type=number(int, 1), help="prompts at a time (default: 16; embedded: 250; ours)")
    group.add_argument("--max-new-tokens", type=number(int, 1),
                       help="generated for a prompt (default: 512, the followed code's; embedded: 110, ours)")
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return parser, args


def check_arguments(parser, args):
    """Fill in the task's defaults, which are the paper's; refuse what does not go together."""
    embedded = args.task == "embedded"
    given = [name for name in ("data", "model", "revision", "max_length", "merge") if getattr(args, name) not in (None, False)]
    if embedded and given:
        parser.error(f"--{given[0].replace('_', '-')} is for a real model; choose gsm8k or metamath with --task")
    fill_in(parser, args, {**DEFAULTS, "out": os.path.join("runs", args.task), **(EMBEDDED_DEFAULTS if embedded else {})})
    if not embedded and not args.model:
        parser.error(f"--task {args.task} needs --model, a folder or the id of a model on the Hugging Face hub")


def main(argv=None):
    parser, args = parse_arguments(argv)
    try:
        experiment = load(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    report = compare(parser, args, experiment)
    print("\nA few generations:")
    for run in report["results"][:len(args.method)]:
        for sample in run["epochs"][-1]["samples"][:2]:
            print(f"\n{run['method']}, seed {run['seed']}; expected {sample['gold']}\n{sample['prompt']}{sample['generated']}")
    return report


if __name__ == "__main__":
    main()

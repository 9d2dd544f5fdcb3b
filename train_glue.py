"""Fine-tune a model with LoRA, LoRA-SAM and Bi-LoRA, over several seeds, and compare them.

    python train_glue.py                                           # the embedded task: minutes on a CPU
    python train_glue.py --task mrpc --model google-t5/t5-base     # GLUE; model and data are downloaded once
    python train_glue.py --task mrpc --model DIR --data DIR        # files that are there: no network

BERT and RoBERTa get a classifier.  T5, Llama and Qwen2 read a prompt and are trained to answer with the label's words; the
prediction is the class whose answer has the highest log-probability.

The embedded task is the paper's regime in miniature: a small transformer is pretrained on the spot on a generated
language (once; it is cached), then fine-tuned on few sentences with noisy labels, and scored on clean ones.
The methods of one seed share data order, initial adapter and initial head: compare them seed by seed.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import statistics
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from http.client import HTTPException
from urllib.request import urlopen

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from bilora import (add_lora, auxiliary_parameters, bilora_optimizers, bilora_power_step, bilora_step, clip_perturbation_,
                    lora_sam_step, lora_step, merge_lora_, perturbation_norm, primary_parameters, save_adapter)
from model import Config, Transformer, as_list, load_tokenizer, local_folder, read_config, save_pretrained

METHODS = ("lora", "lora-sam", "bi-lora", "bi-lora-power")  # the last one is not the paper's


# ---------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """A GLUE task: where its columns are, what its labels mean, how it is scored, the settings for it and whose they are."""
    text: tuple                      # columns of the sentences: names, or indices where the file has no header
    label: object                    # column of the label
    labels: tuple                    # label in the file, in the order of the classes; () for a regression
    metrics: tuple
    epochs: int
    rho: tuple = (0.01, 0.05)        # LoRA-SAM, Bi-LoRA
    lr: float = 5e-4
    batch_size: int = 32
    dev: tuple = ("dev",)            # file names of the evaluation sets, without .tsv
    skip_short: bool = False         # rows that lack a field are part of the published file
    seeds: tuple = (0, 1, 2)
    source: str = "the paper's"      # whose lr, batch size, epochs, rho and number of seeds


TASKS = {
    "embedded": Task((), None, ("0", "1"), ("accuracy",), epochs=10, lr=2e-3, seeds=(0, 1, 2, 3, 4), source="ours; rho the paper's"),
    "mrpc": Task(("#1 String", "#2 String"), "Quality", ("0", "1"), ("accuracy", "f1"), epochs=10),
    "cola": Task((3,), 1, ("0", "1"), ("matthews", "accuracy"), epochs=10),
    "sst2": Task(("sentence",), "label", ("0", "1"), ("accuracy",), epochs=3),
    "rte": Task(("sentence1", "sentence2"), "label", ("entailment", "not_entailment"), ("accuracy",), epochs=10,
                rho=(0.05, 0.1), seeds=(0, 1, 2, 3, 4)),
    "qnli": Task(("question", "sentence"), "label", ("entailment", "not_entailment"), ("accuracy",), epochs=3),
    "qqp": Task(("question1", "question2"), "is_duplicate", ("0", "1"), ("accuracy", "f1"), epochs=3, skip_short=True,
                source="ours"),
    "mnli": Task(("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction"), ("accuracy",),
                 epochs=3, dev=("dev_matched", "dev_mismatched")),
    "stsb": Task(("sentence1", "sentence2"), "score", (), ("pearson", "spearman"), epochs=10, source="ours"),
}

SIMILARITY = "classify the semantic similarity of the text: {}\n{}\nresult: "
GENERIC = {  # task: (prompt, each class's answer); the followed code's, of LoRA-GA and Flat-LoRA, but for rte's, which is ours
    "mrpc": (SIMILARITY, ("different", "equivalent")),
    "cola": ("classify the grammaticality of the text: {}\nresult: ", ("unacceptable", "acceptable")),
    "sst2": ("classify the sentiment of the text: {}\nresult: ", ("negative", "positive")),
    "rte": (SIMILARITY, ("entailment", "not_entailment")),
    "qnli": ("classify the semantic similarity of the question and the sentence: {}\n{}\nresult: ",
             ("entailment", "not_entailment")),
    "qqp": (SIMILARITY, ("different", "duplicate")),
    "mnli": (SIMILARITY, ("entailment", "neutral", "contradiction")),
}
T5_OWN = {  # those that T5 v1.0 was pretrained with: GLUE's training sets were part of its data
    "mrpc": ("mrpc sentence1: {} sentence2: {}", ("not_equivalent", "equivalent")),
    "cola": ("cola sentence: {}", ("unacceptable", "acceptable")),
    "sst2": ("sst2 sentence: {}", ("negative", "positive")),
    "rte": ("rte sentence1: {} sentence2: {}", ("entailment", "not_entailment")),
    "qnli": ("qnli question: {} sentence: {}", ("entailment", "not_entailment")),
    "qqp": ("qqp question1: {} question2: {}", ("not_duplicate", "duplicate")),
    "mnli": ("mnli hypothesis: {1} premise: {0}", ("entailment", "neutral", "contradiction")),
}
PROMPTS = {"generic": GENERIC, "t5": T5_OWN}  # --prompts
PROMPT_END = 8  # tokens at the end of a prompt that truncation leaves: the question that is asked


def read_tsv(task, path):
    """[(sentences, label)] of a GLUE file: no quoting, a byte-order mark allowed.  ValueError names file, line, value."""
    with open(path, "rb") as file:
        lines = [decode(line, f"{path}, line {i}").split("\t") for i, line in enumerate(file, 1)]
    columns, start = [*task.text, task.label], 0
    if isinstance(task.label, str):
        header, start = lines[0] if lines else [], 1
        missing = [name for name in columns if name not in header]
        if missing:
            raise ValueError(f"{path}, line 1: no column {missing[0]!r}; the header has {header}")
        columns = [header.index(name) for name in columns]
    rows = []
    for number, fields in enumerate(lines[start:], start + 1):
        if len(fields) <= max(columns):
            if task.skip_short:
                continue
            raise ValueError(f"{path}, line {number}: {len(fields)} fields, expected at least {max(columns) + 1}")
        *text, label = (fields[column] for column in columns)
        rows.append((tuple(text), read_label(task, label, f"{path}, line {number}")))
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def decode(line, where):
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error}") from None


def read_label(task, text, where):
    if task.labels:
        if text not in task.labels:
            raise ValueError(f"{where}: label {text!r}, expected one of {', '.join(task.labels)}")
        return task.labels.index(text)
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        raise ValueError(f"{where}: score {text!r}, expected a number from 0 to 5")
    return score


def encode(tokenizer, rows, max_length):
    """[(token ids, segment ids, label)] of [(sentences, label)], each truncated to max_length tokens."""
    special = tokenizer.num_special_tokens_to_add(len(rows[0][0]) > 1)
    if max_length <= special:
        raise ValueError(f"--max-length is {max_length}; expected more than the {special} special tokens of a row")
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    encodings = tokenizer.encode_batch([text if len(text) > 1 else text[0] for text, _ in rows])
    empty = [text for encoding, (text, _) in zip(encodings, rows) if not encoding.ids]
    if empty:
        raise ValueError(f"the tokenizer gives no token for {empty[0]}")
    return [(encoding.ids, encoding.type_ids, label) for encoding, (_, label) in zip(encodings, rows)]


def encode_prompts(tokenizer, rows, prompt, max_length):
    """[(token ids, None, label)] of [(sentences, label)]; a prompt of more than max_length tokens loses some before its end."""
    if max_length <= PROMPT_END:
        raise ValueError(f"--max-length is {max_length}; expected more than the {PROMPT_END} tokens at a prompt's end")
    tokenizer.no_padding()
    encoded = [encoding.ids for encoding in tokenizer.encode_batch([prompt.format(*text) for text, _ in rows])]
    return [(ids if len(ids) <= max_length else ids[:max_length - PROMPT_END] + ids[-PROMPT_END:], None, label)
            for ids, (_, label) in zip(encoded, rows)]


def encode_answers(tokenizer, answers, eos_id):
    """Token ids of each class's answer, the end of the sequence included."""
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids + as_list(eos_id)[:1] for text in answers]
    if len(set(map(tuple, encoded))) < len(answers):
        raise ValueError(f"the tokenizer gives two of {', '.join(answers)} the same tokens: {encoded}")
    return encoded


def add_label_noise(examples, noise, classes, generator):
    """Give a fraction `noise` of the examples another label, drawn uniformly from the other classes."""
    flipped = set(generator.sample(range(len(examples)), round(noise * len(examples))))
    return [(ids, types, generator.choice([c for c in range(classes) if c != label]) if i in flipped else label)
            for i, (ids, types, label) in enumerate(examples)]


# ---------------------------------------------------------------------------------------------- downloads

GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
SENTEVAL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
DEV_IDS = "https://raw.githubusercontent.com/MegEngine/Models/master/official/nlp/bert/glue_data/MRPC/dev_ids.tsv"
DOWNLOADS = {  # task: [(address, bytes, sha256)]; of QQP no published file has a known one
    "mrpc": [(SENTEVAL + "msr_paraphrase_train.txt", 1047044, "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
             (DEV_IDS, 6222, "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7")],
    "cola": [(GLUE + "CoLA.zip", 376971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff")],
    "sst2": [(GLUE + "SST-2.zip", 7439277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")],
    "rte": [(GLUE + "RTE.zip", 697150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee")],
    "qnli": [(GLUE + "QNLIv2.zip", 10627589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5")],
    "mnli": [(GLUE + "MNLI.zip", 312783507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633")],
    "stsb": [(GLUE + "STS-B.zip", 802872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85")],
}


def cache_folder():
    return os.environ.get("BILORA_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "bilora")


def download(address, size, sha256, path):
    """Put the file at an address there, with a progress bar; ValueError, and nothing there, unless it is the expected one."""
    digest, part = hashlib.sha256(), path + ".part"
    try:
        with (urlopen(address, timeout=30) as source, open(part, "wb") as file,
              tqdm(total=size, unit="B", unit_scale=True, desc=os.path.basename(address)) as bar):
            while block := source.read(2**16):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
                if file.tell() > size:
                    break
    except (OSError, HTTPException) as error:
        raise ValueError(f"{address}: {error}; connect to the network, or give files that are there with --data") from None
    found = os.path.getsize(part)
    if found != size or digest.hexdigest() != sha256:
        os.remove(part)
        raise ValueError(f"{address}: got {found} bytes with sha256 {digest.hexdigest()}; expected {size} with {sha256}")
    os.replace(part, path)


def downloaded_glue(name, files):
    """The folder in the cache that has a task's files; it appears there once it has all of them."""
    folder = os.path.join(cache_folder(), "glue", name)
    if os.path.isdir(folder):
        return folder
    if name not in DOWNLOADS:
        raise ValueError(f"{name} cannot be downloaded, for no file with a known checksum is published; expected --data DIR")
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=name + ".", dir=os.path.dirname(folder)) as scratch:
        paths, whole = [], os.path.join(scratch, "whole")
        for address, size, sha256 in DOWNLOADS[name]:
            paths.append(os.path.join(scratch, os.path.basename(address)))
            download(address, size, sha256, paths[-1])
        os.mkdir(whole)
        if name == "mrpc":
            split_mrpc(*paths, whole)
        else:
            unpack(*paths, files, whole)
        if not os.path.isdir(folder):  # another process may have been first
            os.rename(whole, folder)
    return folder


def unpack(archive, files, folder):
    with zipfile.ZipFile(archive) as source:
        members = {os.path.basename(member): member for member in source.namelist() if member.count("/") == 1}
        for file in files:
            with source.open(members[file]) as inside, open(os.path.join(folder, file), "wb") as outside:
                shutil.copyfileobj(inside, outside)


def split_mrpc(corpus, dev_ids, folder):
    """GLUE's train.tsv and dev.tsv: the pairs of the corpus's training file, by whether dev_ids has both of their ids."""
    with open(dev_ids, "rb") as file:
        chosen = {tuple(line.split()) for line in file}
    with open(corpus, "rb") as file:
        header, *rows = file.readlines()
    for name, development in (("train.tsv", False), ("dev.tsv", True)):
        with open(os.path.join(folder, name), "wb") as file:
            file.writelines([header, *(row for row in rows if (tuple(row.split(b"\t")[1:3]) in chosen) == development)])


# ---------------------------------------------------------------------------------------------- the embedded task

# A language with agreement, to be judged acceptable or not, like CoLA.  Words are (singular, plural) where they inflect.
NOUNS = {
    "animate": "teacher doctor farmer child/children woman/women dog horse bird sailor baker student guest king wolf/wolves",
    "thing": "book letter table bottle car ship lamp knife/knives door bridge clock basket carpet mirror",
}
DETERMINERS = {0: "the a this every", 1: "the these many few"}
ADJECTIVES = {"animate": "hungry clever sleepy brave proud", "thing": "wooden broken rusty hollow plastic",
              "any": "small big red white heavy tall"}
PREPOSITIONS = "near behind beside beneath"
ADVERBS = "never rarely sometimes quickly"
VERBS = {  # frame: (what the subject is, what follows the verb, the verbs)
    "transitive": ("animate", "any", "likes/like carries/carry finds/find touches/touch hides/hide"),
    "consuming": ("animate", "thing", "reads/read repairs/repair sells/sell paints/paint"),
    "affecting": ("any", "animate", "frightens/frighten pleases/please hurts/hurt protects/protect"),
    "living": ("animate", None, "sleeps/sleep laughs/laugh walks/walk waits/wait sings/sing"),
    "being": ("thing", None, "breaks/break shines/shine rots/rot leaks/leak cracks/crack"),
    "saying": ("animate", "clause", "thinks/think says/say hopes/hope claims/claim"),
}


def inflected(words):
    """[(singular, plural)] of "dog child/children"."""
    return [tuple(word.split("/")) if "/" in word else (word, word + "s") for word in words.split()]


def vocabulary():
    words = {"that"} | {word for text in (PREPOSITIONS, ADVERBS, *DETERMINERS.values(), *ADJECTIVES.values())
                        for word in text.split()}
    words |= {form for text in (*NOUNS.values(), *(verbs for _, _, verbs in VERBS.values()))
              for forms in inflected(text) for form in forms}
    return ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]


def fits(need, animacy):
    return need in ("any", animacy)


def verb_phrase(rng, depth, subject, number, gap=None):
    """A verb that agrees with its subject and what follows it, as [(word, words that would be a violation there)].

    subject: its animacy.  gap: animacy of the noun that a relative clause has moved out of the object's place.
    """
    def allowed(frame):
        needs, follows, _ = VERBS[frame]
        object_fits = follows in ("any", gap) if gap else follows != "clause" or depth > 0
        return fits(needs, subject) and object_fits

    frame = rng.choice([frame for frame in VERBS if allowed(frame)])
    _, follows, verbs = VERBS[frame]
    forms = rng.choice(inflected(verbs))
    after, object_animacy = [], gap
    if not gap and follows == "clause":
        after = [("that", []), *clause(rng, depth - 1)]
    elif not gap and follows:
        object_animacy = rng.choice(["animate", "thing"] if follows == "any" else [follows])
        after, _ = noun_phrase(rng, depth - 1, object_animacy)

    def grammatical(other):  # would a verb of the other frame be right here too?
        needs, other_follows, _ = VERBS[other]
        right = fits(other_follows, object_animacy) if object_animacy else other_follows == follows
        return fits(needs, subject) and (right if other_follows else other_follows == follows)

    wrong_frames = [verb[number] for other, (_, _, verbs) in VERBS.items() if not grammatical(other)
                    for verb in inflected(verbs)]
    adverb = [(rng.choice(ADVERBS.split()), [])] if rng.random() < 0.2 else []
    wrong = [forms[1 - number]] if rng.random() < 0.5 or not wrong_frames else wrong_frames
    return [*adverb, (forms[number], wrong), *after]


def noun_phrase(rng, depth, animacy):
    """([(word, violations)], number): a determiner, sometimes an adjective, a noun, sometimes an attractor after it."""
    number = rng.randrange(2)
    determiner = rng.choice(DETERMINERS[number].split())
    wrong = [] if determiner == "the" else [d for d in DETERMINERS[1 - number].split() if d != "the"]
    words = [(determiner, wrong)]
    if rng.random() < 0.3:
        other = "thing" if animacy == "animate" else "animate"
        words.append((rng.choice((ADJECTIVES[animacy] + " " + ADJECTIVES["any"]).split()), ADJECTIVES[other].split()))
    words.append((rng.choice(inflected(NOUNS[animacy]))[number], []))
    kind = rng.random() if depth > 0 else 1.0
    if kind < 0.25:    # an attractor: "the dogs near the table sleep"
        words += [(rng.choice(PREPOSITIONS.split()), []), *noun_phrase(rng, 0, rng.choice(["animate", "thing"]))[0]]
    elif kind < 0.4:   # a subject relative clause: "the dogs that like the king sleep"
        words += [("that", []), *verb_phrase(rng, 0, animacy, number)]
    elif kind < 0.55:  # an object relative clause: "the dogs that the king likes sleep"
        subject = rng.choice(["animate", "thing"] if animacy == "animate" else ["animate"])
        inner, inner_number = noun_phrase(rng, 0, subject)
        words += [("that", []), *inner, *verb_phrase(rng, 0, subject, inner_number, gap=animacy)]
    return words, number


def clause(rng, depth):
    subject = rng.choice(["animate", "thing"])
    words, number = noun_phrase(rng, depth, subject)
    return [*words, *verb_phrase(rng, depth, subject, number)]


def sentence(rng, acceptable=True):
    """A list of words.  An unacceptable one differs from an acceptable one by one violation or one exchange of neighbours.

    A noun and its determiner and adjective stand together in every acceptable sentence, so that an exchange which
    moves one of them never gives another acceptable one.
    """
    while not 4 <= len(words := clause(rng, depth=1)) <= 14:
        pass
    text = [word for word, _ in words]
    if acceptable:
        return text
    places = [i for i, (_, wrong) in enumerate(words) if wrong]
    if places and rng.random() < 0.8:
        place = rng.choice(places)
        text[place] = rng.choice(words[place][1])
        return text
    fixed = {word for group in (NOUNS["animate"], NOUNS["thing"]) for forms in inflected(group) for word in forms}
    fixed |= {word for group in (*DETERMINERS.values(), *ADJECTIVES.values()) for word in group.split()}
    place = rng.choice([i for i in range(len(text) - 1) if text[i] in fixed or text[i + 1] in fixed])
    text[place], text[place + 1] = text[place + 1], text[place]
    return text


def embedded_rows(seed, split, count):
    """[((sentence,), label)] with as many acceptable sentences as not; another stream of numbers for each seed and split."""
    rng = random.Random(f"{split}-{seed}")
    return [((" ".join(sentence(rng, acceptable=i % 2 == 1)),), i % 2) for i in range(count)]


def embedded_tokenizer():
    vocab = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[MASK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")])
    return tokenizer


EMBEDDED_TRAIN, EMBEDDED_TEST = 400, 2000  # sentences
EMBEDDED_CONFIG = Config(vocab_size=len(vocabulary()), d_model=128, d_ff=512, heads=4, encoder_layers=4, max_length=20,
                         pooling="mean")
PRETRAINING = {"batch_size": 128, "lr": 2e-3, "chosen": 0.4, "hidden": 0.4, "replaced": 0.4, "sentences": 60_000}


def pretrained_base(args):
    """Path of the embedded task's base, a state dict; pretrained now, by denoising, if runs/ does not have it."""
    language = [sentence(random.Random(i)) for i in range(50)]  # another grammar, another base
    settings = [asdict(EMBEDDED_CONFIG), PRETRAINING, args.pretraining_steps, args.bf16, vocabulary(), language]

    def batches():
        rng = random.Random(0)
        rows = [((" ".join(sentence(rng)),), 0) for _ in range(PRETRAINING["sentences"])]
        examples = encode(embedded_tokenizer(), rows, EMBEDDED_CONFIG.max_length)
        while True:
            for batch in batch_order(examples, PRETRAINING["batch_size"], rng):
                yield [examples[i] for i in batch]

    def optimizers(model):
        return [torch.optim.AdamW(model.parameters(), lr=PRETRAINING["lr"], weight_decay=0.01, fused=True)]

    return pretrained(settings, partial(Transformer, EMBEDDED_CONFIG), optimizers, batches(), denoising_loss, args)


def denoising_loss(model, examples, device):
    ids, _, mask, _ = collate(examples, 0, device)
    shown, chosen = corrupt(ids)
    logits = F.linear(model(shown, mask)[chosen], model.encoder.tokens.weight)
    return F.cross_entropy(logits.float(), ids[chosen])


def corrupt(ids):
    """(what the model is shown, the words it has to predict): each chosen one is hidden, replaced by any word, or kept."""
    special, mask = 4, 3  # [PAD] [CLS] [SEP] [MASK] come first in the vocabulary
    chosen = (torch.rand(ids.shape, device=ids.device) < PRETRAINING["chosen"]) & (ids >= special)
    dice = torch.rand(ids.shape, device=ids.device)
    shown = torch.where(chosen & (dice < PRETRAINING["hidden"]), mask, ids)
    any_word = torch.randint_like(ids, special, EMBEDDED_CONFIG.vocab_size)
    return torch.where(chosen & (dice > 1 - PRETRAINING["replaced"]), any_word, shown), chosen


def pretrained(settings, build, optimizers, batches, loss_of, args):
    """Path of a state dict in runs/, by a hash of `settings`; if it is not there, all of a model is trained now and saved."""
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    path, device, steps = os.path.join("runs", f"pretrained-{key}.pt"), torch.device(args.device), args.pretraining_steps
    if os.path.exists(path):
        return path
    torch.manual_seed(0)
    model = build().to(device).train()
    optimizers = optimizers(model)
    schedules = [cosine_schedule(optimizer, steps, warmup=0.05) for optimizer in optimizers]
    print("pretraining the base: once, for it is kept in runs/", flush=True)
    bar = tqdm(range(steps), desc="pretraining the base", disable=None)
    for _, batch in zip(bar, batches):
        with precision(device, args.bf16):
            loss = loss_of(model, batch, device)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    os.makedirs("runs", exist_ok=True)
    torch.save(model.state_dict(), path + ".tmp")
    os.replace(path + ".tmp", path)
    return path


# ---------------------------------------------------------------------------------------------- batches


def batch_order(examples, batch_size, rng):
    """Lists of indices, one epoch: shuffled, but each batch of rows of similar length (sorted within 16 batches)."""
    order, pool = list(range(len(examples))), 16 * batch_size
    rng.shuffle(order)
    order = [i for start in range(0, len(order), pool)
             for i in sorted(order[start:start + pool], key=lambda i: len(examples[i][0]))]
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(examples, pad_id, device):
    """(ids, segment ids, mask, labels): (B, L) int64 three times, padded to the longest row, and (B,)."""
    ids, types, labels = zip(*examples)
    mask = [[1] * len(row) for row in ids]
    padded = (pad_rows(rows, fill, device) for rows, fill in ((ids, pad_id), (types, 0), (mask, 0)))
    return (*padded, torch.tensor(labels, device=device))


def pad_rows(rows, fill, device):
    """(B, L) int64, each row filled up on the right to the longest."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], device=device)


@contextlib.contextmanager
def precision(device, bf16):
    """Autocast to bfloat16, or nothing.  On a CPU the plain attention kernel's backward is the faster one in bfloat16."""
    with contextlib.ExitStack() as stack:
        if bf16:
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def cosine_schedule(optimizer, steps, warmup=0.03):
    """Linear warm-up over a fraction of the steps, then half a cosine to 0; the same factor for every group."""
    warm = max(1, round(warmup * steps))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / warm if step < warm else
                                             0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


# ---------------------------------------------------------------------------------------------- scores


def score(task, predictions, labels):
    """{metric: value} of one evaluation set; F1 is that of class 1, and what is 0 / 0 is 0."""
    p, y = np.asarray(predictions, dtype=float), np.asarray(labels, dtype=float)
    tp, fp, fn, tn = (np.sum((p == a) & (y == b)) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0)))
    ratio = lambda a, b: float(a / b) if b > 0 else 0.0
    metrics = {
        "accuracy": lambda: float(np.mean(p == y)),
        "f1": lambda: ratio(2 * tp, 2 * tp + fp + fn),
        "matthews": lambda: ratio(tp * tn - fp * fn, math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))),
        "pearson": lambda: correlation(p, y),
        "spearman": lambda: correlation(ranks(p), ranks(y)),
    }
    return {name: metrics[name]() for name in task.metrics}


def correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / norm if norm > 0 else 0.0


def ranks(values):
    """Ranks from 1, ties sharing their mean rank."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


@torch.no_grad()
def predict(model, experiment, examples, args):
    """The class, or for a regression the number, that the model gives each example."""
    model.eval()
    device, classes = torch.device(args.device), bool(experiment.task.labels)
    predictions, order = [0] * len(examples), sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    for start in range(0, len(order), 128):
        batch = order[start:start + 128]
        with precision(device, args.bf16):
            scores = class_scores(model, experiment, [examples[i] for i in batch], device)
        for i, value in zip(batch, (scores.argmax(1) if classes else scores[:, 0]).tolist()):
            predictions[i] = value
    return predictions


def class_scores(model, experiment, examples, device):
    """(B, classes), the largest of which is the prediction: a classifier's logits, or log p(answer | prompt)."""
    if experiment.answers is None:
        ids, types, mask, _ = collate(examples, experiment.pad_id, device)
        return model(ids, mask, types).float()
    prompts = [ids for ids, *_ in examples for _ in experiment.answers]
    answers = experiment.answers * len(examples)
    return -answer_losses(model, prompts, answers, experiment.pad_id, device).view(len(examples), -1)


def answer_losses(model, prompts, answers, pad_id, device):
    """-log p(answer | prompt) of each row, (B,), the sum over the answer's tokens.

    A decoder reads the prompt and then the answer; beside an encoder, which reads the prompt, the answer alone.
    """
    before = prompts if model.encoder is None else [[model.config.start_id]] * len(prompts)
    ids = pad_rows([[*start, *answer[:-1]] for start, answer in zip(before, answers)], pad_id, device)       # (B, T)
    labels = pad_rows([[-100] * (len(start) - 1) + answer for start, answer in zip(before, answers)], -100, device)
    if model.encoder is None:
        mask = pad_rows([[1] * (len(start) + len(answer) - 1) for start, answer in zip(before, answers)], 0, device)
        h = model.hidden(ids, mask)                                                                        # (B, T, D)
    else:
        mask = pad_rows([[1] * len(prompt) for prompt in prompts], 0, device)
        h = model.hidden(pad_rows(prompts, pad_id, device), mask, decoder_input_ids=ids)
    keep = labels != -100
    losses = torch.zeros(labels.shape, device=device)
    losses[keep] = F.cross_entropy(model.logits(h[keep]).float(), labels[keep], reduction="none")
    return losses.sum(1)


def metric_name(metric, name, sets):
    """Where there are several evaluation sets, a metric's name ends in its set's: accuracy_matched."""
    return f"{metric}_{name.removeprefix('dev_')}" if len(sets) > 1 else metric


def scores_of(task, predictions, sets):
    """{metric: value} over {set: predictions}."""
    return {metric_name(metric, name, sets): value for name, examples in sets.items()
            for metric, value in score(task, predictions[name], [label for *_, label in examples]).items()}


def evaluate(model, experiment, sets, args):
    """({metric: value}, for the epoch's record: predictions per class and whether all are of one, {file: text} to keep)."""
    predictions = {name: predict(model, experiment, examples, args) for name, examples in sets.items()}
    classes = range(len(experiment.task.labels))
    counts = {name: [p.count(c) for c in classes] for name, p in predictions.items() if classes}
    one_class = any(max(row) == sum(row) for row in counts.values())
    return scores_of(experiment.task, predictions, sets), {"predicted": counts, "one_class": one_class}, {}


# ---------------------------------------------------------------------------------------------- one run


def forward_backward(model, experiment, examples, args):
    """Mean loss over the examples, or over their answers' tokens, 0-dim; its gradient is added up micro-batch by micro-batch."""
    device, size, total = torch.device(args.device), args.micro_batch or len(examples), 0.0
    count = experiment.count(examples)
    for start in range(0, len(examples), size):
        with precision(device, args.bf16):
            loss = experiment.loss(model, examples[start:start + size], device) / count
        loss.backward()
        total = total + loss.detach()
    return total


def prepare(args, method, seed, build):
    """(model, layers, optimizers) of a run: the same head and primary pairs for every method of a seed."""
    torch.manual_seed(seed)  # first: head and adapters are drawn from it
    model = build().to(args.device)
    model.config.checkpointing = args.checkpointing
    layers = add_lora(model, args.rank, args.alpha, args.aux_rank if method in ("bi-lora", "bi-lora-power") else 0)
    if model.classifier is not None:
        model.classifier.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = args.dropout
    torch.manual_seed(seed)  # dropout masks: the same stream, however much the adapters drew
    descent, ascent = bilora_optimizers(model, args.lr, args.aux_lr, args.ascent)
    return model, layers, (descent, None if method == "bi-lora-power" else ascent)


def radius(args, method):
    return {"lora": 0.0, "lora-sam": args.rho[0], "bi-lora": args.rho[-1], "bi-lora-power": args.rho[-1]}[method]


def parameter_counts(model):
    groups = {"primary": primary_parameters(model), "auxiliary": auxiliary_parameters(model),
              "head": list(model.classifier.parameters()) if model.classifier is not None else []}
    return {name: sum(p.numel() for p in params) for name, params in groups.items()}


def train(args, method, seed, experiment, folder):
    """One method, one seed.  Returns the run's metrics, and leaves a run folder with all there is to know about it."""
    examples, sets = experiment.data(seed)
    model, layers, optimizers = prepare(args, method, seed, experiment.build)
    steps = args.epochs * math.ceil(len(examples) / args.batch_size)
    schedules, rng = [cosine_schedule(o, steps) for o in optimizers if o], random.Random(seed)
    run = {"log": [], "epochs": [], "order": rng.getstate(), "done": 0}  # done: batches of the epoch that begins with `order`
    state, moments = os.path.join(folder, "state.pt"), snapshot_steps(args.snapshots, steps)
    if args.resume and os.path.exists(state):
        run = load_state(state, model, optimizers, schedules)
    reset_peak_memory(args.device)
    bar = tqdm(total=steps, initial=len(run["log"]), desc=f"{method}, seed {seed}", leave=False, disable=None)
    for epoch in range(len(run["epochs"]) + 1, args.epochs + 1):
        rng.setstate(run["order"])
        model.train()
        for batch in batch_order(examples, args.batch_size, rng)[run["done"]:]:
            save_snapshot(folder, model, len(run["log"]), moments)
            lr = schedules[0].get_last_lr()[0]
            row = train_step(args, method, model, layers, optimizers, experiment, [examples[i] for i in batch])
            for schedule in schedules:
                schedule.step()
            run["log"].append({"step": len(run["log"]) + 1, "epoch": epoch, "lr": lr, **row})
            run["done"] += 1
            bar.update()
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            if args.save_every and len(run["log"]) % args.save_every == 0:
                save_state(state, model, optimizers, schedules, run)
        if args.save_every:
            save_state(state, model, optimizers, schedules, run)  # scoring takes long too
        last = epoch == args.epochs
        metrics, record, files = experiment.evaluate(model, sets, args) if last or experiment.every_epoch else ({}, {}, {})
        loss = statistics.fmean(row["loss"] for row in run["log"] if row["epoch"] == epoch)
        run["epochs"].append({"epoch": epoch, "loss": loss, **metrics, **record})
        run |= {"order": rng.getstate(), "done": 0}
    save_snapshot(folder, model, len(run["log"]), moments)
    bar.close()
    return write_run(args, method, seed, experiment, model, run, files, folder)


def train_step(args, method, model, layers, optimizers, experiment, examples):
    """One step of a method on one batch; {what is logged of it}."""
    descent, ascent = optimizers
    passes, found, primary, rho = [], [], primary_parameters(model), radius(args, method)

    def closure():
        if method == "lora-sam":  # for the log: how far apart the weights of the two passes are
            passes.append([p.detach().clone() for p in primary])
        return forward_backward(model, experiment, examples, args)

    def clip(layers, rho):
        found.append(clip_perturbation_(layers, rho))

    begin = time.perf_counter()
    if method == "lora":
        loss = lora_step(descent, closure)
    elif method == "lora-sam":
        loss = lora_sam_step(descent, closure, rho, primary)
    elif method == "bi-lora":
        loss = bilora_step(descent, ascent, closure, layers, rho, clip)
    elif method == "bi-lora-power":
        loss = bilora_power_step(descent, closure, layers, rho, args.momentum)
    loss = loss.item()  # waits for the device
    seconds = time.perf_counter() - begin
    if passes:
        found.append(get_total_norm([a - b for a, b in zip(*passes)]))
    norm = found[0] if found else perturbation_norm(layers)
    return {"loss": loss, "perturbation": norm.item(), "clipped": method == "bi-lora" and bool(norm > rho), "seconds": seconds}


def trained_tensors(model):
    """{name: tensor} of all that is trained, the auxiliary pairs too; writing into one writes into the model."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_state(path, model, optimizers, schedules, run):
    """All that the rest of a run depends on."""
    device = [torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    save_tensors(path, {"trained": trained_tensors(model), "optimizers": [o.state_dict() for o in optimizers if o],
                        "schedules": [schedule.state_dict() for schedule in schedules],
                        "run": run, "random": [torch.get_rng_state(), *device]})


def save_tensors(path, content):
    """Under a temporary name until the file is whole."""
    try:
        torch.save(content, path + ".tmp")
    except RuntimeError as error:  # torch's own of a full disk
        raise OSError(f"{path}.tmp: {str(error).splitlines()[0]}") from None
    os.replace(path + ".tmp", path)


def snapshot_steps(count, steps):
    """The steps after which a snapshot is taken: `count` of them, evenly from 0 to the last."""
    return {round(i * steps / max(1, count - 1)) for i in range(count)}


def save_snapshot(folder, model, step, moments):
    if step in moments:
        os.makedirs(os.path.join(folder, "snapshots"), exist_ok=True)
        path = os.path.join(folder, "snapshots", f"step-{step:06d}.pt")
        save_tensors(path, trained_tensors(model))


def load_state(path, model, optimizers, schedules):
    """Put a saved state back; returns `run` as it was."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            trained = trained_tensors(model)
            for name in trained.keys() | state["trained"].keys():
                trained[name].copy_(state["trained"][name])
        for part, saved in zip([*filter(None, optimizers), *schedules], [*state["optimizers"], *state["schedules"]], strict=True):
            part.load_state_dict(saved)
        torch.set_rng_state(state["random"][0])
        if len(state["random"]) > 1:
            torch.cuda.set_rng_state_all(state["random"][1])
        return state["run"]
    except Exception as error:  # a file that is not one, or not of this run
        raise OSError(f"{path}: not the state of this run ({type(error).__name__}); remove it to start the run anew") from None


def run_config(args, method, seed, experiment):
    """What a run depends on: its settings and its files, but not the other runs nor where its own files go."""
    others = {"method", "seeds", "rho", "out", "resume", "save_every", "snapshots", "eval_batch_size"}
    config = {"method": method, "seed": seed, "rho": radius(args, method), "files": experiment.files,
              **{name: value for name, value in vars(args).items() if name not in others}}
    return json.loads(json.dumps(config))  # as it is read back


def finished_run(config, folder):
    """The metrics of a run that was completed in this folder, or None.  ValueError if it was begun with other settings."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        forget(folder)
        return None
    begun = read_json(path)
    for key in begun.keys() | config.keys():
        if begun.get(key) != config.get(key):
            raise ValueError(f"{path}: {key} is {begun.get(key)!r}, now {config.get(key)!r}; a run goes on with its own settings")
    path = os.path.join(folder, "metrics.json")
    return read_json(path) if os.path.exists(path) else None


def read_json(path):
    with open(path, encoding="utf-8") as file:
        try:
            return dict(json.load(file))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a JSON object: {error}") from None


def write_run(args, method, seed, experiment, model, run, files, folder):
    """The files of a finished run; returns its metrics, which are written last, for they say that it is finished."""
    log, epochs = run["log"], run["epochs"]
    scored = [row for row in epochs if experiment.metrics[0] in row]
    best, last = max(scored, key=lambda row: row[experiment.metrics[0]]), epochs[-1]
    metrics = {name: last[name] for name in experiment.metrics}
    if experiment.every_epoch:
        metrics |= {f"best_{name}": best[name] for name in experiment.metrics}
    result = {"method": method, "seed": seed, "config": run_config(args, method, seed, experiment),
              "parameters": parameter_counts(model), "metrics": metrics, "best_epoch": best["epoch"], "epochs": epochs,
              "clipped_fraction": statistics.fmean(row["clipped"] for row in log),
              "step_seconds": statistics.median(row["seconds"] for row in log), "peak_memory_bytes": peak_memory(args.device)}
    for name, text in {**files, "log.jsonl": "".join(json.dumps(row) + "\n" for row in log)}.items():
        write_text(os.path.join(folder, name), text)
    save_adapter(model, folder, model.module_names)
    if args.merge:
        save_pretrained(merge_lora_(model), os.path.join(folder, "merged"), experiment.source)
    draw_curves([result], experiment.metrics[0], os.path.join(folder, "curves.png"))
    write_text(os.path.join(folder, "metrics.json"), json.dumps(result, indent=2))
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, "state.pt"))
    return result


def write_text(path, text):
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


def reset_peak_memory(device):
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.path.exists("/proc/self/clear_refs"):
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: forget the largest resident size so far


def peak_memory(device):
    """Bytes: allocated on a GPU; on a CPU the process's largest resident size, None where that is not Linux's /proc."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not os.path.exists("/proc/self/status"):
        return None
    with open("/proc/self/status") as file:
        peaks = [1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM")]
    return peaks[0] if peaks else None


# ---------------------------------------------------------------------------------------------- the experiment


@dataclass
class Experiment:
    """What `compare` needs of a task: the other script has one of its own with the same names."""
    task: Task
    build: object        # () -> the pretrained model, an encoder with a fresh head
    data: object         # seed -> (training examples, {name: evaluation examples})
    pad_id: int
    metrics: list        # the first one chooses the best epoch
    files: list          # what was read: [path, size, time of change]
    answers: list = None  # text to text: the token ids of each class's answer
    source: str = None   # the checkpoint's folder
    every_epoch = True   # is when it is scored

    def loss(self, model, examples, device):
        """Summed over the examples, 0-dim."""
        if self.answers is not None:
            prompts, answers = zip(*((ids, self.answers[label]) for ids, _, label in examples))
            return answer_losses(model, prompts, answers, self.pad_id, device).sum()
        ids, types, mask, labels = collate(examples, self.pad_id, device)
        logits = model(ids, mask, types).float()
        if self.task.labels:
            return F.cross_entropy(logits, labels, reduction="sum")
        return F.mse_loss(logits[:, 0], labels, reduction="sum")

    def count(self, examples):
        """What the summed loss is divided by."""
        return len(examples) if self.answers is None else sum(len(self.answers[label]) for *_, label in examples)

    def evaluate(self, model, sets, args):
        return evaluate(model, self, sets, args)

    def majority(self, examples, sets):
        """{metric: value} of the most frequent training label, for comparison."""
        constant = statistics.mode(label for *_, label in examples) if self.task.labels else 0.0
        return scores_of(self.task, {name: [constant] * len(rows) for name, rows in sets.items()}, sets)


def metric_names(task, sets):
    return [metric_name(metric, name, sets) for name in sets for metric in task.metrics]


def file_stamps(*paths):
    return [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths]


def load(args):
    """The experiment that the arguments describe.  ValueError or OSError for files that do not fit."""
    return (load_embedded if args.task == "embedded" else load_glue)(args, TASKS[args.task])


def load_embedded(args, task):
    tokenizer = embedded_tokenizer()

    def untrained():
        return Transformer(replace(EMBEDDED_CONFIG, num_labels=2))

    require_ranks_that_fit(args, untrained)  # before minutes of pretraining
    path = pretrained_base(args)
    state = torch.load(path, map_location=args.device, weights_only=True)

    def build():
        model = untrained()
        model.load_state_dict({**model.state_dict(), **state})  # all but the head
        return model

    def data(seed):
        examples, test = (encode(tokenizer, embedded_rows(seed, split, count), EMBEDDED_CONFIG.max_length)
                          for split, count in (("train", args.limit), ("test", EMBEDDED_TEST)))
        return add_label_noise(examples, args.label_noise, 2, random.Random(f"noise-{seed}")), {"test": test}

    return Experiment(task, build, data, 0, list(task.metrics), file_stamps(path))


def load_glue(args, task):
    source = local_folder(args.model, args.revision)
    config, _ = read_config(source)
    text_to_text = config.decoder_layers > 0
    if text_to_text and args.task not in GENERIC:
        raise ValueError(f"{args.task} is a regression; expected an encoder as --model, or a task with classes")
    if args.prompts and not text_to_text:
        raise ValueError(f"--prompts is {args.prompts}, but {source} has a classifier; expected a model that answers in text")
    build = partial(Transformer.from_pretrained, source, num_labels=None if text_to_text else len(task.labels) or 1)
    require_ranks_that_fit(args, build)
    tokenizer, files = load_tokenizer(source), [name + ".tsv" for name in ("train", *task.dev)]
    pad_id = tokenizer.padding["pad_id"]
    paths = [os.path.join(args.data or downloaded_glue(args.task, files), file) for file in files]
    rows, answers = [read_tsv(task, path) for path in paths], None
    if text_to_text:
        prompt, words = PROMPTS[args.prompts or "generic"][args.task]
        answers = encode_answers(tokenizer, words, config.eos_id)
        examples, *dev = (encode_prompts(tokenizer, part, prompt, args.max_length) for part in rows)
    else:
        examples, *dev = (encode(tokenizer, part, args.max_length) for part in rows)
    if not task.labels:
        build = partial(with_mean_head, build, statistics.fmean(label for *_, label in examples))
    sets = dict(zip(task.dev, dev))
    require_room(args, config, answers)
    require_known_tokens(os.path.join(source, "tokenizer.json"), config, [*examples, *itertools.chain(*dev)], answers, pad_id)

    def data(seed):
        some = examples
        if args.limit and args.limit < len(examples):
            some = random.Random(f"limit-{seed}").sample(examples, args.limit)
        return add_label_noise(some, args.label_noise, len(task.labels), random.Random(f"noise-{seed}")), sets

    checkpoint = [os.path.join(source, name) for name in sorted(os.listdir(source))]
    return Experiment(task, build, data, pad_id, metric_names(task, sets),
                      file_stamps(*paths, *filter(os.path.isfile, checkpoint)), answers, source)


def with_mean_head(build, mean):
    """The model with a fresh regression head that predicts the mean training label; a head from the checkpoint stays."""
    model = build()
    head = getattr(model.classifier, "out_proj", model.classifier)
    if not head.bias.any():
        nn.init.constant_(head.bias, mean)
    return model


def require_room(args, config, answers):
    answer = max(map(len, answers)) - 1 if answers and not config.encoder_layers else 0  # the last token is not read
    if config.max_length is not None and args.max_length + answer > config.max_length:
        raise ValueError(f"--max-length is {args.max_length}" + (f", the longest answer {answer} more" if answer else "")
                         + f"; the model has {config.max_length} positions")


def require_known_tokens(path, config, examples, answers, pad_id):
    """ValueError for a token or a segment that the model has no embedding for."""
    token = max(pad_id, *(max(ids) for ids, *_ in examples), *map(max, answers or []))
    segment = max(max(types or [0]) for _, types, _ in examples)
    for what, largest, count in (("token", token, config.vocab_size), ("segment", segment, config.token_types or math.inf)):
        if largest >= count:
            raise ValueError(f"{path}: gives {what} {largest}; the model has {count}")


def require_ranks_that_fit(args, build):
    prepare(args, "bi-lora" if any(m.startswith("bi-lora") for m in args.method) else "lora", 0, build)


# ---------------------------------------------------------------------------------------------- all runs together


def compare(parser, args, experiment):
    """Train and score every method with every seed; write metrics.json and curves.png over all, and print the table."""
    runs, results = list(itertools.product(args.seeds, args.method)), []
    folders = {(seed, method): os.path.join(args.out, f"{method}-seed{seed}") for seed, method in runs}
    configs = {(seed, method): run_config(args, method, seed, experiment) for seed, method in runs}
    try:
        if args.resume and not os.path.isdir(args.resume):
            raise ValueError(f"{args.resume}: no such folder; expected the --out of an earlier command")
        finished = {key: finished_run(configs[key], folder) if args.resume else None for key, folder in folders.items()}
        for key, folder in folders.items():
            os.makedirs(folder, exist_ok=True)
            if os.path.exists(os.path.join(folder, "adapter_model.safetensors")):
                raise ValueError(f"{folder}: holds adapter_model.safetensors, of another program; expected an --out of its own")
            if not args.resume:
                forget(folder)
            write_text(os.path.join(folder, "config.json"), json.dumps(configs[key], indent=2))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    examples, sets = experiment.data(args.seeds[0])
    majority = experiment.majority(examples, sets)
    print(f"{args.task}: {len(examples)} training rows; " + ", ".join(f"{len(r)} rows in {n}" for n, r in sets.items()))
    for seed, method in runs:
        try:
            results.append(finished[seed, method] or train(args, method, seed, experiment, folders[seed, method]))
        except OSError as error:
            parser.error(f"{method}, seed {seed}: {error}")
        except FloatingPointError as error:
            raise SystemExit(f"{parser.prog}: {method}, seed {seed}: {error}")
        if seed == args.seeds[0]:
            print(f"{method}: parameters " + ", ".join(f"{k} {v:,}" for k, v in results[-1]["parameters"].items())
                  + "; kept at inference: primary, merged or not, and head")
        print(f"{method}, seed {seed}: " + ", ".join(f"{k} {v:.4f}" for k, v in results[-1]["metrics"].items()), flush=True)
        summary, differences = summarize(results)
        report = {"task": args.task, "model": args.model or "embedded", "config": vars(args), "majority": majority,
                  "results": results, "summary": summary, "difference_to_lora": differences}
        write_text(os.path.join(args.out, "metrics.json"), json.dumps(report, indent=2))
    draw_curves(results, experiment.metrics[0], os.path.join(args.out, "curves.png"))
    print_table(results, summary, differences, majority)
    return report


def forget(folder):
    """Of an earlier run in this folder, what would be taken for this one's."""
    for name in ("metrics.json", "state.pt", "sharpness.json"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))
    for name in ("merged", "snapshots"):
        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def mean_stderr(values):
    n = len(values)
    return {"mean": statistics.fmean(values), "stderr": statistics.stdev(values) / math.sqrt(n) if n > 1 else None, "n": n}


def summarize(results):
    """({method: {metric: mean, standard error, n}}, the same of the differences to LoRA with the same seed)."""
    runs = {(run["method"], run["seed"]): run["metrics"] for run in results}
    summary, differences = {}, {}
    for method in dict.fromkeys(run["method"] for run in results):
        seeds = [seed for name, seed in runs if name == method]
        summary[method] = {metric: mean_stderr([runs[method, seed][metric] for seed in seeds])
                           for metric in runs[method, seeds[0]]}
        paired = [seed for seed in seeds if ("lora", seed) in runs]
        if method != "lora" and paired:
            differences[method] = {metric: mean_stderr([runs[method, seed][metric] - runs["lora", seed][metric]
                                                        for seed in paired]) for metric in summary[method]}
    return summary, differences


def print_table(results, summary, differences, majority):
    """A Markdown table for each metric."""
    def cell(entry):
        return "" if entry is None else f"{entry['mean']:.4f} ± {entry['stderr']:.4f}" if entry["n"] > 1 else f"{entry['mean']:.4f}"

    for metric in [name for name in results[0]["metrics"] if not name.startswith("best_")]:
        print(f"\n| {metric:<8} | last epoch      | minus LoRA's     | best epoch      | s/step | peak MiB |")
        print("|----------|-----------------|------------------|-----------------|--------|----------|")
        if metric in majority:
            print(f"| majority | {majority[metric]:<15.4f} | {'':<16} | {'':<15} |        |          |")
        for method, entries in summary.items():
            runs = [run for run in results if run["method"] == method]
            difference = cell(differences[method][metric]) if method in differences else ""
            seconds = statistics.median(run["step_seconds"] for run in runs)
            peak = max((run["peak_memory_bytes"] or 0) / 2**20 for run in runs)
            print(f"| {method:<8} | {cell(entries[metric]):<15} | {difference:<16} | {cell(entries.get('best_' + metric)):<15} "
                  f"| {seconds:<6.3f} | {peak:<8.0f} |")
    degenerate = [f"{run['method']} seed {run['seed']}" for run in results if run["epochs"][-1].get("one_class")]
    print("\nPredicted one class only: " + ", ".join(degenerate) if degenerate else "")
    best = "; the best epoch is chosen on the set it is reported on" if "best_" + metric in results[0]["metrics"] else ""
    print(f"Mean ± standard error over {max(e[metric]['n'] for e in summary.values())} seeds; differences are paired by seed{best}.")


def draw_curves(results, metric, path):
    """Training loss and evaluation metric over the epochs, a line a method, a band of one standard error over the seeds."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, key, label in ((axes[0], "loss", "training loss"), (axes[1], metric, metric)):
        for method in dict.fromkeys(run["method"] for run in results):
            rows = [[row for row in run["epochs"] if key in row] for run in results if run["method"] == method]
            epochs, curves = [row["epoch"] for row in rows[0]], np.array([[row[key] for row in run] for run in rows])
            mean = curves.mean(0)
            error = curves.std(0, ddof=1) / math.sqrt(len(curves)) if len(curves) > 1 else np.zeros_like(mean)
            axis.plot(epochs, mean, marker=".", label=method)
            axis.fill_between(epochs, mean - error, mean + error, alpha=0.2)
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
    axes[0].legend()
    figure.savefig(path + ".tmp", format="png", dpi=100)
    os.replace(path + ".tmp", path)


# ---------------------------------------------------------------------------------------------- arguments and main


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, least, below=math.inf):
    """An argparse type: a number from `least` to under `below`."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < below:
            raise argparse.ArgumentTypeError(f"{text!r}, expected {kind.__name__} >= {least}"
                                             + (f" and < {below}" if below < math.inf else ""))
        return value
    return convert


def device_name(text):
    """An argparse type: the name of a device that this machine has."""
    try:
        torch.ones(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}, {str(error).splitlines()[0]}") from None
    return text


SOURCES = """Whose the settings are.  The paper's: rank, aux-rank, alpha, aux-lr = lr, warm-up over 0.03 of the steps and
half a cosine, adapters on all linear layers without dropout, max-length, and the table below where it says so.  The code
that the paper follows (LoRA-GA, Flat-LoRA): AdamW without weight decay, the generic prompts.  The authors' code, as
reported: ascent sgd.  Ours: no dropout in the base either (the followed code leaves T5's 0.1 on), no gradient clipping (the
followed code clips at 1), float32 unless --bf16, batches of similar length, the last epoch's score, the whole answer
compared and not its first token, and every default not named here.
"""


def parse_arguments(argv):
    epilog = SOURCES + "\nDefaults by task:\n" + "".join(
        f"  {name:<9} --lr {task.lr} --batch-size {task.batch_size} --epochs {task.epochs} --rho {task.rho[0]} "
        f"{task.rho[1]} --seeds {' '.join(map(str, task.seeds))} ({task.source})\n" for name, task in TASKS.items())
    parser = Parser(prog="train_glue.py", description=__doc__, epilog=epilog,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("task")
    group.add_argument("--task", type=str.lower, choices=TASKS, default="embedded", help="default: %(default)s, ours")
    group.add_argument("--data", help="folder with the GLUE task's train.tsv and dev.tsv (default: downloaded once into "
                                      "$BILORA_CACHE or ~/.cache/bilora)")
    group.add_argument("--model", help="for a GLUE task: folder with config.json, model.safetensors and tokenizer.json, or "
                                       "the id of a model on the Hugging Face hub")
    group.add_argument("--revision", help="of the model on the hub: a branch, tag or commit (default: main)")
    group.add_argument("--prompts", choices=PROMPTS, help="for T5, Llama and Qwen2: t5 are those that T5 v1.0 saw GLUE's training "
                       "sets with while it was pretrained (default: generic, the followed code's)")
    group.add_argument("--limit", type=number(int, 1),
                       help=f"training examples, drawn by the seed (default: all; embedded: {EMBEDDED_TRAIN}, ours)")
    group.add_argument("--label-noise", type=number(float, 0, 1),
                       help="fraction of training labels replaced by another (default: 0; embedded: 0.1, ours)")
    group.add_argument("--pretraining-steps", type=number(int, 0), default=2000,
                       help="of the embedded task's base; 0: a random base (default: %(default)s, ours)")
    group.add_argument("--max-length", type=number(int, 1), help="tokens a row, for a GLUE task (default: 256, the paper's)")
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return parser, args


def add_shared_arguments(parser):
    """The groups "method" and "run", which are those of both scripts."""
    group = parser.add_argument_group("method")
    group.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS[:3]),
                       help="bi-lora-power is not the paper's: it perturbs by block power iteration (default: the first three)")
    group.add_argument("--rank", type=number(int, 1), default=8, help="r (default: %(default)s, the paper's)")
    group.add_argument("--aux-rank", type=number(int, 1), default=8,
                       help="r2, Bi-LoRA and the power rule (default: %(default)s, the paper's)")
    group.add_argument("--alpha", type=number(float, 1e-6), default=16,
                       help="scale s = alpha / r (default: %(default)s, the paper's)")
    group.add_argument("--rho", type=number(float, 0), nargs="+",
                       help="radius; two values: LoRA-SAM's, and that of Bi-LoRA and the power rule (default: by task)")
    group.add_argument("--lr", type=number(float, 0), help="largest learning rate of the cosine schedule, eta1 (default: by task)")
    group.add_argument("--aux-lr", type=number(float, 0), help="eta2, of the ascent, on the same schedule (default: --lr, the paper's)")
    group.add_argument("--ascent", choices=("sgd", "adamw"), default="sgd",
                       help="optimizer of the auxiliary pair: sgd is Eq. (9) as printed (default: %(default)s, the authors' code "
                            "as reported)")
    group.add_argument("--momentum", type=number(float, 0, 1), default=0.5,
                       help="of bi-lora-power's perturbation (default: %(default)s, ours)")
    group.add_argument("--epochs", type=number(int, 1), help="passes over the training set (default: by task)")
    group.add_argument("--batch-size", type=number(int, 1), help="rows a step (default: by task)")
    group.add_argument("--micro-batch", type=number(int, 1), help="rows a forward pass (default: by task)")
    group.add_argument("--dropout", type=number(float, 0, 1), default=0.0,
                       help="of the base (default: %(default)s, ours; the adapters have none, as the paper's)")
    group = parser.add_argument_group("run")
    group.add_argument("--seeds", type=number(int, 0, 2**63), nargs="+", help="default: by task")
    group.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu",
                       help="default: %(default)s")
    group.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                       help="autocast to bfloat16; GSM8K's base is kept in it as well (default: by task)")
    group.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False,
                       help="keep each block's input alone and compute the block again for its gradient: less memory, more time")
    group.add_argument("--save-every", type=number(int, 1), help="steps from one saved state to the next; each epoch's end has one too (default: no state)")
    group.add_argument("--snapshots", type=number(int, 0), default=0,
                       help="how often to keep all that is trained, at even distances from before the first step to after the "
                            "last; notes/sharpness.py reads it (default: %(default)s)")
    group.add_argument("--resume", metavar="DIR", help="go on with the same command in its --out: finished runs are taken, an "
                                                       "interrupted one goes on from its last saved state")
    group.add_argument("--merge", action=argparse.BooleanOptionalAction, default=False,
                       help="also write each run's merged model, in the layout of its checkpoint (default: off)")
    group.add_argument("--out", help="folder for the results (default: runs/TASK)")


def check_arguments(parser, args):
    """Fill in the task's defaults; refuse what does not go together."""
    task, embedded = TASKS[args.task], args.task == "embedded"
    given = [name for name in ("data", "model", "revision", "max_length", "merge", "prompts") if getattr(args, name) not in (None, False)]
    if embedded and given:
        parser.error(f"--{given[0].replace('_', '-')} is for a GLUE task; choose one with --task")
    defaults = {"lr": task.lr, "rho": list(task.rho), "epochs": task.epochs, "batch_size": task.batch_size,
                "seeds": list(task.seeds), "limit": EMBEDDED_TRAIN if embedded else None, "max_length": 256,
                "label_noise": 0.1 if embedded else 0.0, "bf16": False, "out": os.path.join("runs", args.task)}
    fill_in(parser, args, defaults)
    if not embedded and not args.model:
        parser.error(f"--task {args.task} needs --model, a folder or the id of a model on the Hugging Face hub")
    if args.label_noise and not task.labels:
        parser.error("--label-noise needs a task with classes")


def fill_in(parser, args, defaults):
    """Defaults for what was not given; each method and seed once."""
    if args.resume and args.out:
        parser.error("--out and --resume name the same folder; give one of them")
    args.out = args.out or args.resume
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.method, args.seeds = list(dict.fromkeys(args.method)), list(dict.fromkeys(args.seeds))
    if len(args.rho) > 2:
        parser.error(f"--rho has {len(args.rho)} values; expected one or two")


def main(argv=None):
    parser, args = parse_arguments(argv)
    try:
        experiment = load(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return compare(parser, args, experiment)


if __name__ == "__main__":
    main()

"""Make the demo again: two small pretrained models, and the data to fine-tune them on.

    python notes/make_demo.py                # everything: about seven minutes on one idle core
    python notes/make_demo.py --data-only    # the data files alone: seconds

DIR/sentences: a BERT, and sentences of a generated language in CoLA's format, acceptable or not.
DIR/problems: a Llama, and generated word problems in GSM8K's format.

The data files are the same bytes on every machine.  The weights depend on the machine's arithmetic.
Neither model has seen its task: the BERT has read acceptable sentences only, and the Llama has
solved other kinds of problems.
"""

import argparse
import json
import math
import os
import random
import re
import sys
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from model import (Transformer, load_tokenizer, module_names, read_config,  # noqa: E402
                   save_pretrained)

# ------------------------------------------------------------------------------- the language

# A language with agreement.  Words are singular/plural; the plural is left out where it adds an s.
NOUNS = {
    "animate": "teacher doctor farmer child/children woman/women dog horse bird sailor baker "
               "student guest king wolf/wolves",
    "thing": "book letter table bottle car ship lamp knife/knives door bridge clock basket carpet "
             "mirror",
}
DETERMINERS = ["the a this every", "the these many few"]  # by number: singular, plural
ADJECTIVES = {
    "animate": "hungry clever sleepy brave proud",
    "thing": "wooden broken rusty hollow plastic",
    "any": "small big red white heavy tall",
}
PREPOSITIONS = "near behind beside beneath"
ADVERBS = "never rarely sometimes quickly"
VERBS = {  # frame: (what the subject is, what follows the verb, the verbs)
    "transitive": ("animate", "any",
                   "likes/like carries/carry finds/find touches/touch hides/hide"),
    "consuming": ("animate", "thing", "reads/read repairs/repair sells/sell paints/paint"),
    "affecting": ("any", "animate",
                  "frightens/frighten pleases/please hurts/hurt protects/protect"),
    "living": ("animate", None, "sleeps/sleep laughs/laugh walks/walk waits/wait sings/sing"),
    "being": ("thing", None, "breaks/break shines/shine rots/rot leaks/leak cracks/crack"),
    "saying": ("animate", "clause", "thinks/think says/say hopes/hope claims/claim"),
}


def inflected(words):
    """[(singular, plural)] of "dog child/children"."""
    return [tuple(word.split("/")) if "/" in word else (word, word + "s") for word in words.split()]


def forms_of(*texts):
    """All forms of all words, in order."""
    return [form for text in texts for forms in inflected(text) for form in forms]


def vocabulary():
    """The words of the language, sorted."""
    plain = [PREPOSITIONS, ADVERBS, "that", *DETERMINERS, *ADJECTIVES.values()]
    verbs = [words for _, _, words in VERBS.values()]
    return sorted({*" ".join(plain).split(), *forms_of(*NOUNS.values(), *verbs)})


def fits(need, animacy):
    return need in ("any", animacy)


def verb_phrase(rng, depth, subject, number, gap=None):
    """A verb that agrees with its subject and what follows it, as [(word, violations there)].

    subject: its animacy.  gap: animacy of the noun that a relative clause has moved out of the
    object's place.  violations: words that would be wrong in the word's place.
    """
    frames = [frame for frame in VERBS if allowed(frame, depth, subject, gap)]
    frame = rng.choice(frames)
    _, follows, verbs = VERBS[frame]
    forms = rng.choice(inflected(verbs))
    after, object_animacy = [], gap
    if not gap and follows == "clause":
        after = [("that", []), *clause(rng, depth - 1)]
    elif not gap and follows:
        object_animacy = rng.choice(["animate", "thing"] if follows == "any" else [follows])
        after, _ = noun_phrase(rng, depth - 1, object_animacy)
    wrong_frames = []
    for other_subject, other_follows, other_verbs in VERBS.values():
        right = other_follows == follows
        if object_animacy and other_follows:
            right = fits(other_follows, object_animacy)
        if not (right and fits(other_subject, subject)):
            wrong_frames += [verb[number] for verb in inflected(other_verbs)]
    adverb = [(rng.choice(ADVERBS.split()), [])] if rng.random() < 0.2 else []
    wrong_number = rng.random() < 0.5 or not wrong_frames
    wrong = [forms[1 - number]] if wrong_number else wrong_frames
    return [*adverb, (forms[number], wrong), *after]


def allowed(frame, depth, subject, gap):
    """May a verb of this frame stand here?"""
    need, follows, _ = VERBS[frame]
    if gap:
        return fits(need, subject) and follows in ("any", gap)
    return fits(need, subject) and (follows != "clause" or depth > 0)


def noun_phrase(rng, depth, animacy):
    """([(word, violations)], number): determiner, perhaps adjective, noun, perhaps an attractor."""
    number = rng.randrange(2)
    determiner = rng.choice(DETERMINERS[number].split())
    wrong = [] if determiner == "the" else DETERMINERS[1 - number].split()[1:]
    words = [(determiner, wrong)]
    if rng.random() < 0.3:
        other = "thing" if animacy == "animate" else "animate"
        adjectives = ADJECTIVES[animacy] + " " + ADJECTIVES["any"]
        words.append((rng.choice(adjectives.split()), ADJECTIVES[other].split()))
    words.append((rng.choice(inflected(NOUNS[animacy]))[number], []))
    kind = rng.random() if depth > 0 else 1.0
    if kind < 0.25:    # an attractor: "the dogs near the table sleep"
        attractor, _ = noun_phrase(rng, 0, rng.choice(["animate", "thing"]))
        words += [(rng.choice(PREPOSITIONS.split()), []), *attractor]
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
    """A sentence of 4 to 14 words.  An unacceptable one has one violation or one exchange.

    A noun and its determiner and adjective stand together in every acceptable sentence, so that an
    exchange of neighbours which moves one of them never gives another acceptable sentence.
    """
    words = []
    while not 4 <= len(words) <= 14:
        words = clause(rng, depth=1)
    text = [word for word, _ in words]
    if acceptable:
        return " ".join(text)
    places = [i for i, (_, wrong) in enumerate(words) if wrong]
    if places and rng.random() < 0.8:
        place = rng.choice(places)
        text[place] = rng.choice(words[place][1])
        return " ".join(text)
    fixed = {*forms_of(*NOUNS.values()), *" ".join([*DETERMINERS, *ADJECTIVES.values()]).split()}
    pairs = [i for i in range(len(text) - 1) if text[i] in fixed or text[i + 1] in fixed]
    place = rng.choice(pairs)
    text[place], text[place + 1] = text[place + 1], text[place]
    return " ".join(text)


# ------------------------------------------------------------------------------- the problems

# A kind of problem is (ranges, question, solution).  ranges: where each number is drawn from,
# "a=2-9".  {thing} stands for a word of WORDS, {a} for a number, (x|y) for a choice of wording,
# [d=a*b] for a step of arithmetic.  The kinds in TRANSFER are those to fine-tune on.  They use the
# same words as PRETRAINING, and combine steps as none of its kinds does.
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
     "{name} (buys|gets) {a} {box} of {thing} with {b} in each. {name} gives {c} {thing} to "
     "{friend}. How many {thing} (are left|does {name} have left)?",
     "{name} gets [d=a*b] {thing}.\n{name} has [e=d-c] left."),
    ("a=2-9 b=2-9 c=2-9 d=2-9",  # a * b + c * d
     "At the {place} {thing} cost ${b} each and {other} cost ${d} each. {name} buys {a} {thing} "
     "and {c} {other}. How much does {name} (pay|spend) in total?",
     "The {thing} cost $[e=a*b].\nThe {other} cost $[f=c*d].\nIn total that is $[g=e+f]."),
    ("a=3-40 b=3-30 c=2-9",  # (a + b) / c
     "{name} has {a} {thing} and {friend} has {b}. They (put|pack) all {thing} into {c} {box}, the "
     "same number in each. How many (are|{thing} are) in each?",
     "Together they have [d=a+b].\nEach holds [e=d/c] {thing}."),
    ("a=3-30 b=2-20 c=2-20",  # a + (a + b) - c
     "{name} has {a} {thing} and {friend} has {b} more than {name}. They (sell|lose) {c} {thing} "
     "(at the {place}|today). How many do they have left?",
     "{friend} has [d=a+b] {thing}.\nTogether they have [e=a+d].\nThey have [f=e-c] left."),
    ("a=2-90 b=2-9 c=2-12",  # a / b * c
     "{b} {box} of {thing} cost ${a} at the {place}. How much (do|would) {c} {box} cost?",
     "Each costs $[d=a/b].\nIn total that is $[e=d*c]."),
    ("a=2-9 b=2-12 c=2-30 d=2-9",  # (a * b - c) / d
     "There are {a} {box} with {b} {thing} each (at|in) the {place}. {c} {thing} are (broken|bad). "
     "{d} workers share the others. How many {thing} does each (get|have)?",
     "There are [e=a*b] {thing}.\nOf these [f=e-c] are good.\nEach gets [g=f/d] {thing}."),
    ("a=4-40 b=2-30",  # a + a / 2 + b
     "{name} (sold|made) {a} {thing} on Monday, half as many on Tuesday and {b} on Friday. How "
     "many {thing} (is that in total|has {name} (sold|made))?",
     "On Tuesday that is [c=a/2].\nTogether that is [d=a+c].\nIn total that is [e=d+b] {thing}."),
    ("a=2-9 b=2-9 c=2-9 d=2-9 e=2-30",  # a * b + c * d - e
     "{name} works {a} hours on Monday for ${b} (an|per) hour and {c} hours on Friday for ${d} "
     "(an|per) hour. {name} spends ${e} at the {place}. How much money is left?",
     "On Monday that is $[f=a*b].\nOn Friday that is $[g=c*d].\nTogether that is $[h=f+g].\n"
     "{name} has $[i=h-e] left."),
]
TRANSFER = [
    ("a=2-9 b=2-12 c=2-9 d=2-12",  # a * b / c - d
     "{name} made {a} {box} of {thing} with {b} in each. {c} workers share all {thing}. "
     "(Each|Of these each) (gives|spends) {d}. How many {thing} (are left in each|does each have "
     "left)?",
     "There are [e=a*b] {thing}.\nEach gets [f=e/c].\nEach has [g=f-d] {thing} left."),
    ("a=5-30 b=2-25 c=2-9 d=2-30",  # (a - b) * c + d
     "{name} has {a} {thing} and {b} are (broken|bad). {name} sold the others for ${c} each (at "
     "the {place}|today). {friend} gives {name} ${d} more. How much money does {name} (get|have)?",
     "Of these [e=a-b] are good.\nThe {thing} cost $[f=e*c].\nIn total {name} has $[g=f+d]."),
    ("a=2-9 b=2-9 c=2-9 d=2-9",  # (a * b - c * d) / 2
     "{name} works {a} hours for ${b} per hour and {friend} works {c} hours for ${d} per hour. "
     "{name} spends half as much as {name} (gets|has) more than {friend}. How much (is that|does "
     "{name} spend)?",
     "{name} gets $[e=a*b].\n{friend} gets $[f=c*d].\n{name} has $[g=e-f] more.\n"
     "{name} spends $[h=g/2]."),
    ("a=20-100 b=2-9 c=2-9 d=2-9",  # (a - b * c) / d
     "{name} has ${a}. {name} buys {b} {thing} for ${c} each and spends all that is left on "
     "{other} (for|that cost) ${d} each. How many {other} does {name} (get|have)?",
     "The {thing} cost $[e=b*c].\n{name} has $[f=a-e] left.\n{name} gets [g=f/d] {other}."),
]
OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
CHOICE, STEP = re.compile(r"\(([^()]*)\)"), re.compile(r"\[(\w)=(\w)(.)(\w)\]")
LARGEST = 250  # number in a problem
FACTS = 0.25   # of the rows of pretraining are sheets of facts, without words


def calculate(a, operator, b):
    """The result; None unless it is whole, at most LARGEST, and above 0 for - and /."""
    if operator == "/" and a % b:
        return None
    result = OPERATORS[operator](a, b)
    least = 1 if operator in "-/" else 0
    return result if least <= result <= LARGEST else None


def draw_numbers(rng, ranges, solution):
    """{letter: number}: drawn, then computed; all anew until every result is allowed."""
    while True:
        numbers = {}
        for letter, low, high in re.findall(r"(\w)=(\d+)-(\d+)", ranges):
            numbers[letter] = rng.randint(int(low), int(high))
        for result, a, operator, b in STEP.findall(solution):
            second = numbers[b] if b in numbers else int(b)
            numbers[result] = calculate(numbers[a], operator, second)
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

    def worked_out(match):
        result, a, operator, b = match.groups()
        return calculation(numbers[a], operator, numbers.get(b, b), numbers[result])

    answer = STEP.sub(worked_out, solution)
    last = numbers[STEP.findall(solution)[-1][0]]
    return question.format(**words, **numbers), f"{answer}\n#### {last}".format(**words)


def fact_sheet(rng, count=3):
    """(question, answer) of arithmetic alone: ("7*8, 9/3", "7*8=<<7*8=56>>56\\n9/3=<<9/3=3>>3")."""
    facts = []
    while len(facts) < count:
        operator = rng.choice("+-*/")
        if operator in "+-":
            a, b = rng.randint(2, 100), rng.randint(2, 60)
        else:
            a, b = rng.randint(2, 30), rng.randint(2, 12)
        a = a * b if operator == "/" else a
        result = calculate(a, operator, b)
        if result is not None and a <= LARGEST:
            facts.append((a, operator, b, result))
    question = ", ".join(f"{a}{operator}{b}" for a, operator, b, _ in facts)
    return question, "\n".join(calculation(*fact) for fact in facts)


def fact_sheet_or_problem(rng):
    return fact_sheet(rng) if rng.random() < FACTS else problem(rng, PRETRAINING)


# ------------------------------------------------------------------------------- tokenizers


def sentence_tokenizer():
    """A token a word, with BERT's special tokens around them."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *vocabulary()]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])])
    tokenizer.add_special_tokens(pieces[:SPECIAL])
    return tokenizer


def problem_tokenizer():
    """A token for each word, with the space before it, for << >> ####, and for other characters.

    decode() gives back exactly the text that was encoded, if it is made of these.
    """
    texts = " ".join(part for template in PRETRAINING + TRANSFER for part in template[1:])
    texts = re.sub(r"\{\w+\}|\[[^]]*\]", " ", texts)
    words = {*re.findall("[A-Za-z]+", texts), *" ".join(WORDS.values()).split()}
    starts = {word for word in words if word[0].isupper()} | {"Q", "A"}  # may begin a text or line
    pieces = ["<pad>", "<eos>", "<unk>", "<<", ">>", "####", *"\n 0123456789+-*/=.,?:$",
              *sorted(starts), *sorted(" " + word for word in words)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pattern = Regex("<<|>>|####| ?[A-Za-z]+|[^A-Za-z]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(pieces[:3])
    return tokenizer


SPECIAL, CLS, MASK, EOS = 5, 2, 4, 1  # in the vocabularies above; padding is 0 in both


# ------------------------------------------------------------------------------- data files

SIZES = {"train.tsv": 7000, "dev.tsv": 1000, "train.jsonl": 1500, "test.jsonl": 400}


def write_data(out):
    """The four data files.  No row is in two places: the smaller files draw first."""
    rng, seen = random.Random("sentences"), set()
    for name in ("dev.tsv", "train.tsv"):
        lines = []
        for i in range(SIZES[name]):
            acceptable = i % 2 == 1
            text = unseen(seen, lambda: sentence(rng, acceptable))
            lines.append(f"demo\t{int(acceptable)}\t{'' if acceptable else '*'}\t{text}\n")
        write_text(os.path.join(out, "sentences", name), "".join(lines))
    rng, seen = random.Random("problems"), set()
    for name in ("test.jsonl", "train.jsonl"):
        lines = []
        for _ in range(SIZES[name]):
            question, answer = unseen(seen, lambda: problem(rng, TRANSFER))
            lines.append(json.dumps({"question": question, "answer": answer}) + "\n")
        write_text(os.path.join(out, "problems", name), "".join(lines))


def unseen(seen, draw):
    """The first value drawn that is not in `seen`, which it joins."""
    value = draw()
    while value in seen:
        value = draw()
    seen.add(value)
    return value


def write_text(path, text):
    """UTF-8 with \\n at the end of a line on every system, under a temporary name until whole."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


# ------------------------------------------------------------------------------- pretraining

BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "dtype": "bfloat16",
    "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 256,
    "type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
    "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 1024, "tie_word_embeddings": True, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": EOS,
}
PROMPT = "Q: {}\nA: "  # train_gsm8k.py's
CHOSEN, HIDDEN, REPLACED = 0.4, 0.4, 0.4  # of all words; of the chosen; of the chosen
STEPS = {"sentences": 2000, "problems": 1800}


def sentence_loss(model, tokenizer, texts):
    """Denoising, and a summary: the pooled state of [CLS] predicts which words the sentence has."""
    encoded = tokenizer.encode_batch(texts)
    ids = torch.tensor([row.ids for row in encoded])
    mask = torch.tensor([row.attention_mask for row in encoded])
    shown, chosen = corrupt(ids, len(tokenizer.get_vocab()))
    h = model.hidden(shown, mask)                                             # (B, L, D)
    words = model.encoder.tokens.weight                                       # (V, D)
    denoised = F.cross_entropy(F.linear(h[chosen], words).float(), ids[chosen])
    summary = F.linear(model.pool(h, mask), words)[:, None].expand(-1, ids.shape[1], -1)
    real = ids >= SPECIAL
    return denoised + F.cross_entropy(summary[real].float(), ids[real])


def corrupt(ids, vocab_size):
    """(what the model is shown, the words it has to predict)."""
    chosen = (torch.rand(ids.shape) < CHOSEN) & (ids >= SPECIAL)
    dice = torch.rand(ids.shape)
    shown = torch.where(chosen & (dice < HIDDEN), MASK, ids)
    any_word = torch.randint_like(ids, SPECIAL, vocab_size)
    return torch.where(chosen & (dice > 1 - REPLACED), any_word, shown), chosen


def problem_loss(model, tokenizer, rows):
    """Cross-entropy of the answers' tokens, the end included."""
    prompts = tokenizer.encode_batch([PROMPT.format(question) for question, _ in rows])
    answers = tokenizer.encode_batch([answer for _, answer in rows])
    pairs = [(p.ids, a.ids + [EOS]) for p, a in zip(prompts, answers)]
    ids = [torch.tensor(prompt + answer[:-1]) for prompt, answer in pairs]
    labels = [torch.tensor([-100] * (len(prompt) - 1) + answer) for prompt, answer in pairs]
    ids = pad_sequence(ids, batch_first=True)                                 # (B, L)
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)       # (B, L)
    kept = labels != -100
    logits = model.logits(model.hidden(ids)[kept])  # padding on the right: no token sees it
    return F.cross_entropy(logits.float(), labels[kept])


def batches(draw, size, rng):
    """Without end, lists of `size` rows of similar length: sorted within 16 batches."""
    while True:
        rows = sorted([draw(rng) for _ in range(16 * size)], key=lambda row: len("".join(row)))
        parts = [rows[i:i + size] for i in range(0, len(rows), size)]
        rng.shuffle(parts)
        yield from parts


def optimizers_of(model):
    """Muon for the blocks' matrices, AdamW for everything else."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if ".blocks." in name and p.dim() == 2 else others).append(p)
    return [torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, ns_steps=4,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=5e-3, weight_decay=0.0, betas=(0.9, 0.98), fused=True)]


def rate(step, steps):
    """The learning rate's factor: linear warm-up times half a cosine."""
    warm = min(1.0, (step + 1) / (0.05 * max(1, steps)))
    return warm * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


def pretrain(folder, raw, tokenizer, loss_of, draw, size, steps):
    """Train a model from nothing on batches of `size` drawn rows, and write its checkpoint."""
    raw = {**raw, "vocab_size": tokenizer.get_vocab_size()}
    write_text(os.path.join(folder, "tokenizer.json"), tokenizer.to_str(pretty=True) + "\n")
    write_text(os.path.join(folder, "config.json"), json.dumps(raw, indent=2))
    tokenizer = load_tokenizer(folder)  # which pads
    config, family = read_config(folder)
    torch.manual_seed(0)
    model = Transformer(config).train()
    model.module_names = {ours: theirs for theirs, ours in module_names(config, family).items()}
    for module in model.modules():
        if isinstance(module, nn.Linear):  # larger than usual, because there are few steps
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    optimizers = optimizers_of(model)
    schedules = [LambdaLR(optimizer, partial(rate, steps=steps)) for optimizer in optimizers]
    stream = batches(draw, size, random.Random(0))
    bar = tqdm(range(steps), desc=f"pretraining {os.path.basename(folder)}", mininterval=1)
    for _ in bar:
        loss = loss_of(model, tokenizer, next(stream))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    save_pretrained(model, folder, folder)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="make_demo.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.path.join(HERE, "demo"), help="default: notes/demo")
    parser.add_argument("--data-only", action="store_true", help="leave the models as they are")
    parser.add_argument("--steps", type=int, help=f"of each pretraining (default: {STEPS})")
    args = parser.parse_args(argv)
    steps = STEPS if args.steps is None else dict.fromkeys(STEPS, args.steps)
    write_data(args.out)
    if not args.data_only:
        pretrain(os.path.join(args.out, "sentences"), BERT, sentence_tokenizer(), sentence_loss,
                 sentence, 128, steps["sentences"])
        pretrain(os.path.join(args.out, "problems"), LLAMA, problem_tokenizer(), problem_loss,
                 fact_sheet_or_problem, 16, steps["problems"])


if __name__ == "__main__":
    main()

"""The demo: its data, its tokenizers and its two models, and that make_demo.py makes them again.

Oracles: a recogniser of the language, written here from the rules and not from the generator; a
bag-of-words classifier; Python's arithmetic; the bytes of the committed files.
"""

import json
import os
import random
import re
import sys

import pytest
import torch
import torch.nn.functional as F

import train_glue
import train_gsm8k
from model import Transformer, load_tokenizer, read_safetensors

NOTES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "notes")
sys.path.insert(0, NOTES)
import make_demo  # noqa: E402
from make_demo import PRETRAINING, TRANSFER, inflected, problem  # noqa: E402

DEMO = os.path.join(NOTES, "demo")
SENTENCES, PROBLEMS = os.path.join(DEMO, "sentences"), os.path.join(DEMO, "problems")


def read(*parts):
    with open(os.path.join(DEMO, *parts), "rb") as file:
        return file.read()


def sentence_rows(split):
    """[(words, label)], after a check of CoLA's four columns."""
    rows = []
    for line in read("sentences", split + ".tsv").decode("ascii").removesuffix("\n").split("\n"):
        source, label, mark, text = line.split("\t")
        assert (source, mark) == ("demo", {"0": "*", "1": ""}[label])
        rows.append((text.split(" "), int(label)))
    return rows


def problem_rows(split):
    lines = read("problems", split + ".jsonl").decode("ascii").removesuffix("\n").split("\n")
    assert all(json.loads(line).keys() == {"question", "answer"} for line in lines)
    return [tuple(json.loads(line).values()) for line in lines]


# ------------------------------------------------------------------------------- the files


def test_data_files_are_made_again_byte_for_byte(tmp_path):
    make_demo.main(["--data-only", "--out", str(tmp_path)])
    made = sorted(os.path.relpath(path, tmp_path) for path in tmp_path.rglob("*.*"))
    assert made == ["problems/test.jsonl", "problems/train.jsonl",
                    "sentences/dev.tsv", "sentences/train.tsv"]
    for name in made:
        assert (tmp_path / name).read_bytes() == read(name), name


def test_the_folder_is_small_and_whole():
    sizes = {}
    for folder in (SENTENCES, PROBLEMS):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            sizes[os.path.relpath(path, DEMO)] = os.path.getsize(path)
    model = {"config.json", "model.safetensors", "tokenizer.json"}
    expected = {f"sentences/{name}" for name in model | {"train.tsv", "dev.tsv"}}
    expected |= {f"problems/{name}" for name in model | {"train.jsonl", "test.jsonl"}}
    assert sizes.keys() == expected
    assert sum(sizes.values()) <= 4_000_000


def test_no_row_is_there_twice():
    train, dev = sentence_rows("train"), sentence_rows("dev")
    assert (len(train), len(dev)) == (7000, 1000)
    assert len({tuple(words) for words, _ in train + dev}) == 8000
    assert [sum(label for _, label in part) for part in (train, dev)] == [3500, 500]
    train, test = problem_rows("train"), problem_rows("test")
    assert (len(train), len(test)) == (1500, 400)
    assert len({question for question, _ in train + test}) == 1900


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Everything, with two steps of pretraining."""
    out = tmp_path_factory.mktemp("demo")
    make_demo.main(["--steps", "2", "--out", str(out)])
    return out


@pytest.mark.parametrize("part, settings", [("sentences", {"num_labels": 2}), ("problems", {})])
def test_a_tiny_training_writes_checkpoints(tiny, part, settings):
    folder = str(tiny / part)
    model = Transformer.from_pretrained(folder, **settings)
    assert all(p.isfinite().all() for p in model.parameters())
    for name in ("config.json", "tokenizer.json"):
        assert (tiny / part / name).read_bytes() == read(part, name), name
    made, ours = (read_safetensors(os.path.join(f, "model.safetensors"))
                  for f in (folder, os.path.join(DEMO, part)))
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    assert {name: tensor.shape for name, tensor in made.items()} == shapes
    assert {tensor.dtype for tensor in [*made.values(), *ours.values()]} == {torch.bfloat16}
    assert not list(tiny.rglob("*.tmp"))


# ------------------------------------------------------------------------------- the language


def lexicon():
    """{word: {(kind, what the rules need to know of it)}}."""
    words = {"that": {("that",)}}

    def add(word, *entry):
        words.setdefault(word, set()).add(entry)

    for animacy, text in make_demo.NOUNS.items():
        for forms in inflected(text):
            for number in (0, 1):
                add(forms[number], "noun", animacy, number)
    for number, text in enumerate(make_demo.DETERMINERS):
        for word in text.split():
            add(word, "det", number)
    for animacy, text in make_demo.ADJECTIVES.items():
        for word in text.split():
            add(word, "adj", animacy)
    for word in make_demo.PREPOSITIONS.split():
        add(word, "prep")
    for word in make_demo.ADVERBS.split():
        add(word, "adv")
    for subject, follows, text in make_demo.VERBS.values():
        for forms in inflected(text):
            for number in (0, 1):
                add(forms[number], "verb", subject, follows, number)
    return words


class Recogniser:
    """Is a list of words a clause?  All ways of reading it, by recursive descent, to any depth."""

    def __init__(self):
        self.lexicon = lexicon()

    def accepts(self, words):
        self.words = words
        return len(words) in self.clause(0)

    def word(self, i, kind):
        entries = self.lexicon.get(self.words[i], ()) if i < len(self.words) else ()
        return [entry[1:] for entry in entries if entry[0] == kind]

    def clause(self, i):
        return {end for j, animacy, number in self.noun_phrase(i)
                for end in self.verb_phrase(j, animacy, number)}

    def noun_phrase(self, i):
        for (number,) in self.word(i, "det"):
            for j, wanted in [(i + 1, "any")] + [(i + 2, a) for (a,) in self.word(i + 1, "adj")]:
                for animacy, noun_number in self.word(j, "noun"):
                    if noun_number == number and wanted in ("any", animacy):
                        for end in {j + 1} | self.modifier(j + 1, animacy, number):
                            yield end, animacy, number

    def modifier(self, i, animacy, number):
        ends = {end for _ in self.word(i, "prep") for end, *_ in self.noun_phrase(i + 1)}
        for _ in self.word(i, "that"):
            ends |= set(self.verb_phrase(i + 1, animacy, number))
            for j, subject, inner in self.noun_phrase(i + 1):
                ends |= set(self.verb_phrase(j, subject, inner, gap=animacy))
        return ends

    def verb_phrase(self, i, animacy, number, gap=None):
        for j in [i] + [i + 1 for _ in self.word(i, "adv")]:
            for subject, follows, verb_number in self.word(j, "verb"):
                if subject not in ("any", animacy) or verb_number != number:
                    continue
                if gap:
                    yield from [j + 1] if follows in ("any", gap) else []
                elif follows is None:
                    yield j + 1
                elif follows == "clause":
                    for _ in self.word(j + 1, "that"):
                        yield from self.clause(j + 2)
                else:
                    for end, what, _ in self.noun_phrase(j + 1):
                        if follows in ("any", what):
                            yield end


@pytest.mark.parametrize("split", ["train", "dev"])
def test_every_label_is_right(split):
    recogniser = Recogniser()
    for words, label in sentence_rows(split):
        assert recogniser.accepts(words) == bool(label), " ".join(words)
        assert 4 <= len(words) <= 14


def test_unacceptable_sentences_are_one_change_away():
    """The same numbers draw the same sentence and then a change: one word, or two neighbours."""
    kinds = {"word": 0, "exchange": 0}
    for seed in range(2000):
        good = make_demo.sentence(random.Random(seed)).split()
        bad = make_demo.sentence(random.Random(seed), acceptable=False).split()
        assert len(good) == len(bad)
        where = [i for i, (a, b) in enumerate(zip(good, bad)) if a != b]
        if len(where) == 1:
            kinds["word"] += 1
        else:
            i, j = where
            assert j == i + 1 and (good[i], good[j]) == (bad[j], bad[i])
            kinds["exchange"] += 1
    assert min(kinds.values()) > 300


def test_bag_of_words_stays_under_60_percent():
    index = {word: i for i, word in enumerate(make_demo.vocabulary())}
    assert 100 <= len(index) <= 200

    def counts(split):
        rows = sentence_rows(split)
        x = torch.zeros(len(rows), len(index))
        for i, (words, _) in enumerate(rows):
            for word in words:
                x[i, index[word]] += 1
        return x, torch.tensor([float(label) for _, label in rows])

    (x, y), (test_x, test_y) = counts("train"), counts("dev")
    w = torch.zeros(len(index), requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w, y) + 1e-4 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert ((test_x @ w > 0) == (test_y > 0.5)).float().mean() < 0.60
    assert ((x @ w > 0) == (y > 0.5)).float().mean() > 0.53  # it did learn something


# ------------------------------------------------------------------------------- the problems


@pytest.mark.parametrize("rows", [
    pytest.param(lambda: problem_rows("train"), id="train"),
    pytest.param(lambda: problem_rows("test"), id="test"),
    pytest.param(lambda: [problem(random.Random(i), PRETRAINING) for i in range(500)], id="base")])
def test_every_step_of_every_answer_is_right(rows):
    """Each uses numbers of the question or of earlier steps; the last result is the answer."""
    for question, answer in rows():
        known = {int(n) for n in re.findall(r"\d+", question)} | {2}  # half of it
        steps = re.findall(r"(\S+)=<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)", answer)
        assert 2 <= len(steps) <= 4 and answer.count("<<") == len(steps)
        for shown, left, operator, right, result, again in steps:
            a, b = int(left), int(right)
            exact = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator]
            assert shown.lstrip("$") == left + operator + right
            assert result == again and exact == int(result) and {a, b} <= known
            known.add(int(result))
        assert answer.endswith(f"\n#### {steps[-1][4]}")
        assert not re.search(r"[{}()|\[\]]", question + answer)


def test_the_kinds_to_learn_are_not_among_those_of_the_base():
    def formula(kind):
        """The answer as an expression of the question's numbers, whichever they are: ((#*#)-#)."""
        values = {}
        for result, a, operator, b in re.findall(r"\[(\w)=(\w)(.)(\w)\]", kind[2]):
            values[result] = f"({values.get(a, '#')}{operator}{values.get(b, '#')})"
        return values[result]

    assert len(PRETRAINING) >= 8 and len(TRANSFER) >= 3
    assert not set(map(formula, TRANSFER)) & set(map(formula, PRETRAINING))


def test_facts_are_true():
    for seed in range(200):
        question, answer = make_demo.fact_sheet(random.Random(seed))
        facts = re.findall(r"^(\d+)([-+*/])(\d+)=<<(\S+)=(\d+)>>(\d+)$", answer, re.MULTILINE)
        assert len(facts) == 3
        assert question == ", ".join(a + operator + b for a, operator, b, *_ in facts)
        for left, operator, right, inside, result, again in facts:
            a, b = int(left), int(right)
            exact = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator]
            assert inside == left + operator + right and result == again and exact == int(result)


# ------------------------------------------------------------------------------- the models


def test_a_sentence_is_its_words_between_special_tokens():
    tokenizer = load_tokenizer(SENTENCES)
    for words, _ in sentence_rows("dev")[:200]:
        encoded = tokenizer.encode(" ".join(words))
        assert encoded.tokens == ["[CLS]", *words, "[SEP]"] and set(encoded.type_ids) == {0}
        assert tokenizer.decode(encoded.ids) == " ".join(words)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2, 3, make_demo.MASK]
    assert tokenizer.padding["pad_id"] == 0


def test_the_problems_tokenizer_gives_the_text_back():
    tokenizer = load_tokenizer(PROBLEMS)
    base = [problem(random.Random(i), PRETRAINING) for i in range(200)]
    for question, answer in [*problem_rows("test")[:200], *base]:
        prompt = make_demo.PROMPT.format(question)
        for text in (prompt, answer):
            encoded = tokenizer.encode(text)
            assert tokenizer.decode(encoded.ids) == text and "<unk>" not in encoded.tokens
            numbers = [token for token in encoded.tokens if any(c.isdigit() for c in token)]
            assert all(len(token) == 1 for token in numbers)  # a digit a token
    (ids, _, _), = train_gsm8k.encode(tokenizer, [(question, answer)], make_demo.EOS)
    assert tokenizer.decode(ids) == prompt  # both scripts know one prompt


def test_what_the_base_is_shown():
    """Some words are hidden and some replaced; the special tokens and the targets stay."""
    ids = torch.tensor([[2, *range(5, 105), 3, 0, 0]]).repeat(50, 1)
    torch.manual_seed(0)
    shown, chosen = make_demo.corrupt(ids, 130)
    assert not chosen[ids < 5].any() and torch.equal(shown[~chosen], ids[~chosen])

    def share(where):
        return where.sum().item() / (50 * 100)

    assert share(chosen) == pytest.approx(0.4, abs=0.03)
    assert share(shown == 4) == pytest.approx(0.16, abs=0.02)
    assert share((shown != ids) & (shown != 4)) == pytest.approx(0.16, abs=0.02)
    assert shown.max() < 130


def test_the_committed_bert_has_learnt_the_language(tiny):
    """Denoising and summary together, far below an untrained model's, which is about 2 log(V)."""
    texts = [make_demo.sentence(random.Random(f"new-{i}")) for i in range(200)]

    def loss(folder):
        torch.manual_seed(0)
        model = Transformer.from_pretrained(folder, num_labels=2)
        return make_demo.sentence_loss(model, load_tokenizer(folder), texts).item()

    assert loss(SENTENCES) < 5.8
    assert loss(tiny / "sentences") > 7.5


def test_the_committed_llama_solves_its_own_kinds_and_not_the_tasks():
    tokenizer, model = load_tokenizer(PROBLEMS), Transformer.from_pretrained(PROBLEMS)

    def right(kinds):
        rows = [problem(random.Random(f"new-{i}"), kinds) for i in range(40)]
        questions = [make_demo.PROMPT.format(question) for question, _ in rows]
        prompts = tokenizer.encode_batch(questions)
        ids = torch.tensor([prompt.ids for prompt in prompts])
        mask = torch.tensor([prompt.attention_mask for prompt in prompts])
        new = model.generate(ids, mask, max_new_tokens=110)
        texts = [tokenizer.decode(row) for row in new.tolist()]
        return sum(text.rpartition("#### ")[2] == answer.rpartition("#### ")[2]
                   for text, (_, answer) in zip(texts, rows))

    assert right(PRETRAINING) >= 20
    assert right(TRANSFER) <= 4


@pytest.mark.parametrize("script, task, folder, settings", [
    (train_glue, "cola", SENTENCES, ["--label-noise", "0.3"]),
    (train_gsm8k, "gsm8k", PROBLEMS, ["--eval-limit", "4", "--max-new-tokens", "8"])])
def test_the_scripts_run_it_as_an_ordinary_task(tmp_path, script, task, folder, settings):
    report = script.main([
        "--task", task, "--model", folder, "--data", folder, "--limit", "16", "--epochs", "1",
        "--batch-size", "8", "--seeds", "100", "--method", "lora", "--device", "cpu",
        "--out", str(tmp_path / "out"), *settings])
    (run,) = report["results"]
    assert 0 <= run["metrics"]["accuracy"] <= 1 and run["epochs"][-1]["loss"] < 10

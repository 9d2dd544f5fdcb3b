"""The GLUE script: its data, batches, scores and runs.

Oracles: a recogniser of the embedded language written here from the rules, not from the generator; a bag-of-words
classifier; scores worked out by hand and by numpy; GLUE's published row counts (with GLUE_DATA set).  Runs are made
in-process on a tiny random BERT folder.
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import train_glue
from bilora import add_lora, load_adapter
from model import Transformer
from test_model import BERT, bert, write_checkpoint
from train_glue import (METHODS, TASKS, add_label_noise, batch_order, collate, cosine_schedule, embedded_rows,
                        embedded_tokenizer, encode, forward_backward, inflected, main, parse_arguments, predict, read_tsv, score, sentence,
                        vocabulary)

# ------------------------------------------------------------------------------------------ the embedded language


def lexicon():
    words = {"that": {("that",)}}
    add = lambda word, *entry: words.setdefault(word, set()).add(entry)
    for animacy, text in train_glue.NOUNS.items():
        for forms in inflected(text):
            for number in (0, 1):
                add(forms[number], "noun", animacy, number)
    for number, text in train_glue.DETERMINERS.items():
        for word in text.split():
            add(word, "det", number)
    for animacy, text in train_glue.ADJECTIVES.items():
        for word in text.split():
            add(word, "adj", animacy)
    for text, kind in ((train_glue.PREPOSITIONS, "prep"), (train_glue.ADVERBS, "adv")):
        for word in text.split():
            add(word, kind)
    for frame, (subject, follows, verbs) in train_glue.VERBS.items():
        for forms in inflected(verbs):
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
        return {end for j, animacy, number in self.noun_phrase(i) for end in self.verb_phrase(j, animacy, number)}

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
                    yield from {end for _ in self.word(j + 1, "that") for end in self.clause(j + 2)}
                else:
                    yield from (end for end, what, _ in self.noun_phrase(j + 1) if follows in ("any", what))


def test_labels_of_the_embedded_language():
    recogniser, kinds = Recogniser(), {"word": 0, "exchange": 0}
    for seed in range(3000):
        good, bad = sentence(random.Random(seed)), sentence(random.Random(seed), acceptable=False)
        assert recogniser.accepts(good), " ".join(good)
        assert not recogniser.accepts(bad), " ".join(bad)
        where = [i for i, (a, b) in enumerate(zip(good, bad)) if a != b]
        assert len(good) == len(bad)
        if len(where) == 1:
            kinds["word"] += 1
        else:  # one exchange of neighbours
            i, j = where
            assert j == i + 1 and (good[i], good[j]) == (bad[j], bad[i])
            kinds["exchange"] += 1
    assert min(kinds.values()) > 500
    assert 100 <= len(vocabulary()) - 4 <= 200


def test_bag_of_words_stays_under_60_percent():
    index = {word: i for i, word in enumerate(vocabulary())}

    def counts(split, size):
        rows = embedded_rows(0, split, size)
        x = torch.zeros(size, len(index))
        for i, ((text,), _) in enumerate(rows):
            for word in text.split():
                x[i, index[word]] += 1
        return x, torch.tensor([float(label) for _, label in rows])

    (x, y), (test_x, test_y) = counts("train", 8000), counts("test", 3000)
    w = torch.zeros(len(index), requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w, y) + 1e-4 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    accuracy = ((test_x @ w > 0) == (test_y > 0.5)).float().mean().item()
    assert accuracy < 0.60
    assert ((x @ w > 0) == (y > 0.5)).float().mean() > 0.53  # it did learn something of its training set


def test_embedded_rows():
    rows = embedded_rows(3, "train", 400)
    assert rows == embedded_rows(3, "train", 400) and sum(label for _, label in rows) == 200
    texts = [{text for text, _ in embedded_rows(seed, split, 400)} for seed in (3, 4) for split in ("train", "test")]
    assert all(len(a & b) < 40 for i, a in enumerate(texts) for b in texts[:i])  # another stream each
    ids, types, label = encode(embedded_tokenizer(), rows, 20)[5]
    words = rows[5][0][0].split()
    assert [vocabulary()[i] for i in ids] == ["[CLS]", *words, "[SEP]"] and label == 1


# ------------------------------------------------------------------------------------------ files


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"


def test_read_tsv(tmp_path):
    path = write(tmp_path / "a.tsv", "\ufeff" + MRPC + '1\t7\t8\tHe said "no.\tA b\n0\t7\t8\tc\td\r\n')
    assert read_tsv(TASKS["mrpc"], path) == [(('He said "no.', "A b"), 1), (("c", "d"), 0)]
    path = write(tmp_path / "b.tsv", "gj04\t1\t\tOne.\ngj04\t0\t*\tTwo two.\n")
    assert read_tsv(TASKS["cola"], path) == [(("One.",), 1), (("Two two.",), 0)]
    path = write(tmp_path / "c.tsv", "sentence1\tsentence2\tscore\na\tb\t3.25\n")
    assert read_tsv(TASKS["stsb"], path) == [(("a", "b"), 3.25)]
    path = write(tmp_path / "d.tsv", "question1\tquestion2\tis_duplicate\na\tb\t1\nbroken\n")
    assert read_tsv(TASKS["qqp"], path) == [(("a", "b"), 1)]


@pytest.mark.parametrize("task, text, message", [
    ("mrpc", MRPC + "1\t7\t8\ta\tb\n1\t7\t8\ta\n", "line 3: 4 fields, expected at least 5"),
    ("mrpc", MRPC + "2\t7\t8\ta\tb\n", "line 2: label '2', expected one of 0, 1"),
    ("mrpc", "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t7\t8\ta\tb\n", "line 1: no column 'Quality'"),
    ("mrpc", MRPC, "no rows"), ("mrpc", "", "line 1: no column"), ("cola", "", "no rows"),
    ("cola", "gj04\t-1\t\tOne.\n", "line 1: label '-1'"),
    ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n", "line 2: label 'neutral', expected one of entail"),
    ("stsb", "sentence1\tsentence2\tscore\na\tb\t5.5\n", "line 2: score '5.5'"),
    ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", "line 2: score 'nan'"),
])
def test_bad_rows_are_named(tmp_path, task, text, message):
    path = write(tmp_path / "bad.tsv", text)
    with pytest.raises(ValueError) as caught:
        read_tsv(TASKS[task], path)
    assert message in str(caught.value) and str(caught.value).startswith(path)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "bad.tsv").write_bytes(MRPC.encode() + b"1\t7\t8\tcaf\xe9\tb\n")
    with pytest.raises(ValueError, match="bad.tsv, line 2: not UTF-8"):
        read_tsv(TASKS["mrpc"], tmp_path / "bad.tsv")


def test_task_table():
    """The paper's settings where it has the task: learning rate, batch, epochs, radii of LoRA-SAM and Bi-LoRA."""
    settings = {name: (task.lr, task.batch_size, task.epochs, task.rho) for name, task in TASKS.items()}
    short, long, rte = (5e-4, 32, 3, (0.01, 0.05)), (5e-4, 32, 10, (0.01, 0.05)), (5e-4, 32, 10, (0.05, 0.1))
    assert {name for name, task in TASKS.items() if task.source == "the paper's"} == {"mnli", "sst2", "qnli", "cola", "mrpc", "rte"}
    assert {name: len(task.seeds) for name, task in TASKS.items() if len(task.seeds) != 3} == {"embedded": 5, "rte": 5}
    assert settings == {"mnli": short, "sst2": short, "qnli": short, "qqp": short, "cola": long, "mrpc": long,
                        "stsb": long, "rte": rte, "embedded": (2e-3, 32, 10, (0.01, 0.05))}
    columns = {name: (task.text, task.label) for name, task in TASKS.items() if name != "embedded"}
    two = ("sentence1", "sentence2")
    assert columns == {
        "mrpc": (("#1 String", "#2 String"), "Quality"), "cola": ((3,), 1), "sst2": (("sentence",), "label"),
        "rte": (two, "label"), "qnli": (("question", "sentence"), "label"),
        "qqp": (("question1", "question2"), "is_duplicate"), "mnli": (two, "gold_label"), "stsb": (two, "score")}


@pytest.mark.skipif("GLUE_DATA" not in os.environ, reason="GLUE_DATA is not set to a folder with GLUE's TSV files")
@pytest.mark.parametrize("task, folder, train, counts", [
    ("mrpc", "MRPC", 3668, [129, 279]), ("cola", "CoLA", 8551, [322, 721]), ("sst2", "SST-2", 67349, [428, 444])])
def test_published_row_counts(task, folder, train, counts):
    folder = os.path.join(os.environ["GLUE_DATA"], folder)
    rows = read_tsv(TASKS[task], os.path.join(folder, "dev.tsv"))
    assert [sum(label == c for _, label in rows) for c in (0, 1)] == counts
    assert len(read_tsv(TASKS[task], os.path.join(folder, "train.tsv"))) == train


# ------------------------------------------------------------------------------------------ batches

CPU = SimpleNamespace(device="cpu", bf16=False, micro_batch=3)


def classifier(task):
    return train_glue.Experiment(TASKS[task], None, None, 0, "accuracy", [])


def examples_of(lengths):
    return [([5] * n, [0] * n, n % 2) for n in lengths]


def test_batches_are_a_partition_of_similar_lengths():
    rng = random.Random(0)
    examples = examples_of([rng.randint(3, 60) for _ in range(501)])
    batches = batch_order(examples, 16, random.Random(1))
    assert sorted(i for batch in batches for i in batch) == list(range(501))
    assert sorted(map(len, batches))[1:] == [16] * 31 and len(batches) == 32
    spread = [max(len(examples[i][0]) for i in b) - min(len(examples[i][0]) for i in b) for b in batches]
    assert sum(spread) / len(spread) < 8  # 57 for random batches
    again, other = batch_order(examples, 16, random.Random(1)), batch_order(examples, 16, random.Random(2))
    assert batches == again != other


def test_collate():
    ids, types, mask, labels = collate([([1, 2, 3], [0, 0, 1], 1), ([4], [0], 0)], 9, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]] and types.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]] and labels.tolist() == [1, 0]


@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_micro_batches_add_up_to_the_batch(task):
    """The mean over seven rows, in parts of 3, 3 and 1, and its gradient: torch's own mean over all seven is the oracle."""
    model = bert().double()
    rows = [([1, 4 + i, 5, 6][:2 + i % 3], [0] * (2 + i % 3), i % 3) for i in range(7)]
    total = forward_backward(model, classifier(task), rows, CPU)
    found = [p.grad.clone() for p in model.parameters()]
    logits = torch.cat([model(torch.tensor([ids])) for ids, *_ in rows])
    labels = torch.tensor([label for *_, label in rows])
    loss = (torch.nn.CrossEntropyLoss()(logits, labels) if task == "mrpc" else (logits[:, 0] - labels).square().mean())
    assert total.item() == pytest.approx(loss.item(), rel=1e-5)  # the script computes the loss in float32
    for a, b in zip(found, torch.autograd.grad(loss, list(model.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_truncation():
    rows = embedded_rows(0, "train", 4)
    assert all(len(ids) <= 5 for ids, *_ in encode(embedded_tokenizer(), rows, 5))
    with pytest.raises(ValueError, match="--max-length is 2; expected more than the 2"):
        encode(embedded_tokenizer(), rows, 2)


def test_label_noise():
    examples = [([i], [0], i % 3) for i in range(200)]
    noisy = add_label_noise(examples, 0.1, 3, random.Random(0))
    changed = [i for i in range(200) if noisy[i][2] != examples[i][2]]
    assert len(changed) == 20 and {noisy[i][2] for i in changed} == {0, 1, 2}
    assert noisy == add_label_noise(examples, 0.1, 3, random.Random(0)) and examples[0][2] == 0
    assert add_label_noise(examples, 0.0, 3, random.Random(0)) == examples


def test_schedule_is_linear_then_half_a_cosine():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 2.0}, {"params": [torch.zeros(1)], "lr": 1.0}])
    schedule, factors = cosine_schedule(optimizer, 100), []
    for _ in range(100):
        first, second = schedule.get_last_lr()
        assert first == 2 * second
        factors.append(second)
        optimizer.step()
        schedule.step()
    expected = [(t + 1) / 3 if t < 3 else 0.5 * (1 + math.cos(math.pi * (t - 3) / 97)) for t in range(100)]
    assert factors == pytest.approx(expected, abs=1e-12)


# ------------------------------------------------------------------------------------------ scores


def test_scores_by_hand_and_by_numpy():
    p, y = [1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 0]  # tp 2, fp 2, fn 1, tn 1
    assert score(TASKS["mrpc"], p, y) == {"accuracy": 0.5, "f1": pytest.approx(4 / 7)}
    assert score(TASKS["cola"], p, y)["matthews"] == pytest.approx(np.corrcoef(p, y)[0, 1])
    a, b = [1.0, 2.5, 2.5, 4.0], [0.0, 3.0, 1.0, 2.0]
    ranks = [1, 2.5, 2.5, 4], [1, 4, 2, 3]
    found = score(TASKS["stsb"], a, b)
    assert found == {"pearson": pytest.approx(np.corrcoef(a, b)[0, 1]), "spearman": pytest.approx(np.corrcoef(*ranks)[0, 1])}


def test_one_class_predictions_score_zero():
    assert score(TASKS["cola"], [1, 1, 1], [1, 0, 1]) == {"matthews": 0.0, "accuracy": pytest.approx(2 / 3)}
    assert score(TASKS["mrpc"], [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}
    assert score(TASKS["stsb"], [1.0, 1.0], [0.0, 5.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_summary_pairs_the_seeds():
    runs = [{"method": m, "seed": s, "metrics": {"accuracy": a}} for m, s, a in
            [("lora", 0, 0.5), ("lora", 1, 0.7), ("bi-lora", 0, 0.6), ("bi-lora", 1, 0.9), ("bi-lora", 2, 0.1)]]
    summary, differences = train_glue.summarize(runs)
    assert summary["lora"]["accuracy"] == {"mean": pytest.approx(0.6), "stderr": pytest.approx(0.1), "n": 2}
    assert differences == {"bi-lora": {"accuracy": {"mean": pytest.approx(0.15), "stderr": pytest.approx(0.05), "n": 2}}}


@torch.no_grad()
def test_predictions_are_each_rows_own_in_eval_mode():
    """300 rows of unsorted lengths, in two segments, against each row alone; the auxiliary pair must not be seen."""
    model = bert()
    layers = add_lora(model, 2, 16, 2)
    for layer in layers:
        layer.lora_B.normal_(std=0.1)
        layer.aux_B.normal_()
    rng = random.Random(0)
    rows = [([1, *rng.choices(range(4, 50), k=n), 2], [0] * 2 + [1] * n, 0) for n in rng.choices(range(1, 10), k=300)]
    model.train()
    found = predict(model, classifier("mnli"), rows, CPU)
    model.eval()
    alone = [model(torch.tensor([ids]), None, torch.tensor([types])) for ids, types, _ in rows]
    assert found == [logits.argmax().item() for logits in alone] and len(set(found)) == 3
    scores = predict(model, classifier("stsb"), rows, CPU)
    assert scores == pytest.approx([logits[0, 0].item() for logits in alone], abs=1e-5)


# ------------------------------------------------------------------------------------------ runs

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnop"]


@pytest.fixture
def glue_folder(tmp_path, monkeypatch):
    """A folder with a tiny BERT, its tokenizer, and MRPC files whose label is whether the two sentences are equal."""
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    for name in ("bert", "data"):
        (tmp_path / name).mkdir()
    write_checkpoint(tmp_path / "bert", bert(), BERT)
    tokenizer.save(str(tmp_path / "bert" / "tokenizer.json"))
    rng = random.Random(0)
    for name, size in (("train", 21), ("dev", 10)):
        rows = []
        for i in range(size):
            words = rng.choices(WORDS[4:], k=rng.randint(2, 4))
            rows.append(f"{i % 2}\t1\t2\t{' '.join(words)}\t{' '.join(words if i % 2 else words[::-1])}\n")
        write(tmp_path / "data" / f"{name}.tsv", MRPC + "".join(rows))
    return tmp_path


RUN = ["--task", "mrpc", "--data", "data", "--model", "bert", "--rank", "2", "--aux-rank", "3", "--batch-size", "8",
       "--epochs", "2", "--max-length", "12", "--device", "cpu"]


@pytest.mark.pictures
@pytest.mark.parametrize("method, ascent", [*((method, ()) for method in METHODS), ("bi-lora", ("--ascent", "adamw", "--aux-lr", "0.05"))])
def test_a_run_of_each_method(glue_folder, method, ascent, capsys):
    report = main([*RUN, "--method", method, *ascent, "--seeds", "0", "1", "--out", "out", "--rho", "0.02", "0.03"])
    (task_line, parameters, *_) = capsys.readouterr().out.splitlines()
    adapted = 2 * (4 * 2 * (16 + 16) + 2 * (16 + 32) * 2) + 2 * (16 + 16)  # 2 blocks of q, k, v, o, up, down; the pooler
    auxiliary = adapted * 3 // 2 if method.startswith("bi-lora") else 0
    assert report == json.loads((glue_folder / "out/metrics.json").read_text())
    assert report["summary"][method]["accuracy"]["n"] == 2 and report["majority"].keys() == {"accuracy", "f1"}
    for run in report["results"]:
        folder = glue_folder / "out" / f"{method}-seed{run['seed']}"
        assert {path.name for path in folder.iterdir()} == {"config.json", "log.jsonl", "adapter_config.json",
                                                            "adapter_model.bin", "metrics.json", "curves.png"}
        assert json.loads((folder / "metrics.json").read_text()) == run
        assert run["parameters"] == {"primary": adapted, "auxiliary": auxiliary, "head": 2 * 16 + 2}
        last, best = run["epochs"][-1], run["epochs"][run["best_epoch"] - 1]
        assert best["accuracy"] == max(e["accuracy"] for e in run["epochs"]) and len(run["epochs"]) == 2
        assert run["metrics"] == {"accuracy": last["accuracy"], "f1": last["f1"], "best_accuracy": best["accuracy"],
                                  "best_f1": best["f1"]}
        assert run["step_seconds"] > 0 and (run["peak_memory_bytes"] or 2**21) > 2**20
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6] and all(math.isfinite(row["loss"]) for row in log)
        assert [row["lr"] for row in log] == pytest.approx(
            [5e-4] + [5e-4 * 0.5 * (1 + math.cos(math.pi * t / 5)) for t in range(5)])  # one step of warm-up, five down
        norms = [row["perturbation"] for row in log]
        if method == "lora":
            assert norms == [0] * 6
        elif method == "lora-sam":
            assert norms == pytest.approx([0.02] * 6, rel=1e-3)  # read off float32 weights
        elif method == "bi-lora-power":  # on the sphere in every step, and never clipped
            assert norms == pytest.approx([0.03] * 6, rel=1e-5) and not any(row["clipped"] for row in log)
        else:  # c as it was before the clip
            assert norms[0] > 0 and (max(norms) > 0.03) == bool(ascent)
            assert [row["clipped"] for row in log] == [norm > 0.03 for norm in norms]
            assert run["clipped_fraction"] == sum(norm > 0.03 for norm in norms) / 6
        torch.manual_seed(0)
        model = Transformer.from_pretrained(glue_folder / "bert", num_labels=2)
        add_lora(model, 2, 16)
        model.classifier.requires_grad_(True)
        load_adapter(model, folder, model.module_names)  # what was trained loads into the base
        assert model.encoder.blocks[0].attention.q.lora_B.any()


def losses(folder, method, seed=0):
    return [json.loads(line)["loss"] for line in (folder / f"{method}-seed{seed}" / "log.jsonl").read_text().splitlines()]


def batches_of(monkeypatch, run, seed):
    """The batches, as indices, that a run with this seed goes through."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(train_glue, "batch_order", lambda *args: seen.extend(batch_order(*args)) or seen[-3:])
        main([*run, "--seeds", seed, "--method", "lora", "--out", "order"])
    return seen


def test_the_methods_of_a_seed_are_paired(glue_folder, monkeypatch):
    """Fresh adapters change nothing, so that the first batch's loss is the same; seeds differ; a rerun repeats."""
    run = [*RUN, "--seeds", "0", "1", "--micro-batch", "3"]
    report, out = main([*run, "--out", "out"]), glue_folder / "out"
    for seed in (0, 1):
        assert losses(out, "lora", seed)[0] == losses(out, "lora-sam", seed)[0] == losses(out, "bi-lora", seed)[0]
    assert losses(out, "lora", 0)[0] != losses(out, "lora", 1)[0]
    orders = [batches_of(monkeypatch, run, seed) for seed in ("0", "0", "1")]
    assert orders[0] == orders[1] != orders[2]
    assert set(report["difference_to_lora"]) == {"lora-sam", "bi-lora"}
    again = main([*run, "--out", "again"])
    for a, b in zip(report["results"], again["results"]):
        assert a["epochs"] == b["epochs"]


def test_without_a_perturbation_all_methods_are_lora(glue_folder):
    """rho = 0, or an ascent of no speed: the same losses to the last step, so the same data order, dropout masks and
    learning rates."""
    run, out = [*RUN, "--dropout", "0.2"], glue_folder / "out"
    main([*run, "--seeds", "0", "--rho", "0", "--out", "out"])
    assert losses(out, "lora-sam") == losses(out, "lora")
    assert losses(out, "bi-lora") == pytest.approx(losses(out, "lora"), rel=1e-5)  # other kernels: rank r + r2
    main([*run, "--seeds", "0", "--aux-lr", "0", "--method", "bi-lora", "--out", "still"])
    assert losses(glue_folder / "still", "bi-lora") == pytest.approx(losses(out, "lora"), rel=1e-5)
    main([*run, "--seeds", "0", "--method", "lora", "--out", "clear", "--dropout", "0"])
    assert losses(glue_folder / "clear", "lora")[0] != losses(out, "lora")[0]
    main([*run, "--seeds", "0", "--method", "lora", "--out", "half", "--bf16"])
    assert losses(glue_folder / "half", "lora") != losses(out, "lora")
    assert losses(glue_folder / "half", "lora") == pytest.approx(losses(out, "lora"), rel=0.05)


def outcome(folder):
    """All that a run leaves but its times: the log, the scores, the adapter's bits, the settings."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((folder / "metrics.json").read_text())
    adapter = torch.load(folder / "adapter_model.bin", weights_only=True)
    return ([{k: v for k, v in row.items() if k != "seconds"} for row in log],
            {k: v for k, v in metrics.items() if k not in ("step_seconds", "peak_memory_bytes")},
            {name: tensor.numpy().tobytes() for name, tensor in adapter.items()})


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, train_glue
moment, count = sys.argv[1], int(sys.argv[2])

def counted(name, owner, half=False):
    whole, calls = getattr(owner, name), []
    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            if half:  # in the middle of writing
                with open(args[1], "wb") as file:
                    file.write(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)
    setattr(owner, name, wrapper)

{{"step": lambda: counted("train_step", train_glue), "save": lambda: counted("save", torch, half=True),
  "scores": lambda: counted("predict", train_glue), "end": lambda: counted("draw_curves", train_glue)}}[moment]()
train_glue.main(sys.argv[3:])
"""


@pytest.mark.parametrize("method, moment, count, ascent", [
    ("lora", "step", 5, "sgd"), ("lora-sam", "save", 2, "sgd"), ("bi-lora", "scores", 1, "adamw"), ("bi-lora", "end", 1, "sgd")])
def test_killed_and_resumed_equals_uninterrupted(glue_folder, method, moment, count, ascent):
    """A process that is killed for good (SIGKILL) in a step, halfway through a save, while scoring, before the last file."""
    run = [*RUN, "--method", method, "--seeds", "0", "--dropout", "0.2", "--micro-batch", "3", "--save-every", "2",
           "--ascent", ascent]
    code = KILLED.format(root=os.path.dirname(os.path.dirname(os.path.abspath(__file__))), tests=os.path.dirname(__file__))
    killed = subprocess.run([sys.executable, "-c", code, moment, str(count), *run, "--out", "out"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    out = glue_folder / "out" / f"{method}-seed0"
    assert (out / "state.pt").exists() and not (out / "metrics.json").exists()
    steps, whole = [], train_glue.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_glue, "train_step", lambda *args: steps.append(1) or whole(*args))
        main([*run, "--resume", "out"])
    main([*run, "--out", "straight"])
    assert 0 <= len(steps) < 6  # it did go on from there
    assert outcome(out) == outcome(glue_folder / "straight" / f"{method}-seed0") and not (out / "state.pt").exists()


def test_resume_takes_finished_runs(glue_folder, monkeypatch):
    run = [*RUN, "--method", "bi-lora"]
    first = main([*run, "--seeds", "0", "--out", "out"])
    log = glue_folder / "out/bi-lora-seed0/log.jsonl"
    log.write_text("kept")
    both = main([*run, "--seeds", "0", "1", "--resume", "out"])  # more seeds are no other settings
    assert log.read_text() == "kept" and both["results"][0] == first["results"][0] and len(both["results"]) == 2
    assert both["results"] == main([*run, "--seeds", "0", "1", "--resume", "out", "--save-every", "1"])["results"]
    main([*run, "--seeds", "0", "--out", "out"])
    assert log.read_text() != "kept"  # not asked for: trained again


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_what_torch_says_of_a_full_disk(tmp_path):
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    rest = (optimizer, None), [cosine_schedule(optimizer, 5)], {}
    (tmp_path / "state.pt.tmp").symlink_to("/dev/full")
    (tmp_path / "state.pt").write_bytes(b"the last state")
    with pytest.raises(OSError, match="state.pt.tmp"):
        train_glue.save_state(str(tmp_path / "state.pt"), model, *rest)
    assert (tmp_path / "state.pt").read_bytes() == b"the last state"


def test_a_full_disk_leaves_the_last_state(glue_folder, monkeypatch, capsys):
    run, save, calls = [*RUN, "--method", "lora", "--seeds", "0", "--save-every", "1"], torch.save, []

    def full(value, path):
        calls.append(path)
        if len(calls) == 4:
            (glue_folder / path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(value, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as caught:
        main([*run, "--out", "out"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and "No space left" in error
    main([*run, "--resume", "out"])
    assert [path.count("state.pt") for path in calls] == [1] * 4 + [1] * 5 + [0]  # from step 3 of 6 on, and each epoch's end
    main([*run, "--out", "straight"])
    assert outcome(glue_folder / "out/lora-seed0") == outcome(glue_folder / "straight/lora-seed0")


@pytest.mark.parametrize("change, message", [
    (["--lr", "0.01"], "config.json: lr is 0.0005, now 0.01"), (["--rho", "0.3"], "config.json: rho is 0.05, now 0.3"),
    (["--resume", "nowhere"], "nowhere: no such folder; expected the --out"), (["--out", "out"], "--out and --resume name the same"),
    ("data/dev.tsv", "config.json: files is"), ("out/bi-lora-seed0/state.pt", "state.pt: not the state of this run"),
    ("out/bi-lora-seed0/config.json", "config.json: not a JSON object"),
])
def test_a_run_goes_on_with_its_own_settings(glue_folder, capsys, monkeypatch, change, message):
    def interrupted(*args):
        raise KeyboardInterrupt

    run = [*RUN, "--method", "bi-lora", "--seeds", "0", "--save-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(train_glue, "predict", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main([*run, "--out", "out"])
    if isinstance(change, str):
        with open(change, "a" if "data" in change else "w") as file:
            file.write("1\t1\t2\ta\tb\n")
    before = {path: path.read_bytes() for path in (glue_folder / "out").rglob("*.*")}
    with pytest.raises(SystemExit) as caught:
        main([*run, "--resume", "out", *(change if isinstance(change, list) else [])])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error
    assert before == {path: path.read_bytes() for path in (glue_folder / "out").rglob("*.*")}


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_changes_memory_alone(glue_folder, method):
    """The blocks are computed twice, with the same dropout masks: the same losses and adapters to the last bit."""
    run = [*RUN, "--method", method, "--seeds", "0", "--dropout", "0.2"]
    main([*run, "--out", "plain"])
    main([*run, "--out", "twice", "--checkpointing"])
    a, b = (outcome(glue_folder / out / f"{method}-seed0") for out in ("plain", "twice"))
    assert a[0] == b[0] and a[2] == b[2]


@pytest.mark.parametrize("method, passes", [("lora", 1), ("lora-sam", 2), ("bi-lora", 1)])
def test_checkpointing_gives_every_pass_the_same_gradients(method, passes, monkeypatch):
    """Each block runs twice a pass, and the gradient of every B and A is what it is without, in both of LoRA-SAM's passes."""
    found = {}
    for checkpointing in (False, True):
        model, gradients, blocks = bert(), [], []
        layers = add_lora(model, 2, 4, 2 if method == "bi-lora" else 0)
        with torch.no_grad():
            for layer in layers:
                layer.lora_B.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        model.config.checkpointing = checkpointing
        for block in model.encoder.blocks:
            block.register_forward_pre_hook(lambda *args: blocks.append(1))
        adapters = [p for p in model.parameters() if p.requires_grad]

        def recorded(*args):
            loss = forward_backward(*args)
            gradients.append([p.grad.clone() for p in adapters])
            return loss

        monkeypatch.setattr(train_glue, "forward_backward", recorded)
        args = SimpleNamespace(device="cpu", bf16=False, micro_batch=3, rho=[0.5, 0.5])
        rows = [([1, 5 + i, 6, 7], [0] * 4, i % 2) for i in range(6)]
        torch.manual_seed(0)
        train_glue.train_step(args, method, model.train(), layers, train_glue.bilora_optimizers(model, 1e-3), classifier("mrpc"), rows)
        found[checkpointing] = gradients
        assert len(gradients) == passes and len(blocks) == passes * 2 * len(model.encoder.blocks) * (2 if checkpointing else 1)
    for plain, twice in zip(found[False], found[True]):
        assert all(torch.equal(a, b) for a, b in zip(plain, twice)) and sum(g.any().item() for g in plain) > len(plain) / 2


def test_limit_and_noise_are_drawn_by_the_seed(glue_folder):
    _, args = parse_arguments([*RUN, "--limit", "9", "--label-noise", "0.3"])
    experiment = train_glue.load_glue(args, TASKS["mrpc"])
    _, clean = parse_arguments([*RUN])
    everything = [row for row, _ in zip(train_glue.load_glue(clean, TASKS["mrpc"]).data(0)[0], range(99))]
    subsets = [experiment.data(seed)[0] for seed in (0, 0, 1)]
    assert subsets[0] == subsets[1] != subsets[2] and len(subsets[0]) == 9
    labels = {tuple(ids): label for ids, _, label in everything}
    assert sum(labels[tuple(ids)] != label for ids, _, label in subsets[0]) == 3
    assert [label for *_, label in experiment.data(0)[1]["dev"]] == [i % 2 for i in range(10)]


def test_limit_and_noise(glue_folder):
    report = main([*RUN, "--method", "lora", "--seeds", "0", "--limit", "9", "--label-noise", "0.2", "--epochs", "1"])
    assert (glue_folder / "runs/mrpc/lora-seed0/log.jsonl").read_text().count("\n") == 2 and report["config"]["limit"] == 9


def test_two_development_sets(glue_folder):
    header = "sentence1\tsentence2\tgold_label\n"
    for name, label in (("train", "neutral"), ("dev_matched", "entailment"), ("dev_mismatched", "neutral")):
        write(glue_folder / "data" / f"{name}.tsv", header + f"a b\tc\t{label}\n" * 8)
    report = main(["--task", "mnli", *RUN[2:], "--method", "lora", "--seeds", "0", "--out", "out"])
    assert report["majority"] == {"accuracy_matched": 0.0, "accuracy_mismatched": 1.0}
    assert report["results"][0]["metrics"].keys() == {
        f"{best}accuracy_{name}" for best in ("", "best_") for name in ("matched", "mismatched")}
    assert report["results"][0]["epochs"][-1]["one_class"]


def test_regression(glue_folder):
    rows = "".join(f"a {w}\tb\t{i / 2}\n" for i, w in enumerate("abcdefg"))
    for name in ("train", "dev"):
        write(glue_folder / "data" / f"{name}.tsv", "sentence1\tsentence2\tscore\n" + rows)
    report = main(["--task", "stsb", *RUN[2:], "--method", "bi-lora", "--seeds", "0", "--out", "out"])
    assert report["results"][0]["metrics"].keys() == {"pearson", "spearman", "best_pearson", "best_spearman"}
    _, args = parse_arguments(["--task", "stsb", *RUN[2:]])
    (bias,) = train_glue.load_glue(args, TASKS["stsb"]).build().classifier.bias
    assert bias.item() == 1.5  # the mean of 0, 0.5, ..., 3: a fresh head starts there
    main(["--task", "stsb", *RUN[2:], "--method", "lora", "--seeds", "0", "--epochs", "1", "--out", "merged", "--merge"])
    _, args = parse_arguments(["--task", "stsb", *RUN[2:], "--model", "merged/lora-seed0/merged"])
    trained = Transformer.from_pretrained("merged/lora-seed0/merged", num_labels=1).classifier.bias
    assert torch.equal(train_glue.load_glue(args, TASKS["stsb"]).build().classifier.bias, trained) and trained.item() != 1.5


def test_the_embedded_experiment(tmp_path, monkeypatch):
    """The base is the pretrained one, test sentences are clean and new, and the noise is what was asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train_glue.PRETRAINING, "sentences", 2000)
    printed = []
    monkeypatch.setattr(train_glue.tqdm, "set_postfix", lambda bar, loss: printed.append(float(loss)))
    _, args = parse_arguments(["--pretraining-steps", "30", "--device", "cpu"])
    experiment = train_glue.load_embedded(args, TASKS["embedded"])
    assert sum(printed[-5:]) / 5 < printed[0] - 0.5  # it learns to denoise
    (cache,) = (tmp_path / "runs").glob("pretrained-*.pt")
    state, model = torch.load(cache, weights_only=True), experiment.build()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert model.state_dict().keys() - state.keys() == {"classifier.weight", "classifier.bias"}
    examples, sets = experiment.data(0)
    assert (len(examples), len(sets["test"])) == (400, 2000)
    clean = encode(embedded_tokenizer(), embedded_rows(0, "train", 400), 20)
    assert [ids for ids, *_ in examples] == [ids for ids, *_ in clean]
    assert sum(a[2] != b[2] for a, b in zip(examples, clean)) == 40
    words, recogniser = vocabulary(), Recogniser()
    for ids, _, label in sets["test"]:
        assert recogniser.accepts([words[i] for i in ids[1:-1]]) == bool(label)
    seen = {tuple(ids) for ids, *_ in examples}
    assert sum(tuple(ids) in seen for ids, *_ in sets["test"]) < 40
    assert experiment.data(1)[0] != examples


def test_what_the_base_is_shown():
    """Of the words, some are hidden and some replaced; the special tokens and the targets stay."""
    ids = torch.tensor([[1, *range(4, 104), 2, 0, 0]]).repeat(50, 1)
    torch.manual_seed(0)
    shown, chosen = train_glue.corrupt(ids)
    assert not chosen[ids < 4].any() and torch.equal(shown[~chosen], ids[~chosen])
    share = lambda where: where.sum().item() / (50 * 100)
    assert share(chosen) == pytest.approx(0.4, abs=0.03)
    assert share(shown == 3) == pytest.approx(0.16, abs=0.02)
    assert share((shown != ids) & (shown != 3)) == pytest.approx(0.16, abs=0.02) and shown.max() < len(vocabulary())


@pytest.mark.pictures
@pytest.mark.parametrize("method", ["lora", "bi-lora"])  # all four: test_sharpness.py
def test_the_embedded_task(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train_glue.PRETRAINING, "sentences", 300)
    monkeypatch.setattr(train_glue, "EMBEDDED_TEST", 50)
    run = ["--method", method, "--seeds", "0", "--limit", "40", "--epochs", "1", "--device", "cpu", "--pretraining-steps", "2"]
    report = main(run)
    (cache,) = (tmp_path / "runs").glob("pretrained-*.pt")
    assert report["task"] == "embedded" and (tmp_path / "runs/embedded/curves.png").stat().st_size > 5000
    assert report["majority"] == {"accuracy": 0.5}
    stamp = cache.stat().st_mtime_ns
    again = main(run)
    assert cache.stat().st_mtime_ns == stamp and again["results"][0]["metrics"] == report["results"][0]["metrics"]
    main([*run[:-1], "3"])
    assert len(list((tmp_path / "runs").glob("pretrained-*.pt"))) == 2  # other settings, another base


@pytest.mark.parametrize("change, message", [
    (["--data", "nowhere"], "nowhere/train.tsv"), (["--model", "nowhere"], "nowhere: no such folder, nor could it be had from the hub"),
    (["--task", "cola"], "data/train.tsv, line 1: label"), (["--rho", "-1"], "--rho: '-1', expected float >= 0"),
    (["--rho", "0.1", "0.2", "0.3"], "--rho has 3 values"), (["--epochs", "0"], "--epochs: '0', expected int >= 1"),
    (["--rank", "two"], "--rank: 'two'"), (["--label-noise", "1"], "expected float >= 0 and < 1"),
    (["--method", "sam"], "invalid choice: 'sam'"), (["--max-length", "3"], "--max-length is 3"),
    (["--max-length", "13"], "--max-length is 13; the model has 12 positions"), (["--rank", "17"], "rank is 17"),
    (["--device", "cuda:9"], "cuda:9"), (["--device", "abacus"], "abacus"), (["--device", "meta"], "meta"),
    (["--seeds", str(2**64)], "--seeds"), (["--alpha", "0"], "--alpha: '0'"), (["--task", "embedded"], "is for a GLUE task"), (["--out", "bert/config.json"], "config.json"),
    (["--task", "stsb", "--label-noise", "0.1"], "--label-noise needs"), (["--ascent", "adam"], "invalid choice: 'adam'"),
    (["--prompts", "t5"], "--prompts is t5, but bert has a classifier"), (["--lr", "nan"], "--lr: 'nan'"),
])
def test_wrong_input_is_one_line_and_exit_code_2(glue_folder, capsys, change, message):
    before = sorted(glue_folder.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main([*RUN, *change])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error
    assert sorted(glue_folder.rglob("*")) == before


def test_tokens_that_the_model_lacks(glue_folder, capsys):
    path = glue_folder / "bert" / "tokenizer.json"
    text = path.read_text().replace('"p": 19', '"p": 50')
    path.write_text(text)
    write(glue_folder / "data" / "dev.tsv", MRPC + "1\t1\t2\tp\tp\n")
    with pytest.raises(SystemExit) as caught:
        main(RUN)
    assert caught.value.code == 2 and "tokenizer.json: gives token 50; the model has 50" in capsys.readouterr().err


def test_ranks_are_checked_before_the_pretraining(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["--rank", "129"])
    assert caught.value.code == 2 and "rank is 129" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_missing_arguments(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--task", "mrpc", "--data", "data"])
    assert caught.value.code == 2 and "needs --model" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_by_name(glue_folder, monkeypatch):
    monkeypatch.setattr(train_glue.F, "cross_entropy", lambda logits, labels, reduction: logits.sum() * math.nan)
    with pytest.raises(SystemExit, match="bi-lora, seed 3: .*step 1.*loss is nan"):
        main([*RUN, "--method", "bi-lora", "--seeds", "3"])

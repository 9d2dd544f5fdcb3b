"""The GLUE script: files, plan of batches, losses, scores, runs and what is left of them.

Oracles: rows, schedules and scores worked out by hand and by numpy; torch's own mean loss and its
autograd; one row at a time, without padding; a run that nothing interrupted; GLUE's published row
counts (with GLUE_DATA set).  Runs are made in-process on a tiny random BERT.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import threading
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import model as model_file
import train_glue
from bilora import add_lora, bilora_step, load_adapter
from conftest import DRAW
from model import Transformer, read_safetensors
from test_model import BERT, bert, write_checkpoint
from train_glue import (METHODS, TASKS, Method, cosine_schedule, encode, forward_backward, main,
                        parse_arguments, plan_batches, predict, read_tsv, score, training_rows)

ADAPTER = "adapter_model.safetensors"  # the file's name stands here alone
PAPERS = ("lora", "lora-sam", "bi-lora")

def arguments(**settings):
    return SimpleNamespace(**{"device": "cpu", "bf16": False, "fsdp": False, "micro_batch": 3,
                              **settings})

def data_of(task, **settings):
    return SimpleNamespace(**{"task": TASKS[task], "answers": None, "pad_id": 0, **settings})


# ------------------------------------------------------------------------------------------ files

MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"

def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)

def test_read_tsv(tmp_path):
    path = write(tmp_path / "a.tsv", f'\ufeff{MRPC}1\t7\t8\tHe said "no.\tA b\n0\t7\t8\tc\td\r\n')
    assert read_tsv(TASKS["mrpc"], path) == [(('He said "no.', "A b"), 1), (("c", "d"), 0)]
    path = write(tmp_path / "b.tsv", "gj04\t1\t\tOne.\ngj04\t0\t*\tTwo two.\n")
    assert read_tsv(TASKS["cola"], path) == [(("One.",), 1), (("Two two.",), 0)]

@pytest.mark.parametrize("task, text, message", [
    ("mrpc", MRPC + "1\t7\t8\ta\tb\n1\t7\t8\ta\n", "line 3: 4 fields, expected at least 5"),
    ("mrpc", MRPC + "2\t7\t8\ta\tb\n", "line 2: label '2', expected one of 0, 1"),
    ("mrpc", MRPC.replace("Quality", "index") + "0\t7\t8\ta\tb\n", "line 1: no column 'Quality'"),
    ("mrpc", MRPC, "no rows"), ("mrpc", "", "line 1: no column"), ("cola", "", "no rows"),
    ("cola", "gj04\t-1\t\tOne.\n", "line 1: label '-1'"),
    ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n",
     "line 2: label 'neutral', expected one of entail"),
    ("mrpc", MRPC + "1\t7\t8\tcaf\udce9\tb\n", "line 2: not UTF-8")])
def test_bad_rows_are_named(tmp_path, task, text, message):
    path = tmp_path / "bad.tsv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as caught:
        read_tsv(TASKS[task], str(path))
    assert message in str(caught.value) and str(caught.value).startswith(str(path))

def test_task_table():
    """The paper's settings where it has the task, and each task's columns."""
    short = {"lr": 5e-4, "batch_size": 32, "epochs": 3, "rho": [0.01, 0.05], "seeds": [0, 1, 2]}
    long, two = {**short, "epochs": 10}, ("sentence1", "sentence2")
    rte = {**long, "rho": [0.05, 0.1], "seeds": [0, 1, 2, 3, 4]}
    expected = {
        "mrpc": (long, ("#1 String", "#2 String"), "Quality"), "cola": (long, (3,), 1),
        "sst2": (short, ("sentence",), "label"), "rte": (rte, two, "label"),
        "qnli": (short, ("question", "sentence"), "label"), "mnli": (short, two, "gold_label")}
    assert expected == {name: (task.settings, task.text, task.label)
                        for name, task in TASKS.items() if name != "demo"}
    assert TASKS["demo"].text == (3,) and TASKS["demo"].label == 1  # CoLA's format

@pytest.mark.skipif("GLUE_DATA" not in os.environ, reason="GLUE_DATA is no folder of GLUE's files")
@pytest.mark.parametrize("task, folder, train, counts", [
    ("mrpc", "MRPC", 3668, [129, 279]), ("cola", "CoLA", 8551, [322, 721]),
    ("sst2", "SST-2", 67349, [428, 444])])
def test_published_row_counts(task, folder, train, counts):
    folder = os.path.join(os.environ["GLUE_DATA"], folder)
    labels = [label for _, label in read_tsv(TASKS[task], os.path.join(folder, "dev.tsv"))]
    assert [labels.count(0), labels.count(1)] == counts
    assert len(read_tsv(TASKS[task], os.path.join(folder, "train.tsv"))) == train

def test_truncation():
    rows = [(("a b c d e",), 1), (("a",), 0)]
    (ids, types, label), short = encode(pair_tokenizer(), rows, None, 5)
    assert (ids, types, label) == ([1, 4, 5, 6, 2], [0] * 5, 1) and short[0] == [1, 4, 2]
    (ids, types, _), = encode(pair_tokenizer(), [(("a", "b"), 1)], None, 12)
    assert (ids, types) == ([1, 4, 2, 5, 2], [0, 0, 0, 1, 1])
    with pytest.raises(ValueError, match="--max-length is 2; expected more than the 2"):
        encode(pair_tokenizer(), rows, None, 2)


# --------------------------------------------------------------------------------------- the plan

def test_the_plan_is_a_partition_into_similar_lengths():
    rng, args = random.Random(0), arguments(epochs=2, batch_size=16)
    lengths = [rng.randint(3, 60) for _ in range(501)]
    plan = plan_batches(args, 1, lengths)
    epochs = {epoch: [batch for e, batch in plan if e == epoch] for epoch in (1, 2)}
    assert [epoch for epoch, _ in plan] == [1] * 32 + [2] * 32 and epochs[1] != epochs[2]
    for batches in epochs.values():
        assert sorted(sum(batches, [])) == list(range(501))
        assert sorted(map(len, batches))[1:] == [16] * 31
        spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
        assert statistics.fmean(spread) < 8  # 50 for random batches
        shortest = [lengths[batch[0]] for batch in batches]
        assert shortest[:16] != sorted(shortest[:16])  # the batches are shuffled too
    assert plan == plan_batches(args, 1, lengths) != plan_batches(args, 2, lengths)

def test_limit_and_label_noise_are_drawn_by_the_seed():
    data = data_of("mnli", rows=[([i], [0], i % 3) for i in range(300)])
    args, no_noise = (arguments(limit=200, label_noise=noise) for noise in (0.1, 0.0))
    rows, clean = training_rows(args, data, 0), training_rows(no_noise, data, 0)
    assert [ids for ids, *_ in rows] == [ids for ids, *_ in clean]
    assert len({ids[0] for ids, *_ in rows}) == 200
    changed = [(a, b) for (*_, a), (*_, b) in zip(clean, rows) if a != b]
    assert len(changed) == 20 and len(set(changed)) > 3  # to either of the two other labels
    assert all(label == ids[0] % 3 for ids, _, label in [*clean, *data.rows])  # the data stays
    assert rows == training_rows(args, data, 0) != training_rows(args, data, 1)
    assert clean != training_rows(no_noise, data, 1)
    everything = training_rows(arguments(limit=10**9, label_noise=0), data, 0)
    assert sorted(everything) == sorted(data.rows)
    assert sorted(training_rows(arguments(limit=None, label_noise=0), data, 0)) == sorted(data.rows)

    def flipped(seed):
        """Places in the drawn rows: where the rows are others, the rows drawn say nothing of it."""
        drawn = zip(training_rows(args, data, seed), training_rows(no_noise, data, seed))
        return [i for i, (a, b) in enumerate(drawn) if a != b]
    assert flipped(0) != flipped(1)

def test_the_schedule_is_linear_then_half_a_cosine():
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (2.0, 1.0)]
    optimizer = torch.optim.SGD(groups)
    schedule, factors = cosine_schedule(optimizer, 100), []
    for _ in range(100):
        first, second = schedule.get_last_lr()
        assert first == 2 * second
        factors.append(second)
        optimizer.step()
        schedule.step()
    cosine = [0.5 * (1 + math.cos(math.pi * t / 97)) for t in range(97)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, *cosine], abs=1e-12)


# ------------------------------------------------------------------------------------------ losses

def test_micro_batches_add_up_to_the_batch():
    """The mean over seven rows, in parts of 3, 3 and 1, and its gradient, against torch's own."""
    model = bert().double()
    lengths = [2 + i % 3 for i in range(7)]
    rows = [([1, 4 + i, 5, 6][:n], [0] * n, i % 3) for i, n in enumerate(lengths)]
    total = forward_backward(arguments(), model, data_of("mnli"), rows)
    found = [p.grad.clone() for p in model.parameters()]
    logits = torch.cat([model(torch.tensor([ids])) for ids, *_ in rows])
    labels = torch.tensor([label for *_, label in rows])
    loss = F.cross_entropy(logits, labels)
    assert total.item() == pytest.approx(loss.item(), rel=1e-5)  # the script's loss is in float32
    for a, b in zip(found, torch.autograd.grad(loss, list(model.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)

def test_the_rise_is_that_of_the_merged_weights():
    """L(W + 0.05 G / ||G||) - L(W), with W written out, its G by autograd; the auxiliary pairs and
    the head are not part of W."""
    model, plain = bert().double(), bert().double()
    layers = add_lora(model, 2, 16, 2)
    names = [name for name, module in plain.named_modules()
             if isinstance(module, torch.nn.Linear) and name != "classifier"]
    weights = [plain.get_submodule(name).weight for name in names]
    assert len(weights) == len(layers) == 13
    with torch.no_grad():
        for layer in layers:
            layer.lora_B.normal_(std=0.05)
            layer.aux_B.normal_()
        for name, weight in zip(names, weights):
            layer = model.get_submodule(name)
            weight.add_(8 * layer.lora_B @ layer.lora_A)
    rows = [([1, 4 + i, 5, 6], [0] * 4, i % 3) for i in range(7)]

    def loss():
        logits = plain(torch.tensor([ids for ids, *_ in rows]))
        return F.cross_entropy(logits, torch.tensor([label for *_, label in rows]))

    before = loss()
    gradients = torch.autograd.grad(before, weights)
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    with torch.no_grad():
        for weight, g in zip(weights, gradients):
            weight.add_(g, alpha=0.05 / norm)
        expected = (loss() - before).item()
    old = [layer.weight.clone() for layer in layers]
    closure = lambda: forward_backward(arguments(), model.eval(), data_of("mnli"), rows)
    found = train_glue.loss_rise(SimpleNamespace(layers=layers), closure)
    assert expected > 0.01 and found == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(layer.weight, w) for layer, w in zip(layers, old))
    assert not any(layer.weight.requires_grad for layer in layers)

@torch.no_grad()
def test_predictions_are_each_rows_own_in_eval_mode():
    """300 rows of unsorted lengths, in two segments, against each row alone, without the auxiliary
    pair."""
    model = bert()
    for layer in add_lora(model, 2, 16, 2):
        layer.lora_B.normal_(std=0.1)
        layer.aux_B.normal_()
    rng = random.Random(0)
    rows = [([1, *rng.choices(range(4, 50), k=n), 2], [0] * 2 + [1] * n, 0)
            for n in rng.choices(range(1, 10), k=300)]
    model.train()
    found = predict(arguments(), model, data_of("mnli"), rows)
    model.eval()
    alone = [model(torch.tensor([ids]), None, torch.tensor([types])) for ids, types, _ in rows]
    assert found == [logits.argmax().item() for logits in alone] and len(set(found)) == 3


# ------------------------------------------------------------------------------------------ scores

def scores(task, predictions, labels):
    sets = {"dev": [([], [], label) for label in labels]}
    return score(data_of(task, sets=sets), "dev", predictions)

def test_scores_by_hand_and_by_numpy():
    p, y = [1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 0]  # tp 2, fp 2, fn 1, tn 1
    assert scores("mrpc", p, y) == {"accuracy": 0.5, "f1": pytest.approx(4 / 7)}
    by_hand = (2 * 1 - 2 * 1) / math.sqrt(4 * 3 * 3 * 2)
    assert scores("cola", p, y) == {"matthews": pytest.approx(by_hand, abs=1e-12), "accuracy": 0.5}
    p, y = [1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1]  # tp 2, tn 2, fp 1, fn 1
    by_hand = (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3)
    assert scores("cola", p, y)["matthews"] == pytest.approx(by_hand)
    assert scores("mnli", [2, 1, 0], [2, 1, 1]) == {"accuracy": pytest.approx(2 / 3)}

def test_one_class_predictions_score_zero():
    assert scores("cola", [1, 1, 1, 1], [1, 0, 1, 1]) == {"matthews": 0.0, "accuracy": 0.75}
    assert scores("mrpc", [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}

def test_the_summary_pairs_the_seeds(tmp_path):
    runs = [{"method": m, "seed": s, "metrics": {"accuracy": a}} for m, s, a in
            [("lora", 0, 0.5), ("lora", 1, 0.7), ("bi-lora", 0, 0.6), ("bi-lora", 1, 0.9),
             ("bi-lora", 2, 0.1)]]
    args = SimpleNamespace(task="mrpc", model="m", out=str(tmp_path), defaults={})
    report = train_glue.write_report(args, runs, {"accuracy": 0.5})
    assert report["summary"]["lora"]["accuracy"] == {
        "mean": pytest.approx(0.6), "stderr": pytest.approx(0.1), "n": 2}
    assert report["difference"] == {"bi-lora": {"accuracy": {
        "mean": pytest.approx(0.15), "stderr": pytest.approx(0.05), "n": 2}}}
    one = train_glue.write_report(args, runs[:1], {})
    assert one["summary"]["lora"]["accuracy"]["stderr"] is None

def test_curves(tmp_path, monkeypatch):
    """A line for each method: the mean over its seeds, and a band of one standard error."""
    figures = []

    class Noted(Figure):
        def __init__(self, **settings):
            super().__init__(**settings)
            figures.append(self)

    monkeypatch.setattr("matplotlib.figure.Figure", Noted)
    runs = [{"method": method, "config": {"task": "mrpc"}, "seed": seed, "metrics": {"f1": 0},
             "epochs": [{"epoch": epoch, "loss": seed + epoch, "f1": 0.1 * epoch}
                        for epoch in (1, 2)]}
            for method in ("bi-lora", "lora") for seed in (0, 1, 5)]
    DRAW(runs, str(tmp_path / "curves.png"), {"f1": 0.3})
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    loss, f1 = figures[0].axes
    assert (loss.get_ylabel(), f1.get_ylabel(), f1.get_xlabel()) == ("training loss", "f1", "epoch")
    assert [line.get_label() for line in f1.lines] == ["bi-lora", "lora", "majority class"]
    assert [line.get_color() for line in f1.lines[:2]] == ["C2", "C0"]  # by the table of methods
    assert list(f1.lines[2].get_ydata()) == [0.3, 0.3] and len(loss.lines) == 2
    for line, band in zip(loss.lines, loss.collections):
        assert line.get_ydata() == pytest.approx([3, 4])
        error = np.std([0, 1, 5], ddof=1) / math.sqrt(3)
        assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(4 + error)


# ------------------------------------------------------------------------------------------ runs

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnop"]
RUN = ["--task", "mrpc", "--data", "data", "--model", "bert", "--rank", "2", "--aux-rank", "3",
       "--batch-size", "8", "--epochs", "2", "--max-length", "12", "--device", "cpu"]
ONE = [*RUN, "--method", "lora", "--seeds", "0"]

def pair_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return tokenizer

def make_glue_folder(folder):
    """A tiny BERT, its tokenizer, and MRPC files whose label is whether the two sentences are
    equal."""
    for name in ("bert", "data"):
        (folder / name).mkdir()
    write_checkpoint(folder / "bert", bert(), BERT)
    pair_tokenizer().save(str(folder / "bert" / "tokenizer.json"))
    rng = random.Random(0)
    for name, size in (("train", 21), ("dev", 10)):
        rows = []
        for i in range(size):
            words = rng.choices(WORDS[4:], k=rng.randint(2, 4))
            second = words if i % 2 else words[::-1]
            rows.append(f"{i % 2}\t1\t2\t{' '.join(words)}\t{' '.join(second)}\n")
        write(folder / "data" / f"{name}.tsv", MRPC + "".join(rows))
    return folder

@pytest.fixture
def glue_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_glue_folder(tmp_path)

COMPARED = [*RUN, "--method", *PAPERS, "--seeds", "0", "1", "--out", "out", "--rho", "0.02", "0.03",
            "--ascent", "adamw", "--aux-lr", "0.05"]

@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(folder, what main printed, report) of a comparison of the paper's methods, two seeds, with
    pictures."""
    folder, printed = make_glue_folder(tmp_path_factory.mktemp("compared")), []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train_glue, "draw_curves", DRAW)
        patch.setattr(train_glue, "print", lambda text: printed.append(text), raising=False)
        report = main([*COMPARED, "--jobs", "1"])
    return folder, "\n".join(printed), report

def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

def losses(folder):
    return [row["loss"] for row in log_of(folder)]

def outcome(folder):
    """All that a run leaves but its times: the log, the scores, the adapter's bits."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("step_seconds", "peak_memory_bytes"):
        del metrics[name]
    log = [{key: value for key, value in row.items() if key != "seconds"} for row in log_of(folder)]
    adapter = read_safetensors(folder / ADAPTER)
    return log, metrics, {name: tensor.numpy().tobytes() for name, tensor in adapter.items()}

def error_of(capsys, argv, program=main):
    """The one line that a command with wrong input ends in."""
    with pytest.raises(SystemExit) as caught:
        program(argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    return error

def test_what_a_comparison_leaves(compared):
    folder, printed, report = compared
    assert report == json.loads((folder / "out/metrics.json").read_text())
    assert {"task", "model", "config", "results", "summary"} <= report.keys()
    assert (report["task"], report["model"], report["config"]["rank"]) == ("mrpc", "bert", 2)
    assert [(run["seed"], run["method"]) for run in report["results"]] == [
        (seed, method) for seed in (0, 1) for method in PAPERS]
    names = ["accuracy", "f1", "best_accuracy", "best_f1", "rise"]
    for method, entries in report["summary"].items():
        runs = [run["metrics"] for run in report["results"] if run["method"] == method]
        values = {name: [metrics[name] for metrics in runs] for name in names}
        assert entries == {name: {"mean": pytest.approx(np.mean(v)), "n": 2,
                                  "stderr": pytest.approx(abs(v[0] - v[1]) / 2)}
                           for name, v in values.items()}
    assert list(report["summary"]) == list(PAPERS) and set(report["difference"]) == set(PAPERS[1:])
    assert all(f"\n| {method} | " in printed for method in PAPERS) and "seeds 0, 1" in printed
    assert report["majority"] == {"accuracy": 0.5, "f1": 0.0}  # of class 0, on 5 + 5 rows
    assert "| majority class | 0.500 |" in printed
    last = printed.splitlines()[-1]
    assert "out/metrics.json" in last and "out/curves.png" in last and "adapters" in last
    assert (folder / "out/curves.png").read_bytes()[:4] == b"\x89PNG"

@pytest.mark.parametrize("method", PAPERS)
def test_what_a_run_leaves(compared, monkeypatch, method):
    folder, _, report = compared
    monkeypatch.chdir(folder)
    args = SimpleNamespace(**report["config"])
    data = train_glue.load(args)
    # 2 blocks of q, k, v, o, up and down; the pooler
    adapted = 2 * (4 * 2 * (16 + 16) + 2 * (16 + 32) * 2) + 2 * (16 + 16)
    auxiliary = adapted * 3 // 2 if method == "bi-lora" else 0
    for run in [run for run in report["results"] if run["method"] == method]:
        own = folder / "out" / f"{method}-seed{run['seed']}"
        files = {path.name for path in own.iterdir()}
        assert files >= {"config.json", "log.jsonl", "adapter_config.json", ADAPTER, "metrics.json",
                         "curves.png"}
        assert "state.pt" not in files and not any(name.endswith(".tmp") for name in files)
        assert json.loads((own / "metrics.json").read_text()) == run
        config = json.loads((own / "config.json").read_text())
        assert config == run["config"] and (config["method"], config["rank"]) == (method, 2)
        expected = {"primary": adapted, "auxiliary": auxiliary, "head": 2 * 16 + 2, "base": 0}
        assert run["parameters"] == expected
        log = log_of(own)
        assert [(row["step"], row["epoch"]) for row in log] == [
            (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
        cosine = [5e-4 * 0.5 * (1 + math.cos(math.pi * t / 5)) for t in range(5)]
        assert [row["lr"] for row in log] == pytest.approx([5e-4, *cosine])  # one step of warm-up
        assert all(math.isfinite(row["loss"]) and row["seconds"] > 0 for row in log)
        assert [row["loss"] for row in run["epochs"]] == pytest.approx(
            [np.mean(losses(own)[:3]), np.mean(losses(own)[3:])])
        last, best = run["epochs"][-1], run["epochs"][run["best_epoch"] - 1]
        assert best["accuracy"] == max(row["accuracy"] for row in run["epochs"])
        assert run["metrics"] == {"accuracy": last["accuracy"], "f1": last["f1"],
                                  "best_accuracy": best["accuracy"], "best_f1": best["f1"],
                                  "rise": run["metrics"]["rise"]}  # checked below
        assert log[-1]["scores"] == {"accuracy": last["accuracy"], "f1": last["f1"]}
        assert sum(log[-1]["predicted"]["dev"]) == 10
        assert run["step_seconds"] > 0 and (run["peak_memory_bytes"] or 2**21) > 2**20
        norms = [row.get("perturbation") for row in log]
        if method == "bi-lora":  # c as it was before the clip
            assert norms[0] > 0 and [row["clipped"] for row in log] == [c > 0.03 for c in norms]
            assert 0 < run["clipped_fraction"] == sum(c > 0.03 for c in norms) / 6
        else:
            assert norms == [0.02 if method == "lora-sam" else None] * 6
        model = Transformer.from_pretrained(folder / "bert", num_labels=2)
        layers = add_lora(model, 2, 16)
        model.classifier.requires_grad_(True)
        load_adapter(model, str(own), model.module_names, read_safetensors)
        assert model.encoder.blocks[0].attention.q.lora_B.any()
        rows = training_rows(args, data, run["seed"])
        parts = arguments(micro_batch=args.micro_batch or args.batch_size)
        closure = partial(forward_backward, parts, model.eval(), data, rows)
        rise = train_glue.loss_rise(SimpleNamespace(layers=layers), closure)
        assert run["metrics"]["rise"] == pytest.approx(rise, rel=1e-4)  # without auxiliary pairs

def test_the_methods_of_a_seed_are_paired(compared):
    """Fresh adapters change nothing: the first batch's loss is the same.  Seeds differ."""
    first = {(method, seed): losses(compared[0] / "out" / f"{method}-seed{seed}")[0]
             for method in PAPERS for seed in (0, 1)}
    for seed in (0, 1):
        assert first["lora", seed] == first["lora-sam", seed] == first["bi-lora", seed]
    assert first["lora", 0] != first["lora", 1]

def test_runs_side_by_side(compared, glue_folder, capfd):
    """Two processes of one thread each: the results are those of this process with one thread.  A
    run that fails is named in one line, no result is lost, and a note is printed once."""
    assert torch.get_num_threads() == 1
    failing = glue_folder / "out/lora-seed0/log.jsonl.tmp"
    failing.mkdir(parents=True)
    argv = [*COMPARED, "--method", "lora", "bi-lora", "--seeds", "1", "0", "--jobs", "2"]
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    out, error = capfd.readouterr()
    assert error.count("error:") == 1 and "lora, seed 0: " in error and "log.jsonl.tmp" in error
    assert out.count("its classifier of classes without names is not used") == 1
    for method in ("lora", "bi-lora"):
        folders = [folder / "out" / f"{method}-seed1" for folder in (glue_folder, compared[0])]
        together, alone = map(outcome, folders)
        for metrics in (together[1], alone[1]):
            del metrics["config"]["files"]  # their times
        assert together == alone
        assert (folders[0] / "curves.png").read_bytes()[:4] == b"\x89PNG"

def test_without_a_perturbation_all_methods_are_lora(glue_folder):
    """rho = 0, or an ascent of no speed: the same losses to the last step, so the same order of
    rows, dropout masks and learning rates."""
    run, out = [*RUN, "--dropout", "0.2", "--seeds", "0", "--method"], glue_folder / "out"
    main([*run, *PAPERS, "--rho", "0", "--out", "out"])
    plain = losses(out / "lora-seed0")
    assert losses(out / "lora-sam-seed0") == plain
    assert losses(out / "bi-lora-seed0") == pytest.approx(plain, rel=1e-5)  # kernels of rank r + r2
    main([*run, "bi-lora", "--aux-lr", "0", "--out", "still"])
    assert losses(glue_folder / "still/bi-lora-seed0") == pytest.approx(plain, rel=1e-5)
    main([*run, "lora", "--dropout", "0", "--out", "clear"])
    assert losses(glue_folder / "clear/lora-seed0")[0] != plain[0]
    main([*run, "lora", "--bf16", "--out", "half"])
    half = losses(glue_folder / "half/lora-seed0")
    assert half != plain and half == pytest.approx(plain, rel=0.05)

@pytest.mark.parametrize("ascent", ["sgd", "adamw"])
def test_descent_and_ascent_share_the_schedule(glue_folder, ascent):
    """eta2 / eta1 stays what it was at the start, in every step."""
    argv = [*RUN, "--lr", "0.01", "--aux-lr", "0.5", "--ascent", ascent]
    args, _ = parse_arguments(argv, "", train_glue.SETTINGS, train_glue.GLUE_OPTIONS)
    data = train_glue.load(args)
    build = partial(train_glue.build_model, data)
    run = train_glue.prepare(args, "bi-lora", 0, build, str(glue_folder), 6)
    factors = [1.0, *(0.5 * (1 + math.cos(math.pi * t / 5)) for t in range(5))]
    for factor in factors:
        for optimizer, lr in ((run.descent, 0.01), (run.ascent, 0.5)):
            assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(lr * factor)]
        for part in (run.descent, run.ascent, *run.schedules):
            part.step()

def test_a_cpu_trains_with_the_plain_attention_kernel_in_bfloat16_alone(glue_folder, monkeypatch):
    """Scores, which have no backward pass, come from the fused one."""
    taken, attention = {True: set(), False: set()}, F.scaled_dot_product_attention

    def noted(*args, **kwargs):
        taken[torch.is_grad_enabled()].add(torch.backends.cuda.flash_sdp_enabled())
        return attention(*args, **kwargs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    before = torch.backends.cuda.flash_sdp_enabled()
    for words, fused in ((["--bf16"], False), (["--no-bf16"], before)):
        main([*ONE, "--epochs", "1", *words, "--out", words[0].strip("-")])
        assert taken == {True: {fused}, False: {before}}
        taken[True].clear()
    assert before and torch.backends.cuda.flash_sdp_enabled()

@pytest.mark.parametrize("capability, words, told", [
    ("AVX2", ["--bf16"], True), ("AVX2", ["--no-bf16"], False), ("AVX512", ["--bf16"], False)])
def test_bfloat16_on_a_cpu_without_its_kernels_is_told(glue_folder, monkeypatch, capsys, capability,
                                                       words, told):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    main([*ONE, "--epochs", "1", *words, "--out", "out"])
    assert ("bfloat16 is many times slower" in capsys.readouterr().out) == told

def test_the_files_of_a_checkpoint_have_one_order(glue_folder, monkeypatch):
    """Whatever order the file system lists them in, and whatever the folder is called."""
    shutil.copytree("bert", "bert[1]")
    found, whole = [], os.listdir
    for turned in (False, True):
        monkeypatch.setattr(os, "listdir", lambda path: sorted(whole(path), reverse=turned))
        args, _ = parse_arguments([*RUN, "--model", "bert[1]"], "", train_glue.SETTINGS,
                                  train_glue.GLUE_OPTIONS)
        found.append(train_glue.load(args).files)
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert found[0] == found[1] and [os.path.basename(path) for path in found[0][-3:]] == names

@pytest.mark.parametrize("error", [
    UnicodeDecodeError("utf-8", b"x", 0, 1, "broken"), FileNotFoundError(2, "gone"),
    ValueError("odd")])
def test_an_error_of_a_run_names_it_whatever_its_kind(monkeypatch, error):
    def fails(*args):
        raise error

    monkeypatch.setattr(train_glue, "WORKER", {"data": None, "progress": None})
    with pytest.raises(ValueError, match="lora, seed 3: .*(broken|gone|odd)"):
        train_glue.one_run(fails, None, (3, "lora"), "folder")

def test_a_process_that_is_killed_from_outside_ends_in_one_line(glue_folder, capsys, monkeypatch):
    def broken(*args):
        raise BrokenProcessPool("a process was terminated abruptly")

    monkeypatch.setattr(train_glue, "run_all", broken)
    assert "terminated abruptly" in error_of(capsys, [*ONE, "--jobs", "2"])

def test_limit_and_noise_reach_the_run(glue_folder):
    report = main([*ONE, "--limit", "9", "--label-noise", "0.2", "--epochs", "1"])
    assert len(log_of(glue_folder / "runs/mrpc/lora-seed0")) == 2 and report["config"]["limit"] == 9

def test_data_is_the_tasks_own_folder_or_glues_root(glue_folder):
    main([*ONE, "--epochs", "1", "--out", "own"])
    (glue_folder / "glue").mkdir()
    (glue_folder / "data").rename(glue_folder / "glue" / "MRPC")
    main([*ONE, "--epochs", "1", "--out", "root", "--data", "glue"])
    assert losses(glue_folder / "own/lora-seed0") == losses(glue_folder / "root/lora-seed0")

@pytest.mark.parametrize("method", PAPERS)
def test_checkpointing_changes_memory_alone(glue_folder, monkeypatch, method):
    """The blocks run twice, with the same dropout masks: the same losses and adapter, bit for
    bit."""
    run, calls, whole = [*ONE, "--method", method, "--dropout", "0.2"], [], model_file.Block.forward

    def counted(self, *args, **more):
        calls.append(self.training)
        return whole(self, *args, **more)

    monkeypatch.setattr(model_file.Block, "forward", counted)
    counts = []
    for out, more in (("plain", []), ("twice", ["--checkpointing"])):
        calls.clear()
        main([*run, "--out", out, *more])
        counts.append(sum(calls))
    passes = 2 if method == "lora-sam" else 1
    assert counts == [6 * passes * 2, 2 * 6 * passes * 2]  # 6 steps, 2 blocks
    plain, twice = (outcome(glue_folder / out / f"{method}-seed0") for out in ("plain", "twice"))
    assert plain[0] == twice[0] and plain[2] == twice[2]

def test_two_development_sets(glue_folder, capsys):
    sets = (("train", "neutral"), ("dev_matched", "entailment"), ("dev_mismatched", "neutral"))
    for name, label in sets:
        rows = f"a b\tc\t{label}\n" * 8
        write(glue_folder / "data" / f"{name}.tsv", "sentence1\tsentence2\tgold_label\n" + rows)
    report = main([*ONE, "--task", "mnli", "--lr", "0.05", "--out", "out"])
    assert report["majority"] == {"accuracy_matched": 0, "accuracy_mismatched": 1}
    (run,) = report["results"]
    assert run["metrics"].keys() - {"rise"} == {
        f"{best}accuracy_{name}" for best in ("", "best_") for name in ("matched", "mismatched")}
    assert run["metrics"]["accuracy_matched"] == 0 and run["metrics"]["accuracy_mismatched"] == 1
    printed = capsys.readouterr().out
    assert "lora, seed 0: predicts one class only in dev_matched" in printed


# ----------------------------------------------------------------------------- killed and resumed

def keeper(run, closure):
    """Bi-LoRA with a tensor that it keeps from step to step, and steps by."""
    kept = run.state.setdefault("kept", torch.zeros(2))
    kept.add_(torch.rand(2))
    loss = bilora_step(run.descent, run.ascent, closure, run.layers, run.rho * kept[0].item())
    return {"loss": loss, "kept": kept[1]}

def killed(argv, moment, count):
    """Run main in another process, which is killed for good in the count-th call of `moment`."""
    child = os.fork()
    if child == 0:
        owner, name = moment
        whole, calls = getattr(owner, name), []

        def wrapper(*args, **kwargs):
            calls.append(1)
            if len(calls) == count:
                if owner is torch:  # halfway through a save
                    with open(args[1], "wb") as file:
                        file.write(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args, **kwargs)

        setattr(owner, name, wrapper)
        try:
            main(argv)
        finally:
            os._exit(1)  # never: it was killed before
    return os.waitpid(child, 0)[1]

def steps_of(argv, method):
    """How many steps main takes with these arguments."""
    whole, steps = METHODS[method], []

    def counted(run, closure):
        steps.append(1)
        return whole.step(run, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, method, whole._replace(step=counted))
        main(argv)
    return len(steps)

PASS, SCORES = (train_glue, "forward_backward"), (train_glue, "predict")
SAVE, END = (torch, "save"), (train_glue, "draw_curves")

@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU autograd does not survive a fork")
@pytest.mark.parametrize("method, moment, count, rest", [
    ("lora", PASS, 5, 2), ("lora-sam", SAVE, 2, 4), ("lora-sam", PASS, 10, 2),
    ("bi-lora", SCORES, 2, 2), ("bi-lora", END, 1, 0), ("keeper", PASS, 6, 2)])
def test_killed_and_resumed_equals_straight(glue_folder, monkeypatch, method, moment, count, rest):
    """Killed (SIGKILL) in a step, in a second pass, halfway through a save, while scoring, before
    the last file; then as many steps as follow the last saved state, with the same bits."""
    monkeypatch.setitem(METHODS, "keeper", Method(keeper, auxiliary=True))
    run = [*ONE, "--method", method, "--dropout", "0.2", "--save-every", "2", "--ascent", "adamw",
           "--aux-lr", "0.05"]
    assert killed([*run, "--out", "out"], moment, count) == signal.SIGKILL
    out = glue_folder / "out" / f"{method}-seed0"
    assert (out / "state.pt").exists() and not (out / "metrics.json").exists()
    assert steps_of([*run, "--out", "out", "--resume"], method) == rest
    main([*run, "--out", "straight"])
    assert outcome(out) == outcome(glue_folder / "straight" / f"{method}-seed0")
    assert not (out / "state.pt").exists()
    assert method != "keeper" or log_of(out)[-1]["kept"] > 1  # it is the sum over all steps

def test_resume_takes_finished_runs(glue_folder, monkeypatch):
    first = main([*ONE, "--out", "out"])
    log = glue_folder / "out/lora-seed0/log.jsonl"
    log.write_text("kept")
    more = [*ONE, "--seeds", "0", "1", "--save-every", "1"]  # these are no other settings
    both = main([*more, "--out", "out", "--resume"])
    assert log.read_text() == "kept" and both["results"][0] == first["results"][0]
    assert len(both["results"]) == 2 and both["summary"]["lora"]["accuracy"]["n"] == 2
    monkeypatch.setattr(train_glue, "prepare", None)  # nothing is left to train
    assert main([*more, "--out", "out", "--resume"])["results"] == both["results"]

def test_a_finished_run_is_deleted_only_when_asked(glue_folder, capsys):
    main([*ONE, "--out", "out"])
    log = glue_folder / "out/lora-seed0/log.jsonl"
    log.write_text("kept")
    error = error_of(capsys, [*ONE, "--out", "out", "--resume", "--overwrite"])
    assert "--resume keeps finished runs, --overwrite deletes them" in error
    assert log.read_text() == "kept"
    error = error_of(capsys, [*ONE, "--seeds", "1", "0", "--out", "out"])
    assert "out: 1 of these runs are finished, 0 begun" in error
    assert "--resume" in error and "--overwrite" in error
    assert log.read_text() == "kept" and not (glue_folder / "out/lora-seed1").exists()
    main([*ONE, "--out", "out", "--overwrite", "--lr", "0.01"])
    assert log_of(log.parent)[0]["lr"] == 0.01

def test_an_interrupted_run_is_not_begun_anew_unasked(glue_folder, capsys, monkeypatch):
    """Its state is all that is left of it."""
    def interrupted(*args):
        raise KeyboardInterrupt

    run = [*ONE, "--save-every", "1", "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(train_glue, "predict", interrupted)
        with pytest.raises(SystemExit, match="^interrupted; --resume goes on"):
            main(run)
    state = glue_folder / "out/lora-seed0/state.pt"
    before = state.read_bytes()
    assert "out: 0 of these runs are finished, 1 begun" in error_of(capsys, run)
    assert state.read_bytes() == before
    main([*run, "--overwrite"])
    assert not state.exists()

def test_a_process_ends_with_its_parent(monkeypatch):
    """Whose runs would go on, and collide with those of --resume."""
    ended, signals = threading.Event(), []
    parent = SimpleNamespace(join=lambda: None)
    monkeypatch.setattr(train_glue.multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(train_glue.os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(train_glue.signal, "signal", lambda *what: signals.append(what))
    monkeypatch.setattr(train_glue, "WORKER", {})
    queue = SimpleNamespace(cancel_join_thread=lambda: None, put=print)
    train_glue.start_worker(lambda args: "data", None, queue)
    assert ended.wait(5) and signals == [(signal.SIGINT, signal.SIG_DFL)]
    assert train_glue.WORKER == {"data": "data", "progress": print}

def test_an_option_that_is_newer_than_a_run_has_its_default(glue_folder, capsys):
    report = main([*ONE, "--out", "out"])
    for path in ("out/config.json", "out/lora-seed0/config.json"):
        config = json.loads((glue_folder / path).read_text())
        del config["dropout"]
        write(glue_folder / path, json.dumps(config))
    error = error_of(capsys, [*ONE, "--out", "out", "--resume", "--dropout", "0.1"])
    assert "out/config.json: dropout is 0.0, now 0.1" in error
    assert main([*ONE, "--out", "out", "--resume"])["results"] == report["results"]

def test_runs_of_two_settings_do_not_mix(glue_folder, capsys):
    """One method cannot be trained anew with other settings: the other one's run would stay."""
    both = ["--method", "lora", "bi-lora", "--out", "out"]
    main([*ONE, *both])
    before = {path: path.read_bytes() for path in (glue_folder / "out").rglob("*.*")}
    other = ["--out", "out", "--overwrite", "--lr", "0.01"]
    message = "out/bi-lora-seed0/config.json: lr is 0.0005, now 0.01"
    assert message in error_of(capsys, [*ONE, *other])
    assert before == {path: path.read_bytes() for path in (glue_folder / "out").rglob("*.*")}
    main([*ONE, *both, "--overwrite", "--lr", "0.01"])
    assert json.loads((glue_folder / "out/config.json").read_text())["lr"] == 0.01

def test_the_report_is_over_all_runs_in_the_folder(glue_folder):
    """Whatever the last command asked for; what is no run is not read."""
    shutil.copytree("bert", "out/bert")
    main([*RUN, "--method", "bi-lora", "--seeds", "1", "--epochs", "1", "--out", "out"])
    main([*RUN, "--method", "lora", "--seeds", "1", "0", "--epochs", "1", "--out", "out"])
    report = json.loads((glue_folder / "out/metrics.json").read_text())
    assert [(run["seed"], run["method"]) for run in report["results"]] == [
        (0, "lora"), (1, "lora"), (1, "bi-lora")]
    assert report["difference"]["bi-lora"]["accuracy"]["n"] == 1

def test_overwriting_leaves_nothing_of_the_old_run(glue_folder, monkeypatch):
    """A run that is overwritten and then interrupted does not look finished."""
    def interrupted(*args):
        raise KeyboardInterrupt

    main([*ONE, "--out", "out"])
    monkeypatch.setattr(train_glue, "predict", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        main([*ONE, "--out", "out", "--overwrite"])
    assert os.listdir(glue_folder / "out/lora-seed0") == ["config.json"]

@pytest.mark.parametrize("change, message", [
    (["--lr", "0.01"], "out/config.json: lr is 0.0005, now 0.01; expected the same, another --out"),
    (["--rho", "0.3"], "config.json: rho is [0.01, 0.05], now [0.3]"),
    ("data/dev.tsv", "config.json: files is"),
    ("out/lora-seed0/state.pt", "lora, seed 0: out/lora-seed0/state.pt: not the state of this run"),
    ("out/lora-seed0/config.json", "config.json: not a JSON object")])
def test_a_run_goes_on_with_its_own_settings(glue_folder, capsys, monkeypatch, change, message):
    def interrupted(*args):
        raise KeyboardInterrupt

    run = [*ONE, "--save-every", "1"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="interrupted"):
        patch.setattr(train_glue, "predict", interrupted)
        main([*run, "--out", "out"])
    if isinstance(change, str):
        with open(change, "a" if "data" in change else "w") as file:
            file.write("1\t1\t2\ta\tb\n")
    before = {path: path.read_bytes() for path in (glue_folder / "out").rglob("*.*")}
    more = change if isinstance(change, list) else []
    assert message in error_of(capsys, [*run, "--out", "out", "--resume", *more])
    assert before == {path: path.read_bytes() for path in (glue_folder / "out").rglob("*.*")}
    if "--lr" in more:
        assert message in error_of(capsys, [*run, "--out", "out", *more])


# ------------------------------------------------------------------------------------------ errors

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
@pytest.mark.parametrize("name", ["state.pt", "log.jsonl", "metrics.json"])
def test_a_full_disk_ends_in_one_line_and_leaves_the_last_state(glue_folder, capsys, name):
    run, out = [*ONE, "--save-every", "1"], glue_folder / "out/lora-seed0"
    out.mkdir(parents=True)
    save, calls = torch.save, []

    def fill_up(value, path):
        calls.append(path)
        if len(calls) == 4:
            (out / f"{name}.tmp").unlink(missing_ok=True)
            (out / f"{name}.tmp").symlink_to("/dev/full")
        save(value, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", fill_up)
        error = error_of(capsys, [*run, "--out", "out"])
    assert "lora, seed 0: " in error and not (out / "metrics.json").exists()
    assert name != "state.pt" or f"{name}.tmp" in error
    (out / f"{name}.tmp").unlink()
    assert steps_of([*run, "--out", "out", "--resume"], "lora") == (3 if name == "state.pt" else 0)
    main([*run, "--out", "straight"])
    assert outcome(out) == outcome(glue_folder / "straight/lora-seed0")

def test_a_save_that_fails_late_ends_in_one_line(glue_folder, capsys):
    """Two adapters in a folder; the trained run goes on where it could not be saved."""
    other = glue_folder / "out/lora-seed0/adapter_model.bin"
    other.parent.mkdir(parents=True)
    other.touch()
    run = [*ONE, "--save-every", "1"]
    error = error_of(capsys, [*run, "--out", "out"])
    assert "lora, seed 0: out/lora-seed0: " in error and ADAPTER in error and other.name in error
    other.unlink()
    assert steps_of([*run, "--out", "out", "--resume"], "lora") == 0

def other_family(folder):
    write(folder / "bert/config.json", json.dumps({"model_type": "gpt2"}))

def short_row(folder):
    write(folder / "data/dev.tsv", MRPC + "1\t7\t8\ta\n")

def unknown_token(folder):
    text = (folder / "bert/tokenizer.json").read_text()
    write(folder / "bert/tokenizer.json", text.replace('"p": 19', '"p": 50'))
    write(folder / "data/dev.tsv", MRPC + "1\t1\t2\tp\tp\n")

def unknown_segment(folder):
    text = (folder / "bert/tokenizer.json").read_text()
    write(folder / "bert/tokenizer.json", re.sub('"type_id": *1', '"type_id":2', text))

@pytest.mark.parametrize("change, message", [
    (["--data", "nowhere"], "nowhere/train.tsv"),
    (["--model", "./nowhere"], "nowhere: no such folder"),
    (["--task", "cola"], "data/train.tsv, line 1: label"), (short_row, "dev.tsv, line 2: 4 fields"),
    (other_family, "bert/config.json: model_type is 'gpt2'"),
    (unknown_token, "tokenizer.json: gives token 50; the model has 50"),
    (unknown_segment, "tokenizer.json: gives segment 2; the model has 2"),
    (["--rho", "-1"], "--rho: '-1', expected float >= 0"),
    (["--epochs", "0"], "--epochs: '0', expected int >= 1"),
    (["--rho", "0.1", "0.2", "0.3"], "--rho has 3 values"), (["--rank", "two"], "--rank: 'two'"),
    (["--rank", "17"], "rank is 17"), (["--aux-rank", "17"], "aux_rank is 17"),
    (["--label-noise", "1"], "expected float >= 0 and < 1"), (["--lr", "nan"], "--lr: 'nan'"),
    (["--method", "sam"], "invalid choice: 'sam'"),
    (["--ascent", "adam"], "invalid choice: 'adam'"),
    (["--task", "glue"], "invalid choice: 'glue'"), (["--jobs", "0"], "--jobs: '0'"),
    (["--max-length", "3"], "--max-length is 3"), (["--alpha", "0"], "--alpha: '0'"),
    (["--max-length", "13"], "--max-length is 13: 13 tokens; the model has 12 positions"),
    (["--device", "cuda:9"], "cuda:9"), (["--device", "abacus"], "abacus"),
    (["--device", "meta"], "meta"),
    (["--seeds", str(2**64)], "--seeds"), (["--out", "bert/config.json"], "config.json")])
def test_wrong_input_is_one_line_and_exit_code_2(glue_folder, capsys, change, message):
    if callable(change):
        change(glue_folder)
    before = {path: path.is_file() and path.read_bytes() for path in glue_folder.rglob("*")}
    assert message in error_of(capsys, [*RUN, *([] if callable(change) else change)])
    assert before == {path: path.is_file() and path.read_bytes() for path in glue_folder.rglob("*")}

@pytest.mark.parametrize("words", [{"names": "", "answers": ""}, {"names": "not spam spam"},
                                   {"answers": "no"}])
def test_a_task_names_each_class_by_one_word(glue_folder, capsys, monkeypatch, words):
    monkeypatch.setitem(TASKS, "mrpc", TASKS["mrpc"]._replace(**words))
    said = error_of(capsys, RUN)
    assert f"mrpc in TASKS has {list(words.values())[-1]!r}; expected one word for each of" in said
    assert not os.path.exists("runs")

def test_a_model_has_to_be_named(capsys):
    assert "--task mrpc needs --model" in error_of(capsys, ["--task", "mrpc", "--data", "data"])

def test_a_loss_that_is_not_finite_ends_the_run_by_name(glue_folder, monkeypatch):
    nan = lambda logits, labels, **more: logits.sum(1) * math.nan
    monkeypatch.setattr(train_glue.F, "cross_entropy", nan)
    with pytest.raises(SystemExit, match="^error: bi-lora, seed 3: .*step 1.*loss is nan[^\n]*$"):
        main([*RUN, "--method", "bi-lora", "--seeds", "3"])

def test_the_padding_token_needs_no_embedding(glue_folder):
    """Padding is masked: its id may be the size of the vocabulary."""
    main([*ONE, "--epochs", "1", "--out", "first"])
    text = (glue_folder / "bert/tokenizer.json").read_text()
    write(glue_folder / "bert/tokenizer.json", re.sub(r'"\[PAD\]": ?0', '"[PAD]": 50', text))
    assert model_file.load_tokenizer("bert").padding["pad_id"] == 50
    main([*ONE, "--epochs", "1", "--out", "second"])
    assert losses(glue_folder / "first/lora-seed0") == losses(glue_folder / "second/lora-seed0")

@pytest.fixture
def three_classes(glue_folder):
    """MNLI's files, for the tiny BERT, which has a head of three classes."""
    for name in ("train", "dev_matched", "dev_mismatched"):
        rows = "sentence1\tsentence2\tgold_label\n" + "a b\tc\tneutral\n" * 8
        write(glue_folder / "data" / f"{name}.tsv", rows)
    return glue_folder

MNLI = [*ONE, "--task", "mnli", "--epochs", "1"]
NEW_HEAD = ("bert: its classifier of {} is not used; one of entailment, neutral, contradiction is "
            "drawn")

@pytest.mark.parametrize("names, used", [
    (["Entailment", "NEUTRAL", "contradiction"], True), (["a", "b", "c"], False),
    (["contradiction", "neutral", "entailment"], False), (["LABEL_0", "LABEL_1", "LABEL_2"], False),
    (["entailment", "neutral"], False), ([], False)])
def test_a_head_is_used_only_for_the_classes_it_was_trained_for(three_classes, names, used):
    """By config.json's names, in the task's order."""
    settings = {"id2label": dict(enumerate(names))} if names else {}
    write(three_classes / "bert/config.json", json.dumps({**BERT, **settings}))
    args, _ = parse_arguments(MNLI, "", train_glue.SETTINGS, train_glue.GLUE_OPTIONS)
    data = train_glue.load(args)
    model = train_glue.build_model(data)
    weight = model.classifier.weight
    assert model.config.labels == ["entailment", "neutral", "contradiction"]  # and not the old ones
    head = read_safetensors("bert/model.safetensors")["classifier.weight"]
    assert torch.equal(weight, head) is used and weight.shape == head.shape
    said = NEW_HEAD.format(", ".join(names) or "classes without names")
    assert data.notes == ([] if used else [said])
    tensors = read_safetensors("bert/model.safetensors")
    bare = {key: tensor for key, tensor in tensors.items() if not key.startswith("classifier")}
    model_file.write_safetensors("bert/model.safetensors", bare)
    assert train_glue.load(args).notes == []  # there is no head to speak of

def test_every_task_names_its_classes():
    names = {name: (task.names or task.answers).split() for name, task in TASKS.items()}
    accepted = ["unacceptable", "acceptable"]
    entailed = ["entailment", "not_entailment"]
    assert names == {"demo": accepted, "cola": accepted, "mrpc": ["not_equivalent", "equivalent"],
                     "sst2": ["negative", "positive"], "rte": entailed, "qnli": entailed,
                     "mnli": ["entailment", "neutral", "contradiction"]}
    assert all(len(names[name]) == len(task.labels) for name, task in TASKS.items())
    for name in ("rte", "qnli", "mnli"):  # files that name them
        assert tuple(names[name]) == TASKS[name].labels

COLA = "a\t1\t\tgood one\nb\t0\t\tbad one\n"

@pytest.mark.parametrize("end", ["\n", "\n\n\n", " \n", "\t\t\t\t\n", "\r\n"])
def test_blank_lines_at_the_end_are_no_rows(tmp_path, end):
    expected = [(("good one",), 1), (("bad one",), 0)]
    assert read_tsv(TASKS["cola"], write(tmp_path / "a.tsv", COLA + end)) == expected
    path = write(tmp_path / "b.tsv", f"{MRPC}1\t7\t8\ta\tb\n{end}")
    assert read_tsv(TASKS["mrpc"], path) == [(("a", "b"), 1)]

@pytest.mark.parametrize("task, text, line", [
    ("cola", COLA.replace("b\t0", "\nb\t0"), 2), ("cola", "\n" + COLA, 1),
    ("cola", COLA + " \n" + COLA, 3), ("mrpc", f"{MRPC}\r\n1\t7\t8\ta\tb\n", 2)])
def test_a_blank_line_before_the_last_row_is_an_error(tmp_path, task, text, line):
    with pytest.raises(ValueError, match=f"a.tsv, line {line}: a blank line before the last row"):
        read_tsv(TASKS[task], write(tmp_path / "a.tsv", text))

def test_a_pointer_of_git_lfs_is_called_one(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    path = write(tmp_path / "a.tsv", pointer)
    with pytest.raises(ValueError, match="a.tsv: a Git LFS pointer; run git lfs pull"):
        read_tsv(TASKS["cola"], path)

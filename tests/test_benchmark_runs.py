"""notes/benchmark_runs.py and notes/plain_peft.py: what is counted, what is refused, and that both
loops train the same.  No times.

Oracles: tokens counted by hand; the number of adapter parameters from the model's shape; in
one_round itself PEFT's parameters and the tokens that transformers' masks leave, against ours.
"""

import json
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from model import read_json

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "notes"))
import benchmark_runs as runs  # noqa: E402

WORDS = ["--model", "DIR", "--data", "DIR"]


def test_tokens_count_up_to_a_rows_first_end():
    """Both ends are ends, an end counts once, what follows it never; a row may have none."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 2, 2, 2], [3, 5, 2, 5], [2, 5, 6, 7]])
    assert runs.count_new(ids, [2]) == 4 + 2 + 3 + 1
    assert runs.count_new(ids, [2, 3]) == 4 + 2 + 1 + 1
    assert runs.count_new(ids, []) == 16


@pytest.fixture
def run():
    return SimpleNamespace(parameters=7, tokens=120, training=4.0, seconds=9.0, scores={"f1": 0.5},
                           losses=[4.0, 2.0, 1.0], generated=[])


def test_quantities_are_tokens_over_seconds_and_mean_losses(run):
    found = runs.quantities(run, [2])
    assert found == {"parameters": 7, "tokens": 120, "run, s": 9.0, "training, s": 4.0,
                     "training, tokens/s": 30.0, "loss, first half": 4.0,
                     "loss, second half": 1.0, "f1": 0.5}
    run.generated = [(1.5, torch.tensor([[5, 2, 2]])), (0.5, torch.tensor([[5, 5], [2, 2]]))]
    found = runs.quantities(run, [2])
    assert found["generation, s"] == 2.0 and found["generation, tokens/s"] == 5 / 2.0


def test_the_summary_has_medians_and_the_ratio_of_each_round():
    """The median of the ratios is not the ratio of the medians."""
    rounds = [{"ours": {"run, s": a}, "PEFT": {"run, s": b}} for a, b in ((1, 4), (2, 2), (6, 3))]
    assert runs.summary(rounds) == {"run, s": {"ours": 2, "PEFT": 3, "ratio": 1.0,
                                               "ratios": [0.25, 1.0, 2.0]}}


def test_the_first_rows_are_copied_after_a_header(tmp_path):
    source, folder = tmp_path / "MRPC", tmp_path / "cut"
    source.mkdir(), folder.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (source / name).write_bytes(b"head\r\nfirst\nsecond\nthird")
    runs.cut("glue", str(tmp_path), str(folder), 2)
    for name in ("train.tsv", "dev.tsv"):
        assert (folder / name).read_bytes() == b"head\r\nfirst\nsecond\n"
    for name in ("train.jsonl", "test.jsonl"):
        (source / name).write_bytes(b"{}\n" * 50)
    runs.cut("gsm8k", str(source), str(folder), 40)
    counts = [len((folder / name).read_bytes().splitlines())
              for name in ("train.jsonl", "test.jsonl")]
    assert counts == [40, runs.PROMPTS]


@pytest.mark.parametrize("words, message", [
    ([], "arguments are required: task"), (["mnli", *WORDS], "invalid choice: 'mnli'"),
    (["glue", *WORDS, "--rounds", "0"], "--rounds: '0', expected int >= 1"),
    (["gsm8k", *WORDS, "--rows", "3"], "--rows: '3', expected int >= 16"),
    (["glue", *WORDS, "--out", "no/file.json"], "--out is no/file.json; expected a file in")])
def test_wrong_options_end_with_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        runs.main(words)
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_without_the_libraries_the_script_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it was not installed
    monkeypatch.delitem(sys.modules, "plain_peft", raising=False)
    with pytest.raises(SystemExit) as end:
        runs.main(["glue", *WORDS])
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "pip install transformers==5.24.0 peft==0.21.2" in last


@pytest.fixture
def libraries():
    """Skips, by its name, where one is missing."""
    for name in ("transformers", "peft"):
        pytest.importorskip(name)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(runs, "SHORT", 4)
    monkeypatch.setattr(runs, "PROMPTS", 3)
    monkeypatch.setattr(runs, "NEW_TOKENS", 5)


def check_report(path, table, quantities):
    """Both learn from the same tokens; all numbers are there, and finite."""
    report = json.loads(path.read_text())
    assert report["summary"] == table and list(table) == quantities
    assert len(report["rounds"]) == 2 and [*report["rounds"][0]] == ["ours", "PEFT"]
    for pair in report["rounds"]:
        assert all(math.isfinite(value) for row in pair.values() for value in row.values())


def shape_of(folder):
    config = read_json(os.path.join(folder, "config.json"))
    return config["hidden_size"], config["intermediate_size"]


def test_both_loops_train_an_encoder_on_pairs(libraries, few, small_folders, tmp_path):
    """A pair of rank 8 for each linear layer of one block and the pooler; a head of two classes."""
    sentences = small_folders[0]
    with open(os.path.join(sentences, "dev.tsv"), encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    pairs = [f"{row[1]}\t1\t2\t{row[3]}\t{other[3]}" for row, other in zip(rows, rows[1:])]
    text = "\n".join(["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *pairs])
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    out = tmp_path / "report.json"
    table = runs.main(["glue", "--model", sentences, "--data", str(tmp_path), "--rounds", "2",
                       "--out", str(out)])
    check_report(out, table, ["parameters", "tokens", "run, s", "training, s",
                              "training, tokens/s", "loss, first half", "loss, second half",
                              "accuracy", "f1"])
    D, F = shape_of(sentences)
    assert table["parameters"]["PEFT"] == 8 * (5 * 2 * D + 2 * (D + F)) + 2 * (D + 1)


def test_both_loops_train_a_decoder_and_generate(libraries, few, small_folders, tmp_path):
    problems, out = small_folders[1], tmp_path / "report.json"
    table = runs.main(["gsm8k", "--model", problems, "--data", problems, "--rounds", "2", "--rows",
                       "33", "--out", str(out)])
    check_report(out, table, ["parameters", "tokens", "run, s", "training, s",
                              "training, tokens/s", "generation, s", "generation, tokens/s",
                              "loss, first half", "loss, second half"])
    D, F = shape_of(problems)
    assert table["parameters"]["PEFT"] == 8 * (4 * 2 * D + 3 * (D + F))


def test_data_that_are_not_there_end_with_one_line(libraries, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        runs.main(["glue", "--model", str(tmp_path), "--data", str(tmp_path)])
    assert end.value.code == 2
    assert str(tmp_path / "train.tsv") in capsys.readouterr().err.splitlines()[-1]


def test_runs_that_differ_give_no_result(monkeypatch, tmp_path, run):
    """Other parameters, other tokens."""
    other = SimpleNamespace(**{**vars(run), "parameters": 8})
    monkeypatch.setattr(runs, "RUNS", {"ours": lambda *_: run, "PEFT": lambda *_: other})
    monkeypatch.setattr(runs, "count_read", lambda *_: 120)
    options = SimpleNamespace(task="gsm8k", model=runs.train_gsm8k.DEMO)
    with pytest.raises(ValueError, match="parameters: 7 in our run, 8 in PEFT's"):
        runs.one_round(options, str(tmp_path), 0)
    other.parameters = 7
    monkeypatch.setattr(runs, "count_read", lambda *_: 121)
    with pytest.raises(ValueError, match="tokens: 121 in our run, 120 in PEFT's"):
        runs.one_round(options, str(tmp_path), 1)

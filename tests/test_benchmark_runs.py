"""notes/benchmark_runs.py and notes/plain_peft.py: what is counted, what is refused, and that both
loops train the same.  No times.

Oracles: tokens counted by hand; the number of adapter parameters from the model's shape; in
one_round itself PEFT's parameters and the tokens that transformers' masks leave, against ours.
"""

import json
import math
import os
import shutil
import sys
from functools import partial
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
    runs.cut("gsm8k", str(source), str(folder), 20)
    assert len((folder / "test.jsonl").read_bytes().splitlines()) == 20


def test_a_short_round_comes_first_and_is_not_counted(monkeypatch):
    monkeypatch.setattr(runs, "cut", lambda task, source, folder, rows: cuts.update({folder: rows}))
    monkeypatch.setattr(runs, "one_round", lambda _, folder, number: done.append(
        (cuts[folder], number)) or done[-1])
    cuts, done, options = {}, [], SimpleNamespace(task="glue", data="DIR", rows=99, rounds=3)
    counted = runs.measured(options)
    assert counted == done[1:] == [(99, 0), (99, 1), (99, 2)] and done[0][0] == runs.SHORT


def test_the_loops_take_turns_and_are_timed_as_a_whole(monkeypatch, tmp_path, run):
    """A clock of 3 seconds for each run; a round's number is its seed."""
    order, ticks = [], iter(range(0, 300, 3))

    def noted(name, options, words, args):
        order.append((name, *args.seeds))
        return SimpleNamespace(**vars(run))
    monkeypatch.setattr(runs, "RUNS", {name: partial(noted, name) for name in ("ours", "PEFT")})
    monkeypatch.setattr(runs, "count_read", lambda *_: 120)
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(ticks))
    options = SimpleNamespace(task="gsm8k", model=runs.train_gsm8k.DEMO)
    rounds = [runs.one_round(options, str(tmp_path), number) for number in (0, 1)]
    assert order == [("ours", 0), ("PEFT", 0), ("PEFT", 1), ("ours", 1)]
    assert [row["run, s"] for pair in rounds for row in pair.values()] == [3] * 4
    assert [list(pair) for pair in rounds] == [["ours", "PEFT"]] * 2


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


# ------------------------------------------------------------------- the loop of the two libraries

class Batch(dict):
    def to(self, device):
        return self


class Line(torch.nn.Module):
    """The loss is that of y = w x, elementwise: autocast leaves it alone.  Notes what it reads."""

    def __init__(self):
        super().__init__()
        self.w, self.read = torch.nn.Parameter(torch.tensor([0.5, -0.25])), []

    def forward(self, x, attention_mask):
        assert torch.is_autocast_enabled("cpu") and self.training
        self.read.append(x)
        return SimpleNamespace(loss=((self.w * x - 1) ** 2).mean())


def test_the_loop_is_adamw_over_shuffled_micro_batches(libraries):
    """Two steps, of two micro-batches and of what is left, against the same updates written out."""
    import plain_peft
    args = SimpleNamespace(batch_size=4, micro_batch=2, lr=0.1, device="cpu")
    rows = [torch.tensor([float(i), 1.0 - i]) for i in range(5)]
    run = SimpleNamespace(model=Line().eval(), losses=[], tokens=0)
    torch.manual_seed(0)
    plain_peft.train(run, args, rows, lambda part: Batch(
        x=torch.stack(part), attention_mask=torch.ones(len(part), 3)))
    read = run.model.read
    assert [len(x) for x in read] == [2, 2, 1] and run.tokens == 3 * 5
    assert not torch.equal(torch.cat(read), torch.stack(rows))
    assert sorted(torch.cat(read)[:, 0].tolist()) == [0, 1, 2, 3, 4]
    w, m, v, losses = torch.tensor([0.5, -0.25]).double(), 0.0, 0.0, []
    for t, part in enumerate((read[:2], read[2:]), 1):
        gradient = 0
        for x in (x.double() for x in part):
            losses.append(((w * x - 1) ** 2).mean().item())
            gradient = gradient + (2 * (w * x - 1) * x).sum(0) / x.numel() / 2
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        corrected = m / (1 - 0.9**t), v / (1 - 0.999**t)
        w = w - 0.1 * corrected[0] / (corrected[1].sqrt() + 1e-8)  # 0.1: warm, then cosine's first
    assert run.losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(run.model.w.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_the_schedule_of_the_loop_is_ours(libraries, monkeypatch):
    """The rates of four steps: one to warm up, then half a cosine over three."""
    import plain_peft
    args, rates = SimpleNamespace(batch_size=1, micro_batch=None, lr=0.1, device="cpu"), []
    step = torch.optim.AdamW.step

    def noted(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[0]["weight_decay"] == 0
        return step(optimizer)
    noted.hooked = True
    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    run = SimpleNamespace(model=Line(), losses=[], tokens=0)
    plain_peft.train(run, args, [torch.ones(2)] * 4, lambda part: Batch(
        x=torch.stack(part), attention_mask=torch.ones(1, 1)))
    assert rates == pytest.approx([0.1, 0.1, 0.1 * 0.75, 0.1 * 0.25])


def of_our_script(task, folder, tmp_path):
    options = SimpleNamespace(task=task, model=folder)
    _, args = runs.settings(options, str(tmp_path), str(tmp_path / "out"), 0)
    return args


def test_the_model_of_the_loop_has_our_settings(libraries, small_folders, tmp_path):
    """Rank and scale of each pair; no dropout; a prompt has no loss, an answer and its end have."""
    import plain_peft
    from peft.tuners.lora import LoraLayer
    from transformers import AutoTokenizer
    sentences, problems = small_folders
    (tmp_path / "train.tsv").write_text("Quality\t#1 String\t#2 String\n1\ta b\tb a\n")
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    drops = shutil.copytree(sentences, tmp_path / "model") / "config.json"
    drops.write_text(json.dumps({**read_json(drops), "hidden_dropout_prob": 0.1,
                                 "attention_probs_dropout_prob": 0.1}))
    args = of_our_script("glue", str(drops.parent), tmp_path)
    model, _, _ = plain_peft.mrpc(args, AutoTokenizer.from_pretrained(sentences))
    drops = [part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)]
    assert drops and not any(drops)
    layers = [part for part in model.modules() if isinstance(part, LoraLayer)]
    assert {(*layer.scaling.values(), *layer.r.values()) for layer in layers} == {
        (args.alpha / args.rank, args.rank)}
    args = of_our_script("gsm8k", problems, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(problems)
    model, (row,), _ = plain_peft.gsm8k(args, tokenizer)
    scored = [label for label in row["labels"] if label != -100]
    assert row["input_ids"][-len(scored):] == scored and scored[-1] == model.config.eos_token_id
    (prompt, _, _), = runs.train_gsm8k.load(args).rows
    assert row["labels"].count(-100) == len(prompt)


class Logits:
    """A model of given logits; it may only be called in eval mode."""

    def __init__(self, logits):
        self.logits, self.training = logits, True

    def eval(self):
        self.training = False

    def __call__(self, input_ids, **_):
        assert not self.training
        first, self.logits = self.logits[:len(input_ids)], self.logits[len(input_ids):]
        return SimpleNamespace(logits=first)


def test_the_scores_of_the_loop_by_hand(libraries, small_folders, tmp_path):
    """Right: 3 of 5.  Of the class 1: two found and right, one found too many, one not found."""
    import plain_peft
    from transformers import AutoTokenizer
    labels, found = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    lines = [f"{label}\ta b\tb" for label in labels]
    (tmp_path / "dev.tsv").write_text("\n".join(["Quality\t#1 String\t#2 String", *lines]))
    args = of_our_script("glue", small_folders[0], tmp_path)
    run = SimpleNamespace(model=Logits(torch.eye(2)[found]))
    plain_peft.mrpc_scores(run, args, AutoTokenizer.from_pretrained(small_folders[0]))
    assert run.scores == pytest.approx({"accuracy": 3 / 5, "f1": 2 * 2 / (2 * 2 + 1 + 1)})


def test_the_loop_generates_after_prompts_that_are_padded_on_the_left(libraries, small_folders,
                                                                      tmp_path):
    import plain_peft
    from transformers import AutoTokenizer
    rows = [{"question": text, "answer": "2"} for text in ("1 + 1?", "1 + 1 + 1 + 1 + 1?")]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "out").mkdir()
    args, model = of_our_script("gsm8k", small_folders[1], tmp_path), Logits([])
    tokenizer = AutoTokenizer.from_pretrained(small_folders[1])
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    masks, new = [], torch.tensor([[7, 8], [8, 7]])

    def generate(input_ids, attention_mask, do_sample, max_new_tokens, **_):
        masks.append(attention_mask)
        assert not do_sample and max_new_tokens == args.max_new_tokens and not model.training
        return torch.cat([input_ids, new], dim=1)
    model.generate, run = generate, SimpleNamespace(model=model, generated=[])
    plain_peft.gsm8k_texts(run, args, tokenizer)
    (mask,), ((_, ids),) = masks, run.generated
    assert mask[0, 0] == 0 and mask[:, -1].all() and torch.equal(ids, new)
    texts = json.loads((tmp_path / "out/predictions.json").read_text())
    assert texts == tokenizer.batch_decode(new)


def test_our_seconds_of_training_are_those_of_the_steps(small_folders, tmp_path, monkeypatch):
    def main(words):
        folder = tmp_path / "lora-seed0"
        folder.mkdir()
        rows = [{"loss": 2.0, "seconds": 0.25}, {"loss": 1.0, "seconds": 0.5}]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"results": [{"metrics": {"accuracy": 0.5, "f1": 0.25, "rise": 1.0},
                             "parameters": {"primary": 3, "head": 4}}]}
    monkeypatch.setattr(runs.train_glue, "main", main)
    args = SimpleNamespace(out=str(tmp_path), seeds=[0])
    run = runs.ours(SimpleNamespace(task="glue"), [], args)
    assert (run.losses, run.training, run.parameters) == ([2.0, 1.0], 0.75, 7)
    assert run.scores == {"accuracy": 0.5, "f1": 0.25} and run.generated == []

"""notes/study.py: its splits, its controls, its choices, its statistics, and small runs of it.

Oracles: the files' own lines; the controls' rules written out in float64 on autograd's gradients;
torch's AdamW; tables of Student's t and binomial sums worked out by hand; numpy; train_glue.main
with the same options.
"""

import collections
import json
import math
import os
import re
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import same_color

import train_glue
import train_gsm8k
from bilora import primary_parameters
from test_relatives import (assert_all_close, gradient_at, norm, run_of, script_run,
                            trained_gradients)
from test_steps import adapted
from test_train_glue import error_of
from train_glue import METHODS, SETTINGS, TASKS, read_tsv

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
import study  # noqa: E402
import study_plan  # noqa: E402
import study_tables  # noqa: E402
from study_plan import ALL, CELLS, CONTRASTS, CONTROLS, ROWS, Cell  # noqa: E402

SMALL = {"limit": 16, "epochs": 2, "batch_size": 8, "rank": 2, "aux_rank": 2}
TINY = Cell("demo", 2, ALL, SMALL, {"held": 20, "rest": 30})
QUICK = ["--jobs", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, small_demos):
    """A folder of its own; the scripts' tables are as before when a test ends."""
    monkeypatch.chdir(tmp_path)
    tables = (TASKS, SETTINGS, train_gsm8k.TASKS, METHODS, CELLS)
    before = [dict(table) for table in tables]
    yield tmp_path
    for table, old in zip(tables, before):
        table.clear()
        table.update(old)


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


# ------------------------------------------------------------------------------------------ splits

MRPC_LIKE = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"


def made_up(folder, task, count):
    """A file of the task's layout: texts with a quote, a repeated text, one that dev.tsv has."""
    if task == "mrpc":
        rows = [f'{i % 2}\t{i}\t{i}\t"first {i}\tsecond {i}\n' for i in range(count)]
        header = MRPC_LIKE
    elif task == "sst2":
        rows, header = [f'say "{i} é \t{i % 2}\n' for i in range(count)], "sentence\tlabel\n"
    else:
        rows, header = [f"gj04\t{i % 2}\t\tSentence, {i}.\n" for i in range(count)], ""
    folder.mkdir()
    (folder / "dev.tsv").write_bytes((header + "".join(rows[:3])).encode())
    (folder / "train.tsv").write_bytes((header + "".join(rows + rows[5:7])).encode())
    return [row.encode() for row in rows]


@pytest.mark.parametrize("task", ["mrpc", "sst2", "cola"])
def test_the_parts_are_disjoint_lines_of_the_file(folder, task):
    rows = made_up(folder / "glue", task, 60)
    cell = Cell(task, 1, ALL, {"label_noise": 0.3}, {"held": 10, "rest": 12, "train": 20})
    study.write_parts(cell, str(folder / "glue"), str(folder / "parts"))
    columns, parts = TASKS[task], {}
    for name, count in (("held", 10), ("rest", 12), ("train", 20), ("dev", 3)):
        parts[name] = read_tsv(columns, str(folder / "parts" / (name + ".tsv")))
        assert len(parts[name]) == count, name
    texts = [text for part in parts.values() for text, _ in part]
    assert len(set(texts)) == len(texts) == 45
    labels = dict(read_tsv(columns, str(folder / "glue/train.tsv")))
    wrong = {name: sum(labels[text] != label for text, label in part)
             for name, part in parts.items()}
    assert wrong == {"held": 3, "rest": 0, "train": 0, "dev": 0}
    header = 0 if task == "cola" else 1
    for name in ("rest", "train"):
        own = lines_of(folder / "parts" / (name + ".tsv"))
        assert set(own[header:]) <= set(rows), name
    dev = (folder / "glue/dev.tsv").read_bytes()
    assert (folder / "parts/dev.tsv").read_bytes() == dev
    held = lines_of(folder / "parts/held.tsv")[header:]
    assert len(set(held) - set(rows)) == 3  # those with another label; all else is as it was


def test_the_noise_and_the_size_change_no_part(folder):
    made_up(folder / "glue", "sst2", 60)
    for name, noise in (("a", 0.0), ("b", 0.5)):
        cell = Cell("sst2", 1, ALL, {"label_noise": noise, "limit": 7}, {"held": 10, "rest": 12})
        study.write_parts(cell, str(folder / "glue"), str(folder / name))
    for part in ("rest", "train", "dev"):
        assert lines_of(folder / "a" / (part + ".tsv")) == lines_of(folder / "b" / (part + ".tsv"))


def test_a_file_that_is_too_small_is_an_error(folder):
    made_up(folder / "glue", "sst2", 20)
    with pytest.raises(ValueError, match="too few rows for rest.tsv"):
        study.write_parts(Cell("sst2", 1, ALL, {}, {"held": 10, "rest": 12}),
                          str(folder / "glue"), str(folder / "parts"))


@pytest.mark.skipif("GLUE_DATA" not in os.environ, reason="GLUE_DATA is not set")
@pytest.mark.parametrize("name", ["sst2-1000-noise30", "cola-2000", "mrpc"])
def test_the_real_files_are_large_enough(folder, name):
    options = SimpleNamespace(out="out", data=None)
    parts, cell = study.data_of(name, options), CELLS[name]
    sizes = {}
    for part in ("train", *study_plan.sets_of(cell)):
        sizes[part] = len(read_tsv(TASKS[cell.task], os.path.join(parts, part + ".tsv")))
    assert {part: sizes[part] for part in cell.parts} == cell.parts
    assert sizes["train"] >= (cell.settings["limit"] or 3500)


# ---------------------------------------------------------------------------------------- controls

def smoothed_by_hand(logits, labels, share):
    """-sum_c q_c log p_c with q = (1 - share) one-hot + share / C."""
    logs = logits - torch.logsumexp(logits, 1, keepdim=True)
    q = torch.full_like(logs, share / logits.shape[1])
    q[torch.arange(len(labels)), labels] += 1 - share
    return -(q * logs).sum(1).mean()


def test_label_smoothing_is_cross_entropy_with_mixed_targets():
    run, closure, _ = script_run("classifier")
    _, model, data, rows = closure.args
    before = [p.detach().clone() for p in primary_parameters(model)]
    loss = CONTROLS["label-smoothing"].step(run, closure)["loss"]
    found = trained_gradients(run)
    assert any(not torch.equal(p, old) for p, old in zip(primary_parameters(model), before))
    run, closure, _ = script_run("classifier")
    model = closure.args[1]
    labels = torch.tensor([label for *_, label in rows])
    expected = smoothed_by_hand(train_glue.logits_of(model, data, rows).double(), labels, 0.3)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, g in trained_gradients(run).items():
        torch.testing.assert_close(found[name], g, rtol=1e-4, atol=1e-6)


def test_head_decay_is_adamws_on_the_head_alone():
    """Three steps, against torch's AdamW with two groups."""
    run, closure, head = script_run("classifier")
    for _ in range(3):
        CONTROLS["head-decay"].step(run, closure)
    other, closure, head2 = script_run("classifier")
    trained = [p for p in other.model.parameters() if p.requires_grad]
    rest = [p for p in trained if all(p is not q for q in head2.parameters())]
    groups = [{"params": rest, "weight_decay": 0.0},
              {"params": list(head2.parameters()), "weight_decay": 0.3}]
    adamw = torch.optim.AdamW(groups, lr=0.1)
    for _ in range(3):
        adamw.zero_grad()
        closure()
        adamw.step()
    for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def rows_closure(net, rows):
    """A closure as the scripts make it, over rows (x, y), in float64."""
    def forward_backward(args, model, data, batch):
        x, y = torch.stack([x for x, _ in batch]), torch.tensor([y for _, y in batch])
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss
    return partial(forward_backward, None, net, None, rows)


def sam_step_by_hand(net, eps_batch, batch, rho, lr):
    """[w - lr gradient at w + rho g / ||g||], g from eps_batch."""
    params = primary_parameters(net)
    g = gradient_at(net, eps_batch, params)
    size, old = norm(g), [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, d in zip(params, g):
            p.add_(rho / size * d)
    after = gradient_at(net, batch, params)
    with torch.no_grad():
        for p, w in zip(params, old):
            p.copy_(w)
    return [w - lr * d for w, d in zip(old, after)]


def pair(rows):
    return torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])


@pytest.fixture
def two_batches():
    torch.manual_seed(3)
    rows = [(torch.randn(6, dtype=torch.float64), i % 3) for i in range(16)]
    return rows[:8], rows[8:]


def test_eps_of_the_batch_before_at_the_weights_of_this_step(two_batches):
    net, (first, second) = adapted(), two_batches
    run = run_of(net, rho=0.5)
    for batch, other in ((first, first), (second, first)):
        expected = sam_step_by_hand(net, pair(other), pair(batch), 0.5, 0.1)
        CONTROLS["sam-other"].step(run, rows_closure(net, batch))
        assert_all_close(primary_parameters(net), expected)


def test_eps_of_every_other_row(two_batches):
    net, (batch, _) = adapted(), two_batches
    expected = sam_step_by_hand(net, pair(batch[::2]), pair(batch), 0.5, 0.1)
    CONTROLS["sam-half"].step(run_of(net, rho=0.5), rows_closure(net, batch))
    assert_all_close(primary_parameters(net), expected)


def test_noise_of_norm_rho(two_batches):
    """The gradient is taken at a point at the distance rho, and another one in the next step."""
    net, (rows, _) = adapted(), two_batches
    run, seen, params = run_of(net, rho=0.5, lr=0.0), [], primary_parameters(net)
    start, closure = [p.detach().clone() for p in params], rows_closure(net, rows)

    def watched(*args):
        seen.append([p.detach().clone() for p in params])
        return closure.func(*args)

    for _ in range(2):
        logged = CONTROLS["rwp-norm"].step(run, partial(watched, *closure.args))
        run.log.append(logged)
    eps = [[p - w for p, w in zip(point, start)] for point in seen]
    assert [norm(e) for e in eps] == pytest.approx([0.5, 0.5], rel=1e-6)
    cosine = sum((a * b).sum().item() for a, b in zip(*eps)) / 0.25
    assert abs(cosine) < 0.5
    assert_all_close(params, start)


# ------------------------------------------------------------------------------------- the plan

def test_every_row_and_contrast_of_the_plan_is_in_the_note():
    with open(os.path.join(os.path.dirname(study.__file__), "9_study.md"), encoding="utf-8") as f:
        note = f.read()
    for name in (*ROWS, *CELLS):
        assert f"`{name}`" in note, name
    for items in CONTRASTS.values():
        for cell, a, b in (part for item in items for part in item):
            assert {a, b} <= set(CELLS[cell].rows)
    for name, cell in CELLS.items():
        needed = [ROWS[row].like for row in cell.rows if ROWS[row].like]
        needed += study.tuned_rows(cell.rows)
        assert set(needed) <= set(CELLS[cell.tuned_on or name].rows), name


def test_the_cells_that_were_added_and_their_contrasts():
    """Of the demo with other n and other shares of wrong labels, written out."""
    rows = ("lora", "lora-sam", "bi-lora", "rwp-lora", "head-sam", "lora-rate", "lora-sam-rate")
    for name, n, noise in (("demo-500", 500, 0.3), ("demo-4000", 4000, 0.3),
                           ("demo-noise0", 2000, 0.0), ("demo-noise15", 2000, 0.15)):
        settings = study_plan.full_settings(CELLS[name])
        assert (settings["limit"], settings["label_noise"]) == (n, noise), name
        assert CELLS[name].rows == rows and CELLS[name].seeds == 20
        assert CELLS[name].tuned_on == "demo"
    rounded, exact = CELLS["mrpc"], CELLS["mrpc-float32"]
    assert rounded.settings["bf16"] and not exact.settings["bf16"]
    assert exact.settings | {"bf16": True} == rounded.settings
    assert exact == rounded._replace(rows=("lora", "lora-rate"), settings=exact.settings)
    assert study_plan.GAINS == ("lora-sam", "bi-lora", "rwp-lora", "head-sam")
    changes = [("demo", "demo-noise0"), ("demo-500", "demo-4000")]
    *on_demo, last = study_plan.NOT_PLANNED["not the plan's"]
    assert on_demo == [[(more, row, "lora"), (less, row, "lora")]
                       for row in rows[1:] for more, less in changes]
    assert last == [("mrpc", "lora-sam", "lora"), ("mrpc-float32", "lora-rate", "lora")]
    assert [item for [item] in study_plan.NOT_PLANNED["H2, not the plan's"]] == [
        ("demo", "bi-lora-100", "noise-fresh"), ("demo", "bi-lora-100", "noise-kept"),
        ("demo", "bi-lora-adamw", "noise-fresh-adamw"),
        ("demo", "bi-lora-adamw", "noise-kept-adamw"),
        ("sst2-1000", "bi-lora-adamw", "noise-fresh-adamw"),
        ("sst2-1000", "bi-lora-adamw", "noise-kept-adamw")]
    chosen = {"demo": {"bi-lora-adamw": {"setting": {"rho": 0.07, "ratio": 1}}}}
    found = [study_plan.setting_in("demo", row, chosen) for row in study_plan.BINDS]
    assert found == [{"rho": 0.05, "ratio": 100}, {"rho": 0.07}, {"rho": 0.07}]
    for key, cells in study_plan.CURVES.values():
        values = [study_plan.full_settings(CELLS[cell])[key] for cell in cells]
        assert len(cells) == 3 and values == sorted(values)
        others = {"limit", "label_noise"} - {key}
        assert len({study_plan.full_settings(CELLS[cell])[other]
                    for cell in cells for other in others}) == 1


def test_budgets():
    """Settings: three for all; radii and rates of plain Bi-LoRA, and where both are tuned."""
    counts = {row: len(study_plan.combinations(ROWS[row])) for row in study.tuned_rows(ALL)}
    assert counts.pop("bi-lora") == 12 and counts.pop("lora-sam-rate") == 9
    assert set(counts.values()) == {3}


def made_up_runs(row, scores):
    """{folder: {seed: kept}} with these scores on held, a list of three for each combination."""
    runs = {}
    for setting, values in zip(study_plan.combinations(row), scores, strict=True):
        name = study_plan.folder_name(row.method, setting)
        runs[name] = {str(seed): {"scores": {"held": [0.99, value]}}
                      for seed, value in zip((100, 101, 102), values)}
    return runs


def test_the_highest_mean_is_chosen_and_of_equal_ones_the_smaller_radius():
    row = ROWS["lora-sam"]
    runs = made_up_runs(row, [[0.5, 0.6, 0.7], [0.9, 0.6, 0.6], [0.9, 0.1, 0.1]])
    found = study.choose(row, runs)
    assert found["setting"] == {"rho": 0.05}
    assert found["means"]["lora-sam_rho-0.2"] == pytest.approx(1.1 / 3)
    runs = made_up_runs(row, [[0.1, 0.1, 0.1], [0.3, 0.2, 0.1], [0.1, 0.2, 0.3]])
    assert study.choose(row, runs)["setting"] == {"rho": 0.05}
    del runs["lora-sam_rho-0.2"]["102"]
    assert study.choose(row, runs) is None
    row = ROWS["bi-lora"]
    scores = [[0.1] * 3 for _ in range(12)]
    scores[6] = scores[9] = [0.2] * 3  # rho 0.05 with 100, rho 0.2 with 10
    assert study.choose(row, made_up_runs(row, scores))["setting"] == {"rho": 0.05, "ratio": 100}


def test_settings_follow_from_the_choices():
    chosen = {"demo": {"lora-sam": {"setting": {"rho": 0.2}}},
              "sst2-1000-noise30": {"lora-sam": {"setting": {"rho": 0.01}}}}
    found = study_plan.setting_in
    assert found("demo", "lora", chosen) == {} and found("demo", "s2sam", chosen) is None
    assert found("demo", "s2sam-same", chosen) == {"rho": 0.2}
    assert found("demo", "lora-sam-paper", chosen) == {"rho": 0.01}
    assert found("sst2-4000-noise30", "lora-sam", chosen) == {"rho": 0.01}
    assert found("demo", "bi-lora-paper", {}) == {"rho": 0.05, "ratio": 1}


# ------------------------------------------------------------------------------------- statistics

@pytest.mark.parametrize("level, df, expected", [  # two-sided; printed tables have three digits
    (0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 4, 2.776), (0.95, 9, 2.262), (0.95, 19, 2.093),
    (0.99, 9, 3.250), (0.99, 19, 2.861), (0.998, 9, 4.297), (0.5, 9, 0.703), (0.999, 4, 8.610),
    (0.95, 1000, 1.962)])
def test_quantiles_of_students_t(level, df, expected):
    assert study_tables.t_quantile(level, df) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("signs, expected", [
    ("+++++", (5, 5, 2 / 32)), ("++++-", (4, 5, 12 / 32)), ("+-", (1, 2, 1.0)),
    ("++++++++++", (10, 10, 2 / 1024)), ("+++++++++-", (9, 10, 22 / 1024)),
    ("--0", (0, 2, 0.5)), ("0", (0, 0, 1.0))])
def test_the_sign_test(signs, expected):
    values = [{"+": 0.3, "-": -0.2, "0": 0.0}[sign] for sign in signs]
    assert study_tables.sign_test(values) == pytest.approx(expected)


def test_an_interval_by_hand():
    values = [0.1, 0.3, 0.2, 0.6, 0.3]
    mean, half = study_tables.interval(values)
    assert mean == pytest.approx(np.mean(values))
    assert half == pytest.approx(2.7764 * np.std(values, ddof=1) / math.sqrt(5), rel=1e-4)
    assert study_tables.interval([0.25]) == (0.25, None)


@pytest.mark.parametrize("mean, half, words", [
    (0.05, 0.04, "positive"), (0.05, 0.06, "open"), (-0.05, 0.04, "negative"),
    (0.002, 0.007, "equal"), (0.005, 0.004, "positive, equal"), (0.004, 0.007, "open"),
    (-0.004, 0.007, "open"),
    (0.0, 0.0, "equal"), (0.3, None, "open")])
def test_verdicts(mean, half, words):
    assert study_tables.verdict(mean, half) == words


def test_a_table_of_made_up_runs():
    """Pairs by seed, leaves out other seeds, and picks LoRA's epoch on held."""
    def kept(*dev, held=(0.2, 0.1)):
        return {"scores": {"dev": list(dev), "held": list(held)}}

    lora = {"0": kept(0.7, 0.5), "1": kept(0.9, 0.6, held=(0.1, 0.3)), "100": kept(0.0, 0.0),
            "20": kept(0.0, 0.0)}
    sam = {"0": {"scores": {"dev": [0.8]}}, "1": {"scores": {"dev": [0.8]}},
           "2": {"scores": {"dev": [0.5]}, "diverged": "step 3"}}
    found = {"chosen": {"demo": {"lora-sam": {"setting": {"rho": 0.2}}}},
             "runs": {"demo": {"lora": lora, "lora-sam_rho-0.2": sam}}}
    text = study_tables.table(found, "demo", "dev")
    half = 12.7062 * np.std([0.3, 0.2], ddof=1) / math.sqrt(2)
    assert (f"| lora-sam (n = 3) | rho 0.2 | 0.7000 | 0.1732 | +0.2500 ± {half:.4f} | 2 of 2, 0.5 |"
            in text)  # LoRA has two
    assert "| lora |  | 0.5500 | 0.0707 |  |  |" in text
    assert "| lora, epoch chosen on held |  | 0.6500 |" in text  # 0.7 and 0.6
    assert "| lora, best epoch |  | 0.8000 |" in text
    assert "2 comparisons; 1 runs diverged" in text and "s2sam" not in text
    half = 12.7062 * np.std([0.1, 0.2], ddof=1) / math.sqrt(2)
    assert f"lora-sam minus lora, epoch chosen on held: +0.1500 ± {half:.4f}, not in the" in text
    half = 12.7062 * np.std([0.8 - 0.7, 0.8 - 0.9], ddof=1) / math.sqrt(2)
    assert re.search(rf"lora-sam minus lora, best epoch: [+-]0.0000 ± {half:.4f}, not in", text)
    assert study_tables.table(found, "sst2-1000", "dev") == ""
    others = {"chosen": {"sst2-1000": found["chosen"]["demo"]},  # no rows to choose an epoch on
              "runs": {"mrpc": {"lora": lora, "lora-sam_rho-0.2": sam}}}
    text = study_tables.table(others, "mrpc", "dev")
    assert "| lora-sam (n = 3) | rho 0.2 |" in text and "chosen on held" not in text
    assert "| lora, best epoch |  | 0.8000 |" in text
    marks = "<!-- study: mrpc * -->\n<!-- end -->\n"
    names = [line.split("`")[1] for line in study_tables.filled(marks, others).splitlines()[3:-1]]
    assert names == ["lora", "lora-sam", "lora, best epoch"]
    one = {**found, "runs": {"demo": {"lora": lora, "lora-sam_rho-0.2": {"0": sam["0"]}}}}
    assert "not in the plan" not in study_tables.table(one, "demo", "dev")
    assert "| H3 | demo: lora-sam - lora | 2 | +0.2500 ±" in study_tables.contrasts(found)


def test_a_table_compares_tuned_rates():
    def runs(*scores):
        return {str(i): {"scores": {"dev": [x], "held": [x]}} for i, x in enumerate(scores)}

    found = {"chosen": {"demo": {"lora-sam": {"setting": {"rho": 0.2}},
                                 "lora-rate": {"setting": {"rate": 0.3}},
                                 "lora-sam-rate": {"setting": {"rho": 0.05, "rate": 0.3}}}},
             "runs": {"demo": {"lora": runs(0.5, 0.5), "lora-sam_rho-0.2": runs(0.8, 0.9),
                               "lora_rate-0.3": runs(0.6, 0.5),
                               "lora-sam_rho-0.05_rate-0.3": runs(0.6, 0.6)}}}
    text, half = study_tables.table(found, "demo", "dev"), 12.7062 * 0.05  # half of 0.1 apart
    assert f"lora-sam minus lora-rate: +0.3000 ± {2 * half:.4f}, not in the plan" in text
    assert f"lora-sam-rate minus lora-rate: +0.0500 ± {half:.4f}, not in the plan" in text


def test_a_change_of_gain_is_paired_by_seed():
    def runs(lora, sam):
        return {"lora": {str(i): {"scores": {"rest": [x]}} for i, x in enumerate(lora)},
                "lora-sam_rho-0.2": {str(i): {"scores": {"rest": [x]}} for i, x in enumerate(sam)}}

    cells = ("sst2-1000-noise30", "sst2-1000")
    found = {"chosen": {cell: {"lora-sam": {"setting": {"rho": 0.2}}} for cell in cells},
             "runs": dict(zip(cells, (runs([0.5, 0.6, 0.7], [0.7, 0.7, 0.9]),
                                      runs([0.9, 0.8], [0.9, 0.9]))))}
    changes = [0.2 - 0.0, 0.1 - 0.1]  # the third seed has no partner
    (line,) = (line for line in study_tables.contrasts(found).splitlines()
               if line.startswith("| H4 | sst2-1000-noise30: lora-sam"))
    assert f"| 2 | {np.mean(changes):+.4f} ±" in line


def test_the_tables_of_the_notes_are_those_of_the_record():
    with open(os.path.join(study.FIGURES, "study.json")) as file:
        record, marks = json.load(file), 0
    for path in study.PAGES:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        assert study_tables.filled(text, record) == text, f"{path}: run python notes/study.py table"
        marks += len(study_tables.MARK.findall(text))
    assert marks >= 2
    with open(os.path.join(study.FIGURES, "study.md"), encoding="utf-8") as file:
        assert file.read() == study_tables.all_tables(record), "run python notes/study.py table"
    assert study_tables.whole_cells(record) == ["demo", "sst2-1000-noise30", "sst2-1000"]


def test_a_table_of_a_note_by_hand():
    def runs(part, *scores, **more):
        return {str(i): {"scores": {part: [x], "held": [x]}, **more} for i, x in enumerate(scores)}

    found = {"chosen": {}, "runs": {}}
    for cell, part in (("demo", "dev"), ("sst2-1000", "rest")):
        found["runs"][cell] = {"lora": runs(part, 0.5, 0.6, 0.7, rise=0.25),
                               "lora-sam_rho-0.01": runs(part, 0.6, 0.6, 0.9, rise=0.125)}
    half = 4.3027 * np.std([0.1, 0.0, 0.2], ddof=1) / math.sqrt(3)
    marks = "<!-- study: demo lora,lora-sam-paper -->\nold\n<!-- end -->\n"
    assert study_tables.filled("a\n" + marks + "b\n", found).splitlines()[4:6] == [
        "| `lora` |  | 0.600 |  |  | 0.250 |",
        f"| `lora-sam-paper` | rho 0.01 | 0.700 | +0.100 ± {half:.3f} | 2 of 2 | 0.125 |"]
    marks = marks.replace("demo", "demo,sst2-1000")
    assert study_tables.filled(marks, found).splitlines()[1:-1] == [
        "|  | demo, 20 seeds | sst2-1000, 10 seeds |", "| --- | --- | --- |",
        "| `lora` | 0.600 | 0.600 |",
        f"| `lora-sam-paper` | +0.100 ± {half:.3f} | +0.100 ± {half:.3f} |"]
    own = found["runs"]["demo"]["lora-sam_rho-0.01"]  # one seed has no interval, a lost run no rise
    del own["1"], own["2"], own["0"]["rise"]
    found["runs"]["demo"]["lora"]["2"]["rise"] = None  # as of word problems
    assert study_tables.filled(marks, found).splitlines()[4] == (
        f"| `lora-sam-paper` |  | +0.100 ± {half:.3f} |")
    assert study_tables.filled(marks.replace(",sst2-1000", ""), found).splitlines()[4] == (
        "| `lora-sam-paper` (n = 1) | rho 0.01 | 0.600 |  | 1 of 1 |  |")


def test_a_table_of_ranks_by_hand():
    def runs(*scores):
        return {str(i): {"scores": {"dev": [x]}} for i, x in enumerate(scores)}

    found = {"chosen": {"demo": {"lora-sam": {"setting": {"rho": 0.2}}}}, "runs": {
        "demo": {"lora": runs(0.5, 0.7), "lora-sam_rho-0.2": runs(0.7, 0.8)},
        "demo-r2": {"lora": runs(0.8, 0.9), "lora-sam_rho-0.2": runs(0.7, 0.9)},
        "demo-aux4": {"lora": runs(0.5, 0.7)}}}
    half = 12.7062 * 0.05  # of two values that are 0.1 apart
    marks = "<!-- study: ranks lora-sam -->\n<!-- end -->\n"
    assert study_tables.filled(marks, found).splitlines()[1:-1] == [
        "| cell | `lora` | minus `demo`'s | `lora-sam` | spread |",
        "| --- | --- | --- | --- | --- |",
        f"| `demo-r2` | 0.850 | +0.250 ± {half:.3f} | -0.050 ± {half:.3f} | 0.071, 0.141 |",
        f"| `demo` | 0.600 |  | +0.150 ± {half:.3f} | 0.141, 0.071 |",
        "| `demo-aux4` | 0.600 | +0.000 ± 0.000 |  | 0.141 |"]


def test_a_table_of_radius_and_rate_by_hand():
    means = {"lora_rate-0.3": 0.61, "lora_rate-1": 0.6}
    both = {"lora-sam_rho-0.05_rate-0.1": 0.5, "lora-sam_rho-0.2_rate-1": 0.7}
    found = {"runs": {}, "chosen": {"demo": {"lora-rate": {"means": means},
                                             "lora-sam-rate": {"means": both}}}}
    marks = "<!-- study: demo grid -->\n<!-- end -->\n"
    assert study_tables.filled(marks, found).splitlines()[1:-1] == [
        "| cell | radius | rate 0.1 | rate 0.3 | rate 1 |", "| --- | --- | --- | --- | --- |",
        "| `demo` | 0 (LoRA) |  | 0.610 | 0.600 |", "| `demo` | 0.01 |  |  |  |",
        "| `demo` | 0.05 | 0.500 |  |  |", "| `demo` | 0.2 |  |  | 0.700 |"]


def test_how_gains_change_on_the_demo_by_hand():
    """Within a seed: the gain with wrong labels less that without, and with few rows less that with
    many."""
    def runs(lora, lora_sam):
        return {name: {str(i): {"scores": {"dev": [x]}} for i, x in enumerate(values)}
                for name, values in (("lora", lora), ("lora-sam_rho-0.2", lora_sam))}

    found = {"chosen": {"demo": {"lora-sam": {"setting": {"rho": 0.2}}}}, "runs": {
        "demo": runs((0.5, 0.5), (0.8, 0.9)), "demo-noise0": runs((0.7, 0.8), (0.8, 0.9)),
        "demo-500": runs((0.4, 0.4), (0.4, 0.5)), "demo-4000": runs((0.6, 0.7), (0.8, 0.8))}}
    lines = study_tables.contrasts(found).splitlines()
    for more, less, mean, error in (("demo", "demo-noise0", 0.25, 0.05),  # changes of 0.2 and 0.3
                                    ("demo-500", "demo-4000", -0.1, 0.1)):  # of -0.2 and 0
        name, half = f"{more}: lora-sam - lora; less {less}: lora-sam - lora", 12.7062 * error
        (line,) = (line for line in lines if f"| {name} |" in line)
        assert line.startswith(f"| not the plan's | {name} | 2 | {mean:+.4f} ± {half:.4f} |")


def test_a_table_of_word_problems_has_the_gold_answers_loss_and_the_exact_matches():
    def runs(*pairs):
        return {str(i): {"scores": {"gold": [loss], "test": [share]}, "rise": None}
                for i, (loss, share) in enumerate(pairs)}

    found = {"chosen": {}, "runs": {"gsm8k": {
        "lora": runs((0.8, 0.25), (0.6, 0.5)), "lora-sam_rho-0.01": runs((0.7, 0.5), (0.4, 0.75))}}}
    half = 12.7062 * np.std([-0.1, -0.2], ddof=1) / math.sqrt(2)
    marks = "<!-- study: gsm8k * -->\n<!-- end -->\n"
    assert study_tables.filled(marks, found).splitlines()[1:-1] == [
        "| row | setting | gold loss | minus LoRA's | higher | exact match |",
        "| --- | --- | --- | --- | --- | --- |", "| `lora` |  | 0.7000 |  |  | 0.375 |",
        f"| `lora-sam-paper` | rho 0.01 | 0.5500 | -0.1500 ± {half:.4f} | 0 of 2 | 0.625 |"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn = []

    class Noted(study_tables.Figure):
        def __init__(self, **settings):
            super().__init__(**settings)
            drawn.append(self)

    monkeypatch.setattr(study_tables, "Figure", Noted)
    return drawn


def test_the_picture_of_the_fit_by_hand(folder, figures):
    """Means over the tuning seeds of each setting that has all three, under its method."""
    def runs(*pairs):
        return {str(100 + i): {"loss": [0.9, loss], "scores": {"held": [0.1, score]}}
                for i, (loss, score) in enumerate(pairs)}

    three = runs((0.1, 0.5), (0.2, 0.6), (0.3, 0.7))
    found = {"chosen": {}, "runs": {"demo": {
        "lora_rate-0.1": three, "lora-sam_rho-0.01": runs((0.4, 0.5), (0.4, 0.5), (0.7, 0.8)),
        "bi-lora-power_rho-0.2": three, "bi-lora_rho-0.2_ratio-1": runs((0.1, 0.5), (0.2, 0.6)),
        "label-smoothing_rho-0.1": {**three, "101": {"diverged": "", "scores": {"held": [0.5]}}},
        "lora": {"0": {"loss": [0.9], "scores": {"held": [0.9]}}}}}}
    study_tables.draw_fit({"chosen": {}, "runs": {}}, "fit.png")
    assert not figures and not list(folder.iterdir())
    found["runs"]["sst2-1000"] = {"lora_rate-0.3": runs(*[(0.25, 0.75)] * 3)}
    study_tables.draw_fit(found, "fit.png")
    axis, other = figures[0].axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert drawn.pop("lora") == drawn.pop("others") == [pytest.approx([0.2, 0.6])]
    assert drawn.pop("lora-sam") == [pytest.approx([0.5, 0.6])]
    assert drawn.pop("bi-lora") == drawn.pop("label-smoothing") == []
    ((_, line),) = drawn.items()  # the entropy of 30 % wrong labels
    assert line[0][0] == pytest.approx(-0.3 * np.log(0.3) - 0.7 * np.log(0.7))
    points = [line for line in other.lines if len(line.get_xdata())]  # and no line without noise
    assert [line.get_xydata().tolist() for line in points] == [[[0.25, 0.75]]]
    assert points[0].get_label() == "lora" and points[0].get_marker() == "D"
    assert [a.get_title() for a in (axis, other)] == ["demo", "sst2-1000"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("training loss of the last epoch",
                                                      "accuracy on held")
    assert (folder / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_how_the_rise_orders_the_scores_by_hand():
    """Rows that share their runs count once, those without all seeds or a rise not at all."""
    def runs(rise, score, seeds=(0, 1)):
        return {str(i): {"rise": rise, "scores": {"dev": [score + i]}} for i in seeds}

    found = {"chosen": {"demo": {}}, "runs": {"demo": {"lora": runs(0, 0.5)}}}
    rows = [row for row in ALL if not ROWS[row].like]
    assert "Rank" not in study_tables.table(found, "demo", "dev")
    for i, row in enumerate(rows):
        setting = study_plan.combinations(ROWS[row])[0]
        found["chosen"]["demo"][row] = {"setting": setting, "means": {}}
        score = 0.5 + 0.01 * (i - 1.5 * (row == rows[-1]))  # the last two change places
        found["runs"]["demo"][study_plan.folder_name(ROWS[row].method, setting)] = runs(i, score)
    found["runs"]["demo"]["head-decay_rho-1"] = runs(9, -9, (0,))
    found["runs"]["demo"]["head-sam_rho-0.03"]["0"]["rise"] = None
    n = len(rows) - 3  # both rows of LoRA-SAM have one setting here, and S2SAM's
    rho = 1 - 6 * 2 / (n * (n * n - 1))  # two ranks differ, by 1 each
    wanted = f"Rank correlation of rise and score over {n} rows: {rho:+.2f}, not in the plan."
    assert wanted in study_tables.table(found, "demo", "dev")
    del found["runs"]["demo"]["lora"]  # before LoRA has run
    assert study_tables.table(found, "demo", "dev")


def record_with_gains():
    """A record, and half of the interval of the gain of LoRA-SAM, 0.2, in both of its cells."""
    found, scores = {"chosen": {}, "runs": {}}, {"lora": (0.5, 0.6, 0.5),
                                                 "lora-sam_rho-0.01": (0.6, 0.9, 0.7)}
    for cell, part in (("demo", "dev"), ("sst2-1000-noise30", "rest")):
        found["runs"][cell] = {name: {str(i): {"scores": {part: [x], "held": [x]}}
                                      for i, x in enumerate(values)}
                               for name, values in scores.items()}
    return found, 4.3027 * np.std([0.1, 0.3, 0.2], ddof=1) / math.sqrt(3)


def test_the_figures_show_the_gains(folder, figures, ticks):
    """Mean and half of the interval of each row in each cell that was run."""
    found, half = record_with_gains()
    study_tables.draw_curves(found, "curves.png")
    assert not figures and not list(folder.iterdir())
    study_tables.draw_gains(found, "gains.png")
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == ["demo", "sst2-1000-noise30"]
    place = list(ALL).index("lora-sam-paper") - 1
    for axis in axes:
        bar, stopped = axis.containers
        assert stopped.lines[0].get_xdata() == [0.0]  # LoRA with one epoch, minus itself
        point, _, (lines,) = bar.lines
        assert point.get_xydata() == pytest.approx(np.array([[0.2, place]]))
        assert lines.get_segments()[0][:, 0] == pytest.approx([0.2 - half, 0.2 + half], rel=1e-4)
    assert axes[0].get_yticklabels()[place].get_text() == "lora-sam-paper"
    assert (folder / "gains.png").read_bytes().startswith(b"\x89PNG")


def test_the_curves_show_the_gains(folder, figures, ticks):
    """A panel for each curve of two cells, a line and a colour for each row."""
    found, half = record_with_gains()
    found["runs"]["sst2-1000"] = found["runs"]["sst2-1000-noise30"]
    study_tables.draw_curves(found, "curves.png")
    found["chosen"]["demo"] = {"lora-sam": {"setting": {"rho": 0.2}}}
    found["runs"]["demo-4000"] = demo = found["runs"]["demo"]
    demo["lora-sam_rho-0.2"] = demo.pop("lora-sam_rho-0.01")
    study_tables.draw_curves(found, "curves.png")
    titles = "SST-2, 1,000 rows", "demo, 30 % wrong"
    for figure, wanted, xs in ((figures[0], titles[:1], [[0.0, 0.3]]),
                               (figures[1], titles, [[0.0, 0.3], [2000, 4000]])):
        assert tuple(axis.get_title() for axis in figure.axes) == wanted
        for axis, x in zip(figure.axes, xs):
            (bar,) = axis.containers
            assert list(bar.lines[0].get_xdata()) == list(axis.get_xticks()) == x
            assert bar.lines[0].get_ydata() == pytest.approx([0.2, 0.2])
            (segments,) = (lines.get_segments() for lines in bar.lines[2])
            assert segments[1][:, 1] == pytest.approx([0.2 - half, 0.2 + half], rel=1e-4)
    shares, rows = figures[1].axes
    assert (shares.get_xscale(), shares.get_xlabel()) == ("linear", "share of wrong labels")
    assert (rows.get_xscale(), rows.get_xlabel()) == ("log", "training rows")
    assert [label.get_text() for label in rows.get_xticklabels()] == ["2,000", "4,000"]
    colours = [axis.containers[0].lines[0].get_color() for axis in (shares, rows)]
    (legend,) = figures[1].legends
    assert [text.get_text() for text in legend.get_texts()] == ["lora-sam-paper", "lora-sam"]
    assert colours[0] != colours[1]
    for handle, colour in zip(legend.legend_handles, colours, strict=True):
        assert same_color(handle.get_color(), colour)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_record_grows_by_what_another_machine_has_run(folder):
    """Seeds, settings and choices of two folders, one after the other; nothing is lost."""
    def run(out, path, score):
        place = folder / out / "demo" / path
        place.mkdir(parents=True)
        (place / "study.json").write_text(json.dumps({"scores": {"dev": [score]}}))

    run("one", "lora/lora-seed0", 0.5)
    run("two", "lora/lora-seed1", 0.6)
    run("two", "s2sam_rho-0.05/s2sam-seed0", 0.7)
    for out, row in (("one", "lora-sam"), ("two", "s2sam")):
        choice = {row: {"setting": {"rho": 0.05}}}
        (folder / out / "demo/chosen.json").write_text(json.dumps(choice))
        study.main(["table", "--out", out, "--figures", "figures"])
    record = json.loads((folder / "figures/study.json").read_text())
    assert record["chosen"]["demo"].keys() == {"lora-sam", "s2sam"}
    found = {name: {seed: kept["scores"]["dev"][0] for seed, kept in runs.items()}
             for name, runs in record["runs"]["demo"].items()}
    assert found == {"lora": {"0": 0.5, "1": 0.6}, "s2sam_rho-0.05": {"0": 0.7}}


# ------------------------------------------------------------------------------------- runs of it

def kept_in(folder, path):
    return json.loads((folder / path / "study.json").read_text())


def scores_are_the_scripts(lora):
    """A run of train_glue.py on the cell's files has the scores of the study's run of seed 1."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    report = train_glue.main([*words, "--data", "out/data/demo", "--method", "lora", "--seeds", "1",
                              *QUICK, "--out", "single"])
    (result,) = report["results"]
    assert [row["accuracy"] for row in result["epochs"]] == pytest.approx(lora["scores"]["dev"])


def table_of(capsys, out):
    study.main(["table", "--out", out, "--figures", "figures"])
    return capsys.readouterr().out


def test_tune_run_and_table(folder, monkeypatch, capsys):
    """A small cell from end to end; LoRA's runs are the script's own."""
    CELLS["demo"] = TINY
    argv = ["demo", *QUICK, "--row", "lora-sam", "rwp-norm", "lora", "--out", "out",
            "--figures", "figures"]
    assert "lora-sam: no choice; run `tune demo` first" in error_of(
        capsys, ["run", *argv], study.main)
    study.main(["tune", *argv])
    chosen = json.loads((folder / "out/demo/chosen.json").read_text())
    means = chosen["lora-sam"]["means"]
    assert chosen.keys() == {"lora-sam"} and len(means) == 3
    radius = chosen["lora-sam"]["setting"]["rho"]
    assert means[f"lora-sam_rho-{radius}"] == max(means.values())
    tuned = kept_in(folder, f"out/demo/lora-sam_rho-{radius}/lora-sam-seed101")
    assert tuned["scores"].keys() == {"held"}  # it has not seen the reported rows

    calls, train = [], train_glue.train

    def counted(args, method, seed, *more):
        calls.append((method, seed))
        return train(args, method, seed, *more)

    monkeypatch.setattr(train_glue, "train", counted)
    study.main(["run", *argv])
    assert sorted(calls) == [(method, seed) for method in ("lora", "lora-sam", "rwp-norm")
                             for seed in (0, 1)]
    study.main(["run", *argv])
    assert len(calls) == 6  # finished runs are taken as they are
    (folder / "out/demo/lora/lora-seed1/study.json").unlink()
    again = folder / "out/demo/lora/lora-seed1/metrics.json"
    before = again.read_bytes()
    study.main(["run", *argv])
    assert len(calls) == 6 and again.read_bytes() == before
    lora = kept_in(folder, "out/demo/lora/lora-seed1")
    assert {name: len(values) for name, values in lora["scores"].items()} == {
        "dev": 2, "rest": 2, "held": 2}
    sam = kept_in(folder, f"out/demo/lora-sam_rho-{radius}/lora-sam-seed1")
    assert {name: len(values) for name, values in sam["scores"].items()} == {"dev": 1, "rest": 1}
    assert sam["perturbation"] == pytest.approx(radius) and lora["perturbation"] == 0

    scores_are_the_scripts(lora)
    capsys.readouterr()
    printed = table_of(capsys, "out")
    assert f"| rwp-norm | rho {radius} |" in printed and "## demo, rest" in printed
    assert (folder / "figures/study.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "figures/study.json").read_text())
    assert record["chosen"]["demo"] == chosen
    assert table_of(capsys, "empty") == printed  # from the record alone


def test_a_setting_is_any_option_of_the_scripts(folder, capsys):
    CELLS["demo"] = TINY
    study_plan.install()
    options = SimpleNamespace(model=None, data=None, out="out", device="cpu", jobs=1)
    args = study.arguments("demo", "bi-lora-power", options, {"rho": 0.1234, "momentum": 0.7512345})
    assert args.momentum == 0.7512345 and args.rho == [0.1234]
    args = study.arguments("demo", "bi-lora", options, {"ratio": 10, "ascent": "adamw"})
    assert args.aux_lr == pytest.approx(10 * args.lr) and args.ascent == "adamw"
    own = args.lr
    args = study.arguments("demo", "lora", options, {"rate": 0.3})
    assert args.lr == pytest.approx(0.3 * own) and args.out.endswith("demo/lora_rate-0.3")
    with pytest.raises(SystemExit):
        study.arguments("demo", "lora", options, {"radius": 1})
    assert "unrecognized arguments: --radius 1" in capsys.readouterr().err


def test_runs_of_the_record_are_not_made_again(folder, monkeypatch):
    """With --recorded; what is missing is made, and without the option all."""
    CELLS["demo"], calls, train = TINY._replace(seeds=3), [], train_glue.train

    def counted(args, method, seed, *more):
        calls.append((method, seed))
        return train(args, method, seed, *more)

    monkeypatch.setattr(train_glue, "train", counted)
    argv = ["demo", *QUICK, "--row", "lora-sam", "lora", "--figures", "figures"]
    study.main(["run", "demo", *QUICK, "--row", "lora", "--seeds", "1", "--out", "one"])
    study.main(["tune", *argv, "--out", "one"])
    study.main(["table", "--out", "one", "--figures", "figures"])
    chosen = (folder / "one/demo/chosen.json").read_bytes()
    calls.clear()
    study.main(["tune", *argv, "--out", "two", "--recorded"])
    assert not calls and (folder / "two/demo/chosen.json").read_bytes() == chosen
    study.main(["run", *argv, "--out", "two", "--recorded"])
    assert sorted(calls) == [("lora", 0), ("lora", 2), *(("lora-sam", seed) for seed in range(3))]
    study.main(["run", *argv, "--out", "two"])
    assert calls[5:] == [("lora", 1)]


def test_the_laboratory_measures_rows_under_their_names(folder):
    """Two settings of one method side by side, a snapshot an epoch; the record is untouched."""
    CELLS["demo"] = TINY
    for out in ("out/demo", "figures"):
        os.makedirs(out)
    chosen = {"bi-lora": {"setting": {"rho": 0.2, "ratio": 1000}}}
    (folder / "out/demo/chosen.json").write_text(json.dumps(chosen))
    study.main(["lab", "demo", *QUICK, "--seeds", "0", "--row", "lora", "bi-lora-paper", "bi-lora",
                "--out", "out", "--figures", "figures", "--", "--parts", "d", "--rows", "8"])
    report = json.loads((folder / "figures/study-demo-sharpness.json").read_text())
    found = {row: runs["0"] for row, runs in report["measured"]["d"].items()}
    assert [*found] == ["lora", "bi-lora-paper", "bi-lora"] and found["lora"]["step"] == [0, 2, 4]
    assert found["bi-lora"]["rank"] != found["bi-lora-paper"]["rank"]
    assert report["settings"]["d"] == {"seed": 0}
    assert study.finished("out", "demo") == {} and not (folder / "figures/study.json").exists()


def test_the_rest_is_scored_by_the_adapter_that_was_saved(folder, monkeypatch):
    """As the script scores it in its last epoch, where it is an evaluation set of every epoch."""
    CELLS["demo"] = TINY._replace(settings={**SMALL, "lr": 0.02})
    argv = ["run", "demo", *QUICK, "--row", "bi-lora-paper", "--seeds", "0", "1"]
    study.main([*argv, "--out", "after"])
    monkeypatch.setattr(study, "scored_sets", lambda data, setting, seed: (data.sets, []))
    study.main([*argv, "--out", "within"])
    last = {}
    for out in ("after", "within"):
        runs = study.finished(out, "demo")["bi-lora_rho-0.05_ratio-1"]
        last[out] = [runs[seed]["scores"]["rest"][-1] for seed in ("0", "1")]
    assert last["after"] == last["within"]
    base = [kept["scores"]["rest"][0] for kept in runs.values()]
    assert len(set([*last["after"], *base])) > 1  # it moves at all


def test_the_row_lora_alone_is_scored_in_every_epoch():
    data = SimpleNamespace(sets={"dev": [1], "rest": [2, 3], "held": [4] * 200})
    assert study.scored_sets(data, "lora", 0) == (data.sets, [])
    probe = {"probe": data.sets["held"][:study.PROBE]}
    for setting in ("lora_rate-0.3", "lora-sam_rho-0.2"):
        assert study.scored_sets(data, setting, 0) == (probe, ["dev", "rest"])
        assert study.scored_sets(data, setting, 100) == (probe, ["held"])


def test_a_run_that_diverges_counts_as_the_most_frequent_label(folder, monkeypatch):
    CELLS["demo"] = TINY
    calls = []

    def diverging(*args):
        calls.append(args)
        raise FloatingPointError("LoRA, step 2: the loss is nan")

    monkeypatch.setattr(train_glue, "train", diverging)
    argv = ["run", "demo", *QUICK, "--row", "lora", "--seeds", "0", "--out", "out"]
    study.main(argv)
    kept = kept_in(folder, "out/demo/lora/lora-seed0")
    assert kept["diverged"] == "LoRA, step 2: the loss is nan"
    labels = collections.Counter(label for _, label in read_tsv(
        TASKS["demo"], "out/data/demo/train.tsv"))
    most = labels.most_common(1)[0][0]
    dev = [label for _, label in read_tsv(TASKS["demo"], "out/data/demo/dev.tsv")]
    assert kept["scores"]["dev"] == pytest.approx([dev.count(most) / len(dev)])
    study.main(argv)
    assert len(calls) == 1


def test_processes_see_cells_and_controls(folder, monkeypatch):
    """A new process imports the tables anew, and has to find cell and control there."""
    rows = "".join(f"demo\t{i % 2}\t\tthese {i} teachers\n" for i in range(130))
    (folder / "CoLA").mkdir()
    (folder / "CoLA/train.tsv").write_text(rows)
    (folder / "CoLA/dev.tsv").write_text("demo\t1\t\tships\ndemo\t0\t\tmany doors\n")
    monkeypatch.setitem(CELLS["cola-2000"].parts, "held", 100)
    monkeypatch.setitem(CELLS["cola-2000"].parts, "rest", 20)
    monkeypatch.setitem(CELLS["cola-2000"].settings, "limit", 8)
    monkeypatch.setitem(CELLS["cola-2000"].settings, "epochs", 1)
    (folder / "out/cola-2000").mkdir(parents=True)
    chosen = json.dumps({"label-smoothing": {"setting": {"rho": 0.2}}})
    (folder / "out/cola-2000/chosen.json").write_text(chosen)
    study.main(["run", "cola-2000", "--model", TASKS["demo"].settings["model"], "--data",
                str(folder), "--device", "cpu", "--jobs", "2", "--row", "label-smoothing",
                "--seeds", "0", "--out", "out"])
    path = "out/cola-2000/label-smoothing_rho-0.2/label-smoothing-seed0"
    assert kept_in(folder, path)["scores"].keys() == {"dev", "rest"}


def test_gsm8k_is_answered_and_its_gold_answers_have_a_loss(folder, monkeypatch):
    demo = train_gsm8k.TASKS["demo"]
    CELLS["gsm8k"] = CELLS["gsm8k"]._replace(settings={
        "limit": 8, "epochs": 1, "eval_limit": 9, "max_new_tokens": 3, "bf16": False, "lr": 6e-3,
        "batch_size": 8})
    monkeypatch.setattr(study, "GENERATED", 2)
    study.main(["run", "gsm8k", *QUICK, "--model", demo["model"], "--data", demo["data"], "--row",
                "lora", "--seeds", "0", "--out", "out"])
    path = folder / "out/gsm8k/lora/lora-seed0"
    assert len((path / "predictions.jsonl").read_text().splitlines()) == 2
    kept = kept_in(folder, "out/gsm8k/lora/lora-seed0")
    options = SimpleNamespace(model=demo["model"], out="out", device="cpu", jobs=1,
                              data=demo["data"])
    args = study.arguments("gsm8k", "lora", options, {})
    data = study.load(args)
    model, total, tokens = study.adapted(train_gsm8k, args, data, str(path)), 0.0, 0
    for prompt, answer, _ in data.sets["test"]:
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]
        total += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        tokens += len(answer)
    assert len(data.sets["test"]) == 9
    assert kept["scores"]["gold"] == pytest.approx([total / tokens], rel=1e-4)


@pytest.mark.parametrize("argv, message", [
    (["run"], "run needs a cell"), (["run", "demo", "--seeds", "100"], "higher ones are for tun"),
    (["run", "mrpc", "--row", "s2sam"], "s2sam is no row of mrpc"),
    (["tune", "mrpc"], "mrpc takes the choices of sst2-1000"),
    (["tune", "sst2-1000", "--row", "lora-sam", "--data", "none"], "none"),
    (["run", "elsewhere"], "elsewhere")])
def test_wrong_input_is_one_line_and_exit_code_2(folder, capsys, argv, message):
    assert message in error_of(capsys, argv, study.main)
    assert not list(folder.iterdir())

"""H5's measurement (notes/study_flat.py), what notes/study_tables.py says of each hypothesis, and
the cells of other ranks.

Oracles: rank correlations worked out by hand; the loss by the adapter that a run leaves; made-up
records whose answer follows from notes/9_study.md.
"""

import json
import os

import pytest
import torch
import torch.nn.functional as F

import test_study
import train_glue
from bilora import lora_layers
from test_study import QUICK, TINY, study, study_plan, study_tables
from test_train_glue import error_of
from train_glue import METHODS

import study_flat  # in notes, where test_study.py looks
from measures import loss_of
from study_plan import CELLS, CONTRASTS, NOISY, ROWS

folder = test_study.folder  # the fixture


# -------------------------------------------------------------------------------------- statistics

@pytest.mark.parametrize("x, y, expected", [
    ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 1 - 6 * 4 / (5 * 24)),  # 1 - 6 sum d^2 / (n (n^2 - 1))
    ([10.0, 0.1, 3.0], [0.7, 0.9, 0.8], -1.0), ([3, 2, 1], [0.5, 0.5, 0.7], -0.75 ** 0.5),
    ([1, 2, 3, 4], [0.5, 0.7, 0.7, 0.9], 0.9 ** 0.5), ([1, 2, 3], [0.5, 0.5, 0.5], 0.0)])
def test_spearmans_correlation_by_hand(x, y, expected):
    assert study_tables.spearman(x, y) == pytest.approx(expected)


@pytest.mark.parametrize("level, epoch", [(0.8, 2), (0.6, 3), (0.3, 4), (0.1, 4)])
def test_the_first_epoch_below_a_level_or_the_last(level, epoch):
    assert study_flat.epoch_below([0.9, 0.6, 0.4, 0.3], level) == epoch


# ------------------------------------------------------------------------------------- measurement

def test_the_eigenvalue_is_taken_where_all_fit_alike(folder, monkeypatch):
    """At the weights of the epoch that the rule names, of all adapted W; the losses are those of
    the saved adapter on the rows and labels of training."""
    CELLS["demo"] = TINY._replace(settings={**TINY.settings, "lr": 0.02, "epochs": 3})
    os.makedirs("out/demo")
    choices = {"lora-sam": {"rho": 0.2}, "bi-lora": {"rho": 0.05, "ratio": 1},
               "rwp-lora": {"rho": 0.05}, "head-sam": {"rho": 0.3}}
    chosen = {row: {"setting": setting} for row, setting in choices.items()}
    (folder / "out/demo/chosen.json").write_text(json.dumps(chosen))
    seen, layers, measured = [], [], study_flat.top_eigenvalue

    def watched(losses, weights, *more):
        (model,) = {loss.func.__self__.model for loss in losses}
        layers.append([layer.weight is w for layer, w in zip(lora_layers(model), weights,
                                                             strict=True)])
        seen.append(loss_of(losses))
        return measured(losses, weights, *more)

    monkeypatch.setattr(study_flat, "top_eigenvalue", watched)
    argv = ["flat", "demo", *QUICK, "--seeds", "0", "--out", "out", "--figures", "figures"]
    study.main(argv)
    found = json.loads((folder / "out/flat/demo/flat.json").read_text())["0"]
    assert tuple(found) == study_plan.FLAT and all(map(all, layers))
    assert seen == pytest.approx([run["loss"] for run in found.values()], rel=1e-5)
    level = max(run["losses"][-1] for run in found.values())
    for run in found.values():
        assert run["loss"] == run["losses"][run["epoch"] - 1] <= level
        assert all(loss >= level for loss in run["losses"][:run["epoch"] - 1])
    assert len({run["epoch"] for run in found.values()}) > 1
    assert saved_loss("out/flat/demo/lora/lora-seed0") == pytest.approx(
        found["lora"]["losses"][-1], rel=1e-5)
    study.main(argv)
    assert len(seen) == 5  # what is measured stays
    study.main(["table", "--out", "out", "--figures", "figures"])
    record = json.loads((folder / "figures/study.json").read_text())
    assert record["flat"] == {"demo": {"0": found}}
    text = (folder / "figures/study.md").read_text()
    x, y = ([run[key] for run in found.values()] for key in ("eigenvalue", "score"))
    assert f"| not the plan's | demo: rank correlation of eigenvalue and score | 1 | " \
        f"{study_tables.spearman(x, y):+.2f}" in text
    assert "- H5: open" in text and "## demo, largest eigenvalue" in text


def saved_loss(path):
    """Mean cross-entropy over the training rows, one by one, of the adapter that the run left."""
    study_plan.install()
    options = study.parse_arguments(["run", "demo", *QUICK, "--out", "out/flat"])[1]
    args = study.arguments("demo", "lora", options, {})
    data = study.load(args)
    model, total = study.adapted(train_glue, args, data, path), 0.0
    rows = train_glue.training_rows(args, data, 0)
    for ids, types, label in rows:
        logits = model(torch.tensor([ids]), None, torch.tensor([types]))
        total += F.cross_entropy(logits, torch.tensor([label])).item()
    return total / len(rows)


@pytest.mark.parametrize("argv, message", [
    (["flat", "gsm8k"], "is no row of gsm8k"), (["flat", "mrpc"], "is no row of mrpc"),
    (["flat", "demo", "--row", "lora"], "flat has rows of its own"),
    (["flat", "demo"], "no choice; run `tune demo` first")])
def test_wrong_input(folder, capsys, argv, message):
    assert message in error_of(capsys, [*argv, "--figures", "none"], study.main)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name, rank, aux_rank", [("demo-r2", 2, 2), ("demo-aux16", 8, 16)])
def test_a_cell_of_other_ranks_keeps_the_scale(folder, monkeypatch, name, rank, aux_rank):
    CELLS[name] = CELLS[name]._replace(parts={"held": 20})
    for key, value in {"limit": 16, "epochs": 1, "batch_size": 8}.items():
        monkeypatch.setitem(CELLS[name].settings, key, value)
    chosen = {"bi-lora": {"setting": {"rho": 0.05, "ratio": 10}}}
    os.makedirs("out/demo")
    (folder / "out/demo/chosen.json").write_text(json.dumps(chosen))
    shapes, step = {}, METHODS["bi-lora"].step

    def watched(run, closure):
        layer = run.layers[0]
        shapes["A"], shapes["aux_A"] = len(layer.lora_A), len(layer.aux_A)
        shapes["scale"] = layer.scale
        return step(run, closure)

    METHODS["bi-lora"] = METHODS["bi-lora"]._replace(step=watched)
    study.main(["run", name, *QUICK, "--row", "bi-lora", "--seeds", "0", "--out", "out"])
    assert shapes == {"A": rank, "aux_A": aux_rank, "scale": 2.0}


# ---------------------------------------------------------------------------------------- verdicts

def made_up(gains, clipped=0.0, seeds=None):
    """A record in which a row's score is 0.5, and more by gains[cell, row] or gains[row]; the last
    setting of each grid is chosen.  clipped: the share of each run's steps."""
    runs, tuned = {}, {row: {"setting": study_plan.combinations(ROWS[row])[-1]}
                       for row in study.tuned_rows(ROWS)}
    chosen = dict.fromkeys(CELLS, tuned)
    for name, cell in CELLS.items():
        for row in cell.rows:
            if row in study_plan.BINDS:  # two of them share the runs of noise-fresh and noise-kept
                continue
            path = study_plan.folder_name(ROWS[row].method,
                                          study_plan.setting_in(name, row, chosen))
            gain = gains.get((name, row), gains.get(row, 0.0))
            for seed in range(seeds or cell.seeds):
                score = 0.5 + gain + 0.001 * (seed % 2) * (1 if row == "lora" else 0)
                kept = {"scores": {"dev": [score], "rest": [score], "gold": [score]},
                        "clipped": clipped}
                runs.setdefault(name, {}).setdefault(path, {})[str(seed)] = kept
    return {"chosen": chosen, "runs": runs}


def said(found):
    """{hypothesis: what the page says of it}."""
    lines = study_tables.contrasts(found).splitlines()
    return dict(line[2:].split(": ") for line in lines if line.startswith("- H"))


def test_nothing_measured_leaves_all_open():
    expected = dict.fromkeys([f"H{i}" for i in range(1, 7)], "open")
    assert said({"chosen": {}, "runs": {}}) == expected


@pytest.mark.parametrize("gains, clipped, expected", [
    ({}, 0.0, "holds"), ({"bi-lora-paper": 0.004}, 0.0, "holds"), ({}, 0.001, "refuted"),
    ({("mrpc", "bi-lora-paper"): 0.05}, 0.0, "refuted")])
def test_h1_asks_for_equality_and_for_no_clip(gains, clipped, expected):
    assert said(made_up(gains, clipped))["H1"] == expected
    assert said(made_up(gains, clipped, seeds=4))["H1"] == "open"


SAME = {"bi-lora": 0.02, "noise-fresh": 0.02, "noise-kept": 0.02}


@pytest.mark.parametrize("gains, clipped, expected", [
    (SAME, 0.6, "holds"), (SAME, 0.5, "open"), ({**SAME, "bi-lora": 0.04}, 0.6, "refuted"),
    ({**SAME, "bi-lora": 0.04}, 0.4, "open"), ({**SAME, "bi-lora": 0.0}, 0.6, "holds")])
def test_h2_asks_for_no_advantage_where_the_clip_acts(gains, clipped, expected):
    assert said(made_up(gains, clipped))["H2"] == expected


FRESH = {"lora-sam": 0.05, "lora-sam-paper": 0.01, "sam-half": 0.04}


@pytest.mark.parametrize("gains, h3, h6", [
    (FRESH, "holds", "holds"), ({**FRESH, "sam-half": 0.0}, "holds", "refuted"),
    ({**FRESH, ("demo", "lora-sam-paper"): 0.06}, "refuted", "holds"),
    ({**FRESH, "lora-sam": 0.01}, "refuted", "holds")])
def test_h3_and_h6_ask_for_positive_differences(gains, h3, h6):
    found = said(made_up(gains))
    assert (found["H3"], found["H6"]) == (h3, h6)


def test_an_open_contrast_leaves_a_hypothesis_open_and_a_refuting_one_decides():
    found = made_up(FRESH)
    runs = found["runs"]["demo"]["lora-sam_rho-0.01"]
    for seed, kept in runs.items():
        kept["scores"]["dev"] = [0.5 + 0.1 * (int(seed) % 2)]
    assert said(found)["H3"] == "open"
    for kept in found["runs"][NOISY]["lora-sam_rho-0.2"].values():
        kept["scores"]["rest"] = [0.4]
    assert said(found)["H3"] == "refuted"  # whatever the open one turns out to be


GROWS = {(NOISY, "lora-sam"): 0.05, ("sst2-250-noise30", "lora-sam"): 0.06}


@pytest.mark.parametrize("gains, expected", [
    (GROWS, "holds"),  # the other methods do not gain, and do not count
    ({}, "open"), ({**GROWS, (NOISY, "rwp-lora"): 0.02}, "refuted"),
    ({**GROWS, ("sst2-4000-noise30", "lora-sam"): 0.08}, "refuted")])
def test_h4_asks_only_of_methods_that_gain(gains, expected):
    assert said(made_up(gains))["H4"] == expected
    assert said(made_up(gains, seeds=9))["H4"] == "open"


@pytest.mark.parametrize("orders, expected", [
    ([[1, 2, 3], [1, 2, 3], [3, 2, 1]], "holds"), ([[3, 2, 1]] * 3, "refuted"),
    ([[3, 2, 1], [3, 2, 1], [3, 1, 2]], "refuted"), ([[1, 2, 3]] * 2, "open"),
    ([[5, 2, 4, 1, 3]] * 3, "refuted")])  # -0.5, which is not above -0.5
def test_h5_is_a_mean_over_three_seeds(orders, expected):
    flat = {}
    for seed, order in enumerate(orders):
        rows = zip(study_plan.FLAT, order, (0.5, 0.6, 0.7, 0.8, 0.9))
        flat[str(seed)] = {row: {"eigenvalue": value, "score": score} for row, value, score in rows}
    found = {"chosen": {}, "runs": {}, "flat": {NOISY: flat}}
    assert said(found)["H5"] == expected
    assert said({**found, "flat": {"demo": flat}})["H5"] == "open"


def test_the_share_of_clipped_steps_stands_beside_the_contrast():
    text = study_tables.contrasts(made_up({}, clipped=0.625))
    assert "| H2 | demo: bi-lora - noise-fresh | 20 | +0.0000 ± 0.0000 | 62.50% | equal |" in text
    assert sum("62.50%" in line for line in text.splitlines()) == len(
        CONTRASTS["H1"]) + len(CONTRASTS["H2"]) + 4  # those of AdamW's ascent, not the plan's

"""How far the ascent gets: the estimate of c against plain ascent itself, and notes/ascent.py on
small runs.

Oracles: c written out from the weights of a layer under a fixed gradient; the log of the run that
is predicted, where every batch is the whole training set and every step has a snapshot, so that the
estimate leaves out the change of A2 alone.
"""

import json
import math
import os
import sys

import pytest
import torch
import torch.nn as nn

from bilora import LoRALinear, bilora_step
from test_train_glue import error_of, log_of

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
import ascent  # noqa: E402
import methods  # noqa: E402


def test_the_estimate_of_c_at_a_fixed_gradient():
    """c_T = (s / 3) sqrt(r2 / n) ||sum_t eta2 G||, on average over A2's beginning, while B2 is
    small."""
    torch.manual_seed(0)
    m, n, r2, alpha, eta2, steps, found = 40, 60, 6, 8, 1e-3, 5, []
    G = torch.randn(m, n, dtype=torch.float64) / 50
    for _ in range(40):
        layer = LoRALinear(nn.Linear(n, m, bias=False), 4, alpha, r2).double().train()

        def closure():
            loss = (G * layer(torch.eye(n, dtype=torch.float64)).T).sum()
            loss.backward()
            return loss

        descent = torch.optim.SGD([layer.lora_B, layer.lora_A], lr=0.0)
        up = torch.optim.SGD([layer.aux_B, layer.aux_A], lr=eta2, maximize=True)
        for _ in range(steps):
            bilora_step(descent, up, closure, [layer], 1.0)
        found.append((layer.aux_B @ layer.aux_A).square().sum().item())
    expected = 2 / 3 * math.sqrt(r2 / n) * steps * eta2 * G.norm().item()  # s = 2
    # the estimate is for r2 << n
    assert math.sqrt(sum(found) / len(found)) == pytest.approx(expected, rel=0.1)


RUN = ["train_glue.py", "--limit", "16", "--batch-size", "16", "--epochs", "6", "--device", "cpu",
       "--lr", "1e-3", "--aux-lr", "1e-3", "--rho", "0.05",
       "--seeds", "0", "1", "--label-noise", "0", "--jobs", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_demos):
    path, before = tmp_path_factory.mktemp("runs"), os.getcwd()
    os.chdir(path)
    for out, more in (("lora", ["--method", "lora"]), ("one", ["--method", "bi-lora"]),
                      ("many", ["--method", "bi-lora", "--aux-lr", "0.5", "--rho", "0.002"]),
                      ("adamw", ["--method", "bi-lora", "--ascent", "adamw"])):
        methods.main([*RUN, *more, "--snapshots", "7", "--out", out])
    yield path
    os.chdir(before)


def test_what_is_measured_and_predicted(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    report = ascent.main(["lora", "one", "many", "adamw", "--rows", "16", "--moments", "3",
                          "--batches", "2", "--device", "cpu", "--out", "out"])
    assert json.loads(json.dumps(report)) == json.load(open("out/demo-ascent-c.json"))
    assert os.path.getsize("out/demo-ascent-c.png") > 5000
    text = open("out/demo-ascent-c.md").read()
    assert text in capsys.readouterr().out and "nan" not in text
    assert list(report["ascents"]) == ["sgd, 1", "sgd, 500", "adamw, 1"]
    logs = {name: [log_of(folder / name / f"bi-lora-seed{seed}") for seed in (0, 1)]
            for name in ("one", "many", "adamw")}
    for name, key in (("one", "sgd, 1"), ("many", "sgd, 500"), ("adamw", "adamw, 1")):
        rows = report["ascents"][key]
        largest = [max(row["perturbation"] for row in log) for log in logs[name]]
        assert rows["largest c"]["mean"] == pytest.approx(sum(largest) / 2)
        assert rows["steps clipped"]["mean"] == pytest.approx(
            sum(row["clipped"] for log in logs[name] for row in log) / 12)
        assert 1 <= rows["effective rank"]["mean"] <= 8 and rows["accuracy minus lora's"]["n"] == 2
    one, many = (report["ascents"][name] for name in ("sgd, 1", "sgd, 500"))
    assert one["steps clipped"]["mean"] == 0 < many["steps clipped"]["mean"]
    last = [log[-1]["perturbation"] for log in logs["one"]]
    curve = report["curves"]["sgd, 1"]
    assert len(curve) == len(logs["one"][0]) and curve[-1] == pytest.approx(sum(last) / 2)
    assert one["predicted c"]["mean"] == pytest.approx(sum(last) / 2, rel=0.1)
    assert many["predicted c"]["mean"] == pytest.approx(500 * one["predicted c"]["mean"])
    assert "predicted c" not in report["ascents"]["adamw, 1"]  # no plain ascent


def test_the_noise_of_a_sample_is_not_taken_for_a_gradient_that_lasts(folder, monkeypatch):
    """Each half's mean gradient is d plus a large noise of its own, the same at every snapshot: c
    has d and the batches' variance."""
    monkeypatch.chdir(folder)
    _, options = ascent.sharpness.parse_arguments(
        ["lora/lora-seed0", "--rows", "12", "--device", "cpu"])
    (run,) = ascent.sharpness.load_runs(options)
    d, variance = 0.3, 0.7

    def gradients(run, rows):
        means = [torch.zeros_like(layer.weight) for layer in run.layers]
        for mean in means:
            mean[0, 0], mean[0, 1 if rows == run.sample[:6] else 2] = d, 100.0
        return means, torch.full((len(means),), variance).double().numpy()

    monkeypatch.setattr(ascent, "batch_gradients", gradients)
    rates = [row["lr"] for row in ascent.read_log(run)]
    share = sum(8 / layer.in_features for layer in run.layers)
    for end, c in ascent.predict(run, 8):
        squares = (sum(rates[:end]) * d) ** 2 + sum(rate**2 for rate in rates[:end]) * variance
        assert c == pytest.approx(2 / 3 * math.sqrt(share * squares), rel=1e-5)


@pytest.mark.parametrize("argv, message", [
    (["one"], "expected runs of one task, by lora and by one other method"),
    (["lora", "one/bi-lora-seed0"], "to have the seeds of lora's")])
def test_wrong_input_is_one_line(folder, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(folder)
    argv = [*argv, "--device", "cpu", "--out", "nothing"]
    assert message in error_of(capsys, argv, ascent.main) and not os.path.exists("nothing")

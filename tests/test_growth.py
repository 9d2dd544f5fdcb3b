"""notes/growth.py: fits and exponents against polynomials, and what grows on each axis."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from bilora import LoRALinear, lora_layers
from train_glue import METHODS

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
import benchmark  # noqa: E402
import growth  # noqa: E402


@pytest.mark.parametrize("degree", [1, 2])
def test_fit_finds_a_polynomial(degree):
    x, own = [1, 2, 4, 8, 16], [3.0, 0.5, 0.25][:degree + 1]
    t = [sum(c * value**k for k, c in enumerate(own)) for value in x]
    found, deviation = growth.fit(x, t, degree)
    assert found == pytest.approx(own) and deviation == pytest.approx(0, abs=1e-9)


def test_fit_weighs_relative_errors():
    """Of a constant: the minimum of the sum of (a / t - 1)^2, found by hand."""
    found, deviation = growth.fit([1, 2], [1.0, 3.0], 0)
    assert found == pytest.approx([(1 / 1 + 1 / 3) / (1 / 1 + 1 / 9)])
    assert deviation == pytest.approx(1 - 1.2 / 3)


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_exponent_is_that_of_a_power(power):
    points = [dict.fromkeys(growth.NAMES, x**power) for x in (1, 2, 3, 5, 6)]
    found = growth.growth("rank", [1, 2, 3, 5, 6], points)
    assert all(line["exponent"] == pytest.approx(power) for line in found.values())
    assert len(found["lora"]["fit"]) == 2
    assert len(growth.growth("length", [1, 2, 3, 5, 6], points)["lora"]["fit"]) == 3


def test_exponent_is_that_of_the_last_doubling():
    """The point nearest to half of the last one, whatever lies before it; x counts as it is."""
    points = [dict.fromkeys(growth.NAMES, t) for t in (9.0, 1.0, (5 / 3)**2)]
    found = growth.growth("rank", [1, 3, 5], points)
    assert found["lora"]["exponent"] == pytest.approx(2)


def test_a_point_has_medians_or_says_what_is_left_out(monkeypatch):
    options, left_out = SimpleNamespace(shape="minilm"), {}
    monkeypatch.setattr(benchmark, "steps_of", lambda names, own: ({}, left_out))
    monkeypatch.setattr(benchmark, "time_rows", lambda steps, own: {"lora": [3.0, 1.0, 8.0]})
    assert growth.point("rank", 2, options) == {"lora": 3.0}
    left_out["lora"] = "rank is 999"
    with pytest.raises(ValueError, match="^rank 2, lora: rank is 999$"):
        growth.point("rank", 2, options)


def test_a_printed_row_is_in_milliseconds_and_percent(capsys):
    line = {"fit": [0.001, 0.0025, 0.5], "deviation": 0.031, "exponent": 0.499}
    growth.show("rank", {"methods": {"lora": line}})
    assert capsys.readouterr().out == "| rank | lora | 1 + 2.5 x + 500 x^2 | 3 % | 0.50 |\n"


@pytest.mark.parametrize("words, message", [
    (["--rounds", "0"], "--rounds: '0', expected int >= 1"),
    (["--device", "tray"], "--device tray: Expected one of cpu"),
    (["--out", os.path.join(__file__, "x")], "Not a directory"),
    (["--axis", "rank", "--device", "cpu"], "rank 999, lora: rank is 999")])
def test_wrong_options_end_with_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(growth, "AXES", {"rank": [999]})
    monkeypatch.setitem(growth.START, "layers", 1)
    with pytest.raises(SystemExit) as end:
        growth.main(words)
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_every_axis_changes_its_own_quantity(tmp_path, monkeypatch, capsys):
    """What the benchmark is asked for, and the model that its first method gets."""
    asked, prepared = [], benchmark.prepared

    def noted(name, base, options):
        run, closure = prepared(name, base, options)
        assert options.warmup == 1
        layers, (*_, rows) = lora_layers(run.model), closure.args
        asked.append({"batch-size": len(rows), "layers": len(run.model.encoder.blocks),
                      "length": max(len(row[0]) for row in rows), "rank": layers[0].rank,
                      "adapters": len(layers)})
        return run, closure
    config = benchmark.Config(vocab_size=50, d_model=8, d_ff=16, heads=2, encoder_layers=2,
                              num_labels=2)
    monkeypatch.setitem(benchmark.SHAPES, "minilm", config)
    monkeypatch.setattr(benchmark, "prepared", noted)
    axes = {"batch-size": [2, 3], "length": [4, 9], "rank": [1, 5], "layers": [1, 2],
            "adapters": [1, 7]}
    monkeypatch.setattr(growth, "AXES", axes)
    monkeypatch.setattr(growth, "START", {**growth.START, "rank": 2, "batch-size": 40, "length": 6})
    growth.main(["--rounds", "1", "--device", "cpu", "--out", str(tmp_path)])
    others = {"batch-size": 40, "length": 6, "rank": 2, "layers": 2, "adapters": 2 * 6}
    per_point = len(growth.NAMES)
    for i, (axis, values) in enumerate(axes.items()):
        for j, value in enumerate(values):
            own = asked[(2 * i + j) * per_point:][:per_point]
            assert [point[axis] for point in own] == [value] * per_point
            linked = {"layers": "adapters", "batch-size": "length"}  # fewer layers have fewer
            for other in others.keys() - {axis, linked.get(axis)}:
                assert [point[other] for point in own] == [others[other]] * per_point
    report = json.loads((tmp_path / "growth.json").read_text())
    assert report["rank"]["values"] == [1, 5] and (tmp_path / "growth.png").exists()
    assert set(report["rank"]["methods"]) == set(list(METHODS)[:3])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| rank")]
    assert len(table) == per_point


def test_more_adapters_than_there_are_layers(monkeypatch):
    base = benchmark.Transformer(benchmark.Config(vocab_size=9, d_model=4, d_ff=8, heads=1,
                                                  encoder_layers=1, pooler=True, num_labels=2))
    with pytest.raises(ValueError, match="^7 adapters; the blocks have 6 linear layers$"):
        growth.first_adapted(7, base, 2, 4, 0, layer=None)


def test_the_adapters_are_those_of_the_first_layers_of_the_blocks():
    model = benchmark.Transformer(benchmark.Config(vocab_size=9, d_model=4, d_ff=8, heads=1,
                                                   encoder_layers=2, pooler=True, num_labels=2))
    linears = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)
               and name.startswith("encoder.blocks.")]
    layers = growth.first_adapted(7, model, 2, 4, 0, layer=LoRALinear)
    assert [model.get_submodule(name) for name in linears[:7]] == layers
    assert len(lora_layers(model)) == 7 and linears[6].startswith("encoder.blocks.1.")

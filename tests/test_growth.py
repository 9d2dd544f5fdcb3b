"""notes/growth.py: fits and exponents against polynomials, and what grows on each axis."""

import json
import os
import sys

import pytest

from bilora import lora_layers
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


def test_every_axis_changes_its_own_quantity(tmp_path, monkeypatch, capsys):
    """What the benchmark is asked for, and the model that its first method gets."""
    asked, prepared = [], benchmark.prepared

    def noted(name, base, options):
        run, closure = prepared(name, base, options)
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
    per_point = len(growth.NAMES)
    for i, (axis, values) in enumerate(axes.items()):
        for j, value in enumerate(values):
            own = asked[(2 * i + j) * per_point:][:per_point]
            assert [point[axis] for point in own] == [value] * per_point
    report = json.loads((tmp_path / "growth.json").read_text())
    assert report["rank"]["values"] == [1, 5] and (tmp_path / "growth.png").exists()
    assert set(report["rank"]["methods"]) == set(list(METHODS)[:3])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| rank")]
    assert len(table) == per_point


def test_more_adapters_than_there_are_layers(monkeypatch):
    base = benchmark.Transformer(benchmark.Config(vocab_size=9, d_model=4, d_ff=8, heads=1,
                                                  encoder_layers=1))
    with pytest.raises(ValueError, match="^7 adapters; the blocks have 6 linear layers$"):
        growth.first_adapted(7, base, 2, 4, 0, layer=None)

"""notes/sweep.py: the grid's runs are those of the scripts, and the same command goes on where it
was interrupted.

Oracles: train_glue.main and train_gsm8k.main with the same options, bit for bit, which read each
base anew; a sweep that was not interrupted; Python's statistics.  Runs are made in-process on small
demos.
"""

import contextlib
import io
import json
import math
import os
import statistics
import sys

import pytest

import train_glue
import train_gsm8k
from test_train_glue import error_of

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
import sweep  # noqa: E402
from tables import number_of  # noqa: E402

RUN = ["--limit", "16", "--epochs", "1", "--batch-size", "8", "--lr", "0.02", "--rank", "2",
       "--device", "cpu", "--jobs", "1"]
BOTH = [*RUN, "--method", "lora", "bi-lora", "--seeds", "100", "7"]
GRID = ["train_glue.py", "--x", "rho", "0.5", "2", "--y", "aux-rank", "2", "3", "--out", "out"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, small_demos):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(sweep, "draw", lambda report, method, path: None)


def same(a, b):
    """Are the adapters of two run folders the same, bit for bit?"""
    (name,) = (path.name for path in a.glob("adapter_model.*"))
    return (a / name).read_bytes() == (b / name).read_bytes()


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_demos):
    """(folder, what was printed, report) of a grid of 2 x 2, two methods, two seeds."""
    folder, printed = tmp_path_factory.mktemp("whole"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        report = sweep.main([*GRID, "--", *BOTH])
    return folder, printed.getvalue(), report


def test_the_cells_are_the_scripts_own_runs(whole, folder):
    there, text, report = whole
    assert report == json.loads((there / "out/sweep.json").read_text())
    assert report["x"] == {"name": "rho", "values": [0.5, 2.0]}
    assert report["y"] == {"name": "aux-rank", "values": [2, 3]}
    assert report["metric"] == "accuracy" and report["config"]["lr"] == 0.02
    assert not {"rho", "aux_rank", "out"} & report["config"].keys()
    assert [(cell["x"], cell["y"], cell["method"]) for cell in report["cells"]] == [
        (x, y, method) for y in (2, 3) for x in (0.5, 2.0) for method in ("lora", "bi-lora")]
    for cell in report["cells"]:
        values = [cell["scores"]["100"], cell["scores"]["7"]]
        assert len(cell["scores"]) == cell["n"] == 2
        assert cell["mean"] == pytest.approx(statistics.mean(values), abs=1e-12)
        error = statistics.stdev(values) / math.sqrt(2)
        assert cell["stderr"] == pytest.approx(error, abs=1e-12)
        lines = text.split(f"\n{cell['method']}, ")[1].splitlines()
        (row, *_) = (line for line in lines if line.startswith(f"| {cell['y']} |"))
        shown = row.split("|")[2 + (cell["x"] == 2.0)]
        assert number_of(cell) in shown
    for method in ("lora", "bi-lora"):
        assert (there / f"out/sweep-{method}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(there.rglob("*.tmp"))

    last = ["--rho", "2", "--aux-rank", "3", "--out", "single"]  # the cell after all the others
    for result in train_glue.main([*BOTH, *last])["results"]:
        method, seed = result["method"], result["seed"]
        (cell,) = (cell for cell in report["cells"]
                   if (cell["x"], cell["y"], cell["method"]) == (2.0, 3, method))
        assert cell["scores"][str(seed)] == result["metrics"]["accuracy"]
        name = f"{method}-seed{seed}"
        ours, theirs = there / "out/rho-2.0_aux-rank-3" / name, folder / "single" / name
        assert same(ours, theirs), name
        assert (ours / "config.json").read_text() == (theirs / "config.json").read_text(), name
    one, other = (folder / f"single/bi-lora-seed{seed}" for seed in (7, 100))
    assert not same(there / "out/rho-0.5_aux-rank-2/bi-lora-seed7", one) and not same(one, other)


def test_the_other_script_and_one_row(folder, undrawn, capsys):
    run = [*RUN, "--method", "lora", "--seeds", "0", "--eval-limit", "3", "--max-new-tokens", "3",
           "--limit", "8", "--no-bf16"]
    report = sweep.main(["train_gsm8k.py", "--x", "alpha", "4", "8", "--", *run])
    assert report["y"] is None
    assert [(cell["x"], cell["y"], cell["stderr"]) for cell in report["cells"]] == [
        (4.0, None, None), (8.0, None, None)]
    printed = capsys.readouterr().out
    assert "| alpha | 4.0 | 8.0 |\n|---|---|---|\n| accuracy | 0 | 0 |" in printed
    train_gsm8k.main([*run, "--alpha", "8", "--out", "single"])
    assert same(folder / "runs/sweep-alpha/alpha-8.0/lora-seed0", folder / "single/lora-seed0")


def test_a_sweep_goes_on_where_it_was_interrupted(whole, folder, undrawn, monkeypatch):
    """With one of the methods of the whole sweep."""
    there, _, report = whole
    cells = [cell for cell in report["cells"] if cell["method"] == "bi-lora"]
    again, train, calls = [*GRID, "--", *BOTH, "--method", "bi-lora"], train_glue.train, []

    def interrupted(args, method, seed, data, place, progress):
        calls.append(place)
        if len(calls) == 4:  # the second cell's second seed
            raise KeyboardInterrupt
        return train(args, method, seed, data, place, progress)

    def written():
        return json.loads((folder / "out/sweep.json").read_text())["cells"]

    monkeypatch.setattr(train_glue, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(again)
    assert written() == cells[:1]
    assert sweep.main(again)["cells"] == cells == written()
    places = [os.path.join("out", f"rho-{x}_aux-rank-{y}", f"bi-lora-seed{seed}")
              for y in (2, 3) for x in (0.5, 2.0) for seed in (100, 7)]
    assert calls == [*places[:4], *places[3:]]
    for place in places:
        assert same(folder / place, there / place), place

    def never(*args):
        raise AssertionError("a finished run is trained again")

    monkeypatch.setattr(train_glue, "train", never)
    assert sweep.main(again)["cells"] == cells
    fewer = [*again[:again.index("--y")], "--y", "aux-rank", "3", *again[again.index("--out"):]]
    assert sweep.main(fewer)["cells"] == cells[2:]


def test_a_saved_state_is_gone_on_from(folder, undrawn, monkeypatch):
    argv, backward = ["train_glue.py", "--x", "rho", "0.5", "--out"], train_glue.forward_backward
    run = ["--", *RUN, "--method", "bi-lora", "--seeds", "1", "--save-every", "1"]
    sweep.main([*argv, "out", *run])
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return backward(*args)

    monkeypatch.setattr(train_glue, "forward_backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.main([*argv, "again", *run])
    sweep.main([*argv, "again", *run])
    assert len(calls) == 2 + 1 + 2  # the second step twice; and two passes for the rise of the loss
    assert same(folder / "again/rho-0.5/bi-lora-seed1", folder / "out/rho-0.5/bi-lora-seed1")


def test_other_settings_in_the_same_folder(folder, undrawn, capsys):
    argv = ["train_glue.py", "--x", "rho", "0.5", "--out", "out", "--", *RUN, "--method", "bi-lora",
            "--seeds", "1"]
    sweep.main(argv)
    before = files(folder)
    assert "rho-0.5/config.json: lr is 0.02, now 0.03" in error_of(
        capsys, [*argv, "--lr", "0.03"], sweep.main)
    assert files(folder) == before


@pytest.mark.parametrize("axes, message", [
    *((["--x", name, "1"], f"{name} is the same for all cells")
      for name in ("limit", "bf16", "seeds", "method", "out")),
    (["--x", "rho", "1", "--y", "label-noise", "0.1"], "label-noise is the same for all cells"),
    (["--x", "radius", "1"], "unrecognized arguments: --radius=1"),
    (["--x", "aux_rank", "1"], "arguments: --aux_rank=1"),
    (["--x", "lim", "4", "8"], "lim: expected each option's name in full"),
    (["--x", "rank", "2", "129"], "rank is 129"),
    (["--x", "aux-rank", "2", "0"], "--aux-rank: '0', expected int >= 1"),
    (["--x", "rho", "0.1", "-1"], "--rho: '-1', expected float >= 0"),
    (["--x", "rho", "1", "--y", "rank"], "rank: expected the name of an option and its values"),
    (["--x", "rho", "1", "--y", "rho", "2"], "different ones"), ([], "--x"),
])
def test_wrong_input_is_one_line_and_exit_code_2(folder, capsys, axes, message):
    argv = ["train_glue.py", *axes, "--", *RUN, "--method", "bi-lora"]
    assert message in error_of(capsys, argv, sweep.main)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("word", ["--out=a", "--ou=a", "--resume=a", "--rsme=a"])
def test_wrong_input_after_the_dashes(folder, capsys, word):
    argv = ["train_glue.py", "--x", "rho", "1", "--", *RUN, "--method", "lora", word]
    assert word in error_of(capsys, argv, sweep.main)
    assert not list(folder.iterdir())


def test_a_run_that_diverges_is_null_and_the_others_go_on(folder, monkeypatch, capsys, ticks):
    train = train_glue.train

    def diverging(args, method, seed, *more):
        if (args.lr, seed) == (0.5, 2) or args.lr == 0.7:
            raise FloatingPointError("bi-lora, step 1: the loss is nan")
        return train(args, method, seed, *more)

    monkeypatch.setattr(train_glue, "train", diverging)
    run = ["--out", "out", "--", *RUN, "--method", "bi-lora", "--seeds", "1", "2"]
    argv = ["train_glue.py", "--x", "lr", "0.5", "0.02", *run]
    report = sweep.main(argv)
    assert report == json.loads((folder / "out/sweep.json").read_text())
    bad, good = report["cells"]
    assert bad["scores"]["1"] is not None and bad["scores"]["2"] is None
    assert (bad["mean"], bad["stderr"], bad["n"]) == (None, None, 1)
    assert good["n"] == 2 and good["mean"] == statistics.mean(good["scores"].values())
    text = capsys.readouterr().out
    assert "| accuracy | diverged | " in text
    assert "lr-0.5/bi-lora-seed2: bi-lora, step 1: the loss is nan" in text
    assert (folder / "out/sweep-bi-lora.png").read_bytes().startswith(b"\x89PNG")
    nowhere = sweep.main(["train_glue.py", "--x", "lr", "0.7", *run])  # a map with no number
    assert [cell["mean"] for cell in nowhere["cells"]] == [None]

    monkeypatch.setattr(train_glue, "train", train)
    assert None not in sweep.main(argv)["cells"][0]["scores"].values()  # is tried again

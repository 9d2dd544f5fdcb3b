"""notes/methods.py: a method that is added to the table works everywhere; snapshots; its processes.

Oracles: the same command in one process, or without an interruption, bit for bit; Eq. (4) for what
a method's closure tells of it.
"""

import os
import runpy
import sys

import pytest
import torch

import train_glue
from bilora import bilora_step, lora_sam_step
from test_train_glue import error_of, log_of
from train_glue import METHODS, Method

HERE = os.path.dirname(os.path.realpath(__file__))
ROOT = os.path.dirname(HERE)
NOTES = os.path.join(ROOT, "notes")
OURS = (ROOT, NOTES, HERE)
sys.path.insert(0, NOTES)
import benchmark  # noqa: E402
import methods  # noqa: E402
import sharpness  # noqa: E402
import sweep  # noqa: E402

RUN = ["--limit", "24", "--epochs", "2", "--batch-size", "8", "--device", "cpu", "--jobs", "1",
       "--seeds", "0"]
WORDS = ["--limit", "6", "--epochs", "1", "--eval-limit", "2", "--max-new-tokens", "4",
         "--device", "cpu", "--jobs", "1", "--seeds", "0"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, small_demos):
    """An empty folder; afterwards METHODS is as it was."""
    monkeypatch.chdir(tmp_path)
    before = dict(METHODS)
    yield tmp_path
    METHODS.clear()
    METHODS.update(before)


def adapter(folder):
    (path,) = folder.glob("adapter_model.*")
    return path.read_bytes()


def test_a_method_in_three_lines_works_everywhere(folder, monkeypatch):
    def mine(run, closure):
        return {"loss": lora_sam_step(run.descent, closure, run.rho), "perturbation": run.rho}
    methods.add({"mine": Method(mine)})

    names = ["--method", "lora", "mine", "--rho", "0.3"]
    report = methods.main(["train_glue.py", *RUN, *names, "--snapshots", "3", "--out", "glue"])
    assert list(report["summary"]) == ["lora", "mine"] and "mine" in report["difference"]
    assert adapter(folder / "glue/mine-seed0") != adapter(folder / "glue/lora-seed0")
    assert all(row["perturbation"] == 0.3 for row in log_of(folder / "glue/mine-seed0"))
    report = methods.main(["train_gsm8k.py", *WORDS, *names, "--snapshots", "2", "--out", "words"])
    assert list(report["summary"]) == ["lora", "mine"]

    small = ["--rows", "8", "--moments", "1", "--batches", "1", "--points", "3", "--grid", "2",
             "--directions", "1", "--radii", "0.1", "--steps", "1", "--iterations", "1",
             "--alphas", "0", "--device", "cpu", "--out", "figures", "--parts"]
    for out, task, asked in (("glue", "demo", [*sharpness.MEASURES]),
                             ("words", "gsm8k-demo", ["d", "e"])):
        parts = sharpness.main([out, *small, *asked])[task]["measured"]
        assert parts.keys() == {*asked} - {"f"}
        assert all(list(found) == ["lora", "mine"] for found in parts.values())
        for part in parts:
            name, _ = sharpness.DRAWINGS[part]
            assert os.path.getsize(f"figures/{task}-{name}.png") > 5000
        assert parts["e"]["mine"][0]["norm"][0] > 0 and parts["e"]["lora"][0] == {}
        assert "epsB_epsA" in parts["d"]["mine"][0] and "ratio" not in parts["d"]["lora"][0]

    monkeypatch.setattr(benchmark, "memory_alone", lambda method, argv: None)
    report = benchmark.main(["--model", train_glue.DEMO, "--rounds", "3", "--warmup", "0",
                             "--method", "mine",
                             "--batch-size", "2", "--length", "8", "--device", "cpu"])
    assert list(report) == ["lora", "mine", "floor", "matmuls"]
    assert report["mine"]["seconds"] > 0

    report = sweep.main(["train_glue.py", "--x", "rho", "0", "0.5", "--out", "grid", "--", *RUN,
                         "--method", "mine"])
    assert [(cell["x"], cell["method"], cell["n"]) for cell in report["cells"]] == [
        (0.0, "mine", 1), (0.5, "mine", 1)]
    assert adapter(folder / "grid/rho-0.0/mine-seed0") != adapter(
        folder / "grid/rho-0.5/mine-seed0")
    assert os.path.getsize("grid/sweep-mine.png") > 5000


def test_what_a_method_keeps_is_saved_with_the_run(folder, monkeypatch):
    """A radius that grows with each step: interrupted and resumed equals uninterrupted."""
    def growing(run, closure):
        run.state["steps"] = run.state.get("steps", 0) + 1
        rho = run.rho * run.state["steps"] / run.steps
        loss = bilora_step(run.descent, run.ascent, closure, run.layers, rho)
        return {"loss": loss, "radius": rho}
    methods.add({"growing": Method(growing, auxiliary=True)})

    argv = ["train_glue.py", *RUN, "--method", "growing", "--aux-lr", "50", "--rho", "0.06",
            "--save-every", "1", "--snapshots", "7"]
    methods.main([*argv, "--out", "whole"])
    backward, calls = train_glue.forward_backward, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return backward(*args)

    monkeypatch.setattr(train_glue, "forward_backward", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        methods.main([*argv, "--out", "parts"])
    methods.main([*argv, "--out", "parts", "--resume"])
    whole, parts = folder / "whole/growing-seed0", folder / "parts/growing-seed0"
    assert adapter(whole) == adapter(parts)
    radii = [row["radius"] for row in log_of(parts)]
    assert radii == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05, 0.06])
    names = sorted(path.name for path in (whole / "snapshots").iterdir())
    assert names == [f"step-{step:06d}.pt" for step in range(7)]
    for name in names:
        one, two = (torch.load(place / "snapshots" / name) for place in (whole, parts))
        assert one.keys() == two.keys() and any("aux_B" in key for key in one)
        assert all(torch.equal(one[key], two[key]) for key in one), name


def test_processes_know_the_methods(folder, monkeypatch):
    """The program itself, with --jobs 2, gives the bytes of this process: the digits, and all that
    an adapter's folder says of its base.  The worker is a new interpreter, which runs the file
    that is __main__ here, finds the scripts by it, and takes a warning for an error."""
    argv = ["train_glue.py", *RUN, "--data", train_glue.TASKS["demo"].settings["data"], "--method",
            "bi-lora-power", "--momentum", "0.9", "--snapshots", "2", "--out"]
    methods.main([*argv, "one"])
    program = os.path.join(NOTES, "methods.py")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [program, *argv, "two", "--jobs", "2"])
        others = [path for path in sys.path if os.path.realpath(path) not in OURS]
        patch.setattr(sys, "path", [NOTES, *others])  # as python notes/methods.py has it
        patch.setattr(sys, "warnoptions", ["error"])
        own = ("init", "dora", "rslora", "nf4", "full-lr", "momentum", "snapshots")  # again
        options = [row for row in train_glue.OPTIONS if row[1] not in own]
        patch.setattr(train_glue, "OPTIONS", options)
        for name in list(METHODS)[3:]:
            del METHODS[name]
        runpy.run_path(program, run_name="__main__")
    one, two = (folder / out / "bi-lora-power-seed0" for out in ("one", "two"))
    for name in ("adapter_model.safetensors", "adapter_config.json", "base_fingerprint.txt"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert len(list((two / "snapshots").iterdir())) == 2


def test_momentum_is_that_of_the_power_rule(folder):
    for out, momentum in (("less", "0.1"), ("more", "0.9")):
        methods.main(["train_glue.py", *RUN, "--method", "bi-lora-power", "bi-lora", "--momentum",
                      momentum, "--out", out])
    power, plain = ([adapter(folder / out / f"{name}-seed0") for out in ("less", "more")]
                    for name in ("bi-lora-power", "bi-lora"))
    assert power[0] != power[1] and plain[0] == plain[1]


@pytest.mark.parametrize("argv, message", [
    (["train_glue.py", "--method", "mine"], "invalid choice: 'mine'"),
    (["train_gsm8k.py", "--method", "mine"], "invalid choice: 'mine'"),
    (["train_glue.py", "--momentum", "1"], "--momentum: '1', expected float >= 0 and < 1"),
    (["train_glue.py", "--snapshots", "-1"], "--snapshots: '-1', expected int >= 0"),
    (["train.py"], "invalid choice: 'train.py'"), ([], "script")])
def test_wrong_input_is_one_line(argv, message, capsys, folder):
    assert message in error_of(capsys, argv, methods.main)
    assert not list(folder.iterdir())


def test_a_sweep_refuses_an_unknown_method(capsys, folder):
    argv = ["train_glue.py", "--x", "rho", "1", "--", *RUN, "--method", "mine"]
    assert "invalid choice: 'mine'" in error_of(capsys, argv, sweep.main)

"""notes/benchmark.py and notes/floors.py: shapes, floors, and rows that are left out.  No times.

Oracles: the published number of parameters of each shape, and a sum over its matrices by hand; the
list of a small model's matrix products by hand; the tokens that a model's mask leaves.
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bilora import LoRALinear, add_lora
from model import Transformer

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "notes"))
import benchmark  # noqa: E402
import train_glue  # noqa: E402

SMALL = ["--device", "cpu", "--layers", "1", "--batch-size", "2", "--length", "8", "--rounds", "2",
         "--warmup", "0", "--rank", "2"]


def llama(vocabulary, D, kv, F, layers, heads):
    """Queries and outputs, keys and values, three matrices of the MLP and two norms a layer; the
    last norm; an embedding for each of the heads, one where it is tied."""
    return layers * (2 * D * D + 2 * D * kv + 3 * D * F + 2 * D) + D + heads * vocabulary * D


MINILM = ((30522 + 512 + 2) * 384 + 2 * 384                                     # embeddings, norm
          + 6 * (4 * (384 + 1) * 384 + (384 + 1) * 1536 + (1536 + 1) * 384 + 4 * 384)
          + (384 + 1) * 384)                                                    # pooler
T5 = (32128 * 768 + 2 * 32 * 12 + 2 * 768                     # embeddings, both biases, last norms
      + 12 * (4 * 768**2 + 2 * 768 * 3072 + 2 * 768)          # encoder
      + 12 * (8 * 768**2 + 2 * 768 * 3072 + 3 * 768))         # decoder


@pytest.fixture
def small(monkeypatch):
    """Each shape with a vocabulary of 50 tokens; (options, base) of a command."""
    for name, config in benchmark.SHAPES.items():
        monkeypatch.setitem(benchmark.SHAPES, name, replace(config, vocab_size=50))
    monkeypatch.setattr(benchmark, "memory_alone", lambda name, argv: None)

    def built(*words):
        options = benchmark.parse_arguments([*SMALL, *words])
        return options, benchmark.build(options)
    return built


@pytest.mark.parametrize("name, published, by_hand", [
    ("minilm", 22_713_216, MINILM), ("t5-base", 222_903_552, T5),
    ("smollm2", 134_515_008, llama(49152, 576, 3 * 64, 1536, 30, 1)),
    ("llama-1b", 1_235_814_400, llama(128256, 2048, 8 * 64, 8192, 16, 1)),
    ("llama-8b", 8_030_261_248, llama(128256, 4096, 8 * 128, 14336, 32, 2))])
def test_the_shapes_have_the_published_sizes(name, published, by_hand):
    with torch.device("meta"):
        model = Transformer(benchmark.SHAPES[name])
    head = 2 * (384 + 1) if name == "minilm" else 0  # a classifier, which is not published
    assert sum(p.numel() for p in model.parameters()) - head == published == by_hand
    assert benchmark.SHAPES.keys() == {"minilm", "t5-base", "smollm2", "llama-1b", "llama-8b"}


@pytest.mark.parametrize("name, stacks", [("minilm", (1, 0)), ("t5-base", (1, 1)),
                                          ("smollm2", (0, 1))])
def test_a_kind_of_model_is_timed_with_both_floors(small, name, stacks, capsys):
    """Through the script that trains it.  A method that finds no classifier is left out."""
    words = ["--bf16", "--shape", name, "--method", "bi-lora", "head-sam-relative"]
    report = benchmark.main([*SMALL, *words])
    assert list(report) == ["lora", "bi-lora", "head-sam-relative", "floor", "matmuls"]
    out = report.pop("head-sam-relative")
    assert ("left_out" in out) == (name != "minilm")
    if name != "minilm":
        assert "needs a model with a classifier" in out["left_out"]
        assert f"left out: {out['left_out']}" in capsys.readouterr().out
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in report.values())
    options, base = small(*words)
    assert (base.config.encoder_layers, base.config.decoder_layers) == stacks
    half = name == "smollm2"
    assert all(p.dtype == (torch.bfloat16 if half else torch.float32) for p in base.parameters())
    assert torch.get_default_dtype() == torch.float32
    _, closure = benchmark.prepared("lora", base, options)
    assert closure.func.__module__ == ("train_gsm8k" if half else "train_glue")


@pytest.mark.parametrize("name, unread", [("minilm", 0), ("t5-base", 2), ("smollm2", 1)])
def test_tokens_a_second_are_those_of_the_batch_without_padding(small, name, unread, capsys):
    """The tokens that the first stack's mask leaves, and those of a row that it does not read: two
    of an answer that another stack has, or the last one of a decoder's row."""
    words = ["--shape", name, "--batch-size", "3"]
    report = benchmark.main([*SMALL, *words])
    options, base = small(*words)
    run, closure = benchmark.prepared("lora", base, options)
    masks = []
    (run.model.encoder or run.model.decoder).register_forward_pre_hook(
        lambda stack, inputs: masks.append(inputs[1]))
    closure()
    assert len(masks) == 1 and not masks[0].all()  # there is padding
    tokens = masks[0].sum().item() + 3 * unread
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for method, row in report.items():
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(tokens)
        printed = [method, f"{row['seconds']:.4f}", f"{row['tokens_per_second']:.0f}"]
        assert printed in [line[:3] for line in rows]


def test_a_rank_that_fits_no_layer_ends_the_program(small, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        benchmark.main([*SMALL, "--rank", "999"])
    assert capsys.readouterr().err.startswith("error: lora: rank is 999")


def test_layers_cut_a_shape_alone(small, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([*SMALL, "--model", "DIR"])
    assert "--layers goes with --shape" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["--rounds", "1"], "--rounds: '1', expected int >= 2"),
    (["--warmup", "-1"], "--warmup: '-1', expected int >= 0"),
    (["--length", "1"], "--length: '1', expected int >= 2"),
    (["--device", "tray"], "--device tray: Expected one of cpu"),
    (["--out", "no/file.json"], "--out is no/file.json; expected a file in a folder that exists"),
    (["--model", "/no/folder"], "/no/folder: no such folder")])
def test_wrong_options_end_with_one_line(words, message, capsys):
    given = SMALL[:2] if "--model" in words else SMALL
    with pytest.raises(SystemExit) as end:
        benchmark.main([*given, *words])
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_rows_share_the_frozen_weights_alone(small):
    options, base = small("--shape", "minilm")
    one, other = (benchmark.copy_of(base) for _ in range(2))
    for (name, p), q in zip(one.named_parameters(), other.parameters()):
        assert p is not q and (p.data_ptr() == q.data_ptr()) == (not name.startswith("classifier"))
    add_lora(one)
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("name", ["minilm", "t5-base", "smollm2"])
def test_the_floor_reaches_the_first_layer_without_an_adapter(small, name, monkeypatch):
    options, base = small("--shape", name)
    run, closure = benchmark.prepared("floor", base, options)
    first, outputs = (run.model.encoder or run.model.decoder).blocks[0].attention.q, []
    first.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    monkeypatch.setattr(LoRALinear, "forward", None)
    before = [p.detach().clone() for p in run.model.parameters()]
    benchmark.FLOORS["floor"].step(run, closure)
    assert len(outputs) == 1 and outputs[0].grad.count_nonzero() > 0
    assert run.layers == [] and run.descent is None and run.ascent is None
    assert all(p.grad is None and torch.equal(p, q)
               for p, q in zip(run.model.parameters(), before))


def test_the_products_are_those_of_every_linear_layer(small):
    """With the rows of its input, in bfloat16; a tied head is among them.  The first layer's
    queries, keys and values read what needs no gradient."""
    def shapes(name):
        options, base = small("--shape", name, "--bf16")
        run, closure = benchmark.prepared("matmuls", base, options)
        benchmark.FLOORS["matmuls"].step(run, closure)
        *_, data, batch = closure.args
        found = run.state["products"]
        assert all(t.dtype == torch.bfloat16 for *tensors, _ in found for t in tensors[:3])
        assert all(dy.shape == (len(x), len(W)) and x.shape[1] == W.shape[1]
                   for x, W, dy, _ in found)
        return batch, [(len(x), tuple(W.shape), needed) for x, W, _, needed in found]

    batch, found = shapes("minilm")
    rows = 2 * max(len(ids) for ids, *_ in batch)
    assert found == [*[(rows, (384, 384), False)] * 3, (rows, (384, 384), True),
                     (rows, (1536, 384), True), (rows, (384, 1536), True), (2, (384, 384), True),
                     (2, (2, 384), True)]
    batch, found = shapes("smollm2")
    rows = 2 * max(len(prompt) + len(answer) - 1 for prompt, answer, _ in batch)
    scored = sum(len(answer) for _, answer, _ in batch)
    assert sorted(found) == sorted([
        (rows, (576, 576), False), *[(rows, (192, 576), False)] * 2, (rows, (576, 576), True),
        *[(rows, (1536, 576), True)] * 2, (rows, (576, 1536), True), (scored, (50, 576), True)])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_the_peak_of_the_memory_is_forgotten():
    passing = bytearray(2**28)
    del passing
    before = train_glue.peak_memory("cpu")
    benchmark.forget_peak()
    assert train_glue.peak_memory("cpu") < before - 2**27


def test_a_profile_adds_up_and_keeps_rows_apart(capsys):
    x = torch.ones(1_000_000)
    benchmark.profiled({"one": partial(torch.sin, x), "other": partial(torch.cos, x)}, rows=100)
    head, *lines = capsys.readouterr().out.splitlines()
    table = {name: [float(word) for word in words]
             for name, *words in (line.split() for line in lines if line.startswith("aten"))}
    assert head.split()[-2:] == ["one", "other"]
    assert table["aten::sin"][0] > 0 == table["aten::sin"][1]
    assert table["aten::cos"][1] > 0 == table["aten::cos"][0]
    together = [float(word) for word in lines[-1].split()[1:]]
    for column, whole in enumerate(together):
        shown = [float(line.split()[-2:][column]) for line in lines[:-1]]
        assert sum(shown) == pytest.approx(whole, abs=0.05 * (1 + len(shown)))  # a digit each


def test_a_profile_has_milliseconds_a_step_of_cpu_and_gpu(capsys, monkeypatch):
    """Of five; an operator's children count for themselves; the longest of any row is first."""
    def event(key, cpu, device):
        return SimpleNamespace(key=key, self_cpu_time_total=cpu, self_device_time_total=device,
                               cpu_time_total=10**9)
    kept = [[event("mm", 5000, 15000), event("add", 1000, 0)], [event("copy", 90000, 0)]]
    found, taken = iter(kept), []
    monkeypatch.setattr(benchmark, "profile", lambda: nullcontext(
        SimpleNamespace(key_averages=lambda: next(found))))
    benchmark.profiled({"one": lambda: taken.append(1), "other": lambda: taken.append(2)}, rows=2)
    assert taken == [1] * 5 + [2] * 5
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["ms", "a", "step", "one", "other"], ["copy", "0.0", "18.0"], ["mm", "4.0", "0.0"],
        ["together", "4.2", "18.0"]]


def test_a_profile_times_nothing_else(small, monkeypatch):
    monkeypatch.setattr(benchmark, "profiled", lambda steps: list(steps))
    monkeypatch.setattr(benchmark, "time_rows", None)
    assert benchmark.main([*SMALL, "--profile", "--method", "bi-lora"]) == [
        "lora", "bi-lora", "floor", "matmuls"]


def test_a_rows_numbers_are_medians(small, monkeypatch):
    """Of the seconds, and of the ratios to the first method in the same round."""
    monkeypatch.setattr(benchmark, "memory_alone", lambda name, argv: 2**20)
    seconds = {"lora": [1.0, 2.0, 4.0], "bi-lora": [2.0, 1.0, 12.0]}
    assert benchmark.measured("bi-lora", seconds, 6, []) == {
        "seconds": 2.0, "tokens_per_second": 3.0, "ratio": 2.0, "quartiles": [0.5, 3.0],
        "peak_memory_bytes": 2**20}


def test_the_rows_take_turns():
    order, options = [], SimpleNamespace(warmup=1, rounds=2)
    steps = {name: partial(order.append, name) for name in "abc"}
    seconds = benchmark.time_rows(steps, options)
    assert "".join(order) == "abc" "bca" "cab"
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 2)


def test_the_memory_is_that_of_three_steps(small, monkeypatch, capsys):
    """What came before them is forgotten first; glibc is told to give memory back."""
    order = []
    monkeypatch.setattr(benchmark, "build_step", lambda *_: partial(order.append, "step"))
    monkeypatch.setattr(benchmark, "forget_peak", partial(order.append, "forget"))
    monkeypatch.setattr(benchmark, "peak_memory", lambda device: order.append(device) or 7)
    benchmark.main([*SMALL, "--memory-of", "lora"])
    assert order == ["forget", "step", "step", "step", "cpu"]
    assert json.loads(capsys.readouterr().out) == 7


def test_the_memory_is_that_of_a_process_which_gives_memory_back(monkeypatch):
    def started(command, env, **_):
        assert command[2:] == ["--bf16", "--memory-of", "lora"]
        assert env == {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        return SimpleNamespace(stdout="a warning\n7\n")
    monkeypatch.setattr(subprocess, "run", started)
    assert benchmark.memory_alone("lora", ["--bf16"]) == 7

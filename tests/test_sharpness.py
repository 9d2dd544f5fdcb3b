"""notes/sharpness.py on small runs of both scripts: what it reports, what it leaves alone, what it
refuses.

Oracles: the scores that the run itself wrote; the loss of the merged model; perturbations whose
alignment is known.
"""

import copy
import json
import math
import os
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F

import train_glue
from bilora import lora_layers, merge_lora_, primary_parameters
from test_train_glue import error_of

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
import methods  # noqa: E402
import pictures  # noqa: E402
import sharpness  # noqa: E402

ALL = ["lora", "lora-sam", "bi-lora", "bi-lora-power"]

RUN = ["--limit", "24", "--epochs", "2", "--batch-size", "8", "--device", "cpu", "--jobs", "1",
       "--rho", "0.01", "0.05"]
SMALL = ["--rows", "12", "--directions", "2", "--points", "3", "--grid", "2", "--steps", "2",
         "--radii", "0.1", "0.5", "--alphas", "0", "0.5", "--iterations", "2", "--moments", "2",
         "--batches", "2", "--device", "cpu", "--eval-rows", "3000"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_demos):
    """All four methods with seed 0, two of them with seed 1, with snapshots."""
    path, before = tmp_path_factory.mktemp("runs"), os.getcwd()
    os.chdir(path)
    for names, seed in ((ALL, "0"), (("lora", "lora-sam"), "1")):
        methods.main(["train_glue.py", *RUN, "--method", *names, "--seeds", seed, "--out", "out",
                      "--snapshots", "4", "--lr", "0.01", "--aux-lr", "0.01"])
    yield str(path)
    os.chdir(before)


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def plain_loss(model, rows):
    """The mean cross-entropy of a model that judges sentences, each row by itself."""
    logits = torch.cat([model(torch.tensor([ids])) for ids, *_ in rows])
    return F.cross_entropy(logits, torch.tensor([label for *_, label in rows])).item()


def a_run(method, *options):
    _, options = sharpness.parse_arguments([f"out/{method}-seed0", *SMALL, *options])
    (run,) = sharpness.load_runs(options)
    return run, options


def test_all_parts_of_all_methods(capsys, monkeypatch):
    runs = [*(f"out/{method}-seed0" for method in ALL), "out/lora-sam-seed1"]
    few = [*SMALL, "--ascent-epochs", "1", "--rows", "6", "--iterations", "1", "--steps", "1",
           "--moments", "1", "--batches", "1"]
    rules = sharpness.ascent_rules
    monkeypatch.setattr(sharpness, "ascent_rules", lambda lr: dict([*rules(lr).items()][::3]))
    report = sharpness.main([*runs, *few, "--out", "figures"])
    capsys.readouterr()
    on_disk = json.load(open("figures/demo-sharpness.json"))
    assert on_disk == json.loads(json.dumps(report["demo"]))
    measured = on_disk["measured"]
    assert {part: list(methods) for part, methods in measured.items()} == {
        **{part: ALL for part in ("a", "contour", "b", "c", "d", "e", "g")}, "f": ["bi-lora"]}
    # have a perturbation
    assert {method for method, runs in measured["e"].items() if runs["0"]} == {*ALL[1:]}
    assert [method for method, runs in measured["d"].items() if "ratio" in runs["0"]] == [
        "lora-sam"]
    seeds = {part: len(runs["lora-sam"]) for part, runs in measured.items() if part != "f"}
    assert seeds == {"a": 2, "contour": 1, "b": 2, "c": 2, "d": 2, "e": 2, "g": 2}
    for name in ("landscapes", "contour", "adversarial", "worst-case", "perturbations", "adversity",
                 "ascent", "gap"):
        assert os.path.getsize(f"figures/demo-{name}.png") > 5000
    text = open("figures/demo-sharpness.md").read()
    assert text.count("\n| ") > 40 and "nan" not in text
    assert not [name for name in os.listdir("figures") if name.endswith(".tmp")]
    for part in "abcdeg":  # numbers, all of them finite
        text = json.dumps(measured[part])
        assert "NaN" not in text and "Infinity" not in text, part

    def measured_again(*_):
        raise AssertionError("was there already")
    monkeypatch.setattr(sharpness, "DRAWINGS",
                        {part: (name, print) for part, (name, _) in sharpness.DRAWINGS.items()})
    monkeypatch.setattr(sharpness, "MEASURES",
                        {part: measured_again for part in sharpness.MEASURES})
    again = sharpness.main([*runs, *few, "--out", "figures"])
    assert again["demo"]["tables"] == report["demo"]["tables"]
    # with its own settings
    cached = sharpness.main([*runs, "--cached", "--rows", "3", "--out", "redrawn"])["demo"]
    assert cached == again["demo"] and cached["settings"]["c"]["rows"] == 6
    with pytest.raises(AssertionError):
        sharpness.main([*runs, *few, "--out", "figures", "--seed", "1"])


def test_a_picture_with_its_ticks(tmp_path, monkeypatch, ticks):
    """Those that the picture of part c sets itself: the radii, and the methods' names."""
    figures = []

    class Noted(pictures.Figure):
        def __init__(self, **settings):
            super().__init__(**settings)
            figures.append(self)

    monkeypatch.setattr(pictures, "Figure", Noted)
    found = {"radii": [0.1, 0.5], "increase": [0.2, 3.0], "eigenvalue": 2.0}
    runs = {0: {"LoRA": found, "full": found}, 1: {"LoRA": found, "full": found}}
    pictures.draw_c({"lora": runs, "bi-lora": runs}, str(tmp_path / "c.png"))
    assert os.listdir(tmp_path) == ["c.png"] and os.path.getsize(tmp_path / "c.png") > 5000
    labels = [[label.get_text() for label in axis.get_xticklabels()] for axis in figures[0].axes]
    assert labels == [["0.1", "0.5"], ["lora", "bi-lora"]] * 2


def test_what_was_measured_goes_with_the_run(tmp_path, monkeypatch, capsys):
    """A run that is made anew in the same folder has no old measurements; mixed settings are not
    drawn together."""
    shutil.copytree("out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    for seed, rows in (("0", "4"), ("1", "5")):
        sharpness.main(
            [f"out/lora-seed{seed}", *SMALL, "--rows", rows, "--parts", "c", "--out", "figures"])
    error = error_of(capsys, ["out", "--cached", "--out", "mixed"], sharpness.main)
    assert "was measured with {'rows'" in error
    assert not os.path.exists("mixed")
    train_glue.main([*RUN, "--method", "lora", "--seeds", "1", "--out", "out", "--overwrite",
                     "--snapshots", "4", "--lr", "0.01", "--aux-lr", "0.01"])
    assert os.path.exists("out/lora-seed0/sharpness.json")
    assert not os.path.exists("out/lora-seed1/sharpness.json")


def test_mean_and_standard_error_over_seeds():
    report = sharpness.main(["out", *SMALL, "--rows", "6", "--steps", "1", "--iterations", "1",
                             "--parts", "c", "--out", "other"])["demo"]
    values = {m: [r["full"]["eigenvalue"] for r in runs.values()]
              for m, runs in report["measured"]["c"].items()}
    entry = report["tables"]["c"]["full space, largest eigenvalue"]
    one, two = values["lora-sam"]
    assert entry["lora-sam"]["value"]["mean"] == pytest.approx((one + two) / 2)
    assert entry["lora-sam"]["value"]["stderr"] == pytest.approx(abs(one - two) / 2)
    differences = [a - b for a, b in zip(values["lora-sam"], values["lora"])]
    assert entry["lora-sam"]["difference"]["mean"] == pytest.approx(sum(differences) / 2)
    assert "difference" not in entry["lora"]


@pytest.mark.parametrize("method", ["lora-sam", "bi-lora", "bi-lora-power"])
def test_centre_and_scores_are_those_of_the_merged_model(method):
    run, options = a_run(method)
    a, b = sharpness.measure_a(run, options), sharpness.measure_b(run, options)
    model = merge_lora_(copy.deepcopy(run.model))
    loss = plain_loss(model, run.sample)
    metrics = json.load(open(f"out/{method}-seed0/metrics.json"))["metrics"]
    for space in ("LoRA", "full"):
        for row in a[space]["losses"]:
            assert row[1] == pytest.approx(loss, rel=1e-5) and row[0] != row[1]
        assert b[space]["loss"][0] == pytest.approx(loss, rel=1e-5)
        assert b[space]["accuracy"][0] == pytest.approx(metrics["accuracy"], abs=1e-12)
        assert b[space]["loss"][1] != b[space]["loss"][0]
    assert a["LoRA"]["losses"][0] != a["LoRA"]["losses"][1]


def test_scores_are_those_at_the_moved_weights():
    """Part b at an alpha that changes them, beside a copy of the model whose frozen weights were
    moved by hand."""
    run, options = a_run("lora")
    options.alphas = [0.0, 60.0]
    found, rows = sharpness.measure_b(run, options)["full"], run.data.sets["dev"]
    model = copy.deepcopy(run.model)
    weights = [layer.weight.requires_grad_(True) for layer in run.layers]
    sum(loss() for loss in run.losses(run.sample)).backward()
    total = math.sqrt(sum(w.grad.square().sum().item() for w in weights))
    for layer, w in zip(lora_layers(model), weights):
        layer.weight.data += 60.0 * w.grad / total
    predictions = train_glue.predict(run.args, model, run.data, rows)
    right = [p == label for p, (*_, label) in zip(predictions, rows)]
    assert found["accuracy"] == [pytest.approx(found["accuracy"][0]),
                                 pytest.approx(sum(right) / len(right))]
    assert found["loss"][1] == pytest.approx(plain_loss(model, run.sample), rel=1e-4)
    assert found["loss"][1] > 1.5 * found["loss"][0]


def test_gap_is_that_of_the_two_losses():
    """At the last snapshot, the run's own score, and losses of the merged model."""
    run, options = a_run("bi-lora")
    found, model = sharpness.measure_g(run, options), merge_lora_(copy.deepcopy(run.model))
    losses = [plain_loss(model, rows) for rows in (run.sample, run.data.sets["dev"])]
    assert found["step"] == [2, 6]
    assert found["training loss"][-1] == pytest.approx(losses[0], rel=1e-5)
    assert found["evaluation loss"][-1] == pytest.approx(losses[1], rel=1e-5)
    assert found["gap"][-1] == pytest.approx(losses[1] - losses[0], abs=1e-5)
    metrics = json.load(open("out/bi-lora-seed0/metrics.json"))["metrics"]
    assert found["evaluation score"][-1] == metrics["accuracy"]


def test_full_space_is_every_adapted_weight():
    run, options = a_run("bi-lora")
    params, weights = run.space("full")
    merged = merge_lora_(copy.deepcopy(run.model))
    names = [name for name, module in run.model.named_modules() if module in run.layers]
    for w, base, name in zip(weights, params, names, strict=True):
        torch.testing.assert_close(w, merged.get_submodule(name).weight, rtol=1e-6, atol=1e-7)
        assert base is run.model.get_submodule(name).weight and not torch.equal(w, base)
    found, losses = sharpness.measure_c(run, options), run.losses(run.sample)
    for space, tensors in (("full", params), ("LoRA", primary_parameters(run.model))):
        assert found[space]["increase"] == pytest.approx(
            [sharpness.worst_case(losses, tensors, rho, 2) for rho in (0.1, 0.5)], rel=1e-4)
        value, _ = sharpness.top_eigenvalue(losses, tensors, 2, run.generator())
        assert found[space]["eigenvalue"] == pytest.approx(value, rel=1e-4)
    assert found["full"]["increase"] != found["LoRA"]["increase"]


def test_adversarial_direction_is_the_gradient():
    """Eq. (A22): in each space the loss at a small alpha has risen by alpha ||g||."""
    run, options = a_run("lora")
    options.alphas = [0.0, 1e-3]
    found = sharpness.measure_b(run, options)
    for space in ("LoRA", "full"):
        params, _ = run.space(space)
        for p in params:
            p.requires_grad_(True).grad = None
        sum(loss() for loss in run.losses(run.sample)).backward()
        slope = math.sqrt(sum(p.grad.square().sum().item() for p in params))
        rise = found[space]["loss"][1] - found[space]["loss"][0]
        assert rise == pytest.approx(1e-3 * slope, rel=0.02), space


@pytest.mark.parametrize("part", ["a", "contour", "b", "c"])
def test_weights_are_restored_bit_for_bit(part):
    run, options = a_run("bi-lora")
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    sharpness.MEASURES[part](run, options)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    trained = list(train_glue.trained_tensors(run.model))
    assert [name for name, p in run.model.named_parameters() if p.requires_grad] == trained
    assert not any("weight" in name and "classifier" not in name for name in trained)


def test_snapshots_are_the_training_runs_weights():
    """The first is the fresh adapter; the last holds the adapter that was saved, and the auxiliary
    pair after the clip."""
    run, _ = a_run("bi-lora")
    at_end = [p.detach().clone() for p in primary_parameters(run.model)]
    steps = [step for step, _ in run.snapshots()]
    assert steps == [0, 2, 4, 6]
    run.put(run.snapshots()[0][1])
    assert all(layer.lora_B.abs().max() == 0 and layer.aux_B.abs().max() == 0
               for layer in run.layers)
    run.put(run.snapshots()[-1][1])
    assert all(torch.equal(p, q) for p, q in zip(primary_parameters(run.model), at_end))
    c = math.sqrt(sum((layer.aux_B @ layer.aux_A).square().sum().item() for layer in run.layers))
    last = json.loads(open("out/bi-lora-seed0/log.jsonl").read().splitlines()[-1])
    assert c == pytest.approx(min(last["perturbation"], 0.05), rel=1e-4) and c > 0


@pytest.mark.parametrize("sign, of", [(1, "batch"), (-1, "batch"), (1, "sample"), (1, "fresh")])
def test_sams_own_perturbation_is_fully_adversarial(sign, of, monkeypatch):
    """Where the method's perturbation is +-rho G / ||G||, its cosine is +-1 and its gain near +-1,
    of the batch or over the sample."""
    run, options = a_run("bi-lora")

    def sam(run, batch):
        losses = run.losses({"batch": batch, "sample": run.sample, "fresh": run.fresh}[of])
        weights = [layer.weight.requires_grad_(True) for layer in run.layers]
        grads = torch.autograd.grad(sum(loss() for loss in losses), weights)
        total = math.sqrt(sum(g.square().sum().item() for g in grads))
        for w in weights:
            w.requires_grad_(False)
        return [sign * 1e-3 * g / total for g in grads], []

    monkeypatch.setattr(sharpness, "perturbation", sam)
    found = sharpness.measure_e(run, options)
    assert len(found["step"]) == 2 and found["norm"] == pytest.approx([1e-3] * 2, rel=1e-4)
    assert found[f"cosine_{of}"] == pytest.approx([sign] * 2, rel=1e-5)
    assert found[f"gain_{of}"] == pytest.approx([sign] * 2, rel=0.05)
    for other in {"batch", "sample", "fresh"} - {of}:
        assert max(map(abs, found[f"cosine_{other}"])) < 0.999
    texts = [tuple(ids) for ids, *_ in run.rows]
    assert len(run.fresh) == 12 and not any(tuple(ids) in texts for ids, *_ in run.fresh)
    assert max(map(abs, found["random_cosine_batch"])) < 0.05
    assert all(0 < share < 1 for share in found["reach"] + found["best_rank"])


def effective_rank_by_svd(matrices):
    """exp of the entropy of the singular values' shares, weighted by ||.||^2."""
    total, weight = 0.0, 0.0
    for matrix in matrices:
        sigma = torch.linalg.svdvals(matrix.double())
        p = sigma[sigma > 1e-6 * sigma[0]] / sigma.sum()
        total += sigma.square().sum().item() * math.exp(-(p * p.log()).sum().item())
        weight += sigma.square().sum().item()
    return total / weight


def test_bi_loras_perturbation_is_what_training_adds():
    """The layer in training mode minus the layer in eval mode, at the identity; over training,
    cosines of dense products."""
    run, options = a_run("bi-lora")
    steps, pairs = [path for _, path in run.snapshots()], []
    for path in steps:
        run.put(path)
        eps, moves = sharpness.perturbation(run, run.batches[0])
        assert not any(move.any() for move in moves)
        for layer, e in zip(run.layers, eps):
            eye = torch.eye(layer.in_features)
            torch.testing.assert_close(e.T, layer.train()(eye) - layer.eval()(eye), rtol=1e-3,
                                       atol=1e-6)
        primary = torch.cat([layer.delta().detach().flatten() for layer in run.layers])
        pairs.append((primary, torch.cat([e.flatten() for e in eps])))
    found = sharpness.measure_d(run, options)

    def cosine(a, b):
        return pytest.approx(F.cosine_similarity(a, b, dim=0).item(), rel=1e-3, abs=1e-5)
    for i in (1, 2, 3):
        assert found["primary"][i] == cosine(pairs[i][0], pairs[3][0])
        assert found["auxiliary"][i] == cosine(pairs[i][1], pairs[3][1])
        assert found["between"][i] == cosine(*pairs[i])
    run.put(steps[2])
    products = [layer.aux_delta().detach() for layer in run.layers]
    assert found["rank"][0] is None and found["rank"][2] == pytest.approx(
        effective_rank_by_svd(products), rel=1e-4)


def test_lora_sams_perturbation_is_eq_4():
    """rho g / ||g|| of B1 and A1, and what this is in W; the model is left as it was."""
    run, _ = a_run("lora-sam")
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    eps, moves = sharpness.perturbation(run, run.batches[0])
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    params = primary_parameters(run.model)
    grads = torch.autograd.grad(sum(loss() for loss in run.losses(run.batches[0])), params)
    total = math.sqrt(sum(g.square().sum().item() for g in grads))
    expected = [0.01 * g / total for g in grads]
    for move, right in zip(moves, expected, strict=True):
        torch.testing.assert_close(move, right, rtol=1e-3, atol=1e-7)
    for layer, e, B, A in zip(run.layers, eps, expected[::2], expected[1::2], strict=True):
        moved = layer.scale * ((layer.lora_B + B) @ (layer.lora_A + A)
                               - layer.lora_B @ layer.lora_A)
        torch.testing.assert_close(e, moved.detach(), rtol=1e-3, atol=1e-7)
    terms = []  # Eq. (5), of each layer
    for layer, B, A in zip(run.layers, expected[::2], expected[1::2], strict=True):
        first = layer.lora_B @ A + B @ layer.lora_A
        terms.append((first.detach().norm().item(), (B @ A).norm().item()))
    found = sharpness.measure_d(run, sharpness.parse_arguments(["out"])[1])
    assert found["layers"][0] == [None] * len(terms) and found["ratio"][0] is None
    assert found["layers"][-1] == pytest.approx([one / three for one, three in terms], rel=1e-3)
    firsts, thirds = map(torch.tensor, zip(*terms))
    assert found["ratio"][-1] == pytest.approx((firsts.norm() / thirds.norm()).item(), rel=1e-3)


def test_the_watched_ascent_trains_as_the_script_does(monkeypatch):
    """Plain ascent at eta2 = eta1 is --method bi-lora: the last pair it sees is one step before the
    run's last."""
    run, options = a_run("bi-lora", "--parts", "f")
    rules = sharpness.ascent_rules(0.01)
    monkeypatch.setattr(sharpness, "ascent_rules", lambda lr: {
        name: rules[name] for name in ("plain, eta2 = eta1", "power rule")})
    found = sharpness.measure_f(run, options)
    assert len(found) == 2 and all(len(rows["rank"]) == 6 for rows in found.values())
    plain = found["plain, eta2 = eta1"]
    assert 0.9 < plain["final"][-1] < 1 and plain["rank"][0] is None  # B2 = 0 before the first step
    steps = [step for step, _ in run.snapshots()]
    run.put(run.snapshots()[2][1])
    assert steps[2] == 4
    assert sharpness.effective_rank(run.auxiliary()) == pytest.approx(plain["rank"][4], rel=1e-5)
    eps = {}
    for step, path in run.snapshots()[1:]:
        run.put(path)
        eps[step] = torch.cat([layer.aux_delta().detach().flatten() for layer in run.layers])
    assert plain["lag 2"][4] == pytest.approx(F.cosine_similarity(eps[4], eps[2], dim=0).item(),
                                              rel=1e-3)
    assert plain["lag 1"][4] != pytest.approx(plain["lag 2"][4], rel=1e-3)
    assert plain["final"][4] == pytest.approx(F.cosine_similarity(eps[4], eps[6], dim=0).item(),
                                              rel=1e-3)
    run.put(run.snapshots()[2][1])
    weights = [layer.weight.requires_grad_(True) for layer in run.layers]
    G = torch.cat([g.flatten() for g in torch.autograd.grad(
        sum(loss() for loss in run.losses(run.sample)), weights)])
    assert plain["cosine_sample"][4] == pytest.approx(F.cosine_similarity(eps[4], G, dim=0).item(),
                                                      rel=1e-2, abs=1e-4)


def test_runs_of_the_other_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    methods.main(["train_gsm8k.py", "--limit", "6", "--eval-limit", "3", "--max-new-tokens", "4",
                  "--epochs", "1", "--jobs", "1", "--method", "bi-lora", "--seeds", "0",
                  "--snapshots", "2", "--device", "cpu", "--out", "out"])
    small = [*SMALL[:-2], "--rows", "4"]
    report = sharpness.main(["out", *small, "--parts", "b", "c", "e", "g", "--out", "figures"])
    assert list(report) == ["gsm8k-demo"] and report["gsm8k-demo"]["measured"].keys() == {*"bceg"}
    assert report["gsm8k-demo"]["measured"]["b"]["bi-lora"][0]["full"]["no_marker"] == [1.0, 1.0]
    run, _ = a_run("bi-lora", "--rows", "4")
    total, tokens = 0.0, 0
    for prompt, answer, _ in run.sample:
        logits = run.model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]
        total += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        tokens += len(answer)
    assert sum(loss() for loss in run.losses(run.sample)).item() == pytest.approx(total / tokens)
    lengths = [len(prompt + answer) for prompt, answer, _ in run.batches[0]]
    assert lengths == sorted(len(prompt + answer) for prompt, answer, _ in run.rows)


@pytest.mark.parametrize("argv, named", [
    (["nowhere"], "nowhere"), (["empty"], "no finished run"), (["out", "--parts", "z"], "'z'"),
    (["out", "--rows", "0"], "'0'"), (["out", "--points", "4"], "odd"),
    (["bare"], "no snapshots"), (["other"], "the run read"), (["broken"], "not a JSON object"),
    (["older"], "no 'files'"),
    (["torn"], "not a snapshot"), (["foreign"], "other tensors"),
    (["unknown"], "the method is 'mine'; expected one of lora, ")])
def test_wrong_input_is_one_line(argv, named, capsys, folder):
    os.makedirs("empty", exist_ok=True)
    for name in ("bare", "other", "broken", "older", "torn", "foreign", "unknown"):
        shutil.rmtree(name, ignore_errors=True)
        shutil.copytree("out/lora-seed0", name, ignore=shutil.ignore_patterns("sharpness.json"))
    shutil.rmtree("bare/snapshots")
    config = json.load(open("other/config.json"))
    config["files"][0][1] += 1
    json.dump(config, open("other/config.json", "w"))
    config = json.load(open("older/config.json"))
    del config["files"], config["momentum"]
    json.dump(config, open("older/config.json", "w"))
    json.dump({**json.load(open("unknown/config.json")), "method": "mine"},
              open("unknown/config.json", "w"))
    open("broken/config.json", "w").write("[")
    open("torn/snapshots/step-000006.pt", "w").write("torn")
    torch.save({}, "foreign/snapshots/step-000006.pt")
    if argv[0] in ("bare", "torn", "foreign"):
        argv = [*argv, "--parts", "d"]
    assert named in error_of(capsys, [*argv, "--out", "nothing"], sharpness.main)
    assert not os.path.exists("nothing")


def test_two_settings_of_a_method_need_names(tmp_path, monkeypatch, capsys):
    """Under their names, in the order of the command line; the first one is lora's."""
    shutil.copytree("out", tmp_path / "out")
    shutil.copytree("out/lora-sam-seed0", tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert "its name in the tables is 'lora-sam', seed 0, as that of out/lora-sam-seed0; " \
        "expected NAME=RUN" in error_of(capsys, ["out", "other", "--out", "f"], sharpness.main)
    assert not os.path.exists("f")
    argv = ["lora=out/lora-seed0", "mine=other", "out/lora-sam-seed0", *SMALL, "--parts", "c"]
    report = sharpness.main([*argv, "--out", "f"])["demo"]
    runs = sharpness.load_runs(sharpness.parse_arguments(
        ["one=out/bi-lora-seed0", "two=out/bi-lora-seed0", "out/lora-seed0"])[1])
    options = runs[0].options
    assert [sharpness.wanted(run, "f", runs, options) for run in runs] == [True, False, False]
    assert [*report["measured"]["c"]] == [*report["tables"]["scores"]["accuracy"]] == [
        "lora", "mine", "lora-sam"]
    rows = report["tables"]["c"]["full space, largest eigenvalue"]
    assert rows["mine"] == rows["lora-sam"] and rows["mine"]["difference"]["mean"] != 0
    head = next(line for line in open("f/demo-sharpness.md") if line.startswith("| c "))
    assert head == "| c | lora | mine | lora-sam |\n"


def test_runs_without_adapters_are_left_out_by_name(tmp_path, capsys):
    for name, files in (("lora", ("adapter_config.json",)), ("full", ())):
        (tmp_path / name).mkdir()
        for file in ("log.jsonl", "metrics.json", *files):
            (tmp_path / name / file).write_text("{}")
    assert sharpness.run_folders(str(tmp_path)) == [str(tmp_path / "lora")]
    assert "full: left out; it has no adapter" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no finished run"):
        sharpness.run_folders(str(tmp_path / "full"))

"""The methods of notes/methods.py that are not the paper's, against their update rules.

Oracles: the rules written out in float64 on the gradients of torch's autograd, and the property of
each method that published versions of it break.  Steps are taken on a small network in float64,
those that read logits or rows on a tiny BERT, T5 and Llama.
"""

import json
import math
import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_glue
import train_gsm8k
from bilora import (add_lora, auxiliary_parameters, bilora_optimizers, lora_sam_step,
                    perturbation_norm, primary_parameters)
from test_text_to_text import golden
from test_model import bert
from test_steps import adapted, assert_same_bits, closure_of, snapshot
from train_glue import METHODS, TASKS

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
import methods  # noqa: E402
import sharpness  # noqa: E402

OURS = [name for name in methods.METHODS if name not in ("lora", "lora-sam", "bi-lora")]
close = dict(rtol=1e-6, atol=1e-9)  # norms and factors are of float32's precision


def run_of(net, rho=0.1, lr=0.1, steps=10, optimizer=torch.optim.SGD):
    """What `prepare` returns; its descent takes plain gradient steps."""
    _, ascent = bilora_optimizers(net, lr)
    descent = optimizer(primary_parameters(net), lr=lr)
    return SimpleNamespace(model=net, layers=layers_of(net), descent=descent, ascent=ascent,
                           rho=rho, seed=3, log=[], steps=steps, state={}, args=arguments())


def layers_of(net):
    return [net.first, net.shared, net.last]


def take(name, run, closure):
    logged = METHODS[name].step(run, closure)
    run.log.append(logged)
    return logged


def gradient_at(net, batch, params):
    loss = F.cross_entropy(net(batch[0]), batch[1])
    return torch.autograd.grad(loss, params)


def norm(tensors):
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def assert_all_close(found, expected):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, **close, msg=lambda text: f"parameter {i}: {text}")


def counted(closure):
    def counting():
        counting.calls += 1
        return closure()
    counting.calls = 0
    return counting


# ------------------------------------------------------------------------------------------ passes

@pytest.mark.parametrize("name", ["flat-lora", "rwp-full", "rwp-lora", "s2sam", "obar", "nbar",
                                  "two-pairs", "no-clip", "layer-clip", "noise-fresh",
                                  "noise-kept"])
def test_one_pass_and_whatever_is_frozen_comes_back_bit_for_bit(batch, name):
    """Over several steps, with one half-sized base weight: published versions move it."""
    net = adapted(aux_rank=2 if METHODS[name].auxiliary else 0)
    base = {key: t.clone() for key, t in net.state_dict().items() if "lora" not in key
            and "aux" not in key}
    run, closure = run_of(net), counted(closure_of(net, batch))
    before = snapshot(net)
    for _ in range(20):
        assert math.isfinite(take(name, run, closure)["loss"])
    assert closure.calls == 20
    for key, t in base.items():
        assert torch.equal(net.state_dict()[key], t), key
    assert not torch.equal(net.first.lora_B, before["first.lora_B"])


def test_the_noise_of_flat_lora_leaves_a_bfloat16_base_bit_for_bit(batch):
    net = adapted().float()
    for layer in layers_of(net):
        layer.weight.data = layer.weight.data.bfloat16()
        layer.bias.data = layer.bias.data.bfloat16()
    net.head.bfloat16()
    base = [layer.weight.clone() for layer in layers_of(net)]
    run, x = run_of(net, rho=0.5, steps=1000), (batch[0].bfloat16(), batch[1])
    for _ in range(1000):
        take("flat-lora", run, closure_of(net, x))
    assert all(torch.equal(layer.weight, W) for layer, W in zip(layers_of(net), base))


# --------------------------------------------------------------------------- random perturbations

@pytest.mark.parametrize("name", ["flat-lora", "rwp-full", "rwp-lora"])
def test_random_perturbations(batch, name):
    """The gradient is that at the perturbed point, which the closure sees; the noise has the
    standard deviation of the rule."""
    net = adapted()
    params, stds = primary_parameters(net), []
    run = run_of(net, rho=0.3)
    run.log = [{}] * 4  # step 4 of 10
    moving = params if name == "rwp-lora" else [layer.weight for layer in layers_of(net)]
    old, start, seen = [t.clone() for t in moving], [p.clone() for p in params], []

    def closure():
        seen.append([t.detach().clone() for t in moving])
        return closure_of(net, batch)()

    f = (1 - math.cos(math.pi * 0.4)) / 2
    for layer, t in zip(layers_of(net), moving):
        W = layer.weight + 3.0 * layer.lora_B @ layer.lora_A
        stds.append(f * 0.3 * W.norm(dim=1, keepdim=True) / math.sqrt(W.shape[1]))
    if name != "flat-lora":
        stds = [torch.tensor(0.3)] * len(moving)
    take(name, run, closure)
    ((*at,),) = seen
    z = torch.cat([((a - b) / std).flatten() for a, b, std in zip(at, old, stds)])
    assert abs(z.mean()) < 4 / math.sqrt(len(z)) and abs(z.std() - 1) < 4 / math.sqrt(2 * len(z))
    assert run.log[-1]["perturbation"].item() == pytest.approx(
        norm([a - b for a, b in zip(at, old)]), rel=1e-5)
    other = adapted()
    places = primary_parameters(other) if name == "rwp-lora" else [
        layer.weight for layer in layers_of(other)]
    with torch.no_grad():
        for t, value in zip(places, at):
            t.copy_(value)
    g = gradient_at(other, batch, primary_parameters(other))
    assert_all_close(params, [p - 0.1 * x for p, x in zip(start, g)])
    again = adapted()
    run2 = run_of(again, rho=0.3)
    run2.log = [{}] * 4
    take(name, run2, closure_of(again, batch))
    assert all(torch.equal(a, b) for a, b in zip(primary_parameters(again), params))


@pytest.mark.parametrize("name", ["flat-lora", "rwp-full", "rwp-lora", "noise-fresh"])
def test_the_noise_is_one_for_all_micro_batches_and_not_the_dropouts(batch, name):
    """Two halves of a batch see the same point; another step, another one; the stream that dropout
    masks are drawn from is untouched."""
    net = adapted(aux_rank=2 if METHODS[name].auxiliary else 0)
    run, seen = run_of(net), []

    def closure():
        for half in (slice(0, 4), slice(4, 8)):
            seen.append(torch.cat([t.detach().flatten() for t in net.state_dict().values()]))
            loss = F.cross_entropy(net(batch[0][half]), batch[1][half]) / 2
            loss.backward()
        return loss

    state = torch.get_rng_state()
    take(name, run, closure)
    assert torch.equal(torch.get_rng_state(), state)
    run.descent.param_groups[0]["lr"] = 0.0
    take(name, run, closure)
    take(name, run, closure)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[2], seen[4])


def test_the_rows_of_flat_loras_noise_have_their_own_size(batch):
    """The same normal numbers as RWP's, each row times f rho ||W_i|| / sqrt(n)."""
    moves = {}
    for name in ("rwp-full", "flat-lora"):
        net = adapted()
        run, layers = run_of(net, rho=0.3), layers_of(net)
        run.log = [{}] * 5  # f = 1 / 2
        old = [layer.weight.clone() for layer in layers]
        sizes = [(layer.weight + 3.0 * layer.lora_B @ layer.lora_A).norm(dim=1, keepdim=True)
                 / math.sqrt(layer.in_features) for layer in layers]

        def closure():
            moves[name] = [layer.weight.clone() - W for layer, W in zip(layers, old)]
            return closure_of(net, batch)()
        take(name, run, closure)
    expected = [0.5 * size * move for size, move in zip(sizes, moves["rwp-full"])]
    for i, (a, b) in enumerate(zip(moves["flat-lora"], expected)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8, msg=f"layer {i}")


def test_flat_lora_begins_without_noise(batch):
    net, plain = adapted(), adapted()
    assert take("flat-lora", run_of(net), closure_of(net, batch))["perturbation"] == 0
    take("lora", run_of(plain), closure_of(plain, batch))
    assert_all_close(primary_parameters(net), primary_parameters(plain))


# ------------------------------------------------------------------------------- relatives of SAM

def test_s2sam_uses_the_gradient_of_the_step_before(batch):
    net = adapted()
    params, run = primary_parameters(net), run_of(net, rho=0.2)
    old = [torch.zeros_like(p) for p in params]
    for step in range(3):
        other = adapted()
        size = norm(old)
        with torch.no_grad():
            for p, value, g in zip(primary_parameters(other), params, old):
                p.copy_(value + (0.2 * g / size if size > 0 else 0))
        g = gradient_at(other, batch, primary_parameters(other))
        expected = [p.detach() - 0.1 * x for p, x in zip(params, g)]
        logged = take("s2sam", run, closure_of(net, batch))
        assert float(logged["perturbation"]) == pytest.approx(0.2 if step else 0.0)
        assert_all_close(params, expected)
        old = g


def test_s2sam_with_a_constant_gradient_is_sam_from_the_second_step_on():
    """The loss <a, w> + a quadratic would bend it; <a, w> alone has one gradient everywhere."""
    torch.manual_seed(0)
    net = adapted()
    slopes, points = [torch.randn_like(p) for p in primary_parameters(net)], []

    def closure():
        points.append([p.detach().clone() for p in primary_parameters(net)])
        loss = sum((a * p).sum() for a, p in zip(slopes, primary_parameters(net)))
        loss.backward()
        return loss

    run = run_of(net, rho=0.2)
    take("s2sam", run, closure)
    start = [p.detach().clone() for p in primary_parameters(net)]
    take("s2sam", run, closure)
    take("lora-sam", run, closure)
    eps = [0.2 * a / norm(slopes) for a in slopes]
    assert_all_close([a - b for a, b in zip(points[1], start)], eps)
    assert_all_close([a - b for a, b in zip(points[3], points[2])], eps)


def test_looksam(batch):
    """Each fifth step is LoRA-SAM's; gv is orthogonal to g; the others take one pass."""
    net, plain = adapted(), adapted()
    params, run = primary_parameters(net), run_of(net, rho=0.2, steps=7)
    closure, first = counted(closure_of(net, batch)), gradient_at(net, batch, params)
    take("looksam", run, closure)
    take("lora-sam", run_of(plain, rho=0.2), closure_of(plain, batch))
    assert_all_close(params, [p.detach() for p in primary_parameters(plain)])
    gv = run.state["gv"]
    assert sum((a * b).sum() for a, b in zip(first, gv)).abs() < 1e-6 * norm(first) * norm(gv)
    assert norm(gv) > 1e-3
    for _ in range(6):
        start, g = [p.detach().clone() for p in params], gradient_at(net, batch, params)
        reuse = len(run.log) % 5 != 0
        take("looksam", run, closure)
        if reuse:
            factor = 0.7 * norm(g) / norm(run.state["gv"])
            assert_all_close(params, [p - 0.1 * (a + factor * v)
                                      for p, a, v in zip(start, g, run.state["gv"])])
    assert closure.calls == 7 + 2  # steps 0 and 5 take two


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.8])
def test_wsam(batch, gamma):
    net = adapted()
    params, run = primary_parameters(net), run_of(net, rho=0.2)
    start, g = [p.detach().clone() for p in params], gradient_at(net, batch, params)
    other = adapted()
    with torch.no_grad():
        for p, a in zip(primary_parameters(other), g):
            p.add_(a, alpha=0.2 / norm(g))
    gs = gradient_at(other, batch, primary_parameters(other))
    methods.wsam(run, closure_of(net, batch), gamma)
    mixed = [((1 - 2 * gamma) * a + gamma * b) / (1 - gamma) for a, b in zip(g, gs)]
    assert_all_close(params, [p - 0.1 * x for p, x in zip(start, mixed)])


@pytest.mark.parametrize("name", ["obar", "nbar"])
def test_bar_scales_the_factors_before_the_step(batch, name):
    net = adapted()
    with torch.no_grad():
        net.first.lora_A.mul_(3)  # so that each rule goes up on either side somewhere
        net.last.lora_B.mul_(3)
    params, run = primary_parameters(net), run_of(net)
    start = [p.detach().clone() for p in params]
    g, expected, ups = gradient_at(net, batch, params), [], set()
    for i in range(0, len(params), 2):
        (B, A), (gB, gA) = start[i:i + 2], g[i:i + 2]
        up = gA.norm() >= gB.norm() if name == "nbar" else A.norm() < B.norm()
        ups.add(bool(up))
        sign = 1 if up else -1
        expected += [B * (1 - sign * 0.25 * 0.1) - 0.1 * gB, A * (1 + sign * 0.25 * 0.1) - 0.1 * gA]
    take(name, run, closure_of(net, batch))
    assert_all_close(params, expected)
    assert ups == {True, False}


# ----------------------------------------------------------------------------------- ablations

def test_two_descending_pairs(batch):
    """Both step down, the second one under the clip; with the auxiliary rate 0 it is LoRA."""
    net = adapted(aux_rank=2)
    layers, run = layers_of(net), run_of(net, rho=50.0)
    params = [*primary_parameters(net), *auxiliary_parameters(net)]
    start, g = [p.detach().clone() for p in params], gradient_at(net, batch, params)
    take("two-pairs", run, closure_of(net, batch))
    assert_all_close(params, [p - 0.1 * x for p, x in zip(start, g)])
    run.rho = 0.5
    take("two-pairs", run, closure_of(net, batch))
    assert perturbation_norm(layers).item() == pytest.approx(0.5)

    still = adapted(aux_rank=2)
    plain = adapted()
    run = run_of(still)
    run.ascent.param_groups[0]["lr"] = 0.0
    with torch.no_grad():
        for p in auxiliary_parameters(still):
            p.zero_()
        for p, q in zip(primary_parameters(plain), primary_parameters(still)):
            p.copy_(q)
    take("two-pairs", run, closure_of(still, batch))
    take("lora", run_of(plain), closure_of(plain, batch))
    assert_all_close(primary_parameters(still), primary_parameters(plain))


def test_no_clip_is_bi_lora_with_an_infinite_radius_bit_for_bit(batch):
    a, b = adapted(aux_rank=2), adapted(aux_rank=2)
    free, wide = run_of(a, rho=0.1), run_of(b, rho=math.inf)
    for _ in range(4):
        take("no-clip", free, closure_of(a, batch))
        take("bi-lora", wide, closure_of(b, batch))
    assert_same_bits(a, b.state_dict())
    assert perturbation_norm(layers_of(a)) > 1


def test_a_clip_per_layer(batch):
    net = adapted(aux_rank=2)
    take("layer-clip", run_of(net, rho=0.3), closure_of(net, batch))
    for layer in layers_of(net):
        assert perturbation_norm([layer]).item() == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["noise-fresh", "noise-kept"])
def test_noise_in_place_of_the_ascent(batch, name):
    """c is rho exactly; LoRA's gradient at W + s B2 A2; drawn anew, or once."""
    net, products = adapted(aux_rank=2), []
    run = run_of(net, rho=0.4)
    for _ in range(3):
        start = [p.detach().clone() for p in primary_parameters(net)]
        logged = take(name, run, closure_of(net, batch))
        assert float(logged["perturbation"]) == pytest.approx(0.4)
        products.append(net.first.aux_B.detach() @ net.first.aux_A.detach())
        other = adapted(aux_rank=2)
        other.load_state_dict(net.state_dict())
        with torch.no_grad():
            for p, value in zip(primary_parameters(other), start):
                p.copy_(value)
        g = gradient_at(other, batch, primary_parameters(other))
        assert_all_close(primary_parameters(net), [p - 0.1 * x for p, x in zip(start, g)])
    assert torch.equal(products[0], products[2]) == (name == "noise-kept")


# ---------------------------------------------------------------------- what reads logits or rows

def arguments(**more):
    return SimpleNamespace(device="cpu", bf16=False, fsdp=False, micro_batch=None, momentum=0.5,
                           snapshots=0, init="default", dora=False, rslora=False, full_lr=None,
                           **more)


def script_run(kind, aux_rank=0, rho=0.3, targets=None):
    """(run, closure, head) on a tiny classifier, T5 or Llama; the head is trained too."""
    torch.manual_seed(0)
    if kind == "classifier":
        model, script = bert().double(), train_glue
        rows = [([1, 4 + i, 5, 6][:2 + i % 3], [0] * (2 + i % 3), i % 3) for i in range(6)]
        data = SimpleNamespace(task=TASKS["mnli"], answers=None, pad_id=0)
    else:
        model, script = golden(kind).double(), train_gsm8k
        rows = [([7, 8, 9 + i][:1 + i % 3], [5, 6, 4 + i][:1 + (i + 1) % 3], None)
                for i in range(5)]
        data = SimpleNamespace(pad_id=0)
    layers = add_lora(model, 2, 4, aux_rank, targets)
    model.double().train()
    head = model.classifier if kind == "classifier" else model.lm_head
    head.requires_grad_(True)
    with torch.no_grad():
        for p in primary_parameters(model):
            p.normal_(std=0.3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    descent, ascent = bilora_optimizers(model, 0.1)
    run = SimpleNamespace(model=model, layers=layers, descent=descent, ascent=ascent, rho=rho,
                          seed=3, log=[], steps=10, state={}, args=arguments())
    return run, partial(script.forward_backward, run.args, model, data, rows), head


def trained_gradients(run):
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def test_head_logits_are_those_of_sam_on_the_head_in_float64():
    """Loss, and gradients of the head, its bias and of what computes the features."""
    torch.manual_seed(0)
    for bias in (True, False):
        body = torch.nn.Linear(5, 4).double()
        head = torch.nn.Linear(4, 3, bias=bias).double()
        x, y = torch.randn(7, 5, dtype=torch.float64), torch.randint(0, 3, (7,))
        params = [*body.parameters(), *head.parameters()]
        H = torch.tanh(body(x))
        loss = F.cross_entropy(methods.head_logits(H, head(H), y, 0.7, bias), y)
        found = torch.autograd.grad(loss, params)
        plain = F.cross_entropy(head(torch.tanh(body(x))), y)
        g = torch.autograd.grad(plain, list(head.parameters()))
        with torch.no_grad():
            for p, a in zip(head.parameters(), g):
                p.add_(a, alpha=0.7 / norm(g))
        moved = F.cross_entropy(head(torch.tanh(body(x))), y)
        assert loss.item() == pytest.approx(moved.item(), rel=1e-12) and moved > plain + 0.1
        for a, b in zip(found, torch.autograd.grad(moved, params)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["classifier", "flan-t5", "llama2"])
def test_head_sam_is_sam_on_the_head_in_one_pass(kind):
    run, closure, head = script_run(kind)
    counting = counted(closure)
    counting.args, counting.func = closure.args, closure.func
    loss = take("head-sam", run, counting)["loss"]
    found = trained_gradients(run)
    assert counting.calls == 1
    assert "logits" not in vars(run.model) and not head._forward_hooks
    run, closure, head = script_run(kind)
    plain = lora_sam_step(run.descent, closure, 0.3, list(head.parameters()))
    expected = trained_gradients(run)
    assert found.keys() == expected.keys() and loss > plain
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5,
                                   msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["classifier", "llama2"])
def test_each_micro_batch_has_its_own_perturbation_of_the_head(kind):
    """Parts of two rows: the sum of what the parts give alone, each with its own targets."""
    run, closure, _ = script_run(kind)
    args, model, data, rows = closure.args
    args.micro_batch = 2
    take("head-sam", run, closure)
    found, expected = trained_gradients(run), {}
    weigh = len if kind == "classifier" else lambda part: sum(len(row[1]) for row in part)
    for start in range(0, len(rows), 2):
        run, closure, _ = script_run(kind)
        part = rows[start:start + 2]
        take("head-sam", run, partial(closure.func, *closure.args[:3], part))
        for name, g in trained_gradients(run).items():
            expected[name] = expected.get(name, 0) + g * weigh(part) / weigh(rows)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("opposite", [False, True])
def test_the_radius_at_which_features_turn(opposite):
    """head_sam.md: along the head, a larger feature helps below rho = ||d|| / sqrt(2), and hurts
    above it.  Rows of one norm, at a right angle or opposite."""
    V = torch.tensor([[0.6, 0.0], [-0.6, 0.0] if opposite else [0.0, 0.6]], dtype=torch.float64)
    d = V[1] - V[0]
    bound = d.norm() / math.sqrt(2)
    torch.testing.assert_close(bound, V.norm() * (1.0 if opposite else math.sqrt(0.5)))
    y = torch.tensor([0, 1, 1, 0, 1])
    for rho in (0.9 * bound, 1.1 * bound):
        a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        H = (2.0 * y - 1)[:, None] * a * d / d.norm()
        Z = methods.head_logits(H, H @ V.T, y, rho, bias=False)
        F.cross_entropy(Z, y).backward()
        margin = (Z[:, 1] - Z[:, 0]) * (2 * y - 1)
        torch.testing.assert_close(margin, (a * (d.norm() - math.sqrt(2) * rho)).expand(5))
        assert (a.grad < 0) == (rho < bound)


def test_the_relative_radius_is_a_share_of_the_heads_norm():
    run, closure, head = script_run("classifier")
    size = head.weight.norm().item()
    assert float(take("head-sam-relative", run, closure)["perturbation"]) == pytest.approx(
        0.3 * size)
    found = trained_gradients(run)
    run, closure, _ = script_run("classifier", rho=0.3 * size)
    take("head-sam", run, closure)
    for name, expected in trained_gradients(run).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-8)


def test_bi_lora_with_head_sam_perturbs_both():
    run, closure, head = script_run("classifier", aux_rank=2)
    take("bi-lora-head-sam", run, closure)
    found = trained_gradients(run)
    other, closure, head = script_run("classifier", aux_rank=2)
    lora_sam_step(other.descent, closure, 0.3, list(head.parameters()))
    expected = trained_gradients(other)
    for name in expected:
        if "aux" not in name:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)
    assert any(layer.aux_B.any() for layer in run.layers)


def test_random_output_perturbation_is_absent_in_evaluation():
    """The logits of training have noise of the given size; those of a later forward pass none."""
    run, closure, head = script_run("classifier", rho=0.5)
    args, model, data, rows = closure.args
    calm = train_glue.logits_of(model, data, rows)
    seen, whole = [], F.cross_entropy

    def watched(logits, labels, **more):
        seen.append(logits.detach())
        return whole(logits, labels, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_glue.F, "cross_entropy", watched)
        run.descent.param_groups[0]["lr"] = 0.0
        for _ in range(40):
            take("rop", run, closure)
    z = (torch.stack(seen) - calm) / 0.5
    assert abs(z.std().item() - 1) < 0.1 and abs(z.mean().item()) < 0.15
    assert torch.equal(train_glue.logits_of(model.eval(), data, rows),
                       train_glue.logits_of(model.eval(), data, rows))
    torch.testing.assert_close(train_glue.logits_of(model.train(), data, rows), calm)


@pytest.mark.parametrize("kind", ["classifier", "llama2"])
def test_esam_perturbs_half_of_the_tensors_and_keeps_the_top_half_of_the_rows(kind):
    run, closure, head = script_run(kind)
    args, model, data, rows = closure.args
    script = sys.modules[closure.func.__module__]
    start, points, batches = {}, [], []

    def watched(args, model, data, batch):
        points.append([p.detach().clone() for p in primary_parameters(model)])
        batches.append(batch)
        with torch.no_grad():
            start.setdefault(len(points), script.row_losses(model, data, rows).tolist())
        return closure.func(args, model, data, batch)

    watched.__module__ = closure.func.__module__
    take("esam", run, partial(watched, args, model, data, rows))
    moved = [not torch.equal(a, b) for a, b in zip(*points)]
    assert sum(moved) == len(moved) // 2
    assert norm([b - a for a, b in zip(*points)]) == pytest.approx(0.3, rel=1e-5)
    rises = [b - a for a, b in zip(start[1], start[2])]
    best = sorted(range(len(rows)), key=lambda i: -rises[i])[:round(len(rows) / 2)]
    assert batches[0] == rows and batches[1] == [rows[i] for i in sorted(best)]


def test_esam_draws_its_tensors_anew_in_each_step():
    run, closure, _ = script_run("classifier")
    args, model, data, rows = closure.args
    run.descent.param_groups[0]["lr"] = 0.0
    start = [p.detach().clone() for p in primary_parameters(model)]
    moved = set()

    def watched(args, model, data, batch):
        where = tuple(not torch.equal(a, p) for a, p in zip(start, primary_parameters(model)))
        moved.add(where)
        return closure.func(args, model, data, batch)

    watched.__module__ = closure.func.__module__
    for _ in range(3):
        take("esam", run, partial(watched, args, model, data, rows))
    assert len(moved) == 1 + 3 and {sum(where) for where in moved} == {0, len(start) // 2}


# -------------------------------------------------------------------------------------- resuming

@pytest.mark.parametrize("name", ["looksam", "s2sam", "noise-kept", "flat-lora"])
def test_stopped_and_resumed_equals_straight(tmp_path, monkeypatch, small_demos, name):
    """Stopped in the middle of an epoch: what a method keeps, or draws, goes on bit for bit."""
    monkeypatch.chdir(tmp_path)
    argv = ["train_glue.py", "--limit", "24", "--epochs", "1", "--jobs", "1", "--batch-size", "8",
            "--device", "cpu", "--seeds", "0", "--method", name, "--save-every", "1",
            "--dropout", "0.1"]
    methods.main([*argv, "--out", "straight"])
    whole, calls = train_glue.save_state, []

    def stop(run):
        whole(run)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="interrupted"):
        patch.setattr(train_glue, "save_state", stop)
        methods.main([*argv, "--out", "parts"])
    methods.main([*argv, "--out", "parts", "--resume"])
    files = [(tmp_path / out / f"{name}-seed0/adapter_model.safetensors").read_bytes()
             for out in ("straight", "parts")]
    assert files[0] == files[1]


def test_all_names_every_method(monkeypatch):
    seen = []
    monkeypatch.setattr(train_glue, "main", lambda argv: seen.append(argv))
    methods.main(["train_glue.py", "--method", "all", "--seeds", "0"])
    assert seen == [["--method", *METHODS, "--seeds", "0"]] and set(OURS) <= set(METHODS)


def test_the_laboratory_reads_the_radius_that_a_run_had(tmp_path, monkeypatch, small_demos):
    """A method's own, or that of --rho: from the run folder alone."""
    monkeypatch.chdir(tmp_path)
    argv = ["train_glue.py", "--limit", "8", "--epochs", "1", "--jobs", "1", "--device", "cpu",
            "--seeds", "0", "--method", "flat-lora", "--batch-size", "8"]
    for out, words, rho in (("own", [], 0.05), ("given", ["--rho", "0.2", "0.5"], 0.2)):
        (result,) = methods.main([*argv, *words, "--out", out])["results"]
        _, options = sharpness.parse_arguments([out, "--device", "cpu"])
        (run,) = sharpness.load_runs(options)
        assert (result["rho"], run.training.rho) == (rho, rho)


def test_a_methods_own_radius_gives_way_to_rho():
    for words, radii in (([], (0.2, 0.5, 0.05)), (["--rho", "0.3", "0.4"], (0.3, 0.4, 0.3)),
                         (["--rho", "0.2", "0.5"], (0.2, 0.5, 0.2))):  # given, though the default
        args, _ = methods.parse(train_glue, words)
        settings = json.loads(json.dumps(vars(args)))  # as a run's config.json has them
        args = SimpleNamespace(**settings)
        found = [train_glue.radius_of(args, name) for name in ("lora-sam", "bi-lora", "flat-lora")]
        assert tuple(found) == radii

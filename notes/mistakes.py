"""Typical wrong answers, each a patch of a line or two, and a proof that the tests tell them apart.

    python notes/mistakes.py [NAME ...]

Every mistake is made in a copy of the project (assignment.py), and the tests that grade its task
run there.  At least one has to fail, with a message in which the mistake's place stands: the layer
and factor, or the quantity.  The exit code is 1 where a mistake was not found out.
"""

import argparse
import os
import re
import tempfile
from typing import NamedTuple

from assignment import TASKS, Parser, edit, grade, make_copy, run_tests


class Mistake(NamedTuple):
    task: str
    old: str          # stands once in the task's file
    new: str
    place: str = ""   # a pattern in the failing test's message; by default that of the task
    tests: tuple = None  # where other tests than the task's tell


PLACES = {  # equation, or quantity
    "forward": r"Eq\. \([127]", "add_lora": r"first|weight|refused",
    "lora_step": r"Eq\. \(2\)",
    "lora_sam_step": r"Eq\. \((4|A2)\)|has changed|masks|nan", "perturbation_norm": r"Eq\. \(10\)",
    "clip_perturbation_": r"Eq\. \(10\)|has changed|a value was read",
    "bilora_step": r"Eq\. \((9|10)\)|eq_10|eval_mode", "merge_lora_": r"Eq\. \(1\)|W0",
    "power_rule": r"\(A18\)|rows of", "filter_normalised": "norms of the rows",
    "worst_case": "worst_case", "hessian_vector": "hessian"}

MISTAKES = {
    # the layer
    "no scale": Mistake("forward", "alpha=self.scale)  #", "alpha=1.0)  #"),
    "alpha for alpha / r": Mistake("forward", "rank, alpha, alpha / rank", "rank, alpha, alpha"),
    "scale squared": Mistake("forward", "alpha=self.scale)  #", "alpha=self.scale**2)  #"),
    "no bias": Mistake("forward", "F.linear(rows, self.weight, self.bias)",
                       "F.linear(rows, self.weight)"),
    "auxiliary pair in eval mode": Mistake("forward", "if training and self.aux_A is not None",
                                           "if self.aux_A is not None"),
    "no auxiliary pair in training mode": Mistake(
        "forward", "if training and self.aux_A is not None", "if False"),
    "A and B exchanged": Mistake(
        "forward", "nn.init.kaiming_uniform_(A, a=math.sqrt(5))", "A.zero_()", "kaiming",
        ("test_steps.py::test_initial_A_is_kaiming_uniform",)),
    "leading dimensions lost": Mistake("forward", "out.view(*x.shape[:-1], self.out_features)",
                                       "out"),
    "the base is trained": Mistake("add_lora", "model.requires_grad_(False)", "pass"),
    "some layers before a check": Mistake(
        "add_lora", "    for name, linear in chosen.items():\n        _require_plain",
        "    model.requires_grad_(False)\n    for name, linear in chosen.items():\n"
        "        _require_plain"),
    # the steps
    "the optimizer does not step": Mistake(
        "lora_step", "# g = dL/dw at w, (2)\n    optimizer.step()", "\n"),
    "step before the pass": Mistake(
        "lora_step", '    loss = one_pass("LoRA", closure, optimizer) ',
        '    optimizer.step()\n    loss = one_pass("LoRA", closure, optimizer) '),
    "gradients not zeroed": Mistake("lora_step", "        p.grad = None", "        pass"),
    "two steps": Mistake("lora_step", "# g = dL/dw at w, (2)\n", "\n    optimizer.step()\n"),
    "downhill": Mistake("lora_sam_step", "length / norm, 0.0", "-length / norm, 0.0"),
    "rho squared": Mistake("lora_sam_step", "for p in moving], rho)", "for p in moving], rho**2)"),
    "not normalised": Mistake("lora_sam_step", "length / norm, 0.0", "length, 0.0"),
    "normalised twice": Mistake("lora_sam_step", "length / norm, 0.0", "length / norm**2, 0.0"),
    "a norm per parameter": Mistake(
        "lora_sam_step", "return [_wide(t) * factor.to(t.device) for t in tensors]",
        "return [_wide(t) * length / t.norm() for t in tensors]"),
    "zero over zero": Mistake("lora_sam_step", "torch.where(norm > 0, length / norm, 0.0)",
                              "length / norm"),
    "no restore": Mistake("lora_sam_step", "for p, w in zip(params, backup, strict=True):",
                          "for p, w in ():"),
    "half of the weights restored": Mistake(
        "lora_sam_step", "for p, w in zip(params, backup, strict=True):",
        "for p, w in list(zip(params, backup))[::2]:"),
    "the copy is a view": Mistake("lora_sam_step", "backup = [p.detach().clone() for",
                                  "backup = [p.detach() for"),
    "no restore after an exception": Mistake(
        "lora_sam_step", "    finally:\n",
        "    except ZeroDivisionError:\n        pass\n    else:\n"),
    "new dropout masks": Mistake(
        "lora_sam_step", "with torch.random.fork_rng({p.device for p in params if p.is_cuda}):",
        "with contextlib.nullcontext():"),
    "the second pass is skipped": Mistake(
        "lora_sam_step", '        one_pass("LoRA-SAM, pass 2", closure, optimizer, params) ',
        "        pass"),
    "both passes' gradients added": Mistake(
        "lora_sam_step", '        one_pass("LoRA-SAM, pass 2", closure, optimizer, params) ',
        "        closure() "),
    "step at the perturbed weights": Mistake(
        "lora_sam_step", "# dL/dw at w + eps\n    optimizer.step()",
        "\n        optimizer.step()"),
    "all of the optimizer's parameters": Mistake(
        "lora_sam_step", "_parameters(optimizer) if params is None else params",
        "_parameters(optimizer)"),
    "the second loss": Mistake(
        "lora_sam_step", '        one_pass("LoRA-SAM, pass 2"',
        '        loss = one_pass("LoRA-SAM, pass 2"'),
    # the norm and the clip
    "c with s": Mistake("perturbation_norm", "(A @ A.t())).sum().to(device)",
                        "(A @ A.t())).sum().to(device) * layer.scale**2"),
    "no root": Mistake("perturbation_norm", ".clamp(min=0).sqrt()", ".clamp(min=0)"),
    "a sum of norms": Mistake("perturbation_norm", "torch.stack(squares).sum().clamp(min=0).sqrt()",
                              "torch.stack(squares).sqrt().sum()"),
    "product of norms": Mistake(
        "perturbation_norm", "((B.t() @ B) * (A @ A.t())).sum()",
        "(B.square().sum() * A.square().sum())"),
    "the full product": Mistake("perturbation_norm", "((B.t() @ B) * (A @ A.t())).sum()",
                                "(B @ A).square().sum()"),
    "norm in half precision": Mistake(
        "perturbation_norm", "B, A = _wide(layer.aux_B), _wide(layer.aux_A)",
        "B, A = layer.aux_B, layer.aux_A"),
    "clip without the root": Mistake("clip_perturbation_", "torch.sqrt(rho / c), 1.0",
                                     "rho / c, 1.0"),
    "clip inside the ball": Mistake("clip_perturbation_", "(c > rho) & c.isfinite()",
                                    "c.isfinite()"),
    "an infinite c is clipped": Mistake("clip_perturbation_", "(c > rho) & c.isfinite()",
                                        "c > rho"),
    "one factor alone": Mistake(
        "clip_perturbation_", "    pairs = _auxiliary(layers)\n    for device",
        "    pairs = _auxiliary(layers)[::2]\n    for device"),
    "the primary pair is clipped": Mistake(
        "clip_perturbation_", "    pairs = _auxiliary(layers)\n    for device",
        "    pairs = _primary(layers)\n    for device"),
    "a clip per layer": Mistake(
        "clip_perturbation_", "    layers = _perturbed_layers(layers)\n    c = perturbation_norm",
        "    layers = _perturbed_layers(layers)\n    if len(layers) > 1:\n"
        "        return torch.stack([clip_perturbation_([x], rho) for x in layers]).norm()\n"
        "    c = perturbation_norm"),
    "c after the clip": Mistake("clip_perturbation_", "    return c\n\ndef _require_radius",
                                "    return perturbation_norm(layers)\n\ndef _require_radius"),
    "an if on a tensor": Mistake(
        "clip_perturbation_", "    pairs = _auxiliary(layers)\n    for device",
        "    if c <= rho:\n        return c\n    pairs = _auxiliary(layers)\n    for device"),
    # Bi-LoRA
    "no ascent": Mistake("bilora_step", "    ascent.step() ", "    pass "),
    "ascent through the primary pair": Mistake("bilora_step", "    ascent.step() ",
                                               "    descent.step() "),
    "no clip": Mistake("bilora_step", "    clip(layers, rho) ", "    pass "),
    "clip before the ascent": Mistake("bilora_step", "    ascent.step() ",
                                      "    clip(layers, rho); ascent.step(); return loss "),
    "the gradient taken anew": Mistake(
        "bilora_step", "    ascent.step() ",
        '    one_pass("Bi-LoRA", closure, descent, *pairs); ascent.step() '),
    "eval mode goes unnoticed": Mistake(
        "bilora_step", "_require(all(x.training for x in layers)", "_require(all([True])"),
    # after training
    "merge of the auxiliary pair": Mistake("merge_lora_", "layer.merged_weight().to",
                                           "layer.merged_weight(True).to"),
    "merge twice": Mistake("merge_lora_", "layer.merged_weight().to",
                           "(layer.merged_weight() + layer.delta()).to"),
    "merge in half precision": Mistake(
        "merge_lora_", "layer.merged_weight().to(layer.weight.dtype)",
        "layer.weight + layer.delta().to(layer.weight.dtype)"),
    "merge into a shared weight": Mistake(
        "merge_lora_", "layer.merged_weight().to(layer.weight.dtype)",
        "layer.weight.copy_(layer.merged_weight())"),
    # notes
    "rows not orthonormal": Mistake("power_rule", "torch.linalg.qr(rows.t()).Q.t()", "rows"),
    "B2 not carried over": Mistake("power_rule", "X @ (layer.aux_A @ A.t())", "X"),
    "no radius": Mistake("power_rule", "layer.aux_B.mul_(factor.to(layer.aux_B.device))", "pass"),
    "a length for the whole tensor": Mistake(
        "filter_normalised", "w.norm(dim=-1, keepdim=True) / d.norm(dim=-1, keepdim=True)",
        "w.norm() / d.norm()"),
    "out of the ball": Mistake("worst_case", "if norm(eps) > rho:", "if False:"),
    "ascent downhill": Mistake("worst_case", "[e + d for e, d in zip(eps, scaled",
                               "[e - d for e, d in zip(eps, scaled"),
    "the last increase, not the largest": Mistake(
        "worst_case", "best = max(best, loss_of(losses) - start)",
        "best = loss_of(losses) - start"),
    "the last share alone": Mistake(
        "hessian_vector", "[a if g is None else a + g for a, g in zip(total, second)]",
        "[a if g is None else g for a, g in zip(total, second)]")}


def found_out(name):
    """(is it found out, what the failing tests say) of one mistake."""
    mistake = MISTAKES[name]
    with tempfile.TemporaryDirectory() as place:
        folder = os.path.join(place, "copy")
        make_copy(folder, [])
        path = os.path.join(folder, TASKS[mistake.task].file)
        edit(path, lambda source: patched(source, mistake))
        tests = mistake.tests or TASKS[mistake.task].tests
        _, _, messages = grade(run_tests(folder, tests), tests)
    place = mistake.place or PLACES[mistake.task]
    return any(re.search(place, message) for message in messages), messages

def patched(source, mistake):
    if source.count(mistake.old) != 1:
        raise ValueError(f"{mistake.old!r} stands {source.count(mistake.old)} times in "
                         f"{TASKS[mistake.task].file}; expected once")
    return source.replace(mistake.old, mistake.new)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="of a mistake (default: all)")
    names, missed = parser.parse_args(argv).name or list(MISTAKES), []
    for name in names:
        if name not in MISTAKES:
            parser.error(f"{name!r}: no such mistake; expected one of {', '.join(MISTAKES)}")
        found, messages = found_out(name)
        print(f"{'found' if found else 'MISSED'}: {name}", *messages, sep="\n    ", flush=True)
        missed += [] if found else [name]
    print(f"{len(names) - len(missed)} of {len(names)} are found out")
    raise SystemExit(1 if missed else 0)

if __name__ == "__main__":
    main()

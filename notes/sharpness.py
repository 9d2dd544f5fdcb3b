"""How flat are the solutions, and how adversarial are the perturbations?  Measures runs of either script, and draws them.

    python train_glue.py --snapshots 21 --method lora lora-sam bi-lora bi-lora-power --seeds 0 1 2 3 4 5 6 7 8 9
    python notes/sharpness.py runs/embedded --out notes/figures

RUN is the --out of a command, or one run folder in it; several are taken together where their task is the same.  Parts:
  a  loss along random filter-normalised directions, in LoRA space and in full space; a contour plot of the first seed
  b  loss and scores at w + alpha g / ||g||, Eq. (A22), in both spaces
  c  worst loss within a radius, and the Hessian's largest eigenvalue, in both spaces
  d  norms of the three terms of LoRA-SAM's perturbation; cosine of each pair with its last value, and of the two pairs
  e  how adversarial each method's perturbation is, beside SAM's in full space, Eq. (A2), and a random one
  f  the ascent by itself: trains again, with several rules for the auxiliary pair, and watches each step
  g  loss and score on training rows and on evaluation rows over training, and their gap
d, e and g need runs with --snapshots.  Training rows, directions and batches are drawn from --seed: they are the same for
every method of a seed.  All is computed in float32.  Each run folder keeps what was measured in it (sharpness.json), and
a second command measures only what is not there; --out gets one JSON file and the pictures of each task.  --cached draws
everything that was measured before, of all tasks, in one command.
"""

import argparse
import json
import math
import os
import random
import re
import sys
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_glue  # noqa: E402
import train_gsm8k  # noqa: E402
from bilora import bilora_power_step, bilora_step, load_adapter, lora_layers, primary_parameters  # noqa: E402
from measures import (best_rank_energy, contour, cosine, effective_rank, filter_normalised, gradient,  # noqa: E402
                      landscape, lora_sam_terms, loss_of, low_rank_cosine, moved, norm, reachable_energy, scaled,
                      top_eigenvalue, worst_case)
from pictures import DRAWINGS, LAGS  # noqa: E402
from tables import SPACES, tables  # noqa: E402
from train_glue import METHODS, batch_order, cosine_schedule, forward_backward, number, read_json, write_text  # noqa: E402

SETTINGS = {  # what the result of each part depends on, beside the run
    "a": ("rows", "seed", "directions", "points", "span"), "contour": ("rows", "seed", "grid", "span"),
    "b": ("rows", "seed", "alphas", "eval_rows"), "c": ("rows", "seed", "radii", "steps", "iterations"),
    "d": ("seed",), "e": ("rows", "seed", "moments", "batches"), "f": ("rows", "seed", "ascent_epochs"),
    "g": ("rows", "seed", "moments", "eval_rows")}


# ------------------------------------------------------------------------------ a run


@dataclass
class Run:
    """A finished run of a script, with the model as it was trained."""
    folder: str
    options: object      # of this program
    config: dict
    args: object         # of the script
    experiment: object

    @property
    def method(self):
        return self.config["method"]

    @property
    def seed(self):
        return self.config["seed"]

    @property
    def task(self):
        """Both scripts have an embedded task."""
        return "gsm8k-" * ("max_new_tokens" in self.config and self.config["task"] == "embedded") + self.config["task"]

    @cached_property
    def data(self):
        return self.experiment.data(self.seed)

    @cached_property
    def model(self):
        """In eval mode: W = W0 + s B1 A1."""
        model, *_ = train_glue.prepare(self.args, self.method, self.seed, self.experiment.build)
        load_adapter(model, self.folder, model.module_names)
        return model.eval()

    @property
    def layers(self):
        return lora_layers(self.model)

    def drop(self):
        """Free the model, or load it anew where it is needed again."""
        self.__dict__.pop("model", None)

    def losses(self, examples, size=32):
        """The mean loss over the examples, in shares."""
        examples = sorted(examples, key=lambda row: len(row[0]))  # less padding
        count, device = self.experiment.count(examples), torch.device(self.args.device)
        return [lambda part=examples[i:i + size]: self.experiment.loss(self.model, part, device) / count
                for i in range(0, len(examples), size)]

    @cached_property
    def sample(self):
        """Training rows on which the loss is measured."""
        examples, _ = self.data
        return random.Random(self.options.seed).sample(examples, min(self.options.rows, len(examples)))

    @cached_property
    def batches(self):
        """Training batches, as large as the run's."""
        examples, _ = self.data
        order = batch_order(examples, self.args.batch_size, random.Random(self.options.seed + 1))
        return [[examples[i] for i in batch] for batch in order[:self.options.batches]]

    def space(self, name):
        """(the tensors that are moved, the weights whose rows say how far)."""
        model = self.model
        if name == "LoRA":
            return primary_parameters(model), primary_parameters(model)
        weights = [layer.weight for layer in self.layers]
        return weights, [layer.weight + layer.delta().detach() for layer in self.layers]

    def generator(self):
        return torch.Generator().manual_seed(self.options.seed)

    def snapshots(self):
        """[(step, path)]."""
        folder = os.path.join(self.folder, "snapshots")
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        found = [(int(match[1]), os.path.join(folder, name)) for name in names
                 if (match := re.fullmatch(r"step-(\d+)\.pt", name))]
        if not found:
            raise ValueError(f"{folder}: no snapshots; expected a run with --snapshots, which parts d, e and g need")
        return found

    def moments(self):
        """Some of the snapshots after the first, evenly."""
        later = self.snapshots()[1:]
        return [later[i] for i in sorted({round(i) for i in np.linspace(0, len(later) - 1, self.options.moments)})]

    def put(self, path):
        """Give the model the weights of a snapshot."""
        own = train_glue.trained_tensors(self.model)
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            fits = {name: t.shape for name, t in saved.items()} == {name: t.shape for name, t in own.items()}
        except Exception as error:  # whatever a broken file makes the unpickler stumble over
            raise ValueError(f"{path}: not a snapshot ({type(error).__name__})") from None
        if not fits:
            raise ValueError(f"{path}: holds other tensors than the run's model; expected a snapshot of this run")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])

    def auxiliary(self):
        """[(B2, A2)], or [] where the method has none."""
        return [(layer.aux_B.detach(), layer.aux_A.detach()) for layer in self.layers if layer.aux_A is not None]

    def primary(self):
        return [(layer.lora_B.detach(), layer.lora_A.detach()) for layer in self.layers]


def run_folders(path):
    """The run folders in the --out of a command; a run folder is its own."""
    names = [path, *(os.path.join(path, name) for name in sorted(os.listdir(path)))]
    files = ("config.json", "adapter_model.bin", "metrics.json")
    found = [name for name in names if all(os.path.isfile(os.path.join(name, file)) for file in files)]
    if not found:
        raise ValueError(f"{path}: no finished run; expected the --out of train_glue.py or train_gsm8k.py, or a folder in it")
    return found


def load_runs(options):
    runs, experiments = [], {}
    for folder in [folder for path in options.run for folder in run_folders(path)]:
        config = read_json(os.path.join(folder, "config.json"))
        script = train_gsm8k if "max_new_tokens" in config else train_glue
        for key in ("method", "seed", "rho", "files", "task"):
            if key not in config:
                raise ValueError(f"{os.path.join(folder, 'config.json')}: no {key!r}; expected a run's settings")
        added = vars(script.parse_arguments([])[1])  # an option that the run is older than has its default
        args = argparse.Namespace(**{**added, **config, "rho": [config["rho"]], "method": [config["method"]],
                                     "device": options.device, "bf16": False, "micro_batch": None,
                                     "checkpointing": False, "eval_batch_size": 250})
        key = json.dumps({name: value for name, value in config.items() if name not in ("method", "seed", "rho")})
        if options.cached:
            experiments[key] = None
        if key not in experiments:
            base = argparse.Namespace(**{**vars(args), "bf16": config["bf16"] if config["task"] == "embedded" else False})
            experiments[key] = script.load(base)
            for (path, size, *_), (now_path, now, *_) in zip(config["files"], experiments[key].files):
                if size != now:
                    raise ValueError(f"{now_path}: has {now} bytes; the run read {path} with {size}")
        runs.append(Run(folder, options, config, args, experiments[key]))
    return runs


# ------------------------------------------------------------------------------ the parts, for one run


def random_directions(run, options, count, points):
    """For each space its name, the tensors that move, `count` directions and the alphas along them."""
    for space, span in zip(SPACES, options.span):
        params, weights = run.space(space)
        generator = run.generator()
        directions = [filter_normalised(weights, generator) for _ in range(count)]
        yield space, params, directions, np.linspace(-span, span, points).tolist()


def measure_a(run, options):
    """{space: {"alphas", "losses": a list a direction}}."""
    losses = run.losses(run.sample)
    return {space: {"alphas": alphas, "losses": [landscape(losses, params, direction, alphas) for direction in directions]}
            for space, params, directions, alphas in random_directions(run, options, options.directions, options.points)}


def measure_contour(run, options):
    """{space: {"alphas", "losses": a list for each alpha of the second direction}}."""
    losses = run.losses(run.sample)
    return {space: {"alphas": alphas, "losses": contour(losses, params, *directions, alphas)}
            for space, params, directions, alphas in random_directions(run, options, 2, options.grid)}


def measure_b(run, options):
    """{space: {"alphas", "loss", and each metric: a list}}: Eq. (A22), g the gradient over the sample."""
    losses, (_, sets), result = run.losses(run.sample), run.data, {}
    sets = {name: random.Random(options.seed).sample(rows, min(options.eval_rows, len(rows))) for name, rows in sets.items()}
    for space in SPACES:
        params, _ = run.space(space)
        direction, rows = scaled(gradient(losses, params)[1], 1.0), []
        for alpha in options.alphas:
            with moved(params, direction, alpha):
                metrics, *_ = run.experiment.evaluate(run.model, sets, run.args)
                rows.append({"loss": loss_of(losses), **metrics})
        result[space] = {"alphas": options.alphas, **{key: [row[key] for row in rows] for key in rows[0]}}
    return result


def measure_c(run, options):
    """{space: {"radii", "increase", "eigenvalue", "residual"}}."""
    losses, result = run.losses(run.sample), {}
    for space in SPACES:
        params, _ = run.space(space)
        eigenvalue, residual = top_eigenvalue(losses, params, options.iterations, run.generator())
        result[space] = {"radii": options.radii, "eigenvalue": eigenvalue, "residual": residual,
                         "increase": [worst_case(losses, params, rho, options.steps) for rho in options.radii]}
    return result


def measure_d(run, options):
    """Lists over the snapshots: LoRA-SAM's three norms and their ratio; the cosines of B, A and the products."""
    rows, snapshots = [], run.snapshots()
    run.put(snapshots[-1][1])
    at_end = [[tensor.clone() for tensor in pair] for pair in run.primary()]
    aux_at_end = [[tensor.clone() for tensor in pair] for pair in run.auxiliary()]
    for step, path in snapshots:
        run.put(path)
        row = {"step": step, "primary": low_rank_cosine(run.primary(), at_end),
               "B": cosine([B for B, _ in run.primary()], [B for B, _ in at_end]),
               "A": cosine([A for _, A in run.primary()], [A for _, A in at_end])}
        if aux_at_end:
            row["auxiliary"] = low_rank_cosine(run.auxiliary(), aux_at_end)
            row["between"] = low_rank_cosine(run.primary(), run.auxiliary())
        if run.method == "lora-sam":
            _, g = gradient(run.losses(run.batches[0]), primary_parameters(run.model))
            terms = lora_sam_terms(run.layers, g, run.args.rho[0])
            row |= {name: norm(term) for name, term in zip(("B_epsA", "epsB_A", "epsB_epsA"), terms)}
            first = norm([x + y for x, y in zip(*terms[:2])])
            row["ratio"] = first / row["epsB_epsA"] if row["epsB_epsA"] else None  # at B = 0 there is no third term
        rows.append(row)
    return {key: [row[key] for row in rows] for key in rows[0]}


def perturbation(run, losses):
    """The method's own perturbation of the weights, or None: LoRA-SAM's for this batch, Bi-LoRA's as it stands."""
    if run.method == "lora-sam":
        terms = lora_sam_terms(run.layers, gradient(losses, primary_parameters(run.model))[1], run.args.rho[0])
        return [sum(parts) for parts in zip(*terms)]
    return [layer.aux_delta().detach() for layer in run.layers] if run.auxiliary() else None


def measure_e(run, options):
    """At some snapshots, lists over them.  For the method's perturbation and a random one as long ("random_..."):
    cosine_batch with G of a batch and gain_batch, its loss increase over that of SAM's perturbation of the same length; the
    same over the sample; reach, the share of ||G||^2, G over the sample, in {B X + Y A} of LoRA-SAM's primary pairs or Bi-LoRA's
    auxiliary ones, and best_rank, that of the best approximation of their rank.  Means over the batches; the sample's with
    the perturbation of the first batch.  A snapshot whose perturbation is zero is left out."""
    rows = []
    for step, path in run.moments():
        run.put(path)
        weights, generator, parts = [layer.weight for layer in run.layers], run.generator(), []
        whole = run.losses(run.sample)
        start, G = gradient(whole, weights)
        for number_, batch in enumerate(run.batches):
            losses = run.losses(batch)
            before, g = gradient(losses, weights)
            eps = perturbation(run, losses)
            if eps is None or norm(eps) == 0:
                continue
            noise = scaled([torch.randn(e.shape, generator=generator).to(e) for e in eps], norm(eps))
            part = {"norm": norm(eps)}
            for name, e in (("", eps), ("random_", noise)):
                part[name + "cosine_batch"] = cosine(e, g)
                part[name + "gain_batch"] = increase(losses, weights, e, before) / increase(
                    losses, weights, scaled(g, norm(e)), before)
                if number_ == 0:
                    part[name + "cosine_sample"] = cosine(e, G)
                    part[name + "gain_sample"] = increase(whole, weights, e, start) / increase(
                        whole, weights, scaled(G, norm(e)), start)
            if number_ == 0:
                pairs = run.auxiliary() or run.primary()
                part |= {"reach": reachable_energy(G, pairs), "best_rank": best_rank_energy(G, len(pairs[0][1]))}
            parts.append(part)
        if parts:
            means = {key: np.mean([part[key] for part in parts if key in part]).item() for key in parts[0]}
            rows.append({"step": step, "gradient": norm(G), **means})
    return {key: [row[key] for row in rows] for key in rows[0]} if rows else {}


def increase(losses, weights, eps, before):
    with moved(weights, eps):
        return loss_of(losses) - before


def measure_g(run, options):
    """Lists over some snapshots: loss and first metric on the training sample and on evaluation rows, and the losses' gap."""
    rows, evaluation = [], next(iter(run.data[1].values()))
    evaluation = random.Random(options.seed).sample(evaluation, min(options.eval_rows, len(evaluation)))
    for step, path in run.moments():
        run.put(path)
        row = {"step": step}
        for name, examples in (("training", run.sample), ("evaluation", evaluation)):
            metrics, *_ = run.experiment.evaluate(run.model, {name: examples}, run.args)
            row |= {f"{name} loss": loss_of(run.losses(examples)), f"{name} score": next(iter(metrics.values()))}
        rows.append({**row, "gap": row["evaluation loss"] - row["training loss"]})
    return {key: [row[key] for row in rows] for key in rows[0]}


# ------------------------------------------------------------------------------ f: the ascent


def ascent_rules(lr):
    """{name: (ascent, eta2, does eta2 follow the cosine)}; the ascent is sgd, adamw or power."""
    return {"plain, eta2 = eta1": ("sgd", lr, True), "plain, eta2 = 100 eta1": ("sgd", 100 * lr, True),
            "plain, eta2 = 1000 eta1": ("sgd", 1000 * lr, True), "Adam, eta2 = eta1": ("adamw", lr, True),
            "Adam, eta2 = eta1 / 10": ("adamw", lr / 10, True), "Adam, eta2 = eta1, constant": ("adamw", lr, False),
            "power rule": ("power", 0.0, True)}


def measure_f(run, options):
    """{rule: lists over the steps}: effective rank of B2 A2, cosine with its own value a lag ago ("lag 1", ...), with its
    value after the last step ("final"); and now and then with G at W, of the batch that it perturbs and over the sample."""
    args = argparse.Namespace(**{**vars(run.args), "epochs": options.ascent_epochs or run.args.epochs})
    return {name: watch_ascent(run, args, *rule) for name, rule in ascent_rules(run.args.lr).items()}


def watch_ascent(run, args, kind, eta2, falls):
    examples, _ = run.data
    args = argparse.Namespace(**{**vars(args), "aux_lr": eta2, "ascent": "adamw" if kind == "adamw" else "sgd"})
    run.model, layers, (descent, ascent) = train_glue.prepare(args, "bi-lora", run.seed, run.experiment.build)
    model, rho = run.model.train(), args.rho[0]
    weights = [layer.weight for layer in layers]
    steps = args.epochs * math.ceil(len(examples) / args.batch_size)
    schedules = [cosine_schedule(descent, steps)]
    if kind != "power" and falls:
        schedules.append(cosine_schedule(ascent, steps))
    rng, rows, history = random.Random(run.seed), [], []
    bar = tqdm(total=steps, desc=f"f, {kind} {eta2:g}", leave=False, disable=None)
    for _ in range(args.epochs):
        for order in batch_order(examples, args.batch_size, rng):
            batch, pairs = [examples[i] for i in order], [[tensor.clone() for tensor in pair] for pair in run.auxiliary()]
            history.append(pairs)
            eps = [layer.aux_delta().detach() for layer in layers]
            row = {"rank": effective_rank(pairs), **{f"lag {lag}": low_rank_cosine(pairs, history[-1 - lag])
                                                     for lag in LAGS if lag < len(history)}}
            if len(rows) % max(1, steps // 20) == 0:
                model.eval()  # G at W, not at W + eps, where eps agrees with it the more the sharper the loss is
                row["cosine_sample"] = cosine(eps, gradient(run.losses(run.sample), weights)[1])
                row["cosine_batch"] = cosine(eps, gradient(run.losses(batch), weights)[1])
                model.train()
            closure = partial(forward_backward, model, run.experiment, batch, args)
            if kind == "power":
                bilora_power_step(descent, closure, layers, rho, args.momentum)
            else:
                bilora_step(descent, ascent, closure, layers, rho)
            for schedule in schedules:
                schedule.step()
            rows.append(row)
            bar.update()
    bar.close()
    for row, pairs in zip(rows, history):
        row["final"] = low_rank_cosine(pairs, run.auxiliary())
    run.drop()
    keys = ("rank", *(f"lag {lag}" for lag in LAGS), "final", "cosine_batch", "cosine_sample")
    return {key: [row.get(key) for row in rows] for key in keys}


# ------------------------------------------------------------------------------ all runs


MEASURES = {"a": measure_a, "contour": measure_contour, "b": measure_b, "c": measure_c, "d": measure_d, "e": measure_e,
            "f": measure_f, "g": measure_g}


def wanted(run, part, seeds, options):
    """Is this part measured in this run?  seeds: those of the task's runs, in order."""
    return {"contour": run.seed == seeds[0], "e": run.method != "lora",
            "f": run.method == "bi-lora" and run.seed in seeds[:options.ascent_seeds]}.get(part, True)


def measure(runs, options):
    """({task: {part: {method: {seed: result}}}}, {task: {part: the settings it was measured with}})."""
    results, used = {}, {}
    todo = []
    for run in runs:
        seeds = sorted({other.seed for other in runs if other.task == run.task})
        parts = [part for part in options.parts if wanted(run, part, seeds, options)]
        if {"d", "e", "g"} & set(parts) and not options.cached:
            run.snapshots()  # before hours of work, if there are none
        todo.append((run, parts))
    for run, parts in (bar := tqdm(todo, disable=None)):
        path = os.path.join(run.folder, "sharpness.json")
        known = read_json(path) if os.path.exists(path) else {}
        for part in parts:
            bar.set_description(f"{run.task}, {run.method}, seed {run.seed}, part {part}")
            settings = {name: getattr(options, name) for name in SETTINGS[part]}
            if not options.cached and known.get(part, {}).get("settings") != settings:
                known[part] = {"settings": settings, "result": MEASURES[part](run, options)}
                write_text(path, json.dumps(known))
                if part in "defg":
                    run.drop()  # its weights are those of a snapshot now
            if part in known:
                result, settings = known[part]["result"], known[part]["settings"]
                results.setdefault(run.task, {}).setdefault(part, {}).setdefault(run.method, {})[run.seed] = result
                first = used.setdefault(run.task, {}).setdefault(part, settings)
                if first != settings:
                    raise ValueError(f"{path}: part {part} was measured with {settings}, that of another run with {first}")
        run.drop()
    return results, used


# ------------------------------------------------------------------------------ arguments and main


def parse_arguments(argv):
    parser = train_glue.Parser(prog="sharpness.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", metavar="RUN",
                        help="the --out of train_glue.py or train_gsm8k.py, or a run folder in it")
    parser.add_argument("--parts", nargs="+", choices=MEASURES, default=list(MEASURES), help="default: all")
    parser.add_argument("--out", help="folder of the pictures, tables and numbers (default: the first RUN)")
    parser.add_argument("--cached", action=argparse.BooleanOptionalAction, default=False,
                        help="measure nothing: draw what the run folders hold, with the settings it was measured with")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of rows, directions and batches (default: %(default)s)")
    parser.add_argument("--device", type=train_glue.device_name, default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: %(default)s")
    parser.add_argument("--rows", type=number(int, 1), default=128,
                        help="training rows that the loss is measured on (default: %(default)s)")
    parser.add_argument("--eval-rows", type=number(int, 1), default=1000,
                        help="b, g: rows of each evaluation set (default: %(default)s)")
    parser.add_argument("--directions", type=number(int, 1), default=3, help="a: random directions (default: %(default)s)")
    parser.add_argument("--points", type=number(int, 3), default=15, help="a: points along each (default: %(default)s)")
    parser.add_argument("--grid", type=number(int, 2), default=9, help="contour: points along each axis (default: %(default)s)")
    parser.add_argument("--span", type=number(float, 0), nargs=2, default=[1.0, 0.5],
                        help="a, contour: largest alpha in LoRA space and in full space (default: 1 0.5)")
    parser.add_argument("--alphas", type=number(float, 0), nargs="+", default=[0, 0.1, 0.25, 0.5, 1, 2.5, 4, 5],
                        help="b: default: the paper's, 0 0.5 1 2.5 4 5, and two smaller ones, 0.1 0.25")
    parser.add_argument("--radii", type=number(float, 0), nargs="+", default=[0.05, 0.2, 1.0], help="c: default: 0.05 0.2 1")
    parser.add_argument("--steps", type=number(int, 1), default=5, help="c: of the ascent (default: %(default)s)")
    parser.add_argument("--iterations", type=number(int, 1), default=15, help="c: of the power iteration (default: %(default)s)")
    parser.add_argument("--moments", type=number(int, 1), default=5, help="e, g: snapshots (default: %(default)s)")
    parser.add_argument("--batches", type=number(int, 1), default=4, help="e: training batches (default: %(default)s)")
    parser.add_argument("--ascent-seeds", type=number(int, 1), default=3,
                        help="f: Bi-LoRA's first seeds only (default: %(default)s)")
    parser.add_argument("--ascent-epochs", type=number(int, 0), default=0,
                        help="f: epochs of its trainings (default: 0, the run's)")
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, options = parse_arguments(argv)
    if options.points % 2 == 0:
        parser.error(f"--points is {options.points}; expected an odd number, so that alpha = 0 is one of them")
    try:
        runs = load_runs(options)
        results, used = measure(runs, options)
        out, report = options.out or options.run[0], {}
        os.makedirs(out, exist_ok=True)
        for task, parts in results.items():
            for part, methods in parts.items():
                name, draw = DRAWINGS[part]
                ordered = {method: methods[method] for method in METHODS if method in methods}
                draw(ordered, os.path.join(out, f"{task}-{name}.png"))
                parts[part] = ordered
            folders = [run.folder for run in runs if run.task == task]
            text, numbers = tables(parts, [read_json(os.path.join(folder, "metrics.json")) for folder in folders])
            report[task] = {"settings": used[task], "runs": folders, "tables": numbers, "measured": parts}
            write_text(os.path.join(out, f"{task}-sharpness.json"), json.dumps(report[task]))
            write_text(os.path.join(out, f"{task}-sharpness.md"), f"# {task}: what sharpness.py measured\n{text}")
            print(f"{task}\n{text}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return report


if __name__ == "__main__":
    main()

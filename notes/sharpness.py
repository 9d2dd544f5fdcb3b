"""How flat are the solutions, and how adversarial are the perturbations?  Measures runs of either
script, and draws them.

    python notes/methods.py train_glue.py --snapshots 21
    python notes/sharpness.py runs/demo --out notes/figures

RUN is the --out of a command, or one run folder in it; several are taken together where their task
is the same.  Any method of the table will do.  NAME=RUN gives the runs of one method a name of
their own, which two settings of a method need.  Parts:
  a  loss along random filter-normalised directions, in LoRA space and in full space; a contour plot
     of the first seed
  b  loss and scores at w + alpha g / ||g||, Eq. (A22), in both spaces
  c  worst loss within a radius, and the Hessian's largest eigenvalue, in both spaces
  d  norms of the three terms of a perturbation of B1 and A1, and their ratio in each layer; cosine
     of each pair with its last value, and of the two pairs; effective rank of the auxiliary pair
  e  how adversarial each method's perturbation is, beside SAM's in full space, Eq. (A2), and a
     random one
  f  the ascent by itself: trains again, with several rules for the auxiliary pair, and watches each
     step
  g  loss and score on training rows and on evaluation rows over training, and their gap
d, e and g need runs with --snapshots, which notes/methods.py takes.  Training rows, directions and
batches are drawn from --seed: they are the same for every method of a seed.  All is computed in
float32.  Each run folder keeps what was measured in it (sharpness.json), and a second command
measures only what is not there; --out gets one JSON file and the pictures of each task.  --cached
draws everything that was measured before, of all tasks, in one command.
"""

import argparse
import json
import math
import os
import random
import re
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from tqdm import tqdm

import methods
import train_glue
import train_gsm8k
from bilora import load_adapter, lora_layers, perturbed, primary_parameters, scaled
from measures import (best_rank_energy, contour, cosine, effective_rank, filter_normalised,
                      gradient, landscape, lora_sam_terms, loss_of, low_rank_cosine, norm,
                      reachable_energy, top_eigenvalue, worst_case)
from model import read_json, read_safetensors, write_text
from pictures import DRAWINGS, LAGS
from tables import SPACES, all_tables, tables
from train_glue import METHODS, number, plan_batches, trained_tensors

SETTINGS = {  # what the result of each part depends on, beside the run
    "a": ("rows", "seed", "directions", "points", "span"),
    "contour": ("rows", "seed", "grid", "span"),
    "b": ("rows", "seed", "alphas", "eval_rows"),
    "c": ("rows", "seed", "radii", "steps", "iterations"),
    "d": ("seed",),
    "e": ("rows", "seed", "moments", "batches"),
    "f": ("rows", "seed", "ascent_epochs"),
    "g": ("rows", "seed", "moments", "eval_rows")}


# ----------------------------------------------------------------------------------------- a run


@dataclass
class Run:
    """A finished run of a script, with the model as it was trained."""
    folder: str
    name: str        # in tables and pictures
    options: object  # of this program
    config: dict
    script: object   # train_glue or train_gsm8k
    args: object     # of the script
    data: object     # what its load returns; None with --cached

    @property
    def method(self):
        return self.config["method"]

    @property
    def seed(self):
        return self.config["seed"]

    @property
    def task(self):
        """Both scripts have a demo."""
        task = self.config["task"]
        return f"gsm8k-{task}" if self.script is train_gsm8k and task == "demo" else task

    @cached_property
    def training(self):
        """What the script's `prepare` returns, with the adapter that was saved, in eval mode:
        W = W0 + s B1 A1."""
        training = self.prepared(self.method, self.args, 1)
        load_adapter(training.model, self.folder, training.model.module_names, read_safetensors)
        training.model.eval()
        return training

    def prepared(self, method, args, steps):
        build = methods.builder(self.script, args, self.data)
        return self.script.prepare(args, method, self.seed, build, self.folder, steps)

    @property
    def model(self):
        return self.training.model

    @property
    def layers(self):
        return lora_layers(self.model)

    def drop(self):
        """Free the model; it is loaded anew where it is needed again."""
        self.__dict__.pop("training", None)

    @cached_property
    def rows(self):
        """Those that the run was trained on."""
        if self.script is train_glue:
            return train_glue.training_rows(self.args, self.data, self.seed)
        count = min(self.args.limit or len(self.data.rows), len(self.data.rows))
        return random.Random(f"limit-{self.seed}").sample(self.data.rows, count)

    @cached_property
    def sample(self):
        """Training rows on which the loss is measured."""
        count = min(self.options.rows, len(self.rows))
        return random.Random(self.options.seed).sample(self.rows, count)

    def length(self, row):
        """Tokens; rows of similar length share a batch."""
        return len(row[0]) if self.script is train_glue else train_gsm8k.row_length(row)

    @cached_property
    def batches(self):
        """Training batches, as large as the run's."""
        lengths = [self.length(row) for row in self.rows]
        plan = plan_batches(self.args, self.options.seed + 1, lengths)
        return [[self.rows[i] for i in batch] for _, batch in plan[:self.options.batches]]

    def losses(self, rows, size=32):
        """The mean loss over the rows, in shares."""
        rows = sorted(rows, key=self.length)  # less padding
        shares = [rows[i:i + size] for i in range(0, len(rows), size)]
        return [partial(self.share, share, self.count(rows)) for share in shares]

    def share(self, rows, count):
        return self.script.row_losses(self.model, self.data, rows).sum() / count

    def count(self, rows):
        """What the mean is over: the rows, or the tokens of their answers."""
        if self.script is train_gsm8k:
            return sum(len(answer) for _, answer, _ in rows)
        if self.data.answers:
            return sum(len(self.data.answers[label]) for *_, label in rows)
        return len(rows)

    def scores(self, sets):
        """{metric: value} of {name: rows}."""
        data = argparse.Namespace(**{**vars(self.data), "sets": sets})
        found = self.script.evaluate(self.args, self.model, data)
        return found["scores"] if self.script is train_glue else train_gsm8k.scores_of(found)

    @cached_property
    def fresh(self):
        """Evaluation rows, as many as the sample's."""
        rows = next(iter(self.data.sets.values()))
        return random.Random(self.options.seed).sample(rows, min(self.options.rows, len(rows)))

    def evaluation_sets(self):
        """Those of the task, --eval-rows of each."""
        rng, count = partial(random.Random, self.options.seed), self.options.eval_rows
        return {name: rng().sample(rows, min(count, len(rows)))
                for name, rows in self.data.sets.items()}

    def space(self, name):
        """(the tensors that are moved, the weights whose rows say how far)."""
        if name == "LoRA":
            return primary_parameters(self.model), primary_parameters(self.model)
        weights = [layer.weight for layer in self.layers]
        return weights, [layer.merged_weight().detach() for layer in self.layers]

    def generator(self):
        return torch.Generator().manual_seed(self.options.seed)

    def snapshots(self):
        """[(step, path)]."""
        folder = os.path.join(self.folder, "snapshots")
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        found = [(int(match[1]), os.path.join(folder, name)) for name in names
                 if (match := re.fullmatch(r"step-(\d+)\.pt", name))]
        if not found:
            raise ValueError(f"{folder}: no snapshots; parts d, e and g expect a run of "
                             "notes/methods.py with --snapshots")
        return found

    def moments(self):
        """Some of the snapshots after the first, evenly."""
        later = self.snapshots()[1:]
        places = np.linspace(0, len(later) - 1, self.options.moments)
        return [later[i] for i in sorted({round(place) for place in places})]

    def put(self, path):
        """Give the model the weights of a snapshot."""
        own = trained_tensors(self.model)
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            shapes = {name: tensor.shape for name, tensor in saved.items()}
        except Exception as error:  # whatever a broken file makes the unpickler stumble over
            raise ValueError(f"{path}: not a snapshot ({type(error).__name__})") from None
        if shapes != {name: tensor.shape for name, tensor in own.items()}:
            raise ValueError(f"{path}: holds other tensors than the run's model; expected a "
                             "snapshot of this run")
        for name, tensor in own.items():
            tensor.copy_(saved[name])

    def auxiliary(self):
        """[(B2, A2)], or [] where the method has none."""
        return [(layer.aux_B.detach(), layer.aux_A.detach()) for layer in self.layers
                if layer.aux_A is not None]

    def primary(self):
        return [(layer.lora_B.detach(), layer.lora_A.detach()) for layer in self.layers]


def run_folders(path):
    """The run folders in the --out of a command; a run folder is its own.  Those without adapters,
    of full fine-tuning, are left out and named."""
    names = [path, *(os.path.join(path, name) for name in sorted(os.listdir(path)))]
    finished = [name for name in names if all(
        os.path.isfile(os.path.join(name, file)) for file in ("log.jsonl", "metrics.json"))]
    found = [name for name in finished if os.path.isfile(os.path.join(name, "adapter_config.json"))]
    for name in finished:
        if name not in found:
            print(f"{name}: left out; it has no adapter, and the parts measure adapted layers")
    if not found:
        raise ValueError(f"{path}: no finished run; expected the --out of train_glue.py or "
                         "train_gsm8k.py, or a folder in it")
    return found


def load_runs(options):
    runs, loaded = [], {}
    for name, folder in [(name, folder) for name, path in map(named_path, options.run)
                         for folder in run_folders(path)]:
        path = os.path.join(folder, "config.json")
        config = read_json(path)
        for key in ("method", "seed", "rho", "files", "task", "model"):
            if key not in config:
                raise ValueError(f"{path}: no {key!r}; expected a run's settings")
        if config["method"] not in METHODS:
            raise ValueError(f"{path}: the method is {config['method']!r}; expected one of "
                             f"{', '.join(METHODS)}; notes/methods.py adds methods")
        script = train_gsm8k if "max_new_tokens" in config else train_glue
        words = ["--task", config["task"], "--model", config["model"], "--device", options.device]
        args, _ = methods.parse(script, words)  # an option that the run is older than: its default
        ours = {"device": options.device, "bf16": False, "micro_batch": None, "snapshots": 0,
                "checkpointing": False, "eval_batch_size": 250}
        args = argparse.Namespace(**{**vars(args), **config, **ours})
        if args.nf4:
            raise ValueError(f"{path}: nf4 is true; the parts move W, which --nf4 keeps in 4 bits")
        key = json.dumps({name: config[name] for name in config if name not in ("method", "seed")})
        if options.cached:
            loaded[key] = None
        elif key not in loaded:
            loaded[key] = script.load(args)
            require_same_files(config["files"], loaded[key].files)
        name = name or config["method"]
        runs.append(Run(folder, name, options, config, script, args, loaded[key]))
    return runs


def named_path(text):
    """(name, or None; path) of NAME=RUN or RUN."""
    name, separator, path = text.partition("=")
    return (name, path) if separator and not os.path.exists(text) else (None, text)


def require_different_names(runs):
    """ValueError where two runs of one task and seed have one name."""
    seen = {}
    for run in runs:
        other = seen.setdefault((run.task, run.name, run.seed), run)
        if other is not run:
            raise ValueError(f"{run.folder}: its name in the tables is {run.name!r}, seed "
                             f"{run.seed}, as that of {other.folder}; expected NAME=RUN")


def require_same_files(then, now):
    """ValueError where files have other sizes than those of their name that a run has read."""
    before, after = {}, {}
    for path, size, *_ in then:
        before.setdefault(os.path.basename(path), []).append(size)
    for path in now:
        after.setdefault(os.path.basename(path), []).append(os.stat(path).st_size)
    for path in now:
        name = os.path.basename(path)
        if name in before and sorted(before[name]) != sorted(after[name]):
            raise ValueError(f"{path}: its size is among {after[name]}; the run read {name} of "
                             f"{before[name]} bytes")


# ------------------------------------------------------------------ what a method's perturbation is


def perturbation(run, batch):
    """(eps, moves): the method's perturbation of each adapted W, (m, n), and of each B1 and A1 in
    turn.

    The closure of one step on the batch tells: they are the weights of its last pass minus those at
    rest before the step, W0 + s B1 A1.  What the step changes is put back; the method and its
    optimizers begin without a state of their own.
    """
    primary, last, training = primary_parameters(run.model), [], run.training
    trained = trained_tensors(run.model)
    before = {name: tensor.clone() for name, tensor in trained.items()}
    rest = [*effective_weights(run.layers, False), *(p.detach().clone() for p in primary)]
    training.state = {}
    for optimizer in filter(None, (training.descent, training.ascent)):
        optimizer.state.clear()

    def closure():
        last[:] = [*effective_weights(run.layers, True), *(p.detach().clone() for p in primary)]
        return run.script.forward_backward(run.args, run.model, run.data, batch)

    run.model.train()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(run.options.seed)
            METHODS[run.method].step(training, closure)
    finally:
        run.model.eval()
        for name, tensor in trained.items():
            tensor.copy_(before[name])
    change = [(a - b).to(p.dtype) for a, b, p in zip(last, rest, [*run.space("full")[0], *primary])]
    return change[:len(run.layers)], change[len(run.layers):]


def effective_weights(layers, training):
    """[W], float64, because a perturbation is small beside it."""
    return [layer.merged_weight(training, torch.float64).detach() for layer in layers]


# -------------------------------------------------------------------------- the parts, for one run


def random_directions(run, options, count, points):
    """For each space its name, the tensors that move, `count` directions and the alphas along
    them."""
    for space, span in zip(SPACES, options.span):
        params, weights = run.space(space)
        generator = run.generator()
        directions = [filter_normalised(weights, generator) for _ in range(count)]
        yield space, params, directions, np.linspace(-span, span, points).tolist()


def measure_a(run, options):
    """{space: {"alphas", "losses": a list a direction}}."""
    losses, result = run.losses(run.sample), {}
    spaces = random_directions(run, options, options.directions, options.points)
    for space, params, directions, alphas in spaces:
        found = [landscape(losses, params, direction, alphas) for direction in directions]
        result[space] = {"alphas": alphas, "losses": found}
    return result


def measure_contour(run, options):
    """{space: {"alphas", "losses": a list for each alpha of the second direction}}."""
    losses, result = run.losses(run.sample), {}
    for space, params, directions, alphas in random_directions(run, options, 2, options.grid):
        found = contour(losses, params, *directions, alphas)
        result[space] = {"alphas": alphas, "losses": found}
    return result


def measure_b(run, options):
    """{space: {"alphas", "loss", and each metric: a list}}: Eq. (A22), g the gradient over the
    sample."""
    losses, sets, result = run.losses(run.sample), run.evaluation_sets(), {}
    for space in SPACES:
        params, _ = run.space(space)
        direction, rows = scaled(gradient(losses, params)[1], 1.0), []
        for alpha in options.alphas:
            with perturbed(params, [alpha * d for d in direction]):
                rows.append({"loss": loss_of(losses), **run.scores(sets)})
        result[space] = {"alphas": options.alphas, **columns(rows)}
    return result


def over(first, third):
    """The ratio; None at B = 0, where the third term is zero."""
    return first / third if third else None


def columns(rows):
    """{key: a list over the rows}, None where a row has no such key."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [row.get(key) for row in rows] for key in keys}


def measure_c(run, options):
    """{space: {"radii", "increase", "eigenvalue", "residual"}}."""
    losses, result = run.losses(run.sample), {}
    for space in SPACES:
        params, _ = run.space(space)
        value, rest = top_eigenvalue(losses, params, options.iterations, run.generator())
        increase = [worst_case(losses, params, rho, options.steps) for rho in options.radii]
        result[space] = {"radii": options.radii, "eigenvalue": value, "residual": rest,
                         "increase": increase}
    return result


def measure_d(run, options):
    """Lists over the snapshots.  Cosines with the last value: of B, A and the product of the
    primary pairs, and of the auxiliary product; the cosine of the two products; effective rank of
    the auxiliary one.  Where the method perturbs B1 and A1: the norms of the three terms that this
    is in W, and what the first two are together over the third, over all layers and in each."""
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
            row["rank"] = effective_rank(run.auxiliary())
        _, moves = perturbation(run, run.batches[0])
        if norm(moves) > 0 and len(moves) == 2 * len(run.layers):  # B1 and A1, no magnitude
            terms = lora_sam_terms(run.layers, moves)
            names = ("B_epsA", "epsB_A", "epsB_epsA")
            row |= {name: norm(term) for name, term in zip(names, terms)}
            parts = [(norm([x + y]), norm([z])) for x, y, z in zip(*terms)]
            row["ratio"] = over(math.hypot(*(first for first, _ in parts)), row["epsB_epsA"])
            row["layers"] = [over(*part) for part in parts]
        rows.append(row)
    return columns(rows)


def measure_e(run, options):
    """At some snapshots, lists over them; {} for a method without a perturbation.

    For the method's perturbation and a random one as long ("random_..."): cosine_batch with G of a
    batch, and gain_batch, its loss increase over that of SAM's perturbation of the same length; the
    same over the sample, and over fresh rows, of the evaluation set.  reach: the share of
    ||G||^2, G over the sample, in {B X + Y A} of the auxiliary pairs, or of the primary ones where
    there are no others; best_rank: that of the best approximation of their rank.  Means over the
    batches; sample's and fresh rows' with the perturbation of the first batch.  A snapshot whose
    perturbation is zero is left out."""
    rows = []
    for step, path in run.moments():
        run.put(path)
        found = [(batch, perturbation(run, batch)[0]) for batch in run.batches]
        found = [(batch, eps) for batch, eps in found if norm(eps) > 0]
        if not found:
            continue
        weights, generator, parts = [layer.weight for layer in run.layers], run.generator(), []
        whole = {"sample": with_gradient(run.losses(run.sample), weights),
                 "fresh": with_gradient(run.losses(run.fresh), weights)}
        for batch, eps in found:
            noise = [torch.randn(e.shape, generator=generator).to(e) for e in eps]
            part = {"norm": norm(eps)}
            sets = {"batch": with_gradient(run.losses(batch), weights), **({} if parts else whole)}
            for name, e in (("", eps), ("random_", scaled(noise, norm(eps)))):
                for where, (losses, before, g) in sets.items():
                    part[f"{name}cosine_{where}"] = cosine(e, g)
                    part[f"{name}gain_{where}"] = gain(losses, weights, e, g, before)
            parts.append(part)
        pairs = run.auxiliary() or run.primary()
        means = {key: np.mean([part[key] for part in parts if key in part]).item()
                 for key in parts[0]}
        *_, G = whole["sample"]
        rows.append({"step": step, "gradient": norm(G), **means,
                     "reach": reachable_energy(G, pairs),
                     "best_rank": best_rank_energy(G, len(pairs[0][1]))})
    return columns(rows)


def with_gradient(losses, weights):
    """(losses, their sum, its gradient)."""
    return losses, *gradient(losses, weights)


def gain(losses, weights, eps, G, before):
    """L(W + eps) - L(W) over the same of SAM's perturbation, ||eps|| G / ||G||."""
    with perturbed(weights, eps):
        ours = loss_of(losses) - before
    with perturbed(weights, scaled(G, norm(eps))):
        return ours / (loss_of(losses) - before)


def measure_g(run, options):
    """Lists over some snapshots: loss and first metric on the training sample and on evaluation
    rows, and the losses' gap."""
    rows, evaluation = [], next(iter(run.evaluation_sets().values()))
    for step, path in run.moments():
        run.put(path)
        row = {"step": step}
        for name, examples in (("training", run.sample), ("evaluation", evaluation)):
            row[f"{name} loss"] = loss_of(run.losses(examples))
            row[f"{name} score"] = next(iter(run.scores({name: examples}).values()))
        rows.append({**row, "gap": row["evaluation loss"] - row["training loss"]})
    return columns(rows)


# --------------------------------------------------------------------------------- f: the ascent

WATCHED = "bi-lora"  # f trains runs of this method again


def ascent_rules(lr):
    """{name: (method, ascent, eta2)}."""
    return {"plain, eta2 = eta1": ("bi-lora", "sgd", lr),
            "plain, eta2 = 100 eta1": ("bi-lora", "sgd", 100 * lr),
            "plain, eta2 = 1000 eta1": ("bi-lora", "sgd", 1000 * lr),
            "Adam, eta2 = eta1": ("bi-lora", "adamw", lr),
            "Adam, eta2 = eta1 / 10": ("bi-lora", "adamw", lr / 10),
            "power rule": ("bi-lora-power", "sgd", lr)}


def measure_f(run, options):
    """{rule: lists over the steps}: effective rank of B2 A2, cosine with its own value a lag ago
    ("lag 1", ...), with its value after the last step ("final"); and now and then with G at W, of
    the batch that it perturbs and over the sample."""
    epochs = options.ascent_epochs or run.args.epochs
    return {name: watch_ascent(run, name, epochs, *rule)
            for name, rule in ascent_rules(run.args.lr).items()}


def watch_ascent(run, name, epochs, method, ascent, eta2):
    changed = {"epochs": epochs, "aux_lr": eta2, "ascent": ascent}
    args, rows, history = argparse.Namespace(**{**vars(run.args), **changed}), [], []
    plan = plan_batches(args, run.seed, [run.length(row) for row in run.rows])
    training = run.training = run.prepared(method, args, len(plan))
    weights = [layer.weight for layer in run.layers]
    for _, indices in tqdm(plan, desc=f"f, {name}", leave=False, disable=None):
        batch = [run.rows[i] for i in indices]
        pairs = [[tensor.clone() for tensor in pair] for pair in run.auxiliary()]
        history.append(pairs)
        row = {"rank": effective_rank(pairs)}
        for lag in LAGS:
            if lag < len(history):
                row[f"lag {lag}"] = low_rank_cosine(pairs, history[-1 - lag])
        if len(rows) % max(1, len(plan) // 20) == 0:
            run.model.eval()  # G at W, not at W + eps: eps agrees with that the more the sharper L
            eps = [layer.aux_delta().detach() for layer in run.layers]
            row["cosine_sample"] = cosine(eps, gradient(run.losses(run.sample), weights)[1])
            row["cosine_batch"] = cosine(eps, gradient(run.losses(batch), weights)[1])
        closure = partial(run.script.forward_backward, args, run.model.train(), run.data, batch)
        METHODS[method].step(training, closure)
        for schedule in training.schedules:
            schedule.step()
        rows.append(row)
    for row, pairs in zip(rows, history):
        row["final"] = low_rank_cosine(pairs, run.auxiliary())
    run.drop()
    keys = ("rank", *(f"lag {lag}" for lag in LAGS), "final", "cosine_batch", "cosine_sample")
    return {key: [row.get(key) for row in rows] for key in keys}


# -------------------------------------------------------------------------------------- all runs


MEASURES = {"a": measure_a, "contour": measure_contour, "b": measure_b, "c": measure_c,
            "d": measure_d, "e": measure_e, "f": measure_f, "g": measure_g}


def wanted(run, part, runs, options):
    """Is this part measured in this run?  runs: those of its task.  Part f, which has settings of
    its own, takes one name of its method."""
    seeds = sorted({other.seed for other in runs})
    if part == "contour":
        return run.seed == seeds[0]
    names = [other.name for other in runs if other.method == WATCHED]
    return part != "f" or run.name in names[:1] and run.seed in seeds[:options.ascent_seeds]


def measure(runs, options):
    """({task: {part: {method: {seed: result}}}}, {task: {part: the settings it was measured
    with}})."""
    results, used, todo = {}, {}, []
    for run in runs:
        own = [other for other in runs if other.task == run.task]
        parts = [part for part in options.parts if wanted(run, part, own, options)]
        if {"d", "e", "g"} & set(parts) and not options.cached:
            run.snapshots()  # before hours of work, if there are none
        todo.append((run, parts))
    for run, parts in (bar := tqdm(todo, disable=None)):
        path = os.path.join(run.folder, "sharpness.json")
        known = read_json(path) if os.path.exists(path) else {}
        for part in parts:
            bar.set_description(f"{run.task}, {run.name}, seed {run.seed}, part {part}")
            settings = {name: getattr(options, name) for name in SETTINGS[part]}
            if not options.cached and known.get(part, {}).get("settings") != settings:
                known[part] = {"settings": settings, "result": MEASURES[part](run, options)}
                write_text(path, json.dumps(known))
                if part in "defg":
                    run.drop()  # its weights are those of a snapshot now
            if part in known:
                names = results.setdefault(run.task, {}).setdefault(part, {})
                names.setdefault(run.name, {})[run.seed] = known[part]["result"]
                settings = known[part]["settings"]
                first = used.setdefault(run.task, {}).setdefault(part, settings)
                if first != settings:
                    raise ValueError(f"{path}: part {part} was measured with {settings}, that of "
                                     f"another run with {first}")
        run.drop()
    return results, used


def report_of(task, parts, settings, runs, out):
    """What is in OUT/TASK-sharpness.json; draws the pictures and prints the tables."""
    order = dict.fromkeys(run.name for run in runs)
    if all(name in METHODS for name in order):
        order = [name for name in METHODS if name in order]
    for part, found in parts.items():
        name, draw = DRAWINGS[part]
        parts[part] = {name: found[name] for name in order if name in found}
        if any(result for seeds in found.values() for result in seeds.values()):
            draw(parts[part], os.path.join(out, f"{task}-{name}.png"))
    scores = {name: {run.seed: read_json(os.path.join(run.folder, "metrics.json"))["metrics"]
                     for run in runs if run.name == name} for name in order}
    numbers = tables(parts, scores)
    text, folders = all_tables(task, numbers), [run.folder for run in runs]
    report = {"settings": settings, "runs": folders, "tables": numbers, "measured": parts}
    write_text(os.path.join(out, f"{task}-sharpness.json"), json.dumps(report))
    write_text(os.path.join(out, f"{task}-sharpness.md"), text)
    print(text)
    return report


# ----------------------------------------------------------------------------- arguments and main

NUMBERS = [  # option, type, smallest value, default, help; where the default is a list, some values
    ("seed", int, 0, 0, "of rows, directions and batches"),
    ("rows", int, 1, 128, "training rows that the loss is measured on"),
    ("eval-rows", int, 1, 1000, "b, g: rows of each evaluation set"),
    ("directions", int, 1, 3, "a: random directions"),
    ("points", int, 3, 15, "a: points along each, an odd number"),
    ("grid", int, 2, 9, "contour: points along each axis"),
    ("span", float, 0, [1.0, 0.5], "a, contour: largest alpha in LoRA space and in full space"),
    ("alphas", float, 0, [0, 0.1, 0.25, 0.5, 1, 2.5, 4, 5], "b: the paper's, 0.1 and 0.25"),
    ("radii", float, 0, [0.05, 0.2, 1.0], "c: of the balls"),
    ("steps", int, 1, 5, "c: of the ascent"),
    ("iterations", int, 1, 15, "c: of the power iteration"),
    ("moments", int, 1, 5, "e, g: snapshots"),
    ("batches", int, 1, 4, "e: training batches"),
    ("ascent-seeds", int, 1, 3, "f: the first seeds only"),
    ("ascent-epochs", int, 0, 0, "f: epochs of its trainings; 0 for the run's")]


def parse_arguments(argv):
    parser = train_glue.Parser(description=__doc__,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", metavar="RUN",
                        help="the --out of train_glue.py or train_gsm8k.py, or a run folder in it; "
                        "NAME=RUN: what tables and pictures call its method")
    parser.add_argument("--parts", nargs="+", choices=MEASURES, default=list(MEASURES),
                        help="default: all")
    parser.add_argument("--out", help="folder of the pictures, tables and numbers (default: the "
                        "first RUN)")
    parser.add_argument("--cached", action=argparse.BooleanOptionalAction, default=False,
                        help="measure nothing: draw what the run folders hold, with the settings "
                        "it was measured with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: %(default)s")
    for name, kind, least, default, text in NUMBERS:
        parser.add_argument("--" + name, type=partial(number, kind, least),
                            nargs="+" if isinstance(default, list) else None, default=default,
                            help=f"{text} (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.points % 2 == 0:
        parser.error(f"--points is {options.points}; expected an odd number, so that alpha = 0 is "
                     "one of them")
    if len(options.span) != 2:
        parser.error(f"--span has {len(options.span)} values; expected two")
    return parser, options


def main(argv=None):
    parser, options = parse_arguments(argv)
    try:
        runs = load_runs(options)
        require_different_names(runs)
        results, used = measure(runs, options)
        out, report = options.out or options.run[0], {}
        os.makedirs(out, exist_ok=True)
        for task, parts in results.items():
            own = [run for run in runs if run.task == task]
            report[task] = report_of(task, parts, used[task], own, out)
    except (ValueError, OSError, FloatingPointError) as error:
        parser.error(str(error))
    return report


if __name__ == "__main__":
    main()

"""Fine-tune a model with LoRA, LoRA-SAM and Bi-LoRA, over several seeds, and compare them.

    python train_glue.py                                         # the demo: minutes on a CPU
    python train_glue.py --task mrpc --model google-t5/t5-base   # GLUE; downloaded once
    python train_glue.py --task mrpc --model DIR --data DIR      # files that are there: no network
    torchrun --nproc-per-node=2 train_glue.py --task mrpc --model DIR    # each batch on two GPUs

BERT and RoBERTa get a classifier.  T5, Llama and Qwen2 read a prompt and are trained to answer with
the label's words; the prediction is the class whose answer has the highest log-probability.  In
the demo a small pretrained encoder judges sentences acceptable or not (both are in notes/demo), and
30 % of its training labels are wrong.

All methods of one seed share data order, initial adapter and initial head: compare them seed by
seed.
"""

import argparse
import contextlib
import glob
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from bilora import (LoRALinear, add_lora, auxiliary_parameters, bilora_optimizers, bilora_step,
                    clip_perturbation_, lora_layers, lora_sam_step, lora_step, primary_parameters,
                    save_adapter)
from model import (Block, Transformer, as_list, checkpoint_files, encode_texts, load_tokenizer,
                   local_folder, naming, read_config, read_json, read_tensors, require,
                   require_room, save_pretrained, write_safetensors, write_text)


# --------------------------------------------------------------------------------------- methods
# One step of a method: (run, closure) -> what is logged of it.  `run` is what `prepare` returns;
# closure() runs forward and backward on the step's batch and returns the loss.

def lora(run, closure):
    return {"loss": lora_step(run.descent, closure)}

def lora_sam(run, closure):
    loss = lora_sam_step(run.descent, closure, run.rho, primary_parameters(run.model))
    return {"loss": loss, "perturbation": run.rho}

def bi_lora(run, closure):
    norms = []

    def clip(layers, rho):
        norms.append(clip_perturbation_(layers, rho))  # c before the clip

    loss = bilora_step(run.descent, run.ascent, closure, run.layers, run.rho, clip)
    return {"loss": loss, "perturbation": norms[0], "clipped": norms[0] > run.rho}

def adapters(args, model, auxiliary, layer=LoRALinear):
    """What these three train, adapters and a classifier: (layers, descent, ascent)."""
    rank2 = args.aux_rank if auxiliary else 0
    layers = add_lora(model, args.rank, args.alpha, rank2, layer=layer)
    if model.classifier is not None:
        model.classifier.requires_grad_(True)
    return layers, *bilora_optimizers(model, args.lr, args.aux_lr, args.ascent)

class Method(NamedTuple):
    step: Callable
    auxiliary: bool = False  # with an auxiliary pair; its radius is then the last one of --rho
    rho: float = None  # its own radius, where --rho is not given
    setup: Callable = adapters
    alone: bool = False  # it reads the rows of a batch: one process has to have all of them

METHODS = {"lora": Method(lora), "lora-sam": Method(lora_sam), "bi-lora": Method(bi_lora, True)}


# -------------------------------------------------------------------------------------- training
def train(args, method, seed, data, folder, progress):
    """One method, one seed: train, score, leave a run folder.  Returns what is in metrics.json."""
    rows = training_rows(args, data, seed)
    plan = plan_batches(args, seed, [len(row[0]) for row in rows])  # every batch of every epoch
    run = prepare(args, method, seed, partial(build_model, data), folder, len(plan))
    progress(len(run.log))
    for step in range(len(run.log), len(plan)):  # a resumed run begins where its log ends
        epoch, batch = plan[step][0], [rows[i] for i in plan[step][1]]
        closure = partial(forward_backward, args, run.model.train(), data, batch)
        begin, lr = time.perf_counter(), run.schedules[0].get_last_lr()[0]
        logged = METHODS[method].step(run, closure)
        seconds = time.perf_counter() - begin
        for schedule in run.schedules:
            schedule.step()
        run.log.append({"step": step + 1, "epoch": epoch, "lr": lr, "seconds": seconds, **logged})
        if step + 1 == len(plan) or plan[step + 1][0] > epoch:
            run.log[-1] |= evaluate(args, run.model, data)
        if args.save_every and (len(run.log) % args.save_every == 0 or "scores" in run.log[-1]):
            save_state(run)
        progress(1)
    few = SimpleNamespace(**{**vars(args), "micro_batch": args.micro_batch or args.batch_size})
    return finish_run(run, partial(forward_backward, few, run.model.eval(), data, rows[:128]))

def forward_backward(args, model, data, batch):
    """Mean loss over the batch's rows, or over their answers' tokens, 0-dim; its gradient adds up
    micro-batch by micro-batch, and process by process."""
    size, count = args.micro_batch or len(batch), len(batch)
    total, share = torch.zeros((), device=args.device), batch[RANK::WORLD]  # of this process
    if data.answers:
        count = sum(len(data.answers[label]) for *_, label in batch)
    for start in range(0, len(batch[::WORLD]), size):
        rows = share[start:start + size]
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            losses = row_losses(model, data, rows or batch[:1])  # --fsdp: all take as many passes
            loss = losses[:len(rows)].sum() / count
        loss.backward()
        total = total + loss.detach()
    sum_over_processes([total], model)
    return total

def prepare(args, method, seed, build, folder, steps):
    """A run: its model, layers, descent, ascent (None without auxiliary pairs), schedules, radius,
    log, and `state`, a dict for whatever a method keeps from step to step.

    Every method of a seed gets the same head and the same primary pairs.  With --resume all of it
    is as the last saved state has it."""
    torch.manual_seed(seed)  # head and adapters are drawn from it
    model, auxiliary = build(), METHODS[method].auxiliary
    if not args.fsdp:
        model.to(args.device)
    model.config.checkpointing = args.checkpointing
    layers, descent, ascent = METHODS[method].setup(args, model, auxiliary)
    if args.fsdp:
        shard(model, args.device)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = args.dropout
    schedules = [cosine_schedule(optimizer, steps) for optimizer in (descent, ascent) if optimizer]
    run = SimpleNamespace(args=args, method=method, seed=seed, model=model, layers=layers,
                          descent=descent, ascent=ascent, schedules=schedules, steps=steps,
                          rho=radius_of(args, method), folder=folder, log=[], state={})
    torch.manual_seed(seed + RANK)  # dropout masks: one stream, however much the adapters drew
    if args.resume and os.path.exists(os.path.join(folder, "state.pt")):
        load_state(run)
    if torch.device(args.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    return run

def radius_of(args, method):
    """The method's own radius, or one of --rho: the last one with an auxiliary pair."""
    own = METHODS[method].rho
    if own is not None and args.own_radii:
        return own
    return args.rho[-1 if METHODS[method].auxiliary else 0]

def cosine_schedule(optimizer, steps, warmup=0.03):
    """Linear warm-up over a fraction of the steps, then half a cosine to 0."""
    warm = max(1, round(warmup * steps))

    def factor(step):
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

def plan_batches(args, seed, lengths):
    """[(epoch, indices)] of every step, drawn by the seed: shuffled, but a batch has rows of
    similar length (they are sorted within 16 batches)."""
    rng, plan, size = random.Random(seed), [], args.batch_size
    for epoch in range(1, args.epochs + 1):
        order, batches = list(range(len(lengths))), []
        rng.shuffle(order)
        for start in range(0, len(order), 16 * size):
            part = sorted(order[start:start + 16 * size], key=lambda i: lengths[i])
            batches += [part[i:i + size] for i in range(0, len(part), size)]
        rng.shuffle(batches)
        plan += [(epoch, batch) for batch in batches]
    return plan

def training_rows(args, data, seed):
    """--limit rows drawn by the seed, a share --label-noise of them with another label."""
    count = min(args.limit or len(data.rows), len(data.rows))
    rows = random.Random(f"limit-{seed}").sample(data.rows, count)
    rng, classes = random.Random(f"noise-{seed}"), range(len(data.task.labels))
    for i in rng.sample(range(count), round(args.label_noise * count)):
        ids, types, label = rows[i]
        rows[i] = ids, types, rng.choice([other for other in classes if other != label])
    return rows

def loss_rise(run, closure, rho=0.05):
    """L(W + rho G / ||G||) - L(W) over all adapted W together, G = dL/dW: SAM's two passes, with an
    optimizer that does not move the weights.  The base's weight is moved: with DoRA the norm of
    the row too."""
    weights, losses = [layer.weight for layer in run.layers], []
    before = [weight.requires_grad for weight in weights]

    def both():
        losses.append(closure())
        return losses[-1]

    for weight in weights:
        weight.requires_grad_(True)
    lora_sam_step(torch.optim.SGD(weights, lr=0.0), both, rho)
    for weight, required in zip(weights, before):
        weight.requires_grad_(required)
    return (losses[1] - losses[0]).item()


# ------------------------------------------------------------------------------- loss and scores
def build_model(data):
    """The pretrained model.  An encoder's head is the checkpoint's only if config.json's id2label
    names the task's classes in their order, case aside; LABEL_0, LABEL_1, ... name no classes."""
    classes = None if data.answers else len(data.names)
    model = Transformer.from_pretrained(data.source, num_labels=classes, new_head=data.new_head)
    model.config.labels = data.names  # what save_pretrained writes
    return model

def on_device(numbers, device):
    """A tensor of int64.  A GPU copies it while the host goes on: from pinned memory."""
    tensor = torch.tensor(numbers)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

def pad_rows(rows, fill, device):
    """(B, L) int64, each row filled up on the right to the longest."""
    length = max(len(row) for row in rows)
    return on_device([[*row, *[fill] * (length - len(row))] for row in rows], device)

def logits_of(model, data, batch):
    """(B, classes) of an encoder with a head; float32."""
    ids, types, _ = zip(*batch)
    device, ones = next(model.parameters()).device, [[1] * len(row) for row in ids]
    ids, mask = pad_rows(ids, data.pad_id, device), pad_rows(ones, 0, device)
    return model(ids, mask, pad_rows(types, 0, device)).float()

def row_losses(model, data, batch):
    """-log p of each row's class, or of its answer, summed over the answer's tokens; (B,)."""
    device, labels = next(model.parameters()).device, [label for *_, label in batch]
    if data.answers:
        answers = [data.answers[label] for label in labels]
        return answer_losses(model, [row[0] for row in batch], answers, data.pad_id, device)
    labels = on_device(labels, device)
    return F.cross_entropy(logits_of(model, data, batch), labels, reduction="none")

def answer_losses(model, prompts, answers, pad_id, device):
    """-log p(answer | prompt) of each row, (B,), summed over the answer's tokens.

    A decoder reads the prompt and then the answer.  Beside an encoder, which reads the prompt, the
    decoder reads the answer alone."""
    alone = model.encoder is not None
    before = [[model.config.start_id]] * len(prompts) if alone else prompts
    read = [[*start, *answer[:-1]] for start, answer in zip(before, answers)]
    ids = pad_rows(read, pad_id, device)                                                # (B, T)
    places = [(i, len(start) - 1 + j) for i, (start, answer) in enumerate(zip(before, answers))
              for j in range(len(answer))]
    keep = tuple(on_device(places, device).T)               # rows and columns of N answers' tokens
    labels = on_device(sum(answers, []), device)                                        # (N,)
    mask = pad_rows([[1] * len(row) for row in (prompts if alone else read)], 0, device)
    if alone:
        h = model.hidden(pad_rows(prompts, pad_id, device), mask, decoder_input_ids=ids)
    else:
        h = model.hidden(ids, mask)                                                     # (B, T, D)
    losses = torch.zeros(ids.shape, device=device)                                      # (B, T)
    logits = model.logits(h[keep]).float()                                              # (N, V)
    losses[keep] = F.cross_entropy(logits, labels, reduction="none")
    return losses.sum(1)

@torch.no_grad()
def predict(args, model, data, rows):
    """The class that the model gives each row."""
    model.eval()
    device = torch.device(args.device)
    predictions = torch.zeros(len(rows), dtype=torch.int64, device=device)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # less padding
    starts = range(0, len(order), 128)
    for start in starts if args.fsdp else starts[RANK::WORLD]:
        part = order[start:start + 128]
        batch = [rows[i] for i in part]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            if data.answers:  # log p(answer | prompt) of each class's answer
                prompts = [row[0] for row in batch for _ in data.answers]
                answers = data.answers * len(batch)
                losses = answer_losses(model, prompts, answers, data.pad_id, device)
                scores = -losses.view(len(batch), -1)
            else:
                scores = logits_of(model, data, batch)
        predictions[part] = scores.argmax(1)
    if not args.fsdp:
        sum_over_processes([predictions])  # of the other processes' rows they are 0
    return predictions.tolist()

def evaluate(args, model, data):
    """For the log: the scores of every evaluation set, and how often each class is predicted."""
    scores, counts = {}, {}
    for name, rows in data.sets.items():
        predictions = predict(args, model, data, rows)
        scores |= score(data, name, predictions)
        counts[name] = [predictions.count(c) for c in range(len(data.task.labels))]
    return {"scores": scores, "predicted": counts}

def score(data, name, predictions):
    """{metric: value} of one evaluation set.  F1 is that of class 1; what is 0 / 0 is 0.  With
    several sets a metric's name ends in the set's: accuracy_matched."""
    p, y = np.array(predictions), np.array([label for *_, label in data.sets[name]])
    suffix = "_" + name.removeprefix("dev_") if len(data.sets) > 1 else ""
    found = {"accuracy": np.mean(p == y), "f1": 2 * np.sum(p * y) / max(1, np.sum(p) + np.sum(y)),
             "matthews": np.corrcoef(p, y)[0, 1] if p.std() > 0 and y.std() > 0 else 0.0}
    return {metric + suffix: float(found[metric]) for metric in data.task.metrics}


# ------------------------------------------------------------------------------------------ data
class Task(NamedTuple):
    """A GLUE task: its files and columns, what its labels mean, how it is scored, its settings."""
    folder: str                  # in GLUE's root
    text: tuple                  # columns of the sentences: names, or indices without a header
    label: object                # column of the label
    labels: tuple                # as the file has them, in the order of the classes
    metrics: tuple
    settings: dict               # defaults of the options
    prompt: str = ""             # for a model that answers in text
    answers: str = ""            # in the order of the classes; their names, but for `names`
    dev: tuple = ("dev",)        # names of the evaluation files, without .tsv
    names: str = ""              # of the classes, where they are no answers

DEMO = os.path.join(os.path.dirname(os.path.abspath(__file__)), "notes", "demo", "sentences")
JOBS = 1 if torch.cuda.is_available() else os.cpu_count()  # of the demo
SHORT = {"epochs": 3, "lr": 5e-4, "batch_size": 32, "rho": [0.01, 0.05], "seeds": [0, 1, 2]}
LONG, TWO = {**SHORT, "epochs": 10}, ("sentence1", "sentence2")
RTE = {**LONG, "rho": [0.05, 0.1], "seeds": [0, 1, 2, 3, 4]}
YES_NO, ENTAILED = ("0", "1"), ("entailment", "not_entailment")
ACCEPTED = "unacceptable acceptable"
SIMILAR = "classify the semantic similarity of the text: {}\n{}\nresult: "
TASKS = {  # settings: the paper's, the demo's ours; prompts and answers: LoRA-GA's, rte's ours
    "demo": Task("", (3,), 1, YES_NO, ("accuracy",), {
        **LONG, "lr": 2e-3, "batch_size": 64, "rho": [0.2, 0.5], "aux_lr": 2.0, "limit": 2000,
        "label_noise": 0.3, "model": DEMO, "data": DEMO, "jobs": JOBS}, names=ACCEPTED),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", YES_NO, ("accuracy", "f1"), LONG,
                 SIMILAR, "different equivalent", names="not_equivalent equivalent"),
    "cola": Task("CoLA", (3,), 1, YES_NO, ("matthews", "accuracy"), LONG,
                 "classify the grammaticality of the text: {}\nresult: ", ACCEPTED),
    "sst2": Task("SST-2", ("sentence",), "label", YES_NO, ("accuracy",), SHORT,
                 "classify the sentiment of the text: {}\nresult: ", "negative positive"),
    "rte": Task("RTE", TWO, "label", ENTAILED, ("accuracy",), RTE, SIMILAR, " ".join(ENTAILED)),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILED, ("accuracy",), SHORT,
                 SIMILAR.replace("text", "question and the sentence"), " ".join(ENTAILED)),
    "mnli": Task("MNLI", TWO, "gold_label", ("entailment", "neutral", "contradiction"),
                 ("accuracy",), SHORT, SIMILAR, "entailment neutral contradiction",
                 ("dev_matched", "dev_mismatched"))}

def load(args):
    """What a command reads: task, rows, evaluation sets, answers, names of the classes, whether
    their head is new, pad id, the checkpoint's folder, files, notes to print.  A row is (token ids,
    segment ids, label).  ValueError or OSError where that fails."""
    task, source = TASKS[args.task], local_folder(args.model, args.revision)
    for words in (task.names or task.answers, task.answers or task.names):
        require(len(words.split()) == len(task.labels), f"{args.task} in TASKS has {words!r}; "
                f"expected one word for each of the labels {', '.join(task.labels)}")
    (config, _), tokenizer = read_config(source), load_tokenizer(source)
    prompt, ends, answers = None, [], []
    lengths = {f"--max-length is {args.max_length}": args.max_length}
    folder = data_folder(args, task)
    paths = [os.path.join(folder, name + ".tsv") for name in ("train", *task.dev)]
    texts = [read_tsv(task, path) for path in paths]
    if config.decoder_layers:
        require(task.prompt, f"{args.task} has no prompt; expected an encoder as --model")
        prompt = task.prompt
        answers = encode_answers(tokenizer, task.answers.split(), config.eos_id)
        if not config.encoder_layers:  # it reads the answer too, but for its last token
            ends = as_list(config.eos_id)
            lengths["--max-length and an answer"] = args.max_length + max(map(len, answers)) - 1
    rows, *dev = [encode(tokenizer, part, prompt, args.max_length, ends) for part in texts]
    tokens, segments, _ = zip(*rows, *(row for part in dev for row in part))
    require_room(config, source, [*tokens, *answers], segments, lengths)
    data = SimpleNamespace(task=task, rows=rows, sets=dict(zip(task.dev, dev)), answers=answers,
                           pad_id=config.pad_id, source=source, majority={}, notes=[],
                           files=[*paths, *checkpoint_files(source)])
    data.names = (task.names or task.answers).split()
    data.new_head = [name.lower() for name in config.labels] != data.names
    found = [] if answers or not data.new_head else read_tensors(source)[1]
    if any(key.startswith("classifier.") for key in found):
        old, new = ", ".join(config.labels) or "classes without names", ", ".join(data.names)
        data.notes.append(f"{source}: its classifier of {old} is not used; one of {new} is drawn")
    label = statistics.mode(label for *_, label in rows)
    for name, part in data.sets.items():
        data.majority |= score(data, name, [label] * len(part))
    return data

def read_tsv(task, path):
    """[(sentences, label)] of a GLUE file: no quoting, a byte-order mark allowed.  Blank lines at
    the end are no rows, elsewhere an error.  ValueError names file, line and value."""
    with open(path, "rb") as file, naming(path):
        lines = file.readlines()
    lines = [decode(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)]
    while lines and not lines[-1].strip():
        lines.pop()
    columns, start = [*task.text, task.label], 0
    if isinstance(task.label, str):
        header, start = lines[0].split("\t") if lines else [], 1
        for name in columns:
            require(name in header, f"{path}, line 1: no column {name!r}; the header has {header}")
        columns = [header.index(name) for name in columns]
    rows = []
    for number, line in enumerate(lines[start:], start + 1):
        where, fields, count = f"{path}, line {number}", line.split("\t"), max(columns) + 1
        require(line.strip(), f"{where}: a blank line before the last row")
        require(len(fields) >= count, f"{where}: {len(fields)} fields, expected at least {count}")
        *text, label = (fields[column] for column in columns)
        require(label in task.labels,
                f"{where}: label {label!r}, expected one of {', '.join(task.labels)}")
        rows.append((tuple(text), task.labels.index(label)))
    require(rows, f"{path}: no rows")
    return rows

def decode(line, where):
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error}") from None

def encode(tokenizer, rows, prompt, max_length, ends=()):
    """[(token ids, segment ids, label)], truncated to max_length: a prompt, which ends in the
    question, from its beginning, sentences from their end.  ends: those of encode_texts."""
    special = tokenizer.num_special_tokens_to_add(prompt is None and len(rows[0][0]) > 1)
    require(max_length > special, f"--max-length is {max_length}; expected more than the {special} "
            "special tokens of a row")
    tokenizer.enable_truncation(max_length, direction="left" if prompt else "right")
    if prompt:
        texts = [prompt.format(*text) for text, _ in rows]
    else:
        texts = [text if len(text) > 1 else text[0] for text, _ in rows]
    encoded = encode_texts(tokenizer, texts, ends)
    return [(ids, types, label) for (ids, types), (_, label) in zip(encoded, rows)]

def encode_answers(tokenizer, words, eos_id):
    """Token ids of each class's answer, the end of the sequence included."""
    encoded = encode_texts(tokenizer, words, template=False)
    answers = [ids + as_list(eos_id)[:1] for ids, _ in encoded]
    if len(set(map(tuple, answers))) < len(answers):
        raise ValueError(f"the tokenizer gives two of {', '.join(words)} the same tokens")
    return answers


# ------------------------------------------------------------------------------------- downloads
GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
ZIPS = {  # task: (file, sha256)
    "cola": ("CoLA.zip", "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    "sst2": ("SST-2.zip", "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    "rte": ("RTE.zip", "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    "qnli": ("QNLIv2.zip", "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    "mnli": ("MNLI.zip", "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633")}
MRPC = {  # (address, sha256) of the pairs, and of the ids that are the development set
    "pairs": ("https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt",
              "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
    "ids": ("https://raw.githubusercontent.com/MegEngine/Models/master/official/nlp/bert/glue_data/"
            "MRPC/dev_ids.tsv", "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7")}

def data_folder(args, task):
    """The folder of the task's files: --data itself, or in it as GLUE's root, or in the cache,
    where it appears once all of its files are whole."""
    home = os.environ.get("BILORA_CACHE") or os.path.expanduser("~/.cache/bilora")
    root = args.data or os.path.join(home, "glue")
    folder = os.path.join(root, task.folder)
    if args.data or os.path.isdir(folder):
        return folder if os.path.isdir(folder) else root
    os.makedirs(root, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        whole = os.path.join(scratch, task.folder)
        if args.task == "mrpc":
            for file, (address, sha256) in MRPC.items():
                fetch(address, sha256, os.path.join(scratch, file))
            split_mrpc(scratch, whole)
        else:
            name, sha256 = ZIPS[args.task]
            fetch(GLUE + name, sha256, os.path.join(scratch, "files.zip"))
            shutil.unpack_archive(os.path.join(scratch, "files.zip"), scratch)
        with contextlib.suppress(OSError):  # another process was first
            os.rename(whole, folder)
    return folder

def fetch(address, sha256, path):
    """Download a file with a progress bar; ValueError, and no file, unless it is the right one."""
    try:
        torch.hub.download_url_to_file(address, path, hash_prefix=sha256)
    except Exception as error:  # of several libraries
        raise ValueError(f"{address}: {' '.join(str(error).split())}; connect to the network, or "
                         "give files that are there with --data") from None

def split_mrpc(scratch, folder):
    """GLUE's train.tsv and dev.tsv: dev has the pairs whose two ids stand in one line of `ids`."""
    with open(os.path.join(scratch, "ids"), "rb") as file:
        chosen = {tuple(line.split()) for line in file}
    with open(os.path.join(scratch, "pairs"), "rb") as file:
        header, *rows = file.readlines()
    os.mkdir(folder)
    for name, wanted in (("train.tsv", False), ("dev.tsv", True)):
        with open(os.path.join(folder, name), "wb") as file:
            part = [row for row in rows if (tuple(row.split(b"\t")[1:3]) in chosen) == wanted]
            file.writelines([header, *part])


# ------------------------------------------------------------------------------ several processes
# torchrun starts WORLD processes.  Number RANK (not an adapter's rank) takes every WORLD-th row of
# a batch, from row RANK on.  The sums are the same for all, so all take the same step.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

@torch.no_grad()
def sum_over_processes(tensors, model=None):
    """Replace tensors, and gradients of a model, by their sums over all processes: one message for
    each dtype.  A gradient that some processes lack is zero there; one that all lack stays None."""
    if WORLD == 1:
        return
    params = [] if model is None else [p for p in model.parameters() if p.requires_grad]
    there = torch.tensor([float(p.grad is not None) for p in params], device=tensors[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    tensors = [*tensors, there, *gradients] if params else tensors
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        part = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = parameters_to_vector(part)
        talk(torch.distributed.all_reduce, flat)
        vector_to_parameters(flat, part)
    for p, gradient, count in zip(params, gradients, there.tolist()):
        p.grad = gradient if count else None

def gathered(value):
    """[value of process 0, of process 1, ...], in every process."""
    values = [value] * WORLD
    if WORLD > 1:
        talk(torch.distributed.all_gather_object, values, value)
    return values

def talk(operation, *arguments):
    try:
        operation(*arguments)
    except RuntimeError as error:  # another process has ended, and has said why
        raise ConnectionError(str(error).partition(". ")[0]) from None

def shard(model, device):
    """Deal the frozen weights of each block out to all processes (FSDP2): a block gathers its own
    while it computes.  What is trained stays whole in every process."""
    from torch.distributed.device_mesh import init_device_mesh  # here, as it takes a second
    from torch.distributed.fsdp import fully_shard

    trained = {p for p in model.parameters() if p.requires_grad}
    require(len(trained) < len(list(model.parameters())), "--fsdp deals out frozen weights; here "
            "all are trained")
    mesh = init_device_mesh(torch.device(device).type, (WORLD,))
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=mesh, ignored_params=trained)  # it goes to the device, alone
    model.to(device)

def require_one_model(model):
    """ValueError, which names a tensor, unless all processes have trained the same values."""
    sums = gathered({key: torch.hash_tensor(t).item() for key, t in trained_tensors(model).items()})
    for name, value in sums[0].items():
        for rank, own in enumerate(sums):
            require(own[name] == value, f"{name} of process {rank} is not that of process 0")


# ------------------------------------------------------------------------------ the files of a run
def trained_tensors(model):
    """{name: tensor} of all that is trained, and of buffers, which training may change; writing
    into one writes into the model."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())

def parts_of(run):
    """What has a state_dict of its own, in a fixed order."""
    return [part for part in (run.descent, run.ascent, *run.schedules) if part]

def read_log(run):
    """Make numbers of the log's tensors: only here does the host wait for them."""
    for row in run.log:
        row |= {key: float(value) for key, value in row.items() if torch.is_tensor(value)}

def save_state(run):
    """All that the rest of the run depends on, in the run folder's state.pt."""
    read_log(run)
    path, cuda = os.path.join(run.folder, "state.pt"), torch.cuda.is_available()
    require_one_model(run.model)
    drawn = gathered([torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else [])])
    if RANK > 0:
        return
    state = {"trained": trained_tensors(run.model), "log": run.log, "state": run.state,
             "parts": [part.state_dict() for part in parts_of(run)], "random": drawn}
    try:
        torch.save(state, path + ".tmp")
    except RuntimeError as error:  # torch's own of a full disk
        raise OSError(f"{path}.tmp: {str(error).splitlines()[0]}") from None
    os.replace(path + ".tmp", path)

def load_state(run):
    """Put the saved state back."""
    path, trained = os.path.join(run.folder, "state.pt"), trained_tensors(run.model)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name in trained.keys() | saved["trained"].keys():
            trained[name].copy_(saved["trained"][name])
        for part, state in zip(parts_of(run), saved["parts"], strict=True):
            part.load_state_dict(state)
        cpu, *cuda = saved["random"][RANK % len(saved["random"])]
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        run.log, run.state = saved["log"], saved["state"]
    except Exception as error:  # a file that is not one, or not of this run
        raise OSError(f"{path}: not the state of this run ({type(error).__name__}); remove it to "
                      "start the run anew") from None

def finish_run(run, closure=None, files=()):
    """Write the files of a finished run; metrics.json is written last: it marks it as finished.
    closure: forward and backward on fixed rows, for loss_rise.  files: more, (name, text) each."""
    read_log(run)
    model, memory = run.model, peak_memory(run.args.device)  # the rise, measured next, needs more
    require_one_model(model)
    if lora_layers(model):
        with tempfile.TemporaryDirectory() as scratch:  # all take part: sharded W0 is gathered
            save_adapter(model, scratch if RANK > 0 else run.folder, model.module_names,
                         write_safetensors)
    whole = all(isinstance(layer.weight, torch.nn.Parameter) for layer in run.layers)
    measurable = closure and whole and not run.args.fsdp  # W0 can be moved
    rise = {"rise": loss_rise(run, closure)} if measurable else {}
    result = result_of(run, rise, memory)
    if RANK > 0:  # the first process writes
        return result
    lines = "".join(json.dumps(row) + "\n" for row in run.log)
    for name, text in (("log.jsonl", lines), *files):
        write_text(os.path.join(run.folder, name), text)
    if not lora_layers(model):
        source = local_folder(run.args.model, run.args.revision)
        save_pretrained(model, os.path.join(run.folder, "model"), source, "float32")
    draw_curves([result], os.path.join(run.folder, "curves.png"))
    write_text(os.path.join(run.folder, "metrics.json"), json.dumps(result, indent=2))
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(run.folder, "state.pt"))
    return result

def result_of(run, rise, memory):
    """What is in the run's metrics.json."""
    model, log, names = run.model, run.log, list(run.log[-1]["scores"])
    epochs = [{"epoch": row["epoch"], **row["scores"]} for row in log if "scores" in row]
    for row in epochs:
        row["loss"] = statistics.fmean(r["loss"] for r in log if r["epoch"] == row["epoch"])
    best = max(epochs, key=lambda row: row[names[0]])
    head = [] if model.classifier is None else list(model.classifier.parameters())
    groups = {"primary": primary_parameters(model), "auxiliary": auxiliary_parameters(model),
              "head": head}
    listed = {p for group in groups.values() for p in group}
    groups["base"] = [p for p in model.parameters() if p.requires_grad and p not in listed]
    return {"method": run.method, "seed": run.seed,
            "config": read_json(os.path.join(run.folder, "config.json")),
            "parameters": {name: sum(p.numel() for p in group) for name, group in groups.items()},
            "metrics": log[-1]["scores"] | {f"best_{name}": best[name] for name in names} | rise,
            "predicted": log[-1].get("predicted"), "best_epoch": best["epoch"], "epochs": epochs,
            "rho": run.rho,
            "clipped_fraction": statistics.fmean(row.get("clipped", 0.0) for row in log),
            "step_seconds": statistics.median(row["seconds"] for row in log),
            "peak_memory_bytes": memory}

def peak_memory(device):
    """Bytes: allocated on a GPU; on a CPU the process's largest resident size, on Linux."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


# ------------------------------------------------------------------------------- all runs together
def compare(args, fail, load, train, show=None):
    """Train every method with every seed, --jobs at a time; write metrics.json and curves.png over
    all, print the table.  Returns what is in metrics.json.

    load(args) reads what the runs share; train(args, method, seed, data, folder, progress) trains
    one; show(args, report) prints what else there is.  What goes wrong ends in fail(message);
    nothing is written before all input is checked."""
    folders = {(seed, method): os.path.join(args.out, f"{method}-seed{seed}")
               for seed in args.seeds for method in args.method}
    try:
        data, results = read_input(args, load, folders)
        results |= train_all(args, load, train, data, folders, results)
        if RANK > 0:
            return None
        order = list(METHODS)
        keys = sorted(results, key=lambda key: (key[0], order.index(key[1])))
        report = write_report(args, [results[key] for key in keys], data.majority)
        draw_curves(report["results"], os.path.join(args.out, "curves.png"), data.majority)
    except (ValueError, OSError, BrokenExecutor) as error:
        fail(str(error))
    except FloatingPointError as error:
        raise SystemExit(1 if RANK > 0 else f"error: {error}")  # all have the same loss
    except KeyboardInterrupt:
        text = "interrupted; --resume goes on from the last state of --save-every"
        raise SystemExit(1 if RANK > 0 else text)
    print_table(report)
    if show:
        show(args, report)
    print(f"Table: {os.path.join(args.out, 'metrics.json')}; picture: "
          f"{os.path.join(args.out, 'curves.png')}; adapters: in a folder of each run beside them")
    return report

def read_input(args, load, folders):
    """(data, results of all runs that are finished in --out).  The first process goes ahead: the
    others find what it has downloaded and written."""
    if WORLD > 1:
        backend = "nccl" if torch.device(args.device).type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(hours=2))  # downloads too
    if RANK > 0:
        gathered(None)
    data = load(args)
    require_ranks_that_fit(args, data.source)
    done = begin(args, data.files, folders)
    if RANK == 0:
        gathered(None)
    return data, done

def train_all(args, load, train, data, folders, finished):
    """{(seed, method): result} of the runs that are not finished."""
    rows = min(args.limit or len(data.rows), len(data.rows))
    todo = {key: folder for key, folder in folders.items() if key not in finished}
    kind, capability = torch.device(args.device).type, torch.backends.cpu.get_cpu_capability()
    if args.bf16 and kind == "cpu" and capability == "AVX2":  # oneDNN has kernels from AVX-512 on
        data.notes.append("this CPU has no AVX-512: bfloat16 is many times slower than float32 "
                          "(--no-bf16)")
    if RANK == 0:
        print("\n".join([*data.notes, f"{args.task}: {rows} training rows; {len(todo)} runs to "
                         f"train in {args.out}, {len(finished)} are finished"]))
    steps = len(todo) * args.epochs * math.ceil(rows / args.batch_size)
    with tqdm(total=steps, desc="all runs", unit="step", disable=RANK > 0 or None) as bar:
        results = dict(run_all(args, load, train, data, todo, bar.update))
    if WORLD > 1:
        talk(torch.distributed.barrier)  # gloo's threads must be idle when Python ends
        torch.distributed.destroy_process_group()
    return results

def require_ranks_that_fit(args, source):
    """add_lora's ValueError, before anything is written."""
    with torch.device("meta"):
        model = Transformer(read_config(source)[0])
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    most = min(min(linear.weight.shape) for linear in linears)
    auxiliary = any(METHODS[method].auxiliary for method in args.method)
    for name, rank in (("rank", args.rank), ("aux_rank", args.aux_rank if auxiliary else 0)):
        if rank > most:
            raise ValueError(f"{name} is {rank}; the model's layers take at most {most}")

def begin(args, files, folders):
    """{(seed, method): result} of all runs in --out that are finished; makes the folders of those
    that are asked for and are not.

    ValueError, before anything has changed, for an --out with other settings, and for a run,
    finished or begun, that neither --resume nor --overwrite asks for."""
    others = ("method", "seeds", "out", "resume", "overwrite", "save_every", "jobs", "defaults")
    config = {name: value for name, value in vars(args).items() if name not in others}
    config["files"] = [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in files]
    done, begun = {}, 0
    own = [os.path.join(folder, "config.json") for folder in (args.out, *folders.values())]
    runs = sorted(glob.glob(os.path.join(glob.escape(args.out), "*", "config.json")))
    for path in [own[0], *runs]:
        if not os.path.exists(path) or args.overwrite and path in own:
            continue
        old, folder = read_json(path), os.path.dirname(path)
        if path != own[0] and old.get("method") not in METHODS:
            continue  # no run, or one of a method that this command does not know
        for name, value in config.items():
            found = old.get(name, args.defaults.get(name))  # an option that is newer than the run
            require(found == value, f"{path}: {name} is {found!r}, now {value!r}; expected the "
                    "same, another --out, or --overwrite of all runs in it")
        if path != own[0] and os.path.exists(os.path.join(folder, "metrics.json")):
            done[old["seed"], old["method"]] = read_json(os.path.join(folder, "metrics.json"))
        elif path in own[1:]:
            begun += os.path.exists(os.path.join(folder, "state.pt"))
    if RANK > 0:  # the first process has made the folders
        return done
    asked = len(done.keys() & folders.keys())
    require(args.resume or not asked and not begun, f"{args.out}: {asked} of these runs are "
            f"finished, {begun} begun; --resume goes on, --overwrite trains them anew")
    for (seed, method), folder in folders.items():
        if args.overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder, exist_ok=True)
        settings = {"method": method, "seed": seed, **config}
        write_text(os.path.join(folder, "config.json"), json.dumps(settings, indent=2))
    write_text(own[0], json.dumps(config, indent=2))
    return done

def run_all(args, load, train, data, folders, progress):
    """(key, result) of each run as it ends; with --jobs above 1 in processes of one thread each."""
    if args.jobs == 1:
        WORKER.update(data=data, progress=progress)
        yield from (one_run(train, args, *item) for item in folders.items())
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with ProcessPoolExecutor(args.jobs, context, start_worker, (load, args, queue)) as pool:
        futures = {pool.submit(one_run, train, args, *item) for item in folders.items()}
        try:
            while futures:
                ended, futures = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
                while not queue.empty():
                    progress(queue.get())
                yield from (future.result() for future in ended)
        finally:  # after an error the runs that wait do not begin
            pool.shutdown(cancel_futures=True)

WORKER = {}  # of a process: what it has read, and how it reports a step

def start_worker(load, args, queue):
    def follow():  # a process whose parent was killed ends too
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback of its own
    queue.cancel_join_thread()  # a process may end with steps that nobody has read
    torch.set_num_threads(1)  # two beside another busy process are far slower than one
    WORKER.update(data=load(args), progress=queue.put)

def one_run(train, args, key, folder):
    """(key, result).  An error says which run it was."""
    seed, method = key[:2]
    try:
        return key, train(args, method, seed, WORKER["data"], folder, WORKER["progress"])
    except (FloatingPointError, ValueError, OSError) as error:
        kind = FloatingPointError if isinstance(error, FloatingPointError) else ValueError
        raise kind(f"{method}, seed {seed}: {error}") from None

def mean_stderr(values):
    n = len(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return {"mean": statistics.fmean(values), "stderr": error, "n": n}

def write_report(args, results, majority):
    """OUT/metrics.json: results, and per method mean, standard error and number of seeds of each
    metric, and of its difference, seed by seed, to the first method of the table.  majority: the
    scores of the most frequent training label."""
    runs, first, summary, difference = {}, next(iter(METHODS)), {}, {}
    for run in results:
        runs.setdefault(run["method"], {})[run["seed"]] = run["metrics"]
    for method, own in runs.items():
        paired = [seed for seed in own if method != first and seed in runs.get(first, {})]
        for name in results[0]["metrics"]:
            values = [metrics[name] for metrics in own.values()]
            summary.setdefault(method, {})[name] = mean_stderr(values)
            if paired:
                values = [own[seed][name] - runs[first][seed][name] for seed in paired]
                difference.setdefault(method, {})[name] = mean_stderr(values)
    config = {name: value for name, value in vars(args).items() if name != "defaults"}
    report = {"task": args.task, "model": args.model, "config": config, "results": results,
              "summary": summary, "baseline": first, "difference": difference,
              "majority": majority}
    write_text(os.path.join(args.out, "metrics.json"), json.dumps(report, indent=2))
    return report

def print_table(report):
    """A Markdown table for each metric: mean ± standard error over the seeds."""
    def cell(entry):
        if entry is None:
            return ""
        error = "" if entry["stderr"] is None else f" ± {entry['stderr']:.3f}"
        return f"{entry['mean']:.3f}{error}"

    summary, results, names = report["summary"], report["results"], report["results"][0]["metrics"]
    rise = ["rise"] if "rise" in names else []
    for name in [name for name in names if f"best_{name}" in names]:
        head = [name, "last epoch", f"minus {report['baseline']}'s", "best epoch", *rise, "s/step"]
        print(f"\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
        if name in report["majority"]:
            empty = "| " * (len(head) - 2)
            print(f"| majority class | {report['majority'][name]:.3f} {empty}|")
        for method, entries in summary.items():
            seconds = [run["step_seconds"] for run in results if run["method"] == method]
            cells = [entries[name], report["difference"].get(method, {}).get(name),
                     *(entries[key] for key in ("best_" + name, *rise))]
            median = f"{statistics.median(seconds):.3f}"
            print("| " + " | ".join([method, *map(cell, cells), median]) + " |")
    seeds = sorted({run["seed"] for run in results})
    print(f"\nMean ± standard error; seeds {', '.join(map(str, seeds))}; differences are paired by "
          "seed; the best epoch is chosen on the set it is reported on.")
    if rise:
        print("rise: of the training loss from W to W + 0.05 G / ||G||, over all adapted layers, "
              "on fixed rows.")
    for run in results:
        for name, counts in (run["predicted"] or {}).items():
            if max(counts) == sum(counts):
                print(f"{run['method']}, seed {run['seed']}: predicts one class only in {name}")

def draw_curves(results, path, majority=()):
    """Training loss and first metric over the epochs, a line a method, a band of one standard error
    over the seeds; dotted: the score of the most frequent label."""
    from matplotlib.figure import Figure  # here, as most imports of this file draw nothing

    metric, seeds = next(iter(results[0]["metrics"])), {run["seed"] for run in results}
    height = max(3.2, 0.25 * len({run["method"] for run in results}))
    figure = Figure(figsize=(9, height), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2), ("loss", metric)):
        for method in dict.fromkeys(run["method"] for run in results):
            runs = [run["epochs"] for run in results if run["method"] == method]
            place, epochs = list(METHODS).index(method), [row["epoch"] for row in runs[0]]
            colour, line = f"C{place % 10}", ("-", "--", ":")[place // 10 % 3]
            curves = np.array([[row[key] for row in run] for run in runs])
            mean, error = curves.mean(0), curves.std(0) / math.sqrt(max(1, len(curves) - 1))
            axis.plot(epochs, mean, marker=".", label=method, color=colour, linestyle=line)
            axis.fill_between(epochs, mean - error, mean + error, alpha=0.2, color=colour)
        axis.set(xlabel="epoch", ylabel="training loss" if key == "loss" else key)
    if metric in majority:
        axis.axhline(majority[metric], color="grey", linestyle=":", label="majority class")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"{results[0]['config']['task']}; seeds: {len(seeds)}")
    figure.savefig(path + ".tmp", format="png", dpi=100)
    os.replace(path + ".tmp", path)


# -------------------------------------------------------------------------------------- arguments
SOURCES = """Whose the defaults are.  The paper's: rank, aux-rank, alpha, aux-lr = lr, a cosine with
a warm-up of 0.03 of the steps, adapters on all linear layers, max-length; by task lr, batch-size,
micro-batch, epochs, rho and the number of seeds.  The code that the paper follows: AdamW without
weight decay, prompts, MetaMathQA's first 100,000 rows of at most 512 tokens, max-new-tokens.  The
authors' code, as reported: ascent sgd.  Ours: the rest, and everything about the demo and gsm8k;
notes/usage.md lists where it differs from the code that the paper follows."""

def number(kind, least, text, below=math.inf):
    """An argparse type: a number from `least` to under `below`."""
    with contextlib.suppress(ValueError):
        if least <= kind(text) < below:
            return kind(text)
    limit = "" if below == math.inf else f" and < {below}"
    raise argparse.ArgumentTypeError(f"{text!r}, expected {kind.__name__} >= {least}{limit}")

SHARE = {"type": partial(number, float, 0, below=1)}
KINDS = {int: {"type": partial(number, int, 1)}, float: {"type": partial(number, float, 0)},
         bool: {"action": argparse.BooleanOptionalAction}, str: {}}
OPTIONS = [  # of both scripts: group, name, one of KINDS or argparse's own words, default, help
    ("task", "data", str, None, "folder of the task's files (default: downloaded once)"),
    ("task", "model", str, None, "folder of a checkpoint, or the id of one on the hub"),
    ("task", "revision", str, None, "of the model on the hub: branch, tag or commit"),
    ("task", "limit", int, None, "training rows, drawn by the seed (default: all)"),
    ("method", "rank", int, 8, "r"),
    ("method", "aux-rank", int, 8, "r2, of the auxiliary pairs"),
    ("method", "alpha", {"type": partial(number, float, 1e-6)}, 16, "the scale is alpha / rank"),
    ("method", "rho", {**KINDS[float], "nargs": "+"}, None,
     "radius; a second one is for auxiliary pairs"),
    ("method", "lr", float, None, "largest rate of the schedule, eta1"),
    ("method", "aux-lr", float, None, "eta2, of the ascent (default: that of lr)"),
    ("method", "ascent", {"choices": ("sgd", "adamw")}, "sgd", "sgd is Eq. (9) as printed"),
    ("method", "epochs", int, None, "passes over the training rows"),
    ("method", "batch-size", int, None, "rows a step"),
    ("method", "micro-batch", int, None, "rows a forward pass (default: the batch)"),
    ("method", "dropout", SHARE, 0.0, "of the base; the adapters have none"),
    ("run", "seeds", {"type": partial(number, int, 0, below=2**63), "nargs": "+"}, None,
     "one run of each method for each"),
    ("run", "device", str, "cuda" if torch.cuda.is_available() else "cpu", "where to train"),
    ("run", "bf16", bool, False, "autocast to bfloat16; GSM8K's base is kept in it too"),
    ("run", "checkpointing", bool, False, "compute each block twice, to save memory"),
    ("run", "fsdp", bool, False, "deal the frozen weights out to torchrun's processes"),
    ("run", "jobs", int, 1, "runs at a time; above 1 each in a process of one thread"),
    ("run", "out", str, None, "folder of the results"),
    ("run", "save-every", int, None, "steps between saved states; one more where scores are due"),
    ("run", "resume", bool, False, "take finished runs of --out, and go on with the others"),
    ("run", "overwrite", bool, False, "delete runs that are in --out already")]

class Parser(argparse.ArgumentParser):
    def error(self, message):
        if RANK > 0:
            time.sleep(5)  # process 0 mostly says the same, and torchrun then ends this one
        self.exit(2, f"{self.prog}: error: {message}\n")

def parse_arguments(argv, doc, tasks, options):
    """(arguments, fail): those of OPTIONS and `options`.  tasks: {name: {option: default}}; the
    first one is the demo.  fail(message) ends the program with one line and exit code 2."""
    first, task_option = Parser(add_help=False), {"type": str.lower, "choices": tasks}
    first.add_argument("--task", default=next(iter(tasks)), **task_option)
    task = first.parse_known_args(argv)[0].task
    parser = Parser(description=doc, epilog=SOURCES,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {name: parser.add_argument_group(name) for name in ("task", "method", "run")}
    groups["task"].add_argument("--task", default=task, **task_option,
                                help="the defaults below are those of %(default)s")
    groups["method"].add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS)[:3],
                                  help="default: %(default)s")
    defaults = {"out": os.path.join("runs", task), **tasks[task]}
    for group, name, kind, value, text in [*OPTIONS, *options]:
        value = defaults.setdefault(name.replace("-", "_"), value)
        if value is not None:  # it stands in the place of what the text says without one
            text = f"{text.split(' (default:')[0]} (default: {value})"
        words = KINDS[kind] if isinstance(kind, type) else kind
        groups[group].add_argument("--" + name, default=value, help=text, **words)
    args, fail = parser.parse_args(argv), parser.error
    args.defaults, args.own_radii = defaults, args.rho is defaults["rho"]  # no --rho was given
    defaults["own_radii"] = args.own_radii  # a run that is older than this setting has it
    args.method, args.seeds = list(dict.fromkeys(args.method)), list(dict.fromkeys(args.seeds))
    require_possible(args, fail)
    return args, fail

def require_possible(args, fail):
    """What argparse does not see: options that exclude each other, a device that is not there."""
    if not args.model:
        fail(f"--task {args.task} needs --model, a folder or the id of a model on the hub")
    if args.resume and args.overwrite:
        fail("--resume keeps finished runs, --overwrite deletes them; expected one of them")
    if len(args.rho) > 2:
        fail(f"--rho has {len(args.rho)} values; expected one or two")
    if args.fsdp and WORLD == 1:
        fail("--fsdp deals weights out to the processes of torchrun; there is one process")
    alone = [method for method in args.method if METHODS[method].alone]
    if WORLD > 1 and alone:
        fail(f"--method {alone[0]} reads the rows of a batch; expected one process, not {WORLD}")
    if WORLD > 1 and args.jobs not in (1, args.defaults["jobs"]):
        fail(f"--jobs is {args.jobs}; expected 1 beside {WORLD} processes, which share each run")
    try:
        if WORLD > 1:
            args.jobs = 1
            if torch.device(args.device).index is not None:
                fail(f"--device {args.device} is one device; expected cuda beside {WORLD} "
                     "processes")
            if torch.device(args.device).type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.ones(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {args.device}: {str(error).splitlines()[0]}")

SETTINGS = {name: task.settings for name, task in TASKS.items()}
GLUE_OPTIONS = [("task", "label-noise", SHARE, 0.0, "share of the training labels replaced"),
                ("task", "max-length", int, 256, "tokens a row")]

def main(argv=None):
    args, fail = parse_arguments(argv, __doc__, SETTINGS, GLUE_OPTIONS)
    return compare(args, fail, load, train)

if __name__ == "__main__":
    main()

"""The training loop that a user of transformers and PEFT writes, with the settings of our scripts:
what benchmark_runs.py compares with.

    pip install transformers==5.24.0 peft==0.21.2

Rows are shuffled, and padded to the longest of their batch.  All linear layers but the head have an
adapter.  There is no dropout, as in our scripts.  What is not a setting is the libraries' default.
"""

import csv
import json
import math
import os
import time
from types import SimpleNamespace

import peft
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from model import write_text
from train_glue import TASKS, cosine_schedule

transformers.logging.set_verbosity_error()  # that a classifier is new needs no report here
transformers.logging.disable_progress_bar()


def run(task, args):
    """Train, score or generate, save the adapter.  task: "glue" or "gsm8k"; args: our script's.
    Returns losses of the micro-batches, tokens read and seconds of training; parameters trained;
    scores; and (seconds, new ids) of each batch of prompts."""
    torch.manual_seed(args.seeds[0])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    setup, finish = {"glue": (mrpc, mrpc_scores), "gsm8k": (gsm8k, gsm8k_texts)}[task]
    model, rows, collate = setup(args, tokenizer)
    run = SimpleNamespace(model=model.to(args.device), losses=[], tokens=0, scores={}, generated=[])
    begin = time.perf_counter()
    train(run, args, rows, collate)
    run.training = time.perf_counter() - begin
    run.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.inference_mode(), autocast(args):
        finish(run, args, tokenizer)
    model.save_pretrained(args.out)
    write_text(os.path.join(args.out, "metrics.json"), json.dumps(run.scores))
    return run


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16)


def train(run, args, rows, collate):
    size = args.batch_size if args.micro_batch is None else args.micro_batch
    several = args.batch_size // size  # micro-batches a step
    loader = DataLoader(rows, size, shuffle=True, collate_fn=collate)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    schedule = cosine_schedule(optimizer, math.ceil(len(loader) / several))
    run.model.train()
    for i, batch in enumerate(loader, 1):
        batch = batch.to(args.device)
        with autocast(args):
            loss = run.model(**batch).loss
        (loss / several).backward()
        run.losses.append(loss.item())
        run.tokens += batch["attention_mask"].sum().item()
        if i % several == 0 or i == len(loader):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def with_adapters(args, model, head, **words):
    targets = [name for name, part in model.named_modules()
               if isinstance(part, torch.nn.Linear) and name != head]
    config = peft.LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=targets, **words)
    return peft.get_peft_model(model, config)


# ------------------------------------------------------------------------------------------ MRPC
def read_pairs(args, tokenizer, name):
    """[{"input_ids": ..., "labels": class}] of a file."""
    with open(os.path.join(args.data, name), encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    texts = ([row[column] for row in rows] for column in TASKS["mrpc"].text)
    found = tokenizer(*texts, truncation=True, max_length=args.max_length)
    found["labels"] = [int(row["Quality"]) for row in rows]
    return [dict(zip(found, values)) for values in zip(*found.values())]


def mrpc(args, tokenizer):
    """(model, rows, how a batch is padded)."""
    rows = read_pairs(args, tokenizer, "train.tsv")
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = with_adapters(args, model, "classifier", modules_to_save=["classifier"])
    return model, rows, transformers.DataCollatorWithPadding(tokenizer)


def mrpc_scores(run, args, tokenizer):
    rows, found = read_pairs(args, tokenizer, "dev.tsv"), []
    collate = transformers.DataCollatorWithPadding(tokenizer)
    run.model.eval()
    for batch in DataLoader(rows, 128, collate_fn=collate):
        found += run.model(**batch.to(args.device)).logits.argmax(-1).tolist()
    labels = [row["labels"] for row in rows]
    pairs = list(zip(found, labels))
    right = sum(p == y for p, y in pairs)
    run.scores = {"accuracy": right / len(rows),
                  "f1": 2 * pairs.count((1, 1)) / (sum(found) + sum(labels))}


# ----------------------------------------------------------------------------------------- GSM8K
def read_problems(args, name):
    """[(prompt, answer)], in the form that our script has."""
    with open(os.path.join(args.data, name), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(f"Q: {row['question']}\nA: ", row["answer"]) for row in rows]


def gsm8k(args, tokenizer):
    """(model, rows, how a batch is padded).  A prompt's labels are -100: it has no loss."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    rows = []
    for prompt, answer in read_problems(args, "train.jsonl"):
        prompt = tokenizer(prompt)["input_ids"]
        answer = tokenizer(answer, add_special_tokens=False)["input_ids"]
        answer.append(model.config.eos_token_id)
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer,
                     "attention_mask": [1] * len(prompt + answer)})
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    return with_adapters(args, model, "lm_head"), rows, collate


def gsm8k_texts(run, args, tokenizer):
    """Generate, and save the texts.  They have no score: few new tokens end few problems."""
    prompts, texts = [prompt for prompt, _ in read_problems(args, "test.jsonl")], []
    tokenizer.padding_side = "left"
    run.model.eval()
    for start in range(0, len(prompts), args.eval_batch_size):
        part = prompts[start:start + args.eval_batch_size]
        batch = tokenizer(part, padding=True, return_tensors="pt").to(args.device)
        begin = time.perf_counter()
        ids = run.model.generate(**batch, do_sample=False, max_new_tokens=args.max_new_tokens)
        new = ids[:, batch["input_ids"].shape[1]:]
        run.generated.append((time.perf_counter() - begin, new))
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    write_text(os.path.join(args.out, "predictions.json"), json.dumps(texts))

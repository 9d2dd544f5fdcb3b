"""Writes tests/golden/: a tiny random checkpoint of each family, and what transformers and PEFT
compute from it.

    pip install transformers==5.23.0 peft==0.21.2
    MINILM=FOLDER python tests/make_golden.py     # FOLDER: all-MiniLM-L6-v2, for minilm.pt

transformers and PEFT are needed here alone, for the tests read the files.  Each folder holds
config.json, model.safetensors, an adapter that PEFT saved, and expected.pt: rows of token ids, the
logits of every token (of the row, for a classifier) without and with the adapter and, where there
is a decoder, the tokens of greedy generation.  On the way the script loads into PEFT what bilora.py
saves, from our models and from transformers' own, and into transformers the merged checkpoint; it
stops where a logit differs. training.pt holds logits in training mode, with the dropout masks of
one seed.
"""

import os
import shutil
import sys
import tempfile
from functools import partial

import peft
import torch
import transformers
from peft.tuners.lora import LoraGAConfig, preprocess_loraga

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from bilora import add_lora, load_adapter, merge_lora_, save_adapter  # noqa: E402
from model import (Transformer, load_tokenizer, read_safetensors, save_pretrained,  # noqa: E402
                   write_safetensors)

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "notes"))
from variants import VariantLinear, pissa_  # noqa: E402

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")
ENCODER = dict(vocab_size=40, hidden_size=8, intermediate_size=12, num_attention_heads=2,
               num_hidden_layers=2,
               max_position_embeddings=16, type_vocab_size=2, num_labels=3, layer_norm_eps=1e-3)
T5 = dict(vocab_size=40, d_model=8, d_kv=3, d_ff=12, num_layers=2, num_heads=2,
          decoder_start_token_id=0,
          pad_token_id=0, eos_token_id=1, layer_norm_epsilon=1e-3)
DECODER = dict(vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
               max_position_embeddings=64,
               eos_token_id=[5, 6], pad_token_id=None, bos_token_id=None, rms_norm_eps=1e-3)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
FAMILIES = {
    "bert": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig",
                {**ENCODER, "pad_token_id": 3, "type_vocab_size": 1}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "relu"}),
    "flan-t5": ("T5ForConditionalGeneration", "T5Config",
                {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
                 "num_decoder_layers": 1, "relative_attention_num_buckets": 8,
                 "relative_attention_max_distance": 12}),
    "llama2": ("LlamaForCausalLM", "LlamaConfig",
               {**DECODER, "num_attention_heads": 2, "tie_word_embeddings": False}),
    "llama3": ("LlamaForCausalLM", "LlamaConfig",
               {**DECODER, "num_attention_heads": 4, "num_key_value_heads": 2,
                                                  "head_dim": 6, "tie_word_embeddings": True,
                                                  "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config",
              {**DECODER, "num_attention_heads": 4, "num_key_value_heads": 1,
                                                  "tie_word_embeddings": True}),
}
NEW_TOKENS = 10
ENCODERS_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
TRAINING = [  # (family, its rates of dropout): one rate a kind
    ("bert", {**ENCODERS_DROPOUT, "classifier_dropout": 0.4}),
    ("roberta", {**ENCODERS_DROPOUT, "classifier_dropout": 0.4}),
    ("bert", ENCODERS_DROPOUT), ("roberta", ENCODERS_DROPOUT), ("t5", {"dropout_rate": 0.3}),
    ("flan-t5", {"dropout_rate": 0.3}),
    ("llama2", {"attention_dropout": 0.2}), ("llama3", {"attention_dropout": 0.2}),
    ("qwen2", {"attention_dropout": 0.2})]


# what PEFT adapts, and the same layers by our names
TARGETS = {
    "bert": (["query", "value"], r"attention\.(q|v)$"),
    "roberta": (["key", "dense"], r"attention\.(k|o)$|mlp\."),
    "t5": (["q", "wo"], r"\.q$|mlp\.down$"),
    "flan-t5": (["o", "wi_0", "wi_1"], r"\.o$|mlp\.(gate|up)$"),
    "llama2": (["q_proj", "down_proj"], r"\.q$|mlp\.down$"), "llama3": ("all-linear", None),
    "qwen2": (["k_proj", "v_proj"], r"\.(k|v)$"),
}
# with which every family's three rows are continued differently
GENERATOR = torch.Generator().manual_seed(6)
ROWS = [torch.randint(7, 40, (n,), generator=GENERATOR) for n in (9, 5, 2)]
DECODED = torch.tensor([[0, 8, 9], [0, 30, 31], [0, 12, 20]])


def padded(side, pad):
    """(ids, mask) of ROWS."""
    ids, mask = torch.full((3, 9), pad), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(ROWS):
        where = slice(0, len(row)) if side == "right" else slice(9 - len(row), 9)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


@torch.no_grad()
def logits_of(model, pad):
    """(3, labels) of a classifier, (3, 3, vocab) of T5, (all tokens, vocab) of a decoder, from a
    padded batch."""
    found = []
    # each row alone: their positions are counted from the padding on
    if model.config.model_type in ("bert", "roberta"):
        return torch.cat([model(input_ids=row[None]).logits for row in ROWS])
    for side in ("right", "left"):
        ids, mask = padded(side, pad)
        if model.config.model_type == "t5":
            found.append(
                model(input_ids=ids, attention_mask=mask, decoder_input_ids=DECODED).logits)
        else:
            place = (mask.cumsum(1) - 1).clamp(min=0)
            found.append(
                model(input_ids=ids, attention_mask=mask, position_ids=place).logits[mask.bool()])
    same(*found)
    return found[0]


@torch.no_grad()
def randomize(parameters):
    for p in parameters:
        p.add_(0.3 * torch.randn_like(p))


def write(name, model_class, config_class, settings):
    torch.manual_seed(0)
    model = getattr(transformers,
                    model_class)(getattr(transformers, config_class)(**settings)).eval()
    # transformers 5 calls every T5 tied and ties what it makes, but reads and writes one that
    # is not
    if name == "flan-t5":
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(40, 8))
    randomize(model.parameters())
    folder, pad = os.path.join(HERE, name), settings.get("pad_token_id") or 0
    model.save_pretrained(folder)
    remove_all_but(folder, "config.json", "model.safetensors")
    expected = {"rows": ROWS, "logits": logits_of(model, pad)}
    if "Classification" not in model_class:
        expected["greedy"] = []
        for row in ROWS:
            out = model.generate(input_ids=row[None], attention_mask=torch.ones_like(row)[None],
                                 do_sample=False,
                                 max_new_tokens=NEW_TOKENS, pad_token_id=0)[0]
            expected["greedy"].append(out[1:] if "T5" in model_class else out[len(row):])
    expected["adapted_logits"] = write_adapter(name, folder, getattr(transformers, model_class),
                                               pad)
    torch.save(expected, os.path.join(folder, "expected.pt"))


def write_adapter(name, folder, model_class, pad):
    """PEFT's adapter in folder/peft; its logits, which are compared with those of every other way
    there."""
    classifier, (targets, ours) = "bert" in name, TARGETS[name]
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets,
                             modules_to_save=["classifier"] if classifier else None)
    if name == "roberta":  # "dense" is in the head too, which is trained in full
        config.target_modules = r".*(key|attention.output.dense|intermediate.dense|output.dense)"
    theirs = peft.get_peft_model(model_class.from_pretrained(folder), config).eval()
    randomize(p for p in theirs.parameters() if p.requires_grad)
    theirs.peft_config["default"].base_model_name_or_path = name  # no path of this machine
    theirs.save_pretrained(os.path.join(folder, "peft"))
    remove_all_but(os.path.join(folder, "peft"), "adapter_config.json", "adapter_model.safetensors")
    logits = logits_of(theirs, pad)

    with tempfile.TemporaryDirectory() as saved:
        # PEFT's file, into ours
        model = Transformer.from_pretrained(folder, num_labels=3 if classifier else None)
        add_lora(model, 2, 6, aux_rank=2, targets=ours)
        if classifier:
            model.classifier.requires_grad_(True)
        load_adapter(model, os.path.join(folder, "peft"), model.module_names, read_safetensors)
        save_adapter(model, saved, model.module_names)  # ours, into PEFT
        same(logits, logits_of(
            peft.PeftModel.from_pretrained(model_class.from_pretrained(folder), saved).eval(), pad))
        # ours, into transformers
        save_pretrained(merge_lora_(model), os.path.join(saved, "merged"), folder)
        same(logits,
             logits_of(model_class.from_pretrained(os.path.join(saved, "merged")).eval(), pad))
    with tempfile.TemporaryDirectory() as saved:
        # transformers' own module tree: nothing is renamed
        model = model_class.from_pretrained(folder).eval()
        randomize(p for layer in add_lora(model, 2, 6, aux_rank=2)
                  for p in layer.parameters() if p.requires_grad)
        save_adapter(model, saved)
        same(logits_of(model, pad), logits_of(
            peft.PeftModel.from_pretrained(model_class.from_pretrained(folder), saved).eval(), pad))
    return logits


VARIANTS = {  # of BERT's adapter: PEFT's words, ours
    "rslora": (dict(use_rslora=True), dict(rslora=True)),
    "dora": (dict(use_dora=True), dict(dora=True)),
    "pissa": (dict(init_lora_weights="pissa"), dict(start=True)),
    "lora-ga": (dict(init_lora_weights="lora_ga"), dict(start=True)),
    "pissa-dora-rslora": (None, dict(start=True, dora=True, rslora=True))}  # not in PEFT


def write_variants():
    """PEFT's adapters of other kinds, for the BERT that is there, each with its logits.  What
    starts away from W0 is saved as PEFT does it for the original base: at twice the rank."""
    base, (targets, ours) = os.path.join(HERE, "bert"), TARGETS["bert"]
    model_class, expected = transformers.BertForSequenceClassification, {}
    for name, (words, layer) in VARIANTS.items():
        torch.manual_seed(1)
        if words is not None:
            expected[name] = write_variant(name, model_class.from_pretrained(base), targets, words)
        model = Transformer.from_pretrained(base, num_labels=3)  # ours, into PEFT
        layers = add_lora(model, 2, 6, 2, ours, partial(VariantLinear, **layer))
        if "start" in layer:
            pissa_(layers)
        randomize(p for p in model.parameters() if p.requires_grad)
        with tempfile.TemporaryDirectory() as saved, torch.no_grad():
            save_adapter(model, saved, model.module_names, write_safetensors)
            theirs = peft.PeftModel.from_pretrained(model_class.from_pretrained(base), saved)
            rows = [model.eval()(row[None]) for row in ROWS]
            same(torch.cat(rows), logits_of(theirs.eval(), 0))
    torch.save(expected, os.path.join(HERE, "bert", "variants", "expected.pt"))


def write_variant(name, base, targets, words):
    """The logits; and B0 A0 of one layer, with its s, where PEFT starts away from W0."""
    folder, started = os.path.join(HERE, "bert", "variants", name), "init_lora_weights" in words
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, **words)
    if name == "lora-ga":
        config.lora_ga_config = LoraGAConfig()
        base.train(False)
        preprocess_loraga(base, config, lambda: base(ROWS[0][None], labels=torch.tensor([1]))
                          .loss.backward())
    theirs = peft.get_peft_model(base, config).eval()
    with tempfile.TemporaryDirectory() as first:
        theirs.peft_config["default"].init_lora_weights = True
        theirs.peft_config["default"].base_model_name_or_path = "bert"
        theirs.save_pretrained(first)
        layer = next(m for m in theirs.modules() if hasattr(m, "lora_A"))
        B, A = (getattr(layer, key)["default"].weight.detach() for key in ("lora_B", "lora_A"))
        start = layer.scaling["default"] * B @ A
        randomize(p for p in theirs.parameters() if p.requires_grad)
        words = dict(path_initial_model_for_weight_conversion=first) if started else {}
        theirs.save_pretrained(folder, **words)
    remove_all_but(folder, "adapter_config.json", "adapter_model.safetensors")
    return {"logits": logits_of(theirs, 0), "start": start}


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def remove_all_but(folder, *names):
    for extra in os.listdir(folder):
        if extra not in names:
            os.remove(os.path.join(folder, extra))


@torch.no_grad()
def write_training():
    """What a model in training mode gives for ROWS in one batch, right after
    torch.manual_seed(0)."""
    recorded = []
    for name, rates in TRAINING:
        model_class, _, settings = FAMILIES[name]
        model = getattr(transformers, model_class).from_pretrained(
            os.path.join(HERE, name), attn_implementation="eager", **rates)
        ids, mask = padded("right", settings.get("pad_token_id") or 0)
        decoded = {"decoder_input_ids": DECODED} if "t5" in name else {}
        torch.manual_seed(0)
        logits = model.train()(input_ids=ids, attention_mask=mask, **decoded).logits
        recorded.append((name, rates, logits if "bert" in name or decoded else logits[mask.bool()]))
    torch.save(recorded, os.path.join(HERE, "training.pt"))


@torch.no_grad()
def write_minilm(folder):
    """Real weights: the pooled output of two sentences in one batch, padded on the right."""
    sentences = ["A man is playing a guitar.", "The bank raised its rates, to nobody's surprise."]
    rows = load_tokenizer(folder).encode_batch(sentences)
    ids, mask = (torch.tensor([getattr(row, field) for row in rows])
                 for field in ("ids", "attention_mask"))
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    pooled = model(input_ids=ids, attention_mask=mask).pooler_output
    torch.save({"sentences": sentences, "pooled": pooled}, os.path.join(HERE, "minilm.pt"))


if __name__ == "__main__":
    shutil.rmtree(HERE, ignore_errors=True)
    for family, entry in FAMILIES.items():
        write(family, *entry)
    write_training()
    write_variants()
    write_minilm(os.environ["MINILM"])

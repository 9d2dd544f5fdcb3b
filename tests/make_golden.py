"""Writes tests/golden/: a tiny random checkpoint of each family, and what transformers computes from it.

    pip install transformers==5.23.0 && python tests/make_golden.py

transformers is needed here alone, for the tests read the files.  Each folder holds config.json, model.safetensors and
expected.pt: padded token ids and their mask, with the padding on the right and on the left, the logits of every token
(of the row, for a classifier) and, where there is a decoder, the tokens of greedy generation.
"""

import os
import shutil

import torch
import transformers

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")
ENCODER = dict(vocab_size=40, hidden_size=8, intermediate_size=12, num_attention_heads=2, num_hidden_layers=2,
               max_position_embeddings=16, type_vocab_size=2, num_labels=3)
T5 = dict(vocab_size=40, d_model=8, d_kv=3, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0,
          pad_token_id=0, eos_token_id=1)
DECODER = dict(vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=2, max_position_embeddings=64,
               eos_token_id=[5, 6], pad_token_id=None, bos_token_id=None)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
FAMILIES = {
    "bert": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**ENCODER, "pad_token_id": 1, "type_vocab_size": 1}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "relu"}),
    "flan-t5": ("T5ForConditionalGeneration", "T5Config",
                {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "llama2": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "num_attention_heads": 2, "tie_word_embeddings": False}),
    "llama3": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "num_attention_heads": 4, "num_key_value_heads": 2,
                                                  "head_dim": 6, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**DECODER, "num_attention_heads": 4, "num_key_value_heads": 1,
                                                  "tie_word_embeddings": True}),
}
NEW_TOKENS = 10


@torch.no_grad()
def write(name, model_class, config_class, settings):
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
    for p in model.parameters():
        p.add_(0.3 * torch.randn_like(p))
    folder = os.path.join(HERE, name)
    model.save_pretrained(folder)
    for extra in os.listdir(folder):
        if extra not in ("config.json", "model.safetensors"):
            os.remove(os.path.join(folder, extra))
    rows, expected = [torch.randint(7, 40, (n,)) for n in (9, 5, 2)], {}
    pad = settings.get("pad_token_id") or 0
    for side in ("right", "left"):
        ids, mask = torch.full((3, 9), pad), torch.zeros(3, 9, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(9 - len(row), 9)
            ids[i, where], mask[i, where] = row, 1
        expected[side] = {"input_ids": ids, "attention_mask": mask}
        if "T5" in model_class:
            expected[side]["decoder_input_ids"] = torch.tensor([[0, 8, 9], [0, 30, 31], [0, 12, 20]])
            expected[side]["logits"] = model(**expected[side]).logits
        elif "Causal" in model_class:
            place = (mask.cumsum(1) - 1).clamp(min=0)
            expected[side]["logits"] = model(input_ids=ids, attention_mask=mask, position_ids=place).logits
        else:  # each row alone: transformers' encoders count positions from the padding on
            expected[side]["logits"] = torch.cat([model(input_ids=row[None]).logits for row in rows])
    if "Classification" not in model_class:
        expected["greedy"] = []
        for row in rows:
            out = model.generate(input_ids=row[None], attention_mask=torch.ones_like(row)[None], do_sample=False,
                                 max_new_tokens=NEW_TOKENS, pad_token_id=0)[0]
            expected["greedy"].append(out[1:] if "T5" in model_class else out[len(row):])
    torch.save(expected, os.path.join(folder, "expected.pt"))


if __name__ == "__main__":
    shutil.rmtree(HERE, ignore_errors=True)
    for family, entry in FAMILIES.items():
        write(family, *entry)

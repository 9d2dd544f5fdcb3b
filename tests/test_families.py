"""Checkpoints of every family against transformers, adapters against PEFT: logits and greedy tokens
of tiny random models, recorded in tests/golden/ by tests/make_golden.py.  Generation is also
compared with itself: in a batch, one by one, without a cache.
"""

import json
import math
import os
import random
import shutil

import pytest
import torch
import torch.nn as nn

from bilora import add_lora, load_adapter, merge_lora_, save_adapter
from model import (Transformer, llama3_scaling, load_tokenizer, read_config, read_safetensors,
                   read_tensors, relative_bucket,
                   save_pretrained, write_safetensors)

GOLDEN = os.path.join(os.path.dirname(__file__), "golden")
FAMILIES = sorted(name for name in os.listdir(GOLDEN) if os.path.isdir(os.path.join(GOLDEN, name)))
DECODERS = [name for name in FAMILIES if "bert" not in name]
# what T5's decoder reads, as in make_golden.py
DECODED = torch.tensor([[0, 8, 9], [0, 30, 31], [0, 12, 20]])


def load(name, **settings):
    folder = os.path.join(GOLDEN, name)
    labels = 3 if "bert" in name else None
    return (Transformer.from_pretrained(folder, num_labels=labels, **settings),
            torch.load(os.path.join(folder, "expected.pt"), weights_only=True))


def padded(model, rows, side):
    """The model's arguments for rows in one batch, and where in its logits the tokens are."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), model.config.pad_id)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, where], mask[i, where] = row, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.encoder is None:
        return batch, mask.bool()
    return {**batch, "decoder_input_ids": DECODED if model.decoder else None}, ...


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers(name, side):
    model, expected = load(name)
    batch, keep = padded(model, expected["rows"], side)
    assert expected["logits"].std() > 0.05
    torch.testing.assert_close(model(**batch)[keep], expected["logits"], rtol=0, atol=1e-4)


# the layers that make_golden.py lets PEFT adapt, by our names
TARGETS = {"bert": r"attention\.(q|v)$", "roberta": r"attention\.(k|o)$|mlp\.",
           "t5": r"\.q$|mlp\.down$",
           "flan-t5": r"\.o$|mlp\.(gate|up)$", "llama2": r"\.q$|mlp\.down$", "llama3": None,
           "qwen2": r"\.(k|v)$"}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_adapters_of_peft_there_and_back(name, tmp_path):
    """PEFT's own file gives PEFT's logits; saved again, names and numbers are PEFT's; merged, a
    checkpoint that gives the same logits. (make_golden.py had PEFT read what bilora.py saves, and
    transformers what is merged.)"""
    model, expected = load(name)
    add_lora(model, 2, 6, aux_rank=2, targets=TARGETS[name])
    if model.classifier is not None:
        model.classifier.requires_grad_(True)
    theirs = os.path.join(GOLDEN, name, "peft")
    load_adapter(model, theirs, model.module_names, read_safetensors)
    batch, keep = padded(model, expected["rows"], "right")
    assert (expected["adapted_logits"] - expected["logits"]).abs().max() > 0.1
    torch.testing.assert_close(model(**batch)[keep], expected["adapted_logits"], rtol=0, atol=1e-4)

    save_adapter(model, tmp_path, model.module_names, write_safetensors)
    saved = read_safetensors(tmp_path / "adapter_model.safetensors")
    found = read_safetensors(os.path.join(theirs, "adapter_model.safetensors"))
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[key], found[key]) for key in saved)
    ours, written = (json.load(open(os.path.join(folder, "adapter_config.json")))
                     for folder in (tmp_path, theirs))
    assert ours.keys() <= written.keys()  # PEFT warns of a key that it does not know
    assert all(ours[key] == written[key] for key in ("peft_type", "r", "lora_alpha", "bias"))
    assert set(ours["target_modules"]) == {
        key.rpartition(".lora_A")[0].removeprefix("base_model.model.")
                                           for key in found if ".lora_A" in key}

    save_pretrained(merge_lora_(model), tmp_path / "merged", os.path.join(GOLDEN, name))
    assert not any("lora" in key or "aux" in key
                   for key in read_safetensors(tmp_path / "merged" / "model.safetensors"))
    merged = Transformer.from_pretrained(tmp_path / "merged", num_labels=model.config.num_labels)
    torch.testing.assert_close(merged(**batch)[keep], expected["adapted_logits"], rtol=0, atol=1e-4)
    config = json.load(open(tmp_path / "merged" / "config.json"))
    if model.classifier is None:
        assert "id2label" not in config
    else:
        assert config["id2label"] == {str(i): f"LABEL_{i}" for i in range(3)}
        assert config["label2id"] == {f"LABEL_{i}": i for i in range(3)}
        assert config["architectures"] == [{"bert": "Bert", "roberta": "Roberta"}[name]
                                           + "ForSequenceClassification"]


@pytest.mark.parametrize("key, dtype", [("dtype", "bfloat16"), ("torch_dtype", "float16"),
                                        ("torch_dtype", "float32"), ("dtype", ["x"])])
def test_a_written_checkpoint_has_its_sources_dtype_and_tokenizer(tmp_path, key, dtype):
    source = edited(tmp_path, "bert", {"dtype": None, key: dtype})
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json",
                 "other.txt"):
        (source / file).write_text(file)
    save_pretrained(Transformer.from_pretrained(source, num_labels=3), tmp_path / "out", source)
    kinds = {tensor.dtype
             for tensor in read_safetensors(tmp_path / "out" / "model.safetensors").values()}
    assert kinds == {getattr(torch, dtype) if isinstance(dtype, str) else torch.float32}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json",
                                                                    "tokenizer_config.json",
                                                                    "vocab.txt",
                                                                    "special_tokens_map.json",
                                                                    "other.txt"}
    assert all((tmp_path / "out" / file).read_text() == file
               for file in ("tokenizer.json", "vocab.txt"))


@pytest.mark.parametrize("name", ["bert", "llama3"])
def test_bilora_alone_on_a_plain_module_tree(name, tmp_path):
    """Modules that are called what transformers calls them: PEFT's file is read and written with
    nothing renamed."""
    tensors = read_safetensors(os.path.join(GOLDEN, name, "peft", "adapter_model.safetensors"))
    tree = nn.Module()
    for key, tensor in tensors.items():
        path, _, last = key.removeprefix("base_model.model.").rpartition(
            ".lora_A.weight" if ".lora_" in key else ".")
        if path and last in ("", "weight"):
            B = tensors.get(key.replace("lora_A", "lora_B"), tensor)
            parent = tree
            *parents, child = path.split(".")
            for part in parents:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(child, nn.Linear(tensor.shape[1], len(B)))
    add_lora(tree, 2, 6, aux_rank=2)
    if name == "bert":
        tree.classifier.requires_grad_(True)
    load_adapter(tree, os.path.join(GOLDEN, name, "peft"), read=read_safetensors)
    save_adapter(tree, tmp_path)
    saved = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[key], tensors[key]) for key in saved)


@pytest.mark.skipif("MINILM" not in os.environ,
                    reason="MINILM is not set to a folder with all-MiniLM-L6-v2")
@torch.no_grad()
def test_minilm_pooled_output_is_that_of_transformers():
    model = Transformer.from_pretrained(os.environ["MINILM"], num_labels=2)
    expected = torch.load(os.path.join(GOLDEN, "minilm.pt"), weights_only=True)
    rows = load_tokenizer(os.environ["MINILM"]).encode_batch(expected["sentences"])
    ids, mask = (torch.tensor([getattr(row, field) for row in rows])
                 for field in ("ids", "attention_mask"))
    pooled = model.pool(model.hidden(ids, mask), mask)
    torch.testing.assert_close(pooled, expected["pooled"], rtol=0, atol=1e-5)
    assert pooled.std() > 0.05 and not mask.all()


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_are_those_of_transformers_however_they_are_batched(name):
    model, expected = load(name)
    for side in ("right", "left"):
        batch, _ = padded(model, expected["rows"], side)
        out = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=10)
        for row, tokens in zip(out, expected["greedy"]):
            assert row[:len(tokens)].tolist() == tokens.tolist()
            assert (row[len(tokens):] == model.config.pad_id).all()  # ended: filled up
    for row, tokens in zip(expected["rows"], expected["greedy"]):
        assert model.generate(row[None], max_new_tokens=10)[0].tolist() == tokens.tolist()
        assert greedy_without_cache(model, row, len(tokens)) == tokens.tolist()
    assert len({tuple(tokens.tolist()) for tokens in expected["greedy"]}) == 3


@torch.no_grad()
def greedy_without_cache(model, row, count):
    tokens = [] if model.encoder is None else [model.config.start_id]
    for _ in range(count):
        if model.encoder is None:
            logits = model(torch.cat([row, torch.tensor(tokens, dtype=torch.long)])[None])
        else:
            logits = model(row[None], decoder_input_ids=torch.tensor([tokens]))
        tokens.append(logits[0, -1].argmax().item())
    return tokens if model.encoder is None else tokens[1:]


def test_generation_ends_at_any_of_several_tokens():
    model, expected = load("llama2")
    prompt, tokens = expected["rows"][0][None], expected["greedy"][0].tolist()
    stop = tokens[3]
    cut = tokens[:tokens.index(stop) + 1]
    assert model.generate(prompt, max_new_tokens=10, eos_id=[stop, 999])[0].tolist() == cut
    assert model.generate(prompt, max_new_tokens=10, eos_id=stop)[0].tolist() == cut
    assert model.generate(prompt, max_new_tokens=0).shape == (1, 0)


@torch.no_grad()
def test_sampling_follows_the_distribution():
    model, expected = load("qwen2")
    prompt = expected["rows"][0][None]
    torch.manual_seed(0)
    drawn = model.generate(prompt.repeat(4000, 1), max_new_tokens=1, temperature=0.7)[:, 0]
    p = torch.softmax(model(prompt)[0, -1] / 0.7, -1)
    frequency = torch.bincount(drawn, minlength=len(p)) / 4000
    assert (frequency - p).abs().max() < 4 * math.sqrt(0.25 / 4000)  # four standard errors


def test_relative_buckets():
    """Values of T5's own table, 32 buckets up to a distance of 128."""
    distance = torch.tensor([-200, -64, -20, -8, -1, 0, 1, 8, 20])
    assert relative_bucket(distance, False, 32, 128).tolist() == [15, 14, 10, 8, 1, 0, 17, 24, 26]
    assert relative_bucket(distance, True, 32, 128).tolist() == [31, 26, 17, 8, 1, 0, 0, 0, 0]


def test_llama3_scaling():
    """By wavelength, as the checkpoint's authors state it: short ones kept, long ones divided, a
    blend between."""
    inverse = 5e5 ** (-torch.arange(0, 128, 2).double() / 128)
    factor, low, high, original = 8.0, 1.0, 4.0, 8192
    expected = []
    for f in inverse.tolist():
        wavelength = 2 * math.pi / f
        if wavelength < original / high:
            expected.append(f)
        elif wavelength > original / low:
            expected.append(f / factor)
        else:
            s = (original / wavelength - low) / (high - low)
            expected.append((1 - s) * f / factor + s * f)
    found = llama3_scaling(inverse, factor, low, high, original)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12,
                               atol=0)
    assert len({round(a / b, 6) for a, b in zip(found.tolist(), inverse.tolist())}) > 4


@pytest.mark.parametrize("name", FAMILIES)
def test_module_names_lead_back_to_the_checkpoints(name):
    """Every adapted layer's name, turned round, is a module that the checkpoint has."""
    model, _ = load(name)
    folder = os.path.join(GOLDEN, name)
    theirs = model.module_names
    stored = {key.rpartition(".")[0]
              for key in read_safetensors(os.path.join(folder, "model.safetensors"))}
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert {theirs[n] for n in linears} <= stored
    assert len({theirs[n] for n in linears}) == len(linears)


@pytest.mark.parametrize("name", ["t5", "llama3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_layouts_of_the_same_checkpoint(tmp_path, name, dtype):
    """One pickle, two pickles and an index: the same parameters as from the single safetensors
    file."""
    source = os.path.join(GOLDEN, name)
    tensors = {k: v.clone()
               for k, v in read_safetensors(os.path.join(source, "model.safetensors")).items()}
    expected = load(name, dtype=dtype)[0].state_dict()
    for layout, save, index in (("single", torch.save, None),
                                ("pickled", torch.save, "pytorch_model.bin.index.json"),
                                ("sharded", lambda tensors, path: write_safetensors(path, tensors),
                                 "model.safetensors.index.json")):
        folder = tmp_path / layout
        folder.mkdir()
        shutil.copy(os.path.join(source, "config.json"), folder)
        if index is None:
            save(tensors, folder / "pytorch_model.bin")
            continue
        keys = sorted(tensors)
        parts = {"part-1": keys[::2], "part-2": keys[1::2]}
        for file, part in parts.items():
            save({k: tensors[k] for k in part}, folder / file)
        (folder / index).write_text(
            json.dumps({"weight_map": {k: file for file, part in parts.items() for k in part}}))
    for folder in tmp_path.iterdir():
        found = Transformer.from_pretrained(folder, dtype=dtype).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in found)


@pytest.mark.parametrize("change, message", [
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
    ({"use_sliding_window": True}, "use_sliding_window is True"),
    ({"num_key_value_heads": 3}, "kv_heads 3"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
     "config.json: factor is missing"),
])
def test_settings_that_are_not_supported_are_refused_by_name(tmp_path, change, message):
    with open(os.path.join(GOLDEN, "llama3", "config.json")) as file:
        (tmp_path / "config.json").write_text(json.dumps({**json.load(file), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        read_config(tmp_path)
    assert "config.json" in str(caught.value)


def edited(tmp_path, name, change):
    """A copy of a family's folder whose config.json has other values; None takes one out."""
    folder = shutil.copytree(os.path.join(GOLDEN, name), tmp_path / name)
    config = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


OLD_ROPE = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}
NULLS = dict.fromkeys(("num_decoder_layers", "feed_forward_proj", "relative_attention_max_distance",
                       "relative_attention_num_buckets",
                       "dense_act_fn", "is_gated_act", "scale_decoder_outputs",
                       "tie_word_embeddings", "decoder_start_token_id"))


@pytest.mark.parametrize("name, change", [
    ("llama3", {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": OLD_ROPE}),
    ("llama3", {"rope_parameters": None, "rope_theta": 500,
                "rope_scaling": {**OLD_ROPE, "rope_type": "llama3"}}),
    ("llama2", {"rope_parameters": None, "rope_theta": 10000.0, "pretraining_tp": 1,
                "pad_token_id": -1, "head_dim": None}),
    ("llama2", {"pad_token_id": 40}),  # one more than there are tokens
    ("qwen2", {"rope_parameters": None, "rope_theta": 1e4, "use_sliding_window": False,
               "sliding_window": 131072,
               "max_window_layers": 28, "layer_types": None}),
    ("t5", NULLS), ("flan-t5", {"tie_word_embeddings": False, "scale_decoder_outputs": None}),
    ("bert", {"pad_token_id": None, "position_embedding_type": "absolute",
              "gradient_checkpointing": False})])
@torch.no_grad()
def test_configs_of_other_ages_say_the_same(tmp_path, name, change):
    """The keys that older and newer files have, or leave out, lead to the same logits."""
    model = Transformer.from_pretrained(edited(tmp_path, name, change),
                                        num_labels=3 if name == "bert" else None)
    expected = load(name)[1]
    batch, keep = padded(model, expected["rows"], "right")
    torch.testing.assert_close(model(**batch)[keep], expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, change", [
    *[("llama2", {"eos_token_id": value})
      for value in ("x", ["x"], -1, [-1], {"a": 1}, [[1]], 1.5, True, 40)],
    *[("llama2", {key: value}) for key, value in (
        ("num_local_experts", 8), ("num_experts", 8), ("quantization_config", {"bits": 4}),
        ("layer_types", ["sliding_attention"] * 2),
        ("model_type", ["llama"]), ("model_type", {}), ("vocab_size", 2**62),
        ("vocab_size", 10**30), ("num_hidden_layers", 10**7),
        ("rms_norm_eps", 10**400), ("hidden_size", 0), ("hidden_size", 10**400),
        ("max_position_embeddings", "many"))],
    ("llama2", {"rope_parameters": {"rope_theta": 0, "rope_type": "default"}}),
    *[("t5", {key: value}) for key, value in (
        ("decoder_start_token_id", 99999), ("relative_attention_max_distance", 8), ("d_model", 0),
        ("d_model", 10**400),
        ("feed_forward_proj", "gated-silu"), ("dense_act_fn", "silu"), ("is_gated_act", True),
        ("scale_decoder_outputs", "x"),
        ("is_encoder_decoder", False), ("num_layers", 3))],
    *[("bert", {key: value}) for key, value in (
        ("is_decoder", True), ("add_cross_attention", True),
        ("position_embedding_type", "relative_key"), ("hidden_act", "swish"),
        ("pad_token_id", 40), ("hidden_dropout_prob", 1.5))]])
def test_hostile_settings_are_refused(tmp_path, name, change):
    with pytest.raises(ValueError) as caught:
        Transformer.from_pretrained(edited(tmp_path, name, change))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "value", [3, "x", torch.ones(2).to_sparse(), torch.ones(2, device="meta"), {3: torch.ones(1)}])
def test_pickles_of_other_things_are_refused(tmp_path, value):
    folder = edited(tmp_path, "bert", {})
    (folder / "model.safetensors").unlink()
    torch.save(value if isinstance(value, dict) else {"bert.pooler.dense.bias": value},
               folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: .* is not a dense tensor"):
        Transformer.from_pretrained(folder)


def test_a_tensor_under_two_names_is_refused(tmp_path):
    folder = edited(tmp_path, "bert", {})
    tensors = read_safetensors(folder / "model.safetensors")
    write_safetensors(folder / "model.safetensors",
                      {**tensors, "embeddings.LayerNorm.gamma": torch.ones(8)})
    with pytest.raises(ValueError, match="model.safetensors: .* is there under two names"):
        Transformer.from_pretrained(folder)


def test_damaged_indexes(tmp_path):
    """300 index files with bytes changed or cut: the same tensors, or a ValueError that names a
    file."""
    source = read_safetensors(os.path.join(GOLDEN, "bert", "model.safetensors"))
    rng, refused = random.Random(2), 0
    keys = sorted(source)
    files = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
    for file, part in files.items():
        write_safetensors(tmp_path / file, {key: source[key] for key in part})
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": {
        key: file for file, part in files.items() for key in part}}).encode()
    for _ in range(300):
        bad = bytearray(text)
        for _ in range(rng.randrange(4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        if rng.random() < 0.2:
            bad = bad[:rng.randrange(len(bad))]
        (tmp_path / "model.safetensors.index.json").write_bytes(bad)
        try:
            _, tensors = read_tensors(tmp_path)
            assert tensors.keys() == source.keys()
            assert all(torch.equal(tensors[key], source[key]) for key in source)
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path) in str(error)
            refused += 1
    assert 200 < refused < 300


@pytest.mark.parametrize("name", DECODERS)
def test_rows_that_end_leave_the_others_alone(name):
    """Each row ends at its own time, some long before their neighbours, and stays ended."""
    model, expected = load(name)
    batch, _ = padded(model, expected["rows"], "left")
    stops = {tokens[at].item()
             for tokens, at in zip(expected["greedy"], (1, 4, 6)) if len(tokens) > at}
    for stop in (*stops, *([list(stops)] if len(stops) > 1 else [])):
        ends = {stop} if isinstance(stop, int) else set(stop)
        together = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=10,
                                  eos_id=stop)
        for row, found in zip(expected["rows"], together.tolist()):
            alone = model.generate(row[None], max_new_tokens=10, eos_id=stop)[0].tolist()
            assert found[:len(alone)] == alone and set(found[len(alone):]) <= {model.config.pad_id}
            assert not ends & set(alone[:-1])


def test_what_generate_needs():
    model, expected = load("llama2")
    for bad, ids in ((load("bert")[0], torch.ones(1, 3).long()),
                     (model.train(), torch.ones(1, 3).long()),
                     (load("llama2")[0], torch.ones(2, 0).long())):
        with pytest.raises(ValueError,
                           match="generate needs a decoder, in eval mode, and a prompt"):
            bad.generate(ids)
    with pytest.raises(ValueError, match="decoder_input_ids is None"):
        load("t5")[0](torch.ones(1, 3).long())
    with pytest.raises(ValueError, match="the model has 64 positions"):
        model.eval().generate(torch.full((1, 60), 8), max_new_tokens=10, eos_id=[])


@pytest.mark.parametrize("weight_map, message", [
    ({"a": "b\0.bin"}, "no plain file name"), ({"a": "\ud800.bin"}, "no plain file name"),
    ({"a": "../b.bin"}, "no plain file name"), ({"a": "/etc/passwd"}, "no plain file name"),
    ({"a": 3}, "no plain"),
    ("b.bin", "weight_map is no object"), ({"gone": "b.bin", "a": "b.bin"}, "gone is in no file"),
    ({"gone": "b.bin"}, "a is in b.bin, not in None"),
])
def test_bad_indexes(tmp_path, weight_map, message):
    torch.save({"a": torch.ones(1)}, tmp_path / "b.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message) as caught:
        read_tensors(tmp_path)
    assert "index.json" in str(caught.value)


def damaged(rng, data):
    """The file with a few bytes of its header changed, its end cut off or added to, or numbers of
    its header edited."""
    length = int.from_bytes(data[:8], "little")
    kind = rng.randrange(4)
    if kind == 0:  # bytes
        out = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            out[rng.randrange(8 + length)] = rng.randrange(256)
        return bytes(out)
    if kind == 1:  # the end
        if rng.random() < 0.7:
            return data[:rng.randrange(len(data))]
        return data + bytes(rng.randint(1, 9))
    header = json.loads(data[8:8 + length])
    entry = header[rng.choice([key for key in header if key != "__metadata__"])]
    if kind == 2:  # a number
        field = entry[rng.choice(["shape", "data_offsets"])]
        field[rng.randrange(len(field))] = rng.choice(
            [0, 1, -1, 7, 2**31, 2**63, 2**70, 1.5, None, True, "8", [], rng.randrange(5000)])
    else:          # an entry
        entry[rng.choice(["dtype", "shape", "data_offsets", "other"])] = rng.choice(
            ["F16", "F64", "I32", "BF16", "F8", 3, None, [], {}, [[2]], [0, 4], [4, 0], [2**62, 2]])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length:]


def test_damaged_safetensors(tmp_path):
    """2,000 damaged files: a ValueError naming the file, or tensors that are what the header, read
    again here, says."""
    with open(os.path.join(GOLDEN, "bert", "model.safetensors"), "rb") as file:
        data = file.read()
    rng, path, refused = random.Random(0), tmp_path / "damaged.safetensors", 0
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
             "BF16": torch.bfloat16, "I32": torch.int32}
    for _ in range(2000):
        bad = damaged(rng, data)
        path.write_bytes(bad)
        try:
            tensors = read_safetensors(path)
        except ValueError as error:
            assert "damaged.safetensors: not a safetensors file" in str(error)
            refused += 1
            continue
        length = int.from_bytes(bad[:8], "little")
        header = json.loads(bad[8:8 + length])
        header.pop("__metadata__", None)
        assert tensors.keys() == header.keys()
        for name, tensor in tensors.items():
            begin, end = header[name]["data_offsets"]
            assert tensor.dtype == names[header[name]["dtype"]]
            assert list(tensor.shape) == header[name]["shape"]
            bits = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            assert bits == bad[8 + length + begin:8 + length + end]
    assert 1200 < refused < 2000


@torch.no_grad()
def test_damaged_checkpoints(tmp_path):
    """The same logits, or a ValueError that names a file; nothing else."""
    shutil.copytree(os.path.join(GOLDEN, "bert"), tmp_path / "bert")
    path, rng = tmp_path / "bert" / "model.safetensors", random.Random(1)
    ids = torch.tensor([[7, 8, 9]])
    data, expected = path.read_bytes(), load("bert")[0](ids)
    refused = 0
    for _ in range(150):
        path.write_bytes(damaged(rng, data))
        try:
            assert torch.equal(Transformer.from_pretrained(tmp_path / "bert", num_labels=3)(ids),
                               expected)
        except ValueError as error:
            assert "model.safetensors" in str(error)
            refused += 1
    assert 100 < refused < 150


def test_a_decoder_has_no_classifier():
    with pytest.raises(ValueError, match="num_labels is 2, but a model with a decoder"):
        Transformer.from_pretrained(os.path.join(GOLDEN, "t5"), num_labels=2)


TRAINING = torch.load(os.path.join(GOLDEN, "training.pt"), weights_only=True)


@pytest.mark.parametrize("name, rates, expected", TRAINING,
                         ids=[f"{name}-{len(rates)}" for name, rates, _ in TRAINING])
@torch.no_grad()
def test_dropouts_are_those_of_transformers(tmp_path, name, rates, expected):
    """The same seed gives the same logits in training mode: number, place and rate of every dropout
    agree."""
    labels = 3 if "bert" in name else None
    model, (_, golden) = Transformer.from_pretrained(edited(tmp_path, name, rates),
                                                     num_labels=labels), load(name)
    batch, keep = padded(model, golden["rows"], "right")
    torch.manual_seed(0)
    found = model.train()(**batch)[keep]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected - golden["logits"]).abs().max() > 0.01  # something was dropped


def with_tensors(tmp_path, name, **tensors):
    """A copy of a family's folder whose file of weights has more tensors, or others."""
    folder = edited(tmp_path, name, {})
    old = read_safetensors(folder / "model.safetensors")
    write_safetensors(folder / "model.safetensors",
                      {**old, **{key.replace("__", "."): t for key, t in tensors.items()}})
    return folder


PLACES, EMBEDDING = torch.arange(16)[None], torch.randn(40, 8,
                                                        generator=torch.Generator().manual_seed(0))
POSITION_IDS = "bert__embeddings__position_ids"
INV_FREQ = "model__layers__1__self_attn__rotary_emb__inv_freq"


def inverse_frequencies(name):
    """Of the golden Llamas, in float64 and by the formula: theta ** (-2 i / head_dim), Llama 3's
    ones scaled."""
    theta, size = (500.0, 6) if name == "llama3" else (1e4, 2 if name == "qwen2" else 4)
    f = theta ** (-torch.arange(0, size, 2).double() / size)
    return llama3_scaling(f, 8.0, 1.0, 4.0, 32) if name == "llama3" else f


@pytest.mark.parametrize("name, key, tensor", [
    ("bert", POSITION_IDS, PLACES), ("bert", POSITION_IDS, PLACES[0].int()),
    ("roberta", "roberta__embeddings__position_ids", PLACES),
    *[(name, INV_FREQ, inverse_frequencies(name).to(dtype))
      for name in ("llama2", "llama3", "qwen2")
      for dtype in (torch.float32, torch.float16, torch.bfloat16)],
    ("llama2", "model__rotary_emb__inv_freq", inverse_frequencies("llama2")),
    ("t5", "decoder__block__0__layer__1__EncDecAttention__relative_attention_bias__weight",
     torch.randn(32, 2)),
    ("bert", "cls__predictions__bias", torch.randn(40)),
    ("roberta", "lm_head__dense__weight", torch.randn(8, 8)),
    ("roberta", "lm_head__bias", torch.randn(40)),
    ("roberta", "roberta__pooler__dense__weight", torch.randn(8, 8))])
def test_spare_tensors_are_left_out(tmp_path, name, key, tensor):
    """They say a thing again, or belong to a head that no model here has; transformers reads none
    of them either."""
    found = Transformer.from_pretrained(with_tensors(tmp_path, name, **{key: tensor}),
                                        num_labels=3 if "bert" in name else None)
    expected = load(name)[0].state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(found.state_dict()[key], expected[key]) for key in expected)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_t5s_copies_of_its_embeddings_are_compared(tmp_path, stack):
    """A stack with embeddings of its own is another model; an equal copy, also one that is rounded
    less, is left out."""
    key, shared = f"{stack}__embed_tokens__weight", read_safetensors(
        os.path.join(GOLDEN, "t5", "model.safetensors"))["shared.weight"]
    Transformer.from_pretrained(with_tensors(tmp_path / "same", "t5", **{key: shared.double()}))
    message = f"model.safetensors: {stack}.embed_tokens.weight is not what the model has"
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(with_tensors(tmp_path / "other", "t5", **{key: EMBEDDING}))


@pytest.mark.parametrize("name, key, tensor", [
    ("bert", POSITION_IDS, PLACES.flip(1)),
    ("roberta", "roberta__embeddings__position_ids", PLACES + 1),
    ("llama2", INV_FREQ, inverse_frequencies("llama2") * 1.001),
    ("llama2", INV_FREQ, torch.ones(3)),
    ("llama3", INV_FREQ, 500.0 ** (-torch.arange(0, 6, 2) / 6)),
    *[(name, key, torch.ones(40)) for name in ("llama3", "t5", "flan-t5")
      for key in ("lm_head__bias", "cls__bias", "classifier__bias")],
    ("bert", "lm_head__weight", EMBEDDING), ("bert", "bert__embed_tokens__weight", EMBEDDING),
    ("bert", INV_FREQ, torch.ones(2)),
    ("llama2", "extra__embed_tokens__weight", EMBEDDING), ("llama2", "model__position_ids", PLACES),
    ("t5", INV_FREQ, torch.ones(2)),
    ("t5", "decoder__block__1__layer__1__EncDecAttention__relative_attention_bias__weight",
     torch.ones(32, 2)),
    ("llama3", "score__weight", torch.ones(3, 8)),
    ("t5", "classification_head__dense__weight", torch.ones(8, 8))])
def test_tensors_that_would_change_the_model_are_refused(tmp_path, name, key, tensor):
    with pytest.raises(ValueError) as caught:
        Transformer.from_pretrained(with_tensors(tmp_path, name, **{key: tensor}))
    assert f"model.safetensors: {key.replace('__', '.')} is" in str(caught.value)


@pytest.mark.parametrize("name", ["bert", "llama3"])
def test_all_that_stands_beside_the_weights_travels(tmp_path, name):
    """And nothing that is made of them, or of a training's state."""
    source = edited(tmp_path, name, {})
    kept = ["generation_config.json", "chat_template.jinja", "tokenizer.model", "spiece.model",
            "merges.txt", "vocab.json",
            "added_tokens.json", "preprocessor_config.json", "qwen.tiktoken", "README.md",
            "LICENSE", "USE_POLICY.md", "odd.xyz"]
    left = ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "tf_model.h5", "flax_model.msgpack", "model.onnx", "model.onnx_data", "model.gguf",
            "model.ckpt.index", "a.pth", "optimizer.pt",
            "scheduler.pt", "rng_state_0.pth", "trainer_state.json", "training_args.bin",
            "adapter_config.json",
            "adapter_model.safetensors", "base_fingerprint.txt", ".gitattributes"]
    for file in (*kept, *left):
        (source / file).write_text("{}")
    shutil.rmtree(source / "peft")
    (source / "checkpoint-5").mkdir()
    model = load(name)[0]
    save_pretrained(model, tmp_path / "out", source)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json",
                                                                    "model.safetensors", *kept}
    save_pretrained(model, source, source)  # over itself
    assert {*kept, *left, "config.json", "model.safetensors"} <= {file.name
                                                                  for file in source.iterdir()}
    assert not list(source.glob("*.tmp"))


def test_generation_ends_where_generation_config_says(tmp_path):
    """Its eos_token_id comes before config.json's, as in transformers, and is there in a copy of
    the checkpoint."""
    tokens = load("llama2")[1]["greedy"][0].tolist()
    stop, prompt = tokens[3], load("llama2")[1]["rows"][0][None]
    source, out = edited(tmp_path, "llama2", {"eos_token_id": 5}), tmp_path / "out"
    for said, ends in (({"eos_token_id": [6, stop]}, [6, stop]), ({"eos_token_id": stop}, stop),
                       ({}, 5), ({"eos_token_id": None}, 5)):
        (source / "generation_config.json").write_text(json.dumps(said))
        assert read_config(source)[0].eos_id == ends
        save_pretrained(Transformer.from_pretrained(source), out, source)
        assert read_config(out)[0].eos_id == ends
        if ends != 5:
            cut = tokens[:tokens.index(stop) + 1]
            assert Transformer.from_pretrained(out).generate(prompt,
                                                             max_new_tokens=10)[0].tolist() == cut
    for bad, message in (('{"eos_token_id": 40}', "eos_id is 40"),
                         ('{"eos_token_id": "x"}', "eos_id"), ("[", "not a JSON object")):
        (source / "generation_config.json").write_text(bad)
        with pytest.raises(ValueError, match="generation_config.json: .*" + message):
            read_config(source)


def test_the_names_of_classes_are_in_the_order_of_numbers(tmp_path):
    names = {str(i): f"class {i}" for i in (10, 2, 1, 0, 3, 4, 5, 6, 7, 8, 9)}
    source = edited(tmp_path, "bert", {"id2label": names})
    assert read_config(source)[0].labels == [f"class {i}" for i in range(11)]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_names_of_classes_are_kept_and_a_head_can_be_drawn_anew(tmp_path, name):
    names = ["neg", "neutral", "pos"]
    source = edited(tmp_path, name, {"id2label": {"2": "pos", "0": "neg", "1": "neutral"}})
    assert read_config(source)[0].labels == names
    own, other = (Transformer.from_pretrained(source, num_labels=3, new_head=new)
                  for new in (False, True))
    golden = load(name)[0].state_dict()
    for key, tensor in own.state_dict().items():
        assert torch.equal(tensor, golden[key])
        assert torch.equal(tensor, other.state_dict()[key]) is not key.startswith("classifier.")
    save_pretrained(own, tmp_path / "out", source)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == dict(zip("012", names))
    assert config["label2id"] == {"neg": 0, "neutral": 1, "pos": 2}
    # its classes have no names
    save_pretrained(Transformer.from_pretrained(source, num_labels=2), tmp_path / "two", source)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    assert config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"


@pytest.mark.parametrize("file",
                         ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
                          "model-1.safetensors", "config.json",
                                  "tokenizer.json", "vocab.txt", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, file):
    folder = edited(tmp_path, "bert", {})
    tensors = folder / "model.safetensors"
    if file != "model.safetensors":
        tensors.rename(folder / "model-1.safetensors")
    if file == "model-1.safetensors":
        keys = read_safetensors(folder / file)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {key: file for key in keys}}))
    if file == "tokenizer_config.json":
        (folder / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n")
    (folder / file).write_text(POINTER)
    with pytest.raises(ValueError, match=f"{file}: .*a Git LFS pointer; run git lfs pull"):
        (load_tokenizer if file.startswith(("tok", "vocab"))
         else Transformer.from_pretrained)(folder)

"""The transformer and its checkpoint reader.

Oracles: torch.nn's own TransformerEncoderLayer and TransformerDecoderLayer with the same weights; a
row of a padded batch against the same row alone; safetensors files written byte by byte here.  With
MINILM set to a folder of all-MiniLM-L6-v2, its real weights have to tell a paraphrase from another
sentence.
"""

import json
import math
import os
import struct

import pytest
import torch
import torch.nn as nn
from tokenizers import Tokenizer, models, pre_tokenizers

import model as model_file
from model import Config, Transformer, load_tokenizer, read_safetensors, write_safetensors

SIZES = dict(vocab_size=50, d_model=16, d_ff=32, heads=4, max_length=12, eps=1e-5)


def encoder(**settings):
    torch.manual_seed(0)
    model = Transformer(Config(**{**SIZES, **settings}, encoder_layers=2)).double().eval()
    with torch.no_grad():
        for p in model.parameters():  # norms and biases too, so that none is neutral
            p.add_(0.3 * torch.randn_like(p))
    return model


def copy_attention(ours, theirs):
    theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
    theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
    theirs.out_proj.load_state_dict(ours.o.state_dict())


def copy_norms(ours, theirs):
    for a, b in zip(ours, theirs):
        b.load_state_dict(a.state_dict())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@torch.no_grad()
def test_encoder_block_equals_torchs(norm_first, activation):
    block = encoder(norm_first=norm_first, activation=activation).encoder.blocks[1]
    theirs = nn.TransformerEncoderLayer(16, 4, 32, 0.0, activation, batch_first=True,
                                        norm_first=norm_first).double().eval()
    copy_attention(block.attention, theirs.self_attn)
    theirs.linear1.load_state_dict(block.mlp.up.state_dict())
    theirs.linear2.load_state_dict(block.mlp.down.state_dict())
    copy_norms((block.attention_norm, block.mlp_norm), (theirs.norm1, theirs.norm2))
    x, keep = torch.randn(3, 7, 16, dtype=torch.float64), torch.ones(3, 7, dtype=torch.bool)
    keep[1, 4:] = keep[2, :2] = False
    ours, expected = block(x, keep[:, None, None, :]), theirs(x, src_key_padding_mask=~keep)
    torch.testing.assert_close(ours[keep], expected[keep], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_decoder_block_equals_torchs():
    torch.manual_seed(0)
    model = Transformer(Config(**SIZES, encoder_layers=1, decoder_layers=1)).double().eval()
    block = model.decoder.blocks[0]
    theirs = nn.TransformerDecoderLayer(16, 4, 32, 0.0, "gelu", batch_first=True,
                                        norm_first=True).double().eval()
    copy_attention(block.attention, theirs.self_attn)
    copy_attention(block.cross, theirs.multihead_attn)
    theirs.linear1.load_state_dict(block.mlp.up.state_dict())
    theirs.linear2.load_state_dict(block.mlp.down.state_dict())
    copy_norms((block.attention_norm, block.cross_norm, block.mlp_norm),
               (theirs.norm1, theirs.norm2, theirs.norm3))
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    memory = torch.randn(3, 5, 16, dtype=torch.float64)
    keep = torch.ones(3, 5, dtype=torch.bool)
    keep[1, 3:] = False
    causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    expected = theirs(x, memory, tgt_mask=causal, memory_key_padding_mask=~keep)
    found = block(x, None, True, memory=memory, memory_mask=keep[:, None, None, :])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("settings", [{}, {"norm_first": False, "pooler": True, "token_types": 2}])
@torch.no_grad()
def test_padding_on_either_side_changes_no_logit(left, settings):
    model = encoder(num_labels=3, **settings)
    rows = [torch.randint(1, 50, (n,)) for n in (9, 4, 1)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(9 - len(row), 9) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    logits = model(ids, mask)
    assert logits.shape == (3, 3)
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i:i + 1], model(row[None]), rtol=1e-10, atol=1e-12)
    ids[mask == 0] = 7  # nor does what stands in the padding
    torch.testing.assert_close(model(ids, mask), logits, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_decoder_is_causal_and_ignores_padding(left):
    torch.manual_seed(0)
    model = Transformer(Config(**SIZES, decoder_layers=2)).double().eval()
    row = torch.randint(1, 50, (1, 6))
    alone = model(row)
    assert alone.shape == (1, 6, 50)
    changed = row.clone()
    changed[0, 4] = (row[0, 4] + 1) % 50
    torch.testing.assert_close(model(changed)[:, :4], alone[:, :4], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(model(changed)[:, 4], alone[:, 4])
    pad, ones = torch.zeros(1, 3, dtype=torch.long), torch.ones_like(row)
    ids, mask = (torch.cat([pad, t] if left else [t, pad], 1) for t in (row, ones))
    torch.testing.assert_close(model(ids, mask)[mask == 1], alone[0], rtol=1e-10, atol=1e-12)


def test_encoder_decoder_shapes_and_hidden_states():
    both = Transformer(Config(**SIZES, encoder_layers=1, decoder_layers=1))
    ids = torch.randint(1, 50, (2, 5))
    assert both(ids, decoder_input_ids=ids[:, :3]).shape == (2, 3, 50)
    assert both.encoder.tokens is both.decoder.tokens
    assert encoder()(ids).shape == (2, 5, 16)


def test_bad_calls():
    model = encoder(num_labels=2)
    with pytest.raises(ValueError, match=r"empty batch.*\(0, 4\)"):
        model(torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="13 tokens; the model has 12"):
        model(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="d_model is 16, heads 5"):
        encoder(heads=5)
    with pytest.raises(ValueError, match="'swish'"):
        encoder(activation="swish")


@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_every_dropout_acts_in_training_and_none_in_eval(norm_first):
    model, ids = encoder(num_labels=2, norm_first=norm_first), torch.randint(1, 50, (4, 9))
    clean = model(ids)
    modules = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    # the embeddings'; in two blocks the attention's and the sublayers'; the head's
    assert len(modules) == 1 + 2 * 2 + 1
    for module in modules:
        module.p = 0.5
        assert not torch.allclose(model.train()(ids), clean)
        assert torch.equal(model.eval()(ids), clean)
        module.p = 0.0
    calls = []
    hooks = [module.register_forward_hook(lambda *_: calls.append(0)) for module in modules]
    model.train()(ids)
    # embeddings, two sublayers in each of two blocks, the pooled state
    assert len(calls) == 1 + 2 * 2 + 1
    for hook in hooks:
        hook.remove()


def test_initial_weights():
    model = Transformer(Config(vocab_size=300, d_model=64, encoder_layers=1))
    for weight in (model.encoder.tokens.weight, model.encoder.blocks[0].mlp.up.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.encoder.blocks[0].mlp.up.bias.any()


# -------------------------------------------------------------------------------------- checkpoints


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_checkpoint(folder, model, config, prefix="", old_names=False):
    """A BERT folder in the published layout, its tensor names written out from the
    specification."""
    names = {"encoder.tokens": "embeddings.word_embeddings",
             "encoder.positions": "embeddings.position_embeddings",
             "encoder.types": "embeddings.token_type_embeddings",
             "encoder.embedding_norm": "embeddings.LayerNorm",
             "pooler": "pooler.dense", "classifier": "classifier"}
    for i in range(model.config.encoder_layers):
        ours, theirs = f"encoder.blocks.{i}.", f"encoder.layer.{i}."
        names |= {ours + a: theirs + b for a, b in {
            "attention.q": "attention.self.query", "attention.k": "attention.self.key",
            "attention.v": "attention.self.value", "attention.o": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm", "mlp.up": "intermediate.dense",
            "mlp.down": "output.dense", "mlp_norm": "output.LayerNorm"}.items()}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, tensor in model.state_dict().items():
        module, _, last = key.rpartition(".")
        name = names[module] if module == "classifier" else prefix + names[module]
        if old_names and "LayerNorm" in name:
            last = {"weight": "gamma", "bias": "beta"}[last]
        raw = tensor.float().numpy().tobytes()
        header[f"{name}.{last}"] = {"dtype": "F32", "shape": list(tensor.shape),
                                    "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header["cls.seq_relationship.bias"] = {"dtype": "F32", "shape": [0],
                                           "data_offsets": [len(data), len(data)]}
    header[prefix + "embeddings.position_ids"] = {"dtype": "I64", "shape": [0],
                                                  "data_offsets": [len(data), len(data)]}
    (folder / "model.safetensors").write_bytes(safetensors(header, data))
    (folder / "config.json").write_text(json.dumps(config))


BERT = {"model_type": "bert", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2, "max_position_embeddings": 12, "type_vocab_size": 2,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-3, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}


def bert():
    return encoder(norm_first=False, embedding_norm=True, token_types=2, pooler=True, num_labels=3,
                   eps=1e-3,
                   activation="relu").float()


@pytest.mark.parametrize("prefix, old_names", [("", False), ("bert.", False), ("bert.", True)])
@torch.no_grad()
def test_bert_folder(tmp_path, prefix, old_names):
    model, ids = bert(), torch.randint(1, 50, (2, 8))
    write_checkpoint(tmp_path, model, BERT, prefix, old_names)
    loaded, types = Transformer.from_pretrained(tmp_path, num_labels=3), torch.randint(0, 2, (2, 8))
    assert not loaded.training
    assert (loaded.config.dropout, loaded.config.attention_dropout) == (0.1, 0.2)
    torch.testing.assert_close(loaded(ids, None, types), model(ids, None, types), rtol=0, atol=0)
    assert not torch.allclose(loaded(ids, None, types), loaded(ids))
    torch.testing.assert_close(loaded(ids), loaded(ids, None, torch.zeros_like(ids)), rtol=0,
                               atol=0)
    hidden = Transformer.from_pretrained(tmp_path)
    assert hidden.classifier is None and hidden.pooler is None
    torch.testing.assert_close(hidden(ids), model.encoder(ids, None), rtol=0, atol=0)
    half = Transformer.from_pretrained(tmp_path, num_labels=3, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.pooler.weight, model.pooler.weight.bfloat16())


def test_new_head_is_drawn_from_the_seed(tmp_path):
    write_checkpoint(tmp_path, bert(), BERT)

    def head(seed):
        torch.manual_seed(seed)
        return Transformer.from_pretrained(tmp_path, num_labels=2).classifier.weight
    assert head(1).shape == (2, 16) and torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'; expected 'bert' or 'roberta'"),
    ({"hidden_act": "mish"}, "activation is 'mish'; expected 'gelu' or"),
    ({"hidden_act": ["gelu"]}, "wrong kind"),
    ({"num_attention_heads": 0}, "heads is 0"), ({"hidden_size": -16}, "d_model is -16"),
    ({"num_attention_heads": 5}, "d_model is 16, heads 5"), ({"layer_norm_eps": "x"}, "eps is 'x'"),
    ({"hidden_dropout_prob": 2}, "dropout is 2"), ({"vocab_size": "50"}, "vocab_size is '50'"),
    ({"num_hidden_layers": True}, "encoder_layers is True"), (b"[" * 100_000, "not a JSON object"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ({"num_hidden_layers": 3}, r"encoder.blocks.2.\S+ is missing"),
    ({"num_hidden_layers": 1}, r"encoder.layer.1.\S+ is unexpected"),
    ({"intermediate_size": 24},
     r"encoder.blocks.0.mlp.down.weight has shape \(16, 32\), config.json says \(16, 24\)"),
    ({"vocab_size": None}, "vocab_size is missing"),
    (b"{", "not a JSON object"), (b"[]", "model_type"), (b"[1]", "not a JSON object"),
])
def test_checkpoints_that_do_not_fit(tmp_path, change, message):
    config = {k: v for k, v in {**BERT, **(change if isinstance(change, dict) else {})}.items()
              if v is not None}
    write_checkpoint(tmp_path, bert(), config)
    if isinstance(change, bytes):
        (tmp_path / "config.json").write_bytes(change)
    with pytest.raises(ValueError, match=message) as caught:
        Transformer.from_pretrained(tmp_path, num_labels=3)
    assert str(tmp_path) in str(caught.value)


def test_missing_folders_and_files(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder; expected one with"):
        Transformer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a folder; revision v2 is for"):
        Transformer.from_pretrained(tmp_path, revision="v2")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        Transformer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizer_forgets_its_own_truncation_and_padding(tmp_path):
    tokenizer = Tokenizer(
        models.WordLevel({"a": 0, "b": 1, "[UNK]": 2, "[PAD]": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert [row.ids for row in loaded.encode_batch(["a b a b", "b"])] == [[0, 1, 0, 1],
                                                                          [1, 3, 3, 3]]


def test_bert_vocabulary(tmp_path):
    """Word pieces cut by hand from the list: the longest first, ## inside a word; lower case unless
    it is said otherwise."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "play", "##ing", "##ed", "!",
              "e", "The"]
    (tmp_path / "vocab.txt").write_text("".join(piece + "\n" for piece in pieces))
    row, other = load_tokenizer(tmp_path).encode_batch(
        [("The playing!", "\u00e9 played"), ("the", "xyz")])
    assert row.ids == [2, 5, 6, 7, 9, 3, 10, 6, 8, 3] and row.type_ids == [0] * 6 + [1] * 4
    assert other.ids == [2, 5, 3, 1, 3, 0, 0, 0, 0, 0]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path).encode("The the").ids == [2, 11, 5, 3]
    (tmp_path / "vocab.txt").write_text("the\n")
    with pytest.raises(ValueError, match="vocab.txt: not a tokenizer: .*sep_token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_safetensors_byte_by_byte(tmp_path, dtype):
    tensors = {"a.b": torch.arange(6, dtype=dtype).view(2, 3).t(), "empty": torch.empty(0, 3),
               "n": torch.tensor(7),
               "nan": torch.tensor([math.nan])}
    path = tmp_path / "w.safetensors"
    write_safetensors(path, tensors)
    data, size = path.read_bytes(), 2 if dtype == torch.bfloat16 else 4
    length, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + length])
    # transformers asks for it
    assert (8 + length) % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert header == {"a.b": {"dtype": {2: "BF16", 4: "F32"}[size], "shape": [3, 2],
                              "data_offsets": [0, 6 * size]},
                      "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [6 * size] * 2},
                      "n": {"dtype": "I64", "shape": [], "data_offsets": [6 * size, 6 * size + 8]},
                      "nan": {"dtype": "F32", "shape": [1],
                              "data_offsets": [6 * size + 8, 6 * size + 12]}}
    if size == 4:
        assert struct.unpack("<6f", data[8 + length:][:24]) == (0, 3, 1, 4, 2, 5)
    assert struct.unpack("<q", data[-12:-4]) == (7,)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_write_that_goes_wrong_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    # a disk that forgets
    monkeypatch.setattr(model_file, "read_safetensors", lambda path: {"a": torch.zeros(2)})
    with pytest.raises(OSError, match="not what was written"):
        write_safetensors(path, {"a": torch.full((2,), 3.0)})
    assert path.read_bytes() == before


def test_safetensors_dtypes_scalars_and_empty_tensors(tmp_path):
    data = struct.pack("<e", 1.5) + struct.pack("<2f", 2.5, -1.0) + b"\x80\x3f" + struct.pack(
        "<q", -3) + b"\x01"
    header = {"half": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
              # not aligned to 4 bytes
              "single": {"dtype": "F32", "shape": [1, 2], "data_offsets": [2, 10]},
              "brain": {"dtype": "BF16", "shape": [1], "data_offsets": [10, 12]},
              "empty": {"dtype": "F64", "shape": [0, 3], "data_offsets": [12, 12]},
              "scalar": {"dtype": "I64", "shape": [], "data_offsets": [12, 20]},
              "bool": {"dtype": "BOOL", "shape": [1], "data_offsets": [20, 21]}}
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors(json.dumps(header).encode() + b"  ", data))
    expected = {"half": torch.tensor([1.5], dtype=torch.float16),
                "single": torch.tensor([[2.5, -1.0]]),
                "brain": torch.tensor([1.0], dtype=torch.bfloat16),
                "empty": torch.empty(0, 3, dtype=torch.float64),
                "scalar": torch.tensor(-3), "bool": torch.tensor([True])}
    tensors = read_safetensors(path)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
    tensors["single"].zero_()  # a private mapping: the file keeps its bytes
    assert path.read_bytes().endswith(data)


def one(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"t": {"dtype": dtype, "shape": list(shape) if shape is not None else None,
                  "data_offsets": list(offsets)}}


@pytest.mark.parametrize("content", [
    b"", b"1234567", safetensors({}, length=3), safetensors({}, length=2**63),
    safetensors(b"\xff\xfe{}"),
    safetensors(b"[]"), safetensors(b"{"), safetensors(b"[" * 200_000), safetensors(b'{"t": 1}'),
    safetensors({}, b"1"),
    safetensors(b'{"t": {}, "t": {}}'), safetensors(one("F8"), bytes(8)),
    safetensors(one(shape=(-2,)), bytes(8)),
    safetensors(one(shape=(2.0,)), bytes(8)), safetensors(one(shape=(True, 2)), bytes(8)),
    safetensors(one(shape=None), bytes(8)), safetensors(one(shape=(3,)), bytes(8)),
    safetensors(one(offsets=(8, 0)), bytes(8)), safetensors(one(offsets=(1, 9)), bytes(9)),
    safetensors(one(), bytes(9)), safetensors(one(), bytes(7)),
    safetensors(one(offsets=(0, 8, 9)), bytes(8)),
    safetensors({**one(), "u": one(offsets=(4, 12))["t"]}, bytes(12)),
    safetensors({**one(), "u": one(offsets=(12, 20))["t"]}, bytes(20)),
    safetensors(one(shape=(2**62, 4)), bytes(8)),
    safetensors(one(["F32"]), bytes(8)), safetensors(one(shape=(0, 2**62, 2**62), offsets=(0, 0))),
    safetensors(one(shape=(0, 2**64), offsets=(0, 0))), safetensors(b'{"t": ' + b"9" * 5000 + b"}"),
    safetensors(one(shape=[10**4000] * 400), bytes(8)),
    safetensors(one(shape=[1] * 100_000 + [2]), bytes(8)),
], ids=range(31))
def test_broken_safetensors(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.safetensors: not a safetensors file"):
        read_safetensors(path)


@pytest.mark.skipif("MINILM" not in os.environ,
                    reason="MINILM is not set to a folder with all-MiniLM-L6-v2")
@torch.no_grad()
def test_minilm_real_weights():
    """The published model's purpose as the oracle: mean-pooled states put a paraphrase nearer than
    another sentence."""
    folder = os.environ["MINILM"]
    model, tokenizer = Transformer.from_pretrained(folder), load_tokenizer(folder)
    batch = tokenizer.encode_batch(
        ["A man is playing a guitar.", "Someone plays the guitar.", "The bank raised its rates."])
    ids, mask = (torch.tensor([getattr(row, field) for row in batch])
                 for field in ("ids", "attention_mask"))
    h = (model(ids, mask) * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    similar = torch.nn.functional.cosine_similarity(h[:1], h[1:])
    assert similar[0] > 0.75 and similar[1] < 0.15

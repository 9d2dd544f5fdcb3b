"""One transformer made of two stacks, an encoder and a decoder, either of which may be absent, and its checkpoints.

A family of models is a setting of the same block, not a class.  An encoder alone is BERT-like: with `num_labels` it
classifies, without it returns its hidden states.  A decoder returns logits over the vocabulary.

Attention Is All You Need: arXiv 1706.03762.  BERT: arXiv 1810.04805.

Symbols: B sequences, L positions, D = d_model, H = heads, E = D / H, V = vocab_size.
"""

import json
import math
import mmap
import os
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer


@dataclass
class Config:
    vocab_size: int
    d_model: int = 128
    d_ff: int = 512                 # width of the MLP
    heads: int = 4
    encoder_layers: int = 0
    decoder_layers: int = 0
    max_length: int = 512           # rows of the table of learned positions
    token_types: int = 0            # rows of the table of segment embeddings (BERT's sentence A / B); 0: no such table
    norm_first: bool = True         # pre-norm, with a final norm; False: post-norm, as BERT has it
    embedding_norm: bool = False    # a norm on the sum of the embeddings (BERT)
    pooling: str = "first"          # what the head sees: the "first" token's state, or the "mean" over the tokens
    pooler: bool = False            # tanh(dense(h)) between that and the head (BERT)
    activation: str = "gelu"        # a key of ACTIVATIONS
    eps: float = 1e-5               # of the norms
    dropout: float = 0.0
    num_labels: int | None = None   # outputs of the classification head; None: no head


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class Attention(nn.Module):
    """Scaled dot-product attention; keys and values come from `memory`, or from x itself where there is none."""

    def __init__(self, config):
        super().__init__()
        D, self.heads = config.d_model, config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, causal=False, memory=None):
        B, L, D = x.shape
        memory = x if memory is None else memory                                          # (B, K, D)
        q, k, v = (proj(h).view(B, -1, self.heads, D // self.heads).transpose(1, 2)       # (B, H, L or K, E)
                   for proj, h in ((self.q, x), (self.k, memory), (self.v, memory)))
        p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal)
        return self.o(y.transpose(1, 2).reshape(B, L, D))                                 # (B, L, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """Self-attention, in an encoder-decoder's decoder attention to the encoder, and an MLP, each with a residual."""

    def __init__(self, config, cross=False):
        super().__init__()
        self.norm_first, self.dropout = config.norm_first, nn.Dropout(config.dropout)
        self.attention, self.attention_norm = Attention(config), nn.LayerNorm(config.d_model, config.eps)
        if cross:
            self.cross, self.cross_norm = Attention(config), nn.LayerNorm(config.d_model, config.eps)
        self.mlp, self.mlp_norm = MLP(config), nn.LayerNorm(config.d_model, config.eps)

    def residual(self, x, norm, sublayer, *args):
        if self.norm_first:
            return x + self.dropout(sublayer(norm(x), *args))
        return norm(x + self.dropout(sublayer(x, *args)))

    def forward(self, x, mask, causal=False, memory=None, memory_mask=None):
        x = self.residual(x, self.attention_norm, self.attention, mask, causal)
        if memory is not None:
            x = self.residual(x, self.cross_norm, self.cross, memory_mask, False, memory)
        return self.residual(x, self.mlp_norm, self.mlp)                                  # (B, L, D)


class Stack(nn.Module):
    """Embeddings, blocks, final norm."""

    def __init__(self, config, layers, tokens, causal=False, cross=False):
        super().__init__()
        D = config.d_model
        self.causal, self.tokens = causal, tokens
        self.positions = nn.Embedding(config.max_length, D)
        self.types = nn.Embedding(config.token_types, D) if config.token_types else None
        self.embedding_norm = nn.LayerNorm(D, config.eps) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, cross) for _ in range(layers))
        self.final_norm = nn.LayerNorm(D, config.eps) if config.norm_first else nn.Identity()

    def forward(self, ids, mask, types=None, memory=None, memory_mask=None):
        if ids.shape[1] > self.positions.num_embeddings:
            raise ValueError(f"{ids.shape[1]} tokens; the model has {self.positions.num_embeddings} positions")
        x = self.tokens(ids) + self.positions(positions(ids, mask))                       # (B, L, D)
        if self.types is not None:
            x = x + self.types(torch.zeros_like(ids) if types is None else types)
        x = self.dropout(self.embedding_norm(x))
        keep, is_causal = attention_mask(mask, self.causal)
        for block in self.blocks:
            x = block(x, keep, is_causal, memory, memory_mask)
        return self.final_norm(x)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        D, V = config.d_model, config.vocab_size
        if D % config.heads or config.activation not in ACTIVATIONS:
            raise ValueError(f"d_model {D} in {config.heads} heads with activation {config.activation!r}: expected a "
                             f"multiple of the heads, and one of {', '.join(ACTIVATIONS)}")
        tokens = nn.Embedding(V, D)
        both = config.encoder_layers > 0 and config.decoder_layers > 0
        self.encoder = Stack(config, config.encoder_layers, tokens) if config.encoder_layers else None
        self.decoder = (Stack(config, config.decoder_layers, tokens, causal=True, cross=both)
                        if config.decoder_layers else None)
        self.pooler = nn.Linear(D, D) if config.pooler else None
        self.classifier = nn.Linear(D, config.num_labels) if config.num_labels else None
        self.apply(init_weights)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, decoder_input_ids=None):
        """Logits or hidden states; padding, on either side, changes none of a row's own.

        input_ids, token_type_ids: (B, L) int64.  attention_mask: (B, L), 1 for a token and 0 for padding, None where
        there is none.  decoder_input_ids: (B, T), for an encoder-decoder.
        Returns (B, num_labels) for an encoder with a head, (B, L, D) without, (B, L or T, V) where there is a decoder.
        Raises ValueError for an empty batch, and for more tokens than the model has positions.
        """
        if input_ids.numel() == 0:
            raise ValueError(f"the model got an empty batch, input_ids of shape {tuple(input_ids.shape)}")
        mask = None if attention_mask is None else attention_mask.bool()
        if self.encoder is None:
            return self.logits(self.decoder(input_ids, mask, token_type_ids))             # (B, L, V)
        h = self.encoder(input_ids, mask, token_type_ids)                                 # (B, L, D)
        if self.decoder is not None:
            memory_mask = None if mask is None else mask[:, None, None, :]
            return self.logits(self.decoder(decoder_input_ids, None, None, h, memory_mask))
        if self.classifier is None:
            return h
        pooled = self.pool(h, torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask)
        return self.classifier(self.encoder.dropout(pooled))                              # (B, num_labels)

    def pool(self, h, mask):
        if self.config.pooling == "mean":
            pooled = (h * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)            # (B, D)
        else:
            pooled = h[torch.arange(len(h)), mask.int().argmax(1)]                        # (B, D)
        return pooled if self.pooler is None else torch.tanh(self.pooler(pooled))

    def logits(self, h):
        return F.linear(h, self.decoder.tokens.weight)                                    # (B, L, V), tied weights

    @classmethod
    def from_pretrained(cls, folder, num_labels=None, dtype=None):
        """The model of a folder with config.json and model.safetensors, in eval mode.

        num_labels: outputs of the classification head, drawn anew where the checkpoint has none of that size; without
        it there is no head.  dtype: of the parameters, float32 by default.  Raises ValueError, naming the file, for a
        family or setting that is not supported and for tensors that are missing, unexpected or misshapen.
        """
        config, rename = read_config(folder)
        config.num_labels = num_labels
        if num_labels is None:
            config.pooler = False
        with torch.device("meta"):  # shapes only: the values come from the file
            model = cls(config)
        path = os.path.join(folder, "model.safetensors")
        tensors = {new: tensor for key, tensor in read_safetensors(path).items() if (new := rename(key))}
        if model.classifier is not None and tensors.get("classifier.weight", torch.empty(0)).shape[0] != num_labels:
            tensors["classifier.weight"] = torch.randn(num_labels, config.d_model) * 0.02
            tensors["classifier.bias"] = torch.zeros(num_labels)
        expected = model.state_dict()
        unused = {key for key in tensors if key not in expected and re.match(r"(pooler|classifier)\.", key)}
        for key in sorted(expected.keys() | (tensors.keys() - unused)):
            if key not in tensors or key not in expected:
                raise ValueError(f"{path}: {key} is {'missing' if key not in tensors else 'unexpected'}")
            if tensors[key].shape != expected[key].shape:
                raise ValueError(f"{path}: {key} has shape {tuple(tensors[key].shape)}, config.json says "
                                 f"{tuple(expected[key].shape)}")
        dtype = torch.float32 if dtype is None else dtype
        model.load_state_dict({key: tensors[key].to(dtype, copy=True) for key in expected}, assign=True)
        return model.requires_grad_(True).eval()


def positions(ids, mask):
    """0, 1, 2, ... along each row, counted over tokens and not over padding; (B, L)."""
    if mask is None:
        return torch.arange(ids.shape[1], device=ids.device)[None]
    return (mask.cumsum(1) - 1).clamp(min=0)


def attention_mask(mask, causal):
    """(True where a key is seen, (B, 1, 1 or L, L), or None; whether SDPA itself has to hide the future)."""
    if mask is None:
        return None, causal
    keep = mask[:, None, None, :]
    if causal:
        L = mask.shape[1]
        past = torch.ones(L, L, dtype=torch.bool, device=mask.device).tril()
        keep = keep & past | torch.eye(L, dtype=torch.bool, device=mask.device)  # padding sees itself: no empty row
    return keep, False


def init_weights(module):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------- checkpoints

# pattern -> our name; keys that no row matches keep their name, keys with the name None are dropped
BERT_NAMES = [
    (r"^bert\.", ""),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^embeddings\.word_embeddings", "encoder.tokens"),
    (r"^embeddings\.position_embeddings", "encoder.positions"),
    (r"^embeddings\.token_type_embeddings", "encoder.types"),
    (r"^embeddings\.LayerNorm", "encoder.embedding_norm"),
    (r"^encoder\.layer\.", "encoder.blocks."),
    (r"attention\.self\.query", "attention.q"),
    (r"attention\.self\.key", "attention.k"),
    (r"attention\.self\.value", "attention.v"),
    (r"attention\.output\.dense", "attention.o"),
    (r"attention\.output\.LayerNorm", "attention_norm"),
    (r"intermediate\.dense", "mlp.up"),
    (r"output\.dense", "mlp.down"),
    (r"output\.LayerNorm", "mlp_norm"),
    (r"^pooler\.dense", "pooler"),
]
BERT_DROPPED = r"^cls\.|^embeddings\.position_ids$"


def bert_name(key):
    """Our name of a tensor of a BERT checkpoint; None for one that has no place here."""
    for pattern, name in BERT_NAMES:
        key = re.sub(pattern, name, key)
    return None if re.search(BERT_DROPPED, key) else key


def read_config(folder):
    """(Config, function from the checkpoint's tensor names to ours) of a folder's config.json."""
    path = os.path.join(folder, "config.json")
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder; expected one with config.json, model.safetensors, tokenizer.json")
    with open(path, encoding="utf-8") as file:
        try:
            raw = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "bert":
        family = raw.get("model_type") if isinstance(raw, dict) else raw
        raise ValueError(f"{path}: model_type is {family!r}; expected 'bert'")
    expected = {"position_embedding_type": ("absolute",), "hidden_act": tuple(ACTIVATIONS), "is_decoder": (False,)}
    for key, values in expected.items():
        if raw.get(key, values[0]) not in values:
            raise ValueError(f"{path}: {key} is {raw[key]!r}; expected one of {values}")
    try:
        return Config(
            vocab_size=raw["vocab_size"], d_model=raw["hidden_size"], d_ff=raw["intermediate_size"],
            heads=raw["num_attention_heads"], encoder_layers=raw["num_hidden_layers"],
            max_length=raw["max_position_embeddings"], token_types=raw["type_vocab_size"], norm_first=False,
            embedding_norm=True, pooler=True, activation=raw.get("hidden_act", "gelu"),
            eps=raw.get("layer_norm_eps", 1e-12), dropout=raw.get("hidden_dropout_prob", 0.1)), bert_name
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from None


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of a safetensors file, memory-mapped copy-on-write; ValueError naming a file that is not one."""
    def check(condition, message):
        if not condition:
            raise ValueError(f"{path}: not a safetensors file: {message}")

    def no_duplicates(pairs):
        check(len(dict(pairs)) == len(pairs), "a key appears twice in its header")
        return dict(pairs)

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        check(size >= 8 and length <= 100_000_000 and 8 + length <= size, f"a header of {length} bytes in {size}")
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=no_duplicates)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: not a safetensors file: its header is not JSON ({error})") from None
        check(isinstance(header, dict), "its header is not an object")
        header.pop("__metadata__", None)
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    spans = []
    for name, entry in header.items():
        check(isinstance(entry, dict) and entry.get("dtype") in DTYPES, f"{name} has no dtype that is known")
        shape, span = entry.get("shape"), entry.get("data_offsets")
        check(all(isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
                  for numbers in (shape, span)) and len(span) == 2, f"{name} has no valid shape and data_offsets")
        check(math.prod(shape) * DTYPES[entry["dtype"]].itemsize == span[1] - span[0],
              f"{name}: {shape} of {entry['dtype']} does not fill bytes {span[0]} to {span[1]}")
        spans.append((*span, name))
    end = 0
    for begin, stop, name in sorted(spans):
        check(begin == end, f"{name} begins at byte {begin}, expected {end}")
        end = stop
    check(8 + length + end == size, f"its tensors end at byte {8 + length + end} of {size}")
    return {name: torch.frombuffer(buffer, dtype=DTYPES[header[name]["dtype"]], count=math.prod(header[name]["shape"]),
                                   offset=8 + length + begin).view(header[name]["shape"])
            if stop > begin else torch.empty(header[name]["shape"], dtype=DTYPES[header[name]["dtype"]])
            for begin, stop, name in spans}


def load_tokenizer(folder):
    """The tokenizers.Tokenizer of a folder's tokenizer.json: pads to the longest row, truncates nothing.

    The pad id is the id of [PAD] or <pad>, 0 where there is neither.  ValueError names a file that is missing or not one.
    """
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; expected a tokenizer in tokenizers' JSON format")
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{path}: not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    pad = next((token for token in ("[PAD]", "<pad>") if tokenizer.token_to_id(token) is not None), None)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad) if pad else 0, pad_token=pad or "[PAD]")
    return tokenizer

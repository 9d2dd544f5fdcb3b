"""One transformer made of two stacks, an encoder and a decoder, and its checkpoints.

A family of models is a setting of the same block, not a class.  An encoder alone is BERT or
RoBERTa, a decoder alone is Llama or Qwen2, both are T5.

Attention Is All You Need: arXiv 1706.03762.  BERT: 1810.04805.  RoBERTa: 1907.11692.
T5: 1910.10683.  Llama: 2302.13971.  Rotary positions: 2104.09864.  Grouped heads: 2305.13245.
Shapes: B sequences, L queries, K keys, D d_model, H heads, G kv_heads, E head_dim, V vocab_size.
"""

import json
import math
import mmap
import os
import re
import shutil
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # rounds to x's dtype before it multiplies, as T5 and Llama do
        return self.weight * F.rms_norm(x, self.normalized_shape, eps=self.eps)

ACTIVATIONS = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"),
               "relu": F.relu, "silu": F.silu}
NORMS = {"layer": nn.LayerNorm, "rms": RMSNorm}

@dataclass
class Config:
    vocab_size: int
    d_model: int = 128
    d_ff: int = 512                 # width of the MLP
    heads: int = 4
    kv_heads: int | None = None     # each serves heads / kv_heads queries; None: heads
    head_dim: int | None = None     # None: d_model / heads
    encoder_layers: int = 0
    decoder_layers: int = 0
    positions: str = "learned"      # "learned" table, "relative" bias (T5) or "rotary" (Llama)
    max_length: int | None = 512    # most positions there are; None: no bound
    position_offset: int = 0        # row of the learned table for the first token (RoBERTa: 2)
    relative_buckets: int = 32
    relative_distance: int = 128    # from here on, one bucket
    rope_theta: float = 1e4
    rope_scaling: dict = field(default_factory=dict)  # the arguments of llama3_scaling, or none
    token_types: int = 0            # rows of the table of segment embeddings (BERT); 0: no table
    norm: str = "layer"             # a key of NORMS
    norm_first: bool = True         # pre-norm and a final norm; False: post-norm (BERT)
    embedding_norm: bool = False    # a norm on the sum of the embeddings (BERT)
    gated: bool = False             # activation(gate(x)) * up(x) in the MLP
    activation: str = "gelu"        # a key of ACTIVATIONS
    qkv_bias: bool = True
    bias: bool = True               # of the other linear layers
    attention_scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    tied: bool = True               # the output head is the embedding
    logit_scale: float = 1.0        # of the output head's input (T5 v1.0: d_model ** -0.5)
    pooler: bool = False            # tanh(dense(h)) of the first token, for the classifier (BERT)
    dense_head: bool = False        # the classifier is dense, tanh, out_proj (RoBERTa)
    eps: float = 1e-5               # of the norms
    dropout: float = 0.0            # of embeddings and sublayers
    attention_dropout: float = 0.0  # of the attention weights
    classifier_dropout: float = 0.0  # of what the classifier's linear layers read
    more_dropout: bool = False      # `dropout` also inside the MLP and of the final states (T5)
    checkpointing: bool = False     # less memory in training: compute each block a second time
    num_labels: int | None = None   # outputs of the classifier; None: no classifier
    labels: list = field(default_factory=list)  # their classes' names; empty: not known
    pad_id: int = 0
    start_id: int = 0               # first token of an encoder-decoder's decoder
    eos_id: int | list | tuple | None = None

class Attention(nn.Module):
    """Attention of x to itself or to `memory`; `cache` is a list of earlier keys and values."""

    def __init__(self, config):
        super().__init__()
        D, H = config.d_model, config.heads
        self.kv_heads, self.head_dim = config.kv_heads or H, config.head_dim or D // H
        self.q = nn.Linear(D, H * self.head_dim, config.qkv_bias)
        self.k = nn.Linear(D, self.kv_heads * self.head_dim, config.qkv_bias)
        self.v = nn.Linear(D, self.kv_heads * self.head_dim, config.qkv_bias)
        self.o = nn.Linear(H * self.head_dim, D, config.bias)
        self.scale, self.dropout = config.attention_scale, nn.Dropout(config.attention_dropout)

    def forward(self, x, mask, causal=False, rotation=None, memory=None, cache=None):
        B, L, _ = x.shape
        q = self.split(self.q(x))                                                   # (B, H, L, E)
        if memory is not None and cache:
            k, v = cache
        else:
            source = x if memory is None else memory
            k, v = self.split(self.k(source)), self.split(self.v(source))           # (B, G, K, E)
            if rotation is not None:
                q, k = rotate(q, rotation), rotate(k, rotation)
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            if cache is not None:
                cache[:] = k, v
        if L == 1:  # the heads of a group are then as many queries of one head
            q = q.reshape(B, self.kv_heads, -1, self.head_dim)                      # (B, G, H/G, E)
        # On a CPU the fused kernel's backward takes over twice the plain one's time in bfloat16.
        plain = q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu"
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=self.dropout.p if self.training else 0.0,
                is_causal=causal, scale=self.scale, enable_gqa=q.shape[1] > self.kv_heads)
        y = y.reshape(B, -1, L, self.head_dim).transpose(1, 2)                      # (B, L, H, E)
        return self.o(y.reshape(B, L, -1))                                          # (B, L, D)

    def split(self, h):
        return h.view(*h.shape[:2], -1, self.head_dim).transpose(1, 2)              # (B, H, L, E)

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff, config.bias)
        self.gate = nn.Linear(config.d_model, config.d_ff, config.bias) if config.gated else None
        self.down = nn.Linear(config.d_ff, config.d_model, config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout) if config.more_dropout else nn.Identity()

    def forward(self, x):
        h = self.up(x)                                                              # (B, L, d_ff)
        h = self.activation(h) if self.gate is None else self.activation(self.gate(x)) * h
        return self.down(self.dropout(h))

class Block(nn.Module):
    """Self-attention, with `cross` attention to a memory, and an MLP, each with a residual."""

    def __init__(self, config, cross=False):
        super().__init__()
        self.norm_first, self.dropout = config.norm_first, nn.Dropout(config.dropout)
        norm = partial(NORMS[config.norm], config.d_model, config.eps)
        self.attention, self.attention_norm = Attention(config), norm()
        if cross:
            self.cross, self.cross_norm = Attention(config), norm()
        self.mlp, self.mlp_norm = MLP(config), norm()

    def forward(self, x, mask, causal=False, rotation=None, memory=None, memory_mask=None,
                cache=(None, None)):
        x = self.residual(x, self.attention_norm, self.attention, mask=mask, causal=causal,
                          rotation=rotation, cache=cache[0])
        if memory is not None:
            x = self.residual(x, self.cross_norm, self.cross, mask=memory_mask, memory=memory,
                              cache=cache[1])
        return self.residual(x, self.mlp_norm, self.mlp)                            # (B, L, D)

    def residual(self, x, norm, sublayer, **settings):
        if self.norm_first:
            return x + self.dropout(sublayer(norm(x), **settings))
        return norm(x + self.dropout(sublayer(x, **settings)))

class Stack(nn.Module):
    """Embeddings, blocks, final norm."""

    def __init__(self, config, layers, tokens, causal=False, cross=False):
        super().__init__()
        self.config, self.causal, self.tokens = config, causal, tokens
        self.positions = self.types = self.relative_bias = None
        D, norm = config.d_model, partial(NORMS[config.norm], config.d_model, config.eps)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_length + config.position_offset, D)
        if config.token_types:
            self.types = nn.Embedding(config.token_types, D)
        self.embedding_norm = norm() if config.embedding_norm else nn.Identity()
        if config.positions == "relative":
            self.relative_bias = nn.Embedding(config.relative_buckets, config.heads)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, cross) for _ in range(layers))
        self.final_norm = norm() if config.norm_first else nn.Identity()

    def forward(self, ids, mask=None, types=None, memory=None, memory_mask=None, cache=None):
        """The states (B, L, D) of ids (B, L).  mask, memory_mask: (B, K), True for a token.
        cache: for each block a list of its attention to itself and one of that to the memory."""
        config, L = self.config, ids.shape[1]
        if cache is None:
            cache = [(None, None)] * len(self.blocks)
        past = cache[0][0][0].shape[2] if cache[0][0] else 0
        if config.max_length is not None and past + L > config.max_length:
            raise ValueError(f"{past + L} tokens; the model has {config.max_length} positions")
        given = torch.ones(1, past + L, device=ids.device).bool() if mask is None else mask
        place = (given.cumsum(1) - 1).clamp(min=0)[:, past:]                        # (B or 1, L)
        x = self.tokens(ids)                                                        # (B, L, D)
        if self.positions is not None:
            x = x + self.positions(place + config.position_offset)
        if self.types is not None:
            x = x + self.types(torch.zeros_like(ids) if types is None else types)
        x = self.dropout(self.embedding_norm(x))
        rotation = rotary(config, place, x.dtype) if config.positions == "rotary" else None
        mask, causal = self.attention_mask(given, past, plain=mask is None and past == 0)
        if memory_mask is not None:
            memory_mask = memory_mask[:, None, None, :]                             # (B, 1, 1, K)
        for block, lists in zip(self.blocks, cache):
            if config.checkpointing and self.training:
                block = partial(checkpoint, block, use_reentrant=False)
            x = block(x, mask, causal, rotation, memory, memory_mask, lists)        # (B, L, D)
        x = self.final_norm(x)
        return self.dropout(x) if config.more_dropout else x

    def attention_mask(self, mask, past, plain):
        """(True where a query sees a key, or a bias of the scores, or None; is_causal)."""
        L, device = mask.shape[1] - past, mask.device
        if plain and self.relative_bias is None:
            return None, self.causal and L > 1  # scaled_dot_product_attention hides the future
        keep = mask[:, None, None, :]                                               # (B, 1, 1, K)
        if self.causal:
            now = torch.ones(L, past + L, device=device).bool().tril(past)          # (L, K)
            keep = keep & now | now.triu(past)  # padding sees itself: no row is without a key
        if self.relative_bias is None:
            return keep, False                                                      # (B, 1, L, K)
        keys = torch.arange(past + L, device=device)
        bucket = relative_bucket(keys - keys[past:, None], self.causal,
                                 self.config.relative_buckets, self.config.relative_distance)
        bias = self.relative_bias.weight[bucket].permute(2, 0, 1)[None]             # (1, H, L, K)
        return bias.masked_fill(~keep, torch.finfo(bias.dtype).min), False          # (B, H, L, K)

def relative_bucket(distance, causal, buckets, most):
    """T5's bucket of key minus query: one for each small distance, and for logarithmic ranges."""
    if causal:
        first, distance = 0, (-distance).clamp(min=0)
    else:
        buckets //= 2
        first, distance = buckets * (distance > 0), distance.abs()
    exact = buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(most / exact)
    far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, far)

def rotary(config, place, dtype):
    """Cosines and sines of each position's angles, (B or 1, 1, L, E / 2) each."""
    angles = place[:, None, :, None].float() * frequencies(config, place.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)

def frequencies(config, device=None):
    """Radians a position of each pair of a head's numbers, (E / 2,)."""
    E = config.head_dim or config.d_model // config.heads
    f = config.rope_theta ** (-torch.arange(0, E, 2, device=device).float() / E)
    return llama3_scaling(f, **config.rope_scaling) if config.rope_scaling else f

def llama3_scaling(f, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Of the frequencies f, low ones divided by `factor`, high ones kept, those between blended."""
    turns = original_max_position_embeddings * f / (2 * math.pi)  # in the original context
    blend = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - blend) * f / factor + blend * f

def rotate(h, rotation):
    """Turn each pair (h[e], h[e + E / 2]) by its angle."""
    (a, b), (cos, sin) = h.chunk(2, -1), rotation
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config, self.module_names = config, {}  # {module: its name in the checkpoint}
        self.decoder = self.lm_head = self.classifier = None
        D, both = config.d_model, config.encoder_layers > 0
        tokens = nn.Embedding(config.vocab_size, D)
        self.encoder = Stack(config, config.encoder_layers, tokens) if both else None
        if config.decoder_layers:
            self.decoder = Stack(config, config.decoder_layers, tokens, causal=True, cross=both)
            self.lm_head = None if config.tied else nn.Linear(D, config.vocab_size, bias=False)
        self.pooler = nn.Linear(D, D) if config.pooler else None
        if config.num_labels is not None:
            self.classifier = nn.Linear(D, config.num_labels)
            self.head_dropout = nn.Dropout(config.classifier_dropout)
        if config.num_labels is not None and config.dense_head:
            self.classifier = nn.Sequential(OrderedDict(
                dense=nn.Linear(D, D), tanh=nn.Tanh(), dropout=self.head_dropout,
                out_proj=self.classifier))
        for _, module in self.named_modules(remove_duplicate=False):
            if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, decoder_input_ids=None):
        """(B, L or T, V) logits where there is a decoder, else (B, num_labels), or the states
        (B, L, D) without a classifier.  Padding, on either side, changes nothing for the tokens.
        input_ids, token_type_ids, attention_mask (1 for a token, 0 for padding): (B, L).
        decoder_input_ids, for an encoder-decoder: (B, T).  ValueError for an empty batch."""
        h = self.hidden(input_ids, attention_mask, token_type_ids, decoder_input_ids)
        if self.decoder is not None:
            return self.logits(h)
        if self.classifier is None:
            return h
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.classifier(self.head_dropout(self.pool(h, mask)))               # (B, labels)

    def hidden(self, input_ids, attention_mask=None, token_type_ids=None, decoder_input_ids=None):
        """The last stack's final states, (B, L or T, D), which `pool` and `logits` read."""
        require(input_ids.numel(), f"the model got an empty batch: {tuple(input_ids.shape)}")
        mask = None if attention_mask is None else attention_mask.bool()
        if self.encoder is None:
            return self.decoder(input_ids, mask, token_type_ids)
        h = self.encoder(input_ids, mask, token_type_ids)
        if self.decoder is None:
            return h
        require(decoder_input_ids is not None, "decoder_input_ids is None; expected (B, T) ids")
        return self.decoder(decoder_input_ids, memory=h, memory_mask=mask)

    def pool(self, h, mask):
        """What the classifier reads, (B, D), of the encoder's states (B, L, D) and mask (B, L)."""
        pooled = h[torch.arange(len(h), device=h.device), mask.int().argmax(1)]     # (B, D)
        return pooled if self.pooler is None else torch.tanh(self.pooler(pooled))

    def logits(self, h):
        """Scores of the next token, (..., V), from a decoder's final states (..., D)."""
        h = h * self.config.logit_scale
        return F.linear(h, self.decoder.tokens.weight) if self.lm_head is None else self.lm_head(h)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, max_new_tokens=128, eos_id=None,
                 temperature=0.0):
        """New token ids, (B, at most max_new_tokens): the likeliest at temperature 0, else drawn
        from softmax(logits / temperature).  Prompts may be padded on either side.
        eos_id: one id or several that end a row, by default the checkpoint's; the rest is padding.
        Raises ValueError for an encoder alone, in training mode, and without a prompt."""
        require(self.decoder is not None and not self.training and input_ids.numel(),
                "generate needs a decoder, in eval mode, and a prompt")
        eos = as_list(self.config.eos_id if eos_id is None else eos_id)
        eos = torch.tensor(eos, device=input_ids.device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = memory_mask = mask.bool()
        ids, memory = input_ids, None
        if self.encoder is not None:
            memory = self.encoder(ids, mask)
            ids = torch.full_like(ids[:, :1], self.config.start_id)
            mask = torch.ones_like(ids, dtype=torch.bool)
        cache = [([], []) for _ in self.decoder.blocks]
        new = torch.full((len(ids), max_new_tokens), self.config.pad_id, device=ids.device)
        rows = torch.arange(len(ids), device=ids.device)  # those that have not ended
        last = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)  # place of each row's last token
        for step in range(max_new_tokens):
            h = self.decoder(ids, mask, None, memory, memory_mask, cache)           # (B, L, D)
            logits = self.logits(h[torch.arange(len(h), device=h.device), last]).float()  # (B, V)
            token = logits.argmax(-1)                                               # (B,)
            if temperature > 0:
                token = torch.multinomial(torch.softmax(logits / temperature, -1), 1)[:, 0]
            new[rows, step] = token
            on = ~torch.isin(token, eos)
            if not on.all():  # of the memory the cache has all that is needed
                rows, token, mask, memory_mask = rows[on], token[on], mask[on], memory_mask[on]
                if len(rows) == 0:
                    return new[:, :step + 1]
                for block in cache:
                    for attention in block:
                        attention[:] = [part[on] for part in attention]
            ids, last = token[:, None], -1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return new

    @classmethod
    def from_pretrained(cls, folder_or_hub_id, num_labels=None, dtype=None, revision=None,
                        new_head=False):
        """The model of a folder with config.json and weights, or of a hub id, in eval mode.
        num_labels: outputs of an encoder's classifier.  It is drawn anew where the checkpoint has
        none of that size, and with new_head; config.labels has the classes' names in config.json.
        dtype: float32 by default.  ValueError names a file that does not fit."""
        folder = local_folder(folder_or_hub_id, revision)
        config, family = read_config(folder)
        require(num_labels is None or not config.decoder_layers, f"{folder}: num_labels is "
                f"{num_labels}, but a model with a decoder has no classifier")
        config.num_labels, config.pooler = num_labels, config.pooler and num_labels is not None
        path, found = read_tensors(folder)
        with naming(path):
            layers = max(config.encoder_layers, config.decoder_layers)
            require(layers <= len(found), f"{len(found)} tensors; config.json has {layers} layers")
            names = module_names(config, family)
            tensors = rename_tensors(found, config, family, names)
            head = tensors.get("lm_head.weight")
            tokens = tensors.get("encoder.tokens.weight", tensors.get("decoder.tokens.weight"))
            if head is not None and tokens is not None and not torch.equal(head, tokens):
                config.tied = False  # transformers 5 writes True for every T5
            with torch.device("meta"):  # shapes only: the values come from the file
                model = cls(config)
            expected = dict(model.named_parameters())  # a shared parameter once
            fit_tensors(tensors, expected, new_head)
        model.module_names = {ours: theirs for theirs, ours in names.items()}
        dtype = torch.float32 if dtype is None else dtype
        values = {key: tensors[key].to(dtype, copy=True) for key in expected}
        model.load_state_dict(values, assign=True, strict=False)
        return model.requires_grad_(True).eval()

def as_list(ids):
    """A list of one id, of several, or of None."""
    ids = [] if ids is None else ids
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]

def require(condition, message):
    if not condition:
        raise ValueError(message)

def check_config(config):
    """ValueError naming the first field of the wrong type, out of range, or at odds with others."""
    for item in fields(config):
        name, value = item.name, getattr(config, item.name)
        kinds = getattr(item.type, "__args__", (item.type,))
        least, most = 0 if item.default == 0 else 1, 2**31  # of an integer
        if float in kinds:
            kinds, least, most = (*kinds, int), 0, 1 if "dropout" in name else 1e38
        good = type(value) not in (int, float) or name == "eos_id" or least <= value < most
        require(type(value) in kinds and good, f"{name} is {value!r}: wrong kind or out of range")
    for value in (config.rope_theta, *config.rope_scaling.values()):
        good = type(value) in (int, float) and 1e-9 <= value < math.inf
        require(good, f"rope_theta is {config.rope_theta}, rope_scaling {config.rope_scaling}")
    for token in (config.pad_id, config.start_id, *as_list(config.eos_id)):
        good = type(token) is int and 0 <= token < config.vocab_size
        require(good, f"pad_id, start_id or eos_id is {token!r}; vocabulary: {config.vocab_size}")
    buckets, distance = config.relative_buckets, config.relative_distance
    require(buckets >= 4 and distance > buckets // 2,
            f"relative_buckets is {buckets}, relative_distance {distance}")
    D, H, G = config.d_model, config.heads, config.kv_heads or config.heads
    require(H % G == 0 and (config.head_dim is not None or D % H == 0),
            f"d_model is {D}, heads {H} and kv_heads {G}: expected multiples")
    only(vars(config), activation=list(ACTIVATIONS))


# --------------------------------------------------------------------------------------- families
# (their prefix, ours, {their name: ours}); {} is a block's number, * is each of q, k, v and o
BERT_MODULES = [
    ("embeddings.", "encoder.", {"word_embeddings": "tokens", "position_embeddings": "positions",
                                 "token_type_embeddings": "types", "LayerNorm": "embedding_norm"}),
    ("encoder.layer.{}.", "encoder.blocks.{}.", {
        "attention.self.query": "attention.q", "attention.self.key": "attention.k",
        "attention.self.value": "attention.v", "attention.output.dense": "attention.o",
        "attention.output.LayerNorm": "attention_norm", "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down", "output.LayerNorm": "mlp_norm"}),
    ("pooler.", "", {"dense": "pooler"})]
ROBERTA_HEAD = ["classifier.dense", "classifier.out_proj"]
T5_ATTENTION = {"SelfAttention.*": "attention.*", "layer_norm": "attention_norm"}
T5_CROSS = {"EncDecAttention.*": "cross.*", "layer_norm": "cross_norm"}
T5_MLP = {"DenseReluDense.wi_0": "mlp.gate", "DenseReluDense.wi_1": "mlp.up",  # v1.0: wi alone
          "DenseReluDense.wo": "mlp.down", "layer_norm": "mlp_norm"}
T5_STACK = {"final_layer_norm": "final_norm",
            "block.0.layer.0.SelfAttention.relative_attention_bias": "relative_bias"}
T5_MODULES = [
    ("", "encoder.", {"shared": "tokens"}),
    ("encoder.", "encoder.", T5_STACK),
    ("encoder.block.{}.layer.0.", "encoder.blocks.{}.", T5_ATTENTION),
    ("encoder.block.{}.layer.1.", "encoder.blocks.{}.", T5_MLP),
    ("decoder.", "decoder.", T5_STACK),
    ("decoder.block.{}.layer.0.", "decoder.blocks.{}.", T5_ATTENTION),
    ("decoder.block.{}.layer.1.", "decoder.blocks.{}.", T5_CROSS),
    ("decoder.block.{}.layer.2.", "decoder.blocks.{}.", T5_MLP)]
LLAMA_MODULES = [
    ("", "decoder.", {"embed_tokens": "tokens", "norm": "final_norm"}),
    ("layers.{}.", "decoder.blocks.{}.", {
        "self_attn.*_proj": "attention.*", "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm"})]
UNREAD = re.compile(  # "model_type name" of the tensors that nothing here reads
    r"(bert|roberta) (cls\.|lm_head\.(dense|layer_norm|decoder|bias))|"  # the guess at masked words
    r"t5 decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$")
AGAIN = re.compile(  # and of those that say a thing again
    r"(bert|roberta) (\w+\.)?embeddings\.position_ids$|t5 (en|de)coder\.embed_tokens\.weight$|"
    r"(llama|qwen2) (\w+\.)*rotary_emb\.inv_freq$")

def bert_config(raw, roberta=False):
    only(raw, position_embedding_type=["absolute"], is_decoder=[False], add_cross_attention=[False])
    pad_id, length = raw.get("pad_token_id", 1 if roberta else 0), raw["max_position_embeddings"]
    offset, dropout = pad_id + 1 if roberta else 0, raw.get("hidden_dropout_prob", 0.1)
    return Config(
        vocab_size=raw["vocab_size"], max_length=length - offset, position_offset=offset,
        d_model=raw["hidden_size"], d_ff=raw["intermediate_size"], dense_head=roberta,
        heads=raw["num_attention_heads"], encoder_layers=raw["num_hidden_layers"],
        token_types=raw.get("type_vocab_size", 2), norm_first=False, embedding_norm=True,
        activation=raw.get("hidden_act", "gelu"), eps=raw.get("layer_norm_eps", 1e-12),
        dropout=dropout, classifier_dropout=raw.get("classifier_dropout", dropout), pad_id=pad_id,
        attention_dropout=raw.get("attention_probs_dropout_prob", 0.1), pooler=not roberta)

def t5_config(raw):
    gated = raw.get("feed_forward_proj", "relu") == "gated-gelu"
    activation = "gelu_new" if gated else "relu"
    only(raw, feed_forward_proj=["relu", "gated-gelu"], is_encoder_decoder=[True],
         scale_decoder_outputs=[True, False], dense_act_fn=[activation], is_gated_act=[gated])
    tied, dropout = raw.get("tie_word_embeddings", True), raw.get("dropout_rate", 0.1)
    return Config(
        vocab_size=raw["vocab_size"], max_length=None, d_model=raw["d_model"], d_ff=raw["d_ff"],
        heads=raw["num_heads"], head_dim=raw["d_kv"], encoder_layers=raw["num_layers"],
        decoder_layers=raw.get("num_decoder_layers", raw["num_layers"]), positions="relative",
        relative_buckets=raw.get("relative_attention_num_buckets", 32), norm="rms", bias=False,
        relative_distance=raw.get("relative_attention_max_distance", 128), qkv_bias=False,
        attention_scale=1.0, gated=gated, activation=activation, tied=tied, more_dropout=True,
        dropout=dropout, attention_dropout=dropout, eps=raw.get("layer_norm_epsilon", 1e-6),
        logit_scale=raw["d_model"] ** -0.5 if raw.get("scale_decoder_outputs", tied) else 1.0,
        pad_id=raw.get("pad_token_id", 0), start_id=raw.get("decoder_start_token_id", 0),
        eos_id=raw.get("eos_token_id", 1))

def llama_config(raw, qkv_bias=False):
    only(raw, hidden_act=["silu"], attention_bias=[False], mlp_bias=[False],
         use_sliding_window=[False], partial_rotary_factor=[1])
    for kind in raw.get("layer_types", []):
        require(kind == "full_attention", f"layer_types has {kind!r}; expected 'full_attention'")
    rope = {**raw.get("rope_scaling", {}), **raw.get("rope_parameters", {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    only({"rope_type": kind}, rope_type=["default", "llama3"])
    scaling = {key: rope[key] for key in LLAMA3} if kind == "llama3" else {}
    pad_id, vocab_size = raw.get("pad_token_id", 0), raw["vocab_size"]
    return Config(
        vocab_size=vocab_size, max_length=raw["max_position_embeddings"],
        d_model=raw["hidden_size"], d_ff=raw["intermediate_size"],
        heads=raw["num_attention_heads"], kv_heads=raw.get("num_key_value_heads"),
        head_dim=raw.get("head_dim"), decoder_layers=raw["num_hidden_layers"],
        rope_theta=rope.get("rope_theta", raw.get("rope_theta", 1e4)), rope_scaling=scaling,
        positions="rotary", norm="rms", eps=raw.get("rms_norm_eps", 1e-6), gated=True,
        activation="silu", tied=raw.get("tie_word_embeddings", False), qkv_bias=qkv_bias,
        attention_dropout=raw.get("attention_dropout", 0.0), eos_id=raw.get("eos_token_id"),
        bias=False, pad_id=pad_id if 0 <= pad_id < vocab_size else 0)  # some files have -1

LLAMA3 = "factor high_freq_factor low_freq_factor original_max_position_embeddings".split()
FAMILIES = {  # model_type: (config, names of modules, their prefix, the head's without a prefix)
    "bert": (bert_config, BERT_MODULES, "bert.", ["classifier"]),
    "roberta": (partial(bert_config, roberta=True), BERT_MODULES, "roberta.", ROBERTA_HEAD),
    "t5": (t5_config, T5_MODULES, "", ["lm_head"]),
    "llama": (llama_config, LLAMA_MODULES, "model.", ["lm_head"]),
    "qwen2": (partial(llama_config, qkv_bias=True), LLAMA_MODULES, "model.", ["lm_head"])}

def only(raw, **expected):
    """ValueError for a setting that is there and not one of those expected."""
    for key, values in expected.items():
        value, known = raw.get(key, values[0]), " or ".join(map(repr, values))
        require(value in values, f"{key} is {value!r}; expected {known}")

def read_config(folder):
    """(Config, model_type) of config.json, where null means absent, and generation_config.json."""
    path, other = (os.path.join(folder, prefix + "config.json") for prefix in ("", "generation_"))
    raw = {key: value for key, value in read_json(path).items() if value is not None}
    with naming(path):
        only(raw, model_type=list(FAMILIES), num_experts=[None], num_local_experts=[None],
             quantization_config=[None])
        config, labels = FAMILIES[raw["model_type"]][0](raw), raw.get("id2label", {})
        config.labels = [str(labels[i]) for i in sorted(labels, key=int)]
        check_config(config)
    with naming(other):
        ends = read_json(other).get("eos_token_id") if os.path.isfile(other) else None
        config.eos_id = config.eos_id if ends is None else ends
        check_config(config)
    return config, raw["model_type"]

def module_names(config, family):
    """{module name in the checkpoint: ours}."""
    _, modules, prefix, heads = FAMILIES[family]
    layers = max(config.encoder_layers, config.decoder_layers)
    names = {head: head for head in heads}
    for theirs, ours, table in modules:
        for i in range(layers) if "{}" in theirs else [0]:
            for a, b in table.items():
                a = a if config.gated else a.replace("wi_1", "wi")  # T5 v1.0
                for letter in "qkvo" if "*" in a else "*":
                    key = prefix + theirs.format(i) + a.replace("*", letter)
                    names[key] = ours.format(i) + b.replace("*", letter)
    return names


# ------------------------------------------------------------------------------- checkpoint files
WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors"]
BESIDE = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*"]
MADE_OF_WEIGHTS = (  # or of training; what else stands beside them travels
    "*.safetensors *.bin *.index.json *.pt *.pth *.ckpt* *.h5 *.msgpack *.onnx* *.gguf adapter_* "
    "base_fingerprint.txt optimizer* scheduler* rng_state* trainer_state.json").split()
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}

def local_folder(folder_or_hub_id, revision=None, weights=True):
    """The folder itself, or the hub's cache of it, downloaded where it lacks files; ValueError."""
    name = os.fspath(folder_or_hub_id)
    if os.path.isdir(name):
        require(revision is None, f"{name} is a folder; revision {revision} is for a hub id")
        return name
    require(not name.startswith(("/", ".", "~")), f"{name}: no such folder; expected one with a "
            "model's files, or the id of a model on the hub")
    fetch = partial(snapshot_download, name, revision=revision)
    try:
        folder = fetch(allow_patterns=[*BESIDE, *(WEIGHTS if weights else [])])
        if weights and not any(file.endswith(".safetensors") for file in os.listdir(folder)):
            fetch(allow_patterns=["pytorch_model.bin", "pytorch_model-*-of-*.bin"])
    except Exception as error:  # of several libraries: no network, no such model, no permission
        raise ValueError(f"{name}: no such folder, and not available from the hub "
                         f"({' '.join(str(error).split())}); give a folder that has the model's "
                         "files, or the id of a model on the hub and a connection") from None
    return folder

@contextmanager
def naming(path, what=""):
    """Whatever goes wrong in the block becomes a ValueError that names the file."""
    try:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                require(file.read(11) != b"version htt", "a Git LFS pointer; run git lfs pull")
        yield
    except Exception as error:  # of several libraries, some of which raise Exception itself
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {what}" + reason.partition("\n")[0]) from None

def read_json(path):
    with open(path, encoding="utf-8") as file, naming(path, "not a JSON object: "):
        return dict(json.load(file))

def write_text(path, text):
    """Under a temporary name, then renamed."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".tmp", path)

def checkpoint_files(folder):
    """The paths of a checkpoint's files, sorted."""
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name[0] != "."]
    return [path for path in paths if os.path.isfile(path)]

def rename_tensors(tensors, config, family, names):
    """{our parameter name: tensor} without those of UNREAD and AGAIN; the unknown is refused."""
    renamed, (_, _, prefix, _) = {}, FAMILIES[family]
    for key, tensor in tensors.items():
        module, _, last = key.rpartition(".")
        last = {"gamma": "weight", "beta": "bias"}.get(last, last)
        ours = names.get(module, names.get(prefix + module))
        if ours is not None:
            require(f"{ours}.{last}" not in renamed, f"{key} is there under two names")
            renamed[f"{ours}.{last}"] = tensor
        elif AGAIN.match(f"{family} {key}"):
            require(says_again(tensor, key, tensors, config), f"{key} is not what the model has")
        else:
            require(UNREAD.match(f"{family} {key}"), f"{key} is unexpected")
    return renamed

def says_again(tensor, key, tensors, config):
    if key.endswith("inv_freq"):
        f, kind = frequencies(config).double(), torch.finfo(tensor.dtype)  # it may be rounded
        return tensor.shape == f.shape and torch.allclose(
            tensor.double(), f, kind.eps + 1e-5, kind.eps * kind.tiny)
    places = torch.arange(tensor.numel()).view(tensor.shape)
    return torch.equal(tensor, places if key.endswith("_ids") else tensors["shared.weight"])

def fit_tensors(tensors, expected, new_head):
    """Draw a classifier where none fits, or with new_head.  ValueError for tensors that do not."""
    head = {key: p.shape for key, p in sorted(expected.items()) if key.startswith("classifier.")}
    if new_head or any(key not in tensors or tensors[key].shape != head[key] for key in head):
        for key, shape in head.items():
            tensors[key] = torch.randn(shape) * 0.02 if len(shape) > 1 else torch.zeros(shape)
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in expected and re.match(r"(pooler|classifier)\.|lm_head\.weight$", key):
            continue  # the head of a model that has none, or is tied
        require(key in tensors, f"{key} is missing")
        require(key in expected, f"{key} is unexpected")
        t, shape = tensors[key], tuple(expected[key].shape)
        require(t.is_floating_point(), f"{key} is of {t.dtype}, expected floating point")
        require(t.shape == shape, f"{key} has shape {tuple(t.shape)}, config.json says {shape}")

def read_tensors(folder):
    """(path, {name: tensor}) of model.safetensors or pytorch_model.bin, or of their shards."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path, read(path)
        index = path + ".index.json"
        if os.path.isfile(index):
            return index, read_shards(index, read)
    raise ValueError(f"{folder}: neither model.safetensors nor pytorch_model.bin, nor an index")

def read_shards(index, read):
    """{name: tensor} of the files that an index names, which must hold what it says."""
    tensors, files = {}, read_json(index)
    with naming(index):
        files = files["weight_map"]
        require(isinstance(files, dict), "weight_map is no object")
        for file in sorted(set(files.values()), key=str):
            plain = isinstance(file, str) and re.fullmatch(r"\w[\w.-]*", file, re.ASCII)
            require(plain, f"{file!r} is no plain file name")
            shard = read(os.path.join(os.path.dirname(index), file))
            for key in shard:
                require(files.get(key) == file, f"{key} is in {file}, not in {files.get(key)}")
            tensors |= shard
        for key in files:
            require(key in tensors, f"{key} is in no file")
    return tensors

def read_bin(path):
    """{name: tensor} of a file that torch.save wrote."""
    with open(path, "rb") as file, naming(path, "not a file of tensors: "):
        tensors = dict(torch.load(file, map_location="cpu", weights_only=True))
        for key, t in tensors.items():
            dense = isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_meta
            require(dense and isinstance(key, str), f"{key} is not a dense tensor")
    return tensors

def read_safetensors(path):
    """{name: tensor}, memory-mapped copy-on-write; ValueError for what is no safetensors file."""
    def without_duplicates(pairs):
        require(len(dict(pairs)) == len(pairs), "a key appears twice")
        return dict(pairs)
    with open(path, "rb") as file, naming(path, "not a safetensors file: "):
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        start = place = 8 + length
        require(start <= min(size, 100_000_008), f"a header of {length} bytes in {size}")
        header = json.loads(file.read(length).decode(), object_pairs_hook=without_duplicates)
        header.pop("__metadata__", None)
        buffer, tensors = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, span = entry["shape"], entry["data_offsets"]
            require(entry["dtype"] in list(DTYPES), f"{name} has the dtype {entry['dtype']}")
            dtype, numbers = DTYPES[entry["dtype"]], [*shape, *span]
            good = len(shape) <= 64 and all(type(n) is int and n >= 0 for n in numbers)
            require(good, f"{name} has an impossible shape")
            end = place + math.prod(shape) * dtype.itemsize
            require(span == [place - start, end - start], f"{name} is not at bytes {span}")
            if place == end:
                tensors[name] = torch.empty(shape, dtype=dtype)
            else:
                flat = torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape), offset=place)
                tensors[name] = flat.view(shape)
            place = end
        require(place == size, f"its tensors end at byte {place} of {size}")
    return tensors

def write_safetensors(path, tensors):
    """Write {name: tensor} under a temporary name, read it back, compare, and rename."""
    names, temporary = {dtype: name for name, dtype in DTYPES.items()}, f"{path}.tmp"
    data = {name: t.contiguous().view(-1).view(torch.uint8) for name, t in tensors.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        at, end = end, end + t.numel() * t.itemsize
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [at, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    with open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(part.numpy() for part in data.values())
    for name, tensor in read_safetensors(temporary).items():
        if not torch.equal(tensor.view(-1).view(torch.uint8), data[name]):
            raise OSError(f"{temporary}: what was read back is not what was written")
    os.replace(temporary, path)

def save_pretrained(model, folder, source, dtype=None):
    """Write a checkpoint in the Hugging Face layout, config.json last.  That file and all others
    that are not MADE_OF_WEIGHTS come from the folder `source`; the classes' names are
    config.labels.  dtype: "float32", "float16" or "bfloat16", by default what config.json names.
    ValueError for an unnamed parameter."""
    raw, tensors = read_json(os.path.join(source, "config.json")), {}
    if dtype is not None:
        raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = dtype
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    dtype = getattr(torch, dtype) if dtype in ("float16", "bfloat16") else torch.float32
    for name, p in model.named_parameters():
        module, _, last = name.rpartition(".")
        known = module in model.module_names and last in ("weight", "bias")
        require(known, f"{name} has no name in a checkpoint of the family {raw['model_type']}")
        tensors[f"{model.module_names[module]}.{last}"] = p.detach().to("cpu", dtype)
    if model.classifier is not None:
        names, count = model.config.labels, model.config.num_labels
        names = names if len(names) == count else [f"LABEL_{i}" for i in range(count)]
        raw["id2label"], raw["label2id"] = dict(enumerate(names)), dict(zip(names, range(count)))
        raw["architectures"] = [raw["model_type"].title() + "ForSequenceClassification"]
    os.makedirs(folder, exist_ok=True)
    names = {os.path.basename(path) for path in checkpoint_files(source)} - {"config.json"}
    for name in names - shutil.ignore_patterns(*MADE_OF_WEIGHTS)(source, names):
        copy = os.path.join(folder, name)
        shutil.copyfile(os.path.join(source, name), copy + ".tmp")
        os.replace(copy + ".tmp", copy)
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors)
    write_text(os.path.join(folder, "config.json"), json.dumps(raw, indent=2))

def load_tokenizer(folder_or_hub_id, revision=None):
    """The Tokenizer of tokenizer.json or vocab.txt; pads with [PAD], <pad> or 0, cuts nothing."""
    folder = local_folder(folder_or_hub_id, revision, weights=False)
    path, vocab = os.path.join(folder, "tokenizer.json"), os.path.join(folder, "vocab.txt")
    if not os.path.isfile(path) and os.path.isfile(vocab):
        path = vocab
    require(os.path.isfile(path), f"{path}: no such file, nor is there a vocab.txt")
    with naming(path, "not a tokenizer: "):
        tokenizer = read_vocab(path) if path == vocab else Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    for pad in ("<pad>", "[PAD]"):
        if tokenizer.token_to_id(pad) is not None:
            tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return tokenizer

def read_vocab(path):
    """BERT's tokenizer of word pieces, one a line; tokenizer_config.json may change defaults."""
    settings = os.path.join(os.path.dirname(path), "tokenizer_config.json")
    raw = read_json(settings) if os.path.isfile(settings) else {}
    pieces = BertWordPieceTokenizer(
        path, lowercase=raw.get("do_lower_case", True), strip_accents=raw.get("strip_accents"),
        handle_chinese_chars=raw.get("tokenize_chinese_chars", True))
    return Tokenizer.from_str(pieces.to_str())

def encode_texts(tokenizer, texts, ends=(), template=True):
    """[(token ids, segment ids)] of texts or pairs of texts, not padded.  ends: tokens that end a
    text; one that the tokenizer's template puts last is taken off, since a decoder alone goes on
    from there.  template: whether it acts.  ValueError where the tokenizer fails or gives none."""
    rows = []
    tokenizer.no_padding()
    for start in range(0, len(texts), 1000):  # few at a time: tokenizers keeps more than the ids
        part = texts[start:start + 1000]
        with naming("the tokenizer"):
            found = tokenizer.encode_batch(part, add_special_tokens=template)
        for text, row in zip(part, found):
            stop = len(row) - 1 if template and set(row.ids[-1:]) & set(ends) else len(row)
            require(stop > 0, f"the tokenizer gives no token for {text!r}")
            rows.append((row.ids[:stop], row.type_ids[:stop]))
    return rows

def require_room(config, source, tokens, segments, lengths):
    """ValueError for an id in `tokens` or `segments` (lists of lists of ids), or a length ({what it
    is the length of: tokens}) that the model has no place for."""
    places = {"token": (tokens, config.vocab_size), "segment": (segments, config.token_types)}
    for what, (rows, count) in places.items():
        largest, path = max(map(max, rows)), os.path.join(source, "tokenizer.json")
        require(not count or largest < count,
                f"{path}: gives {what} {largest}; the model has {count}")
    for what, length in lengths.items():
        require(config.max_length is None or length <= config.max_length,
                f"{what}: {length} tokens; the model has {config.max_length} positions")

"""One transformer made of two stacks, an encoder and a decoder, either of which may be absent, and its checkpoints.

A family of models is a setting of the same block, not a class: an encoder alone is BERT or RoBERTa, a decoder alone is
Llama or Qwen2, both are T5.  An encoder with `num_labels` classifies, without it returns its hidden states; a decoder
returns logits over the vocabulary.

Attention Is All You Need: arXiv 1706.03762.  BERT: 1810.04805.  RoBERTa: 1907.11692.  T5: 1910.10683.
Llama: 2302.13971.  Rotary positions: 2104.09864.  Grouped heads: 2305.13245.

Symbols: B sequences, L queries, K keys, D = d_model, H = heads, E = head_dim, V = vocab_size.
"""

import json
import math
import mmap
import os
import re
import shutil
from collections import OrderedDict
from dataclasses import dataclass, field, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    vocab_size: int
    d_model: int = 128
    d_ff: int = 512                 # width of the MLP
    heads: int = 4
    kv_heads: int | None = None     # heads of the keys and values, each serving heads / kv_heads queries; None: heads
    head_dim: int | None = None     # None: d_model / heads
    encoder_layers: int = 0
    decoder_layers: int = 0
    positions: str = "learned"      # a "learned" table, a "relative" bias by distance (T5), or "rotary" (Llama)
    max_length: int | None = 512    # most positions there are; None: no bound
    position_offset: int = 0        # row of the learned table that the first token gets (RoBERTa: 2)
    relative_buckets: int = 32
    relative_distance: int = 128    # from here on, one bucket
    rope_theta: float = 1e4
    rope_scaling: dict = field(default_factory=dict)  # llama3's; empty: none
    token_types: int = 0            # rows of the table of segment embeddings (BERT's sentence A / B); 0: no such table
    norm: str = "layer"             # "layer" or "rms"
    norm_first: bool = True         # pre-norm, with a final norm; False: post-norm, as BERT has it
    embedding_norm: bool = False    # a norm on the sum of the embeddings (BERT)
    gated: bool = False             # activation(gate(x)) * up(x) in the MLP
    activation: str = "gelu"        # a key of ACTIVATIONS
    qkv_bias: bool = True
    bias: bool = True               # of the other linear layers
    attention_scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    tied: bool = True               # the output head is the embedding
    logit_scale: float = 1.0        # of the state that the output head sees (T5 v1.0: d_model ** -0.5)
    pooling: str = "first"          # what the classifier sees: the "first" token's state, or the "mean" over the tokens
    pooler: bool = False            # tanh(dense(h)) between that and the classifier (BERT)
    dense_head: bool = False        # the classifier is dense, tanh, out_proj (RoBERTa)
    eps: float = 1e-5               # of the norms
    dropout: float = 0.0            # of the embeddings, the sublayers' outputs and the pooled state
    attention_dropout: float = 0.0  # of the attention weights
    checkpointing: bool = False     # in training, keep a block's input alone and compute the block again for its gradient
    num_labels: int | None = None   # outputs of the classifier; None: no classifier
    pad_id: int = 0
    start_id: int = 0               # first token of an encoder-decoder's decoder
    eos_id: int | list | None = None


ACTIVATIONS = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu}


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def make_norm(config):
    return (RMSNorm if config.norm == "rms" else nn.LayerNorm)(config.d_model, config.eps)


class Attention(nn.Module):
    """Dot-product attention; keys and values come from `memory`, or from x itself where there is none.

    cache: a list.  Self-attention puts earlier keys and values before this call's and leaves all of them in it;
    attention to a memory computes them once.
    """

    def __init__(self, config):
        super().__init__()
        D, H = config.d_model, config.heads
        self.kv_heads, self.head_dim = config.kv_heads or H, config.head_dim or D // H
        self.q = nn.Linear(D, H * self.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(D, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(D, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(H * self.head_dim, D, bias=config.bias)
        self.scale, self.groups = config.attention_scale, H // self.kv_heads
        self.dropout = nn.Dropout(config.attention_dropout)

    def forward(self, x, mask, causal=False, rotation=None, memory=None, cache=None):
        B, L, _ = x.shape
        q = self.split(self.q(x))                                                         # (B, H, L, E)
        if memory is not None and cache:
            k, v = cache
        else:
            source = x if memory is None else memory
            k, v = self.split(self.k(source)), self.split(self.v(source))                 # (B, H / groups, K, E)
            if rotation is not None:
                q, k = rotate(q, rotation), rotate(k, rotation)
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            if cache is not None:
                cache[:] = k, v
        p = self.dropout.p if self.training else 0.0
        if L == 1:  # one token's grouped heads are so many queries of one head
            q = q.reshape(B, self.kv_heads, self.groups, self.head_dim)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal, scale=self.scale,
                                           enable_gqa=q.shape[1] > self.kv_heads)
        return self.o(y.reshape(B, -1, L, self.head_dim).transpose(1, 2).reshape(B, L, -1))  # (B, L, D)

    def split(self, h):
        return h.view(*h.shape[:2], -1, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.bias) if config.gated else None
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Self-attention, in an encoder-decoder's decoder attention to the encoder, and an MLP, each with a residual."""

    def __init__(self, config, cross=False):
        super().__init__()
        self.norm_first, self.dropout = config.norm_first, nn.Dropout(config.dropout)
        self.attention, self.attention_norm = Attention(config), make_norm(config)
        if cross:
            self.cross, self.cross_norm = Attention(config), make_norm(config)
        self.mlp, self.mlp_norm = MLP(config), make_norm(config)

    def residual(self, x, norm, sublayer, *args):
        if self.norm_first:
            return x + self.dropout(sublayer(norm(x), *args))
        return norm(x + self.dropout(sublayer(x, *args)))

    def forward(self, x, mask, causal=False, rotation=None, memory=None, memory_mask=None, cache=(None, None)):
        x = self.residual(x, self.attention_norm, self.attention, mask, causal, rotation, None, cache[0])
        if memory is not None:
            x = self.residual(x, self.cross_norm, self.cross, memory_mask, False, None, memory, cache[1])
        return self.residual(x, self.mlp_norm, self.mlp)                                  # (B, L, D)


class Stack(nn.Module):
    """Embeddings, blocks, final norm."""

    def __init__(self, config, layers, tokens, causal=False, cross=False):
        super().__init__()
        D = config.d_model
        self.config, self.causal, self.tokens = config, causal, tokens
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.max_length + config.position_offset, D) if learned else None
        self.types = nn.Embedding(config.token_types, D) if config.token_types else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.relative_bias = (nn.Embedding(config.relative_buckets, config.heads) if config.positions == "relative"
                              else None)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, cross) for _ in range(layers))
        self.final_norm = make_norm(config) if config.norm_first else nn.Identity()

    def forward(self, ids, mask=None, types=None, memory=None, memory_mask=None, cache=None):
        """ids: (B, L); mask: (B, K), True for a token, where K - L keys are in the cache; returns (B, L, D)."""
        config, (B, L) = self.config, ids.shape
        past = cache[0][0][0].shape[2] if cache and cache[0][0] else 0
        if config.max_length is not None and past + L > config.max_length:
            raise ValueError(f"{past + L} tokens; the model has {config.max_length} positions")
        place = positions(mask, past + L, ids.device)[:, past:]                           # (B or 1, L)
        x = self.tokens(ids)                                                              # (B, L, D)
        if self.positions is not None:
            x = x + self.positions(place + config.position_offset)
        if self.types is not None:
            x = x + self.types(torch.zeros_like(ids) if types is None else types)
        x = self.dropout(self.embedding_norm(x))
        rotation = rotary(config, place, x.dtype) if config.positions == "rotary" else None
        keep, causal = attention_mask(mask, L, past, self.causal, self.relative_bias is not None, ids.device)
        if self.relative_bias is not None:
            bias = relative_bias(config, self.relative_bias.weight, past, L, self.causal)  # (1, H, L, K)
            keep = bias if keep is None else bias.masked_fill(~keep, torch.finfo(bias.dtype).min)
        for i, block in enumerate(self.blocks):
            if config.checkpointing and self.training:
                block = partial(checkpoint, block, use_reentrant=False)
            x = block(x, keep, causal, rotation, memory, memory_mask, *([cache[i]] if cache else []))
        return self.dropout(self.final_norm(x)) if config.positions == "relative" else self.final_norm(x)


def positions(mask, length, device):
    """0, 1, 2, ... along each row, counted over tokens and not over padding; (B or 1, length)."""
    if mask is None:
        return torch.arange(length, device=device)[None]
    return (mask.cumsum(1) - 1).clamp(min=0)


def attention_mask(mask, L, past, causal, explicit, device):
    """(True where a query sees a key, broadcasting to (B, 1, L, K), or None; whether SDPA itself hides the future)."""
    if mask is None and (not causal or L == 1):
        return None, False
    if mask is None and past == 0 and not explicit:
        return None, True
    K = past + L
    keep = torch.ones(1, 1, 1, K, dtype=torch.bool, device=device) if mask is None else mask[:, None, None, :]
    if causal:
        now = torch.ones(L, K, dtype=torch.bool, device=device).tril(past)
        keep = keep & now | now.triu(past)  # padding sees itself: no row without a key
    return keep, False


def relative_bias(config, table, past, L, causal):
    """T5's addition to the scores, by the bucket of key minus query; (1, H, L, K)."""
    K = past + L
    distance = torch.arange(K, device=table.device)[None] - torch.arange(past, K, device=table.device)[:, None]
    return table[relative_bucket(distance, causal, config.relative_buckets, config.relative_distance)].permute(2, 0, 1)[None]


def relative_bucket(distance, causal, buckets, most):
    """Half of the buckets for one distance each, half for logarithmically growing ranges up to `most`."""
    bucket = torch.zeros_like(distance)
    if causal:
        distance = (-distance).clamp(min=0)
    else:
        buckets //= 2
        bucket, distance = bucket + buckets * (distance > 0), distance.abs()
    exact = buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(most / exact) * (buckets - exact)
    return bucket + torch.where(distance < exact, distance, (exact + growth.long()).clamp(max=buckets - 1))


def rotary(config, place, dtype):
    """Cosines and sines of each position's angles, (B or 1, 1, L, E / 2) each."""
    E = config.head_dim or config.d_model // config.heads
    inverse = config.rope_theta ** (-torch.arange(0, E, 2, device=place.device).float() / E)
    if config.rope_scaling:
        inverse = llama3_scaling(inverse, **config.rope_scaling)
    angles = place[:, None, :, None].float() * inverse
    return angles.cos().to(dtype), angles.sin().to(dtype)


def llama3_scaling(inverse, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Low frequencies divided by `factor`, high ones kept, those between blended."""
    turns = original_max_position_embeddings * inverse / (2 * math.pi)  # over the original context
    blend = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - blend) * inverse / factor + blend * inverse


def rotate(h, rotation):
    """Turn each pair (h[e], h[e + E / 2]) by its angle."""
    (a, b), (cos, sin) = h.chunk(2, -1), rotation
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.module_names = config, {}  # {module name: its name in the checkpoint}
        D, V = config.d_model, config.vocab_size
        check_config(config)
        tokens = nn.Embedding(V, D)
        both = config.encoder_layers > 0 and config.decoder_layers > 0
        self.encoder = Stack(config, config.encoder_layers, tokens) if config.encoder_layers else None
        self.decoder = (Stack(config, config.decoder_layers, tokens, causal=True, cross=both)
                        if config.decoder_layers else None)
        self.lm_head = nn.Linear(D, V, bias=False) if self.decoder is not None and not config.tied else None
        self.pooler = nn.Linear(D, D) if config.pooler else None
        self.classifier = make_classifier(config) if config.num_labels else None
        self.apply(init_weights)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, decoder_input_ids=None):
        """Logits or hidden states; padding, on either side, changes none of a row's own.

        input_ids, token_type_ids: (B, L) int64.  attention_mask: (B, L), 1 for a token and 0 for padding, None where
        there is none.  decoder_input_ids: (B, T), for an encoder-decoder.
        Returns (B, num_labels) for an encoder with a head, (B, L, D) without, (B, L or T, V) where there is a decoder.
        Raises ValueError for an empty batch, and for more tokens than the model has positions.
        """
        h = self.hidden(input_ids, attention_mask, token_type_ids, decoder_input_ids)
        if self.decoder is not None:
            return self.logits(h)
        if self.classifier is None:
            return h
        pooled = self.pool(h, torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        return self.classifier(self.encoder.dropout(pooled))                              # (B, num_labels)

    def hidden(self, input_ids, attention_mask=None, token_type_ids=None, decoder_input_ids=None):
        """The last stack's final states, (B, L or T, D), which `pool` and `logits` read.  Arguments as for a call."""
        if input_ids.numel() == 0:
            raise ValueError(f"the model got an empty batch, input_ids of shape {tuple(input_ids.shape)}")
        mask = None if attention_mask is None else attention_mask.bool()
        if self.encoder is None:
            return self.decoder(input_ids, mask, token_type_ids)
        h = self.encoder(input_ids, mask, token_type_ids)
        if self.decoder is None:
            return h
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids is None; expected what the decoder reads, beginning with the start id")
        return self.decoder(decoder_input_ids, memory=h, memory_mask=as_key_mask(mask))

    def pool(self, h, mask):
        """What the classifier reads, (B, D), of an encoder's states (B, L, D) and the attention mask (B, L)."""
        if self.config.pooling == "mean":
            pooled = (h * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)            # (B, D)
        else:
            pooled = h[torch.arange(len(h), device=h.device), mask.int().argmax(1)]       # (B, D)
        return pooled if self.pooler is None else torch.tanh(self.pooler(pooled))

    def logits(self, h):
        """Scores of the next token, (..., V), from a decoder's final states (..., D)."""
        h = h * self.config.logit_scale if self.config.logit_scale != 1 else h
        return F.linear(h, self.decoder.tokens.weight) if self.lm_head is None else self.lm_head(h)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, max_new_tokens=128, eos_id=None, temperature=0.0):
        """New token ids, (B, at most max_new_tokens): the likeliest at temperature 0, else drawn from softmax(logits /
        temperature).  Prompts may differ in length, padded on either side.  A row ends at eos_id (one id or several, by
        default the checkpoint's), leaves the batch and is filled up with the pad id; all rows ended ends the call.
        Raises ValueError for an encoder alone, in training mode, for an empty prompt, and where the model has no position left.
        """
        if self.decoder is None or self.training or input_ids.numel() == 0:
            raise ValueError(f"generate needs a decoder, in eval mode, and a prompt; got {type(self.decoder).__name__}, "
                             f"training {self.training}, input_ids of shape {tuple(input_ids.shape)}")
        eos = torch.tensor(as_list(self.config.eos_id if eos_id is None else eos_id), device=input_ids.device)
        mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        cache, memory, memory_mask = [([], []) for _ in self.decoder.blocks], None, None
        ids = input_ids
        if self.encoder is not None:
            memory, memory_mask = self.encoder(ids, mask), as_key_mask(mask)
            ids = torch.full_like(ids[:, :1], self.config.start_id)
            mask = torch.ones_like(ids, dtype=torch.bool)
        last = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)  # of each prompt
        new = torch.full((len(ids), max_new_tokens), self.config.pad_id, device=ids.device)
        rows = torch.arange(len(ids), device=ids.device)         # those of the batch that go on
        for step in range(max_new_tokens):
            h = self.decoder(ids, mask, None, memory, memory_mask, cache)
            logits = self.logits(h[torch.arange(len(h), device=h.device), last]).float()  # (B, V)
            if temperature > 0:
                token = torch.multinomial(torch.softmax(logits / temperature, -1), 1)[:, 0]
            else:
                token = logits.argmax(-1)
            new[rows, step] = token
            on = ~torch.isin(token, eos)
            if not on.all():
                rows, token, mask, last = rows[on], token[on], mask[on], last[on]
                cache = [tuple([part[on] for part in attention] for attention in block) for block in cache]
                memory, memory_mask = (None if part is None else part[on] for part in (memory, memory_mask))
            if len(rows) == 0:
                return new[:, :step + 1]
            ids, last = token[:, None], torch.zeros_like(last)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return new

    @classmethod
    def from_pretrained(cls, folder_or_hub_id, num_labels=None, dtype=None, revision=None):
        """The model of a folder with config.json and weights (model.safetensors or pytorch_model.bin), or of a hub id, in
        eval mode.

        num_labels: outputs of an encoder's classifier, drawn anew where the checkpoint has none of that size; without
        it there is no classifier.  dtype: of the parameters, float32 by default.  revision: of the hub's repository.
        Raises ValueError, naming the file, for a family or setting that is not supported and for tensors that are
        missing, unexpected or misshapen.
        """
        folder = local_folder(folder_or_hub_id, revision)
        config, family = read_config(folder)
        path, found = read_tensors(folder)
        if max(config.encoder_layers, config.decoder_layers) > len(found):
            raise ValueError(f"{path}: {len(found)} tensors, for the {config.encoder_layers} + {config.decoder_layers} layers "
                             "of config.json")
        names = module_names(config, family)
        tensors = rename_tensors(found, family, names, path)
        config.tied = config.tied and not has_own_head(tensors, config)
        if num_labels is not None and config.decoder_layers:
            raise ValueError(f"{folder}: num_labels is {num_labels}, but a model with a decoder has no classifier")
        config.num_labels, config.pooler = num_labels, config.pooler and num_labels is not None
        with torch.device("meta"):  # shapes only: the values come from the file
            model = cls(config)
        model.module_names = {ours: theirs for theirs, ours in names.items()}
        expected = dict(model.named_parameters())  # a shared parameter once
        fresh = {key for key in expected if key.startswith("classifier.")}
        if any(key not in tensors or tensors[key].shape != expected[key].shape for key in fresh):
            tensors |= {key: fresh_parameter(expected[key]) for key in sorted(fresh)}
        require_same_tensors(path, tensors, expected, config)
        dtype = torch.float32 if dtype is None else dtype
        model.load_state_dict({key: tensors[key].to(dtype, copy=True) for key in expected}, assign=True, strict=False)
        return model.requires_grad_(True).eval()


def require_same_tensors(path, tensors, expected, config):
    """ValueError for one that is missing, unexpected, no floating-point numbers or misshapen; heads may be left unused."""
    unused = {key for key in tensors if key not in expected and re.match(r"(pooler|classifier)\.", key)}
    if config.tied:
        unused.add("lm_head.weight")
    for key in sorted(expected.keys() | (tensors.keys() - unused)):
        if key not in tensors or key not in expected:
            raise ValueError(f"{path}: {key} is {'missing' if key not in tensors else 'unexpected'}")
        if not tensors[key].is_floating_point():
            raise ValueError(f"{path}: {key} is of {tensors[key].dtype}, expected floating-point numbers")
        if tensors[key].shape != expected[key].shape:
            raise ValueError(f"{path}: {key} has shape {tuple(tensors[key].shape)}, config.json says {tuple(expected[key].shape)}")


def has_own_head(tensors, config):
    """Is there an output head that is not the embedding?  transformers 5 writes into every T5's config.json that it is."""
    head = tensors.get("lm_head.weight")
    return head is not None and not torch.equal(head, tensors.get(f"{'en' if config.encoder_layers else 'de'}coder.tokens.weight", head))


def as_key_mask(mask):
    return None if mask is None else mask[:, None, None, :]                               # (B, 1, 1, K)


def as_list(ids):
    """Of one id, several or None."""
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


def make_classifier(config):
    out = nn.Linear(config.d_model, config.num_labels)
    if not config.dense_head:
        return out
    return nn.Sequential(OrderedDict(dense=nn.Linear(config.d_model, config.d_model), tanh=nn.Tanh(), out_proj=out))


def fresh_parameter(like):
    return torch.randn(like.shape) * 0.02 if like.dim() > 1 else torch.zeros(like.shape)


def init_weights(module):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------- families

# module names: the checkpoint's and ours, {} for the number of the block
BERT_MODULES = [
    ("bert.embeddings.word_embeddings", "encoder.tokens"),
    ("bert.embeddings.position_embeddings", "encoder.positions"),
    ("bert.embeddings.token_type_embeddings", "encoder.types"),
    ("bert.embeddings.LayerNorm", "encoder.embedding_norm"),
    ("bert.encoder.layer.{}.attention.self.query", "encoder.blocks.{}.attention.q"),
    ("bert.encoder.layer.{}.attention.self.key", "encoder.blocks.{}.attention.k"),
    ("bert.encoder.layer.{}.attention.self.value", "encoder.blocks.{}.attention.v"),
    ("bert.encoder.layer.{}.attention.output.dense", "encoder.blocks.{}.attention.o"),
    ("bert.encoder.layer.{}.attention.output.LayerNorm", "encoder.blocks.{}.attention_norm"),
    ("bert.encoder.layer.{}.intermediate.dense", "encoder.blocks.{}.mlp.up"),
    ("bert.encoder.layer.{}.output.dense", "encoder.blocks.{}.mlp.down"),
    ("bert.encoder.layer.{}.output.LayerNorm", "encoder.blocks.{}.mlp_norm"),
    ("bert.pooler.dense", "pooler"),
    ("classifier", "classifier"),
]
ROBERTA_MODULES = [(theirs.replace("bert.", "roberta.", 1), ours) for theirs, ours in BERT_MODULES[:-1]] + [
    ("classifier.dense", "classifier.dense"),
    ("classifier.out_proj", "classifier.out_proj"),
]
T5_MODULES = [
    ("shared", "encoder.tokens"),
    *((f"{stack}.block.{{}}.layer.0.SelfAttention.{p}", f"{stack}.blocks.{{}}.attention.{p}")
      for stack in ("encoder", "decoder") for p in "qkvo"),
    *((f"{stack}.block.{{}}.layer.0.layer_norm", f"{stack}.blocks.{{}}.attention_norm") for stack in ("encoder", "decoder")),
    *((f"decoder.block.{{}}.layer.1.EncDecAttention.{p}", f"decoder.blocks.{{}}.cross.{p}") for p in "qkvo"),
    ("decoder.block.{}.layer.1.layer_norm", "decoder.blocks.{}.cross_norm"),
    *((f"{stack}.block.{{}}.layer.{i}.{theirs}", f"{stack}.blocks.{{}}.{ours}")
      for stack, i in (("encoder", 1), ("decoder", 2))
      for theirs, ours in (("DenseReluDense.wi", "mlp.up"), ("DenseReluDense.wi_0", "mlp.gate"),
                           ("DenseReluDense.wi_1", "mlp.up"), ("DenseReluDense.wo", "mlp.down"), ("layer_norm", "mlp_norm"))),
    *((f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{stack}.relative_bias")
      for stack in ("encoder", "decoder")),
    ("encoder.final_layer_norm", "encoder.final_norm"),
    ("decoder.final_layer_norm", "decoder.final_norm"),
    ("lm_head", "lm_head"),
]
LLAMA_MODULES = [
    ("model.embed_tokens", "decoder.tokens"),
    *((f"model.layers.{{}}.self_attn.{p}_proj", f"decoder.blocks.{{}}.attention.{p}") for p in "qkvo"),
    *((f"model.layers.{{}}.mlp.{p}_proj", f"decoder.blocks.{{}}.mlp.{p}") for p in ("gate", "up", "down")),
    ("model.layers.{}.input_layernorm", "decoder.blocks.{}.attention_norm"),
    ("model.layers.{}.post_attention_layernorm", "decoder.blocks.{}.mlp_norm"),
    ("model.norm", "decoder.final_norm"),
    ("lm_head", "lm_head"),
]


def bert_config(raw):
    raw.only(position_embedding_type=("absolute",), is_decoder=(False,), add_cross_attention=(False,), **UNSUPPORTED)
    return Config(
        vocab_size=raw["vocab_size"], d_model=raw["hidden_size"], d_ff=raw["intermediate_size"],
        heads=raw["num_attention_heads"], encoder_layers=raw["num_hidden_layers"],
        max_length=raw["max_position_embeddings"], token_types=raw.get("type_vocab_size", 2), norm_first=False,
        embedding_norm=True, pooler=True, activation=raw.get("hidden_act", "gelu"), eps=raw.get("layer_norm_eps", 1e-12),
        dropout=raw.get("hidden_dropout_prob", 0.1),
        attention_dropout=raw.get("attention_probs_dropout_prob", 0.1), pad_id=raw.get("pad_token_id", 0))


def roberta_config(raw):
    config = bert_config(raw)
    config.pad_id = raw.get("pad_token_id", 1)
    config.position_offset, config.pooler, config.dense_head = config.pad_id + 1, False, True
    config.max_length -= config.position_offset
    return config


def t5_config(raw):
    raw.only(feed_forward_proj=("relu", "gated-gelu"), is_encoder_decoder=(True,), scale_decoder_outputs=(True, False), **UNSUPPORTED)
    gated, tied = raw.get("feed_forward_proj", "relu") == "gated-gelu", raw.get("tie_word_embeddings", True)
    raw.only(dense_act_fn=("gelu_new" if gated else "relu",), is_gated_act=(gated,))
    return Config(
        vocab_size=raw["vocab_size"], d_model=raw["d_model"], d_ff=raw["d_ff"], heads=raw["num_heads"],
        head_dim=raw["d_kv"], encoder_layers=raw["num_layers"],
        decoder_layers=raw.get("num_decoder_layers", raw["num_layers"]), positions="relative", max_length=None,
        relative_buckets=raw.get("relative_attention_num_buckets", 32),
        relative_distance=raw.get("relative_attention_max_distance", 128), norm="rms", gated=gated,
        activation="gelu_new" if gated else "relu", qkv_bias=False, bias=False, attention_scale=1.0, tied=tied,
        logit_scale=raw["d_model"] ** -0.5 if raw.get("scale_decoder_outputs", tied) else 1.0, eps=raw.get("layer_norm_epsilon", 1e-6),
        dropout=raw.get("dropout_rate", 0.1), attention_dropout=raw.get("dropout_rate", 0.1), pad_id=raw.get("pad_token_id", 0),
        start_id=raw.get("decoder_start_token_id", 0), eos_id=raw.get("eos_token_id", 1))


def llama_config(raw, qkv_bias=False):
    raw.only(hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,), use_sliding_window=(False,),
             partial_rotary_factor=(1, 1.0), **UNSUPPORTED)
    if set(raw.get("layer_types", [])) - {"full_attention"}:
        raw.refuse("layer_types", raw["layer_types"], ("full_attention",))
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind not in ("default", "llama3"):
        raw.refuse("rope_type", kind, ("default", "llama3"))
    if kind == "llama3" and LLAMA3_SCALING - rope.keys():
        raise ValueError(f"{raw.path}: the rope scaling has no {min(LLAMA3_SCALING - rope.keys())}")
    theta, pad, vocab_size = rope.pop("rope_theta", raw.get("rope_theta", 1e4)), raw.get("pad_token_id", 0), raw["vocab_size"]
    return Config(
        vocab_size=raw["vocab_size"], d_model=raw["hidden_size"], d_ff=raw["intermediate_size"],
        heads=raw["num_attention_heads"], kv_heads=raw.get("num_key_value_heads"), head_dim=raw.get("head_dim"),
        decoder_layers=raw["num_hidden_layers"], positions="rotary", max_length=raw["max_position_embeddings"],
        rope_theta=theta, rope_scaling={k: rope[k] for k in LLAMA3_SCALING} if kind == "llama3" else {}, norm="rms",
        gated=True, activation="silu", qkv_bias=qkv_bias, bias=False, tied=raw.get("tie_word_embeddings", False),
        eps=raw.get("rms_norm_eps", 1e-6),
        attention_dropout=raw.get("attention_dropout", 0.0), pad_id=pad if 0 <= pad < vocab_size else 0, eos_id=raw.get("eos_token_id"))


LLAMA3_SCALING = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
UNSUPPORTED = {"num_experts": (None,), "num_local_experts": (None,), "quantization_config": (None,)}
FAMILIES = {  # model_type: (config, module names, prefix that a file may lack)
    "bert": (bert_config, BERT_MODULES, "bert."),
    "roberta": (roberta_config, ROBERTA_MODULES, "roberta."),
    "t5": (t5_config, T5_MODULES, ""),
    "llama": (llama_config, LLAMA_MODULES, "model."),
    "qwen2": (partial(llama_config, qkv_bias=True), LLAMA_MODULES, "model."),
}
DROPPED = re.compile(r"^cls\.|^lm_head\.(dense|layer_norm|decoder|bias)|position_ids$|embed_tokens\.weight$|"
                     r"rotary_emb\.inv_freq$|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias")


class RawConfig(dict):
    """config.json, whose complaints name the file."""

    def __init__(self, path):
        self.path = path
        with open(path, encoding="utf-8") as file:
            try:
                super().__init__(json.load(file))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{path}: not a JSON object: {error}") from None

    def __missing__(self, key):
        raise ValueError(f"{self.path}: {key} is missing")

    def get(self, key, default=None):
        """Null is as good as absent."""
        value = super().get(key)
        return default if value is None else value

    def only(self, **expected):
        for key, values in expected.items():
            if key in self and self[key] not in (*values, None):
                self.refuse(key, self[key], values)

    def refuse(self, key, value, expected):
        raise ValueError(f"{self.path}: {key} is {value!r}; expected {' or '.join(map(repr, expected))}")


SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def local_folder(folder_or_hub_id, revision=None, weights=True):
    """The folder itself, or the one in the hub's cache with a model's files, downloaded where it lacks them.

    The hub's own settings hold: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.  ValueError where there is neither.
    """
    name = os.fspath(folder_or_hub_id)
    if os.path.isdir(name):
        if revision is not None:
            raise ValueError(f"{name} is a folder; revision {revision} is for the id of a model on the hub")
        return name
    if name.startswith(("/", ".", "~")):
        raise ValueError(f"{name}: no such folder; expected one with a model's files, or the id of a model on the hub")
    fetch = partial(snapshot_download, name, revision=revision)
    try:
        folder = fetch(allow_patterns=[*SMALL_FILES, *(weight_files("model", "safetensors") if weights else [])])
        if weights and not any(file.endswith(".safetensors") for file in os.listdir(folder)):
            fetch(allow_patterns=weight_files("pytorch_model", "bin"))
    except Exception as error:  # of several libraries: no network, no such model, no permission, no such revision
        raise ValueError(f"{name}: no such folder, nor could it be had from the hub ({' '.join(str(error).split())}); "
                         "give a folder that has the model's files, or the id of a model on the hub and a connection") from None
    return folder


def weight_files(stem, suffix):
    return [f"{stem}.{suffix}", f"{stem}-*-of-*.{suffix}", f"{stem}.{suffix}.index.json"]


def read_config(folder):
    """(Config, model_type) of a folder's config.json."""
    raw = RawConfig(os.path.join(folder, "config.json"))
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raw.refuse("model_type", family, FAMILIES)
    try:
        config = FAMILIES[family][0](raw)
        check_config(config)
    except (TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise ValueError(f"{raw.path}: a value of the wrong kind: {error}") from None
    except ValueError as error:
        raise ValueError(f"{raw.path}: {str(error).removeprefix(raw.path + ': ')}") from None
    return config, family


def check_config(config):
    """ValueError naming the first field that is not of its type, or out of range."""
    may_be_zero = {"encoder_layers", "decoder_layers", "position_offset", "token_types", "pad_id", "start_id"}
    for item in fields(config):
        value, kind = getattr(config, item.name), item.type
        if value is None:
            right = kind in (int | None, float | None, int | list | None)
        elif kind in (int, int | None):
            right = type(value) is int and (item.name not in may_be_zero) <= value < 2**31
        elif kind in (float, float | None):
            least, most = (1e-9 if item.name == "rope_theta" else 0), (1 if "dropout" in item.name else 1e38)
            right = type(value) in (int, float) and least <= value < most
        elif item.name == "eos_id":
            right = all(type(token) is int for token in as_list(value))
        else:
            right = kind is not bool or type(value) is bool
        if not right:
            raise ValueError(f"{item.name} is {value!r}")
    if any(type(value) not in (int, float) or not 0 < value < math.inf for value in config.rope_scaling.values()):
        raise ValueError(f"rope_scaling is {config.rope_scaling}")
    for name in ("pad_id", "start_id", "eos_id"):
        if not all(0 <= token < config.vocab_size for token in as_list(getattr(config, name))):
            raise ValueError(f"{name} is {getattr(config, name)}; there are {config.vocab_size} tokens")
    if config.relative_distance <= config.relative_buckets // 2 or config.relative_buckets < 4:
        raise ValueError(f"relative_buckets is {config.relative_buckets}, relative_distance {config.relative_distance}")
    D, H, K, E = config.d_model, config.heads, config.kv_heads or config.heads, config.head_dim
    if (E is None and D % H) or H % K:
        raise ValueError(f"d_model is {D}, heads {H} and kv_heads {K}: expected multiples")
    if config.activation not in ACTIVATIONS:
        raise ValueError(f"activation is {config.activation!r}; expected one of {', '.join(ACTIVATIONS)}")


def module_names(config, family):
    """{module name in the checkpoint: ours}; turned round it leads back to the Hugging Face tree."""
    rows, gated = FAMILIES[family][1], config.gated
    rows = [(a, b) for a, b in rows if not a.endswith(("wi",) if gated else ("wi_0", "wi_1"))]
    blocks = range(max(config.encoder_layers, config.decoder_layers))
    return {a.replace("{}", str(i)): b.replace("{}", str(i)) for a, b in rows for i in (blocks if "{}" in a else [0])}


def rename_tensors(tensors, family, names, path):
    """{our parameter name: tensor}; what no model here has is left out, what is unknown is refused."""
    prefix, renamed = FAMILIES[family][2], {}
    for key, tensor in tensors.items():
        module, _, last = key.rpartition(".")
        last = {"gamma": "weight", "beta": "bias"}.get(last, last)
        ours = names.get(module) or names.get(prefix + module)
        if f"{ours}.{last}" in renamed:
            raise ValueError(f"{path}: {key} is there under two names")
        if ours is not None:
            renamed[f"{ours}.{last}"] = tensor
        elif not DROPPED.search(key):
            raise ValueError(f"{path}: {key} is unexpected")
    return renamed


def read_tensors(folder):
    """(path, {name: tensor}) of model.safetensors or pytorch_model.bin, in one file or in the shards of an index."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path, read(path)
        index = path + ".index.json"
        if os.path.isfile(index):
            files = RawConfig(index)["weight_map"]
            if not isinstance(files, dict):
                raise ValueError(f"{index}: weight_map is no object")
            for file in files.values():
                if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*", file, re.ASCII):
                    raise ValueError(f"{index}: {file!r} is no plain file name")
            tensors = {}
            for file in sorted(set(files.values())):
                shard = read(os.path.join(folder, file))
                for key in shard:
                    if files.get(key) != file:
                        raise ValueError(f"{index}: {key} is in {file}, not in {files.get(key)}")
                tensors |= shard
            if files.keys() - tensors.keys():
                raise ValueError(f"{index}: {min(files.keys() - tensors.keys())} is in no file")
            return index, tensors
    raise ValueError(f"{folder}: neither model.safetensors nor pytorch_model.bin, nor an index of either")


def read_bin(path):
    """{name: tensor} of a file that torch.save wrote."""
    with open(path, "rb") as file:
        try:
            tensors = dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # whatever a broken file makes the unpickler stumble over
            raise ValueError(f"{path}: not a file of tensors ({type(error).__name__})") from None
    for key, value in tensors.items():
        if not (isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta):
            raise ValueError(f"{path}: {key} is not a dense tensor")
    return tensors


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of a safetensors file, memory-mapped copy-on-write; ValueError naming a file that is not one."""
    with open(path, "rb") as file:
        start, header = read_header(path, file)
        buffer, end = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), 0
    for begin, stop, name in sorted((*entry["data_offsets"], name) for name, entry in header.items()):
        require(path, begin == end, f"{name} begins at byte {begin}, expected {end}")
        end = stop
    require(path, start + end == len(buffer), f"its tensors end at byte {start + end} of {len(buffer)}")
    tensors = {}
    for name, entry in header.items():
        dtype, shape, begin = DTYPES[entry["dtype"]], entry["shape"], start + entry["data_offsets"][0]
        if math.prod(shape) == 0:
            tensors[name] = torch.empty(shape, dtype=dtype)
        else:
            tensors[name] = torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape), offset=begin).view(shape)
    return tensors


def read_header(path, file):
    """(first byte of the data, {name: {dtype, shape, data_offsets}}), each entry checked by itself."""
    def no_duplicates(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    require(path, size >= 8 and length <= 100_000_000 and 8 + length <= size, f"a header of {length} bytes in {size}")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a safetensors file: header: {error}") from None
    require(path, isinstance(header, dict), "its header is not an object")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        dtype, shape, span = (entry.get(key) if isinstance(entry, dict) else None
                              for key in ("dtype", "shape", "data_offsets"))
        require(path, isinstance(dtype, str) and dtype in DTYPES, f"{name} has no dtype that is known")
        require(path, all(isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
                          for numbers in (shape, span)) and len(span) == 2, f"{name} has no valid shape and data_offsets")
        require(path, len(shape) <= 64 and all(n < 2**62 for n in (*shape, *span)), f"{name} has an impossible shape")
        require(path, math.prod(n or 1 for n in shape) < 2**62, f"{name} has an impossible shape")
        require(path, math.prod(shape) * DTYPES[dtype].itemsize == span[1] - span[0],
                f"{name}: {shape} of {dtype} does not fill bytes {span[0]} to {span[1]}")
    return 8 + length, header


def require(path, condition, message):
    if not condition:
        raise ValueError(f"{path}: not a safetensors file: {message}")


def save_pretrained(model, folder, source):
    """Write the model as a checkpoint in the Hugging Face layout: model.safetensors with that tree's names, in the dtype
    that the config.json of `source` names, and that folder's config.json and tokenizer.

    source: the folder that the model was loaded from.  Each file is written under a temporary name and renamed,
    config.json last.  ValueError for a parameter that has no name in such a checkpoint.
    """
    raw, tensors = RawConfig(os.path.join(source, "config.json")), {}
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(str(raw.get("dtype", raw.get("torch_dtype"))), torch.float32)
    for name, p in model.named_parameters():
        module, _, last = name.rpartition(".")
        if module not in model.module_names or last not in ("weight", "bias"):
            raise ValueError(f"{name} has no name in a checkpoint of the family {raw['model_type']}")
        tensors[f"{model.module_names[module]}.{last}"] = p.detach().to("cpu", dtype)
    if model.classifier is not None:
        labels = [f"LABEL_{i}" for i in range(model.config.num_labels)]
        raw["id2label"], raw["label2id"] = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
        raw["architectures"] = [raw["model_type"].title() + "ForSequenceClassification"]
    os.makedirs(folder, exist_ok=True)
    for name in SMALL_FILES:
        if name != "config.json" and os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name + ".tmp"))
            os.replace(os.path.join(folder, name + ".tmp"), os.path.join(folder, name))
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors)
    path = os.path.join(folder, "config.json")
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(raw, file, indent=2)
    os.replace(path + ".tmp", path)


def write_safetensors(path, tensors):
    """Write {name: tensor} under a temporary name, read it back, compare, and rename.  OSError where that fails."""
    temporary = f"{path}.tmp"
    names, header, end = {dtype: name for name, dtype in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    with open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(as_bytes(tensor).numpy())
    written = read_safetensors(temporary)
    if not all(torch.equal(as_bytes(written[name]), as_bytes(tensor)) for name, tensor in tensors.items()):
        raise OSError(f"{temporary}: what was read back is not what was written")
    os.replace(temporary, path)


def as_bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def load_tokenizer(folder_or_hub_id, revision=None):
    """The tokenizers.Tokenizer of tokenizer.json, or of BERT's vocab.txt: pads to the longest row, truncates nothing.

    The pad id is the id of [PAD] or <pad>, 0 where there is neither.  ValueError names a file that is missing or not one.
    """
    folder = local_folder(folder_or_hub_id, revision, weights=False)
    path, vocab = os.path.join(folder, "tokenizer.json"), os.path.join(folder, "vocab.txt")
    if not os.path.isfile(path) and os.path.isfile(vocab):
        path = vocab
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file, nor is there a vocab.txt; expected a tokenizer in tokenizers' JSON format")
    try:
        tokenizer = read_vocab(folder, path) if path == vocab else Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{path}: not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    pad = next((token for token in ("[PAD]", "<pad>") if tokenizer.token_to_id(token) is not None), None)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad) if pad else 0, pad_token=pad or "[PAD]")
    return tokenizer


def read_vocab(folder, path):
    """BERT's tokenizer of a list of word pieces, one a line; lower case unless tokenizer_config.json says otherwise."""
    settings = os.path.join(folder, "tokenizer_config.json")
    raw = RawConfig(settings) if os.path.isfile(settings) else {}
    pieces = BertWordPieceTokenizer(path, lowercase=raw.get("do_lower_case", True), strip_accents=raw.get("strip_accents"),
                                    handle_chinese_chars=raw.get("tokenize_chinese_chars", True))
    return Tokenizer.from_str(pieces.to_str())

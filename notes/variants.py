"""Starts and layers of the paper's Table 4: PiSSA, LoRA-GA, DoRA and rsLoRA, each with any method.

    python notes/methods.py train_glue.py --init pissa --method lora bi-lora
    python notes/methods.py train_glue.py --dora --rslora

    V = W0 + s (B1 A1 - B0 A0)      in training mode + s B2 A2, where there is an auxiliary pair
    W = V                           with DoRA: row i is m_i V_i / ||V_i||

PiSSA (2404.02948) and LoRA-GA (2407.05000) choose the start (B0, A0) of B1 and A1.  Their papers
subtract s B0 A0 from W0.  Here W0 stays as it is, and the start is a second, frozen pair: the same
W, but no rounding of W0, one fingerprint for every adapter, and a file that is right on the
original base: [B1, B0] and [A1; -A0], a plain LoRA of rank 2 r.

DoRA (2402.09353) trains m, the norms of W's rows, beside the pair.  ||V_i|| is a constant in the
gradient.  The Bi-LoRA paper does not say where DoRA has the auxiliary pair: here it is part of V.

rsLoRA (2312.03732) has s = alpha / sqrt(r).
"""

import math

import torch
import torch.nn as nn

from bilora import LoRALinear, _whole, _wide, one_pass


class VariantLinear(LoRALinear):
    """A LoRALinear with a start (a frozen pair that is subtracted), DoRA's magnitude, or rsLoRA's
    scale; zero as long as start_ has not set it.  Give it to add_lora as `layer`, by partial."""

    def __init__(self, linear, rank, alpha, start=False, dora=False, rslora=False):
        super().__init__(linear, rank, alpha)
        self.rslora = rslora
        if rslora:
            self.scale = alpha / math.sqrt(rank)
        with torch.inference_mode(False):  # as LoRALinear makes its pairs
            for name, p in (("start_B", self.lora_B), ("start_A", self.lora_A)):
                self.register_buffer(name, torch.zeros_like(p.detach()) if start else None)
            self.magnitude = nn.Parameter(self.row_norms(False)) if dora else None
        if dora and not self.magnitude.all():
            raise ValueError("DoRA divides by the norm of each row of W0; one of them is 0")

    def pairs(self, training):
        found = super().pairs(training)
        if self.start_A is None:
            return found
        return [*found, (self.start_B, -self.start_A)]

    @torch.no_grad()
    def row_norms(self, training):
        """||V_i|| of every row, (m,)."""
        return super().merged_weight(training).norm(dim=1)

    def forward(self, x):
        out = super().forward(x)                                    # x V^T + bias
        if self.magnitude is None:
            return out
        ratio = self.magnitude / self.row_norms(self.training)      # float32: it is near 1
        scaled = ratio * out
        if self.bias is not None:
            scaled = scaled + (1 - ratio) * self.bias               # the bias has no magnitude
        return scaled.to(out.dtype)

    def merged_weight(self, training=False, dtype=torch.float32):
        V = super().merged_weight(training, dtype)
        if self.magnitude is None:
            return V
        return V * (self.magnitude / V.detach().norm(dim=1))[:, None]

    def delta(self):
        """W - W0, (m, n)."""
        return self.merged_weight() - _wide(self.weight)

    def trained(self):
        if self.magnitude is None:
            return super().trained()
        return {**super().trained(), "lora_magnitude_vector": self.magnitude}

    def saved(self):
        """As PEFT reads it on the original base: a start doubles the rank at the same scale."""
        tensors, settings = self.trained(), {"r": self.rank, "lora_alpha": self.alpha}
        if self.start_A is not None:
            B, A = _whole(self.lora_B), _whole(self.lora_A)  # gathered, if they are sharded
            tensors["lora_B.weight"] = torch.cat([B, self.start_B.cpu()], dim=1)
            tensors["lora_A.weight"] = torch.cat([A, -self.start_A.cpu()])
            alpha = math.sqrt(2) * self.alpha if self.rslora else 2 * self.alpha
            settings = {"r": 2 * self.rank, "lora_alpha": alpha}
        if self.rslora:
            settings["use_rslora"] = True
        if self.magnitude is not None:
            settings["use_dora"] = True
        return tensors, settings

    def load(self, tensors):
        if self.start_A is not None:
            tensors, r = dict(tensors), self.rank
            B, A = tensors["lora_B.weight"], tensors["lora_A.weight"]
            self.start_B.copy_(B[:, r:])
            self.start_A.copy_(-A[r:])
            tensors |= {"lora_B.weight": B[:, :r], "lora_A.weight": A[:r]}
        super().load(tensors)


@torch.no_grad()
def start_(layer, B, A):
    """Let B1 and A1 begin at B and A, and W at W0."""
    for p, value in ((layer.lora_B, B), (layer.start_B, B), (layer.lora_A, A), (layer.start_A, A)):
        p.copy_(value)


def _require_starts(layers):
    for layer in layers:
        if getattr(layer, "start_A", None) is None:
            raise ValueError("a layer has no place for a start; expected VariantLinear with start")


@torch.no_grad()
def pissa_(layers):
    """PiSSA: s B0 A0 is the best approximation of W0 of rank r."""
    _require_starts(layers)
    for layer in layers:
        U, S, Vh = torch.linalg.svd(_wide(layer.weight), full_matrices=False)
        r = layer.rank
        root = (S[:r] / layer.scale).sqrt()
        start_(layer, U[:, :r] * root, root[:, None] * Vh[:r])


def lora_ga_(layers, closure, gamma=16):
    """LoRA-GA, from G = U S V^T, the gradient in W0 that closure() leaves: A0 is the first r rows
    of V^T, B0 the columns r + 1 to 2 r of U, both times m^(1/4) / sqrt(gamma), W being (m, n).
    gamma is the published code's.  The random stream goes on as if this had not been."""
    _require_starts(layers)
    for layer in layers:
        shape = tuple(layer.weight.shape)
        if 2 * layer.rank > min(shape):
            raise ValueError(f"LoRA-GA takes 2 r singular vectors; rank is {layer.rank}, a layer "
                             f"of shape {shape} has {min(shape)}")
    weights = [layer.weight for layer in layers]
    if any(hasattr(W, "full_tensor") for W in weights):
        raise ValueError("LoRA-GA needs the gradient of W0, which is sharded; expected no --fsdp")
    for W in weights:
        W.requires_grad_(True)
    try:
        with torch.random.fork_rng({W.device for W in weights if W.is_cuda}):
            one_pass("LoRA-GA", closure, torch.optim.SGD(weights, lr=0.0))
        if any(W.grad is None for W in weights):
            raise ValueError("LoRA-GA: the loss does not depend on every adapted layer")
        for layer in layers:
            U, _, Vh = torch.linalg.svd(_wide(layer.weight.grad), full_matrices=False)
            r, size = layer.rank, layer.out_features ** 0.25 / math.sqrt(gamma)
            start_(layer, size * U[:, r:2 * r], size * Vh[:r])
    finally:
        for W in weights:
            W.requires_grad_(False)
            W.grad = None

"""A frozen base in 4 bits: the NF4 of QLoRA (2305.14314), under any method's adapters.

    python notes/methods.py train_gsm8k.py --nf4 --method lora bi-lora

    W0 ~ absmax * level      one absmax for each block of 64 entries, row after row of W0

The 16 levels are quantiles of the normal distribution, scaled to [-1, 1]; zero is one of them.  A
block keeps its largest absolute value, absmax, and each entry the number of its nearest level, in
4 bits.  W0 itself is not kept.  Each product makes it anew, so one layer at a time has it.

QLoRA also quantizes absmax.  Here it keeps the dtype of W0, in which it is exact.
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from bilora import LoRALinear

BLOCK, OFFSET = 64, 0.9677083  # the published code's; OFFSET: the probability of the largest level


@functools.cache
def levels(device):
    """The 16 levels, ascending, float32: 7 quantiles below zero, zero, and 8 above, on either side
    in equal steps of probability."""
    def quantiles(count):
        return torch.special.ndtri(torch.linspace(0.5, OFFSET, count, device="cpu").double())
    found = torch.cat([-quantiles(8)[1:].flip(0), quantiles(9)]).float()
    return (found / found.max()).to(device)


@torch.no_grad()
def quantize(W):
    """(codes, absmax) of W (m, n): codes, uint8, holds two a byte, absmax one number a block, in
    W's dtype.  Zeros fill the last block up."""
    blocks = F.pad(W.float().flatten(), (0, -W.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    found = levels(W.device)
    middles = (found[1:] + found[:-1]) / 2
    high, low = torch.bucketize(scaled, middles).to(torch.uint8).view(-1, 2).unbind(1)
    return high << 4 | low, absmax.to(W.dtype)


def dequantize(codes, absmax, shape):
    """W (m, n), in absmax's dtype: made in float32, and rounded once."""
    numbers = torch.stack([codes >> 4, codes & 15], dim=1).int().flatten()
    blocks = levels(codes.device).index_select(0, numbers).view(-1, BLOCK)
    W = blocks.mul_(absmax.float()[:, None]).to(absmax.dtype)
    return W.flatten()[:shape.numel()].view(shape)


class FrozenProduct(torch.autograd.Function):
    """x W0^T + bias, x (rows, n).  W0 is made in the forward pass and again in the backward pass:
    autograd would keep it between them."""

    @staticmethod
    def forward(ctx, x, bias, codes, absmax, shape):
        ctx.save_for_backward(codes, absmax)
        ctx.shape = shape
        return F.linear(x, dequantize(codes, absmax, shape).to(x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        W = dequantize(*ctx.saved_tensors, ctx.shape).to(gradient.dtype)
        bias = gradient.sum(0) if ctx.needs_input_grad[1] else None
        return gradient @ W, bias, None, None, None


class NF4Linear(LoRALinear):
    """A LoRALinear that stores W0 in 4 bits.  Give it to add_lora as `layer`."""

    def __init__(self, linear, rank, alpha, aux_rank=0):
        super().__init__(linear, rank, alpha, aux_rank)
        with torch.inference_mode(False):  # as LoRALinear makes its pairs
            codes, absmax = quantize(self.weight)
        self.shape = self.weight.shape
        del self.weight
        self.codes = nn.Parameter(codes, requires_grad=False)  # no buffers: a run's state has those
        self.absmax = nn.Parameter(absmax, requires_grad=False)

    @property
    def weight(self):
        """W0 as the products have it, (m, n), made anew.  Without codes this fails, and nn.Module
        looks for a parameter of the name: while the layer is made, that of nn.Linear."""
        return dequantize(self.codes, self.absmax, self.shape)

    def frozen(self, rows):
        return FrozenProduct.apply(rows, self.bias, self.codes, self.absmax, self.shape)

"""What no method of this kind can save: two rows of benchmark.py, in the form of methods.py.

`floor` is the forward pass, and the backward pass through the frozen model that brings each linear
layer the gradient of its output.  `matmuls` are the matrix products of that step alone.  Neither
has an adapter, an optimizer or a weight that is trained.  A first step records the products, so the
peak memory of `matmuls` is that of a whole step too.
"""

from unittest import mock

import torch
import torch.nn.functional as F

from train_glue import Method


def frozen(args, model, auxiliary):
    """Set up no adapter.  As with one, what a linear layer returns needs a gradient."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda linear, inputs, output: output.requires_grad_())
    return [], None, None


def floor(run, closure):
    """Forward and backward."""
    return {"loss": closure()}


def matmuls(run, closure):
    """x W^T of each product of the forward pass; then dy W of each whose x needs a gradient."""
    if "products" not in run.state:
        run.state["products"] = products(closure)
    for x, W, _, _ in run.state["products"]:
        x @ W.t()
    for _, W, dy, needed in reversed(run.state["products"]):
        if needed:
            dy @ W
    return {"loss": 0.0}


def products(closure):
    """[(x, W, dy, whether x needs a gradient)] of the forward pass's linear layers, a tied head
    among them: x (rows, n), W (m, n), dy (rows, m), which is noise, all in the product's dtype."""
    found, linear = [], F.linear

    def noted(x, W, *bias):
        y = linear(x, W, *bias)
        rows = x.detach().reshape(-1, x.shape[-1]).to(y.dtype)
        dy = torch.randn_like(y.detach()).reshape(len(rows), -1)
        found.append((rows, W.detach().to(y.dtype), dy, x.requires_grad))
        return y

    with mock.patch.object(F, "linear", noted):
        closure()
    return found


FLOORS = {"floor": Method(floor, setup=frozen), "matmuls": Method(matmuls, setup=frozen)}

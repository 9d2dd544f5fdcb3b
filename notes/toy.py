"""Three methods on one weight of 2 x 2: six steps of each, as arrows on the contours of a loss; and
three ascents at a fixed gradient, the example G = diag(4, 3) of note 5.

    python notes/toy.py    # writes toy.png"""

from functools import partial

import torch
from matplotlib.figure import Figure
from torch.optim import SGD, AdamW

from methods import bilora_power_step  # methods adds the folder of bilora to the path
from bilora import (add_lora, auxiliary_parameters, bilora_step, lora_sam_step, lora_step,
                    primary_parameters)

CURVATURE, G = torch.tensor([[4.0, 1.0], [1.0, 0.5]]), torch.diag(torch.tensor([4.0, 3.0]))

def one_weight(loss, aux_rank):
    """(a model of one adapted W, (2, 2), with s = 1; its layer; a closure; the W of its calls)."""
    torch.manual_seed(0)
    model, seen = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False)), []
    (layer,) = add_lora(model, rank=1, alpha=1, aux_rank=aux_rank)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-1.0, 0.0], [0.0, -2.0]]))
        layer.lora_B.copy_(torch.tensor([[0.3], [0.9]]))
        layer.lora_A.copy_(torch.tensor([[0.5, 0.4]]))
    def closure():
        W = layer(torch.eye(2)).t()  # at x = 1 the output is W
        seen.append(W.detach())
        value = loss(W)
        value.backward()
        return value
    return model, layer, closure, seen

def walk(method, rho=0.3, steps=6):
    """[(W before a step, where its last gradient was taken, W after it)]."""
    model, layer, closure, seen = one_weight(lambda W: (CURVATURE * W.square()).sum() / 2,
                                             aux_rank=int(method == "Bi-LoRA"))
    descent, found = SGD(primary_parameters(model), lr=0.15), []
    ascent = partial(SGD, auxiliary_parameters(model), lr=1.0, maximize=True)
    step = {"LoRA": lambda: lora_step(descent, closure),
            "LoRA-SAM": lambda: lora_sam_step(descent, closure, rho),
            "Bi-LoRA": lambda: bilora_step(descent, ascent(), closure, [layer], rho)}[method]
    for _ in range(steps):
        before, _ = layer.merged_weight().detach(), step()
        found.append((before, seen[-1], layer.merged_weight().detach()))
    return found

def gains(optimizer, steps=250):
    """[<G, B2 A2>] after each step of an ascent, r2 = 2 and rho = 1; no optimizer: power rule."""
    model, layer, closure, _ = one_weight(lambda W: (G * W).sum(), aux_rank=2)
    descent, found = SGD(primary_parameters(model), lr=0.0), []
    step = partial(bilora_power_step, descent, closure, [layer], 1.0)
    if optimizer:
        ascent = optimizer(auxiliary_parameters(model), lr=0.05, maximize=True, weight_decay=0)
        step = partial(bilora_step, descent, ascent, closure, [layer], 1.0)
    for _ in range(steps):
        step()
        found.append((G * layer.aux_delta()).sum().item())
    return found

def draw(path):
    figure = Figure(figsize=(15, 3.8), layout="constrained")
    *panels, last = figure.subplots(1, 4)
    x, y = torch.meshgrid(torch.linspace(-1.2, 0.6, 80), torch.linspace(-2.2, 0, 80), indexing="xy")
    for axis, method in zip(panels, ("LoRA", "LoRA-SAM", "Bi-LoRA")):
        axis.contour(x, y, CURVATURE[0, 0] * x**2 + CURVATURE[1, 1] * y**2, 15, colors="lightgrey")
        for before, perturbed, after in walk(method):
            for end, colour in ((perturbed, "C3"), (after, "black")):
                arrow = {"arrowstyle": "->", "color": colour}
                axis.annotate("", end.diag().tolist(), before.diag().tolist(), arrowprops=arrow)
        axis.set(title=method, xlabel="W11: steep", ylabel="W22: flat")
    for name, optimizer in (("plain", SGD), ("AdamW", AdamW), ("power rule", None)):
        last.plot(gains(optimizer), label=name)
    last.set(title="G = diag(4, 3), rho = 1", xlabel="step", ylabel="<G, B2 A2>", yticks=range(6))
    last.legend(loc="lower right")
    figure.savefig(path, format="png", dpi=80)

if __name__ == "__main__":
    draw("toy.png")

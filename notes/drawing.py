"""The drawing in README: the weight of an adapted layer, and one step of the three methods.

    python notes/drawing.py                     # writes notes/figures/method.png
"""

import os
import sys

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

FROZEN, PRIMARY, AUXILIARY, STEP = "#d9d9d9", "#9ecae1", "#fdae6b", "#f0f0f0"
STEPS = {  # method: what one step does, from left to right; the colour is that of what it changes
    "LoRA": [("forward,\nbackward: g", STEP), ("B1, A1 descend\nalong g", PRIMARY)],
    "LoRA-SAM": [("forward,\nbackward: g", STEP), ("B1, A1 move up:\n+ ρ g / ‖g‖", PRIMARY),
                 ("forward,\nbackward: g′", STEP), ("B1, A1 move\nback", PRIMARY),
                 ("B1, A1 descend\nalong g′", PRIMARY)],
    "Bi-LoRA": [("forward,\nbackward: g", STEP), ("B1, A1 descend\nalong g", PRIMARY),
                ("B2, A2 ascend\nalong g", AUXILIARY), ("B2, A2 clipped\nto c ≤ ρ", AUXILIARY)]}


def box(axis, x, y, width, height, colour, text, size=9):
    axis.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="black",
                             linewidth=0.8))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def draw_weight(axis):
    """W = W0 + s B1 A1 + s B2 A2, each matrix in its shape."""
    axis.text(0, 1.5, "W  =", va="center", fontsize=12)
    box(axis, 0.9, 0.5, 2, 2, FROZEN, "W0\nfrozen")
    pairs = ((3.9, PRIMARY, "1", "kept"), (7.9, AUXILIARY, "2", "training only"))
    for x, colour, pair, note in pairs:
        axis.text(x - 0.5, 1.5, "+ s", ha="center", va="center", fontsize=12)
        box(axis, x, 0.5, 0.5, 2, colour, f"B{pair}")
        box(axis, x + 0.7, 1.5, 2, 0.5, colour, f"A{pair}")
        axis.text(x + 1.4, 0.15, note, ha="center", va="center", fontsize=9)
    axis.set(xlim=(-0.2, 11), ylim=(-0.1, 2.7))


def draw_steps(axis):
    for row, (method, steps) in enumerate(STEPS.items()):
        y = 2.6 - 1.2 * row
        axis.text(0, y + 0.35, method, va="center", fontsize=11)
        for i, (text, colour) in enumerate(steps):
            x = 1.5 + 1.9 * i
            box(axis, x, y, 1.6, 0.7, colour, text, 8)
            if i:
                axis.add_patch(FancyArrowPatch((x - 0.3, y + 0.35), (x, y + 0.35), arrowstyle="->",
                                               mutation_scale=9))
    axis.set(xlim=(-0.2, 11), ylim=(0, 3.5))


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    here = os.path.dirname(os.path.abspath(__file__))
    path = arguments[0] if arguments else os.path.join(here, "figures", "method.png")
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 1.3))
    draw_weight(top)
    draw_steps(bottom)
    for axis in (top, bottom):
        axis.set_axis_off()
    figure.savefig(path + ".tmp", format="png", dpi=110)
    os.replace(path + ".tmp", path)


if __name__ == "__main__":
    main()

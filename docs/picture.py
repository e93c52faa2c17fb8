"""Draws docs/how_it_works.png: a real choice of `lighthouse.select` on a short sequence.

python docs/picture.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

import lighthouse

TOKENS, RATIOS, PARENTS = 128, (1 / 4, 1 / 16), 3
COLORS = ("tab:orange", "tab:blue", "tab:green")


def main() -> None:
    generator = torch.Generator().manual_seed(3)
    key = torch.rand(1, 1, TOKENS, 8, generator=generator)
    key[:, :, 41:45] *= 3  # two places that matter
    key[:, :, 96:100] *= 4
    selection = lighthouse.select(key, key, pool_ratios=RATIOS, select_topk=PARENTS)
    entries = selection.entries(0, 0)

    figure, axis = plt.subplots(figsize=(11, 3.6), constrained_layout=True)
    for level, window in enumerate(selection.windows):
        for index in range(TOKENS // window):
            chosen = (level, index) in entries
            box = Rectangle(
                (index * window, level + 1.2),
                window,
                0.7,
                facecolor=COLORS[level] if chosen else "0.93",
                edgecolor="white",
                linewidth=0.8,
            )
            axis.add_patch(box)
        name = "tokens" if level == 0 else f"means of {window}"
        axis.text(-1.5, level + 1.55, name, ha="right", va="center", fontsize=9)
    for place, (level, _) in enumerate(entries):
        axis.add_patch(Rectangle((place, 0.0), 1, 0.7, facecolor=COLORS[level], edgecolor="white", linewidth=0.8))
    axis.text(-1.5, 0.35, "sub-sequence", ha="right", va="center", fontsize=9)
    note = f"{len(entries)} entries for {TOKENS} tokens, in causal order: stock causal attention runs on these"
    axis.text(len(entries) + 1.5, 0.35, note, va="center", fontsize=9)
    axis.set(xlim=(-16, TOKENS + 1), ylim=(-0.15, len(selection.windows) + 1.2))
    axis.axis("off")
    axis.set_title(
        "Coloured entries are chosen: all of the coarsest level, and the children of the largest", fontsize=10
    )
    path = Path(__file__).with_name("how_it_works.png")
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()

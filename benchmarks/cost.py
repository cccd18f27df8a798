"""What a response costs as batch, population, generations, classes, width and repertoire grow, with fitted slopes.

python benchmarks/cost.py --json results/cost.json
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import common
from common import Row
from immunonet import RAILS, Maturation

BASE: dict[str, int] = {"B": 16, "T": 400, "G": 6, "C": 10, "D": 256, "N": 2000}
GRID: dict[str, tuple[int, ...]] = {
    "B": (4, 16, 64),
    "T": (200, 800, 3200),
    "G": (3, 9, 27),
    "C": (4, 10, 40),
    "D": (128, 512, 2048),
    "N": (2000, 8000, 32000),
}
MEANING = {"B": "antigens", "T": "cells", "G": "generations", "C": "classes", "D": "feature width", "N": "repertoire"}


def problem(classes: int, width: int, n: int, values: int = 64) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network whose layer "1" (after a ReLU, so not affine) is `width` wide, and labelled inputs."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Linear(values, width), nn.ReLU()), nn.Linear(width, classes)).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=1 / math.sqrt(values), generator=generator)
    y = torch.arange(n) % classes
    centre = torch.rand(classes, values, generator=generator)
    x = (centre[y] + 0.2 * torch.randn(n, values, generator=generator)).clamp(0, 1)
    return net, x, y


def once(repeats: int, size: dict[str, int]) -> float:
    """Return the seconds of one call at these sizes, with neither early stop nor pruning."""
    net, x, y = problem(size["C"], size["D"], size["N"])
    maturation = Maturation(population=size["T"], generations=size["G"], early_stop=None, prune=None)
    rails = RAILS(net, "0", maturation=maturation, seed=0).fit(x, y)
    # Mixed so that every class is among them.
    queries = x[: size["B"]].lerp(x[-size["B"] :], 0.3)
    rails.predict(queries, batch_size=size["B"])
    return common.seconds(lambda: rails.predict(queries, batch_size=size["B"]), repeats)[0]


def slope(x: list[float], y: list[float]) -> float:
    """Return the slope of log y over log x by least squares."""
    u, v = torch.tensor(x).log(), torch.tensor(y).log()
    u, v = u - u.mean(), v - v.mean()
    return float((u * v).sum() / (u * u).sum())


def growth(options: argparse.Namespace) -> list[Row]:
    """Return seconds per value of each size, the others at their base."""
    rows: list[Row] = []
    for name, grid in GRID.items():
        sizes = [max(1, round(value * options.scale)) if name in "BTN" else value for value in grid]
        sizes = [max(size, 40 * BASE["C"]) if name == "N" else size for size in sizes]
        taken = [once(options.repeats, BASE | {name: size}) for size in sizes]
        rows.append(
            {
                "size": f"{name} ({MEANING[name]})",
                "values": ", ".join(map(str, sizes)),
                "seconds": ", ".join(f"{t:.3g}" for t in taken),
                "slope": slope(sizes, taken) if len(set(sizes)) > 1 else 0.0,
            }
        )
    return rows


def classes(options: argparse.Namespace) -> list[Row]:
    """Return the cost of a problem of many classes, with all of them evolving and with only the nearest."""
    count = options.classes
    net, x, y = problem(count, BASE["D"], 30 * count)
    queries = x[:2].lerp(x[-2:], 0.3)
    cells = 10 * count
    rails = RAILS(net, "0", maturation=Maturation(generations=0), seed=0).fit(x, y, calibration=(x[:20], y[:20]))
    rails.predict(queries[:1])  # compiles what is compiled
    rows: list[Row] = []
    for candidates in (max(1, count // 20), None):
        rails.maturations = (Maturation(population=cells, early_stop=None, prune=None, candidates=candidates),)
        taken, _ = common.seconds(lambda: rails.predict(queries), 1)
        rows.append(
            {"classes": count, "T": cells, "candidates": str(candidates), "seconds_per_image": taken / len(queries)}
        )
    return rows


def main() -> None:
    """Run the parts that are asked for."""
    p = common.parser(__doc__)
    p.add_argument("--scale", type=float, default=1.0, help="factor on B, T and N")
    p.add_argument("--classes", type=int, default=1000)
    options = p.parse_args()
    common.use_threads(options.threads)
    common.run(options, {"growth": lambda: growth(options), "classes": lambda: classes(options)})


if __name__ == "__main__":
    main()

"""immunonet's engine against the plain loop, what its shortcuts change, latency, and where the time goes.

python benchmarks/engine.py --data DIR --json results/engine.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import common
from common import Row, Setting
from immunonet import RAILS, DkNN, Maturation, zoo
from immunonet.immune import backend, operators
from loop import Loop


def settings(options: argparse.Namespace) -> dict[str, Maturation]:
    """Return the settings that are compared, all but the first with generations; the last are the loop's own."""
    sizes: dict[str, Any] = {"population": options.population, "generations": options.generations}
    return {
        "default, no generation": Maturation(population=options.population),
        "early stop, pruning": Maturation(**sizes),
        "early stop, pruning, no alignment": Maturation(alignment=0.0, **sizes),
        "early_stop=None, prune=None": Maturation(early_stop=None, prune=None, **sizes),
        "authors' settings, as the loop": Maturation.authors("mnist", **sizes),
    }


def fitted(setting: Setting, layer: str, maturation: Maturation, seed: int) -> RAILS:
    """Return RAILS at a layer of the network, "affine" or a submodule's name."""
    where = zoo.mnist_affine(setting.net) if layer == "affine" else layer
    return RAILS(setting.net, where, maturation=maturation, seed=seed).fit(setting.x, setting.y)


def against_loop(setting: Setting, layer: str, options: argparse.Namespace) -> list[Row]:
    """Return seconds per image and accuracy of the loop and of RAILS, half of the images clean and half attacked."""
    n = options.timed_images // (1 if layer == "affine" else 8) or 1
    rows = [*ours(setting, layer, n, options), dknn(setting, layer, n, options)]
    model = zoo.mnist_affine(setting.net) if layer == "affine" else up_to_pool1(setting.net)
    loop = Loop(
        lambda c: model(c).flatten(1),
        setting.x,
        setting.y,
        population=options.population,
        generations=options.generations,
        seed=options.seed,
    )
    m = options.loop_images
    times, found = [], []
    for antigen in torch.cat([setting.clean[:m], setting.attacked[:m]]):
        start = time.perf_counter()
        found.append(loop.predict(antigen))
        times.append(time.perf_counter() - start)
    peer = {
        "what": "the loop",
        "seconds_per_image": statistics.median(times),
        **accuracies(torch.tensor(found), setting.labels[:m]),
        "share_in_feature_map": loop.seconds["feature map"] / sum(loop.seconds.values()),
    }
    return [peer, *(row | {"ratio_to_loop": peer["seconds_per_image"] / row["seconds_per_image"]} for row in rows)]


def ours(setting: Setting, layer: str, n: int, options: argparse.Namespace) -> list[Row]:
    """Return the figures of RAILS on n clean and n attacked images."""
    rows: list[Row] = []
    x = torch.cat([setting.clean[:n], setting.attacked[:n]])
    rails = fitted(setting, layer, Maturation(), options.seed)
    for name, maturation in settings(options).items():
        rails.maturations = (maturation,)  # nothing of the repertoire depends on it
        if not rows:
            rails.predict(x[:1])
        taken, found = common.seconds(lambda: rails.predict(x), options.repeats)
        shortcuts = {"early_stop": str(maturation.early_stop), "prune": str(maturation.prune)}
        figures = {"seconds_per_image": taken / len(x)} | accuracies(found, setting.labels[:n])
        rows.append({"what": name} | shortcuts | figures)
    return rows


def dknn(setting: Setting, layer: str, n: int, options: argparse.Namespace) -> Row:
    """Return the figures of DkNN on n clean and n attacked images."""
    where = zoo.mnist_affine(setting.net) if layer == "affine" else layer
    peer = DkNN(setting.net, where).fit(setting.x, setting.y)
    x = torch.cat([setting.clean[:n], setting.attacked[:n]])
    taken, found = common.seconds(lambda: peer.predict(x), options.repeats)
    return {"what": "DkNN", "seconds_per_image": taken / len(x)} | accuracies(found, setting.labels[:n])


def up_to_pool1(net: zoo.MnistNet) -> Callable[[Tensor], Tensor]:
    """Return the first block of the network: conv, ReLU, conv, ReLU, pool."""
    return torch.nn.Sequential(net.conv1, torch.nn.ReLU(), net.conv2, torch.nn.ReLU(), net.pool1)


def accuracies(found: Tensor, labels: Tensor) -> Row:
    """Return the accuracy on the clean half and on the attacked half."""
    right = (found == torch.cat([labels, labels])).float()
    clean, attacked = right.chunk(2)
    return {"images": len(right), "clean": clean.mean().item(), "pgd": attacked.mean().item()}


def agreement(setting: Setting, options: argparse.Namespace) -> list[Row]:
    """Return how many labels each shortcut changes, against the engine with all of them off, at equal seeds.

    The noise floor is the reference at another seed; the torch path is compared on a tenth of the images.
    """
    n = options.images
    sizes: dict[str, Any] = {"population": options.population, "generations": options.generations}
    off: dict[str, Any] = {"early_stop": None, "prune": None}
    variants: dict[str, tuple[dict[str, Any], int]] = {
        "early_stop=None, prune=None (the reference)": (off, options.seed),
        "the reference, another seed": (off, options.seed + 1),
        "early_stop=2": ({"early_stop": 2, "prune": None}, options.seed),
        "early_stop=1": ({"early_stop": 1, "prune": None}, options.seed),
        "early_stop=2, prune=.05": ({"early_stop": 2, "prune": 0.05}, options.seed),
        "early_stop=2, prune=.1": ({"early_stop": 2, "prune": 0.1}, options.seed),
        "early_stop=2, prune=.2": ({"early_stop": 2, "prune": 0.2}, options.seed),
    }
    rails = fitted(setting, "affine", Maturation(**sizes), options.seed)
    x = torch.cat([setting.clean[:n], setting.attacked[:n]])
    reference = torch.empty(0)
    rows: list[Row] = []

    def compare(name: str, seconds: float, found: Tensor, reference: Tensor, labels: Tensor) -> None:
        clean, attacked = (part != other for part, other in zip(found.chunk(2), reference.chunk(2), strict=True))
        different = int(clean.sum() + attacked.sum())
        rows.append(
            {"settings": name, "discordant_clean": int(clean.sum()), "discordant_pgd": int(attacked.sum())}
            | {"agreement": 1 - different / len(found)}
            | accuracies(found, labels)
            | {"seconds_per_image": seconds / len(found)}
        )

    for name, (shortcuts, seed) in variants.items():
        rails.maturations = (Maturation(**sizes, **shortcuts),)
        taken, found = common.seconds(lambda seed=seed: rails.predict(x, seed=seed), 1)
        reference = found if not rows else reference
        compare(name, taken, found, reference, setting.labels[:n])
    m = max(1, n // 10)
    x, some = (torch.cat([part[:m], part[n : n + m]]) for part in (x, reference))
    rails.maturations = (Maturation(**sizes, **off),)
    with patch.object(backend, "_numba", lambda: None):
        taken, found = common.seconds(lambda: rails.predict(x, seed=options.seed), 1)
    compare("the reference by torch operators and the root, a tenth", taken, found, some, setting.labels[:m])
    return rows


def latency(setting: Setting, options: argparse.Namespace) -> list[Row]:
    """Return seconds per image at several batch sizes; at batch 1 the median and the 95th percentile."""
    rails = fitted(
        setting, "affine", Maturation(population=options.population, generations=options.generations), options.seed
    )
    n = options.timed_images
    x = torch.stack([setting.clean[:n], setting.attacked[:n]], 1).flatten(0, 1)
    rails.predict(x[:2])
    times = []
    for antigen in x[:60]:
        start = time.perf_counter()
        rails.predict(antigen[None])
        times.append(time.perf_counter() - start)
    times.sort()
    rows: list[Row] = [
        {"batch": 1, "seconds_per_image": statistics.median(times), "p95": times[int(0.95 * len(times))]}
    ]
    for batch in (8, 21, 64, 256):
        taken, _ = common.seconds(lambda batch=batch: rails.predict(x, batch_size=batch), options.repeats)
        rows.append({"batch": batch, "seconds_per_image": taken / len(x)})
    return rows


@contextmanager
def stages(rails: RAILS) -> Iterator[dict[str, float]]:
    """Yield the seconds that the stages of `rails` take inside the block."""
    found: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = function(*args, **kwargs)
            found[name] += time.perf_counter() - start
            return out

        return run

    with ExitStack() as stack:
        where, index = rails.feature_maps[0], rails.index(0)
        chosen = backend.offspring_for
        for owner, name, new in (
            (where, "distances", timed("feature map and distances", where.distances)),
            (where, "chunked", timed("features of the antigens", where.chunked)),
            (index, "nearest", timed("flocking", index.nearest)),
            (backend, "offspring_for", lambda cells: timed("crossover and mutation", chosen(cells))),
            (operators, "select", timed("selection", operators.select)),
        ):
            stack.enter_context(patch.object(owner, name, new))
        yield found


def profile(setting: Setting, options: argparse.Namespace) -> list[Row]:
    """Return the share of time per stage."""
    rows: list[Row] = []
    for layer in ("affine", "pool1"):
        for name, maturation in list(settings(options).items())[:-1]:
            rails = fitted(setting, layer, maturation, options.seed)
            n = options.timed_images // (1 if layer == "affine" else 8) or 1
            x = torch.cat([setting.clean[:n], setting.attacked[:n]])
            rails.predict(x[:2])
            with stages(rails) as found:
                start = time.perf_counter()
                rails.predict(x)
                total = time.perf_counter() - start
            shares = {stage: seconds / total for stage, seconds in found.items()}
            rows.append(
                {"layer": layer, "settings": name, "seconds_per_image": total / len(x)}
                | shares
                | {"rest": 1 - sum(shares.values())}
            )
    return rows


def rates(options: argparse.Namespace) -> list[Row]:
    """Return the rates that floors are reckoned with: of a matrix product, and of a copy."""
    a, big = torch.rand(2048, 2048), torch.rand(2**25)
    out, target = torch.empty_like(a), torch.empty_like(big)
    product = min(common.seconds(lambda: torch.mm(a, a, out=out), 1)[0] for _ in range(3 * options.repeats))
    copy = min(common.seconds(lambda: target.copy_(big), 1)[0] for _ in range(3 * options.repeats))
    return [{"matrix_product_FLOPS": 2 * 2048**3 / product, "copy_bytes_per_second": 2 * big.nbytes / copy}]


def main() -> None:
    """Run the parts that are asked for."""
    p = common.parser(__doc__)
    p.add_argument("--examples", type=int, default=20_000, help="training examples in the repertoire")
    p.add_argument("--population", type=int, default=1000)
    p.add_argument("--generations", type=int, default=10)
    p.add_argument("--images", type=int, default=500, help="clean and attacked images each, for the agreement")
    p.add_argument("--timed-images", type=int, default=100, help="clean and attacked images each, for timing")
    p.add_argument("--loop-images", type=int, default=5, help="the same for the loop, which takes about 20 s for one")
    options = p.parse_args()
    common.use_threads(options.threads)
    setting = common.mnist(options, options.examples, max(options.images, options.timed_images, options.loop_images))
    jobs: dict[str, Callable[[], list[Row]]] = {
        "affine": lambda: against_loop(setting, "affine", options),
        "block1": lambda: against_loop(setting, "pool1", options),
        "agreement": lambda: agreement(setting, options),
        "latency": lambda: latency(setting, options),
        "profile": lambda: profile(setting, options),
        "rates": lambda: rates(options),
    }
    common.run(options, jobs)


if __name__ == "__main__":
    main()

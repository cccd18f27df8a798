"""RAILS in the layers of a VGG16 on a GPU: time per answer, share of the GPU's peak, and the plain loop beside it.

Cells in block 2, affinity in blocks 3 and 4, as in the published experiments on CIFAR-10. Without a GPU it runs on the
CPU, in small: --device cpu --examples 200 --images 4 --loop-images 1 --epochs 1 --population 100 --generations 2.

python benchmarks/gpu.py --data DIR --json results/gpu.json
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import common
from common import Row
from immunonet import RAILS, DkNN, Maturation, data, zoo
from immunonet._seeds import seeded
from immunonet.attacks import PGD
from loop import Loop

# Dense products per second that the makers state, by a part of the name and whether products are in bfloat16.
PEAKS = {"H100": (494.7e12, 989.4e12), "H200": (494.7e12, 989.4e12), "A100": (156e12, 312e12)}
WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
EPS, STEP = 8 / 255, 2 / 255


def vgg16(classes: int = 10, *, seed: int = 0) -> nn.Sequential:
    """Return the VGG16 of CIFAR-10, `block1` to `block5` and `fc`: (B, 3, 32, 32) to (B, classes)."""
    with seeded(seed):
        net, inner = nn.Sequential(), 3
        for i, block in enumerate(WIDTHS, 1):
            layers: list[nn.Module] = []
            for width in block:
                layers += [nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                inner = width
            net.add_module(f"block{i}", nn.Sequential(*layers, nn.MaxPool2d(2)))
        net.add_module("fc", nn.Sequential(nn.Flatten(), nn.Linear(inner, classes)))
    return net.eval()


class Scene:
    """The images and the network, on the device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        # Whether products are in bfloat16, which a processor may have to imitate.
        self.precisions = (False, True) if self.device.type == "cuda" else (False,)
        test = data.load("cifar10", "test", directory=options.data)
        train = data.load("cifar10", "train", directory=options.data)
        places, held = data.split(len(train), 3000)
        self.train, self.validation, self.test = (
            train[places[: options.examples]],
            train[held[: options.examples]],
            test,
        )
        self.net = vgg16().to(self.device)
        if options.weights.with_suffix(".json").exists():
            zoo.load_weights(self.net, options.weights)

    def images(self) -> tuple[Tensor, Tensor]:
        """Return the first test images and their labels."""
        n = self.options.images
        return self.test.x[:n].to(self.device), self.test.y[:n].to(self.device)

    def rails(self, **settings: Any) -> RAILS:
        """Return RAILS with cells in block 2."""
        found = RAILS(self.net, ["block3", "block4"], space="block2", seed=self.options.seed, **settings)
        return found.fit(self.train.x, self.train.y)


def trained(scene: Scene) -> list[Row]:
    """Return the epochs of a VGG16 that is lightly hardened, and keep its weights."""
    options = scene.options
    against = zoo.Adversarial(eps=options.harden, step=options.harden / 2, iterations=2, ramp=2, validation_eps=EPS)
    scene.net = vgg16(seed=options.seed).to(scene.device)
    history = zoo.train(
        scene.net, scene.train, scene.validation, epochs=options.epochs, batch_size=256, lr=2e-3, weight_decay=0.05,
        seed=options.seed, augment=True, bfloat16=scene.device.type == "cuda",
                adversarial=against,
    )  # fmt: skip
    recipe = {"model": "benchmarks/gpu.py vgg16", "adversarial": against.told(), "history": history}
    zoo.save_weights(scene.net, options.weights, recipe=recipe)
    return [dict(row) for row in history]


def timed(scene: Scene, run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of one run, what was queued on the device included, and what it gave."""

    def once() -> Any:
        found = run()
        if scene.device.type == "cuda":
            torch.cuda.synchronize()
        return found

    return common.seconds(once, 1)


def cast(scene: Scene, low: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which products are in bfloat16, if they are to be."""
    return torch.autocast(scene.device.type, torch.bfloat16, enabled=low)


def respond(scene: Scene) -> list[Row]:
    """Return time per answer, share of peak, and accuracy on clean images and under PGD on the network."""
    x, y = scene.images()
    attacked = PGD(eps=EPS, step=STEP, iterations=10)(scene.net, x, y).adversarials
    name = torch.cuda.get_device_name() if scene.device.type == "cuda" else "CPU"
    with torch.no_grad():
        right = [(scene.net(part).argmax(1) == y).double().mean().item() for part in (x, attacked)]
    rows: list[Row] = [{"what": "the network", "device": name, "clean": right[0], "pgd": right[1], "images": len(x)}]
    sizes: dict[str, Any] = {"population": scene.options.population, "generations": scene.options.generations}
    settings = {
        "early stop, pruning": Maturation(**sizes),
        "no early stop, no pruning": Maturation(early_stop=None, prune=None, **sizes),
    }
    rails = scene.rails()
    for low in scene.precisions:
        for called, maturation in settings.items():
            rails.maturations = (maturation, maturation)
            n = len(x) if called == "early stop, pruning" else max(1, len(x) // 20)
            with cast(scene, low):
                rails.predict(x[: min(n, 256)])
                taken, found = timed(scene, lambda n=n: rails.predict(x[:n]))
                hit = (found == y[:n]).double().mean().item()
                under = (rails.predict(attacked[:n]) == y[:n]).double().mean().item()
                few = min(n, 256)
                own, _ = timed(scene, lambda few=few: rails.predict(x[:few]))
                with FlopCounterMode(display=False) as counter:
                    rails.predict(x[:few])
            rate = counter.get_total_flops() / own
            peak = next((both[low] for part, both in PEAKS.items() if part in name), None)
            rows.append({
                "what": f"RAILS, {called}", "products": "bfloat16" if low else "float32 (TF32)", "images": n,
                "ms_per_image": 1e3 * taken / n, "seconds_for_10000": 1e4 * taken / n,
                "Tflop_per_image": counter.get_total_flops() / few / 1e12, "Tflop_per_second": rate / 1e12,
                "share_of_peak": None if peak is None else rate / peak, "clean": hit, "pgd": under,
            })  # fmt: skip
    dknn = DkNN(scene.net, ["block3", "block4"]).fit(scene.train.x, scene.train.y)
    taken, found = timed(scene, lambda: dknn.predict(x))
    rows.append({
        "what": "DkNN", "images": len(x), "ms_per_image": 1e3 * taken / len(x),
        "clean": (found == y).double().mean().item(),
        "pgd": (dknn.predict(attacked) == y).double().mean().item(),
    })  # fmt: skip
    return rows


@torch.no_grad()
def against_loop(scene: Scene) -> list[Row]:
    """Return the plain loop and RAILS with the loop's settings, both on the same device and images."""
    m, net = scene.options.loop_images, scene.net
    sizes: dict[str, Any] = {"population": scene.options.population, "generations": scene.options.generations}
    x, _ = scene.images()
    before = nn.Sequential(net.block1, net.block2)
    cells = torch.cat([before(part.to(scene.device)) for part in scene.train.x.split(500)])
    loop = Loop(
        lambda c: torch.cat([(deep := net.block3(c)).flatten(1), net.block4(deep).flatten(1)], 1),
        cells, scene.train.y.to(scene.device), bounds=(float(cells.min()), float(cells.max())),
        seed=scene.options.seed, **sizes,
    )  # fmt: skip
    loop.predict(before(x[:1])[0])
    times = []
    for antigen in before(x[:m]):
        start = time.perf_counter()
        loop.predict(antigen)
        times.append(time.perf_counter() - start)
    peer = statistics.median(times)
    rails = scene.rails(maturation=Maturation.authors("cifar10", **sizes))
    rows: list[Row] = [{"what": "the loop", "images": m, "seconds_per_image": peer}]
    for low in scene.precisions:
        with cast(scene, low):
            rails.predict(x[:64])
            taken, _ = timed(scene, lambda: rails.predict(x[:256]))
        seconds = taken / len(x[:256])
        rows.append({
            "what": "RAILS, the authors' settings", "products": "bfloat16" if low else "float32 (TF32)",
            "images": len(x[:256]), "seconds_per_image": seconds, "ratio_to_loop": peer / seconds,
        })  # fmt: skip
    return rows


def main() -> None:
    p = common.parser(__doc__)
    p.set_defaults(weights=Path("benchmarks/out/vgg16.safetensors"))
    p.add_argument("--device", default="cuda")
    p.add_argument("--images", type=int, default=2000)
    p.add_argument("--examples", type=int, default=47_000)
    p.add_argument("--loop-images", type=int, default=4)
    p.add_argument("--population", type=int, default=1000)
    p.add_argument("--generations", type=int, default=10)
    p.add_argument("--epochs", type=int, default=20)
    p.add_argument("--harden", type=float, default=2 / 255, help="radius that the network is trained against")
    options = p.parse_args()
    common.use_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    scene = Scene(options)
    common.run(options, {
        "trained": lambda: trained(scene),
        "respond": lambda: respond(scene),
        "against_loop": lambda: against_loop(scene),
    })  # fmt: skip


if __name__ == "__main__":
    main()

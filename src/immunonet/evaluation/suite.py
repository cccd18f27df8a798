"""Which attacks a protocol runs on which defence, and what they cost."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from immunonet import _check, attacks, models
from immunonet.attacks import NORMS, Noise
from immunonet.defences.dknn import DkNN
from immunonet.defences.neighbours import NeighbourDefence
from immunonet.defences.rails import RAILS
from immunonet.evaluation.asking import LogProbabilities, Subject, light_twin

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a protocol spends.

    `images`: how many the command takes unless told. `iterations` of APGD, with `restarts`; `black_box` images for
    attacks that only ask, with `queries` (Square, each `averaged` over draws of a randomised defence), `decisions`
    and `evaluations` (HopSkipJump) and `noise` draws; `draws` of EOT, one attack each, on `checks` images, which are
    also those of a sanity check. `row_seeds`: draws of a randomised defence that every candidate is looked at on, and
    as many others for its row; `seeds`: draws on which an image's `finalists` are compared, and as many others for the
    worst case. `targets`: labels that a targeted attack tries, the likeliest; `ablations`: whether to run them.
    """

    images: int
    iterations: int
    restarts: int
    black_box: int
    queries: int
    averaged: int
    decisions: int
    evaluations: int
    noise: int
    draws: tuple[int, ...]
    row_seeds: int
    seeds: int
    finalists: int
    checks: int
    targets: int
    ablations: bool


PROTOCOLS: Mapping[str, Budget] = {
    "quick": Budget(
        images=100, iterations=20, restarts=1, black_box=20, queries=200, averaged=2, decisions=5, evaluations=20,
        noise=20, draws=(), row_seeds=3, seeds=10, finalists=2, checks=25, targets=0, ablations=False,
    ),
    "standard": Budget(
        images=500, iterations=50, restarts=1, black_box=50, queries=1000, averaged=5, decisions=15, evaluations=100,
        noise=200, draws=(5,), row_seeds=5, seeds=20, finalists=3, checks=100, targets=3, ablations=True,
    ),
    "full": Budget(
        images=1000, iterations=100, restarts=5, black_box=1000, queries=5000, averaged=20, decisions=40,
        evaluations=100, noise=10_000, draws=(1, 5, 20, 50), row_seeds=20, seeds=20, finalists=3, checks=100,
        targets=9, ablations=True,
    ),
}  # fmt: skip


class Found(NamedTuple):
    """Candidates `(B, *S)`, loss curves `(steps, B)`, and how many candidates left the ball or the bounds.

    Those are replaced by the inputs.
    """

    adversarials: Tensor
    losses: Tensor
    outside: int


@dataclass(frozen=True, kw_only=True)
class Planned:
    """An attack to be run: its name, what the attacker differentiates or queries (`knows`), how, on what, and where.

    `method` None leaves inputs as they are; what breaks the bounds, or the ball of a method that has one (its `eps` is
    not None), is replaced. `n`: it takes the first so many images; with `standing` only those of them on which the
    defence has not failed in every selection draw already. `kind`: "none", "transfer", "adaptive" or "black box".
    """

    name: str
    knows: str
    kind: str
    n: int
    method: Any = None
    target: Model | None = None

    @property
    def standing(self) -> bool:
        """Whether images that are broken already are passed over."""
        return self.kind == "black box"

    def __call__(self, x: Tensor, y: Tensor) -> Found:
        """Attack inputs `x` `(B, *S)` with labels `y` `(B,)`; the same call gives the same result."""
        if self.method is None:
            return Found(x, x.new_zeros(1, len(x)), 0)
        for module in self.target.modules() if isinstance(self.target, nn.Module) else ():
            if isinstance(module, Subject):
                module.rewind()
        result = self.method(self.target, x, y)
        found = result.adversarials.detach()
        low, high = self.method.bounds.tensors(x, x.shape[1:])
        wrong = ((found < low - 1e-6) | (found > high + 1e-6) | ~torch.isfinite(found)).flatten(1).any(1)
        if self.method.eps is not None:
            wrong |= ~(NORMS[self.method.norm].size(found - x) <= self.method.eps * (1 + 1e-4) + 1e-6)
        kept = torch.where(wrong.reshape(-1, *(1,) * (x.ndim - 1)), x, found)
        return Found(kept, result.losses, int(wrong.sum()))

    def with_method(self, **changes: Any) -> Planned:
        """Return the same attack with other settings of its method."""
        return (
            self
            if self.method is None
            else dataclasses.replace(self, method=dataclasses.replace(self.method, **changes))
        )

    def calls(self) -> int:
        """Return how often the target is asked per image, at most."""
        settings = {} if self.method is None else vars(self.method)
        if "queries" in settings:
            return (1 + int(settings["queries"])) * int(settings.get("draws", 1))  # first about the input itself
        if isinstance(self.method, attacks.HopSkipJump):
            return self.method.calls()
        if isinstance(self.method, Noise):
            return int(self.method.points)
        # A targeted loss asks for the likeliest labels before each of its ascents.
        targeted = settings.get("loss") == "targeted-dlr"
        steps = int(settings.get("iterations", bool(settings))) + bool(settings) + targeted
        return steps * int(settings.get("restarts", 1)) * (int(settings["targets"]) if targeted else 1)


def suite(
    subject: Subject,
    base: nn.Module,
    transfer: Sequence[nn.Module],
    x: Tensor,
    *,
    eps: float,
    norm: str,
    bounds: _check.Bounds,
    budget: Budget,
    seed: int,
    randomised: bool,
) -> list[Planned]:
    """Return the attacks for a defence, the clean images first and those that only ask last.

    From `base`, and by momentum from the networks `transfer`; for RAILS and DkNN through surrogates that know their
    layers and repertoire; through BPDA where the defence has no gradient, and on the defence itself where it
    has one; then noise, Square and HopSkipJump on the defence, or on a light twin of RAILS.
    """
    n, classes, defence = len(x), subject.classes, subject.defence
    common: dict[str, Any] = {"eps": eps, "norm": norm, "bounds": bounds}
    pgd = attacks.PGD(step=eps / 4, iterations=20, random_start=False, **common)
    momentum = dataclasses.replace(pgd, momentum=1.0)
    losses = ["ce", *(["dlr"] if classes > 2 else []), *(["targeted-dlr"] if budget.targets and classes > 3 else [])]
    strong: dict[str, Any] = common | {"iterations": budget.iterations, "restarts": budget.restarts, "seed": seed}
    targets = {"targeted-dlr": {"targets": min(budget.targets, classes - 1)}}
    apgds = {loss: attacks.APGD(loss=loss, **strong | targets.get(loss, {})) for loss in losses}
    found = [Planned(name="none", knows="base", kind="none", n=n)]

    def add(name: str, kind: str, method: Any, target: Model, knows: str = "defence", most: int = n) -> None:
        found.append(Planned(name=name, knows=knows, kind=kind, n=min(n, most), method=method, target=target))

    add("fgsm", "transfer", attacks.FGSM(**common), base, "base")
    add("pgd", "transfer", pgd, base, "base")
    add("pgd-momentum", "transfer", momentum, base, "base")
    for loss in losses:
        add(f"apgd-{loss}", "transfer", apgds[loss], base, "base")
    for i, network in enumerate(transfer, 1):
        add(f"transfer-{i}", "transfer", momentum, network, "base")

    undefended = isinstance(defence, LogProbabilities) and defence.network is base
    light = Subject(light_twin(defence), classes=classes) if isinstance(defence, RAILS) else subject
    if isinstance(defence, NeighbourDefence):
        soft = attacks.SoftNeighbours(defence)
        near: nn.Module = soft
        add("soft-knn", "adaptive", pgd, soft)
        for loss in losses:
            add(f"apgd-{loss}-soft-knn", "adaptive", apgds[loss], soft)
        add("ask", "adaptive", pgd, attacks.ASK(defence))
        add("adv-knn", "adaptive", pgd, attacks.AdvKnn(defence))
        if isinstance(defence, DkNN):
            near = attacks.SoftCount(defence)
            add("soft-count", "adaptive", pgd, near)
            for loss in losses:
                add(f"apgd-{loss}-soft-count", "adaptive", apgds[loss], near)
        if isinstance(defence, RAILS):
            clones = near = attacks.SoftClones(defence)
            add("soft-clones", "adaptive", pgd, clones)
            for loss in losses:
                add(f"apgd-{loss}-soft-clones", "adaptive", apgds[loss], clones)
            unrolled = attacks.Unrolled(defence)
            at_once = unrolled.batch_size
            add("unrolled", "adaptive", dataclasses.replace(apgds["ce"], batch_size=at_once), unrolled)
            for draws in budget.draws:
                averaged, method = attacks.Eot(unrolled, draws=draws), dataclasses.replace(pgd, batch_size=at_once)
                add(f"unrolled-eot-{draws}", "adaptive", method, averaged, most=budget.checks)
        add("stealthy", "adaptive", pgd, attacks.Stealthy(near, defence))
        add("bpda-soft-knn", "adaptive", pgd, attacks.Bpda(light, backward=soft))
    if not undefended and has_gradient(subject, x[:8]):
        direct = attacks.Eot(subject, draws=max(budget.draws, default=2)) if randomised else subject
        add("direct-pgd", "adaptive", pgd, direct)
        for loss in losses:
            add(f"direct-apgd-{loss}", "adaptive", apgds[loss], direct)
    elif not undefended:
        add("bpda", "adaptive", pgd, attacks.Bpda(light, backward=base))
        for draws in budget.draws if randomised else ():
            averaged_twin = attacks.Bpda(attacks.Eot(light, draws=draws), backward=base)
            add(f"bpda-eot-{draws}", "adaptive", pgd, averaged_twin, most=budget.checks)

    few, knows = budget.black_box, "base" if undefended else "defence"
    add("noise", "black box", Noise(points=budget.noise, seed=seed, **common), light, knows, few)
    square = attacks.Square(queries=budget.queries, seed=seed, **common)
    if randomised:
        averaged_square = dataclasses.replace(square, early_stop=False, draws=budget.averaged)
        add("square", "black box", averaged_square, light, knows, few)
        # One noise for all queries: what an attacker sees who pairs queries in a batch, or knows the seed.
        known = Subject(light.defence, classes=classes, fixed=seed)
        add("square-known-seed", "black box", dataclasses.replace(square, early_stop=False), known, knows, few)
    else:
        add("square", "black box", square, light, knows, few)
    decide = attacks.HopSkipJump(iterations=budget.decisions, evaluations=budget.evaluations, seed=seed, **common)
    add("hop-skip-jump", "black box", decide, light, knows, few)
    return found


def has_gradient(model: Model, x: Tensor) -> bool:
    """Return whether the first log-probability has a gradient in inputs `x` `(B, *S)` that is not zero everywhere."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        out = models.ask(model, point)[:, 0].sum()
        if not out.requires_grad:
            return False
        with models.blamed(x, "the gradient of the model"):
            gradient = torch.autograd.grad(out, point, allow_unused=True)[0]
        return gradient is not None and bool((gradient != 0).any())


def seconds_per_call(target: Model, x: Tensor, *, gradient: bool) -> float:
    """Return the seconds that a model takes per image `(B, *S)`, with its gradient if asked."""
    begun = time.perf_counter()
    with torch.set_grad_enabled(gradient):
        point = x.detach().requires_grad_(gradient)
        out = models.ask(target, point)
        if gradient and out.requires_grad:
            with models.blamed(x, "the gradient of the model"):
                torch.autograd.grad(out.sum(), point, allow_unused=True)
    return (time.perf_counter() - begun) / len(x)


def afford(planned: Sequence[Planned], seconds: Mapping[str, float], asking: float, allowed: float) -> list[Planned]:
    """Return the plan cut to `allowed` seconds: first the images of black-box attacks, then those of all.

    `seconds`: per attack, of one image. `asking`: of testing one image's candidate on the defence. At least ten images
    (or all there are) are kept everywhere, so that a tiny budget is overrun rather than answered with nothing.
    """

    def cost(part: Iterable[Planned]) -> float:
        return sum(attack.n * (seconds[attack.name] + asking) for attack in part)

    def cut(part: Sequence[Planned], budget: float) -> list[Planned]:
        share = min(1.0, budget / max(cost(part), 1e-9))
        return [dataclasses.replace(a, n=max(min(10, a.n), math.floor(share * a.n))) for a in part]

    asks = [attack for attack in planned if attack.standing]
    rest = [attack for attack in planned if not attack.standing]
    if cost(planned) > allowed:
        asks = cut(asks, max(allowed - cost(rest), allowed / 3))
        rest = cut(rest, allowed - cost(asks))
        most = max(attack.n for attack in rest)
        asks = [dataclasses.replace(attack, n=min(attack.n, most)) for attack in asks]
    return [*rest, *asks]

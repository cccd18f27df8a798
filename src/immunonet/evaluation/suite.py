"""Which attacks a protocol runs on which defence, and what they cost."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from immunonet import attacks, models
from immunonet.attacks._base import Attack
from immunonet.attacks.norms import NORMS
from immunonet.defences.base import Defence
from immunonet.defences.undefended import Undefended
from immunonet.evaluation.asking import Subject, told_of
from immunonet.evaluation.threats import Threat

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a protocol spends.

    `images`: how many the command takes unless told. `steps` of PGD, `iterations` of APGD, with `restarts`;
    `black_box` images for attacks that only ask, with `queries` (Square, each `averaged` over draws of a randomised
    defence), `decisions` and `evaluations` (HopSkipJump) and `noise` draws; `draws` of EOT, one attack each, on
    `checks` images, which are also those of a sanity check. `row_seeds`: draws of a randomised defence that every
    candidate is looked at on, and as many others for its row; `seeds`: draws on which an image's `finalists` are
    compared, and as many others for the worst case. `targets`: labels that a targeted attack tries, the likeliest;
    `ablations`: whether to run them. `softer`: how many times as soft the votes of surrogates are attacked as well,
    those that can be softened.
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
    softer: tuple[float, ...] = ()
    steps: int = 20


PROTOCOLS: Mapping[str, Budget] = {
    "quick": Budget(
        images=100, iterations=20, restarts=1, black_box=20, queries=200, averaged=2, decisions=5, evaluations=20,
        noise=20, draws=(), row_seeds=3, seeds=10, finalists=2, checks=25, targets=0, ablations=False,
    ),
    "standard": Budget(
        images=500, iterations=50, restarts=1, black_box=50, queries=1000, averaged=5, decisions=15, evaluations=100,
        noise=200, draws=(5,), row_seeds=5, seeds=20, finalists=3, checks=100, targets=3, ablations=True,
        softer=(2.0,),
    ),
    "full": Budget(
        images=1000, iterations=100, restarts=5, black_box=1000, queries=5000, averaged=20, decisions=40,
        evaluations=100, noise=10_000, draws=(1, 5, 20, 50), row_seeds=20, seeds=20, finalists=3, checks=100,
        targets=9, ablations=True, softer=(2.0, 4.0),
    ),
}  # fmt: skip


class Candidates(NamedTuple):
    """What an attack found: points `(B, *S)`, loss curves `(steps, B)`, and how many left the ball or the bounds.

    Those are replaced by the inputs.
    """

    adversarials: Tensor
    losses: Tensor
    outside: int


@dataclass(frozen=True, kw_only=True)
class Planned:
    """An attack to be run: its name, its `roles`, how (`method`), on what (`target`), and on how many images.

    `threat`: what it keeps to, None for clean images, which belong to all threats. A `name` is unique in its plan; of
    several threats the norm comes first, as in "l2 pgd", and `short` is the rest. `method` None leaves inputs as they
    are; what breaks the bounds, or the ball of a method that has one, is replaced. `n`: it takes the first so many
    images; one that only asks passes over those of them on which the defence has failed, under the same threat, in
    every draw that chooses. Roles are "transfer" (made without knowing the defence), "adaptive", or "asks"; and
    "base" (it knows the undefended network alone), "direct" (on the defence's own gradient), "surrogate", "eot",
    "joint" (it also avoids looking foreign), "targeted", "known seed", "doubled" (twice the steps of another).
    """

    name: str
    roles: frozenset[str] = frozenset()
    n: int
    method: Attack | None = None
    target: Model | None = None
    threat: Threat | None = None

    @property
    def short(self) -> str:
        """Its name among the attacks under the same threat, which is what rows call it."""
        return self.name if self.threat is None else self.name.removeprefix(f"{self.threat.norm} ")

    def within(self, threat: Threat) -> bool:
        """Return whether what it finds is allowed under `threat`."""
        return self.threat is None or self.threat == threat

    @property
    def knows(self) -> str:
        """What the attacker differentiates or queries, "base" or "defence"."""
        return "base" if self.method is None or "base" in self.roles else "defence"

    @property
    def kind(self) -> str:
        """What it is called in a record: "none", "transfer", "adaptive" or "black box"."""
        kinds = {"transfer": "transfer", "adaptive": "adaptive", "asks": "black box"}
        return next((kinds[role] for role in kinds if role in self.roles), "none")

    @property
    def asks(self) -> bool:
        """Whether it only asks, so that images that are broken already are passed over."""
        return "asks" in self.roles

    @property
    def iterative(self) -> bool:
        """Whether it takes steps along a gradient, of which there may be twice as many."""
        return self.method is not None and not self.asks and self.method.doubled() is not None

    def __call__(self, x: Tensor, y: Tensor) -> Candidates:
        """Attack inputs `x` `(B, *S)` with labels `y` `(B,)`; the same call gives the same result."""
        if self.method is None or self.target is None:
            return Candidates(x, x.new_zeros(1, len(x)), 0)
        for module in self.target.modules() if isinstance(self.target, nn.Module) else ():
            if isinstance(module, Subject):
                module.rewind()
        method, result = self.method, self.method(self.target, x, y)
        points = result.adversarials.detach()
        low, high = method.bounds.tensors(x, x.shape[1:])
        wrong = ((points < low - 1e-6) | (points > high + 1e-6) | ~torch.isfinite(points)).flatten(1).any(1)
        if method.eps is not None:
            wrong |= ~(NORMS[method.norm].size(points - x) <= method.eps * (1 + 1e-4) + 1e-6)
        kept = torch.where(wrong.reshape(-1, *(1,) * (x.ndim - 1)), x, points)
        return Candidates(kept, result.losses, int(wrong.sum()))

    def by(self, method: Attack | None) -> Planned:
        """Return the same attack by other settings of its method."""
        return dataclasses.replace(self, method=method)

    def calls(self) -> int:
        """Return how often the target is asked per image, at most."""
        return 0 if self.method is None else self.method.calls()

    def told(self) -> dict[str, Any]:
        """Return what a record says of it: method, settings, target, and its budget per image."""
        if self.method is None:
            return {}
        return {"attack": self.method.describe(), "target": told_of(self.target), "calls": self.calls()}


class Suite:
    """Puts together the attacks on a defence under one threat: on images `x` `(n, *S)`, from `nets`, the base first.

    `subject`: the defence as it is asked; `randomised`: whether its answers are random.
    """

    def __init__(
        self, subject: Subject, nets: Sequence[nn.Module], x: Tensor, threat: Threat, budget: Budget, randomised: bool
    ) -> None:
        self.subject, self.budget, self.randomised, self.x = subject, budget, randomised, x
        self.threat, self.seed = threat, threat.seed
        self.base, *self.others = nets
        self.common: dict[str, Any] = {"eps": threat.eps, "norm": threat.norm, "bounds": threat.bounds}
        self.pgd = attacks.PGD(step=threat.eps / 4, iterations=budget.steps, random_start=False, **self.common)
        self.light = light(subject)

    def attacks(self, others: Mapping[int, Attack]) -> list[Planned]:
        """Return the attacks, those that only ask last; `others`: a caller's own by their places."""
        own = [self._own(attack, place) for place, attack in others.items()]
        gradient = [*self._transferred(), *self._knowing(), *self._direct(), *(a for a in own if not a.asks)]
        return [*gradient, *self._asking(), *(a for a in own if a.asks)]

    def _own(self, attack: Attack, place: int) -> Planned:
        """Return the plan of a caller's own attack: on the defence, or where it needs a gradient, on what has one."""
        name, defence = f"{type(attack).__name__.lower()}-{place}", self.subject.defence
        attack = dataclasses.replace(attack, bounds=self.common["bounds"])
        if attack.needs != "gradient":
            return self._plan(name, attack, self.light, "asks", most=self.budget.black_box)
        target: Model | None = next(iter(defence.surrogates().values()), None) if isinstance(defence, Defence) else None
        if target is None:
            direct = has_gradient(self.subject, self.x[:8])
            target = self.subject if direct else attacks.Bpda(self.light, backward=self.base)
        at_once = getattr(target, "batch_size", attack.batch_size)
        return self._plan(
            name, dataclasses.replace(attack, batch_size=min(attack.batch_size, at_once)), target, "adaptive"
        )

    def _plan(self, name: str, method: Any, target: Model, *roles: str, most: int | None = None) -> Planned:
        n = len(self.x) if most is None else min(most, len(self.x))
        return Planned(name=name, roles=frozenset(roles), n=n, method=method, target=target, threat=self.threat)

    def _apgds(self, name: str, target: Model, *roles: str) -> Iterator[Planned]:
        classes, budget = self.subject.classes, self.budget
        losses = [
            "ce",
            *(["dlr"] if classes > 2 else []),
            *(["targeted-dlr"] if budget.targets and classes > 3 else []),
        ]
        steps = budget.iterations * NORMS[self.common["norm"]].effort
        strong = self.common | {"iterations": steps, "restarts": budget.restarts, "seed": self.seed}
        for loss in losses:
            targeted = {"targets": min(budget.targets, classes - 1)} if loss == "targeted-dlr" else {}
            method = attacks.APGD(loss=loss, **strong | targeted)
            yield self._plan(name.format(loss), method, target, *roles, *(["targeted"] if targeted else []))

    def _transferred(self) -> Iterator[Planned]:
        """Attacks on the undefended network, and by momentum from others."""
        momentum, of_base = dataclasses.replace(self.pgd, momentum=1.0), ("transfer", "base")
        yield self._plan("fgsm", attacks.FGSM(**self.common), self.base, *of_base)
        yield self._plan("pgd", self.pgd, self.base, *of_base)
        yield self._plan("pgd-momentum", momentum, self.base, *of_base)
        yield from self._apgds("apgd-{}", self.base, *of_base)
        for i, network in enumerate(self.others, 1):
            yield self._plan(f"transfer-{i}", momentum, network, *of_base)

    def _knowing(self) -> Iterator[Planned]:
        """Attacks through the defence's surrogates, the weakest first: of thorough ones every loss is climbed."""
        defence, roles = self.subject.defence, ("adaptive", "surrogate")
        if not isinstance(defence, Defence):
            return
        surrogates = defence.surrogates()
        for name, target in reversed(list(surrogates.items())):
            if (at_once := getattr(target, "batch_size", None)) is not None:  # it is large: one attack, and EOT
                first = next(self._apgds(name, target, *roles))
                assert first.method is not None
                yield first.by(dataclasses.replace(first.method, batch_size=at_once))
                method = dataclasses.replace(self.pgd, batch_size=at_once)
                for draws in self.budget.draws if models.takes_seed(target) else ():
                    averaged = attacks.Eot(target, draws=draws)
                    yield self._plan(f"{name}-eot-{draws}", method, averaged, *roles, "eot", most=self.budget.checks)
                continue
            yield self._plan(name, self.pgd, target, *roles)
            if getattr(target, "thorough", False):
                yield from self._apgds(f"apgd-{{}}-{name}", target, *roles)
                soften: Any = getattr(target, "softened", None)
                for factor in self.budget.softer if soften else ():
                    yield from self._apgds(f"apgd-{{}}-{name}-x{factor:g}", soften(factor), *roles)
        if small := [name for name, target in surrogates.items() if not hasattr(target, "batch_size")]:
            if (joint := defence.stealthy(surrogates[small[0]])) is not None:
                yield self._plan("stealthy", self.pgd, joint, "adaptive", "joint")
            bpda = attacks.Bpda(self.light, backward=surrogates[small[-1]])
            yield self._plan(f"bpda-{small[-1]}", self.pgd, bpda, "adaptive")

    def _direct(self) -> Iterator[Planned]:
        """Attacks on the defence itself where it has a gradient, else with the gradient of the network (BPDA)."""
        if self._undefended():
            return
        draws = self.budget.draws
        if has_gradient(self.subject, self.x[:8]):
            target = attacks.Eot(self.subject, draws=max(draws, default=2)) if self.randomised else self.subject
            yield self._plan("direct-pgd", self.pgd, target, "adaptive", "direct")
            yield from self._apgds("direct-apgd-{}", target, "adaptive", "direct")
            return
        yield self._plan("bpda", self.pgd, attacks.Bpda(self.light, backward=self.base), "adaptive")
        for count in draws if self.randomised else ():
            averaged = attacks.Bpda(attacks.Eot(self.light, draws=count), backward=self.base)
            yield self._plan(f"bpda-eot-{count}", self.pgd, averaged, "adaptive", "eot", most=self.budget.checks)

    def _asking(self) -> Iterator[Planned]:
        """Attacks that only ask, on a light twin."""
        budget, twin, settings = self.budget, self.light, self.common | {"seed": self.seed}
        roles = ("asks", "base") if self._undefended() else ("asks",)
        plan = functools.partial(self._plan, most=budget.black_box)
        yield plan("noise", attacks.Noise(points=budget.noise, **settings), twin, *roles)
        if settings["norm"] in (attacks.Square.norms or NORMS):
            square = attacks.Square(queries=budget.queries, early_stop=not self.randomised, **settings)
            averaged = dataclasses.replace(square, draws=budget.averaged if self.randomised else 1)
            yield plan("square", averaged, twin, *roles)
            if self.randomised:
                # One noise for all queries: what an attacker sees who pairs queries in a batch, or knows the seed.
                known = Subject(twin.defence, classes=self.subject.classes, fixed=self.seed)
                yield plan("square-known-seed", square, known, *roles, "known seed")
        if settings["norm"] in (attacks.HopSkipJump.norms or NORMS):
            effort: dict[str, Any] = {"iterations": budget.decisions, "evaluations": budget.evaluations}
            yield plan("hop-skip-jump", attacks.HopSkipJump(**effort, **settings), twin, *roles)

    def _undefended(self) -> bool:
        defence = self.subject.defence
        return isinstance(defence, Undefended) and defence.model is self.base


def light(subject: Subject) -> Subject:
    """Return the light twin of a defence under evaluation, or itself where there is none."""
    defence = subject.defence
    if isinstance(defence, Defence) and (twin := defence.light()) is not defence:
        return Subject(twin, classes=subject.classes)
    return subject


def planned(suites: Sequence[Suite], others: Sequence[Attack] = ()) -> list[Planned]:
    """Return the attacks of suites, one per threat, under unique names: the clean images first, what only asks last.

    `others`: a caller's own, each under the threat of its norm; ValueError or TypeError for one that fits none.
    """
    own = _assigned(others, [suite.threat for suite in suites])
    found = [attack for suite in suites for attack in suite.attacks(own[suite.threat.norm])]
    if len(suites) > 1:
        found = [dataclasses.replace(a, name=f"{a.threat.norm} {a.name}") for a in found if a.threat is not None]
    return [Planned(name="none", n=len(suites[0].x)), *sorted(found, key=lambda attack: attack.asks)]


def _assigned(others: Sequence[Attack], threats: Sequence[Threat]) -> dict[str, dict[int, Attack]]:
    """Return a caller's own attacks, by their places from 1 on, by the norm of the threat that they keep to."""
    eps = {threat.norm: threat.eps for threat in threats}
    own: dict[str, dict[int, Attack]] = {norm: {} for norm in eps}
    for place, attack in enumerate(others, 1):
        argument = f"attacks[{place - 1}]"
        if not isinstance(attack, Attack):
            raise TypeError(f"{argument} must be an immunonet.attacks.Attack, got {type(attack).__name__}")
        if attack.norm not in own or attack.eps is None or attack.eps > eps[attack.norm]:
            allowed = " or ".join(f"eps={radius:g} in {norm}" for norm, radius in eps.items())
            raise ValueError(f"{argument} must stay within {allowed}, got eps={attack.eps} in {attack.norm}")
        if attack.targeted:
            raise ValueError(f"{argument} must not be targeted: the labels that it gets are those to lead away from")
        own[attack.norm][place] = attack
    return own


def has_gradient(model: Model, x: Tensor) -> bool:
    """Return whether the first log-probability has a gradient in inputs `x` `(B, *S)` that is not zero everywhere."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        gradient = _gradient(models.ask(model, point)[:, 0], point)
    return gradient is not None and bool((gradient != 0).any())


def seconds_per_call(target: Model, x: Tensor, *, gradient: bool) -> float:
    """Return the seconds that a model takes per image `(B, *S)`, with its gradient if asked."""
    begun = time.perf_counter()
    with torch.set_grad_enabled(gradient):
        point = x.detach().requires_grad_(gradient)
        _gradient(models.ask(target, point), point)
    return (time.perf_counter() - begun) / len(x)


def _gradient(out: Tensor, point: Tensor) -> Tensor | None:
    if not out.requires_grad:
        return None
    with models.blamed(point, "the gradient of the model"):
        return torch.autograd.grad(out.sum(), point, allow_unused=True)[0]


def afford(planned: Sequence[Planned], seconds: Mapping[str, float], asking: float, allowed: float) -> list[Planned]:
    """Return the plan cut to `allowed` seconds: first the images of attacks that only ask, then those of all.

    `seconds`: per attack, of one image. `asking`: of testing one image's candidate on the defence. At least ten images
    (or all there are) are kept everywhere, so that a tiny budget is overrun rather than answered with nothing.
    """

    def cost(part: Iterable[Planned]) -> float:
        return sum(attack.n * (seconds[attack.name] + asking) for attack in part)

    def cut(part: Sequence[Planned], budget: float) -> list[Planned]:
        share = min(1.0, budget / max(cost(part), 1e-9))
        return [dataclasses.replace(a, n=max(min(10, a.n), math.floor(share * a.n))) for a in part]

    rest, asks = ([attack for attack in planned if attack.asks is only] for only in (False, True))
    if cost(planned) > allowed:
        asks = cut(asks, max(allowed - cost(rest), allowed / 3))
        rest = cut(rest, allowed - cost(asks))
        most = max(attack.n for attack in rest)
        asks = [dataclasses.replace(attack, n=min(attack.n, most)) for attack in asks]
    return [*rest, *asks]

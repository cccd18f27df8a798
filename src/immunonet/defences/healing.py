"""What a network under control does with inputs: how it answers, what it heals, what looks foreign, its attackers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from immunonet import attacks, incoming, models
from immunonet.control.manifolds import flat_norm
from immunonet.control.passing import INPUT
from immunonet.control.steering import Steering
from immunonet.defences.answers import Answer, Healed, Sense
from immunonet.defences.base import Defence, Made
from immunonet.defences.repertoire import Familiarity
from immunonet.features.witness import Witness

# Inputs that are controlled at once.
BATCH = 256


class HealingDefence(Defence):
    """A network whose states are led back to manifolds of clean ones, by settings and manifolds that are there."""

    _layers: tuple[str, ...]
    manifolds: nn.ModuleList
    scales: Tensor
    penalty: float
    look_ahead: bool
    outer: int
    inner: int
    step: float | Literal["auto"]
    gradient: str
    false_alarm: float
    shape: tuple[int, ...]
    probes: Tensor
    familiar: Familiarity
    _witness: Witness

    @property
    def _steering(self) -> Steering:
        return Steering(
            model=self.model, layers=self._layers, manifolds=list(self.manifolds), scales=self.scales,
            penalty=self.penalty, look_ahead=self.look_ahead, outer=self.outer, inner=self.inner, step=self.step,
        )  # fmt: skip

    @property
    def _closed(self) -> bool:
        """Whether controls have a closed form; before there are manifolds, whether they will."""
        return self._steering.closed if len(self.manifolds) else not self.costly

    @property
    def _confines(self) -> bool:
        """Whether the manifold of the input tells what lies within it; before there is one, whether it will."""
        tells = hasattr(self.manifolds[0], "within") if len(self.manifolds) else not self.costly
        return self._layers[0] == INPUT and tells

    def answer(self, x: Any, seed: int | None = None) -> Answer:
        """Return the answer to inputs `x` `(B, *S)`, differentiable in them as `gradient` says."""
        inputs = self._inputs(x)
        logs = self.logits(inputs).log_softmax(1)
        return Answer(logs.argmax(1), logs, self._sense_of(inputs))

    def forward(self, x: Any, seed: int | None = None) -> Tensor:
        """Return log-probabilities `(B, C)` whose argmax is what `predict` says."""
        return self.logits(self._inputs(x)).log_softmax(1)

    def logits(self, x: Tensor, *, gradient: str | None = None) -> Tensor:
        """Return logits `(B, C)` under control of checked inputs, differentiable as `gradient` (None: its own) says."""
        how = self.gradient if gradient is None else gradient
        found = [self._steering.controlled(part, how).logits for part in x.split(BATCH)]
        return torch.cat(found).float()

    def controlled(self, x: Any) -> Tensor:
        """Return inputs `(B, *S)` after control; themselves where the input is no controlled layer."""
        inputs = self._inputs(x)
        return torch.cat([self._steering.met(part, self.gradient) for part in inputs.split(BATCH)])

    def residuals(self, x: Any, *, controlled: bool = False) -> Tensor:
        """Return the distance of each layer's state to its manifold `(B, T)`: of the bare network, or under control."""
        inputs = self._inputs(x)
        with torch.no_grad():
            if not controlled:
                return torch.cat([self._steering.lying_bare(part) for part in inputs.split(BATCH)])
            ways = [self._steering.controlled(part, "frozen") for part in inputs.split(BATCH)]
            return torch.cat([self._steering.lying(way.steered) for way in ways])

    def healed(self, x: Any) -> Healed:
        """Return inputs `(B, *S)` after control, and distances to the manifolds in units of clean ones."""
        with torch.no_grad():
            before, after = (self.residuals(x, controlled=way) / self.scales for way in (False, True))
            return Healed(x=self.controlled(x), before=before, after=after)

    def controls(self, x: Any) -> list[Tensor]:
        """Return the controls of inputs `(B, *S)`, one tensor `(B, *S_t)` per layer."""
        with torch.no_grad():
            ways = [self._steering.controlled(part, "frozen") for part in self._inputs(x).split(BATCH)]
        return [torch.cat([way.steered[t] - way.states[t] for way in ways]) for t in range(len(self._layers))]

    def sense(self, x: Any) -> Sense:
        """Return how foreign inputs `(B, *S)` look: their distances to the manifolds, each in units of its mean."""
        return self._sense_of(self._inputs(x))

    def strangeness(self, x: Tensor) -> Tensor:
        """Return the distance `(B,)` that `sense` tells, differentiable in inputs `x` `(B, *S)`."""
        return self.familiar.distance(self._steering.lying_bare(x))

    @property
    def alarm(self) -> float:
        """The largest strangeness that is not flagged."""
        return self.familiar.threshold(self.false_alarm)

    def _sense_of(self, x: Tensor) -> Sense:
        with torch.no_grad():
            far = torch.cat([self._steering.lying_bare(part) for part in x.split(BATCH)])
        p_value = self.familiar.familiarity(far)
        return Sense(distance=self.familiar.distance(far), p_value=p_value, foreign=p_value.le(self.false_alarm))

    @property
    def inside(self) -> nn.Module:
        """The network without control: names of layers are its own, and examples pass through it as it is."""
        return self.model

    def met(self, x: Tensor) -> Tensor:
        """Return inputs after control, differentiable as `gradient` says."""
        return torch.cat([self._steering.met(part, self.gradient) for part in x.split(BATCH)])

    def surrogates(self) -> Mapping[str, nn.Module]:
        """Return what an attacker may differentiate in place of it, beside its own gradient, which is exact."""
        # Where there is one projection and no step, its gradient is the whole one.
        parts = ["last", "start"] if not self._closed and self.outer else []
        makers: dict[str, Callable[[], nn.Module]] = {
            how: functools.partial(attacks.Through, self, gradient=how) for how in [*parts, "frozen"]
        }
        if self._confines:
            makers["inside"] = lambda: attacks.Inside(self.model, self.manifolds[0])
        return Made(makers)

    def stealthy(self, surrogate: nn.Module) -> nn.Module:
        """Return itself under the condition that inputs do not look foreign: that controls stay small."""
        return attacks.Stealthy(self, self)

    def explained(self, x: Tensor, adversarials: Tensor) -> dict[str, float]:
        """Return the share of perturbations' energy that lies inside the clean subspace of the input, if it has one."""
        if not self._confines:
            return {}
        delta = (adversarials - x).to(self.device)
        moved = flat_norm(delta)
        if not bool((moved > 0).any()):
            return {}
        within: Any = self.manifolds[0]
        inside = flat_norm(within.within(delta))
        return {"inside": float((inside[moved > 0] / moved[moved > 0]).square().mean())}

    @property
    def effort(self) -> float:
        """Roughly what an answer takes: passes of the network."""
        return 2.0 if self._closed else 3.0 + 3 * self.outer

    def check_current(self) -> None:
        """Raise ValueError unless it is fitted, and its model still is the one it was fitted with."""
        if not self.shape:
            raise ValueError("this ClosedLoop is not fitted: call control.fit(x, y) with the training set first")
        if not self._witness.still([self.model], self._testimony):
            raise ValueError(
                "model's weights have changed since this defence was fitted (training went on, or others were loaded): "
                "its manifolds are those of the old ones. Call fit again, or load the old weights"
            )

    def _testimony(self) -> list[Tensor]:
        with torch.no_grad(), models.unwatched():
            return [models.logits(self.model, self.probes)]

    def _inputs(self, x: Any) -> Tensor:
        """Return checked inputs on the defence's device; those that an attack differentiates stay its own."""
        self.check_current()
        checked = incoming.inputs("x", x, bounds=self.bounds, shape=self.shape).to(self.device)
        if not len(checked):
            raise ValueError(f"x must hold at least one input, got shape {tuple(checked.shape)}")
        return x if isinstance(x, Tensor) and x.requires_grad else checked

"""Wrappers that make a defence attackable: what cannot be differentiated, what is random, what raises an alarm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from immunonet import _check, incoming, models
from immunonet.attacks._base import Model, Penalised, Refusing, asked


class Bpda(models.Asking):
    """The answer of `defence` with the gradient of `backward` (BPDA, Athalye et al. 2018).

    Both map the same inputs to tensors of one shape: logits or log-probabilities, or anything else where a part
    of a network that cannot be differentiated is wrapped, as in `Sequential(Bpda(quantise, backward=Identity()),
    net)`. `backward` may be the undefended network or a surrogate such as `SoftNeighbours`. For a random defence put
    Eot inside: `Bpda(Eot(defence), backward=...)`. Raises TypeError unless both are callable, ValueError where their
    outputs differ in shape.
    """

    def __init__(self, defence: Model, *, backward: Model) -> None:
        super().__init__()
        self.defence = _callable("defence", defence)
        self.backward_model = _callable("backward", backward)

    def forward(self, x: Tensor) -> Tensor:
        """Return the defence's own output for inputs `x` `(B, *S)`, differentiable through `backward`."""
        with torch.no_grad():
            answer = models.ask(self.defence, x.detach())
        guide = models.ask(self.backward_model, x)
        if answer.shape != guide.shape:
            raise ValueError(
                f"backward must give what defence gives, {tuple(answer.shape)} for these inputs, "
                f"got {tuple(guide.shape)}"
            )
        # The bracket is exactly zero, so that the answer keeps every digit.
        return answer + (guide - guide.detach()).to(answer.dtype)


class Eot(models.Asking):
    """The log of the mean probabilities of `draws` calls of a random model (EOT, Athalye et al. 2018).

    A model that takes a `seed`, such as RAILS or `Unrolled`, is called with the seeds `seed` to `seed + draws - 1`
    every time: the answer is a plain function of the input, and an attack on it can be repeated. Another random
    model is called `draws` times as it is; one whose attribute `randomised` is False, such as a DkNN, once. Models give
    logits or log-probabilities `(B, C)`; gradients flow through all calls.
    """

    def __init__(self, defence: Model, *, draws: int = 20, seed: int = 0) -> None:
        super().__init__()
        self.defence = _callable("defence", defence)
        self.draws = _check.integer("draws", draws)
        self.seed = _check.integer("seed", seed, least=0)
        self._seeded = models.takes_seed(defence)
        if not getattr(defence, "randomised", True):
            self.draws = 1

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities `(B, C)` of inputs `x` `(B, *S)`."""
        answers = [models.ask(self.defence, x, **_seed(self._seeded, self.seed + draw)) for draw in range(self.draws)]
        return torch.stack([answer.log_softmax(1) for answer in answers]).logsumexp(0) - math.log(self.draws)


class Blinded(Refusing):
    """The log of the mean probabilities of `draws` disguised copies of each input (query blinding, Chen et al. 2019).

    A copy is turned by up to `degrees`, scaled by up to `zoom`, moved by up to `shift` of its width (images alone), and
    has normal noise of size `noise`, in units of the input; then it is clipped to `bounds`. So no two queries look
    alike to one who looks for near copies. Copies that `model` refuses to answer are left out; an input is refused
    where all of its copies are.
    """

    def __init__(
        self, model: Model, *, draws: int = 4, degrees: float = 15.0, zoom: float = 0.1, shift: float = 0.1,
        noise: float = 0.02, bounds: Any = (0.0, 1.0), seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.draws = _callable("model", model), _check.integer("draws", draws)
        self.degrees = _check.number("degrees", degrees, least=0, most=180)
        self.zoom = _check.number("zoom", zoom, least=0, most=0.9)
        self.shift = _check.number("shift", shift, least=0, most=1)
        self.noise = _check.number("noise", noise, least=0)
        self.bounds = incoming.bounds("bounds", bounds)
        self._generator = torch.Generator().manual_seed(_check.integer("seed", seed, least=0))

    def heard(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities `(B, C)` of inputs `x` `(B, *S)`, and whether any of their copies was answered."""
        copies = self.disguised(x.repeat_interleave(self.draws, 0))
        logits, answered = asked(self.model, copies)
        found = logits.log_softmax(1).unflatten(0, (len(x), self.draws))
        if answered is None:
            return found.logsumexp(1) - math.log(self.draws), torch.ones(len(x), dtype=torch.bool, device=x.device)
        answered = answered.view(len(x), self.draws)
        told = found.masked_fill(~answered[:, :, None], -torch.inf).logsumexp(1)
        some = answered.any(1)
        return torch.where(some[:, None], told.log_softmax(1), found[:, 0]), some

    def disguised(self, x: Tensor) -> Tensor:
        """Return one disguised copy of each input `(n, *S)`."""
        n = len(x)
        if x.ndim == 4:
            turn, grow, across, down = (2 * torch.rand(4, n, generator=self._generator) - 1).to(x)
            angle, size = turn * math.radians(self.degrees), 1 + grow * self.zoom
            cos, sin = angle.cos() / size, angle.sin() / size
            rows = torch.stack([cos, -sin, 2 * self.shift * across]), torch.stack([sin, cos, 2 * self.shift * down])
            grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1), list(x.shape), align_corners=False)
            x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        low, high = self.bounds.tensors(x, x.shape[1:])
        return (x + self.noise * torch.randn(x.shape, generator=self._generator).to(x)).clamp(low, high)


class Stealthy(Penalised):
    """A surrogate of a defence under the condition that inputs do not look foreign to that defence.

    Attacks on it climb their loss minus `penalty`, and count as successful only where the penalty is 0. The
    penalty is `weight` times how far the input's strangeness, the distance by which `defence.foreign` judges, lies
    above the highest that is not flagged at the defence's `false_alarm`.

    `surrogate`: maps inputs to logits or log-probabilities. `defence`: a fitted one that tells the `strangeness` of
    inputs, differentiably, and its `alarm`, as RAILS, DkNN and ClosedLoop do. `weight` >= 0, in units of the loss (nats
    for the cross-entropy).
    """

    def __init__(self, surrogate: Model, defence: Any, *, weight: float = 100.0) -> None:
        super().__init__()
        self.surrogate = _callable("surrogate", surrogate)
        if not callable(getattr(defence, "strangeness", None)):
            raise TypeError(f"defence must be a RAILS, a DkNN or a ClosedLoop, got {type(defence).__name__}")
        defence.check_current()
        self.defence, self.threshold = defence, float(defence.alarm)
        self.weight = _check.number("weight", weight, least=0)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the surrogate gives for inputs `x` `(B, *S)`."""
        return models.ask(self.surrogate, x)

    def penalty(self, x: Tensor) -> Tensor:
        """Return `(B,)`: `weight` times the strangeness of inputs `x` `(B, *S)` above the threshold; 0 below it."""
        return self.weight * (self.strangeness(x) - self.threshold).clamp(min=0)

    def strangeness(self, x: Tensor) -> Tensor:
        """Return what the defence measures how foreign inputs look by, `(B,)`, differentiable in `x`."""
        found: Tensor = self.defence.strangeness(x)
        return found


def _seed(wanted: bool, seed: int) -> dict[str, Any]:
    return {"seed": seed} if wanted else {}


def _callable(name: str, value: Any) -> Any:
    if not callable(value):
        raise TypeError(f"{name} must be a model or another callable on inputs, got {type(value).__name__}")
    return value

"""How a defence is asked for its answers, and how it is described in a record."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import incoming, models
from immunonet._seeds import seeded
from immunonet.defences.answers import Sense
from immunonet.defences.base import Defence

# The label that stands for no usable answer: it is never right.
NO_ANSWER = -1
# Inputs that are tried before a defence is given up as unusable.
_TRIES = 8


class Subject(models.Asking):
    """A defence under evaluation: asked in eval mode, under seeds, and in a way that survives bad answers.

    `defence` maps inputs `(B, *S)` to log-probabilities `(B, classes)`; its `predict`, if any, gives the labels. A
    `seed` argument of either is used; torch's global generator is seeded for every call and left as found. Called as a
    model it gives log-probabilities on the input's device: with fresh randomness at every call, or always that of the
    seed `fixed`. An input that makes the defence raise an error or answer NaN has no answer, which counts as wrong
    (label -1, even log-probabilities); `faults` counts them by what happened.
    """

    def __init__(self, defence: Callable[..., Tensor], *, classes: int, fixed: int | None = None) -> None:
        super().__init__()
        self.defence, self.classes, self.fixed = defence, classes, fixed
        self.seeded, self._takes_seed = is_randomised(defence), models.takes_seed(defence)
        self.faults: Counter[str] = Counter()
        self._calls, self._senses = 0, False

    def check(self, x: Tensor) -> None:
        """Raise ValueError or TypeError unless one of the first inputs is answered with log-probabilities."""
        problem: ValueError | None = None
        for i in range(min(len(x), _TRIES)):
            part = x[i : i + 2]
            try:
                with torch.no_grad(), self._asked(0):
                    answer: Any = models.call(self.defence, part)
                    labels = self._predicted(part, 0)
                    self._senses = isinstance(self.defence, Defence) and self.defence.sense(part) is not None
            except Exception as error:
                problem = ValueError(f"defence fails on inputs of shape {tuple(part.shape)}: {error}")
                continue
            found = models.tensor_of(answer, "defence")
            if labels is not None:
                _check_labels(labels, len(part), self.classes)
            if tuple(found.shape) != (len(part), self.classes) or not found.is_floating_point():
                raise ValueError(
                    f"defence must return log-probabilities ({len(part)}, {self.classes}) like base, "
                    f"got {tuple(found.shape)} of {found.dtype}"
                )
            finite, total = "defence must return finite log-probabilities, got", found.double().exp().sum(1)
            if not bool(torch.isfinite(found).all()):
                problem = ValueError(f"{finite} {found.tolist()}")
                continue
            if (total - 1).abs().max() > (1e-3 if found.dtype in (torch.float32, torch.float64) else 2e-2):
                raise ValueError(f"{finite} sums {total.tolist()}: end a network with log_softmax")
            return
        if problem is not None:
            raise problem

    @torch.no_grad()
    def varies(self, x: Tensor) -> bool:
        """Return whether two calls on inputs `(B, *S)` give different log-probabilities."""
        return not torch.equal(self(x), self(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities `(B, C)` of inputs `(B, *S)`."""
        self._calls += 1
        seed = 2**20 + self._calls if self.fixed is None else self.fixed

        def ask(part: Tensor) -> Tensor:
            found = self._log_probabilities(part, seed)
            bad = self._not_finite(found)
            return torch.where(bad[:, None], torch.zeros_like(found).log_softmax(1), found) if bad.any() else found

        return self._safely(
            x, seed, ask, lambda part: (part.flatten(1)[:, :1] * 0).expand(-1, self.classes).log_softmax(1)
        )

    def rewind(self) -> None:
        """Begin the fresh randomness of calls anew, so that what follows can be repeated."""
        self._calls = 0

    @torch.no_grad()
    def labels(self, x: Tensor, seeds: Sequence[int] = ()) -> tuple[Tensor, float]:
        """Return labels `(R, B)` int64 on the CPU, one run per seed or one in all, and the seconds of the first run.

        What further draws have in common is done once, so that they take less.
        """
        begun = time.perf_counter()
        first = self._run(x, seeds[0] if seeds else 0)
        seconds = time.perf_counter() - begun
        return torch.stack([first, *self._further(x, seeds[1:])]), seconds

    @torch.no_grad()
    def sense(self, x: Tensor) -> Sense | None:
        """Return how foreign inputs `(B, *S)` look, None where `check` found that the defence senses nothing.

        One without an answer looks familiar.
        """
        defence = self.defence
        if not self._senses or not isinstance(defence, Defence):
            return None

        def ask(part: Tensor) -> Tensor:
            sense = defence.sense(part)
            assert sense is not None
            return torch.stack([sense.distance, sense.p_value, sense.foreign.float()], dim=1)

        distance, p_value, foreign = self._safely(x, 0, ask, lambda part: part.new_tensor([[0.0, 1.0, 0.0]])).unbind(1)
        return Sense(distance=distance, p_value=p_value, foreign=foreign.bool())

    def _further(self, x: Tensor, seeds: Sequence[int]) -> Sequence[Tensor]:
        defence = self.defence
        if not (seeds and isinstance(defence, Defence) and type(defence).draws is not Defence.draws):
            return [self._run(x, seed) for seed in seeds]
        silent = torch.full((1, len(seeds)), NO_ANSWER)
        return self._safely(x, seeds[0], lambda part: defence.draws(part, seeds).T.cpu(), lambda part: silent).unbind(1)

    def _run(self, x: Tensor, seed: int) -> Tensor:
        def ask(part: Tensor) -> Tensor:
            if (labels := self._predicted(part, seed)) is not None:
                return _check_labels(labels, len(part), self.classes)
            found = self._log_probabilities(part, seed)
            return found.argmax(1).masked_fill(self._not_finite(found), NO_ANSWER).cpu()

        return self._safely(x, seed, ask, lambda part: torch.full((len(part),), NO_ANSWER))

    def _log_probabilities(self, x: Tensor, seed: int) -> Tensor:
        keywords: dict[str, Any] = {"seed": seed} if self._takes_seed else {}
        return models.ask(self.defence, x, **keywords)

    def _predicted(self, x: Tensor, seed: int) -> Any:
        """Return what the defence's `predict`, if it has one, gives."""
        predict = getattr(self.defence, "predict", None)
        keywords = {"seed": seed} if models.takes_seed(predict) else {}
        return None if predict is None else predict(models.own(self.defence, x), **keywords)

    def _safely(
        self, x: Tensor, seed: int, ask: Callable[[Tensor], Tensor], nothing: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Ask under a seed; where that raises an error, ask in halves, down to the inputs that have no answer."""
        try:
            with self._asked(seed):
                return ask(x)
        except Exception as error:
            if len(x) > 1:
                half = len(x) // 2
                return torch.cat([self._safely(part, seed, ask, nothing) for part in (x[:half], x[half:])])
            self.faults[f"{type(error).__name__}: {error}"[:200]] += 1
            return nothing(x)

    def _not_finite(self, found: Tensor) -> Tensor:
        bad = ~torch.isfinite(found.detach()).all(1)
        if count := int(bad.sum()):
            self.faults["NaN or infinite log-probabilities"] += count
        return bad

    @contextlib.contextmanager
    def _asked(self, seed: int) -> Iterator[None]:
        with models.evaluating(self.defence), seeded(seed, range(torch.cuda.device_count())):
            yield


def is_randomised(defence: object) -> bool:
    """Return whether the answers of `defence` depend on a seed: what it says itself, or whether it takes one."""
    takes = models.takes_seed(defence) or models.takes_seed(getattr(defence, "predict", None))
    return bool(getattr(defence, "randomised", takes))


def describe(defence: object) -> dict[str, Any]:
    """Return a defence's hyper-parameters, `layers` among them, for the settings of a row."""
    return {"layers": list(defence.layers)} | defence.settings() if isinstance(defence, Defence) else {"layers": []}


def told_of(target: object) -> dict[str, Any]:
    """Return the names, and what numbers there are, of the model that an attack runs on."""
    known = vars(target).items() if isinstance(target, nn.Module) else ()
    plain = {k: v for k, v in known if not k.startswith("_") and k != "training" and _plain(v)}
    return {"model": type(target).__name__} | plain


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _check_labels(labels: Any, n: int, classes: int) -> Tensor:
    """Return the labels `(n,)` int64 on the CPU that `predict` gave; -1 is no answer."""
    found = incoming.tensor("what defence.predict returns", labels)
    if found.is_floating_point() or found.dtype == torch.bool or tuple(found.shape) != (n,):
        raise TypeError(
            f"defence.predict must return {n} whole-number labels for {n} inputs, got {tuple(found.shape)} of "
            f"{found.dtype}: return labels, as scores.argmax(1), or leave predict out"
        )
    if n and (int(found.min()) < NO_ANSWER or int(found.max()) >= classes):
        raise ValueError(
            f"defence.predict must return labels in 0 to {classes - 1} (or -1 for no answer), got values in "
            f"[{int(found.min())}, {int(found.max())}]"
        )
    return found.long().cpu()

"""Settings of a maturation, and the presets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from immunonet import _check

# Of more classes than this only the candidates have cells.
MANY = 100


@dataclass(frozen=True, kw_only=True)
class Maturation:
    """How cells evolve. Every value is checked here; errors name the argument.

    Args:
        population: cells T in all, at least 1; rounded up to a multiple of classes times neighbours.
        neighbours: naive B cells K per class.
        generations: G, at least 0. Generation 0 is the expansion: mutated clones of the naive cells. The papers evolve
            them for 10 more; the default is what keeps most under attacks that know the defence (docs/measured.md).
        alignment: the expansion aligns half of the clones of every naive cell with the antigen, if cells are images
            (channels, height, width), by an affine map. None of its numbers moves the image's border by more than this
            share of its side, in [0, 1]. 0: no clone is aligned.
        recombination: the same clones (after alignment) move towards the antigen along the differences between their
            class's naive cells: the ridge, positive, that holds them back, in mean squared lengths of the differences
            from the mean of those cells. None: no clone is recombined.
        temperature: of selection, positive, in units of feature distance; "auto": per antigen, the standard
            deviation of the affinities of its C K naive cells.
        mutation_rate: share of pixels that mutate, in [0, 1]; or (lower end, start), between which it decays.
            A single number has the lower end 0.
        mutation_range: (least, most) amount of a mutation, as a fraction of the width of `cell_bounds`; "auto": per
            antigen, a quarter and three quarters of the spread of its naive cells.
        decay: factor in (0, 1] on rate and range when the population's affinity falls below its best so far.
        crossover: "affinity" (the nearer parent's pixels more often), "authors" (the farther one's), or None.
        plasma: share of the population that votes; memory: the share after it that is kept.
        early_stop: stop an antigen after this many generations in a row with one label in its plasma; None: never.
        prune: a class whose fittest cell is farther than the last plasma cell by more than this fraction stops
            evolving and keeps its last cells; None: never.
        candidates: only the cells of this many classes, those with the nearest naive cells, evolve; the others'
            stay clones or, of more than 100 classes, are left out, and the population is shared among the candidates.
            None: all classes. "auto": all of up to 100; of more, as many as leave every naive cell two clones,
            population / (2 neighbours), at least 10.
    """

    population: int = 1000
    neighbours: int = 10
    generations: int = 0
    alignment: float = 0.06
    recombination: float | None = None
    temperature: float | Literal["auto"] = "auto"
    mutation_rate: float | tuple[float, float] = 0.15
    mutation_range: tuple[float, float] | Literal["auto"] = "auto"
    decay: float = 0.9
    crossover: Literal["affinity", "authors"] | None = "affinity"
    plasma: float = 0.05
    memory: float = 0.20
    early_stop: int | None = 2
    prune: float | None = 0.1
    candidates: int | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        _check.keep(self, _check.integer, "population", "neighbours")
        _check.keep(self, _check.integer, "generations", least=0)
        _check.keep(self, _check.number, "alignment", "memory", least=0, most=1)
        _check.keep(self, _check.number, "decay", "plasma", least=0, most=1, above=True)
        _check.keep(self, _check.number, "recombination", least=0, above=True, optional=True)
        _check.keep(self, _temperature, "temperature")
        _check.keep(self, _rate, "mutation_rate")
        _check.keep(self, _range, "mutation_range")
        _check.keep(self, _check.choice, "crossover", options=("affinity", "authors", None))
        if self.plasma + self.memory > 1 + 1e-9:
            raise ValueError(f"plasma + memory must be at most 1, got {self.plasma:g} + {self.memory:g}")
        _check.keep(self, _check.integer, "early_stop", optional=True)
        _check.keep(self, _candidates, "candidates", optional=True)
        _check.keep(self, _check.number, "prune", least=0, optional=True)

    @property
    def rates(self) -> tuple[float, float]:
        """The lower end and the start of the mutation rate."""
        rate = self.mutation_rate
        return rate if isinstance(rate, tuple) else (0.0, rate)

    def populated(self, classes: int) -> int:
        """Return how many of so many classes have cells: all, or of more than `MANY` the candidates."""
        if classes <= MANY or self.candidates is None:
            return classes
        few = max(10, self.population // (2 * self.neighbours)) if self.candidates == "auto" else self.candidates
        return min(classes, few)

    def evolving(self, classes: int) -> int:
        """Return the cells of how many of so many classes evolve."""
        populated = self.populated(classes)
        return populated if self.candidates is None or self.candidates == "auto" else min(populated, self.candidates)

    def per_class(self, classes: int) -> int:
        """Return P, the cells per class that has any: the population rounded up to a multiple of these and K."""
        return math.ceil(self.population / (self.populated(classes) * self.neighbours)) * self.neighbours

    def total(self, classes: int) -> int:
        """Return T, the cells of all classes."""
        return self.per_class(classes) * self.populated(classes)

    def sizes(self, classes: int) -> tuple[int, int]:
        """Return how many plasma cells (at least 1) and memory cells there are, each share rounded to the nearest."""
        total = self.total(classes)
        plasma = max(1, round(self.plasma * total))
        return plasma, min(round(self.memory * total), total - plasma)

    def changes(self) -> str:
        """Return the settings that differ from the defaults, as code."""
        usual = vars(Maturation())
        return f"Maturation({', '.join(f'{name}={v!r}' for name, v in vars(self).items() if v != usual[name])})"

    @classmethod
    def paper(cls, **overrides: Any) -> Maturation:
        """Return the papers' text as far as it could be reconstructed (arXiv 2107.02842, 2012.10485).

        A small share of pixels mutates by a two-sided band, the nearer parent's pixels are taken more often,
        clones are not aligned, and nothing stops early.
        """
        text: dict[str, Any] = {
            "generations": 10,
            "alignment": 0.0,
            "mutation_rate": (0.05, 0.15),
            "mutation_range": (0.05, 0.15),
            "early_stop": None,
            "prune": None,
            "candidates": None,
        }
        return cls(**text | overrides)

    @classmethod
    def authors(cls, dataset: Literal["mnist", "cifar10"], **overrides: Any) -> Any:
        """Return the settings of the published code: for "mnist" one, for "cifar10" a list, one per layer.

        Departures from the text: nearly every pixel mutates, by an amount uniform in (-.15, .15) at first, and
        the farther parent's pixels are taken more often. MNIST: affinity under `zoo.mnist_affine`. CIFAR-10:
        cells at block 2's output within [0, 5], affinity at block 3, then at block 4.
        """
        _check.choice("dataset", dataset, ("mnist", "cifar10"))
        common: dict[str, Any] = {
            "generations": 10,
            "alignment": 0.0,
            "mutation_rate": 0.985,
            "mutation_range": (0.0, 0.15),
            "crossover": "authors",
            "early_stop": None,
            "prune": None,
            "candidates": None,
        }
        if dataset == "mnist":
            return cls(**common | {"temperature": 18.0} | overrides)
        return [cls(**common | {"temperature": tau, "generations": g} | overrides) for tau, g in ((1.0, 10), (10.0, 5))]


PRESETS: dict[str, Callable[..., Any]] = {
    "default": Maturation,
    "paper": Maturation.paper,
    "authors-mnist": lambda **overrides: Maturation.authors("mnist", **overrides),
    "authors-cifar10": lambda **overrides: Maturation.authors("cifar10", **overrides),
}
"""What makes settings, one for any layer or a list with one per layer, by the name of the preset."""


def preset(name: str, **overrides: Any) -> Any:
    """Return the settings of a preset, some of its values replaced; ValueError for an unknown one."""
    return PRESETS[_check.choice("preset", name, tuple(PRESETS))](**overrides)


def per_layer(maturation: Any, layers: int) -> tuple[Maturation, ...]:
    """Return one maturation for each of so many layers from one for all, a list with one per layer, or None."""
    if maturation is None or isinstance(maturation, Maturation):
        return (maturation or Maturation(),) * layers
    if not isinstance(maturation, Sequence) or not all(isinstance(m, Maturation) for m in maturation):
        raise TypeError(f"maturation must be a Maturation or a list with one per layer, got {maturation!r}")
    if len(maturation) != layers:
        raise ValueError(f"maturation must be one, or one per layer ({layers}), got {len(maturation)}")
    return tuple(maturation)


def _candidates(name: str, value: Any) -> Literal["auto"] | int:
    if isinstance(value, str) and value != "auto":
        raise TypeError(f"{name} must be an integer, 'auto' or None, got {value!r}")
    return "auto" if isinstance(value, str) else _check.integer(name, value)


def _several(value: Any) -> bool:
    return isinstance(value, tuple | list) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 1)


def _rate(name: str, value: Any) -> float | tuple[float, float]:
    return _pair(name, value) if _several(value) else _check.number(name, value, least=0, most=1)


def _range(name: str, value: Any) -> Literal["auto"] | tuple[float, float]:
    return "auto" if isinstance(value, str) and value == "auto" else _pair(name, value)


def _temperature(name: str, value: Any) -> Literal["auto"] | float:
    if isinstance(value, str) and value != "auto":
        raise TypeError(f"{name} must be a number or 'auto', got {value!r}")
    return "auto" if isinstance(value, str) else _check.number(name, value, least=0, above=True)


def _pair(name: str, value: Any) -> tuple[float, float]:
    """Return `value` as (least, most) with 0 <= least <= most <= 1; raise naming the argument otherwise."""
    if not _several(value) or len(value) != 2:
        raise TypeError(f"{name} must be a pair (least, most), got {value!r}")
    least, most = (_check.number(name, v, least=0, most=1) for v in value)
    if least > most:
        raise ValueError(f"{name} must have least <= most, got {value!r}")
    return least, most

"""What is written down: one row per defence and attack, and the file that holds the rows."""

from __future__ import annotations

import dataclasses
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from immunonet import _check, statistics
from immunonet._version import __version__

VERSION = 2
"""Of what is kept between runs: raised whenever an attack, or how it is counted, gives other numbers than before."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """How one defence did under one attack; its fields are the keys of the JSON.

    `dataset`, `defence` ("cnn", "dknn", "rails", ...), `attack` ("none", "pgd", ...) are names; `knows` is what the
    attacker differentiates or queries, "base" (also without an attack) or "defence". `eps` in units of the input,
    `norm` "linf", "l2" or "l1"; the row of several threats together has the norm "union", the largest `eps`, and all
    `threats` in its settings. `n` images, of which `correct` were right, a mean over `seeds` of a randomised defence
    (else empty); `accuracy` is `correct / n`, `ci95` its 95 % interval. `seconds_per_image`: wall time of one answer.
    `settings`: every hyper-parameter. `foreign`: the share that looked foreign, None for a defence that flags nothing.
    """

    dataset: str
    defence: str
    attack: str
    knows: str
    eps: float
    norm: str
    n: int
    correct: float
    accuracy: float
    ci95: tuple[float, float]
    seconds_per_image: float
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    foreign: float | None = None

    @classmethod
    def of(cls, correct: Tensor, *, seeds: Sequence[int] = (), **fields: Any) -> Self:
        """Return the row of `correct` `(R, n)` bool: which images were right in each of R runs, one per seed.

        A defence without randomness has one run and no seeds. The interval is `statistics.interval`.
        ValueError for another shape or number of seeds.
        """
        ci95, (runs, n) = statistics.interval(correct), correct.shape
        if len(seeds or (0,)) != runs:
            raise ValueError(f"seeds must name the {runs} runs of correct, got {list(seeds)}")
        mean = float(correct.double().sum()) / runs
        return cls(n=n, correct=mean, accuracy=mean / n, ci95=ci95, seeds=tuple(seeds), **fields)

    def __post_init__(self) -> None:
        _check.keep(self, _check.choice, "knows", options=("base", "defence"))
        _check.keep(self, _check.number, "seconds_per_image", least=0)
        for key in ("model", "layers", "slice"):
            if key not in self.settings:
                raise ValueError(f"settings must have {key!r}, got {sorted(self.settings)}")

    def to_json(self) -> dict[str, Any]:
        """Return the row as a JSON object; `foreign` only where there is one."""
        found = {**dataclasses.asdict(self), "ci95": list(self.ci95), "seeds": list(self.seeds)}
        return {key: value for key, value in found.items() if key != "foreign" or value is not None}


@dataclass(frozen=True)
class Check:
    """A sanity check: what must hold, whether it did, and the figures."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Flag:
    """Something a reader of the figures must know: whether it was found, the details, and whether it is `serious`."""

    name: str
    raised: bool
    detail: str
    serious: bool = True


def environment() -> dict[str, Any]:
    """Return what results depend on beside the command: versions, processor, threads, commit if it is known."""
    found: dict[str, Any] = {
        "immunonet": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "platform": platform.platform(), "cpu": _cpu(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_device_name()
    root = Path(__file__).parents[3]
    if (root / ".git").exists():
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        answer = subprocess.run(git, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            found["commit"] = answer.stdout.strip()
    return found


def command() -> str:
    """Return the command line of this process, its program by name alone, without folders of this machine."""
    return shlex.join([Path(sys.argv[0]).name, *map(public, sys.argv[1:])])


def public(argument: str) -> str:
    """Return an argument as it may be shown: a path from the working directory on, one that lies elsewhere as DIR."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "DIR"


def envelope(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON object that holds results: themselves, the environment, the command."""
    return {"results": list(results), "environment": environment(), "command": command()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

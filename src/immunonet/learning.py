"""The loop of training: steps, rates, averages of weights, validation, checkpoints and exact resume."""

from __future__ import annotations

import abc
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet import _check, _progress, _store
from immunonet._seeds import seeded
from immunonet.data import Images

_METADATA = "immunonet.checkpoint"

Epoch = dict[str, float]
Progress = Callable[[int, int, list[Epoch]], None]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, how fast and on what a task is trained; the meaning of its settings stands in `zoo.train`."""

    epochs: int = 6
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0
    patience: int | None = None
    augment: bool = False
    bfloat16: bool = False
    ema: float | None = None

    def __post_init__(self) -> None:
        _check.keep(self, _check.integer, "epochs", "batch_size")
        _check.keep(self, _check.integer, "patience", optional=True)
        _check.keep(self, _check.number, "lr", least=0, above=True)
        _check.keep(self, _check.number, "weight_decay", least=0)
        _check.keep(self, _check.integer, "seed", least=0, most=2**63 - 1)
        _check.keep(self, _check.boolean, "augment", "bfloat16")
        _check.keep(self, _check.number, "ema", least=0, most=1, below=True, optional=True)


class Task(abc.ABC):
    """What is trained: a module whose parameters move, what a batch costs, and what is measured after an epoch.

    `module`: its state is what a checkpoint keeps and the best epoch gives back. `decay`: of the optimiser.
    """

    module: nn.Module
    decay: float

    @abc.abstractmethod
    def start(self) -> None:
        """Make ready for the steps of an epoch."""

    @abc.abstractmethod
    def loss(self, x: Tensor, y: Tensor, generator: torch.Generator, epoch: float, cast: Callable[[], Any]) -> Tensor:
        """Return the loss of a batch, `epoch` epochs into training; what casts runs within a fresh `cast()` each."""

    @abc.abstractmethod
    def measured(self) -> Epoch:
        """Return what validation says of the weights as they are."""

    @abc.abstractmethod
    def better(self, row: Epoch) -> tuple[float, ...]:
        """Return what the best epoch has the highest of."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what training depends on beside the module."""

    @abc.abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""


def train_task(
    task: Task, images: Images, schedule: Schedule, known: Mapping[str, Any], checkpoint: str | Path | None,
    on_progress: Progress | None,
) -> list[Epoch]:  # fmt: skip
    """Train a task's module, leave it with its best weights, and return one row per epoch; see `zoo.train`.

    `known`: what a checkpoint depends on beside the schedule, as JSON.
    """
    if not len(images):
        raise ValueError("train_images is empty")
    work = _Work(task, images, schedule, dict(known))
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        work.restore(path)
    with _progress.shown(on_progress, "training") as show:
        while len(work.history) < schedule.epochs and not work.stalled():
            work.epoch(show)
            if path is not None:
                work.save(path)
            if show is not None:
                show(work.step, work.steps, work.history)
    task.module.load_state_dict(work.best)
    task.module.eval()
    return work.history


class _Work:
    """Training under way: everything that the next step depends on."""

    def __init__(self, task: Task, images: Images, schedule: Schedule, known: dict[str, Any]) -> None:
        self.task, self.images, self.schedule = task, images, schedule
        self.settings = dataclasses.asdict(schedule) | known
        self.optimiser = torch.optim.AdamW(task.module.parameters(), lr=schedule.lr, weight_decay=task.decay)
        self.generator = torch.Generator().manual_seed(schedule.seed)
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.steps = schedule.epochs * len(_batches(torch.arange(len(images)), schedule.batch_size))
        self.mean: dict[str, Tensor] | None = None if schedule.ema is None else _state(task.module)

    @property
    def step(self) -> int:
        return self._step

    _step = 0

    def epoch(self, on_progress: Progress | None) -> None:
        task, schedule, n, total = self.task, self.schedule, len(self.images), 0.0
        task.start()
        for chosen in _batches(torch.randperm(n, generator=self.generator), schedule.batch_size):
            total += self._advance(chosen) * len(chosen)
            if on_progress is not None:
                on_progress(self.step, self.steps, self.history)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in task.module.parameters()):
            raise ValueError(self._blown_up("the weights became NaN or infinite"))
        last = _state(task.module) if self.mean is not None else {}
        if self.mean is not None:
            task.module.load_state_dict(self.mean)
        self.history.append({"epoch": len(self.history) + 1, "loss": total / n} | task.measured())
        if self._best() == len(self.history) - 1:
            self.best = _state(task.module)
        if self.mean is not None:
            task.module.load_state_dict(last)

    def _advance(self, chosen: Tensor) -> float:
        """Take one step on some images, and return its mean loss."""
        schedule, task = self.schedule, self.task
        device = next(task.module.parameters()).device
        x, y = self.images.x[chosen], self.images.y[chosen].to(device)
        # Convolutions are faster on channels-last images: a third on one CPU core.
        layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        x = (_augmented(x, self.generator) if schedule.augment else x).to(device, memory_format=layout)
        rate = learning_rate(self.step, self.steps, schedule.lr)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()

        def cast() -> torch.autocast:
            return torch.autocast(device.type, torch.bfloat16, enabled=schedule.bfloat16)

        # Dropout draws from the global generator: the same numbers in every run, and nobody else's.
        with seeded((schedule.seed * 1_000_003 + self.step) % 2**63, [device] if device.type == "cuda" else []):
            loss = task.loss(x, y, self.generator, self.step * schedule.epochs / self.steps, cast)
        if not bool(torch.isfinite(loss)):
            raise ValueError(self._blown_up(f"the loss became {loss.item()}"))
        loss.backward()
        self.optimiser.step()
        self._step += 1
        if self.mean is not None:
            assert schedule.ema is not None
            # The first steps would weigh for long: their mean begins with few.
            share = 1 - min(schedule.ema, self.step / (self.step + 9))
            for key, value in task.module.state_dict().items():
                self.mean[key] = self.mean[key].lerp(value, share) if value.is_floating_point() else value.clone()
        return loss.item()

    def _blown_up(self, what: str) -> str:
        rate, lr = self.optimiser.param_groups[0]["lr"], self.schedule.lr
        return f"{what} at step {self.step} of {self.steps}, lr {rate:.3g}: give a smaller lr than {lr:g}"

    def _best(self) -> int:
        """Return the place of the best epoch; the first of equals."""
        return max(range(len(self.history)), key=lambda i: self.task.better(self.history[i]))

    def stalled(self) -> bool:
        patience = self.schedule.patience
        return patience is not None and bool(self.history) and len(self.history) - 1 - self._best() >= patience

    def save(self, path: Path) -> None:
        """Write everything that the next epoch depends on to one file, so that no two files can disagree."""
        tensors = {f"net.{key}": value for key, value in self.task.module.state_dict().items()}
        tensors |= {f"best.{key}": value for key, value in self.best.items()}
        tensors |= {f"mean.{key}": value for key, value in (self.mean or {}).items()}
        tensors |= {f"task.{key}": value for key, value in self.task.tensors().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{key}": value for key, value in state.items()}
        tensors["generator"] = self.generator.get_state()
        _store.write_tensors(
            path, tensors, {_METADATA: json.dumps({"settings": self.settings, "history": self.history})}
        )

    def restore(self, path: Path) -> None:
        """Bring everything to the checkpoint's state; ValueError if it is another's."""
        tensors = _store.read_tensors(path)
        metadata = _store.read_metadata(path)
        if _METADATA not in metadata:
            raise ValueError(f"checkpoint {path} is not a training checkpoint: remove it or name another file")
        saved = json.loads(metadata[_METADATA])
        both = self.settings | saved["settings"]
        if differing := [key for key in both if saved["settings"].get(key) != self.settings.get(key)]:
            found = ", ".join(f"{key}={saved['settings'].get(key)} (now {self.settings.get(key)})" for key in differing)
            raise ValueError(f"checkpoint {path} was made with {found}: use those settings, or remove it to start anew")
        module = self.task.module
        module.load_state_dict(_part(tensors, "net."))
        state = self.optimiser.state_dict()
        for index in range(len(list(module.parameters()))):
            state["state"][index] = _part(tensors, f"optimiser.{index}.")
        self.optimiser.load_state_dict(state)
        self.generator.set_state(tensors["generator"])
        self.task.restore(_part(tensors, "task."))
        if self.mean is not None:
            self.mean = {key: value.to(self.mean[key].device) for key, value in _part(tensors, "mean.").items()}
        self.history, self.best = saved["history"], _part(tensors, "best.")
        self._step = len(self.history) * (self.steps // self.schedule.epochs)


def _batches(order: Tensor, size: int) -> list[Tensor]:
    """Return places in batches, the last of which is never of one alone: that has no statistics."""
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of step 0..steps-1: linearly up to `peak` in the first fifth, then down a cosine."""
    warm = steps / 5
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    return peak * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def _augmented(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Return each image of (B, C, H, W) mirrored with probability 1/2 and shifted by up to `pad` pixels."""
    n, _, height, width = x.shape
    flip = torch.rand(n, generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    rows, columns = torch.arange(height) + top, torch.arange(width) + left
    padded = F.pad(x, (pad, pad, pad, pad)).movedim(1, 3)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

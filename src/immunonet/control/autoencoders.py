"""Autoencoders of states, trained to bring what is off the manifold of clean states back to it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet import _check, _store, models
from immunonet._seeds import seeded
from immunonet.attacks.gradient import PGD
from immunonet.attacks.norms import NORMS
from immunonet.control.manifolds import Denoiser, project
from immunonet.control.passing import passed, unsteered
from immunonet.control.subspaces import States
from immunonet.data import Images
from immunonet.learning import Epoch, Progress, Schedule, Task, train_task

# Images that an epoch is measured on at once.
_MEASURED = 500


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """How the autoencoder of a layer is built and trained: on what a frozen network gives there for training images.

    The loss is the squared error of the projection, as a share of the variance of clean states, times `mse`, plus the
    cross-entropy of the network that goes on from it (Chen et al. 2022).

    Args:
        epochs, batch_size, lr, seed: of training with AdamW; the rate rises for a fifth of the steps, then falls to 0.
        examples: how many of the training examples are used at most, the first; None: all.
        width: channels of the finest convolutions; vectors get eight times as many hidden values.
        residual: whether finer states are added on the way up; False: all must pass the bottleneck, as published.
        mse: weight of the squared error, at least 0.
        noise: largest change of an input's values in training, either way at random, as a share of `bounds`; the
            projection of what it does to the state must be the clean state. 0: none, as published.
        eps: radius of attacks on the network alone that half of the inputs of a batch meet, 0: none, as published. The
            attack starts at a random point and takes `steps` steps in the ball of `norm` of a random radius up to eps.
        bfloat16: whether convolutions are computed in that type.

    ValueError or TypeError that names the argument.
    """

    epochs: int = 6
    batch_size: int = 128
    lr: float = 2e-3
    seed: int = 0
    examples: int | None = None
    width: int = 16
    residual: bool = True
    mse: float = 1.0
    noise: float = 0.0
    eps: float = 0.0
    norm: str = "linf"
    steps: int = 2
    bfloat16: bool = False

    def __post_init__(self) -> None:
        _check.keep(self, _check.integer, "epochs", "batch_size", "width", "steps")
        _check.keep(self, _check.integer, "examples", optional=True)
        _check.keep(self, _check.integer, "seed", least=0, most=2**63 - 1)
        _check.keep(self, _check.number, "lr", least=0, above=True)
        _check.keep(self, _check.number, "mse", "eps", least=0)
        _check.keep(self, _check.number, "noise", least=0, most=1)
        _check.keep(self, _check.choice, "norm", options=tuple(NORMS))
        _check.keep(self, _check.boolean, "residual", "bfloat16")

    def built(self, shape: Sequence[int], mean: Tensor, scale: Tensor) -> Denoiser:
        """Return an autoencoder of states of `shape`, its weights drawn by the seed, on the device of `mean`."""
        with seeded(self.seed):
            made = Denoiser(shape, width=self.width, residual=self.residual, mean=mean.cpu(), scale=scale.cpu())
        return made.to(mean.device).eval()

    def trained(
        self, model: nn.Module, layer: str, images: Images, held: Images, *, bounds: _check.Bounds,
        states: States, checkpoint: str | Path | None = None, on_progress: Progress | None = None,
    ) -> Denoiser:  # fmt: skip
        """Return the autoencoder of what `layer` of a model gives for `images`; the best epoch on those `held`.

        `states()` gives batches of clean states. Everything depends on the seed alone. ValueError where the loss stops
        being finite, or the checkpoint belongs to something else.
        """
        images = images[: self.examples] if self.examples is not None else images
        mean, scale, shape = _moments(states)
        net = self.built(shape, mean, scale)
        # A copy, so that no gradient is left in the network's parameters, and none is computed for them.
        frozen = copy.deepcopy(models.eager(model)).requires_grad_(False)
        task = _Projecting(self, net, frozen, layer, held, bounds)
        plan = Schedule(
            epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, weight_decay=0.0, seed=self.seed,
            bfloat16=self.bfloat16,
        )  # fmt: skip
        known = dataclasses.asdict(self) | {
            "layer": layer, "model": _store.digest(model.state_dict().values())[:12],
            "images": [_store.digest([part.x, part.y])[:12] for part in (images, held)],
        }  # fmt: skip
        with torch.enable_grad():
            train_task(task, images, plan, known, checkpoint, on_progress)
        return net.requires_grad_(False)


class _Projecting(Task):
    """An autoencoder under training, between a layer of a frozen network and what follows."""

    def __init__(
        self, settings: Autoencoder, net: Denoiser, model: nn.Module, layer: str, held: Images, bounds: _check.Bounds
    ) -> None:
        self.module, self.net, self.decay = net, net, 0.0
        self.settings, self.model, self.layer, self.held, self.bounds = settings, model, layer, held, bounds

    def start(self) -> None:
        """Put the autoencoder in training mode; the network stays in eval mode."""
        self.module.train()

    def loss(self, x: Tensor, y: Tensor, generator: torch.Generator, epoch: float, cast: Callable[[], Any]) -> Tensor:
        """Return the loss of a batch: what is projected is changed, what it should become is not."""
        changed = self._changed(x, y, generator, cast)
        return self._missed(x, changed, y, cast).mean()

    @torch.no_grad()
    def measured(self) -> Epoch:
        """Return the loss and the accuracy on held-out images, changed as in training, by the same numbers always."""
        net, generator, loss, right = self.module, torch.Generator().manual_seed(0), 0.0, 0
        device = self.net.mean.device
        with models.evaluating(net):
            for x, y in zip(self.held.x.split(_MEASURED), self.held.y.split(_MEASURED), strict=True):
                x, y = x.to(device), y.to(device)
                changed = self._changed(x, y, generator, contextlib.nullcontext)
                loss += float(self._missed(x, changed, y, contextlib.nullcontext).sum())
                right += int((self._right(changed, y)).sum())
        return {"validation_loss": loss / len(self.held), "validation_accuracy": right / len(self.held)}

    def better(self, row: Epoch) -> tuple[float, ...]:
        """Return the negative loss."""
        return (-row["validation_loss"],)

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: training depends on nothing else."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take nothing back."""

    def _missed(self, x: Tensor, changed: Tensor, y: Tensor, cast: Callable[[], Any]) -> Tensor:
        """Return the loss `(B,)` of the projections of what changed inputs lead to."""
        layers, net = (self.layer,), self.net
        with torch.no_grad(), cast():
            clean = passed(self.model, layers, x, [unsteered]).states[0]
        with cast():
            way = passed(self.model, layers, changed, [functools.partial(project, net)])
        error = ((way.steered[0].float() - clean) / net.scale).flatten(1).square().mean(1)
        return self.settings.mse * error + F.cross_entropy(way.logits.float(), y, reduction="none")

    def _right(self, changed: Tensor, y: Tensor) -> Tensor:
        way = passed(self.model, (self.layer,), changed, [functools.partial(project, self.module)])
        return way.logits.argmax(1) == y

    def _changed(self, x: Tensor, y: Tensor, generator: torch.Generator, cast: Callable[[], Any]) -> Tensor:
        """Return inputs with noise, every second of them attacked instead where attacks are asked for."""
        low, high = self.bounds.tensors(x, x.shape[1:])
        changed, settings = x, self.settings
        if settings.noise:
            size = torch.rand(len(x), *(1,) * (x.ndim - 1), generator=generator)
            signs = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
            changed = (x + (settings.noise * size * signs).to(x) * (high - low)).clamp(low, high)
        if settings.eps:
            radius = settings.eps * float(torch.rand((), generator=generator))
            seed = int(torch.randint(2**31, (), generator=generator))
            attack = PGD(
                eps=radius, step=1.5 * radius / settings.steps, iterations=settings.steps, norm=settings.norm,
                bounds=self.bounds, seed=seed,
            )  # fmt: skip
            with cast(), models.evaluating(self.model):
                changed = changed.clone()
                changed[::2] = attack(self.model, x[::2], y[::2]).adversarials
        return changed


def _moments(states: States) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return mean and standard deviation of states, per channel of images, and their shape.

    Of vectors `(B, D)` the mean is per value and the deviation one number.
    """
    count, total, squares = 0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    shape: tuple[int, ...] = ()
    for part in states():
        rows = part.movedim(1, -1).flatten(0, -2).double() if part.ndim > 2 else part.double()
        if not count:
            shape, total, squares = tuple(part.shape[1:]), torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
        count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
    mean = total / count
    spread = (squares / count - mean.square()).clamp(min=0)
    spread = spread if len(shape) > 1 else spread.mean().expand_as(spread)
    wide = (-1, *(1,) * (len(shape) - 1))
    return mean.float().reshape(wide), spread.sqrt().clamp(min=1e-6).float().reshape(wide), shape

"""Training of a classifier, plain or adversarial: deterministic by seed, checkpoints and exact resume."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet import _store, models
from immunonet.data import Images
from immunonet.learning import Epoch, Progress, Schedule, Task, train_task
from immunonet.zoo.adversarial import Adversarial, Adversary, robust_accuracies


def train(
    net: nn.Module,
    train_images: Images,
    validation_images: Images,
    *,
    epochs: int = 6,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
    patience: int | None = None,
    augment: bool = False,
    bfloat16: bool = False,
    ema: float | None = None,
    adversarial: Adversarial | None = None,
    checkpoint: str | Path | None = None,
    on_progress: Progress | None = None,
) -> list[Epoch]:
    """Train `net` in place with AdamW on cross-entropy; leave it in eval mode with its best weights.

    The learning rate rises linearly to `lr` over the first fifth of all steps and falls to 0 along a cosine.
    `augment` flips images and shifts them by up to 4 pixels at random. `bfloat16` computes convolutions and
    products in that type (autocast; the loss and the validation stay in float32), twice as fast where the
    processor has it. `ema` in [0, 1): the weights that are validated and kept are a running mean over steps, the older
    ones times `ema` at every step. `adversarial` trains on attacked images, and measures validation under attack too.

    The best epoch has the highest validation accuracy (of adversarial training: under attack), then the lowest
    loss; `patience` epochs in a row without a better one end the training. `checkpoint` is a file written after
    every epoch, from which the same call continues: on a CPU it ends with the weights of an uninterrupted run.
    `on_progress(step, steps, epochs so far)` is called after every step and every epoch; None: a bar in terminals and
    notebooks.

    Returns one row per epoch: `epoch` (from 1), `loss` (training mean), `validation_loss`,
    `validation_accuracy`, and of adversarial training `validation_robust_accuracy` (`robust_accuracies`, under all
    threats at once) and, of several threats, `validation_<norm>_accuracy`. ValueError if the loss stops being finite,
    or if the checkpoint belongs to other settings, other images, another network or other first weights.
    """
    for name, images in (("train_images", train_images), ("validation_images", validation_images)):
        if not len(images):
            raise ValueError(f"{name} is empty")
    if adversarial is not None:
        adversarial.check_room(train_images.x)
    known = {
        "adversarial": None if adversarial is None else adversarial.told(),
        "first_weights": _store.digest(net.state_dict().values())[:12],
        "images": [_store.digest([part.x, part.y])[:12] for part in (train_images, validation_images)],
    }
    plan = Schedule(
        epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, seed=seed, patience=patience,
        augment=augment, bfloat16=bfloat16, ema=ema,
    )  # fmt: skip
    task = _Training(net, validation_images, adversarial, plan)
    return train_task(task, train_images, plan, known, checkpoint, on_progress)


class _Training(Task):
    """A network under training, plain or adversarial."""

    def __init__(self, net: nn.Module, validation: Images, adversarial: Adversarial | None, plan: Schedule) -> None:
        self.module, self.decay, self.validation = net, plan.weight_decay, validation
        self.adversary = None if adversarial is None else Adversary(adversarial)

    def start(self) -> None:
        """Put the network in training mode."""
        self.module.train()

    def loss(self, x: Tensor, y: Tensor, generator: torch.Generator, epoch: float, cast: Callable[[], Any]) -> Tensor:
        """Return the cross-entropy of a batch, or what the adversary makes of it."""
        net = self.module

        def learn(inputs: Tensor) -> Tensor:
            return models.tensor_of(net(models.own(net, inputs) if self.adversary else inputs))

        if self.adversary is None:
            with cast():
                return F.cross_entropy(learn(x).float(), y)
        # Two contexts: what autocast keeps of the weights during the attack must not serve the loss.
        with cast(), models.evaluating(net):
            found = self.adversary.attacked(functools.partial(models.ask, net), x, y, generator, epoch)
        with cast():
            return self.adversary.objective(learn, x, found[0], y, found[1])

    def measured(self) -> Epoch:
        """Return loss and accuracy on the validation images, and the accuracy under attack."""
        loss, right = _measure(self.module, self.validation)
        row = {"validation_loss": loss, "validation_accuracy": right}
        if self.adversary is not None:
            under = robust_accuracies(self.module, self.validation, threats=self.adversary.settings.measured)
            row["validation_robust_accuracy"] = under.pop("union")
            row |= {f"validation_{norm}_accuracy": share for norm, share in under.items() if len(under) > 1}
        return row

    def better(self, row: Epoch) -> tuple[float, ...]:
        """Return the accuracy that counts, then the loss."""
        return row.get("validation_robust_accuracy", row["validation_accuracy"]), -row["validation_loss"]

    def tensors(self) -> dict[str, Tensor]:
        """Return what the adversary has seen."""
        return {} if self.adversary is None else self.adversary.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take it back."""
        if self.adversary is not None:
            self.adversary.restore(tensors)


def accuracy(net: nn.Module, images: Images, *, batch_size: int = 500) -> float:
    """Return the share of `images` that `net` classifies rightly, in [0, 1]."""
    return _measure(net, images, batch_size)[1]


@torch.no_grad()
def _measure(net: nn.Module, images: Images, batch_size: int = 500) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy."""
    loss, correct = 0.0, 0
    batches = zip(torch.split(images.x, batch_size), torch.split(images.y, batch_size), strict=True)
    device = next((parameter.device for parameter in net.parameters()), images.x.device)
    for x, y in batches:
        logits, y = models.logits(net, x.to(device)), y.to(device)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        correct += int((logits.argmax(1) == y).sum())
    return loss / len(images), correct / len(images)

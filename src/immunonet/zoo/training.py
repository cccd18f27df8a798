"""Training of a classifier, plain or adversarial: deterministic by seed, checkpoints and exact resume."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet import _check, _store, models
from immunonet.data import Images
from immunonet.zoo.adversarial import Adversarial, robust_accuracy

_METADATA = "immunonet.checkpoint"

Epoch = dict[str, float]
Progress = Callable[[int, int, list[Epoch]], None]


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
    adversarial: Adversarial | None = None,
    checkpoint: str | Path | None = None,
    on_progress: Progress | None = None,
) -> list[Epoch]:
    """Train `net` in place with AdamW on cross-entropy; leave it in eval mode with its best weights.

    The learning rate rises linearly to `lr` over the first fifth of all steps and falls to 0 along a cosine.
    `augment` flips images and shifts them by up to 4 pixels at random. `bfloat16` computes convolutions and
    products in that type (autocast; the loss and the validation stay in float32), twice as fast where the
    processor has it. `adversarial` trains on attacked images, and measures validation under attack too.

    The best epoch has the highest validation accuracy (of adversarial training: under attack), then the lowest
    loss; `patience` epochs in a row without a better one end the training. `checkpoint` is a file written after
    every epoch, from which the same call continues: on a CPU it ends with the weights of an uninterrupted run.
    `on_progress(step, steps, epochs so far)` is called after every step and every epoch.

    Returns one row per epoch: `epoch` (from 1), `loss` (training mean), `validation_loss`,
    `validation_accuracy`, and of adversarial training `validation_robust_accuracy` (`robust_accuracy`). ValueError
    if the loss stops being finite, or if the checkpoint belongs to other settings, other images, another
    network or other first weights.
    """
    settings: dict[str, Any] = {
        "epochs": _check.integer("epochs", epochs),
        "batch_size": _check.integer("batch_size", batch_size),
        "lr": _check.number("lr", lr, least=0, above=True),
        "weight_decay": _check.number("weight_decay", weight_decay, least=0),
        "seed": _check.integer("seed", seed, least=0, most=2**63 - 1),
        "patience": None if patience is None else _check.integer("patience", patience),
        "augment": _check.boolean("augment", augment),
        "bfloat16": _check.boolean("bfloat16", bfloat16),
        "adversarial": None if adversarial is None else dataclasses.asdict(adversarial),
        "first_weights": hashlib.sha256(safetensors.torch.save(net.state_dict())).hexdigest()[:12],
        "images": [_store.digest([part.x, part.y])[:12] for part in (train_images, validation_images)],
    }
    epochs, batch_size, lr, weight_decay = (settings[k] for k in ("epochs", "batch_size", "lr", "weight_decay"))
    seed, patience, augment, bfloat16 = (settings[k] for k in ("seed", "patience", "augment", "bfloat16"))
    for name, images in (("train_images", train_images), ("validation_images", validation_images)):
        if not len(images):
            raise ValueError(f"{name} is empty")
    device = next(net.parameters()).device
    steps = epochs * math.ceil(len(train_images) / batch_size)
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    history: list[Epoch] = []
    best: dict[str, Tensor] = {}
    if checkpoint is not None and Path(checkpoint).exists():
        history, best = _restore(Path(checkpoint), settings, net, optimiser, generator)
    step = len(history) * (steps // epochs)
    while len(history) < epochs and not _stalled(history, patience):
        net.train()
        total = 0.0
        for chosen in torch.split(torch.randperm(len(train_images), generator=generator), batch_size):
            x, y = train_images.x[chosen], train_images.y[chosen].to(device)
            # Convolutions are faster on channels-last images: a third on one CPU core.
            layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
            x = (_augmented(x, generator) if augment else x).to(device, memory_format=layout)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
            optimiser.zero_grad()
            # Two contexts: what autocast keeps of the weights during the attack must not serve the loss.
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                attacked = adversarial.attacked(net, x, y, generator, step * epochs / steps) if adversarial else x
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss = (
                    adversarial.objective(net, x, attacked, y)
                    if adversarial
                    else F.cross_entropy(models.tensor_of(net(x)).float(), y)
                )
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the loss became {loss.item()} at step {step}: give a smaller lr than {lr:g}")
            loss.backward()
            optimiser.step()
            total += loss.item() * len(chosen)
            step += 1
            if on_progress is not None:
                on_progress(step, steps, history)
        validation_loss, validation_accuracy = _measure(net, validation_images)
        history.append(
            {
                "epoch": len(history) + 1,
                "loss": total / len(train_images),
                "validation_loss": validation_loss,
                "validation_accuracy": validation_accuracy,
            }
        )
        if adversarial is not None:
            robust = robust_accuracy(net, validation_images, eps=adversarial.measured_eps)
            history[-1]["validation_robust_accuracy"] = robust
        if _best(history) == len(history) - 1:
            best = {key: value.clone() for key, value in net.state_dict().items()}
        if checkpoint is not None:
            _save(Path(checkpoint), settings, net, optimiser, generator, history, best)
        if on_progress is not None:
            on_progress(step, steps, history)
    net.load_state_dict(best)
    net.eval()
    return history


def accuracy(net: nn.Module, images: Images, *, batch_size: int = 500) -> float:
    """Return the share of `images` that `net` classifies rightly, in [0, 1]."""
    return _measure(net, images, batch_size)[1]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of step 0..steps-1: linearly up to `peak` in the first fifth, then down a cosine."""
    warm = steps / 5
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    return peak * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


@torch.no_grad()
def _measure(net: nn.Module, images: Images, batch_size: int = 500) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy."""
    loss, correct = 0.0, 0
    batches = zip(torch.split(images.x, batch_size), torch.split(images.y, batch_size), strict=True)
    for x, y in batches:
        logits = models.logits(net, x)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        correct += int((logits.argmax(1) == y).sum())
    return loss / len(images), correct / len(images)


def _augmented(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Return each image of (B, C, H, W) mirrored with probability 1/2 and shifted by up to `pad` pixels."""
    n, _, height, width = x.shape
    flip = torch.rand(n, generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    rows, columns = torch.arange(height) + top, torch.arange(width) + left
    padded = F.pad(x, (pad, pad, pad, pad)).movedim(1, 3)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()


def _best(history: list[Epoch]) -> int:
    """Return the index of the best epoch; the first of equals."""
    return max(
        range(len(history)),
        key=lambda i: (
            history[i].get("validation_robust_accuracy", history[i]["validation_accuracy"]),
            -history[i]["validation_loss"],
        ),
    )


def _stalled(history: list[Epoch], patience: int | None) -> bool:
    return patience is not None and bool(history) and len(history) - 1 - _best(history) >= patience


def _save(
    path: Path,
    settings: dict[str, Any],
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
    history: list[Epoch],
    best: dict[str, Tensor],
) -> None:
    """Write everything that the next epoch depends on to one file, so that no two files can disagree."""
    tensors = {f"net.{key}": value for key, value in net.state_dict().items()}
    tensors |= {f"best.{key}": value for key, value in best.items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{key}": value for key, value in state.items()}
    tensors["generator"] = generator.get_state()
    _store.write_tensors(path, tensors, {_METADATA: json.dumps({"settings": settings, "history": history})})


def _restore(
    path: Path,
    settings: dict[str, Any],
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
) -> tuple[list[Epoch], dict[str, Tensor]]:
    """Bring net, optimiser and generator to the checkpoint's state; return its history and best weights."""
    tensors = _store.read_tensors(path)
    metadata = _store.read_metadata(path)
    if _METADATA not in metadata:
        raise ValueError(f"checkpoint {path} is not a training checkpoint: remove it or name another file")
    saved = json.loads(metadata[_METADATA])
    if differing := [key for key, value in settings.items() if saved["settings"].get(key) != value]:
        found = ", ".join(f"{key}={saved['settings'].get(key)} (now {settings[key]})" for key in differing)
        raise ValueError(f"checkpoint {path} was made with {found}: use those settings, or remove it to start anew")
    net.load_state_dict(_part(tensors, "net."))
    state = optimiser.state_dict()
    for index in range(len(list(net.parameters()))):
        state["state"][index] = _part(tensors, f"optimiser.{index}.")
    optimiser.load_state_dict(state)
    generator.set_state(tensors["generator"])
    return saved["history"], _part(tensors, "best.")


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

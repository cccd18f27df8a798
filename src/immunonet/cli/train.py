"""`immunonet train`."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from immunonet import _check, data, zoo
from immunonet.cli import common
from immunonet.evaluation.records import envelope
from immunonet.zoo.adversarial import COMBINED, LOSSES

# Settings of attacks that may be given as fractions.
_FRACTIONS = ("eps", "attack_step", "validation_eps")


def train(
    dataset: common.DatasetArgument,
    model: common.ModelOption = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Default: 5, or for a small dataset as many as make 1,000 steps.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    lr: Annotated[float, typer.Option(help="The highest learning rate of the schedule.")] = 1e-3,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many epochs without a better one. Default: never.")
    ] = None,
    validation: Annotated[
        int | None, typer.Option(min=1, help="Images held out. Default: 3000, or a tenth of a small dataset.")
    ] = None,
    augment: Annotated[bool, typer.Option("--augment", help="Flip and shift the training images.")] = False,
    bfloat16: Annotated[
        bool, typer.Option("--bfloat16", help="Compute in bfloat16: twice as fast where the processor has it.")
    ] = False,
    start: Annotated[Path | None, typer.Option(metavar="FILE.safetensors", help="Weights to go on from.")] = None,
    adversarial: Annotated[
        str | None, typer.Option(help="Train on attacked images: pgd (Madry et al.) or trades (Zhang et al.).")
    ] = None,
    eps: Annotated[str | None, typer.Option(help="Size of that attack, such as 0.3. Default: 8/255.")] = None,
    attack_step: Annotated[str | None, typer.Option(help="Its step. Default: a quarter of eps.")] = None,
    attack_iterations: Annotated[int | None, typer.Option(help="Its number of steps. Default: 7.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of robustness in trades. Default: 6.")] = None,
    ramp: Annotated[int | None, typer.Option(help="Epochs over which eps rises from 0. Default: 0.")] = None,
    validation_eps: Annotated[str | None, typer.Option(help="Size of the attack on validation. Default: eps.")] = None,
    threat: common.ThreatOption = None,
    combine: Annotated[
        str | None, typer.Option(help=f"How several threats make one loss: {', '.join(COMBINED)}. Default: max.")
    ] = None,
    ema: Annotated[
        float | None, typer.Option(help="Keep a running mean of the weights, the older ones times this at every step.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the files that are written. Default: the dataset's.")
    ] = None,
    image: common.ImageOption = None,
    label: common.LabelOption = None,
    size: common.SizeOption = None,
    background: common.BackgroundOption = "white",
    seed: common.SeedOption = 0,
    device: common.DeviceOption = "cpu",
    data_dir: common.DataOption = None,
    out: common.OutOption = Path("weights"),
    json: common.JsonOption = None,
) -> None:
    """Train a classifier and write DIR/NAME.safetensors with its recipe.

    A fixed validation split is held out. With --adversarial the best epoch is the one with the highest accuracy on
    attacked validation images (of more than 1,000 a fixed random sample). The run leaves a checkpoint after every
    epoch, and the same command continues from it.
    """
    target = common.resolve_device(device)
    hardening = _hardening(
        adversarial, eps=eps, attack_step=attack_step, attack_iterations=attack_iterations, beta=beta, ramp=ramp,
        validation_eps=validation_eps, threats=common.threats(threat), combine=combine,
    )  # fmt: skip
    common.prepare(out, json)
    how: dict[str, Any] = {"image": image, "label": label, "size": size, "background": background}
    images = common.resolve_dataset(dataset, "train", data_dir, **how)
    test = common.resolve_dataset(dataset, "test", data_dir, **how, classes=images.classes)
    training, held_out = data.split(len(images), validation)
    if epochs is None:
        epochs = max(5, math.ceil(1000 / math.ceil(len(training) / batch_size)))
    network = common.model_name(model, images)
    net = common.build_model(network, classes=len(images.classes), seed=seed).to(target)
    common.check_model(network, net, images)
    if start is not None:
        zoo.load_weights(net, start)
    path = out / f"{name or Path(dataset).stem}.safetensors"
    checkpoint = path.with_suffix(".checkpoint.safetensors")
    settings: dict[str, Any] = {
        "batch_size": batch_size, "lr": lr, "patience": patience, "augment": augment,
        "bfloat16": bfloat16, "seed": seed, "ema": ema,
    }  # fmt: skip
    history = common.trained(
        "training", checkpoint, epochs, zoo.train, net, images[training], images[held_out], adversarial=hardening,
        **settings,
    )  # fmt: skip
    net.half().float()  # what is measured below is what the file will hold
    settings |= common.told(how) | {
        "epochs": epochs,
        "start": start and start.name,
        "adversarial": hardening and asdict(hardening),
    }
    results = [
        {
            "dataset": dataset, "model": network, "split": split, "n": len(part), "accuracy": zoo.accuracy(net, part),
            **_attacked(net, part, hardening), "settings": settings,
        }
        for split, part in (("validation", images[held_out]), ("test", test))
    ]  # fmt: skip
    zoo.save_weights(net, path, recipe={**envelope(results), "classes": images.classes, "history": history})
    common.write_results(json, results)
    checkpoint.unlink()
    for row in results:
        typer.echo(f"{row['split']} accuracy {row['accuracy']:.4f} on {row['n']} images")
        for under, accuracy in row.get("robust_accuracies", {}).items():
            typer.echo(f"{row['split']} accuracy {accuracy:.4f} under attack ({under}) on {row['robust_n']} images")
    typer.echo(f"weights: {path}")


def _attacked(net: nn.Module, images: data.Images, hardening: zoo.Adversarial | None) -> dict[str, Any]:
    """Return the accuracy under attack, and of how many and which images; nothing of plain training."""
    if hardening is None:
        return {}
    n, radii = min(1000, len(images)), hardening.measured
    found = zoo.robust_accuracies(net, images, threats=radii, most=n)
    union = found.pop("union")
    each = {f"{'eps' if norm == 'linf' else norm} {eps:g}": found[norm] for norm, eps in radii.items()}
    return {
        "robust_accuracy": union, "robust_accuracies": each | ({"all of them": union} if len(radii) > 1 else {}),
        "robust_n": n, "robust_slice": {"sample": [n, len(images)], "seed": 0},
    }  # fmt: skip


def _hardening(adversarial: str | None, **settings: Any) -> zoo.Adversarial | None:
    """Return the settings of adversarial training; ValueError names the options that are given without it."""
    given = {key: value for key, value in settings.items() if value is not None}
    options = {key: f"--{key.replace('_', '-').replace('threats', 'threat')}" for key in given}
    if adversarial is None:
        if given:
            raise ValueError(f"{' and '.join(options.values())} need --adversarial pgd or trades")
        return None
    _check.choice("--adversarial", adversarial, LOSSES)
    fields: dict[str, Any] = {
        key.removeprefix("attack_"): _check.fraction(options[key], value) if key in _FRACTIONS else value
        for key, value in given.items()
    }
    return zoo.Adversarial(loss=adversarial, **fields)

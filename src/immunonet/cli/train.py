"""`immunonet train`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from immunonet import data, zoo
from immunonet.cli import common
from immunonet.evaluation.records import envelope


def train(
    dataset: common.DatasetArgument,
    model: common.ModelOption = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Default: 5, or for a small dataset as many as make 1,000 steps."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    lr: Annotated[float, typer.Option(help="The highest learning rate of the schedule.")] = 1e-3,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many epochs without a better one. Default: never."),
    ] = None,
    validation: Annotated[
        int | None,
        typer.Option(min=1, help="Images held out from training. Default: 3000, or a tenth of a small dataset."),
    ] = None,
    augment: Annotated[bool, typer.Option("--augment", help="Flip and shift the training images.")] = False,
    bfloat16: Annotated[
        bool, typer.Option("--bfloat16", help="Compute in bfloat16: twice as fast where the processor has it.")
    ] = False,
    seed: common.SeedOption = 0,
    device: common.DeviceOption = "cpu",
    data_dir: common.DataOption = None,
    out: common.OutOption = Path("weights"),
    json: common.JsonOption = None,
) -> None:
    """Train a classifier and write DIR/NAME.safetensors with its recipe.

    A fixed validation split is held out. The run leaves a checkpoint after every epoch, and the same command
    continues from it.
    """
    target = common.resolve_device(device)
    common.prepare(out, json)
    images = common.resolve_dataset(dataset, "train", data_dir)
    test = common.resolve_dataset(dataset, "test", data_dir)
    training, held_out = data.split(len(images), validation)
    if epochs is None:
        epochs = max(5, math.ceil(1000 / math.ceil(len(training) / batch_size)))
    name = common.model_name(model, images)
    net = common.build_model(name, classes=len(images.classes), seed=seed).to(target)
    common.check_model(name, net, images)
    path = out / f"{Path(dataset).stem}.safetensors"
    checkpoint = path.with_suffix(".checkpoint.safetensors")
    settings: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "patience": patience,
        "augment": augment,
        "bfloat16": bfloat16,
        "seed": seed,
    }
    if checkpoint.exists():
        common.console.print(f"continuing from {checkpoint}", markup=False, soft_wrap=True)
    with common.progress() as bar:
        task = bar.add_task("training")
        reported = 0

        def show(step: int, steps: int, history: list[zoo.Epoch]) -> None:
            nonlocal reported
            bar.update(task, completed=step, total=steps)
            for row in history[reported:]:
                bar.console.print(
                    f"epoch {row['epoch']} of {epochs}: loss {row['loss']:.4f}, "
                    f"validation accuracy {row['validation_accuracy']:.4f}"
                )
            reported = len(history)

        history = zoo.train(
            net, images[training], images[held_out], **settings, checkpoint=checkpoint, on_progress=show
        )
    net.half().float()  # what is measured below is what the file will hold
    results = [
        {
            "dataset": dataset,
            "model": name,
            "split": split,
            "n": len(part),
            "accuracy": zoo.accuracy(net, part),
            "settings": settings,
        }
        for split, part in (("validation", images[held_out]), ("test", test))
    ]
    zoo.save_weights(net, path, recipe={**envelope(results), "classes": images.classes, "history": history})
    common.write_results(json, results)
    checkpoint.unlink()
    for row in results:
        typer.echo(f"{row['split']} accuracy {row['accuracy']:.4f} on {row['n']} images")
    typer.echo(f"weights: {path}")

"""`immunonet predict`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from immunonet import _store, data
from immunonet.cli import common
from immunonet.cli.fitted import opened
from immunonet.client import Client
from immunonet.defences.base import DEFENCE_FILE, Defence
from immunonet.evaluation.journal import Journal

# Images of one request to a service.
ASKED = 16
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Image files, folders of images, Parquet files or folders of them, hf:OWNER/NAME, or names of "
            "datasets. A file or folder that is there goes before a name.",
        ),
    ],
    defence: Annotated[Path, typer.Option(metavar="DIR", help="Folder that fit wrote.")] = Path("defence"),
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask a running immunonet serve instead; $IMMUNONET_TOKEN is sent.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="As given to fit, which is the default.")] = None,
    weights: common.WeightsOption = None,
    split: Annotated[str, typer.Option(help="Of a dataset: train or test.")] = "test",
    image: common.ImageOption = None,
    size: Annotated[int | None, typer.Option(min=1, help="As given to fit, which is the default.")] = None,
    background: Annotated[str | None, typer.Option(help="White or black. Default: as given to fit.")] = None,
    chunk: common.ChunkOption = 100,
    seed: common.SeedOption = 0,
    device: common.DeviceOption = "cpu",
    data_dir: common.DataOption = None,
    out: common.OutOption = Path("predictions"),
    json: common.JsonOption = None,
) -> None:
    """Classify images with a fitted defence: one line per image, its columns parted by tabs.

    They are the image's name, its label, the share of votes for it, its credibility (a p-value), and "foreign" if
    the image looks unlike the training images. Finished parts are kept in DIR, and the same command continues from
    them. Labels that the images may have are not looked at.
    """
    if url is not None:
        how = {"size": size, "background": background or "white"}
        names, x = read(inputs, split, data_dir, None, image=image, **how)
        common.prepare(None, json)
        _tell([{"input": name} | row for name, row in zip(names, asked(url, x), strict=True)], json)
        return
    target = common.resolve_device(device)
    fitted, record = opened(defence, model, weights, target)
    how = {"size": size or record.get("size"), "background": background or record.get("background", "white")}
    names, x = read(inputs, split, data_dir, getattr(fitted, "shape", None), image=image, **how)
    common.prepare(out, json)
    whose = [_store.sha256(defence / DEFENCE_FILE), record["weights"], seed, target.type]
    journal = Journal(out / "parts.jsonl")
    found: list[dict[str, Any]] = []
    with common.progress() as bar:
        for start in bar.track(range(0, len(x), chunk), description="predicting"):
            part = x[start : start + chunk]
            if (key := _store.fingerprint([*whose, _store.digest([part])])) not in journal:
                journal.add(key, answers(fitted, part.to(target), seed))
            found += journal[key]
    # A network may know more classes than a training set without names has shown.
    results = [
        {"input": name, "name": dict(enumerate(record["classes"])).get(answer["label"], str(answer["label"]))} | answer
        for name, answer in zip(names, found, strict=True)
    ]
    _tell(results, json)


def _tell(results: list[dict[str, Any]], json: Path | None) -> None:
    typer.echo("input\tlabel\tshare\tcredibility\tforeign")
    for row in results:
        flag = "foreign" if row["foreign"] else ""
        share, credibility = ("" if row[key] is None else f"{row[key]:.3f}" for key in ("share", "credibility"))
        typer.echo(f"{row['input']}\t{row['name']}\t{share}\t{credibility}\t{flag}")
    common.write_results(json, results)


def asked(url: str, x: Tensor) -> list[dict[str, Any]]:
    """Return what a running service says of images `(N, C, H, W)`, as `answers` does, with the names of labels.

    The share is None where the service gives labels alone.
    """
    found: list[dict[str, Any]] = []
    with common.progress() as bar, Client(url, token=os.environ.get("IMMUNONET_TOKEN")) as client:
        for part in bar.track(x.split(ASKED), description="asking"):
            found += [
                {
                    "label": one.label, "name": one.name, "share": one.votes and one.votes[one.label],
                    "credibility": one.credibility, "foreign": one.foreign,
                }
                for one in client.respond(part)
            ]  # fmt: skip
    return found


@torch.no_grad()
def answers(defence: Defence, x: Tensor, seed: int) -> list[dict[str, Any]]:
    """Return per image `(B, *S)` its `label`, the `share` of votes for it, its `credibility`, and `foreign`.

    Credibility and foreign are None for a kind of defence that has none; its share is the probability it gives.
    """
    answer = defence.answered(x, seed)
    shares = answer.probabilities.gather(1, answer.labels[:, None])[:, 0].tolist()
    n = len(answer.labels)
    credibility = [None] * n if answer.credibility is None else answer.credibility.tolist()
    foreign = [None] * n if answer.sense is None else answer.sense.foreign.tolist()
    return [
        {"label": label, "share": round(share, 6), "credibility": p and round(p, 6), "foreign": strange}
        for label, share, p, strange in zip(answer.labels.tolist(), shares, credibility, foreign, strict=True)
    ]


def read(
    inputs: list[str],
    split: str,
    directory: Path | None,
    shape: tuple[int, ...] | None,
    *,
    image: str | None = None,
    **how: Any,
) -> tuple[list[str], Tensor]:
    """Return a name for each image of all inputs, and the images `(N, *shape)` in [0, 1].

    Grey images become colour for a defence of colour images. A path that exists goes before a dataset's name. `image`
    and `how` (`size`, `background`) are those of `data.read`. FileNotFoundError or ValueError names the input that is
    not there, has no images, or has images of another shape.
    """
    names: list[str] = []
    parts: list[Tensor] = []
    for one in inputs:
        path, there = Path(one), common.is_path(one)
        files = _files(path) if there else []
        if files:
            x = data.read_images(files, **how)
        elif there or one.startswith("hf:"):
            x = data.read(one, None if path.is_file() else split, image=image, labelled=False, **how).x
        elif one in data.DATASETS:
            x = data.load(one, split, directory=directory, image=image, labelled=False, **how).x
        else:
            raise FileNotFoundError(
                "INPUT must be an image file, a folder of images, a Parquet file or a folder of them, "
                f"hf:OWNER/NAME or {', '.join(data.DATASETS)}; there is no {one!r}"
            )
        names += map(str, files) if files else [f"{one}:{i}" for i in range(len(x))]
        parts.append(data.shaped(x, shape, one))
    return names, torch.cat(parts)


def _files(path: Path) -> list[Path]:
    """Return the image files of a path that exists; none if it holds Parquet."""
    if path.is_file():
        return [] if path.suffix == ".parquet" else [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files and next(path.rglob("*.parquet"), None) is None:
        raise ValueError(f"{path} has no images ({', '.join(SUFFIXES)})")
    return files

"""`immunonet predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from immunonet import RAILS, DkNN, _store, data
from immunonet.cli import common
from immunonet.cli.fit import DEFENCES, RECORD
from immunonet.defences.base import DEFENCE_FILE, Defence
from immunonet.evaluation.journal import Journal

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
    defence: Annotated[Path, typer.Option("--defence", metavar="DIR", help="Folder that fit wrote.")] = Path("defence"),
    model: Annotated[str | None, typer.Option("--model", help="As given to fit, which is the default.")] = None,
    weights: common.WeightsOption = None,
    split: Annotated[str, typer.Option("--split", help="Of a dataset: train or test.")] = "test",
    image: common.ImageOption = None,
    size: Annotated[int | None, typer.Option("--size", min=1, help="As given to fit, which is the default.")] = None,
    background: Annotated[
        str | None, typer.Option("--background", help="As given to fit, which is the default: white or black.")
    ] = None,
    chunk: Annotated[int, typer.Option("--chunk", min=1, help="Images per part that is kept.")] = 100,
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
    target = common.resolve_device(device)
    record = _record(defence)
    net = common.load_model(model or record["model"], weights, target, classes=len(record["classes"]))
    if _store.digest(net.state_dict().values()) != record["weights"]:
        raise ValueError(f"--weights {weights} are not those that {defence} was fitted with")
    layers = [common.resolve_layer(name, net) for name in record["settings"]["layers"]]
    fitted = DEFENCES[record["defence"]].load(defence, net, layers)
    names, x = read(
        inputs,
        split,
        data_dir,
        fitted.shape,
        image=image,
        size=size or record.get("size"),
        background=background or record.get("background", "white"),
    )
    common.prepare(out, json)
    settings = {
        "defence": _store.sha256(defence / DEFENCE_FILE),
        "images": _store.digest([x]),
        "chunk": chunk,
        "seed": seed,
        "device": target.type,
    }
    journal = Journal(out / f"{_store.fingerprint(settings)[:16]}.jsonl", settings)
    with common.progress() as bar:
        for start in bar.track(range(0, len(x), chunk), description="predicting"):
            if str(start) not in journal:
                journal.add(str(start), answers(fitted, x[start : start + chunk].to(target), seed))
    found = (answer for start in range(0, len(x), chunk) for answer in journal[str(start)])
    results = [
        # A network may know more classes than a training set without names has shown.
        {"input": name, "name": dict(enumerate(record["classes"])).get(answer["label"], str(answer["label"]))} | answer
        for name, answer in zip(names, found, strict=True)
    ]
    typer.echo("input\tlabel\tshare\tcredibility\tforeign")
    for row in results:
        flag = "foreign" if row["foreign"] else ""
        credibility = "" if row["credibility"] is None else f"{row['credibility']:.3f}"
        typer.echo(f"{row['input']}\t{row['name']}\t{row['share']:.3f}\t{credibility}\t{flag}")
    common.write_results(json, results)


@torch.no_grad()
def answers(defence: Defence, x: Tensor, seed: int) -> list[dict[str, Any]]:
    """Return per image `(B, *S)` its `label`, the `share` of votes for it, its `credibility`, and `foreign`.

    Credibility is None for a kind of defence that has none; its share is the probability it gives.
    """
    credibility: Tensor | None = None
    if isinstance(defence, RAILS):
        response = defence.respond(x, seed=seed)
        labels, votes, credibility, foreign = (
            response.labels,
            response.votes,
            response.credibility,
            response.foreign,
        )
    elif isinstance(defence, DkNN):
        labels, votes = defence.predict(x), defence.predict_proba(x)
        credibility, foreign = defence.credibility(x), defence.foreign(x)
    else:
        votes, foreign = defence(x).exp(), defence.foreign(x)
        labels = votes.argmax(1)
    shares = votes.gather(1, labels[:, None])[:, 0]
    p_values = [None] * len(labels) if credibility is None else [round(p, 6) for p in credibility.tolist()]
    columns = (labels.tolist(), shares.tolist(), p_values, foreign.tolist())
    return [
        {"label": label, "share": round(share, 6), "credibility": p, "foreign": strange}
        for label, share, p, strange in zip(*columns, strict=True)
    ]


def read(
    inputs: list[str],
    split: str,
    directory: Path | None,
    shape: tuple[int, ...],
    *,
    image: str | None = None,
    size: int | None = None,
    background: str = "white",
) -> tuple[list[str], Tensor]:
    """Return a name for each image of all inputs, and the images `(N, *shape)` in [0, 1].

    Grey images become colour for a defence of colour images. A path that exists goes before a dataset's name. `image`,
    `size` and `background` are those of `data.read`. FileNotFoundError or ValueError names the input that is not
    there, has no images, or has images of another shape.
    """
    names: list[str] = []
    parts: list[Tensor] = []
    for one in inputs:
        path, there = Path(one), common.is_path(one)
        if files := _files(path) if there else []:
            x = data.read_images(files, size=size, background=background)
            names += map(str, files)
        else:
            if there or one.startswith("hf:"):
                own = split if path.is_dir() or not there else None
                x = data.read(one, own, image=image, size=size, background=background, labelled=False).x
            elif one in data.DATASETS:
                x = data.load(
                    one, split, directory=directory, image=image, size=size, background=background, labelled=False
                ).x
            else:
                raise FileNotFoundError(
                    "INPUT must be an image file, a folder of images, a Parquet file or a folder of them, "
                    f"hf:OWNER/NAME or {', '.join(data.DATASETS)}; there is no {one!r}"
                )
            names += [f"{one}:{i}" for i in range(len(x))]
        if shape[0] == 3 and x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if tuple(x.shape[1:]) != shape:
            raise ValueError(f"{one} has images of shape {tuple(x.shape[1:])}, but the defence takes {shape}")
        parts.append(x)
    return names, torch.cat(parts)


def _files(path: Path) -> list[Path]:
    """Return the image files of a path that exists; none if it holds Parquet."""
    if path.is_file():
        return [] if path.suffix == ".parquet" else [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files and next(path.rglob("*.parquet"), None) is None:
        raise ValueError(f"{path} has no images ({', '.join(SUFFIXES)})")
    return files


def _record(folder: Path) -> dict[str, Any]:
    """Return what fit wrote about the defence; the error names the folder if it did not, or not wholly."""
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"--defence {folder} has no {RECORD}: give the folder that immunonet fit wrote")
    record = _store.read_json(path)
    try:
        record["settings"]["layers"], record["model"], record["weights"], record["classes"]
        DEFENCES[record["defence"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} was edited: it lacks {error}. Run immunonet fit again") from error
    return dict(record)

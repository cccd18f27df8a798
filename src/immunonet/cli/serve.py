"""`immunonet serve`."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from immunonet.cli import common
from immunonet.cli.fit import SENTINEL
from immunonet.cli.fitted import opened
from immunonet.memory.sentinel import Sentinel
from immunonet.memory.store import Memory


def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that fit wrote.")] = Path("defence"),
    model: Annotated[str | None, typer.Option(help="As given to fit, which is the default.")] = None,
    weights: common.WeightsOption = None,
    memory: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Remember what is asked there, and answer from it.")
    ] = None,
    capacity: Annotated[
        int, typer.Option(min=1, help="Entries that the memory keeps at most; those that came first go.")
    ] = 100_000,
    on_flag: Annotated[
        str, typer.Option(help="About what the sentinel flags: mark, refuse, label-only, random-delay.")
    ] = "mark",
    flag_log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append what is flagged to it, for immunonet memory page --flags."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need tokens.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Lines NAME ROLE TOKEN; roles: ask, confirm, admin.")
    ] = None,
    replicas: Annotated[
        str, typer.Option(metavar="N|N-M", help="Processes that answer; N-M: as many as the load needs.")
    ] = "1",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of each replica. Default: this machine's, shared evenly.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Inputs that are answered together, at most.")] = 32,
    queue: Annotated[
        int | None,
        typer.Option(min=1, help="Inputs that may wait; more are told to come again. Default: as many as a batch."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that an answer may take.")] = 30.0,
    explore: Annotated[
        bool, typer.Option(help="Show the explorer at /; not beside tokens, since it asks for none.")
    ] = True,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: fresh randomness for every batch.")] = None,
    device: common.DeviceOption = "cpu",
    ray: common.RayOption = None,
) -> None:
    """Serve a fitted defence over HTTP, in front of replicas on Ray Serve. Ctrl-C ends it, all taken being answered.

    POST /v1/respond takes a PNG, a JPEG, or {"inputs": [...]}; /docs tells the rest. If fit was given --sentinel, all
    that is asked is watched. POST /v1/reload reads DIR again, without a lost request.
    """
    from immunonet._imports import require

    for module in ("fastapi", "uvicorn", "ray.serve", "prometheus_client"):
        require(module, "serve")
    from immunonet.service.app import Service
    from immunonet.service.limits import Limits
    from immunonet.service.replicas import Replicas
    from immunonet.service.running import check_address, run
    from immunonet.service.tokens import Tokens

    tokens = Tokens() if token_file is None else Tokens.read(token_file)
    check_address(host, port, bool(tokens))
    limits = Limits(batch=batch, queue=queue, seconds=timeout)
    common.resolve_device(device)
    folder = folder.resolve()
    load = functools.partial(loaded, model=model, weights=weights and weights.resolve(), device=device)
    own = load(folder)
    if memory is not None:
        memory = memory.resolve()
        # The folder itself is opened when nothing forks any more, which LanceDB does not survive.
        own.defence.remember_in(Memory(None))
    there = (folder / SENTINEL).is_file()
    if not there and (on_flag != "mark" or flag_log):
        raise ValueError(f"--on-flag, --flag-log: {folder} has no sentinel, fit it with --sentinel pooled")

    def watching(loaded: Any) -> Sentinel | None:
        if not (folder / SENTINEL).is_file():
            return None
        return Sentinel.load(folder / SENTINEL, loaded.defence, log=flag_log)

    watch = watching(own)
    service = Service(own, limits=limits, tokens=tokens, sentinel=watch, on_flag=on_flag)
    behind = Replicas(
        load, memory=memory, capacity=capacity, batch=batch, replicas=span(replicas), threads=threads, seed=seed,
        address=ray, gpu=device.startswith("cuda"), resent=lambda: service.telemetry.count("resent"),
    )  # fmt: skip
    logging.basicConfig(format="%(message)s")
    logging.getLogger("immunonet.service").setLevel(logging.INFO)
    common.note(f"http://{host}:{port}: {own.defence.kind} of {folder}; ready when /readyz says so")

    def explorer_of(app: Any) -> None:
        from immunonet import explorer

        page = explorer.build(
            own.defence, base=own.defence.model, names=own.classes, shape=own.shape, sentinel=watch and watch.twin()
        )
        explorer.mount(app, page, "/")

    shown = explore and not tokens
    if shown:
        require("gradio", "serve")
    around = explorer_of if shown else lambda app: None
    run(service, behind, folder, load, host=host, port=port, watch=watching, around=around)


def loaded(folder: Path, *, model: str | None, weights: Path | None, device: str) -> Any:
    """Return the defence of a folder as the service takes it."""
    from immunonet.service.answering import Loaded

    defence, record = opened(folder, model, weights, common.resolve_device(device))
    shape = record.get("shape") or getattr(defence, "shape", None)
    if not shape:
        raise ValueError(f"{folder} does not tell the shape of its inputs: run immunonet fit again")
    reading = {"size": record.get("size"), "background": record.get("background", "white")}
    return Loaded(defence=defence, shape=tuple(shape), classes=tuple(record["classes"]), reading=reading)


def span(text: str) -> int | tuple[int, int]:
    """Return how many replicas "2" or "1-4" say."""
    least, dash, most = text.partition("-")
    if not least.isdecimal() or not (most.isdecimal() or not dash) or not 0 < int(least) <= int(most or least):
        raise ValueError(f"--replicas must be a number, or two such as 1-4, got {text!r}")
    return (int(least), int(most)) if dash else int(least)

"""`immunonet memory`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from immunonet import _store
from immunonet.cli import common
from immunonet.evaluation import records
from immunonet.memory.flags import log
from immunonet.memory.history import history
from immunonet.memory.store import Memory
from immunonet.report import memory as reports

memory = typer.Typer(
    help="Look into a memory, take entries out of it, and bring back what it was.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The memory's folder.")]


@memory.command()
def stats(folder: Folder, json: common.JsonOption = None) -> None:
    """Tell what a memory holds, per source too."""
    found = _opened(folder).stats()
    for name, value in found.items():
        if name != "sources":
            typer.echo(f"{name}: {' '.join(map(str, value)) if isinstance(value, list) else value}")
    for name, counts in found["sources"].items():
        typer.echo(f"source {name}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
    common.write_results(json, [found])


@memory.command()
def versions(folder: Folder, json: common.JsonOption = None) -> None:
    """List the versions that can be brought back, oldest first."""
    found = _opened(folder).versions()
    for one in found:
        names = f" ({', '.join(one.names)})" if one.names else ""
        typer.echo(f"{one.number}: {one.entries} entries, {one.time:%Y-%m-%d %H:%M:%S} UTC{names}")
    rows: list[dict[str, Any]] = [
        {"version": v.number, "entries": v.entries, "time": v.time.isoformat(), "names": list(v.names)} for v in found
    ]
    common.write_results(json, rows)


@memory.command()
def rollback(
    folder: Folder, version: Annotated[str, typer.Argument(metavar="VERSION", help="Its number or name.")]
) -> None:
    """Bring back what a version held, as a new version."""
    opened = _opened(folder)
    opened.rollback(int(version) if version.isdecimal() else version)
    typer.echo(f"version {opened.version} holds what {version} held: {len(opened)} entries")


@memory.command()
def forget(
    folder: Folder,
    ids: Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="An entry's id; repeat it.")] = None,
    source: Annotated[str | None, typer.Option(help="Entries from this source, or NAME/... below it.")] = None,
    since: Annotated[datetime | None, typer.Option(help="Entries from this time on.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Entries before this time.")] = None,
    erase: Annotated[bool, typer.Option("--erase", help="Drop all older versions, which hold them, as well.")] = False,
) -> None:
    """Remove the entries that all of what is given holds for; older versions hold them until they are dropped."""
    opened = _opened(folder)
    latest = opened.version
    n = opened.forget(ids, source=source, since=since, until=until, erase=erase)
    before = "no version is left that holds them" if erase else f"version {latest} is the one before"
    typer.echo(f"{n} entries forgotten, {len(opened)} left; {before}")


@memory.command()
def export(
    folder: Folder, file: Annotated[Path, typer.Argument(metavar="FILE", help="A Parquet file to write.")]
) -> None:
    """Write all entries to a Parquet file."""
    typer.echo(f"{_opened(folder).export(file)} entries: {file}")


@memory.command()
def page(
    folder: Folder,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")] = Path("memory.html"),
    flags: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The log of a sentinel, which flags over time are taken from.")
    ] = None,
    json: common.JsonOption = None,
) -> None:
    """Write an HTML page about what a memory holds, who wrote it when, and its versions."""
    common.prepare(out.parent, json)
    told = history(_opened(folder), log(flags) if flags else ())
    title = f"Memory {folder.resolve().name}"
    _store.write_text(out, reports.page(told, title=title, command=records.command()))
    common.write_results(json, [told])
    typer.echo(out)


def _opened(folder: Path) -> Memory:
    found = Memory(folder)
    if found.space is None:
        raise ValueError(f"DIR: there is no memory in {folder}")
    return found

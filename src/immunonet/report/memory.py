"""The page that shows the history of a memory. Needs `pip install 'immunonet[report]'`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from immunonet.report import pages
from immunonet.report.style import BLUE, INK, blank, dress

if TYPE_CHECKING:
    from immunonet.memory.backend import Version

# Sources, and versions with something to tell, that are shown by themselves.
SOURCES, VERSIONS = 10, 30
# Steps of a line, and rows of names above it.
ACROSS, UP, ROWS = 1000, 100, 3

Row = Mapping[str, Any]


def page(record: Row, *, title: str, command: str = "") -> str:
    """Return a self-contained HTML page: what is held, what each source wrote over time, versions, and flags.

    `record`: what `memory.history.history` gives. No script, and nothing is fetched from anywhere.
    """
    start, end = (datetime.fromisoformat(record[name]) for name in ("from", "to"))
    versions = record["versions"]
    first, last = (datetime.fromisoformat(versions[i]["time"]) for i in (0, -1))
    # Of a memory that is old only late versions are there: they have a scale of their own.
    last = max(last, first + timedelta(seconds=1))
    place, named = _placer(first, last), [one for one in versions if one["names"]]
    return pages.template("memory.html.j2").render(
        title=title,
        command=command,
        stats=record["stats"],
        writing=_strips(record["sources"], "written", "contradicting"),
        flagging=_strips(record["sources"], "flagged"),
        times=_times(start, end),
        bar=_duration((end - start) / record["parts"]),
        version_times=_times(first, last),
        versions=versions,
        most=max((one["entries"] for one in versions), default=0),
        line=_line(versions, place),
        gone=[place(one["time"]) for one in versions if (one["change"] or 0) < 0],
        names=[
            {"text": ", ".join(one["names"]), "at": place(one["time"]), "row": i % ROWS} for i, one in enumerate(named)
        ],
        rows=min(ROWS, len(named)),
        telling=_telling(versions),
        when=lambda text: _time(datetime.fromisoformat(text), timedelta(0)),
    )


def figure(versions: Sequence[Version]) -> Figure:
    """Return a figure of how many entries a memory had over time, its named versions marked.

    `versions`: what `Memory.versions` gives.
    """
    drawn = blank(6.4, 2.8)
    axes = drawn.subplots()
    times: Any = [one.time for one in versions]
    held = [one.entries for one in versions]
    axes.plot(times, held, drawstyle="steps-post", color=BLUE, linewidth=1.6, marker="o", markersize=3)
    for one in versions:
        if one.names:
            axes.annotate(
                ", ".join(one.names), (one.time, one.entries), xytext=(0, 6), textcoords="offset points", fontsize=7,
                ha="center", color=INK,
            )  # fmt: skip
    dress(axes, "Entries over time", "", "entries")
    axes.set_ylim(0, max([*held, 1]) * 1.15)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(axis="x", rotation=20)
    return drawn


def _strips(sources: Mapping[str, Row], kind: str, below: str = "") -> list[dict[str, Any]]:
    """Return a strip per source that has any of a kind, the most first; sources beyond the first few are one.

    A strip: its `name`, the counts `up` and `down`, their sums, and the highest of either.
    """
    found = [(name, own[kind], own[below] if below else []) for name, own in sources.items() if any(own[kind])]
    found.sort(key=lambda one: -sum(one[1]))
    few, rest = found[:SOURCES], found[SOURCES:]
    if rest:
        columns = [[sum(values) for values in zip(*(one[i] for one in rest), strict=True)] for i in (1, 2)]
        few.append((f"{len(rest)} other sources", columns[0], columns[1]))
    return [
        {"name": name, "up": up, "down": down, "peak": max([*up, *down])} | {"total": sum(up), "below": sum(down)}
        for name, up, down in few
    ]


def _line(versions: Sequence[Row], place: Callable[[str], float]) -> str:
    """Return the path of entries over time, steps in a box of `ACROSS` times `UP`."""
    most = max((one["entries"] for one in versions), default=0) or 1
    steps = [f"H{place(one['time']) * ACROSS:.1f}V{UP - one['entries'] / most * UP:.1f}" for one in versions]
    return f"M0,{UP}{''.join(steps)}H{ACROSS}"


def _telling(versions: Sequence[Row]) -> list[Row]:
    """Return the last versions that have a name, or fewer entries than the one before, the latest first."""
    return [one for one in versions if one["names"] or (one["change"] or 0) < 0][: -VERSIONS - 1 : -1]


def _placer(start: datetime, end: datetime) -> Callable[[str], float]:
    """Return what tells where a time lies between two, as a share."""
    return lambda text: (datetime.fromisoformat(text) - start) / (end - start)


def _times(start: datetime, end: datetime) -> list[str]:
    """Return the labels of a scale of time: its ends and its middle."""
    return [_time(start + share * (end - start), end - start) for share in (0.0, 0.5, 1.0)]


def _time(time: datetime, span: timedelta) -> str:
    """Return a time as text, as finely as its span asks for."""
    fine = "" if span > timedelta(days=30) else " %H:%M" if span > timedelta(hours=1) else " %H:%M:%S"
    return time.strftime("%Y-%m-%d" + fine)


def _duration(span: timedelta) -> str:
    """Return a span in words, in the largest unit that it has one of."""
    units = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    seconds = span.total_seconds()
    name, unit = next(((name, unit) for name, unit in units.items() if seconds >= unit), ("seconds", 1))
    return f"{seconds / unit:.2g} {name}"

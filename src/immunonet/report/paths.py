"""Paths and contests of a study, from its record: tables, and figures against t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from immunonet.report import study_figures
from immunonet.report.tables import Section

Record = Mapping[str, Any]
UNION = "union"
# Places of a path that its table shows.
_SHOWN = 5


def sections(record: Record, words: Any) -> list[Section]:
    """Return what a study says of its contests and paths, if it has any; `words`: the macros of the template."""
    found = []
    for contest in record.get("contests", ()):
        found.append(Section(contest["title"], (words.contest(contest).strip(),), _contest(contest)))
        if contest["pairs"]:
            found.append(
                Section(f"{contest['title']}: in pairs", (words.contest_pairs(contest).strip(),), _pairs(contest))
            )
    for i, (ends, entries) in enumerate(_alike(record).items()):
        text = (words.path(entries[0]).strip(),)
        found.append(Section(f"Paths from {ends}", text, _paths(entries), f"paths-{i + 1}"))
        found.append(Section(f"Losses from {ends}", (), (), f"losses-{i + 1}"))
        found += [Section(f"Along {one['name']}", (words.points(one).strip(),), _points(one)) for one in entries]
    if _planes(record):
        found.append(Section("The plane through both ends and the bend", (), (), "plane"))
    return found


def drawn(record: Record) -> dict[str, Figure]:
    """Return the figures of a study's paths: accuracy and loss against t, and the plane around trained ones."""
    found = {}
    for i, entries in enumerate(_alike(record).values()):
        first = entries[0]
        panels: dict[str, dict[str, Any]] = {}
        for attack in ("apgd", "pgd"):
            for one in entries:
                for row in one["accuracy"]:
                    if row["attack"] == attack and (attack == "apgd" or one["training"]):
                        line = {"values": row["accuracy"], "ci95": row["ci95"]}
                        panels.setdefault(row["norm"], {})[f"{one['title']}, {attack.upper()}"] = line
        found[f"paths-{i + 1}"] = study_figures.path_curves(first["t"], panels, "accuracy, validation")
        losses = {
            norm or "clean": {one["title"]: {"values": one["loss"][norm]} for one in entries} for norm in first["loss"]
        }
        found[f"losses-{i + 1}"] = study_figures.path_curves(first["t"], losses, "mean loss, PGD")
    if planes := _planes(record):
        found["plane"] = study_figures.loss_plane(planes)
    return found


def _alike(record: Record) -> dict[str, list[Record]]:
    """Return paths by their ends."""
    found: dict[str, list[Record]] = {}
    for one in record.get("paths", ()):
        found.setdefault(" to ".join(one["ends"]), []).append(one)
    return found


def _planes(record: Record) -> dict[str, Any]:
    return {one["title"]: one["plane"] for one in record.get("paths", ()) if one["plane"]}


def _shown(cell: Sequence[float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*cell)


def _contest(contest: Record) -> list[tuple[str, ...]]:
    norms = list(contest["entrants"][0]["worst"])
    body = []
    for one in contest["entrants"]:
        place = ", ".join(f"{t:.3g}" for t in one["t"])
        known = [value for value in one["transfer"].values() if value is not None]
        cells = [_shown(one["worst"][norm]) for norm in norms]
        transfer = f"{min(known):.3f}" if known else ""
        checks = "; ".join(name for name, _ in (*one["checks"], *one["flags"])) or "all passed"
        body.append((one["title"], place, _shown(one["clean"]), transfer, *cells, str(one["n"]), checks))
    return [("network", "t", "clean", "transfer", *norms, "images", "checks"), *body]


def _pairs(contest: Record) -> list[tuple[str, ...]]:
    titles = {one["name"]: one["title"] for one in contest["entrants"]}
    body = [
        (
            titles[p["a"]],
            titles[p["b"]],
            f"{p['gain']:+.2f}",
            str(p["only_a"]),
            str(p["only_b"]),
            str(p["n"]),
            f"{p['p']:.2g}",
        )
        for p in contest["pairs"]
    ]
    return [("first", "second", "gain", "first alone", "second alone", "images", "p"), *body]


def _rows(one: Record, attack: str) -> dict[str, Record]:
    return {row["norm"]: row for row in one["accuracy"] if row["attack"] == attack}


def _paths(entries: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return by path the best place, and what the networks there and at the ends keep under APGD."""
    norms = [norm for norm in _rows(entries[0], "apgd")]
    body = []
    for one in entries:
        rows = _rows(one, "apgd")
        places = {"first end": 0, "best": one["t"].index(one["best"]), "last end": len(one["t"]) - 1}
        barrier = ", ".join(f"{norm or 'clean'} {value:.3f}" for norm, value in one["barrier"].items())
        for word, i in places.items():
            clean = _rows(one, "none")[""]["accuracy"][i]
            cells = [f"{rows[norm]['accuracy'][i]:.3f}" for norm in norms]
            pgd = f"{_rows(one, 'pgd')[UNION]['accuracy'][i]:.3f}"
            body.append(
                (one["title"], word, f"{one['t'][i]:g}", f"{clean:.3f}", *cells, pgd, barrier if word == "best" else "")
            )
    return [("path", "place", "t", "clean", *(f"APGD {norm}" for norm in norms), "PGD union", "barrier"), *body]


def _points(one: Record) -> list[tuple[str, ...]]:
    rows, n = _rows(one, "apgd"), len(one["t"])
    places = sorted({round(i * (n - 1) / (_SHOWN - 1)) for i in range(_SHOWN)} | {one["t"].index(one["best"])})
    body = [
        (f"{one['t'][i]:g}", *(_shown((row["accuracy"][i], *row["ci95"][i])) for row in rows.values())) for i in places
    ]
    return [("t", *rows), *body]

"""Pages, figures and README of studies from their records: `python -m immunonet.report.studies FILE.json ...`.

A record is what `immunonet reproduce --json` wrote; nothing is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from immunonet import _store
from immunonet._words import apart, identity, show
from immunonet.defences import Undefended
from immunonet.report import figures, pages, paths, study_figures, tables
from immunonet.report.tables import Section, share

Record = Mapping[str, Any]
Table = Sequence[tuple[str, ...]]

MARK = "<!-- Written by `immunonet reproduce` from the JSON files beside it: do not edit. -->"
# What studies call their defences, in the order of their lines.
TITLES = {
    Undefended.kind: Undefended.title,
    "knn": "kNN, Euclidean",
    "dknn": "DkNN (75, cosine)",
    "dknn-tuned": "DkNN tuned",
    "rails-authors": "RAILS, published code",
    "rails-paper": "RAILS, paper (reconstructed)",
    "rails": "RAILS",
}


def title(kind: str, told: str | None = None) -> str:
    """Return what a defence of a study is called."""
    return told or TITLES.get(kind) or tables.title(kind)


def sections(record: Record) -> list[Section]:
    """Return the report of a record; its words stand in `templates/study.md.j2`."""
    study, rows = record["study"], record["results"]
    words: Any = pages.template("study.md.j2", show=show).module
    report: list[Section] = []

    def add(heading: str, text: str, table: Table, figure: str = "") -> None:
        paragraphs = [study["remark"], *text.strip().split("\n\n")]
        report.append(Section(heading, tuple(filter(None, paragraphs)), table, figure))

    if main := [row for row in rows if row["settings"]["experiment"] == "main"]:
        add("Main table", words.main(), _main(main))
    if record["targets"]:
        add("Targets", "", _targets(record["targets"]))
    if record["pairs"]:
        add("RAILS against neighbour votes", words.pairs(), _pairs(record["pairs"]))
    report += paths.sections(record, words)
    for name, heading in study["curves"]:
        own = [row for row in rows if row["settings"]["experiment"] == name]
        add(heading, words.curve(own[0]), _curve(own), name)
    for entry in record["learning"]:
        add(f"Learning curves: {entry['name']}", words.learning(entry), _learning(entry), entry["name"])
    for entry in record["sensing"]:
        add(f"Sensing: {entry['name']}", words.sensing(entry), _sensing(entry), entry["name"])
        add(f"False alarms: {entry['name']}", words.alarms(), _alarms(entry))
    for entry in record["hardening"]:
        add(f"Adaptive hardening: {entry['name']}", words.hardening(entry), _hardening(entry))
    for entry in record.get("healing", ()):
        add(f"What control changes: {entry['title']}", words.healing(entry), _healing(entry), entry["name"])
    for entry in record.get("watching", ()):
        add(f"Behind a sentinel: {entry['title']}", words.watching(entry), tables.watched(entry["rows"]), entry["name"])
        add(f"Honest queries: {entry['title']}", words.honest(entry), tables.honest(entry["false_alarms"]))
    for entry in record.get("search", ()):  # records of before searches have none
        add(f"Search: {entry['title']}", words.search(entry), _search(entry), entry["name"])
    return [*report, Section("Notes", study["notes"])] if study["notes"] else report


def drawn(record: Record) -> dict[str, Figure]:
    """Return the figures of a record, by the name of their experiment."""
    found = paths.drawn(record)
    for name, heading in record["study"]["curves"]:
        rows = [row for row in record["results"] if row["settings"]["experiment"] == name]
        found[name] = study_figures.value_curves(heading, rows[0]["settings"]["vary"], _lines(rows))
    found |= {entry["name"]: study_figures.generation_curves(entry["curves"]) for entry in record["learning"]}
    for entry in record["sensing"]:
        strangers: dict[str, dict[str, Any]] = {}
        for row in entry["rows"]:
            rule = f"{title(row['defence'], row.get('title'))}, {row['rule']}"
            strangers.setdefault(row["stranger"], {})[rule] = row["true_alarms"]
        found[entry["name"]] = study_figures.alarm_curves(strangers)
    found |= {entry["name"]: study_figures.healing(entry) for entry in record.get("healing", ())}
    found |= {entry["name"]: study_figures.watching(entry["rows"]) for entry in record.get("watching", ())}
    for entry in record.get("search", ()):
        found[entry["name"]] = study_figures.trial_scores(entry["title"], [trial["score"] for trial in entry["trials"]])
    return found


def markdown(record: Record) -> str:
    """Return a record's report as Markdown, its figures taken from the folder `figures`."""
    study = record["study"]
    environment = ", ".join(f"{key} {value}" for key, value in record["environment"].items())
    parts = [f"## {study['title']}", f"`{record['command']}`", environment]
    for section in sections(record):
        shown = section.figure and record["figures"]
        image = f"figures/{study['name']}-{section.figure}.png" if shown else ""
        parts.append(tables.markdown(section, 3, image=image))
    return "\n\n".join(parts) + "\n"


def page(record: Record, made: Mapping[str, Figure]) -> str:
    """Return the HTML page of a record and its figures, complete in itself: no script, nothing fetched, all escaped."""
    images = {name: figures.svg_uri(figure) for name, figure in made.items()}
    return pages.template("study.html.j2").render(record=record, sections=sections(record), images=images)


def draw(record: Record, folder: Path, stem: str) -> None:
    """Write a record's page, `<stem>.html`, and its figures, `figures/<name of the study>-<figure>.png`."""
    made = drawn(record)
    figures.save(made, folder / "figures", record["study"]["name"])
    _store.write_text(folder / f"{stem}.html", page(record, made))


def write_readme(folder: Path) -> Path | None:
    """Write `README.md` from the studies' JSON files in a folder; None, and nothing written, beside someone's own."""
    path = folder / "README.md"
    if path.exists() and not path.read_text(encoding="utf-8").startswith(MARK):
        return None
    records = [_store.read_json(file) for file in sorted(folder.glob("*.json"))]
    studies = [record for record in records if isinstance(record, dict) and "study" in record]
    intro = "What the committed studies measured, each with its command and machine. Per-image correctness lies beside."
    parts = [MARK, "# Results", intro, *map(markdown, studies)]
    _store.write_text(path, "\n\n".join(parts).rstrip() + "\n")
    return path


def _place(layers: Sequence[str]) -> str:
    return " + ".join(layers) or "-"


def _under(attack: str) -> str:
    return "clean" if attack == "none" else attack.upper()


def _main(rows: Sequence[Record]) -> Table:
    heads = {row["attack"]: _attacked(row) for row in rows}
    lines: dict[tuple[str, ...], dict[str, Record]] = {}
    called = [_called(row) for row in rows]
    named = [(name, identity(row["settings"])) for name, row in zip(called, rows, strict=True)]
    for row, (base, place, name, *rest), difference in zip(rows, called, apart(named), strict=True):
        whole = ", ".join(filter(None, (name, difference)))
        lines.setdefault((base, place, whole, *rest), {})[row["attack"]] = row
    # Layers stay together, in the order of their first appearance.
    places, kinds = list(dict.fromkeys(key[:2] for key in lines)), list(TITLES)

    def order(item: tuple[tuple[str, ...], dict[str, Record]]) -> tuple[int, int]:
        kind = next(iter(item[1].values()))["defence"]
        return places.index(item[0][:2]), kinds.index(kind) if kind in kinds else len(kinds)

    body = []
    for key, cells in sorted(lines.items(), key=order):
        time = f"{1000 * cells['none']['seconds_per_image']:.3g}" if "none" in cells else ""
        shares = [share(cells[attack]) if attack in cells else "" for attack in heads]
        body.append((*key[:3], *shares, *key[3:], time))
    return [("base", "layer", "defence", *heads.values(), "repertoire", "images", "seeds", "ms"), *body]


def _called(row: Record) -> tuple[str, ...]:
    """Return what a line of the main table is called: base, layer, defence, repertoire, images, seeds."""
    settings, name = row["settings"], title(row["defence"], row["settings"].get("title"))
    if len(settings.get("tuning", {}).get("candidates", ())) > 1:
        name += ", layers chosen"
    if "maturation" in settings:
        first = settings["maturation"][0]
        name += f", T {first['population']}, G {first['generations']}"
    size = f"{settings['repertoire']:,}" if "repertoire" in settings else ""
    space = settings.get("space")
    place = _place(settings["layers"])
    place += f" (cells at {space})" if space not in (None, *settings["layers"]) else ""
    name += ", cells there" if space in settings["layers"] else ""
    name += f", voice {settings['voice']:g}" if settings.get("voice") else ""
    name += f", innate {settings['innate']:g}" if settings.get("innate") else ""
    name += f", {given}" if (given := tables.vaccine(settings)) else ""
    return (settings["base"], place, name, size, f"{row['n']:,}", str(len(row["seeds"]) or ""))


def _attacked(row: Record) -> str:
    if row["attack"] == "none":
        return "clean"
    steps = round(255 * row["eps"], 6)
    size = f"{steps:g}/255" if row["norm"] == "linf" and steps == round(steps) else f"{row['eps']:.3g}"
    return f"{row['attack'].upper()}, {row['norm']} {size}"


def _targets(targets: Sequence[Record]) -> Table:
    def figure(target: Record, value: float | None, part: float | None) -> list[str]:
        points = target["unit"] == "points"
        told = [] if value is None else [f"{value:.2f} points" if points else f"{value:.3f}"]
        return told if part is None else [*told, f"{part:.0%} of the errors"]

    said = {"goal": "goal reached", "least": "reached", "missed": "**missed**", "not measured": "not measured"}
    body = []
    for target in targets:
        wanted = [" or ".join(figure(target, target[key], target[f"{key}_share"])) for key in ("least", "goal")]
        value, *of_errors = figure(target, target["figure"], target["share"]) or [""]
        measured = value + "".join(f" ({text})" for text in of_errors)
        end = (_place(target["layers"]), f"{target['n']:,}", said[target["status"]])
        body.append((target["text"], target["published"], *wanted, measured, *end))
    return [("", "published", "at least", "goal", "measured", "layer", "images", ""), *body]


def _pairs(pairs: Sequence[Record]) -> Table:
    head = ("base", "layer", "attack", "against", "gain", "errors gone", "it alone", "other alone", "images", "p")
    body = []
    for pair in (pair for pair in pairs if pair["defence"] == "rails"):
        # Pairs of before other settings of RAILS were told have none.
        place = ", ".join(filter(None, (_place(pair["layers"]), pair.get("apart"))))
        over = title(pair["over"], pair.get("over_title"))
        over += f" at {_place(pair['over_layers'])}, chosen" if pair["chosen"] else ""
        gone = "" if pair["errors_gone"] is None else f"{pair['errors_gone']:.0%}"
        counts = (str(pair["only_rails"]), str(pair["only_other"]), f"{pair['n']:,}", f"{pair['p']:.2g}")
        body.append((pair["base"], place, pair["attack"], over, f"{pair['gain']:+.2f}", gone, *counts))
    return [head, *body]


def _curve(rows: Sequence[Record]) -> Table:
    lines = _lines(rows, table=True)
    values = dict.fromkeys(show(row["settings"]["value"]) for row in rows)
    cells = {(show(value), name): share(row) for name, line in lines.items() for value, row in line}
    head = rows[0]["settings"]["vary"].replace("_", " "), *lines
    return [head, *((value, *(cells.get((value, name), "") for name in lines)) for value in values)]


def _lines(rows: Sequence[Record], *, table: bool = False) -> dict[str, list[tuple[Any, Record]]]:
    """Return the lines of a curve by name: values and their rows. In a figure a name says only what differs."""
    vary = rows[0]["settings"]["vary"]
    several = len({row["settings"]["base"] for row in rows}) > 1
    placed = table or len({str(row["settings"]["layers"]) for row in rows if row["settings"]["layers"]}) > 1
    attacked = table or vary != "eps" or len({row["attack"] for row in rows} - {"none"}) > 1
    lines: dict[str, list[tuple[Any, Record]]] = {}
    for row in rows:
        settings = row["settings"]
        name = f"{settings['base']}{',' if table else ':'} " if several else ""
        name += title(row["defence"], settings.get("title"))
        name += f" at {_place(settings['layers'])}" if placed and vary != "layers" and settings["layers"] else ""
        name += f", {_under(row['attack'])}" if attacked or row["attack"] == "none" else ""
        lines.setdefault(name, []).append((settings["value"], row))
    return lines


def _learning(entry: Record) -> Table:
    names = ("affinity", "affinity_others", "true_share", "entropy")
    body = []
    for curve in entry["curves"]:
        last = len(curve["entropy"]) - 1
        for g in dict.fromkeys((0, 1, 2, 5, 10, 20, 30, last)):
            if g <= last:
                body.append((show(curve["eps"]), str(g), *(f"{curve[name][g]:.3f}" for name in names)))
    head = ("eps", "generation", "affinity, true class", "affinity, best other", "true share", "entropy (nats)")
    return [head, *body]


def _sensing(entry: Record) -> Table:
    return [("defence", "stranger", "rule", "AUC", "clean and strange images")] + [
        (
            title(r["defence"], r.get("title")),
            r["stranger"],
            r["rule"],
            f"{r['auc']:.3f}",
            f"{r['n'][0]} and {r['n'][1]}",
        )
        for r in entry["rows"]
    ]


def _alarms(entry: Record) -> Table:
    return [("defence", "rule", "nominal", "measured")] + [
        (
            title(r["defence"], r.get("title")),
            r["rule"].removesuffix("_p"),
            f"{r['nominal']:.2f}",
            share(r, key="measured"),
        )
        for r in entry["false_alarms"]
    ]


def _hardening(entry: Record) -> Table:
    def cells(row: Record) -> list[str]:
        return [share(row, key=when, ci95=f"ci95_{when}") for when in ("before", "after")]

    return [("defence", "images", "before", "after", "p (McNemar)", "n")] + [
        (title(r["defence"], r.get("title")), r["images"], *cells(r), f"{r['p']:.2g}", str(r["n"]))
        for r in entry["rows"]
    ]


def _healing(entry: Record) -> Table:
    body = []
    for layer, name in enumerate(entry["layers"]):
        cells = [f"{row['mean'][layer]:.3f} ± {row['half'][layer]:.3f}" for row in entry["rows"]]
        body.append((name, *cells))
    return [("layer", *(f"{row['images']}, {row['when']}" for row in entry["rows"])), *body]


def _search(entry: Record) -> Table:
    n = entry["images"][1] - entry["images"][0]
    heads = [f"{_under(attack)}, {images}" for images in ("trials", "confirm") for attack in entry["attacks"]]
    return [("trial", *(name.replace("_", " ") for name in entry["space"]), *heads)] + [
        (
            str(one["trial"]) if place else f"{one['trial']}, the start",
            *(show(one["settings"][name]) for name in entry["space"]),
            *(f"{one['right'][attack] / n:.3f}" for attack in entry["attacks"]),
            *(share(one["confirm"][attack]) for attack in entry["attacks"]),
        )
        for place, one in enumerate(entry["finalists"])
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write pages, figures and README again from the JSON files of studies, beside them; nothing is measured."""
    parser = argparse.ArgumentParser(prog="python -m immunonet.report.studies", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="files that immunonet reproduce --json wrote")
    for path in parser.parse_args(arguments).files:
        draw(_store.read_json(path), path.parent, path.stem)
        write_readme(path.parent)


if __name__ == "__main__":
    main()

"""What a study's results say, as tables of text: the record for JSON, and sections for Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from immunonet.evaluation.cases import differing
from immunonet.evaluation.statistics import mcnemar
from immunonet.studies.entries import Target
from immunonet.studies.experiments import Measured
from immunonet.studies.settings import Study
from immunonet.studies.tasks import show

TITLES = {
    "cnn": "CNN, undefended",
    "knn": "kNN, Euclidean",
    "dknn": "DkNN (75, cosine)",
    "dknn-tuned": "DkNN tuned",
    "rails-authors": "RAILS, published code",
    "rails-paper": "RAILS, paper (reconstructed)",
    "rails": "RAILS",
}

Record = Mapping[str, Any]
# Settings of a row that say how it was measured, not which defence on which images.
_MEASURED = ("attack", "chunk", "device", "experiment", "slice", "tuning")


@dataclass(frozen=True)
class Section:
    """A part of the report: a heading, sentences, a table (its head first; none if empty), a figure's name."""

    title: str
    text: tuple[str, ...] = ()
    table: tuple[tuple[str, ...], ...] = ()
    figure: str = ""


def pairs(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return, for each RAILS in the main table, how it compares with each neighbour vote on the same images.

    `gain`: points of accuracy, a mean over seeds. `p`: McNemar's, of RAILS with its first seed, of which `only_rails`
    and `only_other` count the images that one alone got right.
    """
    main = [m for m in found if m.measurement.experiment == "main" and m.row.defence != "cnn"]
    out = []
    for a in main:
        alike = [m for m in main if m.row.defence == a.row.defence and _place_of(m) == _place_of(a)]
        apart = differing(_identity(a.row.settings), [_identity(m.row.settings) for m in alike])
        for b in main:
            kinds = a.row.defence.startswith("rails") and b.row.defence in ("knn", "dknn", "dknn-tuned")
            same = _place_of(a)[1:] == _place_of(b)[1:]
            same &= a.row.settings["repertoire"] == b.row.settings["repertoire"]
            chosen = len(b.measurement.candidates) > 1
            if not kinds or not same or not (chosen or a.row.settings["layers"] == b.row.settings["layers"]):
                continue
            n = min(a.row.n, b.row.n)
            mine, other = a.correct[:, :n], b.correct[0, :n]
            wrong = 1 - float(other.float().mean())
            gain = float(mine.double().mean() - other.double().mean())
            out.append(
                {
                    "base": a.measurement.base,
                    "layers": a.row.settings["layers"],
                    "defence": a.row.defence,
                    "apart": apart,
                    "over": b.row.defence,
                    "over_layers": b.row.settings["layers"],
                    "chosen": chosen,
                    "attack": a.row.attack,
                    "n": n,
                    "gain": 100 * gain,
                    "errors_gone": gain / wrong if wrong else None,
                    "only_rails": int((mine[0] & ~other).sum()),
                    "only_other": int((other & ~mine[0]).sum()),
                    "p": mcnemar(mine[0], other),
                }
            )
    return out


def targets(study: Study, found: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return the figure that belongs to each target of the study, and whether it was reached."""
    return [_target(study, target, found) for target in study.targets]


def _target(study: Study, target: Target, found: Sequence[Measured]) -> dict[str, Any]:
    main = [
        m
        for m in found
        if m.measurement.experiment == "main"
        and m.measurement.split == "test"
        and m.measurement.base == target.base
        and m.row.attack == target.attack
        and m.row.n >= target.images
    ]
    layers = target.layers
    if target.choice is not None:
        measured = {m.measurement.candidates for m in main if m.row.defence == target.defence}
        scores: dict[tuple[str, ...], list[float]] = {}
        for m in found:
            here = m.measurement.experiment == target.choice and m.measurement.base == target.base
            if here and m.row.defence == target.defence and m.measurement.candidates in measured:
                scores.setdefault(m.measurement.candidates[0], []).append(m.row.accuracy)
        layers = max(scores, key=lambda one: sum(scores[one]) / len(scores[one]), default=None)

    def look(defence: str) -> Measured | None:
        at = () if defence == "cnn" else (layers,)
        here = [m for m in main if m.row.defence == defence and m.measurement.candidates == at]
        return max(here, key=lambda m: m.row.n, default=None)

    mine, other = look(target.defence), None if target.over is None else look(target.over)
    out: dict[str, Any] = {
        "text": target.text,
        "published": target.published,
        "layers": list(layers or ()),
        "least": target.least,
        "goal": target.goal,
        "least_share": target.least_share,
        "goal_share": target.goal_share,
        "unit": "accuracy" if target.over is None else "points",
    }
    if mine is None or (target.over is not None and other is None):
        return out | {"figure": None, "share": None, "n": 0, "status": "not measured"}
    figure, share, n = mine.row.accuracy, None, mine.row.n
    if other is not None:
        n = min(n, other.row.n)
        a, b = (float(m.correct[:, :n].double().mean()) for m in (mine, other))
        figure, share = 100 * (a - b), (a - b) / (1 - b) if b < 1 else None

    def reached(least: float | None, part: float | None) -> bool:
        enough = least is not None and figure >= least - 1e-9
        return enough or (part is not None and share is not None and share >= part - 1e-9)

    status = (
        "goal"
        if reached(target.goal, target.goal_share)
        else "least"
        if reached(target.least, target.least_share)
        else "missed"
    )
    return out | {"figure": figure, "share": share, "n": n, "status": status}


def sections(record: Record) -> list[Section]:
    """Return the report of a record, the object that the JSON file of a study holds."""
    study, rows = record["study"], record["results"]
    remark = [study["remark"]] if study["remark"] else []
    main = [row for row in rows if row["settings"]["experiment"] == "main"]
    found = [
        Section(
            "Main table",
            (
                *remark,
                "Accuracy with its 95 % interval (Wilson's; with several seeds at least the bootstrap's over images "
                "and seeds). Attacks are made on the base network alone, so that nothing here is a worst case. "
                "ms is wall time per clean image, in chunks, on the machine named with the command.",
            ),
            _main(main),
        )
    ]
    if record["targets"]:
        found.append(Section("Targets", tuple(remark), _targets(record["targets"])))
    if record["pairs"]:
        text = (
            "The same images, in pairs. Gain: points of accuracy, mean over seeds; McNemar's test for the first seed."
        )
        found.append(Section("RAILS against neighbour votes", (*remark, text), _pairs(record["pairs"])))
    for name, title in study["curves"]:
        mine = [row for row in rows if row["settings"]["experiment"] == name]
        where = f"First {mine[0]['n']:,} images of the {mine[0]['settings']['split']} split."
        found.append(Section(title, (*remark, where), _curve(mine), name))
    for entry in record["learning"]:
        text = (
            f"Layer {show(entry['layers'])}, {entry['curves'][0]['n']} antigens: means per generation (0: mutated "
            "copies of the naive cells). Affinity is minus a distance, of the true class and of the best other one."
        )
        found.append(Section(f"Learning curves: {entry['name']}", (*remark, text), _learning(entry), entry["name"]))
    for entry in record["sensing"]:
        text = f"Layer {show(entry['layers'])}. A stranger should have low credibility, or a large distance."
        found.append(Section(f"Sensing: {entry['name']}", (*remark, text), _sensing(entry), entry["name"]))
        text = "How often clean test images are flagged, beside the rate that was asked for."
        found.append(Section(f"False alarms: {entry['name']}", (*remark, text), _alarms(entry)))
    for entry in record["hardening"]:
        text = (
            f"{entry['cells']:,} memory cells of the first half ({entry['attack']}, layer {show(entry['layers'])}) "
            f"join the repertoire with their own labels, {entry['true_labels']:.1%} of which are the antigen's. "
            "Accuracy on the other half before and after."
        )
        found.append(Section(f"Adaptive hardening: {entry['name']}", (*remark, text), _hardening(entry)))
    for entry in record.get("search", ()):  # records of before searches have none
        found.append(Section(f"Search: {entry['title']}", (*remark, *_searched(entry)), _search(entry), entry["name"]))
    if study["notes"]:
        found.append(Section("Notes", tuple(study["notes"])))
    return found


def markdown(record: Record, *, level: int = 2, folder: str = "figures") -> str:
    """Return a record's report as Markdown, its figures taken from `folder`."""
    study, hashes = record["study"], "#" * level
    lines = [f"{hashes} {study['title']}", "", f"`{record['command']}`", "", _environment(record), ""]
    for section in sections(record):
        lines += [f"{hashes}# {section.title}", ""]
        lines += [line for text in section.text for line in (text, "")]
        if section.table:
            head, *body = section.table
            lines += ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)] + [""]
        if section.figure and record["figures"]:
            lines += [f"![{section.title}]({folder}/{study['name']}-{section.figure}.png)", ""]
    return "\n".join(lines)


def _environment(record: Record) -> str:
    return ", ".join(f"{key} {value}" for key, value in record["environment"].items())


def _place(layers: Sequence[str]) -> str:
    return " + ".join(layers) or "-"


def _share(row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]
    return f"{row['accuracy']:.3f} ({low:.3f} to {high:.3f})"


def _main(rows: Sequence[Record]) -> tuple[tuple[str, ...], ...]:
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    heads = {row["attack"]: _attack(row) for row in rows}
    called: dict[tuple[str, ...], list[Record]] = {}
    for row in rows:
        called.setdefault(_called(row), []).append(row)
    lines: dict[tuple[str, ...], dict[str, Record]] = {}
    for (base, place, title, *rest), same in called.items():
        told = [_identity(row["settings"]) for row in same]
        for row, own in zip(same, told, strict=True):
            whole = ", ".join(filter(None, (title, differing(own, told))))
            lines.setdefault((base, place, whole, *rest), {})[row["attack"]] = row
    # Layers stay together, in the order of their first appearance.
    places = list(dict.fromkeys(key[:2] for key in lines))
    kinds = list(TITLES)
    body = []
    for line, cells in sorted(
        lines.items(),
        key=lambda item: (places.index(item[0][:2]), kinds.index(next(iter(item[1].values()))["defence"])),
    ):
        time = f"{1000 * cells['none']['seconds_per_image']:.3g}" if "none" in cells else ""
        shares = [_share(cells[attack]) if attack in cells else "" for attack in attacks]
        body.append((*line[:3], *shares, *line[3:], time))
    head = ("base", "layer", "defence", *(heads[a] for a in attacks), "repertoire", "images", "seeds", "ms")
    return head, *body


def _called(row: Record) -> tuple[str, ...]:
    """Return what a line of the main table is called: base, layer, defence, repertoire, images, seeds."""
    settings, title = row["settings"], TITLES[row["defence"]]
    if len(settings.get("tuning", {}).get("candidates", ())) > 1:
        title += ", layers chosen"
    if "maturation" in settings:
        title += f", T {settings['maturation'][0]['population']}"
    size = f"{settings['repertoire']:,}" if "repertoire" in settings else ""
    space = settings.get("space")
    place = _place(settings["layers"])
    place += f" (cells at {space})" if space not in (None, *settings["layers"]) else ""
    title += ", cells there" if space in settings["layers"] else ""
    title += f", voice {settings['voice']:g}" if settings.get("voice") else ""
    return (settings["base"], place, title, size, f"{row['n']:,}", str(len(row["seeds"]) or ""))


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _MEASURED}


def _place_of(m: Measured) -> tuple[Any, ...]:
    return m.row.settings["layers"], m.row.attack, m.measurement.base, m.measurement.split


def _attack(row: Record) -> str:
    if row["attack"] == "none":
        return "clean"
    eps = row["eps"]
    steps = round(255 * eps, 6)
    size = f"{steps:g}/255" if row["norm"] == "linf" and steps == round(steps) else f"{eps:.3g}"
    return f"{row['attack'].upper()}, {row['norm']} {size}"


def _targets(found: Sequence[Record]) -> tuple[tuple[str, ...], ...]:
    def figure(target: Record, value: float | None, share: float | None) -> str:
        unit = ".3f" if target["unit"] == "accuracy" else ".2f"
        told = [] if value is None else [f"{value:{unit}}" + (" points" if target["unit"] == "points" else "")]
        return " or ".join(told if share is None else [*told, f"{share:.0%} of the errors"])

    said = {"goal": "goal reached", "least": "reached", "missed": "**missed**", "not measured": "not measured"}
    body = [
        (
            target["text"],
            target["published"],
            figure(target, target["least"], target["least_share"]),
            figure(target, target["goal"], target["goal_share"]),
            figure(target, target["figure"], None)
            + (f" ({target['share']:.0%} of the errors)" if target["share"] is not None else ""),
            _place(target["layers"]),
            f"{target['n']:,}",
            said[target["status"]],
        )
        for target in found
    ]
    return ("", "published", "at least", "goal", "measured", "layer", "images", ""), *body


def _pairs(found: Sequence[Record]) -> tuple[tuple[str, ...], ...]:
    body = [
        (
            pair["base"],
            # Pairs of before other settings of RAILS were told have none.
            ", ".join(filter(None, (_place(pair["layers"]), pair.get("apart")))),
            pair["attack"],
            TITLES[pair["over"]] + (f" at {_place(pair['over_layers'])}, chosen" if pair["chosen"] else ""),
            f"{pair['gain']:+.2f}",
            "" if pair["errors_gone"] is None else f"{pair['errors_gone']:.0%}",
            str(pair["only_rails"]),
            str(pair["only_other"]),
            f"{pair['n']:,}",
            f"{pair['p']:.2g}",
        )
        for pair in found
        if pair["defence"] == "rails"
    ]
    head = ("base", "layer", "attack", "against", "gain", "errors gone", "it alone", "other alone", "images", "p")
    return head, *body


def _curve(rows: Sequence[Record]) -> tuple[tuple[str, ...], ...]:
    vary = rows[0]["settings"]["vary"]
    columns = list(dict.fromkeys((r["settings"]["base"], _line(r), r["attack"]) for r in rows))
    several = len({base for base, _, _ in columns}) > 1
    values = list(dict.fromkeys(show(r["settings"]["value"]) for r in rows))
    cells = {(show(r["settings"]["value"]), (r["settings"]["base"], _line(r), r["attack"])): _share(r) for r in rows}
    head = [
        f"{base + ', ' if several else ''}{line}, {'clean' if attack == 'none' else attack.upper()}"
        for base, line, attack in columns
    ]
    return (vary.replace("_", " "), *head), *(
        (value, *(cells.get((value, column), "") for column in columns)) for value in values
    )


def _line(row: Record) -> str:
    """Return what a curve's line is called: the defence, and its layer unless layers are what varies."""
    settings = row["settings"]
    fixed = settings["vary"] != "layers" and settings["layers"]
    return TITLES[row["defence"]] + (f" at {_place(settings['layers'])}" if fixed else "")


def _learning(entry: Record) -> tuple[tuple[str, ...], ...]:
    body = []
    for curve in entry["curves"]:
        generations = len(curve["entropy"])
        for g in dict.fromkeys((0, 1, 2, 5, 10, 20, 30, generations - 1)):
            if g < generations:
                names = ("affinity", "affinity_others", "true_share", "entropy")
                body.append((show(curve["eps"]), str(g), *(f"{curve[name][g]:.3f}" for name in names)))
    return ("eps", "generation", "affinity, true class", "affinity, best other", "true share", "entropy (nats)"), *body


def _sensing(entry: Record) -> tuple[tuple[str, ...], ...]:
    body = [
        (TITLES[r["defence"]], r["stranger"], r["rule"], f"{r['auc']:.3f}", f"{r['n'][0]} and {r['n'][1]}")
        for r in entry["rows"]
    ]
    return ("defence", "stranger", "rule", "AUC", "clean and strange images"), *body


def _alarms(entry: Record) -> tuple[tuple[str, ...], ...]:
    body = [
        (
            TITLES[r["defence"]],
            r["rule"].removesuffix("_p"),
            f"{r['nominal']:.2f}",
            f"{r['measured']:.3f} ({r['ci95'][0]:.3f} to {r['ci95'][1]:.3f})",
        )
        for r in entry["false_alarms"]
    ]
    return ("defence", "rule", "nominal", "measured"), *body


def _hardening(entry: Record) -> tuple[tuple[str, ...], ...]:
    body = [
        (
            TITLES[r["defence"]],
            r["images"],
            *(f"{r[s]:.3f} ({r[f'ci95_{s}'][0]:.3f} to {r[f'ci95_{s}'][1]:.3f})" for s in ("before", "after")),
            f"{r['p']:.2g}",
            str(r["n"]),
        )
        for r in entry["rows"]
    ]
    return ("defence", "images", "before", "after", "p (McNemar)", "n"), *body


def _searched(entry: Record) -> list[str]:
    """Return in words what was searched, and whether the best of the trials beats the start on the confirm images."""
    (seen, until), (_, end) = entry["images"], entry["confirm"]
    start, *others = entry["finalists"]
    about = (
        f"Settings of RAILS, base {entry['base']}, layer {show(entry['layers'])}"
        f"{', cells there' if entry['hidden'] else ''}: {len(entry['trials'])} trials ({entry['sampler']}, seed "
        f"{entry['seed']}; trial 0 is the study's own settings) by mean accuracy on the first {until - seen:,} images "
        f"of the validation split{', in random order' if entry.get('order') == 'random' else ''}. "
        f"These flatter the best of the trials. The start and the best others ({len(others)}) "
        f"were then measured on the next {end - until:,}, which no trial saw."
    )
    if not others or others[0]["score"] <= start["score"]:
        return [about, "No trial was better than the start, even on the images of the trials."]
    best = others[0]
    pairs = {attack: best["confirm"][attack] for attack in entry["attacks"]}
    each = ", ".join(f"{_under(name)} {pair['gain']:+.2f} points (p {pair['p']:.2g})" for name, pair in pairs.items())
    # Bonferroni's level: one chance in twenty over all attacks.
    sure = {name: pair["gain"] for name, pair in pairs.items() if pair["p"] <= 0.05 / len(pairs)}
    if sum(pair["gain"] for pair in pairs.values()) <= 0:
        said = "it does not beat the start"
    elif sure and min(sure.values()) > 0:
        said = f"it beats the start ({', '.join(map(_under, sure))})"
    else:
        said = "these images do not show that it beats the start"
    told = f"Trial {best['trial']}, the best of the trials, against the start on the confirm images, in pairs: {each}"
    return [about, f"{told}, McNemar's test: {said}."]


def _search(entry: Record) -> tuple[tuple[str, ...], ...]:
    n = entry["images"][1] - entry["images"][0]
    body = [
        (
            f"{one['trial']}, the start" if not place else str(one["trial"]),
            *(show(one["settings"][name]) for name in entry["space"]),
            *(f"{one['right'][attack] / n:.3f}" for attack in entry["attacks"]),
            *(_share(one["confirm"][attack]) for attack in entry["attacks"]),
        )
        for place, one in enumerate(entry["finalists"])
    ]
    heads = [f"{_under(attack)}, {images}" for images in ("trials", "confirm") for attack in entry["attacks"]]
    return ("trial", *(name.replace("_", " ") for name in entry["space"]), *heads), *body


def _under(attack: str) -> str:
    return "clean" if attack == "none" else attack.upper()

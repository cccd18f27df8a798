"""What evaluations found, as one document: `python -m immunonet.evaluation.finding RUN.json ... --json F --doc F`.

The runs are files that `immunonet evaluate --protocol` wrote. Every figure of the document is read from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from immunonet import _store
from immunonet.evaluation.cases import NAMES, Case, cases, cells, merge, title, where
from immunonet.evaluation.comparisons import advice, findings, groups
from immunonet.report.figures import accuracy_points, rejection_curves, save

JPEG = {"cifar10"}
# Levels of rejection in the table.
SHOWN = (0.0, 0.05, 0.2)
# Where the figures lie, beside the document.
FIGURES = "figures/robustness"
ALT = {
    "accuracy": "accuracy of each defence on clean images, under PGD on the network, and in the worst case",
    "abstention": "attacked images held against clean images answered, for each defence that senses",
}


def document(record: dict[str, Any], source: str) -> str:
    """Return `docs/robustness.md` as text, from a merged record that stands in the file `source`."""
    found = cases(record)
    parts = [
        "# How robust RAILS is",
        f"Generated from `{source}` by `python -m immunonet.evaluation.finding`; do not edit. Commands are at the end. "
        "All figures are upper bounds of robustness: a better attack may lower them.",
        "## Result",
        *findings(found),
        "## Figures",
        "Share right with its 95 % interval. *PGD on the network* is the paper's attack, made on the bare network. "
        "*Best transfer* is the strongest attack made without knowing the defence, *best adaptive* the strongest that "
        "knows it; *worst case* counts every image by the attack that did best against it, chosen on some draws of a "
        "randomised defence and counted on others. For the bare network all gradient attacks stand under transfer.",
        f"![{ALT['accuracy']}]({FIGURES}-accuracy.png)",
    ]
    for group in groups(found):
        first = group[0]
        jpeg = " (JPEG copies of the images)" if first["dataset"] in JPEG else ""
        parts.append(
            f"### {first['dataset']}{jpeg}, {first['net']}, {first['norm']} eps {first['eps']:.4g}, {first['n']} images"
        )
        parts.append(_table(group))
        parts.append(_breakers(group))
    parts += [
        "## Where the defence gives way",
        "Images broken in most draws of their worst case, by the attack that broke them.",
        _broken_by(found),
        *_ablations(found),
        "## Declining what looks foreign",
        "A defence may decline to answer an input whose distance to its neighbours is unusual (its p-value at most the "
        "level). An attack then succeeds only with an input that is accepted and answered wrongly; the worst case is "
        "chosen anew at every level, over the attacks that tried all images, the joint one (*stealthy*: it also avoids "
        "looking foreign) among them. *Held*: attacked images answered rightly or declined.",
        _abstention(found),
        f"![{ALT['abstention']}]({FIGURES}-abstention.png)" if _curves(found) else "",
        *_choices(record.get("choices", ())),
        "## Are the attacks sound?",
        "Each evaluation checks its own attacks. A failed line means that its figures may be too high.",
        _checks(found),
        "## What it costs",
        _costs(found),
        "## When to use it",
        "Worst cases in pairs, on the images that both were attacked on, by McNemar's test; *told apart*: p below .05. "
        "DkNN and other RAILS are those of the same images and protocol.",
        _grid(advice(found)[0], advice(found)[1:]),
        "Robustness against attackers who know the defence is the worst case and nothing else. Where RAILS is *not "
        "told apart from* no defence it is no protection from them; where it is *worse than* no defence, do not put it "
        "there for robustness. What it gives besides (an answer by examples, and a flag on foreign inputs) costs the "
        "time above.",
        "## What was not done",
        *_limits(found),
        "## How it was measured",
        "The protocol (`immunonet evaluate --protocol`): FGSM, PGD, momentum PGD and APGD (cross-entropy and DLR) on "
        "the network; PGD and APGD on a soft vote of the defence's own neighbours (after Sitawarin & Wagner), ASK, "
        "AdvKnn, the same on a soft count of the neighbours that DkNN counts, and on a soft vote of the clones that "
        "RAILS brings near the antigen, RAILS unrolled with its generations, a stealthy variant that also avoids "
        "looking foreign, BPDA with the network and with the soft vote; noise, Square and HopSkipJump on a light twin "
        "of RAILS (T 200, G 3). What "
        "is found is tested on the defence itself: each candidate on few draws, which its row is counted on, the worst "
        "few of every image on more, and the worst of those on as many others. Attacks that only ask take fewer images "
        "(their number stands in the record) and pass over those that are broken already. Carlini et al.'s checklist "
        "(2019) is answered on the pages that the same commands write.",
        "\n".join(f"- `{run['command']}`" for run in record["runs"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def figures(record: dict[str, Any]) -> dict[str, Figure]:
    """Return the document's figures by name."""
    found = cases(record)
    shown = (("clean", "clean"), ("PGD on the network", "paper"), ("worst case, knows the defence", "worst"))
    lines = {
        f"{where(case)}\n{title(case)}": {how: (case[key]["accuracy"], case[key]["ci95"]) for how, key in shown}
        for case in found
    }
    drawn = {"accuracy": accuracy_points(lines)}
    if curves := _curves(found):
        drawn["abstention"] = rejection_curves(curves)
    return drawn


def _curves(found: Sequence[Case]) -> dict[str, dict[str, Any]]:
    """Return the levels of rejection of every defence that senses, by network and attack."""
    curves: dict[str, dict[str, Any]] = {}
    for case in found:
        # Records from before abstention and disagreement were measured lack them.
        if levels := case["evaluation"].get("abstention"):
            curves.setdefault(where(case), {})[title(case)] = levels
    return curves


def _abstention(found: Sequence[Case]) -> str:
    """Return the table of what declining foreign inputs buys, at the levels that a user might choose."""
    lines = []
    for case in found:
        for level in case["evaluation"].get("abstention", ()):
            if level["level"] in SHOWN:
                low, high = level["ci95"]
                joint = "" if level["joint"] is None else f"{level['joint']:.3f}"
                figures = (f"{level['accepted']:.3f}", f"{level['right']:.3f}", f"{level['held']:.3f}")
                lines.append(
                    [where(case), title(case), f"{level['level']:g}", *figures, f"{low:.2f} to {high:.2f}", joint]
                )
    heads = ("network", "defence", "level", "clean answered", "clean answered rightly", "held in the worst case")
    return _grid((*heads, "95 % interval", "held under the joint attack alone"), lines)


def _ablations(found: Sequence[Case]) -> list[str]:
    """Return the section on RAILS less one of its parts, where a protocol measured it."""
    lines = []
    for case in found:
        rows = {(row["defence"], row["attack"]): row for row in case["evaluation"]["ablations"]}
        for name in dict.fromkeys(who for who, _ in rows):
            figures = (_share(rows[name, attack]) for attack in ("none", "worst-case"))
            lines.append([where(case), title(case), name.removeprefix(f"{case['defence']} "), *figures])
        if rows:
            lines.append([where(case), title(case), "whole", _share(case["clean"]), _share(case["worst"])])
    if not lines:
        return []
    return [
        "## RAILS less one of its parts",
        "On the clean images and on the worst candidates of the whole defence. No attack was made on the lesser one: a "
        "figure above the whole's says that these candidates do not carry over, not that it is more robust.",
        _grid(("network", "defence", "part", "clean", "worst candidates of the whole"), lines),
    ]


def _choices(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the section on settings that were tried on validation images, from the records of those trials."""
    if not records:
        return []
    lines = []
    for row in (row for record in records for row in record["results"] if row["defence"] in ("cnn", "rails")):
        settings = row["settings"]
        if "protocol" in settings and row["attack"] not in ("none", "pgd", "worst-case"):
            continue
        voice = f"{settings['voice']:g}" if "voice" in settings else ""
        name = ", ".join(filter(None, (NAMES[row["defence"]], cells(settings.get("maturation", ())))))
        told = (settings["net"], name, " and ".join(settings["layers"]), voice)
        lines.append([*told, row["attack"], row["knows"], f"{row['n']}", _share(row)])
    heads = ("network", "defence", "layer", "voice", "attack", "knows", "images", "right")
    return [
        "## What was tried on validation images",
        "The voice is the weight of the network's softmax in the consensus. One near 1 only reproduces the network; "
        "how often the defence differs from it is told with the figures above.",
        _grid(heads, list(dict.fromkeys(map(tuple, lines)))),
        "\n".join(f"- `{record['command']}`" for record in records),
    ]


def _share(row: dict[str, Any] | None, *, named: bool = False) -> str:
    if row is None:
        return ""
    low, high = row["ci95"]
    name = f" {row['attack']}" if named else ""
    return f"{row['accuracy']:.3f} ({low:.2f} to {high:.2f}){name}"


def _grid(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *lines))


def _table(group: Sequence[Case]) -> str:
    heads = ("defence", "clean", "PGD on the network", "best transfer", "best adaptive", "worst case", "protocol")
    lines = [
        [
            title(case),
            _share(case["clean"]),
            _share(case["paper"]),
            _share(case["transfer"], named=True),
            _share(case["adaptive"], named=True),
            f"**{_share(case['worst'])}**",
            case["protocol"] + (", unreliable" if case["evaluation"]["unreliable"] else ""),
        ]
        for case in group
    ]
    return _grid(heads, lines)


def _breakers(group: Sequence[Case]) -> str:
    lines = []
    for case in group:
        draws = case["worst"]["settings"].get("draws")
        if case["worst"]["seeds"] and draws:
            flagged = case["worst"].get("foreign")
            alarm = "" if flagged is None else f"; {flagged:.3f} of the worst cases were flagged foreign"
            calm = case["clean"].get("foreign")
            alarm += "" if calm is None else f" ({calm:.3f} of the clean images)"
            text = (
                f"- {title(case)}: right in most draws {draws['majority']:.3f}, in all {len(case['worst']['seeds'])} "
                f"draws {draws['always']:.3f}{alarm}."
            )
            if differing := case["evaluation"].get("disagreement"):
                text += (
                    f" It differs from its network on {differing['none']:.3f} of the clean images and "
                    f"{differing['worst-case']:.3f} of the worst cases."
                )
            lines.append(text)
    return "\n".join(lines)


def _broken_by(found: Sequence[Case]) -> str:
    lines = []
    for case in found:
        count: dict[str, int] = {}
        for image in case["evaluation"]["per_example"]:
            if image["worst"] <= 0.5:
                name = "already wrong" if image["attack"] == "none" else image["attack"]
                count[name] = count.get(name, 0) + 1
        told = ", ".join(f"{name} {n}" for name, n in sorted(count.items(), key=lambda item: -item[1]))
        lines.append([where(case), title(case), told or "none"])
    return _grid(("network", "defence", "broken by"), lines)


def _checks(found: Sequence[Case]) -> str:
    lines = []
    for case in found:
        for check in case["evaluation"]["checks"]:
            word = "pass" if check["passed"] else "**FAIL**"
            lines.append([where(case), title(case), word, check["name"], check["detail"]])
        for flag in case["evaluation"]["flags"]:
            if flag["raised"]:
                lines.append([where(case), title(case), "flag", flag["name"], flag["detail"]])
    return _grid(("network", "defence", "", "what", "figures"), lines)


def _costs(found: Sequence[Case]) -> str:
    lines = []
    for case in found:
        cost = case["evaluation"]["cost"]
        lines.append(
            [
                where(case),
                title(case),
                f"{1000 * cost['seconds_batch_1']:.3g}",
                f"{1000 * cost['seconds_best_batch']:.3g} ({cost['best_batch']})",
                f"{cost['forward_passes']:.3g}",
            ]
        )
    heads = ("network", "defence", "ms alone", "ms in a batch (of)", "forward passes per image")
    return (
        _grid(heads, lines) + "\n\nTimes were taken on a machine that did other work as well: compare them with care."
    )


def _limits(found: Sequence[Case]) -> list[str]:
    """Return what a reader could ask for and will not find, from the records: a bullet per protocol."""
    lines = []
    for protocol in dict.fromkeys(case["protocol"] for case in found):
        mine = [case for case in found if case["protocol"] == protocol]
        attacks = [a for case in mine for a in case["evaluation"]["attacks"].values() if a["kind"] != "none"]
        most = {
            name: max((a["calls"] for a in attacks if a["attack"]["method"] == name), default=0)
            for name in ("Square", "HopSkipJump", "Noise")
        }
        steps = max(a["attack"]["iterations"] for a in attacks if a["attack"]["method"] == "APGD")
        asked = sorted({a["n"] for a in attacks if a["kind"] == "black box"})
        names = {name for case in mine for name in case["evaluation"]["attacks"]}
        missing = [
            text
            for key, text in (("targeted", "targeted attacks"), ("eot", "expectation over transformations"))
            if not any(key in name for name in names)
        ]
        networks = dict.fromkeys(f"{case['dataset']}, {case['net']}" for case in mine)
        lines.append(
            f"- `{protocol}` ({'; '.join(networks)}): {_range([case['n'] for case in mine])} "
            f"images, at most {steps} steps. Attacks that only ask took {_range(asked)} images, with "
            f"{most['Square']:,} calls (Square), {most['HopSkipJump']:,} (HopSkipJump) and {most['Noise']:,} draws of "
            "noise." + (f" Missing: {', '.join(missing)}." if missing else "")
        )
    fixed = (
        "Customary are 5,000 queries and 10,000 draws of noise. Light twins stood in for RAILS in attacks that only "
        "ask. A larger protocol (`quick`, `standard`, `full`) spends more."
    )
    return ["\n".join(lines), fixed]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge runs, write the record and the document."""
    parser = argparse.ArgumentParser(prog="python -m immunonet.evaluation.finding", description=__doc__)
    parser.add_argument(
        "runs", nargs="*", type=Path, help="files of immunonet evaluate --protocol; none: --json is read"
    )
    parser.add_argument(
        "--choices",
        nargs="*",
        type=Path,
        default=[],
        help="files of immunonet evaluate --split validation: what settings were chosen by",
    )
    parser.add_argument("--json", type=Path, default=Path("results/robustness.json"))
    parser.add_argument("--doc", type=Path, default=Path("docs/robustness.md"))
    told = parser.parse_args(arguments)
    if told.runs:
        choices = [_store.read_json(path) for path in told.choices]
        _store.write_json(told.json, merge([_store.read_json(path) for path in told.runs]) | {"choices": choices})
    record = _store.read_json(told.json)
    _store.write_text(told.doc, document(record, told.json.as_posix()))
    save(figures(record), (told.doc.parent / FIGURES).parent, Path(FIGURES).name)


if __name__ == "__main__":
    main()

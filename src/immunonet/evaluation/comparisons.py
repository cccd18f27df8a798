"""Worst cases of several defences compared in pairs, on the images that both were attacked on, and in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from immunonet.evaluation.cases import Case, title, where
from immunonet.evaluation.statistics import mcnemar

# Two defences are told apart below this p-value.
_LEVEL = 0.05
_WORDS = ("better than", "not told apart from", "worse than")


class Pair(NamedTuple):
    """Two defences on the same `n` images.

    On how many of them each one alone is right in its worst case, by the majority of its draws; McNemar's `p`; and the
    share that the `other` keeps of them.
    """

    n: int
    alone: int
    other_alone: int
    p: float
    other: float

    @property
    def word(self) -> str:
        """What the first one is, compared with the other."""
        better, alike, worse = _WORDS
        return alike if self.p >= _LEVEL else better if self.alone > self.other_alone else worse


def groups(found: Sequence[Case]) -> list[list[Case]]:
    """Return the cases that compare: the same network, attacker, images and protocol."""
    grouped: dict[tuple[Any, ...], list[Case]] = {}
    for case in found:
        grouped.setdefault((*_network(case), case["images"], case["protocol"]), []).append(case)
    return list(grouped.values())


def paired(one: Case, other: Case) -> Pair | None:
    """Return two worst cases on the images that both have; None without any.

    ValueError where the labels of these images differ.
    """
    own, peers = _examples(one), _examples(other)
    shared = [image for image in own if image in peers]
    if not shared:
        return None
    mine, others = ([known[image] for image in shared] for known in (own, peers))
    if [image["label"] for image in mine] != [image["label"] for image in others]:
        raise ValueError(
            f"{title(one)} and {title(other)} ({where(one)}) must have been attacked on the same images, "
            "got other labels: give runs on the same data"
        )
    a, b = (torch.tensor([image["worst"] > 0.5 for image in images]) for images in (mine, others))
    kept = sum(float(image["worst"]) for image in others) / len(shared)
    return Pair(len(shared), int((a & ~b).sum()), int((b & ~a).sum()), mcnemar(b, a), kept)


def bare(case: Case, found: Sequence[Case]) -> Case | None:
    """Return the network of a defence, undefended against the same attacker; None where no run had it.

    Of several the one by the same protocol, then the one with the most images in common.
    """
    nets = [other for other in found if other["defence"] == "cnn" and _network(other) == _network(case)]

    def fit(net: Case) -> tuple[bool, int]:
        return net["protocol"] == case["protocol"], len(set(net["images"]) & set(case["images"]))

    return max(nets, key=fit, default=None)


def findings(found: Sequence[Case]) -> list[str]:
    """Return what follows from the figures: a bullet for every RAILS."""
    lines = []
    for group in groups(found):
        for case in (case for case in group if case["defence"] == "rails"):
            paper, worst, clean = (case[key]["accuracy"] for key in ("paper", "worst", "clean"))
            text = (
                f"- {where(case)}, {title(case)}: {clean:.3f} without an attack, {paper:.3f} under PGD on the network, "
                f"which is what the paper measured, and {worst:.3f} in the worst case of all attacks, "
                f"{100 * (paper - worst):.0f} points less."
            )
            peers = [peer for peer in group if peer["defence"] == "dknn" and peer["layer"] == case["layer"]]
            net = bare(case, found)
            others = [] if net is None else [("The undefended network", net)]
            for called, other in (*others, *((title(peer), peer) for peer in peers)):
                text += _against(called, other, case)
            lines.append(text)
    return ["\n".join(lines)]


def _against(called: str, other: Case, rails: Case) -> str:
    """Return the comparison of two worst cases; "" without a common image."""
    if (pair := paired(rails, other)) is None:
        return ""
    said = {"better than": "RAILS is above it", "worse than": "RAILS is below it"}
    fewer = f" of these {pair.n} images" if pair.n < other["n"] else ""
    return (
        f" {called} keeps {pair.other:.3f}{fewer} in its own worst case{_by(other, rails)}: "
        f"{said.get(pair.word, 'the two are not told apart')} (RAILS alone right on {pair.alone} "
        f"images, the other alone on {pair.other_alone}; McNemar p = {pair.p:.2g})."
    )


def advice(found: Sequence[Case]) -> list[tuple[str, ...]]:
    """Return the table of when to use RAILS, as far as the figures carry, its head first: a line for every RAILS.

    What it helps against PGD on the network follows from intervals; worst cases are compared in pairs with the bare
    network, and with every other defence of the same images and protocol.
    """
    lines: list[tuple[str, ...]] = [("network", "defence", "PGD on the network", *(f"worst case {w}" for w in _WORDS))]
    for group in groups(found):
        for case in (case for case in group if case["defence"] == "rails"):
            net = bare(case, found)
            peers = [(title(peer), peer) for peer in group if peer is not case and peer["defence"] != "cnn"]
            none = [] if net is None else [(f"no defence{_by(net, case)}", net)]
            cells: dict[str, list[str]] = {word: [] for word in _WORDS}
            for called, other in (*none, *peers):
                if (pair := paired(case, other)) is not None:
                    cells[pair.word].append(f"{called} (p = {pair.p:.2g})")
            lines.append((where(case), title(case), _helps(case, net), *("; ".join(cells[word]) for word in _WORDS)))
    return lines


def _helps(case: Case, net: Case | None) -> str:
    """Return whether it helps against an attacker who does not know that it is there."""
    if net is None:
        return "no bare network to compare"
    (low, high), (least, most) = case["paper"]["ci95"], net["paper"]["ci95"]
    return "helps" if low > most else "harms" if high < least else "not measurably different from no defence"


def _by(other: Case, case: Case) -> str:
    """Return the protocol of another case where it is not that of `case`."""
    return "" if other["protocol"] == case["protocol"] else f" by `{other['protocol']}`"


def _network(case: Case) -> tuple[Any, ...]:
    """Return what was attacked, and within which ball."""
    return case["dataset"], case["net"], case["weights"], case["norm"], case["eps"]


def _examples(case: Case) -> dict[Any, dict[str, Any]]:
    """Return what came of each image."""
    return dict(zip(case["images"], case["evaluation"]["per_example"], strict=True))

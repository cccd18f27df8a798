"""What `print(evaluation)` and a notebook show."""

from __future__ import annotations

import torch

from immunonet.evaluation.outcome import Evaluation
from immunonet.evaluation.records import Check, Flag, Row


def row(attack: str, eps: float, right: int) -> Row:
    settings = {"model": "Net", "layers": [], "slice": [0, 10]}
    return Row.of(
        torch.arange(10)[None] < right, dataset="made", defence="mine", attack=attack, knows="base", eps=eps,
        norm="linf", seconds_per_image=0.1, settings=settings,
    )  # fmt: skip


def test_an_evaluation_shows_its_rows_verdicts_and_doubts() -> None:
    worst = row("worst-case", 0.1, 4)
    checks = Check("eps zero", True, "fine"), Check("larger eps", False, "it rose < fell")
    flags = Flag("masking", True, "found", True), Flag("few", True, "10 images", False), Flag("none", False, "")
    evaluation = Evaluation(
        rows=(row("none", 0.0, 9), row("pgd", 0.1, 5)), verdicts={"linf": worst}, base_verdicts={"linf": worst},
        checks=checks, flags=flags, ablations=(), record={},
    )  # fmt: skip
    head, clean, pgd, _, verdict, *doubts = str(evaluation).split("\n")
    assert head.split()[:7] == ["defence", "attack", "knows", "norm", "eps", "n", "accuracy"]
    assert clean.split()[:5] == ["mine", "none", "base", "10", "0.900"]
    assert pgd.split()[:7] == ["mine", "pgd", "base", "linf", "0.1", "10", "0.500"]
    assert verdict.split()[1] == "worst-case"
    assert doubts == ["Check failed: larger eps: it rose < fell", "Flag: masking: found", "Note: few: 10 images"]
    assert repr(evaluation) == "Evaluation(mine: worst case 0.400 (0.168 to 0.687) of 10 images, 2 rows, unreliable)"
    page = evaluation._repr_html_()
    assert page.count("<tr>") == 5
    assert "<div>Check failed: larger eps: it rose &lt; fell</div>" in page

"""Recall: an antigen near a trusted entry is answered as that one was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from immunonet.memory.index import Array, Lookup
from immunonet.response import Cells


@dataclass(frozen=True, kw_only=True)
class Recalled:
    """Answers from memory to B antigens, of which n are recalled: `hit` `(B,)` bool.

    Of those n: `labels`, `votes` `(n, C)`, `credibility`, `foreign`, `far` `(n, L)`, and the `ids` of their entries.
    """

    hit: Tensor
    labels: Tensor
    votes: Tensor
    credibility: Tensor
    foreign: Tensor
    far: Tensor
    ids: tuple[str, ...]


def recalled(lookup: Lookup, signatures: Tensor, radius: float) -> Recalled:
    """Return the answers to antigens by their signatures `(B, W)`."""
    given = signatures.detach().cpu().float().numpy()
    rows = [chosen(*lookup.within(one, radius), lookup["trusted"], lookup["label"]) for one in given]
    found = np.array([row for row in rows if row >= 0], np.int64)
    columns = {name: torch.from_numpy(lookup[name][found]).to(signatures.device) for name in ANSWER}
    return Recalled(
        hit=torch.tensor([row >= 0 for row in rows], device=signatures.device),
        labels=columns["label"].long(),
        votes=columns["votes"],
        credibility=columns["credibility"],
        foreign=columns["foreign"],
        far=columns["far"],
        ids=tuple(one.decode() for one in lookup["id"][found]),
    )


def chosen(rows: Array, distances: Array, trusted: Array, labels: Array) -> int:
    """Return which of the entries `rows` within the radius, nearest first, answers, or -1.

    The nearest trusted one, unless entries within the radius, trusted or not, carry different labels.
    """
    able = rows[trusted[rows]]
    if not len(able) or bool((labels[rows] != labels[able[0]]).any()):
        return -1
    return int(able[0])


ANSWER = ("label", "votes", "credibility", "foreign", "far")


def columns_of(hot: dict[str, Array], credible: float) -> dict[str, Array]:
    """Return what look-ups hold of entries, from their columns.

    Trusted is what was confirmed, or is at least `credible` and was not foreign. A confirmed label counts in place of
    the answer: where they differ, it has all votes.
    """
    confirmed, votes = hot["confirmed"], hot["votes"].astype(np.float32)
    known = confirmed >= 0
    label = np.where(known, confirmed, hot["label"]).astype(np.int32)
    other = known & (confirmed != hot["label"])
    votes = np.where(other[:, None], np.eye(votes.shape[1], dtype=np.float32)[label], votes)
    foreign = hot["foreign"].astype(bool)
    return {
        "id": hot["id"].astype("S32"),
        "signature": hot["signature"],
        "label": label,
        "votes": votes,
        "credibility": hot["credibility"].astype(np.float32),
        "foreign": foreign,
        "far": hot["far"].astype(np.float32),
        "trusted": known | ((hot["credibility"] >= credible) & ~foreign),
    }


def traced(ids: Sequence[str], hit: Tensor) -> tuple[str | None, ...]:
    """Return per antigen the id of its entry, or None."""
    left = iter(ids)
    return tuple(next(left) if one else None for one in hit.tolist())


def among(values: Tensor, other: Tensor, hit: Tensor) -> Tensor:
    """Return `(B, ...)`: `values` `(n, ...)` where `hit` `(B,)`, and `other` `(B - n, ...)` elsewhere."""
    found = other.new_empty((len(hit), *other.shape[1:]))
    found[hit], found[~hit] = values.to(other.dtype), other
    return found


def without_cells(cells: Cells, hit: Tensor) -> Cells:
    """Return the cells of `(B - n)` antigens as those of B: the others, where `hit`, have none."""
    n = int(hit.sum())

    def blank(values: Tensor, filling: float) -> Tensor:
        return among(values.new_full((n, *values.shape[1:]), filling), values, hit)

    return Cells(
        x=blank(cells.x, 0),
        label=blank(cells.label, -1),
        affinity=blank(cells.affinity, -torch.inf),
        origin=blank(cells.origin, -1),
    )

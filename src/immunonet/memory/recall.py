"""Recall: an antigen near a trusted entry is answered as that one was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from immunonet.immune.spared import Spared
from immunonet.memory.index import Array, Lookup


@dataclass(frozen=True, kw_only=True)
class Recalled(Spared):
    """Answers from memory to B antigens, of which n are recalled, and the `ids` of the entries of those n."""

    by: ClassVar[str] = "recalled"

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

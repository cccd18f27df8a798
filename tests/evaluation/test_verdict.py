"""The worst case, on tables small enough to work out by hand."""

import torch

from immunonet.evaluation import verdict
from immunonet.evaluation.runner import Trial
from immunonet.evaluation.suite import Planned


def trial(name, correct, *, kind, attempted):
    correct = torch.tensor(correct, dtype=torch.bool)
    n = correct.shape[1]
    return Trial(
        attack=Planned(name=name, knows="base", kind=kind, n=n),
        adversarials=torch.full((n, 1), float(len(name))),
        attempted=torch.tensor(attempted),
        labels=correct.long(),
        correct=correct,
        base_correct=correct[:1],
        foreign=None,
        outside=0,
        losses=[],
        faults=None,
        seconds=0.0,
        base_seconds=0.0,
    )


# Two selection runs, then two for the report; four images.
ALL = [True] * 4
CLEAN = trial("none", [[1, 1, 1, 0]] * 4, kind="none", attempted=ALL)
WEAK = trial("weak", [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]], kind="adaptive", attempted=ALL)
STRONG = trial("strong", [[1, 0, 0, 0], [1, 0, 0, 1], [1, 0, 1, 1], [1, 1, 0, 1]], kind="adaptive", attempted=ALL)
SELECT, REPORT = slice(0, 2), slice(2, None)


def test_each_image_gets_the_attack_that_did_best_on_the_selection_draws():
    trials = [CLEAN, WEAK, STRONG]
    chosen = verdict.choose(trials, SELECT)
    # Image 0 is a tie of all three: the strongest over all images. Image 3 is wrong without an attack.
    assert chosen.tolist() == [2, 2, 2, 0]
    right = verdict.worst(trials, chosen)
    assert right[REPORT].tolist() == [[True, False, True, False], [True, True, False, False]]
    assert verdict.candidates(trials, chosen).flatten().tolist() == [6, 6, 6, 4]


def test_selection_never_looks_at_the_draws_of_the_report():
    other = trial("strong", STRONG.correct[:2].tolist() + [[0] * 4] * 2, kind="adaptive", attempted=ALL)
    assert verdict.choose([CLEAN, WEAK, other], SELECT).equal(verdict.choose([CLEAN, WEAK, STRONG], SELECT))


def test_an_equal_attack_that_came_later_is_preferred():
    assert verdict.choose([CLEAN, WEAK, WEAK], SELECT)[1] == 2


def test_images_that_fell_in_every_selection_draw_stand_no_more_and_keep_their_worst_case():
    assert verdict.standing([CLEAN, WEAK], SELECT).tolist() == [True, True, True, False]
    assert verdict.standing([CLEAN, WEAK, STRONG], SELECT).tolist() == [True, False, False, False]
    asks = trial("asks", [[1, 1, 1]] * 4, attempted=[True, False, False], kind="black box")
    whole = verdict.completed(asks, [CLEAN, WEAK, STRONG], SELECT)
    assert whole.correct[:, 0].all()
    assert whole.correct[:, 1:].equal(STRONG.correct[:, 1:3])
    # An image that it did not attempt is not its own.
    assert verdict.choose([CLEAN, WEAK, STRONG, whole], SELECT).tolist()[1:] == [2, 2, 0]


def test_three_readings_of_several_runs():
    correct = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    assert verdict.summary(correct) == {"mean": 6 / 9, "majority": 2 / 3, "always": 1 / 3}


def test_every_image_is_told():
    trials = [CLEAN, WEAK, STRONG]
    found = verdict.per_example(trials, verdict.choose(trials, SELECT), torch.tensor([5, 6, 7, 8]), REPORT)
    assert found[1] == {"label": 6, "clean": 1.0, "worst": 0.5, "attack": "strong"}
    assert found[3] == {"label": 8, "clean": 0.0, "worst": 0.0, "attack": "none"}

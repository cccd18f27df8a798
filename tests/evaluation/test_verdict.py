"""The worst case, on tables small enough to work out by hand."""

from types import SimpleNamespace

import pytest
import torch
from trials import trial

from immunonet.evaluation import verdict

# Two selection runs, then two for the report; four images.
CLEAN = trial("none", [[1, 1, 1, 0]] * 4, kind="none")
WEAK = trial("weak", [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]])
STRONG = trial("strong", [[1, 0, 0, 0], [1, 0, 0, 1], [1, 0, 1, 1], [1, 1, 0, 1]])
SELECT, REPORT = slice(0, 2), slice(2, None)


class Asked:
    """Stands in for a runner: label 1 is right; `answer(candidate, seed)` says what the defence answers."""

    def __init__(self, answer, n=4):
        self.answer, self.questions = answer, []
        self.x, self.y = torch.zeros(n, 1), torch.ones(n, dtype=torch.long)
        self.subject = SimpleNamespace(classes=2)

    def labels(self, key, x, seeds):
        self.questions.append((key, len(x), tuple(seeds)))
        return torch.tensor([[self.answer(float(one), seed) for one in x[:, 0]] for seed in seeds])


def test_each_image_gets_the_attack_that_did_best_on_the_selection_draws():
    trials = [CLEAN, WEAK, STRONG]
    chosen = verdict.choose(trials, SELECT)
    # Image 0 is a tie of all three: the strongest over all images. Image 3 is wrong without an attack.
    assert chosen.tolist() == [2, 2, 2, 0]
    right = verdict.worst(trials, chosen)
    assert right[REPORT].tolist() == [[True, False, True, False], [True, True, False, False]]
    assert verdict.candidates(trials, chosen).flatten().tolist() == [6, 6, 6, 4]


def test_trials_are_ranked_and_the_best_stands_in_for_those_that_did_not_try():
    asks = trial("asks", [[1, 0]] * 4, attempted=[False, True], kind="black box")
    ranked = verdict.ranked([CLEAN, WEAK, asks], SELECT)
    assert ranked.T.tolist() == [[1, 0, 1], [2, 1, 0], [1, 0, 1], [0, 1, 0]]


def test_selection_never_looks_at_the_draws_of_the_report():
    other = trial("strong", STRONG.correct[:2].tolist() + [[0] * 4] * 2)
    assert verdict.choose([CLEAN, WEAK, other], SELECT).equal(verdict.choose([CLEAN, WEAK, STRONG], SELECT))


def test_an_equal_attack_that_came_later_is_preferred():
    assert verdict.choose([CLEAN, WEAK, WEAK], SELECT)[1] == 2


def test_finalists_are_compared_on_more_draws_and_the_worst_is_counted_on_others():
    # On the draws 0 to 9 candidates of "weak" (4 letters, as "none") fool it more often; on 10 to 19 they never do.
    runner = Asked(lambda one, seed: int(seed >= (8 if one == 4 else 2)))
    found = verdict.worst_case(
        runner, [CLEAN, WEAK, STRONG], SELECT, finalists=2, selection=range(10), report=range(10, 20)
    )
    assert found.chosen.tolist() == [1, 1, 1, 0]
    assert found.adversarials.flatten().tolist() == [4.0] * 4
    assert found.correct.shape == (10, 4)
    assert found.correct.all()
    assert (found.selected_on, found.seeds) == (tuple(range(10)), tuple(range(10, 20)))
    assert [(key, len(seeds)) for key, _, seeds in runner.questions] == [
        ("finalist 0", 10), ("finalist 1", 10), ("worst case", 10),
    ]  # fmt: skip


def test_one_finalist_needs_no_comparison():
    runner = Asked(lambda one, seed: 0)
    found = verdict.worst_case(runner, [CLEAN, STRONG], SELECT, finalists=1, selection=[0], report=[1])
    assert [key for key, *_ in runner.questions] == ["worst case"]
    assert not found.correct.any()


def test_without_randomness_the_worst_case_is_that_of_the_trials():
    runner = Asked(pytest.fail)
    once = slice(0, 1)
    trials = [trial("none", [[1, 1, 1, 0]], kind="none"), trial("strong", [[1, 0, 0, 0]])]
    found = verdict.worst_case(runner, trials, once, finalists=2, selection=(), report=())
    assert found.correct.tolist() == [[True, False, False, False]]
    assert found.seeds == ()


def test_images_that_fell_in_every_selection_draw_stand_no_more_and_keep_their_worst_case():
    wrong = Asked(lambda one, seed: 0)
    assert verdict.standing(wrong, [CLEAN, WEAK], SELECT, (0, 1, 2)).tolist() == [True, True, True, False]
    assert verdict.standing(wrong, [CLEAN, WEAK, STRONG], SELECT, (0, 1, 2)).tolist() == [True, False, False, False]
    assert [count for _, count, _ in wrong.questions] == [1, 3]
    # A draw that its trial did not have shows that "strong" has not broken them for good.
    late = Asked(lambda one, seed: int(one == 6 and seed == 2))
    assert verdict.standing(late, [CLEAN, WEAK, STRONG], SELECT, (0, 1, 2)).tolist() == [True, True, True, False]
    assert verdict.standing(Asked(pytest.fail), [CLEAN, WEAK], SELECT, ()).tolist() == [True, True, True, False]
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
    runner = Asked(lambda one, seed: int(seed == 3 and one == 6))
    found = verdict.worst_case(runner, [CLEAN, WEAK, STRONG], SELECT, finalists=1, selection=(0, 1), report=(2, 3))
    told = verdict.per_example(CLEAN, found, ["none", "weak", "strong"], torch.tensor([5, 6, 7, 8]), REPORT)
    assert told[1] == {"label": 6, "clean": 1.0, "worst": 0.5, "attack": "strong"}
    assert told[3] == {"label": 8, "clean": 0.0, "worst": 0.0, "attack": "none"}

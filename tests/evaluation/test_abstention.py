"""Declining what looks foreign, on tables small enough to work out by hand."""

import pytest
from trials import trial

from immunonet.evaluation.abstention import LEVELS, abstention
from immunonet.evaluation.draws import Draws

# One run that chooses, then one that counts; four images.
CLEAN = trial("none", [[1, 1, 1, 0]] * 2, role=None, familiarity=[0.9, 0.6, 0.03, 0.9])
LOUD = trial("pgd", [[0, 0, 0, 0]] * 2, familiarity=[0.04, 0.3, 0.001, 0.04])
QUIET = trial("stealthy", [[0, 1, 1, 0]] * 2, familiarity=[0.3, 0.9, 0.9, 0.7])
DRAWS = Draws(choose=(0,), count=(1,), few=1)


def levels(*trials):
    return {found["level"]: found for found in abstention(list(trials), DRAWS)}


def test_what_is_declined_is_neither_right_nor_broken():
    found = levels(CLEAN, LOUD)
    assert list(found) == list(LEVELS)
    none, nominal = found[0.0], found[0.05]
    assert (none["accepted"], none["right"], none["held"]) == (1.0, 0.75, 0.0)
    # The third clean image is declined; of the attacked ones all but the second. The last image is wrong without an
    # attack, which is its worst case where the attack is declined.
    assert (nominal["accepted"], nominal["right"]) == (0.75, 0.5)
    assert nominal["held"] == 0.5
    assert nominal["ci95"][0] < 0.5 < nominal["ci95"][1]
    assert nominal["joint"] is None


def test_an_attack_that_avoids_rejection_counts_where_the_loud_one_is_declined():
    found = levels(CLEAN, LOUD, QUIET)
    assert found[0.05]["held"] == 0.25
    assert found[0.05]["joint"] == 0.5
    # All but the clean image of .9 and the quiet ones above .5 are declined.
    assert found[0.5]["held"] == pytest.approx(0.75)


def test_the_worst_case_is_chosen_on_other_draws_than_it_is_counted_on():
    lucky = trial("pgd", [[1, 1, 1, 1], [0, 0, 0, 0]], familiarity=[0.9] * 4)
    assert not DRAWS.counted(lucky.correct).any()
    assert levels(CLEAN, lucky)[0.0]["held"] == 0.75


def test_a_tie_goes_to_the_attack_that_is_stronger_overall():
    some = trial("pgd", [[1, 0, 0, 0], [0, 0, 0, 0]], familiarity=[0.9] * 4)
    assert levels(CLEAN, some)[0.0]["held"] == 0.0


def test_attacks_that_tried_few_images_are_left_out():
    few = trial("square", [[0, 0]] * 2, role="asks", familiarity=[0.9, 0.9])
    passed = trial("square", [[0] * 4] * 2, attempted=[True, True, True, False], familiarity=[0.9] * 4)
    assert levels(CLEAN, few, passed) == levels(CLEAN)


def test_a_defence_that_senses_nothing_has_no_curve():
    assert abstention([trial("none", [[1, 1]], role=None)], Draws()) == []

"""A campaign and its worst case, on tables small enough to work out by hand."""

import dataclasses

import pytest
import torch
from torch import nn
from trials import BOUNDS, THREAT, campaign, trial

from immunonet.attacks import PGD, Noise
from immunonet.evaluation.campaign import candidates, completed, ranked, worst
from immunonet.evaluation.draws import Draws
from immunonet.evaluation.outcome import outcome, summary
from immunonet.evaluation.suite import Planned

# Two runs that choose, then two that count; four images.
CLEAN = trial("none", [[1, 1, 1, 0]] * 4, role=None)
WEAK = trial("weak", [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]])
STRONG = trial("strong", [[1, 0, 0, 0], [1, 0, 0, 1], [1, 0, 1, 1], [1, 1, 0, 1]])
DRAWS = Draws(choose=(0, 1), count=(2, 3), few=2)


class Scripted(nn.Module):
    """Label 1 is right; `answer(candidate, seed)` says what is answered."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, seed=None):
        return nn.functional.one_hot(self.predict(x, seed), 2).mul(20.0).log_softmax(1)

    def predict(self, x, seed=None):
        return torch.tensor([int(self.answer(float(one), seed)) for one in x[:, 0]])


def against(trials, answer, draws=DRAWS, **budget):
    """A campaign whose trials are done, and what its defence is asked: why, about how many, under which seeds."""
    x, y = torch.zeros(4, 1), torch.ones(4, dtype=torch.long)
    done = campaign(Scripted(answer), x, y, draws=draws, base=nn.Linear(1, 2), **budget)
    done.trials = list(trials)
    questions = []

    def told(part):
        if len(part.args) == 2:
            points, seeds = part.args
            questions.append((part.key.split(" ", 1)[1].split(" /")[0], len(points), seeds))

    done.bench.advance = told
    return done, questions


def test_each_image_gets_the_attack_that_did_best_on_the_draws_that_choose():
    trials = [CLEAN, WEAK, STRONG]
    chosen = ranked(trials, DRAWS)[0]
    # Image 0 is a tie of all three: the strongest over all images. Image 3 is wrong without an attack.
    assert chosen.tolist() == [2, 2, 2, 0]
    assert DRAWS.counted(worst(trials, DRAWS)).tolist() == [[True, False, True, False], [True, True, False, False]]
    assert candidates(trials, chosen).flatten().tolist() == [6, 6, 6, 4]


def test_trials_are_ranked_and_the_best_stands_in_for_those_that_did_not_try():
    asks = trial("asks", [[1, 0]] * 4, attempted=[False, True], role="asks")
    assert ranked([CLEAN, WEAK, asks], DRAWS).T.tolist() == [[1, 0, 1], [2, 1, 0], [1, 0, 1], [0, 1, 0]]


def test_choosing_never_looks_at_the_draws_that_count():
    other = trial("strong", STRONG.correct[:2].tolist() + [[0] * 4] * 2)
    assert ranked([CLEAN, WEAK, other], DRAWS).equal(ranked([CLEAN, WEAK, STRONG], DRAWS))


def test_an_equal_attack_that_came_later_is_preferred():
    assert ranked([CLEAN, WEAK, WEAK], DRAWS)[0, 1] == 2


def test_finalists_are_compared_on_more_draws_and_the_worst_is_counted_on_others():
    # On the draws 0 to 9 candidates of "weak" (4 letters, as "none") fool it more often; on 10 to 19 they never do.
    draws = Draws(choose=tuple(range(10)), count=tuple(range(10, 20)), few=2)
    done, questions = against(
        [CLEAN, WEAK, STRONG], lambda one, seed: seed >= (8 if one == 4 else 2), draws, finalists=2
    )
    found = done.worst_case(THREAT)
    assert found.chosen.tolist() == [1, 1, 1, 0]
    assert found.adversarials.flatten().tolist() == [4.0] * 4
    assert found.correct.shape == (10, 4)
    assert found.correct.all()
    assert found.seeds == draws.count
    assert questions == [
        ("finalist 0", 4, draws.choose), ("finalist 1", 4, draws.choose), ("worst case", 4, draws.count),
    ]  # fmt: skip


def test_one_finalist_needs_no_comparison():
    done, questions = against([CLEAN, STRONG], lambda one, seed: 0, Draws(choose=(0,), count=(1,), few=1), finalists=1)
    assert not done.worst_case(THREAT).correct.any()
    assert [why for why, *_ in questions] == ["worst case"]


def test_without_randomness_the_worst_case_is_that_of_the_trials():
    trials = [trial("none", [[1, 1, 1, 0]], role=None), trial("strong", [[1, 0, 0, 0]])]
    done, _ = against(trials, pytest.fail, Draws())
    found = done.worst_case(THREAT)
    assert found.correct.tolist() == [[True, False, False, False]]
    assert found.seeds == ()


def standing(trials, answer, draws=None):
    done, questions = against(trials, answer, draws or Draws(choose=(0, 1, 2), count=(3, 4, 5), few=2))
    return done._standing(THREAT).tolist(), questions


def test_images_that_fell_in_every_draw_that_chooses_stand_no_more_and_keep_their_worst_case():
    fallen, questions = standing([CLEAN, WEAK], lambda one, seed: 0)
    assert (fallen, questions) == ([True, True, True, False], [("fallen", 1, (0, 1, 2))])
    fallen, questions = standing([CLEAN, WEAK, STRONG], lambda one, seed: 0)
    assert (fallen, questions) == ([True, False, False, False], [("fallen", 3, (0, 1, 2))])
    # A draw that its trial did not have shows that "strong" has not broken them for good.
    assert standing([CLEAN, WEAK, STRONG], lambda one, seed: one == 6 and seed == 2)[0] == [True, True, True, False]
    once = [dataclasses.replace(done, correct=done.correct[:1]) for done in (CLEAN, WEAK)]
    assert standing(once, pytest.fail, Draws())[0] == [True, False, True, False]
    asks = trial("asks", [[1, 1, 1]] * 4, attempted=[True, False, False], role="asks")
    whole = completed(asks, [CLEAN, WEAK, STRONG], DRAWS)
    assert whole.correct[:, 0].all()
    assert whole.correct[:, 1:].equal(STRONG.correct[:, 1:3])
    # An image that it did not attempt is not its own.
    assert ranked([CLEAN, WEAK, STRONG, whole], DRAWS)[0].tolist()[1:] == [2, 2, 0]


def test_three_readings_of_several_runs():
    correct = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    assert summary(correct) == {"mean": 6 / 9, "majority": 2 / 3, "always": 1 / 3}


def test_every_image_is_told():
    done, _ = against([CLEAN, WEAK, STRONG], lambda one, seed: seed == 3 and one == 6, finalists=1)
    # As the caller gave them, the first two lay the other way round.
    done.claim = dataclasses.replace(done.claim, order=(1, 0, 2, 3))
    told = outcome(done, done.worst_cases(), [], [], {}).record["per_example"]
    assert told[0] == {"image": 0, "label": 1, "clean": 1.0, "worst": 0.5, "attack": "strong"}
    assert told[3] == {"image": 3, "label": 1, "clean": 0.0, "worst": 0.0, "attack": "none"}
    assert [one["image"] for one in told] == [0, 1, 2, 3]


def line(x):
    """Whether a number is above one half."""
    return torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5], dim=1).mul(20).log_softmax(1)


@pytest.fixture
def plan():
    common = {"eps": 0.2, "bounds": BOUNDS}
    pgd = PGD(step=0.1, iterations=2, random_start=False, **common)
    return [
        Planned(name="none", n=4),
        Planned(name="pgd", n=4, method=pgd, target=line, roles=frozenset({"adaptive"})),
        Planned(name="noise", n=4, method=Noise(points=1, **common), target=line, roles=frozenset({"asks"})),
    ]


def test_the_strongest_attack_is_made_with_twice_the_steps_and_those_that_ask_pass_over_the_broken(plan):
    said = []
    x, y = torch.tensor([[0.6], [0.9], [0.1], [0.45]]), torch.tensor([1, 1, 0, 0])
    done = campaign(line, x, y, base=nn.Linear(1, 2), attacks=plan)
    done.say = said.append
    done.run(3)
    assert [trial.attack.name for trial in done.trials] == ["none", "pgd", "pgd doubled", "noise"]
    assert done.strongest(THREAT) is done.trials[1]
    twice = done.trials[2]
    assert (twice.n, twice.attack.method.iterations, twice.attack.roles) == (3, 4, {"adaptive", "doubled"})
    assert done.trials[1].correct.tolist() == [[False, True, True, False]]
    asks = done.trials[3]
    assert asks.attempted.tolist() == [False, True, True, False]
    assert asks.adversarials[[0, 3]].equal(x[[0, 3]])
    assert asks.correct.tolist() == [[False, True, True, False]]
    assert said[-1] == "noise: 1.000 right of 2"
    assert done.worst_case(THREAT).correct.tolist() == [[False, True, True, False]]


def test_what_was_made_on_the_network_alone_serves_every_defence_of_it(plan, tmp_path, monkeypatch):
    x, y = torch.tensor([[0.6], [0.9], [0.1], [0.45]]), torch.tensor([1, 1, 0, 0])
    alone = dataclasses.replace(plan[1], roles=frozenset({"transfer", "base"}))
    first = campaign(line, x, y, base=nn.Linear(1, 2), attacks=[plan[0], alone], folder=tmp_path)
    first.run(3)
    calls = []
    real = Planned.__call__

    def counting(self, x, y):
        calls.append(self.name)
        return real(self, x, y)

    monkeypatch.setattr(Planned, "__call__", counting)
    for who, made in (("d", []), ("another", [])):
        again = campaign(line, x, y, base=nn.Linear(1, 2), attacks=[plan[0], alone], folder=tmp_path)
        again.known["defence"] = who
        again.key = who
        again.run(3)
        assert calls == made
        assert again.trials[1].adversarials.equal(first.trials[1].adversarials)
    knowing = campaign(line, x, y, base=nn.Linear(1, 2), attacks=plan[:2], folder=tmp_path)
    knowing.run(3)
    assert calls == ["pgd", "pgd"]

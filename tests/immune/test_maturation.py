"""Whole maturations, mostly through RAILS on its inputs: cells are vectors, and affinity is minus their distance."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.testing import assert_close

from immunonet import RAILS, Maturation
from immunonet.immune.maturation import Naive, _candidates, mature, mutation_range, temperatures
from immunonet.immune.noise import Noise

LEVEL = 1e-4
STILL = {"mutation_rate": 0.0, "prune": None, "early_stop": None}


class Columns(nn.Module):
    """Logits for any inputs: RAILS only counts them."""

    def __init__(self, classes=2):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return x.flatten(1)[:, :1].expand(-1, self.classes) * 1.0


def respond(x, y, antigens, *, layers="input", classes=2, bounds=(0.0, 1.0), seed=0, trace=False, **settings):
    rails = RAILS(Columns(classes), layers, maturation=Maturation(**settings), bounds=bounds)
    rails.fit(x, y, calibration=(x[:1], y[:1]))
    return rails.respond(antigens, seed=seed, trace=trace)


LINE = torch.tensor([[0.1], [0.2], [0.3], [0.35], [0.5], [0.6]])
LINE_LABELS = torch.tensor([0, 0, 0, 1, 1, 1])


def test_without_evolution_the_vote_can_be_counted_by_hand():
    # The antigen at .26 is .04 and .06 from class 0 (.3, .2), .09 and .24 from class 1 (.35, .5). Four clones of
    # each naive cell make 16; the nearest 12 vote: 8 of class 0 and the 4 clones of .35. The rest is memory.
    r = respond(
        LINE, LINE_LABELS, torch.tensor([[0.26]]), trace=True, **STILL,
        population=16, neighbours=2, generations=0, plasma=0.75, memory=0.25,
    )  # fmt: skip
    assert_close(r.votes, torch.tensor([[2 / 3, 1 / 3]]))
    assert r.labels.tolist() == [0]
    assert r.generations.tolist() == [0]
    assert r.plasma.label.tolist() == [[0] * 8 + [1] * 4]
    assert r.plasma.origin.tolist() == [[2] * 4 + [1] * 4 + [3] * 4]
    assert_close(r.plasma.affinity, -torch.tensor([[0.04] * 4 + [0.06] * 4 + [0.09] * 4]))
    assert r.memory.origin.tolist() == [[4] * 4]
    assert_close(r.memory.x, torch.full((1, 4, 1), 0.5))
    (curve,) = r.trace
    assert_close(curve.affinity_best, -torch.tensor([[[0.04, 0.09]]]))
    assert_close(curve.affinity_mean, -torch.tensor([[[0.05, 0.165]]]))
    assert_close(curve.votes, torch.tensor([[[2 / 3, 1 / 3]]]))
    assert_close(curve.entropy, torch.tensor([[math.log(3) - 2 / 3 * math.log(2)]]))


def test_an_even_vote_goes_to_the_class_with_the_fittest_cell():
    for antigen, label in ((0.32, 0), (0.33, 1)):
        r = respond(
            LINE, LINE_LABELS, torch.tensor([[antigen]]), **STILL,
            population=2, neighbours=1, generations=0, plasma=1.0, memory=0.0,
        )  # fmt: skip
        assert r.votes.tolist() == [[0.5, 0.5]]
        assert r.labels.tolist() == [label]


@pytest.mark.parametrize("temperature", [0.05, 0.5, "auto"])
def test_offspring_come_from_parents_as_often_as_the_softmax_says(temperature):
    n = 60_000
    r = respond(
        LINE, LINE_LABELS, torch.tensor([[0.26]]), **STILL, temperature=temperature,
        population=n, neighbours=3, generations=1, crossover=None, plasma=1.0, memory=0.0,
    )  # fmt: skip
    distances = {0: (0.16, 0.06, 0.04), 1: (0.09, 0.24, 0.34)}
    tau = np.std([*distances[0], *distances[1]]) if temperature == "auto" else temperature
    counts = np.bincount(r.plasma.origin[0].numpy(), minlength=6)
    for label, near in distances.items():
        weights = np.exp(-np.array(near) / tau)
        expected = n / 2 * weights / weights.sum()
        assert stats.chisquare(counts[3 * label : 3 * label + 3], expected).pvalue > LEVEL


@pytest.mark.parametrize(
    ("crossover", "antigen", "expected"),
    [("affinity", 0.2, 0.8), ("authors", 0.2, 0.2), ("affinity", None, 0.5), ("authors", None, 0.5)],
)
def test_children_of_two_parents_take_pixels_by_affinity(crossover, antigen, expected):
    # The naive cells of class 0 are all 0 and all 1: their first values are .2 and .8 away from the antigen. With
    # None, features are constant, so that both distances are 0.
    width = 2000
    x = torch.stack([torch.zeros(width), torch.ones(width), torch.full((width,), 0.4), torch.full((width,), 0.6)])
    layer = (lambda x: x[:, :1]) if antigen is not None else (lambda x: x[:, :1] * 0)
    r = respond(
        x, torch.tensor([0, 0, 1, 1]), torch.full((1, width), antigen or 0.2), layers=layer, **STILL,
        population=40, neighbours=2, generations=1, crossover=crossover, temperature=1e6, plasma=1.0, memory=0.0,
    )  # fmt: skip
    share = 1 - r.plasma.x[r.plasma.label == 0].mean(1)
    mixed = share[(share > 0) & (share < 1)]
    assert len(mixed) >= 3
    assert ((mixed - expected).abs() < 5 * (0.25 / width) ** 0.5).all()
    # A child descends from the parent that gave more pixels.
    if expected != 0.5:
        assert r.plasma.origin[r.plasma.label == 0][(share > 0) & (share < 1)].eq(0 if expected > 0.5 else 1).all()


def test_clones_mutate_at_the_given_rate_by_the_given_amounts():
    x = torch.tensor([[-5.0], [5.0]]).expand(2, 5000)
    r = respond(
        x, torch.tensor([0, 1]), torch.zeros(1, 5000), bounds=(-100.0, 100.0),
        population=20, neighbours=1, generations=0, mutation_rate=0.15, mutation_range=(0.05, 0.15), plasma=1.0,
        memory=0.0, prune=None,
    )  # fmt: skip
    amounts = (r.plasma.x[0] - x[r.plasma.origin[0]]).double().numpy() / 200
    moved = amounts[amounts != 0]
    assert stats.binomtest(len(moved), amounts.size, 0.15).pvalue > LEVEL
    assert stats.kstest(np.abs(moved), stats.uniform(0.05, 0.1).cdf).pvalue > LEVEL
    assert stats.binomtest(int((moved > 0).sum()), len(moved), 0.5).pvalue > LEVEL
    # Clones differ: two of them move the same pixel as often as chance has it.
    both = int(((amounts[0] != 0) & (amounts[1] != 0)).sum())
    assert stats.binomtest(both, 5000, 0.15**2).pvalue > LEVEL


@settings(max_examples=15, deadline=None)
@given(
    rate=st.sampled_from([0.0, 0.2, 1.0]),
    most=st.floats(0, 1),
    crossover=st.sampled_from(["affinity", "authors", None]),
    seed=st.integers(0, 2**63 - 1),
)
def test_cells_never_leave_their_bounds_per_channel(rate, most, crossover, seed):
    bounds = torch.tensor([[-1.0, 1.0], [0.0, 1e-3], [50.0, 90.0]])
    low, high = bounds[:, 0, None], bounds[:, 1, None]
    g = torch.Generator().manual_seed(seed % 1000)
    x = low + (high - low) * torch.rand(12, 3, 4, generator=g).mul(1.4).sub(0.2).clamp(0, 1)
    r = respond(
        x, torch.arange(12) % 2, x[:3], bounds=bounds, seed=seed, mutation_rate=rate, mutation_range=(0.0, most),
        crossover=crossover, population=8, neighbours=2, generations=3, plasma=1.0, memory=0.0, early_stop=None,
    )  # fmt: skip
    assert ((r.plasma.x >= low) & (r.plasma.x <= high)).all()


def test_aligned_clones_recognise_a_moved_image():
    # The antigen is class 1's bar moved by one pixel; class 0's grey is nearer to it until clones are aligned.
    bar = torch.zeros(1, 1, 10, 10)
    bar[..., 3] = 1
    grey = torch.full((1, 1, 10, 10), 0.25)
    antigen = bar.roll(1, dims=3)
    assert (antigen - grey).norm() < (antigen - bar).norm()
    still = {**STILL, "population": 400, "neighbours": 1, "generations": 0}
    images, y = torch.cat([grey, bar]), torch.tensor([0, 1])
    assert respond(images, y, antigen, alignment=0.0, **still).labels.tolist() == [0]
    assert respond(images, y, antigen, alignment=0.1, **still).labels.tolist() == [1]


def test_recombined_clones_recognise_what_lies_between_the_naive_cells():
    # The antigen is halfway between two cells of class 1; one of class 0 is nearer than either.
    cells = torch.tensor([[0.5, 0.7], [0.6, 0.7], [0.1, 0.5], [0.9, 0.5]])
    still = {**STILL, "population": 40, "neighbours": 2, "generations": 0}
    antigen, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0, 0, 1, 1])
    assert respond(cells, y, antigen, recombination=None, **still).labels.tolist() == [0]
    assert respond(cells, y, antigen, recombination=0.1, **still).labels.tolist() == [1]


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_auto_mutation_follows_the_spread_of_the_naive_cells(scale):
    # Naive cells 0 and 1 (times the scale) in each value: a standard deviation of one half, bounds 2 wide.
    naive = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 1, 3) * scale
    least, most = mutation_range(Maturation(), naive, (torch.full((3,), -1.0), torch.full((3,), 1.0)))
    assert_close(least, torch.tensor([0.25 * 0.5 * scale / 2]))
    assert_close(most, torch.tensor([0.75 * 0.5 * scale / 2]))


def test_plasma_and_memory_are_the_fittest_quarter():
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 5, generator=g), torch.arange(60) % 3
    antigens = torch.rand(6, 5, generator=g)
    r = respond(x, y, antigens, classes=3, population=90, neighbours=5, generations=3, mutation_rate=1.0)
    assert r.plasma.x.shape == (6, 4, 5)  # .05 * 90 = 4.5, and even is nearer
    assert r.memory.x.shape == (6, 18, 5)
    both = torch.cat([r.plasma.affinity, r.memory.affinity], 1)
    assert (both.diff(dim=1) <= 0).all()
    for cells in (r.plasma, r.memory):
        assert torch.equal(y[cells.origin], cells.label)
        assert_close(cells.affinity, -(cells.x - antigens[:, None]).norm(dim=2))
    votes = nn.functional.one_hot(r.plasma.label, 3).float().mean(1)
    assert_close(r.votes, votes)
    assert_close(r.votes.sum(1), torch.ones(6))
    # Mutated cells all differ, so a cell in both would show.
    cells = torch.cat([r.plasma.x, r.memory.x], 1)
    assert all(len(row.unique(dim=0)) == len(row) for row in cells)


def test_no_better_cell_is_left_out():
    x, y = torch.rand(20, 5, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    everything = {"population": 40, "neighbours": 5, "generations": 2, "prune": None, "early_stop": None}
    part = respond(x, y, x[:2] * 0.9, **everything, plasma=0.1, memory=0.4)
    whole = respond(x, y, x[:2] * 0.9, **everything, plasma=1.0, memory=0.0)
    assert torch.equal(torch.cat([part.plasma.affinity, part.memory.affinity], 1), whole.plasma.affinity[:, :20])


@pytest.mark.parametrize("crossover", ["affinity", "authors", None])
def test_an_antigen_equal_to_a_cell_gives_no_nan(crossover):
    x = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    x[4:] = x[0]  # class 1 is four times the antigen: its naive affinities do not spread
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    r = respond(
        x, y, x[:1], trace=True, mutation_rate=0.01, crossover=crossover, prune=None, early_stop=None,
        population=80, neighbours=4, generations=4,
    )  # fmt: skip
    for part in (r, r.plasma, r.memory, *r.trace):
        for value in vars(part).values():
            if isinstance(value, torch.Tensor):
                assert torch.isfinite(value).all()
    assert r.plasma.affinity.max() == 0


def test_all_examples_equal_to_the_antigen():
    x = torch.full((8, 3), 0.25)
    r = respond(x, torch.arange(8) % 2, x[:1], population=8, neighbours=2, generations=3, trace=True)
    assert torch.isfinite(r.plasma.x).all()
    assert torch.isfinite(r.trace[0].affinity_mean).all()
    assert_close(r.votes.sum(), torch.tensor(1.0))


def test_auto_temperature_is_the_spread_of_the_naive_affinities():
    distances = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[2.0, 2.0], [2.0, 2.0]]])
    found = temperatures(Maturation(), distances)
    assert_close(found[0], torch.tensor(3.5**0.5))
    assert 0 < found[1] < 1e-3
    assert temperatures(Maturation(temperature=18), distances).tolist() == [18, 18]


# Decay, early stop and pruning: distances are played from a script, so that what must follow is known.


class Play:
    """Matures antigens of 2 classes of 2 cells; `script[g]` `(B, 2, 2)` holds the distances of generation g."""

    def __init__(self, script, width=1, **changes):
        self.script = torch.tensor(script)
        generations, batch = self.script.shape[:2]
        self.cells, self.families = [], []
        settings = Maturation(
            **{
                "population": 4, "neighbours": 1, "generations": generations - 1, "crossover": None,
                "temperature": 1e-3, "mutation_range": (0.05, 0.15),
                "plasma": 0.5, "memory": 0.5, "early_stop": None, "prune": None, **changes,
            }
        )  # fmt: skip
        index = torch.tensor([[[0], [1]]]).expand(batch, -1, -1)
        x = torch.zeros(batch, 2, 1, width)
        naive = Naive(x, x, torch.ones(batch, 2, 1), index)
        bounds = (torch.tensor(-50.0), torch.tensor(50.0))
        noise = Noise([0], antigens=batch)
        self.end, self.curve = mature(naive, self.distances, settings, noise, bounds=bounds, trace=True)

    def distances(self, cells, family):
        self.cells.append(cells.clone())
        self.families.append(list(zip(*(part.tolist() for part in family), strict=True)))
        return self.script[len(self.cells) - 1][family]


def test_rate_and_range_shrink_only_when_affinity_falls_below_its_best():
    # The first cell of each class, at distance 0, is the only parent; the second one makes the sum.
    sums = [1.0, 2.0, 1.5, 0.9, 0.9, 1.2, 5.0, 5.0]
    expected = [(0.5, 0.08), (0.5, 0.08), (0.25, 0.04), (0.125, 0.02), (0.125, 0.02), (0.125, 0.02), (0.1, 0.02)]
    play = Play(
        [[[[0.0, s], [0.0, s]]] for s in sums], width=20_000,
        mutation_rate=(0.1, 0.5), mutation_range=(0.02, 0.08), decay=0.5,
    )  # fmt: skip
    before = torch.zeros(1, 2, 2, 20_000)
    for cells, (rate, most) in zip(play.cells, [*expected, expected[-1]], strict=True):
        amounts = ((cells - before).abs() / 100).flatten().double()
        moved = amounts[amounts > 0]
        assert stats.binomtest(len(moved), len(amounts), rate).pvalue > LEVEL
        assert moved.min() >= 0.02 - 1e-6
        assert 0.995 * most < moved.max() < most + 1e-6
        before = cells[:, :, :1].expand(-1, -1, 2, -1)


def test_nothing_shrinks_without_decay():
    play = Play([[[[0.0, s], [0.0, s]]] for s in (1.0, 9.0, 9.0, 9.0)], width=20_000, decay=1.0)
    moved = (play.cells[3] != play.cells[2][:, :, :1]).double().sum()
    assert stats.binomtest(int(moved), 80_000, 0.15).pvalue > LEVEL


ONE = [[0.1, 0.2], [0.3, 0.4]]
OTHER = [[0.3, 0.4], [0.1, 0.2]]
BOTH = [[0.1, 0.3], [0.2, 0.4]]


@pytest.mark.parametrize(
    ("script", "early_stop", "last", "votes"),
    [
        ([ONE, ONE, OTHER, OTHER], 2, 1, [1.0, 0.0]),
        ([BOTH, ONE, ONE, OTHER], 2, 2, [1.0, 0.0]),
        ([ONE, BOTH, OTHER, OTHER, ONE], 2, 3, [0.0, 1.0]),
        ([ONE, BOTH, ONE, BOTH], 2, 3, [0.5, 0.5]),
        ([BOTH, ONE, BOTH], 1, 1, [1.0, 0.0]),
        ([ONE, BOTH], 1, 0, [1.0, 0.0]),
        ([ONE, ONE, ONE, BOTH], None, 3, [0.5, 0.5]),
        ([ONE, ONE, ONE, BOTH], 4, 3, [0.5, 0.5]),
    ],
)
def test_an_antigen_stops_after_generations_of_one_label(script, early_stop, last, votes):
    end = Play([[table] for table in script], early_stop=early_stop).end
    assert end.generations.tolist() == [last]
    assert end.votes.tolist() == [votes]
    assert_close(end.best, -torch.tensor([script[last]]).amin(2))


TIED = [[0.1, 0.2], [0.2, 0.4]]


def test_no_class_is_alone_while_another_is_as_near_as_the_last_plasma_cell():
    # Two vote: the cell at .1, and half of each of those at .2.
    for script in ([TIED] * 4, [TIED[::-1]] * 4):
        play = Play([[table] for table in script], early_stop=2)
        assert play.end.generations.tolist() == [3]
        assert sorted(play.end.votes[0].tolist()) == [0.25, 0.75]
        assert play.end.votes.argmax(1).tolist() == [script[0].index(TIED[0])]
        assert_close(play.curve.votes[:, 0], play.end.votes.expand(4, -1))


@pytest.mark.parametrize("names", [[0, 1, 2], [2, 0, 1], [1, 0, 2]])
def test_classes_as_near_as_the_last_candidate_evolve_too(names):
    nearest = torch.tensor([0.3, 0.3, 0.4])[names]
    settings_ = Maturation(generations=10, population=6, neighbours=1, candidates=1)
    assert _candidates(nearest[None, :, None], settings_).tolist() == [(nearest < 0.35).tolist()]


def test_antigens_stop_apart_and_keep_their_last_values():
    play = Play([[BOTH, ONE], [OTHER, ONE], [OTHER, BOTH], [ONE, BOTH]], early_stop=2)
    assert play.end.generations.tolist() == [2, 1]
    assert play.end.votes.tolist() == [[0, 1], [1, 0]]
    # The first antigen alone goes on, and nothing runs after both have stopped.
    assert play.families == [[(0, 0), (0, 1), (1, 0), (1, 1)]] * 2 + [[(0, 0), (0, 1)]]
    votes = [[[0.5, 0.5], [1, 0]], [[0, 1], [1, 0]], [[0, 1], [1, 0]], [[0, 1], [1, 0]]]
    assert_close(play.curve.votes, torch.tensor(votes))
    assert_close(play.curve.entropy, torch.tensor([[math.log(2), 0], [0, 0], [0, 0], [0, 0]]))
    means = [[[0.2, 0.3], [0.15, 0.35]], *[[[0.35, 0.15], [0.15, 0.35]]] * 3]
    assert_close(play.curve.affinity_mean, -torch.tensor(means))
    assert_close(play.curve.affinity_best[1:], -torch.tensor([[[0.3, 0.1], [0.1, 0.3]]] * 3))


@pytest.mark.parametrize(("prune", "pruned"), [(0.3, True), (0.6, False), (None, False)])
def test_a_class_far_behind_the_plasma_stops_evolving(prune, pruned):
    # The last plasma cell is at .2, the second class's fittest at .3: half as far again.
    play = Play([[ONE], [BOTH], [BOTH]], prune=prune)
    assert play.families[0] == [(0, 0), (0, 1)]
    assert play.families[1] == ([(0, 0)] if pruned else [(0, 0), (0, 1)])
    # What was pruned keeps its last distances, .3 and .4.
    expected = [[-0.1, -0.3 if pruned else -0.2]]
    assert_close(play.curve.affinity_best[1], torch.tensor(expected))


def test_a_pruned_class_does_not_evolve_again():
    # At .24 the last plasma cell would let it in again.
    play = Play([[ONE], [[[0.24, 0.24], [0.0, 0.0]]], [OTHER]], prune=0.3)
    assert play.families[1] == [(0, 0)]
    assert (0, 1) not in play.families[2]
    assert_close(play.curve.affinity_best[:, 0, 1], torch.full((3,), -0.3))


def test_pruning_and_stopping_early_change_no_clear_answer():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = (torch.eye(3)[y] * 0.6 + 0.4 * torch.rand(60, 3, generator=g)).clamp(0, 1)
    antigens = (torch.eye(3) * 0.6 + 0.2).repeat(10, 1)
    full = Maturation(generations=10, population=90, neighbours=5, prune=None, early_stop=None)
    for changes in ({"prune": 0.05}, {"early_stop": 2}, {"prune": 0.05, "early_stop": 2}):
        for settings_ in (full, dataclasses.replace(full, **changes)):
            r = respond(x, y, antigens, classes=3, **dataclasses.asdict(settings_))
            assert r.labels.tolist() == [0, 1, 2] * 10


def test_two_gaussians():
    """Far from the boundary between two classes with one covariance the right vote is known, and unanimous."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    centre = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
    x = centre[y] + torch.randn(400, 2, generator=g).clamp(-1.5, 1.5)
    truth = torch.arange(100) % 2
    antigens = centre[truth] + 0.5 * torch.randn(100, 2, generator=g).clamp(-2, 2)
    r = respond(x, y, antigens, bounds=(-6.0, 6.0), population=200)
    assert torch.equal(r.labels, truth)
    assert r.votes.gather(1, truth[:, None]).mean() > 0.95


def test_what_lies_between_two_classes_divides_the_vote():
    half = torch.rand(100, 2, generator=torch.Generator().manual_seed(0))
    # The two classes are mirror images in the antigen, so that over seeds both get half of the votes.
    x, y = torch.cat([half, 1 - half]), torch.arange(200) // 100
    rails = RAILS(Columns(), "input", maturation=Maturation(generations=10, early_stop=None, population=200))
    rails.fit(x, y, calibration=(x, y))
    antigen = torch.full((1, 2), 0.5)
    votes = torch.cat([rails.predict_proba(antigen, seed=seed) for seed in range(20)])[:, 0].double()
    assert abs(votes.mean() - 0.5) < 5 * votes.std() / 20**0.5

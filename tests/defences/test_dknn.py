import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.testing import assert_close

from immunonet import DkNN


class Two(nn.Module):
    def forward(self, x):
        x = x.flatten(1)
        return torch.stack([4 * x[:, 0], 2 - x[:, 0]], 1)


def column(*values):
    return torch.tensor(values)[:, None]


REPERTOIRE = column(0.0, 0.1, 0.2, 0.8, 0.9, 1.0), torch.tensor([0, 0, 0, 1, 1, 1])


def numbers(*several):
    """Variants of a DkNN by how many neighbours they have."""
    return [{"neighbours": k} for k in several]


@pytest.fixture
def line():
    """DkNN with 3 neighbours on the line, calibrated on four examples.

    Their neighbours, and the nonconformity (neighbours of another label) of their true label: .05, label 0: .0 .1 .2,
    so 0; .95, label 1: .8 .9 1., so 0; .45, label 1: .2 .1 .8, so 2; .45, label 0: 1.
    """
    dknn = DkNN(Two(), "input", neighbours=3, metric="euclidean", false_alarm=0.2)
    return dknn.fit(*REPERTOIRE, calibration=(column(0.05, 0.95, 0.45, 0.45), torch.tensor([0, 1, 1, 0])))


def test_a_hand_worked_example(line):
    # Calibration scores 0 0 1 2, n = 4. The antigen .55 has neighbours .8 .9 .2: nonconformity 2 and 1, of which
    # 1 and 2 calibration scores are at least as high: p = 2/5, 3/5. 0 has neighbours of its own label alone:
    # nonconformity 0 and 3, p = 5/5 and 1/5. 1 is its mirror image.
    x = column(0.55, 0.0, 1.0)
    assert_close(line.p_values(x), torch.tensor([[0.4, 0.6], [1.0, 0.2], [0.2, 1.0]]))
    assert line.predict(x).tolist() == [1, 0, 1]
    assert_close(line.credibility(x), torch.tensor([0.6, 1.0, 1.0]))
    assert_close(line.confidence(x), torch.tensor([0.6, 0.8, 0.8]))
    # (m + 1) / (3 + 2) for m of 3 neighbours.
    assert_close(line(x).exp(), torch.tensor([[2 / 5, 3 / 5], [4 / 5, 1 / 5], [1 / 5, 4 / 5]]))


def test_the_strangeness_of_a_hand_worked_example(line):
    # Mean distances of calibration: .05 -> (.05 + .05 + .15) / 3, .95 the same, .45 -> (.25 + .35 + .35) / 3, twice.
    # Of .5 it is (.3 + .3 + .4) / 3 and of .46 (.26 + .34 + .36) / 3, farther than all, so p = 1/5; of .44, whose
    # neighbours are .2 .8 .1, it is (.24 + .36 + .34) / 3, nearer than two of the four: p = 3/5.
    assert line.foreign(column(0.5, 0.46, 0.44, 0.05)).tolist() == [True, True, False, False]
    line.false_alarm = 0.19
    assert not line.foreign(column(0.5)).any()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_one_search_answers_for_fewer_neighbours(metric, images, functional_conv):
    x, y = images
    dknn = DkNN(functional_conv, ["2", "5"], neighbours=10, metric=metric).fit(x, y, calibration=(x[:9], y[:9]))
    found = dknn.predict_each(x, numbers(1, 4, 10))
    for k, labels in zip([1, 4, 10], found, strict=True):
        own = DkNN(functional_conv, ["2", "5"], neighbours=k, metric=metric).fit(x, y, calibration=(x[:9], y[:9]))
        assert torch.equal(labels, own.predict(x))
    with pytest.raises(ValueError, match="at most 10, got 11"):
        dknn.predict_each(x, numbers(11))


@pytest.mark.parametrize(("antigen", "label"), [(0.45, 0), (0.55, 1), (0.0, 0)])
def test_ties_go_to_the_smaller_summed_distance(antigen, label):
    dknn = DkNN(Two(), "input", neighbours=2, metric="euclidean").fit(*REPERTOIRE, calibration=REPERTOIRE)
    assert dknn.predict(column(antigen)).tolist() == [label]


def test_ties_are_counted_in_cosine_distances():
    # From the antigen (1, 0), two neighbours at .1 and .1 and two at 0 and .25: .2 against .25. (The chords of the
    # same angles would say .89 against .71.)
    cosines = torch.tensor([0.9, 0.9, 1.0, 0.75])
    x = torch.stack([cosines, (1 - cosines.square()).sqrt()], 1)
    dknn = DkNN(Two(), "input", neighbours=4, bounds=(-1, 1))
    dknn.fit(x, torch.tensor([0, 0, 1, 1]), calibration=(x, torch.tensor([0, 0, 1, 1])))
    assert dknn.predict(torch.tensor([[1.0, 0.0]])).tolist() == [0]


def test_layers_are_counted_together():
    # Of .45 the first layer sees .2 .1 .8 (two of label 0), the second, of squares, .04 .01 .0 (three).
    dknn = DkNN(Two(), ["input", torch.square], neighbours=3, metric="euclidean")
    dknn.fit(*REPERTOIRE, calibration=(column(0.45), torch.tensor([1])))
    assert dknn.layers == ("input", "square")
    # Nonconformity: label 0 has 6 - 5 = 1, label 1 has 6 - 1 = 5. The one calibration score is 5.
    assert_close(dknn.p_values(column(0.45)), torch.tensor([[1.0, 1.0]]))
    assert_close(dknn(column(0.45)).exp(), torch.tensor([[6 / 8, 2 / 8]]))


# Equally near examples.


class Many(nn.Module):
    """Logits of a number of classes, which DkNN only counts."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return x.flatten(1)[:, :1].expand(-1, self.classes) * 4.0


def halved(x):
    """A layer that tells less: half of the columns."""
    return x[:, : (x.shape[1] + 1) // 2]


@st.composite
def grids(draw):
    """Examples and queries on a grid, where nearly every distance is met several times; labels, and k."""
    classes, n = draw(st.integers(2, 4)), draw(st.integers(8, 60))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels, width = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 3))
    x, queries = (torch.randint(0, levels, (m, width), generator=g).float() / 4 for m in (n, 12))
    y = torch.cat([torch.arange(classes), torch.randint(0, classes, (n - classes,), generator=g)])
    return x, y, queries, torch.randint(0, classes, (12,), generator=g), classes, draw(st.integers(1, min(n, 12)))


def fractions(x, y, queries, classes, k, layers):
    """The places of every label among the k nearest, as fractions, and minus their summed distance; exactly."""
    counts, nearness = [[Fraction()] * classes for _ in queries], np.zeros((len(queries), classes))
    for layer in layers:
        squares = (16 * (layer(queries)[:, None] - layer(x)).square().sum(2)).long().tolist()
        for row, places in enumerate(counts):
            edge = sorted(squares[row])[k - 1]
            left, level = k - sum(s < edge for s in squares[row]), sum(s == edge for s in squares[row])
            for s, label in zip(squares[row], y.tolist(), strict=True):
                place = Fraction(1) if s < edge else Fraction(left, level) if s == edge else Fraction()
                places[label] += place
                nearness[row, label] -= float(place) * (s / 16) ** 0.5
    return counts, nearness


@settings(max_examples=8, deadline=None)
@given(grids(), st.booleans())
def test_equally_near_examples_share_the_places_that_are_left(grid, budget):
    x, y, queries, truth, classes, k = grid
    layers = [lambda x: x, halved]
    dknn = DkNN(
        Many(classes), ["input", halved], neighbours=k, metric="euclidean", **{"memory_budget": 1} if budget else {}
    )
    dknn.fit(x, y, calibration=(queries, truth))
    counts, nearness = fractions(x, y, queries, classes, k, layers)
    places = torch.tensor([[float(place) for place in row] for row in counts])
    assert_close(dknn.predict_proba(queries), places / (2 * k))
    assert_close(dknn(queries).exp(), (places + 1) / (2 * k + classes), rtol=1e-5, atol=1e-5)
    scores = [2 * k - counts[i][c] for i, c in enumerate(truth.tolist())]
    near = 1e-4  # What comes of different sums may differ by rounding: p lies between the strict and the lax count.
    for sign, compare in ((near, torch.ge), (-near, torch.le)):
        p = [[(sum(s >= 2 * k - c + sign for s in scores) + 1) / 13 for c in row] for row in counts]
        assert compare(dknn.p_values(queries), torch.tensor(p) - sign / 1e3).all()
    for own in {1, (k + 1) // 2, k}:
        counts, nearness = fractions(x, y, queries, classes, own, layers)
        for label, places, sums in zip(
            dknn.predict_each(queries, [{"neighbours": own}])[0].tolist(), counts, nearness, strict=True
        ):
            first = [c for c in range(classes) if places[c] == max(places)]
            assert label in first
            assert sums[label] >= max(sums[first]) - 1e-5


@settings(max_examples=8, deadline=None)
@given(grids(), st.sampled_from(["cosine", "euclidean"]), st.booleans(), st.randoms())
def test_the_names_of_labels_decide_nothing(grid, metric, budget, random):
    x, y, queries, truth, classes, k = grid
    names = torch.tensor(random.sample(range(classes), classes))
    found = []
    for labels, answers in ((y, truth), (names[y], names[truth])):
        options = {"memory_budget": 1} if budget else {}
        dknn = DkNN(Many(classes), ["input", halved], neighbours=k, metric=metric, **options)
        found.append(dknn.fit(x, labels, calibration=(queries, answers)))
    one, other = found
    assert torch.equal(names[one.predict(queries)], other.predict(queries))
    assert torch.equal(names[one.predict_each(queries, numbers(1, k))], other.predict_each(queries, numbers(1, k)))
    assert torch.equal(one.p_values(queries), other.p_values(queries)[:, names])
    assert torch.equal(one(queries), other(queries)[:, names])
    for method in ("credibility", "confidence", "familiarity"):
        assert torch.equal(getattr(one, method)(queries), getattr(other, method)(queries))


@settings(max_examples=8, deadline=None)
@given(grids())
def test_the_modules_argmax_is_what_predict_says(grid):
    x, y, queries, truth, classes, k = grid
    dknn = DkNN(Many(classes), ["input", halved], neighbours=k, metric="euclidean").fit(
        x, y, calibration=(queries, truth)
    )
    found = dknn(queries)
    assert torch.isfinite(found).all()
    for form in (found, found.log_softmax(1), found.exp()):
        assert torch.equal(form.argmax(1), dknn.predict(queries))
    assert_close(found.exp().sum(1), torch.ones(12), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 10, 75])
def test_the_majority_of_equal_rows_is_found_whatever_its_name(k):
    """Every cell of a table of three binary columns holds nine tenths of one class."""
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).repeat(40, 1)
    major = (x[:, 0] != x[:, 1]).long()
    y = torch.where(torch.arange(320) // 8 % 10 == 0, 1 - major, major)
    for labels, truth in ((y, major), (1 - y, 1 - major)):
        dknn = DkNN(Two(), "input", neighbours=k, metric="euclidean").fit(x, labels, calibration=(x[:80], labels[:80]))
        assert torch.equal(dknn.predict(x[:8]), truth[:8])
        # The nearest forty are the cell's own: up to there the vote is nine to one.
        if k < 40:
            assert_close(dknn(x[:8]).exp().amax(1), torch.full((8,), (0.9 * k + 1) / (k + 2)))


def test_a_layer_that_tells_nothing_is_asked_about_its_majority():
    x, y = torch.rand(5000, 2), (torch.arange(5000) % 4 == 0).long()
    dknn = DkNN(Two(), lambda x: 0 * x, neighbours=3, metric="euclidean").fit(x, y, calibration=(x[:50], y[:50]))
    assert_close(dknn(x[:4]).exp(), torch.tensor([[(2.25 + 1) / 5, (0.75 + 1) / 5]]).expand(4, 2))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_without_equal_distances_every_neighbour_counts_one(metric, images, functional_conv):
    """The plain count, to the last bit."""
    x, y = images
    queries = torch.rand(100, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    dknn = DkNN(functional_conv, ["2", "5"], neighbours=10, metric=metric).fit(x, y, calibration=(x[:9], y[:9]))
    counts, nearness = torch.zeros(100, 3), torch.zeros(100, 3)
    for layer, features in enumerate(dknn.features(queries)):
        near, found = dknn.index(layer).nearest(features, 10, by_class=False)
        near = near.square() / 2 if metric == "cosine" else near
        counts.scatter_add_(1, y[found], torch.ones_like(near))
        nearness.scatter_add_(1, y[found], -near)
    tied = counts == counts.amax(1, keepdim=True)
    assert tied.sum(1).gt(1).any()
    assert torch.equal(dknn.predict(queries), nearness.masked_fill(~tied, -torch.inf).argmax(1))
    plain = ((counts + 1) / 23).log()
    assert torch.equal(dknn(queries)[tied.sum(1) == 1], plain[tied.sum(1) == 1])
    below = torch.searchsorted(dknn.calibration.label_scores, 20 - counts)
    assert torch.equal(dknn.p_values(queries), (10 - below).float() / 10)


def test_what_is_printed_of_it(line):
    assert "layers=['input'], neighbours=3, metric='euclidean', fitted on 6 examples of 2 classes" in repr(line)
    assert "layers=['input', 'square'], neighbours=75, metric='cosine', not fitted" in repr(
        DkNN(Two(), ["input", torch.square])
    )


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbours_equal_scikit_learns(metric, images, functional_conv):
    x, y = images
    g = torch.Generator().manual_seed(3)
    queries = torch.rand(300, 1, 6, 6, generator=g)
    dknn = DkNN(functional_conv, ["2", "5"], neighbours=10, metric=metric).fit(x, y, calibration=(x[:9], y[:9]))
    counts, summed, mean = np.zeros((300, 3)), np.zeros((300, 3)), []
    with torch.no_grad():
        for stop in (3, 6):
            keys, own = (functional_conv[:stop](part).flatten(1).double().numpy() for part in (x, queries))
            near, index = NearestNeighbors(n_neighbors=10, metric=metric, algorithm="brute").fit(keys).kneighbors(own)
            for label in range(3):
                counts[:, label] += (y.numpy()[index] == label).sum(1)
                summed[:, label] += np.where(y.numpy()[index] == label, near, 0).sum(1)
            mean.append(near.mean(1))
    scores = np.sort([20 - counts_of(dknn, x[i : i + 1])[0, y[i]] for i in range(9)])
    expected = np.stack([(scores[None] >= (20 - counts[:, c, None])).sum(1) + 1 for c in range(3)], 1) / 10
    np.testing.assert_allclose(dknn.p_values(queries).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(dknn(queries).exp().numpy(), (counts + 1) / 23, rtol=1e-5)
    # The most neighbours, then the smaller sum; no sum comes near the 1e6 that a neighbour more is worth here.
    assert (dknn.predict(queries).numpy() == (1e6 * counts - summed).argmax(1)).all()


def counts_of(dknn, x):
    """The neighbours of each label, from the log-probabilities of 2 layers of 10 neighbours and 3 labels."""
    return (dknn(x).exp().numpy() * 23 - 1).round()


def test_scale_does_not_matter_to_cosine():
    x = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40) % 2
    dknn = DkNN(Two(), "input", neighbours=5).fit(x, y, calibration=(x, y))
    assert torch.equal(dknn.p_values(x), dknn.p_values(0.25 * x))
    euclidean = DkNN(Two(), "input", neighbours=5, metric="euclidean").fit(x, y, calibration=(x, y))
    assert not torch.equal(euclidean.p_values(x), euclidean.p_values(0.25 * x))


def test_an_input_without_direction():
    x = torch.rand(20, 5, generator=torch.Generator().manual_seed(0))
    dknn = DkNN(Two(), "input", neighbours=5).fit(x, torch.arange(20) % 2, calibration=(x, torch.arange(20) % 2))
    assert torch.isfinite(dknn(torch.zeros(1, 5))).all()


def test_p_values_hold_on_held_out_data():
    """With calibration data like the rest, P(p of the true label <= level) is at most the level."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3000) % 2
    x = (0.5 + 0.1 * (2 * y[:, None] - 1) + 0.1 * torch.randn(3000, 3, generator=g)).clamp(0, 1)
    dknn = DkNN(Two(), "input", neighbours=20, metric="euclidean")
    dknn.fit(x[:1000], y[:1000], calibration=(x[1000:2000], y[1000:2000]))
    p = dknn.p_values(x[2000:]).gather(1, y[2000:, None])
    for level in (0.05, 0.1, 0.3):
        # Five standard deviations of both samples.
        assert p.le(level).double().mean() < level + 5 * (2 * level * (1 - level) / 1000) ** 0.5
    flagged = dknn.foreign(x[2000:]).double().mean()
    assert abs(flagged - 0.05) < 5 * (2 * 0.05 * 0.95 / 1000) ** 0.5
    assert dknn.foreign(torch.tensor([[0.0, 1.0, 0.0]])).all()


def test_batches_do_not_matter(images, functional_conv, monkeypatch):
    x, y = images
    dknn = DkNN(functional_conv, "2", neighbours=10).fit(x, y)
    whole = dknn.p_values(x)
    monkeypatch.setattr("immunonet.defences.dknn.SENSED", 7)
    monkeypatch.setattr("immunonet.defences.neighbours.SENSED", 7)
    assert_close(dknn.p_values(x), whole)


def test_log_probabilities_are_finite_and_sum_to_one(images, conv):
    dknn = DkNN(conv, "2", neighbours=5).fit(*images)
    found = dknn(images[0])
    assert torch.isfinite(found).all()
    assert_close(found.exp().sum(1), torch.ones(90))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"neighbours": 0}, ValueError, "neighbours must be at least 1, got 0"),
        ({"neighbours": 2.5}, TypeError, "neighbours must be an integer, got 2.5"),
        ({"metric": "l2"}, ValueError, "metric must be one of 'euclidean', 'cosine', got 'l2'"),
        ({"false_alarm": 0}, ValueError, r"false_alarm must be a finite number in \(0, 1\], got 0"),
        ({"false_alarm": math.nan}, ValueError, "false_alarm must be"),
        ({"bounds": (1, 0)}, ValueError, r"bounds must be finite with low < high, got \(1, 0\)"),
        ({"layers": "second"}, ValueError, "layers='second' is no submodule of the model"),
        ({"model": "net"}, TypeError, "model must be a torch.nn.Module, got str"),
    ],
)
def test_bad_settings(settings, error, message):
    settings = {"model": Two(), "layers": "input", **settings}
    with pytest.raises(error, match=message):
        DkNN(settings.pop("model"), settings.pop("layers"), **settings)


def test_more_neighbours_than_examples():
    with pytest.raises(ValueError, match="neighbours=7 is more than the 6 examples of the repertoire"):
        DkNN(Two(), "input", neighbours=7).fit(*REPERTOIRE, calibration=REPERTOIRE)


@pytest.mark.parametrize(
    "method", ["predict", "predict_proba", "p_values", "credibility", "confidence", "foreign", "forward", "save"]
)
def test_unfitted(method, tmp_path):
    argument = tmp_path if method == "save" else column(0.5)
    with pytest.raises(ValueError, match=r"this DkNN is not fitted: call dknn.fit\(x, y\) with the training set first"):
        getattr(DkNN(Two(), "input"), method)(argument)
    assert list(tmp_path.iterdir()) == []


def test_bad_inputs(line):
    with pytest.raises(ValueError, match=r"x must lie within bounds=.*Normalised"):
        line.predict(column(1.5))
    with pytest.raises(ValueError, match=r"x must hold at least one input, got shape \(0, 1\)"):
        line.predict(torch.zeros(0, 1))


def test_no_choice_of_neighbours_that_a_repertoire_has_is_told():
    with pytest.raises(ValueError, match="neighbours must have a choice of at most 4"):
        DkNN.candidates(4, {"neighbours": [5, 10]})

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as trying
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from immunonet import RAILS, DkNN, Maturation
from immunonet.features import search

SMALL = Maturation(population=60, neighbours=3, generations=3)


@pytest.fixture
def rails(functional_conv, images):
    return RAILS(functional_conv, "2", maturation=SMALL, seed=0).fit(*images)


ANTIGENS = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(5))


def same(one, other):
    """Whether two responses are the same, bit by bit."""
    pairs = zip(flat(one), flat(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def flat(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from flat(part)
    elif value is not None:
        for part in vars(value).values():
            yield from flat(part)


def test_shapes_and_types(rails):
    r = rails.respond(ANTIGENS, trace=True)
    assert (r.labels.shape, r.labels.dtype) == ((12,), torch.int64)
    assert (r.votes.shape, r.votes.dtype) == ((12, 3), torch.float32)
    assert (r.credibility.shape, r.foreign.dtype) == ((12,), torch.bool)
    assert (r.generations.dtype, int(r.generations.max())) == (torch.int64, int(r.generations.clamp(0, 3).max()))
    # 5 and 20 percent of 63 cells: 21 per class, the next multiple of 3 times 3.
    assert r.plasma.x.shape == (12, 3, 1, 6, 6)
    assert r.memory.x.shape == (12, 13, 1, 6, 6)
    assert r.plasma.label.dtype == r.plasma.origin.dtype == torch.int64
    assert torch.equal(rails.repertoire.y[r.plasma.origin], r.plasma.label)
    (curve,) = r.trace
    assert curve.affinity_mean.shape == curve.affinity_best.shape == curve.votes.shape == (4, 12, 3)
    assert curve.entropy.shape == (4, 12)
    assert (curve.affinity_best >= curve.affinity_mean).all()
    assert_close(curve.votes[-1], r.votes)
    assert_close(curve.entropy, -torch.xlogy(curve.votes, curve.votes).sum(2))
    assert rails.respond(ANTIGENS).trace is None


def test_every_method_tells_the_same(rails):
    r = rails.respond(ANTIGENS)
    assert torch.equal(rails.predict(ANTIGENS), r.labels)
    assert torch.equal(rails.predict_proba(ANTIGENS), r.votes)
    assert torch.equal(rails.predict(ANTIGENS.numpy()), r.labels)
    n = 3
    assert_close(rails(ANTIGENS), ((n * r.votes + 1) / (n + 3)).log())
    assert_close(rails(ANTIGENS).exp().sum(1), torch.ones(12))
    assert torch.isfinite(rails(ANTIGENS)).all()
    assert torch.equal(rails.predict(ANTIGENS, seed=1), rails.respond(ANTIGENS, seed=1).labels)


def test_naive_cells_are_the_nearest_of_each_class(rails, images):
    index, distances = rails.naive(ANTIGENS)
    assert index.shape == distances.shape == (12, 3, 3)
    own, all_ = rails.features(ANTIGENS)[0], rails.features(rails.repertoire.x)[0]
    every = torch.cdist(own, all_)
    for label in range(3):
        members = (rails.repertoire.y == label).nonzero()[:, 0]
        near, order = every[:, members].topk(3, largest=False)
        assert torch.equal(index[:, label], members[order])
        assert_close(distances[:, label], near, rtol=1e-4, atol=1e-5)
    for layer in (1, -1):
        with pytest.raises(ValueError, match=f"layer must be at least 0 and at most 0, got {layer}"):
            rails.naive(ANTIGENS, layer=layer)


# Seeds and batches.


def test_one_seed_one_answer(functional_conv, images):
    rails = RAILS(functional_conv, "2", maturation=SMALL).fit(*images)
    assert same(rails.respond(ANTIGENS, seed=3, trace=True), rails.respond(ANTIGENS, seed=3, trace=True))
    assert not same(rails.respond(ANTIGENS, seed=3), rails.respond(ANTIGENS, seed=4))
    assert not same(rails.respond(ANTIGENS), rails.respond(ANTIGENS))


def test_the_seed_of_a_call_comes_before_the_instances(rails):
    assert same(rails.respond(ANTIGENS), rails.respond(ANTIGENS, seed=0))
    assert not same(rails.respond(ANTIGENS), rails.respond(ANTIGENS, seed=1))


@pytest.mark.parametrize(("batch_size", "shared_noise"), [(None, False), (5, True)])
def test_draws_are_the_answers_under_each_seed(functional_conv, images, shared_noise, batch_size):
    rails = RAILS(functional_conv, ["2", "input"], maturation=SMALL, shared_noise=shared_noise).fit(*images)
    seeds = [4, 0, 9, 1]
    found = rails.draws(ANTIGENS, seeds, batch_size)
    assert torch.equal(found, torch.stack([rails.predict(ANTIGENS, seed, batch_size=batch_size) for seed in seeds]))
    assert len(found.unique(dim=0)) > 1


@pytest.mark.parametrize(
    ("seeds", "error", "match"),
    [
        ([], ValueError, "seeds must hold at least one seed, got none"),
        ([-1], ValueError, "seeds must be at least 0"),
        ([0.5], TypeError, "seeds must be an integer, got 0.5"),
    ],
)
def test_seeds_of_draws_are_checked(rails, seeds, error, match):
    with pytest.raises(error, match=match):
        rails.draws(ANTIGENS, seeds)


def test_the_global_generator_is_neither_used_nor_moved(rails):
    torch.manual_seed(1)
    first, state = rails.respond(ANTIGENS), torch.get_rng_state()
    torch.manual_seed(2)
    assert same(rails.respond(ANTIGENS), first)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("layer", "shared_noise"), [("0", True), ("2", False), ("input", True), ("input", False)])
def test_batch_size_and_shards_change_next_to_nothing(functional_conv, examples, layer, shared_noise):
    settings = {"maturation": Maturation(population=90, neighbours=3, generations=4), "shared_noise": shared_noise}
    rails = RAILS(functional_conv, layer, seed=0, **settings).fit(*examples(120, (1, 6, 6)))
    x = examples(60, (1, 6, 6), seed=1)[0]
    x[::2] = torch.rand(30, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    whole = rails.respond(x)
    assert len(whole.labels.unique()) == 3
    others = [rails.respond(x, batch_size=size) for size in (7, 40)]
    shards = [rails.respond(part) for part in (x[:23], x[23:24], x[24:])]
    labels = [*(r.labels for r in others), torch.cat([r.labels for r in shards])]
    votes = [*(r.votes for r in others), torch.cat([r.votes for r in shards])]
    for label, vote in zip(labels, votes, strict=True):
        assert (label == whole.labels).double().mean() >= 0.995
        assert (vote - whole.votes).abs().max() <= 0.05
    assert torch.equal(rails.predict(x, batch_size=7), others[0].labels)
    assert torch.equal(rails.predict_proba(x, batch_size=7), others[0].votes)


def test_shared_noise_treats_equal_antigens_alike(rails):
    r = rails.respond(ANTIGENS[[0, 1, 0]])
    assert torch.equal(r.plasma.x[0], r.plasma.x[2])


def test_noise_of_its_own_for_every_antigen(functional_conv, images):
    rails = RAILS(functional_conv, "2", maturation=SMALL, seed=0, shared_noise=False).fit(*images)
    r = rails.respond(ANTIGENS[[0, 1, 0]])
    assert not torch.equal(r.memory.x[0], r.memory.x[2])
    # Noise follows the antigen, not its place.
    assert torch.equal(rails.respond(ANTIGENS[:1]).memory.x[0], r.memory.x[0])
    assert torch.equal(rails.respond(ANTIGENS[[1, 0]]).memory.x[1], r.memory.x[0])


# Several layers.


def test_layers_vote_together(functional_conv, images):
    layers = ["2", "5"]
    both = RAILS(functional_conv, layers, maturation=SMALL, seed=0).fit(*images).respond(ANTIGENS, trace=True)
    assert len(both.trace) == 2
    votes = torch.stack([curve.votes[-1] for curve in both.trace])
    assert_close(both.votes, votes.mean(0))
    assert (votes[0] != votes[1]).any()
    assert both.plasma.x.shape == (12, 6, 1, 6, 6)
    assert (both.plasma.affinity[:, :3].diff(dim=1) <= 0).all()
    assert (both.plasma.affinity[:, 3:].diff(dim=1) <= 0).all()
    # The first layer's noise does not depend on the others.
    alone = RAILS(functional_conv, "2", maturation=SMALL, seed=0).fit(*images).respond(ANTIGENS)
    assert torch.equal(both.plasma.x[:, :3], alone.plasma.x)


def test_one_maturation_per_layer(functional_conv, images):
    settings = [Maturation(population=9, neighbours=3, generations=10), Maturation(population=90, neighbours=2)]
    rails = RAILS(functional_conv, ["2", "5"], maturation=settings, seed=0).fit(*images)
    r = rails.respond(ANTIGENS, trace=True)
    assert rails.maturations == tuple(settings)
    assert [len(curve.votes) for curve in r.trace] == [11, 1]
    assert r.plasma.x.shape[1] == 1 + 4
    assert_close(rails(ANTIGENS), ((5 * r.votes + 1) / 8).log())
    assert rails.naive(ANTIGENS, layer=1)[0].shape == (12, 3, 2)


def test_the_authors_cifar10_setting(residual, examples):
    x, y = examples(60, (3, 8, 8))
    settings = Maturation.authors("cifar10", population=30, neighbours=2)
    rails = RAILS(residual, ["block2", "block3"], maturation=settings, space="block1", cell_bounds=(0, 5), seed=0)
    r = rails.fit(x, y).respond(x[:5], trace=True)
    assert r.plasma.x.shape[2:] == (4, 8, 8)
    assert r.plasma.x.min() >= 0
    assert r.generations.tolist() == [10] * 5
    assert [len(curve.entropy) for curve in r.trace] == [11, 6]


def test_presets_answer(functional_conv, images):
    for settings in (Maturation(), Maturation.paper(), Maturation.authors("mnist")):
        rails = RAILS(functional_conv, "0", maturation=settings, seed=0).fit(*images)
        r = rails.respond(images[0][:6])
        assert torch.equal(r.labels, images[1][:6])


# Sensing.


def test_strange_antigens_are_foreign(examples):
    x, y = examples(600, (1, 6, 6))
    rails = RAILS(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), "input", maturation=SMALL, seed=0)
    rails.fit(x[:400], y[:400], calibration=(x[400:500], y[400:500]))
    clean, strange = rails.respond(x[500:]), rails.respond(torch.rand(20, 1, 6, 6).round())
    # 5 of 100 are expected; twelve or more come once in 250 draws at most.
    assert clean.foreign.sum() <= 12
    assert strange.foreign.all()
    assert clean.credibility.mean() > 0.5
    assert torch.equal(rails.foreign(x[500:]), clean.foreign)
    assert ((clean.credibility > 0) & (clean.credibility <= 1)).all()


def test_credibility_by_hand():
    # Two naive cells per class: the nearest two of them all are the neighbours. Calibration: .05, label 0: .0 and .1,
    # nonconformity 0; .5, label 1: .2 and .8 (.3 each), 1; .5, label 0: 1; .2, label 1: 2.
    x = torch.tensor([[0.0], [0.1], [0.2], [0.8], [0.9], [1.0]])
    calibration = torch.tensor([[0.05], [0.5], [0.5], [0.2]]), torch.tensor([0, 1, 0, 1])
    model = nn.Linear(1, 2)
    rails = RAILS(model, "input", maturation=Maturation(population=4, neighbours=2, generations=0))
    rails.fit(x, torch.tensor([0, 0, 0, 1, 1, 1]), calibration=calibration)
    r = rails.respond(torch.tensor([[0.0], [0.55]]))
    # Nonconformity (0, 2) -> p (5/5, 2/5); .55: .8 and .2, or .8 and .9: .25, .35, .35 is a tie, so stay clear of it.
    assert_close(r.credibility[0], torch.tensor(1.0))
    r = rails.respond(torch.tensor([[0.52]]))
    # .8 (.28) and .2 (.32): nonconformity (1, 1) -> p (4/5, 4/5).
    assert_close(r.credibility, torch.tensor([0.8]))


# Even votes.


def table(copies, minority):
    """A table of three binary columns: `copies` rows a cell, `minority` of which are not of its majority, `major`."""
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).repeat(copies, 1)
    major = (x[:, 0] != x[:, 1]).long()
    return x, torch.where(torch.arange(len(x)) // 8 < minority, 1 - major, major), major


@pytest.mark.parametrize("generations", [0, 3])
def test_equal_rows_of_two_classes_are_settled_by_how_many_there_are(generations):
    # Three naive cells of both classes are the antigen itself, so that nothing evolves and every cell ties.
    x, y, major = table(13, 3)
    maturation = Maturation(population=60, neighbours=3, generations=generations)
    for labels, truth in ((y, major), (1 - y, 1 - major)):
        rails = RAILS(Head(lambda o: o[:, :2], 3), "input", maturation=maturation, seed=0)
        r = rails.fit(x, labels, calibration=(x[:24], labels[:24])).respond(x[:8])
        assert r.votes.tolist() == [[0.5, 0.5]] * 8
        assert torch.equal(r.labels, truth[:8])
        assert torch.equal(rails(x[:8]).argmax(1), r.labels)
        # Every label has half of the three nearest, in calibration as here.
        assert r.credibility.tolist() == [1.0] * 8


def test_rows_in_equal_number_are_settled_by_lot():
    x, y, _ = table(12, 6)
    maturation = Maturation(generations=10, population=60, neighbours=3)
    one, other = (
        RAILS(Head(lambda o: o[:, :2], 3), "input", maturation=maturation, seed=0)
        .fit(x, labels, calibration=(x, labels))
        .predict(x[:8])
        for labels in (y, 1 - y)
    )
    assert torch.equal(one, 1 - other)
    assert len(one.unique()) == 2


@trying(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), classes=st.integers(2, 4), k=st.integers(1, 3), plasma=st.floats(0.1, 0.9))
def test_the_names_of_labels_decide_nothing(seed, classes, k, plasma):
    """On a grid, where nearly every distance is met several times, by cells that do not mutate."""
    g = torch.Generator().manual_seed(seed)
    x, antigens = (torch.randint(0, 3, (n, 2), generator=g).float() / 2 for n in (40, 12))
    y, truth = torch.arange(40) % classes, torch.randint(0, classes, (12,), generator=g)
    names = torch.randperm(classes, generator=g)
    still = Maturation(population=24, neighbours=k, generations=0, mutation_rate=0.0, plasma=plasma, memory=0.0)
    found = []
    for labels, answers in ((y, truth), (names[y], names[truth])):
        rails = RAILS(Head(lambda o: o, 2, classes), ["input", lambda x: x[:, :1]], maturation=still, seed=0)
        rails.fit(x, labels, calibration=(antigens, answers))
        found.append((rails.respond(antigens), rails(antigens), rails.familiarity(antigens)))
    (one, logs, far), (other, other_logs, other_far) = found
    assert torch.equal(names[one.labels], other.labels)
    assert torch.equal(one.votes, other.votes[:, names])
    assert torch.equal(one.credibility, other.credibility)
    assert torch.equal(far, other_far)
    assert torch.equal(logs, other_logs[:, names])
    for form in (logs, logs.log_softmax(1), logs.exp()):
        assert torch.equal(form.argmax(1), one.labels)


@pytest.mark.parametrize("voice", [0.0, 0.5])
@pytest.mark.parametrize("layers", ["2", ["2", "0"]])
def test_the_modules_argmax_is_what_predict_says(functional_conv, images, layers, voice):
    # A plasma cell of every class: without a voice all votes are even.
    maturation = Maturation(population=3, neighbours=1, generations=1, plasma=1.0, memory=0.0)
    rails = RAILS(functional_conv, layers, maturation=maturation, seed=0, voice=voice).fit(*images)
    found, labels = rails(images[0]), rails.predict(images[0])
    assert len(labels.unique()) > 1
    for form in (found, found.log_softmax(1), found.exp()):
        assert torch.equal(form.argmax(1), labels)
    assert_close(found.exp().sum(1), torch.ones(90), rtol=0, atol=1e-6)
    if not voice:
        assert_close(rails.predict_proba(images[0]), torch.full((90, 3), 1 / 3))


def test_what_is_printed_of_it(functional_conv, images):
    rails = RAILS(functional_conv, ["2", "0"], maturation=SMALL, voice=0.25)
    words = "layers=['2', '0'], maturation=Maturation(population=60, neighbours=3, generations=3), "
    assert words + "voice=0.25, seed=None, not fitted" in repr(rails)
    assert words + "voice=0.25, seed=None, fitted on 86 examples of 3 classes" in repr(rails.fit(*images))
    other = RAILS(functional_conv, ["2", "0"], maturation=[SMALL, Maturation()], space="0", seed=4)
    assert "generations=3), Maturation()], space='0', seed=4, not fitted" in repr(other)


# Fitting.


def test_datasets_and_loaders(functional_conv, images):
    expected = RAILS(functional_conv, "2", maturation=SMALL, seed=0).fit(*images).respond(ANTIGENS)
    dataset = TensorDataset(*images)
    for data in (dataset, DataLoader(dataset, batch_size=16)):
        assert same(RAILS(functional_conv, "2", maturation=SMALL, seed=0).fit(data).respond(ANTIGENS), expected)


def test_the_repertoire_keeps_the_given_order(functional_conv, images):
    x, y = images
    rails = RAILS(functional_conv, "2", maturation=SMALL).fit(x, y, calibration=(x[:9], y[:9]))
    assert torch.equal(rails.repertoire.x, x)
    assert torch.equal(rails.repertoire.y, y)
    part = RAILS(functional_conv, "2", maturation=SMALL).fit(x, y, calibration=0.2)
    assert len(part.repertoire) == 72
    assert len(part.calibration.strangeness) == 18


class Head(nn.Module):
    """A layer, and logits that a function changes."""

    def __init__(self, change, width=4, classes=3):
        super().__init__()
        self.layer = nn.Linear(width, classes)
        self.change = change

    def forward(self, x):
        return self.change(self.layer(x))


X4, Y4 = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: {"scores": o}, "model must return a tensor of logits .* got dict"),
        (lambda o: o[:, 0], r"logits \(2, C\), floating and C of 2 or more, .* got \(2,\) of torch.float32"),
        (lambda o: o[:, :1], r"got \(2, 1\)"),
        (lambda o: o.argmax(1), r"got \(2,\) of torch.int64"),
        (lambda o: o.long(), r"got \(2, 3\) of torch.int64"),
        (lambda o: o * math.nan, "model must return finite logits, got 6 NaN"),
        (lambda o: o[:1], r"logits \(2, C\), .* for 2 inputs, got \(1, 3\)"),
        (lambda o: o @ torch.zeros(5, 5), r"model fails on inputs of shape \(2, 4\): mat1 and mat2"),
    ],
)
def test_models_without_logits(change, message):
    with pytest.raises(ValueError, match=message):
        RAILS(Head(change), "layer", maturation=SMALL).fit(X4, Y4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X4 + 0.5, Y4), ValueError, "x must lie within bounds=.*Normalised"),
        ((X4.masked_fill(X4 > 0.9, math.nan), Y4), ValueError, "x must be finite, got"),
        ((X4.byte(), Y4), TypeError, "x must have a floating dtype, got torch.uint8"),
        ((X4[0], Y4), ValueError, r"x must have shape \(B, \*S\)"),
        ((X4[:0], Y4[:0]), ValueError, r"x must hold at least one example, got shape \(0, 4\)"),
        ((X4[:, :3], Y4), ValueError, r"model fails on inputs of shape \(2, 3\)"),
        ((X4,), TypeError, "y is missing"),
        ((X4, Y4.float()), TypeError, "y must have an integer dtype, got torch.float32"),
        ((X4, Y4[:5]), ValueError, r"y must have shape \(30,\), one label per input, got \(5,\)"),
        ((X4, Y4 + 1), ValueError, r"y must be in 0 to 2, the model's 3 classes, got values in \[1, 3\]"),
        ((X4, Y4 - 1), ValueError, r"y must be in 0 to 2, .* got values in \[-1, 1\]: 10 of 30"),
        ((X4, Y4.clamp(max=1)), ValueError, "y has no example of class 2"),
        ((X4, Y4 * 0), ValueError, "y has no example of class 1"),
        ((X4[:8], Y4[:8], (X4, Y4)), ValueError, "neighbours=3 is more than the 2 examples of class 2"),
        ((X4, Y4, 0), ValueError, r"calibration must be a finite number in \(0, 1\], got 0"),
        ((X4, Y4, 1.5), ValueError, "calibration must be a finite number in"),
        ((X4, Y4, 1), ValueError, "calibration=1 holds out 30 of 30 examples"),
        ((X4, Y4, 0.001), ValueError, "calibration=0.001 holds out 0 of 30 examples"),
        ((X4, Y4, None), TypeError, r"calibration must be a fraction or a pair \(x_cal, y_cal\), got None"),
        ((X4, Y4, True), TypeError, "calibration must be a fraction or a pair"),
        ((X4, Y4, (X4,)), ValueError, r"calibration must be a fraction or \(x_cal, y_cal\), got 1 items"),
        ((X4, Y4, (X4 * 2, Y4)), ValueError, "x_cal must lie within bounds"),
        ((X4, Y4, (X4[:, :2], Y4)), ValueError, r"x_cal must have shape \(B, 4\), got \(30, 2\)"),
        ((X4, Y4, (X4, Y4.float())), TypeError, "y_cal must have an integer dtype"),
        ((X4, Y4, (X4, Y4 + 1)), ValueError, "y_cal must be in 0 to 2"),
        ((X4, Y4, (X4[:0], Y4[:0])), ValueError, "x_cal must hold at least one example"),
    ],
)
def test_bad_examples(arguments, error, message):
    rails = RAILS(Head(lambda o: o), "layer", maturation=SMALL)
    with pytest.raises(error, match=message):
        rails.fit(*arguments)
    with pytest.raises(ValueError, match="not fitted"):
        rails.predict(X4)


def test_a_bad_second_fit_keeps_the_first():
    rails = RAILS(Head(lambda o: o), "layer", maturation=SMALL, seed=0).fit(X4, Y4)
    expected = rails.predict_proba(X4)
    with pytest.raises(ValueError, match="y must be in 0 to 2"):
        rails.fit(X4, Y4 + 1)
    assert torch.equal(rails.predict_proba(X4), expected)


def test_a_fit_that_fails_half_way_leaves_no_half_fit():
    layers = ["input", lambda x: x.square() / (x != 0.5).all(1, keepdim=True)]
    rails = RAILS(Head(lambda o: o), layers, maturation=SMALL)
    bad = X4.clone()
    bad[20] = 0.5
    for x, x_cal in ((bad, X4), (X4, bad)):
        with pytest.raises(ValueError, match="layer '<lambda>' gave NaN or infinite features"):
            rails.fit(x, Y4, calibration=(x_cal, Y4))
        with pytest.raises(ValueError, match=r"this RAILS is not fitted: call rails.fit\(x, y\)"):
            rails.predict(X4)


METHODS = ["respond", "predict", "predict_proba", "forward", "naive", "features", "foreign"]


@pytest.mark.parametrize("method", [*METHODS, "save"])
def test_unfitted(method, conv, tmp_path):
    argument = tmp_path if method == "save" else ANTIGENS
    with pytest.raises(ValueError, match=r"this RAILS is not fitted: call rails.fit\(x, y\) with the training set"):
        getattr(RAILS(conv, "2"), method)(argument)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": len}, TypeError, "model must be a torch.nn.Module, got builtin_function_or_method"),
        ({"layers": "3"}, ValueError, "layers='3' is no submodule of the model"),
        ({"space": 3}, TypeError, "space must be None or a submodule's name, got 3"),
        ({"maturation": 3}, TypeError, "maturation must be a Maturation or a list with one per layer, got 3"),
        ({"maturation": [SMALL, 3]}, TypeError, "maturation must be a Maturation or a list"),
        ({"maturation": [SMALL, SMALL]}, ValueError, r"maturation must be one, or one per layer \(1\), got 2"),
        ({"bounds": (0, 0)}, ValueError, "bounds must be finite with low < high"),
        ({"bounds": "unit"}, TypeError, "bounds must be .low, high. or one such pair per channel"),
        ({"cell_bounds": (1, 0)}, ValueError, "cell_bounds must be finite with low < high"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be at least 1, got 0"),
        ({"memory_budget": "much"}, TypeError, "memory_budget must be .*'auto'.*, got 'much'"),
        ({"false_alarm": 0}, ValueError, "false_alarm must be a finite number in"),
        ({"false_alarm": "low"}, TypeError, "false_alarm must be a number, got 'low'"),
        ({"shared_noise": 1}, TypeError, "shared_noise must be True or False, got 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ({"voice": -0.1}, ValueError, r"voice must be a finite number in \[0, 1\), got -0.1"),
        ({"voice": 1.0}, ValueError, r"voice must be a finite number in \[0, 1\), got 1"),
        ({"voice": math.nan}, ValueError, r"voice must be a finite number in \[0, 1\), got nan"),
        ({"voice": "x"}, TypeError, "voice must be a number, got 'x'"),
    ],
)
def test_bad_settings(settings, error, message):
    settings = {"model": Head(lambda o: o), "layers": "layer", **settings}
    with pytest.raises(error, match=message):
        RAILS(settings.pop("model"), settings.pop("layers"), **settings)


def test_a_population_beyond_the_memory_budget():
    rails = RAILS(Head(lambda o: o), "layer", maturation=SMALL, memory_budget=900)
    # 63 cells of 4 values of 4 bytes.
    with pytest.raises(ValueError, match="memory_budget=900 is too small for one antigen: its population takes 1,008"):
        rails.fit(X4, Y4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bounds": [(0, 1)] * 3}, "bounds has 3 pairs, but samples have shape .4,.: give one pair in all, or 4 pairs"),
        ({"cell_bounds": [(0, 1)] * 3}, "cell_bounds has 3 pairs, but samples have shape"),
    ],
)
def test_bounds_of_another_number_of_channels_fail_when_fitting(settings, message):
    with pytest.raises(ValueError, match=message):
        RAILS(Head(lambda o: o), "layer", maturation=SMALL, **settings).fit(X4, Y4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (ANTIGENS * 3, ValueError, r"x must lie within bounds=\(0.0, 1.0\).*immunonet.Normalised"),
        (ANTIGENS / 0, ValueError, "x must be finite"),
        (ANTIGENS[..., :5], ValueError, r"x must have shape \(B, 1, 6, 6\), got \(12, 1, 6, 5\)"),
        (ANTIGENS[0], ValueError, r"x must have shape"),
        (ANTIGENS.int(), TypeError, "x must have a floating dtype"),
        (ANTIGENS[:0], ValueError, r"x must hold at least one input, got shape \(0, 1, 6, 6\)"),
        (None, TypeError, "x must be a tensor or an array of numbers, got NoneType"),
    ],
)
def test_bad_antigens(rails, method, x, error, message):
    with pytest.raises(error, match=message):
        getattr(rails, method)(x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": "a"}, TypeError, "seed must be an integer"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be an integer"),
    ],
)
def test_bad_arguments_of_a_response(rails, arguments, error, message):
    with pytest.raises(error, match=message):
        rails.respond(ANTIGENS, **arguments)


# Devices and precisions.


def test_everything_is_registered_so_that_it_moves(functional_conv, images):
    layer = nn.Linear(36, 5)
    rails = RAILS(functional_conv, ["2", nn.Sequential(nn.Flatten(), layer)], maturation=SMALL).fit(*images)
    registered = {tensor.data_ptr() for tensor in [*rails.parameters(), *rails.buffers()]}
    held = [rails.repertoire.x, rails.repertoire.y, layer.weight, functional_conv[2].weight]
    held += [t for part in (*rails.indices, rails.calibration) for t in vars(part).get("_buffers").values()]
    assert len(held) >= 4 + 2 * 2 + 3
    assert all(tensor.data_ptr() in registered for tensor in held)
    assert not {name for name in rails.state_dict() if not name.startswith(("model.", "_callables."))}


def test_a_cast_is_for_the_model(rails):
    expected = rails.repertoire.x.clone()
    rails.bfloat16()
    assert rails.model[0].weight.dtype == torch.bfloat16
    assert torch.equal(rails.repertoire.x, expected)
    assert rails.respond(ANTIGENS).plasma.x.dtype == torch.float32


@pytest.mark.parametrize("layer", ["0", "2", "input"])
def test_autocast(functional_conv, images, layer):
    rails = RAILS(functional_conv, layer, maturation=SMALL, seed=0).fit(*images)
    expected = rails.respond(images[0][:30])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        r = rails.respond(images[0][:30])
        fitted = RAILS(functional_conv, layer, maturation=SMALL, seed=0).fit(*images)
    assert r.votes.dtype == r.plasma.affinity.dtype == torch.float32
    # The classes are far apart next to bfloat16's 8 bits.
    assert torch.equal(r.labels, expected.labels)
    assert torch.equal(fitted.predict(images[0][:30]), expected.labels)


def test_autocast_does_not_blur_affine_distances(functional_conv, images):
    rails = RAILS(functional_conv, "0", maturation=SMALL, seed=0).fit(*images)
    expected = rails.respond(ANTIGENS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(rails.respond(ANTIGENS), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("defence", [RAILS, DkNN])
def test_there_and_back_on_a_gpu(functional_conv, images, defence, tmp_path):
    settings = {"maturation": SMALL, "seed": 0} if defence is RAILS else {"neighbours": 9}
    here = defence(functional_conv, ["0", "2"], **settings).fit(*images)
    expected = here.predict(images[0])
    here.save(tmp_path)
    there = here.to("cuda")
    assert {t.device.type for t in [*there.parameters(), *there.buffers()]} == {"cuda"}
    found = there.predict(images[0])
    assert found.device.type == "cuda"
    assert (found.cpu() == expected).double().mean() >= 0.99
    loaded = defence.load(tmp_path, functional_conv)
    assert torch.equal(loaded.predict(images[0].cuda()), found)
    assert torch.equal(there.to("cpu").predict(images[0]), expected)


@pytest.mark.parametrize(
    ("layers", "space"), [("3", "3"), ("3", "1"), (["3", "4"], "1"), (["1", "3", "4"], None)], ids=str
)
def test_fit_lets_every_example_pass_through_the_network_once(layers, space, monkeypatch):
    monkeypatch.setattr(search, "ROWS", 100)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.rand(750, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(750) % 3
    passed = []
    net[0].register_forward_pre_hook(lambda _, inputs: passed.append(inputs[0].flatten(1)))
    RAILS(net, layers, space=space, maturation=SMALL).fit(x[:700], y[:700], calibration=(x[700:], y[700:]))
    rows, counts = torch.cat(passed).unique(dim=0, return_counts=True)
    # A few examples probe the model: they pass more often, and a dummy of zeros stands for those behind a space.
    assert len(rows) >= 750
    assert int((counts > 1).sum()) <= 30
    assert int(counts.sum()) <= 750 + 600


def test_the_light_twin_shares_what_was_fitted_and_leaves_rails_alone(images, conv):
    rails = RAILS(conv, "input", voice=0.3, maturation=Maturation(population=300, generations=7)).fit(*images)
    twin = rails.light()
    assert (twin.maturations[0].population, twin.maturations[0].generations) == (200, 3)
    assert (rails.maturations[0].population, rails.maturations[0].generations) == (300, 7)
    assert twin.repertoire is rails.repertoire
    assert twin.voice == 0.3
    assert (twin.predict(images[0][:6], seed=0) == images[1][:6]).float().mean() > 0.5


def test_rails_less_one_part_shares_the_rest(images, conv):
    rails = RAILS(conv, "input", maturation=Maturation(generations=10, population=300, neighbours=2)).fit(*images)
    found = rails.ablations()
    assert list(found) == ["mutation", "crossover", "selection", "generations"]
    assert found["generations"].maturations[0].generations == 0
    assert found["mutation"].maturations[0].rates == (0.0, 0.0)
    assert found["crossover"].maturations[0].crossover is None
    assert rails.maturations[0] == Maturation(generations=10, population=300, neighbours=2)
    assert all(variant.repertoire is rails.repertoire for variant in found.values())
    assert found["selection"].predict(images[0][:3], seed=0).shape == (3,)
    assert list(found["generations"].ablations()) == ["mutation"]


def test_draws_are_those_of_a_predict_of_ones_own(images, conv):
    class Constant(RAILS):
        def predict(self, x, seed=None):
            return torch.full((len(x),), seed)

    rails = Constant(conv, "input", maturation=Maturation(generations=10, population=60, neighbours=3)).fit(*images)
    assert rails.draws(images[0][:2], [2, 0]).tolist() == [[2, 2], [0, 0]]

import logging
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.testing import assert_close

from immunonet import RAILS, DkNN, Maturation
from immunonet.attacks import SoftNeighbours
from immunonet.defences.holding import _Rows
from immunonet.features import file as feature_file
from immunonet.features import search
from immunonet.features.file import FeatureFile
from immunonet.features.search import ExactIndex, SignatureIndex, computed

SMALL = Maturation(population=60, neighbours=4, generations=3)


def mixture(n, d, classes, seed=0, rank=12, noise=0.1):
    """Rows of a low-rank Gaussian mixture with noise, and their labels in no order."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, d, generator=torch.Generator().manual_seed(99))
    centres = 2 * torch.randn(classes, rank, generator=torch.Generator().manual_seed(98))
    y = torch.randint(0, classes, (n,), generator=g)
    low = centres[y] + torch.randn(n, rank, generator=g)
    return low @ basis + noise * torch.randn(n, d, generator=g), y


def oracle(queries, keys, labels, k, by_class):
    groups = [(labels == c).nonzero()[:, 0] for c in labels.unique()] if by_class else [torch.arange(len(keys))]
    found = []
    for members in groups:
        tree = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(keys[members].double().numpy())
        near, index = tree.kneighbors(queries.double().numpy())
        found.append((near, members.numpy()[index]))
    near, index = (np.stack(part, 1) for part in zip(*found, strict=True))
    return (near, index) if by_class else (near[:, 0], index[:, 0])


def exact(keys, y):
    order = y.argsort(stable=True)
    return ExactIndex(keys[order].clone(), order, torch.bincount(y).tolist())


def by_signature(keys, y, **options):
    return SignatureIndex(lambda e: keys[e].clone(), y.argsort(stable=True), torch.bincount(y).tolist(), **options)


@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize("offset", [0.0, 500.0])
@pytest.mark.parametrize("kind", [exact, by_signature])
def test_nearest_equals_scikit_learn(kind, offset, by_class):
    keys, y = mixture(300, 20, 3)
    queries, _ = mixture(15, 20, 3, seed=1)
    # As many directions as dimensions, so that a signature tells all.
    keys, queries = keys + offset, queries + offset
    near, index = kind(keys, y).nearest(queries, 5, by_class=by_class)
    expected, expected_index = oracle(queries, keys, y, 5, by_class)
    assert near.shape == ((15, 3, 5) if by_class else (15, 5))
    np.testing.assert_allclose(near.numpy(), expected, rtol=2e-4)
    assert (index.numpy() == expected_index).mean() > 0.99


@pytest.mark.parametrize("kind", [exact, by_signature])
def test_rows_are_the_features_of_the_named_examples(kind):
    keys, y = mixture(50, 7, 3)
    index = kind(keys, y)
    named = torch.tensor([[3, 0], [49, 3], [7, 21]])
    assert index.width == 7
    assert_close(index.rows(named), keys[named], atol=1e-5, rtol=1e-5)
    assert_close(index.rows(torch.tensor(5)), keys[5], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by_class", [True, False])
def test_signatures_of_a_noisy_mixture_recall_the_neighbours(by_class, monkeypatch):
    monkeypatch.setattr(search, "SAMPLE", 300)
    keys, y = mixture(2000, 400, 5, rank=20, noise=0.3)
    clean, _ = mixture(20, 400, 5, seed=1, rank=20, noise=0.3)
    far = clean + 0.5 * torch.randn(20, 400, generator=torch.Generator().manual_seed(2))
    queries = torch.cat([clean, far])
    _, found = by_signature(keys, y).nearest(queries, 10, by_class=by_class)
    _, expected = oracle(queries, keys, y, 10, by_class)
    pairs = zip(found.flatten(0, -2).tolist(), expected.reshape(-1, 10).tolist(), strict=True)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in pairs]) >= 0.99


def test_a_small_class_does_not_cost_the_others_their_candidates():
    """The directions cannot see all of the noise, so that it takes candidates beyond k to find the nearest."""
    keys, y = mixture(400, 300, 2, noise=1.0)
    y[:] = 0
    y[:5] = 1
    queries, _ = mixture(30, 300, 2, seed=1, noise=1.0)
    uneven = by_signature(keys, y).nearest(queries, 5)[1][:, 0]
    alone = by_signature(keys[5:], y[5:]).nearest(queries, 5)[1][:, 0] + 5
    assert (uneven == alone).double().mean() > 0.98
    assert {*by_signature(keys, y).nearest(queries, 5)[1][0, 1].tolist()} == {0, 1, 2, 3, 4}


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(6, 60),
    d=st.sampled_from([1, 2, 30, 200]),
    rank=st.integers(1, 10),
    noise=st.sampled_from([0.0, 1e-3, 1.0]),
    offset=st.sampled_from([0.0, 100.0]),
)
def test_distances_of_signatures_are_lower_bounds(seed, n, d, rank, noise, offset):
    keys, y = mixture(n, d, 1, seed=seed, rank=rank, noise=noise)
    queries = mixture(8, d, 1, seed=seed + 1, rank=rank + 3, noise=noise)[0] + offset
    index = by_signature(keys, y)
    signatures = index.signatures
    bound = torch.cdist(signatures.sign(queries).double(), signatures.values.double())
    truth = torch.cdist(queries.double(), keys[index.order].double())
    # A length that is left out comes of a difference of squares: it has half of float32's digits.
    norms = torch.maximum(*((f - signatures.mean).norm(dim=1).amax() for f in (queries, keys)))
    assert (bound <= truth + 1e-3 * norms).all()
    directions = signatures.directions
    assert_close(directions.T @ directions, torch.eye(directions.shape[1]), atol=1e-4, rtol=0)


def test_features_that_do_not_vary_have_signatures():
    index = by_signature(torch.ones(12, 40), torch.arange(12) % 2)
    near, found = index.nearest(torch.ones(1, 40), 3)
    assert_close(near, torch.zeros(1, 2, 3))
    assert (found % 2 == torch.tensor([[[0], [1]]])).all()


def test_candidates_are_ranked_a_part_at_a_time(monkeypatch):
    keys, y = mixture(200, 30, 4)
    queries, _ = mixture(4, 30, 4, seed=1)
    expected = by_signature(keys, y).nearest(queries, 6)
    monkeypatch.setattr(search, "CHUNK_VALUES", 7 * 30)
    asked = []

    def rows(examples):
        asked.append(len(examples))
        return keys[examples].clone()

    index = SignatureIndex(rows, y.argsort(stable=True), torch.bincount(y).tolist())
    asked.clear()
    found = index.nearest(queries, 6)
    assert max(asked) == 7
    # What several antigens share is computed once.
    assert sum(asked) <= len(keys)
    assert_close(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("kind", [exact, by_signature])
def test_no_antigens(kind):
    keys, y = mixture(60, 8, 3)
    near, index = kind(keys, y).nearest(keys[:0], 4)
    assert near.shape == index.shape == (0, 3, 4)


@pytest.mark.parametrize("chunk", [2**22, 50])
@pytest.mark.parametrize("kind", [exact, by_signature])
def test_examples_within_a_radius_are_counted_per_class(kind, chunk, monkeypatch):
    g = torch.Generator().manual_seed(0)
    keys, queries = (torch.randint(0, 4, (n, 3), generator=g).float() for n in (120, 9))
    y = torch.arange(120) % 3
    squares = (queries[:, None] - keys).square().sum(2)
    # The radius is that of an example: of as near ones there are several.
    radius = squares.sort(dim=1).values[:, 20].sqrt()
    monkeypatch.setattr(search.flocking, "CHUNK_VALUES", chunk)
    counts, least = kind(keys, y).within(queries, radius)
    inside = squares <= radius.square().round()[:, None]
    numbers = torch.where(inside, torch.arange(120), 120)
    assert torch.equal(counts, torch.stack([inside[:, y == c].sum(1) for c in range(3)], 1))
    assert torch.equal(least, torch.stack([numbers[:, y == c].amin(1) for c in range(3)], 1))
    assert (kind(keys, y).within(queries, torch.full((9,), -1.0))[1] == 120).all()


def test_equal_rows_are_equally_near_in_a_class_of_any_size():
    """A class of few examples is searched in another way than one of many."""
    keys, _ = mixture(900, 37, 1)
    y = torch.arange(900) // 880
    keys[880:] = keys[:20]
    index = exact(keys, y)
    near, found = index.nearest(keys[:20] + 0.01, 1)
    assert torch.equal(found[:, :, 0], torch.stack([torch.arange(20), torch.arange(880, 900)], 1))
    assert torch.equal(near[:, 0], near[:, 1])
    assert (index.within(keys[:20] + 0.01, near[:, 0, 0])[0] == 1).all()


def test_distances_of_whole_numbers_are_exact():
    g = torch.Generator().manual_seed(0)
    keys, queries = (torch.randint(0, 10, (n, 5), generator=g).float() for n in (700, 30))
    keys[:, 4], queries[:, 4] = 3000.0, 3000.0
    near, found = exact(keys, torch.arange(700) % 3).nearest(queries, 4)
    assert torch.equal(near.square().round(), (queries[:, None, None] - keys[found]).square().sum(3))
    assert torch.equal(near, near.square().round().sqrt())


@pytest.mark.parametrize("kind", [exact, by_signature])
def test_the_names_of_classes_move_no_distance(kind):
    keys, y = mixture(700, 20, 3)
    queries, _ = mixture(30, 20, 3, seed=1)
    named, renamed = kind(keys, y).nearest(queries, 5), kind(keys, 2 - y).nearest(queries, 5)
    assert torch.equal(named[0], renamed[0].flip(1))
    assert torch.equal(named[1], renamed[1].flip(1))


def test_batches_follow_the_examples_numbers_and_none_is_smaller(monkeypatch):
    monkeypatch.setattr(search, "ROWS", 20)
    keys, _ = mixture(50, 6, 2)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    asked = []

    def rows(examples):
        asked.append(examples.tolist())
        return keys[examples]

    assert torch.equal(computed(rows, order), keys[order])
    assert asked == [[*range(16)], [*range(16, 33)], [*range(33, 50)]]
    assert torch.equal(computed(rows, order[:7]), keys[order[:7]])


def test_features_of_no_width_to_speak_of():
    for keys in (torch.full((40, 3), 1e30), torch.full((40, 3), 7e-41), torch.tensor([[0.0], [1e-42]]).repeat(20, 3)):
        near, _ = exact(keys, torch.arange(40) % 2).nearest(keys[:2], 3)
        assert torch.isfinite(near).all()


@pytest.fixture
def screened(monkeypatch):
    monkeypatch.setattr(search, "MANY_VALUES", 0)
    return exact


@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize("noise", [1e-4, 0.1, 0.5])
def test_a_screened_search_is_exact(noise, by_class, screened):
    """Whether signatures prove every answer, some, or none."""
    keys, y = mixture(900, 120, 3, noise=noise)
    queries, _ = mixture(15, 120, 3, seed=1, noise=noise)
    queries[::2] += torch.randn(8, 120, generator=torch.Generator().manual_seed(3))
    index = screened(keys, y)
    assert index.signatures is not None
    near, found = index.nearest(queries, 5, by_class=by_class)
    expected, expected_index = oracle(queries, keys, y, 5, by_class)
    np.testing.assert_allclose(near.numpy(), expected, rtol=2e-4)
    assert (found.numpy() == expected_index).all()


def test_what_signatures_prove_is_not_searched_again(screened, monkeypatch):
    keys, y = mixture(900, 120, 3, noise=1e-3)
    index = screened(keys, y)
    expected = index.nearest(keys[:9], 5)
    monkeypatch.setattr(search.flocking, "nearest", None)
    assert torch.equal(index.nearest(keys[:9], 5)[0], expected[0])
    # What is left out hides which neighbours are near.
    keys, y = mixture(900, 120, 3, rank=1, noise=0.2)
    index = screened(keys, y)
    assert index.signatures is not None
    with pytest.raises(TypeError):
        index.nearest(keys[:9], 5)


def test_features_in_many_directions_are_not_screened(screened):
    assert (
        screened(torch.randn(300, 40, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 3).signatures
        is None
    )


def test_progress_is_told_up_to_the_total(monkeypatch):
    monkeypatch.setattr(search, "ROWS", 20)
    keys, y = mixture(50, 6, 2)
    told = []
    by_signature(keys, y, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(16, 50), (33, 50), (50, 50)]
    told.clear()
    assert torch.equal(computed(lambda e: keys[e], torch.arange(50), lambda *part: told.append(part)), keys)
    assert told == [(16, 50), (33, 50), (50, 50)]


# Defences that search by signature.


class Net(nn.Module):
    """Inputs `(B, 1, 6, 6)` to a wide layer that is not affine, `wide`, and 3 logits."""

    def __init__(self, scale=1.0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 24, 3, padding=1)
            self.head = nn.Linear(24 * 36, 3)
        self.conv.weight.data *= scale
        self.wide = nn.ReLU()

    def forward(self, x):
        return self.head(self.wide(self.conv(x)).flatten(1))


@pytest.fixture
def net():
    return Net().eval()


# More than a population of 60 cells of 36 pixels, less than 85 examples of 864 features.
BUDGET = 100_000


def rails(net, layers="wide", **options):
    return RAILS(net, layers, maturation=SMALL, seed=0, **options)


def cosine(net, layers="wide", **options):
    return DkNN(net, layers, neighbours=9, **options)


def euclidean(net, layers="wide", **options):
    return DkNN(net, layers, neighbours=9, metric="euclidean", **options)


SEVERAL = ["wide", "conv", "input"]


@pytest.mark.parametrize(
    ("defence", "layers"), [(rails, "wide"), (rails, SEVERAL), (cosine, SEVERAL), (euclidean, "wide")]
)
def test_a_small_budget_gives_the_same_answers(defence, layers, net, images, tmp_path):
    full = defence(net, layers).fit(*images)
    small = defence(net, layers, memory_budget=BUDGET).fit(*images)
    filed = defence(net, layers, memory_budget=BUDGET).fit(*images, feature_file=tmp_path / "features")
    assert all(isinstance(index, ExactIndex) for index in full.indices)
    assert isinstance(small.index(0), SignatureIndex)
    g = torch.Generator().manual_seed(3)
    antigens = (images[0][:40] + 0.3 * torch.rand(40, 1, 6, 6, generator=g)).clamp(0, 1)
    for other in (small, filed):
        assert torch.equal(other.predict(antigens), full.predict(antigens))
        assert (other.foreign(antigens) == full.foreign(antigens)).double().mean() >= 0.9
    if isinstance(full, DkNN):
        assert_close(small.credibility(antigens), full.credibility(antigens))
    else:
        assert torch.equal(small.naive(antigens)[0][..., 0], full.naive(antigens)[0][..., 0])


@pytest.mark.parametrize("defence", [rails, cosine])
def test_the_soft_vote_of_neighbours_works_on_signatures(defence, net, images):
    full = SoftNeighbours(defence(net).fit(*images), neighbours=4)
    small = SoftNeighbours(defence(net, memory_budget=BUDGET).fit(*images), neighbours=4)
    gradients = []
    for vote in (full, small):
        x = images[0][:6].clone().requires_grad_()
        out = vote(x)
        (gradient,) = torch.autograd.grad(out[:, 0].sum(), x)
        gradients.append(gradient)
    assert_close(out, full(images[0][:6]), atol=1e-4, rtol=1e-4)
    assert_close(gradients[1], gradients[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("budget", [0, -1, True, 1e9, None, "lots"])
@pytest.mark.parametrize("defence", [rails, cosine])
def test_bad_budgets(defence, net, budget):
    with pytest.raises((TypeError, ValueError), match="memory_budget must be"):
        defence(net, memory_budget=budget)


def test_the_automatic_budget_is_less_than_the_machines_memory(net):
    budget = rails(net).memory_budget
    assert budget == cosine(net, memory_budget="auto").memory_budget
    assert 2**26 < budget < 2**50


def test_a_budget_too_small_for_one_antigen(net, images):
    with pytest.raises(ValueError, match="memory_budget=8,639 is too small for one antigen"):
        rails(net, memory_budget=4 * 60 * 36 - 1).fit(*images)
    rails(net, memory_budget=4 * 60 * 36).fit(*images).predict(images[0][:2])


@pytest.mark.parametrize("defence", [rails, cosine])
def test_the_budget_is_the_machines_and_is_not_saved(defence, net, images, tmp_path):
    small = defence(net, memory_budget=BUDGET).fit(*images)
    small.save(tmp_path)
    loaded = type(small).load(tmp_path, net)
    assert loaded.memory_budget == defence(net).memory_budget
    assert isinstance(loaded.index(), ExactIndex)
    assert torch.equal(loaded.predict(images[0][:20]), small.predict(images[0][:20]))


@pytest.mark.parametrize("budget", ["auto", BUDGET])
def test_an_interrupted_fit_can_be_repeated(budget, net, images):
    defence = rails(net, memory_budget=budget)

    def interrupt(done, total):
        assert (done, total) == (86, 86)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            defence.fit(*images, on_progress=interrupt)
        with pytest.raises(ValueError, match="this RAILS is not fitted"):
            defence.predict(images[0])
        defence.fit(*images)
        assert len(defence.predict(images[0][:3])) == 3


# Feature files.


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "features"


KEYS, _ = mixture(60, 30, 2)


def keyed(examples):
    return KEYS[examples].clone()


def beside(path):
    return path.with_name(path.name + ".json")


def test_a_file_holds_the_features_to_half_precision(path, monkeypatch):
    monkeypatch.setattr(feature_file, "ROWS", 25)
    told = []
    file = FeatureFile(path, keyed, 60, on_progress=lambda *part: told.append(part))
    assert told == [(25, 60), (50, 60), (60, 60)]
    assert path.stat().st_size == 2 * 60 * 30
    assert_close(file(torch.arange(60)), KEYS.half().float(), rtol=0, atol=0)
    assert_close(file(torch.tensor([7, 7, 0])), KEYS[[7, 7, 0]].half().float(), rtol=0, atol=0)
    assert sorted(p.name for p in path.parent.iterdir()) == ["features", "features.json"]


def test_a_file_is_written_once(path, net, images):
    first = rails(net, memory_budget=BUDGET).fit(*images, feature_file=path)
    written = path.stat()
    told = []
    again = rails(net, memory_budget=BUDGET)
    again.fit(*images, feature_file=str(path), on_progress=lambda *part: told.append(part))
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (written.st_mtime_ns, written.st_ino)
    assert told == [(86, 86)]
    assert torch.equal(again.predict(images[0]), first.predict(images[0]))


@pytest.mark.parametrize("defence", [rails, cosine])
def test_a_saved_defence_opens_its_file_and_computes_nothing_in_it(defence, path, net, images, tmp_path, monkeypatch):
    fitted = defence(net, memory_budget=BUDGET).fit(*images, feature_file=path)
    fitted.save(tmp_path / "saved")
    monkeypatch.setattr("immunonet.defences.holding.auto_budget", lambda: BUDGET)
    rows, computed, told = _Rows.__call__, [], []
    monkeypatch.setattr(_Rows, "__call__", lambda self, some: (computed.append(len(some)), rows(self, some))[1])
    loaded = type(fitted).load(tmp_path / "saved", net, feature_file=path, on_progress=lambda *part: told.append(part))
    # The probes that the file is known by.
    assert computed == [8]
    n = len(fitted.repertoire)
    assert told == [(n, n)]
    computed.clear()
    type(fitted).load(tmp_path / "saved", net)
    assert sum(computed) > n
    assert isinstance(loaded.index(), SignatureIndex)
    assert torch.equal(loaded.predict(images[0]), fitted.predict(images[0]))


def test_a_saved_defence_refuses_the_file_of_another(path, net, images, tmp_path, monkeypatch):
    fitted = rails(net, memory_budget=BUDGET).fit(*images)
    fitted.save(tmp_path / "saved")
    rails(net, memory_budget=BUDGET).fit(images[0].flip(0), images[1].flip(0), feature_file=path)
    monkeypatch.setattr("immunonet.defences.holding.auto_budget", lambda: BUDGET)
    with pytest.raises(ValueError, match="holds features of other examples"):
        RAILS.load(tmp_path / "saved", net, feature_file=path)


def test_several_layers_have_files_of_their_own(path, net, images):
    rails(net, ["wide", "conv"], memory_budget=BUDGET).fit(*images, feature_file=path)
    names = sorted(p.name for p in path.parent.iterdir())
    assert "features.0" in names
    assert "features" not in names


def test_no_file_where_memory_will_do(path, net, images):
    rails(net).fit(*images, feature_file=path)
    assert not path.parent.exists()


def test_the_size_is_logged_before_the_file_is_written(path, caplog):
    seen = []

    def on_progress(*_):
        seen.append(caplog.text)

    with caplog.at_level(logging.INFO, logger="immunonet"):
        FeatureFile(path, keyed, 60, on_progress=on_progress)
    assert f"writing {path}: 3,600 bytes" in seen[0]


@pytest.mark.parametrize("size", [0, 100, 3598, 3602])
def test_a_file_of_another_size(path, size):
    FeatureFile(path, keyed, 60)
    path.write_bytes((path.read_bytes() + b"12")[:size])
    with pytest.raises(ValueError, match=f"features was truncated: {size:,} bytes, 3,600 expected"):
        FeatureFile(path, keyed, 60)


def test_a_file_that_shrinks_while_it_is_used(path):
    file = FeatureFile(path, keyed, 60)
    with open(path, "r+b") as handle:
        handle.truncate(0)
    with pytest.raises(ValueError, match="features was truncated: 0 bytes"):
        file(torch.tensor([59]))


def test_a_file_of_another_repertoire_or_layer(path):
    FeatureFile(path, keyed, 60)
    for n, rows in ((59, keyed), (60, lambda e: KEYS[e, :29])):
        with pytest.raises(ValueError, match="features of another repertoire or layer"):
            FeatureFile(path, rows, n)
    for other in (KEYS.flip(0), 1.1 * KEYS, KEYS + torch.arange(60)[:, None].gt(55) * 1.0):
        with pytest.raises(ValueError, match="of other examples or of a model with other weights"):
            FeatureFile(path, lambda e, other=other: other[e], 60)


def test_a_file_of_another_model(path, images):
    rails(Net(), memory_budget=BUDGET).fit(*images, feature_file=path)
    other = rails(Net(scale=1.5), memory_budget=BUDGET)
    with pytest.raises(ValueError, match="a model with other weights"):
        other.fit(*images, feature_file=path)
    with pytest.raises(ValueError, match="not fitted"):
        other.predict(images[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda record: record.unlink(), r"has no features\.json beside it"),
        (lambda record: record.write_text("{"), "is not valid JSON"),
        (lambda record: record.write_text("[]"), "another repertoire or layer"),
    ],
)
def test_a_file_without_its_record(path, spoil, message):
    FeatureFile(path, keyed, 60)
    spoil(beside(path))
    with pytest.raises(ValueError, match=message):
        FeatureFile(path, keyed, 60)


def test_features_too_large_for_half_precision(path):
    with pytest.raises(ValueError, match="features are too large for float16"):
        FeatureFile(path, lambda e: KEYS[e] * 1e5, 60)
    assert list(path.parent.iterdir()) == []


def test_a_disk_with_too_little_room(path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 3599))
    with pytest.raises(OSError, match="features needs 3,600 bytes, more than the disk has left"):
        FeatureFile(path, keyed, 60)
    assert list(path.parent.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 3600))
    FeatureFile(path, keyed, 60)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk")])
def test_an_interrupted_write_leaves_nothing(path, error, monkeypatch, net, images):
    monkeypatch.setattr(feature_file, "ROWS", 25)
    defence = rails(net, memory_budget=BUDGET)

    def interrupt(done, _total):
        if done == 50:
            raise error

    with pytest.raises((KeyboardInterrupt, OSError)):
        defence.fit(*images, feature_file=path, on_progress=interrupt)
    assert list(path.parent.iterdir()) == []
    with pytest.raises(ValueError, match="not fitted"):
        defence.predict(images[0])
    defence.fit(*images, feature_file=path)
    assert path.stat().st_size == 2 * 86 * 864

"""Examples that stay in their source: the same answers as from copies, and an error for whatever has changed."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from immunonet import RAILS, DkNN, Maturation, Memory, indexed, load
from immunonet._check import Bounds
from immunonet._identity import identity


def seeded(*layers):
    """Return a network of layers that are made by functions, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(layer() for layer in layers)).eval()


def make(n, seed=0):
    """Return noisy copies of one random pattern per class, in [0, 1]."""
    patterns = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    y = torch.arange(n) % 3
    return 0.6 * patterns[y] + 0.4 * torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed)), y


SMALL = Maturation(population=60, neighbours=3, generations=2)
NET = seeded(
    lambda: nn.Conv2d(1, 4, 3, padding=1),
    nn.ReLU,
    lambda: nn.Conv2d(4, 4, 3, padding=1),
    nn.ReLU,
    lambda: nn.MaxPool2d(2),
    nn.Flatten,
    lambda: nn.Linear(36, 3),
)
X, Y = make(90)
ASKED = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(5))
UNIT = Bounds((0.0,), (1.0,))


class Items(Dataset):
    """Counts what is read of it; gives the same memory for every example."""

    def __init__(self, x=X, y=Y):
        self.x, self.y, self.read, self.buffer = x.numpy(), y.tolist(), [], np.zeros(tuple(x.shape[1:]), np.float32)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        self.read.append(i)
        self.buffer[:] = self.x[i]
        return self.buffer, self.y[i]


class Several(Items):
    """Gives several at once, as dicts."""

    def __getitems__(self, places):
        assert all(type(place) is int for place in places)
        return [{"image": self.x[i], "label": self.y[i]} for i in places]

    def __getitem__(self, i):
        raise AssertionError("several are asked for at once")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class Endless(Dataset):
    def __getitem__(self, i):
        return X[i % 90], int(Y[i % 90])


def mapped(tmp_path, x=X, dtype=np.float32, mode="r"):
    found = np.memmap(tmp_path / "x", dtype, "w+", shape=tuple(x.shape))
    found[:] = x.numpy()
    found.flush()
    return np.memmap(tmp_path / "x", dtype, mode, shape=tuple(x.shape))


def arrow(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"x": X.flatten(1).tolist(), "label": Y.tolist()}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "arrow"))
    return datasets.load_from_disk(str(tmp_path / "arrow")).with_format("torch")


GIVEN = {
    "memory-mapped": lambda path: (mapped(path), Y),
    "a part of a mapped file": lambda path: (mapped(path, torch.cat([X, X]))[90:], Y.numpy()),
    "a private mapped file": lambda path: (mapped(path, mode="c"), Y),
    "an array": lambda _: (X.numpy(), Y.tolist()),
    "every other row": lambda _: (X.repeat_interleave(2, 0).numpy()[::2], Y),
    "a tensor": lambda _: (X, Y),
    "a data set": lambda _: (Items(),),
    "several at once": lambda _: (Several(),),
    "a subset": lambda _: (Subset(TensorDataset(X.flip(0), Y.flip(0)), list(range(89, -1, -1))),),
    "a list of pairs": lambda _: (list(zip(X, Y, strict=True)),),
}
DEFENCES = {
    "rails": lambda: RAILS(NET, "2", maturation=SMALL, seed=0),
    "in a space": lambda: RAILS(NET, ["0", "2"], space="0", maturation=SMALL, seed=0),
    "by signatures": lambda: RAILS(NET, "2", maturation=SMALL, seed=0, memory_budget=40_000),
    "its voice": lambda: RAILS(NET, "input", maturation=SMALL, seed=0, voice=0.3),
    "dknn": lambda: DkNN(NET, ["0", "5"], neighbours=5),
}


def alike(one, other):
    assert torch.equal(one(ASKED), other(ASKED))
    assert torch.equal(one.familiarity(ASKED), other.familiarity(ASKED))
    assert torch.equal(one.p_values(ASKED), other.p_values(ASKED))
    if isinstance(one, RAILS):
        first, second = (found.respond(ASKED) for found in (one, other))
        assert torch.equal(first.plasma.x, second.plasma.x)
        assert torch.equal(first.plasma.origin, second.plasma.origin)


@pytest.mark.parametrize(
    ("defence", "how"),
    [(defence, ("memory-mapped", "several at once")[i % 2]) for i, defence in enumerate(DEFENCES)],
)
def test_answers_are_those_from_copies(defence, how, tmp_path):
    in_memory = DEFENCES[defence]().fit(X, Y)
    elsewhere = DEFENCES[defence]().fit(*GIVEN[how](tmp_path), keep="source")
    assert not any(buffer.shape[1:] == X.shape[1:] for buffer in elsewhere.repertoire.buffers() if buffer.ndim == 4)
    alike(in_memory, elsewhere)


@pytest.mark.parametrize("how", GIVEN)
def test_whatever_has_an_index_is_read(how, tmp_path):
    alike(DEFENCES["rails"]().fit(X, Y), DEFENCES["rails"]().fit(*GIVEN[how](tmp_path), keep="source"))


def test_a_data_set_of_arrow_is_read(tmp_path):
    net = seeded(lambda: nn.Linear(36, 8), nn.ReLU, lambda: nn.Linear(8, 3))
    flat = X.flatten(1)
    one, other = (RAILS(net, "1", maturation=SMALL, seed=0) for _ in range(2))
    other.fit(arrow(tmp_path), keep="source")
    assert torch.equal(one.fit(flat, Y)(ASKED.flatten(1)), other(ASKED.flatten(1)))
    other.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", net, source=arrow(tmp_path))(ASKED.flatten(1)), other(ASKED.flatten(1)))


def test_a_data_set_whose_transform_wants_all_columns_is_read():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": X.flatten(1).tolist(), "label": Y.tolist()})

    def both(row):
        return {"image": [torch.tensor(one).view(X.shape[1:]) for one in row["image"]], "label": row["label"]}

    here, there = (RAILS(NET, "input", maturation=SMALL, seed=0) for _ in range(2))
    here.fit(X, Y)
    there.fit(rows.with_transform(both), keep="source")
    assert torch.equal(here.respond(ASKED).votes, there.respond(ASKED).votes)


def test_bytes_stay_bytes(tmp_path):
    x = (X * 255).round()
    defences = [DkNN(NET, "2", neighbours=5, bounds=(0, 255)) for _ in range(2)]
    defences[1].fit(mapped(tmp_path, x, np.uint8), Y, keep="source")
    assert torch.equal(defences[0].fit(x, Y)(255 * ASKED), defences[1](255 * ASKED))


def test_the_calibration_may_be_given(tmp_path):
    held = make(30, seed=3)
    alike(
        DEFENCES["rails"]().fit(X, Y, held),
        DEFENCES["rails"]().fit(mapped(tmp_path), Y, TensorDataset(*held), keep="source"),
    )


def test_what_is_asked_for_is_what_is_read():
    data = Items()
    defence = DEFENCES["rails"]().fit(data, keep="source")
    assert np.bincount(data.read).min() >= 2
    data.read.clear()
    defence.predict(ASKED[:1])
    # The naive cells of three classes.
    assert len(data.read) == len(set(data.read)) == 9


@pytest.mark.parametrize("defence", DEFENCES)
def test_saved_and_loaded(defence, tmp_path):
    fitted = DEFENCES[defence]().fit(mapped(tmp_path), Y, keep="source")
    fitted.save(tmp_path / "saved")
    saved = sum(file.stat().st_size for file in (tmp_path / "saved").iterdir())
    assert saved < X.numel() * 4 + 20_000
    told = json.loads((tmp_path / "saved" / "defence.json").read_text())["elsewhere"]["source"]
    assert told["examples"] == 90
    assert told["shape"] == [1, 6, 6]
    assert told["kind"] == "memmap of float32"
    assert len(told["sha256"]) == 64
    loaded = type(fitted).load(tmp_path / "saved", NET, source=X)
    alike(fitted, loaded)
    assert identity(fitted) == identity(loaded) != identity(DEFENCES[defence]().fit(X.flip(0), Y.flip(0)))


def test_loaded_with_calibration_examples_of_its_own(tmp_path):
    fitted = DEFENCES["rails"]().fit(X, Y, make(30, seed=3), keep="source")
    fitted.save(tmp_path)
    alike(fitted, load(tmp_path, NET, source=X))


def test_load_refuses_other_examples(tmp_path):
    fitted = DEFENCES["rails"]().fit(X, Y, keep="source")
    fitted.save(tmp_path / "source")
    DEFENCES["rails"]().fit(X, Y).save(tmp_path / "memory")
    other = X.clone()
    other[40, 0, 2, 2] += 1e-6
    for source, message in (
        (None, r"source must be given: .* keep='source' on 90 examples"),
        (X[:89], "source must be what this was fitted on, 90 examples, got 89"),
        (other, r"source must be what this was fitted on.*source\[40\] is not what it was"),
        (X.flip(0), r"source\[0\] is not"),
        (X[:, :, :5], r"source must be what this was fitted on.*source\[0\] is not"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "source", NET, source=source)
    with pytest.raises(ValueError, match=r"source must be .*: the label of source\[0\] is not what it was"):
        load(tmp_path / "source", NET, source=Items(X, (Y + 1) % 3))
    with pytest.raises(TypeError, match=r"source must be had by its index.*got Stream"):
        load(tmp_path / "source", NET, source=Stream())
    with pytest.raises(ValueError, match="source must be left out: this was saved with its examples"):
        load(tmp_path / "memory", NET, source=X)


def test_an_example_that_changes_is_an_error_when_it_is_read():
    x = X.clone()
    defence = DEFENCES["rails"]().fit(x, Y, keep="source")
    near = x[1:2].clone()
    x[1, 0, 0, 0] += 0.01
    with pytest.raises(ValueError, match=r"x\[1\] is not what it was when it was first read.*random transforms"):
        defence.predict(near)


def test_a_random_data_set_is_refused_by_fit():
    class Noisy(Items):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + np.random.default_rng().random(x.shape, np.float32) * 1e-3, y

    with pytest.raises(ValueError, match=r"x\[\d+\] is not what it was .*keep='memory'"):
        DEFENCES["rails"]().fit(Noisy(0.9 * X), keep="source")


def test_a_label_or_a_length_that_changes_is_an_error():
    data = Items()
    defence = DEFENCES["dknn"]().fit(data, keep="source")
    data.y[3] = 2
    with pytest.raises(ValueError, match=r"the label of x\[3\] is not what it was"):
        defence.repertoire.inputs(slice(None))
    data.y.pop()
    with pytest.raises(ValueError, match="x must stay as it was, 90 examples, got 89: fit again"):
        defence.repertoire.inputs(slice(2))


def changed(place, value):
    x = X.clone()
    x[place] = value
    return x


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: (changed(41, torch.nan), Y), r"x\[41\] must be finite, got 36 NaN or infinite"),
        (lambda: (changed(41, 1.5), Y), r"x\[41\] must lie within bounds"),
        (lambda: (Items(changed(41, torch.nan)),), r"x\[41\] must be finite"),
        (lambda: (X, Y.clamp(max=1)), "y has no example of class 2"),
        (lambda: (X, Y[1:]), r"y must have shape \(90,\), one label per input"),
        (lambda: (X, Y + 1), "y must be in 0 to 2"),
        (lambda: (X[:0], Y[:0]), "x must hold at least one example"),
        (lambda: (X[:, 0, 0, 0], Y), r"must have shape \(B, "),
        (lambda: (X.mul(255).to(torch.uint8), Y), "x.* must have a floating dtype.*/ 255"),
        (lambda: (X.numpy().astype(str), Y), "x must be a tensor or an array of numbers"),
        (lambda: (X.double() + 1e9, Y), "x.* must lie within bounds"),
        (lambda: (X, None), "y is missing"),
        (lambda: (Items(), Y), "y must be left out"),
        (lambda: (Stream(), None), "x must be had by its index .* got Stream.*keep='memory'"),
        (lambda: (DataLoader(Items()), None), "got DataLoader; of a DataLoader give the dataset"),
        (lambda: (Endless(), None), "with __len__ and __getitem__, got Endless"),
        (lambda: (X.tolist(), Y), "x must be had by its index .* got list"),
    ],
)
def test_what_cannot_be_read_is_named(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DEFENCES["rails"]().fit(*given(), keep="source")


def test_items_that_cannot_be_read_are_named():
    class Broken(Items):
        def __getitem__(self, i):
            if i == 41:
                raise OSError("gone")
            return (X[i][:, :5] if i == 43 and self.short else X[i]), self.y[i]

    data = Broken()
    data.short = False
    with pytest.raises(ValueError, match=r"x\[41\] cannot be read: OSError: gone"):
        DEFENCES["rails"]().fit(data, keep="source")
    data = Broken(X[42:], Y[42:])
    data.short = True
    with pytest.raises(ValueError, match=r"x\[41\] cannot be read"):
        DEFENCES["rails"]().fit(data, keep="source")

    class Odd(Several):
        def __getitems__(self, places):
            found = super().__getitems__(places)
            return [one | {"image": one["image"][:, :5]} if i == 43 else one for i, one in zip(places, found)]  # noqa: B905

    with pytest.raises(ValueError, match=r"inputs of x must be of one size, got \(1, 6, 6\) .* \(1, 5, 6\) in x\[43\]"):
        DEFENCES["rails"]().fit(Odd(), keep="source")

    class Short(Several):
        def __getitems__(self, places):
            return super().__getitems__(places)[:-1]

    with pytest.raises(ValueError, match="x must give an item per index"):
        DEFENCES["rails"]().fit(Short(), keep="source")


def test_a_feature_that_float32_rounds_is_refused():
    x = torch.rand(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.tensor([0, 1.7e9])
    net = seeded(lambda: nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"rounds feature 1.*subtract the offset"):
        DkNN(net, "input", bounds=(-1e10, 1e10)).fit(x, torch.arange(60) % 2, keep="source")


def test_auto_keeps_in_memory_what_fits_or_is_there(tmp_path):
    bytes_of_copies = 4 * X.numel()
    file, data, octets = mapped(tmp_path), Items(), X.to(torch.uint8)
    for x in (file, data, octets):
        assert indexed.outgrows(x, bytes_of_copies - 1)
        assert not indexed.outgrows(x, bytes_of_copies)
    for x in (
        X,
        X.numpy(),
        X.double(),
        list(zip(X, Y, strict=True)),
        X.tolist(),
        Stream(),
        DataLoader(data),
        Endless(),
    ):
        assert not indexed.outgrows(x, 1)
    settings = {"neighbours": 5, "memory_budget": bytes_of_copies - 1}
    assert isinstance(DkNN(NET, "2", **settings).fit(file, Y).repertoire.x, indexed.Indexed)
    assert isinstance(DkNN(NET, "2", **settings).fit(X, Y).repertoire.x, torch.Tensor)
    assert isinstance(DkNN(NET, "2", **settings).fit(file, Y, keep="memory").repertoire.x, torch.Tensor)
    with pytest.raises(ValueError, match="keep must be one of 'auto', 'memory', 'source', got 'disk'"):
        DkNN(NET, "2").fit(X, Y, keep="disk")


def test_pages_of_a_private_copy_are_left_alone(tmp_path):
    x = mapped(tmp_path, mode="c")
    x[5] = 0.5
    DEFENCES["dknn"]().fit(x, Y, keep="source")
    assert (x[5] == 0.5).all()


def test_copies_share_the_source():
    data = Several()
    defence = DEFENCES["rails"]().fit(data, keep="source")
    other = copy.deepcopy(defence)
    assert other.repertoire.x.origin is defence.repertoire.x.origin
    alike(defence, other)
    alike(defence, pickle.loads(pickle.dumps(DEFENCES["rails"]().fit(X, Y, keep="source"))))
    alike(defence, defence.with_settings(false_alarm=0.05))


def test_hardened_by_cells(tmp_path):
    found = []
    for keep in ("memory", "source"):
        memory = Memory(None)
        defence = RAILS(NET, "2", maturation=SMALL, seed=0, memory=memory).fit(X, Y, keep=keep)
        response = defence.respond(ASKED)
        memory.confirm(memory.remember(response, ASKED), response.labels)
        plain = RAILS(NET, "2", maturation=SMALL, seed=0).fit(X, Y, keep=keep)
        plain.harden(memory)
        assert len(plain.repertoire.shown) == len(plain.repertoire) > 90 - 5
        plain.save(tmp_path / keep)
        found.append(plain)
        alike(plain, load(tmp_path / keep, NET, **({"source": X} if keep == "source" else {})))
    alike(*found)


@given(
    n=st.integers(1, 40),
    places=st.lists(st.integers(0, 39), max_size=12),
    several=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_rows_are_those_of_a_tensor(n, places, several):
    x = torch.rand(n, 2, 3, generator=torch.Generator().manual_seed(n))
    which = torch.tensor([place % n for place in places], dtype=torch.long)
    given = ((Several if several else Items)(x, torch.arange(n)),) if n % 2 else (x, torch.arange(n))
    found, labels = indexed.opened(*given, *([] if len(given) == 2 else [None]), bounds=UNIT)
    assert found.shape == tuple(x.shape)
    assert torch.equal(torch.as_tensor(labels), torch.arange(n))
    assert torch.equal(found[which], x[which])
    assert torch.equal(found[which[:, None]], x[which[:, None]])
    assert torch.equal(found[1::2], x[1::2])
    assert torch.equal(found[n - 1], x[n - 1])
    part = found.part(which)
    assert torch.equal(part[:], x[which])
    assert len(part) == len(which)
    assert len(found.origin.complete()) == n
    assert (found.origin.digests != 0).all()
    assert part.checksum() == indexed.opened(x, torch.arange(n), bounds=UNIT)[0].part(which).checksum()

"""Hardening: confirmed entries' cells join the repertoire, as if they had been fitted, and leave it without a trace."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from immunonet import RAILS, Maturation, Memory, load
from immunonet._identity import identity
from immunonet.defences import holding
from immunonet.features.grown import GrownIndex
from immunonet.features.search import ExactIndex

SMALL = Maturation(population=60, neighbours=3, generations=1, alignment=0)
ANTIGENS = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(5))
OTHERS = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(6))
WAYS = {
    "a layer": {"layers": "2"},
    "the input": {"layers": "input"},
    "two layers, cosine": {"layers": ["2", "6"], "metric": "cosine"},
    "a hidden space": {"layers": "6", "space": "2"},
    "the space itself": {"layers": "2", "space": "2"},
}


def same(one, other):
    names = ("labels", "votes", "credibility", "foreign", "generations")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    cells = [(getattr(a, n), getattr(b, n)) for a, b in ((one.plasma, other.plasma), (one.memory, other.memory))
             for n in ("x", "label", "affinity", "origin")]  # fmt: skip
    return all(torch.equal(a, b) for a, b in pairs + cells)


def fitted(model, examples, **how):
    return RAILS(model, **({"layers": "2"} | how), maturation=SMALL, seed=0).fit(*examples(300, (1, 6, 6)))


def filled(rails, where=None, labels=None, source="caller", **how):
    """Return a memory of the antigens, confirmed."""
    memory = Memory(where, **how)
    response = rails.with_settings(memory=memory).respond(ANTIGENS)
    ids = memory.remember(response, ANTIGENS, source=source)
    memory.confirm(ids, response.labels if labels is None else labels)
    return memory


@pytest.fixture(params=WAYS)
def rails(functional_conv, examples, request):
    return fitted(functional_conv, examples, **WAYS[request.param])


@pytest.fixture
def plain(functional_conv, examples):
    return fitted(functional_conv, examples)


@pytest.fixture(params=["ram", "folder"])
def where(request, tmp_path):
    return None if request.param == "ram" else tmp_path / "memory"


def test_a_point_that_was_wrong_is_right():
    """On a line, examples of 0 at .1 and of 1 at .9: cells of 1 at .45 join, and .4 is 1; those of 0 do not."""
    x, y = torch.tensor([[0.1], [0.11], [0.12], [0.9], [0.91], [0.92]]), torch.tensor([0, 0, 0, 1, 1, 1])
    still = Maturation(population=40, neighbours=1, generations=0, mutation_rate=0.0)
    rails = RAILS(nn.Linear(1, 2), "input", maturation=still, seed=0, memory=Memory(None)).fit(x, y, calibration=(x, y))
    asked = torch.tensor([[0.4], [0.46], [0.2], [0.9]])
    assert rails.predict(asked).tolist() == [0, 0, 0, 1]
    met = rails.respond(asked[:1])
    plasma, memory = torch.full_like(met.plasma.x, 0.35), torch.full_like(met.memory.x, 0.45)
    assert met.plasma.label.eq(0).all()
    found = dataclasses.replace(
        met, plasma=dataclasses.replace(met.plasma, x=plasma),
        memory=dataclasses.replace(met.memory, x=memory, label=torch.ones_like(met.memory.label)),
    )  # fmt: skip
    rails.memory.confirm(rails.memory.remember(found, asked[:1]), [1])
    hardened = rails.with_settings(memory=None)
    assert hardened.harden(rails.memory) is hardened
    assert torch.equal(hardened.repertoire.cells, memory[0])
    assert hardened.predict(asked).tolist() == [1, 1, 0, 1]
    assert hardened.naive(asked[:1])[1][0, :, 0].tolist() == pytest.approx([0.28, 0.05], abs=1e-6)
    assert rails.with_settings(memory=None).predict(asked).tolist() == [0, 0, 0, 1]  # a twin was hardened, not it


@pytest.mark.parametrize("beside", [0.0, 100.0])
def test_it_is_the_repertoire_that_would_have_been_fitted(functional_conv, examples, monkeypatch, beside):
    monkeypatch.setattr(holding, "BESIDE", beside)
    x, y = examples(120, (1, 6, 6))
    for how in ({"layers": "2"}, {"layers": "input"}, {"layers": ["2", "6"], "metric": "cosine"}):
        rails = RAILS(functional_conv, **how, maturation=SMALL, seed=0).fit(
            x[:90], y[:90], calibration=(x[90:], y[90:])
        )
        memory = filled(rails)
        cells, labels = memory.confirmed_cells()
        again = RAILS(functional_conv, **how, maturation=SMALL, seed=0).fit(
            torch.cat([x[:90], cells]), torch.cat([y[:90], labels]), calibration=(x[90:], y[90:])
        )
        rails.harden(memory)
        kind = GrownIndex if beside else ExactIndex
        assert all(type(index) is kind for index in rails.indices)
        asked = torch.cat([OTHERS, ANTIGENS])
        for layer, features in enumerate(rails.features(asked)):
            for by_class in (True, False):
                distances, found = rails.index(layer).nearest(features, 9, by_class=by_class)
                expected, members = again.index(layer).nearest(features, 9, by_class=by_class)
                torch.testing.assert_close(distances, expected)
                assert found.eq(members).float().mean() > 0.99  # but for those that are equally near
            radius = expected[:, -1] + 1e-4
            for a, b in zip(rails.index(layer).within(features, radius), again.index(layer).within(features, radius),
                            strict=True):  # fmt: skip
                assert torch.equal(a, b)
            every = torch.arange(len(rails.repertoire))[None]
            torch.testing.assert_close(rails.index(layer).rows(every), again.index(layer).rows(every))
        assert torch.equal(rails.predict(asked), again.predict(asked))
        torch.testing.assert_close(rails.p_values(asked), again.p_values(asked))
        torch.testing.assert_close(rails.sense(asked).distance, again.sense(asked).distance)


def test_cells_too_wide_to_keep_are_searched_beside_signatures(functional_conv, examples):
    rails = RAILS(functional_conv, "2", maturation=SMALL, seed=0, memory_budget=2**16).fit(*examples(300, (1, 6, 6)))
    memory = filled(rails, cells=1)
    before = rails.respond(OTHERS)
    rails.harden(memory)
    assert type(rails.index()) is GrownIndex
    _, found = rails.index().nearest(rails.features(ANTIGENS)[0], 3)
    assert found.ge(len(rails.repertoire.x)).any()
    assert same(before, rails.harden(None).respond(OTHERS))
    with pytest.raises(ValueError, match=r"is too small for the features of .* cells"):
        rails.harden(filled(rails, cells=None))
    assert same(before, rails.respond(OTHERS))


@pytest.mark.parametrize(
    ("rails", "where"), [(way, "ram") for way in WAYS] + [("two layers, cosine", "folder")], indirect=True
)
def test_the_same_version_gives_the_same_answers(rails, where):
    before, known = rails.respond(OTHERS), identity(rails)
    memory = filled(rails, where)
    version = memory.version
    hardened = rails.harden(memory).respond(OTHERS)
    assert identity(rails) != known
    assert not same(before, hardened)
    assert same(hardened, rails.harden(memory).respond(OTHERS))
    told = identity(rails)
    bad = memory.remember(rails.with_settings(memory=memory).respond(OTHERS), OTHERS, source="hostile")
    memory.confirm(bad, [0] * len(bad))
    assert not same(hardened, rails.harden(memory).respond(OTHERS))
    assert identity(rails) != told
    memory.rollback(version)
    assert same(hardened, rails.harden(memory).respond(OTHERS))
    assert identity(rails) == told
    assert same(before, rails.harden(None).respond(OTHERS))
    assert identity(rails) == known


def test_forgetting_a_source_forgets_its_cells(plain, where):
    memory = filled(plain, where)
    clean = plain.harden(memory).respond(OTHERS)
    bad = memory.remember(plain.with_settings(memory=memory).respond(OTHERS), OTHERS, source="hostile")
    memory.confirm(bad, [1] * len(bad))
    plain.harden(memory)
    assert memory.forget(source="hostile") == len(bad)
    assert same(clean, plain.harden(memory).respond(OTHERS))


def test_only_cells_of_the_confirmed_label_join(plain, where):
    labels = [2, 0, 1] * 4
    memory = filled(plain, where, labels)
    response = plain.respond(ANTIGENS)
    cells, own = memory.confirmed_cells()
    expected = [
        (part.x[i][:16][part.label[i][:16] == label], label)
        for i, label in enumerate(labels) for part in (response.plasma, response.memory)
    ]  # fmt: skip
    assert torch.equal(cells, torch.cat([x for x, _ in expected]))
    assert own.tolist() == [label for x, label in expected for _ in x]
    plain.harden(memory)
    assert torch.equal(plain.repertoire.y[len(plain.repertoire.x) :], own)
    assert f"hardened by {len(own)} cells" in repr(plain)
    assert "hardened" not in repr(plain.harden(None))
    assert plain.respond(ANTIGENS, trace=True).trace


def test_what_joined_is_the_origin_of_cells(rails):
    rails.harden(filled(rails))
    response = rails.respond(ANTIGENS)
    n = len(rails.repertoire.x)
    assert response.plasma.origin.ge(n).any()
    assert torch.equal(rails.repertoire.y[response.plasma.origin], response.plasma.label)
    members = rails.members(0, torch.tensor([[0, n], [n + 1, 1]]))
    assert torch.equal(members[0, 1], rails.repertoire.cells[0]) or rails.space == "2"
    torch.testing.assert_close(members[[0, 1], [1, 0]], rails.repertoire.cells[:2])
    assert len(rails.repertoire.shown) == len(rails.repertoire)
    assert all(rails.surrogates()[name](ANTIGENS).isfinite().all() for name in rails.surrogates())


def test_calibration_is_scored_again(plain):
    before = plain.calibration
    plain.harden(filled(plain))
    assert plain.calibration is not before
    assert len(plain.calibration.strangeness) == len(plain.held) == 15
    cells = plain.repertoire.cells
    assert plain.sense(cells[:8]).distance.lt(plain.with_settings().harden(None).sense(cells[:8]).distance).all()
    x, y = plain.held.x.clone(), plain.held.y.clone()
    own = plain.with_settings()
    own.calibrate(x, y)
    for a, b in zip(own.calibration.buffers(), plain.calibration.buffers(), strict=True):
        assert torch.equal(a, b)
    own.calibrate(x[:9], y[:9])
    assert len(own.harden(None).calibration.strangeness) == 9


def test_saved_and_copied(rails, tmp_path):
    before = rails.respond(OTHERS)
    hardened = rails.harden(filled(rails)).respond(OTHERS)
    told = identity(rails)
    rails.save(tmp_path)
    for other in (load(tmp_path, rails.model), copy.deepcopy(rails), rails.with_settings(false_alarm=0.05)):
        assert identity(other) == told
        assert same(hardened, other.respond(OTHERS))
        assert same(before, other.harden(None).respond(OTHERS))
    assert same(hardened, rails.respond(OTHERS))  # twins go their own ways


def test_an_earlier_save_has_no_calibration_examples(plain):
    tensors = {name: value for name, value in plain.tensors().items() if not name.startswith("held.")}
    earlier = RAILS(plain.model, "2", maturation=SMALL, seed=0)
    earlier.classes = 3
    earlier.restore(tensors)
    with pytest.raises(ValueError, match="was saved without its calibration examples: call calibrate"):
        earlier.harden(filled(plain))
    earlier.calibrate(plain.held.x, plain.held.y)
    assert same(earlier.harden(filled(plain)).respond(OTHERS), plain.harden(filled(plain)).respond(OTHERS))


def test_what_cannot_harden_is_refused(plain, functional_conv, examples):
    before = plain.respond(OTHERS)
    with pytest.raises(ValueError, match="is not fitted"):
        RAILS(functional_conv, "2").harden(Memory(None))
    with pytest.raises(TypeError, match="memory must be a Memory or None, got 7"):
        plain.harden(7)
    with pytest.raises(ValueError, match="belongs to no model yet: remember"):
        plain.harden(Memory(None))
    with pytest.raises(ValueError, match="keep must be 'cells' for cells to be there, memory in RAM has 'signatures'"):
        plain.harden(filled(plain, keep="signatures"))
    memory = Memory(None)
    memory.remember(plain.with_settings(memory=memory).respond(ANTIGENS), ANTIGENS)
    for empty in (memory, filled(plain, cells=0)):
        with pytest.raises(ValueError, match="must have confirmed entries with cells of the confirmed label, got none"):
            plain.harden(empty)
    with pytest.raises(ValueError, match="is another model's"):
        plain.harden(filled(fitted(functional_conv, examples, layers="5")))
    assert same(before, plain.respond(OTHERS))


def test_a_failure_changes_nothing(plain, monkeypatch):
    memory = filled(plain)
    before, told = plain.respond(OTHERS), identity(plain)
    monkeypatch.setattr(plain, "_measure", lambda held: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plain.harden(memory)
    assert identity(plain) == told
    assert same(before, plain.respond(OTHERS))


def test_other_settings_of_the_response_are_no_hindrance(plain):
    memory = filled(plain)
    other = plain.with_settings(maturation=dataclasses.replace(SMALL, generations=0, neighbours=5))
    assert torch.equal(other.harden(memory).repertoire.cells, plain.harden(memory).repertoire.cells)

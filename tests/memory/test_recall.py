"""RAILS with a memory: what is near a trusted entry is answered as that one was, and all else as without one."""

from __future__ import annotations

import copy

import pytest
import torch

from immunonet import RAILS, DkNN, Maturation, Memory, load
from immunonet._identity import identity

SMALL = Maturation(population=60, neighbours=3, generations=3)
ANTIGENS = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(5))


def noisy(x, amount=0.002):
    return (x + amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))).clamp(0, 1)


@pytest.fixture
def plain(functional_conv, examples):
    return RAILS(functional_conv, "2", maturation=SMALL, seed=0).fit(*examples(300, (1, 6, 6)))


@pytest.fixture(params=["ram", "folder"])
def rails(plain, request, tmp_path):
    folder = None if request.param == "ram" else tmp_path / "memory"
    return plain.with_settings(memory=Memory(folder, refresh=0, credible=0))


def same(one, other):
    names = ("labels", "votes", "credibility", "foreign", "recalled", "generations")
    parts = [(getattr(one, name), getattr(other, name)) for name in names]
    parts += [(getattr(one.plasma, name), getattr(other.plasma, name)) for name in ("x", "label", "affinity", "origin")]
    return all(torch.equal(a, b) for a, b in parts)


def test_an_empty_memory_changes_nothing(plain, rails):
    assert same(plain.respond(ANTIGENS), rails.respond(ANTIGENS))
    assert plain.respond(ANTIGENS).imprint is None
    assert not plain.respond(ANTIGENS).recalled.any()


def test_repeated_and_nearly_repeated_antigens_are_recalled(plain, rails):
    first = rails.respond(ANTIGENS)
    ids = rails.memory.remember(first, ANTIGENS, source="me")
    known = ~first.foreign
    for again in (ANTIGENS, noisy(ANTIGENS)):
        found = rails.respond(again, seed=7)
        assert torch.equal(found.recalled, known)
        assert torch.equal(found.labels[known], first.labels[known])
        assert torch.equal(found.votes[known], first.votes[known])
        assert torch.equal(found.credibility[known], first.credibility[known])
        assert found.generations[known].eq(0).all()
        assert found.plasma.label[known].eq(-1).all()
        assert found.memory.affinity[known].eq(-torch.inf).all()
    other = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(9))
    mixed = torch.cat([ANTIGENS[:3], other, ANTIGENS[3:6]])
    found = rails.respond(mixed, batch_size=4)
    assert not found.recalled[3:9].any()
    assert torch.equal(found.labels[3:9], plain.predict(mixed)[3:9])
    assert len(ids) == len(set(ids)) == len(rails.memory)


def test_all_methods_tell_what_is_recalled(rails):
    x = ANTIGENS[:4]
    full = rails.answered(x)
    rails.memory.confirm(rails.memory.remember(rails.respond(x), x), (full.labels + 1) % 3)
    found = rails.answered(x)
    assert torch.equal(found.labels, (full.labels + 1) % 3)
    assert torch.equal(found.shares, torch.eye(3)[found.labels])
    assert torch.equal(found.sense.distance, full.sense.distance)
    assert torch.equal(rails.predict(x), found.labels)
    assert torch.equal(rails(x).argmax(1), found.labels)
    assert torch.equal(rails.draws(x, [1, 2]), found.labels.expand(2, 4))
    assert not rails.respond(x, trace=True).recalled.any()
    assert rails.respond(x, trace=True).trace is not None
    assert "4 recalled" in repr(rails.respond(x))


def test_private_noise_is_that_of_the_antigen(plain):
    memory = Memory(None)
    own = plain.with_settings(shared_noise=False)
    rails = own.with_settings(memory=memory)
    memory.confirm(memory.remember(rails.respond(ANTIGENS[:3]), ANTIGENS[:3]), [0, 0, 0])
    found = rails.respond(ANTIGENS)
    assert found.recalled.tolist() == [True] * 3 + [False] * 9
    assert torch.equal(found.votes[3:], own.respond(ANTIGENS).votes[3:])


def test_no_chain_of_near_copies(rails):
    """What was recalled becomes no entry, so that nothing far from what was met is ever recalled."""
    x = ANTIGENS[:2]
    ids = rails.memory.remember(rails.respond(x), x)
    rails.memory.confirm(ids, [0, 1])
    again = rails.respond(noisy(x))
    assert again.recalled.all()
    assert rails.memory.remember(again, noisy(x)) == ids
    assert len(rails.memory) == 2


def test_only_trusted_entries_answer(plain):
    memory = Memory(None, credible=1)
    rails = plain.with_settings(memory=memory)
    first = rails.respond(ANTIGENS)
    ids = memory.remember(first, ANTIGENS)
    trusted = first.credibility.ge(1) & ~first.foreign
    assert not trusted.all()
    assert torch.equal(rails.respond(ANTIGENS).recalled, trusted)
    row = int((~trusted).nonzero()[0])
    memory.confirm(ids[row], [2])
    found = rails.respond(ANTIGENS)
    assert (bool(found.recalled[row]), int(found.labels[row])) == (True, 2)


def test_poison_is_undone_bit_for_bit(rails):
    rails.memory.remember(rails.respond(ANTIGENS), ANTIGENS, source="honest")
    rails.memory.tag("clean")
    before = rails.respond(ANTIGENS)
    found = rails.with_settings(memory=None).with_settings(memory=rails.memory).respond(noisy(ANTIGENS, 0.3))
    bad = rails.memory.remember(found, noisy(ANTIGENS, 0.3), source="hostile")
    rails.memory.confirm(bad, [(label + 1) % 3 for label in found.labels.tolist()])
    assert rails.memory.stats()["sources"]["hostile"]["contradicted"]
    rails.memory.rollback("clean")
    assert same(before, rails.respond(ANTIGENS))


def test_another_models_memory_is_refused(plain, rails, conv, examples):
    rails.memory.remember(rails.respond(ANTIGENS), ANTIGENS)
    other = copy.deepcopy(conv)
    with torch.no_grad():
        other[0].weight.add_(0.1)
    stranger = RAILS(other, "2", maturation=SMALL, seed=0, memory=rails.memory).fit(*examples(300, (1, 6, 6)))
    with pytest.raises(ValueError, match="is another model's"):
        stranger.predict(ANTIGENS)
    with pytest.raises(ValueError, match="is another model's"):
        RAILS(plain.model, "5", maturation=SMALL, memory=rails.memory).fit(*examples(300, (1, 6, 6))).predict(ANTIGENS)
    lone = plain.with_settings(memory=Memory(None)).respond(ANTIGENS)
    rails.memory.remember(lone, ANTIGENS)  # the same model's, whatever memory it met
    with pytest.raises(ValueError, match="response carries no signatures"):
        rails.memory.remember(plain.respond(ANTIGENS), ANTIGENS)


def test_twins_have_the_memory_and_files_do_not(rails, tmp_path):
    rails.memory.confirm(rails.memory.remember(rails.respond(ANTIGENS), ANTIGENS), [0] * 12)
    assert rails.light().memory is rails.memory
    assert rails.light().predict(ANTIGENS).eq(0).all()
    assert rails.with_settings(memory=None).memory is None
    rails.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", rails.model)
    assert loaded.memory is None
    again = loaded.with_settings(memory=rails.memory.folder or rails.memory)
    assert again.predict(ANTIGENS).eq(0).all()
    assert copy.deepcopy(again).predict(ANTIGENS).eq(0).all()


def test_what_is_remembered_is_part_of_what_answers_depend_on(plain, rails):
    before = identity(rails)
    assert before != identity(plain)
    rails.memory.remember(rails.respond(ANTIGENS), ANTIGENS)
    assert identity(rails) != before


def test_several_layers_a_hidden_space_and_cosine(functional_conv, examples):
    for how in ({"layers": ["2", "input"]}, {"layers": "2", "space": "2"}, {"layers": "6", "metric": "cosine"}):
        rails = RAILS(functional_conv, **how, maturation=SMALL, seed=0, memory=Memory(None)).fit(
            *examples(90, (1, 6, 6))
        )
        found = rails.respond(ANTIGENS)
        rails.memory.confirm(rails.memory.remember(found, ANTIGENS), [1] * 12)
        again = rails.answered(ANTIGENS)
        assert again.labels.eq(1).all()
        assert rails.memory.export  # cells of any space are kept as they are


def test_the_setting_is_checked(functional_conv):
    with pytest.raises(TypeError, match="memory must be a Memory, its folder, or None, got 7"):
        RAILS(functional_conv, "2", memory=7)
    assert RAILS.made(functional_conv, ["2"], {"memory": 0.1}).maturations[0].memory == 0.1
    assert not DkNN(functional_conv, "2").settings().get("memory")

"""Random sequences of operations against a plain model in a dict, reopened at random points."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memories import antigens, bound, response

from immunonet import Memory

CAPACITY = 12
LABELS, SOURCES = st.integers(0, 2), st.sampled_from(["a", "b'c", "d e"])


class Store(RuleBasedStateMachine):
    """What a memory should hold: per id its place, label, source and confirmation, in the order of arrival."""

    @initialize(ram=st.booleans())
    def begin(self, ram):
        self.home = Path(tempfile.mkdtemp())
        self.folder = None if ram else self.home / "store"
        self.reopen()
        self.held: dict[str, tuple] = {}
        self.kept = {self.memory.version: {}}
        self.named: dict[str, int] = {}
        self.count = 0

    def teardown(self):
        shutil.rmtree(getattr(self, "home", "none"), ignore_errors=True)

    def note(self):
        self.kept[self.memory.version] = dict(self.held)

    @rule(n=st.integers(1, 4), label=LABELS, source=SOURCES)
    def remember(self, n, label, source):
        places = [float(self.count + i) * 10 for i in range(n)]
        self.count += n
        signatures = torch.tensor([[place, 0, 0, 0] for place in places])
        ids = self.memory.remember(response(signatures, label), antigens(n), source=source)
        self.held |= {one: (place, label, source, None) for one, place in zip(ids, places, strict=True)}
        if len(self.held) > CAPACITY:
            free = [one for one, entry in self.held.items() if entry[3] is None]
            known = [one for one in self.held if one not in free]
            for one in [*free, *known][: len(self.held) - CAPACITY]:
                del self.held[one]
        self.note()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), label=LABELS)
    def confirm(self, data, label):
        ids = data.draw(st.lists(st.sampled_from(list(self.held)), min_size=1, max_size=3, unique=True))
        self.memory.confirm(ids, [label] * len(ids))
        for one in ids:
            self.held[one] = (*self.held[one][:3], label)
        self.note()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data):
        one = data.draw(st.sampled_from(list(self.held)))
        assert self.memory.forget([one]) == 1
        del self.held[one]
        self.note()

    @rule(source=SOURCES)
    def forget_source(self, source):
        gone = [one for one, entry in self.held.items() if entry[2] == source]
        assert self.memory.forget(source=source) == len(gone)
        for one in gone:
            del self.held[one]
        self.note()

    @rule(data=st.data())
    def rollback(self, data):
        number = data.draw(st.sampled_from(list(self.kept)))
        self.memory.rollback(number)
        self.held = dict(self.kept[number])
        self.note()

    @rule(name=st.sampled_from(["x", "y"]))
    def tag(self, name):
        self.memory.tag(name)
        self.named[name] = self.memory.version

    @rule(name=st.sampled_from(["x", "y"]))
    def back_to_a_name(self, name):
        if name in self.named:
            self.memory.rollback(name)
            self.held = dict(self.kept[self.named[name]])
            self.note()

    @rule()
    def compact(self):
        self.memory.compact()
        self.note()

    @rule()
    def reopen(self):
        if self.folder is not None or not hasattr(self, "memory"):
            self.memory = bound(Memory(self.folder, capacity=CAPACITY, refresh=0))

    @invariant()
    def holds_what_it_should(self):
        if not hasattr(self, "held"):
            return
        assert len(self.memory) == len(self.held)
        asked = torch.tensor([[10.0 * i, 0, 0, 0] for i in range(max(self.count, 1))])
        found = self.memory.recall(asked)
        expected = {place: label if sure is None else sure for place, label, _, sure in self.held.values()}
        there = torch.tensor([float(place) in expected for place in asked[:, 0].tolist()])
        assert torch.equal(found.hit, there)
        assert found.labels.tolist() == [expected[place] for place in asked[there][:, 0].tolist()]
        assert set(found.ids) == set(self.held)
        told = self.memory.stats()
        assert told["confirmed"] == sum(entry[3] is not None for entry in self.held.values())
        assert self.memory.tags() == self.named


TestStore = Store.TestCase
TestStore.settings = settings(
    max_examples=10, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)

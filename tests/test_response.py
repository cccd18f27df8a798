import dataclasses

import pytest
import torch
from torch import nn

from immunonet import RAILS, Maturation, Memory
from immunonet.response import ImmuneResponse

X, Y = torch.rand(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3


def test_a_response_is_short_in_print():
    rails = RAILS(
        nn.Linear(4, 3),
        ["input", torch.square],
        maturation=Maturation(generations=10, population=90, neighbours=3),
        seed=0,
    )
    r = rails.fit(X, Y).respond(X[:20], trace=True)
    r.foreign[:] = torch.arange(20) < 2
    labels = ", ".join(map(str, r.labels[:8].tolist()))
    # 5 and 20 percent of 90 cells at each of two layers; generations 0 to 10.
    assert repr(r) == (
        f"ImmuneResponse(20 antigens; labels {labels}, ...; 2 foreign; votes (20, 3); plasma (20, 8, 4); "
        "memory (20, 36, 4); trace 2 x (11, 20, 3))"
    )
    one = rails.respond(X[:1])
    assert repr(one).startswith(f"ImmuneResponse(1 antigen; labels {int(one.labels)}; ")
    assert (repr(r.plasma), repr(r.trace[0])) == ("Cells(x (20, 8, 4))", "Trace(votes (11, 20, 3))")


@pytest.fixture(scope="module")
def rails():
    maturation = Maturation(generations=10, population=90, neighbours=3)
    return RAILS(nn.Linear(4, 3), ["input", torch.square], maturation=maturation, seed=0).fit(X, Y)


def test_a_response_keeps_a_copy_of_its_antigens(rails):
    x = X[:5].clone()
    r = rails.respond(x, batch_size=2)
    x[:] = 0
    assert torch.equal(r.antigens, X[:5])


def test_print_shows_a_short_table(rails):
    r = rails.respond(X[:20])
    r.foreign[:] = torch.arange(20) == 1
    head, *lines, rest = str(r).split("\n")
    assert head.split() == ["antigen", "label", "votes", "next", "credibility", "generations"]
    assert [line.split()[:2] for line in lines] == [
        [str(i), str(label)] for i, label in enumerate(r.labels[:8].tolist())
    ]
    assert [line.endswith("foreign") for line in lines] == [i == 1 for i in range(8)]
    assert rest == "and 12 more; of all 20: 1 foreign, 0 innate, 0 recalled"
    assert r._repr_html_().count("<tr>") == 9
    assert len(str(rails.respond(X[:1])).split("\n")) == 2


def test_an_answer_is_explained(rails):
    r = rails.respond(X[:3])
    votes = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0], [0.4, 0.35, 0.25]])
    r = dataclasses.replace(r, votes=votes, labels=votes.argmax(1), foreign=torch.tensor([False, True, False]))
    r.plasma.origin[:2] = torch.tensor([[7, 7, 7, 7, 7, 2, 2, 1], [5] * 8])
    one, two = r.explain(0, names=["ant", "bee", "cat"]), r.explain(1)
    assert one.startswith("Antigen 0 is answered as bee by the immune response: the label has 75% of the votes after ")
    assert "; ant comes next, with 25%. " in one
    assert "The 8 plasma cells, the fittest of all, descend from 3 training examples, 5 of them from number 7. " in one
    assert "foreign" not in one
    assert "next" not in two
    assert "descend from training example number 5." in two
    assert two.endswith("do not rely on it.")
    assert r.explain(-1) == r.explain(2)


def test_without_generations_nothing_tells_of_any(rails):
    expanded = rails.with_settings(maturation=Maturation(population=90, neighbours=3))
    one, other = (each.respond(X[:1], trace=True) for each in (expanded, rails))
    assert "of the votes without generations" in one.explain(0)
    assert len(one.plot(0).axes) == len(other.plot(0).axes) - 1


def test_what_is_recalled_is_explained_by_its_entry(rails):
    remembering = rails.with_settings(memory=Memory(None))
    ids = remembering.memory.remember(remembering.respond(X[:2]), X[:2])
    remembering.memory.confirm(ids, Y[:2])
    r = remembering.respond(X[:2])
    assert f"from memory, by entry {ids[1]}: " in r.explain(1)
    assert "recalled" in str(r)


@pytest.mark.parametrize("ask", ["explain", "plot"])
def test_what_is_asked_of_a_response_is_checked(rails, ask):
    r = rails.respond(X[:3])
    with pytest.raises(ValueError, match=r"i must be at least -3 and at most 2, got 3"):
        getattr(r, ask)(3)
    with pytest.raises(TypeError, match="i must be an integer, got 'a'"):
        getattr(r, ask)("a")
    with pytest.raises(ValueError, match="names must hold one name per class, 3, got 2"):
        getattr(r, ask)(0, names=["ant", "bee"])


def test_a_defence_explains_antigens(rails):
    names = ["ant", "bee", "cat"]
    r = rails.respond(X[:3], 7)
    assert rails.explain(X[:3], 7, names=names) == [r.explain(i, names=names) for i in range(3)]


def test_who_asks_is_kept_and_remembered():
    rails = RAILS(
        nn.Linear(4, 3), "input", maturation=Maturation(generations=10, population=90), memory=Memory(None), seed=0
    ).fit(X, Y)
    one, two = rails.respond(X[:2], source="you"), rails.respond(X[2:4], source=["me", "them"])
    assert (one.source, rails.respond(X[:1]).source) == (("you", "you"), None)
    rails.memory.remember(ImmuneResponse.cat([one, two]), X[:4])
    rails.memory.remember(rails.respond(X[4:5], source="you"), X[4:5], source="other")
    rails.memory.remember(rails.respond(X[5:6]), X[5:6])
    held = rails.memory.stats()["sources"]
    assert {name: own["entries"] for name, own in held.items()} == {
        "you": 2,
        "me": 1,
        "them": 1,
        "other": 1,
        "unknown": 1,
    }
    with pytest.raises(ValueError, match="source must be one text, or 2, one for each, got 1"):
        rails.respond(X[:2], source=["me"])
    with pytest.raises(TypeError, match="source must be a string, got 3"):
        rails.respond(X[:2], source=3)

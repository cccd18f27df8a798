"""What is kept of an evaluation is never given for another one: neither the defence, its data, networks nor attacks."""

import dataclasses
import functools
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from immunonet import RAILS, DkNN, Maturation, attacks, evaluate
from immunonet._identity import identity
from immunonet.evaluation import sanity
from immunonet.evaluation.suite import PROTOCOLS, Planned

GAIN = 1.0


class Scaled(nn.Module):
    """A linear network whose answers turn round with its gain, an attribute or a number in its code."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = gain
        self.fc = nn.Linear(2, 2)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[-8.0, 0.0], [8.0, 0.0]]))
            self.fc.bias.copy_(torch.tensor([4.0, -4.0]))

    def forward(self, x):
        return (self.fc(x) * self.gain).log_softmax(1)


def closure(gain):
    net = Scaled()
    return lambda x: (net.fc(x) * gain).log_softmax(1)


def by_global(x):
    return (Scaled().fc(x) * GAIN).log_softmax(1)


class Turned(Scaled):
    def forward(self, x):
        return (self.fc(x) * -1.0).log_softmax(1)


def hidden_buffer(value):
    net = Scaled()
    net.register_buffer("turn", torch.tensor(value), persistent=False)
    net.register_forward_hook(lambda m, _, out: (out * m.turn).log_softmax(1))
    return net


PAIRS = {
    "attribute": (Scaled(1.0), Scaled(-1.0)),
    "weights": (Scaled(), (lambda n: n.fc.weight.data.neg_() is None or n)(Scaled())),
    "code": (Scaled(), Turned()),
    "closure": (closure(1.0), closure(-1.0)),
    "partial": tuple(functools.partial(lambda x, g: Scaled(g)(x), g=g) for g in (1.0, -1.0)),
    "constant": (lambda x: Scaled(1.0)(x), lambda x: Scaled(-1.0)(x)),
    "buffer not kept": (hidden_buffer(1.0), hidden_buffer(-1.0)),
    "array": tuple(functools.partial(lambda x, g: Scaled(float(g[0]))(x), g=np.array([g])) for g in (1.0, -1.0)),
}


@pytest.mark.parametrize("change", PAIRS)
def test_things_that_answer_otherwise_differ_and_the_same_thing_again_does_not(change):
    one, other = PAIRS[change]
    assert identity(one) == identity(one)
    assert identity(one) != identity(other)
    if isinstance(one, nn.Module):
        one.train()
        before = identity(one)
        one.eval()
        assert identity(one) == before


def test_globals_of_a_function_count(monkeypatch):
    before = identity(by_global)
    monkeypatch.setitem(globals(), "GAIN", -1.0)
    assert identity(by_global) != before


def test_what_holds_itself_ends():
    loop = []
    loop.append(loop)
    assert identity(loop) == identity(loop)


# Two bands: the label is whether the first value is above one half.
X = torch.rand(24, 2, generator=torch.Generator().manual_seed(0)) * 0.98 + 0.01
Y = (X[:, 0] > 0.5).long()
TRAIN = torch.rand(80, 2, generator=torch.Generator().manual_seed(1))
LABELS = (TRAIN[:, 0] > 0.5).long()


def dknn(*, labels=LABELS, train=TRAIN, neighbours=5, metric="euclidean", base=None):
    return DkNN(base or Scaled(), "input", neighbours=neighbours, metric=metric).fit(train, labels)


def first(**changes):
    """The arguments of an evaluation, some of them changed."""
    return {"defence": Scaled(), "x": X, "y": Y, "base": Scaled(), "eps": 0.05} | changes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(attacks.PGD):
    """An attack of a caller's own."""

    def best(self, problem):
        return super().best(problem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stands(attacks.PGD):
    def best(self, problem):
        return attacks.Found.nothing(problem.x, self.iterations)


Stands.__qualname__ = Stands.__name__ = "Own"


CHANGES = {
    "a custom defence's gain": lambda: first(defence=Scaled(-1.0)),
    "its weights": lambda: first(defence=PAIRS["weights"][1]),
    "its code": lambda: first(defence=Turned()),
    "the labels of the repertoire": lambda: first(defence=dknn(labels=1 - LABELS)),
    "the examples of the repertoire": lambda: first(defence=dknn(train=1 - TRAIN)),
    "the settings of a defence": lambda: first(defence=dknn(neighbours=61)),
    "the network": lambda: first(base=Scaled(-1.0)),
    "the images": lambda: first(x=1 - X),
    "the labels": lambda: first(y=1 - Y),
    "the size of the attack": lambda: first(eps=0.4),
    "the norm": lambda: first(eps=0.2, norm="l2"),
    "the seed": lambda: first(seed=1),
    "networks to transfer from": lambda: first(transfer=[Scaled(2.0)]),
    "an attack of one's own": lambda: first(eps=0.4, attacks=[Own(eps=0.4)]),
}


SPENT = {"steps": 2, "iterations": 1, "black_box": 2, "queries": 3, "decisions": 1, "evaluations": 1, "noise": 2}
LITTLE = dataclasses.replace(PROTOCOLS["quick"], checks=2, **SPENT)


SURROGATES = DkNN.surrogates


def strongest(self):
    """Return one of the surrogates of a DkNN: each is another attack, and one is enough here."""
    found = SURROGATES(self)
    name = next(iter(found))
    return {name: found[name]}


def spend_little(patch):
    patch.setitem(PROTOCOLS, "quick", LITTLE)
    patch.setattr(DkNN, "surrogates", strongest)


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """A protocol that spends next to nothing."""
    spend_little(monkeypatch)


def figures(evaluation):
    return [(row.defence, row.attack, row.eps, row.norm, row.correct) for row in evaluation.rows]


def run(arguments, folder):
    arguments = dict(arguments)
    return figures(
        evaluate(arguments.pop("defence"), arguments.pop("x"), arguments.pop("y"), **arguments, folder=folder)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and figures of a finished evaluation, of a custom defence and of a DkNN."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        spend_little(patch)
        for name, defence in (("dknn", dknn()), ("custom", Scaled())):
            folder = tmp_path_factory.mktemp(name)
            found[name] = (folder, run(first(defence=defence), folder))
            patch.setattr(sanity, "checks", lambda campaign: ([], {}))  # only of the first are they looked at
    return found


@pytest.fixture
def unchecked(monkeypatch):
    """No sanity checks, which make further attacks for no row."""
    monkeypatch.setattr(sanity, "checks", lambda campaign: ([], {}))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("change", CHANGES)
def test_an_evaluation_never_gives_the_numbers_of_another(change, finished, tmp_path):
    folder, old = finished["dknn" if "repertoire" in change or "settings" in change else "custom"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    changed = CHANGES[change]()
    there = run(changed, tmp_path)
    assert there == run(changed, None)
    assert there != old or change == "the seed"  # of which deterministic attacks make no use


@pytest.mark.usefixtures("unchecked")
def test_the_code_of_an_attack_of_ones_own_counts(tmp_path):
    one, other = (first(eps=0.4, attacks=[kind(eps=0.4)]) for kind in (Own, Stands))
    before = run(one, tmp_path)
    assert run(other, tmp_path) == run(other, None) != before


def test_the_same_evaluation_is_continued(finished, monkeypatch):
    folder, old = finished["dknn"]
    monkeypatch.setattr(Planned, "__call__", lambda *_: pytest.fail("attacked again"))
    assert run(first(defence=dknn()), folder) == old


def test_what_cannot_be_seen_is_found_by_its_answers(tmp_path):
    """A defence that reads a file when it is asked: nothing of it changes but what it says."""
    file = tmp_path / "gain.txt"

    def reads(x):
        return Scaled(float(file.read_text()))(x)

    file.write_text("1.0")
    run(first(defence=reads), tmp_path / "kept")
    file.write_text("-1.0")
    with pytest.raises(ValueError, match=r"answered .* inputs otherwise.*give another folder"):
        run(first(defence=reads), tmp_path / "kept")


def test_randomness_that_no_seed_holds_is_refused_with_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    noisy = lambda x: Scaled()(x + float(rng.normal()))  # noqa: E731
    with pytest.raises(ValueError, match="folder must be left out: the defence answers at random"):
        run(first(defence=noisy), tmp_path)


def test_settings_count_however_deeply_they_are_nested():
    one, other = (RAILS(Scaled(), "input", maturation=Maturation(population=n)) for n in (20, 40))
    assert identity(one) != identity(other)
    assert identity({"a": [[{"b": [[[[1]]]]}]]}) != identity({"a": [[{"b": [[[[2]]]]}]]})

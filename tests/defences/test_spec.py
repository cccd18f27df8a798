"""The grammar of a defence: what is read, what is written, what is refused, and what is made of it."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from immunonet import RAILS, DkNN
from immunonet.defences import REGISTRY, base
from immunonet.defences.spec import Spec, parse_all, read

ANTIGENS = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(5))


def plain(name: str, net: nn.Module) -> str:
    return name


def made(text: str, net: nn.Module, examples: int = 1000) -> Any:
    return Spec.parse(text).made(net, plain, examples)


# Values.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("none", None),
        ("None", None),
        ("true", True),
        ("FALSE", False),
        ("12", 12),
        ("-3", -3),
        (".25", 0.25),
        ("1e-3", 0.001),
        ("8/255", 8 / 255),
        ("auto", "auto"),
        ("conv1:2", "conv1:2"),
        ("1/0", "1/0"),
        (".05,.15", (0.05, 0.15)),
        ("1,auto,none", (1, "auto", None)),
        ("5,", (5,)),
        (",", ()),
    ],
)
def test_values(text: str, value: Any) -> None:
    found = read(text)
    assert found == value
    assert type(found) is type(value)


# The way there and back.

WORDS = st.sampled_from(["auto", "affinity", "input", "fc1", "block2.norm1:4", "m:f", "1/0", "a-b", "n0ne", "x.y_z"])
ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS
LAYERS = st.lists(WORDS, max_size=3).map(tuple)


@st.composite
def specs(draw: Any) -> Spec:
    kind = draw(st.sampled_from([*REGISTRY, "package.module:factory"]))
    known = REGISTRY.get(kind)
    words = () if known is None else draw(st.sampled_from([(), *((word,) for word in known.words)]))
    words += ("tuned",) if known is DkNN and draw(st.booleans()) else ()
    chosen = draw(
        st.dictionaries(
            st.sampled_from(["gain", "levels", "x_1"] if known is None else known.options()),
            ATOMS | st.lists(ATOMS, max_size=3).map(tuple),
            max_size=4,
        )
    )
    return Spec(
        kind=kind, layers=draw(LAYERS) if known is not None and known.takes_layers() else (), words=words,
        settings=chosen,
    )  # fmt: skip


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_what_is_written_is_read_again(spec: Spec) -> None:
    again = Spec.parse(spec.text)
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.text == spec.text
    assert [type(value) for value in again.settings.values()] == [type(value) for value in spec.settings.values()]


def test_what_is_said_of_it() -> None:
    spec = Spec.parse("  rails   paper fc1+fc2 voice=.25  generations=0 ")
    assert spec.told() == {
        "kind": "rails",
        "layers": ["fc1", "fc2"],
        "words": ["paper"],
        "settings": {"voice": 0.25, "generations": 0},
    }
    assert spec.text == "rails fc1+fc2 paper voice=0.25 generations=0"
    assert (spec.name, spec.label) == ("rails-paper", "rails-paper fc1+fc2")
    assert spec.all_settings() == {"preset": "paper", "voice": 0.25, "generations": 0}
    assert spec.changed(voice=0).settings == {"voice": 0, "generations": 0}
    assert Spec.parse("dknn conv1 tuned").tuned
    assert Spec.parse("dknn conv1 tuned").name == "dknn-tuned"
    # Layers of a kind that takes some are the input's pixels where none are named.
    assert Spec.parse("rails voice=.1").layers == Spec.parse("dknn tuned").layers == ("input",)
    assert Spec.parse("cnn").layers == ()
    assert Spec.parse("my.module:factory gain=2").name == "factory"


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["rails", "rails input", "rails input generations=0"], ["rails", "rails generations=0"]),
        (["rails fc1 voice=.25", "rails fc1 voice=0.25"], ["rails"]),
        (["rails fc1 voice=.25 generations=0", "rails fc1 generations=0 voice=.25"], ["rails"]),
        (["rails fc1 generations=0", "rails fc2 generations=5"], ["rails", "rails"]),
        (
            ["rails fc1 voice=.25 generations=0", "rails fc1 generations=5 voice=.25"],
            ["rails generations=0", "rails generations=5"],
        ),
        (["dknn tuned", "dknn", "dknn neighbours=3"], ["dknn-tuned", "dknn", "dknn neighbours=3"]),
        (["a.b:make gain=1", "c:make gain=1"], ["a.b:make", "c:make"]),
    ],
)
def test_those_of_one_name_and_layers_are_called_apart(texts: list[str], names: list[str]) -> None:
    assert [spec.name for spec in parse_all(texts)] == names


# What is refused.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a defence must be KIND \[LAYERS\]"),
        ("   ", "a defence must be KIND"),
        ("rals fc1", "defence 'rals fc1': there is no defence 'rals'; nearest: rails"),
        ("svm", "there is no defence 'svm'; there are cnn, control, dknn, path, rails"),
        ("rails fc1 populaton=3", "rails has no setting 'populaton'; nearest: population"),
        ("dknn neighbors=3", "dknn has no setting 'neighbors'; nearest: neighbours"),
        ("cnn voice=1", "cnn has no setting 'voice'; there are bounds"),
        ("rails fc1 papr", "'papr' is neither KEY=VALUE nor a word of rails; nearest: paper"),
        ("dknn fc1 fc2", r"'fc2' is neither KEY=VALUE nor a word of dknn; .* several layers are joined by \+"),
        ("dknn tuned tuned", "tuned and tuned do not go together"),
        ("rails paper authors", "paper and authors do not go together: both set preset"),
        ("rails fc1 tuned", "'tuned' is no word of rails; there are authors, authors-cifar10, paper"),
        ("cnn input", "cnn looks at no layers, got 'input'"),
        ("m:make fc1", "m:make takes settings alone, as KEY=VALUE, got 'fc1'"),
        ("rails voice=.1 voice=.2", "voice is given twice"),
    ],
)
def test_mistakes_are_answered_with_the_nearest(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spec.parse(text)


def test_a_word_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'paper' is no word of dknn; there are tuned"):
        Spec(kind="dknn", words=("paper",))


WRONG = ["maybe", "-7", "3.7", "none", "x,y", "true", "1e999"]


def refusal(text: str, net: nn.Module) -> str:
    """What is said against a description, "" for nothing."""
    try:
        made(text, net)
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", list(REGISTRY))
def test_a_value_of_the_wrong_type_names_its_setting(kind: str, functional_conv: nn.Module) -> None:
    """Every value is taken or refused by name; of these few a setting takes two at most."""
    for option in REGISTRY[kind].options():
        texts = [f"{kind}{' 2' * REGISTRY[kind].takes_layers()} {option}={value}" for value in WRONG]
        refused = {text: told for text in texts if (told := refusal(text, functional_conv))}
        assert len(refused) >= len(WRONG) - 2, option
        for text, told in refused.items():
            start = f"defence {Spec.parse(text).text!r}: "
            assert told.startswith(start)
            assert option in told.removeprefix(start)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rails conv9", "defence 'rails conv9': layers='conv9' is no submodule of the model; nearest names"),
        ("dknn 2 metric=taxi", "metric must be one of 'euclidean', 'cosine', got 'taxi'"),
        ("rails 2+input hidden=true", "hidden needs one layer"),
        ("rails 2 hidden=true space=0", "hidden needs one layer"),
        ("rails 2 maturation=3", "maturation must be a Maturation or a list with one per layer"),
        ("rails 2 maturation=3 population=5", r"maturation must not be given beside its own settings \(population\)"),
    ],
)
def test_layers_and_settings_that_cannot_be(text: str, message: str, functional_conv: nn.Module) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        made(text, functional_conv)


# What is made.


def test_the_defence_described(functional_conv: nn.Module) -> None:
    rails = made("rails 2+input paper population=60 neighbours=3 crossover=none mutation_range=.1,1/2", functional_conv)
    assert type(rails) is RAILS
    assert rails.layers == ("2", "input")
    first = rails.maturations[0]
    assert rails.maturations == (first, first)
    assert (first.population, first.neighbours, first.crossover, first.mutation_range) == (60, 3, None, (0.1, 0.5))
    assert (first.early_stop, first.mutation_rate) == (None, (0.05, 0.15))
    assert made("rails 2 hidden=true", functional_conv).space == "2"
    assert made("rails input hidden=true", functional_conv).space is None
    # Its own default, the kind's for so many examples, comes before the constructor's.
    assert (made("dknn", functional_conv).neighbours, made("dknn", functional_conv, 20).neighbours) == (75, 20)
    assert made("dknn neighbours=30", functional_conv, 20).neighbours == 30
    assert made("rails 2 authors", functional_conv).maturations[0].crossover == "authors"
    assert len(made("rails 0+2 authors-cifar10", functional_conv).maturations) == 2


OWN = """
import torch
from torch import nn
from immunonet import Answer, Defence, models

class Rounded(Defence):
    kind, title = "rounded", "Rounded"

    def __init__(self, net, *, levels=8):
        super().__init__(net)
        self.levels = levels

    def answer(self, x, seed=None):
        return Answer.of(models.logits(self.model, (x * self.levels).round() / self.levels))

def loud(net, gain=1.0):
    return lambda x: (gain * net(x)).log_softmax(1)

def noisy(net):
    def answer(x, seed=0):
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
        return net(x + noise).log_softmax(1)
    return answer

def module(net):
    return nn.Sequential(net, nn.LogSoftmax(1))

def wide(net):
    net = module(net)
    net.bounds = (0.0, 255.0)
    return net

def logits(net):
    return net

def clumsy(net):
    return lambda x: x[:, 7]

def number(net):
    return 3

def broken(net):
    return net.weight_of_nothing
"""

# Where the factories that fail do so.
LINES = {
    name: 1 + OWN.splitlines().index(text)
    for name, text in {
        "broken": "    return net.weight_of_nothing",
        "loud": "def loud(net, gain=1.0):",
        "clumsy": "    return lambda x: x[:, 7]",
    }.items()
}


@pytest.fixture
def own(tmp_path: Any, monkeypatch: Any) -> Any:
    """Write the module `own_defences` into the working directory; its factories are as above."""
    (tmp_path / "own_defences.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    sys.modules.pop("own_defences", None)
    yield tmp_path / "own_defences.py"
    sys.modules.pop("own_defences", None)


def test_factories(own: Any, functional_conv: nn.Module) -> None:
    with torch.no_grad():
        logits = functional_conv(ANTIGENS)
        rounded = functional_conv((ANTIGENS * 2).round() / 2)
    # A class of defences is a factory.
    assert torch.equal(made("own_defences:Rounded levels=2", functional_conv)(ANTIGENS), F.log_softmax(rounded, 1))
    for text, scale in (("loud gain=-2", -2), ("loud", 1), ("module", 1), ("wide", 1)):
        defence = made(f"own_defences:{text}", functional_conv)
        assert isinstance(defence, base.Defence)
        assert not defence.randomised
        assert torch.allclose(defence(ANTIGENS), F.log_softmax(scale * logits, 1))
        assert torch.equal(defence.predict(ANTIGENS), (scale * logits).argmax(1))
        assert defence.bounds.high == (255.0 if text == "wide" else 1.0,)
    # Differentiable, as attacks need it.
    x = ANTIGENS.clone().requires_grad_()
    defence(x)[:, 0].sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())


def test_the_seed_of_a_function_is_its_randomness(own: Any, functional_conv: nn.Module) -> None:
    noisy = made("own_defences:noisy", functional_conv)
    assert noisy.randomised
    assert torch.equal(noisy(ANTIGENS, seed=3), noisy(ANTIGENS, seed=3))
    assert not torch.equal(noisy(ANTIGENS, seed=3), noisy(ANTIGENS, seed=4))
    assert torch.equal(noisy(ANTIGENS), noisy(ANTIGENS, seed=0))  # its own default


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere:make", r"factory nowhere:make cannot be imported \(ModuleNotFoundError"),
        ("own_defences:make", r"factory own_defences:make cannot be imported \(AttributeError"),
        ("own_defences:number", "a Defence, a module or a function must be returned, got int"),
        ("own_defences:broken", r"failed: AttributeError: .*weight_of_nothing"),
        ("own_defences:loud gian=2", r"failed: TypeError: .*'gian'"),
    ],
)
def test_a_factory_that_fails_is_the_users(own: Any, text: str, message: str, functional_conv: nn.Module) -> None:
    with pytest.raises((ValueError, TypeError), match=f"defence {text!r}: .*{message}") as told:
        made(text, functional_conv)
    if "failed" in message:
        assert str(told.value).endswith(f"({own}, line {LINES[text.partition(':')[2].partition(' ')[0]]})")


def test_a_function_that_fails_is_the_users(own: Any, functional_conv: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"function fails: IndexError: .*py, line {LINES['clumsy']}\)"):
        made("own_defences:clumsy", functional_conv).predict(ANTIGENS)
    with pytest.raises(ValueError, match=r"finite log-probabilities that sum to 1, .*end with log_softmax"):
        made("own_defences:logits", functional_conv).predict(ANTIGENS)


def test_fractions_are_exact() -> None:
    assert math.isclose(read("60/255"), 60 / 255, rel_tol=0)


def test_one_defence_stands_behind_another():
    spec = Spec.parse("control input rank=5 | rails fc1 generations=1")
    assert (spec.kind, spec.layers, spec.behind.kind, spec.behind.settings) == (
        "rails",
        ("fc1",),
        "control",
        {"rank": 5},
    )
    assert Spec.parse(spec.text) == spec
    assert spec.name == "control+rails"
    assert [one.kind for one in spec.chain] == ["control", "rails"]
    assert spec.told()["behind"]["kind"] == "control"
    spec.tried()
    with pytest.raises(ValueError, match="rank must be"):
        Spec.parse("control input rank=0 | rails input").tried()
    with pytest.raises(ValueError, match="no defence 'walls'"):
        Spec.parse("walls | rails input")

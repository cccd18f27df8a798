"""The contract of a defence: answers that are refused, the registry, files, twins, and a kind of a user's own."""

import json
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from immunonet import RAILS, DkNN, Maturation, ModePath, _store, load, models, register
from immunonet.defences import base
from immunonet.defences.answers import Answer
from immunonet.defences.base import DEFENCE_FILE, REGISTRY, Defence
from immunonet.defences.undefended import Undefended

SMALL = Maturation(population=60, neighbours=3, generations=2)
ANTIGENS = torch.rand(30, 1, 6, 6, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers, it alone knows."""
    monkeypatch.setattr(base, "REGISTRY", known := dict(REGISTRY))
    return known


# Answers.


class Says(Defence):
    """Answers as it is told, whatever it is asked."""

    kind, title = "says", "Says"

    def __init__(self, said):
        super().__init__(nn.Identity())
        self.said = said

    def answer(self, x, seed=None):
        return self.said


LOGS = torch.tensor([[0.6, 0.4], [0.1, 0.9]]).log()
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("labels", "logs", "message"),
    [
        (1 - LABELS, LOGS, r"labels that are the argmax of its log-probabilities, got 1 where that is 0 \(input 0\)"),
        (torch.tensor([0, 0]), LOGS, r"got 0 where that is 1 \(input 1\)"),
        (LABELS, LOGS + 0.1, r"finite log-probabilities that sum to 1, got sums \[1.105.*: end with log_softmax"),
        (LABELS, LOGS.exp(), "finite log-probabilities that sum to 1"),
        (LABELS, 5 * torch.eye(2), "finite log-probabilities that sum to 1"),
        (LABELS, LOGS.masked_fill(LOGS > -0.2, torch.nan), "finite log-probabilities"),
        (LABELS, torch.eye(2).log(), "finite log-probabilities"),
        (LABELS, LOGS[0], r"labels \(B,\) and log-probabilities \(B, C\), got \(2,\) and \(2,\)"),
        (LABELS, LOGS[:1], r"got \(2,\) and \(1, 2\)"),
        (LABELS[:, None], LOGS, r"got \(2, 1\) and \(2, 2\)"),
        (LABELS, (100 * LOGS).long(), "of torch.int64"),
    ],
)
def test_answers_that_break_the_contract_are_refused(labels, logs, message):
    defence = Says(Answer(labels, logs))
    for ask in (defence, defence.predict, defence.predict_proba, defence.sense, lambda x: defence.draws(x, [0])):
        with pytest.raises(ValueError, match=f"Says.answer must give .*{message}"):
            ask(torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_answers_that_keep_it_are_handed_on(dtype):
    defence = Says(Answer(LABELS, LOGS.to(dtype)))
    assert torch.equal(defence.predict(ANTIGENS), LABELS)
    assert torch.equal(defence(ANTIGENS), LOGS.to(dtype))
    assert_close(defence.predict_proba(ANTIGENS), LOGS.to(dtype).exp())
    assert torch.equal(defence.draws(ANTIGENS, [3, 4]), LABELS.expand(2, 2))
    shares = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    assert torch.equal(Says(Answer(LABELS, LOGS, shares=shares)).predict_proba(ANTIGENS), shares)


def test_what_senses_nothing_says_so():
    defence = Says(Answer(LABELS, LOGS))
    assert defence.sense(ANTIGENS) is None
    for ask in (defence.foreign, defence.familiarity):
        with pytest.raises(ValueError, match="Says senses nothing"):
            ask(ANTIGENS)


def small(kind, model):
    """A defence of a kind, as small as its settings let it be."""
    if "path" in kind.options():
        return ModePath(model, model).ensemble([0.3, 0.5])
    settings = {name: value for name, value in {"population": 60, "neighbours": 3}.items() if name in kind.options()}
    return kind.made(model, ["2"] if kind.takes_layers() else [], settings)


@pytest.mark.parametrize("kind", list(REGISTRY))
@pytest.mark.parametrize("levels", [None, 1])
def test_predict_is_the_argmax_of_what_the_module_returns(kind, levels, functional_conv, images):
    """`levels`: inputs of ones and zeros alone, among which many distances, and so votes, are even."""
    x, antigens = (part if levels is None else part.round() for part in (images[0], ANTIGENS))
    defence = small(REGISTRY[kind], functional_conv).fit(x, images[1])
    seed = 3 if defence.randomised else None
    labels, logs = defence.predict(antigens, seed), defence(antigens, seed)
    assert torch.equal(labels, logs.argmax(1))
    assert_close(logs.exp().sum(1), torch.ones(len(antigens)))
    assert_close(defence.predict_proba(antigens, seed).sum(1), torch.ones(len(antigens)))
    assert torch.equal(defence.draws(antigens, [3, 4])[0], defence.predict(antigens, 3))
    assert torch.equal(defence.answer(antigens, seed).labels, labels)


# The registry.


@pytest.mark.parametrize("kind", list(REGISTRY))
def test_a_defence_is_told_in_a_line_that_names_its_network(kind, functional_conv):
    told = repr(small(REGISTRY[kind], functional_conv))
    assert "\n" not in told
    assert "Sequential" in told


def test_a_kind_is_registered_once_and_must_have_a_name_and_a_title(registry):
    assert register(Says) is Says
    assert registry["says"] is register(Says)

    class Other(Says):
        pass

    with pytest.raises(ValueError, match="kind='says' of Other is taken by Says: choose another"):
        register(Other)

    class Nameless(Defence):
        title = "Nameless"

    class Untitled(Defence):
        kind = "untitled"

    for found in (Nameless, Untitled):
        with pytest.raises(TypeError, match=f"{found.__name__} must have a kind and a title, two strings"):
            register(found)
    assert set(registry) == set(REGISTRY) | {"says"}


def test_unknown_kinds_and_settings_are_answered_with_the_nearest(functional_conv):
    assert base.kind_of("dknn") is DkNN
    with pytest.raises(ValueError, match="there is no defence 'rial'; nearest: rails"):
        base.kind_of("rial")
    with pytest.raises(
        ValueError, match="there is no defence '?'; there are cnn, control, dknn, path, rails".replace("?", "[?]")
    ):
        base.kind_of("?")
    with pytest.raises(ValueError, match="dknn has no setting 'neighbors'; nearest: neighbours"):
        DkNN.made(functional_conv, ["2"], {"neighbors": 3})


# Files.


def write(folder, record):
    record.pop("checksum", None)
    _store.write_json(folder / DEFENCE_FILE, record | {"checksum": _store.fingerprint(record)})


def read(folder):
    return json.loads((folder / DEFENCE_FILE).read_text())


def test_an_unknown_kind_lists_the_nearest(functional_conv, images, tmp_path):
    DkNN(functional_conv, "2", neighbours=3).fit(*images).save(tmp_path)
    known = "kind '[?]'; there are cnn, control, dknn"
    for kind, message in (("dkn", "kind 'dkn'; nearest: dknn; register it"), ("?", known)):
        write(tmp_path, read(tmp_path) | {"kind": kind})
        with pytest.raises(ValueError, match=f"holds a defence of {message}"):
            load(tmp_path, functional_conv)


def old_format(folder, features):
    """Make of a folder what version 1 wrote: the class's name, another file, features as they are before the metric."""
    record = read(folder)
    record |= {"format": 1, "defence": REGISTRY[record.pop("kind")].__name__}
    (kept,) = folder.glob("*.safetensors")
    tensors = _store.read_tensors(kept)
    kept.unlink()
    tensors |= {f"probe.{i}": values for i, values in enumerate(features(tensors["x"][:8]))}
    if record["defence"] == "RAILS":
        del record["settings"]["metric"]  # which it did not have
    checksum = _store.write_tensors(folder / "repertoire-1.safetensors", tensors)
    write(folder, record | {"tensors": {"file": "repertoire-1.safetensors", "sha256": checksum}})


@pytest.mark.parametrize("kind", ["rails", "cosine", "euclidean"])
def test_folders_of_the_first_format_are_read(kind, functional_conv, images, tmp_path):
    if kind == "rails":
        made = RAILS(functional_conv, ["2", "input"], maturation=SMALL, seed=0, voice=0.2)
    else:
        made = DkNN(functional_conv, ["2", "input"], neighbours=5, metric=kind)
    made.fit(*images).save(tmp_path)
    with torch.no_grad():
        old_format(tmp_path, lambda x: [functional_conv[:3](x).flatten(1), x.flatten(1).clone()])
    assert "kind" not in read(tmp_path)
    for again in (load(tmp_path, functional_conv), type(made).load(tmp_path, functional_conv)):
        assert again.settings() == made.settings()
        assert torch.equal(again(ANTIGENS), made(ANTIGENS))
        assert torch.equal(again.foreign(ANTIGENS), made.foreign(ANTIGENS))
    # What it becomes when it is saved again.
    again.save(tmp_path)
    assert (read(tmp_path)["format"], read(tmp_path)["kind"]) == (2, type(made).kind)
    assert len(list(tmp_path.iterdir())) == 2
    functional_conv[2].weight.data += 0.1 * torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="model gives other features at layer '2'"):
        load(tmp_path, functional_conv)


# Twins.


@pytest.mark.parametrize(
    ("kind", "settings", "changes"),
    [
        (RAILS, {"maturation": SMALL, "seed": 0, "space": "0"}, {"generations": 0}),
        (RAILS, {"maturation": SMALL, "seed": 0, "metric": "cosine"}, {"seed": 1, "voice": 0.5}),
        (DkNN, {"neighbours": 5, "metric": "euclidean"}, {"neighbours": 3}),
        (Undefended, {}, {"bounds": [[-1.0, 1.0]]}),
    ],
)
def test_twins_share_what_is_fitted(kind, settings, changes, functional_conv, images):
    layers = ["2"] if kind.takes_layers() else []
    defence = kind(functional_conv, *([layers] if layers else []), **settings).fit(*images)
    before, maturation = defence.settings(), changes.pop("generations", None)
    if maturation is not None:
        changes = {"maturation": Maturation(**vars(SMALL) | {"generations": maturation})}
    twin = defence.with_settings(**changes)
    assert type(twin) is kind
    assert twin.settings() != before == defence.settings()
    assert twin.model is defence.model
    assert twin.predict(ANTIGENS).shape == (30,)
    for name in ("repertoire", "calibration", "feature_maps", "indices") if layers else ():
        assert getattr(twin, name) is getattr(defence, name)
    # The twin is the one that would have been fitted so, but for its calibration.
    fresh = kind.made(functional_conv, layers, twin.settings()).fit(*images)
    assert torch.equal(twin(ANTIGENS), fresh(ANTIGENS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "cosine"}, "metric must stay 'euclidean', which this was fitted with, got 'cosine': fit another"),
        ({"space": "0"}, "space must stay None, which this was fitted with, got '0'"),
        ({"maturation": Maturation(neighbours=31)}, "neighbours=31 is more than the 29 examples of class 0"),
        ({"metrics": "cosine"}, "rails has no setting 'metrics'; nearest: metric"),
        ({"voice": 2}, "voice must be"),
    ],
)
def test_twins_of_what_was_fitted_otherwise_are_refused(changes, message, functional_conv, images):
    rails = RAILS(functional_conv, "2", maturation=SMALL, seed=0)
    if "metric" in changes or "space" in changes:
        assert rails.with_settings(**changes).fit(*images).predict(ANTIGENS).shape == (30,)
    with pytest.raises(ValueError, match=message):
        rails.fit(*images).with_settings(**changes)


def test_a_twin_has_no_more_neighbours_than_examples(functional_conv, images):
    dknn = DkNN(functional_conv, "2", neighbours=5).fit(*images)
    with pytest.raises(ValueError, match=r"neighbours=100 is more than the 8\d examples of the repertoire"):
        dknn.with_settings(neighbours=100)


# A kind of one's own, not by neighbours.


class Quantiser(Defence):
    """Rounds inputs to the nearest of a few values, learnt as quantiles of the training examples, before the model."""

    kind, title = "quantiser", "Quantiser"

    def __init__(self, model, *, values=4, bounds=(0.0, 1.0)):
        super().__init__(model, bounds=bounds)
        self.values = values
        self.register_buffer("grid", torch.zeros(0))

    def fit(self, x=None, y=None, calibration=0.05):
        self.grid = torch.quantile(x.flatten(), torch.linspace(0, 1, self.values))
        self.classes = int(models.logits(self.model, x[:1]).shape[1])
        return self

    def check_current(self):
        if not len(self.grid):
            raise ValueError("this Quantiser is not fitted: call quantiser.fit(x, y)")

    def answer(self, x, seed=None):
        self.check_current()
        nearest = (x[..., None] - self.grid).abs().argmin(-1)
        return Answer.of(models.logits(self.model, self.grid[nearest]))

    def settings(self):
        return super().settings() | {"values": self.values}

    def tensors(self):
        return {"grid": self.grid}

    def restore(self, tensors):
        self.grid = tensors["grid"]

    def adopt(self, other):
        super().adopt(other)
        self.grid = other.grid


def test_a_kind_of_ones_own_is_fitted_saved_loaded_and_asked(functional_conv, images, tmp_path):
    register(Quantiser)
    quantiser = base.kind_of("quantiser").made(functional_conv, [], {"values": 3})
    assert not quantiser.layers
    assert (quantiser.surrogates(), quantiser.ablations(), quantiser.light()) == ({}, {}, quantiser)
    for ask in (lambda: quantiser.predict(ANTIGENS), lambda: quantiser.save(tmp_path / "none")):
        with pytest.raises(ValueError, match="this Quantiser is not fitted"):
            ask()
    assert not (tmp_path / "none").exists()
    assert quantiser.fit(*images) is quantiser
    quantiser.save(tmp_path)
    again = load(tmp_path, functional_conv)
    assert type(again) is Quantiser
    assert (again.values, again.classes, again.settings()) == (3, 3, quantiser.settings())
    values = torch.quantile(images[0].flatten(), torch.tensor([0.0, 0.5, 1.0]))
    rounded = values[(ANTIGENS[..., None] - values).abs().argmin(-1)]
    with torch.no_grad():
        expected = F.log_softmax(functional_conv(rounded), 1)
    assert torch.equal(again.predict(ANTIGENS), expected.argmax(1))
    assert_close(again(ANTIGENS), expected)
    assert_close(again.predict_proba(ANTIGENS), expected.exp())
    assert torch.equal(again.draws(ANTIGENS, [0, 7]), expected.argmax(1).expand(2, -1))
    assert torch.equal(again.with_settings(values=9)(ANTIGENS), again(ANTIGENS))
    with pytest.raises(ValueError, match="Quantiser senses nothing"):
        again.foreign(ANTIGENS)
    with pytest.raises(ValueError, match="seeds must hold at least one seed"):
        again.draws(ANTIGENS, [])
    with pytest.raises(ValueError, match="holds a Quantiser, not a RAILS"):
        RAILS.load(tmp_path, functional_conv)
    with pytest.raises(ValueError, match="quantiser has no setting 'value'; nearest: values"):
        again.with_settings(value=3)


def test_a_kind_that_is_no_longer_registered_is_not_loaded(functional_conv, images, tmp_path, registry):
    register(Quantiser)
    Quantiser(functional_conv).fit(*images).save(tmp_path / "q")
    shutil.copytree(tmp_path / "q", tmp_path / "copy")
    assert type(load(tmp_path / "copy", functional_conv)) is Quantiser
    del registry["quantiser"]
    with pytest.raises(ValueError, match=r"holds a defence of kind 'quantiser'.*; register it"):
        load(tmp_path / "copy", functional_conv)

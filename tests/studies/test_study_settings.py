"""What a study's names stand for: attacks, defences, networks, files."""

import functools
import runpy
import sys
from pathlib import Path

import pytest

from immunonet import Maturation, studies, zoo
from immunonet.attacks import FGSM, PGD
from immunonet.studies import model
from immunonet.studies.entries import Range

SMALL = Path(__file__).with_name("small.toml").read_text()
SEARCH = Path(__file__).with_name("search.toml").read_text()


@pytest.fixture
def read(tmp_path):
    """Return a function that reads small.toml with replacements (old, new)."""

    def read(*changes, text=SMALL):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "study.toml"
        path.write_text(text)
        return studies.load(path)

    return read


@functools.cache
def packaged(name):
    """Return a study of the package, which takes a while to read."""
    return studies.load(name)


@pytest.mark.parametrize("name", studies.NAMES)
def test_the_studies_of_the_package_are_sound(name):
    study = packaged(name)
    if study.paths:
        assert study.goals
        return
    assert study.dataset in ("mnist", "cifar10", "svhn")
    assert {"pgd"} <= study.attacks.keys()
    assert study.targets or study.watching


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_the_studies_of_the_papers_take_images_in_the_order_of_their_files(name):
    study = packaged(name)
    assert study.dataset == name
    assert study.order == "file"


def test_the_settings_are_those_of_the_published_code():
    assert packaged("mnist").attack("pgd") == PGD(eps=60 / 255, step=20 / 255, iterations=20, random_start=False)
    cifar = packaged("cifar10")
    assert cifar.attack("pgd") == PGD(eps=8 / 255, step=2 / 255, iterations=10, random_start=False)
    (entry,) = (one for one in cifar.main if one.defences == ("rails-authors",))
    made = cifar.spec("rails-authors", entry.layers[0], entry.settings).tried()
    assert list(made.maturations) == Maturation.authors("cifar10", population=200)
    assert (made.space, made.cell_bounds.pairs()) == ("block2", [[0.0, 5.0]])
    assert packaged("mnist").spec("rails-authors").tried().maturations == (Maturation.authors("mnist"),)


def test_attacks_are_read_and_scaled(read):
    study = read(("eps = 0.1\nstep = 0.05", 'eps = "1/8"\nstep = "1/32"'), ("[defences]", "[attacks.fgsm]\n[defences]"))
    assert study.attack("none") is None
    assert study.attack("fgsm") == FGSM()
    assert study.attack("pgd") == PGD(eps=0.125, step=0.03125, iterations=2, random_start=False)
    assert study.attack("pgd", 0.25) == PGD(eps=0.25, step=0.0625, iterations=2, random_start=False)
    assert study.attack("fgsm", 0.25) == FGSM(eps=0.25)


def test_a_defence_is_a_name_or_a_description_and_takes_the_settings_that_its_kind_has(read):
    study = read(("[tuning]", 'slow = { spec = "rails paper decay=0.5", title = "Slow" }\n[tuning]'))
    given = {"population": 7, "crossover": "none", "false_alarm": 0.1}
    (paper,) = study.spec("slow", ("conv1",), given).tried().maturations
    assert paper == Maturation.paper(decay=0.5, population=7, crossover=None)
    assert study.spec("knn", ("conv1",), given).settings == {"metric": "euclidean", "false_alarm": 0.1}
    assert study.spec("cnn", ("conv1",), given).settings == {}
    named = ("slow", "rails-paper", "rails generations=0", "knn", "cnn")
    titles = ["Slow", "RAILS, paper (reconstructed)", "RAILS generations=0", "kNN, Euclidean", "CNN, undefended"]
    specs = [study.spec(name, ("conv1",)) for name in named]
    assert [spec.title for spec in specs] == titles
    assert [spec.name for spec in specs] == list(named)
    assert [spec.layers for spec in specs] == [*[("conv1",)] * 4, ()]
    assert study.spec("rails").settings == {"population": 20, "generations": 1, "neighbours": 2}
    assert study.spec("rails generations=0").settings == {"generations": 0}  # a description is whole


def test_a_factory_of_ones_own_is_imported_at_once(read):
    with pytest.raises(
        ValueError, match=r"study.toml: main\[0\].defences: defence immunonet.zoo:nothing cannot be import"
    ):
        read(('"rails"]', '"immunonet.zoo:nothing gain=2"]'))


def test_training_may_be_adversarial(read):
    given = 'training = { epochs = 1, lr = "1/8", adversarial = { eps = "8/255" } }\nweights ='
    training = read(("weights =", given)).bases["plain"].training
    assert (training.epochs, training.lr, training.adversarial) == (1, 0.125, zoo.Adversarial(eps=8 / 255))


def test_the_space_of_a_search_is_read_and_its_start_told(read):
    study = read(text=SEARCH)
    (entry,) = study.search
    assert entry.space == {
        "neighbours": Range(low=1, high=6, log=True),
        "mutation_rate": (0.15, (0.05, 0.5)),
        "plasma": Range(low=0.05, high=0.5),
        "crossover": ("affinity", "none"),
    }
    assert study.start(entry) == {"neighbours": 2, "mutation_rate": 0.15, "plasma": 0.05, "crossover": "affinity"}
    moved = read(("neighbours=2", "neighbours=2 crossover=none mutation_rate=0.05,0.5"), text=SEARCH)
    assert moved.start(entry) | {"crossover": "none", "mutation_rate": (0.05, 0.5)} == moved.start(entry)


def test_what_a_search_varies_is_one_for_all_layers(read):
    layers = ('layers = ["input"]\nimages = 10', 'layers = ["conv1", "conv2"]\nimages = 10')
    preset = ('"rails population', '"rails authors-cifar10 population')
    space = (SEARCH[SEARCH.index("mutation_rate = [") :], "temperature = [1, 10]")
    with pytest.raises(ValueError, match=r"search\[0\].space: temperature differs between layers, got \[1.0, 10.0\]"):
        read(layers, preset, space, text=SEARCH)


def test_a_missing_pydantic_is_told_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ModuleNotFoundError, match=r"studies need pydantic: pip install 'immunonet\[cli\]'"):
        runpy.run_path(model.__file__)


def test_a_file_that_cannot_be_read_is_named(read, tmp_path):
    with pytest.raises(ValueError, match=r"study.toml is not TOML \(.*line 1"):
        read(text="title = ]\n")
    with pytest.raises(
        ValueError, match=r"study.toml: main\[0\].seeds: Input should be greater than or equal to 1, got 0"
    ):
        read(("seeds = 2", "seeds = 0"))
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"b\.toml is not TOML"):
        studies.load(tmp_path / "b.toml")
    with pytest.raises(FileNotFoundError, match="nothing is no study: give mnist, cifar10, svhn"):
        studies.load("nothing")

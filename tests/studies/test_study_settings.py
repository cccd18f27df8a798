"""Studies as TOML: what is read, and what is refused by name."""

from pathlib import Path

import pytest

from immunonet import Maturation, studies, zoo
from immunonet.attacks import FGSM, PGD
from immunonet.studies.entries import Range
from immunonet.studies.experiments import measurements
from immunonet.studies.settings import Study

SMALL = Path(__file__).with_name("small.toml").read_text()
SEARCH = Path(__file__).with_name("search.toml").read_text()


@pytest.fixture
def read(tmp_path):
    """Return a function that reads small.toml with replacements (old, new)."""

    def read(*changes, text=SMALL) -> Study:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "study.toml"
        path.write_text(text)
        return studies.load(path)

    return read


@pytest.mark.parametrize("name", studies.NAMES)
def test_the_studies_of_the_package_are_sound(name):
    study = studies.load(name)
    assert study.dataset == name
    assert {"pgd"} <= study.attacks.keys()
    assert study.targets


def test_the_budgets_are_those_of_the_published_code():
    assert studies.load("mnist").attack("pgd") == PGD(eps=60 / 255, step=20 / 255, iterations=20, random_start=False)
    assert studies.load("cifar10").attack("pgd") == PGD(eps=8 / 255, step=2 / 255, iterations=10, random_start=False)
    authors = studies.load("cifar10").maturations("rails-authors", {}, 2)
    assert authors == Maturation.authors("cifar10")


def test_attacks_are_read_and_scaled(read):
    study = read(
        ("eps = 0.1\nstep = 0.05", 'eps = "1/8"\nstep = "1/32"'),
        ("[defences.rails]", "[attacks.fgsm]\n[defences.rails]"),
    )
    assert study.attack("none") is None
    assert study.attack("fgsm") == FGSM()
    assert study.attack("pgd") == PGD(eps=0.125, step=0.03125, iterations=2, random_start=False)
    assert study.attack("pgd", 0.25) == PGD(eps=0.25, step=0.0625, iterations=2, random_start=False)
    assert study.attack("fgsm", 0.25) == FGSM(eps=0.25)


def test_settings_of_rails_come_from_preset_kind_and_entry(read):
    study = read(("[tuning]", '[defences.rails-paper]\npreset = "paper"\ndecay = 0.5\n[tuning]'))
    (paper,) = study.maturations("rails-paper", {"population": 7, "crossover": "none"}, 1)
    assert paper == Maturation.paper(decay=0.5, population=7, crossover=None)
    assert study.maturations("rails-authors", {}, 1) == [Maturation.authors("mnist")]
    assert study.maturations("rails", {"early_stop": "none"}, 2)[1].early_stop is None


def test_any_setting_of_rails_is_an_option_that_answers_depend_on(read):
    found = {}
    for voice in (0.2, 0.3):
        study = read(("seeds = 2", f"seeds = 2\noptions = {{ voice = {voice} }}"))
        own = [m for m in measurements(study, 0, {"test": 100, "validation": 100}) if m.experiment == "main"]
        found[voice] = {m.defence: (m.options, m.key()) for m in own}
    rails = [kind for kind in found[0.2] if kind.startswith("rails")]
    assert rails
    for kind in rails:
        assert [found[voice][kind][0] for voice in found] == [{"voice": 0.2}, {"voice": 0.3}]
        assert found[0.2][kind][1] != found[0.3][kind][1]
    assert found[0.2]["cnn"] == found[0.3]["cnn"]


def test_training_may_be_adversarial(read):
    study = read(
        ("weights =", 'training = { epochs = 1, lr = "1/8", adversarial = { eps = "8/255" } }\nweights ='),
    )
    assert study.bases["plain"].arguments() == {
        "epochs": 1,
        "lr": 0.125,
        "adversarial": zoo.Adversarial(eps=8 / 255),
    }


def test_words_may_change_and_settings_may_not(read):
    before = read().identity()
    assert read(('title = "Small"', 'title = "Other"'), ("images = 12", "images = 6")).identity() == before
    assert read(("iterations = 2", "iterations = 3")).identity() != before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("chunk = 6", "chunks = 6"), "the study has no setting 'chunks'; it may have attacks, bases, chunk"),
        (('title = "Small"', ""), "the study needs title"),
        (("chunk = 6", "chunk = 0"), "chunk must be at least 1"),
        (("chunk = 6", "chunk = 6\nnotes = 3"), "notes must be a list, got 3"),
        (('model = "digits"', 'net = "digits"'), r"bases.plain has no setting 'net'; it may have model"),
        (('model = "digits"', "model = 3"), "bases.plain: model must be a string, got 3"),
        (('model = "digits"', 'start = "other"'), r"bases.plain: start must be one of , got 'other'"),
        (("weights =", "training = { speed = 3 }\nweights ="), "training has no setting 'speed'; it may have adv"),
        (
            ("weights =", "training = { adversarial = { epsilon = 3 } }\nweights ="),
            "training.adversarial has no setting 'epsilon'",
        ),
        (("[attacks.pgd]", "[attacks.magic]"), "attacks: the first part of a name must be one of 'fgsm', 'pgd'"),
        (("step = 0.05", "stride = 0.05"), "attacks.pgd has no setting 'stride'"),
        (("step = 0.05", 'step = "x"'), "step must be a number such as 0.1 or 60/255, got 'x'"),
        (("[defences.rails]", "[defences.dknn]"), "defences must be one of 'rails-authors'"),
        (("population = 20", "cells = 20"), "defences.rails has no setting 'cells'; it may have"),
        (("population = 20", "population = 0"), "population must be at least 1"),
        (("population = 20", 'preset = "best"'), "defences.rails: preset must be one of 'default'"),
        (("population = 20", 'preset = "authors-cifar10"'), "defences.rails: its preset is for 2 layers, got 1"),
        (("images = 10", "images = 10\nmetrics = ['l1']"), "tuning: metrics must be one of 'cosine', 'euclidean'"),
        (("images = 10", "images = 10\nattacks = ['fgsm']"), "tuning.attacks must be one of 'none', 'pgd'"),
        (("[[main]]", "[main]"), r"main must be an array of tables \(\[\[main\]\]\)"),
        (("seeds = 2", "seed = 2"), r"main\[0\] has no setting 'seed'"),
        (("images = 12", ""), r"main\[0\] needs images"),
        (('layers = ["input"]', "layers = [3]"), r"main\[0\]: layers must be a name, or a list of names, got 3"),
        (('layers = ["input"]', "layers = []"), r"main\[0\]: layers must not be empty"),
        (('"rails"]', '"svm"]'), r"main\[0\]: defences must be one of 'cnn'"),
        (("seeds = 2", 'seeds = 2\nattacks = ["fgsm"]'), r"main\[0\]: attacks must be one of 'none', 'pgd', got"),
        (("seeds = 2", 'seeds = 2\nbases = ["other"]'), r"main\[0\]: bases must be one of 'plain', got 'other'"),
        (("seeds = 2", 'seeds = 2\nsplit = "train"'), "split must be one of 'test', 'validation'"),
        (("seeds = 2", 'seeds = 2\nname = "x"'), "a curve has a name, vary and values"),
        (("seeds = 2", "seeds = 2\nchoose_layers = true"), r"defences must be \['dknn-tuned'\] with choose_layers"),
        (("seeds = 2", "seeds = 2\noptions = { model = 1 }"), "options has no setting 'model'"),
        (("seeds = 2", "seeds = 2\nhidden = true\noptions = { space = 'conv1' }"), "hidden must be false with a space"),
        (("seeds = 2", "seeds = 2\nhidden = 1"), "hidden must be True or False"),
        (("seeds = 2", "seeds = 2\nmaturation = { cells = 1 }"), "maturation has no setting 'cells'"),
        (("seeds = 2", "seeds = 2\nmaturation = 3"), "maturation must be a table, got 3"),
        (("seeds = 2", "seeds = 2\nrepertoire = 0"), "repertoire must be at least 1"),
        (('base = "plain"', 'base = "other"'), r"learning\[0\]: base must be one of 'plain', got 'other'"),
        (("eps = [0.1]", "eps = 0.1"), r"learning\[0\]: eps must be a list, got 0.1"),
        (
            ("[[learning]]", "[[targets]]\ntext='x'\nbase='plain'\nleast=1\n[[learning]]"),
            "layers or choice must be given",
        ),
        (
            ("[[learning]]", "[[targets]]\ntext='x'\nbase='plain'\nleast=1\nchoice='x'\n[[learning]]"),
            r"targets\[0\]: choice must be one of",
        ),
        (
            ("[[learning]]", "[[hardening]]\nname='learning'\nbase='plain'\nlayers=['input']\nimages=4\n[[learning]]"),
            "name must differ between experiments, got 'learning' twice",
        ),
        (("[tuning]", "[other]"), "the study has no setting 'other'"),
    ],
)
def test_a_mistake_is_named(read, change, told):
    with pytest.raises((ValueError, TypeError), match=told) as found:
        read(change)
    assert "study.toml: " in str(found.value)


@pytest.mark.parametrize(
    ("curve", "told"),
    [
        ('vary = "speed"\nvalues = [1]', "vary must be one of 'eps', 'repertoire', 'layers'"),
        ('vary = "eps"\nvalues = []', "values must not be empty"),
        ('vary = "eps"\nvalues = ["x"]', "values must be a number"),
        ('vary = "population"\nvalues = [0]', "population must be at least 1"),
        ('vary = "repertoire"\nvalues = [0.5]', "values must be an integer"),
    ],
)
def test_curves_are_checked(read, curve, told):
    entry = f'[[curves]]\nname = "c"\nlayers = ["input"]\nimages = 4\ndefences = ["rails"]\n{curve}\n[[learning]]'
    with pytest.raises((ValueError, TypeError), match=told):
        read(("[[learning]]", entry))


def test_the_space_of_a_search_is_read(read):
    study = read(text=SEARCH)
    (entry,) = study.search
    assert entry.space == {
        "neighbours": Range(low=1, high=6, log=True),
        "mutation_rate": (0.15, [0.05, 0.5]),
        "plasma": Range(low=0.05, high=0.5),
        "crossover": ("affinity", "none"),
    }
    assert study.start(entry) == {"neighbours": 2, "mutation_rate": 0.15, "plasma": 0.05, "crossover": "affinity"}
    moved = read(("neighbours = 2", 'neighbours = 2\ncrossover = "none"\nmutation_rate = [0.05, 0.5]'), text=SEARCH)
    assert moved.start(entry) | {"crossover": "none", "mutation_rate": [0.05, 0.5]} == moved.start(entry)
    assert read(("trials = 5", "trials = 9"), text=SEARCH).identity() == study.identity()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("trials = 5", "trial = 5"), r"search\[0\] has no setting 'trial'; it may have attacks"),
        (("confirm = 12", ""), r"search\[0\] needs confirm"),
        (('name = "tuned"', "name = 3"), r"search\[0\]: name must be a string, got 3"),
        (('layers = ["input"]\nimages = 10', "layers = []\nimages = 10"), "layers must be a name, or a list of names"),
        (("images = 10", "images = 0"), r"search\[0\]: images must be at least 1"),
        (("confirm = 12", "confirm = 1.5"), "confirm must be an integer, got 1.5"),
        (("trials = 5", "trials = 1"), "trials must be at least 2"),
        (("finalists = 2", "finalists = 5"), "finalists must be at least 1 and at most 4, got 5"),
        (("finalists = 2", 'attacks = "pgd"'), "attacks must be a list, got 'pgd'"),
        (("finalists = 2", 'attacks = ["fgsm"]'), r"search\[0\]: attacks must be one of 'none', 'pgd', got 'fgsm'"),
        (("finalists = 2", "repertoire = 0"), "repertoire must be at least 1"),
        (("finalists = 2", "hidden = 1"), "hidden must be True or False"),
        (
            ('layers = ["input"]\nimages = 10', 'layers = ["input", "conv1"]\nhidden = true\nimages = 10'),
            "hidden must be false with several layers at once",
        ),
        (('base = "plain"', 'base = "other"'), r"search\[0\]: base must be one of 'plain', got 'other'"),
        (('early_stop = "none"', "stop = 1"), "maturation has no setting 'stop'"),
        (("early_stop =", "plasma = 0.1, early_stop ="), "space has no setting 'plasma'; it may have alignment"),
        (("neighbours = {", "cells = {"), "space has no setting 'cells'"),
        (('["affinity", "none"]', '["affinity"]'), "space.crossover must be a list of at least two different values"),
        (('["affinity", "none"]', '["none", "none"]'), "space.crossover must be a list of at least two different"),
        (('["affinity", "none"]', '"affinity"'), "space.crossover must be a list of choices, or a table with low and"),
        (('["affinity", "none"]', '["affinity", "best"]'), "crossover must be one of 'affinity', 'authors', None, got"),
        (('["affinity", "none"]', '["authors", "none"]'), r"search\[0\]: space.crossover must hold 'affinity', where"),
        (("{ low = 0.05, high = 0.5 }", "{ low = 0.05 }"), "space.plasma must be a list of choices, or a table with"),
        (("high = 0.5 }", "high = 0.5, step = 1 }"), "space.plasma has no setting 'step'; it may have high, log, low"),
        (("high = 0.5 }", "high = 0.05 }"), "space.plasma: low must be below high, got 0.05 and 0.05"),
        (("high = 0.5 }", 'high = "1/2" }'), "space.plasma: high must be a number, got '1/2'"),
        (("high = 0.5 }", "high = inf }"), "space.plasma: high must be a finite number"),
        (("low = 0.05, high = 0.5", "low = 0.1, high = 0.5"), "space.plasma must hold 0.05, where the search starts"),
        (("low = 0.05, high = 0.5", "low = 0, high = 0.5"), r"search\[0\]: space: plasma must be a finite number in"),
        (("high = 0.5 }", "high = 0.9 }\nmemory = [0.05, 0.2]"), r"plasma \+ memory must be at most 1, got 0.9 \+ 0.2"),
        (("low = 1, high = 6", "low = 0, high = 6"), "space.neighbours: low must be above 0 with log, got 0"),
        (("high = 6,", "high = 6.5,"), "space.neighbours: high must be an integer, got 6.5"),
        (("log = true", "log = 1"), "space.neighbours: log must be True or False"),
        (("crossover = [", "mutation_range = { low = 0, high = 1 }\ncrossover = ["), "mutation_range must be a pair"),
    ],
)
def test_a_mistake_in_a_search_is_named(read, change, told):
    with pytest.raises((ValueError, TypeError), match=told) as found:
        read(change, text=SEARCH)
    assert "study.toml: " in str(found.value)


def test_a_search_has_a_space_a_name_of_its_own_and_one_start_for_its_layers(read):
    with pytest.raises(ValueError, match="space must hold at least one setting, got none"):
        read(text=SEARCH.split("[search.space]")[0] + "[search.space]\n")
    with pytest.raises(ValueError, match="name must differ between experiments, got 'tuned' twice"):
        read(text=SEARCH + SEARCH[SEARCH.index("[[search]]") :])
    layers = ('layers = ["input"]\nimages = 10', 'layers = ["conv1", "conv2"]\nimages = 10')
    preset = ("population = 20", 'preset = "authors-cifar10"\npopulation = 20')
    space = ('crossover = ["affinity", "none"]', "temperature = [1, 10]")
    rates = (("mutation_rate = [0.15, [0.05, 0.5]]", ""),)
    with pytest.raises(ValueError, match=r"space must not hold 'temperature', which differs .*, got \[1.0, 10.0\]"):
        read(layers, preset, space, *rates, text=SEARCH)


def test_a_file_that_cannot_be_read_is_named(read, tmp_path):
    with pytest.raises(ValueError, match=r"study.toml is not TOML \(.*line 1"):
        read(text="title = ]\n")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"b\.toml is not TOML"):
        studies.load(tmp_path / "b.toml")
    with pytest.raises(FileNotFoundError, match="nothing is no study: give mnist, cifar10, svhn"):
        studies.load("nothing")
    with pytest.raises(ValueError, match="bases must hold at least one network"):
        read(text='title = "t"\ndataset = "d"\nmain = []\n[bases]\n[attacks]\n')
    with pytest.raises(ValueError, match="main must hold at least one comparison"):
        read(text='title = "t"\ndataset = "d"\nmain = []\n[bases.a]\n[attacks]\n')
    with pytest.raises(TypeError, match=r"bases must be a table, got 3"):
        read(text='title = "t"\ndataset = "d"\nmain = []\nbases = 3\n[attacks]\n')
    with pytest.raises(TypeError, match=r"bases.a must be a table, got 3"):
        read(text='title = "t"\ndataset = "d"\nmain = []\n[bases]\na = 3\n[attacks]\n')

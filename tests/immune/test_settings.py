import dataclasses
import json
import math

import pytest

from immunonet import Maturation


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"population": 0}, ValueError, "population must be at least 1, got 0"),
        ({"population": 10.0}, TypeError, "population must be an integer, got 10.0"),
        ({"neighbours": 0}, ValueError, "neighbours must be at least 1, got 0"),
        ({"neighbours": True}, TypeError, "neighbours must be an integer"),
        ({"generations": -1}, ValueError, "generations must be at least 0, got -1"),
        ({"generations": None}, TypeError, "generations must be an integer, got None"),
        ({"recombination": 0}, ValueError, r"recombination must be a finite number in \(0, inf\], got 0"),
        ({"temperature": 0}, ValueError, r"temperature must be a finite number in \(0, inf\], got 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be a finite number"),
        ({"temperature": "Auto"}, TypeError, "temperature must be .*'auto'.*, got 'Auto'"),
        ({"mutation_rate": 1.1}, ValueError, r"mutation_rate must be a finite number in \[0, 1\], got 1.1"),
        ({"mutation_rate": "x"}, TypeError, "mutation_rate must be"),
        ({"mutation_rate": (0.2, 0.1)}, ValueError, r"mutation_rate must have least <= most, got \(0.2, 0.1\)"),
        ({"mutation_rate": (0.1,)}, TypeError, r"mutation_rate must be a pair \(least, most\), got \(0.1,\)"),
        ({"mutation_rate": (-0.1, 0.1)}, ValueError, "mutation_rate must be a finite number in"),
        ({"mutation_range": 0.1}, TypeError, r"mutation_range must be a pair \(least, most\), got 0.1"),
        ({"mutation_range": (0.2, 0.1)}, ValueError, "mutation_range must have least <= most"),
        ({"mutation_range": (0.0, 2.0)}, ValueError, "mutation_range must be a finite number"),
        ({"decay": 0}, ValueError, "decay must be a finite number in"),
        ({"decay": 1.1}, ValueError, "decay must be a finite number in"),
        ({"crossover": "nearest"}, ValueError, "crossover must be one of 'affinity', 'authors', None, got 'nearest'"),
        ({"plasma": 0.0}, ValueError, "plasma must be a finite number in"),
        ({"memory": -0.1}, ValueError, "memory must be a finite number in"),
        ({"plasma": 0.6, "memory": 0.5}, ValueError, r"plasma \+ memory must be at most 1, got 0.6 \+ 0.5"),
        ({"early_stop": 0}, ValueError, "early_stop must be at least 1, got 0"),
        ({"early_stop": 1.5}, TypeError, "early_stop must be an integer"),
        ({"candidates": 0}, ValueError, "candidates must be at least 1, got 0"),
        ({"candidates": 2.0}, TypeError, "candidates must be an integer, got 2.0"),
        ({"candidates": "all"}, TypeError, "candidates must be an integer, 'auto' or None, got 'all'"),
        ({"prune": -0.1}, ValueError, "prune must be a finite number in"),
        ({"prune": "no"}, TypeError, "prune must be a number"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        Maturation(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"population": 1, "neighbours": 1, "generations": 0},
        {"mutation_rate": 0, "mutation_range": (0, 0), "decay": 1},
        {"mutation_rate": (0.1, 0.1), "plasma": 1, "memory": 0},
        {"plasma": 0.3, "memory": 0.7, "early_stop": None, "prune": None, "crossover": None},
    ],
)
def test_ends_of_the_valid_ranges(settings):
    for name, value in settings.items():
        assert getattr(Maturation(**settings), name) == value


@pytest.mark.parametrize(
    ("population", "neighbours", "classes", "total"),
    [(1000, 10, 10, 1000), (1000, 10, 3, 1020), (1, 10, 10, 100), (1001, 10, 10, 1100), (7, 1, 3, 9)],
)
def test_population_is_rounded_up(population, neighbours, classes, total):
    settings = Maturation(population=population, neighbours=neighbours)
    assert settings.per_class(classes) * classes == total


@pytest.mark.parametrize(
    ("settings", "classes", "sizes"),
    [
        ({}, 10, (50, 200)),
        ({"population": 4, "neighbours": 1}, 2, (1, 1)),
        ({"population": 2, "neighbours": 1, "plasma": 0.5, "memory": 0.5}, 2, (1, 1)),
        ({"population": 3, "neighbours": 1, "plasma": 0.5, "memory": 0.5}, 3, (2, 1)),
        ({"population": 10, "neighbours": 1, "plasma": 1.0, "memory": 0.0}, 2, (10, 0)),
    ],
)
def test_sizes_of_plasma_and_memory(settings, classes, sizes):
    assert Maturation(**settings).sizes(classes) == sizes


def test_cells_do_not_evolve_by_default():
    assert Maturation().generations == 0


def test_rates():
    assert Maturation(mutation_rate=0.3).rates == (0.0, 0.3)
    assert Maturation(mutation_rate=[0.1, 0.3]).rates == (0.1, 0.3)


def test_settings_are_frozen_keyword_only_and_go_through_json():
    settings = Maturation(mutation_rate=(0.1, 0.2), temperature=3)
    assert Maturation(**json.loads(json.dumps(dataclasses.asdict(settings)))) == settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.population = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        Maturation(1000)  # type: ignore[misc]


def test_paper_preset_and_overrides():
    preset = Maturation.paper()
    assert (preset.population, preset.neighbours, preset.generations) == (1000, 10, 10)
    assert preset.crossover == "affinity"
    assert preset.early_stop is None
    assert 0 < preset.mutation_range[0] < preset.mutation_range[1]
    assert Maturation.paper(population=200, early_stop=3) == dataclasses.replace(preset, population=200, early_stop=3)
    with pytest.raises(TypeError, match="bogus"):
        Maturation.paper(bogus=1)


def test_authors_presets():
    mnist = Maturation.authors("mnist")
    assert (mnist.neighbours, mnist.population, mnist.generations, mnist.temperature) == (10, 1000, 10, 18)
    assert (mnist.mutation_rate, mnist.mutation_range) == (0.985, (0, 0.15))
    assert mnist.crossover == "authors"
    assert mnist.early_stop is None
    assert [(m.temperature, m.generations) for m in Maturation.authors("cifar10")] == [(1, 10), (10, 5)]
    assert [m.population for m in Maturation.authors("cifar10", population=100)] == [100, 100]
    with pytest.raises(ValueError, match="dataset must be one of 'mnist', 'cifar10', got 'svhn'"):
        Maturation.authors("svhn")

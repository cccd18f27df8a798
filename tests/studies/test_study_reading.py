"""Every key of a study is checked when it is loaded: a wrong type or unknown name is told by its key."""

import copy
import dataclasses
import inspect

import pytest

from immunonet import zoo
from immunonet.attacks import FGSM, PGD
from immunonet.defences.base import REGISTRY
from immunonet.studies import entries, model
from immunonet.studies.reading import study_of

SETTINGS = {
    "population": 20, "neighbours": 2, "generations": 1, "innate": 0.05, "alignment": 0.1, "recombination": 0.5,
    "temperature": 1.0, "mutation_rate": [0.1, 0.2], "mutation_range": [0.1, 0.2], "decay": 0.9, "crossover": "authors",
    "plasma": 0.05, "memory": 0.2, "early_stop": 2, "prune": 0.1, "candidates": 10, "bounds": [0, 1],
    "cell_bounds": [-1, 1],
    "false_alarm": 0.1, "memory_budget": 1000, "shared_noise": False, "voice": 0.5, "metric": "cosine", "seed": 1,
    "vaccine": 0.1, "vaccine_share": 0.5, "preset": "paper", "hidden": False,
}  # fmt: skip
FEW = {"population": 20}
COMMON = {
    "layers": ["input", "conv1"], "images": 4, "defences": ["cnn", "rails"], "attacks": ["none", "pgd"],
    "bases": ["plain"], "split": "validation", "seeds": 2, "repertoire": 100, "settings": FEW,
}  # fmt: skip
CNN = {"layers": ["input"], "images": 4, "defences": ["cnn"], "bases": ["plain"]}
SINGLE = {"base": "plain", "layers": ["input"], "images": 4, "repertoire": 100, "settings": FEW}
WHOLE = {
    "title": "Title", "dataset": "data", "chunk": 5, "validation": 10, "training": 20, "order": "file",
    "notes": ["A note."], "remarks": {"data": "{n} images"},
    "bases": {
        "plain": {
            "model": "digits", "weights": "net.safetensors", "start": "other",
            "training": {
                "epochs": 1, "batch_size": 8, "lr": 0.1, "weight_decay": 0.1, "seed": 0, "patience": 1, "augment": True,
                "bfloat16": True, "ema": 0.5,
                "adversarial": {
                    "loss": "trades", "eps": "8/255", "step": 0.1, "iterations": 1, "beta": 6.0, "ramp": 1,
                    "validation_eps": 0.1, "combine": "max",
                },
            },
        },
        "other": {"model": "package.module:factory"},
    },
    "attacks": {
        "pgd": {
            "norm": "linf", "bounds": [0, 1], "batch_size": 5, "eps": "1/8", "step": 0.1, "iterations": 2,
            "restarts": 1, "momentum": 0.5, "random_start": False, "seed": 1,
        },
        "fgsm": {"norm": "l2", "bounds": [0, 1], "batch_size": 5, "eps": 0.1},
    },
    "defences": {"rails": "rails paper population=20", "fast": {"spec": "rails generations=0", "title": "Fast"}},
    "tuning": {"images": 3, "attacks": ["none", "pgd"], "choices": {"neighbours": [1, 3], "metric": ["cosine"]}},
    "main": [
        COMMON | {"settings": SETTINGS}, COMMON | {"defences": ["dknn-tuned"], "choose_layers": True, "settings": {}},
    ],
    "curves": [
        COMMON | {"name": "decay", "title": "Decay", "vary": "decay", "values": [0.5, 0.9], "choose_layers": False},
        COMMON | {"name": "eps", "vary": "eps", "values": [0, "1/8"]},
        {key: value for key, value in COMMON.items() if key != "layers"}
        | {"name": "layers", "vary": "layers", "values": ["input", ["input", "conv1"]]},
    ],
    "learning": [SINGLE | {
        "name": "learning", "eps": [0, 0.1], "attack": "pgd", "split": "validation", "defence": "rails",
    }],
    "sensing": [SINGLE | {"name": "sensing", "strangers": ["pgd", "digits"], "eps": 0.1, "defences": ["rails"]}],
    "hardening": [SINGLE | {
        "name": "hardening", "attack": "pgd", "cells": 2, "defence": "rails", "defences": ["dknn", "rails"],
    }],
    "healing": [SINGLE | {
        "name": "healing", "attack": "pgd", "defence": "control", "settings": {"rank": 3}, "pictures": 3, "title": "",
    }],
    "watching": [SINGLE | {
        "name": "watching", "title": "Watching", "defence": "rails", "split": "test", "eps": "1/8", "norm": "linf",
        "queries": 5, "attacks": ["nes"], "ways": ["plain", "slow"], "clean": 20, "copied": 2, "space": "pooled",
        "neighbours": 2, "window": 5, "false_alarm": 0.1,
    }],
    "search": [SINGLE | {
        "name": "search", "title": "Search", "confirm": 4, "trials": 5, "finalists": 2, "attacks": ["none", "pgd"],
        "defence": "rails", "settings": {"population": 20},
        "space": {"neighbours": {"low": 1, "high": 20, "log": True}, "decay": [0.5, 0.9]},
    }],
    "threats": {"linf": "1/8", "l1": 2.0},
    "paths": {
        "curve": {
            "ends": ["plain", "other"], "title": "Curve",
            "training": {
                "epochs": 2, "batch_size": 16, "lr": 0.1, "weight_decay": 0.1, "seed": 1, "augment": True,
                "bfloat16": True, "ema": 0.5, "threats": {"linf": 0.1}, "combine": "max", "iterations": 3, "ramp": 1,
            },
        },
    },
    "profile": {
        "points": 3, "images": 5, "iterations": 2, "apgd": 3, "plane": 2, "plane_images": 4, "plane_iterations": 2,
    },
    "contests": [{
        "name": "contest", "title": "Contest", "images": 4, "protocol": "quick", "black_box": 2, "attacks": ["pgd"],
        "entrants": [{"network": "curve@best", "defence": "dknn input", "title": "Best"}, {"network": "other"}],
    }],
    "goals": [{
        "text": "Goal", "contest": "contest", "entrant": "curve@best dknn input", "over": ["other"],
        "published": "nothing", "least": 0.1, "goal": 0.2,
    }],
    "targets": [
        {
            "text": "Target", "base": "plain", "attack": "pgd", "defence": "rails", "over": "dknn", "layers": ["input"],
            "images": 5, "published": "nothing", "least": 0.5, "goal": 0.9, "least_share": 0.1, "goal_share": 0.2,
        },
        {"text": "Target", "base": "plain", "choice": "layers", "least": 0.5},
    ],
}  # fmt: skip
# Keys whose value may be any text.
FREE = {"title", "dataset", "notes", "remarks", "data", "weights", "name", "text", "published", "layers", "values"}
FREE |= {"strangers", "space"}


def places(value, path=()):
    """Return the places of all values in nested tables and lists, those of tables and lists among them."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return ([path] if path else []) + [place for key, part in inside for place in places(part, (*path, key))]


def at(table, path):
    for key in path:
        table = table[key]
    return table


def key_of(path):
    return next(part for part in reversed(path) if isinstance(part, str))


def wrong(path):
    """Return values that the place may not hold."""
    value, key = at(WHOLE, path), key_of(path)
    yield [[[]]]
    yield {"odd": {}}
    if isinstance(value, str) and key not in FREE:
        yield "unknown"
    if not isinstance(value, str) and value != ["input"] and path != ("curves", 2, "values", 1) and key != "memory":
        yield "lots"  # there it is the name of a layer, and where a share of cells may stand, a folder
    if isinstance(value, bool | list | dict):
        yield 3.5
    if isinstance(value, bool | str | list | dict):
        yield -(10**9)
    if not isinstance(value, bool) and "bounds" not in key:
        yield True


def test_the_table_that_is_tried_holds_every_key():
    assert isinstance(study_of(copy.deepcopy(WHOLE)), model.Study)
    base = WHOLE["bases"]["plain"]
    kinds = {
        "main": entries.Comparison, "curves": entries.Curve, "learning": entries.Learning, "sensing": entries.Sensing,
        "hardening": entries.Hardening, "healing": entries.Healing, "watching": entries.Watching,
        "search": entries.Search, "targets": model.Target, "contests": model.Contest, "goals": model.Goal,
    }  # fmt: skip
    tables = {
        model.Study: WHOLE,
        model.Base: base,
        model.Training: base["training"],
        model.Tuning: WHOLE["tuning"],
        entries.Range: WHOLE["search"][0]["space"]["neighbours"],
        model.Named: WHOLE["defences"]["fast"],
        model.Join: WHOLE["paths"]["curve"],
        model.Connecting: WHOLE["paths"]["curve"]["training"],
        model.Profile: WHOLE["profile"],
        model.Entrant: WHOLE["contests"][0]["entrants"][0],
    } | {kind: {key: value for one in WHOLE[place] for key, value in one.items()} for place, kind in kinds.items()}
    every = {
        kind
        for kind in (vars(entries) | vars(model)).values()
        if isinstance(kind, type) and issubclass(kind, entries.Table)
    }
    assert tables.keys() == every - {entries.Table, entries.Entry, entries.Single, model.Schedule}
    for kind, table in tables.items():
        assert table.keys() == kind.model_fields.keys(), kind
    made = {FGSM: WHOLE["attacks"]["fgsm"], PGD: WHOLE["attacks"]["pgd"]}
    for kind, table in (made | {zoo.Adversarial: base["training"]["adversarial"]}).items():
        assert table.keys() == {field.name for field in dataclasses.fields(kind)} - {"targeted", "threats"}, kind
    train = inspect.signature(zoo.train).parameters
    own = {name: field.default for name, field in model.Training.model_fields.items()}
    assert {name: train[name].default for name in own} == own
    assert train.keys() - own.keys() == {"net", "train_images", "validation_images", "checkpoint", "on_progress"}
    assert SETTINGS.keys() == set(REGISTRY["rails"].options()) - {"maturation", "space"}


def test_a_study_of_nothing_is_refused():
    table = {key: WHOLE[key] for key in ("title", "dataset", "bases", "attacks", "defences")}
    with pytest.raises(ValueError, match="main: must hold at least one experiment where there are no paths"):
        study_of(table)


@pytest.mark.parametrize("part", sorted(WHOLE))
def test_a_wrong_value_in_any_place_is_told_by_its_key(part):
    taken, unnamed = [], []
    needed = {"title", "dataset", "bases", "attacks", "defences", "main"}
    needed |= {"targets": {"curves"}, "goals": {"threats", "paths", "contests"}}.get(part, set())
    needed |= {"threats", "paths"} if part in ("paths", "contests") else set()
    whole = {key: WHOLE[key] for key in (*needed, part)} | {"main": WHOLE["main"] if part == "main" else [CNN]}
    for path in places({part: WHOLE[part]}):
        for value in wrong(path):
            table = copy.deepcopy(whole)
            at(table, path[:-1])[path[-1]] = value
            try:
                study_of(table)
            except ValueError as error:
                unnamed += [] if key_of(path) in str(error) else [(path, value, str(error))]
            else:
                taken.append((path, value))
    assert not taken
    assert not unnamed


def changed(path, value):
    table = copy.deepcopy(WHOLE)
    at(table, path[:-1])[path[-1]] = value
    return table


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("main", 0, "images"), 0, "main[0].images: Input should be greater than or equal to 1, got 0"),
        (("main", 0, "imges"), 4, "main[0]: there is no key 'imges'; nearest: images"),
        (("main", 0, "seeds"), True, "main[0].seeds: Input should be a valid integer, got True"),
        (("main", 0, "split"), "train", "main[0].split: Input should be 'test' or 'validation', got 'train'"),
        (("main", 0, "layers"), [3], "main[0].layers[0]: Input should be a valid list, got 3"),
        (("main", 0, "layers"), [], "main[0].layers: must name at least one"),
        (("main", 0, "defences"), ["svm"], "main[0].defences: there is no defence 'svm'; there are cnn, control, "),
        (("main", 0, "defences"), ["rails input"], "main[0].defences: 'rails input': 'input' must be left out"),
        (("main", 0, "defences"), ["rails voice=2"], "main[0].defences: voice must be a finite number in [0"),
        (("main", 0, "defences"), ["cnn"], "main[0].settings: there is no setting of cnn 'population'"),
        (("main", 0, "settings"), {"cells": 1}, "main[0].settings: there is no setting of cnn and rails 'cells'"),
        (("main", 0, "settings"), 3, "main[0].settings: Input should be a valid table, got 3"),
        (("main", 0, "settings"), {"hidden": True, "space": "conv1"}, "main[0].settings: hidden needs one layer"),
        (("main", 0, "attacks"), ["fgsm-l2"], "main[0].attacks[0]: there is no attack 'fgsm-l2'; nearest: fgsm"),
        (("main", 0, "bases"), ["odd"], "main[0].bases[0]: there is no base 'odd'; there are other, plain"),
        (("main", 0, "repertoire"), "all", "main[0].repertoire: Input should be a valid integer, got 'all'"),
        (("main", 1, "defences"), ["dknn"], "main[1].defences: must be tuned with choose_layers, got 'dknn'"),
        (("main", 0, "name"), "x", "main[0]: there is no key 'name'"),
        (("main",), {}, "main: Input should be a valid list, got {}"),
        (("bases",), {}, "bases: table should have at least 1 item"),
        (("bases", "plain", "model"), "resnet", "bases.plain: there is no model 'resnet'; there are"),
        (("bases", "plain", "start"), "odd", "bases.plain.start: there is no base 'odd'; there are other, plain"),
        (("bases", "other", "start"), "plain", "bases.plain.start: must not lead back, got plain from"),
        (("bases", "plain", "training", "lr"), "1/x", "bases.plain.training.lr: it must be a number such as 0.1"),
        (("attacks", "lbfgs"), {}, "attacks.lbfgs: there is no method, the first part of an attack's name, 'lbfgs'"),
        (("attacks", "pgd", "stride"), 1, "attacks.pgd: there is no key 'stride'"),
        (("attacks", "pgd", "targeted"), True, "attacks.pgd: there is no key 'targeted'"),
        (("attacks", "fgsm", "eps"), 0, "attacks.fgsm: eps must be above 0, got 0"),
        (("defences", "rails"), "rails cells=2", "defences.rails.spec: defence 'rails cells=2': rails has no"),
        (("defences", "rails"), "rails papre", "defences.rails.spec: 'rails papre': 'papre' must be left out"),
        (("defences", "rails"), {"spec": "rails", "name": "x"}, "defences.rails: there is no key 'name'"),
        (("defences", "rails"), "rails authors-cifar10", "main[0].defences: maturation must be one, or one"),
        (("tuning", "attacks"), ["odd"], "tuning.attacks[0]: there is no attack 'odd'; there are fgsm, none, pgd"),
        (("tuning", "choices"), {"voice": [0]}, "tuning.choices: there is no choice 'voice'; there are metric, neighb"),
        (("tuning", "choices", "metric"), ["l1"], "tuning.choices.metric: metric must be one of 'euclidean', 'cosine'"),
        (("remarks", "data"), "{m} images", "remarks.data: may hold {n} and no other field, got '{m} images'"),
        (("curves", 0, "vary"), "speed", "curves[0].vary: there is no value to vary 'speed'"),
        (("curves", 0, "values"), [0.5, 0.5001], "curves[0].values: must differ as they are shown, got ['0.5', '0.5']"),
        (("curves", 0, "values"), [2], "curves[0].values: decay must be a finite number in (0, 1], got 2"),
        (("curves", 1, "values"), ["x"], "curves[1].values: Input should be a valid number"),
        (("curves", 0, "name"), "a/b", "curves[0].name: String should match pattern"),
        (("curves", 0, "name"), "main", "curves[0].name: must differ between experiments, got 'main' twice"),
        (("learning", 0, "name"), "eps", "learning[0].name: must differ between experiments, got 'eps' twice"),
        (("learning", 0, "attack"), "fgsm-small", "learning[0].attack: there is no attack 'fgsm-small'; nearest: fgsm"),
        (("learning", 0, "attack"), "none", "learning[0].attack: there is no attack 'none'; there are fgsm, pgd"),
        (("learning", 0, "defence"), "dknn", "learning[0].defence: 'dknn' has no learning curves"),
        (("hardening", 0, "defence"), "dknn", "hardening[0].defence: 'dknn' has no memory cells"),
        (("hardening", 0, "defences"), ["cnn"], "hardening[0].defences: 'cnn' has no fit"),
        (("sensing", 0, "defences"), ["cnn"], "sensing[0].defences: 'cnn' has no fit"),
        (("targets", 0, "least"), "lots", "targets[0].least: Input should be a valid number"),
        (("targets", 0, "over"), "svm", "targets[0].over: there is no defence 'svm'"),
        (("targets", 1, "choice"), "eps", "targets[1].choice: there is no curve of layers 'eps'; there are layers"),
        (("targets", 1, "layers"), ["input"], "targets[1]: layers or choice must be given, and not both"),
        (("search", 0, "finalists"), 5, "search[0].finalists: must be fewer than the 5 trials, got 5"),
        (("search", 0, "space"), {}, "search[0].space: table should have at least 1 item"),
        (("search", 0, "space"), {"population": [1, 2]}, "search[0].space: there is no setting to search 'population'"),
        (("search", 0, "space", "decay"), [0.9], "search[0].space.decay: must be a table with low and high"),
        (("search", 0, "space", "decay"), [0.5, 0.6], "search[0].space.decay: must hold 0.9, where the search starts"),
        (("search", 0, "space", "decay"), [0.9, 2], "search[0].space.decay: decay must be a finite number in (0, 1]"),
        (("search", 0, "space", "neighbours"), {"low": 1}, "search[0].space.neighbours.high: Field required"),
        (("search", 0, "space", "neighbours", "low"), 20, "search[0].space.neighbours: low must be below high"),
        (("search", 0, "space", "neighbours", "low"), 0, "search[0].space.neighbours: low must be above 0 with log"),
        (("search", 0, "space", "neighbours", "high"), "x", "search[0].space.neighbours.high: must be a finite"),
        (("search", 0, "space", "neighbours", "high"), 20.5, "search[0].space.neighbours: "),
        (("search", 0, "space", "plasma"), {"low": 0.05, "high": 0.9}, "search[0].space.plasma: plasma + memory"),
        (("other",), {}, "there is no key 'other'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_table_and_key(path, value, told):
    with pytest.raises(ValueError, match=r".") as error:
        study_of(changed(path, value))
    assert str(error.value).startswith(told)
    assert "\n" not in str(error.value)

"""Every key of a study is checked when it is loaded: a wrong type or unknown name is told by its key."""

import copy
import dataclasses
import inspect

import pytest

from immunonet import RAILS, Maturation, zoo
from immunonet.attacks import FGSM, PGD
from immunonet.studies import entries
from immunonet.studies.reading import _study
from immunonet.studies.settings import Base, Study

MATURATION = {
    "population": 20, "neighbours": 2, "generations": 1, "alignment": 0.1, "recombination": 0.5, "temperature": 1.0,
    "mutation_rate": [0.1, 0.2], "mutation_range": [0.1, 0.2], "decay": 0.9, "crossover": "authors", "plasma": 0.05,
    "memory": 0.2, "early_stop": 2, "prune": 0.1, "candidates": 10,
}  # fmt: skip
COMMON = {
    "layers": ["input", "conv1"], "images": 4, "defences": ["cnn", "dknn", "rails"], "attacks": ["none", "pgd"],
    "bases": ["plain"], "split": "validation", "seeds": 2, "repertoire": 100, "maturation": MATURATION,
    "options": {
        "space": "conv1", "bounds": [0, 1], "cell_bounds": [-1, 1], "false_alarm": 0.1, "memory_budget": 1000,
        "shared_noise": False, "voice": 0.5, "metric": "cosine",
    },
    "hidden": False, "choose_layers": False, "title": "Main",
}  # fmt: skip
LAYER = {"base": "plain", "layers": ["input"], "images": 4, "repertoire": 100}
WHOLE = {
    "title": "Title", "dataset": "data", "chunk": 5, "validation": 10, "order": "file", "notes": ["A note."],
    "remarks": {"data": "{n} images"},
    "bases": {
        "plain": {
            "model": "digits", "weights": "net.safetensors", "start": "other",
            "training": {
                "epochs": 1, "batch_size": 8, "lr": 0.1, "weight_decay": 0.1, "seed": 0, "patience": 1, "augment": True,
                "bfloat16": True,
                "adversarial": {
                    "loss": "trades", "eps": "8/255", "step": 0.1, "iterations": 1, "beta": 6.0, "ramp": 1,
                    "validation_eps": 0.1,
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
    "defences": {"rails": MATURATION | {"preset": "paper"}, "rails-authors": {"population": 10}},
    "tuning": {"images": 3, "attacks": ["none", "pgd"], "neighbours": [1, 3], "metrics": ["cosine"]},
    "main": [COMMON | {"name": "main"}],
    "curves": [
        COMMON | {"name": "decay", "vary": "decay", "values": [0.5, 0.9]},
        COMMON | {"name": "eps", "vary": "eps", "values": [0, "1/8"]},
        {key: value for key, value in COMMON.items() if key != "layers"}
        | {"name": "layers", "vary": "layers", "values": ["input", ["input", "conv1"]]},
    ],
    "learning": [LAYER | {
        "name": "learning", "eps": [0, 0.1], "attack": "pgd", "split": "validation", "maturation": MATURATION,
    }],
    "sensing": [LAYER | {"name": "sensing", "strangers": ["pgd", "digits"], "eps": 0.1, "defences": ["dknn", "rails"]}],
    "hardening": [LAYER | {
        "name": "hardening", "attack": "pgd", "cells": 2, "defences": ["dknn", "rails"], "maturation": MATURATION,
    }],
    "search": [LAYER | {
        "name": "search", "title": "Search", "confirm": 4, "trials": 5, "finalists": 2, "attacks": ["none", "pgd"],
        "hidden": True, "maturation": {"population": 20},
        "space": {"neighbours": {"low": 1, "high": 6, "log": True}, "decay": [0.5, 0.9]},
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
    if not isinstance(value, str) and value != ["input"] and path != ("curves", 2, "values", 1):
        yield "lots"  # there it is the name of a layer
    if isinstance(value, bool | list | dict):
        yield 3.5
    if isinstance(value, bool | str | list | dict):
        yield -(10**9)
    if not isinstance(value, bool) and "bounds" not in key:
        yield True


def test_the_table_that_is_tried_holds_every_key():
    assert isinstance(_study(copy.deepcopy(WHOLE)), Study)
    kinds = {
        "main": entries.Comparison, "learning": entries.Learning, "sensing": entries.Sensing,
        "hardening": entries.Hardening, "search": entries.Search, "targets": entries.Target,
    }  # fmt: skip
    tables = {
        Study: WHOLE, Base: WHOLE["bases"]["plain"], entries.Tuning: WHOLE["tuning"], Maturation: MATURATION,
        entries.Range: WHOLE["search"][0]["space"]["neighbours"], FGSM: WHOLE["attacks"]["fgsm"],
        PGD: WHOLE["attacks"]["pgd"], zoo.Adversarial: WHOLE["bases"]["plain"]["training"]["adversarial"],
    } | {kind: {k: v for one in (*WHOLE[key], *WHOLE["curves"][:kind is entries.Comparison]) for k, v in one.items()}
         for key, kind in kinds.items()}  # fmt: skip
    for kind, table in tables.items():
        left_out = {"targeted"} if kind in (FGSM, PGD) else set()
        assert table.keys() == {field.name for field in dataclasses.fields(kind)} - left_out, kind
    train = set(inspect.signature(zoo.train).parameters)
    not_told = {"net", "train_images", "validation_images", "checkpoint", "on_progress"}
    assert WHOLE["bases"]["plain"]["training"].keys() == train - not_told
    rails = set(inspect.signature(RAILS.__init__).parameters)
    assert COMMON["options"].keys() == rails - {"self", "model", "layers", "maturation", "seed"}


@pytest.mark.parametrize("part", sorted(WHOLE))
def test_a_wrong_value_in_any_place_is_told_by_its_key(part):
    taken, unnamed = [], []
    for path in places({part: WHOLE[part]}):
        for value in wrong(path):
            table = copy.deepcopy(WHOLE)
            at(table, path[:-1])[path[-1]] = value
            try:
                _study(table)
            except (ValueError, TypeError) as error:
                unnamed += [] if key_of(path) in str(error) else [(path, value, str(error))]
            else:
                taken.append((path, value))
    assert not taken
    assert not unnamed


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (
            ("learning", 0, "attack"),
            "fgsm-small",
            r"learning\[0\]: attack must be one of 'pgd', 'fgsm', got 'fgsm-small'",
        ),
        (("learning", 0, "attack"), "none", r"learning\[0\]: attack must be one of 'pgd', 'fgsm', got 'none'"),
        (("hardening", 0, "defences"), ["cnn"], r"hardening\[0\]: defences must be one of 'knn', 'dknn', 'dknn-tuned'"),
        (("hardening", 0, "name"), "a/b", r"hardening\[0\]: name must be the name of a file's part"),
        (("sensing", 0, "name"), "", r"sensing\[0\]: name must be the name of a file's part, not empty"),
        (("attacks", "pgd", "targeted"), True, "attacks.pgd has no setting 'targeted'"),
        (("attacks", "fgsm", "eps"), 0, "attacks.fgsm: eps must be above 0, got 0"),
        (("remarks", "data"), "{m} images", r"remarks.data may hold \{n\} and no other field"),
        (
            ("bases", "other", "start"),
            "plain",
            "bases.other: start must not lead back, got plain from other from plain",
        ),
        (("main", 0, "values"), [1], r"main\[0\]: values must be left out without vary"),
        (("main", 0, "defences"), ["cnn"], r"main\[0\]: maturation is a setting of RAILS: name one among defences"),
        (("curves", 0, "values"), [0.5, 0.5001], r"curves\[0\]: values must differ as they are shown"),
    ],
)
def test_what_could_only_fail_or_mislead_later_is_refused_at_once(path, value, told):
    table = copy.deepcopy(WHOLE)
    at(table, path[:-1])[path[-1]] = value
    with pytest.raises((ValueError, TypeError), match=told):
        _study(table)

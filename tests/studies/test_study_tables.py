"""No two measurements share a line of a table or a figure without saying so."""

from types import SimpleNamespace

import pytest
import torch

from immunonet.studies import figures, tables


def row(defence="rails", attack="none", accuracy=0.5, **settings):
    told = {
        "base": "plain", "layers": ["input"], "split": "test", "experiment": "main", "slice": [0, 10],
        "repertoire": 100, "attack": {"eps": 0.1},
    }  # fmt: skip
    own = {"rails": {"maturation": [{"population": 20, "decay": 0.9}]}}.get(defence, {})
    return {
        "defence": defence, "attack": attack, "accuracy": accuracy, "ci95": [0.0, 1.0], "n": 10, "seeds": [0],
        "eps": 0.1, "norm": "linf", "seconds_per_image": 0.0, "settings": told | own | settings,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        (
            {"maturation": [{"population": 20, "decay": 0.9}]},
            {"maturation": [{"population": 20, "decay": 0.5}]},
            ("maturation.0.decay 0.9", "maturation.0.decay 0.5"),
        ),
        ({"false_alarm": 0.1}, {}, ("false_alarm 0.1", "false_alarm untold")),
        ({"split": "test"}, {"split": "validation"}, ("split test", "split validation")),
    ],
)
def test_what_differs_has_a_line_of_its_own(one, other, names):
    rows = [row(accuracy=0.25, **one), row(accuracy=0.75, **other), row(attack="pgd", accuracy=0.125, **other)]
    head, *body = tables._main(rows)
    assert [line[2] for line in body] == [f"RAILS, T 20, {name}" for name in names]
    assert [line[3:5] for line in body] == [
        ("0.250 (0.000 to 1.000)", ""),
        ("0.750 (0.000 to 1.000)", "0.125 (0.000 to 1.000)"),
    ]
    assert len(head) == len(body[0])


@pytest.mark.parametrize(
    ("changes", "vary"),
    [
        ([{"layers": ["input"]}, {"layers": ["conv1"]}], "decay"),
        ([{"attack": "pgd"}, {"attack": "fgsm"}], "eps"),
        ([{"base": "plain"}, {"base": "robust"}], "decay"),
        ([{"attack": "none"}, {"attack": "pgd"}], "decay"),
    ],
)
def test_every_curve_is_drawn(changes, vary):
    rows = [
        row(vary=vary, value=value, **{key: change[key] for key in change})
        for change in changes
        for value in (0.1, 0.2, 0.3)
    ]
    axes = figures._curve("title", rows).axes[0]
    assert len(set(axes.get_legend_handles_labels()[1])) == 2


def measured(defence, right, **settings):
    told = row(defence, **settings)
    return SimpleNamespace(
        measurement=SimpleNamespace(
            experiment="main", base="plain", split=told["settings"]["split"], candidates=(("input",),)
        ),
        row=SimpleNamespace(**told),
        correct=torch.tensor([right]),
    )


def test_pairs_share_the_repertoire_and_name_the_settings_in_which_several_rails_differ():
    changed = [[{"population": 20, "decay": decay}] for decay in (0.9, 0.5)]
    rails = [measured("rails", [True] * 10, maturation=maturation) for maturation in changed]
    peers = [measured("dknn", [False] * 10), measured("knn", [False] * 10, repertoire=50)]
    found = tables.pairs([*rails, *peers])
    assert [(pair["over"], pair["apart"]) for pair in found] == [
        ("dknn", "maturation.0.decay 0.9"),
        ("dknn", "maturation.0.decay 0.5"),
    ]
    assert [line[1] for line in tables._pairs(found)[1:]] == [f"input, {pair['apart']}" for pair in found]
    (alone,) = tables.pairs([rails[0], *peers])
    assert tables._pairs([alone])[1][1] == "input"


def test_a_target_is_measured_on_test_images():
    target = SimpleNamespace(
        text="", published="", base="plain", attack="none", defence="rails", over=None, layers=("input",), choice=None,
        images=1, least=0.4, goal=None, least_share=None, goal_share=None,
    )  # fmt: skip
    study = SimpleNamespace(targets=[target])
    validation, test = (measured("rails", [True] * 10, split=split) for split in ("validation", "test"))
    assert tables.targets(study, [validation])[0]["status"] == "not measured"
    assert tables.targets(study, [validation, test])[0]["status"] == "least"

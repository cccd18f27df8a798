"""No two measurements share a line of a table or a figure without saying so."""

import pytest

from immunonet.report import studies


def row(defence="rails", attack="none", accuracy=0.5, **settings):
    told = {
        "base": "plain", "layers": ["input"], "split": "test", "experiment": "main", "slice": [0, 10],
        "repertoire": 100, "attack": {"eps": 0.1},
    }  # fmt: skip
    own = {"rails": {"maturation": [{"population": 20, "generations": 3, "decay": 0.9}]}}.get(defence, {})
    return {
        "defence": defence, "attack": attack, "accuracy": accuracy, "ci95": [0.0, 1.0], "n": 10, "seeds": [0],
        "eps": 0.1, "norm": "linf", "seconds_per_image": 0.0, "settings": told | own | settings,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        (
            {"maturation": [{"population": 20, "generations": 3, "decay": 0.9}]},
            {"maturation": [{"population": 20, "generations": 3, "decay": 0.5}]},
            ("maturation.0.decay 0.9", "maturation.0.decay 0.5"),
        ),
        ({"false_alarm": 0.1}, {}, ("false_alarm 0.1", "false_alarm untold")),
        ({"split": "test"}, {"split": "validation"}, ("split test", "split validation")),
    ],
)
def test_what_differs_has_a_line_of_its_own(one, other, names):
    rows = [row(accuracy=0.25, **one), row(accuracy=0.75, **other), row(attack="pgd", accuracy=0.125, **other)]
    head, *body = studies._main(rows)
    assert [line[2] for line in body] == [f"RAILS, T 20, G 3, {name}" for name in names]
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
    drawn = studies.drawn({"results": rows, "study": {"curves": [["main", "title"]]}, "learning": [], "sensing": []})
    axes = drawn["main"].axes[0]
    assert len(set(axes.get_legend_handles_labels()[1])) == 2


def test_a_table_of_pairs_names_the_settings_in_which_several_rails_differ():
    pair = {
        "base": "plain", "layers": ["input"], "attack": "pgd", "defence": "rails", "over": "dknn", "chosen": True,
        "over_layers": ["conv1", "fc1"], "gain": 1.5, "errors_gone": None, "only_rails": 3, "only_other": 1, "n": 1000,
        "p": 0.0321,
    }  # fmt: skip
    others = [pair | {"apart": "maturation.0.decay 0.9"}, pair | {"defence": "rails-paper"}]
    head, *body = studies._pairs([pair, *others])
    assert [line[1] for line in body] == ["input", "input, maturation.0.decay 0.9"]
    assert dict(zip(head, body[0], strict=True)) == {
        "base": "plain", "layer": "input", "attack": "pgd", "against": "DkNN (75, cosine) at conv1 + fc1, chosen",
        "gain": "+1.50", "errors gone": "", "it alone": "3", "other alone": "1", "images": "1,000", "p": "0.032",
    }  # fmt: skip

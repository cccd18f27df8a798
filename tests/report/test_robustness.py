"""Records of a few images: what is put together, what tells cases apart, and what the comparisons say."""

import re

import pytest
import torch

from immunonet.report import robustness
from immunonet.report.robustness import cases, merge
from immunonet.statistics import mcnemar

INTERVALS = {0.0: [0.0, 0.1], 0.5: [0.4, 0.6], 1.0: [0.9, 1.0]}
MATURATION = {"population": 1000, "neighbours": 10, "generations": 10, "alignment": 0.06}


def run(defence, right, *, paper=0.5, weights="w", eps=0.1, protocol="quick", labels=None, first=0, **settings):
    """Return the record of one evaluation: `right`, per image the share of draws that survive the worst case."""
    n, layers = len(right), [] if defence == "cnn" else ["input"]
    own = {"rails": {"maturation": [MATURATION]}, "dknn": {"neighbours": 5, "metric": "cosine"}}.get(defence, {})
    told = {"layers": layers, "weights": weights, "net": "net", "protocol": protocol, "slice": [first, first + n]}
    worst = sum(right) / n
    rows = [
        {
            "dataset": "data", "defence": defence, "attack": attack, "knows": "base", "eps": eps, "norm": "linf",
            "n": n, "correct": n * share, "accuracy": share, "ci95": INTERVALS.get(share, [share, share]), "seeds": [],
            "seconds_per_image": 0.0, "settings": told | own | settings,
        }
        for attack, share in (("none", 1.0), ("pgd", paper), ("worst-case", worst))
    ]  # fmt: skip
    examples = [
        {"image": i, "label": 0 if labels is None else labels[i], "clean": 1.0, "worst": share, "attack": "pgd"}
        for i, share in enumerate(right)
    ]
    asks = {"kind": "black box", "n": n, "calls": 1, "attack": {"method": "Square"}}
    climbs = {"kind": "transfer", "n": n, "calls": 2, "attack": {"method": "APGD", "iterations": 1}}
    evaluation = {
        "defence": defence, "layers": layers, "weights": weights, "per_example": examples, "ablations": [],
        "attacks": {"none": {"kind": "none"}, "pgd": climbs, "square": asks}, "checks": [], "flags": [],
        "unreliable": False,
        "cost": {"seconds_batch_1": 1, "seconds_best_batch": 1, "best_batch": 1, "forward_passes": 1},
    }  # fmt: skip
    about = {"environment": {"commit": "0123456789" * 4 + "-dirty"}, "command": f"evaluate {defence}"}
    return {"results": rows, "evaluations": [evaluation]} | about


def section(title, *records):
    """Return the lines of a section of the document about records, folded away or not."""
    text = robustness.document(merge(records), "x")
    _, _, rest = text.partition(f"<summary>{title}</summary>\n")
    own = rest.split("\n</details>")[0] or text.split(f"## {title}\n")[1].split("\n## ")[0]
    return [line for line in own.split("\n") if line]


def table(*records):
    """Return the lines of the table of RAILS in pairs, by its heads."""
    lines = section("RAILS in pairs", *records)[1:]
    head, _, *lines = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_a_bare_network_of_more_images_serves_a_defence_of_fewer():
    cnn = run("cnn", [0.0] * 8 + [1.0] * 8, paper=0.0, protocol="standard")
    rails = run("rails", [1.0] * 8, paper=1.0)
    (line,) = table(cnn, rails)
    assert line["PGD on the network"] == "helps"
    assert line["worst case better than"] == "no defence by `standard` (p = 0.0078)"
    (text,) = section("Verdict", cnn, rails)
    assert "more than what the undefended network keeps of these 8 images by `standard`: 0.000" in text
    assert "(right alone on 8 images, the other on 0; McNemar p = 0.0078)" in text


@pytest.mark.parametrize("other", [{"weights": "v"}, {"eps": 0.2}])
def test_another_network_or_attacker_is_no_bare_network(other):
    (line,) = table(run("cnn", [0.0] * 8, paper=0.0, **other), run("rails", [1.0] * 8, paper=1.0))
    assert line["PGD on the network"] == "no bare network to compare"
    assert "no defence" not in line["worst case better than"]


def test_the_bare_network_by_the_same_protocol_is_preferred():
    more, same = run("cnn", [1.0] * 8, protocol="standard"), run("cnn", [0.0] * 8)
    (line,) = table(more, same, run("rails", [1.0] * 8))
    assert line["worst case better than"].startswith("no defence (p = ")


@pytest.mark.parametrize(
    ("paper", "said"), [(1.0, "helps"), (0.0, "harms"), (0.5, "not measurably different from no defence")]
)
def test_what_helps_against_pgd_on_the_network_follows_from_intervals(paper, said):
    (line,) = table(run("cnn", [1.0] * 8, paper=0.5), run("rails", [1.0] * 8, paper=paper))
    assert line["PGD on the network"] == said


def test_every_rails_is_compared_with_all_that_share_its_images_and_protocol():
    without = run("rails", [1.0] * 8, maturation=[MATURATION | {"generations": 0}])
    whole, dknn = run("rails", [0.0] * 8), run("dknn", [1.0] * 7 + [0.0])
    elsewhere = run("dknn", [1.0] * 8, protocol="standard", neighbours=7)
    first, second = table(run("cnn", [1.0] * 8), without, whole, dknn, elsewhere)
    assert first["defence"] == "RAILS, input, T 1000, G 0"
    assert first["worst case better than"] == "RAILS, input, T 1000, G 10 (p = 0.0078)"
    assert first["worst case not told apart from"] == "no defence (p = 1); DkNN, input, k 5 (p = 1)"
    assert second["worst case worse than"] == (
        "no defence (p = 0.0078); RAILS, input, T 1000, G 0 (p = 0.0078); DkNN, input, k 5 (p = 0.016)"
    )
    assert "k 7" not in str([first, second])


def test_the_verdict_is_the_highest_worst_case_and_which_to_take_the_first_of_each_situation():
    cnn = run("cnn", [0.0] * 8, paper=0.0)
    rails, dknn = run("rails", [1.0] * 4 + [0.0] * 4), run("dknn", [1.0] * 6 + [0.0] * 2, paper=1.0)
    (said,) = section("Verdict", cnn, rails, dknn)
    assert "of the defences, DkNN, input, k 5 keeps most in the worst case, 0.750" in said
    assert "more than what the undefended network keeps: 0.000" in said
    assert "not told apart from RAILS, input, T 1000, G 10: 0.500 (right alone on 2 images, the other on 0" in said
    line = next(line for line in section("Which to take", cnn, rails, dknn) if line.startswith("| data"))
    name, clean, transfer, worst = (cell.strip() for cell in line.split("|")[1:-1])
    assert (name, clean) == ("data, net, linf 0.1, 8 images", "CNN, undefended: 1.000")
    assert (transfer, worst) == ("DkNN, input, k 5: 1.000", "DkNN, input, k 5: 0.750")
    assert section("Verdict", cnn) == []
    (said,) = section("Verdict", cnn, run("rails", [0.0] * 8))
    assert said == "- **data, net, linf 0.1, 8 images**: no defence keeps an image in the worst case."
    line = next(line for line in section("Which to take", cnn, run("rails", [0.0] * 8)) if line.startswith("| data"))
    assert line.split(" | ")[-1] == "none keeps an image |"
    assert not [line for line in section("Which to take", rails)[:4] if line.startswith("| data")]


def test_of_several_groups_of_a_network_the_one_with_the_most_images_has_the_verdict():
    few, many = [run("cnn", [0.0] * 4), run("rails", [1.0] * 4)], [run("cnn", [0.0] * 8), run("dknn", [1.0] * 8)]
    other = [run("cnn", [0.0] * 2, weights="v"), run("rails", [1.0] * 2, weights="v")]
    alone = run("cnn", [0.0] * 16)  # there is no defence to tell of
    first, second = section("Verdict", *few, *many, *other, alone)
    assert "8 images" in first
    assert "DkNN, input, k 5 keeps most" in first
    assert "2 images" in second


def test_only_the_same_images_are_compared():
    cnn, rails = run("cnn", [0.0] * 8), run("rails", [1.0] * 8, first=4)
    (line,) = table(cnn, rails)
    assert line["worst case not told apart from"] == "no defence (p = 0.12)"  # two-sided, 4 of 4
    apart = [run("cnn", [0.0] * 8), run("rails", [1.0] * 8, first=8)]
    assert "no defence" not in str([value for key, value in table(*apart)[0].items() if key.startswith("worst")])
    assert "undefended" not in section("Verdict", *apart)[0]
    with pytest.raises(
        ValueError, match=r"RAILS, input, T 1000, G 10 and CNN, undefended .* the same images, got other labels"
    ):
        table(run("cnn", [0.0] * 4, labels=[0, 1, 2, 3]), run("rails", [1.0] * 4, labels=[0, 1, 3, 2]))


def test_of_a_plan_that_was_cut_the_images_that_were_attacked_are_compared():
    cut = run("rails", [1.0] * 6, slice={"sample": [8, 100], "seed": 0})
    for place, one in zip((7, 2, 3, 4, 5, 6), cut["evaluations"][0]["per_example"], strict=True):
        one["image"] = place
    (line,) = table(run("cnn", [1.0] * 2 + [0.0] * 6, slice={"sample": [8, 100], "seed": 0}), cut)
    assert line["worst case better than"] == "no defence (p = 0.031)"


def test_a_sample_is_the_beginning_of_a_larger_one_and_of_no_other():
    whole, part, other = ({"sample": [n, of], "seed": 0} for n, of in ((8, 100), (6, 100), (6, 90)))
    (line,) = table(run("cnn", [0.0] * 8, slice=whole), run("rails", [1.0] * 6, slice=part))
    assert line["worst case better than"] == "no defence (p = 0.031)"
    for told in (other, [0, 6]):
        (line,) = table(run("cnn", [0.0] * 8, slice=whole), run("rails", [1.0] * 6, slice=told))
        assert line["worst case better than"] == ""


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        ({"metric": "cosine"}, {"metric": "euclidean"}, ("metric cosine", "metric euclidean")),
        ({"protocol": "quick"}, {"protocol": "standard"}, ("protocol quick", "protocol standard")),
        ({"repertoire": 10}, {"repertoire": 20}, ("repertoire 10", "repertoire 20")),
        ({"false_alarm": 0.05}, {}, ("false_alarm 0.05", "false_alarm untold")),
        ({"weights": "v"}, {"weights": "w"}, ("weights v", "weights w")),
        ({"eps": 0.1}, {"eps": 0.10000001}, ("eps 0.1", "eps 0.10000001")),
    ],
)
def test_whatever_setting_differs_tells_cases_apart(one, other, names):
    found = cases(merge([run("dknn", [1.0], **one), run("dknn", [0.0], **other)]))
    assert [case["title"] for case in found] == [f"DkNN, input, k 5, {name}" for name in names]
    drawn = robustness.figures(merge([run("dknn", [1.0], **one), run("dknn", [0.0], **other)]))["accuracy"]
    assert len(drawn.axes[0].get_yticklabels()) == 2


def test_settings_of_cells_that_no_name_tells_are_told_where_they_differ():
    changed = [MATURATION | {"mutation_rate": rate} for rate in (0.1, 0.2)]
    found = cases(merge([run("rails", [1.0], maturation=[one]) for one in changed]))
    assert [case["title"] for case in found] == [
        f"RAILS, input, T 1000, G 10, maturation.0.mutation_rate {rate}" for rate in (0.1, 0.2)
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recombination": 0.5, "alignment": 0}, "T 1000, G 10, recombined"),
        ({"alignment": 0}, "T 1000, G 10, not aligned"),
        ({"neighbours": 50, "generations": 0}, "T 1000, K 50, G 0"),
    ],
)
def test_settings_of_cells_that_are_not_the_default_are_in_the_name(changes, told):
    (case,) = cases(merge([run("rails", [1.0], maturation=[MATURATION | changes], space="block", voice=0.5)]))
    assert case["title"] == f"RAILS, input, {told}, cells there, voice 0.5"


def test_of_two_evaluations_of_the_same_the_lower_one_counts():
    high, low = (run("dknn", right, attacks=attacks) for right, attacks in (([1.0], ["pgd"]), ([0.0], ["apgd-ce"])))
    for records in ([high, low], [low, high]):
        (case,) = cases(merge(records))
        assert (case["worst"]["accuracy"], case["title"]) == (0.0, "DkNN, input, k 5")


def test_a_run_whose_rows_do_not_tell_its_evaluations_apart_is_refused():
    one, other = run("dknn", [1.0]), run("dknn", [1.0], metric="euclidean")
    both = {key: one[key] + other[key] for key in ("results", "evaluations")} | {"environment": {}, "command": "c"}
    with pytest.raises(ValueError, match="two evaluations of one run have the same defence, layers and weights"):
        cases(merge([both]))


def test_the_document_leaves_no_rails_out():
    records = [run("cnn", [0.0] * 8, paper=0.0, protocol="standard"), run("rails", [1.0] * 6, paper=1.0)]
    without = run("rails", [1.0] * 7, paper=1.0, maturation=[MATURATION | {"generations": 0}])
    lines = section("RAILS in pairs", *records, without)
    for where, name, p in (("6 images", "T 1000, G 10", 0.031), ("7 images", "T 1000, G 0", 0.016)):
        helps = f"helps | no defence by `standard` (p = {p}) |  |  |"
        assert f"| data, net, linf 0.1, {where} | RAILS, input, {name} | {helps}" in lines


def test_a_defence_of_another_kind_stands_in_every_table_by_its_own_name():
    """Nothing of neighbours is asked of it, and an upright in its name breaks no table."""
    smooth = run("wall|paper", [1.0] * 8)
    text = robustness.document(merge([run("cnn", [0.0] * 8), run("rails", [1.0] * 8), smooth]), "x")
    own = [line for line in text.split("\n") if line.startswith("|") and "wall\\|paper, input" in line]
    assert len(own) == 4  # the whole, what broke it, its costs, and RAILS in pairs
    assert len(table(run("rails", [1.0] * 8), smooth)) == 1
    for line in own:
        assert not re.search(r"paper, input, k \d", line)
    result = section("Verdict", run("rails", [1.0] * 8), smooth)[0]
    assert "not told apart from wall|paper, input: 1.000" in result


def test_what_was_tried_tells_every_defence_and_each_command_its_commit():
    record = merge([run("cnn", [0.0] * 8)]) | {"choices": [run("dknn k=3", [1.0] * 8), run("rails", [1.0] * 8)]}
    text = robustness.document(record, "x")
    assert "| net | DkNN k=3 | input |" in text
    assert [text.count(f"- `evaluate {name}` (commit 0123456-dirty)") for name in ("dknn k=3", "cnn")] == [1, 1]
    assert "Measured at commit 0123456-dirty, by" in text
    record["choices"][0]["environment"] = record["runs"][0]["environment"] = {}
    text = robustness.document(record, "x")
    assert "- `evaluate dknn k=3`\n" in text
    assert "Measured at commit" not in text


@pytest.mark.parametrize("roles", [None, ["targeted"], ["eot"], []])
def test_what_a_protocol_lacks_follows_from_roles_or_from_names(roles):
    record = run("cnn", [0.0] * 8)
    attacks = record["evaluations"][0]["attacks"]
    name = "apgd-targeted-eot" if roles is None else "apgd"
    attacks[name] = attacks["pgd"] | ({} if roles is None else {"roles": roles})
    line = section("What was not done", record)[0]
    assert ("targeted attacks" in line) is (roles is not None and "targeted" not in roles)
    assert ("expectation over" in line) is (roles is not None and "eot" not in roles)


@pytest.mark.parametrize(("only", "other"), [(0, 0), (1, 0), (3, 9), (12, 12), (40, 21)])
def test_p_is_that_of_mcnemars_test(only, other):
    one, peer = (run(kind, right) for kind, right in (
        ("rails", [1.0] * only + [0.0] * other + [1.0]), ("cnn", [0.0] * only + [1.0] * other + [1.0]),
    ))  # fmt: skip
    rails, net = cases(merge([one, peer]))
    a, b = (
        torch.tensor([image["worst"] > 0.5 for image in case["evaluation"]["per_example"]]) for case in (rails, net)
    )
    assert robustness.compare(rails, net).p == pytest.approx(mcnemar(a, b), rel=1e-12)

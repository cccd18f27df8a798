"""Searches of a study: what is proposed, kept, continued and told."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from immunonet import RAILS, Maturation, data
from immunonet.attacks import PGD
from immunonet.cli.common import resolve_dataset
from immunonet.evaluation.journal import Journal
from immunonet.report.studies import sections
from immunonet.statistics import mcnemar, wilson
from immunonet.studies.entries import Range
from immunonet.studies.search import propose

SPACE = {
    "neighbours": Range(low=1, high=30, log=True),
    "alignment": Range(low=0, high=0.1234567),
    "crossover": ("affinity", "none"),
    "mutation_rate": (0.1, [0.05, 0.5]),
}


def searches(path):
    return json.loads(Path(path).read_text())["search"]


def told(record):
    """Return what the report says of a record's only search."""
    return next(s for s in sections(record) if s.title.startswith("Search"))


def test_proposals_lie_in_the_space_and_follow_from_seed_and_scores():
    start = {"neighbours": 10, "alignment": 0.06, "crossover": "affinity", "mutation_rate": 0.1}
    found, other = [(start, 0.0)], [(start, 0.0)]
    for seed, trials in ((0, found), (1, other)):
        for _ in range(25):
            settings = propose(SPACE, trials, seed)
            assert settings.keys() == SPACE.keys()
            assert type(settings["neighbours"]) is int
            assert all(value in SPACE[name] for name, value in settings.items())
            trials.append((settings, settings["neighbours"] / 30 - settings["alignment"]))
    assert [propose(SPACE, found[:i], 0) for i in (3, 17)] == [found[i][0] for i in (3, 17)]
    assert found != other
    # It learns: later trials score more than random ones.
    early, late = (sum(score for _, score in found[part]) for part in (slice(1, 9), slice(17, 25)))
    assert late > early + 1


def test_a_search_is_measured_kept_and_told(finished, tiny, monkeypatch):
    monkeypatch.chdir(finished("search", "--report"))
    (found,) = searches("r/search.json")
    trials, finalists = found["trials"], found["finalists"]
    assert len(trials) == 5
    assert trials[0]["settings"] == {"neighbours": 2, "mutation_rate": 0.15, "plasma": 0.05, "crossover": "affinity"}
    assert (found["images"], found["confirm"]) == ([0, 10], [10, 22])
    assert found["sampler"].startswith("TPE of optuna")
    scores = [trial["score"] for trial in trials]
    assert scores == [pytest.approx(sum(trial["right"].values()) / 20) for trial in trials]
    assert [f["trial"] for f in finalists] == [0, *sorted(range(1, 5), key=lambda i: -scores[i])[:2]]

    # The same figures as by hand.
    images = resolve_dataset("tiny.parquet", "train")
    training, held = (images[part] for part in data.split(len(images)))
    held = held[data.sample(len(held))]
    attack = PGD(eps=0.1, step=0.05, iterations=2, random_start=False)

    def right(settings, part):
        made = {k: None if v == "none" else v for k, v in settings.items()}
        maturation = Maturation(**{"population": 20, "generations": 1, "early_stop": None} | made)
        rails = RAILS(tiny[1], "input", maturation=maturation)
        rails.fit(training.x, training.y, calibration=(held.x, held.y))
        x, y = held.x[part], held.y[part]
        moved = attack(tiny[1], x, y).adversarials
        return {name: rails.predict(z, seed=0) == y for name, z in (("none", x), ("pgd", moved))}

    for trial in trials:
        assert trial["right"] == {k: int(v.sum()) for k, v in right(trial["settings"], slice(0, 10)).items()}
    first, best = (right(one["settings"], slice(10, 22)) for one in finalists[:2])
    for name in ("none", "pgd"):
        figures = finalists[1]["confirm"][name]
        assert figures["accuracy"] == pytest.approx(float(best[name].float().mean()))
        assert figures["ci95"] == list(wilson(int(best[name].sum()), 12))
        assert figures["gain"] == pytest.approx(100 * float(best[name].float().mean() - first[name].float().mean()))
        assert figures["p"] == mcnemar(best[name], first[name])

    readme = Path("r/README.md").read_text()
    head = "| trial | neighbours | mutation rate | plasma | crossover | clean, trials | PGD, trials | clean, confirm |"
    assert head in readme
    assert "### Search: What suits digits" in readme
    assert "| 0, the start | 2 | 0.15 | 0.05 | affinity |" in readme
    assert "5 trials (TPE of optuna" in readme
    assert "first 10 images of the validation split" in readme
    assert "search-tuned.png" in readme
    assert Path("r/figures/search-tuned.png").read_bytes().startswith(b"\x89PNG")
    assert Path("r/search.html").read_text().count("data:image/svg+xml") == 1


def keys(folder):
    return [json.loads(line)["key"] for line in Path(f"{folder}/parts.jsonl").read_text().splitlines()]


def test_an_interrupted_search_continues_to_the_same_end(run, finished, monkeypatch):
    shutil.copytree(finished("search", "--report") / "whole", "whole")
    shutil.copy(finished("search", "--report") / "r" / "search.json", "whole.json")
    add = Journal.add
    for last in (7, 30):

        def dies(self, key, value, last=last):
            add(self, key, value)
            if len(self._parts) == last:
                raise OSError("killed")

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "add", dies)
            code, _, err = run("--study", "search.toml", "--out", "cut", "--json", "cut.json")
            assert (code, "killed" in err) == (2, True)
        assert len(keys("cut")) == last
    code, _, err = run("--study", "search.toml", "--out", "cut", "--json", "cut.json")
    assert code == 0, err
    assert "parts: tuned" in err
    assert keys("cut") == keys("whole")
    assert searches("cut.json") == searches("whole.json")

    # More trials continue from those that are kept: one trial, three finalists and the whole are new at most.
    text = Path("search.toml").read_text()
    Path("search.toml").write_text(text.replace("trials = 5", "trials = 6"))
    assert run("--study", "search.toml", "--out", "cut", "--json", "more.json")[0] == 0
    assert searches("more.json")[0]["trials"][:5] == searches("whole.json")[0]["trials"]
    assert 0 < len(keys("cut")) - len(keys("whole")) <= 2 * 3 + 3 * 2 * 3 + 1
    Path("search.toml").write_text(text)

    # What is whole is all that a report needs.
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run("--study", "search.toml", "--out", "whole", "--json", "again.json")[0] == 0
    assert searches("again.json") == searches("whole.json")


def test_a_missing_optuna_is_told_before_any_work(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = run("--study", "search.toml", "--out", "work")
    assert code == 2
    assert "this needs optuna: pip install 'immunonet[search]'" in err
    assert not Path("work/parts.jsonl").exists()


def test_a_repertoire_too_small_for_the_space_is_told_before_any_work(run):
    Path("search.toml").write_text(Path("search.toml").read_text().replace("high = 6", "high = 60"))
    code, _, err = run("--study", "search.toml", "--out", "work")
    assert code == 2
    assert "neighbours=60 is more than the" in err
    assert not Path("work/parts.jsonl").exists()


def shorter(text):
    return text.replace("trials = 5\nfinalists = 2", "trials = 2\nfinalists = 1")


def test_a_small_validation_split_is_shared_out(run):
    text = Path("search.toml").read_text()
    Path("search.toml").write_text(
        shorter(text).replace("images = 10\n", "images = 200\n").replace("confirm = 12", "confirm = 100")
    )
    assert run("--study", "search.toml", "--json", "r.json")[0] == 0
    (found,) = searches("r.json")
    assert (found["images"], found["confirm"]) == ([0, 16], [16, 24])


def test_the_cells_of_a_hidden_layer_are_searched(run):
    text = Path("search.toml").read_text()
    found = []
    for hidden in ("false", "true"):
        changed = text.replace('layers = ["input"]\nimages = 10\nconfirm', 'layers = ["conv2:2"]\nimages = 10\nconfirm')
        Path("search.toml").write_text(shorter(changed).replace("settings = {", f"settings = {{ hidden = {hidden},"))
        assert run("--study", "search.toml", "--json", "r.json")[0] == 0
        found += searches("r.json")
    assert [one["hidden"] for one in found] == [False, True]
    assert found[0]["trials"] != found[1]["trials"]
    assert "layer conv2:2, cells there" in Path("README.md").read_text()


@pytest.mark.parametrize(
    ("score", "gains", "p", "said"),
    [
        (0.5, (5, 5), (0.001, 0.001), "No trial was better than the start, even on the images of the trials"),
        (0.6, (-1, 1), (0.9, 0.8), "clean -1.00 points (p 0.9), PGD +1.00 points (p 0.8), McNemar's test: it does not"),
        (0.6, (1, 1), (0.9, 0.04), "these images do not show that it beats the start"),
        (0.6, (-1, 5), (0.001, 0.001), "these images do not show that it beats the start"),
        (0.6, (1, 5), (0.9, 0.02), "it beats the start (PGD)"),
    ],
)  # fmt: skip
def test_what_is_said_of_the_best_follows_its_confirmation(run, score, gains, p, said):
    confirm = {
        name: {"accuracy": 0.5, "ci95": [0.4, 0.6], "gain": gain, "p": value}
        for name, gain, value in zip(("none", "pgd"), gains, p, strict=True)
    }
    one = {"settings": {"plasma": 0.1}, "right": {"none": 5, "pgd": 5}, "confirm": confirm}
    entry = {
        "name": "s", "title": "S", "base": "plain", "layers": ["input"], "hidden": False, "attacks": ["none", "pgd"],
        "space": {"plasma": None}, "sampler": "TPE", "seed": 0, "images": [0, 10], "confirm": [10, 20], "trials": [],
        "finalists": [one | {"trial": 0, "score": 0.5}, one | {"trial": 3, "score": score}],
    }  # fmt: skip
    study = {"remark": "", "notes": [], "curves": []}
    nothing = {name: [] for name in ("results", "targets", "pairs", "learning", "sensing", "hardening")}
    assert said in told(nothing | {"study": study, "search": [entry]}).text[-1]
    alone = entry | {"finalists": entry["finalists"][:1]}
    assert "No trial was better" in told(nothing | {"study": study, "search": [alone]}).text[-1]

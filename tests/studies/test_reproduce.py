"""`immunonet reproduce`: a study end to end, killed, changed, with a defence of one's own, and refused."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier

from immunonet import RAILS, DkNN, Maturation, _store, data, zoo
from immunonet.attacks import PGD
from immunonet.cli.common import resolve_dataset
from immunonet.defences.answers import Answer, Sense
from immunonet.defences.base import REGISTRY, Defence
from immunonet.report import studies as report
from immunonet.statistics import mcnemar
from immunonet.studies import NAMES


def record(path):
    """Return a study's JSON without what differs from run to run."""
    found = json.loads(Path(path).read_text())
    for row in found["results"]:
        del row["seconds_per_image"]
    del found["command"]
    return found


def by_key(found, experiment="main"):
    rows = [row for row in found["results"] if row["settings"]["experiment"] == experiment]
    return {(r["defence"], " ".join(r["settings"]["layers"]), r["attack"]): r for r in rows}


def test_a_study_from_raw_data_to_tables_and_figures(run, tiny):
    code, out, err = run("--study", "digits.toml", "--json", "results/digits.json", "--report", "--out", "work")
    assert code == 0, err
    found = json.loads(Path("results/digits.json").read_text())
    assert "Main table" in out
    assert "parts: hardening" in err

    # Trained by the recipe, since the study names no weights.
    (recipe,) = Path("work/weights").glob("plain-*.json")
    net = zoo.build("digits")
    assert len(zoo.load_weights(net, recipe.with_suffix(".safetensors"))["history"]) == 3

    rows = by_key(found)
    kinds = ("knn", "dknn", "dknn-tuned", "rails-authors", "rails-paper", "rails")
    assert {(d, at, a) for d, at, a in rows if a == "pgd"} == {
        ("cnn", "", "pgd"),
        *((kind, at, "pgd") for kind in kinds for at in ("input", "conv1")),
        ("rails-authors", "conv2 pool", "pgd"),
    }
    assert all({"layers", "model", "slice"} <= row["settings"].keys() for row in found["results"])
    assert rows["rails", "input", "pgd"]["seeds"] == [0, 1]
    assert rows["rails-authors", "input", "pgd"]["settings"]["maturation"][0]["crossover"] == "authors"

    assert rows["rails-authors", "conv2 pool", "pgd"]["settings"]["space"] == "conv1"
    assert rows["rails", "conv2:2", "none"]["settings"]["space"] == "conv2:2"
    assert "RAILS, T 40, G 2, cells there" in Path("results/README.md").read_text()

    # The same answers as by hand.
    images, test = (resolve_dataset("tiny.parquet", split) for split in ("train", "test"))
    training, held = (images[part] for part in data.split(len(images)))
    asked = test[data.sample(len(test))]
    x, y = asked.x[:12], asked.y[:12]
    assert rows["cnn", "", "none"]["settings"]["slice"] == {"sample": [12, 60], "seed": 0}
    moved = PGD(eps=1 / 8, step=1 / 32, iterations=2, random_start=False)(net, x[:8], y[:8]).adversarials
    tensors = load_file("results/digits.safetensors")
    places = {
        (r["defence"], " ".join(r["settings"]["layers"]), r["attack"], r["settings"]["experiment"]): i
        for i, r in reversed(list(enumerate(found["results"])))
    }

    def correct(*key):
        return tensors[f"row-{places[(*key, 'main')]}"]

    assert len(tensors) == len(found["results"])
    dknn = DkNN(net, "conv1", neighbours=75).fit(training.x, training.y, calibration=(held.x, held.y))
    assert torch.equal(correct("dknn", "conv1", "pgd")[0, :8], dknn.predict(moved) == y[:8])
    rails = RAILS(net, "input", maturation=Maturation(population=40, generations=2, neighbours=2))
    rails.fit(training.x, training.y, calibration=(held.x, held.y))
    assert torch.equal(correct("rails", "input", "none")[1, :8], rails.predict(x[:8], seed=1) == y[:8])
    k = rows["knn", "input", "none"]["settings"]["neighbours"]
    peer = KNeighborsClassifier(k).fit(training.x.flatten(1).numpy(), training.y.numpy())
    share = (peer.predict(x.flatten(1).numpy()) == y.numpy()).mean()
    if k == 1:  # ties are ours to break
        assert rows["knn", "input", "none"]["accuracy"] == pytest.approx(share)
    chosen = [r for r in found["results"] if len(r["settings"].get("tuning", {}).get("candidates", ())) > 1]
    assert {r["defence"] for r in chosen} == {"dknn-tuned"}
    assert all(r["settings"]["layers"] in (["input"], ["input", "conv1"]) for r in chosen)

    hidden = RAILS(
        net,
        ["conv2", "pool"],
        maturation=Maturation.authors("mnist", population=20, generations=1, neighbours=2),
        space="conv1",
        cell_bounds=(-5, 5),
    ).fit(training.x, training.y, calibration=(held.x, held.y))
    assert torch.equal(correct("rails-authors", "conv2 pool", "none")[0], hidden.predict(x[:8], seed=0) == y[:8])

    pair = next(p for p in found["pairs"] if (p["defence"], p["over"], p["attack"], p["layers"]) == (
        "rails", "dknn", "pgd", ["conv1"]))  # fmt: skip
    a, b = correct("rails", "conv1", "pgd"), correct("dknn", "conv1", "pgd")[0]
    assert pair["gain"] == pytest.approx(100 * float(a.double().mean() - b.double().mean()))
    assert pair["p"] == mcnemar(a[0], b)

    eps = {r["settings"]["value"]: r for r in found["results"] if r["settings"]["experiment"] == "eps"}
    assert set(eps) == {0, 1 / 16, 1 / 8}
    assert eps[1 / 16]["settings"]["attack"]["step"] == 1 / 64
    assert eps[0]["settings"]["split"] == "validation"
    crossovers = [r for r in found["results"] if r["settings"]["experiment"] == "crossover"]
    assert {r["settings"]["maturation"][0]["crossover"] for r in crossovers} == {"affinity", "authors", None}

    (learning,) = found["learning"]
    assert [len(curve["entropy"]) for curve in learning["curves"]] == [3, 3]
    assert all(0 <= share <= 1 for curve in learning["curves"] for share in curve["true_share"])
    (sensing,) = found["sensing"]
    assert {r["stranger"] for r in sensing["rows"]} == {"pgd", "noise", "digits"}
    for row in sensing["rows"]:  # the curve that is kept has nearly the area that was measured
        area = float(np.trapezoid(row["true_alarms"], np.linspace(0, 1, len(row["true_alarms"]))))
        assert area == pytest.approx(row["auc"], abs=0.03)
    (hardening,) = found["hardening"]
    assert hardening["cells"] == 12
    assert [r["n"] for r in hardening["rows"]] == [6] * 6

    assert [t["status"] for t in found["targets"]] == ["least", "missed", "not measured"]
    best = {
        r["settings"]["value"][0]: r["accuracy"] for r in found["results"] if r["settings"]["experiment"] == "layers"
    }
    assert set(best) == {"input"}
    assert found["targets"][1]["layers"] == ["input"]  # of those in the main table

    page = Path("results/digits.html").read_text()
    assert page.count("data:image/svg+xml") == 6
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "Tiny: 60 test images." in page
    assert "A note." in page
    for name in ("eps", "crossover", "layers", "repertoire", "learning", "sensing"):
        assert Path(f"results/figures/digits-{name}.png").read_bytes().startswith(b"\x89PNG")
    readme = Path("results/README.md").read_text()
    assert "| plain | conv1 | RAILS, paper (reconstructed), T 20, G 1 |" in readme
    assert "figures/digits-eps.png" in readme
    assert Path("work/table.md").read_text() in readme
    assert "| 200.00 points or 200% of the errors | 300% of the errors |" in readme

    # Told again from the JSON alone.
    Path("results/README.md").unlink()
    report.write_readme(Path("results"))
    assert Path("results/README.md").read_text() == readme


def test_a_voice_has_a_line_of_its_own():
    settings = {
        "base": "plain",
        "layers": ["input"],
        "maturation": [{"population": 20, "generations": 3}],
        "repertoire": 9,
    }
    row = {"defence": "rails", "attack": "pgd", "eps": 0.1, "norm": "linf", "n": 5, "seeds": [0], "ci95": [0, 1]}
    rows = [
        row | {"accuracy": accuracy, "settings": settings | extra}
        for accuracy, extra in ((0.5, {}), (0.7, {"voice": 0.25}))
    ]
    _, *body = report._main(rows)
    assert [line[2:4] for line in body] == [
        ("RAILS, T 20, G 3", "0.500 (0.000 to 1.000)"),
        ("RAILS, T 20, G 3, voice 0.25", "0.700 (0.000 to 1.000)"),
    ]


def test_a_killed_run_continues_to_the_same_tables(run, finished):
    whole = finished("small")
    # It dies without a word, while its fourth part is written.
    dying = """
import os, signal, sys
from immunonet.cli import main
from immunonet.evaluation.journal import Journal

add, kept = Journal.add, []

def dies(self, key, value):
    if len(kept) == 3:
        with open(self.path, "a") as file:
            file.write('{"key": "cut o')
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, key, value)
    kept.append(key)

Journal.add = dies
main(sys.argv[1:])
"""
    command = ["reproduce", "--study", "small.toml", "--out", "cut", "--json", "cut.json"]
    assert subprocess.run([sys.executable, "-c", dying, *command], check=False).returncode == -signal.SIGKILL
    assert not Path("cut.json").exists()
    before = Path("cut/parts.jsonl").read_text().splitlines()[:-1]
    code, _, err = run(*command[1:])
    assert code == 0
    assert "continuing: 3 of" in err
    after = Path("cut/parts.jsonl").read_text().splitlines()
    assert after[:3] == before
    assert {json.loads(line)["key"] for line in after} == {
        json.loads(line)["key"] for line in (whole / "whole" / "parts.jsonl").read_text().splitlines()
    }
    assert record("cut.json") == record(whole / "r" / "small.json")
    assert torch.equal(load_file("cut.safetensors")["row-4"], load_file(whole / "r" / "small.safetensors")["row-4"])


def test_what_other_settings_change_is_measured_anew_and_the_rest_is_kept(run, finished):
    shutil.copytree(finished("small") / "whole", "work")
    shutil.copy(finished("small") / "r" / "small.json", "first.json")
    text = Path("small.toml").read_text()
    kept = Path("work/parts.jsonl").read_text()
    for old, new, same in (
        ("eps = 0.1\nstep", "eps = 0.2\nstep", {"none"}),
        ("population=20", "population=40", {"cnn", "dknn-tuned"}),
        ("[1, 3]", "[5]", {"cnn", "rails"}),
    ):
        Path("small.toml").write_text(text.replace(old, new))
        code, _, err = run("--study", "small.toml", "--out", "work", "--json", "again.json")
        assert code == 0, err
        assert "continuing: " in err
        assert run("--study", "small.toml", "--out", "fresh", "--json", "fresh.json")[0] == 0
        assert record("again.json") == record("fresh.json")
        shutil.rmtree("fresh")
        rows, first = (by_key(record(name)) for name in ("again.json", "first.json"))
        assert {key for key in rows if rows[key] == first[key]} == {key for key in rows if same & set(key)}
    Path("small.toml").write_text(text)
    assert run("--study", "small.toml", "--out", "work", "--json", "again.json")[0] == 0
    assert record("again.json") == record("first.json")
    assert Path("work/parts.jsonl").read_text().startswith(kept)


class Templates(Defence):
    """The class whose mean image is nearest, blurred: a kind of one's own, which is fitted and senses."""

    kind, title = "templates", "Templates"

    def __init__(self, model, *, bounds=(0.0, 1.0), sharpness=1.0):
        super().__init__(model, bounds=bounds)
        self.sharpness = sharpness

    def settings(self):
        return super().settings() | {"sharpness": self.sharpness}

    def fit(self, x=None, y=None, calibration=0.05):
        self.classes = int(y.max()) + 1
        self.means = torch.stack([x[y == label].flatten(1).mean(0) for label in range(self.classes)])
        return self

    def tensors(self):
        return {"means": self.means}

    def restore(self, tensors):
        self.means = tensors["means"]

    def answer(self, x, seed=None):
        far = torch.cdist(x.flatten(1), self.means)
        near = far.amin(1)
        logs = (-self.sharpness * far).log_softmax(1)
        sense = Sense(distance=near, p_value=torch.exp(-near), foreign=near > 3)
        return Answer(logs.argmax(1), logs, sense, logs.exp().amax(1))


def test_a_kind_of_ones_own_goes_through_a_study_and_its_report(run, monkeypatch):
    monkeypatch.setitem(REGISTRY, "templates", Templates)
    text = Path("small.toml").read_text().split("[[learning]]")[0]
    text = text.replace('"rails"]', '"rails", "templates", "soft"]')
    text = text.replace(
        "[defences]", '[defences]\nsoft = { spec = "templates sharpness=0.1", title = "Soft templates" }'
    )
    common = 'base = "plain"\nlayers = ["input"]\nimages = 8\n'
    text += f"""
[[curves]]
name = "sharpness"
vary = "sharpness"
values = [0.5, 1]
images = 6
defences = ["templates"]
[[sensing]]
name = "sensing"
strangers = ["noise"]
defences = ["templates"]
{common}
[[hardening]]
name = "hardening"
defences = ["templates"]
{common}
[[targets]]
text = "Mine"
base = "plain"
defence = "templates"
over = "cnn"
layers = ["input"]
least = -100
"""
    Path("small.toml").write_text(text)
    code, _, err = run("--study", "small.toml", "--out", "work", "--json", "r.json", "--report")
    assert code == 0, err
    found = record("r.json")
    rows = by_key(found)
    images, test = (resolve_dataset("tiny.parquet", split) for split in ("train", "test"))
    training, asked = images[data.split(len(images))[0]], test[data.sample(len(test))][:12]
    mine = Templates(zoo.build("digits")).fit(training.x, training.y)
    assert rows["templates", "", "none"]["correct"] == int((mine.predict(asked.x) == asked.y).sum())
    assert rows["templates", "", "none"]["settings"]["repertoire"] == len(training)
    assert rows["soft", "", "pgd"]["settings"]["sharpness"] == 0.1
    assert {r["settings"]["sharpness"] for r in found["results"] if r["settings"]["experiment"] == "sharpness"} == {
        0.5,
        1,
    }
    assert {pair["over"] for pair in found["pairs"]} == {"dknn-tuned"}  # the others look at no layers
    assert found["targets"][0]["status"] == "least"
    assert [row["defence"] for row in found["hardening"][0]["rows"]] == ["templates"] * 2
    readme = Path("README.md").read_text()
    assert "| plain | - | Templates |" in readme
    assert "| plain | - | Soft templates |" in readme
    assert "Templates" in Path("r.html").read_text()

    # Drawn again from the JSON alone.
    files = [Path("r.html"), Path("README.md"), *Path("figures").iterdir()]
    assert sorted(file.name for file in files[2:]) == ["small-sensing.png", "small-sharpness.png"]
    drawn = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    report.main(["r.json"])
    assert [file.read_bytes() for file in files] == drawn


def test_a_readme_of_ones_own_is_left_alone(run):
    Path("README.md").write_text("# Mine\n")
    code, out, _ = run("--study", "small.toml", "--json", "r.json")
    assert code == 0
    assert "README.md is not one of these reports, and was left as it is" in out
    assert Path("README.md").read_text() == "# Mine\n"
    assert Path("runs/small/table.md").exists()


def test_another_dataset_has_networks_of_its_own(run, monkeypatch):
    load = data.load
    monkeypatch.setattr(data, "load", lambda *which, **options: load(*which, **options)[:200])
    hard = '[bases.hard]\nstart = "plain"\ntraining = { epochs = 1, adversarial = { eps = "1/8", iterations = 1 } }\n'
    text = Path("small.toml").read_text().split("[[learning]]")[0]
    text = text.replace('"net.safetensors"', '"net.safetensors"\ntraining = { epochs = 1 }\n' + hard)
    Path("small.toml").write_text("training = 60\n" + text + '[remarks]\ndigits = "All {n}."\n')
    code, _, err = run("--study", "small.toml", "--dataset", "digits", "--json", "r.json")
    assert code == 0, err
    assert "training plain" in err
    assert "training hard" in err
    found = record("r.json")
    assert found["study"]["remark"] == "All 200."
    images = data.load("digits", "train")
    images = images[data.split(200)[0]]
    learnt = images[data.sample(len(images), 60)]
    recipes = [json.loads(path.read_text()) for path in Path("runs/small/weights").glob("*.json")]
    assert [recipe["images"] for recipe in recipes] == [_store.digest([learnt.x, learnt.y])] * 2
    assert {row["dataset"] for row in found["results"]} == {"digits"}
    assert len({row["settings"]["weights"] for row in found["results"]}) == 2
    shutil.rmtree("runs/small/tensors")
    Path("runs/small/parts.jsonl").unlink()
    assert "trained" not in run("--study", "small.toml", "--dataset", "digits", "--json", "again.json")[2]
    assert record("again.json") == found


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], f"give STUDY, one of {', '.join(NAMES)}, or --study FILE.toml, and not both"),
        (["mnist", "--study", "small.toml"], "and not both"),
        (["imagenet"], f"STUDY must be one of {', '.join(NAMES)}, got 'imagenet'"),
        (["--study", "none.toml"], "none.toml is no study"),
        (["--study", "small.toml", "--dataset", "nothing"], "there is no 'nothing'"),
        (["--study", "small.toml", "--device", "tpu9"], "--device must be one of"),
    ],
)
def test_a_mistake_is_told_in_one_line(run, arguments, told):
    code, out, err = run(*arguments)
    assert code == 2
    assert told in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_layer_that_is_not_there_is_told_before_any_work(run):
    Path("small.toml").write_text(Path("small.toml").read_text().replace('["input"]', '["input", "conv9"]', 1))
    code, _, err = run("--study", "small.toml", "--out", "work")
    assert code == 2
    assert "layers='conv9' is no submodule" in err
    assert not Path("work/parts.jsonl").exists()

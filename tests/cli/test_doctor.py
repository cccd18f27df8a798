"""`immunonet doctor`: what it tells of a machine that is well, and of one that is not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from immunonet import RAILS
from immunonet.cli import doctor


def found_alone(name: str) -> None:
    """Stand in for `import_module`: a module is looked for, which takes less than to import all that is installed."""
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(name)


def test_a_machine_that_is_well(command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "importlib", SimpleNamespace(import_module=found_alone))
    code, out, err = command("doctor", "--json", "doctor.json")
    assert (code, err) == (0, "")
    assert out.endswith("all that is installed works\n")
    found = {one["name"]: one for one in json.loads((tmp_path / "doctor.json").read_text())["results"]}
    assert {"python", "torch", "gpu", "threads", "extra memory", "data", "save and load"} <= found.keys()
    assert all(one["works"] for one in found.values())
    assert not {"extra dev", "extra bench"} & found.keys()


def test_a_missing_extra_is_not_broken_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_required", lambda: {"core": ["numpy"], "more": ["no-such-package"]})
    here, missing = doctor._extras()
    assert (here.works, here.do) == (True, "")
    assert (missing.works, missing.do) == (True, "pip install 'immunonet[more]'")


def test_a_package_that_cannot_be_imported_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_required", lambda: {"more": ["numpy"]})
    monkeypatch.setitem(doctor._MODULES, "numpy", "immunonet.no_such_module")
    (found,) = doctor._extras()
    assert not found.works
    assert "ModuleNotFoundError" in found.found


def test_what_fails_gives_exit_code_one(command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(RAILS, "save", failing)
    monkeypatch.setattr(doctor, "_extras", lambda: [])
    code, out, err = command("doctor", "--data", tmp_path / "nowhere")
    assert code == 1
    assert "broken  save and load: RuntimeError: no room" in out
    assert "nowhere is not there" in out
    assert err == "broken: data, save and load\n"


def test_a_fit_that_fails_is_told_like_what_else_is_broken(command, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(RAILS, "fit", failing)
    monkeypatch.setattr(doctor, "_extras", lambda: [])
    code, out, err = command("doctor")
    assert (code, err) == (1, "broken: fit and respond\n")
    assert "broken  fit and respond: RuntimeError: no room" in out


def test_wrong_answers_are_broken() -> None:
    found = doctor._tried("answers", lambda: False)
    assert (found.works, found.found) == (False, "gives wrong answers")


def test_datasets_of_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "mnist-train.parquet").touch()
    assert doctor._datasets(tmp_path).found == f"{tmp_path}: mnist"

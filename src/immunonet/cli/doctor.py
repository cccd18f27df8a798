"""`immunonet doctor`."""

from __future__ import annotations

import importlib
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from immunonet import RAILS, Maturation, data
from immunonet._seeds import seeded
from immunonet.cli import common
from immunonet.evaluation import records
from immunonet.immune import backend

# The modules of packages that are called otherwise.
_MODULES = {"pillow": "PIL", "scikit-learn": "sklearn"}
# Extras for those who work on the package itself.
_OWN = ("dev", "bench", "docs")


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, whether it `works`, and what to `do` where it does not or is missing."""

    name: str
    found: str
    works: bool = True
    do: str = ""


def doctor(data_dir: common.DataOption = None, json: common.JsonOption = None) -> None:
    """Tell what is installed, what is missing and how to get it, and whether an immune response works here.

    It takes seconds; exit code 1 says that something is broken, which a missing extra is not.
    """
    common.prepare(None, json)
    findings: list[Finding] = []
    for finding in (*_machine(), *_extras(), _datasets(data_dir), *_tests()):
        mark = "broken" if not finding.works else "      " if finding.do == "" else "absent"
        typer.echo(f"{mark}  {finding.name}: {finding.found}" + (f" -> {finding.do}" if finding.do else ""))
        findings.append(finding)
    common.write_results(json, [asdict(finding) for finding in findings])
    if broken := [finding.name for finding in findings if not finding.works]:
        common.note(f"broken: {', '.join(broken)}", style="red")
        raise typer.Exit(1)
    typer.echo("all that is installed works")


def _machine() -> Iterator[Finding]:
    """Yield versions, processor and threads, and GPUs."""
    here = records.environment()
    for name in ("immunonet", "python", "torch", "platform", "cpu", "threads"):
        yield Finding(name, str(here[name]))
    yield Finding("numpy", metadata.version("numpy"))
    yield Finding("gpu", here.get("cuda", "none"))


def _extras() -> Iterator[Finding]:
    """Yield per extra its packages with their versions, or the command that installs what is missing."""
    for extra, packages in _required().items():
        found, works, missing = [], True, False
        for package in packages:
            version, error = _imported(package)
            found.append(f"{package} {version or 'missing'}{error and f' ({error})'}")
            works, missing = works and not error, missing or version is None
        do = f"pip install 'immunonet[{extra}]'" if missing or not works else ""
        yield Finding(f"extra {extra}", ", ".join(found), works, do)


def _required() -> dict[str, list[str]]:
    """Return the packages that each extra brings by itself, as the installed distribution names them."""
    found: dict[str, list[str]] = {}
    for line in metadata.requires("immunonet") or ():
        package, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        name = re.match(r"[\w.-]+", package)
        if extra and name and extra[1] not in _OWN and name[0] != "immunonet":
            found.setdefault(extra[1], []).append(name[0])
    return found


def _imported(package: str) -> tuple[str | None, str]:
    """Return a package's version, None if it is not installed, and why it cannot be imported, "" if it can."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return None, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a package says of its own is nothing broken
            importlib.import_module(_MODULES.get(package, package.replace("-", "_")))
    except Exception as error:  # whatever a broken package raises
        return version, f"{type(error).__name__}: {' '.join(str(error).split())}"
    return version, ""


def _datasets(folder: Path | None) -> Finding:
    """Return which datasets lie in the folder of `--data` or IMMUNONET_DATA."""
    if folder is None:
        return Finding("data", "no folder: datasets come from the hub", do="set IMMUNONET_DATA or give --data")
    names = [name for name in data.DATASETS if (folder / f"{name}-train.parquet").is_file()]
    there = folder.is_dir()
    found = f"{folder}: {', '.join(names) or 'no dataset'}" if there else f"{folder} is not there"
    return Finding("data", found, there, "" if there else "set IMMUNONET_DATA to a folder that is there")


def _tests() -> Iterator[Finding]:
    """Yield how each part of an immune response did on images made for it."""
    torch_only = backend.fused_for(torch.zeros(1)) is None
    yield Finding("loops", "torch's operators" if torch_only else "numba's fused loops")
    made: list[Any] = []

    def answers() -> bool:
        made.extend(_fitted())
        return bool((made[0].respond(made[1]).labels == made[2]).float().mean() >= 0.9)

    yield _tried("fit and respond", answers)
    if not made:
        return
    rails, x, _ = made
    yield _tried("same seed, same answer", lambda: torch.equal(rails.respond(x).votes, rails.respond(x).votes))
    yield _tried("save and load", lambda: _kept(rails, x))


def _fitted() -> tuple[RAILS, Tensor, Tensor]:
    """Return a RAILS on small images of ten classes, in noise, and some that it has not seen with their labels."""
    with seeded(0):
        y = torch.arange(600) % 10
        x = 0.7 * torch.rand(10, 1, 8, 8)[y] + 0.3 * torch.rand(600, 1, 8, 8)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    rails = RAILS(net, "1", maturation=Maturation(population=200, generations=10), seed=0).fit(x[:500], y[:500])
    return rails, x[500:], y[500:]


def _kept(rails: RAILS, x: Tensor) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        rails.save(folder)
        return torch.equal(RAILS.load(folder, rails.model).respond(x).votes, rails.respond(x).votes)


def _tried(name: str, works: Callable[[], bool]) -> Finding:
    start = time.perf_counter()
    try:
        right = works()
    except Exception as error:  # a doctor tells what is wrong, whatever it is
        return Finding(name, f"{type(error).__name__}: {' '.join(str(error).split())}", False, "IMMUNONET_DEBUG=1")
    how = f"{time.perf_counter() - start:.1f} s" if right else "gives wrong answers"
    return Finding(name, how, right)

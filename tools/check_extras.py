"""Install the built wheel with each extra alone, in an environment of its own, and do one small thing there.

`python -m build && python tools/check_extras.py dist/*.whl` checks all extras, `... core memory` some. What an extra
brings must do, and what it lacks must be asked for by the name of the extra that has it. An environment takes about
a gigabyte and a minute, and is removed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent

FITTED = """
import torch
from immunonet import RAILS, Maturation
torch.manual_seed(0)
y = torch.arange(300) % 3
x = torch.rand(3, 1, 8, 8)[y] * 0.8 + torch.rand(300, 1, 8, 8) * 0.2
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3)).eval()
rails = RAILS(net, "1", maturation=Maturation(population=300), seed=0).fit(x, y)
"""

REFUSED = """
def refused(extra, function, *args, **settings):
    try:
        function(*args, **settings)
    except ImportError as error:
        assert f"immunonet[{extra}]" in str(error), error
    else:
        raise AssertionError(f"{extra} is not installed, but was not asked for")
"""

# What is done with each extra alone.
PROGRAMS = {
    "core": """
import tempfile
import immunonet
from immunonet import Memory, data, evaluate
assert rails.predict(x[:9]).equal(y[:9])
folder = tempfile.mkdtemp()
rails.save(folder)
assert RAILS.load(folder, net).predict(x[:9]).equal(y[:9])
evaluation = evaluate(lambda inputs: net(inputs).log_softmax(1), x[:3], y[:3], base=net, eps=0.1)
refused("report", evaluation.to_html, "page.html")
refused("memory", Memory)
refused("memory", Memory, folder)
refused("data", data.load, "mnist", "test", directory=folder)
refused("cli", data.load, "digits", "test")
refused("cluster", importlib.import_module("immunonet.evaluation.cluster").Cluster, "auto")
refused("cli", importlib.import_module, "immunonet.studies")
told = subprocess.run([program("immunonet"), "--help"], capture_output=True, text=True)
assert told.returncode == 2 and "immunonet[cli]" in told.stderr, told
""",
    "data": """
import io, tempfile
from pathlib import Path
import pyarrow, pyarrow.parquet
from PIL import Image
from immunonet import data
def png(shade):
    buffer = io.BytesIO()
    Image.new("L", (8, 8), shade).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}
file = Path(tempfile.mkdtemp()) / "shades.parquet"
rows = {"image": [png(shade) for shade in (0, 120, 240)], "label": [0, 1, 2]}
pyarrow.parquet.write_table(pyarrow.table(rows), file)
assert data.read(file).x.shape == (3, 1, 8, 8)
""",
    "report": """
import tempfile
from immunonet import evaluate, report
response = rails.respond(x[:3])
report.response_figure(response, x[:3]).savefig(tempfile.mkdtemp() + "/response.png")
evaluation = evaluate(lambda inputs: net(inputs).log_softmax(1), x[:3], y[:3], base=net, eps=0.1)
evaluation.to_html(tempfile.mkdtemp() + "/page.html")
""",
    "fast": """
from immunonet.immune import backend
assert backend.fused_for(x) is not None
assert rails.predict(x[:9]).equal(y[:9])
""",
    "search": """
import optuna
refused("cli", importlib.import_module, "immunonet.studies")
""",
    "cluster": """
from immunonet.evaluation.cluster import Cluster
Cluster("auto").close()
""",
    "memory": """
import tempfile
from immunonet import Memory
for folder in (None, tempfile.mkdtemp() + "/memory"):
    remembering = rails.with_settings(memory=Memory(folder))
    ids = remembering.memory.remember(remembering.respond(x[:4]), x[:4])
    remembering.memory.confirm(ids, y[:4])
    assert remembering.respond(x[:4]).recalled.all()
""",
    "cli": """
import os, tempfile
os.chdir(tempfile.mkdtemp())
for words in (["--help"], ["demo", "--out", "demo"]):
    subprocess.run([program("immunonet"), *words], check=True)
""",
}

PREPARED = """
import importlib, subprocess, sys, warnings
from pathlib import Path
warnings.simplefilter("error")
program = lambda name: str(Path(sys.executable).parent / name)
"""


def check(wheel: Path, extra: str) -> bool:
    """Return whether the wheel, installed with one extra alone, does what that is for."""
    with tempfile.TemporaryDirectory(prefix=f"immunonet-{extra}-") as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "bin", "python"))
        what = str(wheel) if extra == "core" else f"{wheel}[{extra}]"
        pip = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-compile",
            "--constraint",
            str(ROOT / "constraints.txt"),
            what,
        ]
        subprocess.run(pip, check=True)
        told = subprocess.run([python, "-I", "-c", PREPARED + REFUSED + FITTED + PROGRAMS[extra]], cwd=folder)
    return told.returncode == 0


def main() -> None:
    """Check the extras that are named, or all, and exit with 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("extras", nargs="*", choices=PROGRAMS, default=list(PROGRAMS), metavar="EXTRA")
    given = parser.parse_args()
    failed = []
    for extra in given.extras:
        works = check(given.wheel.resolve(), extra)
        failed += [] if works else [extra]
        print(f"{extra}: {'works' if works else 'FAILED'}", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

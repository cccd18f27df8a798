"""A tiny dataset written as Parquet, a network for it, and the command run in a folder of its own."""

from __future__ import annotations

import functools
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from immunonet import data, zoo
from immunonet.cli import main
from immunonet.report.style import Shown

HERE = Path(__file__).parent

read_once = functools.cache(data.read)


@pytest.fixture(scope="session")
def tiny():
    """The bytes of a Parquet file of 300 handwritten digits, and a network trained on some of them."""
    images = data.load("digits", "train")[:300]
    rows = []
    for x in images.x:
        file = io.BytesIO()
        Image.fromarray((x[0] * 255).round().byte().numpy()).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    parquet = io.BytesIO()
    pq.write_table(pa.table({"image": rows, "label": images.y.numpy()}), parquet)
    net = zoo.build("digits")
    zoo.train(net, images[:200], images[200:240], epochs=4, batch_size=32, lr=3e-3)
    return parquet.getvalue(), net


@pytest.fixture(autouse=True)
def cheaply(monkeypatch):
    """Images are decoded once for all runs, which read one file; figures are not laid out, and have few dots.

    How figures look is for the tests of the report.
    """
    savefig = Shown.savefig
    monkeypatch.setattr(data, "read", read_once)
    monkeypatch.setattr(Shown, "set_layout_engine", lambda self, *engine, **settings: None)
    monkeypatch.setattr(Shown, "savefig", lambda self, *to, **how: savefig(self, *to, **(how | {"dpi": 50})))


def furnish(tiny) -> None:
    """Put the studies of these tests into the working directory, and what they are about."""
    Path("tiny.parquet").write_bytes(tiny[0])
    zoo.save_weights(tiny[1], "net.safetensors", half=False)
    for study in HERE.glob("*.toml"):
        shutil.copy(study, study.name)


@pytest.fixture
def run(command, tiny):
    """Return a function that runs `immunonet reproduce` in tmp_path and returns (code, stdout, stderr)."""
    furnish(tiny)
    return functools.partial(command, "reproduce")


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> Callable[..., Path]:
    """The function that runs a study once: its folder, parts in `whole` and record in `r`, is to be read and copied."""

    @functools.cache
    def found(name: str, *options: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        words = ["reproduce", "--study", f"{name}.toml", "--out", "whole", "--json", f"r/{name}.json", *options]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["immunonet", *words])
            furnish(tiny)
            with pytest.raises(SystemExit) as stop:
                main(words)
        assert not stop.value.code
        return folder

    return found

"""The examples of README and of how to add something run as they stand."""

import doctest
from pathlib import Path

import pytest
import torch

from immunonet import zoo
from immunonet.cli import common
from immunonet.defences import base
from immunonet.defences.spec import Spec

ROOT = Path(__file__).parent.parent


PAGES = {"README.md": 10, "docs/tour.md": 30, "docs/use.md": 15, "docs/extending.md": 4}


@pytest.mark.parametrize(("page", "least"), PAGES.items())
def test_examples(page: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "REGISTRY", dict(base.REGISTRY))  # what they register, nobody else knows
    with torch.random.fork_rng():
        torch.manual_seed(0)
        failed, run = doctest.testfile(str(ROOT / page), module_relative=False)
    assert run >= least
    assert failed == 0


def test_descriptions_of_defences_can_be_read() -> None:
    pages = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("papers.md", "commands.md")))
    words = [word for page in pages for word in page.read_text().split("--defence ")[1:]]
    texts = [word[1:].partition('"')[0] if word[0] == '"' else word.split()[0] for word in words]
    specs = [Spec.parse(text) for text in texts if not text.endswith("`")]
    assert len(specs) >= 15
    net = zoo.build("mnist")
    for spec in specs:
        assert spec.foreign or spec.made(net, common.resolve_layer, 1000).kind == spec.kind

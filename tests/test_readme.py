"""The README's examples run as they stand."""

import doctest
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_examples() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        failed, run = doctest.testfile(str(README), module_relative=False)
    assert run >= 15
    assert failed == 0

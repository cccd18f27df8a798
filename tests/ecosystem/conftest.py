"""A small fitted RAILS that other libraries are given."""

from __future__ import annotations

import pytest
from ecosystem_nets import examples, fitted, net
from torch import Tensor

from immunonet import RAILS


@pytest.fixture(scope="session")
def rails() -> RAILS:
    return fitted(net()).eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Twelve examples that were not fitted on."""
    return examples(12, seed=5)

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from immunonet import RAILS, DkNN, attacks

from .acting import SMALL, state, unchanged
from .models import images
from .working import X, answers, fitted, together

TESTS = Path(__file__).parent.parent
# More of both were tried by hand.
CALLS, THREADS = int(os.environ.get("IMMUNONET_TEST_CALLS", "2")), 8


def test_threads_that_share_defences_and_their_network() -> None:
    net, rails, dknn = fitted()
    before, expected = state(net), answers(rails, dknn)
    plainly = net.eval()(X).detach()
    logits = attacks.FGSM()(net, X, rails.predict(X)).adversarials
    net.train()

    def ask_rails() -> None:
        for _ in range(CALLS):
            assert torch.equal(rails(X), expected[0])
            assert torch.equal(rails.respond(X).credibility, expected[1])

    def ask_dknn() -> None:
        for _ in range(CALLS):
            assert torch.equal(dknn(X), expected[2])
            assert torch.equal(torch.cat(dknn.features(X), 1), expected[3])

    def ask_network() -> None:
        for _ in range(CALLS):
            assert torch.equal(attacks.FGSM()(net, X, rails.predict(X)).adversarials, logits)

    together([ask_rails, ask_dknn, ask_network, ask_rails, ask_dknn, ask_rails, ask_dknn, ask_network][:THREADS])
    assert unchanged(before, state(net))
    assert torch.equal(net.eval()(X).detach(), plainly)


def test_threads_that_use_the_network_by_itself() -> None:
    net, rails, dknn = fitted()
    net.eval()
    expected, plainly = answers(rails, dknn), net(X).detach()

    def ask() -> None:
        for _ in range(CALLS):
            assert all(map(torch.equal, answers(rails, dknn), expected))

    def use() -> None:
        for _ in range(20 * CALLS):
            assert torch.equal(net(X).detach(), plainly)

    together([ask, use, ask, use])
    assert not net.training


def test_threads_that_fit_while_others_ask() -> None:
    x, y = images(30)
    net, rails, dknn = fitted()
    before, expected = state(net), answers(rails, dknn)

    def fit_rails() -> None:
        for _ in range(CALLS):
            again = RAILS(net, ["act1", "act2"], maturation=SMALL, seed=0).fit(x, y)
            assert torch.equal(again(X), expected[0])

    def fit_dknn() -> None:
        for _ in range(CALLS):
            assert torch.equal(DkNN(net, ["act1", "act2"], neighbours=3).fit(x, y)(X), expected[2])

    def ask() -> None:
        for _ in range(CALLS):
            assert all(map(torch.equal, answers(rails, dknn), expected))

    together([fit_rails, fit_dknn, ask])
    assert unchanged(before, state(net))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file of two defences and of what they answer."""
    _, rails, dknn = fitted()
    path = tmp_path / "defences"
    with open(path, "wb") as file:
        pickle.dump(((rails, dknn), answers(rails, dknn)), file)
    return path


def test_other_processes(written: Path) -> None:
    code = f"from hostile import working; working.answer_in_processes({str(written)!r})"
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=os.environ | {"PYTHONPATH": path})

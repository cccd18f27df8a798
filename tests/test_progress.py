"""What long work shows by itself: where somebody looks, after two seconds, and never elsewhere."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from immunonet import DkNN, _progress, evaluate, zoo
from immunonet.cli import main


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def looked_at(monkeypatch: pytest.MonkeyPatch, page: io.StringIO, patience: float = 0.0) -> io.StringIO:
    """Let what a test prints from now on be seen there, after so many seconds."""
    monkeypatch.setattr(sys, "stderr", page)
    monkeypatch.setattr(_progress, "PATIENCE", patience)
    return page


def work(given: Any = None) -> None:
    with _progress.shown(given, "fitting") as show:
        for done in (1, 2, 3):
            if show is not None:
                show(done, 3, "more that is told")


def test_a_terminal_sees_a_bar_which_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = looked_at(monkeypatch, Terminal())
    work()
    assert "fitting" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")


def test_what_takes_a_moment_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = looked_at(monkeypatch, Terminal(), 60.0)
    work()
    _progress.lines()("a line")
    assert terminal.getvalue().strip() == ""


def test_where_the_command_line_shows_it_nothing_is_shown_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    terminal = looked_at(monkeypatch, Terminal())
    zoo.save_weights(zoo.build("digits"), "net.safetensors")
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--dataset", "digits", "--weights", "net.safetensors", "--defence", "dknn input neighbours=5"])
    assert ended.value.code == 0
    assert "fitting:" not in terminal.getvalue()
    work()
    assert "fitting:" in terminal.getvalue()


def test_who_asked_to_hear_is_told_in_place_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = looked_at(monkeypatch, Terminal())
    heard: list[Any] = []
    work(lambda *told: heard.append(told))
    assert heard == [(done, 3, "more that is told") for done in (1, 2, 3)]
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("kernel", [True, False])
def test_without_a_terminal_only_a_notebook_is_shown_anything(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = types.SimpleNamespace(kernel=object()) if kernel else types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    page = looked_at(monkeypatch, io.StringIO())
    work()
    _progress.lines()("a line")
    assert ("a line" in page.getvalue()) is kernel
    assert ("fitting" in page.getvalue()) is kernel


def test_fit_and_evaluate_show_what_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = looked_at(monkeypatch, Terminal())
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    x, y = torch.rand(40, 1, 2, 2), torch.arange(40) % 2
    dknn = DkNN(net, "input", neighbours=3).fit(x, y, calibration=0.2)
    assert "fitting" in terminal.getvalue()
    evaluate(dknn, x[:2], y[:2], eps=0.1, minutes=0.05)
    assert "pgd" in terminal.getvalue()

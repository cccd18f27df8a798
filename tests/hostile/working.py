"""What threads and processes do in these tests; a spawned process imports it."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from immunonet import RAILS, DkNN

from .acting import SMALL
from .models import Normed, images, plain

X, _ = images(12, seed=1)


def fitted() -> tuple[Normed, RAILS, DkNN]:
    """Return a network in train mode, and two defences of it."""
    x, y = images(30)
    net = Normed(plain())
    net.train()
    rails = RAILS(net, ["act1", "act2"], maturation=SMALL, seed=0).fit(x, y)
    return net, rails, DkNN(net, ["act1", "act2"], neighbours=3).fit(x, y)


def answers(rails: RAILS, dknn: DkNN) -> list[Tensor]:
    return [rails(X), rails.respond(X).credibility, dknn(X), torch.cat(dknn.features(X), 1)]


def together(tasks: list[Callable[[], Any]]) -> None:
    """Run every task in a thread of its own, all at once; raise what any of them raises."""
    errors: list[BaseException] = []
    ready = threading.Barrier(len(tasks))

    def run(task: Callable[[], Any]) -> None:
        try:
            ready.wait(timeout=60)
            task()
        except BaseException as error:  # also what ends a pass of a model
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=300)
    finally:
        sys.setswitchinterval(switch)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def answer_in_process(path: str) -> None:
    """Read defences and what they should answer, and ask them, in several threads too."""
    torch.set_num_threads(1)
    with open(path, "rb") as file:
        (rails, dknn), expected = pickle.load(file)

    def ask() -> None:
        assert all(map(torch.equal, answers(rails, dknn), expected))

    ask()
    together([ask] * 3)


def answer_in_processes(path: str) -> None:
    """Do the same in a process that is forked from this one, if that can be, and then in this one."""
    with open(path, "rb") as file:
        (_, dknn), expected = pickle.load(file)
    together([lambda: dknn(X)] * 3)
    assert torch.equal(dknn(X), expected[2])
    # The loops of numba, which have not run here yet, have tests of their own.
    if "fork" in multiprocessing.get_all_start_methods():
        process = multiprocessing.get_context("fork").Process(target=answer_in_process, args=(path,))
        process.start()
        process.join(timeout=120)
        process.kill()
        assert process.exitcode == 0
    answer_in_process(path)

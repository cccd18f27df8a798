"""Which operator runs where: never a fused twin of a formula that was replaced, and answers in threads and workers."""

import ast
import hashlib
import inspect
import logging
import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch

from immunonet import RAILS, Maturation
from immunonet.immune import backend, operators

fused = pytest.importorskip("immunonet.immune.fused")


@pytest.fixture(autouse=True)
def _threads_stay():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# What the loops in fused.py were written for. Where a digest differs, bring the twin up to date first.
WRITTEN_FOR = {"offspring": "0110e800e02d99a2", "register": "3c945fe5a2b2691b"}


def formulas(functions):
    """The source of functions without comments, docstrings and layout."""
    for function in functions:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        if ast.get_docstring(tree) is not None:
            del tree.body[0]
        yield ast.unparse(tree)


@pytest.mark.parametrize("name", operators.FUSED)
def test_the_twin_was_written_for_these_formulas(name):
    assert hashlib.sha256("\n".join(formulas(operators.FUSED[name])).encode()).hexdigest()[:16] == WRITTEN_FOR[name]


@pytest.mark.parametrize("name", operators.FUSED)
def test_a_twin_names_every_function_that_its_operator_calls(name):
    functions = operators.FUSED[name]
    assert functions[0] is getattr(operators, name)
    for function in functions:
        for called in function.__code__.co_names:
            found = getattr(operators, called, None)
            assert not isinstance(found, types.FunctionType) or found in functions


@pytest.mark.parametrize(
    ("name", "replaced"), [(name, part.__name__) for name, parts in operators.FUSED.items() for part in parts]
)
def test_the_torch_path_runs_where_a_formula_was_replaced(name, replaced, monkeypatch):
    chosen = {"offspring": backend.offspring_for, "register": backend.register_for}
    other = {"offspring": "register", "register": "offspring"}[name]
    assert chosen[name](torch.zeros(1)) is getattr(fused, name)
    monkeypatch.setattr(operators, replaced, lambda *_: None)
    assert chosen[name](torch.zeros(1)) is getattr(operators, name)
    assert chosen[other](torch.zeros(1)) is getattr(fused, other)


@pytest.mark.parametrize("replaced", ["mutate", "cross", "select", "register"])
def test_a_replaced_operator_is_felt_in_the_response(replaced, conv, images, monkeypatch):
    x, y = images
    maturation = Maturation(population=60, neighbours=4, generations=2)
    rails = RAILS(conv, "input", maturation=maturation, seed=0).fit(x, y)
    antigens = (0.8 * x[:4] + 0.1).clamp(0, 1)
    plain = rails.respond(antigens)
    calls = []
    original = getattr(operators, replaced)

    def mine(*arguments):
        calls.append(replaced)
        return original(*arguments).roll(1, 0)

    monkeypatch.setattr(operators, replaced, mine)
    assert not torch.equal(rails.respond(antigens).plasma.x, plain.plasma.x)
    assert calls


def test_loops_run_in_one_thread_where_numba_has_no_others(monkeypatch, caplog):
    images, goals = torch.rand(2, 9, 1, 6, 6)
    expected = fused.register(images, goals, 0.1)

    def missing():
        raise ValueError("No threading layer could be loaded.")

    monkeypatch.setattr(fused, "SERIAL_VALUES", 0)
    monkeypatch.setattr(fused.numba.config, "NUMBA_NUM_THREADS", 2)
    monkeypatch.setattr(fused.numba, "get_num_threads", missing)
    torch.set_num_threads(2)
    fused._started.cache_clear()
    try:
        for _ in range(2):
            assert torch.equal(fused.register(images, goals, 0.1), expected)
    finally:
        fused._started.cache_clear()
    assert [record.name for record in caplog.records] == ["immunonet"]


def test_a_forked_process_is_told_once_that_it_has_one_thread(caplog):
    torch.set_num_threads(2)
    with caplog.at_level(logging.INFO, "immunonet"):
        backend._one_thread()
        backend._one_thread()
    assert torch.get_num_threads() == 1
    assert [record.levelname for record in caplog.records] == ["INFO"]


# Threads and workers: in processes of their own, because what goes wrong there ends the process or never ends.

SCRIPT = """
import concurrent.futures, multiprocessing, os
import torch
from torch import nn

torch.manual_seed(0)
y = torch.arange(90) % 3
x = torch.rand(3, 1, 8, 8)[y] * 0.8 + torch.rand(90, 1, 8, 8) * 0.2
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))


def defence():
    # Not before: what a process imports is told of its forks, and numba reads its settings once.
    from immunonet import RAILS, Maturation
    from immunonet.immune import fused

    fused.SERIAL_VALUES = 0  # even small loops in several threads
    torch.set_num_threads(2)
    maturation = Maturation(population=60, neighbours=5, generations=2)
    return RAILS(model, "0", maturation=maturation, seed=0).fit(x, y)


def answer(rails, images):
    return rails.respond(images).plasma.x


def threads(rails):
    import numba

    parts = list((0.9 * x[:80]).split(10))
    torch.set_num_threads(1)
    expected = [answer(rails, part) for part in parts]
    torch.set_num_threads(2)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(lambda part: answer(rails, part), parts), expected))
    numba.set_num_threads(1)
    assert torch.equal(answer(rails, parts[0]), expected[0])
    assert (torch.get_num_threads(), numba.get_num_threads()) == (2, 1)
    assert numba.threading_layer() == "workqueue"


def forked(rails, expected):
    both = torch.rand(2000, 2000).sin()  # starts the threads of torch
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        found = pool.submit(answer, rails, x[:10]).result(60)
        assert torch.equal(found, expected)
        pool.submit(both.sin).result(60)
    for images, in torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x[:10]), 10, num_workers=1, multiprocessing_context=context,
        collate_fn=lambda rows: (answer(rails, torch.cat([row for row, in rows])[:, None]),),
    ):
        assert torch.equal(images, expected)
    assert torch.get_num_threads() == 2


def in_workers(queue):
    rails = defence()
    expected = answer(rails, x[:10])
    queue.put(expected.tolist())
    if hasattr(os, "fork"):
        forked(rails, expected)


def in_threads(queue):
    rails = defence()
    queue.put(answer(rails, x[:10]).tolist())
    threads(rails)


if __name__ == "__main__":
    # Of this process, which has imported torch but started no thread of it.
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    queue = context.SimpleQueue()
    found = []
    for layer, work in (("omp", in_workers), ("workqueue", in_threads)):
        os.environ["NUMBA_THREADING_LAYER"] = layer
        worker = context.Process(target=work, args=(queue,))
        worker.start()
        worker.join()
        assert worker.exitcode == 0
        found.append(queue.get())
    assert found[0] == found[1]
"""


def test_answers_in_threads_and_workers_are_the_same(tmp_path):
    """A process that forks workers, and one whose threads answer: both of them have the torch that is imported once."""
    (tmp_path / "main.py").write_text(SCRIPT)
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr

"""The bench: each part once, after those it comes after, kept, and continued wherever it was stopped."""

import pytest
import torch

from immunonet.evaluation.bench import Bench, Here, Part, chunks


class Killed(BaseException):
    """Ends all that goes on."""


class Scene(list):
    """Hears of everything that is done."""


def add(scene, name, *values):
    scene.append(name)
    return {"name": name, "of": [value.get("name") or float(value["x"].sum()) for value in values]}


def tensors(scene, name, *_):
    scene.append(name)
    return {"x": torch.arange(3.0) / 7, "n": torch.tensor(len(name))}


def failing(scene, name):
    raise RuntimeError(f"{name} fails")


def part(name, *after, run=add, **how):
    return Part(key=f"key of {name}", run=run, args=(name,), after=after, about=name, **how)


@pytest.fixture(params=["kept", "in memory"])
def folder(request, tmp_path):
    return tmp_path / "run" if request.param == "kept" else None


def test_parts_come_after_those_they_depend_on_and_are_given_their_values(folder):
    first, second = part("first"), part("second")
    third = part("third", second, first)
    bench = Bench(Scene(), folder)
    value, before = bench.get([third, first])
    assert bench.scene == ["second", "first", "third"]
    assert before == {"name": "first", "of": []}
    assert value == {"name": "third", "of": ["second", "first"]}


def test_each_part_is_done_once(folder):
    shared = part("shared", run=tensors)
    parts = [part("a", shared), part("b", shared), part("a", shared)]
    bench = Bench(Scene(), folder)
    a, b, again = bench.get(parts)
    assert bench.scene == ["shared", "a", "b"]
    assert again == a != b
    assert bench.get(parts) == [a, b, a]
    assert bench.once("key of a", failing, "a") == a
    assert bench.scene == ["shared", "a", "b"]
    assert bench.once("another", add, "c") == {"name": "c", "of": []}


def test_progress_is_told_of_every_part_that_is_asked_for_once_it_is_there(folder):
    heard = []
    bench = Bench(Scene(), folder, advance=lambda one: heard.append((one.about, len(bench.scene))))
    bench.get([part("a", part("before")), part("b")])
    assert heard == [("a", 2), ("b", 3)]
    bench.get([part("c"), part("b")])
    assert heard[2:] == [("b", 3), ("c", 4)]


def test_what_is_kept_is_read_again_as_it_was_given(tmp_path):
    points = part("points of 3/4", run=tensors)
    bench = Bench(Scene(), tmp_path)
    values = bench.get([points, part("a", points)])
    (file,) = (tmp_path / "tensors").iterdir()
    assert file.name.startswith("points-of-3-4-")
    again = Bench(Scene(), tmp_path)
    read = again.get([points, part("a", points)])
    assert again.scene == []
    assert read[1] == values[1]
    assert all(torch.equal(values[0][name], read[0][name]) for name in ("x", "n"))
    assert read[0]["x"].dtype == torch.float32
    # Other keys are other parts, whatever they are about.
    again.get([Part(key="other", run=tensors, args=("points of 3/4",), about="points of 3/4")])
    assert again.scene == ["points of 3/4"]
    assert len(list((tmp_path / "tensors").iterdir())) == 2


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench = Bench(Scene(), None)
    bench.get([part("a", part("points", run=tensors))])
    bench.get([part("a", part("points", run=tensors))])
    assert bench.scene == ["points", "a"]
    assert list(tmp_path.iterdir()) == []
    assert Bench(Scene(), None).kept(part("a")) is None


def test_values_are_as_json_gives_them_whether_they_are_kept_or_not(folder):
    once = Bench(Scene(), folder).once("pair", lambda scene: {"pair": (1, 2)})
    assert once == {"pair": [1, 2]}


def test_a_part_that_fails_loses_no_other(folder):
    bench = Bench(Scene(), folder)
    with pytest.raises(RuntimeError, match="b fails"):
        bench.get([part("a"), part("b", run=failing), part("c")])
    assert bench.scene == ["a"]
    assert bench.kept(part("a")) is not None
    bench.get([part("a"), part("b"), part("c")])
    assert bench.scene == ["a", "b", "c"]


class Backwards(Here):
    """Stands in for several workers: what comes last is done first."""

    def run(self, scene, parts, kept, done):
        super().run(scene, parts[::-1], kept, done)


class Elsewhere:
    def run(self, scene, parts, kept, done):
        Here().run(scene, parts, kept, done)


def test_whoever_does_the_parts_values_come_in_the_order_of_the_parts(folder):
    bench = Bench(Scene(), folder, workers=Backwards())
    assert [value["name"] for value in bench.get([part("a"), part("b")])] == ["a", "b"]
    assert bench.scene == ["b", "a"]


def test_only_several_workers_are_sent_ahead():
    alone, several = Bench(Scene(), None), Bench(Scene(), None, workers=Elsewhere())
    for bench in (alone, several):
        bench.ahead(part(name) for name in "ab")
    assert (alone.scene, several.scene) == ([], ["a", "b"])


def test_a_run_that_was_killed_continues_with_the_part_it_was_at(tmp_path):
    """Killed here is what nothing catches; a study is killed for real."""

    def killed(scene, name, *values):
        raise Killed

    with pytest.raises(Killed):
        Bench(Scene(), tmp_path / "run").get([part("a", part("points", run=tensors)), part("b"), part("c", run=killed)])
    # What it was writing when it ended.
    with open(tmp_path / "run" / "parts.jsonl", "a") as file:
        file.write('{"key": "key of c", "val')
    bench = Bench(Scene(), tmp_path / "run")
    values = bench.get([part("a", part("points", run=tensors)), part("b"), part("c")])
    assert bench.scene == ["c"]
    assert [value["name"] for value in values] == ["a", "b", "c"]
    whole = Bench(Scene(), None)
    assert values == whole.get([part("a", part("points", run=tensors)), part("b"), part("c")])


@pytest.mark.parametrize(("n", "size", "ends"), [(0, 3, []), (3, 3, [3]), (7, 3, [3, 6, 7]), (2, 5, [2])])
def test_chunks_cover_everything_once(n, size, ends):
    parts = chunks(n, size)
    assert [part.stop for part in parts] == ends
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))

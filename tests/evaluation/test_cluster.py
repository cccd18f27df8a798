"""Parts on a Ray cluster of two nodes on this machine: the same results, and nothing lost with a node or an error."""

import dataclasses
import os
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch
from trials import bands

from immunonet import DkNN, attacks
from immunonet.data import Images
from immunonet.defences.spec import Spec
from immunonet.evaluation import campaign, cluster, evaluate
from immunonet.evaluation.bench import Bench, Part
from immunonet.evaluation.lab import Lab, Measurement, Tables
from immunonet.evaluation.suite import PROTOCOLS
from immunonet.features import partitioned
from immunonet.features.partitioned import OnRay, PartitionedIndex
from immunonet.features.search import ExactIndex

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def nodes():
    """A cluster of two nodes with a CPU each, to which this process is connected."""
    import ray._private.utils
    from ray.cluster_utils import Cluster

    # Workers cannot import tests.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    # Not where --ray auto looks for one; paths of sockets must be short.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        patch.setenv("RAY_TMPDIR", folder)
        # A machine that is dead is known to be within five seconds, one that is slow is not taken for dead.
        health = {
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 10,
            "health_check_timeout_ms": 30_000,
        }
        # Nobody looks at what agents of a dashboard, an autoscaler and a reader of logs take seconds to import.
        patch.setattr(ray._private.utils, "get_dashboard_dependency_error", lambda: ImportError("left out"))
        unread = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        head = {"num_cpus": 1, "_system_config": health, **unread}
        found = Cluster(initialize_head=True, head_node_args=head)
        found.add_node(num_cpus=1)
        ray.init(found.address, logging_level="ERROR", log_to_driver=False)
        yield found
        ray.shutdown()
        found.shutdown()


@pytest.fixture
def workers(nodes):
    return cluster.workers("auto")


@pytest.fixture
def log(tmp_path):
    """A file that every part of a toy scene leaves its name in."""
    return tmp_path / "log"


def done(scene, name, *given):
    with open(scene, "a") as file:
        file.write(f"{name}\n")
    if name == "wrong":
        raise KeyError("a part's own words")
    if name == "deadly":
        os._exit(1)
    return {"x": torch.ones(2) + sum(value["x"] for value in given)} if name == "tensor" else [name, len(given)]


def part(name, *after, **more):
    return Part(key=f"{name} {more}", run=done, args=(name,), after=after, about=name)


def told(log):
    return sorted(log.read_text().split())


def test_each_part_is_done_once_after_those_that_it_depends_on(workers, log, tmp_path):
    advanced = []
    bench = Bench(str(log), tmp_path, workers=workers, advance=lambda part: advanced.append(part.about))
    first = part("tensor")
    second = part("tensor", first, place=2)
    last = part("c", second)
    others = [part("n", place=i) for i in range(20)]
    bench.ahead([last, second, *others])
    values = bench.get([last, second, *others])
    assert values[0] == ["c", 1]
    assert values[1]["x"].tolist() == [2.0, 2.0]
    assert told(log) == ["c", *["n"] * 20, "tensor", "tensor"]
    assert sorted(advanced) == ["c", *["n"] * 20, "tensor"]
    # What is kept is not done again, whoever asks, but sent to what depends on it.
    again = Bench(str(log), tmp_path, workers=workers)
    d, e = part("d", second), part("e", second, first)
    assert again.get([last, second, d, d, e])[2:] == [["d", 1], ["d", 1], ["e", 2]]
    assert told(log) == ["c", "d", "e", *["n"] * 20, "tensor", "tensor"]


def test_a_worker_out_of_memory_is_told_what_to_do(nodes):
    from ray import exceptions

    error = cluster.blamed(
        exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."), part("a")
    )
    assert isinstance(error, OSError)
    assert all(word in str(error) for word in ("out of memory", "--chunk", "--num-cpus"))


def test_what_cannot_be_sent_is_told(workers):
    with pytest.raises(TypeError, match=r"--ray must be left out: .* cannot be sent"):
        Bench((i for i in range(3)), None, workers=workers).get([part("a")])


def test_a_machine_with_another_version_does_nothing(nodes, log):
    with pytest.raises(OSError, match="another version of immunonet"):
        cluster._done(cluster.VERSION + 1, [], done, [])


def test_a_cluster_without_what_the_scene_needs_is_refused(workers):
    with pytest.raises(ValueError, match="--ray must be a cluster with GPUs"):
        Bench(SimpleNamespace(device=torch.device("cuda")), None, workers=workers).get([part("a")])


@pytest.fixture(scope="module")
def problem():
    return bands(80)


@pytest.fixture(scope="module")
def attacked(problem):
    """The function that evaluates DkNN with given workers, and gives the record and rows but for what was timed."""
    base, x, y = problem
    defence = DkNN(base, "input", neighbours=5).fit(x[20:], y[20:], calibration=0.2)
    changes = {
        "steps": 1, "iterations": 1, "black_box": 2, "queries": 2, "averaged": 1, "decisions": 1, "evaluations": 2,
        "noise": 1, "checks": 2,
    }  # fmt: skip
    tiny = dataclasses.replace(PROTOCOLS["quick"], **changes)

    def run(folder, workers=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PROTOCOLS, "quick", tiny)
            patch.setattr(campaign, "CHUNK", 3)
            found = evaluate(defence, x[:6], y[:6], base=base, eps=0.3, folder=folder, workers=workers)
        return untimed(found.record), [untimed(dataclasses.asdict(row)) for row in found.rows]

    return run


def untimed(value):
    if isinstance(value, dict):
        return {key: untimed(one) for key, one in value.items() if "seconds" not in key and key != "cost"}
    return [untimed(one) for one in value] if isinstance(value, list | tuple) else value


def test_a_table_gives_what_it_gives_in_one_process(problem, workers, tmp_path):
    base, x, y = problem
    images = Images(x, y, ("a", "b"))
    lab = Lab(
        {"bands": base}, {"training": images[40:], "validation": images[30:40], "test": images[:30]},
        resolve=lambda name, net: name, where=lambda split, n: [0, n],
        told={"dataset": "bands", "model": "linear", "net": "linear"},
    )  # fmt: skip
    pgd = attacks.PGD(eps=0.3, step=0.1, iterations=3)
    specs = [Spec.parse(text) for text in ("cnn", "dknn input neighbours=5", "rails input generations=1")]
    measurements = [
        Measurement(spec=spec, base="bands", attack="pgd", method=pgd, images=30, seeds=seeds, told={"eps": 0.3})
        for spec, seeds in zip(specs, [(), (), (0, 1)], strict=True)
    ]
    here = Tables(Bench(lab, tmp_path / "here"), 10).measure(measurements)
    there = Tables(Bench(lab, tmp_path / "there", workers=workers), 10).measure(measurements)
    for one, other in zip(here, there, strict=True):
        assert one.correct.tolist() == other.correct.tolist()
        assert untimed(one.row.to_json()) == untimed(other.row.to_json())


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:1", "no Ray cluster is reached at 127.0.0.1:1 .*ray start --head"),
        ("nonsense", "must be auto or HOST"),
    ],
)
def test_an_address_without_a_cluster_is_told(nodes, address, why, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_PATIENCE", 1)
    with pytest.raises((ConnectionError, ValueError), match=f"--ray.*{why}"):
        cluster.workers(address)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cluster.workers(None) is None
    with pytest.raises(ImportError, match=r"this needs ray: pip install 'immunonet\[cluster\]'"):
        cluster.workers("auto")


def test_without_a_cluster_one_is_started_for_this_machine_alone_and_ended(monkeypatch):
    """With Ray itself in tests/service/test_real.py, whose service starts one likewise."""
    import ray._private.ray_constants
    import ray._private.utils

    told, constants = [], ray._private.ray_constants
    # What it sets for good is taken back: the cluster of these tests has several machines.
    for name in ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setattr(ray._private.utils, "read_ray_address", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *where, **_: told.append([*where, constants.ENABLE_RAY_CLUSTER]))
    monkeypatch.setattr(ray, "shutdown", lambda: told.append("ended"))
    workers = cluster.workers("auto")
    assert told == [["local", False]]
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    workers.close()
    assert told[1:] == ["ended"]


@pytest.fixture(scope="module")
def whole():
    y = torch.arange(90) % 3
    order = y.argsort(stable=True)
    return ExactIndex(torch.randn(90, 5, generator=torch.Generator().manual_seed(0))[order], order, [30] * 3)


def test_a_search_in_parts_on_a_cluster_finds_what_one_finds_though_a_part_dies(nodes, whole):
    import ray

    parts = PartitionedIndex(whole, 2, OnRay)
    # Before it has answered, for a worker that has imported torch costs seconds.
    died = parts.parts._actors[0]
    ray.kill(died)
    queries = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    for one, other in zip(whole.nearest(queries, 3), parts.nearest(queries, 3), strict=True):
        assert torch.equal(one, other)
    assert parts.parts._actors[0] is not died
    radius = whole.nearest(queries, 2, by_class=False)[0][:, 1]
    for one, other in zip(whole.within(queries, radius), parts.within(queries, radius), strict=True):
        assert torch.equal(one, other)
    some = torch.tensor([[0, 89], [31, 5]])
    assert torch.equal(whole.rows(some), parts.rows(some))


def test_a_search_whose_parts_never_answer_ends(nodes, whole, monkeypatch):
    monkeypatch.setattr(partitioned, "TRIES", 2)
    monkeypatch.setattr(partitioned, "PATIENCE", 0.0)
    with pytest.raises(OSError, match="has no answer from 1 of them, each of which was made 2 times"):
        PartitionedIndex(whole, 1, OnRay).nearest(torch.zeros(1, 5), 3)


@pytest.fixture
def dying(nodes, workers):
    """Workers of which one node dies when a few parts are done and others are on their way."""

    class Dying(cluster.Cluster):
        count = 0

        def _land(self, flying, done):
            super()._land(flying, done)
            self.count += 1
            if self.count > 2 and flying and nodes.worker_nodes:
                nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)

    yield Dying("auto")
    assert not nodes.worker_nodes


def test_a_campaign_gives_what_it_gives_in_one_process_though_a_node_dies(attacked, dying, tmp_path):
    assert attacked(tmp_path / "there", dying) == attacked(tmp_path / "here")


# On the machine that is left: what ends workers comes last, for each that is started again takes seconds.


def test_the_error_of_a_part_is_raised_and_what_is_done_stays(workers, log, tmp_path):
    bench = Bench(str(log), tmp_path, workers=workers)
    before, parts = part("before"), [part("n", place=i) for i in range(4)]
    with pytest.raises(KeyError, match="a part's own words") as caught:
        bench.get([before, part("after", part("wrong", before)), *parts])
    assert type(caught.value) is KeyError
    assert bench.kept(before) == ["before", 0]
    bench.get(parts)
    assert told(log).count("before") == 1
    assert "after" not in told(log)


def test_a_stop_cancels_what_is_on_its_way_and_the_next_run_goes_on(workers, log, tmp_path):
    parts = [part("n", place=i) for i in range(30)]

    def stop(part):
        if len(told(log)) >= 3:
            raise KeyboardInterrupt

    bench = Bench(str(log), tmp_path, workers=workers, advance=stop)
    with pytest.raises(KeyboardInterrupt):
        bench.get(parts)
    kept = sum(bench.kept(part) is not None for part in parts)
    assert 0 < kept < 30
    begun = len(told(log))
    assert len(Bench(str(log), tmp_path, workers=workers).get(parts)) == 30
    assert len(told(log)) - begun <= 30 - kept + 2  # those that were cancelled too late


def test_a_part_that_ends_its_worker_again_and_again_is_named(nodes, log, monkeypatch):
    monkeypatch.setattr(cluster, "_RETRIES", 1)
    bench = Bench(str(log), None, workers=cluster.workers("auto"))
    with pytest.raises(OSError, match="deadly could not be done: WorkerCrashedError"):
        bench.get([part("deadly")])
    assert told(log) == ["deadly"] * 2

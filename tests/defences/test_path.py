"""Paths of weights: their ends, their points, gradients and statistics in closed form, and what is refused."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from immunonet import RAILS, Maturation, ModePath, data, load, zoo
from immunonet.defences.path import PathEnsemble
from immunonet.paths import curves, statistics
from immunonet.zoo.adversarial import Adversarial, Adversary
from immunonet.zoo.connecting import _Connecting


def seeded(make, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def plain(seed=0):
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), seed).eval()


def normalised(seed=0):
    """Return a net with batch norm, its statistics not those of any images."""
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(1, 3, 2),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 3),
    )
    net = seeded(make, seed)
    for module in curves.normalisers(net).values():
        module.running_mean.fill_(seed + 0.5)
    return net.eval()


def images(n=30, side=2, seed=0):
    x = torch.rand((n, 1, side, side), generator=torch.Generator().manual_seed(seed))
    return data.Images(x, torch.arange(n) % 3, ("a", "b", "c"))


def moved(path, seed=1):
    """Move the bends of a path away from the straight line."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in path.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 3)
    path.moved()
    return path


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# The curve.


@given(t=st.floats(0, 1), points=st.integers(3, 6), name=st.sampled_from(list(curves.CURVES)))
def test_shares_sum_to_one(t, points, name):
    shares = curves.CURVES[name](t, points)
    assert len(shares) == points
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0


def test_half_way_the_shares_are_a_quarter_a_half_a_quarter():
    assert ModePath(plain(0), plain(1)).shares(0.5) == [0.25, 0.5, 0.25]
    assert ModePath(plain(0), plain(1), plain(2)).shares(0.5) == [0, 1, 0]
    assert ModePath(plain(0), plain(1), plain(2)).shares(0.25) == [0.5, 0.5, 0]


@pytest.mark.parametrize("make", [plain, normalised])
def test_the_ends_are_the_networks_given_bit_for_bit(make):
    nets = make(0), make(1)
    path = moved(ModePath(*nets))
    for t, net in zip((0, 1), nets, strict=True):
        assert same(path.at(t), net)
        x = images(side=2 if make is plain else 3).x
        assert torch.equal(path.at(t)(x), net(x))


def test_networks_given_are_not_touched():
    nets = normalised(0).train(), normalised(1)
    before = [copy.deepcopy(net) for net in nets]
    path = ModePath(*nets, images=images(side=3).x)
    zoo.connect(path, images(side=3), images(9, 3, 1), threats={"linf": 0.1}, iterations=1, epochs=1, batch_size=10)
    assert all(same(a, b) for a, b in zip(nets, before, strict=True))
    assert nets[0].training
    assert all(p.grad is None and p.requires_grad for net in nets for p in net.parameters())
    assert all(same(a, b) for a, b in zip(path.ends, before, strict=True))


@given(t=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_a_new_path_is_the_straight_line(t):
    nets = plain(0), plain(1)
    path = ModePath(*nets)
    for name, value in path.weights(t).items():
        a, b = (dict(net.named_parameters())[name] for net in nets)
        torch.testing.assert_close(value, (1 - t) * a + t * b)


@given(t=st.floats(0, 1))
@settings(max_examples=10, deadline=None)
def test_turned_round_it_is_the_same_path(t):
    a, b = moved(ModePath(plain(0), plain(1))), ModePath(plain(1), plain(0))
    b.load_state_dict(a.state_dict())
    for name, value in a.weights(t).items():
        torch.testing.assert_close(value, b.weights(1 - t)[name])


def test_logits_of_a_linear_network_are_quadratic_in_t():
    nets = [seeded(lambda: nn.Linear(4, 3), seed) for seed in (0, 1)]
    path, x = moved(ModePath(*nets)), torch.rand(5, 4)
    bend = nn.Linear(4, 3)
    bend.load_state_dict(path.corners[1])
    for t in (0.1, 0.5, 0.8):
        expected = (1 - t) ** 2 * nets[0](x) + 2 * t * (1 - t) * bend(x) + t**2 * nets[1](x)
        torch.testing.assert_close(path.between(t)(x), expected)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9])
def test_the_gradient_of_the_bend_is_that_of_the_network_times_its_share(t):
    path, some = moved(ModePath(plain(0), plain(1))), images()
    F.cross_entropy(path.between(t)(some.x), some.y).backward()
    net = path.at(t).requires_grad_(True)
    F.cross_entropy(net(some.x), some.y).backward()
    for bend, parameter in zip(path.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(bend.grad, 2 * t * (1 - t) * parameter.grad)


# Batch statistics.


@pytest.mark.parametrize("size", [7, 10, 29, 100])
def test_statistics_are_those_of_one_pass_in_float64(size):
    net, x = normalised(), images(30, 3).x
    layers = curves.normalisers(net)
    inputs = {name: [] for name in layers}
    reference = copy.deepcopy(net).double()
    for name, layer in curves.normalisers(reference).items():
        layer.register_forward_pre_hook(lambda module, args, name=name: inputs[name].append(args[0]))
    with statistics.batch_statistics(reference):
        for part in statistics._batches(x.double(), size):
            reference(part)
    statistics.recompute(net, x, batch_size=size)
    for name, layer in layers.items():
        seen = torch.cat(inputs[name]).transpose(0, 1).flatten(1)
        torch.testing.assert_close(layer.running_mean.double(), seen.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), seen.var(1), rtol=1e-5, atol=1e-6)
    assert not net.training


def test_statistics_hold_the_variance_between_batches():
    net = nn.Sequential(nn.BatchNorm1d(1)).eval()
    x = torch.cat([torch.full((4, 1), -1.0), torch.full((4, 1), 1.0)])
    statistics.recompute(net, x, batch_size=4)
    assert float(net[0].running_var) == pytest.approx(8 / 7)  # the mean of the batches' variances is 0


def test_points_between_have_statistics_of_their_own_that_are_kept():
    path = moved(ModePath(normalised(0), normalised(1), images=images(30, 3).x))
    net = path.at(0.4)
    expected = copy.deepcopy(net)
    statistics.recompute(expected, images(30, 3).x)
    assert same(net, expected)
    path.images = None
    assert same(path.at(0.4), net)
    with pytest.raises(ValueError, match=r"images must be given where batch-norm statistics are wanted"):
        path.at(0.41)


def test_asking_between_the_ends_leaves_no_trace():
    path = ModePath(normalised(0), normalised(1))
    before = copy.deepcopy(path._held[-1])
    path.between(0.5, training=True)(images(9, 3).x)
    assert same(path._held[-1], before)


# Files, ensembles, RAILS.


@pytest.mark.parametrize("nets", [2, 3])
def test_saved_and_loaded_it_is_the_same(tmp_path, nets):
    path = moved(ModePath(*map(normalised, range(nets)), images=images(30, 3).x))
    point = path.at(0.3)
    path.settings = {"threats": {"l1": 1.0}}
    path.save(tmp_path)
    again = ModePath.load(tmp_path, normalised(9))
    assert again.curve == path.curve
    assert again.settings == path.settings
    assert same(again.at(0.3), point)
    assert all(same(again.at(t), path.at(t)) for t in (0, 1))
    with pytest.raises(ValueError, match="does not fit Sequential"):
        ModePath.load(tmp_path, plain())
    record = (tmp_path / "path.json").read_text()
    (tmp_path / "path.json").write_text(record.replace("0.3", "0.4", 1))
    with pytest.raises(ValueError, match=r"path.json was edited"):
        ModePath.load(tmp_path, normalised())
    (tmp_path / "path.json").write_text(record)
    (tensors,) = tmp_path.glob("path-*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(ValueError, match=tensors.name):
        ModePath.load(tmp_path, normalised())


def test_an_ensemble_is_the_log_of_the_mean_probability(tmp_path):
    path, x = moved(ModePath(plain(0), plain(1))), images().x
    ensemble = path.ensemble([0.2, 0.7])
    expected = torch.stack([path.at(t)(x).softmax(1) for t in (0.2, 0.7)]).mean(0).log()
    torch.testing.assert_close(ensemble(x), expected)
    assert ensemble.kind == "path"
    # It is attacked as a whole: its gradient is that of the mean.
    point = x.clone().requires_grad_()
    ensemble(point)[:, 0].sum().backward()
    other = x.clone().requires_grad_()
    torch.stack([path.at(t)(other).softmax(1) for t in (0.2, 0.7)]).mean(0).log()[:, 0].sum().backward()
    torch.testing.assert_close(point.grad, other.grad)
    ensemble.save(tmp_path)
    again = load(tmp_path, plain(5))
    assert torch.equal(again(x), ensemble(x))
    assert again.settings() == ensemble.settings()


def test_one_rails_looks_into_all_members():
    some = images(60)
    ensemble = moved(ModePath(plain(0), plain(1))).ensemble([0.2, 0.7])
    few = Maturation(population=60, neighbours=3, generations=1)
    rails = RAILS(ensemble, ["members.0.1", "members.1.1"], maturation=few, seed=0).fit(some.x, some.y)
    response = rails.respond(some.x[:4])
    alone = [
        RAILS(net, "1", maturation=few, seed=0).fit(some.x, some.y).respond(some.x[:4]) for net in ensemble.members
    ]
    assert response.votes.shape == (4, 3)
    torch.testing.assert_close(response.votes.sum(1), torch.ones(4))
    assert len(rails.feature_maps) == 2
    assert all(one.votes.shape == response.votes.shape for one in alone)


# What is refused.


def test_networks_that_cannot_be_joined_are_refused_by_name():
    with pytest.raises(ValueError, match="networks must be two or more, got 1"):
        ModePath(plain())
    with pytest.raises(TypeError, match=r"networks\[1\] must be a torch.nn.Module, got int"):
        ModePath(plain(), 3)
    with pytest.raises(ValueError, match=r"networks\[0\] has none: there is nothing to join"):
        ModePath(nn.Flatten(), nn.Flatten())
    with pytest.raises(ValueError, match=r"networks\[1\] is of another architecture: parameter 3.bias is in one"):
        ModePath(plain(), nn.Sequential(nn.Flatten(), nn.Linear(4, 5)))
    other = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"networks\[2\] is of another architecture: parameter 1.weight is \(6, 4\)"):
        ModePath(plain(), plain(1), other)
    with pytest.raises(ValueError, match=r"parameter .* torch.float64"):
        ModePath(plain(), plain(1).double())
    wide = plain(1)
    wide.register_buffer("scale", torch.ones(()))
    with pytest.raises(ValueError, match="buffer scale is in one of them only"):
        ModePath(plain(), wide)
    narrow = plain()
    narrow.register_buffer("scale", torch.zeros(()))
    with pytest.raises(ValueError, match=r"networks\[1\] has another buffer scale: only what is trained may differ"):
        ModePath(narrow, wide)
    relu = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"networks\[1\] is of another architecture: 2 is a ReLU, not a Tanh"):
        ModePath(plain(), relu)
    still = [plain(seed) for seed in (0, 1)]
    for net in still:
        net[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"networks\[1\] has another parameter 1.weight: only what is trained"):
        ModePath(*still)


def test_what_nobody_trains_stays_as_it_is():
    nets = [plain(seed) for seed in (0, 1)]
    nets[1][1].load_state_dict(nets[0][1].state_dict())
    for net in nets:
        net[1].requires_grad_(False)
    path = ModePath(*nets)
    zoo.connect(path, blobs(), blobs(30, 1), **OPTIONS)
    point = path.at(0.4)
    assert torch.equal(point[1].weight, nets[0][1].weight)
    assert not torch.equal(point[3].weight, ModePath(*nets).at(0.4)[3].weight)
    assert [p.requires_grad for p in point.parameters()] == [False, False, True, True]


def test_a_point_can_be_trained_on():
    point = ModePath(plain(0), plain(1)).at(0.5)
    before = copy.deepcopy(point)
    zoo.train(point, blobs(), blobs(30, 1), epochs=1, batch_size=16)
    assert not same(point, before)


def test_tied_weights_are_saved(tmp_path):
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)]
    for net in nets:
        net[3].weight = net[1].weight
    path = moved(ModePath(*nets))
    path.save(tmp_path)
    again = ModePath.load(tmp_path, nets[0])
    torch.testing.assert_close(again.at(0.3)(images().x), path.at(0.3)(images().x))


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_places_beyond_the_ends_are_refused(t):
    path = ModePath(plain(0), plain(1))
    for ask in (path.at, path.weights, lambda t: path.ensemble([0.5, t])):
        with pytest.raises(ValueError, match=r"(t|points) must be a finite number in \[0, 1\]"):
            ask(t)


def test_points_of_an_ensemble_may_be_arrays_and_do_not_change():
    path = moved(ModePath(plain(0), plain(1)))
    for points in (torch.tensor([0.25, 0.75]), np.array([0.25, 0.75]), (0.25, 0.75)):
        assert path.ensemble(points).points == (0.25, 0.75)
    assert path.ensemble(torch.tensor(0.5)).points == (0.5,)
    with pytest.raises(ValueError, match="points must stay"):
        path.ensemble([0.25, 0.75]).with_settings(points=(0.0, 1.0))


def test_an_ensemble_needs_a_path_and_points():
    with pytest.raises(ValueError, match="points must name at least one place on the path"):
        ModePath(plain(0), plain(1)).ensemble([])
    with pytest.raises(ValueError, match="path must be given"):
        PathEnsemble(plain())(images().x)
    with pytest.raises(ValueError, match=r"images must be one or more finite floating inputs"):
        ModePath(plain(0), plain(1), images=torch.full((2, 1, 2, 2), torch.nan))


# Training.


def blobs(n=60, seed=0):
    """Return two classes that a linear network tells apart."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = (torch.rand((n, 1, 2, 2), generator=generator) + y.reshape(-1, 1, 1, 1)) / 3
    return data.Images(x, y, ("a", "b", "c"))


OPTIONS = {"threats": {"linf": 0.05, "l1": 0.1}, "iterations": 2, "epochs": 3, "batch_size": 16, "lr": 0.01, "seed": 2}


def test_equal_ends_give_one_point_and_the_step_is_that_of_adversarial_training():
    """With all corners alike the bend moves by the network's own gradient times its share."""
    net, some = plain(), blobs(16)
    path = ModePath(net, net)
    for t in (0.3, 0.5):
        torch.testing.assert_close(path.between(t)(some.x), net(some.x))
    generator = torch.Generator().manual_seed(0)
    t = float(torch.rand((), generator=generator))
    settings = Adversarial(threats={"linf": 0.05}, iterations=2)
    task = _Connecting(path, some, settings, 0.0)
    task.loss(some.x, some.y, torch.Generator().manual_seed(0), 0.0, contextlib.nullcontext).backward()
    twin = copy.deepcopy(net).requires_grad_(True)
    adversary = Adversary(settings)
    points, _ = adversary.attacked(twin, some.x, some.y, generator, 0.0)
    adversary.objective(twin, some.x, points, some.y).backward()
    for bend, parameter in zip(path.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(bend.grad, 2 * t * (1 - t) * parameter.grad, rtol=1e-4, atol=1e-7)


def test_training_moves_the_bend_alone_and_lowers_the_loss_between_the_ends():
    ends = [plain(0), plain(1)]
    for i, net in enumerate(ends):
        zoo.train(net, blobs(), blobs(30, 1), epochs=20, batch_size=16, lr=0.04, seed=i)
    path = ModePath(*ends)

    def loss(t):
        return float(F.cross_entropy(path.at(t)(blobs().x), blobs().y).detach())

    before = [loss(t) for t in (0, 0.25, 0.5, 0.75, 1)]
    history = zoo.connect(path, blobs(), blobs(30, 1), **{**OPTIONS, "epochs": 12})
    after = [loss(t) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert (before[0], before[-1]) == (after[0], after[-1])
    assert max(after[1:-1]) < max(before[1:-1])
    assert history[-1]["loss"] < history[0]["loss"]
    assert {"validation_robust_accuracy", "validation_linf_accuracy", "validation_l1_accuracy"} <= history[0].keys()
    rows = zoo.profile(path, blobs(30, 1), threats=OPTIONS["threats"], points=5, iterations=2)
    assert [row["t"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    assert zoo.best_of(rows)["union"] == max(row["union"] for row in rows)


class Interrupt(Exception):
    pass


@pytest.mark.parametrize(
    ("make", "combine", "within"),
    [(plain, "msd", True), (plain, "random", False), (normalised, "msd", False), (normalised, "random", True)],
)
def test_an_interrupted_path_resumes_exactly(tmp_path, make, combine, within):
    some = images(40, 2 if make is plain else 3), images(20, 2 if make is plain else 3, 1)
    options = {**OPTIONS, "combine": combine, "ema": 0.5}

    def path():
        return ModePath(make(0), make(1))

    whole = path()
    expected = zoo.connect(whole, *some, **options)

    def stop(step, steps, history):
        if len(history) == 2 and (step % 3 == (1 if within else 0)):
            raise Interrupt

    with pytest.raises(Interrupt):
        zoo.connect(path(), *some, checkpoint=tmp_path / "path.safetensors", on_progress=stop, **options)
    resumed = path()
    assert zoo.connect(resumed, *some, checkpoint=tmp_path / "path.safetensors", **options) == expected
    assert same(resumed, whole)
    with pytest.raises(ValueError, match=r"was made with lr=0\.01"):
        zoo.connect(path(), *some, checkpoint=tmp_path / "path.safetensors", **{**options, "lr": 0.02})
    with pytest.raises(ValueError, match="was made with path="):
        zoo.connect(ModePath(make(0), make(3)), *some, checkpoint=tmp_path / "path.safetensors", **options)


def test_what_cannot_be_trained_is_refused():
    path = ModePath(plain(0), plain(1))
    with pytest.raises(ValueError, match=r"threats\['l1'\] \(images have room for 4\) must be a finite number"):
        zoo.connect(path, blobs(), blobs(), threats={"l1": 5.0})
    with pytest.raises(ValueError, match="validation is empty"):
        zoo.connect(path, blobs(), blobs()[:0], threats={"l1": 0.1})
    with pytest.raises(ValueError, match="patience must be left out"):
        zoo.connect(path, blobs(), blobs(), patience=2)
    with pytest.raises(ValueError, match="threats must name at least one of the norms linf, l2, l1, got none"):
        zoo.connect(path, blobs(), blobs(), threats={})
    with torch.no_grad():
        next(path.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the loss became nan at step 0 of 20, lr 0.000\d+: give a smaller lr"):
        zoo.connect(path, blobs(), blobs(), epochs=5, batch_size=16)

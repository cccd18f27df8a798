"""The door to models: copies, dtypes, modes, outputs, and what is watched in one thread alone."""

import functools
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from immunonet import DkNN, models


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x.sub_(0.5).div_(0.25))


class View(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).eval()


X = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))


def test_a_model_gets_inputs_of_its_own():
    x = X.clone()
    net = InPlace()
    found = models.ask(net, x)
    assert torch.equal(x, X)
    torch.testing.assert_close(found, net.fc((X - 0.5) / 0.25))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_inputs_come_in_the_dtype_of_the_parameters_and_gradients_go_back(net, dtype):
    x = X.clone().requires_grad_()
    found = models.logits(net.to(dtype), x)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.dtype == torch.float32
    assert gradient.abs().sum() > 0


def test_what_asks_others_itself_gets_inputs_as_they_are():
    class Doubles(models.Asking):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3).double()

        def forward(self, x):
            assert x.dtype == torch.float32
            return models.ask(self.inner, x)

    assert models.ask(Doubles(), X).dtype == torch.float64


def test_transposed_images_come_contiguous():
    x = torch.rand(2, 4, 4, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(models.ask(View(), x), x.reshape(2, -1))


@pytest.mark.parametrize(
    "wrap",
    [lambda o: {"logits": o}, lambda o: SimpleNamespace(logits=o, loss=None), lambda o: (o, None), lambda o: [o]],
)
def test_logits_are_taken_from_what_networks_return(net, wrap):
    assert torch.equal(models.ask(lambda x: wrap(net(x)), X), net(X))


@pytest.mark.parametrize("bad", [None, "text", {"scores": X}, (), ("text",)])
def test_other_outputs_are_refused(bad):
    with pytest.raises(TypeError, match="must return a tensor of logits"):
        models.ask(lambda x: bad, X)


def held(net, kind):
    def closure(x):
        return net(x)

    class Object:
        def __init__(self):
            self.net = net

        def __call__(self, x):
            return self.net(x)

        def method(self, x):
            return self.net(x)

    return {
        "module": net,
        "closure": closure,
        "partial": functools.partial(lambda model, x: model(x), net),
        "object": Object(),
        "method": Object().method,
        "bound": net.forward,
        "closure of a closure": lambda x: closure(x),
    }[kind]


@pytest.mark.parametrize("kind", ["module", "closure", "partial", "object", "method", "bound", "closure of a closure"])
def test_networks_that_functions_hold_are_asked_in_eval_mode_and_left_as_found(kind):
    net = nn.Sequential(nn.Dropout(0.9), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.9)))
    net.train()
    net[1][0].eval()
    before = [m.training for m in net.modules()]
    assert torch.equal(models.ask(held(net, kind), X), models.ask(net, X))
    torch.testing.assert_close(models.ask(net, X), X, atol=1e-4, rtol=1e-4)
    assert [m.training for m in net.modules()] == before


def test_modes_overlap_in_threads():
    net = nn.Sequential(nn.Dropout(0.5)).train()
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with models.evaluating(net):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    with models.evaluating(net):
        pass
    assert not net[0].training  # the other thread still asks
    leave.set()
    thread.join()
    assert net[0].training


def test_outputs_of_several_layers_come_from_one_pass_that_ends_with_the_last(net):
    ran = []
    handles = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in net]
    first, rectified = models.outputs(net, ["0", "3"], X)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(first, net[0](X))
    torch.testing.assert_close(rectified, net[:4](X))
    assert ran == list(net[:4])
    assert not any(m._forward_hooks for m in net.modules())


def test_an_earlier_output_is_not_what_a_later_layer_made_of_it(net):
    linear, _ = models.outputs(net, ["2", "3"], X)
    torch.testing.assert_close(linear, net[:3](X))
    assert (linear < 0).any()


def test_a_layer_that_is_never_called_is_named(net):
    net.add_module("spare", nn.Linear(2, 2))
    alone = nn.ModuleDict({"used": nn.Linear(4, 3), "spare": nn.Linear(4, 3)})
    alone.forward = lambda x: alone["used"](x)
    with pytest.raises(ValueError, match="layer 'spare' is never called"):
        models.outputs(alone, ["spare"], X)


def test_layers_are_watched_in_the_asking_thread_alone(net):
    """While one thread waits inside a watched pass, another asks the same network for another layer, and for itself."""
    inside, leave = threading.Event(), threading.Event()
    waiting = threading.local()

    class Gate(nn.Module):
        def forward(self, x):
            if getattr(waiting, "here", False):
                inside.set()
                leave.wait(10)
            return x

    gated = nn.Sequential(net[0], Gate(), net[1], net[2])
    found = []

    def slow():
        waiting.here = True
        found.append(models.outputs(gated, ["2"], X)[0])

    thread = threading.Thread(target=slow)
    thread.start()
    inside.wait(10)
    whole = gated(X)
    (first,) = models.outputs(gated, ["0"], X)
    leave.set()
    thread.join()
    torch.testing.assert_close(whole, net[:3](X))
    torch.testing.assert_close(first, net[0](X))
    torch.testing.assert_close(found[0], net[:2](X))


@pytest.mark.parametrize(
    "wrap",
    [lambda n: torch.compile(n, backend="eager"), nn.DataParallel],
    ids=["compiled", "parallel"],
)
def test_wrapped_networks_have_the_bare_names_and_answers(net, wrap):
    y = torch.arange(60) % 3
    x = torch.rand(60, 4, generator=torch.Generator().manual_seed(1))
    plain, wrapped = (DkNN(n, "2", neighbours=5).fit(x, y) for n in (net, wrap(net)))
    torch.testing.assert_close(wrapped.features(x)[0], plain.features(x)[0])
    assert torch.equal(wrapped.predict(x), plain.predict(x))


def test_names_with_the_prefix_of_a_wrapper_are_told_the_bare_one(net):
    with pytest.raises(ValueError, match=r"layers='_orig_mod\.1' .*: leave _orig_mod out, .* bare names"):
        DkNN(torch.compile(net, backend="eager"), "_orig_mod.1")


def test_an_exported_network_answers_at_the_input(net):
    y = torch.arange(60) % 3
    x = torch.rand(60, 4)
    exported = torch.export.export(net, (x[:2],), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
    assert torch.equal(models.logits(exported, x), net(x))
    assert DkNN(exported, "input", neighbours=5).fit(x, y).predict(x).shape == (60,)
    with pytest.raises(ValueError, match="cannot be watched"):
        DkNN(exported, "2", neighbours=5).fit(x, y)


def test_networks_without_layers_to_watch_are_refused_by_name(net):
    y = torch.arange(60) % 3
    x = torch.rand(60, 4)
    with warnings.catch_warnings(action="ignore"):  # torch says that tracing is of the past
        scripted = torch.jit.trace(net, x[:2])
    with pytest.raises(ValueError, match=r"model is a .* cannot be watched: give the eager module"):
        DkNN(scripted, "2", neighbours=5).fit(x, y)
    assert DkNN(scripted, "input", neighbours=5).fit(x, y).predict(x).shape == (60,)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        (nn.Linear(4, 3), None),
        (Counts(), models.VARIES),
        (lambda x: nn.functional.dropout(x, 0.5, training=True), models.VARIES),
        (nn.BatchNorm1d(4, track_running_stats=False), models.DEPENDS),
        (lambda x: x - x.mean(0), models.DEPENDS),
        (lambda x: x.log() * 0, None),
    ],
)
def test_answers_that_change_are_told(model, wrong):
    assert models.unsteady(functools.partial(models.ask, model), X) == wrong


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(8, track_running_stats=False), Counts(), lambda x: x - x.mean(0)],
    ids=["batch norm", "counter", "function"],
)
def test_fit_refuses_layers_whose_answers_change(layer):
    if isinstance(layer, nn.Module):
        net, at = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3)), "1"
    else:
        net, at = nn.Linear(4, 3), layer
    with pytest.raises(ValueError, match=r"layer .* gives .*features must be a fixed function of each input"):
        DkNN(net, at, neighbours=5).fit(torch.rand(60, 4), torch.arange(60) % 3)


def test_probabilities_are_told_from_logits():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert models.are_probabilities(logits.softmax(1))
    assert not models.are_probabilities(logits)
    assert not models.are_probabilities(logits.log_softmax(1))
    net = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    with pytest.warns(UserWarning, match="model returns probabilities"):
        DkNN(net, "0", neighbours=5).fit(torch.rand(60, 4), torch.arange(60) % 3)


def test_a_network_exported_for_two_inputs_at_once_is_refused_by_name(net):
    x = torch.rand(60, 4)
    fixed = torch.export.export(net, (x[:2],)).module()
    with pytest.raises(ValueError, match=r"model fails on inputs of shape \(8, 4\): "):
        DkNN(fixed, "input", neighbours=5).fit(x, torch.arange(60) % 3)

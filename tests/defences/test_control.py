"""ClosedLoop: what it answers, alone and in a batch, under other defences and under attack, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from immunonet import RAILS, ClosedLoop, DkNN, Maturation, attacks, data, evaluate, load, models
from immunonet.control.autoencoders import Autoencoder
from immunonet.defences.spec import Spec
from immunonet.evaluation.lab import Lab
from immunonet.evaluation.suite import PROTOCOLS


class Half(nn.Module):
    """A manifold of one's own, which no closed form serves: states are pulled half of the way to their mean."""

    def forward(self, z):
        return 0.5 * (z + z.flatten(1).mean(1).reshape(-1, *(1,) * (z.ndim - 1)))


@pytest.fixture(scope="module")
def digits():
    images = data.load("digits", "train")
    return images.x[:240], images.y[:240]


def quick(**settings):
    return Autoencoder(**({"epochs": 1, "width": 4, "batch_size": 64} | settings))


KINDS = {
    "linear": lambda net: ClosedLoop(net, ["input", "pool"], rank=0.8),
    "channels": lambda net: ClosedLoop(net, "conv1", rank=3, basis="channels"),
    "autoencoder": lambda net: ClosedLoop(net, ["input"], manifold=quick(), outer=1, inner=2),
    "own": lambda net: ClosedLoop(net, ["input", "pool"], manifold=[Half(), Half()], outer=2, inner=2),
}


@pytest.fixture(scope="module", params=KINDS)
def control(request, digits_net, digits):
    return KINDS[request.param](digits_net).fit(*digits)


# --- The contract, for every kind of manifold


def test_answers_do_not_depend_on_the_batch_and_leave_the_network_alone(control, digits_net, digits):
    x, before = digits[0][:4], copy.deepcopy(digits_net.state_dict())
    grads = [p.grad for p in digits_net.parameters()]
    together = control(x)
    alone = torch.cat([control(row) for row in x.split(1)])
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.equal(control.predict(x), together.argmax(1))
    assert torch.allclose(control.predict_proba(x).sum(1), torch.ones(4))
    assert control.answer(x).sense.p_value.shape == (4,)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), digits_net.state_dict().values(), strict=True))
    assert all(not m._forward_hooks for m in digits_net.modules())
    assert all(a is b for a, b in zip(grads, (p.grad for p in digits_net.parameters()), strict=True))
    with torch.inference_mode():
        assert torch.allclose(control(x), together, atol=1e-5)


def test_it_is_saved_and_loaded(control, digits_net, digits, tmp_path):
    if control.manifold is None:
        with pytest.raises(ValueError, match="modules of your own"):
            control.save(tmp_path)
        return
    control.save(tmp_path)
    again = load(tmp_path, digits_net)
    x = digits[0][:20]
    assert torch.equal(again(x), control(x))
    assert torch.equal(again.sense(x).p_value, control.sense(x).p_value)
    other = copy.deepcopy(digits_net)
    torch.nn.init.normal_(other.fc2.weight)
    with pytest.raises(ValueError, match="load the weights"):
        load(tmp_path, other)


def test_residuals_shrink_under_control_and_tell_what_is_foreign(control, digits):
    x = digits[0][:50]
    before, after = control.residuals(x), control.residuals(x, controlled=True)
    assert before.shape == after.shape == (50, len(control.layers))
    if control.manifold == "linear":
        assert bool((after[:, 0] <= before[:, 0] * 1.001).all())
    noise = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert control.foreign(noise).float().mean() >= control.foreign(x).float().mean()
    assert torch.equal(control.strangeness(x) > control.alarm, control.foreign(x))
    assert [u.shape[0] for u in control.controls(x)] == [50] * len(control.layers)


def test_its_own_gradient_is_that_of_finite_differences(control, digits):
    if control.manifold is None:
        pytest.skip("steps are taken or not: the solver's own tests differentiate them, in float64")
    x = digits[0][:1] * 0.9 + 0.05
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(control(point)[0, 0], point)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    step = 2e-3 * way
    with torch.no_grad():
        rise = (control(x + step) - control(x - step))[0, 0] / 4e-3
    assert float(rise) == pytest.approx(float((slope * way).sum()), rel=0.15, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_attacked_is_known_before_it_is_fitted(kind, digits_net, digits):
    control = KINDS[kind](digits_net)
    before, effort = [*control.surrogates()], control.effort
    control.fit(*digits)
    assert (before, effort) == ([*control.surrogates()], control.effort)
    assert ("inside" in before, "start" in before) == (kind == "linear", kind in ("autoencoder", "own"))


def test_the_protocol_finds_its_attacks(control, digits, digits_net):
    found = control.surrogates()
    x, y = digits[0][:4], digits[1][:4]
    assert "frozen" in found
    pgd = attacks.PGD(eps=0.1, step=0.05, iterations=2)
    for target in [*found.values(), control.stealthy(found["frozen"])]:
        assert pgd(target, x, y).adversarials.shape == x.shape


# --- Closed forms


def test_linear_gradients_are_projected_and_frozen_ones_are_not(digits_net, digits):
    control = ClosedLoop(digits_net, "input", rank=5, penalty=0.0).fit(*digits)
    x = digits[0][:3]
    subspace = control.manifolds[0]

    def slope(how):
        point = x.clone().requires_grad_()
        return torch.autograd.grad(control.logits(point, gradient=how)[:, 0].sum(), point)[0]

    inner = subspace(x).requires_grad_()
    (plain,) = torch.autograd.grad(models.logits(digits_net, inner)[:, 0].sum(), inner)
    assert torch.allclose(slope("frozen"), plain, atol=1e-5)
    assert torch.allclose(slope("whole"), subspace.within(plain), atol=1e-5)
    healed = control.controlled(x)
    assert torch.allclose(subspace(healed), healed, atol=1e-5)
    # Healing twice is healing once.
    wide = ClosedLoop(digits_net, "input", rank=5, penalty=0.0, bounds=(-1.0, 2.0)).fit(*digits)
    assert torch.allclose(wide.controlled(wide.controlled(x)), wide.controlled(x), atol=1e-5)
    assert torch.allclose(wide(wide.controlled(x)), wide(x), atol=1e-4)


def test_at_a_high_price_it_is_the_network_and_so_it_is_with_all_directions(digits_net, digits):
    x = digits[0][:20]
    plain = models.logits(digits_net, x).log_softmax(1)
    dear = ClosedLoop(digits_net, ["input", "pool"], rank=2, penalty=1e9).fit(*digits)
    assert torch.allclose(dear(x), plain, atol=1e-4)
    whole = ClosedLoop(digits_net, "input", rank=64, penalty=0.0).fit(*digits)
    assert torch.allclose(whole(x), plain, atol=1e-3)
    assert whole.shares["input"] == pytest.approx(1.0)


def test_what_lies_in_the_manifold_passes_and_is_told(digits_net, digits):
    control = ClosedLoop(digits_net, "input", rank=6, penalty=0.0).fit(*digits)
    x, y = digits[0][:10], digits[1][:10]
    inside = control.surrogates()["inside"]
    delta = inside.confined(torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(inside.confined(delta), delta, atol=1e-5)
    moved = control.controlled(0.4 + 0.2 * x + 0.01 * delta) - control.controlled(0.4 + 0.2 * x)
    assert torch.allclose(moved, 0.01 * delta, atol=1e-5)
    assert control.explained(x, x + 0.05 * delta)["inside"] == pytest.approx(1.0, abs=1e-5)
    across = torch.randn(10, 1, 8, 8)
    assert control.explained(x, x + across - inside.confined(across))["inside"] == pytest.approx(0.0, abs=1e-5)
    assert control.explained(x, x) == {}
    wide = attacks.PGD(eps=10.0, step=0.1, iterations=3, bounds=(-20.0, 20.0), norm="l2", random_start=False)
    moved = wide(inside, x, y).adversarials - x
    assert torch.allclose(inside.confined(moved), moved, atol=1e-4)


def test_a_small_rank_removes_an_attack_across_it(digits_net, digits):
    x, y = digits
    adversarial = attacks.PGD(eps=0.2, step=0.05, iterations=10, random_start=False)(digits_net, x[:100], y[:100])
    control = ClosedLoop(digits_net, "input", rank=12).fit(x, y)
    bare = (models.logits(digits_net, adversarial.adversarials).argmax(1) == y[:100]).float().mean()
    assert (control.predict(adversarial.adversarials) == y[:100]).float().mean() > bare


def test_a_network_on_its_manifolds_is_left_alone(digits_net, digits):
    x = digits[0][:20]
    control = ClosedLoop(digits_net, ["input", "conv1"], manifold=[nn.Identity()] * 2, penalty=0.0).fit(*digits)
    assert all(not u.any() for u in control.controls(x))
    assert torch.equal(control(x), models.logits(digits_net, x).log_softmax(1))


# --- Cost


def test_an_answer_takes_few_passes(digits_net, digits):
    control = ClosedLoop(digits_net, ["input", "conv1"], manifold=[Half(), Half()]).fit(*digits)
    with models.counted(digits_net) as entered:
        control.predict(digits[0][:32])
    assert entered() <= 25 * 32
    linear = ClosedLoop(digits_net, ["input", "pool"]).fit(*digits)
    with models.counted(digits_net) as entered:
        linear.predict(digits[0][:7])
    assert entered() <= 2 * 7


# --- Together


def test_other_defences_meet_what_was_controlled(digits_net, digits):
    x, y = digits
    control = ClosedLoop(digits_net, ["input", "pool"], rank=0.8, penalty=0.0).fit(x, y)
    shallow = ClosedLoop(digits_net, "input", rank=0.8, penalty=0.0).fit(x, y)
    behind = DkNN(shallow, "input", neighbours=5, metric="euclidean").fit(x, y)
    alone = DkNN(digits_net, "input", neighbours=5, metric="euclidean").fit(x, y)
    seen = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    healed = shallow.controlled(seen)
    assert torch.allclose(behind.features(seen)[0], healed.flatten(1), atol=1e-5)
    assert torch.equal(behind.index().rows(torch.arange(5)), alone.index().rows(torch.arange(5)))
    deep = DkNN(control, "fc1", neighbours=5, metric="euclidean").fit(x, y)
    expected = {}

    def keep(output):
        expected["fc1"] = output

    with models.watching({digits_net.fc1: keep}):
        control.logits(seen)
    assert torch.allclose(deep.features(seen)[0], expected["fc1"].flatten(1), atol=1e-4)
    plain = DkNN(digits_net, "fc1", neighbours=5, metric="euclidean").fit(x, y)
    assert not torch.allclose(deep.features(seen)[0], plain.features(seen)[0], atol=1e-2)
    assert torch.allclose(deep.index().rows(torch.arange(5)), plain.index().rows(torch.arange(5)), atol=1e-4)


@pytest.mark.parametrize("layer", ["input", "fc1"])
def test_rails_answers_behind_control(digits_net, digits, layer, tmp_path):
    x, y = digits
    control = ClosedLoop(digits_net, "input", rank=10).fit(x, y)
    rails = RAILS(control, layer, maturation=Maturation(population=100, generations=1), seed=0).fit(x, y)
    assert (rails.predict(x[:50]) == y[:50]).float().mean() > 0.8
    point = x[:2].clone().requires_grad_()
    surrogate = rails.surrogates()["soft-knn"]
    (slope,) = torch.autograd.grad(surrogate(point)[:, 0].sum(), point)
    assert bool((slope != 0).any())
    if layer == "input":
        # Nothing but the manifold's directions moves what it compares.
        across = slope - control.manifolds[0].within(slope)
        assert float(across.norm()) < 0.01 * float(slope.norm())


def test_under_the_protocol(digits_net, digits, unchecked, monkeypatch):
    x, y = digits
    few = {"iterations": 2, "steps": 3, "queries": 3, "decisions": 1, "evaluations": 2, "noise": 1, "black_box": 3}
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(PROTOCOLS["quick"], checks=6, **few))
    control = ClosedLoop(digits_net, "input", rank=8).fit(x, y)
    found = evaluate(control, x[:12], y[:12], base=digits_net, eps=0.15, protocol="quick")
    rows = {row.attack: row for row in found.rows if row.defence == "control"}
    assert {"direct-pgd", "direct-apgd-ce", "frozen", "inside", "stealthy", "pgd"} <= set(rows)
    assert 0 < rows["pgd"].settings["inside"] < 1
    assert rows["inside"].settings["inside"] > rows["pgd"].settings["inside"]
    assert found.verdict.accuracy <= min(row.accuracy for row in rows.values() if row.n == 12)


def test_it_is_described_on_the_command_line(digits_net):
    made = Spec.parse("control input+conv1 manifold=autoencoder epochs=2 eps=1/10").made(digits_net, lambda n, _: n, 10)
    assert made.manifold.epochs == 2
    assert made.manifold.eps == pytest.approx(0.1)
    assert Spec.parse("control input rank=20").made(digits_net, lambda n, _: n, 10).rank == 20
    authors = Spec.parse("control input authors").made(digits_net, lambda n, _: n, 10)
    assert authors.settings() == ClosedLoop.authors(digits_net, ["input"]).settings()
    assert authors.outer == 0
    with pytest.raises(ValueError, match="epochs must be left out"):
        Spec.parse("control input epochs=3").made(digits_net, lambda n, _: n, 10)


# --- Autoencoders


def test_an_autoencoder_is_the_same_by_seed_and_goes_on_where_it_stopped(digits_net, digits, tmp_path):
    def fitted(**how):
        return ClosedLoop(digits_net, "input", manifold=quick(epochs=2, noise=0.1, eps=0.1), outer=0).fit(
            *digits, **how
        )

    class Stop(Exception):
        pass

    def stop(step, steps, epochs):
        if len(epochs) == 1:
            raise Stop

    whole = fitted()
    with pytest.raises(Stop):
        fitted(checkpoint=tmp_path, on_progress=stop)
    again = fitted(checkpoint=tmp_path)
    x = digits[0][:10]
    assert torch.equal(whole(x), again(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be"), ({"noise": 2.0}, "noise must be"), ({"norm": "l7"}, "norm must be"),
        ({"lr": 0.0}, "lr must be"), ({"eps": -1.0}, "eps must be"), ({"width": 0}, "width must be"),
    ],
)  # fmt: skip
def test_wrong_settings_of_autoencoders_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Autoencoder(**settings)


# --- Bad input


class Branched(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        z = self.a(x)
        return self.head(self.b(z) + x)


class Twice(Branched):
    def forward(self, x):
        return self.head(self.a(self.a(x)))


@pytest.mark.parametrize(
    ("net", "layers", "message"),
    [
        (Branched(), ["a"], "is not a function of layer 'a' alone"),
        (Branched(), ["b", "a"], "is not a function of layer 'b' alone"),
        (Twice(), ["a"], "layer 'a' is called 2 times"),
        (Branched(), ["c"], "is no submodule"),
        (Branched(), ["a", "input"], "'input' first"),
        (Branched(), ["a", "a"], "twice"),
    ],
)
def test_layers_that_cannot_be_controlled_are_refused(net, layers, message):
    x = torch.rand(40, 4)
    with pytest.raises(ValueError, match=message):
        ClosedLoop(net.eval(), layers).fit(x, torch.arange(40) % 2)


def test_what_cannot_be_fitted_is_refused_by_name(digits_net, digits):
    x, y = digits
    with pytest.raises(ValueError, match="rank must be at most"):
        ClosedLoop(digits_net, "input", rank=60).fit(x[:30], y[:30])
    wrong = (models.logits(digits_net, x).argmax(1) + 1) % 10
    with pytest.raises(ValueError, match="gets right"):
        ClosedLoop(digits_net, "input").fit(x, wrong)
    with pytest.raises(ValueError, match="not fitted"):
        ClosedLoop(digits_net, "input").predict(x)
    with pytest.raises(ValueError, match="projections of the same shape"):
        ClosedLoop(digits_net, "input", manifold=nn.Flatten()).fit(x, y)
    for settings, message in (
        ({"manifold": "curved"}, "manifold must be one of"), ({"rank": 0}, "rank must be"),
        ({"rank": 1.5}, "rank must be"),
        ({"penalty": -1.0}, "penalty must be"), ({"outer": -1}, "outer must be"), ({"inner": 0}, "inner must be"),
        ({"step": 0.0}, "step must be"), ({"gradient": "some"}, "gradient must be"), ({"basis": "x"}, "basis must be"),
        ({"manifold": [nn.Identity()] * 2}, "one module per layer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ClosedLoop(digits_net, "input", **settings)
    with pytest.raises(TypeError, match="layers must be"):
        ClosedLoop(digits_net, nn.Identity())


def test_a_network_that_learned_on_is_refused(digits_net, digits):
    net = copy.deepcopy(digits_net)
    control = ClosedLoop(net, "input", rank=5).fit(*digits)
    with torch.no_grad():
        net.fc2.weight += 1.0 * torch.randn_like(net.fc2.weight)
    with pytest.raises(ValueError, match="have changed"):
        control.predict(digits[0][:2])


class Broken(nn.Module):
    """A manifold that answers NaN once states leave the unit box far behind."""

    def forward(self, z):
        return torch.where(z.abs().flatten(1).amax(1).reshape(-1, *(1,) * (z.ndim - 1)) > 0.99, torch.nan, z)


def test_divergence_falls_back_and_is_told(digits_net, digits):
    x, y = digits
    control = ClosedLoop(digits_net, "input", manifold=Half(), outer=1, inner=1).fit(x, y)
    control.manifolds[0] = Broken()
    with pytest.warns(UserWarning, match="did not go down"):
        found = control.predict(x[:20])
    lost = x[:20].flatten(1).amax(1) > 0.99
    assert bool(lost.any())
    assert torch.equal(found[lost], models.logits(digits_net, x[:20][lost]).argmax(1))


def test_what_takes_long_is_fitted_once_for_all_runs(digits_net, digits, tmp_path, monkeypatch):
    def lab():
        images = data.Images(*digits, tuple(map(str, range(10))))
        made = Lab(
            {"net": digits_net}, {"training": images[:160], "validation": images[160:200], "test": images[200:]},
            resolve=lambda name, net: name, told={}, where=lambda split, n: n,
        )  # fmt: skip
        made.folder = tmp_path
        return made

    spec = Spec.parse("control input manifold=autoencoder epochs=1 width=4 outer=0 | dknn input neighbours=3")
    first = lab().fitted(spec, "net")
    monkeypatch.setattr("immunonet.control.autoencoders.train_task", None)
    again = lab().fitted(spec, "net")
    assert isinstance(again.model, ClosedLoop)
    assert torch.equal(first(digits[0][:10]), again(digits[0][:10]))


def test_it_is_saved_with_the_defence_around_it(digits_net, digits, tmp_path):
    control = ClosedLoop(digits_net, "input", rank=10).fit(*digits)
    behind = DkNN(control, "fc1", neighbours=5).fit(*digits)
    behind.save(tmp_path)
    again = load(tmp_path, digits_net)
    assert isinstance(again.model, ClosedLoop)
    assert torch.equal(again(digits[0][:20]), behind(digits[0][:20]))

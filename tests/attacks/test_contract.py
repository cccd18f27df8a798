"""What every attack keeps to: a table of attacks, a user's own among them, in all norms they have, times the rules."""

import copy
import dataclasses
import functools
import inspect
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from immunonet import attacks
from immunonet.attacks import APGD, FGSM, NES, NORMS, PGD, Attack, Found, HopSkipJump, Noise, Norm, Square


@dataclass(frozen=True, kw_only=True)
class Grey(Attack):
    """A user's own attack, made of what the package exports: towards the middle of the bounds, in equal steps."""

    eps: float = 0.1
    iterations: int = 3

    needs = "labels"

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    def calls(self):
        return self.iterations + 1

    def best(self, problem):
        kept = Found.nothing(problem.x, self.iterations + 1)
        middle = (problem.low + problem.high) / 2
        for i in range(self.iterations + 1 if len(problem.x) else 0):
            goal = problem.x + i / self.iterations * (middle - problem.x)
            points = NORMS[self.norm].project(goal, problem.x, self.eps, problem.low, problem.high)
            labels = torch.cat([problem.model(part).argmax(1) for part in points.split(self.batch_size)])
            hit = (labels == problem.y) == self.targeted
            kept.keep(Found(points, hit, hit.double() - 1 / (i + 1), kept.losses))
            kept.losses[i] = kept.loss
        return kept


class L4(Norm):
    """A norm of one's own: the fourth root of the sum of fourth powers."""

    name = "l4"

    def size(self, delta):
        return delta.flatten(1).abs().pow(4).sum(1).pow(1 / 4)

    def steepest(self, gradient):
        way = gradient.sign() * gradient.abs() ** (1 / 3)
        return way / self.size(way).clamp(min=1e-12).view(-1, *(1,) * (way.ndim - 1))

    def project(self, x, centre, eps, low, high):
        delta = x - centre
        share = (eps / self.size(delta).clamp(min=1e-12)).clamp(max=1)
        return (centre + delta * share.view(-1, *(1,) * (x.ndim - 1))).clamp(low, high)

    def random_within(self, x, eps, generator):
        drawn = torch.rand(x.shape, generator=generator) - 0.5
        return self.steepest(drawn).to(x) * eps

    def reach(self, width):
        return float(self.size(width[None]))


# A small configuration of each, and how many losses a curve has.
TABLE = {
    "FGSM": (FGSM(), 2),
    "PGD": (PGD(iterations=3, restarts=2), 4),
    "PGD with momentum": (PGD(iterations=3, momentum=1.0, random_start=False), 4),
    "APGD": (APGD(iterations=4, restarts=2), 5),
    "APGD longer": (APGD(iterations=12), 13),
    "APGD dlr": (APGD(iterations=4, restarts=2, loss="dlr", early_stop=False), 5),
    "APGD targeted-dlr": (APGD(iterations=3, loss="targeted-dlr", targets=2), 4),
    "Square": (Square(queries=12), 13),
    "Square averaged": (Square(queries=6, draws=2, early_stop=False), 7),
    "NES": (NES(queries=17, samples=4), 4),
    "HopSkipJump": (HopSkipJump(iterations=2, evaluations=8), 3),
    "HopSkipJump within": (HopSkipJump(eps=0.3, iterations=2, evaluations=8), 3),
    "Noise": (Noise(points=4), 4),
    "one's own": (Grey(), 4),
}
EPS = {"linf": 0.1, "l2": 0.4, "l1": 1.5, "l4": 0.2}
# Channels whose ranges differ.
BOUNDS = [(-1.0, 2.0), (0.0, 0.5)]
# Variants take the steps of the plain ones, which are tried in all norms.
VARIANTS = {
    "PGD with momentum": ("l2",),
    "APGD longer": ("linf", "l1"),  # in l1 the balls shrink
    "APGD dlr": ("l4",),
    "APGD targeted-dlr": ("l2",),
    "Square averaged": ("l2",),
    "HopSkipJump within": ("linf",),
}
CASES = [(name, norm) for name in TABLE for norm in VARIANTS.get(name, EPS) if norm in (TABLE[name][0].norms or EPS)]


@pytest.fixture(autouse=True)
def own_norm(monkeypatch):
    """One entry, for these tests alone."""
    monkeypatch.setitem(NORMS, "l4", L4())


def sized(attack, norm):
    attack = dataclasses.replace(attack, norm=norm, bounds=BOUNDS)
    return attack if attack.eps is None else attack.resized(EPS[norm])


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def attack(request):
    name, norm = request.param
    return sized(TABLE[name][0], norm)


# What does not depend on the norm, but on what is drawn in it, is tried in all norms for those that draw in all ways.
FEW = [case for case in CASES if case[0] in ("PGD", "Square") or case[1] == "linf" or case[0] in VARIANTS]
few = pytest.mark.parametrize("attack", FEW, indirect=True, ids=["-".join(case) for case in FEW])


@pytest.fixture(params=TABLE)
def plain(request):
    """An attack in its default norm."""
    return TABLE[request.param][0]


LOW, HIGH = torch.tensor(BOUNDS).T[..., None, None]


def small():
    """Return a network whose answers change within a short way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 5)
        ).eval()
        net[4].weight.data = torch.randn(5, 36)
        net[4].bias.data -= net(LOW + (HIGH - LOW) * torch.rand(500, 2, 4, 4)).detach().mean(0)
    return net


def inputs(net):
    """Return twelve inputs, some of them at the bounds, with the answers to them."""
    x = LOW + (HIGH - LOW) * torch.rand(12, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    x[0], x[1] = LOW, HIGH
    return x, answers(net, x)


@pytest.fixture
def net():
    return small()


@pytest.fixture
def batch(net):
    return inputs(net)


@functools.cache
def results(name, norm):
    net = small()
    return sized(TABLE[name][0], norm)(lambda z: net(z), *inputs(net))


@pytest.fixture
def first(attack, request):
    """What the attack finds, computed once for all tests that read it."""
    return results(*request.node.callspec.params["attack"])


def answers(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


def test_every_attack_is_in_the_table():
    exported = {a for a in vars(attacks).values() if inspect.isclass(a) and issubclass(a, Attack) and a is not Attack}
    assert exported == {type(attack) for attack, _ in TABLE.values()} - {Grey}


def test_points_are_in_the_ball_and_the_bounds_and_as_they_are_described(attack, first, net, batch, request):
    (x, y), result = batch, first
    found = result.adversarials
    assert (found.shape, found.dtype, found.requires_grad) == (x.shape, x.dtype, False)
    assert bool(((found >= LOW) & (found <= HIGH)).all())
    distance = NORMS[attack.norm].size(found - x)
    torch.testing.assert_close(result.distance, distance)
    held = torch.ones_like(result.success) if attack.bounded else result.success
    assert bool((distance[held] <= (torch.inf if attack.eps is None else attack.eps * (1 + 1e-5) + 1e-6)).all())
    fooled = answers(net, found) != y
    assert torch.equal(result.success, fooled if attack.bounded else fooled & (distance <= (attack.eps or torch.inf)))
    assert bool(result.success.any())
    name, _ = request.node.callspec.params["attack"]
    assert (result.losses.shape, result.losses.dtype) == ((TABLE[name][1], len(x)), torch.float64)


def test_eps_zero_gives_the_input_back(attack, net, batch):
    x, y = batch
    result = attack.resized(0.0)(net, x, y)
    assert not result.success.any()
    if attack.bounded:
        assert torch.equal(result.adversarials, x)
        assert not result.distance.any()


@few
def test_no_inputs(attack, net, batch):
    result = attack(net, *(part[:0] for part in batch))
    assert result.adversarials.shape == (0, 2, 4, 4)
    assert (result.success.shape, result.distance.shape, result.losses.shape[1]) == ((0,), (0,), 0)


@few
def test_seed_decides_and_batch_size_does_not(attack, first, net, batch):
    before = torch.random.get_rng_state()
    again = attack(net, *batch)
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(again, name))
    split = dataclasses.replace(attack, batch_size=5)(net, *batch)
    torch.testing.assert_close(split.adversarials, first.adversarials, atol=1e-5, rtol=0)
    assert torch.equal(split.success, first.success)
    if hasattr(attack, "seed") and getattr(attack, "random_start", True):
        other = dataclasses.replace(attack, seed=8)(net, *batch)
        assert not torch.equal(other.adversarials, first.adversarials)
        fresh = dataclasses.replace(attack, seed=None)
        part = [given[:4] for given in batch]
        assert not torch.equal(fresh(net, *part).adversarials, fresh(net, *part).adversarials)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_targeted_succeeds_where_the_wanted_label_is_answered(plain, net, batch):
    x, y = batch
    if getattr(plain, "loss", None) == "targeted-dlr":
        with pytest.raises(ValueError, match="loss='targeted-dlr' chooses its own targets"):
            dataclasses.replace(plain, targeted=True)
        return
    attack = dataclasses.replace(plain, targeted=True, bounds=BOUNDS)
    attack = attack if attack.eps is None else attack.resized(1.0)
    # Each input's own answer, or that of its neighbour, from where HopSkipJump begins.
    wanted = torch.where(torch.arange(12) % 4 == 0, y, y.roll(1))
    starts = {"starts": x.roll(1, 0)} if isinstance(attack, HopSkipJump) else {}
    result = attack(net, x, wanted, **starts)
    reached = answers(net, result.adversarials) == wanted
    assert torch.equal(result.success, reached & (result.distance <= (attack.eps or torch.inf)))
    assert int(result.success.sum()) >= 3


@few
def test_the_model_is_left_as_found(attack, net, batch):
    net.train()
    net[0].eval()
    net[4].weight.requires_grad_(False)
    net[4].bias.grad = torch.ones(5)
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        attack(net, *batch)
    assert [m.training for m in net] == [False, True, True, True, True]
    assert [p.requires_grad for p in net.parameters()] == [True] * 4 + [False, True]
    assert torch.equal(net[4].bias.grad, torch.ones(5))
    assert all(p.grad is None for p in net[:4].parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@few
def test_what_it_needs_is_enough(attack, first, net, batch):
    (x, y), result = batch, first
    if attack.needs == "gradient":
        with pytest.raises(ValueError, match="model must be differentiable"):
            attack(lambda z: net(z).detach(), x, y)
    else:
        assert torch.equal(attack(lambda z: net(z).detach(), x, y).adversarials, result.adversarials)
    if attack.needs == "labels":
        labels = attack(lambda z: nn.functional.one_hot(net(z).argmax(1), 5).float(), x, y)
        assert torch.equal(labels.adversarials, result.adversarials)


def test_bad_models_and_labels_are_named(plain, net, batch):
    x, y = batch
    attack = dataclasses.replace(plain, bounds=BOUNDS)
    with pytest.raises(ValueError, match="model must return finite logits"):
        attack(lambda z: net(z) * torch.nan, x, y)
    with pytest.raises(ValueError, match="y must be in 0 to 4, the model's 5 classes"):
        attack(net, x, y + 5)
    with pytest.raises(ValueError, match=r"x must lie within bounds"):
        attack(net, x * 255, y)


WRONG = {bool: (2, TypeError), int: (0, ValueError), float: (-1.0, ValueError), str: ("hinge", ValueError)}


def test_bad_settings_are_named(plain):
    for name, value in plain.settings().items():
        bad, error = {
            "bounds": ((1, 0), ValueError),
            "seed": (-1, ValueError),
            "eps": (float("nan"), ValueError),
        }.get(name) or WRONG[type(value)]
        with pytest.raises(error, match=f"^{name} must be"):
            dataclasses.replace(plain, **{name: bad})
    with pytest.raises(TypeError, match="eps must be a number, got '8/255'"):
        dataclasses.replace(plain, eps="8/255")
    if plain.bounded:
        with pytest.raises(TypeError, match="eps must be a number, got None"):
            dataclasses.replace(plain, eps=None)


def test_a_norm_without_formulas_is_refused_by_name(plain):
    had = plain.norms or tuple(NORMS)
    for norm in ["l3", *(norm for norm in NORMS if norm not in had)]:
        names = ", ".join(map(repr, had))
        with pytest.raises(ValueError, match=f"norm must be one of {names} for {type(plain).__name__}, got '{norm}'"):
            dataclasses.replace(plain, norm=norm)


def test_which_attacks_have_no_formulas_for_which_norms():
    lacking = {type(attack).__name__: set(NORMS) - set(attack.norms) for attack, _ in TABLE.values() if attack.norms}
    assert lacking == {"Square": {"l4"}, "HopSkipJump": {"l1", "l4"}}


@pytest.mark.parametrize("random_start", [False, True])
def test_a_norm_of_ones_own_is_climbed_to_its_optimum(linear_model, random_start):
    """Of a linear model it is eps times the dual norm, the sum of powers of 4/3 to the power of 3/4."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(20, generator=generator), torch.full((3, 20), 0.5)
    most = 0.3 * weight.abs().pow(4 / 3).sum() ** (3 / 4)
    small = {"eps": 0.3, "norm": "l4", "iterations": 40, "random_start": random_start}
    for attack in (PGD(step=0.1, **small), APGD(**small), FGSM(eps=0.3, norm="l4")):
        result = attack(linear_model(weight), x, torch.zeros(3, dtype=torch.long))
        assert attack.describe()["norm"] == "l4"
        torch.testing.assert_close((result.adversarials - x) @ weight, most.expand(3), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("attack", "calls"),
    [
        (FGSM(), 2),
        (PGD(iterations=20, restarts=3), 63),
        (APGD(iterations=10, restarts=2), 22),
        (APGD(iterations=10, restarts=1, loss="targeted-dlr", targets=4), 48),
        (Square(queries=100, draws=3), 303),
        (Square(queries=100, tries=5), 501),
        # Nine steps of ten around and the point itself, and the input.
        (NES(queries=100, samples=10), 1 + 9 * 11),
        # The point itself, 100 starts, 25 halvings on the first line, then on each line and step, and 10 + 14 around.
        (HopSkipJump(iterations=2, evaluations=10), 1 + 100 + 25 + 2 * 50 + 24),
        (HopSkipJump(iterations=2, evaluations=10, most_evaluations=12), 1 + 100 + 25 + 2 * 50 + 22),
        (Noise(points=7), 7),
    ],
)
def test_calls_by_hand(attack, calls):
    assert attack.calls() == calls


@few
@pytest.mark.parametrize("flat", [False, True])
def test_no_attack_asks_more_often_than_it_says(attack, net, batch, flat):
    """`flat`: a model that nothing fools, so that no attack stops early and a search for a start fails."""
    x, y = (part[:3] for part in batch)
    asked = 0

    def model(z):
        nonlocal asked
        asked += len(z)
        return net(z) * (0.0 if flat else 1.0) + 9.0 * flat * torch.eye(5)[0]

    attack(model, x, y * (not flat))
    # Four more of each: is it a model, and one whose answers stay the same?
    assert 0 < asked <= 3 * (attack.calls() + 4)


def test_twins(plain, net, batch):
    cheap = plain.cheapest()
    assert cheap.calls() <= plain.calls()
    assert cheap.settings() | plain.settings() == plain.settings()
    least = {"iterations": 2, "restarts": 1, "queries": 5, "points": 1, "evaluations": 2}
    for name, value in cheap.settings().items():
        assert value == least.get(name, getattr(plain.resized(plain.eps or 0.1), name) if name == "step" else value)
    wide = plain.resized(0.5)
    assert wide.eps == 0.5
    if hasattr(plain, "step"):
        assert wide.step == pytest.approx(0.5 * plain.step / plain.eps)
        assert wide.resized(0).step == 0
        with pytest.raises(ValueError, match="eps must not be 0 before"):
            wide.resized(0).resized(0.5)
    changed = {"eps", "step"}
    assert {k: v for k, v in wide.settings().items() if k not in changed} == {
        k: v for k, v in plain.settings().items() if k not in changed
    }
    with pytest.raises(ValueError, match="eps must be"):
        plain.resized(-1)
    twice = plain.doubled()
    if hasattr(plain, "iterations"):
        assert twice.settings() == plain.settings() | {"iterations": 2 * plain.iterations}
        assert twice.calls() > plain.calls()
    else:
        assert twice is None


def test_its_description_is_json_that_makes_it_again(attack):
    told = json.loads(json.dumps(attack.describe(), allow_nan=False))
    assert told == attack.describe()
    assert told.pop("method") == type(attack).__name__
    assert told == attack.settings()
    assert (told["norm"], told["bounds"]) == (attack.norm, [list(pair) for pair in BOUNDS])
    assert type(attack)(**told) == attack

"""The soft vote of nearest neighbours against its formula, and what an attack on it does to the defence."""

import pytest
import torch
from torch import nn

from immunonet import attacks
from immunonet.attacks import ASK, PGD, AdvKnn, SoftCount, SoftNeighbours
from immunonet.defences.dknn import DkNN
from immunonet.defences.rails import RAILS, Maturation

CLASSES, PER_CLASS = 3, 12


@pytest.fixture(scope="module")
def problem():
    """Three overlapping clouds in [0, 1]^4, interleaved classes, and a small network that was not trained."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(CLASSES * PER_CLASS) % CLASSES
    centres = torch.tensor([[0.3, 0.3, 0.5, 0.5], [0.7, 0.3, 0.5, 0.5], [0.5, 0.7, 0.5, 0.5]])
    x = (centres[y] + 0.1 * torch.randn(len(y), 4, generator=generator)).clamp(0, 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    return model, x, y


def fitted(problem, kind, layers):
    model, x, y = problem
    if kind == "rails":
        defence = RAILS(model, layers, maturation=Maturation(population=30, neighbours=2, generations=2), seed=0)
    else:
        defence = DkNN(model, layers, neighbours=5, metric=kind)
    return defence.fit(x, y, calibration=(x[:6], y[:6]))


def by_hand(problem, antigens, layers, metric, k, temperature):
    """The docstring's formula, one antigen, layer and class at a time."""
    model, x, y = problem
    rows = []
    for antigen in antigens:
        votes = []
        for layer in layers:
            f = (lambda z: z) if layer == "input" else model[:2]
            a, b = f(antigen[None]), f(x)
            if metric == "cosine":
                a, b = nn.functional.normalize(a), nn.functional.normalize(b)
            squares = (a - b).square().sum(1)
            logits = [
                squares[y == c].sort().values[:k].neg().div(temperature).exp().sum().log() for c in range(CLASSES)
            ]
            votes.append(torch.stack(logits).log_softmax(0))
        rows.append(torch.stack(votes).mean(0).log_softmax(0))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["rails", "euclidean", "cosine"])
@pytest.mark.parametrize("layers", [["input"], ["1"], ["input", "1"]])
def test_vote_and_gradient_follow_the_formula(problem, kind, layers):
    defence = fitted(problem, kind, layers)
    soft = SoftNeighbours(defence, neighbours=4, temperature=0.05)
    antigens = torch.rand(5, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found = soft(antigens)
    expected = by_hand(problem, antigens, layers, kind, 4, 0.05)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(5))
    ours, theirs = (torch.autograd.grad(v[:, 1].sum(), antigens)[0] for v in (found, expected))
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_cells_of_another_space_are_reached_through_the_model(problem):
    model, x, y = problem
    defence = RAILS(model, "1", space="0", maturation=Maturation(generations=10, population=30, neighbours=2), seed=0)
    defence.fit(x, y, calibration=(x[:6], y[:6]))
    antigens = x[:3].clone().requires_grad_()
    found = SoftNeighbours(defence, neighbours=4, temperature=0.5)(antigens)
    expected = by_hand(problem, antigens, ["1"], "euclidean", 4, 0.5)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.autograd.grad(found[:, 0].sum(), antigens)[0].abs().max() > 0


def test_auto_temperature_is_a_share_of_the_mean_spread_of_squared_distances(problem):
    _, x, y = problem
    soft = SoftNeighbours(fitted(problem, "euclidean", "input"), neighbours=4)
    squares = torch.cdist(x, x).square()
    spread = torch.stack(
        [torch.cat([row[y == c].sort().values[:4] for c in range(CLASSES)]).std() for row in squares]
    ).mean()
    assert soft.temperatures == pytest.approx([0.3 * float(spread)], rel=1e-4)


def test_auto_temperature_of_equal_examples_is_not_zero(problem):
    model, x, y = problem
    defence = DkNN(model, "input", neighbours=2, metric="euclidean")
    defence.fit(torch.full_like(x, 0.5), y, calibration=(x[:6], y[:6]))
    assert torch.isfinite(SoftNeighbours(defence, neighbours=4)(x)).all()


@pytest.mark.parametrize("kind", ["rails", "euclidean", "cosine"])
def test_pgd_on_the_vote_fools_the_defence_more_than_noise(problem, kind):
    _, x, y = problem
    defence = fitted(problem, kind, "input")
    eps = 0.12
    found = PGD(eps=eps, step=eps / 4, iterations=10, random_start=False)(SoftNeighbours(defence, neighbours=4), x, y)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    accuracy = [
        (defence.predict(z) == y).float().mean() for z in (x, (x + eps * noise.sign()).clamp(0, 1), found.adversarials)
    ]
    assert accuracy[0] > 0.9
    assert accuracy[2] < accuracy[1] - 0.2
    assert found.success.float().mean() > 0.3


def test_it_asks_the_defence_without_changing_it(problem):
    defence = fitted(problem, "cosine", "1")
    before = [b.clone() for b in defence.buffers()]
    SoftNeighbours(defence, neighbours=4)(torch.rand(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(before, defence.buffers(), strict=True))


def test_as_many_neighbours_as_the_smallest_class_has_but_no_more_than_20_or_dknns_own(problem):
    model, x, y = problem
    assert SoftNeighbours(fitted(problem, "cosine", "input")).neighbours == PER_CLASS
    many = DkNN(model, "input", neighbours=2).fit(x.repeat(3, 1), y.repeat(3), calibration=(x[:6], y[:6]))
    assert SoftNeighbours(many).neighbours == 20
    many.neighbours = 30
    assert SoftNeighbours(many).neighbours == 30


def compared(problem, antigens, layer, metric):
    """What a defence compares of antigens and examples at one layer."""
    model, x, _ = problem
    f = (lambda z: z) if layer == "input" else model[:2]
    found = f(antigens), f(x)
    return tuple(map(nn.functional.normalize, found)) if metric == "cosine" else found


def count_by_hand(problem, antigens, layers, metric, k, n, width):
    """SoftCount's docstring's formula; the edge r is a constant for the gradient."""
    y = problem[2]
    votes = []
    for layer in layers:
        a, b = compared(problem, antigens, layer, metric)
        squares = (a[:, None] - b).square().sum(2)
        r = squares.detach().sort(dim=1).values[:, k - 1 : k + 1].mean(1, keepdim=True)
        counts = [((r - squares[:, y == c].sort(dim=1).values[:, :n]) / width).sigmoid().sum(1) for c in range(CLASSES)]
        votes.append(torch.stack(counts, 1).log().log_softmax(1))
    return torch.stack(votes).mean(0).log_softmax(1)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("layers", [["input"], ["input", "1"]])
def test_soft_count_and_its_gradient_follow_the_formula(problem, metric, layers):
    count = SoftCount(fitted(problem, metric, layers), width=0.05)
    assert (count.counted, count.neighbours) == (5, PER_CLASS)
    antigens = torch.rand(5, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found, expected = count(antigens), count_by_hand(problem, antigens, layers, metric, 5, PER_CLASS, 0.05)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    ours, theirs = (torch.autograd.grad(v[:, 1].sum(), antigens)[0] for v in (found, expected))
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("k", [1, 5, 24, 36])
def test_a_soft_count_with_a_sharp_edge_is_that_of_dknn(problem, k):
    """DkNN's log((m + 1) / (k + C)) tells its m of k neighbours; of all 36 examples the edge halves the last."""
    model, x, y = problem
    dknn = DkNN(model, "input", neighbours=k, metric="euclidean").fit(x, y, calibration=(x[:6], y[:6]))
    antigens = torch.rand(50, 4, generator=torch.Generator().manual_seed(3))
    m = dknn(antigens).exp() * (k + CLASSES) - 1
    found = SoftCount(dknn, width=1e-7)(antigens).exp()
    torch.testing.assert_close(found, m / k, atol=1e-3 if k < 36 else 0.03, rtol=0)


def test_soft_count_settings(problem):
    _, x, y = problem
    dknn = fitted(problem, "euclidean", "input")
    spread = torch.cdist(x, x).square().std(1).mean()
    assert SoftCount(dknn).widths == pytest.approx([0.1 * float(spread)], rel=1e-3)
    assert SoftCount(dknn).softened(4).widths == pytest.approx([0.4 * float(spread)], rel=1e-3)
    assert SoftCount(dknn, neighbours=30).softened(4).counted == SoftCount(dknn, neighbours=30).counted == 30
    with pytest.raises(ValueError, match="neighbours must be at least 1 and at most 36, got 37"):
        SoftCount(dknn, neighbours=37)
    with pytest.raises(ValueError, match="width must be"):
        SoftCount(dknn, width=0)
    with pytest.raises(TypeError, match="dknn must be a DkNN, got RAILS"):
        SoftCount(fitted(problem, "rails", "input"))
    same = DkNN(problem[0], "input", neighbours=2).fit(torch.full_like(x, 0.5), y, calibration=(x[:6], y[:6]))
    assert torch.isfinite(SoftCount(same)(x)).all()


def ask_by_hand(problem, antigens, layers, metric, k, temperature):
    """ASK's docstring's formula: minus the mean distance to the k nearest of a class, over the temperature."""
    y = problem[2]
    votes = []
    for layer in layers:
        a, b = compared(problem, antigens, layer, metric)
        d = (a[:, None] - b).norm(dim=2)
        means = [d[:, y == c].sort(dim=1).values[:, :k].mean(1) for c in range(CLASSES)]
        votes.append((-torch.stack(means, 1) / temperature).log_softmax(1))
    return torch.stack(votes).mean(0).log_softmax(1)


@pytest.mark.parametrize("kind", ["rails", "euclidean", "cosine"])
@pytest.mark.parametrize("layers", [["input"], ["input", "1"]])
def test_ask_and_its_gradient_follow_the_formula(problem, kind, layers):
    ask = ASK(fitted(problem, kind, layers), neighbours=4, temperature=0.05)
    antigens = torch.rand(5, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found, expected = ask(antigens), ask_by_hand(problem, antigens, layers, kind, 4, 0.05)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    ours, theirs = (torch.autograd.grad(v[:, 1].sum(), antigens)[0] for v in (found, expected))
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_ask_defaults(problem):
    _, x, y = problem
    ask = ASK(fitted(problem, "euclidean", "input"))
    assert ask.neighbours == 5
    spread = torch.stack(
        [torch.cat([row[y == c].sort().values[:5] for c in range(CLASSES)]).std() for row in torch.cdist(x, x)]
    ).mean()
    assert ask.temperatures == pytest.approx([0.3 * float(spread)], rel=1e-3)


def test_advknn_learns_the_neighbours_votes_where_they_are_linear():
    """Two far clouds: the nearest 3 agree, and a linear block can tell them apart."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 2
    x = (torch.tensor([0.2, 0.8])[y][:, None] + 0.05 * torch.randn(80, 3, generator=generator)).clamp(0, 1)
    dknn = DkNN(nn.Linear(3, 2), "input", neighbours=3, metric="euclidean")
    dknn.fit(x, y, calibration=(x[:10], y[:10]))
    block = AdvKnn(dknn, epochs=60)
    antigens = x.clone().requires_grad_()
    found = block(antigens)
    assert block.neighbours == 3
    assert torch.equal(found.argmax(1), y)
    assert nn.functional.nll_loss(found, y) < 0.3
    torch.testing.assert_close(found.exp().sum(1), torch.ones(80))
    assert torch.autograd.grad(found[:, 0].sum(), antigens)[0].abs().min() > 0


def test_advknn_counts_votes_without_the_example_itself(problem):
    _, x, y = problem
    block = AdvKnn(fitted(problem, "euclidean", "input"), neighbours=4, epochs=1)
    d = torch.cdist(x, x).fill_diagonal_(torch.inf)
    expected = nn.functional.one_hot(y[d.topk(4, largest=False).indices], CLASSES).float().mean(1)
    torch.testing.assert_close(block._votes(0, torch.arange(len(x))), expected)


def test_advknn_of_equal_examples_and_its_seed(problem):
    model, x, y = problem
    same = DkNN(model, "input", neighbours=2, metric="euclidean")
    same.fit(torch.full_like(x, 0.5), y, calibration=(x[:6], y[:6]))
    assert torch.isfinite(AdvKnn(same, epochs=1)(x)).all()
    defence = fitted(problem, "rails", ["input", "1"])
    one, again, other = (AdvKnn(defence, examples=12, epochs=2, seed=s)(x) for s in (0, 0, 1))
    assert AdvKnn(defence, epochs=1).neighbours == len(x) - 1
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"neighbours": 36}, "neighbours must be at least 1 and at most 35"), ({"examples": 0}, "examples must be"),
     ({"epochs": 0}, "epochs must be"), ({"seed": -1}, "seed must be")],
)  # fmt: skip
def test_bad_settings_of_advknn_are_named(problem, settings, match):
    with pytest.raises(ValueError, match=match):
        AdvKnn(fitted(problem, "cosine", "input"), **settings)


@pytest.mark.parametrize("surrogate", [ASK, AdvKnn])
def test_unfitted_defences_are_named(problem, surrogate):
    with pytest.raises(ValueError, match="defence must be fitted"):
        surrogate(DkNN(problem[0], "input"))
    with pytest.raises(TypeError, match="defence must be a RAILS or a DkNN"):
        surrogate(problem[0])


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"neighbours": 0}, ValueError, "neighbours must be at least 1 and at most 12, got 0"),
        ({"neighbours": 13}, ValueError, "at most 12, got 13"),
        ({"temperature": 0.0}, ValueError, "temperature must be"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
    ],
)
def test_bad_settings_are_named(problem, settings, error, match):
    with pytest.raises(error, match=match):
        SoftNeighbours(fitted(problem, "cosine", "input"), **{"neighbours": 4} | settings)


def test_bad_defences_and_inputs_are_named(problem):
    model, x, _ = problem
    with pytest.raises(TypeError, match="defence must be a RAILS or a DkNN, got Sequential"):
        SoftNeighbours(model)
    with pytest.raises(ValueError, match="defence must be fitted"):
        attacks.SoftNeighbours(DkNN(model, "input"))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 4\)"):
        SoftNeighbours(fitted(problem, "cosine", "input"), neighbours=4)(x[:, :3])

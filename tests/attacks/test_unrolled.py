"""Unrolled: its gradient against finite differences, its answers against RAILS, what an attack on it does."""

import pytest
import torch
from torch import nn

from immunonet import RAILS, DkNN, Maturation
from immunonet.attacks import PGD, Eot, Unrolled

LAYERS = ["input", "0", "1", ["input", "1"]]


@pytest.fixture(scope="module")
def problem():
    """Three clouds in [0, 1]^4 and a small network that was not trained."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    centres = torch.tensor([[0.3, 0.3, 0.5, 0.5], [0.7, 0.3, 0.5, 0.5], [0.5, 0.7, 0.5, 0.5]])
    x = (centres[y] + 0.08 * torch.randn(len(y), 4, generator=generator)).clamp(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, x, y


def fitted(problem, layers, **settings):
    model, x, y = problem
    maturation = Maturation(**{"population": 60, "neighbours": 2, "generations": 2} | settings.pop("maturation", {}))
    return RAILS(model, layers, maturation=maturation, seed=0, **settings).fit(x, y, calibration=(x[:20], y[:20]))


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("crossover", ["affinity", "authors", None])
def test_gradients_are_finite_and_reach_every_antigen(problem, layers, crossover):
    _, x, y = problem
    antigens = (x + 0.05).clamp(0, 1).requires_grad_()
    unrolled = Unrolled(fitted(problem, layers, maturation={"crossover": crossover}), population=12)
    found = unrolled(antigens)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(len(x)))
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(found, y, reduction="sum"), antigens)
    assert bool(torch.isfinite(slope).all())
    assert bool((slope.flatten(1).norm(dim=1) > 0).all())


def test_without_generations_the_gradient_is_exact(problem):
    """Cells do not depend on the antigen then, and all examples flock: finite differences of the loss must agree."""
    _, x, y = problem
    rails = fitted(problem, ["input", "1"], maturation={"neighbours": 20, "mutation_rate": 0.0})
    unrolled = Unrolled(rails, generations=0, population=60, width=3.0)
    antigens = x[:6] + 0.03

    def loss(z):
        return nn.functional.cross_entropy(unrolled(z), y[:6], reduction="none")

    z = antigens.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(z).sum(), z)
    direction = nn.functional.normalize(slope)
    rise = (loss(antigens + 1e-3 * direction) - loss(antigens - 1e-3 * direction)) / 2e-3
    torch.testing.assert_close(rise, slope.norm(dim=1), rtol=0.03, atol=0.01)


def test_it_runs_no_more_generations_than_the_defence(problem):
    rails, x = fitted(problem, "input", maturation={"generations": 0}), problem[1][:6]
    assert torch.equal(Unrolled(rails)(x), Unrolled(rails, generations=0)(x))


def test_it_answers_as_rails_does(problem):
    _, x, _ = problem
    rails = fitted(problem, "input")
    unrolled = Unrolled(rails, population=60)
    with torch.no_grad():
        agreement = (unrolled(x).argmax(1) == rails.predict(x)).float().mean()
    assert agreement >= 0.9


def test_cells_of_another_space(problem):
    _, x, _ = problem
    rails = fitted(problem, "1", space="0")
    antigens = x[:4].clone().requires_grad_()
    found = Unrolled(rails, population=12)(antigens)
    assert torch.autograd.grad(found[:, 0].sum(), antigens)[0].abs().max() > 0


def test_noise_is_the_same_at_every_call_and_for_every_batch_unless_a_seed_says_otherwise(problem):
    _, x, _ = problem
    unrolled = Unrolled(fitted(problem, "input"), population=12)
    first = unrolled(x[:8])
    assert torch.equal(first, unrolled(x[:8]))
    torch.testing.assert_close(torch.cat([unrolled(x[:3]), unrolled(x[3:8])]), first, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(unrolled(x[:8], seed=1), first)
    mean = torch.stack([unrolled(x[:8], seed=s).exp() for s in (3, 4)]).mean(0)
    torch.testing.assert_close(Eot(unrolled, draws=2, seed=3)(x[:8]).exp(), mean)


def test_a_batch_has_as_many_antigens_as_fit_the_caches(problem):
    """Cells of 4 values, 2 or 20 clones of each of 3 x 2 naive ones: 2**21 values hold 43,690 and 4,369 of them."""
    rails = fitted(problem, "1")
    assert Unrolled(rails, population=12).batch_size == 43_690
    assert Unrolled(rails, population=120).batch_size == 4_369
    assert Unrolled(rails, population=10**7).batch_size == 1


def test_an_attack_on_it_breaks_a_rails_that_transfer_does_not(digits):
    net, x, y, x_train, y_train = digits
    maturation = Maturation(population=100, neighbours=5, generations=2)
    rails = RAILS(net, "input", maturation=maturation, seed=0)
    rails.fit(x_train[:600], y_train[:600], calibration=(x_train[600:650], y_train[600:650]))
    x, y = x[:40], y[:40]
    attack = PGD(eps=0.2, step=0.05, iterations=8, random_start=False)
    transfer = attack(net, x, y).adversarials
    adaptive = attack(Unrolled(rails, generations=1, population=50), x, y).adversarials
    clean, transferred, broken = (
        float(torch.stack([rails.predict(z, seed=s) == y for s in (11, 12)]).float().mean())
        for z in (x, transfer, adaptive)
    )
    assert clean > 0.9
    assert broken < transferred - 0.1


@pytest.mark.parametrize(
    ("setting", "error", "match"),
    [
        ({"generations": -1}, ValueError, "generations must be at least 0"),
        ({"population": 0}, ValueError, "population must be at least 1"),
        ({"width": 0.0}, ValueError, "width must be"),
        ({"seed": None}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_settings_are_named(problem, setting, error, match):
    with pytest.raises(error, match=match):
        Unrolled(fitted(problem, "input"), **setting)


def test_bad_defences_and_inputs_are_named(problem):
    model, x, _ = problem
    with pytest.raises(TypeError, match="rails must be a RAILS, got DkNN"):
        Unrolled(DkNN(model, "input"))
    with pytest.raises(ValueError, match="must be fitted"):
        Unrolled(RAILS(model, "input"))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 4\)"):
        Unrolled(fitted(problem, "input"))(x[:, :3])


@pytest.mark.parametrize("mutation_rate", [0.0, 0.15])
def test_an_antigen_that_is_in_the_repertoire_has_a_gradient(mutation_rate):
    x, y = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    maturation = Maturation(generations=10, population=60, neighbours=5, mutation_rate=mutation_rate)
    unrolled = Unrolled(RAILS(model, "input", maturation=maturation, seed=0).fit(x, y), population=60)
    antigens = x[:4].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(unrolled(antigens)[:, 0].sum(), antigens)
    assert bool(torch.isfinite(gradient).all())

"""SoftClones: its value by hand, its gradient, and what an attack on it does to a RAILS that brings clones near."""

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import nn

from immunonet import RAILS, DkNN, Maturation
from immunonet.attacks import PGD, SoftClones, SoftNeighbours
from immunonet.immune import operators


def fitted(layers="input", space=None, **settings):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(30, 1, 6, 6, generator=generator), torch.arange(30) % 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))
    maturation = Maturation(**{"population": 60, "neighbours": 4, "generations": 2} | settings)
    rails = RAILS(model, layers, maturation=maturation, space=space, seed=0)
    return rails.fit(x, y, calibration=(x[:10], y[:10]))


def antigens():
    return torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ridge", [None, 0.5])
def test_the_vote_is_that_of_the_nearest_and_of_their_clones(ridge):
    rails, x = fitted(alignment=0.0, recombination=ridge), antigens()
    examples, labels = rails.repertoire.x, rails.repertoire.y
    logits = []
    for label in range(3):
        own = examples[labels == label]
        near = NearestNeighbors(n_neighbors=4).fit(own.flatten(1).numpy()).kneighbors(x.flatten(1).numpy())[1]
        cells = own[torch.tensor(near)]
        moved = [] if ridge is None else [operators.recombine(cells, x, ridge)]
        logits.append((torch.cat([cells, *moved], 1) - x[:, None]).flatten(2).square().sum(2))
    squares = torch.stack(logits, 1)
    scale = 0.2 * squares.flatten(1).std(1)[:, None, None]
    expected = (-squares / scale).exp().sum(2)
    found = SoftClones(rails, sharpness=0.2)(x)
    torch.testing.assert_close(found.exp(), expected / expected.sum(1, keepdim=True), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("generations", "sharpness"), [(0, 0.3), (2, 0.1)])
def test_the_vote_is_softer_where_no_cell_evolves(generations, sharpness):
    rails, x = fitted(generations=generations), antigens()
    assert torch.equal(SoftClones(rails)(x), SoftClones(rails, sharpness=sharpness)(x))
    assert not torch.equal(SoftClones(rails)(x), SoftClones(rails, sharpness=0.2)(x))


@pytest.mark.parametrize(("layers", "space"), [("input", None), ("0", "0"), ("1", "0"), (["input", "0"], None)])
def test_gradients_reach_every_antigen_even_one_of_the_repertoire(layers, space):
    rails = fitted(layers, space)
    x = torch.cat([antigens(), rails.repertoire.x[:2]]).requires_grad_()
    (slope,) = torch.autograd.grad(SoftClones(rails)(x)[:, 0].sum(), x)
    assert bool(torch.isfinite(slope).all())
    assert bool((slope[:5].flatten(1).norm(dim=1) > 0).all())


def test_a_softened_vote_is_that_of_another_sharpness():
    rails, x = fitted(), antigens()
    assert torch.equal(SoftClones(rails, sharpness=0.1).softened(3)(x), SoftClones(rails, sharpness=0.3)(x))


def test_the_answer_does_not_depend_on_the_batch():
    soft, x = SoftClones(fitted()), antigens()
    torch.testing.assert_close(soft(x)[:2], soft(x[:2]))


def test_it_breaks_recombined_clones_where_neighbours_alone_do_not(digits):
    net, x, y, x_train, y_train = digits
    settings = Maturation(population=200, neighbours=10, generations=2, alignment=0.0, recombination=0.1)
    rails = RAILS(net, "input", maturation=settings, seed=0)
    rails.fit(x_train[:600], y_train[:600], calibration=(x_train[600:650], y_train[600:650]))
    x, y = x[:60], y[:60]
    attack = PGD(eps=0.2, step=0.05, iterations=10, random_start=False)
    clean, unaware, aware = (
        float(torch.stack([rails.predict(z, seed=s) == y for s in (11, 12)]).float().mean())
        for z in (x, attack(SoftNeighbours(rails), x, y).adversarials, attack(SoftClones(rails), x, y).adversarials)
    )
    assert clean > 0.9
    assert aware < unaware - 0.05


def test_bad_arguments_are_named():
    rails = fitted()
    with pytest.raises(ValueError, match="sharpness must be"):
        SoftClones(rails, sharpness=0)
    with pytest.raises(TypeError, match="rails must be a RAILS, got DkNN"):
        SoftClones(DkNN(rails.model, "input"))
    with pytest.raises(ValueError, match="must be fitted"):
        SoftClones(RAILS(rails.model, "input"))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 6, 6\)"):
        SoftClones(rails)(antigens()[:, :, :3])

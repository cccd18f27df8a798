import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats
from torch.testing import assert_close

from immunonet.immune import backend, operators
from immunonet.immune.operators import Mutation

LEVEL = 1e-4


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def blobs(n, side=24, seed=0):
    """Return n smooth images `(n, 1, side, side)` with a dark border."""
    noise = rand(n, side, side, seed=seed).numpy()
    noise[:, :4] = noise[:, -4:] = noise[:, :, :4] = noise[:, :, -4:] = 0
    return torch.from_numpy(np.stack([ndimage.gaussian_filter(image, 2) for image in noise]))[:, None]


def moved(image, change):
    """Return `image` `(side, side)` under the identity plus `change` `(2, 3)`, by scipy."""
    # Ours maps (x, y) in [-1, 1], scipy's (row, column) about the origin.
    side = len(image)
    matrix = (np.eye(2) + change[:, :2])[::-1, ::-1]
    centre = np.full(2, (side - 1) / 2)
    offset = centre - matrix @ centre + change[::-1, 2] * side / 2
    return torch.from_numpy(ndimage.affine_transform(image.numpy(), matrix, offset, order=1, mode="nearest"))


def test_registration_finds_the_map_that_moved_an_image():
    images = blobs(8)
    change = (2 * rand(8, 2, 3, seed=1).double().numpy() - 1) * 0.1
    goals = torch.stack([moved(image[0], c) for image, c in zip(images, change, strict=True)])[:, None]
    before = (images - goals).flatten(1).norm(dim=1)
    after = (operators.register(images, goals, 0.06, steps=10) - goals).flatten(1).norm(dim=1)
    assert (after < 0.05 * before).all()


def test_registration_is_no_worse_than_any_shift_it_may_make():
    # A goal far to the side: the shift alone reaches its limit, a tenth of the side.
    image = blobs(1)
    goal = torch.from_numpy(ndimage.shift(image[0, 0].numpy(), (0, 6), order=1))[None, None]
    found = operators.register(image, goal, 0.1, steps=50)
    errors = []
    for numbers in np.stack(np.meshgrid(*[[-0.2, 0.0, 0.2]] * 2), -1).reshape(-1, 2):
        errors.append((moved(image[0, 0], np.array([[0, 0, numbers[0]], [0, 0, numbers[1]]])) - goal[0, 0]).norm())
    assert (found - goal).norm() <= min(errors) + 1e-6


def test_registration_reaches_no_farther_than_it_may():
    image = blobs(1)
    goal = image.roll(6, dims=3)
    for reach, pixels in ((1 / 24, 1), (2 / 24, 2)):
        # The mean place of the mass moves by no more than the shift, and what slant and size add at its distance.
        found = operators.register(image, goal, reach, steps=20)
        columns = torch.arange(24.0)
        centres = [(part.sum((0, 1, 2)) * columns).sum() / part.sum() for part in (image, found)]
        assert 0 < centres[1] - centres[0] < 2 * pixels


@given(seed=st.integers(0, 1000), reach=st.floats(0.0, 1.0))
def test_a_registered_image_has_no_new_extremes(seed, reach):
    image, goal = rand(3, 2, 6, 4, seed=seed), rand(3, 2, 6, 4, seed=seed + 1)
    found = operators.register(image, goal, reach)
    assert (found.amax((2, 3)) <= image.amax((2, 3)) + 1e-6).all()
    assert (found.amin((2, 3)) >= image.amin((2, 3)) - 1e-6).all()


def test_an_image_without_edges_stays_as_it_is():
    flat = torch.full((2, 1, 5, 5), 0.3)
    assert_close(operators.register(flat, rand(2, 1, 5, 5), 0.1), flat)


def test_half_of_the_clones_are_aligned():
    naive, antigen = blobs(2), blobs(1, seed=3)
    near = operators.approach(naive[None], antigen, 0.1, None)
    found = operators.clones(naive[None], near, 5)[0].unflatten(0, (2, 5))
    goals = antigen.expand_as(naive)
    for clones, cell, aligned in zip(found, naive, operators.register(naive, goals, 0.1), strict=True):
        assert_close(clones, torch.cat([cell.expand(3, -1, -1, -1), aligned.expand(2, -1, -1, -1)]))


@pytest.mark.parametrize(("shape", "reach"), [((6,), 0.1), ((1, 6, 6), 0.0)])
def test_what_is_not_aligned(shape, reach):
    cells = rand(2, 4, *shape)
    assert torch.equal(operators.approach(cells, rand(2, *shape, seed=1), reach, None), cells)


def test_one_clone_is_the_cell_itself():
    cells = rand(2, 4, 1, 6, 6)
    assert torch.equal(operators.clones(cells, cells + 1, 1), cells)


@pytest.mark.parametrize("reach", [0.0, 0.1])
def test_cells_are_recombined_after_alignment(reach):
    naive, antigen = blobs(3), blobs(1, seed=3)
    found = operators.approach(naive[None], antigen, reach, 0.5)
    aligned = operators.register(naive, antigen.expand_as(naive), reach) if reach else naive
    assert_close(found, operators.recombine(aligned[None], antigen, 0.5))


def test_recombined_cells_are_the_point_of_their_hyperplane_nearest_to_the_antigen():
    cells, antigens = rand(2, 4, 3, 5), rand(2, 3, 5, seed=1)
    found = operators.recombine(cells.double(), antigens.double(), 1e-9)
    for family, goal, moved in zip(cells.flatten(2).double(), antigens.flatten(1).double(), found, strict=True):
        edges = (family[1:] - family[0]).T
        nearest = family[0] + edges @ torch.linalg.lstsq(edges, (goal - family[0])[:, None]).solution[:, 0]
        assert_close(moved.flatten(1), nearest.expand(4, -1), rtol=0, atol=1e-6)


@given(seed=st.integers(0, 1000), ridge=st.floats(1e-3, 10))
def test_a_larger_ridge_holds_recombined_cells_back(seed, ridge):
    cells, antigens = rand(2, 4, 6, seed=seed), rand(2, 6, seed=seed + 1)
    near, far = (operators.recombine(cells, antigens, r) for r in (ridge, 4 * ridge))
    moved = [(part - cells).flatten(2).norm(dim=2) for part in (near, far)]
    left = [(part - antigens[:, None]).norm(dim=2) for part in (near, far)]
    assert (moved[1] <= moved[0] + 1e-5).all()
    assert (left[0] <= left[1] + 1e-5).all()


@pytest.mark.parametrize("cells", [torch.ones(1, 3, 4), torch.rand(1, 1, 4)], ids=["all the same", "one cell"])
def test_cells_without_differences_are_not_recombined(cells):
    assert_close(operators.recombine(cells, torch.zeros(1, 4), 0.5), cells)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 18.0])
def test_selection_frequencies_match_the_softmax(temperature):
    distances = torch.tensor([[1.0, 1.2, 0.9, 2.0, 1.0], [0.0, 3.0, 30.0, 5.0, 1.0]])
    n = 100_000
    parents = operators.select(distances, torch.full((2,), temperature), rand(2, n))
    for row, drawn in zip(distances.double().numpy(), parents, strict=True):
        weights = np.exp(-row / temperature)
        expected = n * weights / weights.sum()
        found = np.bincount(drawn.numpy(), minlength=5)
        likely = expected > 1e-6
        assert not found[~likely].any()
        assert stats.chisquare(found[likely], expected[likely] * n / expected[likely].sum()).pvalue > LEVEL


def test_each_family_has_its_own_temperature():
    distances = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    parents = operators.select(distances, torch.tensor([0.01, 1e6]), rand(2, 10_000))
    assert parents[0].sum() == 0
    assert stats.binomtest(int(parents[1].sum()), 10_000, 0.5).pvalue > LEVEL


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_a_cell_without_weight_is_never_selected(u):
    distances = torch.tensor([[1e6, 1.0, 1.0, 1.0, 1e6]])
    parent = operators.select(distances, torch.ones(1), torch.full((1, 1), u))
    assert parent.item() == (1 if u == 0 else 3)


def test_selection_among_equals_is_fair():
    parents = operators.select(torch.zeros(1, 7), torch.full((1,), 1e-6), rand(1, 70_000))
    assert stats.chisquare(np.bincount(parents[0].numpy(), minlength=7)).pvalue > LEVEL


def test_share_of_the_first_parent():
    d1, d2 = torch.tensor([1.0, 3.0, 0.0, 2.0, 0.0]), torch.tensor([3.0, 1.0, 2.0, 0.0, 0.0])
    assert operators.first_parent_share(d1, d2, "affinity").tolist() == [0.75, 0.25, 1.0, 0.0, 0.5]
    assert operators.first_parent_share(d1, d2, "authors").tolist() == [0.25, 0.75, 0.0, 1.0, 0.5]


@pytest.mark.parametrize(("crossover", "expected"), [("affinity", 0.8), ("authors", 0.2)])
def test_crossover_takes_the_nearer_parents_pixels(crossover, expected):
    share = operators.first_parent_share(torch.tensor([[1.0]]), torch.tensor([[4.0]]), crossover)
    shape = (1, 1, 1, 200, 200)
    children = operators.cross(torch.ones(shape), torch.zeros(shape), share, rand(*shape))
    assert children.unique().tolist() == [0, 1]
    assert stats.binomtest(int(children.sum()), 40_000, expected).pvalue > LEVEL


def test_crossover_with_one_parent_only():
    first, second, u = torch.ones(1, 2, 50), torch.zeros(1, 2, 50), rand(1, 2, 50)
    children = operators.cross(first, second, torch.tensor([[1.0, 0.0]]), u)
    assert children[0, 0].eq(1).all()
    assert children[0, 1].eq(0).all()


def mutated(rate, least, most, n=100_000, width=4.0):
    """Amounts, as a share of the width, of n pixels that start far from both bounds."""
    cells = torch.zeros(1, 1, n, dtype=torch.float64)
    low, high = torch.tensor(-width / 2), torch.tensor(width / 2)
    args = (torch.tensor([rate]), torch.tensor([least]), torch.tensor([most]), low, high)
    return operators.mutate(cells, *args, rand(1, 1, n)).flatten().numpy() / width


@pytest.mark.parametrize(("rate", "least", "most"), [(0.15, 0.05, 0.15), (0.985, 0.0, 0.15), (1.0, 0.1, 0.4)])
def test_mutation_rates_and_amounts(rate, least, most):
    amounts = mutated(rate, least, most)
    moved = amounts[amounts != 0]
    if rate < 1:
        assert stats.binomtest(len(moved), len(amounts), rate).pvalue > LEVEL
    else:
        assert len(moved) >= len(amounts) - 5
    assert stats.kstest(np.abs(moved), stats.uniform(least, most - least).cdf).pvalue > LEVEL
    assert stats.binomtest(int((moved > 0).sum()), len(moved), 0.5).pvalue > LEVEL
    # Sign and size are independent.
    assert stats.ks_2samp(moved[moved > 0], -moved[moved < 0]).pvalue > LEVEL


def test_no_mutation():
    assert not mutated(0.0, 0.05, 0.15).any()
    assert not mutated(1.0, 0.0, 0.0).any()


def test_a_range_of_one_amount():
    assert np.allclose(np.abs(mutated(1.0, 0.25, 0.25)), 0.25)


def test_families_mutate_at_their_own_rate_and_range():
    cells = torch.zeros(2, 3, 1000)
    rate, most = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.1])
    found = operators.mutate(cells, rate, torch.zeros(2), most, torch.tensor(-1.0), torch.tensor(1.0), rand(2, 3, 1000))
    assert not found[0].any()
    assert 0.19 < found[1].abs().max() <= 0.2


@settings(max_examples=40, deadline=None)
@given(
    low=st.floats(-1e3, 1e3, width=32),
    width=st.floats(2**-10, 1e3, width=32),
    rate=st.floats(0, 1),
    band=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    seed=st.integers(0, 1000),
)
def test_cells_never_leave_their_bounds(low, width, rate, band, seed):
    bounds = torch.tensor([[low, low + width], [0.0, 1.0]])
    low, high = bounds[:, 0, None], bounds[:, 1, None]
    start = low + (high - low) * rand(2, 3, 2, 8, seed=seed)
    args = (torch.full((2,), rate), torch.full((2,), band[0]), torch.full((2,), band[1]))
    found = operators.mutate(start, *args, low, high, rand(2, 3, 2, 8, seed=seed + 1))
    assert ((found >= low) & (found <= high)).all()


def offspring(step, *, cells, share, rate=0.3, shared=True, family=None):
    batch, classes, size = cells.shape[:3]
    family = family or torch.ones(batch, classes).nonzero(as_tuple=True)
    g = torch.Generator().manual_seed(5)
    parents = torch.randint(0, size, (len(family[0]), 2 * size), generator=g)
    keys = torch.randint(0, 2**32, (2, 1 if shared else batch, 2), generator=g).expand(2, batch, 2)
    mutation = Mutation(
        rate=torch.full((batch,), rate),
        least=torch.full((batch,), 0.05),
        most=torch.linspace(0.1, 0.3, batch),
        low=torch.zeros(cells.shape[3:]),
        high=torch.ones(cells.shape[3:]),
    )
    out = cells.clone()
    step(out, family, parents, share[family], keys[0], keys[1], mutation)
    return out, parents


def test_offspring_are_crossed_within_their_family():
    """Cells that hold their own number show which parents each child's pixels come from."""
    batch, classes, size = 2, 3, 4
    numbers = torch.arange(batch * classes * size).reshape(batch, classes, size) / 100
    cells = numbers[..., None].repeat(1, 1, 1, 500)
    share = torch.full((batch, classes, size), 0.7)
    out, parents = offspring(operators.offspring, cells=cells, share=share, rate=0.0)
    for f, (b, c) in enumerate((b, c) for b in range(batch) for c in range(classes)):
        for i in range(size):
            first, second = numbers[b, c, parents[f, i]], numbers[b, c, parents[f, size + i]]
            from_first = (out[b, c, i] == first).sum().item()
            assert ((out[b, c, i] == first) | (out[b, c, i] == second)).all()
            if first != second:
                assert stats.binomtest(from_first, 500, 0.7).pvalue > LEVEL


def test_other_families_stay_as_they_are():
    cells = rand(2, 3, 4, 5, 5)
    family = (torch.tensor([0, 1]), torch.tensor([2, 0]))
    out, _ = offspring(operators.offspring, cells=cells, share=torch.full((2, 3, 4), 0.5), family=family)
    changed = (out != cells).flatten(2).any(2)
    assert changed.tolist() == [[False, False, True], [True, False, False]]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("shape", [(7,), (2, 5, 3)])
def test_fused_loops_give_the_same_cells_as_the_operators(shape, rate, shared):
    fused = pytest.importorskip("immunonet.immune.fused")
    cells, share = rand(3, 2, 6, *shape), rand(3, 2, 6, seed=1)
    expected, _ = offspring(operators.offspring, cells=cells, share=share, rate=rate, shared=shared)
    found, _ = offspring(fused.offspring, cells=cells, share=share, rate=rate, shared=shared)
    assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_backend_falls_back_to_the_operators(monkeypatch):
    assert backend.offspring_for(torch.zeros(1, dtype=torch.float64)) is operators.offspring
    monkeypatch.setattr(backend, "_numba", lambda: None)
    assert backend.offspring_for(torch.zeros(1)) is operators.offspring

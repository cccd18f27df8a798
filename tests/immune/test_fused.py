"""The fused loops against the torch operators: single calls, and whole responses with and without numba."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.testing import assert_close

from immunonet import RAILS, Maturation
from immunonet.features import maps
from immunonet.features.affine import AffineMap
from immunonet.features.maps import IdentityMap
from immunonet.immune import backend, operators
from immunonet.immune.noise import GOLDEN, Noise, uniform
from immunonet.immune.operators import Mutation

fused = pytest.importorskip("immunonet.immune.fused")

LEVEL = 1e-4


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def families(batch, classes, seed):
    """A random non-empty part of all families, in their order."""
    keep = rand(batch, classes, seed=seed) < 0.6
    keep[seed % batch, seed % classes] = True
    return keep.nonzero(as_tuple=True)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    classes=st.integers(1, 4),
    size=st.sampled_from([1, 3, 8]),
    shape=st.sampled_from([(1,), (7,), (3, 5), (3, 4, 5)]),
    rate=st.sampled_from([0.0, 0.1, 0.985, 1.0]),
    shared=st.booleans(),
)
def test_offspring_equal_the_operators_to_the_bit(seed, batch, classes, size, shape, rate, shared):
    # Bounds of their own for every channel, far apart in scale; cells outside of them are clipped by both.
    low = rand(*shape[:1], *(1,) * (len(shape) - 1), seed=seed) * torch.logspace(-2, 2, shape[0]).reshape(
        -1, *(1,) * (len(shape) - 1)
    )
    high = 2 * low + 0.1
    cells = low + (high - low) * (1.2 * rand(batch, classes, size, *shape, seed=seed + 1) - 0.1)
    family = families(batch, classes, seed)
    g = torch.Generator().manual_seed(seed)
    parents = torch.randint(0, size, (len(family[0]), 2 * size), generator=g)
    share = torch.rand(len(family[0]), size, generator=g)
    noise = Noise([seed] if shared else list(range(batch)), antigens=batch)
    keys = [noise.keys(3, use, cells.device) for use in ("cross", "mutate")]
    mutation = Mutation(
        rate=torch.linspace(rate, min(1.0, 1.1 * rate), batch),
        least=torch.linspace(0.01, 0.05, batch),
        most=torch.linspace(0.05, 0.3, batch),
        low=low.expand(shape),
        high=high.expand(shape),
    )
    expected, found = cells.clone(), cells.clone()
    operators.offspring(expected, family, parents, share, *keys, mutation)
    fused.offspring(found, family, parents, share, *keys, mutation)
    assert torch.equal(found, expected)
    named = torch.zeros(batch, classes, dtype=torch.bool)
    named[family] = True
    assert torch.equal(found[~named], cells[~named])
    inside = found[named]
    assert ((inside >= low) & (inside <= high)).all()


def test_places_beyond_32_bits_of_a_stream_are_the_same():
    """A population of many classes has more pixels than a 32-bit counter's half."""
    keys = torch.tensor([[2**32 - 1, 123]])
    n = 2**31 + 5
    value = uniform(keys, torch.tensor([n]), 1)
    again = fused._uniform.py_func
    with np.errstate(over="ignore"):
        assert again(np.uint32(n) * np.uint32(GOLDEN), np.uint32(2**32 - 1), np.uint32(123)) == value.item()


def wide_band(d, reach):
    """A matrix whose Gram matrix has `2 reach + 1` diagonals."""
    full = torch.zeros(d, d + reach)
    for t in range(reach + 1):
        full.diagonal(t).copy_(rand(d, seed=t) - 0.3)
    return full


@pytest.mark.parametrize("reach", [0, 1, 6, 7, 13])
@pytest.mark.parametrize("shape", [(121,), (1, 11, 11), (5, 5, 5)])
def test_distances_by_diagonals_equal_those_by_the_matrix(shape, reach, monkeypatch):
    d = int(np.prod(shape))
    affine = AffineMap("layer", wide_band(d, reach), rand(d + reach))
    assert len(affine._band[0]) == reach + 1
    cells, antigens = rand(3, 4, 5, *shape), rand(3, *shape, seed=1)
    # One cell is its antigen.
    cells[1, 2, 3] = antigens[1]
    family = (torch.tensor([0, 1, 1, 2]), torch.tensor([3, 2, 0, 1]))
    found = affine.distances(cells, family, antigens, affine(antigens))
    difference = (affine(cells[family].flatten(0, 1)).unflatten(0, (4, 5)) - affine(antigens)[family[0], None]).norm(
        dim=2
    )
    assert_close(found, difference, atol=1e-5, rtol=1e-5)
    assert found[1, 3] == 0
    monkeypatch.setattr(maps, "fused_for", lambda _: None)
    assert_close(affine.distances(cells, family, antigens, None), difference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (9,), (3, 4, 5)])
def test_distances_of_the_cells_themselves(shape, monkeypatch):
    cells, antigens = rand(2, 3, 4, *shape), rand(2, *shape, seed=1)
    family = families(2, 3, 5)
    identity = IdentityMap("input")
    expected = torch.stack([(cells[b, c] - antigens[b]).flatten(1).norm(dim=1) for b, c in zip(*family, strict=True)])
    assert_close(identity.distances(cells, family, antigens, None), expected)
    monkeypatch.setattr(maps, "fused_for", lambda _: None)
    assert_close(identity.distances(cells, family, antigens, None), expected)


def test_no_family_is_no_trouble():
    none = (torch.zeros(0, dtype=torch.long),) * 2
    cells = rand(2, 3, 4, 9)
    assert IdentityMap("input").distances(cells, none, rand(2, 9), None).shape == (0, 4)
    assert AffineMap("layer", wide_band(9, 1), rand(10)).distances(cells, none, rand(2, 9), None).shape == (0, 4)


def test_only_float32_cells_on_the_cpu_are_fused():
    assert backend.fused_for(torch.zeros(1)) is fused
    assert backend.offspring_for(torch.zeros(1)) is fused.offspring
    assert backend.register_for(torch.zeros(1)) is fused.register
    for other in (torch.zeros(1, dtype=torch.float64), torch.zeros(1, device="meta")):
        assert backend.fused_for(other) is None
        assert backend.offspring_for(other) is operators.offspring
        assert backend.register_for(other) is operators.register


@pytest.mark.parametrize("shared_noise", [True, False])
@pytest.mark.parametrize("layer", ["0", "2", "input"])
def test_responses_are_the_same_with_and_without_numba(layer, shared_noise, conv, images, monkeypatch):
    x, y = images
    maturation = Maturation(population=120, neighbours=4, generations=4)
    rails = RAILS(conv, layer, maturation=maturation, shared_noise=shared_noise, seed=0).fit(x, y)
    assert isinstance(rails.feature_maps[0], AffineMap) == (layer == "0")
    antigens = (x[:20] + 0.4 * rand(20, 1, 6, 6) - 0.2).clamp(0, 1)
    if layer == "2":
        monkeypatch.setattr(fused, "register", operators.register)
    found = rails.respond(antigens, trace=True)
    monkeypatch.setattr(backend, "_numba", lambda: None)
    assert backend.fused_for(antigens) is None
    expected = rails.respond(antigens, trace=True)
    assert torch.equal(found.labels, expected.labels)
    # Distances may differ in their last digit, and two cells that are equally near change places.
    assert (found.generations == expected.generations).double().mean() > 0.9
    assert ((found.votes - expected.votes).abs().amax(1) < 0.01).double().mean() > 0.9
    assert_close(found.trace[0].affinity_best[0], expected.trace[0].affinity_best[0], atol=1e-5, rtol=1e-5)
    if layer == "2":
        # The distances and the alignment are torch's in both, so that only the offspring could tell.
        assert torch.equal(found.plasma.x, expected.plasma.x)


def test_without_numba_the_operators_serve(monkeypatch):
    backend._numba.cache_clear()
    import sys

    import immunonet.immune

    monkeypatch.setitem(sys.modules, "immunonet.immune.fused", None)
    monkeypatch.delattr(immunonet.immune, "fused")
    try:
        assert backend.fused_for(torch.zeros(1)) is None
        assert backend.offspring_for(torch.zeros(1)) is operators.offspring
    finally:
        backend._numba.cache_clear()


# Alignment.


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    n=st.sampled_from([1, 4]),
    channels=st.sampled_from([1, 3]),
    height=st.sampled_from([1, 2, 5, 28]),
    width=st.sampled_from([1, 2, 5, 7, 28]),
    reach=st.sampled_from([0.0, 0.02, 0.06, 0.3, 1]),
    steps=st.integers(0, 2),  # every further one multiplies what rounding has parted
)
@example(seed=2, n=4, channels=3, height=1, width=5, reach=1, steps=2)
def test_registration_equals_the_operator(seed, n, channels, height, width, reach, steps):
    images, goals = rand(2, n, channels, height, width, seed=seed)
    exact = operators.register(images.double(), goals.double(), reach, steps)
    ways = fused.register(images, goals, reach, steps), operators.register(images, goals, reach, steps)
    error, usual = (float((moved - exact).abs().max()) for moved in ways)
    # Where a map is ill-conditioned single precision parts the two, either of them by so much from the formula.
    assert error <= max(1e-4, 4 * usual)


def test_registration_equals_the_operator_out_of_scale():
    """Images of any brightness: the curvature, whose squares they are, must neither vanish nor overflow."""
    images, goals = rand(2, 4, 2, 9, 6)
    for scale in (1e-3, 255.0, 1e6):
        found = fused.register(scale * images, scale * goals, 0.1) / scale
        assert_close(found, operators.register(scale * images, scale * goals, 0.1) / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (1, 3, 28, 28), (3, 2, 1, 1)])
def test_what_registration_leaves_as_it_is(shape):
    flat = torch.full(shape, 0.3)
    assert torch.equal(fused.register(flat, rand(*shape), 0.1), flat)
    image = rand(*shape)
    assert torch.equal(fused.register(image, image, 0.1), image)


def test_registration_takes_strides_one_goal_for_all_and_no_images():
    images, goals = rand(2, 6, 5, 3, 4)
    strided, goal = images.permute(3, 2, 0, 1)[:, :, ::2], goals.permute(3, 2, 0, 1)[:1, :, ::2]
    assert not strided.is_contiguous()
    before = strided.clone()
    found = fused.register(strided, goal.expand_as(strided), 0.1)
    assert_close(found, operators.register(strided, goal, 0.1), atol=1e-4, rtol=0)
    assert torch.equal(strided, before)
    assert fused.register(images[:0], goals[:0], 0.1).shape == (0, 5, 3, 4)


def test_registration_survives_what_is_not_finite():
    images = rand(4, 1, 6, 6)
    images[0, 0, 2, 3], images[1, 0, 0, 0], images[2] = torch.nan, torch.inf, 1e38
    found = fused.register(images, rand(4, 1, 6, 6, seed=1), 0.1)
    assert_close(found[3:], operators.register(images[3:], rand(4, 1, 6, 6, seed=1)[3:], 0.1), atol=1e-4, rtol=0)


def test_threads_and_autocast_do_not_change_a_registration(monkeypatch):
    images, goals = rand(2, 50, 1, 28, 28)
    found = []
    threads = torch.get_num_threads()
    monkeypatch.setattr(fused, "SERIAL_VALUES", 0)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(fused.register(images, goals, 0.06))
    finally:
        torch.set_num_threads(threads)
    with torch.autocast("cpu", torch.bfloat16):
        found.append(fused.register(images, goals, 0.06))
        coarse = fused.register(images, goals.bfloat16(), 0.06)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(coarse, fused.register(images, goals.bfloat16().float(), 0.06))


def test_clones_are_aligned_by_the_fused_loops(monkeypatch):
    cells, antigens = rand(2, 6, 1, 9, 9), rand(2, 1, 9, 9, seed=1)
    expected = operators.approach(cells, antigens, 0.1, 0.5)
    assert_close(backend.approach(cells, antigens, 0.1, 0.5), expected, atol=1e-4, rtol=0)
    monkeypatch.setattr(fused, "register", lambda images, goals, reach: torch.zeros_like(images))
    assert (backend.approach(cells, antigens, 0.1, None) == 0).all()
    assert_close(backend.approach(cells.double(), antigens.double(), 0.1, 0.5).float(), expected)


# Numbers as the fused loops use them.


def drawn(seed, generation, use, batch=2, count=20_000):
    """The amounts `(batch, count)` by which pixels moved, uniform in (-1, 1): they tell the noise."""
    cells = torch.zeros(batch, 1, 1, count)
    ones = torch.ones(count)
    mutation = Mutation(torch.ones(batch), torch.zeros(batch), torch.full((batch,), 0.5), -ones, ones)
    noise = Noise(seed, antigens=batch)
    keys = noise.keys(generation, use, cells.device)
    family = (torch.arange(batch), torch.zeros(batch, dtype=torch.long))
    fused.offspring(cells, family, torch.zeros(batch, 2, dtype=torch.long), torch.ones(batch, 1), keys, keys, mutation)
    return cells[:, 0, 0].double().numpy()


def test_amounts_are_uniform_and_streams_independent():
    streams = [
        drawn([seed], generation, use)[0] for seed in (0, 1) for generation in (0, 1) for use in ("cross", "mutate")
    ]
    for u in streams:
        assert stats.kstest(u, stats.uniform(-1, 2).cdf).pvalue > LEVEL
    correlation = np.corrcoef(np.array(streams))[np.triu_indices(len(streams), 1)]
    # 28 pairs of 20,000 numbers: chance stays within 5 standard errors.
    assert np.abs(correlation).max() < 5 / 20_000**0.5


def test_shared_noise_is_the_same_for_all_antigens_and_private_noise_is_not():
    shared = drawn([4], 1, "mutate")
    assert (shared[0] == shared[1]).all()
    private = drawn([4, 5], 1, "mutate")
    assert abs(np.corrcoef(private)[0, 1]) < 5 / 20_000**0.5
    assert (private[0] == shared[0]).all()


class Wide(nn.Module):
    """Logits of 200 values."""

    def forward(self, x):
        return x[:, :2] * 1.0


def test_an_antigen_does_not_feel_what_noise_others_have():
    x, y = rand(40, 200), torch.arange(40) % 2
    rails = RAILS(
        Wide(), "input", maturation=Maturation(generations=10, population=40, neighbours=4), shared_noise=False, seed=1
    ).fit(x, y)
    both = rails.respond(x[:2] * 0.9)
    alone = rails.respond(x[1:2] * 0.9)
    assert torch.equal(both.plasma.x[1], alone.plasma.x[0])

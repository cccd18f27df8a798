"""Subspaces, closed forms and the solver, against other ways to the same numbers."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import nn

from immunonet.control import subspaces
from immunonet.control.linear import kept_off
from immunonet.control.manifolds import Denoiser, Subspace, off, project
from immunonet.control.passing import Way, passed, unsteered
from immunonet.control.solving import Objective, solve


def states(n=300, d=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randn(d, d, generator=generator) * torch.logspace(0, -2, d)[:, None]
    return torch.randn(n, d, generator=generator) @ shape + torch.randn(d, generator=generator)


# --- Subspaces


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [7, 300])
def test_directions_are_those_of_scikit_learn(monkeypatch, exact, size):
    if not exact:
        monkeypatch.setattr(subspaces, "EXACT", 0)
    x = states()
    found = subspaces.basis(lambda: x.split(size), 4)
    known = PCA(4, svd_solver="full").fit(x.double().numpy())
    mine, theirs = found.directions.double(), torch.tensor(known.components_).T
    assert torch.allclose(mine @ mine.T, theirs @ theirs.T, atol=1e-5)
    assert torch.allclose(found.mean, x.mean(0), atol=1e-5)
    assert found.share == pytest.approx(known.explained_variance_ratio_.sum(), abs=1e-6)


@pytest.mark.parametrize("exact", [True, False])
def test_as_many_directions_as_hold_the_share_of_variance(monkeypatch, exact):
    if not exact:
        monkeypatch.setattr(subspaces, "EXACT", 0)
        monkeypatch.setattr(subspaces, "_FIRST", 2)
    # Sums of squares 4, 2, 1, 1 about a mean of 0.
    x = torch.cat([torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0]).sqrt() * s) for s in (1, -1)])
    x[[0, 4]] *= 2**0.5
    for share, kept in ((0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (1.0, 4)):
        found = subspaces.basis(lambda: [x], share)
        assert found.directions.shape == (4, kept)


def test_too_many_directions_are_refused():
    with pytest.raises(ValueError, match="rank must be at most 5 for 5 examples of 12 values, got 6"):
        subspaces.basis(lambda: [states(5)], 6)
    with pytest.raises(ValueError, match="at least one"):
        subspaces.basis(lambda: [], 1)


@given(st.integers(0, 100), st.booleans())
def test_a_projection_is_idempotent_and_symmetric_and_leaves_the_mean(seed, channels):
    x = states(60, 12, seed).view(20, 3, 3, 4) if channels else states(40, 12, seed).view(40, 3, 4)
    subspace, _ = Subspace.fitted(lambda: [x], 2, channels=channels, seed=0)
    once = subspace(x)
    assert torch.allclose(subspace(once), once, atol=1e-4)
    a, b = subspace.within(x), subspace.within(x.flip(0))
    assert torch.allclose((a * x.flip(0)).sum(), (x * b).sum(), rtol=1e-3, atol=1e-2)
    if not channels:
        assert torch.allclose(subspace(subspace.mean.view(1, 3, 4)), subspace.mean.view(1, 3, 4), atol=1e-5)
    # What lies in the directions passes, what is orthogonal to them is removed.
    inside = subspace.within(x)
    assert torch.allclose(subspace.within(inside), inside, atol=1e-4)
    assert torch.allclose(subspace.within(x - inside), torch.zeros_like(x), atol=1e-4)


# --- Closed forms


class Chain(nn.Module):
    """Linear layers without bias, whose outputs go by the names f0, f1, ..."""

    def __init__(self, matrices):
        super().__init__()
        for i, matrix in enumerate(matrices):
            layer = nn.Linear(*matrix.shape[::-1], bias=False, dtype=matrix.dtype)
            layer.weight.data = matrix.clone()
            setattr(self, f"f{i}", layer)
        self.layers = len(matrices)

    def forward(self, x):
        for i in range(self.layers):
            x = getattr(self, f"f{i}")(x)
        return x


def rotation(d, generator):
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]


class Projection(nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, z):
        return z @ self.matrix.to(z).T


def plain_run(matrices, x):
    """A pass of float64 states through linear layers, steered before each of them."""

    def run(steers):
        before, after, z = [], [], x
        for matrix, steer in zip(matrices, steers, strict=True):
            before.append(z)
            after.append(steer(z))
            z = after[-1] @ matrix.T
        return Way(before, after, z)

    return run


def orthogonal_problem(layers=3, d=6, r=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    directions = rotation(d, generator)[:, :r]
    matrices = [rotation(d, generator) for _ in range(layers)]
    projections = []
    for matrix in matrices:
        projections.append(directions @ directions.T)
        directions = matrix @ directions
    return matrices, projections, torch.randn(4, d, generator=generator, dtype=torch.float64)


def closed(matrices, projections, x, penalty, *, look_ahead=True):
    z, shares = x, kept_off(penalty, len(matrices), look_ahead=look_ahead)
    controls = []
    for matrix, projection, share in zip(matrices, projections, shares, strict=True):
        controls.append(-(1 - share) * (z - z @ projection.T))
        z = (z + controls[-1]) @ matrix.T
    return controls, z


@pytest.mark.parametrize("penalty", [0.05, 0.5, 3.0])
def test_with_look_ahead_the_closed_form_is_the_least_of_the_objective(penalty):
    matrices, projections, x = orthogonal_problem()
    known, _ = closed(matrices, projections, x, penalty)
    objective = Objective(
        manifolds=[Projection(p) for p in projections], scales=torch.ones(3, dtype=torch.float64), penalty=penalty
    )

    def value(us):
        way = plain_run(matrices, x)([lambda z, u=u: z + u for u in us])
        return torch.stack([objective.term(i, z, us[i]) for i, z in enumerate(way.steered)]).sum(0)

    # A quadratic form that curves upwards in every direction: one step of Newton leads to its least.
    start = torch.zeros(len(known) * x.numel(), dtype=torch.float64)
    total = lambda flat: value(flat.view(len(known), *x.shape)).sum()  # noqa: E731
    curves = torch.autograd.functional.hessian(total, start)
    assert float(torch.linalg.eigvalsh(curves).min()) > 0
    least = torch.linalg.solve(curves, -torch.autograd.functional.jacobian(total, start)).view(-1, *x.shape)
    assert float(torch.autograd.functional.jacobian(total, least.flatten()).abs().max()) < 1e-10
    for mine, theirs in zip(known, least, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-10)
    # J* = l_0 ||Q_0 x||^2, by the same recursion.
    cost = 0.0
    for _ in matrices:
        cost = penalty * (1 + cost) / (1 + penalty + cost)
    outside = x - x @ projections[0].T
    assert torch.allclose(value(known), cost * outside.square().sum(1), atol=1e-10)


@pytest.mark.parametrize("look_ahead", [True, False])
def test_the_error_that_is_left_holds_with_equality(look_ahead):
    matrices, projections, x = orthogonal_problem(seed=1)
    clean, perturbation = x @ projections[0].T, torch.randn_like(x)
    end, truth = closed(matrices, projections, clean + perturbation, 0.3, look_ahead=look_ahead)[1], clean
    for matrix in matrices:
        truth = truth @ matrix.T
    inside = perturbation @ projections[0].T
    left = torch.tensor(kept_off(0.3, 3, look_ahead=look_ahead), dtype=torch.float64).square().prod()
    expected = left * (perturbation - inside).square().sum(1) + inside.square().sum(1)
    assert torch.allclose((end - truth).square().sum(1), expected)


def test_the_recursion_is_that_of_the_linear_quadratic_regulator():
    penalty, d = 0.4, 5
    matrices, projections, _ = orthogonal_problem(d=d, seed=2)
    eye, future = torch.eye(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    gains = []
    for matrix, projection in zip(reversed(matrices), reversed(projections), strict=True):
        k = eye - projection + matrix.T @ future @ matrix
        gains.append(torch.linalg.solve(k + penalty * eye, k))
        future = penalty * gains[-1]
    for share, gain, projection in zip(
        kept_off(penalty, 3, look_ahead=True), reversed(gains), projections, strict=True
    ):
        assert torch.allclose(gain, (1 - share) * (eye - projection), atol=1e-12)


def test_without_a_penalty_only_the_first_control_of_matching_manifolds_is_not_zero():
    matrices, projections, x = orthogonal_problem(seed=3)
    controls, _ = closed(matrices, projections, x, 1e-9)
    assert controls[0].norm() > 0.1
    assert all(u.norm() < 1e-8 for u in controls[1:])
    assert kept_off(1e12, 2, look_ahead=True) == pytest.approx([1.0, 1.0])
    assert kept_off(0.0, 2, look_ahead=False) == [0.0, 0.0]


# --- The solver


def solved(outer, inner=10, penalty=0.5, seed=0, x=None, graph=0, matrices=None):
    own, projections, given = orthogonal_problem(seed=seed)
    x = given if x is None else x
    objective = Objective(
        manifolds=[Projection(p) for p in projections], scales=torch.ones(3, dtype=torch.float64), penalty=penalty
    )
    step = 0.5 / (1 + penalty)
    return solve(plain_run(matrices or own, x), objective, outer=outer, inner=inner, step=step, graph=graph)


def test_steps_lead_to_the_closed_form():
    matrices, projections, x = orthogonal_problem()
    known, _ = closed(matrices, projections, x, 0.5)
    found = solved(60)
    for mine, theirs in zip(found.controls, known, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    assert not found.lost.any()


def test_the_objective_never_rises_and_none_is_the_greedy_start():
    found = solved(8)
    assert bool((found.history[1:] <= found.history[:-1]).all())
    assert bool((found.history[-1] < found.history[0]).all())
    matrices, projections, x = orthogonal_problem()
    greedy, _ = closed(matrices, projections, x, 0.5, look_ahead=False)
    for mine, theirs in zip(solved(0).controls, greedy, strict=True):
        assert torch.allclose(mine, theirs)


def test_an_antigen_is_solved_by_itself():
    _, _, x = orthogonal_problem()
    together, alone = solved(3), [solved(3, x=row) for row in x.split(1)]
    for layer in range(3):
        assert torch.allclose(together.controls[layer], torch.cat([one.controls[layer] for one in alone]), atol=1e-12)


def test_what_cannot_be_solved_is_told_and_left_alone():
    _, _, x = orthogonal_problem()
    spoiled = x.clone()
    spoiled[1] = torch.nan
    found = solved(2, x=spoiled)
    assert found.lost.tolist() == [False, True, False, False]
    assert all(not u[1].any() for u in found.controls)
    for layer in range(3):
        assert torch.allclose(found.controls[layer][2], solved(2).controls[layer][2])


@pytest.mark.parametrize(("outer", "graph"), [(0, 1), (1, 1), (3, 3)])
def test_the_unrolled_gradient_is_that_of_finite_differences(outer, graph):
    _, _, x = orthogonal_problem()
    point, way = x[:1].clone().requires_grad_(), torch.randn(1, 6, dtype=torch.float64)

    def total(z):
        return sum(u.square().sum() for u in solved(outer, inner=3, x=z, graph=graph).controls)

    (slope,) = torch.autograd.grad(total(point), point)
    step = 1e-6 * way
    rise = (total((x[:1] + step).requires_grad_()) - total((x[:1] - step).requires_grad_())).detach()
    assert float(rise / 2e-6) == pytest.approx(float((slope * way).sum()), rel=1e-5)


# --- Passing and projecting


def test_a_pass_records_and_replaces_states():
    net = Chain([torch.eye(3) * 2, torch.eye(3) * 3])
    x = torch.ones(2, 3)
    way = passed(net, ("input", "f0"), x, [lambda z: z + 1, lambda z: z * 10])
    assert torch.equal(way.states[1], torch.full((2, 3), 4.0))
    assert torch.equal(way.logits, torch.full((2, 3), 120.0))
    assert torch.equal(passed(net, ("f1",), x, [unsteered]).logits, net(x))
    assert not net.f0._forward_hooks


def test_what_gives_no_state_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    net = nn.Sequential(Pair(), nn.Identity())
    with pytest.raises(ValueError, match="layer '0' must give one floating tensor row per input"):
        passed(net, ("0",), torch.ones(2, 3), [unsteered])
    with pytest.raises(ValueError, match="projections of the same shape"):
        project(nn.Linear(3, 2), torch.ones(2, 3))
    assert torch.equal(off(nn.Identity(), torch.ones(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (4, 7, 7), (8, 4, 5), (5,)])
@pytest.mark.parametrize("residual", [True, False])
def test_autoencoders_keep_the_shape_of_any_state(shape, residual):
    wide = (shape[0], *(1,) * (len(shape) - 1))
    net = Denoiser(shape, width=4, residual=residual, mean=torch.zeros(wide), scale=torch.ones(wide)).eval()
    x = torch.rand(3, *shape)
    assert net(x).shape == x.shape
    assert torch.allclose(net(x)[:1], net(x[:1]), atol=1e-5)


def test_manifolds_see_the_input_alone():
    net = functools.partial(passed, Chain([torch.eye(3)]), ("input",))
    way = net(torch.ones(2, 3), [lambda z: z.detach() * 0])
    assert not way.logits.any()

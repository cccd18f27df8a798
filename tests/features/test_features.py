import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from immunonet import RAILS, DkNN, Maturation
from immunonet.features import maps
from immunonet.features.affine import AffineMap
from immunonet.features.build import build
from immunonet.features.maps import IdentityMap

SMALL = Maturation(population=12, neighbours=2, generations=2)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def fitted(model, layers, shape, n=30, classes=3, **settings):
    x, y = rand(n, *shape), torch.arange(n) % classes
    return RAILS(model, layers, maturation=SMALL, seed=0, **settings).fit(x, y, calibration=(x[:5], y[:5]))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# Five kinds of models, and what their layers should give.


@pytest.mark.parametrize("kind", ["conv", "functional_conv"])
def test_activations_after_a_layer_do_not_change_its_features(kind, request):
    model = request.getfixturevalue(kind)
    rails = fitted(model, ["0", "2", "3", "4"], (1, 6, 6))
    x = rand(7, 1, 6, 6, seed=1)
    with torch.no_grad():
        first = F.conv2d(x, model[0].weight, model[0].bias, padding=1)
        second = F.conv2d(first.clamp(min=0), model[2].weight, model[2].bias, padding=1)
        expected = [first, second, second.clamp(min=0), F.max_pool2d(second.clamp(min=0), 2)]
    found = rails.features(x)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert_close(one, other.flatten(1))
    # The first layer is affine, and may come reduced.
    assert_close(torch.cdist(found[0], found[0]), torch.cdist(expected[0].flatten(1), expected[0].flatten(1)))


def test_a_residual_net(residual):
    x = rand(5, 3, 8, 8, seed=1)
    with torch.no_grad():
        stem = F.relu(residual.norm(residual.stem(x)))
        block = residual.block2(residual.block1(stem))
    rails = fitted(residual, ["block2", "block2.norm2"], (3, 8, 8))
    assert_close(rails.features(x)[0], block.flatten(1))
    assert rails.features(x)[1].shape == (5, 8 * 4 * 4)
    assert rails.respond(x).votes.shape == (5, 3)


@pytest.mark.parametrize("space", [None, "block1:3"])
def test_a_layer_averaged_over_a_grid(residual, space):
    x = rand(5, 3, 8, 8, seed=1)
    with torch.no_grad():
        block = residual.block1(F.relu(residual.norm(residual.stem(x))))
    expected = F.adaptive_avg_pool2d(block, 3).flatten(1)
    rails = fitted(residual, "block1:3", (3, 8, 8), space=space)
    assert_close(rails.features(x)[0], expected)
    # The naive cells are those of the repertoire in that space, and their distances those of scikit-learn.
    index, distances = rails.naive(x)
    examples = rails.features(rails.repertoire.x)[0].numpy()
    found = NearestNeighbors(n_neighbors=1).fit(examples).kneighbors(expected.numpy())[0]
    assert_close(distances.amin((1, 2)), torch.tensor(found[:, 0], dtype=torch.float32), rtol=1e-4, atol=1e-4)
    if space:
        response = rails.respond(x)
        assert response.plasma.x.shape[2:] == (*block.shape[1:2], 3, 3)
        assert_close(rails.members(0, index).flatten(3), torch.tensor(examples)[index])


@pytest.mark.parametrize("layer", ["block1:0", "block1:9", "fc:2"])
def test_a_grid_that_does_not_fit(residual, layer):
    with pytest.raises(ValueError, match=f"layer '{layer}' must give images of at least"):
        fitted(residual, layer, (3, 8, 8))


def test_token_outputs_of_a_vision_transformer(vit):
    x = rand(5, 1, 6, 6, seed=1)
    rails = fitted(vit, ["encoder", "encoder.layers.0.linear1"], (1, 6, 6))
    with torch.no_grad():
        patches = vit.embed(x).flatten(2).transpose(1, 2)
        tokens = vit.encoder(torch.cat([vit.token.expand(5, -1, -1), patches], 1) + vit.position)
    assert tokens.shape == (5, 5, 8)
    assert_close(rails.features(x)[0], tokens.flatten(1), atol=1e-5, rtol=1e-4)
    assert rails.predict(x).shape == (5,)


def test_tabular_data_with_columns_of_different_scale(mlp):
    bounds = [(0, 1), (-1000, 1000), (0, 1e5), (-1e-3, 1e-3)]
    low, high = torch.tensor(bounds).T
    x, y = low + (high - low) * rand(60, 4), torch.arange(60) % 3
    rails = RAILS(mlp, ["1", "input"], maturation=SMALL, bounds=bounds, seed=0).fit(x, y)
    with torch.no_grad():
        assert_close(rails.features(x)[0], torch.tanh(mlp[0](x)))
    r = rails.respond(x[:6])
    for cells in (r.plasma.x, r.memory.x):
        assert ((cells >= low) & (cells <= high)).all()
    # Mutations are in units of each column's width.
    moved = (r.memory.x - rails.repertoire.x[r.memory.origin]).abs() / (high - low)
    assert (moved > 0.01).any(dim=0).any(dim=0).all()


class Table(nn.Module):
    """Layers that give a tuple, one number per input, rows of another count, or nothing at all."""

    def __init__(self):
        super().__init__()
        self.pair = nn.LSTM(4, 4, batch_first=True)
        self.tokens = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        sequence, _ = self.pair(x)
        rows = self.tokens(sequence.flatten(0, 1)).unflatten(0, sequence.shape[:2])
        return self.head(self.twice(self.twice(rows.mean(1))))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("twice", "layer 'twice' is called 2 times in one pass of the model; it must be called once"),
        ("unused", "layer 'unused' is called 0 times"),
        ("pair", "layer 'pair' must give one tensor, got tuple"),
        ("tokens", r"layer 'tokens' must give one row per input, got shape \(10, 4\) for 2"),
        (lambda x: None, "layer '<lambda>' must give one tensor, got NoneType"),
        (lambda x: x.sum(), r"layer '<lambda>' must give one row per input, got shape \(\)"),
        (lambda x: x[: len(x) // 2], "layer '<lambda>' must give one row per input"),
        (lambda x: x.flatten(1)[:, : len(x)], "layer '<lambda>' must give features of one width, whatever the batch"),
        (lambda x: x.log() * 0, "layer '<lambda>' gave NaN or infinite features: check the model and its precision"),
    ],
)
def test_layers_that_cannot_be_used(layer, message):
    model = Table()
    x = rand(30, 5, 4)
    x[:, 0, 0] = 0
    with pytest.raises(ValueError, match=message):
        RAILS(model, layer, maturation=SMALL).fit(x, torch.arange(30) % 3)
    assert hooks(model) == 0


@pytest.mark.parametrize("layers", [["twice", "head"], ["head"]])
def test_a_space_that_is_called_twice(layers):
    with pytest.raises(ValueError, match="layer 'twice' is called 2 times"):
        RAILS(Table(), layers, space="twice", maturation=SMALL).fit(rand(30, 5, 4), torch.arange(30) % 3)


@pytest.mark.parametrize(
    ("layers", "space", "message"),
    [
        ("block2.nrm2", None, "layers='block2.nrm2' is no submodule of the model; nearest names: block2.norm2"),
        ("zzz", None, "layers='zzz' is no submodule of the model; nearest names: stem, norm, block1"),
        (["block1", "blok2"], None, "layers='blok2' is no submodule.*block2"),
        ("block2", "stm", "space='stm' is no submodule of the model; nearest names: stem"),
        ("input", "stem", r"layers=\['input'\] must be names of submodules when space='stem'"),
        ("block2", "block1:2", r"layers=\['block2'\] must be the space itself when space='block1:2' is averaged"),
        ([torch.flatten], "stem", r"layers=\['flatten'\] must be names of submodules"),
    ],
)
def test_wrong_names(residual, layers, space, message):
    with pytest.raises(ValueError, match=message):
        RAILS(residual, layers, space=space)


@pytest.mark.parametrize("layers", [None, [], 3, ["block1", 3], [["block1"]]])
def test_wrong_kinds_of_layers(residual, layers):
    with pytest.raises(
        TypeError, match=r"layers must be a submodule's name, 'input', a callable .*or a non-empty list"
    ):
        RAILS(residual, layers)


def test_names_of_layers(residual):
    assert RAILS(residual, "stem").layers == ("stem",)
    assert RAILS(residual, residual.block1).layers == ("ResidualBlock",)
    assert RAILS(residual, ["input", nn.Sequential(residual.stem), torch.flatten]).layers == (
        "input",
        "Sequential",
        "flatten",
    )


# The model is left as it was found.


def test_modes_gradients_and_hooks_are_left_alone(conv):
    conv.train()
    conv[2].eval()
    conv[0].weight.requires_grad_(False)
    conv[6].weight.grad = torch.ones_like(conv[6].weight)
    conv.register_buffer("statistics", torch.zeros(1))
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    flags = [m.training for m in conv.modules()]
    rails = fitted(conv, ["2", "5"], (1, 6, 6))
    rails.respond(rand(3, 1, 6, 6))
    assert [m.training for m in conv.modules()] == flags
    assert not conv[0].weight.requires_grad
    assert conv[2].weight.requires_grad
    assert conv[2].weight.grad is None
    assert torch.equal(conv[6].weight.grad, torch.ones_like(conv[6].weight))
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())
    assert hooks(conv) == 0


@pytest.mark.parametrize("layer", ["1", lambda x: x, "callable"])
def test_layers_run_in_eval_mode(layer):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    if layer == "callable":
        layer = lambda x: model[2](model[1](x))  # noqa: E731
    rails = fitted(model, layer, (4,))
    x = rand(6, 4)
    assert torch.equal(rails.features(x)[0], rails.features(x)[0])
    assert model[1].num_batches_tracked == 0
    assert model.training


def test_an_exception_in_the_model_leaves_it_as_it_was(conv):
    rails = fitted(conv, "2", (1, 6, 6))
    conv.train()

    def fail(*_):
        raise RuntimeError("boom")

    handle = conv[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        rails.respond(rand(2, 1, 6, 6))
    handle.remove()
    assert conv.training
    assert hooks(conv) == 0


def test_models_that_change_their_input_in_place():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 3))
    x, y = 2 * rand(30, 4) - 1, torch.arange(30) % 3
    kept = x.clone()
    for layer in ("2", lambda x: x.sub_(0.5).mul_(x)):
        rails = RAILS(model, layer, bounds=(-1, 1), maturation=SMALL).fit(x, y, calibration=(x[:5], y[:5]))
        rails.respond(x[:3])
        assert torch.equal(x, kept)
        assert torch.equal(rails.repertoire.x, kept)


def test_feature_maps_are_differentiable(conv):
    rails = fitted(conv, ["0", "2", "input"], (1, 6, 6))
    x = rand(3, 1, 6, 6).requires_grad_()
    with torch.enable_grad():
        for feature_map in rails.feature_maps:
            (gradient,) = torch.autograd.grad(feature_map(x).square().sum(), x)
            assert gradient.abs().sum() > 0
    direct = rand(3, 1, 6, 6).requires_grad_()
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(conv[2](F.relu(conv[0](direct))).square().sum(), direct)
        (found,) = torch.autograd.grad(rails.feature_maps[1](x).square().sum(), x)
    assert_close(found, expected)


def test_chunks_change_nothing(conv):
    x = rand(40, 1, 6, 6)
    rails = fitted(conv, "2", (1, 6, 6))
    whole, r = rails.features(x)[0], rails.respond(x)
    rails.feature_maps[0].rows = 3
    assert_close(rails.features(x)[0], whole)
    again = rails.respond(x)
    assert torch.equal(again.labels, r.labels)
    assert_close(again.votes, r.votes)


# Affine maps.


def batchnorm_net():
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, 3))
    net[1].running_mean.uniform_(-1, 1)
    net[1].running_var.uniform_(0.5, 2)
    return net.eval()


def slope_net(slope):
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 30), nn.LeakyReLU(slope), nn.Linear(30, 3))


def shifted_relu(shift):
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 30), nn.ReLU(), nn.Linear(30, 3))
    net[1].bias.data += shift
    return net


AFFINE = [
    (lambda: nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten()), "1"),
    (batchnorm_net, "2"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), "1"),
    (lambda: nn.Sequential(nn.Conv2d(2, 3, 6), nn.Flatten()), "0"),
]


@pytest.fixture(autouse=True)
def _fixed_weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(("net", "layer"), AFFINE)
def test_affine_maps_are_found_and_keep_every_inner_product(net, layer):
    model = net().eval()
    x = rand(20, 2, 6, 6)
    (found,) = build(model, [layer], None, x[:8])
    assert isinstance(found, AffineMap)
    with torch.no_grad():
        direct = model[: int(layer) + 1](x).flatten(1)
    reduced = found(x)
    assert reduced.shape[1] <= 73
    assert_close(reduced @ reduced.T, direct @ direct.T, rtol=1e-4, atol=1e-4)
    assert_close(torch.cdist(reduced, reduced), torch.cdist(direct, direct), rtol=1e-4, atol=1e-4)
    # Cells near their antigen keep the digits of their distance, with the fused loops and without.
    antigens = x[:2]
    cells = antigens[:, None, None] + 1e-3 * rand(2, 3, 4, 2, 6, 6, seed=1)
    every = tuple(part.flatten() for part in torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"))
    with torch.no_grad():
        gap = model[: int(layer) + 1].double()((cells - antigens[:, None, None]).double().flatten(0, 2))
        zero = model[: int(layer) + 1](torch.zeros(1, 2, 6, 6, dtype=torch.float64))
    expected = (gap - zero).flatten(1).norm(dim=1).reshape(6, 4).float()
    assert_close(found.distances(cells, every, antigens, found(antigens)), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("net", "layer"), AFFINE[:2])
def test_affine_distances_without_the_fused_loops(net, layer, monkeypatch):
    model = net().eval()
    x = rand(20, 2, 6, 6)
    (found,) = build(model, [layer], None, x[:8])
    every = (torch.zeros(1, dtype=torch.long),) * 2
    args = (x[None, None], every, x[:1], found(x[:1]))
    fused = found.distances(*args)
    monkeypatch.setattr(maps, "fused_for", lambda cells: None)
    assert_close(found.distances(*args), fused, rtol=1e-4, atol=1e-5)
    same = IdentityMap("input")
    assert_close(same.distances(*args)[0], (x - x[:1]).flatten(1).norm(dim=1))


@pytest.mark.parametrize(
    ("net", "layer"),
    [
        (lambda: slope_net(0.0), "2"),
        (lambda: slope_net(0.999), "2"),
        (lambda: slope_net(0.999), "3"),
        (lambda: shifted_relu(5.0), "2"),
        (lambda: shifted_relu(30.0), "3"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Hardtanh(-1, 2), nn.Linear(72, 3)), "1"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(72), nn.Linear(72, 3)), "1"),
        (lambda: nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 3)), "0"),
    ],
)
def test_other_maps_are_not_taken_for_affine(net, layer):
    model = net().eval()
    x = rand(8, 2, 6, 6)
    (found,) = build(model, [layer], None, x)
    assert not isinstance(found, AffineMap)
    with torch.no_grad():
        assert_close(found(x), model[: int(layer) + 1](x).flatten(1))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_large_offset_does_not_hide_a_bend(offset):
    (found,) = build(nn.Linear(6, 3), [lambda x: x.relu().square() + offset], None, rand(8, 6))
    assert not isinstance(found, AffineMap)


def test_wide_inputs_are_not_reduced(monkeypatch):
    monkeypatch.setattr("immunonet.features.affine.AFFINE_WIDTH", 71)
    (found,) = build(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), ["1"], None, rand(8, 2, 6, 6))
    assert not isinstance(found, AffineMap)


def test_a_constant_map_is_no_trouble():
    x = rand(8, 6)
    (found,) = build(nn.Linear(6, 3), [lambda x: x * 0 + 2], None, x)
    every = (torch.zeros(1, dtype=torch.long),) * 2
    assert found.distances(x[None, None], every, x[:1], found(x[:1])).tolist() == [[0.0] * 8]


def test_cosine_neighbours_are_those_of_unreduced_features():
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3))
    x, y = rand(60, 2, 6, 6), torch.arange(60) % 3
    reduced = DkNN(model, "1", neighbours=5).fit(x, y)
    unreduced = DkNN(model, lambda x: model[1](model[0](x)).where(x.amax() < 9, 0.0), neighbours=5).fit(x, y)
    assert isinstance(reduced.feature_maps[0]._inner, AffineMap)
    assert not isinstance(unreduced.feature_maps[0]._inner, AffineMap)
    queries = rand(50, 2, 6, 6, seed=1)
    for method in ("predict", "p_values"):
        assert torch.equal(getattr(reduced, method)(queries), getattr(unreduced, method)(queries))


# Cells in another space.


def tail_distances(model, start, stop, cells, antigen_features):
    with torch.no_grad():
        found = model[start:stop](cells.flatten(0, 1)).flatten(1).unflatten(0, cells.shape[:2])
    return (found - antigen_features[:, None]).norm(dim=2)


@pytest.mark.parametrize("kind", ["conv", "functional_conv"])
@pytest.mark.parametrize(("layer", "stop"), [("0", 1), ("2", 3), ("5", 6)])
def test_affinities_of_cells_in_a_space(kind, layer, stop, request):
    model = request.getfixturevalue(kind)
    rails = fitted(model, layer, (1, 6, 6), space="0")
    x = rand(4, 1, 6, 6, seed=1)
    r = rails.respond(x)
    assert r.plasma.x.shape[2:] == (4, 6, 6)
    with torch.no_grad():
        goal = model[:stop](x).flatten(1)
    plain = request.getfixturevalue("functional_conv")
    assert_close(-r.memory.affinity, tail_distances(plain, 1, stop, r.memory.x, goal), rtol=1e-4, atol=1e-5)


def test_in_place_activations_do_not_change_the_cells(conv, functional_conv):
    x = rand(4, 1, 6, 6, seed=1)
    one = fitted(conv, "2", (1, 6, 6), space="0").respond(x)
    other = fitted(functional_conv, "2", (1, 6, 6), space="0").respond(x)
    assert torch.equal(one.memory.x, other.memory.x)
    assert one.memory.x.min() < 0


def test_cells_of_a_space_stay_in_the_repertoires_range_per_channel(conv):
    rails = fitted(conv, "2", (1, 6, 6), space="0")
    with torch.no_grad():
        channels = conv[0](rails.repertoire.x).movedim(1, 0).flatten(1)
    low, high = channels.amin(1)[:, None, None], channels.amax(1)[:, None, None]
    cells = rails.respond(rand(6, 1, 6, 6)).memory.x
    assert ((cells >= low) & (cells <= high)).all()
    fixed = fitted(conv, "2", (1, 6, 6), space="0", cell_bounds=(0, 0.1)).respond(rand(6, 1, 6, 6)).memory.x
    assert ((fixed >= 0) & (fixed <= 0.1)).all()


def test_a_layer_that_is_the_space_or_before_it(residual):
    rails = fitted(residual, ["block1", "block2"], (3, 8, 8), space="block1")
    assert isinstance(rails.feature_maps[0], IdentityMap)
    assert rails.respond(rand(2, 3, 8, 8)).plasma.x.shape[2:] == (4, 8, 8)
    with pytest.raises(ValueError, match="layer 'stem' must come after space='block1' and depend on it alone"):
        fitted(residual, "stem", (3, 8, 8), space="block1")


def test_a_path_around_the_space(residual):
    with pytest.raises(ValueError, match=r"no path around it"):
        fitted(residual, "block1", (3, 8, 8), space="block1.conv1")


def test_tokens_as_space(vit):
    rails = fitted(vit, "head", (1, 6, 6), space="encoder.layers.0")
    assert rails.respond(rand(2, 1, 6, 6)).plasma.x.shape[2:] == (5, 8)


class Reshaping(nn.Module):
    """Reshapes by the batch size of its input, so that one dummy row will not do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x):
        n = x.shape[0]
        return self.second(torch.tanh(self.first(x)).reshape(n, -1))


def test_a_model_that_reshapes_by_its_inputs_batch():
    r = fitted(Reshaping(), "second", (1, 2, 2), space="first").respond(rand(3, 1, 2, 2))
    assert r.plasma.x.shape[2:] == (2, 2, 2)


@pytest.mark.parametrize("space", [None, "0"])
def test_a_bfloat16_model(conv, space):
    rails = fitted(conv.bfloat16(), "2", (1, 6, 6), space=space)
    r = rails.respond(rand(3, 1, 6, 6))
    assert r.votes.dtype == torch.float32
    assert rails.features(rand(3, 1, 6, 6))[0].dtype == torch.float32
    assert_close(r.votes.sum(1), torch.ones(3))

import pytest
import torch
from torch.nn import functional as F

from immunonet import zoo

SHAPES = {
    "mnist": (1, 28, 28),
    "mnist-small": (1, 28, 28),
    "digits": (1, 8, 8),
    "vit": (1, 8, 8),
    "residual": (3, 32, 32),
}


def batch(shape, n=2, seed=0):
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed))


def outputs(net, names, x):
    """Return the shapes of the named submodules' outputs on x."""
    shapes = {}
    for name in names:
        net.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: shapes.__setitem__(name, tuple(output.shape[1:]))
        )
    with torch.no_grad():
        net(x)
    return shapes


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize("classes", [2, 10])
def test_build(name, classes):
    state = torch.random.get_rng_state()
    net = zoo.build(name, classes=classes, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    x = batch(SHAPES[name])
    with torch.no_grad():
        logits = net(x)
        assert not net.training
        assert logits.shape == (2, classes)
        assert torch.equal(logits, zoo.build(name, classes=classes, seed=3)(x))
        assert not torch.equal(logits, zoo.build(name, classes=classes, seed=4)(x))
        torch.testing.assert_close(logits[1:], net(x[1:]))


def test_build_refuses_other_names():
    with pytest.raises(ValueError, match=r"name must be one of 'mnist', .* got 'resnet'"):
        zoo.build("resnet")
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        zoo.build("mnist", classes=1)
    with pytest.raises(TypeError, match="seed must be an integer, got None"):
        zoo.build("mnist", seed=None)


def test_the_mnist_net_has_the_published_layout():
    names = ("conv1", "conv2", "pool1", "conv3", "conv4", "pool2", "fc1", "fc2", "fc3")
    assert outputs(zoo.build("mnist"), names, batch(SHAPES["mnist"])) == {
        "conv1": (64, 28, 28),
        "conv2": (64, 28, 28),
        "pool1": (64, 14, 14),
        "conv3": (128, 14, 14),
        "conv4": (128, 14, 14),
        "pool2": (128, 7, 7),
        "fc1": (256,),
        "fc2": (256,),
        "fc3": (10,),
    }


def test_the_small_mnist_net_halves_twice():
    shapes = outputs(zoo.build("mnist-small"), ("conv1", "conv2", "fc1", "fc2"), batch(SHAPES["mnist-small"]))
    assert shapes == {"conv1": (16, 14, 14), "conv2": (32, 7, 7), "fc1": (100,), "fc2": (10,)}


@torch.no_grad()
def test_mnist_affine_is_affine_and_the_nets_own():
    net = zoo.build("mnist")
    f = zoo.mnist_affine(net)
    a, b = batch(SHAPES["mnist"]).double(), batch(SHAPES["mnist"], seed=1).double()
    net.double()
    torch.testing.assert_close(f(0.3 * a + 0.7 * b), 0.3 * f(a) + 0.7 * f(b))
    hidden = F.conv2d(a, net.conv1.weight, net.conv1.bias, padding=1)
    torch.testing.assert_close(f(a), F.conv2d(hidden, net.conv2.weight, net.conv2.bias, padding=1))
    assert f[0] is net.conv1
    with pytest.raises(TypeError, match="net must be a MnistNet, got DigitsNet"):
        zoo.mnist_affine(zoo.build("digits"))


def test_the_residual_net_halves_twice():
    shapes = outputs(zoo.ResidualNet(width=8), ("block1", "block2", "block3"), batch(SHAPES["residual"]))
    assert shapes == {"block1": (8, 32, 32), "block2": (16, 16, 16), "block3": (32, 8, 8)}
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        zoo.ResidualNet(width=0)


def test_the_transformer_returns_tokens():
    net = zoo.TinyViT(3, channels=3, size=12, patch=4, dim=16, depth=1).eval()
    assert outputs(net, ("encoder",), batch((3, 12, 12))) == {"encoder": (1 + 9, 16)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, "patch must divide size, got patch=3, size=8"),
        ({"dim": 6}, "dim must be a multiple of the 4 heads, got 6"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
    ],
)
def test_bad_transformers(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.TinyViT(**options)

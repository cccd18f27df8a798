"""The reference networks: raw images in [0, 1], float32 (B, C, H, W), to logits (B, classes)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet import _check
from immunonet._seeds import seeded


class MnistNet(nn.Module):
    """Four convolutions (64, 64, 128, 128; pools after the second and fourth) and three linear layers.

    Inputs (B, 1, 28, 28); conv2's output is (B, 64, 28, 28), pool1's (B, 64, 14, 14), pool2's (B, 128, 7, 7).
    The layout of the network in the published RAILS experiments on MNIST.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1)
        self.pool1 = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.conv4 = nn.Conv2d(128, 128, 3, padding=1)
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(128 * 7 * 7, 256)
        self.fc2 = nn.Linear(256, 256)
        self.fc3 = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        x = self.pool1(F.relu(self.conv2(F.relu(self.conv1(x)))))
        x = self.pool2(F.relu(self.conv4(F.relu(self.conv3(x)))))
        x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
        logits: Tensor = self.fc3(x)
        return logits


def mnist_affine(net: MnistNet) -> nn.Sequential:
    """Return conv2(conv1(x)) without activations, sharing `net`'s weights: (B, 1, 28, 28) -> (B, 64, 28, 28).

    An affine map of the input: the feature map of the published experiments on MNIST.
    """
    if not isinstance(net, MnistNet):
        raise TypeError(f"net must be a MnistNet, got {type(net).__name__}")
    return nn.Sequential(net.conv1, net.conv2)


class MnistSmallNet(nn.Module):
    """Two convolutions of stride 2 (16 and 32 channels) and two linear layers: (B, 1, 28, 28) -> (B, classes).

    conv1's output is (B, 16, 14, 14), conv2's (B, 32, 7, 7). Small enough for adversarial training on one CPU core; the
    layout of Wong & Kolter (2018).
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 4, 2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 4, 2, padding=1)
        self.fc1 = nn.Linear(32 * 7 * 7, 100)
        self.fc2 = nn.Linear(100, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


class DigitsNet(nn.Module):
    """Two convolutions, a pool and two linear layers for 8x8 grey digits: (B, 1, 8, 8) -> (B, classes)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(32 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        x = self.pool(F.relu(self.conv2(F.relu(self.conv1(x)))))
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut: (B, inner, H, W) -> (B, outer, H/stride, W/stride)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        same = inner == outer and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output after its last ReLU."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResidualNet(nn.Module):
    """A compact residual network for 32x32 colour: (B, 3, 32, 32) -> (B, classes).

    A stem and three blocks of `width`, 2 `width` and 4 `width` channels (block1 at 32x32, block2 at 16x16,
    block3 at 8x8), then the mean over positions (He et al. 2016).
    """

    def __init__(self, classes: int = 10, *, width: int = 32) -> None:
        super().__init__()
        width = _check.integer("width", width)
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.block1 = ResidualBlock(width, width, 1)
        self.block2 = ResidualBlock(width, 2 * width, 2)
        self.block3 = ResidualBlock(2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, classes)
        # Its convolutions take two thirds of the time so, whatever the order of values in the images.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch does not declare it

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        x = self.block3(self.block2(self.block1(F.relu(self.norm(self.stem(x))))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class TinyViT(nn.Module):
    """A very small vision transformer: (B, channels, size, size) -> (B, classes).

    `encoder` returns tokens (B, 1 + (size/patch)^2, dim), the class token first (Dosovitskiy et al. 2021).
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        channels: int = 1,
        size: int = 8,
        patch: int = 2,
        dim: int = 32,
        depth: int = 2,
    ) -> None:
        super().__init__()
        channels, size = _check.integer("channels", channels), _check.integer("size", size)
        patch, depth, dim = (_check.integer(k, v) for k, v in (("patch", patch), ("depth", depth), ("dim", dim)))
        if size % patch:
            raise ValueError(f"patch must divide size, got patch={patch}, size={size}")
        if dim % 4:
            raise ValueError(f"dim must be a multiple of the 4 heads, got {dim}")
        self.embed = nn.Conv2d(channels, dim, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        patches = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        logits: Tensor = self.head(self.norm(self.encoder(tokens)[:, 0]))
        return logits


_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mnist": MnistNet,
    "mnist-small": MnistSmallNet,
    "digits": DigitsNet,
    "residual": ResidualNet,
    "vit": TinyViT,
}
NAMES = tuple(_NETWORKS)


def build(name: str, *, classes: int = 10, seed: int = 0) -> nn.Module:
    """Return a new network by its name, one of `NAMES`, in eval mode; `seed` fixes its initial weights.

    "mnist" and "mnist-small" take (B, 1, 28, 28), "digits" and "vit" (B, 1, 8, 8), "residual" (B, 3, 32, 32).
    """
    _check.choice("name", name, NAMES)
    classes = _check.integer("classes", classes, least=2)
    # Modules draw their first weights from the global generator: fork it, so that it stays as it was.
    with seeded(_check.integer("seed", seed, least=0)):
        return _NETWORKS[name](classes).eval()

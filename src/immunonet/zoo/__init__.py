"""Small reference networks, their training and their weights."""

from immunonet.zoo.networks import NAMES, DigitsNet, MnistNet, ResidualNet, TinyViT, build, mnist_affine
from immunonet.zoo.training import Epoch, accuracy, train
from immunonet.zoo.weights import load_weights, save_weights

__all__ = [
    "NAMES",
    "DigitsNet",
    "Epoch",
    "MnistNet",
    "ResidualNet",
    "TinyViT",
    "accuracy",
    "build",
    "load_weights",
    "mnist_affine",
    "save_weights",
    "train",
]

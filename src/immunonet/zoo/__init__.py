"""Small reference networks, their training and their weights."""

from immunonet.learning import Epoch
from immunonet.zoo.adversarial import Adversarial, robust_accuracies, robust_accuracy
from immunonet.zoo.connecting import best_of, connect, profile, statistics_of
from immunonet.zoo.networks import NAMES, DigitsNet, MnistNet, MnistSmallNet, ResidualNet, TinyViT, build, mnist_affine
from immunonet.zoo.training import accuracy, train
from immunonet.zoo.weights import load_weights, save_weights

__all__ = [
    "NAMES",
    "Adversarial",
    "DigitsNet",
    "Epoch",
    "MnistNet",
    "MnistSmallNet",
    "ResidualNet",
    "TinyViT",
    "accuracy",
    "best_of",
    "build",
    "connect",
    "load_weights",
    "mnist_affine",
    "profile",
    "robust_accuracies",
    "robust_accuracy",
    "save_weights",
    "statistics_of",
    "train",
]

"""RAILS as the model of foolbox and of the Adversarial Robustness Toolbox."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from immunonet import RAILS, attacks

EPS = 0.1


@pytest.fixture(scope="module")
def foolbox() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both import by names that their dependencies have deprecated
        import foolbox
    return foolbox


@pytest.fixture(scope="module")
def art() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import art.attacks.evasion
        import art.estimators.classification
    return art


def classifier(art: Any, model: nn.Module) -> Any:
    """A classifier of ART whose logits are log-probabilities, so that cross-entropy is that of the defence."""
    loss = nn.CrossEntropyLoss()
    return art.estimators.classification.PyTorchClassifier(
        model, loss, input_shape=(1, 6, 6), nb_classes=3, clip_values=(0.0, 1.0), device_type="cpu"
    )


def test_foolbox_asks_rails(foolbox: Any, rails: RAILS, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = foolbox.PyTorchModel(rails, bounds=(0, 1), device="cpu")
    assert torch.equal(model(x), rails(x))
    assert foolbox.accuracy(model, x, y) == 1
    noise = foolbox.attacks.LinfRepeatedAdditiveUniformNoiseAttack(repeats=3)
    _, clipped, success = noise(model, x, y, epsilons=EPS)
    assert (clipped - x).abs().max() <= EPS + 1e-6
    assert torch.equal(rails.predict(clipped) != y, success)


def test_foolbox_climbs_a_surrogate_whose_findings_rails_answers(
    foolbox: Any, rails: RAILS, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    unrolled = attacks.Unrolled(rails, generations=1, population=30).eval()
    model = foolbox.PyTorchModel(unrolled, bounds=(0, 1), device="cpu")
    _, found, _ = foolbox.attacks.FGSM(random_start=False)(model, x, y, epsilons=EPS)
    ours = attacks.FGSM(eps=EPS)(unrolled, x, y).adversarials
    torch.testing.assert_close(found, ours)
    assert rails.predict(found).shape == y.shape


def test_art_asks_rails(art: Any, rails: RAILS, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    asked = classifier(art, rails)
    np.testing.assert_array_equal(asked.predict(x.numpy()), rails(x).numpy())
    attack = art.attacks.evasion.HopSkipJump(asked, max_iter=1, max_eval=20, init_eval=5, init_size=5, verbose=False)
    found = torch.from_numpy(attack.generate(x[:2].numpy(), y[:2].numpy()))
    assert found.shape == x[:2].shape
    assert rails.predict(found.clamp(0, 1)).shape == (2,)


def test_art_climbs_a_surrogate_as_we_do(art: Any, rails: RAILS, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    unrolled = attacks.Unrolled(rails, generations=1, population=30).eval()
    found = art.attacks.evasion.FastGradientMethod(classifier(art, unrolled), eps=EPS).generate(
        x.numpy(), np.eye(3)[y.numpy()]
    )
    torch.testing.assert_close(torch.from_numpy(found), attacks.FGSM(eps=EPS)(unrolled, x, y).adversarials)

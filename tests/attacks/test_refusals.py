"""What attacks do where a model refuses to answer: NES on linear models, oracle-guided resampling, query blinding."""

import pytest
import torch

from immunonet.attacks import NES, Blinded, HopSkipJump, Refusing, Square


class Shy(Refusing):
    """Answers as `model` does, but not where an input lies nearer than `near` to one that was answered."""

    def __init__(self, model, near):
        super().__init__()
        self.model, self.near, self.met, self.asked = model, near, [], 0

    def heard(self, x):
        answered = []
        for one in x:
            self.asked += 1
            far = all(float((one - other).norm()) >= self.near for other in self.met)
            answered.append(far)
            if far:
                self.met.append(one)
        return self.model(x), torch.tensor(answered)


class Silent(Refusing):
    """Never answers."""

    def heard(self, x):
        return torch.stack([x.sum(1), -x.sum(1)], 1), torch.zeros(len(x), dtype=torch.bool)


ATTACKS = [
    Square(eps=0.3, queries=60),
    NES(eps=0.3, step=0.1, queries=60, samples=6),
    HopSkipJump(eps=0.3, iterations=2, evaluations=10),
]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_nes_finds_the_way_of_a_linear_model(linear_model, norm):
    weight = torch.tensor([3.0, -1.0, 0.5, 2.0])
    x, y = torch.full((2, 4), 0.5), torch.zeros(2, dtype=torch.long)
    attack = NES(eps=0.1, step=0.05, queries=600, samples=40, early_stop=False, norm=norm)
    gained = (attack(linear_model(weight), x, y).adversarials - x) @ weight
    best = 0.1 * weight.abs().sum() if norm == "linf" else 0.1 * weight.norm()
    assert (gained > 0.97 * best).all()
    assert (gained < best + 1e-5).all()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_what_is_refused_teaches_nothing(attack):
    x = torch.full((2, 9), 0.5)
    result = attack(Silent(), x, torch.ones(2, dtype=torch.long))
    assert not result.success.any()
    assert torch.equal(attack(Silent(), x, torch.ones(2, dtype=torch.long)).adversarials, result.adversarials)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_more_tries_change_nothing_where_all_is_answered(attack, digits):
    import dataclasses

    net, x, y, _, _ = digits
    once, more = (dataclasses.replace(attack, tries=tries)(net, x[:10], y[:10]) for tries in (1, 6))
    assert torch.equal(once.adversarials, more.adversarials)
    assert torch.equal(once.losses, more.losses)


@pytest.mark.parametrize("kind", [Square, NES])
def test_resampling_is_answered_more_often(kind, digits):
    net, x, y, _, _ = digits
    small = {"step": 0.02, "sigma": 0.001, "samples": 6} if kind is NES else {"p": 0.05}
    met = []
    for tries in (1, 8):
        shy = Shy(net, near=0.3)
        with torch.no_grad():
            kind(eps=0.3, queries=80, tries=tries, early_stop=False, **small)(shy, x[:1], y[:1])
        met.append(len(shy.met) / shy.asked)
    assert met[0] < met[1]
    assert met[1] > 0.1


def test_disguised_copies_without_changes_are_the_input(digits):
    net, x, _, _, _ = digits
    plain = Blinded(net, draws=3, degrees=0, zoom=0, shift=0, noise=0)
    with torch.no_grad():
        torch.testing.assert_close(plain(x[:5]), net(x[:5]).log_softmax(1), rtol=1e-4, atol=1e-4)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain.disguised(images), images, rtol=0, atol=1e-5)
    moved = Blinded(net, degrees=20).disguised(images)
    assert moved.shape == images.shape
    assert float((moved - images).abs().mean()) > 0.01
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1


def test_copies_that_are_refused_are_left_out():
    class Every(Refusing):
        """Answers every second input."""

        def heard(self, x):
            answered = torch.arange(len(x)) % 2 == 0
            logits = torch.where(answered[:, None], torch.tensor([[0.0, 1.0]]), torch.tensor([[50.0, 0.0]]))
            return logits, answered

    logits, answered = Blinded(Every(), draws=2).heard(torch.rand(3, 4))
    assert answered.all()
    torch.testing.assert_close(logits, torch.tensor([[0.0, 1.0]]).log_softmax(1).expand(3, 2))
    assert not Blinded(Silent(), draws=2).heard(torch.rand(3, 4))[1].any()

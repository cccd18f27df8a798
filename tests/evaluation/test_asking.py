"""How a defence is asked, whatever it does."""

import numpy as np
import pytest
import torch
from torch import nn

from immunonet import RAILS, Maturation
from immunonet.evaluation.asking import NO_ANSWER, LogProbabilities, Subject, answers, describe, light_twin

X = torch.linspace(0, 1, 12).reshape(6, 2)


def even(x):
    return torch.full((len(x), 3), 1 / 3).log()


def sharp(x):
    return nn.functional.one_hot((3 * x[:, 0]).long().clamp(max=2), 3).mul(20.0).log_softmax(1)


class Picky(nn.Module):
    """Raises for inputs above one half, answers NaN for those below one tenth."""

    def forward(self, x):
        if (x[:, 0] > 0.5).any():
            raise RuntimeError("too bright")
        return sharp(x).masked_fill(x[:, :1] < 0.1, torch.nan)


@pytest.mark.parametrize(
    ("defence", "error", "match"),
    [
        (
            lambda x: x.argmax(1),
            ValueError,
            r"must return log-probabilities \(2, 3\) like base, got \(2,\) of torch.int64",
        ),
        (lambda x: even(x).numpy(), TypeError, "must return a tensor of logits or log-probabilities .* got ndarray"),
        (lambda x: even(x).exp(), ValueError, "got sums .* end a network with log_softmax"),
        (lambda x: even(x) * torch.nan, ValueError, "finite log-probabilities, got"),
        (lambda x: even(x)[:, :2], ValueError, r"like base, got \(2, 2\)"),
        (lambda x: even(x).long(), ValueError, "of torch.int64"),
        (lambda x: 1 / 0, ValueError, r"defence fails on inputs of shape \(1, 2\): division by zero"),
    ],
)
def test_what_is_no_defence_is_refused(defence, error, match):
    with pytest.raises(error, match=match):
        Subject(defence, classes=3).check(X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_any_floating_type_is_taken(dtype):
    subject = Subject(lambda x: sharp(x).to(dtype), classes=3)
    subject.check(X)
    assert subject.labels(X)[0].tolist() == [sharp(X).argmax(1).tolist()]


def test_inputs_without_an_answer_count_as_wrong_and_are_counted():
    subject = Subject(Picky(), classes=3)
    subject.check(X)
    labels, seconds = subject.labels(X)
    assert labels.tolist() == [[NO_ANSWER, 0, 1, NO_ANSWER, NO_ANSWER, NO_ANSWER]]
    assert seconds > 0
    assert subject.faults == {"RuntimeError: too bright": 3, "NaN or infinite log-probabilities": 1}
    answer = subject(X)
    assert torch.isfinite(answer).all()
    assert answer[3:].exp().allclose(torch.full((3, 3), 1 / 3))


def test_a_network_in_training_mode_is_asked_in_eval_mode_and_left_as_found():
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.9), nn.LogSoftmax(1)).train()
    subject = Subject(net, classes=3)
    assert not subject.varies(X)
    assert net.training


def test_the_global_generator_is_seeded_for_a_call_and_left_as_found():
    subject = Subject(lambda x: sharp(torch.rand_like(x)), classes=3)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second = (subject.labels(X, (0, 1, 2))[0] for _ in range(2))
    assert torch.rand(2).equal(expected)
    assert first.equal(second)
    assert not first[0].equal(first[1])
    assert subject.varies(X)


def test_further_draws_are_the_answers_under_their_seeds(images, conv):
    rails = RAILS(conv, "input", maturation=Maturation(population=60, neighbours=3)).fit(*images)
    x = torch.rand(20, *images[0].shape[1:], generator=torch.Generator().manual_seed(0))
    expected = torch.stack([rails.predict(x, seed) for seed in (3, 1, 2)])
    assert Subject(rails, classes=3).labels(x, (3, 1, 2))[0].equal(expected)
    assert answers(rails, x, (3, 1, 2))[0].equal(expected)


def test_further_draws_of_inputs_without_an_answer_count_as_wrong(images, conv, monkeypatch):
    rails = RAILS(conv, "input", maturation=Maturation(population=60, neighbours=3)).fit(*images)
    x = images[0][:6]
    expected = Subject(rails, classes=3).labels(x, (0, 1, 2))[0]
    answer = RAILS._mature

    def dark(self, antigens, seed, *rest):
        if seed and (antigens.cells == x[3]).flatten(1).all(1).any():
            raise RuntimeError("too bright")
        return answer(self, antigens, seed, *rest)

    monkeypatch.setattr(RAILS, "_mature", dark)
    expected[1:, 3] = NO_ANSWER
    assert Subject(rails, classes=3).labels(x, (0, 1, 2))[0].equal(expected)


@pytest.mark.parametrize("kind", ["attribute", "subclass"])
def test_only_the_draws_of_rails_itself_are_shared(kind, images, conv):
    class Smoothing(nn.Module):
        draws = 8

        def predict(self, x, seed):
            return torch.full((len(x),), seed)

    class Constant(RAILS):
        def predict(self, x, seed=None, batch_size=None):
            return torch.full((len(x),), seed)

    if kind == "attribute":
        defence = Smoothing()
    else:
        defence = Constant(conv, "input", maturation=Maturation(population=60, neighbours=3)).fit(*images)
    expected = torch.tensor([[2] * 4, [0] * 4, [1] * 4])
    assert Subject(defence, classes=3).labels(images[0][:4], (2, 0, 1))[0].equal(expected)
    assert answers(defence, images[0][:4], (2, 0, 1))[0].equal(expected)


def test_every_call_has_fresh_noise_unless_its_seed_is_fixed_and_can_be_repeated():
    class Random(nn.Module):
        def forward(self, x, seed=None):
            return torch.rand(len(x), 3, generator=torch.Generator().manual_seed(seed)).log_softmax(1)

    subject = Subject(Random(), classes=3)
    assert subject.seeded
    one, two = subject(X), subject(X)
    assert not one.equal(two)
    subject.rewind()
    assert subject(X).equal(one)
    fixed = Subject(Random(), classes=3, fixed=7)
    assert fixed(X).equal(fixed(X))


def test_gradients_flow_through_a_subject_and_inputs_without_an_answer_have_none():
    subject = Subject(nn.Sequential(nn.Linear(2, 3), nn.LogSoftmax(1)), classes=3)
    x = X.clone().requires_grad_()
    subject(x)[:, 0].sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()
    x = X.clone().requires_grad_()
    Subject(Picky(), classes=3)(x).sum().backward()
    assert x.grad[4:].abs().sum() == 0


def test_the_light_twin_shares_what_was_fitted_and_leaves_rails_alone(images, conv):
    rails = RAILS(conv, "input", maturation=Maturation(population=300, generations=7)).fit(*images)
    twin = light_twin(rails, population=60, generations=2)
    assert (twin.maturations[0].population, twin.maturations[0].generations) == (60, 2)
    assert (rails.maturations[0].population, rails.maturations[0].generations) == (300, 7)
    assert twin.repertoire is rails.repertoire
    assert light_twin(RAILS(conv, "input", voice=0.3)).voice == 0.3
    assert (twin.predict(images[0][:6], seed=0) == images[1][:6]).float().mean() > 0.5


def test_descriptions_and_log_probabilities(images, conv):
    assert describe(sharp) == {"layers": []}
    assert describe(RAILS(conv, "input", voice=0.3)) == describe(RAILS(conv, "input")) | {"voice": 0.3}
    assert LogProbabilities(conv)(images[0][:2]).exp().sum(1).allclose(torch.ones(2))
    assert np.isfinite(LogProbabilities(conv)(images[0][:2]).detach().numpy()).all()

"""How a defence is asked, whatever it does."""

import pytest
import torch
from torch import nn

from immunonet import RAILS, Answer, Defence, DkNN, Maturation, Sense
from immunonet.defences.undefended import Undefended
from immunonet.evaluation.asking import NO_ANSWER, Subject, describe, is_randomised, told_of
from immunonet.evaluation.lab import asked

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
    rails = RAILS(conv, "input", maturation=Maturation(generations=10, population=60, neighbours=3)).fit(*images)
    x = torch.rand(20, *images[0].shape[1:], generator=torch.Generator().manual_seed(0))
    expected = torch.stack([rails.predict(x, seed) for seed in (3, 1, 2)])
    assert Subject(rails, classes=3).labels(x, (3, 1, 2))[0].equal(expected)
    assert asked(rails, x, (3, 1, 2))[0].equal(expected)


def test_further_draws_of_inputs_without_an_answer_count_as_wrong(images, conv, monkeypatch):
    rails = RAILS(conv, "input", maturation=Maturation(generations=10, population=60, neighbours=3)).fit(*images)
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


class Smoothing(nn.Module):
    draws = 8

    def predict(self, x, seed):
        return torch.full((len(x),), seed)


class Constant(RAILS):
    def predict(self, x, seed=None, batch_size=None):
        return torch.full((len(x),), seed)


@pytest.mark.parametrize("kind", ["attribute", "subclass"])
def test_only_the_draws_of_rails_itself_are_shared(kind, images, conv):
    defence = Smoothing()
    expected = torch.tensor([[2] * 4, [0] * 4, [1] * 4])
    if kind == "subclass":
        defence = Constant(conv, "input", maturation=Maturation(generations=10, population=60, neighbours=3)).fit(
            *images
        )
        assert asked(defence, images[0][:4], (2, 0, 1))[0].equal(expected)
    assert Subject(defence, classes=3).labels(images[0][:4], (2, 0, 1))[0].equal(expected)


def test_draws_of_a_defence_that_shares_nothing_are_each_asked_under_their_seed():
    class Shaky(Defence):
        """Draws from the generator of torch, and has no answer in one draw."""

        kind, title, randomised = "shaky", "Shaky", True

        def answer(self, x, seed=None):
            if seed == 1 and (x[:, 0] > 0.9).any():
                raise RuntimeError("too bright")
            return Answer.of(torch.rand(len(x), 3))

    subject = Subject(Shaky(nn.Identity()), classes=3)
    labels = subject.labels(X, (0, 1, 2))[0]
    assert labels[:, -1].eq(NO_ANSWER).tolist() == [False, True, False]
    assert labels[2].equal(subject.labels(X, (2,))[0][0])


def test_what_a_defence_says_of_itself_counts_and_else_whether_it_takes_a_seed(images, conv):
    assert is_randomised(RAILS(conv, "input"))
    assert not is_randomised(DkNN(conv, "input"))
    assert not is_randomised(Undefended(conv))
    assert is_randomised(lambda x, seed=None: even(x))
    assert is_randomised(Smoothing())
    assert not is_randomised(even)


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


def test_descriptions_and_log_probabilities(images, conv):
    assert describe(even) == {"layers": []}
    assert describe(RAILS(conv, "input", voice=0.3)) == describe(RAILS(conv, "input")) | {"voice": 0.3}
    assert told_of(even) == {"model": "function"}
    assert told_of(Subject(even, classes=3, fixed=7)) == {"model": "Subject", "classes": 3, "fixed": 7, "seeded": False}
    x = images[0][:2]
    assert Undefended(conv)(x).equal(conv(x).log_softmax(1))


def test_what_looks_foreign_is_asked_in_parts_and_what_has_no_answer_looks_familiar():
    class Senses(Defence):
        kind, title = "senses", "Senses"

        def answer(self, x, seed=None):
            if (x[:, 0] > 0.9).any():
                raise RuntimeError("too bright")
            sense = Sense(distance=x[:, 0], p_value=1 - x[:, 0], foreign=x[:, 0] > 0.5)
            return Answer(sharp(x).argmax(1), sharp(x), sense=sense)

    subject = Subject(Senses(nn.Identity()), classes=3)
    subject.check(X)
    sense = subject.sense(X.flip(0))  # the first of them has no answer
    assert sense.p_value.flip(0).tolist() == [*(1 - X[:5, 0]).tolist(), 1.0]
    assert sense.foreign.flip(0).tolist() == [*(X[:5, 0] > 0.5).tolist(), False]
    assert subject.faults == {"RuntimeError: too bright": 1}
    for senseless in (even, Undefended(nn.Linear(2, 3))):
        subject = Subject(senseless, classes=3)
        subject.check(X)
        assert subject.sense(X) is None

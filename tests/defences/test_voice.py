"""The model's own softmax as one voice of the consensus: by hand in RAILS, and in every surrogate that knows it."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from immunonet import RAILS, DkNN, Maturation
from immunonet.attacks import ASK, AdvKnn, SoftClones, SoftNeighbours, Unrolled
from immunonet.features.maps import ROWS

LINE = torch.tensor([[0.1], [0.2], [0.3], [0.35], [0.5], [0.6]])
LABELS = torch.tensor([0, 0, 0, 1, 1, 1])
ANTIGEN = torch.tensor([[0.26]])
# Twelve plasma cells at the antigen: eight of class 0, four of class 1 (counted by hand in test_maturation).
CELLS = torch.tensor([[2 / 3, 1 / 3]])
COUNTED = Maturation(
    population=16, neighbours=2, generations=0, mutation_rate=0.0, prune=None, early_stop=None, plasma=0.75, memory=0.25
)


class Sure(nn.Module):
    """Nine to one for class 1, other answers in training mode, and `far` beyond 0.65; it counts what it is asked."""

    KNOWN = torch.tensor([[0.1, 0.9]])

    def __init__(self, far=0.0, dtype=torch.float32):
        super().__init__()
        self.far, self.asked = far, []
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x):
        assert x.dtype == self.scale.dtype
        self.asked.append(len(x))
        logits = self.KNOWN.log().to(x) + torch.where(x > 0.65, self.far, 0.0)
        if self.training:
            logits = logits.flip(1)
        return logits * self.scale


def fitted(voice, model=None, **settings):
    rails = RAILS(model or Sure(), "input", maturation=COUNTED, seed=0, voice=voice, **settings)
    return rails.fit(LINE, LABELS, calibration=(LINE, LABELS))


@pytest.mark.parametrize(("voice", "label"), [(0.0, 0), (0.2, 0), (0.4, 1), (0.999, 1)])
def test_votes_are_the_mixture_and_label_is_its_winner(voice, label):
    rails = fitted(voice)
    expected = (1 - voice) * CELLS + voice * Sure.KNOWN
    r = rails.respond(ANTIGEN)
    assert_close(r.votes, expected)
    assert_close(r.votes.sum(1), torch.ones(1))
    assert r.labels.tolist() == [label]
    assert torch.equal(rails.predict_proba(ANTIGEN), r.votes)
    assert torch.equal(rails.predict(ANTIGEN), r.labels)
    assert_close(rails(ANTIGEN), ((12 * expected + 1) / 14).log())
    assert r.plasma.label.tolist() == [[0] * 8 + [1] * 4]


def test_a_tie_of_the_mixture_goes_to_the_fittest_cell():
    even = 1 / 3.4
    assert_close(fitted(even).predict_proba(ANTIGEN), torch.full((1, 2), 0.5))
    assert fitted(even).predict(ANTIGEN).tolist() == [0]
    assert fitted(even + 1e-4).predict(ANTIGEN).tolist() == [1]


def test_without_a_voice_the_model_is_not_asked_and_with_one_in_chunks():
    silent, heard = fitted(0.0), fitted(0.3)
    antigens = torch.rand(2 * ROWS + 1, 1, generator=torch.Generator().manual_seed(0))
    for rails in (silent, heard):
        rails.model.asked.clear()
        rails.respond(antigens)
    assert silent.model.asked == []
    assert heard.model.asked == [ROWS, ROWS, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_model_is_asked_in_eval_mode_and_its_own_precision_and_left_as_found(dtype):
    rails = fitted(0.5, Sure(dtype=dtype)).train()
    votes = rails.predict_proba(ANTIGEN)
    assert (votes.dtype, votes.requires_grad) == (torch.float32, False)
    assert_close(votes, (CELLS + Sure.KNOWN) / 2, rtol=0, atol=1e-6 if dtype == torch.float64 else 5e-3)
    assert rails.model.training


@pytest.mark.parametrize("far", [math.nan, math.inf, -math.inf])
def test_a_model_without_an_answer_is_told(far):
    antigens = torch.tensor([[0.26], [0.7]])
    assert fitted(0.0, Sure(far)).predict(antigens).tolist() == [0, 1]
    rails = fitted(0.25, Sure(far))
    assert rails.predict(ANTIGEN).tolist() == [0]
    with pytest.raises(ValueError, match="model must return finite logits"):
        rails.predict(antigens)


# Surrogates.

SURROGATES = {
    "soft-knn": SoftNeighbours,
    "ask": ASK,
    "adv-knn": lambda rails: AdvKnn(rails, epochs=2),
    "soft-clones": SoftClones,
    "unrolled": lambda rails: Unrolled(rails, generations=1, population=36),
}


@pytest.fixture
def pair(functional_conv, images):
    """RAILS without a voice, and the same with one of 0.3; cells live in a layer."""
    settings = {"maturation": Maturation(generations=10, population=30, neighbours=3), "space": "0", "seed": 0}
    return [RAILS(functional_conv, ["2", "0"], voice=v, **settings).fit(*images) for v in (0.0, 0.3)]


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_and_their_gradients_are_those_of_the_mixture(pair, images, name):
    silent, heard = (SURROGATES[name](rails) for rails in pair)
    x = (images[0][:6] + 0.1).clamp(0, 1).requires_grad_()
    cells, found = silent(x), heard(x)
    expected = (0.7 * cells.exp() + 0.3 * pair[1].model(x).softmax(1)).log()
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_close(found.exp().sum(1), torch.ones(6))
    alone, ours, theirs = (
        torch.autograd.grad(v[:, 1].sum(), x, retain_graph=True)[0] for v in (cells, found, expected)
    )
    assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    # The untrained model is unsure: what it adds can be seen in both.
    assert (found - cells).abs().max() > 0.01
    assert (ours - alone).abs().max() > 0.01 * alone.abs().max()


def test_a_mixture_of_what_float32_cannot_hold_is_finite(functional_conv, images):
    functional_conv[6].weight.data *= 1e4
    rails = RAILS(
        functional_conv, "input", maturation=Maturation(generations=10, population=30, neighbours=3), voice=0.3
    )
    soft = SoftNeighbours(rails.fit(*images), temperature=1e-4)
    x = images[0][:6].clone().requires_grad_()
    found = soft(x)
    assert found.detach().exp().min() == 0
    assert bool(torch.isfinite(found).all())
    assert bool(torch.isfinite(torch.autograd.grad(found[:, 1].sum(), x)[0]).all())


def test_votes_without_a_voice_are_handed_on_as_they_are(pair, functional_conv, images):
    votes, x = torch.zeros(6, 3).log_softmax(1), images[0][:6]
    dknn = DkNN(functional_conv, "2", neighbours=3).fit(*images)
    assert pair[0].heard(votes, x) is votes
    assert dknn.heard(votes, x) is votes
    assert not torch.equal(pair[1].heard(votes, x), votes)

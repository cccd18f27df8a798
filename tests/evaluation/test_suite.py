"""Plans: what they cost, what they allow, and what is cut first."""

import dataclasses

import pytest
import torch
from torch import nn

from immunonet import RAILS, DkNN, Maturation, attacks, incoming
from immunonet.evaluation import suite
from immunonet.evaluation.asking import LogProbabilities, Subject
from immunonet.evaluation.suite import PROTOCOLS, Noise, Planned

BOUNDS = incoming.bounds("bounds", (0.0, 1.0))


def names(defence, base, images, protocol, randomised):
    subject = Subject(defence, classes=3)
    planned = suite.suite(
        subject, base, [], images[0][:4],
        eps=0.1, norm="linf", bounds=BOUNDS, budget=PROTOCOLS[protocol], seed=0, randomised=randomised,
    )  # fmt: skip
    return {attack.name: attack for attack in planned}


def test_what_a_protocol_runs_on_each_defence(images, conv):
    on_base = ["none", "fgsm", "pgd", "pgd-momentum", "apgd-ce", "apgd-dlr"]
    asks = ["noise", "square", "hop-skip-jump"]
    found = names(LogProbabilities(conv), conv, images, "quick", False)
    assert list(found) == on_base + asks
    assert {attack.knows for attack in found.values()} == {"base"}

    knn = ["soft-knn", "apgd-ce-soft-knn", "apgd-dlr-soft-knn", "ask", "adv-knn"]
    rest = ["stealthy", "bpda-soft-knn", "bpda"]
    dknn = DkNN(conv, "input", neighbours=5).fit(*images)
    counts = ["soft-count", "apgd-ce-soft-count", "apgd-dlr-soft-count"]
    assert list(names(dknn, conv, images, "quick", False)) == [*on_base, *knn, *counts, *rest, *asks]

    rails = RAILS(conv, "input", maturation=Maturation(population=300)).fit(*images)
    found = names(rails, conv, images, "quick", True)
    clones = ["soft-clones", "apgd-ce-soft-clones", "apgd-dlr-soft-clones", "unrolled"]
    assert list(found) == [*on_base, *knn, *clones, *rest, *asks[:2], "square-known-seed", asks[2]]
    twin = found["square"].target.defence
    assert (twin.maturations[0].population, twin.maturations[0].generations) == (200, 3)
    assert not found["square"].method.early_stop
    assert found["square"].standing
    assert not found["unrolled"].standing
    assert found["unrolled"].method.batch_size == found["unrolled"].target.batch_size
    assert {"unrolled-eot-5", "bpda-eot-5"} <= set(names(rails, conv, images, "standard", True))

    smooth = nn.Sequential(conv, nn.LogSoftmax(1))
    assert "direct-pgd" in names(smooth, conv, images, "quick", False)
    assert "bpda" not in names(smooth, conv, images, "quick", False)


def test_points_that_break_the_threat_model_are_replaced_and_counted():
    class Cheat:
        eps, norm, bounds = 0.1, "linf", BOUNDS

        def __call__(self, model, x, y):
            found = x + torch.tensor([[0.1], [0.2], [-0.1], [torch.nan]])
            return attacks.AttackResult(found, y.bool(), y.float(), torch.zeros(1, 4))

    x = torch.tensor([[0.5], [0.5], [0.05], [0.5]])
    found, _, outside = Planned(name="c", knows="base", kind="adaptive", n=4, method=Cheat(), target=len)(
        x, x[:, 0].long()
    )
    assert found.flatten().tolist() == pytest.approx([0.6, 0.5, 0.05, 0.5])
    assert outside == 3


@pytest.mark.parametrize(
    ("method", "calls"),
    [
        (None, 0),
        (attacks.FGSM(), 2),
        (attacks.PGD(iterations=20, restarts=3), 63),
        (attacks.APGD(iterations=10, restarts=1, loss="targeted-dlr", targets=4), 48),
        (attacks.Square(queries=100, draws=3), 303),
        # The point itself, 100 starts, 25 halvings on the first line, then on each line and step, and 10 + 14 around.
        (attacks.HopSkipJump(iterations=2, evaluations=10), 1 + 100 + 25 + 2 * 50 + 24),
        (attacks.HopSkipJump(iterations=2, evaluations=10, most_evaluations=12), 1 + 100 + 25 + 2 * 50 + 22),
        (Noise(eps=0.1, points=7), 7),
    ],
)
def test_calls_of_the_target_are_counted(method, calls):
    assert Planned(name="a", knows="base", kind="adaptive", n=1, method=method, target=len).calls() == calls


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        attacks.FGSM(eps=0.3),
        attacks.PGD(eps=0.3, iterations=3, restarts=2),
        attacks.APGD(eps=0.3, iterations=6, restarts=2),
        attacks.APGD(eps=0.3, iterations=6, loss="targeted-dlr", targets=2),
        attacks.Square(eps=0.3, queries=20, draws=2, early_stop=False),
        attacks.HopSkipJump(iterations=4, evaluations=20),
        attacks.HopSkipJump(iterations=4, evaluations=20, norm="l2", most_evaluations=25),
        Noise(eps=0.3, points=5),
    ],
)
def test_no_attack_asks_more_often_than_its_plan_says(method, flat):
    """`flat`: a model that nothing fools, so that the search for a start fails."""
    asked = 0
    weight = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))

    def model(x):
        nonlocal asked
        asked += len(x)
        return x.flatten(1) @ weight * (0.0 if flat else 1.0) + 9.0 * flat * torch.eye(5)[0]

    x = torch.rand(1, 30, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    asked = 0
    planned = Planned(name="a", knows="base", kind="adaptive", n=1, method=method, target=model)
    planned(x, y)
    # Four more, on four images of all: is it a model, and one whose answers stay the same?
    assert asked <= planned.calls() + 4


def test_an_attack_without_a_ball_is_held_to_the_bounds_alone():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x, y = torch.tensor([[0.9, 0.1], [0.1, 0.7]]), torch.tensor([0, 1])
    method = attacks.HopSkipJump(iterations=2, evaluations=10)
    planned = Planned(name="hop-skip-jump", knows="base", kind="black box", n=2, method=method, target=model)
    found, _, outside = planned(x, y)
    assert outside == 0
    assert found.equal(method(model, x, y).adversarials)
    assert (model(found).argmax(1) != y).all()


def test_a_budget_cuts_the_attacks_that_ask_first_and_keeps_ten_images():
    clean = Planned(name="none", knows="base", kind="none", n=100)
    strong, asks = (
        dataclasses.replace(clean, name=name, kind=kind) for name, kind in (("a", "adaptive"), ("b", "black box"))
    )
    seconds = {"none": 0.0, "a": 1.0, "b": 3.0}

    def cut(allowed):
        return {attack.name: attack.n for attack in suite.afford([clean, strong, asks], seconds, 0.0, allowed)}

    assert cut(400) == {"none": 100, "a": 100, "b": 100}
    assert cut(250) == {"none": 100, "a": 100, "b": 50}
    assert cut(90) == {"none": 60, "a": 60, "b": 10}
    assert cut(1e-9) == {"none": 10, "a": 10, "b": 10}


def test_a_gradient_is_seen_where_there_is_one():
    x = torch.rand(1, 2)
    assert suite.has_gradient(lambda z: 2 * z, x)
    assert not suite.has_gradient(lambda z: z.round(), x)
    assert not suite.has_gradient(lambda z: z.detach(), x)
    assert not suite.has_gradient(lambda z: torch.ones(1, 2, requires_grad=True) * 2, x)

"""Plans: what they cost, what they allow, and what is cut first."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from trials import BOUNDS

from immunonet import RAILS, DkNN, Maturation, attacks
from immunonet.defences.undefended import Undefended
from immunonet.evaluation import suite
from immunonet.evaluation.asking import Subject
from immunonet.evaluation.suite import PROTOCOLS, Planned, Suite
from immunonet.evaluation.threats import Threat


def names(defence, base, images, protocol, randomised, others=(), classes=3, networks=(), threats=(("linf", 0.1),)):
    subject = Subject(defence, classes=classes)
    against = [Threat(eps=eps, norm=norm, bounds=BOUNDS, seed=0) for norm, eps in threats]
    built = [
        Suite(subject, [base, *networks], images[0][:4], threat, PROTOCOLS[protocol], randomised) for threat in against
    ]
    return {attack.name: attack for attack in suite.planned(built, others)}


def planned(**settings):
    return Planned(**{"name": "a", "roles": frozenset({"adaptive"}), "n": 1} | settings)


def test_what_a_protocol_runs_on_each_defence(images, conv):
    on_base = ["none", "fgsm", "pgd", "pgd-momentum", "apgd-ce", "apgd-dlr"]
    asks = ["noise", "square", "hop-skip-jump"]
    found = names(Undefended(conv), conv, images, "quick", False)
    assert list(found) == on_base + asks
    assert {attack.knows for attack in found.values()} == {"base"}

    knn = ["soft-knn", "apgd-ce-soft-knn", "apgd-dlr-soft-knn", "ask", "adv-knn"]
    rest = ["stealthy", "bpda-soft-knn", "bpda"]
    dknn = DkNN(conv, "input", neighbours=5).fit(*images)
    counts = ["soft-count", "apgd-ce-soft-count", "apgd-dlr-soft-count"]
    assert list(names(dknn, conv, images, "quick", False)) == [*on_base, *knn, *counts, *rest, *asks]

    rails = RAILS(conv, "input", maturation=Maturation(generations=10, population=300)).fit(*images)
    found = names(rails, conv, images, "quick", True)
    clones = ["soft-clones", "apgd-ce-soft-clones", "apgd-dlr-soft-clones", "unrolled"]
    assert list(found) == [*on_base, *knn, *clones, *rest, *asks[:2], "square-known-seed", asks[2]]
    twin = found["square"].target.defence
    assert (twin.maturations[0].population, twin.maturations[0].generations) == (200, 3)
    assert not found["square"].method.early_stop
    assert found["square"].asks
    assert not found["unrolled"].asks
    assert found["unrolled"].method.batch_size == found["unrolled"].target.batch_size
    standard = names(rails, conv, images, "standard", True)
    assert {"unrolled-eot-5", "bpda-eot-5"} <= set(standard)
    # Votes of two sharpnesses are attacked, that of SoftClones by all losses.
    sharp, soft = (standard[f"apgd-dlr-soft-clones{more}"].target.sharpness[0] for more in ("", "-x2"))
    assert soft == 2 * sharp
    assert {f"apgd-{loss}-soft-knn-x2" for loss in ("ce", "dlr")} <= set(standard)

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
    found, _, outside = planned(method=Cheat(), target=len)(x, x[:, 0].long())
    assert found.flatten().tolist() == pytest.approx([0.6, 0.5, 0.05, 0.5])
    assert outside == 3


def test_an_attack_without_a_ball_is_held_to_the_bounds_alone():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x, y = torch.tensor([[0.9, 0.1], [0.1, 0.7]]), torch.tensor([0, 1])
    method = attacks.HopSkipJump(iterations=2, evaluations=10)
    found, _, outside = planned(method=method, target=model)(x, y)
    assert outside == 0
    assert found.equal(method(model, x, y).adversarials)
    assert (model(found).argmax(1) != y).all()


def test_a_budget_cuts_the_attacks_that_ask_first_and_keeps_ten_images():
    clean = Planned(name="none", n=100)
    strong, asks = planned(n=100), planned(name="b", roles=frozenset({"asks"}), n=100)
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


@dataclass(frozen=True, kw_only=True)
class Climbs(attacks.PGD):
    """An attack of a caller's own."""


@dataclass(frozen=True, kw_only=True)
class Asks(attacks.Noise):
    """Another, which only asks."""


def test_attacks_of_ones_own_are_made_on_what_suits_what_they_need(images, conv):
    own = [Asks(eps=0.1), Climbs(eps=0.05, batch_size=4096)]
    rails = RAILS(conv, "input", maturation=Maturation(generations=10, population=300)).fit(*images)
    found = names(rails, conv, images, "quick", True, own)
    asks, climbs = found["asks-1"], found["climbs-2"]
    assert list(found).index("climbs-2") == list(found).index("noise") - 1
    assert list(found)[-1] == "asks-1"
    assert (asks.roles, asks.target.defence.maturations[0].population) == ({"asks"}, 200)
    assert (climbs.roles, type(climbs.target)) == ({"adaptive"}, attacks.Unrolled)
    assert climbs.method.batch_size == climbs.target.batch_size < 4096
    assert climbs.method.eps == 0.05

    def direct(x):
        return conv(x).log_softmax(1)

    assert names(direct, conv, images, "quick", False, own)["climbs-2"].target.defence is direct
    stepped = names(lambda x: direct((4 * x).round() / 4), conv, images, "quick", False, own)
    assert type(stepped["climbs-2"].target) is attacks.Bpda


def test_attacks_of_ones_own_are_held_to_the_bounds_of_the_defence(images, conv):
    found = names(Undefended(conv), conv, images, "quick", False, [Climbs(eps=0.1, bounds=(-9.0, 9.0))])
    assert found["climbs-1"].method.bounds == BOUNDS


@pytest.mark.parametrize(
    ("own", "error", "match"),
    [
        (len, TypeError, r"attacks\[1\] must be an immunonet.attacks.Attack, got builtin_function_or_method"),
        (Climbs(eps=0.2), ValueError, r"attacks\[1\] must stay within eps=0.1 in linf, got eps=0.2 in linf"),
        (Climbs(eps=0.1, norm="l2"), ValueError, "got eps=0.1 in l2"),
        (attacks.HopSkipJump(), ValueError, "got eps=None in linf"),
        (Climbs(eps=0.1, targeted=True), ValueError, r"attacks\[1\] must not be targeted"),
    ],
)
def test_attacks_of_ones_own_that_break_the_claim_are_refused(own, error, match, images, conv):
    with pytest.raises(error, match=match):
        names(Undefended(conv), conv, images, "quick", False, [Climbs(eps=0.1), own])


def test_roles_say_what_a_record_calls_an_attack():
    def kind(*roles):
        return planned(roles=frozenset(roles), method=attacks.FGSM()).kind

    assert [kind("transfer", "base"), kind("adaptive", "eot"), kind("asks"), kind()] == [
        "transfer", "adaptive", "black box", "none",
    ]  # fmt: skip
    assert planned(roles=frozenset({"transfer", "base"}), method=attacks.FGSM()).knows == "base"
    assert planned(method=attacks.FGSM()).knows == "defence"
    assert planned().knows == "base"  # images as they are


def test_labels_to_lead_to_and_networks_to_transfer_from_have_attacks_of_their_own(images, conv):
    found = names(Undefended(conv), conv, images, "standard", False, classes=9, networks=[nn.Flatten(), nn.Flatten()])
    assert found["apgd-targeted-dlr"].roles == {"transfer", "base", "targeted"}
    assert found["apgd-targeted-dlr"].method.targets == 3
    assert {"transfer-1", "transfer-2"} <= set(found)
    assert "apgd-targeted-dlr" not in names(Undefended(conv), conv, images, "standard", False)  # of three classes

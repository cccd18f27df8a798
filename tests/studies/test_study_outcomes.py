"""What follows from measurements: pairs on the same images, and targets."""

from types import SimpleNamespace

import torch

from immunonet.defences.spec import Spec
from immunonet.evaluation.lab import Measurement
from immunonet.studies import outcomes
from immunonet.studies.model import Target


def measured(defence, right, **settings):
    told = {"base": "plain", "layers": ["input"], "split": "test", "repertoire": 100, "experiment": "main"}
    told |= {"maturation": [{"population": 20, "generations": 3}]} if defence == "rails" else {}
    told |= settings
    row = SimpleNamespace(defence=defence, attack="none", n=10, accuracy=0.5, settings=told)
    return SimpleNamespace(
        measurement=Measurement(spec=Spec(kind=defence), base="plain", split=told["split"]),
        row=row,
        correct=torch.tensor([right]),
    )


def test_pairs_share_the_repertoire_and_name_the_settings_in_which_several_rails_differ():
    changed = [[{"population": 20, "generations": 3, "decay": decay}] for decay in (0.9, 0.5)]
    rails = [measured("rails", [True] * 10, maturation=maturation) for maturation in changed]
    peers = [measured("dknn", [False] * 10), measured("dknn", [False] * 10, repertoire=50)]
    found = outcomes.pairs([*rails, *peers])
    assert [(pair["over"], pair["apart"]) for pair in found] == [
        ("dknn", "maturation.0.decay 0.9"),
        ("dknn", "maturation.0.decay 0.5"),
    ]
    (alone,) = outcomes.pairs([rails[0], *peers])
    assert alone["apart"] == ""


def test_a_target_is_measured_on_test_images():
    target = Target.model_construct(text="", base="plain", attack="none", layers=("input",), least=0.4)
    study = SimpleNamespace(targets=[target])
    validation, test = (measured("rails", [True] * 10, split=split) for split in ("validation", "test"))
    assert outcomes.targets(study, [validation])[0]["status"] == "not measured"
    assert outcomes.targets(study, [validation, test])[0]["status"] == "least"

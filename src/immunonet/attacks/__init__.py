"""What tries to break a classifier: frozen settings, called as `attack(model, x, y)`.

Every attack keeps the best points it saw even where they failed: a point that does not fool the network it
was made on may still fool a defence. Surrogates and wrappers are models that attacks run on. A subclass of `Attack` is
an attack like any other, as is a norm in `NORMS`.
"""

from immunonet.attacks._base import Attack, AttackResult, Found, Problem, Refusing
from immunonet.attacks.apgd import APGD
from immunonet.attacks.clones import SoftClones
from immunonet.attacks.controls import Inside, Through
from immunonet.attacks.gradient import FGSM, PGD
from immunonet.attacks.hopskipjump import HopSkipJump
from immunonet.attacks.innate import Credible, Gated
from immunonet.attacks.knn import ASK, AdvKnn, SoftCount, SoftNeighbours, neighbour_votes
from immunonet.attacks.nes import NES
from immunonet.attacks.noise import Noise
from immunonet.attacks.norms import NORMS, Norm
from immunonet.attacks.square import Square
from immunonet.attacks.unrolled import Unrolled
from immunonet.attacks.wrappers import Blinded, Bpda, Eot, Stealthy

__all__ = [
    "APGD",
    "ASK",
    "FGSM",
    "NES",
    "NORMS",
    "PGD",
    "AdvKnn",
    "Attack",
    "AttackResult",
    "Blinded",
    "Bpda",
    "Credible",
    "Eot",
    "Found",
    "Gated",
    "HopSkipJump",
    "Inside",
    "Noise",
    "Norm",
    "Problem",
    "Refusing",
    "SoftClones",
    "SoftCount",
    "SoftNeighbours",
    "Square",
    "Stealthy",
    "Through",
    "Unrolled",
    "neighbour_votes",
]

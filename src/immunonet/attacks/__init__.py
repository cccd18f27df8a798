"""What tries to break a classifier: frozen settings, called as `attack(model, x, y)`.

Every attack keeps the best points it saw even where they failed: a point that does not fool the network it
was made on may still fool a defence.
"""

from immunonet.attacks._base import AttackResult
from immunonet.attacks.apgd import APGD
from immunonet.attacks.gradient import FGSM, PGD
from immunonet.attacks.knn import SoftNeighbours

__all__ = ["APGD", "FGSM", "PGD", "AttackResult", "SoftNeighbours"]

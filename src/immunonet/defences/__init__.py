"""Defences: one file a kind, one line in the registry."""

from immunonet.defences.base import REGISTRY, Answer, Defence, Sense, Undefended, load, register
from immunonet.defences.control import ClosedLoop
from immunonet.defences.dknn import DkNN
from immunonet.defences.path import ModePath, PathEnsemble
from immunonet.defences.rails import RAILS

for _kind in (Undefended, DkNN, RAILS, ClosedLoop, PathEnsemble):
    register(_kind)

__all__ = [
    "RAILS",
    "REGISTRY",
    "Answer",
    "ClosedLoop",
    "Defence",
    "DkNN",
    "ModePath",
    "PathEnsemble",
    "Sense",
    "Undefended",
    "load",
    "register",
]

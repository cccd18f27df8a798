"""Defences: one file a kind, one line in the registry."""

from immunonet.defences.answers import Answer, Sense
from immunonet.defences.base import REGISTRY, Defence, load, register
from immunonet.defences.control import ClosedLoop
from immunonet.defences.dknn import DkNN
from immunonet.defences.path import ModePath, PathEnsemble
from immunonet.defences.rails import RAILS
from immunonet.defences.undefended import Undefended

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

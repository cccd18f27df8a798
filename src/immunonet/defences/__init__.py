"""Defences: one file a kind, one line in the registry."""

from immunonet.defences.base import REGISTRY, Answer, Defence, Sense, Undefended, load, register
from immunonet.defences.dknn import DkNN
from immunonet.defences.rails import RAILS

for _kind in (Undefended, DkNN, RAILS):
    register(_kind)

__all__ = ["RAILS", "REGISTRY", "Answer", "Defence", "DkNN", "Sense", "Undefended", "load", "register"]

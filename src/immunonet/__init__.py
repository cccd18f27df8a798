"""An adaptive immune system for any trained PyTorch classifier: Immuno-Net RAILS, with DkNN beside it."""

from immunonet import attacks
from immunonet._version import __version__ as __version__
from immunonet.defences import RAILS, Answer, ClosedLoop, Defence, DkNN, ModePath, Sense, load, register
from immunonet.evaluation import evaluate
from immunonet.immune.settings import Maturation
from immunonet.memory.sentinel import Sentinel
from immunonet.memory.store import Memory
from immunonet.normalised import Normalised
from immunonet.response import Cells, ImmuneResponse, Trace

__all__ = [
    "RAILS",
    "Answer",
    "Cells",
    "ClosedLoop",
    "Defence",
    "DkNN",
    "ImmuneResponse",
    "Maturation",
    "Memory",
    "ModePath",
    "Normalised",
    "Sense",
    "Sentinel",
    "Trace",
    "attacks",
    "evaluate",
    "load",
    "register",
]

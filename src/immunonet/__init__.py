"""An adaptive immune system for any trained PyTorch classifier: Immuno-Net RAILS, with DkNN beside it."""

from immunonet import attacks
from immunonet.dknn import DkNN
from immunonet.evaluation import evaluate
from immunonet.immune.settings import Maturation
from immunonet.normalised import Normalised
from immunonet.rails import RAILS
from immunonet.response import Cells, ImmuneResponse, Trace

__all__ = ["RAILS", "Cells", "DkNN", "ImmuneResponse", "Maturation", "Normalised", "Trace", "attacks", "evaluate"]
__version__ = "0.1.0"

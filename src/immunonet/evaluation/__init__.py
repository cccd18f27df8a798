"""How robust a classifier is, measured honestly."""

from immunonet.evaluation.protocol import Evaluation, evaluate
from immunonet.evaluation.records import Check, Row

__all__ = ["Check", "Evaluation", "Row", "evaluate"]

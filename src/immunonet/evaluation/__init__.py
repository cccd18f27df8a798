"""How robust a classifier is, measured honestly."""

from immunonet.evaluation.outcome import Evaluation
from immunonet.evaluation.protocol import evaluate
from immunonet.evaluation.records import Check, Row

__all__ = ["Check", "Evaluation", "Row", "evaluate"]

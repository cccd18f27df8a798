"""Reports: one self-contained HTML page and the pictures in it. Needs `pip install 'immunonet[report]'`."""

from immunonet.report.figures import learning_curves, response_figure
from immunonet.report.html import Specimen, render, specimens, write

__all__ = ["Specimen", "learning_curves", "render", "response_figure", "specimens", "write"]

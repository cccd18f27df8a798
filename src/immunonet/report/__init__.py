"""Reports: pages and documents, and the pictures in them. Needs `pip install 'immunonet[report]'`."""

from immunonet.report.figures import learning_curves
from immunonet.report.html import Exhibit, exhibits, render, write
from immunonet.report.images import response_figure

__all__ = ["Exhibit", "exhibits", "learning_curves", "render", "response_figure", "write"]

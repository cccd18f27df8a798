"""Reports: pages and documents, and the pictures in them. Needs `pip install 'immunonet[report]'`."""

try:
    from immunonet.report.figures import learning_curves
    from immunonet.report.html import Exhibit, exhibits, render, write
    from immunonet.report.responses import response_figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"this needs {error.name}: pip install 'immunonet[report]'", name=error.name) from error

__all__ = ["Exhibit", "exhibits", "learning_curves", "render", "response_figure", "write"]

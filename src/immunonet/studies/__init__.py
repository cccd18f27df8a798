"""Studies: experiments written down as TOML, run in parts, and reported."""

from immunonet.studies.reading import NAMES, load
from immunonet.studies.settings import Study

__all__ = ["NAMES", "Study", "load"]

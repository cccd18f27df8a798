"""Studies: experiments written down as TOML, run in parts, and reported."""

from immunonet.studies.model import Study
from immunonet.studies.reading import NAMES, load

__all__ = ["NAMES", "Study", "load"]

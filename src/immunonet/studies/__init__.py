"""Studies: experiments written down as TOML, run in parts, and reported."""

from immunonet.studies.settings import NAMES, Study, load

__all__ = ["NAMES", "Study", "load"]

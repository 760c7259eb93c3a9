"""The version of vlmzip; CITATION.cff repeats it."""

__version__ = "0.1.0"

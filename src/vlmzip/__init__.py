"""vlmzip: answer questions about pictures with a fraction of the visual tokens."""

from vlmzip.version import __version__

__all__ = ["__version__"]

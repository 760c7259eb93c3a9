"""A method that breaks while it is answering."""

from dataclasses import dataclass

from vlmzip.compressor import Compressor


@dataclass(frozen=True, kw_only=True)
class Broken(Compressor):
    """Raises at its first image."""

    def token_count(self, grid):
        return 36

    def assign(self, tokens):
        raise RuntimeError("no tokens today")

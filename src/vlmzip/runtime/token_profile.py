"""The token profile: the visual tokens at each LLM layer. Retention, KV cache and prefill FLOPs follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from vlmzip.models.family import Family
from vlmzip.runtime.flops import kv_cache_bytes, prefill_flops
from vlmzip.runtime.report import Report


@dataclass(frozen=True)
class TokenProfile:
    """The token counts of one prompt at each layer of the LLM."""

    before: int
    """Visual tokens without compression."""
    visual: tuple[int, ...]
    """Visual tokens that each layer sees."""
    text: int
    """Text tokens of the prompt, which no method drops."""

    @classmethod
    def rows(cls, report: Report, prompt_tokens: list[int]) -> list[TokenProfile]:
        """Return one profile per row of a report's batch; `prompt_tokens` are the rows' uncompressed lengths."""
        profiles = []
        for row, length in enumerate(prompt_tokens):
            images = [image for image in report.images if image.row == row]
            before = sum(image.before for image in images)
            visual = tuple(sum(counts) for counts in zip(*(image.by_layer for image in images), strict=True))
            profiles.append(cls(before, visual, length - before))
        return profiles

    @property
    def all(self) -> list[int]:
        """Return the tokens of the prompt that each layer sees, including text."""
        return [count + self.text for count in self.visual]

    @property
    def retention(self) -> float:
        """Return the visual tokens over all layers as a fraction of those without compression."""
        return sum(self.visual) / (self.before * len(self.visual))

    @property
    def compression_ratio(self) -> float:
        """Return 1 / retention.

        With L tokens before layer K of N layers and L_out tokens from K on, this is Eq. 3 of LLaVolta
        (arXiv:2406.20092): N L / ((N - K) L_out + K L).
        """
        return 1 / self.retention

    def kv_bytes(self, family: Family) -> int:
        """Return the bytes of the KV cache after prefill."""
        return kv_cache_bytes(family, self.all)

    def prefill_flops(self, family: Family) -> int:
        """Return the LLM's prefill FLOPs; see `vlmzip.runtime.flops.prefill_flops`."""
        return prefill_flops(family, self.all)

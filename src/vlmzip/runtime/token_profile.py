"""The token profile: visual tokens at each LLM layer, from which retention, KV cache and prefill FLOPs follow."""

from __future__ import annotations

from dataclasses import dataclass

from vlmzip.models.adapter import ModelAdapter
from vlmzip.runtime.flops import kv_cache_bytes, prefill_flops
from vlmzip.runtime.report import Report


@dataclass(frozen=True)
class TokenProfile:
    """The tokens of one prompt at each layer of the LLM."""

    before: int
    """Visual tokens without compression."""
    visual: tuple[int, ...]
    """Visual tokens that each layer sees."""
    text: int
    """The other tokens of the prompt; no method drops them."""

    @classmethod
    def rows(cls, report: Report, prompt_tokens: list[int]) -> list[TokenProfile]:
        """One for each row of a batch that a report is about; `prompt_tokens` are the rows' uncompressed lengths."""
        profiles = []
        for row, length in enumerate(prompt_tokens):
            own = [image for image in report.images if image.row == row]
            before = sum(image.before for image in own)
            visual = tuple(sum(counts) for counts in zip(*(image.by_layer for image in own), strict=True))
            profiles.append(cls(before, visual, length - before))
        return profiles

    @property
    def all(self) -> list[int]:
        """Tokens of the prompt that each layer sees, text among them."""
        return [count + self.text for count in self.visual]

    @property
    def retention(self) -> float:
        """Visual tokens over all layers, as a share of what they would be without compression."""
        return sum(self.visual) / (self.before * len(self.visual))

    @property
    def compression_ratio(self) -> float:
        """1 / retention. With L tokens before layer K of N and L_out from there on, LLaVolta's Eq. 3
        (arXiv:2406.20092): N L / ((N - K) L_out + K L)."""
        return 1 / self.retention

    def kv_bytes(self, adapter: ModelAdapter) -> int:
        """Bytes of the KV cache after prefill."""
        return kv_cache_bytes(adapter, self.all)

    def prefill_flops(self, adapter: ModelAdapter) -> int:
        """See `vlmzip.runtime.flops.prefill_flops`."""
        return prefill_flops(adapter, self.all)

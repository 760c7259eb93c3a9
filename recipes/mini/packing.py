"""Several questions about one image in one training sequence.

    USER : image | question ASSISTANT : answer </s> | question ASSISTANT : answer </s> | ...

Each question sees the start, the image and itself, and its positions go on from the image's: it seems alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

IGNORE = -100


@dataclass(frozen=True)
class Packed:
    """A batch of packed sequences, padded on the right."""

    ids: Tensor  # [batch length], the image token at visual tokens
    positions: Tensor  # [batch length]
    part: Tensor  # [batch length]: 0 start and image, 1.. the questions, -1 padding
    labels: Tensor  # [batch length]: the token that each token should be followed by, or IGNORE

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[batch 1 length length], added to attention scores."""
        length = self.ids.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        same = self.part[:, :, None] == self.part[:, None, :]
        shared = (self.part == 0)[:, None, :]
        seen = earlier & (same | shared)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[
            :, None
        ]


class Packer:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, visual_tokens: int) -> None:
        self.encode = tokenizer.backend_tokenizer.encode
        self.pad, self.image = tokenizer.get_vocab()["<pad>"], tokenizer.get_vocab()["<image>"]
        self.end = [tokenizer.get_vocab()["</s>"]]
        self.visual_tokens = visual_tokens
        self.start = self.encode("USER:").ids

    def pack(self, images: list[list[tuple[str, str]]], everything: bool, device: torch.device) -> Packed:
        """From each image's (question, answer) pairs. `everything` asks for the words of the questions too."""
        rows = [self._row(pairs, everything) for pairs in images]
        fills = (self.pad, 0, -1, IGNORE)
        length = max(len(row[0]) for row in rows)
        columns = [
            torch.tensor([row[field] + [fill] * (length - len(row[field])) for row in rows], device=device)
            for field, fill in enumerate(fills)
        ]
        return Packed(*columns)

    def _row(self, pairs: list[tuple[str, str]], everything: bool) -> tuple[list[int], list[int], list[int], list[int]]:
        ids = self.start + [self.image] * self.visual_tokens
        shared = len(ids)
        positions, part, labels = list(range(shared)), [0] * shared, [IGNORE] * shared
        for number, (question, answer) in enumerate(pairs, 1):
            asked = self.encode(f"{question} ASSISTANT:", add_special_tokens=False).ids
            told = self.encode(answer, add_special_tokens=False).ids + self.end
            own = asked + told
            ids += own
            positions += range(shared, shared + len(own))
            part += [number] * len(own)
            silent = 0 if everything else len(asked) - 1
            labels += [IGNORE] * silent + own[silent + 1 :] + [IGNORE]
        return ids, positions, part, labels

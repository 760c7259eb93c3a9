"""Several questions about an image in one training sequence.

    USER : image | question ASSISTANT : answer </s> | question ASSISTANT : answer </s> | ...

Each question attends to the start, the image and itself, and its positions follow the image's, as if it were the only
question.
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
    labels: Tensor  # [batch length]: the next token to predict at each token, or IGNORE

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return the attention mask, [batch 1 length length], to be added to attention scores."""
        length = self.ids.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        same = self.part[:, :, None] == self.part[:, None, :]
        shared = (self.part == 0)[:, None, :]
        seen = earlier & (same | shared)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[
            :, None
        ]


class Packer:
    """Packs questions and answers into training sequences."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, visual_tokens: int) -> None:
        self.encode = tokenizer.backend_tokenizer.encode
        self.pad, self.image = tokenizer.get_vocab()["<pad>"], tokenizer.get_vocab()["<image>"]
        self.end = [tokenizer.get_vocab()["</s>"]]
        self.visual_tokens = visual_tokens
        self.start = self.encode("USER:").ids

    def pack(self, images: list[list[tuple[str, str]]], everything: bool, device: torch.device) -> Packed:
        """Pack the (question, answer) pairs of each image. With `everything`, questions have labels, too."""
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
            prompt = self.encode(f"{question} ASSISTANT:", add_special_tokens=False).ids
            turn = prompt + self.encode(answer, add_special_tokens=False).ids + self.end
            ids += turn
            positions += range(shared, shared + len(turn))
            part += [number] * len(turn)
            unlabeled = 0 if everything else len(prompt) - 1
            labels += [IGNORE] * unlabeled + turn[unlabeled + 1 :] + [IGNORE]
        return ids, positions, part, labels

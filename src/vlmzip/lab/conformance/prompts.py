"""Prompts with images for tiny models."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from vlmzip.lab.conformance.families import Tiny
from vlmzip.lab.conformance.images import Inputs, form_of

#: A row of a prompt: token ids, and "image" for the tokens of the next image.
Row = list[int | str]


class Prompts:
    """Model inputs for prompts with images."""

    def __init__(self, model: PreTrainedModel, tiny: Tiny) -> None:
        self.model, self.tiny = model, tiny
        self.encodes: Any = model if hasattr(model, "get_image_features") else model.base_model
        self.form = tiny.images or form_of(self.encodes)
        self.placeholder: int = model.config.image_token_id
        parameters = inspect.signature(model.forward).parameters
        self.type_names = [name for name in ("mm_token_type_ids", "token_type_ids") if name in parameters]
        self.tokens = cache(self._tokens)  # the encoder runs once for each image

    def _tokens(self, image: int) -> list[int]:
        """Return the tokens that stand for an image. The model's own encoder gives the number of placeholders."""
        inputs = self.form(self.encodes, [image])
        with torch.no_grad():
            count = count_of_tokens(self.encodes.get_image_features(**inputs, return_dict=True))
        if self.tiny.placeholders:
            return self.tiny.placeholders(self.model, inputs, count)
        return [self.placeholder] * count

    def batch(self, *rows: Row, first: int = 0) -> Inputs:
        """Return inputs for rows, padded on the left. `first` is the number of the first image."""
        number, ids = first, []
        for row in rows:
            line: list[int] = []
            for part in row:
                if part == "image":
                    line += self.tokens(number)
                    number += 1
                else:
                    line.append(int(part))
            ids.append(line)
        return self.of_ids(ids) | (self.form(self.encodes, list(range(first, number))) if number > first else {})

    def of_ids(self, ids: list[list[int]], video: int | None = None) -> Inputs:
        """Return inputs without pixels for rows of token ids. `video` is the placeholder of videos."""
        longest = max(map(len, ids))
        tokens = torch.tensor([[0] * (longest - len(line)) + line for line in ids])
        mask = torch.tensor([[0] * (longest - len(line)) + [1] * len(line) for line in ids])
        types = (tokens == self.placeholder).long()
        if video is not None:
            types[tokens == video] = 2
        return {"input_ids": tokens, "attention_mask": mask} | dict.fromkeys(self.type_names, types)


def count_of_tokens(output: Any) -> int:
    """Return the number of visual tokens in the output of `get_image_features`."""
    rows = output.pooler_output
    if rows is None:  # Llama 4 projects later. Granite 4 Vision adds features to the inputs of several layers.
        streams = getattr(output, "deepstack_features", None)
        rows = streams[0][1] if streams else output.last_hidden_state
    return sum(row.shape[:-1].numel() for row in rows)

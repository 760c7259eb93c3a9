"""The questions about images, as inputs of the LLM, for compressors before the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmzip.models.family import Family
from vlmzip.models.layout import Encoded, Layout, Views
from vlmzip.processor import Inputs
from vlmzip.runtime.compress import view_numbers
from vlmzip.runtime.prompt import find_placeholders, prompt_in, question_ends


def with_questions(encoded: Encoded, family: Family, inputs: Inputs, layouts: Sequence[Layout]) -> Encoded:
    """Return the visual tokens with the question about each image, as `text_features` and `query_mask`.

    The question is the text of the row after the image, without other images. It ends at the token before the first
    label after the image, or at the last token of the row. If there is no text, it is that last token.
    """
    features = [_embedded(family, ids) for ids in questions(family, inputs, layouts)]
    image_of_view = [image for image, numbers in enumerate(view_numbers(layouts)) for _ in numbers]
    groups = []
    for views in encoded.groups:
        of_views, mask = _padded([features[image_of_view[number]] for number in views.numbers])
        tokens = views.tokens.replace(text_features=of_views, query_mask=mask)
        groups.append(Views(tokens, views.numbers, views.streams))
    return replace(encoded, groups=groups)


def questions(family: Family, inputs: Inputs, layouts: Sequence[Layout]) -> list[Int[Tensor, " words"]]:
    """Return the token ids of the question about each image."""
    ids, mask = prompt_in(inputs)
    places = find_placeholders(ids, family.placeholder_id, [layout.placeholders for layout in layouts], family.modality)
    ends = question_ends([(row, columns[-1]) for row, columns in places], mask, inputs.get("labels"))
    is_text = mask.bool()
    for each in family.modalities:
        is_text = is_text & (ids != each.placeholder_id)
    word_ids = []
    for (row, columns), end in zip(places, ends, strict=True):
        asked = slice(columns[-1] + 1, end + 1)
        words = ids[row, asked][is_text[row, asked]]
        word_ids.append(words if len(words) else ids[row, end : end + 1])
    return word_ids


def _embedded(family: Family, ids: Int[Tensor, " words"]) -> Float[Tensor, "words dim"]:
    embeddings = family.model.get_input_embeddings()
    with torch.no_grad():
        embedded: Tensor = embeddings(ids.to(embeddings.weight.device))
    return embedded


def _padded(
    questions: Sequence[Float[Tensor, "_ dim"]],
) -> tuple[Float[Tensor, "batch words dim"], Bool[Tensor, "batch words"]]:
    """Return the questions as rows of equal length, padded on the left, and where they are not padding."""
    longest = max(map(len, questions))
    rows = [torch.cat([words.new_zeros(longest - len(words), words.shape[1]), words]) for words in questions]
    column = torch.arange(longest, device=rows[0].device)
    lengths = torch.tensor([len(words) for words in questions], device=rows[0].device)
    return torch.stack(rows), column >= longest - lengths[:, None]

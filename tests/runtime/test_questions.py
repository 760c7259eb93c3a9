"""The question about each image, as embeddings, for compressors before the LLM."""

from dataclasses import dataclass

import pytest
import torch

from tests.families import FAMILIES
from vlmzip import Compressor, Signal, Site, TokenMap, attach
from vlmzip.models import family_of

SEEN = []


@dataclass(frozen=True, kw_only=True)
class Listener(Compressor):
    """Keep the first half of the tokens, and remember the question."""

    needs = frozenset({Signal.TEXT_FEATURES})
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)

    def token_count(self, grid):
        return grid.size // 2

    def assign(self, tokens):
        SEEN.append((tokens.text_features, tokens.query_mask))
        batch, count, _ = tokens.features.shape
        kept = torch.arange(count) >= count - self.token_count(tokens.grid)
        return TokenMap.keep(kept.expand(batch, count))


def heard(name, *rows, site=Site.POST_PROJECTOR, **further):
    """Return the token ids of the question about each image, sorted, as the compressor saw them."""
    SEEN.clear()
    family = FAMILIES[name]()
    with attach(family.model, Listener(site=site)) as compressed, torch.no_grad():
        compressed(**family.batch(*rows), **further)
    table = family.model.get_input_embeddings().weight
    words = [question[mask] for features, masks in SEEN for question, mask in zip(features, masks, strict=True)]
    return sorted([int((table == word).all(-1).nonzero()[0]) for word in question] for question in words)


@pytest.mark.parametrize("site", [Site.PRE_PROJECTOR, Site.POST_PROJECTOR])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_question_is_the_text_after_the_image_without_other_images(name, site):
    first, second = [4, "image", 5, 6], [7]
    questions = heard(name, [3, "image", *first], ["image", *second], site=site)
    family = FAMILIES[name]()
    without_markers = [[word for word in words if word in range(3, 8)] for words in questions]
    assert without_markers == sorted([[4, 5, 6], [5, 6], [7]])
    placeholder = family_of(family.model).placeholder_id
    assert all(placeholder not in words for words in questions)


def test_in_training_the_question_ends_before_the_answer():
    row = [3, "image", 4, 5, 6, 7]
    family = FAMILIES["llava"]()
    labels = torch.full_like(family.batch(row)["input_ids"], -100)
    labels[0, -2:] = torch.tensor([6, 7])
    assert heard("llava", row, labels=labels) == [[4, 5]]


def test_without_text_the_question_is_the_last_token():
    image = FAMILIES["llava"]().batch([3, "image"])["input_ids"][0, -1]
    assert heard("llava", [3, "image"]) == [[image]]

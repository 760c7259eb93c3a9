"""Tests check the shapes and types in signatures of vlmzip."""

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from vlmzip.models.layout import numbers_by_kind
from vlmzip.token_map import TokenMap


def test_a_wrong_number_of_axes_fails():
    with pytest.raises(TypeCheckError, match="parameter 'kept'"):
        TokenMap.keep(torch.zeros(3, dtype=torch.bool))


def test_axes_of_one_name_have_one_size():
    group, anchor = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(TypeCheckError, match="parameter 'anchor'"):
        TokenMap(group=group, weight=torch.ones(2, 3), anchor=anchor, length=torch.ones(2, dtype=torch.long))


def test_a_wrong_type_fails_beside_no_shape_too():
    with pytest.raises(BeartypeCallHintViolation):
        numbers_by_kind(3)

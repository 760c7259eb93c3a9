"""What each further image of a batch costs beside its own tokens: a GPU waits for the CPU at every small step."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vlmzip
from vlmzip import FastV, LLaVolta, NoCompression, SparseVLM

FEW, MANY = 4, 8


class Operations(TorchDispatchMode):
    """Counts the operations of torch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def operations_for_one_more(family, compressor):
    counts = []
    with vlmzip.attach(family.model, compressor) as compressed:
        for images in (FEW, MANY):
            inputs = family.batch(*[[1, "image", 5, 6]] * images)
            with Operations() as operations:
                compressed(**inputs)
            counts.append(operations.count)
    return (counts[1] - counts[0]) / (MANY - FEW)


@pytest.mark.parametrize(
    "compressor",
    [LLaVolta(stride=8, layer=2), FastV(keep=0.25, layer=2), SparseVLM(counts=(20, 10), layer=(1, 2))],
    ids=["llavolta", "fastv", "sparsevlm"],
)
def test_inside_the_llm_one_more_image_adds_few_operations(family, compressor):
    added = operations_for_one_more(family, compressor) - operations_for_one_more(family, NoCompression())
    assert added <= 10

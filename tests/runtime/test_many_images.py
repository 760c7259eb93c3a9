"""What each further image of a batch costs beside its own tokens: a GPU waits for the CPU at every small step."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vlmzip
from tests.families import FAMILIES
from vlmzip import (
    DFMR,
    Chain,
    Downsample,
    FastV,
    KMeans,
    LLaVolta,
    NoCompression,
    Pool2d,
    RandomTokens,
    Site,
    SparseVLM,
    VisionZip,
)

#: Images of a batch. Beyond the first few, the images of all families have the same size.
FEW, MANY = 4, 8


def name(compressor):
    return compressor.name()


class Operations(TorchDispatchMode):
    """Counts the operations of torch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def operations_for_one_more(family, model):
    counts = []
    for images in (FEW, MANY):
        inputs = family.batch(*[[1, "image", 5, 6]] * images)
        with Operations() as operations:
            model(**inputs)
        counts.append(operations.count)
    return (counts[1] - counts[0]) / (MANY - FEW)


def compressed_operations_for_one_more(family, compressor):
    with vlmzip.attach(family.model, compressor) as compressed:
        return operations_for_one_more(family, compressed)


@pytest.mark.parametrize(
    "compressor",
    [LLaVolta(stride=8, layer=2), FastV(keep=0.25, layer=2), SparseVLM(counts=(20, 10), layer=(1, 2))],
    ids=name,
)
def test_inside_the_llm_one_more_image_adds_few_operations(family, compressor):
    before_the_llm = compressed_operations_for_one_more(family, NoCompression())
    assert compressed_operations_for_one_more(family, compressor) - before_the_llm <= 5


def test_before_the_llm_one_more_image_adds_few_operations(family):
    plain = operations_for_one_more(family, family.model)
    assert compressed_operations_for_one_more(family, NoCompression()) - plain <= 5


@pytest.mark.parametrize(
    "compressor", [VisionZip(keep=12), DFMR(tau=0.3), KMeans(keep=9), Pool2d(factor=2), Downsample(keep=9)], ids=name
)
def test_methods_before_the_llm_add_no_operations_image_by_image(compressor):
    assert compressed_operations_for_one_more(FAMILIES["llava"](), compressor) <= 10


@pytest.mark.filterwarnings("ignore:.*changes nothing")
@pytest.mark.parametrize("family_name", ["llava", "llava_next", "qwen3_vl"])
@pytest.mark.parametrize("first", [VisionZip(keep=12), Pool2d(factor=1), DFMR(tau=0.3)], ids=name)
def test_a_second_compressor_before_the_llm_adds_few_operations(family_name, first):
    family = FAMILIES[family_name]()
    second = RandomTokens(keep=6, site=Site.POST_PROJECTOR)
    alone = compressed_operations_for_one_more(family, first)
    assert compressed_operations_for_one_more(family, Chain(compressors=(first, second))) - alone <= 4

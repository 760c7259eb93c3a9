import csv
from types import SimpleNamespace

import pytest
import torch

from recipes.benchmarks import RESULTS
from recipes.benchmarks.detail_lost import threshold
from tests.methods.test_visionzip import tokens_of
from vlmzip import VCC, Chain, NoCompression, Pool2d, RandomTokens, TokenMap, VisionZip
from vlmzip.lab.asking import warn_about_detail
from vlmzip.runtime.detail import WORRYING, detail_lost


def test_nothing_is_lost_without_compression():
    tokens = tokens_of()
    torch.testing.assert_close(detail_lost(tokens, NoCompression()(tokens)), torch.zeros(3))


def test_the_mean_of_all_loses_everything():
    tokens = tokens_of(prefix=0)
    everything = TokenMap.merge(torch.zeros(3, 36, dtype=torch.long))
    torch.testing.assert_close(detail_lost(tokens, everything), torch.ones(3))


def test_pooling_loses_the_variance_inside_the_windows():
    tokens = tokens_of(rows=4, cols=4, prefix=0)
    grid = tokens.features.unflatten(1, (4, 4))
    inside = sum(
        (window - window.mean((1, 2), keepdim=True)).square().sum((1, 2, 3))
        for window in (grid[:, r : r + 2, c : c + 2] for r in (0, 2) for c in (0, 2))
    )
    spread = (tokens.features - tokens.features.mean(1, keepdim=True)).square().sum((1, 2))
    torch.testing.assert_close(detail_lost(tokens, Pool2d(factor=2)(tokens)), inside / spread)


def test_dropped_tokens_count_as_their_nearest_kept_one():
    tokens = tokens_of(batch=1, rows=2, cols=2, prefix=0)
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.0, 3.0]]])
    tokens = type(tokens)(features, tokens.grid)
    kept = TokenMap.keep(torch.tensor([[True, True, False, False]]))
    error = (1 + 0.01) + 4  # token 2 stands for token 0, token 3 for token 1
    spread = (features - features.mean(1, keepdim=True)).square().sum()
    assert detail_lost(tokens, kept).item() == pytest.approx((error / spread).item())


def test_fewer_tokens_lose_more():
    tokens = tokens_of()
    lost = [detail_lost(tokens, RandomTokens(keep=k)(tokens)).mean() for k in (30, 20, 10, 2)]
    assert lost == sorted(lost)


@pytest.mark.parametrize("merge", ["reference", "mean"])
def test_the_reference_merge_is_not_punished_for_its_norm(merge):
    tokens = tokens_of()
    lost = detail_lost(tokens, VisionZip(keep=30, merge=merge)(tokens))
    assert (lost < 0.7).all()


def test_cls_is_no_detail():
    tokens = tokens_of()
    loud = tokens.features.clone()
    loud[:, 0] *= 1000
    token_map = Pool2d(factor=2)(tokens)
    torch.testing.assert_close(
        detail_lost(type(tokens)(loud, tokens.grid, 1), token_map), detail_lost(tokens, token_map)
    )


def test_the_threshold_of_the_warning_is_the_measured_one():
    """`recipes/benchmarks/detail_lost.py` made the table; what it says there is what `ask` warns at."""
    with (RESULTS / "detail-lost.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert threshold(rows, rows[0]["plain"]) == pytest.approx(WORRYING)


@pytest.mark.parametrize(("lost", "warns"), [(WORRYING + 0.01, True), (WORRYING - 0.01, False), (None, False)])
def test_ask_warns_above_the_threshold(lost, warns, caplog):
    image = SimpleNamespace(detail_lost=lost, by_layer=(64, 16))
    warn_about_detail(SimpleNamespace(images=[image], compressor=VisionZip()), ["letter.png"])
    assert ("16 tokens leave out" in caplog.text and "letter.png" in caplog.text) is warns


@pytest.mark.parametrize(
    ("compressor", "warns"), [(VCC(), False), (Chain(compressors=(VisionZip(), VCC())), True)], ids=["vcc", "chain"]
)
def test_ask_does_not_warn_about_tokens_that_come_back(compressor, warns, caplog):
    image = SimpleNamespace(detail_lost=WORRYING + 0.01, by_layer=(64, 16))
    warn_about_detail(SimpleNamespace(images=[image], compressor=compressor), ["letter.png"])
    assert ("leave out" in caplog.text) is warns

"""The laws of TokenMap, as properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmzip.token_map import TokenMap, highest

seeds = st.integers(0, 10**6)


def random_map(seed: int, batch: int, lengths: list[int], *, adds: bool = False) -> TokenMap:
    """Any valid map over inputs padded to the longest of `lengths`, built without the class's own helpers.

    With `adds`, tokens also enter output tokens that are not their group's.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = max(lengths)
    group = torch.full((batch, tokens), -1)
    anchor = torch.zeros(batch, tokens, dtype=torch.bool)
    outputs = []
    for row in range(batch):
        count = int(torch.randint(1, lengths[row] + 1, (1,), generator=generator))
        members = torch.randint(-1, count, (lengths[row],), generator=generator)
        chosen = torch.randperm(lengths[row], generator=generator)[:count]
        members[chosen] = torch.arange(count)  # every output token has a member: its anchor
        group[row, : lengths[row]] = members
        anchor[row, chosen] = True
        outputs.append(count)
    weight = torch.rand(batch, tokens, generator=generator) * (group >= 0)
    if not adds:
        return TokenMap(group, weight, anchor, torch.tensor(outputs))
    added = torch.rand(batch, tokens, tokens, generator=generator)
    for row in range(batch):
        added[row, outputs[row] :] = 0
        added[row, :, lengths[row] :] = 0
    return TokenMap(group, weight, anchor, torch.tensor(outputs), added)


def chain_of_maps(seed: int, count: int) -> list[TokenMap]:
    maps, lengths = [], [9, 7, 12]
    for step in range(count):
        maps.append(random_map(seed + step, 3, lengths))
        lengths = maps[-1].lengths
    return maps


def as_matrix(m: TokenMap) -> torch.Tensor:
    """The map as a dense [batch, out, tokens] matrix, by loops."""
    dense = torch.zeros(len(m.group), m.max_length, m.group.shape[1])
    for b, row in enumerate(m.group.tolist()):
        for i, g in enumerate(row):
            if g >= 0:
                dense[b, g, i] = m.weight[b, i]
    return dense if m.added is None else dense + m.added[:, : m.max_length]


@given(seeds)
@settings(deadline=None, max_examples=50)
def test_apply_is_the_weighted_sum(seed):
    m = random_map(seed, 3, [9, 7, 12])
    x = torch.randn(3, 12, 5)
    torch.testing.assert_close(m.apply(x), as_matrix(m) @ x)


@given(seeds, st.booleans(), st.booleans())
@settings(deadline=None, max_examples=50)
def test_tokens_that_are_added_to_several_outputs_pass_every_step(seed, first_adds, second_adds):
    first = random_map(seed, 3, [9, 7, 12], adds=first_adds)
    second = random_map(seed + 1, 3, first.lengths, adds=second_adds)
    x, order = torch.randn(3, 12, 5), torch.randperm(12)
    torch.testing.assert_close(first.then(second).apply(x), as_matrix(second) @ as_matrix(first) @ x)
    torch.testing.assert_close(as_matrix(first.of_inputs(order)), as_matrix(first)[..., order])
    torch.testing.assert_close(as_matrix(first.after_dropping(2))[..., 2:], as_matrix(first))
    place = torch.stack([torch.randperm(first.max_length) for _ in range(3)])
    moved = as_matrix(first.rearranged(place))
    torch.testing.assert_close(moved.gather(1, place[..., None].expand_as(moved)), as_matrix(first))
    torch.testing.assert_close(as_matrix(TokenMap.stack(first.split())), as_matrix(first))
    torch.testing.assert_close(first.rows(torch.tensor([2])).apply(x[2:])[0], first.apply(x)[2, : first.lengths[2]])
    mixed = TokenMap.stack([first.rows(slice(0, 1)), random_map(seed + 2, 2, [12, 4])])
    torch.testing.assert_close(mixed.rows(slice(0, 1)).apply(x[:1]), first.rows(slice(0, 1)).apply(x[:1]))


def test_an_infinity_that_is_not_added_does_not_spread():
    added = torch.tensor([[[0.0, 0.5, 0.0]]])
    kept = torch.tensor([[True, False, False]])
    m = TokenMap(torch.tensor([[0, -1, -1]]), kept.float(), kept, torch.tensor([1]), added)
    assert m.apply(torch.tensor([[[1.0], [4.0], [torch.inf]]])).tolist() == [[[3.0]]]


@given(seeds)
@settings(deadline=None, max_examples=50)
def test_apply_is_linear(seed):
    m = random_map(seed, 2, [6, 8])
    x, y = torch.randn(2, 2, 8, 3)
    torch.testing.assert_close(m.apply(2 * x + y), 2 * m.apply(x) + m.apply(y))


@given(seeds)
@settings(deadline=None, max_examples=50)
def test_then_is_composition(seed):
    first, second = chain_of_maps(seed, 2)
    x = torch.randn(3, 12, 4)
    both = first.then(second)
    torch.testing.assert_close(both.apply(x), second.apply(first.apply(x)))
    assert both.lengths == second.lengths


@given(seeds)
@settings(deadline=None, max_examples=50)
def test_then_is_associative(seed):
    a, b, c = chain_of_maps(seed, 3)
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert torch.equal(left.group, right.group)
    assert torch.equal(left.anchor, right.anchor)
    torch.testing.assert_close(left.weight, right.weight)


@given(seeds)
@settings(deadline=None, max_examples=50)
def test_the_anchor_of_the_whole_is_the_anchor_of_the_anchor(seed):
    first, second = chain_of_maps(seed, 2)
    both = first.then(second)
    both.check()
    for b in range(3):
        for g in range(second.lengths[b]):
            middle = int(second.anchor_index()[b, g])
            assert int(both.anchor_index()[b, g]) == int(first.anchor_index()[b, middle])


@given(seeds)
@settings(deadline=None, max_examples=50)
def test_means_of_equal_groups_preserve_the_mean(seed):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    m = TokenMap.merge((order % 4).expand(2, -1))
    x = torch.randn(2, 12, 3)
    torch.testing.assert_close(m.apply(x).mean(1), x.mean(1))


def test_identity_changes_nothing_and_is_neutral():
    m = random_map(3, 3, [9, 7, 12])
    x = torch.randn(3, 12, 4)
    assert torch.equal(TokenMap.identity(3, 12).apply(x), x)
    assert torch.equal(TokenMap.identity(3, 12).then(m).group, m.group)


def test_keep_prunes_in_order():
    m = TokenMap.keep(torch.tensor([[True, False, True, False], [False, True, True, True]]))
    assert m.group.tolist() == [[0, -1, 1, -1], [-1, 0, 1, 2]]
    assert m.lengths == [2, 3]
    x = torch.arange(8.0).reshape(2, 4, 1)
    assert m.apply(x)[..., 0].tolist() == [[0, 2, 0], [5, 6, 7]]
    assert m.anchor_index().tolist() == [[0, 2, -1], [1, 2, 3]]


def test_merge_anchors_the_middle_member():
    m = TokenMap.merge(torch.tensor([[0, 1, 0, 0, 1, -1]]))
    assert m.anchor.tolist() == [[False, True, True, False, False, False]]
    assert m.weight[0].tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 3, 1 / 3, 1 / 2, 0])


def test_dropped_infinities_do_not_leak():
    m = TokenMap.keep(torch.tensor([[True, False]]))
    assert m.apply(torch.tensor([[[1.0], [float("inf")]]])).tolist() == [[[1.0]]]


def test_half_precision_is_summed_in_single():
    ones = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    m = TokenMap.merge(torch.zeros(1, 4096, dtype=torch.long), weight=torch.ones(1, 4096))
    assert m.apply(ones).item() == 4096  # summed in bfloat16 it would stop at 256


def test_gradients_flow_through_apply():
    m = random_map(5, 1, [6])
    x = torch.randn(1, 6, 2, requires_grad=True)
    m.apply(x).sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0], m.weight[0])


@pytest.mark.parametrize(
    "broken",
    [
        TokenMap(torch.tensor([[0, 2]]), torch.ones(1, 2), torch.ones(1, 2).bool(), torch.tensor([2])),
        TokenMap(torch.tensor([[0, 0]]), torch.ones(1, 2), torch.ones(1, 2).bool(), torch.tensor([1])),
        TokenMap(torch.tensor([[0, -1]]), torch.ones(1, 2), torch.tensor([[False, True]]), torch.tensor([1])),
    ],
)
def test_check_finds_broken_maps(broken):
    with pytest.raises(ValueError, match=r"group|anchor"):
        broken.check()


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cannot follow"):
        TokenMap.identity(1, 5).then(TokenMap.identity(1, 4))


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_split_and_stack_are_the_reverse_of_each_other(seed):
    m = random_map(seed, 3, [6, 8, 7])
    x = torch.randn(3, 8, 4)
    parts = m.split()
    for row, part in enumerate(parts):
        assert torch.equal(part.apply(x[row : row + 1])[0], m.apply(x)[row, : m.lengths[row]])
        assert part.lengths == part.length.tolist()
    again = TokenMap.stack(parts)
    assert again.lengths == again.length.tolist() == m.lengths
    assert torch.equal(again.group, m.group)
    assert torch.equal(again.weight, m.weight)
    assert torch.equal(again.anchor, m.anchor)


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_lengths_that_are_known_already_are_those_on_the_device(seed):
    first, second = chain_of_maps(seed, 2)
    assert first.lengths + second.lengths
    for m in (first.then(second), first.in_anchor_order(), first.rows(slice(1, 3))):
        assert m.lengths == m.length.tolist()


@given(seeds)
@settings(deadline=None, max_examples=50)
def test_the_first_of_equal_scores_win(seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 6, (3, 20), generator=generator).float()
    score[0, 3], score[0, 5], score[1, 7] = torch.inf, torch.nan, -torch.inf
    for count in (0, 1, 7, 20):
        ranking = score.nan_to_num(nan=torch.inf, posinf=torch.inf).argsort(dim=1, descending=True, stable=True)
        expected = torch.zeros(3, 20, dtype=torch.bool).scatter(1, ranking[:, :count], True)
        assert torch.equal(highest(score, count), expected)

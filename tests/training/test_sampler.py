"""The order of records: whole steps, another order in each epoch, the same after a resume."""

from vlmzip.training.sampler import TOGETHER, EpochSampler


def orders(epochs, **settings):
    now = 0
    sampler = EpochSampler(26, 4, 0, lambda: now, **settings)
    found = []
    for now in range(epochs):  # noqa: B007 - the sampler asks for it
        found.append(list(sampler))
    return found


def test_an_epoch_is_whole_steps_of_different_records():
    first, second = orders(2)
    assert len(first) == len(second) == len(EpochSampler(26, 4, 0, lambda: 0)) == 24
    assert len(set(first)) == 24
    assert first != second


def test_an_epoch_is_the_same_whatever_was_drawn_before():
    assert list(EpochSampler(26, 4, 0, lambda: 3)) == orders(4)[3]
    assert list(EpochSampler(26, 4, 1, lambda: 3)) != orders(4)[3]


def test_records_of_like_length_stand_together():
    lengths = [7 * n % 26 for n in range(26)]
    (order,) = orders(1, lengths=lengths)
    assert [lengths[n] for n in order] == sorted((lengths[n] for n in order), reverse=True)
    assert set(order) == set(orders(1)[0])  # length decides where a record stands, not whether it has its turn
    many = 3 * TOGETHER
    order = list(EpochSampler(many, 1, 0, lambda: 0, lengths=list(range(many))))
    assert order[:TOGETHER] == sorted(order[:TOGETHER], reverse=True)
    assert order != sorted(order, reverse=True)

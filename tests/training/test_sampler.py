"""The order of records: whole steps, a different order in each epoch, and the same order after a resume."""

from vlmzip.training.sampler import TOGETHER, EpochSampler


def orders(epochs, **settings):
    now = 0
    sampler = EpochSampler(26, 4, 0, lambda: now, **settings)
    epoch_orders = []
    for now in range(epochs):  # noqa: B007 - the sampler reads it
        epoch_orders.append(list(sampler))
    return epoch_orders


def test_an_epoch_is_whole_steps_of_different_records():
    first, second = orders(2)
    assert len(first) == len(second) == len(EpochSampler(26, 4, 0, lambda: 0)) == 24
    assert len(set(first)) == 24
    assert first != second


def test_an_epoch_does_not_depend_on_earlier_epochs():
    assert list(EpochSampler(26, 4, 0, lambda: 3)) == orders(4)[3]
    assert list(EpochSampler(26, 4, 1, lambda: 3)) != orders(4)[3]


def test_records_of_similar_length_are_grouped():
    lengths = [7 * n % 26 for n in range(26)]
    (order,) = orders(1, lengths=lengths)
    assert [lengths[n] for n in order] == sorted((lengths[n] for n in order), reverse=True)
    assert set(order) == set(orders(1)[0])  # the lengths change the order of an epoch's records, not which they are
    count = 3 * TOGETHER
    order = list(EpochSampler(count, 1, 0, lambda: 0, lengths=list(range(count))))
    assert order[:TOGETHER] == sorted(order[:TOGETHER], reverse=True)
    assert order != sorted(order, reverse=True)

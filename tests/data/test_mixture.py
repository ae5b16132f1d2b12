from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.mixture import BLOCK, Mixture, row_of

WEIGHTS = st.lists(st.floats(0.005, 10), min_size=1, max_size=5).map(lambda ws: {f"d{i}": w for i, w in enumerate(ws)})


@given(WEIGHTS, st.integers(0, 99), st.integers(0, 40))
def test_every_block_holds_the_weights_within_one_sequence(weights, seed, block):
    mixture = Mixture(weights, seed)
    first = sum(mixture._before(block))
    counts = Counter(mixture.at(s)[0] for s in range(first, sum(mixture._before(block + 1))))
    for name, weight in weights.items():
        assert abs(counts[name] - BLOCK * weight / sum(weights.values())) <= 1.001


@given(WEIGHTS, st.integers(0, 99), st.integers(0, 5000))
def test_any_prefix_is_near_the_weights_and_counted_right(weights, seed, n):
    mixture = Mixture(weights, seed)
    counts = Counter(mixture.at(s)[0] for s in range(n))
    assert mixture.consumed(n) == {name: counts[name] for name in weights}
    for name, weight in weights.items():
        assert abs(counts[name] - n * weight / sum(weights.values())) <= 2 + n / BLOCK


@given(WEIGHTS, st.integers(0, 99))
def test_each_domain_is_read_without_gaps(weights, seed):
    mixture = Mixture(weights, seed, first={"d0": 7})
    seen = {}
    for s in range(3000):
        name, number = mixture.at(s)
        seen.setdefault(name, []).append(number)
    for name, numbers in seen.items():
        begin = 7 if name == "d0" else 0
        assert sorted(numbers)[: len(numbers) // 2] == list(range(begin, begin + len(numbers) // 2))
        assert len(set(numbers)) == len(numbers)


def test_the_order_is_random_access():
    a, b = Mixture({"x": 0.3, "y": 0.7}, 5), Mixture({"x": 0.3, "y": 0.7}, 5)
    forward = [a.at(s) for s in range(4000)]
    assert [b.at(s) for s in reversed(range(4000))] == forward[::-1]
    assert forward != [Mixture({"x": 0.3, "y": 0.7}, 6).at(s) for s in range(4000)]


@given(st.integers(1, 300), st.integers(0, 5))
def test_every_epoch_holds_every_row_once_in_another_order(rows, seed):
    epochs = [[row_of(e * rows + i, rows, seed, "d", 8) for i in range(rows)] for e in range(2)]
    assert [sorted(row for _, row in epoch) for epoch in epochs] == [list(range(rows))] * 2
    assert {e for e, _ in epochs[1]} == {1}
    if rows > 20:
        assert epochs[0] != [(0, row) for _, row in epochs[1]]

"""From tokens to batches: which windows there are, what they hold, and in which order they come."""

import itertools
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import IGNORE, count_targets, count_windows, get_batch, micro_step_seed, training_order

any_corpus = given(
    n_tokens=st.integers(2, 400),
    block_size=st.integers(1, 50),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 9),
)
any_overlap = given(
    n_tokens=st.integers(2, 400), block_size=st.integers(1, 50), fraction=st.floats(0, 1)
)


def positions(n_tokens):
    """A split in which each token is its own position."""
    return np.arange(n_tokens, dtype=np.uint16)


# -----------------------------------------------------------------------------
# windows


@settings(deadline=None)
@any_corpus
def test_each_target_comes_exactly_once_per_epoch(n_tokens, block_size, seed, epoch):
    tokens = positions(n_tokens)
    n = count_windows(tokens, block_size)
    order = training_order(epoch * n, n, n, seed)
    x, y = get_batch(tokens, block_size, order)
    counts = y != IGNORE
    assert sorted(y[counts].tolist()) == list(range(1, n_tokens))
    assert torch.equal(x[counts], y[counts] - 1), 'the input is the token before the target'
    assert counts.any(1).all(), 'no window is empty'
    assert count_targets(tokens, block_size, order) == n_tokens - 1


@settings(deadline=None)
@any_overlap
def test_overlapping_windows_cover_targets_as_the_stride_says(n_tokens, block_size, fraction):
    stride = max(1, round(fraction * block_size))
    tokens = positions(n_tokens)
    n = count_windows(tokens, block_size, stride)
    x, y = get_batch(tokens, block_size, range(n), stride)
    assert x[:, 0].tolist() == [i * stride for i in range(n)]
    counts = y != IGNORE
    assert torch.equal(x[counts], y[counts] - 1)
    assert counts.any(1).all()
    assert counts[:-1].all(), 'none but the last is short'
    assert count_targets(tokens, block_size, np.arange(n), stride) == counts.sum()
    times = np.bincount(y[counts], minlength=n_tokens)[1:]
    assert times.min() >= 1
    assert times.max() <= math.ceil(block_size / stride)
    if n > 1:
        _, before_the_last = get_batch(tokens, block_size, [n - 2], stride)
        assert before_the_last.max() < n_tokens - 1, 'the last one is needed'


def test_windows_past_the_end_are_all_padding():
    x, y = get_batch(positions(10), 4, [2, 3, 4])
    assert y.tolist() == [[9, -1, -1, -1], [-1] * 4, [-1] * 4]
    assert x.tolist() == [[8, 0, 0, 0], [0] * 4, [0] * 4]


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads /proc')
def test_memory_stays_flat_over_100_000_batches(tmp_path):
    np.arange(3_000_000, dtype=np.uint16).tofile(tmp_path / 'x.bin')
    tokens = np.memmap(tmp_path / 'x.bin', dtype=np.uint16, mode='r')
    n = count_windows(tokens, 32)

    def memory():
        return int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1])

    for step in range(1000):
        order = training_order(400 * step, 400, n, seed=1)
        for batch in order.reshape(100, 4):
            get_batch(tokens, 32, batch)
        if step == 10:
            before = memory()
    assert memory() - before < 1024, 'KiB'


# -----------------------------------------------------------------------------
# the order


def test_each_epoch_and_each_seed_has_its_own_order():
    n = 1000
    orders = []
    for epoch, seed in itertools.product(range(3), (1, 2)):
        orders.append(tuple(training_order(epoch * n, n, n, seed)))
    assert len(set(orders)) == 6
    for order in orders:
        correlation = np.corrcoef(order, np.arange(n))[0, 1]
        assert abs(correlation) < 0.15, 'an order that follows the text'
    for a, b in itertools.pairwise(orders):
        in_the_same_place = [i for i, j in zip(a, b, strict=True) if i == j]
        assert len(in_the_same_place) < 12  # 1 expected


# The limits are chi-square quantiles at p = 0.0002 to 0.0004.
@pytest.mark.parametrize(('n', 'limit'), [(3, 23), (4, 53), (5, 181)])
def test_all_orders_of_a_small_epoch_are_equally_likely(n, limit):
    expected = 500
    epochs = expected * math.factorial(n)
    orders = training_order(0, epochs * n, n, seed=3).reshape(epochs, n)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == math.factorial(n)
    assert ((counts - expected) ** 2 / expected).sum() < limit


def test_the_order_is_a_function_of_the_position():
    whole = training_order(0, 300, 70, seed=5)
    pieces = [training_order(start, 20, 70, seed=5) for start in range(0, 300, 20)]
    assert np.array_equal(whole, np.concatenate(pieces))


def test_an_epoch_of_billions_of_windows_needs_no_table():
    n = 3_000_000_017
    order = training_order(0, 10**6, n, seed=1)
    assert len(set(order.tolist())) == 10**6
    assert order.min() >= 0
    assert order.max() < n
    assert order.mean() == pytest.approx(n / 2, rel=0.01)


def test_each_micro_step_has_its_own_randomness():
    seeds = {micro_step_seed(*key) for key in itertools.product(range(5), range(50), range(8))}
    assert len(seeds) == 5 * 50 * 8
    assert micro_step_seed(1337, 7, 2) == micro_step_seed(1337, 7, 2)

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

from data import IGNORE, count_windows, training_order, windows


@settings(deadline=None)
@given(n_tokens=st.integers(2, 400), block_size=st.integers(1, 50), seed=st.integers(0, 2**40), epoch=st.integers(0, 9))
def test_each_target_token_comes_exactly_once_an_epoch(n_tokens, block_size, seed, epoch):
    tokens = np.arange(n_tokens, dtype=np.uint16)  # each token is its own position
    n = count_windows(tokens, block_size)
    order = training_order(np.arange(epoch * n, (epoch + 1) * n), n, seed)
    x, y = windows(tokens, block_size, order)
    counted = y != IGNORE
    assert sorted(y[counted].tolist()) == list(range(1, n_tokens))
    assert torch.equal(x[counted], y[counted] - 1), 'the input is the token before the target'
    assert counted.any(1).all(), 'no window is empty'


@settings(deadline=None)
@given(n_tokens=st.integers(2, 400), block_size=st.integers(1, 50), share=st.floats(0, 1))
def test_windows_that_overlap_cover_all_targets_as_often_as_the_stride_says(n_tokens, block_size, share):
    stride = max(1, round(share * block_size))
    tokens = np.arange(n_tokens, dtype=np.uint16)
    n = count_windows(tokens, block_size, stride)
    x, y = windows(tokens, block_size, range(n), stride)
    assert x[:, 0].tolist() == [i * stride for i in range(n)]
    counted = y != IGNORE
    assert torch.equal(x[counted], y[counted] - 1) and counted.any(1).all()
    assert counted[:-1].all(), 'none but the last is short'
    times = np.bincount(y[counted], minlength=n_tokens)[1:]
    assert times.min() >= 1 and times.max() <= -(-block_size // stride)
    if n > 1:
        longer = windows(tokens, block_size, [n - 2], stride)[1]
        assert longer.max() < n_tokens - 1, 'the last one is needed'


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads /proc')
def test_memory_stays_flat_over_100_000_batches(tmp_path):
    np.arange(3_000_000, dtype=np.uint16).tofile(tmp_path / 'x.bin')
    tokens = np.memmap(tmp_path / 'x.bin', dtype=np.uint16, mode='r')
    n = count_windows(tokens, 32)

    def memory():
        return int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1])

    for step in range(1000):
        order = training_order(np.arange(400 * step, 400 * (step + 1)), n, seed=1)
        for batch in order.reshape(100, 4):
            windows(tokens, 32, batch)
        if step == 10:
            before = memory()
    assert memory() - before < 1024, 'KiB'


def test_windows_past_the_end_are_all_padding():
    x, y = windows(np.arange(10, dtype=np.uint16), 4, [2, 3, 4])
    assert y.tolist() == [[9, -1, -1, -1], [-1] * 4, [-1] * 4]
    assert x.tolist() == [[8, 0, 0, 0], [0] * 4, [0] * 4]


def test_each_epoch_and_each_seed_has_its_own_order():
    n = 1000
    orders = [
        tuple(training_order(np.arange(epoch * n, (epoch + 1) * n), n, seed)) for epoch in range(3) for seed in (1, 2)
    ]
    assert len(set(orders)) == 6
    for a in orders:
        assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.15, 'an order that follows the text'
    for a, b in itertools.pairwise(orders):
        assert sum(i == j for i, j in zip(a, b, strict=True)) < 12  # 1 expected


@pytest.mark.parametrize(('n', 'limit'), [(3, 23), (4, 53), (5, 181)])  # chi-square quantiles at p = 0.0002 to 0.0004
def test_all_orders_of_a_small_epoch_are_equally_likely(n, limit):
    epochs, expected = 500 * math.factorial(n), 500
    orders = training_order(np.arange(epochs * n), n, seed=3).reshape(epochs, n)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == math.factorial(n)
    assert ((counts - expected) ** 2 / expected).sum() < limit


def test_the_order_is_a_function_of_the_position():
    whole = training_order(np.arange(300), 70, seed=5)
    pieces = [training_order(np.arange(start, start + 20), 70, seed=5) for start in range(0, 300, 20)]
    assert np.array_equal(whole, np.concatenate(pieces))


def test_an_epoch_of_billions_of_windows_needs_no_table():
    n = 3_000_000_017
    order = training_order(np.arange(10**6), n, seed=1)
    assert len(set(order.tolist())) == 10**6 and order.min() >= 0 and order.max() < n
    assert order.mean() == pytest.approx(n / 2, rel=0.01)

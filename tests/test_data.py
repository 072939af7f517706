"""From tokens to batches: which windows there are, what they hold, and in which order they come."""

import itertools
import json
import math
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import (
    IGNORE,
    count_targets,
    count_windows,
    get_batch,
    micro_step_seed,
    open_tokens,
    read_windows,
    training_order,
    training_starts,
)

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
    assert count_targets(tokens, block_size, order * block_size) == n_tokens - 1


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
    assert count_targets(tokens, block_size, np.arange(n) * stride) == counts.sum()
    times = np.bincount(y[counts], minlength=n_tokens)[1:]
    assert times.min() >= 1
    assert times.max() <= math.ceil(block_size / stride)
    if n > 1:
        _, before_the_last = get_batch(tokens, block_size, [n - 2], stride)
        assert before_the_last.max() < n_tokens - 1, 'the last one is needed'


@settings(deadline=None, max_examples=40)
@any_overlap
def test_later_epochs_begin_elsewhere(n_tokens, block_size, fraction):
    stride = max(1, round(fraction * block_size))
    tokens = positions(n_tokens)
    n = count_windows(tokens, block_size, stride)
    shifts = []
    for epoch in range(4):
        starts = training_starts(epoch * n, n, n, stride, seed=3)
        x, y = read_windows(tokens, block_size, starts)
        counts = y != IGNORE
        assert counts.any(1).all(), 'no window is empty'
        assert torch.equal(x[counts], y[counts] - 1)
        assert count_targets(tokens, block_size, starts) == counts.sum()
        (shift,) = set((training_order(epoch * n, n, n, seed=3) * stride - starts).tolist())
        assert 0 <= shift < stride
        times = np.bincount(y[counts], minlength=n_tokens)[1:]
        assert times[: n_tokens - 1 - shift].min(initial=1) >= 1
        assert times.max() <= math.ceil(block_size / stride)
        shifts.append(shift)
    assert shifts[0] == 0, 'the first epoch has all targets'
    assert n > 1 or not any(shifts), 'a text of one window stays as it is'
    assert n == 1 or stride < 40 or len(set(shifts)) > 2


def test_shifts_are_drawn_from_all_of_a_window_by_seed_and_epoch():
    drawn = {}
    for seed in (1, 2):
        starts = training_starts(0, 20_000, 2, 64, seed)  # 10,000 epochs of two windows
        drawn[seed] = -starts.reshape(-1, 2).min(1)
        counts = np.bincount(drawn[seed][1:], minlength=64)
        expected = 9_999 / 64
        assert ((counts - expected) ** 2 / expected).sum() < 110  # p = 0.0002
        assert np.array_equal(starts[7:99], training_starts(7, 92, 2, 64, seed))
    assert (drawn[1] == drawn[2]).mean() < 0.03


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
# a split in several files


def write_files(folder, tokens, cuts, header=b''):
    """Write tokens into files that end at the cuts. Returns their paths."""
    paths = []
    ends = [*sorted(set(cuts) & set(range(1, len(tokens)))), len(tokens)]
    for start, end in itertools.pairwise([0, *ends]):
        path = Path(folder, f'{len(paths):03}.bin')
        path.write_bytes(header + tokens[start:end].tobytes())
        paths.append(path)
    return paths


@settings(deadline=None)
@given(
    n_tokens=st.integers(2, 150),
    block_size=st.integers(1, 50),
    stride=st.integers(1, 50),
    cuts=st.lists(st.integers(1, 150), max_size=150),
    header=st.sampled_from([b'', bytes(1024)]),
)
def test_any_cuts_of_a_split_give_the_same_windows(n_tokens, block_size, stride, cuts, header):
    whole = positions(n_tokens)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(folder, whole, cuts, header)
        tokens = open_tokens(paths, np.dtype('<u2'), len(header))
        n = count_windows(tokens, block_size, stride)
        assert n == count_windows(whole, block_size, stride)
        ids = np.arange(n + 1)  # the last one is past the end
        n_targets = count_targets(whole, block_size, ids * stride)
        assert count_targets(tokens, block_size, ids * stride) == n_targets
        for a, b in zip(
            get_batch(tokens, block_size, ids, stride),
            get_batch(whole, block_size, ids, stride),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize('cuts', [[], [1], [3, 4, 5], range(9)])
def test_any_slice_of_several_files_is_that_of_the_whole(tmp_path, cuts):
    whole = positions(9)
    tokens = open_tokens(write_files(tmp_path, whole, cuts), np.dtype('<u2'))
    assert len(tokens) == 9
    ends = [None, *range(-11, 12)]
    for start, stop in itertools.product(ends, ends):
        piece = tokens[start:stop]
        assert piece.dtype == np.uint16
        assert piece.tolist() == whole[start:stop].tolist()


def test_a_thousand_files_need_no_thousand_open_files(tmp_path):
    resource = pytest.importorskip('resource')
    paths = write_files(tmp_path, positions(3000), range(0, 3000, 3))
    assert len(paths) == 1000
    n_open = len(os.listdir('/proc/self/fd')) if os.path.exists('/proc/self/fd') else 100
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 120, limits[1]))
    try:
        tokens = open_tokens(paths, np.dtype('<u2'))
        assert np.array_equal(tokens[:], positions(3000))
        order = training_order(0, 299, count_windows(tokens, 10), seed=1)
        x, _ = get_batch(tokens, 10, order)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert x[:, 0].tolist() == (10 * order).tolist()


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


@pytest.mark.parametrize('source', [7, [1], [['x']], True])
def test_a_source_that_is_no_name_is_damage(run, sheep, source):
    """Else it would be found out when the first checkpoint gets its model card."""
    meta = json.loads((sheep / 'meta.json').read_text())
    (sheep / 'meta.json').write_text(json.dumps(meta | {'source': source}))
    result = run('train.py', '--dataset=sheep', '--device=cpu')
    assert result.is_one_sentence, result.err
    assert 'data/sheep is damaged' in result.err

"""From the files of a dataset to batches: the only place that knows the order of the data.

A split is one long row of token ids, cut into windows of T = block_size: window i predicts the tokens i·T + 1 to
(i + 1)·T, each from those before it in the window. So every token but the first is the target of exactly one
window. The last window may be shorter; it is padded to the right with targets of IGNORE.

Training takes the windows in a new order each epoch. That order is a function of (seed, epoch), and a position in
it is one integer that counts windows since the start of the run: nothing else has to be saved to resume, and the
way a step is divided into micro-batches or over processes cannot change what it sees.
"""

import json
import os

import numpy as np
import torch

from tokenizer import load

IGNORE = -1  # the target of a position that does not count


class Dataset:
    """A prepared dataset, `data/NAME/`.

    meta: what prepare.py wrote in meta.json. tokenizer: a tiktoken.Encoding. train, val: memory-mapped ids.
    Raises FileNotFoundError, or ValueError for files that do not fit together.
    """

    def __init__(self, name, root='data'):
        self.name, self.folder = name, os.path.join(root, name)
        how = 'python prepare.py' + ('' if name == 'shakespeare' else f' --input=YOUR_TEXT --name={name}')
        for file in ('train.bin', 'val.bin', 'meta.json', 'tokenizer.json', 'tokenizer_config.json'):
            if not os.path.exists(os.path.join(self.folder, file)):
                raise FileNotFoundError(f'{self.folder} has no {file}. Make it with: {how}')
        try:
            with open(os.path.join(self.folder, 'meta.json'), encoding='utf-8') as file:
                self.meta = json.load(file)
            self.tokenizer = load(self.folder)
            self.vocab_size, self.end_of_text = int(self.meta['vocab_size']), self.meta['end_of_text']
            self.kind = self.meta['tokenizer']
            self.train, self.val = self._tokens('train'), self._tokens('val')
            if self.tokenizer.n_vocab != self.vocab_size:
                raise ValueError(f'the tokenizer has {self.tokenizer.n_vocab:,} tokens, meta.json {self.vocab_size:,}')
        except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError, OSError) as error:
            what = str(error) if isinstance(error, ValueError | OSError) else f'meta.json: {error!r}'
            raise ValueError(f'{self.folder} is damaged, make it again with: {how} ({what})') from None

    def _tokens(self, split):
        path = os.path.join(self.folder, f'{split}.bin')
        tokens = np.memmap(path, dtype=np.dtype(self.meta['dtype']).newbyteorder('<'), mode='r')
        expected = int(self.meta[split]['tokens'])
        if len(tokens) != expected or not 0 < self.bytes_per_token(split) < len(tokens) * 1e9:
            raise ValueError(f'{split}.bin has {len(tokens):,} tokens, meta.json says {expected:,}')
        highest = max(tokens[:1_000_000].max(), tokens[-1_000_000:].max())
        if highest >= self.vocab_size:
            raise ValueError(f'{split}.bin has the id {highest:,}, the vocabulary {self.vocab_size:,}')
        return tokens

    def fingerprint(self):
        """What tells this dataset from another of the same name: checksums of its splits."""
        return [self.meta[split].get('sha256') for split in ('train', 'val')]

    def bytes_per_token(self, split):
        return self.meta[split]['bytes'] / self.meta[split]['tokens']


def count_windows(tokens, block_size):
    return -(-(len(tokens) - 1) // block_size)


def windows(tokens, block_size, indices):
    """The windows of the given indices: inputs and targets, each (len(indices), block_size) int64.

    Past the end of the tokens, inputs are 0 and targets IGNORE.
    """
    x = np.zeros((len(indices), block_size), dtype=np.int64)
    y = np.full((len(indices), block_size), IGNORE, dtype=np.int64)
    for row, index in enumerate(indices):
        window = tokens[index * block_size : (index + 1) * block_size + 1]
        x[row, : max(0, len(window) - 1)] = window[:-1]
        y[row, : max(0, len(window) - 1)] = window[1:]
    return torch.from_numpy(x), torch.from_numpy(y)


def training_order(positions, n_windows, seed):
    """Which window stands at each position of the run: (n,) ints to (n,) ints, `n_windows` positions an epoch."""
    epochs, places = np.divmod(np.asarray(positions, dtype=np.uint64), np.uint64(n_windows))
    return shuffled(places, n_windows, seed, epochs).astype(np.int64)


def shuffled(places, n, seed, epochs):
    """Where each of `places` goes in a pseudo-random permutation of range(n), one for each (seed, epoch).

    A Feistel network over the smallest even number of bits that hold n, walked on until it falls below n
    (cycle walking; Black and Rogaway, 2002): any place of any epoch at once, with no table of n entries.
    Six rounds over fewer than 8 bits do not give every permutation the same chance, so there are 8 at least.
    """
    half = np.uint64(max(4, -(-int(n - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    keys = _mix(_mix(np.uint64(seed % 2**64) + np.zeros_like(epochs)) + epochs)
    out = np.array(places, dtype=np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for turn in range(6):
            left, right = right, left ^ (_mix(right + _mix(keys[todo] + np.uint64(turn))) & mask)
        out[todo] = left << half | right
        todo = todo[out[todo] >= n]
    return out


def _mix(x):
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014): uint64 to well-mixed uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

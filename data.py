"""From the files of a dataset to batches: the only place that knows the order of the data.

A split is one long row of token ids, cut into windows of T = block_size: window i predicts the tokens i·T + 1 to
(i + 1)·T, each from those before it in the window. So every token but the first is the target of exactly one
window. The last window may be shorter; it is padded to the right with targets of IGNORE. With a stride below T, for
training, window i starts at i·stride instead, and a token is the target of several.

Training takes the windows in a new order each epoch. That order is a function of (seed, epoch), and a position in
it is one integer that counts windows since the start of the run: nothing else has to be saved to resume, and the
way a step is divided into micro-batches or over processes cannot change what it sees.
"""

import hashlib
import json
import os
import tempfile

import numpy as np
import torch

from tokenizer import build, load, save

IGNORE = -1  # the target of a position that does not count


class Dataset:
    """A prepared dataset, `data/NAME/`; nanoGPT's own is taken over as it is.

    meta: what prepare.py wrote in meta.json. tokenizer: a tiktoken.Encoding. train, val: memory-mapped ids.
    verify: compare the checksums too, which reads the whole files.
    Raises FileNotFoundError, or ValueError for files that do not fit together.
    """

    def __init__(self, name, root='data', verify=False):
        self.name, self.folder = name, os.path.join(root, name)
        how = 'python prepare.py' + ('' if name == 'shakespeare' else f' --input=YOUR_TEXT --name={name}')
        there = os.listdir(self.folder) if os.path.isdir(self.folder) else ()
        if {'train.bin', 'val.bin'} <= set(there) and 'meta.json' not in there:
            if 'meta.pkl' in there:
                raise ValueError(f"{self.folder} has nanoGPT's meta.pkl, which is not read. Make it again with: {how}")
            there = adopt(self.folder)
        for file in ('train.bin', 'val.bin', 'meta.json', 'tokenizer.json', 'tokenizer_config.json'):
            if file not in there:
                raise FileNotFoundError(f'{self.folder} has no {file}. Make it with: {how}')
        try:
            with open(os.path.join(self.folder, 'meta.json'), encoding='utf-8') as file:
                self.meta = json.load(file)
            self.tokenizer = load(self.folder)
            self.vocab_size, self.end_of_text = int(self.meta['vocab_size']), self.meta['end_of_text']
            self.kind = self.meta['tokenizer']
            self.train, self.val = self._tokens('train', verify), self._tokens('val', verify)
            if self.tokenizer.n_vocab != self.vocab_size:
                raise ValueError(f'the tokenizer has {self.tokenizer.n_vocab:,} tokens, meta.json {self.vocab_size:,}')
        except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError, OSError) as error:
            what = str(error) if isinstance(error, ValueError | OSError) else f'meta.json: {error!r}'
            raise ValueError(f'{self.folder} is damaged, make it again with: {how} ({what})') from None

    def _tokens(self, split, verify):
        path, meta = os.path.join(self.folder, f'{split}.bin'), self.meta[split]
        tokens = np.memmap(path, dtype=np.dtype(self.meta['dtype']).newbyteorder('<'), mode='r')
        expected = int(meta['tokens'])
        if len(tokens) != expected or not 0 < self.bytes_per_token(split) < len(tokens) * 1e9:
            raise ValueError(f'{split}.bin has {len(tokens):,} tokens, meta.json says {expected:,}')
        highest = max(tokens[:1_000_000].max(), tokens[-1_000_000:].max(), meta.get('highest', 0))
        if highest >= self.vocab_size:
            raise ValueError(f'{split}.bin has the id {highest:,}, the vocabulary {self.vocab_size:,}')
        if verify:
            with open(path, 'rb') as file:
                if hashlib.file_digest(file, 'sha256').hexdigest() != meta['sha256']:
                    raise ValueError(f'the checksum of {split}.bin is not the one in meta.json')
        return tokens

    def fingerprint(self):
        """What tells this dataset from another of the same name: checksums of its splits."""
        return [self.meta[split].get('sha256') for split in ('train', 'val')]

    def bytes_per_token(self, split):
        return self.meta[split]['bytes'] / self.meta[split]['tokens']


def adopt(folder):
    """Add to nanoGPT's train.bin and val.bin, uint16 ids of GPT-2's tokens, what they lack. Returns all file names.

    Raises ValueError for ids of something else. Processes of one run may all do this at the same time.
    """
    print(f"{folder} has no meta.json: taken as nanoGPT's, uint16 tokens of GPT-2. It is read once to write one.")
    tokenizer = build('gpt2')
    meta = {'format': 1, 'source': ['nanoGPT'], 'dtype': 'uint16', 'tokenizer': 'gpt2', 'vocab_size': tokenizer.n_vocab}
    meta['end_of_text'] = tokenizer.eot_token
    lengths = np.zeros(2**16, dtype=np.int64)  # end-of-text stands for no byte
    lengths[: tokenizer.eot_token] = [len(tokenizer.decode_single_token_bytes(i)) for i in range(tokenizer.eot_token)]
    for split in ('train', 'val'):
        counts, digest, path = np.zeros(2**16, dtype=np.int64), hashlib.sha256(), os.path.join(folder, f'{split}.bin')
        size = os.path.getsize(path)
        tokens = np.memmap(path, dtype='<u2', mode='r') if size and size % 2 == 0 else []
        for start in range(0, len(tokens), 2**24):
            counts += np.bincount(tokens[start : start + 2**24], minlength=2**16)
            digest.update(tokens[start : start + 2**24])
        if not counts[: tokenizer.eot_token].any() or counts[tokenizer.n_vocab :].any():
            raise ValueError(f"{path} does not hold GPT-2's tokens, 16 bits each: prepare the text again.")
        meta[split] = {'tokens': len(tokens), 'bytes': int(counts @ lengths), 'highest': int(counts.nonzero()[0].max())}
        meta[split] |= {'documents': int(counts[tokenizer.eot_token]), 'sha256': digest.hexdigest()}
    if os.path.exists(os.path.join(folder, 'tokenizer.json')) and load(folder).n_vocab != tokenizer.n_vocab:
        raise ValueError(f"{folder} has no meta.json, and its tokenizer is not GPT-2's: prepare the text again.")
    with tempfile.TemporaryDirectory(prefix='.meta-', dir=folder) as temporary:
        save(tokenizer, temporary)
        with open(os.path.join(temporary, 'meta.json'), 'w', encoding='utf-8') as file:
            json.dump(meta, file, indent=1)
        for name in ('tokenizer.json', 'tokenizer_config.json', 'meta.json'):  # with the last it is complete
            os.replace(os.path.join(temporary, name), os.path.join(folder, name))
    return os.listdir(folder)


def count_windows(tokens, block_size, stride=None):
    """How many windows make an epoch: every target is in one at least. stride: from window to window, in tokens."""
    stride = stride or block_size
    return 1 + max(0, -(-(len(tokens) - 1 - block_size) // stride))


def windows(tokens, block_size, indices, stride=None):
    """The windows of the given indices: inputs and targets, each (len(indices), block_size) int64.

    Past the end of the tokens, inputs are 0 and targets IGNORE.
    """
    x = np.zeros((len(indices), block_size), dtype=np.int64)
    y = np.full((len(indices), block_size), IGNORE, dtype=np.int64)
    for row, index in enumerate(indices):
        start = index * (stride or block_size)
        window = tokens[start : start + block_size + 1]
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
    keys = _mix(keys + np.arange(6, dtype=np.uint64)[:, None])  # (rounds, n)
    out = np.array(places, dtype=np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for key in keys[:, todo]:
            left, right = right, left ^ (_mix(right + key) & mask)
        out[todo] = left << half | right
        todo = todo[out[todo] >= n]
    return out


def _mix(x):
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014): uint64 to well-mixed uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

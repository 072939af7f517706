"""From the files of a dataset to batches: the only place that knows the order of the data.

A split is one long row of token ids, cut into windows of T = block_size: window i predicts the
tokens i·T + 1 to (i + 1)·T, each from those before it in the window. So every token but the first
is the target of exactly one window. The last window may be shorter; it is padded on the right, with
targets of IGNORE. With a stride below T, for training, window i starts at i·stride instead, and a
token is the target of several windows.

Training takes the windows in a new order each epoch. That order is a function of (seed, epoch), and
a position in it is one integer that counts the windows since the start of the run. Nothing else has
to be saved to resume, and how a step is divided into micro-batches or over processes cannot change
what it sees.
"""

import hashlib
import json
import os
import tempfile

import numpy as np
import torch

import tokenizer as tokenizers
from model import IGNORE, PUBLISHED
from runtime import UserError

ROUNDS = 6  # of the network that shuffles
FILES = ('train.bin', 'val.bin', 'meta.json', 'tokenizer.json', 'tokenizer_config.json')

# -----------------------------------------------------------------------------
# a prepared dataset


class Dataset:
    """A prepared dataset, `data/NAME/`, or nanoGPT's train.bin and val.bin as they are.

    train, val: memory-mapped token ids. tokenizer: see tokenizer.py. meta: what prepare.py wrote in
    meta.json. verify: compare the checksums, too, which reads all of the files.
    Raises UserError for files that are missing or do not fit together.
    """

    def __init__(self, name, root='data', verify=False):
        self.folder = os.path.join(root, name)
        command = 'python prepare.py'
        if name != 'shakespeare':
            command += f' --input=YOUR_TEXT --name={name}'

        existing = list_folder(self.folder)
        if {'train.bin', 'val.bin'} <= existing and 'meta.json' not in existing:
            if 'meta.pkl' in existing:
                what = f"{self.folder} has nanoGPT's meta.pkl, which is not read"
                raise UserError(f'{what}. Prepare the text again with: {command}')
            import_nanogpt(self.folder)
            existing = list_folder(self.folder)
        for file in FILES:
            if file not in existing:
                raise UserError(f'{self.folder} has no {file}. Make it with: {command}')

        try:
            self.load(verify)
        except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError, OSError) as error:
            has_words = isinstance(error, ValueError | OSError)  # a KeyError's text is a key
            reason = str(error) if has_words else f'meta.json: {error!r}'
            how = f'make it again with: {command} ({reason})'
            raise UserError(f'{self.folder} is damaged, {how}') from None

    def load(self, verify):
        with open(os.path.join(self.folder, 'meta.json'), encoding='utf-8') as file:
            self.meta = json.load(file)
        self.tokenizer = tokenizers.load(self.folder, {'eos': self.meta['end_of_text']})
        self.kind = self.meta['tokenizer']
        self.vocab_size = int(self.meta['vocab_size'])
        self.end_of_text = self.meta['end_of_text']
        if self.tokenizer.n_vocab != self.vocab_size:
            n = self.tokenizer.n_vocab
            raise UserError(f'the tokenizer has {n:,} tokens, meta.json {self.vocab_size:,}')
        self.train = self.open_split('train', verify)
        self.val = self.open_split('val', verify)

    def open_split(self, split, verify):
        path = os.path.join(self.folder, f'{split}.bin')
        meta = self.meta[split]
        tokens = np.memmap(path, dtype=np.dtype(self.meta['dtype']).newbyteorder('<'), mode='r')
        expected = int(meta['tokens'])
        if len(tokens) != expected:
            raise UserError(f'{split}.bin has {len(tokens):,} tokens, meta.json says {expected:,}')
        if not 0 < meta['bytes'] < 1e9 * len(tokens):  # NaN and infinity are not, either
            raise UserError(f'meta.json has {meta["bytes"]!r} bytes for {split}')

        # Reading all of a large file takes minutes: meta.json's `highest` is trusted for the rest.
        both_ends = np.concatenate((tokens[:1_000_000], tokens[-1_000_000:]))
        highest = max(int(both_ends.max()), meta.get('highest', 0))
        if highest >= self.vocab_size:
            raise UserError(f'{split}.bin has id {highest:,}, the vocabulary {self.vocab_size:,}')
        if verify:
            with open(path, 'rb') as file:
                if hashlib.file_digest(file, 'sha256').hexdigest() != meta['sha256']:
                    raise UserError(f'the checksum of {split}.bin is not the one in meta.json')
        return tokens

    def check_length(self, block_size):
        """Raise UserError unless the training split has a whole window."""
        if len(self.train) <= block_size:
            what = f'The training split of {self.folder} has {len(self.train):,} tokens, fewer than'
            window = f'one window of block_size={block_size} and its target'
            raise UserError(f'{what} {window}: prepare more text or choose a smaller block_size.')

    def check_vocabulary(self, tokenizer, vocab_size, source):
        """Raise UserError unless a model, `source`, has this vocabulary, by its tokenizer.

        vocab_size: of the model, which may have a few tokens more to round the number up.
        """
        is_same = tokenizers.same_vocabulary(tokenizer, self.tokenizer)
        # A tokenizer may have tokens that the model has not, such as one for padding.
        highest = max(self.meta[key].get('highest', 0) for key in ('train', 'val'))
        if not is_same:
            name = 'gpt2' if source in PUBLISHED else source
            what = f'The model {source} has a vocabulary of {tokenizer.n_vocab:,} tokens'
            other = f'{self.folder} another one of {self.vocab_size:,}'
            raise UserError(f'{what}, {other}: prepare the text with --tokenizer={name}')
        if highest >= vocab_size:
            token = tokenizer.decode([highest])
            what = f'{self.folder} has the token {token!r}, which the model {source} lacks'
            raise UserError(f'{what}: take it out of the text, and prepare it again.')

    def fingerprint(self):
        """The checksums of both splits, by which a run recognizes its text when it resumes."""
        return [self.meta[split].get('sha256') for split in ('train', 'val')]

    def bytes_per_token(self, split):
        return self.meta[split]['bytes'] / self.meta[split]['tokens']


def list_folder(path):
    return set(os.listdir(path)) if os.path.isdir(path) else set()


def import_nanogpt(folder):
    """Write the meta.json and the tokenizer that nanoGPT's train.bin and val.bin lack.

    Raises UserError for ids of something else. Several processes may do this at the same time.
    """
    print(f"{folder} has no meta.json: assuming nanoGPT's format, GPT-2's ids; writing one.")
    tokenizer = tokenizers.build('gpt2')
    meta = {'format': 1, 'source': ['nanoGPT'], 'dtype': 'uint16', 'tokenizer': 'gpt2'}
    meta['vocab_size'] = tokenizer.n_vocab
    meta['end_of_text'] = tokenizer.end_of_text
    for split in ('train', 'val'):
        meta[split] = describe_gpt2_tokens(os.path.join(folder, f'{split}.bin'), tokenizer)
    has_tokenizer = 'tokenizer.json' in list_folder(folder)
    if has_tokenizer and tokenizers.load(folder).n_vocab != tokenizer.n_vocab:
        what = f"{folder} has no meta.json, and its tokenizer is not GPT-2's"
        raise UserError(f'{what}: prepare the text again.')

    # Renamed into place, meta.json last: with it the dataset is complete.
    with tempfile.TemporaryDirectory(prefix='.meta-', dir=folder) as temporary:
        tokenizers.save(tokenizer, temporary)
        with open(os.path.join(temporary, 'meta.json'), 'w', encoding='utf-8') as file:
            json.dump(meta, file, indent=1)
        for name in ('tokenizer.json', 'tokenizer_config.json', 'meta.json'):
            os.replace(os.path.join(temporary, name), os.path.join(folder, name))


def describe_gpt2_tokens(path, tokenizer):
    """What meta.json says of a split, from its ids. Raises UserError unless they are GPT-2's."""
    size = os.path.getsize(path)
    tokens = np.memmap(path, dtype='<u2', mode='r') if size > 0 and size % 2 == 0 else []
    counts = np.zeros(2**16, dtype=np.int64)  # of each id
    digest = hashlib.sha256()
    for start in range(0, len(tokens), 2**24):
        part = tokens[start : start + 2**24]
        counts += np.bincount(part, minlength=2**16)
        digest.update(part)

    end_of_text = tokenizer.end_of_text  # the last id; it stands for no bytes
    if not counts[:end_of_text].any() or counts[tokenizer.n_vocab :].any():
        what = "GPT-2's tokens, 16 bits each"
        raise UserError(f'{path} does not hold {what}: prepare the text again.')
    n_bytes = [len(token) for token in sorted(tokenizer.ranks, key=tokenizer.ranks.get)]
    return {
        'tokens': len(tokens),
        'bytes': int(counts[:end_of_text] @ np.array(n_bytes)),
        'highest': int(counts.nonzero()[0].max()),
        'documents': int(counts[end_of_text]),
        'sha256': digest.hexdigest(),
    }


# -----------------------------------------------------------------------------
# windows of a split


def count_windows(tokens, block_size, stride=None):
    """The number of windows per epoch. stride: between windows, in tokens; None: block_size."""
    stride = stride or block_size
    n_targets = len(tokens) - 1
    after_the_first = max(0, n_targets - block_size)
    return 1 + (after_the_first + stride - 1) // stride


def get_batch(tokens, block_size, window_ids, stride=None):
    """The windows of these ids: inputs and targets, each (len(window_ids), T) int64.

    T is block_size, or less where all the tokens are less. Past the end of the tokens, inputs are 0
    and targets IGNORE.
    """
    stride = stride or block_size
    T = min(block_size, len(tokens) - 1)
    x = np.zeros((len(window_ids), T), dtype=np.int64)
    y = np.full((len(window_ids), T), IGNORE, dtype=np.int64)
    for row, window_id in enumerate(window_ids):
        start = window_id * stride
        window = tokens[start : start + block_size + 1]
        n = max(0, len(window) - 1)
        x[row, :n] = window[:-1]
        y[row, :n] = window[1:]
    return torch.from_numpy(x), torch.from_numpy(y)


def count_targets(tokens, block_size, window_ids, stride=None):
    """How many targets these windows have, without the padding of the last one."""
    starts = np.asarray(window_ids) * (stride or block_size)
    n_targets = (len(tokens) - 1 - starts).clip(0, block_size)
    return int(n_targets.sum())


# -----------------------------------------------------------------------------
# their order, and the other things that are random in a step


def training_order(first, count, n_windows, seed):
    """The ids of the windows at positions first to first + count - 1 of a run, (count,) int64.

    There are n_windows positions per epoch; each epoch has an order of its own.
    """
    positions = np.arange(first, first + count, dtype=np.uint64)
    epochs, places = np.divmod(positions, np.uint64(n_windows))
    return shuffled(places, n_windows, seed, epochs).astype(np.int64)


def micro_step_seed(seed, step, micro_step):
    """The seed of what is random in a micro-step, which is dropout.

    It does not depend on the process, so for any number of them the masks are the same.
    """
    return int(np.random.SeedSequence((seed, step, micro_step)).generate_state(1)[0])


def shuffled(places, n, seed, epochs):
    """Where each of `places` goes in a random permutation of range(n), one per (seed, epoch).

    numpy's permutation would be a table of n entries, made again for each epoch and each resume;
    this computes any place of any epoch by itself. It is a Feistel network over the smallest even
    number of bits that can hold n - 1: like a cipher, it maps numbers of so many bits one to one. A
    result that is not below n is mapped again (cycle walking; Black and Rogaway, 2002). Over fewer
    than 8 bits, six rounds are visibly not random, so at least 8 bits are used.
    """
    n_bits = int(n - 1).bit_length()
    half_bits = np.uint64(max(4, (n_bits + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    # As an array: its overflow wraps without a word, that of a scalar warns.
    seeds = np.full_like(epochs, seed % 2**64)
    keys = _mix(_mix(seeds) + epochs)
    keys = _mix(keys + np.arange(ROUNDS, dtype=np.uint64)[:, None])  # (ROUNDS, len(places))
    out = np.array(places, dtype=np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left = out[todo] >> half_bits
        right = out[todo] & mask
        for key in keys[:, todo]:  # one round: (left, right) -> (right, left ^ f(right))
            mixed = left ^ (_mix(right + key) & mask)
            left, right = right, mixed
        out[todo] = left << half_bits | right
        todo = todo[out[todo] >= n]
    return out


def _mix(x):
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014): uint64 to well-mixed uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

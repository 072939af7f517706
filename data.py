"""From the files of a dataset to batches: the only place that knows the order of the data.

A split is one long row of token ids, cut into windows of T = block_size: window i predicts the
tokens i·T + 1 to (i + 1)·T, each from those before it in the window. So every token but the first
is the target of exactly one window. The last window may be shorter; it is padded on the right, with
targets of IGNORE. With a stride below T, for training, window i starts at i·stride instead, and a
token is the target of several windows.

Training takes the windows in a new order each epoch, and from the second epoch on they begin
elsewhere. Both follow from (seed, epoch), and a position is one integer that counts the windows
since the start of the run. Nothing else has to be saved to resume, and how a step is divided into
micro-batches or over processes cannot change what it sees.

A run may have several datasets, each with a share of its windows. Which of them has the window at a
position follows from the shares alone, so all of the above is true of a mixture as well.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

import tokenizer as tokenizers
from model import IGNORE, PUBLISHED
from runtime import UserError
from tokens import SPLITS, checksum, in_parts, open_tokens, split_files

ROUNDS = 6  # of the network that shuffles
# Files of llm.c and modded-nanogpt begin with 256 int32: magic number, version, number of tokens,
# and zeros. GPT-2's ids follow, 16 bits each.
MAGIC = 20240520
LLAMA3_MAGIC = 20240801  # the same with Llama 3's ids, 32 bits each
HEADER_BYTES = 1024

# -----------------------------------------------------------------------------
# a prepared dataset


class Dataset:
    """A prepared dataset, `data/NAME/`, or a folder of GPT-2's tokens as others write them.

    train, val: memory-mapped token ids, see open_tokens. tokenizer: see tokenizer.py. meta: what
    prepare.py, or import_tokens, wrote in meta.json. verify: compare the checksums, too, which
    reads all of the files. Raises UserError for files that are missing or do not fit together.
    """

    def __init__(self, name, root='data', verify=False):
        self.folder = dataset_folder(name, root)
        command = 'python prepare.py'
        if name != 'shakespeare':
            command += f' --input=YOUR_TEXT --name={name}'

        imported = None  # what describes tokens that others have made
        if 'meta.json' not in list_folder(self.folder):
            imported = import_tokens(self.folder, command)
        try:
            self.meta, self.tokenizer = imported or read_description(self.folder)
            self.load(verify)
            list(map(Path, filter(None, self.meta.get('source') or [])))  # names, for model cards
        except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError, OSError) as error:
            has_words = isinstance(error, ValueError | OSError)  # a KeyError's text is a key
            reason = str(error) if has_words else f'meta.json: {error!r}'
            how = f'make it again with: {command} ({reason})'
            raise UserError(f'{self.folder} is damaged, {how}') from None
        if 'header_bytes' in self.meta:
            known = [name for split in SPLITS for name in split_files(self.meta, split)]
            found = [name for names in find_token_files(self.folder).values() for name in names]
            if set(found) - set(known):
                print(f'Note: {self.folder} has new files: delete its meta.json to take them in.')

    def load(self, verify):
        self.kind = self.meta['tokenizer']
        self.vocab_size = int(self.meta['vocab_size'])
        if self.tokenizer.n_vocab != self.vocab_size:
            n = self.tokenizer.n_vocab
            raise UserError(f'the tokenizer has {n:,} tokens, meta.json {self.vocab_size:,}')
        self.train = self.open_split('train', verify)
        self.val = self.open_split('val', verify)

    def open_split(self, split, verify):
        meta = self.meta[split]
        expected = int(meta['tokens'])
        files = split_files(self.meta, split)
        existing = list_folder(self.folder)
        for file in files:  # whoever wrote meta.json, a file of the list is inside the folder
            if file not in existing:
                raise UserError(f'there is no {file}')
        name = files[0] if len(files) == 1 else f'the {split} split'
        paths = [os.path.join(self.folder, file) for file in files]
        dtype = np.dtype(self.meta['dtype']).newbyteorder('<')
        tokens = open_tokens(paths, dtype, self.meta.get('header_bytes', 0))
        if len(tokens) != expected:
            raise UserError(f'{name} has {len(tokens):,} tokens, meta.json says {expected:,}')
        if not 0 < meta['bytes'] < 1e9 * len(tokens):  # NaN and infinity are not, either
            raise UserError(f'meta.json has {meta["bytes"]!r} bytes for {split}')

        # Reading all of a large file takes minutes: meta.json's `highest` is trusted for the rest.
        both_ends = np.concatenate((tokens[:1_000_000], tokens[-1_000_000:]))
        highest = max(int(both_ends.max()), meta.get('highest', 0))
        if highest >= self.vocab_size:
            raise UserError(f'{name} has id {highest:,}, the vocabulary {self.vocab_size:,}')
        if verify and checksum(tokens) != meta['sha256']:
            raise UserError(f'the checksum of {name} is not the one in meta.json')
        return tokens

    def describe(self):
        size = f'train {len(self.train):,} tokens, val {len(self.val):,}'
        return f'{self.folder}: {size}; {self.kind} {self.vocab_size:,}'

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
        # A tokenizer may have tokens that the model has not, such as one for padding.
        highest = max(self.meta[split].get('highest', 0) for split in SPLITS)
        if tokenizer.vocabulary() != self.tokenizer.vocabulary():
            name = 'gpt2' if source in PUBLISHED else source
            what = f'The model {source} has a vocabulary of {tokenizer.n_vocab:,} tokens'
            other = f'{self.folder} another one of {self.vocab_size:,}'
            raise UserError(f'{what}, {other}: prepare the text with --tokenizer={name}')
        if highest >= vocab_size:
            token = tokenizer.decode([highest])
            what = f'{self.folder} has the token {token!r}, which the model {source} lacks'
            raise UserError(f'{what}: take it out of the text, and prepare it again.')

    def pick_prompt(self):
        """Return a line end or, where no token of the text is one, how the text begins."""
        with contextlib.suppress(UserError):  # the vocabulary lacks it
            if np.isin(self.tokenizer.encode('\n'), self.train[: 10**6]).all():
                return '\n'
        return self.tokenizer.decode(self.train[:4].tolist())

    def fingerprint(self):
        """The checksums of both splits, by which a run recognizes its text when it resumes."""
        return [self.meta[split].get('sha256') for split in SPLITS]

    def bytes_per_token(self, split):
        return self.meta[split]['bytes'] / self.meta[split]['tokens']


def dataset_folder(name, root='data'):
    return os.path.join(root, os.path.expanduser(name))


def list_folder(path):
    return set(os.listdir(path)) if os.path.isdir(path) else set()


def read_description(folder):
    """Read the meta.json and the tokenizer of a prepared dataset."""
    with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
        meta = json.load(file)
    return meta, tokenizers.load(folder, {'eos': meta['end_of_text']})


# -----------------------------------------------------------------------------
# tokens that others have made


def find_token_files(folder):
    """{'train': names, 'val': names}: the .bin files with that word in the name, in order."""
    names = sorted(name for name in list_folder(folder) if name.endswith('.bin'))
    found = {}
    for split in SPLITS:
        found[split] = [name for name in names if split in re.split('[._-]', name)]
        if f'{split}.bin' in names:
            found[split] = [f'{split}.bin']
    return found


def import_tokens(folder, command):
    """Describe the GPT-2 tokens of nanoGPT or llm.c in a folder: (meta, tokenizer).

    Both are written there, too, unless it cannot be written to. command: makes a dataset.
    Raises UserError for files of something else. Several processes may do this at the same time.
    """
    files = find_token_files(folder)
    missing = [split for split in SPLITS if not files[split]]
    if len(missing) == 2:
        raise UserError(f'{folder} has no train.bin. Make it with: {command}')
    if missing:
        what = f'{folder} has .bin files, but none with {missing[0]} in its name'
        raise UserError(f'{what}: add one, or rename one of several.')
    if 'meta.pkl' in list_folder(folder):
        what = f"{folder} has nanoGPT's meta.pkl, which is not read"
        raise UserError(f'{what}. Prepare the text again with: {command} --tokenizer=char')
    headers = {has_header(os.path.join(folder, name)) for name in files['train'] + files['val']}
    if len(headers) == 2:
        raise UserError(f"Only some files of {folder} have llm.c's header: separate them.")

    is_llm_c = headers == {True}
    source = 'llm.c' if is_llm_c else 'nanoGPT'
    print(f"{folder} has no meta.json: assuming {source}'s format, GPT-2's ids; writing one.")
    tokenizer = tokenizers.build('gpt2')
    meta = {'format': 1, 'source': [source], 'dtype': 'uint16', 'tokenizer': 'gpt2'}
    meta['vocab_size'] = tokenizer.n_vocab
    meta['end_of_text'] = tokenizer.end_of_text
    if is_llm_c:
        meta['header_bytes'] = HEADER_BYTES
    for split in SPLITS:
        paths = [os.path.join(folder, name) for name in files[split]]
        meta[split] = describe_gpt2_tokens(paths, tokenizer, meta.get('header_bytes', 0))
        if files[split] != [f'{split}.bin']:
            meta[split]['files'] = files[split]
    has_tokenizer = 'tokenizer.json' in list_folder(folder)
    if has_tokenizer and tokenizers.load(folder).n_vocab != tokenizer.n_vocab:
        what = f"{folder} has no meta.json, and its tokenizer is not GPT-2's"
        raise UserError(f'{what}: prepare the text again.')
    try:
        write_description(folder, meta, tokenizer)
    except OSError as error:
        print(f'It could not be written ({error.strerror}): each run will make its own, in memory.')
    return meta, tokenizer


def has_header(path):
    """Whether a file has llm.c's header. Raises UserError for one of another kind or a short file.

    No text has as many zeros as any header of theirs: id 0 is an exclamation mark.
    """
    header = np.fromfile(path, dtype='<i4', count=256)
    if len(header) < 256 or (header[0] != MAGIC and header[3:].any()):
        return False
    magic, version, n_tokens = header[:3].tolist()
    if (magic, version) != (MAGIC, 1):
        kind = f'magic number {magic} and version {version}'
        if magic == LLAMA3_MAGIC:
            kind = "Llama 3's ids"
        raise UserError(f"{path} has {kind}: only llm.c's GPT-2 ids ({MAGIC}, 1) can be used.")
    if os.path.getsize(path) != HEADER_BYTES + 2 * n_tokens:
        what = f'{path} does not have the {n_tokens:,} ids that its header says'
        raise UserError(f'{what}: get it again.')
    return True


def describe_gpt2_tokens(paths, tokenizer, header_bytes):
    """What meta.json says of a split, from its ids. Raises UserError unless they are GPT-2's."""
    end_of_text = tokenizer.end_of_text  # the last id; it stands for no bytes
    counts = np.zeros(2**16, dtype=np.int64)  # of each id
    digest = hashlib.sha256()
    for path in paths:
        size = os.path.getsize(path)
        can_be_mapped = size > header_bytes and size % 2 == 0
        tokens = open_tokens([path], '<u2', header_bytes) if can_be_mapped else []
        for part in in_parts(tokens):
            counts += np.bincount(part, minlength=2**16)
            digest.update(part)
        is_gpt2 = counts[:end_of_text].any() and not counts[tokenizer.n_vocab :].any()
        if not can_be_mapped or not is_gpt2:
            what = "GPT-2's tokens, 16 bits each"
            raise UserError(f'{path} does not hold {what}: prepare the text again.')

    n_bytes = [len(token) for token in sorted(tokenizer.ranks, key=tokenizer.ranks.get)]
    return {
        'tokens': int(counts.sum()),
        'bytes': int(counts[:end_of_text] @ np.array(n_bytes)),
        'highest': int(counts.nonzero()[0].max()),
        'documents': int(counts[end_of_text]),
        'sha256': digest.hexdigest(),
    }


def write_description(folder, meta, tokenizer):
    """Write meta.json and a tokenizer. Renamed into place, meta.json last: with it all is there."""
    with tempfile.TemporaryDirectory(prefix='.meta-', dir=folder) as temporary:
        tokenizers.save(tokenizer, temporary)
        with open(os.path.join(temporary, 'meta.json'), 'w', encoding='utf-8') as file:
            json.dump(meta, file, indent=1)
        for name in ('tokenizer.json', 'tokenizer_config.json', 'meta.json'):
            os.replace(os.path.join(temporary, name), os.path.join(folder, name))


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

    T is block_size, or less where all the tokens are less.
    """
    return read_windows(tokens, block_size, np.asarray(window_ids) * (stride or block_size))


def read_windows(tokens, block_size, starts):
    """The windows that begin at these places: inputs and targets, each (len(starts), T) int64.

    Padded on the right is what lies before the first token, where a start is below 0, or past the
    last: inputs are 0 there and targets IGNORE.
    """
    T = min(block_size, len(tokens) - 1)
    x = np.zeros((len(starts), T), dtype=np.int64)
    y = np.full((len(starts), T), IGNORE, dtype=np.int64)
    for row, start in enumerate(starts):
        window = tokens[max(0, start) : start + block_size + 1]
        n = max(0, len(window) - 1)
        x[row, :n] = window[:-1]
        y[row, :n] = window[1:]
    return torch.from_numpy(x), torch.from_numpy(y)


def count_targets(tokens, block_size, starts):
    """How many targets the windows have that begin at these places, without padding."""
    starts = np.asarray(starts)
    ends = (starts + block_size).clip(0, len(tokens) - 1)
    return int((ends - starts.clip(0, len(tokens) - 1)).sum())


# -----------------------------------------------------------------------------
# their order, and the other things that are random in a step


def training_order(first, count, n_windows, seed):
    """The ids of the windows at positions first to first + count - 1 of a run, (count,) int64.

    There are n_windows positions per epoch; each epoch has an order of its own.
    """
    positions = np.arange(first, first + count, dtype=np.uint64)
    epochs, places = np.divmod(positions, np.uint64(n_windows))
    return shuffled(places, n_windows, seed, epochs).astype(np.int64)


def training_starts(first, count, n_windows, stride, seed):
    """Where the windows at positions first to first + count - 1 of a run begin, (count,) int64.

    From the second epoch on, all windows of an epoch are moved to the left, by less than a stride,
    so that a model does not see the same windows again. The first window then begins below 0, and
    is short; fewer tokens than a stride, at the end, have no window.
    """
    starts = training_order(first, count, n_windows, seed) * stride
    epochs = np.arange(first, first + count, dtype=np.uint64) // np.uint64(n_windows)
    seeds = np.full_like(epochs, (seed + 1) % 2**64)  # another than that of the order
    shifts = _mix(_mix(seeds) + epochs) % np.uint64(stride)
    is_moved = (epochs > 0) & (n_windows > 1)
    return starts - np.where(is_moved, shifts, np.uint64(0)).astype(np.int64)


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


# -----------------------------------------------------------------------------
# several datasets


class Mixture:
    """The datasets of a run, each with a share of its training windows; often it is only one.

    text: 'a', or several with their weights, 'a:0.7,b:0.3'. block_size, stride, seed: of the
    windows of training. names, shares (Fractions that sum to 1), datasets (see Dataset) and
    n_windows (per epoch) are lists, that with the largest share first. tokenizer: of all of them.
    Raises UserError for datasets that cannot be used, or not together.
    """

    def __init__(self, text, block_size, stride=None, seed=0, root='data', verify=False):
        self.block_size = block_size
        self.stride = stride or block_size
        self.seed = seed
        self.names, self.shares = parse_mixture(text, root)
        self.datasets = [Dataset(name, root, verify) for name in self.names]
        for each in self.datasets:
            each.check_length(block_size)
        self.n_windows = [count_windows(each.train, block_size, stride) for each in self.datasets]
        self.folder = ' + '.join(each.folder for each in self.datasets)
        first, *others = self.datasets
        self.tokenizer = first.tokenizer
        for other in others:
            if first.tokenizer.vocabulary() != other.tokenizer.vocabulary():
                what = f'{first.folder} and {other.folder} have different vocabularies'
                raise UserError(f'{what}: prepare the other with --tokenizer={first.folder}.')

    def describe(self):
        """The datasets, a line for each, as the terminal shows them."""
        return '\n        '.join(each.describe() for each in self.datasets)

    def card(self):
        """What a model card says of each dataset: a list of dictionaries."""
        rows = []
        for name, share, each in zip(self.names, self.shares, self.datasets, strict=True):
            splits = {split: each.meta[split] for split in SPLITS}
            row = {'name': name, 'share': float(share), 'source': each.meta.get('source') or []}
            rows.append(row | splits | {'prompt': each.pick_prompt()})
        return rows

    def fingerprint(self):
        """By which a run recognizes its text, and what its positions mean: checksums and shares."""
        checksums = [each.fingerprint() for each in self.datasets]
        if len(checksums) == 1:
            return checksums[0]
        return [*map(str, self.shares), *checksums]

    def bytes_per_token(self, split):
        metas = [each.meta[split] for each in self.datasets]
        return sum(meta['bytes'] for meta in metas) / sum(meta['tokens'] for meta in metas)

    def epochs(self, n):
        """How often n windows go through each dataset, as a text: '1.95', '0.31 and 2.09'."""
        pairs = zip(self.shares, self.n_windows, strict=True)
        return ' and '.join(f'{float(n * share / n_windows):,.2f}' for share, n_windows in pairs)

    def steps(self, epochs, windows_per_step):
        """In how many steps the dataset with the largest share is gone through so often."""
        n_windows = epochs * self.n_windows[0] / float(self.shares[0])
        return max(1, round(n_windows / windows_per_step))

    def training_windows(self, first, count):
        """The windows at positions first to first + count - 1 of a run, (count, 2) int64.

        Each row is the number of a dataset and where the window begins in its training split. Of
        the first p positions the first dataset has floor(p * share); the others divide what is left
        in the same way. So of any first p positions each of two datasets has its share to within
        one window. Of more, none is a whole window short, and the i-th is less than 1 + 1/2 + ...
        + 1/(i - 1) windows ahead, as the largest share comes first. Each has its own order.
        """
        windows = np.empty((count, 2), dtype=np.int64)
        rows = np.arange(count)  # of the positions that are left
        share_left = Fraction(1)
        for number, share in enumerate(self.shares):
            # How many of the windows before each position, and before the end, are this dataset's.
            # They are objects, Python's integers, which do not overflow.
            ratio = share / share_left
            positions = np.arange(first, first + len(rows) + 1).astype(object)
            before = positions * ratio.numerator // ratio.denominator
            taken = before[1:] > before[:-1]

            n_windows = self.n_windows[number]
            windows[rows[taken], 0] = number
            windows[rows[taken], 1] = training_starts(
                before[0], taken.sum(), n_windows, self.stride, self.seed
            )
            rows = rows[~taken]
            first -= before[0]
            share_left -= share
        return windows

    def get_batch(self, windows):
        """Inputs and targets of rows of training_windows(), each (len(windows), T) int64."""
        x = torch.empty(len(windows), self.block_size, dtype=torch.int64)
        y = torch.empty_like(x)
        for number, each in enumerate(self.datasets):
            rows = windows[:, 0] == number
            x[rows], y[rows] = read_windows(each.train, self.block_size, windows[rows, 1])
        return x, y

    def count_targets(self, windows):
        """How many targets rows of training_windows() have, without padding."""
        n_targets = 0
        for number, each in enumerate(self.datasets):
            starts = windows[windows[:, 0] == number, 1]
            n_targets += count_targets(each.train, self.block_size, starts)
        return n_targets


def parse_mixture(text, root='data'):
    """Read 'a:0.7,b:0.3' as names and shares, largest first; 'a', one name, has a share of 1.

    A share is a Fraction, from the weights as they are written: nothing depends on rounding.
    Raises UserError for a weight that is missing or not above 0, and for a name given twice.
    """
    is_name = ',' not in text and ':' not in text
    if is_name or os.path.isdir(dataset_folder(text, root)):  # a folder may have these, too
        return [text], [Fraction(1)]
    weights = {}
    for part in text.split(','):
        match = re.fullmatch(r'(.+):(\d+\.?\d*|\.\d+)', part.strip())
        if not match or Fraction(match[2]) == 0:
            what = f"dataset='{text}': '{part}' must be a name and a weight above 0"
            raise UserError(f'{what}, as in --dataset=a:0.5,b:0.5')
        if match[1] in weights:
            raise UserError(f"dataset='{text}' has {match[1]} twice: give it one weight.")
        weights[match[1]] = Fraction(match[2])
    names = sorted(weights, key=lambda name: (-weights[name], name))
    return names, [weights[name] / sum(weights.values()) for name in names]

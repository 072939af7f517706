"""The ids of a split, in one file or in several, as one array.

Apart from data.py, since prepare.py looks at what it has made, and starts without torch.
"""

import hashlib
import mmap
from bisect import bisect_right
from functools import lru_cache, partial
from itertools import accumulate

import numpy as np

SPLITS = ('train', 'val')


def split_files(meta, split):
    """The names of a split's files, as the meta.json of a dataset has them."""
    return meta[split].get('files') or [f'{split}.bin']


def open_tokens(paths, dtype, header_bytes=0):
    """Map the ids in files into memory, those of one file after those of the one before it."""
    if len(paths) == 1:
        return np.memmap(paths[0], dtype=dtype, mode='r', offset=header_bytes)
    return Tokens(paths, dtype, header_bytes)


class Tokens:
    """The ids in several files as one array, which has a length, and slices without a step.

    A slice is a copy; nothing else of the files is in memory for longer than it is read.
    Raises ValueError for a file that is empty, or has a part of an id.
    """

    def __init__(self, paths, dtype, header_bytes):
        self.paths = paths
        self.dtype = dtype
        # A map keeps its file open, and a process may have only some hundred files open.
        self.open = lru_cache(100)(partial(np.memmap, dtype=dtype, mode='r', offset=header_bytes))
        sizes = [len(self.open(path)) for path in paths]
        self.starts = [0, *accumulate(sizes)]  # of each file, and the end of the last

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, where):
        start, stop, _ = where.indices(len(self))
        ids = np.empty(max(0, stop - start), self.dtype)
        number = bisect_right(self.starts, start) - 1  # of the file that has the first of them
        n_read = 0
        while n_read < len(ids):
            begin = start + n_read - self.starts[number]
            part = self.open(self.paths[number])[begin : begin + len(ids) - n_read]
            ids[n_read : n_read + len(part)] = part
            n_read += len(part)
            number += 1
        return ids


def in_parts(tokens):
    """Yield an array piece by piece, for what reads all of it."""
    for start in range(0, len(tokens), 2**22):
        yield tokens[start : start + 2**22]
        release(tokens)


def release(tokens):
    """Let the system have back the pages of a mapped file, which count as this process's memory."""
    if isinstance(tokens, np.memmap) and hasattr(mmap, 'MADV_DONTNEED'):
        tokens._mmap.madvise(mmap.MADV_DONTNEED)


def checksum(tokens):
    """Return the SHA-256 of the bytes of some ids."""
    digest = hashlib.sha256()
    for part in in_parts(tokens):
        digest.update(part)
    return digest.hexdigest()

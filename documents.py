"""Documents on their way to tokens: divided into training and validation, and tokenized.

They come as pieces, (text, ends), see sources.py. A corpus is read up to three times: to measure
it, to learn a vocabulary from it, and to tokenize it; it is never held in memory as a whole.
"""

import collections
import random
import re
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from runtime import UserError
from sources import PIECE, read_part
from tokenizer import END_OF_TEXT

AROUND_CUT = 500  # characters on each side of a cut that tell whether a tokenizer joins them
SAMPLE = 10**8  # characters that a bpe vocabulary is learned from, taken from all training text
# A survey that has seen this much knows that the corpus is a large one, and may stop.
SURVEY_DOCUMENTS = 10**4
SURVEY_BYTES = 10**8

# Bytes of UTF-8 that are no control characters, and the control characters of two bytes.
NO_CONTROLS = bytes([9, 10, 13, *range(32, 127), *range(128, 256)])
CONTROLS_OF_TWO = re.compile(rb'\xc2[\x80-\x9f]')


# -----------------------------------------------------------------------------
# how large a corpus is, and its division into training and validation


def utf8_size(text):
    """Count a text's bytes in UTF-8, also if tokenizers will refuse it for a lone surrogate."""
    return len(text.encode(errors='surrogatepass'))


def survey(parts, column, to_the_end):
    """Measure parts: the characters of their documents, UTF-8 bytes, and whether that was all.

    Returns a list of lengths for each part that has been read. Unless it goes to the end, the
    survey stops once the corpus is known to be a large one.
    """
    lengths = []
    n_documents = 0
    size = 0
    for part in parts:
        lengths.append(array('q'))
        length = 0  # of the document so far
        for text, ends in read_part(part, column):
            if text is None:
                continue
            size += utf8_size(text)
            length += len(text)
            if ends:
                lengths[-1].append(length)
                n_documents += 1
                length = 0
                is_large = n_documents >= SURVEY_DOCUMENTS and size >= SURVEY_BYTES
                if is_large and not to_the_end:
                    return lengths, size, False
    return lengths, size, True


def sample_texts(texts, total, seed):
    """Yield about SAMPLE characters: texts drawn from all of them if their total is known.

    If not, the first ones, since nobody knows how often to draw.
    """
    rng = random.Random(f'{seed} sample')
    used = 0
    for text in texts:
        if total is None or rng.random() < SAMPLE / total:
            used += len(text)
            yield text
        if used > SAMPLE:
            return


class Division(NamedTuple):
    """What belongs to validation: of a single text its end, else the documents of a low draw."""

    n_train: int | None  # the characters of a single text that are for training
    bound: float  # of the draws, from 0 to 1
    seed: int


def choose_division(lengths, fraction, seed):
    """Choose the division that brings validation nearest to a fraction of the text.

    lengths: of the documents of each part, or None if they are not known: of a corpus too large to
    be read beforehand, this fraction of the draws is near enough.
    """
    if lengths is not None and sum(map(len, lengths)) == 1:
        (length,) = (length for part in lengths for length in part)
        return Division(int(length * (1 - fraction)), 0.0, seed)
    if lengths is None or not fraction:
        return Division(None, fraction, seed)
    return Division(None, nearest_bound(lengths, fraction, seed), seed)


def divide(pieces, division, part_number):
    """Yield (split, text, ends) of the pieces of a part: the split is 'train', 'val' or 'blank'."""
    if division.n_train is not None:
        return cut_text(pieces, division.n_train)
    return draw_documents(pieces, division.bound, division.seed + part_number)


def cut_text(pieces, n_train):
    """Divide a single text: its first n_train characters are 'train', the others are 'val'."""
    for text, ends in pieces:
        if text is None:
            yield 'blank', '', True
            continue
        if text[:n_train]:
            yield 'train', text[:n_train], n_train <= len(text)
        if text[n_train:]:
            yield 'val', text[n_train:], ends
        n_train = max(0, n_train - len(text))  # that are still to come


def draw_documents(pieces, bound, seed):
    """Divide documents: those whose draw, from 0 to 1, is below the bound are 'val'."""
    rng = random.Random(seed)
    draw = rng.random()
    for text, ends in pieces:
        if text is None:
            yield 'blank', '', True
            continue
        split = 'val' if draw < bound else 'train'
        yield split, text, ends
        if ends:
            draw = rng.random()  # of the next document


def nearest_bound(lengths, fraction, seed):
    """Return the bound of `draw_documents` that brings 'val' nearest to a fraction of the text.

    At least one document is on each side of it.
    """
    draws = array('d')
    for part_number, of_part in enumerate(lengths):
        rng = random.Random(seed + part_number)
        draws.extend(rng.random() for _ in of_part)
    order = np.argsort(draws)
    # val_lengths[i]: the characters of 'val' if it has the documents up to i.
    val_lengths = np.concatenate(lengths)[order].cumsum()
    distances = np.abs(val_lengths - fraction * val_lengths[-1])
    nearest = distances[:-1].argmin()
    return draws[order[nearest + 1]]


# -----------------------------------------------------------------------------
# tokens


def in_batches(divided):
    """Yield (split, [(text, ends), ...], n_blank): about PIECE bytes, to be tokenized at once.

    Those of 'val' go first. n_blank: the blank texts that came with them and are left out.
    """
    batches = {'val': [], 'train': []}
    n_blank = 0
    size = 0
    for split, text, ends in divided:
        bytes_each = 1 if text.isascii() else 3  # or two, or four: nearly is enough
        size += len(text) * bytes_each + 100  # also many empty documents fill a batch
        if split == 'blank':
            n_blank += 1
        else:
            batches[split].append((text, ends))
        if size >= PIECE:
            yield 'val', batches['val'], n_blank
            yield 'train', batches['train'], 0
            batches = {'val': [], 'train': []}
            n_blank = 0
            size = 0
    yield 'val', batches['val'], n_blank
    yield 'train', batches['train'], 0


def join_pieces(divided, tokenizer):
    """Join again the pieces of a document that a tokenizer would join: (split, text, ends).

    A cut is good if the text around it has the tokens of its two sides. Our own tokenizers never
    join across one. Llama 2's puts a space before every text, so its documents stay whole, and in
    memory.
    """
    if tokenizer.kind != 'published':
        yield from divided
        return
    parts = []
    for split, text, ends in divided:
        if split == 'blank':  # it is between two documents
            yield split, text, ends
            continue
        if parts and is_cut(parts[-1][-AROUND_CUT:], text[:AROUND_CUT], tokenizer):
            yield split, ''.join(parts), False
            parts = []
        parts.append(text)
        if ends:
            yield split, ''.join(parts), True
            parts = []


def is_cut(left, right, tokenizer):
    """Tell whether two texts side by side have the tokens of each."""
    whole, *sides = tokenizer.encode_batch([left + right, left, right])
    # Some tokenizers forget a space that a text begins with.
    begins_same = tokenizer.decode(sides[1])[:1] == right[:1]
    return begins_same and np.array_equal(whole, np.concatenate(sides))


def encode_pieces(pieces, tokenizer, end_of_text, dtype='uint32'):
    """Tokenize [(text, ends), ...], with the id `end_of_text`, if not None, after each document.

    Returns the ids, (n,) of the dtype; of each piece the number of its tokens, its UTF-8 bytes and
    whether a document ends there, (len(pieces),) int64 each; and what the tokenizer's find_changes
    returns. Raises UserError if text would be lost.
    """
    texts = [text for text, _ in pieces]
    ends = np.array([ends for _, ends in pieces], np.int64)
    sizes = np.array([utf8_size(text) for text in texts], np.int64)

    encoded = encode_joined(texts, ends, tokenizer, end_of_text)
    ids, n_tokens = encoded or encode_one_by_one(texts, ends, tokenizer, end_of_text)

    # Decoded again, without the end-of-text tokens.
    stops = n_tokens.cumsum()
    if end_of_text is not None:
        stops -= ends
    starts = n_tokens.cumsum() - n_tokens
    bounds = zip(starts.tolist(), stops.tolist(), strict=True)
    changes = tokenizer.find_changes(texts, [ids[start:stop] for start, stop in bounds])
    return ids.astype(dtype), n_tokens, sizes, ends, changes


def encode_joined(texts, ends, tokenizer, end_of_text):
    """Tokenize documents in one call, which is faster than a call for each of many small ones.

    Returns the ids and the number of tokens of each text, or None where that cannot be done.
    """
    joined = END_OF_TEXT.join(texts)
    # Whole documents, but for the end of the last one, joined by a token that the tokenizer knows.
    is_known = end_of_text is not None and tokenizer.kind in ('gpt2', 'bpe', 'byte')
    # If it is in one of the texts as well, it is plain text there and not the token.
    if not is_known or not ends[:-1].all() or joined.count(END_OF_TEXT) != len(texts) - 1:
        return None
    try:
        ids = tokenizer.encode(joined, {END_OF_TEXT})
    except UserError:
        return None  # one by one, the error will name a place in the document, not in the batch

    if ends[-1]:
        ids = np.append(ids, np.uint32(end_of_text))
    starts = np.flatnonzero(ids == end_of_text)[: len(texts) - 1] + 1  # of all texts but the first
    return ids, np.diff(starts, prepend=0, append=len(ids))


def encode_one_by_one(texts, ends, tokenizer, end_of_text):
    """Tokenize each text by itself. Returns the ids and the number of tokens of each text."""
    encoded = tokenizer.encode_batch(texts)
    n_tokens = np.array([len(ids) for ids in encoded], np.int64)
    ids = np.concatenate([np.array([], np.uint32), *encoded])  # it needs at least one array
    if end_of_text is None:
        return ids, n_tokens
    return np.insert(ids, n_tokens.cumsum()[ends == 1], end_of_text), n_tokens + ends


def count_oddities(pieces):
    """Count what may be wrong with texts: control characters, U+FFFD, and END_OF_TEXT in a line."""
    data = ''.join(text for text, _ in pieces).encode(errors='replace')
    n_controls = len(data.translate(None, NO_CONTROLS)) + len(CONTROLS_OF_TWO.findall(data))
    return {
        'controls': n_controls,
        'replaced': data.count('\ufffd'.encode()),
        'end_of_text': data.count(END_OF_TEXT.encode()),
    }


def encode_all(batches, tokenizer, end_of_text, dtype, n_threads=1):
    """Turn (key, pieces) into (key, pieces, oddities, *encode_pieces(pieces)), in order.

    Threads are enough, since tiktoken and tokenizers release the GIL. No more batches are taken
    ahead than keep all threads busy.
    """
    pending = collections.deque()  # future results
    thread = threading.local()

    def start_thread():
        thread.tokenizer = tokenizer.copy()

    def encode_batch(key, pieces):
        encoded = encode_pieces(pieces, thread.tokenizer, end_of_text, dtype)
        return key, pieces, count_oddities(pieces), *encoded

    pool = ThreadPoolExecutor(n_threads, initializer=start_thread)
    try:
        for key, pieces in batches:
            pending.append(pool.submit(encode_batch, key, pieces))
            if len(pending) > 3 * n_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

"""Documents from anywhere: read, divided between training and validation, tokenized. Nothing is held whole.

Text files, tables (.jsonl, .json, .csv, .parquet) and corpora of the Hugging Face Hub all give the same: documents as
pieces, (text, whether the document ends there). Joined, the tokens of the pieces are those of the document.
"""

import bz2
import codecs
import collections
import contextlib
import glob
import gzip
import itertools
import logging
import lzma
import random
import re
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

import tokenizer as tokenizers

TABLES = {'.jsonl': 'json', '.json': 'json', '.csv': 'csv', '.parquet': 'parquet'}
COMPRESSED = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
WIKITEXT = 'Salesforce/wikitext'
VALIDATION = ('validation', 'valid', 'val', 'dev')

PIECE = 2**20  # characters; a longer text is tokenized in pieces
SAMPLE = 10**8  # characters that a bpe vocabulary is learned from, drawn from the whole training part
ENOUGH = 10**4, 10**8  # documents and characters after which a survey ends
_END = re.escape(tokenizers.END_OF_TEXT)
SEPARATOR = re.compile(rf'{_END}(?<![^\n]{_END})[ \t]*\r?\n')  # a line of its own; text first, for speed
LAST_SEPARATOR = re.compile(rf'{_END}(?<![^\n]{_END})[ \t]*\r?\n?\Z')
# The last place where no tokenizer here joins what is before and after: a space, or a line, between two words.
CUT = re.compile(r'(?s:.*)(?:\S(?= \S)|\S\n(?=\S))')
HEADING = re.compile(r' = (?!=)[^\n]*(?<!=) = \n?')


class Unreadable(ValueError):
    """One sentence that names the file and what is wrong with it."""


def kind_of(path):
    """(suffix, compression) of a file: ('.txt', '.gz') of a.txt.gz."""
    suffixes = [suffix.lower() for suffix in ('', *path.suffixes)]
    return (suffixes[-2], suffixes[-1]) if suffixes[-1] in COMPRESSED else (suffixes[-1], '')


def find_files(paths):
    """The files named by a comma-separated list of files and folders, each once; a folder's hidden ones are left out.

    Raises FileNotFoundError, or ValueError for a pipe.
    """
    files = []
    for path in paths.split(','):
        if not path:
            raise FileNotFoundError(f"input='{paths}' has an empty name: separate names by single commas.")
        path, known = Path(path), ('.txt', '.md', *TABLES)
        found = sorted(path.rglob('*')) if path.is_dir() else [path]
        if path.is_dir():
            found = [file for file in found if kind_of(file)[0] in known and file.is_file()]
            found = [file for file in found if not any(part[0] == '.' for part in file.relative_to(path).parts)]
        elif path.exists() and not path.is_file():
            raise ValueError(f'{path} is no regular file, and a text is read several times: save it to a file first.')
        if not found or not found[0].exists():
            raise FileNotFoundError(
                f'The folder {path} has no file that ends in {", ".join(known)}.'
                if path.is_dir()
                else f'There is no file {path}' + (': commas separate names.' if ',' in paths else '.')
            )
        files += found
    return list({file.resolve(): file for file in files}.values())


def read_files(files, column):
    """Text files and tables, one after the other, without the documents that are all white space."""
    inside = False
    for text, ends in itertools.chain.from_iterable(read_file(file, column) for file in files):
        if inside or not ends or not (text.isspace() or text == ''):
            yield text, ends
            inside = not ends


def read_file(path, column):
    suffix = kind_of(path)[0]
    try:
        if suffix not in TABLES:
            yield from read_text(path)
            return
        from datasets import load_dataset

        logging.getLogger('datasets').setLevel(logging.CRITICAL)  # what is wrong is said below
        options = {'keep_default_na': False, 'converters': {column: str}} if suffix == '.csv' else {}  # NA is a word
        where = glob.escape(str(path))
        rows = load_dataset(TABLES[suffix], data_files=where, split='train', streaming=True, **options)
        yield from read_rows(rows, path, column)
    except Unreadable:
        raise
    except Exception as error:  # whatever its reader raises
        if suffix in TABLES and suffix != '.parquet':
            try:
                collections.deque(read_text(path), maxlen=0)
            except Unreadable:  # it says where it is not UTF-8
                raise
            except Exception:  # whatever a damaged file makes its reader raise
                pass
        raise Unreadable(f'{path} cannot be read: {brief(error)}') from None


def read_text(path):
    """A text file, a block at a time. Raises Unreadable where it is not UTF-8."""
    decoder, done, rest = codecs.getincrementaldecoder('utf-8')(), 0, ''
    with COMPRESSED.get(kind_of(path)[1], open)(path, 'rb') as file:
        while block := file.read(max(PIECE, len(rest))):
            done += len(block)
            try:
                rest += decoder.decode(block, final=False)
            except UnicodeDecodeError as error:
                raise Unreadable(not_utf8(path, done - len(error.object) + error.start)) from None
            *whole, rest = SEPARATOR.split(rest)
            for text in whole:
                yield text, True
            if len(rest) > PIECE and (cut := CUT.match(rest)):
                yield rest[: cut.end()], False
                rest = rest[cut.end() :]
    if decoder.getstate()[0]:
        raise Unreadable(not_utf8(path, done - len(decoder.getstate()[0])))
    yield LAST_SEPARATOR.sub('', rest), True


def not_utf8(path, place):
    return f'{path} is not UTF-8 text: byte {place:,} cannot be decoded.'


def brief(error):
    return f'{type(error).__name__}: {(str(error).strip() or "?").splitlines()[0][:200]}'


def read_rows(rows, where, column, blank=None):
    """The texts in one column of a table of `datasets`, each a document; `blank` stands for those that are empty.

    Raises Unreadable when the column is not there or holds something else.
    """
    for batch in rows.iter(1000):
        if column not in batch:
            raise Unreadable(f"{where} has no column '{column}' but {', '.join(batch)}: use --text_column=NAME.")
        for text in batch[column]:
            if not isinstance(text, str | None):
                raise Unreadable(f"The column '{column}' of {where} holds no text but {type(text).__name__}.")
            if blank or (text and text.strip()):
                yield text or blank, True


def join_articles(rows, column):
    """WikiText has a line in each row: a document begins at every ` = Title = ` that follows a blank line."""
    article = []
    for line, _ in read_rows(rows, WIKITEXT, column, blank='\n'):
        if HEADING.fullmatch(line) and not (article and article[-1].strip()):
            if ''.join(article).strip():
                yield ''.join(article), True
            article = []
        article.append(line)
    yield ''.join(article), True


def open_hub(repository, configuration, split, column, streaming):
    """A corpus of the Hub: {'train': a function that reads it}, and 'val' if it has a split for validation; its bytes.

    The bytes are those of all columns, None when streaming. Raises ConnectionError when it cannot be had.
    """
    import datasets

    logging.getLogger('huggingface_hub').setLevel(logging.CRITICAL)  # what is wrong is said below
    try:
        found = datasets.get_dataset_split_names(repository, configuration)
        names = [split, *(name for name in VALIDATION if name in found and name != split)]
        tables = {
            part: datasets.load_dataset(repository, configuration, split=name, streaming=streaming)
            for part, name in zip(('train', 'val'), names, strict=False)
        }
    except Exception as error:  # the Hub's client and the readers have many
        raise ConnectionError(
            f'{repository} cannot be had from the Hugging Face Hub ({brief(error)}). Check its name, --subset and '
            f'--split, and the connection; a copy in the folder {repository} is taken from there.'
        ) from None
    size = None if streaming else tables['train'].data.nbytes
    if repository == WIKITEXT:
        return {part: partial(join_articles, table, column) for part, table in tables.items()}, size
    return {part: partial(read_rows, table, repository, column) for part, table in tables.items()}, size


def survey(pieces, to_the_end):
    """The length of each document in characters, their UTF-8 bytes, and whether that was all.

    Unless it goes to the end, it ends when ENOUGH is seen to know that the corpus is a large one.
    """
    lengths, size, length = array('q'), 0, 0
    for text, ends in pieces:
        length += len(text)
        size += len(text) if text.isascii() else len(text.encode(errors='surrogatepass'))
        if ends:
            lengths.append(length)
            length = 0
            if len(lengths) >= ENOUGH[0] and size >= ENOUGH[1] and not to_the_end:
                return lengths, size, False
    return lengths, size, True


def sample(texts, total, seed):
    """About SAMPLE characters of some texts: drawn from all of them where the total is known, else the first."""
    rng, used = random.Random(f'{seed} sample'), 0
    for text in texts:
        if total is None or rng.random() < SAMPLE / total:
            used += len(text)
            yield text
        if used > SAMPLE:
            return


def divide(pieces, lengths, fraction, seed):
    """(part, text, ends) of pieces: a single text is cut; of several documents those with the lowest draws are 'val'.

    lengths: those of all documents, or None: then `fraction` of the draws is near enough to that of the text. Where
    they are known, the bound that comes nearest is taken, with at least one document on each side.
    """
    if lengths is not None and len(lengths) == 1:
        left = int(lengths[0] * (1 - fraction))
        for text, ends in pieces:
            if text[:left]:
                yield 'train', text[:left], left <= len(text)
            if text[left:]:
                yield 'val', text[left:], ends
            left = max(0, left - len(text))
        return
    bound, rng = fraction, random.Random(seed)
    if lengths is not None and fraction:
        draws = sorted((rng.random(), length) for length in lengths)
        ends_at = list(itertools.accumulate(length for _, length in draws))
        nearest = min(range(len(draws) - 1), key=lambda i: abs(ends_at[i] - fraction * ends_at[-1]))
        bound, rng = draws[nearest + 1][0], random.Random(seed)
    part = None
    for text, ends in pieces:
        part = part or ('val' if rng.random() < bound else 'train')
        yield part, text, ends
        if ends:
            part = None


def in_batches(divided):
    """(part, [(text, ends), ...]) of about PIECE characters, to be tokenized at once; those of 'val' go first."""
    waiting, size = {'val': [], 'train': []}, 0
    for part, text, ends in divided:
        waiting[part].append((text, ends))
        size += len(text) + 100
        if size >= PIECE:
            yield from waiting.items()
            waiting, size = {'val': [], 'train': []}, 0
    yield from waiting.items()


def encode_pieces(pieces, tokenizer, end_of_text, dtype='uint32'):
    """The ids of some texts, one after the other, with `end_of_text`, if not None, where a document ends.

    pieces: [(text, whether a document ends there), ...]. Returns the ids, (n,) of the dtype, and for each piece its
    tokens, its UTF-8 bytes and whether a document ends there, (len(pieces),) int64 each.
    """
    texts, ends = [text for text, _ in pieces], np.array([ends for _, ends in pieces], np.int64)
    sizes = np.array([len(text) if text.isascii() else len(text.encode(errors='ignore')) for text in texts], np.int64)
    after = np.array([] if end_of_text is None else [end_of_text], dtype)
    together, joints = tokenizers.END_OF_TEXT.join(texts), len(texts) - 1
    simple = len(after) and tokenizer.name != 'char' and ends[:-1].all()
    if simple and together.count(tokenizers.END_OF_TEXT) == joints:
        with contextlib.suppress(ValueError):  # in one call, which is faster; below it is said again of the right text
            ids = np.append(tokenizers.encode(tokenizer, together, {tokenizers.END_OF_TEXT}), after[: ends[-1]])
            stops = np.flatnonzero(ids == end_of_text) + 1
            return ids.astype(dtype), np.diff(stops if ends[-1] else [*stops, len(ids)], prepend=0), sizes, ends
    ids = [np.append(tokenizers.encode(tokenizer, text), after[:end]) for text, end in zip(texts, ends, strict=True)]
    counts = np.array([len(part) for part in ids], np.int64)
    return np.concatenate([after[:0], *ids]).astype(dtype), counts, sizes, ends


def encode_all(batches, tokenizer, end_of_text, dtype, threads=1):
    """(name, pieces) to (name, *encode_pieces(pieces)), in their order, by several threads: tiktoken needs no Python.

    No more batches are taken ahead than keep all of them busy.
    """
    waiting, own = collections.deque(), threading.local()

    def begin():
        own.tokenizer = tokenizers.copy(tokenizer)

    def work(pieces):
        return encode_pieces(pieces, own.tokenizer, end_of_text, dtype)

    pool = ThreadPoolExecutor(threads, initializer=begin)
    try:
        for name, pieces in batches:
            waiting.append((name, pool.submit(work, pieces)))
            if len(waiting) > 3 * threads:
                name, result = waiting.popleft()
                yield name, *result.result()
        for name, result in waiting:
            yield name, *result.result()
    finally:
        pool.shutdown(cancel_futures=True)

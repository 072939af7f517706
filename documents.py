"""Documents from anywhere: read, divided into training and validation, and tokenized.

Text files, tables (.jsonl, .json, .csv, .parquet) and corpora of the Hugging Face Hub are all read
as a stream of pieces, (text, ends): some text, and whether its document ends there. A long document
is cut only where no tokenizer joins two characters, so the tokens of the pieces, one after the
other, are those of the document. No corpus is ever held in memory as a whole.
"""

import bz2
import codecs
import collections
import glob
import gzip
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

from runtime import UserError
from tokenizer import END_OF_TEXT

TABLES = {'.jsonl': 'json', '.json': 'json', '.csv': 'csv', '.parquet': 'parquet'}
COMPRESSED = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
WIKITEXT = 'Salesforce/wikitext'
VALIDATION_SPLITS = ('validation', 'valid', 'val', 'dev')  # as corpora of the Hub call theirs

PIECE = 2**20  # characters; a longer text is read and tokenized in pieces
AROUND_CUT = 500  # characters on each side of a cut that tell whether a tokenizer joins them
SAMPLE = 10**8  # characters that a bpe vocabulary is learned from, taken from all training text
# A survey that has seen this much knows that the corpus is a large one, and may stop.
SURVEY_DOCUMENTS = 10**4
SURVEY_BYTES = 10**8

# A line that is END_OF_TEXT and nothing else. Its beginning is checked last, by looking back over
# it: a pattern that begins with a fixed text is searched for much faster.
_END = re.escape(END_OF_TEXT)
SEPARATOR = re.compile(rf'{_END}(?<![^\n]{_END})[ \t]*\r?\n')
LAST_SEPARATOR = re.compile(rf'{SEPARATOR.pattern}?\Z')  # a file's last line may have no line end

# Up to the last place where no tokenizer here joins what is before and what is after: between two
# words, before the one space or after the one line end that stands there.
CUT = re.compile(r'(?s:.*)(?:\S(?= \S)|\S\n(?=\S))')
# WikiText's ` = Title = ` of an article; ` = = Section = = ` is not one.
HEADING = re.compile(r' = (?!=)[^\n]*(?<!=) = \n?')


# -----------------------------------------------------------------------------
# files


def kind_of(path):
    """Return (suffix, compression): ('.txt', '.gz') for a.txt.gz, ('.txt', '') for a.txt."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ''


def find_files(paths):
    """List the files that a comma-separated list of files and folders names, each file once.

    Raises UserError for a name without a file, and for a pipe.
    """
    files = []
    for name in paths.split(','):
        if not name:
            raise UserError(f"input='{paths}' has an empty name: separate names by single commas.")
        path = Path(name)
        if path.is_dir():
            files += find_in_folder(path)
        elif path.is_file():
            files.append(path)
        elif path.exists():
            raise UserError(f'{path} is not a regular file but is read twice: save it to a file.')
        else:
            hint = ': commas separate names.' if ',' in paths else '.'
            raise UserError(f'There is no file {path}{hint}')

    # A file may be named twice, or reached through a link as well.
    return list({file.resolve(): file for file in files}.values())


def find_in_folder(folder):
    """List the texts and tables in a folder and below it, except hidden ones."""
    known = ('.txt', '.md', *TABLES)
    files = []
    for file in sorted(folder.rglob('*')):
        hidden = any(name.startswith('.') for name in file.relative_to(folder).parts)
        if not hidden and kind_of(file)[0] in known and file.is_file():
            files.append(file)
    if not files:
        raise UserError(f'The folder {folder} has no file that ends in {", ".join(known)}.')
    return files


def read_files(files, column):
    """Read texts and tables one after the other, except documents that are only white space."""
    inside = False  # a document whose beginning has been read
    for file in files:
        pieces = read_table(file, column) if kind_of(file)[0] in TABLES else read_text(file)
        for text, ends in explain_errors(pieces, file):
            if inside or not ends or text.strip():
                yield text, ends
                inside = not ends


def read_text(path):
    """Read a text file, a block at a time; lines of END_OF_TEXT divide it into documents.

    Raises UserError where it is not UTF-8.
    """
    open_file = COMPRESSED.get(kind_of(path)[1], open)
    decoder = codecs.getincrementaldecoder('utf-8')()
    rest = ''  # decoded, but not yielded yet
    with open_file(path, 'rb') as file:
        try:
            # A rest with no place to cut it is searched again with every block. Blocks that grow
            # with it keep the time for one endless line linear.
            while block := file.read(max(PIECE, len(rest))):
                rest += decoder.decode(block)
                *complete, rest = SEPARATOR.split(rest)
                for text in complete:
                    yield text, True

                if len(rest) > PIECE and (cut := CUT.match(rest)):
                    yield rest[: cut.end()], False
                    rest = rest[cut.end() :]
            decoder.decode(b'', final=True)  # the last character may have bytes missing
        except UnicodeDecodeError as error:
            # error.object is the block, after what was left undecoded of the one before it.
            at = file.tell() - len(error.object) + error.start
            raise UserError(f'{path} is not UTF-8 text: byte {at:,} cannot be decoded.') from None
    yield LAST_SEPARATOR.sub('', rest), True


def explain_errors(pieces, where):
    """Yield the pieces of a file or corpus. Raises UserError for whatever its reader raises."""
    try:
        yield from pieces
    except UserError:
        raise
    except Exception as error:  # the readers raise all kinds
        raise UserError(f'{where} cannot be read: {brief(error)}') from None


def brief(error):
    """Shorten an error of some library to its kind and its first line."""
    message = str(error).strip() or '?'
    return f'{type(error).__name__}: {message.splitlines()[0][:200]}'


# -----------------------------------------------------------------------------
# tables, and corpora of the Hub


def read_table(path, column):
    """Read a table's column of texts, each a document."""
    from datasets import load_dataset  # takes a second to import

    # datasets logs errors as well as raising them; ours is one sentence.
    logging.getLogger('datasets').setLevel(logging.CRITICAL)
    suffix = kind_of(path)[0]
    options = {}
    if suffix == '.csv':
        # Else pandas takes the text NA for a missing one, and 12 for a number.
        options = {'keep_default_na': False, 'converters': {column: str}}
    options['data_files'] = glob.escape(str(path))  # a name may have brackets in it
    # All rows of a file are what datasets calls its split 'train'.
    rows = load_dataset(TABLES[suffix], split='train', streaming=True, **options)
    try:
        yield from read_rows(rows, path, column)
    except Exception as error:
        if suffix != '.parquet' and not isinstance(error, UserError):
            # Read as a text, a damaged file says so, and one that is not UTF-8 says at which byte.
            for _ in read_text(path):
                pass
        raise


def read_rows(rows, where, column, blank=None):
    """Read one column of a table of `datasets`, each of its texts a document.

    Those of white space are left out, unless there is a `blank` to stand for the empty ones. Raises
    UserError when the column is not there or holds something else.
    """
    for batch in rows.iter(1000):
        if column not in batch:
            columns = ', '.join(batch)
            raise UserError(f"{where} has no column '{column}' but {columns}: use --text_column.")
        for text in batch[column]:
            if not isinstance(text, str | None):
                kind = type(text).__name__
                raise UserError(f"The column '{column}' of {where} holds {kind}, not text.")
            if blank or (text and text.strip()):
                yield text or blank, True


def join_articles(rows, column):
    """Read WikiText, which has a line per row, as articles, each a document.

    An article begins at a ` = Title = ` that follows a blank line.
    """
    article = []
    for line, _ in read_rows(rows, WIKITEXT, column, blank='\n'):
        after_blank_line = not article or not article[-1].strip()
        if after_blank_line and HEADING.fullmatch(line):
            text = ''.join(article)
            if text.strip():
                yield text, True
            article = []
        article.append(line)
    yield ''.join(article), True


def open_hub(repository, configuration, split, column, streaming):
    """Open a corpus of the Hub: {'train': a function that reads it}, and its size in bytes.

    There is a 'val' as well if the corpus has a split for validation. The size is that of all
    columns of the training split, None when streaming. Raises UserError if the corpus cannot be
    had.
    """
    import datasets

    load = partial(datasets.load_dataset, repository, configuration, streaming=streaming)
    # It logs errors as well as raising them; ours is one sentence.
    logging.getLogger('huggingface_hub').setLevel(logging.CRITICAL)
    try:
        published = datasets.get_dataset_split_names(repository, configuration)
        validation = [name for name in VALIDATION_SPLITS if name in published and name != split]
        tables = {'train': load(split=split)}
        if validation:
            tables['val'] = load(split=validation[0])
    except Exception as error:  # the Hub's client and the readers raise all kinds
        raise UserError(
            f'{repository} cannot be loaded from the Hugging Face Hub ({brief(error)}). Check its '
            'name, --subset, --split and the connection; a folder of that name is used instead.'
        ) from None

    size = None if streaming else tables['train'].data.nbytes
    readers = {key: partial(read_hub, table, repository, column) for key, table in tables.items()}
    return readers, size


def read_hub(rows, repository, column):
    """Read one split of a corpus of the Hub."""
    if repository == WIKITEXT:
        return explain_errors(join_articles(rows, column), repository)
    return explain_errors(read_rows(rows, repository, column), repository)


# -----------------------------------------------------------------------------
# how large a corpus is, and its division into training and validation


def utf8_size(text):
    """Count a text's bytes in UTF-8, also if tokenizers will refuse it for a lone surrogate."""
    return len(text.encode(errors='surrogatepass'))


def survey(pieces, to_the_end):
    """Measure a corpus: the characters of each document, its UTF-8 bytes, and whether that was all.

    Unless it goes to the end, the survey stops once the corpus is known to be a large one.
    """
    lengths = array('q')
    size = 0
    length = 0  # of the document so far
    for text, ends in pieces:
        size += utf8_size(text)
        length += len(text)
        if ends:
            lengths.append(length)
            length = 0
            if not to_the_end and len(lengths) >= SURVEY_DOCUMENTS and size >= SURVEY_BYTES:
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


def divide(pieces, lengths, fraction, seed):
    """Yield (split, text, ends) of pieces: the split is 'train' or 'val'.

    A single text is cut, its last part is 'val'. Of several documents each belongs to one split as
    a whole. lengths: those of all documents, or None where they are not known.
    """
    if lengths is not None and len(lengths) == 1:
        return cut_text(pieces, int(lengths[0] * (1 - fraction)))

    # Of a corpus too large to be read beforehand, this fraction of the draws is near enough.
    if lengths is None or not fraction:
        return draw_documents(pieces, fraction, seed)
    return draw_documents(pieces, nearest_bound(lengths, fraction, seed), seed)


def cut_text(pieces, n_train):
    """Divide a single text: its first n_train characters are 'train', the others are 'val'."""
    for text, ends in pieces:
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
        split = 'val' if draw < bound else 'train'
        yield split, text, ends
        if ends:
            draw = rng.random()  # of the next document


def nearest_bound(lengths, fraction, seed):
    """Return the bound of `draw_documents` that brings 'val' nearest to a fraction of the text.

    At least one document is on each side of it.
    """
    rng = random.Random(seed)
    draws = sorted((rng.random(), length) for length in lengths)
    # val_lengths[i]: the characters of 'val' if it has the documents up to i.
    val_lengths = np.cumsum([length for _, length in draws])
    distances = np.abs(val_lengths - fraction * val_lengths[-1])
    nearest = distances[:-1].argmin()
    return draws[nearest + 1][0]


# -----------------------------------------------------------------------------
# tokens


def in_batches(divided):
    """Yield (split, [(text, ends), ...]) of about PIECE characters, to be tokenized at once.

    Those of 'val' go first.
    """
    batches = {'val': [], 'train': []}
    size = 0
    for split, text, ends in divided:
        batches[split].append((text, ends))
        size += len(text) + 100  # also many empty documents fill a batch
        if size >= PIECE:
            yield from batches.items()
            batches = {'val': [], 'train': []}
            size = 0
    yield from batches.items()


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


def encode_all(batches, tokenizer, end_of_text, dtype, n_threads=1):
    """Turn (split, pieces) into (split, *encode_pieces(pieces)), in order, by several threads.

    Threads are enough, since tiktoken and tokenizers release the GIL. No more batches are taken
    ahead than keep all threads busy.
    """
    pending = collections.deque()  # future results
    thread = threading.local()

    def start_thread():
        thread.tokenizer = tokenizer.copy()

    def encode_batch(split, pieces):
        return split, *encode_pieces(pieces, thread.tokenizer, end_of_text, dtype)

    pool = ThreadPoolExecutor(n_threads, initializer=start_thread)
    try:
        for split, pieces in batches:
            pending.append(pool.submit(encode_batch, split, pieces))
            if len(pending) > 3 * n_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

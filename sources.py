"""Where text comes from: files, tables and corpora of the Hugging Face Hub, read piece by piece.

A Source is one file, on this machine or on the Hub. Whatever it is, it is read as a stream of
pieces, (text, ends): some text, and whether its document ends there. A document is a text file
(lines of END_OF_TEXT divide it into several), or one cell of a table's column of texts; nothing
else of a table is looked at. A long document is cut only where no tokenizer of our own joins two
characters, so the tokens of the pieces, one after the other, are those of the document. No file is
ever held in memory as a whole.
"""

import bz2
import codecs
import collections
import contextlib
import csv
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import re
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from runtime import UserError, brief
from tokenizer import END_OF_TEXT

TEXTS = ('.txt', '.md')
ARCHIVES = ('.tar', '.tgz', '.zip', '.7z', '.rar')
COMPRESSED = ('.gz', '.bz2', '.xz', '.zst')
WIKITEXT = 'Salesforce/wikitext'
VALIDATION_SPLITS = ('validation', 'valid', 'val', 'dev')  # as corpora of the Hub call theirs
HUB_URL = re.compile(r'hf://datasets/([^/]+/[^/@]+)(?:@([^/]+))?/(.+)')
# The head of a data set's README.md on the Hub: it lists configurations.
HUB_CARD = re.compile(r'---\n(?:(?!---).*\n)*?(?:configs|dataset_info):')

PIECE = 2**20  # bytes; a longer text is read and tokenized in pieces of about that
UNKNOWN_ROWS = 1000  # rows without the column after which it is missing
GOES_ON = '. When the network is back, the same command goes on from here.'
LONGEST_PAUSE = 512  # seconds, before the network is tried for the last time

# A line that is END_OF_TEXT and nothing else. Its beginning is checked last, by looking back over
# it: a pattern that begins with a fixed text is searched for much faster.
_END = re.escape(END_OF_TEXT)
SEPARATOR = re.compile(rf'{_END}(?<![^\n]{_END})[ \t]*\r?\n')
LAST_SEPARATOR = re.compile(rf'{SEPARATOR.pattern}?\Z')  # a file's last line may have no line end

# Up to the last place where no tokenizer of our own joins what is before and what is after: a
# letter or digit and then white space or punctuation, some other sign and the one space behind it,
# or the one line end behind it.
CUT = re.compile(r'(?s:.*)(?:[^\W_](?=[\s.,;:!?…。，、；：！？])|\S(?= \S)|\S\n(?=\S))')
# The regular expressions of tiktoken and rustbpe give up within a million white space characters.
MOST_SPACES = 500_000
LONG_SPACE = re.compile(rf'(?<!\s)\s{{{MOST_SPACES},}}')
PROBED_SPACE = re.compile(r'\s{10}')  # among every 50,000th character
# Other columns do not matter, however long their numbers are.
JSON = json.JSONDecoder(parse_int=lambda digits: 0)
JSON_GAP = re.compile(r'[\s,]*')  # between two values
# WikiText's ` = Title = ` of an article; ` = = Section = = ` is not one.
HEADING = re.compile(r' = (?!=)[^\n]*(?<!=) = \n?')


class Source(NamedTuple):
    """A file of text or a table."""

    name: str  # as people know it: a path, or ORG/NAME and the path there
    open: collections.abc.Callable  # open() returns its bytes as a file
    size: int | None  # in bytes
    stamp: str  # changes when its contents do
    is_remote: bool = False


# -----------------------------------------------------------------------------
# files


def kind_of(name):
    """Return (suffix, compression): ('.txt', '.gz') for a.txt.gz, ('.txt', '') for a.txt."""
    path = Path(str(name).lower())
    if path.suffix in COMPRESSED:
        return Path(path.stem).suffix, path.suffix
    return path.suffix, ''


def local_source(path):
    """Describe a file on this machine."""
    status = os.stat(path)
    stamp = f'{status.st_size} {status.st_mtime_ns}'
    return Source(str(path), partial(open, path, 'rb'), status.st_size, stamp)


def find_files(paths, extensions=None):
    """List what a comma-separated list of files and folders names, each file once.

    extensions: of the files to take in folders, comma-separated; None: all texts and tables. Prints
    what a folder has besides. Raises UserError for a name without a file, and for a pipe.
    """
    known = (*TEXTS, *TABLES)
    if extensions is not None:
        known = tuple(f'.{name.strip().lower().lstrip(".")}' for name in extensions.split(','))
    files = []
    for name in paths.split(','):
        if not name.strip():
            raise UserError(f"input='{paths}' has an empty name: separate names by single commas.")
        path = Path(os.path.expanduser(name))
        if path.is_dir():
            files += find_in_folder(path, known)
        elif kind_of(path)[0] in ARCHIVES:
            raise UserError(f'{path} is an archive: unpack it, and name its folder.')
        elif path.is_file():
            files.append(path)
        elif path.exists():
            raise UserError(f'{path} is not a regular file but is read twice: save it to a file.')
        else:
            hint = ': commas separate names.' if ',' in paths else '.'
            raise UserError(f'There is no file {path}{hint}')

    # A file may be named twice, or reached through a link as well.
    unique = {file.resolve(): file for file in files}
    return [local_source(file) for file in unique.values()]


def raise_error(error):
    """Raise an error that os.walk would ignore: a folder that may not be read."""
    raise error


def find_in_folder(folder, known):
    """List the files of these endings in a folder and below it, except hidden ones.

    Links to folders are followed. Prints which other files there are, by their endings.
    """
    files = []
    others = collections.Counter()
    visited = set()  # folders, since links may go round in a circle
    for here, folders, names in os.walk(folder, followlinks=True, onerror=raise_error):
        if os.path.realpath(here) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(here))
        others['hidden'] += sum(name.startswith('.') for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in sorted(names):
            path = Path(here, name)
            suffix, _ = kind_of(path)
            if name.startswith('.') or not path.is_file():
                others['hidden' if name.startswith('.') else 'no file'] += 1
            elif suffix in known:
                files.append(path)
            else:
                others[suffix or 'without an ending'] += 1

    files = list({file.resolve(): file for file in files}.values())  # a link leads to the same one
    others = +others  # those that there are
    left_out = ', '.join(f'{count:,} {what}' for what, count in others.most_common(5))
    if not files:
        has = f' but {left_out}' if others else ''
        endings = ', '.join(known)
        how = 'name what to take, --extensions=.py,.rs'
        raise UserError(f'The folder {folder} has no file that ends in {endings}{has}: {how}.')
    if others:
        print(f'Note: {folder}: {len(files):,} files are read, {others.total():,} left out:')
        print(f'{left_out}. --extensions=.py,.rs says what to take.')
    card = Path(folder, 'README.md')
    if card.is_file() and HUB_CARD.match(card.read_text(encoding='utf-8', errors='replace')):
        print(f'Note: {folder} is a data set of the Hugging Face Hub, and all of it is read, tests')
        print(f'and README.md, too. --dataset=hf:{folder} reads its training split.')
    return sorted(files)


def open_decompressed(source):
    """Open a source for reading what was compressed in it."""
    file = source.open()
    compression = kind_of(source.name)[1]
    if compression == '.zst':
        import pyarrow  # here and below, since it takes 60 MiB

        return io.BufferedReader(pyarrow.CompressedInputStream(file, 'zstd'))
    readers = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
    return readers[compression](file) if compression else file


def read_source(source, column):
    """Read a text or a table: its pieces. Raises UserError for whatever its reader raises."""
    read = partial(read_text, source)
    if kind_of(source.name)[0] in TABLES:
        read = partial(read_table, source, column)
    try:
        yield from cut_spaces(retry(read, source.name) if source.is_remote else read())
    except UserError:
        raise
    except Exception as error:  # the readers raise all kinds
        how = GOES_ON if source.is_remote and is_network_error(error) else ''
        raise UserError(f'{source.name} cannot be read: {brief(error)}{how}') from None


def cut_spaces(pieces):
    """Cut where there are too many white space characters in a row for tokenizers."""
    for text, ends in pieces:
        start = 0
        # First a few characters of the text, a tenth of MOST_SPACES apart: few have to be searched.
        may_have = PROBED_SPACE.search(text[:: MOST_SPACES // 10])
        for run in LONG_SPACE.finditer(text) if may_have else ():
            for stop in range(run.start() + MOST_SPACES, run.end(), MOST_SPACES):
                yield text[start:stop], False
                start = stop
        yield text[start:], ends


def read_blocks(source):
    """Read a source as blocks of decoded text. Raises UserError if it is not UTF-8."""
    decoder = codecs.getincrementaldecoder('utf-8')()
    n_read = 0
    with open_decompressed(source) as file:
        try:
            while block := file.read(PIECE):
                n_read += len(block)
                yield decoder.decode(block)
            decoder.decode(b'', final=True)  # the last character may have bytes missing
        except UnicodeDecodeError as error:
            # error.object is the block, after what was left undecoded of the one before it.
            at = n_read - len(error.object) + error.start
            where = f'{source.name} is not UTF-8 text: byte {at:,}'
            raise UserError(f'{where} cannot be decoded.') from None


def next_text(blocks, length):
    """Return the next characters, at least so many, '' at the end.

    A caller whose text has no end yet searches it again. If it asks for as much as it has, the text
    doubles each time, so that one endless line takes linear time.
    """
    parts = []
    n_read = 0
    for block in blocks:
        parts.append(block)
        n_read += len(block)
        if n_read >= length:
            break
    return ''.join(parts)


def read_text(source):
    """Read a text file, a block at a time; lines of END_OF_TEXT divide it into documents."""
    blocks = read_blocks(source)
    rest = ''  # decoded, but not yielded yet
    shortest = PIECE // 4  # worth cutting: a character has up to four bytes
    wanted = 1
    is_inside = False  # a document whose beginning has been yielded
    while block := next_text(blocks, wanted):
        *complete, rest = SEPARATOR.split(rest + block)
        for text in complete:
            yield text, True
            is_inside = False

        if len(rest) > shortest and (cut := CUT.match(rest)):
            yield rest[: cut.end()], False
            rest = rest[cut.end() :]
            is_inside = True
        # A long rest has been searched for a place to cut it, in vain.
        wanted = len(rest) if len(rest) > shortest else 1
    if rest or is_inside:
        yield LAST_SEPARATOR.sub('', rest), True


# -----------------------------------------------------------------------------
# tables


def read_table(source, column):
    """Read a table's column of texts, each a document; '' for a row without text.

    Raises UserError where a row holds something else, and when no row has the column.
    """
    suffix, _ = kind_of(source.name)
    unit = 'line' if suffix in LINES else 'row'
    place = f'{source.name}, {unit}'
    first = None  # row
    is_known = False  # the column
    for number, row in TABLES[suffix](source, column):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise UserError(f'{place} {number:,} holds {kind}, not {{"{column}": "a text"}}.')
        first = first or row
        is_known = is_known or column in row
        if not is_known and number >= UNKNOWN_ROWS:
            break
        text = row.get(column)
        if not isinstance(text, str | None):
            kind = type(text).__name__
            raise UserError(f"{place} {number:,}: the column '{column}' holds {kind}, not text.")
        yield replace_surrogates(text or ''), True
    if first is not None and not is_known:
        refuse_column(source, column, first)


def refuse_column(source, column, columns):
    listed = ', '.join(map(str, columns))[:100]
    raise UserError(f"{source.name} has no column '{column}' but {listed}: use --text_column.")


def replace_surrogates(text):
    """Join the surrogates of a pair; one that is alone, which is no character, becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return text


def read_lines(source):
    """Read the lines of a table, (number, text with its line end), without a byte order mark."""
    number = 1
    parts = []  # of a line that has not ended
    for block in read_blocks(source):
        if number == 1 and not parts:
            block = block.removeprefix('\ufeff')
        *lines, rest = block.split('\n')
        for line in lines:
            yield number, ''.join([*parts, line, '\n'])
            parts = []
            number += 1
        parts.append(rest)
    if any(parts):
        yield number, ''.join(parts)


def read_json_lines(source, column):
    """Read the values of a file that has one per line."""
    for number, line in read_lines(source):
        if line.strip():
            try:
                value = JSON.decode(line)
            except ValueError as error:
                where = f'{source.name} cannot be read: line {number:,}'
                raise UserError(f'{where} is no JSON ({error}).') from None
            yield number, value


def read_json(source, column):
    """Read the values of a list, or of a file with one value after the other."""
    decode = JSON.raw_decode
    blocks = read_blocks(source)
    stripped = (block.lstrip('\ufeff \t\r\n') for block in blocks)
    text = next(filter(None, stripped), '')  # the first block that has any
    is_list = text.startswith('[')
    at = 1 if is_list else 0
    number = 1
    while True:
        at = JSON_GAP.match(text, at).end()
        try:
            value, at = decode(text, at)
        except ValueError as error:
            # A value that is cut off ends in a string, or at about the place of the error: no word
            # of JSON is as long as that.
            is_cut_off = 'Unterminated' in str(error) or error.pos > len(text) - 20
            block = next_text(blocks, len(text) - at + 1) if is_cut_off else ''
            if not block:
                break
            text = text[at:] + block
            at = 0
            continue
        yield number, value
        number += 1
    ends = text[at:].rstrip() == (']' if is_list else '')
    if not ends or any(block.strip() for block in blocks):
        where = f'{source.name} cannot be read: row {number:,}'
        raise UserError(f'{where} is no JSON, or the file ends in it.')


def read_csv(source, column):
    """Read the rows of a table whose first line names the columns."""
    csv.field_size_limit(2**31 - 1)  # what Windows has as a long
    dialect = 'excel-tab' if kind_of(source.name)[0] == '.tsv' else 'excel'
    lines = (line for _, line in read_lines(source))
    reader = csv.reader(lines, dialect, strict=True)
    try:
        header = next(filter(None, reader), None)
        if header and column not in header:
            refuse_column(source, column, header)
        if header and header.count(column) > 1:
            raise UserError(f"{source.name} has several columns '{column}': rename the others.")
        for row in filter(None, reader):  # an empty line is no row
            if len(row) != len(header):
                what = f'has {len(row)} fields, the header {len(header)}'
                how = 'a text with commas or line ends in it stands in "quotes"'
                raise UserError(f'{source.name}, line {reader.line_num:,} {what}: {how}.')
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        where = f'{source.name} cannot be read: line {reader.line_num:,}'
        raise UserError(f'{where}: {error}.') from None


def text_size(source, column):
    """Return the bytes of text in a source, nearly, or None where only reading tells."""
    suffix, compression = kind_of(source.name)
    if compression:
        return None
    if suffix != '.parquet':
        return source.size  # with the other columns of a table
    from pyarrow import parquet

    sizes = []
    with source.open() as file, contextlib.suppress(Exception):  # reading it will say what is wrong
        about = parquet.ParquetFile(file).metadata
        for group in range(about.num_row_groups):
            columns = map(about.row_group(group).column, range(about.num_columns))
            sizes += [c.total_uncompressed_size for c in columns if c.path_in_schema == column]
    return sum(sizes)


def read_parquet(source, column):
    """Read the rows of one column, which alone is read from the disk or the network."""
    from pyarrow import parquet

    with open_decompressed(source) as file:
        table = parquet.ParquetFile(file, buffer_size=PIECE, pre_buffer=False)
        if column not in table.schema_arrow.names:
            refuse_column(source, column, table.schema_arrow.names)
        number = 1
        # Few at a time: books are rows of a megabyte.
        for batch in table.iter_batches(16, columns=[column]):
            for text in batch.column(column).to_pylist():
                yield number, {column: text}
                number += 1


TABLES = {
    '.jsonl': read_json_lines, '.ndjson': read_json_lines, '.json': read_json,
    '.csv': read_csv, '.tsv': read_csv, '.parquet': read_parquet,
}  # fmt: skip
LINES = ('.jsonl', '.ndjson', '.csv', '.tsv')  # whose rows are counted in lines


# -----------------------------------------------------------------------------
# corpora of the Hub


class Corpus(NamedTuple):
    """A corpus of the Hub by name. A split is one that it has, or a pattern of files, a/*.txt."""

    repository: str
    configuration: str | None = None
    split: str = 'train'
    val_split: str | None = None  # None: one of VALIDATION_SPLITS, if there is one
    column: str = 'text'


def open_hub(corpus, streaming):
    """List the sources of a corpus: {'train': [...]}, and 'val' if it has a validation split.

    They are downloaded now or, with streaming, when they are read. Raises UserError if they cannot
    be had.
    """
    import datasets  # noqa: F401  takes a second, and sets how the Hub's client logs

    # It logs errors as well as raising them; ours is one sentence.
    logging.getLogger('huggingface_hub').setLevel(logging.CRITICAL)
    try:
        [splits] = retry(lambda: [find_published(corpus)], corpus.repository, longest_pause=2)
        sources = {}
        for key, urls in splits.items():
            sources[key] = [hub_source(url, streaming) for url in urls]
    except Exception as error:  # the Hub's client raises all kinds
        what = f'{corpus.repository} cannot be loaded from the Hugging Face Hub'
        how = '. Check its name, --subset, --split; a folder of that name is used instead.'
        if is_network_error(error):
            how = GOES_ON
        raise UserError(f'{what} ({brief(error)}){how}') from None
    return sources


def find_published(corpus):
    """Find the files of a corpus: {'train': [a path or an address, ...]}, and 'val' if it has one.

    Raises ValueError for a split that is not there.
    """
    import datasets
    from huggingface_hub import HfApi

    repository, configuration, split, val_split, _ = corpus
    if split == val_split:
        raise ValueError(f"split '{split}' cannot be the one for validation as well")
    if set(split) & set('/*?['):  # patterns of files
        base = repository
        if not os.path.isdir(repository):
            commit = HfApi().dataset_info(repository).sha
            base = f'hf://datasets/{repository}@{commit}'
        patterns = {'train': split, 'val': val_split}
        patterns = {key: f'{base}/{name}' for key, name in patterns.items() if name}
        builder = datasets.load_dataset_builder('text', data_files=patterns)
        found = dict(builder.config.data_files)
        # The last of all files may be the validation split.
        found['train'] = [file for file in found['train'] if file not in found.get('val', [])]
        for key, files in found.items():
            if not files:
                raise ValueError(f'no file is {patterns[key]}')
        return found

    found = datasets.load_dataset_builder(repository, configuration).config.data_files
    for name in (split, val_split or split):
        if name not in found:
            raise ValueError(f"there is no split '{name}' but {', '.join(map(str, found))}")
    likely = [name for name in VALIDATION_SPLITS if name in found and name != split]
    val_split = val_split or next(iter(likely), None)
    splits = {'train': found[split]}
    if val_split:
        splits['val'] = found[val_split]
    return splits


def hub_source(url, streaming):
    """Describe a file of the Hub, downloaded unless it is streamed, or of a folder in its place."""
    match = HUB_URL.fullmatch(url)
    if not match:
        return local_source(url)
    from huggingface_hub import HfFileSystem, hf_hub_download

    repository, revision, path = match.groups()
    name = f'{repository}/{path}'
    hub = HfFileSystem()
    about = hub.info(url)
    if streaming:
        open_file = partial(hub.open, url, 'rb')
    else:
        where = {'repo_type': 'dataset', 'revision': revision}
        [local] = retry(lambda: [hf_hub_download(repository, path, **where)], name)
        open_file = partial(open, local, 'rb')
    return Source(name, open_file, about['size'], about['blob_id'], streaming)


def retry(read, what, longest_pause=LONGEST_PAUSE):
    """Yield what read() yields. If the network fails, wait, read again and skip what was there.

    The pauses grow from a second to the longest, and begin anew with whatever comes.
    """
    n_done = 0
    pause = 1
    while True:
        try:
            for item in itertools.islice(read(), n_done, None):
                n_done += 1
                pause = 1
                yield item
            return
        except Exception as error:
            if pause > longest_pause or not is_network_error(error):
                raise
            print(f'Note: {what}: {brief(error)}; trying again in {pause} s.', flush=True)
        time.sleep(pause)
        pause *= 2


def is_network_error(error):
    """Tell whether it may help to try again: the Hub is not at fault, or only for now."""
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    # By name: huggingface_hub has changed its library of HTTP before.
    names = {base.__name__ for base in type(error).__mro__}
    if names & {'TransportError', 'ConnectionError', 'TimeoutError', 'ClientError'}:
        return True
    # A file that is not in the cache: the cause says why it was not fetched.
    return error.__cause__ is not None and is_network_error(error.__cause__)


# -----------------------------------------------------------------------------
# parts: what is read from its beginning to its end, and can be skipped as a whole


def make_parts(sources):
    """Group sources into parts, lists of them. A document belongs to one part."""
    if sources and all(map(is_wikitext, sources)):
        return [sources]  # an article may go on in the next file
    return [[source] for source in sources]


def is_wikitext(source):
    return f'{WIKITEXT}/' in source.name and source.name.endswith('.parquet')


def read_part(part, column):
    """Read the sources of a part, one after the other: pieces, and (None, True) for a blank text.

    A text is blank if it is nothing but white space.
    """
    pieces = itertools.chain.from_iterable(read_source(source, column) for source in part)
    if all(map(is_wikitext, part)):
        pieces = join_articles(pieces)
    is_inside = False  # a document of which some text has been read
    blank = []  # pieces of white space that a document begins with
    for text, ends in pieces:
        if not is_inside and (not text or text.isspace()):
            blank.append(text)
            if ends:
                blank = []
                yield None, True
            continue
        for each in blank:
            yield each, False
        blank = []
        yield text, ends
        is_inside = not ends


def join_articles(rows):
    """Read WikiText, which has a line per row, as articles, each a document.

    An article begins at a ` = Title = ` that follows a blank line.
    """
    article = []
    for text, _ in rows:
        line = text or '\n'
        after_blank_line = not article or not article[-1].strip()
        if after_blank_line and HEADING.fullmatch(line):
            yield ''.join(article), True
            article = []
        article.append(line)
    yield ''.join(article), True

"""Files of all kinds, read as Python's own modules read them, and what prepare.py says of them.

Random tables, whole and damaged, are compared with csv, json and pyarrow, which have the whole file
at once. Of each kind of file that went wrong once there are some neighbours, with what is right
written down.
"""

import bz2
import collections
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import pytest
from conftest import ROOT, TEXT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from test_prepare import documents_of, read_both

import sources
import tokenizer as tk
from runtime import UserError

END = tk.END_OF_TEXT


def read(path, column='text'):
    """The documents of a file, a list, or the sentence with which it is refused."""
    documents = []
    parts = []
    try:
        for text, ends in sources.read_source(sources.local_source(path), column):
            parts.append(text)
            if ends:
                documents.append(''.join(parts))
                parts = []
    except UserError as error:
        return str(error)
    assert not parts, 'the last document ends'
    return documents


# -----------------------------------------------------------------------------
# random tables, against readers that have the whole file at once

OPEN = {
    '': open, '.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open,
    '.zst': lambda path, mode: pyarrow.input_stream(path, compression='zstd'),
}  # fmt: skip
COMPRESS = {
    '': bytes, '.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress,
    '.zst': lambda data: zstd(data),
}  # fmt: skip
DELIMITERS = {'.csv': ',', '.tsv': '\t'}


def zstd(data):
    """Compress bytes."""
    return pyarrow.Codec('zstd').compress(data, asbytes=True)


def read_whole(path, column='text'):
    """The documents of a table, read by Python's own modules. Raises anything for another file."""
    suffix, compression = sources.kind_of(path)
    with OPEN[compression](str(path), 'rb') as file:
        data = file.read()
    if suffix == '.parquet':
        table = parquet.ParquetFile(io.BytesIO(data)).read([column], use_threads=False)
        rows = [{column: text} for text in table.column(column).to_pylist()]
    elif suffix in DELIMITERS:
        rows = csv_rows(data.decode().removeprefix('\ufeff'), DELIMITERS[suffix], column)
    else:
        read_values = json_values if suffix == '.json' else json_lines
        rows = read_values(data.decode().removeprefix('\ufeff'))
    assert not rows or any(column in row for row in rows)
    texts = [row.get(column) for row in rows]
    assert all(isinstance(text, str | None) for text in texts)
    return [re.sub('[\ud800-\udfff]', '\ufffd', text or '') for text in texts]


def csv_rows(text, delimiter, column):
    """The rows of a table with a header."""
    lines = io.StringIO(text, newline='')
    rows = [row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row]
    header = rows.pop(0) if rows else [column]
    assert header.count(column) == 1
    return [dict(zip(header, row, strict=True)) for row in rows]


def json_lines(text):
    """The values of a file with one per line."""
    return [json.loads(line) for line in text.split('\n') if line.strip()]


def json_values(text):
    """The values of a list, or of a file that has one after the other; commas may be anywhere."""
    try:
        value = json.loads(text)
        return value if isinstance(value, list) else [value]
    except ValueError:
        decoder = json.JSONDecoder()
    text = text.strip()
    if text.startswith('['):
        assert text.endswith(']')
        text = text[1:-1]
    values = []
    while text := text.lstrip(' \t\r\n,\v\f\x1c\x1d\x1e\x1f\x85\xa0\u2028\u3000'):
        value, at = decoder.raw_decode(text)
        values.append(value)
        text = text[at:]
    return values


def may_be_refused(path):
    """Tell whether a table has line ends of old, or is one that is not read from its beginning."""
    suffix, compression = sources.kind_of(path)
    with OPEN[compression](str(path), 'rb') as file:
        odd_line_end = suffix in DELIMITERS and re.search(rb'\r(?!\n)', file.read())
    return odd_line_end or (suffix, compression) == ('.parquet', '.zst')


# What may be in a cell, or a key, besides random characters.
ODD = [' ', '\n', '\r\n', '"', '""', ',', '\t', '\\', "'", '\0', '\x1c', '\x85', '\u2028', '\u3000']
ODD += ['\ufeff', '\ufffd', 'é', '字', '😀', 'NA', '12', 'null', '{"text": "x"}', END, f'{END}\n']
CELLS = st.lists(st.sampled_from(ODD) | st.text(max_size=4), max_size=6).map(''.join)
HALVES = ['\ud800', '\udbff', '\udc00', '\udfff', '\ud83d', '\ude00']
HALF_CELLS = st.lists(st.sampled_from(HALVES) | CELLS, max_size=4).map(''.join)
NAMES = st.sampled_from(['id', 'Text', ' text', 'text.', 'a.b', '', '"', 'one\ntwo', 'é', '\ufeff'])
# Values of other columns.
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | HALF_CELLS
OTHERS = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)
)
SOMETIMES = st.sampled_from([False] * 9 + [True])  # what most tables do not have


@st.composite
def separated_tables(draw, suffix):
    """The bytes of a .csv or .tsv."""
    names = draw(st.lists(NAMES, max_size=3))
    at = draw(st.integers(0, len(names)))
    names.insert(at, 'text')
    if draw(SOMETIMES):
        names = draw(st.lists(NAMES | st.just('text'), max_size=3))
    rows = draw(st.lists(st.lists(CELLS, min_size=len(names), max_size=len(names)), max_size=6))
    if draw(SOMETIMES):
        rows += draw(st.lists(st.lists(CELLS, max_size=4), max_size=2))
    ends = draw(st.sampled_from(['\n', '\r\n', '\n', '\r\n', '\r']))
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    text = io.StringIO(newline='')
    writer = csv.writer(text, delimiter=DELIMITERS[suffix], lineterminator=ends, quoting=quoting)
    for row in [names, *rows]:
        if draw(SOMETIMES):
            text.write(ends)
        if row:
            writer.writerow(row)
    written = text.getvalue()
    if draw(SOMETIMES):
        written = written.removesuffix(ends)
    return written.encode()


@st.composite
def json_objects(draw):
    """A JSON object as text: its keys may be there twice, or not at all."""
    pairs = draw(st.lists(st.tuples(NAMES, OTHERS), max_size=3))
    texts = st.one_of(*[CELLS] * 6, HALF_CELLS, st.none())
    for _ in range(draw(st.sampled_from([1, 1, 1, 1, 1, 1, 2, 0]))):
        at = draw(st.integers(0, len(pairs)))
        pairs.insert(at, ('text', draw(texts)))
    options = {'ensure_ascii': draw(st.sampled_from([True, True, True, False]))}
    members = []
    for name, value in pairs:
        key = json.dumps(name, **options)
        members.append(f'{key}: {json.dumps(value, **options)}')
    return '{' + ', '.join(members) + '}'


@st.composite
def json_tables(draw, suffix):
    """The bytes of a .json, .jsonl or .ndjson."""
    others = OTHERS.map(json.dumps) if draw(SOMETIMES) else json_objects()
    rows = draw(st.lists(json_objects(), max_size=6))
    if draw(SOMETIMES):
        rows += [draw(others)]
    ends = draw(st.sampled_from(['\n', '\r\n', '\n\n', '\r\n\r\n \n']))
    if suffix != '.json':
        text = ends.join(rows)
    elif draw(st.booleans()):
        text = f'[{f",{ends}".join(rows)}]'
        if draw(st.booleans()):
            indent = draw(st.sampled_from([None, 1, 4, '\t']))
            text = json.dumps(json.loads(text), indent=indent)
    else:
        text = draw(st.sampled_from(['\n', '', ' ', ', '])).join(rows)
    if draw(st.booleans()):
        text += ends
    return text.encode(errors='surrogatepass')


TYPES = [pyarrow.string(), pyarrow.large_string()]
TYPES.append(pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
COLUMNS = [
    (pyarrow.int64(), 3), (pyarrow.list_(pyarrow.string()), ['a']), (pyarrow.null(), None),
    (pyarrow.binary(), b'\xff'), (pyarrow.struct({'text': pyarrow.string()}), {'text': 'wrong'}),
]  # fmt: skip


@st.composite
def parquet_tables(draw, suffix):
    """The bytes of a .parquet."""
    cells = draw(st.lists(CELLS | st.none(), max_size=30))
    names = draw(st.lists(NAMES, max_size=3))
    arrays = []
    for _ in names:
        kind, value = draw(st.sampled_from(COLUMNS))
        arrays.append(pyarrow.array([value] * len(cells), kind))
    at = draw(st.integers(0, len(names)))
    names.insert(at, 'text')
    arrays.insert(at, pyarrow.array(cells, draw(st.sampled_from(TYPES))))
    if cells and draw(SOMETIMES):
        names[draw(st.integers(0, len(names) - 1))] = draw(NAMES | st.just('text'))
    options = {'row_group_size': draw(st.sampled_from([1, 7, 1000]))}
    options['compression'] = draw(st.sampled_from(['none', 'snappy', 'gzip', 'zstd', 'brotli']))
    options['data_page_version'] = draw(st.sampled_from(['1.0', '2.0']))
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(arrays, names), file, **options)
    return file.getvalue()


PLACES = st.floats(0, 1, exclude_max=True)
CHANGES = st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=1, max_size=3)
DAMAGE = st.one_of(*[st.none()] * 6, PLACES, CHANGES)


def damage(data, how):
    """Cut bytes off (how: which share to keep), change some (how: where and into what), or not."""
    if isinstance(how, float):
        return data[: int(how * len(data))]
    data = bytearray(data)
    for place, byte in how or []:
        if data:
            data[int(place * len(data))] = byte
    return bytes(data)


KINDS = {
    '.csv': (separated_tables, 200), '.tsv': (separated_tables, 100), '.json': (json_tables, 200),
    '.jsonl': (json_tables, 200), '.ndjson': (json_tables, 100), '.parquet': (parquet_tables, 200),
}  # fmt: skip


@pytest.mark.parametrize('suffix', KINDS)
def test_a_random_table_is_read_as_a_whole_file_would_be(suffix):
    tables, examples = KINDS[suffix]
    outcomes = collections.Counter()
    folder = tempfile.TemporaryDirectory()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        tables(suffix), DAMAGE, DAMAGE, st.one_of(st.just(''), st.sampled_from([*COMPRESS])),
        st.booleans(), st.sampled_from([7, 8, 9, 13, 50, 2**20]),
    )  # fmt: skip
    def check(data, before, after, compression, has_mark, piece):
        if has_mark and suffix != '.parquet':
            data = b'\xef\xbb\xbf' + data
        path = Path(folder.name, f'x{suffix}{compression}')
        path.write_bytes(damage(COMPRESS[compression](damage(data, before)), after))
        try:
            expected = read_whole(path)
        except Exception:  # whatever it is, it is no such table
            expected = None
        with mock.patch.object(sources, 'PIECE', piece):
            found = read(path)
        is_refused = isinstance(found, str)
        outcomes['refused' if is_refused else 'read'] += 1
        if is_refused:
            assert path.name in found and len(found) < 600, found
        if expected is not None and not may_be_refused(path):
            assert found == expected
        elif not is_refused:
            assert found == expected, 'another text'

    with folder:
        check()
    assert sum(outcomes.values()) >= examples
    assert min(outcomes['read'], outcomes['refused']) > 0.1 * examples, outcomes


# -----------------------------------------------------------------------------
# random texts

TEXT_PARTS = [END, f'\n{END}\n', f'{END}\r\n', END[:9], END[9:], '\n', '\r\n', ' ', '\t', 'word']
TEXT_PARTS += ['.', '字', '。', '\u3000', '\x85', '\u2028', '\x0c', '\r', '\ufeff', '😀', ' \n' * 9]


def divide(text):
    """The documents of a text, line by line. A last separator has none behind it."""
    documents = ['']
    for line in text.split('\n'):
        if line.rstrip('\r').rstrip(' \t') == END and not line.endswith('\r\r'):
            documents.append('')
        else:
            documents[-1] += line + '\n'
    last = documents.pop()
    if last not in ('', '\n'):
        documents.append(last.removesuffix('\n'))
    return documents


@settings(deadline=None, max_examples=300, derandomize=True, database=None)
@given(st.lists(st.sampled_from(TEXT_PARTS) | st.text(max_size=3)), st.sampled_from([7, 20, 2**20]))
def test_a_random_text_is_divided_at_its_separators(parts, piece):
    text = ''.join(parts)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sources, 'PIECE', piece):
        path = Path(folder, 'x.txt')
        path.write_bytes(text.encode())
        assert read(path) == divide(text)


def test_no_white_space_is_longer_than_tokenizers_can_take(monkeypatch):
    monkeypatch.setattr(sources, 'MOST_SPACES', 50)
    monkeypatch.setattr(sources, 'LONG_SPACE', re.compile(r'(?<!\s)\s{50,}'))
    rng = random.Random(1)
    n_cut = 0
    for _ in range(500):
        spaces = [' \n'[rng.randrange(2)] * rng.choice([1, 2, 49, 50, 51, 120]) for _ in range(9)]
        text = ''.join(space + 'x' * rng.randrange(1, 30) for space in spaces)[rng.randrange(60) :]
        pieces = list(sources.cut_spaces([(text, True)]))
        assert ''.join(piece for piece, _ in pieces) == text
        assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
        longest = max(len(space) for space in re.findall(r'\s+', text))
        assert len(pieces) > 1 if longest > 50 else len(pieces) == 1
        assert not [piece for piece, _ in pieces if re.search(r'\s{51}', piece)]
        n_cut += len(pieces) > 1
    assert 0 < n_cut < 500


@pytest.mark.parametrize('name', ['x.txt', 'x.jsonl', 'x.csv.gz', 'x.json'])
def test_the_byte_that_is_no_text_is_named(tmp_path, monkeypatch, name):
    rng = random.Random(1)
    row = '{"text": "aé字😀"}\n' if 'json' in name else 'aé字😀\n'
    whole = ('text\n' + 9 * row if 'csv' in name else 9 * row).encode()
    for number in range(10, len(whole)):
        data = whole[:number]  # it may end within a character
        if number % 2:
            data += rng.choice([b'\xff', b'\x80', b'\xed\xa0\x80', b'\xc3']) + whole[number:]
        try:
            data.decode()
            continue
        except UnicodeDecodeError as error:
            at = error.start
        compression = sources.kind_of(name)[1]
        (tmp_path / name).write_bytes(COMPRESS[compression](data))
        monkeypatch.setattr(sources, 'PIECE', rng.choice([7, 50, 2**20]))
        message = f'{name} is not UTF-8 text: byte {at:,} cannot be decoded.'
        assert read(tmp_path / name).endswith(message)


# -----------------------------------------------------------------------------
# tables: rows that do not fit, other columns

THREE = ['First text', 'Second, with a comma', 'Third "quoted"\nof two lines']


@pytest.mark.parametrize(
    ('name', 'text', 'line', 'counts'),
    [
        ('trailing.csv', 'text,label\nfirst text,1,\nsecond text,2,\n', 2, (3, 2)),
        ('trailing.csv', 'label,text\n1,first text,\n2,second text,\n', 2, (3, 2)),
        ('commas.csv', 'text\nHello, world. A day.\nNo comma here\nAnother, one\n', 2, (2, 1)),
        ('late.csv', 'text\nNo comma here\n\n"In, quotes"\nAnother, one\n', 5, (2, 1)),
        ('few.csv', 'id,text,label\n1,"two\nlines\nthree",a\n2,b\n', 5, (2, 3)),
        ('other.csv', '\ufefftext;label\r\nfirst, text;1\r\n', None, None),
        ('trailing.tsv', 'text\tlabel\nfirst text\t1\t\n', 2, (3, 2)),
        ('tabs.TSV', 'text\r\nOne\r\nTwo\tor three\r\n', 3, (2, 1)),
        ('few.tsv.gz', 'id\ttext\n1\tOne\n\n\n2\n', 5, (1, 2)),
    ],
)
def test_a_row_that_does_not_fit_its_header_is_refused(tmp_path, name, text, line, counts):
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
    found = read(tmp_path / name)
    if line is None:
        assert found == f"{tmp_path / name} has no column 'text' but text;label: use --text_column."
    else:
        n_fields, n_columns = counts
        assert f'{name}, line {line} has {n_fields} fields, the header {n_columns}: ' in found


@pytest.mark.parametrize(
    ('name', 'text', 'expected'),
    [
        ('both.csv', 'text,label,\nfirst text,1,\nsecond text,2,\n', ['first text', 'second text']),
        ('index.csv', ',text\n0,first\n1,second\n', ['first', 'second']),
        ('quoted.csv', '"text","a"\r\n"Hello, ""world""\r\n","1"\r\n', ['Hello, "world"\r\n']),
        ('spaces.csv', 'text,a\n  two  ,1\n" ,",\n', ['  two  ', ' ,']),
        ('blank.csv', '\n\ntext\n\none\n\r\n""\ntwo', ['one', '', 'two']),
        ('header.csv', 'text,label\n', []),
        ('tabs.tsv', 'a\ttext\n1,5\t1,5\n\t"a\tb"\n', ['1,5', 'a\tb']),
        ('twice.csv', 'a,text,a\n1,one,3\n', ['one']),
        ('two.json', '{"text": "one"}{"text": "two"}\n', ['one', 'two']),
        ('one.json', '\ufeff\n{\n "text": "one",\n "b": [1]\n}\n', ['one']),
        ('null.jsonl', '\r\n{"text": null}\r\n\r\n{"b": 1}\r\n{"text": ""}', ['', '', '']),
        ('last.ndjson', '{"text": "a", "text": "b", "c": {"text": "d"}}', ['b']),
        ('line.jsonl', '{"text": "a\u2028b\u2029\x85c"}\n', ['a\u2028b\u2029\x85c']),
        ('none.json', ' [ ] ', []),
        ('empty.csv', '', []),
        ('mark.jsonl', '\ufeff', []),
    ],
)
def test_what_is_right_is_read_to_the_letter(tmp_path, name, text, expected):
    (tmp_path / name).write_bytes(text.encode())
    assert read(tmp_path / name) == expected


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('open.csv', 'text,a\n"one,1\ntwo,2\n', 'open.csv cannot be read: line 3: unexpected end'),
        ('after.csv', 'text,a\n"one" two,1\n', "after.csv cannot be read: line 2: ',' expected"),
        ('twice.csv', 'text,a,text\n1,2,3\n', "twice.csv has several columns 'text': rename"),
        ('head.csv', 'Hello,1\nyou,2\n', "head.csv has no column 'text' but Hello, 1: use"),
        ('list.json', '{"text": ["a", "b"]}', "list.json, row 1: the column 'text' holds list,"),
        ('deep.json', '[[{"text": "a"}]]', 'deep.json, row 1 holds list, not {"text": "a text"}'),
        ('cut.json', '[{"text": "a"}, {"text": "b"', 'cut.json cannot be read: row 2 is no JSON'),
        ('open.json', '[{"text": "a"}', 'open.json cannot be read: row 2 is no JSON, or the file'),
        ('more.json', '[{"text": "a"}] {"text": "b"}', 'more.json cannot be read: row 2 is no'),
        ('word.jsonl', '{"text": "a"}\n\nb\n', 'word.jsonl cannot be read: line 3 is no JSON ('),
        ('int.jsonl', '{"text": "a"}\n{"text": 1}', "int.jsonl, line 2: the column 'text' holds"),
        ('bare.ndjson', '"a text"\n', 'bare.ndjson, line 1 holds str, not {"text": "a text"}.'),
        ('none.jsonl', '{"a": 1, "b": 2}\n', "none.jsonl has no column 'text' but a, b: use"),
        ('half.jsonl', '{"text": "a"}\n{"text": "b', 'half.jsonl cannot be read: line 2 is no'),
    ],
)
def test_a_table_that_is_wrong_is_refused_by_its_place(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text.encode())
    found = read(tmp_path / name)
    assert isinstance(found, str) and f'/{message}' in found
    assert not found.count('\n')


@pytest.mark.parametrize('n_spaces', [0, 19, 20, 1000, 2**21])
def test_nothing_may_follow_a_list(tmp_path, n_spaces):
    for rest in ('{"text": "b"}', '[{"text": "b"}]', ']', 'x'):
        (tmp_path / 'x.json').write_text('[{"text": "a"}]' + n_spaces * '\n' + rest)
        found = read(tmp_path / 'x.json')
        assert isinstance(found, str) and 'row 2 is no JSON' in found, rest
    (tmp_path / 'x.json').write_text(n_spaces * ' ' + '[{"text": "a"}' + n_spaces * ' ' + ']')
    assert read(tmp_path / 'x.json') == ['a']


# Values of other columns of a table, row by row, in JSON.
CHANGING = ['1', '"x"', 'null', '[]', '["a"]', '{}', '{"text": "wrong"}', '1e999', '-0.0', 'true']
CHANGING += ['"\\ud800"', '[{"text": []}]', '"a,b\\n\\"c"', f'"{END}"', '[[[[[[[]]]]]]]', 'NaN']
CHANGING += ['-Infinity', '1' * 5000, f'-0.{"1" * 5000}', '"' + 'long ' * 500 + '"']


@pytest.mark.parametrize('name', ['x.jsonl', 'x.ndjson', 'x.json', 'x.csv', 'x.tsv', 'x.json.gz'])
def test_other_columns_may_hold_anything(tmp_path, monkeypatch, name):
    texts = [f'Text {n}, "as it is"\n' for n in range(3 * len(CHANGING))]
    pairs = [*zip(CHANGING * 3, texts, strict=True)]
    suffix, compression = sources.kind_of(name)
    if suffix in DELIMITERS:
        file = io.StringIO(newline='')
        csv.writer(file, delimiter=DELIMITERS[suffix]).writerows([('other', 'text'), *pairs])
        data = file.getvalue()
    else:
        lines = [f'{{"other": {value}, "text": {json.dumps(text)}}}' for value, text in pairs]
        data = f'[{", ".join(lines)}]' if suffix == '.json' else '\n'.join(lines)
    (tmp_path / name).write_bytes(COMPRESS[compression](data.encode()))
    for piece in (9, 100, 2**20):
        monkeypatch.setattr(sources, 'PIECE', piece)
        assert read(tmp_path / name) == texts


LOREM = 'lorem ipsum ' * 900
LATER = {
    'tags': lambda late: {'tags': ['a'] if late else []},
    'id': lambda late: {'id': 'x' if late else 1},
    'later': lambda late: {'meta': {'k': 1}} if late else {},
    'nested': lambda late: {'meta': {'k': [1] if late else 'none'}},
    'text': lambda late: {'title': None if late else {'text': 'wrong'}},
}


@pytest.mark.parametrize('name', ['x.jsonl', 'x.json'])
@pytest.mark.parametrize('what', LATER)
def test_other_columns_may_change_after_10_megabytes(tmp_path, what, name):
    texts = [f'{LOREM}{n}' for n in range(1300)]
    rows = []
    for number, text in enumerate(texts):
        rows.append({'text': text} | LATER[what](number >= 1200))
    joined = '\n'.join(map(json.dumps, rows))
    (tmp_path / name).write_text(joined)
    assert len(joined) > 12_000_000
    assert read(tmp_path / name) == texts


class Counted(io.FileIO):
    """A file that counts the bytes that are read of it, for all of its kind."""

    n_bytes = 0

    def read(self, *args):
        data = super().read(*args)
        Counted.n_bytes += len(data)
        return data


def test_other_columns_of_a_parquet_file_are_not_read(tmp_path):
    texts = [f'Text {n}' for n in range(3000)]
    noise = [random.Random(n).randbytes(3000) for n in range(3000)]
    columns = {'image': noise, 'text': texts, 'text.bytes': noise, 'meta': [{'text': b'a'}] * 3000}
    path = tmp_path / 'x.parquet'
    parquet.write_table(pyarrow.table(columns), path, row_group_size=1000)

    # They may even be damaged.
    data = bytearray(path.read_bytes())
    about = parquet.ParquetFile(path).metadata
    for group in range(about.num_row_groups):
        for column in range(about.num_columns):
            chunk = about.row_group(group).column(column)
            if chunk.path_in_schema != 'text':
                start = min(chunk.data_page_offset, chunk.dictionary_page_offset or 2**60)
                stop = start + chunk.total_compressed_size
                data[start:stop] = b'\xff' * (stop - start)
    path.write_bytes(data)
    source = sources.local_source(path)._replace(open=lambda: Counted(path))
    found = [text for text, ends in sources.read_source(source, 'text') if ends]
    assert found == texts
    assert 30_000 < Counted.n_bytes < 1_000_000 < len(data) / 10


@pytest.mark.parametrize(
    ('column', 'texts', 'message'),
    [
        ('body', ['a'], "has no column 'body' but text, id, a.b: use --text_column."),
        ('id', ['a'], "row 1: the column 'id' holds int, not text."),
        ('text', [b'a', b'b'], "row 1: the column 'text' holds bytes, not text."),
        ('text', [['a'], []], "row 1: the column 'text' holds list, not text."),
        ('text', [None, {'x': 'a'}], "row 2: the column 'text' holds dict, not text."),
        ('a.b', ['a'], None),
    ],
)
def test_a_column_of_a_parquet_file_is_texts_or_refused(tmp_path, column, texts, message):
    columns = {'text': texts, 'id': range(len(texts)), 'a.b': ['right'] * len(texts)}
    path = tmp_path / 'x.parquet'
    parquet.write_table(pyarrow.table(columns), path)
    found = read(path, column)
    if message:
        assert found.startswith(f'{path}') and found.endswith(message)
    else:
        assert found == ['right']


def test_a_column_that_comes_late_or_never(tmp_path):
    path = tmp_path / 'x.jsonl'
    n = sources.UNKNOWN_ROWS - 1
    path.write_text('{"a": 1}\n' * n + '{"text": "late"}\n{"text": null}\n')
    assert read(path) == [''] * n + ['late', '']
    path.write_text('{"a": 1}\n' * (n + 1) + '{"text": "late"}\n')
    assert read(path) == f"{path} has no column 'text' but a: use --text_column."


@pytest.mark.parametrize('compression', [name for name in COMPRESS if name])
def test_a_compressed_file_that_is_cut_is_refused(tmp_path, compression):
    """At any place, even at one between two rows."""
    data = COMPRESS[compression](b'{"text": "a"}\n' * 50)
    path = tmp_path / f'x.jsonl{compression}'
    for end in range(1, len(data)):
        path.write_bytes(data[:end])
        assert f'x.jsonl{compression} cannot be read: ' in read(path), end
    path.write_bytes(data + data)  # as `cat` makes it of two
    assert read(path) == ['a'] * 100


# -----------------------------------------------------------------------------
# long texts: white space, languages without spaces

MANY = 1_200_000
WHITE = {
    'spaces.txt': ' ' * MANY,
    'lines.txt': '\n' * MANY,
    'mixed.txt': ' \n\t\r\n\u3000\x85' * (MANY // 7),
    'wide.txt': '\u3000' * MANY,
    'cell.csv': ' \n' * (MANY // 2),
}


@pytest.mark.parametrize('tokenizer', ['gpt2', 'bpe', 'byte'])
def test_a_million_white_space_characters_come_back(run, tmp_path, tokenizer):
    folder = tmp_path / 'white'
    folder.mkdir()
    texts = []
    for name, white in WHITE.items():
        texts.append(f'A line of words here.\n{name}{white}more\n')
        data = f'text\n"{texts[-1]}"\n' if name.endswith('.csv') else texts[-1]
        (folder / name).write_bytes(data.encode())
    flags = [f'--tokenizer={tokenizer}', '--vocab_size=300', '--val_fraction=0.3']
    result = run('prepare.py', '--input=white', *flags)
    assert result.code == 0, result.err
    found = documents_of(tmp_path / 'data' / 'white')
    assert sorted(found['train'] + found['val']) == sorted(texts)


def test_a_text_of_nothing_but_white_space_is_blank(run, tmp_path):
    for n, white in enumerate([' ' * MANY, '\n \u3000' * MANY, ' ', '\n']):
        (tmp_path / f'{n}.txt').write_text(white)
        (tmp_path / f'{n}.jsonl').write_text(json.dumps({'text': white}))
        result = run('prepare.py', f'--input={n}.txt,{n}.jsonl', '--tokenizer=byte')
        assert result.is_one_sentence and 'There is no text in' in result.err, n


CHINESE = '今天天气很好我们去公园散步看见许多人在那里放风筝孩子们跑来跑去笑声不断'
PARAGRAPHS = {
    'chinese': CHINESE,
    'chinese with marks': '今天天气很好，我们去公园散步。看见许多人！孩子们跑来跑去，笑声不断。',
    'japanese': '「吾輩は猫である。」名前はまだ無い。どこで生れたか、とんと見当がつかぬ…',
    'hindi': 'सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।',
    'thai': 'มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผล',
    'korean': '모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.',
    'arabic': 'يولد جميع الناس أحرارا متساوين في الكرامة والحقوق وقد وهبوا عقلا وضميرا.',
    'tamil': 'மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்',
    'english': "He said, “It's 12 o'clock (or 1,300)!” -- and they've left...",
    'code': 'for (int i = 0; i < 10; i++) {\n\tx[i] += 1;\n}',
}
BETWEEN = {
    'a line end': '\n', 'a blank line': '\n\n', 'CRLF': '\r\n', 'a blank CRLF line': '\r\n\r\n',
    'a wide space': '\u3000', 'an indent': '\n\u3000\u3000', 'two blank lines': '\n\n\n',
    'a space': ' ',
}  # fmt: skip


@pytest.mark.parametrize('between', BETWEEN)
@pytest.mark.parametrize('language', PARAGRAPHS)
def test_a_text_of_any_language_is_read_in_bounded_pieces(
    tmp_path, monkeypatch, tokenizers, language, between
):
    monkeypatch.setattr(sources, 'PIECE', 1000)
    paragraph = PARAGRAPHS[language]
    text = ''.join(f'{paragraph}{BETWEEN[between]}' for _ in range(20_000 // len(paragraph)))
    path = tmp_path / 'x.txt'
    path.write_bytes(text.encode())
    pieces = [piece for piece, _ in sources.read_source(sources.local_source(path), 'text')]
    assert ''.join(pieces) == text
    assert max(map(len, pieces)) <= 2000 and len(pieces) >= 10
    for encoding in tokenizers:
        ids = np.concatenate([encoding.encode(piece) for piece in pieces])
        assert ids.tolist() == encoding.encode(text).tolist(), encoding.kind


@pytest.fixture(scope='module')
def tokenizers():
    """One of each kind that knows all these texts."""
    texts = [*PARAGRAPHS.values(), *BETWEEN.values(), TEXT]
    return [tk.build(kind, texts, 600) for kind in tk.KINDS]


# -----------------------------------------------------------------------------
# folders, names, extensions


def write(folder, files):
    """Write files below a folder, {path: text or bytes}."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def prepared(run, tmp_path, *flags):
    """Run prepare.py for a dataset of several documents. Returns them, sorted, and its output."""
    result = run('prepare.py', '--tokenizer=byte', '--name=x', '--val_fraction=0.4', *flags)
    assert result.code == 0, result.err
    found = documents_of(tmp_path / 'data' / 'x')
    return sorted(found['train'] + found['val']), result.out


def notes(out):
    """What prepare.py prints of the files: the lines before the dataset's name."""
    lines = out[: out.index('data/x: ')].splitlines()
    return [line for line in lines if not line.startswith('Note: documents stay whole')]


STUFF = {
    'a.txt': 'a', 'b/b.md': 'b', 'b/c.tsv': 'text\nc\n', 'e.py': 'e', 'b/f.py': 'f',
    'd.NDJSON.GZ': gzip.compress(b'{"text": "d"}\n'),
    'b/g.PY': 'g', 'h.tar.gz': 'h', 'LICENSE': 'i', 'b/Makefile': 'j', 'b/.hidden.txt': 'k',
    '.git/config.txt': 'l', 'm.pdf': 'm', 'n.PDF.xz': 'n', 'o.c': 'o', 'p.text': 'p',
}  # fmt: skip


def test_what_a_folder_has_besides_is_printed(run, tmp_path):
    write(tmp_path / 'stuff', STUFF)
    (tmp_path / 'stuff' / 'gone.txt').symlink_to('nowhere.txt')
    texts, out = prepared(run, tmp_path, '--input=stuff')
    assert texts == ['a', 'b', 'c', 'd']
    first, second = notes(out)
    assert first == 'Note: stuff: 4 files are read, 13 left out:'
    counted, how = second.split('. --')
    counts = [item.split(' ', 1) for item in counted.split(', ')]
    expected = {'.py': 3, 'hidden': 2, 'without an ending': 2, '.pdf': 2}
    found = {what: int(count) for count, what in counts}
    assert found.items() > expected.items() and sorted(found.values()) == [1, 2, 2, 2, 3]
    assert how == 'extensions=.py,.rs says what to take.'

    texts, out = prepared(run, tmp_path, '--input=stuff/a.txt,stuff/b/b.md')
    assert texts == ['a', 'b'] and not notes(out)
    write(tmp_path / 'clean', {'a.txt': 'a', 'b.txt': 'b'})
    assert not notes(prepared(run, tmp_path, '--input=clean')[1])
    _, out = prepared(run, tmp_path, '--input=stuff,clean', '--extensions=.py,.txt')
    assert notes(out)[0] == 'Note: stuff: 4 files are read, 13 left out:' and len(notes(out)) == 2


def test_a_folder_of_other_files_is_one_sentence(run, tmp_path):
    write(tmp_path / 'code', {f'{n}.py': 'x' for n in range(12)} | {'n': '', '.a': ''})
    result = run('prepare.py', '--input=code')
    assert result.is_one_sentence
    assert 'The folder code has no file that ends in .txt, .md, .jsonl' in result.err
    assert 'but 12 .py, 1 hidden, 1 without an ending: name what to take, --ext' in result.err
    result = run('prepare.py', '--input=code', '--extensions=rs,.go')
    assert result.is_one_sentence
    assert 'The folder code has no file that ends in .rs, .go but 12 .py' in result.err
    (tmp_path / 'empty').mkdir()
    result = run('prepare.py', '--input=empty')
    assert result.is_one_sentence and '.parquet: name what' in result.err


@pytest.mark.parametrize(
    ('extensions', 'expected'),
    [
        ('.py,.rs', 'bcdef'), ('py', 'bcd'), ('RS,.Py', 'bcdef'), ('.py, .rs', 'bcdef'),
        ('.rs', 'ef'), ('.txt,.rs,.rs', 'aef'), ('.jsonl,.c', 'ghi'), ('jsonl', 'gh'),
    ],
)  # fmt: skip
def test_extensions_say_which_files_of_a_folder_are_read(run, tmp_path, extensions, expected):
    write(tmp_path / 'in', {'a.txt': 'a', 'b.py': 'b', 'sub/c.PY': 'c', 'e.RS': 'e'})
    write(tmp_path / 'in', {'d.py.gz': gzip.compress(b'd'), 'sub/f.rs.zst': zstd(b'f')})
    write(tmp_path / 'in', {'g.jsonl': '{"text": "g"}\n{"text": "h"}', 'sub/i.c': 'i'})
    wrong = ['x.pyc', '.py', 'py', 'py.x', '.sub/x.py', 'x.rs.bak']
    write(tmp_path / 'in', dict.fromkeys(wrong, 'wrong'))
    texts, _ = prepared(run, tmp_path, '--input=in', f'--extensions={extensions}')
    assert ''.join(texts) == expected


def test_a_folder_that_may_not_be_read_is_one_sentence(run, tmp_path, monkeypatch):
    write(tmp_path, {'in/a.txt': 'a', 'in/b/c.txt': 'c'})
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == 'b':
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    result = run('prepare.py', '--input=in', '--tokenizer=byte')
    assert result.is_one_sentence and 'Permission denied: in/b' in result.err


def test_links_are_followed_and_each_file_is_read_once(run, tmp_path):
    write(tmp_path, {'outside/a.txt': 'a', 'outside/deep/b.txt': 'b', 'in/c.txt': 'c'})
    write(tmp_path, {'in/sub/d.txt': 'd', 'in/.hidden/x.txt': 'x', 'elsewhere/e.txt': 'e'})
    folder = tmp_path / 'in'
    links = {
        'link': '../outside', 'sub/again': '../../outside', 'sub/circle': '..', 'me': '.',
        'sub/self': 'self', 'f.txt': 'c.txt', 'broken': '../nothing', 'broken.txt': 'nothing.txt',
        'e.txt': '../elsewhere/e.txt', '.x': '../elsewhere', 'sub/absolute': str(folder),
    }  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (tmp_path / 'to_in').symlink_to('in')
    (tmp_path / 'outside' / 'deep' / 'back').symlink_to(tmp_path / 'in' / 'sub')
    for paths in ('in', 'in/', './in', 'to_in', 'in,outside,to_in', 'in/me/me/sub/circle'):
        texts, out = prepared(run, tmp_path, f'--input={paths}')
        assert texts == ['a', 'b', 'c', 'd', 'e'], paths
        printed = ' '.join(notes(out))
        assert '3 no file' in printed and '2 hidden' in printed


CONFIGS = """configs:
- config_name: default
  data_files:
  - split: train
    path: a.jsonl
  - split: test
    path: b.jsonl
"""
HEADS = {
    'configs': (f'---\nlanguage:\n- en\n{CONFIGS}---\n# Mine\n', True),
    'dataset_info': (f'---\ndataset_info:\n  config_name: default\n{CONFIGS}---\n', True),
    'in the text': (f'# Mine\n---\n{CONFIGS}---\n', False),
    'after the head': (f'---\nlicense: mit\n---\n# Mine\n\n{CONFIGS}', False),
    'indented': ('---\nmine:\n  configs: none\n---\n', False),
    'empty': ('', False),
}


@pytest.mark.parametrize('head', HEADS)
def test_a_clone_of_a_data_set_of_the_hub_is_noticed(run, tmp_path, head):
    card, is_noticed = HEADS[head]
    rows = {f'{name}.jsonl': f'{{"text": "{name} 1"}}\n{{"text": "{name} 2"}}' for name in 'ab'}
    write(tmp_path / 'clone', {**rows, 'README.md': card})
    texts, out = prepared(run, tmp_path, '--input=clone')
    assert texts[-4:] == ['a 1', 'a 2', 'b 1', 'b 2']
    expected = [
        'Note: clone is a data set of the Hugging Face Hub, and all of it is read, tests',
        'and README.md, too. --dataset=hf:clone reads its training split.',
    ]
    assert notes(out) == (expected if is_noticed else [])
    if is_noticed:
        for folder in ('clone', 'clone/', './clone', tmp_path / 'clone'):
            assert prepared(run, tmp_path, f'--dataset=hf:{folder}')[0] == ['a 1', 'a 2']


ODD_NAMES = ['a[1].txt', 'a::b.jsonl', 'two words.csv', 'naïve.tsv', "it's.md", 'x#y.ndjson']
ODD_NAMES += ['what?.json', '100%.txt', '*.txt', 'a{b}.txt', 'back\\slash.txt', '-dash.txt']
ODD_NAMES += ['$HOME.txt', 'a&b;c.txt', 'hf:me.jsonl', 'http:x.txt', ' space.txt', 'x.csv.txt']
ODD_NAMES += ['one\ntwo.csv']


@pytest.mark.parametrize('name', ODD_NAMES)
def test_any_name_is_a_file_and_no_pattern(run, tmp_path, name):
    suffix, _ = sources.kind_of(name)
    tables = {'.csv': 'text\n{}\n', '.tsv': 'text\n{}\n', '.txt': '{}', '.md': '{}'}
    pattern = tables.get(suffix, '{{"text": "{}"}}')
    wrong = ['a1.txt', 'b.jsonl', 'what1.json', 'a.txt', 'b.txt', f'sub/{name}', 'slash.txt']
    write(tmp_path, dict.fromkeys(wrong, 'wrong'))
    write(tmp_path, {name: pattern.format('right'), 'ok.txt': 'ok'})
    assert prepared(run, tmp_path, f'--input=ok.txt,{name}')[0] == ['ok', 'right']
    write(tmp_path / 'in', {name: pattern.format('right'), 'ok.txt': 'ok'})
    assert prepared(run, tmp_path, '--input=in')[0] == ['ok', 'right']


def test_a_tilde_is_the_home_folder(run, tmp_path, monkeypatch):
    home = tmp_path / 'home'
    monkeypatch.setenv('HOME', str(home))
    write(home, {'a.txt': 'aa', 'in/b.jsonl': '{"text": "bb"}', 'val.txt': 'v' * 9})
    write(home, {'hub/train.jsonl': '{"text": "c"}\n{"text": "d"}'})
    assert prepared(run, tmp_path, '--input=~/a.txt,~/in')[0] == ['aa', 'bb']
    assert prepared(run, tmp_path, '--dataset=hf:~/hub')[0] == ['c', 'd']
    flags = ['--tokenizer=byte', '--val_input=~/val.txt']
    assert run('prepare.py', '--input=~/a.txt', *flags).code == 0
    for name in ('~nobody-of-this-name/a.txt', '~/none.txt', '~nobody'):
        result = run('prepare.py', f'--input=~/a.txt,{name}')
        assert result.is_one_sentence and 'There is no file ' in result.err, result.err


# -----------------------------------------------------------------------------
# validation of one's own


@pytest.fixture
def shelf(tmp_path):
    """Some texts, in a folder too, and links to them."""
    files = {'a.txt': 'a ' * 50, 'b.txt': 'b ' * 40, 'val/v.txt': 'v ' * 30, 'val/w.txt': 'w ' * 20}
    files['val/rows.jsonl'] = '{"text": "row 1"}\n{"text": "row 2"}\n{"text": null}\n'
    write(tmp_path, files)
    (tmp_path / 'link.txt').symlink_to('a.txt')
    (tmp_path / 'val' / 'link.txt').symlink_to('v.txt')
    (tmp_path / 'links').mkdir()
    (tmp_path / 'links' / 'x.txt').symlink_to('../a.txt')
    (tmp_path / 'to_val').symlink_to('val')
    return tmp_path


@pytest.mark.parametrize(
    ('val_input', 'expected'),
    [
        ('val', ['row 1', 'row 2', 'v ' * 30, 'w ' * 20]),
        ('val/v.txt,val/rows.jsonl', ['row 1', 'row 2', 'v ' * 30]),
        ('val/rows.jsonl', ['row 1', 'row 2']),
        ('to_val,val/w.txt', ['row 1', 'row 2', 'v ' * 30, 'w ' * 20]),
    ],
)
@pytest.mark.parametrize('tokenizer', ['byte', 'char', 'bpe'])
@pytest.mark.parametrize('paths', ['a.txt,b.txt', 'a.txt'])
def test_val_input_is_all_of_validation(run, shelf, paths, val_input, expected, tokenizer):
    flags = [f'--tokenizer={tokenizer}', '--vocab_size=300', '--name=x']
    result = run('prepare.py', f'--input={paths}', f'--val_input={val_input}', *flags)
    assert result.code == 0, result.err
    found = documents_of(shelf / 'data' / 'x')
    assert sorted(found['val']) == expected
    assert found['train'] == ['a ' * 50, 'b ' * 40][: paths.count('.txt')]


def test_two_single_texts_have_no_end_of_text(run, shelf):
    flags = ['--input=a.txt', '--val_input=val/v.txt', '--tokenizer=byte', '--name=x']
    assert run('prepare.py', *flags).code == 0
    assert bytes(read_both(shelf / 'data' / 'x').tolist()) == b'a ' * 50 + b'v ' * 30
    meta = json.loads((shelf / 'data' / 'x' / 'meta.json').read_text())
    assert [meta[key]['documents'] for key in ('train', 'val')] == [1, 1]


@pytest.mark.parametrize(
    ('paths', 'val_input'),
    [
        ('a.txt', 'a.txt'), ('a.txt', './a.txt'), ('a.txt', '{here}/a.txt'), ('a.txt', 'link.txt'),
        ('a.txt,val', 'val/v.txt'), ('val', 'to_val'), ('a.txt', 'links'), ('val/v.txt', 'val'),
        ('a.txt', 'val/../a.txt'), ('to_val', 'val/w.txt,b.txt'), ('links', 'link.txt'),
    ],
)  # fmt: skip
def test_a_text_is_not_in_both_splits(run, shelf, paths, val_input):
    val_input = val_input.format(here=shelf)
    result = run('prepare.py', f'--input={paths}', f'--val_input={val_input}', '--tokenizer=byte')
    assert result.is_one_sentence and 'is both in input and in val_input' in result.err, result.err
    assert not (shelf / 'data').exists()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--val_input=none.txt'], 'There is no file none.txt.'),
        (['--val_input=blank.txt'], 'its val split has fewer than 2 tokens'),
        (['--val_input=b.txt', '--val_fraction=0.1'], 'val_fraction and val_input both say what'),
        (['--val_input='], "='' has an empty name"),
        (['--val_input=bad.jsonl'], "bad.jsonl, line 1: the column 'text' holds int, not text."),
    ],
)
def test_val_input_that_is_wrong_is_one_sentence(run, shelf, flags, message):
    write(shelf, {'blank.txt': ' \n', 'bad.jsonl': '{"text": 1}'})
    result = run('prepare.py', '--input=a.txt', '--tokenizer=byte', *flags)
    assert result.is_one_sentence and message in result.err, result.err
    assert not list((shelf / 'data').glob('*'))


# -----------------------------------------------------------------------------
# what is noted, and the report


def test_end_of_text_inside_a_line_is_noted_once_with_its_count(run, tmp_path):
    inline = [f'a {END}\n', f' {END}\nb', f'{END}{END}\n', f'x{END}', f'{END} y\n', f'{END}.\n']
    text = f'\n{END}\n'.join([*inline, 'one\n', 'two\n']) + f'\n{END} \t\r\nthree\n{END}'
    write(tmp_path, {'in/a.txt': text, 'in/b.csv': f'text\n{END}\n"{END}\n{END}"\n'})
    write(tmp_path, {'in/c.jsonl': json.dumps({'text': f'{END}\n', 'other': END})})
    texts, out = prepared(run, tmp_path, '--input=in')
    count = ''.join(texts).count(END)
    assert count == 7 + 4 and len(texts) == 12
    assert notes(out) == [
        f'Note: {END} inside a line or a table is plain text, which it is',
        '11 times. A line of its own, in a text file, ends a document.',
    ]
    write(tmp_path, {'plain.txt': f'one\n{END}\ntwo\n{END}\n'})
    assert not notes(prepared(run, tmp_path, '--input=plain.txt')[1])
    write(tmp_path, {'many.jsonl': f'{{"text": "{END}"}}\n' * 12_345})
    assert '12,345 times. A line' in prepared(run, tmp_path, '--input=many.jsonl')[1]


SURROGATES = {
    r'a \ud800 b': 'a \ufffd b', r'\udc00': '\ufffd', r'a\udbff': 'a\ufffd',
    r'\ude00\ud83d': '\ufffd\ufffd', r'\ud83d\ude00!': '😀!', r'\ud83d\ud83d\ude00': '\ufffd😀',
    r'\ud83dé\ude00': '\ufffdé\ufffd', r'\ufffd \ufeff': '\ufffd \ufeff',
    r'\ufeff\ud800': '\ufeff\ufffd',
}  # fmt: skip


@pytest.mark.parametrize('name', ['x.jsonl', 'x.json', 'x.ndjson.gz'])
def test_a_lone_surrogate_is_replaced_and_counted(run, tmp_path, name):
    rows = [f'{{"text": "{escaped}", "\\ud800": "\\udfff"}}' for escaped in SURROGATES]
    data = f'[{",".join(rows)}]' if name == 'x.json' else '\n'.join(rows)
    compress = COMPRESS[sources.kind_of(name)[1]]
    write(tmp_path, {name: compress(data.encode())})
    texts, out = prepared(run, tmp_path, f'--input={name}')
    assert texts == sorted(SURROGATES.values())
    assert 'odd        0 control characters, 10 that were replaced by U+FFFD\n' in out


@pytest.mark.parametrize(
    ('name', 'text', 'n_blank'),
    [
        ('x.jsonl', '{"text": "a"}\n{"text": null}\n\n{"text": ""}\n{"b": 1}\n{"text": "b"}', 3),
        ('x.jsonl', '{"text": "a"}\n{"text": " \\n\\u3000"}\n{}\n{"text": "b"}', 2),
        ('x.json', '[{"text": "a"}, {"text": "b"}, {"text": "\\t"}]', 1),
        ('x.csv', 'text,b\na,1\n,2\n" ",3\n\n\nb,4\n', 2),
        ('x.tsv', 'text\n""\na\nb\n\n', 1),
        ('x.txt', f'a\n{END}\n\n{END}\n \t\n{END}\n{END}\nb', 3),
        ('x.txt', f'a\n{END}\nb', 0),
        ('x.txt', f'a\n{END}\nb\n{END}\n', 0),
        ('x.txt', f'a\n{END}\nb\n{END}', 0),
        ('x.txt', f'a\n{END}\nb\n{END}\n\n', 1),
    ],
)
def test_what_has_no_text_is_left_out_and_counted(run, tmp_path, name, text, n_blank):
    write(tmp_path, {name: text})
    texts, out = prepared(run, tmp_path, f'--input={name}')
    assert [text.strip() for text in texts] == ['a', 'b']
    found = re.findall(r'^Note: (\d+) rows or documents without text', out, re.MULTILINE)
    assert found == ([str(n_blank)] if n_blank else [])


CONTROLS = ['\0', '\x07', '\x0b', '\x0c', '\x1b', '\x1f', '\x7f', '\x80', '\x85', '\x9f']
NO_CONTROLS = ['\t', '\n', '\r', ' ', '~', '\xa0', '\xad', '\u2028', '\ufeff', '\ufffd', '字']
ROWS = st.lists(st.sampled_from([*CONTROLS, *NO_CONTROLS, 'word ']), max_size=9).map(''.join)


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.lists(ROWS, min_size=3))
def test_the_reports_figures_are_those_of_a_plain_count(run, tmp_path, rows):
    texts = [*rows, 'a', 'bb', 'ccc' * 99]
    data = ''.join(json.dumps({'text': text}) + '\n' for text in texts)
    (tmp_path / 'x.jsonl').write_text(data)
    _, out = prepared(run, tmp_path, '--input=x.jsonl')

    kept = [text for text in texts if text.strip()]
    lengths = [len(text.encode()) for text in kept]
    share = (len(kept) - len(set(kept))) / len(kept)
    n_replaced = ''.join(kept).count('\ufffd')
    controls = []
    for char in ''.join(kept):
        if unicodedata.category(char) == 'Cc' and char not in '\t\n\r':
            controls.append(char)
    lines = out[out.index('data/x: ') :].splitlines()
    expected = [
        f'documents  {len(kept)}, {min(lengths)} to {max(lengths)} tokens each; '
        f'{share:.1%} are copies of one before'
    ]
    note = f'Note: {len(texts) - len(kept)} rows or documents without text are left out.'
    assert (note in out) == (len(kept) < len(texts))
    expected.append(
        f'odd        {len(controls)} control characters, {n_replaced} that were replaced by U+FFFD'
    )
    assert lines[4:-6] == expected
    assert len(lines) <= 15 and max(map(len, lines)) <= 80

    # The pieces of training text that are shown are in it.
    assert lines[-6] == 'Five pieces of the training text, as the model will see them:'
    train = ''.join(f'{text}{END}' for text in documents_of(tmp_path / 'data' / 'x')['train'])
    for line in lines[-5:]:
        shown = line[3:23].strip('\ufffd')  # it may begin within a character
        assert line.startswith(("  '", '  "')) and shown in repr(train)


def test_the_report_is_of_the_text_that_is_kept(run, tmp_path):
    rows = [json.dumps({'text': f'a{number}\0 {END}'}) for number in range(100)]
    write(tmp_path, {'x.jsonl': '\n'.join(rows)})
    _, out = prepared(run, tmp_path, '--input=x.jsonl', '--max_tokens=60')
    meta = json.loads((tmp_path / 'data' / 'x' / 'meta.json').read_text())
    count = sum(meta[key]['documents'] for key in ('train', 'val'))
    assert count < 60 and f'odd        {count} control characters, 0 that' in out
    assert f'\n{count} times. A line of its own' in out


def test_copies_in_many_documents_are_counted(run, tmp_path):
    """Also where a document lies across two of the blocks in which they are counted."""
    rng = random.Random(1)
    texts = [f'{rng.randrange(100)} ' * rng.randrange(1, 20) for _ in range(2000)]
    texts[3] = 'word ' * 900_000
    write(tmp_path, {'x.jsonl': ''.join(json.dumps({'text': text}) + '\n' for text in texts)})
    result = run('prepare.py', '--input=x.jsonl', '--tokenizer=byte')
    share = (len(texts) - len(set(texts))) / len(texts)
    assert 0.2 < share < 0.8
    line = f'documents  2,000, 2 to 4,500,000 tokens each; {share:.1%} are copies of one before\n'
    assert line in result.out


def test_a_single_text_has_no_documents_to_report(run, tmp_path):
    write(tmp_path, {'x.txt': TEXT + '\x1b[1m\x9b\ufffd'})
    result = run('prepare.py', '--input=x.txt', '--vocab_size=300')
    lines = result.out.splitlines()
    assert lines[4] == 'odd        2 control characters, 1 that were replaced by U+FFFD'
    assert len(lines) == 4 + 1 + 6 and max(map(len, lines)) <= 80


def test_quiet_leaves_the_report_out(run, tmp_path):
    write(tmp_path, {'x.jsonl': f'{{"text": "a {END}"}}\n{{"text": "b"}}\n{{"text": ""}}\n'})
    loud = run('prepare.py', '--input=x.jsonl', '--tokenizer=byte').out.splitlines()
    quiet = run('prepare.py', '--input=x.jsonl', '--tokenizer=byte', '--quiet').out.splitlines()
    begin = [line.startswith('data/x: ') for line in loud].index(True)
    assert quiet == loud[: begin + 4] and len(loud) == begin + 4 + 2 + 6
    assert quiet[-4:-2][1].split() == ['split', 'documents', 'bytes', 'tokens', 'bytes/token']
    assert sum('plain text' in line for line in quiet) == 1


# -----------------------------------------------------------------------------
# memory


def peak_memory(*args, cwd):
    """Run prepare.py as its own process. Returns the most memory that it was seen to have, in MiB.

    Files that are mapped into memory do not count: the system can take that back at any time.
    """
    peak = 0
    line = [sys.executable, str(ROOT / 'prepare.py'), *args]
    with subprocess.Popen(line, cwd=cwd, stdout=subprocess.DEVNULL) as job:
        while job.poll() is None:
            status = Path(f'/proc/{job.pid}/status').read_text()
            found = re.search(r'RssAnon:\s+(\d+) kB', status)
            if found:
                peak = max(peak, int(found[1]))
            time.sleep(0.01)
    assert job.returncode == 0
    return peak / 2**10


ENGLISH = 'The quick brown fox jumps over the lazy dog, and many people fly kites there.'
UNITS = {
    'english.txt': f'{ENGLISH} {{}}\n\n',
    'chinese.txt': f'{CHINESE * 3}{{}}\n\n',
    'indented.txt': f'{CHINESE * 3}{{}}\r\n\r\n\u3000\u3000',
    'rows.jsonl': f'{{{{"text": "{ENGLISH} {{}}", "other": "{"x" * 200}"}}}}\n',
    'rows.csv': f'"{ENGLISH} {{}}",{"x" * 200}\n',
}


def write_units(path, unit):
    """Write a file of 300 MB, of a unit with a number in it."""
    with open(path, 'w', newline='') as file:
        if path.suffix == '.csv':
            file.write('text,other\n')
        for start in itertools.count(0, 1000):
            file.write(''.join(unit.format(number) for number in range(start, start + 1000)))
            if file.tell() > 300_000_000:
                break


@pytest.mark.slow
@pytest.mark.parametrize('tokenizer', ['byte', 'gpt2'])
def test_memory_does_not_depend_on_language_and_columns(tmp_path, tokenizer):
    peaks = {}
    for name, unit in UNITS.items():
        write_units(tmp_path / name, unit)
        flags = [f'--input={name}', f'--tokenizer={tokenizer}', '--name=x']
        peaks[name] = peak_memory(*flags, cwd=tmp_path)
        (tmp_path / name).unlink()
    print(peaks)
    assert max(peaks.values()) - min(peaks.values()) < 100, peaks


@pytest.mark.slow
def test_few_books_of_a_table_are_in_memory_at_once(tmp_path):
    """300 MB in 750 rows. A page of the file has one: the reader has to hold a whole page."""
    books = [f'{ENGLISH} {number} ' * 5000 for number in range(750)]
    path = tmp_path / 'books.parquet'
    parquet.write_table(pyarrow.table({'text': books}), path, write_batch_size=1)
    peak = peak_memory('--input=books.parquet', '--tokenizer=byte', cwd=tmp_path)
    assert peak < 300

"""documents.py: texts in pieces, samples of a corpus, and the tokens of many documents at once."""

import itertools
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import TEXT
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import documents
import sources
import tokenizer as tk
from runtime import UserError

ALPHABET = ' \n\t\r\u3000\x85ab1.é字\x1c-\''
SPACES = st.text(alphabet=ALPHABET, max_size=40)


@pytest.mark.parametrize('kind', tk.KINDS)
def test_the_tokens_of_the_pieces_are_those_of_the_text(kind):
    encoding = tk.build(kind, [TEXT, ALPHABET], 300)

    @settings(deadline=None, max_examples=300)
    @given(st.one_of(SPACES, st.text(max_size=40)), st.integers(1, 12))
    def check(text, size):
        assume('<|endoftext|>' not in text)  # alone on a line it divides documents
        if kind == 'char':
            known = encoding.ranks
            text = ''.join(char for char in text if char.encode() in known)
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(sources, 'PIECE', size):
            path = Path(folder, 'x.txt')
            path.write_bytes(text.encode(errors='ignore'))
            pieces = list(sources.read_text(sources.local_source(path)))
        text = text.encode(errors='ignore').decode()
        assert ''.join(piece for piece, _ in pieces) == text
        if not text:
            assert not pieces
            return
        assert [ends for _, ends in pieces][-1]
        ids = [encoding.encode(piece) for piece, _ in pieces]
        assert np.concatenate(ids).tolist() == encoding.encode(text).tolist()

    check()


def test_a_long_text_is_read_in_pieces_whatever_its_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'PIECE', 1000)
    path = tmp_path / 'x.txt'
    texts = {
        'word ' * 5000: 20,
        'ligne\r\n' * 3000 + '字\n' * 3000: 1,
        'x' * 20_000: 0,
        '字。\n' * 5000: 10,
    }
    for text, many in texts.items():
        path.write_bytes(text.encode())
        pieces = list(sources.read_text(sources.local_source(path)))
        assert ''.join(piece for piece, _ in pieces) == text and len(pieces) > many
        assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    path.write_text('one\n<|endoftext|>\n' + 'two ' * 3000 + '\n<|endoftext|>\nthree')
    ends = [text for text, ends in sources.read_text(sources.local_source(path)) if ends]
    assert ends[0] == 'one\n' and ends[1].endswith('two \n') and ends[2] == 'three'


def test_a_large_corpus_is_sampled_from_beginning_to_end(monkeypatch):
    texts = [f'{TEXT[n : n + 200]}' for n in range(2000)]
    monkeypatch.setattr(documents, 'SAMPLE', 20_000)
    for total, first in ((sum(map(len, texts)), 1000), (None, 0)):
        drawn = list(documents.sample_texts(iter(texts), total, seed=1))
        assert sum(map(len, drawn)) == pytest.approx(20_000, rel=0.3)
        assert np.mean([texts.index(text) for text in drawn]) > first * 0.7


PIECES = {
    'documents': [('One é.', True), ('', True), ('Two\n', True)],
    'the last goes on': [('One.', True), ('Two', False)],
    'a document in pieces': [('One', False), (' and more.', True), ('Two', True)],
    'end-of-text as plain text': [('One.', True), ('A <|endoftext|>\n', True)],
    'halves of it side by side': [('One <|endof', True), ('text|> two', True)],
    'none': [],
}


@pytest.mark.parametrize('end_of_text', [True, False])
@pytest.mark.parametrize('kind', tk.KINDS)
@pytest.mark.parametrize('name', PIECES)
def test_pieces_are_encoded_as_each_by_itself(name, kind, end_of_text):
    pieces = PIECES[name]
    encoding = tk.build(kind, [TEXT, *(text for text, _ in pieces)], 300)
    id = encoding.end_of_text if end_of_text else None
    encoded = documents.encode_pieces(pieces, encoding, id, 'uint16')
    ids, n_tokens, sizes, ends, changes = encoded
    assert not changes
    expected = []
    for text, text_ends in pieces:
        expected.append(encoding.encode(text).tolist())
        if text_ends and end_of_text:
            expected[-1].append(id)
    assert ids.dtype == 'uint16' and ids.tolist() == list(itertools.chain(*expected))
    assert n_tokens.tolist() == [len(part) for part in expected]
    assert sizes.tolist() == [len(text.encode()) for text, _ in pieces]
    assert ends.tolist() == [int(text_ends) for _, text_ends in pieces]


def test_an_error_names_the_place_in_its_own_document():
    pieces = [('Long enough to be before it.', True), ('ab\ud83d', True)]
    encoding = tk.build('byte')
    with pytest.raises(UserError, match=r'lone surrogate U\+D83D at character 2'):
        documents.encode_pieces(pieces, encoding, encoding.end_of_text)

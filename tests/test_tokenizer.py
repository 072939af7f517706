"""tokenizer.py: four kinds, saved and loaded, here and in tokenizers and transformers."""

import json
from random import Random

import pytest
import tiktoken
import tokenizers as hf
from conftest import ROOT, TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import tokenizer as tk
from runtime import UserError

SAMPLES = [
    'Hello, world!\r\n\r\n\tIndented.  Two  spaces \n\n\n',
    '床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。',
    'আমার সোনার বাংলা, আমি তোমায় ভালোবাসি।',
    '👩‍👩‍👧‍👦 🇧🇩 naïve café — ﷽ \u200f\x00\ufeff',
    'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa12345678901',
    '<|endoftext|> is plain text here',
]


@pytest.fixture(scope='module')
def encodings():
    texts = [TEXT, *SAMPLES]
    return {kind: tk.build(kind, texts, vocab_size=400) for kind in tk.KINDS}


@pytest.mark.parametrize('kind', tk.KINDS)
def test_round_trip_is_exact_and_survives_saving(encodings, kind, tmp_path):
    encoding = encodings[kind]
    assert encoding.kind == kind
    tk.save(encoding, tmp_path)
    loaded = tk.load(tmp_path)
    assert (loaded.kind, loaded.n_vocab) == (kind, encoding.n_vocab)
    assert loaded.end_of_text == encoding.end_of_text == encoding.n_vocab - 1
    for text in SAMPLES:
        ids = encoding.encode(text)
        assert encoding.decode(ids) == text
        assert list(loaded.encode(text)) == list(ids)


@pytest.mark.parametrize('kind', ['gpt2', 'bpe', 'byte'])
@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_unicode_round_trips(encodings, kind, text):
    ids = encodings[kind].encode(text)
    assert encodings[kind].decode(ids) == text
    assert all(i < encodings[kind].n_vocab - 1 for i in ids), 'text must never become end-of-text'


@pytest.mark.parametrize('kind', tk.KINDS)
def test_the_saved_file_gives_the_same_ids_in_tokenizers(encodings, kind, tmp_path):
    tk.save(encodings[kind], tmp_path)
    theirs = hf.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    for text in [*SAMPLES[:-1], TEXT]:
        ids = list(encodings[kind].encode(text))
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == text


@pytest.mark.parametrize('kind', tk.KINDS)
def test_transformers_opens_the_folder_and_agrees_on_random_text(encodings, kind, tmp_path):
    tk.save(encodings[kind], tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == encodings[kind].end_of_text
    assert len(theirs) == encodings[kind].n_vocab
    random = Random(0)
    texts = [TEXT, *SAMPLES] if kind == 'char' else [TEXT, SAMPLES[1], SAMPLES[2]]
    alphabet = sorted(set(''.join(texts)))
    for _ in range(1000):
        letters = random.choices(alphabet, k=random.randrange(40))
        if kind != 'char':
            for i in range(len(letters)):
                if random.random() < 0.3:
                    letters[i] = chr(random.randrange(0x20, 0xD800))
        text = ''.join(letters)
        ids = encodings[kind].encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
        assert theirs.decode(ids) == text


def test_gpt2s_published_tokenizer_file_opens(encodings, tmp_path):
    """As on the Hub: ByteLevel for its pattern, merges as texts, end-of-text among the tokens."""
    tk.save(encodings['gpt2'], tmp_path)
    contents = json.loads((tmp_path / 'tokenizer.json').read_text())
    model = contents['model']
    model['merges'] = [' '.join(pair) for pair in model['merges']]
    model['ignore_merges'] = False
    model['vocab']['<|endoftext|>'] = 50256
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    contents['pre_tokenizer'] = byte_level
    (tmp_path / 'tokenizer.json').write_text(json.dumps(contents))
    loaded = tk.load(tmp_path)
    assert (loaded.n_vocab, loaded.end_of_text) == (50257, 50256)
    theirs = hf.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    for text in [*SAMPLES[:-1], TEXT]:
        ids = encodings['gpt2'].encode(text).tolist()
        assert loaded.encode(text).tolist() == ids
        assert theirs.encode(text).ids == ids


def test_other_special_tokens_are_kept(encodings, tmp_path):
    tk.save(encodings['bpe'], tmp_path)
    contents = json.loads((tmp_path / 'tokenizer.json').read_text())
    end_of_text = contents['added_tokens'][0]
    contents['added_tokens'].append({**end_of_text, 'id': 405, 'content': '<|im_start|>'})
    (tmp_path / 'tokenizer.json').write_text(json.dumps(contents))
    loaded = tk.load(tmp_path)
    tk.save(loaded, tmp_path)
    again = tk.load(tmp_path)
    special = {'<|endoftext|>': 399, '<|im_start|>': 405}
    assert again.special == loaded.special == special
    assert again.n_vocab == loaded.n_vocab == 406


def test_gpt2_is_the_published_one(encodings):
    assert encodings['gpt2'].n_vocab == 50257
    assert list(encodings['gpt2'].encode('Hello world')) == [15496, 995]


def test_a_bpe_vocabulary_has_its_size_and_shortens_its_text():
    text = (ROOT / 'corpus' / 'shakespeare.txt').read_text()[:300_000]
    encoding = tk.build('bpe', [text], vocab_size=1000)
    assert encoding.n_vocab == 1000
    assert len(encoding.encode(text)) < len(text) / 2.2


def test_a_char_vocabulary_is_the_sorted_alphabet_as_in_nanogpt():
    encoding = tk.build('char', ['hello'], end_of_text=False)
    assert encoding.n_vocab == 4
    assert list(encoding.encode('hole')) == [1, 3, 2, 0]


def test_a_character_outside_the_alphabet_is_named(encodings):
    named = r"2 characters outside .*'§' \(U\+00A7\).*'中' \(U\+4E2D\)"
    with pytest.raises(UserError, match=named):
        tk.build('char', ['abc']).encode('a§中')


@pytest.mark.parametrize('kind', tk.KINDS)
def test_lone_surrogates_are_refused(encodings, kind):
    with pytest.raises(UserError, match=r'lone surrogate U\+D83D at character 1'):
        encodings[kind].encode('a\ud83d')


def test_gpt2_that_cannot_be_downloaded_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    with pytest.raises(UserError, match='could not be downloaded.*TIKTOKEN_CACHE_DIR'):
        tk.build('gpt2')


NOT_BYTES = json.dumps({'model': {'vocab': {'\u4e2d': 0}}})


@pytest.mark.parametrize('contents', ['', '{}', '[]', '{"model": 1}', NOT_BYTES])
def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path, contents):
    (tmp_path / 'tokenizer.json').write_text(contents)
    with pytest.raises(UserError, match='tokenizer.json is not a tokenizer'):
        tk.load(tmp_path)


@pytest.mark.parametrize('text', ['one two', 'xé' * 5000])  # the second is checked in part
def test_ids_of_another_text_are_refused(text):
    own = tk.build('byte')
    ids = own.encode(text)
    assert own.find_changes([text, 'other'], [ids, ids]) == {}
    wrong = ids.copy()
    wrong[3] += 1
    for other in (wrong, ids[1:], ids[:2], ids[:0]):
        with pytest.raises(UserError, match='would lose text'):
            own.find_changes([text], [other])

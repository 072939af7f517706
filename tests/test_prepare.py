"""prepare.py as users run it: files, tables and corpora of the Hub, and what is written of them."""

import gzip
import hashlib
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, TEXT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import documents
import sources
import tokenizer as tk
from data import Dataset

SPLITS = ('train', 'val')


def read(folder, split):
    """The ids in a dataset's .bin file."""
    meta = json.loads((folder / 'meta.json').read_text())
    return np.fromfile(folder / f'{split}.bin', dtype=meta['dtype'])


def read_both(folder):
    """The ids of both splits, training first."""
    return np.concatenate([read(folder, split) for split in SPLITS])


def documents_of(folder):
    """The text of each document of a dataset that has several, by split, its tokens decoded."""
    encoding = tk.load(folder)
    eot = encoding.end_of_text
    texts = {}
    for split in SPLITS:
        ids = read(folder, split)
        parts = np.split(ids, np.flatnonzero(ids == eot) + 1)
        assert not len(parts.pop()), 'nothing comes after the last end-of-text'
        texts[split] = [encoding.decode(part[:-1]) for part in parts]
        meta = json.loads((folder / 'meta.json').read_text())[split]
        assert meta['documents'] == len(parts) and meta['tokens'] == sum(map(len, parts))
        assert meta['bytes'] == sum(len(text.encode()) for text in texts[split])
        assert meta['highest'] == max(part.max() for part in parts)
    return texts


def contents(folder):
    """{name: bytes} of the files in a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# -----------------------------------------------------------------------------
# single texts and documents


def test_a_single_text_is_split_as_nanogpt_splits_it(run, tmp_path):
    text = ''.join(chr(97 + i % 26) for i in range(1003)) + 'é'
    (tmp_path / 'one.txt').write_text(text)
    assert run('prepare.py', '--input=one.txt', '--tokenizer=char', '--name=x').code == 0
    folder = tmp_path / 'data' / 'x'
    # nanoGPT's own way: sorted characters numbered from 0, the first int(n * 0.9) for training
    ids = {char: i for i, char in enumerate(sorted(set(text)))}
    cut = int(len(text) * 0.9)
    assert list(read(folder, 'train')) == [ids[char] for char in text[:cut]]
    assert list(read(folder, 'val')) == [ids[char] for char in text[cut:]]
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['vocab_size'] == 27 and meta['end_of_text'] is None
    assert meta['val'] == {
        'tokens': len(text) - cut,
        'bytes': len(text[cut:].encode()),
        'documents': 1,
        'highest': 26,
        'sha256': hashlib.sha256((folder / 'val.bin').read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize('tokenizer', tk.KINDS)
def test_documents_are_kept_whole_and_followed_by_end_of_text(run, tmp_path, tokenizer):
    (tmp_path / 'texts' / 'more').mkdir(parents=True)
    (tmp_path / 'texts' / 'a.txt').write_text('one\n<|endoftext|>\ntwo <|endoftext|>\nstill two\n')
    (tmp_path / 'texts' / 'b.md').write_text('')
    (tmp_path / 'texts' / 'c.bin').write_bytes(b'\xff')
    (tmp_path / 'texts' / 'more' / 'd.TXT').write_text('three\n' * 4 + '<|endoftext|>')
    (tmp_path / 'e.txt').write_bytes(b'four\r\n')
    args = ['--vocab_size=270', '--val_fraction=0.4', f'--tokenizer={tokenizer}', '--name=docs']
    result = run('prepare.py', '--input=texts,e.txt', *args)
    assert result.code == 0, result.err
    texts = documents_of(tmp_path / 'data' / 'docs')
    assert sorted(texts['train'] + texts['val']) == sorted(
        ['one\n', 'two <|endoftext|>\nstill two\n', 'three\n' * 4, 'four\r\n']
    )
    assert texts['train'] and texts['val']


def test_validation_has_as_near_its_fraction_as_documents_allow(run, tmp_path):
    texts = [f'{n} ' * (1 + n * n % 17) for n in range(60)]
    (tmp_path / 'x.txt').write_text('\n<|endoftext|>\n'.join(texts))
    drawn = {}
    for seed in (1, 2):
        assert run('prepare.py', '--input=x.txt', '--tokenizer=byte', f'--seed={seed}').code == 0
        drawn[seed] = documents_of(tmp_path / 'data' / 'x')
        numbers = [int(text.split()[0]) for text in drawn[seed]['train']]
        drawn_for_validation = {int(text.split()[0]) for text in drawn[seed]['val']}
        assert numbers == sorted(set(range(60)) - drawn_for_validation), 'in their order'
        share = sum(map(len, drawn[seed]['val'])) / sum(map(len, texts))
        assert 0.07 < share < 0.13
    assert drawn[1] != drawn[2]
    for name, lengths in {'late': (100, 3, 3), 'early': (3, 100)}.items():
        text = '<|endoftext|>\n'.join('x' * n + '\n' for n in lengths)
        (tmp_path / f'{name}.txt').write_text(text)
        result = run('prepare.py', f'--input={name}.txt', '--tokenizer=byte')
        assert all(documents_of(tmp_path / 'data' / name).values()), 'one on each side'
    assert result.out.startswith('Note: documents stay whole')


def test_a_large_vocabulary_is_stored_in_32_bits(run, tmp_path):
    text = ''.join(chr(0x20000 + i) for i in range(40_000))
    text += ''.join(chr(0x3400 + i) for i in range(27_000))
    (tmp_path / 'wide.txt').write_text(text * 2)
    assert run('prepare.py', '--input=wide.txt', '--tokenizer=char').code == 0
    folder = tmp_path / 'data' / 'wide'
    assert json.loads((folder / 'meta.json').read_text())['dtype'] == 'uint32'
    ids = read_both(folder)
    assert ids.max() == 66_999
    assert tk.load(folder).decode(ids) == text * 2


def test_a_bpe_vocabulary_is_learned_from_the_training_part_only(run, tmp_path):
    flags = ['--vocab_size=300', '--val_fraction=0.2']
    for name, last in (('a', 'zebras and quaggas '), ('b', 'entirely other words ')):
        (tmp_path / f'{name}.txt').write_text(TEXT + last * (len(TEXT) // 9 // len(last)))
        assert run('prepare.py', f'--input={name}.txt', *flags).code == 0
    a, b = (tk.load(tmp_path / 'data' / name) for name in 'ab')
    assert a.ranks == b.ranks


def test_the_bundled_shakespeare_is_the_default(run, tmp_path):
    result = run('prepare.py', '--tokenizer=byte')
    assert result.code == 0
    meta = json.loads((tmp_path / 'data' / 'shakespeare' / 'meta.json').read_text())
    assert meta['train']['documents'] + meta['val']['documents'] == 42
    separators = 41 * len('<|endoftext|>\n')
    size = (ROOT / 'corpus' / 'shakespeare.txt').stat().st_size
    assert meta['train']['bytes'] + meta['val']['bytes'] == size - separators
    assert f'{meta["train"]["tokens"]:,}' in result.out


# -----------------------------------------------------------------------------
# what is there already, and what is wrong


def test_preparing_again_replaces_the_dataset_and_nothing_else(run, tmp_path):
    folder = tmp_path / 'data' / 'x'
    folder.mkdir(parents=True)
    (folder / 'input.txt').write_text('abcdef' * 100)  # where nanoGPT's users keep it
    for tokenizer in ('char', 'byte'):
        flags = [f'--tokenizer={tokenizer}', '--name=x']
        assert run('prepare.py', '--input=data/x/input.txt', *flags).code == 0
    names = ['input.txt', 'meta.json', 'tokenizer.json', 'tokenizer_config.json']
    assert sorted(contents(folder)) == [*names, 'train.bin', 'val.bin']
    assert json.loads((folder / 'meta.json').read_text())['tokenizer'] == 'byte'


@pytest.mark.parametrize('step', range(8))
def test_on_a_full_disk_a_dataset_is_complete_or_absent(run, tmp_path, monkeypatch, step):
    """The disk fails at each of the moves in turn, over a dataset that was there before."""
    (tmp_path / 'x.txt').write_text('abcdef' * 100)
    assert run('prepare.py', '--input=x.txt', '--tokenizer=char').code == 0
    folder = tmp_path / 'data' / 'x'
    before = contents(folder)
    replace = os.replace
    moves = []

    def failing(*args):
        if len(moves) == step:
            raise OSError(28, 'No space left on device')
        moves.append(args)
        return replace(*args)

    monkeypatch.setattr(os, 'replace', failing)
    result = run('prepare.py', '--input=x.txt', '--tokenizer=byte')
    after = contents(folder)
    if step < 7:
        assert result.code == 1 and 'No space left' in result.err
        assert after == before or 'train.bin' not in after
        monkeypatch.setattr(os, 'replace', replace)
        result = run('prepare.py', '--input=x.txt', '--tokenizer=byte')
        after = contents(folder)
    assert result.code == 0 and json.loads(after['meta.json'])['tokenizer'] == 'byte'
    assert [child.name for child in (tmp_path / 'data').iterdir()] == ['x'], 'files are left'


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--input=missing.txt'], 'There is no file missing.txt.'),
        (['--input=ok.txt,missing'], 'There is no file missing: commas separate names.'),
        (['--input='], "input='' has an empty name"),
        (['--input=ok.txt,'], "input='ok.txt,' has an empty name"),
        (
            ['--input=nothing'],
            'The folder nothing has no file that ends in '
            '.txt, .md, .jsonl, .ndjson, .json, .csv, .tsv, .parquet: name',
        ),
        (['--input=empty.txt'], 'There is no text in empty.txt.'),
        (['--input=blank.txt'], 'There is no text in blank.txt.'),
        (['--input=latin.txt'], 'latin.txt is not UTF-8 text: byte 3 cannot be decoded.'),
        (['--input=short.txt', '--tokenizer=byte'], 'its val split has fewer than 2 tokens'),
        (
            ['--input=ok.txt', '--tokenizer=bert'],
            'Choose one of: gpt2, bpe, char, byte, a folder',
        ),
        (['--input=ok.txt', '--vocab_size=100'], '256 bytes and end-of-text make 257'),
        (['--input=ok.txt', '--val_fraction=1.0'], 'must lie between 0 and 1'),
        (['--input=ok.txt', '--val_fraction=nan'], "val_fraction takes float or None, not 'nan'"),
        (['--input=ok.txt', '--name=../x'], "name='../x' must be a plain name"),
        (['--input=ok.txt', '--name=.'], "name='.' must be a plain name"),
        (['--dataset=shakespear'], "There is no corpus 'shakespear'"),
        (['--input=ok.txt', '--streaming'], 'streaming=True is for corpora of the Hub'),
        (['--input=ok.txt', '--max_tokens=0'], 'max_tokens=0: must be from 1'),
        (['--input=ok.txt', '--num_proc=0'], 'num_proc=0: must be from 1'),
        (
            ['--input=rows.jsonl', '--text_column=body'],
            "rows.jsonl has no column 'body' but text, id: use --text_column.",
        ),
        (
            ['--input=rows.jsonl', '--text_column=id'],
            "rows.jsonl, line 1: the column 'id' holds int, not text.",
        ),
        (['--input=broken.jsonl'], 'broken.jsonl cannot be read: '),
        (['--input=latin.jsonl'], 'latin.jsonl is not UTF-8 text: byte 13 cannot be decoded.'),
        (['--input=latin.txt.gz'], 'latin.txt.gz is not UTF-8 text: byte 3 cannot be decoded.'),
        (['--input=broken.txt.gz'], 'broken.txt.gz'),
        (['--input=broken.jsonl.gz'], 'broken.jsonl.gz cannot be read: '),
        (
            ['--input=pipe'],
            'pipe is not a regular file but is read twice: save it to a file.',
        ),
        (
            ['--input=rows.jsonl', '--tokenizer=alphabet'],
            'The tokenizer alphabet has no end-of-text',
        ),
        (['--input=rows.jsonl', '--tokenizer=nothing'], 'There is no nothing/tokenizer.json'),
        (['--input=ok.txt', '--subset=x'], 'give one of them'),
        (
            ['--input=ok.txt', '--vocab_size=10000000000'],
            'vocab_size=10000000000: must be from',
        ),
        (['ok.txt'], 'ok.txt is not a config file'),
        (['--input=broken.parquet'], 'broken.parquet cannot be read: '),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(run, tmp_path, args, message):
    (tmp_path / 'ok.txt').write_text('All is well. ' * 100)
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'blank.txt').write_text(' \n\n')
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9')
    (tmp_path / 'short.txt').write_text('abcdef')
    (tmp_path / 'rows.jsonl').write_text('{"text": "a", "id": 1}\n' * 9)
    (tmp_path / 'broken.jsonl').write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / 'latin.jsonl').write_bytes(b'{"text": "caf\xe9"}\n')
    (tmp_path / 'latin.txt.gz').write_bytes(gzip.compress(b'caf\xe9'))
    (tmp_path / 'broken.txt.gz').write_bytes(gzip.compress(b'abc' * 100)[:-9])
    (tmp_path / 'broken.parquet').write_bytes(b'PAR1' * 9)
    (tmp_path / 'broken.jsonl.gz').write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:-20])
    (tmp_path / 'nothing').mkdir()
    (tmp_path / 'alphabet').mkdir()
    tk.save(tk.build('char', ['abc'], end_of_text=False), tmp_path / 'alphabet')
    os.mkfifo(tmp_path / 'pipe')
    result = run('prepare.py', *args)
    assert result.is_one_sentence and message in result.err, result.err
    assert not list((tmp_path / 'data').glob('*'))


@pytest.mark.parametrize(
    ('place', 'message'),
    [('data', 'data is a file, and'), ('data/ok', 'data/ok is a file: choose another --name.')],
)
def test_a_file_where_the_dataset_is_to_go_is_left_alone(run, tmp_path, place, message):
    (tmp_path / 'ok.txt').write_text('All is well. ' * 100)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text('mine')
    result = run('prepare.py', '--input=ok.txt')
    assert result.is_one_sentence and message in result.err, result.err
    assert (tmp_path / place).read_text() == 'mine'


# -----------------------------------------------------------------------------
# files of all kinds

ROWS = [f'Text {n}: ' + 'words and more words ' * (n % 5) + 'é\n' * (n % 3) for n in range(40)]
FORMATS = ['x.jsonl', 'x.json', 'x.csv', 'x.parquet', 'x.jsonl.gz', 'x.csv.bz2']
FORMATS += ['x.txt', 'x.md.xz', 'x.txt.gz']


@pytest.mark.parametrize('name', FORMATS)
def test_every_format_gives_the_same_documents(run, tmp_path, name):
    path = tmp_path / name
    table = pd.DataFrame({'id': range(40), 'body': ROWS})
    kind = name.split('.')[1]
    if kind == 'parquet':
        table.to_parquet(path)
    elif kind == 'csv':
        table.to_csv(path, index=False)
    elif kind in ('json', 'jsonl'):
        table.to_json(path, orient='records', lines=kind == 'jsonl')
    else:
        text = ''.join(f'{row}\n<|endoftext|>\n' for row in ROWS)
        compress = {'gz': gzip.compress, 'xz': lzma.compress}.get(name.split('.')[-1], bytes)
        path.write_bytes(compress(text.encode()))
    flags = ['--tokenizer=byte', '--text_column=body', '--seed=3']
    result = run('prepare.py', f'--input={name}', *flags)
    assert result.code == 0, result.err
    texts = documents_of(tmp_path / 'data' / 'x')
    rows = ROWS
    if kind in ('txt', 'md'):
        rows = [row + '\n' for row in ROWS]
    assert texts['val'] and texts['train'] == [row for row in rows if row not in texts['val']]


@pytest.mark.parametrize('word', ['NA', 'null', '12', '2026-01-02', 'nan'])
def test_a_text_that_looks_like_something_else_is_text(run, tmp_path, word):
    (tmp_path / 'x.csv').write_text('text,id\n' + f'{word},7\n' * 20)
    assert run('prepare.py', '--input=x.csv', '--tokenizer=byte').code == 0
    texts = documents_of(tmp_path / 'data' / 'x')
    assert texts['train'] + texts['val'] == [word] * 20


def test_each_file_is_read_once_and_hidden_ones_are_not(run, tmp_path):
    folder = tmp_path / 'a.b'
    (folder / '.hidden').mkdir(parents=True)
    # Under its own name: a[1].jsonl is not a pattern that a1.jsonl matches.
    for name, text in {'a1.jsonl': 'wrong', 'a[1].jsonl': 'right'}.items():
        (tmp_path / name).write_text(json.dumps({'text': text}) + '\n')
    (folder / '.hidden' / 'x.txt').write_text('hidden')
    (folder / 'x.txt').write_text('seen')
    (folder / 'y.txt').symlink_to(folder / 'x.txt')
    result = run('prepare.py', '--input=a.b,a[1].jsonl,a.b/x.txt', '--tokenizer=byte')
    assert result.code == 0, result.err
    texts = documents_of(tmp_path / 'data' / 'a.b')
    assert sorted(texts['train'] + texts['val']) == ['right', 'seen']


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=['Cs']), max_size=60), min_size=3, max_size=20
    )
)
def test_any_unicode_comes_back(run, tmp_path, texts):
    texts = [text for text in texts if text.strip()]
    texts += ['\ufeffa\r\nb\x00', 'last', '<|endoftext|>']
    path = tmp_path / 'x.jsonl'
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    result = run('prepare.py', '--input=x.jsonl', '--tokenizer=byte', '--val_fraction=0.3')
    assert result.code == 0, result.err
    found = documents_of(tmp_path / 'data' / 'x')
    assert sorted(found['train'] + found['val']) == sorted(texts)


def test_a_byte_order_mark_line_ends_and_zeros_stay(run, tmp_path):
    text = '\ufeffone\r\ntwo\x00\rthree\n' * 20
    (tmp_path / 'x.txt').write_bytes(text.encode())
    assert run('prepare.py', '--input=x.txt', '--vocab_size=270').code == 0
    folder = tmp_path / 'data' / 'x'
    assert tk.load(folder).decode(read_both(folder)) == text


@pytest.mark.parametrize('many', [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_tiny_files(run, tmp_path, many):
    for n in range(many):
        folder = tmp_path / 'files' / str(n // 1000)
        folder.mkdir(parents=True, exist_ok=True)
        empty = n % 10 == 0
        (folder / f'{n:06}.txt').write_text('' if empty else f'Text {n}.')
    result = run('prepare.py', '--input=files', '--tokenizer=byte')
    assert result.code == 0, result.err
    texts = documents_of(tmp_path / 'data' / 'files')
    assert sorted(texts['train'] + texts['val']) == sorted(
        f'Text {n}.' for n in range(many) if n % 10
    )


@pytest.mark.parametrize(
    ('word', 'kind', 'megabytes'),
    [
        ('a word and ', 'gpt2', 2),
        ('x', 'byte', 2),
        pytest.param('a word and ', 'gpt2', 10, marks=pytest.mark.slow),
        pytest.param('x', 'byte', 10, marks=pytest.mark.slow),
    ],
)
def test_a_single_line_of_megabytes(run, tmp_path, word, kind, megabytes):
    text = word * (megabytes * 10**6 // len(word))
    (tmp_path / 'x.txt').write_text(text)
    result = run('prepare.py', '--input=x.txt', f'--tokenizer={kind}')
    assert result.code == 0, result.err
    folder = tmp_path / 'data' / 'x'
    assert tk.load(folder).decode(read_both(folder)) == text


@pytest.mark.parametrize('tokenizer', ['bpe', 'char'])
def test_the_number_of_threads_changes_no_byte(run, tmp_path, tokenizer):
    texts = [f'{TEXT[n:]} {n}\n' for n in range(0, 4000, 7)]
    (tmp_path / 'x.txt').write_text('<|endoftext|>\n'.join(texts))
    made = []
    for threads in (1, 2, 4):
        flags = [f'--num_proc={threads}', f'--tokenizer={tokenizer}', f'--name=x{threads}']
        result = run('prepare.py', '--input=x.txt', '--max_tokens=900000', *flags)
        assert result.code == 0, result.err
        made.append(contents(tmp_path / 'data' / f'x{threads}'))
    assert made[0] == made[1] == made[2]
    n_tokens = json.loads(made[0]['meta.json'])['train']['tokens']
    assert 900_000 <= n_tokens < 900_000 + len(TEXT), 'max_tokens, and the rest of its document'


def test_max_tokens_of_a_single_text_ends_its_training_part_only(run, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, 'PIECE', 1000)
    monkeypatch.setattr(sources, 'PIECE', 1000)
    (tmp_path / 'x.txt').write_text(TEXT)
    result = run('prepare.py', '--input=x.txt', '--tokenizer=byte', '--max_tokens=2000')
    assert result.code == 0 and 'Note' not in result.out, result.err
    train, val = (read(tmp_path / 'data' / 'x', split).tobytes() for split in SPLITS)
    text = np.frombuffer(TEXT.encode(), np.uint8).astype('<u2').tobytes()
    assert text.startswith(train) and text.endswith(val)
    assert 4000 <= len(train) < 6200 and val


# -----------------------------------------------------------------------------
# corpora of the Hub


def hub(folder, repository, files, columns='text'):
    """A corpus in the Hub's layout: parquet files, and a README.md that names the splits."""
    configs = {}
    for name, rows in files.items():
        path = folder / repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({columns: rows, 'id': range(len(rows))}).to_parquet(path)
        config, file = name.rsplit('/', 1)
        configs.setdefault(config, {}).setdefault(file.split('-')[0], []).append(name)
    lines = ['---', 'configs:']
    for config, splits in configs.items():
        lines += [f'- config_name: {config}', '  data_files:']
        for split, paths in splits.items():
            lines += [f'  - split: {split}', '    path:', *(f'    - {path}' for path in paths)]
    (folder / repository / 'README.md').write_text('\n'.join([*lines, '---', '# A corpus']))


WIKI = ['', ' = Robert = \n', '', ' Robert is .\n', ' = = Life = = \n', '', ' He 2 + 2\n']
WIKI += [' = 4 = \n', '', ' = Sun @-@ Moon = \n', '', ' Both shine .\n']
MINE = '--dataset=hf:me/mine --text_column=content'
EXTRA = f'{MINE} --split=extra'
GERMAN = '--dataset=wikipedia --subset=20231101.de'
ALL_THREE = ('train', 'validation', 'test')


@pytest.mark.parametrize('flags', [[], ['--streaming']])
@pytest.mark.parametrize(
    ('dataset', 'repository', 'folder', 'splits'),
    [
        ('--dataset=wikitext2', 'Salesforce/wikitext', 'wikitext-2-raw-v1', ALL_THREE),
        ('--dataset=wikitext103', 'Salesforce/wikitext', 'wikitext-103-raw-v1', ALL_THREE),
        ('--dataset=tinystories', 'roneneldan/TinyStories', 'data', ('train', 'validation')),
        ('--dataset=wikipedia', 'wikimedia/wikipedia', '20231101.en', ('train',)),
        (GERMAN, 'wikimedia/wikipedia', '20231101.de', ('train',)),
        ('--dataset=openwebtext', 'Skylion007/openwebtext', 'plain_text', ('train',)),
        ('--dataset=fineweb-edu', 'HuggingFaceFW/fineweb-edu', 'sample-10BT', ('train',)),
        (MINE, 'me/mine', 'default', ('train', 'dev')),
        (EXTRA, 'me/mine', 'default', ('extra', 'train')),
    ],
)
def test_named_corpora_are_read_from_the_layout_of_the_hub(
    run, tmp_path, dataset, repository, folder, splits, flags
):
    wiki = 'wikitext' in dataset
    files = {}
    for split in splits:
        for part in range(2):
            rows = WIKI if wiki else [f'{split} {part} {n}' for n in range(50)]
            files[f'{folder}/{split}-{part:05}-of-00002.parquet'] = rows
    hub(tmp_path, repository, files, 'content' if 'hf:' in dataset else 'text')
    has_validation = len(splits) > 1 and 'extra' not in splits
    fraction = [] if has_validation else ['--val_fraction=0.2']
    args = [*dataset.split(), '--tokenizer=byte', '--name=x', *fraction, *flags]
    result = run('prepare.py', *args)
    assert result.code == 0, result.err

    texts = documents_of(tmp_path / 'data' / 'x')
    trained = []
    for file, rows in files.items():
        if f'/{splits[0]}-' in file:
            trained += rows
    if wiki:
        robert = ' = Robert = \n\n Robert is .\n = = Life = = \n\n He 2 + 2\n = 4 = \n\n'
        sun = ' = Sun @-@ Moon = \n\n Both shine .\n'
        assert texts['train'] == [robert, sun + '\n', robert, sun]
        assert texts['val'] == texts['train']
    elif has_validation:
        assert texts['train'] == trained
        assert {text.split()[0] for text in texts['val']} == {splits[1]}
    else:
        assert sorted(texts['train'] + texts['val']) == sorted(trained) and len(texts['val']) > 5
    meta = json.loads((tmp_path / 'data' / 'x' / 'meta.json').read_text())
    assert meta['source'][0] == repository


def test_max_tokens_leaves_the_validation_split_of_the_hub_whole(run, tmp_path):
    files = {}
    for split in ('train', 'valid'):
        files[f'data/{split}-00000-of-00001.parquet'] = [f'{split} {n}' for n in range(500)]
    hub(tmp_path, 'me/mine', files)
    flags = ['--dataset=hf:me/mine', '--tokenizer=byte', '--max_tokens=100', '--streaming']
    assert run('prepare.py', *flags).code == 0
    texts = documents_of(tmp_path / 'data' / 'mine')
    assert texts['train'] == [f'train {n}' for n in range(13)]  # 10 of 8 tokens and 3 of 9
    assert texts['val'] == [f'valid {n}' for n in range(500)]


def test_no_hub_is_one_sentence(run, tmp_path, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # between attempts
    result = run('prepare.py', '--dataset=tinystories')
    message = 'roneneldan/TinyStories cannot be loaded from the Hugging Face Hub ('
    assert result.is_one_sentence and message in result.err, result.err
    assert not (tmp_path / 'data').exists()


# -----------------------------------------------------------------------------
# interrupted or killed


def prepare_until(seconds, work, cwd):
    """Start prepare.py as its own process, and do something to it after some seconds.

    seconds: None waits until it writes. Returns its exit status and its stderr.
    """
    flags = ['--input=x.txt', '--num_proc=2', '--vocab_size=300']
    job = subprocess.Popen(
        [sys.executable, ROOT / 'prepare.py', *flags],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    started = time.monotonic()
    while job.poll() is None and (seconds is None or time.monotonic() - started < seconds):
        if seconds is None and list((cwd / 'data').glob('.x.draft/batches.jsonl')):
            break
        time.sleep(0.005)
    work(job)
    return job.wait(timeout=60), job.stderr.read()


def write_a_long_text(tmp_path, repeat):
    """Write x.txt, which takes a while to tokenize."""
    lines = [f'{TEXT[n % 5000 :]}\n<|endoftext|>\n' for n in range(repeat)]
    (tmp_path / 'x.txt').write_text(''.join(lines))


@pytest.mark.parametrize(
    ('number', 'status'),
    [
        (signal.SIGINT, -signal.SIGINT),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_interrupted_it_goes_on_to_the_same_bytes(tmp_path, number, status):
    write_a_long_text(tmp_path, 3000)
    code, errors = prepare_until(None, lambda job: job.send_signal(number), tmp_path)
    assert code == status and 'Traceback' not in errors
    assert errors.endswith('Interrupted: the same command goes on from here.\n')
    assert [path.name for path in (tmp_path / 'data').iterdir()] == ['.x.draft']
    assert prepare_until(1000, lambda job: None, tmp_path)[0] == 0
    resumed = contents(tmp_path / 'data' / 'x')
    shutil.rmtree(tmp_path / 'data')
    assert prepare_until(1000, lambda job: None, tmp_path)[0] == 0
    assert contents(tmp_path / 'data' / 'x') == resumed


@pytest.mark.slow
def test_killed_at_any_instant_a_dataset_is_complete_or_absent(tmp_path):
    """Absent is to have no train.bin; a dataset from before may be there as it was."""
    write_a_long_text(tmp_path, 2000)
    started = time.monotonic()
    code, _ = prepare_until(1000, lambda job: None, tmp_path)
    assert code == 0
    seconds = time.monotonic() - started
    folder = tmp_path / 'data' / 'x'
    whole = contents(folder)
    rng = random.Random(1)
    killed = 0
    complete = 0
    for turn in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if turn % 2:  # there is one from before
            folder.mkdir()
            for name, content in whole.items():
                (folder / name).write_bytes(content)
        after = rng.uniform(0.3, 1.1) * seconds
        code, _ = prepare_until(after, lambda job: job.kill(), tmp_path)
        if code == -signal.SIGKILL:
            killed += 1
        if (folder / 'train.bin').exists():
            complete += 1
            assert contents(folder) == whole
            Dataset('x', tmp_path / 'data', verify=True)
    assert killed >= 10 and complete >= 5


def test_a_bpe_vocabulary_suits_the_size_of_the_text(run, tmp_path):
    names = ''.join(f'{n} sheep ' for n in range(4000))  # 45 kB, of many different words
    (tmp_path / 'x.txt').write_text(names.translate(str.maketrans('0123456789', 'aeioubdgkl')))
    result = run('prepare.py', '--input=x.txt', '--quiet')
    assert 'x: bpe tokenizer, 512 tokens in its vocabulary' in result.out
    suitable = result.globals['suitable_vocabulary']
    sizes = {100: 512, 100_000: 1024, 500_000: 2048, 800_000: 2048, 5_057_813: 4096, 10**12: 4096}
    assert {n_bytes: suitable(n_bytes) for n_bytes in sizes} == sizes
    assert suitable(None) == 4096, 'of what is streamed'
    result = run('prepare.py', '--input=x.txt', '--quiet', '--vocab_size=700')
    assert 'x: bpe tokenizer, 700 tokens in its vocabulary' in result.out

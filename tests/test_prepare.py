import hashlib
import json

import numpy as np
import pytest
from conftest import ROOT, TEXT

import tokenizer as tk


def read(folder, split):
    meta = json.loads((folder / 'meta.json').read_text())
    return np.fromfile(folder / f'{split}.bin', dtype=meta['dtype'])


def test_a_single_text_is_split_at_the_last_tenth_of_its_characters_as_nanogpt_does(run, tmp_path):
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
    folder = tmp_path / 'data' / 'docs'
    encoding = tk.load(folder)
    eot = tk.end_of_text_id(encoding)
    texts = {}
    for split in ('train', 'val'):
        parts = np.split(read(folder, split), np.flatnonzero(read(folder, split) == eot) + 1)
        assert not len(parts.pop()), 'nothing comes after the last end-of-text'
        texts[split] = [encoding.decode_bytes(part[:-1]).decode() for part in parts]
    assert texts == {'train': ['one\n', 'two <|endoftext|>\nstill two\n'], 'val': ['three\n' * 4, 'four\r\n']}
    assert json.loads((folder / 'meta.json').read_text())['train']['documents'] == 2


def test_the_split_falls_at_the_nearest_document_boundary_and_leaves_one_on_each_side(run, tmp_path):
    for name, lengths in {'late': (100, 3, 3), 'early': (3, 100)}.items():
        (tmp_path / f'{name}.txt').write_text('<|endoftext|>\n'.join('x' * n + '\n' for n in lengths))
        assert run('prepare.py', f'--input={name}.txt', '--tokenizer=byte').code == 0
    assert len(read(tmp_path / 'data' / 'late', 'val')) == 10  # two of them, each with a line end and end-of-text
    assert len(read(tmp_path / 'data' / 'early', 'train')) == 5
    assert run('prepare.py', '--input=early.txt', '--tokenizer=byte').out.startswith('Note: documents stay whole')


def test_a_large_vocabulary_is_stored_in_32_bits(run, tmp_path):
    text = ''.join(chr(0x20000 + i) for i in range(40_000)) + ''.join(chr(0x3400 + i) for i in range(27_000))
    (tmp_path / 'wide.txt').write_text(text * 2)
    assert run('prepare.py', '--input=wide.txt', '--tokenizer=char').code == 0
    folder = tmp_path / 'data' / 'wide'
    assert json.loads((folder / 'meta.json').read_text())['dtype'] == 'uint32'
    ids = np.concatenate([read(folder, 'train'), read(folder, 'val')])
    assert ids.max() == 66_999
    assert tk.load(folder).decode(ids) == text * 2


def test_a_bpe_vocabulary_is_learned_from_the_training_part_alone(run, tmp_path):
    for name, last in (('a', 'zebras and quaggas '), ('b', 'entirely other words ')):
        (tmp_path / f'{name}.txt').write_text(TEXT + last * (len(TEXT) // 9 // len(last)))
        assert run('prepare.py', f'--input={name}.txt', '--vocab_size=300', '--val_fraction=0.2').code == 0
    a, b = (tk.load(tmp_path / 'data' / name) for name in 'ab')
    assert a._mergeable_ranks == b._mergeable_ranks


def test_the_bundled_shakespeare_is_the_default(run, tmp_path):
    result = run('prepare.py', '--tokenizer=byte')
    assert result.code == 0
    meta = json.loads((tmp_path / 'data' / 'shakespeare' / 'meta.json').read_text())
    assert meta['train']['documents'] + meta['val']['documents'] == 42
    separators = 41 * len('<|endoftext|>\n')
    size = (ROOT / 'corpus' / 'shakespeare.txt').stat().st_size
    assert meta['train']['bytes'] + meta['val']['bytes'] == size - separators
    assert f'{meta["train"]["tokens"]:,}' in result.out


def test_preparing_again_replaces_the_dataset_and_nothing_else(run, tmp_path):
    folder = tmp_path / 'data' / 'x'
    folder.mkdir(parents=True)
    (folder / 'input.txt').write_text('abcdef' * 100)  # where nanoGPT's users keep it
    assert run('prepare.py', '--input=data/x/input.txt', '--tokenizer=char', '--name=x').code == 0
    assert run('prepare.py', '--input=data/x/input.txt', '--tokenizer=byte', '--name=x').code == 0
    assert sorted(file.name for file in folder.iterdir()) == [
        *('input.txt', 'meta.json', 'tokenizer.json', 'tokenizer_config.json', 'train.bin', 'val.bin')
    ]
    assert json.loads((folder / 'meta.json').read_text())['tokenizer'] == 'byte'


@pytest.mark.parametrize('step', range(6))
def test_a_dataset_interrupted_anywhere_is_complete_or_has_no_train_bin(run, tmp_path, monkeypatch, step):
    """The disk fails at each of the moves in turn, over a dataset that was there before."""
    (tmp_path / 'x.txt').write_text('abcdef' * 100)
    assert run('prepare.py', '--input=x.txt', '--tokenizer=char').code == 0
    folder = tmp_path / 'data' / 'x'
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    import os

    replace, moves = os.replace, []

    def failing(*args):
        if len(moves) == step:
            raise OSError(28, 'No space left on device')
        moves.append(args)
        return replace(*args)

    monkeypatch.setattr(os, 'replace', failing)
    result = run('prepare.py', '--input=x.txt', '--tokenizer=byte')
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert [child.name for child in (tmp_path / 'data').iterdir()] == ['x'], 'temporary files are left'
    if step < 5:
        assert result.code == 1 and 'No space left' in result.err
        assert after == before or 'train.bin' not in after
    else:
        assert result.code == 0 and json.loads(after['meta.json'])['tokenizer'] == 'byte'


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--input=missing.txt'], 'There is no file missing.txt.'),
        (['--input=ok.txt,missing'], 'There is no file missing.'),
        (['--input='], "input='' has an empty name"),
        (['--input=ok.txt,'], "input='ok.txt,' has an empty name"),
        (['--input=nothing'], 'The folder nothing has no .txt or .md file.'),
        (['--input=empty.txt'], 'There is no text in empty.txt.'),
        (['--input=blank.txt'], 'There is no text in blank.txt.'),
        (['--input=latin.txt'], 'latin.txt is not UTF-8 text: byte 3 cannot be decoded.'),
        (['--input=short.txt', '--tokenizer=byte'], 'its val split has fewer than 2 tokens'),
        (['--input=ok.txt', '--tokenizer=bert'], 'Choose one of: gpt2, bpe, char, byte, or a folder'),
        (['--input=ok.txt', '--vocab_size=100'], '256 bytes and end-of-text make 257'),
        (['--input=ok.txt', '--val_fraction=1.0'], 'must lie between 0 and 1'),
        (['--input=ok.txt', '--val_fraction=nan'], "val_fraction takes float, not 'nan'"),
        (['--input=ok.txt', '--name=../x'], "name='../x' must be a plain name"),
        (['--input=ok.txt', '--name=.'], "name='.' must be a plain name"),
        (['--dataset=shakespear'], "There is no corpus named 'shakespear'"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(run, tmp_path, args, message):
    (tmp_path / 'ok.txt').write_text('All is well. ' * 100)
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'blank.txt').write_text(' \n\n')
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9')
    (tmp_path / 'short.txt').write_text('abcdef')
    (tmp_path / 'nothing').mkdir()
    result = run('prepare.py', *args)
    assert result.code == 1 and message in result.err and result.err.count('\n') == 1
    assert not list((tmp_path / 'data').glob('*'))

"""Splits in several files, and tokens that others have made: nanoGPT's, llm.c's, modded-nanogpt's.

The files are written here from scratch, as those projects' own scripts write them.
"""

import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, TEXT, TINY, losses, same, train, weights

from data import Dataset

GPT2 = [*TINY, '--n_layer=1', '--n_embd=16', '--block_size=16', '--batch_size=2']
GPT2 += ['--max_iters=20', '--log_interval=1', '--eval_interval=10']


def split_files(folder, cuts=(), **description):
    """Cut both splits of a prepared dataset into files, which its meta.json then lists."""
    path = folder / 'meta.json'
    meta = json.loads(path.read_text()) | description
    for split in ('train', 'val'):
        tokens = (folder / f'{split}.bin').read_bytes()
        (folder / f'{split}.bin').unlink()
        names = []
        for start, end in itertools.pairwise([0, *cuts, len(tokens) // 2]):
            names.append(f'{split}_{len(names):05}.bin')
            header = bytes(description.get('header_bytes', 0))
            (folder / names[-1]).write_bytes(header + tokens[2 * start : 2 * end])
        meta[split]['files'] = names
    path.write_text(json.dumps(meta))


# -----------------------------------------------------------------------------
# a split in several files


@pytest.mark.parametrize('description', [{}, {'header_bytes': 1024}], ids=str)
def test_a_split_in_several_files_trains_the_same(run, sheep, tmp_path, description):
    flags = ['--max_iters=30', '--log_interval=1', '--eval_interval=10', '--stride=20']
    train(run, *flags, out='whole')
    split_files(sheep, cuts=(1, 2, 300, 333, 1000), **description)
    result = train(run, *flags, '--verify_data')
    assert 'train 9,801 tokens, val 1,089' in result.out
    for key, count in {'loss': 30, 'val_loss': 4, 'bits_per_byte': 4}.items():
        curve = losses(tmp_path / 'out', key)
        assert curve == losses(tmp_path / 'whole', key)
        assert len(curve) == count
    assert same(weights(tmp_path / 'out', 30), weights(tmp_path / 'whole', 30))
    # The text is the same, so a run goes on with it.
    train(run, '--max_iters=31', '--init_from=resume', out='whole')
    evaluated = []
    for flags in ([], ['--split=train']):
        flags = [*flags, '--format=json', '--device=cpu', '--dtype=float32']
        result = run('evaluate.py', *flags)
        assert result.code == 0, result.err
        evaluated.append(json.loads(result.out)['text'])
    assert evaluated[0]['loss'] == pytest.approx(losses(tmp_path / 'out')[30], rel=1e-6)
    assert [figures['tokens'] for figures in evaluated] == [1089, 9801]


def change_a_token(folder):
    path = folder / 'train_00001.bin'
    tokens = bytearray(path.read_bytes())
    tokens[100] ^= 1
    path.write_bytes(tokens)


def name_a_file(folder, name):
    path = folder / 'meta.json'
    meta = json.loads(path.read_text())
    meta['val']['files'][1] = name
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda folder: (folder / 'val_00001.bin').unlink(), 'there is no val_00001.bin'),
        (
            lambda folder: (folder / 'val_00001.bin').write_bytes(b'12'),
            'the val split has 901 tokens, meta.json says 1,089',
        ),
        (lambda folder: (folder / 'val_00001.bin').write_bytes(b''), 'empty'),
        (lambda folder: (folder / 'val_00001.bin').write_bytes(b'123'), 'data-type size'),
        (
            lambda folder: (folder / 'val_00001.bin').write_bytes(b'\1\1' * 189),
            'the val split has id 257, the vocabulary 257',
        ),
        (change_a_token, 'the checksum of the train split is not the one in meta.json'),
        (lambda folder: name_a_file(folder, '../sheep/val_00001.bin'), 'there is no ../sheep'),
        (lambda folder: name_a_file(folder, '..'), 'there is no ..'),
        (lambda folder: name_a_file(folder, 5), 'there is no 5'),
        (lambda folder: name_a_file(folder, {}), 'unhashable'),
    ],
    ids=['lost', 'cut', 'empty', 'odd', 'id', 'token', 'elsewhere', 'above', 'number', 'object'],
)
def test_a_damaged_split_in_several_files_is_one_sentence(run, sheep, damage, message):
    split_files(sheep, cuts=(900,))
    train(run, '--verify_data', '--eval_only')
    damage(sheep)
    result = train(run, '--verify_data', '--eval_only', code=1)
    assert result.err.startswith('data/sheep is damaged, make it again with: python prepare.py')
    assert message in result.err
    assert result.is_one_sentence


# -----------------------------------------------------------------------------
# tokens of others


def gpt2_ids():
    """Ids of the text, for training and for validation."""
    ids = np.array(tiktoken.get_encoding('gpt2').encode_ordinary(TEXT * 2), np.uint16)
    return ids[:3000], ids[3000:]


def write_shard(path, ids, magic=20240520, version=1, count=None):
    """As write_datafile in llm.c's dev/data/data_common.py, and in modded-nanogpt's data/."""
    header = np.zeros(256, dtype=np.int32)
    header[0] = magic
    header[1] = version
    header[2] = len(ids) if count is None else count
    with open(path, 'wb') as file:
        file.write(header.tobytes())
        file.write(ids.tobytes())


@pytest.fixture
def shards(tmp_path):
    """A folder with llm.c's shards, data/fineweb."""
    folder = tmp_path / 'data' / 'fineweb'
    folder.mkdir(parents=True)
    ids, val_ids = gpt2_ids()
    for number, part in enumerate(np.split(ids, [1000, 1001, 1700]), 1):
        write_shard(folder / f'fineweb_train_{number:06}.bin', part)
    write_shard(folder / 'fineweb_val_000000.bin', val_ids)
    return folder


@pytest.fixture
def nanogpt(run, tmp_path):
    """What nanoGPT's files of the same tokens give: a run in the folder nanogpt."""
    folder = tmp_path / 'data' / 'nanogpt'
    folder.mkdir(parents=True)
    for split, ids in zip(('train', 'val'), gpt2_ids(), strict=True):
        ids.tofile(folder / f'{split}.bin')
    result = run('train.py', *GPT2, '--dataset=nanogpt', '--out_dir=nanogpt')
    assert result.code == 0, result.err
    return tmp_path / 'nanogpt'


def assert_same_losses(a, b):
    for key, count in {'loss': 20, 'val_loss': 3, 'bits_per_byte': 3}.items():
        assert losses(a, key) == losses(b, key)
        assert len(losses(a, key)) == count


def test_llm_cs_shards_train_as_nanogpts_files_do(run, shards, nanogpt, tmp_path):
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    flags = [*GPT2, '--dataset=fineweb', '--verify_data']
    first = run('train.py', *flags)
    assert first.code == 0, first.err
    assert "data/fineweb has no meta.json: assuming llm.c's format, GPT-2's ids;" in first.out
    assert_same_losses(tmp_path / 'out', nanogpt)
    for name, content in before.items():
        assert (shards / name).read_bytes() == content
    added = {'meta.json', 'tokenizer.json', 'tokenizer_config.json'}
    assert {path.name for path in shards.iterdir()} == {*before, *added}

    meta = json.loads((shards / 'meta.json').read_text())
    theirs = json.loads((tmp_path / 'data' / 'nanogpt' / 'meta.json').read_text())
    assert meta.pop('header_bytes') == 1024
    files = meta['train'].pop('files')
    assert files == [f'fineweb_train_{number:06}.bin' for number in range(1, 5)]
    assert meta['val'].pop('files') == ['fineweb_val_000000.bin']
    assert meta == theirs | {'source': ['llm.c']}
    digest = hashlib.sha256(gpt2_ids()[0].tobytes())
    assert meta['train']['sha256'] == digest.hexdigest()

    second = run('train.py', *flags, '--out_dir=second')
    assert 'assuming' not in second.out
    assert_same_losses(tmp_path / 'second', nanogpt)


@pytest.mark.parametrize('has_header', [True, False])
@pytest.mark.parametrize(
    ('train_names', 'val_name'),
    [
        (['tiny_shakespeare_train.bin'], 'tiny_shakespeare_val.bin'),
        (['TinyStories_train.bin'], 'TinyStories_val.bin'),
        (['edu_fineweb_train_000001.bin'], 'edu_fineweb_val_000000.bin'),
        (['train_000.bin', 'train_001.bin'], 'val_000.bin'),
        (['x-train.9.bin', 'x-train.a.bin'], 'x-val.0.bin'),
    ],
)
def test_shards_are_known_by_their_names(tmp_path, train_names, val_name, has_header):
    folder = tmp_path / 'x'
    folder.mkdir()
    ids, val_ids = gpt2_ids()
    parts = dict(zip(train_names, np.array_split(ids, len(train_names)), strict=True))
    others = [val_name, 'training.bin', 'x_values.bin', 'retrain_0.bin', 'x_train.txt']
    for name, part in (parts | dict.fromkeys(others, val_ids)).items():
        if has_header:
            write_shard(folder / name, part)
        else:
            part.tofile(folder / name)
    data = Dataset('x', root=tmp_path, verify=True)
    assert data.train[:].tolist() == ids.tolist()
    assert data.val[:].tolist() == val_ids.tolist()


def test_nanogpts_two_files_are_all_there_is_beside_others(tmp_path):
    ids, val_ids = gpt2_ids()
    for name in ('train.bin', 'val.bin', 'train_small.bin', 'val_2.bin'):
        (val_ids if 'val' in name else ids).tofile(tmp_path / name)
    data = Dataset(tmp_path)
    assert isinstance(data.train, np.memmap)
    assert data.train.tolist() == ids.tolist()
    assert data.val.tolist() == val_ids.tolist()


@pytest.mark.slow
def test_a_folder_anywhere_is_used_by_its_path(run, shards, nanogpt, tmp_path, monkeypatch):
    moved = tmp_path / 'disk' / 'tokens'
    moved.parent.mkdir()
    shards.rename(moved)
    monkeypatch.setenv('HOME', str(tmp_path / 'disk'))
    for out, dataset in {'absolute': moved, 'home': '~/tokens'}.items():
        result = run('train.py', *GPT2, f'--dataset={dataset}', f'--out_dir={out}')
        assert result.code == 0, result.err
        assert_same_losses(tmp_path / out, nanogpt)
    mixed = ['--dataset=~/tokens:3,nanogpt:1', '--out_dir=mixed']
    result = run('train.py', *GPT2, *mixed)
    assert result.code == 0, result.err


def test_a_read_only_folder_is_described_in_memory(run, shards, nanogpt, tmp_path, monkeypatch):
    before = sorted(shards.iterdir())
    make = tempfile.TemporaryDirectory

    def refuse(*args, **kwargs):
        if 'fineweb' in str(kwargs.get('dir')):  # root may write where others may not
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return make(*args, **kwargs)

    monkeypatch.setattr('tempfile.TemporaryDirectory', refuse)
    result = run('train.py', *GPT2, '--dataset=fineweb', '--verify_data')
    assert result.code == 0, result.err
    assert result.out.count('It could not be written (Read-only file system)') == 1
    assert sorted(shards.iterdir()) == before
    assert_same_losses(tmp_path / 'out', nanogpt)
    resumed = ['--dataset=fineweb', '--max_iters=21', '--init_from=resume']
    assert run('train.py', *GPT2, *resumed).code == 0
    assert run('sample.py', '--device=cpu', '--max_new_tokens=5', '--num_samples=1').code == 0


@pytest.mark.slow
def test_several_processes_open_new_shards_at_once(shards, tmp_path):
    code = "import data; print(len(data.Dataset('fineweb', verify=True).train))"
    line = [sys.executable, '-c', code]
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    options = {'cwd': tmp_path, 'env': environment, 'stdout': subprocess.PIPE, 'text': True}
    processes = [subprocess.Popen(line, **options) for _ in range(4)]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [output.splitlines()[-1] for output in outputs] == ['3000'] * 4
    assert not list(shards.glob('.*'))


def test_a_plan_does_not_describe_shards(run, shards):
    before = sorted(shards.iterdir())
    result = run('train.py', '--plan', '--dataset=fineweb', *TINY)
    assert result.code == 0, result.err
    assert 'data/fineweb is not prepared yet' in result.out
    assert sorted(shards.iterdir()) == before
    assert run('train.py', *GPT2, '--dataset=fineweb', '--eval_only').code == 0
    result = run('train.py', '--plan', '--dataset=fineweb', *TINY)
    assert 'data/fineweb: train 3,000 tokens' in result.out


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-10])


def without_header(path):
    path.write_bytes(path.read_bytes()[1024:])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda path: write_shard(path, np.arange(9, dtype=np.uint32), magic=20240801),
            "fineweb_train_000003.bin has Llama 3's ids: only llm.c's GPT-2 ids (20240520, 1) can",
        ),
        (
            lambda path: write_shard(path, np.arange(9, dtype=np.uint16), magic=5),
            'fineweb_train_000003.bin has magic number 5 and version 1: only',
        ),
        (
            lambda path: write_shard(path, np.arange(9, dtype=np.uint16), version=2),
            'has magic number 20240520 and version 2: only',
        ),
        (cut_short, 'fineweb_train_000003.bin does not have the 699 ids that its header says'),
        (
            lambda path: write_shard(path, np.arange(9, dtype=np.uint16), count=8),
            'fineweb_train_000003.bin does not have the 8 ids that its header says: get it again.',
        ),
        (
            lambda path: write_shard(path, np.array([50_257], np.uint16)),
            "fineweb_train_000003.bin does not hold GPT-2's tokens, 16 bits each",
        ),
        (without_header, "Only some files of data/fineweb have llm.c's header: separate them."),
        (
            lambda path: (path.parent / 'fineweb_val_000000.bin').unlink(),
            'data/fineweb has .bin files, but none with val in its name: add one, or rename one',
        ),
    ],
    ids=['llama3', 'magic', 'version', 'cut', 'count', 'ids', 'mixed', 'no val'],
)
def test_what_is_not_gpt2s_shards_is_one_sentence(run, shards, change, message):
    change(shards / 'fineweb_train_000003.bin')
    before = sorted(shards.iterdir())
    result = run('train.py', *GPT2, '--dataset=fineweb')
    assert message in result.err
    assert result.is_one_sentence
    assert sorted(shards.iterdir()) == before

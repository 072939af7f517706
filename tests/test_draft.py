"""A dataset in the making: killed at any moment, in shards, in several files, on a poor network.

Whatever happens, the same command goes on, and ends with the bytes of one that nothing happened to.
"""

import builtins
import contextlib
import errno
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, TEXT, command
from hub import HubServer, write_tinystories, write_tokenizer
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from pyarrow import parquet

import documents
import draft as drafts
import runtime
import sources
import tokenizer as tk
from data import Dataset

SPLITS = ('train', 'val')
MERGE = ['--name=x', '--merge', '--quiet']


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Let a small text have several batches, each of which is flushed, which takes no time."""
    monkeypatch.setattr(os, 'fsync', lambda file: None)
    monkeypatch.setattr(sources, 'PIECE', 1000)
    monkeypatch.setattr(documents, 'PIECE', 1000)
    monkeypatch.setattr(drafts, 'SECONDS', -1)
    yield
    while runtime._locks:  # a process of its own would have one
        runtime._locks.pop().close()


@pytest.fixture
def quick_gpt2(monkeypatch, gpt2_vocabulary):
    """GPT-2's tokenizer, which takes a second to make, is made once."""
    if not hasattr(quick_gpt2, 'tokenizer'):
        quick_gpt2.tokenizer = tk.build('gpt2')
    monkeypatch.setattr(tk, '_download_gpt2', lambda: quick_gpt2.tokenizer)
    monkeypatch.setattr(tk.OwnTokenizer, 'copy', lambda self: self)


@pytest.fixture
def encoded(monkeypatch):
    """The texts of the batches that are tokenized, in order if there is one thread."""
    batches = []
    encode_pieces = documents.encode_pieces

    def encode(pieces, *args):
        batches.append([text for text, _ in pieces])
        return encode_pieces(pieces, *args)

    monkeypatch.setattr(documents, 'encode_pieces', encode)
    return batches


# -----------------------------------------------------------------------------
# texts, folders as dictionaries, and what happens before a change of the disk


def sheep(n, start=0):
    """Several documents, of which some are blank and some are longer than a batch."""
    texts = []
    for number in range(start, start + n):
        length = (number * 7919) % 1700
        texts.append('' if number % 11 == 5 else TEXT[number * 13 :][:length] + f'{number}\n')
    return texts


def write(kind, folder, texts):
    """Write texts as one or more files. Returns the flag that names them."""
    if kind == 'folder':
        (folder / 'texts').mkdir(exist_ok=True)
        for number, text in enumerate(texts):
            (folder / 'texts' / f'{number:03}.txt').write_text(text)
        return '--input=texts'
    path = folder / kind
    if kind == 'one.txt':
        path.write_text(''.join(texts))
    elif kind == 'many.txt':
        path.write_text('<|endoftext|>\n'.join(texts))
    elif kind == 'rows.jsonl':
        path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    else:
        pd.DataFrame({'text': texts}).to_parquet(path)
    return f'--input={kind}'


def write_tokenizer_of(folder, special):
    """Write a published tokenizer to a folder tok."""
    (folder / 'tok').mkdir()
    write_tokenizer(folder / 'tok', special)
    (folder / 'tok' / 'tokenizer_config.json').write_text('{"eos_token": "<|endoftext|>"}')


def read_tree(folder):
    """Read a folder: {path in it: bytes, None for a folder}."""
    paths = sorted(folder.rglob('*')) if folder.exists() else []
    return {
        path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in paths
    }


def write_tree(folder, tree):
    """Let a folder have these files and no others."""
    folder.mkdir(exist_ok=True)
    for path in sorted(folder.rglob('*'), reverse=True):  # what is in a folder before the folder
        if path.relative_to(folder).as_posix() not in tree:
            path.rmdir() if path.is_dir() else path.unlink()
    for name, data in tree.items():
        if data is None:
            (folder / name).mkdir(exist_ok=True)
        else:
            (folder / name).write_bytes(data)


def part_of(tree, folder):
    """What a tree has in one of its folders, {name: bytes}."""
    prefix = f'{folder}/'
    names = [name for name in tree if name.startswith(prefix)]
    return {name.removeprefix(prefix): tree[name] for name in names}


def lines_of(tree, folder='.x.draft'):
    """The complete lines of batches.jsonl in a draft that can be gone on with."""
    if f'{folder}/job.json' not in tree:
        return []
    data = tree.get(f'{folder}/batches.jsonl', b'')
    return [json.loads(line) for line in data.split(b'\n')[:-1]]


def is_absent(dataset):
    return not dataset.keys() & {'train.bin', 'train_00000.bin'}


def is_of_data(file):
    return isinstance(file, str | Path) and Path(file).parts[:1] == ('data',)


@contextlib.contextmanager
def before_each_change(act):
    """Call act(function, path) before each call that changes something in the folder data."""

    def intercept(patch, module, name):
        real = getattr(module, name)

        def function(*args, **options):
            mode = args[1] if len(args) > 1 else options.get('mode', 'r')
            is_reading = name == 'open' and not set(mode) & set('wax+')
            in_a_tree = name == 'fsync' or 'dir_fd' in options  # shutil.rmtree's unlink
            if not is_reading and (in_a_tree or is_of_data(args[0])):
                act(name, str(args[1] if name == 'replace' else args[0]))
            return real(*args, **options)

        patch.setattr(module, name, function)

    with pytest.MonkeyPatch.context() as patch:
        for name in ('fsync', 'replace', 'unlink', 'mkdir', 'rmdir'):
            intercept(patch, os, name)
        intercept(patch, builtins, 'open')
        intercept(patch, io, 'open')  # pathlib's
        yield


def states_of(run, *flags):
    """Run prepare.py. Returns all that a kill at some moment would leave in data."""
    data = Path('data')
    states = []
    with before_each_change(lambda *call: states.append(read_tree(data))):
        result = run('prepare.py', *flags)
    assert result.code == 0, result.err
    states.append(read_tree(data))
    return [key for key, _ in itertools.groupby(states)]


# -----------------------------------------------------------------------------
# killed at any moment

DOCUMENTS = ('many.txt', 'folder', 'rows.jsonl', 'rows.parquet')
KINDS = ('one.txt', *DOCUMENTS)
FEW = [
    ('many.txt', 'bpe', []),
    ('many.txt', 'byte', ['--max_tokens=3000']),
    ('one.txt', 'char', []),
    ('folder', 'gpt2', []),
    ('rows.jsonl', 'char', ['--shard=2/2']),
    ('rows.parquet', 'char', []),
    ('many.txt', 'tok', []),
]
LIMITS = ([], ['--max_tokens=1000'], ['--shard=2/3'])
ALL = itertools.product(KINDS, ('bpe', 'char', 'gpt2'), LIMITS)
OTHERS = [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FEW]


@pytest.mark.parametrize(('kind', 'tokenizer', 'more'), FEW + OTHERS)
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    run, tmp_path, monkeypatch, quick_gpt2, encoded, kind, tokenizer, more
):
    """And what is on the disk is not tokenized again; there is a dataset from before."""
    monkeypatch.setattr(drafts, 'FILE_BYTES', 3000)
    flags = ['--quiet', '--name=x', '--num_proc=1', '--vocab_size=300']
    (tmp_path / 'before.txt').write_text(TEXT)
    assert run('prepare.py', '--input=before.txt', '--tokenizer=byte', *flags).code == 0
    data = tmp_path / 'data'
    before = part_of(read_tree(data), 'x')

    if tokenizer == 'tok':  # a folder that has one
        write_tokenizer_of(tmp_path, ['<|endoftext|>'])
    flags += [write(kind, tmp_path, sheep(6, start=3)), f'--tokenizer={tokenizer}', *more]
    encoded.clear()
    states = states_of(run, *flags)
    whole = states[-1]
    batches = list(encoded)
    shard = more[0][-3:].replace('/', '-of-') if '--shard' in str(more) else None
    folder = f'x-{shard}' if shard else '.x.draft'
    if shard:
        assert part_of(whole, 'x') == before
    else:
        assert [name for name in whole if '/' not in name] == ['x'], 'nothing else is left'

    n_kept = []
    for state in states:
        dataset = part_of(state, 'x')
        assert dataset in (before, part_of(whole, 'x')) or is_absent(dataset)
        write_tree(data, state)
        encoded.clear()
        result = run('prepare.py', *flags)
        assert result.code == 0 and not result.err, result.err
        assert read_tree(data) == whole
        n_kept.append(len(lines_of(state, folder)))
        again = batches[n_kept[-1] :]
        if '--max_tokens' in str(more):  # some are tokenized ahead, and not needed
            n = min(len(again), len(encoded))
            assert encoded[:n] == again[:n] and n >= len(again) - 4
        else:
            assert encoded == again
    assert {*range(min(5, len(batches)))} <= {*n_kept}, 'the states are of many moments'


# What of some batches is where: of both splits, over several files.
ROWS = []
for number in range(6):
    row = {'part': number // 3, 'batch': number % 3, 'split': SPLITS[number % 2]}
    row |= {'tokens': 2 * number, 'bytes': number, 'documents': 1, 'highest': 9}
    ROWS.append(row | {'oddities': {'blank': 1}, 'changes': {'é': [number, ['a', 'b']]}})


def go_on(folder, rows):
    """Add to a draft what it lacks of these rows. Returns it, and the last place that it had."""
    draft = drafts.Draft(folder, {'seed': 1})
    draft.open({'dtype': '<u2'}, SimpleNamespace(files={'tokenizer.json': b'{}'}))
    last = draft.last
    for row in rows:
        if (row['part'], row['batch']) > last:
            draft.add(row, np.arange(row['tokens'], dtype='<u2'))
    draft.flush()
    return draft, last


@pytest.fixture
def half_a_draft(tmp_path, monkeypatch):
    """The tree of a draft that has four of six batches."""
    monkeypatch.setattr(drafts, 'lock_file', lambda *args: None)  # a process has only 1,000 files
    monkeypatch.setattr(drafts, 'FILE_BYTES', 10)
    go_on(tmp_path / 'draft', ROWS[:4])
    return read_tree(tmp_path / 'draft')


def test_cut_at_any_byte_it_goes_on_to_the_same_bytes(tmp_path, half_a_draft):
    """batches.jsonl too: it goes on behind its last complete line."""
    draft, _ = go_on(tmp_path / 'whole', ROWS)
    draft.finish()
    whole = read_tree(tmp_path / 'whole')
    bins = [name for name in half_a_draft if name.endswith('.bin')]
    assert len(bins) == 3, 'of 4 and 8 tokens'
    n_cuts = 0
    for name in ('batches.jsonl', *bins):
        data = half_a_draft[name]
        for size in range(len(data) + 1):
            write_tree(tmp_path / 'cut', half_a_draft | {name: data[:size]})
            again, last = go_on(tmp_path / 'cut', ROWS)
            if name == 'batches.jsonl':
                n_lines = data[:size].count(b'\n')
                before = (-1, -1), *((row['part'], row['batch']) for row in ROWS)
                assert last == before[n_lines]
            again.finish()
            assert read_tree(tmp_path / 'cut') == whole
            assert again.totals == draft.totals
            n_cuts += 1
    assert n_cuts > 500


@pytest.mark.parametrize('n_more', [1, 2, 3, 7, 10, 11, 25, 100])
def test_tokens_that_no_line_knows_of_are_cut_off(tmp_path, half_a_draft, n_more):
    """They were on the disk, and batches.jsonl did not say so yet."""
    draft, _ = go_on(tmp_path / 'whole', ROWS)
    draft.finish()
    write_tree(tmp_path / 'draft', half_a_draft)
    for split, number in (('train', 0), ('val', 1)):  # the last file of each
        data = half_a_draft[f'{split}_{number:05}.bin'] + bytes(n_more)
        for start in range(0, len(data), 10):  # what is more than a file holds goes to others
            path = tmp_path / 'draft' / f'{split}_{number:05}.bin'
            path.write_bytes(data[start : start + 10])
            number += 1
    again, last = go_on(tmp_path / 'draft', ROWS)
    again.finish()
    assert last == (1, 0)
    assert read_tree(tmp_path / 'draft') == read_tree(tmp_path / 'whole')


# -----------------------------------------------------------------------------
# killed by the system, and interrupted

# prepare.py as a process, with small batches that are soon on the disk.
QUICK = """
import os, runpy, sys

sys.path.insert(0, {root!r})
import runtime

runtime.begin_script()
import documents, draft, sources

sources.PIECE = documents.PIECE = 2000
draft.SECONDS = 0.02
{more}
sys.argv = ['prepare.py', *sys.argv[1:]]
runpy.run_path({root!r} + '/prepare.py', run_name='__main__')
"""
PIPES = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}


def start(cwd, *flags, more=''):
    """Start prepare.py as its own process. more: code that changes its modules."""
    code = QUICK.format(root=str(ROOT), more=textwrap.dedent(more))
    return subprocess.Popen([sys.executable, '-c', code, *flags], cwd=cwd, **PIPES)


def finish(job):
    """Wait for a process: its status, its stdout and its stderr."""
    out, err = job.communicate(timeout=300)
    return job.returncode, out, err


def kill_again_and_again(folder, begin, until):
    """Begin a job, and again, until it is done. Returns how many were killed.

    until: for each process that is killed, a function of the process which returns when it is to
    happen. What is on the disk only grows, and the next process goes on behind it.
    """
    n_killed = 0
    n_tokens = 0  # on the disk
    for number, wait in enumerate([*until, subprocess.Popen.wait]):
        job = begin()
        wait(job)
        how = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 3]
        job.send_signal(how)
        code, out, err = finish(job)
        if code == 0:
            break
        statuses = (-how, 143) if how == signal.SIGTERM else (-how,)  # in the imports, and later
        assert code in statuses
        assert 'Traceback' not in err or 'runtime.py' in err  # it is the first to be imported
        n_killed += 1
        assert 'Going on' not in out or f'{n_tokens:,} tokens' in out
        rows = lines_of(read_tree(folder / 'data'))
        n_before = n_tokens
        n_tokens = sum(row['tokens'] for row in rows if row['split'] == 'train')
        assert n_tokens >= n_before or not rows, 'but for the instant in which it is published'
    return n_killed


def after(seconds):
    """Return a function that waits for so long, or until the process has ended."""

    def wait(job):
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(seconds)

    return wait


def grown(folder, size):
    """Return a function that waits until there are so many bytes of training tokens on the disk."""

    def wait(job):
        while job.poll() is None:
            files = (folder / 'data').glob('.x.draft/train_*.bin')
            with contextlib.suppress(FileNotFoundError):  # it is being published
                if sum(path.stat().st_size for path in files) >= size:
                    return
            time.sleep(0.002)

    return wait


# In QUICK, for enough time to be killed.
SLOWLY = """
import time

encode_pieces = documents.encode_pieces


def encode_slowly(*args):
    time.sleep(0.02)
    return encode_pieces(*args)


documents.encode_pieces = encode_slowly
"""


def test_killed_again_and_again_it_ends_with_the_same_bytes(run, tmp_path):
    flags = [write('many.txt', tmp_path, 12 * sheep(40)), '--name=x', '--vocab_size=300']
    assert run('prepare.py', *flags, '--quiet').code == 0
    whole = read_tree(tmp_path / 'data')
    n_bytes = len(whole['x/train.bin'])
    shutil.rmtree(tmp_path / 'data')
    instants = [after(0.2), *(grown(tmp_path, n_bytes * share) for share in (0.1, 0.4, 0.7))]
    begin = functools.partial(start, tmp_path, *flags, more=SLOWLY)
    assert kill_again_and_again(tmp_path, begin, instants) == 4
    assert read_tree(tmp_path / 'data') == whole


def kill_20_times(folder, begin):
    """Kill a job 20 times: in the imports, in the survey, while it tokenizes, and at its end."""
    job = begin()
    code, _, err = finish(job)
    assert code == 0, err
    whole = read_tree(folder / 'data')
    shutil.rmtree(folder / 'data')
    n_bytes = len(whole['x/train.bin'])
    rng = random.Random(1)
    instants = []
    for number in range(8):
        instants.append(after(rng.uniform(0.1, 0.7)))
        instants.append(grown(folder, n_bytes * rng.uniform(number, number + 1) / 10))
    instants += [grown(folder, n_bytes * share) for share in (0.9, 0.99, 1, 1)]
    n_killed = kill_again_and_again(folder, begin, instants)
    assert read_tree(folder / 'data') == whole
    return n_killed


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('tokenizer', ['bpe', 'char', 'gpt2'])
@pytest.mark.parametrize('more', [[], ['--max_tokens=300000']], ids=str)
def test_killed_20_times_it_ends_with_the_same_bytes(tmp_path, kind, tokenizer, more):
    flags = [write(kind, tmp_path, 40 * sheep(50)), '--name=x', f'--tokenizer={tokenizer}']
    begin = functools.partial(start, tmp_path, *flags, *more, more=SLOWLY)
    assert kill_20_times(tmp_path, begin) >= 18


@pytest.mark.slow
def test_killed_20_times_a_large_job_ends_with_the_same_bytes(tmp_path):
    """As users have it: what is tokenized is on the disk after two seconds."""
    flags = [write('many.txt', tmp_path, 1000 * sheep(100)), '--name=x', '--num_proc=1']

    def begin():
        line = [sys.executable, str(ROOT / 'prepare.py'), *flags]
        return subprocess.Popen(line, cwd=tmp_path, **PIPES)

    assert kill_20_times(tmp_path, begin) >= 16


def test_two_processes_do_not_prepare_one_dataset(run, tmp_path):
    """The second is refused, whatever it is to do, and does no harm to the first."""
    texts = sheep(20)
    flags = [write('many.txt', tmp_path, texts), '--name=x', '--vocab_size=300']
    other = [write('rows.jsonl', tmp_path, sheep(30)), '--name=x', '--tokenizer=byte']
    assert run('prepare.py', *flags, '--quiet').code == 0
    whole = read_tree(tmp_path / 'data')
    shutil.rmtree(tmp_path / 'data')
    for number in (1, 2):
        assert run('prepare.py', *other, f'--shard={number}/2').code == 0
    stop_in_the_middle = """
    import signal

    add = draft.Draft.add

    def stop(self, row, ids):
        add(self, row, ids)
        self.flush()
        if self.last == (0, 5):
            os.kill(os.getpid(), signal.SIGSTOP)

    draft.Draft.add = stop
    """
    first = start(tmp_path, *flags, more=stop_in_the_middle)
    os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    there = read_tree(tmp_path / 'data')
    for second in (flags, other, [*flags, '--max_tokens=100'], MERGE):
        result = run('prepare.py', *second)
        message = 'Another process prepares data/.x.draft: wait for it.'
        assert result.is_one_sentence and message in result.err, result.err
        assert read_tree(tmp_path / 'data') == there
    first.send_signal(signal.SIGCONT)
    assert finish(first)[0] == 0
    assert part_of(read_tree(tmp_path / 'data'), 'x') == part_of(whole, 'x')
    # Nor one shard; another shard is another draft.
    flags += ['--shard=1/3']
    first = start(tmp_path, *flags, more=stop_in_the_middle.replace('(0, 5)', '(0, 7)'))
    os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    result = run('prepare.py', *flags)
    assert result.is_one_sentence and 'prepares data/x-1-of-3: wait' in result.err
    assert run('prepare.py', *flags[:-1], '--shard=2/3').code == 0
    first.send_signal(signal.SIGCONT)
    assert finish(first)[0] == 0


# -----------------------------------------------------------------------------
# a full disk, and one that is read-only


class Disk:
    """A disk that has room for so many bytes more in the folder data."""

    def __init__(self, room):
        self.room = room
        self.real_open = io.open

    def open(self, path, mode='r', *args, **options):
        if not is_of_data(path) or not set(mode) & set('wax'):
            return self.real_open(path, mode, *args, **options)
        file = LimitedFile(path, mode.replace('b', ''))
        file.disk = self
        buffered = io.BufferedWriter(file)
        return buffered if 'b' in mode else io.TextIOWrapper(buffered)


class LimitedFile(io.FileIO):
    """A file that is written to as long as its disk has room."""

    def write(self, data):
        kept = memoryview(data)[: self.disk.room]
        if len(data) and not len(kept):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.disk.room -= len(kept)
        return super().write(kept)


@pytest.fixture
def quick_collection():
    """What is there by now is not looked at by gc.collect()."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def older(run, tmp_path):
    """A dataset x, of other text than that which is to be prepared: {name: bytes}."""
    (tmp_path / 'older.txt').write_text(TEXT)
    assert run('prepare.py', '--input=older.txt', '--tokenizer=byte', '--name=x').code == 0
    return part_of(read_tree(tmp_path / 'data'), 'x')


@pytest.mark.parametrize('what', ['prepare', 'merge'])
@pytest.mark.usefixtures('quick_collection')
def test_a_full_disk_is_one_sentence_and_harms_nothing(run, tmp_path, older, what):
    """It has room for more and more; then there is room, and the same command goes on."""
    data = tmp_path / 'data'
    flags = [write('many.txt', tmp_path, sheep(8, start=3)), '--vocab_size=300', '--name=x']
    if what == 'merge':
        for number in (1, 2):
            assert run('prepare.py', *flags, f'--shard={number}/2').code == 0
        flags = MERGE
    begin = read_tree(data)
    assert run('prepare.py', *flags, '--quiet').code == 0
    whole = read_tree(data)
    n_full = 0
    for room in itertools.count(0, 1777):
        write_tree(data, begin)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(room)
            patch.setattr(builtins, 'open', disk.open)
            patch.setattr(io, 'open', disk.open)
            result = run('prepare.py', *flags, '--quiet')
            gc.collect()  # what waits to be written leaves now, not in the middle of what follows
        if result.code == 0:
            break
        n_full += 1
        assert result.is_one_sentence and 'No space left on device' in result.err, result.err
        assert part_of(read_tree(data), 'x') == older
        result = run('prepare.py', *flags, '--quiet')
        assert result.code == 0 and read_tree(data) == whole
    assert n_full > 5 and read_tree(data) == whole


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.usefixtures('quick_collection')
def test_a_disk_that_fails_is_one_sentence(run, tmp_path, older, number):
    """At each call that changes it, in turn. An older dataset is as it was, or absent."""
    data = tmp_path / 'data'
    flags = [write('many.txt', tmp_path, sheep(2, start=3)), '--vocab_size=300', '--name=x']
    begin = read_tree(data)
    calls = []
    with before_each_change(lambda *call: calls.append(call)):
        assert run('prepare.py', *flags, '--quiet').code == 0
    whole = read_tree(data)
    names, paths = zip(*calls, strict=True)
    assert {*names} == {'fsync', 'replace', 'unlink', 'mkdir', 'rmdir', 'open'}
    to_publish = paths.index('data/x/train.bin')
    if number == errno.ENOSPC:  # to delete takes no space
        steps = [step for step, name in enumerate(names) if name not in ('unlink', 'rmdir')]
    else:
        steps = range(0, len(calls), 5)
    for step in steps:
        write_tree(data, begin)
        seen = []

        def fail(name, path, seen=seen, step=step):
            seen.append(name)
            if len(seen) == step + 1:
                raise OSError(number, os.strerror(number))

        with before_each_change(fail):
            result = run('prepare.py', *flags, '--quiet')
            gc.collect()
        dataset = part_of(read_tree(data), 'x')
        if calls[step] == ('mkdir', 'data/x'):  # it is there
            assert result.code == 0 and dataset == part_of(whole, 'x')
            continue
        if step > to_publish:
            assert dataset == part_of(whole, 'x') or is_absent(dataset)
        else:
            assert dataset == older
        assert result.is_one_sentence and os.strerror(number) in result.err, result.err
        assert run('prepare.py', *flags, '--quiet').code == 0
        assert read_tree(data) == whole


# -----------------------------------------------------------------------------
# something else is asked for


def test_a_name_that_leads_elsewhere_is_refused(run, tmp_path):
    flag = write('one.txt', tmp_path, sheep(8))
    before = read_tree(tmp_path)
    for name in ('.x', '..', '.', 'a/b', '../b', '/b', 'a/..', '.x.draft', str(tmp_path / 'b')):
        for more in ([], ['--shard=1/2'], ['--merge']):
            result = run('prepare.py', flag, f'--name={name}', *more)
            assert result.is_one_sentence and 'must be a plain name' in result.err, result.err
            assert read_tree(tmp_path) == before


def change_text(folder):
    path = folder / 'many.txt'
    status = path.stat()
    path.write_text(path.read_text().replace('sheep', 'goats', 1))
    assert path.stat().st_size == status.st_size


def change_time(folder):
    """Of a file that is the same otherwise."""
    nanoseconds = (folder / 'many.txt').stat().st_mtime_ns + 1000
    os.utime(folder / 'many.txt', ns=(nanoseconds, nanoseconds))


def change_tokenizer(folder):
    """Of the same name: its files are others."""
    shutil.rmtree(folder / 'tok')
    write_tokenizer_of(folder, ['<|endoftext|>', '<|im_end|>', '<|im_start|>'])


def change_end_of_text(folder):
    """Of a tokenizer that has the same tokens."""
    (folder / 'tok' / 'tokenizer_config.json').write_text('{"eos_token": "<|im_end|>"}')


OWN = '--tokenizer=bpe'
TOK = '--tokenizer=tok'


@pytest.mark.parametrize(
    ('tokenizer', 'change', 'flags'),
    [
        (OWN, change_text, []),
        (OWN, change_time, []),
        (TOK, change_tokenizer, []),
        (TOK, change_end_of_text, []),
        (OWN, None, ['--seed=3']),
        (OWN, None, ['--val_fraction=0.4']),
        (OWN, None, ['--val_input=val.txt']),
        (OWN, None, ['--vocab_size=270']),
        (OWN, None, ['--tokenizer=char']),
        (OWN, None, ['--tokenizer=tok']),
        (OWN, None, ['--max_tokens=900']),
        (OWN, None, ['--input=many.txt,val.txt']),
        (TOK, None, ['--tokenizer=bpe']),
    ],
)
def test_what_has_changed_is_started_anew(run, tmp_path, encoded, tokenizer, change, flags):
    write_tokenizer_of(tmp_path, ['<|endoftext|>', '<|im_end|>'])
    (tmp_path / 'val.txt').write_text(TEXT[:500])
    usual = [write('many.txt', tmp_path, sheep(6, start=3)), '--vocab_size=300', tokenizer]
    usual += ['--name=x', '--num_proc=1', '--quiet']
    states = states_of(run, *usual)
    data = tmp_path / 'data'
    if change is not None:
        change(tmp_path)
    shutil.rmtree(data)
    encoded.clear()
    assert run('prepare.py', *usual, *flags).code == 0
    whole = read_tree(data)
    assert whole != states[-1] or change == change_time
    batches = list(encoded)
    n_lines = [len(lines_of(state)) for state in states]
    for state in (states[n_lines.index(1)], states[n_lines.index(max(n_lines))]):
        write_tree(data, state)
        encoded.clear()
        result = run('prepare.py', *usual, *flags)
        assert result.code == 0 and 'Going on' not in result.out, result.err
        assert read_tree(data) == whole
        assert encoded[: len(batches)] == batches[: len(encoded)] and encoded


def test_a_file_that_cannot_be_read_for_now_costs_no_tokens(run, tmp_path, monkeypatch, encoded):
    """What was tokenized before stays, and is not tokenized again."""
    flags = [write('many.txt', tmp_path, sheep(8)), '--tokenizer=byte', '--name=x', '--num_proc=1']
    data = tmp_path / 'data'
    assert run('prepare.py', *flags).code == 0
    whole = read_tree(data)
    batches = list(encoded)
    shutil.rmtree(data)
    encoded.clear()
    read_text = sources.read_text
    survey = documents.survey

    def fail(source):
        """As a disk on the network does now and then."""
        yield from itertools.islice(read_text(source), 12)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def survey_and_fail(*args):
        found = survey(*args)
        monkeypatch.setattr(sources, 'read_text', fail)
        return found

    monkeypatch.setattr(documents, 'survey', survey_and_fail)
    result = run('prepare.py', *flags)
    assert result.is_one_sentence and 'Input/output error' in result.err, result.err
    monkeypatch.setattr(documents, 'survey', survey)
    monkeypatch.setattr(sources, 'read_text', read_text)
    gc.collect()
    n_kept = len(lines_of(read_tree(data)))
    encoded.clear()
    assert run('prepare.py', *flags).code == 0
    assert n_kept > 2 and encoded == batches[n_kept:]
    assert read_tree(data) == whole


def test_a_kill_between_two_jobs_lets_both_go_on(run, tmp_path):
    """At any moment of deleting what another job has left: neither is stuck."""
    jobs = []
    for kind, seed in (('many.txt', 1), ('rows.jsonl', 2)):
        flag = write(kind, tmp_path, sheep(5, start=3))
        jobs.append([flag, '--vocab_size=300', '--name=x', '--quiet', f'--seed={seed}'])
    data = tmp_path / 'data'
    first = states_of(run, *jobs[0])
    shutil.rmtree(data)
    assert run('prepare.py', *jobs[1]).code == 0
    wholes = [first[-1], read_tree(data)]
    middle = next(state for state in first if len(lines_of(state)) == 2)
    write_tree(data, middle)
    states = states_of(run, *jobs[1])
    assert len(states) > 30
    for state in states:
        for job, whole in zip(jobs, wholes, strict=True):
            write_tree(data, state)
            result = run('prepare.py', *job)
            assert result.code == 0, result.err
            assert read_tree(data) == whole


def test_a_folder_of_somebody_else_is_left_as_it_is(run, tmp_path):
    flags = [write('many.txt', tmp_path, sheep(8)), '--name=x', '--shard=1/2']
    folder = tmp_path / 'data' / 'x-1-of-2'
    for name in ('input.txt', 'train.bin', 'notes/a.txt'):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text('mine')
        result = run('prepare.py', *flags)
        assert result.is_one_sentence and str(folder.relative_to(tmp_path)) in result.err
        assert (folder / name).read_text() == 'mine'


# -----------------------------------------------------------------------------
# several files


@pytest.mark.parametrize('size', [100, 96, 2, 'all', 'all but one token', 'half'])
def test_several_files_have_the_bytes_of_one(run, tmp_path, monkeypatch, size):
    texts = [TEXT[:150], TEXT[200:330], TEXT[1000:1190]]
    flags = [write('many.txt', tmp_path, texts), '--tokenizer=byte', '--name=x']
    data = tmp_path / 'data'
    first = run('prepare.py', *flags)
    assert first.code == 0, first.err
    in_one = part_of(read_tree(data), 'x')
    n_bytes = len(in_one['train.bin'])
    sizes = {'all': n_bytes, 'all but one token': n_bytes - 2, 'half': n_bytes // 4 * 2}
    file_bytes = sizes.get(size, size)
    for times in (1, 2):  # over one file, and over several
        monkeypatch.setattr(drafts, 'FILE_BYTES', file_bytes)
        result = run('prepare.py', *flags)
        assert result.code == 0 and result.out == first.out, result.err
        dataset = part_of(read_tree(data), 'x')
        meta = json.loads(dataset['meta.json'])
        for split in SPLITS:
            n_files = -(-len(in_one[f'{split}.bin']) // file_bytes)
            files = meta[split].pop('files', [f'{split}.bin'])
            assert len(files) == n_files, (split, times)
            joined = b''.join(dataset.pop(name) for name in files)
            assert joined == in_one[f'{split}.bin']
            assert meta[split]['sha256'] == hashlib.sha256(joined).hexdigest()
        assert meta == json.loads(in_one['meta.json'])
        assert sorted(dataset) == ['meta.json', 'tokenizer.json', 'tokenizer_config.json']
        opened = Dataset('x', data, verify=True)
        assert opened.train[:].tobytes() == in_one['train.bin']
        assert opened.val[:].tobytes() == in_one['val.bin']
    monkeypatch.setattr(drafts, 'FILE_BYTES', 2**30)
    assert run('prepare.py', *flags).code == 0
    assert part_of(read_tree(data), 'x') == in_one


# -----------------------------------------------------------------------------
# shards


def several(kind, folder):
    """Write a corpus of so many parts, and return the flags that name it."""
    if kind == 'a corpus with a validation split':
        repository = folder / 'me' / 'mine'
        for number in range(4):
            split = 'validation' if number == 0 else 'train'
            table = repository / 'data' / f'{split}-{number:05}-of-00004.parquet'
            table.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame({'text': sheep(6, start=6 * number)}).to_parquet(table)
        return ['--dataset=hf:me/mine']
    if kind == 'two tables':
        write('rows.jsonl', folder, sheep(9))
        write('rows.parquet', folder, sheep(9, start=9))
        return ['--input=rows.jsonl,rows.parquet']
    if kind == 'validation texts':
        (folder / 'val.txt').write_text(TEXT[:3000])
        return [write('many.txt', folder, sheep(20)), '--val_input=val.txt']
    n = 3 if kind == 'folder' else 18
    return [write(kind, folder, sheep(n, start=1))]


CORPORA = ('one.txt', 'many.txt', 'folder', 'two tables', 'validation texts', 'rows.jsonl')


@pytest.mark.parametrize('n', [1, 2, 3, 16])
@pytest.mark.parametrize('kind', [*CORPORA, 'a corpus with a validation split'])
def test_shards_are_merged_to_the_bytes_of_one(run, tmp_path, monkeypatch, encoded, kind, n):
    """There are fewer parts than shards, as many, or more. Each batch is of one shard."""
    monkeypatch.setattr(drafts, 'FILE_BYTES', 2000)
    flags = [*several(kind, tmp_path), '--vocab_size=300', '--name=x', '--num_proc=1']
    data = tmp_path / 'data'
    assert run('prepare.py', *flags).code == 0
    whole = part_of(read_tree(data), 'x')
    batches = sorted(encoded)
    encoded.clear()
    shutil.rmtree(data)
    numbers = [*range(1, n + 1)]
    random.Random(n).shuffle(numbers)  # on several machines
    for number in numbers:
        result = run('prepare.py', *flags, f'--shard={number}/{n}')
        assert result.code == 0, result.err
        assert f'data/x-{number}-of-{n} is done' in result.out
        assert '--name=x --merge' in result.out
    assert sorted(encoded) == batches
    shards = read_tree(data)
    assert {name for name in shards if '/' not in name} == {f'x-{k}-of-{n}' for k in numbers}
    for times in (1, 2):
        result = run('prepare.py', *MERGE)
        assert result.code == 0, result.err
        merged = read_tree(data)
        assert part_of(merged, 'x') == whole, times
        assert merged.keys() - shards.keys() == {'x', *(f'x/{name}' for name in whole)}
    # A shard that is done has nothing to do.
    encoded.clear()
    assert run('prepare.py', *flags, f'--shard=1/{n}').code == 0
    assert not encoded and part_of(read_tree(data), f'x-1-of-{n}') == part_of(shards, f'x-1-of-{n}')


@pytest.mark.parametrize('n', [2, 3, 4])
@pytest.mark.parametrize('kind', ['one.txt', 'many.txt'])
def test_shards_of_a_single_file_have_equal_work(run, tmp_path, kind, n):
    flags = [write(kind, tmp_path, sheep(60)), '--tokenizer=byte', '--name=x']
    counts = []
    for number in range(1, n + 1):
        assert run('prepare.py', *flags, f'--shard={number}/{n}').code == 0
        rows = lines_of(read_tree(tmp_path / 'data'), f'x-{number}-of-{n}')
        counts.append(sum(row['split'] == 'train' for row in rows))
    assert max(counts) - min(counts) <= 2 and min(counts) > 3


def test_a_merge_killed_at_any_moment_is_done_again(run, tmp_path, monkeypatch, older):
    monkeypatch.setattr(drafts, 'FILE_BYTES', 2000)
    flags = [write('many.txt', tmp_path, sheep(6, start=3)), '--vocab_size=300', '--name=x']
    for number in (1, 2):
        assert run('prepare.py', *flags, f'--shard={number}/2').code == 0
    states = states_of(run, *MERGE)
    whole = states[-1]
    assert len(states) > 30 and part_of(whole, 'x') != older
    for state in states:
        dataset = part_of(state, 'x')
        assert dataset in (older, part_of(whole, 'x')) or is_absent(dataset)
        write_tree(tmp_path / 'data', state)
        result = run('prepare.py', *MERGE)
        assert result.code == 0 and not result.err, result.err
        assert read_tree(tmp_path / 'data') == whole


def prepare_other(*flags):
    """Return a damage: the second shard is prepared with other flags."""

    def damage(data, prepare):
        prepare('--shard=2/3', *flags)

    return damage


def prepare_other_text(data, prepare):
    """Of the same size: our own vocabulary tells that it is another."""
    path = data.parent / 'many.txt'
    path.write_text(path.read_text().replace('sheep', 'goats'))
    prepare('--shard=2/3')


def prepare_longer_text(data, prepare):
    with open(data.parent / 'many.txt', 'a') as file:
        file.write('One more.\n')
    prepare('--shard=2/3')


def cut_tokens(data, prepare):
    """As if it had not been copied to its end."""
    path = max((data / 'x-2-of-3').glob('train_*.bin'))
    os.truncate(path, path.stat().st_size - 2)


def cut_lines(data, prepare):
    path = data / 'x-2-of-3' / 'batches.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join(lines[:-1]))


def leave_unfinished(data, prepare):
    path = data / 'x-2-of-3' / 'job.json'
    job = json.loads(path.read_text())
    path.write_text(json.dumps(job | {'done': False}))


MISSING = 'data/x-2-of-3 is missing: prepare it with --shard=2/3, or copy it here.'
INCOMPLETE = 'data/x-2-of-3 is not complete: run its command again, or copy it anew.'
OTHER = 'data/x-2-of-3 was made of other text, or with other flags, than data/x-1-of-3'


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda data, prepare: shutil.rmtree(data / 'x-2-of-3'), MISSING),
        (lambda data, prepare: (data / 'x-2-of-3' / 'job.json').unlink(), INCOMPLETE),
        (leave_unfinished, INCOMPLETE),
        (lambda data, prepare: (data / 'x-2-of-3' / 'train_00000.bin').unlink(), 'x-2-of-3'),
        (lambda data, prepare: (data / 'x-2-of-3' / 'batches.jsonl').unlink(), 'x-2-of-3'),
        (lambda data, prepare: (data / 'x-1-of-3' / 'tokenizer.json').unlink(), 'x-1-of-3'),
        (lambda data, prepare: (data / 'x-2-of-3' / 'job.json').write_text('{"jo'), INCOMPLETE),
        (cut_tokens, 'data/x-2-of-3'),
        (cut_lines, 'data/x-2-of-3'),
        (prepare_other('--seed=2'), OTHER),
        (prepare_other('--vocab_size=270'), OTHER),
        (prepare_other('--tokenizer=char'), OTHER),
        (prepare_other('--val_fraction=0.3'), OTHER),
        (prepare_other_text, OTHER),
        (prepare_longer_text, OTHER),
        (lambda data, prepare: prepare('--shard=1/2'), 'There are parts of 2 different numbers'),
        (lambda data, prepare: [shutil.rmtree(path) for path in data.glob('x-*')], 'no parts'),
    ],
)
def test_shards_that_do_not_fit_together_are_refused(run, tmp_path, older, damage, message):
    flags = [write('many.txt', tmp_path, sheep(20)), '--vocab_size=300', '--name=x']

    def prepare(*more):
        result = run('prepare.py', *flags, *more)
        assert result.code == 0, result.err

    for number in (1, 2, 3):
        prepare(f'--shard={number}/3')
    damage(tmp_path / 'data', prepare)
    before = read_tree(tmp_path / 'data')
    result = run('prepare.py', *MERGE)
    assert result.is_one_sentence and message in result.err, result.err
    assert read_tree(tmp_path / 'data') == before


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        *[([f'--shard={shard}'], 'must be such as 3/16') for shard in '0/3 4/3 a/b 3 1/0'.split()],
        *[([f'--shard={shard}'], 'must be such as 3/16') for shard in ('', '1/3/4', '-1/3')],
        (['--shard=1/3', '--max_tokens=100'], 'neither with max_tokens nor with merge'),
        (['--shard=1/3', '--merge'], 'neither with max_tokens nor with merge'),
    ],
)
def test_what_is_no_shard_is_refused(run, tmp_path, flags, message):
    flag = write('many.txt', tmp_path, sheep(8))
    result = run('prepare.py', flag, '--name=x', *flags)
    assert result.is_one_sentence and message in result.err, result.err
    assert not (tmp_path / 'data').exists()


def test_shards_of_any_name_are_merged(run, tmp_path):
    for name in ('a[1]', 'x-1-of-2', 'a b', 'é*?'):
        flags = [write('many.txt', tmp_path, sheep(8)), '--tokenizer=byte', f'--name={name}']
        for number in (1, 2):
            assert run('prepare.py', *flags, f'--shard={number}/2').code == 0
        result = run('prepare.py', f'--name={name}', '--merge', '--quiet')
        assert result.code == 0, result.err
        merged = part_of(read_tree(tmp_path / 'data'), name)
        assert run('prepare.py', *flags).code == 0
        assert part_of(read_tree(tmp_path / 'data'), name) == merged


# -----------------------------------------------------------------------------
# the Hub, over a poor network

# What each process runs first: it does not wait, but writes down who wanted to, and for how long.
SITE = """
import os, sys, time


def nap(seconds):
    with open(os.environ['NAPS'], 'a') as file:
        file.write(sys._getframe(1).f_globals['__name__'] + f' {{seconds}}\\n')


time.sleep = nap
sys.path.insert(0, {root!r})
import fsspec.spec
import documents, draft, sources

documents.PIECE = 20_000
sources.PIECE = fsspec.spec.AbstractBufferedFile.DEFAULT_BLOCK_SIZE = 10_000
draft.SECONDS = -1
"""
STORIES = ['--dataset=tinystories', '--tokenizer=byte', '--num_proc=1', '--quiet']


class PoorHub(HubServer):
    """A Hub that is cut off in the middle of each nth file, and goes away after some files."""

    cut_every = None
    files_left = math.inf
    is_silent = False  # when it is away: it does not answer, else 503
    n_files = 0

    def is_failing(self):
        is_away = self.files_left <= 0
        if is_away and self.is_silent:
            raise ConnectionResetError
        return is_away or super().is_failing()

    def cut(self, data):
        with self.lock:
            self.n_files += 1
            self.files_left -= 1
            if self.cut_every and self.n_files % self.cut_every == 0:
                self.cut_after = len(data) // 2
        return super().cut(data)


@pytest.fixture
def hub(tmp_path):
    """TinyStories in six files, each of which needs several requests if it is streamed."""
    rng = random.Random(1)
    train = []
    for number in range(6):
        train.append([f'Story {number} {n}: {rng.randbytes(20).hex()}' for n in range(2500)])
    write_tinystories(tmp_path / 'hub', train, [f'Another story {n}.' for n in range(20)])
    for path in (tmp_path / 'hub').rglob('train-*.parquet'):
        parquet.write_table(parquet.read_table(path), path, row_group_size=250)
    with PoorHub(tmp_path / 'hub') as server:
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """Run prepare.py as a client of the Hub: its result, and its own pauses."""
    (tmp_path / 'site').mkdir()
    (tmp_path / 'site' / 'sitecustomize.py').write_text(SITE.format(root=str(ROOT)))
    naps = tmp_path / 'naps'

    def client(*flags):
        naps.write_text('')
        more = {'PYTHONPATH': str(tmp_path / 'site'), 'NAPS': str(naps)}
        environment = hub.environment(tmp_path / 'cache', **more)
        result = command('prepare.py', *STORIES, *flags, cwd=tmp_path, env=environment)
        lines = [line.split() for line in naps.read_text().splitlines()]
        return result, [int(seconds) for name, seconds in lines if name == 'sources']

    return client


@pytest.fixture
def expected(run, hub, tmp_path):
    """The dataset of the same files, in folders of the same names on this disk."""
    folder = tmp_path / 'expected'
    folder.mkdir()
    (folder / 'roneneldan').symlink_to(hub.folder / 'datasets' / 'roneneldan')
    os.chdir(folder)
    result = run('prepare.py', *STORIES)
    assert result.code == 0, result.err
    os.chdir(tmp_path)
    return part_of(read_tree(folder / 'data'), 'tinystories')


def are_notes(lines):
    return all(line.startswith('Note: roneneldan/TinyStories') for line in lines)


@pytest.mark.parametrize('how', [['--streaming'], []], ids=str)
def test_a_poor_network_changes_no_byte(hub, client, expected, tmp_path, how):
    hub.fail_every = 5
    hub.cut_every = 3
    result, _ = client(*how)
    assert result.returncode == 0 and not result.stderr
    assert part_of(read_tree(tmp_path / 'data'), 'tinystories') == expected
    *notes, _, _, _, _ = result.stdout.splitlines()  # and the table
    assert notes and are_notes(notes)
    failed = [request for request in hub.requests if request.status == 503]
    assert len(failed) >= 4 and hub.n_files > 9


QUICK_ENDS = [(['--streaming'], True), ([], False)]
SLOW_ENDS = [(['--streaming'], False), ([], True), (['--streaming', '--shard=2/2'], True)]
SLOW_ENDS = [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_ENDS]


@pytest.mark.parametrize(('how', 'is_silent'), QUICK_ENDS + SLOW_ENDS)
def test_a_hub_that_goes_away_and_comes_back(hub, client, expected, tmp_path, how, is_silent):
    """It is waited for, longer and longer, and then one sentence says how to go on."""
    hub.is_silent = is_silent
    hub.files_left = 28 if how else 4
    result, naps = client(*how)
    assert naps == [2**n for n in range(10)], 'to 512 seconds'
    assert result.returncode == 1 and result.stderr.count('\n') == 1, result.stderr
    assert 'the same command goes on' in result.stderr
    assert are_notes(result.stdout.splitlines())
    fetched = {path for path, _ in hub.fetched()}
    folder = 'tinystories-2-of-2' if '--shard=2/2' in how else '.tinystories.draft'
    rows = lines_of(read_tree(tmp_path / 'data'), folder)

    hub.files_left = math.inf
    hub.requests.clear()
    result, naps = client(*how)
    assert result.returncode == 0 and not result.stderr and not naps
    again = {path for path, _ in hub.fetched()}
    assert any('-00004-of-' in path for path in again)
    if not how:
        assert len(fetched) == 4 and not again & fetched
    else:  # part 0 is validation
        n_done = rows[-1]['part'] - 1
        assert n_done >= 1 and 'Going on behind' in result.stdout
        assert not any(f'train-{number:05}-of' in str(again) for number in range(n_done))
    if '--shard=2/2' in how:
        assert client(*STORIES, '--streaming', '--shard=1/2')[0].returncode == 0
        assert client('--merge')[0].returncode == 0
    assert part_of(read_tree(tmp_path / 'data'), 'tinystories') == expected


def test_what_is_not_needed_is_not_fetched(hub, client):
    """Of a table, too: it is not read as a whole for its first rows."""
    result, _ = client('--streaming', '--max_tokens=1000')
    assert result.returncode == 0, result.stderr
    ranges = [request.range for request in hub.requests if 'train-' in request.path]
    n_bytes = 0
    for text in filter(None, ranges[1:]):  # the first is of its end, which says what is where
        first, last = text.removeprefix('bytes=').split('-')
        n_bytes += int(last) - int(first) + 1
    size = next(hub.folder.rglob('train-00000-*')).stat().st_size
    assert 0 < n_bytes < 0.6 * size


def test_a_shard_fetches_its_own_files_only(hub, client, expected, tmp_path):
    for number, wanted in ((1, '135'), (2, '024')):  # validation is the first part of all
        hub.requests.clear()
        result, _ = client('--streaming', f'--shard={number}/2')
        assert result.returncode == 0, result.stderr
        fetched = {path for path, _ in hub.fetched()}
        assert {path[15] for path in fetched if 'train' in path} == {*wanted}
        assert any('validation' in path for path in fetched) == (number == 1)
    result, _ = client('--merge')
    assert result.returncode == 0, result.stderr
    assert part_of(read_tree(tmp_path / 'data'), 'tinystories') == expected


def test_a_killed_download_fetches_no_complete_file_again(hub, expected, tmp_path):
    """The file that it was in is fetched from its beginning: the Hub's client deletes its part."""
    hub.is_silent = True
    hub.files_left = 4  # README.md and three files
    environment = hub.environment(tmp_path / 'cache')
    line = [sys.executable, str(ROOT / 'prepare.py'), *STORIES]
    job = subprocess.Popen(line, cwd=tmp_path, env=environment, **PIPES)
    while job.poll() is None and hub.files_left > 0:
        time.sleep(0.01)
    time.sleep(0.5)
    job.kill()
    assert finish(job)[0] == -signal.SIGKILL
    fetched = {path for path, _ in hub.fetched()}
    hub.files_left = math.inf
    hub.requests.clear()
    result = command('prepare.py', *STORIES, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    again = {path for path, _ in hub.fetched()}
    assert len(fetched) == 4 and len(again) == 4 and not fetched & again
    assert part_of(read_tree(tmp_path / 'data'), 'tinystories') == expected


def answer_of(status):
    """The error for an answer of the Hub."""
    request = httpx.Request('GET', 'https://hub')
    response = httpx.Response(status, request=request)
    return HfHubHTTPError('no', response=response)


def not_in_the_cache(cause):
    """The error for a file that is not in the cache, and could not be asked for."""
    error = LocalEntryNotFoundError('no file')
    error.__cause__ = cause
    return error


class NetworkError(ConnectionError):
    """One that is known by its base."""


def test_pauses_grow_and_begin_anew_with_what_comes(monkeypatch, capsys):
    naps = []
    monkeypatch.setattr(time, 'sleep', naps.append)
    # The items that can be read before the network fails, at each attempt.
    lengths = iter([0, 0, 0, 2, 2, 1, 5, 5, 9])

    def read():
        length = next(lengths)
        yield from range(length)
        if length < 9:
            raise NetworkError('gone for now')

    assert [*sources.retry(read, 'me/mine/a.parquet')] == [*range(9)], 'none twice, none missing'
    assert naps == [1, 2, 4, 1, 2, 4, 1, 2]
    lines = capsys.readouterr().out.splitlines()
    note = 'Note: me/mine/a.parquet: NetworkError: gone for now; trying again in {} s.'
    assert lines == [note.format(seconds) for seconds in naps]


@pytest.mark.parametrize(('longest', 'pauses'), [(600, 10), (2, 2), (0, 0)])
def test_the_network_is_given_up_in_the_end(monkeypatch, longest, pauses):
    naps = []
    monkeypatch.setattr(time, 'sleep', naps.append)

    def read():
        raise NetworkError('gone')
        yield

    with pytest.raises(NetworkError):
        [*sources.retry(read, 'a', longest)]
    assert naps == [2**n for n in range(pauses)]


@pytest.mark.parametrize(
    ('error', 'expected'),
    [
        (ConnectionError(), True),
        (TimeoutError(), True),
        (httpx.ReadTimeout(''), True),
        (httpx.RemoteProtocolError(''), True),
        (answer_of(503), True),
        (answer_of(429), True),
        (answer_of(408), True),
        (answer_of(404), False),
        (answer_of(401), False),
        (not_in_the_cache(answer_of(503)), True),
        (not_in_the_cache(httpx.ConnectError('')), True),
        (not_in_the_cache(answer_of(404)), False),
        (not_in_the_cache(None), False),
        (ValueError(), False),
        (OSError(errno.EIO, ''), False),
    ],
)
def test_which_errors_are_the_networks(error, expected):
    assert sources.is_network_error(error) is expected


# -----------------------------------------------------------------------------
# memory

MANY_LINES = """
import json, os, sys

sys.path.insert(0, {root!r})
import numpy as np

import draft
import tokenizer
from runtime import process_peak_gib

os.fsync = lambda file: None
draft.SECONDS = 0.01
text = 40 * 'what the tokenizer changes '
row = {{'part': 0, 'split': 'train', 'tokens': 1, 'bytes': 9, 'documents': 1, 'highest': 7}}
row |= {{'oddities': {{'blank': 3}}, 'changes': {{text: [1, [text, text]]}}}}
peaks = []
for n in (1_000, 12_000):
    made = draft.Draft(f'made {{n}}', {{}})
    made.open({{'dtype': '<u2', 'end_of_text': 256}}, tokenizer.build('byte'))
    for number in range(n):
        made.add(dict(row, batch=number), np.ones(1, '<u2'))
    made.finish()
    again = draft.Draft(f'made {{n}}', {{}})
    again.open({{'dtype': '<u2', 'end_of_text': 256}}, tokenizer.build('byte'))
    assert again.last == (0, n - 1) and again.totals['train']['tokens'] == n
    draft.join([again.folder], f'joined {{n}}')
    peaks.append(process_peak_gib('self') * 1024)
    n_bytes = os.path.getsize(again.folder / 'batches.jsonl') / 2**20
print(json.dumps([*peaks, n_bytes]))
"""


def test_the_lines_of_batches_do_not_stay_in_memory(tmp_path):
    """In MiB: nor when they are read again, or joined."""
    code = MANY_LINES.format(root=str(ROOT))
    line = [sys.executable, '-c', code]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    few, many, on_the_disk = json.loads(done.stdout)
    assert on_the_disk > 30 and many - few < 8, (few, many, on_the_disk)

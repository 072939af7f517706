"""Knobs: what files and flags may set, and that all else is refused in one sentence."""

import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from configurator import OTHER_NAMES, check_range
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
    (tmp_path / 'utf16.py').write_text('batch_size = 8\n', encoding='utf-16')
    for path in ('binary', '.', 'utf16.py'):
        result = script(path)
        assert result.is_one_sentence
        assert f'The config file {path} cannot be read as UTF-8 text' in result.err
    (tmp_path / 'utf16.py').write_text('batch_size = 8\n', encoding='utf-16-le')  # and no mark
    result = script('utf16.py')
    assert result.is_one_sentence and 'null bytes' in result.err


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        (b'\xef\xbb\xbfbatch_size = 8\n', 8),  # as Notepad saves it
        (b'\xef\xbb\xbfbatch_size = 8\r\nbias = False\r\n', 8),
        (b'if True:\r\n\tbatch_size = 8\r\n', 8),
        (b'\xef\xbb\xbf', 12),
        (b'', 12),
    ],
)
def test_what_editors_put_into_a_file_changes_nothing(script, tmp_path, content, expected):
    (tmp_path / 'saved.py').write_bytes(content)
    assert value(script('saved.py'), 'batch_size') == expected


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('batch_size: 4', 'batch_size: 4 is not Python: write batch_size = 4.'),
        ('batch_size : 4  # rows', 'batch_size: 4 is not Python: write batch_size = 4.'),
        ('batch_size:\t4\r', 'write batch_size = 4.'),
        ('learning_rate: 1e-3', 'write learning_rate = 0.001.'),
        ('bias: false', 'write bias = False.'),
        ('---\nstart: my text', "write start = 'my text'."),
        ('start: "my text"', "write start = 'my text'."),
        ('arch: llama', "write arch = 'llama'."),
        ('top_k: None', 'write top_k = None.'),
        ('batch_size: int', 'batch_size: int is not Python: write batch_size = 12.'),
        ('batch_siz: 4\nbatch_size: 4', 'write batch_size = 4.'),
    ],
)
def test_yaml_is_not_taken_for_python(script, tmp_path, line, message):
    (tmp_path / 'config.py').write_text(f'# Mine.\n{line}\n')
    result = script('config.py')
    assert result.is_one_sentence and message in result.err
    (tmp_path / 'config.yaml').write_text(f'{line}\n')
    result = script('config.yaml')
    assert result.is_one_sentence and 'config.yaml is not a config file' in result.err
    assert 'batch_size = 4' in result.err


@pytest.mark.parametrize('ending', '.yml .YAML .toml .ini .cfg .ipynb .json .txt'.split())
def test_files_of_other_tools_are_no_config_files(script, tmp_path, ending):
    (tmp_path / f'other{ending}').write_text('batch_size = 4\n')
    result = script(f'other{ending}')
    assert result.is_one_sentence and f'other{ending} is not a config file' in result.err


def test_annotations_that_are_python_are_left_alone(script, tmp_path):
    text = '"""Mine.\nbatch_size: 4 rows\n"""\nbatch_size: int = 8\n_x: int\nbias: bool = False\n'
    (tmp_path / 'config.py').write_text(text)
    result = script('config.py')
    assert value(result, 'batch_size') == 8 and value(result, 'bias') is False


@pytest.mark.parametrize(
    ('line', 'name', 'expected'),
    [
        ('learning_rate = np.float64(3e-4)', 'learning_rate', 3e-4),
        ('learning_rate = np.float32(0.5)', 'learning_rate', 0.5),
        ('learning_rate = np.int64(1)', 'learning_rate', 1.0),
        ('learning_rate = torch.tensor(0.5)', 'learning_rate', 0.5),
        ('batch_size = np.int64(4)', 'batch_size', 4),
        ('batch_size = np.arange(5).max()', 'batch_size', 4),
        ('level = np.uint8(2)', 'level', 2),
        ('bias = np.bool_(False)', 'bias', False),
        ("arch = np.str_('llama')", 'arch', 'llama'),
    ],
)
def test_numbers_of_numpy_are_numbers(script, tmp_path, line, name, expected):
    (tmp_path / 'config.py').write_text(f'import numpy as np\nimport torch\n{line}\n')
    got = value(script('config.py'), name)
    assert got == expected and type(got) is type(expected)


def test_a_number_must_be_one_and_of_the_right_kind(script, tmp_path):
    for number, shown in {'np.float64(4)': '4.0', 'np.array([1, 2])': 'array([1, 2])'}.items():
        (tmp_path / 'config.py').write_text(f'import numpy as np\nbatch_size = {number}\n')
        result = script('config.py')
        assert result.is_one_sentence and f'batch_size takes int, not {shown}.' in result.err


def test_a_variable_of_ones_own_is_told_its_name(script, tmp_path):
    for name in ('BASE', 'batch', 'total_tokens'):
        (tmp_path / 'config.py').write_text(f'{name} = 3\nbatch_size = {name}\n')
        result = script('config.py')
        assert result.is_one_sentence and f'there is no knob named {name}.' in result.err
        assert f'If it is not to be one, name it _{name}.' in result.err
        assert f'_{name}' not in script(f'--{name}=3').err, 'a flag is nobody\'s variable'


def test_a_config_that_exits_is_told_so(script, tmp_path):
    for line in ('sys.exit(0)', 'sys.exit()', 'quit()', "sys.exit('Two GPUs, please')"):
        (tmp_path / 'config.py').write_text(f'import sys\n{line}\n')
        result = script('config.py')
        assert result.is_one_sentence and 'config.py, line 2: SystemExit' in result.err
    assert 'Two GPUs, please' in result.err


def test_a_range_is_checked_and_all_that_is_wrong_is_named():
    config = {'a': 0, 'b': 5, 'c': None, 'd': 10**9, 'e': -1.5}
    check_range(config, 0, 10**9, 'a b c d')
    with pytest.raises(UserError, match='^a=0, e=-1.5: must be from 1 to 1,000,000,000.$'):
        check_range(config, 1, 10**9, 'a b c d e')


@pytest.mark.parametrize('config', ['', 'raise KeyboardInterrupt'])
def test_ctrl_c_leaves_no_traceback(tmp_path, config):
    text = f'import sys; sys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}\nraise KeyboardInterrupt\n'
    (tmp_path / 'script.py').write_text(text)
    (tmp_path / 'config.py').write_text(config)
    line = [sys.executable, tmp_path / 'script.py', tmp_path / 'config.py']
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == -signal.SIGINT and result.stderr == ''


def test_configs_of_nanogpt_run_with_notes_on_what_is_not_needed(script, tmp_path):
    text = 'import time\neval_iters = 20\nwandb_log = False\nbatch_size = 64\n'
    (tmp_path / 'theirs.py').write_text(text)
    result = script('theirs.py')
    assert value(result, 'batch_size') == 64 and 'eval_iters is not needed' in result.err


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


@pytest.mark.parametrize(
    ('name', 'flag', 'meant'),
    [
        ('train.py', '--lr=1e-3', 'learning_rate'),
        ('train.py', '--steps=100', 'max_iters'),
        ('train.py', '--iters=100', 'max_iters'),
        ('train.py', '--epochs=3', 'max_epochs'),
        ('train.py', '--batch=3', 'batch_size'),
        ('train.py', '--max-length=64', 'block_size'),
        ('train.py', '--seq_len=64', 'block_size'),
        ('train.py', '--layers=2', 'n_layer'),
        ('train.py', '--heads=2', 'n_head'),
        ('train.py', '--output_dir=x', 'out_dir'),
        ('train.py', '--data=x', 'dataset'),
        ('train.py', '--model=gpt2', 'init_from'),
        ('train.py', '--checkpoint=x', 'init_from'),
        ('train.py', '--resume', 'init_from=resume'),
        ('train.py', '--prompt=Hi', 'sample_prompt'),
        ('sample.py', '--prompt=Hi', 'start'),
        ('sample.py', '--model=gpt2', 'init_from'),
        ('sample.py', '--max_length=20', 'max_new_tokens'),
        ('evaluate.py', '--context=64', 'block_size'),
        ('evaluate.py', '--data=x', 'input'),
        ('prepare.py', '--data=x', 'input'),
        ('plot.py', '--output=x', 'out_dir'),
    ],
)
def test_the_words_of_other_tools_lead_to_the_knob(run, name, flag, meant):
    result = run(name, flag)
    assert result.is_one_sentence and f'Did you mean {meant}?' in result.err


def test_what_is_meant_is_a_knob_and_of_this_script(run):
    names = ('prepare.py', 'train.py', 'sample.py', 'evaluate.py', 'plot.py')
    knobs = {name: re.findall(r'^  --(\w+)=', run(name, '--help').out, re.M) for name in names}
    every_knob = {knob for found in knobs.values() for knob in found}
    assert {re.match(r'\w+', meant)[0] for meant in OTHER_NAMES} <= every_knob
    result = run('plot.py', '--lr=1')
    assert result.is_one_sentence and '--help lists them all.' in result.err

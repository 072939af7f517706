"""Random command lines and config files against every script: each is a run, or one sentence and status 1."""

import ast
import contextlib
import io
import re
import shutil
import sys
import warnings

import pytest
import torch
from conftest import TEXT, TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import configurator
import model

BASE = {
    'prepare.py': ['--input=sheep.txt', '--vocab_size=300'],
    'train.py': ['--dataset=sheep', *TINY, '--max_iters=2', '--eval_interval=1'],
    'sample.py': ['--out_dir=trained', '--max_new_tokens=3', '--num_samples=2', '--start=a'],
    'bench.py': ['sample', '--ways=ours', '--repeats=1', '--device=cpu'],
}
TEXTS = """x a,b a|b . .. , /dev/null/x /dev/null nofile FILE: FILE:nofile FILE:sheep.txt sheep.txt sheep.txt, data
    data/sheep trained trained/step_00000002 trained/config.py cpu cuda cuda:9 meta tpu auto float32 float16 bfloat16
    float64 gpt2 gpt5 qwen3 llama char byte bpe resume auto scratch best last text jsonl uncached ours,uncached ours,,
    sheep [] {} "a" ' = é""".split()
TEXTS += ['', ' ', 'a b', '\n', '\u0300', 'x' * 300]
NUMBERS = '0 1 2 3 7 16 0.1 0.5 1.5 1e-3 1e3 -1 -0.5 1e999 nan -inf 1e-320 0x10 1_0'.split()
NUMBERS += ['9' * 20, '9' * 400, '1' + '0' * 30]
VALUES = {str: TEXTS, bool: ['True', 'False', 'true', ''], float: NUMBERS, type(None): [*NUMBERS[:9], 'None', 'a|b']}
VALUES[int] = [value for value in NUMBERS if 'e' not in value and '.' not in value]
ANY_VALUE = ['None', *TEXTS, *NUMBERS, *VALUES[bool]]
CODE = ['1/0', 'import nothing_such', "open('nofile')", 'x = = 1', '_x = 3', 'def f(): pass', 'import math', '\t']
CODE += ['max_iters = f', 'dataset = dataset + "s"', '_ = undefined', '# nothing', 'é = 1']


@pytest.fixture(params=BASE)
def script(request):
    return request.param


def command_lines(script, knobs):
    """knobs: {name: default}. Most values are of a knob's type, so that many lines get past the first check."""
    name = st.sampled_from(list(knobs))
    misspelt = name.map(lambda knob: knob[:-1] + knob[:1])
    fitting = name.flatmap(lambda knob: st.tuples(st.just(knob), st.sampled_from(VALUES[type(knobs[knob])])))
    pair = st.one_of(*[fitting] * 9, st.tuples(name, st.sampled_from(ANY_VALUE)), st.tuples(misspelt, st.just('1')))
    flag = pair.map('--{0[0]}={0[1]}'.format)
    anything = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0/'), max_size=8)
    line = pair.map(lambda p: f'{p[0]} = {p[1] if p[1][:1].isdigit() or p[1] in ("True", "None") else repr(p[1])}')
    config = st.lists(st.one_of(*[line] * 4, st.sampled_from(CODE)), max_size=4).map('\n'.join)
    odd = st.one_of(name.map('--{}'.format), anything, anything.map('--{}'.format))
    file = config.map(lambda text: ('config', text))
    return st.lists(st.one_of(*[flag] * 7, odd, file, file), min_size=1, max_size=3)


def check(run, tmp_path, script, args):
    for left in ('out', 'x', 'a'):
        shutil.rmtree(tmp_path / left, ignore_errors=True)
    given = []
    for i, arg in enumerate(args):
        if isinstance(arg, tuple):
            (tmp_path / f'config{i}.py').write_text(arg[1])
        given.append(f'config{i}.py' if isinstance(arg, tuple) else arg)
    err = io.StringIO()
    try:
        result = run(script, *BASE[script], *given)
        code, text = result.code, result.err
    except BaseException as error:  # as the interpreter would end
        with contextlib.redirect_stderr(err):
            configurator._explain(type(error), error, error.__traceback__)
        code, text = 1, err.getvalue()
    assert 'Traceback' not in text and code in (0, 1), (given, args, text)
    if code:
        assert 0 < len(text.strip()) and text.strip().count('\n') <= text.count('passed over') + 1, (given, text)
    return code


@pytest.fixture
def world(run, tmp_path, monkeypatch):
    """A folder with a text, a dataset and a trained model; a tiny model in the place of GPT-2; no compiler."""

    def no_compiler(*args, **kwargs):
        raise RuntimeError('no compiler')

    (tmp_path / 'sheep.txt').write_text(TEXT)
    assert run('prepare.py', '--input=sheep.txt', '--tokenizer=byte').code == 0
    assert run('train.py', '--dataset=sheep', *TINY, '--max_iters=2', '--out_dir=trained').code == 0
    monkeypatch.setattr(torch, 'compile', no_compiler)
    monkeypatch.setitem(model.PUBLISHED, 'gpt2', {'n_layer': 1, 'n_head': 1, 'n_embd': 8})
    monkeypatch.setattr(sys, 'stdin', io.StringIO(''))
    shutil.copytree(tmp_path / 'data', tmp_path / 'kept')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield tmp_path


def fuzz(run, world, script, examples):
    flags = run(script, *([] if script != 'bench.py' else ['sample']), '--help').out
    found = re.findall(r"^  --(\w+)=('.*?'|\S+)", flags, re.MULTILINE)
    knobs = {name: ast.literal_eval(default) for name, default in found}
    assert len(knobs) >= 6
    codes = []

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines(script, knobs))
    def one(args):
        codes.append(check(run, world, script, args))
        if script == 'prepare.py':  # it may have been told to write there
            shutil.rmtree(world / 'data')
            shutil.copytree(world / 'kept', world / 'data')

    one()
    assert len(codes) >= examples and min(codes.count(0), codes.count(1)) > 0.03 * len(codes), 'some of both'
    print(f'{script}: {len(codes)} command lines, {codes.count(0)} of them runs, the others one sentence')


def test_a_random_command_line_is_a_run_or_a_sentence(run, world, script):
    fuzz(run, world, script, 40)


@pytest.mark.slow  # some minutes
def test_many_random_command_lines_are_runs_or_sentences(run, world, script):
    fuzz(run, world, script, {'prepare.py': 600, 'train.py': 1000, 'sample.py': 800, 'bench.py': 200}[script])

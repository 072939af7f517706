"""Random command lines and config files: each is a run, or one sentence and status 1."""

import ast
import io
import re
import shutil
import sys
import warnings

import pytest
import torch
from conftest import TEXT, TINY
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import model

BASE = {
    'prepare.py': ['--input=sheep.txt', '--vocab_size=300'],
    'train.py': ['--dataset=sheep', *TINY, '--max_iters=2', '--eval_interval=1'],
    'sample.py': ['--out_dir=trained', '--max_new_tokens=3', '--num_samples=2', '--start=a'],
    'evaluate.py': ['--out_dir=trained'],
    'export.py': ['--out_dir=trained'],
    'plot.py': ['--out_dir=trained'],
    'bench.py': ['sample', '--variants=ours', '--repeats=1', '--device=cpu'],
}
TEXTS = """x a,b a|b . .. , /dev/null/x /dev/null nofile FILE: FILE:nofile FILE:sheep.txt sheep.txt
    sheep.txt, data data/sheep trained trained/step_00000002 trained/config.py cpu cuda cuda:9 meta
    tpu auto float32 float16 bfloat16 float64 gpt2 gpt5 qwen3 llama char byte bpe resume auto
    scratch best last text jsonl uncached ours,uncached ours,, sheep [] {} "a" ' = é""".split()
TEXTS += ['', ' ', 'a b', '\n', '\u0300', 'x' * 300]
NUMBERS = '0 1 2 3 7 16 0.1 0.5 1.5 1e-3 1e3 -1 -0.5 1e999 nan -inf 1e-320 0x10 1_0'.split()
NUMBERS += ['9' * 20, '9' * 400, '1' + '0' * 30]
VALUES = {
    str: TEXTS,
    bool: ['True', 'False', 'true', ''],
    int: [value for value in NUMBERS if 'e' not in value and '.' not in value],
    float: NUMBERS,
    type(None): [*NUMBERS[:9], 'None', 'a|b'],
}
ANY_VALUE = ['None', *TEXTS, *NUMBERS, *VALUES[bool]]
CODE = ['1/0', 'import nothing_such', "open('nofile')", 'x = = 1', '_x = 3', 'def f(): pass']
CODE += ['max_iters = f', 'dataset = dataset + "s"', '_ = undefined', '# nothing', 'é = 1']
CODE += ['import math', '\t']


@pytest.fixture(params=BASE)
def script(request):
    return request.param


def as_assignment(pair):
    """A line of a config file: name = value, quoted unless it is a number, True or None."""
    name, value = pair
    is_literal = value[:1].isdigit() or value in ('True', 'None')
    return f'{name} = {value}' if is_literal else f'{name} = {value!r}'


def command_lines(script, knobs):
    """Lists of arguments, of which ('config', text) is to become a config file.

    knobs: {name: default}. Most values are of a knob's type, and of a text, such as a choice, a
    third is the default, so that many get past the first check.
    """

    def values(knob):
        default = knobs[knob]
        defaults = [default] * (len(TEXTS) // 2) if isinstance(default, str) else []
        return [*VALUES[type(default)], *defaults]

    name = st.sampled_from(list(knobs))
    misspelt = name.map(lambda knob: knob[:-1] + knob[:1])
    fitting = name.flatmap(lambda knob: st.tuples(st.just(knob), st.sampled_from(values(knob))))
    any_pair = st.tuples(name, st.sampled_from(ANY_VALUE))
    pair = st.one_of(*[fitting] * 9, any_pair, st.tuples(misspelt, st.just('1')))

    flag = pair.map('--{0[0]}={0[1]}'.format)
    line = st.one_of(*[pair.map(as_assignment)] * 4, st.sampled_from(CODE))
    file = st.lists(line, max_size=4).map(lambda lines: ('config', '\n'.join(lines)))
    characters = st.characters(exclude_categories=['Cs'], exclude_characters='\0/')
    anything = st.text(characters, max_size=8)
    odd = st.one_of(name.map('--{}'.format), anything, anything.map('--{}'.format))
    return st.lists(st.one_of(*[flag] * 7, odd, file, file), min_size=1, max_size=3)


def check(run, tmp_path, script, args):
    """Run a script with these arguments. Returns its status: 0, or 1 together with a reason."""
    for left in ('out', 'x', 'a'):
        shutil.rmtree(tmp_path / left, ignore_errors=True)
    for exported in (tmp_path / 'trained').glob('model-*'):  # which is never overwritten
        exported.unlink() if exported.is_file() else shutil.rmtree(exported)
    words = []
    for i, arg in enumerate(args):
        if isinstance(arg, tuple):
            _, text = arg
            (tmp_path / f'config{i}.py').write_text(text)
            arg = f'config{i}.py'
        words.append(arg)
    result = run(script, *BASE[script], *words)
    what = (words, args, result.err)
    assert result.code in (0, 1), what
    assert not result.has_traceback, what
    if result.code == 1:
        lines = result.err.strip().split('\n')
        assert lines[0], what
        assert len(lines) <= result.err.count('passed over') + 2, what
    return result.code


def no_compiler(*args, **kwargs):
    raise RuntimeError('no compiler')


TINY_GPT2 = {'n_layer': 1, 'n_head': 1, 'n_embd': 8}


def simplify():
    """Make this process one without a compiler, and with a tiny model in the place of GPT-2."""
    torch.compile = no_compiler
    model.PUBLISHED['gpt2'] = TINY_GPT2


@pytest.fixture
def world(run, tmp_path, monkeypatch):
    """A folder with a text, a dataset and a trained model, and what simplify() does."""
    (tmp_path / 'sheep.txt').write_text(TEXT)
    assert run('prepare.py', '--input=sheep.txt', '--tokenizer=byte').code == 0
    assert run('train.py', '--dataset=sheep', *TINY, '--max_iters=2', '--out_dir=trained').code == 0
    monkeypatch.setattr(torch, 'compile', no_compiler)
    monkeypatch.setitem(model.PUBLISHED, 'gpt2', TINY_GPT2)
    monkeypatch.setattr(sys, 'stdin', io.StringIO(''))
    shutil.copytree(tmp_path / 'data', tmp_path / 'kept')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield tmp_path


def fuzz(run, world, script, examples, number=None):
    """Run a script with `examples` random command lines, which must be of both kinds.

    number: a seed for others than the usual ones.
    """
    job = ['sample'] if script == 'bench.py' else []
    flags = run(script, *job, '--help').out
    found = re.findall(r"^  --(\w+)=('.*?'|\S+)", flags, re.MULTILINE)
    knobs = {name: ast.literal_eval(default) for name, default in found}
    assert len(knobs) >= 4
    codes = []

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=number is None,
        phases=[Phase.generate] if number is not None else list(Phase),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines(script, knobs))
    def one(args):
        codes.append(check(run, world, script, args))
        if script == 'prepare.py':  # it may have been told to write there
            shutil.rmtree(world / 'data')
            shutil.copytree(world / 'kept', world / 'data')

    if number is not None:
        one = seed(number)(one)
    one()
    runs = codes.count(0)
    sentences = codes.count(1)
    assert len(codes) >= examples
    if number is None:
        assert min(runs, sentences) > 0.03 * len(codes), 'some of both'
    print(f'{script}: {len(codes)} command lines, {runs} of them runs, {sentences} one sentence')


def test_a_random_command_line_is_a_run_or_a_sentence(run, world, script):
    fuzz(run, world, script, 40)

"""The benchmarks run, and say what they measured."""

import json

import pytest
from conftest import TINY

import model


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(model.PUBLISHED, 'gpt2', {'n_layer': 1, 'n_head': 2, 'n_embd': 32})


def knobs(**changes):
    flags = dict(flag[2:].split('=') for flag in TINY) | {k: repr(v) for k, v in changes.items()}
    flags['device'] = "'cpu'"
    return ''.join(f'{name} = {value}\n' for name, value in flags.items())


def test_a_race_is_won_when_every_seed_gets_there(sheep, run, tmp_path):
    (tmp_path / 'slow.py').write_text(knobs(max_iters=30, learning_rate=1e-3, eval_interval=30))
    (tmp_path / 'fast.py').write_text(knobs(max_iters=30, learning_rate=1e-2, optimizer='muon', eval_interval=30))
    flags = ['--baseline=slow.py', '--dataset=sheep', '--repeats=2', '--device=cpu', '--json_file=race.json']
    result = run('bench.py', 'race', *flags, '--recipe=fast.py')
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / 'race.json').read_text())['seeds']
    assert [row['seed'] for row in rows] == [1, 2]
    for row in rows:
        assert row['recipe'][0] < row['baseline'][0] and 0 < row['seconds'] <= row['recipe'][1]
    assert result.out.count(' x\n') == 2 and 'sooner: median' in result.out
    (tmp_path / 'never.py').write_text(knobs(max_iters=10, learning_rate=0.0, min_lr=0.0, weight_decay=0.0))
    result = run('bench.py', 'race', *flags, '--recipe=never.py', '--repeats=1')
    assert 'inf s' in result.out and 'from 0.00 to 0.00' in result.out


def test_a_step_is_measured_every_way(small, run, tmp_path):
    flags = ['--ways=plain,ours', '--block_size=32', '--repeats=2', '--device=cpu', '--json_file=step.json']
    result = run('bench.py', 'step', *flags)
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / 'step.json').read_text())['ways']
    assert set(figures) == {'plain', 'ours'}
    for way in figures.values():
        assert way['tokens_per_second'] == pytest.approx(32 / way['ms'] * 1000)
        assert 0 < way['share'] < 1
    assert all(len(line) <= 80 for line in result.out.splitlines())


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ([], 'Say what to measure: python bench.py race|step|sample|prepare|data'),
        (['step', '--ways=other'], "ways='other' must be some of plain, ours"),
        (['race', '--dataset=none', '--repeats=1'], 'data/none has no train.bin'),
        (['step', '--repeats=0'], 'repeats=0: must be from 1'),
    ],
)
def test_bad_input_gets_one_sentence(small, run, tmp_path, args, message):
    result = run('bench.py', *args)
    assert result.code == 1 and message in result.err

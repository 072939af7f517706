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


def test_batches_are_taken_without_a_model(run, tmp_path):
    result = run('bench.py', 'data', '--batch_size=2', '--block_size=64', '--repeats=1', '--json_file=data.json')
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / 'data.json').read_text())
    assert figures['tokens_per_second'] == pytest.approx(2 * 64 / figures['median_seconds'])
    assert f'{figures["tokens_per_second"]:,.0f} tokens/s' in result.out


@pytest.mark.parametrize('megabytes', [2, pytest.param(1000, marks=pytest.mark.slow)])
def test_preparing_is_measured_beside_tiktoken_alone(run, tmp_path, megabytes):
    figures = []
    for size in (megabytes, megabytes // 5 or 1):
        result = run('bench.py', 'prepare', f'--corpus_mb={size}', '--json_file=x.json', f'--repeats={min(3, size)}')
        assert result.code == 0, result.err
        assert all(len(line) <= 80 for line in result.out.splitlines())
        figures.append(json.loads((tmp_path / 'x.json').read_text()))
        print(result.out)
    large, small = figures
    assert large['tiktoken'] > 0 and large['mb_per_second'] > 0
    if megabytes == 1000:
        assert large['share'] >= 0.8
        assert large['peak_mib'] < 1000 and large['peak_mib'] < 1.2 * small['peak_mib']


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

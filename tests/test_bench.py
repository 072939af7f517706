"""The benchmarks run, and print what they measured."""

import json

import pytest
from conftest import TINY

import model


@pytest.fixture
def small(monkeypatch):
    shape = {'n_layer': 1, 'n_head': 2, 'n_embd': 32}
    monkeypatch.setitem(model.PUBLISHED, 'gpt2', shape)


def config_file(**changes):
    """The text of a config file for a tiny model."""
    flags = dict(flag[2:].split('=') for flag in TINY)
    flags['device'] = "'cpu'"
    flags.update((name, repr(value)) for name, value in changes.items())
    return ''.join(f'{name} = {value}\n' for name, value in flags.items())


@pytest.mark.slow
def test_a_race_has_a_speed_where_every_seed_gets_there(sheep, run, tmp_path):
    slow = config_file(max_iters=30, learning_rate=5e-3, eval_interval=30)
    fast = config_file(max_iters=30, learning_rate=1e-2, eval_interval=30, optimizer='muon')
    (tmp_path / 'slow.py').write_text(slow)
    (tmp_path / 'fast.py').write_text(fast)
    flags = ['--baseline=slow.py', '--dataset=sheep', '--seeds=3', '--device=cpu']
    flags += ['--json_file=race.json']
    result = run('bench.py', 'race', *flags, '--recipe=fast.py')
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / 'race.json').read_text())
    assert figures['runs']['recipe']['loss'] < figures['runs']['baseline']['loss']
    speed = figures['differences']['recipe']['step']
    assert 1 < speed['speedup'] <= 3, 'it is evaluated every ten of thirty steps'
    assert ' x as fast in steps' in result.out

    never = config_file(max_iters=10, learning_rate=0.0, min_lr=0.0, weight_decay=0.0)
    (tmp_path / 'never.py').write_text(never)
    result = run('bench.py', 'race', *flags, '--recipe=never.py')
    assert 'higher loss' in result.out
    assert 'as fast' not in result.out
    figures = json.loads((tmp_path / 'race.json').read_text())
    assert figures['differences']['recipe']['train_seconds'] is None

    (tmp_path / 'none.py').write_text(config_file(max_iters=0))
    result = run('bench.py', 'race', *flags, '--recipe=none.py')
    assert result.code == 1
    assert 'none.py trains no steps: there is nothing to compare.' in result.err


@pytest.mark.slow
def test_a_step_is_measured_in_every_variant(small, run, tmp_path):
    flags = ['--variants=plain,ours', '--block_size=32', '--repeats=2', '--device=cpu']
    result = run('bench.py', 'step', *flags, '--json_file=step.json')
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / 'step.json').read_text())['variants']
    assert set(figures) == {'plain', 'ours'}
    for row in figures.values():
        assert row['tokens_per_second'] == pytest.approx(32 / row['ms'] * 1000)
        assert 0 < row['share'] < 1
    assert all(len(line) <= 80 for line in result.out.splitlines())


def test_sampling_is_measured_in_every_variant(small, run, tmp_path):
    flags = ['--variants=uncached,ours,transformers', '--repeats=1', '--device=cpu']
    result = run('bench.py', 'sample', *flags, '--json_file=sample.json')
    assert result.code == 0, result.err
    rates = json.loads((tmp_path / 'sample.json').read_text())['tokens_per_second']
    names = ('uncached', 'ours', 'transformers')
    assert set(rates) == {f'{name} {n}' for name in names for n in (64, 256)}
    assert min(rates.values()) > 0
    assert all(len(line) <= 80 for line in result.out.splitlines())


@pytest.mark.parametrize('megabytes', [2, pytest.param(1000, marks=pytest.mark.slow)])
def test_preparing_is_measured_beside_tiktoken_alone(run, tmp_path, megabytes):
    figures = []
    for size in (megabytes, max(1, megabytes // 5)):
        flags = [f'--corpus_mb={size}', '--json_file=x.json', f'--repeats={min(3, size)}']
        result = run('bench.py', 'prepare', *flags)
        assert result.code == 0, result.err
        assert all(len(line) <= 80 for line in result.out.splitlines())
        figures.append(json.loads((tmp_path / 'x.json').read_text()))
        print(result.out)
    large, small = figures
    assert large['tiktoken'] > 0
    assert large['mb_per_second'] > 0
    if megabytes == 1000:
        assert large['share'] >= 0.8
        assert large['peak_mib'] < 1000
        assert large['peak_mib'] < 1.2 * small['peak_mib']


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ([], 'Say what to measure: python bench.py race|step|sample|prepare|gpu|compare'),
        (['step', '--variants=other'], "variants='other' must be some of plain, ours"),
        (['step', '--size=gpt3'], "size='gpt3' must be one of: gpt2, gpt2-medium"),
        (['step', '--dtype=int8'], "dtype='int8' must be one of: auto, float32, bfloat16, float16"),
        (['race', '--dataset=none'], 'data/none has no train.bin'),
        (['step', '--repeats=0'], 'repeats=0: must be from 1'),
    ],
)
def test_bad_input_gets_one_sentence(small, run, tmp_path, args, message):
    result = run('bench.py', *args)
    assert result.code == 1
    assert message in result.err

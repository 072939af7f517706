"""Recipes are compared by what a statistician would compute, and chance is not called a difference.

In most tests the trainings are made up: a stand-in for the process writes the log of a run.
"""

import json
import math
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from scipy import stats

import compare

STEPS = range(10, 101, 10)


def evals(losses, seconds=1.0):
    """The records of a run with an evaluation every ten steps, each after so many seconds."""
    records = []
    for number, loss in enumerate(losses, 1):
        records.append({
            'step': 10 * number, 'train_seconds': seconds * number,
            'val_loss': loss, 'bits_per_byte': loss / math.log(2),
        })  # fmt: skip
    return records


def curve(final, seconds=1.0):
    """The records of a run of 100 steps whose loss falls to this one, ever slower."""
    return evals([final + 2 * (1 / step - 1 / 100) for step in STEPS], seconds)


# -----------------------------------------------------------------------------
# where a run first has a loss


@pytest.mark.parametrize(
    ('target', 'step', 'seconds'),
    [
        (5.0, 10, 0.5),  # it begins lower
        (4.0, 10, 0.5),  # at an evaluation
        (3.25, 17.5, 0.875),  # three quarters of the way from 4 to 3
        (3.0, 20, 1.0),
        (2.5, 35, 1.75),  # between 3.5 and 1.5: the loss went up in between
        (1.5, 40, 2.0),
        (1.4, None, None),  # never
    ],
)
def test_a_loss_is_reached_between_evaluations(target, step, seconds):
    run = evals([4.0, 3.0, 3.5, 1.5], seconds=0.5)
    assert compare.first_reaching(run, target, 'step') == step
    assert compare.first_reaching(run, target, 'train_seconds') == seconds


def test_a_single_evaluation_reaches_its_loss_or_none():
    run = evals([4.0], seconds=0.5)
    assert compare.first_reaching(run, 4.1, 'step') == 10
    assert compare.first_reaching(run, 4.0, 'train_seconds') == 0.5
    assert compare.first_reaching(run, 3.9, 'step') is None


# -----------------------------------------------------------------------------
# the test


def test_losses_are_compared_by_welchs_test():
    before = [1.50, 1.52, 1.47, 1.51, 1.49]
    now = [1.46, 1.40, 1.49, 1.43, 1.41]
    baseline = [curve(final) for final in before]
    runs = [curve(final) for final in now]
    result = compare.test(baseline, runs)
    assert result['loss_p'] == stats.ttest_ind(before, now, equal_var=False).pvalue
    assert result['loss_p'] != stats.ttest_ind(before, now).pvalue, 'it is Welch, not Student'
    assert result['loss_ratio'] == pytest.approx(np.mean(now) / np.mean(before))

    # The same by hand.
    errors = [np.var(losses, ddof=1) / 5 for losses in (before, now)]
    t = (np.mean(before) - np.mean(now)) / math.sqrt(sum(errors))
    freedom = sum(errors) ** 2 / (errors[0] ** 2 / 4 + errors[1] ** 2 / 4)
    assert result['loss_p'] == pytest.approx(2 * stats.t.sf(t, freedom))


def test_the_same_losses_are_no_difference():
    runs = [curve(final) for final in (1.50, 1.52, 1.47)]
    result = compare.test(runs, runs)
    assert result == {'loss_p': 1.0, 'loss_ratio': 1.0, 'train_seconds': None, 'step': None}
    assert compare.describe('A', 'B', result) == 'B: no difference from A shown.'


@pytest.mark.parametrize('field', ['train_seconds', 'step'])
def test_speed_is_compared_by_logarithms_seed_by_seed(field):
    baseline = [curve(1.50), curve(1.52, 1.1), curve(1.47, 0.9), curve(1.51, 1.3)]
    runs = [curve(1.46, 0.8), curve(1.45, 0.9), curve(1.42, 0.75), curve(1.49, 1.0)]
    ratios = []
    for first, second in zip(baseline, runs, strict=True):
        # numpy's interpolation wants a rising x.
        losses = [-record['val_loss'] for record in second]
        counts = [record[field] for record in second]
        reached = np.interp(-first[-1]['val_loss'], losses, counts)
        ratios.append(first[-1][field] / reached)
    assert compare.speedups(baseline, runs, field) == pytest.approx(ratios)
    assert min(ratios) > 1

    logs = np.log(ratios)
    error = logs.std(ddof=1) / 2  # the root of four
    half = stats.t.ppf(0.995, 3) * error
    speed = compare.test(baseline, runs)[field]
    assert speed['speedup'] == pytest.approx(math.exp(logs.mean()))
    assert speed['from'] == pytest.approx(math.exp(logs.mean() - half))
    assert speed['to'] == pytest.approx(math.exp(logs.mean() + half))
    assert speed['p'] == pytest.approx(2 * stats.t.sf(abs(logs.mean()) / error, 3))


def test_a_seed_that_never_gets_there_ends_the_claim_of_speed():
    baseline = [curve(1.50 + seed / 100) for seed in range(5)]
    runs = [curve(1.40 + seed / 90, 0.5 + seed / 200) for seed in range(5)]
    result = compare.test(baseline, runs)
    assert result['train_seconds']['p'] < compare.CERTAIN
    assert result['step']['p'] < compare.CERTAIN
    runs[3] = curve(1.54, 0.5)  # the baseline's had 1.53
    result = compare.test(baseline, runs)
    assert compare.speedups(baseline, runs, 'step')[3] == 0
    assert result['train_seconds'] is None
    assert result['step'] is None
    assert 'seconds' not in compare.describe('A', 'B', result)


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_one_seed_claims_nothing():
    baseline, runs = [curve(1.5)], [curve(1.2, 0.5)]
    result = compare.test(baseline, runs)
    assert compare.describe('A', 'B', result) == 'B: no difference from A shown.'
    assert result['train_seconds'] is None
    assert result['step'] is None
    assert compare.summarize(runs)['loss'] == 1.2


def test_a_row_is_the_means_of_the_last_evaluations():
    finals = [1.50, 1.52, 1.47]
    row = compare.summarize([curve(finals[0]), curve(finals[1], 1.2), evals([finals[2]], 5.0)])
    assert row['loss'] == pytest.approx(sum(finals) / 3)
    assert row['spread'] == pytest.approx(np.std(finals, ddof=1))
    assert row['bits'] == pytest.approx(sum(finals) / 3 / math.log(2))
    assert row['steps'] == 70
    assert row['seconds'] == pytest.approx((10 + 12 + 5) / 3)


# -----------------------------------------------------------------------------
# how often it is wrong


def simulate(rng, loss=0.0, speed=1.0, noise=0.1, n_seeds=5):
    """Compare two recipes; the second one's loss is lower, and its speed higher, by so much.

    Seconds have a noise, and the machine becomes slower by a few percent from seed to seed.
    """
    baseline, runs = [], []
    for seed in range(n_seeds):
        drift = 1 + 0.03 * seed
        finals = rng.normal([1.5, 1.5 - loss], 0.01)
        seconds = drift * np.exp(rng.normal(0, noise, 2)) / [1, speed]
        baseline.append(curve(finals[0], seconds[0]))
        runs.append(curve(finals[1], seconds[1]))
    return compare.test(baseline, runs)


def claims(results):
    """How often each of three differences is claimed."""
    said = [compare.describe('A', 'B', result) for result in results]
    return {
        'loss': sum('loss (p' in sentence for sentence in said),
        'seconds': sum('in seconds' in sentence for sentence in said),
        'steps': sum('in steps' in sentence for sentence in said),
    }


def test_recipes_that_differ_in_nothing_are_not_told_apart():
    rng = np.random.default_rng(1)
    results = [simulate(rng) for _ in range(20)]
    for result in results:
        sentence = f'B: no difference from A shown (loss: p = {result["loss_p"]:.2g}).'
        assert compare.describe('A', 'B', result) == sentence


def test_a_false_claim_is_as_rare_as_promised():
    rng = np.random.default_rng(2)
    counts = claims(simulate(rng) for _ in range(1000))
    print(counts)
    assert max(counts.values()) <= 20, counts
    assert counts['loss'] > 0, 'the test is one of 1 %'


def test_real_differences_are_claimed():
    rng = np.random.default_rng(3)
    results = [simulate(rng, loss=0.08, speed=1.3, noise=0.05) for _ in range(20)]
    assert claims(results) == {'loss': 20, 'seconds': 20, 'steps': 20}
    for result in results:
        assert result['loss_ratio'] < 1
        assert result['train_seconds']['from'] > 1


def test_equal_losses_in_less_time_are_claimed():
    rng = np.random.default_rng(4)
    baseline, runs = [], []
    for final in rng.normal(1.5, 0.01, 5):
        seconds = np.exp(rng.normal(0, 0.05, 2))
        baseline.append(curve(final, seconds[0]))
        runs.append(curve(final, seconds[1] / 1.3))
    result = compare.test(baseline, runs)
    assert claims([result]) == {'loss': 0, 'seconds': 1, 'steps': 0}
    assert result['train_seconds']['from'] < 1.3 < result['train_seconds']['to']


def test_overfitting_is_no_difference():
    runs = [evals([3.0, 2.0, 1.5, 1.8 + seed / 100]) for seed in range(5)]
    result = compare.test(runs, runs)
    assert compare.describe('A', 'B', result) == 'B: no difference from A shown.'


def test_speedups_without_a_spread_are_not_claimed():
    rng = np.random.default_rng(5)
    finals = rng.normal(1.5, 0.01, 5)
    baseline = [evals([2.0, final]) for final in finals]
    runs = [evals([final - 0.001]) for final in finals]
    assert compare.describe('A', 'B', compare.test(baseline, runs)).startswith('B: no difference')


# -----------------------------------------------------------------------------
# the sentences

FASTER = {'speedup': 1.304, 'from': 1.21, 'to': 1.406, 'p': 0.00012}
UNSURE = {'speedup': 1.304, 'from': 0.9, 'to': 1.9, 'p': 0.2}
NOTHING = {'loss_p': 0.5, 'loss_ratio': 0.99, 'train_seconds': None, 'step': None}
NONE = '2 b.py: no difference from 1 a.py shown (loss: p'
LOWER = 'has a 1.3% lower loss (p = 0.0012)'
SPAN = "to the first's loss (99%: 1.21 to 1.41, p = 0.00012)"


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({}, f'{NONE} = 0.5).'),
        ({'loss_p': math.nan}, f'{NONE} = nan).'),
        ({'step': UNSURE, 'train_seconds': UNSURE}, f'{NONE} = 0.5).'),
        ({'loss_p': 0.01}, f'{NONE} = 0.01).'),
        ({'loss_p': 0.00123, 'loss_ratio': 0.987}, f'2 b.py {LOWER}.'),
        ({'loss_p': 0.00123, 'loss_ratio': 1.021}, '2 b.py has a 2.1% higher loss (p = 0.0012).'),
        ({'train_seconds': FASTER}, f'2 b.py is 1.30 x as fast in seconds {SPAN}.'),
        ({'step': FASTER, 'train_seconds': UNSURE}, f'2 b.py is 1.30 x as fast in steps {SPAN}.'),
    ],
)
def test_a_sentence_says_what_differs(changes, sentence):
    assert compare.describe('1 a.py', '2 b.py', NOTHING | changes) == sentence
    assert len(sentence) <= 200


def test_a_sentence_says_all_that_differs():
    result = {'loss_p': 0.00123, 'loss_ratio': 0.987, 'train_seconds': FASTER, 'step': FASTER}
    sentence = compare.describe('1 a.py', '2 b.py', result)
    speeds = f'is 1.30 x as fast in seconds {SPAN}, is 1.30 x as fast in steps {SPAN}'
    assert sentence == f'2 b.py {LOWER}, {speeds}.'
    assert len(sentence) <= 220


def test_a_sentence_has_the_numbers_of_the_runs():
    baseline = [curve(1.500), curve(1.502), curve(1.498)]
    runs = [curve(1.350), curve(1.352), curve(1.349)]
    result = compare.test(baseline, runs)
    ratios = compare.speedups(baseline, runs, 'step')
    sentence = compare.describe('A', 'B', result)
    assert 'has a 10.0% lower loss' in sentence
    assert f'is {statistics.geometric_mean(ratios):.2f} x as fast in steps' in sentence
    swapped = compare.describe('B', 'A', compare.test(runs, baseline))
    assert 'has a 11.1% higher loss' in swapped
    assert 'in steps' not in swapped


# -----------------------------------------------------------------------------
# bench.py compare


@pytest.fixture
def trainings(monkeypatch):
    """Make trainings up. Returns the list that they are put into: (config file, flags).

    The loss is lower by a tenth with a better.py, and with n_layer=3.
    """
    done = []
    run_process = subprocess.run

    def fake(line, **options):
        if len(line) < 3 or Path(line[1]).name != 'train.py':
            return run_process(line, **options)
        path, *args = line[2:]
        flags = dict(arg.removeprefix('--').split('=', 1) for arg in args)
        done.append((Path(path).name, flags))
        if 'no_knob' in flags:
            error = 'Traceback\n--no_knob: there is no knob named no_knob.\n'
            return subprocess.CompletedProcess(line, 1, '', error)
        final = 1.5 + int(flags['seed']) / 1000
        if 'better' in str(path) or flags.get('n_layer') == '3':
            final -= 0.1 + int(flags['seed']) / 3000
        log = [{'step': 0, 'val_loss': 4.0}, {'step': 5, 'loss': 3.0}, *curve(final)]
        log.append({'step': 100, 'final': {'val_loss': final}})
        text = ''.join(json.dumps(record) + '\n' for record in log)
        Path(flags['out_dir'], 'log.jsonl').write_text(text)
        return subprocess.CompletedProcess(line, 0, '', '')

    monkeypatch.setattr(subprocess, 'run', fake)
    return done


@pytest.fixture
def recipes(tmp_path):
    for name in ('a.py', 'better.py', 'c.py'):
        (tmp_path / name).write_text('max_iters = 100\n')


def test_recipes_take_turns_within_a_seed(run, trainings, recipes, tmp_path):
    result = run('bench.py', 'compare', 'a.py', 'better.py', 'c.py', '--json_file=x.json')
    assert result.code == 0, result.err
    expected = []
    for seed in '12345':
        names = ['a.py', 'better.py', 'c.py'] if seed in '135' else ['c.py', 'better.py', 'a.py']
        expected += [(name, seed) for name in names]
    assert [(name, flags['seed']) for name, flags in trainings] == expected
    assert '2 better.py has a ' in result.out
    assert '% lower loss' in result.out
    assert '3 c.py: no difference from 1 a.py shown.' in result.out
    assert 'means of 5 seeds' in result.out

    figures = json.loads((tmp_path / 'x.json').read_text())
    assert list(figures['runs']) == ['1 a.py', '2 better.py', '3 c.py']
    assert list(figures['differences']) == ['2 better.py', '3 c.py']
    row = figures['runs']['1 a.py']
    assert row['loss'] == pytest.approx(1.503)
    assert row['steps'] == 100
    assert figures['differences']['2 better.py']['loss_p'] < 0.01
    assert figures['differences']['3 c.py']['loss_p'] == 1
    assert f'{row["loss"]:.4f}' in result.out
    evaluations = result.globals['train_evals']('a.py', 1)
    assert [record['step'] for record in evaluations] == list(STEPS), 'but the one at step 0'


def test_flags_are_passed_on_only_when_given(run, trainings, recipes):
    line = ['bench.py', 'compare', 'a.py', 'c.py', '--seeds=2']
    assert run(*line).code == 0
    for _, flags in trainings:
        assert set(flags) == {'seed', 'device', 'out_dir', 'always_save_checkpoint'}
        assert not Path(flags['out_dir']).exists()
    assert len(trainings) == 4
    trainings.clear()
    assert run(*line, '--dataset=sheep', '--device=cpu').code == 0
    for _, flags in trainings:
        assert flags['dataset'] == 'sheep'
        assert flags['device'] == 'cpu'
        assert 'eval_interval' not in flags
    trainings.clear()
    assert run(*line, '--eval_interval=7').code == 0
    for _, flags in trainings:
        assert flags['eval_interval'] == '7'
        assert 'dataset' not in flags


def test_a_grid_is_all_values_with_all(run, trainings, recipes, tmp_path):
    grid = '--grid=n_layer:2,3;dropout:0,0.1,0.2'
    result = run('bench.py', 'compare', 'a.py', grid, '--seeds=2', '--json_file=x.json')
    assert result.code == 0, result.err
    names = []
    points = []
    for n_layer in '23':
        for dropout in ('0', '0.1', '0.2'):
            names.append(f'n_layer={n_layer} dropout={dropout}')
            points.append((n_layer, dropout))
    assert list(json.loads((tmp_path / 'x.json').read_text())['runs']) == names
    trained = [(flags['n_layer'], flags['dropout']) for _, flags in trainings]
    assert trained == points + points[::-1]
    assert [flags['seed'] for _, flags in trainings] == 6 * ['1'] + 6 * ['2']
    assert {name for name, _ in trainings} == {'a.py'}
    assert 'n_layer=3 dropout=0 has a ' in result.out


def test_the_same_recipe_twice_is_two_rows(run, trainings, recipes, tmp_path):
    result = run('bench.py', 'compare', 'a.py', 'a.py', '--json_file=x.json')
    assert result.code == 0, result.err
    assert len(trainings) == 10
    runs = json.loads((tmp_path / 'x.json').read_text())['runs']
    assert list(runs) == ['1 a.py', '2 a.py']
    assert runs['1 a.py'] == runs['2 a.py']
    assert '2 a.py: no difference from 1 a.py shown.' in result.out


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_one_seed_is_trained_and_claims_nothing(run, trainings, recipes):
    result = run('bench.py', 'compare', 'a.py', 'better.py', '--seeds=1')
    assert result.code == 0, result.err
    assert not result.has_traceback
    assert len(trainings) == 2
    assert '2 better.py: no difference from 1 a.py shown.' in result.out


def refuse_constant(name):
    raise ValueError(f'{name} is not JSON')


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_the_figures_of_one_seed_are_json(run, trainings, recipes, tmp_path):
    run('bench.py', 'compare', 'a.py', 'better.py', '--seeds=1', '--json_file=x.json')
    json.loads((tmp_path / 'x.json').read_text(), parse_constant=refuse_constant)


@pytest.mark.parametrize(
    ('args', 'message', 'n_trainings'),
    [
        ([], 'Name two recipes, or one and a grid', 0),
        (['a.py'], 'Name two recipes, or one and a grid', 0),
        (['a.py', 'c.py', '--grid=n_layer:2,3'], 'A grid is one of a single recipe', 0),
        (['--grid=n_layer:2,3'], 'A grid is one of a single recipe', 0),
        (['a.py', '--grid=n_layer'], "grid='n_layer' is written knob:value,value", 0),
        (['a.py', '--grid=n_layer:'], "grid='n_layer:' is written knob:value,value", 0),
        (['a.py', '--grid=n_layer:2;'], "grid='n_layer:2;' is written knob:value,value", 0),
        (['a.py', '--grid='], "grid='' is written knob:value,value", 0),
        (['a.py', 'none.py'], 'There is no config file none.py.', 0),
        (['none.py', '--grid=n_layer:2,3'], 'There is no config file none.py.', 0),
        (['a.py', 'c.py', '--n_layr=2'], 'there is no knob named n_layr', 0),
        (['a.py', 'c.py', '--seeds=0'], 'seeds=0: must be from 1', 0),
        (['a.py', '--grid=no_knob:1,2'], 'a.py failed: --no_knob: there is no knob', 1),
    ],
)
def test_a_bad_comparison_gets_one_sentence(run, trainings, recipes, args, message, n_trainings):
    result = run('bench.py', 'compare', *args)
    assert result.is_one_sentence, result.err
    assert message in result.err
    assert len(trainings) == n_trainings


# -----------------------------------------------------------------------------
# in earnest


@pytest.mark.slow
def test_two_tiny_recipes_are_compared_in_earnest(sheep, run, tmp_path):
    knobs = dict(flag[2:].split('=') for flag in TINY)
    knobs |= {'device': "'cpu'", 'max_iters': 4, 'eval_interval': 2}
    text = ''.join(f'{name} = {value}\n' for name, value in knobs.items())
    (tmp_path / 'a.py').write_text(text + 'learning_rate = 1e-4\n')
    (tmp_path / 'b.py').write_text(text + 'learning_rate = 1e-2\nwarmup_iters = 0\n')
    flags = ['--seeds=2', '--dataset=sheep', '--device=cpu', '--json_file=x.json']
    result = run('bench.py', 'compare', 'a.py', 'b.py', *flags)
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / 'x.json').read_text())
    first, second = figures['runs'].values()
    for row in (first, second):
        assert row['steps'] == 4
        assert row['seconds'] > 0
        assert 0 < row['spread'] < 1
        assert row['bits'] == pytest.approx(row['loss'] / math.log(2), rel=0.01)  # a byte a token
    assert second['loss'] < first['loss']
    assert figures['differences']['2 b.py']['loss_ratio'] < 1
    assert result.out.splitlines()[-1].startswith('2 b.py')

    result = run('bench.py', 'compare', 'a.py', '--grid=no_knob:1,2', *flags)
    assert result.is_one_sentence, result.err
    assert 'there is no knob named no_knob' in result.err


def all_numbers(figures):
    """All numbers in nested dicts."""
    if not isinstance(figures, dict):
        return [figures]
    numbers = []
    for value in figures.values():
        numbers += all_numbers(value)
    return numbers


@pytest.mark.slow
def test_all_that_a_gpu_is_measured_with_runs_on_a_cpu(run, tmp_path):
    flags = ['--size=tiny', '--block_size=64', '--device=cpu', '--batch_size=2', '--repeats=1']
    result = run('bench.py', 'gpu', *flags, '--json_file=gpu.json')
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / 'gpu.json').read_text(), parse_constant=refuse_constant)
    assert set(figures) == {'step', 'chunks', 'sample', 'recipes'}
    compiled = {'plain compiled', 'ours compiled'}
    assert set(figures['step']['variants']) == {'plain', 'ours'} | compiled
    chunks = {f'ours compiled 2**{power}' for power in (24, 26, 27, 28, 29)}
    assert set(figures['chunks']['variants']) == chunks
    samples = set()
    for name in ('uncached', 'ours', 'compiled', 'transformers'):
        samples |= {f'{name} 64', f'{name} 256'}
    assert set(figures['sample']['tokens_per_second']) == samples
    recipes = {'train_gpt2', 'speedrun_gpt2', 'train_wikitext', 'wikitext_fast'}
    assert set(figures['recipes']) == recipes | {'train_tinystories'}
    for number in all_numbers(figures):
        assert math.isfinite(number)
        assert number > 0
    for row in figures['recipes'].values():
        assert row['val_loss'] < math.log(50304)
    assert all(len(line) <= 80 for line in result.out.splitlines())

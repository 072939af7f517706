"""Runs of so many epochs or minutes, what a run says of itself, and its final record."""

import itertools
import json
import math
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TEXT, TINY, in_ranks, losses, records, same, train, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import budget
import report
import runtime
from model import GPT

DRAW = report.draw  # the real one; most tests have none
WINDOWS = 307  # of 32 tokens in the sheep's training text
PER_STEP = 4  # windows, of TINY
OVERFITS = 'Validation has risen since step'
COMPLETE = 'it has all its steps'


@pytest.fixture
def paced(monkeypatch):
    """Have each step take so many seconds: paced[0], 2 s at first. Nothing else takes any time."""
    now = [0.0]
    pace = [2.0]

    def step(*args, original=torch.optim.AdamW.step, **kwargs):
        now[0] += pace[0]
        return original(*args, **kwargs)

    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    return pace


def steps_of(result):
    """How many steps a run has said it has."""
    (count,) = re.findall(r'(?m)^steps   ([\d,]+), each ', result.out)
    return int(count.replace(',', ''))


def knobs_of(out):
    """{name: value} of those knobs in a run's config.py that say how long it is."""
    knobs = {}
    for line in (out / 'config.py').read_text().splitlines():
        name, _, value = line.partition(' = ')
        if name in ('max_iters', 'max_epochs', 'max_minutes', 'lr_decay_iters'):
            knobs[name] = value
    return knobs


def fixed_length(n):
    """What config.py says of a run whose budget has become n steps."""
    return {
        'max_iters': str(n),
        'max_epochs': 'None',
        'max_minutes': 'None',
        'lr_decay_iters': 'None',
    }


def state_of(out, step):
    """What only training needs of a checkpoint, but for the seconds."""
    path = out / f'step_{step:08d}' / 'train_state.pt'
    state = torch.load(path, weights_only=True)
    state['progress'].pop('train_seconds')
    return state


def lines_of(out):
    """All records of a run's log, the final one among them."""
    return [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]


# -----------------------------------------------------------------------------
# epochs


@pytest.mark.parametrize('epochs', [0.5, 2.3])
def test_epochs_become_a_number_of_steps(run, sheep, tmp_path, epochs):
    flags = ['--batch_size=8', '--gradient_accumulation_steps=2', '--lr_decay_iters=5']
    result = train(run, f'--max_epochs={epochs}', *flags, '--n_layer=1')
    expected = round(epochs * WINDOWS / 16)
    assert steps_of(result) == expected
    assert f'\n        {expected * 16 / WINDOWS:.2f} epochs of it\n' in result.out
    assert list(losses(tmp_path / 'out'))[-1] == expected
    assert knobs_of(tmp_path / 'out') == fixed_length(expected)


def test_epochs_of_a_mixture_are_those_of_its_largest_share(run, sheep, tmp_path):
    (tmp_path / 'goats.txt').write_text(TEXT[::-1][:3000])
    assert run('prepare.py', '--input=goats.txt', '--tokenizer=byte').code == 0
    result = train(run, '--dataset=goats:0.25,sheep:0.75', '--max_epochs=0.25')
    assert steps_of(result) == round(0.25 * WINDOWS / 0.75 / PER_STEP)
    assert '\n        0.25 and 0.' in result.out


# -----------------------------------------------------------------------------
# minutes


@pytest.mark.parametrize(
    ('optimizer', 'dtype'), [('adamw', 'float32'), ('muon', 'float16'), ('adamw', 'float16')]
)
def test_minutes_are_a_run_that_can_be_repeated(run, sheep, tmp_path, paced, optimizer, dtype):
    flags = ['--max_minutes=0.4', f'--optimizer={optimizer}', f'--dtype={dtype}', '--dropout=0.1']
    result = train(run, *flags)
    assert steps_of(result) == 12, 'of 2 s'
    assert knobs_of(tmp_path / 'out') == fixed_length(12)

    again = run('train.py', 'out/config.py', '--out_dir=again')
    assert again.code == 0, again.err
    assert steps_of(again) == 12
    assert same(weights(tmp_path / 'out', 12), weights(tmp_path / 'again', 12))
    assert same(state_of(tmp_path / 'out', 12), state_of(tmp_path / 'again', 12))


@pytest.mark.parametrize(('epochs', 'n_steps'), [(0.1, 8), (0.2, 12), (9, 12)])
def test_of_epochs_and_minutes_the_shorter_counts(run, sheep, tmp_path, paced, epochs, n_steps):
    flags = [f'--max_epochs={epochs}', '--max_minutes=0.4']
    result = train(run, *flags)
    assert steps_of(result) == n_steps
    assert knobs_of(tmp_path / 'out') == fixed_length(n_steps)


def test_timed_steps_leave_no_trace(run, sheep, tmp_path, paced, monkeypatch):
    real = torch.nn.utils.clip_grad_norm_
    numbers = itertools.count(1)

    def clip(*args, **kwargs):
        norm = real(*args, **kwargs)
        if next(numbers) == 1:
            norm *= math.nan
        return norm

    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', clip)
    flags = ['--eval_interval=2', '--save_weights_interval=1', '--sample_interval=1']
    result = train(run, '--max_minutes=0.2', '--log_interval=1', *flags)
    assert next(numbers) == 2 + 6 + 1, 'two steps were timed'
    found = records(tmp_path / 'out')
    assert 'val_loss' in found[0]
    assert [record['step'] for record in found if 'val_loss' in record] == [0, 2, 4, 6]
    assert len(re.findall(r'(?m)^ +\d  weights sav', result.out)) == 6
    assert losses(tmp_path / 'out', 'train_seconds') == {n: 2.0 * n for n in range(7)}
    assert set(losses(tmp_path / 'out', 'skipped_steps').values()) == {0}
    assert list(losses(tmp_path / 'out', 'loss')) == [1, 2, 3, 4, 5, 6]
    assert list(losses(tmp_path / 'out', 'sample')) == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path / 'out', 'tokens')[1] == 128
    assert 'skipped' not in result.out


def test_minutes_are_about_kept(run, sheep, tmp_path):
    """Within a wide factor: other work may begin or end on this machine meanwhile."""
    train(run, '--max_minutes=0.02', '--eval_interval=100000', '--log_interval=1000')
    final = lines_of(tmp_path / 'out')[-1]['final']
    assert 1.2 / 8 < final['seconds'] < 1.2 * 8
    assert final['steps'] > 1


def test_a_run_of_minutes_that_was_cut_keeps_its_steps(run, sheep, tmp_path, paced):
    flags = ['--max_minutes=1', '--init_from=auto', '--eval_interval=10', '--dropout=0.1']
    flags += ['--max_iters=60', '--lr_decay_iters=5', '--log_interval=1']
    train(run, *flags, out='whole')
    lr = losses(tmp_path / 'whole', 'lr')
    assert lr[16] == pytest.approx(0.55 * lr[1]), 'the decay ends with the run'

    shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
    shutil.rmtree(tmp_path / 'cut' / 'step_00000030')
    paced[0] = 0.5
    resumed = train(run, *flags, out='cut')
    assert steps_of(resumed) == 30
    assert ' was ' not in resumed.out
    assert knobs_of(tmp_path / 'cut') == fixed_length(30)
    seconds = losses(tmp_path / 'cut', 'train_seconds')
    assert seconds[30] == 20 * 2 + 10 * 0.5, 'no step was timed again'
    assert losses(tmp_path / 'cut', 'lr') == lr
    assert same(weights(tmp_path / 'whole', 30), weights(tmp_path / 'cut', 30))
    assert same(state_of(tmp_path / 'whole', 30), state_of(tmp_path / 'cut', 30))


def test_a_signal_while_steps_are_timed_saves_nothing(run, sheep, tmp_path, monkeypatch):
    def step(*args, original=torch.optim.AdamW.step, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    result = train(run, '--max_minutes=10', code=128 + signal.SIGTERM)
    assert 'Nothing was to be saved yet.' in result.out
    assert not list((tmp_path / 'out').glob('step_*'))
    assert not (tmp_path / 'out' / 'log.jsonl').exists()
    assert not result.has_traceback


RANK_SCRIPT = """
import os, runpy, sys
from types import SimpleNamespace
sys.path.insert(0, {root!r})
import budget
real = budget.TimedSteps.count
pace = 0.1 if os.environ['RANK'] == '0' else 0.3


def count(self, clock):
    now = len(self.ends) * pace
    n_steps = real(self, SimpleNamespace(measure=lambda: now))
    if n_steps:
        open('steps_of_' + os.environ['RANK'], 'w').write(str(n_steps))
    return n_steps


budget.TimedSteps.count = count
runpy.run_path({root!r} + '/train.py', run_name='__main__')
"""


def test_a_recipe_shorter_than_the_timing_is_trained(run, sheep, tmp_path):
    """max_iters of the recipe does not end the steps that are timed."""
    result = run('train.py', '--dataset=sheep', *TINY, '--max_iters=2', '--max_minutes=0.01')
    assert result.code == 0, result.err
    assert list((tmp_path / 'out').glob('step_*')), result.out



@pytest.mark.slow
def test_processes_agree_on_the_steps(run, sheep, tmp_path):
    (tmp_path / 'rank.py').write_text(RANK_SCRIPT.format(root=str(ROOT)))
    flags = ['--dataset=sheep', *TINY, '--gradient_accumulation_steps=2', '--max_minutes=0.1']
    result = in_ranks(2, tmp_path / 'rank.py', *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for rank in '01':
        assert (tmp_path / f'steps_of_{rank}').read_text() == '30', 'of 0.2 s, the mean'
    assert list(losses(tmp_path / 'out')) == [0, 30]


# -----------------------------------------------------------------------------
# TimedSteps by itself


def tiny_timer(minutes, enabled=False):
    """A TimedSteps of a layer, with its optimizer and its scaler."""
    layer = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler('cpu', init_scale=64.0, enabled=enabled)
    return budget.TimedSteps(minutes, layer, [optimizer], scaler)


def counts(timer, durations):
    """What count() returns before the first step and after steps of these seconds."""
    ends = [0.0, *itertools.accumulate(durations)]
    return [timer.count(SimpleNamespace(measure=lambda end=end: end)) for end in ends]


@pytest.mark.parametrize(
    ('durations', 'n_steps'),
    [
        ([50.0, 2.0, 2.0, 2.0, 2.0, 2.0], 100),  # 5 % of 200 s are 10 s, of five steps
        ([5.0, 12.0], 17),
        ([99.0, 1.0], None),
        ([101.0], 2),
        ([500.0], 1),
        ([9.0, 30.0], 7),
    ],
)
def test_steps_are_timed_until_it_is_enough(durations, n_steps):
    *before, last = counts(tiny_timer(200 / 60), durations)
    assert before == [None] * len(durations)
    assert last == n_steps


def test_at_most_a_hundred_steps_are_timed():
    found = counts(tiny_timer(10.0), [9.0, *[0.01] * 99])
    assert found == [None] * 100 + [60_000], 'of the 99 after the first'


def test_undo_restores_the_model_optimizers_and_scaler():
    timer = tiny_timer(1.0, enabled=True)
    (optimizer,) = timer.optimizers
    before = {name: part.clone() for name, part in timer.model.state_dict().items()}
    scaler_before = timer.scaler.state_dict()
    loss = timer.model(torch.full((1, 3), math.inf)).sum()
    timer.scaler.scale(loss).backward()
    timer.scaler.step(optimizer)
    timer.scaler.update()  # halved
    timer.model.zero_grad()
    timer.scaler.scale(timer.model(torch.ones(1, 3)).sum()).backward()
    timer.scaler.step(optimizer)
    timer.scaler.update()
    assert optimizer.state
    assert timer.scaler.state_dict() != scaler_before
    assert not same(dict(timer.model.state_dict()), before)

    timer.undo()
    assert not optimizer.state
    assert timer.scaler.state_dict() == scaler_before
    assert timer.scaler.get_scale() == 64.0
    assert same(dict(timer.model.state_dict()), before)


# -----------------------------------------------------------------------------
# how long it will take


@pytest.mark.parametrize(
    ('seconds', 'n_steps', 'expected'),
    [
        (9, 100, []),
        (11, 1, ['about 0m11s a step here']),
        (4080, 10, ['about 1h08m a step here, about 11h20m in all']),
        (0.5, 172_000, []),
    ],
)
def test_long_steps_are_announced(capsys, seconds, n_steps, expected):
    report.print_estimate(seconds, n_steps, 'book')
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines == expected


def test_a_run_of_days_is_told_of_a_smaller_model(capsys):
    for seconds, n_steps in ((0.5, 200_000), (4080, 600_000)):
        report.print_estimate(seconds, n_steps, 'book')
        out = capsys.readouterr().out
        (config,) = re.findall(r'python train.py (config/\S+) .* --dataset=book\n', out)
        assert (ROOT / config).exists()
        assert max(map(len, out.splitlines())) <= 80
    assert 'about 1h08m a step here, about 28,333 days in all' in out


def test_a_step_of_minutes_is_announced_before_it_begins(run, sheep, capsys, monkeypatch):
    monkeypatch.setattr(runtime, 'matmul_flops', lambda device, dtype: 1e11)
    report.print_bound(6e13, 'cpu', 'float32')
    assert capsys.readouterr().out.strip() == 'at least 10m00s a step here'
    report.print_bound(6e13, 'cuda', 'float32')  # never so long
    assert not capsys.readouterr().out

    monkeypatch.setattr(GPT, 'flops_per_token', lambda self, block_size=None: 1e13)
    monkeypatch.setattr(runtime, 'matmul_flops', lambda device, dtype: 1e13)
    out = train(run, '--max_iters=1').out
    assert '        at least 2m08s a step here\nsteps   1, each' in out


def test_a_short_step_is_not_measured_first(monkeypatch):
    monkeypatch.setattr(runtime, 'matmul_flops', None)
    report.print_bound(9e12, 'cpu', 'float32')


def test_the_rate_of_matrix_products_is_what_the_threads_can():
    rate = runtime.matmul_flops('cpu', 'float32')
    a, b = torch.randn(2, 1536, 1536)
    seconds = min(runtime.seconds_of('cpu', torch.matmul, a, b) for _ in range(10))
    assert 0.4 < rate * seconds / (2 * 1536**3) < 2.5


def test_the_first_micro_batch_says_how_long_a_step_takes(run, sheep, tmp_path, monkeypatch):
    now = [0.0]

    def forward(self, *args, original=GPT.forward, **kwargs):
        if self.training:
            now[0] += 20.0
        return original(self, *args, **kwargs)

    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(GPT, 'forward', forward)
    flags = ['--gradient_accumulation_steps=3', '--log_interval=1', '--eval_interval=3']
    estimate = r'about (\S+) a step here, about (\S+) in all'
    result = train(run, *flags, '--max_iters=5')
    assert re.findall(estimate, result.out) == [('1m00s', '5m00s')]
    before_the_first_step = result.out.partition('\n        1 ')[0]
    assert 'a step here' in before_the_first_step
    resumed = train(run, *flags, '--max_iters=7', '--init_from=resume')
    assert re.findall(estimate, resumed.out) == [('1m00s', '2m00s')], 'of what is left'


@pytest.mark.parametrize('compiles', [False, True])
def test_what_compiles_says_nothing_of_its_first_step(run, sheep, monkeypatch, compiles):
    called = []

    def note(seconds, n_steps, dataset):
        called.append(n_steps)

    monkeypatch.setattr(GPT, 'compile', lambda self: None)
    monkeypatch.setattr(runtime, 'can_compile', lambda device: True)
    monkeypatch.setattr('report.print_estimate', note)
    train(run, '--max_iters=3', f'--compile={compiles}')
    expected = [] if compiles else [3]
    assert called == expected


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(59.6, '1m00s'), (999 * 3600, '999h00m'), (3.6e6, '42 days'), (7704 * 3600, '321 days')],
)
def test_durations_beyond_a_thousand_hours_are_days(seconds, text):
    assert report.duration(seconds) == text


# -----------------------------------------------------------------------------
# overfitting


def test_a_run_that_overfits_is_told_once_and_at_the_end(run, tmp_path):
    (tmp_path / 'sheep.txt').write_text(TEXT[:4500] + TEXT[::-1][:500])  # validated backwards
    assert run('prepare.py', '--input=sheep.txt', '--tokenizer=byte').code == 0
    flags = ['--learning_rate=1e-2', '--log_interval=5', '--eval_interval=20', '--n_layer=1']
    result = train(run, *flags, '--max_iters=100')
    curve = losses(tmp_path / 'out')
    best = min(curve, key=curve.get)
    assert best in (20, 40), 'or this is no text to overfit'
    assert curve[100] > 1.2 * curve[best]

    told = [m.start() for m in re.finditer(f'{OVERFITS} {best} while', result.out)]
    assert len(told) == 2
    seen = result.out.index(f'\n{best + 40:>9,}')
    assert seen < told[0] < result.out.index(f'\n{best + 60:>9,}'), 'at the second one'
    assert told[1] > result.out.index('Best validation loss'), 'and at the end'
    for what in ('fewer steps', '--dropout', 'smaller model', '--early_stopping_patience=2'):
        assert result.out.count(what) == 2


def test_a_run_that_does_not_overfit_is_told_nothing(run, sheep):
    flags = ['--max_iters=40', '--eval_interval=10', '--learning_rate=3e-3']
    assert OVERFITS not in train(run, *flags).out


def history(validation, training):
    """Records of a log: {step: loss} of both kinds."""
    found = [{'step': step, 'val_loss': loss} for step, loss in validation.items()]
    found += [{'step': step, 'loss': loss} for step, loss in training.items()]
    return sorted(found, key=lambda record: record['step'])


FALLING = {5: 3.0, 10: 2.5, 15: 2.0, 25: 1.5, 35: 1.0}


@pytest.mark.parametrize(
    ('validation', 'training', 'expected'),
    [
        ({0: 5.0, 10: 2.6, 20: 2.7, 30: 2.8}, FALLING, True),
        ({0: 5.0, 10: 2.0, 20: 2.1}, FALLING, False),  # one evaluation since
        ({0: 5.0, 10: 2.0, 20: 2.001, 30: 2.009}, FALLING, False),  # no more than noise
        ({0: 5.0, 10: 2.0, 20: 2.1, 30: 2.2}, {5: 3.0, 15: 3.5, 25: 3.6}, False),  # it diverges
        ({0: 5.0, 10: 2.0, 20: 2.1, 30: 2.2}, {}, False),
        ({0: 5.0, 10: 2.0, 20: 2.1, 30: 2.2}, {5: None, 15: None}, False),
        ({0: 3.0, 10: 3.1, 20: 3.2, 30: 3.3}, FALLING, True),  # from the start, as in fine-tuning
        ({0: 5.0, 10: 1.0, 20: 1.1, 30: 1.2}, FALLING, False),  # below the training loss: noise
    ],
)
def test_overfitting_is_validation_up_and_training_down(validation, training, expected):
    best_step = min(validation, key=validation.get)
    assert report.overfits(history(validation, training), best_step) is expected


# -----------------------------------------------------------------------------
# the final record


def test_the_log_ends_with_a_record_of_the_run(run, sheep, tmp_path, paced):
    flags = ['--eval_interval=2', '--learning_rate=1e-2', '--min_lr=1e-2']
    result = train(run, *flags, '--max_iters=5')
    last = lines_of(tmp_path / 'out')[-1]
    assert last.keys() == {'step', 'final'}
    assert last['step'] == 5
    final = last['final']
    curve = losses(tmp_path / 'out')
    best = min(curve, key=curve.get)
    assert final.pop('gib') > 0
    assert final == {
        'val_loss': curve[5],
        'bits_per_byte': losses(tmp_path / 'out', 'bits_per_byte')[5],
        'best_val_loss': curve[best],
        'best_step': best,
        'seconds': 10.0,
        'steps': 5,
        'tokens': 5 * 128,
        'parameters': result.globals['model'].count_parameters(),
    }

    train(run, *flags, '--max_iters=8', '--init_from=resume')
    found = lines_of(tmp_path / 'out')
    assert [record['step'] for record in found if 'final' in record] == [8]
    assert found[-1]['final']['steps'] == 8
    assert found[-1]['final']['seconds'] == 16.0
    assert found[-1]['final']['tokens'] == 8 * 128


def test_a_run_that_gets_worse_has_its_last_and_its_best(run, sheep, tmp_path):
    flags = ['--learning_rate=3', '--eval_interval=2', '--grad_clip=0.0']
    train(run, *flags, '--max_iters=4')
    final = lines_of(tmp_path / 'out')[-1]['final']
    curve = losses(tmp_path / 'out')
    assert final['val_loss'] == curve[4] > final['best_val_loss']
    assert final['best_val_loss'] == curve[final['best_step']] == min(curve.values())


def test_json_is_all_that_is_on_standard_output(run, sheep, tmp_path):
    result = train(run, '--max_iters=3', '--format=json', '--log_interval=1')
    assert result.out.count('\n') == 1
    assert json.loads(result.out) == lines_of(tmp_path / 'out')[-1]['final']
    for line in ('model   gpt2', 'steps   3, each', 'Best validation loss'):
        assert line in result.err
    text = train(run, '--max_iters=3', out='other')
    assert not text.err
    assert '"val_loss"' not in text.out


def test_scripts_read_a_log_with_a_final_record(run, sheep, tmp_path, monkeypatch):
    monkeypatch.setattr('report.update_plot', lambda *args: None)
    train(run, '--max_iters=4', '--eval_interval=2', '--log_interval=1', '--tracker=tensorboard')
    assert 'final' in lines_of(tmp_path / 'out')[-1]
    monkeypatch.setattr('report.draw', DRAW)
    drawn = run('plot.py', '--out_dir=out', '--x=seconds')
    assert drawn.code == 0, drawn.err
    assert (tmp_path / 'out' / 'loss.png').exists()
    evaluated = run('evaluate.py', '--out_dir=out', '--device=cpu')
    assert evaluated.code == 0, evaluated.err

    events = EventAccumulator(str(tmp_path / 'out' / 'tensorboard'))
    events.Reload()
    assert 'val_loss' in events.Tags()['scalars']
    tags = itertools.chain.from_iterable(events.Tags()[kind] for kind in ('scalars', 'tensors'))
    assert not [tag for tag in tags if 'final' in tag]


def test_a_tracker_is_not_sent_the_final_record(monkeypatch):
    sent = []
    monkeypatch.setattr(report, '_send', lambda step, values: sent.append(values))
    monkeypatch.setattr(report, '_tracked', {})
    report.track(step=3, final={'val_loss': 2.0})
    assert not sent
    report.track(step=4, loss=1.0)
    assert sent == [{'loss': 1.0}]


# -----------------------------------------------------------------------------
# what a run says where it resumes


def test_resuming_a_finished_run_says_how_it_goes_on(run, sheep, tmp_path):
    flags = ['--learning_rate=1e-2', '--log_interval=1']
    first = train(run, *flags, '--max_iters=4')
    assert COMPLETE not in first.out
    again = train(run, *flags, '--max_iters=4', '--init_from=resume')
    assert COMPLETE in again.out
    assert 'out/config.py --init_from=resume --max_iters=MANY' in again.out
    assert '--init_from=out/step_00000004 --out_dir=ANOTHER' in again.out
    assert 'the learning rate rises' not in again.out

    lr = losses(tmp_path / 'out', 'lr')[4]
    shutil.copytree(tmp_path / 'out', tmp_path / 'constant')
    more = train(run, *flags, '--max_iters=20', '--init_from=resume')
    assert COMPLETE not in more.out
    risen = losses(tmp_path / 'out', 'lr')[5]
    assert f'the learning rate rises from {lr:.2e} to {risen:.2e}\n' in more.out
    flags += ['--max_iters=20', '--lr_decay_iters=4', '--init_from=resume']
    assert 'the learning rate rises' not in train(run, *flags, out='constant').out


def test_the_rates_of_both_optimizers_are_named(run, sheep):
    flags = ['--max_iters=1', '--learning_rate=3e-3', '--muon_lr=0.04']
    result = train(run, *flags, '--optimizer=muon')
    assert 'rates   0.003 (AdamW, the column lr), 0.04 (Muon)\n' in result.out
    assert 'rates ' not in train(run, *flags, out='adamw').out


# -----------------------------------------------------------------------------
# plans


def test_a_plan_counts_epochs_and_minutes(run, sheep, tmp_path, monkeypatch):
    monkeypatch.setattr('plan.time_step', lambda shape, config: (0.25, 0.1))
    flags = ['--plan', '--plan_gpu=CPU', '--max_epochs=2.3', '--max_minutes=0.25']
    assert steps_of(train(run, *flags)) == 60, 'of both the shorter'
    epochs = train(run, '--plan', '--max_epochs=2.3')
    assert steps_of(epochs) == round(2.3 * WINDOWS / PER_STEP)
    assert '\n        2.31 epochs of it\n' in epochs.out
    on_cpu = train(run, '--plan', '--max_minutes=2', '--device=cpu')
    assert steps_of(on_cpu) == 480
    assert '\ntime    2m00s on this machine' in on_cpu.out

    flags = ['--plan', '--n_embd=512', '--n_layer=8', '--batch_size=64', '--block_size=512']
    on_gpu = train(run, *flags, '--plan_gpu=H100', '--max_minutes=60', '--dtype=auto')
    n_steps = steps_of(on_gpu)
    assert '\ntime    1h00m on 1 x H100' in on_gpu.out
    rate = int(re.search(r'([\d,]+) tokens/s', on_gpu.out)[1].replace(',', ''))
    assert n_steps == pytest.approx(3600 * rate / (64 * 512), rel=1e-3)
    assert n_steps > 1000
    assert not (tmp_path / 'out').exists()


def test_a_plan_of_epochs_needs_the_text(run, tmp_path):
    result = run('train.py', *TINY, '--dataset=goats', '--plan', '--max_epochs=2')
    assert result.is_one_sentence
    assert 'max_epochs of goats cannot be planned: prepare it first.' in result.err


def test_a_plan_of_minutes_needs_the_time_of_a_step(run, sheep):
    flags = ['--plan_gpu=H100', '--dtype=float32', '--max_minutes=2']
    result = train(run, '--plan', *flags, code=1)
    assert result.is_one_sentence
    assert 'max_minutes cannot be planned: the time of a step is not known.' in result.err


# -----------------------------------------------------------------------------
# files that compute with flags


def test_a_config_file_sees_the_flags_behind_it(run, sheep, tmp_path):
    (tmp_path / 'dial.py').write_text('n_embd = 16 * n_head\nn_layer = 1\n')
    (tmp_path / 'heads.py').write_text('n_head = 8\n')
    flags = ['--dataset=sheep', '--max_iters=0', '--device=cpu', '--block_size=32']
    flags += ['--gradient_accumulation_steps=1']
    expected = {
        ('dial.py', '--n_head=4'): (4, 64, 1),
        ('--n_head=4', 'dial.py'): (4, 64, 1),
        ('dial.py', '--n_head=4', '--n_embd=32'): (4, 32, 1),
        ('dial.py', '--n_head=2', '--n_head=4', '--n_layer=2'): (4, 64, 2),
        ('heads.py', 'dial.py'): (8, 128, 1),
    }
    for number, (given, shape) in enumerate(expected.items()):
        result = run('train.py', *given, *flags, f'--out_dir=out{number}')
        assert result.code == 0, result.err
        config = result.globals['config']
        assert (config['n_head'], config['n_embd'], config['n_layer']) == shape, given


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--n_head=x', "n_head takes int, not 'x'"),
        ('--n_haed=4', 'there is no knob named n_haed. Did you mean n_head?'),
        ('--optimizer=sgd', "optimizer='sgd' must be one of: adamw, muon"),
        ('--n_head', '--n_head needs a value'),
    ],
)
def test_a_wrong_flag_behind_a_file_is_one_sentence(run, tmp_path, flag, message):
    (tmp_path / 'dial.py').write_text('n_embd = 64 * n_head\n')
    result = run('train.py', 'dial.py', flag)
    assert result.is_one_sentence
    assert message in result.err
    assert not (tmp_path / 'out').exists()

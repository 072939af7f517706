"""What happens when: a kill, a full disk, a NaN, a signal, a damaged file.

Nothing is lost, nothing is corrupted.
"""

import contextlib
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, Bomb, command, losses, records, same, train, weights
from safetensors.torch import load

import checkpoint
import model as model_module
from optim import parameter_groups

FOREVER = ['--dataset=sheep', *TINY, '--max_iters=100000', '--eval_interval=100000']
FOREVER += ['--log_interval=1']


def optimizer_state(out, step):
    path = out / f'step_{step:08d}' / 'train_state.pt'
    return torch.load(path, weights_only=True)['optimizer']


def names(paths):
    return [path.name for path in paths]


def update_checksum(path, **changes):
    """Have a checkpoint's meta.json say that its train_state.pt is as it should be."""
    meta = json.loads((path / 'meta.json').read_text())
    meta['files']['train_state.pt'] = checkpoint.checksum(path / 'train_state.pt')
    (path / 'meta.json').write_text(json.dumps(meta | changes))


def spoil_gradients(monkeypatch, steps):
    """Put a NaN into the gradient of these steps, counted from 0."""
    real = torch.nn.utils.clip_grad_norm_
    calls = iter(range(10**6))

    def clip(parameters, *args, **options):
        parameters = list(parameters)
        if next(calls) in steps:
            parameters[3].grad.view(-1)[1] = math.nan
        return real(parameters, *args, **options)

    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', clip)


def spoil_losses(monkeypatch, steps):
    """Make the loss of these steps infinite; its gradient stays finite."""
    real = model_module.GPT.forward
    calls = iter(range(10**6))

    def forward(self, *args, **options):
        out = real(self, *args, **options)
        if self.training and next(calls) in steps:
            return out + math.inf
        return out

    monkeypatch.setattr(model_module.GPT, 'forward', forward)


# -----------------------------------------------------------------------------
# skipped steps


@pytest.mark.parametrize('spoil', [spoil_gradients, spoil_losses])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_skipped_step_changes_nothing_and_is_counted(
    run, sheep, tmp_path, monkeypatch, spoil, dtype
):
    spoil(monkeypatch, {2, 3, 5})
    flags = ['--max_iters=8', '--eval_interval=1', '--log_interval=1', '--keep_last=99']
    result = train(run, *flags, f'--dtype={dtype}', '--grad_clip=0.5')
    out = tmp_path / 'out'
    for step in range(1, 8):  # the step after this checkpoint
        skipped = step in {2, 3, 5}
        assert same(weights(out, step), weights(out, step + 1)) == skipped
        assert same(optimizer_state(out, step), optimizer_state(out, step + 1)) == skipped
    expected = {1: 0, 2: 0, 3: 1, 4: 2, 5: 2, 6: 3, 7: 3, 8: 3}
    assert losses(out, 'skipped_steps') == expected
    assert 'step      3  1 skipped: the loss or the gradient was not finite' in result.out
    key = 'loss' if spoil is spoil_losses else 'grad_norm'
    logged = losses(out, key)
    missing = [logged[step] is None for step in (2, 3, 4, 5, 6)]
    assert missing == [False, True, True, False, True]
    log = (out / 'log.jsonl').read_text()
    assert 'NaN' not in log
    assert 'Infinity' not in log


def test_a_float16_overflow_lowers_the_scale_until_it_fits(run, sheep, tmp_path, monkeypatch):
    real = torch.amp.GradScaler

    def high_scale(*args, **options):
        return real(*args, **options, init_scale=2.0**24)

    monkeypatch.setattr(torch.amp, 'GradScaler', high_scale)
    train(run, '--max_iters=20', '--dtype=float16', '--log_interval=1')
    skipped = losses(tmp_path / 'out', 'skipped_steps')
    path = tmp_path / 'out' / 'step_00000020' / 'train_state.pt'
    scaler = torch.load(path, weights_only=True)['scaler']
    assert 0 < skipped[20] < 20
    assert scaler['scale'] == 2.0 ** (24 - skipped[20])
    assert losses(tmp_path / 'out')[20] < losses(tmp_path / 'out')[0]


@pytest.mark.parametrize('log_interval', [1, 100])
def test_too_many_skipped_steps_in_a_row_end_the_run(
    run, sheep, tmp_path, monkeypatch, log_interval
):
    # The streak is over when it is looked at next, at step 12.
    spoil_gradients(monkeypatch, {1, 2, 4, *range(6, 11)})
    flags = ['--max_iters=30', '--eval_interval=6', '--max_skipped_steps=5']
    result = train(run, *flags, f'--log_interval={log_interval}', code=1)
    assert 'in a row' in result.err
    assert 'try a lower learning_rate' in result.err
    assert result.err.count('\n') == 1
    assert names(checkpoint.checkpoints(tmp_path / 'out')) == ['step_00000006']


def test_a_run_that_diverges_ends_and_nothing_of_it_is_saved(run, sheep, tmp_path):
    flags = ['--max_iters=90', '--learning_rate=1e15', '--grad_clip=0.0', '--eval_interval=40']
    result = train(run, *flags, code=1)
    assert 'in a row' in result.err
    assert result.err.count('\n') == 1
    assert not checkpoint.checkpoints(tmp_path / 'out')
    again = train(run, *flags, '--eval_interval=1', out='again', code=1)
    assert 'validation loss is' in again.err
    assert 'nothing is saved' in again.err
    for path in checkpoint.checkpoints(tmp_path / 'again'):
        tensors = load((path / 'model.safetensors').read_bytes())
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_streak_of_skipped_steps_continues_after_a_resume(run, sheep, tmp_path, monkeypatch):
    spoil_gradients(monkeypatch, range(2, 99))
    flags = ['--max_skipped_steps=5']
    train(run, *flags, '--max_iters=5')
    resumed = train(run, *flags, '--max_iters=7', '--init_from=resume', code=1)
    assert '5 times in a row, seen at step 7' in resumed.err


# -----------------------------------------------------------------------------
# best, patience, weights-only checkpoints


def fake_losses(monkeypatch, values):
    """Make the validation losses these, whatever the weights."""
    real = model_module.GPT.forward
    values = iter(values)

    def forward(self, *args, **options):
        if self.training:
            return real(self, *args, **options)
        return torch.tensor(next(values))

    monkeypatch.setattr(model_module.GPT, 'forward', forward)


def test_patience_ends_the_run_and_counts_on_over_a_resume(run, sheep, tmp_path, monkeypatch):
    flags = ['--eval_interval=1', '--early_stopping_patience=3', '--batch_size=100']
    fake_losses(monkeypatch, [5.0, 3.0, 4.0, 2.0, 3.0, 3.0])
    train(run, *flags, '--max_iters=5')
    assert list(losses(tmp_path / 'out')) == [0, 1, 2, 3, 4, 5]
    fake_losses(monkeypatch, [2.5, 9.0])
    result = train(run, *flags, '--max_iters=50', '--init_from=resume')
    assert list(losses(tmp_path / 'out')) == [0, 1, 2, 3, 4, 5, 6]
    assert 'Stopped early: no new best for 3 evaluations' in result.out
    assert '2.0000, at step 3' in result.out
    kept = checkpoint.checkpoints(tmp_path / 'out')
    assert names(kept) == ['step_00000003', 'step_00000005', 'step_00000006']
    again = train(run, *flags, '--max_iters=50', '--init_from=resume')
    assert 'Stopped early' in again.out
    assert list(losses(tmp_path / 'out')) == [0, 1, 2, 3, 4, 5, 6]


def test_the_best_is_the_lowest_logged_loss_over_resumes_too(run, sheep, tmp_path, monkeypatch):
    flags = ['--eval_interval=1', '--batch_size=100', '--keep_last=1']
    fake_losses(monkeypatch, [5.0, 4.0, 2.0, 3.0])
    train(run, *flags, '--max_iters=3')
    fake_losses(monkeypatch, [2.5, 2.1])
    result = train(run, *flags, '--max_iters=5', '--init_from=resume')
    logged = losses(tmp_path / 'out')
    assert min(logged, key=logged.get) == 2
    assert 'Best validation loss 2.0000, at step 2' in result.out
    assert checkpoint.find(tmp_path / 'out', 'best').name == 'step_00000002'
    kept = checkpoint.checkpoints(tmp_path / 'out')
    assert names(kept) == ['step_00000002', 'step_00000005']


def test_weights_only_checkpoints_hold_no_more_and_stay(run, sheep, tmp_path):
    flags = ['--max_iters=6', '--eval_interval=3']
    train(run, *flags, '--save_weights_interval=2', '--keep_last=1')
    paths = sorted((tmp_path / 'out').glob('weights_*'))
    assert names(paths) == ['weights_00000002', 'weights_00000004', 'weights_00000006']
    assert names(checkpoint.checkpoints(tmp_path / 'out', 'weights')) == names(paths)
    assert not any((path / 'train_state.pt').exists() for path in paths)
    tensors = load((paths[-1] / 'model.safetensors').read_bytes())
    assert same(tensors, weights(tmp_path / 'out', 6))
    result = run('sample.py', f'--init_from={paths[0]}', '--max_new_tokens=3')
    assert result.code == 0, result.err
    train(run, *flags, out='without')
    assert same(weights(tmp_path / 'without', 6), weights(tmp_path / 'out', 6))


def test_weights_only_checkpoints_are_not_overwritten(run, sheep, tmp_path):
    train(run, '--max_iters=4', '--save_weights_interval=2')
    for path in checkpoint.checkpoints(tmp_path / 'out'):
        shutil.rmtree(path)
    for how in ('scratch', 'auto'):
        result = train(run, '--max_iters=4', f'--init_from={how}', code=1)
        assert 'out holds a run' in result.err


# -----------------------------------------------------------------------------
# signals and pipes


@pytest.mark.parametrize(
    ('handler', 'status', 'last_step'),
    [(signal.SIG_DFL, 128 + signal.SIGHUP, 3), (signal.SIG_IGN, 0, 6)],
    ids=['closed', 'nohup'],
)
def test_a_closed_terminal_saves_and_nohup_goes_on(
    run, sheep, tmp_path, monkeypatch, handler, status, last_step
):
    adamw = torch.optim.AdamW.step
    calls = iter(range(1, 10**6))

    def step(*args, **options):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGHUP)
        return adamw(*args, **options)

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    signal.signal(signal.SIGHUP, handler)
    try:
        train(run, '--max_iters=6', code=status)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    last = checkpoint.checkpoints(tmp_path / 'out')[-1]
    assert last.name == f'step_{last_step:08d}'


def start(*flags, cwd, **options):
    """Start train.py as its own process, and wait until it has trained a step."""
    line = [sys.executable, str(ROOT / 'train.py'), *flags]
    process = subprocess.Popen(line, cwd=cwd, stdout=subprocess.PIPE, **options)
    for row in process.stdout:
        if re.match(rb' +\d+ ', row) and b'validation' not in row:
            break
    return process


def test_a_run_whose_output_nobody_reads_any_more_is_saved(sheep, tmp_path):
    process = start(*FOREVER, cwd=tmp_path, stderr=subprocess.PIPE)
    process.stdout.close()  # what `| head` does
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert process.stderr.read() == b''
    process.stderr.close()
    assert len(checkpoint.checkpoints(tmp_path / 'out')) == 1


def test_two_runs_do_not_write_to_one_folder(sheep, tmp_path):
    process = start(*FOREVER, cwd=tmp_path)
    second = command('train.py', *FOREVER, '--init_from=auto', cwd=tmp_path)
    process.terminate()
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert second.returncode == 1
    assert second.stderr.startswith('Another run writes to out')


# -----------------------------------------------------------------------------
# damaged files


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b'')


def replace(path):
    path.write_bytes(b'{}')


def delete(path):
    path.unlink()


@pytest.mark.parametrize(
    'file', ['train_state.pt', 'meta.json', 'model.safetensors', 'config.json']
)
@pytest.mark.parametrize('damage', [truncate, flip_a_bit, empty, replace, delete])
def test_a_damaged_checkpoint_is_reported_and_not_used(run, sheep, tmp_path, file, damage):
    if file == 'meta.json' and damage == flip_a_bit:
        pytest.skip('it holds the checksums: while it still is JSON, a flipped bit is not noticed')
    out = tmp_path / 'out'
    flags = ['--max_iters=6', '--eval_interval=2', '--dropout=0.1', '--keep_last=3']
    train(run, *flags)
    expected = weights(out, 6)
    for step in (4, 6):
        damage(out / f'step_0000000{step}' / file)
    if file != 'train_state.pt':  # which sampling does not need
        sampled = run('sample.py', '--max_new_tokens=3')
        assert sampled.code == 0
        assert 'step_00000006 is damaged: its' in sampled.err
    again = train(run, *flags, '--init_from=auto')
    for step in (4, 6):
        message = f'The checkpoint out/step_0000000{step} is damaged: its {file}'
        assert message in again.err
    assert again.err.count('\n') == 2
    assert 'out/step_00000002, step 2' in again.out, 'the one before them is used'
    assert same(weights(out, 6), expected)
    assert list(losses(out)) == [0, 2, 4, 6]
    assert len(checkpoint.checkpoints(out)) == 3
    damaged = list(out.glob('damaged_step_*'))
    assert len(damaged) == 2, 'whether to delete them is for the user to decide'


@pytest.mark.parametrize('how', ['--init_from=auto', '--init_from=resume'])
def test_a_run_with_no_usable_checkpoint_is_not_started_anew(run, sheep, tmp_path, how):
    train(run, '--max_iters=2')
    truncate(tmp_path / 'out' / 'step_00000002' / 'model.safetensors')
    result = train(run, '--max_iters=4', how, code=1)
    assert 'No checkpoint in out can be used.' in result.err
    assert list(losses(tmp_path / 'out')) == [0, 2], 'the log is as it was'


def test_a_damaged_newer_checkpoint_does_not_displace_good_ones(run, sheep, tmp_path):
    train(run, '--max_iters=6', '--eval_interval=3', '--keep_last=2')
    truncate(tmp_path / 'out' / 'step_00000006' / 'train_state.pt')
    flags = ['--max_iters=4', '--eval_interval=1', '--keep_last=1', '--init_from=resume']
    train(run, *flags)
    last = checkpoint.find(tmp_path / 'out', 'last', training=True)
    assert last.name == 'step_00000004'
    assert not (tmp_path / 'out' / 'step_00000006').exists()


@pytest.mark.parametrize(
    'change',
    [
        {'config': None},
        {'config': {}},
        {'config': {'init_from': None}},
        {'files': {}},
        {
            'files': {
                '/etc/passwd': [1, 'x'],
                'config.json': [],
                'model.safetensors': [],
                'train_state.pt': [],
            }
        },
        {'val_loss': math.nan},
        {'val_loss': 'x'},
        {'files': 5},
    ],
    ids=str,
)
def test_a_checkpoint_whose_meta_makes_no_sense_is_skipped(run, sheep, tmp_path, change):
    train(run, '--max_iters=4', '--eval_interval=2')
    path = tmp_path / 'out' / 'step_00000004' / 'meta.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    again = train(run, '--max_iters=4', '--init_from=resume')
    assert 'out/step_00000004 is damaged: its meta.json' in again.err
    assert 'out/step_00000002, step 2' in again.out


def test_a_checkpoint_that_is_not_readable_now_is_not_damaged(run, sheep, tmp_path, monkeypatch):
    def checksum(path):
        raise OSError(5, 'Input/output error')

    train(run, '--max_iters=4', '--eval_interval=2')
    monkeypatch.setattr(checkpoint, 'checksum', checksum)
    result = train(run, '--max_iters=6', '--init_from=auto', code=1)
    assert 'Input/output error' in result.err
    left = checkpoint.checkpoints(tmp_path / 'out')
    assert names(left) == ['step_00000002', 'step_00000004']


def test_killed_while_replacing_a_checkpoint_the_old_one_is_used(run, sheep, tmp_path):
    out = tmp_path / 'out'
    train(run, '--max_iters=4', '--eval_interval=2')
    expected = weights(out, 4)

    # Killed after the first of the two renames: the old one lost its name, the new one has none.
    (out / 'step_00000004').rename(out / '.step_00000004.old')
    shutil.copytree(out / '.step_00000004.old', out / '.step_00000004.tmp')
    resumed = train(run, '--max_iters=6', '--init_from=auto')
    assert 'out/step_00000004, step 4' in resumed.out

    # Killed after the second.
    shutil.copytree(out / 'step_00000004', out / '.step_00000004.old')
    train(run, '--max_iters=7', '--init_from=auto', '--keep_last=9')
    assert same(weights(out, 4), expected)
    assert not list(out.glob('.step*'))


def test_an_evaluation_first_after_a_resume_is_saved_and_logged(
    run, sheep, tmp_path, monkeypatch
):
    flags = ['--eval_interval=4', '--batch_size=100']
    fake_losses(monkeypatch, [5.0, 4.0])
    train(run, *flags, '--max_iters=4')
    fake_losses(monkeypatch, [1.0, 3.0])
    path = tmp_path / 'out' / 'step_00000004'
    state = torch.load(path / 'train_state.pt', weights_only=True)
    state['progress']['last_eval_step'] = 0  # as if a signal had come just before that evaluation
    torch.save(state, path / 'train_state.pt')
    update_checksum(path, val_loss=None)
    train(run, *flags, '--max_iters=8', '--keep_last=1', '--init_from=resume')
    evaluated = [record['step'] for record in records(tmp_path / 'out') if 'val_loss' in record]
    assert evaluated == [0, 4, 8], 'once each'
    assert checkpoint.find(tmp_path / 'out', 'best').name == 'step_00000004'


@pytest.mark.parametrize('honest', [True, False])
def test_a_pickle_bomb_is_not_executed(run, sheep, tmp_path, honest):
    train(run, '--max_iters=2')
    path = tmp_path / 'out' / 'step_00000002'
    (path / 'train_state.pt').write_bytes(pickle.dumps(Bomb()))
    if not honest:  # with a checksum to match
        update_checksum(path)
    result = train(run, '--max_iters=4', '--init_from=resume', code=1)
    message = 'The checkpoint out/step_00000002 is damaged: its train_state.pt'
    assert message in result.err
    assert not (tmp_path / 'exploded').exists()


def test_a_log_cut_at_any_byte_goes_on(run, sheep, tmp_path):
    def kinds(records):
        return [(record['step'], 'loss' in record) for record in records]

    out = tmp_path / 'out'
    flags = ['--max_iters=4', '--log_interval=1', '--eval_interval=2']
    train(run, *flags)
    expected = kinds(records(out))
    shutil.rmtree(out / 'step_00000004')
    shutil.copytree(out, tmp_path / 'killed')
    log = (out / 'log.jsonl').read_bytes()
    after_save = [line for line in log.splitlines(True) if json.loads(line)['step'] > 2]
    # When the checkpoint of step 2 was saved, this much was written.
    first = len(log) - sum(map(len, after_save))
    for cut in random.Random(0).sample(range(first, len(log)), 6):
        for tail in (b'', b'\n\n{}\n5\n\xff\n{"step": 2'):
            shutil.rmtree(out)
            shutil.copytree(tmp_path / 'killed', out)
            (out / 'log.jsonl').write_bytes(log[:cut] + tail)
            train(run, *flags, '--init_from=resume')
            assert kinds(records(out)) == expected


def test_a_checkpoint_of_another_architecture_is_refused(run, sheep, tmp_path):
    train(run, '--max_iters=2')
    result = train(run, '--max_iters=4', '--init_from=resume', '--arch=qwen3', code=1)
    assert "out/step_00000002 has arch='gpt2'" in result.err
    assert result.err.count('\n') == 1


# -----------------------------------------------------------------------------
# full disks


def test_output_to_a_full_disk_does_not_end_the_run(sheep, tmp_path):
    line = [sys.executable, str(ROOT / 'train.py'), '--dataset=sheep', *TINY, '--max_iters=3']
    with open('/dev/full', 'w') as full:
        result = subprocess.run(
            line, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert result.returncode == 0
    assert result.stderr == b''
    assert checkpoint.checkpoints(tmp_path / 'out')[-1].name == 'step_00000003'


def test_a_plan_to_a_full_disk_is_an_error(sheep, tmp_path):
    line = [sys.executable, str(ROOT / 'train.py'), '--dataset=sheep', *TINY, '--plan']
    with open('/dev/full', 'w') as full:
        result = subprocess.run(
            line, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert result.returncode == 1
    assert b'No space left on device' in result.stderr


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_is_one_sentence_and_harms_no_checkpoint(sheep, tmp_path):
    flags = ['--dataset=sheep', *TINY, '--eval_interval=2', '--out_dir=o']
    out = tmp_path / 'o'
    assert command('train.py', *flags, '--max_iters=2', cwd=tmp_path).returncode == 0
    before = contents(out / 'step_00000002')

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # train_state.pt is larger

    flags += ['--max_iters=6', '--init_from=auto']
    result = command('train.py', *flags, cwd=tmp_path, preexec_fn=limit)
    assert result.returncode == 1
    assert result.stderr.count('\n') == 1
    assert re.search(r'\nstep +\d  NOT SAVED: o/step_00000004', result.stdout)
    assert 'o/step_00000006 could not be saved' in result.stderr
    assert 'What was saved before is intact' in result.stderr
    assert contents(out / 'step_00000002') == before
    assert names(path for path in out.iterdir() if path.is_dir()) == ['step_00000002']
    assert command('train.py', *flags, cwd=tmp_path).returncode == 0


# -----------------------------------------------------------------------------
# killed


def is_saving(out, since):
    """Whether a save began after a time and has not ended."""
    with contextlib.suppress(FileNotFoundError):  # it has ended now
        return any(path.stat().st_mtime > since for path in out.glob('.*.tmp'))
    return False


def wait_for_a_save(process, out):
    """Wait until a process saves, or has ended."""
    started = time.time()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if is_saving(out, started):
            return
        time.sleep(0.001)


def wait_for_a_while(process, log, chance):
    """Wait until a process has most likely begun to train; sometimes it is still starting."""
    before = log.read_bytes() if log.exists() else b''
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_bytes()) > len(before) and chance.random() < 0.9:
            break
        if not before and not log.exists():
            time.sleep(0.01)
        elif chance.random() < 0.001:
            break
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 1.5))


def damaged_files(out):
    """The files of a run's checkpoints that are not what was written."""
    damaged = []
    for path in checkpoint.checkpoints(out):
        for name, expected in checkpoint.read_meta(path)['files'].items():
            if checkpoint.checksum(path / name) != expected:
                damaged.append(path / name)
    return damaged


@pytest.mark.slow  # some minutes
def test_killed_fifty_times_it_resumes_to_the_same_weights(sheep, tmp_path):
    """SIGKILL at random instants, every fifth time in a save.

    In the end not one bit differs from the uninterrupted run.
    """
    flags = ['--dataset=sheep', *TINY, '--n_embd=256', '--dropout=0.1']
    flags += ['--gradient_accumulation_steps=2', '--max_iters=1500', '--eval_interval=5']
    flags += ['--log_interval=1', '--init_from=auto']
    line = [sys.executable, str(ROOT / 'train.py'), *flags, '--out_dir=killed']
    killed = tmp_path / 'killed'
    whole = tmp_path / 'whole'
    chance = random.Random(0)
    kills_in_a_save = 0
    for kill in range(50):
        started = time.time()
        process = subprocess.Popen(
            line, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if kill % 5 == 4:
            wait_for_a_save(process, killed)
        else:
            wait_for_a_while(process, killed / 'log.jsonl', chance)
        process.kill()
        process.wait()
        err = process.stderr.read().decode()
        process.stderr.close()
        assert process.returncode == -signal.SIGKILL, err
        assert err == ''
        if is_saving(killed, started):
            kills_in_a_save += 1
        assert not damaged_files(killed)
    reached = checkpoint.checkpoints(killed)[-1].name
    assert reached < 'step_00001500'
    assert kills_in_a_save >= 3

    for out in ('killed', 'whole'):
        result = command('train.py', *flags, f'--out_dir={out}', cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert not result.stderr
    print(f'\n{kills_in_a_save} of 50 kills in a save; at the last it was at {reached}')
    assert same(weights(whole, 1500), weights(killed, 1500))
    assert same(optimizer_state(whole, 1500), optimizer_state(killed, 1500))
    without_times = dict.fromkeys(('tokens_per_second', 'train_seconds', 'tflops', 'gib'))
    expected = [record | without_times for record in records(whole)]
    assert [record | without_times for record in records(killed)] == expected


DEMO = {'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'block_size': 128, 'vocab_size': 4096}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('shape', 'rows', 'length', 'steps'),
    [(DEMO, 8, 128, 300), ({}, 1, 256, 30)],
    ids=['demo', '124M'],
)
def test_the_guards_cost_at_most_one_percent_of_a_step(shape, rows, length, steps):
    """What it costs to look for steps to skip: operations on single numbers, and found_inf."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    model = model_module.GPT(model_module.GPTConfig(**shape))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), fused=True)
    x = torch.randint(0, 4096, (rows, length))
    n_skipped = streak = longest_streak = torch.zeros(())
    seconds = {True: [], False: []}  # per step, with and without the guards
    seconds_of_guards = []
    chance = random.Random(0)
    for _ in range(steps):
        is_guarded = chance.random() < 0.5
        begin = time.perf_counter()
        loss = model(x, x)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.found_inf = None
        if is_guarded:
            begin_of_guards = time.perf_counter()
            skip = 1 - (loss.detach().isfinite() & norm.isfinite()).float()
            n_skipped = n_skipped + skip
            streak = (streak + 1) * skip
            longest_streak = torch.maximum(longest_streak, streak)
            optimizer.found_inf = skip
            seconds_of_guards.append(time.perf_counter() - begin_of_guards)
        optimizer.step()
        optimizer.zero_grad()
        seconds[is_guarded].append(time.perf_counter() - begin)
    torch.set_num_threads(threads)
    on = statistics.median(seconds[True][1:])
    off = statistics.median(seconds[False][1:])
    guards = statistics.median(seconds_of_guards[1:])
    print(f'\n{1e3 * off:.1f} ms per step without guards, {1e3 * on:.1f} with')
    print(f'the guards alone: {1e6 * guards:.0f} us')
    assert guards <= 0.01 * off


def test_a_sample_of_a_step_is_logged_before_it_is_saved(run, sheep, tmp_path, monkeypatch):
    """Killed in between, a run would resume behind it, and the sample be missing in the log."""
    real = checkpoint.start_save
    logged = []

    def start_save(*args):
        real(*args)
        logged.append(list(losses(tmp_path / 'out', 'sample')))

    monkeypatch.setattr(checkpoint, 'start_save', start_save)
    train(run, '--max_iters=4', '--eval_interval=2', '--sample_interval=2')
    assert logged == [[2], [2, 4]]

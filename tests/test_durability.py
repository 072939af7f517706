"""What happens when: a kill, a full disk, a NaN, a signal, a damaged file. Nothing is lost, nothing is corrupted."""

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
from conftest import ROOT, TINY, command
from safetensors.torch import load
from test_train import losses, records, same, train

import checkpoint
import model as model_module


def weights(out, step):
    return load((out / f'step_{step:08d}' / 'model.safetensors').read_bytes())  # a map would follow later damage


def optimizer_state(out, step):
    return torch.load(out / f'step_{step:08d}' / 'train_state.pt', weights_only=True)['optimizer']


def spoil_gradients(monkeypatch, steps):
    """Put a NaN into the gradient of these steps, counted from 0."""
    real, calls = torch.nn.utils.clip_grad_norm_, iter(range(10**6))

    def clip(parameters, *args):
        parameters = list(parameters)
        if next(calls) in steps:
            parameters[3].grad.view(-1)[1] = math.nan
        return real(parameters, *args)

    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', clip)


def spoil_losses(monkeypatch, steps):
    """Make the loss of these steps infinite; its gradient stays finite."""
    real, calls = model_module.GPT.forward, iter(range(10**6))

    def forward(self, idx, targets=None):
        out = real(self, idx, targets)
        return out + math.inf if self.training and next(calls) in steps else out

    monkeypatch.setattr(model_module.GPT, 'forward', forward)


# -----------------------------------------------------------------------------
# bad steps


@pytest.mark.parametrize('spoil', [spoil_gradients, spoil_losses])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_bad_step_changes_nothing_and_is_counted(run, sheep, tmp_path, monkeypatch, spoil, dtype):
    spoil(monkeypatch, {2, 3, 5})
    flags = ['--max_iters=8', '--eval_interval=1', '--log_interval=1', '--keep_last=99', f'--dtype={dtype}']
    result = train(run, *flags, '--grad_clip=0.5')
    out = tmp_path / 'out'
    for before, skipped in zip(range(1, 8), (False, True, True, False, True, False, False), strict=True):
        assert same(weights(out, before), weights(out, before + 1)) == skipped
        assert same(optimizer_state(out, before), optimizer_state(out, before + 1)) == skipped
    assert losses(out, 'bad_steps') == {1: 0, 2: 0, 3: 1, 4: 2, 5: 2, 6: 3, 7: 3, 8: 3}
    assert 'step      3  1 skipped: the loss or the gradient was not finite' in result.out
    key = 'loss' if spoil is spoil_losses else 'grad_norm'
    assert [losses(out, key)[step] is None for step in (2, 3, 4, 5, 6)] == [False, True, True, False, True]
    assert 'NaN' not in (out / 'log.jsonl').read_text() and 'Infinity' not in (out / 'log.jsonl').read_text()


def test_a_float16_overflow_lowers_the_scale_until_it_fits(run, sheep, tmp_path, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda *a, **k: real(*a, **k, init_scale=2.0**24))
    train(run, '--max_iters=20', '--dtype=float16', '--log_interval=1')
    bad = losses(tmp_path / 'out', 'bad_steps')
    scaler = torch.load(tmp_path / 'out' / 'step_00000020' / 'train_state.pt', weights_only=True)['scaler']
    assert 0 < bad[20] < 20 and scaler['scale'] == 2.0 ** (24 - bad[20])
    assert losses(tmp_path / 'out')[20] < losses(tmp_path / 'out')[0]


@pytest.mark.parametrize('log_interval', [1, 100])
def test_too_many_bad_steps_in_a_row_end_the_run(run, sheep, tmp_path, monkeypatch, log_interval):
    spoil_gradients(monkeypatch, {1, 2, 4, *range(6, 11)})  # over when it is next looked at, in step 12
    flags = ['--max_iters=30', '--eval_interval=6', '--max_bad_steps=5', f'--log_interval={log_interval}']
    result = train(run, *flags, code=1)
    assert 'in a row' in result.err and 'try a lower learning_rate' in result.err and result.err.count('\n') == 1
    assert [path.name for path in checkpoint.checkpoints(tmp_path / 'out')] == ['step_00000006']


def test_a_run_that_diverges_ends_and_nothing_of_it_is_saved(run, sheep, tmp_path):
    flags = ['--max_iters=90', '--learning_rate=1e15', '--grad_clip=0.0', '--eval_interval=40']
    result = train(run, *flags, code=1)
    assert 'in a row' in result.err and result.err.count('\n') == 1
    assert not checkpoint.checkpoints(tmp_path / 'out')
    again = train(run, *flags, '--eval_interval=1', out='again', code=1)
    assert 'validation loss is' in again.err and 'nothing is saved' in again.err
    for path in checkpoint.checkpoints(tmp_path / 'again'):
        assert all(tensor.isfinite().all() for tensor in load((path / 'model.safetensors').read_bytes()).values())


def test_a_count_of_bad_steps_in_a_row_goes_on_over_a_resume(run, sheep, tmp_path, monkeypatch):
    spoil_gradients(monkeypatch, range(2, 99))
    train(run, '--max_iters=5', '--max_bad_steps=5')
    resumed = train(run, '--max_iters=7', '--max_bad_steps=5', '--init_from=resume', code=1)
    assert '5 times in a row, until step 7' in resumed.err


# -----------------------------------------------------------------------------
# best, patience, light copies


def fake_losses(monkeypatch, values):
    """Make the validation losses these, whatever the weights."""
    real, values = model_module.GPT.forward, iter(values)

    def forward(self, idx, targets=None):
        return real(self, idx, targets) if self.training else torch.tensor(next(values))

    monkeypatch.setattr(model_module.GPT, 'forward', forward)


def test_patience_ends_the_run_and_counts_on_over_a_resume(run, sheep, tmp_path, monkeypatch):
    flags = ['--eval_interval=1', '--early_stopping_patience=3', '--batch_size=100']
    fake_losses(monkeypatch, [5.0, 3.0, 4.0, 2.0, 3.0, 3.0])
    train(run, *flags, '--max_iters=5')
    assert list(losses(tmp_path / 'out')) == [0, 1, 2, 3, 4, 5]
    fake_losses(monkeypatch, [2.5, 9.0])
    result = train(run, *flags, '--max_iters=50', '--init_from=resume')
    assert list(losses(tmp_path / 'out')) == [0, 1, 2, 3, 4, 5, 6]
    assert 'Stopped early: no better for 3 evaluations' in result.out and '2.0000, at step 3' in result.out
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path / 'out')] == ['3', '5', '6']
    again = train(run, *flags, '--max_iters=50', '--init_from=resume')
    assert 'Stopped early' in again.out and list(losses(tmp_path / 'out')) == [0, 1, 2, 3, 4, 5, 6]


def test_the_best_is_the_lowest_logged_loss_over_resumes_too(run, sheep, tmp_path, monkeypatch):
    fake_losses(monkeypatch, [5.0, 4.0, 2.0, 3.0])
    train(run, '--eval_interval=1', '--max_iters=3', '--batch_size=100', '--keep_last=1')
    fake_losses(monkeypatch, [2.5, 2.1])
    result = train(run, '--eval_interval=1', '--max_iters=5', '--batch_size=100', '--keep_last=1', '--init_from=resume')
    logged = losses(tmp_path / 'out')
    assert 'Best validation loss 2.0000, at step 2' in result.out and min(logged, key=logged.get) == 2
    assert checkpoint.find(tmp_path / 'out', 'best').name == 'step_00000002'
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path / 'out')] == ['2', '5']


def test_light_copies_hold_the_weights_only_and_stay(run, sheep, tmp_path):
    train(run, '--max_iters=6', '--eval_interval=3', '--save_weights_interval=2', '--keep_last=1')
    light = sorted((tmp_path / 'out').glob('weights_*'))
    assert [path.name for path in light] == [f'weights_0000000{step}' for step in (2, 4, 6)]
    assert not any((path / 'train_state.pt').exists() for path in light)
    assert same(load((light[-1] / 'model.safetensors').read_bytes()), weights(tmp_path / 'out', 6))
    result = run('sample.py', f'--init_from={light[0]}', '--max_new_tokens=3')
    assert result.code == 0, result.err
    train(run, '--max_iters=6', '--eval_interval=3', out='without')
    assert same(weights(tmp_path / 'without', 6), weights(tmp_path / 'out', 6))


# -----------------------------------------------------------------------------
# signals and pipes


@pytest.mark.parametrize('ignored', [False, True])
def test_a_closed_terminal_saves_and_nohup_goes_on(run, sheep, tmp_path, monkeypatch, ignored):
    adamw, count = torch.optim.AdamW.step, []

    def step(*args, **kwargs):
        count.append(1)
        if len(count) == 3:
            signal.raise_signal(signal.SIGHUP)
        return adamw(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        train(run, '--max_iters=6', code=0 if ignored else 128 + signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert checkpoint.checkpoints(tmp_path / 'out')[-1].name == f'step_0000000{6 if ignored else 3}'


def test_a_run_whose_output_nobody_reads_any_more_is_saved(sheep, tmp_path):
    flags = ['--dataset=sheep', *TINY, '--log_interval=1', '--max_iters=100000', '--eval_interval=100000']
    process = subprocess.Popen(
        [sys.executable, str(ROOT / 'train.py'), *flags], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for line in process.stdout:
        if b'loss' in line and b'validation' not in line:
            break
    process.stdout.close()  # what `| head` does
    assert process.wait(timeout=60) == 143 and process.stderr.read() == b''
    process.stderr.close()
    assert len(checkpoint.checkpoints(tmp_path / 'out')) == 1


# -----------------------------------------------------------------------------
# damaged files and full disks


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


@pytest.mark.parametrize('file', ['train_state.pt', 'meta.json', 'model.safetensors', 'config.json'])
@pytest.mark.parametrize('damage', [truncate, flip_a_bit, empty, replace, delete])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(run, sheep, tmp_path, file, damage):
    if (file, damage) == ('meta.json', flip_a_bit):
        pytest.skip('meta.json holds the checksums; where it still is JSON a flipped bit in it is not noticed')
    flags = ['--eval_interval=2', '--dropout=0.1', '--keep_last=3']
    train(run, *flags, '--max_iters=6')
    expected = weights(tmp_path / 'out', 6)
    for step in (4, 6):
        damage(tmp_path / 'out' / f'step_0000000{step}' / file)
    if file != 'train_state.pt':  # which sampling does not need
        sampled = run('sample.py', '--max_new_tokens=3')
        assert sampled.code == 0 and 'step_00000006 is damaged: its' in sampled.err
    again = train(run, *flags, '--max_iters=6', '--init_from=auto')
    for step in (4, 6):
        assert f'The checkpoint out/step_0000000{step} is damaged: its {file}' in again.err
    assert again.err.count('\n') == 2 and 'out/step_00000002, step 2' in again.out
    assert same(weights(tmp_path / 'out', 6), expected) and list(losses(tmp_path / 'out')) == [0, 2, 4, 6]
    assert len(checkpoint.checkpoints(tmp_path / 'out')) == 3
    assert len(list((tmp_path / 'out').glob('damaged_step_*'))) == 2, 'the last word on them is the user’s'


@pytest.mark.parametrize('how', ['--init_from=auto', '--init_from=resume'])
def test_a_run_with_no_usable_checkpoint_is_not_started_anew(run, sheep, tmp_path, how):
    train(run, '--max_iters=2')
    truncate(tmp_path / 'out' / 'step_00000002' / 'model.safetensors')
    result = train(run, '--max_iters=4', how, code=1)
    assert 'No checkpoint in out can be used.' in result.err
    assert list(losses(tmp_path / 'out')) == [0, 2], 'the log is as it was'


def test_a_damaged_checkpoint_after_the_last_good_one_is_not_kept_in_its_place(run, sheep, tmp_path):
    train(run, '--max_iters=6', '--eval_interval=3', '--keep_last=2')
    truncate(tmp_path / 'out' / 'step_00000006' / 'train_state.pt')
    train(run, '--max_iters=4', '--eval_interval=1', '--keep_last=1', '--init_from=resume')
    assert checkpoint.find(tmp_path / 'out', 'last', training=True).name == 'step_00000004'
    assert not (tmp_path / 'out' / 'step_00000006').exists()


@pytest.mark.parametrize(
    'change',
    [
        {'config': None},
        {'config': {}},
        {'files': {}},
        {'files': {'/etc/passwd': [1, 'x'], 'config.json': [], 'model.safetensors': [], 'train_state.pt': []}},
        {'val_loss': math.nan},
        {'val_loss': 'x'},
        {'files': 5},
    ],
    ids=str,
)
def test_a_checkpoint_whose_meta_makes_no_sense_is_passed_over(run, sheep, tmp_path, change):
    train(run, '--max_iters=4', '--eval_interval=2')
    path = tmp_path / 'out' / 'step_00000004' / 'meta.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    again = train(run, '--max_iters=4', '--init_from=resume')
    assert 'out/step_00000004 is damaged: its meta.json' in again.err and 'out/step_00000002, step 2' in again.out


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_taken_for_damaged(run, sheep, tmp_path, monkeypatch):
    def checksum(path):
        raise OSError(5, 'Input/output error')

    train(run, '--max_iters=4', '--eval_interval=2')
    monkeypatch.setattr(checkpoint, 'checksum', checksum)
    assert 'Input/output error' in train(run, '--max_iters=6', '--init_from=auto', code=1).err
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path / 'out')] == ['2', '4']


def test_killed_while_a_checkpoint_is_replaced_by_its_like_the_old_one_is_found(run, sheep, tmp_path, monkeypatch):
    train(run, '--max_iters=4', '--eval_interval=2')
    expected = weights(tmp_path / 'out', 4)
    path = tmp_path / 'out' / 'step_00000004'
    path.rename(tmp_path / 'out' / '.step_00000004.old')  # as far as it had come
    shutil.copytree(tmp_path / 'out' / '.step_00000004.old', tmp_path / 'out' / '.step_00000004.tmp')
    assert 'out/step_00000004, step 4' in train(run, '--max_iters=6', '--init_from=auto').out
    shutil.copytree(tmp_path / 'out' / 'step_00000004', tmp_path / 'out' / '.step_00000004.old')
    train(run, '--max_iters=7', '--init_from=auto', '--keep_last=9')
    assert same(weights(tmp_path / 'out', 4), expected) and not list((tmp_path / 'out').glob('.step*'))


def test_two_runs_do_not_write_to_one_folder(sheep, tmp_path):
    flags = ['--dataset=sheep', *TINY, '--max_iters=100000', '--eval_interval=100000', '--log_interval=1']
    process = subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *flags], cwd=tmp_path, stdout=subprocess.PIPE)
    for line in process.stdout:
        if b'loss' in line:
            break
    second = command('train.py', *flags, '--init_from=auto', cwd=tmp_path)
    process.terminate()
    process.communicate()
    assert process.returncode == 143
    assert second.returncode == 1 and second.stderr.startswith('Another run is writing to out')


def test_light_copies_are_not_overwritten_by_another_run(run, sheep, tmp_path):
    train(run, '--max_iters=4', '--save_weights_interval=2')
    for path in checkpoint.checkpoints(tmp_path / 'out'):
        shutil.rmtree(path)
    for how in ('scratch', 'auto'):
        assert 'out holds a run' in train(run, '--max_iters=4', f'--init_from={how}', code=1).err


def test_what_is_evaluated_first_after_a_resume_is_saved_and_logged_once(run, sheep, tmp_path, monkeypatch):
    fake_losses(monkeypatch, [5.0, 4.0])
    train(run, '--eval_interval=4', '--max_iters=4', '--batch_size=100')
    fake_losses(monkeypatch, [1.0, 3.0])
    path = tmp_path / 'out' / 'step_00000004'
    state = torch.load(path / 'train_state.pt', weights_only=True)
    state['state']['evaluated'] = 0  # as if a signal had come just before that evaluation
    torch.save(state, path / 'train_state.pt')
    meta = json.loads((path / 'meta.json').read_text())
    meta['files']['train_state.pt'] = checkpoint.checksum(path / 'train_state.pt')
    (path / 'meta.json').write_text(json.dumps(meta | {'val_loss': None}))
    train(run, '--eval_interval=4', '--max_iters=8', '--batch_size=100', '--keep_last=1', '--init_from=resume')
    assert [record['step'] for record in records(tmp_path / 'out') if 'val_loss' in record] == [0, 4, 8]
    assert checkpoint.find(tmp_path / 'out', 'best').name == 'step_00000004'


def test_output_to_a_full_disk_does_not_end_the_run(sheep, tmp_path):
    with open('/dev/full', 'w') as full:
        line = [sys.executable, str(ROOT / 'train.py'), '--dataset=sheep', *TINY, '--max_iters=3']
        result = subprocess.run(line, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert result.returncode == 0 and result.stderr == b''
    assert checkpoint.checkpoints(tmp_path / 'out')[-1].name == 'step_00000003'


class Bomb:
    def __reduce__(self):
        return os.mkdir, ('exploded',)


@pytest.mark.parametrize('honest', [True, False])
def test_a_pickle_bomb_is_not_executed(run, sheep, tmp_path, honest):
    train(run, '--max_iters=2')
    path = tmp_path / 'out' / 'step_00000002'
    (path / 'train_state.pt').write_bytes(pickle.dumps(Bomb()))
    if not honest:  # with a checksum to match
        meta = json.loads((path / 'meta.json').read_text())
        meta['files']['train_state.pt'] = checkpoint.checksum(path / 'train_state.pt')
        (path / 'meta.json').write_text(json.dumps(meta))
    result = train(run, '--max_iters=4', '--init_from=resume', code=1)
    assert 'The checkpoint out/step_00000002 is damaged: its train_state.pt' in result.err
    assert not (tmp_path / 'exploded').exists()


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_is_intact(sheep, tmp_path):
    flags = ['--dataset=sheep', *TINY, '--eval_interval=2', '--out_dir=o']
    assert command('train.py', *flags, '--max_iters=2', cwd=tmp_path).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / 'o' / 'step_00000002').iterdir()}

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # train_state.pt is larger

    result = command('train.py', *flags, '--max_iters=6', '--init_from=auto', cwd=tmp_path, preexec_fn=limit)
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert re.search(r'\n +4 .*, NOT SAVED: o/step_00000004', result.stdout)
    assert 'o/step_00000006 could not be saved' in result.stderr and 'What was saved before is intact' in result.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / 'o' / 'step_00000002').iterdir()} == before
    assert sorted(path.name for path in (tmp_path / 'o').iterdir() if path.is_dir()) == ['step_00000002']
    assert command('train.py', *flags, '--max_iters=6', '--init_from=auto', cwd=tmp_path).returncode == 0


def test_a_log_cut_at_any_byte_goes_on(run, sheep, tmp_path):
    flags = ['--max_iters=4', '--log_interval=1', '--eval_interval=2']
    train(run, *flags)
    shutil.rmtree(tmp_path / 'out' / 'step_00000004')
    shutil.copytree(tmp_path / 'out', tmp_path / 'killed')
    whole = (tmp_path / 'out' / 'log.jsonl').read_bytes()
    after_save = [line for line in whole.splitlines(True) if json.loads(line)['step'] > 2]
    first = len(whole) - sum(map(len, after_save))  # the checkpoint of step 2 was saved when this much was written
    for cut in random.Random(0).sample(range(first, len(whole)), 6):
        for tail in (b'', b'\n\n{}\n5\n\xff\n{"step": 2'):
            shutil.rmtree(tmp_path / 'out')
            shutil.copytree(tmp_path / 'killed', tmp_path / 'out')
            (tmp_path / 'out' / 'log.jsonl').write_bytes(whole[:cut] + tail)
            train(run, *flags, '--init_from=resume')
            assert [(r['step'], 'loss' in r) for r in records(tmp_path / 'out')] == [
                (r['step'], 'loss' in r) for r in map(json.loads, whole.splitlines())
            ]


def test_a_checkpoint_of_another_architecture_is_refused(run, sheep, tmp_path):
    train(run, '--max_iters=2')
    result = train(run, '--max_iters=4', '--init_from=resume', '--arch=qwen3', code=1)
    assert "out/step_00000002 has arch='gpt2'" in result.err and result.err.count('\n') == 1


# -----------------------------------------------------------------------------
# killed


def saving(out, since):
    """Whether a save began after a time and has not ended."""
    with contextlib.suppress(FileNotFoundError):  # it has ended now
        return any(path.stat().st_mtime > since for path in out.glob('.*.tmp'))
    return False


@pytest.mark.slow  # some minutes
def test_killed_fifty_times_it_resumes_to_the_same_weights(sheep, tmp_path):
    """SIGKILL at random instants, saves included; in the end not one bit differs from the uninterrupted run."""
    chance, kills, during_save, lost = random.Random(0), 0, 0, 0
    flags = ['--dataset=sheep', *TINY, '--n_embd=256', '--dropout=0.1', '--gradient_accumulation_steps=2']
    flags += ['--max_iters=1500', '--eval_interval=5', '--log_interval=1', '--init_from=auto']
    log = tmp_path / 'killed' / 'log.jsonl'
    while kills < 50:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / 'train.py'), *flags, '--out_dir=killed'],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        before = log.read_bytes() if log.exists() else b''
        began, started, aimed = time.monotonic(), time.time(), kills % 5 == 4  # at a save
        while time.monotonic() < began + 60 and process.poll() is None:
            if aimed:
                if saving(tmp_path / 'killed', started):
                    break
                time.sleep(0.001)
                continue
            if log.exists() and len(log.read_bytes()) > len(before) and chance.random() < 0.9:
                break  # most are killed in training, some while starting
            if not before and not log.exists():
                time.sleep(0.01)
            elif chance.random() < 0.001:
                break
            time.sleep(0.005)
        time.sleep(0 if aimed else chance.uniform(0, 1.5))
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()
        assert process.stderr.read() == b''
        process.stderr.close()
        kills += 1
        during_save += saving(tmp_path / 'killed', started)
        for path in checkpoint.checkpoints(tmp_path / 'killed'):
            for name, expected in checkpoint.read_meta(path)['files'].items():
                lost += checkpoint.checksum(path / name) != expected
    reached = checkpoint.checkpoints(tmp_path / 'killed')[-1].name
    for out in ('killed', 'whole'):
        result = command('train.py', *flags, f'--out_dir={out}', cwd=tmp_path)
        assert result.returncode == 0 and not result.stderr, result.stderr
    print(f'\n{kills} kills, {during_save} during a save, at {reached} when the last came')
    assert lost == 0 and during_save >= 3 and reached < 'step_00001500'
    assert same(weights(tmp_path / 'whole', 1500), weights(tmp_path / 'killed', 1500))
    assert same(optimizer_state(tmp_path / 'whole', 1500), optimizer_state(tmp_path / 'killed', 1500))
    times = dict.fromkeys(('tokens_per_second', 'train_seconds', 'tflops', 'gib'))
    a, b = ([record | times for record in records(tmp_path / out)] for out in ('whole', 'killed'))
    assert a == b


@pytest.mark.slow
@pytest.mark.parametrize('size', ['demo', '124M'])
def test_the_guards_cost_at_most_one_percent_of_a_step(size):
    """What watching for bad steps adds: a few operations on single numbers, and found_inf for the optimizer."""
    shape = {'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'block_size': 128, 'vocab_size': 4096} if size == 'demo' else {}
    rows, length, steps = (8, 128, 300) if size == 'demo' else (1, 256, 30)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    model = model_module.GPT(model_module.GPTConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), fused=True)
    x, bad = torch.randint(0, 4096, (rows, length)), torch.zeros(3)
    seconds = {True: [], False: [], 'guards': []}
    chance = random.Random(0)
    for _ in range(steps):
        guarded, begin = chance.random() < 0.5, time.perf_counter()
        loss = model(x, x)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = time.perf_counter()
        if guarded:
            is_bad = 1 - (loss.detach().isfinite() & norm.isfinite()).float()
            bad = torch.stack((bad[0] + is_bad, (bad[1] + 1) * is_bad, torch.maximum(bad[2], (bad[1] + 1) * is_bad)))
        optimizer.found_inf = is_bad if guarded else None
        seconds['guards'] += [time.perf_counter() - before] if guarded else []
        optimizer.step()
        optimizer.zero_grad()
        seconds[guarded].append(time.perf_counter() - begin)
    torch.set_num_threads(threads)
    on, off, guards = (statistics.median(seconds[key][1:]) for key in (True, False, 'guards'))
    print(f'\n{size}: {1e3 * off:.1f} ms a step without, {1e3 * on:.1f} with; the guards alone {1e6 * guards:.0f} us')
    assert guards <= 0.01 * off

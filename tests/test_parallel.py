"""Several processes train what one would have trained. CPU and gloo; torchrun on this machine only."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, command
from safetensors.torch import load
from test_train import losses, records, same
from torch.cuda._utils import _get_device_index

import checkpoint
import parallel

FLAGS = ['--dataset=sheep', *TINY, '--batch_size=2', '--gradient_accumulation_steps=4', '--log_interval=5']
FLAGS += ['--eval_interval=25', '--learning_rate=1e-3', '--dropout=0.0']


def torchrun(processes, *args, cwd, launcher=('--standalone',), start=False):
    line = [sys.executable, '-m', 'torch.distributed.run', *launcher, f'--nproc_per_node={processes}']
    environment = os.environ | {'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}  # else restarts find old addresses
    process = subprocess.Popen(
        [*line, str(ROOT / 'train.py'), *args],
        cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    if start:
        return process
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(line, process.returncode, out, err)


def weights(out, step):
    return load((out / f'step_{step:08d}' / 'model.safetensors').read_bytes())


def assert_close(a, b, step):
    ours, theirs = weights(a, step), weights(b, step)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5
    assert losses(a, 'loss') == pytest.approx(losses(b, 'loss'), abs=1e-5)
    assert losses(a) == pytest.approx(losses(b), abs=1e-6)


@pytest.fixture
def alone(sheep, tmp_path):
    """50 steps in one process."""
    result = command('train.py', *FLAGS, '--max_iters=50', '--out_dir=alone', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return tmp_path / 'alone'


SLOW = pytest.mark.slow
CASES = [(2, []), (2, ['--fsdp']), *(pytest.param(*case, marks=SLOW) for case in [(1, []), (4, []), (4, ['--fsdp'])])]


@pytest.mark.parametrize(('processes', 'more'), CASES)
def test_many_processes_train_what_one_does(alone, tmp_path, processes, more):
    result = torchrun(processes, *FLAGS, '--max_iters=50', *more, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_close(alone, tmp_path / 'out', 50)
    assert f' x {processes} processes' in result.stdout and result.stdout.count('\n       50') == 2, 'two lines'
    rate, seconds = (records(tmp_path / 'out')[i] for i in (-2, -1))
    assert rate['tokens_per_second'] > 0.5 * 50 * 2 * 4 * 32 / seconds['train_seconds'], 'of all processes together'


def test_many_processes_share_the_work_of_muon_whole_or_sharded(sheep, tmp_path):
    flags = [*FLAGS, '--arch=qwen3', '--n_kv_head=1', '--optimizer=muon', '--weight_decay=0.1', '--log_interval=1']
    assert command('train.py', *flags, '--max_iters=20', '--out_dir=alone', cwd=tmp_path).returncode == 0
    for steps, more in ((10, []), (20, ['--fsdp'])):
        until = [f'--max_iters={steps}', '--lr_decay_iters=20', '--init_from=auto']
        result = torchrun(2, *flags, *more, *until, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    ours, theirs = weights(tmp_path / 'out', 20), weights(tmp_path / 'alone', 20)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5
    logged = losses(tmp_path / 'out', 'loss')
    assert list(logged) == list(range(1, 21)) and logged == pytest.approx(losses(tmp_path / 'alone', 'loss'), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('more', [[], ['--fsdp']])
def test_frozen_blocks_are_frozen_in_every_process(sheep, tmp_path, more):
    flags = [*FLAGS, '--freeze=1', '--max_iters=20']
    assert command('train.py', *flags, '--out_dir=alone', cwd=tmp_path).returncode == 0
    result = torchrun(2, *flags, *more, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_close(tmp_path / 'alone', tmp_path / 'out', 20)


def test_dropout_does_not_depend_on_the_number_of_processes(sheep, tmp_path):
    flags = [*FLAGS, '--dropout=0.2', '--max_iters=10', '--log_interval=1']
    assert command('train.py', *flags, '--out_dir=alone', cwd=tmp_path).returncode == 0
    assert torchrun(2, *flags, cwd=tmp_path).returncode == 0
    assert_close(tmp_path / 'alone', tmp_path / 'out', 10)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    for processes, steps, more in ((1, 20, []), (4, 30, []), (2, 40, ['--fsdp']), (1, 50, [])):
        flags = [*FLAGS, *more, f'--max_iters={steps}', '--lr_decay_iters=50', '--init_from=auto']
        result = torchrun(processes, *flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    ours, theirs = weights(alone, 50), weights(tmp_path / 'out', 50)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5
    logged = losses(tmp_path / 'out', 'loss')
    assert list(logged) == list(range(5, 55, 5)) and logged == pytest.approx(losses(alone, 'loss'), abs=1e-5)


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_once_and_resumes_to_the_same_weights(sheep, tmp_path):
    flags = [*FLAGS, '--max_iters=400', '--eval_interval=400', '--log_interval=1']
    process = torchrun(2, *flags, cwd=tmp_path, start=True)
    assert any(line.startswith('       20 ') for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and out.count(', saved') == 1, err
    assert len(checkpoint.checkpoints(tmp_path / 'out')) == 1
    assert torchrun(2, *flags, '--init_from=resume', cwd=tmp_path).returncode == 0
    assert torchrun(2, *flags, '--out_dir=whole', cwd=tmp_path).returncode == 0
    assert same(weights(tmp_path / 'out', 400), weights(tmp_path / 'whole', 400))


def children(process):
    """Process ids of a launcher's processes, by rank."""
    ranks = {}
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/environ', 'rb') as file:
                environment = dict(item.split(b'=', 1) for item in file.read().split(b'\0') if b'=' in item)
            with open(f'/proc/{pid}/stat') as file:
                parent = int(file.read().rpartition(')')[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == process.pid and b'RANK' in environment:
            ranks[int(environment[b'RANK'])] = int(pid)
    return ranks


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_weights_are_the_same(sheep, tmp_path):
    flags = [*FLAGS, '--max_iters=300', '--eval_interval=50', '--log_interval=1', '--init_from=auto']
    process = torchrun(2, *flags, cwd=tmp_path, launcher=('--standalone', '--max-restarts=3'), start=True)
    assert any(line.startswith('      120 ') for line in process.stdout)
    os.kill(children(process)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and 'resume  out/step_00000100' in out, err
    assert torchrun(2, *flags, '--out_dir=whole', cwd=tmp_path).returncode == 0
    assert same(weights(tmp_path / 'out', 300), weights(tmp_path / 'whole', 300))
    assert list(losses(tmp_path / 'out', 'loss')) == list(range(1, 301))


@pytest.mark.slow
def test_a_lost_process_ends_the_others_soon_and_with_one_sentence(sheep, tmp_path):
    process = torchrun(3, *FLAGS, '--gradient_accumulation_steps=3', '--max_iters=5000', cwd=tmp_path, start=True)
    assert any(line.startswith('       20 ') for line in process.stdout)
    os.kill(children(process)[1], signal.SIGKILL)
    begin = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - begin < 20
    assert 'train.py", line' not in err, 'no traceback of ours'
    assert err.count('Another process has ended') == 1


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--gradient_accumulation_steps=3'], 'cannot be divided over 2 processes: use 2 or 4.'),
        (['--gradient_accumulation_steps=1'], 'cannot be divided over 2 processes: use 2.'),
        (['--backend=nccl'], "backend='nccl' needs CUDA, and the device is cpu: use --backend=gloo."),
        (['--fsdp', '--dtype=float16'], 'fsdp=True is for torchrun, and for float32 or bfloat16.'),
        (['uneven.py'], 'must be started alike: learning_rate is 0.5 on rank 0 and 1.5 on rank 1.'),
    ],
)
def test_bad_input_is_said_once(sheep, tmp_path, args, message):
    (tmp_path / 'uneven.py').write_text('import os\nlearning_rate = 0.5 + int(os.environ["RANK"])\n')
    result = torchrun(2, *FLAGS, *args, '--max_iters=1', cwd=tmp_path)
    assert result.returncode != 0 and result.stderr.count(message) == 1, result.stderr
    assert 'train.py", line' not in result.stderr and not (tmp_path / 'out').exists()


def test_one_process_takes_the_gpu_it_is_given(monkeypatch):
    given = []
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: given.append(_get_device_index(device)))
    assert [parallel.join(device, None, 1) for device in ('cpu', 'cuda', 'cuda:1')] == ['cpu', 'cuda', 'cuda:1']
    assert given == [1], 'torch takes no name without a number'


def test_sharding_needs_torchrun(sheep, tmp_path):
    result = command('train.py', *FLAGS, '--fsdp', cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.startswith('fsdp=True is for torchrun')


@pytest.mark.slow
def test_two_launchers_meet_and_go_on_after_one_was_lost(sheep, tmp_path):
    """Two "machines" of two processes each, meeting on 127.0.0.1."""
    flags = [*FLAGS, '--max_iters=300', '--eval_interval=50', '--log_interval=1', '--init_from=auto']
    port = 20000 + os.getpid() % 20000
    meet = ['--nnodes=2', '--max-restarts=3', '--rdzv-backend=c10d', f'--rdzv-endpoint=127.0.0.1:{port}']
    nodes = [torchrun(2, *flags, cwd=tmp_path, launcher=meet, start=True) for _ in range(2)]
    outputs = []
    try:
        deadline = time.monotonic() + 200
        while not list((tmp_path / 'out').glob('step_00000050')) and time.monotonic() < deadline:
            time.sleep(0.1)
        victim = children(nodes[1])
        os.kill(next(iter(victim.values())), signal.SIGKILL)
        outputs = [node.communicate(timeout=200) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert list(losses(tmp_path / 'out', 'loss')) == list(range(1, 301))
    assert 'resume  out/step_' in outputs[0][0] + outputs[1][0]
    assert torch.isfinite(torch.tensor(losses(tmp_path / 'out')[300]))

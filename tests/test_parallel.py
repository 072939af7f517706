"""Several processes train what one would have trained. CPU and gloo, on this machine."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, command, in_ranks, losses, records, same, weights
from torch.cuda._utils import _get_device_index

import checkpoint
import parallel

FLAGS = ['--dataset=sheep', *TINY, '--batch_size=2', '--gradient_accumulation_steps=4']
FLAGS += ['--dtype=float32']  # also where 16 bits are faster
FLAGS += ['--log_interval=5', '--eval_interval=25', '--learning_rate=1e-3', '--dropout=0.0']


def start_torchrun(processes, *args, cwd, launcher=('--standalone',)):
    """Start train.py in several processes."""
    line = [sys.executable, '-m', 'torch.distributed.run', *launcher]
    line += [f'--nproc_per_node={processes}', str(ROOT / 'train.py'), *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=cwd, text=True, stdout=pipe, stderr=pipe)


def torchrun(processes, *args, cwd):
    """Run train.py in several processes to its end, started by torchrun."""
    process = start_torchrun(processes, *args, cwd=cwd)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def assert_close(a, b):
    """Two dicts of weights are the same but for rounding."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor - b[name]).abs().max() < 1e-5, name


def assert_same_run(a, b, step):
    """Two runs are the same but for rounding: the weights after a step, and all that was logged."""
    assert_close(weights(a, step), weights(b, step))
    assert losses(a, 'loss') == pytest.approx(losses(b, 'loss'), abs=1e-5)
    assert losses(a) == pytest.approx(losses(b), abs=1e-6)


def train_alone(run, tmp_path, *flags):
    """Train in one process. Returns the folder of the run."""
    result = run('train.py', *FLAGS, '--out_dir=alone', *flags)
    assert result.code == 0, result.err
    return tmp_path / 'alone'


# -----------------------------------------------------------------------------
# the same training


@pytest.mark.parametrize(
    ('processes', 'more'),
    [
        (2, []),
        (2, ['--fsdp']),
        pytest.param(1, [], marks=pytest.mark.slow),
        pytest.param(4, [], marks=pytest.mark.slow),
        pytest.param(4, ['--fsdp'], marks=pytest.mark.slow),
        pytest.param(4, ['--fsdp', '--fsdp_replicas=2'], marks=pytest.mark.slow),
    ],
)
def test_many_processes_train_what_one_does(run, sheep, tmp_path, processes, more):
    alone = train_alone(run, tmp_path, '--max_iters=50')
    result = in_ranks(processes, 'train.py', *FLAGS, '--max_iters=50', *more, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(alone, tmp_path / 'out', 50)
    assert f' x {processes} processes' in result.stdout
    assert result.stdout.count('\n       50') == 2, 'two lines: the step and its evaluation'
    rate, evaluation = records(tmp_path / 'out')[-2:]
    tokens = 50 * 2 * 4 * 32
    of_all_processes = 0.5 * tokens / evaluation['train_seconds']
    assert rate['tokens_per_second'] > of_all_processes


def test_many_processes_share_the_work_of_muon_whole_or_sharded(run, sheep, tmp_path):
    flags = [*FLAGS, '--arch=qwen3', '--n_kv_head=1', '--optimizer=muon', '--weight_decay=0.1']
    flags += ['--log_interval=1', '--average_frac=0.3']
    alone = train_alone(run, tmp_path, *flags, '--max_iters=20')
    for steps, more in ((10, []), (20, ['--fsdp'])):
        until = [f'--max_iters={steps}', '--lr_decay_iters=20', '--init_from=auto']
        result = in_ranks(2, 'train.py', *flags, *more, *until, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert_close(weights(tmp_path / 'out', 20), weights(alone, 20))
    logged = losses(tmp_path / 'out', 'loss')
    assert list(logged) == list(range(1, 21))
    assert logged == pytest.approx(losses(alone, 'loss'), abs=1e-5)


def test_sharded_averages_are_evaluated_and_then_gone(run, sheep, tmp_path):
    """Also where no save puts away what the evaluation has gathered. So large a rate only harms."""
    flags = [*FLAGS, '--max_iters=4', '--eval_interval=1', '--log_interval=1']
    flags += ['--average_frac=0.5', '--always_save_checkpoint=False', '--learning_rate=0.3']
    alone = train_alone(run, tmp_path, *flags)
    result = in_ranks(2, 'train.py', *flags, '--fsdp', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / 'out', 'loss') == pytest.approx(losses(alone, 'loss'), rel=1e-3)
    assert losses(tmp_path / 'out') == pytest.approx(losses(alone), rel=1e-3)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / 'out')] == ['step_00000004']


@pytest.mark.slow
def test_samples_are_the_same_whole_or_sharded(sheep, tmp_path):
    samples = []
    for more in ([], ['--fsdp']):
        flags = [*FLAGS, '--max_iters=30', '--sample_interval=30', f'--out_dir=out{len(more)}']
        result = torchrun(2, *flags, *more, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        logged = records(tmp_path / f'out{len(more)}')
        samples.append([record['sample'] for record in logged if 'sample' in record])
    assert samples[0] == samples[1]
    assert len(samples[0]) == 1


@pytest.mark.slow
@pytest.mark.parametrize('more', [[], ['--fsdp']])
def test_frozen_blocks_are_frozen_in_every_process(sheep, tmp_path, more):
    flags = [*FLAGS, '--freeze=1', '--max_iters=20']
    assert command('train.py', *flags, '--out_dir=alone', cwd=tmp_path).returncode == 0
    result = torchrun(2, *flags, *more, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / 'alone', tmp_path / 'out', 20)


def test_dropout_does_not_depend_on_the_number_of_processes(run, sheep, tmp_path):
    flags = [*FLAGS, '--dropout=0.2', '--max_iters=10', '--log_interval=1']
    alone = train_alone(run, tmp_path, *flags)
    assert in_ranks(2, 'train.py', *flags, cwd=tmp_path).returncode == 0
    assert_same_run(alone, tmp_path / 'out', 10)


# -----------------------------------------------------------------------------
# resuming, signals, lost processes


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(run, sheep, tmp_path):
    alone = train_alone(run, tmp_path, '--max_iters=50')
    for processes, steps, more in ((1, 20, []), (4, 30, []), (2, 40, ['--fsdp']), (1, 50, [])):
        flags = [*FLAGS, *more, f'--max_iters={steps}', '--lr_decay_iters=50', '--init_from=auto']
        result = torchrun(processes, *flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert_close(weights(alone, 50), weights(tmp_path / 'out', 50))
    logged = losses(tmp_path / 'out', 'loss')
    assert list(logged) == list(range(5, 55, 5))
    assert logged == pytest.approx(losses(alone, 'loss'), abs=1e-5)


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_once_and_resumes(sheep, tmp_path):
    flags = [*FLAGS, '--max_iters=400', '--eval_interval=400', '--log_interval=1']
    process = start_torchrun(2, *flags, cwd=tmp_path)
    assert any(line.startswith('       20 ') for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert out.count(', saved') == 1, err
    assert len(checkpoint.checkpoints(tmp_path / 'out')) == 1
    assert torchrun(2, *flags, '--init_from=resume', cwd=tmp_path).returncode == 0
    assert torchrun(2, *flags, '--out_dir=whole', cwd=tmp_path).returncode == 0
    assert same(weights(tmp_path / 'out', 400), weights(tmp_path / 'whole', 400))


def read_environment(pid):
    """The environment variables of a process, as bytes."""
    with open(f'/proc/{pid}/environ', 'rb') as file:
        items = file.read().split(b'\0')
    return dict(item.split(b'=', 1) for item in items if b'=' in item)


def children(process):
    """{rank: process id} of what a launcher has started."""
    ranks = {}
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            environment = read_environment(pid)
            with open(f'/proc/{pid}/stat') as file:
                parent = int(file.read().rpartition(')')[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == process.pid and b'RANK' in environment:
            ranks[int(environment[b'RANK'])] = int(pid)
    return ranks


@pytest.mark.slow
def test_a_killed_process_restarts_and_the_weights_are_the_same(sheep, tmp_path):
    flags = [*FLAGS, '--max_iters=300', '--eval_interval=50', '--log_interval=1']
    flags += ['--init_from=auto']
    launcher = ('--standalone', '--max-restarts=3')
    process = start_torchrun(2, *flags, cwd=tmp_path, launcher=launcher)
    assert any(line.startswith('      120 ') for line in process.stdout)
    os.kill(children(process)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert 'resume  out/step_00000100' in out
    assert torchrun(2, *flags, '--out_dir=whole', cwd=tmp_path).returncode == 0
    assert same(weights(tmp_path / 'out', 300), weights(tmp_path / 'whole', 300))
    assert list(losses(tmp_path / 'out', 'loss')) == list(range(1, 301))


@pytest.mark.slow
def test_a_lost_process_ends_the_others_with_one_sentence(sheep, tmp_path):
    flags = [*FLAGS, '--gradient_accumulation_steps=3', '--max_iters=5000']
    process = start_torchrun(3, *flags, cwd=tmp_path)
    assert any(line.startswith('       20 ') for line in process.stdout)
    os.kill(children(process)[1], signal.SIGKILL)
    begin = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - begin < 20, 'soon'
    assert 'train.py", line' not in err, 'no traceback of ours'
    assert err.count('Another process has ended') == 1


@pytest.mark.slow
def test_two_launchers_connect_and_resume_after_one_was_lost(sheep, tmp_path, monkeypatch):
    """Two "machines" of two processes each, which connect on 127.0.0.1."""
    monkeypatch.setenv('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')  # as in config/slurm.sh
    flags = [*FLAGS, '--max_iters=300', '--eval_interval=50', '--log_interval=1']
    flags += ['--init_from=auto']
    port = 20000 + os.getpid() % 20000
    launcher = ['--nnodes=2', '--max-restarts=3']
    launcher += ['--rdzv-backend=c10d', f'--rdzv-endpoint=127.0.0.1:{port}']
    nodes = [start_torchrun(2, *flags, cwd=tmp_path, launcher=launcher) for _ in range(2)]
    outputs = []
    try:
        deadline = time.monotonic() + 200
        first_checkpoint = tmp_path / 'out' / 'step_00000050'
        while not first_checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        victims = children(nodes[1])
        os.kill(next(iter(victims.values())), signal.SIGKILL)
        outputs = [node.communicate(timeout=200) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert list(losses(tmp_path / 'out', 'loss')) == list(range(1, 301))
    assert 'resume  out/step_' in outputs[0][0] + outputs[1][0]
    assert torch.isfinite(torch.tensor(losses(tmp_path / 'out')[300]))


# -----------------------------------------------------------------------------
# what cannot be


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (
            ['--gradient_accumulation_steps=3'],
            'gradient_accumulation_steps=3 cannot be divided over 2 processes: use 2 or 4.',
        ),
        pytest.param(
            ['--gradient_accumulation_steps=1'], 'cannot be divided over 2 processes: use 2.',
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ['--backend=nccl'],
            "backend='nccl' needs CUDA, and the device is cpu: use --backend=gloo.",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ['--fsdp', '--dtype=float16'],
            'fsdp=True is for float32 and bfloat16, not for float16.',
            marks=pytest.mark.slow,
        ),
        (
            ['uneven.py'],
            'All processes need the same options: learning_rate is 0.5 on rank 0 '
            'and 1.5 on rank 1.',
        ),
    ],
)
def test_bad_input_is_printed_once(sheep, tmp_path, args, message):
    uneven = 'import os\nlearning_rate = 0.5 + int(os.environ["RANK"])\n'
    (tmp_path / 'uneven.py').write_text(uneven)
    result = torchrun(2, *FLAGS, *args, '--max_iters=1', cwd=tmp_path)
    assert result.returncode != 0
    assert result.stderr.count(message) == 1, result.stderr
    assert 'train.py", line' not in result.stderr
    assert not (tmp_path / 'out').exists()


def test_one_process_takes_the_gpu_it_is_given(monkeypatch):
    given = []

    def set_device(device):
        given.append(_get_device_index(device))

    monkeypatch.setattr(torch.cuda, 'set_device', set_device)
    for device in ('cpu', 'cpu:0', 'cuda', 'cuda:1'):
        assert parallel.init_process_group(device, None, 1) == device
    assert given == [1], 'torch takes no name without a number'


def test_sharding_needs_torchrun(run, sheep):
    result = run('train.py', *FLAGS, '--fsdp')
    assert result.is_one_sentence
    assert result.err.startswith('fsdp=True is for several processes')

"""Which GPU, dtype, backend and sentence a process gets, where there are GPUs, without having one.

torch's answers about GPUs are replaced. What several processes say is in test_parallel.py.
"""

import datetime
import math
import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

import optim
import parallel
import runtime
from model import ARCHITECTURES
from runtime import UserError

# -----------------------------------------------------------------------------
# which device


@pytest.fixture
def eight_gpus(monkeypatch):
    """Eight GPUs, of any kind; returns what is done with them, in order."""
    done = []

    def empty(n, device):
        done.append(('empty', str(device)))
        return SimpleNamespace(device=torch.device(device))

    monkeypatch.setattr(torch, 'empty', empty)
    for kind in ('cuda', 'xpu'):
        module = torch.get_device_module(kind)
        monkeypatch.setattr(module, 'is_available', lambda kind=kind: True)
        monkeypatch.setattr(module, 'device_count', lambda: 8)
        monkeypatch.setattr(module, 'set_device', lambda n: done.append(('set_device', n)))
    for name in ('RANK', 'LOCAL_RANK', 'CUDA_VISIBLE_DEVICES'):
        monkeypatch.delenv(name, raising=False)
    return done


@pytest.mark.parametrize(
    ('name', 'device'),
    [('auto', 'cuda:3'), ('cuda', 'cuda:3'), ('cuda:0', 'cuda:3'), ('xpu', 'xpu:3')],
)
def test_each_process_claims_its_gpu_before_it_uses_one(eight_gpus, monkeypatch, name, device):
    monkeypatch.setenv('LOCAL_RANK', '3')
    assert runtime.pick_device(name) == device
    assert eight_gpus == [('set_device', 3), ('empty', device)]


def test_a_gpu_that_is_named_is_taken_as_it_is(eight_gpus, monkeypatch):
    assert runtime.pick_device('auto') == 'cuda'
    assert runtime.pick_device('cuda:5') == 'cuda:5'
    monkeypatch.setenv('LOCAL_RANK', '3')
    assert runtime.pick_device('cpu') == 'cpu'
    assert [name for name, _ in eight_gpus] == ['empty'] * 3


@pytest.mark.parametrize('kind', ['cuda', 'xpu'])
def test_more_processes_than_gpus_are_refused(eight_gpus, monkeypatch, kind):
    monkeypatch.setenv('LOCAL_RANK', '8')
    sentence = '^More processes than the 8 GPUs here: lower --nproc_per_node.$'
    with pytest.raises(UserError, match=sentence):
        runtime.pick_device(kind)
    assert not eight_gpus, 'nothing was put on a GPU'
    monkeypatch.setenv('LOCAL_RANK', '7')
    assert runtime.pick_device(kind) == f'{kind}:7'


@pytest.fixture
def unusable_gpu(monkeypatch, tmp_path):
    """A graphics card, with a driver that is too old for torch."""
    card = tmp_path / 'nvidia0'
    card.touch()
    monkeypatch.setattr(runtime, 'GRAPHICS_CARD', str(card))
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(runtime, 'keep_freed_memory', lambda: None)
    for kind in ('cuda', 'xpu', 'mps'):
        monkeypatch.setattr(torch.get_device_module(kind), 'is_available', lambda: False)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    return card


def test_a_gpu_without_its_driver_is_one_sentence(unusable_gpu):
    begin = '^There is a GPU that cannot be used, torch [^\n]+ needs a driver for CUDA 13.0: '
    with pytest.raises(UserError, match=begin + '[^\n]+$'):
        runtime.pick_device('auto')
    assert runtime.pick_device('cpu') == 'cpu', 'who asks for it gets it'


@pytest.mark.parametrize('hidden', ['', '-1'])
def test_who_hides_the_gpus_gets_the_cpu(unusable_gpu, monkeypatch, hidden):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', hidden)
    assert runtime.pick_device('auto') == 'cpu'


def test_no_card_or_no_cuda_in_torch_is_the_cpu(unusable_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert runtime.pick_device('auto') == 'cpu'
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    unusable_gpu.unlink()
    assert runtime.pick_device('auto') == 'cpu'


# -----------------------------------------------------------------------------
# dtype and copies


@pytest.mark.parametrize('is_native', [True, False])
def test_sixteen_bits_are_for_devices_that_compute_in_them(monkeypatch, is_native):
    def is_bf16_supported(including_emulation=True):
        return including_emulation or is_native

    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', is_bf16_supported)
    monkeypatch.setattr(runtime, 'multiplies_bfloat16', lambda: is_native)
    picked = {kind: runtime.pick_dtype('auto', kind) for kind in runtime.DEVICES}
    of_cuda = 'bfloat16' if is_native else 'float16'
    of_cpu = 'bfloat16' if is_native else 'float32'
    expected = {'cuda': of_cuda, 'xpu': 'bfloat16', 'mps': 'float32', 'cpu': of_cpu}
    assert picked == expected
    for kind in runtime.DEVICES:
        assert runtime.pick_dtype('auto', f'{kind}:0') == expected[kind]
        for name in ('float32', 'bfloat16', 'float16'):
            assert runtime.pick_dtype(name, kind) == name, 'who asks for one gets it'


class Tensor:
    """Notes what is done with it, in order."""

    def __init__(self, *done):
        self.done = done

    def pin_memory(self):
        return Tensor(*self.done, 'pinned')

    def to(self, device, non_blocking=False):
        return Tensor(*self.done, str(device), non_blocking)


def test_copies_to_cuda_are_pinned_and_do_not_wait():
    expected = {
        'cuda': ('pinned', 'cuda', True),
        'cuda:3': ('pinned', 'cuda:3', True),
        'xpu': ('xpu', False),
        'mps': ('mps', False),
        'cpu': ('cpu', False),
    }
    for device, done in expected.items():
        copies = runtime.to_device(device, Tensor(), Tensor())
        assert [copy.done for copy in copies] == [done, done]


# -----------------------------------------------------------------------------
# the process group


@pytest.fixture
def launched(monkeypatch):
    """As under torchrun, the second of two processes."""
    monkeypatch.setattr(parallel, 'launched', True)
    monkeypatch.setattr(parallel, 'world_size', 2)
    monkeypatch.setattr(parallel, 'rank', 1)


@pytest.mark.parametrize(
    ('device', 'backend', 'backends'),
    [
        ('cuda:1', None, 'cpu:gloo,cuda:nccl'),
        ('cuda:1', 'nccl', 'cpu:gloo,cuda:nccl'),
        ('cuda:1', 'gloo', 'cpu:gloo,cuda:gloo'),
        ('xpu:1', None, 'cpu:gloo,xpu:xccl'),
        ('cpu', None, 'gloo'),
        ('cpu', 'gloo', 'gloo'),
    ],
)
def test_numbers_go_by_gloo_and_gpus_by_their_own(launched, monkeypatch, device, backend, backends):
    started = []
    monkeypatch.setattr(dist, 'init_process_group', started.append)
    assert parallel.init_process_group(device, backend, 4) == device
    assert started == [backends]


def test_what_cannot_work_starts_no_group(launched, monkeypatch):
    monkeypatch.setattr(dist, 'init_process_group', lambda backends: pytest.fail('started'))
    with pytest.raises(UserError, match="^device='mps' is for one process only: [^\n]+$"):
        parallel.init_process_group('mps', None, 2)
    with pytest.raises(UserError, match="^backend='nccl' needs CUDA, and the device is xpu: "):
        parallel.init_process_group('xpu:1', 'nccl', 2)
    with pytest.raises(UserError, match='^gradient_accumulation_steps=3 cannot be divided over 2 '):
        parallel.init_process_group('cuda:1', None, 3)


def test_processes_that_cannot_meet_say_so_in_a_sentence(launched, monkeypatch):
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port = server.getsockname()[1]  # closed from here on
    connect = dist.init_process_group
    timeout = datetime.timedelta(seconds=1)  # else half an hour
    monkeypatch.setattr(dist, 'init_process_group', lambda name: connect(name, timeout=timeout))
    address = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'RANK': '1', 'WORLD_SIZE': '2'}
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='^The processes cannot connect: [^\n]+$'):
        parallel.init_process_group('cpu', None, 2)
    assert not dist.is_initialized()


# -----------------------------------------------------------------------------
# a process that is gone, as NCCL says it

IN = 'NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, '
REMOTE = IN + (
    'remote process exited or there was a network error, NCCL version 2.27.5\nncclRemoteError: '
    'A call failed possibly due to a network error or a remote process exiting prematurely.'
)
SYSTEM = IN + (
    'unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\n'
    'ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device '
    'error.\nLast error:\nCall to ibv_modify_qp failed with 110'
)
TIMEOUT = (
    '[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, '
    'NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600029 milliseconds before timing out.'
)
ABORTED = f'NCCL communicator was aborted on rank 0. Original reason for failure was: {TIMEOUT}'
WATCHDOG = f'[PG ID 0 Rank 0] Process group watchdog thread terminated with exception: {REMOTE}'
USAGE = IN + (
    'invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.27.5\nncclInvalidUsage: '
    'This usually reflects invalid usage of NCCL library.'
)
OWN_GPU = IN + (
    'unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\n'
    'ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n'
    "Cuda failure 700 'an illegal memory access was encountered'"
)
NO_MEMORY = OWN_GPU.replace("700 'an illegal memory access was encountered'", "2 'out of memory'")


def explain(message, rank, capsys, monkeypatch):
    """What a process prints of an error of NCCL."""
    monkeypatch.setenv('RANK', str(rank))
    monkeypatch.setattr(runtime.time, 'sleep', lambda seconds: None)
    error = dist.DistBackendError(message)
    runtime.explain_error(type(error), error, None)
    return capsys.readouterr().err


@pytest.mark.parametrize('message', [REMOTE, SYSTEM, TIMEOUT, ABORTED, WATCHDOG])
def test_a_lost_process_is_said_once(message, capsys, monkeypatch):
    begin = 'Another process has ended, or the network has failed, see also above: '
    printed = explain(message, 0, capsys, monkeypatch)
    assert printed.startswith(begin) and printed.count('\n') == 1
    cause = printed.removeprefix(begin).strip()
    assert cause in message and '/pytorch/' not in cause, 'not where in torch it was noticed'
    assert explain(message, 1, capsys, monkeypatch) == ''
    assert explain(message, 7, capsys, monkeypatch) == ''


@pytest.mark.parametrize('message', [USAGE, OWN_GPU])
def test_an_error_of_this_process_is_a_traceback(message, capsys, monkeypatch):
    for rank in (0, 1):
        printed = explain(message, rank, capsys, monkeypatch)
        assert printed == f'torch.distributed.DistBackendError: {message}\n'


def test_nccl_without_memory_is_that_sentence(capsys, monkeypatch):
    printed = explain(NO_MEMORY, 0, capsys, monkeypatch)
    assert printed.startswith('Out of memory: reduce batch_size') and printed.count('\n') == 1


def test_alone_an_error_of_nccl_is_a_traceback(capsys, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    error = dist.DistBackendError(REMOTE)
    runtime.explain_error(type(error), error, None)
    assert 'Another process' not in capsys.readouterr().err
    assert 'RANK' not in os.environ


# -----------------------------------------------------------------------------
# a small step there and on the CPU


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_a_device_may_round(arch, dtype):
    optim.check_device(arch, 'cpu', dtype)


@pytest.mark.parametrize('factor', [1.05, math.nan])
def test_a_device_that_computes_something_else_is_refused(monkeypatch, factor):
    real = optim.GPT.forward
    losses = []

    def forward(self, *args):
        loss = real(self, *args)
        losses.append(loss)
        return loss * factor if len(losses) == 2 else loss

    monkeypatch.setattr(optim.GPT, 'forward', forward)
    with pytest.raises(UserError) as caught:
        optim.check_device('qwen3', 'cpu', 'bfloat16')
    loss, wrong = (loss.item() for loss in losses)
    message = str(caught.value)
    assert f'has a loss of {wrong * factor:.4f} where the CPU has {loss:.4f}' in message
    assert 'Try another version, or --device=cpu.' in message


def test_apples_gpus_need_a_torch_that_skips_steps(monkeypatch):
    monkeypatch.setattr(torch, '__version__', TorchVersion('2.9.1'))
    with pytest.raises(UserError, match=r"^Training on device='mps' needs torch 2\.13 or newer"):
        optim.check_device('gpt2', 'mps', 'float32')

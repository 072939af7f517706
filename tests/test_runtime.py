"""The machine (device, dtype, memory, time), and how a script ends (errors, signals)."""

import errno
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import model
import runtime
from runtime import UserError

IMPORTS = f'import sys; sys.path.insert(0, {str(ROOT)!r})\n'
HOOK = IMPORTS + 'import runtime; sys.excepthook = runtime.explain_error\n'


def run_code(code, **options):
    """Run Python code as its own process, with the project's excepthook."""
    line = [sys.executable, '-c', HOOK + code]
    return subprocess.run(line, capture_output=True, text=True, **options)


def explain(error, capsys):
    """What is printed of an error."""
    runtime.explain_error(type(error), error, error.__traceback__)
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def no_signal():
    """Leave runtime.stop, and the handlers, as they were."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    runtime.stop = 0


# -----------------------------------------------------------------------------
# errors

SIZE = 'Out of memory: reduce batch_size, block_size or the model: '


@pytest.mark.parametrize(
    ('error', 'sentence'),
    [
        (UserError('Name a\nfolder.'), 'Name a folder.'),
        (model.UserError('Not a model.'), 'Not a model.'),
        (OSError(errno.ENOSPC, 'No space left', 'out/x'), 'No space left: out/x'),
        (OSError(errno.EIO, 'Input/output error'), 'Input/output error'),
        (PermissionError(errno.EACCES, 'Permission denied', 'x'), 'Permission denied: x'),
        (OSError('Cannot allocate memory'), f'{SIZE}Cannot allocate memory'),
        (MemoryError(), SIZE),
        (torch.OutOfMemoryError('CUDA out of memory.'), f'{SIZE}CUDA out of memory.'),
        (RuntimeError("can't allocate memory:\n9 bytes"), f"{SIZE}can't allocate memory: 9 bytes"),
        (OverflowError('int too large to convert'), f'{SIZE}int too large to convert'),
        (OverflowError('math range error'), None),
        (ValueError('too many values to unpack'), None),
        (FileNotFoundError(errno.ENOENT, 'No such file', 'x'), None),
        (RuntimeError('[gloo] Connection closed by peer'), None),
        (ValueError('mine: the bucket ran out of memory slots'), None),
    ],
)
def test_a_user_gets_a_sentence_and_a_hacker_a_traceback(error, sentence, capsys, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    printed = explain(error, capsys)
    if sentence is None:
        assert printed == f'{type(error).__name__}: {error}\n', 'no trace, since nobody raised it'
    else:
        assert printed == sentence + '\n'


def test_arrays_larger_than_the_memory_are_one_sentence(capsys):
    for code in ('import numpy; numpy.zeros(10**15)', '[0] * 10**30', 'float(10**400)'):
        result = run_code(code)
        assert result.returncode == 1 and result.stderr.startswith(SIZE), code
        assert result.stderr.count('\n') == 1


def test_an_error_ends_the_process_with_its_status():
    result = run_code("raise runtime.UserError('Name a folder.')")
    assert (result.returncode, result.stdout, result.stderr) == (1, '', 'Name a folder.\n')
    result = run_code('import math; math.exp(1000)')
    assert result.returncode == 1 and 'Traceback' in result.stderr and 'line 3' in result.stderr
    result = run_code('raise KeyboardInterrupt')
    assert result.returncode != 0 and result.stderr == ''


def test_a_closed_pipe_ends_a_script_without_a_word():
    line = [sys.executable, '-c', HOOK + 'for n in range(10**6): print(n)\n']
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b'0\n'
    process.stdout.close()
    assert process.stderr.read() == b''
    process.stderr.close()
    assert process.wait() == 141


def test_of_several_processes_the_first_speaks_first(capsys, monkeypatch):
    slept = []
    monkeypatch.setattr(time, 'sleep', slept.append)
    lost = RuntimeError('[gloo] Connection closed by peer\nat 1')
    monkeypatch.setenv('RANK', '0')
    assert explain(UserError('No.'), capsys) == 'No.\n' and not slept
    begin = 'Another process has ended, or the network has failed, see also above'
    assert explain(lost, capsys) == f'{begin}: [gloo] Connection closed by peer\n'
    mine = RuntimeError('ProcessGroupGloo does not support my_op')
    assert explain(mine, capsys) == f'RuntimeError: {mine}\n', 'a traceback'
    monkeypatch.setenv('RANK', '1')
    assert explain(UserError('No.'), capsys) == 'No.\n' and slept == [5]
    assert explain(lost, capsys) == '', 'one is enough'


# -----------------------------------------------------------------------------
# signals


def test_a_script_that_begins_is_ended_by_ctrl_c_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runtime.begin_script()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    runtime.begin_script()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_signals_raise_where_something_is_to_be_removed():
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    runtime.raise_on_signals()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit, match='143'):
        signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    runtime.raise_on_signals()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_one_process_alone_prints():
    code = "runtime.begin_script(); print('hello')"
    for rank, expected in {'0': 'hello\n', '1': ''}.items():
        result = run_code(code, env=os.environ | {'RANK': rank})
        assert result.returncode == 0 and result.stdout == expected


def test_what_an_encoding_lacks_does_not_end_a_script():
    environment = os.environ | {'PYTHONIOENCODING': 'ascii'}
    result = run_code("runtime.begin_script(); print('\\xb1 \\u65e5')", env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == '\\xb1 \\u65e5\n'


def test_a_signal_is_remembered_and_a_second_ctrl_c_ends_at_once(monkeypatch):
    now = [100.0]
    ended = []
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(os, '_exit', ended.append)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    runtime.stop = signal.SIGTERM
    runtime.install_signal_handlers()
    assert runtime.stop == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

    signal.raise_signal(signal.SIGINT)
    assert runtime.stop == signal.SIGINT
    now[0] += 0.5
    signal.raise_signal(signal.SIGINT)
    assert not ended, 'a launcher passes on the first'
    now[0] += 1.0
    signal.raise_signal(signal.SIGTERM)
    assert not ended and runtime.stop == signal.SIGINT
    signal.raise_signal(signal.SIGINT)
    assert ended == [130]


# -----------------------------------------------------------------------------
# device and precision


def test_auto_takes_the_first_device_there_is(monkeypatch):
    tried = []

    def empty(n, device):
        tried.append(device)
        return torch.zeros(n)

    monkeypatch.setattr(torch, 'empty', empty)
    there_are = set(runtime.DEVICES)
    for kind in runtime.DEVICES[:-1]:
        module = torch.get_device_module(kind)
        monkeypatch.setattr(module, 'is_available', lambda kind=kind: kind in there_are)
    for expected in ('cuda', 'xpu', 'mps', 'cpu'):
        assert runtime.pick_device('auto') == expected == tried[-1]
        there_are.remove(expected)


@pytest.mark.parametrize('name', ['gpu', 'cuda:99', 'meta', '', 'cpu:x'])
def test_a_device_that_cannot_be_used_is_refused(name):
    with pytest.raises(UserError, match=f"^device='{name}' cannot be used here: [^\n]+$"):
        runtime.pick_device(name)


@pytest.mark.parametrize(
    ('has', 'expected'),
    [
        ({'avx512_f': True, 'avx512_bf16': False, 'amx_bf16': False}, 'float32'),
        ({'avx512_f': True, 'avx512_bf16': True, 'amx_bf16': False}, 'bfloat16'),  # AMD's Zen 4
        ({'avx512_f': True, 'avx512_bf16': False, 'amx_bf16': True}, 'bfloat16'),
        ({'neon': True, 'bf16': True}, 'float32'),  # not tried
        (None, 'float32'),  # an older torch does not say
    ],
)
def test_a_cpu_computes_in_what_it_multiplies_fast(monkeypatch, has, expected):
    if has is None:
        monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    else:
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: has, raising=False)
    assert runtime.pick_dtype('auto', 'cpu') == expected


def test_a_cpu_says_what_it_has():
    on_linux = os.path.exists('/proc/cpuinfo') and hasattr(torch.cpu, 'get_capabilities')
    if not on_linux:
        pytest.skip('there is nothing to compare with')
    flags = Path('/proc/cpuinfo').read_text().split()
    has_units = 'avx512_bf16' in flags or 'amx_bf16' in flags
    assert runtime.multiplies_bfloat16() == has_units


def test_auto_is_sixteen_bits_on_cuda(monkeypatch):
    assert runtime.pick_dtype('auto', 'mps') == 'float32'
    assert runtime.pick_dtype('float16', 'cpu') == 'float16'
    answers = {'emulated': True}

    def is_bf16_supported(including_emulation):
        return answers['emulated' if including_emulation else 'native']

    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', is_bf16_supported)
    for native, expected in [(True, 'bfloat16'), (False, 'float16')]:
        answers['native'] = native  # emulated it would be slow
        assert runtime.pick_dtype('auto', 'cuda:1') == expected


def test_autocast_computes_in_the_dtype():
    x = torch.ones(2, 2)
    for dtype in ('float32', 'bfloat16'):
        autocast = runtime.make_autocast('cpu', dtype)
        for _ in range(2):  # it is entered in every step
            with autocast:
                assert (x @ x).dtype == getattr(torch, dtype)


def test_mfu_is_given_where_the_peak_is_known(monkeypatch):
    names = {
        'NVIDIA H200': 989,
        'NVIDIA H100 80GB HBM3': 989,
        'NVIDIA A100-SXM4-40GB': 312,
        'Tesla T4': 65,
        'NVIDIA GeForce RTX 4090': 165,
        'NVIDIA H100 PCIe': None,
        'NVIDIA GeForce RTX 4090 Laptop GPU': None,
        'NVIDIA A10G': None,
        'NVIDIA A100 80GB PCIe': 312,
        'AMD Instinct MI300X': 1307,
        'AMD Instinct MI210': None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device, name=name: name)
        expected = None if peak is None else peak * 1e12
        assert runtime.peak_flops('cuda', 'bfloat16') == expected, name
    assert runtime.peak_flops('cuda', 'float32') is None
    assert runtime.peak_flops('cpu', 'bfloat16') is None


# -----------------------------------------------------------------------------
# memory, time, imports


@pytest.mark.skipif(sys.platform != 'linux', reason='of glibc')
def test_freed_memory_is_kept_unless_malloc_variables_are_set():
    code = IMPORTS + '''
import resource, torch
from runtime import pick_device
pick_device('auto' if not torch.cuda.is_available() else 'cpu')
for n in range(20):
    if n == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
'''

    def faults(**environment):
        kept = {name: v for name, v in os.environ.items() if not name.startswith('MALLOC_')}
        return int(subprocess.check_output([sys.executable, '-c', code], env=kept | environment))

    assert faults() < 100 and faults(MALLOC_ARENA_TEST='8') > 1000  # 8 is its default


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_peak_memory_is_that_of_the_process():
    code = """
before = runtime.peak_memory_gib('cpu')
block = b'x' * 2**28
del block
after = runtime.peak_memory_gib('cpu')
print(before, after, runtime.process_peak_gib('self'))
"""
    before, after, again = map(float, run_code(code).stdout.split())
    assert 0 < before < 50 and after - before == pytest.approx(0.25, abs=0.05)
    assert again == pytest.approx(after, abs=0.01)
    assert runtime.process_peak_gib(os.getpid()) == runtime.process_peak_gib('self') > 0.1
    assert runtime.process_peak_gib(2**30) == 0, 'there is no such process'


def test_a_stopwatch_counts_only_while_it_runs(monkeypatch):
    now = [50.0]
    waits = []
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(runtime, 'synchronize', waits.append)
    clock = runtime.Stopwatch('cpu', 10.0)
    now[0] += 2
    assert clock.seconds == 12 and not waits, 'reading it waits for nothing'
    clock.pause()
    assert waits == ['cpu']
    now[0] += 100
    assert clock.seconds == 12
    clock.resume()
    now[0] += 3
    assert clock.seconds == 15
    clock.pause()
    assert clock.seconds == 15 and math.isclose(runtime.Stopwatch('cpu').seconds, 0)


def test_what_needs_no_torch_does_not_import_it():
    modules = 'runtime, configurator, report'
    result = run_code(f"import {modules}; print('torch' in sys.modules)")
    assert result.stdout == 'False\n'


@pytest.mark.parametrize(('cause', 'status'), [(SystemExit(143), 143), (KeyboardInterrupt(), 130)])
def test_a_signal_inside_a_library_is_no_traceback(capsys, cause, status):
    """Such as rustbpe's, when it asks for the next text as the signal comes."""
    error = SystemError('returned a result with an exception set')
    error.__cause__ = cause
    with pytest.raises(SystemExit) as ended:
        runtime.explain_error(SystemError, error, None)
    assert ended.value.code == status
    assert capsys.readouterr().err == ''


def test_what_a_terminal_would_obey_is_not_printed():
    obeyed = [chr(n) for n in (0, 7, 8, 27, 127, 155)]
    assert runtime.visible(''.join(obeyed)) == '\ufffd' * len(obeyed)
    text = 'é 字\u3000\u200d😀\t\n\r\n\ufeff'
    assert runtime.visible(text) == text

"""The machine (device, dtype, compiler, memory, time), and how a script ends (errors, signals).

torch is imported inside the functions that need it: prepare.py and plot.py start without it.
"""

import contextlib
import ctypes
import errno
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# (TFLOP/s, GiB), from the makers' data sheets: 16-bit matrix products without sparsity, with sums
# in 32 bits; of Apple's, whose memory is the computer's, at most that of the model.
GPUS = {
    'T4': (65, 16), 'V100': (125, 16), 'A10': (125, 24), 'L4': (121, 24), 'L40S': (362, 48),
    'A100-40GB': (312, 40), 'A100': (312, 80), 'H100': (989, 80), 'H200': (989, 141),
    'B200': (2250, 180), 'MI300X': (1307, 192),
    'RTX3060': (25, 12), 'RTX3070': (41, 8), 'RTX3080': (60, 10), 'RTX3090': (71, 24),
    'RTX4060': (30, 8), 'RTX4070': (58, 12), 'RTX4080': (97, 16), 'RTX4090': (165, 24),
    'RTX5070': (62, 12), 'RTX5080': (113, 16), 'RTX5090': (210, 32),
    'M1': (2.6, 16), 'M1Max': (10.4, 64), 'M1Ultra': (21, 128), 'M2Ultra': (27, 192),
}  # fmt: skip
CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)], '\ufffd')
GRAPHICS_CARD = '/dev/nvidia0'  # is there where Linux has a driver for one

DEVICES = ('cuda', 'xpu', 'mps', 'cpu')  # AMD's are called cuda as well, Intel's xpu

stop = 0  # the signal that asked for an end, or 0
_stop_time = 0.0  # when it came

# -----------------------------------------------------------------------------
# how a script ends: errors


class UserError(ValueError):
    """An error that the user can mend: printed as one sentence, without a traceback."""


# Of the system, whatever the code: a traceback would add nothing. A file that is not there is not
# among them: that may be a mistake in the code.
_ENVIRONMENT_ERRORS = 'ENOSPC EDQUOT EFBIG EACCES EPERM EROFS EIO EBUSY ESTALE ENOLCK'.split()
_ENVIRONMENT_ERRORS += 'EMFILE ENFILE EISDIR ENOTDIR ENAMETOOLONG ELOOP'.split()
_OUT_OF_MEMORY = re.compile(r"(?i)out of memory|can('|no)t allocate memory|not enough memory")
_TOO_LARGE = re.compile(r'int too large|too large to convert|index-sized')  # not 'math range error'
# What torch says when another process of the group is gone.
_LOST_PEER = re.compile(
    r'(?i)connection (closed|reset)|broken pipe|timed? ?out|aborted|nccl(Remote|System)Error'
)


def explain_error(kind, error, trace):
    """Print one sentence for what the user can mend, a traceback for the rest: a sys.excepthook."""
    rank = int(os.environ.get('RANK', 0))
    if issubclass(kind, KeyboardInterrupt):
        return
    # A signal came while a library in another language ran, which makes a SystemError of it.
    if isinstance(error.__cause__, SystemExit | KeyboardInterrupt):
        raise SystemExit(getattr(error.__cause__, 'code', 130))
    if issubclass(kind, BrokenPipeError):
        drop_output()
        raise SystemExit(141)  # 128 + SIGPIPE, as if the signal had ended the process
    sentence = _sentence_for(kind, error)
    is_of_group = issubclass(kind, RuntimeError) and 'RANK' in os.environ
    if sentence is None and is_of_group and _LOST_PEER.search(str(error)):
        if rank > 0:
            return  # one is enough
        lines = str(error).strip().splitlines()
        cause = lines[-1] if 'NCCL error in' in lines[0] else lines[0]  # else that is a path only
        what = 'Another process has ended, or the network has failed, see also above'
        sentence = f'{what}: {cause[:200]}'
    if sentence is None:
        sys.__excepthook__(kind, error, trace)
        return

    # Of several processes the first speaks; torchrun then ends the others.
    if rank > 0:
        time.sleep(5)
    print(sentence.replace('\n', ' '), file=sys.stderr)  # a newline may be in what it quotes


def _sentence_for(kind, error):
    """Return the sentence for an error that needs no traceback, else None."""
    message = str(error)
    # By name: model.py stands alone and has a UserError of its own.
    if any(base.__name__ == 'UserError' for base in kind.__mro__):
        return message

    too_large = issubclass(kind, OverflowError) and _TOO_LARGE.search(message)
    no_memory = issubclass(kind, RuntimeError | OSError) and _OUT_OF_MEMORY.search(message)
    if issubclass(kind, MemoryError) or too_large or no_memory:
        details = ' '.join(message.split())[:100]
        return f'Out of memory: reduce batch_size, block_size or the model: {details}'

    if issubclass(kind, OSError) and errno.errorcode.get(error.errno) in _ENVIRONMENT_ERRORS:
        if error.filename is None:
            return error.strerror
        return f'{error.strerror}: {error.filename}'
    return None


def show_progress(items, what, quiet=False):
    """Yield the items; on a terminal with a bar that says what is done."""
    from tqdm import tqdm

    off = True if quiet else None  # None: where stderr is not a terminal
    return tqdm(items, desc=what, ncols=80, leave=False, disable=off, delay=1)


def visible(text):
    """Replace control characters, which a terminal would obey, by U+FFFD."""
    return text.translate(CONTROLS)


def brief(error):
    """Shorten an error of some library to a line."""
    message = ' '.join(str(error).split()) or '?'
    return f'{type(error).__name__}: {message[:200]}'


def drop_output():
    """Let what is still printed go nowhere: the other end of the pipe is closed, as by `| head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def begin_script():
    """Let Ctrl-C end the script at once, one process alone print, and any text be printed.

    It comes first in a script: torch takes seconds to import.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Loading weights would take a KeyboardInterrupt for a damaged file.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if int(os.environ.get('RANK', 0)):
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115  open until the process ends
    if hasattr(sys.stdout, 'reconfigure'):  # a notebook's has not
        # The terminal's encoding may lack a character of a sample, or the ± of a table. It is
        # printed as an escape: an error would end the run.
        sys.stdout.reconfigure(errors='backslashreplace')


# -----------------------------------------------------------------------------
# how a script ends: signals


def raise_on_signals():
    """Have Ctrl-C and SIGTERM raise an exception, so that a script can remove what is half done."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # else the shell has it ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))


def install_signal_handlers():
    """Have SIGINT, SIGTERM and SIGHUP set `stop`, where they would have ended the process."""
    global stop
    stop = 0
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
        number = getattr(signal, name, signal.SIGTERM)  # Windows has no SIGHUP
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, request_stop)


def request_stop(number, frame):
    """Let the step in progress finish, then save and exit. A second Ctrl-C ends it at once."""
    global stop, _stop_time
    # Within a second it is the first one again, passed on by a launcher.
    if stop == number == signal.SIGINT and time.monotonic() > _stop_time + 1:
        os._exit(130)
    if not stop:
        stop = number
        _stop_time = time.monotonic()


# -----------------------------------------------------------------------------
# device and precision


def known_device(name):
    """Return the device for a knob: 'auto' is the first there is of DEVICES.

    Raises UserError for one that is not here.
    """
    import torch

    if name == 'auto':
        name = next(kind for kind in DEVICES if torch.get_device_module(kind).is_available())
        if name == 'cpu':
            check_driver()
    kind = name.partition(':')[0]
    if kind not in DEVICES:
        raise UserError(f"device='{name}' cannot be used here: it is none of {', '.join(DEVICES)}.")
    if not torch.get_device_module(kind).is_available():
        raise UserError(f"device='{name}' cannot be used here: torch finds none.")
    return name


def pick_device(name):
    """Return the device for a knob. Under torchrun each process gets a GPU of its own.

    Raises UserError for a device that cannot be used.
    """
    import torch

    name = known_device(name)
    kind = name.partition(':')[0]
    # Before anything is put on a GPU: on the first one, each process would take half a GiB.
    if kind in ('cuda', 'xpu') and 'LOCAL_RANK' in os.environ:
        name = claim_gpu(kind)
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device='{name}' cannot be used here: {reason}") from None
    if name == 'cpu':
        keep_freed_memory()
    return name


def claim_gpu(kind):
    """Make the GPU of this process the current device and return its name: one process, one GPU."""
    import torch

    local_rank = int(os.environ['LOCAL_RANK'])
    n_gpus = torch.get_device_module(kind).device_count()
    if local_rank >= n_gpus:
        raise UserError(f'More processes than the {n_gpus} GPUs here: lower --nproc_per_node.')
    torch.get_device_module(kind).set_device(local_rank)
    return f'{kind}:{local_rank}'


def check_driver():
    """Raise UserError where there is a GPU that torch was built for but cannot use.

    A run would take a month on the CPU. Whoever hides the GPUs from CUDA wants the CPU.
    """
    import torch

    is_hidden = 'CUDA_VISIBLE_DEVICES' in os.environ
    if torch.version.cuda and os.path.exists(GRAPHICS_CARD) and not is_hidden:
        needed = f'torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}'
        how = 'update the driver, install a torch for an older CUDA, or use --device=cpu'
        raise UserError(f'There is a GPU that cannot be used, {needed}: {how}.')


def pick_dtype(name, device):
    """Return the dtype for a knob: 'auto' is a 16-bit one where it is faster, else float32.

    It is bfloat16 where the device computes in it; older GPUs, such as V100 and T4, emulate it.
    """
    import torch

    kind = torch.device(device).type
    if name != 'auto':
        return name
    if kind == 'cpu':
        return 'bfloat16' if multiplies_bfloat16() else 'float32'
    if kind == 'mps':
        return 'float32'
    if kind == 'xpu' or torch.cuda.is_bf16_supported(including_emulation=False):
        return 'bfloat16'
    return 'float16'


def multiplies_bfloat16():
    """Return whether the CPU has instructions for it, as AMD's since Zen 4 and late Xeons have."""
    import torch

    has = getattr(torch.cpu, 'get_capabilities', dict)()  # an older torch lacks it
    return has.get('avx512_bf16', False) or has.get('amx_bf16', False)


def make_autocast(device, dtype):
    """Return a reusable context that computes in 'float32', 'bfloat16' or 'float16'."""
    import torch

    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, getattr(torch, dtype))


def can_compile(device):
    """Return whether torch.compile works, by trying: it looks for its tool chain only when used."""
    import torch

    try:
        make_compiled_repeatable()
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever the compiler's tool chain raises
        problem = f'No working compiler ({type(error).__name__})'
        print(f'{problem}: running without torch.compile, which is slower.', file=sys.stderr)
        return False
    return True


def make_compiled_repeatable():
    """Have torch.compile make the same kernels in every process.

    On a CPU a compiled run then repeats to the bit. On CUDA attention still sums in any order.
    """
    import torch
    from torch._inductor import config, decomposition

    if hasattr(config, 'deterministic'):  # it does not choose kernels by timing them
        config.deterministic = True
    # Of an embedding's gradient inductor makes atomic additions. torch's own kernel sorts.
    of_embedding = torch.ops.aten.embedding_dense_backward.default
    decomposition.decompositions.pop(of_embedding, None)


def to_device(device, *tensors):
    """Copy tensors of the CPU to a device, on CUDA without waiting for it."""
    import torch

    if torch.device(device).type == 'cuda':  # from memory that is not pinned it would wait
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return [tensor.to(device) for tensor in tensors]


def synchronize(device):
    """Wait until a device has done all that it was given."""
    import torch

    torch.get_device_module(device).synchronize()


def peak_flops(device, dtype):
    """Return a device's 16-bit FLOP/s by its data sheet; None: not in GPUS, or dtype is float32."""
    gpu = find_gpu(device)
    if gpu not in GPUS or dtype == 'float32':
        return None
    tflops, _ = GPUS[gpu]
    return tflops * 1e12


def matmul_flops(device, dtype):
    """Measure the FLOP/s of large matrix products, the best of ten: the ceiling for a step."""
    import torch

    torch.set_float32_matmul_precision('high')  # as in a step
    n = 1536 if torch.device(device).type == 'cpu' else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype))
    seconds = []
    while len(seconds) < 10 and sum(seconds) < 1:
        seconds.append(seconds_of(device, torch.matmul, a, b))
    return 2 * n**3 / min(seconds)


def seconds_of(device, function, *args):
    """Return the seconds that a device takes for function(*args)."""
    synchronize(device)
    start = time.perf_counter()
    function(*args)
    synchronize(device)
    return time.perf_counter() - start


def find_gpu(device):
    """Return the name of a device in GPUS; 'CPU', or None where it is not in there."""
    import torch

    kind = torch.device(device).type
    if kind != 'cuda':
        return 'CPU' if kind == 'cpu' else None
    words = torch.cuda.get_device_name(device).replace('RTX ', 'RTX').replace('-', ' ').split()
    known = [word for word in words if word in GPUS]
    # A card with one of these words in its name is not as fast as its namesake.
    others = {'PCIe', 'PCIE', 'NVL', 'Laptop', 'Max', 'D', 'Ti', 'SUPER', 'MIG'}
    if 'A100' in words:
        others -= {'PCIe', 'PCIE'}  # this card has the same peak
    if not known or others.intersection(words):
        return None
    return known[0]


# -----------------------------------------------------------------------------
# memory


def forget_peak_memory():
    """Have peak_memory_gib() of a CPU begin anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')


def keep_freed_memory():
    """Have glibc keep freed memory, since new pages take time to clear; MALLOC_* variables win."""
    if any(variable.startswith('MALLOC_') for variable in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL('libc.so.6').mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: map no block by itself, or freeing it gives it back
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


def peak_memory_gib(device):
    """Return the most GiB in use so far: of a GPU (MPS: in use now), else by this process."""
    import torch

    if torch.device(device).type in ('cuda', 'xpu'):
        return torch.get_device_module(device).max_memory_allocated(device) / 2**30
    if torch.device(device).type == 'mps':  # it does not keep the peak
        return torch.mps.driver_allocated_memory() / 2**30
    # First /proc: on Linux ru_maxrss may be that of the process which started this one.
    peak = process_peak_gib('self')
    if peak:
        return peak
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # in bytes on macOS
    return math.nan


def process_peak_gib(pid):
    """Return the most GiB that a process has had so far; 0 where /proc does not say."""
    with contextlib.suppress(OSError):  # no Linux, or it has ended
        found = re.search(r'VmHWM:\s+(\d+)', Path(f'/proc/{pid}/status').read_text())  # in KiB
        if found:  # a process that has just ended has none
            return int(found[1]) / 2**20
    return 0


# -----------------------------------------------------------------------------
# time


class Stopwatch:
    """The seconds of training: running from its creation, paused while a run evaluates or saves."""

    def __init__(self, device, seconds=0.0):
        self.device = device
        self.total = seconds  # until it was started last
        self.started = time.perf_counter()  # None: paused

    def pause(self):
        """Stop counting, with what the device has to do yet."""
        self.total = self.measure()
        self.started = None

    def measure(self):
        """Wait for the device, whose queued work belongs to the time so far. Returns seconds."""
        synchronize(self.device)
        return self.seconds

    def resume(self):
        """Count on from the seconds so far."""
        self.started = time.perf_counter()

    @property
    def seconds(self):
        """Seconds so far; does not wait for the device."""
        if self.started is None:
            return self.total
        return self.total + time.perf_counter() - self.started


# -----------------------------------------------------------------------------
# files

_locks = []  # open files: closing one would give its lock up


def lock_file(path, message):
    """Lock a file for as long as this process lives. Raises UserError if another one has it."""
    if fcntl is None:
        return
    if os.path.islink(path):  # a stranger's, which may lead anywhere
        os.unlink(path)
    lock = open(path, 'w')  # noqa: SIM115
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(message) from None
    _locks.append(lock)


def count_cores():
    """Count the cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()

"""A run on CUDA, without a GPU: no device is mixed with another, and the host never waits.

Tensors on the "GPU" are torch's FakeTensors: shapes and dtypes without contents, of which torch
itself says what an operation gives. Those on the CPU are real. A Ledger stands between the code and
both: it notes each kernel, what it reads and writes, and each value that the host asks for.
"""

import contextlib
import weakref
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo  # now: it looks at Tensor._make_subclass, which fake_cuda replaces
import torch.distributed as dist
import torch.nn.functional as F
from conftest import TINY
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import inference
import model as models
import optim
import parallel
import runtime
from model import GPT, GPTConfig

ARCHITECTURES = ('gpt2', 'llama', 'qwen2', 'qwen3')
DTYPES = ('float32', 'bfloat16', 'float16')
GPU = 'cuda:0'  # with its number: torch would ask the driver which one is the current
QUICK = [('gpt2', 'bfloat16'), ('qwen3', 'bfloat16'), ('gpt2', 'float32'), ('qwen3', 'float16')]
REST = [(arch, dtype) for arch in ARCHITECTURES for dtype in DTYPES if (arch, dtype) not in QUICK]
CASES = QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in REST]
aten = torch.ops.aten
HOST_READS = ('_local_scalar_dense', 'item', 'equal', 'is_nonzero', 'nonzero', 'masked_select')
NO_KERNEL = ('empty', 'empty_like', 'new_empty', 'empty_strided', 'detach', '_unsafe_view')


# -----------------------------------------------------------------------------
# a GPU of fake tensors


def device_of(kwargs):
    """The device that an operation is asked for; C++ takes the fake GPU for another, see gpu()."""
    device = kwargs.get('device')
    if device is None:
        return None
    is_gpu = torch.device(device).type in ('meta', 'xla')
    return torch.device(GPU) if is_gpu else torch.device(device)


class FakeGPU(FakeTensorMode):
    """FakeTensorMode whose tensors are on the GPU where torch's C++ says 'meta'."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if 'device' in kwargs:
            kwargs['device'] = device_of(kwargs)
        return super().__torch_dispatch__(function, types, args, kwargs)


def tensors_in(values):
    """All tensors inside a nested structure."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def bytes_of(tensors):
    """The bytes of different tensors; one that is expanded has those of its storage."""
    unique = {id(tensor): tensor for tensor in tensors}.values()
    return sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in unique)


class Ledger(TorchDispatchMode):
    """Runs operations on the fake GPU, or for real on the CPU, and notes them.

    kernels: a Counter of names. outputs: (name, dtype, shape) of each. reads: what the host waited
    for. uploads: (is pinned, does not block) of each. mixed: operations with two devices.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeGPU(allow_non_fake_inputs=True)
        self.live = set()  # ids of storages on the GPU
        self.has_autocast = False  # torch's own, which works without gradients only
        self.now = 0  # their bytes
        self.clear()

    def clear(self):
        self.kernels = Counter()
        self.outputs = []
        self.reads = []
        self.uploads = []
        self.mixed = []
        self.traffic = 0
        self.peak = self.now

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function == torch.ops.prim.device.default:
            return torch.device('xla:0')
        kwargs = dict(kwargs or {})
        inputs = tensors_in((args, kwargs))
        is_on_gpu = any(isinstance(x, FakeTensor) for x in inputs)
        device = device_of(kwargs)
        goes_to_gpu = device is not None and device.type == 'cuda'
        if not is_on_gpu and not goes_to_gpu:
            return self.on_cpu(function, args, kwargs)
        if device is not None:
            kwargs['device'] = device
        kwargs.pop('generator', None)  # FakeTensorMode takes none
        name = function.overloadpacket.__name__
        if is_on_gpu and self.is_read(name, args, device):
            return self.read(name, args, kwargs)
        is_upload = name == '_to_copy' and not is_on_gpu
        if is_upload:
            is_pinned = hasattr(args[0], 'is_pinned_here')
            self.uploads.append((is_pinned, kwargs.get('non_blocking', False)))
        # A number on the CPU, such as a learning rate, goes with the kernel.
        on_cpu = [x for x in inputs if not isinstance(x, FakeTensor) and x.dim() > 0]
        if is_on_gpu and on_cpu:
            self.mixed.append((name, [(x.device, x.shape) for x in inputs]))
        result = function(*args, **kwargs)
        if is_upload:
            result.contents = args[0]
        self.note(function, name, inputs, tensors_in(result))
        return result

    def on_cpu(self, function, args, kwargs):
        """An operation on real tensors."""
        with unset_fake_temporarily():
            if function == aten._pin_memory.default:  # CUDA's driver would do it
                copy = args[0].clone()
                copy.is_pinned_here = True
                return copy
            return function(*args, **kwargs)

    def is_read(self, name, args, device):
        """Whether the host has to wait for a result of the GPU."""
        if name in HOST_READS:
            return True
        if name == 'copy_':
            return not isinstance(args[0], FakeTensor)
        if name == 'index':  # by truth values: how many are true?
            return any(x is not None and x.dtype == torch.bool for x in args[1])
        return name == '_to_copy' and device is not None and device.type == 'cpu'

    def read(self, name, args, kwargs):
        """Note a read, and give the host a plausible value: ones, or as many as there were."""
        self.reads.append(name)
        source = args[0]
        if name == 'index':
            (mask,) = args[1]
            with unset_fake_temporarily():
                count = int(mask.contents.sum())
            return source.flatten(0, mask.dim() - 1)[:count].clone()
        if name == 'copy_':
            with unset_fake_temporarily():
                return source.zero_()
        if name == '_to_copy':
            with unset_fake_temporarily():
                return torch.zeros(source.shape, dtype=kwargs.get('dtype') or source.dtype)
        if name in ('_local_scalar_dense', 'item'):
            return 1.0 if source.is_floating_point() else 1
        return True

    def note(self, function, name, inputs, results):
        """Note what an operation on the GPU reads, writes and keeps."""
        for storage in [x.untyped_storage() for x in results]:
            if id(storage) not in self.live:
                self.live.add(id(storage))
                weakref.finalize(storage, self.free, id(storage), storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        if function.is_view or name in NO_KERNEL:
            return
        self.kernels[name] += 1
        self.traffic += bytes_of(inputs) + bytes_of(results)
        self.outputs += [(name, x.dtype, tuple(x.shape)) for x in results]

    def free(self, key, size):
        self.live.discard(key)
        self.now -= size


class Autocast(TorchFunctionMode):
    """torch.autocast('cuda') for the fake GPU, whose tensors torch's own does not recognize.

    A test below compares the two. As there, a weight is rounded once and kept until the end.
    """

    ROUNDED = ('linear', 'matmul', '__matmul__', '__rmatmul__', 'attention', 'mm', 'bmm', 'baddbmm')
    EXACT = ('layer_norm', 'cross_entropy', 'softmax', 'log_softmax', 'cumsum', 'norm', 'pow')

    def __init__(self, ledger):
        super().__init__()
        self.ledger = ledger
        self.kept = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, '__name__', '')
        dtype = None
        if torch.is_autocast_enabled('cuda') and not self.ledger.has_autocast:
            if name in self.ROUNDED:
                dtype = torch.get_autocast_dtype('cuda')
            elif name in self.EXACT:
                dtype = torch.float32
        if dtype is not None:
            args, kwargs = tree_map(lambda leaf: self.cast(leaf, dtype), (args, kwargs))
        return function(*args, **(kwargs or {}))

    def cast(self, leaf, dtype):
        """A tensor of the GPU in another dtype; anything else as it is."""
        is_number = isinstance(leaf, FakeTensor) and leaf.is_floating_point()
        if not is_number or leaf.dtype == dtype:
            return leaf
        if not (leaf.is_leaf and leaf.requires_grad and dtype != torch.float32):
            return leaf.to(dtype)
        if id(leaf) not in self.kept:
            self.kept[id(leaf)] = leaf.to(dtype)
        return self.kept[id(leaf)]


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False):
    """F.scaled_dot_product_attention with the kernel that CUDA has for all dtypes."""
    if enable_gqa:
        times = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(times, 1)
        v = v.repeat_interleave(times, 1)
    assert q.dtype == k.dtype == v.dtype, 'one kernel takes one dtype'
    bias = None
    if attn_mask is not None:
        zeros = torch.zeros_like(attn_mask, dtype=q.dtype)
        bias = zeros.masked_fill(~attn_mask, -torch.inf).expand(*q.shape[:2], -1, -1)
    kernel = aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, bias, q.requires_grad, dropout_p, is_causal)[0]


@pytest.fixture
def gpu(monkeypatch):
    """A Ledger, entered, and all replaced that would ask a driver.

    To Python the device of a tensor is CUDA. To torch's C++ it is 'meta', whose backward pass needs
    no streams of a driver; with has_autocast it is 'xla', which torch.autocast('cuda') takes, too.
    """
    ledger = Ledger()
    autocast = Autocast(ledger)
    make_subclass = torch.Tensor._make_subclass
    clear_cache = torch.clear_autocast_cache

    def make(cls, data, require_grad=False, dispatch_device=False, **options):
        is_asked = ledger.has_autocast and dispatch_device
        return make_subclass(cls, data, require_grad, dispatch_device=is_asked, **options)

    def device_for_cpp(args):
        is_inside = args[0].fake_mode.in_kernel_invocation
        return torch.device('meta') if is_inside else torch.device('xla:0')

    def clear():
        autocast.kept.clear()
        clear_cache()

    monkeypatch.setattr(torch.Tensor, '_make_subclass', staticmethod(make))
    monkeypatch.setattr(torch, 'clear_autocast_cache', clear)
    # As C++ does it, one copy; FakeTensor's own reads each number.
    monkeypatch.setattr(FakeTensor, 'tolist', lambda self: self.cpu().tolist())
    handlers = torch._subclasses.fake_tensor._DISPATCH_META_HANDLERS
    monkeypatch.setitem(handlers, torch.ops.prim.device.default, device_for_cpp)
    # autocast and GradScaler switch themselves off where there is no CUDA.
    monkeypatch.setattr('torch.cuda.amp.common.amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: True)
    # C++ would look up which kernels the card has.
    monkeypatch.setattr(F, 'scaled_dot_product_attention', attention)
    # Nothing is drawn: a generator of a GPU needs the driver.
    cpu_generator = torch.Generator()
    monkeypatch.setattr(inference.torch, 'Generator', lambda device: cpu_generator)
    monkeypatch.setattr(parallel, 'world_size', 1)
    with autocast, ledger:
        yield ledger


def make_model(arch, **changes):
    """A small model on the fake GPU, whose loss is computed in chunks."""
    shape = {'n_layer': 2, 'n_head': 4, 'n_embd': 64, 'block_size': 32, 'vocab_size': 300}
    if arch != 'gpt2':
        shape['n_kv_head'] = 2
    with torch.device(GPU):
        model = GPT(GPTConfig(arch=arch, **(shape | changes)))
    model.max_logits = 2 * 16 * model.config.padded_vocab_size
    return model


def place(model, dtype=torch.float32):
    """Put a model on the fake GPU: model.to() cannot make a fake tensor of a real one in place."""
    made = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in made:
                weight = torch.empty(parameter.shape, dtype=dtype, device=GPU)
                made[parameter] = torch.nn.Parameter(weight)
            if parameter is not None:  # tied ones stay one
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=dtype, device=GPU)
    return model


def make_tokens(*shape):
    """Ids on the fake GPU."""
    return torch.zeros(shape, dtype=torch.int64, device=GPU)


def test_the_ledger_sees_reads_uploads_and_two_devices(gpu):
    x = torch.ones(3, 2, device=GPU)
    assert not x.is_cpu and x.device == torch.device(GPU) and not gpu.reads
    for read in (x.sum().item, x.cpu, x.tolist):
        read()
    assert gpu.reads == ['_local_scalar_dense', '_to_copy', '_to_copy']
    assert bool(x.any()) and torch.equal(x, x)
    x.new_tensor(1.0)
    torch.zeros(3, 2).copy_(x)
    assert gpu.reads[3:] == ['_local_scalar_dense', 'equal', 'copy_']
    mask = torch.tensor([True, False, True]).to(GPU)
    assert x[mask].shape == (2, 2) and gpu.reads[6:] == ['index']
    assert gpu.uploads[-1] == (False, False)
    runtime.to_device(GPU, torch.zeros(3))
    assert gpu.uploads[-1] == (True, True)
    x + torch.tensor(1.0)
    assert not gpu.mixed
    with contextlib.suppress(RuntimeError):
        x + torch.ones(3, 2)
    assert len(gpu.mixed) == 1


# A linear layer is one kernel or two, which is of no interest here.
LINEAR = ('addmm', 'mm', 'add', 'add_', 'mul', 't', 'scalar_tensor')


@pytest.mark.parametrize('dtype', ['bfloat16', pytest.param('float16', marks=pytest.mark.slow)])
@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_autocast_here_is_torchs_own(gpu, arch, dtype):
    """Without gradients torch's own can be had: the same kernels, dtypes and shapes."""

    def note(module, inputs, output):
        modules.append(output.dtype)

    modules = []
    found = []
    for has_autocast in (False, True):
        model = make_model(arch)
        gpu.has_autocast = has_autocast
        place(model).requires_grad_(False)  # again: tensors differ by it
        idx = make_tokens(2, 32)
        for module in model.modules():
            module.register_forward_hook(note)
        gpu.clear()
        modules.clear()
        with torch.no_grad(), runtime.make_autocast(GPU, dtype):
            model(idx, idx)
            model(idx)
        kernels = {(name, kind) for name, kind, _ in gpu.outputs if name not in LINEAR}
        found.append((list(modules), kernels))
    assert found[0] == found[1]
    assert getattr(torch, dtype) in found[0][0]


# -----------------------------------------------------------------------------
# train.py itself


@pytest.fixture
def train_on_gpu(sheep, run, monkeypatch, gpu):
    """Run train.py on the fake GPU; returns its reads: [(bars shown before, name), ...]."""

    def on_gpu(*args):
        steps = []
        reads = []
        note = gpu.read

        def read(name, *rest):
            reads.append((len(steps), name))
            return note(name, *rest)

        def distribute(model, device, *rest):
            return place(model)

        monkeypatch.setattr(gpu, 'read', read)
        monkeypatch.setattr(runtime, 'pick_device', lambda name: GPU)
        monkeypatch.setattr('optim.check_device', lambda *args: None)  # it reads on purpose
        monkeypatch.setattr(runtime, 'synchronize', lambda device: None)
        monkeypatch.setattr(runtime, 'peak_memory_gib', lambda device: 1.0)
        monkeypatch.setattr(runtime, 'peak_flops', lambda device, dtype: None)
        monkeypatch.setattr(parallel, 'init_process_group', lambda device, *rest: device)
        monkeypatch.setattr(parallel, 'distribute', distribute)
        monkeypatch.setattr('report.show_bar', lambda step, *rest, **more: steps.append(step))
        flags = ['--dataset=sheep', *TINY, '--compile=False', *args]
        result = run('train.py', *flags)
        assert result.code == 0, result.err
        return reads

    return on_gpu


@pytest.mark.parametrize(('arch', 'dtype'), CASES)
def test_a_run_reads_only_at_its_ends(train_on_gpu, gpu, monkeypatch, arch, dtype):
    monkeypatch.setitem(models.MAX_LOGITS, 'gpu', 2**14)  # in chunks
    flags = [f'--arch={arch}', f'--dtype={dtype}', '--optimizer=muon', '--max_iters=3']
    flags += ['--n_layer=1', '--eval_interval=100', '--average_frac=0.2']
    flags += ['--gradient_accumulation_steps=2', '--log_interval=100', '--dropout=0.1']
    if arch != 'gpt2':
        flags.append('--n_kv_head=1')
    reads = train_on_gpu(*flags)
    assert not gpu.mixed
    of_steps = [name for steps_done, name in reads if steps_done == 1 or steps_done == 2]
    assert not of_steps, 'the second and third step'
    # Before the first step: skipped steps, the evaluation at step 0.
    assert [name for steps_done, name in reads if steps_done == 0] == ['_to_copy'] * 2
    micro_batches = [upload for upload in gpu.uploads if upload == (True, True)]
    assert len(micro_batches) >= 3 * 2 * 2
    names = {'_fused_adamw_', 'baddbmm', '_scaled_dot_product_efficient_attention'}
    assert names <= gpu.kernels.keys()
    products = {kind for name, kind, _ in gpu.outputs if name in ('mm', 'addmm')}
    assert getattr(torch, dtype) in products
    assert ('_amp_foreach_non_finite_check_and_unscale_' in gpu.kernels) == (dtype == 'float16')


# -----------------------------------------------------------------------------
# evaluation, generation, checkpoints


@pytest.mark.parametrize(('arch', 'dtype'), CASES)
def test_evaluating_and_scoring_read_once_a_result(gpu, arch, dtype):
    model = make_model(arch)
    autocast = runtime.make_autocast(GPU, dtype)
    tokens = np.zeros(500, dtype=np.uint16)
    inference.evaluate_loss(model, tokens, 32, 2, autocast)
    assert gpu.reads == ['_to_copy'], 'one copy of all losses at the end'
    assert gpu.uploads == 16 * [(True, True)]
    gpu.clear()
    requests = [([1, 2, 3, 4], 2), ([1, 2, 3], 1), ([5, 6], 1)]
    scores = inference.log_likelihoods(model, requests, 2, autocast)
    assert scores.shape == (3, 2)
    # Where targets are, once; the two results.
    assert gpu.reads == ['index', '_to_copy', '_to_copy'] * 2, 'two batches'
    assert set(gpu.uploads) == {(True, True)}
    assert not gpu.mixed


SAMPLING = {'top_k': 5, 'top_p': 0.9, 'repetition_penalty': 1.3, 'temperature': 0.7}


@pytest.mark.parametrize(
    ('arch', 'dtype', 'sampling'),
    [
        ('gpt2', 'bfloat16', {'temperature': 0}),
        ('gpt2', 'bfloat16', {'top_p': 0.9}),
        ('gpt2', 'bfloat16', {'min_p': 0.1}),
        *[(arch, dtype, SAMPLING) for arch in ARCHITECTURES for dtype in DTYPES],
    ],
)
def test_generating_waits_for_nothing(gpu, arch, dtype, sampling):
    model = place(make_model(arch, block_size=8), getattr(torch, dtype)).eval()
    # The prompt, three tokens with the cache, and two of a window that slides.
    tokens = list(model.generate(make_tokens(2, 5), 6, **sampling))
    assert [token.shape for token in tokens] == 6 * [(2, 1)]
    assert all(isinstance(token, FakeTensor) for token in tokens)
    assert not gpu.reads and not gpu.mixed


def test_showing_a_text_reads_each_token_once(gpu):
    model = make_model('qwen3').eval()
    tokenizer = SimpleNamespace(
        prefix=[], end_of_text=None,
        encode_prompt=lambda text: [1, 2, 3], decode=lambda ids: 'x' * len(ids),
    )  # fmt: skip
    texts = inference.generate_text(model, tokenizer, 'xxx', 2, 12, top_k=5)
    assert [len(text.text) for text in texts] == [12, 12]
    assert gpu.reads == ['_to_copy'] * 12
    assert not gpu.mixed


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_a_checkpoint_is_a_copy_of_each_tensor(gpu, arch):
    model = make_model(arch)
    knobs = ('muon', 1e-3, (0.9, 0.95), 0.1, 0.02, (0.95, 0.95), 'bfloat16')
    optimizers = optim.make_optimizers(model, *knobs)
    model(make_tokens(2, 32), make_tokens(2, 32)).backward()
    for optimizer in optimizers:
        optimizer.step()
    gpu.clear()
    full_model, state = parallel.copy_to_cpu(model, optimizers)
    tensors = [tensor for values in state.values() for tensor in values.values()]
    tensors += full_model.parameters()
    assert {tensor.device.type for tensor in tensors} == {'cpu'}
    assert len(gpu.reads) == len(tensors) and not gpu.mixed
    assert state.keys() == dict(model.named_parameters()).keys()


# -----------------------------------------------------------------------------
# the loss

V, C = 50304, 768


def measure_loss(gpu, max_logits):
    """Forward and backward pass of the loss at 16 x 1,024 tokens: what it takes."""
    with torch.device(GPU):
        model = GPT(GPTConfig(n_layer=1, n_head=12, n_embd=C, vocab_size=V))
    model.max_logits = max_logits
    hidden = torch.zeros(16, 1024, C, device=GPU, requires_grad=True)
    targets = make_tokens(16, 1024)
    gpu.clear()
    before = gpu.now
    with runtime.make_autocast(GPU, 'bfloat16'):
        loss = model.loss(hidden, targets)
    loss.backward()
    assert hidden.grad.shape == hidden.shape and model.wte.weight.grad.shape == (V, C)
    assert not gpu.reads and not gpu.mixed
    return SimpleNamespace(
        kernels=gpu.kernels.total(),
        gigabytes=gpu.traffic / 1e9,
        peak=(gpu.peak - before) / 1e9,
        heights=[shape[0] for name, _, shape in gpu.outputs if name == 'mm' and shape[1] == V],
    )


# Of a micro-batch, measured: kernels, GB read and written, and GB alive at the peak.
TAKES = {
    24: (1930, 126.6, 0.449), 26: (400, 63.5, 0.819), 27: (205, 55.5, 1.329),
    28: (115, 51.8, 2.356), 29: (70, 49.9, 4.513),
}  # fmt: skip


@pytest.mark.parametrize('exponent', [pytest.param(24, marks=pytest.mark.slow), 26, 27, 28, 29])
def test_what_the_loss_takes(gpu, exponent):
    taken = measure_loss(gpu, 2**exponent)
    kernels, gigabytes, peak = TAKES[exponent]
    assert taken.kernels <= 1.02 * kernels
    assert taken.gigabytes <= 1.02 * gigabytes
    assert taken.peak <= 1.02 * peak
    assert sum(taken.heights) == 16 * 1024
    assert len(set(taken.heights[:-1])) == 1 and taken.heights[0] % 128 == 0
    assert taken.heights[0] * V <= 2**exponent / 2, 'as many again are gradients'


# -----------------------------------------------------------------------------
# precision


def wide_dtypes(gpu):
    """The dtypes of the tensors that are as wide as the vocabulary."""
    return {dtype for _, dtype, shape in gpu.outputs if len(shape) > 1 and shape[-1] == 320}


@pytest.mark.parametrize('max_logits', [None, 2**13])
@pytest.mark.parametrize(('arch', 'dtype'), [('gpt2', 'bfloat16'), ('qwen3', 'float16')])
def test_evaluations_are_exact_and_training_is_fast(gpu, arch, dtype, max_logits):
    model = make_model(arch)
    model.max_logits = max_logits
    idx = make_tokens(2, 32)
    autocast = runtime.make_autocast(GPU, dtype)
    with autocast:
        model(idx, idx).backward()
    assert wide_dtypes(gpu) == {torch.float32, getattr(torch, dtype)}
    for reduction in ('mean', 'none'):
        gpu.clear()
        model.eval()
        with torch.no_grad(), autocast:
            loss = model(idx, idx, reduction)
        assert loss.dtype == torch.float32
        assert wide_dtypes(gpu) == {torch.float32}
    gpu.clear()
    inference.log_likelihoods(model, [([1, 2, 3, 4], 2)], 1, autocast)
    assert wide_dtypes(gpu) == {torch.float32}


@pytest.mark.parametrize(
    ('device', 'dtype'),
    [(GPU, 'bfloat16'), (GPU, 'float16'), ('cpu', 'bfloat16'), ('cpu', 'float32')],
)
def test_muon_computes_and_sends_in_its_dtype(gpu, monkeypatch, device, dtype):
    def all_gather(result, own):
        assert result.is_contiguous() and own.is_contiguous()
        gathered.append((result.dtype, own.dtype, result.device))

    gathered = []
    products = []
    baddbmm = torch.baddbmm

    def noted(*args, **options):
        products.append(baddbmm(*args, **options))
        return products[-1]

    monkeypatch.setattr(torch, 'baddbmm', noted)
    monkeypatch.setattr(parallel, 'world_size', 2)
    monkeypatch.setattr(dist, 'all_gather_into_tensor', all_gather)
    monkeypatch.setattr(dist, 'all_gather_single', all_gather, raising=False)
    parameters = [torch.nn.Parameter(torch.ones(64, 32, device=device)) for _ in range(3)]
    muon = optim.Muon([{'params': parameters, 'out_sizes': (32, 32)}], dtype=dtype)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    muon.step()
    expected = getattr(torch, dtype)
    assert gathered == [(expected, expected, torch.device(device))], 'all six at once'
    assert {product.dtype for product in products} == {expected}
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert not gpu.reads and not gpu.mixed

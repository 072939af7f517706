"""Worlds of 8 and of 64 GPUs, simulated in one process: what a rank sends, and what it holds.

The fake process group of torch runs one rank. Its collectives move nothing, but their number, their
bytes and what they are given are those of a real run, and so is the memory of the rank. What is
expected is written out as arithmetic from the sizes of the model. The device is the CPU.
"""

import contextlib
import math
import warnings
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # lets collectives take fake tensors
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed import device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

import optim
import parallel
from model import GPT, MAX_LOGITS, Attention, GPTConfig
from runtime import make_autocast

SHAPES = {
    'gpt2': {'arch': 'gpt2', 'n_head': 4},
    'qwen3': {'arch': 'qwen3', 'n_head': 4, 'n_kv_head': 2},
}
SHAPE = {'n_layer': 3, 'n_embd': 64, 'vocab_size': 500, 'block_size': 16}
# How a model is distributed: (ranks, fsdp, replicas, activation checkpointing).
WAYS = {
    'ddp8': (8, False, 1, False),
    'fsdp8': (8, True, 1, False),
    'fsdp64': (64, True, 1, False),
    'fsdp8-recomputing': (8, True, 1, True),
    'hsdp8': (8, True, 2, False),
    'hsdp64': (64, True, 8, True),
}
MICRO_STEPS = 2
KINDS = {  # of collectives, by the names that torch has for them
    'c10d._allgather_base_': 'gather',
    'c10d._reduce_scatter_base_': 'scatter',
    'c10d.allreduce_': 'reduce',
    '_c10d_functional.all_gather_into_tensor': 'gather',
    '_c10d_functional.reduce_scatter_tensor': 'scatter',
    '_c10d_functional.all_reduce': 'reduce',
    '_c10d_functional.all_reduce_': 'reduce',
    'c10d.broadcast_': 'broadcast',
}
LOCAL = ('_c10d_functional.wait_tensor', '_c10d_functional._wrap_tensor_autograd')
NO_BYTES = 64  # a collective of at most so many is a number: the loss


# -----------------------------------------------------------------------------
# a world, a model in it, a step


@contextlib.contextmanager
def simulated_world(ranks, rank=0):
    """A process that believes to be one of many, and is told so by parallel.py."""
    store = FakeStore()
    dist.init_process_group('fake', rank=rank, world_size=ranks, store=store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, 'launched', True)
        patch.setattr(parallel, 'rank', rank)
        patch.setattr(parallel, 'world_size', ranks)
        try:
            yield
        finally:
            dist.destroy_process_group()


@pytest.fixture
def world():
    """world(ranks, rank=0): be one rank of a simulated world until the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(simulated_world(*args, **kwargs))


@pytest.fixture
def gpu_norms(monkeypatch):
    """CUDA's autocast computes LayerNorm in float32, weights as well; the CPU's leaves it alone.

    And CUDA's attention is in 16 bits.
    """
    layer_norm = torch.nn.functional.layer_norm

    def in_float32(x, shape, weight, bias, eps):
        if torch.is_autocast_enabled('cpu'):
            x = x.float()
            weight = weight.float()
            bias = bias.float()
        return layer_norm(x, shape, weight, bias, eps)

    monkeypatch.setattr(torch.nn.functional, 'layer_norm', in_float32)
    monkeypatch.setattr(Attention, 'upcasts', False)


def make_model(arch):
    """A small model of random weights."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE, **SHAPES[arch]))


def make_optimizers(model, optimizer, dtype):
    betas = (0.9, 0.95)
    return optim.make_optimizers(model, optimizer, 1e-3, betas, 0.1, 0.02, betas, dtype)


def distribute(model, way, dtype):
    """The model to train, in one of the WAYS."""
    _, fsdp, replicas, recomputes = WAYS[way]
    if recomputes:
        model.checkpoint_activations()
    train_model = parallel.distribute(model, 'cpu', dtype, fsdp, replicas)
    if not fsdp:
        # What DDP does by itself, in Python: in the fake group its own has no result to wait for.
        train_model.register_comm_hook(None, reduce_bucket)
    return train_model


def reduce_bucket(_, bucket):
    """Sum up a bucket of DDP's gradients."""
    dist.all_reduce(bucket.buffer())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def tokens(shape=SHAPE, batch_size=2):
    return torch.zeros(batch_size, shape['block_size'], dtype=torch.int64)


def micro_step(train_model, dtype, is_last, idx):
    """One micro-step of train.py."""
    parallel.sync_gradients(train_model, is_last)
    with make_autocast('cpu', dtype):
        loss = train_model(idx, idx)
    (loss * parallel.world_size).backward()
    return loss.detach()


def update(model, optimizers, loss):
    """What train.py does after the micro-steps."""
    loss = parallel.all_reduce_sum(loss)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    grad_norm = parallel.full_tensor(grad_norm)
    skip = torch.zeros(())
    for optimizer in optimizers:
        optimizer.found_inf = parallel.replicate_like(skip, model.wte.weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def training_step(model, train_model, optimizers, dtype, idx):
    """One step of train.py."""
    loss = torch.zeros(())
    for n in range(MICRO_STEPS):
        loss += micro_step(train_model, dtype, n == MICRO_STEPS - 1, idx)
    update(model, optimizers, loss)


# -----------------------------------------------------------------------------
# what is watched


class Collectives(TorchDispatchMode):
    """Note all collectives, whoever starts them: (kind, bytes of the whole) and their tensors."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # until it is taken apart
        result = function(*args, **(kwargs or {}))
        name = str(function.overloadpacket)
        if 'c10d' in name and name not in LOCAL:
            leaves = tree_leaves((args, result))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            self.tensors += [(name, tensor) for tensor in tensors]
            size = max(tensor.nbytes for tensor in tensors)
            self.found.append((KINDS[name], size))
        return result

    def table(self):
        """{kind: [number, bytes]} of all that is more than a number; 'numbers': how many are."""
        counted = {}
        for kind, size in self.found:
            kind = 'numbers' if size <= NO_BYTES else kind
            count, total = counted.get(kind, (0, 0))
            counted[kind] = (count + 1, total + size)
        return counted


class Live(TorchDispatchMode):
    """Count the bytes of live tensors, `now` and at their `peak`; FSDP resizes some in place."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}  # of each storage, by id
        self.fake = active_fake_mode()

    def __enter__(self):
        self.resize = torch.UntypedStorage.resize_
        live = self

        def resize(storage, size):
            result = live.resize(storage, size)
            live.see(storage)
            return result

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *args):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*args)

    def see(self, storage):
        """Count a storage, or its new size."""
        key = id(storage)
        if key not in self.sizes:
            self.sizes[key] = 0
            weakref.finalize(storage, self.free, key)
        self.now += storage.nbytes() - self.sizes[key]
        self.sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def see_all(self, tensors):
        """Count what is there already, and return the bytes of all."""
        for tensor in tensors:
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self.see(tensor.untyped_storage())
        return self.now

    def free(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if self.fake and function is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # of a fake tensor it makes a second one
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # DTensor finds out shapes with a fake mode of its own: those tensors are not there.
            is_ours = getattr(leaf, 'fake_mode', None) is self.fake
            is_tensor = isinstance(leaf, torch.Tensor) and not is_traceable_wrapper_subclass(leaf)
            if is_ours and is_tensor and not leaf.is_meta:
                self.see(leaf.untyped_storage())
        return result


def padded(tensor, shards):
    """Elements of a tensor whose rows are made a multiple of the shards."""
    rows = math.ceil(len(tensor) / shards) * shards
    return rows * tensor[0].numel()


def groups(model):
    """The parameters that are gathered together: of each block, and of all around them."""
    blocks = [list(block.parameters()) for block in model.blocks]
    around = [p for name, p in model.named_parameters() if not name.startswith('blocks.')]
    return blocks, around


# -----------------------------------------------------------------------------
# 1 and 2: what is sent


def expected_traffic(model, way, optimizer, dtype):
    """{kind: (number, bytes)} of a step, from the shapes of an undistributed model."""
    ranks, fsdp, replicas, _ = WAYS[way]
    shards = ranks // replicas
    itemsize = getattr(torch, dtype).itemsize
    blocks, around = groups(model)
    counted = Counter()
    total = Counter()

    if fsdp:
        of_blocks = sum(padded(p, shards) for block in blocks for p in block)
        of_rest = sum(padded(p, shards) for p in around)
        # A block for the forward and for the backward pass, the rest stays in between.
        counted['gather'] += MICRO_STEPS * (2 * len(blocks) + 1)
        total['gather'] += MICRO_STEPS * (2 * itemsize * of_blocks + 4 * of_rest)
        counted['scatter'] += MICRO_STEPS * (len(blocks) + 1)
        total['scatter'] += MICRO_STEPS * 4 * (of_blocks + of_rest)
        counted['reduce'] += 1
        total['reduce'] += 4 * len(list(model.parameters()))  # the norms of the gradients
        if replicas > 1:  # once in a step
            counted['reduce'] += len(blocks) + 1
            total['reduce'] += 4 * (of_blocks + of_rest) // shards
    else:
        counted['reduce'] += 1  # one bucket: the model is small
        total['reduce'] += 4 * sum(p.numel() for p in model.parameters())

    if optimizer == 'muon':
        shapes = Counter()  # of the matrices: those of a shape are gathered together
        for group in optim.parameter_groups(model, 0.0):
            if 'out_sizes' not in group:
                continue
            parameters = group['params']
            if fsdp:  # the directions, in float32
                counted['gather'] += len(parameters)
                total['gather'] += 4 * sum(padded(p, shards) for p in parameters)
            for rows in group['out_sizes']:
                shapes[rows, parameters[0].shape[1]] += len(parameters)
        for shape, n_matrices in shapes.items():
            with_padding = math.ceil(n_matrices / ranks) * ranks
            counted['gather'] += 1
            total['gather'] += itemsize * with_padding * math.prod(shape)
    return {kind: (counted[kind], total[kind]) for kind in counted}


def watched_step(arch, way, optimizer, dtype, monkeypatch):
    """The Collectives of the second step, and what is expected of it."""
    model = make_model(arch)
    expected = expected_traffic(model, way, optimizer, dtype)
    train_model = distribute(model, way, dtype)
    optimizers = make_optimizers(model, optimizer, dtype)
    for _ in range(2):  # in its second step DDP tells the others how it has sorted its buckets
        training_step(model, train_model, optimizers, dtype, tokens())
    with Collectives() as collectives:
        training_step(model, train_model, optimizers, dtype, tokens())
    return collectives, expected


@pytest.mark.parametrize('arch', ['qwen3', pytest.param('gpt2', marks=pytest.mark.slow)])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('dtype', ['bfloat16', pytest.param('float32', marks=pytest.mark.slow)])
@pytest.mark.parametrize('way', WAYS)
def test_a_step_sends_what_arithmetic_says(
    world, gpu_norms, monkeypatch, way, dtype, optimizer, arch
):
    world(WAYS[way][0])
    collectives, expected = watched_step(arch, way, optimizer, dtype, monkeypatch)
    for name, tensor in collectives.tensors:
        assert tensor.is_contiguous(), f'NCCL refuses it: {name}'
        assert tensor.device.type == 'cpu', name
    found = collectives.table()
    assert found.pop('numbers') == (1, 4), 'the loss'
    assert found == expected


# -----------------------------------------------------------------------------
# 3: gradients between two micro-steps


@pytest.mark.parametrize('way', ['fsdp8', 'fsdp64', 'fsdp8-recomputing', 'hsdp8', 'hsdp64'])
def test_between_micro_steps_gradients_are_sharded(world, monkeypatch, way):
    ranks, _, replicas, _ = WAYS[way]
    world(ranks)
    model = make_model('qwen3')
    shards = ranks // replicas
    share = sum(4 * padded(p, shards) // shards for p in model.parameters())
    train_model = distribute(model, way, 'bfloat16')
    optimizers = make_optimizers(model, 'adamw', 'bfloat16')
    idx = tokens()
    training_step(model, train_model, optimizers, 'bfloat16', idx)
    with Live() as live:
        before = live.see_all([idx, *model.parameters()])
        held = []
        for _ in range(3):
            micro_step(train_model, 'bfloat16', False, idx)
            held.append(live.now - before)
    assert held == [share] * 3, 'and nothing else is left of a micro-step'
    for parameter in model.parameters():
        if parameter.grad is not None:  # HSDP keeps them to itself until they are averaged
            assert parameter.grad.dtype == torch.float32
            assert len(parameter.grad.to_local()) <= math.ceil(len(parameter) / shards)


# -----------------------------------------------------------------------------
# 4: dtypes


def dtypes_of_blocks(model, train_model):
    """What goes into each block and comes out, and the dtypes of the loss and of gradients."""
    seen = []

    def watch(block, args, output):
        leaves = tree_leaves((args, output))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        seen.append([(tuple(tensor.shape), tensor.dtype) for tensor in tensors])

    def watch_gradient(block, _, gradients):
        seen.append([(tuple(gradient.shape), gradient.dtype) for gradient in gradients])

    for block in model.blocks:
        block.register_forward_hook(watch)
        block.register_full_backward_hook(watch_gradient)
    model.norm_f.register_forward_hook(watch)
    loss = micro_step(train_model, 'bfloat16', True, tokens())
    return seen, loss.dtype, [parameter.grad.dtype for parameter in model.parameters()]


@pytest.mark.parametrize('arch', SHAPES)
@pytest.mark.parametrize('way', ['ddp8', 'fsdp8', 'fsdp8-recomputing', 'hsdp64'])
def test_dtypes_between_blocks_are_those_of_autocast(world, gpu_norms, way, arch):
    alone = make_model(arch)
    expected = dtypes_of_blocks(alone, alone)
    world(WAYS[way][0])
    model = make_model(arch)
    train_model = distribute(model, way, 'bfloat16')
    assert dtypes_of_blocks(model, train_model) == expected
    seen, loss_dtype, gradient_dtypes = expected
    n_layer = SHAPE['n_layer']
    of_block = 2 if arch == 'gpt2' else 4  # x and the output; cos and sin
    assert [len(tensors) for tensors in seen[:n_layer]] == [of_block] * n_layer
    dtypes = {dtype for tensors in seen for _, dtype in tensors}
    assert dtypes | {loss_dtype, *gradient_dtypes} == {torch.float32}


# -----------------------------------------------------------------------------
# 5: the whole state


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('rank', [0, 3])
def test_the_whole_state_is_on_rank_0_alone(world, monkeypatch, rank, optimizer):
    world(8, rank)
    model = make_model('qwen3')
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    largest = max(parameter.nbytes for parameter in model.parameters())
    train_model = parallel.distribute(model, 'cpu', 'bfloat16', fsdp=True)
    optimizers = make_optimizers(model, optimizer, 'bfloat16')
    training_step(model, train_model, optimizers, 'bfloat16', tokens())
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    with Live() as live:
        before = live.see_all([*model.parameters(), *tree_leaves(states)])
        full_model, state = parallel.copy_to_cpu(model, optimizers)
    if rank > 0:
        assert full_model is None
        assert state == {}
        assert live.now == before, 'nothing stays'
        own_share = largest // 8  # what all-gather sends may be a copy, by the way torch takes
        assert largest <= live.peak - before <= largest + own_share, 'one whole tensor at a time'
        return
    full_shapes = {name: tensor.shape for name, tensor in full_model.named_parameters()}
    assert full_shapes == shapes
    assert state.keys() == shapes.keys()
    for name, tensors in state.items():
        has_moments = optimizer == 'adamw' or not is_muons(model, name)
        expected = {'momentum_buffer', 'row_squares'}
        if has_moments:
            expected = {'exp_avg', 'exp_avg_sq', 'step'}
        assert tensors.keys() == expected, name
        small = {'step': (), 'row_squares': (shapes[name][0], 1)}
        for key, tensor in tensors.items():
            assert type(tensor) is torch.Tensor
            assert tensor.shape == small.get(key, shapes[name])


def is_muons(model, name):
    """Whether Muon trains a parameter: a matrix in a block."""
    return name.startswith('blocks.') and model.get_parameter(name).dim() == 2


# -----------------------------------------------------------------------------
# 6: sharded, then moved


def test_blocks_are_sharded_one_by_one_before_they_move(world, monkeypatch):
    world(8)
    model = make_model('qwen3')
    blocks, around = groups(model)
    calls = []
    fully_shard = torch.distributed.fsdp.fully_shard

    def watched(module, **options):
        # What is not sharded yet comes to the device now, to be cut there.
        whole = [p for p in module.parameters() if not isinstance(p, DTensor)]
        calls.append((module, sum(p.numel() for p in whole)))
        return fully_shard(module, **options)

    def refuse(module, *args, **kwargs):
        raise AssertionError(f'{type(module).__name__} is moved as a whole')

    monkeypatch.setattr(torch.distributed.fsdp, 'fully_shard', watched)
    for name in ('to', 'cuda', 'cpu', '_apply'):
        monkeypatch.setattr(torch.nn.Module, name, refuse)
    modules = [*model.blocks, model]
    expected = []
    for module, group in zip(modules, (*blocks, around), strict=True):
        expected.append((module, sum(p.numel() for p in group)))
    parallel.distribute(model, 'cpu', 'bfloat16', fsdp=True)
    assert calls == expected
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


# -----------------------------------------------------------------------------
# the memory of a rank


def simulated_peak(shape, knobs, world_size, activation_checkpointing=False, fsdp_replicas=1):
    """Return {what: bytes} that a rank holds under FSDP, found with tensors that take no memory.

    shape: a GPTConfig. knobs: optimizer, dtype, batch_size and block_size. The peak is that of the
    second step, of two micro-steps; in the first one the state of the optimizers is made.
    """
    dtype = knobs['dtype']
    init_device_mesh = device_mesh.init_device_mesh

    def real_mesh(*args, **kwargs):  # it reads its ranks
        with unset_fake_temporarily():
            return init_device_mesh(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(simulated_world(world_size))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(device_mesh, 'init_device_mesh', real_mesh)
        patch.setattr(Attention, 'upcasts', False)
        stack.enter_context(warnings.catch_warnings(action='ignore'))
        stack.enter_context(FakeTensorMode())
        model = GPT.blank(replace(shape))
        model.max_logits = MAX_LOGITS['gpu']
        if activation_checkpointing:
            model.checkpoint_activations()
        train_model = parallel.distribute(model, 'cpu', dtype, True, fsdp_replicas)
        optimizers = make_optimizers(model, knobs['optimizer'], dtype)
        idx = tokens({'block_size': knobs['block_size']}, knobs['batch_size'])
        live = stack.enter_context(Live())
        held = {'weights': live.see_all(model.parameters())}
        before = live.now
        for is_first in (True, False):
            live.peak = live.now
            loss = micro_step(train_model, dtype, is_first, idx)
            if not is_first:
                gradients = live.now - before
                loss += micro_step(train_model, dtype, True, idx)
            update(model, optimizers, loss)
            del loss
            before = live.now
        held['gradients'] = gradients
        held['optimizer'] = before - held['weights']
        held['peak'] = live.peak
    return held


@pytest.mark.parametrize('world_size', [8, pytest.param(64, marks=pytest.mark.slow)])
def test_a_rank_holds_its_share_of_a_large_model(world_size):
    shape = GPTConfig(
        arch='llama', n_layer=4, n_head=32, n_embd=4096, intermediate_size=11008, vocab_size=32000,
        tie_weights=False, block_size=4096,
    )  # fmt: skip
    knobs = {'optimizer': 'adamw', 'dtype': 'bfloat16', 'batch_size': 1, 'block_size': 4096}
    held = simulated_peak(shape, knobs, world_size, activation_checkpointing=True)
    with torch.device('meta'):
        model = GPT(shape)
    share = 4 * sum(p.numel() for p in model.parameters()) / world_size
    assert held['weights'] == share
    assert held['gradients'] == pytest.approx(share, rel=1e-3)
    assert held['optimizer'] == pytest.approx(2 * share, rel=1e-3)
    # Of what is gathered: all around the blocks, with its gradients, and those being sent.
    _, around = groups(model)
    gathered = 3 * 4 * sum(p.numel() for p in around)
    assert held['peak'] < 4 * share + 1.5 * gathered


def test_gpt2_is_sharded_in_bfloat16_on_a_cpu_too(world):
    world(8)
    model = make_model('gpt2')
    train_model = parallel.distribute(model, 'cpu', 'bfloat16', fsdp=True)
    micro_step(train_model, 'bfloat16', True, tokens())


def norm_dtypes(model, train_model):
    """The dtypes of the weights of the norms in the blocks, as they are used."""
    seen = {}
    for name, module in model.blocks.named_modules():
        if 'norm' in name:
            module.register_forward_pre_hook(
                lambda module, _, name=name: seen.update({name: module.weight.dtype})
            )
    micro_step(train_model, 'bfloat16', True, tokens())
    return seen


def test_norms_in_blocks_have_their_weights_rounded(world):
    alone = make_model('qwen3')
    expected = norm_dtypes(alone, alone)
    assert set(expected.values()) == {torch.float32}
    world(8)
    model = make_model('qwen3')
    train_model = parallel.distribute(model, 'cpu', 'bfloat16', fsdp=True)
    seen = norm_dtypes(model, train_model)
    assert seen.keys() == expected.keys()
    assert set(seen.values()) == {torch.bfloat16}, 'as parallel.shard_blocks says'

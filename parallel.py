"""Distributed training: process group, DDP, FSDP2, and the few collectives the trainer needs.

torchrun starts the processes and sets RANK, LOCAL_RANK, WORLD_SIZE and the address where they meet.
Without it there is one process, and everything here does nothing. Tensors on the CPU go through
gloo, those on a GPU through its own backend, NCCL on CUDA.

FSDP2 is imported where it is used, since that takes a second. What it has sharded is known by its
methods: a tensor by full_tensor, a module by reshard.
"""

import math
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from runtime import UserError

launched = 'RANK' in os.environ  # by torchrun
rank = int(os.environ.get('RANK', 0))
world_size = int(os.environ.get('WORLD_SIZE', 1))

_pending = None  # (handle, tensor) of the all-reduce that async_max() has started and not read yet


# -----------------------------------------------------------------------------
# start and end


def check_division(micro_steps, processes):
    """Raise UserError unless every process gets the same number of micro-batches."""
    rest = micro_steps % processes
    if rest:
        below = micro_steps - rest
        nearest = f'{below} or {below + processes}' if below else f'{processes}'
        problem = f'gradient_accumulation_steps={micro_steps} cannot be divided over'
        raise UserError(f'{problem} {processes} processes: use {nearest}.')


def init_process_group(device, backend, micro_steps):
    """Connect to the other processes and return the device of this one.

    backend: 'nccl', 'gloo', or None for the device's own. micro_steps: per step, of all processes
    together. Raises UserError where this cannot work.
    """
    kind = torch.device(device).type
    if not launched:
        # 'cuda:1' has to become the current device; 'cuda' is the current one.
        if kind in ('cuda', 'xpu') and torch.device(device).index is not None:
            torch.get_device_module(kind).set_device(device)
        return device

    check_division(micro_steps, world_size)
    if kind == 'mps':
        raise UserError("device='mps' is for one process only: use --device=cpu with torchrun.")
    if backend == 'nccl' and kind != 'cuda':
        raise UserError(f"backend='nccl' needs CUDA, and the device is {kind}: use --backend=gloo.")
    backends = 'gloo'
    if kind != 'cpu':
        backends = f'cpu:gloo,{kind}:{backend or dist.get_default_backend_for_device(kind)}'
    try:
        # On one machine torchrun's own store outlives processes that it starts again, which would
        # look for each other at the addresses of before. (For several see config/slurm.sh.)
        options = {}
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        if attempt != '0' and os.environ.get('LOCAL_WORLD_SIZE') == str(world_size):
            store = dist.PrefixStore(attempt, next(dist.rendezvous('env://'))[0])
            options = {'store': store, 'rank': rank, 'world_size': world_size}
        dist.init_process_group(backends, **options)
    except (RuntimeError, ValueError) as error:  # torch.distributed's own errors are RuntimeErrors
        raise UserError(f'The processes cannot connect: {str(error).splitlines()[0]}') from None
    return device


def wait_for_all():
    """Wait until all processes have come here."""
    if launched:
        dist.barrier()


def exit(status):
    """Wait for all processes, then exit with `status`. Does nothing in a single process."""
    if not launched:
        return
    if _pending is not None:
        _pending[0].wait()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit(): gloo's threads, which a mesh keeps alive, sometimes abort while the
    # interpreter shuts down.
    os._exit(status)


# -----------------------------------------------------------------------------
# collectives


def all_reduce_sum(tensor):
    """Sum a tensor over all processes, in place, and return it."""
    if world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def check_same_everywhere(values):
    """Raise UserError unless every process has the same values, a dict {name: value}."""
    if world_size == 1:
        return
    gathered = [None] * world_size  # one dict per rank
    dist.all_gather_object(gathered, values)
    for name in values:
        expected = gathered[0].get(name)
        for other_rank, other_values in enumerate(gathered):
            value = other_values.get(name)
            if value != expected:
                differing = f'{expected!r} on rank 0 and {value!r} on rank {other_rank}'
                raise UserError(f'All processes need the same options: {name} is {differing}.')


def async_max(number):
    """Return the maximum over all processes, one call late, so that it never blocks.

    It is that of the numbers in everybody's previous call, 0 in the first, and the same everywhere.
    """
    global _pending
    if world_size == 1:
        return number
    answer = 0
    if _pending is not None:
        work, maximum = _pending
        work.wait()
        answer = int(maximum)
    maximum = torch.tensor(number)
    work = dist.all_reduce(maximum, dist.ReduceOp.MAX, async_op=True)
    _pending = (work, maximum)
    return answer


def split_over_processes(function, tensors):
    """Compute function of a stack of tensors, each by itself, in each process of a part of them."""
    if world_size == 1:
        return function(torch.stack(tensors))
    rows = math.ceil(len(tensors) / world_size)  # per process: all-gather needs the same from each
    own = tensors[rank * rows : (rank + 1) * rows]
    padding = [torch.zeros_like(tensors[0])] * (rows - len(own))
    # NCCL takes no transposed tensor, gloo does.
    own_result = function(torch.stack(own + padding)).contiguous()
    result = own_result.new_empty(rows * world_size, *own_result.shape[1:])
    all_gather = getattr(dist, 'all_gather_single', None)  # its name since torch 2.13
    all_gather = all_gather or dist.all_gather_into_tensor
    all_gather(result, own_result)
    return result[: len(tensors)]


# -----------------------------------------------------------------------------
# DDP and FSDP


def distribute(model, device, dtype, fsdp=False, fsdp_replicas=1):
    """Put a model on the device; return the one to train, which is replicated (DDP) or sharded.

    FSDP2 shards in place, block by block, so that no device has all of it. fsdp_replicas: groups of
    processes, each of which shards the model among its members (HSDP); ranks that follow each other
    are in one group. Raises UserError where this cannot work.
    """
    if fsdp and not launched:
        raise UserError('fsdp=True is for several processes: start them with torchrun.')
    if fsdp and dtype == 'float16':
        raise UserError('fsdp=True is for float32 and bfloat16, not for float16.')
    if fsdp_replicas > 1 and not fsdp:
        raise UserError(f'fsdp_replicas={fsdp_replicas} is for fsdp=True.')
    if world_size % fsdp_replicas:
        raise UserError(f'fsdp_replicas={fsdp_replicas} must divide the {world_size} processes.')
    if fsdp:
        shard_blocks(model, torch.device(device).type, getattr(torch, dtype), fsdp_replicas)
        return model
    model.to(device)
    if not launched:
        return model
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False  # the only one, pad_mask, never changes
    return ddp


def shard_blocks(model, device_type, dtype, replicas):
    """Shard a model by FSDP2, and move it to the devices.

    It computes what DDP does under autocast, but for one thing: weights of norms in the blocks are
    rounded to 16 bits, too. The embeddings, and with them what flows from block to block, the
    rotary positions, and all gradients that are summed up, stay in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dimensions = {'replicate': replicas, 'shard': world_size // replicas}
    if replicas == 1:
        del dimensions['replicate']
    shape = tuple(dimensions.values())
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=tuple(dimensions))
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def compile_blocks(model):
    """Compile each block: FSDP's hooks leave the blocks to Python, and checkpoint() hides them."""
    for block in model.blocks:
        block.forward = torch.compile(block.forward)


def sync_gradients(train_model, on):
    """Set whether the next backward pass averages the gradients over the processes.

    Sharded ones are averaged in each: until then a process would hold all of them, unsharded. What
    can wait is their average over the groups of fsdp_replicas.
    """
    if isinstance(train_model, DistributedDataParallel):
        train_model.require_backward_grad_sync = on
    elif is_sharded(train_model):
        train_model.set_requires_all_reduce(on)


def is_sharded(model):
    return hasattr(model, 'reshard')


def reshard(model):
    """Drop the outermost parameters of a sharded model, which an evaluation leaves gathered."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()


def full_tensor(tensor):
    """Gather a sharded tensor; return any other one as it is."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def shard_like(tensor, parameter):
    """Shard a tensor, the same in every process, as a parameter is sharded."""
    if not hasattr(parameter, 'full_tensor'):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    return distribute_tensor(tensor, mesh, parameter.placements, src_data_rank=None)


def replicate_like(number, parameter):
    """Return a number, the same in every process, as the parameter's optimizer takes it."""
    if not hasattr(parameter, 'full_tensor'):
        return number
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    return DTensor.from_local(number, mesh, [Replicate()] * mesh.ndim)


# -----------------------------------------------------------------------------
# what a checkpoint holds: everything in one piece, whatever the number of processes


def local_parts(model):
    """Return what this process holds of each parameter, as tensors that share its memory."""
    parts = [parameter.detach() for parameter in model.parameters()]
    return [part.to_local() if hasattr(part, 'to_local') else part for part in parts]


def copy_to_cpu(model, optimizers):
    """Copy what is trained to rank 0's CPU, whole: (GPT, state of the optimizers).

    The state is {name of the parameter: {name: tensor}}. Other processes get (None, {}), but must
    call it: sharded tensors are gathered one after the other, so that no device has all of them.
    """
    reshard(model)
    is_main = rank == 0
    full_model = model.blank_copy() if is_main else None
    state = {}
    for name, parameter in model.named_parameters():
        weight = full_tensor(parameter.detach())
        if is_main:
            full_model.get_parameter(name).detach().copy_(weight)
        del weight  # before the next one is gathered
        for optimizer in optimizers:
            for key, tensor in optimizer.state.get(parameter, {}).items():
                tensor = full_tensor(tensor)
                if is_main:
                    state.setdefault(name, {})[key] = tensor.to('cpu', copy=True)
    return full_model, state


def whole_model(model, device):
    """Gather a sharded model for rank 0: on its device, or on the CPU where that has no room."""
    full_model, _ = copy_to_cpu(model, [])
    if rank == 0:
        try:
            full_model.to(device)
        except torch.OutOfMemoryError:  # slow, but there it has room
            full_model.to('cpu')
    return full_model


def restore_optimizers(model, optimizers, state):
    """Load the state that copy_to_cpu() returned, however many processes there were then."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group['params']:
                for key, tensor in state.get(names[parameter], {}).items():
                    tensor = tensor.to(parameter.device, copy=True)  # it may be a file's, mapped
                    if tensor.dim() > 0:  # step counts are not sharded
                        tensor = shard_like(tensor, parameter)
                    optimizer.state[parameter][key] = tensor

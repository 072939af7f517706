"""Distributed training: process group, DDP, FSDP2, and the few collectives the trainer needs.

torchrun starts the processes and sets RANK, LOCAL_RANK, WORLD_SIZE and the address where they meet.
Without it there is one process, and everything here does nothing. Tensors on the CPU go through
gloo, those on CUDA through NCCL.
"""

import math
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
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
        if kind == 'cuda' and torch.device(device).index is not None:
            torch.cuda.set_device(device)
        return device

    check_division(micro_steps, world_size)
    if kind == 'mps':
        raise UserError("device='mps' is for one process only: use --device=cpu with torchrun.")
    if backend == 'nccl' and kind != 'cuda':
        raise UserError(f"backend='nccl' needs CUDA, and the device is {kind}: use --backend=gloo.")
    backends = 'gloo'
    if kind == 'cuda':
        device = claim_gpu()
        backends = f'cpu:gloo,cuda:{backend or "nccl"}'
    try:
        dist.init_process_group(backends)
    except (RuntimeError, ValueError) as error:  # torch.distributed's own errors are RuntimeErrors
        raise UserError(f'The processes cannot connect: {str(error).splitlines()[0]}') from None
    return device


def claim_gpu():
    """Make the GPU of this process the current device and return its name: one process, one GPU."""
    local_rank = int(os.environ['LOCAL_RANK'])
    n_gpus = torch.cuda.device_count()
    if local_rank >= n_gpus:
        raise UserError(f'More processes than the {n_gpus} GPUs here: lower --nproc_per_node.')
    torch.cuda.set_device(local_rank)
    return f'cuda:{local_rank}'


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


def split_over_processes(function, batch):
    """Compute function(batch), which treats each row by itself, each process a part of the rows."""
    if world_size == 1:
        return function(batch)
    rows = math.ceil(len(batch) / world_size)  # per process: all-gather needs the same from each
    padding = batch.new_zeros(rows * world_size - len(batch), *batch.shape[1:])
    padded = torch.cat((batch, padding))
    own_rows = padded[rank * rows : (rank + 1) * rows]
    result = torch.empty_like(padded)
    own_result = function(own_rows).contiguous()  # NCCL takes no transposed tensor, gloo does
    dist.all_gather_into_tensor(result, own_result)
    return result[: len(batch)]


# -----------------------------------------------------------------------------
# DDP and FSDP


def distribute(model, fsdp, dtype):
    """Return the model to train: replicated (DDP), or sharded in place, block by block (FSDP2)."""
    if fsdp and (not launched or dtype == 'float16'):
        raise UserError('fsdp=True is for torchrun, and for float32 or bfloat16.')
    if not launched:
        return model
    if not fsdp:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    mesh = init_device_mesh(model.wte.weight.device.type, (world_size,))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def sync_gradients(train_model, on):
    """Set whether the next backward pass averages the gradients over the processes."""
    if isinstance(train_model, DistributedDataParallel):
        train_model.require_backward_grad_sync = on
    elif launched:
        train_model.set_requires_gradient_sync(on)


def full_tensor(tensor):
    """Gather a sharded tensor; return any other one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor, parameter):
    """Shard a tensor, the same in every process, as a parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh = parameter.device_mesh
    return distribute_tensor(tensor, mesh, parameter.placements, src_data_rank=None)


def replicate_like(number, parameter):
    """Return a number, the same in every process, as the parameter's optimizer takes it."""
    if not isinstance(parameter, DTensor):
        return number
    return DTensor.from_local(number, parameter.device_mesh, [Replicate()])


# -----------------------------------------------------------------------------
# what a checkpoint holds: everything in one piece, whatever the number of processes


def gather_full_state(model, optimizers):
    """Gather what the processes have sharded.

    Returns the model in one piece (with FSDP only on rank 0, elsewhere None) and the state of the
    optimizers on the CPU, {name of the parameter: {name: tensor}}. All processes must call it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves the outermost parameters gathered

    state = {}
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            if parameter in optimizer.state:
                tensors = optimizer.state[parameter].items()
                state[name] = {key: full_tensor(tensor).cpu() for key, tensor in tensors}

    if not isinstance(model, FSDPModule):
        return model, state
    weights = {name: full_tensor(tensor).cpu() for name, tensor in model.state_dict().items()}
    if rank > 0:
        return None, state
    full_model = type(model)(model.config)  # FSDP's class of a model makes an ordinary one
    full_model.load_state_dict(weights)
    full_model.hf_config = model.hf_config
    full_model.generation_config = model.generation_config
    return full_model, state


def restore_optimizers(model, optimizers, state):
    """Load the state that gather_full_state() returned, however many processes there were then."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group['params']:
                for key, tensor in state.get(names[parameter], {}).items():
                    tensor = tensor.to(parameter.device)
                    if tensor.dim() > 0:  # step counts are not sharded
                        tensor = shard_like(tensor, parameter)
                    optimizer.state[parameter][key] = tensor

"""Several processes that train one model: how they meet, and what they tell one another.

torchrun starts them and sets RANK, LOCAL_RANK, WORLD_SIZE and where they meet. Without it there is one process, and
everything here does nothing. Tensors on the CPU go through gloo, those on CUDA through NCCL.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
launched = 'RANK' in os.environ


def check_division(micro_steps, processes):
    """Raises ValueError unless each process gets as many micro-batches."""
    if micro_steps % processes:
        below = micro_steps // processes * processes
        nearest = f'{below} or {below + processes}' if below else processes
        raise ValueError(
            f'gradient_accumulation_steps={micro_steps} micro-batches cannot be divided over {processes} processes: '
            f'use {nearest}.'
        )


def join(device, backend, gradient_accumulation_steps):
    """Meet the other processes. Returns the device of this one. Raises ValueError where that cannot be."""
    kind = torch.device(device).type
    if not launched:
        if torch.device(device).index is not None:  # 'cuda:1'; plain 'cuda' is the current one
            torch.cuda.set_device(device)
        return device
    check_division(gradient_accumulation_steps, world)
    if kind == 'mps':
        raise ValueError("device='mps' is for one process only: use --device=cpu with torchrun.")
    if backend not in (None, 'nccl', 'gloo'):
        raise ValueError(f"backend='{backend}' must be 'nccl' or 'gloo'.")
    if backend == 'nccl' and kind != 'cuda':
        raise ValueError(f"backend='nccl' needs CUDA, and the device is {kind}: use --backend=gloo.")
    if kind == 'cuda':
        local, there = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
        if local >= there:
            raise ValueError(f'There are more processes on this machine than its {there} GPUs: lower --nproc_per_node.')
        device = f'cuda:{local}'
        torch.cuda.set_device(local)
    try:
        dist.init_process_group(f'cpu:gloo,cuda:{backend or "nccl"}' if kind == 'cuda' else 'gloo')
    except (RuntimeError, ValueError) as error:  # torch.distributed's own errors are RuntimeErrors
        raise ValueError(f'The processes could not meet: {str(error).splitlines()[0]}') from None
    return device


def leave(status):
    """End all processes, once they have come this far: what one has under way may need the others. One: do nothing."""
    if not launched:
        return
    if _asked is not None:
        _asked[0].wait()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # gloo's threads, which a mesh keeps alive, now and then abort when the interpreter is taken down


def total(tensor):
    """The sum of a tensor over all processes, in place."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


def agree(values):
    """Raises ValueError unless every process has the same {name: value}."""
    if world == 1:
        return
    everyone = [None] * world
    dist.all_gather_object(everyone, values)
    for name in values:
        for other, theirs in enumerate(everyone):
            if theirs.get(name) != everyone[0].get(name):
                raise ValueError(
                    f'The processes must be started alike: {name} is {everyone[0].get(name)!r} on rank 0 and '
                    f'{theirs.get(name)!r} on rank {other}.'
                )


_asked = None


def agreed(number):
    """The highest number that any process gave in its previous call, the same for all; nobody waits for an answer."""
    global _asked
    if world == 1:
        return number
    answer = 0
    if _asked is not None:
        _asked[0].wait()
        answer = int(_asked[1])
    numbers = torch.tensor(number)
    _asked = dist.all_reduce(numbers, dist.ReduceOp.MAX, async_op=True), numbers
    return answer


def distribute(model, fsdp, dtype):
    """The model as every process trains it: in DDP, or in place sharded, block by block (FSDP2)."""
    if fsdp and (not launched or dtype == 'float16'):
        raise ValueError('fsdp=True is for torchrun, and for float32 or bfloat16.')
    if not launched:
        return model
    if not fsdp:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    mesh = init_device_mesh(model.wte.weight.device.type, (world,))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def synchronize_gradients(net, on):
    """Whether the next backward pass averages the gradients over the processes."""
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = on
    elif launched:
        net.set_requires_gradient_sync(on)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor, parameter):
    """A whole tensor, the same in every process, sharded as a parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def share_out(function, batch):
    """function(batch), which treats each row by itself; every process computes some of the rows."""
    if world == 1:
        return function(batch)
    each = -(-len(batch) // world)
    padded = torch.cat((batch, batch.new_zeros(each * world - len(batch), *batch.shape[1:])))
    dist.all_gather_into_tensor(result := torch.empty_like(padded), function(padded[rank * each :][:each]))
    return result[: len(batch)]


def like(number, parameter):
    """A number that is the same in every process, as an optimizer of such parameters takes it."""
    sharded = isinstance(parameter, DTensor)
    return DTensor.from_local(number, parameter.device_mesh, [Replicate()]) if sharded else number


def gather(model, optimizers):
    """(the model in one piece, None but on rank 0; {parameter's name: its optimizer's state}, on the CPU)."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # evaluating leaves the outermost parameters whole
    state = {
        name: {key: whole(value).cpu() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        if parameter in optimizer.state
    }
    if isinstance(model, FSDPModule):
        weights = {name: whole(tensor).cpu() for name, tensor in model.state_dict().items()}
        model = None if rank else type(model)(model.config)
        if model is not None:
            model.load_state_dict(weights)
    return model, state


def restore(model, optimizers, state):
    """Give optimizers the state that gather() returned, however many processes shared it then."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter in [parameter for group in optimizer.param_groups for parameter in group['params']]:
            for key, value in state.get(names[parameter], {}).items():
                value = value.to(parameter.device)
                optimizer.state[parameter][key] = split_like(value, parameter) if value.dim() else value

"""What a run will take, before it is paid for: `python train.py CONFIG --plan`.

One step is run with tensors that have shapes but no contents (torch's FakeTensorMode), and the memory that its live
tensors would fill is added up: what a real step takes, without the allocator's own losses and, on CUDA, about half a
GiB for the driver; a compiled step takes less, and attention with dropout on a CPU more. Floating-point operations are
those of GPT.flops_per_token.

Under FSDP each of W devices keeps 1/W of weights, gradients and optimizer state, and has the embeddings and two blocks
whole at a time, in the dtype computed with, and their gradients in float32 (Zhao et al., 2023, PyTorch FSDP).
20 tokens a parameter are the best use of a number of operations (Hoffmann et al., 2022, Chinchilla).
"""

import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import Dataset
from model import GPT, PUBLISHED, GPTConfig, find_pretrained, read_config
from muon import Muon
from parallel import check_division
from report import GPUS, duration


class Memory(TorchDispatchMode):
    """Counts the bytes of live tensors: `now`, and at the `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(id(storage))
                weakref.finalize(storage, self.free, id(storage), storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result

    def free(self, key, size):
        self.seen.discard(key)
        self.now -= size


def dry_run(shape, knobs, checkpointing):
    """Bytes on one device that has everything, {what: bytes}, of one step that is not computed.

    There are gradients from the start, as in every micro-step but the first.
    """
    dtype = getattr(torch, knobs['dtype'])
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast('cpu', dtype)
    held = {}
    with FakeTensorMode(), Memory() as memory:
        model = GPT(replace(shape))
        model.config.dropout = 0.0  # of attention, which needs no matrix for it on CUDA; the others stay
        if checkpointing:
            model.checkpoint_activations()
        model.freeze(knobs['freeze'])
        held['weights'], trained = memory.now, [p for p in model.parameters() if p.requires_grad]
        groups = model.parameter_groups(knobs['weight_decay'])
        muon = [group for group in groups if 'rows' in group] if knobs['optimizer'] == 'muon' else []
        others = [group for group in groups if 'rows' not in group] if muon else groups
        optimizers = [torch.optim.AdamW(others, fused=True)] + ([Muon(muon)] if muon else [])
        model.norm_f.register_forward_hook(lambda *_: held.update(activations=memory.now - before))
        for optimizer in optimizers:  # its state is made by its first step
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        before, memory.peak = memory.now, 0
        idx = torch.zeros(knobs['batch_size'], shape.block_size, dtype=torch.int64)
        with autocast:
            loss = model(idx, idx)
        loss.backward()
        del loss
        for optimizer in optimizers:
            optimizer.step()
    held['gradients'] = sum(parameter.nbytes for parameter in trained)
    held['optimizer'] = sum(v.nbytes for each in optimizers for state in each.state.values() for v in state.values())
    held['the rest'] = memory.peak - sum(held.values())
    return held | {'peak': memory.peak}


def fields_of(config):
    """The GPTConfig fields of the model that a run would train."""
    source = config['init_from']
    fields = {name: config[name] for name in ('arch', 'n_layer', 'n_head', 'n_embd', 'bias', 'n_kv_head')}
    if source in PUBLISHED:
        fields = {'vocab_size': 50257, **PUBLISHED[source]}
    elif source not in ('scratch', 'resume', 'auto'):
        fields = read_config(find_pretrained(source))
        if config['block_size'] > fields['block_size']:
            raise ValueError(f'block_size={config["block_size"]} is more than the {fields["block_size"]} of {source}.')
    return fields | {'block_size': config['block_size'], 'dropout': config['dropout']}


def print_plan(config):
    """Raises ValueError for a plan_gpu that is not known, or a shape that cannot be."""
    gpu, gpus, mfu = config['plan_gpu'], config['plan_gpus'], config['plan_mfu']
    check_division(config['gradient_accumulation_steps'], gpus)
    if gpu not in GPUS:
        raise ValueError(f"plan_gpu='{gpu}' is not known. Choose one of: {', '.join(GPUS)}.")
    fields, data, dataset = fields_of(config), None, f'data/{config["dataset"]}'
    try:
        data = Dataset(config['dataset'])
        fields['vocab_size'] = fields.get('vocab_size', data.vocab_size)
        dataset += f': {len(data.train):,} tokens'
    except FileNotFoundError:
        dataset += ' is not prepared yet' + ('' if 'vocab_size' in fields else ": GPT-2's vocabulary is assumed")
    shape = GPTConfig(**fields)
    if (tokens := config['batch_size'] * shape.block_size) * shape.padded_vocab_size > 2**35:
        raise ValueError(f'{tokens:,} tokens at once, batch_size x block_size, are more than any device has room for.')
    with torch.device('meta'):
        model = GPT(shape)
    model.freeze(config['freeze'])
    knobs = config | {'dtype': 'bfloat16' if config['dtype'] == 'auto' else config['dtype']}
    per_step = config['batch_size'] * config['gradient_accumulation_steps'] * shape.block_size
    tokens, n, flops = per_step * config['max_iters'], model.count_parameters(), model.flops_per_token()
    peak, room = GPUS[gpu]
    seconds = tokens * flops / (peak * 1e12 * mfu * gpus)
    epochs = f', {tokens / len(data.train):.2f} epochs' if data else ''
    print(
        f'model   {shape.arch}, {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide: {n:,} parameters\n'
        f'data    {dataset}\n'
        f'steps   {config["max_iters"]:,}, each {config["batch_size"]} x {config["gradient_accumulation_steps"]} x '
        f'{shape.block_size} = {per_step:,} tokens: {tokens:,}{epochs}\n'
        f'        {tokens / n:.1f} tokens a parameter; about 20 are the best use of the operations\n'
        f'cost    {flops / 1e9:.3g} GFLOP a token, {tokens * flops:.3g} FLOP\n'
        f'time    {duration(seconds)} on {gpus} x {gpu} at {mfu:.0%} of {peak} TFLOP/s, '
        f'{tokens / max(seconds, 1e-9):,.0f} tokens/s'
    )
    wide = [parameter for name, parameter in model.named_parameters() if not name.startswith('blocks.')]
    wide += 2 * list(model.blocks[-1].parameters())
    gathered = sum(p.numel() * ((4 if knobs['dtype'] == 'float32' else 2) + 4 * p.requires_grad) for p in wide)
    print(f'memory  GiB a device, {knobs["dtype"]}, not compiled; {gpu} has {room}')
    print(f'        {"weights":>24}{"gradients":>10}{"optimizer":>10}{"activations":>12}{"loss etc.":>10}{"peak":>6}')
    too_much = []
    for recompute in (False, True):  # activation_checkpointing
        with warnings.catch_warnings(action='ignore'):
            held = dry_run(shape, knobs, recompute)
        whole = held['weights'] + held['gradients'] + held['optimizer']
        for name, share, more in (('DDP', 1, 0), ('FSDP', gpus, gathered))[: 1 + (gpus > 1)]:
            name += ' recomputing' if recompute else ''
            row = [held['weights'] / share, held['gradients'] / share, held['optimizer'] / share]
            row += [held['activations'], held['the rest'] + more, held['peak'] - whole + whole / share + more]
            cells = ''.join(f'{x / 2**30:>{w}.2f}' for x, w in zip(row, (8, 10, 10, 12, 10, 6), strict=True))
            print(f'        {name:<16}{cells}')
            too_much += [name] if row[-1] > room * 2**30 else []
    print(f'        too much for {gpu}: {", ".join(too_much)}\n' if too_much else '', end='')
    disk = held['weights'] + held['optimizer']
    print(f'disk    {disk / 1e9:.2f} GB a checkpoint, {(config["keep_last"] + 1) * disk / 1e9:.2f} GB at most for all')

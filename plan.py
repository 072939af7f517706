"""What a run will take, before it is paid for: `python train.py CONFIG --plan`.

The peak memory is that of one step with fake tensors (torch's FakeTensorMode), which have shapes
but no contents: the most bytes of tensors alive at once. A real step takes that much, and what the
allocator itself loses, and on CUDA about half a GiB for the driver. A compiled step takes less;
attention with dropout on a CPU takes more. Floating-point operations are those of
GPT.flops_per_token.

Under FSDP each of N devices keeps 1/N of weights, gradients and optimizer state. Gathered at a time
are the embeddings and two blocks, in the dtype of the computation, and their gradients in float32
(Zhao et al., 2023, PyTorch FSDP). About 20 tokens per parameter are the best use of a given number
of operations (Hoffmann et al., 2022, Chinchilla).
"""

import math
import warnings
import weakref
from dataclasses import fields, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import Mixture, dataset_folder, list_folder, parse_mixture
from model import GPT, PUBLISHED, GPTConfig, find_pretrained, read_config
from optim import freeze, make_optimizers
from parallel import check_division
from report import duration
from runtime import GPUS, UserError, make_autocast

# The columns of the table of memory, and their widths.
COLUMNS = {
    'weights': 8, 'gradients': 10, 'optimizer': 10, 'activations': 12, 'loss etc.': 10, 'peak': 6,
}  # fmt: skip
MOST_LOGITS = 2**35  # more at once fit on no device
OWN_MODELS = ('scratch', 'resume', 'auto')  # init_from for a model that the knobs describe


# -----------------------------------------------------------------------------
# memory


class Memory(TorchDispatchMode):
    """Count the bytes of live tensors: `now`, and at their `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()  # ids of live storages: several tensors may share one

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for storage in [tensor.untyped_storage() for tensor in tensors]:
            if id(storage) not in self.seen:
                self.seen.add(id(storage))
                weakref.finalize(storage, self.free, id(storage), storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result

    def free(self, key, size):
        self.seen.discard(key)
        self.now -= size


def dry_run(shape, knobs, activation_checkpointing):
    """Run one step with fake tensors. Returns {what: bytes} on a device that holds all of it.

    Gradients exist from the start, as in all micro-steps but the first.
    """
    live = []  # bytes at the end of the blocks
    with FakeTensorMode(), Memory() as memory:
        model = GPT(replace(shape))
        model.config.dropout = 0.0  # attention's, which on CUDA needs no memory; the others stay
        if activation_checkpointing:
            model.checkpoint_activations()
        freeze(model, knobs['freeze'])
        weights = memory.now
        # Their numbers do not matter for the memory.
        optimizers = make_optimizers(model, knobs['optimizer'], 1e-3, (0.9, 0.95), 0.1, 0.02, 0.95)

        # The state of an optimizer is created by its first step.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()

        before = memory.peak = memory.now
        model.norm_f.register_forward_hook(lambda *_: live.append(memory.now))
        idx = torch.zeros(knobs['batch_size'], knobs['block_size'], dtype=torch.int64)
        with make_autocast('cpu', knobs['dtype']):
            loss = model(idx, idx)
        loss.backward()
        del loss
        for optimizer in optimizers:
            optimizer.step()

    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    held = {
        'weights': weights,
        'gradients': sum(parameter.nbytes for parameter in trained),
        'optimizer': sum(tensor.nbytes for state in states for tensor in state.values()),
        'activations': live[0] - before,
    }
    held['loss etc.'] = memory.peak - sum(held.values())
    held['peak'] = memory.peak
    return held


def gathered_bytes(model, dtype):
    """Return the bytes that FSDP gathers at a time: all but the blocks, and two of these."""
    gathered = 2 * list(model.blocks[-1].parameters())
    gathered += [p for name, p in model.named_parameters() if not name.startswith('blocks.')]
    bytes_per_weight = 4 if dtype == 'float32' else 2
    weights = sum(bytes_per_weight * p.numel() for p in gathered)
    gradients = sum(4 * p.numel() for p in gathered if p.requires_grad)
    return weights + gradients


def shard(held, n_shards, gathered):
    """Return {what: bytes} on each of the devices that shard what dry_run() says is held."""
    row = {'activations': held['activations'], 'loss etc.': held['loss etc.'] + gathered}
    for name in ('weights', 'gradients', 'optimizer'):
        row[name] = held[name] / n_shards
    return row | {'peak': sum(row.values())}


# -----------------------------------------------------------------------------
# the plan


def model_shape(config, vocab_size):
    """Return the GPTConfig of the model that a run would train on a text of this vocabulary."""
    source = config['init_from']
    if source in OWN_MODELS:
        names = [field.name for field in fields(GPTConfig) if field.name in config]
        return GPTConfig(vocab_size=vocab_size, **{name: config[name] for name in names})
    if source in PUBLISHED:  # nothing is downloaded
        shape = GPTConfig(**PUBLISHED[source])
    else:
        shape = read_config(find_pretrained(source, with_weights=False))
    return replace(shape.crop(config['block_size']), dropout=config['dropout'])


def print_plan(config):
    """Print what a run with these knobs would take.

    Raises UserError for a plan_gpu that is not known, or a shape that is not possible.
    """
    check_division(config['gradient_accumulation_steps'], config['plan_gpus'])
    if config['plan_gpu'] not in GPUS:
        raise UserError(f"plan_gpu='{config['plan_gpu']}' must be one of: {', '.join(GPUS)}.")

    names, _ = parse_mixture(config['dataset'])
    folders = [dataset_folder(name) for name in names]
    # A folder of nanoGPT's or llm.c's files gets its meta.json from a run: a plan writes nothing.
    missing = [folder for folder in folders if 'meta.json' not in list_folder(folder)]
    data = None
    vocab_size = GPTConfig.vocab_size
    if not missing:
        data = Mixture(config['dataset'], config['block_size'], config['stride'])
        vocab_size = data.tokenizer.n_vocab
    shape = model_shape(config, vocab_size)
    tokens = config['batch_size'] * config['block_size']
    if tokens * shape.padded_vocab_size > MOST_LOGITS:
        raise UserError(f'{tokens:,} tokens at once, batch_size x block_size, fit on no device.')
    with torch.device('meta'):  # no memory for the weights
        model = GPT(shape)
    freeze(model, config['freeze'])

    if config['dtype'] == 'auto':
        config = config | {'dtype': 'bfloat16'}  # a plan is for a GPU
    print_compute(model, data, missing, config)
    held = print_memory(model, config)
    saved = (held['weights'] + held['optimizer']) / 1e9
    at_most = (config['keep_last'] + 1) * saved
    print(f'disk    {saved:.2f} GB per checkpoint, {at_most:.2f} GB at most for all')


def print_compute(model, data, missing, config):
    """Print the size of a run in tokens, operations and hours.

    data: a Mixture, or None. missing: the folders of the datasets that are not prepared.
    """
    shape = model.config
    n_steps = config['max_iters']
    factors = (config['batch_size'], config['gradient_accumulation_steps'], config['block_size'])
    tokens_per_step = math.prod(factors)
    tokens = n_steps * tokens_per_step
    n_params = model.count_parameters()
    flops = model.flops_per_token(config['block_size'])

    dataset = f'{" + ".join(missing)} is not prepared yet'
    epochs = ''
    if data:
        dataset = data.describe()
        epochs = f', {data.epochs(tokens // config["block_size"])} epochs'
    elif config['init_from'] in OWN_MODELS:
        dataset += ": GPT-2's vocabulary is assumed"

    gpu = config['plan_gpu']
    n_gpus = config['plan_gpus']
    mfu = config['plan_mfu']
    peak_tflops, _ = GPUS[gpu]
    seconds = tokens * flops / (peak_tflops * 1e12 * mfu * n_gpus)

    size = f'{shape.n_layer} layers, {shape.n_head} heads, n_embd {shape.n_embd}'
    each = ' x '.join(f'{factor}' for factor in factors)
    gpus = f'{n_gpus} x {gpu} at {mfu:.0%} of {peak_tflops} TFLOP/s'
    print(f'model   {shape.arch}, {size}: {n_params:,} parameters')
    print(f'data    {dataset}')
    print(f'steps   {n_steps:,}, each {each} = {tokens_per_step:,} tokens: {tokens:,}{epochs}')
    print(f'        {tokens / n_params:.1f} tokens per parameter (Chinchilla-optimal: about 20)')
    print(f'cost    {flops / 1e9:.3g} GFLOP per token, {tokens * flops:.3g} FLOP in total')
    print(f'time    {duration(seconds)} on {gpus}, {tokens / max(seconds, 1e-9):,.0f} tokens/s')


def print_memory(model, config):
    """Print the table of memory and return what one device would hold without sharding."""
    gpu = config['plan_gpu']
    n_gpus = config['plan_gpus']
    _, room = GPUS[gpu]

    headings = ''.join(f'{name:>{width}}' for name, width in COLUMNS.items())
    print(f'memory  GiB per device, {config["dtype"]}, not compiled; {gpu} has {room}')
    print(f'        {"":16}{headings}')
    too_large = []
    for activation_checkpointing in (False, True):
        with warnings.catch_warnings(action='ignore'):
            held = dry_run(model.config, config, activation_checkpointing)
        rows = {'DDP': held}
        if n_gpus > 1:
            rows['FSDP'] = shard(held, n_gpus, gathered_bytes(model, config['dtype']))
        for name, row in rows.items():
            if activation_checkpointing:
                name += ' recomputing'
            if row['peak'] > room * 2**30:
                too_large.append(name)
            cells = ''.join(f'{row[key] / 2**30:>{width}.2f}' for key, width in COLUMNS.items())
            print(f'        {name:16}{cells}')
    if too_large:
        print(f'        too much for {gpu}: {", ".join(too_large)}')
    return held

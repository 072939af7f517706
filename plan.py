"""What a run will take, before it is paid for: `python train.py CONFIG --plan`.

The peak memory is that of one step with fake tensors (torch's FakeTensorMode), which have shapes
but no contents: the most bytes of tensors alive at once. A real step takes that much, and what the
allocator itself loses, and on CUDA about half a GiB for the driver. A compiled step takes less.
Floating-point operations are those of GPT.flops_per_token.

Under FSDP each of N devices keeps 1/N of weights, gradients and optimizer state. Gathered at a time
are what is around the blocks, in float32, and two blocks, in the dtype of the computation (Zhao et
al., 2023, PyTorch FSDP).

About 20 tokens per parameter are the best use of a given number of operations (Hoffmann et al.,
2022, Chinchilla).

What the devices send each other: an all-reduce of n bytes over N devices has each of them send
2 (N - 1) / N n, an all-gather or a reduce-scatter half of that (rings; Patarasuk and Yuan, 2009).
"""

import math
import os
import statistics
import time
import warnings
import weakref
from collections import Counter
from dataclasses import fields, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import runtime
from data import Mixture, dataset_folder, list_folder, parse_mixture
from inference import load_tokenizer
from model import GPT, MAX_FILE, MAX_LOGITS, PUBLISHED, GPTConfig, find_pretrained, read_config
from optim import average_weights, freeze, make_optimizers, make_rounds, parameter_groups
from parallel import check_division
from report import describe_shape, duration, print_length
from runtime import GPUS, UserError, keep_freed_memory, make_autocast, peak_memory_gib

# The columns of the table of memory, and their widths.
COLUMNS = {
    'weights': 7, 'gradients': 10, 'optimizer': 10, 'activations': 12, 'loss etc.': 10, 'peak': 7,
}  # fmt: skip
MOST_LOGITS = 2**35  # more at once fit on no device
LAUNCH = 0.01  # seconds of a step on a GPU, at least: its kernels have to be launched
OWN_MODELS = ('scratch', 'resume', 'auto')  # init_from for a model that the knobs describe
# What dtype='auto' is on them; on the others it is bfloat16.
DTYPES = {'CPU': runtime.pick_dtype('auto', 'cpu'), 'T4': 'float16', 'V100': 'float16'}
DTYPES |= dict.fromkeys(('M1', 'M1Max', 'M1Ultra', 'M2Ultra'), 'float32')

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


def make_training(model, knobs):
    """Freeze what is to be frozen, and return the optimizers. Their numbers do not matter here."""
    freeze(model, knobs['freeze'])
    name, dtype = knobs['optimizer'], knobs['dtype']
    return make_optimizers(model, name, 1e-3, (0.9, 0.95), 0.1, 0.02, (0.95, 0.95), dtype)


def dry_run(shape, knobs, activation_checkpointing, where='cpu', block_dtype=None):
    """Run one step with fake tensors. Returns {what: bytes} on a device that holds all of it.

    'activations' are held at the end of the blocks, 'loss etc.' is what more is needed at the peak
    of the step, and 'loss' at the peak of the backward pass. Gradients exist from the start, as in
    all micro-steps but the first. where: 'cpu' or 'gpu', as in model.MAX_LOGITS. block_dtype: of
    the weights in the blocks, where that is not float32.
    """
    live = []  # bytes at the end of the blocks
    with FakeTensorMode(), Memory() as memory:
        model = GPT(shape)
        model.max_logits = MAX_LOGITS[where]
        for block in model.blocks:
            block.attn.upcasts = where == 'cpu'
        for layer in model.blocks.modules() if block_dtype else ():
            for name, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, torch.nn.Parameter(parameter.detach().to(block_dtype)))
        if activation_checkpointing:
            model.checkpoint_activations()
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        optimizers = make_training(model, knobs)

        # The state of an optimizer is created by its first step.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
        average_weights(optimizers, 1, knobs['average_frac'])

        before = memory.peak = memory.now
        model.norm_f.register_forward_hook(lambda *_: live.append(memory.now))
        idx = torch.zeros(knobs['batch_size'], knobs['block_size'], dtype=torch.int64)
        with make_autocast('cpu', knobs['dtype']):
            loss = model(idx, idx)
        loss.backward()
        del loss
        backward_peak = memory.peak
        memory.peak = memory.now
        for optimizer in optimizers:
            optimizer.step()

    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    held = {
        'weights': weights,
        'gradients': sum(parameter.nbytes for parameter in trained),
        'optimizer': sum(tensor.nbytes for state in states for tensor in state.values()),
    }
    held['activations'] = live[0] - before
    loss = backward_peak - sum(held.values())
    peak = max(memory.peak, backward_peak)
    held['loss etc.'] = peak - sum(held.values())
    return held | {'peak': peak, 'loss': loss}


def muon_rounds(model, optimizer, n_devices):
    """Return what Muon treats at once, {shape of matrices: how many} for each round."""
    if optimizer != 'muon':
        return []
    groups = [group for group in parameter_groups(model, 0.0) if 'out_sizes' in group]
    rounds = []
    for pairs in make_rounds(groups, n_devices):
        shapes = Counter()
        for parameter, group in pairs:
            shapes.update((rows, parameter.shape[1]) for rows in group['out_sizes'])
        rounds.append(shapes)
    return rounds


def own_numbers(shape, n_matrices, n_devices):
    """Return the numbers that each device orthogonalizes, those of padding among them."""
    return math.ceil(n_matrices / n_devices) * math.prod(shape)


def update_bytes(shapes, n_devices, itemsize):
    """Return about the most that Muon.step_round() has at a time: it goes from shape to shape."""
    most = updates = 0
    directions = 4 * sum(math.prod(shape) for shape in shapes.elements())  # in float32, still to do
    for shape, n_matrices in shapes.items():
        own = own_numbers(shape, n_matrices, n_devices)
        updates += itemsize * n_devices * own
        # Of those that a device computes itself there is a stack in float32, and four versions.
        most = max(most, directions + updates + (4 + 4 * itemsize) * own)
        directions -= 4 * n_matrices * math.prod(shape)
    return most


def shard(model, knobs, whole, n_devices, recomputed=0):
    """Return {what: bytes} on each of n_devices, from what dry_run() says of a single one.

    Beside their shares, devices hold the weights around the blocks, in float32, and
    at the end of the blocks: the weights of one block, and what the loss needs;
    in a block's backward pass: the weights of two blocks, the gradients of one, which are being
        summed up in float32, and of lm_head, and what is recomputed.

    whole: of a model all in float32. recomputed: bytes of activations of a block, where they are
    not kept.
    """
    block_dtype = getattr(torch, knobs['dtype'])  # autocast has nothing to copy then
    row = dry_run(model.config, knobs, recomputed > 0, 'gpu', block_dtype)
    n_shards = n_devices // knobs['fsdp_replicas']
    n_in_blocks = sum(p.numel() for p in model.blocks.parameters())
    n_around = sum(p.numel() for p in model.parameters()) - n_in_blocks
    n_in_block = n_in_blocks // model.config.n_layer
    block = n_in_block * block_dtype.itemsize
    at_the_loss = block + row['loss']
    in_a_block = 2 * block + 4 * n_in_block + 4 * model.lm_head.weight.numel() + recomputed
    needed = row['activations'] + 4 * n_around + max(at_the_loss, in_a_block)
    rounds = muon_rounds(model, knobs['optimizer'], n_devices)
    sizes = [update_bytes(shapes, n_devices, block_dtype.itemsize) for shapes in rounds]
    row['loss etc.'] = max([needed, *sizes]) - row['activations']
    for name in ('weights', 'gradients', 'optimizer'):
        row[name] = whole[name] / n_shards
    row['peak'] = sum(row[name] for name in COLUMNS if name != 'peak')
    return row


def traffic(model, knobs, n_devices, n_micro_steps):
    """Return the bytes that each device sends in a step: {how: bytes}.

    n_micro_steps: of each device. 'between groups', of fsdp_replicas, is a part of FSDP's with
    them, and crosses from machine to machine.
    """
    n_shards = n_devices // knobs['fsdp_replicas']
    sent_of = (n_shards - 1) / n_shards  # by an all-gather, or a reduce-scatter
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = 4 * sum(p.numel() for p in trained)
    in_blocks = sum(p.numel() for p in model.blocks.parameters())
    around = sum(p.numel() for p in model.parameters()) - in_blocks
    itemsize = getattr(torch, knobs['dtype']).itemsize
    # Blocks are gathered for the forward and for the backward pass, the rest once.
    gathered = 2 * itemsize * in_blocks + 4 * around

    rounds = muon_rounds(model, knobs['optimizer'], n_devices)
    matrices = sum(math.prod(shape) for shapes in rounds for shape in shapes.elements())
    own = [own_numbers(*item, n_devices) for shapes in rounds for item in shapes.items()]
    # Of whoever has computed them; all devices send as many, so some send padding.
    updates = itemsize * sum(own) * (n_devices - 1)
    all_sent_of = (n_devices - 1) / n_devices
    between = 2 * gradients / n_shards * (1 - 1 / knobs['fsdp_replicas']) + updates
    return {
        'DDP': 2 * gradients * all_sent_of + updates,
        'FSDP': (n_micro_steps * (gathered + gradients) + 4 * matrices) * sent_of + between,
        'between groups': between,
    }


# -----------------------------------------------------------------------------
# the plan


def open_data(config):
    """Return the Mixture of a run, or None, and the folders of its datasets that are missing.

    Raises UserError where a run would refuse them.
    """
    names, _ = parse_mixture(config['dataset'])
    folders = [dataset_folder(name) for name in names]
    # A folder of nanoGPT's or llm.c's files gets its meta.json from a run: a plan writes nothing.
    missing = [folder for folder in folders if 'meta.json' not in list_folder(folder)]
    if missing:
        return None, missing
    return Mixture(config['dataset'], config['block_size'], config['stride']), missing


def model_shape(config, data):
    """Return the GPTConfig of the model that a run would train on a text, a Mixture or None.

    Raises UserError where the text has another vocabulary than a published model.
    """
    source = config['init_from']
    if source in OWN_MODELS:
        vocab_size = data.tokenizer.n_vocab if data else GPTConfig.vocab_size
        names = [field.name for field in fields(GPTConfig) if field.name in config]
        return GPTConfig(vocab_size=vocab_size, **{name: config[name] for name in names})
    if source in PUBLISHED:  # nothing is downloaded
        shape = GPTConfig(**PUBLISHED[source])
        tokenizer = None
        if data and data.tokenizer.n_vocab != shape.vocab_size:
            what = f'The model {source} has a vocabulary of {shape.vocab_size:,} tokens'
            other = f'{data.datasets[0].folder} another one of {data.tokenizer.n_vocab:,}'
            raise UserError(f'{what}, {other}: prepare the text with --tokenizer=gpt2')
    else:
        folder = find_pretrained(source, with_weights=False)
        shape = read_config(folder)
        tokenizer = load_tokenizer(folder, shape.vocab_size)
    if data and tokenizer:
        for each in data.datasets:
            each.check_vocabulary(tokenizer, shape.vocab_size, source)
    return replace(shape.crop(config['block_size']), dropout=config['dropout'])


def print_plan(config):
    """Print what a run with these knobs would take.

    Raises UserError for what a run would refuse, and for a plan_gpu that is not known.
    """
    gpu = pick_gpu(config)
    config = with_dtype(config | {'plan_gpu': gpu})
    replicas = config['fsdp_replicas']
    check_division(config['gradient_accumulation_steps'], config['plan_gpus'])
    if config['plan_gpus'] % replicas:
        raise UserError(f'fsdp_replicas={replicas} must divide plan_gpus={config["plan_gpus"]}.')

    data, missing = open_data(config)
    shape = model_shape(config, data)
    tokens = config['batch_size'] * config['block_size']
    if tokens * shape.padded_vocab_size > MOST_LOGITS:
        raise UserError(f'{tokens:,} tokens at once, batch_size x block_size, fit on no device.')
    with torch.device('meta'):  # no memory for the weights
        model = GPT(shape)
    freeze(model, config['freeze'])

    print(describe_shape(model), flush=True)
    rows = memory_rows(model, config)
    held = rows['DDP']
    saved = held['weights'] + held['optimizer']
    room = room_gib(gpu)
    measured_gib = None
    if gpu != 'CPU':
        seconds, how = compute_step(model, config)
    elif held['peak'] >= room * 2**30:
        seconds, how = None, 'not measured: the model does not fit into memory'
    else:
        print('        some steps are timed now', flush=True)
        seconds, measured_gib = time_step(model.config, config)
        seconds /= config['plan_gpus']
        how = 'on this machine, by some steps here'
        if config['plan_gpus'] > 1:
            how = f'on {config["plan_gpus"]} machines like this one, by some steps here'
    config = config | {'max_iters': count_steps(config, data, seconds)}
    print_size(model, data, missing, config)
    print_time(config, seconds, how)
    print_memory(rows, config, room, measured_gib)
    if config['plan_gpus'] > 1:
        print_traffic(model, config)
    at_most = (config['keep_last'] + 2) * saved / 1e9  # with the best, and the one being written
    print(f'disk    {saved / 1e9:.2f} GB per checkpoint, {at_most:.2f} GB at most for all')
    if shape.arch == 'gpt2':  # whose files have matrices transposed
        saved += min(MAX_FILE, held['weights'])
    print(f'host    {saved / 1e9:.2f} GB more of memory while a thread of the first process saves')


def pick_gpu(config):
    """Return what a plan is for: plan_gpu, or H100, or with max_minutes what is in this machine.

    Raises UserError for one that is not known.
    """
    gpu = config['plan_gpu']
    if gpu is None and config['max_minutes'] is not None:
        gpu = runtime.find_gpu(runtime.known_device(config['device'])) or 'this one'
    if gpu not in (None, 'CPU', *GPUS):
        raise UserError(f"plan_gpu='{gpu}' is not known: take what is like it, {', '.join(GPUS)}.")
    return gpu or 'H100'


def with_dtype(config):
    """Return a config whose dtype is that of its plan_gpu where it is 'auto'."""
    auto = DTYPES.get(config['plan_gpu'], 'bfloat16')
    return config | {'dtype': auto if config['dtype'] == 'auto' else config['dtype']}


def room_gib(gpu):
    """Return the GiB of memory of a device."""
    return memory_of_this_machine() if gpu == 'CPU' else GPUS[gpu][1]


def count_steps(config, data, seconds):
    """Return the steps of a run, which a budget in epochs or minutes may say. seconds: of a step.

    Raises UserError where a budget cannot be planned.
    """
    limits = []
    if config['max_epochs'] is not None:
        if data is None:
            dataset = config['dataset']
            raise UserError(f'max_epochs of {dataset} cannot be planned: prepare it first.')
        windows_per_step = config['batch_size'] * config['gradient_accumulation_steps']
        limits.append(data.steps(config['max_epochs'], windows_per_step))
    if config['max_minutes'] is not None:
        if seconds is None:
            raise UserError('max_minutes cannot be planned: the time of a step is not known.')
        limits.append(max(1, round(60 * config['max_minutes'] / seconds)))
    return min(limits) if limits else config['max_iters']


def print_size(model, data, missing, config):
    """Print the size of a run in tokens and operations.

    data: a Mixture, or None. missing: the folders of the datasets that are not prepared.
    """
    factors = (config['batch_size'], config['gradient_accumulation_steps'], config['block_size'])
    tokens = config['max_iters'] * math.prod(factors)
    n_params = model.count_parameters()
    flops = model.flops_per_token(config['block_size'])

    dataset = f'{" + ".join(missing)} is not prepared yet'
    epochs = data.epochs(tokens // config['block_size']) if data else None
    if data:
        dataset = data.describe()
    elif config['init_from'] in OWN_MODELS:
        dataset += ": GPT-2's vocabulary is assumed"

    print(f'data    {dataset}')
    print_length(config['max_iters'], factors, tokens, epochs)
    print(f'        {tokens / n_params:.1f} tokens per parameter (Chinchilla-optimal: about 20)')
    print(f'cost    {flops / 1e9:.3g} GFLOP per token, {tokens * flops:.3g} FLOP in total')


def tokens_per_step(config):
    return config['batch_size'] * config['gradient_accumulation_steps'] * config['block_size']


def compute_step(model, config):
    """Return the seconds of a step on the GPUs of the plan, and on what; or None, and why."""
    gpu = config['plan_gpu']
    n_gpus = config['plan_gpus']
    if config['dtype'] == 'float32' and DTYPES.get(gpu) != 'float32':
        return None, f"not known: {gpu}'s peak is one in 16 bits, and dtype is float32"
    peak_tflops, _ = GPUS[gpu]
    flops = tokens_per_step(config) * model.flops_per_token(config['block_size'])
    seconds = max(LAUNCH, flops / (peak_tflops * 1e12 * config['plan_mfu'] * n_gpus))
    # It is plan_mfu, or less where launching takes longer than the work.
    mfu = flops / (peak_tflops * 1e12 * seconds * n_gpus)
    return seconds, f'on {n_gpus} x {gpu} at {mfu:.0%} of {peak_tflops} TFLOP/s'


def print_time(config, seconds_per_step, how):
    """Print the hours of a run, and what they cost."""
    if seconds_per_step is None:
        print(f'time    {how}')
        return
    seconds = config['max_iters'] * seconds_per_step
    rate = tokens_per_step(config) / seconds_per_step
    print(f'time    {duration(seconds)} {how}, {rate:,.0f} tokens/s')
    if config['plan_price'] is not None:
        total = config['plan_price'] * config['plan_gpus'] * seconds / 3600
        print(f'price   {total:,.2f} at {config["plan_price"]:g} per device and hour')


def time_step(shape, config, at_most=5):
    """Return the seconds of a step on this machine, and the GiB that it adds to the process.

    Micro-steps and updates are timed, for at_most so many seconds where they are short.
    """
    keep_freed_memory()
    runtime.forget_peak_memory()
    torch.nn.Linear(256, 256)(torch.ones(256, 256)).sum().backward()  # torch loads more of itself
    before = peak_memory_gib('cpu')
    model = GPT(shape)
    optimizers = make_training(model, config)
    idx = torch.randint(shape.vocab_size, (config['batch_size'], config['block_size']))
    autocast = make_autocast('cpu', config['dtype'])

    def micro_step(idx):
        started = time.perf_counter()
        with autocast:
            loss = model(idx, idx)
        loss.backward()
        return time.perf_counter() - started

    def update():
        started = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average_weights(optimizers, 1, config['average_frac'])
        return time.perf_counter() - started

    micro_step(idx[:1])  # the first ones are slower
    update()
    started = time.perf_counter()
    micro_steps, updates = [], []
    while not updates or (time.perf_counter() < started + at_most and len(updates) < 20):
        micro_steps.append(micro_step(idx))
        updates.append(update())
    seconds = config['gradient_accumulation_steps'] * statistics.median(micro_steps)
    return seconds + statistics.median(updates), peak_memory_gib('cpu') - before


def memory_rows(model, config):
    """Return {how the model is distributed: what dry_run() or shard() says}."""
    where = 'cpu' if config['plan_gpu'] == 'CPU' else 'gpu'
    n_gpus = config['plan_gpus']
    rows = {}
    recomputed = 0
    for recomputing in (False, True):
        label = ' recomputing' if recomputing else ''
        with warnings.catch_warnings(action='ignore'):
            whole = dry_run(model.config, config, recomputing, where)
            rows[f'DDP{label}'] = whole
            if n_gpus > config['fsdp_replicas'] and config['dtype'] != 'float16':
                sharded = shard(model, config, whole, n_gpus, recomputed)
                rows[f'FSDP{label}'] = sharded
                recomputed = sharded['activations'] // model.config.n_layer
    return rows


def memory_of_this_machine():
    """Return the GiB of memory that this machine has; infinity where the system does not say."""
    if not hasattr(os, 'sysconf'):  # Windows
        return math.inf
    n_bytes = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return round(n_bytes / 2**30, 1)


def print_memory(rows, config, room, measured_gib=None):
    """Print the table of memory. room: GiB of a device.

    measured_gib: what the timed steps took, or None.
    """
    gpu = config['plan_gpu']
    unit, size = 'GiB', 2**30
    if max(row['peak'] for row in rows.values()) < 2**30:
        unit, size = 'MiB', 2**20
    headings = ''.join(f'{name:>{width}}' for name, width in COLUMNS.items())
    print(f'memory  {unit} per device, {config["dtype"]}, not compiled; {gpu} has {room} GiB')
    print(f'        {"":16}{headings}')
    for name, row in rows.items():
        cells = ''.join(f'{row[key] / size:>{width}.2f}' for key, width in COLUMNS.items())
        print(f'        {name:16}{cells}')
    # Where memory that was freed before has been taken, there is nothing to say.
    if measured_gib is not None and 1e-3 < measured_gib < math.inf:
        measured = f'{measured_gib * 2**30 / size:.2f}'
        print(f'        {measured} when it was timed, with the freed memory that is kept')
    too_large = [name for name, row in rows.items() if row['peak'] > room * 2**30]
    if too_large:
        print(f'        too much for {gpu}: {", ".join(too_large)}')


def print_traffic(model, config):
    """Print what each device sends to the others in a step, and how long that takes."""
    n_gpus = config['plan_gpus']
    n_micro_steps = config['gradient_accumulation_steps'] // n_gpus
    sent = traffic(model, config, n_gpus, n_micro_steps)
    if config['dtype'] == 'float16' or n_gpus == config['fsdp_replicas']:
        del sent['FSDP']
    if config['fsdp_replicas'] == 1:
        del sent['between groups']
    title = 'network'
    for name, n_bytes in sent.items():
        line = f'{title:8}{name:16}{n_bytes / 1e9:>8.3g} GB sent by each device in a step'
        if config['plan_network']:
            seconds = n_bytes / 1e9 / config['plan_network']
            line += f', {seconds:.3g} s'
        print(line)
        title = ''

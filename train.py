"""Train a GPT: one flat loop, read top to bottom.

    python train.py config/train_shakespeare.py                      # a config file sets the knobs
    python train.py config/train_shakespeare.py --batch_size=8       # flags override it
    python train.py config/train_shakespeare.py --init_from=resume   # go on from the last checkpoint
    torchrun --nproc_per_node=4 train.py config/train_gpt2.py        # four processes, the same steps
"""

import math
import os
import shlex
import signal
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch

import checkpoint
import parallel
import report
import tokenizer as tokenizers
from configurator import can_compile, check, configure, end, errors_in_one_sentence, pick_device
from data import IGNORE, Dataset, count_windows, training_order, windows
from evaluate import exponential, total_loss
from model import GPT, PUBLISHED, GPTConfig
from muon import Muon
from report import fail, log, say, synchronize

# -----------------------------------------------------------------------------
# run
out_dir = 'out'  # where checkpoints and logs go
init_from = 'scratch'  # 'resume': go on; 'auto': go on or start; or a model: 'gpt2' to 'gpt2-xl', a folder
eval_interval = 250  # steps between evaluations, each of the whole validation split; each may save
log_interval = 10  # steps between log lines
eval_only = False  # evaluate once and exit
always_save_checkpoint = True  # save after every evaluation; False: only when it is the best so far
keep_last = 2  # checkpoints to keep, besides the best
save_weights_interval: int | None = None  # steps between light copies, weights only, which all stay; None: none
early_stopping_patience: int | None = None  # end after this many evaluations without a new best; None: never
sample_interval: int | None = None  # steps between texts that the model writes, into the terminal and the log
sample_prompt = '\n'  # what they continue
tracker = 'none'  # where else the log goes: 'tensorboard', 'wandb'
log_norms = False  # log the norms of the parameters and gradients of each block, too
max_bad_steps = 20  # end after this many skipped steps in a row, whose loss or gradient was not finite
seed = 1337  # all randomness is a function of it and the step
# data
dataset = 'shakespeare'  # data/NAME, made by prepare.py
batch_size = 12  # sequences a micro-batch
gradient_accumulation_steps = 5 * 8  # micro-batches a step, divided over the processes
block_size = 1024  # context, in tokens
stride: int | None = None  # from one window of training to the next, in tokens; None: block_size, no overlap
verify_data = False  # read all of the dataset first and compare its checksums
# model
arch = 'gpt2'  # 'gpt2', 'qwen3' or 'llama', see model.py
n_layer = 12  # blocks
n_head = 12  # attention heads
n_kv_head: int | None = None  # groups of heads that share keys and values (not gpt2); None: n_head, no sharing
n_embd = 768  # width
dropout = 0.0  # for pretraining 0 is good, for small data try 0.1 or more
bias = True  # biases in LayerNorm and Linear layers, as GPT-2 has; False is a bit faster
freeze: int | None = None  # fine-tuning: keep the embeddings and this many of the lowest blocks; None: train all
# optimizer
optimizer = 'adamw'  # 'muon': for the matrices in the blocks, AdamW for the rest
learning_rate = 6e-4  # the highest, AdamW's
muon_lr = 0.02  # the highest, Muon's, which serves all widths
muon_momentum = 0.95  # Muon's
max_iters = 600000  # steps, that is optimizer updates
weight_decay = 1e-1  # of matrices and embeddings, not of norms and biases
beta1 = 0.9  # AdamW's
beta2 = 0.95  # AdamW's
grad_clip = 1.0  # clip the gradient's norm to this; 0.0 does not clip
# learning rate over time
decay_lr = True  # False keeps it constant after the warmup
warmup_iters = 0  # steps of linear warmup
schedule = 'cosine'  # how it falls after that: 'cosine', or 'wsd': not at all, then straight down
cooldown = 0.4  # of 'wsd': the last share of the steps after the warmup, in which it falls; 1.0: all
lr_decay_iters: int | None = None  # the step at which it has fallen; None: max_iters
min_lr: float | None = None  # AdamW's lowest, Muon's is the same share of its highest; None: a tenth, of 'wsd' 0
# system
device = 'auto'  # 'cuda', 'cuda:1', 'mps', 'cpu'; 'auto' takes the first there is
backend: str | None = None  # under torchrun: 'nccl' or 'gloo'; None: the one for the device
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; 'auto': a 16-bit one on CUDA, else float32
compile: bool | None = None  # with torch.compile; None: on CUDA only
activation_checkpointing = False  # compute activations twice rather than keep them: slower, less memory
fsdp = False  # under torchrun: share parameters, gradients and optimizer out instead of copying them (FSDP2)
# what it would take
plan = False  # train nothing, print memory, time and cost
plan_gpus = 1  # devices to plan for
plan_gpu = 'H100'  # which: A100, H100, RTX4090, ..., see plan.py
plan_mfu = 0.4  # the share of its peak that training reaches
# -----------------------------------------------------------------------------
if parallel.rank:
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115  one process speaks for all
config = configure(globals())
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop; loading weights would take it for a damaged file
lr_decay_iters = max_iters if lr_decay_iters is None else lr_decay_iters
min_lr = (0.0 if schedule == 'wsd' else learning_rate / 10) if min_lr is None else min_lr

with errors_in_one_sentence():
    check(config, 1, 10**9, 'batch_size gradient_accumulation_steps block_size eval_interval log_interval plan_gpus')
    check(config, 1, 10**9, 'keep_last save_weights_interval early_stopping_patience max_bad_steps sample_interval')
    check(config, 0, 10**18, 'max_iters seed warmup_iters lr_decay_iters')
    check(config, 0, 10**18, 'learning_rate muon_lr min_lr weight_decay grad_clip')
    check(config, 0, 1 - 1e-6, 'beta1 beta2 muon_momentum')
    check(config, 1e-6, 1, 'cooldown plan_mfu')
    check(config, 1, block_size, 'stride')
    choices = {'optimizer': 'adamw muon', 'schedule': 'cosine wsd', 'tracker': 'none tensorboard wandb'}
    choices['dtype'] = 'auto float32 bfloat16 float16'
    for name, known in choices.items():
        if config[name] not in known.split():
            raise ValueError(f"{name}='{config[name]}' must be one of: {known.replace(' ', ', ')}.")
    if not out_dir:
        raise ValueError('out_dir is empty: name a folder.')
    if plan:
        from plan import print_plan  # its imports take a second

        print_plan(config)
        sys.exit()
    device = parallel.join(pick_device(device), backend, gradient_accumulation_steps)

# -----------------------------------------------------------------------------
# device and precision

device_type = torch.device(device).type
if dtype == 'auto':
    dtype = 'float32' if device_type != 'cuda' else 'bfloat16' if torch.cuda.is_bf16_supported(False) else 'float16'
torch.set_float32_matmul_precision('high')  # TF32 on CUDA
autocast = nullcontext() if dtype == 'float32' else torch.autocast(device_type, getattr(torch, dtype))
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')

# -----------------------------------------------------------------------------
# data, model, optimizer

with errors_in_one_sentence():
    if os.path.isdir(out_dir) and not (eval_only or parallel.rank):
        checkpoint.own(out_dir)
    parallel.agree(config)
saved = checkpoint.checkpoints(out_dir)
if init_from == 'auto':
    init_from = 'resume' if saved else 'scratch'
held = saved or checkpoint.checkpoints(out_dir, 'weights')
if held and init_from != 'resume' and not (eval_only and init_from != 'scratch'):
    end(f'{out_dir} holds a run: use it with --init_from=resume, choose another --out_dir, or delete it.')

with errors_in_one_sentence():
    data = Dataset(dataset, verify=verify_data)
    if len(data.train) <= block_size:
        what = f'{len(data.train):,} tokens, fewer than one window of block_size={block_size} and its target'
        raise ValueError(f'The training split of {data.folder} has {what}: prepare more text or choose a smaller one.')
    shape = ('arch', 'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'n_kv_head')
    knobs = {name: config[name] for name in shape}
    state = {'step': 0, 'windows': 0, 'train_seconds': 0.0, 'bad_steps': 0, 'bad_in_a_row': 0, 'evaluated': -1}
    state |= {'best_val_loss': math.inf, 'best_step': 0, 'evaluations_since_best': 0}
    if init_from == 'scratch':
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab_size=data.vocab_size, dropout=dropout, **knobs))
    elif init_from == 'resume':
        path = checkpoint.find(out_dir, 'last', training=True)
        model = GPT.from_pretrained(path, dropout=dropout)
        asked = GPTConfig(**knobs, head_dim=None if arch == 'gpt2' else model.config.head_dim)
        other = [name for name in shape if getattr(model.config, name) != getattr(asked, name)]
        if other:
            raise ValueError(
                f'{path} has {", ".join(f"{name}={getattr(model.config, name)!r}" for name in other)}, this command '
                f'asks for another model: resume with python train.py {out_dir}/config.py --init_from=resume'
            )
        meta, train_state = checkpoint.read_meta(path), checkpoint.load_state(path)
        if (its := meta['config'].get('optimizer')) != optimizer:
            raise ValueError(f"{path} was trained with optimizer='{its}': it takes no other.")
        if meta['data'] != data.fingerprint():
            raise ValueError(f'{data.folder} has changed since {path}: prepare the same again, or start a new run.')
        state = train_state['state']
        now_only = ('init_from', 'out_dir', 'eval_only')
        changed = [k for k in config if config[k] != meta['config'].get(k) and k not in now_only]
    else:  # fine-tune: the shape is the published model's, but for a shorter context
        model = GPT.from_pretrained(init_from, dropout=dropout, block_size=block_size)
        # Published vocabularies are often rounded up a little.
        fits = 0.99 * model.config.vocab_size < data.vocab_size <= model.config.vocab_size
        if os.path.exists(os.path.join(init_from, 'tokenizer.json')):
            fits = fits and tokenizers.same(tokenizers.load(init_from), data.tokenizer)
        if not fits:
            theirs = 'gpt2' if init_from in PUBLISHED else init_from
            raise ValueError(
                f'The model {init_from} has a vocabulary of {model.config.vocab_size:,} tokens, {data.folder} another '
                f"one of {data.vocab_size:,}: prepare the text with the model's, --tokenizer={theirs}"
            )
        config |= {name: getattr(model.config, name) for name in shape}
    model.freeze(freeze)
    if sample_interval:
        report.check_prompt(data.tokenizer, sample_prompt, block_size)
    parallel.agree({'init_from': init_from, 'step': state['step'], 'dataset': data.fingerprint()})
    if init_from == 'resume' and not (eval_only or parallel.rank):
        checkpoint.set_aside(path)
config['init_from'] = meta['config']['init_from'] if init_from == 'resume' else init_from  # where the run began
model.to(device)
if activation_checkpointing:
    model.checkpoint_activations()
with errors_in_one_sentence():
    net = parallel.distribute(model, fsdp, dtype)

compile = (device_type == 'cuda' if compile is None else compile) and can_compile(device)
groups = model.parameter_groups(weight_decay)
matrices = [group for group in groups if 'rows' in group] if optimizer == 'muon' else []
others = [group for group in groups if 'rows' not in group] if optimizer == 'muon' else groups
optimizers = [torch.optim.AdamW(others, lr=learning_rate, betas=(beta1, beta2), fused=True)]
if matrices:
    optimizers.append(Muon(matrices, lr=muon_lr, momentum=muon_momentum, compile=compile and device_type == 'cuda'))
if init_from == 'resume':
    parallel.restore(model, optimizers, train_state['optimizer'])
    if scaler.is_enabled() and train_state['scaler']:  # it may have been trained in another dtype
        scaler.load_state_dict(train_state['scaler'])
    del train_state

if compile:
    model.compile()

# -----------------------------------------------------------------------------
# what happens in the loop


def learning_rate_at(step):
    """As a share of the highest: linear warmup, then down to min_lr at lr_decay_iters, as a cosine or a line."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    if not decay_lr:
        return 1.0
    progress = min(1.0, (step - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == 'cosine' else min(1.0, (1 - progress) / cooldown)
    return share + (1 - share) * min_lr / (learning_rate or 1)


def to_device(*tensors):
    if device_type == 'cuda':  # from pinned memory, without waiting for the copy
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return [tensor.to(device) for tensor in tensors]


def save(light=False):
    """Save a checkpoint, or a light copy, and say so. If that fails training goes on, unless it is at its end."""
    whole, moments = parallel.gather(model, optimizers)
    if parallel.rank:
        return ''
    if not all(parameter.isfinite().all() for parameter in whole.parameters()):
        fail(f'The weights are not finite at step {step:,}: nothing is saved. {diverged}')
    resume = {'state': state, 'optimizer': moments, 'scaler': scaler.state_dict()}
    meta = {'format': 1, 'step': step, 'val_loss': val_loss, 'config': config, 'data': data.fingerprint()}
    try:
        checkpoint.flush(log_path)
        meta['torch'] = torch.__version__
        checkpoint.save(out_dir, whole, data, meta, None if light else resume, keep_last)
        return 'saved' if not light else 'weights saved'
    except OSError as error:
        if last or stopping:
            fail(f'{error}. What was saved before is intact.')
        return f'NOT SAVED: {error}'


def count_bad_steps():
    """Learn from the device which steps it skipped; too many in a row end the run. Waits for the device."""
    total, in_a_row, longest = (int(count) for count in bad.tolist())
    if total > state['bad_steps']:
        say(f'step {step:>6,}  {total - state["bad_steps"]} skipped: the loss or the gradient was not finite')
    state.update(bad_steps=total, bad_in_a_row=in_a_row)
    if longest >= max_bad_steps:
        fail(f'The loss or the gradient was not finite {longest} times in a row, until step {step:,}. {diverged}')


def finished():
    patience = early_stopping_patience or math.inf
    return step >= max_iters or state['evaluations_since_best'] >= patience


# -----------------------------------------------------------------------------
# the run, in four lines

n_windows = count_windows(data.train, block_size, stride)
windows_per_step = batch_size * gradient_accumulation_steps
tokens_per_step = windows_per_step * block_size
n_threads = f' ({torch.get_num_threads()} threads)' if device_type == 'cpu' else ''
n_threads += f' x {parallel.world} processes' if parallel.launched else ''
say(
    f'model   {config["arch"]}, {config["n_layer"]} layers, {config["n_head"]} heads, {config["n_embd"]} wide: '
    f'{model.count_parameters():,} parameters\n'
    f'data    {data.folder}: {len(data.train):,} tokens, {len(data.val):,} to validate; '
    f'{data.kind} {data.vocab_size:,}\n'
    f'device  {device}{n_threads}, {dtype}, {"compiled" if compile else "not compiled"}\n'
    f'steps   {max_iters:,}, each {batch_size} x {gradient_accumulation_steps} x {block_size} = {tokens_per_step:,} '
    f'tokens: {max_iters * tokens_per_step:,}, {max_iters * windows_per_step / n_windows:.2f} epochs'
)
if init_from == 'resume':
    say(f'resume  {path}, step {state["step"]:,}')
    for name in changed:
        say(f'        {name} was {meta["config"].get(name)!r}, is now {config[name]!r}')

log_path = os.devnull if parallel.rank else os.path.join(out_dir, 'log.jsonl')
if not eval_only and not parallel.rank:
    with errors_in_one_sentence():
        checkpoint.own(out_dir)
        report.start_tracker(tracker, out_dir, config, state['step'])
        report.continue_log(log_path, *((state['step'], state['evaluated']) if init_from == 'resume' else (-1, -1)))
        report.write_config(os.path.join(out_dir, 'config.py'), config, state['step'])

diverged = f'What {out_dir} holds is from before; try a lower learning_rate or a grad_clip.'
if not eval_only:
    report.obey_signals()
flops, peak = model.flops_per_token(), report.peak_flops(device, dtype)
report.headings(peak)

# -----------------------------------------------------------------------------
# the loop

model.train()
step = first_step = logged_step = state['step']
train_seconds = first_seconds = logged_seconds = state['train_seconds']  # without evaluating and saving
bad = torch.tensor([state['bad_steps'], state['bad_in_a_row'], 0], dtype=torch.float32, device=device)
mark = time.perf_counter()
while True:
    # Once more after the last update, so that it is evaluated and saved.
    last, stopping = finished(), parallel.agreed(report.stop)
    due = (step % eval_interval == 0 or last) and state['evaluated'] != step
    light = save_weights_interval and step and step % save_weights_interval == 0
    sampling = sample_interval and step > first_step and step % sample_interval == 0
    if due or light or sampling or stopping or eval_only:
        synchronize(device)
        train_seconds += time.perf_counter() - mark
        state['train_seconds'] = train_seconds
        count_bad_steps()
        val_loss = None
        if due or eval_only:
            nats, targets = total_loss(model, data.val, block_size, batch_size, autocast)
            val_loss = nats / targets
            if not math.isfinite(val_loss):
                fail(f'The validation loss is {val_loss} at step {step:,}: nothing is saved. {diverged}')
            improved = val_loss < state['best_val_loss']
            state |= {'evaluated': step, 'evaluations_since_best': state['evaluations_since_best'] + 1}
            if improved:
                state |= {'best_val_loss': val_loss, 'best_step': step, 'evaluations_since_best': 0}
            last = finished()
            figures = {'val_loss': val_loss, 'perplexity': exponential(val_loss)}
            figures['bits_per_byte'] = val_loss / math.log(2) / data.bytes_per_token('val')
            figures['train_seconds'] = round(train_seconds, 3)
        if eval_only:
            report.validation(step, state['windows'] * block_size, figures)
            break
        if due:
            log(log_path, step=step, **figures)
            worthy = last or stopping or (step and (improved or always_save_checkpoint))
            report.validation(step, state['windows'] * block_size, figures, save() if worthy else '')
        if stopping and step > first_step and not due:
            say(f'{step:>9,}  {signal.Signals(stopping).name}, {save()}')
        if (due or stopping) and not parallel.rank:
            report.redraw(out_dir, step, last or stopping)
        if light:
            say(f'{step:>9,}  {save(light=True)}')
        if sampling:
            report.show_sample(log_path, step, parallel.gather(model, [])[0], data.tokenizer, sample_prompt)
        mark = time.perf_counter()
    if last or stopping:
        break

    lr_share = learning_rate_at(step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr_share * optimizer.defaults['lr']
    order = training_order(np.arange(state['windows'], state['windows'] + windows_per_step), n_windows, seed)
    targets = int((len(data.train) - 1 - order * (stride or block_size)).clip(max=block_size).sum())  # no padding
    loss = torch.zeros((), device=device)
    order = order.reshape(gradient_accumulation_steps, batch_size)
    for micro_step in range(parallel.rank, gradient_accumulation_steps, parallel.world):
        x, y = windows(data.train, block_size, order[micro_step], stride)
        weight = int((y != IGNORE).sum()) / targets  # so that every token of the step counts alike
        parallel.synchronize_gradients(net, micro_step + parallel.world >= gradient_accumulation_steps)
        torch.manual_seed(int(np.random.SeedSequence((seed, step, micro_step)).generate_state(1)[0]))
        with autocast:
            micro_loss = net(*to_device(x, y)) * weight
        scaler.scale(micro_loss * parallel.world).backward()  # gradients are averaged over the processes
        loss += micro_loss.detach()
    loss = parallel.total(loss)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    telling = (step + 1) % log_interval == 0 or step + 1 == max_iters
    block_norms = report.norms(model) if log_norms and telling else {}
    grad_norm = parallel.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
    # A step whose loss or gradient is not finite is skipped by the optimizer, on the device: nobody waits to know.
    is_bad = 1 - (loss.isfinite() & grad_norm.isfinite()).float()
    bad = torch.stack((bad[0] + is_bad, (bad[1] + 1) * is_bad, torch.maximum(bad[2], (bad[1] + 1) * is_bad)))
    for optimizer in optimizers:
        optimizer.found_inf = parallel.like(is_bad, model.wte.weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    step += 1
    state |= {'step': step, 'windows': state['windows'] + windows_per_step}

    # Everything below only tells.
    report.show_bar(step, max_iters, quiet=parallel.rank)
    if telling:
        count_bad_steps()
        seconds = train_seconds + time.perf_counter() - mark
        rate = (step - logged_step) * tokens_per_step / (seconds - logged_seconds)
        record = {'step': step, 'tokens': state['windows'] * block_size, 'loss': loss.item()}
        record |= {'lr': lr_share * learning_rate, 'grad_norm': grad_norm.item(), 'tokens_per_second': round(rate)}
        record |= {'tflops': rate * flops / 1e12, 'gib': report.memory(device), 'bad_steps': state['bad_steps']}
        seconds_left = (max_iters - step) * (seconds - first_seconds) / (step - first_step)
        report.progress(log_path, record | block_norms, peak and peak * parallel.world, seconds_left)
        logged_step, logged_seconds = step, seconds

report.finish()
if stopping and not last:
    say(f'Go on with: python train.py {shlex.quote(out_dir + "/config.py")} --init_from=resume')
    parallel.leave(128 + stopping)
    sys.exit(128 + stopping)
if not eval_only:
    if step < max_iters:
        say(f'Stopped early: no better for {early_stopping_patience} evaluations (early_stopping_patience).')
    report.summary(out_dir, state['windows'] * block_size, state)
parallel.leave(0)

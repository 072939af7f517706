"""Train a GPT: one flat loop, read top to bottom.

    python train.py config/train_shakespeare.py                      # a config file sets the knobs
    python train.py config/train_shakespeare.py --batch_size=8       # flags override it
    python train.py config/train_shakespeare.py --init_from=resume   # from its last checkpoint
    torchrun --nproc_per_node=4 train.py config/train_gpt2.py        # 4 processes, the same steps
"""

import runtime
from runtime import UserError

runtime.begin_script()  # first, so that Ctrl-C ends the imports as well: they take seconds

import math
import os
import signal
import sys
from dataclasses import asdict, fields
from typing import Literal

import torch

import checkpoint
import optim
import parallel
import report
from budget import TimedSteps
from configurator import check_range, configure
from data import Mixture, micro_step_seed
from inference import evaluate_mixture, generate_text, load_tokenizer
from model import GPT, IGNORE, GPTConfig, check_round_trip, find_pretrained

# -----------------------------------------------------------------------------
# run
out_dir = 'out'  # where checkpoints and logs go
init_from = 'scratch'  # 'resume', 'auto' (if possible), or a model: 'gpt2', ORG/NAME, a folder
eval_interval = 250  # steps between evaluations, of the whole validation split, and checkpoints
log_interval = 10  # steps between log lines
eval_only = False  # evaluate once and exit
always_save_checkpoint = True  # save after every evaluation; False: only the best so far
keep_last = 2  # checkpoints to keep, besides the best
save_weights_interval: int | None = None  # steps between weights-only checkpoints; never deleted
early_stopping_patience: int | None = None  # end after this many evaluations without a new best
sample_interval: int | None = None  # steps between samples, on the terminal and in the log
sample_prompt = '\n'  # the prompt of the samples
tracker: Literal['none', 'tensorboard', 'wandb'] = 'none'  # where else the log goes
format: Literal['text', 'json'] = 'text'  # json: of a finished run, its last record, and no more
log_norms = False  # log the norms of the parameters and gradients of each block, too
max_skipped_steps = 20  # end after this many steps in a row whose loss or gradient is not finite
seed = 1337  # everything random follows from it and the position in the run
# data
dataset = 'shakespeare'  # data/NAME, made by prepare.py; several by weight: 'a:0.7,b:0.3'
batch_size = 12  # sequences per micro-batch
gradient_accumulation_steps = 5 * 8  # micro-batches per step, divided over the processes
block_size = 1024  # context, in tokens
stride: int | None = None  # between training windows, in tokens; None: block_size, no overlap
verify_data = False  # first read all of the dataset and compare its checksums
# model
arch = 'gpt2'  # 'gpt2', 'qwen3', 'qwen2' or 'llama', see model.py
n_layer = 12  # blocks
n_head = 12  # attention heads
n_kv_head: int | None = None  # heads of keys and values (not gpt2); None: n_head, no sharing
n_embd = 768  # width
dropout = 0.0  # for pretraining 0 is good, for small data try 0.1 or more
bias = True  # biases in LayerNorm and Linear layers, as in GPT-2; False is a bit faster
freeze: int | None = None  # fine-tuning: freeze the embeddings and the first so many blocks
# optimizer
optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: the matrices in blocks; AdamW: the rest
learning_rate = 6e-4  # AdamW's peak
muon_lr = 0.02  # Muon's peak; the same value is good for every n_embd
muon_momentum = 0.95  # Muon's momentum
muon_beta2: float | None = 0.95  # NorMuon's, of the mean squares of rows; None: plain Muon
max_iters = 600000  # steps, that is optimizer updates
max_epochs: float | None = None  # instead of max_iters: times through the text
max_minutes: float | None = None  # or of training, for which steps are timed; the shorter of both
weight_decay = 1e-1  # of matrices and embeddings, not of norms and biases
beta1 = 0.9  # AdamW's
beta2 = 0.95  # AdamW's
grad_clip = 1.0  # clip the gradient's norm to this; 0.0: do not clip
average_frac: float | None = None  # evaluate and save weights averaged over this part of the steps
# learning rate schedule
decay_lr = True  # False: constant, without a warmup, as in nanoGPT
warmup_iters = 0  # steps of linear warmup
schedule: Literal['cosine', 'wsd'] = 'cosine'  # of the decay; wsd: constant, then linear
cooldown_frac = 0.4  # wsd only: the fraction of the steps after the warmup that decay
lr_decay_iters: int | None = None  # the step at which the decay ends; None: max_iters
min_lr: float | None = None  # at the end, Muon's in proportion; None: a tenth of the peak, wsd 0
# system
device = 'auto'  # 'cuda', 'cuda:1', 'xpu', 'mps', 'cpu'; 'auto': the first there is
backend: Literal['nccl', 'gloo'] | None = None  # under torchrun; None: the device's own
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # auto: 16-bit where it is faster
compile: bool | None = None  # with torch.compile; None: on CUDA and XPU only
activation_checkpointing = False  # compute activations twice, not keep them: slower, less memory
fsdp = False  # under torchrun: shard parameters, gradients and optimizer state (FSDP2)
fsdp_replicas = 1  # groups of processes that each shard all of it, such as one per machine (HSDP)
# dry run
plan = False  # do not train, print memory, time and cost
plan_gpus = 1  # devices to plan for
plan_gpu: str | None = None  # H100, T4, ...; CPU: timed; None: H100, with max_minutes this one
plan_mfu = 0.4  # assumed MFU
plan_price: float | None = None  # of a device and hour, in any currency
plan_network: float | None = None  # GB/s that each device can send to the others
# -----------------------------------------------------------------------------
config = configure(globals())  # sets the knobs above from config files and flags

check_range(config, 1, 10**9, 'batch_size gradient_accumulation_steps block_size plan_gpus')
check_range(config, 1, 10**9, 'eval_interval log_interval save_weights_interval sample_interval')
check_range(config, 1, 10**9, 'keep_last early_stopping_patience max_skipped_steps fsdp_replicas')
check_range(config, 0, 10**18, 'max_iters seed warmup_iters lr_decay_iters')
check_range(config, 0, 10**18, 'learning_rate muon_lr min_lr weight_decay grad_clip')
check_range(config, 0, 1 - 1e-6, 'beta1 beta2 muon_momentum muon_beta2')
check_range(config, 1e-6, 1, 'cooldown_frac plan_mfu average_frac')
check_range(config, 1e-6, 10**9, 'plan_price plan_network max_epochs max_minutes')
check_range(config, 1, block_size, 'stride')
if not out_dir:
    raise UserError('out_dir is empty: name a folder.')
report.print_to_stderr(format == 'json')

if plan:
    from plan import print_plan  # its imports take a second

    print_plan(config)
    sys.exit()

# -----------------------------------------------------------------------------
# device and precision

my_device = runtime.pick_device(device)  # under torchrun each process gets its own
my_device = parallel.init_process_group(my_device, backend, gradient_accumulation_steps)
device_type = torch.device(my_device).type
is_main = parallel.rank == 0  # the process that prints, logs and saves

precision = config['dtype'] = runtime.pick_dtype(dtype, my_device)  # config: what will be saved
autocast = runtime.make_autocast(my_device, precision)
scaler = torch.amp.GradScaler(device_type, enabled=precision == 'float16')
torch.set_float32_matmul_precision('high')  # TF32 on CUDA

wants_compile = device_type in ('cuda', 'xpu') if compile is None else compile
compiles = wants_compile and runtime.can_compile(my_device)

# -----------------------------------------------------------------------------
# the run's folder, and the data

writes = is_main and not eval_only
if writes and os.path.isdir(out_dir):  # a new one is made below, when all checks are passed
    checkpoint.lock_folder(out_dir)
parallel.check_same_everywhere(config)  # and now rank 0 has looked after the folder

has_checkpoint = bool(checkpoint.checkpoints(out_dir))
resuming = init_from == 'resume' or (init_from == 'auto' and has_checkpoint)
from_scratch = init_from == 'scratch' or (init_from == 'auto' and not has_checkpoint)
fine_tuning = not (resuming or from_scratch)

# A run is never overwritten; a published model may be evaluated beside it.
has_run = has_checkpoint or bool(checkpoint.checkpoints(out_dir, 'weights'))
if has_run and not resuming and not (eval_only and fine_tuning):
    raise UserError(
        f'{out_dir} holds a run: resume it with --init_from=resume, choose another --out_dir, '
        'or delete it.'
    )

data = Mixture(dataset, block_size, stride, seed, verify=verify_data)  # often of one dataset
windows_per_step = batch_size * gradient_accumulation_steps
tokens_per_step = windows_per_step * block_size
micro_batches_per_process = gradient_accumulation_steps // parallel.world_size

# -----------------------------------------------------------------------------
# model: from scratch, from the run's last checkpoint, or a published one to fine-tune

# Every knob with the name of a field of GPTConfig shapes a model from scratch. A resumed one must
# have that shape, and a published one keeps its own, whatever the knobs say.
shape = {field.name: config[field.name] for field in fields(GPTConfig) if field.name in config}
run_config = dict(config)  # is saved with the run; init_from says what it first started from
tokenizer = data.tokenizer

progress = checkpoint.Progress()
if from_scratch:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **shape))
    run_config['init_from'] = 'scratch'
elif resuming:
    saved = checkpoint.load_run(out_dir, config, data)  # refuses another model, optimizer or text
    progress = saved.progress
    model = GPT.from_pretrained(saved.path, dropout=dropout)
    tokenizer = load_tokenizer(saved.path, model.config.vocab_size)
    run_config['init_from'] = saved.meta['config']['init_from']
else:
    folder = find_pretrained(init_from)
    model = GPT.from_pretrained(folder, block_size, dropout=dropout)
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    for each in data.datasets:
        each.check_vocabulary(tokenizer, model.config.vocab_size, init_from)
    # block_size stays the knob, the length of the windows: a rotary model's own is its context.
    run_config.update({name: getattr(model.config, name) for name in shape if name != 'block_size'})


def set_length(n_steps, n_decay_steps=None):
    """Fix the number of steps, also for whoever repeats the run from its config.py."""
    global max_iters, lr_decay_iters
    max_iters = n_steps
    lr_decay_iters = n_decay_steps  # None: the decay ends with the run
    run_config.update(max_iters=n_steps, lr_decay_iters=n_decay_steps)
    run_config.update(max_epochs=None, max_minutes=None)


# A budget in epochs or minutes becomes a number of steps once: a run that resumes keeps it.
if resuming and (max_epochs or max_minutes):
    set_length(saved.meta['config']['max_iters'], saved.meta['config']['lr_decay_iters'])
elif max_epochs is not None:
    set_length(data.steps(max_epochs, windows_per_step))

check_round_trip(model)  # better now than at the first checkpoint
if device_type != 'cpu':
    optim.check_device(model.config.arch, my_device, precision)
optim.freeze(model, freeze)
if sample_interval:
    report.check_prompt(tokenizer, sample_prompt, block_size)
# All processes must have found the same checkpoint and the same data.
found = {'init_from': run_config['init_from'], 'step': progress.step, 'data': data.fingerprint()}
parallel.check_same_everywhere(found)
if resuming and writes:
    checkpoint.quarantine_after(saved.path)  # newer ones, which load_run found damaged

if activation_checkpointing:
    model.checkpoint_activations()
# The same parameters; the wrapper of DDP is needed only where gradients are averaged.
train_model = parallel.distribute(model, my_device, precision, fsdp, fsdp_replicas)

# -----------------------------------------------------------------------------
# optimizer

compiles_muon = compiles and device_type != 'cpu'  # no gain on a CPU: it is matrix products
optimizers = optim.make_optimizers(
    model, optimizer, learning_rate, (beta1, beta2), weight_decay, muon_lr,
    (muon_momentum, muon_beta2), precision, compiles_muon,
)  # fmt: skip
if resuming:
    parallel.restore_optimizers(model, optimizers, saved.optimizer)
    optim.swap_averages(model, optimizers)  # a checkpoint's weights are the averages
    saved.optimizer = None  # it is large
    if scaler.is_enabled() and saved.scaler:  # the run may have had another dtype before
        scaler.load_state_dict(saved.scaler)
if compiles:
    model.compile()  # in place, so train_model is compiled, too
    if fsdp and activation_checkpointing:
        parallel.compile_blocks(model)


def lr_multiplier(step):
    """Fraction of the peak learning rate: linear warmup, then cosine or WSD decay to min_lr."""
    if not decay_lr:
        return 1.0
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    end = max_iters if lr_decay_iters is None else lr_decay_iters
    done_frac = min(1.0, (step - warmup_iters) / max(1, end - warmup_iters))  # of the decay
    if schedule == 'cosine':
        coeff = 0.5 * (1 + math.cos(math.pi * done_frac))  # from 1 to 0
        final_lr = learning_rate / 10
    else:  # constant, then linear in the last cooldown_frac
        coeff = min(1.0, (1 - done_frac) / cooldown_frac)
        final_lr = 0.0
    if min_lr is not None:
        final_lr = min_lr
    return coeff + (1 - coeff) * final_lr / (learning_rate or 1)


# -----------------------------------------------------------------------------
# what the loop does now and then

clock = runtime.Stopwatch(my_device, progress.train_seconds)
log_path = os.path.join(out_dir, 'log.jsonl') if is_main else os.devnull
advice = f'{out_dir} has what was saved before; try a lower learning_rate, or a grad_clip.'

# Steps whose loss or gradient is not finite are skipped and counted on the device, so that no step
# waits for it; check_skipped_steps reads the counters now and then.
skipped = optim.SkippedSteps(my_device, progress.skipped_steps, progress.skipped_in_a_row)


def tokens_seen():
    return progress.windows_seen * block_size


def out_of_patience():
    return progress.evals_since_best >= (early_stopping_patience or math.inf)


def fail(message):
    """End the run in one sentence, in all processes alike, when a save in progress has ended."""
    check_save(wait=True)
    parallel.wait_for_all()
    report.fail(f'{message} {advice}')


def check_skipped_steps():
    """Read the counters of skipped steps, and end the run after too many in a row."""
    total, in_a_row, longest = skipped.read()
    new = total - progress.skipped_steps
    if new:
        reason = 'the loss or the gradient was not finite'
        if scaler.is_enabled():
            reason += ', as it may be in float16 now and then'
        report.print_line(f'step {progress.step:>6,}  {new} skipped: {reason}')
    progress.skipped_steps = total
    progress.skipped_in_a_row = in_a_row
    if longest >= max_skipped_steps:
        how_often = f'{longest} times in a row, seen at step {progress.step:,}'
        fail(f'The loss or the gradient was not finite {how_often}.')


def evaluate():
    """Measure the loss of all validation tokens together. Returns the metrics for the log."""
    metrics = evaluate_mixture(model, data, batch_size, autocast)
    val_loss = metrics['val_loss']
    if not math.isfinite(val_loss):
        fail(f'The validation loss is {val_loss} at step {progress.step:,}: nothing is saved.')

    progress.last_eval_step = progress.step
    progress.evals_since_best += 1
    if val_loss < progress.best_val_loss:
        progress.best_val_loss = val_loss
        progress.best_step = progress.step
        progress.evals_since_best = 0
    return metrics | {'train_seconds': round(clock.seconds, 3)}


def save_checkpoint(val_loss, must_succeed=False, weights_only=False):
    """Copy the run as it is now, and begin to save it. Returns a word for the terminal.

    must_succeed: wait until it is saved.
    """
    check_save(wait=True)  # one at a time
    copied = [] if weights_only else optimizers
    full_model, optimizer_state = parallel.copy_to_cpu(model, copied)
    if not is_main:
        return ''
    meta = {
        'format': 1, 'torch': torch.__version__, 'step': progress.step, 'tokens': tokens_seen(),
        'val_loss': val_loss, 'config': run_config, 'data': data.fingerprint(), 'text': data.card(),
    }  # fmt: skip
    state = None
    if not weights_only:
        scaler_state = scaler.state_dict()
        state = {'progress': asdict(progress), 'optimizer': optimizer_state, 'scaler': scaler_state}
    checkpoint.start_save(out_dir, full_model, tokenizer, meta, state, keep_last)
    if must_succeed:
        check_save(wait=True, must_succeed=True)
    what = 'weights ' if weights_only else ''
    return what + ('saved' if must_succeed else 'saving')


def check_save(wait=False, must_succeed=False):
    """Say what went wrong in the save that was begun last, if it has ended.

    A full disk is no reason to end the training, unless this was its last chance to save.
    """
    try:
        checkpoint.finish_save(wait)
    except OSError as error:
        if must_succeed:
            report.fail(f'{error}. What was saved before is intact.')
        report.print_line(f'step {progress.step:>6,}  NOT SAVED: {error}')
    except UserError as error:
        report.fail(str(error))


def print_sample():
    """Print and log a sample. Sampling has its own generator, so the training is not touched."""
    full_model = parallel.whole_model(model, my_device) if fsdp else model
    if not is_main:
        return
    full_model.eval()
    (sample,) = generate_text(
        full_model, tokenizer, sample_prompt,
        num_samples=1, max_new_tokens=100, seed=seed, temperature=0.8, top_k=200,
    )  # fmt: skip
    full_model.train()
    report.print_sample(log_path, progress.step, sample_prompt, sample.text)


# -----------------------------------------------------------------------------
# the start of the run: what is trained, on what and how long; the log, signals

report.print_model(model, data, my_device, precision, compiles, parallel)
if optimizer == 'muon':
    report.print_line(f'rates   {learning_rate:g} (AdamW, the column lr), {muon_lr:g} (Muon)')
if resuming:
    lr = lr_multiplier(progress.step) * learning_rate
    is_complete = progress.step >= max_iters and not eval_only
    report.print_resumed(saved, lr, report.last_value(log_path, 'lr', progress.step), is_complete)

if writes:
    checkpoint.lock_folder(out_dir)


def begin():
    """Print how long the run will be, and write its config.py."""
    if not eval_only:
        factors = (batch_size, gradient_accumulation_steps, block_size)
        # A run that resumes may have had another batch size before.
        n_windows = progress.windows_seen + max(0, max_iters - progress.step) * windows_per_step
        report.print_length(max_iters, factors, n_windows * block_size, data.epochs(n_windows))
    if writes:
        report.start_tracker(tracker, out_dir, run_config, progress.step)
        report.truncate_log(log_path, progress.step, progress.last_eval_step)
        report.write_config(os.path.join(out_dir, 'config.py'), run_config, progress.step)
    report.print_headings(peak_flops)


flops_per_token = model.flops_per_token(block_size)
peak_flops = runtime.peak_flops(my_device, precision)  # None where it is not known
if peak_flops:
    peak_flops *= parallel.world_size

if not eval_only:
    runtime.install_signal_handlers()
    flops = tokens_per_step * flops_per_token / parallel.world_size
    report.print_bound(flops, device_type, precision)
timed_steps = None  # with max_minutes
if max_minutes is not None and not resuming and not eval_only:
    timed_steps = TimedSteps(max_minutes, model, optimizers, scaler, compiles)
else:
    begin()

# -----------------------------------------------------------------------------
# the loop

model.train()
first_step = logged_step = timed_step = progress.step
timed_seconds = logged_seconds = progress.train_seconds
clock.resume()  # all that came before is not training
while True:
    # With max_minutes the first steps are timed, and undone.
    n_steps = timed_steps.count(clock) if timed_steps else None
    if n_steps:
        timed_steps = None
        set_length(n_steps if max_epochs is None else min(n_steps, max_iters))
        skipped = optim.SkippedSteps(my_device)
        progress = checkpoint.Progress()
        clock = runtime.Stopwatch(my_device)
        begin()

    # After the last step the loop is entered once more, to evaluate and save the final weights.
    step = progress.step
    done = timed_steps is None and (step >= max_iters or out_of_patience())
    # A signal that any process received, or 0. With several it comes one iteration late, so that
    # nobody waits, and all stop at the same step.
    stop_signal = parallel.async_max(runtime.stop)
    # Else there is nothing to save or to show yet.
    is_new = step > first_step and timed_steps is None
    check_save()

    # ---- now and then: evaluate, save, sample, while the clock of the training stands still
    eval_due = step % eval_interval == 0 or done
    was_evaluated = progress.last_eval_step == step  # a run may resume where it has evaluated
    eval_now = eval_only or (eval_due and not was_evaluated and timed_steps is None)
    weights_due = step > 0 and timed_steps is None
    weights_now = save_weights_interval and weights_due and step % save_weights_interval == 0
    sample_now = sample_interval and is_new and step % sample_interval == 0
    if eval_now or weights_now or sample_now or stop_signal:
        clock.pause()
        progress.train_seconds = clock.seconds
        check_skipped_steps()
        optim.swap_averages(model, optimizers)
        if sample_now:  # before the checkpoint of this step: a run that resumes there has it
            print_sample()
        val_loss = None
        if eval_now:
            metrics = evaluate()
            val_loss = metrics['val_loss']
            done = done or out_of_patience()
        if eval_only:
            report.print_validation(step, tokens_seen(), metrics)
            break

        is_last = bool(done or stop_signal)
        if eval_now:
            report.log(log_path, step=step, **metrics)
            is_best = progress.best_step == step
            outcome = ''
            if is_last or (step > 0 and (is_best or always_save_checkpoint)):
                outcome = save_checkpoint(val_loss, must_succeed=is_last)
            report.print_validation(step, tokens_seen(), metrics, outcome)
            if is_main and progress.evals_since_best >= 2 and not is_last:
                report.warn_of_overfitting(log_path, progress.best_step)
        elif stop_signal and is_new:
            outcome = save_checkpoint(None, must_succeed=True)
            report.print_line(f'{step:>9,}  {signal.Signals(stop_signal).name}, {outcome}')
        if is_main and (eval_now or (stop_signal and is_new)):
            report.update_plot(out_dir, step, is_last)
        if weights_now:
            outcome = save_checkpoint(val_loss, must_succeed=is_last, weights_only=True)
            report.print_line(f'{step:>9,}  {outcome}')
        optim.swap_averages(model, optimizers)
        clock.resume()
    if done or stop_signal:
        break

    # ---- one training step
    if timed_steps is None:
        report.show_bar(step, max_iters, quiet=not is_main)
    lr_scale = lr_multiplier(step)
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = lr_scale * opt.defaults['lr']  # the peak

    # The windows of the whole step. Process r of n takes its micro-batches r, r + n, r + 2n, ...
    windows = data.training_windows(progress.windows_seen, windows_per_step)
    micro_batches = windows.reshape(gradient_accumulation_steps, batch_size, 2)
    n_targets = data.count_targets(windows)
    loss = torch.zeros((), device=my_device)
    for micro_step in range(parallel.rank, gradient_accumulation_steps, parallel.world_size):
        # Gradients are averaged over the processes once, in the last backward pass.
        is_last_micro_step = micro_step + parallel.world_size >= gradient_accumulation_steps
        parallel.sync_gradients(train_model, is_last_micro_step)
        x, y = data.get_batch(micro_batches[micro_step])
        # The mean over a micro-batch times its share of all targets: these sum up to the mean over
        # the step. A padded window has fewer targets.
        share = int((y != IGNORE).sum()) / n_targets
        torch.manual_seed(micro_step_seed(seed, step, micro_step))  # for dropout
        with autocast:
            micro_loss = train_model(*runtime.to_device(my_device, x, y)) * share
        # DDP and FSDP average; times world_size it is a sum.
        scaler.scale(micro_loss * parallel.world_size).backward()
        loss += micro_loss.detach()
        if step == first_step and micro_step == parallel.rank and not compiles:
            seconds = (clock.measure() - progress.train_seconds) * micro_batches_per_process
            n_left = max_iters - step if timed_steps is None else 1
            report.print_estimate(seconds, n_left, dataset)
        report.show_micro_batch(micro_step + 1, gradient_accumulation_steps)
    loss = parallel.all_reduce_sum(loss)

    for opt in optimizers:
        scaler.unscale_(opt)
    log_now = (step + 1) % log_interval == 0 or step + 1 == max_iters
    norms = optim.block_norms(model) if log_norms and log_now else {}  # before clipping
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    grad_norm = parallel.full_tensor(grad_norm)

    # 1.0 where something is not finite. scaler.step(opt) would wait for the device to know; instead
    # the optimizers, fused AdamW and Muon, change nothing where their found_inf is 1.0.
    skip = 1 - (loss.isfinite() & grad_norm.isfinite()).float()
    skipped.add(skip)
    for opt in optimizers:
        opt.found_inf = parallel.replicate_like(skip, model.wte.weight)  # sharded, or not
        opt.step()
        opt.zero_grad(set_to_none=True)
    scaler.update()
    progress.step += 1
    optim.average_weights(optimizers, progress.step, average_frac)
    progress.windows_seen += windows_per_step

    # ---- from here on nothing but logging
    if log_now and timed_steps is None:
        check_skipped_steps()  # waits for the device
        seconds = clock.seconds
        n_tokens = (progress.step - logged_step) * tokens_per_step
        tokens_per_second = n_tokens / (seconds - logged_seconds)
        seconds_per_step = (seconds - timed_seconds) / (progress.step - timed_step)
        record = {
            'step': progress.step,
            'tokens': tokens_seen(),
            'loss': loss.item(),
            'lr': lr_scale * learning_rate,
            'grad_norm': grad_norm.item(),
            'tokens_per_second': round(tokens_per_second),
            'tflops': tokens_per_second * flops_per_token / 1e12,
            'gib': runtime.peak_memory_gib(my_device),
            'skipped_steps': progress.skipped_steps,
            'train_seconds': round(seconds, 3),
            **norms,
        }
        seconds_left = (max_iters - progress.step) * seconds_per_step
        report.print_progress(log_path, record, peak_flops, seconds_left)
        logged_step = progress.step
        logged_seconds = seconds
    # Where that step was the one that compiled, the rates are those of the steps after it.
    if compiles and timed_steps is None and progress.step == first_step + 1:
        logged_step = timed_step = progress.step
        logged_seconds = timed_seconds = clock.measure()

# -----------------------------------------------------------------------------
# the end

report.finish()
if stop_signal and not done:
    report.print_stopped(out_dir, bool(checkpoint.checkpoints(out_dir)))
    parallel.exit(128 + stop_signal)  # returns only in a single process
    sys.exit(128 + stop_signal)
if not eval_only:
    if progress.step < max_iters:
        patience = f'{early_stopping_patience} evaluations (early_stopping_patience)'
        report.print_line(f'Stopped early: no new best for {patience}.')
    if is_main:
        report.print_summary(out_dir, progress, tokens_seen(), model, my_device)
parallel.exit(0)

"""Logging: the terminal's table, log.jsonl, config.py, trackers and loss.png."""

import contextlib
import errno
import json
import math
import os
import shlex
import signal
import sys
import time
import uuid
from pathlib import Path

from tqdm import tqdm

import runtime
from runtime import UserError, visible

DAY = 24 * 3600  # seconds
# The horizontal axes of a picture: the field of the log, and the label.
X_FIELDS = {'steps': 'step', 'seconds': 'train_seconds', 'tokens': 'tokens'}
X_LABELS = {'steps': 'step', 'seconds': 'seconds of training', 'tokens': 'tokens'}

_record_file = None  # to which a run's last record is printed
_bar = None  # the progress bar
_bar_time = 0.0  # when it was drawn last for a micro-batch
_has_warned = False  # of overfitting
_send = None  # sends a record to the tracker
_close_tracker = None
_tracked = {}  # {name: the step of its last value that was sent}
_next_plot = time.monotonic() + 100  # when loss.png may be drawn again; at first a guess


# -----------------------------------------------------------------------------
# the terminal


def print_line(text):
    """Print a line at once. Where nobody reads any more, have the run save and exit.

    That is after `| head`, or in a terminal that was closed.
    """
    try:
        with tqdm.external_write_mode():
            print(text, flush=True)
    except OSError as error:
        runtime.drop_output()
        if error.errno in (errno.EPIPE, errno.EIO):  # not a full disk
            runtime.request_stop(signal.SIGTERM, None)


def describe_shape(model):
    """Return a line on the architecture of a model and its size."""
    c = model.config
    size = f'{c.n_layer} layers, {c.n_head} heads, n_embd {c.n_embd}'
    return f'model   {c.arch}, {size}: {model.count_parameters():,} parameters'


def print_model(model, data, device, precision, compiles, parallel):
    """Print what is trained, with a Mixture, and on what."""
    import torch

    where = device
    if torch.device(device).type == 'cpu':
        where += f' ({torch.get_num_threads()} threads)'
    if parallel.launched:
        where += f' x {parallel.world_size} processes'
    compiled = 'compiled' if compiles else 'not compiled'
    print_line(describe_shape(model))
    print_line(f'data    {data.describe()}')
    print_line(f'device  {where}, {precision}, {compiled}')


def print_resumed(saved, lr, lr_before, is_complete):
    """Print from where a run goes on (a checkpoint.SavedRun), and with what other knobs."""
    print_line(f'resume  {saved.path}, step {saved.progress.step:,}')
    for name, (before, now) in saved.changed.items():
        print_line(f'        {name} was {before!r}, is now {now!r}')
    if is_complete:
        print_line(
            '        it has all its steps. More of them: python train.py\n'
            f'        {saved.path.parent}/config.py --init_from=resume --max_iters=MANY\n'
            f'        or a new run from its weights: --init_from={saved.path} --out_dir=ANOTHER'
        )
    elif lr_before and lr > 2 * lr_before:
        print_line(f'        the learning rate rises from {lr_before:.2e} to {lr:.2e}')


def print_length(n_steps, factors, n_tokens, epochs):
    """Print the steps of a run, and its tokens. factors: of those in a step. epochs: or None."""
    each = f'{" x ".join(map(str, factors))} = {math.prod(factors):,}'
    print_line(f'steps   {n_steps:,}, each {each} tokens: {n_tokens:,}')
    if epochs:
        print_line(f'        {epochs} epochs of it')


def print_bound(flops, device, dtype):
    """Say how long a step takes at least, where that is long.

    That is as if all of it ran at the rate of large matrix products, which is measured only where
    no CPU would take less than ten seconds.
    """
    if device == 'cpu' and flops > 1e13:
        seconds = flops / runtime.matmul_flops(device, dtype)
        if seconds > 10:
            print_line(f'        at least {duration(seconds)} a step here')


def print_estimate(seconds, n_steps, dataset):
    """Say after the first micro-batch how long a step will take, and the run, where it is long."""
    if seconds > 10:
        total = f', about {duration(n_steps * seconds)} in all' if n_steps > 1 else ''
        print_line(f'        about {duration(seconds)} a step here{total}')
    if n_steps * seconds > DAY:
        name = shlex.quote(f'--dataset={dataset}')
        print_line(
            '        A model for ten minutes of this machine:\n'
            f'        python train.py config/fit.py --max_minutes=10 {name}'
        )


def print_to_stderr(on):
    """Leave standard output, or not, to the last record of a run, which a program reads."""
    global _record_file
    if on and os.environ.get('RANK', '0') == '0':  # the other processes print nowhere
        _record_file = sys.stdout
        sys.stdout = sys.stderr


def show_bar(step, max_iters, quiet):
    """Draw a progress bar below the lines, if they go to a terminal; advance it to a step."""
    global _bar
    if _bar is None:
        off = True if quiet else None  # None: where there is no terminal
        _bar = tqdm(total=max_iters, initial=step, unit='step', ncols=80, leave=False, disable=off)
    _bar.update(step - _bar.n)


def show_micro_batch(number, count):
    """Show on the bar, once a second, how far a long step has come."""
    global _bar_time
    now = time.monotonic()
    if _bar is not None and count > 1 and now > _bar_time + 1:
        _bar.set_postfix_str(f'micro-batch {number}/{count}')
        _bar_time = now


def print_headings(peak):
    """Print the table's headings. peak: FLOP/s of all devices, or None where it is not known."""
    unit = 'MFU' if peak else 'TFLOP/s'
    print_line(f'\n     step  tokens     loss       lr grad norm  tokens/s{unit:>9}    GiB     ETA')


def print_progress(log_path, record, peak, seconds_left):
    """Log a training step and print its row of the table. peak: as for print_headings."""
    # JSON has neither NaN nor infinity: they are logged as null.
    nulls = {name: None for name, value in record.items() if not math.isfinite(value)}
    log(log_path, **{**record, **nulls})
    speed = f'{record["tflops"]:.3g}'
    if peak:
        speed = f'{record["tflops"] * 1e12 / peak:.1%}'  # MFU, model FLOPs utilization
    row = _first_cells(record['step'], record['tokens'], record['loss'])
    row += f'{record["lr"]:>9.2e}{record["grad_norm"]:>10.2f}{record["tokens_per_second"]:>10,}'
    row += f'{speed:>9}{record["gib"]:>7.2f}{duration(seconds_left):>8}'
    print_line(row)


def print_validation(step, tokens, metrics, saved=''):
    """Print the row of an evaluation. saved: what became of the checkpoint, if one was saved."""
    ppl = metrics['perplexity'] or math.inf  # None: beyond all numbers
    ppl = f'{ppl:,.1f}' if ppl < 1e6 else f'{ppl:.3g}'
    row = _first_cells(step, tokens, metrics['val_loss'])
    row += f'  validation, ppl {ppl}, {metrics["bits_per_byte"]:.3f} bits per byte'
    if saved:
        row += f', {saved}'
    print_line(row)
    for name, loss in metrics.items():
        if name.startswith('val_loss/'):  # of one of several datasets
            print_line(f'{loss:26.4f}  validation of {name.removeprefix("val_loss/")}')


def _first_cells(step, tokens, loss):
    """Return the part of a row that a training step and an evaluation have in common."""
    return f'{step:>9,}{human(tokens):>8}{loss:>9.4f}'


def check_prompt(tokenizer, prompt, block_size):
    """Check that sample_prompt can be used with a dataset's tokenizer. Raises UserError."""
    try:
        n = len(tokenizer.prefix) + len(tokenizer.encode_prompt(prompt))
    except UserError as error:
        raise UserError(f'sample_prompt={prompt!r} does not suit the tokenizer: {error}') from None
    can_be_empty = tokenizer.end_of_text is not None  # it is that token then
    if n > block_size or (n == 0 and not can_be_empty):
        raise UserError(f'sample_prompt has {n:,} tokens: it needs 1 to block_size={block_size}.')


def print_sample(log_path, step, prompt, text):
    """Print and log a sample: the prompt, and the text with which the model continues it."""
    sample = prompt + text
    print_line(visible(sample) + '\n' + '-' * 80)
    log(log_path, step=step, sample=sample)


def print_summary(out_dir, progress, n_tokens, model, device):
    """Print what a finished run has done (a checkpoint.Progress), and how to sample from it.

    For programs the same is the last record of its log.
    """
    log_path = os.path.join(out_dir, 'log.jsonl')
    final = {
        'val_loss': last_value(log_path, 'val_loss'),
        'bits_per_byte': last_value(log_path, 'bits_per_byte'),
        'best_val_loss': progress.best_val_loss, 'best_step': progress.best_step,
        'seconds': round(progress.train_seconds, 3), 'steps': progress.step,
        'tokens': n_tokens, 'parameters': model.count_parameters(),
        'gib': runtime.peak_memory_gib(device),
    }  # fmt: skip
    # JSON has neither NaN nor infinity: they are left out.
    final = {name: v for name, v in final.items() if v is None or math.isfinite(v)}
    log(log_path, step=progress.step, final=final)
    best = f'{progress.best_val_loss:.4f}, at step {progress.best_step:,}'
    sampled = ': that checkpoint is sampled'
    if progress.best_step == 0:
        sampled = ', before any training'
    print_line(
        f'\n{final["tokens"]:,} tokens in {duration(final["seconds"])} of training.\n'
        f'Best validation loss {best}{sampled}.\n'
        f'{out_dir} has the checkpoints, loss.png and log.jsonl. Sample from it with:\n'
        f'python sample.py --out_dir={shlex.quote(out_dir)}'
    )
    if overfits(all_records(log_path), progress.best_step):
        print_line(OVERFITTING.format(progress.best_step))
    if _record_file:
        print(json.dumps(final), flush=True, file=_record_file)


# What is said once, after two evaluations without a new best, and at the end.
OVERFITTING = (
    'Validation has risen since step {:,} while training fell: the model learns the\n'
    'text by heart. What helps: fewer steps, --weight_decay=0.3 with Muon, --dropout, a\n'
    'smaller model, or more text. --early_stopping_patience=2 ends a run that overfits.'
)


def warn_of_overfitting(log_path, best_step):
    """Say it once where validation has risen since a step while training fell."""
    global _has_warned
    if not _has_warned and overfits(all_records(log_path), best_step):
        print_line(OVERFITTING.format(best_step))
        _has_warned = True


def overfits(records, best_step):
    """Return whether validation has risen since its best step while training fell."""
    validation = [r['val_loss'] for r in records if r.get('val_loss') and r['step'] >= best_step]
    training = [(r['step'], r['loss']) for r in records if r.get('loss')]
    before = [loss for step, loss in training if step <= best_step]
    if best_step == 0:  # there is no loss before it
        before = [loss for _, loss in training[:1]]
    after = [loss for step, loss in training if step > best_step]
    if not before or not after or len(validation) < 3:
        return False
    before = before[-len(after) :]
    now = sum(after) / len(after)
    # Training above validation is noise, or dropout.
    has_fallen = now < min(sum(before) / len(before), validation[0])
    return has_fallen and validation[-1] > 1.005 * validation[0]


def print_stopped(out_dir, has_checkpoint):
    """Print how a run that a signal has ended goes on."""
    how = 'Nothing was to be saved yet.'
    if has_checkpoint:
        config = shlex.quote(os.path.join(out_dir, 'config.py'))
        n = os.environ.get('LOCAL_WORLD_SIZE')
        start = f'torchrun --nproc_per_node={n}' if n else 'python'
        how = f'Resume with: {start} train.py {config} --init_from=resume'
    print_line(how)


def finish():
    """Close the bar and the tracker's run."""
    if _bar is not None:
        _bar.close()
    if _close_tracker is not None:
        with contextlib.suppress(Exception):  # whatever a tracker raises
            _close_tracker()


def fail(message):
    """End the run with one sentence, below the bar."""
    finish()
    raise UserError(message)


def human(count):
    """Return 1234567 as 1.23M."""
    return tqdm.format_sizeof(count) if count >= 1000 else str(count)


def duration(seconds):
    """Return seconds as 12m05s, as 3h20m, or as 321 days."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 1000:
        return f'{hours / 24:,.0f} days'
    return f'{hours}h{minutes:02}m' if hours else f'{minutes}m{seconds:02}s'


# -----------------------------------------------------------------------------
# the files of a run: log.jsonl, config.py


def log(path, **record):
    """Append a record to a log, and send it to the tracker."""
    line = json.dumps(record).encode() + b'\n'
    try:
        with open(path, 'ab+') as file:
            # A full disk may have cut the last line short: begin a new one.
            file.seek(max(0, file.tell() - 1))
            if file.read(1) not in (b'', b'\n'):
                line = b'\n' + line
            file.write(line)
    except OSError as error:  # not a reason to stop training
        print_line(f'{path} could not be written: {error}')
    track(**record)


def _read_lines(path):
    """Yield the lines of a log with their records, (text, dict), except those cut short."""
    if not os.path.isfile(path):
        return
    with open(path, encoding='utf-8', errors='replace') as lines:
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):  # cut short, or nonsense
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get('step'), int):
                    yield line, record


def read_log(folder):
    """Return the records of a run's log.jsonl. Raises UserError where there are none."""
    records = all_records(os.path.join(folder, 'log.jsonl'))
    if not records:
        raise UserError(f'There are no steps in {folder}/log.jsonl: name the out_dir of a run.')
    return records


def all_records(path):
    """Return the records of a log; none where it was deleted."""
    return [record for _, record in _read_lines(path)]


def last_value(path, name, last_step=math.inf):
    """Return the last value of this name in a log, up to a step; None where there is none."""
    value = None
    for record in all_records(path):
        if record['step'] <= last_step:
            value = record.get(name, value)
    return value


def truncate_log(path, step, last_eval_step):
    """Cut a log back to where a run resumes: what came later is about to happen again.

    Records of steps up to `step` stay, those of evaluations up to `last_eval_step`: a run that was
    saved between the two evaluates again. Lines that were cut short go, and the final record.
    """
    kept = []
    for line, record in _read_lines(path):
        last = last_eval_step if 'val_loss' in record else step
        if line.endswith('\n') and record['step'] <= last and 'final' not in record:
            kept.append(line)
    replace_file(path, kept)


def write_config(path, config, step):
    """Write the knobs of a run as a config file, which finds the run again where it was moved."""
    knobs = ''.join(f'{name} = {value!r}\n' for name, value in config.items())
    text = f"""# The knobs of this run, since step {step}.
# To resume it: python train.py THIS_FILE --init_from=resume
# To repeat it: python train.py THIS_FILE --out_dir=ANOTHER
{knobs}
# A run that was copied or moved resumes where it is now, in the folder of this file.
from pathlib import Path

_folder = Path(__file__).parent
_run = [*_folder.glob('log.jsonl'), *_folder.glob('step_*'), *_folder.glob('weights_*')]
if _run:
    out_dir = str(_folder)
"""
    replace_file(path, [text])


def replace_file(path, lines):
    """Write a text file that is never seen half-written."""
    with open(new_file(path + '.tmp'), 'x', encoding='utf-8') as file:
        file.writelines(lines)
    os.replace(path + '.tmp', path)


def new_file(path):
    """Return a path at which nothing is any more, such as a link that leads elsewhere."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return path


# -----------------------------------------------------------------------------
# trackers


def start_tracker(kind, out_dir, config, step):
    """Have all that is logged sent to 'wandb' or 'tensorboard' as well; 'none': to neither.

    A run that resumes, at a step > 0, continues its record there. Raises UserError where a tracker
    cannot be used.
    """
    global _send, _close_tracker
    try:
        if kind == 'tensorboard':
            _send, _close_tracker = _start_tensorboard(out_dir, config, step)
        elif kind == 'wandb':
            _send, _close_tracker = _start_wandb(out_dir, config, step)
    except ImportError:
        raise UserError(f"tracker='{kind}' needs a package: pip install {kind}") from None
    except Exception as error:  # whatever a tracker raises
        hint = ''
        if kind == 'wandb':
            hint = ': log in with wandb login, or set WANDB_MODE=offline and upload the run later'
        raise UserError(f'{kind} cannot be used ({runtime.brief(error)}){hint}.') from None


def _start_tensorboard(out_dir, config, step):
    """Return the functions send(step, values), which sends a record, and close()."""
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    purge_step = step + 1 if step else 0
    writer = SummaryWriter(os.path.join(out_dir, 'tensorboard'), purge_step=purge_step)
    if step == 0:
        # Indented: TensorBoard reads Markdown.
        knobs = '\n'.join(f'    {name} = {value!r}' for name, value in config.items())
        writer.add_text('config', knobs, 0)

    def send(step, values):
        for name, value in values.items():
            if isinstance(value, str):
                writer.add_text(name, value, step)
            elif isinstance(value, Path):
                writer.add_image(name, imread(value), step, dataformats='HWC')
            else:
                writer.add_scalar(name, value, step)
        writer.flush()

    return send, writer.close


def _start_wandb(out_dir, config, step):
    """Return the functions send(step, values), which sends a record, and close()."""
    import wandb

    # The id under which the run is known there is kept, so that a resumed run is the same one.
    id_path = Path(out_dir, 'wandb_id')
    if step == 0 or not id_path.exists():
        replace_file(str(id_path), [uuid.uuid4().hex[:8]])
    run = wandb.init(
        project=os.environ.get('WANDB_PROJECT', 'flatgpt'),
        id=id_path.read_text(encoding='utf-8'), resume='allow', name=Path(out_dir).resolve().name,
        dir=out_dir, config=config, settings=wandb.Settings(console='off', init_timeout=30),
    )  # fmt: skip

    def send(step, values):
        pictures = {name: wandb.Image(str(v)) for name, v in values.items() if isinstance(v, Path)}
        run.log({**values, **pictures}, step=step)

    return send, run.finish


def track(step, **values):
    """Send a record to the tracker, if there is one. One that fails is not used again.

    Each name is sent once per step: `train_seconds` is in a step's record and in its evaluation's.
    """
    global _send
    if _send is None:
        return
    values = {name: v for name, v in values.items() if v is not None and name != 'final'}
    new = {name: v for name, v in values.items() if _tracked.get(name) != step}
    _tracked.update(dict.fromkeys(new, step))
    if not new:
        return
    try:
        _send(step, new)
    except Exception as error:  # whatever a tracker raises
        _send = None
        print_line(f'The tracker failed and is not used any more: {runtime.brief(error)}')


# -----------------------------------------------------------------------------
# loss.png


def update_plot(out_dir, step, done):
    """Draw loss.png anew and track it: at the end, and before in at most 1 % of the time.

    An error is printed; training continues.
    """
    global _next_plot
    started = time.monotonic()
    if not done and (step == 0 or started < _next_plot):
        return
    try:
        picture = Path(out_dir, 'loss.png')
        draw({out_dir: read_log(out_dir)}, str(picture))
        now = time.monotonic()
        _next_plot = now + 100 * (now - started)
        track(step, picture=picture)
    except Exception as error:  # whatever a plotting library raises
        print_line(f'loss.png could not be drawn: {type(error).__name__}: {error}')


def draw(runs, path, x='steps'):
    """Draw runs as a PNG: loss above, learning rate and gradient norm below.

    runs: {label: the records of its log}. x: the horizontal axis, 'steps', 'seconds' (of training)
    or 'tokens'; it shows the records that have this number. Raises UserError for a run without any.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=110, layout='constrained')
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    right = below.twinx()
    for number, (name, records) in enumerate(runs.items()):
        points = _points(name, records, x)
        train = [p for p in points if p.get('loss') is not None]
        val = [p for p in points if p.get('val_loss') is not None]
        color = f'C{number}'
        val_color = 'black'
        label = ''
        if len(runs) > 1:
            val_color = color
            label = f'{name}, '.replace('$', r'\$').lstrip('_')  # no formulas, and not hidden
        if train:
            _draw_training(above, below, right, train, label, color)
        if val:
            _draw_validation(above, val, label, val_color)
        skipped = max(p.get('skipped_steps', 0) for p in points)
        if skipped:
            above.plot([], [], ' ', label=f'{label}skipped steps: {skipped:,}')

    _fit_losses(above, runs)
    above.set_ylabel('loss, nats per token')
    above.grid(alpha=0.25)
    if above.get_legend_handles_labels()[0]:
        # Outside, where no line is, one below the other, since folders may have long names.
        figure.legend(frameon=False, loc='outside upper center', fontsize='small')
    below.set(ylabel='learning rate', xlabel=X_LABELS[x], ylim=(0, None))
    below.grid(alpha=0.25)
    right.set(ylabel='gradient norm (faint)', ylim=(0, None))
    _format_x(above, below, runs, x)
    figure.savefig(new_file(path + '.tmp'), format='png')
    os.replace(path + '.tmp', path)


def _points(name, records, x):
    """Return those of a run's records that have a place on the horizontal axis, with it as 'x'."""
    field = X_FIELDS[x]
    rate = _tokens_per_step(records)
    if rate is not None:  # then the evaluations have theirs, too
        records = [{'tokens': record['step'] * rate, **record} for record in records]
    points = [{**r, 'x': r[field]} for r in records if r.get(field) is not None]
    if not points:
        raise UserError(f'The log of {name} has no {field}: draw it over steps.')
    return points


def _tokens_per_step(records):
    """Return the tokens of every step; None where batches have changed or nothing was logged."""
    rates = {r['tokens'] // r['step'] for r in records if r['step'] and r.get('tokens')}
    return rates.pop() if len(rates) == 1 else None


def _draw_training(above, below, right, train, label, color):
    """Draw the losses of a run, faint and smoothed, its learning rates and gradient norms."""
    xs = [p['x'] for p in train]
    losses = [p['loss'] for p in train]
    smoothed = smooth(losses, len(losses) / 20)
    above.plot(xs, losses, color=color, alpha=0.25, linewidth=0.8)
    above.plot(xs, smoothed, color=color, linewidth=1.2, label=f'{label}training')
    below.plot(xs, [p.get('lr') for p in train], color=color)
    right.plot(xs, [p.get('grad_norm') for p in train], color=color, alpha=0.4, linewidth=0.8)


def _draw_validation(axes, val, label, color):
    """Draw the validation losses of a run, with a star at the best."""
    best = min(val, key=lambda p: p['val_loss'])
    label = f'{label}validation, best {best["val_loss"]:.4f} at step {best["step"]:,}'
    xs = [p['x'] for p in val]
    axes.plot(xs, [p['val_loss'] for p in val], 'o-', color=color, markersize=3.5, label=label)
    axes.plot(best['x'], best['val_loss'], '*', color='crimson', markersize=13, zorder=5)


def _fit_losses(axes, runs):
    """Fit the vertical limits to all evaluations, and to training after its first 3 %."""
    tops = []
    for records in runs.values():
        first = 0.03 * records[-1]['step']
        tops += [r['loss'] for r in records if r['step'] > first and r.get('loss') is not None]
        tops += [r['val_loss'] for r in records if r.get('val_loss') is not None]
    lows = [line.get_ydata().min() for line in axes.get_lines() if len(line.get_ydata())]
    if tops and max(tops) > min(lows):
        margin = 0.05 * (max(tops) - min(lows))
        axes.set_ylim(min(lows) - margin, max(tops) + margin)


def _format_x(above, below, runs, x):
    """Format the horizontal axis; steps that all have as many tokens also get one of tokens."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    if x == 'tokens':
        below.xaxis.set_major_formatter(EngFormatter(sep=''))
    rate = _tokens_per_step([record for records in runs.values() for record in records])
    if x == 'steps' and rate is not None:
        axis = above.secondary_xaxis('top', functions=(lambda s: s * rate, lambda t: t / rate))
        axis.xaxis.set_major_formatter(EngFormatter(sep=''))
        axis.set_xlabel('tokens')


def smooth(values, width):
    """Return the exponential moving average over about `width` values.

    Unbiased at its beginning (Kingma and Ba, 2015, section 3).
    """
    keep = 1 - 1 / max(1.0, width)
    mean = 0.0
    result = []
    for n, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        result.append(mean / (1 - keep**n))
    return result

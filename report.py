"""What a run tells, on the terminal, in log.jsonl, loss.png and config.py and to trackers; the signals that end it."""

import contextlib
import errno
import json
import math
import os
import re
import shlex
import signal
import time
import uuid
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import end, nobody_reads
from parallel import whole
from plot import draw, read_log
from sample import write
from tokenizer import encode

try:
    import resource
except ImportError:  # Windows
    resource = None

GPUS = {  # (16-bit TFLOP/s without sparsity, GiB), from the makers' data sheets
    'T4': (65, 16), 'V100': (125, 16), 'A10': (125, 24), 'L4': (121, 24), 'L40S': (362, 48), 'A100': (312, 80),
    'H100': (989, 80), 'H200': (989, 141), 'B200': (2250, 180), 'RTX3090': (71, 24), 'RTX4090': (165, 24),
}  # fmt: skip
stop = 0  # the signal that asked for an end
_asked = 0.0  # when
_bar = None  # the progress bar
_drawn = time.monotonic(), 1.0  # when loss.png was last drawn, and the seconds that took; the first time a guess
_send = _end = None  # a record to the tracker; the tracker's end


def obey_signals():
    """Have SIGINT, SIGTERM and SIGHUP set `stop`, where they would have ended the process."""
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):  # Windows has no SIGHUP, nohup ignores it
        number = getattr(signal, name, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, request_stop)


def request_stop(number, frame):
    """Let the step in progress finish, then save and exit. A second Ctrl-C ends the process at once."""
    global stop, _asked
    if stop == number == signal.SIGINT and time.monotonic() > _asked + 1:  # launchers pass on what a terminal has sent
        os._exit(130)
    stop, _asked = stop or number, _asked or time.monotonic()


def say(text):
    """Print a line at once. Where nobody reads any more, after `| head` or in a closed terminal, save and exit."""
    try:
        with tqdm.external_write_mode():
            print(text, flush=True)
    except OSError as error:
        nobody_reads()
        if error.errno in (errno.EPIPE, errno.EIO):  # not a full disk
            request_stop(signal.SIGTERM, None)


def show_bar(step, max_iters, quiet):
    """Draw a progress bar below the lines, where they go to a terminal; advance it to a step."""
    global _bar
    if _bar is None:
        _bar = tqdm(total=max_iters, initial=step, ncols=80, leave=False, disable=quiet or None, unit='step')
    _bar.update(step - _bar.n)


def log(path, **record):
    """Add a record to a log, on a line of its own even if the one before was cut short by a full disk; track it."""
    try:
        with open(path, 'ab+') as file:
            file.seek(max(0, file.tell() - 1))
            cut = file.read(1) not in (b'', b'\n')
            file.write(b'\n' * cut + json.dumps(record).encode() + b'\n')
    except OSError as error:  # a full disk is no reason to stop training
        say(f'{path} could not be written: {error}')
    track(record)


def headings(peak):
    speed = 'MFU' if peak else 'TFLOP/s'
    say(f'\n{"step":>9}{"tokens":>8}{"loss":>9}{"lr":>10}{"grad":>7}{"tokens/s":>11}{speed:>9}{"GiB":>7}{"left":>8}')


def progress(path, record, peak, seconds_left):
    """Log a step and print its line. peak: the FLOP/s of all devices, or None. What is not finite is logged as None."""
    r = record
    speed = f'{r["tflops"] * 1e12 / peak:.1%}' if peak else f'{r["tflops"]:.3g}'
    log(path, **{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()})
    say(
        f'{r["step"]:>9,}{short(r["tokens"]):>8}{r["loss"]:>9.4f}{r["lr"]:>10.2e}{r["grad_norm"]:>7.2f}'
        f'{r["tokens_per_second"]:>11,}{speed:>9}{r["gib"]:>7.2f}{duration(seconds_left):>8}'
    )


def validation(step, tokens, figures, saved=''):
    """Print the line of an evaluation."""
    bits, ppl = figures['bits_per_byte'], figures['perplexity'] or math.inf
    ppl = f'{ppl:,.1f}' if ppl < 1e6 else f'{ppl:.3g}'
    line = f'{step:>9,}{short(tokens):>8}{figures["val_loss"]:>9.4f}  validation, ppl {ppl}, '
    say(f'{line}{bits:.3f} bits per byte' + (saved and f', {saved}'))


def check_prompt(tokenizer, prompt, block_size):
    """Raises ValueError for a sample_prompt that cannot be used."""
    try:
        n = len(encode(tokenizer, prompt))
    except ValueError as error:
        raise ValueError(f'sample_prompt={prompt!r} cannot be used with this dataset: {error}') from None
    if not 0 < n <= block_size:
        raise ValueError(f'sample_prompt has {n:,} tokens: it must have from 1 to block_size={block_size}.')


def show_sample(path, step, model, tokenizer, prompt):
    """Let a model write 100 tokens, and log them. It touches nothing random of the training."""
    if model is not None:  # with FSDP it is in one piece in one process only
        (sample,) = write(model.eval(), tokenizer, prompt, 1, length=100, temperature=0.8, top_k=200)
        model.train()
        shown = ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in prompt + sample.text)
        say(f'{shown}\n{"-" * 80}')
        log(path, step=step, sample=prompt + sample.text)


def summary(out_dir, tokens, state):
    say(
        f'\n{tokens:,} tokens in {duration(state["train_seconds"])} of training steps.\n'
        f'Best validation loss {state["best_val_loss"]:.4f}, at step {state["best_step"]:,}.\n'
        f'{out_dir} has the checkpoints, loss.png and log.jsonl. Sample from it with:\n'
        f'python sample.py --out_dir={shlex.quote(out_dir)}'
    )


def redraw(out_dir, step, last):
    """Draw loss.png anew, and track it, but spend less than a hundredth of the time on it. What goes wrong is said."""
    global _drawn
    began, (ended, took) = time.monotonic(), _drawn
    if not last and (not step or began - ended < 100 * took):
        return
    try:
        picture = Path(out_dir, 'loss.png')
        draw({out_dir: read_log(out_dir)}, str(picture))
        _drawn = time.monotonic(), time.monotonic() - began
        track({'step': step, 'picture': picture})
    except Exception as error:  # whatever a plotting library raises
        say(f'loss.png could not be drawn: {type(error).__name__}: {error}')


def finish():
    """The end of the bar, and of the tracker's run."""
    if _bar is not None:
        _bar.close()
    if _end is not None:
        with contextlib.suppress(Exception):  # whatever a tracker raises
            _end()


def fail(message):
    """End the run with one sentence, below the bar."""
    finish()
    end(message)


def start_tracker(kind, out_dir, config, step):
    """Have what is logged sent to 'wandb' or 'tensorboard' too, after a resume in the same place.

    Raises ValueError, in one sentence, when that cannot be.
    """
    global _send, _end
    try:
        if kind == 'tensorboard':
            from matplotlib.image import imread
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(os.path.join(out_dir, 'tensorboard'), purge_step=step + 1 if step else 0)

            def _send(record):
                for name, value in record.items():
                    if isinstance(value, str):
                        writer.add_text(name, value, record['step'])
                    elif isinstance(value, Path):
                        writer.add_image(name, imread(value), record['step'], dataformats='HWC')
                    elif value is not None and name != 'step':
                        writer.add_scalar(name, value, record['step'])
                writer.flush()

            _end = writer.close
            if not step:
                writer.add_text('config', '\n'.join(f'    {name} = {value!r}' for name, value in config.items()), 0)
        elif kind == 'wandb':
            import wandb

            path = os.path.join(out_dir, 'wandb_id')
            if not step or not os.path.exists(path):
                replace(path, [uuid.uuid4().hex[:8]])
            with open(path, encoding='utf-8') as file:
                settings = wandb.Settings(console='off', init_timeout=30)
                names = {'project': os.environ.get('WANDB_PROJECT', 'flatgpt'), 'name': Path(out_dir).resolve().name}
                names |= {'dir': out_dir, 'id': file.read()}
                run = wandb.init(resume='allow', config=config, settings=settings, **names)

            _end = run.finish

            def _send(record):
                record = {k: wandb.Image(str(v)) if isinstance(v, Path) else v for k, v in record.items()}
                run.log({k: v for k, v in record.items() if k != 'step' and v is not None}, step=record['step'])
    except ImportError:
        raise ValueError(f"tracker='{kind}' needs a package: pip install {kind}") from None
    except Exception as error:  # whatever a tracker raises
        hint = ': log in with wandb login, or set WANDB_MODE=offline and send it later' if kind == 'wandb' else ''
        raise ValueError(f'{kind} cannot be used ({type(error).__name__}: {str(error)[:100]}){hint}.') from None


def track(record):
    """Send a record to the tracker, if there is one. When that fails it is not tried again, and training goes on."""
    global _send
    if _send is not None:
        try:
            _send(record)
        except Exception as error:  # whatever a tracker raises
            _send = None
            say(f'The tracker failed and is not used any more: {type(error).__name__}: {str(error)[:100]}')


def peak_flops(device, dtype):
    """The FLOP/s of a device that is known, else None."""
    if torch.device(device).type != 'cuda' or dtype == 'float32':
        return None
    words = torch.cuda.get_device_name(device).replace('RTX ', 'RTX').replace('-', ' ').split()
    slower = {'PCIe', 'NVL', 'Laptop', 'D', 'Ti', 'SUPER'}  # than their namesakes
    found = [GPUS[word][0] * 1e12 for word in words if word in GPUS and not slower & set(words)]
    return found[0] if found else None


def synchronize(device):
    """Wait until a device has done all that it was given."""
    if (kind := torch.device(device).type) in ('cuda', 'mps'):
        getattr(torch, kind).synchronize()


def memory(device):
    """GiB: the most that was used so far, of the device on CUDA, else by the process."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**30
    own = peak_of('self')  # on Linux, the other figure may be that of who started this process; on macOS it is in bytes
    return own or (math.nan if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30)


def peak_of(process):
    """GiB: the most memory a process has had so far; 0 where /proc does not say."""
    try:
        return int(re.search(r'VmHWM:\s+(\d+)', Path(f'/proc/{process}/status').read_text())[1]) / 2**20
    except (OSError, TypeError):  # it has just ended
        return 0


def norms(model):
    """{name: the norm of its parameters, or of their gradients}, for each block and what is around them."""
    parts = {}
    for name, parameter in model.named_parameters():
        part = '.'.join(name.split('.')[: 2 if name.startswith('blocks.') else 1])
        parts.setdefault(f'norm/{part}', []).append(parameter.detach())
        if parameter.grad is not None:
            parts.setdefault(f'grad_norm/{part}', []).append(parameter.grad)
    return {name: float(whole(torch.nn.utils.get_total_norm(tensors))) for name, tensors in parts.items()}


def continue_log(path, step, evaluated):
    """Keep the whole lines of a log up to a step, the last it evaluated: what came after is about to happen again."""
    lines = []
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that was cut short
                    record = json.loads(line)
                    if line[-1] == '\n' and record['step'] <= (evaluated if 'val_loss' in record else step):
                        lines.append(line)
    replace(path, lines)


def write_config(path, config, step):
    """The knobs of a run, as a config file."""
    head = f'# The knobs of this run, since step {step}. To go on: python train.py THIS_FILE --init_from=resume\n'
    head += '# To repeat it: python train.py THIS_FILE --out_dir=ANOTHER\n'
    replace(path, [head, *(f'{name} = {value!r}\n' for name, value in config.items())])


def replace(path, lines):
    """Write a text file that is never seen half-written."""
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
        file.writelines(lines)
    os.replace(path + '.tmp', path)


def short(count):
    """1234567 as 1.23M."""
    return tqdm.format_sizeof(count) if count >= 1000 else str(count)


def duration(seconds):
    """12m05s, or 3h20m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}h{minutes:02}m' if hours else f'{minutes}m{seconds:02}s'

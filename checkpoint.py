"""A training state as a folder that is complete or absent, out_dir/step_00002000/, and back.

    config.json, model.safetensors    the model, as `transformers` opens it; with average_frac the
                                      averages, and the weights are in train_state.pt
    generation_config.json
    tokenizer.json, ...               the tokenizer's files
    train_state.pt                    progress, optimizer and scaler; read with weights_only=True
    meta.json                         step, loss, the run's knobs, torch's version; size and
                                      checksum of the files above

A checkpoint is written under a temporary name, flushed to disk and then renamed; what has no final
name is not a checkpoint. A thread does this, from copies, while the training goes on. The newest
ones and the one with the lowest validation loss are kept, the others deleted. A weights-only
checkpoint, out_dir/weights_00002000/, is the same without train_state.pt, and is never deleted.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

import tokenizer as tokenizers
from card import write_card
from model import GPTConfig, read_config
from runtime import UserError, lock_file

# Its thread starts with the first checkpoint. It has no helpers: with more threads than cores those
# of the training would sleep between operations, and small steps take 40 % longer from then on.
_writer = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
_save = None  # the save that start_save() has begun and finish_save() not seen ended, a Future


@dataclass
class Progress:
    """How far a run has come. Everything random in a step is a function of this and the seed."""

    step: int = 0  # optimizer updates so far, skipped ones included
    windows_seen: int = 0  # the position in the order of the data, see data.py
    train_seconds: float = 0.0  # spent in training steps, not in evaluating or saving
    best_val_loss: float = math.inf  # the lowest so far
    best_step: int = 0  # its step
    evals_since_best: int = 0  # evaluations after it, for early stopping
    last_eval_step: int = -1  # the step of the last evaluation
    skipped_steps: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0  # the length of the present streak of them


@dataclass
class SavedRun:
    """The last checkpoint of a run, with what is needed to resume it."""

    path: Path
    meta: dict  # its meta.json
    progress: Progress
    optimizer: dict  # see parallel.restore_optimizers
    scaler: dict  # the state of the gradient scaler; empty if there was none
    changed: dict  # {knob: (its value then, its value now)}


# -----------------------------------------------------------------------------
# save


def start_save(*args):
    """Have a thread call save(*args). Nothing that it is given may change until that has ended."""
    global _save
    _save = _writer.submit(save, *args)


def finish_save(wait):
    """Raise what the save that was started last has raised, if it has ended; wait for its end."""
    global _save
    if _save is not None and (wait or _save.done()):
        ended, _save = _save, None
        ended.result()


def save(out_dir, model, tokenizer, meta, state=None, keep_last=1):
    """Save the checkpoint of meta['step'], delete those no longer kept, and return its path.

    meta: what a person may want to read, JSON. state: what only training needs, tensors and plain
    values; None makes it a weights-only checkpoint. Raises OSError when it cannot be written, and
    UserError when the weights are not finite; the checkpoints before it are then untouched.
    """
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        what = f'The weights are not finite at step {meta["step"]:,}: nothing is saved.'
        advice = 'has what was saved before; try a lower learning_rate or a grad_clip'
        raise UserError(f'{what} {out_dir} {advice}.')
    with contextlib.suppress(FileNotFoundError):
        flush(Path(out_dir, 'log.jsonl'))  # has the losses of this step
    kind = 'weights' if state is None else 'step'
    path = Path(out_dir) / f'{kind}_{meta["step"]:08d}'
    temporary = path.with_name(f'.{path.name}.tmp')
    for leftover in path.parent.glob('.[sw]*_*.tmp'):  # of a process that was killed
        delete(leftover)
    try:
        write_files(temporary, model, tokenizer, meta, state)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):  # that has its own for a full disk
            raise
        raise OSError(f'{path} could not be saved: {str(error).splitlines()[0]}') from None
    publish(temporary, path)
    if state is not None:
        delete_old(out_dir, path, keep_last)
    return path


def write_files(folder, model, tokenizer, meta, state):
    """Write all files of a checkpoint into a new folder, and wait until they are on the disk."""
    folder.mkdir(parents=True)
    model.save_pretrained(folder, tokenizer.special_ids)
    tokenizers.save(tokenizer, folder)
    if state is not None:
        # What could not be read back is refused now, with a traceback.
        progress = io.BytesIO()
        torch.save(state['progress'], progress)
        torch.load(io.BytesIO(progress.getvalue()), weights_only=True)
        try:
            torch.save(state, folder / 'train_state.pt')
        except RuntimeError as error:  # torch's own for a full disk
            raise OSError(str(error)) from None

    # meta.json comes last, since it has the checksums of all the others.
    files = {file.name: checksum(file) for file in sorted(folder.iterdir())}
    write_card(folder, folder.parent, model, tokenizer, meta)  # which people may edit
    (folder / 'meta.json').write_text(json.dumps(meta | {'files': files}, indent=1) + '\n')

    # A rename may reach the disk before the contents do. Flushed first, they are there when it is.
    for path in (*folder.iterdir(), folder):
        flush(path)


def publish(temporary, path):
    """Rename a complete folder to its final name, in place of an older one of the same step.

    Killed in between, the older one is there as .NAME.old, and lock_folder() renames it back.
    """
    replaced = path.with_name(f'.{path.name}.old')
    if path.exists():
        os.rename(path, replaced)
    os.rename(temporary, path)
    flush(path.parent)
    delete(replaced)


def delete_old(out_dir, new, keep_last):
    """Delete all checkpoints but the newest `keep_last`, the best, and the one just saved."""
    found = checkpoints(out_dir)
    kept = {*found[-keep_last:], sort_by_loss(found)[-1], new}
    for path in [path for path in found if path not in kept]:
        # Renamed first, so that none is ever there in part. One that stays does no harm.
        with contextlib.suppress(OSError):
            delete(path.rename(path.with_name(f'.{path.name}.tmp')))


def delete(path):
    """Delete a folder, if it is there; of a link to one only the link."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def flush(path):
    """Wait until a file's bytes, or a folder's entries, are on the disk. Windows has no fsync."""
    if os.name == 'nt':
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path):
    """Return [size in bytes, SHA-256] of a file."""
    with open(path, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256')
    return [os.path.getsize(path), digest.hexdigest()]


def lock_folder(out_dir):
    """Make a folder writable by this process only, for as long as it lives.

    A checkpoint that was being replaced by another of the same step when the process was killed
    gets its name back. Raises UserError when another process has the folder.
    """
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror
        raise UserError(f'out_dir={out_dir} cannot be made ({why}): choose another one.') from None

    lock_file(out_dir / '.lock', f'Another run writes to {out_dir}: wait, or use another one.')

    for replaced in out_dir.glob('.[sw]*_*.old'):
        path = replaced.with_name(replaced.name.removeprefix('.').removesuffix('.old'))
        if path.exists():  # the new one had got its name already
            delete(replaced)
        else:
            replaced.rename(path)


# -----------------------------------------------------------------------------
# find


def checkpoints(out_dir, kind='step'):
    """List the complete checkpoints of a run, oldest first; 'weights': the weights-only ones."""
    name = re.compile(rf'{kind}_\d{{8,}}')
    found = [path for path in Path(out_dir).glob(f'{kind}_*') if name.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition('_')[2]))


def sort_by_loss(paths, damaged=math.inf):
    """Sort checkpoints from the highest validation loss to the lowest.

    One that was not evaluated counts as infinite, one whose meta.json is damaged as given.
    """

    def loss(path):
        try:
            val_loss = read_meta(path)['val_loss']
        except UserError:
            return damaged
        return math.inf if val_loss is None else val_loss

    return sorted(paths, key=loss, reverse=True)


def find(out_dir, which, training=False):
    """Return the 'last' checkpoint of a run, or its 'best'. A damaged one is reported and skipped.

    training: whether train_state.pt is needed. Raises UserError when there is no checkpoint, or
    all are damaged, and OSError when one cannot be read.
    """
    found = checkpoints(out_dir)
    if not found:
        if os.path.exists(os.path.join(out_dir, 'ckpt.pt')):
            raise UserError(f"{out_dir} has nanoGPT's ckpt.pt, which is not read: train anew.")
        if os.path.exists(os.path.join(out_dir, 'config.json')):
            raise UserError(f'{out_dir} is a model, not a run: use --init_from={out_dir}')
        how = f'python train.py --out_dir={out_dir}'
        raise UserError(f'{out_dir} has no checkpoint. Train one with: {how}')
    if which == 'best':
        found = sort_by_loss(found, damaged=-math.inf)  # a damaged one is tried first: reported
    for path in reversed(found):
        try:
            check_files(path, training)
            return path
        except UserError as error:
            print(f'{error}: it is skipped.', file=sys.stderr)
    raise UserError(f'No checkpoint in {out_dir} can be used. To start over, move it away.')


def check_files(path, training):
    """Raise UserError unless a checkpoint's files have the checksums that its meta.json says."""
    for name, expected in read_meta(path)['files'].items():
        if name == 'train_state.pt' and not training:
            continue
        with damage_explained(path, name):
            if checksum(path / name) != expected:
                raise ValueError('changed')


def quarantine_after(path):
    """Rename the damaged checkpoints after this one, step_* to damaged_step_*.

    Otherwise they would be the newest ones, and the run that resumes from this one would delete
    its own checkpoints before them.
    """
    found = checkpoints(path.parent)
    for later in found[found.index(path) + 1 :]:
        damaged = later.with_name(f'damaged_{later.name}')
        delete(damaged)
        later.rename(damaged)


# -----------------------------------------------------------------------------
# load


def load_run(out_dir, config, data):
    """Load the last checkpoint of a run, to resume it with these knobs and this Mixture.

    Raises UserError where they are for another model, optimizer, average or text than its own.
    """
    path = find(out_dir, 'last', training=True)
    meta = read_meta(path)
    knobs = meta['config']
    check_shape(path, out_dir, config, knobs)
    kept = ['optimizer', 'average_frac']  # their state is in the checkpoint
    if config['average_frac']:
        kept.append('freeze')  # what is frozen later would stay an average
    for name in kept:
        before = knobs.get(name)
        if before != config[name]:
            raise UserError(f'{path} was trained with {name}={before!r}: resume it with this.')
    # Another text, or other weights of a mixture: a position would mean another window.
    is_same_text = meta['data'] == data.fingerprint()
    dataset = knobs.get('dataset')
    if not is_same_text and dataset != config.get('dataset'):
        what = f"{path} was trained with dataset='{dataset}': resume it with this"
        raise UserError(f'{what}, or start a new run from its weights with --init_from={path}')
    if not is_same_text:
        how = 'prepare the same text again, or start a new run'
        raise UserError(f'{data.folder} has changed since {path} was saved: {how}.')

    ignored = ['init_from', 'out_dir', 'eval_only', 'max_epochs', 'max_minutes']
    if config.get('max_epochs') or config.get('max_minutes'):  # the run keeps its number of steps
        ignored += ['max_iters', 'lr_decay_iters']
    pairs = {name: (knobs.get(name), now) for name, now in config.items() if name not in ignored}
    changed = {name: (before, now) for name, (before, now) in pairs.items() if before != now}
    with damage_explained(path, 'train_state.pt'):  # nothing in the file is executed
        # Mapped: all processes of a machine read it, and each needs a part of it at a time.
        file = path / 'train_state.pt'
        state = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
        progress, optimizer, scaler = (state[key] for key in ('progress', 'optimizer', 'scaler'))
    return SavedRun(path, meta, Progress(**progress), optimizer, scaler, changed)


def check_shape(path, out_dir, config, knobs):
    """Raise UserError unless the knobs describe the model of a checkpoint.

    Compared are the fields of GPTConfig that are knobs, except dropout, which may change. knobs:
    those that it was saved with.
    """
    # A rotary model keeps a longer context than its windows. These must stay the same.
    saved = replace(read_config(path), block_size=knobs['block_size'])
    comparable = config.keys() - {'dropout'}
    names = [field.name for field in fields(GPTConfig) if field.name in comparable]
    asked = {name: config[name] for name in names}
    # What is not asked for may stay as it is. Another architecture starts from its own defaults,
    # and gpt2's head_dim is always n_embd / n_head.
    base = saved if config['arch'] == saved.arch else GPTConfig(arch=config['arch'])
    if asked.get('head_dim') is None:
        asked['head_dim'] = None if config['arch'] == 'gpt2' else saved.head_dim
    requested = replace(base, **asked)

    different = [name for name in names if getattr(saved, name) != getattr(requested, name)]
    if different:
        shape = ', '.join(f'{name}={getattr(saved, name)!r}' for name in different)
        how = f'resume with python train.py {out_dir}/config.py --init_from=resume'
        raise UserError(f'{path} has {shape}, this command asks for another model: {how}')


def read_meta(path):
    """Read a checkpoint's meta.json. Raises UserError when it is damaged."""
    with damage_explained(path, 'meta.json'):
        meta = json.loads((path / 'meta.json').read_text())
        loss = meta['val_loss']
        has_weights = any(name.endswith('.safetensors') for name in meta['files'])
        is_complete = has_weights and {'config.json', 'train_state.pt'} <= set(meta['files'])
        is_inside = not any('/' in name for name in meta['files'])
        is_evaluation = loss is None or math.isfinite(loss)
        has_origin = meta['config']['init_from'] is not None
        if not (is_complete and is_inside and is_evaluation and has_origin):
            raise ValueError('changed')
    return meta


@contextlib.contextmanager
def damage_explained(path, name):
    """Turn the errors of reading a damaged file into UserError; others are not the file's fault."""
    try:
        yield
        return
    except FileNotFoundError:
        problem = 'is missing'
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        problem = f'is not what was written ({type(error).__name__})'
    raise UserError(f'The checkpoint {path} is damaged: its {name} {problem}')

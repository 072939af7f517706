"""A training state as a folder that is complete or absent, out_dir/step_00002000/, and back.

    config.json, model.safetensors    the model, as `transformers` opens it
    tokenizer.json, tokenizer_config.json
    train_state.pt                    optimizer, scaler and position; read with weights_only=True
    meta.json                         step, losses, the run's knobs, versions; size and checksum of the files above

A checkpoint is written under a temporary name, flushed to disk and then renamed; what has no final name is not a
checkpoint. The newest ones and the one with the lowest validation loss stay, the others go. A light copy,
out_dir/weights_00002000/, is the same without train_state.pt, and stays.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_locks = []


def save(out_dir, model, dataset, meta, state=None, keep_last=1):
    """Write the checkpoint of meta['step'] and delete those no longer kept. Returns its path.

    meta: what a person may want to read, JSON. state: what only training needs, tensors and plain values; None makes
    it a light copy. Raises OSError when it cannot be written; the checkpoints before it are then untouched.
    """
    path = Path(out_dir) / f'{"weights" if state is None else "step"}_{meta["step"]:08d}'
    for left_behind in path.parent.glob('.[sw]*_*.tmp'):  # by a process that was killed
        shutil.rmtree(left_behind)
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary, end_of_text=dataset.end_of_text)
        for file in ('tokenizer.json', 'tokenizer_config.json'):
            shutil.copyfile(Path(dataset.folder) / file, temporary / file)
        if state is not None:
            torch.save(state, temporary / 'train_state.pt')
        files = {file.name: checksum(file) for file in sorted(temporary.iterdir())}
        (temporary / 'meta.json').write_text(json.dumps(meta | {'files': files}, indent=1) + '\n')
        for file in (*temporary.iterdir(), temporary):
            flush(file)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f'{path} could not be saved: {str(error).splitlines()[0]}') from None
    before = path.with_name(f'.{path.name}.old')
    if path.exists():
        os.rename(path, before)
    os.rename(temporary, path)
    flush(path.parent)
    shutil.rmtree(before, ignore_errors=True)
    if state is not None:
        found = checkpoints(out_dir)
        for old in set(found) - {*found[-keep_last:], by_loss(found)[-1], path}:
            with contextlib.suppress(OSError):  # it is in the way of nothing
                shutil.rmtree(old.rename(old.with_name(f'.{old.name}.tmp')))
    return path


def own(out_dir):
    """Make a folder this process's alone to write to, for as long as it lives. Raises ValueError if it is another's.

    A checkpoint that was being replaced by another of the same step when the process was killed gets its name back.
    """
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'out_dir={out_dir} cannot be made ({error.strerror}): choose another one.') from None
    if fcntl is not None:
        lock = open(out_dir / '.lock', 'w')  # noqa: SIM115  closing it would give the lock up
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f'Another run is writing to {out_dir}: wait for it, or use another --out_dir.') from None
        _locks.append(lock)
    for before in out_dir.glob('.[sw]*_*.old'):
        path = before.with_name(before.name.removeprefix('.').removesuffix('.old'))
        shutil.rmtree(before) if path.exists() else before.rename(path)


def flush(path):
    """Have a file's bytes, or a folder's entries, on the disk when this returns. Windows has no such thing."""
    if os.name == 'nt':
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path):
    """[bytes, SHA-256] of a file."""
    with open(path, 'rb') as file:
        return [os.path.getsize(path), hashlib.file_digest(file, 'sha256').hexdigest()]


def checkpoints(out_dir, kind='step'):
    """The complete checkpoints of a run, or with kind='weights' its light copies; oldest first."""
    found = [path for path in Path(out_dir).glob(f'{kind}_*') if re.fullmatch(rf'{kind}_\d{{8,}}', path.name)]
    return sorted(found, key=lambda path: int(path.name.partition('_')[2]))


def by_loss(paths, damaged=math.inf):
    """Checkpoints from the highest validation loss to the lowest. None is infinite, an unreadable one as given."""

    def loss(path):
        try:
            val_loss = read_meta(path)['val_loss']
        except ValueError:
            return damaged
        return math.inf if val_loss is None else val_loss

    return sorted(paths, key=loss, reverse=True)


def find(out_dir, which, training=False):
    """The 'last' checkpoint of a run, or its 'best'. A damaged one is reported and the next taken instead.

    training: whether train_state.pt is needed. Raises FileNotFoundError when there is none, ValueError when all are
    damaged, OSError when one cannot be read.
    """
    found = checkpoints(out_dir)
    if not found:
        raise FileNotFoundError(f'{out_dir} has no checkpoint. Train one with: python train.py --out_dir={out_dir}')
    for path in reversed(found if which == 'last' else by_loss(found, damaged=-math.inf)):
        try:
            for name, expected in read_meta(path)['files'].items():
                with damage_explained(path, name):
                    if (training or name != 'train_state.pt') and checksum(path / name) != expected:
                        raise ValueError('changed')
            return path
        except ValueError as error:
            print(f'{error}: it is passed over.', file=sys.stderr)
    raise ValueError(f'No checkpoint in {out_dir} can be used. To start anew, move that folder away.')


def set_aside(path):
    """Rename the damaged checkpoints after this one, step_* to damaged_step_*, so that nothing takes them for newer."""
    found = checkpoints(path.parent)
    for later in found[found.index(path) + 1 :]:
        aside = later.with_name(f'damaged_{later.name}')
        shutil.rmtree(aside, ignore_errors=True)
        later.rename(aside)


def read_meta(path):
    """A checkpoint's meta.json. Raises ValueError when it is damaged."""
    with damage_explained(path, 'meta.json'):
        meta = json.loads((path / 'meta.json').read_text())
        files, loss = set(meta['files']), meta['val_loss']
        if not {'config.json', 'model.safetensors', 'train_state.pt'} <= files or '/' in ''.join(files):
            raise ValueError(f'the files cannot be {files}')
        if meta['config']['init_from'] is None or not (loss is None or math.isfinite(loss)):
            raise ValueError(f'the loss cannot be {loss}')
        return meta


def load_state(path):
    """What save() was given as state. Raises ValueError when it is damaged; nothing in the file is executed."""
    with damage_explained(path, 'train_state.pt'):
        state = torch.load(path / 'train_state.pt', map_location='cpu', weights_only=True)
        return {key: state[key] for key in ('state', 'optimizer', 'scaler')}


@contextlib.contextmanager
def damage_explained(path, name):
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        reason = 'is missing' if isinstance(error, FileNotFoundError) else 'is not what was written'
        raise ValueError(f'The checkpoint {path} is damaged: its {name} {reason} ({type(error).__name__})') from None

"""A training state as a folder that is complete or absent, out_dir/step_00002000/, and back.

    config.json, model.safetensors    the model, as `transformers` opens it
    tokenizer.json, tokenizer_config.json
    train_state.pt                    optimizer, scaler and position; read with weights_only=True
    meta.json                         step, losses, the run's knobs, versions

A checkpoint is written under a temporary name, flushed to disk and then renamed; what has no final name is not a
checkpoint. The newest ones and the one with the lowest validation loss stay, the others go.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError


def save(out_dir, model, dataset, state, meta, keep_last):
    """Write the checkpoint of meta['step'] and delete those no longer kept. Returns its path.

    state: what only training needs, tensors and plain values. meta: what a person may want to read, JSON.
    Raises OSError when it cannot be written; the checkpoints before it are then untouched.
    """
    path = Path(out_dir) / f'step_{meta["step"]:08d}'
    for left_behind in path.parent.glob('.step_*.tmp'):  # by a process that was killed
        shutil.rmtree(left_behind)
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary, end_of_text=dataset.end_of_text)
        for file in ('tokenizer.json', 'tokenizer_config.json'):
            shutil.copyfile(Path(dataset.folder) / file, temporary / file)
        torch.save(state, temporary / 'train_state.pt')
        (temporary / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n')
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f'{path} could not be saved: {str(error).splitlines()[0]}') from None
    if path.exists():
        remove(path)
    os.rename(temporary, path)
    flush(path.parent)
    with contextlib.suppress(OSError, ValueError):  # where an old one is damaged, none is removed
        kept = {*checkpoints(out_dir)[-keep_last:], find(out_dir, 'best')}
        for old in set(checkpoints(out_dir)) - kept:
            remove(old)
    return path


def remove(path):
    """Take away a checkpoint's name at once, then its files at leisure."""
    shutil.rmtree(path.rename(path.with_name(f'.{path.name}.old.tmp')))


def flush(path):
    """Have a file's bytes, or a folder's entries, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(out_dir):
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in Path(out_dir).glob('step_*') if re.fullmatch(r'step_\d{8,}', path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix('step_')))


def find(out_dir, which):
    """The 'last' checkpoint of a run or the 'best', which is the last where none was evaluated.

    Raises FileNotFoundError when there is none, ValueError when one is damaged.
    """
    found = checkpoints(out_dir)
    if not found:
        raise FileNotFoundError(f'{out_dir} has no checkpoint. Train one with: python train.py --out_dir={out_dir}')
    if which == 'last':
        return found[-1]
    losses = {path: read_meta(path)['val_loss'] for path in found}
    return min((path for path in found if losses[path] is not None), key=losses.get, default=found[-1])


def read_meta(path):
    """A checkpoint's meta.json. Raises ValueError when it is damaged."""
    with _damage_explained(path):
        meta = json.loads((path / 'meta.json').read_text())
        assert {'step', 'val_loss', 'config', 'data'} <= meta.keys()
        return meta


def load_state(path, device):
    """What save() was given as state. Raises ValueError when it is damaged; nothing in the file is executed."""
    with _damage_explained(path):
        state = torch.load(path / 'train_state.pt', map_location=device, weights_only=True)
        assert {'state', 'optimizer', 'scaler'} <= state.keys()
        return state


@contextlib.contextmanager
def _damage_explained(path):
    try:
        yield
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise ValueError(
            f'The checkpoint {path} is damaged ({type(error).__name__}): delete it to use the one before.'
        ) from None

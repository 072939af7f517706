"""A training state as a folder that is complete or absent, out_dir/step_00002000/, and back.

    config.json, model.safetensors    the model, as `transformers` opens it
    tokenizer.json, tokenizer_config.json
    train_state.pt                    optimizer, scaler and position; read with weights_only=True
    meta.json                         step, losses, the run's knobs, versions

A checkpoint is written under a temporary name, flushed to disk and then renamed; what has no final name is not a
checkpoint. The newest ones and the one with the lowest validation loss stay, the others go.
"""

import json
import os
import shutil
from pathlib import Path

import torch


def save(out_dir, model, dataset, state, meta, keep_last):
    """Write the checkpoint of meta['step'] and delete those no longer kept. Returns its path.

    state: what only training needs, tensors and plain values. meta: what a person may want to read, JSON.
    Raises OSError when it cannot be written; the checkpoints before it are then untouched.
    """
    path = Path(out_dir) / f'step_{meta["step"]:08d}'
    temporary = path.with_name(f'.{path.name}.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary, end_of_text=dataset.meta['end_of_text'])
    for file in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copyfile(Path(dataset.folder) / file, temporary / file)
    torch.save(state, temporary / 'train_state.pt')
    (temporary / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n')
    for file in temporary.iterdir():
        flush(file)
    flush(temporary)
    if path.exists():
        shutil.rmtree(path)
    os.rename(temporary, path)
    flush(path.parent)
    kept = {*checkpoints(out_dir)[-keep_last:], find(out_dir, 'best')}
    for old in set(checkpoints(out_dir)) - kept:
        shutil.rmtree(old)
    return path


def flush(path):
    """Have a file's bytes, or a folder's entries, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(out_dir):
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in Path(out_dir).glob('step_*/meta.json'))


def find(out_dir, which):
    """The 'last' checkpoint of a run or the 'best', which is the last where none was evaluated.

    Raises FileNotFoundError when there is none.
    """
    found = checkpoints(out_dir)
    if not found:
        raise FileNotFoundError(f'{out_dir} has no checkpoint. Train one with: python train.py --out_dir={out_dir}')
    losses = {path: read_meta(path)['val_loss'] for path in found}
    evaluated = [path for path in found if losses[path] is not None]
    return min(evaluated, key=losses.get) if which == 'best' and evaluated else found[-1]


def read_meta(path):
    return json.loads((Path(path) / 'meta.json').read_text())


def load_state(path, device):
    return torch.load(Path(path) / 'train_state.pt', map_location=device, weights_only=True)

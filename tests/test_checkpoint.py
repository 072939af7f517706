"""Checkpoints as files: kept and deleted, and what a run may resume with."""

import json
import pickle
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from conftest import losses, train

import checkpoint
import tokenizer as tk
from model import GPT, GPTConfig


class Text:
    """A dataset, as far as a checkpoint needs one."""

    folder = 'data/sheep'

    def __init__(self, checksums=('a', 'b')):
        self.checksums = list(checksums)

    def fingerprint(self):
        return self.checksums


KNOBS = {
    'init_from': 'scratch',
    'out_dir': 'out',
    'eval_only': False,
    'optimizer': 'adamw',
    'average_frac': None,
    'learning_rate': 0.1,
    'dropout': 0.0,
    'arch': 'gpt2',
    'n_layer': 1,
    'n_head': 2,
    'n_kv_head': None,
    'n_embd': 32,
    'block_size': 16,
    'bias': True,
}


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Save a checkpoint of a tiny model: save(step, val_loss) -> its path."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tk.build('byte')

    def save(step, val_loss=None, knobs=KNOBS, keep_last=1, weights_only=False, **shape):
        names = {field.name for field in fields(GPTConfig)} & knobs.keys()
        values = {name: knobs[name] for name in names} | shape
        model = GPT(GPTConfig(vocab_size=64, **values))
        meta = {'step': step, 'val_loss': val_loss, 'config': knobs}
        meta |= {'data': ['a', 'b'], 'text': [], 'tokens': 96}
        state = {'progress': {'step': step}, 'optimizer': {'x': 1}, 'scaler': {}}
        if weights_only:
            state = None
        return checkpoint.save('out', model, tokenizer, meta, state, keep_last)

    return save


def steps(kind='step'):
    return [int(path.name[-8:]) for path in checkpoint.checkpoints('out', kind)]


def test_the_newest_and_the_best_are_kept(save):
    for step, val_loss in enumerate([5.0, 2.0, 4.0, None, 3.0, 3.5]):
        save(step, val_loss, keep_last=2)
    assert steps() == [1, 4, 5]
    save(6, None, keep_last=1)
    assert steps() == [1, 6]
    save(7, 1.0, keep_last=1, weights_only=True)
    assert steps() == [1, 6]
    assert steps('weights') == [7]
    assert checkpoint.find('out', 'best').name == 'step_00000001'
    assert checkpoint.find('out', 'last').name == 'step_00000006'


def test_a_saved_run_is_loaded_as_it_was_saved(save):
    path = save(3, 2.0)
    saved = checkpoint.load_run('out', KNOBS, Text())
    assert saved.path == path
    assert saved.meta == json.loads((path / 'meta.json').read_text())
    assert saved.progress == checkpoint.Progress(step=3), 'what is missing has its default'
    assert saved.optimizer == {'x': 1}
    assert saved.scaler == {}
    assert saved.changed == {}
    now = {'learning_rate': 0.2, 'dropout': 0.1, 'new': 1, 'init_from': 'resume', 'out_dir': 'o'}
    saved = checkpoint.load_run('out', KNOBS | now, Text())
    assert saved.changed == {'learning_rate': (0.1, 0.2), 'dropout': (0.0, 0.1), 'new': (None, 1)}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'n_layer': 2, 'bias': False}, 'out/step_00000003 has n_layer=1, bias=True, this command'),
        ({'arch': 'qwen3'}, "out/step_00000003 has arch='gpt2', bias=True, this command"),
        ({'block_size': 8}, 'has block_size=16, this command asks for another model: resume with'),
        ({'n_head': 5}, 'n_embd=32 must be a multiple of n_head=5.'),
        ({'optimizer': 'muon'}, "was trained with optimizer='adamw'"),
    ],
)
def test_a_run_does_not_resume_as_another(save, change, message):
    save(3)
    with pytest.raises(ValueError, match='.*') as error:
        checkpoint.load_run('out', KNOBS | change, Text())
    assert type(error.value).__name__ == 'UserError'
    assert message in str(error.value)
    if 'this command' in message:
        assert str(error.value).endswith('python train.py out/config.py --init_from=resume')


def test_a_run_does_not_resume_with_another_text(save):
    save(3)
    with pytest.raises(checkpoint.UserError, match='data/sheep has changed since out/step_0000'):
        checkpoint.load_run('out', KNOBS, Text(['a', 'c']))


QWEN = KNOBS | {'arch': 'qwen3', 'bias': False}


def test_what_is_no_knob_stays_as_it_was_saved(save):
    shape = {'head_dim': 8, 'intermediate_size': 96, 'rope_theta': 1e6, 'tie_weights': False}
    save(3, knobs=QWEN, **shape)
    assert checkpoint.load_run('out', QWEN, Text()).progress.step == 3
    assert checkpoint.load_run('out', QWEN | {'bias': True}, Text()), 'it is for gpt2 only'
    for change in ({'arch': 'gpt2'}, {'n_head': 4}, {'n_kv_head': 1}, {'arch': 'llama'}):
        with pytest.raises(checkpoint.UserError, match='asks for another model: resume with'):
            checkpoint.load_run('out', QWEN | change, Text())


def test_a_field_that_somebody_adds_is_compared_too(save, monkeypatch):
    @dataclass
    class Changed(GPTConfig):
        twist: float = 1.0
        untwist: float | None = None

    def read_config(folder):
        values = {field.name: getattr(model, field.name) for field in fields(model)}
        return Changed(**values)

    path = save(3)
    model = checkpoint.read_config(path)
    monkeypatch.setattr(checkpoint, 'GPTConfig', Changed)
    monkeypatch.setattr(checkpoint, 'read_config', read_config)
    assert checkpoint.load_run('out', KNOBS | {'twist': 1.0}, Text())
    with pytest.raises(checkpoint.UserError, match='step_00000003 has twist=1.0, this command'):
        checkpoint.load_run('out', KNOBS | {'twist': 2.0}, Text())
    with pytest.raises(checkpoint.UserError, match='has untwist=None, this command'):
        checkpoint.load_run('out', KNOBS | {'untwist': 2.0}, Text())


def test_the_command_of_the_refusal_resumes(run, sheep, tmp_path):
    train(run, '--max_iters=2', '--arch=qwen3', '--n_kv_head=1', '--optimizer=muon')
    refused = train(run, '--max_iters=4', '--init_from=resume', code=1)
    assert "out/step_00000002 has arch='qwen3', " in refused.err
    assert refused.is_one_sentence
    line = refused.err.rpartition('python ')[2].split()
    result = run(*line, '--max_iters=4')
    assert result.code == 0, result.err
    assert list(losses(tmp_path / 'out')) == [0, 2, 4]


# -----------------------------------------------------------------------------
# what a hacker changed


def test_a_mistake_while_saving_is_no_full_disk(save, monkeypatch):
    def wrong(self, folder, special_ids=None):
        raise RuntimeError('mine')

    monkeypatch.setattr(GPT, 'save_pretrained', wrong)
    with pytest.raises(RuntimeError, match='^mine$'):
        save(1)


def test_progress_that_cannot_be_read_back_is_not_saved(save, monkeypatch):
    monkeypatch.setattr(checkpoint.torch, 'save', with_numpy_progress(torch.save))
    with pytest.raises(pickle.UnpicklingError):
        save(1)
    assert not checkpoint.checkpoints('out')


def with_numpy_progress(torch_save):
    def changed_save(value, file):
        torch_save({'loss': np.float64(1.0)} if 'step' in value else value, file)

    return changed_save

"""Training from the outside: what a run computes, logs, saves and refuses, and how it resumes."""

import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from conftest import TEXT, TINY, command, losses, records, same, train, weights

import checkpoint
import model as model_module
import parallel
import runtime
import tokenizer
from data import (
    IGNORE,
    Dataset,
    count_windows,
    get_batch,
    read_windows,
    training_order,
    training_starts,
)
from model import GPT, GPTConfig
from optim import parameter_groups

TIMES = ('tokens_per_second', 'train_seconds', 'tflops', 'gib')  # the figures that vary


def before_each_step(monkeypatch, action):
    """Call action(n) before the n-th step of AdamW, counted from 1."""
    real = torch.optim.AdamW.step
    numbers = itertools.count(1)

    def step(*args, **kwargs):
        action(next(numbers))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)


def files_of(folder):
    """{path: content} of all files in a folder, to compare later."""
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def folders_of(out):
    """The names of the folders in a run's, sorted."""
    return sorted(path.name for path in out.iterdir() if path.is_dir())


# -----------------------------------------------------------------------------
# learning


def test_it_learns_and_the_scripts_work_from_the_command_line(tmp_path):
    (tmp_path / 'sheep.txt').write_text(TEXT)
    first = command('prepare.py', '--input=sheep.txt', '--vocab_size=300', cwd=tmp_path)
    assert first.returncode == 0, first.stderr

    flags = [*TINY, '--max_iters=120', '--learning_rate=1e-2', '--eval_interval=60', '--out_dir=o']
    flags += ['--dataset=sheep', '--dtype=float32']  # rounded, it may say something else of sheep
    second = command('train.py', *flags, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert not second.stderr
    assert losses(tmp_path / 'o')[120] < 0.5 * losses(tmp_path / 'o')[0]

    flags = ['--out_dir=o', '--start=1 sheep', '--temperature=0', '--num_samples=1']
    flags += ['--dtype=float32']
    third = command('sample.py', *flags, cwd=tmp_path)
    assert third.returncode == 0, third.stderr
    assert third.stderr == 'o/step_00000120, the best checkpoint\n'
    assert third.stdout.startswith('1 sheep jumped over the')

    lines = first.stdout.splitlines() + second.stdout.splitlines()
    assert max(len(line) for line in lines) <= 80


def test_one_batch_can_be_learned_by_heart(run, tmp_path):
    text = 'To be, or not to be, that is the question: Whether tis nobler in the mind to suffer. '
    (tmp_path / 'sheep.txt').write_text(text)
    assert run('prepare.py', '--input=sheep.txt', '--tokenizer=char').code == 0
    # A text of one window, which is the same each time.
    train(run, '--max_iters=150', '--learning_rate=1e-2', '--block_size=75', '--batch_size=1')
    assert losses(tmp_path / 'out', 'loss')[150] < 0.05


def test_max_iters_steps_exactly_and_the_last_is_saved(run, sheep, tmp_path, monkeypatch):
    updates = []
    before_each_step(monkeypatch, updates.append)
    result = train(run, '--max_iters=7', '--eval_interval=5', '--log_interval=3')
    assert updates == [1, 2, 3, 4, 5, 6, 7]
    assert list(losses(tmp_path / 'out')) == [0, 5, 7]
    assert list(losses(tmp_path / 'out', 'loss')) == [3, 6, 7]

    saved = tmp_path / 'out' / 'step_00000007'
    assert GPT.from_pretrained(saved).config.n_layer == 2
    meta = json.loads((saved / 'meta.json').read_text())
    assert meta['val_loss'] == losses(tmp_path / 'out')[7]
    trained = result.globals['model'].state_dict()
    assert same(dict(trained), dict(GPT.from_pretrained(saved).state_dict()))


# -----------------------------------------------------------------------------
# what a number means


def log_loss(model, x, y):
    """The mean loss of the targets that count, spelled out."""
    log_probabilities = model(x).log_softmax(-1)
    chosen = log_probabilities.gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return -chosen[y != IGNORE].mean()


def test_micro_steps_change_neither_gradient_nor_logged_loss(run, sheep, tmp_path, monkeypatch):
    """One step of 8 windows, the padded last window of the epoch among them, against float64 on
    all tokens at once."""
    gradients = []

    def record(optimizer, *args, **kwargs):
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        gradients.append([p.grad.clone() for p in parameters])

    monkeypatch.setattr(torch.optim.AdamW, 'step', record)
    data = Dataset('sheep', root=tmp_path / 'data')
    n = count_windows(data.train, 32)
    seed = next(s for s in range(10**4) if n - 1 in training_order(0, 8, n, s))
    assert (len(data.train) - 1) % 32, 'the last window must be a partial one'
    flags = ['--max_iters=1', '--log_interval=1', '--grad_clip=0.0', f'--seed={seed}']
    for n_micro in (1, 2, 4, 8):
        batches = [f'--gradient_accumulation_steps={n_micro}', f'--batch_size={8 // n_micro}']
        result = train(run, *flags, *batches, out=f'out{n_micro}')

    logged = [losses(tmp_path / f'out{n_micro}', 'loss')[1] for n_micro in (1, 2, 4, 8)]
    assert logged == pytest.approx([logged[0]] * 4, abs=1e-6)
    for others in gradients[1:]:
        for a, b in zip(gradients[0], others, strict=True):
            assert (a - b).abs().max() < 1e-6

    model = result.globals['model'].double()
    x, y = get_batch(data.train, 32, training_order(0, 8, n, seed))
    loss = log_loss(model, x, y)
    assert logged[0] == pytest.approx(loss.item(), abs=1e-6)
    loss.backward()
    reference = [p.grad for group in parameter_groups(model, 0.1) for p in group['params']]
    for a, b in zip(gradients[0], reference, strict=True):
        assert (a - b).abs().max() < 1e-6


def test_overlapping_windows_weigh_every_target_of_a_step_alike(run, sheep, tmp_path):
    flags = ['--stride=8', '--batch_size=600', '--max_iters=4', '--seed=3', '--log_interval=1']
    result = train(run, *flags, '--learning_rate=0.0', '--weight_decay=0.0')
    data = Dataset('sheep', tmp_path / 'data')
    model = result.globals['model'].eval()
    n = count_windows(data.train, 32, 8)
    assert n > 4 * count_windows(data.train, 32) - 8
    for step, logged in losses(tmp_path / 'out', 'loss').items():
        starts = training_starts(600 * (step - 1), 600, n, 8, seed=3)
        expected = model(*read_windows(data.train, 32, starts)).item()
        assert logged == pytest.approx(expected, rel=1e-5)
    assert 'steps   4, each 600 x 1 x 32 = 19,200 tokens' in result.out
    assert 'stride=33: must be from 1 to 32' in train(run, '--stride=33', out='other', code=1).err


def test_the_validation_loss_is_that_of_the_whole_split(run, sheep, tmp_path):
    """For any batch size, against float64, window by window and token by token."""
    sizes = (1, 3, 8, 64)
    for size in sizes:
        result = train(run, f'--batch_size={size}', '--max_iters=0', out=f'out{size}')
    data = Dataset('sheep', root=tmp_path / 'data')
    model = result.globals['model'].double().eval()
    tokens = torch.from_numpy(data.val.astype(np.int64))
    nats = []
    for start in range(0, len(tokens) - 1, 32):
        window = tokens[start : start + 33]
        log_probabilities = model(window[None, :-1])[0].log_softmax(-1)
        nats += [-log_probabilities[t, window[t + 1]].item() for t in range(len(window) - 1)]
    assert len(nats) == len(tokens) - 1
    for size in sizes:
        loss = losses(tmp_path / f'out{size}')[0]
        assert loss == pytest.approx(math.fsum(nats) / len(nats), abs=1e-6)


def test_bits_per_byte_of_a_uniform_model(run, sheep, tmp_path, monkeypatch):
    def to_zero(self):
        for parameter in self.parameters():
            parameter.data.zero_()

    monkeypatch.setattr(GPT, 'init_weights', to_zero)
    train(run, '--max_iters=0')
    bits = losses(tmp_path / 'out', 'bits_per_byte')[0]
    assert bits == pytest.approx(math.log2(257), rel=1e-6), 'those of its vocabulary'


def test_the_clock_counts_steps_and_not_evaluating_or_saving(run, sheep, tmp_path, monkeypatch):
    seconds = [0.0]

    def passing(function, duration):
        def slow(*args, **kwargs):
            seconds[0] += duration
            return function(*args, **kwargs)

        return slow

    def forward(self, *args, original=GPT.forward, **kwargs):
        if not self.training:
            seconds[0] += 100.0
        return original(self, *args, **kwargs)

    monkeypatch.setattr(time, 'perf_counter', lambda: seconds[0])
    monkeypatch.setattr(torch.optim.AdamW, 'step', passing(torch.optim.AdamW.step, 2.0))
    monkeypatch.setattr(parallel, 'copy_to_cpu', passing(parallel.copy_to_cpu, 1000.0))
    monkeypatch.setattr(GPT, 'forward', forward)
    flags = ['--max_iters=6', '--log_interval=2', '--gradient_accumulation_steps=3']
    train(run, *flags, '--eval_interval=3')
    rates = losses(tmp_path / 'out', 'tokens_per_second')
    tokens = 2 * 3 * 4 * 32  # of two steps
    assert rates == {2: tokens / 4, 4: tokens / 4, 6: tokens / 4}
    trained = {2: 4.0, 3: 6.0, 4: 8.0, 6: 12.0}
    assert losses(tmp_path / 'out', 'train_seconds') == trained | {0: 0.0}
    train(run, *flags, '--eval_interval=9', '--max_iters=9', '--init_from=resume')
    assert losses(tmp_path / 'out', 'train_seconds')[9] == 18.0, 'of both runs together'


def test_rates_are_without_the_step_that_compiles(run, sheep, tmp_path, monkeypatch):
    seconds = [0.0]
    durations = iter([100.0, *[2.0] * 5])

    def step(*args, original=torch.optim.AdamW.step, **kwargs):
        seconds[0] += next(durations)
        return original(*args, **kwargs)

    monkeypatch.setattr(time, 'perf_counter', lambda: seconds[0])
    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    monkeypatch.setattr(GPT, 'compile', lambda self: None)
    monkeypatch.setattr(runtime, 'can_compile', lambda device: True)
    result = train(run, '--max_iters=6', '--log_interval=3', '--compile=True')
    tokens = 4 * 32  # of a step
    assert losses(tmp_path / 'out', 'tokens_per_second') == {3: tokens / 2, 6: tokens / 2}
    assert losses(tmp_path / 'out', 'train_seconds')[6] == 110.0, 'all of them took time'
    assert re.search(r'(?m)^ +3 .* 0m06s$', result.out), 'three steps of 2 s are left'


# -----------------------------------------------------------------------------
# learning rate, clipping


def test_the_learning_rate_is_torchs_warmup_and_cosine(run, sheep, tmp_path):
    flags = ['--max_iters=20', '--log_interval=1', '--warmup_iters=4', '--lr_decay_iters=16']
    train(run, *flags, '--learning_rate=1e-2', '--min_lr=1e-3')
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    lr_scheduler = torch.optim.lr_scheduler
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / 5, total_iters=4)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=12, eta_min=1e-3)
    schedule = lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[4])
    expected = []
    for step in range(20):
        expected.append(optimizer.param_groups[0]['lr'] if step <= 16 else 1e-3)
        optimizer.step()
        schedule.step()
    logged = losses(tmp_path / 'out', 'lr')
    assert list(logged.values()) == pytest.approx(expected, rel=1e-6)


def test_wsd_is_warmup_then_constant_then_straight_down(run, sheep, tmp_path):
    flags = ['--schedule=wsd', '--cooldown_frac=0.5', '--warmup_iters=2', '--max_iters=12']
    train(run, *flags, '--learning_rate=1e-2', '--optimizer=muon', '--log_interval=1')
    falling = [0.01 * (10 - i) / 5 for i in range(6, 10)]
    expected = [0.01 / 3, 0.02 / 3, *[0.01] * 6, *falling]
    assert list(losses(tmp_path / 'out', 'lr').values()) == pytest.approx(expected)


def test_muon_decays_by_the_same_factor(run, sheep):
    flags = ['--optimizer=muon', '--muon_lr=0.04', '--learning_rate=1e-2', '--min_lr=5e-3']
    result = train(run, *flags, '--lr_decay_iters=2', '--max_iters=6')
    adamw, muon = result.globals['optimizers']
    for optimizer, lr in ((adamw, 5e-3), (muon, 0.02)):
        rates = [group['lr'] for group in optimizer.param_groups]
        assert rates == pytest.approx([lr] * len(rates))


def test_gradients_are_clipped_to_the_norm_asked_for(run, sheep, tmp_path, monkeypatch):
    norms = []

    def record(optimizer, *args, **kwargs):
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())

    monkeypatch.setattr(torch.optim.AdamW, 'step', record)
    train(run, '--max_iters=1', '--log_interval=1', '--grad_clip=0.25', out='a')
    train(run, '--max_iters=1', '--log_interval=1', '--grad_clip=0.0', out='b')
    clipped, unclipped = norms
    assert clipped == pytest.approx(0.25, rel=1e-4)
    assert unclipped > 0.3
    logged = losses(tmp_path / 'a', 'grad_norm')[1]
    assert logged == pytest.approx(unclipped, rel=1e-5), 'the norm before clipping'


# -----------------------------------------------------------------------------
# what changes no weight


@pytest.mark.parametrize(
    'change', ['eval_interval=1', 'log_interval=1', 'log_norms', 'always_save_checkpoint=False']
)
def test_looking_more_often_does_not_change_the_weights(run, sheep, tmp_path, change):
    flags = ['--max_iters=6', '--dropout=0.1', '--eval_interval=100', '--log_interval=100']
    train(run, *flags, out='a')
    train(run, *flags, f'--{change}', out='b')
    assert same(weights(tmp_path / 'a', 6), weights(tmp_path / 'b', 6))


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_averages_are_saved_and_training_goes_on_without(run, sheep, tmp_path, optimizer):
    """Of the weights after each step of a run without averages, in float64."""
    flags = ['--max_iters=9', '--dropout=0.1', '--log_interval=1', f'--optimizer={optimizer}']
    flags += ['--eval_interval=4', '--sample_interval=3', '--save_weights_interval=1']
    averaging = [*flags, '--average_frac=0.4']
    train(run, *flags, out='plain')
    train(run, *averaging, out='averaged')
    assert losses(tmp_path / 'plain', 'loss') == losses(tmp_path / 'averaged', 'loss')
    assert losses(tmp_path / 'plain')[8] != losses(tmp_path / 'averaged')[8]

    expected = {}
    for step in range(1, 10):
        last = weights(tmp_path / 'plain', step, 'weights')
        for name, weight in last.items():
            before = expected.get(name, torch.zeros(()))
            expected[name] = before + (weight.double() - before) / (1 + 0.4 * (step - 1))
        saved = weights(tmp_path / 'averaged', step, 'weights')
        for name, weight in saved.items():
            assert (weight - expected[name]).abs().max() < 1e-6, (step, name)
    state = torch.load(tmp_path / 'averaged/step_00000009/train_state.pt', weights_only=True)
    for name, weight in GPT.from_pretrained(tmp_path / 'plain/step_00000009').named_parameters():
        assert torch.equal(state['optimizer'][name]['average'], weight), 'to resume from'
    result = train(run, *averaging, '--init_from=resume', '--eval_only', out='averaged')
    assert f'{losses(tmp_path / "averaged")[9]:.4f}  validation' in result.out


@pytest.mark.parametrize(
    'what', ['a loss in chunks', pytest.param('compilation', marks=pytest.mark.slow)]
)
def test_what_is_for_speed_ends_where_the_rest_does(run, sheep, tmp_path, monkeypatch, what):
    flags = ['--max_iters=30', '--arch=qwen3', '--optimizer=muon', '--eval_interval=30']
    for seed in ('--seed=1', '--seed=2', '--seed=3'):
        train(run, *flags, seed, out=f'plain{seed}')
        if what == 'compilation':
            train(run, *flags, seed, '--compile', out=f'fast{seed}')
        else:
            with monkeypatch.context() as context:
                context.setattr(model_module, "MAX_LOGITS", {'cpu': 10_000})
                train(run, *flags, seed, out=f'fast{seed}')
        plain = losses(tmp_path / f'plain{seed}')[30]
        fast = losses(tmp_path / f'fast{seed}')[30]
        assert plain == pytest.approx(fast, abs=1e-4)
        assert plain < 5.4


@pytest.mark.slow  # the first compilation takes most of a minute
def test_compiled_training_is_eager_training(run, sheep, tmp_path):
    for name, flag in (('eager', '--compile=False'), ('compiled', '--compile=True')):
        train(run, '--max_iters=20', '--log_interval=1', flag, out=name)
    compiled = losses(tmp_path / 'compiled', 'loss')
    assert compiled == pytest.approx(losses(tmp_path / 'eager', 'loss'), abs=1e-4)


def test_without_a_compiler_training_goes_on_and_says_so(run, sheep, monkeypatch):
    def broken(function):
        raise RuntimeError('no compiler')

    monkeypatch.setattr(torch, 'compile', broken)
    result = train(run, '--max_iters=1', '--compile')
    assert 'No working compiler (RuntimeError)' in result.err
    assert 'not compiled' in result.out


def test_bfloat16_is_used_where_asked_for(run, sheep, tmp_path):
    curves = []
    for dtype in ('float32', 'bfloat16'):
        train(run, '--max_iters=3', '--log_interval=1', f'--dtype={dtype}', out=dtype)
        curves.append(list(losses(tmp_path / dtype, 'loss').values()))
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], abs=0.05)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_muon_multiplies_in_the_dtype_of_the_run(run, sheep, monkeypatch, dtype):
    seen = set()
    baddbmm = torch.baddbmm

    def noted(*args, **kwargs):
        seen.update(tensor.dtype for tensor in args)
        return baddbmm(*args, **kwargs)

    monkeypatch.setattr(torch, 'baddbmm', noted)
    train(run, '--max_iters=2', '--optimizer=muon', f'--dtype={dtype}')
    assert seen == {getattr(torch, dtype)}


@pytest.mark.parametrize('is_native', [True, False])
def test_a_cpu_trains_in_what_is_fast_and_says_so(run, sheep, monkeypatch, is_native):
    monkeypatch.setattr(runtime, 'multiplies_bfloat16', lambda: is_native)
    expected = 'bfloat16' if is_native else 'float32'
    result = train(run, '--max_iters=1', '--dtype=auto')
    assert result.globals['precision'] == expected
    assert f', {expected}, not compiled' in result.out


def test_another_dtype_is_said_on_resume(run, sheep, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, 'multiplies_bfloat16', lambda: False)
    train(run, '--max_iters=1', '--dtype=auto')
    assert "dtype = 'float32'\n" in (tmp_path / 'out' / 'config.py').read_text()
    monkeypatch.setattr(runtime, 'multiplies_bfloat16', lambda: True)  # on another machine
    resumed = train(run, '--max_iters=2', '--dtype=auto', '--init_from=resume')
    assert "dtype was 'float32', is now 'bfloat16'\n" in resumed.out


def test_dropout_is_in_blocks_and_in_the_embedding_only():
    shape = {'vocab_size': 64, 'block_size': 16, 'n_layer': 1, 'n_head': 2, 'n_embd': 32}
    model = GPT(GPTConfig(**shape, dropout=0.5))
    block = model.blocks[0]
    x = torch.randn(2, 16, 32)
    assert torch.equal(block.attn(x), block.attn(x)), 'nothing is random in attention'
    calls = []
    for name, layer in (('embedding', model.drop), ('block', block.drop)):
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    idx = torch.randint(0, 64, (2, 16))
    assert not torch.equal(model(idx), model(idx))
    assert calls == 2 * ['embedding', 'block', 'block']
    assert torch.equal(model.eval()(idx), model(idx))


def test_samples_while_training_obey_the_seed(run, sheep, tmp_path):
    """And they are sampled alike by sample.py, whose seed is a knob of its own."""
    flags = ['--max_iters=2', '--sample_interval=2', '--learning_rate=0.0', '--weight_decay=0.0']
    flags += ['--init_from=base/step_00000000', '--sample_prompt=1 sheep']
    train(run, '--max_iters=0', out='base')
    texts = {}
    for out, seed in (('a', 1), ('b', 1), ('c', 2)):
        train(run, *flags, f'--seed={seed}', out=out)
        texts[out] = losses(tmp_path / out, 'sample')[2]
    assert texts['a'] == texts['b']
    assert texts['a'] != texts['c']
    options = ['--num_samples=1', '--max_new_tokens=100', '--temperature=0.8', '--top_k=200']
    options += ['--dtype=float32', '--seed=1']
    again = run('sample.py', '--out_dir=a', '--start=1 sheep', *options)
    assert again.code == 0, again.err
    assert again.out.startswith(runtime.visible(texts['a']))


# -----------------------------------------------------------------------------
# resuming


def timeless(out):
    """A run's log without the figures that vary."""
    found = []
    for record in records(out):
        found.append({key: value for key, value in record.items() if key not in TIMES})
    return found


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_resuming_is_as_if_it_never_stopped(run, sheep, tmp_path, dtype):
    flags = ['--max_iters=20', '--eval_interval=10', '--dropout=0.2', '--warmup_iters=5']
    flags += ['--log_interval=3', '--gradient_accumulation_steps=2', f'--dtype={dtype}']
    flags += ['--average_frac=0.2']
    train(run, *flags, out='whole')
    shutil.copytree(tmp_path / 'whole', tmp_path / 'killed')
    shutil.rmtree(tmp_path / 'killed' / 'step_00000020')
    train(run, *flags, '--init_from=resume', out='killed')

    whole = tmp_path / 'whole' / 'step_00000020'
    killed = tmp_path / 'killed' / 'step_00000020'
    name = 'model.safetensors'
    assert (whole / name).read_bytes() == (killed / name).read_bytes()
    states = [torch.load(f / 'train_state.pt', weights_only=True) for f in (whole, killed)]
    assert states[0]['optimizer']['blocks.0.attn.qkv.weight']['exp_avg'].any()
    for part in ('optimizer', 'scaler'):
        assert same(states[0][part], states[1][part])
    assert timeless(tmp_path / 'whole') == timeless(tmp_path / 'killed')


def test_auto_starts_and_then_resumes(run, sheep, tmp_path):
    flags = ['--init_from=auto', '--eval_interval=2']
    assert 'resume' not in train(run, *flags, '--max_iters=4').out
    assert 'step 4' in train(run, *flags, '--max_iters=6').out
    assert list(losses(tmp_path / 'out')) == [0, 2, 4, 6]
    again = train(run, *flags, '--max_iters=6')
    assert list(losses(tmp_path / 'out')) == [0, 2, 4, 6]
    assert 'Best validation loss' in again.out


def test_the_written_config_repeats_the_run(run, sheep, tmp_path):
    train(run, '--max_iters=3', '--seed=5', '--weight_decay=0.3')
    config = (tmp_path / 'out' / 'config.py').read_text()
    written = set(re.findall(r'^([a-z]\w*) = ', config, re.MULTILINE))
    help_lines = run('train.py', '--help').out.splitlines()
    knobs = {line[4:].split('=')[0] for line in help_lines if line.startswith('  --')}
    assert written == knobs
    again = run('train.py', 'out/config.py', '--out_dir=again')
    assert again.code == 0, again.err
    assert same(weights(tmp_path / 'out', 3), weights(tmp_path / 'again', 3))


def test_eval_only_gives_the_logged_loss_and_changes_nothing(run, sheep, tmp_path):
    train(run, '--max_iters=3')
    before = files_of(tmp_path / 'out')
    result = train(run, '--max_iters=3', '--init_from=resume', '--eval_only=True')
    assert f'{losses(tmp_path / "out")[3]:.4f}  validation' in result.out
    assert files_of(tmp_path / 'out') == before


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_resumes_to_the_same_weights(
    run, sheep, tmp_path, monkeypatch, number
):
    def interrupt(n):
        if n == 3:
            signal.raise_signal(number)

    flags = ['--max_iters=8', '--eval_interval=6', '--dropout=0.1']
    train(run, *flags, out='whole')
    before_each_step(monkeypatch, interrupt)
    stopped = train(run, *flags, code=128 + number)
    assert f'        3  {number.name}, saved\n' in stopped.out
    assert '--init_from=resume' in stopped.out
    assert (tmp_path / 'out' / 'step_00000003').is_dir()
    train(run, *flags, '--init_from=resume')
    assert list(losses(tmp_path / 'out')) == [0, 6, 8]
    assert same(weights(tmp_path / 'whole', 8), weights(tmp_path / 'out', 8))


@pytest.mark.parametrize(('seconds', 'exits'), [(0.0, []), (2.0, [130])])
def test_a_second_ctrl_c_ends_the_process(run, sheep, monkeypatch, seconds, exits):
    """But not the first one passed on by a launcher, at the same time."""
    real = time.monotonic
    exited = []
    steps = []

    def step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 1:
            for moment in (100.0, 100.0 + seconds):
                monkeypatch.setattr(time, 'monotonic', lambda moment=moment: moment)
                signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(time, 'monotonic', real)

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    monkeypatch.setattr(os, '_exit', exited.append)
    train(run, '--max_iters=3', code=130)
    assert exited == exits
    assert len(steps) == 1


def test_changed_knobs_are_listed_on_resume_and_take_effect(run, sheep, tmp_path):
    train(run, '--max_iters=2', '--dropout=0.1')
    flags = ['--weight_decay=0.5', '--beta2=0.9', '--dropout=0.3', '--init_from=resume']
    result = train(run, '--max_iters=3', *flags)
    for change in ('max_iters was 2, is now 3', 'weight_decay was 0.1, is now 0.5'):
        assert change in result.out
    assert 'dropout was 0.1, is now 0.3' in result.out
    (optimizer,) = result.globals['optimizers']
    assert {group['weight_decay'] for group in optimizer.param_groups} == {0.5, 0.0}
    assert {group['betas'] for group in optimizer.param_groups} == {(0.9, 0.9)}
    assert {block.drop.p for block in result.globals['model'].blocks} == {0.3}


def test_tokens_of_another_batch_size_before_are_counted(run, sheep, tmp_path):
    train(run, '--max_iters=3', '--batch_size=2', '--block_size=16')
    flags = ['--max_iters=5', '--batch_size=7', '--block_size=16', '--log_interval=1']
    result = train(run, *flags, '--init_from=resume')
    n_tokens = (3 * 2 + 2 * 7) * 16
    epochs = n_tokens / 16 / result.globals['data'].n_windows[0]
    line = f'steps   5, each 7 x 1 x 16 = 112 tokens: {n_tokens}\n'
    assert f'{line}        {epochs:.2f} epochs of it\n' in result.out
    assert losses(tmp_path / 'out', 'tokens')[5] == n_tokens
    flags = ['--max_iters=2', '--batch_size=90', '--block_size=16', '--init_from=resume']
    assert f' 1,440 tokens: {n_tokens}\n' in train(run, *flags).out  # it has been longer


def test_a_run_does_not_go_on_with_another_text(run, sheep):
    train(run, '--max_iters=2')
    with open('sheep.txt', 'w') as file:
        file.write(TEXT[::-1])
    assert run('prepare.py', '--input=sheep.txt', '--tokenizer=byte').code == 0
    result = train(run, '--max_iters=3', '--init_from=resume', code=1)
    assert 'data/sheep has changed since out/step_00000002' in result.err


def test_a_run_does_not_go_on_with_another_optimizer_or_average(run, sheep):
    train(run, '--max_iters=2')
    result = train(run, '--max_iters=3', '--init_from=resume', '--optimizer=muon', code=1)
    assert "was trained with optimizer='adamw': resume it with this." in result.err
    result = train(run, '--max_iters=3', '--init_from=resume', '--average_frac=0.1', code=1)
    assert 'was trained with average_frac=None: resume it with this.' in result.err
    train(run, '--max_iters=2', '--average_frac=0.1', out='averaged')
    again = ['--max_iters=3', '--init_from=resume', '--average_frac=0.1', '--freeze=1']
    assert 'trained with freeze=None: ' in train(run, *again, out='averaged', code=1).err


def test_a_run_is_neither_overwritten_nor_resumed_as_another(run, sheep, tmp_path):
    train(run, '--max_iters=2')
    before = files_of(tmp_path / 'out')
    assert 'out holds a run' in train(run, '--max_iters=2', code=1).err
    wrong = train(run, '--max_iters=3', '--init_from=resume', '--n_layer=1', code=1)
    assert 'has n_layer=2' in wrong.err
    assert 'train.py out/config.py --init_from=resume' in wrong.err
    assert files_of(tmp_path / 'out') == before


# -----------------------------------------------------------------------------
# which checkpoints there are, and what cannot be written


def test_the_newest_checkpoints_and_the_best_stay(run, sheep, tmp_path, monkeypatch):
    real = checkpoint.save
    fake = iter([5.0, 2.0, 4.0, 3.0, 3.5])

    def save(out_dir, model, dataset, meta, *args, **kwargs):
        return real(out_dir, model, dataset, meta | {'val_loss': next(fake)}, *args, **kwargs)

    monkeypatch.setattr(checkpoint, 'save', save)
    train(run, '--max_iters=5', '--eval_interval=1', '--keep_last=2')
    assert folders_of(tmp_path / 'out') == ['step_00000002', 'step_00000004', 'step_00000005']
    assert checkpoint.find(tmp_path / 'out', 'best').name == 'step_00000002'
    assert checkpoint.find(tmp_path / 'out', 'last').name == 'step_00000005'


def test_always_save_checkpoint_false_saves_the_best_and_last(run, sheep, tmp_path):
    flags = ['--max_iters=6', '--eval_interval=2', '--keep_last=9']
    flags += ['--always_save_checkpoint=False']
    no_change = ['--learning_rate=0.0', '--min_lr=0.0', '--weight_decay=0.0']
    train(run, *flags, *no_change, out='never')
    assert folders_of(tmp_path / 'never') == ['step_00000006']
    train(run, *flags, '--learning_rate=1e-2', out='always')
    saved = ['step_00000002', 'step_00000004', 'step_00000006']
    assert folders_of(tmp_path / 'always') == saved


def test_training_goes_on_when_the_disk_is_full(run, sheep, tmp_path, monkeypatch):
    real = torch.save
    saves = []

    def full_at_the_second(*args, **kwargs):
        _, target = args
        if isinstance(target, Path):  # not the trial of the progress, in memory
            saves.append(target)
        if len(saves) == 2 and target is saves[-1]:
            reason = 'PytorchStreamWriter failed writing file: No space left on device'
            raise RuntimeError(reason)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, 'save', full_at_the_second)
    result = train(run, '--max_iters=6', '--eval_interval=2', '--keep_last=9')
    failed = 'NOT SAVED: out/step_00000004 could not be saved: PytorchStreamWriter failed'
    assert failed in result.out
    left = folders_of(tmp_path / 'out')
    assert left == ['step_00000002', 'step_00000006'], 'and nothing half-written'

    saves.clear()
    ended = train(run, '--max_iters=2', '--eval_interval=1', out='ended', code=1)
    assert 'ended/step_00000002 could not be saved' in ended.err
    assert 'What was saved before is intact' in ended.err


def test_a_log_that_cannot_be_written_does_not_end_the_run(run, sheep, tmp_path, monkeypatch):
    real = open
    steps = []

    def full_at_step_2(path, mode='r', *args, **kwargs):
        if str(path).endswith('log.jsonl') and mode.startswith('a') and steps[-1:] == [2]:
            raise OSError(28, 'No space left on device')
        return real(path, mode, *args, **kwargs)

    before_each_step(monkeypatch, steps.append)
    monkeypatch.setattr('builtins.open', full_at_step_2)
    result = train(run, '--max_iters=3', '--log_interval=1')
    assert 'log.jsonl could not be written: [Errno 28]' in result.out
    assert list(losses(tmp_path / 'out', 'loss')) == [1, 3]


def test_weights_that_are_not_finite_are_not_saved(run, sheep, tmp_path, monkeypatch):
    def step(optimizer, *args, **kwargs):
        optimizer.param_groups[0]['params'][0].data.fill_(math.nan)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    result = train(run, '--max_iters=9', code=1)
    assert 'The weights are not finite at step 1: nothing is saved.' in result.err
    assert not list((tmp_path / 'out').glob('step_*'))


def test_a_save_that_was_killed_is_cleaned_up(run, sheep, tmp_path):
    train(run, '--max_iters=2')
    for name in ('.step_00000004.tmp', 'step_backup', 'step_00000001.good'):
        shutil.copytree(tmp_path / 'out' / 'step_00000002', tmp_path / 'out' / name)
    assert 'step 2' in train(run, '--max_iters=3', '--init_from=resume').out
    others = ['step_00000001.good', 'step_backup']
    assert folders_of(tmp_path / 'out') == sorted(['step_00000002', 'step_00000003', *others])


# -----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--learning_rat=1'], 'Did you mean learning_rate?'),
        (['--batch_size=x'], "batch_size takes int, not 'x'"),
        (['--batch_size=0'], 'batch_size=0: must be from 1 to 1,000,000,000.'),
        (['--seed=-1', '--max_iters=-1'], 'max_iters=-1, seed=-1: must be from 0 to'),
        (['--learning_rate=1e999'], 'learning_rate=inf: must be from 0 to'),
        (['--n_embd=33'], 'n_embd=33 must be a multiple of n_head=2'),
        (['--beta1=1.0'], 'beta1=1.0: must be from 0 to 0.999999.'),
        (['--arch=rnn'], "arch='rnn' must be one of: gpt2, llama, qwen2, qwen3"),
        (['--dataset=goats'], 'Make it with: python prepare.py --input=YOUR_TEXT --name=goats'),
        (
            ['--dataset=shakespeare'],
            'data/shakespeare has no train.bin. Make it with: python prepare.py\n',
        ),
        (['--block_size=100000'], 'fewer than one window of block_size=100000'),
        (['--init_from=resume'], 'out has no checkpoint'),
        (
            ['--init_from=gtp2'],
            'There is no folder gtp2. Models known by name: gpt2, gpt2-medium',
        ),
        (['--device=tpu'], "device='tpu' cannot be used here"),
        (['--device=cuda:99'], "device='cuda:99' cannot be used here"),
        (['--dtype=float8'], "dtype='float8' must be"),
        (['--early_stopping_patience=0'], 'early_stopping_patience=0: must be from 1'),
        (['missing.py'], 'There is no config file missing.py'),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(run, sheep, tmp_path, args, message):
    result = train(run, '--max_iters=1', *args, code=1)
    assert message in result.err
    assert result.is_one_sentence
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('name', 'choices'), [('optimizer', 'adamw, muon'), ('schedule', 'cosine, wsd')]
)
def test_a_misspelt_choice_names_what_there_is(run, sheep, name, choices):
    result = train(run, f'--{name}=other', code=1)
    assert f"{name}='other' must be one of: {choices}." in result.err


def test_a_model_too_large_for_the_memory_is_one_sentence(sheep, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (10 * 2**30, 10 * 2**30))

    flags = ['--dataset=sheep', *TINY, '--n_embd=16000000']  # 20 GB in the embedding alone
    result = command('train.py', *flags, cwd=tmp_path, preexec_fn=limit)
    assert result.returncode == 1
    assert result.stderr.count('\n') == 1
    assert 'Out of memory: reduce batch_size, block_size or the model' in result.stderr


# -----------------------------------------------------------------------------
# data that does not fit its description


@pytest.mark.parametrize(
    'damage',
    [
        {'dtype': 'foo'},
        {'vocab_size': 10},
        {'vocab_size': 'x'},
        {'val': {}},
        {'val': None},
        {'train': {'tokens': 9801, 'bytes': 0}},
        'no end_of_text',
        'no object',
    ],
    ids=str,
)
def test_a_damaged_dataset_is_one_sentence(run, sheep, tmp_path, damage):
    meta = json.loads((sheep / 'meta.json').read_text())
    if damage == 'no object':
        meta = []
    elif damage == 'no end_of_text':
        del meta['end_of_text']
    else:
        meta.update(damage)
    (sheep / 'meta.json').write_text(json.dumps(meta))
    result = train(run, code=1)
    assert 'data/sheep is damaged' in result.err
    assert result.is_one_sentence
    assert not (tmp_path / 'out').exists()


def test_a_dataset_that_does_not_match_its_meta_is_refused(run, sheep):
    with open(sheep / 'train.bin', 'ab') as file:
        file.write(b'\0\0')
    result = train(run, code=1)
    assert 'data/sheep is damaged, make it again with: python prepare.py' in result.err


def test_an_id_outside_the_vocabulary_is_refused(run, sheep):
    tokens = np.fromfile(sheep / 'train.bin', dtype=np.uint16)
    tokens[-1] = 300
    tokens.tofile(sheep / 'train.bin')
    assert 'train.bin has id 300, the vocabulary 257' in train(run, code=1).err


def test_a_recorded_id_outside_the_vocabulary_is_refused(run, sheep):
    meta = json.loads((sheep / 'meta.json').read_text())
    meta['val']['highest'] = 70_000
    (sheep / 'meta.json').write_text(json.dumps(meta))
    assert 'val.bin has id 70,000, the vocabulary 257' in train(run, code=1).err


def test_checksums_are_compared_on_request(run, sheep):
    train(run, '--verify_data', '--eval_only')
    tokens = np.fromfile(sheep / 'train.bin', dtype=np.uint16)
    tokens[len(tokens) // 2] ^= 1
    tokens.tofile(sheep / 'train.bin')
    train(run, '--eval_only')
    result = train(run, '--verify_data', code=1)
    assert 'the checksum of train.bin is not the one in meta.json' in result.err


# -----------------------------------------------------------------------------
# nanoGPT's data


def test_nanogpts_files_train_as_ours_of_the_same_text(run, tmp_path):
    text = TEXT * 2
    (tmp_path / 'x.txt').write_text(text)
    assert run('prepare.py', '--input=x.txt', '--tokenizer=gpt2', '--name=ours').code == 0
    # What nanoGPT's data/shakespeare/prepare.py does: nine tenths of the characters are for
    # training, ids are uint16, and there is nothing else.
    encoding = tiktoken.get_encoding('gpt2')
    folder = tmp_path / 'data' / 'theirs'
    folder.mkdir()
    cut = int(len(text) * 0.9)
    for name, part in {'train': text[:cut], 'val': text[cut:]}.items():
        ids = np.array(encoding.encode_ordinary(part), dtype=np.uint16)
        ids.tofile(folder / f'{name}.bin')

    flags = [*TINY, '--block_size=16', '--batch_size=2', '--n_layer=1', '--max_iters=20']
    flags += ['--log_interval=1', '--eval_interval=10', '--learning_rate=1e-2']
    for name in ('ours', 'theirs'):
        result = run('train.py', *flags, f'--dataset={name}', f'--out_dir={name}')
        assert result.code == 0, result.err
    notice = r"^data/theirs has no meta.json.* assuming nanoGPT's format, GPT-2's ids; writing one"
    assert re.search(notice, result.out)
    for key, count in {'loss': 20, 'val_loss': 3, 'bits_per_byte': 3}.items():
        curve = losses(tmp_path / 'theirs', key)
        assert curve == losses(tmp_path / 'ours', key)
        assert len(curve) == count
    assert curve[20] < 0.7 * curve[0]

    ours = json.loads((tmp_path / 'data' / 'ours' / 'meta.json').read_text())
    theirs = json.loads((tmp_path / 'data' / 'theirs' / 'meta.json').read_text())
    for split in ('train', 'val'):
        assert ours[split].pop('documents') == 1
        assert theirs[split].pop('documents') == 0, 'no end-of-text counts them'
    assert ours | {'source': ['nanoGPT']} == theirs
    assert not list(folder.glob('.*'))


@pytest.mark.slow
def test_only_gpt2_tokens_are_taken_over_from_nanogpt(run, tmp_path):
    folder = tmp_path / 'data' / 'sheep'
    folder.mkdir(parents=True)
    ids = np.arange(1000, dtype=np.uint16)
    for split in ('train', 'val'):
        ids.tofile(folder / f'{split}.bin')
    train(run, '--eval_only')
    (folder / 'meta.json').unlink()  # killed just before it was there
    train(run, '--eval_only')

    beyond = np.array([60_000], np.uint16).tobytes()
    only_end_of_text = np.array([50_256], np.uint16).tobytes()
    refusal = "data/sheep/val.bin does not hold GPT-2's tokens, 16 bits each"
    for content in (b'', b'abc', beyond, only_end_of_text):
        (folder / 'meta.json').unlink()
        (folder / 'val.bin').write_bytes(content)
        assert refusal in train(run, '--eval_only', code=1).err
        (folder / 'meta.json').touch()

    (folder / 'meta.json').unlink()
    ids.tofile(folder / 'val.bin')
    tokenizer.save(tokenizer.build('byte'), folder)
    assert "its tokenizer is not GPT-2's" in train(run, '--eval_only', code=1).err


def test_nanogpts_characters_are_to_be_prepared_again(run, sheep):
    for name in ('meta.json', 'tokenizer.json'):
        (sheep / name).unlink()
    (sheep / 'meta.pkl').touch()
    result = train(run, code=1)
    assert "data/sheep has nanoGPT's meta.pkl, which is not read." in result.err


# -----------------------------------------------------------------------------
# fine-tuning


def test_fine_tuning_starts_from_a_models_weights_and_shape(run, sheep, tmp_path):
    shape = ['--arch=qwen3', '--n_kv_head=1']
    train(run, '--max_iters=60', '--learning_rate=1e-2', *shape, out='base')
    base = losses(tmp_path / 'base')[60]
    model = f'--init_from={tmp_path / "base" / "step_00000060"}'
    flags = ['--dataset=sheep', '--block_size=32', '--max_iters=3', '--out_dir=tuned']
    result = run('train.py', model, '--dtype=float32', *flags)
    assert result.code == 0, result.err
    assert losses(tmp_path / 'tuned')[0] == pytest.approx(base, abs=1e-6)

    assert run('train.py', 'tuned/config.py', '--max_iters=4', '--init_from=resume').code == 0
    assert run('train.py', 'tuned/config.py', '--max_iters=0', '--out_dir=again').code == 0
    again = losses(tmp_path / 'again')[0]
    assert again == losses(tmp_path / 'tuned')[0], 'from the model again'
    wrong = train(run, model, '--block_size=64', code=1)
    assert 'block_size=64 is longer than the context of the model, 32' in wrong.err


def test_fine_tuning_takes_a_dataset_of_the_models_vocabulary(run, sheep, tmp_path):
    train(run, '--max_iters=1', out='base')
    (tmp_path / 'goats.txt').write_text(TEXT)
    assert run('prepare.py', '--input=goats.txt', '--tokenizer=char').code == 0
    flags = ['--init_from=base/step_00000001', '--dataset=goats', '--block_size=32']
    wrong = run('train.py', *flags, '--max_iters=1')
    assert wrong.code == 1
    assert 'has a vocabulary of 257 tokens, data/goats another one of 31' in wrong.err
    assert run('prepare.py', '--input=goats.txt', '--tokenizer=base/step_00000001').code == 0
    assert run('train.py', *flags, '--max_iters=1').code == 0


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_frozen_blocks_stay_the_others_train_and_resume(run, sheep, tmp_path, optimizer):
    train(run, '--max_iters=1', out='base')
    flags = ['--freeze=1', f'--optimizer={optimizer}', '--lr_decay_iters=6']
    start = '--init_from=base/step_00000001'
    train(run, start, *flags, '--max_iters=6', out='whole')
    train(run, start, *flags, '--max_iters=3', out='halves')
    train(run, '--init_from=resume', *flags, '--max_iters=6', out='halves')
    before = weights(tmp_path / 'base', 1)
    after = weights(tmp_path / 'whole', 6)
    assert same(after, weights(tmp_path / 'halves', 6))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if '.h.1.' in name or '.ln_f.' in name}
    refused = train(run, start, *flags, '--freeze=3', '--max_iters=1', code=1, out='no')
    assert 'freeze=3 must be from 0 to 2' in refused.err
    assert not (tmp_path / 'no').exists()

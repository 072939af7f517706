import json
import math
import os
import resource
import shutil
import signal

import numpy as np
import pytest
import tiktoken
import torch
from conftest import TEXT, TINY, command
from safetensors.torch import load_file

import model as model_module
import tokenizer
from data import IGNORE, Dataset, count_windows, training_order, windows
from model import GPT


def records(out):
    return [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]


def losses(out, key='val_loss'):
    return {record['step']: record[key] for record in records(out) if key in record}


def train(run, *args, out='out', code=0):
    result = run('train.py', '--dataset=sheep', f'--out_dir={out}', *TINY, *args)
    assert result.code == code, result.err
    return result


def same(a, b):
    """Whether two nested structures of tensors and values are identical to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_training_learns_and_the_three_scripts_work_from_the_command_line(tmp_path):
    (tmp_path / 'sheep.txt').write_text(TEXT)
    first = command('prepare.py', '--input=sheep.txt', '--vocab_size=300', cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    flags = [*TINY, '--max_iters=120', '--learning_rate=1e-2', '--eval_interval=60', '--out_dir=o']
    second = command('train.py', '--dataset=sheep', *flags, cwd=tmp_path)
    assert second.returncode == 0 and not second.stderr, second.stderr
    third = command('sample.py', '--out_dir=o', '--start=1 sheep', '--temperature=0', '--num_samples=1', cwd=tmp_path)
    assert third.returncode == 0 and not third.stderr, third.stderr
    assert third.stdout.startswith('1 sheep jumped over the')
    assert max(len(line) for output in (first, second) for line in output.stdout.splitlines()) <= 80
    assert losses(tmp_path / 'o')[120] < 0.5 * losses(tmp_path / 'o')[0]


def test_one_batch_can_be_learned_by_heart(run, tmp_path):
    text = 'To be, or not to be, that is the question: Whether tis nobler in the mind to suffer. '
    (tmp_path / 'sheep.txt').write_text(text)
    assert run('prepare.py', '--input=sheep.txt', '--tokenizer=char').code == 0
    train(run, '--max_iters=150', '--learning_rate=1e-2', '--block_size=16', '--batch_size=5')
    assert losses(tmp_path / 'out', 'loss')[150] < 0.05


def test_max_iters_updates_exactly_and_the_last_one_is_evaluated_and_saved(run, sheep, tmp_path, monkeypatch):
    updates = []
    adamw = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda *a, **k: updates.append(1) or adamw(*a, **k))
    result = train(run, '--max_iters=7', '--eval_interval=5', '--log_interval=3')
    assert len(updates) == 7
    assert list(losses(tmp_path / 'out')) == [0, 5, 7]
    assert list(losses(tmp_path / 'out', 'loss')) == [3, 6, 7]
    saved = tmp_path / 'out' / 'step_00000007'
    assert GPT.from_pretrained(saved).config.n_layer == 2
    assert json.loads((saved / 'meta.json').read_text())['val_loss'] == losses(tmp_path / 'out')[7]
    weights = result.globals['model'].state_dict()
    assert same(dict(weights), dict(GPT.from_pretrained(saved).state_dict()))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_resuming_is_as_if_it_never_stopped(run, sheep, tmp_path, dtype):
    flags = ['--max_iters=20', '--eval_interval=10', '--dropout=0.2', '--warmup_iters=5', '--log_interval=3']
    flags += ['--gradient_accumulation_steps=2', f'--dtype={dtype}']
    train(run, *flags, out='whole')
    shutil.copytree(tmp_path / 'whole', tmp_path / 'killed')
    shutil.rmtree(tmp_path / 'killed' / 'step_00000020')
    train(run, *flags, '--init_from=resume', out='killed')
    files = [tmp_path / name / 'step_00000020' for name in ('whole', 'killed')]
    assert (files[0] / 'model.safetensors').read_bytes() == (files[1] / 'model.safetensors').read_bytes()
    a, b = (torch.load(file / 'train_state.pt', weights_only=True) for file in files)
    assert a['optimizer']['blocks.0.attn.qkv.weight']['exp_avg'].any()
    assert same(a['optimizer'], b['optimizer']) and same(a['scaler'], b['scaler'])
    times = ('tokens_per_second', 'train_seconds', 'tflops', 'gib')
    a, b = (records(tmp_path / name) for name in ('whole', 'killed'))
    assert [{**r, **dict.fromkeys(times)} for r in a] == [{**r, **dict.fromkeys(times)} for r in b]


def test_auto_starts_and_then_resumes(run, sheep, tmp_path):
    flags = ['--init_from=auto', '--eval_interval=2']
    assert 'resume' not in train(run, *flags, '--max_iters=4').out
    assert 'step 4' in train(run, *flags, '--max_iters=6').out
    assert list(losses(tmp_path / 'out')) == [0, 2, 4, 6]
    again = train(run, *flags, '--max_iters=6')
    assert list(losses(tmp_path / 'out')) == [0, 2, 4, 6] and 'Best validation loss' in again.out


def test_micro_steps_change_neither_the_gradient_nor_the_logged_loss(run, sheep, tmp_path, monkeypatch):
    """One step of 8 windows, the padded last window of the epoch among them, against float64 on all tokens at once."""
    gradients, weights = [], []

    def record(optimizer, *args, **kwargs):
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        gradients.append([p.grad.clone() for p in parameters])
        weights.append([p.clone() for p in parameters])

    monkeypatch.setattr(torch.optim.AdamW, 'step', record)
    data = Dataset('sheep', root=tmp_path / 'data')
    n = count_windows(data.train, 32)
    seed = next(s for s in range(10**4) if n - 1 in training_order(range(8), n, s))
    assert (len(data.train) - 1) % 32, 'the last window must be a partial one'
    for accumulation in (1, 2, 4, 8):
        flags = [f'--gradient_accumulation_steps={accumulation}', f'--batch_size={8 // accumulation}', f'--seed={seed}']
        out = f'out{accumulation}'
        result = train(run, *flags, '--max_iters=1', '--log_interval=1', '--grad_clip=0.0', out=out)
        assert losses(tmp_path / out, 'loss')[1] == pytest.approx(losses(tmp_path / 'out1', 'loss')[1], abs=1e-6)
        for a, b in zip(gradients[0], gradients[-1], strict=True):
            assert (a - b).abs().max() < 1e-6

    model = result.globals['model'].double()
    x, y = windows(data.train, 32, training_order(range(8), n, seed))
    log_probabilities = model(x).log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    loss = -log_probabilities[y != IGNORE].mean()
    assert losses(tmp_path / 'out1', 'loss')[1] == pytest.approx(loss.item(), abs=1e-6)
    loss.backward()
    reference = [p.grad for group in model.parameter_groups(0.1) for p in group['params']]
    for a, b in zip(gradients[0], reference, strict=True):
        assert (a - b).abs().max() < 1e-6


def test_the_validation_loss_is_that_of_the_whole_split_for_any_batch_size(run, sheep, tmp_path):
    found = {}
    for batch_size in (1, 3, 8, 64):
        result = train(run, f'--batch_size={batch_size}', '--max_iters=0', out=f'out{batch_size}')
        found[batch_size] = losses(tmp_path / f'out{batch_size}')[0]
    data, model = Dataset('sheep', root=tmp_path / 'data'), result.globals['model'].double().eval()
    tokens = torch.from_numpy(data.val.astype(np.int64))
    nats = []
    for start in range(0, len(tokens) - 1, 32):  # window by window, token by token
        window = tokens[start : start + 33]
        log_probabilities = model(window[None, :-1])[0].log_softmax(-1)
        nats += [-log_probabilities[t, window[t + 1]].item() for t in range(len(window) - 1)]
    assert len(nats) == len(tokens) - 1
    for loss in found.values():
        assert loss == pytest.approx(math.fsum(nats) / len(nats), abs=1e-6)


def test_bits_per_byte_of_a_uniform_model_are_those_of_its_vocabulary(run, sheep, tmp_path, monkeypatch):
    monkeypatch.setattr(GPT, 'init_weights', lambda self: [p.data.zero_() for p in self.parameters()])
    train(run, '--max_iters=0')
    assert losses(tmp_path / 'out', 'bits_per_byte')[0] == pytest.approx(math.log2(257), rel=1e-6)


@pytest.mark.parametrize('change', ['eval_interval=1', 'log_interval=1', 'log_norms', 'always_save_checkpoint=False'])
def test_looking_more_often_does_not_change_the_weights(run, sheep, tmp_path, change):
    flags = ['--max_iters=6', '--dropout=0.1', '--eval_interval=100', '--log_interval=100']
    train(run, *flags, out='a')
    train(run, *flags, f'--{change}', out='b')
    weights = [load_file(tmp_path / out / 'step_00000006' / 'model.safetensors') for out in 'ab']
    assert same(*weights)


def test_the_learning_rate_is_torchs_warmup_and_cosine(run, sheep, tmp_path):
    flags = ['--max_iters=20', '--log_interval=1', '--warmup_iters=4', '--lr_decay_iters=16']
    train(run, *flags, '--learning_rate=1e-2', '--min_lr=1e-3')
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 5, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12, eta_min=1e-3)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[4])
    expected = []
    for step in range(20):
        expected.append(optimizer.param_groups[0]['lr'] if step <= 16 else 1e-3)
        optimizer.step()
        schedule.step()
    assert list(losses(tmp_path / 'out', 'lr').values()) == pytest.approx(expected, rel=1e-6)


def test_gradients_are_clipped_to_the_norm_asked_for(run, sheep, tmp_path, monkeypatch):
    norms = []

    def record(optimizer, *args, **kwargs):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group['params']]
        norms.append(torch.cat(gradients).norm().item())

    monkeypatch.setattr(torch.optim.AdamW, 'step', record)
    train(run, '--max_iters=1', '--log_interval=1', '--grad_clip=0.25', out='a')
    train(run, '--max_iters=1', '--log_interval=1', '--grad_clip=0.0', out='b')
    assert norms[0] == pytest.approx(0.25, rel=1e-4) and norms[1] > 0.3
    assert losses(tmp_path / 'a', 'grad_norm')[1] == pytest.approx(norms[1], rel=1e-5), 'the norm before clipping'


def test_the_newest_checkpoints_and_the_best_stay(run, sheep, tmp_path, monkeypatch):
    import checkpoint

    real, fake = checkpoint.save, iter([5.0, 2.0, 4.0, 3.0, 3.5])

    def save(out_dir, model, dataset, meta, state, keep_last):
        return real(out_dir, model, dataset, meta | {'val_loss': next(fake)}, state, keep_last)

    monkeypatch.setattr(checkpoint, 'save', save)
    train(run, '--max_iters=5', '--eval_interval=1', '--keep_last=2')
    kept = sorted(path.name for path in (tmp_path / 'out').glob('step_*'))
    assert kept == ['step_00000002', 'step_00000004', 'step_00000005']
    assert checkpoint.find(tmp_path / 'out', 'best').name == 'step_00000002'
    assert checkpoint.find(tmp_path / 'out', 'last').name == 'step_00000005'


def test_always_save_checkpoint_false_saves_only_improvements_and_the_end(run, sheep, tmp_path):
    flags = ['--max_iters=6', '--eval_interval=2', '--keep_last=9', '--always_save_checkpoint=False']
    train(run, *flags, '--learning_rate=0.0', '--min_lr=0.0', '--weight_decay=0.0', out='never')
    assert [path.name for path in (tmp_path / 'never').glob('step_*')] == ['step_00000006']
    train(run, *flags, '--learning_rate=1e-2', out='always')
    saved = sorted(path.name for path in (tmp_path / 'always').glob('step_*'))
    assert saved == ['step_00000002', 'step_00000004', 'step_00000006']


def test_the_written_config_repeats_the_run(run, sheep, tmp_path):
    train(run, '--max_iters=3', '--seed=5', '--weight_decay=0.3')
    written = {line.split(' = ')[0] for line in (tmp_path / 'out' / 'config.py').read_text().splitlines()[2:]}
    knobs = {line[4:].split('=')[0] for line in run('train.py', '--help').out.splitlines() if line.startswith('  --')}
    assert written == knobs
    again = run('train.py', 'out/config.py', '--out_dir=again')
    assert again.code == 0, again.err
    paths = [tmp_path / out / 'step_00000003' / 'model.safetensors' for out in ('out', 'again')]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_eval_only_gives_the_logged_loss_and_changes_nothing(run, sheep, tmp_path):
    train(run, '--max_iters=3')
    before = {path: path.read_bytes() for path in (tmp_path / 'out').rglob('*') if path.is_file()}
    result = train(run, '--max_iters=3', '--init_from=resume', '--eval_only=True')
    assert f'{losses(tmp_path / "out")[3]:.4f}  validation' in result.out
    assert before == {path: path.read_bytes() for path in (tmp_path / 'out').rglob('*') if path.is_file()}


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_resumes_to_the_same_weights(run, sheep, tmp_path, monkeypatch, number):
    flags = ['--max_iters=8', '--eval_interval=6', '--dropout=0.1']
    train(run, *flags, out='whole')
    adamw, count = torch.optim.AdamW.step, []

    def step(*args, **kwargs):
        count.append(1)
        if len(count) == 3:
            signal.raise_signal(number)
        return adamw(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    stopped = train(run, *flags, code=128 + number)
    assert f'        3  {number.name}, saved\n' in stopped.out and '--init_from=resume' in stopped.out
    assert (tmp_path / 'out' / 'step_00000003').is_dir()
    train(run, *flags, '--init_from=resume')
    assert list(losses(tmp_path / 'out')) == [0, 6, 8]
    weights = [load_file(tmp_path / out / 'step_00000008' / 'model.safetensors') for out in ('whole', 'out')]
    assert same(*weights)


@pytest.mark.slow  # the first compilation takes most of a minute
def test_compiled_training_is_eager_training(run, sheep, tmp_path):
    for name, flag in (('eager', '--compile=False'), ('compiled', '--compile=True')):
        train(run, '--max_iters=20', '--log_interval=1', flag, out=name)
    compiled, eager = losses(tmp_path / 'compiled', 'loss'), losses(tmp_path / 'eager', 'loss')
    assert list(compiled.values()) == pytest.approx(list(eager.values()), abs=1e-4)


def test_without_a_compiler_training_goes_on_and_says_so(run, sheep, monkeypatch):
    def broken(function):
        raise RuntimeError('no compiler')

    monkeypatch.setattr(torch, 'compile', broken)
    result = train(run, '--max_iters=1', '--compile')
    assert 'No working compiler (RuntimeError)' in result.err and 'not compiled' in result.out


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
        (['--arch=rnn'], "arch='rnn' is not known"),
        (['--dataset=goats'], 'Make it with: python prepare.py --input=YOUR_TEXT --name=goats'),
        (['--dataset=shakespeare'], 'data/shakespeare has no train.bin. Make it with: python prepare.py\n'),
        (['--block_size=100000'], 'fewer than one window of block_size=100000'),
        (['--init_from=resume'], 'out has no checkpoint'),
        (['--init_from=gtp2'], 'There is no folder gtp2. Models known by name: gpt2, gpt2-medium'),
        (['--device=tpu'], "device='tpu' cannot be used here"),
        (['--device=cuda:99'], "device='cuda:99' cannot be used here"),
        (['--dtype=float8'], "dtype='float8' must be"),
        (['--early_stopping_patience=0'], 'early_stopping_patience=0: must be from 1'),
        (['missing.py'], 'There is no config file missing.py'),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(run, sheep, tmp_path, args, message):
    result = train(run, '--max_iters=1', *args, code=1)
    assert message in result.err and result.err.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_a_full_disk_leaves_the_checkpoints_before_and_training_goes_on(run, sheep, tmp_path, monkeypatch):
    real, count = torch.save, []

    def full(*args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise RuntimeError('PytorchStreamWriter failed writing file: No space left on device')
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, 'save', full)
    result = train(run, '--max_iters=6', '--eval_interval=2', '--keep_last=9')
    assert 'NOT SAVED: out/step_00000004 could not be saved: PytorchStreamWriter failed' in result.out
    left = sorted(path.name for path in (tmp_path / 'out').iterdir() if path.is_dir())
    assert left == ['step_00000002', 'step_00000006'], 'and nothing half-written'
    count.clear()
    ended = train(run, '--max_iters=2', '--eval_interval=1', out='ended', code=1)
    assert 'ended/step_00000002 could not be saved' in ended.err and 'What was saved before is intact' in ended.err


def test_a_log_that_cannot_be_written_does_not_end_the_run(run, sheep, tmp_path, monkeypatch):
    import json as module

    real = module.dumps

    def full(record, **options):
        if isinstance(record, dict) and record.get('step') == 2 and 'loss' in record:
            raise OSError(28, 'No space left on device')
        return real(record, **options)

    monkeypatch.setattr(module, 'dumps', full)
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


def test_a_model_too_large_for_the_memory_is_one_sentence(sheep, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (10 * 2**30, 10 * 2**30))

    flags = ['--dataset=sheep', *TINY, '--n_embd=16000000']  # 20 GB in the embedding alone
    result = command('train.py', *flags, cwd=tmp_path, preexec_fn=limit)
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert 'This needs more memory than there is' in result.stderr


def test_a_save_that_was_killed_is_no_checkpoint_and_is_cleaned_up(run, sheep, tmp_path):
    train(run, '--max_iters=2')
    for name in ('.step_00000004.tmp', 'step_backup', 'step_00000001.good'):
        shutil.copytree(tmp_path / 'out' / 'step_00000002', tmp_path / 'out' / name)
    assert 'step 2' in train(run, '--max_iters=3', '--init_from=resume').out
    left = sorted(path.name for path in (tmp_path / 'out').iterdir() if path.is_dir())
    assert left == ['step_00000001.good', 'step_00000002', 'step_00000003', 'step_backup']


def test_changed_knobs_are_listed_on_resume_and_take_effect(run, sheep, tmp_path):
    train(run, '--max_iters=2', '--dropout=0.1')
    flags = ['--max_iters=3', '--weight_decay=0.5', '--beta2=0.9', '--dropout=0.3', '--init_from=resume']
    result = train(run, *flags)
    for line in ('max_iters was 2, is now 3', 'weight_decay was 0.1, is now 0.5', 'dropout was 0.1, is now 0.3'):
        assert line in result.out
    (optimizer,) = result.globals['optimizers']
    assert {group['weight_decay'] for group in optimizer.param_groups} == {0.5, 0.0}
    assert {group['betas'] for group in optimizer.param_groups} == {(0.9, 0.9)}
    assert {block.drop.p for block in result.globals['model'].blocks} == {0.3}


def test_a_run_does_not_go_on_with_another_text(run, sheep, tmp_path):
    train(run, '--max_iters=2')
    (tmp_path / 'sheep.txt').write_text(TEXT[::-1])
    assert run('prepare.py', '--input=sheep.txt', '--tokenizer=byte').code == 0
    result = train(run, '--max_iters=3', '--init_from=resume', code=1)
    assert 'data/sheep has changed since out/step_00000002' in result.err


@pytest.mark.parametrize(
    'damage',
    [
        {'dtype': 'foo'},
        {'vocab_size': 10},
        {'vocab_size': 'x'},
        {'val': {}},
        {'val': None},
        {'train': {'tokens': 9801, 'bytes': 0}},
        {'end_of_text': ...},
        ...,
    ],
    ids=str,
)
def test_a_damaged_dataset_is_one_sentence(run, sheep, tmp_path, damage):
    meta = json.loads((sheep / 'meta.json').read_text())
    meta = [] if damage is ... else {k: v for k, v in (meta | damage).items() if v is not ...}
    (sheep / 'meta.json').write_text(json.dumps(meta))
    result = train(run, code=1)
    assert 'data/sheep is damaged' in result.err and result.err.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_an_id_outside_the_vocabulary_is_refused(run, sheep):
    tokens = np.fromfile(sheep / 'train.bin', dtype=np.uint16)
    tokens[-1] = 300
    tokens.tofile(sheep / 'train.bin')
    assert 'train.bin has the id 300, the vocabulary 257' in train(run, code=1).err


def test_a_recorded_id_outside_the_vocabulary_is_refused(run, sheep):
    meta = json.loads((sheep / 'meta.json').read_text())
    meta['val']['highest'] = 70_000
    (sheep / 'meta.json').write_text(json.dumps(meta))
    assert 'val.bin has the id 70,000, the vocabulary 257' in train(run, code=1).err


def test_checksums_are_compared_on_request(run, sheep):
    train(run, '--verify_data', '--eval_only')
    tokens = np.fromfile(sheep / 'train.bin', dtype=np.uint16)
    tokens[len(tokens) // 2] ^= 1
    tokens.tofile(sheep / 'train.bin')
    train(run, '--eval_only')
    assert 'the checksum of train.bin is not the one in meta.json' in train(run, '--verify_data', code=1).err


def test_nanogpts_files_train_as_ours_of_the_same_text(run, tmp_path):
    (tmp_path / 'x.txt').write_text(TEXT * 2)
    assert run('prepare.py', '--input=x.txt', '--tokenizer=gpt2', '--name=ours').code == 0
    # What nanoGPT's data/shakespeare/prepare.py does: nine tenths of the characters, uint16, nothing else.
    encoding, folder = tiktoken.get_encoding('gpt2'), tmp_path / 'data' / 'theirs'
    folder.mkdir()
    cut = int(len(TEXT * 2) * 0.9)
    for name, part in {'train': (TEXT * 2)[:cut], 'val': (TEXT * 2)[cut:]}.items():
        np.array(encoding.encode_ordinary(part), dtype=np.uint16).tofile(folder / f'{name}.bin')
    flags = ['--block_size=16', '--batch_size=2', '--n_layer=1', '--max_iters=200', '--log_interval=1']
    for name in ('ours', 'theirs'):
        result = run('train.py', *TINY, *flags, f'--dataset={name}', f'--out_dir={name}', '--eval_interval=100')
        assert result.code == 0, result.err
    assert "data/theirs has no meta.json: taken as nanoGPT's, uint16 tokens of GPT-2." in result.out
    for key in ('loss', 'val_loss', 'bits_per_byte'):
        curve = losses(tmp_path / 'theirs', key)
        assert curve == losses(tmp_path / 'ours', key) and len(curve) == (200 if key == 'loss' else 3)
    assert curve[200] < 0.7 * curve[0]
    metas = [json.loads((tmp_path / 'data' / name / 'meta.json').read_text()) for name in ('ours', 'theirs')]
    documents = [meta[split].pop('documents') for meta in metas for split in ('train', 'val')]
    assert documents == [1, 1, 0, 0], 'no end-of-text counts theirs'
    assert metas[0] | {'source': ['nanoGPT']} == metas[1]
    assert not list(folder.glob('.*'))


def test_nanogpts_files_are_taken_over_after_a_kill_and_only_if_they_are_what_they_must_be(run, tmp_path):
    folder = tmp_path / 'data' / 'sheep'
    folder.mkdir(parents=True)
    ids = np.arange(1000, dtype=np.uint16)
    for split in ('train', 'val'):
        ids.tofile(folder / f'{split}.bin')
    train(run, '--eval_only')
    (folder / 'meta.json').unlink()  # killed just before it was there
    train(run, '--eval_only')
    for spoil in (b'', b'abc', np.array([60_000], np.uint16).tobytes(), np.array([50_256], np.uint16).tobytes()):
        (folder / 'meta.json').unlink()
        (folder / 'val.bin').write_bytes(spoil)
        assert "data/sheep/val.bin does not hold GPT-2's tokens, 16 bits each" in train(run, '--eval_only', code=1).err
        (folder / 'meta.json').touch()
    (folder / 'meta.json').unlink()
    ids.tofile(folder / 'val.bin')
    tokenizer.save(tokenizer.build('byte'), folder)
    assert "its tokenizer is not GPT-2's" in train(run, '--eval_only', code=1).err


def test_nanogpts_characters_are_to_be_prepared_again(run, sheep):
    for name in ('meta.json', 'tokenizer.json'):
        (sheep / name).unlink()
    (sheep / 'meta.pkl').touch()
    assert "data/sheep has nanoGPT's meta.pkl, which is not read." in train(run, code=1).err


def test_overlapping_windows_weigh_every_target_of_a_step_alike(run, sheep, tmp_path):
    flags = ['--stride=8', '--learning_rate=0.0', '--weight_decay=0.0', '--log_interval=1', '--max_iters=4']
    result = train(run, *flags, '--batch_size=600', '--seed=3')
    data, model = Dataset('sheep', tmp_path / 'data'), result.globals['model'].eval()
    n = count_windows(data.train, 32, 8)
    assert n > 4 * count_windows(data.train, 32) - 8
    for step, logged in losses(tmp_path / 'out', 'loss').items():
        order = training_order(np.arange(600 * (step - 1), 600 * step), n, seed=3)
        assert logged == pytest.approx(model(*windows(data.train, 32, order, 8)).item(), rel=1e-5)
    assert 'steps   4, each 600 x 1 x 32 = 19,200 tokens' in result.out
    assert 'stride=33: must be from 1 to 32' in train(run, '--stride=33', out='other', code=1).err


def test_bfloat16_is_used_where_asked_for(run, sheep, tmp_path):
    for dtype in ('float32', 'bfloat16'):
        train(run, '--max_iters=3', '--log_interval=1', f'--dtype={dtype}', out=dtype)
    a, b = (list(losses(tmp_path / out, 'loss').values()) for out in ('float32', 'bfloat16'))
    assert a != b and a == pytest.approx(b, abs=0.05)


def test_dropout_is_in_attention_in_blocks_and_in_the_embedding():
    from torch.nn import functional as F

    from model import GPTConfig

    model = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=32, dropout=0.5))
    idx, calls = torch.randint(0, 64, (2, 16)), []
    attention = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, 'scaled_dot_product_attention', lambda *a, **k: calls.append(a[4]) or attention(*a, **k))
        for module in (model.drop, model.blocks[0].drop):
            module.register_forward_hook(lambda *_: calls.append('dropout'))
        model(idx)
        assert calls == ['dropout', 0.5, 'dropout', 'dropout']
        calls.clear()
        assert torch.equal(model.eval()(idx), model(idx)) and 0.0 in calls


def test_the_printed_speed_is_tokens_over_seconds(run, sheep, tmp_path, monkeypatch):
    import time

    clock = iter(range(10**6))
    monkeypatch.setattr(time, 'perf_counter', lambda: 2.0 * next(clock))  # each look at the clock is 2 s later
    train(run, '--max_iters=4', '--log_interval=2', '--eval_interval=100', '--gradient_accumulation_steps=3')
    assert losses(tmp_path / 'out', 'tokens_per_second')[4] == round(2 * 3 * 4 * 32 / 2)


@pytest.mark.parametrize(('seconds', 'ended'), [(0.0, []), (2.0, [130])])
def test_a_second_ctrl_c_ends_the_process_one_passed_on_twice_does_not(run, sheep, monkeypatch, seconds, ended):
    import time

    steps, exits, clock, real = [], [], iter([100.0, 100.0 + seconds, 100.0 + seconds]), time.monotonic

    def step(*args, **kwargs):
        if not steps:
            monkeypatch.setattr(time, 'monotonic', lambda: next(clock))
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(time, 'monotonic', real)
        steps.append(1)

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    monkeypatch.setattr(os, '_exit', exits.append)
    train(run, '--max_iters=3', code=130)
    assert exits == ended and len(steps) == 1


def test_a_run_is_not_overwritten_and_not_resumed_as_something_else(run, sheep, tmp_path):
    train(run, '--max_iters=2')
    before = {path: path.read_bytes() for path in (tmp_path / 'out').rglob('*') if path.is_file()}
    assert 'out holds a run' in train(run, '--max_iters=2', code=1).err
    wrong = train(run, '--max_iters=3', '--init_from=resume', '--n_layer=1', code=1)
    assert 'has n_layer=2' in wrong.err and 'train.py out/config.py --init_from=resume' in wrong.err
    assert before == {path: path.read_bytes() for path in (tmp_path / 'out').rglob('*') if path.is_file()}


def test_fine_tuning_starts_from_a_models_weights_and_shape(run, sheep, tmp_path):
    train(run, '--max_iters=60', '--learning_rate=1e-2', '--arch=qwen3', '--n_kv_head=1', out='base')
    base = losses(tmp_path / 'base')[60]
    model = f'--init_from={tmp_path / "base" / "step_00000060"}'
    result = run('train.py', model, '--dataset=sheep', '--block_size=32', '--max_iters=3', '--out_dir=tuned')
    assert result.code == 0, result.err
    assert losses(tmp_path / 'tuned')[0] == pytest.approx(base, abs=1e-6)
    assert run('train.py', 'tuned/config.py', '--max_iters=4', '--init_from=resume').code == 0
    assert run('train.py', 'tuned/config.py', '--max_iters=0', '--out_dir=again').code == 0
    assert losses(tmp_path / 'again')[0] == losses(tmp_path / 'tuned')[0], 'from the model again'
    assert 'block_size=64 is more than the 32 of' in train(run, model, '--block_size=64', code=1).err
    (tmp_path / 'goats.txt').write_text(TEXT)
    assert run('prepare.py', '--input=goats.txt', '--tokenizer=char').code == 0
    wrong = run('train.py', model, '--dataset=goats', '--block_size=32', '--max_iters=1')
    assert wrong.code == 1 and 'has a vocabulary of 257 tokens, data/goats another one of 31' in wrong.err
    assert run('prepare.py', '--input=goats.txt', '--tokenizer=base/step_00000060').code == 0
    assert run('train.py', model, '--dataset=goats', '--block_size=32', '--max_iters=1').code == 0


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_fine_tuning_with_frozen_blocks_trains_the_others_and_resumes(run, sheep, tmp_path, optimizer):
    train(run, '--max_iters=1', out='base')
    flags = ['--init_from=base/step_00000001', '--freeze=1', f'--optimizer={optimizer}', '--lr_decay_iters=6']
    train(run, *flags, '--max_iters=6', out='whole')
    train(run, *flags, '--max_iters=3', out='halves')
    train(run, *flags[1:], '--max_iters=6', '--init_from=resume', out='halves')
    folders = ('base/step_00000001', 'whole/step_00000006', 'halves/step_00000006')
    before, after, resumed = (load_file(tmp_path / folder / 'model.safetensors') for folder in folders)
    assert same(after, resumed)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if '.h.1.' in name or '.ln_f.' in name}
    refused = train(run, *flags, '--freeze=3', '--max_iters=1', code=1, out='no')
    assert 'freeze=3 must be from 0 to 2' in refused.err and not (tmp_path / 'no').exists()


def test_a_dataset_that_does_not_match_its_meta_is_refused(run, sheep):
    with open(sheep / 'train.bin', 'ab') as file:
        file.write(b'\0\0')
    result = train(run, code=1)
    assert 'data/sheep is damaged, make it again with: python prepare.py' in result.err


def test_wsd_is_warmup_then_constant_then_straight_down(run, sheep, tmp_path):
    flags = ['--schedule=wsd', '--cooldown=0.5', '--warmup_iters=2', '--max_iters=12', '--learning_rate=1e-2']
    train(run, *flags, '--optimizer=muon', '--log_interval=1')
    falling = [0.01 * (10 - i) / 5 for i in range(6, 10)]
    expected = [0.01 / 3, 0.02 / 3, *[0.01] * 6, *falling]
    assert list(losses(tmp_path / 'out', 'lr').values()) == pytest.approx(expected)


def test_muon_falls_by_the_same_share(run, sheep):
    flags = ['--optimizer=muon', '--muon_lr=0.04', '--learning_rate=1e-2', '--min_lr=5e-3', '--lr_decay_iters=2']
    adamw, muon = train(run, *flags, '--max_iters=6').globals['optimizers']
    assert [group['lr'] for group in adamw.param_groups] == pytest.approx([5e-3] * len(adamw.param_groups))
    assert [group['lr'] for group in muon.param_groups] == pytest.approx([0.02] * len(muon.param_groups))


@pytest.mark.parametrize(('name', 'known'), [('optimizer', 'adamw, muon'), ('schedule', 'cosine, wsd')])
def test_a_misspelt_choice_names_what_there_is(run, sheep, name, known):
    assert f"{name}='other' must be one of: {known}." in train(run, f'--{name}=other', code=1).err


def test_a_run_does_not_go_on_with_another_optimizer(run, sheep):
    train(run, '--max_iters=2')
    result = train(run, '--max_iters=3', '--init_from=resume', '--optimizer=muon', code=1)
    assert "was trained with optimizer='adamw': it takes no other." in result.err


@pytest.mark.parametrize('what', ['a loss in chunks', pytest.param('compilation', marks=pytest.mark.slow)])
def test_what_is_for_speed_does_not_change_where_a_run_ends(run, sheep, tmp_path, monkeypatch, what):
    for seed in (1, 2, 3):
        flags = ['--max_iters=30', f'--seed={seed}', '--arch=qwen3', '--optimizer=muon', '--eval_interval=30']
        train(run, *flags, out=f'plain{seed}')
        if what == 'compilation':
            train(run, *flags, '--compile', out=f'fast{seed}')
        else:
            with monkeypatch.context() as context:
                context.setattr(model_module, 'CHUNK', 10_000)
                train(run, *flags, out=f'fast{seed}')
        ends = [losses(tmp_path / f'{name}{seed}')[30] for name in ('plain', 'fast')]
        assert ends[0] == pytest.approx(ends[1], abs=1e-4) and ends[0] < 5.4

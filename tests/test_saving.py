"""A thread saves while the training goes on: what it writes, when, and what becomes of errors.

What is written is the state at the step of the save. Saves do not overlap, errors surface, the last
one is complete before the process ends. Weights in shards are as good as weights in one file.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, command, in_ranks, losses, records, same, train, weights
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from test_durability import damaged_files, flip_a_bit, names, optimizer_state
from transformers import AutoModelForCausalLM

import checkpoint
import model as model_module
import parallel
from model import GPT

QWEN = ['--arch=qwen3', '--n_kv_head=1']
TIMES = ('tokens_per_second', 'train_seconds', 'tflops', 'gib')


@pytest.fixture(autouse=True)
def nothing_left():
    """No test leaves a save to the next one."""
    yield
    if checkpoint._save is not None:
        checkpoint._save.exception()
        checkpoint._save = None


@pytest.fixture
def steps_taken(monkeypatch):
    """A list that grows by one with each step of training."""
    taken = []
    real = torch.optim.AdamW.step

    def step(*args, **options):
        result = real(*args, **options)
        taken.append(time.monotonic())
        return result

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    return taken


def before_writing(monkeypatch, action):
    """Call action(step, is_weights_only) in the thread, before it writes anything."""
    real = checkpoint.write_files

    def write_files(folder, model, tokenizer, meta, state):
        action(meta['step'], state is None)
        real(folder, model, tokenizer, meta, state)

    monkeypatch.setattr(checkpoint, 'write_files', write_files)


def end_at_once(monkeypatch):
    """Have each save end before the next step, so that a test knows when it is looked at."""
    real = checkpoint.start_save

    def start_save(*args):
        real(*args)
        checkpoint._save.exception()  # waits

    monkeypatch.setattr(checkpoint, 'start_save', start_save)


def train_state(out, step):
    """All that a train_state.pt holds, but for the time, which no two runs share."""
    path = out / f'step_{step:08d}' / 'train_state.pt'
    state = torch.load(path, weights_only=True)
    del state['progress']['train_seconds']
    return state


def without_times(out):
    """The log of a run, without what depends on the clock."""
    return [record | dict.fromkeys(TIMES) for record in records(out)]


def leftovers(out):
    """What is there of saves that have not ended."""
    return list(out.glob('.[sw]*_*'))


# -----------------------------------------------------------------------------
# the state at the step of the save


@pytest.mark.parametrize(
    'flags', [[], [*QWEN, '--optimizer=muon'], ['--dtype=float16']], ids=['adamw', 'muon', 'scaler']
)
def test_what_is_saved_is_the_state_of_its_step(
    run, sheep, tmp_path, monkeypatch, steps_taken, flags
):
    flags = [*flags, '--max_iters=15', '--eval_interval=5', '--log_interval=1', '--keep_last=9']
    flags += ['--learning_rate=1e-2', '--dropout=0.1']
    written_after = {}

    def wait_for_four_steps(step, is_weights_only):
        deadline = time.monotonic() + 30
        while len(steps_taken) < min(step + 4, 15) and time.monotonic() < deadline:
            time.sleep(0.001)
        written_after[step] = len(steps_taken)

    with monkeypatch.context() as patch:
        before_writing(patch, wait_for_four_steps)
        train(run, *flags, out='late')
    assert written_after[5] >= 9 and written_after[10] >= 14, 'the training went on'

    end_at_once(monkeypatch)
    train(run, *flags, out='waiting')
    for step in (5, 10, 15):
        assert same(weights(tmp_path / 'late', step), weights(tmp_path / 'waiting', step))
        ours = train_state(tmp_path / 'late', step)
        assert ours['progress']['step'] == step
        assert same(ours, train_state(tmp_path / 'waiting', step))
    assert without_times(tmp_path / 'late') == without_times(tmp_path / 'waiting')


def test_weights_alone_are_those_of_their_step_too(
    run, sheep, tmp_path, monkeypatch, steps_taken
):
    def wait_for_a_step(step, is_weights_only):
        deadline = time.monotonic() + 30
        while is_weights_only and len(steps_taken) < step + 1 and time.monotonic() < deadline:
            time.sleep(0.001)

    before_writing(monkeypatch, wait_for_a_step)
    flags = ['--max_iters=9', '--eval_interval=2', '--keep_last=9', '--learning_rate=1e-2']
    train(run, *flags, '--save_weights_interval=4')
    for step in (4, 8):
        path = tmp_path / 'out' / f'weights_{step:08d}' / 'model.safetensors'
        assert same(load(path.read_bytes()), weights(tmp_path / 'out', step))


def test_the_thread_that_saves_has_no_helpers():
    # In a process of its own, where the thread has not been started. torch fixes the number of a
    # thread when that first asks, as train.py does when it prints the device.
    code = 'import torch, checkpoint; torch.set_num_threads(2); count = torch.get_num_threads\n'
    code += 'print(count(), checkpoint._writer.submit(count).result(), count())'
    printed = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert printed.stdout.split() == ['2', '1', '2'], 'as many for the training as before'


def test_a_copy_shares_no_memory_with_what_is_trained():
    torch.manual_seed(0)
    shape = {'vocab_size': 60, 'n_layer': 1, 'n_head': 2, 'n_embd': 32, 'block_size': 8}
    model = GPT(model_module.GPTConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    idx = torch.arange(8)[None]
    model(idx, idx).backward()
    optimizer.step()
    full_model, state = parallel.copy_to_cpu(model, [optimizer])
    copies = {p.untyped_storage().data_ptr() for p in full_model.parameters()}
    copies |= {t.untyped_storage().data_ptr() for each in state.values() for t in each.values()}
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() not in copies, name
        assert same(full_model.get_parameter(name), parameter)
        assert same(state[name], dict(optimizer.state[parameter]))
        for tensor in optimizer.state[parameter].values():
            assert tensor.untyped_storage().data_ptr() not in copies, name


# -----------------------------------------------------------------------------
# one at a time


def test_a_save_waits_for_the_one_before_it(run, sheep, tmp_path, monkeypatch, steps_taken):
    """So that there is one copy of what is trained, not two."""
    events = []

    def slow(step, is_weights_only):
        events.append(('writes', step))
        time.sleep(0.1)

    real_publish = checkpoint.publish

    def publish(temporary, path):
        real_publish(temporary, path)
        events.append(('written', int(path.name[-8:])))

    real_copy = parallel.copy_to_cpu

    def copy_to_cpu(*args):
        events.append(('copies', len(steps_taken)))
        return real_copy(*args)

    before_writing(monkeypatch, slow)
    monkeypatch.setattr(checkpoint, 'publish', publish)
    monkeypatch.setattr(parallel, 'copy_to_cpu', copy_to_cpu)
    train(run, '--max_iters=5', '--eval_interval=1', '--keep_last=9')
    expected = []
    for step in range(1, 6):
        expected += [('copies', step), ('writes', step), ('written', step)]
    assert events == expected
    assert len(checkpoint.checkpoints(tmp_path / 'out')) == 5


# -----------------------------------------------------------------------------
# errors

FULL = OSError(28, 'No space left on device')


@pytest.mark.parametrize(
    ('error', 'where'),
    [
        (FULL, 'tokenizers.save'),
        (SafetensorError('Error while serializing: I/O error: No space left on device'), 'model'),
        (RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos'), 'torch.save'),
    ],
    ids=['ours', 'safetensors', 'torch'],
)
def test_a_full_disk_is_said_at_the_next_step(
    run, sheep, tmp_path, monkeypatch, steps_taken, error, where
):
    end_at_once(monkeypatch)

    def failing(real):
        def call(*args, **options):
            is_progress = where == 'torch.save' and 'optimizer' not in args[0]
            if len(steps_taken) == 2 and not is_progress:
                raise error
            return real(*args, **options)

        return call

    target, name = {
        'tokenizers.save': (checkpoint.tokenizers, 'save'),
        'model': (model_module, 'save_file'),
        'torch.save': (torch, 'save'),
    }[where]
    monkeypatch.setattr(target, name, failing(getattr(target, name)))
    result = train(run, '--max_iters=6', '--eval_interval=2', '--keep_last=9')
    message = str(error).splitlines()[0]
    line = f'step      3  NOT SAVED: out/step_00000002 could not be saved: {message}'
    assert [row for row in result.out.splitlines() if 'NOT SAVED' in row] == [line]
    assert result.err == ''
    kept = names(checkpoint.checkpoints(tmp_path / 'out'))
    assert kept == ['step_00000004', 'step_00000006']
    assert not leftovers(tmp_path / 'out')
    assert list(losses(tmp_path / 'out')) == [0, 2, 4, 6]


def test_a_full_disk_at_the_end_is_one_sentence(run, sheep, tmp_path, monkeypatch):
    def fail(step, is_weights_only):
        if step == 4:
            raise FULL

    before_writing(monkeypatch, fail)
    result = train(run, '--max_iters=4', '--eval_interval=2', code=1)
    assert result.is_one_sentence
    assert result.err.startswith('out/step_00000004 could not be saved: ')
    assert result.err.endswith('What was saved before is intact.\n')
    assert names(checkpoint.checkpoints(tmp_path / 'out')) == ['step_00000002']


def test_a_bug_in_a_save_ends_the_run(run, sheep, tmp_path, monkeypatch, steps_taken):
    def fail(step, is_weights_only):
        raise KeyError('mine')

    end_at_once(monkeypatch)
    before_writing(monkeypatch, fail)
    result = train(run, '--max_iters=9', '--eval_interval=2', code=1)
    assert result.has_traceback
    assert result.err.endswith("KeyError: 'mine'\n")
    assert len(steps_taken) == 3, 'at the step after the save'
    assert not checkpoint.checkpoints(tmp_path / 'out')


@pytest.mark.parametrize('last', [9, 2])
def test_weights_that_are_not_finite_end_the_run(
    run, sheep, tmp_path, monkeypatch, steps_taken, last
):
    """At the next step, or at once where there is none."""
    real = parallel.copy_to_cpu

    def copy_to_cpu(*args):
        full_model, state = real(*args)
        full_model.blocks[0].mlp.fc.weight.data[3, 4] = float('inf')
        return full_model, state

    end_at_once(monkeypatch)
    monkeypatch.setattr(parallel, 'copy_to_cpu', copy_to_cpu)
    result = train(run, f'--max_iters={last}', '--eval_interval=2', code=1)
    assert result.is_one_sentence, result.err
    assert result.err.startswith('The weights are not finite at step 2: nothing is saved. out has')
    assert len(steps_taken) == min(last, 3)
    assert not checkpoint.checkpoints(tmp_path / 'out')
    assert not leftovers(tmp_path / 'out')


# -----------------------------------------------------------------------------
# the end of the process

# train.py, whose saves take long; SIGNAL_AT: raise SIGTERM in this step, in process 0.
SLOW = """
import os, runpy, signal, sys, time
sys.path.insert(0, {root!r})
import checkpoint, torch
write_files, step = checkpoint.write_files, torch.optim.AdamW.step
steps = iter(range(1, 10**6))

def slow(*args):
    time.sleep(0.5)
    write_files(*args)

def signalled(*args, **options):
    if next(steps) == int(os.environ['SIGNAL_AT']) and os.environ.get('RANK', '0') == '0':
        signal.raise_signal(signal.SIGTERM)
    return step(*args, **options)

checkpoint.write_files = slow
torch.optim.AdamW.step = signalled
runpy.run_path({script!r}, run_name='__main__')
"""


@pytest.mark.parametrize(
    ('processes', 'how'),
    [
        (1, 'signal'),
        (2, 'end'),
        pytest.param(2, 'signal', marks=pytest.mark.slow),
        pytest.param(1, 'end', marks=pytest.mark.slow),
    ],
)
def test_the_last_saves_are_complete_at_the_end(sheep, tmp_path, processes, how):
    script = SLOW.format(root=str(ROOT), script=str(ROOT / 'train.py'))
    (tmp_path / 'slow.py').write_text(script)
    line = ['slow.py', '--dataset=sheep', *TINY, '--gradient_accumulation_steps=2']
    line += ['--eval_interval=100', '--save_weights_interval=1']
    if how == 'signal':
        line += ['--max_iters=100']
        signal_at = '1'
        expected = processes  # the number of steps: with several, all stop one later
    else:
        line += ['--max_iters=1']
        signal_at = '0'
        expected = 1
    options = {'cwd': tmp_path, 'env': os.environ | {'SIGNAL_AT': signal_at}}
    if processes == 1:
        line[0] = tmp_path / line[0]
        result = command(*line, **options)
    else:
        result = in_ranks(processes, tmp_path / line[0], *line[1:], **options)
    assert (result.returncode == 0) == (how == 'end'), result.stderr
    out = tmp_path / 'out'
    saved = f'{expected:08d}'
    assert names(checkpoint.checkpoints(out)) == [f'step_{saved}'], result.stderr
    assert names(checkpoint.checkpoints(out, 'weights'))[-1] == f'weights_{saved}'
    assert not leftovers(out)
    assert not damaged_files(out)
    tensors = load((out / f'weights_{saved}' / 'model.safetensors').read_bytes())
    assert same(tensors, weights(out, expected))


# -----------------------------------------------------------------------------
# weights in shards


@pytest.fixture
def small_files(monkeypatch):
    """Let no file have more than 40,000 bytes of weights, of about 110,000."""
    monkeypatch.setattr(model_module, 'MAX_FILE', 40_000)


def shard_paths(folder):
    return sorted(folder.glob('model-*.safetensors'))


def all_weights(folder):
    """The weights of a checkpoint, be they in one file or in shards."""
    tensors = {}
    for path in folder.glob('model*.safetensors'):
        tensors.update(load(path.read_bytes()))
    return tensors


@pytest.mark.parametrize('flags', [[], pytest.param(QWEN, marks=pytest.mark.slow)])
def test_large_weights_become_shards_that_open_anywhere(
    run, sheep, tmp_path, monkeypatch, flags
):
    train(run, '--max_iters=4', *flags, out='whole')
    monkeypatch.setattr(model_module, 'MAX_FILE', 40_000)
    train(run, '--max_iters=4', *flags)
    folder = tmp_path / 'out' / 'step_00000004'
    shards = shard_paths(folder)
    assert len(shards) > 2
    assert not (folder / 'model.safetensors').exists()
    assert all(path.stat().st_size < 45_000 for path in shards)
    written = set(checkpoint.read_meta(folder)['files'])
    assert {path.name for path in shards} | {'model.safetensors.index.json'} < written
    assert same(all_weights(folder), weights(tmp_path / 'whole', 4))

    ours = GPT.from_pretrained(folder).eval()
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    idx = torch.arange(20)[None]
    with torch.no_grad():
        logits = ours(idx)[..., : ours.config.vocab_size]
        assert torch.allclose(logits, theirs(idx).logits, atol=1e-5)
    whole = GPT.from_pretrained(tmp_path / 'whole' / 'step_00000004')
    assert same(ours.state_dict(), whole.state_dict())

    texts = []
    for out in ('out', 'whole'):
        sampled = run('sample.py', f'--out_dir={out}', '--start=12', '--max_new_tokens=20')
        evaluated = run('evaluate.py', f'--init_from={out}/step_00000004', '--dataset=sheep')
        assert sampled.code == evaluated.code == 0, sampled.err + evaluated.err
        texts.append((sampled.out, evaluated.out.replace(out, '')))
    assert texts[0] == texts[1]


def test_a_run_resumes_from_shards_to_the_same_weights(run, sheep, tmp_path, monkeypatch):
    flags = ['--eval_interval=3', '--lr_decay_iters=6']
    train(run, *flags, '--max_iters=6', out='whole')
    with monkeypatch.context() as patch:
        patch.setattr(model_module, 'MAX_FILE', 40_000)
        train(run, *flags, '--max_iters=3')
    resumed = train(run, *flags, '--max_iters=6', '--init_from=resume')
    assert 'out/step_00000003, step 3' in resumed.out
    assert same(weights(tmp_path / 'out', 6), weights(tmp_path / 'whole', 6))
    assert same(train_state(tmp_path / 'out', 6), train_state(tmp_path / 'whole', 6))


@pytest.mark.parametrize('damage', ['missing', 'damaged', 'index'])
def test_a_shard_that_is_lost_is_one_sentence(
    run, sheep, tmp_path, small_files, capsys, damage
):
    out = tmp_path / 'out'
    train(run, '--max_iters=4', '--eval_interval=2')
    path = shard_paths(out / 'step_00000004')[1]
    if damage == 'missing':
        path.unlink()
    elif damage == 'damaged':
        flip_a_bit(path)
    else:
        path = out / 'step_00000004' / 'model.safetensors.index.json'
        path.unlink()
    assert checkpoint.find('out', 'last').name == 'step_00000002'
    said = capsys.readouterr().err
    assert said.startswith(f'The checkpoint out/step_00000004 is damaged: its {path.name} is ')
    assert said.endswith(': it is skipped.\n') and said.count('\n') == 1

    resumed = train(run, '--max_iters=3', '--init_from=resume')
    assert 'out/step_00000002, step 2' in resumed.out
    assert resumed.err == said
    if damage != 'damaged':  # a flipped bit is a weight like any other, without a checksum
        model_folder = out / 'damaged_step_00000004'
        result = run('sample.py', f'--init_from={model_folder}', '--max_new_tokens=3')
        assert result.is_one_sentence, result.err
        assert 'damaged_step_00000004' in result.err


def test_a_shard_that_ends_early_is_one_sentence(run, sheep, tmp_path, small_files):
    train(run, '--max_iters=2')
    folder = tmp_path / 'out' / 'step_00000002'
    path = shard_paths(folder)[-1]
    path.write_bytes(path.read_bytes()[:-100])
    result = run('sample.py', f'--init_from={folder}', '--max_new_tokens=3')
    assert result.is_one_sentence, result.err
    assert f'{path.name} is damaged or incomplete' in result.err


def test_a_shard_of_another_model_does_not_fit(run, sheep, tmp_path, small_files):
    train(run, '--max_iters=2')
    folder = tmp_path / 'out' / 'step_00000002'
    path = shard_paths(folder)[0]
    tensors = {name: tensor[:1].clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    result = run('sample.py', f'--init_from={folder}', '--max_new_tokens=3')
    assert result.is_one_sentence, result.err
    assert 'do not fit' in result.err


# -----------------------------------------------------------------------------
# resuming from a file that is mapped


@pytest.mark.parametrize('flags', [[], [*QWEN, '--optimizer=muon']], ids=['adamw', 'muon'])
def test_a_run_outlives_the_file_it_resumed_from(run, sheep, tmp_path, monkeypatch, flags):
    flags = [*flags, '--eval_interval=3', '--keep_last=1', '--lr_decay_iters=9']
    flags += ['--learning_rate=1e-2']
    train(run, *flags, '--max_iters=9', out='whole')
    train(run, *flags, '--max_iters=3')
    resumed_from = tmp_path / 'out' / 'step_00000003'
    is_mapped = []
    real = torch.load

    def remember(file, *args, **options):
        if 'train_state' in str(file):
            is_mapped.append(options.get('mmap'))
        return real(file, *args, **options)

    monkeypatch.setattr(torch, 'load', remember)
    train(run, *flags, '--max_iters=9', '--init_from=resume')
    assert is_mapped == [True], 'all processes of a machine share its pages'
    assert not resumed_from.exists()
    assert same(weights(tmp_path / 'out', 9), weights(tmp_path / 'whole', 9))
    assert same(train_state(tmp_path / 'out', 9), train_state(tmp_path / 'whole', 9))


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_nothing_of_the_file_is_used_after_the_start(
    run, sheep, tmp_path, monkeypatch, optimizer
):
    """What is not copied would follow a file that somebody writes over."""
    flags = [f'--optimizer={optimizer}', '--lr_decay_iters=6', '--learning_rate=1e-2']
    train(run, *flags, '--max_iters=6', out='whole')
    train(run, *flags, '--max_iters=3')
    files = [*(tmp_path / 'out' / 'step_00000003').iterdir()]
    real = parallel.sync_gradients

    def write_over_them(*args):
        while files:
            path = files.pop()
            with open(path, 'r+b') as file:
                file.write(b'\0' * path.stat().st_size)
        real(*args)

    monkeypatch.setattr(parallel, 'sync_gradients', write_over_them)
    train(run, *flags, '--max_iters=6', '--init_from=resume')
    assert not files
    assert same(weights(tmp_path / 'out', 6), weights(tmp_path / 'whole', 6))
    assert same(optimizer_state(tmp_path / 'out', 6), optimizer_state(tmp_path / 'whole', 6))


# -----------------------------------------------------------------------------
# killed


def newest_save(out):
    """The name of the newest save that has begun and not ended, or ''."""
    begun = [path.name for path in out.glob('.step_*.tmp')]
    return max(begun, default='')


def wait_for_saves(process, out, n):
    """Wait until a process has begun n saves. An old checkpoint that is deleted is no save."""
    last = newest_save(out)  # of a process that was killed
    deadline = time.monotonic() + 60
    while n > 0 and process.poll() is None and time.monotonic() < deadline:
        newest = newest_save(out)
        kept = names(checkpoint.checkpoints(out))[-1:]
        if newest > max([last, *(f'.{name}.tmp' for name in kept)]):
            last = newest
            n -= 1
        time.sleep(0.001)


def train_and_time_saves(line, cwd, out):
    """Run to the end. Returns the median seconds from the beginning of a save to its rename."""
    process = subprocess.Popen(line, cwd=cwd, stdout=subprocess.DEVNULL)
    seconds = []
    while process.poll() is None:
        wait_for_saves(process, out, 1)
        begin = time.monotonic()
        name = newest_save(out)
        while (out / name).exists() and process.poll() is None:
            time.sleep(0.001)
        seconds.append(time.monotonic() - begin)
    assert process.returncode == 0
    return statistics.median(seconds)


@pytest.mark.slow  # some minutes
def test_killed_in_fifty_saves_it_resumes_to_the_same(sheep, tmp_path):
    """SIGKILL at a random instant of a save, from its first file to beyond its rename."""
    steps = 600
    flags = ['--dataset=sheep', *TINY, '--n_embd=256', '--dropout=0.1', f'--max_iters={steps}']
    flags += ['--eval_interval=5', '--log_interval=1', '--init_from=auto']
    line = [sys.executable, str(ROOT / 'train.py'), *flags]
    killed = tmp_path / 'killed'
    whole = tmp_path / 'whole'
    save_seconds = train_and_time_saves([*line, '--out_dir=whole'], tmp_path, whole)
    chance = random.Random(0)
    outcomes = {'before its rename': 0, 'after': 0}
    for _ in range(50):
        process = subprocess.Popen(
            [*line, '--out_dir=killed'],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        wait_for_saves(process, killed, chance.randint(1, 2))
        name = newest_save(killed)
        time.sleep(chance.uniform(0, 2 * save_seconds))
        process.kill()
        process.wait()
        err = process.stderr.read().decode()
        process.stderr.close()
        assert process.returncode == -signal.SIGKILL, err
        assert err == ''
        assert not damaged_files(killed)
        is_unfinished = name and (killed / name).exists()
        outcomes['before its rename' if is_unfinished else 'after'] += 1
    reached = checkpoint.checkpoints(killed)[-1].name
    print(f'\na save takes {save_seconds:.3f} s; killed in 50 saves, {outcomes}, at {reached}')
    assert reached < f'step_{steps:08d}'
    assert min(outcomes.values()) >= 5

    result = command('train.py', *flags, '--out_dir=killed', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    assert same(weights(whole, steps), weights(killed, steps))
    assert same(train_state(whole, steps), train_state(killed, steps))
    assert without_times(killed) == without_times(whole)

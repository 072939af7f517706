"""On a real GPU: CUDA computes what the CPU does, and is not waited for.

Skipped where torch finds no CUDA. `python bench.py gpu` is how fast it is.
"""

import re
import warnings

import pytest
import torch
from conftest import in_ranks, losses, train

import optim
import plan
import runtime
from model import GPT, GPTConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='torch finds no CUDA')

ON_GPU = ['--device=cuda', '--compile=False']
ARCHITECTURES = ['gpt2', 'llama', 'qwen2', 'qwen3']
# Long enough for several blocks of an attention kernel.
LONG = ['--block_size=512', '--n_embd=64', '--batch_size=4', '--eval_interval=10']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_a_gpu_learns_what_the_cpu_learns(run, sheep, tmp_path, arch, optimizer, dtype):
    flags = [f'--arch={arch}', f'--optimizer={optimizer}', '--max_iters=40', '--eval_interval=20']
    flags += ['--learning_rate=5e-3']
    if arch != 'gpt2':
        flags += ['--n_kv_head=1']
    train(run, *flags, out='cpu')
    train(run, *flags, *ON_GPU, f'--dtype={dtype}', out='gpu')
    expected = losses(tmp_path / 'cpu')
    computed = losses(tmp_path / 'gpu')
    assert expected.keys() == computed.keys() == {0, 20, 40}
    assert computed[0] == pytest.approx(expected[0], rel=2e-3)
    assert computed[40] == pytest.approx(expected[40], rel=0.03)
    assert computed[40] < 0.7 * computed[0]


@pytest.mark.parametrize('arch', ARCHITECTURES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_small_step_on_the_gpu_is_trusted(arch, dtype):
    optim.check_device(arch, 'cuda', dtype)


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_run_resumes_to_the_same_but_for_rounding(run, sheep, tmp_path, dtype, compiled):
    """Attention's backward pass adds up in any order."""
    flags = [*LONG, '--optimizer=muon', '--arch=qwen3', f'--dtype={dtype}', '--device=cuda']
    flags += [f'--compile={compiled}', '--dropout=0.1', '--max_iters=20', '--lr_decay_iters=20']
    flags += ['--average_frac=0.2']
    train(run, *flags, out='whole')
    train(run, *flags, '--max_iters=10', out='halves')
    train(run, *flags, '--init_from=resume', out='halves')
    expected = losses(tmp_path / 'whole')
    assert losses(tmp_path / 'halves') == pytest.approx(expected, rel=3e-3)
    assert expected[20] < 0.9 * expected[0], 'it has learned something'


def test_a_compiled_run_is_the_same_but_for_rounding(run, sheep, tmp_path):
    flags = [*LONG, '--arch=qwen3', '--optimizer=muon', '--device=cuda', '--max_iters=20']
    for compiled in (True, False):
        train(run, *flags, '--dtype=bfloat16', f'--compile={compiled}', out=f'{compiled}')
    compiled, eager = (losses(tmp_path / name) for name in ('True', 'False'))
    assert compiled[20] == pytest.approx(eager[20], rel=0.02) and compiled[20] < compiled[0]


def count_waits(function):
    """Return what makes the host wait for the device, one entry for each time."""
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            function()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return [f'{w.filename}:{w.lineno}' for w in caught if 'synchronizing' in str(w.message)]


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
def test_no_step_waits_for_the_device(run, sheep, arch, dtype):
    flags = [*ON_GPU, f'--arch={arch}', f'--dtype={dtype}', '--optimizer=muon', '--log_interval=90']
    flags += ['--eval_interval=90', '--warmup_iters=5', '--gradient_accumulation_steps=2']
    waits = {}
    for n in (10, 30):
        train_n = [*flags, f'--max_iters={n}']
        waits[n] = count_waits(lambda n=n, train_n=train_n: train(run, *train_n, out=f'of-{n}'))
    assert 0 < len(waits[10]) == len(waits[30]), sorted(set(waits[30]))


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_greedy_text_is_that_of_the_cpu(run, sheep, arch):
    train(run, f'--arch={arch}', '--max_iters=60', '--learning_rate=1e-2', '--eval_interval=60')
    flags = ['--start=7 sheep jumped', '--temperature=0', '--num_samples=2', '--dtype=float32']
    flags += ['--max_new_tokens=24']
    expected = run('sample.py', *flags, '--device=cpu')
    computed = run('sample.py', *flags, '--device=cuda')
    compiled = run('sample.py', *flags, '--device=cuda', '--compile=True')
    assert computed.code == compiled.code == 0, computed.err + compiled.err
    assert expected.out == computed.out == compiled.out


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_evaluate_is_that_of_the_cpu(run, sheep, dtype):
    train(run, '--arch=qwen3', '--max_iters=20', '--eval_interval=20')
    figures = {}
    for device in ('cpu', 'cuda'):
        of_device = 'float32' if device == 'cpu' else dtype
        flags = [f'--device={device}', f'--dtype={of_device}', '--format=json']
        result = run('evaluate.py', '--input=sheep.txt', *flags)
        assert result.code == 0, result.err
        figures[device] = re.findall(r'"[^"]*": ([0-9.]+)', result.out)
    expected = [float(figure) for figure in figures['cpu']]
    assert [float(figure) for figure in figures['cuda']] == pytest.approx(expected, rel=3e-3)


@pytest.mark.parametrize(
    'flags',
    [[], ['--fsdp'], ['--fsdp', '--compile=True'], ['--fsdp', '--compile=True', '--optimizer=muon',
     '--activation_checkpointing']],
)  # fmt: skip
def test_nccl_trains_as_one_process_does(run, sheep, tmp_path, flags):
    common = ['--arch=qwen3', '--max_iters=10', '--eval_interval=10', '--device=cuda']
    train(run, *common, '--compile=False', out='one')
    line = ['--dataset=sheep', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32']
    line += ['--batch_size=4', '--gradient_accumulation_steps=1', '--dtype=float32', *common]
    line += ['--out_dir=ranks', '--compile=False', *flags]
    result = in_ranks(1, 'train.py', *line, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    if '--optimizer=muon' not in flags:
        expected = losses(tmp_path / 'one')
        assert losses(tmp_path / 'ranks') == pytest.approx(expected, rel=5e-3)
    line += ['--max_iters=12', '--init_from=resume']
    result = in_ranks(1, 'train.py', *line, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_step_takes_the_memory_of_the_plan(arch, checkpointing):
    shape = GPTConfig(arch, 50257, 1024, n_layer=6, n_head=8, n_embd=512)
    knobs = {
        'batch_size': 8, 'block_size': 1024, 'optimizer': 'muon', 'dtype': 'bfloat16',
        'freeze': None, 'average_frac': None, 'learning_rate': 1e-3, 'beta1': 0.9, 'beta2': 0.95,
        'weight_decay': 0.1, 'muon_lr': 0.02, 'muon_momentum': 0.95, 'muon_beta2': 0.95,
        'grad_clip': 1.0,
    }  # fmt: skip
    planned = plan.dry_run(shape, knobs, checkpointing, 'gpu')['peak']
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = GPT(shape).cuda()
    if checkpointing:
        model.checkpoint_activations()
    optimizers = plan.make_training(model, knobs)
    idx = torch.randint(50257, (8, 1024), device='cuda')
    for _ in range(3):
        for _ in range(2):  # the plan is of a micro-step that finds gradients
            with runtime.make_autocast('cuda', 'bfloat16'):
                loss = model(idx, idx)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated() - before
    print(f'planned {planned / 2**30:.2f} GiB, measured {measured / 2**30:.2f} GiB')
    assert planned == pytest.approx(measured, rel=0.15)

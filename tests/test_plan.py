"""A plan, compared with what a run really takes."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import ROOT, TINY

from model import GPT, PUBLISHED, GPTConfig
from plan import dry_run

BASE = {
    'arch': 'gpt2',
    'n_layer': 1,
    'n_head': 4,
    'n_embd': 32,
    'block_size': 32,
    'batch_size': 1,
    'gradient_accumulation_steps': 1,
    'optimizer': 'adamw',
}
DEEP = BASE | {'n_layer': 6, 'n_embd': 192, 'block_size': 256, 'batch_size': 12}
WIDE = BASE | {'n_layer': 8, 'n_embd': 512, 'block_size': 64}
RUNS = {
    'mostly activations': DEEP,
    'mostly weights': WIDE,
    'recomputed': DEEP
    | {'arch': 'qwen3', 'activation_checkpointing': True, 'gradient_accumulation_steps': 2},
    'muon': WIDE | {'n_layer': 6, 'optimizer': 'muon', 'gradient_accumulation_steps': 2},
    'frozen': WIDE | {'freeze': 6},
}


def peak_memory(folder, name, knobs):
    """Bytes of the whole process while it trains two steps, before it saves and draws."""
    flags = [f'--{name}={value}' for name, value in knobs.items()]
    line = [sys.executable, ROOT / 'train.py', '--dataset=sheep', '--max_iters=2', *flags]
    line += ['--device=cpu', '--dtype=float32', f'--out_dir=out {name}']
    # A low threshold has freed memory given back at once.
    environment = os.environ | {'MALLOC_MMAP_THRESHOLD_': '65536', 'OMP_NUM_THREADS': '1'}
    subprocess.run(
        line, cwd=folder, capture_output=True, timeout=300, env=environment, check=True
    )
    lines = (folder / f'out {name}' / 'log.jsonl').read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return 2**30 * max(record['gib'] for record in records if 'gib' in record)


@pytest.mark.skipif(sys.platform != 'linux', reason='it reads /proc')
def test_planned_memory_is_what_a_run_takes(sheep, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        names = ['nothing', *RUNS]
        knobs = [BASE, *RUNS.values()]
        nothing, *peaks = pool.map(partial(peak_memory, tmp_path), names, knobs)
    for name, peak in zip(RUNS, peaks, strict=True):
        knobs = {'freeze': None, 'activation_checkpointing': False, 'dtype': 'float32'} | RUNS[name]
        fields = ('arch', 'n_layer', 'n_head', 'n_embd', 'block_size')
        shape = GPTConfig(vocab_size=257, **{field: knobs[field] for field in fields})
        planned = dry_run(shape, knobs, knobs['activation_checkpointing'])
        assert sum(planned.values()) == 2 * planned['peak'], 'the peak is the sum of the others'
        assert min(planned.values()) >= 0, (name, planned)
        assert peak - nothing == pytest.approx(planned['peak'], rel=0.15), (name, planned)


def test_the_plan_of_a_published_model_says_what_is_known_of_it(run):
    flags = ['--init_from=gpt2', '--dataset=none', '--plan_gpus=8', '--plan_gpu=A100']
    result = run('train.py', '--plan', *flags)
    assert result.code == 0, result.err
    out = result.out
    assert '124,439,808 parameters' in out
    assert 'data/none is not prepared yet\n' in out, 'without a word of an assumed vocabulary'
    assert '12 x 40 x 1024 = 491,520 tokens: 294,912,000,000' in out
    per_parameter = 294_912_000_000 / 124_439_808
    assert f'{per_parameter:.1f} tokens per parameter (Chinchilla-optimal: about 20)' in out
    flops = 6 * (124_439_808 - 1024 * 768 - 2 * 768) + 12 * 12 * 768 * 1024
    assert f'{flops / 1e9:.3g} GFLOP per token' in out
    hours = 294_912_000_000 * flops / (8 * 312e12 * 0.4) / 3600
    assert f'time    {int(hours)}h' in out
    assert '8 x A100 at 40% of 312 TFLOP/s' in out
    rows = [row for row in out.splitlines() if 'DP' in row]
    peaks = {row[:24].strip(): float(row.split()[-1]) for row in rows}
    assert peaks['FSDP'] < peaks['DDP']
    assert peaks['DDP recomputing'] < peaks['DDP']
    assert all(len(line) <= 80 for line in out.splitlines())


def test_a_plan_without_data_assumes_the_vocabulary_of_gpt2(run):
    result = run('train.py', '--plan', '--dataset=none', *TINY)
    assert result.code == 0, result.err
    assert "data/none is not prepared yet: GPT-2's vocabulary is assumed" in result.out
    with torch.device('meta'):
        model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32))
    assert f'{model.count_parameters():,} parameters' in result.out


def test_a_plan_writes_nothing_and_what_cannot_fit_is_said(sheep, run, tmp_path):
    before = sorted(tmp_path.rglob('*'))
    flags = [*TINY, '--n_embd=512', '--batch_size=60000', '--gradient_accumulation_steps=2']
    flags += ['--plan_gpu=T4', '--plan_gpus=2']
    result = run('train.py', '--plan', '--dataset=sheep', *flags)
    assert result.code == 0
    assert sorted(tmp_path.rglob('*')) == before
    assert 'too much for T4: DDP, FSDP, DDP recomputing, FSDP recomputing' in result.out
    assert 'epochs' in result.out


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--plan_gpu=H1000', "plan_gpu='H1000' must be one of: T4, "),
        (
            '--plan_gpus=3',
            'gradient_accumulation_steps=1 cannot be divided over 3 processes: use 3.',
        ),
        (
            '--batch_size=900000000',
            '28,800,000,000 tokens at once, batch_size x block_size, fit on no device.',
        ),
        ('--plan_gpus=0', 'plan_gpus=0: must be from 1'),
        ('--freeze=3', 'freeze=3 must be from 0 to 2'),
        ('--n_head=7', 'n_embd=32 must be a multiple of n_head=7'),
        ('--init_from=nowhere', 'There is no folder nowhere'),
    ],
)
def test_bad_plans_get_one_sentence(sheep, run, flag, message):
    result = run('train.py', '--plan', '--dataset=sheep', *TINY, flag)
    assert result.code == 1
    assert message in result.err
    assert 'Traceback' not in result.err


def test_recomputing_activations_changes_nothing(sheep, run, tmp_path):
    flags = ['--dataset=sheep', *TINY, '--max_iters=5', '--log_interval=1', '--dropout=0.1']
    losses = []
    for on in (True, False):
        result = run('train.py', *flags, f'--activation_checkpointing={on}', f'--out_dir={on}')
        losses.append(re.findall(r'^ +\d+ +\S+ +(\d+\.\d{4}) ', result.out, re.MULTILINE))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5 + 2, 'the steps, and two evaluations'


def test_all_published_sizes_can_be_planned():
    assert set(PUBLISHED) == {'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'}
    with torch.device('meta'):
        assert GPT(GPTConfig(**PUBLISHED['gpt2-xl'])).count_parameters() == 1_557_611_200

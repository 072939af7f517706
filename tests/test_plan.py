"""A plan, against what a run really takes."""

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

BASE = {'n_layer': 1, 'n_head': 4, 'n_embd': 32, 'block_size': 32, 'batch_size': 1, 'gradient_accumulation_steps': 1}
WIDE = {'n_layer': 2, 'n_embd': 512, 'block_size': 64}
SHAPES = {
    'mostly activations': {'n_layer': 6, 'n_embd': 192, 'block_size': 256, 'batch_size': 12},
    'mostly weights': WIDE | {'n_layer': 8},
    'recomputed': {'arch': 'qwen3', 'n_layer': 6, 'n_embd': 192, 'block_size': 256, 'batch_size': 12}
    | {'activation_checkpointing': True, 'gradient_accumulation_steps': 2},
    'muon': WIDE | {'n_layer': 6, 'optimizer': 'muon', 'gradient_accumulation_steps': 2},
    'frozen': WIDE | {'n_layer': 8, 'freeze': 6},
}


def peak_memory(folder, name, shape):
    """Bytes of the whole process while it trains two steps, before it saves and draws."""
    flags = [f'--{name}={value}' for name, value in shape.items()]
    line = [sys.executable, ROOT / 'train.py', '--dataset=sheep', '--max_iters=2', *flags]
    line += ['--device=cpu', '--dtype=float32', f'--out_dir=out {name}']
    # Give back at once what is freed.
    environment = os.environ | {'MALLOC_MMAP_THRESHOLD_': '65536', 'OMP_NUM_THREADS': '1'}
    subprocess.run(line, cwd=folder, capture_output=True, timeout=300, env=environment, check=True)
    records = map(json.loads, (folder / f'out {name}' / 'log.jsonl').read_text().splitlines())
    return 2**30 * max(record['gib'] for record in records if 'gib' in record)


@pytest.mark.skipif(sys.platform != 'linux', reason='it reads /proc')
def test_planned_memory_is_what_a_run_takes(sheep, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        shapes = [BASE, *(BASE | changes for changes in SHAPES.values())]
        nothing, *peaks = pool.map(partial(peak_memory, tmp_path), ['nothing', *SHAPES], shapes)
    for (name, changes), peak in zip(SHAPES.items(), peaks, strict=True):
        shape = {'arch': 'gpt2', 'optimizer': 'adamw'} | BASE | changes
        fields = ('arch', 'n_layer', 'n_head', 'n_embd', 'block_size')
        config = GPTConfig(vocab_size=257, **{name: shape[name] for name in fields})
        planned = dry_run(
            config,
            {'freeze': None} | shape | {'dtype': 'float32', 'weight_decay': 0.1},
            shape.get('activation_checkpointing', False),
        )
        assert sum(planned.values()) == 2 * planned['peak'] and min(planned.values()) >= 0, (name, planned)
        assert peak - nothing == pytest.approx(planned['peak'], rel=0.15), (name, planned)


def test_the_plan_of_a_published_model_says_what_is_known_of_it(run):
    result = run('train.py', '--plan', '--init_from=gpt2', '--dataset=none', '--plan_gpus=8', '--plan_gpu=A100')
    assert result.code == 0, result.err
    out = result.out
    assert '124,439,808 parameters' in out and 'data/none is not prepared yet' in out
    assert '12 x 40 x 1024 = 491,520 tokens: 294,912,000,000' in out
    flops = 6 * (124_439_808 - 1024 * 768 - 2 * 768) + 12 * 12 * 768 * 1024
    assert f'{flops / 1e9:.3g} GFLOP a token' in out
    hours = 294_912_000_000 * flops / (8 * 312e12 * 0.4) / 3600
    assert f'time    {int(hours)}h' in out and '8 x A100 at 40% of 312 TFLOP/s' in out
    peaks = {row[:24].strip(): float(row.split()[-1]) for row in out.splitlines() if 'DP' in row}
    assert peaks['FSDP'] < peaks['DDP'] and peaks['DDP recomputing'] < peaks['DDP']
    assert all(len(line) <= 80 for line in out.splitlines())


def test_a_plan_writes_nothing_and_what_cannot_fit_is_said(sheep, run, tmp_path):
    before = sorted(tmp_path.rglob('*'))
    large = ['--n_embd=512', '--batch_size=60000', '--gradient_accumulation_steps=2']
    result = run('train.py', '--plan', '--dataset=sheep', *TINY, *large, '--plan_gpu=T4', '--plan_gpus=2')
    assert result.code == 0 and sorted(tmp_path.rglob('*')) == before
    assert 'too much for T4: DDP, FSDP, DDP recomputing, FSDP recomputing' in result.out and 'epochs' in result.out


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--plan_gpu=H1000', "plan_gpu='H1000' is not known. Choose one of: T4, "),
        ('--plan_gpus=3', 'gradient_accumulation_steps=1 micro-batches cannot be divided over 3 processes: use 3.'),
        ('--batch_size=900000000', '28,800,000,000 tokens at once, batch_size x block_size, are more than any'),
        ('--plan_gpus=0', 'plan_gpus=0: must be from 1'),
        ('--freeze=3', 'freeze=3 must be from 0 to 2'),
        ('--n_head=7', 'n_embd=32 must be a multiple of n_head=7'),
        ('--init_from=nowhere', 'There is no folder nowhere'),
    ],
)
def test_bad_plans_get_one_sentence(sheep, run, flag, message):
    result = run('train.py', '--plan', '--dataset=sheep', *TINY, flag)
    assert result.code == 1 and message in result.err and 'Traceback' not in result.err


def test_recomputing_activations_changes_nothing(sheep, run, tmp_path):
    flags = ['--dataset=sheep', *TINY, '--max_iters=5', '--log_interval=1', '--dropout=0.1']
    results = [run('train.py', *flags, f'--activation_checkpointing={on}', f'--out_dir={on}') for on in (True, False)]
    losses = [re.findall(r'^ +\d+ +\S+ +(\d+\.\d{4}) ', result.out, re.MULTILINE) for result in results]
    assert losses[0] == losses[1] and len(losses[0]) == 5 + 2


def test_all_published_sizes_can_be_planned():
    assert set(PUBLISHED) == {'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'}
    with torch.device('meta'):
        assert GPT(GPTConfig(**PUBLISHED['gpt2-xl'])).count_parameters() == 1_557_611_200

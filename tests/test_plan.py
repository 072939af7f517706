"""A plan, compared with what a run takes, sends and refuses.

Memory is that of real runs on this CPU, and of simulated worlds of 8 and 64 GPUs (test_worlds.py).
"""

import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import test_worlds
import torch
from conftest import ROOT, TINY
from test_evaluate import save
from test_worlds import WAYS, simulated_peak, watched_step

import plan
import runtime
import tokenizer as tk
from model import GPT, PUBLISHED, GPTConfig
from plan import COLUMNS, dry_run, memory_rows, traffic
from runtime import GPUS

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
    'mostly activations': DEEP | {'batch_size': 4, 'dropout': 0.1},
    'half of the weights': WIDE | {'n_embd': 384, 'freeze': 4, 'average_frac': 0.1},
}
LARGE_RUNS = {
    'muon, recomputed': DEEP
    | {'arch': 'qwen3', 'activation_checkpointing': True, 'gradient_accumulation_steps': 2}
    | {'batch_size': 4, 'optimizer': 'muon'},
    'mostly activations': DEEP,
    'mostly weights': WIDE,
    'recomputed': DEEP
    | {'arch': 'qwen3', 'activation_checkpointing': True, 'gradient_accumulation_steps': 2},
    'muon': WIDE | {'n_layer': 6, 'optimizer': 'muon', 'gradient_accumulation_steps': 2},
    'frozen': WIDE | {'freeze': 6},
}


# Each run is a fork of a process that has imported all, and it neither saves nor draws: these are
# most of the seconds of a small run.
FORKS = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import checkpoint, data, inference, model, optim, parallel, report
report.draw = checkpoint.start_save = lambda *args, **kwargs: None
for flags in {lines!r}:
    pid = os.fork()
    if not pid:
        sys.argv = ['train.py', *flags]
        runpy.run_path({root!r} + '/train.py', run_name='__main__')
        sys.exit()
    assert os.waitpid(pid, 0)[1] == 0, flags
"""


def peaks_of_runs(folder, runs):
    """Bytes of the whole processes while they train two steps, before they save and draw."""
    lines = []
    for name, knobs in runs.items():
        line = [f'--{knob}={value}' for knob, value in knobs.items()]
        line += ['--dataset=sheep', '--max_iters=2', '--device=cpu', '--dtype=float32']
        lines.append([*line, f'--out_dir=out {name}'])
    # A low threshold has freed memory given back at once.
    environment = os.environ | {'MALLOC_MMAP_THRESHOLD_': '65536', 'OMP_NUM_THREADS': '1'}
    script = FORKS.format(root=str(ROOT), lines=lines)
    subprocess.run(
        [sys.executable, '-c', script],
        cwd=folder, capture_output=True, timeout=300, env=environment, check=True,
    )  # fmt: skip
    peaks = []
    for name in runs:
        log = (folder / f'out {name}' / 'log.jsonl').read_text().splitlines()
        records = [json.loads(line) for line in log]
        peaks.append(2**30 * max(record['gib'] for record in records if 'gib' in record))
    return peaks


@pytest.mark.skipif(sys.platform != 'linux', reason='it reads /proc')
@pytest.mark.parametrize('runs', [RUNS, pytest.param(LARGE_RUNS, marks=pytest.mark.slow)])
def test_planned_memory_is_what_a_run_takes(sheep, tmp_path, runs):
    nothing, *peaks = peaks_of_runs(tmp_path, {'nothing': BASE} | runs)
    for name, peak in zip(runs, peaks, strict=True):
        knobs = {'freeze': None, 'activation_checkpointing': False, 'dtype': 'float32'}
        knobs = knobs | {'dropout': 0.0, 'average_frac': None} | runs[name]
        fields = ('arch', 'n_layer', 'n_head', 'n_embd', 'block_size', 'dropout')
        shape = GPTConfig(vocab_size=257, **{field: knobs[field] for field in fields})
        planned = dry_run(shape, knobs, knobs['activation_checkpointing'])
        parts = [planned[column] for column in COLUMNS if column != 'peak']
        assert sum(parts) == planned['peak'], 'the peak is the sum of the others'
        assert min(parts) >= 0, (name, planned)
        assert peak - nothing == pytest.approx(planned['peak'], rel=0.15), (name, planned)


# -----------------------------------------------------------------------------
# many GPUs, simulated

XL = PUBLISHED['gpt2-xl'] | {'block_size': 1024}
LLAMA_7B = {
    'arch': 'llama', 'n_layer': 32, 'n_head': 32, 'n_embd': 4096, 'intermediate_size': 11008,
    'vocab_size': 32000, 'tie_weights': False, 'block_size': 4096,
}  # fmt: skip
LARGE = {'gpt2-xl': (XL, 12), 'llama-7b': (LLAMA_7B, 1)}  # batch sizes
SMALL = {
    'gpt2': (XL | {'n_layer': 2}, 4),
    'llama': (LLAMA_7B | {'n_layer': 4}, 1),
}


def planned_and_simulated(shape, batch_size, optimizer, ranks, replicas=1):
    """The two rows of FSDP, without and with recomputing, by the plan and by the simulation."""
    shape = GPTConfig(**shape)
    knobs = {
        'optimizer': optimizer, 'dtype': 'bfloat16', 'batch_size': batch_size, 'freeze': None,
        'average_frac': None, 'block_size': shape.block_size, 'fsdp_replicas': replicas,
        'plan_gpu': 'H100', 'plan_gpus': ranks,
    }  # fmt: skip
    with torch.device('meta'):
        model = GPT(shape)
    rows = memory_rows(model, knobs)
    pairs = []
    for name, recomputes in (('FSDP', False), ('FSDP recomputing', True)):
        held = simulated_peak(shape, knobs, ranks, recomputes, replicas)
        pairs.append((rows[name], held))
    return pairs


def assert_same_memory(pairs):
    """Whatever a rank holds, and its peak, is as planned."""
    for planned, held in pairs:
        for what in ('weights', 'gradients', 'optimizer'):
            assert planned[what] == pytest.approx(held[what], rel=0.01), what
        assert planned['peak'] == pytest.approx(held['peak'], rel=0.05), (planned, held)


@pytest.mark.parametrize(
    ('name', 'optimizer', 'ranks', 'replicas'),
    [
        ('gpt2', 'adamw', 8, 1),
        ('llama', 'adamw', 64, 8),
        # halves of the matrices for each
        pytest.param('llama', 'muon', 2, 1, marks=pytest.mark.slow),
        # one for two devices, padding for the others
        pytest.param('llama', 'muon', 64, 8, marks=pytest.mark.slow),
        ('gpt2', 'muon', 8, 1),
    ],
)
def test_planned_memory_is_what_a_rank_holds(name, optimizer, ranks, replicas):
    assert_same_memory(planned_and_simulated(*SMALL[name], optimizer, ranks, replicas))


@pytest.mark.slow
@pytest.mark.parametrize('name', LARGE)
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize(('ranks', 'replicas'), [(8, 1), (64, 1), (64, 8)])
def test_planned_memory_of_large_models(name, optimizer, ranks, replicas):
    assert_same_memory(planned_and_simulated(*LARGE[name], optimizer, ranks, replicas))


class Sent(test_worlds.Collectives):
    """Note what a device sends in each collective, by rings: (kind, bytes, members)."""

    members_of_reduce = 0
    sent = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        so_far = len(self.tensors)
        result = super().__torch_dispatch__(function, types, args, kwargs)
        sizes = [tensor.nbytes for _, tensor in self.tensors[so_far:]]
        if sizes:
            kind, whole = self.found[-1]
            members = whole // min(sizes)  # of a share, in all-gather and reduce-scatter
            if kind == 'reduce':
                members = self.members_of_reduce
            factor = 2 if kind == 'reduce' else 1
            Sent.sent.append((kind, factor * (members - 1) / members * whole, members))
        return result


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('way', WAYS)
def test_planned_traffic_is_what_a_rank_sends(monkeypatch, way, optimizer):
    ranks, fsdp, replicas, _ = WAYS[way]
    members_of_reduce = replicas if replicas > 1 else ranks
    monkeypatch.setattr(Sent, 'members_of_reduce', members_of_reduce)
    monkeypatch.setattr(Sent, 'sent', [])
    monkeypatch.setattr(test_worlds, 'Collectives', Sent)
    knobs = {'optimizer': optimizer, 'dtype': 'bfloat16', 'fsdp_replicas': replicas}
    planned = traffic(test_worlds.make_model('qwen3'), knobs, ranks, test_worlds.MICRO_STEPS)
    with test_worlds.simulated_world(ranks):
        watched_step('qwen3', way, optimizer, 'bfloat16', monkeypatch)

    total = sum(size for _, size, _ in Sent.sent)
    assert planned['FSDP' if fsdp else 'DDP'] == pytest.approx(total, rel=0.02)
    if replicas == 1:
        return
    reduced = sum(size for kind, size, _ in Sent.sent if kind == 'reduce')
    updates = sum(size for _, size, members in Sent.sent if members == ranks)
    assert planned['between groups'] == pytest.approx(reduced + updates, rel=0.02)


# -----------------------------------------------------------------------------
# what a plan says


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
    rows = [row for row in out.splitlines() if 'DP' in row and 'sent' not in row]
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
    flags += ['--plan_gpu=L4', '--plan_gpus=2']
    result = run('train.py', '--plan', '--dataset=sheep', *flags)
    assert result.code == 0
    assert sorted(tmp_path.rglob('*')) == before
    assert 'too much for L4: DDP, FSDP, DDP recomputing, FSDP recomputing' in result.out
    assert 'epochs' in result.out


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--plan_gpu=H1000', "plan_gpu='H1000' is not known: take what is like it, T4, "),
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


@pytest.fixture
def models(sheep, tmp_path, monkeypatch):
    """Folders of small models: bytes/, pairs/, and bare/ without a tokenizer; a small 'gpt2'."""
    save(tmp_path / 'bytes', tk.build('byte'))
    save(tmp_path / 'pairs', tk.build('bpe', ['a pair of pairs'], 260))
    save(tmp_path / 'bare', tk.build('byte'))
    (tmp_path / 'bare' / 'tokenizer.json').unlink()
    gpt2 = tmp_path / 'small-gpt2'
    gpt2.mkdir()
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8)).save_pretrained(gpt2)
    find_pretrained = sys.modules['model'].find_pretrained

    def find(source, with_weights=True):
        return str(gpt2) if source == 'gpt2' else find_pretrained(source, with_weights)

    monkeypatch.setattr('model.find_pretrained', find)


@pytest.mark.parametrize(
    ('flags', 'sentence'),
    [
        ('--init_from=bare', 'There is no bare/tokenizer.json: a tokenizer cannot be'),
        ('--init_from=pairs', 'The model pairs has a vocabulary of 260 tokens, data/sheep another'),
        ('--init_from=gpt2', 'The model gpt2 has a vocabulary of 50,257 tokens, data/sheep'),
        ('--init_from=bytes --block_size=129', 'block_size=129 is longer than the context of the'),
        ('--init_from=gpt2 --dataset=gpt2 --block_size=1025', 'block_size=1025 is longer than'),
        ('--block_size=90000', 'The training split of data/sheep has '),
        ('--dataset=sheep:0.5,sheep:0.5', "dataset='sheep:0.5,sheep:0.5' has sheep twice"),
        ('--freeze=3', 'freeze=3 must be from 0 to 2, the number of blocks.'),
    ],
)
def test_a_plan_refuses_what_a_run_refuses(run, models, flags, sentence):
    gpt2_text = run('prepare.py', '--input=sheep.txt', '--tokenizer=gpt2', '--name=gpt2')
    assert gpt2_text.code == 0, gpt2_text.err
    results = []
    for mode in ('--plan', '--max_iters=1'):
        results.append(run('train.py', '--dataset=sheep', *TINY, *flags.split(), mode))
    planned, trained = results
    assert sentence in planned.err
    assert planned.is_one_sentence
    assert planned.err == trained.err


def test_replicas_must_divide_the_gpus_of_a_plan(sheep, run):
    flags = ['--dataset=sheep', *TINY, '--gradient_accumulation_steps=8', '--plan_gpus=8']
    result = run('train.py', '--plan', *flags, '--fsdp_replicas=3')
    assert result.is_one_sentence
    assert result.err == 'fsdp_replicas=3 must divide plan_gpus=8.\n'
    halves = run('train.py', '--plan', *flags, '--fsdp_replicas=2')
    sent = re.findall(r'^(?:network| {7}) (\D+) +[\d.e-]+ GB sent', halves.out, re.MULTILINE)
    assert [name.strip() for name in sent] == ['DDP', 'FSDP', 'between groups']
    copies = run('train.py', '--plan', *flags, '--fsdp_replicas=8')
    assert copies.code == 0, copies.err
    assert not re.search(r'^ +FSDP', copies.out, re.MULTILINE), 'nothing is sharded'


def test_price_and_network_are_in_proportion(sheep, run):
    flags = ['--dataset=sheep', *TINY, '--gradient_accumulation_steps=8', '--plan_gpus=8']
    flags += ['--max_iters=1000000', '--plan_gpu=M1', '--plan_price=2.5', '--plan_network=0.5']
    out = run('train.py', '--plan', *flags).out
    hours, minutes = map(int, re.search(r'^time +(\d+)h(\d+)m', out, re.MULTILINE).groups())
    (total,) = re.findall(r'^price +([\d,.]+) at 2.5 per device and hour$', out, re.MULTILINE)
    price = float(total.replace(',', ''))
    assert price == pytest.approx(2.5 * 8 * (hours + minutes / 60), abs=2.5 * 8 / 60)
    rows = re.findall(r'(\S+) GB sent by each device in a step, (\S+) s$', out, re.MULTILINE)
    assert len(rows) == 2, 'DDP and FSDP'
    for gigabytes, seconds in rows:
        assert float(seconds) == pytest.approx(2 * float(gigabytes), rel=0.01)


def test_small_models_are_planned_in_mib(sheep, run):
    small = run('train.py', '--plan', '--dataset=sheep', *TINY).out
    large = run('train.py', '--plan', '--dataset=sheep', *TINY, '--n_embd=4096').out
    assert 'memory  MiB per device' in small
    assert 'memory  GiB per device' in large
    weights = re.findall(r'^ +DDP +([\d.]+)', small, re.MULTILINE)[0]
    with torch.device('meta'):
        shape = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 32}
        model = GPT(GPTConfig(vocab_size=257, **shape))
    n_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert float(weights) == pytest.approx(n_bytes / 2**20, abs=0.02)


def test_launching_is_not_counted_as_work():
    model = SimpleNamespace(flops_per_token=lambda block_size: 1e9)
    config = {'batch_size': 1, 'gradient_accumulation_steps': 8, 'block_size': 989}
    config |= {'dtype': 'bfloat16', 'plan_gpu': 'H100', 'plan_gpus': 4, 'plan_mfu': 0.4}
    # 7.9 TFLOP in 10 ms, of which four could do 39.6.
    assert plan.compute_step(model, config) == (0.01, 'on 4 x H100 at 20% of 989 TFLOP/s')
    config['block_size'] *= 10
    seconds, how = plan.compute_step(model, config)
    assert seconds == pytest.approx(0.05)
    assert 'at 40%' in how


# As wide as they get.
WIDE_ROW = dict.fromkeys(COLUMNS, 2345.67 * 2 ** 30)
WIDE_ROWS = dict.fromkeys(('DDP', 'FSDP', 'DDP recomputing', 'FSDP recomputing'), WIDE_ROW)


@pytest.mark.parametrize('gpu', GPUS)
def test_every_gpu_has_lines_of_80_columns(sheep, run, monkeypatch, gpu):
    monkeypatch.setattr(plan, 'memory_rows', lambda *args: WIDE_ROWS)
    flags = ['--dataset=sheep', *TINY, '--gradient_accumulation_steps=64', '--plan_gpus=64']
    flags += ['--n_embd=32768', '--max_iters=600000', '--plan_price=123.45', '--plan_network=12.5']
    result = run('train.py', '--plan', *flags, f'--plan_gpu={gpu}', '--fsdp_replicas=8')
    assert result.code == 0, result.err
    tflops, room = GPUS[gpu]
    assert f'64 x {gpu} at 40% of {tflops} TFLOP/s' in result.out
    assert f'not compiled; {gpu} has {room} GiB' in result.out
    assert f'too much for {gpu}: ' in result.out
    assert not [line for line in result.out.splitlines() if len(line) > 80]


def test_this_cpu_is_timed(sheep, run):
    result = run('train.py', '--plan', '--dataset=sheep', *TINY, '--plan_gpu=CPU')
    assert result.code == 0, result.err
    assert ' on this machine, by some steps here, ' in result.out
    assert f'{runtime.pick_dtype("auto", "cpu")}, not compiled; CPU has ' in result.out
    assert not [line for line in result.out.splitlines() if len(line) > 80]


def test_the_memory_of_timed_steps_is_said_where_it_grew(capsys):
    row = dict.fromkeys(plan.COLUMNS, 2**30)
    config = {'plan_gpu': 'CPU', 'dtype': 'float32'}
    for measured, said in ((None, False), (1e-5, False), (math.inf, False), (1.25, True)):
        plan.print_memory({'DDP': row}, config, 100, measured)
        out = capsys.readouterr().out
        assert ('        1.25 when it was timed, with the freed memory that is kept' in out) is said


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

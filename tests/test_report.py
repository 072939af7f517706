"""What a run tells: the terminal at 80 columns, loss.png, samples, and trackers that have what log.jsonl has."""

import json
import os
import pty
import re
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from matplotlib.image import imread
from safetensors.torch import load_file
from test_train import losses, records, same, train
from wandb.proto import wandb_internal_pb2

import report

CONNECT = socket.socket.connect
FLAGS = ['--max_iters=12', '--eval_interval=4', '--log_interval=2', '--learning_rate=1e-2']


def logged(out):
    """{(name, step): value} of the numbers in a log."""
    return {(k, r['step']): v for r in records(out) for k, v in r.items() if k != 'step' and isinstance(v, int | float)}


def test_the_terminal_is_a_table_of_80_columns_and_true(run, sheep, tmp_path):
    result = train(run, *FLAGS)
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 80 and '\x1b' not in result.out + result.err
    head = next(line for line in lines if line.split()[:1] == ['step'])
    assert head.split() == ['step', 'tokens', 'loss', 'lr', 'grad', 'tokens/s', 'TFLOP/s', 'GiB', 'left']
    rows = [line for line in lines if re.match(r' +\d+ ', line)]
    assert all(len(row) == len(head) for row in rows if 'validation' not in row)
    flops = result.globals['model'].flops_per_token()
    for record in records(tmp_path / 'out'):
        row = [row.split() for row in rows if row.split()[0] == str(record['step'])]
        assert row[0][1] == report.short(record['step'] * 4 * 32)
        if 'loss' in record:
            assert record['tokens'] == record['step'] * 4 * 32
            assert f'{record["loss"]:.4f}' == row[0][2] and f'{record["grad_norm"]:.2f}' == row[0][4]
            assert record['tflops'] == pytest.approx(flops * record['tokens_per_second'] / 1e12, rel=1e-3)
            assert 0.05 < record['gib'] < 50
        else:
            assert f'{record["val_loss"]:.4f}' == row[-1][2]
            assert record['perplexity'] == pytest.approx(2.718281828459045 ** record['val_loss'])
    assert lines[-1] == 'python sample.py --out_dir=out' and '1,536 tokens in 0m0' in result.out


def test_a_bar_is_drawn_on_a_terminal_and_tears_no_line(sheep, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    line = [sys.executable, ROOT / 'train.py', '--dataset=sheep', *TINY, *FLAGS]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=theirs, stderr=theirs, env=os.environ | {'NO_COLOR': '1'})
    os.close(theirs)
    seen = b''
    while True:
        try:
            seen += os.read(ours, 4096)
        except OSError:  # its end
            break
    os.close(ours)
    assert process.wait() == 0
    text = seen.decode()
    assert text.count('/12 [') >= 3
    assert '\x1b[3' not in text, 'no colour'
    # What stays on the screen: of each line, what was written after its last carriage return.
    stays = [line.rstrip('\r').rpartition('\r')[2] for line in text.split('\n')]
    assert all(len(line) <= 80 for line in stays)
    rows = [line for line in stays if re.match(r' +\d+ ', line)]
    assert len(rows) == 6 + 4 and not any('|' in row for row in rows)


@pytest.mark.parametrize('more', [[], ['--arch=qwen3', '--dropout=0.1']])
def test_samples_are_logged_and_change_nothing(run, sheep, tmp_path, more):
    train(run, *FLAGS, *more, out='a')
    result = train(run, *FLAGS, *more, '--sample_interval=5', '--sample_prompt=3 sheep', '--log_norms', out='b')
    samples = {record['step']: record['sample'] for record in records(tmp_path / 'b') if 'sample' in record}
    assert list(samples) == [5, 10] and all(text.startswith('3 sheep') for text in samples.values())
    shown = [re.sub(r'[^\x20-\x7e\n]', '\ufffd', text) for text in samples.values()]  # nothing that moves a cursor
    out = re.sub(r'[^\x20-\x7e\n\ufffd]', '\ufffd', result.out)
    assert all(text in out for text in shown) and samples[5] != samples[10]
    weights = [load_file(tmp_path / out / 'step_00000012' / 'model.safetensors') for out in 'ab']
    assert same(*weights)


def test_tokens_are_those_that_were_seen(run, sheep, tmp_path):
    train(run, '--max_iters=10')
    result = train(run, '--init_from=resume', '--max_iters=12', '--batch_size=8', '--log_interval=1')
    assert records(tmp_path / 'out')[-2]['tokens'] == 32 * (10 * 4 + 2 * 8) and '\n1,792 tokens in' in result.out


def test_norms_are_those_of_each_block(run, sheep, tmp_path):
    result = train(run, '--max_iters=2', '--log_interval=1', '--log_norms')
    model, record = result.globals['model'], records(tmp_path / 'out')[-2]
    for name, part in {'blocks.1': model.blocks[1], 'wte': model.wte, 'norm_f': model.norm_f}.items():
        assert record[f'norm/{name}'] > 0
        before = torch.cat([p.detach().flatten() for p in part.parameters()]).norm().item()
        assert record[f'norm/{name}'] == pytest.approx(before, rel=0.02)  # of before the last step
    total = sum(value**2 for name, value in record.items() if name.startswith('grad_norm/')) ** 0.5
    assert total == pytest.approx(record['grad_norm'], rel=1e-5)


def test_the_picture_is_drawn_of_any_run(run, sheep, tmp_path, monkeypatch):
    def picture(out):
        image = imread(tmp_path / out / 'loss.png')
        assert image.shape[:2] == (660, 880) and image.std() > 0.05
        return image

    train(run, '--max_iters=0', out='none')
    picture('none')
    train(run, *FLAGS, out='a')
    first = picture('a')
    train(run, *FLAGS, '--max_iters=20', '--init_from=resume', out='a')
    assert (picture('a') != first).any()
    log = tmp_path / 'a' / 'log.jsonl'
    log.write_text(log.read_text() + '{"step": 21, "loss": null, "bad_steps": 1, "lr": 0.1, "grad_norm": null}\n{"st')
    result = run('plot.py', '--out_dir=a,none', '--file=both.png')
    assert result.code == 0 and result.out == 'both.png\n' and imread(tmp_path / 'both.png').std() > 0.05
    assert 'There is no gone/log.jsonl' in run('plot.py', '--out_dir=gone').err
    assert 'must be a .png' in run('plot.py', '--out_dir=a', '--file=x.pdf').err
    (tmp_path / 'a$^$b').mkdir()
    (tmp_path / 'a$^$b' / 'log.jsonl').write_text('5\nnull\n{}\n{"step": 5, "loss": 3.0}\n')
    assert run('plot.py', '--out_dir=a$^$b,a', '--file=x.png').code == 0


def test_the_picture_takes_less_than_a_hundredth_of_the_time(run, sheep, tmp_path, monkeypatch):
    drawn, seconds = [], [0.0]

    def draw(runs, path):
        drawn.append(runs['out'][-1]['step'])
        seconds[0] += 2.0

    def slower(*args, original=torch.optim.AdamW.step, **kwargs):
        seconds[0] += 30.0  # a step
        return original(*args, **kwargs)

    monkeypatch.setattr('plot.draw', draw)
    monkeypatch.setattr('time.monotonic', lambda: seconds[0])
    monkeypatch.setattr(torch.optim.AdamW, 'step', slower)
    train(run, '--max_iters=24', '--eval_interval=2')
    assert drawn == [4, 12, 20, 24]


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(run, sheep, tmp_path, monkeypatch):
    (tmp_path / 'out' / 'loss.png').mkdir(parents=True)
    result = train(run, *FLAGS)
    assert 'loss.png could not be drawn: IsADirectoryError' in result.out and losses(tmp_path / 'out')[12]


def test_tensorboard_has_what_the_log_has_over_a_resume(run, sheep, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*FLAGS, '--tracker=tensorboard', '--sample_interval=6', '--log_norms']
    train(run, *flags, '--max_iters=8')
    train(run, *flags, '--init_from=resume')
    events = EventAccumulator(str(tmp_path / 'out' / 'tensorboard'), {'images': 0})
    events.Reload()
    found = [(tag, e.step, e.value) for tag in events.Tags()['scalars'] for e in events.Scalars(tag)]
    assert len({(tag, step) for tag, step, _ in found}) == len(found), 'once per step'
    assert {(tag, step): value for tag, step, value in found} == pytest.approx(logged(tmp_path / 'out'), rel=1e-6)
    assert {'sample/text_summary', 'config/text_summary'} <= set(events.Tags()['tensors'])
    assert [image.step for image in events.Images('picture')] == [8, 12], 'at the ends'


def read_wandb(path):
    """The records of an offline run: a LevelDB log, blocks of 32 KiB of pieces with a header of 7 bytes each."""
    data, place, whole = path.read_bytes(), 7, b''
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # the padding of a block
            place += 2**15 - place % 2**15
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], 'little'), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of a record, or its last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b''


def test_wandb_has_what_the_log_has_over_a_resume(run, sheep, tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.setattr('socket.socket.connect', CONNECT)  # to its own process on this machine
    flags = [*FLAGS, '--tracker=wandb', '--sample_interval=6']
    train(run, *flags, '--max_iters=8')
    train(run, *flags, '--init_from=resume')
    expected, found, ids, config = logged(tmp_path / 'out'), {}, set(), set()
    files, deadline = list((tmp_path / 'out' / 'wandb').rglob('*.wandb')), time.monotonic() + 30
    sizes = None
    while sizes != (sizes := [path.stat().st_size for path in files]) and time.monotonic() < deadline:
        time.sleep(1)  # another process writes them
    for path in files:
        for record in read_wandb(path):
            if record.WhichOneof('record_type') == 'run':
                ids.add(record.run.run_id)
                config |= {item.key for item in record.run.config.update}
            if record.WhichOneof('record_type') == 'history':
                row = {'/'.join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                for name in [name for name in row if name[0] != '_']:
                    assert (name, row['_step']) not in found, 'once per step'
                    found[name, row['_step']] = row[name]
    other = [found.pop(key) and key for key in list(found) if key[0] == 'sample' or key[0].startswith('picture')]
    assert found == pytest.approx(expected, rel=1e-6)
    assert {step for name, step in other if name == 'sample'} == {6, 12}
    assert {step for name, step in other if name != 'sample'} == {8, 12}, 'pictures, at the ends'
    assert ids == {Path(tmp_path / 'out' / 'wandb_id').read_text()}, 'one run'
    assert {'learning_rate', 'dataset', 'n_layer'} <= config


def test_a_tracker_that_fails_does_not_end_the_run(run, sheep, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def fail(*args):
        raise RuntimeError('no route to host')

    monkeypatch.setattr(SummaryWriter, 'add_scalar', fail)
    result = train(run, *FLAGS, '--tracker=tensorboard')
    assert result.out.count('The tracker failed and is not used any more: RuntimeError: no route to host') == 1
    assert losses(tmp_path / 'out')[12]


@pytest.mark.parametrize(
    ('flag', 'missing', 'message'),
    [
        ('--tracker=wandb', 'wandb', "tracker='wandb' needs a package: pip install wandb"),
        ('--tracker=tensorboard', 'torch.utils.tensorboard', "tracker='tensorboard' needs a package: pip install"),
        ('--tracker=tensorbord', '', "tracker='tensorbord' must be one of: none, tensorboard, wandb."),
        ('--tracker=wandb', None, 'set WANDB_MODE=offline'),
        ('--sample_prompt=', '', 'sample_prompt has 0 tokens: it must have from 1 to block_size=32.'),
        ('--out_dir=sheep.txt', '', 'out_dir=sheep.txt cannot be made'),
    ],
)
def test_bad_input_is_one_sentence_before_the_first_step(run, sheep, tmp_path, monkeypatch, flag, missing, message):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    if missing is None:
        wandb = pytest.importorskip('wandb')

        def fail(**options):
            raise wandb.errors.CommError('no connection')

        monkeypatch.setattr(wandb, 'init', fail)
    result = train(run, *FLAGS, flag, '--sample_interval=2', code=1)
    assert message in result.err and result.err.count('\n') == 1
    assert not list((tmp_path / 'out').glob('log.jsonl'))


def test_the_share_of_the_peak_is_given_where_the_peak_is_known(monkeypatch):
    names = {'NVIDIA H200': 989, 'NVIDIA H100 80GB HBM3': 989, 'NVIDIA A100-SXM4-40GB': 312, 'Tesla T4': 65,
             'NVIDIA GeForce RTX 4090': 165, 'NVIDIA H100 PCIe': None, 'NVIDIA GeForce RTX 4090 Laptop GPU': None,
             'NVIDIA A10G': None, 'AMD Instinct MI300X': None}  # fmt: skip
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device, name=name: name)
        assert report.peak_flops('cuda', 'bfloat16') == (peak and peak * 1e12), name
    assert report.peak_flops('cuda', 'float32') is None and report.peak_flops('cpu', 'bfloat16') is None

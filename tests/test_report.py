"""Logging: a terminal of 80 columns, loss.png, config.py, samples, trackers that have the log."""

import json
import math
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
import wandb
from conftest import ROOT, TINY, losses, records, same, train
from matplotlib.figure import Figure
from matplotlib.image import imread
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from wandb.proto import wandb_internal_pb2

import report
from runtime import UserError

CONNECT = socket.socket.connect
FLAGS = ['--max_iters=12', '--eval_interval=4', '--log_interval=2', '--learning_rate=1e-2']


def logged(out):
    """{(name, step): value} of the numbers in a log, the first of each."""
    numbers = {}
    for record in records(out):
        for name, value in record.items():
            if name != 'step' and isinstance(value, int | float):
                numbers.setdefault((name, record['step']), value)
    return numbers


# -----------------------------------------------------------------------------
# the terminal


def test_the_terminal_is_a_table_of_80_columns_and_true(run, sheep, tmp_path):
    result = train(run, *FLAGS)
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 80 and '\x1b' not in result.out + result.err
    head = next(line for line in lines if line.split()[:1] == ['step'])
    assert head.split() == 'step tokens loss lr grad norm tokens/s TFLOP/s GiB ETA'.split()
    rows = [line for line in lines if re.match(r' +\d+ ', line)]
    assert all(len(row) == len(head) for row in rows if 'validation' not in row)
    flops = result.globals['model'].flops_per_token()
    for record in records(tmp_path / 'out'):
        row = [row.split() for row in rows if row.split()[0] == str(record['step'])]
        assert row[0][1] == report.human(record['step'] * 4 * 32)
        if 'loss' in record:
            assert record['tokens'] == record['step'] * 4 * 32
            assert f'{record["loss"]:.4f}' == row[0][2]
            assert f'{record["grad_norm"]:.2f}' == row[0][4]
            tflops = flops * record['tokens_per_second'] / 1e12
            assert record['tflops'] == pytest.approx(tflops, rel=1e-3)
            assert 0.05 < record['gib'] < 50
        else:
            assert f'{record["val_loss"]:.4f}' == row[-1][2]
            assert record['perplexity'] == pytest.approx(2.718281828459045 ** record['val_loss'])
    assert lines[-1] == 'python sample.py --out_dir=out' and '1,536 tokens in 0m0' in result.out


def test_a_bar_is_drawn_on_a_terminal_and_tears_no_line(sheep, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    line = [sys.executable, ROOT / 'train.py', '--dataset=sheep', *TINY, *FLAGS]
    process = subprocess.Popen(
        line, cwd=tmp_path, stdout=theirs, stderr=theirs, env=os.environ | {'NO_COLOR': '1'}
    )
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
    flags = ['--sample_interval=5', '--sample_prompt=3 sheep', '--log_norms']
    result = train(run, *FLAGS, *more, *flags, out='b')
    samples = losses(tmp_path / 'b', 'sample')
    assert list(samples) == [5, 10]
    assert all(text.startswith('3 sheep') for text in samples.values())
    # nothing that moves a cursor
    shown = [re.sub(r'[^\x20-\x7e\n]', '\ufffd', text) for text in samples.values()]
    out = re.sub(r'[^\x20-\x7e\n\ufffd]', '\ufffd', result.out)
    assert all(text in out for text in shown) and samples[5] != samples[10]
    saved = [load_file(tmp_path / out / 'step_00000012' / 'model.safetensors') for out in 'ab']
    assert same(*saved)


def test_tokens_are_those_that_were_seen(run, sheep, tmp_path):
    train(run, '--max_iters=10')
    flags = ['--init_from=resume', '--max_iters=12', '--batch_size=8', '--log_interval=1']
    result = train(run, *flags)
    assert records(tmp_path / 'out')[-2]['tokens'] == 32 * (10 * 4 + 2 * 8)
    assert '\n1,792 tokens in' in result.out


def test_norms_are_those_of_each_block(run, sheep, tmp_path):
    result = train(run, '--max_iters=2', '--log_interval=1', '--log_norms')
    model = result.globals['model']
    record = records(tmp_path / 'out')[-2]
    parts = {'blocks.1': model.blocks[1], 'wte': model.wte, 'norm_f': model.norm_f}
    for name, part in parts.items():
        assert record[f'norm/{name}'] > 0
        after = torch.cat([p.detach().flatten() for p in part.parameters()]).norm().item()
        assert record[f'norm/{name}'] == pytest.approx(after, rel=0.02)  # it is of one step earlier
    squares = [value**2 for name, value in record.items() if name.startswith('grad_norm/')]
    total = sum(squares) ** 0.5
    assert total == pytest.approx(record['grad_norm'], rel=1e-5)


# -----------------------------------------------------------------------------
# loss.png


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
    skipped = '{"step": 21, "loss": null, "skipped_steps": 1, "lr": 0.1, "grad_norm": null}\n'
    log.write_text(log.read_text() + skipped + '{"st')
    result = run('plot.py', '--out_dir=a,none', '--file=both.png')
    assert result.code == 0 and result.out == 'both.png\n'
    assert imread(tmp_path / 'both.png').std() > 0.05
    gone = run('plot.py', '--out_dir=gone')
    assert gone.is_one_sentence and 'There are no steps in gone/log.jsonl' in gone.err
    assert 'must be a .png' in run('plot.py', '--out_dir=a', '--file=x.pdf').err
    (tmp_path / 'a$^$b').mkdir()
    (tmp_path / 'a$^$b' / 'log.jsonl').write_text('5\nnull\n{}\n{"step": 5, "loss": 3.0}\n')
    assert run('plot.py', '--out_dir=a$^$b,a', '--file=x.png').code == 0


def log_of(rate, seconds):
    """The records of 20 steps, of `rate` tokens each; every 10 of them there is an evaluation."""
    lines = []
    for step in range(21):
        record = {'step': step, 'train_seconds': step * seconds}
        if step % 10 == 0:
            lines.append({**record, 'val_loss': 4 - step / 10})
        if step > 0:
            record.update(tokens=step * rate, loss=4 - step / 20, lr=0.1, grad_norm=1.0)
            lines.append(record)
    return lines


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    figures = []
    savefig = Figure.savefig

    def save(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, 'savefig', save)
    return figures


def line_named(figure, name):
    """Its points, as two lists."""
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_label().startswith(name)]
    return [list(data) for data in line.get_data()]


def test_a_picture_shows_steps_seconds_or_tokens(figures, tmp_path):
    records = log_of(rate=64, seconds=0.5)
    expected = {
        'steps': ([0, 10, 20], 'step'),
        'seconds': ([0, 5, 10], 'seconds of training'),
        'tokens': ([0, 640, 1280], 'tokens'),
    }
    for x, (xs, label) in expected.items():
        report.draw({'out': records}, str(tmp_path / 'loss.png'), x)
        figure = figures[-1]
        assert line_named(figure, 'validation, best 2.0000 at step 20') == [xs, [4, 3, 2]]
        assert line_named(figure, 'training')[0] == [xs[1] / 10 * step for step in range(1, 21)]
        assert figure.axes[0].get_ylabel() == 'loss, nats per token'
        assert figure.axes[1].get_xlabel() == label
    for record in records:
        record.pop('train_seconds')
    with pytest.raises(UserError, match='The log of out has no train_seconds'):
        report.draw({'out': records}, str(tmp_path / 'loss.png'), 'seconds')


def test_skipped_steps_are_in_the_legend(figures, tmp_path):
    records = [{**record, 'skipped_steps': 3} for record in log_of(rate=64, seconds=0.5)]
    report.draw({'a': records, 'b': log_of(64, 1.0)}, str(tmp_path / 'loss.png'))
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert 'a, skipped steps: 3' in texts and 'b, training' in texts
    assert not any('b, skipped' in text for text in texts)


def test_plot_compares_runs_over_seconds_by_their_labels(run, figures, tmp_path):
    for folder, seconds in {'a': 0.5, 'b': 2.0}.items():
        (tmp_path / folder).mkdir()
        lines = [json.dumps(record) + '\n' for record in log_of(64, seconds)]
        (tmp_path / folder / 'log.jsonl').write_text(''.join(lines))
    result = run('plot.py', '--out_dir=a,b', '--x=seconds', '--labels=fast,slow', '--file=c.png')
    assert result.code == 0 and result.out == 'c.png\n' and (tmp_path / 'c.png').exists()
    assert line_named(figures[0], 'fast, validation')[0] == [0, 5, 10]
    assert line_named(figures[0], 'slow, validation')[0] == [0, 20, 40]
    wrong = run('plot.py', '--out_dir=a,b', '--labels=fast')
    assert wrong.is_one_sentence and 'Each of 2 runs needs a label of its own' in wrong.err
    wrong = run('plot.py', '--out_dir=a', '--x=hours')
    assert wrong.is_one_sentence and "x='hours' must be one of: steps, seconds, tokens" in wrong.err


def test_the_picture_takes_less_than_a_hundredth_of_the_time(run, sheep, tmp_path, monkeypatch):
    drawn = []
    seconds = [0.0]

    def draw(runs, path):
        drawn.append(runs['out'][-1]['step'])
        seconds[0] += 2.0

    def slower(*args, original=torch.optim.AdamW.step, **kwargs):
        seconds[0] += 30.0  # a step
        return original(*args, **kwargs)

    monkeypatch.setattr(report, 'draw', draw)
    monkeypatch.setattr('time.monotonic', lambda: seconds[0])
    monkeypatch.setattr(torch.optim.AdamW, 'step', slower)
    train(run, '--max_iters=24', '--eval_interval=2')
    assert drawn == [4, 12, 20, 24]


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(run, sheep, tmp_path, monkeypatch):
    (tmp_path / 'out' / 'loss.png').mkdir(parents=True)
    result = train(run, *FLAGS)
    assert 'loss.png could not be drawn: IsADirectoryError' in result.out
    assert losses(tmp_path / 'out')[12]


# -----------------------------------------------------------------------------
# log.jsonl and config.py


def test_the_rows_of_the_table_say_what_they_should(capsys, tmp_path):
    record = {
        'step': 1000,
        'tokens': 65_536_000,
        'loss': 3.14159,
        'lr': 6e-4,
        'grad_norm': math.inf,
        'tokens_per_second': 1_234_567,
        'tflops': 395.6,
        'gib': 71.5,
    }
    log_path = str(tmp_path / 'log.jsonl')
    report.print_headings(989e12)
    report.print_progress(log_path, record, 989e12, 12_000)
    report.print_progress(log_path, record, None, 59)
    metrics = {'val_loss': 20.0, 'perplexity': None, 'bits_per_byte': 7.25}
    report.print_validation(1000, 999, metrics)
    report.print_validation(1000, 999, metrics | {'perplexity': 12345.67}, saved='saved')
    rows = capsys.readouterr().out.splitlines()[1:]
    assert max(map(len, rows)) <= 80
    assert [row.split() for row in rows] == [
        'step tokens loss lr grad norm tokens/s MFU GiB ETA'.split(),
        '1,000 65.5M 3.1416 6.00e-04 inf 1,234,567 40.0% 71.50 3h20m'.split(),
        '1,000 65.5M 3.1416 6.00e-04 inf 1,234,567 396 71.50 0m59s'.split(),
        '1,000 999 20.0000 validation, ppl inf, 7.250 bits per byte'.split(),
        '1,000 999 20.0000 validation, ppl 12,345.7, 7.250 bits per byte, saved'.split(),
    ]
    assert records(tmp_path) == [record | {'grad_norm': None}] * 2, 'JSON has no infinity'


def test_a_log_is_cut_back_to_where_a_run_resumes(tmp_path):
    path = tmp_path / 'log.jsonl'
    report.truncate_log(str(path), 5, 5)
    assert path.read_text() == '', 'there was none'
    report.log(str(path), step=4, loss=1.0)
    report.log(str(path), step=4, val_loss=1.0)
    report.log(str(path), step=5, loss=1.0)
    path.write_text(path.read_text() + '5\n{}\n{"step": 5, "lo')
    report.log(str(path), step=5, val_loss=1.0)  # on a line of its own
    report.log(str(path), step=6, loss=1.0)
    path.write_text(path.read_text() + '{"step": 5, "loss": 1.0}')  # without its end
    report.truncate_log(str(path), 5, 4)
    assert [sorted(record.items()) for record in records(tmp_path)] == [
        [('loss', 1.0), ('step', 4)],
        [('step', 4), ('val_loss', 1.0)],
        [('loss', 1.0), ('step', 5)],
    ]
    report.truncate_log(str(path), 0, -1)  # a run from scratch
    assert path.read_text() == ''


def test_fail_is_one_sentence_for_the_user():
    with pytest.raises(UserError, match='^Not so.$'):
        report.fail('Not so.')


@pytest.mark.parametrize('file', ['log.jsonl', 'step_00000002', 'weights_00000002', None])
def test_a_config_names_the_run_beside_it_or_its_own(tmp_path, file):
    config = {'out_dir': 'runs/a b', 'seed': 7, 'min_lr': None, 'sample_prompt': "it's\n"}
    path = tmp_path / 'config.py'
    report.write_config(str(path), config, 3)
    if file is not None:
        (tmp_path / file).touch()
        config['out_dir'] = str(tmp_path)
    variables = {'__file__': str(path)}
    exec(compile(path.read_text(), path, 'exec'), variables)
    assert {name: variables[name] for name in config} == config
    public = {name for name in variables if name[0] != '_'}
    assert public == {*config, 'Path'}


def test_a_copied_run_resumes_itself(run, sheep, tmp_path):
    def files(folder):
        return {p: p.read_bytes() for p in (tmp_path / folder).rglob('*') if p.is_file()}

    train(run, '--max_iters=3')
    original = files('out')
    shutil.copytree(tmp_path / 'out', tmp_path / 'copy')
    resumed = run('train.py', 'copy/config.py', '--init_from=resume', '--max_iters=5')
    assert resumed.code == 0, resumed.err
    assert (tmp_path / 'copy' / 'step_00000005').exists() and losses(tmp_path / 'copy')[5]
    assert files('out') == original

    # Moved, it is the same run; its config.py alone still names the original.
    (tmp_path / 'copy').rename(tmp_path / 'moved')
    moved = run('train.py', 'moved/config.py', '--init_from=resume', '--max_iters=6')
    assert moved.code == 0 and (tmp_path / 'moved' / 'step_00000006').exists()
    (tmp_path / 'elsewhere').mkdir()
    shutil.copy(tmp_path / 'out' / 'config.py', tmp_path / 'elsewhere')
    assert run('train.py', 'elsewhere/config.py', '--init_from=resume', '--max_iters=4').code == 0
    assert (tmp_path / 'out' / 'step_00000004').exists() and not (tmp_path / 'copy').exists()
    assert [path.name for path in (tmp_path / 'elsewhere').iterdir()] == ['config.py']


# -----------------------------------------------------------------------------
# trackers


def test_tensorboard_has_what_the_log_has_over_a_resume(run, sheep, tmp_path):
    flags = [*FLAGS, '--tracker=tensorboard', '--sample_interval=6', '--log_norms']
    train(run, *flags, '--max_iters=8')
    train(run, *flags, '--init_from=resume')
    events = EventAccumulator(str(tmp_path / 'out' / 'tensorboard'), {'images': 0})
    events.Reload()
    found = {}
    for tag in events.Tags()['scalars']:
        for event in events.Scalars(tag):
            assert (tag, event.step) not in found, 'once per step'
            found[tag, event.step] = event.value
    assert found == pytest.approx(logged(tmp_path / 'out'), rel=1e-6)
    assert {'sample/text_summary', 'config/text_summary'} <= set(events.Tags()['tensors'])
    assert [image.step for image in events.Images('picture')] == [8, 12], 'at the ends'


def read_wandb(path):
    """The records of an offline run: a LevelDB log, of pieces with a header of 7 bytes each."""
    data = path.read_bytes()
    block = 2**15
    place = 7
    record = b''
    while place + 7 <= len(data):
        left_in_block = block - place % block
        if left_in_block < 7:  # its padding
            place += left_in_block
            continue
        size = int.from_bytes(data[place + 4 : place + 6], 'little')
        kind = data[place + 6]
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a full record, or the last piece of one
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            yield message
            record = b''


def wait_until_written(paths):
    """Wait until files that another process writes no longer grow."""
    deadline = time.monotonic() + 30
    before = None
    sizes = [path.stat().st_size for path in paths]
    while sizes != before and time.monotonic() < deadline:
        time.sleep(1)
        before = sizes
        sizes = [path.stat().st_size for path in paths]


def test_wandb_has_what_the_log_has_over_a_resume(run, sheep, tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.setattr('socket.socket.connect', CONNECT)  # to its own process on this machine
    flags = [*FLAGS, '--tracker=wandb', '--sample_interval=6']
    train(run, *flags, '--max_iters=8')
    train(run, *flags, '--init_from=resume')
    files = list((tmp_path / 'out' / 'wandb').rglob('*.wandb'))
    wait_until_written(files)
    found = {}
    ids = set()
    config = set()
    for path in files:
        for record in read_wandb(path):
            if record.WhichOneof('record_type') == 'run':
                ids.add(record.run.run_id)
                config.update(item.key for item in record.run.config.update)
            if record.WhichOneof('record_type') == 'history':
                row = {}
                for item in record.history.item:
                    name = '/'.join(item.nested_key) or item.key
                    row[name] = json.loads(item.value_json)
                for name in [name for name in row if name[0] != '_']:
                    assert (name, row['_step']) not in found, 'once per step'
                    found[name, row['_step']] = row[name]
    samples = {step for name, step in found if name == 'sample'}
    pictures = {step for name, step in found if name.startswith('picture')}
    assert samples == {6, 12} and pictures == {8, 12}, 'pictures, at the ends'
    numbers = {}
    for (name, step), value in found.items():
        if name != 'sample' and not name.startswith('picture'):
            numbers[name, step] = value
    assert numbers == pytest.approx(logged(tmp_path / 'out'), rel=1e-6)
    assert ids == {Path(tmp_path / 'out' / 'wandb_id').read_text()}, 'one run'
    assert {'learning_rate', 'dataset', 'n_layer'} <= config


def test_a_tracker_that_fails_does_not_end_the_run(run, sheep, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError('no route to host')

    monkeypatch.setattr(SummaryWriter, 'add_scalar', fail)
    result = train(run, *FLAGS, '--tracker=tensorboard')
    message = 'The tracker failed and is not used any more: RuntimeError: no route to host'
    assert result.out.count(message) == 1
    assert losses(tmp_path / 'out')[12]


@pytest.mark.parametrize(
    ('flag', 'missing', 'message'),
    [
        ('--tracker=wandb', 'wandb', "tracker='wandb' needs a package: pip install wandb"),
        (
            '--tracker=tensorboard',
            'torch.utils.tensorboard',
            "tracker='tensorboard' needs a package: pip install tensorboard",
        ),
        (
            '--tracker=tensorbord',
            '',
            "tracker='tensorbord' must be one of: none, tensorboard, wandb.",
        ),
        ('--tracker=wandb', None, 'set WANDB_MODE=offline'),
        (
            '--sample_prompt=' + 33 * 'x',
            '',
            'sample_prompt has 33 tokens: it needs 1 to block_size=32.',
        ),
        ('--out_dir=sheep.txt', '', 'out_dir=sheep.txt cannot be made'),
    ],
)
def test_bad_input_is_one_sentence_before_the_first_step(
    run, sheep, tmp_path, monkeypatch, flag, missing, message
):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    if missing is None:

        def fail(**options):
            raise wandb.errors.CommError('no connection')

        monkeypatch.setattr(wandb, 'init', fail)
    result = train(run, *FLAGS, flag, '--sample_interval=2', code=1)
    assert result.is_one_sentence and message in result.err
    assert not list((tmp_path / 'out').glob('log.jsonl'))

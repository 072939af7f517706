"""Terminals that lack a character, and Ctrl-C at any time: in every script, what people meet."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, command

SCRIPTS = ('prepare', 'train', 'sample', 'evaluate', 'export', 'plot', 'bench')
ENCODINGS = ('ascii', 'latin-1:strict')


def slowly(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def printing(encoding):
    """An environment in which Python prints in this encoding."""
    return os.environ | {'PYTHONIOENCODING': encoding}


# -----------------------------------------------------------------------------
# Ctrl-C


@pytest.mark.parametrize('script', SCRIPTS)
def test_ctrl_c_ends_the_imports_without_a_word(tmp_path, script):
    """And by then text is printed whatever the encoding: one line at the top does both."""
    for name in ('numpy', 'torch', 'tqdm'):  # in their place, the first of them is interrupted
        code = "import signal\nprint('日', flush=True)\nsignal.raise_signal(signal.SIGINT)\n"
        (tmp_path / f'{name}.py').write_text(code, encoding='utf-8')
    environment = printing('ascii') | {'PYTHONPATH': str(tmp_path)}
    result = command(f'{script}.py', cwd=tmp_path, env=environment)
    assert result.returncode == -signal.SIGINT
    assert (result.stdout, result.stderr) == ('\\u65e5\n', '')


def test_a_shells_background_job_is_not_ended_by_ctrl_c(tmp_path):
    code = 'import signal\nsignal.raise_signal(signal.SIGINT)\nraise SystemExit(7)\n'
    (tmp_path / 'tqdm.py').write_text(code)
    line = f"trap '' INT; '{sys.executable}' '{ROOT / 'plot.py'}'"  # as sh does it for &
    environment = os.environ | {'PYTHONPATH': str(tmp_path)}
    assert subprocess.run(['sh', '-c', line], env=environment).returncode == 7


@pytest.mark.parametrize(
    ('number', 'status'), [slowly(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)]
)
def test_an_interrupted_benchmark_leaves_no_files(tmp_path, number, status):
    line = [sys.executable, str(ROOT / 'bench.py'), 'prepare', '--corpus_mb=100']
    environment = os.environ | {'TMPDIR': str(tmp_path)}
    job = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
    while job.poll() is None and not list(tmp_path.glob('*/text.txt')):
        time.sleep(0.01)
    job.send_signal(number)
    assert job.wait(timeout=60) == status and 'Traceback' not in job.stderr.read()
    assert not list(tmp_path.glob('*/text.txt'))


# -----------------------------------------------------------------------------
# terminals


@pytest.mark.parametrize('encoding', ['ascii', slowly('latin-1:strict')])
def test_a_sample_that_cannot_be_shown_ends_no_training(sheep, tmp_path, encoding):
    flags = [*TINY, '--dataset=sheep', '--max_iters=2', '--eval_interval=2', '--sample_interval=1']
    flags += ['--sample_prompt=日', '--out_dir=é日']
    train = [str(ROOT / 'train.py'), *flags]
    line = [sys.executable, '-m', 'torch.distributed.run', '--standalone', *train]
    result = subprocess.run(line, cwd=tmp_path, env=printing(encoding), capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(b'\n\\u65e5') == 2 and (tmp_path / 'é日' / 'step_00000002').is_dir()


@pytest.fixture
def trained(run, sheep, tmp_path):
    """The folder of a run, whose name has characters that ASCII lacks."""
    assert run('train.py', *TINY, '--dataset=sheep', '--max_iters=1', '--out_dir=é日').code == 0
    return 'é日'


SAMPLE = ['--start=日', '--max_new_tokens=20', '--temperature=9', '--top_k=None']
PLAN = ['--dataset=sheep', *TINY, '--max_iters=1', '--eval_only', '--plan']


@pytest.mark.parametrize(
    ('script', 'flags'),
    [
        ('plot.py', []),
        ('prepare.py', ['--input=日.txt', '--tokenizer=char']),
        slowly('evaluate.py', []),
        slowly('train.py', PLAN),
        slowly('sample.py', SAMPLE),
    ],
)
def test_what_an_encoding_lacks_is_printed_as_an_escape(trained, tmp_path, script, flags):
    (tmp_path / '日.txt').write_text('日é±\n' * 100, encoding='utf-8')
    if script != 'prepare.py':
        flags = [*flags, f'--out_dir={trained}']
    expected = command(script, *flags, cwd=tmp_path, env=printing('utf-8'), encoding='utf-8')
    assert expected.returncode == 0, expected.stderr
    for encoding in ENCODINGS:
        name = encoding.split(':')[0]
        result = command(script, *flags, cwd=tmp_path, env=printing(encoding), encoding=name)
        assert result.returncode == 0, result.stderr
        as_shown = expected.stdout.encode(name, 'backslashreplace').decode(name)
        assert result.stdout == as_shown


@pytest.mark.parametrize('encoding', ['ascii', slowly('utf-8'), slowly('latin-1:strict')])
def test_jsonl_is_json_in_every_encoding(trained, tmp_path, encoding):
    flags = [f'--out_dir={trained}', '--start=é日😀', '--max_new_tokens=9', '--format=jsonl']
    # What stderr says has the terminal's encoding, and names the folder.
    options = {'cwd': tmp_path, 'env': printing(encoding), 'errors': 'backslashreplace'}
    result = command('sample.py', *flags, **options)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)['prompt'] for line in result.stdout.splitlines()] == ['é日😀'] * 3


def test_a_lone_surrogate_is_printed_or_one_sentence(trained, tmp_path):
    name = os.fsdecode(b'out-\xff')  # a file name that is not UTF-8
    shutil.copytree(tmp_path / trained, tmp_path / name)
    result = command('plot.py', f'--out_dir={name}', cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, 'out-\\udcff/loss.png\n')
    result = command('sample.py', f'--out_dir={trained}', f'--start={name}', cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert "Choose another prompt than 'out-\\udcff'" in result.stderr

"""What the README and the walkthrough show is what happens."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import torch
from conftest import ROOT, TINY
from nbclient import NotebookClient
from test_train import losses
from transformers import AutoModelForCausalLM

from data import IGNORE

HACKS = dict(zip(
    ('activation', 'optimizer', 'objective'),
    re.findall(r'^```diff\n(.*?)^```', (ROOT / 'README.md').read_text(), re.MULTILINE | re.DOTALL),
    strict=True,
))  # fmt: skip
WALKTHROUGH = nbformat.read(ROOT / 'walkthrough.ipynb', 4)


def module(path):
    """A file as a module of its own, beside the one of that name that is imported already."""
    spec = importlib.util.spec_from_file_location(f'hacked_{path.stem}', path)
    spec.loader.exec_module(loaded := importlib.util.module_from_spec(spec))
    return loaded


@pytest.mark.parametrize('name', HACKS)
def test_the_hacks_of_the_readme_apply_and_train(sheep, tmp_path, name):
    code = tmp_path / 'code'
    code.mkdir()
    for path in ROOT.glob('*.py'):
        shutil.copy(path, code)
    applied = subprocess.run(['git', 'apply', '-'], input=HACKS[name], cwd=code, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    assert 3 <= len(re.findall(r'^[+](?![+]{2} )[ \t]*\S', HACKS[name], re.MULTILINE)) <= 11, 'lines'
    flags = ['--dataset=sheep', *TINY, '--max_iters=150', '--eval_interval=150', '--log_interval=150']
    flags += ['--learning_rate=2e-3'] if name == 'optimizer' else ['--learning_rate=1e-2']
    flags += ['--arch=qwen3', '--optimizer=muon'] if name == 'objective' else []
    line = [sys.executable, code / 'train.py', *flags]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert losses(tmp_path / 'out')[150] < 0.5 * losses(tmp_path / 'out')[0]

    folder, idx = tmp_path / 'out' / 'step_00000150', torch.arange(32)[None] * 5
    if name == 'activation':
        ours = module(code / 'model.py').GPT.from_pretrained(folder).eval()
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        assert theirs.config.activation_function == 'relu2'
        torch.testing.assert_close(ours(idx)[..., :257], theirs(idx).logits, atol=1e-4, rtol=1e-4)
    if name == 'objective':
        model = module(code / 'model.py').GPT.from_pretrained(folder).eval()
        other = idx.clone()
        other[0, -1] += 1
        assert (model(idx)[0, 0] != model(other)[0, 0]).any(), 'each position sees all'
        tokens = torch.arange(1, 70).numpy()
        x, y = module(code / 'data.py').windows(tokens, 32, range(4))
        masked = y != IGNORE
        assert masked.sum(1).tolist() == [5, 5, 1, 0] and (x[masked] == 0).all()
        expected = (torch.arange(4)[:, None] * 32 + torch.arange(1, 33))[masked]
        assert (y[masked] == expected).all()


def test_the_plan_that_the_readme_shows_is_what_is_printed(run):
    readme = (ROOT / 'README.md').read_text()
    pattern = r'    python train.py (config/.*--plan .*)\n\n[^$]*?\n\n((    .+\n)+)'
    command, shown = re.search(pattern, readme).group(1, 2)
    config, *flags = command.split()
    printed = run('train.py', str(ROOT / config), *flags).out.splitlines()
    lines = [line.removeprefix('    ') for line in shown.splitlines()]
    assert lines[-1] == '...' and lines[:-1] == printed[: len(lines) - 1] and len(lines) > 6


def test_nothing_is_left_to_be_filled_in():
    for path in (*ROOT.glob('*.md'), *ROOT.glob('*.py'), *ROOT.glob('config/*.py')):
        assert not re.search(r'@[A-Z]+\b|@$|TODO|FIXME', path.read_text(), re.MULTILINE), path


def test_the_walkthrough_is_committed_as_it_ran():
    code = [cell for cell in WALKTHROUGH.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == 'error']
    assert sum(bool(cell.outputs) for cell in code) >= len(code) - 1, 'they show something'
    assert sum('image/png' in output.get('data', {}) for cell in code for output in cell.outputs) >= 4
    assert (ROOT / 'walkthrough.ipynb').stat().st_size < 500_000
    assert all(len(line) <= 120 for cell in code for line in cell.source.splitlines())
    text = json.dumps(WALKTHROUGH)
    assert str(ROOT) not in text and '/tmp/' not in text and '/home/' not in text


@pytest.mark.slow  # it trains for half a minute
def test_the_walkthrough_runs_from_a_clean_kernel(tmp_path, monkeypatch):
    for path in ROOT.glob('*.py'):
        shutil.copy(path, tmp_path)
    for folder in ('config', 'corpus'):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.delenv('OMP_NUM_THREADS')
    notebook = nbformat.read(ROOT / 'walkthrough.ipynb', 4)
    printed = printed_by(notebook)
    NotebookClient(notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': tmp_path}}).execute()
    # The same figures, but for speeds and the last digits
    for before, after in zip(printed, printed_by(notebook), strict=True):
        if 'tokens/s' not in before:
            assert rounded(after) == rounded(before)


def printed_by(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    return [''.join(o.text for o in cell.outputs if o.get('name') == 'stdout') for cell in code]


def rounded(text):
    return [round(float(number), 1) for number in re.findall(r'\d+\.\d+(?![\de])', text)]

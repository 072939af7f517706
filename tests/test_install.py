"""Installing: by uv where it is there and works, else by pip; one list of packages for all."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

# It notes what it is called with, and as `python -m venv` makes an environment like itself.
PYTHON = """#!/bin/sh
echo "$*" >> "$CALLS"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""
UV = '#!/bin/sh\necho "uv $*" >> "$CALLS"\nexit {}\n'


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.skipif(shutil.which('make') is None, reason='there is no make here')
@pytest.mark.parametrize('uv', ['none', 'works', 'cannot reach its index'])
def test_make_installs_with_uv_or_else_with_pip(tmp_path, uv):
    for name in ('Makefile', 'requirements.txt', 'requirements-dev.txt'):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / 'tools'
    tools.mkdir()
    for name in ('sh', 'mkdir', 'cp', 'touch', 'echo', 'make'):
        (tools / name).symlink_to(shutil.which(name))
    program(tools / 'python3', PYTHON)
    if uv != 'none':
        program(tools / 'uv', UV.format(int(uv != 'works')))
    calls = tmp_path / 'calls'
    env = {'PATH': str(tools), 'CALLS': str(calls)}
    for _ in range(2):  # the second time there is nothing to do
        line = [tools / 'make', '.venv/installed-dev']
        subprocess.run(line, cwd=tmp_path, env=env, check=True, capture_output=True)
    called = calls.read_text()
    for file in ('requirements.txt', 'requirements-dev.txt'):
        by_uv = f'uv pip install --python .venv/bin/python --torch-backend=auto -r {file}\n'
        by_pip = f'-m pip install --disable-pip-version-check -r {file}\n'
        assert called.count(by_uv) == (uv != 'none')
        assert called.count(by_pip) == (uv != 'works')


def test_a_project_of_uv_has_the_packages_of_the_lists(tmp_path):
    """As setuptools, which uv sync asks, reads them."""
    for pattern in ('pyproject.toml', 'requirements*.txt', '*.py'):
        for path in ROOT.glob(pattern):
            shutil.copy(path, tmp_path)
    code = 'from setuptools.build_meta import *; print(prepare_metadata_for_build_wheel("."))'
    line = [sys.executable, '-c', code]
    result = subprocess.run(line, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / result.stdout.splitlines()[-1]
    metadata = (folder / 'METADATA').read_text()
    found = re.findall(r'^Requires-Dist: (.*)$', metadata, re.MULTILINE)
    dev = [line.partition(';')[0].strip() for line in found if 'extra' in line]
    always = [line for line in found if 'extra' not in line]
    for name, packages in (('requirements.txt', always), ('requirements-dev.txt', dev)):
        lines = (ROOT / name).read_text().splitlines()
        assert sorted(packages) == sorted(line for line in lines if not line.startswith('#'))
    assert (folder / 'top_level.txt').read_text().strip() == ''  # no file becomes a package

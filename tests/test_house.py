"""The house itself: its size, and who knows whom."""

import ast
import re

from conftest import ROOT

PRODUCT = sorted(ROOT.glob('*.py'))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def needs(script):
    """A script and all of the project that it imports, so what one reads to know what it does."""
    names, ours = [script], {path.stem for path in PRODUCT}
    for name in names:
        names += sorted(ours & set(imports(ROOT / f'{name}.py')) - set(names))
    return names


def test_the_code_stays_within_its_line_budget():
    lines = {path.stem: len(path.read_text().splitlines()) for path in PRODUCT}
    assert lines['train'] <= 420 and lines['model'] <= 520, lines
    # What trains, read in an evening; and each script beside it, with the modules that only it needs.
    trainer = set(needs('train')) - {'plan'}
    assert sum(lines[name] for name in trainer) <= 2050
    for script, limit in {'prepare': 520, 'sample': 240, 'bench': 320}.items():
        own = set(needs(script)) - trainer - ({'sample'} if script == 'bench' else set())
        assert sum(lines[name] for name in own) <= limit, script
    assert lines['plan'] <= 160
    assert set(lines) == trainer | {'plan'} | set(needs('prepare')) | set(needs('sample')) | {'bench'}


def test_the_model_can_be_copied_out_alone_and_nobody_imports_the_loop():
    ours = {path.stem for path in PRODUCT}
    assert not ours & set(imports(ROOT / 'model.py'))
    for path in PRODUCT:
        assert 'train' not in set(imports(path)), path.name
        assert 'documents' not in set(imports(path)) or path.stem == 'prepare'


def test_nothing_is_unpickled_but_weights():
    for path in PRODUCT:
        text = path.read_text()
        assert 'pickle' not in text and 'allow_pickle=True' not in text, path.name
        assert text.count('torch.load(') == text.count('weights_only=True)'), path.name


def test_the_tests_that_the_readme_names_exist():
    named = set(re.findall(r'`(test_\w+)`', (ROOT / 'README.md').read_text()))
    there = {name for file in (ROOT / 'tests').glob('*.py') for name in re.findall(r'def (test_\w+)', file.read_text())}
    assert len(named) > 10 and named <= there

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


# Together they are what trains, to be read in an evening; the others stand beside it.
TRAINER = {
    'configurator': 225, 'tokenizer': 200, 'data': 168, 'model': 520, 'muon': 62, 'checkpoint': 190, 'parallel': 187,
    'train': 420,
}  # fmt: skip
BESIDE = {'prepare': 210, 'documents': 310, 'sample': 245, 'evaluate': 350, 'report': 310, 'plot': 120, 'plan': 160,
          'bench': 320}  # fmt: skip


def test_the_code_stays_within_its_line_budget():
    lines = {path.stem: len(path.read_text().splitlines()) for path in PRODUCT}
    limits = TRAINER | BESIDE
    assert lines.keys() == limits.keys()
    assert all(lines[name] <= limits[name] for name in lines), lines
    assert sum(lines[name] for name in TRAINER) <= 1970


def test_the_model_can_be_copied_out_alone_and_nobody_imports_the_loop():
    ours = {path.stem for path in PRODUCT}
    assert not ours & set(imports(ROOT / 'model.py'))
    for path in PRODUCT:
        assert 'train' not in set(imports(path)), path.name
        assert 'documents' not in set(imports(path)) or path.stem in ('prepare', 'evaluate')


def test_nothing_is_unpickled_but_weights():
    for path in PRODUCT:
        text = path.read_text()
        assert 'pickle' not in text and 'allow_pickle=True' not in text, path.name
        assert text.count('torch.load(') == text.count('weights_only=True)'), path.name


def test_the_tests_that_the_readme_names_exist():
    texts = (ROOT / 'README.md').read_text() + (ROOT / 'BENCHMARKS.md').read_text()
    named = set(re.findall(r'`(test_\w+)`', texts))
    there = {name for file in (ROOT / 'tests').glob('*.py') for name in re.findall(r'def (test_\w+)', file.read_text())}
    assert len(named) > 10 and named <= there

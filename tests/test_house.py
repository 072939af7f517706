"""The house rules: how large the code may be, what a line may hold, who may import whom.

A rule is a function from source text to findings. The house is to have none, and each rule is
given a small example that breaks it, so that a rule that finds nothing any more is noticed.
"""

import ast
import io
import re
import tokenize

import pytest
from conftest import ROOT

PRODUCT = {path.stem: path.read_text() for path in sorted(ROOT.glob('*.py'))}
TESTS = {path.stem: path.read_text() for path in sorted((ROOT / 'tests').glob('*.py'))}
# model.py is two rooms in one file, so that it can be copied alone: the model, and file formats.
FORMATS_BANNER = '# weights in and out: folders'  # the begin of the line
ROOMS = {name: source for name, source in PRODUCT.items() if name != 'model'}
ROOMS['model'], rest = PRODUCT['model'].split(FORMATS_BANNER)
ROOMS['model, file formats'] = '#' + rest
DOCUMENTS = ('README.md', 'BENCHMARKS.md', 'CONTRIBUTING.md', 'SECURITY.md')

MOST_LINES = 6900  # of code, in all product files together
MOST_LINES_OF_A_FILE = 450
MOST_LINES_OF_A_FUNCTION = 60
MOST_COLUMNS = 100
LONGEST_TEST_NAME = 60

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)  # comprehensions
COMPUTATIONS = (ast.Call, ast.BinOp, ast.IfExp, *LOOPS)


# -----------------------------------------------------------------------------
# size


def code_lines(source):
    """The numbers of the lines that hold code: no blank lines, comments or docstrings."""
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def too_much_code(sources, most=MOST_LINES):
    counts = {name: len(code_lines(source)) for name, source in sources.items()}
    total = sum(counts.values())
    if total > most:
        return [f'{total} lines of code in all, at most {most}: {counts}']
    return []


def too_long_a_file(source):
    count = len(code_lines(source))
    if count > MOST_LINES_OF_A_FILE:
        return [f'{count} lines of code, at most {MOST_LINES_OF_A_FILE}']
    return []


def too_long_functions(source):
    lines = code_lines(source)
    findings = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS):
            count = len(lines.intersection(range(node.lineno, node.end_lineno + 1)))
            if count > MOST_LINES_OF_A_FUNCTION:
                findings.append(f'{node.name}: {count} lines, at most {MOST_LINES_OF_A_FUNCTION}')
    return findings


def too_wide_lines(source):
    wide = [n for n, line in enumerate(source.splitlines(), 1) if len(line) > MOST_COLUMNS]
    return [f'line {n} is wider than {MOST_COLUMNS} columns' for n in wide]


def test_what_counts_as_a_line_of_code():
    source = '''"""A file's docstring,
in two lines."""

import os  # 4


def f(x):  # 7
    """A docstring."""
    # A comment.

    y = """text, not
    a docstring"""  # 11 and 12
    return (  # 13
        # a comment inside
        x + y  # 15
    )  # 16
'''
    assert code_lines(source) == {4, 7, 11, 12, 13, 15, 16}


def test_all_the_code_stays_within_one_budget():
    assert not too_much_code(PRODUCT)
    assert too_much_code({'a': 'x = 1\ny = 2\n', 'b': 'z = 3\n'}, most=2)
    assert not too_much_code({'a': 'x = 1\n# y\n\n', 'b': 'z = 3\n'}, most=2)


# -----------------------------------------------------------------------------
# one idea per line


def holds(node, kinds):
    """Whether there is a node of one of these kinds inside another."""
    return any(isinstance(child, kinds) for child in ast.walk(node) if child is not node)


def is_nested_conditional(node):
    return isinstance(node, ast.IfExp) and holds(node, ast.IfExp)


def is_nested_comprehension(node):
    return isinstance(node, LOOPS) and holds(node, LOOPS)


def what_is_called(call):
    """The name of a function or method. Methods named for q, k and v are one: q_norm, k_norm."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr.strip('qkv_')
    return ast.dump(call.func)


def is_two_computations(node):
    """a, b = f(x), g(y); not q, k = rotate(q), rotate(k), which is one thing done to two."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    if not isinstance(node.targets[0], ast.Tuple):
        return False
    values = node.value.elts
    if any(isinstance(value, (ast.IfExp, *LOOPS)) for value in values):
        return True
    if all(isinstance(value, ast.Call) for value in values):
        return len({what_is_called(value) for value in values}) > 1
    return sum(isinstance(value, COMPUTATIONS) for value in values) > 1


def is_truth_as_index(node):
    return isinstance(node, ast.Slice) and holds(node, ast.Compare)


def is_truth_as_number(node):
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
        return False
    return isinstance(node.left, ast.Compare) or isinstance(node.right, ast.Compare)


def is_logic_in_text(node):
    return isinstance(node, ast.FormattedValue) and holds(node, (ast.IfExp, *LOOPS))


STUMBLES = {
    is_nested_conditional: 'a conditional inside a conditional',
    is_nested_comprehension: 'a comprehension inside a comprehension',
    is_two_computations: 'two computations in one assignment',
    is_truth_as_index: 'a truth value as an index',
    is_truth_as_number: 'a truth value as a number',
    is_logic_in_text: 'logic inside an f-string',
}


def several_ideas(source):
    """The lines where a reader stumbles, and over what."""
    findings = set()
    for node in ast.walk(ast.parse(source)):
        for is_stumble, why in STUMBLES.items():
            if is_stumble(node):
                findings.add(f'line {node.lineno}: {why}')
    return sorted(findings)


@pytest.mark.parametrize(
    ('line', 'why'),
    [
        ('x = a if b else c if d else e', 'a conditional inside a conditional'),
        ('x = [y for y in (z + 1 for z in w)]', 'a comprehension inside a comprehension'),
        ('a, b = f(x), g(y)', 'two computations in one assignment'),
        ('a, b = f(x), y + 1', 'two computations in one assignment'),
        ('a, b = 1, [x for x in y]', 'two computations in one assignment'),
        ('a, b = 1, 2 if c else 3', 'two computations in one assignment'),
        ('x = y[z == 0 :]', 'a truth value as an index'),
        ('x = 1 + (y > z)', 'a truth value as a number'),
        ('x = (y > z) * 2', 'a truth value as a number'),
        ("x = f'{a if b else c}'", 'logic inside an f-string'),
        ("x = f'{max(len(y) for y in z)}'", 'logic inside an f-string'),
    ],
)
def test_a_line_with_several_ideas_is_found(line, why):
    assert several_ideas(f'first = 1\n{line}\n') == [f'line 2: {why}']


@pytest.mark.parametrize(
    'line',
    [
        'x = a if b else c',
        'x = [y for y in z if y]',
        'a, b = b, a + b',
        'a, b = 1, f(x)',
        'q, k = rotate(q), rotate(k)',
        'q, k = self.q_norm(q), self.k_norm(k)',
        'x = y[z + 1 :]',
        'x = y > z + 1',
        "x = f'{y:,}'",
    ],
)
def test_a_line_with_one_idea_is_left_alone(line):
    assert not several_ideas(line)


# -----------------------------------------------------------------------------
# rooms: a script has knobs, is run, and is imported by nobody


def is_script(source):
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return any(ast.unparse(call).startswith('configure(globals()') for call in calls)


def imports(source):
    """The names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def imports_of_scripts(sources):
    scripts = {name for name, source in sources.items() if is_script(source)}
    findings = []
    for name, source in sources.items():
        for script in sorted(scripts & imports(source)):
            findings.append(f'{name} imports the script {script}')
    return findings


def knobs_and_main(source):
    """What only a script may have, in a module: knobs, and a part that runs when it is run.

    A knob is a plain public variable. One that a function of the module changes is no knob.
    """
    tree = ast.parse(source)
    changed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            changed.update(node.names)
    findings = []
    for node in tree.body:
        names = []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        for name in names:
            is_public = name == name.lower() and not name.startswith('_') and name not in changed
            if is_public and isinstance(node.value, ast.Constant):
                findings.append(f'line {node.lineno}: {name} looks like a knob')
        if isinstance(node, ast.If) and "'__main__'" in ast.unparse(node.test):
            findings.append(f'line {node.lineno}: only a script has a main')
    return findings


def test_scripts_are_imported_by_nobody():
    scripts = {name for name, source in PRODUCT.items() if is_script(source)}
    assert scripts == {'prepare', 'train', 'sample', 'evaluate', 'export', 'plot', 'bench'}
    assert not imports_of_scripts(PRODUCT)
    script = 'seed = 1\nconfig = configure(globals())\n'
    for line in ('import train', 'from train import seed', 'def f():\n    import train as t'):
        assert imports_of_scripts({'train': script, 'other': line}) == [
            'other imports the script train'
        ]
    assert not imports_of_scripts({'train': script, 'other': 'import training'})


def test_modules_have_neither_knobs_nor_a_main():
    for name, source in PRODUCT.items():
        if not is_script(source):
            assert not knobs_and_main(source), name
    assert knobs_and_main('LIMIT = 1\nseed = 1\n') == ['line 2: seed looks like a knob']
    assert knobs_and_main('seed: int | None = None\n') == ['line 1: seed looks like a knob']
    assert knobs_and_main("if __name__ == '__main__':\n    main()\n")
    assert not knobs_and_main('stop = 0\n\n\ndef f():\n    global stop\n    stop = 1\n')


def test_model_imports_nothing_of_the_project():
    assert 'torch' in imports(PRODUCT['model'])
    assert not imports(PRODUCT['model']) & PRODUCT.keys()
    assert imports('def f():\n    from runtime import UserError\n') & PRODUCT.keys()


def test_training_and_sampling_do_without_documents():
    readers = {name for name, source in PRODUCT.items() if 'documents' in imports(source)}
    assert readers == {'prepare', 'evaluate'}


# -----------------------------------------------------------------------------
# safety, names, documents


def unpickling(source):
    """Ways to run what a data file holds."""
    findings = re.findall(r'.*pickle.*', source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == 'torch':
            findings += [ast.unparse(node) for alias in node.names if alias.name == 'load']
        if isinstance(node, ast.Call) and ast.unparse(node.func) == 'torch.load':
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if options.get('weights_only') != 'True':
                findings.append(ast.unparse(node))
    return findings


def missing_docstring(source):
    if ast.get_docstring(ast.parse(source)):
        return []
    return ['the file does not say what it is for']


def too_long_test_names(source):
    names = re.findall(r'^ *def (test_\w+)', source, re.MULTILINE)
    return [name for name in names if len(name) > LONGEST_TEST_NAME]


def missing_tests(text, sources):
    """The tests that a text names, `test_like_this`, and no file has."""
    there = set()
    for source in sources.values():
        there.update(re.findall(r'^def (test_\w+)', source, re.MULTILINE))
    return sorted(set(re.findall(r'`(test_\w+)`', text)) - there)


def test_the_tests_that_the_documents_name_exist():
    text = ''.join((ROOT / name).read_text() for name in DOCUMENTS)
    assert len(re.findall(r'`test_\w+`', text)) > 10
    assert not missing_tests(text, TESTS)
    assert missing_tests('see `test_b`', {'test_x': 'def test_a():\n'}) == ['test_b']


# -----------------------------------------------------------------------------
# the rules that each file keeps by itself

LONG_FUNCTION = 'def f(x):\n' + '    x = x + 1\n' * MOST_LINES_OF_A_FUNCTION
LONG_NAME = 'test_' + 'x' * (LONGEST_TEST_NAME - 4)
RULES = {  # rule: (the files that keep it, an example that breaks it, one that just keeps it)
    too_long_a_file: (ROOMS, 'x = 1\n' * 451, 'x = 1\n' * 450 + '# two\n'),
    too_long_functions: (PRODUCT, LONG_FUNCTION, LONG_FUNCTION.replace('x = x + 1', '# one', 1)),
    too_wide_lines: (PRODUCT | TESTS, '# ' + 'x' * 99, '# ' + 'x' * 98),
    several_ideas: (PRODUCT | TESTS, 'x = 1 + (y > z)\n', 'x = 1 + y\n'),
    unpickling: (PRODUCT, 'torch.load(file)\n', 'torch.load(file, weights_only=True)\n'),
    missing_docstring: (PRODUCT | TESTS, '# A comment.\n', '"""A docstring."""\n'),
    too_long_test_names: (TESTS, f'def {LONG_NAME}():\n', f'def {LONG_NAME[:-1]}():\n'),
}


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
    files, _, _ = RULES[rule]
    findings = []
    for name, source in files.items():
        findings += [f'{name}: {finding}' for finding in rule(source)]
    assert not findings, '\n'.join(findings)


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_a_rule_that_is_broken_is_found(rule):
    _, bad, good = RULES[rule]
    assert len(rule(bad)) == 1
    assert not rule(good)


@pytest.mark.parametrize(
    'line',
    [
        'import pickle',
        'np.load(file, allow_pickle=True)',
        'torch.load(file, weights_only=False)',
        "torch.load(\n    file,\n    map_location='cpu',\n)",
        'from torch import load',
    ],
)
def test_every_way_to_unpickle_is_found(line):
    assert unpickling(line)

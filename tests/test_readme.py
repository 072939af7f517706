"""What the README and the walkthrough show is what happens."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import types

import nbformat
import pytest
import torch
from conftest import ROOT, losses, same, train, weights
from nbclient import NotebookClient
from transformers import AutoConfig, AutoModelForCausalLM

import dial
from configurator import configure
from data import IGNORE

README = (ROOT / 'README.md').read_text()
CONTRIBUTING = (ROOT / 'CONTRIBUTING.md').read_text()
PATCHES = {path.stem: path.read_text() for path in (ROOT / 'tests' / 'hacks').glob('*.diff')}
SCRIPTS = ('prepare', 'train', 'sample', 'evaluate', 'export', 'plot', 'bench')
WALKTHROUGH = nbformat.read(ROOT / 'walkthrough.ipynb', 4)


# -----------------------------------------------------------------------------
# the hacks: each patch is applied to a copy of the files, and trains


@pytest.fixture
def hacked(tmp_path):
    """hacked(name) -> a folder with the product's files, changed by tests/hacks/NAME.diff."""

    def hacked(name):
        code = tmp_path / 'code'
        code.mkdir()
        for path in ROOT.glob('*.py'):
            shutil.copy(path, code)
        patch = ROOT / 'tests' / 'hacks' / f'{name}.diff'
        result = subprocess.run(['git', 'apply', patch], cwd=code, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return code

    return hacked


@pytest.fixture
def learn(run, sheep, tmp_path):
    """Train with changed files until the loss is halved. Returns the variables of train.py."""

    def learn(code, *flags):
        steps = ['--max_iters=150', '--eval_interval=150', '--log_interval=150']
        result = train(run, *steps, *flags, folder=code)
        assert not result.err
        val_loss = losses(tmp_path / 'out')
        assert val_loss[150] < 0.5 * val_loss[0]
        return result.globals

    return learn


@pytest.fixture
def trained(tmp_path):
    """The folder of the checkpoint that learn() leaves."""
    return tmp_path / 'out' / 'step_00000150'


def test_hack_activation_is_saved_as_what_it_is(hacked, learn, trained):
    GPT = learn(hacked('activation'), '--learning_rate=1e-2')['GPT']
    theirs = AutoModelForCausalLM.from_pretrained(trained)
    assert theirs.config.activation_function == 'relu2'
    idx = torch.arange(32)[None] * 5
    logits = GPT.from_pretrained(trained).eval()(idx)
    torch.testing.assert_close(logits[..., :257], theirs(idx).logits, atol=1e-4, rtol=1e-4)


def test_hack_lion_takes_the_steps_of_the_paper(hacked, learn):
    Lion = learn(hacked('lion'), '--learning_rate=2e-3')['optim'].Lion
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5, 3))
    expected = parameter.detach().double().clone()
    momentum = torch.zeros(5, 3).double()
    lion = Lion([{'params': [parameter], 'weight_decay': 0.1}], {'lr': 0.02})
    for _ in range(5):
        gradient = torch.randn(5, 3)
        parameter.grad = gradient.clone()
        lion.step()
        # Algorithm 2 with its default betas
        direction = 0.9 * momentum + 0.1 * gradient
        expected = expected - 0.02 * (direction.sign() + 0.1 * expected)
        momentum = 0.99 * momentum + 0.01 * gradient
        torch.testing.assert_close(parameter.double(), expected, atol=1e-5, rtol=1e-5)

    before = parameter.detach().clone()
    momentum = lion.state[parameter]['exp_avg'].clone()
    parameter.grad = torch.full((5, 3), math.nan)
    lion.found_inf = torch.ones(())
    lion.step()
    assert torch.equal(parameter, before), 'a step that is skipped changes nothing'
    assert torch.equal(lion.state[parameter]['exp_avg'], momentum)


def test_hack_lion_resumes_to_the_same_weights(run, sheep, hacked, tmp_path):
    code = hacked('lion')
    flags = ['--learning_rate=2e-3', '--lr_decay_iters=4']
    train(run, *flags, '--max_iters=4', folder=code, out='whole')
    train(run, *flags, '--max_iters=2', folder=code, out='halves')
    train(run, *flags, '--max_iters=4', '--init_from=resume', folder=code, out='halves')
    assert same(weights(tmp_path / 'halves', 4), weights(tmp_path / 'whole', 4))


def test_hack_masked_hides_its_targets_and_sees_all(hacked, learn, trained):
    flags = ['--arch=qwen3', '--optimizer=muon', '--learning_rate=1e-2']
    variables = learn(hacked('masked'), *flags)
    model = variables['GPT'].from_pretrained(trained).eval()
    idx = torch.arange(32)[None] * 5
    other = idx.clone()
    other[0, -1] += 1
    assert (model(idx)[0, 0] != model(other)[0, 0]).any(), 'each position sees all'
    assert not opens_in_transformers(trained)

    tokens = torch.arange(1, 70).numpy()
    data = variables['Mixture'].__init__.__globals__  # the hacked data.py
    x, y = data['get_batch'](tokens, 32, range(4))
    masked = y != IGNORE
    assert masked.sum(1).tolist() == [5, 5, 1, 0]
    assert (x[masked] == 0).all()
    expected = torch.arange(4)[:, None] * 32 + torch.arange(1, 33)
    assert (y[masked] == expected[masked]).all()
    assert data['count_targets'](tokens, 32, range(0, 128, 32)) == 11


ALIBI = ['--arch=qwen3', '--n_head=4', '--n_kv_head=2', '--positions=alibi', '--learning_rate=1e-2']


def test_hack_alibi_is_the_attention_of_the_paper(hacked, learn, trained):
    GPT = learn(hacked('alibi'), *ALIBI)['GPT']
    model = GPT.from_pretrained(trained).eval()
    layer = model.blocks[1].attn
    seen = []
    layer.register_forward_hook(lambda layer, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(torch.arange(32)[None] * 5)
        (x, output) = seen[0]
        torch.testing.assert_close(output[0], naive_alibi(layer, x[0]), atol=1e-5, rtol=1e-4)


def naive_alibi(layer, x):
    """Attention with ALiBi (section 3 of the paper), one query of one head at a time; x (T, C)."""
    H, KV, D = layer.config.n_head, layer.config.n_kv_head, layer.config.head_dim
    q, k, v = layer.qkv(x).split(layer.qkv.out_sizes, -1)
    y = torch.zeros(len(x), H * D)
    for head in range(H):
        shared = head // (H // KV)
        queries = layer.q_norm(q[:, head * D : (head + 1) * D])
        keys = layer.k_norm(k[:, shared * D : (shared + 1) * D])
        values = v[:, shared * D : (shared + 1) * D]
        slope = 2 ** (-8 * (head + 1) / H)
        for i in range(len(x)):
            scores = keys[: i + 1] @ queries[i] / math.sqrt(D)
            scores -= slope * torch.arange(i, -1, -1)
            y[i, head * D : (head + 1) * D] = scores.softmax(0) @ values[: i + 1]
    return layer.proj(y)


def test_hack_alibi_generates_evaluates_and_saves_alike(run, hacked, learn, trained, tmp_path):
    code = hacked('alibi')
    GPT = learn(code, *ALIBI)['GPT']
    model = GPT.from_pretrained(trained).eval()
    prompt = torch.tensor([list(b'12 sheep jumped')])
    tokens = prompt
    with torch.no_grad():
        for _ in range(30):  # until after the context is full
            logits = model(tokens[:, -32:])[:, -1]
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
    cached = torch.cat((prompt, *model.generate(prompt, 30, temperature=0)), 1)
    assert cached.tolist() == tokens.tolist()

    flags = ['--out_dir=out', '--device=cpu', '--dtype=float32', '--format=json']
    result = run('evaluate.py', *flags, folder=code)
    assert result.code == 0, result.err
    evaluated = json.loads(result.out)['text']['loss']
    assert evaluated == pytest.approx(losses(tmp_path / 'out')[150], abs=1e-6)
    assert not opens_in_transformers(trained)

    gpt2 = train(run, '--positions=alibi', folder=code, out='gpt2', code=1)
    assert gpt2.is_one_sentence
    plan = train(run, *ALIBI, '--dtype=auto', '--plan', folder=code)  # for a GPU, in 16 bits
    assert 'bfloat16' in plan.out
    plain = train(run, '--arch=qwen3', '--max_iters=1', folder=code, out='plain')
    assert plain.globals['model'].config.positions == 'default'
    assert opens_in_transformers(tmp_path / 'plain' / 'step_00000001')


def test_hack_z_loss_is_for_training_only(run, hacked, learn, tmp_path):
    code = hacked('z_loss')
    learn(code, '--learning_rate=1e-2')
    flags = ['--max_iters=1', '--log_interval=1']
    train(run, *flags, out='plain')
    train(run, *flags, out='z_loss', folder=code)
    plain = tmp_path / 'plain'
    z_loss = tmp_path / 'z_loss'
    added = losses(z_loss, 'loss')[1] - losses(plain, 'loss')[1]
    assert added == pytest.approx(1e-4 * math.log(257) ** 2, rel=0.01), 'of 257 equal logits'
    assert losses(z_loss)[0] == losses(plain)[0]


def opens_in_transformers(folder):
    try:
        AutoConfig.from_pretrained(folder)
    except ValueError:
        return False
    return True


def test_the_readme_shows_the_lines_that_the_hacks_change():
    (shown,) = re.findall(r'^```diff\n(.*?)^```', README, re.MULTILINE | re.DOTALL)
    sections = re.split(r'^# (\w+)\.diff: .*$', shown, flags=re.MULTILINE)
    names = sections[1::2]
    assert sorted(names) == sorted(PATCHES)
    for name, lines in zip(names, sections[2::2], strict=True):
        patch = iter(changed_lines(PATCHES[name]))
        for line in changed_lines(lines):
            assert line in patch, f'{name}: {line}, in this order'


def changed_lines(diff):
    """The lines that a diff removes and adds, without their indentation and comments."""
    lines = []
    for sign, line in re.findall(r'^([+-])(?![+-]{2} )(.*)$', diff, re.MULTILINE):
        code = line.partition('  # ')[0].strip()
        if code:
            lines.append(sign + code)
    return lines


# -----------------------------------------------------------------------------
# the README


def commands(text):
    """The commands in the sh blocks and in the code spans of a text, each a list of words."""
    lines = []
    for block in re.findall(r'^ *```sh\n(.*?)^ *```', text, re.MULTILINE | re.DOTALL):
        lines += block.replace('\\\n', ' ').splitlines()
    without_blocks = re.sub(r'^ *```.*?^ *```', '', text, flags=re.MULTILINE | re.DOTALL)
    lines += [span.replace('\n', ' ') for span in re.findall(r'`([^`]+)`', without_blocks)]
    return [shlex.split(part, comments=True) for line in lines for part in line.split('&&')]


def script_and_args(words):
    """(name of our script, its arguments) of a command; (None, []) of one that runs no script."""
    for i, word in enumerate(words):
        name = word.removesuffix('.py')
        if name in SCRIPTS and word.endswith('.py') and i > 0:
            return name, words[i + 1 :]
    return None, []


def knobs_of(script):
    """A module with the imports and the knobs of a script, which end at its second ruler."""
    source = (ROOT / f'{script}.py').read_text()
    imports, knobs, _ = source.split('# ' + '-' * 77 + '\n', 2)
    module = types.ModuleType(f'knobs_of_{script}')
    exec(imports + knobs, vars(module))
    return module


@pytest.mark.parametrize('text', [README, CONTRIBUTING], ids=['README', 'CONTRIBUTING'])
def test_the_commands_name_knobs_and_configs_that_exist(monkeypatch, text):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(dial, 'choose', lambda config: {})  # from a text, and how fast this CPU is
    checked = 0
    for words in commands(text):
        script, args = script_and_args(words)
        # What bench.py compares are files of train.py.
        kinds = '--' if script == 'bench' else ('--', 'config/')
        args = [arg for arg in args if arg.startswith(kinds)]
        if script is None or not args:
            continue
        module = knobs_of(script)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
        configure(vars(module), args)  # UserError where a name or a value is wrong
        checked += 1
    assert checked > 15 or text is CONTRIBUTING


def test_every_flag_in_the_prose_is_a_knob():
    others = {'help', 'nproc_per_node', 'standalone'}
    others |= {'positions', 'include'}  # a hack's, and that of the Hub's own command
    others |= {'model', 'model_args', 'tasks', 'prompt'}  # of other engines
    knobs = set().union(*(vars(knobs_of(script)) for script in SCRIPTS))
    flags = set(re.findall(r'(?<![\w-])--([a-z]\w*)(?![\w-])', README))
    assert flags - others <= knobs


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 300
    assert not [line for line in lines if len(line) > 120 and not line.startswith('|')]


def test_its_links_lead_somewhere():
    for path in ROOT.glob('*.md'):
        text = path.read_text()
        for target in re.findall(r'\]\(([^)\s]+)\)', text):
            if target.startswith('http'):
                continue
            name, _, anchor = target.partition('#')
            linked = ROOT / (name or path.name)
            assert linked.exists(), target
            if anchor:
                assert anchor in anchors(linked), target


def anchors(path):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r'^#+ (.*)$', path.read_text(), re.MULTILINE)
    return [re.sub(r'[^\w -]', '', heading).lower().replace(' ', '-') for heading in headings]


def test_every_recipe_is_in_the_readme():
    for path in ROOT.glob('config/*.py'):
        assert f'`{path.name}`' in README, path.name


def test_the_plan_that_the_readme_shows_is_what_is_printed(run):
    pattern = r'^\$ python train.py (config/.*--plan .*)\n((?:.+\n)+?)\.\.\.\n```'
    ((command, shown),) = re.findall(pattern, README, re.MULTILINE)
    config, *flags = command.split()
    printed = run('train.py', str(ROOT / config), *flags).out.splitlines()
    lines = shown.splitlines()
    assert len(lines) > 5
    assert lines == printed[: len(lines)]


def test_nothing_is_left_to_be_filled_in():
    for path in (*ROOT.glob('*.md'), *ROOT.glob('*.py'), *ROOT.glob('config/*.py')):
        marks = r'@[A-Z]+\b|@$|TODO|FIXME|DEMO_OUTPUT'
        assert not re.search(marks, path.read_text(), re.MULTILINE), path


# -----------------------------------------------------------------------------
# the walkthrough


def test_the_walkthrough_is_committed_as_it_ran():
    code = [cell for cell in WALKTHROUGH.cells if cell.cell_type == 'code']
    outputs = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for output in outputs if output.output_type == 'error']
    silent = [cell for cell in code if not cell.outputs]
    assert len(silent) <= 1, 'they show something'
    pictures = [output for output in outputs if 'image/png' in output.get('data', {})]
    assert len(pictures) >= 4
    assert (ROOT / 'walkthrough.ipynb').stat().st_size < 500_000
    assert all(len(line) <= 120 for cell in code for line in cell.source.splitlines())
    text = json.dumps(WALKTHROUGH)
    for place in (str(ROOT), '/tmp/', '/home/'):
        assert place not in text


@pytest.mark.slow  # it trains for half a minute
def test_the_walkthrough_runs_from_a_clean_kernel(tmp_path, monkeypatch):
    for path in ROOT.glob('*.py'):
        shutil.copy(path, tmp_path)
    for folder in ('config', 'corpus'):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.delenv('OMP_NUM_THREADS')
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')  # there is nobody
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hub'))
    notebook = nbformat.read(ROOT / 'walkthrough.ipynb', 4)
    printed = printed_by(notebook)
    place = {'metadata': {'path': tmp_path}}
    NotebookClient(notebook, timeout=600, kernel_name='python3', resources=place).execute()
    # The same figures, but for speeds, the last digits, and those of a model of the Hub
    for before, after in zip(printed, printed_by(notebook), strict=True):
        if 'tokens/s' not in before:
            assert rounded(after) == rounded(before)


def printed_by(notebook):
    texts = []
    for cell in notebook.cells:
        if cell.cell_type == 'code' and not cell.id.startswith('published'):
            outputs = [output for output in cell.outputs if output.get('name') == 'stdout']
            texts.append(''.join(output.text for output in outputs))
    return texts


def rounded(text):
    return [round(float(number), 1) for number in re.findall(r'\d+\.\d+(?![\de])', text)]

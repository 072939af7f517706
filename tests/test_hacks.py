"""What a hacker adds is trained, saved and read back like the rest, or refused in one sentence.

Small edits are applied to a copy of the product's files, and the copy is run.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, losses, same, train, weights
from transformers import AutoConfig, AutoModelForCausalLM

from model import IGNORE, token_loss

QWEN3 = ['--arch=qwen3', '--learning_rate=1e-2', '--eval_interval=2', '--keep_last=9']


@pytest.fixture
def hack(tmp_path):
    """hack((file, old, new), ...) -> a folder with the product's files, so edited."""
    count = iter(range(100))

    def hack(*edits):
        folder = tmp_path / f'code{next(count)}'
        folder.mkdir()
        for path in ROOT.glob('*.py'):
            shutil.copy(path, folder)
        for name, old, new in edits:
            source = (folder / name).read_text()
            assert source.count(old) == 1, f'{source.count(old)} times in {name}: {old}'
            (folder / name).write_text(source.replace(old, new))
        return folder

    return hack


def in_its_own_process(folder, *args, cwd):
    line = [sys.executable, str(folder / 'train.py'), *args]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300)


def config_of(out, step):
    return json.loads((out / f'step_{step:08d}' / 'config.json').read_text())


def optimizer_state(out, step):
    path = out / f'step_{step:08d}' / 'train_state.pt'
    return torch.load(path, weights_only=True)['optimizer']


def evaluated_loss(run, folder, out):
    flags = [f'--out_dir={out}', '--checkpoint=last', '--device=cpu', '--dtype=float32']
    result = run('evaluate.py', *flags, '--format=json', folder=folder)
    assert result.code == 0, result.err
    return json.loads(result.out)['text']['loss']


def sampled(run, folder, out):
    flags = ['--start=1 sheep', '--temperature=0', '--num_samples=1', '--device=cpu']
    result = run('sample.py', f'--out_dir={out}', '--checkpoint=last', *flags, folder=folder)
    assert result.code == 0, result.err
    return result.out


def transformers_opens(folder):
    try:
        AutoConfig.from_pretrained(folder)
    except ValueError:
        return False
    return True


# -----------------------------------------------------------------------------
# a field of GPTConfig, with a knob of the same name


NO_POSITIONS = [
    ('train.py', 'n_embd = 768', "positions = 'rope'  # or 'none'\nn_embd = 768"),
    (
        'model.py',
        '    tie_weights: bool = True',
        "    positions: str = 'rope'\n    tie_weights: bool = True",
    ),
    (
        'model.py',
        '        x = self.drop(x)\n',
        '        x = self.drop(x)\n'
        "        if self.config.positions == 'none':\n"
        '            rope = None\n',
    ),
]


def test_an_added_field_is_saved_and_comes_back(run, sheep, hack, tmp_path):
    folder = hack(*NO_POSITIONS)
    flags = [*QWEN3, '--positions=none', '--max_iters=4']
    train(run, *QWEN3, '--max_iters=4', folder=folder, out='rope')
    train(run, *flags, folder=folder)
    out = tmp_path / 'out'
    assert losses(out)[4] != losses(tmp_path / 'rope')[4]
    assert config_of(out, 4)['positions'] == 'none'
    assert evaluated_loss(run, folder, 'out') == pytest.approx(losses(out)[4], abs=1e-6)
    assert sampled(run, folder, 'out') != sampled(run, folder, 'rope')

    train(run, *flags, '--max_iters=2', '--lr_decay_iters=4', folder=folder, out='halves')
    resume = ['--init_from=resume', '--lr_decay_iters=4']
    train(run, *flags, *resume, folder=folder, out='halves')
    assert losses(tmp_path / 'halves') == losses(out)
    assert same(weights(tmp_path / 'halves', 4), weights(out, 4))
    other = train(run, *flags, *resume, '--positions=rope', folder=folder, out='halves', code=1)
    assert "positions='none'" in other.err
    assert other.is_one_sentence


def test_transformers_opens_it_only_while_it_is_the_same_model(run, sheep, hack, tmp_path):
    folder = hack(*NO_POSITIONS)
    idx = torch.arange(30)[None]
    for positions in ('rope', 'none'):
        flags = [f'--positions={positions}', '--max_iters=2', *QWEN3]
        result = train(run, *flags, folder=folder, out=positions)
        saved = tmp_path / positions / 'step_00000002'
        config = config_of(tmp_path / positions, 2)
        if positions == 'rope':
            assert config['model_type'] == 'qwen3'
            logits = AutoModelForCausalLM.from_pretrained(saved)(idx).logits
            ours = result.globals['model'].eval()(idx)[..., : logits.shape[-1]]
            assert (ours - logits).abs().max() < 1e-4
        else:
            assert config['model_type'] not in ('gpt2', 'qwen3', 'llama')
            assert 'Qwen3ForCausalLM' not in config['architectures']
            assert not transformers_opens(saved)


def test_a_checkpoint_from_before_the_field_has_its_default(run, sheep, hack, tmp_path):
    train(run, *QWEN3, '--max_iters=2')
    folder = hack(*NO_POSITIONS)
    assert 'positions' not in config_of(tmp_path / 'out', 2)
    before = losses(tmp_path / 'out')[2]
    assert evaluated_loss(run, folder, 'out') == pytest.approx(before, abs=1e-6)
    train(run, *QWEN3, '--max_iters=4', '--init_from=resume', folder=folder)
    assert config_of(tmp_path / 'out', 4)['positions'] == 'rope'
    assert config_of(tmp_path / 'out', 4)['model_type'] == 'qwen3'


def test_a_checkpoint_with_an_unknown_field_is_refused(run, sheep, hack, tmp_path):
    """Without the hack its model would be another one."""
    folder = hack(*NO_POSITIONS)
    train(run, *QWEN3, '--positions=none', '--max_iters=2', folder=folder)
    result = run('evaluate.py', '--out_dir=out', '--device=cpu')
    assert 'positions' in result.err
    assert result.is_one_sentence


@pytest.mark.parametrize(
    ('field', 'name'),
    [
        ('window: tuple = (8, 16)', 'window'),
        ('window: dict = field(default_factory=lambda: {1: 2})', 'window'),
        ('window: object = torch.float32', 'window'),
        ("window: float = float('nan')", 'window'),
    ],
)
def test_a_field_that_json_does_not_give_back_is_refused(run, sheep, hack, tmp_path, field, name):
    folder = hack(
        ('model.py', '    tie_weights: bool = True', f'    {field}\n    tie_weights: bool = True'),
        ('model.py', 'from dataclasses import ', 'from dataclasses import field, '),
    )
    result = train(run, *QWEN3, '--max_iters=2', folder=folder, code=1)
    assert result.is_one_sentence
    assert name in result.err
    assert not list((tmp_path / 'out').glob('step_*'))


# -----------------------------------------------------------------------------
# a parameter


DRAW_ONES = (
    'model.py',
    "            if tensor_name == 'bias':",
    "            if tensor_name == 'scale':\n"
    '                parameter.fill_(1.0)\n'
    "            elif tensor_name == 'bias':",
)
SCALED_BLOCKS = [
    (
        'model.py',
        '        self.mlp = MLP(config)\n',
        '        self.mlp = MLP(config)\n'
        '        self.scale = nn.Parameter(torch.empty(()))\n',
    ),
    ('model.py', 'x + self.drop(self.mlp(', 'x + self.scale * self.drop(self.mlp('),
    DRAW_ONES,
]
SCALED_LOGITS = [
    (
        'model.py',
        '        self.norm_f = make_norm(config, config.n_embd)\n',
        '        self.norm_f = make_norm(config, config.n_embd)\n'
        '        self.head = nn.Module()\n'
        '        self.head.scale = nn.Parameter(torch.empty(config.n_embd))\n',
    ),
    ('model.py', 'return self.norm_f(x)', 'return self.norm_f(x) * self.head.scale'),
    DRAW_ONES,
]
LEARNED_POSITIONS = [
    (
        'model.py',
        "        if config.arch == 'gpt2':\n            self.wpe",
        "        if config.arch != 'gpt2':\n"
        '            self.wpe = nn.Embedding(config.block_size, config.n_embd)\n'
        "        if config.arch == 'gpt2':\n            self.wpe",
    ),
    (
        'model.py',
        '        x = self.drop(x)\n',
        "        if self.config.arch != 'gpt2':\n"
        '            x = x + self.wpe(positions)\n'
        '        x = self.drop(x)\n',
    ),
]
GATED_MLP = [  # an nn.Linear, which has no out_sizes, and a matrix that is in no layer
    (
        'model.py',
        '        self.mlp = MLP(config)\n',
        '        self.mlp = MLP(config)\n'
        '        self.gate = nn.Linear(config.n_embd, config.n_embd)\n'
        '        self.fc = nn.Parameter(torch.empty(config.n_embd, config.n_embd))\n',
    ),
    ('model.py', 'x + self.drop(self.mlp(', 'x @ self.fc + self.gate(x) + self.drop(self.mlp('),
    (
        'model.py',
        "            if tensor_name == 'bias':",
        "            if layer == 'gate' or tensor_name == 'fc':\n"
        '                parameter.normal_(std=0.02)\n'
        "            elif tensor_name == 'bias':",
    ),
]
PARAMETERS = {
    'blocks.0.scale': SCALED_BLOCKS,
    'head.scale': SCALED_LOGITS,
    'wpe.weight': LEARNED_POSITIONS,
    'blocks.1.gate.weight': GATED_MLP,
}


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('name', PARAMETERS)
def test_an_added_parameter_is_trained_saved_and_resumed(
    run, sheep, hack, tmp_path, name, optimizer
):
    folder = hack(*PARAMETERS[name])
    flags = [*QWEN3, f'--optimizer={optimizer}', '--lr_decay_iters=4']
    result = train(run, *flags, '--max_iters=4', folder=folder)
    out = tmp_path / 'out'
    before = weights(out, 2)[name]
    after = weights(out, 4)[name]
    assert before.shape == after.shape == result.globals['model'].get_parameter(name).shape
    assert not torch.equal(before, after)
    assert evaluated_loss(run, folder, 'out') == pytest.approx(losses(out)[4], abs=1e-6)

    train(run, *flags, '--max_iters=2', folder=folder, out='halves')
    train(run, *flags, '--max_iters=4', '--init_from=resume', folder=folder, out='halves')
    halves = tmp_path / 'halves'
    assert same(weights(halves, 4), weights(out, 4))
    assert same(optimizer_state(halves, 4), optimizer_state(out, 4))

    config = config_of(out, 4)
    assert config['model_type'] not in ('gpt2', 'qwen3', 'llama')
    assert not transformers_opens(out / 'step_00000004')
    plain = run('evaluate.py', '--out_dir=out', '--device=cpu')
    assert plain.is_one_sentence, 'without the hack it does not open'
    assert f'{name} is not expected' in plain.err or 'more' in plain.err


def test_a_parameter_that_gpt_does_not_make_is_refused(run, sheep, hack, tmp_path):
    before = '\ncheck_round_trip(model)'
    folder = hack(('train.py', before, '\nmodel.extra = torch.nn.Linear(3, 3)' + before))
    result = train(run, *QWEN3, '--max_iters=2', folder=folder, code=1)
    assert result.is_one_sentence
    assert 'extra' in result.err
    assert not list((tmp_path / 'out').glob('step_*'))


# -----------------------------------------------------------------------------
# a mistake has a traceback


@pytest.mark.parametrize(
    ('edit', 'error'),
    [
        (
            (
                'model.py',
                '        self.wte = ',
                '        first, second = (config.n_layer,)\n        self.wte = ',
            ),
            'ValueError: not enough values to unpack',
        ),
        (
            ('train.py', 'scaler.update()', 'math.exp(1000)'),
            'OverflowError: math range error',
        ),
    ],
    ids=['in GPT.__init__', 'in the loop'],
)
def test_a_mistake_shows_its_traceback(sheep, hack, tmp_path, edit, error):
    folder = hack(edit)
    name, _, new = edit
    flags = ['--dataset=sheep', *TINY, '--max_iters=2']
    result = in_its_own_process(folder, *flags, cwd=tmp_path)
    assert result.returncode == 1
    lines = (folder / name).read_text().splitlines()
    mistake = new.strip().splitlines()[0]
    (number,) = [n for n, line in enumerate(lines, 1) if line.strip() == mistake]
    assert result.stderr.startswith('Traceback (most recent call last)')
    assert f'{name}", line {number}' in result.stderr
    assert result.stderr.splitlines()[-1].startswith(error)


# -----------------------------------------------------------------------------
# the loss


CROSS_ENTROPY = 'ignore_index=IGNORE, reduction=reduction)\n'  # the end of a line of token_loss


@pytest.fixture
def z_loss(hack):
    """The model with the z-loss that the docstring of token_loss gives as an example."""
    pattern = r'^ {8}if training:\n(?: {12}.*\n)+'
    (example,) = re.findall(pattern, token_loss.__doc__, re.MULTILINE)
    code = textwrap.indent(textwrap.dedent(example), '    ')
    folder = hack(('model.py', CROSS_ENTROPY, CROSS_ENTROPY + code))
    spec = importlib.util.spec_from_file_location('model_with_z_loss', folder / 'model.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('chunk', [2**30, 5000], ids=['at once', 'in chunks'])
@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
def test_what_is_added_to_the_loss_has_its_gradients(z_loss, arch, chunk):
    z_loss.MAX_LOGITS = {'cpu': chunk}
    torch.manual_seed(0)
    shape = {'vocab_size': 999, 'block_size': 48, 'n_layer': 2, 'n_head': 2, 'n_embd': 32}
    model = z_loss.GPT(z_loss.GPTConfig(arch=arch, **shape)).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # so that it matters
    idx = torch.randint(0, 999, (3, 48))
    targets = idx.roll(-1, 1)
    targets[0, 5:20] = IGNORE
    counts = targets != IGNORE

    logits = model(idx)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    added = 1e-4 * logits.logsumexp(-1).square()
    expected = cross_entropy + added[counts].mean()
    assert expected > 1.001 * cross_entropy
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]

    model.zero_grad()
    loss = model(idx, targets)
    assert (loss - expected).abs() < 1e-10
    loss.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).abs().max() < 1e-10

    each = model(idx, targets, reduction='none')
    assert (each[counts].mean() - expected).abs() < 1e-10
    assert (each[~counts] == 0).all()
    model.eval()
    assert (model(idx, targets) - cross_entropy).abs() < 1e-10, 'not for validation'
    with torch.no_grad():
        assert (model(idx, targets) - cross_entropy).abs() < 1e-10


def test_the_validation_loss_does_not_have_what_training_adds(run, sheep, hack, tmp_path):
    code = '    if training:\n        loss = loss + 1\n'
    folder = hack(('model.py', CROSS_ENTROPY, CROSS_ENTROPY + code))
    flags = ['--max_iters=2', '--log_interval=1', '--eval_interval=2']
    train(run, *flags, out='plain')
    train(run, *flags, folder=folder, out='more')
    assert losses(tmp_path / 'plain') == losses(tmp_path / 'more')
    for step, loss in losses(tmp_path / 'plain', 'loss').items():
        assert losses(tmp_path / 'more', 'loss')[step] == pytest.approx(loss + 1, abs=1e-5)

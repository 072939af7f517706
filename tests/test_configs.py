"""Every recipe in config/ starts, can be planned, and says of itself what is true."""

import json
import re

import pytest
from conftest import ROOT, TINY

import tokenizer as tk
from model import PUBLISHED

OVERLAYS = {'gpt2_medium', 'gpt2_large', 'gpt2_xl'}  # of train_gpt2.py
CONFIGS = sorted(path.stem for path in (ROOT / 'config').glob('*.py'))
CONFIGS.remove('fit')  # computes a recipe: test_dial.py
SMOLLM2 = {  # what its config.json says of its shape
    'model_type': 'llama', 'hidden_size': 576, 'num_hidden_layers': 30, 'num_attention_heads': 9,
    'num_key_value_heads': 3, 'intermediate_size': 1536, 'vocab_size': 49152,
    'max_position_embeddings': 8192, 'rms_norm_eps': 1e-5, 'rope_theta': 100000,
    'tie_word_embeddings': True,
}  # fmt: skip
every_config = pytest.mark.parametrize('name', CONFIGS)


def config_files(name):
    """The arguments that select a recipe."""
    names = ['train_gpt2', name] if name in OVERLAYS else [name]
    return [str(ROOT / 'config' / f'{part}.py') for part in names]


@every_config
def test_it_trains_two_steps_of_a_small_model(sheep, run, tmp_path, name):
    small = ['--dataset=sheep', *TINY, '--out_dir=out']
    small += ['--max_iters=2', '--lr_decay_iters=2', '--warmup_iters=0']
    if name in ('finetune', 'continue_smollm2'):
        assert run('train.py', *small, '--max_iters=0', '--out_dir=base').code == 0
        small.append('--init_from=base/step_00000000')
    if name == 'train_wikitext':
        small.append('--stride=16')
    result = run('train.py', *config_files(name), *small)
    assert result.code == 0, result.err
    assert not result.err
    assert (tmp_path / 'out' / 'step_00000002' / 'model.safetensors').exists()
    assert all(len(line) <= 80 for line in result.out.splitlines())


# The plan of a model of a billion parameters takes ten seconds.
LARGE = ('gpt2_large', 'gpt2_xl', 'train_wikipedia')
SMALLER = [name for name in CONFIGS if name not in LARGE]


@pytest.mark.parametrize(
    'name', [*SMALLER, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
)
def test_its_plan_is_what_its_comment_says(run, tmp_path, name):
    source = (ROOT / 'config' / f'{name}.py').read_text()
    comment = ' '.join(re.findall(r'^# ?(.*)$', source, re.MULTILINE))
    stated = re.search(
        r'By --plan: (?P<peak>[\d.]+) GiB.* and (?P<time>[\dh min]+?)( hours| minutes)? '
        r'on (?P<count>\d+|an) (?P<gpu>\w+( \d+)?)',
        comment,
    )
    flags = ['--plan_gpu=H100', '--plan_gpus=1']
    if stated:
        gpu = stated['gpu'].replace(' ', '')
        count = '1' if stated['count'] == 'an' else stated['count']
        flags = [f'--plan_gpu={gpu}', f'--plan_gpus={count}']
    if name == 'continue_smollm2':  # which has to be downloaded
        (tmp_path / 'smollm2').mkdir()
        (tmp_path / 'smollm2' / 'config.json').write_text(json.dumps(SMOLLM2))
        tk.save(tk.build('byte'), tmp_path / 'smollm2')  # a run refuses a model without one
        flags.append('--init_from=smollm2')

    result = run('train.py', *config_files(name), '--plan', '--dataset=none', *flags)
    assert result.code == 0, result.err
    assert not result.err
    assert all(len(line) <= 80 for line in result.out.splitlines())
    (tokens,) = re.findall(r'= ([\d,]+) tokens: ', result.out)
    (steps,) = re.findall(r'^steps   ([\d,]+), each', result.out, re.MULTILINE)
    assert 'time ' in result.out
    if name in OVERLAYS:
        shape = PUBLISHED[name.replace('_', '-')]
        assert '{n_layer} layers, {n_head} heads, n_embd {n_embd}'.format(**shape) in result.out
    else:
        assert f' = {tokens} tokens per step; {steps} steps = ' in comment
    if stated and name != 'train_tinystories':  # its vocabulary is another
        (peak,) = re.findall(r'^ +DDP  .* ([\d.]+)$', result.out, re.MULTILINE)
        assert stated['peak'] == f'{float(peak):.1f}'
        (time,) = re.findall(r'^time +(\S+)', result.out, re.MULTILINE)  # 35h22m or 11m48s
        larger, smaller = map(int, re.findall(r'\d+', time))
        rounded = f'{round(larger + smaller / 60)}'
        assert stated['time'] in (rounded, f'{larger} h {smaller} min')


@pytest.mark.parametrize('name', ['finetune', 'continue_smollm2'])
def test_published_models_are_trained_without_dropout(sheep, run, name):
    """Llama's and Qwen's blocks never had any, and learn less with it."""
    assert run('train.py', '--dataset=sheep', *TINY, '--max_iters=0', '--out_dir=base').code == 0
    model = '--init_from=base/step_00000000'
    shape = ['--dataset=sheep', *TINY, '--max_iters=0']
    result = run('train.py', *config_files(name), model, *shape, '--out_dir=out')
    assert result.code == 0, result.err
    knobs = (sheep.parents[1] / 'out' / 'config.py').read_text()
    assert 'dropout = 0.0\n' in knobs

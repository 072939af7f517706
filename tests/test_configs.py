"""Every recipe in config/ starts, can be planned, and says of itself what is true."""

import re

import pytest
from conftest import ROOT, TINY

from model import PUBLISHED

OVERLAYS = {'gpt2_medium', 'gpt2_large', 'gpt2_xl'}  # of train_gpt2.py
CONFIGS = sorted(path.stem for path in (ROOT / 'config').glob('*.py'))
every_config = pytest.mark.parametrize('name', CONFIGS)


def files(name):
    return [str(ROOT / 'config' / f'{part}.py') for part in ('train_gpt2', name)[name not in OVERLAYS :]]


@every_config
def test_it_trains_two_steps_of_a_small_model(sheep, run, tmp_path, name):
    small = ['--dataset=sheep', *TINY, '--max_iters=2', '--lr_decay_iters=2', '--warmup_iters=0', '--out_dir=out']
    if name == 'finetune':
        assert run('train.py', *small, '--max_iters=0', '--out_dir=base').code == 0
        small.append('--init_from=base/step_00000000')
    if name == 'train_wikitext':
        small.append('--stride=16')
    result = run('train.py', *files(name), *small)
    assert result.code == 0 and not result.err, result.err
    assert (tmp_path / 'out' / 'step_00000002' / 'model.safetensors').exists()
    assert all(len(line) <= 80 for line in result.out.splitlines())


@every_config
def test_its_plan_is_what_its_comment_says(run, name):
    comment = ' '.join(re.findall(r'^# ?(.*)$', (ROOT / 'config' / f'{name}.py').read_text(), re.MULTILINE))
    stated = r'By --plan: ([\d.]+) GiB.* and ([\dh min]+?)( hours| minutes)? on (\d+|an) (\w+( \d+)?)'
    stated = re.search(stated, comment)
    gpus, gpu = stated.group(4, 5) if stated else ('1', 'H100')
    gpu = [f'--plan_gpu={gpu.replace(" ", "")}', f'--plan_gpus={gpus.replace("an", "1")}']
    result = run('train.py', *files(name), '--plan', '--dataset=none', *gpu)
    assert result.code == 0 and 'time ' in result.out and not result.err, result.err
    (step,) = re.findall(r'= ([\d,]+) tokens: ', result.out)
    (steps,) = re.findall(r'^steps   ([\d,]+), each', result.out, re.MULTILINE)
    if name in OVERLAYS:
        shape = PUBLISHED[name.replace('_', '-')]
        assert '{n_layer} layers, {n_head} heads, {n_embd} wide'.format(**shape) in result.out
    else:
        assert f' = {step} tokens a step; {steps} steps = ' in comment
    if stated and name != 'train_tinystories':  # its vocabulary is another
        (peak,) = re.findall(r'^ +DDP  .* ([\d.]+)$', result.out, re.MULTILINE)
        (time,) = re.findall(r'^time +(\S+)', result.out, re.MULTILINE)  # 35h22m or 11m48s
        larger, smaller = map(int, re.findall(r'\d+', time))
        shown = f'{round(larger + smaller / 60)}', f'{larger} h {smaller} min'
        assert stated[1] == f'{float(peak):.1f}' and stated[2] in shown
    assert all(len(line) <= 80 for line in result.out.splitlines())

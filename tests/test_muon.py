"""Muon, against torch's own, the singular value decomposition, and AdamW."""

import pytest
import torch
from conftest import TINY
from safetensors.torch import load
from test_train import losses, same

from model import GPT, GPTConfig
from muon import Muon, orthogonalize


def groups(*parameters, rows):
    return [{'params': list(parameters), 'rows': rows}]


@pytest.mark.parametrize('shape', [(64, 64), (32, 96), (96, 32)])
def test_it_is_torchs_muon(shape):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    a = Muon(groups(ours, rows=shape[:1]), lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)
    for _ in range(10):
        ours.grad = 10 * torch.randn(shape)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    assert (ours - theirs).norm() < 5e-4 * theirs.norm(), 'theirs is in bfloat16'


@pytest.mark.parametrize('shape', [(3, 64, 64), (2, 32, 128), (2, 128, 32)])
def test_singular_values_come_close_to_one_and_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    scale = max(1, shape[1] / shape[2]) ** 0.5
    values = u.mT @ orthogonalize(matrices).double() @ vh.mT / scale
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-4
    assert diagonal[s > 0.05 * s.amax()].min() > 0.6 and diagonal.max() < 1.25


def test_matrices_stacked_in_a_parameter_and_many_parameters_are_each_by_itself():
    torch.manual_seed(2)
    stacked = [torch.nn.Parameter(torch.randn(16 + 8 + 8, 24)) for _ in range(3)]
    single = [torch.nn.Parameter(piece.clone()) for p in stacked for piece in p.detach().split((16, 8, 8))]
    a = Muon(groups(*stacked, rows=(16, 8, 8)))
    b = Muon([group for p in single for group in groups(p, rows=p.shape[:1])])
    for _ in range(3):
        for parameter in stacked:
            parameter.grad = torch.randn(32, 24)
        gradients = [piece for parameter in stacked for piece in parameter.grad.split((16, 8, 8))]
        for parameter, gradient in zip(single, gradients, strict=True):
            parameter.grad = gradient.clone()
        a.step()
        b.step()
    assert torch.allclose(torch.cat(list(stacked)), torch.cat(single), atol=1e-6)


def test_a_bad_step_changes_nothing():
    parameter = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = Muon(groups(parameter, rows=(8,)), weight_decay=0.5)
    parameter.grad = torch.randn(8, 8)
    optimizer.step()
    before = [parameter.detach().clone(), optimizer.state[parameter]['momentum_buffer'].clone()]
    parameter.grad = torch.full((8, 8), float('nan'))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(parameter, before[0])
    assert torch.equal(optimizer.state[parameter]['momentum_buffer'], before[1])


@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
def test_it_gets_the_matrices_of_the_blocks_and_nothing_else(arch):
    model = GPT(GPTConfig(arch=arch, vocab_size=64, n_layer=2, n_head=2, n_embd=32, block_size=8))
    of = {p: group for group in model.parameter_groups(0.1) for p in group['params']}
    assert len(of) == len(list(model.parameters())), 'each parameter once'
    for name, parameter in model.named_parameters():
        group, matrix = of[parameter], name.startswith('blocks.') and parameter.dim() == 2
        assert ('rows' in group) == matrix and group['weight_decay'] == (0.1 if parameter.dim() == 2 else 0.0), name
        if matrix:
            assert sum(group['rows']) == len(parameter)
            assert len(group['rows']) == (3 if 'qkv' in name else 2 if 'fc' in name and arch == 'qwen3' else 1)


def test_it_learns_sooner_than_adamw_and_resumes_to_the_same_weights(sheep, run, tmp_path):
    flags = ['--dataset=sheep', *TINY, '--arch=qwen3', '--schedule=wsd', '--lr_decay_iters=40', '--eval_interval=20']
    flags += ['--learning_rate=1e-2']
    for name, more in {'adamw': [], 'muon': ['--optimizer=muon']}.items():
        assert run('train.py', *flags, *more, '--max_iters=40', f'--out_dir={name}').code == 0
    assert losses(tmp_path / 'muon')[40] < losses(tmp_path / 'adamw')[40]
    muon = [*flags, '--optimizer=muon', '--out_dir=parts']
    assert run('train.py', *muon, '--max_iters=20').code == 0
    assert run('train.py', *muon, '--max_iters=40', '--init_from=resume').code == 0
    file = 'step_00000040/model.safetensors'
    assert same(load((tmp_path / 'muon' / file).read_bytes()), load((tmp_path / 'parts' / file).read_bytes()))

"""Muon, against torch's own, the singular value decomposition, and AdamW; and who trains what."""

import pytest
import torch
from conftest import losses, same, train, weights

from model import GPT, GPTConfig
from optim import (
    Muon,
    average_weights,
    freeze,
    make_optimizers,
    make_rounds,
    orthogonalize,
    parameter_groups,
)


def groups(*parameters, out_sizes):
    return [{'params': list(parameters), 'out_sizes': out_sizes}]


def tiny_model(arch):
    shape = {'vocab_size': 64, 'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 8}
    return GPT(GPTConfig(arch=arch, **shape))


# -----------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize('shape', [(64, 64), (32, 96), (96, 32)])
def test_it_is_torchs_muon(shape):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    a = Muon(groups(ours, out_sizes=shape[:1]), lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)
    for _ in range(10):
        ours.grad = 10 * torch.randn(shape)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    assert (ours - theirs).norm() < 5e-4 * theirs.norm(), 'theirs is in bfloat16'


@pytest.mark.parametrize('shape', [(64, 64), (32, 96), (96, 32)])
def test_rows_are_normalized_as_in_float64(shape):
    """By the formula of NorMuon's paper, from an equal start, with a root mean square of 1 / n."""
    torch.manual_seed(0)
    rows, n = shape
    parameter = torch.nn.Parameter(torch.randn(shape))
    optimizer = Muon(groups(parameter, out_sizes=(rows,)), 0.02, (0.95, 0.8), weight_decay=0.0)
    expected = parameter.detach().double()
    momentum = torch.zeros(shape).double()
    squares = torch.full((rows,), 1 / n).double()
    for step in range(8):
        parameter.grad = torch.randn(shape) * torch.arange(rows)[:, None] / rows
        gradient = parameter.grad.double()
        momentum = 0.95 * momentum + 0.05 * gradient
        nesterov = 0.95 * momentum + 0.05 * gradient
        update = orthogonalize(nesterov[None], torch.float64)[0]
        squares = 0.8 * squares + 0.2 * (update**2).mean(1)
        update = update / squares.sqrt()[:, None] / n**0.5
        expected -= 0.02 * update
        optimizer.step()
        assert (parameter - expected).norm() < 1e-4 * expected.norm(), step


@pytest.mark.parametrize('shape', [(3, 64, 64), (2, 32, 128), (2, 128, 32)])
def test_singular_values_come_close_to_one_and_vectors_stay(shape):
    generator = torch.Generator().manual_seed(1)
    matrices = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    scale = max(1, shape[1] / shape[2]) ** 0.5
    values = u.mT @ orthogonalize(matrices.float(), torch.float32).double() @ vh.mT / scale
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-4
    assert diagonal[s > 0.05 * s.amax()].min() > 0.6
    assert diagonal.max() < 1.25


@pytest.mark.parametrize('rank', [1, 5, 48])
def test_a_long_matrix_in_float32_is_as_in_float64(rank):
    """Its steps are products of A = X X^T, whose small eigenvalues float32 does not have."""
    torch.manual_seed(rank)
    long = torch.randn(3, 48, rank, dtype=torch.float64) @ torch.randn(3, rank, 200).double()
    long += 1e-6 * torch.randn_like(long)
    for matrices in (long, long.mT):
        expected = orthogonalize(matrices, torch.float64)  # multiplies X itself
        found = orthogonalize(matrices.float(), torch.float32).double()
        assert (found - expected).norm() < 2e-3 * expected.norm()


def test_a_round_is_small_but_has_work_for_each_process(monkeypatch):
    monkeypatch.setattr('optim.ROUND', 1000)
    parameters = [torch.nn.Parameter(torch.zeros(20, 20)) for _ in range(9)]
    assert make_rounds([], 2) == []
    for n_processes, sizes in ((1, [3, 3, 3]), (7, [4, 4, 1]), (8, [4, 4, 1]), (16, [8, 1])):
        rounds = make_rounds(groups(*parameters, out_sizes=(10, 10)), n_processes)
        assert [len(pairs) for pairs in rounds] == sizes
        found = [parameter for pairs in rounds for parameter, _ in pairs]
        assert all(a is b for a, b in zip(found, parameters, strict=True))


def test_rounds_change_nothing(monkeypatch):
    after = []
    for size in (1, 10**9):
        monkeypatch.setattr('optim.ROUND', size)
        torch.manual_seed(0)
        model = tiny_model('qwen3')
        for_muon = [group for group in parameter_groups(model, 0.1) if 'out_sizes' in group]
        optimizer = Muon(for_muon, betas=(0.95, 0.9))
        for _ in range(3):
            model(torch.arange(8)[None], torch.arange(8)[None]).backward()
            optimizer.step()
        after.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.allclose(*after, atol=1e-6)
    assert len(make_rounds(optimizer.param_groups, 1)) == 1
    monkeypatch.setattr('optim.ROUND', 1)
    assert len(make_rounds(optimizer.param_groups, 1)) == 8, 'one for each parameter'


def test_fused_matrices_and_many_parameters_are_each_by_itself():
    torch.manual_seed(2)
    sizes = (16, 8, 8)
    fused = [torch.nn.Parameter(torch.randn(16 + 8 + 8, 24)) for _ in range(3)]
    single = []
    for parameter in fused:
        single += [torch.nn.Parameter(piece.clone()) for piece in parameter.detach().split(sizes)]
    a = Muon(groups(*fused, out_sizes=sizes), betas=(0.95, 0.9))
    alone = [groups(parameter, out_sizes=(len(parameter),))[0] for parameter in single]
    b = Muon(alone, betas=(0.95, 0.9))
    for _ in range(3):
        gradients = []
        for parameter in fused:
            parameter.grad = torch.randn(32, 24)
            gradients += parameter.grad.split(sizes)
        for parameter, gradient in zip(single, gradients, strict=True):
            parameter.grad = gradient.clone()
        a.step()
        b.step()
    assert torch.allclose(torch.cat(fused), torch.cat(single), atol=1e-6)


def test_a_skipped_step_changes_nothing():
    parameter = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = Muon(groups(parameter, out_sizes=(8,)), betas=(0.95, 0.9), weight_decay=0.5)
    parameter.grad = torch.randn(8, 8)
    optimizer.step()
    state = optimizer.state[parameter]
    before = parameter.detach().clone()
    state_before = {name: tensor.clone() for name, tensor in state.items()}
    assert state.keys() == {'momentum_buffer', 'row_squares'}
    parameter.grad = torch.full((8, 8), float('nan'))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(parameter, before)
    assert all(torch.equal(state[name], tensor) for name, tensor in state_before.items())


def test_it_learns_faster_than_adamw_and_resumes_to_the_same(run, sheep, tmp_path):
    flags = ['--arch=qwen3', '--schedule=wsd', '--lr_decay_iters=40', '--eval_interval=20']
    flags += ['--learning_rate=1e-2']
    for optimizer in ('adamw', 'muon'):
        train(run, *flags, f'--optimizer={optimizer}', '--max_iters=40', out=optimizer)
    assert losses(tmp_path / 'muon')[40] < losses(tmp_path / 'adamw')[40]
    train(run, *flags, '--optimizer=muon', '--max_iters=20', out='parts')
    train(run, *flags, '--optimizer=muon', '--max_iters=40', '--init_from=resume', out='parts')
    assert same(weights(tmp_path / 'muon', 40), weights(tmp_path / 'parts', 40))


# -----------------------------------------------------------------------------
# averages


@pytest.mark.parametrize('frac', [1.0, 0.5, 0.1])
def test_an_average_is_over_a_fraction_of_the_steps_so_far(frac):
    """Of weights that are the number of their step, so the average says how old it is.

    With t^(1/frac - 1) for step t that is T / (1 + frac) of T steps (Karras et al., 2024).
    """
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = state = {}
    for step in range(1, 3001):
        parameter.data.fill_(step)
        average_weights([optimizer], step, frac)
        if step == 1:
            assert state['average'] == 1
        if step in (300, 3000):
            assert state['average'].item() == pytest.approx(step / (1 + frac), rel=0.005)
    assert frac < 1 or state['average'].item() == pytest.approx(3001 / 2), 'the mean of all'


# -----------------------------------------------------------------------------
# who trains what


@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
def test_groups_hold_each_parameter_once_and_decay_matrices_only(arch):
    model = tiny_model(arch)
    found = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in found for parameter in group['params']]
    assert sorted(grouped) == sorted(names.values())
    assert {group['weight_decay'] for group in found} == {0.1, 0.0}
    for group in found:
        for parameter in group['params']:
            name = names[id(parameter)]
            is_vector = name.endswith('bias') or 'norm' in name
            assert group['weight_decay'] == (0.0 if is_vector else 0.1), name


def test_frozen_parameters_are_in_no_group():
    model = tiny_model('qwen3')
    freeze(model, 1)
    trained = {id(p) for group in parameter_groups(model, 0.1) for p in group['params']}
    for name, parameter in model.named_parameters():
        is_trained = name.startswith(('blocks.1.', 'norm_f.'))
        assert (id(parameter) in trained) == is_trained, name


@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
def test_muon_gets_the_matrices_of_the_blocks_and_nothing_else(arch):
    model = tiny_model(arch)
    adamw, muon = make_optimizers(
        model,
        optimizer='muon',
        learning_rate=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        muon_lr=0.02,
        muon_betas=(0.95, 0.9),
    )
    group_of = {}
    trained_by = {}
    for optimizer in (adamw, muon):
        for group in optimizer.param_groups:
            for parameter in group['params']:
                assert parameter not in group_of, 'each parameter once'
                group_of[parameter] = group
                trained_by[parameter] = optimizer
    assert len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_matrix = name.startswith('blocks.') and parameter.dim() == 2
        assert (trained_by[parameter] is muon) == is_matrix, name
        assert ('out_sizes' in group_of[parameter]) == is_matrix, name
        decay = 0.1 if parameter.dim() == 2 else 0.0
        assert group_of[parameter]['weight_decay'] == decay, name
        if is_matrix:
            out_sizes = group_of[parameter]['out_sizes']
            assert sum(out_sizes) == len(parameter)
            expected = 1
            if 'qkv' in name:
                expected = 3
            elif 'fc' in name and arch == 'qwen3':
                expected = 2
            assert len(out_sizes) == expected, name


def test_adamw_alone_trains_everything():
    model = tiny_model('qwen3')
    (adamw,) = make_optimizers(
        model,
        optimizer='adamw',
        learning_rate=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        muon_lr=0.02,
        muon_betas=(0.95, 0.9),
    )
    trained = {parameter for group in adamw.param_groups for parameter in group['params']}
    assert trained == set(model.parameters())
    assert adamw.defaults['lr'] == 1e-3
    assert adamw.defaults['betas'] == (0.9, 0.95)

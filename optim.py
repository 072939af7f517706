"""Optimizers: Muon, and which optimizer trains which parameters.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) is SGD with momentum whose
updates are orthogonalized. It is for the matrices inside the blocks; embeddings, lm_head, norms and
biases stay with AdamW. `torch.optim.Muon` treats one matrix at a time in bfloat16. Here many of
one shape are treated at once, in the dtype of the run, and several processes share the work.
"""

import math
from functools import partial

import torch

import parallel
from model import GPT, GPTConfig
from parallel import full_tensor, shard_like, split_over_processes
from runtime import UserError, make_autocast

COEFFICIENTS = 5 * [(3.4445, -4.7750, 2.0315)]  # of Muon's Newton-Schulz steps
ROUND = 2**24  # numbers in the matrices that Muon treats at once

# -----------------------------------------------------------------------------
# which parameters are trained, and by which optimizer


def freeze(model, n_blocks):
    """Freeze the embeddings, with a tied lm_head, and the lowest n_blocks blocks. None: none."""
    n_layer = model.config.n_layer
    if n_blocks is None:
        return
    if not 0 <= n_blocks <= n_layer:
        raise UserError(f'freeze={n_blocks} must be from 0 to {n_layer}, the number of blocks.')
    model.wte.requires_grad_(False)
    if model.config.arch == 'gpt2':
        model.wpe.requires_grad_(False)
    for block in model.blocks[:n_blocks]:
        block.requires_grad_(False)


def parameter_groups(model, weight_decay):
    """All trained parameters in groups: vectors; embeddings, lm_head; the matrices of each shape.

    A group of matrices inside the blocks has 'out_sizes', the heights of the matrices that are
    stacked in each of its parameters: it is what Muon can train. Only a model.Linear has them.
    """
    groups = {}  # by what is alike in a group; the keys are for here only
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = model.get_submodule(name.rpartition('.')[0])
        if parameter.dim() < 2:  # biases and norms do not decay
            group = groups.setdefault('vectors', {'params': [], 'weight_decay': 0.0})
        elif name.startswith('blocks.') and hasattr(layer, 'out_sizes'):
            key = parameter.shape, layer.out_sizes
            empty = {'params': [], 'weight_decay': weight_decay, 'out_sizes': layer.out_sizes}
            group = groups.setdefault(key, empty)
        else:
            group = groups.setdefault('others', {'params': [], 'weight_decay': weight_decay})
        group['params'].append(parameter)
    return list(groups.values())


def make_optimizers(
    model, optimizer, learning_rate, betas, weight_decay, muon_lr, muon_betas,
    dtype='float32', compile=False,
):  # fmt: skip
    """The optimizers of a run: AdamW for everything, or with optimizer='muon' Muon for what it can.

    Each has its peak learning rate in `defaults['lr']`. dtype, compile: for Muon's products.

    One that you add must keep all that it remembers as tensors in `state[parameter]`, which are
    saved and, after timed steps, undone; parameters without a state have no average. And where its
    `found_inf`, which train.py sets before each step, is 1.0 it must change nothing, without
    looking: that would wait for the device.
    """
    groups = parameter_groups(model, weight_decay)
    for_adamw = groups
    for_muon = []
    if optimizer not in ('adamw', 'muon'):
        raise ValueError(f'make_optimizers has no {optimizer}')
    if optimizer == 'muon':
        for_adamw = [group for group in groups if 'out_sizes' not in group]
        for_muon = [group for group in groups if 'out_sizes' in group]

    optimizers = []
    if for_adamw:
        optimizers.append(torch.optim.AdamW(for_adamw, lr=learning_rate, betas=betas, fused=True))
    if for_muon:
        optimizers.append(Muon(for_muon, muon_lr, muon_betas, dtype=dtype, compile=compile))
    return optimizers


def block_norms(model):
    """The norms of the parameters and of the gradients, of each block and of what is around them.

    {'norm/blocks.0': ..., 'grad_norm/blocks.0': ..., 'norm/wte': ..., ...}
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        depth = 2 if name.startswith('blocks.') else 1
        part = '.'.join(name.split('.')[:depth])
        tensors.setdefault(f'norm/{part}', []).append(parameter.detach())
        if parameter.grad is not None:
            tensors.setdefault(f'grad_norm/{part}', []).append(parameter.grad)
    norms = {name: torch.nn.utils.get_total_norm(group) for name, group in tensors.items()}
    return {name: float(full_tensor(norm)) for name, norm in norms.items()}


def check_device(arch, device, dtype):
    """Raise UserError unless a device computes a small step as the CPU does.

    Devices have computed something else before, without an error.
    """
    if torch.device(device).type == 'mps' and torch.__version__ < '2.13':
        # Its AdamW takes steps that it is to skip.
        raise UserError("Training on device='mps' needs torch 2.13 or newer: use --device=cpu.")
    config = GPTConfig(arch=arch, vocab_size=320, block_size=64, n_layer=2, n_head=4, n_embd=64)
    losses = []
    gradients = []
    for where, precision in (('cpu', 'float32'), (device, dtype)):
        torch.manual_seed(0)
        model = GPT(config).to(where)  # drawn on the CPU, so the same
        idx = torch.arange(256).mul(37).remainder(320).view(4, 64).to(where)
        with make_autocast(where, precision):
            loss = model(idx, idx.roll(1, 1))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters()]))
    expected, computed = gradients
    off = float((computed - expected).norm() / expected.norm())
    tolerance = 0.01 if dtype == 'float32' else 0.03  # TF32 has ten bits, bfloat16 seven
    is_close = abs(losses[1] - losses[0]) < tolerance * losses[0] and off < tolerance
    if not is_close:  # also where a figure is NaN
        what = f'{device} has a loss of {losses[1]:.4f} where the CPU has {losses[0]:.4f}, and'
        how = f'gradients that are {off:.1%} off: it cannot be trusted with torch'
        raise UserError(f'{what} {how} {torch.__version__}. Try another version, or --device=cpu.')


class SkippedSteps:
    """Counters, on the device, of the steps whose loss or gradient is not finite.

    A streak of them may begin and end between two looks, so the longest has its own counter.
    """

    def __init__(self, device, total=0, streak=0):
        self.total = torch.tensor(float(total), device=device)
        self.streak = torch.tensor(float(streak), device=device)
        self.longest = torch.zeros((), device=device)

    def add(self, skip):
        """Count a step: skip is tensor(1.0) for one that is skipped, else tensor(0.0)."""
        self.total += skip
        self.streak = (self.streak + 1) * skip
        self.longest = torch.maximum(self.longest, self.streak)

    def read(self):
        """Return how many there were, the present streak, and the longest since the start."""
        counters = torch.stack((self.total, self.streak, self.longest))
        return [int(count) for count in counters.tolist()]


# -----------------------------------------------------------------------------
# averages


@torch.no_grad()
def average_weights(optimizers, step, average_frac):
    """Move the running average of each trained weight towards the weight, after this many steps.

    The average is over a fraction of the steps so far, so it is as good early as late: step t of T
    counts about as (t / T)^(1 / average_frac - 1), the power function of Karras et al., 2024,
    "Analyzing and improving the training dynamics of diffusion models". 1.0 is the mean of all
    steps, also of those that were skipped; None: there is no average.
    """
    if average_frac is None:
        return
    share = 1 / (1 + average_frac * (step - 1))
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if 'average' not in state:
                state['average'] = parameter.detach().clone()
            state['average'].lerp_(parameter, share)


@torch.no_grad()
def swap_averages(model, optimizers):
    """Have the model take the averages of its weights, or take its weights back.

    What it does not have is in `state[parameter]['average']`, so a checkpoint has both.
    """
    parallel.reshard(model)  # else what was gathered would be used further
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if 'average' in state:
                weight = parameter.detach().clone()
                parameter.copy_(state['average'])
                state['average'].copy_(weight)


# -----------------------------------------------------------------------------
# Muon


class Muon(torch.optim.Optimizer):
    """Muon, for groups of parameters of one shape with 'out_sizes' (see parameter_groups).

    lr: the spectral norm of an update is about lr · sqrt(max(1, m / n)), for m rows and n columns;
    that makes one value good for all widths (Bernstein, 2025, "Deriving Muon").
    betas: Nesterov's momentum, and that of normalize_rows; None: no such thing, as in plain Muon.
    weight_decay: decoupled, as in AdamW.
    As with torch's fused optimizers, found_inf = tensor(1.0) makes a step that changes nothing.
    """

    def __init__(
        self, groups, lr=0.02, betas=(0.95, None), weight_decay=0.1, dtype='float32', compile=False
    ):
        defaults = {'lr': lr, 'betas': betas, 'weight_decay': weight_decay}
        super().__init__(groups, defaults)
        in_dtype = partial(orthogonalize, dtype=getattr(torch, dtype))
        self.orthogonalize = torch.compile(in_dtype) if compile else in_dtype

    @torch.no_grad()
    def step(self):
        zero = torch.zeros((), device=self.param_groups[0]['params'][0].device)
        taken = 1 - getattr(self, 'found_inf', zero)  # 0.0 for a step that is skipped
        for pairs in make_rounds(self.param_groups, parallel.world_size):
            self.step_round([(p, group) for p, group in pairs if p.grad is not None], taken)

    def step_round(self, pairs, taken):
        """Take the step of some parameters, each with its group."""
        by_shape = {}
        for parameter, group in pairs:
            direction = self.direction(parameter, group['betas'][0], taken)
            # q, k and v, for example, are one parameter and three matrices.
            for matrix in direction.split(group['out_sizes']):
                by_shape.setdefault(matrix.shape, []).append(matrix)
        updates = {}  # in the same order
        for shape in list(by_shape):
            batch = split_over_processes(self.orthogonalize, by_shape.pop(shape))
            updates[shape] = iter(batch)
        for parameter, group in pairs:
            lr = group['lr'] * full_tensor(taken)
            shapes = [(rows, parameter.shape[1]) for rows in group['out_sizes']]
            update = torch.cat([next(updates[shape]) for shape in shapes])
            update = shard_like(update.to(lr.dtype), parameter)
            if group['betas'][1] is not None:
                update = self.normalize_rows(update, parameter, group['betas'][1], taken)
            if group['weight_decay']:
                parameter.mul_(1 - lr * group['weight_decay'])
            parameter.sub_(lr * update)

    def normalize_rows(self, update, parameter, beta2, taken):
        """Return an update whose rows are equally large on average (NorMuon, Li et al., 2025).

        Each row, a neuron, is divided by the root of the running mean of its squares. That starts
        as the mean over all rows of an orthogonal update, so the first steps are Muon's.
        """
        n = parameter.shape[1]
        state = self.state[parameter]
        if 'row_squares' not in state:
            state['row_squares'] = torch.full_like(parameter[:, :1], 1 / n)
        mean = state['row_squares']
        mean.add_((update.square().mean(1, keepdim=True) - mean) * ((1 - beta2) * taken))
        return update * (n * mean + 1e-7).rsqrt()

    def direction(self, parameter, momentum, taken):
        """Return Nesterov's momentum of a parameter, whole even where the parameter is sharded.

        In a skipped step the buffer takes the place of the gradient, so that lerp changes nothing,
        and the learning rate is 0. An `if` would wait for the device.
        """
        state = self.state[parameter]
        if 'momentum_buffer' not in state:
            state['momentum_buffer'] = torch.zeros_like(parameter)
        buffer = state['momentum_buffer']
        gradient = torch.where(taken > 0, parameter.grad, buffer)
        buffer.lerp_(gradient, 1 - momentum)
        return full_tensor(gradient.lerp(buffer, momentum))


def make_rounds(groups, n_processes):
    """Divide parameters into the lists that are treated at once, [(parameter, group), ...] each.

    Small matrices are faster together. Large ones are not, and would take memory, so a list ends
    when it has ROUND numbers, and a matrix for each process.
    """
    rounds = []
    size = n_matrices = math.inf
    for group in groups:
        for parameter in group['params']:
            if size >= ROUND and n_matrices >= n_processes:
                rounds.append([])
                size = n_matrices = 0
            rounds[-1].append((parameter, group))
            size += parameter.numel()
            n_matrices += len(group['out_sizes'])
    return rounds


def orthogonalize(matrices, dtype):
    """(N, m, n) to about U V^T sqrt(max(1, m / n)), where U S V^T is the SVD of each matrix.

    dtype: that of the computation and of the result, which is good enough in 16 bits.
    Newton-Schulz steps X <- (a + b A + c A A) X with A = X X^T. The coefficients bring most
    singular values to between about 0.7 and 1.2, which is close enough to 1; very small ones only
    grow, by a factor of a = 3.4 at most in each step.
    """
    _, m, n = matrices.shape
    is_tall = m > n
    x = matrices.mT if is_tall else matrices  # X^T X is smaller than X X^T
    # Divided before they are rounded: float16 has no small numbers.
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    # From 1.5 on that is fewer operations, 4 m²n + 34 m³ for 20 m²n + 10 m³. In 16 bits the small
    # eigenvalues of X X^T would be lost.
    if x.shape[2] > 1.5 * x.shape[1] and dtype == torch.float32:
        x = newton_schulz(x @ x.mT) @ x
    else:
        for a, b, c in COEFFICIENTS:
            A = x @ x.mT
            polynomial = torch.baddbmm(A, A, A, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT * (m / n) ** 0.5 if is_tall else x


def newton_schulz(A):
    """Return the matrices Q for which Q X is what the steps make of X, from A = X X^T alone."""
    Q = P = None
    for a, b, c in COEFFICIENTS:
        if P is not None:
            A = P @ A @ P  # of X after the step; all of these are symmetric
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=1, dim2=2).add_(a)
        Q = P if Q is None else P @ Q
    return Q

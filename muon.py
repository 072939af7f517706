"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al., 2024).

https://kellerjordan.github.io/posts/muon/. For the matrices inside the blocks; embeddings, head, norms and biases stay
with AdamW. What `torch.optim.Muon` does to one matrix at a time in bfloat16 is done here to all of one shape at once,
in float32 on a CPU, which has no fast bfloat16, and several processes share the work.
"""

import torch

from parallel import share_out, split_like, whole


class Muon(torch.optim.Optimizer):
    """Parameter groups have 'params', all of one shape, and 'rows': the heights of the matrices stacked in each.

    lr: how far a step moves a matrix of m rows and n columns, in units of sqrt(max(1, m / n)) of the spectral norm, so
    that one value serves all widths (Bernstein, 2025, "Deriving Muon"). weight_decay: times lr, the share of a weight
    that a step takes away. As with torch's fused optimizers, `optimizer.found_inf = tensor(1.0)` makes a step that
    changes nothing.
    """

    def __init__(self, groups, lr=0.02, momentum=0.95, weight_decay=0.1, compile=False):
        super().__init__(groups, {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay})
        self.orthogonalize = torch.compile(orthogonalize) if compile else orthogonalize

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            updates, parameters = [], group['params']
            taken = 1 - getattr(self, 'found_inf', torch.zeros((), device=parameters[0].device))
            for parameter in parameters:
                if parameter not in self.state:
                    self.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
                momentum = self.state[parameter]['momentum_buffer']
                gradient = torch.where(taken > 0, parameter.grad, momentum)
                momentum.lerp_(gradient, 1 - group['momentum'])
                updates.append(whole(gradient.lerp(momentum, group['momentum'])))  # Nesterov's
            matrices = torch.stack(updates).split(group['rows'], 1)  # each (parameters, m, n)
            lr = group['lr'] * whole(taken)
            updates = lr * torch.cat([share_out(self.orthogonalize, each) for each in matrices], 1)
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - lr * group['weight_decay'])
                parameter.sub_(split_like(update, parameter))


def orthogonalize(matrices):
    """(N, m, n) to about U V^T sqrt(max(1, m / n)), where each one's singular value decomposition is U S V^T.

    Five Newton-Schulz steps X <- a X + (b A + c A A) X with A = X X^T. Their coefficients drive every singular value
    to between 0.7 and 1.2, even the small ones; closer to 1 is no better for training.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    high = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x.mT if high else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.mT * (x.shape[2] / x.shape[1]) ** 0.5 if high else x
    return x.to(matrices.dtype)

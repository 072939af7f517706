"""A run of so many minutes: how many steps that is.

A schedule that followed the clock would never repeat. So the first steps are timed and undone, and
the run has a fixed number of steps, which its config.py keeps.
"""

import torch

import parallel
import report

MOST_STEPS = 100  # are timed
FRACTION = 0.05  # of the minutes, for timing them


class TimedSteps:
    """The first steps of a run, made to be timed.

    count() is called before each step. When it returns a number, undo() has put the model, the
    optimizers and the scaler back to where they were.
    """

    def __init__(self, minutes, model, optimizers, scaler, compiles=False):
        self.seconds = 60 * minutes
        self.compiles = compiles
        self.model = model
        self.optimizers = optimizers
        self.scaler = scaler
        self.scaler_before = scaler.state_dict()
        self.before = [part.to('cpu', copy=True) for part in parallel.local_parts(model)]
        self.ends = []  # of the steps so far, by the clock of the training

    def count(self, clock):
        """Return how many steps fit into the minutes, or None while more have to be timed.

        The first step, which finds no memory yet, counts only where it is long; one that compiles
        never does.
        """
        self.ends.append(clock.measure())
        n_steps = len(self.ends) - 1
        if n_steps == 0 or (n_steps == 1 and self.compiles):
            return None
        n_timed = max(1, n_steps - 1)
        begin = self.ends[-1 - n_timed]
        seconds = torch.tensor((self.ends[-1] - begin) / n_timed, dtype=torch.float64)
        # The mean of all processes, so that they agree.
        seconds = parallel.all_reduce_sum(seconds).item() / parallel.world_size
        enough = FRACTION * self.seconds if n_steps > 1 else self.seconds / 2
        if n_timed * seconds < enough and n_steps < MOST_STEPS:
            return None
        report.print_line(f'timed   {n_timed} steps of {seconds:.3g} s each, and undone')
        self.undo()
        return max(1, round(self.seconds / seconds))

    def undo(self):
        for part, before in zip(parallel.local_parts(self.model), self.before, strict=True):
            part.copy_(before)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(self.scaler_before)

"""Whether one recipe is better than another by more than chance, from runs of several seeds.

A run is the records of its evaluations, in order. Losses are compared by Welch's test, and what a
recipe takes to the final loss of the first one seed by seed, by a t-test of the logarithms.
"""

import math
import statistics

from runtime import UserError

CERTAIN = 0.01  # p below which a difference is claimed: of a hundred that are none, one is


def check_scipy():
    """Raise UserError where scipy is missing: better before recipes are trained than after."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise UserError('Comparing needs scipy: pip install scipy') from None


def summarize(runs):
    """Return the means of the last evaluations of a recipe's runs, and the spread of their loss."""
    last = [evals[-1] for evals in runs]
    losses = [record['val_loss'] for record in last]
    return {
        'loss': statistics.mean(losses),
        'spread': None if len(losses) == 1 else statistics.stdev(losses),
        'bits': statistics.mean(record['bits_per_byte'] for record in last),
        'steps': round(statistics.mean(record['step'] for record in last)),
        'seconds': statistics.mean(record['train_seconds'] for record in last),
    }


def test(baseline, runs):
    """Compare the runs of a recipe with those of the first one: differences, intervals and p."""
    from scipy import stats

    before = [evals[-1]['val_loss'] for evals in baseline]
    now = [evals[-1]['val_loss'] for evals in runs]
    result = {'loss_p': 1.0, 'loss_ratio': statistics.mean(now) / statistics.mean(before)}
    if before != now and len(now) > 1:  # else there is nothing to test
        result['loss_p'] = float(stats.ttest_ind(before, now, equal_var=False).pvalue)
    for field in ('train_seconds', 'step'):
        ratios = speedups(baseline, runs, field)
        result[field] = None
        if 0.0 in ratios or len(set(ratios)) == 1:  # without a spread there is nothing to test
            continue
        middle = statistics.geometric_mean(ratios)
        logs = stats.ttest_1samp([math.log(ratio) for ratio in ratios], 0)
        low, high = map(math.exp, logs.confidence_interval(1 - CERTAIN))
        result[field] = {'speedup': middle, 'from': low, 'to': high, 'p': float(logs.pvalue)}
    return result


def speedups(baseline, runs, field):
    """Return how many times sooner each run has the final loss of the baseline's run of its seed.

    0.0 is for one that never has it, so recipes of equal loss cannot be told apart by speed: that
    is for `bench.py step`. field: what is counted, 'train_seconds' or 'step'.
    """
    ratios = []
    for first, second in zip(baseline, runs, strict=True):
        target = first[-1]['val_loss']
        reached = first_reaching(second, target, field)
        # The first may have had this loss before it overfitted.
        ratios.append(first_reaching(first, target, field) / reached if reached else 0.0)
    return ratios


def first_reaching(evals, target, field):
    """Return the seconds or steps at which a run first has a loss, between evaluations; or None."""
    before = None
    for record in evals:
        if record['val_loss'] <= target:
            if before is None:
                return record[field]
            fraction = (before['val_loss'] - target) / (before['val_loss'] - record['val_loss'])
            return before[field] + fraction * (record[field] - before[field])
        before = record
    return None


def describe(first, name, result):
    """Return a sentence on how a recipe differs from the first."""
    said = []
    if result['loss_p'] < CERTAIN:
        change = abs(1 - result['loss_ratio'])
        word = 'lower' if result['loss_ratio'] < 1 else 'higher'
        said.append(f'has a {change:.1%} {word} loss (p = {result["loss_p"]:.2g})')
    for field, what in (('train_seconds', 'seconds'), ('step', 'steps')):
        speed = result[field]
        if speed and speed['p'] < CERTAIN:
            span = f'{speed["from"]:.2f} to {speed["to"]:.2f}'
            how = f"{speed['speedup']:.2f} x as fast in {what} to the first's loss"
            said.append(f'is {how} ({1 - CERTAIN:.0%}: {span}, p = {speed["p"]:.2g})')
    if not said:
        p = '' if result['loss_p'] == 1 else f' (loss: p = {result["loss_p"]:.2g})'
        return f'{name}: no difference from {first} shown{p}.'
    return f'{name} {", ".join(said)}.'

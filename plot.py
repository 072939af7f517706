"""Draw a run, or several to compare, from their logs.

    python plot.py --out_dir=out-shakespeare                    # out-shakespeare/loss.png, as train.py draws it
    python plot.py --out_dir=out-a,out-b --file=compare.png
"""

import json
import os

from configurator import configure, errors_in_one_sentence

# -----------------------------------------------------------------------------
out_dir = 'out'  # the run, or several separated by commas
file: str | None = None  # the picture to write; None: loss.png in the (first) run
# -----------------------------------------------------------------------------


def read_log(folder):
    """The records of a run's log.jsonl, without a line that was cut short.

    Raises FileNotFoundError, or ValueError when there is none.
    """
    path, records = os.path.join(folder, 'log.jsonl'), []
    if not os.path.exists(path):
        raise FileNotFoundError(f'There is no {path}: name the out_dir of a run.')
    with open(path, encoding='utf-8', errors='replace') as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get('step'), int):
                records.append(record)
    if not records:
        raise ValueError(f'{path} has no steps yet.')
    return records


def smooth(values, width):
    """Exponential moving average over about `width` values, unbiased at its beginning (Kingma and Ba, 2015)."""
    mean, keep, result = 0.0, 1 - 1 / max(1.0, width), []
    for n, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        result.append(mean / (1 - keep**n))
    return result


def draw(runs, path):
    """Loss above, learning rate and the gradient's norm below. runs: {name: records of its log}. Writes a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(8, 6), dpi=110)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    figure.subplots_adjust(left=0.1, right=0.92, top=0.91, bottom=0.08, hspace=0.06)
    right, tops = below.twinx(), []
    for number, (name, records) in enumerate(runs.items()):
        color = f'C{number}'
        train = [r for r in records if r.get('loss') is not None]
        val = [r for r in records if r.get('val_loss') is not None]
        steps, losses = [r['step'] for r in train], [r['loss'] for r in train]
        label = f'{name}, '.replace('$', r'\$').lstrip('_') if len(runs) > 1 else ''
        if train:
            above.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
            above.plot(steps, smooth(losses, len(losses) / 20), color=color, linewidth=1.2, label=f'{label}training')
            below.plot(steps, [r.get('lr') for r in train], color=color, label='learning rate')
            right.plot(steps, [r.get('grad_norm') for r in train], color=color, alpha=0.4, linewidth=0.8)
        if val:
            best = min(val, key=lambda r: r['val_loss'])
            dark = 'black' if len(runs) == 1 else color
            line = above.plot([r['step'] for r in val], [r['val_loss'] for r in val], 'o-', color=dark, markersize=3.5)
            line[0].set_label(f'{label}validation, best {best["val_loss"]:.4f} at step {best["step"]:,}')
            above.plot(best['step'], best['val_loss'], '*', color='crimson', markersize=13, zorder=5)
        skipped = max((r.get('bad_steps', 0) for r in records), default=0)
        if skipped:
            above.plot([], [], ' ', label=f'{label}bad steps skipped: {skipped:,}')
        # From 3 % of the steps on, so that the fall from a random model's loss does not flatten the rest.
        later = [r.get('loss', r.get('val_loss')) for r in records if r['step'] > 0.03 * records[-1]['step']]
        tops += [loss for loss in later if loss is not None]
    lows = [line.get_ydata().min() for line in above.get_lines() if len(line.get_ydata())]
    if tops and max(tops) > min(lows):
        margin = 0.05 * (max(tops) - min(lows))
        above.set_ylim(min(lows) - margin, max(tops) + margin)
    above.set_ylabel('loss, nats a token')
    above.grid(alpha=0.25)
    if above.get_legend_handles_labels()[0]:
        above.legend(frameon=False, loc='upper right')
    rates = {r['tokens'] // r['step'] for records in runs.values() for r in records if r['step'] and r.get('tokens')}
    if len(rates) == 1:  # tokens a step
        (rate,) = rates
        axis = above.secondary_xaxis('top', functions=(lambda step: step * rate, lambda tokens: tokens / rate))
        axis.xaxis.set_major_formatter(EngFormatter(sep=''))
        axis.set_xlabel('tokens')
    below.set_xlabel('step')
    below.set_ylabel('learning rate')
    below.set_ylim(bottom=0)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.grid(alpha=0.25)
    right.set_ylabel('gradient norm (faint)')
    right.set_ylim(bottom=0)
    figure.savefig(path + '.tmp', format='png')
    os.replace(path + '.tmp', path)


def main():
    configure(globals())
    folders = out_dir.split(',')
    path = file or os.path.join(folders[0], 'loss.png')
    runs = {folder: read_log(folder) for folder in folders}
    if not path.endswith('.png') or not os.path.isdir(os.path.dirname(path) or '.'):
        raise ValueError(f'file={path} must be a .png in a folder that is there.')
    draw(runs, path)
    print(path)


if __name__ == '__main__':
    with errors_in_one_sentence():
        main()

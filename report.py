"""What a run tells: log.jsonl, one JSON object a line, and config.py."""

import contextlib
import json
import os


def continue_log(path, step, evaluated):
    """Keep the whole lines of a log up to a step, the last it evaluated: what came after is about to happen again."""
    lines = []
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that was cut short
                    record = json.loads(line)
                    if line[-1] == '\n' and record['step'] <= (evaluated if 'val_loss' in record else step):
                        lines.append(line)
    replace(path, lines)


def append(path, record):
    """Add a record to a log, on a line of its own even if the one before was cut short by a full disk."""
    with open(path, 'ab+') as file:
        file.seek(max(0, file.tell() - 1))
        cut = file.read(1) not in (b'', b'\n')
        file.write(b'\n' * cut + json.dumps(record).encode() + b'\n')


def write_config(path, config, step):
    """The knobs of a run, as a config file."""
    head = f'# The knobs of this run, since step {step}. To go on: python train.py THIS_FILE --init_from=resume\n'
    head += '# To repeat it: python train.py THIS_FILE --out_dir=ANOTHER\n'
    replace(path, [head, *(f'{name} = {value!r}\n' for name, value in config.items())])


def replace(path, lines):
    """Write a text file that is never seen half-written."""
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
        file.writelines(lines)
    os.replace(path + '.tmp', path)


def duration(seconds):
    """12m05s, or 3h20m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}h{minutes:02}m' if hours else f'{minutes}m{seconds:02}s'

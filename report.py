"""What a run tells, on the terminal, in log.jsonl and in config.py; and the signals that ask it to end."""

import contextlib
import errno
import json
import os
import signal
import time

from configurator import nobody_reads

stop = 0  # the signal that asked for an end
_asked = 0.0  # when


def obey_signals():
    """Have SIGINT, SIGTERM and SIGHUP set `stop`, where they would have ended the process."""
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):  # Windows has no SIGHUP, nohup ignores it
        number = getattr(signal, name, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, request_stop)


def request_stop(number, frame):
    """Let the step in progress finish, then save and exit. A second Ctrl-C ends the process at once."""
    global stop, _asked
    if stop == number == signal.SIGINT and time.monotonic() > _asked + 1:  # launchers pass on what a terminal has sent
        os._exit(130)
    stop, _asked = stop or number, _asked or time.monotonic()


def say(text, end='\n'):
    """Print at once. Where nobody reads any more, after `| head` or in a closed terminal, save and exit."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        nobody_reads()
        if error.errno in (errno.EPIPE, errno.EIO):  # not a full disk
            request_stop(signal.SIGTERM, None)


def log(path, **record):
    """Add a record to a log, on a line of its own even if the one before was cut short by a full disk."""
    try:
        with open(path, 'ab+') as file:
            file.seek(max(0, file.tell() - 1))
            cut = file.read(1) not in (b'', b'\n')
            file.write(b'\n' * cut + json.dumps(record).encode() + b'\n')
    except OSError as error:  # a full disk is no reason to stop training
        say(f'{path} could not be written: {error}')


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

"""A script's knobs are the plain globals at its top; this lets config files and flags override them.

    python train.py config/train_shakespeare.py --batch_size=8 --compile

In a script, after the last knob:

    config = configure(globals())  # {name: value}, the effective knobs

A config file is Python, run over the knobs (so it can compute with them): run only files you trust. Files and
flags are taken in the order they are written, and later wins. A name that is no knob is an error, so is a value
of another type than the default's; names that begin with `_` are a file's own scratch variables. Whatever is wrong
ends the script with one sentence and status 1.
"""

import ast
import contextlib
import ctypes
import difflib
import os
import re
import sys
import time
import tokenize
import traceback
import types

# Knobs of nanoGPT's configs that nothing here needs: a note instead of an error, so that those configs run.
NANOGPT_ONLY = {
    'eval_iters': 'evaluation always reads the whole validation split',
    'wandb_log': "use tracker='wandb'",
    'wandb_project': 'runs are in the project flatgpt, or WANDB_PROJECT',
    'wandb_run_name': 'a run is named as its out_dir',
}
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_LOST = re.compile(r'gloo|NCCL|Connection (closed|reset)|ProcessGroup', re.IGNORECASE)  # what torch says of a lost peer


def configure(script, args=None):
    """Override the knobs in `script` (a module's globals()) from `args` (default: the command line).

    Knobs are the lowercase names bound to an int, float, bool, str or None so far. One whose default is None says
    what else it takes in its annotation: `seed: int | None = None`. Returns the effective knobs as a dict.
    """
    sys.excepthook = _explain
    kinds = (int, float, bool, str, types.NoneType)
    knobs = {k: v for k, v in script.items() if k[0] != '_' and k == k.lower() and type(v) in kinds}
    annotations = sys.modules[script['__name__']].__annotations__
    accepted = {name: _types(annotations.get(name, type(knobs[name]))) for name in knobs}
    args = sys.argv[1:] if args is None else args
    if '--help' in args or '-h' in args:
        _print_help(script, knobs)
        sys.exit(0)
    for arg in args:
        if not arg.startswith('-'):
            given = _run_config_file(arg, knobs)
        elif arg.startswith('--'):
            name, equals, text = arg[2:].partition('=')
            bare = bool in accepted.get(name, ()) and not equals  # --compile is --compile=True
            if not equals and not bare and name in knobs:
                end(f'--{name} needs a value: --{name}={knobs[name]}')
            given = {name: True if bare else text}
        else:
            end(f'{arg} is not understood: flags are written --name=value, config files by their path.')
        source = arg.partition('=')[0]
        for name, value in given.items():
            if name in NANOGPT_ONLY:
                print(f'{source}: {name} is not needed: {NANOGPT_ONLY[name]}.')
            elif name not in knobs:
                nearest = difflib.get_close_matches(name, knobs, n=1)
                hint = f'Did you mean {nearest[0]}?' if nearest else '--help lists them all.'
                end(f'{source}: there is no knob named {name}. {hint}')
            else:
                from_text = arg.startswith('--') and isinstance(value, str)
                knobs[name] = _checked(source, name, value, accepted[name], from_text)
    script.update(knobs)
    return knobs


def end(message):
    """Exit with one sentence and status 1. Of several processes the first speaks; torchrun then ends the others."""
    if int(os.environ.get('RANK', 0)):
        time.sleep(5)
    sys.exit(message.replace('\n', ' '))  # one may be in what it quotes


@contextlib.contextmanager
def errors_in_one_sentence():
    """Turn the errors that bad input raises into one sentence and status 1: ValueError, OSError."""
    try:
        yield
    except BrokenPipeError:
        nobody_reads()
        sys.exit(141)
    except (ValueError, OSError) as error:
        end(str(error))


def nobody_reads():
    """Let what is still printed go nowhere: the other end of the pipe is closed, as by `| head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(kind, error, trace):
    """In place of a traceback: nothing after Ctrl-C, one sentence where memory ends; both can happen anywhere."""
    if kind is BrokenPipeError:
        nobody_reads()
    elif kind in (MemoryError, OverflowError) or _NO_MEMORY.search(str(error)):
        text = ' '.join(str(error).split())[:100]
        print(f'This needs more memory than there is, use smaller numbers: {text}', file=sys.stderr)
    elif kind is not KeyboardInterrupt and 'RANK' in os.environ and _LOST.search(str(error)):
        if os.environ['RANK'] == '0':  # one is enough
            print(f'Another process has ended, see why above: {str(error).splitlines()[0][:100]}', file=sys.stderr)
    elif kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, trace)


def check(knobs, low, high, names):
    """Raises ValueError that lists those of the named knobs that are not from low to high; None is left alone."""
    wrong = [name for name in names.split() if knobs[name] is not None and not low <= knobs[name] <= high]
    if wrong:
        raise ValueError(f'{", ".join(f"{k}={knobs[k]}" for k in wrong)}: must be from {low:,} to {high:,}.')


def pick_device(name):
    """The device for a knob: 'auto' is CUDA, MPS or the CPU, the first there is. Raises ValueError for no device."""
    import torch

    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        if torch.empty(1, device=name).device.type not in ('cuda', 'mps', 'cpu'):
            raise RuntimeError('it is none of cuda, mps and cpu')
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device='{name}' cannot be used here: {str(error).splitlines()[0]}") from None
    if name == 'cpu':
        keep_freed_memory()
    return name


def keep_freed_memory():
    """Have glibc keep what is freed: new pages take the system time to clear. MALLOC_* in the environment win."""
    if not any(variable.startswith('MALLOC_') for variable in os.environ):
        with contextlib.suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL('libc.so.6').mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: map no block by itself, or freeing it gives it back
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


def can_compile(device):
    """Whether torch.compile works, tried on a small function: its tool chain is missed only when it is used."""
    import torch

    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever the compiler's tool chain raises
        why = type(error).__name__
        print(f'No working compiler ({why}): running without torch.compile, which is slower.', file=sys.stderr)
        return False
    return True


def _types(annotation):
    return annotation.__args__ if isinstance(annotation, types.UnionType) else (annotation,)


def _run_config_file(path, knobs):
    """The public variables a config file sets; the knobs as they are so far are its starting point."""
    if path.endswith(('.txt', '.md', '.json', '.jsonl', '.csv', '.parquet')):
        end(f'{path} is no config file but a text: flags are written --name=value.')
    try:
        with open(path, encoding='utf-8') as file:
            source = file.read()
    except FileNotFoundError:
        end(f'There is no config file {path}. Flags are written --name=value.')
    except (OSError, UnicodeDecodeError) as error:
        end(f'The config file {path} cannot be read: {error}')
    after = dict(knobs) | {'__file__': path, '__name__': 'config'}
    try:
        exec(compile(source, path, 'exec'), after)
    except Exception as error:  # whatever the user's code raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = lines[-1] if lines else getattr(error, 'lineno', '?')
        end(f'{path}, line {line}: {type(error).__name__}: {getattr(error, "msg", error)}')
    return {
        name: value
        for name, value in after.items()
        if name[0] != '_' and not (name in knobs and knobs[name] is value)
        # what a file imports or defines for itself
        and not (name not in knobs and (callable(value) or isinstance(value, types.ModuleType)))
    }


def _checked(source, name, value, kinds, from_text):
    """`value` as one of `kinds`; a flag's text is read as a Python literal unless the knob takes text."""
    if from_text and (str not in kinds or (value == 'None' and types.NoneType in kinds)):
        with contextlib.suppress(Exception):  # no literal: refused below
            value = ast.literal_eval({'true': 'True', 'false': 'False'}.get(value, value))
    if type(value) is int and float in kinds:
        with contextlib.suppress(OverflowError):
            value = float(value)
    if type(value) not in kinds:
        wanted = ' or '.join('None' if kind is types.NoneType else kind.__name__ for kind in kinds)
        end(f'{source}: {name} takes {wanted}, not {value!r}.')
    return value


def _print_help(script, knobs):
    """Every knob with its default and the comment behind it; a comment line of its own is a heading."""
    print(f'{script["__doc__"].strip()}\n\nknobs (default) and what they are:')
    with tokenize.open(script['__file__']) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    assigned = {}  # where each name comes first
    for token in tokens:
        if token.type == tokenize.NAME and token.start[1] == 0 and token.string not in assigned.values():
            assigned[token.start[0]] = token.string
    last = max(line for line, name in assigned.items() if name in knobs)
    for line, comment in sorted(comments.items()):
        if line <= last and assigned.get(line) in knobs:
            name = assigned[line]
            print(f'  --{name}={knobs[name]!r}'.ljust(38) + comment.string.lstrip('# '))
        elif line <= last and comment.start[1] == 0 and comment.string.strip('# -'):
            print(f'\n{comment.string.strip("# -")}')
    print(f'\nConfig files are Python: python {os.path.basename(script["__file__"])} config/NAME.py --knob=value')

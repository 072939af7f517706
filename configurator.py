"""A script's knobs are the plain globals at its top; config files and flags override them.

    python train.py config/train_shakespeare.py --batch_size=8 --compile

In a script, after the last knob:

    config = configure(globals())  # {name: value}, the effective knobs

A config file is Python, run over the knobs (so it can compute with them): run only files you trust.
Files and flags are taken in the order they are written, and later wins; a file sees all flags,
also those behind it, so that it can compute with them. A name that is not a knob
is an error, so is a value of another type than the default's; names that begin with `_` are a
file's own scratch variables. Whatever is wrong ends the script with one sentence and status 1.
"""

import ast
import contextlib
import difflib
import re
import sys
import traceback
import types
from pathlib import Path
from typing import Literal, NamedTuple, Union, get_args, get_origin

from runtime import UserError, explain_error

# Knobs of nanoGPT's configs that nothing here needs: a note, not an error, so those configs run.
NANOGPT_ONLY = {
    'eval_iters': 'evaluation always reads the whole validation split',
    'wandb_log': "use tracker='wandb'",
    'wandb_project': 'runs are in the project flatgpt, or WANDB_PROJECT',
    'wandb_run_name': 'a run is named as its out_dir',
}
# What other tools call a knob, where that is not much like it: {what is meant: their names}.
OTHER_NAMES = {
    'start': 'prompt', 'sample_prompt': 'prompt', 'max_new_tokens': 'max_length length',
    'init_from': 'model model_name checkpoint ckpt', 'init_from=resume': 'resume continue',
    'out_dir': 'output save_dir', 'input': 'data file path', 'dataset': 'data data_dir',
    'max_iters': 'steps max_steps num_steps', 'max_epochs': 'epochs num_epochs num_train_epochs',
    'max_minutes': 'minutes max_time time_limit',
    'block_size': 'context context_length seq_len max_seq_len max_length', 'batch_size': 'bs',
    'learning_rate': 'lr', 'n_layer': 'depth', 'n_embd': 'dim width', 'eval_interval': 'save_every',
}  # fmt: skip
# They are no config files, whatever they hold.
OTHER_FORMATS = '.txt .md .json .jsonl .csv .parquet .yaml .yml .toml .ini .cfg .ipynb'
defaults = {}  # {knob: its value in the script that was configured}


class Accepted(NamedTuple):
    """The values that a knob accepts."""

    kinds: tuple  # any value of these types
    choices: tuple  # and these values, from a Literal


def configure(script, args=None):
    """Override the knobs in `script`, a module's globals(), from `args` (None: the command line).

    Knobs are the lowercase names bound to an int, float, bool, str or None so far. A knob accepts
    values of its default's type, or what its annotation says: `seed: int | None = None`,
    `optimizer: Literal['adamw', 'muon'] = 'adamw'`. Returns the effective knobs as a dict.
    """
    sys.excepthook = explain_error
    knobs = {name: value for name, value in script.items() if _is_knob(name, value)}
    defaults.clear()
    defaults.update(knobs)
    annotations = sys.modules[script['__name__']].__annotations__
    accepted = {name: _accepted(annotations.get(name, type(knobs[name]))) for name in knobs}
    if args is None:
        args = sys.argv[1:]
    if '--help' in args or '-h' in args:
        _print_help(script, knobs, accepted)
        sys.exit(0)

    for place, arg in enumerate(args, 1):
        if arg.startswith('--'):
            given = _read_flag(arg, knobs, accepted)
        else:
            given = _run_config_file(arg, knobs, accepted, args[place:])
        source = arg.partition('=')[0]
        for name, value in given.items():
            if name in NANOGPT_ONLY:
                print(f'{source}: {name} is not needed: {NANOGPT_ONLY[name]}.', file=sys.stderr)
                continue
            if name not in knobs:
                own = '' if arg.startswith('--') else f' If it is not to be one, name it _{name}.'
                raise UserError(_unknown(source, name, knobs) + own)
            knobs[name] = _checked(source, name, value, accepted[name])
    script.update(knobs)
    return knobs


def check_range(config, low, high, names):
    """Check that the knobs `names` ("a b c") are from low to high or None. Raises UserError."""
    values = {name: config[name] for name in names.split() if config[name] is not None}
    wrong = [f'{name}={value}' for name, value in values.items() if not low <= value <= high]
    if wrong:
        raise UserError(f'{", ".join(wrong)}: must be from {low:,} to {high:,}.')


# -----------------------------------------------------------------------------
# what is a knob, and what it accepts


def _is_knob(name, value):
    """Return whether a global variable of a script is a knob."""
    kinds = (int, float, bool, str, types.NoneType)
    return not name.startswith('_') and name == name.lower() and type(value) in kinds


def _accepted(annotation):
    """Return what an annotation accepts: a type, a Literal, or a union of them."""
    parts = (annotation,)
    if get_origin(annotation) in (Union, types.UnionType):
        parts = get_args(annotation)
    kinds = tuple(part for part in parts if get_origin(part) is not Literal)
    choices = tuple(choice for part in parts for choice in get_args(part))  # of the Literal
    return Accepted(kinds, choices)


def _choices(accepted):
    """Return the choices of a knob as a text, 'adamw, muon'; '' for a knob that has none."""
    names = [str(choice) for choice in accepted.choices]
    if names and types.NoneType in accepted.kinds:
        names.append('None')
    return ', '.join(names)


def _parse(text, accepted):
    """Return the value of a flag's text: itself where the knob takes text, else as a literal."""
    kinds = {*accepted.kinds, *map(type, accepted.choices)}
    is_none = text == 'None' and types.NoneType in accepted.kinds
    if str in kinds and not is_none:
        return text
    literal = {'true': 'True', 'false': 'False'}.get(text, text)
    try:
        return ast.literal_eval(literal)
    except Exception:  # not a literal: the text itself, which will be refused
        return text


def _checked(source, name, value, accepted):
    """Return a knob's new value, an int as float where the knob takes float. Raises UserError."""
    if getattr(value, 'shape', None) == ():  # a number of numpy, or of torch
        value = value.item()
    if type(value) is int and float in accepted.kinds:
        with contextlib.suppress(OverflowError):
            value = float(value)
    is_choice = type(value) in map(type, accepted.choices) and value in accepted.choices
    if type(value) in accepted.kinds or is_choice:
        return value
    if accepted.choices:
        raise UserError(f'{source}: {name}={value!r} must be one of: {_choices(accepted)}.')
    names = ['None' if kind is types.NoneType else kind.__name__ for kind in accepted.kinds]
    raise UserError(f'{source}: {name} takes {" or ".join(names)}, not {value!r}.')


# -----------------------------------------------------------------------------
# flags and files


def _read_flag(arg, knobs, accepted):
    """Return {name: value} of --name=text, or of a bare --name, which is --name=True."""
    name, equals, text = arg.removeprefix('--').partition('=')
    if name not in knobs:  # configure() knows what to say
        return {name: text}
    if equals:
        return {name: _parse(text, accepted[name])}
    if bool in accepted[name].kinds:
        return {name: True}
    example = 'VALUE' if knobs[name] is None else knobs[name]
    raise UserError(f'--{name} needs a value: --{name}={example}, without a space.')


def _unknown(source, name, knobs):
    """Return a sentence on a name that is no knob, with the knob that was meant."""
    meant = [knob for knob, names in OTHER_NAMES.items() if name.replace('-', '_') in names.split()]
    meant = [knob for knob in meant if re.split('[=,]', knob)[0] in knobs]
    meant += difflib.get_close_matches(name, knobs, n=1)
    hint = f'Did you mean {meant[0]}?' if meant else '--help lists them all.'
    return f'{source}: there is no knob named {name}. {hint}'


def _refuse_yaml(path, source, knobs, accepted):
    """Raise UserError for `batch_size: 4`: in Python it is an annotation, which sets nothing."""
    source = re.sub(r'(?s)(\'\'\'|""").*?\1', '', source)  # a docstring may speak of knobs
    for name, text in re.findall(r'(?m)^(\w+) *: *["\']?([^=#\n]+?)["\']? *(?:#.*)?$', source):
        if name in knobs:
            value = knobs[name]  # where it is `name: int`
            with contextlib.suppress(UserError):
                value = _checked(path, name, _parse(text, accepted[name]), accepted[name])
            raise UserError(f'{path}: {name}: {text} is not Python: write {name} = {value!r}.')


def _run_config_file(path, knobs, accepted, later):
    """Return {name: value} of what a config file sets.

    It sees the knobs as they are so far, and as the flags in `later` set them.
    """
    if path.lower().endswith(tuple(OTHER_FORMATS.split())):
        example = 'Config files are Python: batch_size = 4.'
        raise UserError(f'{path} is not a config file: flags are written --name=value. {example}')
    try:
        source = Path(path).read_text(encoding='utf-8-sig')  # Notepad writes a byte order mark
    except FileNotFoundError:
        raise UserError(f'There is no config file {path}: flags are --name=value.') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'The config file {path} cannot be read as UTF-8 text: {error}') from None

    _refuse_yaml(path, source, knobs, accepted)
    seen = dict(knobs)
    for arg in [arg for arg in later if arg.startswith('--')]:
        for name, value in _read_flag(arg, knobs, accepted).items():
            if name in knobs:
                seen[name] = _checked(arg.partition('=')[0], name, value, accepted[name])
            elif name not in NANOGPT_ONLY:  # before the file runs, which may take its time
                raise UserError(_unknown(arg.partition('=')[0], name, knobs))
    variables = {**seen, '__file__': path, '__name__': 'config'}
    try:
        exec(compile(source, path, 'exec'), variables)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        if type(error).__name__ == 'UserError':  # runtime's or model's: a sentence as it is
            raise
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = lines[-1] if lines else getattr(error, 'lineno', '?')  # a SyntaxError has no frame
        message = getattr(error, 'msg', error)
        raise UserError(f'{path}, line {line}: {type(error).__name__}: {message}') from None

    changed = {}
    for name, value in variables.items():
        if name.startswith('_') or (name in seen and seen[name] is value):
            continue  # a scratch variable, or as it was
        if name not in knobs and (callable(value) or isinstance(value, types.ModuleType)):
            continue  # what a file imports or defines for itself
        changed[name] = value
    return changed


def _print_help(script, knobs, accepted):
    """Print every knob with its default and the comment behind it.

    A comment line of its own, between the knobs, is printed as a heading.
    """
    print(f'{script["__doc__"].strip()}\n\nknobs (default) and what they are:')
    left = set(knobs)
    with open(script['__file__'], encoding='utf-8') as lines:
        for line in lines:
            knob = re.match(r'(\w+)(?:: [^=]*)? = .*?(?:  # (.*))?$', line)
            heading = re.match(r'# ([^-].*)', line)
            if knob and knob[1] in left:
                name, text = knob.groups(default='')
                left.remove(name)
                choices = _choices(accepted[name])
                if choices:
                    text += f' ({choices})'
                print(f'  --{name}={knobs[name]!r}'.ljust(38) + text)
            elif heading and left:
                print(f'\n{heading[1]}')
    script_name = Path(script['__file__']).name
    print(f'\nConfig files are Python: python {script_name} config/NAME.py --knob=value')

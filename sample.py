"""Generate text with a trained or published model.

    python sample.py --out_dir=out-shakespeare
    python sample.py --out_dir=out-shakespeare --start="ROMEO." --temperature=0.7 --top_p=0.9
    python sample.py --out_dir=out-shakespeare --start=FILE:prompt.txt --format=jsonl
    python sample.py --init_from=gpt2 --interactive
    python sample.py --init_from=HuggingFaceTB/SmolLM2-135M-Instruct --chat --interactive
"""

from runtime import UserError, begin_script, can_compile, pick_device, pick_dtype, visible

begin_script()  # first, so that Ctrl-C ends the imports as well: they take seconds

import contextlib
import itertools
import json
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from checkpoint import read_meta
from configurator import check_range, configure
from inference import fast_cpu_decode, generate_text, load_model, to_column_major
from tokenizer import find_template, render_chat

# -----------------------------------------------------------------------------
# model
init_from = 'resume'  # 'resume' (a checkpoint in out_dir), 'gpt2', ORG/NAME of the Hub, a folder
out_dir = 'out'  # the run to take a checkpoint from
checkpoint: Literal['best', 'last'] = 'best'  # which one; the best has the lowest validation loss
# text
start: str | None = None  # the prompt, or FILE:prompt.txt; None: a line end, if its text has them
interactive = False  # ask for one prompt after the other
chat = False  # a prompt is a message, which the model answers by its chat template
num_samples = 3  # samples per prompt, generated as one batch
max_new_tokens = 300  # tokens per sample, fewer where the model ends the text
stop: str | None = None  # end a sample before this text, too; separate several by |
# how a token is sampled
temperature = 0.8  # below 1 sharpens the distribution, above 1 flattens it; 0: greedy
top_k: int | None = 200  # from the k most likely tokens only; None: from all
top_p: float | None = None  # from the fewest that have this probability together, such as 0.9
min_p: float | None = None  # from those at least this fraction as likely as the top one, e.g. 0.05
repetition_penalty = 1.0  # above 1 makes tokens less likely that are in the text already
compare = False  # show the prompt under greedy, three temperatures, three top_k, one top_p instead
seed = 1337  # the same seed gives the same samples
# output and system
format: Literal['text', 'jsonl'] = 'text'  # printed as it is generated, or an object per sample
device = 'auto'  # 'cuda', 'xpu', 'mps', 'cpu'; 'auto' takes the first there is
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # auto: 16-bit where it is faster
compile = False  # compile the decoding of a token: up to a minute at the start, then faster
# -----------------------------------------------------------------------------
config = configure(globals())

check_range(config, 0, 10**18, 'seed')
check_range(config, 0, 10**6, 'temperature')
check_range(config, 1, 10**9, 'num_samples max_new_tokens top_k')
check_range(config, 1e-9, 1, 'top_p')
check_range(config, 0, 1, 'min_p')
check_range(config, 1e-9, 10**9, 'repetition_penalty')

if chat and (compare or format == 'jsonl'):
    raise UserError('chat has one answer to a message, as text: it is without compare and jsonl.')
if chat and not interactive and not (start or '').strip():
    raise UserError('chat needs a message to answer: give it with --start, or use --interactive.')

# -----------------------------------------------------------------------------
# prompt

prompt = start
if start and start.startswith('FILE:'):
    path = start.removeprefix('FILE:')
    try:
        with open(path, encoding='utf-8') as file:
            prompt = file.read()
    except UnicodeDecodeError:
        raise UserError(f'{path} is not UTF-8 text.') from None
    except OSError as error:
        raise UserError(f'The prompt cannot be read: {error}') from None

# -----------------------------------------------------------------------------
# model

device = pick_device(device)
folder, model, tokenizer = load_model(init_from, out_dir, checkpoint)
if start is None:
    prompt = '\n'
    with contextlib.suppress(UserError, LookupError, TypeError):  # others have no such meta.json
        prompt = str(read_meta(Path(folder))['text'][0]['prompt'])
if chat:
    find_template(tokenizer)  # refuses a model that has none
model.to(device, getattr(torch, pick_dtype(dtype, device))).eval()
compile = compile and can_compile(device)
if torch.device(device).type == 'cpu':
    if compile:
        fast_cpu_decode(model)
    else:
        to_column_major(model)

# -----------------------------------------------------------------------------
# generate

RULER = '-' * 80
WIDTH = 38  # of a column; two and the space between them are 80
COMPARED = [
    ('temperature', 0), ('temperature', 0.5), ('temperature', 1.0), ('temperature', 1.5),
    ('top_k', 10), ('top_k', 50), ('top_k', 100), ('top_p', 0.9),
]  # fmt: skip

stop_texts = [text for text in (stop or '').split('|') if text]
names = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
sampling = {name: config[name] for name in names}
generate = partial(
    generate_text, model, tokenizer,
    max_new_tokens=max_new_tokens, seed=seed, stop=stop_texts, compile=compile,
)  # fmt: skip


def print_now(text):
    """Print at once what a model says, but for characters that a terminal would obey."""
    print(visible(text), end='', flush=True)


def print_text(prompt):
    """Print the samples of a prompt, the first as it is generated."""
    print_now(prompt)
    samples = generate(prompt, num_samples, stream=print_now, **sampling)
    print(f'\n{RULER}')
    for sample in samples[1:]:
        print_now(f'{prompt}{sample.text}\n{RULER}\n')


messages = []  # the conversation so far


def print_answer(message):
    """Print the model's answer to a message. Both become part of the conversation."""
    question = {'role': 'user', 'content': message}
    prompt = render_chat(tokenizer, [*messages, question])
    (answer,) = generate(prompt, 1, stream=print_now, is_chat=True, **sampling)
    print(f'\n{RULER}')
    messages.extend([question, {'role': 'assistant', 'content': answer.text}])


def print_jsonl(prompt):
    """Print the samples of a prompt as JSON, one per line."""
    for sample in generate(prompt, num_samples, **sampling):
        record = {'prompt': prompt, 'text': sample.text, 'tokens': sample.tokens}
        record['finish'] = sample.finish
        print(json.dumps(record), flush=True)


def print_comparison(prompt):
    """Print what a prompt gives under the settings COMPARED, two by two, side by side."""
    columns = []
    for name, value in COMPARED:
        sample = generate(prompt, 1, **{name: value})[0]
        columns.append([f'{name}={value}', '-' * WIDTH, *wrap(prompt + sample.text)])
    for left, right in zip(columns[::2], columns[1::2], strict=True):
        for a, b in itertools.zip_longest(left, right, fillvalue=''):
            print(f'{a:<{WIDTH}}    {b}'.rstrip())
        print()


def wrap(text):
    """Break the lines of a text so that they fit into a column."""
    lines = []
    for line in text.splitlines():
        lines.extend(textwrap.wrap(line, WIDTH) or [''])
    return lines


if chat:
    print_samples = print_answer
elif compare:
    print_samples = print_comparison
elif format == 'jsonl':
    print_samples = print_jsonl
else:
    print_samples = print_text

if not interactive:
    print_samples(prompt)
if init_from == 'resume':
    print(f'{folder}, the {checkpoint} checkpoint', file=sys.stderr)
while interactive:
    try:
        line = input('> ')
        if line.strip() or not chat:  # an empty line is no message
            print_samples(line)
    except (UserError, UnicodeDecodeError) as error:  # of this prompt; the next may be better
        print(error)
    except EOFError:  # Ctrl-D
        print()
        break

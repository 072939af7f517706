"""The model card of a checkpoint: README.md, which the Hugging Face Hub shows as a model's page."""

import contextlib
import math
import os
import re
import shlex
from pathlib import Path

import configurator
import report
from model import PUBLISHED, transformers_has_it
from runtime import UserError

LOADED = "name = '{}'"  # the line that a user changes
SHAPE = 'arch n_layer n_embd block_size'
MOST_ROWS = 10  # of the table of losses
MOST_SOURCES = 3  # files of a text that are named
OF_A_MACHINE = ('out_dir', 'init_from', 'dataset', 'device')  # knobs that are no part of a recipe

CARD = """---
library_name: {library}
pipeline_tag: text-generation
tags:
- flatgpt
{head}---

# {title}

{arch}, {n_layer} layers, {n_embd} wide: {parameters:,} parameters, a context of {block_size:,}
tokens, {n_vocab:,} in its vocabulary ({kind}). It was trained {origin}, with flatgpt.

It continues texts like those below, and says what they say: nobody has checked it for more.

## Use

In a folder of flatgpt: `python sample.py --init_from=FOLDER --start="{prompt}"`.

{use}
## Data

| dataset | made from | share | tokens | validation tokens | SHA-256 of the tokens |
|---|---|---|---|---|---|
{data}

## Training

{step:,} steps, {tokens:,} tokens. Losses are means over all tokens of validation, in nats.

| step | validation loss | bits per byte |
|---|---|---|
{losses}

The knobs of `train.py` that were not as they are by default, beside `dataset` and `init_from`:

```python
{recipe}
```
"""
TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

{loaded}  # this folder, or ORG/NAME of the Hub
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
ids = tokenizer('{prompt}', return_tensors='pt').input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens={n_new}, do_sample=True)[0]))
```

```sh
python export.py --init_from=FOLDER --to=model.gguf
llama-completion -m model.gguf -no-cnv -n {n_new} -p "{prompt}"
```
"""


def write_card(folder, run, model, tokenizer, meta):
    """Write README.md into the folder of a checkpoint, whose meta.json has `meta`.

    run: the folder with the run's log.jsonl.
    """
    config = meta['config']
    origin, bases = describe_origin(config['init_from'])
    names = [name for row in meta['text'] for name in row['source'] if is_name(name)]
    head = list_lines('base_model', bases) + list_lines('datasets', dict.fromkeys(names))
    n_new = min(100, model.config.block_size // 2)
    sampled = {'n_new': n_new, 'prompt': pick_prompt(tokenizer)}
    library = 'flatgpt'
    use = 'Its code was changed: transformers has no such model.\n'
    if transformers_has_it(model):
        library = 'transformers'
        use = TRANSFORMERS.format(loaded=LOADED.format('.'), **sampled)
    records = report.all_records(run / 'log.jsonl')
    shape = {name: getattr(model.config, name) for name in SHAPE.split()}
    text = CARD.format(
        **shape, **sampled, library=library, head=head, use=use, origin=origin,
        title=f'{run.resolve().name}, step {meta["step"]:,}',
        parameters=model.count_parameters(), n_vocab=tokenizer.n_vocab, kind=tokenizer.kind,
        data='\n'.join(describe_text(row) for row in meta['text']),
        step=meta['step'], tokens=meta['tokens'],
        losses='\n'.join(list_losses(records, meta['step'])),
        recipe='\n'.join(list_recipe(config)),
    )  # fmt: skip
    Path(folder, 'README.md').write_text(text, encoding='utf-8')


def is_name(text):
    """Return whether it is ORG/NAME of the Hub."""
    return re.fullmatch(r'\w[\w.-]*/[\w.-]+', text or '') is not None


def pick_prompt(tokenizer):
    """Return a word that the vocabulary has, or else one of its letters."""
    with contextlib.suppress(UserError):  # characters that it lacks
        if tokenizer.decode(tokenizer.encode('Once')) == 'Once':
            return 'Once'
    texts = (tokenizer.decode([id]) for id in range(tokenizer.n_vocab))
    return next(filter(str.isalpha, texts), 'Once')


def for_gguf(text, name):
    """Return a card for a repository that has nothing but a GGUF file of this name.

    Of how it is used only the command of llama.cpp stays.
    """
    text = text.replace('library_name: transformers', 'library_name: gguf')
    command = re.search(r'llama-completion -m model\.gguf.*', text)
    if command is None:  # the card was edited
        return text
    use = f'## Use\n\n```sh\n{command[0].replace("model.gguf", shlex.quote(name))}\n```\n\n'
    return re.sub(r'## Use\n.*?(?=## Data\n)', lambda match: use, text, flags=re.DOTALL)


def list_lines(name, values):
    """Return a list of YAML, '' for an empty one."""
    return f'{name}:\n' + ''.join(f'- {value}\n' for value in values) if values else ''


def describe_origin(init_from):
    """Return what a model was before its training, and its name on the Hub in a list if it has one.

    A folder may have been anywhere, and may be gone: only its own name, and its run's, are told.
    """
    name = init_from.partition('@')[0]
    if name == 'scratch':
        return 'from scratch', []
    if name in PUBLISHED:
        name = f'openai-community/{name}'
    is_checkpoint = re.search(r'/(step|weights)_\d{8,}$', name)
    if is_checkpoint or os.path.isdir(init_from) or not is_name(name):
        return f'from {"/".join(Path(init_from).resolve().parts[-2:])}', []
    return f'from {init_from}', [name]


def describe_text(row):
    """Return a dataset's row of the table. row: one of Mixture.card()."""
    sources = [part for part in row['source'] if part]
    more = len(sources) - MOST_SOURCES
    named = ', '.join(sources[:MOST_SOURCES])
    cells = [
        Path(row['name']).name,
        f'{named} and {more:,} more' if more > 0 else named,
        f'{row["share"]:.1%}',
        f'{row["train"]["tokens"]:,}',
        f'{row["val"]["tokens"]:,}',
        f'`{row["train"].get("sha256")}`',
    ]
    return '| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |'


def list_losses(records, last_step):
    """Return rows of the table of losses: of at most MOST_ROWS evaluations, the last among them."""
    found = [r for r in records if r['step'] <= last_step]
    for figure in ('val_loss', 'bits_per_byte'):
        found = [r for r in found if isinstance(r.get(figure), float)]
    every = max(1, math.ceil(len(found) / MOST_ROWS))
    kept = found[::-1][::every][::-1]
    return [f'| {r["step"]:,} | {r["val_loss"]:.4f} | {r["bits_per_byte"]:.3f} |' for r in kept]


def list_recipe(config):
    """Return the knobs that were changed, as lines of a config file."""
    pairs = [(name, value) for name, value in config.items() if name not in OF_A_MACHINE]
    changed = [pair for pair in pairs if pair[1] != configurator.defaults.get(pair[0])]
    return [f'{name} = {value!r}' for name, value in changed]

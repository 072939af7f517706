"""Evaluate a model: its loss on a text, its answers to HellaSwag, LAMBADA and your own questions.

    python evaluate.py --out_dir=out-shakespeare        # its own validation split, as train.py does
    python evaluate.py --init_from=gpt2 --input=wiki.test.raw --stride=512 --detokenize
    python evaluate.py --init_from=gpt2 --hellaswag=hub --lambada=hub    # or .jsonl, .parquet files
    python evaluate.py --questions=questions.jsonl
    torchrun --nproc_per_node=4 evaluate.py --init_from=gpt2-xl --hellaswag=hub

The rows of your own questions are {"context": ..., "choices": [...], "answer": 0}.

Windows of a text begin every `stride` tokens. A token counts in the first window that has it as a
target, so it has at least block_size - stride tokens before it. Multiple choice is scored by
log-likelihood, raw (`acc`) and per character (`acc_norm`).
"""

from runtime import UserError, begin_script, brief, make_autocast, pick_device, pick_dtype

begin_script()  # first, so that Ctrl-C ends the imports as well: they take seconds

import glob
import itertools
import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Literal

import numpy as np

import documents
import parallel
import sources
from checkpoint import read_meta
from configurator import check_range, configure
from data import Dataset, parse_mixture
from inference import evaluate_loss, load_model, log_likelihoods, perplexity

# -----------------------------------------------------------------------------
# model
init_from = 'resume'  # 'resume' (a checkpoint in out_dir), 'gpt2', ORG/NAME of the Hub, a folder
out_dir = 'out'  # the run to take a checkpoint from
checkpoint: Literal['best', 'last'] = 'best'  # which one; the best has the lowest validation loss
# text
dataset: str | None = None  # data/NAME, made by prepare.py; None: what the run was trained on
split: Literal['val', 'train'] = 'val'  # which part of the dataset
input: str | None = None  # in place of a dataset: files and folders, separated by commas
text_column = 'text'  # of tables among them
stride: int | None = None  # between windows, in tokens; None: block_size (no overlap)
block_size: int | None = None  # context, in tokens; None: the run's, or else the model's
detokenize = False  # undo WikiText's spaces around punctuation, as GPT-2's paper does
# questions
hellaswag: str | None = None  # a file of HellaSwag's validation split, or 'hub'
lambada: str | None = None  # a file of LAMBADA's test split, or 'hub'
questions: str | None = None  # a file of your own
limit: int | None = None  # use only the first questions of each; None: all
# system
batch_size = 8  # windows, or answers, per batch
device = 'auto'  # 'cuda', 'xpu', 'mps', 'cpu'; 'auto' takes the first there is
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # auto: 16-bit where it is faster
format: Literal['text', 'json'] = 'text'  # a table, or one object
# -----------------------------------------------------------------------------
config = configure(globals())

check_range(config, 1, 10**9, 'batch_size block_size limit')
if input and dataset:
    raise UserError('Give input or dataset, not both.')
has_questions = hellaswag or lambada or questions
has_text = input or dataset or not has_questions
if not has_text and (stride or block_size or detokenize):
    raise UserError('stride, block_size and detokenize are for a text: name a dataset or input.')

# -----------------------------------------------------------------------------
# model

MOST_TOKENS = 2**15  # of a batch

device = parallel.init_process_group(pick_device(device), None, parallel.world_size)
autocast = make_autocast(device, pick_dtype(dtype, device))
folder, model, tokenizer = load_model(init_from, out_dir, checkpoint)
model.to(device).eval()
end_of_text = tokenizer.end_of_text  # None: the tokenizer has none
check_range(config, 1, model.config.block_size, 'block_size')
is_checkpoint = os.path.exists(os.path.join(folder, 'train_state.pt'))
run_config = read_meta(Path(folder))['config'] if is_checkpoint else {}
block_size = block_size or run_config.get('block_size') or model.config.block_size
# A long context has fewer windows at once, which changes no result.
batch_size = max(1, min(batch_size, MOST_TOKENS // block_size))
check_range(config, 1, block_size, 'stride')

# -----------------------------------------------------------------------------
# text

# WikiText's tokens as text again: what GPT-2's authors undid before they measured (Radford et al.,
# 2019, section 3.1). [(regular expression, what to put in its place), ...]
DETOKENIZE = [
    (r"s '", "s'"), (r"/' [0-9]/", r"/'[0-9]/"), (r' @-@ ', '-'), (r' @,@ ', ','), (r' @\.@ ', '.'),
    (r' : ', ': '), (r' ; ', '; '), (r' \. ', '. '), (r' ! ', '! '), (r' \? ', '? '),
    (r' , ', ', '), (r'\(\s*([^)]*?)\s*\)', r'(\1)'), (r'\[\s*([^\]]*?)\s*\]', r'[\1]'),
    (r'{\s*([^}]*?)\s*}', r'{\1}'), (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r'= = = =', '===='), (r'= = =', '==='), (r'= =', '=='),
    (r' ° ', '°'), (r' \n', '\n'), (r'\n ', '\n'), (r' N ', ' 1 '), (r" 's", "'s"),
]  # fmt: skip


def eval_text():
    """Measure the loss on the text that the knobs name, per token, per byte and per word."""
    if input is not None:
        source = input
        texts = read_texts(input)
        n_bytes = sum(documents.utf8_size(text) for text in texts)
    else:
        data = open_dataset()
        source = f'{data.folder}, {split}'
        tokens = data.val if split == 'val' else data.train
        tokens = tokens[:]  # in memory, where it is in several files
        texts = decode_texts(tokens)
        n_bytes = data.meta[split]['bytes']

    # Those of the raw text, so that models can be compared whatever their tokenizers. Words as
    # WikiText's authors count them: what stands between white space, and each line end.
    n_words = sum(len(text.split()) + text.count('\n') for text in texts)
    if detokenize:
        texts = [undo_wikitext(text) for text in texts]
    if detokenize or input is not None:
        tokens = tokenize_texts(texts)
    if len(tokens) < 2:
        raise UserError(f'There is no text to evaluate in {source}.')
    check_tokens(tokens)

    nats, n_targets = evaluate_loss(model, tokens, block_size, batch_size, autocast, stride)
    loss = nats / n_targets
    total = loss * len(tokens)  # as if the first token, which has none before it, cost the mean
    return {
        'source': source, 'tokens': len(tokens), 'loss': loss, 'perplexity': perplexity(loss),
        'bits_per_byte': total / math.log(2) / n_bytes,
        'word_perplexity': perplexity(total / max(n_words, 1)), 'words': n_words, 'bytes': n_bytes,
    }  # fmt: skip


def check_tokens(ids):
    """Raise UserError unless the model has all of them: its tokenizer may have more."""
    highest = int(np.max(ids))
    if highest >= model.config.vocab_size:
        token = tokenizer.decode([highest])
        raise UserError(f'The text has the token {token!r}, which the model lacks: take it out.')


def read_texts(paths):
    """Read files into one string per document."""
    texts = []
    text = ''
    files = sources.find_files(paths)
    pieces = itertools.chain.from_iterable(sources.read_part([f], text_column) for f in files)
    for piece, ends in pieces:
        text += piece or ''  # None: a blank text
        if ends and text:
            texts.append(text)
            text = ''
    return texts


def open_dataset():
    """Open the dataset that the knobs name, or that the run was trained on."""
    name = dataset or run_config.get('dataset')
    if name is None:
        raise UserError('Say what to evaluate it on: --dataset=NAME, --input=FILE, --hellaswag=hub')
    (name, *others), _ = parse_mixture(name)
    if others:
        raise UserError(f'Only one dataset can be evaluated at a time, as with --dataset={name}')
    data = Dataset(name)
    data.check_vocabulary(tokenizer, model.config.vocab_size, folder)
    return data


def decode_texts(tokens):
    """Decode a split of a dataset into one string per document."""
    parts = [tokens]
    if end_of_text is not None:
        parts = np.split(tokens, np.flatnonzero(tokens == end_of_text) + 1)
        parts = [part[part != end_of_text] for part in parts if len(part)]
    return [tokenizer.decode(part) for part in parts]


def undo_wikitext(text):
    for pattern, replacement in DETOKENIZE:
        text = re.sub(pattern, replacement, text)
    return text


def tokenize_texts(texts):
    """Tokenize documents as prepare.py does, with end-of-text after each if there are several."""
    several = len(texts) > 1
    pieces = [(text, several) for text in texts]
    separator = end_of_text if several else None
    tokens, *_ = documents.encode_pieces(pieces, tokenizer, separator)
    return tokens


# -----------------------------------------------------------------------------
# questions

HUB = {
    'hellaswag': {'path': 'Rowan/hellaswag', 'split': 'validation'},
    'lambada': {'path': 'EleutherAI/lambada_openai', 'split': 'test'},
}
FIELDS = {  # the answers stand before the index of the right one
    'hellaswag': 'activity_label, ctx_a, ctx_b, endings, label',
    'lambada': 'text',
    'questions': 'context, choices, answer',
}


def read_questions(task, source):
    """Read the rows of a task's file, or of its corpus on the Hub.

    Raises UserError that names the row and the field.
    """
    rows = load_rows(task, source)
    if not rows:
        raise UserError(f'{source} has no questions.')
    for number, row in enumerate(rows, 1):
        check_row(task, row, f'{source}, row {number}')
    return rows


def load_rows(task, source):
    from datasets import load_dataset  # here, since it takes a second

    logging.getLogger('datasets').setLevel(logging.CRITICAL)  # the error below says it all
    if source == 'hub' and task in HUB:
        where = HUB[task]
    else:
        files = sources.find_files(source)
        if len(files) != 1:
            raise UserError(f'{task}={source} cannot be read: it must be one file.')
        suffix, _ = sources.kind_of(files[0].name)
        kind = suffix.removeprefix('.') if suffix in ('.csv', '.parquet') else 'json'
        name = glob.escape(files[0].name)
        # 'train' is what datasets calls all rows of a file.
        where = {'path': kind, 'data_files': name, 'split': 'train', 'streaming': True}
    try:
        return list(itertools.islice(load_dataset(**where), limit))
    except StopIteration:  # an empty file
        return []
    except Exception as error:  # the Hub's client and the readers have many
        raise UserError(f'{task}={source} cannot be read: {brief(error)}') from None


def check_row(task, row, where):
    """Raise UserError unless a row has the fields of its task."""
    for field in FIELDS[task].split(', '):
        value = row.get(field)
        what = f"{where}: '{field}'"
        if value is None:
            raise UserError(f"{where}: there is no '{field}'; each row needs {FIELDS[task]}.")
        if field in ('choices', 'endings'):
            is_list = isinstance(value, list)
            if not is_list or not all(isinstance(text, str) and clean(text) for text in value):
                raise UserError(f'{what} must be a list of texts, none of them empty.')
            n_answers = len(value)
        elif field in ('answer', 'label'):
            if not re.fullmatch(r'\d+', str(value)) or int(value) >= n_answers:
                raise UserError(f'{what} is {value!r}: it must be from 0 to {n_answers - 1}.')
        elif not isinstance(value, str) or (field == 'text' and not value.strip()):
            raise UserError(f'{what} must be a text, not {value!r}.')


def clean(text):
    """Remove HellaSwag's marks of where a text comes from, as lm-evaluation-harness does."""
    text = text.strip().replace(' [title]', '. ')
    return re.sub(r'\[.*?\]', '', text).replace('  ', ' ')


def hellaswag_question(row):
    """Return (context, answers, index of the right one), worded as in lm-evaluation-harness."""
    context = clean(f'{row["activity_label"]}: {row["ctx_a"]} {row["ctx_b"].capitalize()}')
    return context, [clean(ending) for ending in row['endings']], int(row['label'])


# -----------------------------------------------------------------------------
# answers


def eval_multiple_choice(questions):
    """Measure how often the right answer is the most likely one, raw and per character.

    questions: [(context, answers, index of the right one), ...].
    """
    requests = []
    for context, answers, _ in questions:
        requests += [make_request(context, f' {answer}') for answer in answers]
    scores = iter(log_likelihoods(model, requests, batch_size, autocast)[:, 0].tolist())

    is_right = []
    is_right_per_character = []
    for _, answers, right in questions:
        raw = [next(scores) for _ in answers]
        per_character = [score / len(text) for score, text in zip(raw, answers, strict=True)]
        is_right.append(np.argmax(raw) == right)
        is_right_per_character.append(np.argmax(per_character) == right)
    figures = {'questions': len(questions), **accuracy('acc', is_right)}
    return {**figures, **accuracy('acc_norm', is_right_per_character)}


def eval_lambada(texts):
    """Measure how often greedy decoding gives the last word of a text, and its perplexity."""
    requests = []
    for text in texts:
        context, _, word = text.rpartition(' ')
        requests.append(make_request(context, f' {word}'))
    scores = log_likelihoods(model, requests, batch_size, autocast)
    figures = {'questions': len(texts), **accuracy('acc', scores[:, 1].tolist())}
    return {**figures, 'perplexity': perplexity(-scores[:, 0].mean().item())}


def make_request(context, continuation):
    """Tokenize both together: (ids, how many of them are the continuation).

    Spaces that end the context belong to the continuation. Raises UserError when the model has no
    room for the continuation.
    """
    ids = tokenizer.encode(context + continuation).tolist()
    n_context = len(tokenizer.encode(context.rstrip()))
    n_continuation = len(ids) - n_context
    if n_context == 0:  # something must come before the first token
        if not tokenizer.prefix and end_of_text is None:
            raise UserError('A question has an empty context, and the tokenizer no end-of-text.')
        ids = [*(tokenizer.prefix or [end_of_text]), *ids]
    check_tokens(ids)
    room = model.config.block_size
    if not 0 < n_continuation <= room:
        sizes = f'has {n_continuation:,} tokens, and the model sees {room:,}'
        raise UserError(f'An answer {sizes}: {continuation[:30]!r}.')
    return ids, n_continuation


def accuracy(name, is_right):
    """Return the fraction of the questions answered right, and its standard error."""
    fraction = sum(is_right) / len(is_right)
    stderr = math.sqrt(fraction * (1 - fraction) / max(1, len(is_right) - 1))
    return {name: fraction, f'{name}_stderr': stderr}


# -----------------------------------------------------------------------------
# evaluate

# Files that cannot be read are refused before anything is measured.
asked = {'hellaswag': hellaswag, 'lambada': lambada, 'questions': questions}
rows = {task: read_questions(task, source) for task, source in asked.items() if source}

results = {}
if has_text:
    results['text'] = eval_text()
if hellaswag:
    asked = [hellaswag_question(row) for row in rows['hellaswag']]
    results['hellaswag'] = eval_multiple_choice(asked)
if lambada:
    results['lambada'] = eval_lambada([row['text'] for row in rows['lambada']])
if questions:
    asked = [(row['context'], row['choices'], int(row['answer'])) for row in rows['questions']]
    results['questions'] = eval_multiple_choice(asked)

# -----------------------------------------------------------------------------
# print


def print_table(task, figures):
    """Print a line for each figure."""
    title = task
    if 'source' in figures:
        title = f'{task}: {figures["source"]}'
    print(f'\n{title}')
    for name, value in figures.items():
        if name == 'source' or name.endswith('_stderr'):
            continue
        label = name if name.startswith('acc') else name.replace('_', ' ')
        error = ''
        if f'{name}_stderr' in figures:
            error = f' ± {figures[f"{name}_stderr"]:.4f}'
        print(f'  {label:<22}{format_figure(value):>16}{error}')


def format_figure(value):
    if value is None:  # beyond all floats
        return '-'
    if isinstance(value, int):
        return f'{value:,}'
    return f'{value:,.4f}' if value < 1e8 else f'{value:.4g}'


if format == 'json':
    print(json.dumps({'model': str(folder), **results}, indent=1))
else:
    print(folder)
    for task, figures in results.items():
        print_table(task, figures)
parallel.exit(0)

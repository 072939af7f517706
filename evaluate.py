"""Judge a model: its loss and perplexity on a text, its answers to HellaSwag, LAMBADA and questions of your own.

    python evaluate.py --out_dir=out-shakespeare                       # its own validation split, as train.py does
    python evaluate.py --init_from=gpt2 --input=wiki.test.raw --stride=512 --detokenize
    python evaluate.py --init_from=gpt2 --hellaswag=hub --lambada=hub  # or a file of each: .jsonl, .parquet
    python evaluate.py --choices=questions.jsonl                       # {"context": ..., "choices": [...], "answer": 0}
    torchrun --nproc_per_node=4 evaluate.py --init_from=gpt2-xl --hellaswag=hub

A window of text begins every `stride` tokens; a token counts in the first window that has it as a target, so with at
least block_size - stride tokens before it. Of several answers the likeliest counts, and the likeliest a character.
"""

import glob
import json
import logging
import math
import os
import re
import signal
import sys
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import documents
import parallel
import tokenizer as tokenizers
from configurator import check, configure, errors_in_one_sentence, pick_device
from data import IGNORE, Dataset, count_windows, windows
from sample import open_model

# -----------------------------------------------------------------------------
# the model
init_from = 'resume'  # 'resume' (a checkpoint in out_dir), 'gpt2' to 'gpt2-xl', or a folder that holds a model
out_dir = 'out'  # the run to take a checkpoint from
which = 'best'  # which of its checkpoints: 'best' (lowest validation loss) or 'last'
# a text
dataset: str | None = None  # data/NAME, made by prepare.py; None: what the run was trained with
part = 'val'  # which of its splits: 'val' or 'train'
input: str | None = None  # or files and folders, separated by commas
text_column = 'text'  # of tables among them
stride: int | None = None  # from one window to the next, in tokens; None: block_size, no overlap
block_size: int | None = None  # context, in tokens; None: the model's
detokenize = False  # undo WikiText's spaces around punctuation, as the figures of GPT-2's paper do
# questions
hellaswag: str | None = None  # a file of HellaSwag's validation split, or 'hub'
lambada: str | None = None  # a file of LAMBADA's test split, or 'hub'
choices: str | None = None  # a file of your own
limit: int | None = None  # only the first questions of each; None: all
# system
batch_size = 8  # windows, or answers, at once
device = 'auto'  # 'cuda', 'mps', 'cpu'; 'auto' takes the first there is
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; 'auto': bfloat16 on CUDA, else float32
format = 'text'  # 'text', a table, or 'json'
# -----------------------------------------------------------------------------

HUB = {'hellaswag': ('Rowan/hellaswag', None, 'validation'), 'lambada': ('EleutherAI/lambada_openai', None, 'test')}
FIELDS = {
    'hellaswag': ('activity_label', 'ctx_a', 'ctx_b', 'endings', 'label'),
    'lambada': ('text',),
    'choices': ('context', 'choices', 'answer'),
}

# WikiText's tokens as text again: what GPT-2's authors undid before they measured (Radford et al., 2019, section 3.1).
MARKS = [
    (r"s '", "s'"), (r"/' [0-9]/", r"/'[0-9]/"),
    *((f' @[{mark}]@ ', mark) for mark in '-,.'), *((f' [{mark}] ', f'{mark} ') for mark in ':;.!?,'),
    (r'\(\s*([^)]*?)\s*\)', r'(\1)'), (r'\[\s*([^\]]*?)\s*\]', r'[\1]'), (r'{\s*([^}]*?)\s*}', r'{\1}'),
    (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r'= = = =', '===='), (r'= = =', '==='), (r'= =', '=='), (r' ° ', '°'),
    (r' \n', '\n'), (r'\n ', '\n'), (r' N ', ' 1 '), (r" 's", "'s"),
]  # fmt: skip


@torch.no_grad()
def total_loss(model, tokens, block_size, batch_size, autocast=None, stride=None):
    """(nats, targets): the loss summed over every token but the first, and their number; several processes share it.

    tokens: (n,) ids. With a stride below block_size, windows overlap, and each target counts in its first.
    """
    device, was_training = next(model.parameters()).device, model.training
    sums, counts = [torch.zeros((), device=device)], [0]
    model.eval()
    for start in range(0, count_windows(tokens, block_size, stride), parallel.world * batch_size):
        start += parallel.rank * batch_size  # past the end there is nothing to count
        x, y = windows(tokens, block_size, range(start, start + batch_size), stride)
        y[start == 0 :, : block_size - (stride or block_size)] = IGNORE
        with autocast or nullcontext():
            loss = model(x.to(device), y.to(device))
        if (y != IGNORE).any():
            counts.append(int((y != IGNORE).sum()))
            sums.append(loss * counts[-1])
    model.train(was_training)
    sums = torch.stack((torch.stack(sums).cpu().double().sum(), torch.tensor(sum(counts)).double()))
    nats, count = parallel.total(sums).tolist()
    return nats, int(count)


@torch.no_grad()
def log_likelihoods(model, requests, batch_size, autocast=None):
    """How likely a model finds each continuation of a context: (n, 2) float64, its log-probability and whether it is
    what greedy decoding gives (1 or 0).

    requests: [(ids, how many of the last of them are the continuation), ...]. Contexts are cut at their beginning to
    fit. Several processes share the work.
    """
    device, result = next(model.parameters()).device, torch.zeros(len(requests), 2, dtype=torch.float64)
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))  # the longest first, so memory is known
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for batch in tqdm(batches[parallel.rank :: parallel.world], ncols=80, leave=False, disable=parallel.rank or None):
        longest = min(len(requests[batch[0]][0]) - 1, model.config.block_size)
        x = torch.zeros(len(batch), longest, dtype=torch.int64)
        y = torch.full_like(x, IGNORE)
        for row, i in enumerate(batch):
            ids, n = torch.tensor(requests[i][0][-longest - 1 :]), requests[i][1]
            x[row, : len(ids) - 1] = ids[:-1]
            y[row, len(ids) - 1 - n : len(ids) - 1] = ids[-n:]
        counted = y != IGNORE
        rows, targets = counted.nonzero()[:, 0], y[counted].to(device)
        with autocast or nullcontext():
            hidden = model.hidden(x.to(device))[counted.to(device)]
            logits = F.linear(hidden, model.head.weight, model.padding)
        found = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu().double()
        missed = (logits.argmax(-1) != targets).cpu().double()
        scores = torch.zeros(len(batch), 2, dtype=torch.float64).index_add_(0, rows, torch.stack((found, missed), 1))
        result[batch] = torch.stack((scores[:, 0], (scores[:, 1] == 0).double()), 1)
    return parallel.total(result)


def request(tokenizer, context, continuation, room):
    """The ids of both together, and how many are the continuation's; spaces that end the context are its.

    Raises ValueError when the model's context has no room for the continuation.
    """
    stripped = context.rstrip()
    whole = tokenizers.encode(tokenizer, context + continuation).tolist()
    n = len(whole) - len(tokenizers.encode(tokenizer, stripped))
    if n == len(whole):  # something must come before the first token
        end_of_text = tokenizers.end_of_text_id(tokenizer)
        if end_of_text is None:
            raise ValueError('A question has an empty context, and the tokenizer no end-of-text to put there.')
        whole = [end_of_text, *whole]
    if not 0 < n <= room:
        raise ValueError(f'An answer has {n:,} tokens, and the model sees {room:,}: {continuation[:30]!r}.')
    return whole, n


def read_questions(task, source):
    """The rows of a task's file, or of its corpus on the Hub. Raises ValueError that names the row and the field."""
    from datasets import load_dataset

    logging.getLogger('datasets').setLevel(logging.CRITICAL)  # what is wrong is said below
    try:
        if source == 'hub' and task in HUB:
            repository, configuration, split = HUB[task]
            rows = load_dataset(repository, configuration, split=split)
        else:
            if len(files := documents.find_files(source)) != 1:
                raise ValueError('it must be one file')
            kind = documents.TABLES.get(documents.kind_of(files[0])[0], 'json')
            rows = load_dataset(kind, data_files=glob.escape(str(files[0])), split='train', streaming=True)
        rows = list(rows.take(limit) if limit else rows)
    except FileNotFoundError:
        raise
    except StopIteration:
        rows = []
    except Exception as error:  # the Hub's client and the readers have many
        raise ValueError(f'{task}={source} cannot be read: {documents.brief(error)}') from None
    if not rows:
        raise ValueError(f'{source} has no questions.')
    for number, row in enumerate(rows, 1):
        for field in FIELDS[task]:
            value, answers = row.get(field), row.get('choices', row.get('endings'))
            what = f"{source}, row {number}: '{field}'"
            if value is None:
                needed = ', '.join(FIELDS[task])
                raise ValueError(f"{source}, row {number}: there is no '{field}'; each row needs {needed}.")
            if field in ('choices', 'endings'):
                if not isinstance(value, list) or not all(isinstance(v, str) and clean(v) for v in value):
                    raise ValueError(f'{what} must be a list of texts, none of them empty.')
            elif field in ('answer', 'label'):
                if not re.fullmatch(r'\d+', str(value)) or int(value) >= len(answers):
                    raise ValueError(f'{what} is {value!r}: it must be from 0 to {len(answers) - 1}.')
            elif not isinstance(value, str) or (field == 'text' and not value.strip()):
                raise ValueError(f'{what} must be a text, not {value!r}.')
    return rows


def clean(text):
    """HellaSwag's text without the marks of where it comes from, as the harness has it."""
    text = re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. '))
    return text.replace('  ', ' ')


def hellaswag_choice(row):
    """(context, answers, index of the right one), as EleutherAI's lm-evaluation-harness has it."""
    context = clean(f'{row["activity_label"]}: {row["ctx_a"]} {row["ctx_b"].capitalize()}')
    return context, [clean(ending) for ending in row['endings']], int(row['label'])


def judge_choices(model, tokenizer, questions, **options):
    """questions: [(context, answers, index of the right one), ...]. How often the likeliest answer is right."""
    room = model.config.block_size
    asked = [request(tokenizer, text, ' ' + answer, room) for text, answers, _ in questions for answer in answers]
    scores = iter(log_likelihoods(model, asked, **options)[:, 0].tolist())
    plain = by_length = 0
    for _, answers, right in questions:
        found = [next(scores) for _ in answers]
        plain += np.argmax(found) == right
        by_length += np.argmax([score / len(answer) for score, answer in zip(found, answers, strict=True)]) == right
    n = len(questions)
    return {'questions': n, **share('accuracy', plain, n), **share('accuracy_by_length', by_length, n)}


def judge_lambada(model, tokenizer, rows, **options):
    """How often the last word of a text is what greedy decoding gives, and its perplexity."""
    parts = [text.rpartition(' ') for text in rows]
    asked = [request(tokenizer, before, ' ' + word, model.config.block_size) for before, _, word in parts]
    scores = log_likelihoods(model, asked, **options)
    accuracy = share('accuracy', scores[:, 1].sum().item(), len(rows))
    return {'questions': len(rows), **accuracy, 'perplexity': exponential(-scores[:, 0].mean().item())}


def exponential(nats):
    """A perplexity; None where it is beyond all numbers."""
    return math.exp(nats) if nats < 700 else None


def share(name, right, n):
    """A share and its standard error."""
    p = float(right / n)
    return {name: p, f'{name}_error': math.sqrt(p * (1 - p) / max(1, n - 1))}


def judge_text(model, tokenizer, folder, autocast):
    """Loss, perplexity and bits per byte on the text that the knobs name; words are counted as WikiText's paper does:
    what stands between white space, and each end of a line.
    """
    end_of_text, name = tokenizers.end_of_text_id(tokenizer), dataset
    if input is not None:
        texts, source, tokens = [''], input, None
        for text, ends in documents.read_files(documents.find_files(input), text_column):
            texts[-1] += text
            texts += [''] if ends else []
        texts = texts[: max(1, len(texts) - 1)]
    else:
        if name is None and init_from == 'resume':
            name = checkpoint.read_meta(folder)['config']['dataset']
        if name is None:
            raise ValueError('Say on what to judge it: --dataset=NAME, --input=FILE, --hellaswag=hub, ...')
        data = Dataset(name)
        if not tokenizers.same(data.tokenizer, tokenizer):
            raise ValueError(
                f'{data.folder} has a vocabulary of {data.vocab_size:,} tokens, the model another one of '
                f'{tokenizer.n_vocab:,}: prepare the text with --tokenizer={folder}'
            )
        tokens, source = data.val if part == 'val' else data.train, f'{data.folder}, {part}'
        cuts = np.flatnonzero(tokens == end_of_text) + 1 if end_of_text is not None else []
        pieces = [piece[piece != end_of_text] for piece in np.split(tokens, cuts) if len(piece)]
        texts = [tokenizer.decode_bytes(piece).decode(errors='surrogateescape') for piece in pieces]
    words = sum(len(text.split()) + text.count('\n') for text in texts)
    size = sum(len(text.encode(errors='surrogateescape')) for text in texts)
    if detokenize or tokens is None:
        for mark, text in MARKS if detokenize else []:
            texts = [re.sub(mark, text, document) for document in texts]
        texts = [text.encode(errors='surrogateescape').decode(errors='replace') for text in texts]
        pieces = [(text, len(texts) > 1) for text in texts]
        tokens = documents.encode_pieces(pieces, tokenizer, end_of_text if len(texts) > 1 else None)[0]
    if len(tokens) < 2:
        raise ValueError(f'There is no text to judge in {source}.')
    nats, targets = total_loss(model, tokens, block_size or model.config.block_size, batch_size, autocast, stride)
    loss, whole = nats / targets, nats / targets * len(tokens)
    return {
        'source': source,
        'tokens': len(tokens),
        'loss': loss,
        'perplexity': exponential(loss),
        'bits_per_byte': whole / math.log(2) / size,
        'word_perplexity': exponential(whole / max(words, 1)),
        'words': words,
        'bytes': size,
    }


def main():
    config = configure(globals())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # loading weights would take it for a damaged file
    if parallel.rank:
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115  one process speaks for all
    check(config, 1, 10**9, 'batch_size block_size limit')
    known = {'which': 'best last', 'part': 'val train', 'format': 'text json', 'dtype': 'auto float32 bfloat16 float16'}
    for name, values in known.items():
        if config[name] not in values.split():
            raise ValueError(f"{name}='{config[name]}' must be one of: {values.replace(' ', ', ')}.")
    if input and dataset:
        raise ValueError('Give input or dataset, not both.')
    text = input or dataset or not (hellaswag or lambada or choices)
    if not text and (stride or block_size or detokenize):
        raise ValueError('stride, block_size and detokenize are for a text: name one, too, with --dataset or --input.')
    place = parallel.join(pick_device(device), None, parallel.world)
    folder, model, tokenizer = open_model(init_from, out_dir, which)
    check(config, 1, model.config.block_size, 'block_size')
    check(config, 1, block_size or model.config.block_size, 'stride')
    model.to(place).eval()
    kind = torch.device(place).type
    exact = dtype == 'float32' or (dtype == 'auto' and kind != 'cuda')
    precision = nullcontext() if exact else torch.autocast(kind, getattr(torch, dtype.replace('auto', 'bfloat16')))
    options = {'batch_size': batch_size, 'autocast': precision}
    results = {'model': str(folder)}
    if text:
        results['text'] = judge_text(model, tokenizer, folder, precision)
    if hellaswag:
        questions = [hellaswag_choice(row) for row in read_questions('hellaswag', hellaswag)]
        results['hellaswag'] = judge_choices(model, tokenizer, questions, **options)
    if lambada:
        texts = [row['text'] for row in read_questions('lambada', lambada)]
        results['lambada'] = judge_lambada(model, tokenizer, texts, **options)
    if choices:
        rows = read_questions('choices', choices)
        questions = [(row['context'], row['choices'], int(row['answer'])) for row in rows]
        results['choices'] = judge_choices(model, tokenizer, questions, **options)
    if format == 'json':
        print(json.dumps(results, indent=1))
    else:
        show(results)
    parallel.leave(0)


def show(results):
    """A table: a line for each figure."""
    print(results.pop('model'))
    for task, figures in results.items():
        print(f'\n{task}' + (f': {figures.pop("source")}' if 'source' in figures else ''))
        for name, value in figures.items():
            if isinstance(value, int):
                print(f'  {name.replace("_", " "):<22}{value:>16,}')
            elif not name.endswith('_error'):
                error = f' ± {figures[f"{name}_error"]:.4f}' if f'{name}_error' in figures else ''
                text = '-' if value is None else f'{value:,.4f}' if value < 1e8 else f'{value:.4g}'
                print(f'  {name.replace("_", " "):<22}{text:>16}{error}')


if __name__ == '__main__':
    with errors_in_one_sentence():
        main()

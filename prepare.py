"""Turn text into tokens: data/NAME/ with train.bin, val.bin, meta.json and tokenizer.json.

    python prepare.py                                           # the bundled Shakespeare
    python prepare.py --input=book.txt                          # your own text, into data/book
    python prepare.py --input=a.txt,b.jsonl.gz,notes --name=my  # several files and folders
    python prepare.py --dataset=wikitext103 --tokenizer=gpt2    # a corpus of the Hugging Face Hub
    python prepare.py --dataset=hf:ORG/NAME --text_column=content --streaming --max_tokens=500000000

A document is a text file (lines that hold nothing but <|endoftext|> divide it into several), or a
row of a table: .jsonl, .json, .csv, .parquet. Where there are several documents, each is followed
by an end-of-text token and belongs as a whole to one split, by a draw of its own. A single text is
cut: its last part is for validation.
"""

import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import documents
import tokenizer as tokenizers
from configurator import check_range, configure
from runtime import UserError

# -----------------------------------------------------------------------------
dataset = 'shakespeare'  # one of CORPORA below, or hf:ORG/NAME for any other corpus of the Hub
input: str | None = None  # or your own files and folders, separated by commas
name: str | None = None  # write to data/NAME; None: named after the corpus or the first file
tokenizer = 'bpe'  # 'bpe', 'char', 'byte', 'gpt2', a folder that has one, or ORG/NAME of the Hub
vocab_size = 4096  # of a bpe vocabulary
val_fraction: float | None = None  # for validation; None: 0.1, at most 10 MB; streaming 0.0005
max_tokens: int | None = None  # to train on, up to a document's end or a megabyte more; None: all
seed = 1337  # of the draw that decides which documents are for validation
num_proc: int | None = None  # threads that tokenize; None: one per core
# a corpus of the Hub
subset: str | None = None  # its configuration, such as 20231101.de of wikipedia
split = 'train'  # its split to train on; its validation split is used if it has one
text_column = 'text'  # the column of a table that has the text, also of your own files
streaming = False  # do not store it on this disk, read it from the network as it is tokenized
# -----------------------------------------------------------------------------
config = configure(globals())

# SIGTERM raises as Ctrl-C does, so that what is half done is removed.
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))

SPLITS = ('train', 'val')
BUNDLED = Path(__file__).parent / 'corpus' / 'shakespeare.txt'
CORPORA = {  # repository and configuration on the Hugging Face Hub; what is published of the size
    # 2,088,628 and 103,227,021 words to train (Merity et al., 2016)
    'wikitext2': ('Salesforce/wikitext', 'wikitext-2-raw-v1'),
    'wikitext103': ('Salesforce/wikitext', 'wikitext-103-raw-v1'),
    # 2,119,719 stories (its card)
    'tinystories': ('roneneldan/TinyStories', None),
    # 6,407,814 articles (its card); --subset is any other language
    'wikipedia': ('wikimedia/wikipedia', '20231101.en'),
    # 9,035,582,198 GPT-2 tokens to train (nanoGPT's README)
    'openwebtext': ('Skylion007/openwebtext', None),
    # 10 billion GPT-2 tokens (its card)
    'fineweb': ('HuggingFaceFW/fineweb-edu', 'sample-10BT'),
}

# -----------------------------------------------------------------------------
# Helpers, in the order in which they are used.


def default_name(path):
    """Name a dataset after its first file, without the suffixes, or after its first folder."""
    path = Path(os.path.abspath(path))  # the folder . has a name as well
    if not path.is_file():
        return path.name
    if documents.kind_of(path)[1]:  # .gz and the like
        return Path(path.stem).stem
    return path.stem


def read_splits(readers, lengths, fraction, seed):
    """Read the corpus from its beginning, as (split, text, ends).

    It is divided here unless the corpus has a validation split of its own.
    """
    if 'val' in readers:
        for piece in readers['val']():
            yield 'val', *piece
    yield from documents.divide(readers['train'](), lengths, fraction, seed)


def count_cores():
    """Count the cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def write_splits(folder, encoded, n_bytes, max_tokens):
    """Write train.bin and val.bin, flushed to disk. Returns what meta.json says of each.

    encoded: what `documents.encode_all` yields. n_bytes: of the text, or None; for the bar.
    Prints a note of each kind of change that the tokenizer makes to the text.
    """
    changes = {}
    stats = {split: {'tokens': 0, 'bytes': 0, 'documents': 0, 'highest': 0} for split in SPLITS}
    digests = {split: hashlib.sha256() for split in SPLITS}
    limits = {'train': max_tokens or math.inf, 'val': math.inf}
    bar = tqdm(total=n_bytes, unit='B', unit_scale=True, ncols=80, leave=False, disable=None)
    with bar, open(folder / 'train.bin', 'wb') as train, open(folder / 'val.bin', 'wb') as val:
        files = {'train': train, 'val': val}
        for split, ids, n_tokens, sizes, ends, batch_changes in encoded:
            row = stats[split]
            for what, (how_often, example) in batch_changes.items():
                before, example = changes.get(what, (0, example))
                changes[what] = before + how_often, example
            # Pieces that begin before the limit, so that the last of them reaches it.
            tokens_before = row['tokens'] + n_tokens.cumsum() - n_tokens
            kept = np.count_nonzero(tokens_before < limits[split])

            data = ids[: n_tokens[:kept].sum()]
            files[split].write(data)
            digests[split].update(data)
            row['tokens'] += len(data)
            row['bytes'] += int(sizes[:kept].sum())
            row['documents'] += int(ends[:kept].sum())
            row['highest'] = max(row['highest'], int(data.max(initial=0)))
            bar.update(int(sizes.sum()))

            # A single text is still read to its end, where its validation split is.
            if stats['train']['tokens'] >= limits['train'] and stats['val']['documents']:
                break

        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    for split in SPLITS:
        stats[split]['sha256'] = digests[split].hexdigest()
    for what, (how_often, (text, decoded)) in changes.items():
        print(f'Note: the tokenizer {what}, {how_often:,} times;')
        print(f'first, {text!r} comes back from its ids as {decoded!r}.')
    return stats


def publish(source, target):
    """Move a finished dataset into place.

    The old train.bin leaves first and the new one comes last: with it, the dataset is complete.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in ('train.bin', *tokenizers.FILES):
        (target / name).unlink(missing_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == 'train.bin'):
        os.replace(file, target / file.name)


# -----------------------------------------------------------------------------
# What to read, and what to call it. All that can be refused is refused before anything is read.

if val_fraction is not None and not 0 < val_fraction < 1:
    raise UserError(f'val_fraction={val_fraction} must lie between 0 and 1.')
check_range(config, 1, 10**15, 'max_tokens')
check_range(config, 1, 1024, 'num_proc')
check_range(config, 1, 2**24, 'vocab_size')

from_hub = input is None and dataset != 'shakespeare'
files = []
dataset_name = name or dataset.split('/')[-1]
if input is not None:
    files = documents.find_files(input)
    dataset_name = name or default_name(input.split(',')[0])
elif dataset == 'shakespeare':
    files = [BUNDLED]
elif dataset in CORPORA:
    repository, configuration = CORPORA[dataset]
elif dataset.startswith('hf:'):
    repository, configuration = dataset.removeprefix('hf:'), None
else:
    choices = ', '.join(['shakespeare', *CORPORA, 'hf:ORG/NAME'])
    raise UserError(f"There is no corpus named '{dataset}': use {choices}, or --input=PATH.")
source = [file.name for file in files]
if from_hub:
    source = [repository, subset or configuration]

target = Path('data') / dataset_name
if target.parent != Path('data') or target.name in ('', '..'):
    raise UserError(f"name='{dataset_name}' must be a plain name: the dataset goes to data/NAME.")
if target.parent.exists() and not target.parent.is_dir():
    raise UserError('data is a file, and the dataset is to go into a folder data: rename the file.')
if target.exists() and not target.is_dir():
    raise UserError(f'{target} is a file: choose another --name.')
if input and (dataset != 'shakespeare' or subset):
    raise UserError('input names your own files, dataset and subset a corpus: give one of them.')
if streaming and not from_hub:
    raise UserError('streaming=True is for corpora of the Hub.')
if streaming and tokenizer == 'char':
    raise UserError("tokenizer='char' must read all text first: it cannot be used with streaming.")

encoding = None  # the tokenizer itself
if tokenizer not in ('bpe', 'char'):  # those two are made from the text, below
    encoding = tokenizers.build(tokenizer)

# -----------------------------------------------------------------------------
# How large it is, which decides how much of it is for validation.

if from_hub:
    readers, n_bytes = documents.open_hub(*source, split, text_column, streaming)
else:
    readers = {'train': partial(documents.read_files, files, text_column)}
    n_bytes = sum(file.stat().st_size for file in files)

lengths = None  # of all documents, in characters, if the survey has seen them all
several = True  # documents, so that end-of-text comes between them; a single text has none
if not streaming:
    # Where the size of a file is not that of its text, only reading all of it tells.
    kinds = [documents.kind_of(file) for file in files]
    to_the_end = any(compression or suffix == '.parquet' for suffix, compression in kinds)
    lengths, bytes_seen, is_complete = documents.survey(readers['train'](), to_the_end)
    if not lengths:
        raise UserError(f'There is no text in {input or dataset}.')
    several = from_hub or len(lengths) > 1
    if is_complete:
        n_bytes = bytes_seen
    else:
        lengths = None

# What is streamed has no known size: take 4 bytes per token, and 5 billion tokens.
likely_bytes = n_bytes or 4 * (max_tokens or 5 * 10**9)
fraction = val_fraction or min(0.1, 10**7 / likely_bytes)
if 'val' in readers:
    fraction = 0.0

# -----------------------------------------------------------------------------
# The tokenizer, if it is made from the text.

if encoding is None:
    pieces = read_splits(readers, lengths, fraction, seed)
    texts = (text for _, text, _ in pieces)  # an alphabet must cover both splits
    if tokenizer == 'bpe':
        # Learned from the training split alone: validation is on unseen text.
        texts = (text for piece_split, text, _ in pieces if piece_split == 'train')
        texts = documents.sample_texts(texts, n_bytes, seed)
    encoding = tokenizers.build(tokenizer, texts, vocab_size, end_of_text=several)

end_of_text = encoding.end_of_text
separator = end_of_text if several else None
dtype = '<u2' if encoding.n_vocab <= 2**16 else '<u4'  # of the .bin files
if several and end_of_text is None:
    raise UserError(f'The tokenizer {tokenizer} has no end-of-text to end documents: use another.')

# -----------------------------------------------------------------------------
# Write it to a temporary folder, and move it into place when it is complete.

target.parent.mkdir(exist_ok=True)
with tempfile.TemporaryDirectory(prefix=f'.{target.name}-', dir=target.parent) as folder:
    temporary = Path(folder)
    batches = documents.in_batches(
        documents.join_pieces(read_splits(readers, lengths, fraction, seed), encoding)
    )
    n_threads = num_proc or count_cores()
    # There are threads enough: the library tokenizers need not start its own in each.
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    encoded = documents.encode_all(batches, encoding, separator, dtype, n_threads)
    # Ends its threads, and a Hub's readers, whatever happens.
    with contextlib.closing(batches), contextlib.closing(encoded):
        stats = write_splits(temporary, encoded, n_bytes, max_tokens)
    for key, row in stats.items():
        if row['tokens'] < 2:
            raise UserError(f'The text is too short: its {key} split has fewer than 2 tokens.')

    meta = {
        'format': 1, 'source': source, 'dtype': np.dtype(dtype).name,
        'tokenizer': encoding.kind, 'vocab_size': encoding.n_vocab, 'end_of_text': end_of_text,
        'train': stats['train'], 'val': stats['val'],
    }  # fmt: skip
    (temporary / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n')
    tokenizers.save(encoding, temporary)
    publish(temporary, target)

# -----------------------------------------------------------------------------
# Report.

val_share = stats['val']['bytes'] / (stats['train']['bytes'] + stats['val']['bytes'])
is_near = fraction / 2 < val_share < 2 * fraction
if lengths and fraction and max_tokens is None and not is_near:
    print(f'Note: documents stay whole: val has {val_share:.0%} of the text, not {fraction:.0%}.')
print(f'{target}: {encoding.kind} tokenizer, {encoding.n_vocab:,} tokens in its vocabulary')
print(f'{"split":>9} {"documents":>11} {"bytes":>15} {"tokens":>15} {"bytes/token":>13}')
for key, row in stats.items():
    rate = row['bytes'] / row['tokens']
    counts = f'{row["documents"]:>11,} {row["bytes"]:>15,} {row["tokens"]:>15,}'
    print(f'{key:>9} {counts} {rate:>13.2f}')

"""Turn text into tokens: data/NAME/ with train.bin, val.bin, meta.json and tokenizer.json.

    python prepare.py                                           # the bundled Shakespeare
    python prepare.py --input=book.txt                          # your own text, into data/book
    python prepare.py --input=a.txt,b.jsonl.gz,notes --name=my  # several files and folders
    python prepare.py --dataset=wikitext103 --tokenizer=gpt2    # a corpus of the Hugging Face Hub
    python prepare.py --dataset=hf:ORG/NAME --text_column=content --streaming --max_tokens=500000000
    python prepare.py --dataset=fineweb-2 --subset=deu_Latn --shard=3/16    # of 16 machines
    python prepare.py --name=fineweb-2 --merge              # and on one, when all of them are done

A document is a text file (lines that hold nothing but <|endoftext|> divide it into several), or a
row of a table: .jsonl, .ndjson, .json, .csv, .tsv, .parquet. Where there are several documents,
each is followed by an end-of-text token and belongs as a whole to one split, by a draw of its own.
A single text is cut: its last part is for validation. Interrupted, the same command goes on.

corpora of the Hub (--dataset), what their cards say of the size, and when to choose which:
    tinystories         2.1 million stories in a small child's words: for models below 30M
    tinystories-clean   2.7 million, all by GPT-4 and without broken characters, 0.6 GB
    simplestories       2 million stories with more variety in plot and style, 0.4 GB
    babylm              what a child hears and reads, 10 million words, or --subset=100M
    wikitext2           Wikipedia's good articles, 2 million words: to compare with papers
    wikitext103         the same, 103 million words
    wikipedia           6.4 million articles in English; other languages: --subset=20231101.de
    gutenberg           Project Gutenberg's books in English, 14 GB with the others: --split=de
    openwebtext         GPT-2's kind of web pages, 9 billion tokens: to compare with nanoGPT
    climbmix            400 billion tokens, mixed for small models: the best to pretrain on today
    fineweb-edu         web pages worth teaching, 10 billion tokens; --subset=sample-100BT
    fineweb             web pages in general, 10 billion tokens; --subset=sample-100BT
    fineweb-2           the same in 1,000 other languages: --subset=deu_Latn
    smollm              SmolLM's textbooks, cosmopedia-v2, 28 billion tokens;
                        its web pages: --subset=fineweb-edu-dedup
    dclm                the 4 trillion tokens of DataComp-LM's baseline; take it with --streaming
"""

from runtime import UserError, begin_script, count_cores, keep_freed_memory, raise_on_signals

begin_script()  # first, so that Ctrl-C ends the imports as well: they take seconds

import contextlib
import hashlib
import itertools
import math
import os
import random
import re
import sys
from array import array
from pathlib import Path

import numpy as np
from tqdm import tqdm

import documents
import draft as drafts
import sources
import tokenizer as tokenizers
from configurator import check_range, configure
from sources import Corpus
from tokens import release

# -----------------------------------------------------------------------------
dataset = 'shakespeare'  # a corpus of the table above, or hf:ORG/NAME for any other one of the Hub
input: str | None = None  # or your own files and folders, separated by commas
val_input: str | None = None  # your own files and folders for validation
extensions: str | None = None  # what to take in folders, '.py,.rs'; None: texts and tables
name: str | None = None  # write to data/NAME; None: named after the corpus or the first file
tokenizer = 'bpe'  # 'bpe', 'char', 'byte', 'gpt2', a folder that has one, or ORG/NAME of the Hub
vocab_size: int | None = None  # of a bpe vocabulary; None: by the size of the text, 4096 at most
val_fraction: float | None = None  # for validation; None: 0.1, at most 10 MB; streaming 0.0005
max_tokens: int | None = None  # to train on, up to a document's end or a megabyte more; None: all
seed = 1337  # of the draw that decides which documents are for validation
num_proc: int | None = None  # threads that tokenize; None: one per core
shard: str | None = None  # '3/16': prepare the third of 16 parts, here or on another machine
merge = False  # join the parts data/NAME-3-of-16
quiet = False  # no report of the text
# a corpus of the Hub
subset: str | None = None  # its configuration, such as 20231101.de of wikipedia
split: str | None = None  # its split to train on; None: what the table says, else 'train'
val_split: str | None = None  # its split for validation; None: the one it has, if any
text_column: str | None = None  # the column of texts, also of your own tables; None: 'text'
streaming = False  # do not store it on this disk, read it from the network as it is tokenized
# -----------------------------------------------------------------------------
config = configure(globals())
raise_on_signals()  # so that an interrupted run can say how to go on

BUNDLED = Path(__file__).parent / 'corpus' / 'shakespeare.txt'
CORPORA = {
    'tinystories': Corpus('roneneldan/TinyStories'),
    'tinystories-clean': Corpus('karpathy/tinystories-gpt4-clean'),
    'simplestories': Corpus('SimpleStories/SimpleStories', val_split='test', column='story'),
    'babylm': Corpus('cambridge-climb/BabyLM', '10M', 'clean/{}/*.txt', 'clean/dev/*.txt'),
    'wikitext2': Corpus('Salesforce/wikitext', 'wikitext-2-raw-v1'),
    'wikitext103': Corpus('Salesforce/wikitext', 'wikitext-103-raw-v1'),
    'wikipedia': Corpus('wikimedia/wikipedia', '20231101.en'),
    'gutenberg': Corpus('manu/project_gutenberg', split='en'),
    'openwebtext': Corpus('Skylion007/openwebtext'),
    'climbmix': Corpus(
        'karpathy/climbmix-400b-shuffle', None, 'shard_*.parquet', 'shard_06542.parquet'
    ),
    'fineweb-edu': Corpus('HuggingFaceFW/fineweb-edu', 'sample-10BT'),
    'fineweb': Corpus('HuggingFaceFW/fineweb', 'sample-10BT'),
    'fineweb-2': Corpus('HuggingFaceFW/fineweb-2', val_split='test'),
    'smollm': Corpus('HuggingFaceTB/smollm-corpus', 'cosmopedia-v2'),
    'dclm': Corpus('mlfoundations/dclm-baseline-1.0-parquet'),
}

# -----------------------------------------------------------------------------
# Helpers, in the order in which they are used.


def default_name(path):
    """Name a dataset after its first file, without the suffixes, or after its first folder."""
    path = Path(os.path.abspath(os.path.expanduser(path)))  # the folder . has a name as well
    if not path.is_file():
        return path.name
    if sources.kind_of(path)[1]:  # .gz and the like
        return Path(path.stem).stem
    return path.stem


def find_corpus():
    """Return the Corpus that the knobs describe."""
    if dataset.startswith('hf:'):
        corpus = Corpus(os.path.expanduser(dataset.removeprefix('hf:')))
    elif dataset in CORPORA:
        corpus = CORPORA[dataset]
    else:
        choices = ', '.join(['shakespeare', *CORPORA, 'hf:ORG/NAME'])
        raise UserError(f"There is no corpus '{dataset}': use {choices}, or --input=PATH.")
    if dataset == 'fineweb-2' and subset is None:
        raise UserError('fineweb-2 needs a language: --subset=deu_Latn, cmn_Hani, arb_Arab, ...')
    corpus = corpus._replace(
        configuration=subset or corpus.configuration,
        split=split or corpus.split,
        val_split=val_split or corpus.val_split,
        column=text_column or corpus.column,
    )
    return corpus._replace(split=corpus.split.replace('{}', str(corpus.configuration)))


def describe_job(splits, column):
    """Return all that the result depends on, for job.json."""
    ignored = {'num_proc', 'quiet', 'merge', 'input', 'val_input', 'name'}
    job = {key: value for key, value in config.items() if key not in ignored}
    job |= {'column': column, 'piece': sources.PIECE, 'files': {}, 'stamps': []}
    for key, files in splits.items():
        job['files'][key] = [[Path(file.name).name, file.size] for file in files]
        job['stamps'] += [[file.name, file.stamp] for file in files]
    if encoding is not None:  # it is not made from the text
        job['tokenizer'] = hash_files(encoding)
    return job


def hash_files(encoding):
    """Return by what a tokenizer is recognized: the hash of its files, and its end-of-text."""
    digest = hashlib.sha256(repr(sorted(encoding.files.items())).encode())
    return [digest.hexdigest(), encoding.end_of_text]


def survey_corpus(parts, column, sizes):
    """Measure a corpus and choose its division: what a draft calls facts.

    sizes: the bytes of text in each file, None where only reading tells.
    """
    n_bytes = None if streaming else sum(size or 0 for size in sizes)
    lengths = None
    several = True  # of what is streamed
    if not streaming:
        found, bytes_seen, is_complete = documents.survey(parts['train'], column, None in sizes)
        if not any(found):
            raise UserError(f'There is no text in {input or dataset}.')
        if is_complete:
            lengths = found
            n_bytes = bytes_seen
        several = from_hub or not is_complete or sum(map(len, found)) > 1
    if 'val' in parts and not several:
        for_validation, _, _ = documents.survey(parts['val'], column, False)
        several = sum(map(len, for_validation)) > 1

    # What is streamed has no known size: take 4 bytes per token, and 5 billion tokens.
    likely_bytes = n_bytes or 4 * (max_tokens or 5 * 10**9)
    fraction = val_fraction or min(0.1, 10**7 / likely_bytes)
    if 'val' in parts:
        fraction = 0.0
    division = documents.choose_division(lengths, fraction, seed)
    return {
        'n_bytes': n_bytes, 'several': several, 'division': division,
        'fraction': fraction if lengths and max_tokens is None else None,  # to be compared with
    }  # fmt: skip


def make_tokenizer(parts, column, facts):
    """Make the tokenizer that is learned from the text."""
    divided = []
    for number, part in enumerate(parts['train']):
        pieces = sources.read_part(part, column)
        divided.append(documents.divide(pieces, facts['division'], number))
    # An alphabet must cover both splits. A bpe vocabulary is learned from the training split
    # alone: validation is on unseen text.
    wanted = ('train', 'val') if tokenizer == 'char' else ('train',)
    texts = (text for pieces in divided for key, text, _ in pieces if key in wanted)
    if tokenizer == 'bpe':
        texts = documents.sample_texts(texts, facts['n_bytes'], seed)
    elif 'val' in parts:
        more = (text for part in parts['val'] for text, _ in sources.read_part(part, column))
        texts = itertools.chain(texts, filter(None, more))
    size = vocab_size or suitable_vocabulary(facts['n_bytes'])
    return tokenizers.build(tokenizer, texts, size, end_of_text=facts['several'])


def suitable_vocabulary(n_bytes):
    """Return the size of a bpe vocabulary for a text: 2.5 sqrt(bytes), rounded to a power of two.

    A token that is seen a few times only is not learned. 4,096, from 1.3 MB on, are enough for
    models of a laptop; large ones want more. n_bytes: None where it is not known, and so is much.
    """
    exponent = round(math.log2(2.5 * math.sqrt(n_bytes))) if n_bytes else math.inf
    return 2 ** max(9, min(12, exponent))


def read_batches(parts, column, encoding, division, last):
    """Yield (row, pieces) of the batches of this shard behind a place, in order."""
    number = -1
    n_parts = sum(map(len, parts.values()))
    for key in ('val', 'train'):
        for index, part in enumerate(parts.get(key, [])):
            number += 1
            # Where there are fewer parts than shards, these take turns within a part.
            by_part = n_parts >= n_shards
            is_of_another = by_part and number % n_shards != shard_number
            if number < last[0] or is_of_another:
                continue
            rule = division if key == 'train' else documents.Division(None, 1.0, seed)
            divided = documents.divide(sources.read_part(part, column), rule, index)
            batches = documents.in_batches(documents.join_pieces(divided, encoding))
            for batch, (piece_split, pieces, n_blank) in enumerate(batches):
                # Of two batches, one is of validation.
                is_mine = by_part or batch // 2 % n_shards == shard_number
                if (number, batch) > last and is_mine and (pieces or n_blank):
                    row = {'part': number, 'batch': batch, 'split': piece_split, 'blank': n_blank}
                    yield row, pieces


def write_batches(draft, parts, column, encoding):
    """Tokenize what is behind the last place of a draft, and add it, up to max_tokens."""
    train, val = (draft.totals[key] for key in drafts.SPLITS)
    if draft.last != drafts.NOTHING:
        print(f'Going on behind the {train["tokens"]:,} tokens of {draft.folder}.')
    facts = draft.facts
    separator = encoding.end_of_text if facts['several'] else None
    division = documents.Division(*facts['division'])
    batches = read_batches(parts, column, encoding, division, draft.last)
    keep_freed_memory()  # of a batch, for the next one
    # There are threads enough: the library tokenizers need not start its own in each.
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    n_threads = num_proc or count_cores()
    encoded = documents.encode_all(batches, encoding, separator, facts['dtype'], n_threads)

    options = {'unit': 'B', 'unit_scale': True, 'ncols': 80, 'leave': False, 'disable': None}
    options |= {'total': facts['n_bytes'], 'initial': train['bytes'] + val['bytes']}
    # The two are closed whatever happens: their threads end, and a Hub's readers.
    with tqdm(**options) as bar, contextlib.closing(batches), contextlib.closing(encoded):
        for row, pieces, oddities, ids, n_tokens, sizes, ends, changes in encoded:
            # Where validation has no document yet, it is the end of a single text: read on.
            limit = max_tokens or math.inf
            if train['tokens'] >= limit and val['documents']:
                break
            n_kept = len(n_tokens)
            if row['split'] == 'train':
                # Pieces that begin before the limit, so that the last of them reaches it.
                before = train['tokens'] + n_tokens.cumsum() - n_tokens
                n_kept = np.count_nonzero(before < limit)
            if n_kept < len(pieces):
                oddities = documents.count_oddities(pieces[:n_kept])
            data = ids[: n_tokens[:n_kept].sum()]
            row |= {
                'tokens': len(data),
                'bytes': int(sizes[:n_kept].sum()),
                'documents': int(ends[:n_kept].sum()),
                'highest': int(data.max(initial=0)),
                'oddities': {**oddities, 'blank': row.pop('blank')},
                'changes': changes,
            }
            draft.add(row, data)
            bar.update(int(sizes.sum()))


def describe_documents(splits, end_of_text):
    """Return how many documents there are, the tokens of the longest and shortest, and copies.

    splits: their tokens. Copies are documents with the same tokens as one before.
    """
    longest = 0
    shortest = math.inf
    hashes = array('q')  # one of each document
    for tokens in splits:
        start = 0
        for block in range(0, len(tokens), 2**22):
            ends = np.flatnonzero(tokens[block : block + 2**22] == end_of_text)
            for end in (ends + block).tolist():
                longest = max(longest, end - start)
                shortest = min(shortest, end - start)
                hashes.append(hash(tokens[start:end].tobytes()))
                start = end + 1
            release(tokens)
    n_copies = len(hashes) - len(np.unique(hashes))
    return len(hashes), longest, shortest, n_copies


def print_report(target, meta, oddities, encoding):
    """Print what a person would want to know of the text before training on it, in 10 lines."""
    splits = [drafts.open_split(target, meta, key) for key in drafts.SPLITS]
    if meta['end_of_text'] is not None and facts['several']:
        n_documents, longest, shortest, n_copies = describe_documents(splits, meta['end_of_text'])
        share = n_copies / max(1, n_documents)
        lengths = f'{shortest:,} to {longest:,} tokens each'
        print(f'documents  {n_documents:,}, {lengths}; {share:.1%} are copies of one before')
    controls = f'{oddities["controls"]:,} control characters'
    print(f'odd        {controls}, {oddities["replaced"]:,} that were replaced by U+FFFD')
    print('Five pieces of the training text, as the model will see them:')
    rng = random.Random(seed)
    for _ in range(5):
        start = rng.randrange(max(1, len(splits[0]) - 40))
        text = encoding.decode(splits[0][start : start + 40].tolist())
        print(f'  {text!r}'[:78])


# -----------------------------------------------------------------------------
# What to read, and what to call it. All that can be refused is refused before anything is read.

if val_fraction is not None and not 0 < val_fraction < 1:
    raise UserError(f'val_fraction={val_fraction} must lie between 0 and 1.')
check_range(config, 1, 10**15, 'max_tokens')
check_range(config, 1, 1024, 'num_proc')
check_range(config, 1, 2**24, 'vocab_size')
check_range(config, 0, 2**63, 'seed')

from_hub = input is None and dataset != 'shakespeare'
dataset_name = name or dataset.removeprefix('hf:').rstrip('/').split('/')[-1]
if input is not None:
    dataset_name = name or default_name(input.split(',')[0])
target = Path('data') / dataset_name
if target.parent != Path('data') or target.name in ('', '..') or target.name.startswith('.'):
    raise UserError(f"name='{dataset_name}' must be a plain name: the dataset goes to data/NAME.")
if target.parent.exists() and not target.parent.is_dir():
    raise UserError('data is a file, and the dataset is to go into a folder data: rename the file.')
if target.exists() and not target.is_dir():
    raise UserError(f'{target} is a file: choose another --name.')
if input is not None and (dataset != 'shakespeare' or subset):
    raise UserError('input names your own files, dataset and subset a corpus: give one of them.')
if streaming and not from_hub:
    raise UserError('streaming=True is for corpora of the Hub.')
if streaming and tokenizer == 'char':
    raise UserError("tokenizer='char' must read all text first: it cannot be used with streaming.")
given = [key for key in ('val_fraction', 'val_input', 'val_split') if config[key] is not None]
if len(given) > 1:
    raise UserError(f'{" and ".join(given)} both say what validation is: give one of them.')
if (split is not None or val_split is not None) and not from_hub:
    raise UserError('split and val_split are for corpora of the Hub.')

shard_number = 0
n_shards = 1
draft_folder = target.with_name(f'.{target.name}.draft')
if shard is not None:
    match = re.fullmatch(r'([0-9]{1,5})/([0-9]{1,5})', shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"shard='{shard}' must be such as 3/16, the third of 16.")
    if max_tokens is not None or merge:
        raise UserError('shard goes together neither with max_tokens nor with merge.')
    shard_number = int(match[1]) - 1
    n_shards = int(match[2])
    draft_folder = target.with_name(f'{target.name}-{shard_number + 1}-of-{n_shards}')

encoding = None  # the tokenizer itself
if tokenizer not in ('bpe', 'char') and not merge:  # those two are made from the text, below
    encoding = tokenizers.build(tokenizer)

# -----------------------------------------------------------------------------
# Read, or join what several machines have read.

if merge:
    draft = drafts.join(drafts.find_shards(target), draft_folder)
    encoding = tokenizers.load(draft.folder, {'eos': draft.facts['end_of_text']})
else:
    column = text_column or 'text'
    if from_hub:
        corpus = find_corpus()
        column = corpus.column
        splits = sources.open_hub(corpus, streaming)
        source = [corpus.repository, corpus.configuration]
    else:
        paths = str(BUNDLED) if input is None else input
        splits = {'train': sources.find_files(paths, extensions)}
        source = [Path(file.name).name for file in splits['train']]
    if val_input is not None:
        splits['val'] = sources.find_files(val_input, extensions)
        paths = {os.path.realpath(file.name) for file in splits['train']}
        for file in splits['val']:
            if os.path.realpath(file.name) in paths:
                what = f'{file.name} is both in input and in val_input'
                raise UserError(f'{what}: leave it out of one.')
    parts = {key: sources.make_parts(files) for key, files in splits.items()}

    job = describe_job(splits, column)
    facts = drafts.find_facts(draft_folder, job)
    if facts is None:
        sizes = [] if streaming else [sources.text_size(file, column) for file in splits['train']]
        facts = survey_corpus(parts, column, sizes)
        if encoding is None:
            encoding = make_tokenizer(parts, column, facts)
        if facts['several'] and encoding.end_of_text is None:
            how = 'has no end-of-text to end documents: use another'
            raise UserError(f'The tokenizer {tokenizer} {how}.')
        facts['source'] = source
        facts['end_of_text'] = encoding.end_of_text
        facts['tokenizer'] = hash_files(encoding)
        facts['dtype'] = '<u2' if encoding.n_vocab <= 2**16 else '<u4'  # of the .bin files
    elif encoding is None:
        encoding = tokenizers.load(draft_folder)

    draft = drafts.Draft(draft_folder, job)
    try:
        draft.open(facts, encoding)
        write_batches(draft, parts, column, encoding)
    except UserError:
        if draft.is_empty():
            draft.delete()
        raise
    except (KeyboardInterrupt, SystemExit):
        print('\nInterrupted: the same command goes on from here.', file=sys.stderr)
        raise
    draft.finish()

if shard is not None:
    print(f'{draft_folder} is done, {draft.totals["train"]["tokens"]:,} tokens to train on.')
    print(f'When all {n_shards} are in one folder data, join them there with:')
    print(f'python prepare.py --name={target.name} --merge')
    sys.exit()

for key in drafts.SPLITS:
    if draft.totals[key]['tokens'] < 2:
        draft.delete()
        raise UserError(f'The text is too short: its {key} split has fewer than 2 tokens.')
facts = draft.facts
meta = {
    'format': 1, 'source': facts['source'], 'dtype': np.dtype(facts['dtype']).name,
    'tokenizer': encoding.kind, 'vocab_size': encoding.n_vocab,
    'end_of_text': facts['end_of_text'],
}  # fmt: skip
drafts.publish(draft, target, meta)

# -----------------------------------------------------------------------------
# Report.

for what, (how_often, (text, decoded)) in draft.totals['changes'].items():
    print(f'Note: the tokenizer {what}, {how_often:,} times;')
    print(f'first, {text!r} comes back from its ids as {decoded!r}.')
oddities = draft.totals['oddities']
if oddities['end_of_text'] and encoding.kind != 'published':
    print(f'Note: {tokenizers.END_OF_TEXT} inside a line or a table is plain text, which it is')
    print(f'{oddities["end_of_text"]:,} times. A line of its own, in a text file, ends a document.')
if oddities['blank']:
    print(f'Note: {oddities["blank"]:,} rows or documents without text are left out.')
if merge:
    print(f'The parts, {target}-1-of-N and so on, can be deleted.')
n_bytes = {key: meta[key]['bytes'] for key in drafts.SPLITS}
val_share = n_bytes['val'] / sum(n_bytes.values())
fraction = facts['fraction']
if fraction and not fraction / 2 < val_share < 2 * fraction:
    print(f'Note: documents stay whole: val has {val_share:.0%} of the text, not {fraction:.0%}.')
print(f'{target}: {encoding.kind} tokenizer, {encoding.n_vocab:,} tokens in its vocabulary')
print(f'{"split":>9} {"documents":>11} {"bytes":>15} {"tokens":>15} {"bytes/token":>13}')
for key in drafts.SPLITS:
    row = meta[key]
    rate = row['bytes'] / row['tokens']
    counts = f'{row["documents"]:>11,} {row["bytes"]:>15,} {row["tokens"]:>15,}'
    print(f'{key:>9} {counts} {rate:>13.2f}')
if not quiet:
    print_report(target, meta, oddities, encoding)

"""Turn text into tokens: data/NAME/ with train.bin, val.bin, meta.json and tokenizer.json.

    python prepare.py                                            # the bundled Shakespeare
    python prepare.py --input=book.txt                           # your own text, into data/book
    python prepare.py --input=a.txt,b.jsonl.gz,notes/ --name=mine  # several files, and folders of them
    python prepare.py --dataset=wikitext103 --tokenizer=gpt2     # a corpus of the Hugging Face Hub
    python prepare.py --dataset=hf:ORG/NAME --text_column=content --streaming --max_tokens=1000000000

A document is a text file (lines that hold nothing but <|endoftext|> divide it into several), or a row of a table:
.jsonl, .json, .csv, .parquet. Where there are several documents, each is followed by an end-of-text token and belongs
as a whole to one split, by a draw of its own. A single text is cut: its last part is for validation.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import documents
import tokenizer as tokenizers
from configurator import check, configure, errors_in_one_sentence

# -----------------------------------------------------------------------------
dataset = 'shakespeare'  # a corpus by name, one of CORPORA below, or hf:ORG/NAME for any other of the Hub
input: str | None = None  # or your own files and folders, separated by commas
name: str | None = None  # write to data/NAME; None: named after the corpus or the first file
tokenizer = 'bpe'  # 'bpe', 'char', 'byte', 'gpt2', or a folder (dataset, checkpoint, model) to take it from
vocab_size = 4096  # of a bpe vocabulary
val_fraction: float | None = None  # of the text, for validation; None: a tenth but 10 MB at most, 0.0005 when streaming
max_tokens: int | None = None  # to train on, and the rest of their document, or megabyte of a text; None: all
seed = 1337  # of the draw that decides which documents are for validation
num_proc: int | None = None  # threads that tokenize; None: one a core
# a corpus of the Hub
subset: str | None = None  # its configuration, such as 20231101.de of wikipedia
split = 'train'  # its split to train on; its validation split is used if it has one
text_column = 'text'  # the column of a table that has the text, also of your own files
streaming = False  # do not store it on this disk, read it from the network as it is tokenized
# -----------------------------------------------------------------------------

BUNDLED = Path(__file__).parent / 'corpus' / 'shakespeare.txt'
CORPORA = {  # repository and configuration on the Hugging Face Hub; what is published of the size
    'wikitext2': ('Salesforce/wikitext', 'wikitext-2-raw-v1'),  # 2,088,628 words to train (Merity et al., 2016)
    'wikitext103': ('Salesforce/wikitext', 'wikitext-103-raw-v1'),  # 103,227,021 words (likewise)
    'tinystories': ('roneneldan/TinyStories', None),  # 2,119,719 stories (its card)
    'wikipedia': ('wikimedia/wikipedia', '20231101.en'),  # 6,407,814 articles (its card); any language
    'openwebtext': ('Skylion007/openwebtext', None),  # 9,035,582,198 GPT-2 tokens to train (nanoGPT's README)
    'fineweb': ('HuggingFaceFW/fineweb-edu', 'sample-10BT'),  # 10 billion GPT-2 tokens (its card)
}


def write(folder, encoded, size):
    """Write the .bin files, flushed to disk. Returns what meta.json says of them.

    encoded: what `documents.encode_all` gives. size: of the text in bytes, if known, for the progress bar.
    """
    meta = {part: {'tokens': 0, 'bytes': 0, 'documents': 0, 'highest': 0} for part in ('train', 'val')}
    digests = {part: hashlib.sha256() for part in meta}
    with contextlib.ExitStack() as stack:
        files = {part: stack.enter_context(open(folder / f'{part}.bin', 'wb')) for part in meta}
        bar = stack.enter_context(tqdm(total=size, unit='B', unit_scale=True, ncols=80, leave=False, disable=None))
        for part, ids, tokens, sizes, ends in encoded:
            row = meta[part]
            left = math.inf if max_tokens is None or part == 'val' else max_tokens - row['tokens']
            # pieces, with the one that reaches max_tokens
            kept = 1 + np.searchsorted(tokens.cumsum(), left) if left > 0 else 0
            data = ids[: tokens[:kept].sum()]
            files[part].write(data)
            digests[part].update(data)
            row['tokens'] += len(data)
            row['bytes'] += int(sizes[:kept].sum())
            row['documents'] += int(ends[:kept].sum())
            row['highest'] = max(row['highest'], int(data.max(initial=0)))
            bar.update(int(sizes.sum()))
            if max_tokens and meta['train']['tokens'] >= max_tokens and meta['val']['documents']:
                break
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return {part: row | {'sha256': digests[part].hexdigest()} for part, row in meta.items()}


def publish(source, target):
    """Move a finished dataset into place. train.bin leaves first and comes last: with it, the dataset is complete."""
    target.mkdir(parents=True, exist_ok=True)
    (target / 'train.bin').unlink(missing_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == 'train.bin'):
        os.replace(file, target / file.name)


def main():
    config = configure(globals())
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction={val_fraction} must lie between 0 and 1.')
    check(config, 1, 10**15, 'max_tokens')
    check(config, 1, 1024, 'num_proc')
    check(config, 1, 2**24, 'vocab_size')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half done is cleared away
    files = []
    if input is None and dataset != 'shakespeare':
        repository, configuration = CORPORA.get(dataset, (dataset.removeprefix('hf:'), None))
        if dataset not in CORPORA and not dataset.startswith('hf:'):
            known = ', '.join(['shakespeare', *CORPORA])
            raise ValueError(f"There is no corpus named '{dataset}': use one of {known}, hf:ORG/NAME, or --input=PATH.")
        source, called = [repository, subset or configuration], dataset.split('/')[-1]
    else:
        files = [BUNDLED] if input is None else documents.find_files(input)
        first = Path(os.path.abspath((input or 'shakespeare').split(',')[0]))
        source, called = [file.name for file in files], first.name
        if first.is_file():
            called = called.removesuffix(''.join(first.suffixes[-2 if documents.kind_of(first)[1] else -1 :]))
    target = Path('data') / (name or called)
    if target.parent != Path('data') or target.name in ('', '..'):
        raise ValueError(f"name='{name or called}' must be a plain name: the dataset is written to data/NAME.")
    if target.exists() and not target.is_dir():
        raise ValueError(f'{target} is a file: choose another --name.')
    if input and (dataset != 'shakespeare' or subset):
        raise ValueError('input is for your own files, dataset and subset for a corpus of the Hub: give one of them.')
    if streaming and files:
        raise ValueError('streaming=True is for corpora of the Hub.')
    if streaming and tokenizer == 'char':
        raise ValueError("tokenizer='char' must read all of the text first: it cannot be used with streaming.")
    learned = tokenizer in ('bpe', 'char')  # from the text, so built when it is known
    built = None if learned else tokenizers.build(tokenizer)

    if files:
        read = {'train': partial(documents.read_files, files, text_column)}
        size = sum(file.stat().st_size for file in files)
    else:
        read, size = documents.open_hub(repository, subset or configuration, split, text_column, streaming)
    lengths, several = None, True
    if not streaming:
        # Only the size of plain files is that of their text.
        unknown = any(documents.kind_of(file)[1] or documents.kind_of(file)[0] == '.parquet' for file in files)
        lengths, seen, whole = documents.survey(read['train'](), to_the_end=unknown)
        several, size = not files or len(lengths) > 1, seen if whole else size
        if not lengths:
            raise ValueError(f'There is no text in {", ".join(map(str, files[:3] or source))}.')
        lengths = lengths if whole else None
    guess = size or 4 * (max_tokens or 5 * 10**9)
    fraction = 0.0 if 'val' in read else val_fraction or min(0.1, 10**7 / guess)

    def divided():
        if 'val' in read:
            yield from (('val', *piece) for piece in read['val']())
        yield from documents.divide(read['train'](), lengths, fraction, seed)

    if learned:
        # A vocabulary of byte pairs is learned from the training part alone; an alphabet must cover both.
        texts = (text for part, text, _ in divided() if part == 'train' or tokenizer == 'char')
        texts = documents.sample(texts, size, seed) if tokenizer == 'bpe' else texts
        built = tokenizers.build(tokenizer, texts, vocab_size, end_of_text=several)
    end_of_text = tokenizers.end_of_text_id(built) if several else None
    if several and end_of_text is None:
        raise ValueError(f'The tokenizer {tokenizer} has no end-of-text to put between documents: use another one.')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()

    target.parent.mkdir(exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{target.name}-', dir=target.parent))
    try:
        meta = {
            'format': 1,
            'source': source,
            'dtype': 'uint16' if built.n_vocab <= 2**16 else 'uint32',
            'tokenizer': built.name,
            'vocab_size': built.n_vocab,
            'end_of_text': tokenizers.end_of_text_id(built),
        }
        batches, dtype = documents.in_batches(divided()), np.dtype(meta['dtype']).newbyteorder('<')
        encoded = documents.encode_all(batches, built, end_of_text, dtype, num_proc or cores)
        with contextlib.closing(encoded):
            meta |= write(temporary, encoded, size)
        for part in ('train', 'val'):
            if meta[part]['tokens'] < 2:
                raise ValueError(f'The text is too short: its {part} split has fewer than 2 tokens.')
        tokenizers.save(built, temporary)
        (temporary / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n')
        publish(temporary, target)
    finally:
        shutil.rmtree(temporary)

    share = meta['val']['bytes'] / (meta['train']['bytes'] + meta['val']['bytes'])
    if lengths and fraction and max_tokens is None and not fraction / 2 < share < 2 * fraction:
        print(f'Note: documents stay whole, so {share:.0%} of the text is for validation, not {fraction:.0%}.')
    print(f'{target}: {built.name} tokenizer, {built.n_vocab:,} tokens in its vocabulary')
    print(f'{"split":>9} {"documents":>11} {"bytes":>15} {"tokens":>15} {"bytes/token":>13}')
    for part in ('train', 'val'):
        row = meta[part]
        rate = row['bytes'] / row['tokens']
        print(f'{part:>9} {row["documents"]:>11,} {row["bytes"]:>15,} {row["tokens"]:>15,} {rate:>13.2f}')


if __name__ == '__main__':
    with errors_in_one_sentence():
        main()

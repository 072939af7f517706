"""Turn text into tokens: data/NAME/ with train.bin, val.bin, meta.json and tokenizer.json.

    python prepare.py                                          # the bundled Shakespeare
    python prepare.py --input=book.txt                         # your own text, into data/book
    python prepare.py --input=a.txt,b.txt,notes/ --name=mine   # several files, folders of .txt and .md

A file is one document; lines that hold nothing but <|endoftext|> divide it into several. Where there are several
documents, each is followed by an end-of-text token, and the split falls between two of them.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np

import tokenizer as tokenizers
from configurator import configure, errors_in_one_sentence

# -----------------------------------------------------------------------------
dataset = 'shakespeare'  # a corpus by name; so far 'shakespeare', which is bundled
input: str | None = None  # or your own text: files and folders, separated by commas
name: str | None = None  # write to data/NAME; None: named after the corpus or the first file
tokenizer = 'bpe'  # 'bpe', 'char', 'byte', 'gpt2', or a folder (dataset, checkpoint, model) to take it from
vocab_size = 4096  # of a bpe vocabulary
val_fraction = 0.1  # the last part of the text is for validation
# -----------------------------------------------------------------------------

BUNDLED = Path(__file__).parent / 'corpus' / 'shakespeare.txt'
SEPARATOR = re.compile(rf'^{re.escape(tokenizers.END_OF_TEXT)}[ \t]*\r?(?:\n|\Z)', re.MULTILINE)


def find_files(paths):
    """The text files named by a comma-separated list of files and folders. Raises FileNotFoundError."""
    files = []
    for path in paths.split(','):
        if not path:
            raise FileNotFoundError(f"input='{paths}' has an empty name: separate names by single commas.")
        path = Path(path)
        found = sorted(path.rglob('*')) if path.is_dir() else [path]
        if path.is_dir():
            found = [file for file in found if file.suffix.lower() in ('.txt', '.md') and file.is_file()]
        if not found or not found[0].exists():
            raise FileNotFoundError(
                f'The folder {path} has no .txt or .md file.' if path.is_dir() else f'There is no file {path}.'
            )
        files += found
    return files


def read_documents(files):
    """The documents in some files, but for empty ones. Raises ValueError where a file is not UTF-8."""
    documents = []
    for path in files:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f'{path} is not UTF-8 text: byte {error.start:,} cannot be decoded.') from None
        documents += [document for document in SEPARATOR.split(text) if document.strip()]
    return documents


def split_documents(documents, val_fraction):
    """(train, val): the last `val_fraction` of the characters are for validation.

    A single text is cut right there, several at the document boundary nearest to it, with at least one on each side.
    """
    total = sum(map(len, documents))
    if len(documents) == 1:
        cut = int(total * (1 - val_fraction))
        return [documents[0][:cut]], [documents[0][cut:]]
    ends = np.cumsum([len(document) for document in documents])[:-1]
    cut = 1 + int(np.argmin(np.abs(ends - total * (1 - val_fraction))))
    return documents[:cut], documents[cut:]


def write_split(path, documents, tokenizer, end_of_text, dtype):
    """Tokenize documents into a .bin, flushed to disk. Returns what meta.json says of the split."""
    digest, count = hashlib.sha256(), 0
    with open(path, 'wb') as file:
        for document in documents:
            ids = tokenizers.encode(tokenizer, document)
            if end_of_text is not None:
                ids = np.append(ids, end_of_text)
            data = ids.astype(dtype).tobytes()
            file.write(data)
            digest.update(data)
            count += len(ids)
        file.flush()
        os.fsync(file.fileno())
    size = sum(len(document.encode()) for document in documents)
    return {'tokens': count, 'bytes': size, 'documents': len(documents), 'sha256': digest.hexdigest()}


def publish(source, target):
    """Move a finished dataset into place. train.bin leaves first and comes last: with it, the dataset is complete."""
    target.mkdir(parents=True, exist_ok=True)
    (target / 'train.bin').unlink(missing_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == 'train.bin'):
        os.replace(file, target / file.name)


def main():
    configure(globals())
    if not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction={val_fraction} must lie between 0 and 1.')
    if input is None and dataset != 'shakespeare':
        raise ValueError(f"There is no corpus named '{dataset}'; for your own text use --input=PATH.")
    files = [BUNDLED] if input is None else find_files(input)
    target = Path('data') / (name or (dataset if input is None else Path(input.split(',')[0]).stem))
    if target.parent != Path('data') or target.name in ('', '..'):
        raise ValueError(f"name='{name}' must be a plain name: the dataset is written to data/NAME.")

    documents = read_documents(files)
    if not documents:
        raise ValueError(f'There is no text in {", ".join(map(str, files[:3]))}.')
    splits = dict(zip(('train', 'val'), split_documents(documents, val_fraction), strict=True))
    # A vocabulary of byte pairs is learned from the training part alone; an alphabet must cover both.
    several = len(documents) > 1
    source = splits['train'] if tokenizer == 'bpe' else documents
    built = tokenizers.build(tokenizer, source, vocab_size, end_of_text=several)
    end_of_text = tokenizers.end_of_text_id(built)

    target.parent.mkdir(exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{target.name}-', dir=target.parent))
    try:
        meta = {
            'format': 1,
            'source': [file.name for file in files],
            'dtype': 'uint16' if built.n_vocab <= 2**16 else 'uint32',
            'tokenizer': built.name,
            'vocab_size': built.n_vocab,
            'end_of_text': end_of_text,
        }
        for split, part in splits.items():
            path = temporary / f'{split}.bin'
            meta[split] = write_split(path, part, built, end_of_text if several else None, meta['dtype'])
            if meta[split]['tokens'] < 2:
                raise ValueError(f'The text is too short: its {split} split has fewer than 2 tokens.')
        tokenizers.save(built, temporary)
        (temporary / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n')
        publish(temporary, target)
    finally:
        shutil.rmtree(temporary)

    share = sum(map(len, splits['val'])) / sum(map(len, documents))
    if not val_fraction / 2 < share < 2 * val_fraction:
        print(f'Note: documents stay whole, so {share:.0%} of the text is for validation, not {val_fraction:.0%}.')
    print(f'{target}: {built.name} tokenizer, {built.n_vocab:,} tokens in its vocabulary')
    print(f'{"split":>9} {"documents":>11} {"bytes":>15} {"tokens":>15} {"bytes/token":>13}')
    for split in splits:
        row = meta[split]
        rate = row['bytes'] / row['tokens']
        print(f'{split:>9} {row["documents"]:>11,} {row["bytes"]:>15,} {row["tokens"]:>15,} {rate:>13.2f}')


if __name__ == '__main__':
    with errors_in_one_sentence():
        main()

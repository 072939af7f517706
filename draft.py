"""A dataset in the making: tokens so far, on the disk, so that an interrupted prepare.py goes on.

    data/.NAME.draft/        or data/NAME-3-of-16/, what one of 16 machines makes of it
      job.json               what was asked for, and what follows from it: without it, no draft
      tokenizer.json, ...
      train_00000.bin, ...   the tokens so far, in files of FILE_BYTES
      batches.jsonl          a line per batch of texts whose tokens are on the disk

A corpus is a row of parts, and a part a row of batches: (part, batch) is a place in it. What comes
of a batch depends on nothing that was before it, so whoever knows the last place in batches.jsonl
can go on behind it, and the batches of several machines, sorted by their places, are those that one
machine would have made.
"""

import collections
import heapq
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np

import tokenizer as tokenizers
from runtime import UserError, lock_file
from tokens import SPLITS, checksum, open_tokens, split_files

FILE_BYTES = 2**30  # of a file of tokens; the last one has what is left
SECONDS = 2  # after which what has been tokenized is flushed to the disk
NOTHING = (-1, -1)  # the place before the first batch
JOB = 'job.json'
BATCHES = 'batches.jsonl'
_OTHERS = ('.lock', JOB, f'{JOB}.tmp', BATCHES, 'meta.json', *tokenizers.FILES)
OURS = re.compile(r'(train|val)_[0-9]+\.bin|' + '|'.join(map(re.escape, _OTHERS)))


class Draft:
    """What is there of a dataset in a folder, and a way to add to it.

    job: everything that the result depends on. totals: see new_totals(). last: the place of the
    last batch. Raises UserError if another process has the folder.
    """

    def __init__(self, folder, job):
        self.folder = Path(folder)
        self.job = job
        self.totals = new_totals()
        self.last = NOTHING
        self.files = {}
        self.waiting = []  # lines of batches.jsonl, until the tokens are on the disk
        self.flushed = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if not OURS.fullmatch(path.name):
                raise UserError(f'{path} is in the way, where tokens are to be: move it.')
        lock_file(self.folder / '.lock', f'Another process prepares {self.folder}: wait for it.')

    def open(self, facts, encoding):
        """Open the files behind what batches.jsonl says is in them, and cut off what it does not.

        facts: what took time to find out of the job, for whoever goes on. What another job has
        left is deleted.
        """
        self.facts = facts
        if find_facts(self.folder, self.job) is None or not is_complete(self.folder, facts):
            if (self.folder / JOB).exists():
                print(f'Note: {self.folder} was made of other text or with other flags: anew.')
            self.clear()
            tokenizers.save(encoding, self.folder)
            self.save_job(done=False)
        size = 0  # of its complete lines
        for row in read_batches(self.folder):
            add_up(self.totals, row)
            self.last = (row['part'], row['batch'])
            size += row['line_bytes']
        self.index = open(self.folder / BATCHES, 'ab')  # noqa: SIM115  until finish()
        self.index.truncate(size)
        for split in SPLITS:
            n_tokens = self.totals[split]['tokens']
            self.files[split] = TokenFiles(self.folder, split, facts['dtype'], n_tokens)

    def clear(self):
        """Delete everything but the lock, and first what makes it a draft."""
        paths = [path for path in self.folder.iterdir() if path.name != '.lock']
        for path in sorted(paths, key=lambda path: path.name != JOB):
            path.unlink()

    def save_job(self, done):
        contents = {'job': self.job, 'facts': self.facts, 'done': done}
        temporary = self.folder / f'{JOB}.tmp'
        with open(temporary, 'w') as file:
            file.write(json.dumps(contents, indent=1) + '\n')
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / JOB)

    def add(self, row, ids):
        """Add the tokens of a batch. row: what batches.jsonl is to say of it."""
        self.files[row['split']].append(ids)
        add_up(self.totals, row)
        self.last = (row['part'], row['batch'])
        self.waiting.append(json.dumps(row) + '\n')
        if time.monotonic() > self.flushed + SECONDS:
            self.flush()

    def flush(self):
        """Wait until all tokens are on the disk, and then until batches.jsonl says so."""
        for files in self.files.values():
            files.flush()
        self.index.write(''.join(self.waiting).encode())
        self.index.flush()
        os.fsync(self.index.fileno())
        self.waiting = []
        self.flushed = time.monotonic()

    def is_empty(self):
        """Tell whether there is nothing on the disk to go on with."""
        return not self.index.tell()

    def finish(self):
        """Close the files: all batches have been added."""
        self.flush()
        for files in (*self.files.values(), self.index):
            files.close()
        self.save_job(done=True)

    def delete(self):
        shutil.rmtree(self.folder)


class TokenFiles:
    """The tokens of a split, appended to one file of FILE_BYTES after the other."""

    def __init__(self, folder, split, dtype, n_tokens=0):
        """n_tokens: that are there already; what is behind them is cut off."""
        self.folder = folder
        self.split = split
        self.n_bytes = n_tokens * np.dtype(dtype).itemsize
        whole, rest = divmod(self.n_bytes, FILE_BYTES)
        for path in token_files(folder, split)[whole + 1 :]:
            path.unlink()
        self.open(whole)
        self.file.truncate(rest)

    def open(self, number):
        self.file = open(self.folder / f'{self.split}_{number:05}.bin', 'ab')  # noqa: SIM115

    def append(self, ids):
        data = ids.view(np.uint8)
        while len(data):
            room = FILE_BYTES - self.n_bytes % FILE_BYTES
            self.file.write(data[:room])
            self.n_bytes += len(data[:room])
            data = data[room:]
            if self.n_bytes % FILE_BYTES == 0:
                self.close()
                self.open(self.n_bytes // FILE_BYTES)

    def flush(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self):
        self.flush()
        self.file.close()


def token_files(folder, split):
    """List the files of a split's tokens in a draft, in order, without an empty one."""
    return sorted(path for path in Path(folder).glob(f'{split}_*.bin') if path.stat().st_size)


def read_job(folder):
    """Read what job.json of a folder says, {} if there is none, or a damaged one."""
    try:
        saved = json.loads(Path(folder, JOB).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    is_whole = isinstance(saved, dict) and {'job', 'facts', 'done'} <= saved.keys()
    return saved if is_whole else {}


def find_facts(folder, job):
    """Return the facts of a draft for this job, None if there is none."""
    saved = read_job(folder)
    if saved and saved['job'] == json.loads(json.dumps(job)):
        return saved['facts']
    return None


def read_batches(folder):
    """Read the complete lines of batches.jsonl; 'line_bytes' is the length of each."""
    if not Path(folder, BATCHES).exists():
        return
    with open(Path(folder, BATCHES), 'rb') as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # cut off, or damaged: what follows is not to be trusted either
                return
            if line.endswith(b'\n'):
                yield {**row, 'line_bytes': len(line)}


def is_complete(folder, facts):
    """Tell whether the tokens are on the disk that batches.jsonl says are there."""
    totals = new_totals()
    for row in read_batches(folder):
        add_up(totals, row)
    itemsize = np.dtype(facts['dtype']).itemsize
    for split in SPLITS:
        n_bytes = sum(path.stat().st_size for path in token_files(folder, split))
        if n_bytes < totals[split]['tokens'] * itemsize:
            return False
    return True


# -----------------------------------------------------------------------------
# totals over batches


def new_totals():
    """The counts of no batch: of each split, of what is left out or odd, and of changes."""
    totals = {split: {'tokens': 0, 'bytes': 0, 'documents': 0, 'highest': 0} for split in SPLITS}
    return {**totals, 'oddities': collections.Counter(), 'changes': {}}


def add_up(totals, row):
    """Add to totals what a line of batches.jsonl says."""
    counts = totals[row['split']]
    for name in ('tokens', 'bytes', 'documents'):
        counts[name] += row[name]
    counts['highest'] = max(counts['highest'], row['highest'])
    totals['oddities'].update(row['oddities'])
    for what, (how_often, example) in row['changes'].items():
        before, first = totals['changes'].get(what, (0, example))
        totals['changes'][what] = before + how_often, first


# -----------------------------------------------------------------------------
# from drafts to a dataset


def find_shards(target):
    """List the folders NAME-1-of-16 to NAME-16-of-16. Raises UserError if one is missing."""
    name = re.compile(rf'{re.escape(target.name)}-(\d+)-of-(\d+)')
    found = [name.fullmatch(path.name) for path in target.parent.glob('*-of-*')]
    counts = {int(match[2]) for match in found if match}
    if len(counts) != 1:
        what = f'parts of {len(counts)} different numbers' if counts else 'no parts'
        raise UserError(f'There are {what} {target}-1-of-N to join: see --shard.')
    (count,) = counts
    folders = [target.with_name(f'{target.name}-{n}-of-{count}') for n in range(1, count + 1)]
    for number, folder in enumerate(folders, 1):
        if not folder.is_dir():
            how = f'prepare it with --shard={number}/{count}, or copy it here'
            raise UserError(f'{folder} is missing: {how}.')
    return folders


def join(folders, into):
    """Copy what several machines have made, batch for batch, into a new draft, and return it.

    Raises UserError unless all of it is there, and made of the same text with the same flags.
    """
    jobs = [read_job(folder) for folder in folders]
    for folder, saved in zip(folders, jobs, strict=True):
        if not (saved and saved['done'] and is_complete(folder, saved['facts'])):
            raise UserError(f'{folder} is not complete: run its command again, or copy it anew.')
        if comparable(saved) != comparable(jobs[0]):
            what = f'{folder} was made of other text, or with other flags, than {folders[0]}'
            raise UserError(f'{what}: prepare it again.')

    facts = jobs[0]['facts']
    encoding = tokenizers.load(folders[0], {'eos': facts['end_of_text']})
    draft = Draft(into, {'time': time.time()})  # another join does not go on with it
    draft.open(facts, encoding)
    tokens = {}
    for folder in folders:
        for split in SPLITS:
            tokens[folder, split] = open_tokens(token_files(folder, split), facts['dtype'])
    begin = dict.fromkeys(tokens, 0)
    for _, folder, row in heapq.merge(*map(in_places, folders)):
        key = folder, row['split']
        end = begin[key] + row['tokens']
        draft.add(row, np.asarray(tokens[key][begin[key] : end]))
        begin[key] = end
    for key, n_tokens in begin.items():
        if n_tokens != len(tokens[key]):  # lines of batches.jsonl are missing
            draft.delete()
            raise UserError(f'Something of {key[0]} is missing: copy it here again.')
    draft.finish()
    return draft


def in_places(folder):
    """Yield the lines of batches.jsonl as (place, folder, line), to be sorted by their places."""
    for row in read_batches(folder):
        del row['line_bytes']
        yield (row['part'], row['batch']), folder, row


def comparable(saved):
    """Return what must be the same in the parts of several machines."""
    different = ('shard', 'stamps')
    job = {key: value for key, value in saved['job'].items() if key not in different}
    return job, saved['facts']


def publish(draft, target, meta):
    """Make a finished draft the dataset in a folder, with a meta.json.

    The old train.bin leaves first, and the new one comes last: with it, the dataset is complete.
    """
    moves = {draft.folder / 'meta.json': 'meta.json'}  # {file of the draft: its name}
    for name in tokenizers.FILES:
        if (draft.folder / name).exists():
            moves[draft.folder / name] = name
    for split in reversed(SPLITS):
        paths = token_files(draft.folder, split)
        meta[split] = dict(draft.totals[split])
        if len(paths) > 1:
            meta[split]['files'] = [path.name for path in paths]
        meta[split]['sha256'] = checksum(open_tokens(paths, draft.facts['dtype']))
        pairs = [*zip(paths, split_files(meta, split), strict=True)]
        moves |= dict(pairs[::-1])  # the first file last: with it, the dataset is there
    (draft.folder / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n')

    target.mkdir(parents=True, exist_ok=True)
    old = [target / 'train.bin', *token_files(target, 'train')]
    old += [target / 'val.bin', *token_files(target, 'val')]
    for path in (*old, *(target / name for name in tokenizers.FILES)):
        path.unlink(missing_ok=True)
    (draft.folder / JOB).unlink()  # from now on nobody can go on with it
    for path, name in moves.items():
        os.replace(path, target / name)
    draft.delete()


def open_split(folder, meta, split):
    """Open the tokens of a split of a dataset."""
    paths = [folder / name for name in split_files(meta, split)]
    return open_tokens(paths, np.dtype(meta['dtype']))

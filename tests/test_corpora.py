"""Every corpus of prepare.py's table, from a Hub of our own whose files are as they are published.

The files are small, but their names, folders, splits and columns are those of the Hub. What else
is in a repository is there too, and is not to be fetched.
"""

import ast
import gzip
import itertools
import json
import subprocess
import sys
from typing import NamedTuple

import pyarrow
import pytest
from conftest import ROOT
from hub import HubServer, write_corpus
from test_hub import documents_of

from sources import Corpus

# A client of the Hub that has imported what takes seconds. Each line that it reads is a folder and
# the arguments of a script, which is run by a process of its own: 'out' and 'err' have what it
# prints.
CLIENT = f"""
import json, os, runpy, sys
import datasets, huggingface_hub, numpy, pyarrow.parquet, rustbpe, tiktoken, tokenizers, tqdm

sys.path.insert(0, {str(ROOT)!r})
for line in sys.stdin:
    folder, script, *args = json.loads(line)
    if os.fork():
        _, status = os.wait()
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    os.chdir(folder)
    for number, name in ((0, os.devnull), (1, 'out'), (2, 'err')):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [script, *args]
    code = 0
    try:
        runpy.run_path(os.path.join({str(ROOT)!r}, script), run_name='__main__')
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


class Result(NamedTuple):
    """How prepare.py ended, and what it fetched of which repository."""

    code: int
    out: str
    err: str
    folder: object
    fetched: set
    n_requests: int

    @property
    def is_one_sentence(self):
        return self.code == 1 and self.err.count('\n') == 1 and 'Traceback' not in self.err


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hub')
    for repository, *files, configurations, column in (*LAYOUTS.values(), *OTHERS.values()):
        paths = itertools.chain.from_iterable(files)
        files = {path: contents(path, column) for path in paths}
        write_corpus(folder, repository, files, configurations)
    with HubServer(folder) as server:
        yield server


@pytest.fixture(scope='module')
def client(hub, tmp_path_factory):
    """A process of CLIENT."""
    environment = hub.environment(tmp_path_factory.mktemp('cache'), OMP_NUM_THREADS='1')
    line = [sys.executable, '-c', CLIENT]
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
    with subprocess.Popen(line, env=environment, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def prepare(hub, client, tmp_path):
    """Run prepare.py as a client of the Hub: prepare('--dataset=tinystories')."""

    def prepare(*args):
        hub.requests.clear()
        print(json.dumps([str(tmp_path), 'prepare.py', *args]), file=client.stdin, flush=True)
        code = int(client.stdout.readline())
        out = (tmp_path / 'out').read_text()
        err = (tmp_path / 'err').read_text()
        fetched = {path for path, _ in hub.fetched()}
        return Result(code, out, err, tmp_path / 'data' / 'x', fetched, len(hub.requests))

    return prepare


# -----------------------------------------------------------------------------
# what is on the Hub


class Layout(NamedTuple):
    """A corpus in the layout of the Hub: files to train on, for validation, and others."""

    repository: str
    train: list
    val: list = ()
    others: list = ()
    configurations: dict | None = None
    column: str = 'text'


def shards(pattern, count):
    """Names with numbers: those of shards."""
    return [pattern.format(number) for number in range(count)]


WEB_CONFIGURATIONS = {
    'default': {'train': 'data/*/*'},
    'CC-MAIN-2013-20': {'train': 'data/CC-MAIN-2013-20/*'},
    'sample-10BT': {'train': 'sample/10BT/*'},
    'sample-100BT': {'train': 'sample/100BT/*'},
}
TEN = shards('sample/10BT/{:03}_00000.parquet', 3)
HUNDRED = shards('sample/100BT/{:03}_00000.parquet', 2)
DUMPS = ['data/CC-MAIN-2013-20/000_00000.parquet', 'data/CC-MAIN-2024-10/000_00000.parquet']
WEB = ['eval_results.csv', 'lighteval_tasks.py']

WIKITEXT = {}
for _name in ('wikitext-103-raw-v1', 'wikitext-103-v1', 'wikitext-2-raw-v1', 'wikitext-2-v1'):
    WIKITEXT[_name] = {split: f'{_name}/{split}-*' for split in ('test', 'train', 'validation')}

BOOKS = 'data/{}-{{:05}}-of-{:05}-7cda8f63c262acf8.parquet'
COSMOPEDIA = shards('cosmopedia-v2/train-{:05}-of-00104.parquet', 3)
EDU = shards('fineweb-edu-dedup/train-{:05}-of-00234.parquet', 2)
DCLM = 'filtered/OH_eli5_vs_rw_v2_bigram_200k_train/'
DCLM += 'fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train/processed_data/'
DCLM += 'global-shard_0{}_of_10/local-shard_{}_of_10/shard_{:08}_processed.parquet'
BABYLM = ['bnc_spoken', 'childes', 'gutenberg', 'open_subtitles', 'simple_wiki', 'switchboard']

LAYOUTS = {
    'tinystories': Layout(
        'roneneldan/TinyStories',
        shards('data/train-{:05}-of-00004-2d5a1467fff1081b.parquet', 4),
        ['data/validation-00000-of-00001-869c898b519ad725.parquet'],
        ['TinyStories-train.txt', 'TinyStories-valid.txt', 'TinyStoriesV2-GPT4-train.txt',
         'TinyStories_all_data.tar.gz', 'Evaluation prompts.yaml'],
    ),
    'tinystories-clean': Layout(
        'karpathy/tinystories-gpt4-clean', ['tinystories_gpt4_clean.parquet']
    ),
    'simplestories': Layout(
        'SimpleStories/SimpleStories',
        shards('data/train-{:05}-of-00007.parquet', 7),
        ['data/test-00000-of-00001.parquet'],
        configurations={'default': {'train': 'data/train-*', 'test': 'data/test-*'}},
        column='story',
    ),
    'babylm': Layout(
        'cambridge-climb/BabyLM',
        [f'clean/10M/{name}.txt' for name in BABYLM],
        [f'clean/dev/{name}.txt' for name in BABYLM],
        ['BabyLM.py', *[f'clean/100M/{name}.txt' for name in BABYLM],
         *[f'clean/test/{name}.txt' for name in BABYLM],
         *[f'original/10M/{name}.txt' for name in BABYLM],
         'clean/10M/.DS_Store', 'clean/10M/notes.md', 'tagged/10M/childes.txt'],
    ),
    'wikitext2': Layout(
        'Salesforce/wikitext',
        ['wikitext-2-raw-v1/train-00000-of-00001.parquet'],
        ['wikitext-2-raw-v1/validation-00000-of-00001.parquet'],
        ['wikitext-2-raw-v1/test-00000-of-00001.parquet',
         'wikitext-2-v1/train-00000-of-00001.parquet',
         'wikitext-2-v1/validation-00000-of-00001.parquet',
         'wikitext-2-v1/test-00000-of-00001.parquet',
         'wikitext-103-v1/train-00000-of-00002.parquet',
         'wikitext-103-v1/validation-00000-of-00001.parquet',
         'wikitext-103-v1/test-00000-of-00001.parquet',
         'wikitext-103-raw-v1/test-00000-of-00001.parquet'],
        WIKITEXT,
    ),
    'wikitext103': Layout(
        'Salesforce/wikitext',
        shards('wikitext-103-raw-v1/train-{:05}-of-00002.parquet', 2),
        ['wikitext-103-raw-v1/validation-00000-of-00001.parquet'],
        configurations=WIKITEXT,
    ),
    'wikipedia': Layout(
        'wikimedia/wikipedia',
        shards('20231101.en/train-{:05}-of-00041.parquet', 3),
        others=[*shards('20231101.de/train-{:05}-of-00020.parquet', 2),
                '20231101.simple/train-00000-of-00001.parquet'],
        configurations={
            f'20231101.{language}': {'train': f'20231101.{language}/train-*'}
            for language in ('de', 'en', 'simple')
        },
    ),
    'gutenberg': Layout(
        'manu/project_gutenberg',
        shards(BOOKS.format('en', 52), 3),
        others=[*shards(BOOKS.format('de', 2), 2), *shards(BOOKS.format('es', 2), 1)],
        configurations={'default': {name: f'data/{name}-*' for name in ('de', 'en', 'es')}},
    ),
    'openwebtext': Layout(
        'Skylion007/openwebtext',
        shards('plain_text/train-{:05}-of-00080.parquet', 3),
        configurations={'plain_text': {'train': 'plain_text/train-*'}},
    ),
    'climbmix': Layout(
        'karpathy/climbmix-400b-shuffle',
        [*shards('shard_{:05}.parquet', 20), 'shard_06541.parquet'],
        ['shard_06542.parquet'],
    ),
    'fineweb-edu': Layout(
        'HuggingFaceFW/fineweb-edu', TEN, (), [*HUNDRED, *DUMPS, *WEB], WEB_CONFIGURATIONS
    ),
    'fineweb': Layout(
        'HuggingFaceFW/fineweb', TEN, (), [*HUNDRED, *DUMPS, *WEB], WEB_CONFIGURATIONS
    ),
    'fineweb-2 --subset=deu_Latn': Layout(
        'HuggingFaceFW/fineweb-2',
        shards('data/deu_Latn/train/000_{:05}.parquet', 2),
        ['data/deu_Latn/test/000_00000.parquet'],
        ['data/deu_Latn_removed/train/000_00000.parquet', 'data/fra_Latn/train/000_00000.parquet',
         'data/fra_Latn/test/000_00000.parquet', 'fineweb2-language-distribution.csv'],
        {
            'deu_Latn': {'train': 'data/deu_Latn/train/*', 'test': 'data/deu_Latn/test/*'},
            'deu_Latn_removed': {'train': 'data/deu_Latn_removed/train/*'},
            'fra_Latn': {'train': 'data/fra_Latn/train/*', 'test': 'data/fra_Latn/test/*'},
        },
    ),
    'smollm': Layout(
        'HuggingFaceTB/smollm-corpus',
        COSMOPEDIA,
        others=[*EDU, 'python-edu/train-00000-of-00001.parquet'],
        configurations={
            name: {'train': f'{name}/train-*'}
            for name in ('cosmopedia-v2', 'fineweb-edu-dedup', 'python-edu')
        },
    ),
    'dclm': Layout(
        'mlfoundations/dclm-baseline-1.0-parquet',
        [DCLM.format(1, 0, 0), DCLM.format(1, 1, 0), DCLM.format(1, 1, 1), DCLM.format(2, 0, 0)],
    ),
}  # fmt: skip

ARTICLE = ['', ' = {} = \n', '', ' Robert is .\n', ' = = Life = = \n', '', ' He 2 + 2\n']


def texts_of(path):
    """The texts in the column of a file."""
    if 'wikitext' in path:
        return [line.format(path) for line in ARTICLE * 3]
    if '.txt' in path:
        return [f'{path}\n' * 3]
    return [f'{path} {n}' for n in range(20)]


def contents(path, column):
    """The rows of a table, or the bytes of another file."""
    if path.endswith('.py'):
        return b'raise RuntimeError("I was run")\n'
    texts = texts_of(path)
    rows = []
    for number, text in enumerate(texts):
        rows.append({'id': number, 'prompt': f'not {text}', column: text, 'meta': {'a': 1}})
    if path.endswith('.parquet'):
        return rows
    data = ''.join(texts).encode()
    if '.jsonl' in path:
        data = ''.join(json.dumps(row) + '\n' for row in rows).encode()
    elif '.json' in path:
        data = json.dumps(rows, indent=1).encode()
    elif '.csv' in path:
        data = f'{column},id\n'.encode() + b''.join(f'{text},1\n'.encode() for text in texts)
    return COMPRESS.get(path.rsplit('.')[-1], bytes)(data)


COMPRESS = {
    'gz': gzip.compress,
    'zst': lambda data: pyarrow.Codec('zstd').compress(data, asbytes=True),
}


def expected(paths):
    """The documents of files."""
    if 'wikitext' not in ''.join(paths):
        return [text for path in paths for text in texts_of(path)]
    articles = []
    for path in paths:
        articles += 3 * [f' = {path} = \n\n Robert is .\n = = Life = = \n\n He 2 + 2\n\n']
    articles[-1] = articles[-1].removesuffix('\n')  # the blank line before a heading
    return articles


# -----------------------------------------------------------------------------
# the table


def table():
    """The table of corpora in prepare.py, which is a script and not imported."""
    tree = ast.parse((ROOT / 'prepare.py').read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'CORPORA':
            return eval(ast.unparse(node.value), {'Corpus': Corpus})


def test_every_corpus_of_the_table_is_tested_and_explained():
    assert [name.split()[0] for name in LAYOUTS] == [*table()]
    explained = ast.get_docstring(ast.parse((ROOT / 'prepare.py').read_text()))
    for name, layout in zip(table(), LAYOUTS.values(), strict=True):
        assert f'\n    {name} ' in explained
        assert table()[name].repository == layout.repository
        assert table()[name].column == layout.column


def check(result, train, val=(), downloaded=()):
    """Check that a dataset has all documents of files, in their order, and that no other was read.

    val: without a file, some of the documents to train on. downloaded: what was there before.
    """
    assert result.code == 0, result.err
    found = {split: documents_of(result.folder, split) for split in ('train', 'val')}
    if val:
        assert found == {'train': expected(train), 'val': expected(val)}
    else:
        drawn = set(found['val'])
        assert found['train'] == [text for text in expected(train) if text not in drawn]
        assert found['val'] == [text for text in expected(train) if text in drawn]
        assert drawn < set(expected(train))
    assert result.fetched - {'README.md'} == {*train, *val} - {*downloaded}


FLAGS = ['--tokenizer=byte', '--name=x', '--quiet']
# Where there is no split for validation.
DRAWN = ['--val_fraction=0.3']


@pytest.mark.parametrize('name', LAYOUTS)
def test_a_corpus_is_streamed_and_downloaded_as_published(prepare, name):
    layout = LAYOUTS[name]
    flags = [*f'--dataset={name}'.split(), *FLAGS, *([] if layout.val else DRAWN)]
    streamed = prepare(*flags, '--streaming')
    check(streamed, layout.train, layout.val)
    downloaded = prepare(*flags)
    check(downloaded, layout.train, layout.val)


@pytest.mark.parametrize('name', ['tinystories', 'babylm', 'climbmix'])
def test_what_has_been_downloaded_is_not_asked_for_again(prepare, name):
    layout = LAYOUTS[name]
    assert prepare(f'--dataset={name}', *FLAGS).code == 0
    again = prepare(f'--dataset={name}', *FLAGS)
    check(again, layout.train, layout.val, downloaded=[*layout.train, *layout.val])
    assert again.n_requests < 12, 'there is none for each file'


# -----------------------------------------------------------------------------
# repositories of other kinds of files

OTHERS = {
    'lines': Layout(
        'me/lines',
        ['train_0.jsonl.gz', 'train_1.jsonl.gz'],
        ['validation_0.jsonl.zst'],
        ['test_0.jsonl.gz', 'images/train.jpg', 'train.py'],
    ),
    'zstd': Layout('me/zstd', shards('data/part_{:02}.jsonl.zst', 12)),
    'texts': Layout('me/texts', ['train/a.txt', 'train/b.txt.gz'], ['valid/a.txt'], ['test/a.txt']),
    'list': Layout('me/list', ['a/b/c.json'], column='body'),
    'csv': Layout('me/csv', ['train.csv', 'train_2.csv'], ['dev.csv']),
    'two words': Layout('me/names', ['data 1/train [1] é.jsonl', 'data 1/train_%20#2?.jsonl']),
    'several': Layout(
        'me/several',
        ['a/train_1.jsonl', 'a/train_2.jsonl'],
        ['a/dev.jsonl'],
        ['a/extra.jsonl', 'b/one.jsonl', 'b/two.jsonl', 'c/none.jsonl'],
        {
            'a': {'train': 'a/train*', 'extra': 'a/extra*', 'dev': 'a/dev*'},
            'b': {'train': 'b/*.jsonl'},
        },
    ),
}


@pytest.mark.parametrize('streaming', [True, False])
@pytest.mark.parametrize('name', ['lines', 'zstd', 'texts', 'list', 'csv', 'two words'])
def test_files_of_other_kinds_are_read_as_well(prepare, name, streaming):
    layout = OTHERS[name]
    flags = [f'--dataset=hf:{layout.repository}', f'--text_column={layout.column}', *FLAGS]
    flags += [] if layout.val else DRAWN
    if name == 'list':
        flags.append('--seed=3')  # else none would be drawn, or all
    result = prepare(*flags, *['--streaming'] * streaming)
    check(result, layout.train, layout.val)


A = '--dataset=hf:me/several --subset=a'
B = '--dataset=hf:me/several --subset=b'
LINES = '--dataset=hf:me/lines'
STREAMED = {
    f'{A}': (['a/train_1.jsonl', 'a/train_2.jsonl'], ['a/dev.jsonl']),
    f'{A} --split=extra': (['a/extra.jsonl'], ['a/dev.jsonl']),
    f'{A} --val_split=extra': (['a/train_1.jsonl', 'a/train_2.jsonl'], ['a/extra.jsonl']),
    f'{A} --split=dev --val_split=extra': (['a/dev.jsonl'], ['a/extra.jsonl']),
    f'{A} --split=dev': (['a/dev.jsonl'], []),
    f'{B}': (['b/one.jsonl', 'b/two.jsonl'], []),
    f'{A} --split=c/*.jsonl --val_split=b/two.jsonl': (['c/none.jsonl'], ['b/two.jsonl']),
    f'{A} --split=b/*.jsonl --val_split=b/two.jsonl': (['b/one.jsonl'], ['b/two.jsonl']),
    f'{A} --split=b/*.jsonl': (['b/one.jsonl', 'b/two.jsonl'], []),
    f'{LINES} --split=test --val_split=train': (
        ['test_0.jsonl.gz'], ['train_0.jsonl.gz', 'train_1.jsonl.gz'],
    ),
    '--dataset=tinystories --split=validation': (LAYOUTS['tinystories'].val, []),
    '--dataset=simplestories --val_split=train --split=test': (
        LAYOUTS['simplestories'].val, LAYOUTS['simplestories'].train,
    ),
    '--dataset=babylm --subset=100M': (
        [f'clean/100M/{name}.txt' for name in BABYLM], LAYOUTS['babylm'].val,
    ),
    '--dataset=babylm --val_split=clean/test/*.txt': (
        LAYOUTS['babylm'].train, [f'clean/test/{name}.txt' for name in BABYLM],
    ),
    '--dataset=babylm --split=original/10M/c*.txt': (
        ['original/10M/childes.txt'], LAYOUTS['babylm'].val,
    ),
    '--dataset=wikipedia --subset=20231101.de': (LAYOUTS['wikipedia'].others[:2], []),
    '--dataset=gutenberg --split=de': (LAYOUTS['gutenberg'].others[:2], []),
    '--dataset=gutenberg --split=de --val_split=es': (
        LAYOUTS['gutenberg'].others[:2], LAYOUTS['gutenberg'].others[2:],
    ),
    '--dataset=fineweb-edu --subset=sample-100BT': (HUNDRED, []),
    '--dataset=fineweb --subset=default': (DUMPS, []),
    '--dataset=fineweb --subset=CC-MAIN-2013-20': (DUMPS[:1], []),
    '--dataset=fineweb-2 --subset=fra_Latn': (
        ['data/fra_Latn/train/000_00000.parquet'], ['data/fra_Latn/test/000_00000.parquet'],
    ),
    '--dataset=smollm --subset=fineweb-edu-dedup': (EDU, []),
    '--dataset=climbmix --split=shard_0000[2-4]*.parquet': (
        LAYOUTS['climbmix'].train[2:5], LAYOUTS['climbmix'].val,
    ),
}  # fmt: skip


@pytest.mark.parametrize('flags', STREAMED)
def test_subset_split_and_val_split_say_which_files(prepare, flags):
    train, val = STREAMED[flags]
    more = [] if val else DRAWN
    check(prepare(*flags.split(), *FLAGS, *more, '--streaming'), train, val)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--dataset=hf:me/several', "available configs: ['a', 'b']"),
        ('--dataset=hf:me/several --subset=c', "Config 'c' not found. Available: ['a', 'b']"),
        (f'{A} --split=trian', "there is no split 'trian' but train, extra, dev"),
        (f'{A} --val_split=test', "there is no split 'test' but train, extra, dev"),
        (f'{B} --val_split=dev', "there is no split 'dev' but train"),
        (f'{A} --split=dev --val_split=dev', "'dev'"),
        ('--dataset=simplestories --split=test', "'test'"),
        ('--dataset=fineweb-2 --subset=deu_Latn --split=test', "'test'"),
        (f'{A} --split=x/*.jsonl', 'x/*.jsonl'),
        (f'{A} --split={{a,b}}/*.jsonl', '{a,b}/*.jsonl'),
        (f'{A} --split=a/*.jsonl --val_split=x.jsonl', 'x.jsonl'),
        (f'{A} --split=a/dev.jsonl --val_split=a/dev.jsonl', 'a/dev.jsonl'),
        ('--dataset=wikipedia --subset=20231101.xx', '20231101.de'),
        ('--dataset=wikipedia --split=test', "there is no split 'test' but train"),
        ('--dataset=gutenberg --split=xx', "there is no split 'xx' but de, en, es"),
        ('--dataset=babylm --subset=1M', '/clean/1M/*.txt'),
        ('--dataset=fineweb-2', 'fineweb-2 needs a language: --subset=deu_Latn'),
        ('--dataset=fineweb-2 --subset=deu', "Available: ['deu_Latn'"),
        ('--dataset=smollm --subset=cosmopedia', "Available: ['cosmopedia-v2'"),
        ('--dataset=climbmix --split=train', "'shard_06542.parquet' but train"),
        ('--dataset=climbmix --val_split=val', 'val'),
        ('--dataset=hf:me/missing', 'me/missing'),
        ('--dataset=hf:missing', 'missing'),
        ('--dataset=hf:me/list', "/a/b/c.json has no column 'text' but id, prompt, body, meta"),
        ('--dataset=simplestories --text_column=text', "no column 'text' but id, prompt, story"),
    ],
)
def test_a_wrong_name_is_one_sentence_with_what_there_is(prepare, flags, message):
    result = prepare(*flags.split(), *FLAGS, '--streaming')
    assert result.is_one_sentence and message in result.err, result.err
    assert not result.folder.exists()


def test_a_text_of_ones_own_validates_a_corpus_of_the_hub(prepare, tmp_path):
    (tmp_path / 'mine.txt').write_text('My own text.\n<|endoftext|>\nAnother.\n')
    flags = ['--dataset=tinystories', '--val_input=mine.txt', *FLAGS, '--streaming']
    result = prepare(*flags)
    assert result.code == 0, result.err
    assert documents_of(result.folder, 'train') == expected(LAYOUTS['tinystories'].train)
    assert documents_of(result.folder, 'val') == ['My own text.\n', 'Another.\n']
    assert result.fetched - {'README.md'} == {*LAYOUTS['tinystories'].train}

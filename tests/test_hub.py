"""The Hugging Face Hub as its real clients see it, against one of our own on 127.0.0.1.

What huggingface_hub and datasets ask for, and what they raise, is written down here, and our own
scripts run through them. Clients read HF_ENDPOINT when they are imported: each is a process.
"""

import hashlib
import json
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import command
from hub import HubServer, write_hellaswag, write_tinystories, write_wikitext

import tokenizer as tk
from model import GPT, GPTConfig

# What a client runs before and after the lines of a test. It does not wait before it tries again.
BEFORE = """
import hashlib, json, time
from pathlib import Path

naps = []
time.sleep = naps.append


def raised(function, *args, **options):
    try:
        function(*args, **options)
    except Exception as error:
        names = []
        while error is not None:
            status = getattr(getattr(error, 'response', None), 'status_code', '')
            names.append(f'{type(error).__name__} {status}'.strip())
            error = error.__cause__
        return ' < '.join(name for name in names if 'HTTPStatusError' not in name)


"""
AFTER = '\nprint(json.dumps(result))\n'


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / 'hub') as server:
        yield server


def ask(hub, code, **variables):
    """Run a client of the Hub, with some more environment variables. Returns its `result`."""
    source = BEFORE + textwrap.dedent(code) + AFTER
    environment = hub.environment(hub.folder.parent / 'cache', **variables)
    line = [sys.executable, '-c', source]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_script(hub, script, *args):
    """Run a script of ours as a client of the Hub, in the folder where the Hub's is."""
    folder = hub.folder.parent
    return command(script, *args, cwd=folder, env=hub.environment(folder / 'cache'))


def publish(hub, name, files):
    """Write files of a repository, {path: text or bytes}. name: models/ORG/NAME, for one."""
    for path, data in files.items():
        file = hub.folder / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data.encode() if isinstance(data, str) else data)


def asked(hub):
    """List the requests, without the queries, and with COMMIT for a commit."""
    lines = []
    for method, path, _, status in hub.requests:
        parts = path.partition('?')[0].split('/')
        path = '/'.join('COMMIT' if len(part) == 40 else part for part in parts)
        lines.append(f'{method} {path} {status}')
    return lines


def documents_of(folder, split):
    """The documents of a prepared dataset, decoded."""
    meta = json.loads((folder / 'meta.json').read_text())
    ids = np.fromfile(folder / f'{split}.bin', dtype=meta['dtype'])
    assert len(ids) == meta[split]['tokens']
    parts = np.split(ids, np.flatnonzero(ids == meta['end_of_text']) + 1)
    assert not len(parts.pop()), 'nothing comes after the last end-of-text'
    assert len(parts) == meta[split]['documents']
    return [tk.load(folder).decode(part[:-1]) for part in parts]


# -----------------------------------------------------------------------------
# huggingface_hub

MODEL = {
    'config.json': '{"n_layer": 2}',
    'model.safetensors': 'weights',
    'tokenizer.json': '{}',
    'pytorch_model.bin': 'the same weights',
    'onnx/decoder_model.onnx': 'and once more',
}


def test_a_snapshot_has_the_files_that_are_asked_for(hub):
    name = 'openai-community/gpt2'
    wanted = ['config.json', 'model.safetensors', 'tokenizer.json']
    code = f"""
    from huggingface_hub import snapshot_download
    folder = Path(snapshot_download('{name}', allow_patterns={wanted}))
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    result = {{str(path.relative_to(folder)): path.read_text() for path in files}}
    """
    publish(hub, f'models/{name}', MODEL)
    files = {path: MODEL[path] for path in wanted}
    assert ask(hub, code) == files
    assert sorted(hub.fetched()) == [(path, 0) for path in wanted]
    is_new = f'GET /api/models/{name}/revision/main 200'
    which = f'GET /api/models/{name}/tree/COMMIT 200'
    expected = [is_new, which]
    for path in wanted:
        expected.append(f'HEAD /{name}/resolve/COMMIT/{path} 200')
        expected.append(f'GET /{name}/resolve/COMMIT/{path} 200')
    assert sorted(asked(hub)) == sorted(expected)

    # Once more, it asks whether there is another commit, and that is all.
    hub.requests.clear()
    assert ask(hub, code) == files
    assert asked(hub) == [is_new]

    # If there is, only what has changed is fetched.
    files['config.json'] = '{"n_layer": 3}'
    publish(hub, f'models/{name}', files)
    assert ask(hub, code) == files
    assert hub.fetched() == [('config.json', 0)]

    # When the Hub is not available, there is the cache.
    hub.down = {name}
    assert ask(hub, code) == files


def test_branches_commits_trees_and_paths(hub):
    publish(hub, 'models/org/model', MODEL)
    publish(hub, 'models/org/model@pr-1', {'config.json': 'another'})
    hub.page_size = 2
    found = ask(
        hub,
        """
        from huggingface_hub import HfApi, hf_hub_download

        api = HfApi()
        main = api.model_info('org/model')
        other = api.model_info('org/model', revision='pr-1')
        texts = []
        for revision in (None, 'main', main.sha, 'pr-1', other.sha):
            path = hf_hub_download('org/model', 'config.json', revision=revision)
            texts.append(Path(path).read_text())

        refs = api.list_repo_refs('org/model').branches
        tree = api.list_repo_tree('org/model', recursive=True)
        result = {
            'commits': {'main': main.sha, 'pr-1': other.sha},
            'refs': {ref.name: ref.target_commit for ref in refs},
            'texts': texts,
            'files': [file.rfilename for file in main.siblings],
            'sizes': {entry.path: getattr(entry, 'size', None) for entry in tree},
            'top': [entry.path for entry in api.list_repo_tree('org/model')],
            'folder': [entry.path for entry in api.list_repo_tree('org/model', 'onnx')],
            'paths': [entry.path for entry in api.get_paths_info('org/model', ['onnx', 'x'])],
        }
        """,
    )
    assert found['refs'] == found['commits'] and len(set(found['commits'].values())) == 2
    assert found['texts'] == [MODEL['config.json']] * 3 + ['another'] * 2
    assert found['files'] == sorted(MODEL)
    sizes = {path: len(text) for path, text in MODEL.items()}
    assert found['sizes'] == {**sizes, 'onnx': None}
    assert sorted(found['top']) == sorted({*MODEL, 'onnx'} - {'onnx/decoder_model.onnx'})
    assert found['folder'] == ['onnx/decoder_model.onnx']
    assert found['paths'] == ['onnx']
    n_pages = sum('/tree/' in line for line in asked(hub))
    assert n_pages == 3 + 3 + 1  # of 6, 5 and 1 entries
    assert hub.fetched() == [('config.json', 0)] * 2  # once per branch


def test_a_download_that_breaks_goes_on_where_it_was(hub):
    data = random.Random(1).randbytes(12_000_000)
    publish(hub, 'models/org/model', {'model.safetensors': data})
    hub.cut_after = 11_000_000
    digest = ask(
        hub,
        """
        from huggingface_hub import hf_hub_download
        data = Path(hf_hub_download('org/model', 'model.safetensors')).read_bytes()
        result = hashlib.sha256(data).hexdigest()
        """,
    )
    assert digest == hashlib.sha256(data).hexdigest()
    # The client keeps pieces of 10 MiB.
    assert hub.fetched() == [('model.safetensors', 0), ('model.safetensors', 10 * 2**20)]


@pytest.mark.parametrize(('fail_every', 'is_saved'), [(3, True), (4, False)])
def test_some_requests_fail(hub, fail_every, is_saved):
    """The client repeats questions, but not a file's download, which is the fourth request."""
    publish(hub, 'models/org/model', MODEL)
    hub.fail_every = fail_every
    error = ask(
        hub,
        """
        from huggingface_hub import snapshot_download
        result = raised(snapshot_download, 'org/model', max_workers=1)
        """,
    )
    failed = [line for line in asked(hub) if line.endswith(' 503')]
    if is_saved:
        assert error is None and len(failed) == len(MODEL)
        assert sorted(hub.fetched()) == [(path, 0) for path in sorted(MODEL)]
    else:
        assert error == 'HfHubHTTPError 503'
        assert failed[0].startswith('GET /org/model/resolve/COMMIT/')


FAULTS = """
from datasets import get_dataset_split_names, load_dataset
from huggingface_hub import hf_hub_download, snapshot_download

result = {}
for name in ('gated', 'missing', 'down'):
    result[f'{name} snapshot'] = raised(snapshot_download, f'org/{name}')
    result[f'{name} file'] = raised(hf_hub_download, f'org/{name}', 'config.json')
    result[f'{name} dataset'] = raised(load_dataset, f'org/{name}', streaming=True)
    result[f'{name} splits'] = raised(get_dataset_split_names, f'org/{name}')
result['revision snapshot'] = raised(snapshot_download, 'org/open', revision='v9')
result['revision file'] = raised(hf_hub_download, 'org/open', 'config.json', revision='v9')
result['revision dataset'] = raised(load_dataset, 'org/open', revision='v9')
result['file'] = raised(hf_hub_download, 'org/open', 'none.json')
result['subset'] = raised(load_dataset, 'org/open', 'none')
result['split'] = raised(load_dataset, 'org/open', split='none')
result['naps'] = sum(naps)
"""


@pytest.mark.parametrize(('token', 'gated', 'missing'), [(None, 401, 401), ('hf_x', 403, 404)])
def test_what_the_clients_raise(hub, token, gated, missing):
    for kind in ('models', 'datasets'):
        for name in ('gated', 'down', 'open'):
            publish(hub, f'{kind}/org/{name}', {'config.json': '{}', 'train.jsonl': '{"a": 1}'})
    hub.gated = {'org/gated'}
    hub.down = {'org/down'}
    variables = {'HF_TOKEN': token} if token else {}
    found = ask(hub, FAULTS, **variables)
    naps = found.pop('naps')
    assert naps == 3 * 5 * 1.0  # a file, a dataset and splits are asked for five more times
    assert found == {
        'gated snapshot': f'GatedRepoError {gated}',
        'gated file': f'GatedRepoError {gated}',
        'gated dataset': 'DatasetNotFoundError',
        'gated splits': 'DatasetNotFoundError',
        'missing snapshot': f'RepositoryNotFoundError {missing}',
        'missing file': f'RepositoryNotFoundError {missing}',
        'missing dataset': 'DatasetNotFoundError',
        'missing splits': 'DatasetNotFoundError',
        'down snapshot': 'LocalEntryNotFoundError < HfHubHTTPError 503',
        'down file': 'LocalEntryNotFoundError < HfHubHTTPError 503',
        'down dataset': 'FileNotFoundError',
        'down splits': 'FileNotFoundError',
        'revision snapshot': 'RevisionNotFoundError 404',
        'revision file': 'RevisionNotFoundError 404',
        'revision dataset': 'DatasetNotFoundError < RevisionNotFoundError 404',
        'file': 'RemoteEntryNotFoundError 404',
        'subset': 'ValueError',
        'split': 'ValueError',
    }


def test_the_hub_is_gone_when_it_is_closed(tmp_path):
    with HubServer(tmp_path) as hub:
        assert hub.thread.is_alive() and hub.fileno() > 0
    assert not hub.thread.is_alive() and hub.fileno() == -1


# -----------------------------------------------------------------------------
# datasets, and our scripts

# Two articles, with a heading that is none and empty lines, as WikiText has them.
ARTICLES = ['', ' = {} = \n', '', ' Robert is .\n', ' = = Life = = \n', '', ' He 2 + 2\n']
ARTICLES += [' = 4 = \n', '', ' = Sun @-@ Moon = \n', '', ' Both shine .\n']


@pytest.fixture
def wikitext(hub):
    """Salesforce/wikitext, of which these are the lines."""
    counts = {'test': 1, 'train': 3, 'validation': 2}
    lines = {}
    for split, count in counts.items():
        lines[split] = [line.format(split) for line in count * ARTICLES]
    write_wikitext(hub.folder, lines)
    return lines


@pytest.fixture
def stories(hub):
    """The stories of roneneldan/TinyStories: those of the 8 files to train on, and the others.

    A file has as many rows as our scripts read at a time, and a bit more than a million bytes.
    """
    train = []
    for number in range(8):
        train.append([f'Story {number} {n:03}. ' + 'The end. ' * 115 for n in range(1000)])
    validation = [f'Another story {n}.' for n in range(20)]
    write_tinystories(hub.folder, train, validation)
    return train, validation


@pytest.fixture
def hellaswag(hub):
    """The questions of Rowan/hellaswag."""
    endings = ['rolls a ball.', 'eats it [title] again.', 'sings.', 'is very far away.']
    questions = []
    for number in range(8):
        label = str(number % 4)
        question = {'activity_label': 'Bowling', 'ctx_a': f'Man {number} stands.', 'ctx_b': 'he'}
        questions.append({**question, 'endings': endings, 'label': label})
    write_hellaswag(hub.folder, questions)
    return questions


def test_prepare_downloads_wikitext(hub, wikitext, tmp_path):
    flags = ['--dataset=wikitext2', '--tokenizer=bpe', '--vocab_size=300']
    result = run_script(hub, 'prepare.py', *flags)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / 'data' / 'wikitext2'
    sun = ' = Sun @-@ Moon = \n\n Both shine .\n'
    for split, name, count in (('train', 'train', 3), ('val', 'validation', 2)):
        robert = f' = {name} = \n\n Robert is .\n = = Life = = \n\n He 2 + 2\n = 4 = \n\n'
        # What precedes the next heading is the end of an article.
        articles = count * [robert, sun + '\n']
        articles[-1] = sun
        assert documents_of(folder, split) == articles
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['source'] == ['Salesforce/wikitext', 'wikitext-2-raw-v1']
    assert meta['tokenizer'] == 'bpe' and 257 < meta['vocab_size'] <= 300
    wanted = ('train', 'validation')  # and not the one for tests
    files = [f'wikitext-2-raw-v1/{split}-00000-of-00001.parquet' for split in wanted]
    assert {path for path, _ in hub.fetched()} == {'README.md', *files}

    # What has been downloaded is not fetched again.
    hub.requests.clear()
    assert run_script(hub, 'prepare.py', *flags, '--name=again').returncode == 0
    again = json.loads((tmp_path / 'data' / 'again' / 'meta.json').read_text())
    assert again == meta
    assert not hub.fetched()


def test_prepare_streams_stories_through_faults(hub, stories, tmp_path):
    hub.cut_after = 400
    hub.fail_every = 11
    flags = ['--dataset=tinystories', '--streaming', '--max_tokens=200000', '--tokenizer=byte']
    result = run_script(hub, 'prepare.py', *flags, '--num_proc=1')
    assert result.returncode == 0 and not result.stderr
    folder = tmp_path / 'data' / 'tinystories'
    train, validation = stories
    n_stories = 191  # of 13 + 9 * 115 + 1 = 1,049 tokens: 190 have 199,310
    assert documents_of(folder, 'train') == train[0][:n_stories]
    assert documents_of(folder, 'val') == validation
    assert hub.cut_after is None and any(request.status == 503 for request in hub.requests)
    # It reads some files ahead, and not to the end.
    paths = {path for path, _ in hub.fetched()}
    assert 'data/train-00000-of-00008-2d5a1467fff1081b.parquet' in paths
    assert 'data/train-00007-of-00008-2d5a1467fff1081b.parquet' not in paths


def test_what_cannot_be_loaded_is_one_sentence(hub, stories, tmp_path):
    hub.gated = {'roneneldan/TinyStories'}
    result = run_script(hub, 'prepare.py', '--dataset=tinystories')
    assert result.returncode == 1 and result.stderr.count('\n') == 1, result.stderr
    assert 'roneneldan/TinyStories cannot be loaded from the Hugging Face Hub' in result.stderr
    assert 'is a gated dataset on the Hub' in result.stderr
    assert not (tmp_path / 'data').exists()


def test_evaluate_downloads_gpt2_and_hellaswag(hub, hellaswag, run, tmp_path):
    folder = hub.folder / 'models' / 'openai-community' / 'gpt2'
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    sizes = {'n_layer': 1, 'n_head': 2, 'n_embd': 8, 'block_size': 128}
    GPT(GPTConfig(arch='gpt2', vocab_size=257, **sizes)).save_pretrained(folder)
    tk.save(tk.build('byte'), folder)
    publish(hub, 'models/openai-community/gpt2', {'pytorch_model.bin': 'the same weights'})

    flags = ['--device=cpu', '--format=json']
    result = run_script(hub, 'evaluate.py', '--init_from=gpt2', '--hellaswag=hub', *flags)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)['hellaswag']
    paths = {path for path, _ in hub.fetched()}
    assert {'config.json', 'model.safetensors', 'tokenizer.json'} < paths
    assert 'data/validation-00000-of-00001.parquet' in paths
    assert 'pytorch_model.bin' not in paths

    # The same questions from a file, to the same model from a folder.
    lines = [json.dumps(question) for question in hellaswag]
    (tmp_path / 'questions.jsonl').write_text('\n'.join(lines))
    local = run('evaluate.py', f'--init_from={folder}', '--hellaswag=questions.jsonl', *flags)
    assert found == json.loads(local.out)['hellaswag']
    assert found['questions'] == len(hellaswag)

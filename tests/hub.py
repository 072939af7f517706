"""A small Hugging Face Hub on 127.0.0.1, which the real clients of the Hub talk to.

    write_tinystories(folder, [['A story.', 'Another.']], ['A third.'])
    with HubServer(folder) as hub:
        command('prepare.py', '--dataset=tinystories', cwd=..., env=hub.environment(cache))
        assert ('README.md', 0) in hub.fetched()

A repository is a folder, folder/models/ORG/NAME or folder/datasets/ORG/NAME, as it is at the time
of a request. Its commit follows from its files, and an earlier one is not kept. The folder
NAME@BRANCH is another branch of it. Files are sent by the Hub itself, without LFS or Xet. What is
uploaded becomes such a folder; safetensors and GGUF files come by LFS, as the Hub wants them.
"""

import base64
import hashlib
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

import pyarrow
import yaml
from pyarrow import parquet

API = re.compile(r'/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.+))?)?)?')
LFS = re.compile(r'/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|[0-9a-f]{64})')
LARGE = ('.safetensors', '.gguf')  # files that are uploaded by LFS
FILE = re.compile(r'/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)')
RANGE = re.compile(r'bytes=(\d+)-(\d*)')

# -----------------------------------------------------------------------------
# the server


class Request(NamedTuple):
    """A request and the status of its answer. path: with the query, or a URL of another host."""

    method: str
    path: str
    range: str | None
    status: int


class Refusal(Exception):
    """An answer that is an error: its status, what the Hub calls it (or None), and a sentence."""


class HubServer(ThreadingHTTPServer):
    """The Hub, as a context manager. Its faults are attributes, which may change at any time."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(('127.0.0.1', 0), Handler)
        self.folder = folder
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.requests = []  # of all clients, in order
        self.large = {}  # {SHA-256: bytes} of files that came by LFS
        self.page_size = 1000  # files and folders that one answer lists

        self.gated = set()  # repositories whose files nobody may have: 401, with a token 403
        self.full = set()  # repositories that take no more files: 400
        self.down = set()  # repositories that are not available: 503
        self.fail_every = None  # every Nth request: 503
        self.cut_after = None  # bytes of a file after which the connection is lost, once
        self.warning = None  # what each answer warns of: a topic, a semicolon, a sentence

        self.lock = threading.Lock()
        self.n_requests = 0
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.thread.join()
        self.server_close()

    def handle_error(self, request, address):
        """Print an error of the server, but not that a client has left."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, address)

    def environment(self, cache, **more):
        """Return the environment of a client. more: variables, such as HF_TOKEN.

        For all other hosts this Hub is its proxy. What a client asks them is thus one of the
        requests, and no name is looked up.
        """
        foreign = ('HF_', 'HUGGING', 'TRANSFORMERS_')  # settings of whoever runs the tests
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        proxy = {'http_proxy': self.url, 'https_proxy': self.url, 'no_proxy': '127.0.0.1'}
        client = {'HF_ENDPOINT': self.url, 'HF_HOME': str(cache), 'HF_HUB_DISABLE_XET': '1'}
        quiet = {'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1'}
        quick = {'USE_TORCH': '0'}  # else datasets imports it whenever it streams
        return {**kept, **proxy, **client, **quiet, **quick, **more}

    def fetched(self):
        """List the files that were sent, in order: (path in the repository, its first byte)."""
        files = []
        for request in self.requests:
            match = FILE.fullmatch(request.path)
            if match and request.method == 'GET' and request.status in (200, 206):
                first = RANGE.match(request.range or 'bytes=0-')[1]
                files.append((unquote(match[4]), int(first)))
        return files

    def branches(self, kind, name):
        """Read a repository: {branch: (commit, {path: bytes})}, {} if it is not there."""
        organization, repository = name.split('/')
        branches = {}
        for folder in self.folder.glob(f'{kind}/{organization}/*'):
            found, _, branch = folder.name.partition('@')
            if found == repository:
                paths = sorted(path for path in folder.rglob('*') if path.is_file())
                files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
                hashes = [f'{path} {git_hash(data)}' for path, data in files.items()]
                commit = hashlib.sha1('\n'.join([branch, *hashes]).encode()).hexdigest()
                branches[branch or 'main'] = (commit, files)
        return branches

    def is_failing(self):
        """Count a request, and tell whether it is one that fails."""
        with self.lock:
            self.n_requests += 1
            return self.fail_every is not None and self.n_requests % self.fail_every == 0

    def cut(self, data):
        """Return what is sent of a file, or of a range of it, until the connection is lost."""
        with self.lock:
            if self.cut_after is None or self.cut_after >= len(data):
                return data
            kept = data[: self.cut_after]
            self.cut_after = None
            return kept


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection, which stays open for the next one."""

    protocol_version = 'HTTP/1.1'
    timeout = 60  # seconds without a request
    disable_nagle_algorithm = True  # else 40 ms pass between the head of an answer and its body

    def answer(self):
        """Answer a request of any method."""
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        path, _, query = self.path.partition('?')
        values = parse_qs(query) | parse_qs(self.body.decode(errors='replace'))
        api = API.fullmatch(path)
        lfs = LFS.fullmatch(path)
        file = FILE.fullmatch(path)
        self.extra = {}  # headers of the answer
        try:
            if self.server.is_failing():
                raise Refusal(503, None, 'Try again')
            if path in ('/api/repos/create', '/api/validate-yaml', '/api/whoami-v2'):
                self.answer_author(path)
            elif lfs:
                self.answer_lfs(*lfs.groups())
            elif api and api[3] in ('preupload', 'commit'):
                self.answer_upload(api[2], api[3])
            elif api:
                self.answer_api(*api.groups(), values)
            elif file:
                self.answer_file(*file.groups())
            else:  # of another host, the path begins with http://
                raise Refusal(404, None, 'There is no such page')
        except Refusal as error:
            status, code, message = error.args
            self.extra['X-Error-Message'] = message
            if code:
                self.extra['X-Error-Code'] = code
            if status == 503:
                self.extra['Retry-After'] = '0'  # clients make a second of it, else up to eight
            self.send(status, {'error': message})

    do_GET = do_HEAD = do_POST = do_PUT = do_CONNECT = answer

    def check_author(self, name):
        """Raise Refusal unless whoever asks may write to a repository."""
        if 'Authorization' not in self.headers:
            raise Refusal(401, None, 'Invalid username or password.')
        if name in self.server.gated:
            raise Refusal(403, None, f'You may not write to {name}')

    def answer_author(self, path):
        """Say who asks, check the head of a model card, or make a repository."""
        if path == '/api/whoami-v2':
            self.check_author(None)
            self.send(200, {'name': 'me', 'type': 'user', 'orgs': []})
            return
        values = json.loads(self.body)
        if path == '/api/validate-yaml':
            head = re.match(r'---\n(.*?)\n---\n', values['content'], re.DOTALL)
            warnings = [] if head else [{'message': 'empty or missing yaml metadata'}]
            errors = []
            try:
                yaml.safe_load(head[1] if head else '')
            except yaml.YAMLError as error:
                errors = [{'message': str(error)}]
            self.send(400 if errors else 200, {'errors': errors, 'warnings': warnings})
            return
        name = f'{values["organization"]}/{values["name"]}'
        self.check_author(name)
        folder = self.server.folder / 'models' / name
        url = f'{self.server.url}/{name}'
        if folder.exists():
            self.send(409, {'error': 'You already created this model repo', 'url': url})
            return
        folder.mkdir(parents=True)
        (folder / '.gitattributes').write_text('*.safetensors filter=lfs\n')
        self.send(200, {'url': url})

    def answer_lfs(self, name, what):
        """Say where a large file is to be sent, or take it."""
        if what != 'batch':
            assert hashlib.sha256(self.body).hexdigest() == what
            self.server.large[what] = self.body
            self.send(200, {})
            return
        self.check_author(name)
        objects = []
        for each in json.loads(self.body)['objects']:
            url = f'{self.server.url}/{name}.git/info/lfs/objects/{each["oid"]}'
            objects.append({**each, 'actions': {'upload': {'href': url}}})
        self.send(200, {'transfer': 'basic', 'objects': objects})

    def answer_upload(self, name, what):
        """Say how each file is to be sent, or write the files of a commit."""
        self.check_author(name)
        if what == 'preupload':
            modes = []
            for file in json.loads(self.body)['files']:
                mode = 'lfs' if file['path'].endswith(LARGE) else 'regular'
                modes.append({'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False})
            self.send(200, {'files': modes})
            return
        if name in self.server.full:
            raise Refusal(400, None, 'No room for more files')
        folder = self.server.folder / 'models' / name
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry['value']
            if entry['key'] == 'file':
                (folder / value['path']).write_bytes(base64.b64decode(value['content']))
            elif entry['key'] == 'lfsFile':
                (folder / value['path']).write_bytes(self.server.large[value['oid']])
        commit = self.server.branches('models', name)['main'][0]
        url = f'{self.server.url}/{name}/commit/{commit}'
        self.send(200, {'success': True, 'commitOid': commit, 'commitUrl': url})

    def answer_api(self, kind, name, what, revision, folder, values):
        """Answer with JSON. what: 'revision', 'tree', 'paths-info', 'refs', or None."""
        branches = self.find_branches(kind, name)
        if what == 'refs':
            refs = []
            for branch, (commit, _) in branches.items():
                place = f'refs/heads/{branch}'
                refs.append({'name': branch, 'ref': place, 'targetCommit': commit})
            self.send(200, {'branches': refs, 'converts': [], 'tags': []})
            return

        commit, files = self.find_files(branches, unquote(revision or 'main'))
        if what == 'tree':
            [recursive] = values['recursive']
            entries = list_tree(files, unquote(folder or ''), recursive == 'true')
            self.send_page(entries, recursive, int(values.get('cursor', '0')[0]))
        elif what == 'paths-info':
            entries = list_tree(files, '', recursive=True)
            self.send(200, [entry for entry in entries if entry['path'] in values['paths']])
        else:
            siblings = [{'rfilename': file} for file in files]
            self.send(200, {'id': name, 'sha': commit, 'siblings': siblings})

    def answer_file(self, kind, name, revision, path):
        """Answer with a file, or with the range of it that is asked for."""
        branches = self.find_branches(kind or 'models', name)
        _, files = self.find_files(branches, unquote(revision))
        if name in self.server.gated:
            status = 403 if 'Authorization' in self.headers else 401
            raise Refusal(status, 'GatedRepo', f'Access to {name} is restricted')
        if unquote(path) not in files:
            raise Refusal(404, 'EntryNotFound', 'Entry not found')

        data = files[unquote(path)]
        size = len(data)
        self.extra |= {'ETag': f'"{git_hash(data)}"', 'X-Linked-Size': str(size)}
        self.extra['Accept-Ranges'] = 'bytes'
        match = RANGE.match(self.headers.get('Range', ''))
        if not match:
            self.send(200, data)
            return
        first = int(match[1])
        last = min(int(match[2] or size), size - 1)
        if first > last:
            raise Refusal(416, None, 'The file ends before')
        self.extra['Content-Range'] = f'bytes {first}-{last}/{size}'
        self.send(206, data[first : last + 1])

    def find_branches(self, kind, name):
        """Return the branches of a repository. Raises Refusal where there is none."""
        if name in self.server.down:
            raise Refusal(503, None, 'The service is not available')
        branches = self.server.branches(kind, name)
        if not branches:
            # Without a token, a repository that is not there is one that may be private. The real
            # Hub sends no code then: clients know it by the https:// of its address.
            status = 404 if 'Authorization' in self.headers else 401
            raise Refusal(status, 'RepoNotFound', 'Repository not found')
        return branches

    def find_files(self, branches, revision):
        """Return the commit and the files of a branch or commit. Raises Refusal for another."""
        for branch, (commit, files) in branches.items():
            if revision in (branch, commit):
                self.extra['X-Repo-Commit'] = commit
                return commit, files
        raise Refusal(404, 'RevisionNotFound', f'Invalid rev id: {revision}')

    def send_page(self, entries, recursive, start):
        """Send a part of a listing, and the address of the next part if there is one."""
        stop = start + self.server.page_size
        if stop < len(entries):
            path, _, _ = self.path.partition('?')
            url = f'{self.server.url}{path}?recursive={recursive}&cursor={stop}'
            self.extra['Link'] = f'<{url}>; rel="next"'
        self.send(200, entries[start:stop])

    def send(self, status, body):
        """Send bytes, or else JSON. The request is noted first: who has the answer finds it."""
        request = Request(self.command, self.path, self.headers['Range'], status)
        self.server.requests.append(request)
        data = kept = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in self.extra.items():
            self.send_header(key, value)
        if self.server.warning:
            self.send_header('X-HF-Warning', self.server.warning)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if self.command != 'HEAD':
            if isinstance(body, bytes):
                kept = self.server.cut(data)
            self.wfile.write(kept)
            self.close_connection = len(kept) < len(data)

    def log_message(self, *args):
        """Print nothing."""


def git_hash(data):
    """Return the name that git has for a file of these bytes."""
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def list_tree(files, folder, recursive):
    """List the files and folders in a folder as the Hub does. Raises Refusal without a folder."""
    top = PurePosixPath(folder)
    entries = {}
    for path, data in files.items():
        file = PurePosixPath(path)
        for parent in file.parents:
            entries[parent] = {'type': 'directory', 'oid': '0' * 40, 'size': 0}
        entries[file] = {'type': 'file', 'oid': git_hash(data), 'size': len(data)}
    if top not in entries:
        raise Refusal(404, 'EntryNotFound', f'{folder} does not exist')

    listed = []
    for path, entry in sorted(entries.items()):
        is_below = top in path.parents
        if is_below and (recursive or path.parent == top):
            listed.append({'path': str(path), **entry})
    return listed


# -----------------------------------------------------------------------------
# corpora, in the layouts that they have on the Hub


def write_corpus(folder, name, files, configurations=None):
    """Write a dataset: its tables, and a README.md that says which are which.

    files: {path: the rows of a .parquet file, each a dictionary, or the bytes of any other file}.
    configurations: {name: {split: pattern}}, None to leave it to the names of the files.
    """
    repository = folder / 'datasets' / name
    for path, rows in files.items():
        file = repository / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(rows, bytes):
            file.write_bytes(rows)
        else:
            parquet.write_table(pyarrow.Table.from_pylist(rows), file)

    card = {'language': ['en']}
    if configurations:
        card['configs'] = []
        for configuration, splits in configurations.items():
            patterns = [{'split': split, 'path': pattern} for split, pattern in splits.items()]
            card['configs'].append({'config_name': configuration, 'data_files': patterns})
    (repository / 'README.md').write_text(f'---\n{yaml.safe_dump(card)}---\n\n# {name}\n')


def write_wikitext(folder, lines):
    """Write Salesforce/wikitext, the same lines as each size. lines: {split: [line, ...]}."""
    files = {}
    configurations = {}
    for size in ('103', '2'):
        configuration = f'wikitext-{size}-raw-v1'
        configurations[configuration] = {split: f'{configuration}/{split}-*' for split in lines}
        for split, texts in lines.items():
            rows = [{'text': text} for text in texts]
            files[f'{configuration}/{split}-00000-of-00001.parquet'] = rows
    write_corpus(folder, 'Salesforce/wikitext', files, configurations)


def write_tinystories(folder, train, validation):
    """Write roneneldan/TinyStories. train: the stories of each file. validation: those of its file.

    Its README.md does not name the files; the splits are known by the files' names.
    """
    files = {}
    for number, stories in enumerate(train):
        path = f'data/train-{number:05}-of-{len(train):05}-2d5a1467fff1081b.parquet'
        files[path] = [{'text': story} for story in stories]
    path = 'data/validation-00000-of-00001-869c898b519ad725.parquet'
    files[path] = [{'text': story} for story in validation]
    write_corpus(folder, 'roneneldan/TinyStories', files)


def write_hellaswag(folder, questions):
    """Write Rowan/hellaswag, all splits with the same questions, without labels in 'test'.

    questions: dictionaries with 'activity_label', 'ctx_a', 'ctx_b', 'endings' and 'label'.
    """
    files = {}
    patterns = {}
    for split in ('train', 'test', 'validation'):
        rows = []
        for number, question in enumerate(questions):
            context = f'{question["ctx_a"]} {question["ctx_b"]}'.strip()
            row = {'ind': number, **question, 'ctx': context, 'split': split}
            row |= {'source_id': f'activitynet~v_{number}', 'split_type': 'indomain'}
            if split == 'test':
                row['label'] = ''
            rows.append(row)
        files[f'data/{split}-00000-of-00001.parquet'] = rows
        patterns[split] = f'data/{split}-*'
    write_corpus(folder, 'Rowan/hellaswag', files, {'default': patterns})


# -----------------------------------------------------------------------------
# models, in the layouts that they have on the Hub

# What a text is to look like for its tokens to be few.
SHEEP = 'Many sheep jumped over the 17 fences, and {} fell asleep.\n'
# Beside the files that a model needs. The last is there for a model in safetensors.
USELESS = (
    'README.md', 'model.gguf', 'onnx/model.onnx', 'original/consolidated.00.pth', 'tf_model.h5',
    'pytorch_model.bin',
)  # fmt: skip
SMOLLM_TEMPLATE = """{% for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""


def write_smollm(repository, seed=1, max_shard_size='5GB', **sizes):
    """Write a small random Llama as HuggingFaceTB publishes SmolLM2-135M-Instruct.

    Returns the model, as transformers has it. sizes: more for its LlamaConfig.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    repository.mkdir(parents=True)
    write_tokenizer(repository, ['<|endoftext|>', '<|im_start|>', '<|im_end|>'])
    special = {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 2}
    options = {
        'vocab_size': 280, 'hidden_size': 24, 'intermediate_size': 64, 'num_hidden_layers': 2,
        'num_attention_heads': 3, 'num_key_value_heads': 1, 'max_position_embeddings': 64,
        'rms_norm_eps': 1e-5, 'tie_word_embeddings': True, 'initializer_range': 0.2, **sizes,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(rope_theta=100000, **options, **special)).bfloat16()
    model.save_pretrained(repository, max_shard_size=max_shard_size)

    # Published by an older version, which wrote it so.
    more = {'rope_interleaved': False, 'rope_scaling': None, 'rope_theta': 100000}
    more |= {'is_llama_config': True, 'hidden_act': 'silu', 'torch_dtype': 'bfloat16'}
    kind = {'model_type': 'llama', 'architectures': ['LlamaForCausalLM']}
    write_json(repository / 'config.json', {**kind, **options, **special, **more})
    generation = {'_from_model_config': True, **special, 'transformers_version': '4.42.3'}
    write_json(repository / 'generation_config.json', generation)
    tokens = {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>', 'pad_token': '<|im_end|>'}
    tokens['unk_token'] = '<|endoftext|>'
    more = {'model_max_length': 64, 'tokenizer_class': 'GPT2Tokenizer'}
    write_json(repository / 'tokenizer_config.json', {'add_prefix_space': False, **tokens, **more})
    write_json(repository / 'special_tokens_map.json', tokens)
    (repository / 'chat_template.jinja').write_text(SMOLLM_TEMPLATE)
    write_useless(repository, USELESS)
    # Read again: this one, cast from 16 bits, would keep its positions rounded.
    return LlamaForCausalLM.from_pretrained(repository, dtype=torch.float32)


def write_gpt2(repository):
    """Write a small random GPT-2 as openai-community publishes it. Returns the model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    repository.mkdir(parents=True)
    write_tokenizer(repository, ['<|endoftext|>'])
    write_json(repository / 'tokenizer_config.json', {'model_max_length': 64})
    sizes = {'vocab_size': 280, 'n_positions': 64, 'n_embd': 16, 'n_layer': 2, 'n_head': 2}
    special = {'bos_token_id': 0, 'eos_token_id': 0}
    model = GPT2LMHeadModel(GPT2Config(initializer_range=0.2, **sizes, **special))
    model.save_pretrained(repository)
    write_useless(repository, USELESS)
    return model.eval()


def write_tokenizer(repository, special):
    """Write a byte-level tokenizer: tokenizer.json, and the files of older versions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    options = {'initial_alphabet': words.alphabet(), 'special_tokens': special}
    trainer = trainers.BpeTrainer(vocab_size=280, show_progress=False, **options)
    tokenizer.train_from_iterator(100 * [SHEEP], trainer)
    tokenizer.save(str(repository / 'tokenizer.json'))
    tokenizer.model.save(str(repository))  # vocab.json and merges.txt


def write_useless(repository, paths):
    """Write files that are not needed, where there are none."""
    for path in paths:
        file = repository / path
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            file.write_text('of no use')


def write_json(path, contents):
    """Write a JSON file as people do, over several lines and with a line end."""
    path.write_text(json.dumps(contents, indent=2) + '\n')

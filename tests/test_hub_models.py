"""Models of the Hugging Face Hub by their names, from one of our own on 127.0.0.1.

Our scripts run with the real client. What is right is which files it fetched, what transformers
computes with the same model, and one sentence where there is none.
"""

import json
import shutil
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import torch
from conftest import Result, command
from hub import SHEEP, HubServer, write_gpt2, write_smollm
from transformers import AutoTokenizer

SMOL = 'HuggingFaceTB/SmolLM2-tiny'
TOKENIZER_FILES = ['chat_template.jinja', 'merges.txt', 'special_tokens_map.json']
TOKENIZER_FILES += ['tokenizer.json', 'tokenizer_config.json', 'vocab.json']
SMALL_FILES = sorted(['config.json', 'generation_config.json', *TOKENIZER_FILES])
SHARDS = [f'model-0000{n}-of-00003.safetensors' for n in (1, 2, 3)]
SHARDS += ['model.safetensors.index.json']

TEXT = ''.join(SHEEP.format(n) for n in range(40))
INPUT = '--input=sheep.txt'
TRAIN = ['--dataset=sheep', '--block_size=16', '--batch_size=2', '--max_iters=2', '--device=cpu']
TRAIN += ['--gradient_accumulation_steps=1', '--dtype=float32']
EVALUATE = [INPUT, '--format=json', '--device=cpu', '--dtype=float32']
SAMPLE = ['--temperature=0', '--num_samples=1', '--max_new_tokens=12', '--start=Many sheep']
SAMPLE += ['--format=jsonl', '--device=cpu', '--dtype=float32']
# Each script that takes a name, up to where the name goes.
BY_NAME = [
    ['sample.py', *SAMPLE, '--init_from='],
    ['evaluate.py', *EVALUATE, '--init_from='],
    ['train.py', *TRAIN, '--init_from='],
    ['train.py', *TRAIN, '--plan', '--init_from='],
    ['prepare.py', INPUT, '--name=new', '--tokenizer='],
]

# To import torch takes longer than all that the scripts do. So they run in forks of a process that
# has done it. The client of the Hub is imported by each, since it reads the environment then.
FORKS = """
import json, os, signal, sys, time

sys.path.insert(0, {tests!r})
from conftest import ROOT, interpret  # which finds the others
import documents, inference, optim, parallel, plan, report

assert 'huggingface_hub' not in sys.modules


def run(folder, out, err, environment, lines):
    signal.alarm(300)  # should it hang
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    time.sleep = lambda seconds: None  # the client would wait before it tries again
    for script, *args in lines:
        sys.argv = [script, *args]
        code, _ = interpret(ROOT / script)
        for file in (sys.stdout, sys.stderr):
            print(end=f'\\0{{code}}\\0', file=file, flush=True)
    os._exit(0)  # to take torch down takes a second


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(*json.loads(line))
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


@pytest.fixture(scope='module')
def forks():
    source = FORKS.format(tests=str(Path(__file__).parent))
    line = [sys.executable, '-c', source]
    with Popen(line, stdin=PIPE, stdout=PIPE, text=True, bufsize=1) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """The folder of a Hub with models, and {name or name@branch: the same by transformers}."""
    folder = tmp_path_factory.mktemp('hub')
    models = folder / 'models'
    references = {
        SMOL: write_smollm(models / SMOL),
        f'{SMOL}@v1': write_smollm(models / f'{SMOL}@v1', seed=2),
        'org/sharded': write_smollm(models / 'org/sharded', seed=3, max_shard_size='16KB'),
        'org/old': write_smollm(models / 'org/old', seed=4),
        'org/large': write_smollm(models / 'org/large', hidden_size=384, intermediate_size=2400),
        'gpt2': write_gpt2(models / 'openai-community/gpt2'),
    }
    old = models / 'org/old'
    (old / 'model.safetensors').unlink()
    torch.save(references['org/old'].bfloat16().state_dict(), old / 'pytorch_model.bin')
    references['org/old'].float()
    shutil.copytree(old, models / 'org/gguf')
    for name in (*SMALL_FILES, 'pytorch_model.bin'):
        (models / 'org/gguf' / name).unlink()
    shutil.copytree(models / SMOL, models / 'org/mistral')
    config = json.loads((models / SMOL / 'config.json').read_text())
    config['model_type'] = 'mistral'
    (models / 'org/mistral/config.json').write_text(json.dumps(config))
    return folder, references


@pytest.fixture
def hub(published):
    folder, _ = published
    with HubServer(folder) as server:
        yield server


@pytest.fixture
def client(hub, forks, tmp_path):
    return Client(hub, forks, tmp_path)


class Client:
    """Somebody with a text and an empty cache, who runs our scripts."""

    def __init__(self, hub, forks, folder):
        self.hub = hub
        self.forks = forks
        self.cache = folder / 'cache'
        self.folder = folder / 'work'
        self.folder.mkdir()
        (self.folder / 'sheep.txt').write_text(TEXT)

    def run(self, *line, **variables):
        """Run a script, which must succeed. variables: of its environment. Returns its Result."""
        [result] = self.run_several([line], **variables)
        assert result.code == 0, result.err
        return result

    def run_several(self, lines, **variables):
        """Run scripts, [[script, argument, ...], ...], in one process. Returns a Result of each."""
        files = [self.folder.parent / name for name in ('out', 'err')]
        environment = self.hub.environment(self.cache, **variables)
        task = [str(self.folder), *map(str, files), environment, lines]
        print(json.dumps(task), file=self.forks.stdin)
        status = self.forks.stdout.readline()
        outs, errs = [file.read_text().split('\0') for file in files]
        assert status == '0\n', errs
        assert len(outs) == len(errs) == 2 * len(lines) + 1
        triples = zip(outs[1::2], outs[::2], errs[::2], strict=False)
        return [Result(int(code), out, err, {}) for code, out, err in triples]

    def fetched(self):
        """List the files that were fetched since the last time. None was begun in the middle."""
        files = self.hub.fetched()
        self.hub.requests.clear()
        assert all(first == 0 for _, first in files)
        return sorted(path for path, _ in files)

    def files(self):
        """List the files in its folder."""
        paths = [path for path in self.folder.rglob('*') if path.is_file()]
        return sorted(path.relative_to(self.folder).as_posix() for path in paths)


def expected_loss(model, folder):
    """The mean loss of transformers' model on the text, in windows of its whole context."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(TEXT)['input_ids'])
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 64):
            window = ids[start : start + 65]
            logits = model(window[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction='sum').item()
    return total / (len(ids) - 1)


def expected_sample(model, folder):
    """What transformers' model continues the prompt of SAMPLE with."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer('Many sheep', return_tensors='pt')['input_ids']
    generated = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(generated, skip_special_tokens=True)


# -----------------------------------------------------------------------------
# what is fetched, and what the scripts make of it


def test_a_model_is_prepared_for_trained_and_kept(published, forks, tmp_path):
    folder, references = published
    source = folder / 'models' / SMOL
    with HubServer(folder) as hub:
        client = Client(hub, forks, tmp_path)
        client.run('prepare.py', INPUT, f'--tokenizer={SMOL}')
        assert client.fetched() == SMALL_FILES
        dataset = client.folder / 'data' / 'sheep'
        for name in TOKENIZER_FILES:
            assert (dataset / name).read_bytes() == (source / name).read_bytes()

        client.run('train.py', *TRAIN, f'--init_from={SMOL}')
        assert client.fetched() == ['model.safetensors']

        # Once more, it asks whether there is another commit, and that is all.
        done = client.run('evaluate.py', *EVALUATE, f'--init_from={SMOL}')
        loss = json.loads(done.out)['text']['loss']
        assert loss == pytest.approx(expected_loss(references[SMOL], source), rel=1e-5)
        asked = [(request.method, request.status) for request in hub.requests]
        assert asked == [('GET', 200)]
        assert not client.fetched()

    # Without the Hub there is the cache.
    environment = hub.environment(client.cache)
    line = ['sample.py', *SAMPLE, f'--init_from={SMOL}']
    done = command(*line, cwd=client.folder, env=environment)
    assert done.returncode == 0 and not done.stderr
    assert json.loads(done.stdout)['text'] == expected_sample(references[SMOL], source)

    # Whoever opens the checkpoint has what was published.
    checkpoint = client.folder / 'out' / 'step_00000002'
    for name in TOKENIZER_FILES:
        assert (checkpoint / name).read_bytes() == (source / name).read_bytes()
    generation_config = json.loads((source / 'generation_config.json').read_text())
    assert json.loads((checkpoint / 'generation_config.json').read_text()) == generation_config
    before = json.loads((source / 'config.json').read_text())
    after = json.loads((checkpoint / 'config.json').read_text())
    for name in ('bos_token_id', 'eos_token_id', 'pad_token_id', 'is_llama_config'):
        assert after[name] == before[name]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.eos_token_id == 2
    chat = [{'role': 'user', 'content': 'Hi'}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    )


def test_a_plan_needs_no_weights_and_a_text_all_shards(client, published):
    folder, references = published
    plan = ['train.py', *TRAIN, '--plan']
    client.run(*plan, '--init_from=gpt2')  # its shape is known
    assert not client.hub.requests
    client.run(*plan, '--init_from=org/sharded')
    assert client.fetched() == SMALL_FILES
    done = client.run('evaluate.py', *EVALUATE, '--init_from=org/sharded')
    assert client.fetched() == SHARDS
    loss = expected_loss(references['org/sharded'], folder / 'models' / 'org/sharded')
    assert json.loads(done.out)['text']['loss'] == pytest.approx(loss, rel=1e-5)


def test_an_old_model_has_its_pickle_and_gpt2_has_not(client, published):
    folder, references = published
    # What the client itself tells is not among the samples: that it should log in, and its bars.
    advice = 'You are sending unauthenticated requests.'
    client.hub.warning = f'unauthenticated; {advice}'
    lines = [['sample.py', *SAMPLE, f'--init_from={name}'] for name in ('org/old', 'gpt2')]
    old, gpt2 = client.run_several(lines, HF_HUB_DISABLE_PROGRESS_BARS='0')

    of_gpt2 = {*SMALL_FILES, 'model.safetensors'}
    of_gpt2 -= {'chat_template.jinja', 'special_tokens_map.json'}
    assert client.fetched() == sorted([*SMALL_FILES, 'pytorch_model.bin', *of_gpt2])
    expected = expected_sample(references['org/old'], folder / 'models' / 'org/old')
    assert json.loads(old.out)['text'] == expected
    expected = expected_sample(references['gpt2'], folder / 'models' / 'openai-community/gpt2')
    assert json.loads(gpt2.out)['text'] == expected
    told = [line for line in (old.err + gpt2.err).splitlines() if line]
    assert all(line == advice or line.startswith('Fetching ') for line in told), told


def test_a_branch_and_a_commit(client, published):
    folder, references = published
    commit, _ = client.hub.branches('models', SMOL)['v1']
    lines = []
    for name in (SMOL, f'{SMOL}@v1', f'{SMOL}@{commit}', f'{SMOL}@v9'):
        lines.append(['evaluate.py', *EVALUATE, f'--init_from={name}'])
    lines.append(['prepare.py', INPUT, f'--tokenizer={SMOL}@v1'])
    lines.append(['prepare.py', INPUT, f'--tokenizer={SMOL}@v9', '--name=v9'])
    main, branch, same, missing, prepared, not_prepared = client.run_several(lines)
    assert prepared.code == 0
    source = folder / 'models' / f'{SMOL}@v1'
    losses = [json.loads(result.out)['text']['loss'] for result in (main, branch, same)]
    branch_loss = expected_loss(references[f'{SMOL}@v1'], source)
    main_loss = expected_loss(references[SMOL], folder / 'models' / SMOL)
    assert losses == pytest.approx([main_loss, branch_loss, branch_loss], rel=1e-5)
    # Both branches have the same small files, and the commit is that of the second one.
    assert client.fetched() == sorted([*SMALL_FILES, *2 * ['model.safetensors']])
    for result in (missing, not_prepared):
        assert result.is_one_sentence and f'{SMOL} has no revision v9' in result.err
    assert not (client.folder / 'data' / 'v9').exists()


# -----------------------------------------------------------------------------
# what cannot be had


def refusals(client, names, **variables):
    """Run each script with each name, and check that it says one sentence and leaves nothing.

    Returns {name: [what it says, one per script]}.
    """
    byte = ['prepare.py', INPUT, '--tokenizer=byte']  # train.py reads the text first
    lines = [byte]
    for name in names:
        lines += [[*line[:-1], line[-1] + name] for line in BY_NAME]
    prepared, *results = client.run_several(lines, **variables)
    assert prepared.code == 0
    for line, result in zip(lines[1:], results, strict=True):
        assert result.is_one_sentence, (line, result)
        assert not result.out
    parts = ('meta.json', 'tokenizer.json', 'tokenizer_config.json', 'train.bin', 'val.bin')
    assert client.files() == [*(f'data/sheep/{part}' for part in parts), 'sheep.txt']

    sentences = [result.err for result in results]
    n_scripts = len(BY_NAME)
    return {name: sentences[i * n_scripts :][:n_scripts] for i, name in enumerate(names)}


@pytest.mark.parametrize('variables', [{}, {'HF_TOKEN': 'hf_x'}], ids=['401', '404 and 403'])
def test_what_the_hub_does_not_give_is_one_sentence(client, variables):
    client.hub.gated = {'org/sharded'}
    client.hub.down = {'org/old'}
    names = ['gpt5', 'a/b/c', 'org/missing', 'out/step_1', 'org/sharded', 'org/old']
    said = refusals(client, names, **variables)
    # It is not asked for what is no name.
    assert said['gpt5'].pop().startswith("tokenizer='gpt5' is unknown.")
    for name in ('gpt5', 'a/b/c'):
        for sentence in said[name]:
            assert sentence.startswith(f'There is no folder {name}.') and 'ORG/NAME' in sentence
        assert not any(name in request.path for request in client.hub.requests)
    for name in ('org/missing', 'out/step_1'):  # the latter is a folder with a typo
        for sentence in said[name]:
            assert f'no folder {name}, and no model {name} on the Hugging Face Hub' in sentence
    for sentence in said['org/sharded']:
        assert sentence.startswith('org/sharded is gated: accept its terms')
        assert 'log in with: hf auth login' in sentence
    for sentence in said['org/old']:
        assert sentence.startswith('org/old could not be downloaded') and '503' in sentence
    statuses = {request.status for request in client.hub.requests}
    assert statuses == {200, 503, *((404, 403) if variables else (401,))}
    assert not client.fetched()


def test_without_the_hub_it_says_to_connect_or_name_a_folder(published, forks, tmp_path):
    folder, _ = published
    with HubServer(folder) as hub:
        client = Client(hub, forks, tmp_path)
    for sentence in refusals(client, [SMOL])[SMOL]:
        assert sentence.startswith(f'{SMOL} could not be downloaded from the Hugging Face Hub')
        assert 'connect to the internet and try again, or name a folder' in sentence


# Fails: sample.py, evaluate.py and train.py say "There is no folder .../snapshots/...", since the
# client makes none when no file is wanted; and it logs the patterns that no file matched.
def test_a_repository_without_a_model_is_one_sentence(client):
    byte = ['prepare.py', INPUT, '--tokenizer=byte']
    lines = [[*line[:-1], f'{line[-1]}org/gguf'] for line in BY_NAME]
    _, *results = client.run_several([byte, *lines])
    for result in results:
        assert result.is_one_sentence, result
        assert 'gguf' in result.err and 'There is no folder' not in result.err, result.err


def test_a_model_not_known_here_is_refused_before_its_weights(client):
    [result] = client.run_several([['sample.py', *SAMPLE, '--init_from=org/mistral']])
    assert result.is_one_sentence and "model_type='mistral' is not one of" in result.err
    assert 'model.safetensors' not in client.fetched()


# -----------------------------------------------------------------------------
# faults


def test_weights_that_break_off_are_fetched_from_there_on(client, published):
    folder, references = published
    client.hub.cut_after = 11_000_000
    done = client.run('sample.py', *SAMPLE, '--init_from=org/large')
    source = folder / 'models' / 'org/large'
    assert json.loads(done.out)['text'] == expected_sample(references['org/large'], source)
    # The client keeps pieces of 10 MiB.
    fetched = [file for file in client.hub.fetched() if file[0] == 'model.safetensors']
    assert fetched == [('model.safetensors', 0), ('model.safetensors', 10 * 2**20)]
    [cached] = client.cache.rglob('model.safetensors')
    assert cached.read_bytes() == (source / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('fail_every', [5, 7])
def test_each_file_is_fetched_once_whatever_fails(client, fail_every):
    """The client repeats questions, but not a download: that is the next run's."""
    client.hub.fail_every = fail_every
    *failed, last = client.run_several(12 * [['sample.py', *SAMPLE, '--init_from=org/sharded']])
    assert any(request.status == 503 for request in client.hub.requests)
    for result in failed:
        if result.code:
            *_, sentence = result.err.splitlines()
            assert sentence.startswith('org/sharded could not be downloaded'), result.err
            assert not result.has_traceback
    assert last.code == 0 and client.fetched() == sorted([*SMALL_FILES, *SHARDS])

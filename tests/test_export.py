"""export.py: GGUF files, read back by gguf's reader and by transformers, and folders."""

import errno
import json
import os
import re
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from conftest import command, same
from hub import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tokenizer as tokenizers
from model import GPT, GPTConfig, hf_tensors

SHAPE = {'block_size': 256, 'n_layer': 2, 'n_head': 4, 'n_embd': 64, 'intermediate_size': 96}
SHAPES = {
    'gpt2': {}, 'gpt2, no biases': {'bias': False}, 'llama': {'n_kv_head': 2, 'tie_weights': False},
    'qwen2': {'n_kv_head': 2}, 'qwen3': {'n_kv_head': 1, 'head_dim': 32, 'rope_theta': 5e5},
}  # fmt: skip
SCALED = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
SCALED = {'rope_type': 'llama3', 'original_max_position_embeddings': 64, **SCALED}
TEXTS = ['the sheep jumped, 12 times; née Öde 日本 ह़ै\n\n', 'of sheep and sheep']


def make_folder(folder, name='qwen3', kind='bpe', texts=TEXTS, end_of_text=True, **changes):
    """A model of random weights, norms and biases, in a folder with its tokenizer."""
    vocabulary = tokenizers.build(kind, texts, 300, end_of_text)
    torch.manual_seed(0)
    shape = SHAPE | SHAPES[name] | changes
    config = GPTConfig(arch=name.partition(',')[0], vocab_size=vocabulary.n_vocab, **shape)
    model = GPT(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    folder.mkdir()
    model.save_pretrained(folder, vocabulary.special_ids)
    tokenizers.save(vocabulary, folder)
    return model.eval()


def export(run, *args, code=0):
    result = run('export.py', '--init_from=here', *args)
    assert result.code == code, result.err
    return result


def read(path):
    """{name: array as stored}, and {key: value}, of a GGUF file."""
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert values.shape == tuple(reversed(tensor.shape.tolist())), tensor.name
        tensors[tensor.name] = values
    return tensors, {key: field.contents() for key, field in reader.fields.items()}


@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('dtype', ['float32', 'q8_0'])
def test_transformers_reads_the_same_model_from_gguf(run, tmp_path, name, dtype):
    model = make_folder(tmp_path / 'here', name)
    export(run, f'--dtype={dtype}', '--to=x.gguf')
    # From a file alone it does not find out the width of a head, or of GPT-2's MLP.
    theirs = AutoModelForCausalLM.from_pretrained(
        '.', gguf_file='x.gguf', config=AutoConfig.from_pretrained('here'), dtype=torch.float32
    )
    idx = torch.arange(48).view(2, 24) * 5
    with torch.no_grad():
        expected = model(idx)[..., : model.config.vocab_size]
        computed = theirs(idx).logits
    off = (computed - expected).norm() / expected.norm()
    assert off < (1e-5 if dtype == 'float32' else 0.02)


@pytest.mark.parametrize('name', SHAPES)
def test_each_number_of_a_model_is_in_the_file_once(run, tmp_path, name):
    model = make_folder(tmp_path / 'here', name)
    export(run, '--dtype=float32', '--to=x.gguf')
    tensors, keys = read('x.gguf')
    stored = np.sort(np.concatenate([values.ravel() for values in tensors.values()]))
    ours = torch.cat([tensor.flatten() for tensor in hf_tensors(model).values()]).sort().values
    n_zeros = len(stored) - len(ours)  # the biases that llama.cpp's GPT-2 always has
    assert (n_zeros > 0) == (name == 'gpt2, no biases')
    if n_zeros:
        ours = torch.cat((ours, torch.zeros(n_zeros))).sort().values
    assert np.array_equal(stored, ours.numpy())
    arch = name.partition(',')[0]
    assert keys['general.architecture'] == arch and keys['general.name'] == 'here'
    assert keys[f'{arch}.context_length'] == 256 and keys[f'{arch}.block_count'] == 2


ROUNDING = {'bfloat16': 4e-3, 'float16': 5e-4, 'q8_0': 8e-3}  # relative errors


@pytest.mark.parametrize('dtype', ROUNDING)
def test_matrices_are_rounded_and_vectors_are_not(run, tmp_path, dtype):
    make_folder(tmp_path / 'here')
    export(run, '--dtype=float32', '--to=exact.gguf')
    export(run, f'--dtype={dtype}', '--to=x.gguf')
    exact, _ = read('exact.gguf')
    rounded, _ = read('x.gguf')
    assert rounded.keys() == exact.keys()
    for name, values in exact.items():
        off = np.linalg.norm(rounded[name] - values) / np.linalg.norm(values)
        assert off == 0 if values.ndim == 1 else 0 < off < ROUNDING[dtype], name
    assert os.path.getsize('x.gguf') < 0.6 * os.path.getsize('exact.gguf')


def test_scaled_positions_are_divided_by_their_factors(run, tmp_path):
    make_folder(tmp_path / 'here', 'llama', rope_scaling=SCALED)
    export(run, '--to=x.gguf')
    tensors, _ = read('x.gguf')
    factors = tensors['rope_freqs.weight']
    assert factors.shape == (8,) and factors[0] == 1 and factors[-1] == 8


@pytest.mark.parametrize('kind', ['bpe', 'char', 'byte', 'gpt2'])
def test_a_vocabulary_has_its_ids_and_its_ends(run, tmp_path, kind):
    make_folder(tmp_path / 'here', kind=kind)
    export(run, '--to=x.gguf')
    _, keys = read('x.gguf')
    vocabulary = tokenizers.load(tmp_path / 'here')
    tokens = keys['tokenizer.ggml.tokens']
    assert {text: id for id, text in enumerate(tokens)} == vocabulary.vocabulary()
    assert keys['tokenizer.ggml.eos_token_id'] == vocabulary.end_of_text
    types = keys['tokenizer.ggml.token_type']
    assert [id for id, kind in enumerate(types) if kind == 3] == [vocabulary.end_of_text]
    assert keys['tokenizer.ggml.add_bos_token'] is False
    merges = [merge.split(' ') for merge in keys.get('tokenizer.ggml.merges', [])]
    if kind == 'char':  # of the bytes of one character, from the left
        assert all(len(right) == 1 for _, right in merges)
        characters = {left + right for left, right in merges}
        assert all(token in characters for token in tokens if len(token) > 1 and '|' not in token)
    elif kind == 'byte':
        assert merges == [[tokenizers.END_OF_TEXT, tokenizers.END_OF_TEXT]], 'which never happens'
    else:
        written = json.loads(vocabulary.files['tokenizer.json'])['model']['merges']
        assert merges == written


def test_characters_without_an_end_of_text_are_bytes(run, tmp_path):
    make_folder(tmp_path / 'here', kind='char', texts=['\nab'], end_of_text=False)
    export(run, '--to=x.gguf')
    _, keys = read('x.gguf')
    assert keys['tokenizer.ggml.model'] == 'rwkv' and 'tokenizer.ggml.eos_token_id' not in keys
    assert keys['tokenizer.ggml.tokens'] == [r'\x0a', r'\x61', r'\x62']


def test_others_than_ascii_need_an_end_of_text(run, tmp_path):
    make_folder(tmp_path / 'here', kind='char', texts=['abö'], end_of_text=False)
    result = export(run, '--to=x.gguf', code=1)
    assert result.is_one_sentence and 'no end of text' in result.err


WRITTEN = normalizers.Replace(' ', '▁')
SPACES = {  # how a tokenizer.json has SentencePiece's spaces: [normalizer, pre_tokenizer]
    'Llama 2': [normalizers.Sequence([normalizers.Prepend('▁'), WRITTEN]), None],
    'none before a text': [WRITTEN, None],
    'newer': [None, pre_tokenizers.Metaspace(prepend_scheme='first', split=False)],
}


def make_sentencepiece(folder, spaces):
    """A Llama with a vocabulary of SentencePiece's kind."""
    normalizer, first = SPACES[spaces]
    tokens = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256))]
    merges = [('▁', 'a'), ('b', 'c'), ('▁a', 'bc'), ('a', 'b')]
    tokens += ['▁', 'a', 'b', 'c', *(left + right for left, right in merges)]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    hf = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token='<unk>'))
    hf.add_special_tokens(['<unk>', '<s>', '</s>'])
    if normalizer:
        hf.normalizer = normalizer
    if first:
        hf.pre_tokenizer = first
    fallback = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    strip = [] if spaces.startswith('none') else [decoders.Strip(' ', 1, 0)]
    hf.decoder = decoders.Sequence(fallback + strip)
    folder.mkdir()
    model = GPT(GPTConfig(arch='llama', vocab_size=len(tokens), **SHAPE))
    model.save_pretrained(folder, {'bos': 1, 'eos': 2})
    hf.save(str(folder / 'tokenizer.json'))
    return hf


@pytest.mark.parametrize('spaces', SPACES)
def test_sentencepiece_has_its_ids(run, tmp_path, spaces):
    hf = make_sentencepiece(tmp_path / 'here', spaces)
    noted = export(run, '--to=x.gguf').out
    assert ('begins with a space' in noted) == (spaces == 'newer')
    _, keys = read('x.gguf')
    assert keys['tokenizer.ggml.model'] == 'llama'
    assert keys['tokenizer.ggml.add_space_prefix'] == (not spaces.startswith('none'))
    types = keys['tokenizer.ggml.token_type']
    assert types[:3] == [2, 3, 3] and types[3:259] == [6] * 256 and set(types[259:]) == {1}
    theirs = AutoTokenizer.from_pretrained('.', gguf_file='x.gguf')  # from scores, without merges
    if not spaces.startswith('none'):  # which transformers does not read from it
        for text in ('abc', 'a abc bca', 'é a', 'cab  ab'):
            ids = hf.encode(text, add_special_tokens=False).ids
            assert theirs.encode(text, add_special_tokens=False) == ids, text


def test_a_unigram_is_refused(run, tmp_path):
    make_sentencepiece(tmp_path / 'here', 'newer')
    pieces = [(f'<0x{byte:02X}>', 0.0) for byte in range(256)] + [('▁', 0.0), ('a', 0.0)]
    hf = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    hf.pre_tokenizer = SPACES['newer'][1]
    hf.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    hf.save(str(tmp_path / 'here' / 'tokenizer.json'))
    result = export(run, '--to=x.gguf', code=1)
    assert result.is_one_sentence and 'Only vocabularies of BPE' in result.err


def test_another_sentencepiece_is_refused(run, tmp_path):
    make_sentencepiece(tmp_path / 'here', 'Llama 2')
    edit(tmp_path / 'here' / 'tokenizer.json', lambda c: c['normalizer']['normalizers'].pop(1))
    result = export(run, '--to=x.gguf', code=1)
    assert result.is_one_sentence and 'not exported' in result.err


def test_a_folder_is_the_checkpoint_without_its_training(run, sheep, tmp_path):
    flags = ['--dataset=sheep', '--n_layer=1', '--n_head=1', '--n_embd=16', '--block_size=16']
    assert run('train.py', *flags, '--max_iters=2', '--eval_interval=2', '--device=cpu').code == 0
    result = run('export.py', '--format=folder', '--dtype=float32')
    assert result.code == 0, result.err
    step = tmp_path / 'out' / 'step_00000002'
    folder = tmp_path / 'out' / 'model-float32'
    weights = load_file(folder / 'model.safetensors')
    assert same(weights, load_file(step / 'model.safetensors'))
    assert {path.name for path in folder.iterdir()} < {path.name for path in step.iterdir()}
    sampled = run('sample.py', f'--init_from={folder}', '--max_new_tokens=5', '--device=cpu')
    assert sampled.code == 0, sampled.err
    assert run('export.py', '--format=folder', '--dtype=bfloat16').code == 0
    halves = load_file(tmp_path / 'out' / 'model-bfloat16' / 'model.safetensors')
    assert same(halves, {name: tensor.bfloat16() for name, tensor in weights.items()})


@pytest.mark.parametrize(
    ('args', 'sentence'),
    [
        (['--init_from=nothing'], 'nothing'),
        (['--to=here'], 'here exists'),
        (['--dtype=q8_0', '--format=folder'], 'is for format=gguf'),
        (['--dtype=q4'], 'dtype'),
        (['--format=onnx'], 'format'),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(run, tmp_path, args, sentence):
    make_folder(tmp_path / 'here')
    result = export(run, *args, code=1)
    assert result.is_one_sentence and sentence in result.err
    assert [path.name for path in tmp_path.iterdir()] == ['here']


def edit(path, change):
    contents = json.loads(path.read_text())
    change(contents)
    path.write_text(json.dumps(contents))


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (lambda c: c['pre_tokenizer']['pretokenizers'][0]['pattern'].update(Regex='x+'), 'x+'),
        (lambda c: c['pre_tokenizer']['pretokenizers'][1].update(use_regex=True), 'as in GPT-2'),
        (lambda c: c['pre_tokenizer']['pretokenizers'].pop(0), '(nothing)'),
        (lambda c: c['pre_tokenizer']['pretokenizers'].pop(1), 'cuts no text'),
        (lambda c: c['pre_tokenizer']['pretokenizers'][0].update(invert=True), 'Split'),
        (lambda c: c.update(normalizer={'type': 'Lowercase'}), 'Lowercase'),
        (lambda c: c.update(pre_tokenizer={'type': 'Whitespace'}), 'Whitespace'),
        (lambda c: c['model']['vocab'].update(more=999), 'more than the'),
        (lambda c: c.update(added_tokens=[], post_processor=None), 'no end of text'),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(run, tmp_path, change, sentence):
    make_folder(tmp_path / 'here')
    edit(tmp_path / 'here' / 'tokenizer.json', change)
    if 'end of text' in sentence:
        for name in ('config.json', 'generation_config.json'):
            edit(tmp_path / 'here' / name, lambda c: c.update(eos_token_id=None))
        edit(tmp_path / 'here' / 'tokenizer_config.json', lambda c: c.pop('eos_token'))
    result = export(run, '--to=x.gguf', code=1)
    assert result.is_one_sentence and sentence in result.err
    assert [path.name for path in tmp_path.iterdir()] == ['here']


def test_learned_positions_go_on_to_where_llama_cpp_looks(run, tmp_path):
    model = make_folder(tmp_path / 'here', 'gpt2', block_size=300)
    result = export(run, '--dtype=float32', '--to=x.gguf')
    assert 'after 300 tokens' in result.out
    tensors, keys = read('x.gguf')
    positions = tensors['position_embd.weight']
    assert keys['gpt2.context_length'] == len(positions) == 512
    assert np.array_equal(positions[:300], model.wpe.weight.detach())
    assert (positions[300:] == positions[299]).all()


def test_scaled_positions_of_others_than_llamas_are_refused(run, tmp_path):
    make_folder(tmp_path / 'here', 'qwen3', rope_scaling=SCALED)
    result = export(run, '--to=x.gguf', code=1)
    assert result.is_one_sentence and 'Llamas only' in result.err


def test_a_folder_that_is_not_there_is_not_made(run, tmp_path):
    make_folder(tmp_path / 'here')
    result = export(run, '--to=a/b/x.gguf', code=1)
    assert result.is_one_sentence and 'no folder a/b' in result.err


@pytest.mark.parametrize('form', ['gguf', 'folder'])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(run, tmp_path, monkeypatch, form):
    make_folder(tmp_path / 'here')

    def fill(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'x')

    # In the middle of writing, when a part is there.
    monkeypatch.setattr(gguf.GGUFWriter, 'write_tensors_to_file', fill)
    monkeypatch.setattr('tokenizer.save', fill)
    result = export(run, '--to=x', f'--format={form}', '--dtype=float32', code=1)
    assert result.is_one_sentence and 'No space left on device' in result.err
    assert [path.name for path in tmp_path.iterdir()] == ['here']


def test_without_gguf_it_says_what_to_install(tmp_path):
    make_folder(tmp_path / 'here')
    (tmp_path / 'gguf.py').write_text('raise ImportError')
    environment = os.environ | {'PYTHONPATH': str(tmp_path)}
    result = command('export.py', '--init_from=here', cwd=tmp_path, env=environment)
    assert result.returncode == 1
    assert result.stderr == 'A GGUF file needs the package gguf: pip install gguf\n'



# -----------------------------------------------------------------------------
# upload


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / 'hub') as server:
        yield server


def push(hub, folder, *args, code=0, **variables):
    environment = hub.environment(folder / 'cache', **variables)
    args = ['--init_from=here', '--push=me/sheep', *args]
    result = command('export.py', *args, cwd=folder, env=environment)
    assert result.returncode == code, result.stderr
    return result


def train_sheep(run):
    flags = ['--dataset=sheep', '--n_layer=1', '--n_head=1', '--n_embd=16', '--block_size=16']
    trained = run('train.py', *flags, '--max_iters=2', '--eval_interval=2', '--device=cpu')
    assert trained.code == 0, trained.err


def test_a_folder_is_uploaded_with_its_card(run, sheep, hub, tmp_path):
    train_sheep(run)
    flags = ['--init_from=resume', '--format=folder', '--dtype=float32', '--to=here']
    result = push(hub, tmp_path, *flags, HF_TOKEN='hf_token')
    assert 'me/sheep on the Hugging Face Hub: README.md, config.json' in result.stdout
    _, files = hub.branches('models', 'me/sheep')['main']
    assert b'lfs' in files.pop('.gitattributes')
    card = files['README.md'].decode()
    written = {path.name: path.read_bytes() for path in (tmp_path / 'here').iterdir()}
    assert card == written['README.md'].decode().replace("name = '.'", "name = 'me/sheep'")
    assert files == written | {'README.md': card.encode()}
    # From there it is read by name, as its card says.
    code = re.search(r'```python\n(.*?)```', card, re.DOTALL)[1]
    environment = hub.environment(tmp_path / 'cache', OMP_NUM_THREADS='1')
    environment.pop('USE_TORCH')
    line = [sys.executable, '-c', code]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith('Once'), done.stderr


def test_a_file_is_uploaded_with_a_card_for_it(run, sheep, hub, tmp_path):
    train_sheep(run)
    push(hub, tmp_path, '--init_from=resume', '--to=sheep.gguf', HF_TOKEN='hf_token')
    _, files = hub.branches('models', 'me/sheep')['main']
    assert files['sheep.gguf'] == (tmp_path / 'sheep.gguf').read_bytes()
    card = ModelCard(files['README.md'].decode())
    assert card.data.library_name == 'gguf'
    assert 'llama-completion -m sheep.gguf -no-cnv -n 8 -p "Once"' in card.text, 'half a context'
    assert 'AutoModel' not in card.text and 'FOLDER' not in card.text and '## Data' in card.text


def test_a_card_that_is_no_text_is_copied_as_it_is(run, tmp_path):
    make_folder(tmp_path / 'here')
    (tmp_path / 'here' / 'README.md').write_bytes(b'caf\xe9')
    export(run, '--format=folder', '--dtype=float32', '--to=a')
    assert (tmp_path / 'a' / 'README.md').read_bytes() == b'caf\xe9'


def test_a_card_of_ones_own_stays(hub, tmp_path):
    make_folder(tmp_path / 'here')
    edited = b'# My model\r\n'
    (tmp_path / 'here' / 'README.md').write_bytes(edited)
    push(hub, tmp_path, '--format=folder', '--dtype=float32', '--to=a', HF_TOKEN='hf_token')
    assert (tmp_path / 'a' / 'README.md').read_bytes() == edited
    (tmp_path / 'here' / 'README.md').write_text('# Another\n')
    result = push(hub, tmp_path, '--to=b.gguf', HF_TOKEN='hf_token')
    assert 'README.md, which stays as it is' in result.stdout
    _, files = hub.branches('models', 'me/sheep')['main']
    assert files['README.md'] == edited and 'b.gguf' in files and 'config.json' in files


def test_who_may_not_write_is_told_before_the_work(hub, tmp_path):
    make_folder(tmp_path / 'here')
    result = push(hub, tmp_path, '--to=a.gguf', code=1)
    assert result.stderr.count('\n') == 1 and 'hf auth login' in result.stderr
    assert not (tmp_path / 'a.gguf').exists()


def test_who_may_not_write_there_has_the_file(hub, tmp_path):
    make_folder(tmp_path / 'here')
    hub.gated.add('me/sheep')
    result = push(hub, tmp_path, '--to=a.gguf', code=1, HF_TOKEN='hf_token')
    assert result.stderr.count('\n') == 1 and 'hf auth login' in result.stderr
    assert (tmp_path / 'a.gguf').exists()


def test_an_upload_that_fails_leaves_the_file_and_says_how(hub, tmp_path):
    make_folder(tmp_path / 'here')
    hub.full.add('me/sheep')
    result = push(hub, tmp_path, '--to=a.gguf', code=1, HF_TOKEN='hf_token')
    assert result.stderr.startswith('Uploading to me/sheep failed: ')
    assert 'No room' in result.stderr and result.stderr.count('\n') == 1
    assert result.stderr.endswith('. To try again: hf upload me/sheep a.gguf\n')
    assert (tmp_path / 'a.gguf').exists()


def test_a_name_that_is_none_is_refused(run, tmp_path):
    make_folder(tmp_path / 'here')
    result = export(run, '--push=sheep', code=1)
    assert result.is_one_sentence and 'ORG/NAME' in result.err

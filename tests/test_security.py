"""What a stranger's file can do: nothing is executed, nothing outside the folders is written.

SECURITY.md says what is promised. Pickles are in test_durability.py, test_model.py and
test_house.py, templates and damaged tokenizers in test_published.py.
"""

import json
import os
import shutil
import struct

import pytest
from conftest import TINY, command, train

STEP = 'step_00000002'
PRECIOUS = 'something precious\n'


@pytest.fixture
def run_folder(run, sheep, tmp_path):
    """A run, out/, with one checkpoint."""
    train(run, '--max_iters=2', '--arch=qwen3')
    return tmp_path / 'out'


@pytest.fixture
def published(run_folder, tmp_path):
    """A model as the Hub has them: no state of a training, no checksums."""
    folder = tmp_path / 'stranger'
    shutil.copytree(run_folder / STEP, folder)
    (folder / 'meta.json').unlink()
    (folder / 'train_state.pt').unlink()
    return folder


def sample(run, folder):
    return run('sample.py', f'--init_from={folder}', '--max_new_tokens=3', '--start=a')


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -----------------------------------------------------------------------------
# nothing is executed


def test_code_beside_a_model_is_not_executed(run, published, tmp_path):
    code = "open('exploded', 'w')\n"
    for name in ('model.py', 'modeling_evil.py', 'configuration_evil.py', 'sitecustomize.py'):
        (published / name).write_text(code)
    auto_map = {'AutoConfig': 'configuration_evil.C', 'AutoModelForCausalLM': 'modeling_evil.M'}
    change(published / 'config.json', auto_map=auto_map, trust_remote_code=True)
    (published / 'README.md').write_text('---\nx: !!python/object/apply:os.mkdir [exploded]\n---\n')
    assert sample(run, published).code == 0
    train(run, f'--init_from={published}', '--max_iters=1', out='tuned')
    assert not (tmp_path / 'exploded').exists()


def test_the_config_of_a_run_is_executed_only_if_it_is_named(run, run_folder, tmp_path):
    (run_folder / 'config.py').write_text("open('exploded', 'w')\n")
    assert run('sample.py', '--max_new_tokens=3').code == 0
    assert run('plot.py').code == 0
    train(run, '--max_iters=4', '--arch=qwen3', '--init_from=resume')  # which writes another
    assert not (tmp_path / 'exploded').exists()


# -----------------------------------------------------------------------------
# nothing outside the folders is written, or deleted


FILES = ['config.py', 'log.jsonl', 'loss.png', '.lock', 'config.py.tmp', 'log.jsonl.tmp']
FILES += ['loss.png.tmp']


def test_a_link_to_a_file_elsewhere_loses_nothing(run_folder, tmp_path):
    theirs = tmp_path / 'theirs'
    shutil.copytree(run_folder, theirs)  # which this process has not locked
    for name in FILES:
        (theirs / name).unlink(missing_ok=True)
        (tmp_path / f'precious {name}').write_text(PRECIOUS)
        (theirs / name).symlink_to(tmp_path / f'precious {name}')
    flags = ['--dataset=sheep', *TINY, '--arch=qwen3', '--max_iters=4', '--init_from=resume']
    # Not `run`, in which nothing is drawn.
    result = command('train.py', *flags, '--out_dir=theirs', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (theirs / 'loss.png').stat().st_size > 10_000
    lost = [path for path in tmp_path.glob('precious *') if path.read_text() != PRECIOUS]
    assert not lost
    assert len(list(tmp_path.glob('precious *'))) == len(FILES)


def test_a_lock_that_leads_elsewhere_makes_no_file_there(run, run_folder, tmp_path):
    (run_folder / '.lock').unlink()
    (run_folder / '.lock').symlink_to(tmp_path / 'new')
    train(run, '--max_iters=4', '--arch=qwen3', '--init_from=resume')
    assert not (tmp_path / 'new').exists()


def test_a_card_that_leads_elsewhere_is_not_exported(run, published, tmp_path):
    (tmp_path / 'secret').write_text(PRECIOUS)
    (published / 'README.md').unlink()
    (published / 'README.md').symlink_to(tmp_path / 'secret')
    flags = ['--format=folder', '--to=exported']
    assert run('export.py', f'--init_from={published}', *flags).code == 0
    found = [path.read_bytes() for path in (tmp_path / 'exported').iterdir()]
    assert not any(PRECIOUS.encode() in each for each in found)


LINKS = ['step_00000000', 'step_00000001', 'step_00000003', 'step_00000004', 'weights_00000001']
LINKS += ['.step_00000001.tmp', '.step_00000004.tmp', '.step_00000001.old', '.step_00000002.old']
LINKS += ['damaged_step_00000004']


@pytest.mark.parametrize('name', LINKS)
def test_a_link_to_a_folder_elsewhere_loses_nothing(run, run_folder, tmp_path, name):
    home = tmp_path / 'home'
    home.mkdir()
    (home / 'precious').write_text(PRECIOUS)
    (run_folder / name).symlink_to(home)
    flags = ['--max_iters=6', '--eval_interval=2', '--keep_last=1']
    flags += ['--dataset=sheep', *TINY, '--arch=qwen3', '--dtype=float32', '--init_from=resume']
    result = run('train.py', *flags)
    assert result.code == 0, result.err
    assert (run_folder / 'step_00000006' / 'meta.json').exists()
    assert [path.name for path in home.iterdir()] == ['precious']


def test_weights_are_read_from_their_folder_alone(run, published, tmp_path):
    (published / 'model.safetensors').rename(tmp_path / 'elsewhere.safetensors')
    for where in ('../elsewhere.safetensors', str(tmp_path / 'elsewhere.safetensors'), ['x'], 1):
        index = {'weight_map': {'model.embed_tokens.weight': where}}
        (published / 'model.safetensors.index.json').write_text(json.dumps(index))
        result = sample(run, published)
        assert result.is_one_sentence, result.err
        assert 'missing, which the index names' in result.err


@pytest.mark.parametrize('name', ['../evil', '/tmp/evil', '..', 'a/b', '.hidden'])
def test_a_dataset_is_made_in_data_alone(run, sheep, name):
    result = run('prepare.py', '--input=sheep.txt', f'--name={name}')
    assert result.is_one_sentence, result.err
    assert 'must be a plain name' in result.err


def test_a_checkpoint_that_names_files_elsewhere_is_damaged(run, run_folder):
    meta = json.loads((run_folder / STEP / 'meta.json').read_text())
    for name in ('/etc/passwd', '../log.jsonl'):
        meta['files'][name] = [1, 'x']
        (run_folder / STEP / 'meta.json').write_text(json.dumps(meta))
        result = run('sample.py', '--max_new_tokens=3')
        assert result.code == 1
        assert 'its meta.json is not what was written' in result.err


# -----------------------------------------------------------------------------
# figures that lie are refused before they cost memory or time


@pytest.mark.parametrize('length', [2**63, 2**40, 10**8, 5])
def test_a_safetensors_header_that_lies_is_refused(run, published, length):
    path = published / 'model.safetensors'
    path.write_bytes(struct.pack('<Q', length) + path.read_bytes()[8:])
    result = sample(run, published)
    assert result.is_one_sentence, result.err
    assert 'model.safetensors is damaged or incomplete' in result.err


@pytest.mark.parametrize(
    ('shape', 'end'), [([2**40, 2**40], 0), ([300, 32], 2**60), ([-1, 32], 4), ([1e9], 4)]
)
def test_a_tensor_that_is_not_in_its_file_is_refused(run, published, shape, end):
    tensor = {'dtype': 'F32', 'shape': shape, 'data_offsets': [0, end]}
    header = json.dumps({'model.embed_tokens.weight': tensor}).encode()
    (published / 'model.safetensors').write_bytes(struct.pack('<Q', len(header)) + header)
    result = sample(run, published)
    assert result.is_one_sentence, result.err
    assert 'model.safetensors is damaged or incomplete' in result.err


SIZES = ['num_hidden_layers', 'hidden_size', 'vocab_size', 'max_position_embeddings']
SIZES += ['num_attention_heads', 'num_key_value_heads', 'head_dim', 'intermediate_size']


@pytest.mark.parametrize('name', SIZES)
def test_a_model_that_no_machine_holds_is_refused(run, published, name):
    change(published / 'config.json', **{name: 10**9})
    result = sample(run, published)
    assert result.is_one_sentence, result.err
    assert 'must be' in result.err


def test_a_model_of_too_many_layers_is_refused(run, published):
    change(published / 'config.json', num_hidden_layers=100_000)  # each takes a while to be made
    result = sample(run, published)
    assert result.is_one_sentence, result.err
    assert 'n_layer=100000 must be from 1 to 2,000' in result.err


NESTED = '[' * 200_000


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json', 'generation_config.json'])
def test_json_nested_too_deeply_is_refused(run, published, name):
    (published / name).write_text(NESTED)
    result = sample(run, published)
    assert result.is_one_sentence, result.err


def test_a_log_nested_too_deeply_is_no_log(run, run_folder):
    log = run_folder / 'log.jsonl'
    log.write_text(log.read_text() + NESTED + '\n')
    train(run, '--max_iters=4', '--arch=qwen3', '--init_from=resume')
    assert NESTED not in log.read_text()


@pytest.mark.parametrize(
    ('expression', 'status'),
    [('(a+)+$', 1), ('(a|aa)+$', 1), ('(.*)*!$', 0), ('(?:(?:a+)+)+c', 0)],
)
def test_an_expression_that_goes_back_for_ever_ends(published, tmp_path, expression, status):
    """The library's own limit ends it: a sentence behind the library's message, or a dataset."""
    split = {'type': 'Split', 'pattern': {'Regex': expression}, 'behavior': 'Isolated'}
    steps = [
        split | {'invert': False},
        {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False},
    ]
    pre_tokenizer = {'type': 'Sequence', 'pretokenizers': steps}
    change(published / 'tokenizer.json', pre_tokenizer=pre_tokenizer)
    (tmp_path / 'a.txt').write_text(('a' * 5000 + 'b\n') * 20)
    flags = ['--input=a.txt', f'--tokenizer={published}', '--name=made']
    result = command('prepare.py', *flags, cwd=tmp_path, env=os.environ | {'RUST_BACKTRACE': '0'})
    assert result.returncode == status
    assert 'Traceback' not in result.stderr
    assert (tmp_path / 'data' / 'made' / 'train.bin').exists() == (result.returncode == 0)

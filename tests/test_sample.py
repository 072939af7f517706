"""sample.py as its users run it: prompts, ways to sample, formats, and whatever may be wrong."""

import io
import json
import shutil
import sys

import pytest
import torch
from conftest import TEXT, TINY, command
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import GPT, GPTConfig, sample_next

RULER = '-' * 80


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
    """A folder for what is made once for all tests of this file."""
    return tmp_path_factory.mktemp('kept') / 'folder'


@pytest.fixture
def trained(run, tmp_path, kept):
    """A run of a char model that knows a to z, space and line end."""
    if kept.exists():
        shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
        return
    (tmp_path / 'fox.txt').write_text('the quick brown fox jumps over the lazy dog\n' * 40)
    assert run('prepare.py', '--input=fox.txt', '--tokenizer=char').code == 0
    flags = ['--max_iters=60', '--learning_rate=1e-2', '--eval_interval=30', '--batch_size=16']
    assert run('train.py', '--dataset=fox', *TINY, *flags).code == 0
    shutil.copytree(tmp_path, kept)


def sample(run, *args):
    result = run('sample.py', *args)
    assert result.code == 0, result.err
    return result.out


def test_samples_continue_the_prompt_and_repeat_with_the_seed(run, trained, tmp_path):
    flags = ['--num_samples=2', '--max_new_tokens=30', '--temperature=2.0']
    out = sample(run, '--start=the quick', *flags)
    texts = [text.strip('\n') for text in out.split(RULER)[:-1]]
    assert len(texts) == 2 and texts[0] != texts[1]
    assert all(text.startswith('the quick') for text in texts)
    assert sample(run, '--start=the quick', *flags) == out
    assert sample(run, '--start=the quick', *flags, '--seed=2') != out
    (tmp_path / 'prompt.txt').write_text('the quick')
    assert sample(run, '--start=FILE:prompt.txt', *flags) == out


def test_greedy_samples_are_all_the_same_and_the_same_as_top_1(run, trained):
    flags = ['--start=the quick', '--num_samples=2', '--max_new_tokens=35']
    out = sample(run, *flags, '--temperature=0')
    first, second, _ = out.split(f'{RULER}\n')
    assert first == second and 'the quick brown fox jumps over' in first
    assert sample(run, *flags, '--top_k=1') == out


@pytest.mark.parametrize('temperature', ['1e-8', '1e-39', '1e-45', '1e-320'])
@pytest.mark.parametrize('more', [[], ['--top_k=None', '--top_p=0.9', '--min_p=0.1']])
def test_a_tiny_temperature_is_greedy(run, trained, temperature, more):
    flags = ['--start=the quick', '--num_samples=1', '--max_new_tokens=35', *more]
    greedy = sample(run, *flags, '--temperature=0')
    assert 'the quick brown fox jumps over' in greedy
    assert sample(run, *flags, f'--temperature={temperature}') == greedy


@pytest.mark.parametrize('scale', [1e-3, 1, 1e6])
@pytest.mark.parametrize('more', [{}, {'top_k': 4}, {'top_p': 0.7}, {'min_p': 0.1}], ids=str)
def test_any_temperature_draws_as_float64_says(scale, more):
    # The most likely first; the first two are neighbours in float32.
    logits = scale * torch.tensor([[1.0, 1 - 2**-24, 0.9, 0.5, -3.0, -1e4]])
    generator = torch.Generator().manual_seed(1)
    for temperature in (1e-320, 1e-45, 1e-39, 1e-30, 1e-8, 6e-8, 1e-3, 0.7, 1e3, 1e30, 1e39, 1e300):
        rows = logits.flip(-1).expand(20_000, -1)
        drawn = 5 - sample_next(rows, None, generator, temperature, **more)[:, 0]
        found = drawn.bincount(minlength=6) / 20_000

        below_the_best = logits[0].double() - logits[0, 0].double()
        expected = (below_the_best / max(temperature, 1e-300)).softmax(0)
        mass_before = expected.cumsum(0) - expected
        expected[more.get('top_k', 6) :] = 0
        expected[mass_before >= more.get('top_p', 2)] = 0
        expected[expected < more.get('min_p', 0) * expected[0]] = 0
        assert (found - expected / expected.sum()).abs().max() < 0.02, temperature


def test_the_best_or_the_last_checkpoint_is_used(run, trained, tmp_path):
    path = tmp_path / 'out' / 'step_00000030' / 'meta.json'
    meta = json.loads(path.read_text())
    meta['val_loss'] = 0.0
    path.write_text(json.dumps(meta))
    flags = ['--start=a', '--max_new_tokens=40', '--num_samples=1', '--temperature=0']
    assert sample(run, *flags) != sample(run, *flags, '--checkpoint=last')


@pytest.mark.parametrize(
    ('arg', 'message'),
    [
        # the prompt
        ('--start=UPPER', "4 characters outside the tokenizer's alphabet: 'E' (U+0045)"),
        ('--start=', 'The prompt is empty'),
        ('--start=FILE:nofile.txt', 'nofile.txt'),
        ('--start=FILE:out', 'The prompt cannot be read'),
        ('--start=FILE:truncated/train_state.pt', 'truncated/train_state.pt is not UTF-8 text.'),
        # numbers
        ('--temperature=-1', 'temperature=-1.0: must be from 0 to 1,000,000.'),
        ('--temperature=1e999', 'temperature=inf: must be from 0 to 1,000,000.'),
        ('--top_k=0', 'top_k=0: must be from 1 to 1,000,000,000.'),
        ('--top_p=1.5', 'top_p=1.5: must be from 1e-09 to 1.'),
        ('--top_p=0', 'top_p=0.0: must be from 1e-09 to 1.'),
        ('--min_p=2', 'min_p=2.0: must be from 0 to 1.'),
        ('--repetition_penalty=0', 'repetition_penalty=0.0: must be from 1e-09 to 1,000,000,000.'),
        ('--num_samples=0', 'num_samples=0: must be from 1 to 1,000,000,000.'),
        ('--seed=99999999999999999999', 'seed=99999999999999999999: must be from 0 to'),
        # choices
        ('--format=xml', "format='xml' must be one of: text, jsonl."),
        ('--dtype=float64', "dtype='float64' must be one of: auto, float32, bfloat16, float16."),
        ('--checkpoint=first', "checkpoint='first' must be one of: best, last."),
        ('--device=tpu', "device='tpu' cannot be used here"),
        ('--device=meta', 'it is none of cuda, xpu, mps, cpu'),
        # the model
        ('--out_dir=nowhere', 'Train one with: python train.py --out_dir=nowhere'),
        ('--init_from=gpt3', 'known by name: gpt2, gpt2-medium, gpt2-large, gpt2-xl, and ORG/NAME'),
        ('--init_from=data', 'data is not a model folder (it has no config.json).'),
        ('--init_from=truncated', 'model.safetensors is damaged or incomplete'),
        # the name of a knob
        ('--num_sample=1', 'Did you mean num_samples?'),
    ],
)
def test_bad_input_is_one_sentence(run, trained, tmp_path, arg, message):
    folder = tmp_path / 'truncated'
    shutil.copytree(tmp_path / 'out' / 'step_00000060', folder)
    weights = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(weights[:-100])
    result = run('sample.py', arg)
    assert result.is_one_sentence and message in result.err


@pytest.mark.parametrize('damage', ['{}', '', '[]', '{"step": 1}'])
def test_a_damaged_checkpoint_is_named(run, trained, tmp_path, damage):
    (tmp_path / 'out' / 'step_00000060' / 'meta.json').write_text(damage)
    result = run('sample.py', '--start=a')
    assert result.code == 0, result.err
    assert 'The checkpoint out/step_00000060 is damaged' in result.err


def test_jsonl_gives_one_object_per_sample(run, trained):
    flags = ['--num_samples=3', '--max_new_tokens=12', '--temperature=2.0']
    out = sample(run, '--start=the', *flags, '--format=jsonl')
    records = [json.loads(line) for line in out.splitlines()]
    assert len({record['text'] for record in records}) == 3
    for record in records:
        assert (record['prompt'], record['tokens'], record['finish']) == ('the', 12, 'length')
        assert len(record['text']) == 12, 'one token per character'


def test_samples_end_before_a_stop_text(run, trained):
    flags = ['--start=the quick', '--temperature=0', '--num_samples=1', '--format=jsonl']
    record = json.loads(sample(run, *flags, '--stop=zebra| jum'))
    assert (record['text'], record['finish']) == (' brown fox', 'stop')


def test_compare_is_readable_at_80_columns(run, trained):
    out = sample(run, '--start=the quick', '--compare', '--max_new_tokens=100')
    assert max(map(len, out.splitlines())) <= 80
    for value in (0, 0.5, 1.0, 1.5):
        assert f'temperature={value}' in out
    for setting in ('top_k=10', 'top_k=100', 'top_p=0.9'):
        assert setting in out
    assert 'the quick brown fox jumps over the' in out


def test_interactive_answers_prompts_and_survives_bad_ones(run, trained, monkeypatch):
    prompts = io.TextIOWrapper(io.BytesIO(b'the quick\nNO\nfox jumps\n'))
    monkeypatch.setattr(sys, 'stdin', prompts)
    flags = ['--interactive', '--temperature=0', '--max_new_tokens=6', '--num_samples=1']
    out = sample(run, *flags)
    assert 'the quick brown' in out and 'fox jumps over' in out
    assert "outside the tokenizer's alphabet" in out
    not_utf8 = io.TextIOWrapper(io.BytesIO(b'\xff\n'), encoding='utf-8')
    monkeypatch.setattr(sys, 'stdin', not_utf8)
    assert "can't decode byte 0xff" in sample(run, *flags)


def test_a_long_prompt_keeps_its_last_part_and_says_so(run, trained):
    flags = ['--temperature=0', '--num_samples=1', '--max_new_tokens=10', '--format=jsonl']
    prompt = 'the lazy dog ' * 9 + 'the quick'
    long = run('sample.py', f'--start={prompt}', *flags)
    assert 'The prompt has 126 tokens: the model sees the last 32 of them.' in long.err
    short = sample(run, f'--start={prompt[-32:]}', *flags)
    assert json.loads(long.out)['text'] == json.loads(short)['text']


def test_a_model_folder_can_be_sampled(run, trained):
    flags = ['--start=the quick', '--temperature=0', '--num_samples=1', '--checkpoint=last']
    assert sample(run, *flags) == sample(run, *flags, '--init_from=out/step_00000060')
    for dtype in ('bfloat16', 'float16'):
        assert sample(run, *flags, f'--dtype={dtype}').startswith('the quick')


def test_a_gpt2_folder_without_tokenizer_gets_gpt2s(run, tmp_path):
    folder = tmp_path / 'gpt2'
    folder.mkdir()
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=32)).save_pretrained(folder)
    flags = [f'--init_from={folder}', '--start=Hi', '--num_samples=1', '--format=jsonl']
    assert json.loads(sample(run, *flags))['tokens'] == 300


def test_what_an_encoding_lacks_is_printed_as_an_escape(run, tmp_path, monkeypatch):
    folder = tmp_path / 'gpt2'
    folder.mkdir()
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=32)).save_pretrained(folder)
    monkeypatch.setenv('PYTHONIOENCODING', 'latin-1')
    flags = [f'--init_from={folder}', '--start=日', '--num_samples=1', '--max_new_tokens=1']
    result = command('sample.py', *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('\\u65e5')


def test_a_checkpoint_opens_in_transformers_with_its_tokenizer(run, trained):
    folder = 'out/step_00000060'
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer('the quick', return_tensors='pt').input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0])
    flags = ['--temperature=0', '--checkpoint=last', '--max_new_tokens=20', '--num_samples=1']
    ours = sample(run, '--start=the quick', '--dtype=float32', *flags)
    assert ours.split('\n---')[0] == text
    embedding = GPT.from_pretrained(folder).wte.weight[:28]
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_without_line_ends_a_sample_begins_as_the_text_does(run, tmp_path):
    """A token that the text lacks was never trained: what follows it is anything."""
    (tmp_path / 'one.txt').write_text(TEXT.replace('\n', ' '))
    assert run('prepare.py', '--input=one.txt', '--tokenizer=char').code == 0
    assert run('train.py', '--dataset=one', *TINY, '--max_iters=1').code == 0
    options = ['--max_new_tokens=3', '--num_samples=1']
    assert run('sample.py', *options).out.startswith('0 sh')
    assert run('sample.py', *options, '--start=f').out.startswith('f')


def test_a_text_with_line_ends_is_sampled_from_one(run, sheep):
    assert run('train.py', '--dataset=sheep', *TINY, '--max_iters=1').code == 0
    options = ['--max_new_tokens=3', '--num_samples=1']
    assert run('sample.py', *options).out.startswith('\n')

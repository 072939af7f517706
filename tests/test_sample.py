import io
import json
import shutil
import sys

import pytest
import torch
from conftest import TINY

import tokenizer as tk
from model import GPT, GPTConfig


@pytest.fixture
def trained(run, tmp_path):
    """A run of a char model that knows a to z, space and line end."""
    (tmp_path / 'fox.txt').write_text('the quick brown fox jumps over the lazy dog\n' * 40)
    assert run('prepare.py', '--input=fox.txt', '--tokenizer=char').code == 0
    flags = ['--max_iters=60', '--learning_rate=1e-2', '--eval_interval=30']
    assert run('train.py', '--dataset=fox', *TINY, *flags).code == 0


def sample(run, *args):
    result = run('sample.py', *args)
    assert result.code == 0, result.err
    return result.out


def test_samples_continue_the_prompt_and_repeat_with_the_seed(run, trained, tmp_path):
    flags = ['--start=the quick', '--num_samples=2', '--max_new_tokens=30', '--temperature=2.0']
    out = sample(run, *flags)
    texts = [text.strip('\n') for text in out.split('-' * 80)[:-1]]
    assert len(texts) == 2 and texts[0] != texts[1]
    assert all(text.startswith('the quick') for text in texts)
    assert sample(run, *flags) == out != sample(run, *flags, '--seed=2')
    (tmp_path / 'prompt.txt').write_text('the quick')
    assert sample(run, *flags[1:], '--start=FILE:prompt.txt') == out


def test_greedy_samples_are_all_the_same_and_the_same_as_top_1(run, trained):
    flags = ['--start=the quick', '--num_samples=2', '--max_new_tokens=35']
    out = sample(run, *flags, '--temperature=0')
    first, second, _ = out.split('-' * 80 + '\n')
    assert first == second and 'the quick brown fox jumps over' in first
    assert sample(run, *flags, '--top_k=1') == out


def test_the_best_or_the_last_checkpoint_is_used(run, trained, tmp_path):
    meta = tmp_path / 'out' / 'step_00000030' / 'meta.json'
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {'val_loss': 0.0}))
    flags = ['--start=a', '--max_new_tokens=40', '--num_samples=1', '--temperature=0']
    assert sample(run, *flags) != sample(run, *flags, '--which=last')


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--out_dir=nowhere'], 'nowhere has no checkpoint. Train one with: python train.py --out_dir=nowhere'),
        (['--start=UPPER'], "4 characters outside the tokenizer's alphabet: 'E' (U+0045)"),
        (['--start='], 'The prompt is empty'),
        (['--start=FILE:nofile.txt'], 'nofile.txt'),
        (['--temperature=-1'], 'temperature=-1.0: must be from 0 to 1,000,000.'),
        (['--temperature=1e999'], 'temperature=inf: must be from 0 to 1,000,000.'),
        (['--top_k=0'], 'top_k=0: must be from 1 to 1,000,000,000.'),
        (['--top_p=1.5'], 'top_p=1.5: must be from 1e-09 to 1.'),
        (['--top_p=0'], 'top_p=0.0: must be from 1e-09 to 1.'),
        (['--min_p=2'], 'min_p=2.0: must be from 0 to 1.'),
        (['--repetition_penalty=0'], 'repetition_penalty=0.0: must be from 1e-09 to 1,000,000,000.'),
        (['--num_samples=0'], 'num_samples=0: must be from 1 to 1,000,000,000.'),
        (['--format=xml'], "format='xml' must be 'text' or 'jsonl'"),
        (['--dtype=float64'], "dtype='float64' must be"),
        (['--init_from=gpt3'], 'no folder gpt3. Models known by name: gpt2, gpt2-medium, gpt2-large, gpt2-xl.'),
        (['--init_from=data'], 'data is no model: it has no config.json.'),
        (['--init_from=truncated'], 'model.safetensors is damaged or incomplete'),
        (['--which=first'], "which='first' must be 'best' or 'last'"),
        (['--device=tpu'], "device='tpu' cannot be used here"),
        (['--device=meta'], 'it is none of cuda, mps and cpu'),
        (['--start=FILE:truncated/train_state.pt'], 'truncated/train_state.pt is not UTF-8 text.'),
        (['--seed=99999999999999999999'], 'seed=99999999999999999999: must be from 0 to'),
        (['--num_sample=1'], 'Did you mean num_samples?'),
    ],
)
def test_bad_input_is_one_sentence(run, trained, tmp_path, args, message):
    shutil.copytree(tmp_path / 'out' / 'step_00000060', tmp_path / 'truncated')
    weights = (tmp_path / 'truncated' / 'model.safetensors').read_bytes()
    (tmp_path / 'truncated' / 'model.safetensors').write_bytes(weights[:-100])
    result = run('sample.py', *args)
    assert result.code == 1 and message in result.err and result.err.count('\n') == 1


@pytest.mark.parametrize('damage', ['{}', '', '[]', '{"step": 1}'])
def test_a_damaged_checkpoint_is_named(run, trained, tmp_path, damage):
    (tmp_path / 'out' / 'step_00000060' / 'meta.json').write_text(damage)
    result = run('sample.py', '--start=a')
    assert 'The checkpoint out/step_00000060 is damaged' in result.err and result.code == 0, result.err


def test_jsonl_gives_one_object_a_sample(run, trained):
    out = sample(run, '--start=the', '--num_samples=3', '--max_new_tokens=12', '--format=jsonl', '--temperature=2.0')
    records = [json.loads(line) for line in out.splitlines()]
    assert len({record['text'] for record in records}) == 3
    for record in records:
        assert (record['prompt'], record['tokens'], record['finish']) == ('the', 12, 'length')
        assert len(record['text']) == 12  # one token a character


def test_samples_end_before_a_stop_text(run, trained):
    flags = ['--start=the quick', '--temperature=0', '--num_samples=1', '--format=jsonl']
    record = json.loads(sample(run, *flags, '--stop=zebra| jum'))
    assert (record['text'], record['finish']) == (' brown fox', 'stop')


def test_compare_is_readable_at_80_columns(run, trained):
    out = sample(run, '--start=the quick', '--compare', '--max_new_tokens=100')
    assert max(map(len, out.splitlines())) <= 80
    for name in ('temperature=0', *(f'temperature={t}' for t in (0.5, 1.0, 1.5)), 'top_k=10', 'top_k=100', 'top_p=0.9'):
        assert name in out
    assert 'the quick brown fox jumps over the' in out


def test_interactive_answers_each_prompt_and_survives_a_bad_one(run, trained, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.StringIO('the quick\nNO\nfox jumps\n'))
    out = sample(run, '--interactive', '--temperature=0', '--max_new_tokens=6', '--num_samples=1')
    assert 'the quick brown' in out and "outside the tokenizer's alphabet" in out and 'fox jumps over' in out


def test_a_prompt_longer_than_the_window_uses_its_last_part_and_says_so(run, trained):
    flags = ['--temperature=0', '--num_samples=1', '--max_new_tokens=10', '--format=jsonl']
    long = run('sample.py', '--start=' + 'the lazy dog ' * 9 + 'the quick', *flags)
    assert 'The prompt has 126 tokens: the model sees the last 32 of them.' in long.err
    short = sample(run, '--start=' + ('the lazy dog ' * 9 + 'the quick')[-32:], *flags)
    assert json.loads(long.out)['text'] == json.loads(short)['text']


def test_a_models_folder_can_be_sampled(run, trained):
    flags = ['--start=the quick', '--temperature=0', '--num_samples=1', '--which=last']
    assert sample(run, *flags) == sample(run, *flags, '--init_from=out/step_00000060')
    assert sample(run, *flags, '--dtype=bfloat16').startswith('the quick')


def test_a_gpt2_folder_without_tokenizer_gets_gpt2s(run, tmp_path):
    folder = tmp_path / 'gpt2'
    folder.mkdir()
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=32)).save_pretrained(folder)
    record = json.loads(sample(run, f'--init_from={folder}', '--start=Hi', '--num_samples=1', '--format=jsonl'))
    assert record['tokens'] == 300


def streamed(tokenizer, ids, stops=()):
    import runpy

    from conftest import ROOT

    sample = runpy.run_path(str(ROOT / 'sample.py'))['Sample'](tokenizer, list(stops))
    pieces = [sample.add(int(i)) for i in ids]
    return sample, [*pieces, sample.end('length')]


def test_streaming_never_breaks_a_character():
    tokenizer, text = tk.build('byte'), 'naïve 日本語 👩‍👩‍👧'
    sample, pieces = streamed(tokenizer, tk.encode(tokenizer, text))
    assert ''.join(pieces) == sample.text == text and '\ufffd' not in text
    assert all('\ufffd' not in piece for piece in pieces)
    sample, pieces = streamed(tokenizer, tk.encode(tokenizer, '日')[:2])
    assert pieces == ['', '', '\ufffd'], 'a character cut short by the length is marked, at the end'


def test_streaming_holds_back_what_may_become_a_stop_text():
    tokenizer = tk.build('byte')
    sample, pieces = streamed(tokenizer, tk.encode(tokenizer, 'a\n\rb\n\nc'), stops=['\n\n'])
    assert pieces == ['a', '', '\n\r', 'b', '', '', '', ''] and (sample.text, sample.finish) == ('a\n\rb', 'stop')


def test_a_sample_ends_at_end_of_text_and_does_not_show_it():
    tokenizer = tk.build('byte')
    sample, pieces = streamed(tokenizer, [97, tk.end_of_text_id(tokenizer), 98])
    assert (''.join(pieces), sample.tokens, sample.finish) == ('a', 1, 'end_of_text')


def test_a_checkpoint_opens_in_transformers_with_its_tokenizer(run, trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained('out/step_00000060')
    tokenizer = AutoTokenizer.from_pretrained('out/step_00000060')
    ids = tokenizer('the quick', return_tensors='pt').input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0])
    ours = sample(run, '--start=the quick', '--temperature=0', '--which=last', '--max_new_tokens=20', '--num_samples=1')
    assert ours.split('\n---')[0] == text
    assert torch.equal(model.get_input_embeddings().weight, GPT.from_pretrained('out/step_00000060').wte.weight[:28])

import pytest
from conftest import TINY


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
    import json

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
        (['--temperature=-1'], 'temperature must be 0 or more'),
        (['--top_k=0'], 'top_k, num_samples and max_new_tokens 1 or more'),
        (['--which=first'], "which='first' must be 'best' or 'last'"),
        (['--device=tpu'], "device='tpu' cannot be used here"),
        (['--num_sample=1'], 'Did you mean num_samples?'),
    ],
)
def test_bad_input_is_one_sentence(run, trained, args, message):
    result = run('sample.py', *args)
    assert result.code == 1 and message in result.err and result.err.count('\n') == 1

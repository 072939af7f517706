"""The dial, config/fit.py: a recipe from a text, a machine and minutes."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, losses, records, same, weights

import dial
import plan
import runtime
from model import GPT, GPTConfig
from runtime import UserError

FIT = str(ROOT / 'config' / 'fit.py')
SPEED = 60e9  # FLOP/s of the CPU that the tests suppose
FIXED = 0.02  # seconds of a step, however small
MINUTES = (0.1, 1, 3, 10, 30, 100, 300, 1000)
LARGE = [('H100', 3, 300), ('RTX4060', 8, 30_000)]  # GPUs, and minutes
TOKENS = (1_000, 30_000, 150_000, 1_300_000, 30_000_000, 3_000_000_000)


@pytest.fixture
def quick(monkeypatch):
    """Have the dial suppose the time of a step, not measure it."""

    def time_step(shape, config, at_most=5):
        n_tokens = dial.tokens_per_step(config)
        return FIXED + n_tokens * flops(shape) / SPEED, 0.1

    monkeypatch.setattr(plan, 'time_step', time_step)


def flops(shape):
    """Of a token, about."""
    return 6 * (12 * shape.n_layer * shape.n_embd**2 + shape.vocab_size * shape.n_embd)


@pytest.fixture
def choose(monkeypatch, run, quick):
    """choose(n_tokens, minutes, **knobs): what the dial chooses for a text of so many tokens."""

    def choose(n_tokens, minutes, n_vocab=4096, **knobs):
        text = SimpleNamespace(
            train=range(n_tokens), val=range(min(3_000_000, n_tokens // 10))
        )
        tokenizer = SimpleNamespace(n_vocab=n_vocab)
        data = SimpleNamespace(datasets=[text], tokenizer=tokenizer)
        monkeypatch.setattr(dial, 'open_text', lambda config: data)
        config = {
            'dataset': 'text', 'max_minutes': minutes, 'init_from': 'scratch', 'out_dir': 'out',
            'plan': True, 'plan_gpus': 1, 'plan_gpu': 'CPU', 'plan_mfu': 0.4, 'dtype': 'auto',
            'device': 'cpu', 'freeze': None, 'bias': True, 'n_kv_head': None, 'max_epochs': None,
            'average_frac': None,
        }  # fmt: skip
        return dial.choose(config | knobs)

    return choose


def size(recipe):
    """Parameters in the blocks, about."""
    return recipe['n_layer'] * recipe['n_embd'] ** 2


def test_every_text_and_all_minutes_have_a_recipe(choose):
    for n_tokens in TOKENS:
        for minutes in MINUTES:
            recipe = choose(n_tokens, minutes)
            shape = {name: recipe[name] for name in ('n_layer', 'n_head', 'n_embd', 'block_size')}
            GPTConfig(arch=recipe['arch'], vocab_size=4096, **shape)  # refuses what does not fit
            assert recipe['block_size'] < n_tokens
            assert min(recipe['eval_interval'], recipe['log_interval']) >= 1
            assert 0 < recipe['learning_rate'] <= 0.01
            assert dial.tokens_per_step(recipe) >= 2 ** round(math.log2(recipe['block_size']))


def test_more_minutes_are_for_larger_models(choose):
    for n_tokens in TOKENS:
        sizes = [size(choose(n_tokens, minutes)) for minutes in MINUTES]
        assert sizes == sorted(sizes)
    assert sizes[0] < sizes[3] < sizes[6], 'a large text leaves the minutes as the only limit'
    batches = [dial.tokens_per_step(choose(3 * 10**9, minutes)) for minutes in MINUTES]
    assert batches == sorted(batches)
    assert batches[0] < batches[-1]


def test_a_small_text_has_a_smaller_model(choose):
    sizes = [size(choose(n_tokens, 1000)) for n_tokens in TOKENS]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] < sizes[-1]


def test_epochs_are_few_enough_and_call_for_dropout(choose):
    once = choose(30_000_000, 1)
    often = choose(150_000, 100)
    assert once['dropout'] == 0.0 < often['dropout']
    assert once['average_frac'] is None, 'of one epoch or two it is no better'
    assert 0 < often['average_frac'] < 1
    assert once['max_epochs'] == 8, 'more would overfit without dropout'
    assert often['max_epochs'] == 20


def test_gpus_train_what_the_literature_says(choose):
    """On 8 H100 for 9 minutes: about 20 tokens per parameter, in memory, shared by all."""
    knobs = {'plan_gpu': 'H100', 'plan_gpus': 8}
    recipe = choose(10**11, 9, n_vocab=50257, **knobs)
    names = ('n_layer', 'n_head', 'n_embd', 'block_size')
    shape = GPTConfig(arch='qwen3', vocab_size=50257, **{name: recipe[name] for name in names})
    with dial.torch.device('meta'):
        model = GPT(shape)
    n_parameters = model.count_parameters()
    n_flops = 9 * 60 * 8 * 0.4 * 989e12
    n_tokens = n_flops / model.flops_per_token()
    assert 15 < n_tokens / n_parameters < 60
    assert recipe['gradient_accumulation_steps'] % 8 == 0
    assert recipe['learning_rate'] < 0.005
    config = {'dtype': 'bfloat16', 'freeze': None, **recipe}
    assert plan.dry_run(shape, config, False, 'gpu')['peak'] < 0.8 * 80 * 2**30
    small = choose(10**11, 9, n_vocab=50257, plan_gpu='T4')
    # The optimum grows as the root of the operations (Hoffmann et al.), of which a T4 has 1/122.
    assert size(small) < size(recipe) / math.sqrt(122)


def test_many_epochs_are_for_smaller_models():
    once = dial.tokens_per_parameter(4e6, 4e6)
    assert once == dial.tokens_per_parameter(4e6, 1e6), 'four epochs are about as good as new text'
    assert dial.tokens_per_parameter(4e6, 2e5) > 2 * once
    largest = [n_tokens / dial.tokens_per_parameter(n_tokens, 1e6) for n_tokens in (6e6, 2e7)]
    assert largest[0] == pytest.approx(largest[1]), 'more of the same is for no larger model'
    assert dial.tokens_per_parameter(1e9, 1e10) == pytest.approx(20, rel=0.1)


@pytest.mark.parametrize(
    ('gpu', 'n_gpus', 'minutes'),
    [('RTX4060', 3, 10), *(pytest.param(*row, marks=pytest.mark.slow) for row in LARGE)],
)
def test_what_it_chooses_fits_into_memory(choose, gpu, n_gpus, minutes):
    recipe = choose(10**11, minutes, n_vocab=50257, plan_gpu=gpu, plan_gpus=n_gpus)
    names = ('n_layer', 'n_head', 'n_embd', 'block_size')
    shape = GPTConfig(arch='qwen3', vocab_size=50257, **{name: recipe[name] for name in names})
    config = {'dtype': 'bfloat16', 'freeze': None, **recipe}
    room = plan.room_gib(gpu) * 2**30
    assert plan.dry_run(shape, config, False, 'gpu')['peak'] < room
    assert recipe['gradient_accumulation_steps'] % n_gpus == 0


def test_a_model_too_large_for_this_machine_is_not_timed(choose, monkeypatch):
    monkeypatch.setattr(plan, 'memory_of_this_machine', lambda: 0.5)
    recipe = choose(10**11, 10**6)
    n_parameters = 12 * size(recipe) + 4096 * recipe['n_embd']
    assert 2e6 < n_parameters < 0.5 * 2**30 / 32


def test_it_counts_the_epochs_that_are_asked_for(choose):
    few = choose(150_000, 100, max_epochs=2.0)
    assert few['max_epochs'] == 2.0
    assert size(few) < size(choose(150_000, 100))


def test_it_says_the_epochs_that_the_run_may_take(choose, capsys):
    recipe = choose(30_000_000, 1, max_epochs=12.0)  # a flag, which the run takes, too
    assert recipe['dropout'] == 0.0
    assert recipe['max_epochs'] == 12.0
    assert 'at most 12 epochs' in capsys.readouterr().err


def test_evaluations_take_a_fifth_of_the_time_at_most():
    few = dial.pick_intervals(1000, 10, 0.1)
    assert few['eval_interval'] == 1000, 'validation is ten times the training'
    assert dial.pick_intervals(1000, 0.001, 0.1)['eval_interval'] == 100
    assert dial.pick_intervals(100_000, 0.001, 100)['eval_interval'] == 1000


def test_it_knows_this_machine_by_its_name(monkeypatch):
    config = {'plan_gpu': None, 'max_minutes': 5.0, 'device': 'auto'}
    assert plan.pick_gpu(config | {'max_minutes': None}) == 'H100'
    assert plan.pick_gpu(config | {'plan_gpu': 'T4'}) == 'T4'
    monkeypatch.setattr(runtime, 'known_device', lambda name: name.replace('auto', 'cuda'))
    names = {'NVIDIA GeForce RTX 4090': 'RTX4090', 'NVIDIA A100-SXM4-80GB': 'A100'}
    for name, known in names.items():
        monkeypatch.setattr(dial.torch.cuda, 'get_device_name', lambda device, name=name: name)
        assert plan.pick_gpu(config) == known
        assert plan.pick_gpu(config | {'device': 'cuda:1'}) == known
        assert plan.pick_gpu(config | {'device': 'cpu'}) == 'CPU'
    monkeypatch.setattr(dial.torch.cuda, 'get_device_name', lambda device: 'Another')
    with pytest.raises(UserError, match='this one. is not known: take what is like it, T4, '):
        plan.pick_gpu(config)


def test_a_run_by_the_dial_repeats_and_resumes(run, quick, sheep, tmp_path):
    flags = [FIT, '--dataset=sheep', '--device=cpu']
    result = run('train.py', *flags, '--max_minutes=0.01')
    assert result.code == 0, result.err
    assert 'fit     0.01 minutes on 1 x CPU' in result.err
    assert all(len(line) <= 80 for line in result.err.splitlines())
    out = tmp_path / 'out-sheep'
    last = max(losses(out))
    assert last > 0

    again = run('train.py', str(out / 'config.py'), '--out_dir=again')
    assert again.code == 0, again.err
    assert 'fit ' not in again.err
    assert same(weights(tmp_path / 'again', last), weights(out, last))

    # What is resumed is not chosen again, not even of a run from before there were averages.
    resumed = run('train.py', *flags, '--init_from=resume')
    assert resumed.code == 0, resumed.err
    assert 'it has all its steps' in resumed.out
    assert ' was ' not in resumed.out
    (checkpoint, *_) = out.glob(f'step_*{last}')
    meta = json.loads((checkpoint / 'meta.json').read_text())
    del meta['config']['average_frac']
    (checkpoint / 'meta.json').write_text(json.dumps(meta))
    assert 'it has all' in run('train.py', *flags, '--init_from=resume').out
    # From scratch it is refused, before anything is timed.
    refused = run('train.py', *flags, '--max_minutes=9')
    assert refused.is_one_sentence
    assert 'out-sheep holds a run' in refused.err


def test_a_damaged_checkpoint_is_skipped(run, quick, sheep, tmp_path):
    flags = [FIT, '--dataset=sheep', '--device=cpu', '--max_minutes=0.03', '--init_from=auto']
    assert run('train.py', *flags, '--keep_last=5').code == 0
    *_, before, last = sorted((tmp_path / 'out-sheep').glob('step_*'))
    (last / 'meta.json').write_text('{')
    result = run('train.py', *flags)
    assert result.code == 0, result.err
    assert f'{before.name}, step' in result.out
    assert 'fit ' not in result.err


def test_tokens_of_nanogpt_are_taken_but_for_a_plan(run, quick, tmp_path):
    folder = tmp_path / 'data' / 'gpt2'
    folder.mkdir(parents=True)
    for name in ('train.bin', 'val.bin'):
        np.arange(2000, dtype=np.uint16).tofile(folder / name)
    flags = [FIT, '--dataset=gpt2', '--device=cpu', '--max_minutes=0.001', '--format=json']
    planned = run('train.py', *flags, '--plan')
    assert planned.is_one_sentence
    assert 'data/gpt2 is not prepared, which a plan does not do: omit --plan.' in planned.err
    assert not (folder / 'meta.json').exists()
    result = run('train.py', *flags)
    assert result.code == 0, result.err
    assert json.loads(result.out)['steps'] > 0
    assert 'has no meta.json' in result.err


def test_flags_override_what_it_chooses(run, quick, sheep, tmp_path):
    flags = ['--dataset=sheep', '--max_minutes=0.01', '--out_dir=mine', '--n_embd=32', '--n_head=2']
    result = run('train.py', FIT, *flags, '--format=json')
    assert result.code == 0, result.err
    assert 'n_embd 32:' in result.err
    final = json.loads(result.out)
    assert final['steps'] == max(losses(tmp_path / 'mine'))
    assert records(tmp_path / 'mine')[0]['step'] == 0


def test_a_plan_shows_what_it_chooses(run, quick, sheep):
    flags = ['--dataset=sheep', '--max_minutes=2', '--plan']
    result = run('train.py', FIT, *flags)
    assert result.code == 0, result.err
    assert 'CPU has' in result.out
    (epochs,) = re.findall(r'([\d.]+) epochs of it', result.out)
    assert 0 < float(epochs) <= dial.MOST_EPOCHS
    for gpus in ('--plan_gpus=2', '--plan_gpus=4'):
        result = run('train.py', FIT, *flags, '--plan_gpu=A100', gpus)
        assert result.code == 0, result.err
        assert f'on {gpus[-1]} x A100' in result.out


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        ([], 'how long you can wait: --max_minutes=10'),
        (['--max_minutes=1', '--init_from=gpt2'], 'take config/finetune.py'),
        (['--max_minutes=1', '--dataset=goats'], 'data/goats has no train.bin'),
        (['--max_minutes=1', '--plan', '--plan_gpu=Z80'], 'is not known: take what is like it, T4'),
        (['--max_minutes=1', '--plan', '--plan_gpus=2'], 'one process'),
        (['--max_minutes=0'], 'max_minutes=0.0: must be from'),
        (['--max_minutes=1', '--max_epochs=-1'], 'max_epochs=-1.0: must be from'),
        (['--max_minutes=1', '--plan_gpus=0', '--plan'], 'plan_gpus=0: must be from 1 '),
        (['--max_minutes=1', '--init_from=resume'], 'out-sheep has no checkpoint'),
        (['--max_minutes=1', '--average_frac=2'], 'average_frac=2.0: must be from'),
        (['--max_minutes=1', '--lerning_rate=1'], 'Did you mean learning_rate?'),
        (['--max_minutes=1', '--device=banana'], "device='banana' cannot be used here"),
        (['--max_minutes=1', '--device=xpu'], "device='xpu' cannot be used here"),
    ],
)
def test_what_it_refuses(run, quick, sheep, flags, said):
    result = run('train.py', FIT, '--dataset=sheep', *flags)
    assert result.is_one_sentence, result.err
    assert said in result.err


def test_several_processes_on_a_cpu_are_refused(run, sheep, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')  # as under torchrun
    result = run('train.py', FIT, '--dataset=sheep', '--max_minutes=1')
    assert result.is_one_sentence, result.err
    assert 'one process' in result.err


def test_a_text_of_a_few_words_is_refused(run, tmp_path):
    (tmp_path / 'few.txt').write_text('A few words, from which nobody learns a language.')
    assert run('prepare.py', '--input=few.txt', '--tokenizer=byte').code == 0
    result = run('train.py', str(ROOT / 'config' / 'fit.py'), '--dataset=few', '--max_minutes=1')
    assert result.is_one_sentence, result.err
    assert 'few has 44 tokens: 500 are needed.' in result.err

"""Several datasets in one run: whose window comes when, what is measured, what is refused."""

import itertools
import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import TEXT, TINY, in_ranks, losses, records, same, train, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parallel import FLAGS, assert_same_run

from data import Dataset, Mixture, count_windows, parse_mixture, read_windows, training_starts

GOATS = ''.join(f'{n} goats ate the {n % 11} roses of {n % 5} gardens.\n' for n in range(100))


@pytest.fixture
def herd(run, sheep, tmp_path):
    """Three prepared datasets of one vocabulary: data/sheep, data/goats, data/cows."""
    texts = {'goats': GOATS, 'cows': TEXT[::-1][:3000]}
    for name, text in texts.items():
        (tmp_path / f'{name}.txt').write_text(text)
        assert run('prepare.py', f'--input={name}.txt', '--tokenizer=byte').code == 0
    return tmp_path / 'data'


def mix(herd, text, **options):
    return Mixture(text, block_size=32, seed=1, root=herd, **options)


# -----------------------------------------------------------------------------
# whose window comes when


@pytest.mark.parametrize('text', ['sheep:0.7,goats:0.3', 'goats:70,sheep:30.0', 'sheep:1,goats:99'])
def test_two_datasets_have_their_shares_to_within_one_window(herd, text):
    mixture = mix(herd, text)
    n = 10_000 * 4  # 10,000 steps
    numbers = mixture.training_windows(0, n)[:, 0]
    for number, share in enumerate(mixture.shares):
        counts = (numbers == number).cumsum().tolist()
        for p, count in enumerate(counts, 1):
            assert abs(count - share * p) < 1


@settings(deadline=None, max_examples=50)
@given(weights=st.lists(st.integers(1, 1000), min_size=2, max_size=6))
def test_many_datasets_have_their_shares_to_within_few_windows(herd_of_names, weights):
    mixture = herd_of_names(weights)
    numbers = mixture.training_windows(0, 3000)[:, 0]
    assert sum(mixture.shares) == 1
    for number, share in enumerate(mixture.shares):
        counts = (numbers == number).cumsum()
        errors = counts - float(share) * np.arange(1, 3001)
        assert errors.min() > -1 - 1e-9
        most = sum(1 / i for i in range(1, number + 1)) if number else 1e-9
        assert errors.max() < most + 1e-9


@pytest.fixture(scope='module')
def herd_of_names():
    """herd_of_names(weights) -> a Mixture of so many datasets without files."""

    def make(weights):
        names = [f'n{i}:{weight}' for i, weight in enumerate(weights)]
        mixture = Mixture.__new__(Mixture)
        mixture.seed = 1
        mixture.names, mixture.shares = parse_mixture(','.join(names))
        mixture.n_windows = [100] * len(names)
        mixture.stride = 1
        return mixture

    return make


def test_equal_weights_take_turns_and_their_order_is_no_matter(herd):
    mixture = mix(herd, 'sheep:1,goats:1,cows:1')
    windows = mixture.training_windows(0, 3000)
    assert mixture.shares == [Fraction(1, 3)] * 3
    for start in range(0, 3000, 3):
        assert sorted(windows[start : start + 3, 0]) == [0, 1, 2]
    other = mix(herd, 'goats:2,cows:2.0,sheep:2')
    assert other.names == mixture.names
    assert np.array_equal(other.training_windows(0, 3000), windows)
    assert other.fingerprint() == mixture.fingerprint()


def test_shares_are_exact_after_any_number_of_windows(herd):
    mixture = mix(herd, 'sheep:0.9,goats:0.1')
    first = 10**17  # float64 does not know it from 10**17 + 1
    numbers = mixture.training_windows(first, 1000)[:, 0]
    assert numbers.tolist() == mixture.training_windows(0, 1000)[:, 0].tolist()
    third = mix(herd, 'sheep:2,goats:1')
    first = 3 * 10**16
    assert np.array_equal(
        third.training_windows(first, 99)[:, 0], third.training_windows(0, 99)[:, 0]
    )


def test_each_dataset_keeps_its_own_order(herd):
    text = 'sheep:0.5,goats:0.3,cows:0.2'
    mixture = mix(herd, text)
    windows = mixture.training_windows(0, 4000)
    for number, name in enumerate(mixture.names):
        data = Dataset(name, root=herd)
        n = count_windows(data.train, 32)
        starts = windows[windows[:, 0] == number, 1]
        assert len(starts) > 3 * n
        assert starts.tolist() == training_starts(0, len(starts), n, 32, seed=1).tolist()
        for epoch in range(3):
            once = -(-starts[epoch * n : (epoch + 1) * n] // 32)
            assert sorted(once) == list(range(n)), 'each window once before any comes twice'

        rows = windows[windows[:, 0] == number][:50]
        alone = read_windows(data.train, 32, starts[:50])
        for a, b in zip(mixture.get_batch(rows), alone, strict=True):
            assert torch.equal(a, b)
    x, y = mixture.get_batch(windows[:300])
    assert mixture.count_targets(windows[:300]) == (y != -1).sum()
    for row, (number, start) in enumerate(windows[:300]):
        alone = read_windows(mixture.datasets[number].train, 32, [start])
        assert torch.equal(torch.stack((x[row], y[row])), torch.cat(alone))


@pytest.mark.parametrize('text', ['sheep:0.7,goats:0.3', 'sheep:1,goats:1,cows:1'])
def test_the_order_does_not_depend_on_steps_and_processes(herd, text):
    """A step of 8 windows, in one process or in four of two micro-batches each, and a resume."""
    whole = mix(herd, text).training_windows(0, 80 * 8)
    for processes in (1, 4):
        seen = np.full((80, 4, 2, 2), -1)
        for rank in range(processes):
            mixture = mix(herd, text)
            for step in itertools.chain(range(37, 80), range(37)):  # as if it had resumed
                windows = mixture.training_windows(step * 8, 8).reshape(4, 2, 2)
                seen[step, rank::processes] = windows[rank::processes]
        assert np.array_equal(seen.reshape(-1, 2), whole)


# -----------------------------------------------------------------------------
# runs

STEPS = ['--max_iters=30', '--log_interval=1', '--eval_interval=10']
MIXED = [*STEPS, '--dataset=sheep:0.7,goats:0.3', '--stride=20']


def test_a_mixture_of_one_is_the_dataset_itself(run, herd, tmp_path):
    plain = train(run, *STEPS)
    mixed = train(run, *STEPS, '--dataset=sheep:1.0', out='mixed')
    for key, count in {'loss': 30, 'grad_norm': 30, 'val_loss': 4, 'bits_per_byte': 4}.items():
        curve = losses(tmp_path / 'mixed', key)
        assert curve == losses(tmp_path / 'out', key)
        assert len(curve) == count
    assert same(weights(tmp_path / 'mixed', 30), weights(tmp_path / 'out', 30))
    assert plain.out.splitlines()[:4] == mixed.out.splitlines()[:4]
    evaluation = records(tmp_path / 'mixed')[-1]
    assert not [key for key in evaluation if key.startswith('val_loss/')]
    train(run, '--max_iters=31', '--dataset=sheep:3', '--init_from=resume')
    result = run('evaluate.py', '--out_dir=mixed', '--device=cpu')
    assert result.code == 0, result.err


def test_a_mixture_trains_on_all_and_resumes_to_the_same_weights(run, herd, tmp_path):
    whole = train(run, *MIXED, out='whole')
    assert whole.out.splitlines()[1:3] == [
        'data    data/sheep: train 9,801 tokens, val 1,089; byte 257',
        '        data/goats: train 3,509 tokens, val 390; byte 257',
    ]
    windows = [1 + math.ceil((n - 1 - 32) / 20) for n in (9801, 3509)]  # per epoch
    epochs = [30 * 4 * 0.7 / windows[0], 30 * 4 * 0.3 / windows[1]]
    assert f': 3,840\n        {epochs[0]:.2f} and {epochs[1]:.2f} epochs of it\n' in whole.out
    train(run, *MIXED, '--max_iters=13', '--lr_decay_iters=30')
    train(run, *MIXED, '--lr_decay_iters=30', '--init_from=resume')
    out = tmp_path / 'out'
    assert same(weights(out, 30), weights(tmp_path / 'whole', 30))
    assert losses(out, 'loss') == losses(tmp_path / 'whole', 'loss')
    assert "dataset = 'sheep:0.7,goats:0.3'" in (out / 'config.py').read_text()
    assert run('train.py', 'out/config.py', '--max_iters=31', '--init_from=resume').code == 0
    for name in ('sheep', 'goats'):
        curve = losses(out, f'val_loss/{name}')
        assert curve[30] < curve[0] - 0.1


def test_a_steps_loss_is_the_mean_over_all_its_targets(run, herd, tmp_path):
    """Computed anew from the texts, window by window."""
    flags = ['--dataset=cows:1,goats:1', '--learning_rate=0', '--weight_decay=0']
    flags += ['--batch_size=3', '--gradient_accumulation_steps=2', '--seed=1', '--stride=20']
    result = train(run, *STEPS, *flags)
    model = result.globals['model'].eval()
    mixture = mix(herd, 'cows:1,goats:1', stride=20)
    for step, loss in losses(tmp_path / 'out', 'loss').items():
        nats = 0.0
        n_targets = 0
        for number, start in mixture.training_windows((step - 1) * 6, 6):
            x, y = read_windows(mixture.datasets[number].train, 32, [start])
            n = int((y != -1).sum())
            nats += model(x, y).item() * n
            n_targets += n
        assert loss == pytest.approx(nats / n_targets, rel=1e-5)


def test_validation_is_over_all_tokens_and_per_dataset(run, herd, tmp_path):
    path = herd / 'goats' / 'meta.json'
    meta = json.loads(path.read_text())
    meta['val']['bytes'] = 3 * 390
    path.write_text(json.dumps(meta))
    bytes_per_token = (1089 + 3 * 390) / (1089 + 390)
    result = train(run, *MIXED)
    n_targets = {'sheep': 1089 - 1, 'goats': 390 - 1}
    for record in [record for record in records(tmp_path / 'out') if 'val_loss' in record]:
        nats = sum(record[f'val_loss/{name}'] * n for name, n in n_targets.items())
        assert record['val_loss'] == pytest.approx(nats / (1088 + 389), rel=1e-12)
        bits_per_byte = record['val_loss'] / math.log(2) / bytes_per_token
        assert record['bits_per_byte'] == pytest.approx(bits_per_byte, rel=2e-3)
        assert record['perplexity'] == pytest.approx(math.exp(record['val_loss']))
    assert losses(tmp_path / 'out')[0] != losses(tmp_path / 'out', 'val_loss/sheep')[0]
    for name in n_targets:
        flags = [f'--dataset={name}', '--format=json', '--device=cpu', '--dtype=float32']
        evaluated = run('evaluate.py', *flags, '--block_size=32')
        assert evaluated.code == 0, evaluated.err
        loss = json.loads(evaluated.out)['text']['loss']
        assert loss == pytest.approx(losses(tmp_path / 'out', f'val_loss/{name}')[30], rel=1e-6)
        assert result.out.count(f'  validation of {name}\n') == 4
    assert all(len(line) <= 80 for line in result.out.splitlines())
    best = json.loads((tmp_path / 'out' / 'step_00000030' / 'meta.json').read_text())
    assert best['val_loss'] == losses(tmp_path / 'out')[30]
    best_loss = min(losses(tmp_path / 'out').values())
    assert f'Best validation loss {best_loss:.4f}' in result.out


def test_tokens_may_have_different_widths(run, herd, tmp_path):
    train(run, *MIXED, out='narrow')
    path = herd / 'goats' / 'meta.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'dtype': 'uint32'}))
    for split in ('train', 'val'):
        file = herd / 'goats' / f'{split}.bin'
        np.fromfile(file, np.uint16).astype(np.uint32).tofile(file)
    train(run, *MIXED)
    assert losses(tmp_path / 'out', 'loss') == losses(tmp_path / 'narrow', 'loss')
    assert losses(tmp_path / 'out') == losses(tmp_path / 'narrow')


@pytest.mark.slow
def test_a_mixture_is_the_same_in_two_processes(run, herd, tmp_path):
    flags = [*FLAGS, '--dataset=sheep:0.5,goats:0.3,cows:0.2', '--max_iters=20']
    flags += ['--log_interval=1', '--eval_interval=10']
    result = run('train.py', *flags, '--out_dir=alone')
    assert result.code == 0, result.err
    parallel = in_ranks(2, 'train.py', *flags, cwd=tmp_path)
    assert parallel.returncode == 0, parallel.stderr
    assert_same_run(tmp_path / 'alone', tmp_path / 'out', 20)
    for name in ('sheep', 'goats', 'cows'):
        key = f'val_loss/{name}'
        alone = losses(tmp_path / 'alone', key)
        assert losses(tmp_path / 'out', key) == pytest.approx(alone, abs=1e-6)
        assert parallel.stdout.count(f'validation of {name}\n') == 3


def test_a_plan_knows_each_dataset_of_a_mixture(run, herd):
    result = run('train.py', '--plan', *TINY, *MIXED)
    assert result.code == 0, result.err
    assert 'data    data/sheep: train 9,801 tokens' in result.out
    assert '        data/goats: train 3,509 tokens' in result.out
    (steps,) = re.findall(r'(?m)^steps .*: 3,840\n(.*)$', result.out)
    assert steps == '        0.17 and 0.21 epochs of it'
    assert f': 3,840\n{steps}\n' in train(run, *MIXED).out
    result = run('train.py', '--plan', *TINY, '--dataset=sheep:1,horses:1')
    assert 'data    data/horses is not prepared yet' in result.out


def test_a_name_may_have_a_comma_or_a_colon(run, herd, tmp_path):
    (herd / 'goats').rename(herd / 'a:1,b')
    train(run, '--dataset=a:1,b', '--max_iters=1')


@pytest.mark.parametrize('dataset', ['sheep', 'sheep:0.7,goats:0.3'])
def test_an_evaluation_says_nothing_of_steps_and_epochs(run, herd, dataset):
    evaluated = train(run, f'--dataset={dataset}', '--eval_only')
    assert 'epochs' not in evaluated.out
    assert '\nsteps ' not in evaluated.out
    assert 'validation, ppl' in evaluated.out
    assert '\nsteps   1, each' in train(run, f'--dataset={dataset}', '--max_iters=1').out


# -----------------------------------------------------------------------------
# what cannot be


@pytest.mark.parametrize(
    ('dataset', 'message'),
    [
        ('sheep,goats', "'sheep' must be a name and a weight above 0, as in --dataset=a:0.5,b:0.5"),
        ('sheep:0.5,goats', "'goats' must be a name and a weight above 0"),
        ('sheep:0.5,', "'' must be a name and a weight above 0"),
        ('sheep:0,goats:1', "'sheep:0' must be"),
        ('sheep:0.0,goats:1', "'sheep:0.0' must be"),
        ('sheep:-1,goats:1', "'sheep:-1' must be"),
        ('sheep:nan,goats:1', "'sheep:nan' must be"),
        ('sheep:inf,goats:1', "'sheep:inf' must be"),
        ('sheep:1e999999999,goats:1', "'sheep:1e999999999' must be"),
        ('sheep:1/0,goats:1', "'sheep:1/0' must be"),
        (':1,goats:1', "':1' must be"),
        ('sheep:', "'sheep:' must be"),
        ('sheep:0.5,sheep:0.5', 'has sheep twice: give it one weight.'),
        ('sheep:1,horses:1', 'data/horses has no train.bin. Make it with: python prepare.py'),
        ('sheep:1,letters:1', 'data/letters and data/sheep have different vocabularies: prepare'),
        ('cows:1,sheep:1,tiny:1', 'The training split of data/tiny has 18 tokens, fewer than'),
    ],
)
def test_a_mixture_that_cannot_be_is_one_sentence(run, herd, tmp_path, dataset, message):
    (tmp_path / 'letters.txt').write_text(TEXT)
    (tmp_path / 'tiny.txt').write_text('0123456789' * 2)
    assert run('prepare.py', '--input=letters.txt', '--tokenizer=char').code == 0
    assert run('prepare.py', '--input=tiny.txt', '--tokenizer=byte').code == 0
    result = train(run, f'--dataset={dataset}', '--max_iters=1', code=1)
    assert message in result.err
    assert result.is_one_sentence
    assert not (tmp_path / 'out').exists()


def test_a_run_does_not_go_on_with_another_mixture(run, herd):
    train(run, *MIXED, '--max_iters=2')
    resume = ['--max_iters=3', '--init_from=resume']
    others = ['sheep:0.6,goats:0.4', 'sheep', 'sheep:0.7,cows:0.3', 'sheep:7,goats:3,cows:1']
    for other in others:
        result = train(run, f'--dataset={other}', *resume, code=1)
        how = "was trained with dataset='sheep:0.7,goats:0.3': resume it with this, or start a new"
        assert how in result.err
        assert result.is_one_sentence
    same_shares = ['--dataset=goats:3,sheep:7', *resume]
    resumed = train(run, *MIXED, *same_shares)
    assert "dataset was 'sheep:0.7,goats:0.3', is now 'goats:3,sheep:7'" in resumed.out
    (herd.parent / 'goats.txt').write_text(GOATS[::-1])
    assert run('prepare.py', '--input=goats.txt', '--tokenizer=byte').code == 0
    result = train(run, *same_shares, code=1)
    assert 'data/sheep + data/goats has changed since out/step_00000003' in result.err


def test_fine_tuning_checks_the_vocabulary_of_the_mixture(run, herd, tmp_path):
    train(run, '--max_iters=1', out='base')
    (tmp_path / 'letters.txt').write_text(TEXT)
    (tmp_path / 'more.txt').write_text(TEXT)
    for name in ('letters', 'more'):
        assert run('prepare.py', f'--input={name}.txt', '--tokenizer=char').code == 0
    flags = ['--init_from=base/step_00000001', '--block_size=32', '--device=cpu', '--max_iters=1']
    result = run('train.py', *flags, '--dataset=letters:1,more:1')
    assert 'has a vocabulary of 257 tokens, data/letters another one of' in result.err
    assert result.is_one_sentence
    assert run('train.py', *flags, '--dataset=sheep:1,goats:1').code == 0


def test_one_dataset_is_evaluated_at_a_time(run, herd):
    train(run, *MIXED, '--max_iters=1')
    for flags in ([], ['--dataset=goats:1,sheep:2']):
        result = run('evaluate.py', '--device=cpu', *flags)
        assert 'Only one dataset can be evaluated at a time, as with --dataset=sheep' in result.err
        assert result.is_one_sentence

"""The model card of a checkpoint, as the Hub's own client parses it and as a reader uses it."""

import ast
import json
import re

import pytest
from conftest import train
from huggingface_hub import ModelCard

import card
import tokenizer as tokenizers
from model import GPT, GPTConfig

SHA = re.compile(r'\b[0-9a-f]{64}\b')


@pytest.fixture
def trained(run, sheep, tmp_path):
    train(run, '--max_iters=4', '--eval_interval=2', '--weight_decay=0.25')
    return tmp_path / 'out' / 'step_00000004'


def read_code(text):
    """The code blocks of a card: for transformers, for shells, its recipe."""
    return re.findall(r'```\w+\n(.*?)```', text, re.DOTALL)


def test_the_hub_parses_a_card_and_shows_what_it_says(trained):
    parsed = ModelCard.load(trained / 'README.md')
    data = parsed.data.to_dict()
    assert data == {
        'library_name': 'transformers', 'pipeline_tag': 'text-generation', 'tags': ['flatgpt'],
    }  # fmt: skip
    assert '# out, step 4\n' in parsed.text


def test_its_figures_are_those_of_the_run(trained):
    text = (trained / 'README.md').read_text()
    log = [json.loads(line) for line in (trained.parent / 'log.jsonl').read_text().splitlines()]
    found = [r for r in log if 'val_loss' in r]
    assert [r['step'] for r in found] == [0, 2, 4]
    for record in found:
        row = f'| {record["step"]} | {record["val_loss"]:.4f} | {record["bits_per_byte"]:.3f} |'
        assert text.count(row) == 1
    meta = json.loads((trained.parent.parent / 'data' / 'sheep' / 'meta.json').read_text())
    assert SHA.findall(text) == [meta['train']['sha256']]
    assert f'| {meta["train"]["tokens"]:,} | {meta["val"]["tokens"]:,} |' in text
    model = GPT.from_pretrained(trained)
    assert f'{model.count_parameters():,} parameters' in text
    assert f'4 steps, {log[-1]["final"]["tokens"]:,} tokens' in text


def test_tokens_are_counted_over_changes_of_the_batch(run, trained):
    more = ['--init_from=resume', '--weight_decay=0.25', '--eval_interval=2']
    train(run, *more, '--batch_size=1', '--max_iters=6')
    train(run, *more, '--batch_size=3', '--max_iters=8')
    log = (trained.parent / 'log.jsonl').read_text().splitlines()
    n_tokens = json.loads(log[-1])['final']['tokens']
    text = (trained.parent / 'step_00000008' / 'README.md').read_text()
    assert f'8 steps, {n_tokens:,} tokens' in text


def test_its_recipe_is_what_was_changed_and_repeats_the_run(run, trained):
    recipe = read_code((trained / 'README.md').read_text())[2]
    changed = dict(line.split(' = ') for line in recipe.splitlines())
    changed = {name: ast.literal_eval(value) for name, value in changed.items()}
    assert changed['weight_decay'] == 0.25 and changed['max_iters'] == 4
    assert not changed.keys() & {'beta2', 'seed', 'out_dir', 'dataset', 'schedule'}
    path = trained.parent.parent / 'recipe.py'
    path.write_text(recipe)
    again = run('train.py', str(path), '--dataset=sheep', '--out_dir=again', '--device=cpu')
    assert again.code == 0, again.err
    weights = (trained.parent.parent / 'again' / trained.name / 'model.safetensors').read_bytes()
    assert weights == (trained / 'model.safetensors').read_bytes()


def test_its_code_for_transformers_runs_as_it_stands(trained, monkeypatch, capsys):
    code = read_code((trained / 'README.md').read_text())[0]
    monkeypatch.chdir(trained)
    exec(code, {})
    assert capsys.readouterr().out.startswith('Once')


def test_a_card_may_be_edited(run, trained):
    (trained / 'README.md').write_text('# My model\n')
    result = run('sample.py', '--max_new_tokens=3', '--device=cpu')
    assert result.code == 0 and 'damaged' not in result.err
    resumed = train(run, '--init_from=resume', '--max_iters=6', '--weight_decay=0.25')
    assert 'damaged' not in resumed.err + resumed.out


@pytest.mark.parametrize(
    ('init_from', 'origin', 'bases'),
    [
        ('scratch', 'from scratch', []),
        ('gpt2', 'from gpt2', ['openai-community/gpt2']),
        ('HuggingFaceTB/SmolLM2-135M', 'from HuggingFaceTB/SmolLM2-135M', None),
        ('org/name@v1', 'from org/name@v1', ['org/name']),
        ('/home/somebody/plays/step_00000600', 'from plays/step_00000600', []),
        ('plays/step_00000600', 'from plays/step_00000600', []),
        ('plays/here', 'from plays/here', []),
        ('plays', 'from test/plays', []),
        ('.', 'from pytest/test', []),
    ],
)
def test_it_says_what_a_model_was_made_from(tmp_path, monkeypatch, init_from, origin, bases):
    folder = tmp_path / 'pytest' / 'test'
    (folder / 'plays' / 'here').mkdir(parents=True)
    monkeypatch.chdir(folder)
    said, names = card.describe_origin(init_from)
    assert said == origin
    assert names == ([init_from] if bases is None else bases)


def write(folder, text, **config):
    """The card of an untrained model. text: the facts of its datasets."""
    vocabulary = tokenizers.build('byte')
    shape = {'block_size': 8, 'n_layer': 1, 'n_head': 1, 'n_embd': 8}
    model = GPT(GPTConfig(vocab_size=vocabulary.n_vocab, **shape))
    meta = {'step': 10, 'tokens': 99, 'config': {'init_from': 'scratch', **config}, 'text': text}
    card.write_card(folder, folder, model, vocabulary, meta)
    return ModelCard.load(folder / 'README.md')


def facts(name, source, share=1.0):
    splits = {split: {'tokens': 12345, 'sha256': 64 * 'a'} for split in ('train', 'val')}
    return {'name': name, 'share': share, 'source': source, **splits}


def test_texts_of_the_hub_are_named_in_its_head(tmp_path):
    stories = facts('stories', ['roneneldan/TinyStories', None], 0.75)
    files = facts('/home/somebody/files', ['a.txt', 'b|c.txt', 'c.txt', 'd.txt', 'e.txt'], 0.25)
    parsed = write(tmp_path, [stories, files, facts('old', [])], init_from='org/model')
    assert parsed.data.datasets == ['roneneldan/TinyStories']
    assert parsed.data.base_model == ['org/model']
    assert '| stories | roneneldan/TinyStories | 75.0% | 12,345 |' in parsed.text
    assert r'| files | a.txt, b\|c.txt, c.txt and 2 more | 25.0% |' in parsed.text
    assert 'somebody' not in parsed.text, 'a path of the machine'


def test_a_long_run_has_ten_losses_with_the_last(tmp_path):
    rows = [{'step': step, 'val_loss': 9.0, 'bits_per_byte': 1.0} for step in range(41)]
    written = card.list_losses([*rows, {'step': 40, 'final': {}}], last_step=37)
    assert len(written) <= 10 and written[-1].startswith('| 37 |')


def test_what_is_no_evaluation_costs_no_card():
    records = [{'step': 1, 'val_loss': 'x', 'bits_per_byte': 1.0}, {'step': 2, 'val_loss': 1.0}]
    assert card.list_losses(records, 5) == []


@pytest.mark.parametrize(
    ('kind', 'text', 'prompt'),
    [('byte', '', 'Once'), ('char', 'Once more', 'Once'), ('char', '\nit was', 'a')],
)
def test_its_prompt_is_one_that_the_vocabulary_has(kind, text, prompt):
    assert card.pick_prompt(tokenizers.build(kind, [text])) == prompt


def test_a_model_that_transformers_lacks_does_not_claim_it(tmp_path, monkeypatch):
    monkeypatch.setattr('card.transformers_has_it', lambda model: False)
    parsed = write(tmp_path, [facts('a', ['a.txt'])])
    assert parsed.data.library_name == 'flatgpt'
    assert 'AutoModel' not in parsed.text

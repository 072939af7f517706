"""Comparable figures: the same thing computed token by token, and through transformers."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import TEXT, in_ranks, losses, train
from transformers import AutoModelForCausalLM

import tokenizer as tk
from data import Dataset
from inference import log_likelihoods
from model import GPT, GPTConfig


def save(folder, tokenizer, **changes):
    """Save a random model with clear preferences, and a tokenizer, in a folder."""
    torch.manual_seed(1)
    shape = {'n_layer': 1, 'n_head': 2, 'n_embd': 32, 'block_size': 128, **changes}
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **shape))
    for parameter in model.parameters():
        parameter.data *= 8
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    tk.save(tokenizer, folder)
    return model.eval()


def write_rows(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def evaluate(run, *args):
    """Run evaluate.py. Returns its results, and the script's globals."""
    result = run('evaluate.py', *args, '--format=json', '--device=cpu')
    assert result.code == 0, result.err
    return json.loads(result.out), result.globals


def eval_text(run, *args):
    results, _ = evaluate(run, *args)
    return results['text']


# -----------------------------------------------------------------------------
# text


@torch.no_grad()
def losses_token_by_token(model, ids, context, stride):
    """The loss of every token but the first, each by its place in one window after the other."""
    nats = []
    start = 0
    while len(nats) < len(ids) - 1:
        window = ids[start : start + context + 1]
        log_probs = model(window[None, :-1]).logits[0].double().log_softmax(-1)
        of_window = -log_probs[range(len(window) - 1), window[1:]]
        nats += of_window[len(nats) - start :].tolist()  # what was not predicted before
        start += stride
    return nats


@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
@pytest.mark.parametrize(
    ('context', 'stride'), [(128, 1), (128, 64), (128, 128), (1024, 512), (1024, 64)]
)
def test_a_sliding_window_gives_tokens_their_context(run, tmp_path, arch, context, stride):
    save(tmp_path / 'm', tk.build('byte'), arch=arch, block_size=context)
    text = (TEXT * 2)[: 3 * context // 2 + 77]
    (tmp_path / 'x.txt').write_text(text)
    flags = ['--init_from=m', '--input=x.txt', '--dtype=float32']
    found = eval_text(run, *flags, f'--stride={stride}')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'm').eval()
    nats = losses_token_by_token(theirs, torch.tensor(list(text.encode())), context, stride)
    assert len(nats) == len(text.encode()) - 1 == found['tokens'] - 1
    assert found['loss'] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found['perplexity'] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)


def test_bits_per_byte_and_per_word_do_not_depend_on_tokens(run, tmp_path):
    (tmp_path / 'x.txt').write_text(TEXT)
    n_words = len(TEXT.split()) + 200
    tokenizers = {'bytes': tk.build('byte'), 'pairs': tk.build('bpe', [TEXT], 300)}
    for name, tokenizer in tokenizers.items():
        model = save(tmp_path / name, tokenizer)
        for parameter in model.parameters():
            parameter.data.zero_()
        model.save_pretrained(tmp_path / name)
        found = eval_text(run, f'--init_from={name}', '--input=x.txt')
        bits = len(tokenizer.encode(TEXT)) * math.log2(tokenizer.n_vocab)
        assert found['bits_per_byte'] == pytest.approx(bits / len(TEXT), rel=1e-6)
        assert found['words'] == n_words and found['bytes'] == len(TEXT)
        assert math.log2(found['word_perplexity']) == pytest.approx(bits / n_words, rel=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_run_is_evaluated_as_it_evaluates_itself(run, sheep, tmp_path, dtype):
    in_dtype = f'--dtype={dtype}'
    train(run, '--max_iters=30', '--learning_rate=1e-2', in_dtype)
    found = eval_text(run, '--out_dir=out', '--batch_size=3', in_dtype)
    bits_per_byte = losses(tmp_path / 'out', 'bits_per_byte')[30]
    assert found['source'] == 'data/sheep, val'
    assert found['loss'] == pytest.approx(losses(tmp_path / 'out')[30], rel=1e-6)
    assert found['bits_per_byte'] == pytest.approx(bits_per_byte, rel=1e-6)
    assert found['bytes'] == json.loads((sheep / 'meta.json').read_text())['val']['bytes']

    again = train(run, '--init_from=resume', '--eval_only', in_dtype)
    assert f'{found["loss"]:.4f}  validation' in again.out
    train_split = eval_text(run, '--out_dir=out', '--split=train')
    assert train_split['tokens'] == len(Dataset('sheep', tmp_path / 'data').train)
    assert train_split['loss'] != found['loss']
    table = run('evaluate.py', '--out_dir=out', '--device=cpu', in_dtype)
    assert re.search(rf'bits per byte +{found["bits_per_byte"]:.4f}\n', table.out)


def test_a_text_scores_alike_from_files_and_from_a_dataset(run, tmp_path):
    tokenizer = tk.build('byte')
    save(tmp_path / 'm', tokenizer)
    texts = [f'{n} and \n é {n}\n' for n in range(30)]
    (tmp_path / 'x.txt').write_text('<|endoftext|>\n'.join(texts))
    assert run('prepare.py', '--input=x.txt', '--tokenizer=byte').code == 0
    data = Dataset('x', tmp_path / 'data')
    kept = [text for text in tokenizer.decode(data.train).split('<|endoftext|>') if text]
    (tmp_path / 'train.txt').write_text('<|endoftext|>\n'.join(kept))
    ours = eval_text(run, '--init_from=m', '--dataset=x', '--split=train')
    theirs = eval_text(run, '--init_from=m', '--input=train.txt')
    # Documents are joined, and words counted, in the same way.
    assert {**ours, 'source': ''} == {**theirs, 'source': ''}


def test_wikitexts_marks_are_undone(run, tmp_path):
    raw = ' = Valkyria = \n Senjō no , " the 3 @,@ 000 @.@ 5 @-@ year ( war ) " ; '
    raw += "it 's = = A = = \n"
    text = ' = Valkyria =\nSenjō no, "the 3,000.5-year (war)"; it\'s == A ==\n'
    save(tmp_path / 'm', tk.build('byte'))
    (tmp_path / 'x.txt').write_text(raw)
    results, script = evaluate(run, '--init_from=m', '--input=x.txt', '--detokenize')
    found = results['text']
    assert script['undo_wikitext'](raw) == text
    assert found['tokens'] == len(text.encode())
    assert found['words'] == len(raw.split()) + 2, 'those of the raw text'
    assert found['bytes'] == len(raw.encode()), 'those of the raw text'


# -----------------------------------------------------------------------------
# questions


def score(model, tokenizer, context, continuation):
    """Log-probability and greediness of a continuation, without batches, padding or a cut."""
    ids = tokenizer.encode(context + continuation).tolist()
    n = len(ids) - len(tokenizer.encode(context.rstrip()))
    idx = torch.tensor([ids[:-1][-model.config.block_size :]])
    log_probs = model(idx)[0].log_softmax(-1)[-n:]
    return log_probs[range(n), ids[-n:]].sum().item(), log_probs.argmax(-1).tolist() == ids[-n:]


CONTEXTS = [f'{n} sheep jumped over the ' * (1 + n % 4) for n in range(9)]


@torch.no_grad()
def test_answers_are_scored_as_one_by_one(run, tmp_path):
    tokenizer = tk.build('bpe', [TEXT], 300)
    model = save(tmp_path / 'm', tokenizer, block_size=24)
    rows = []
    for n, context in enumerate(CONTEXTS):
        choices = ['fences', f'{n}', 'sheep fell asleep']
        rows.append({'context': context.strip(), 'choices': choices, 'answer': n % 3})
    write_rows(tmp_path / 'q.jsonl', rows)
    flags = ['--init_from=m', '--questions=q.jsonl', '--dtype=float32']
    results, _ = evaluate(run, *flags, '--batch_size=4')
    found = results['questions']

    is_right = []
    is_right_per_character = []
    for row in rows:
        scores = [score(model, tokenizer, row['context'], f' {text}')[0] for text in row['choices']]
        lengths = [len(text) for text in row['choices']]
        is_right.append(np.argmax(scores) == row['answer'])
        is_right_per_character.append(np.argmax(np.array(scores) / lengths) == row['answer'])
    assert found['questions'] == 9
    assert found['acc'] == pytest.approx(np.mean(is_right))
    assert found['acc_norm'] == pytest.approx(np.mean(is_right_per_character))
    for name in ('acc', 'acc_norm'):
        variance = found[name] * (1 - found[name]) / 8
        assert found[f'{name}_stderr'] == pytest.approx(math.sqrt(variance))


@torch.no_grad()
def test_last_words_are_scored_as_one_by_one(run, tmp_path):
    tokenizer = tk.build('bpe', [TEXT], 300)
    model = save(tmp_path / 'm', tokenizer, block_size=24)
    write_rows(tmp_path / 'l.jsonl', [{'text': f'{context}wolf'} for context in CONTEXTS])
    flags = ['--init_from=m', '--lambada=l.jsonl', '--dtype=float32']
    results, _ = evaluate(run, *flags, '--batch_size=4')
    found = results['lambada']
    one_by_one = [score(model, tokenizer, context.rstrip(), ' wolf') for context in CONTEXTS]
    perplexity = math.exp(-np.mean([nats for nats, _ in one_by_one]))
    assert found['perplexity'] == pytest.approx(perplexity, rel=1e-5)
    assert found['acc'] == np.mean([greedy for _, greedy in one_by_one])


def test_what_greedy_decoding_gives_is_found_to_be_greedy(tmp_path):
    tokenizer = tk.build('bpe', [TEXT], 300)
    model = save(tmp_path / 'm', tokenizer, block_size=24)
    prompt = tokenizer.encode(CONTEXTS[0].rstrip()).tolist()
    greedy = torch.cat(list(model.generate(torch.tensor([prompt]), 3, temperature=0)), 1)[0]
    other = (greedy + 1) % tokenizer.n_vocab
    requests = [(prompt + greedy.tolist(), 3), (prompt + other.tolist(), 3)]
    assert log_likelihoods(model, requests, 2)[:, 1].tolist() == [1, 0]


def test_hellaswag_is_put_together_as_its_figures_are(run, tmp_path):
    row = {
        'activity_label': 'Roof shingle removal',
        'ctx_a': 'A man is  sitting [substeps] on a roof. [title] He',
        'ctx_b': 'he starts',
        'endings': [' up', 'x [step] y', 'a', 'b'],
        'label': '3',
    }
    save(tmp_path / 'm', tk.build('byte'))
    write_rows(tmp_path / 'h.jsonl', [row, {**row, 'label': '1'}])
    results, script = evaluate(run, '--init_from=m', '--hellaswag=h.jsonl')
    assert results['hellaswag']['questions'] == 2 and results['hellaswag']['acc'] in (0, 0.5)
    assert 'text' not in results
    context, endings, label = script['hellaswag_question'](row)
    assert context == 'Roof shingle removal: A man is sitting on a roof.. He He starts'
    assert endings == ['up', 'x y', 'a', 'b'] and label == 3
    results, _ = evaluate(run, '--init_from=m', '--hellaswag=h.jsonl', '--limit=1')
    assert results['hellaswag']['questions'] == 1


# -----------------------------------------------------------------------------
# several processes, and what is wrong


def test_several_processes_evaluate_as_one(run, sheep, tmp_path):
    train(run, '--max_iters=1')
    write_rows(tmp_path / 'l.jsonl', [{'text': f'{n} sheep fell'} for n in range(7)])
    flags = ['--out_dir=out', '--dataset=sheep', '--lambada=l.jsonl', '--batch_size=2']
    flags += ['--stride=16', '--format=json', '--device=cpu']
    alone, _ = evaluate(run, *flags)
    many = in_ranks(2, 'evaluate.py', *flags, cwd=tmp_path)
    assert many.returncode == 0, many.stderr
    together = json.loads(many.stdout)
    for task in ('text', 'lambada'):
        for name, value in alone[task].items():
            expected = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            assert together[task][name] == expected


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        # questions
        ('--questions=bad.jsonl', "bad.jsonl, row 2: there is no 'answer'; each row needs"),
        ('--questions=wrong.jsonl', "wrong.jsonl, row 1: 'answer' is 2: it must be from 0 to 1."),
        ('--questions=letters.jsonl', "letters.jsonl, row 1: 'answer' is 'B': it must be from"),
        ('--questions=text.jsonl', "text.jsonl, row 1: 'choices' must be a list of texts"),
        ('--questions=number.jsonl', "number.jsonl, row 1: 'context' must be a text, not 5."),
        ('--questions=long.jsonl', 'An answer has 201 tokens, and the model sees 128'),
        ('--lambada=number.jsonl', "row 1: there is no 'text'"),
        ('--questions=empty.jsonl,wrong.jsonl', 'it must be one file'),
        ('--questions=none.jsonl', 'There is no file none.jsonl'),
        ('--questions=broken.jsonl', 'questions=broken.jsonl cannot be read'),
        ('--questions=empty.jsonl', 'empty.jsonl has no questions.'),
        ('--hellaswag=hub', 'hellaswag=hub cannot be read'),
        # texts
        ('', 'Say what to evaluate it on: --dataset=NAME, --input=FILE'),
        ('--input=empty.txt', 'There is no text to evaluate in empty.txt.'),
        ('--dataset=none', 'data/none has no train.bin'),
        ('--dataset=other', 'has a vocabulary of 5 tokens, data/other another one of 3'),
        ('--dataset=sheep', 'tokens, data/sheep another one of 257'),
        ('--dataset=sheep --input=x.txt', 'Give input or dataset, not both.'),
        ('--questions=text.jsonl --stride=5', 'detokenize are for a text: name'),
        ('--input=x.txt --stride=129', 'stride=129: must be from 1 to 128'),
        ('--input=x.txt --split=test', "split='test' must be one of: val, train."),
        # the model
        ('--init_from=resume --out_dir=none', 'none has no checkpoint'),
    ],
)
def test_bad_input_is_one_sentence(run, sheep, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    save(tmp_path / 'm', tk.build('char', ['ab\n ']))
    good = {'context': 'a', 'choices': ['a', 'b'], 'answer': 0}
    write_rows(tmp_path / 'bad.jsonl', [good, {'context': 'a', 'choices': ['b']}])
    write_rows(tmp_path / 'wrong.jsonl', [{**good, 'answer': 2}])
    write_rows(tmp_path / 'letters.jsonl', [{**good, 'answer': 'B'}])
    write_rows(tmp_path / 'text.jsonl', [{**good, 'choices': 'ab'}])
    write_rows(tmp_path / 'number.jsonl', [{**good, 'context': 5}])
    write_rows(tmp_path / 'long.jsonl', [{**good, 'choices': ['a' * 200, 'b']}])
    (tmp_path / 'broken.jsonl').write_text('{"a\n')
    (tmp_path / 'empty.jsonl').touch()
    (tmp_path / 'empty.txt').touch()
    (tmp_path / 'x.txt').write_text('ab' * 20)
    (tmp_path / 'other.txt').write_text('cd\n' * 99)
    assert run('prepare.py', '--input=other.txt', '--tokenizer=char').code == 0
    result = run('evaluate.py', '--init_from=m', '--device=cpu', *flags.split())
    assert result.is_one_sentence and message in result.err

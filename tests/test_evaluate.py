"""Figures that others can compare with: the same thing computed token by token, and through transformers."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT
from test_train import losses, train
from transformers import AutoModelForCausalLM

import evaluate
import tokenizer as tk
from data import Dataset
from model import GPT, GPTConfig


def save(folder, tokenizer, **shape):
    """A random model with clear preferences, and a tokenizer, in a folder."""
    torch.manual_seed(1)
    shape = {'n_layer': 1, 'n_head': 2, 'n_embd': 32, 'block_size': 128, 'vocab_size': tokenizer.n_vocab} | shape
    model = GPT(GPTConfig(**shape))
    for parameter in model.parameters():
        parameter.data *= 8
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    tk.save(tokenizer, folder)
    return model.eval()


def judge(run, *args, code=0):
    result = run('evaluate.py', *args, '--format=json', '--device=cpu')
    assert result.code == code, result.err
    return json.loads(result.out) if not code else result.err


@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
@pytest.mark.parametrize(('context', 'stride'), [(128, 1), (128, 64), (128, 128), (1024, 512), (1024, 64)])
def test_a_sliding_window_gives_each_token_the_context_it_says(run, tmp_path, arch, context, stride):
    save(tmp_path / 'm', tk.build('byte'), arch=arch, block_size=context)
    text = (TEXT * 2)[: 3 * context // 2 + 77]
    (tmp_path / 'x.txt').write_text(text)
    found = judge(run, '--init_from=m', '--input=x.txt', f'--stride={stride}')['text']
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'm').eval()
    ids, nats, start = torch.tensor(list(text.encode())), [], 0
    with torch.no_grad():
        while len(nats) < len(ids) - 1:  # one window after the other; what was not predicted before counts
            window = ids[start : start + context + 1]
            log_probabilities = theirs(window[None, :-1]).logits[0].double().log_softmax(-1)
            every = -log_probabilities[range(len(window) - 1), window[1:]]
            nats += every[len(nats) - start :].tolist()
            start += stride
    assert len(nats) == len(ids) - 1 == found['tokens'] - 1
    assert found['loss'] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found['perplexity'] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)


def test_bits_per_byte_and_per_word_do_not_depend_on_the_tokens(run, tmp_path):
    (tmp_path / 'x.txt').write_text(TEXT)
    for name, tokenizer in {'bytes': tk.build('byte'), 'pairs': tk.build('bpe', [TEXT], 300)}.items():
        model = save(tmp_path / name, tokenizer)
        for parameter in model.parameters():
            parameter.data.zero_()
        model.save_pretrained(tmp_path / name)
        found = judge(run, f'--init_from={name}', '--input=x.txt')['text']
        bits = len(tk.encode(tokenizer, TEXT)) * math.log2(tokenizer.n_vocab)
        assert found['bits_per_byte'] == pytest.approx(bits / len(TEXT), rel=1e-6)
        words = len(TEXT.split()) + 200
        assert found['words'] == words and found['bytes'] == len(TEXT)
        assert math.log2(found['word_perplexity']) == pytest.approx(bits / words, rel=1e-6)


def test_a_run_is_judged_as_it_judges_itself(run, sheep, tmp_path):
    train(run, '--max_iters=30', '--learning_rate=1e-2')
    found = judge(run, '--out_dir=out', '--batch_size=3')['text']
    assert found['source'] == 'data/sheep, val'
    assert found['loss'] == pytest.approx(losses(tmp_path / 'out')[30], rel=1e-6)
    assert found['bits_per_byte'] == pytest.approx(losses(tmp_path / 'out', 'bits_per_byte')[30], rel=1e-6)
    assert found['bytes'] == json.loads((sheep / 'meta.json').read_text())['val']['bytes']
    again = train(run, '--init_from=resume', '--eval_only')
    assert f'{found["loss"]:.4f}  validation' in again.out
    part = judge(run, '--out_dir=out', '--part=train')['text']
    assert part['tokens'] == len(Dataset('sheep', tmp_path / 'data').train) and part['loss'] != found['loss']
    table = run('evaluate.py', '--out_dir=out', '--device=cpu')
    assert re.search(rf'bits per byte +{found["bits_per_byte"]:.4f}\n', table.out)


def test_documents_are_joined_and_words_counted_alike_from_files_and_from_a_dataset(run, tmp_path):
    tokenizer = tk.build('byte')
    save(tmp_path / 'm', tokenizer)
    texts = [f'{n} and \n é {n}\n' for n in range(30)]
    (tmp_path / 'x.txt').write_text('<|endoftext|>\n'.join(texts))
    assert run('prepare.py', '--input=x.txt', '--tokenizer=byte').code == 0
    data = Dataset('x', tmp_path / 'data')
    kept = [text for text in tokenizer.decode(data.train).split('<|endoftext|>') if text]
    (tmp_path / 'train.txt').write_text('<|endoftext|>\n'.join(kept))
    ours = judge(run, '--init_from=m', '--dataset=x', '--part=train')['text']
    theirs = judge(run, '--init_from=m', '--input=train.txt')['text']
    assert {**ours, 'source': ''} == {**theirs, 'source': ''}


def test_wikitexts_marks_are_undone(run, tmp_path):
    raw = ' = Valkyria = \n Senjō no , " the 3 @,@ 000 @.@ 5 @-@ year ( war ) " ; it \'s = = A = = \n'
    text = raw
    for mark, instead in evaluate.MARKS:
        text = re.sub(mark, instead, text)
    assert text == ' = Valkyria =\nSenjō no, "the 3,000.5-year (war)"; it\'s == A ==\n'
    save(tmp_path / 'm', tk.build('byte'))
    (tmp_path / 'x.txt').write_text(raw)
    found = judge(run, '--init_from=m', '--input=x.txt', '--detokenize')['text']
    assert found['tokens'] == len(text.encode())
    assert found['words'] == len(raw.split()) + 2 and found['bytes'] == len(raw.encode()), 'those of the raw text'


def reference(model, tokenizer, context, continuation):
    """Log-probability and greediness of a continuation, without batches, padding or a cut."""
    both = tk.encode(tokenizer, context + continuation).tolist()
    n = len(both) - len(tk.encode(tokenizer, context.rstrip()))
    idx = torch.tensor([both[:-1][-model.config.block_size :]])
    log_probabilities = model(idx)[0].log_softmax(-1)[-n:]
    return log_probabilities[range(n), both[-n:]].sum().item(), log_probabilities.argmax(-1).tolist() == both[-n:]


@torch.no_grad()
def test_answers_are_scored_as_one_by_one(run, tmp_path):
    tokenizer = tk.build('bpe', [TEXT], 300)
    model = save(tmp_path / 'm', tokenizer, block_size=24)
    contexts = [f'{n} sheep jumped over the ' * (1 + n % 4) for n in range(9)]
    rows = [{'context': c.strip(), 'choices': ['fences', f'{n}', 'sheep fell asleep'], 'answer': n % 3}
            for n, c in enumerate(contexts)]  # fmt: skip
    (tmp_path / 'q.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (tmp_path / 'l.jsonl').write_text(''.join(json.dumps({'text': f'{c}wolf'}) + '\n' for c in contexts))
    found = judge(run, '--init_from=m', '--choices=q.jsonl', '--lambada=l.jsonl', '--batch_size=4')
    plain = by_length = 0
    for row in rows:
        scores = [reference(model, tokenizer, row['context'], f' {answer}')[0] for answer in row['choices']]
        plain += int(np.argmax(scores)) == row['answer']
        lengths = [len(answer) for answer in row['choices']]
        by_length += int(np.argmax(np.array(scores) / lengths)) == row['answer']
    assert found['choices']['questions'] == 9
    assert found['choices']['accuracy'] == pytest.approx(plain / 9)
    assert found['choices']['accuracy_by_length'] == pytest.approx(by_length / 9)
    one_by_one = [reference(model, tokenizer, context.rstrip(), ' wolf') for context in contexts]
    perplexity = math.exp(-np.mean([score for score, _ in one_by_one]))
    assert found['lambada']['perplexity'] == pytest.approx(perplexity, rel=1e-5)
    assert found['lambada']['accuracy'] == np.mean([greedy for _, greedy in one_by_one])
    greedy = model.generate(torch.tensor([tk.encode(tokenizer, contexts[0].rstrip()).tolist()]), 3)
    likely = torch.cat(list(greedy), 1)[0].tolist()
    request = [(tk.encode(tokenizer, contexts[0].rstrip()).tolist() + likely, 3)]
    assert evaluate.log_likelihoods(model, request, 1)[0, 1] == 1, 'what is likeliest is found to be'


def test_hellaswag_is_put_together_as_its_figures_are(run, tmp_path):
    row = {'activity_label': 'Roof shingle removal', 'ctx_a': 'A man is  sitting [substeps] on a roof. [title] He',
           'ctx_b': 'he starts', 'endings': [' up', 'x [step] y', 'a', 'b'], 'label': '3'}  # fmt: skip
    context, endings, label = evaluate.hellaswag_choice(row)
    assert context == 'Roof shingle removal: A man is sitting on a roof.. He He starts'
    assert endings == ['up', 'x y', 'a', 'b'] and label == 3
    save(tmp_path / 'm', tk.build('byte'))
    (tmp_path / 'h.jsonl').write_text(json.dumps(row) + '\n' + json.dumps(row | {'label': '1'}) + '\n')
    found = judge(run, '--init_from=m', '--hellaswag=h.jsonl')['hellaswag']
    assert found['questions'] == 2 and found['accuracy'] in (0, 0.5) and 'text' not in found
    assert judge(run, '--init_from=m', '--hellaswag=h.jsonl', '--limit=1')['hellaswag']['questions'] == 1


def test_several_processes_judge_as_one(run, sheep, tmp_path):
    train(run, '--max_iters=1')
    (tmp_path / 'l.jsonl').write_text(''.join(json.dumps({'text': f'{n} sheep fell'}) + '\n' for n in range(7)))
    flags = ['--out_dir=out', '--dataset=sheep', '--lambada=l.jsonl', '--batch_size=2', '--stride=16']
    alone = judge(run, *flags)
    line = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', ROOT / 'evaluate.py']
    many = subprocess.run(
        [*line, *flags, '--format=json', '--device=cpu'], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ,
    )  # fmt: skip
    assert many.returncode == 0, many.stderr
    found = json.loads(many.stdout)
    for task in ('text', 'lambada'):
        for name, value in alone[task].items():
            assert found[task][name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--init_from=m'], 'Say on what to judge it: --dataset=NAME, --input=FILE'),
        (['--init_from=m', '--choices=bad.jsonl'], "bad.jsonl, row 2: there is no 'answer'; each row needs context,"),
        (['--init_from=m', '--choices=wrong.jsonl'], "wrong.jsonl, row 1: 'answer' is 2: it must be from 0 to 1."),
        (['--init_from=m', '--choices=letters.jsonl'], "letters.jsonl, row 1: 'answer' is 'B': it must be from"),
        (['--init_from=m', '--choices=text.jsonl'], "text.jsonl, row 1: 'choices' must be a list of texts"),
        (['--init_from=m', '--choices=number.jsonl'], "number.jsonl, row 1: 'context' must be a text, not 5."),
        (['--init_from=m', '--choices=long.jsonl'], 'An answer has 201 tokens, and the model sees 128'),
        (['--init_from=m', '--lambada=number.jsonl'], "row 1: there is no 'text'"),
        (['--init_from=m', '--choices=empty.jsonl,wrong.jsonl'], 'it must be one file'),
        (['--init_from=m', '--dataset=other'], 'data/other has a vocabulary of 3 tokens, the model another one of 5'),
        (['--init_from=m', '--choices=none.jsonl'], 'There is no file none.jsonl'),
        (['--init_from=m', '--choices=broken.jsonl'], 'choices=broken.jsonl cannot be read'),
        (['--init_from=m', '--choices=empty.jsonl'], 'empty.jsonl has no questions.'),
        (['--init_from=m', '--input=empty.txt'], 'There is no text to judge in empty.txt.'),
        (['--init_from=m', '--dataset=none'], 'data/none has no train.bin'),
        (['--init_from=m', '--dataset=sheep'], 'data/sheep has a vocabulary of 257 tokens, the model another one of 5'),
        (['--init_from=m', '--choices=text.jsonl', '--stride=5'], 'detokenize are for a text: name'),
        (['--init_from=m', '--input=x.txt', '--stride=129'], 'stride=129: must be from 1 to 128'),
        (['--init_from=m', '--input=x.txt', '--part=test'], "part='test' must be one of: val, train."),
        (['--out_dir=none'], 'none has no checkpoint'),
        (['--init_from=m', '--hellaswag=hub'], 'hellaswag=hub cannot be read'),
    ],
)
def test_bad_input_is_one_sentence(run, sheep, tmp_path, monkeypatch, args, message):
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    save(tmp_path / 'm', tk.build('char', ['ab\n ']))
    rows = {'bad': '{"context": "a", "choices": ["b"], "answer": 0}\n{"context": "a", "choices": ["b"]}\n'}
    rows |= {'wrong': '{"context": "a", "choices": ["b", "b"], "answer": 2}\n', 'broken': '{"a\n', 'empty': ''}
    rows['letters'] = '{"context": "a", "choices": ["a", "b"], "answer": "B"}\n'
    rows['text'] = '{"context": "a", "choices": "ab", "answer": 0}\n'
    rows['number'] = '{"context": 5, "choices": ["a", "b"], "answer": 0}\n'
    rows['long'] = json.dumps({'context': 'a', 'choices': ['a' * 200, 'b'], 'answer': 0}) + '\n'
    (tmp_path / 'other.txt').write_text('cd\n' * 99)
    assert run('prepare.py', '--input=other.txt', '--tokenizer=char').code == 0
    for name, text in rows.items():
        (tmp_path / f'{name}.jsonl').write_text(text)
    (tmp_path / 'empty.txt').touch()
    (tmp_path / 'x.txt').write_text('ab' * 20)
    error = judge(run, *args, code=1)
    assert message in error and error.count('\n') == 1

"""Text that streams, and generation that is a function of its arguments."""

from types import SimpleNamespace

import pytest
import torch

import tokenizer as tk
from inference import TextStream, generate_text, perplexity
from model import GPT, GPTConfig
from runtime import UserError


def stream(tokenizer, ids, stop=()):
    """A stream that was given some tokens, and the pieces that it handed out, the rest last."""
    text = TextStream(tokenizer, stop, [tokenizer.end_of_text])
    pieces = [text.add(int(i)) for i in ids]
    return text, [*pieces, text.close('length')]


def test_streaming_never_breaks_a_character():
    tokenizer = tk.build('byte')
    written = 'naïve 日本語 👩‍👩‍👧'
    text, pieces = stream(tokenizer, tokenizer.encode(written))
    assert ''.join(pieces) == text.text == written and '\ufffd' not in written
    assert all('\ufffd' not in piece for piece in pieces)
    text, pieces = stream(tokenizer, tokenizer.encode('日')[:2])
    assert pieces == ['', '', '\ufffd'], 'a character cut short by the length is marked, at the end'


def test_streaming_holds_back_what_may_become_a_stop_text():
    tokenizer = tk.build('byte')
    text, pieces = stream(tokenizer, tokenizer.encode('a\n\rb\n\nc'), stop=['\n\n'])
    assert pieces == ['a', '', '\n\r', 'b', '', '', '', '']
    assert (text.text, text.finish) == ('a\n\rb', 'stop')


def test_half_a_character_behind_a_stop_text_is_dropped():
    def decode(ids):
        return len(ids) * b'a.\xe6'.decode(errors='replace')

    tokenizer = SimpleNamespace(end_of_text=None, decode=decode)
    text, pieces = stream(tokenizer, [0], stop=['.'])
    assert (text.text, text.finish, pieces) == ('a', 'stop', ['a', ''])


def test_a_sample_ends_at_end_of_text_and_does_not_show_it():
    tokenizer = tk.build('byte')
    text, pieces = stream(tokenizer, [97, tokenizer.end_of_text, 98])
    assert (''.join(pieces), text.tokens, text.finish) == ('a', 1, 'end_of_text')


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'block_size': 16}
    return GPT(GPTConfig(vocab_size=257, **shape)).eval()


def test_generated_text_is_a_function_of_the_seed_it_is_given(model):
    def texts(seed):
        samples = generate_text(model, tk.build('byte'), 'ab', 2, 30, seed, temperature=2.0)
        return [sample.text for sample in samples]

    before = torch.get_rng_state()
    first = texts(1)
    assert first == texts(1) and first != texts(2) and first[0] != first[1]
    assert torch.equal(torch.get_rng_state(), before), 'the generator of training is left alone'


def test_the_first_sample_streams_to_its_last_character(model):
    pieces = []
    samples = generate_text(model, tk.build('byte'), 'ab', 3, 40, stream=pieces.append)
    assert ''.join(pieces) == samples[0].text != samples[1].text


def test_an_empty_prompt_is_end_of_text_if_there_is_one(model):
    tokenizer = tk.build('byte')
    end_of_text = torch.tensor([[tokenizer.end_of_text]])
    ids = torch.cat(list(model.generate(end_of_text, 8, temperature=0)), 1)[0].tolist()
    sample = generate_text(model, tokenizer, '', max_new_tokens=8, temperature=0)[0]
    assert sample.text == tokenizer.decode(ids).replace('<|endoftext|>', '')
    with pytest.raises(UserError, match='The prompt is empty'):
        generate_text(model, tk.build('char', ['ab'], end_of_text=False), '')
    with pytest.raises(UserError, match=r"another prompt than 'c': .* alphabet: 'c' \(U\+0063\)"):
        generate_text(model, tk.build('char', ['ab']), 'c')


def test_a_perplexity_beyond_all_floats_is_none():
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) is None and perplexity(float('nan')) is None

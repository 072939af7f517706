"""Published tokenizers: the ids of the `tokenizers` library, from the text to the checkpoint.

The layouts are small ones of those that models are published with. What is right is what the
library says of the same tokenizer.json, and what transformers says of the same folder.
"""

import itertools
import json
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

import documents
import sources
import tokenizer as tk
from inference import TextStream, encode_prompt
from runtime import UserError

# -----------------------------------------------------------------------------
# layouts

# What vocabularies are trained on, and what random texts are made of.
SCRIPTS = (
    'Order 66 costs 1234567 euro: café, naïve, Ünïcödé.\r\nTabs\tand  double   spaces.\n\n\n',
    '    def f(x):\n        return {"a": x**2, \'b\': [x != 1]}  # TODO\n',
    '中文测试，今天天气很好。日本語のテキスト、漢字とかな。',
    'हिन्दी पाठ यहाँ है। مرحبا بالعالم، هذا نص. Привет, мир!',
    "I'll say: THEY'RE here -- aren't they?",
)
EMOJI = '👩‍👩‍👧‍👦🇧🇩❤️🏳️‍🌈🎉'
ENGLISH = (ROOT / 'corpus' / 'shakespeare.txt').read_text()[:30_000]
LEARNED = [ENGLISH, *(text * 20 for text in SCRIPTS)]  # for byte-level ones

WORDS = '|'.join((
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r'[^\r\n\p{L}\p{N}]?\p{L}+',
    r'\p{N}{1,3}',
    r' ?[^\s\p{L}\p{N}]+[\r\n]*',
    r'\s*[\r\n]+',
    r'\s+(?!\S)',
    r'\s+',
))
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS_AND_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), 'isolated')


def byte_level(*steps, special=('<|endoftext|>',), normalizer=None, alphabet=None):
    """A byte-level BPE with these pre-tokenizers. Its trainer puts special tokens first."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    library.decoder = decoders.ByteLevel()
    if normalizer:
        library.normalizer = normalizer
    if alphabet is None:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(LEARNED, trainer)
    return library


def plain():
    return byte_level(WORDS_AND_BYTES)


def smollm():
    return byte_level(pre_tokenizers.Digits(individual_digits=True), WORDS_AND_BYTES)


def deepseek():
    words = r'[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
    return byte_level(split(r'\p{N}{1,3}'), split(words), BYTES)


def llama3():
    special = ('<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>')
    library = byte_level(split(WORDS), BYTES, special=special)
    library.post_processor = processors.TemplateProcessing(
        single='<|begin_of_text|> $A', special_tokens=[('<|begin_of_text|>', 0)]
    )
    return library


def qwen():
    words = split(WORDS.replace('{1,3}', ''))
    return byte_level(words, BYTES, normalizer=normalizers.NFC())


def prefix_space():
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))


def split_and_regex():
    return byte_level(split(r'\p{N}'), WORDS_AND_BYTES)


def few_bytes():
    """Most bytes have no token: only those of the text that it was trained on."""
    return byte_level(WORDS_AND_BYTES, alphabet=[])


def lowercase():
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    special = ('<s>', '<pad>', '</s>', '<unk>')
    return byte_level(WORDS_AND_BYTES, special=special, normalizer=normalizer)


def neox():
    library = byte_level(WORDS_AND_BYTES, normalizer=normalizers.NFC())
    library.add_tokens([AddedToken(' ' * n, normalized=True) for n in range(8, 1, -1)])
    library.add_tokens([AddedToken('[CHAPTER I]', normalized=False)])
    return library


def byte_fallback(*normalizer):
    """Llama 2's: one character after the other, those without a token as bytes."""
    library = Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True))
    library.normalizer = normalizers.Sequence([*normalizer, normalizers.Replace(' ', '▁')])
    steps = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer:
        steps.append(decoders.Strip(' ', 1, 0))
    library.decoder = decoders.Sequence(steps)
    special = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    # By lines, since there are no words. The scripts have no part in it, so they become bytes.
    library.train_from_iterator(ENGLISH.splitlines(), trainer)
    contents = json.loads(library.to_str())
    del contents['added_tokens'][3:]  # in a text, <0x41> is no byte
    return Tokenizer.from_str(json.dumps(contents))


def llama2():
    library = byte_fallback(normalizers.Prepend('▁'))
    library.post_processor = processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 1)]
    )
    return library


def gemma():
    """Nothing is put before a text, and nothing cuts it into words."""
    return byte_fallback()


def unigram():
    library = Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    special = ['<unk>', '</s>']
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token='<unk>', show_progress=False
    )
    library.train_from_iterator([ENGLISH[:5000], *SCRIPTS], trainer)
    return library


def truncated():
    """For a model that reads short texts of one length."""
    library = plain()
    library.enable_truncation(max_length=4)
    library.enable_padding(length=8, pad_id=0, pad_token='<|endoftext|>')
    return library


LAYOUTS = {function.__name__: function for function in (
    plain, smollm, deepseek, llama3, qwen, prefix_space, split_and_regex, few_bytes, lowercase,
    neox, llama2, gemma, unigram, truncated,
)}  # fmt: skip


# -----------------------------------------------------------------------------
# what the library says, and random texts


@pytest.fixture(scope='session')
def layouts(tmp_path_factory):
    """{name: a folder with its tokenizer.json} of all layouts."""
    folders = {}
    for name, build in LAYOUTS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        build().save(str(folders[name] / 'tokenizer.json'))
    return folders


def open_library(folder):
    library = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    library.no_truncation()
    library.no_padding()
    return library


def library_ids(library, text):
    return library.encode(text, add_special_tokens=False).ids


RANGES = ((0x20, 0x7F), (0, 0x250), (0x300, 0x370), (0x900, 0xE00), (0x3040, 0x9FFF))
RANGES += ((0xAC00, 0xD7A4), (0xE000, 0x10000), (0x1F300, 0x1FA00), (0x10000, 0x110000))
SPECIAL = ('<|endoftext|>', '<|begin_of_text|>', '<|eot_id|>', '<s>', '</s>', '<unk>', '<0x41>')
SPECIAL += ('[CHAPTER I]', '<|im_start|>', '▁', '\ufffd')


def random_text(rng, special=()):
    """Some parts of the scripts, of all of Unicode, of white space, and of special tokens."""
    parts = []
    for _ in range(rng.randrange(1, 8)):
        kind = rng.random()
        if kind < 0.45:
            source = rng.choice([ENGLISH, *SCRIPTS, EMOJI])
            start = rng.randrange(len(source))
            parts.append(source[start : start + rng.randrange(40)])
        elif kind < 0.7:
            first, end = rng.choice(RANGES)
            codes = [rng.randrange(first, end) for _ in range(rng.randrange(8))]
            parts += [chr(code) for code in codes]
        elif special and kind < 0.85:
            parts.append(rng.choice(special))
        else:
            parts += rng.choices(' \n\r\t\u00a0\u3000', [20, 8, 2, 2, 1, 1], k=rng.randrange(12))
    return ''.join(parts)


def random_texts(n, special=()):
    rng = random.Random(f'{n} texts')
    return ['', ' ', '\n', 'a', *(random_text(rng, special) for _ in range(n))]


# -----------------------------------------------------------------------------
# ids

LOSSLESS = ('plain', 'smollm', 'deepseek', 'llama3', 'split_and_regex', 'gemma', 'truncated')


@pytest.mark.parametrize('name', LAYOUTS)
def test_ids_are_those_of_the_library(layouts, name):
    ours = tk.load(layouts[name])
    theirs = open_library(layouts[name])
    assert ours.kind == 'published' and ours.n_vocab == theirs.get_vocab_size()
    texts = random_texts(300, SPECIAL)
    expected = [library_ids(theirs, text) for text in texts]
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == expected
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text).tolist() == ours.encode_prompt(text) == ids
        decoded = ours.decode(np.array(ids, np.uint16))
        assert decoded == theirs.decode(ids, skip_special_tokens=False)
        if name in LOSSLESS and '▁' not in text:
            assert decoded == text


@pytest.mark.parametrize('kind', tk.KINDS)
def test_our_own_ids_are_those_of_the_library(kind, tmp_path):
    texts = random_texts(300)
    marked = random_texts(300, SPECIAL)
    tk.save(tk.build(kind, [*texts, *marked], vocab_size=600), tmp_path)
    ours = tk.load(tmp_path)
    theirs = open_library(tmp_path)
    assert ours.kind == kind
    for text in texts:
        ids = ours.encode(text).tolist()
        assert ids == library_ids(theirs, text)
        assert ours.decode(ids) == theirs.decode(ids) == text
    assert sum(tk.END_OF_TEXT in text for text in marked) > 10
    for text in marked:
        ids = ours.encode_prompt(text)
        assert ids == library_ids(theirs, text)
        assert ours.decode(ids) == text


# -----------------------------------------------------------------------------
# prepared, trained, and opened by transformers

STORIES = [ENGLISH[start : start + 700].strip() + '\n' for start in range(0, 7000, 700)]
# Each of the bytes is in the text that few_bytes was trained on.
STORIES += [SCRIPTS[0], SCRIPTS[2] + SCRIPTS[3] + '\n', SCRIPTS[1] + SCRIPTS[4] + '\n']
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    '<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
MORE_FILES = {
    'tokenizer_config.json': json.dumps(
        {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': 77, 'extra': 'kept'},
        indent=3,
    ),
    'special_tokens_map.json': '{"eos_token": {"content":"<|eot_id|>", "lstrip":false}}\r\n',
    'chat_template.jinja': CHATML,
    'added_tokens.json': '{}\n\n',
    'chat_template.json': '{"chat_template": "an older one"}',
    'tokenizer.model': 'not read',
    'vocab.json': '{"not": "read"}',
    'merges.txt': '#version: 0.2\n',
}


def prepare(run, folder, *args, text=None, code=0):
    """Prepare a text, or STORIES, as data/x with the tokenizer of a folder."""
    Path('x.txt').write_text(text or f'{tk.END_OF_TEXT}\n'.join(STORIES), newline='')
    result = run('prepare.py', '--input=x.txt', f'--tokenizer={folder}', *args)
    assert result.code == code, result.err
    return result


def read_bins(folder):
    """{split: its ids, a list} of a dataset."""
    meta = json.loads((folder / 'meta.json').read_text())
    splits = {}
    for split in ('train', 'val'):
        splits[split] = np.fromfile(folder / f'{split}.bin', meta['dtype']).tolist()
    return splits


def tokenizer_files(folder):
    names = ('tokenizer.json', *MORE_FILES)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def write_folder(folder, source, files):
    """A folder with the tokenizer.json of another one, and more files."""
    folder.mkdir()
    shutil.copy(source / 'tokenizer.json', folder)
    for name, contents in files.items():
        data = contents if isinstance(contents, str) else json.dumps(contents)
        (folder / name).write_text(data, newline='')
    return folder


@pytest.mark.parametrize('name', LAYOUTS)
def test_prepared_ids_are_those_of_the_library(layouts, run, name):
    prepare(run, layouts[name])
    theirs = open_library(layouts[name])
    ours = tk.load(layouts[name])
    meta = json.loads(Path('data/x/meta.json').read_text())
    assert meta['end_of_text'] == ours.end_of_text is not None
    assert meta['tokenizer'] == 'published' and meta['vocab_size'] == theirs.get_vocab_size()
    bins = read_bins(Path('data/x'))
    # Each document is the next one of a split.
    for story in STORIES:
        row = [*library_ids(theirs, story), ours.end_of_text]
        split = 'train' if bins['train'][: len(row)] == row else 'val'
        assert bins[split][: len(row)] == row
        del bins[split][: len(row)]
    assert bins == {'train': [], 'val': []}

    # A single text has no end.
    prepare(run, layouts[name], text=''.join(STORIES))
    text = ''.join(STORIES)
    cut = int(0.9 * len(text))
    expected = {'train': library_ids(theirs, text[:cut]), 'val': library_ids(theirs, text[cut:])}
    assert read_bins(Path('data/x')) == expected


@pytest.mark.parametrize('name', LAYOUTS)
def test_a_checkpoint_has_the_published_files(layouts, run, tmp_path, name):
    source = layouts[name]
    if name == 'llama3':
        source = write_folder(tmp_path / 'published', source, MORE_FILES)
    prepare(run, source)
    result = run('train.py', '--dataset=x', '--max_iters=3', *TINY)
    assert result.code == 0, result.err
    checkpoint = Path('out/step_00000003')
    published = tokenizer_files(source)
    for folder in (Path('data/x'), checkpoint):
        files = tokenizer_files(folder)
        if 'tokenizer_config.json' not in published:
            del files['tokenizer_config.json']
        assert files == published

    theirs = AutoTokenizer.from_pretrained(checkpoint)
    ours = tk.load(checkpoint)
    texts = random_texts(100, SPECIAL)
    expected = [ids.tolist() for ids in ours.encode_batch(texts)]
    assert theirs(texts, add_special_tokens=False)['input_ids'] == expected
    eos = {theirs.eos_token_id, ours.end_of_text}
    for file in ('config.json', 'generation_config.json'):
        eos.add(json.loads((checkpoint / file).read_text())['eos_token_id'])
    assert len(eos) == 1 and None not in eos


def test_another_tokenizer_leaves_no_stale_file(layouts, run, tmp_path):
    rich = write_folder(tmp_path / 'published', layouts['llama3'], MORE_FILES)
    prepare(run, rich)
    assert tokenizer_files(Path('data/x')).keys() == {'tokenizer.json', *MORE_FILES}
    prepare(run, layouts['plain'])
    files = tokenizer_files(Path('data/x'))
    assert files.keys() == {'tokenizer.json', 'tokenizer_config.json'}
    assert files['tokenizer.json'] == (layouts['plain'] / 'tokenizer.json').read_bytes()
    assert b'kept' not in files['tokenizer_config.json']
    prepare(run, 'byte')
    assert Path('data/x/tokenizer.json').read_bytes() == tk.build('byte').files['tokenizer.json']


# -----------------------------------------------------------------------------
# long documents, cut into pieces

JOINTS = (' ', ' ', '\n', '  ', ' \n ', ' [CHAPTER I] ', 'e\u0301', 'aaaaa')


def long_text(seed):
    """A text with many places to cut, some of them inside a token or beside white space."""
    rng = random.Random(seed)
    parts = ['Begin']
    while len(parts) < 1500:
        source = rng.choice([ENGLISH, *SCRIPTS])
        start = rng.randrange(len(source))
        parts.append(source[start : start + rng.randrange(1, 30)])
        parts.append(rng.choice(JOINTS))
    return ''.join(parts)


@pytest.mark.parametrize('name', LAYOUTS)
def test_pieces_have_the_ids_of_the_whole_document(layouts, monkeypatch, tmp_path, name):
    monkeypatch.setattr(documents, 'PIECE', 300)
    monkeypatch.setattr(sources, 'PIECE', 300)
    ours = tk.load(layouts[name])
    monkeypatch.setattr(ours, 'find_changes', lambda *args: {})  # of few_bytes
    theirs = open_library(layouts[name])
    path = tmp_path / 'long.txt'
    for seed in range(3):
        texts = [long_text(seed), 'Short.\n', long_text(-seed)]
        path.write_text(f'\n{tk.END_OF_TEXT}\n'.join(texts), newline='')
        texts = [text + '\n' for text in texts[:2]] + texts[2:]
        divided = (('train', *piece) for piece in sources.read_text(sources.local_source(path)))
        pieces = list(documents.join_pieces(divided, ours))
        assert ''.join(text for _, text, _ in pieces) == ''.join(texts)
        assert [ends for _, _, ends in pieces].count(True) == 3
        if name == 'llama2':  # each piece would begin with a space of its own
            assert len(pieces) == 3
        elif name in LOSSLESS:
            assert len(pieces) > 25

        batches = ((split, batch) for split, batch, _ in documents.in_batches(iter(pieces)))
        encoded = documents.encode_all(batches, ours, ours.end_of_text, '<u4', n_threads=2)
        ids = [id for _, _, _, batch, *_ in encoded for id in batch.tolist()]
        expected = []
        for text in texts:
            expected += [*library_ids(theirs, text), ours.end_of_text]
        assert ids == expected


# -----------------------------------------------------------------------------
# what a tokenizer changes


def refused(run, folder, text, *words):
    """Prepare a text that is refused in one sentence with these words, and nothing is written."""
    result = prepare(run, folder, text=text, code=1)
    assert result.is_one_sentence, result.err
    for word in words:
        assert word in result.err, result.err
    assert not Path('data').exists() or not list(Path('data').iterdir())


def test_bytes_without_a_token_are_refused(layouts, run):
    text = ENGLISH[:3000] + 'Ethiopic: \u1200.\n' + ENGLISH[3000:6000]
    refused(run, layouts['few_bytes'], text, 'would lose text', "'Ethiopic: \u1200.\\n")
    # Also where it is in the last of many documents.
    text = f'Short.\n{tk.END_OF_TEXT}\n' * 1000 + 'ends with \u1200'
    refused(run, layouts['few_bytes'], text, "'ends with \u1200'")


CHANGES = {  # layout: (a text, how it comes back, what is done to it, how often in one text)
    'qwen': ('cafe\u0301', 'caf\u00e9', tk.NORMALIZED, 1),
    'lowercase': ('ＡＢ', 'ab', tk.NORMALIZED, 1),
    'prefix_space': ('One', ' One', tk.SPACE, 1),
    'unigram': ('\u1200, \u1200', '<unk>, <un', tk.UNKNOWN, 2),
    'llama2': ('a\u2581b', 'a b', tk.NORMALIZED, 1),
}


@pytest.mark.parametrize('name', CHANGES)
def test_a_change_is_noted_once_with_its_count(layouts, run, name):
    before, after, what, count = CHANGES[name]
    unchanged = ' as it is' if name == 'prefix_space' else 'as it is'
    rows = [json.dumps({'text': text}) for text in [unchanged, before] * 10]
    Path('x.jsonl').write_text('\n'.join(rows))
    result = run('prepare.py', '--input=x.jsonl', f'--tokenizer={layouts[name]}')
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    pairs = itertools.pairwise(lines)  # a note has two lines
    notes = [f'{a} {b}' for a, b in pairs if 'Note: the tokenizer' in a]
    example = f'first, {before!r} comes back from its ids as {after!r}.'
    assert notes == [f'Note: the tokenizer {what}, {10 * count} times; {example}']


@pytest.mark.parametrize('name', LAYOUTS)
def test_what_is_not_changed_has_no_note(layouts, run, monkeypatch, name):
    # is noted, though the document as a whole is as it was.
    monkeypatch.setattr(documents, 'PIECE', 300)
    monkeypatch.setattr(sources, 'PIECE', 300)
    text = 'and so, my lord, and so it is.\n' * 100
    result = prepare(run, layouts[name], text=text)
    notes = [line for line in result.out.splitlines() if 'Note: the tokenizer' in line]
    if name == 'prefix_space':
        # That of the training split and that of the validation split.
        assert len(notes) == 1 and tk.SPACE in notes[0] and ', 2 times' in notes[0]
    else:
        assert not notes


@pytest.mark.parametrize(
    ('name', 'token'), [('plain', '<|endoftext|>'), ('llama2', '</s>'), ('unigram', '</s>')]
)
def test_special_tokens_in_a_text_are_no_loss(layouts, run, name, token):
    # refused, though nothing is lost. It is to be a note, as for the space before a text.
    text = f'one of them: {token} and two of them: {token}{token}end\n' * 20
    result = prepare(run, layouts[name], text=text)
    assert result.out.count('Note: the tokenizer') == (name != 'plain')


def test_a_space_after_a_special_token_is_no_loss(run, tmp_path):
    special = ('<|endoftext|>', '<|sep|>')
    library = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True), special=special)
    library.save('tokenizer.json')
    result = prepare(run, tmp_path, text='a question<|sep|>an answer\n' * 20)
    assert result.out.count('Note: the tokenizer') == 1


def words_only(unknown=None):
    """A tokenizer that forgets all white space, and what its vocabulary lacks."""
    vocabulary = {'</s>': 0, 'a': 1, 'so': 2, 'it': 3, 'is': 4}
    if unknown:
        vocabulary[unknown] = 5
    library = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown or '<unk>'))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return library


def test_a_tokenizer_that_loses_white_space_is_refused(run, tmp_path):
    words_only(unknown='<unk>').save('tokenizer.json')
    refused(run, tmp_path, 'so it is\n  so it is\n' * 50, 'would lose text')


def test_unknown_words_do_not_hide_lost_white_space(run, tmp_path):
    words_only(unknown='<unk>').save('tokenizer.json')
    text = 'so it is\n  so it is, my lord\n' * 50
    refused(run, tmp_path, text, 'would lose text')


def test_what_the_library_cannot_encode_is_refused(layouts, run, tmp_path):
    words_only().save('tokenizer.json')
    refused(run, tmp_path, 'so it is my lord\n' * 50, 'Missing [UNK] token')


# -----------------------------------------------------------------------------
# damaged and hostile files


def set_id(id):
    """A change of a tokenizer.json: one of its tokens gets this id."""

    def change(contents):
        contents['model']['vocab']['A'] = id

    return change


def set_added_id(contents):
    contents['added_tokens'][0]['id'] = -1


def clear_vocabulary(contents):
    contents['model'] |= {'vocab': {}, 'merges': []}
    contents |= {'added_tokens': [], 'post_processor': None}


def break_pattern(contents):
    contents['pre_tokenizer']['pretokenizers'][0]['pattern']['Regex'] = '(a'


def add_merge(contents):
    contents['model']['merges'].append(['not there', 'either'])


DAMAGES = {  # what is done to tokenizer.json, or what it is instead
    'two tokens with one id': set_id(7),
    'an id of 10**15': set_id(10**15),
    'an id of 2**32 - 1': set_id(2**32 - 1),
    'an id of 2**24': set_id(2**24),
    'an id below 0': set_id(-1),
    'an id that is a text': set_id('7'),
    'an added id below 0': set_added_id,
    'an empty vocabulary': clear_vocabulary,
    'a broken pattern': break_pattern,
    'a merge of unknown tokens': add_merge,
    'an empty file': b'',
    'not UTF-8': '{"model": "é"}'.encode('latin-1'),
    'UTF-16': '{"model": {}}'.encode('utf-16'),
    'cut short': b'{"version": "1.0", "model": {"vocab"',
    'a list': b'[]',
    'null': b'null',
    'no model': b'{"version": "1.0"}',
    'deep lists': b'[' * 200_000 + b']' * 200_000,
    'deep objects': b'{"model":' * 200_000 + b'1' + b'}' * 200_000,
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_tokenizer_is_one_sentence(layouts, run, tmp_path, damage):
    change = DAMAGES[damage]
    if callable(change):
        contents = json.loads((layouts['llama3'] / 'tokenizer.json').read_text())
        change(contents)
        change = json.dumps(contents).encode()
    path = tmp_path / 'tokenizer.json'
    path.write_bytes(change)
    refused(run, tmp_path, 'a text\n' * 100, str(path))


def name_nobody(contents):
    contents['post_processor']['special_tokens'] = {}


def break_charsmap(contents):
    contents['normalizer'] = {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}


def begin_with_nothing(contents):
    contents['post_processor']['special_tokens']['<|begin_of_text|>']['ids'] = [10**6]


@pytest.mark.parametrize('change', [name_nobody, break_charsmap, begin_with_nothing])
def test_what_the_library_panics_at_is_one_sentence(layouts, run, tmp_path, change):
    # a prompt, and would be an index out of range when a text is generated.
    contents = json.loads((layouts['llama3'] / 'tokenizer.json').read_text())
    change(contents)
    path = tmp_path / 'tokenizer.json'
    path.write_text(json.dumps(contents))
    refused(run, tmp_path, 'a text\n' * 100, str(path))


def test_a_vocabulary_without_words_is_one_sentence(run, tmp_path):
    library = Tokenizer(models.WordLevel({'</s>': 0, 'so': 1}, unk_token='<unk>'))
    library.save('tokenizer.json')
    refused(run, tmp_path, 'a text\n' * 100, 'Missing [UNK] token')


NOT_OBJECTS = {
    'cut short': b'{"eos_token"',
    'empty': b'',
    'a list': b'[1, 2]',
    'a text': b'"eos_token"',
    'null': b'null',
    'not UTF-8': b'{"eos_token": "\xe9"}',
    'deep': b'[' * 200_000,
}


@pytest.mark.parametrize('damage', NOT_OBJECTS)
def test_a_damaged_file_beside_it_is_named(layouts, run, tmp_path, damage):
    # damaged.
    shutil.copy(layouts['llama3'] / 'tokenizer.json', tmp_path)
    for name in ('tokenizer_config.json', 'special_tokens_map.json', 'config.json'):
        path = tmp_path / name
        path.write_bytes(NOT_OBJECTS[damage])
        refused(run, tmp_path, 'a text\n' * 100, f'{path} ')
        path.unlink()


NO_TOKENS = (7, -1, True, None, [], {}, ['</s>'], {'content': 7}, '', '<not there>')


@pytest.mark.parametrize('name', ['tokenizer_config.json', 'special_tokens_map.json'])
def test_an_end_that_is_no_token_is_passed_over(layouts, tmp_path, name):
    shutil.copy(layouts['llama3'] / 'tokenizer.json', tmp_path)
    for value in NO_TOKENS:
        contents = {f'{role}_token': value for role in ('bos', 'eos', 'pad', 'unk')}
        (tmp_path / name).write_text(json.dumps(contents))
        assert tk.load(tmp_path).special_ids == {'bos': 0, 'eos': 1}


NO_IDS = (-1, 10**9, 1.5, '2', True, None, [], {}, [None], ['2'], [[2]])


@pytest.mark.parametrize('value', NO_IDS, ids=repr)
def test_an_id_that_no_token_has_is_passed_over(layouts, tmp_path, value):
    # taken for 1.
    shutil.copy(layouts['llama3'] / 'tokenizer.json', tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps({'eos_token_id': value}))
    special = tk.load(tmp_path).special_ids
    assert special == {'bos': 0, 'eos': 1} and type(special['eos']) is int


@pytest.mark.parametrize('name', ['llama3', 'llama2', 'unigram'])
def test_random_damage_is_a_sentence(layouts, tmp_path, name):
    rng = random.Random(name)
    whole = (layouts[name] / 'tokenizer.json').read_bytes()
    path = tmp_path / 'tokenizer.json'
    outcomes = []
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 3)):
            # Most of the file is vocabulary; the beginning and the end say what is done with it.
            at = rng.choice([rng.randrange(2000), rng.randrange(len(data))])
            length = rng.choice([0, 1, 1, 3, 50])
            data[at : at + length] = rng.choice([b'', b'0', b'9', b'-', b'"', b'null', b'{}', b'x'])
        path.write_bytes(data)
        try:
            tk.load(tmp_path)
            outcomes.append('loaded')
        except UserError as error:
            outcomes.append(str(error).split()[0])
    assert set(outcomes) == {'loaded', str(path)}
    assert min(outcomes.count(outcome) for outcome in set(outcomes)) > 3


# -----------------------------------------------------------------------------
# the end of a text

# Files that name the third token of the layout llama3.
THIRD = '<|eot_id|>'
OBJECT = {'__type': 'AddedToken', 'content': THIRD, 'lstrip': False}
NAMED = {
    'a text': {'tokenizer_config.json': {'eos_token': THIRD}},
    'an object': {'tokenizer_config.json': {'eos_token': OBJECT}},
    'a text in the map': {'special_tokens_map.json': {'eos_token': THIRD}},
    'an object in the map': {'special_tokens_map.json': {'eos_token': {'content': THIRD}}},
    'the map is the second choice': {
        'tokenizer_config.json': {'eos_token': THIRD, 'added_tokens_decoder': {}},
        'special_tokens_map.json': {'eos_token': '<|end_of_text|>'},
    },
    'the map is the first choice in older folders': {
        'tokenizer_config.json': {'eos_token': '<|end_of_text|>'},
        'special_tokens_map.json': {'eos_token': THIRD},
    },
    'an id': {'config.json': {'eos_token_id': 2}},
    'the first id': {'config.json': {'eos_token_id': [2, 1]}},
    'the model is the third choice': {
        'special_tokens_map.json': {'eos_token': THIRD},
        'config.json': {'eos_token_id': 1},
    },
    'the model, where the others are silent': {
        'tokenizer_config.json': {'eos_token': None},
        'special_tokens_map.json': {'pad_token': '<|end_of_text|>'},
        'config.json': {'eos_token_id': 2},
    },
}


@pytest.mark.parametrize('where', NAMED)
def test_the_end_of_text_is_found_and_stays(layouts, run, tmp_path, where):
    # forgotten in data/NAME, and the checkpoint gets another eos than the .bin files have.
    folder = write_folder(tmp_path / 'published', layouts['llama3'], NAMED[where])
    assert tk.load(folder).end_of_text == 2
    named = AutoTokenizer.from_pretrained(folder).eos_token_id
    assert named in (2, None)
    prepare(run, folder)
    bins = read_bins(Path('data/x'))
    assert bins['train'][-1] == bins['val'][-1] == 2
    assert json.loads(Path('data/x/meta.json').read_text())['end_of_text'] == 2

    result = run('train.py', '--dataset=x', '--max_iters=1', *TINY)
    assert result.code == 0, result.err
    checkpoint = Path('out/step_00000001')
    assert tk.load(checkpoint).end_of_text == 2
    for file in ('config.json', 'generation_config.json'):
        assert json.loads((checkpoint / file).read_text())['eos_token_id'] == 2


WELL_KNOWN = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '<|im_end|>', '<|eot_id|>')


@pytest.mark.parametrize('name', WELL_KNOWN)
def test_well_known_ends_are_known(layouts, run, tmp_path, name):
    text = (layouts['llama3'] / 'tokenizer.json').read_text()
    # The last one is in the vocabulary already.
    text = text.replace('<|eot_id|>', '<|other|>').replace('<|end_of_text|>', name)
    (tmp_path / 'tokenizer.json').write_text(text)
    prepare(run, tmp_path)
    assert read_bins(Path('data/x'))['train'][-1] == 1


def test_documents_without_an_end_are_refused(layouts, run, tmp_path):
    text = (layouts['plain'] / 'tokenizer.json').read_text()
    (tmp_path / 'tokenizer.json').write_text(text.replace(tk.END_OF_TEXT, '<|other|>'))
    text = f'One.\n{tk.END_OF_TEXT}\nTwo.\n'
    refused(run, tmp_path, text, 'has no end-of-text to end documents')
    prepare(run, tmp_path, text='A single text has no end.\n')
    assert json.loads(Path('data/x/meta.json').read_text())['end_of_text'] is None


# -----------------------------------------------------------------------------
# prompts, and text that streams


def stream(tokenizer, prompt, ids, **options):
    """The pieces of a text that continues a prompt, the rest last."""
    text = TextStream(tokenizer, prompt=prompt, **options)
    pieces = [text.add(id) for id in ids]
    pieces.append(text.close('length'))
    assert ''.join(pieces) == text.text
    return pieces


@pytest.mark.parametrize('name', LAYOUTS)
def test_a_stream_is_the_decoded_text_without_its_prompt(layouts, name):
    # end may begin inside a character, and then all bytes after it are taken for invalid.
    ours = tk.load(layouts[name])
    theirs = open_library(layouts[name])
    decode = partial(theirs.decode, skip_special_tokens=False)
    rng = random.Random(name)
    n_streams = 0
    for text in random_texts(400, SPECIAL):
        ids = library_ids(theirs, text)
        cut = rng.randrange(len(ids) + 1)
        prompt = decode(ids[:cut])
        whole = decode(ids)
        if '\ufffd' in whole + prompt or not whole.startswith(prompt):
            continue  # cut inside a character
        n_streams += 1
        pieces = stream(ours, ids[:cut], ids[cut:])
        assert ''.join(pieces) == whole[len(prompt) :]
        assert '\ufffd' not in ''.join(pieces)
        assert not pieces[-1], 'nothing complete is held back'
    assert n_streams > 100


@pytest.mark.parametrize('name', ['plain', 'llama3', 'qwen', 'neox', 'unigram'])
def test_any_tokens_stream_as_they_are_decoded(layouts, name):
    """Also what is no text: bytes of halves of characters, special tokens."""
    ours = tk.load(layouts[name])
    theirs = open_library(layouts[name])
    decode = partial(theirs.decode, skip_special_tokens=False)
    rng = random.Random(name)
    prompt = library_ids(theirs, 'O Romeo, naïve 日本')
    for _ in range(300):
        ids = [rng.randrange(theirs.get_vocab_size()) for _ in range(rng.randrange(20))]
        expected = decode(prompt + ids)[len(decode(prompt)) :]
        assert ''.join(stream(ours, prompt, ids)) == expected


@pytest.mark.parametrize('name', ['llama2', 'unigram'])
def test_the_space_of_the_first_generated_word_is_kept(layouts, name):
    ours = tk.load(layouts[name])
    words = ours.encode_prompt('and so, and')
    for prompt in ('romeo', 'romeo and', 'a' * 30, '</s>'):
        pieces = stream(ours, ours.encode_prompt(prompt), words)
        assert ''.join(pieces) == ' and so, and'


def test_an_id_without_a_token_does_not_eat_a_space(layouts):
    # word after it is taken for the first one, which loses its space.
    ours = tk.load(layouts['unigram'])
    ids = [ours.n_vocab + 5, *ours.encode_prompt('and so')]
    assert ''.join(stream(ours, ours.encode_prompt('romeo'), ids)) == ' and so'


def test_stop_ids_end_a_stream(layouts):
    for name, ends in (('llama3', {1, 2}), ('llama2', {2}), ('unigram', {1})):
        ours = tk.load(layouts[name])
        prompt = ours.encode_prompt('romeo')
        answer = ours.encode_prompt('and so')
        expected = ours.decode(prompt + answer).removeprefix('romeo')
        for end in ends:
            text = TextStream(ours, stop_ids=ends, prompt=prompt)
            pieces = [text.add(id) for id in [*answer, end, *answer]]
            assert (text.text, text.finish) == (expected, 'end_of_text')
            assert text.tokens == len(answer) and ''.join(pieces) == expected


PREFIXES = {'llama3': ('<|begin_of_text|>', 0), 'llama2': ('<s>', 1)}


@pytest.mark.parametrize('name', LAYOUTS)
def test_a_prompt_begins_as_the_library_begins_it(layouts, name):
    ours = tk.load(layouts[name])
    theirs = open_library(layouts[name])
    for text in random_texts(100, SPECIAL):
        if text.startswith(PREFIXES.get(name, ('nothing',))[0]):
            continue
        expected = theirs.encode(text).ids or [ours.end_of_text]
        assert encode_prompt(ours, text, 10**6) == expected


@pytest.mark.parametrize('name', PREFIXES)
def test_a_beginning_is_put_before_a_prompt_once(layouts, name):
    ours = tk.load(layouts[name])
    text, id = PREFIXES[name]
    assert ours.prefix == [id]
    for prompt in ('Romeo', f'{text}Romeo'):
        ids = encode_prompt(ours, prompt, 100)
        assert ids[0] == id and ids.count(id) == 1
        assert ids[1:] == ours.encode_prompt(prompt.removeprefix(text))
    assert encode_prompt(ours, f'{text}{text}', 100) == [id, id]
    assert encode_prompt(ours, '', 100) == [id]
    # A chat template says itself how a text begins.
    assert encode_prompt(ours, 'Romeo', 100, is_chat=True) == ours.encode_prompt('Romeo')


def test_special_tokens_in_a_prompt_are_those_tokens(layouts):
    prompts = {
        'llama3': ('a<|eot_id|>b<|end_of_text|>', {2: 1, 1: 1}),
        'plain': ('<|endoftext|><|endoftext|>a', {0: 2}),
        'llama2': ('a</s><s>b</s>', {1: 2, 2: 2}),
        'lowercase': ('A</s>B</S>', {2: 1}),  # the last is no special token
    }
    for name, (prompt, counts) in prompts.items():
        ids = encode_prompt(tk.load(layouts[name]), prompt, 100)
        assert {id: ids.count(id) for id in counts} == counts


# -----------------------------------------------------------------------------
# chat

QWEN = """
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLAMA = """
{% if messages[0]['role'] == 'system' %}
{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}
{% set rest = messages %}{% set system = false %}
{% endif %}
{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.index0 == 0 and system != false %}
{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}
{% else %}
{% set content = message['content'] %}
{% endif %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ ' '  + content.strip() + ' ' + eos_token }}
{% endif %}
{% endfor %}
"""
MODERN = """
{{- bos_token }}{% set state = namespace(users=0, last='') %}
Today: {{ strftime_now('%d %b %Y') }}{{ strftime_now("%A") }}
{% for message in messages %}
  {% if message.role == 'system' %}
    {% continue %}
  {% endif %}
  {% if message.role == 'user' %}{% set state.users = state.users + 1 %}{% endif %}
  {%- set state.last = message['content'] | trim %}
  {{ message | tojson }}
  {{ message | tojson(indent=2) }}
  {% if state.users > 1 %}
    {% break %}
  {% endif %}
{% endfor %}
{{ state.users }} {{ state.last | upper }}{% if tools %}with tools{% endif %}
{%- macro render(text) %}[{{ text }}]{% endmacro %}
{{ render(messages | length) }}{{ messages | map(attribute='role') | join(',') }}
"""
GENERATION = """
{% for message in messages %}
{% if message.role == 'assistant' %}
    {% generation %}
    {{ message.content }}{{ eos_token }}
    {% endgeneration %}
{% else %}
<|{{ message.role }}|>
    {%- generation %} {{ message.content }} {% endgeneration -%}
    {%- generation -%} it is {%- endgeneration -%}
{% endif %}
{% endfor %}
"""
# Models say so where there may be tools: transformers always gives them, as none.
TOOLS = '{% if tools is not none %}{{ tools | length }} tools{% endif %}{{ messages[0].content }}'
TEMPLATES = {
    'chatml': CHATML,
    'qwen': QWEN,
    'llama': LLAMA,
    'modern': MODERN,
    'generation': GENERATION,
    'tools': TOOLS,
}
USER = {'role': 'user', 'content': ' Who is <Romeo> & "Juliet"? 今天\n\n'}
ASSISTANT = {'role': 'assistant', 'content': 'Two of Verona.  '}
SYSTEM = {'role': 'system', 'content': "Speak as in 'Hamlet'."}
CONVERSATIONS = (
    [USER],
    [SYSTEM, USER],
    [SYSTEM, USER, ASSISTANT, USER],
    [USER, ASSISTANT, USER, ASSISTANT, USER],
)
NAMES = {'bos_token': '<|begin_of_text|>', 'eos_token': THIRD}


def chat_folder(layouts, folder, template, name='tokenizer_config.json', **more):
    """A folder with a chat template in one of the files that may have it."""
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', **NAMES, **more}
    files = {'tokenizer_config.json': config}
    if name == 'chat_template.jinja':
        files[name] = template
    elif name == 'chat_template.json':
        files[name] = {'chat_template': template}
    else:
        config['chat_template'] = template
    return write_folder(folder, layouts['llama3'], files)


def rendered_by_transformers(folder, messages):
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize('name', TEMPLATES)
@pytest.mark.parametrize('file', ['tokenizer_config.json', 'chat_template.jinja'])
def test_chats_are_those_of_transformers(layouts, tmp_path, name, file):
    # around other tags. FAILS for tools, which transformers always gives, as none.
    folder = chat_folder(layouts, tmp_path / 'chat', TEMPLATES[name], file)
    ours = tk.load(folder)
    for messages in CONVERSATIONS:
        theirs = rendered_by_transformers(folder, messages)
        assert tk.render_chat(ours, messages) == theirs


def test_the_default_of_several_templates_is_used(layouts, tmp_path):
    named = [{'name': 'rag', 'template': 'no'}, {'name': 'default', 'template': CHATML}]
    folder = chat_folder(layouts, tmp_path / 'chat', named)
    ours = tk.load(folder)
    theirs = rendered_by_transformers(folder, [USER])
    assert tk.render_chat(ours, [USER]) == theirs and '<|im_start|>user' in theirs


def test_a_template_has_the_tokens_of_the_map(layouts, tmp_path):
    files = {'special_tokens_map.json': NAMES, 'chat_template.jinja': LLAMA}
    files['tokenizer_config.json'] = {'tokenizer_class': 'PreTrainedTokenizerFast'}
    folder = write_folder(tmp_path / 'chat', layouts['llama3'], files)
    theirs = rendered_by_transformers(folder, [USER])
    assert '<|begin_of_text|>[INST]' in theirs
    assert tk.render_chat(tk.load(folder), [USER]) == theirs


def test_a_template_in_a_file_of_its_own_is_used(layouts, tmp_path):
    folder = chat_folder(layouts, tmp_path / 'chat', 'in JSON', 'chat_template.json')
    assert tk.render_chat(tk.load(folder), [USER]) == 'in JSON'
    # A newer folder has it as a text, and that comes first.
    (folder / 'chat_template.jinja').write_text('in a file{{ messages[0].content }}')
    theirs = rendered_by_transformers(folder, [USER])
    assert tk.render_chat(tk.load(folder), [USER]) == theirs == 'in a file' + USER['content']


def test_a_template_survives_preparing_and_training(layouts, run, tmp_path):
    folder = chat_folder(layouts, tmp_path / 'chat', LLAMA, 'chat_template.jinja')
    prepare(run, folder)
    assert run('train.py', '--dataset=x', '--max_iters=1', *TINY).code == 0
    checkpoint = Path('out/step_00000001')
    expected = tk.render_chat(tk.load(folder), [SYSTEM, USER])
    assert tk.render_chat(tk.load(checkpoint), [SYSTEM, USER]) == expected
    assert rendered_by_transformers(checkpoint, [SYSTEM, USER]) == expected


REFUSED = {  # template: words of the sentence
    LLAMA: 'roles must alternate',
    "{{ ''.__class__.__mro__ }}": 'unsafe',
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": 'unsafe',
    "{{ messages.append('x') }}": 'unsafe',
    "{{ cycler.__init__.__globals__['os'].system('true') }}": 'unsafe',
    '{{ messages.x.y }}': 'has no attribute',
    '{% for message in messages %}': 'end of template',
    '{{ nothing() }}': 'undefined',
}


@pytest.mark.parametrize('template', REFUSED)
def test_a_template_that_cannot_be_used_is_refused(layouts, tmp_path, template):
    folder = chat_folder(layouts, tmp_path / 'chat', template)
    with pytest.raises(UserError, match='chat template cannot be used') as caught:
        tk.render_chat(tk.load(folder), [USER, USER])
    assert REFUSED[template] in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'template',
    [
        "{{ messages[0]['content'] + 1 }}",
        '{{ 1 / 0 }}',
        '{{ messages | tojson(indent=x) }}',
        '{{ range(10 ** 6) | list }}',
        '{{ messages[0].content.join(7) }}',
        '{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}',
        '{% include "tokenizer.json" %}',
        7,
        [{'name': 'default'}],
        ['x'],
    ],
)
def test_whatever_a_template_raises_is_a_sentence(layouts, tmp_path, template):
    folder = chat_folder(layouts, tmp_path / 'chat', template)
    with pytest.raises(UserError, match='chat template'):
        tk.render_chat(tk.load(folder), [USER])


def test_no_template_is_one_sentence(layouts, tmp_path):
    named = [{'name': 'rag', 'template': 'x'}]
    for number, template in enumerate((None, '', [], named)):
        folder = chat_folder(layouts, tmp_path / str(number), template)
        with pytest.raises(UserError, match='has no chat template'):
            tk.render_chat(tk.load(folder), [USER])
    with pytest.raises(UserError, match='has no chat template'):
        tk.render_chat(tk.build('byte'), [USER])

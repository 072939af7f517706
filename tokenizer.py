"""Four ways to build one thing, a `tiktoken.Encoding`; and how it is saved and loaded.

    gpt2    GPT-2's 50,257 tokens (tiktoken downloads them once and caches them)
    bpe     a byte-pair encoding trained on your own text, in a second or two
    char    one token per character, those of your text only
    byte    one token per UTF-8 byte, 256 of them

A tokenizer is saved as `tokenizer.json` in the format of Hugging Face's `tokenizers`, and opens
there too.
"""

import itertools
import json
import os

import rustbpe
import tiktoken

from runtime import UserError

END_OF_TEXT = '<|endoftext|>'
KINDS = ('gpt2', 'bpe', 'char', 'byte')

# How a text is cut into pieces before any merge; every character falls into exactly one piece.
ONE_CHARACTER = r'[\s\S]'
WORDS = '|'.join((
    r'[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+',  # a word of any script, one space or mark before it
    r'\p{N}{1,3}',  # digits, by threes
    r' ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*',  # punctuation, and the line end after it
    r'\s*[\r\n]+',  # blank lines
    r'\s+(?!\S)',  # other spaces, but the one that belongs to the next word
    r'\s+',
))
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Bytes as printable characters, as in GPT-2's published vocabulary: printable Latin-1 stands for
# itself, the other bytes are counted up from U+0100.
_printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_others = [byte for byte in range(256) if byte not in _printable]
BYTE_TO_CHAR = {byte: chr(byte) for byte in _printable}
BYTE_TO_CHAR.update({byte: chr(0x100 + i) for i, byte in enumerate(_others)})
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


# -----------------------------------------------------------------------------
# build


def build(kind, texts=(), vocab_size=None, end_of_text=True):
    """Make a new tokenizer of the given kind, or load the one saved in a folder of that name.

    texts: documents (strings) to make a `bpe` or `char` vocabulary from; other kinds need none.
    vocab_size: of a `bpe` vocabulary, end-of-text included; it gets smaller if the texts have no
        more pairs.
    end_of_text: whether a `char` vocabulary has that token (the other kinds always do).
    Raises UserError for an unknown kind, for a vocabulary too small, and when GPT-2's vocabulary is
    not cached and cannot be downloaded.
    """
    if kind == 'gpt2':
        return _download_gpt2()
    if kind == 'bpe':
        return _learn_bpe(texts, vocab_size)
    if kind == 'char':
        return _collect_alphabet(texts, end_of_text)
    if kind == 'byte':
        return _encoding(ONE_CHARACTER, {bytes([byte]): byte for byte in range(256)})
    if os.path.isdir(kind):
        return load(kind)
    kinds = ', '.join(KINDS)
    raise UserError(f"tokenizer='{kind}' is unknown. Choose one of: {kinds}, or a folder with one.")


def _download_gpt2():
    try:
        return tiktoken.get_encoding('gpt2')
    except (OSError, ValueError) as error:
        raise UserError(
            f"GPT-2's vocabulary is missing and could not be downloaded ({type(error).__name__}): "
            'go online once, set TIKTOKEN_CACHE_DIR to a folder with it, or use --tokenizer=bpe.'
        ) from None


def _learn_bpe(texts, vocab_size):
    if vocab_size < 257:
        raise UserError(f'vocab_size={vocab_size} is too low: 256 bytes and end-of-text make 257.')
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=WORDS)
    # The same bytes merged from two different pairs would be two ids: keep the first.
    tokens = dict.fromkeys(bytes(token) for token, _ in trainer.get_mergeable_ranks())
    return _encoding(WORDS, {token: i for i, token in enumerate(tokens)})


def _collect_alphabet(texts, end_of_text):
    alphabet = set(itertools.chain.from_iterable(texts))
    ranks = {char.encode(): i for i, char in enumerate(sorted(alphabet))}
    special = {END_OF_TEXT: len(ranks)} if end_of_text else {}
    return _encoding(ONE_CHARACTER, ranks, special)


def _encoding(pattern, ranks, special=None):
    """Make a tiktoken.Encoding, named after its kind.

    ranks: {bytes of a token: its id}. special: {text of a special token: its id}; None puts
    end-of-text after the others.
    """
    if special is None:
        special = {END_OF_TEXT: len(ranks)}
    name = _kind_of(pattern, ranks)
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _kind_of(pattern, ranks):
    """Recognize one of KINDS, also in a file; all others are 'published'."""
    if pattern == ONE_CHARACTER:
        return 'byte' if b'\xff' in ranks else 'char'  # no character is that byte
    if pattern == WORDS:
        return 'bpe'
    return 'gpt2' if len(ranks) == 50256 else 'published'


# -----------------------------------------------------------------------------
# use


def copy(tokenizer):
    """Make another one like it: threads that share one wait for each other in its regex."""
    return _encoding(tokenizer._pat_str, tokenizer._mergeable_ranks, tokenizer._special_tokens)


def same(a, b):
    """Tell whether two tokenizers have the same tokens under the same ids."""
    return (a._mergeable_ranks, a._special_tokens) == (b._mergeable_ranks, b._special_tokens)


def end_of_text_id(tokenizer):
    """Return the id of `<|endoftext|>`, or None."""
    return tokenizer._special_tokens.get(END_OF_TEXT)


def encode(tokenizer, text, special=frozenset()):
    """Return the ids of a text, (n,) uint32, which decode to the same bytes.

    `<|endoftext|>` in it is plain text unless `special` has it. Raises UserError for what could not
    be decoded: a lone surrogate, a character outside a `char` alphabet.
    """
    try:
        if tokenizer.name == 'char':
            _check_alphabet(tokenizer, text)
        return tokenizer.encode_to_numpy(text, allowed_special=special, disallowed_special=())
    except UnicodeEncodeError as error:
        surrogate = error.object[error.start]
        place = f'U+{ord(surrogate):04X} at character {text.index(surrogate):,}'
        raise UserError(f'the text has a lone surrogate {place}: clean it first.') from None


def _check_alphabet(tokenizer, text):
    unknown = [char for char in set(text) if char.encode() not in tokenizer._mergeable_ranks]
    if unknown:
        characters = 'character' if len(unknown) == 1 else 'characters'
        first = ' '.join(f'{char!r} (U+{ord(char):04X})' for char in sorted(unknown)[:5])
        raise UserError(f"{len(unknown)} {characters} outside the tokenizer's alphabet: {first}.")


# -----------------------------------------------------------------------------
# save


def save(tokenizer, folder):
    """Write tokenizer.json, which `load` and `tokenizers` read, and a config for `transformers`."""
    end_of_text = None if end_of_text_id(tokenizer) is None else END_OF_TEXT
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'bos_token': end_of_text,
        'eos_token': end_of_text,
        'clean_up_tokenization_spaces': False,
    }
    files = {'tokenizer.json': _to_json(tokenizer), 'tokenizer_config.json': config}
    for name, data in files.items():
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
            json.dump(data, file, ensure_ascii=False)


def _to_json(tokenizer):
    """Describe a tokenizer as the `tokenizers` library does."""
    ranks = tokenizer._mergeable_ranks
    regex = {'Regex': tokenizer._pat_str}
    split = {'type': 'Split', 'pattern': regex, 'behavior': 'Isolated', 'invert': False}
    options = {'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
    byte_level = {'type': 'ByteLevel', **options}
    vocab = {_to_chars(token): id for token, id in ranks.items()}
    merges = _list_merges(ranks)
    return {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': [_added(text, id) for text, id in tokenizer._special_tokens.items()],
        'normalizer': None,
        'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [split, byte_level]},
        'post_processor': None,
        'decoder': byte_level,
        'model': {'type': 'BPE', 'ignore_merges': True, 'vocab': vocab, 'merges': merges},
    }


def _added(text, id):
    matching = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
    return {'id': id, 'content': text, **matching, 'special': True}


def _list_merges(ranks):
    """List the pairs of tokens that may be merged, the first to be merged first.

    tiktoken merges any two neighbours whose bytes together are a token, so each such pair is here.
    """
    merges = []  # (id of both together, of the left, of the right, and the two as they are written)
    for token, id in ranks.items():
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in ranks and right in ranks:
                pair = [_to_chars(left), _to_chars(right)]
                merges.append((id, ranks[left], ranks[right], pair))
    return [pair for *_, pair in sorted(merges)]


def _to_chars(token):
    return ''.join(BYTE_TO_CHAR[byte] for byte in token)


# -----------------------------------------------------------------------------
# load


def load(folder):
    """Open the tokenizer.json of a folder: one that `save` wrote, or a published byte-level BPE.

    Raises UserError when there is none, or when it is something else.
    """
    path = os.path.join(folder, 'tokenizer.json')
    if not os.path.exists(path):
        raise UserError(f'There is no {path}: a tokenizer cannot be loaded from there.')
    try:
        with open(path, encoding='utf-8') as file:
            contents = json.load(file)
        return _from_json(contents)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f'{path} is not a byte-level BPE tokenizer: {error!r}.') from None


def _from_json(contents):
    """Make the tokenizer that a tokenizer.json describes. Other contents raise what they raise."""
    special = {token['content']: token['id'] for token in contents['added_tokens']}
    model = contents['model']
    vocab = {token: id for token, id in model['vocab'].items() if token not in special}
    ranks = {_to_bytes(token): id for token, id in vocab.items()}
    pattern = _read_pattern(contents['pre_tokenizer'])

    # tiktoken has no list of merges: it merges what makes the token with the lowest id.
    pairs = [merge.split(' ') if isinstance(merge, str) else merge for merge in model['merges']]
    merged_ids = [vocab[left + right] for left, right in pairs]
    if merged_ids != sorted(merged_ids):
        raise ValueError('its merges are not in the order of their ids')
    return _encoding(pattern, ranks, special)


def _read_pattern(pre_tokenizer):
    """Return the regex that cuts a text into pieces: a pre-tokenizer's, or the first one's."""
    splitter = pre_tokenizer.get('pretokenizers', [pre_tokenizer])[0]
    if splitter['type'] == 'Split':
        return splitter['pattern']['Regex']
    if splitter['type'] == 'ByteLevel':
        return GPT2_WORDS
    raise ValueError(f'its pre-tokenizer is {splitter["type"]}, not Split or ByteLevel')


def _to_bytes(token):
    return bytes(CHAR_TO_BYTE[char] for char in token)

"""Four ways to build one thing, a `tiktoken.Encoding`; and how it is saved and loaded.

    gpt2    GPT-2's 50,257 tokens (tiktoken downloads them once and caches them)
    bpe     a byte-pair encoding trained on your own text, in a second or two
    char    one token a character, those of your text only
    byte    one token a UTF-8 byte, 256 of them

A tokenizer is saved as `tokenizer.json` in the format of Hugging Face's `tokenizers`, and opens there too.
"""

import json
import os

import rustbpe
import tiktoken

END_OF_TEXT = '<|endoftext|>'
KINDS = ('gpt2', 'bpe', 'char', 'byte')

# How a text is cut into pieces before any merge; every character falls into exactly one piece.
ONE_CHARACTER = r'[\s\S]'
WORDS = '|'.join((
    r'[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+',  # a word of any script, with one space or mark before it
    r'\p{N}{1,3}',  # digits, by threes
    r' ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*',  # punctuation, and the line end after it
    r'\s*[\r\n]+',  # blank lines
    r'\s+(?!\S)',  # other spaces, but the one that belongs to the next word
    r'\s+',
))

GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Bytes as printable characters, as in GPT-2's published vocabulary: printable Latin-1 stands for itself, the
# other bytes are counted up from U+0100.
_printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_others = [byte for byte in range(256) if byte not in _printable]
BYTE_TO_CHAR = {byte: chr(byte) for byte in _printable} | {byte: chr(256 + i) for i, byte in enumerate(_others)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def build(kind, texts=(), vocab_size=None, end_of_text=True):
    """A new tokenizer of the given kind, or the one saved in a folder of that name.

    texts: the documents (strings) that a `bpe` or `char` vocabulary is made from; the other kinds need none.
    vocab_size: of a `bpe` vocabulary, end-of-text included; it gets smaller if the texts have no more pairs.
    end_of_text: whether a `char` vocabulary has that token (the other kinds always do).
    Raises ValueError for an unknown kind or a vocabulary too small, ConnectionError when GPT-2's vocabulary is
    not cached and cannot be downloaded.
    """
    if kind not in KINDS and os.path.isdir(kind):
        return load(kind)
    if kind == 'gpt2':
        try:
            return tiktoken.get_encoding('gpt2')
        except (OSError, ValueError) as error:
            raise ConnectionError(
                "GPT-2's vocabulary is not in tiktoken's cache and could not be downloaded "
                f'({type(error).__name__}). Connect to the internet once, point TIKTOKEN_CACHE_DIR at a folder '
                'that has it, or use --tokenizer=bpe.'
            ) from None
    if kind == 'byte':
        return _encoding(ONE_CHARACTER, {bytes([byte]): byte for byte in range(256)})
    if kind == 'char':
        alphabet = set()
        for text in texts:
            alphabet.update(text)
        ranks = {char.encode(): i for i, char in enumerate(sorted(alphabet))}
        return _encoding(ONE_CHARACTER, ranks, None if end_of_text else {})
    if kind == 'bpe':
        if vocab_size < 257:
            raise ValueError(f'vocab_size={vocab_size} is too small for bpe: 256 bytes and end-of-text make 257.')
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=WORDS)
        # The same bytes merged from two different pairs would be two ids: keep the first.
        tokens = dict.fromkeys(bytes(token) for token, _ in trainer.get_mergeable_ranks())
        return _encoding(WORDS, {token: i for i, token in enumerate(tokens)})
    raise ValueError(f"tokenizer='{kind}' is not known. Choose one of: {', '.join(KINDS)}, or a folder that has one.")


def _encoding(pattern, ranks, special=None):
    """ranks: {bytes of a token: its id}. special: likewise for texts; None puts end-of-text after the others."""
    if pattern == ONE_CHARACTER:
        name = 'byte' if all(bytes([byte]) in ranks for byte in range(256)) else 'char'
    else:
        name = 'bpe' if pattern == WORDS else 'gpt2' if len(ranks) == 50256 else 'published'
    special = {END_OF_TEXT: len(ranks)} if special is None else special
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def copy(tokenizer):
    """Another one like it: threads that use one and the same wait for each other in its regular expression."""
    return tiktoken.Encoding(
        tokenizer.name,
        pat_str=tokenizer._pat_str,
        mergeable_ranks=tokenizer._mergeable_ranks,
        special_tokens=tokenizer._special_tokens,
    )


def same(a, b):
    """Whether two tokenizers have the same tokens under the same ids."""
    return (a._mergeable_ranks, a._special_tokens) == (b._mergeable_ranks, b._special_tokens)


def end_of_text_id(tokenizer):
    """The id of `<|endoftext|>`, or None."""
    return tokenizer.encode_single_token(END_OF_TEXT) if END_OF_TEXT in tokenizer.special_tokens_set else None


def encode(tokenizer, text, special=frozenset()):
    """The ids of a text, (n,) uint32; `<|endoftext|>` in it is plain text unless `special` has it.

    Decoding gives back the same bytes.
    Raises ValueError for what cannot be given back: a lone surrogate, a character outside a `char` alphabet.
    """
    try:
        if tokenizer.name == 'char':
            unknown = [char for char in set(text) if char.encode() not in tokenizer._mergeable_ranks]
            if unknown:
                listed = ' '.join(f'{char!r} (U+{ord(char):04X})' for char in sorted(unknown)[:5])
                raise ValueError(
                    f"{len(unknown)} character{'s' * (len(unknown) > 1)} outside the tokenizer's alphabet: {listed}"
                    f'{" ..." if len(unknown) > 5 else ""}.'
                )
        return tokenizer.encode_to_numpy(text, allowed_special=special, disallowed_special=())
    except UnicodeEncodeError as error:
        place = text.index(error.object[error.start])
        raise ValueError(
            f'the text is not valid Unicode: a lone surrogate U+{ord(text[place]):04X} '
            f'at character {place:,}. Clean the text first.'
        ) from None


def save(tokenizer, folder):
    """Write tokenizer.json, which `load` and `tokenizers` read, and tokenizer_config.json for `transformers`."""
    ranks = tokenizer._mergeable_ranks
    vocab = {_printed(token): rank for token, rank in ranks.items()}
    # tiktoken merges any two neighbours whose bytes together are a token; a list of merges must name each such pair.
    merges = []
    if tokenizer._pat_str != ONE_CHARACTER:
        for token in sorted(ranks, key=ranks.get):
            pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
            pairs = [(left, right) for left, right in pairs if left in ranks and right in ranks]
            pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
            merges += [[_printed(left), _printed(right)] for left, right in pairs]
    eot = end_of_text_id(tokenizer)
    special = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
    whole = {'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
    split = {'type': 'Split', 'pattern': {'Regex': tokenizer._pat_str}, 'behavior': 'Isolated', 'invert': False}
    contents = {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': [{'id': id, 'content': text} | special for text, id in tokenizer._special_tokens.items()],
        'normalizer': None,
        'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [split, {'type': 'ByteLevel'} | whole]},
        'post_processor': None,
        'decoder': {'type': 'ByteLevel'} | whole,
        'model': {'type': 'BPE', 'ignore_merges': True, 'vocab': vocab, 'merges': merges},
    }
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'bos_token': None if eot is None else END_OF_TEXT,
        'eos_token': None if eot is None else END_OF_TEXT,
        'clean_up_tokenization_spaces': False,
    }
    for name, data in (('tokenizer.json', contents), ('tokenizer_config.json', config)):
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
            json.dump(data, file, ensure_ascii=False)


def load(folder):
    """The tokenizer in a folder's tokenizer.json: one that `save` wrote, or any published byte-level BPE.

    Raises FileNotFoundError, or ValueError when the file is something else.
    """
    path = os.path.join(folder, 'tokenizer.json')
    if not os.path.exists(path):
        raise FileNotFoundError(f'There is no {path}: a tokenizer cannot be taken from there.')
    try:
        with open(path, encoding='utf-8') as file:
            contents = json.load(file)
        special = {token['content']: token['id'] for token in contents['added_tokens']}
        vocab = {token: id for token, id in contents['model']['vocab'].items() if token not in special}
        ranks = {bytes(CHAR_TO_BYTE[char] for char in token): id for token, id in vocab.items()}
        splitter = contents['pre_tokenizer']
        splitter = splitter.get('pretokenizers', [splitter])[0]
        pattern = splitter['pattern']['Regex'] if splitter['type'] == 'Split' else GPT2_WORDS
        merges = [pair.split(' ') if isinstance(pair, str) else pair for pair in contents['model']['merges']]
        merged = [vocab[left + right] for left, right in merges]
        if splitter['type'] not in ('Split', 'ByteLevel') or merged != sorted(merged):
            raise ValueError('its merges are not in the order of their ids')
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f'{path} is not a byte-level BPE tokenizer ({type(error).__name__}: {error}).') from None
    return _encoding(pattern, ranks, special)


def _printed(token):
    return ''.join(BYTE_TO_CHAR[byte] for byte in token)

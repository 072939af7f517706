"""Text to token ids and back: vocabularies of our own, and published ones.

    gpt2              GPT-2's 50,257 tokens (tiktoken downloads them once and caches them)
    bpe               a byte-pair encoding trained on your own text, in a second or two
    char              one token per character, those of your text only
    byte              one token per UTF-8 byte, 256 of them
    a folder, or      a published tokenizer: a dataset, a model folder, or the name of a model on
    ORG/NAME          the Hugging Face Hub

Two classes have the same methods. OwnTokenizer is one of the first four, run by tiktoken.
PublishedTokenizer is whatever a tokenizer.json describes, run by Hugging Face's `tokenizers`. Both
keep their files as they were read and write them back byte for byte.
"""

import contextlib
import itertools
import json
import os
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
from tokenizers import Tokenizer

from runtime import UserError

END_OF_TEXT = '<|endoftext|>'
KINDS = ('gpt2', 'bpe', 'char', 'byte')
# A tokenizer's files in the layout of Hugging Face. Only the first must be there.
FILES = (
    'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
    'chat_template.jinja', 'chat_template.json', 'tokenizer.model', 'vocab.json', 'merges.txt',
)  # fmt: skip
# What ends a text, where a published tokenizer does not say.
ENDS = (END_OF_TEXT, '<|end_of_text|>', '</s>', '<eos>', '<|im_end|>', '<|eot_id|>')
BEGINNINGS = ('<|begin_of_text|>', '<s>', '<bos>')
MOST_TOKENS = 2**24  # of a vocabulary
MOST_CHECKED = 4096  # ids of a batch that are decoded again, of a tokenizer that cannot lose text
# What a published tokenizer may change in a text.
SPACE = 'puts a space before a text'
UNKNOWN = 'has no token for some characters'
NORMALIZED = 'normalizes the text, or white space at its special tokens'

# How a text is cut into pieces before any merge; every character falls into exactly one piece.
ONE_CHARACTER = r'[\s\S]'
WORDS = '|'.join((  # letter by letter that of Qwen3.5, which llama.cpp has, too
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",  # English contractions
    r'[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+',  # a word of any script, one space or mark before it
    r'\p{N}',  # digits, one by one
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
    """Make a new tokenizer of the given kind, or load a published one by its folder or name.

    texts: documents (strings) to make a `bpe` or `char` vocabulary from; other kinds need none.
    vocab_size: of a `bpe` vocabulary, end-of-text included; it gets smaller if the texts have no
        more pairs.
    end_of_text: whether a `char` vocabulary has that token (the other kinds always do).
    Raises UserError for an unknown kind, for a vocabulary too small, and for what is not cached and
    cannot be downloaded.
    """
    if kind == 'gpt2':
        return _download_gpt2()
    if kind == 'bpe':
        return _learn_bpe(texts, vocab_size)
    if kind == 'char':
        return _collect_alphabet(texts, end_of_text)
    if kind == 'byte':
        return OwnTokenizer(ONE_CHARACTER, {bytes([byte]): byte for byte in range(256)})
    if os.path.isdir(os.path.expanduser(kind)):
        return load(os.path.expanduser(kind))
    if '/' in kind:
        from model import find_pretrained  # here, since torch takes a second

        return load(find_pretrained(kind, with_weights=False))
    kinds = ', '.join(KINDS)
    raise UserError(
        f"tokenizer='{kind}' is unknown. Choose one of: {kinds}, a folder with one, or ORG/NAME of "
        'the Hugging Face Hub.'
    )


def _download_gpt2():
    try:
        published = tiktoken.get_encoding('gpt2')
    except (OSError, ValueError) as error:
        raise UserError(
            f"GPT-2's vocabulary is missing and could not be downloaded ({type(error).__name__}): "
            'go online once, set TIKTOKEN_CACHE_DIR to a folder with it, or use --tokenizer=bpe.'
        ) from None
    return OwnTokenizer(GPT2_WORDS, published._mergeable_ranks)


def _learn_bpe(texts, vocab_size):
    if vocab_size < 257:
        raise UserError(f'vocab_size={vocab_size} is too low: 256 bytes and end-of-text make 257.')
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=WORDS)
    # The same bytes merged from two different pairs would be two ids: keep the first.
    tokens = dict.fromkeys(bytes(token) for token, _ in trainer.get_mergeable_ranks())
    return OwnTokenizer(WORDS, {token: i for i, token in enumerate(tokens)})


def _collect_alphabet(texts, end_of_text):
    alphabet = set(itertools.chain.from_iterable(texts))
    ranks = {char.encode(): i for i, char in enumerate(sorted(alphabet))}
    special = {END_OF_TEXT: len(ranks)} if end_of_text else {}
    return OwnTokenizer(ONE_CHARACTER, ranks, special)


def load(folder, model_ids=None):
    """Open the tokenizer of a folder: a dataset, a checkpoint or a published model.

    model_ids: {'bos', 'eos', 'pad': id} of the model that it belongs to, where its own files name
    none; None: as the config.json in the folder has them. Raises UserError when there is no
    tokenizer, or a damaged file.
    """
    folder = Path(folder)
    path = folder / 'tokenizer.json'
    if not path.is_file():
        raise UserError(f'There is no {path}: a tokenizer cannot be loaded from there.')
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    names = _read_names(folder)
    if model_ids is None:
        model_ids = _read_model_ids(folder)
    try:
        contents = json.loads(files['tokenizer.json'])
        own = _read_own(contents, files)
        if own:
            return own
        with _library_errors():
            return PublishedTokenizer(contents, files, names, model_ids)
    except UserError as error:
        raise UserError(f'{path} cannot be used: {error}') from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise UserError(f'{path} is not a tokenizer: {reason}.') from None


def _read_model_ids(folder):
    """{role: id} of special tokens, as the config.json of a model in the same folder has them."""
    config = _read_object(folder / 'config.json')
    ids = {}
    for role in ('bos', 'eos', 'pad'):
        value = config.get(f'{role}_token_id')
        if isinstance(value, list):  # eos may be several
            value = value[0] if value else None
        ids[role] = value
    return ids


def _read_names(folder):
    """{'bos_token', 'eos_token', ...: text}, as two files of a folder name special tokens."""
    config = _read_object(folder / 'tokenizer_config.json')
    others = _read_object(folder / 'special_tokens_map.json')
    # As in transformers: the second file is of older folders, whose first one has less.
    merged = others | config if 'added_tokens_decoder' in config else config | others
    names = {}
    for role in ('bos_token', 'eos_token', 'pad_token', 'unk_token'):
        token = merged.get(role)
        if isinstance(token, dict):  # with how it is matched
            token = token.get('content')
        if isinstance(token, str):
            names[role] = token
    return names


def _read_object(path):
    """Read the object in a JSON file, {} if there is none. Raises UserError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        contents = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        contents = None
    if not isinstance(contents, dict):
        raise UserError(f'{path} is damaged: it is not an object in JSON.')
    return contents


@contextlib.contextmanager
def _library_errors():
    """Turn what the library raises into UserError: a plain Exception, or Rust's panic."""
    try:
        yield
    except BaseException as error:  # a panic is no Exception
        if type(error) is not Exception and type(error).__name__ != 'PanicException':
            raise
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'the library tokenizers cannot use it: {reason}.') from None


# -----------------------------------------------------------------------------
# our own


class OwnTokenizer:
    """One of KINDS.

    Arguments: ranks: {bytes of a token: its id}. special: {text of a special token: its id}; None
    puts end-of-text after the others. files: {name: bytes} that it was read from; None makes them.

    Attributes, also of PublishedTokenizer: kind, n_vocab, ids, files; end_of_text: its id, or None;
    special_ids: {'bos', 'eos', 'pad': id} of those that there are; names: {'bos_token', ...: text};
    prefix: the ids that come before a prompt.
    """

    def __init__(self, pattern, ranks, special=None, files=None):
        if special is None:
            special = {END_OF_TEXT: len(ranks)}
        self.pattern = pattern
        self.ranks = ranks
        self.special = special
        self.kind = _kind_of(pattern, ranks)
        self.encoding = tiktoken.Encoding(
            self.kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.ids = {*ranks.values(), *special.values()}
        self.n_vocab = max(self.ids) + 1
        self.end_of_text = special.get(END_OF_TEXT)
        self.prefix = []
        self.special_ids = {}
        self.names = {}
        if self.end_of_text is not None:
            self.special_ids = {'bos': self.end_of_text, 'eos': self.end_of_text}
            self.names = {'bos_token': END_OF_TEXT, 'eos_token': END_OF_TEXT}
        self.files = files or self._make_files()

    def _make_files(self):
        contents = _to_json(self.pattern, self.ranks, self.special)
        return {
            'tokenizer.json': json.dumps(contents, ensure_ascii=False).encode(),
            'tokenizer_config.json': _config_file(self.names),
        }

    def copy(self):
        """Make another one like it: threads that share one wait for each other in its regex."""
        return OwnTokenizer(self.pattern, self.ranks, self.special, self.files)

    def vocabulary(self):
        """{token as tokenizer.json writes it: id}, the special ones included."""
        return {_to_chars(token): id for token, id in self.ranks.items()} | self.special

    def encode(self, text, special=frozenset()):
        """Return the ids of a text, (n,) uint32, which decode to the same text.

        `<|endoftext|>` in it is plain text unless `special` has it. Raises UserError for what could
        not be decoded: a lone surrogate, a character outside a `char` alphabet.
        """
        _check_surrogates(text)
        if self.kind == 'char':
            self._check_alphabet(text, special)
        return self.encoding.encode_to_numpy(text, allowed_special=special, disallowed_special=())

    def _check_alphabet(self, text, special):
        for token in special:
            text = text.replace(token, '')
        unknown = [char for char in set(text) if char.encode() not in self.ranks]
        if unknown:
            characters = 'character' if len(unknown) == 1 else 'characters'
            first = ' '.join(f'{char!r} (U+{ord(char):04X})' for char in sorted(unknown)[:5])
            raise UserError(
                f"{len(unknown)} {characters} outside the tokenizer's alphabet: {first}."
            )

    def encode_batch(self, texts):
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text):
        """Return the ids of a prompt, a list: special tokens in it are those tokens."""
        return self.encode(text, set(self.special)).tolist()

    def decode(self, ids):
        """Return the text of ids: U+FFFD for what is no character, nothing for what is no id."""
        return self.encoding.decode([id for id in ids if id in self.ids])

    def find_changes(self, texts, encoded):
        """Check that the first ids of the first of some texts decode to it. Returns no changes.

        Raises UserError if they do not.
        """
        if texts:
            decoded = self.encoding.decode_bytes(encoded[0][:MOST_CHECKED].tolist())
            text = texts[0].encode()
            expected = text[: len(decoded)] if len(encoded[0]) > MOST_CHECKED else text
            if decoded != expected:
                raise _loss(texts[0], self.encoding.decode(encoded[0].tolist()))
        return {}


def _kind_of(pattern, ranks):
    if pattern == ONE_CHARACTER:
        return 'byte' if b'\xff' in ranks else 'char'  # no character is that byte
    return 'bpe' if pattern == WORDS else 'gpt2'


def _check_surrogates(text):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f'U+{ord(text[error.start]):04X} at character {error.start:,}'
        raise UserError(f'the text has a lone surrogate {place}: clean it first.') from None


def _to_json(pattern, ranks, special):
    """Describe a tokenizer of our own as the `tokenizers` library does."""
    split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated'}
    split['invert'] = False
    options = {'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
    byte_level = {'type': 'ByteLevel', **options}
    vocab = {_to_chars(token): id for token, id in ranks.items()}
    merges = _list_merges(ranks)
    return {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': [_added(text, id) for text, id in special.items()],
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
    written = {id: _to_chars(token) for token, id in ranks.items()}
    merges = []  # (id of both together, of the left, of the right)
    for token, id in ranks.items():
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in ranks and right in ranks:
                merges.append((id, ranks[left], ranks[right]))
    return [[written[left], written[right]] for _, left, right in sorted(merges)]


def _to_chars(token):
    return token.decode('latin-1').translate(BYTE_TO_CHAR)  # latin-1: a character for each byte


def _to_bytes(token):
    return bytes(CHAR_TO_BYTE[char] for char in token)


def _read_own(contents, files):
    """Return the OwnTokenizer that would be written as these contents, or None."""
    try:
        pattern = contents['pre_tokenizer']['pretokenizers'][0]['pattern']['Regex']
        vocab = contents['model']['vocab']
        if pattern not in (ONE_CHARACTER, WORDS, GPT2_WORDS):
            return None
        ranks = {_to_bytes(token): id for token, id in vocab.items()}
        special = {token['content']: token['id'] for token in contents['added_tokens']}
        ids = [*ranks.values(), *special.values()]
        if len(set(ids)) != len(ids) or _to_json(pattern, ranks, special) != contents:
            return None
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    _check_size(max(ids) + 1)
    return OwnTokenizer(pattern, ranks, special, files)


# -----------------------------------------------------------------------------
# published


class PublishedTokenizer:
    """Whatever a tokenizer.json describes, with the ids that the `tokenizers` library gives it.

    contents: of tokenizer.json. files: {name: bytes} of all of FILES that there are. names: of
    special tokens, by its files. model_ids: {'bos', 'eos', 'pad': id} of the model that it belongs
    to, for those without a name.
    """

    kind = 'published'

    def __init__(self, contents, files, names, model_ids):
        self.hf = Tokenizer.from_buffer(files['tokenizer.json'])  # Hugging Face's
        self.hf.no_truncation()  # a tokenizer.json may have both, for models that read pairs
        self.hf.no_padding()
        ids = self.vocabulary().values()
        self.ids = set(ids)
        if len(self.ids) != len(ids):
            raise UserError('two of its tokens have the same id.')
        self.n_vocab = max(ids, default=-1) + 1
        _check_size(self.n_vocab)
        model = contents['model']
        unknown = model.get('unk_token')
        if unknown is None and model.get('unk_id') is not None:  # unigram
            unknown, _ = model['vocab'][model['unk_id']]
        self.unknown_id = self._id_of(unknown)

        self.special_ids = self._find_special(names, model_ids)
        self.end_of_text = self.special_ids.get('eos')
        self.names = dict(names)
        self.files = dict(files)
        if 'tokenizer_config.json' not in files:
            for role, id in self.special_ids.items():
                self.names[f'{role}_token'] = self.hf.id_to_token(id)
            self.files['tokenizer_config.json'] = _config_file(self.names)

        # Some added tokens, such as special ones, eat white space beside them or put some there.
        added = [token.content for token in self.hf.get_added_tokens_decoder().values()]
        added.sort(key=len, reverse=True)
        any_added = '|'.join(map(re.escape, added)) or '(?!)'
        self.beside_added = re.compile(rf'\s*({any_added})\s*')

        # What the library puts before a prompt, such as <s>: all before the ids of a text alone.
        alone = self.encode('a').tolist()
        as_prompt = self.hf.encode('a').ids
        self.prefix = as_prompt[: as_prompt.index(alone[0])] if alone else []
        if not self.ids.issuperset(self.prefix):
            raise UserError('it puts ids before a text that no token has.')

    def _id_of(self, token):
        """Return the id of a token by its text, or None."""
        return self.hf.token_to_id(token) if isinstance(token, str) else None

    def _find_special(self, names, model_ids):
        """{role: id}, by the tokenizer's files, else by the model's, else by well-known names."""
        known = {'bos': BEGINNINGS, 'eos': ENDS, 'pad': ()}
        special = {}
        for role, usual in known.items():
            candidates = [self._id_of(names.get(f'{role}_token')), model_ids.get(role)]
            candidates += [self._id_of(token) for token in usual]
            found = [id for id in candidates if type(id) is int and id in self.ids]
            if found:
                special[role] = found[0]
        return special

    def copy(self):
        """Threads may share it: the library has no state that they would wait for."""
        return self

    def vocabulary(self):
        """{token as tokenizer.json writes it: id}, the added ones included."""
        return self.hf.get_vocab()

    def encode(self, text):
        """Return the ids of a text, (n,) uint32. Special tokens in it are those tokens.

        Raises UserError for a lone surrogate.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """Return the ids of each text."""
        for text in texts:
            _check_surrogates(text)
        with _library_errors():
            encoded = self.hf.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encoded]

    def encode_prompt(self, text):
        """Return the ids of a prompt, a list: special tokens in it are those tokens."""
        return self.encode(text).tolist()

    def decode(self, ids):
        """Return the text of ids: U+FFFD for what is no character, nothing for what is no id."""
        return self.hf.decode([int(id) for id in ids], skip_special_tokens=False)

    def find_changes(self, texts, encoded):
        """Decode the ids of texts again: {what the tokenizer changes: [how often, an example]}.

        It may be made to put a space before a text, to normalize it, or to have a token for
        unknown characters. Raises UserError if a text is changed by anything else.
        """
        rows = [ids.tolist() for ids in encoded]
        decoded = self.hf.decode_batch(rows, skip_special_tokens=False)
        changes = {}
        for text, ids, again in zip(texts, rows, decoded, strict=True):
            if again == text:
                continue
            what = self._explain_change(text, ids, again)
            if what is None:
                raise _loss(text, again)
            if what not in changes:
                changes[what] = [0, _excerpts(text, again)]
            changes[what][0] += ids.count(self.unknown_id) if what == UNKNOWN else 1
        return changes

    def _explain_change(self, text, ids, decoded):
        """Return what the tokenizer has done to a text on purpose, or None."""
        if decoded == ' ' + text:
            return SPACE
        if self._normalize(decoded) == self._normalize(text):
            return NORMALIZED
        if self.unknown_id in ids and self._has_all(text, decoded):
            return UNKNOWN
        return None

    def _has_all(self, text, decoded):
        """Tell whether a text has, in order, what is decoded between its unknown characters."""
        rest = self._normalize(text)
        for part in decoded.split(self.hf.id_to_token(self.unknown_id)):
            known = self._normalize(part).strip()
            if known not in rest:
                return False
            rest = rest[rest.index(known) + len(known) :]
        return True

    def _normalize(self, text):
        """Return the same for texts that differ in what a tokenizer may change."""
        text = self.beside_added.sub(r'\1', text)
        if self.hf.normalizer:
            text = self.hf.normalizer.normalize_str(text)
        # Llama 2's writes a space as U+2581, and one more at the beginning.
        return text.replace('\u2581', ' ').strip(' ')


# -----------------------------------------------------------------------------
# both


def save(tokenizer, folder):
    """Write a tokenizer's files, which `load`, `tokenizers` and `transformers` read."""
    for name, data in tokenizer.files.items():
        (Path(folder) / name).write_bytes(data)


def _check_size(n_vocab):
    if not 0 < n_vocab <= MOST_TOKENS:
        raise UserError(f'its ids go up to {n_vocab - 1:,}: there may be 1 to {MOST_TOKENS:,}.')


def _config_file(names):
    """Return a tokenizer_config.json for transformers, as bytes."""
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'bos_token': names.get('bos_token'),
        'eos_token': names.get('eos_token'),
        'clean_up_tokenization_spaces': False,
    }
    return json.dumps(config, ensure_ascii=False).encode()


def _loss(text, decoded):
    """Return the error for a text that comes back from its ids as another."""
    before, after = _excerpts(text, decoded)
    what = f'The tokenizer would lose text: {before!r} comes back from its ids as {after!r}'
    return UserError(f'{what}. Clean the text, or use another tokenizer.')


def _excerpts(text, decoded):
    """Return where two texts begin to differ, some characters of each."""
    pairs = enumerate(zip(text, decoded, strict=False))
    same_length = min(len(text), len(decoded))
    differ_at = next((i for i, (before, after) in pairs if before != after), same_length)
    part = slice(max(0, differ_at - 10), differ_at + 10)
    return text[part], decoded[part]


# -----------------------------------------------------------------------------
# chat


def render_chat(tokenizer, messages):
    """Return the text after which the model answers, by its chat template.

    messages: [{'role': 'user', 'content': text}, ...]. A template is a program in jinja's sandbox.
    Raises UserError when the model has none, or when it refuses the messages.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # here, since few need it

    template = find_template(tokenizer)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
    )
    environment.filters['tojson'] = partial(json.dumps, ensure_ascii=False)
    environment.globals.update(raise_exception=_raise_template_error, strftime_now=time.strftime)
    # All that transformers gives a template.
    known = {'tools': None, 'documents': None, 'add_generation_prompt': True, **tokenizer.names}
    try:
        return environment.from_string(template).render(messages=messages, **known)
    except Exception as error:  # it is a program, which may raise anything
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"The model's chat template cannot be used: {reason}") from None


def _raise_template_error(message):
    from jinja2 import TemplateError

    raise TemplateError(message)


def find_template(tokenizer):
    """Return a tokenizer's chat template, a text. Raises UserError if it has none."""
    files = tokenizer.files
    try:
        if 'chat_template.jinja' in files:
            template = files['chat_template.jinja'].decode()
        else:
            stored = files.get('chat_template.json', files['tokenizer_config.json'])
            template = json.loads(stored).get('chat_template')
    except (ValueError, AttributeError):
        raise UserError('The chat template of the model is damaged: get it again.') from None
    if isinstance(template, list):  # several with names
        named = [entry for entry in template if isinstance(entry, dict)]
        found = [entry.get('template') for entry in named if entry.get('name') == 'default']
        template = found[0] if found else None
    if not template:
        raise UserError('The model has no chat template: use a prompt, without --chat.')
    if not isinstance(template, str):
        raise UserError('The chat template of the model is not a text.')
    # {% generation %} marks what is trained on.
    template = re.sub(r'({%[-+]?\s*)generation\b', r'\1if true', template)
    return re.sub(r'({%[-+]?\s*)endgeneration\b', r'\1endif', template)

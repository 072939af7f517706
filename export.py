"""Write a model for other programs: a GGUF file for llama.cpp, Ollama and LM Studio, or a folder.

    python export.py --out_dir=out-shakespeare                # out-shakespeare/model-float16.gguf
    python export.py --out_dir=out-shakespeare --dtype=q8_0
    python export.py --init_from=HuggingFaceTB/SmolLM2-135M --to=smollm2.gguf
    python export.py --out_dir=out-shakespeare --format=folder --dtype=bfloat16 --to=shakespeare
    python export.py --out_dir=out-shakespeare --format=folder --push=ORG/NAME    # to the Hub
"""

from runtime import UserError, begin_script, raise_on_signals

begin_script()  # first, so that Ctrl-C ends the imports as well: they take seconds

import contextlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

import tokenizer as tokenizers
from card import LOADED, for_gguf, is_name
from checkpoint import flush
from configurator import configure
from inference import load_model
from model import hf_tensors, scale_frequencies, transformers_has_it

# -----------------------------------------------------------------------------
init_from = 'resume'  # 'resume' (a checkpoint in out_dir), 'gpt2', ORG/NAME of the Hub, a folder
out_dir = 'out'  # the run to take a checkpoint from
checkpoint: Literal['best', 'last'] = 'best'  # which one; the best has the lowest validation loss
format: Literal['gguf', 'folder'] = 'gguf'  # folder: a checkpoint without the state of its training
dtype: Literal['float32', 'bfloat16', 'float16', 'q8_0'] = 'float16'  # of matrices; q8_0: 8 bits
to: str | None = None  # the file or folder to write; None: model-DTYPE in out_dir, or here
push: str | None = None  # ORG/NAME of the Hub to upload it to; made, for all to see, if need be
# -----------------------------------------------------------------------------
config = configure(globals())

# How a tokenizer.json cuts a text into pieces, and what llama.cpp calls it.
GPT2 = 'as in GPT-2'  # written without its expression
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
AFTER_DIGITS = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
# Of Qwen3.5, as published; tokenizer.WORDS is the same.
WITH_MARKS = tokenizers.WORDS.partition(')|')[2]
SPLITS = {
    (tokenizers.GPT2_WORDS,): 'gpt-2',
    (tokenizers.WORDS,): 'qwen35',
    (rf'{CONTRACTIONS}|{WITH_MARKS}',): 'qwen35',
    (tokenizers.ONE_CHARACTER,): 'qwen35',  # any will do: no merge leaves a character
    (GPT2,): 'gpt-2',
    ('Digits', GPT2): 'smollm',
    (rf'{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{AFTER_DIGITS}',): 'qwen2',
    (rf'{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{AFTER_DIGITS}',): 'llama-bpe',
}
CARD = 'README.md'
NO_END = 'The vocabulary has no end of text, which llama.cpp needs: prepare a text of several '
NO_END += 'documents, or with another --tokenizer.'
# Types of tokens, by GGUF's specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# How a tokenizer.json writes SentencePiece's spaces: one before a text, and all as U+2581.
PREPEND = {'type': 'Prepend', 'prepend': '\u2581'}
REPLACE = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '\u2581'}

# -----------------------------------------------------------------------------
# the vocabulary


def find_split(contents):
    """Return llama.cpp's name for how a tokenizer.json cuts a text.

    Raises UserError if it has none.
    """
    model = contents['model']
    if model.get('type') != 'BPE' or 'merges' not in model:
        raise UserError('Only vocabularies of BPE are exported, and this is another.')
    normalizer = contents.get('normalizer') or {'type': 'NFC'}  # which llama.cpp leaves out
    first = contents.get('pre_tokenizer') or {'type': 'none'}
    steps = [] if normalizer['type'] == 'NFC' else [normalizer['type']]
    has_bytes = False
    for step in first.get('pretokenizers', [first]):
        how = step['type']
        if how == 'Split' and step['behavior'] == 'Isolated' and not step['invert']:
            how = step['pattern'].get('Regex')
        elif how == 'Digits' and not step['individual_digits']:
            how = 'runs of digits'
        elif how == 'ByteLevel':
            has_bytes = True
            if not step.get('use_regex', True):
                continue
            how = 'a space before a text' if step.get('add_prefix_space') else GPT2
        steps.append(how)
    if tuple(steps) not in SPLITS or not has_bytes:
        what = ', then '.join(map(str, steps)) or 'nothing'
        raise UserError(f'llama.cpp cuts no text as this tokenizer does ({what}): not exported.')
    return SPLITS[tuple(steps)]


def find_space(contents):
    """Return whether SentencePiece puts a space before a text. None: it is not SentencePiece's."""
    model = contents['model']
    if model.get('type') != 'BPE' or not model.get('byte_fallback'):
        return None
    normalizer = contents.get('normalizer') or {'normalizers': []}
    normalizers = normalizer.get('normalizers', [normalizer])
    first = contents.get('pre_tokenizer')
    if first is None and normalizers in ([PREPEND, REPLACE], [REPLACE]):
        return PREPEND in normalizers
    is_metaspace = first is not None and first['type'] == 'Metaspace' and not first['split']
    return first['prepend_scheme'] != 'never' if is_metaspace and not normalizers else None


def list_scores(texts, contents):
    """Return SentencePiece's scores: what is merged earlier has a higher one."""
    scores = {}
    for rank, merge in enumerate(contents['model']['merges']):
        left, right = merge.split(' ') if isinstance(merge, str) else merge
        scores.setdefault(left + right, -float(rank))
    return [scores.get(text, 0.0) for text in texts]


def list_tokens(tokenizer, contents, n):
    """Return the texts of n tokens in the order of their ids, and their types."""
    texts = [f'[PAD{id}]' for id in range(n)]  # of ids that the tokenizer does not have
    types = [UNUSED] * n
    ids = tokenizer.vocabulary()
    if max(ids.values()) >= n:
        raise UserError(f'The tokenizer has more than the {n:,} tokens of the model: not exported.')
    for text, id in ids.items():
        texts[id] = text
        types[id] = BYTE if re.fullmatch('<0x[0-9A-F]{2}>', text) else NORMAL
    for token in contents.get('added_tokens', ()):
        types[ids[token['content']]] = CONTROL if token['special'] else USER_DEFINED
    unknown = contents['model'].get('unk_token')
    if unknown in ids:
        types[ids[unknown]] = UNKNOWN
    return texts, types


def list_merges(tokenizer, contents):
    """Return the merges as GGUF has them, 'left right' each.

    A char vocabulary has none: here the bytes of each character are merged from the left.
    """
    merges = contents['model']['merges']
    if tokenizer.kind == 'char':
        merges = []
        for text in contents['model']['vocab']:
            merges += [(text[:end], text[end]) for end in range(1, len(text))]
    # llama.cpp loads no model without merges. This one is of two tokens that no text has.
    merges = merges or [(tokenizers.END_OF_TEXT, tokenizers.END_OF_TEXT)]
    written = [merge if isinstance(merge, str) else ' '.join(merge) for merge in merges]
    return list(dict.fromkeys(written))  # each once


def add_endless_characters(writer, tokenizer):
    """Add characters without an end of text, as a text of a single document has them.

    Of llama.cpp's vocabularies with an end of their own choice none will do: RWKV's has none. It
    takes the longest token that fits, and would look forever for one of which it has the first
    bytes only, so that characters of several bytes are not for it.
    """
    characters = [tokenizer.decode([id]) for id in range(tokenizer.n_vocab)]
    if not all(map(str.isascii, characters)):
        raise UserError(NO_END)
    writer.add_tokenizer_model('rwkv')
    writer.add_token_list([rf'\x{ord(character):02x}' for character in characters])
    writer.add_token_types([NORMAL] * len(characters))


def add_vocabulary(writer, model, tokenizer):
    contents = json.loads(tokenizer.files['tokenizer.json'])
    if tokenizer.kind == 'char' and tokenizer.end_of_text is None:
        add_endless_characters(writer, tokenizer)
        return
    texts, types = list_tokens(tokenizer, contents, model.config.vocab_size)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    puts_space = find_space(contents)
    if puts_space is None:
        writer.add_tokenizer_model('gpt2')  # byte-level BPE
        writer.add_tokenizer_pre(find_split(contents))
        writer.add_token_merges(list_merges(tokenizer, contents))
    else:
        writer.add_tokenizer_model('llama')  # SentencePiece
        writer.add_token_scores(list_scores(texts, contents))
        if puts_space and contents['pre_tokenizer']:
            print('Note: llama.cpp puts a space before a text that begins with a space, too.')
    writer.add_add_space_prefix(bool(puts_space))

    special = tokenizer.special_ids
    ends = sorted(id for id in model.stop_ids() if id < model.config.vocab_size)
    eos = special.get('eos', min(ends, default=None))
    if eos is None:
        # llama.cpp would take the token with id 11 for it.
        raise UserError(NO_END)
    others = [id for id in ends if id != eos]
    bos = special.get('bos')
    if tokenizer.prefix not in ([], [bos]) or len(others) > 2:
        raise UserError('llama.cpp cannot begin or end a text as this model does: not exported.')
    writer.add_eos_token_id(eos)
    writer.add_bos_token_id(special.get('bos', eos))
    if 'pad' in special:
        writer.add_pad_token_id(special['pad'])
    for id, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(id)
    writer.add_add_bos_token(bos is not None and tokenizer.prefix == [bos])
    try:
        writer.add_chat_template(tokenizers.find_template(tokenizer))
    except UserError as error:
        if 'no chat template' not in str(error):  # but a damaged one
            raise


# -----------------------------------------------------------------------------
# the model


def context_length(config):
    """Return the positions that a GGUF file has.

    llama.cpp rounds a context up to a multiple of 256, and ends where it has no learned position.
    """
    if config.arch == 'gpt2':
        return math.ceil(config.block_size / 256) * 256
    return config.block_size


def add_shape(writer, config):
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_head)
    writer.add_vocab_size(config.vocab_size)
    if config.arch == 'gpt2':
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)


def list_tensors(model):
    """Return {name in transformers: tensor} of what GGUF stores, each (out, in).

    A llama's queries and keys are in the order of Meta's code: RoPE turns neighbours there, and
    here the two halves of a head.
    """
    config = model.config
    tensors = {}
    for name, tensor in hf_tensors(model).items():
        if '.c_' in name and tensor.dim() == 2:  # transformers stores GPT-2's as (in, out)
            tensor = tensor.T
        if config.arch == 'llama' and name.endswith(('q_proj.weight', 'k_proj.weight')):
            halves = tensor.view(-1, 2, config.head_dim // 2, config.n_embd)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        if name == 'transformer.wpe.weight':
            n_more = context_length(config) - config.block_size
            tensor = torch.cat((tensor, tensor[-1:].expand(n_more, -1)))
        tensors[name] = tensor.contiguous()
        has_bias = '.ln_' in name or '.c_' in name
        if has_bias and not config.bias:  # llama.cpp's GPT-2 always has them
            tensors[name.replace('.weight', '.bias')] = tensor.new_zeros(len(tensor))
    return tensors


def add_tensors(writer, model, dtype):
    """Add all tensors: vectors and positions in float32, matrices in a dtype."""
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[model.config.arch], model.config.n_layer)
    kinds = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16', 'q8_0': 'Q8_0'}
    for name, tensor in list_tensors(model).items():
        kind = gguf.GGMLQuantizationType[kinds[dtype]]
        if tensor.dim() < 2 or name == 'transformer.wpe.weight':
            kind = gguf.GGMLQuantizationType.F32
        elif dtype == 'q8_0' and tensor.shape[1] % 32:  # which has blocks of 32
            kind = gguf.GGMLQuantizationType.F16
        theirs = names.get_name(name, try_suffixes=('.weight', '.bias'))
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(theirs, data, raw_dtype=kind)
    scaling = model.config.rope_scaling
    if scaling:  # what the frequencies of RoPE are divided by
        exponents = torch.arange(0, model.config.head_dim, 2) / model.config.head_dim
        frequencies = 1 / model.config.rope_theta**exponents
        factors = frequencies / scale_frequencies(frequencies, scaling)
        writer.add_tensor('rope_freqs.weight', factors.float().numpy())


# -----------------------------------------------------------------------------
# files


def write_gguf(model, tokenizer, name, dtype, path):
    try:
        import gguf
    except ImportError:
        raise UserError('A GGUF file needs the package gguf: pip install gguf') from None
    if not transformers_has_it(model):
        raise UserError('The model was changed, and llama.cpp has no such model: not exported.')
    if model.config.rope_scaling and model.config.arch != 'llama':
        raise UserError('llama.cpp scales positions of Llamas only: not exported.')
    writer = gguf.GGUFWriter(path, model.config.arch)
    writer.add_name(name)
    file_type = {'float32': 'ALL_F32', 'q8_0': 'MOSTLY_Q8_0'}
    file_type |= {'bfloat16': 'MOSTLY_BF16', 'float16': 'MOSTLY_F16'}
    writer.add_file_type(gguf.LlamaFileType[file_type[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, model.config)
    add_vocabulary(writer, model, tokenizer)
    add_tensors(writer, model, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_folder(model, tokenizer, dtype, path):
    os.mkdir(path)
    try:
        model.to(getattr(torch, dtype)).save_pretrained(path, tokenizer.special_ids)
    except SafetensorError as error:  # its own for a full disk
        raise UserError(f'{path.name} cannot be written: {error}') from None
    tokenizers.save(tokenizer, path)
    if card is not None:
        (path / CARD).write_bytes(card)


# -----------------------------------------------------------------------------
# the Hub


@contextlib.contextmanager
def explain_hub(doing, advice=''):
    """Turn what goes wrong in speaking to the Hub into UserError."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # our sentence says it all
    try:
        yield
    except Exception as error:  # whatever the network makes it raise
        status = getattr(getattr(error, 'response', None), 'status_code', None)
        reason = ' '.join(str(error).split())[:200].rstrip('.')
        if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
            reason = 'log in as one who may write there, with: hf auth login'
        raise UserError(f'{doing} failed: {reason}{advice}') from None


def upload(target):
    """Upload a file, or the files of a folder, in one commit, with a card unless there is one."""
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi()
    files = {path.name: path for path in (target.iterdir() if target.is_dir() else [target])}
    where = shlex.quote(str(target))
    with explain_hub(f'Uploading to {push}', f'. To try again: hf upload {push} {where}'):
        hub.create_repo(push, exist_ok=True)
        files.pop(CARD, None)
        if hub.file_exists(push, CARD):
            print(f'{push} has a {CARD}, which stays as it is: delete it there for a new one.')
        elif card is not None:
            text = card.replace(LOADED.format('.').encode(), LOADED.format(push).encode())
            files[CARD] = text if target.is_dir() else for_gguf(text.decode(), target.name).encode()
        operations = [CommitOperationAdd(name, contents) for name, contents in files.items()]
        hub.create_commit(push, operations, commit_message=f'Upload {target.name}')
    print(f'{target} -> {push} on the Hugging Face Hub: {", ".join(sorted(files))}')


if format == 'folder' and dtype == 'q8_0':
    raise UserError("dtype='q8_0' is for format=gguf: choose another.")
if push is not None and not is_name(push):
    raise UserError(f'push={push}: name a repository of the Hugging Face Hub, as ORG/NAME.')
folder, model, tokenizer = load_model(init_from, out_dir, checkpoint)
ending = '.gguf' if format == 'gguf' else ''
place = out_dir if init_from == 'resume' else '.'
target = Path(to or os.path.join(place, f'model-{dtype}{ending}'))
if target.exists():
    how = f'hf upload {push} {target}' if push else 'name another one with --to'
    raise UserError(f'{target} exists: delete it, or {how}.')
if not target.parent.is_dir():
    raise UserError(f'There is no folder {target.parent} to write to: make it first.')
name = Path(out_dir if init_from == 'resume' else init_from).name
card = Path(folder, CARD)
card = card.read_bytes() if card.is_file() and not card.is_symlink() else None
if push is not None:
    from huggingface_hub import HfApi

    with explain_hub('Speaking to the Hugging Face Hub'):  # better now than when all is written
        HfApi().whoami()
# Written under another name, and flushed, so that it is complete or absent.
raise_on_signals()
temporary = Path(tempfile.mkdtemp(prefix='.export-', dir=target.parent))
try:
    written = temporary / target.name
    if format == 'gguf':
        write_gguf(model, tokenizer, name, dtype, written)
    else:
        write_folder(model, tokenizer, dtype, written)
    for path in (*written.glob('*'), written):
        flush(path)
    os.replace(written, target)
finally:
    shutil.rmtree(temporary, ignore_errors=True)

files = [target] if format == 'gguf' else list(target.iterdir())
size = sum(file.stat().st_size for file in files) / 1e6
print(f'{folder} -> {target}, {size:,.1f} MB in {dtype}')
print(f'{model.count_parameters():,} parameters, {tokenizer.n_vocab:,} tokens ({tokenizer.kind})')
if format == 'gguf':
    n = model.config.block_size
    if context_length(model.config) > n:
        print(f'Note: after {n:,} tokens llama.cpp writes nonsense: keep texts shorter.')
    flags = ' --no-repack' if dtype == 'q8_0' else ''  # llama.cpp may crash with AMX otherwise
    place = shlex.quote(str(target))
    print(f'llama-completion -m {place} -no-cnv{flags} -n {min(100, n // 2)} -p "Once"')
if push is not None:
    upload(target)

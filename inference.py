"""A trained model at work: load it, generate text with it, measure its loss.

Every option is an argument: nothing here knows a script's knobs.
"""

import contextlib
import math
import os
import sys
from types import MethodType

import torch
import torch.nn.functional as F

import checkpoint
import tokenizer as tokenizers
from data import count_windows, get_batch
from model import GPT, IGNORE, Linear, find_pretrained
from runtime import UserError, show_progress, to_device

# -----------------------------------------------------------------------------
# load


def load_model(init_from, out_dir, which):
    """Load a model and its tokenizer: (folder, GPT, tokenizer).

    init_from: 'resume' for a checkpoint of the run in out_dir, a published name, or a model folder.
    which: of the run's checkpoints, 'best' or 'last'. Raises UserError if there is no such model.
    """
    if init_from == 'resume':
        folder = checkpoint.find(out_dir, which)
    else:
        folder = find_pretrained(init_from)
    model = GPT.from_pretrained(folder)
    return folder, model, load_tokenizer(folder, model.config.vocab_size)


def load_tokenizer(folder, vocab_size):
    """Load the tokenizer of a model's folder. Raises UserError if it has none."""
    # Folders with GPT-2's weights may lack its tokenizer, but everybody knows it.
    has_tokenizer = os.path.exists(os.path.join(folder, 'tokenizer.json'))
    if 50257 <= vocab_size <= 50304 and not has_tokenizer:  # nanoGPT rounds it up
        return tokenizers.build('gpt2')
    return tokenizers.load(folder)


def to_column_major(model):
    """Store matrices column by column, with the same values.

    Decoding uncompiled in float32, a CPU reads them 1.2 times faster; in 16 bits it does not.
    """
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.dtype == torch.float32:
            parameter.data = parameter.data.t().contiguous().t()


def fast_cpu_decode(model):
    """Prepare a model for decoding that is compiled for a CPU, up to four sequences at once.

    The time goes into reading the weights. Compiled, a sum of products reads them as fast as the
    memory delivers; a CPU's matrix product does not.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.forward = MethodType(_linear_by_rows, module)


def _linear_by_rows(layer, x):
    """Compute layer(x), in compiled code one sum per row of a small x, (..., n_in)."""
    rows = x.flatten(0, -2)
    if len(rows) > 4 or not torch.compiler.is_compiling():
        return F.linear(x, layer.weight, layer.bias)
    y = torch.stack([(layer.weight * row).sum(-1) for row in rows]).view(*x.shape[:-1], -1)
    return y if layer.bias is None else y + layer.bias


# -----------------------------------------------------------------------------
# generate


class TextStream:
    """One generated text, which grows token by token and hands out what can be shown.

    It shows whole characters only, and nothing that may be the beginning of a stop text.
    stop: texts that end it. stop_ids: tokens that do. prompt: the ids that it continues.
    """

    def __init__(self, tokenizer, stop=(), stop_ids=(), prompt=()):
        self.tokenizer = tokenizer
        self.stop = stop
        self.stop_ids = stop_ids
        self.text = ''  # without what ended it
        self.tokens = 0  # without the token that ended it
        # A character may take several tokens, and how one is written may depend on those before it
        # (Llama 2 has no space before a first word). So `pending` ones are decoded after `context`.
        # All of the prompt: a part may begin inside a character, which spoils the bytes after it.
        self.context = list(prompt)
        self.pending = []
        self.settled = ''  # the text of all tokens before `pending`
        self.finish = None  # why it has ended: 'end_of_text', 'stop' or 'length'
        self.n_shown = 0  # characters handed out so far

    def add(self, token):
        """Append a token, by its id. Returns the text that can be shown now."""
        if self.finish:
            return ''
        if token in self.stop_ids:
            return self.close('end_of_text')

        self.tokens += 1
        self.pending.append(token)
        new_text = self._read_pending()
        # U+FFFD at the end: the last character has bytes missing.
        complete = new_text.rstrip('\ufffd')
        self.text = self.settled + complete
        if new_text and complete == new_text:
            self.settled = self.text
            self.context = self.pending
            self.pending = []

        stops_at = [self.text.find(stop) for stop in self.stop if stop in self.text]
        if stops_at:
            self.text = self.text[: min(stops_at)]
            return self.close('stop')
        return self._show(len(self.text) - self._count_held_back())

    def close(self, reason):
        """End the text, unless it has ended. Returns the rest, which was held back until now."""
        if self.finish:
            return ''
        self.finish = reason
        if reason != 'stop':
            # U+FFFD in the place of a character that is incomplete.
            self.text = self.settled + self._read_pending()
        return self._show(len(self.text))

    def _read_pending(self):
        before = self.tokenizer.decode(self.context)
        return self.tokenizer.decode(self.context + self.pending)[len(before) :]

    def _count_held_back(self):
        """Count the characters at the end that a stop text may begin with."""
        beginnings = [stop[:n] for stop in self.stop for n in range(1, len(stop))]
        return max((len(part) for part in beginnings if self.text.endswith(part)), default=0)

    def _show(self, n_characters):
        new_text = self.text[self.n_shown : n_characters]
        self.n_shown = max(self.n_shown, n_characters)
        return new_text


def generate_text(
    model, tokenizer, prompt, num_samples=1, max_new_tokens=100,
    seed=1337, stop=(), stream=lambda text: None, compile=False, is_chat=False, **sampling,
):  # fmt: skip
    """Generate texts that continue a prompt: a list of num_samples TextStreams, without the prompt.

    A sample ends at the model's own end-of-text tokens, and before a text in `stop`. stream: called
    with each new piece of the first sample's text as it is generated. compile: the decoding of one
    token. is_chat: whether a chat template wrote the prompt, see encode_prompt.
    sampling: temperature, top_k, ... as model.sample_next takes them. The same seed gives the same
    texts; torch's global generator is left alone. Raises UserError for a prompt that cannot be
    used.
    """
    ids = encode_prompt(tokenizer, prompt, model.config.block_size, is_chat)
    if max(ids) >= model.config.vocab_size:  # a tokenizer may have more tokens than its model
        token = tokenizer.decode([max(ids)])
        raise UserError(f'The prompt has the token {token!r}, which the model lacks: leave it out.')
    device = model.wte.weight.device
    prompts = torch.tensor([ids] * num_samples, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    stop_ids = model.stop_ids() | {tokenizer.end_of_text}
    texts = [TextStream(tokenizer, stop, stop_ids, ids) for _ in range(num_samples)]

    steps = model.generate(prompts, max_new_tokens, compile, generator=generator, **sampling)
    for tokens in steps:  # each (num_samples, 1)
        pieces = [text.add(token) for text, token in zip(texts, tokens[:, 0].tolist(), strict=True)]
        stream(pieces[0])
        if all(text.finish for text in texts):
            break

    pieces = [text.close('length') for text in texts]
    stream(pieces[0])
    return texts


def encode_prompt(tokenizer, prompt, block_size, is_chat=False):
    """Return a prompt's ids, a list. Special tokens in it are those tokens.

    The tokenizer's prefix, such as <s>, comes first, unless the prompt has it, or is_chat: a chat
    template writes it itself. Without a prefix an empty prompt is an end-of-text, with which a
    document begins. Raises UserError for a prompt that cannot be encoded.
    """
    try:
        ids = tokenizer.encode_prompt(prompt)
    except UserError as error:
        raise UserError(f'Choose another prompt than {prompt[:20]!r}: {error}') from None
    has_prefix = ids[: len(tokenizer.prefix)] == tokenizer.prefix
    if not has_prefix and not is_chat:
        ids = tokenizer.prefix + ids
    if not ids:
        if tokenizer.end_of_text is None:
            raise UserError('The prompt is empty: give the model a text to continue with --start.')
        ids = [tokenizer.end_of_text]
    if len(ids) > block_size:
        used = f'the model sees the last {block_size:,} of them'
        print(f'The prompt has {len(ids):,} tokens: {used}.', file=sys.stderr)
    return ids


# -----------------------------------------------------------------------------
# evaluate


@torch.no_grad()
def evaluate_loss(model, tokens, block_size, batch_size, autocast=None, stride=None):
    """Sum the loss over every token but the first: (nats, number of targets).

    tokens: (n,) ids. With a stride below block_size windows overlap, and a target counts in the
    first window that has it. Under torchrun the processes share the work, and all get the result.
    """
    import parallel  # here, since it takes a second, which sample.py need not wait for

    device = next(model.parameters()).device
    overlap = block_size - (stride or block_size)
    n_windows = count_windows(tokens, block_size, stride)
    full_shape = (batch_size, min(block_size, len(tokens) - 1))
    batch_losses = [torch.zeros((), device=device)]  # in nats, each summed over its targets
    n_targets = 0

    was_training = model.training
    model.eval()
    starts = range(0, n_windows, parallel.world_size * batch_size)
    for first_of_all in show_progress(starts, 'evaluating', parallel.rank > 0):
        start = first_of_all + parallel.rank * batch_size
        # FSDP wants the same calls in every process, so one that has no window left takes one past
        # the end, without targets.
        end = max(start + 1, min(start + batch_size, n_windows))
        x, y = get_batch(tokens, block_size, range(start, end), stride)
        # What overlaps has been counted, but in the very first window, which has none before it.
        first_overlapping = 1 if start == 0 else 0
        y[first_overlapping:, :overlap] = IGNORE
        is_compiled = model._compiled_call_impl is not None  # by model.compile()
        stance = contextlib.nullcontext()
        if is_compiled and x.shape != full_shape:  # not worth compiling the model again
            stance = torch.compiler.set_stance('force_eager')
        with stance, autocast or contextlib.nullcontext():
            loss = model(*to_device(device, x, y))
        n = int((y != IGNORE).sum())
        if n > 0:  # the mean over no targets is NaN
            batch_losses.append(loss * n)
            n_targets += n
    model.train(was_training)

    nats = torch.stack(batch_losses).cpu().double().sum()
    totals = torch.stack((nats, torch.tensor(n_targets).double()))
    nats, n_targets = parallel.all_reduce_sum(totals).tolist()
    return nats, int(n_targets)


def evaluate_mixture(model, data, batch_size, autocast):
    """Measure the loss of all validation tokens of a Mixture together. Returns {name: figure}."""
    results = []  # of each dataset, (nats, number of targets)
    for each in data.datasets:
        results.append(evaluate_loss(model, each.val, data.block_size, batch_size, autocast))
    loss = sum(nats for nats, _ in results) / sum(n_targets for _, n_targets in results)
    figures = {'val_loss': loss}
    if len(results) > 1:
        for name, (nats, n_targets) in zip(data.names, results, strict=True):
            figures[f'val_loss/{name}'] = nats / n_targets
    figures['perplexity'] = perplexity(loss)
    figures['bits_per_byte'] = loss / math.log(2) / data.bytes_per_token('val')
    return figures


@torch.no_grad()
def log_likelihoods(model, requests, batch_size, autocast=None):
    """Score continuations of contexts: (n, 2) float64.

    The first column is a continuation's log-probability in nats, the second is 1 if it is what
    greedy decoding gives, else 0. requests: [(ids of both, how many the continuation has), ...].
    The context loses its beginning where both are too long for the model. Under torchrun the
    processes share the work, and all get the result.
    """
    import parallel  # here, as above

    device = next(model.parameters()).device
    scores = torch.zeros(len(requests), 2, dtype=torch.float64)
    # The longest first: if memory is short, that shows at once.
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    own_batches = batches[parallel.rank :: parallel.world_size]
    for batch in show_progress(own_batches, 'scoring', parallel.rank > 0):
        x, y = _pad_requests([requests[i] for i in batch], model.config.block_size)
        counts = y != IGNORE  # (B, T)
        rows = counts.nonzero()[:, 0]  # the row of each target
        targets = y[counts]
        x, targets, is_target = to_device(device, x, targets, counts)
        with autocast or contextlib.nullcontext():
            hidden = model.forward_hidden(x)
        # In float32: rounded to 16 bits, the likeliest tokens would often be equally likely.
        hidden = hidden[is_target].to(model.lm_head.weight.dtype)
        logits = model.logits(hidden).float()  # (targets, V)
        log_probs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        is_missed = logits.argmax(-1) != targets

        # Sum over the targets of each row.
        zeros = torch.zeros(len(batch), dtype=torch.float64)
        scores[batch, 0] = zeros.index_add(0, rows, log_probs.cpu().double())
        n_missed = zeros.index_add(0, rows, is_missed.cpu().double())
        scores[batch, 1] = (n_missed == 0).double()
    return parallel.all_reduce_sum(scores)


def _pad_requests(requests, block_size):
    """Return inputs and targets, (B, T) int64, IGNORE but for the continuations; longest first."""
    longest, _ = requests[0]
    T = min(len(longest) - 1, block_size)
    x = torch.zeros(len(requests), T, dtype=torch.int64)
    y = torch.full_like(x, IGNORE)
    for row, (ids, n_continuation) in enumerate(requests):
        ids = torch.tensor(ids[-T - 1 :])
        end = len(ids) - 1
        x[row, :end] = ids[:-1]
        y[row, end - n_continuation : end] = ids[-n_continuation:]
    return x, y


def perplexity(nats):
    """Return the perplexity of a mean loss; None where it is too large for a float."""
    return math.exp(nats) if nats < 700 else None

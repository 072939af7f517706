"""Let a trained or published model write.

    python sample.py --out_dir=out-shakespeare
    python sample.py --out_dir=out-shakespeare --start="ROMEO." --temperature=0.7 --top_p=0.9
    python sample.py --out_dir=out-shakespeare --start=FILE:prompt.txt --format=jsonl
    python sample.py --init_from=gpt2 --interactive
"""

import codecs
import contextlib
import json
import os
import signal
import sys
import textwrap
from functools import partial

import torch

import checkpoint
import tokenizer as tokenizers
from configurator import can_compile, check, configure, errors_in_one_sentence, pick_device
from model import GPT, find_pretrained

# -----------------------------------------------------------------------------
# the model
init_from = 'resume'  # 'resume' (a checkpoint in out_dir), 'gpt2' to 'gpt2-xl', or a folder that holds a model
out_dir = 'out'  # the run to take a checkpoint from
which = 'best'  # which of its checkpoints: 'best' (lowest validation loss) or 'last'
# the text
start = '\n'  # the prompt; FILE:prompt.txt reads it from a file
interactive = False  # ask for one prompt after the other
num_samples = 3  # samples of each prompt, drawn at once
max_new_tokens = 300  # tokens in each, fewer where the model ends the text
stop: str | None = None  # end a sample before this text, too; separate several by |
# how a token is drawn
temperature = 0.8  # below 1 sharpens the distribution, above 1 flattens it, 0 takes the most likely token
top_k: int | None = 200  # from the k most likely tokens only; None: from all
top_p: float | None = None  # from the fewest that have this probability together, such as 0.9
min_p: float | None = None  # from those at least this fraction as likely as the most likely one, such as 0.05
repetition_penalty = 1.0  # above 1 makes tokens that were there before less likely
compare = False  # show the prompt under greedy, three temperatures, three top_k and one top_p instead
seed = 1337  # the same seed gives the same samples
# output and system
format = 'text'  # 'text', written as it is made, or 'jsonl', one object a sample
device = 'auto'  # 'cuda', 'mps', 'cpu'; 'auto' takes the first there is
dtype = 'auto'  # 'float32' or 'bfloat16'; 'auto': bfloat16 on CUDA, else float32
compile = False  # compile the step of one token: up to a minute at the start, then faster
# -----------------------------------------------------------------------------


def choose(
    logits, tokens=None, generator=None, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0
):
    """The next token of each row of logits (B, V), as (B, 1).

    temperature: divides the logits; 0 takes the most likely token. Of the probabilities that gives,
    top_k keeps the k highest, exactly k;
    top_p keeps the fewest highest that sum to at least p (nucleus sampling; Holtzman et al., 2020);
    min_p keeps those of at least min_p times the highest (Nguyen et al., 2024).
    repetition_penalty: divides the positive logits, multiplies the negative ones, of `tokens`, (B, n), the
    text so far (Keskar et al., 2019, CTRL).
    """
    if repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, tokens, True)
        penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    ids, logits = None, logits / temperature
    if top_k is not None or top_p is not None:
        logits, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))  # sorted, highest first
    probabilities = logits.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # the mass of those more likely
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    if min_p is not None:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0)
    # Each of exponential clocks with these rates rings first with its probability: no wait for the device.
    rings = torch.empty_like(probabilities).exponential_(generator=generator)
    drawn = (probabilities / rings).argmax(-1, keepdim=True)
    return drawn if ids is None else ids.gather(-1, drawn)


class Sample:
    """A text that grows by tokens; only whole characters of it, and never a part of a stop text, are handed out."""

    def __init__(self, tokenizer, stops):
        self.tokenizer, self.stops = tokenizer, stops
        self.end_of_text = tokenizers.end_of_text_id(tokenizer)
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.text, self.shown, self.tokens, self.finish = '', 0, 0, None

    def add(self, token):
        """Take in the next token's id. Returns the text that can be shown now."""
        if self.finish:
            return ''
        if token == self.end_of_text:
            return self.end('end_of_text')
        self.tokens += 1
        with contextlib.suppress(KeyError):  # an id that the model has and the tokenizer has not
            self.text += self.decoder.decode(self.tokenizer.decode_single_token_bytes(token))
        ends = [self.text.find(stop) for stop in self.stops if stop in self.text]
        if ends:
            self.text = self.text[: min(ends)]
            return self.end('stop')
        begun = [n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
        return self.show(len(self.text) - max(begun, default=0))

    def end(self, why):
        self.finish = self.finish or why
        self.text += self.decoder.decode(b'', final=True) if why != 'stop' else ''
        return self.show(len(self.text))

    def show(self, up_to):
        new = self.text[self.shown : up_to]
        self.shown = max(self.shown, up_to)
        return new


def write(model, tokenizer, prompt, n, stream=None, length=None, **sampling):
    """n samples that continue a prompt; the first is handed to stream(text) as it is made. Returns Samples.

    length: tokens in each; None: the knob's.
    """
    try:
        ids = tokenizers.encode(tokenizer, prompt).tolist()
    except ValueError as error:
        raise ValueError(f'The prompt {prompt[:20]!r} cannot be used, choose another with --start: {error}') from None
    if not ids and tokenizers.end_of_text_id(tokenizer) is None:
        raise ValueError("The prompt is empty: give the model something to continue with --start='...'.")
    ids = ids or [tokenizers.end_of_text_id(tokenizer)]
    if len(ids) > model.config.block_size:
        sees = f'the model sees the last {model.config.block_size:,} of them'
        print(f'The prompt has {len(ids):,} tokens: {sees}.', file=sys.stderr)
    place = model.wte.weight.device
    generator = torch.Generator(place).manual_seed(seed)
    samples = [Sample(tokenizer, [text for text in (stop or '').split('|') if text]) for _ in range(n)]
    stream = stream or (lambda text: None)
    prompts = torch.tensor([ids] * n, device=place)
    pick = partial(choose, generator=generator, **sampling)
    for tokens in model.generate(prompts, length or max_new_tokens, pick, compile):
        new = [sample.add(token) for sample, token in zip(samples, tokens[:, 0].tolist(), strict=True)]
        stream(new[0])
        if all(sample.finish for sample in samples):
            break
    rest = [sample.end('length') for sample in samples]
    stream(rest[0])
    return samples


def columns(cells, width=38):
    """Texts two by two, side by side in 80 columns; a cell is (heading, text)."""
    for left, right in zip(cells[::2], cells[1::2], strict=True):
        lines = [[cell[0], '-' * width] for cell in (left, right)]
        for side, (_, text) in zip(lines, (left, right), strict=True):
            side += [piece for line in text.splitlines() for piece in textwrap.wrap(line, width) or ['']]
        for i in range(max(map(len, lines))):
            a, b = (side[i] if i < len(side) else '' for side in lines)
            yield f'{a:<{width}}    {b}'.rstrip()
        yield ''


def answer(model, tokenizer, prompt):
    """Print what the knobs ask for of one prompt."""
    sampling = {'temperature': temperature, 'top_k': top_k, 'top_p': top_p, 'min_p': min_p}
    sampling['repetition_penalty'] = repetition_penalty
    if compare:
        ways = [{'temperature': 0}, *({'temperature': t} for t in (0.5, 1.0, 1.5))]
        ways += [*({'top_k': k} for k in (10, 50, 100)), {'top_p': 0.9}]
        names = [', '.join(f'{k}={v}' for k, v in way.items()) for way in ways]
        texts = [prompt + write(model, tokenizer, prompt, 1, **way)[0].text for way in ways]
        print('\n'.join(columns(list(zip(names, texts, strict=True)))))
    elif format == 'jsonl':
        for sample in write(model, tokenizer, prompt, num_samples, **sampling):
            record = {'prompt': prompt, 'text': sample.text, 'tokens': sample.tokens, 'finish': sample.finish}
            print(json.dumps(record, ensure_ascii=False), flush=True)
    else:
        print(prompt, end='', flush=True)
        samples = write(model, tokenizer, prompt, num_samples, lambda text: print(text, end='', flush=True), **sampling)
        print(f'\n{"-" * 80}')
        for sample in samples[1:]:
            print(f'{prompt}{sample.text}\n{"-" * 80}')


def lay_out(model):
    """Store matrices by columns, values unchanged: uncompiled, a CPU reads them 1.2 times faster."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()


def open_model(init_from, out_dir, which):
    """The model that the knobs name: (its folder, the GPT, its tokenizer)."""
    folder = checkpoint.find(out_dir, which) if init_from == 'resume' else find_pretrained(init_from)
    model = GPT.from_pretrained(folder)
    # GPT-2's folders may come without this file; its vocabulary is known
    known = model.config.vocab_size == 50257 and not os.path.exists(os.path.join(folder, 'tokenizer.json'))
    return folder, model, tokenizers.build('gpt2') if known else tokenizers.load(folder)


def main():
    configure(globals())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # loading weights would take it for a damaged file
    check(globals(), 0, 10**18, 'seed')
    check(globals(), 0, 10**6, 'temperature')
    check(globals(), 1, 10**9, 'num_samples max_new_tokens top_k')
    check(globals(), 1e-9, 1, 'top_p')
    check(globals(), 0, 1, 'min_p')
    check(globals(), 1e-9, 10**9, 'repetition_penalty')
    for name, known in {'which': ('best', 'last'), 'format': ('text', 'jsonl')}.items():
        if globals()[name] not in known:
            raise ValueError(f"{name}='{globals()[name]}' must be '{known[0]}' or '{known[1]}'.")
    if dtype not in ('auto', 'float32', 'bfloat16'):
        raise ValueError(f"dtype='{dtype}' must be 'auto', 'float32' or 'bfloat16'.")
    prompt = start
    if start.startswith('FILE:'):
        try:
            with open(start.removeprefix('FILE:'), encoding='utf-8') as file:
                prompt = file.read()
        except UnicodeDecodeError:
            raise ValueError(f'{start.removeprefix("FILE:")} is not UTF-8 text.') from None
    place = pick_device(device)
    _, model, tokenizer = open_model(init_from, out_dir, which)
    model.to(place).eval()
    if dtype == 'bfloat16' or (dtype == 'auto' and torch.device(place).type == 'cuda'):
        model.bfloat16()
    globals()['compile'] = compile and can_compile(place)
    if torch.device(place).type == 'cpu' and not compile:
        lay_out(model)
    if not interactive:
        answer(model, tokenizer, prompt)
    while interactive:
        try:
            answer(model, tokenizer, input('> '))
        except ValueError as error:  # of this prompt; the next may be better
            print(error)
        except EOFError:
            print()
            break


if __name__ == '__main__':
    with errors_in_one_sentence():
        main()

"""How fast is it, here, against what. Prints a table; the figures of a run are compared with one another only.

    python bench.py sample                    # GPT-2 124M, random weights, one sequence
    python bench.py sample --device=cuda --dtype=bfloat16 --ways=ours,compiled
"""

import copy
import resource
import statistics
import sys
import tempfile
import time

import torch

from configurator import check, configure, errors_in_one_sentence, pick_device
from model import GPT, PUBLISHED, GPTConfig

# -----------------------------------------------------------------------------
size = 'gpt2'  # 'gpt2' to 'gpt2-xl'
arch = 'gpt2'  # 'gpt2', 'qwen3' or 'llama'
prompt_tokens = 8  # length of the prompt
repeats = 3  # each figure is the median of this many
device = 'auto'  # 'cuda', 'mps', 'cpu'; 'auto' takes the first there is
dtype = 'float32'  # 'float32' or 'bfloat16'
ways = 'uncached,ours,compiled,transformers'  # what to measure; one alone shows its peak memory
# -----------------------------------------------------------------------------


def uncached(model, idx, n):
    """Each token from the whole window anew."""
    for _ in range(n):
        token = model.next_logits(idx[:, -model.config.block_size :]).argmax(-1, keepdim=True)
        idx = torch.cat((idx, token), 1)
    return idx


def sample():
    """Tokens per second of generating 64 and 256 tokens greedily, with and without a cache, and in transformers."""
    torch.manual_seed(0)
    place = torch.device(pick_device(device))
    model = GPT(GPTConfig(arch=arch, **PUBLISHED[size])).to(place, getattr(torch, dtype)).eval()
    plain = copy.deepcopy(model) if 'uncached' in ways or 'compiled' in ways else None
    theirs = in_transformers(model) if 'transformers' in ways else None
    if place.type == 'cpu':  # as sample.py does
        model.lay_out_for_sampling()
    idx = torch.randint(0, 50257, (1, prompt_tokens), device=place)
    known = {
        'uncached': lambda n: uncached(plain, idx, n),
        'ours': lambda n: torch.cat(list(model.generate(idx, n, temperature=0)), 1),
        'compiled': lambda n: torch.cat(list(plain.generate(idx, n, compile=True, temperature=0)), 1),
        'transformers': lambda n: theirs.generate(idx, max_new_tokens=n, min_new_tokens=n, do_sample=False),
    }
    names = ways.split(',')
    if set(names) - set(known):
        raise ValueError(f"ways='{ways}' must be some of {', '.join(known)}, separated by commas.")
    rates = {(name, n): [] for name in names for n in (64, 256)}
    with torch.inference_mode():
        for name in names:
            for n in (64, 256) if name == 'compiled' else (8,):
                known[name](n)  # warm up
        for (name, n), found in [item for _ in range(repeats) for item in rates.items()]:  # in turn: speed drifts
            start = time.perf_counter()
            known[name](n)[0, -1].item()  # waits for the device
            found.append(n / (time.perf_counter() - start))
    table = {key: statistics.median(found) for key, found in rates.items()}
    print(f'{size}, {arch}, {place}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    print(f'{"tokens/s for":<16}{"64 tokens":>12}{"256 tokens":>12}')
    for name in names:
        print(f'{name:<16}{table[name, 64]:>12.1f}{table[name, 256]:>12.1f}')
    unit = 2**30 if sys.platform == 'darwin' else 2**20  # bytes there, KiB elsewhere
    print(f'peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB')


def in_transformers(model):
    """The same model in transformers."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError('transformers is not installed: leave it out, --ways=uncached,ours') from None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=model.wte.weight.dtype).to(model.wte.weight.device)


BENCHMARKS = {'sample': sample}

if __name__ == '__main__':
    _names = [_arg for _arg in sys.argv[1:2] if _arg in BENCHMARKS or _arg in ('-h', '--help')]
    if not _names:
        sys.exit(f'Say what to measure: python bench.py {"|".join(BENCHMARKS)}')
    configure(globals(), sys.argv[1:] if '-' in _names[0] else sys.argv[2:])
    with errors_in_one_sentence():
        check(globals(), 1, 1000, 'repeats prompt_tokens')
        if size not in PUBLISHED:
            raise ValueError(f"size='{size}' must be one of {', '.join(PUBLISHED)}.")
        if dtype not in ('float32', 'bfloat16'):
            raise ValueError(f"dtype='{dtype}' must be 'float32' or 'bfloat16'.")
        BENCHMARKS[_names[0]]()

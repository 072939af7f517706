"""How fast is it, here, against what. Prints a table; the figures of a run are compared with one another only.

    python bench.py race                      # seconds to equal loss: our recipe against nanoGPT's, on a CPU
    python bench.py step                      # one training step of GPT-2 124M, random weights
    python bench.py step --device=cuda --dtype=bfloat16 --batch_size=16
    python bench.py sample                    # GPT-2 124M writes one sequence
    python bench.py sample --device=cuda --dtype=bfloat16 --ways=ours,compiled
    python bench.py prepare --corpus_mb=1000  # tokenizing a text with all cores
    python bench.py data                      # batches of it, without a model
"""

import copy
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

import tokenizer
from configurator import can_compile, check, configure, errors_in_one_sentence, pick_device
from data import count_windows, training_order, windows
from model import GPT, PUBLISHED, GPTConfig
from report import memory, peak_of, synchronize
from sample import lay_out

# -----------------------------------------------------------------------------
size = 'gpt2'  # 'gpt2' to 'gpt2-xl'
arch = 'gpt2'  # 'gpt2', 'qwen3' or 'llama'
batch_size = 1  # of a step, in sequences
block_size = 1024  # of a step, tokens a sequence
prompt_tokens = 8  # length of the prompt of a sample
repeats = 3  # each figure is the median of this many, or the seeds of a race
dataset = 'shakespeare_char'  # what a race is run on
baseline = 'config/baseline_shakespeare_char.py'  # a race's recipes: how far it gets
recipe = 'config/train_shakespeare_char.py'  # and how soon this one is as far
device = 'auto'  # 'cuda', 'mps', 'cpu'; 'auto' takes the first there is
dtype = 'float32'  # 'float32' or 'bfloat16'
corpus_mb = 200  # megabytes of text to prepare
ways: str | None = None  # what to measure, by the names in the table; one alone shows its peak memory; None: all
json_file: str | None = None  # write the figures there, too
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
    names = pick_ways(place, 'uncached,ours,compiled,transformers')
    plain = copy.deepcopy(model) if 'uncached' in names or 'compiled' in names else None
    theirs = in_transformers(model) if 'transformers' in names else None
    if place.type == 'cpu':  # as sample.py does
        lay_out(model)
    idx = torch.randint(0, 50257, (1, prompt_tokens), device=place)
    known = {
        'uncached': lambda n: uncached(plain, idx, n),
        'ours': lambda n: torch.cat(list(model.generate(idx, n)), 1),
        'compiled': lambda n: torch.cat(list(plain.generate(idx, n, compile=True)), 1),
        'transformers': lambda n: theirs.generate(idx, max_new_tokens=n, min_new_tokens=n, do_sample=False),
    }
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
    print_machine(place)
    print(f'{"tokens/s for":<16}{"64 tokens":>12}{"256 tokens":>12}')
    for name in names:
        print(f'{name:<16}{table[name, 64]:>12.1f}{table[name, 256]:>12.1f}')
    peak = memory(place)
    print(f'peak memory of the process: {peak:.2f} GiB')
    return {'tokens_per_second': {f'{name} {n}': rate for (name, n), rate in table.items()}, 'peak_gib': peak}


def in_transformers(model):
    """The same model in transformers."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError('transformers is not installed: leave it out, --ways=uncached,ours') from None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=model.wte.weight.dtype).to(model.wte.weight.device)


def plain_loss(model, x, y):
    return torch.nn.functional.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


def one_way(way, place, dtype, batch_size, shape):
    """In a process of its own, since memory once kept is not given back: print the seconds and GiB of a step."""
    place = torch.device(place)
    if way.startswith('ours'):
        pick_device(place.type)  # keeps freed memory
    torch.set_float32_matmul_precision('high')
    autocast = nullcontext() if dtype == 'float32' else torch.autocast(place.type, torch.bfloat16)
    torch.manual_seed(0)
    model, ours = GPT(GPTConfig(**shape)).to(place), way.startswith('ours')
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=ours, foreach=None if ours else False)
    idx = torch.randint(0, 50257, (batch_size, shape['block_size'])).to(place)
    if way.endswith('compiled'):
        model.compile()
    for _ in range(3):  # the first makes the optimizer's state, the second finds room beside it
        synchronize(place)
        start = time.perf_counter()
        with autocast:
            loss = model(idx, idx) if ours else plain_loss(model, idx, idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(place)
        seconds = time.perf_counter() - start
    print(json.dumps({'seconds': seconds, 'gib': memory(place), 'flops': idx.numel() * model.flops_per_token()}))


def step():
    """One training step: plain torch (unfused AdamW, all logits at once) and ours, eager and compiled."""
    place, here = torch.device(pick_device(device)), str(Path(__file__).parent)
    shape, ceiling = PUBLISHED[size] | {'arch': arch, 'block_size': block_size}, gemm_rate(place)
    found = {name: [] for name in pick_ways(place, 'plain,ours,plain compiled,ours compiled')}
    for name in [name for _ in range(repeats) for name in found]:  # in turn: speed drifts
        code = f'import sys; sys.path.insert(0, {here!r}); import bench; bench.one_way'
        code += str((name, str(place), dtype, batch_size, shape))
        result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
        if result.returncode:
            raise ValueError(f'{name} did not run: {(result.stderr.strip() or "killed").splitlines()[-1]}')
        found[name].append(json.loads(result.stdout.splitlines()[-1]))
        ceiling = max(ceiling, gemm_rate(place))
    print_machine(place)
    print(f'{batch_size} x {block_size} tokens a step; matrix products reach {ceiling / 1e12:.3f} TFLOP/s here')
    print(f'{"":<16}{"ms":>10}{"tokens/s":>12}{"TFLOP/s":>10}{"of ceiling":>12}{"peak GiB":>10}')
    figures = {}
    for name, runs in found.items():
        seconds, gib, flops = (statistics.median(run[key] for run in runs) for key in ('seconds', 'gib', 'flops'))
        tokens, rate = batch_size * block_size / seconds, flops / seconds
        ms, share = 1000 * seconds, rate / ceiling
        figures[name] = {'ms': ms, 'tokens_per_second': tokens, 'flops': rate, 'share': share, 'peak_gib': gib}
        print(f'{name:<16}{ms:>10,.1f}{tokens:>12,.1f}{rate / 1e12:>10.3f}{share:>12.1%}{gib:>10.2f}')
    return {'gemm_flops': ceiling, 'ways': figures}


def race():
    """Seconds of training steps until the recipe's validation loss is the baseline's at its end, seed by seed.

    Evaluations are of the whole split, every ten steps of the recipe, and not in the seconds; compilation would be.
    """
    for config in (baseline, recipe):
        if not (Path(config).exists() or (Path(__file__).parent / config).exists()):
            raise ValueError(f'There is no config file {config}.')
    here, rows = Path(__file__).parent, []
    print(f'{recipe} against {baseline} on {dataset}')
    print(f'{"seed":>4}{"baseline":>20}{"recipe at its end":>22}{"as far after":>16}{"sooner":>10}')
    for seed in range(1, repeats + 1):
        ran = []
        for config in (baseline, recipe):
            with tempfile.TemporaryDirectory() as folder:
                path = config if Path(config).exists() else here / config
                line = [sys.executable, here / 'train.py', path, f'--dataset={dataset}', f'--device={device}']
                line += [f'--seed={seed}', f'--out_dir={folder}', '--always_save_checkpoint=False']
                line += [] if config == baseline else ['--eval_interval=10']
                result = subprocess.run(line, capture_output=True, text=True)
                if result.returncode:
                    raise ValueError(f'{config} did not run: {result.stderr.strip()}')
                log = [json.loads(record) for record in Path(folder, 'log.jsonl').read_text().splitlines()]
                ran.append([(r['val_loss'], r['train_seconds']) for r in log if r['step'] and 'val_loss' in r])
        (goal, slow), (end, fast) = ran[0][-1], ran[1][-1]
        soon = next((seconds for loss, seconds in ran[1] if loss <= goal), math.inf)
        rows.append({'seed': seed, 'baseline': [goal, slow], 'recipe': [end, fast], 'seconds': soon})
        cells = f'{goal:.4f} in {slow:.1f} s', f'{end:.4f} in {fast:.1f} s', f'{soon:.1f} s', f'{slow / soon:.2f} x'
        print('{:>4}{:>20}{:>22}{:>16}{:>10}'.format(seed, *cells), flush=True)
    ratios = sorted(row['baseline'][1] / row['seconds'] for row in rows)
    print(f'sooner: median {statistics.median(ratios):.2f} x, from {ratios[0]:.2f} to {ratios[-1]:.2f}')
    never = {math.inf: None}
    rows = [row | {'seconds': never.get(row['seconds'], row['seconds'])} for row in rows]
    return {'seeds': rows, 'median': statistics.median(ratios)}


def prepare():
    """MB/s of prepare.py, and its memory, beside what the cores could do in tiktoken alone.

    The text is synthetic: lines of the bundled Shakespeare at random, in documents of 75 lines, 3 kB, on average.
    """
    here, cores = Path(__file__).parent, os.process_cpu_count() if hasattr(os, 'process_cpu_count') else os.cpu_count()
    rng, lines = random.Random(0), (here / 'corpus' / 'shakespeare.txt').read_text().splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder, 'text.txt'), 'w') as file:
            while file.tell() < corpus_mb * 10**6:
                file.writelines([*rng.choices(lines, k=rng.randint(1, 149)), '<|endoftext|>\n'])
        with open(Path(folder, 'text.txt')) as file:
            parts = [file.read(2**20) for _ in range(min(32, corpus_mb))]
        vocabulary = tokenizer.build('bpe', parts, 8192)
        tokenizer.save(vocabulary, folder)

        def tiktoken_alone(threads):
            def work(alike, mine):
                for _ in range(-(-corpus_mb // 32)):  # for as long: cores that work longer may become slower
                    for part in mine:
                        alike.encode_to_numpy(part, disallowed_special=())

            alike, start = [tokenizer.copy(vocabulary) for _ in range(threads)], time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, alike, [parts[i::threads] for i in range(threads)]))
            return sum(map(len, parts)) * -(-corpus_mb // 32) / 1e6 / (time.perf_counter() - start)

        runs, line = [], [sys.executable, here / 'prepare.py', '--input=text.txt', f'--tokenizer={folder}']
        for _ in range(repeats):
            row, peak, start = [tiktoken_alone(1), tiktoken_alone(cores)], 0, time.perf_counter()
            job = subprocess.Popen([*line, f'--num_proc={cores}'], cwd=folder, stdout=subprocess.DEVNULL)
            while job.poll() is None:
                peak = max(peak, peak_of(job.pid))
                time.sleep(0.1)
            if job.returncode:
                raise ValueError('prepare.py did not run.')
            runs.append([*row, corpus_mb / (time.perf_counter() - start), peak * 2**10])
    one, many, ours, peak = (statistics.median(column) for column in zip(*runs, strict=True))
    print(f'{corpus_mb} MB of text, medians of {repeats}')
    print(f'tiktoken alone, one core     {one:8.1f} MB/s')
    print(f'tiktoken alone, {cores} cores      {many:8.1f} MB/s, {many / one / cores:.0%} of {cores} x one')
    share = f'{ours / one / cores:.0%} of {cores} x one, {ours / many:.0%} of these'
    print(f'prepare.py, {cores} cores          {ours:8.1f} MB/s, {share}\npeak memory                  {peak:8.0f} MiB')
    return {'tiktoken': one, 'mb_per_second': ours, 'share': ours / one / cores, 'peak_mib': peak, 'runs': runs}


def data():
    """Tokens per second of taking batches of a split of 100 million random tokens in their order, by one thread."""
    with tempfile.TemporaryFile() as file:
        np.random.default_rng(0).integers(0, 50257, 10**8, dtype=np.uint16).tofile(file)
        tokens = np.memmap(file, dtype=np.uint16, mode='r')
        n_windows, seconds = count_windows(tokens, block_size), []
        for step in range(200 * repeats):
            start = time.perf_counter()
            order = training_order(np.arange(step * batch_size, (step + 1) * batch_size), n_windows, 1)
            windows(tokens, block_size, order)
            seconds.append(time.perf_counter() - start)
    middle, worst = statistics.median(seconds), max(seconds)
    rate = batch_size * block_size / middle
    print(f'{batch_size} x {block_size} tokens: {1000 * middle:.3f} ms, at worst {1000 * worst:.1f} ms')
    print(f'{rate:,.0f} tokens/s')
    return {'tokens_per_second': rate, 'median_seconds': middle, 'worst_seconds': worst}


def gemm_rate(place):
    """The FLOP/s of large matrix products in the dtype asked for, the best of ten: a ceiling for a step."""
    n = 8192 if place.type == 'cuda' else 1536
    a, b = torch.randn(2, n, n, device=place, dtype=getattr(torch, dtype))
    times = []
    for _ in range(10):
        synchronize(place)
        start = time.perf_counter()
        a @ b
        synchronize(place)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def print_machine(place):
    name = torch.cuda.get_device_name(place) if place.type == 'cuda' else f'{place}, {torch.get_num_threads()} threads'
    print(f'{size}, {arch}, {name}, {dtype}, torch {torch.__version__}')


def pick_ways(place, known):
    """The ways asked for, or all of them; without those that are compiled where nothing can be."""
    names = (ways or known).split(',')
    if set(names) - set(known.split(',')):
        raise ValueError(f"ways='{ways}' must be some of {known.replace(',', ', ')}, separated by commas.")
    compiles = not any('compiled' in name for name in names) or can_compile(place)
    return [name for name in names if compiles or 'compiled' not in name]


BENCHMARKS = {'race': race, 'step': step, 'sample': sample, 'prepare': prepare, 'data': data}

if __name__ == '__main__':
    _names = [_arg for _arg in sys.argv[1:2] if _arg in BENCHMARKS or _arg in ('-h', '--help')]
    if not _names:
        sys.exit(f'Say what to measure: python bench.py {"|".join(BENCHMARKS)}')
    configure(globals(), sys.argv[1:] if '-' in _names[0] else sys.argv[2:])
    with errors_in_one_sentence():
        check(globals(), 1, 10**6, 'repeats prompt_tokens batch_size block_size corpus_mb')
        if size not in PUBLISHED:
            raise ValueError(f"size='{size}' must be one of {', '.join(PUBLISHED)}.")
        if dtype not in ('float32', 'bfloat16'):
            raise ValueError(f"dtype='{dtype}' must be 'float32' or 'bfloat16'.")
        figures = BENCHMARKS[_names[0]]()
        if json_file:
            Path(json_file).write_text(json.dumps(figures, indent=1) + '\n')

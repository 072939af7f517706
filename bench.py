"""How fast is it, on this machine, compared with what. Only figures of one run are comparable.

    python bench.py compare A.py B.py         # is B better than A: five seeds each, and a test
    python bench.py compare A.py --grid=n_layer:2,3
    python bench.py race                      # seconds to equal loss: our recipe and nanoGPT's, CPU
    python bench.py step                      # one training step of GPT-2 124M, random weights
    python bench.py sample                    # GPT-2 124M generates one sequence
    python bench.py gpu                       # all that one GPU is to be measured with, 15 minutes
    python bench.py prepare --corpus_mb=1000  # tokenizing a text with all cores
"""

import runtime
from runtime import UserError, pick_device

runtime.begin_script()  # first, so that Ctrl-C ends the imports as well: they take seconds

import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import compare
import report
import tokenizer
from configurator import check_range, configure
from inference import fast_cpu_decode, to_column_major
from model import GPT, PUBLISHED, GPTConfig

SIZES = {**PUBLISHED, 'tiny': {'n_layer': 2, 'n_head': 2, 'n_embd': 64}}

# -----------------------------------------------------------------------------
size: Literal['gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'tiny'] = 'gpt2'  # of the model
arch: Literal['gpt2', 'qwen3', 'llama'] = 'gpt2'  # its architecture
batch_size: int | None = None  # step: sequences per batch; None: 16 on a GPU, else 1
block_size = 1024  # step: tokens per sequence
prompt_tokens = 8  # sample: length of the prompt
seeds = 5  # compare, race: how many of them each recipe is trained with
grid: str | None = None  # compare: values of A's knobs, all with all: 'n_layer:2,3;dropout:0,0.1'
repeats = 3  # step, sample, prepare: each figure is the median of this many
dataset: str | None = None  # compare, race: what is trained on; None: the recipe's own
eval_interval: int | None = None  # compare: steps between evaluations; None: the recipe's own
baseline = 'config/baseline_shakespeare_char.py'  # race: the recipe that sets the loss to reach
recipe = 'config/train_shakespeare_char.py'  # race: the recipe that has to reach it
device = 'auto'  # 'cuda', 'xpu', 'mps', 'cpu'; 'auto' takes the first there is
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # as elsewhere
corpus_mb = 200  # prepare: megabytes of text
variants: str | None = None  # step, sample: rows to measure, comma separated; None: all
json_file: str | None = None  # write the figures there, too
# -----------------------------------------------------------------------------

ROOT = Path(__file__).parent
STEPS = ['plain', 'ours', 'plain compiled', 'ours compiled']  # variants of a step


def pick_variants(device, known):
    """Return the variants asked for, or all; the compiled ones only where a compiler works."""
    names = known if variants is None else variants.split(',')
    if not set(names) <= set(known):
        raise UserError(f"variants='{variants}' must be some of {', '.join(known)}, with commas.")
    eager = [name for name in names if 'compiled' not in name]
    if eager != names and not runtime.can_compile(device):
        return eager
    return names


def print_machine(device):
    name = f'{device}, {torch.get_num_threads()} threads'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    precision = runtime.pick_dtype(dtype, device)
    print(f'{size}, {arch}, {name}, {precision}, torch {torch.__version__}')


def run_python(name, *args):
    """Run a script in a process of its own and return what it printed. name: for an error."""
    result = subprocess.run([sys.executable, *args], capture_output=True, errors='replace')
    if result.returncode != 0:
        errors = result.stderr.strip().splitlines() or ['killed']
        raise UserError(f'{name} failed: {errors[-1]}')
    return result.stdout


def medians(rows):
    """Return the median of each column."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


# -----------------------------------------------------------------------------
# compare


def bench_compare():
    """Compare the recipes that the command line names."""
    return compare_recipes(list_candidates())


def compare_recipes(candidates):
    """Train recipes in turns, with the same seeds, and say which differ by more than chance.

    The order turns with each seed, for machines that grow slower or faster.
    Losses are compared by Welch's test. What a recipe takes to the loss of the first is compared
    seed by seed, by the t-test of the logarithm of the ratio. candidates: see list_candidates.
    """
    compare.check_scipy()
    runs = {name: [] for name in candidates}  # {name: the evaluations of each seed}
    turns = []
    order = list(candidates)
    for seed in range(1, seeds + 1):
        turns += [(seed, name) for name in order]
        order.reverse()
    print(f'{len(turns)} runs, one after the other', flush=True)
    for seed, name in runtime.show_progress(turns, 'training'):
        path, flags = candidates[name]
        evals = train_evals(path, seed, *flags)
        runs[name].append(evals)
        print(f'seed {seed}, {name}: {evals[-1]["val_loss"]:.4f}', file=sys.stderr, flush=True)
    width = max(map(len, runs))
    print(f'{"":{width}}{"loss":>9}{"+-":>8}{"bits per byte":>15}{"steps":>8}{"seconds":>9}')
    rows = {name: compare.summarize(of_seeds) for name, of_seeds in runs.items()}
    for name, row in rows.items():
        spread = '-' if row['spread'] is None else f'{row["spread"]:.4f}'
        print(f'{name:{width}}{row["loss"]:>9.4f}{spread:>8}{row["bits"]:>15.4f}', end='')
        print(f'{row["steps"]:>8,}{row["seconds"]:>9.1f}')
    first, *others = runs
    spread = '+- is their standard deviation' if seeds > 1 else 'nothing can be claimed from one'
    print(f'\nmeans of {seeds} seeds; {spread}')
    results = {name: compare.test(runs[first], runs[name]) for name in others}
    for name, result in results.items():
        print(compare.describe(first, name, result))
    return {'runs': rows, 'differences': results}


def list_candidates():
    """Return what is to be compared: {name: (path of the config file, flags)}."""
    if grid is None:
        if len(_files) < 2:
            raise UserError('Name two recipes, or one and a grid: bench.py compare A.py B.py')
        # Numbered, since it may be the same one twice.
        return {f'{n} {name}': (find_config(name), []) for n, name in enumerate(_files, 1)}
    if len(_files) != 1:
        raise UserError('A grid is one of a single recipe: bench.py compare A.py --grid=...')
    axes = []
    for part in grid.split(';'):
        knob, colon, values = part.partition(':')
        if not colon or not knob or not values:
            raise UserError(f"grid='{grid}' is written knob:value,value;knob:value,value")
        axes.append([f'--{knob.strip()}={value.strip()}' for value in values.split(',')])
    path = find_config(_files[0])
    candidates = {}
    for point in itertools.product(*axes):
        candidates[' '.join(point).replace('--', '')] = (path, list(point))
    if len(candidates) < 2:
        raise UserError(f"grid='{grid}' is one point: there is nothing to compare.")
    return candidates


# -----------------------------------------------------------------------------
# race


def bench_race():
    """Compare the time that a recipe takes to the final validation loss of a baseline.

    Evaluations are of the whole split, every ten steps of the recipe, and their time does not
    count; that of compiling would.
    """
    candidates = {'baseline': (find_config(baseline), [])}
    candidates['recipe'] = (find_config(recipe), ['--eval_interval=10'])
    return compare_recipes(candidates)


def find_config(name):
    """Return the path of a config file in the working directory or, if not there, beside this."""
    for path in (Path(name), ROOT / name):
        if path.exists():
            return path
    raise UserError(f'There is no config file {name}.')


def train_evals(config, seed, *flags):
    """Train with a config file. Returns the records of the evaluations after the first."""
    for name, value in {'dataset': dataset, 'eval_interval': eval_interval}.items():
        if value is not None:
            flags = (f'--{name}={value}', *flags)
    records = run_training(config, f'--seed={seed}', *flags)
    evals = [record for record in records if 'val_loss' in record and record['step'] > 0]
    if not evals:
        raise UserError(f'{config} trains no steps: there is nothing to compare.')
    return evals


def run_training(config, *flags):
    """Train with a config file, in a folder that is removed. Returns the records of the log."""
    with tempfile.TemporaryDirectory() as folder:
        flags += (f'--device={device}', f'--out_dir={folder}', '--always_save_checkpoint=False')
        run_python(config, ROOT / 'train.py', config, *flags)
        return report.read_log(folder)


# -----------------------------------------------------------------------------
# step


def bench_step():
    """Measure one training step, eager and compiled, of plain torch and ours.

    Plain torch has an unfused AdamW and all logits at once.
    """
    torch_device = torch.device(pick_device(device))
    return measure_steps(torch_device, pick_variants(torch_device, STEPS), repeats)


def measure_steps(torch_device, names, repeats):
    """Measure a step of each variant, in turns, and print a table."""
    precision = runtime.pick_dtype(dtype, torch_device)
    rows = batch_size or (1 if torch_device.type == 'cpu' else 16)
    shape = SIZES[size] | {'arch': arch, 'block_size': block_size}
    ceiling = runtime.matmul_flops(torch_device, precision)
    results = {name: [] for name in names}
    for _ in range(repeats):
        for name in runtime.show_progress(names, 'timing a step'):  # in turns: speeds drift
            # Each in a process of its own, since a process keeps memory that it has had.
            arguments = json.dumps([name, str(torch_device), precision, rows, shape])
            printed = run_python(name, __file__, 'measure_step', arguments)
            results[name].append(json.loads(printed.splitlines()[-1]))
            ceiling = max(ceiling, runtime.matmul_flops(torch_device, precision))

    print_machine(torch_device)
    matmul = f'matrix products reach {ceiling / 1e12:.3f} TFLOP/s here'
    peak = runtime.peak_flops(torch_device, precision)
    if peak:
        matmul += f', {ceiling / peak:.1%} of the peak'
    print(f'{rows} x {block_size} tokens per step; {matmul}')
    print(f'{"":16}{"ms":>10}{"tokens/s":>12}{"TFLOP/s":>10}{"of ceiling":>12}{"peak GiB":>10}')
    figures = {}
    for name in names:
        seconds, gib, flops = medians(results[name])
        ms = 1000 * seconds
        rate = rows * block_size / seconds
        speed = flops / seconds
        share = speed / ceiling
        print(f'{name:16}{ms:>10,.1f}{rate:>12,.1f}{speed / 1e12:>10.3f}{share:>12.1%}{gib:>10.2f}')
        figures[name] = {
            'ms': ms, 'tokens_per_second': rate, 'flops': speed, 'share': share, 'peak_gib': gib,
        }  # fmt: skip
        if peak:
            figures[name]['mfu'] = speed / peak
    if peak:
        mfu = ', '.join(f'{name} {row["mfu"]:.1%}' for name, row in figures.items())
        print(f'MFU: {mfu}')
    return {'gemm_flops': ceiling, 'variants': figures}


def measure_step(variant, device, dtype, batch_size, shape):
    """Return the seconds, peak memory and operations of a step of a variant, after two others.

    'ours compiled 2**26', for one, has at most so many logits at once in its loss.
    """
    device = torch.device(device)
    is_ours = variant.startswith('ours')
    if is_ours and device.type == 'cpu':
        runtime.keep_freed_memory()
    torch.set_float32_matmul_precision('high')
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape)).to(device)
    if '2**' in variant:
        model.max_logits = 2 ** int(variant.rpartition('2**')[2])
    # Plain torch has its defaults.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=is_ours or None)
    idx = torch.randint(0, 50257, (batch_size, shape['block_size'])).to(device)
    if 'compiled' in variant:
        model.compile()

    def step():
        with runtime.make_autocast(device, dtype):
            loss = model(idx, idx) if is_ours else plain_loss(model, idx, idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # The first step creates the optimizer's state, the second finds memory beside it.
    step()
    step()
    n_steps = 1 if device.type == 'cpu' else 10  # a GPU's are short

    def steps():
        for _ in range(n_steps):
            step()

    seconds = runtime.seconds_of(device, steps) / n_steps
    return seconds, runtime.peak_memory_gib(device), idx.numel() * model.flops_per_token()


def plain_loss(model, x, y):
    return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


# -----------------------------------------------------------------------------
# sample


def bench_sample():
    """Measure generating 64 and 256 tokens greedily: with a KV cache, without, transformers'."""
    torch_device = torch.device(pick_device(device))
    known = ['uncached', 'ours', 'compiled', 'transformers']
    if torch_device.type == 'cuda':
        known.insert(3, 'compiled graphs')
    names = pick_variants(torch_device, known)
    generate = {name: make_generator(name, torch_device) for name in names}
    idx = torch.randint(0, 50257, (1, prompt_tokens), device=torch_device)
    rates = {(name, n): [] for name in names for n in (64, 256)}
    with torch.inference_mode():
        for name, n in runtime.show_progress(rates, 'warming up'):
            n_warmup = n if 'compiled' in name else 8  # it is compiled for each length
            generate[name](idx, n_warmup)
        for _ in range(repeats):
            for name, n in runtime.show_progress(rates, 'sampling'):  # in turns: speeds drift
                rates[name, n].append(n / runtime.seconds_of(torch_device, generate[name], idx, n))

    figures = {f'{name} {n}': statistics.median(values) for (name, n), values in rates.items()}
    print_machine(torch_device)
    print(f'{"tokens/s for":16}{"64 tokens":>12}{"256 tokens":>12}')
    for name in names:
        print(f'{name:16}{figures[f"{name} 64"]:>12.1f}{figures[f"{name} 256"]:>12.1f}')
    peak = runtime.peak_memory_gib(torch_device)
    print(f'peak memory of the process: {peak:.2f} GiB')
    return {'tokens_per_second': figures, 'peak_gib': peak}


def make_generator(name, device):
    """Return a variant as a function (idx, n) -> tokens, with a model of its own."""
    torch.manual_seed(0)  # the same weights in all variants
    model = GPT(GPTConfig(arch=arch, **SIZES[size]))
    model = model.to(device, getattr(torch, runtime.pick_dtype(dtype, device))).eval()
    if name == 'transformers':
        generate = to_transformers(model).generate
        return lambda idx, n: generate(idx, max_new_tokens=n, min_new_tokens=n, do_sample=False)
    if name == 'uncached':
        return lambda idx, n: generate_uncached(model, idx, n)

    # CUDA graphs launch the kernels of a token at once.
    is_compiled = {'compiled': True, 'compiled graphs': 'reduce-overhead'}.get(name, False)
    if device.type == 'cpu':  # as sample.py does
        prepare_for_cpu = fast_cpu_decode if is_compiled else to_column_major
        prepare_for_cpu(model)
    return lambda idx, n: list(model.generate(idx, n, temperature=0, compile=is_compiled))


def generate_uncached(model, idx, n):
    """Generate each token from the whole window, computed anew."""
    for _ in range(n):
        logits = model.next_logits(idx[:, -model.config.block_size :])
        idx = torch.cat((idx, logits.argmax(-1, keepdim=True)), 1)
    return idx


def to_transformers(model):
    """Return the same model in transformers."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError('transformers is not installed: use --variants=uncached,ours') from None
    weight = model.wte.weight
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=weight.dtype)
    return theirs.to(weight.device)


# -----------------------------------------------------------------------------
# gpu

# Of logits at once in the loss, see model.MAX_LOGITS.
CHUNKS = [f'ours compiled 2**{power}' for power in (24, 26, 27, 28, 29)]
# Those that need no download.
RECIPES = ('train_gpt2', 'speedrun_gpt2', 'train_wikitext', 'wikitext_fast', 'train_tinystories')


def bench_gpu():
    """Measure a step, the size of the loss's chunks, sampling, and 50 steps of the recipes.

    The recipes train on the bundled text, with one micro-batch of the same size per step.
    """
    torch_device = torch.device(pick_device(device))
    if torch_device.type == 'cpu' and size != 'tiny':
        raise UserError('bench.py gpu needs a GPU; --size=tiny tries it out on a CPU.')
    if variants:
        raise UserError('variants is for step and sample: bench.py gpu measures all.')
    figures = {}
    figures['step'] = measure_steps(torch_device, pick_variants(torch_device, STEPS), 1)
    print()
    figures['chunks'] = measure_steps(torch_device, pick_variants(torch_device, CHUNKS), 1)
    print()
    figures['sample'] = bench_sample()
    if not (Path('data') / 'shakespeare' / 'meta.json').exists():
        run_python('prepare.py', ROOT / 'prepare.py', '--quiet')
    print(f'\n{"50 steps":18}{"final loss":>12}{"tokens/s":>12}{"TFLOP/s":>10}{"GiB":>8}')
    figures['recipes'] = {recipe: run_recipe(recipe) for recipe in RECIPES}
    return figures


def run_recipe(recipe):
    """Train 50 steps by a recipe, print its figures and return them."""
    flags = {
        'max_iters': 50, 'eval_interval': 50, 'warmup_iters': 5, 'log_interval': 25,
        'gradient_accumulation_steps': 1, 'batch_size': batch_size or 16,
        'block_size': block_size, 'stride': block_size,
        'dataset': 'shakespeare',
    }  # fmt: skip
    if size == 'tiny':
        flags |= SIZES['tiny']
    flags = [f'--{name}={value}' for name, value in flags.items()]
    records = run_training(find_config(f'config/{recipe}.py'), *flags)
    last = [record for record in records if 'tokens_per_second' in record][-1]
    loss = [record for record in records if 'val_loss' in record][-1]['val_loss']
    rate, tflops, gib = last['tokens_per_second'], last['tflops'], last['gib']
    print(f'{recipe:18}{loss:>12.4f}{rate:>12,}{tflops:>10.3g}{gib:>8.2f}', flush=True)
    return {'val_loss': loss, 'tokens_per_second': rate, 'tflops': tflops, 'gib': gib}


# -----------------------------------------------------------------------------
# prepare


def bench_prepare():
    """Measure the MB/s of prepare.py, and its memory, beside those of tiktoken alone."""
    cores = runtime.count_cores()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'text.txt')
        write_text(path)
        with open(path) as file:
            parts = [file.read(2**20) for _ in range(min(32, corpus_mb))]
        vocabulary = tokenizer.build('bpe', parts, 8192)
        tokenizer.save(vocabulary, folder)
        for _ in range(repeats):
            rates = [tiktoken_rate(vocabulary, parts, n_threads) for n_threads in (1, cores)]
            runs.append([*rates, *run_prepare(folder, cores)])

    one_core, all_cores, rate, peak_mib = medians(runs)
    ideal = cores * one_core
    share = rate / ideal
    shares = f'{share:.0%} of {cores} x one, {rate / all_cores:.0%} of these'
    print(f'{corpus_mb} MB of text, medians of {repeats}')
    print(f'tiktoken alone, one core     {one_core:8.1f} MB/s')
    print(f'tiktoken alone, {cores} cores      {all_cores:8.1f} MB/s, ', end='')
    print(f'{all_cores / ideal:.0%} of {cores} x one')
    print(f'prepare.py, {cores} cores          {rate:8.1f} MB/s, {shares}')
    print(f'peak memory                  {peak_mib:8.0f} MiB')
    figures = {'tiktoken': one_core, 'mb_per_second': rate, 'share': share, 'peak_mib': peak_mib}
    return figures | {'runs': runs}


def write_text(path):
    """Write corpus_mb of random lines of Shakespeare, in documents of 75 lines on average, 3 kB."""
    rng = random.Random(0)
    lines = (ROOT / 'corpus' / 'shakespeare.txt').read_text().splitlines(keepends=True)
    with open(path, 'w') as file:
        while file.tell() < corpus_mb * 10**6:
            file.writelines(rng.choices(lines, k=rng.randint(1, 149)))
            file.write('<|endoftext|>\n')


def tiktoken_rate(vocabulary, parts, n_threads):
    """Measure the MB/s of n_threads that encode parts of a text with tiktoken, and do nothing else.

    They take about as long as prepare.py: cores that work longer may become slower.
    """

    def encode(encoding, own_parts):
        for part in own_parts:
            encoding.encoding.encode_to_numpy(part, disallowed_special=())

    rounds = math.ceil(corpus_mb / 32)
    encodings = [vocabulary.copy() for _ in range(n_threads)]
    shares = [rounds * parts[i::n_threads] for i in range(n_threads)]
    start = time.perf_counter()
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(encode, encodings, shares))
    seconds = time.perf_counter() - start
    return rounds * sum(map(len, parts)) / 1e6 / seconds


def run_prepare(folder, cores):
    """Run prepare.py on text.txt. Returns its MB/s and the peak of its memory in MiB."""
    line = [sys.executable, ROOT / 'prepare.py', '--input=text.txt']
    line += [f'--tokenizer={folder}', f'--num_proc={cores}']
    peak_gib = 0
    start = time.perf_counter()
    job = subprocess.Popen(line, cwd=folder, stdout=subprocess.DEVNULL)
    while job.poll() is None:
        peak_gib = max(peak_gib, runtime.process_peak_gib(job.pid))
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    if job.returncode != 0:
        raise UserError('prepare.py failed.')
    return corpus_mb / seconds, peak_gib * 2**10


# -----------------------------------------------------------------------------
# run the benchmark that the command line names first

MEASURES = (bench_race, bench_step, bench_sample, bench_prepare, bench_gpu, bench_compare)
BENCHMARKS = {function.__name__.removeprefix('bench_'): function for function in MEASURES}

_args = sys.argv[1:]
if _args[:1] == ['measure_step']:  # this is a subprocess of `bench.py step`
    print(json.dumps(measure_step(*json.loads(_args[1]))))
    sys.exit()
if '--help' in _args or '-h' in _args:
    configure(globals(), ['--help'])
if not _args or _args[0] not in BENCHMARKS:
    sys.exit(f'Say what to measure: python bench.py {"|".join(BENCHMARKS)}')

_files = []  # of recipes to compare, which are no config files of this script
if _args[0] == 'compare':
    _files = [arg for arg in _args[1:] if not arg.startswith('--')]
configure(globals(), [arg for arg in _args[1:] if arg not in _files])
check_range(globals(), 1, 10**6, 'seeds eval_interval repeats prompt_tokens batch_size')
check_range(globals(), 1, 10**6, 'block_size corpus_mb')
runtime.raise_on_signals()  # so that temporary files are removed
figures = BENCHMARKS[_args[0]]()
if json_file:
    Path(json_file).write_text(json.dumps(figures, indent=1) + '\n')

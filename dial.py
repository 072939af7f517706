"""The dial: from a prepared text, a machine and minutes to a recipe. config/fit.py takes it.

A larger model learns more from a token, a smaller one sees more tokens in the same minutes. So the
dial walks up a ladder of models until one would see too few tokens for its size. The rest of the
recipe follows from how many tokens the run will see, and how often the text is repeated.

The rules were found on two CPU cores with texts of 0.5 to 5 MB (BENCHMARKS.md, "The dial"). Beyond
that they follow the literature that they name.
"""

import math
import os
import sys

import torch

import plan
from checkpoint import checkpoints, read_meta
from data import Dataset, parse_mixture
from model import GPT
from report import human
from runtime import UserError

LADDER = (  # layers and width
    (1, 64), (2, 64), (2, 96), (2, 128), (3, 128), (3, 192), (4, 256), (5, 320), (6, 384),
    (8, 512), (10, 640), (12, 768), (16, 1024), (20, 1280), (24, 1536), (32, 2048),
)  # fmt: skip
LAUNCH = 0.01  # seconds of a step on a GPU, at least: its kernels have to be launched
MOST_OF_MEMORY = 0.8  # of a GPU, by the plan
# Tokens of a micro-batch, at most: more are no faster.
MOST_ON_CPU = 4096
MOST_ON_GPU = 65536

# -----------------------------------------------------------------------------
# the rules


def tokens_per_parameter(n_tokens):
    """Return how many tokens a model should see for each parameter, in a run of n_tokens.

    Few where the run is short: 20, the optimum for a given number of operations (Hoffmann et al.,
    2022), supposes that the loss is not limited by the number of steps.
    """
    return min(20.0, 1.3 * (n_tokens / 1e6) ** 0.4)


def pick_epochs(n_unique):
    """Return how often a text of so many tokens is read at most. More would overfit."""
    return 20.0


def count_fresh(n_tokens, n_unique):
    """Return how many tokens a run sees where those that are repeated count less."""
    return min(n_tokens, math.sqrt(n_tokens * n_unique))


def pick_context(n_fresh):
    """Return block_size: 128 tokens below a million, 1,024 from a hundred million on."""
    return 2 ** min(10, max(7, int(math.log10(n_fresh)) + 2))


def pick_batch(n_fresh):
    """Return the tokens of a step, a power of two: 2,048 for a million.

    The best batch grows as the root of the data (Zhang et al., 2024, "How does critical batch size
    scale in pre-training?").
    """
    exponent = round(10.9 + math.log2(n_fresh / 1e6) / 2)
    return 2 ** min(19, max(9, exponent))


def pick_dropout(n_epochs):
    if n_epochs <= 6:
        return 0.0
    return 0.1 if n_epochs <= 20 else 0.2


def pick_learning_rate(n_embd):
    """Return AdamW's: as 1 / width (Yang et al., 2022, muP). Muon's is the same for all widths."""
    return 1e-2 * min(1.0, 256 / n_embd)


def pick_momentum(n_steps):
    """Return the knobs for short runs, in which little may be averaged, or for long ones."""
    if n_steps < 5000:
        return {'muon_momentum': 0.9, 'beta1': 0.8, 'weight_decay': 0.0, 'warmup_iters': 0}
    return {'muon_momentum': 0.95, 'beta1': 0.9, 'weight_decay': 0.1, 'warmup_iters': 100}


def pick_intervals(n_steps, val_share):
    """Return eval_interval and log_interval: at most ten evaluations, a fifth of the time.

    val_share: of the minutes, for training on as many tokens as validation has. Without a backward
    pass they take a third of that.
    """
    n_evals = max(1, min(10, int(0.2 / (val_share / 3))))
    log_interval = max(1, round(n_steps / 30))
    return {'eval_interval': math.ceil(n_steps / n_evals), 'log_interval': log_interval}


def make_recipe(n_layer, n_embd, n_tokens, n_unique, config):
    """Return {knob: value}, but for the number of steps.

    n_tokens: that the run will see, of a text of n_unique. config: plan_gpus, plan_gpu.
    """
    n_devices = config['plan_gpus']
    most = MOST_ON_CPU if config['plan_gpu'] == 'CPU' else MOST_ON_GPU
    n_fresh = count_fresh(n_tokens, n_unique)
    block_size = min(pick_context(n_fresh), max(1, n_unique // 16))
    n_windows = max(1, pick_batch(n_fresh) // block_size)
    n_windows = math.ceil(n_windows / n_devices) * n_devices
    batch_size = n_windows // n_devices
    while batch_size * block_size > most and batch_size % 2 == 0:
        batch_size //= 2
    recipe = {
        'arch': 'qwen3', 'n_layer': n_layer, 'n_embd': n_embd,
        'n_head': n_embd // (32 if n_embd < 512 else 64),
        'block_size': block_size, 'batch_size': batch_size,
        'gradient_accumulation_steps': n_windows // batch_size,
        'dropout': pick_dropout(n_tokens / n_unique),
        'optimizer': 'muon', 'muon_lr': 0.02, 'learning_rate': pick_learning_rate(n_embd),
        'schedule': 'wsd', 'cooldown_frac': 0.9,
    }  # fmt: skip
    return recipe | pick_momentum(n_tokens / tokens_per_step(recipe))


# -----------------------------------------------------------------------------
# the walk


def choose(config):
    """Return the knobs of a recipe for config['dataset'] and config['max_minutes'].

    config: the knobs of train.py. A run that is resumed keeps what was chosen for it. Raises
    UserError for what cannot be trained in this way.
    """
    minutes = config['max_minutes']
    if minutes is None:
        raise UserError('config/fit.py needs to know how long you can wait: --max_minutes=10')
    if config['init_from'] not in plan.OWN_MODELS:
        raise UserError('config/fit.py chooses a model: take config/finetune.py for a given one.')
    names, shares = parse_mixture(config['dataset'])
    out_dir = config['out_dir']
    if out_dir == 'out':  # nobody has named another
        out_dir = f'out-{os.path.basename(names[0])}'
    run = checkpoints(out_dir)
    if run and not config['plan']:  # from scratch, train.py will refuse it
        before = read_meta(run[-1])['config']
        chosen = make_recipe(*LADDER[0], 1e6, 10**6, config) | pick_intervals(1, 1)
        return {name: before[name] for name in chosen} | {'out_dir': out_dir}

    datasets = [Dataset(name) for name in names]
    n_unique = int(len(datasets[0].train) / shares[0])  # in an epoch
    n_val = sum(len(each.val) for each in datasets)
    n_devices = config['plan_gpus'] if config['plan'] else int(os.environ.get('WORLD_SIZE', 1))
    gpu = plan.pick_gpu(config)
    if gpu == 'CPU' and n_devices > 1:
        raise UserError('config/fit.py times steps on the CPU: start it without torchrun.')
    where = 'this CPU' if gpu == 'CPU' else f'{n_devices} x {gpu}'
    say(f'fit     {minutes:g} minutes on {where}, {n_unique:,} tokens of text')

    config = plan.with_dtype(config | {'plan_gpu': gpu, 'plan_gpus': n_devices})
    recipe, n_tokens, rate = climb(config, datasets[0], n_unique)
    val_share = n_val / rate / (60 * minutes)
    recipe |= pick_intervals(n_tokens / tokens_per_step(recipe), val_share)
    recipe |= {'max_epochs': pick_epochs(n_unique), 'out_dir': out_dir}
    return recipe | {'plan_gpu': gpu} if config['plan'] else recipe


def climb(config, data, n_unique):
    """Climb the ladder of models until one would see too few tokens, and take the one before.

    Returns its recipe, the tokens that a run of max_minutes sees, and tokens per second.
    """
    best = None
    n_tokens = 1e6  # a guess, for the first model
    for size in LADDER:
        recipe = make_recipe(*size, n_tokens, n_unique, config)
        shape = plan.model_shape(config | recipe, data)
        rate = tokens_per_step(recipe) / time_recipe(shape, config | recipe)
        n_tokens = min(60 * config['max_minutes'] * rate, pick_epochs(n_unique) * n_unique)
        with torch.device('meta'):
            n_parameters = GPT(shape).count_parameters()
        ratio = n_tokens / n_parameters
        what = f'{size[0]:>2} x {size[1]:<4} {human(n_parameters):>5} parameters'
        say(f'        {what}{human(round(rate)):>7} tokens/s{ratio:>9.3g} tokens per parameter')
        if best and ratio < tokens_per_parameter(n_tokens):
            break
        best = size, n_tokens, rate
    size, n_tokens, rate = best
    recipe = make_recipe(*size, n_tokens, n_unique, config)
    if config['plan_gpu'] != 'CPU':
        fit_memory(recipe, config, plan.model_shape(config | recipe, data))
    return recipe, n_tokens, rate


def tokens_per_step(recipe):
    n_windows = recipe['batch_size'] * recipe['gradient_accumulation_steps']
    return n_windows * recipe['block_size']


def time_recipe(shape, config):
    """Return the seconds of a step: timed on a CPU, by the plan's formula on GPUs."""
    if config['plan_gpu'] == 'CPU':  # twice, since something else may run for a moment
        return min(plan.time_step(shape, config, at_most=0.5)[0] for _ in range(2))
    with torch.device('meta'):
        model = GPT(shape)
    seconds, how = plan.compute_step(model, config)
    if seconds is None:
        raise UserError(f'The time of a step is {how}.')
    return max(LAUNCH, seconds)


def fit_memory(recipe, config, shape):
    """Divide the micro-batches of a recipe until one fits into a GPU's memory."""
    room = plan.room_gib(config['plan_gpu']) * 2**30
    while recipe['batch_size'] % 2 == 0:
        if plan.dry_run(shape, config | recipe, False, 'gpu')['peak'] < MOST_OF_MEMORY * room:
            break
        recipe['batch_size'] //= 2
        recipe['gradient_accumulation_steps'] *= 2


def say(text):
    """Print a line for a person, once, and not to where --format=json prints."""
    if os.environ.get('RANK', '0') == '0':
        print(text, file=sys.stderr, flush=True)

"""The dial: from a prepared text, a machine and minutes to a recipe. config/fit.py takes it.

A larger model learns more from a token, a smaller one sees more tokens in the same minutes. So the
dial walks up a ladder of models until one would see too few tokens for its size. The rest of the
recipe follows from how many tokens the run will see, and how often the text is repeated.

The rules were found on two CPU cores with texts of 0.5 to 5 MB (BENCHMARKS.md, "The dial"). Beyond
that they follow the literature that they name.
"""

import contextlib
import math
import os
import sys

import torch

import plan
from checkpoint import checkpoints, find, read_meta
from configurator import check_range
from data import Mixture, parse_mixture
from model import GPT
from plan import tokens_per_step
from report import human
from runtime import UserError, forget_peak_memory

LADDER = (  # layers and width
    (1, 64), (2, 64), (2, 96), (2, 128), (3, 128), (3, 192), (4, 192), (4, 256), (5, 320), (6, 384),
    (8, 512), (10, 640), (12, 768), (16, 1024), (20, 1280), (24, 1536), (32, 2048),
)  # fmt: skip
LEAST_TOKENS = 500  # with fewer there is nothing to choose
MOST_EPOCHS = 20.0  # more were not tried
MANY_EPOCHS = 6.0  # with more a larger model is no better
WITHOUT_AVERAGE = 2.0  # epochs; of more, averaged weights are better
WITHOUT_DROPOUT = 8.0  # epochs; more overfit
BYTES = 20  # of a parameter: weight, gradient, moments and average. Others have as much memory
MOST_OF_MEMORY = 0.8  # of a GPU, by the plan
# What a resumed run keeps.
CHOSEN = (
    'arch n_layer n_embd n_head block_size batch_size gradient_accumulation_steps dropout '
    'optimizer learning_rate muon_lr muon_momentum beta1 weight_decay warmup_iters schedule '
    'cooldown_frac average_frac eval_interval log_interval max_epochs max_iters lr_decay_iters'
)

# -----------------------------------------------------------------------------
# the rules


def tokens_per_parameter(n_tokens, n_unique):
    """Return how many tokens a model should see for each parameter, in a run of n_tokens.

    Few where the run is short: 20, the optimum for a given number of operations (Hoffmann et al.,
    2022), supposes that the loss is not limited by the number of steps. A text of n_unique is as
    good as new for some epochs (Muennighoff et al., 2023, "Scaling data-constrained language
    models"); with more of them a larger model is no better.
    """
    excess = max(1.0, n_tokens / n_unique / MANY_EPOCHS)
    # n_tokens / excess are as good as new.
    return min(20.0, excess * max(0.9, 0.4 * (n_tokens / excess / 1e6) ** 0.57))


def pick_context(n_fresh):
    """Return block_size: 128 tokens below a million, 1,024 from a hundred million on."""
    return 2 ** min(10, max(7, int(math.log10(n_fresh)) + 2))


def pick_batch(n_fresh):
    """Return the tokens of a step, a power of two: 2,048 for a million.

    The best batch grows as the root of the data (Zhang et al., 2024, "How does critical batch size
    scale in pre-training?").
    """
    exponent = round(11.1 + math.log2(n_fresh / 1e6) / 2)
    return 2 ** min(19, max(9, exponent))


def pick_dropout(n_epochs):
    """Return dropout: 0.1 where a text is repeated so often that weight decay is not enough."""
    return 0.0 if n_epochs <= WITHOUT_DROPOUT else 0.1


def pick_average(n_epochs):
    """Return average_frac: of a text that is seen once or twice, the average is no better."""
    return 0.15 if n_epochs > WITHOUT_AVERAGE else None


def pick_weight_decay(n_steps, steps_per_epoch):
    """Return weight decay, by which weights forget the steps before over a time of its own.

    That is three quarters of an epoch, 1 / (Muon's rate x decay) steps, however long the run (Wang
    and Aitchison, 2024, "How to set AdamW's weight decay as you scale model and dataset size"); so
    it is strong for small texts (Kim et al., 2025, "Pre-training under infinite compute"). Of long
    epochs it is a tenth of the run, as usual for Muon.
    """
    return min(1.0, max(67 / steps_per_epoch, min(0.1, 500 / n_steps)))


def pick_learning_rate(n_embd):
    """Return AdamW's: from a width of 256 on as 1 / width (Yang et al., 2022, muP).

    Muon's is the same for all.
    """
    return 1e-2 * min(1.0, 256 / n_embd)


def pick_momentum(n_steps):
    """Return the knobs for short runs, in which little may be averaged, or for long ones."""
    if n_steps < 5000:
        return {'muon_momentum': 0.9, 'beta1': 0.8, 'warmup_iters': 0}
    return {'muon_momentum': 0.95, 'beta1': 0.9, 'warmup_iters': 100}


def pick_intervals(n_steps, val_share, hours):
    """Return eval_interval and log_interval: ten evaluations, one an hour at least.

    Where that would take more than a fifth of the time it is fewer. val_share: tokens of validation
    over those of training; without a backward pass they take a third of the time.
    """
    n_evals = max(1, min(max(10, hours), 0.2 / (val_share / 3)))
    log_interval = max(1, round(n_steps / 30))
    return {'eval_interval': math.ceil(n_steps / n_evals), 'log_interval': log_interval}


def make_recipe(n_layer, n_embd, n_tokens, n_unique, config):
    """Return {knob: value}, but for the number of steps.

    n_tokens: that the run will see, of a text of n_unique. config: plan_gpus, plan_gpu.
    """
    n_devices = config['plan_gpus']
    most = 4096 if config['plan_gpu'] == 'CPU' else 65536  # tokens at once; more are no faster
    n_fresh = min(n_tokens, math.sqrt(n_tokens * n_unique))  # repeated tokens count less
    block_size = min(pick_context(n_fresh), max(1, n_unique // 16))
    n_windows = pick_batch(n_fresh) / block_size / n_devices  # of a device
    n_windows = 2 ** max(0, round(math.log2(n_windows)))
    batch_size = min(n_windows, 2 ** int(math.log2(most / block_size)))
    recipe = {
        'arch': 'qwen3', 'n_layer': n_layer, 'n_embd': n_embd,
        'n_head': n_embd // (32 if n_embd < 512 else 64),
        'block_size': block_size, 'batch_size': batch_size,
        'gradient_accumulation_steps': n_windows // batch_size * n_devices,
        'dropout': pick_dropout(n_tokens / n_unique),
        'optimizer': 'muon', 'muon_lr': 0.02, 'learning_rate': pick_learning_rate(n_embd),
        'schedule': 'wsd', 'cooldown_frac': 0.9, 'average_frac': pick_average(n_tokens / n_unique),
    }  # fmt: skip
    n_steps = max(1, n_tokens / tokens_per_step(recipe))
    decay = pick_weight_decay(n_steps, n_unique / tokens_per_step(recipe))
    return recipe | {'weight_decay': decay} | pick_momentum(n_steps)


# -----------------------------------------------------------------------------
# the walk


def choose(config):
    """Return the knobs of a recipe for config['dataset'] and config['max_minutes'].

    config: the knobs of train.py. A run that is resumed keeps what was chosen for it. Raises
    UserError for what cannot be trained in this way.
    """
    check_range(config, 1, 10**9, 'plan_gpus')
    check_range(config, 1e-6, 10**9, 'max_minutes max_epochs')
    check_range(config, 1e-6, 1, 'plan_mfu average_frac')
    if config['init_from'] not in plan.OWN_MODELS:
        raise UserError('config/fit.py chooses a model: take config/finetune.py for a given one.')
    names, shares = parse_mixture(config['dataset'])
    out_dir = config['out_dir']
    if out_dir == 'out':  # nobody has named another
        out_dir = '-'.join(['out', *(os.path.basename(os.path.normpath(name)) for name in names)])
    has_run = bool(checkpoints(out_dir))
    if has_run and config['init_from'] == 'scratch' and not config['plan']:
        return {'out_dir': out_dir}  # which train.py refuses to overwrite
    if config['init_from'] == 'resume' or (has_run and config['init_from'] == 'auto'):
        before = read_meta(find(out_dir, 'last', training=True))['config']
        return {name: before.get(name) for name in CHOSEN.split()} | {'out_dir': out_dir}

    minutes = config['max_minutes']
    if minutes is None:
        raise UserError('config/fit.py needs to know how long you can wait: --max_minutes=10')
    data = open_text(config)
    n_devices = config['plan_gpus'] if config['plan'] else int(os.environ.get('WORLD_SIZE', 1))
    gpu = plan.pick_gpu(config)
    if gpu == 'CPU' and n_devices > 1:
        raise UserError('config/fit.py times steps on one CPU: take one process, or --plan_gpu=.')
    n_unique = int(len(data.datasets[0].train) / shares[0])  # in an epoch
    if n_unique < LEAST_TOKENS:
        raise UserError(f'{config["dataset"]} has {n_unique:,} tokens: {LEAST_TOKENS} are needed.')
    n_epochs = config['max_epochs'] or MOST_EPOCHS
    say(f'fit     {minutes:g} minutes on {n_devices} x {gpu}, {n_unique:,} tokens an epoch')

    filled = config | {'plan_gpu': gpu, 'plan_gpus': n_devices, 'max_epochs': n_epochs}
    recipe, n_tokens = climb(plan.with_dtype(filled), data, n_unique)
    forget_peak_memory()  # of the models that were timed
    # The run times its steps again, may find them faster, and would see the text more often. A flag
    # for the epochs stays as it is.
    if recipe['dropout'] == 0.0 and config['max_epochs'] is None:
        n_epochs = WITHOUT_DROPOUT
    taken = '{n_layer} x {n_embd}, dropout {dropout}, average_frac {average_frac}'.format(**recipe)
    say(f'        taken {taken}, at most {n_epochs:g} epochs')
    n_val = sum(len(each.val) for each in data.datasets)
    recipe |= pick_intervals(n_tokens / tokens_per_step(recipe), n_val / n_tokens, minutes / 60)
    recipe |= {'max_epochs': n_epochs, 'out_dir': out_dir}
    return recipe | {'plan_gpu': gpu} if config['plan'] else recipe


def open_text(config):
    """Return the Mixture of a run. Its notes go to where --format=json does not print."""
    with contextlib.redirect_stdout(sys.stderr):
        data, missing = plan.open_data(config | {'block_size': 1, 'stride': None})
        if missing and config['plan']:  # which writes nothing
            raise UserError(f'{missing[0]} is not prepared, which a plan does not do: omit --plan.')
        return data or Mixture(config['dataset'], 1)


def climb(config, data, n_unique):
    """Climb the ladder of models until one would see too few tokens, and take the one before.

    Returns its recipe, and the tokens that the run sees.
    """
    best = None
    room = plan.room_gib(config['plan_gpu']) * 2**30
    n_tokens = 1e6  # a guess, for the first model
    for size in LADDER:
        recipe = make_recipe(*size, n_tokens, n_unique, config)
        with torch.device('meta'):  # no memory for the weights
            model = GPT(plan.model_shape(config | recipe, data))
        n_parameters = model.count_parameters()
        if best and BYTES * n_parameters > room / 2:
            break
        rate = tokens_per_step(recipe) / time_recipe(model, config | recipe)
        n_tokens = min(60 * config['max_minutes'] * rate, config['max_epochs'] * n_unique)
        ratio = n_tokens / n_parameters
        what = f'{size[0]:>2} x {size[1]:<4} {human(n_parameters):>5} parameters'
        say(f'        {what}{human(round(rate)):>7} tokens/s{ratio:>9.3g} tokens per parameter')
        if best and ratio < tokens_per_parameter(n_tokens, n_unique):
            break
        best = size, n_tokens
    size, n_tokens = best
    recipe = make_recipe(*size, n_tokens, n_unique, config)
    if config['plan_gpu'] != 'CPU':
        fit_memory(recipe, config, plan.model_shape(config | recipe, data))
    return recipe, n_tokens


def time_recipe(model, config):
    """Return the seconds of a step: timed on a CPU, by the plan's formula on GPUs."""
    if config['plan_gpu'] == 'CPU':
        return plan.time_step(model.config, config, at_most=1)[0]
    seconds, how = plan.compute_step(model, config)
    if seconds is None:
        raise UserError(f'The time of a step is {how}.')
    return seconds


def fit_memory(recipe, config, shape):
    """Divide the micro-batches of a recipe until one fits into a GPU's memory."""
    room = plan.room_gib(config['plan_gpu']) * 2**30
    while recipe['batch_size'] > 1:
        if plan.dry_run(shape, config | recipe, False, 'gpu')['peak'] < MOST_OF_MEMORY * room:
            break
        recipe['batch_size'] //= 2
        recipe['gradient_accumulation_steps'] *= 2


def say(text):
    """Print a line for a person, once, and not to where --format=json prints."""
    if os.environ.get('RANK', '0') == '0':
        print(text, file=sys.stderr, flush=True)

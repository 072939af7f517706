"""A long trial, which reports as it goes: kills, random command lines, damaged files.

    python tests/soak.py kills --n=1000     # runs killed at random instants, and begun again
    python tests/soak.py fuzz --n=10000     # random command lines and config files of all scripts
    python tests/soak.py damage --n=2000    # a file of a run or a dataset cut, changed, swapped

Every process is a fork of this one, which has imported everything, so that a case takes a fraction
of a second. It ends with status 1 at the first case that breaks a promise of CONTRIBUTING.md, and
keeps its folder. The same --seed tries the same cases; the instants of kills are the clock's.
"""

import argparse
import importlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from conftest import ROOT, TEXT, TINY, Result, interpret, records, same, weights

import report

# All that scripts import, but for parallel, which reads its rank when it is imported.
IMPORTED = 'documents draft inference model report sources tokenizer torch.distributed.fsdp'
LONGEST = 120  # seconds that a case may take
PATIENCE = 15  # seconds after which a random command gets a Ctrl-C, which counts as a run
TIMES = dict.fromkeys(('tokens_per_second', 'train_seconds', 'tflops', 'gib'))
STEPS = 24
# A run that does everything often, so that a random instant is in the middle of something.
RUN = ['--dataset=sheep', *TINY, '--n_embd=64', '--dropout=0.1', '--gradient_accumulation_steps=2']
RUN += [f'--max_iters={STEPS}', '--eval_interval=3', '--log_interval=1', '--sample_interval=5']
RUN += ['--save_weights_interval=7', '--init_from=auto', '--dtype=float32', '--average_frac=0.2']
PREPARE = ['--input=texts', '--tokenizer=bpe', '--vocab_size=300', '--name=made']
EXPORT = ['--out_dir=whole1', '--dtype=float32', '--to=killed.gguf']
# A process that is killed may take this status: its own, or that of the signal.
ENDINGS = {
    'KILL': {-signal.SIGKILL, 0},
    'TERM': {128 + signal.SIGTERM, -signal.SIGTERM, 0},
    'INT': {128 + signal.SIGINT, -signal.SIGINT, 0},
    'disk': {0, 1},
}


class Broken(Exception):
    """A promise that does not hold."""


def expect(condition, what):
    if not condition:
        raise Broken(what)


# -----------------------------------------------------------------------------
# a script as a fork of this process


def start(script, args, folder, name='case', rank=None, file_limit=None, offline=True, patch=None):
    """Start a script in a process group of its own. Returns its id.

    Its output goes to NAME.out and NAME.err in the folder. rank: (rank, number of processes, port)
    as torchrun would set them. file_limit: no file may become longer, in bytes, as on a full disk.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until the child is ready for it
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        for number, ending in ((1, 'out'), (2, 'err')):
            opened = os.open(f'{name}.{ending}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, number)
        sys.stdin = io.StringIO('')
        sys.stdout = io.TextIOWrapper(io.FileIO(1, 'w', closefd=False), 'utf-8', write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, 'w', closefd=False), 'utf-8', write_through=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        report.draw = lambda *args, **kwargs: None  # each takes a quarter of a second
        if rank is not None:
            number, world, port = map(str, rank)
            os.environ |= {'RANK': number, 'LOCAL_RANK': number, 'WORLD_SIZE': world}
            os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
        elif offline:
            socket.socket.connect = refuse
            socket.getaddrinfo = refuse
        if patch is not None:
            patch()
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        sys.argv = [script, *args]
        code = 128 + signal.SIGINT
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        code, _ = interpret(ROOT / script)
        threading._shutdown()  # waits for threads, as an interpreter that ends does
    except KeyboardInterrupt:
        pass  # before the script could see to it
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code % 256)


def refuse(*args):
    raise ConnectionError('there is no network in this trial')


def has_ended(pid):
    """Whether a process has ended. Its status stays to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait(pids, until=None, enough=all):
    """Wait for processes to end, all or any, or until a time. Raises Broken after LONGEST s."""
    deadline = time.monotonic() + LONGEST
    while not enough(map(has_ended, pids)):
        if until is not None and time.monotonic() >= until:
            return
        expect(time.monotonic() < deadline, f'still running after {LONGEST} s')
        time.sleep(0.002)


def collect(pids):
    """Return the statuses of processes that have ended; negative is a signal.

    Raises Broken when one has left processes of its own behind.
    """
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    for pid in pids:
        deadline = time.monotonic() + 10
        while has_group(pid):
            expect(time.monotonic() < deadline, 'it has left processes behind')
            time.sleep(0.01)
    return statuses


def has_group(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def end(pids):
    for pid in pids:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def run(script, *args, folder, patience=math.inf, **options):
    """Run a script to its end. Returns a Result, as the tests' `run` does.

    patience: seconds after which it gets a Ctrl-C.
    """
    pid = start(script, args, folder, **options)
    try:
        wait([pid], time.monotonic() + patience)
        if not has_ended(pid):
            os.kill(pid, signal.SIGINT)
            wait([pid])
    except Broken:
        end([pid])
        raise
    (code,) = collect([pid])
    out, err = ((folder / f'case.{kind}').read_text(errors='replace') for kind in ('out', 'err'))
    return Result(code, out, err, {})


def run_well(script, *args, folder):
    result = run(script, *args, folder=folder)
    expect(result.code == 0, f'{script} {" ".join(args)}: {result.err}')
    return result


# -----------------------------------------------------------------------------
# kills


def start_train(processes, folder, out, file_limit=None):
    """Start train.py in one or two processes. Returns their ids."""
    args = [*RUN, f'--out_dir={out}']
    if processes == 1:
        return [start('train.py', args, folder, file_limit=file_limit)]
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    ranks = [(number, processes, port) for number in range(processes)]
    return [start('train.py', args, folder, f'rank{rank[0]}', rank, file_limit) for rank in ranks]


def strike(pids, how, victim):
    """Kill one process, or have all of them get a signal, as a terminal or a scheduler does."""
    if how == 'KILL':
        os.killpg(victim, signal.SIGKILL)
    elif how != 'disk':
        for pid in pids:
            os.kill(pid, signal.Signals[f'SIG{how}'])


def wait_as_torchrun(pids, counts):
    """Wait for the processes of a run. One that still waits for another that has ended is ended.

    While they connect to each other it would wait for half an hour, and no signal wakes it.
    """
    wait(pids, enough=any)
    wait(pids, time.monotonic() + 10)
    for how in (signal.SIGTERM, signal.SIGKILL):
        left = [pid for pid in pids if not has_ended(pid)]
        for pid in left:
            os.killpg(pid, how)
            if how == signal.SIGKILL:
                counts['left waiting'] += 1
        wait(pids, time.monotonic() + 10)


def live(begin, folder, seconds, chance, counts, most_kills):
    """Begin a job and kill it, again and again, at last without. Returns how often.

    begin(file_limit) starts its processes. seconds: how long it takes undisturbed.
    """
    n_kills = 0
    while n_kills < most_kills:
        how = chance.choices(['KILL', 'TERM', 'INT', 'disk'], [6, 2, 1, 1])[0]
        limit = chance.randrange(1, 250_000) if how == 'disk' else None
        before = temporaries(folder)
        pids = begin(limit)
        instant = time.monotonic() + chance.uniform(0, seconds)
        try:
            wait(pids, None if how == 'disk' else instant)
            running = [pid for pid in pids if not has_ended(pid)]
            if running:
                strike(pids, how, chance.choice(running))
            wait_as_torchrun(pids, counts)
        except BaseException:
            end(pids)
            raise
        statuses = collect(pids)
        allowed = set(ENDINGS[how])
        if len(pids) > 1:
            # A process that has lost another one.
            allowed |= {1, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM}
        expect(set(statuses) <= allowed, f'status {statuses} after {how}')
        if not running and how != 'disk':
            break  # it was done before its time
        n_kills += 1
        counts[how] += 1
        if temporaries(folder) - before:
            counts['in a save'] += 1
    pids = begin(None)
    try:
        wait(pids)
    except BaseException:
        end(pids)
        raise
    statuses = collect(pids)
    expect(not any(statuses), f'status {statuses} when nobody killed it')
    return n_kills


def temporaries(folder):
    """What is only there while a checkpoint or an export is written, with its time."""
    found = [*(folder / 'killed').glob('.*.tmp'), *folder.glob('.export-*')]
    return {(path, path.stat().st_mtime_ns) for path in found}


def look_for_tracebacks(folder):
    for path in folder.glob('*.err'):
        text = path.read_text(errors='replace')
        expect('Traceback' not in text, f'{path.name}: {text}')


def contents(folder):
    """{name: bytes} of all files of a folder, hidden ones as well, but for locks."""
    found = [path for path in sorted(folder.rglob('*')) if path.is_file()]
    found = [path for path in found if 'lock' not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def saved(out):
    """The checkpoints that both must have: a signal may have left one more before the last."""
    last = out / f'step_{STEPS:08d}'
    return sorted(path.name for path in [last, *out.glob('weights_*')] if path.exists())


def log_without_times(out):
    return [record | TIMES for record in records(out)]


def compare_runs(folder, expected, got):
    """Raise Broken unless two runs have the same weights, optimizer state and log."""
    expected = folder / expected
    got = folder / got
    expect(saved(expected) == saved(got), f'other checkpoints: {saved(expected)}, {saved(got)}')
    expect(same(weights(expected, STEPS), weights(got, STEPS)), 'other weights')
    states = [
        torch.load(out / f'step_{STEPS:08d}' / 'train_state.pt', weights_only=True)
        for out in (expected, got)
    ]
    expect(same(states[0]['optimizer'], states[1]['optimizer']), 'another state of the optimizer')
    expect(log_without_times(expected) == log_without_times(got), 'another log')
    leftovers = [path.name for path in got.glob('.*') if path.name != '.lock']
    expect(not leftovers, f'left over: {leftovers}')


def soak_kills(folder, n, chance):
    """Kill jobs n times at random instants; each ends as if it had never been killed."""
    make_sheep(folder)
    texts = folder / 'texts'
    texts.mkdir()
    for number in range(12):
        (texts / f'{number:02}.txt').write_text(TEXT[number:] * 8)
    seconds = {}
    began = time.monotonic()
    for processes in (1, 2):
        pids = start_train(processes, folder, f'whole{processes}')
        wait(pids)
        expect(not any(collect(pids)), 'a run that nobody killed fails')
        seconds[f'train{processes}'] = time.monotonic() - began
        began = time.monotonic()
    run_well('prepare.py', *PREPARE, folder=folder)
    seconds['prepare'] = time.monotonic() - began
    (folder / 'data' / 'made').rename(folder / 'expected')
    began = time.monotonic()
    run_well('export.py', *EXPORT, folder=folder)
    seconds['export'] = time.monotonic() - began
    exported = (folder / 'killed.gguf').read_bytes()

    def start_export(limit):
        target = folder / 'killed.gguf'
        if target.exists():  # killed after it was written, which is never overwritten
            expect(target.read_bytes() == exported, 'half an export')
            target.unlink()
        return [start('export.py', EXPORT, folder, file_limit=limit)]

    jobs = {
        'train1': lambda limit: start_train(1, folder, 'killed', limit),
        'train2': lambda limit: start_train(2, folder, 'killed', limit),
        'prepare': lambda limit: [start('prepare.py', PREPARE, folder, file_limit=limit)],
        'export': start_export,
    }
    counts = Counter()  # by the way of killing
    by_job = Counter()
    n_lives = 0
    while by_job.total() < n:
        job = chance.choices(list(jobs), [5, 3, 2, 1])[0]
        shutil.rmtree(folder / 'killed', ignore_errors=True)
        shutil.rmtree(folder / 'data' / 'made', ignore_errors=True)
        (folder / 'killed.gguf').unlink(missing_ok=True)
        most = chance.randrange(1, 25)
        by_job[job] += live(jobs[job], folder, seconds[job], chance, counts, most)
        look_for_tracebacks(folder)
        if job in ('train1', 'train2'):
            compare_runs(folder, job.replace('train', 'whole'), 'killed')
        elif job == 'prepare':
            same_bytes = contents(folder / 'data' / 'made') == contents(folder / 'expected')
            expect(same_bytes, 'another dataset')
        else:
            expect((folder / 'killed.gguf').read_bytes() == exported, 'another export')
        n_lives += 1
        told = ', '.join(f'{count} {name}' for name, count in counts.items())
        say(f'{by_job.total():>6,} kills ({told}) in {n_lives} jobs, each ended the same')
    print('by job:', dict(by_job))


# -----------------------------------------------------------------------------
# random command lines


def soak_fuzz(folder, n, chance):
    """Run n random command lines: each is a run, or one sentence and status 1."""
    import test_fuzz

    make_sheep(folder)
    flags = ['--dataset=sheep', *TINY, '--max_iters=2', '--out_dir=trained']
    run_well('train.py', *flags, folder=folder)
    shutil.copytree(folder / 'data', folder / 'kept')

    def run_here(script, *args):
        options = {'folder': folder, 'patch': test_fuzz.simplify, 'patience': PATIENCE}
        result = run(script, *args, **options)
        is_long = result.code in ENDINGS['INT']
        return Result(0, *result[1:]) if is_long else result

    tried = 0
    for script in test_fuzz.BASE:
        for _ in range(math.ceil(n / len(test_fuzz.BASE) / 100)):
            try:
                test_fuzz.fuzz(run_here, folder, script, 100, chance.randrange(10**9))
            except AssertionError as error:
                raise Broken(f'{script}: {error}') from None
            tried += 100
            say(f'{tried:>6,} command lines')


# -----------------------------------------------------------------------------
# damaged files


def flip_bits(path, chance):
    contents = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 2, 8])):
        contents[chance.randrange(len(contents))] ^= 1 << chance.randrange(8)
    path.write_bytes(contents)


def cut(path, chance):
    contents = path.read_bytes()
    path.write_bytes(contents[: chance.randrange(len(contents))])


def blank(path, chance):
    """Zero a stretch, as a file system does that lost a block."""
    contents = bytearray(path.read_bytes())
    begin = chance.randrange(len(contents))
    stop = min(len(contents), begin + chance.choice([1, 16, 512, 4096]))
    contents[begin:stop] = bytes(stop - begin)
    path.write_bytes(contents)


def add(path, chance):
    with open(path, 'ab') as file:
        file.write(chance.randbytes(chance.choice([1, 2, 7, 4096])))


def remove(path, chance):
    path.unlink()


def empty(path, chance):
    path.write_bytes(b'')


def make_folder(path, chance):
    path.unlink()
    path.mkdir()


def dangle(path, chance):
    path.unlink()
    path.symlink_to('nothing')


def swap(path, chance):
    """Exchange it with another file of the same name, or any other."""
    others = [other for other in path.parent.parent.rglob('*') if other.is_file() and other != path]
    alike = [other for other in others if other.name == path.name]
    other = chance.choice(alike or others)
    contents = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(contents)


def change_json(path, chance):
    """Replace one value of a JSON file, or drop it; of other files flip bits."""
    try:
        root = json.loads(path.read_text())
    except ValueError:
        flip_bits(path, chance)
        return
    holder = root
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = chance.choice(keys)
        value = holder[key]
        if isinstance(value, dict | list) and value and chance.random() < 0.9:
            holder = value
            continue
        break
    odd = [None, True, -1, 0, 1.5, 10**30, '', '../x', '\x00', 'x' * 300, [], {}, [[]], {'a': 1}]
    if chance.random() < 0.15:
        del holder[key]
    else:
        holder[key] = chance.choice(odd)
    path.write_text(json.dumps(root))


DAMAGES = [flip_bits, cut, blank, add, remove, empty, make_folder, dangle, swap, change_json]
AGAIN = ['--dataset=sheep', *TINY, '--dtype=float32', '--eval_interval=2', '--keep_last=9']
AGAIN += ['--lr_decay_iters=8']  # the same rates, whichever checkpoint a run goes on from
SHORT = [*AGAIN, '--max_iters=2', '--out_dir=new']
LAST = '--init_from=out/step_00000006'
SAMPLE = ['--max_new_tokens=20', '--num_samples=1', '--start=a', '--format=jsonl']
TRIALS = {
    'resume': ['train.py', *AGAIN, '--max_iters=8', '--init_from=resume'],
    'auto': ['train.py', *AGAIN, '--max_iters=8', '--init_from=auto'],
    'train': ['train.py', *SHORT],
    'finetune': ['train.py', *SHORT, LAST],
    'sample': ['sample.py', *SAMPLE, '--checkpoint=last'],
    'evaluate': ['evaluate.py', '--checkpoint=last'],
    'evaluate the folder': ['evaluate.py', LAST, '--input=sheep.txt'],
    'export': ['export.py', '--checkpoint=last', '--to=new.gguf'],
    'plot': ['plot.py'],
    'prepare': ['prepare.py', '--input=sheep.txt', '--tokenizer=data/sheep', '--name=other'],
}


def soak_damage(folder, n, chance):
    """Damage a file of a run or a dataset n times, and use it: it is a run, or one sentence.

    A run that resumes all the same ends with the weights that it would have had.
    """
    world = folder / 'world'
    world.mkdir()
    make_sheep(world)
    run_well('train.py', *AGAIN, '--max_iters=6', folder=world)
    pristine = folder / 'pristine'
    shutil.copytree(world, pristine)
    run_well(*TRIALS['resume'], folder=world)
    expected = weights(world / 'out', 8)
    sampled = {}  # by the step of the checkpoint
    for step in (2, 4, 6):
        source = f'--init_from=out/step_{step:08d}'
        sampled[step] = run_well('sample.py', *SAMPLE, source, folder=world).out
    endings = Counter()
    for number in range(n):
        shutil.rmtree(world)
        shutil.copytree(pristine, world)
        victims = [path for path in sorted(world.rglob('*')) if path.is_file()]
        victims = [path for path in victims if path.parent != world and path.name != '.lock']
        path = chance.choice([victim for victim in victims if victim.stat().st_size])
        damage = chance.choice(DAMAGES)
        damage(path, chance)
        name = chance.choice(list(TRIALS))
        result = run(*TRIALS[name], folder=world)
        where = path.relative_to(world)
        what = f'{number}: {damage.__name__} of {where}, then {name}: {result.err}'
        expect(result.code in (0, 1), f'status {result.code}: {what}')
        expect(not result.has_traceback, what)
        if result.code == 1:
            lines = result.err.strip().split('\n')
            # One that is damaged is named, and the one before it tried.
            sentences = [line for line in lines if ': it is skipped.' not in line]
            expect(sentences[0] and len(sentences) == 1, f'more than a sentence: {what}')
        in_run = where.parts[0] == 'out'
        if result.code == 0 and in_run and name in ('resume', 'auto'):
            expect(same(weights(world / 'out', 8), expected), f'other weights: {what}')
        if result.code == 0 and in_run and name == 'sample':
            expect(result.out in sampled.values(), f'another sample: {what}')
            if result.out != sampled[6]:
                expect('skipped' in result.err, f'nothing was said: {what}')
        endings[name, result.code] += 1
        if (number + 1) % 100 == 0:
            n_runs = sum(count for (_, code), count in endings.items() if code == 0)
            say(f'{number + 1:>6,} damaged files: {n_runs} runs all the same')
    for name in TRIALS:
        print(f'  {name}: {endings[name, 0]} runs, {endings[name, 1]} sentences')


# -----------------------------------------------------------------------------


def make_sheep(folder):
    (folder / 'sheep.txt').write_text(TEXT)
    run_well('prepare.py', '--input=sheep.txt', '--tokenizer=byte', folder=folder)


def say(line):
    print(f'{time.monotonic() - BEGAN:>7,.0f} s {line}', flush=True)


if __name__ == '__main__':
    BEGAN = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('what', choices=['kills', 'fuzz', 'damage'])
    parser.add_argument('--n', type=int, required=True)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter('ignore')
    for name in IMPORTED.split():
        importlib.import_module(name)
    folder = Path(tempfile.mkdtemp(prefix='soak-'))
    trial = globals()[f'soak_{options.what}']
    try:
        trial(folder, options.n, random.Random(options.seed))
    except Broken as broken:
        sys.exit(f'{broken}\n{folder} has what was left.')
    shutil.rmtree(folder)

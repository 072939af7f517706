"""What torch.compile makes of it: how many graphs, with what in them, and none after the first.

Dynamo alone, whose backend counts: what it captures on a CPU it captures on a GPU. A graph break
costs speed, and what is compiled again costs minutes, in the middle of a run.
"""

import contextlib
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, train
from torch._dynamo.utils import counters

import inference
import model as model_module
import optim
import parallel
from model import GPT, GPTConfig

LLAMA = pytest.param('llama', marks=pytest.mark.slow)  # is qwen3, but for its norms of q and k
ARCHITECTURES = ('gpt2', 'qwen3', LLAMA)
HALF = [('float32', True), ('bfloat16', False)]  # of what train.py can be asked for
OTHER_HALF = [
    pytest.param('float32', False, marks=pytest.mark.slow),
    pytest.param('bfloat16', True, marks=pytest.mark.slow),
]
LAYERS = 2
SHAPE = {'vocab_size': 60, 'n_layer': LAYERS, 'n_head': 4, 'n_embd': 32, 'block_size': 16}
PRODUCTS = 4  # linear layers in a block
CHUNKS = 4  # of the loss: 4 x 16 tokens, each with 64 logits, 16 tokens at once
FEW_TOKENS = ['--batch_size=1', '--block_size=16', '--gradient_accumulation_steps=2']
FEW_TOKENS += ['--max_iters=4', '--eval_interval=2']
TEXT = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def few_logits(monkeypatch):
    """Have the loss computed in chunks, although the model is tiny."""
    monkeypatch.setattr(model_module, 'MAX_LOGITS', {'cpu': 2048, 'gpu': 2048})


@pytest.fixture
def graphs(monkeypatch):
    """What is captured, in place of a compiler: for each graph, {operation: how often}."""
    captured = []
    real = torch.compile

    def backend(module, inputs):
        operations = Counter()
        for part in module.modules():  # what is computed again is a graph in the graph
            if isinstance(part, torch.fx.GraphModule):
                for node in part.graph.nodes:
                    if node.op in ('call_function', 'call_method'):
                        operations[getattr(node.target, '__name__', str(node.target))] += 1
        captured.append(operations)
        return module.forward

    def count(function, **options):
        return real(function, backend=backend)

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, 'compile', count)
    yield captured
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    """As under torchrun --nproc_per_node=1: a group of one process, which gloo connects."""
    store = dist.FileStore(str(tmp_path / 'store'), 1)
    dist.init_process_group('gloo', rank=0, world_size=1, store=store)
    monkeypatch.setattr(parallel, 'launched', True)
    yield
    dist.destroy_process_group()


def make_model(arch):
    """A tiny model; but for GPT-2, two heads of queries share one of keys and values."""
    more = {}
    if arch != 'gpt2':
        more = {'n_kv_head': 2}
    torch.manual_seed(0)
    return GPT(GPTConfig(arch=arch, **SHAPE, **more))


def make_autocast(dtype):
    """The context of a training step."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast('cpu', getattr(torch, dtype))


def take_steps(train_model, dtype, n=3):
    """The last loss of n steps, each of two micro-steps, as train.py makes them."""
    for _ in range(n):
        for is_last in (False, True):
            parallel.sync_gradients(train_model, is_last)
            with make_autocast(dtype):
                loss = train_model(TEXT, TEXT)
            loss.backward()
    return loss.detach()


def evaluate(model, dtype):
    """An evaluation whose last batch is not full."""
    tokens = torch.arange(16 * 9 + 4) % 60
    return inference.evaluate_loss(model, tokens, 16, 4, make_autocast(dtype))


def breaks():
    """How often Dynamo gave up and left something to Python."""
    return sum(counters['graph_break'].values())


def products(graph):
    return graph['linear']


def attentions(graph):
    return graph['scaled_dot_product_attention']


# -----------------------------------------------------------------------------
# training and evaluation


@pytest.mark.parametrize(('dtype', 'recompute'), [*HALF, *OTHER_HALF])
@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_a_step_is_one_graph_and_an_evaluation_one(graphs, arch, dtype, recompute):
    eager = make_model(arch)
    expected = take_steps(eager, dtype)
    gradients = {name: parameter.grad for name, parameter in eager.named_parameters()}
    expected_nats, _ = evaluate(eager, dtype)

    model = make_model(arch)
    if recompute:
        model.checkpoint_activations()
    model.compile()
    loss = take_steps(model, dtype, n=1)
    assert [products(graph) for graph in graphs] == [LAYERS * PRODUCTS + CHUNKS]
    assert attentions(graphs[0]) == LAYERS
    take_steps(model, dtype, n=2)
    assert len(graphs) == 1

    assert torch.equal(loss, expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name

    nats, _ = evaluate(model, dtype)
    assert nats == expected_nats
    assert [products(graph) for graph in graphs[1:]] == [LAYERS * PRODUCTS + CHUNKS]
    evaluate(model, dtype)
    take_steps(model, dtype, n=1)
    evaluate(model, dtype)
    assert len(graphs) == 2, 'a batch that is not full is not compiled'
    assert breaks() == 0


def test_train_py_compiles_two_graphs_and_no_more(graphs, run, sheep):
    flags = ['--compile', *FEW_TOKENS]
    result = train(run, *flags, '--arch=qwen3', '--n_kv_head=1', '--optimizer=muon')
    assert ', compiled' in result.out
    trial, *of_model = graphs
    assert trial == {'add': 1}, "can_compile's"
    assert [attentions(graph) for graph in of_model] == [2, 2], 'an evaluation and a step'
    assert breaks() == 0


# -----------------------------------------------------------------------------
# several processes


@pytest.mark.parametrize(('dtype', 'recompute'), HALF)
@pytest.mark.parametrize('arch', ['qwen3', pytest.param('gpt2', marks=pytest.mark.slow)])
def test_under_ddp_it_is_the_same_graphs(graphs, one_process, arch, dtype, recompute):
    model = make_model(arch)
    if recompute:
        model.checkpoint_activations()
    train_model = parallel.distribute(model, 'cpu', dtype)
    assert train_model is not model
    model.compile()
    take_steps(train_model, dtype, n=1)  # with a micro-step that does not average
    assert [products(graph) for graph in graphs] == [LAYERS * PRODUCTS + CHUNKS]
    evaluate(model, dtype)
    assert len(graphs) == 2
    take_steps(train_model, dtype, n=3)
    evaluate(model, dtype)
    assert len(graphs) == 2
    assert breaks() == 0


def compile_sharded(model, blocks):
    """What train.py does; blocks: with the line for activation checkpointing."""
    model.compile()
    if blocks:
        for block in model.blocks:
            block.forward = torch.compile(block.forward)


def check_sharded(graphs, model, dtype, blocks):
    """Train and evaluate. Whether a block is captured, once for all, and nothing again."""
    take_steps(model, dtype, n=1)
    of_step = list(graphs)
    evaluate(model, dtype)
    of_evaluation = graphs[len(of_step) :]
    for captured in (of_step, of_evaluation):
        assert [attentions(graph) for graph in captured if attentions(graph)] == [1] * blocks
        assert sum(products(graph) for graph in captured) == PRODUCTS * blocks + CHUNKS
    n_graphs = len(graphs)
    n_breaks = breaks()
    take_steps(model, dtype, n=3)
    evaluate(model, dtype)
    assert len(graphs) == n_graphs
    assert breaks() == n_breaks == 2, "where FSDP's hooks are: one in a step, one in an evaluation"


@pytest.mark.parametrize(('dtype', 'recompute'), [*HALF, *OTHER_HALF])
@pytest.mark.parametrize('arch', ['qwen3', pytest.param('gpt2', marks=pytest.mark.slow), LLAMA])
def test_under_fsdp_all_blocks_are_one_graph(graphs, one_process, arch, dtype, recompute):
    model = make_model(arch)
    if recompute:
        model.checkpoint_activations()
    train_model = parallel.distribute(model, 'cpu', dtype, fsdp=True)
    compile_sharded(model, blocks=recompute)
    check_sharded(graphs, train_model, dtype, blocks=1)


def test_without_a_line_recomputed_blocks_are_not_compiled(graphs, one_process):
    """Why train.py compiles block.forward: should this fail, torch can do without."""
    model = make_model('qwen3')
    model.checkpoint_activations()
    train_model = parallel.distribute(model, 'cpu', 'float32', fsdp=True)
    compile_sharded(model, blocks=False)
    check_sharded(graphs, train_model, 'float32', blocks=0)


@pytest.mark.parametrize('recompute', [False, True])
def test_train_py_compiles_sharded_blocks(
    graphs, one_process, run, sheep, monkeypatch, recompute
):
    monkeypatch.setattr(parallel, 'init_process_group', lambda device, backend, n: device)
    monkeypatch.setattr(parallel, 'exit', lambda status: None)
    flags = ['--compile', '--fsdp', f'--activation_checkpointing={recompute}']
    result = train(run, *flags, *FEW_TOKENS, '--arch=qwen3', '--n_kv_head=1')
    assert ' x 1 processes' in result.out
    of_blocks = [graph for graph in graphs if attentions(graph)]
    assert [attentions(graph) for graph in of_blocks] == [1, 1], 'an evaluation and a step'
    assert [products(graph) for graph in of_blocks] == [PRODUCTS, PRODUCTS]


# -----------------------------------------------------------------------------
# generation


@pytest.mark.parametrize('prompt', [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_a_token_is_one_graph_at_all_positions(graphs, arch, prompt):
    model = make_model(arch).eval()
    idx = TEXT[:2, :prompt]
    tokens = []
    expected = [0] + [1] * 19  # the prompt is not compiled, nor is what has no cache
    for n_graphs, token in zip(expected, model.generate(idx, 20, True, temperature=0), strict=True):
        assert len(graphs) == n_graphs
        tokens.append(token)
    assert attentions(graphs[0]) == LAYERS
    assert products(graphs[0]) == LAYERS * PRODUCTS + 1
    assert torch.equal(torch.cat(tokens), torch.cat(list(model.generate(idx, 20, temperature=0))))

    for length in (20, 8, 7, 9, 20):
        list(model.generate(idx, length, True, temperature=0))
    assert len(graphs) == 2, 'one for the first size of the cache, one for all others'
    assert breaks() == 0


def test_fast_decoding_on_a_cpu_is_one_graph(graphs):
    model = make_model('qwen3').eval()
    inference.fast_cpu_decode(model)
    list(model.generate(TEXT[:2, :3], 20, True, temperature=0))
    assert len(graphs) == 1
    assert products(graphs[0]) == 0, 'sums of products, of each row'
    assert breaks() == 0


# -----------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize(
    ('arch', 'shapes'),
    [
        ('gpt2', 3),  # q, k, v and proj; fc; proj of the MLP
        ('llama', 4),  # q and proj; k and v; fc, two in one; proj of the MLP
        ('qwen3', 4),
    ],
)
def test_muon_compiles_each_shape_once(graphs, arch, shapes):
    model = make_model(arch)
    optimizers = optim.make_optimizers(
        model, 'muon', 1e-3, (0.9, 0.95), 0.1, 0.02, (0.95, 0.95), compile=True
    )
    numbers = []
    for _ in range(4):
        take_steps(model, 'float32', n=1)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        numbers.append(len(graphs))
    assert numbers == [shapes] * 4
    of_long = 5  # whose steps are products of A = X X^T
    assert {graph['baddbmm'] for graph in graphs} == {10, of_long}, 'five steps in each'
    assert shapes < torch._dynamo.config.recompile_limit, 'else the rest would not be compiled'
    assert breaks() == 0


GRADIENTS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import runtime
from model import GPT, GPTConfig

assert runtime.can_compile('cpu')
model = GPT(GPTConfig('qwen3', 500, 128, n_layer=1, n_head=2, n_embd=64))
model.compile()
idx = torch.randint(50, (16, 128))
gradients = []
for _ in range(20):
    model.zero_grad()
    model(idx, idx.roll(1)).backward()
    gradients.append(model.wte.weight.grad.clone())
print(sum(torch.equal(gradient, gradients[0]) for gradient in gradients))
"""


def test_a_compiled_step_repeats_to_the_bit():
    """Inductor's own kernel for an embedding's gradient adds up as threads come by."""
    line = [sys.executable, '-c', GRADIENTS, str(ROOT)]
    result = subprocess.run(
        line, env=os.environ | {'OMP_NUM_THREADS': '2'}, capture_output=True, text=True, timeout=300
    )
    assert result.stdout == '20\n', result.stderr

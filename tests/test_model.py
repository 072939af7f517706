"""The model against transformers, plain autograd, float64 and published figures."""

import contextlib
import json
import math

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import Bomb
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Model,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

import model as model_module
import optim
from inference import fast_cpu_decode, to_column_major
from model import (
    GPT,
    IGNORE,
    PUBLISHED,
    GPTConfig,
    Linear,
    RMSNorm,
    UserError,
    hf_tensors,
    sample_next,
)

SMALL = {'vocab_size': 1000, 'block_size': 48, 'n_layer': 3, 'n_head': 4, 'n_embd': 64}
SHAPES = {
    'gpt2': {'arch': 'gpt2'},
    'gpt2 without biases': {'arch': 'gpt2', 'bias': False, 'n_head': 2, 'vocab_size': 64},
    'qwen3': {'arch': 'qwen3'},
    'qwen3 of another shape': {
        'arch': 'qwen3',
        'n_kv_head': 1,
        'head_dim': 32,
        'tie_weights': False,
        'rope_theta': 1e6,
        'intermediate_size': 100,
    },
    'llama': {'arch': 'llama', 'n_kv_head': 2},
    'llama 3': {  # a context of 16 made 8 times as long
        'arch': 'llama',
        'tie_weights': False,
        'rope_theta': 500.0,
        'rope_scaling': {
            'rope_type': 'llama3',
            'factor': 8.0,
            'low_freq_factor': 1.0,
            'high_freq_factor': 4.0,
            'original_max_position_embeddings': 16,
        },
    },
    'qwen2': {'arch': 'qwen2', 'n_kv_head': 2},
}
every_shape = pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)


def small_model(seed=0, **changes):
    """A model whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for matrix in (model.wte.weight, model.lm_head.weight):
            matrix[model.config.vocab_size :] = 0
    return model


def random_ids(model, *shape):
    return torch.randint(0, model.config.vocab_size, shape)


def continuations(model, *args, **kwargs):
    """What generate yields, as one tensor (B, max_new_tokens)."""
    return torch.cat(list(model.generate(*args, **kwargs)), 1)


# -----------------------------------------------------------------------------
# logits, loss, gradients

RMS_NORMS = (
    modeling_llama.LlamaRMSNorm, modeling_qwen2.Qwen2RMSNorm, modeling_qwen3.Qwen3RMSNorm,
)  # fmt: skip


def norm_in_full_precision(self, x):
    """transformers computes RMSNorm in float32 whatever the model's dtype; a reference for float64
    must not."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_norm_and_its_gradients_are_those_of_float64(dtype):
    torch.manual_seed(0)
    x = (1e4 * torch.randn(2, 3, 32)).to(dtype)  # squares have no place in float16
    norm = RMSNorm(32, 1e-5)
    norm.weight.data.normal_()
    norm.to(dtype)
    gradient = torch.randn(2, 3, 32).to(dtype)
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, norm.weight)]
    expected = F.rms_norm(inputs[0].double(), (32,), inputs[1].double(), 1e-5)
    expected.backward(gradient.double())
    x.requires_grad_()
    found = norm(x)
    found.backward(gradient)
    pairs = ((found, expected), (x.grad, inputs[0].grad), (norm.weight.grad, inputs[1].grad))
    for ours, exact in pairs:
        assert ours.dtype == dtype
        off = (ours.double() - exact).norm() / exact.norm()
        assert off < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize('arch', ['gpt2', 'llama', 'qwen2', 'qwen3'])
def test_a_cpu_attends_in_float32_and_multiplies_in_16_bits(monkeypatch, arch):
    shape = {'vocab_size': 64, 'block_size': 16, 'n_layer': 2, 'n_head': 2, 'n_embd': 32}
    seen = []

    def attention(q, k, v, *args, original=F.scaled_dot_product_attention, **kwargs):
        seen.extend([q.dtype, k.dtype, v.dtype])
        y = original(q, k, v, *args, **kwargs)
        seen.append(y.dtype)
        return y

    def gradients(model, autocast):
        with autocast:
            loss = model(idx, idx.roll(1, 1))
        loss.backward()
        assert seen == 4 * model.config.n_layer * [torch.float32]
        seen.clear()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    monkeypatch.setattr(F, 'scaled_dot_product_attention', attention)
    torch.manual_seed(0)
    model = GPT(GPTConfig(arch=arch, **shape))
    idx = torch.randint(0, 64, (2, 16))
    exact = gradients(model, contextlib.nullcontext())
    model.zero_grad()
    products = []
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc, block.mlp.proj):
            layer.register_forward_hook(lambda *args: products.append(args[-1].dtype))
    rounded = gradients(model, torch.autocast('cpu', torch.bfloat16))
    assert products == 8 * [torch.bfloat16]
    off = (rounded - exact).norm() / exact.norm()
    assert 0 < off < 0.03


@every_shape
@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_logits_loss_and_gradients_are_those_of_transformers(
    tmp_path, monkeypatch, dtype, tolerance, seed, shape
):
    attention = 'eager'  # whose softmax is in float32, too
    if dtype == torch.float64:
        attention = 'sdpa'
        for norm in RMS_NORMS:
            monkeypatch.setattr(norm, 'forward', norm_in_full_precision)
    model = small_model(seed, **shape).to(dtype).eval()
    vocab_size = model.config.vocab_size
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, attn_implementation=attention
    ).eval()

    idx = random_ids(model, 3, 48)
    logits = theirs(idx).logits
    assert (model(idx)[..., :vocab_size] - logits).abs().max() < tolerance
    loss = model(idx[:, :-1], idx[:, 1:])
    reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    assert loss.dtype == dtype
    assert abs(loss - reference) < tolerance

    loss.backward()
    reference.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad  # so that the gradients have names, too
    gradients = hf_tensors(model)
    for name, parameter in theirs.named_parameters():
        if name in gradients:  # without biases there are none
            difference = gradients[name] - parameter.grad
            assert difference.norm() <= 1e-5 * parameter.grad.norm(), name
    assert set(gradients) <= {name for name, _ in theirs.named_parameters()}


def test_a_token_cannot_see_those_after_it():
    model = small_model().eval()
    idx = random_ids(model, 1, 30)
    changed = idx.clone()
    changed[0, 20:] = random_ids(model, 10)
    before = model(idx)
    after = model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


@every_shape
def test_a_context_longer_than_block_size_is_refused(shape):
    model = small_model(**shape).eval()
    idx = random_ids(model, 2, 49)
    with pytest.raises(UserError, match=r'49 .*block_size=48'):
        model(idx)
    with pytest.raises(UserError, match=r'49 .*block_size=48'):
        model(idx, idx)
    assert model(idx[:, 1:]).shape[:2] == (2, 48)


def test_ignored_targets_do_not_count():
    model = small_model().eval()
    idx = random_ids(model, 2, 20)
    targets = random_ids(model, 2, 20)
    targets[0, 5:] = IGNORE
    log_probabilities = model(idx).log_softmax(-1)
    kept = []
    for b in range(2):
        for t in range(20):
            if targets[b, t] != IGNORE:
                kept.append(log_probabilities[b, t, targets[b, t]])
    assert len(kept) == 25
    assert model(idx, targets).item() == pytest.approx(-torch.stack(kept).mean().item(), rel=1e-6)


@pytest.mark.parametrize('arch', ['gpt2', 'llama'])
def test_a_loss_in_chunks_is_the_loss(monkeypatch, arch):
    torch.manual_seed(0)
    is_gpt2 = arch == 'gpt2'
    model = GPT(GPTConfig(**SMALL | {'arch': arch, 'tie_weights': is_gpt2})).double()
    x = random_ids(model, 4, 48)
    y = x.roll(-1, 1)
    y[0, 5:20] = IGNORE
    results = []
    for chunk in (2**30, 5000):  # all rows at once, and four or five at a time
        monkeypatch.setattr(model_module, "MAX_LOGITS", {'cpu': chunk})
        loss = model(x, y)
        model.zero_grad()
        (3 * loss).backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        results.append((loss.detach(), gradients))
    plain, gradients = results[0]
    chunked, chunked_gradients = results[1]
    assert (plain - chunked).abs() < 1e-12
    for a, b in zip(gradients, chunked_gradients, strict=True):
        assert (a - b).abs().max() < 1e-12
    with torch.no_grad():
        assert (model(x, y) - plain).abs() < 1e-12
    with torch.autocast('cpu', torch.bfloat16):
        assert model.float()(x, y).item() == pytest.approx(plain.item(), rel=1e-3)


@pytest.mark.parametrize('chunk', [2**30, 5000], ids=['at once', 'in chunks'])
def test_the_losses_of_all_targets_have_the_loss_as_mean(monkeypatch, chunk):
    monkeypatch.setattr(model_module, "MAX_LOGITS", {'cpu': chunk})
    model = small_model(arch='qwen3', vocab_size=999).double()
    idx = random_ids(model, 3, 48)
    targets = idx.roll(-1, 1)
    targets[0, 5:20] = IGNORE
    targets[2] = IGNORE
    counts = targets != IGNORE
    log_probabilities = model(idx).log_softmax(-1)
    expected = -log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]

    losses = model(idx, targets, reduction='none')
    assert losses.shape == (3, 48)
    assert (losses[~counts] == 0).all()
    assert (losses - expected)[counts].abs().max() < 1e-12
    mean = losses.sum() / counts.sum()
    assert (model(idx, targets) - mean).abs() < 1e-12
    with torch.no_grad():
        assert (model(idx, targets, reduction='none') - losses).abs().max() < 1e-12

    model(idx, targets).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    mean.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).abs().max() < 1e-12, 'losses may be weighed by others'


def test_evaluating_computes_no_gradients(monkeypatch):
    monkeypatch.setattr(model_module, "MAX_LOGITS", {'cpu': 5000})
    model = small_model()
    idx = random_ids(model, 2, 20)
    with FlopCounterMode(display=False) as forward:
        model(idx)
    with FlopCounterMode(display=False) as evaluating, torch.no_grad():
        model(idx, idx)
    assert evaluating.get_total_flops() == forward.get_total_flops()


@pytest.mark.parametrize('in_chunks', [False, True])
@pytest.mark.parametrize('tied', [False, True])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(monkeypatch, tied, in_chunks):
    if in_chunks:
        monkeypatch.setattr(model_module, "MAX_LOGITS", {'cpu': 5000})
    model = small_model(arch='qwen3', n_layer=3, tie_weights=tied)
    idx = random_ids(model, 2, 20)
    model(idx, idx).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    optim.freeze(model, 2)
    model(idx, idx).backward()
    frozen = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert frozen == {name for name in expected if name.startswith(('wte', 'blocks.0', 'blocks.1'))}
    for name in expected.keys() - frozen:
        torch.testing.assert_close(model.get_parameter(name).grad, expected[name])


# -----------------------------------------------------------------------------
# generation


@every_shape
@pytest.mark.parametrize('batch_size', [1, 4])
def test_cached_generation_is_uncached_beyond_the_window_too(shape, batch_size):
    model = small_model(**shape).eval()
    for length, new in ((1, 20), (20, 60), (48, 5), (60, 5)):
        prompt = random_ids(model, batch_size, length)
        out = prompt
        for _ in range(new):
            out = torch.cat((out, model(out[:, -48:])[:, -1:].argmax(-1)), 1)
        generated = continuations(model, prompt, new, temperature=0)
        assert torch.equal(generated, out[:, length:])


def test_greedy_generation_is_that_of_transformers(tmp_path):
    model = small_model(arch='qwen3').eval()
    model.save_pretrained(tmp_path)
    prompt = random_ids(model, 2, 7)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = theirs.generate(prompt, max_new_tokens=30, do_sample=False)
    assert torch.equal(continuations(model, prompt, 30, temperature=0), expected[:, 7:])


@pytest.mark.slow  # the first compilation takes most of a minute
@pytest.mark.parametrize('batch_size', [1, 3])
@every_shape
def test_compiled_generation_is_eager_generation(batch_size, shape):
    model = small_model(**shape).eval()
    prompt = random_ids(model, batch_size, 7)
    eager = continuations(model, prompt, 20, temperature=0)
    fast_cpu_decode(model)
    compiled = continuations(model, prompt, 20, compile=True, temperature=0)
    assert torch.equal(eager, compiled)


@every_shape
def test_column_major_matrices_hold_the_same_values(tmp_path, shape):
    model = small_model(**shape).eval()
    other = small_model(**shape).eval()
    to_column_major(other)
    assert not other.blocks[0].attn.proj.weight.is_contiguous()
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    idx = random_ids(model, 2, 48)
    assert (model(idx).exp() - other(idx).exp()).abs().max() < 1e-5
    other.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path).wte.weight, model.wte.weight)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(1, 1, 48), (4, 48), (5, 1, 48)])
def test_rows_summed_one_by_one_are_a_matrix_product(monkeypatch, shape, bias):
    layer = Linear(48, (64, 32), bias)
    x = torch.randn(shape)
    with torch.no_grad():
        expected = layer(x)
        fast_cpu_decode(layer)
        monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
        found = layer(x)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'temperature': 0.5},
        {'temperature': 1.7, 'top_k': 7},
        {'top_p': 0.8},
        {'min_p': 0.1},
        {'temperature': 1.3, 'top_k': 12, 'top_p': 0.9, 'min_p': 0.05},
    ],
    ids=str,
)
def test_sampled_frequencies_are_probabilities_of_transformers(options):
    warpers = {
        'temperature': TemperatureLogitsWarper,
        'top_k': TopKLogitsWarper,
        'top_p': TopPLogitsWarper,
        'min_p': MinPLogitsWarper,
    }
    logits = 2 * torch.randn(1, 25, generator=torch.Generator().manual_seed(1))
    reference = LogitsProcessorList(
        [warper(options[name]) for name, warper in warpers.items() if name in options]
    )
    expected = 100_000 * reference(None, logits.clone())[0].softmax(-1).double()
    generator = torch.Generator().manual_seed(2)
    drawn = sample_next(logits.expand(100_000, -1), generator=generator, **options)
    counts = drawn.flatten().bincount(minlength=25).double()
    kept = expected > 0
    assert not counts[~kept].any()
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    degrees = int(kept.sum()) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_top_k_keeps_exactly_k_even_among_equals():
    drawn = sample_next(torch.zeros(5000, 100), top_k=3)
    assert len(drawn.unique()) == 3


def test_the_repetition_penalty_is_that_of_transformers():
    logits = torch.randn(4, 50)
    idx = logits.topk(10).indices
    theirs = transformers.RepetitionPenaltyLogitsProcessor(50.0)
    reference = theirs(idx, logits.clone()).argmax(-1)
    penalized = sample_next(logits, idx, temperature=0, repetition_penalty=50.0)
    assert torch.equal(penalized[:, 0], reference)
    assert not torch.equal(sample_next(logits, temperature=0)[:, 0], reference)


def test_the_same_seed_draws_the_same_tokens():
    model = small_model().eval()
    prompt = torch.zeros(2, 1, dtype=torch.long)

    def draw(seed):
        return continuations(model, prompt, 10, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(*draw(1)), 'and each sequence its own'


def test_the_padding_of_the_vocabulary_is_not_sampled_or_trained():
    model = small_model(vocab_size=65).eval()  # padded to 128
    logits = model(random_ids(model, 2, 10))
    assert logits.shape[-1] == 128
    assert (logits[..., 65:] == -math.inf).all()
    prompts = random_ids(model, 25_000, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = continuations(model, prompts, 4, temperature=5.0, generator=generator)
    assert drawn.numel() == 100_000
    assert drawn.max() < 65
    assert len(drawn.unique()) == 65
    zeros = torch.zeros(1, 8, dtype=torch.long)
    model(zeros, zeros + 1).backward()
    assert not model.wte.weight.grad[65:].any()
    assert model.wte.weight.grad[:65].any()


# -----------------------------------------------------------------------------
# weights in and out


@every_shape
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_from_here_to_transformers_and_back_is_bit_identical(tmp_path, shape, dtype):
    model = small_model(**shape, dropout=0.1).to(dtype)
    ours = tmp_path / 'ours'
    theirs = tmp_path / 'theirs'
    ours.mkdir()
    model.save_pretrained(ours, {'eos': model.config.vocab_size - 1})
    opened, report = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values()), report
    assert opened.dtype == dtype
    assert opened.config.eos_token_id == model.config.vocab_size - 1
    if model.config.arch == 'gpt2':
        assert (opened.config.attn_pdrop, opened.config.resid_pdrop) == (0.0, 0.1)
    opened.save_pretrained(theirs)
    for folder in (ours, theirs):
        loaded = GPT.from_pretrained(folder)
        assert loaded.config == model.config
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.float(), loaded.state_dict()[name].float()), name


def published(folder, names='bare', files='one'):
    """A GPT-2 in the layouts found in the wild. Returns its logits for a few tokens."""
    model = small_model().eval()
    model.save_pretrained(folder)
    reference = GPT2Model.from_pretrained(folder)
    if names == 'bare':  # as OpenAI published it: no prefix, and the attention masks as buffers
        weights = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
        for i in range(3):
            weights[f'h.{i}.attn.bias'] = torch.ones(1, 1, 48, 48).tril()
    else:  # as older versions of transformers wrote it, the tied head beside it
        weights = load_file(folder / 'model.safetensors')
        weights['lm_head.weight'] = weights['transformer.wte.weight'].clone()
    (folder / 'model.safetensors').unlink()

    if files == 'one':
        save_file(weights, folder / 'model.safetensors')
    elif files == 'shards':
        index = {}
        for i in range(2):
            shard = dict(list(weights.items())[i::2])
            save_file(shard, folder / f'model-{i}.safetensors')
            index.update(dict.fromkeys(shard, f'model-{i}.safetensors'))
        index = json.dumps({'weight_map': index})
        (folder / 'model.safetensors.index.json').write_text(index)
    else:
        torch.save(weights, folder / 'pytorch_model.bin')
    return model(torch.arange(40)[None])


@pytest.mark.parametrize('names', ['bare', 'prefixed'])
@pytest.mark.parametrize('files', ['one', 'shards', 'pickle'])
def test_published_layouts_open(tmp_path, names, files):
    logits = published(tmp_path, names, files)
    model = GPT.from_pretrained(tmp_path, block_size=40).eval()
    assert model.config.block_size == 40
    assert model.wpe.weight.shape == (40, 64)
    assert torch.equal(model(torch.arange(40)[None]), logits)


def test_a_published_name_is_downloaded_from_the_hub(tmp_path, monkeypatch):
    logits = published(tmp_path)
    asked = []

    def download(name, **options):
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    model = GPT.from_pretrained('gpt2-large').eval()
    assert torch.equal(model(torch.arange(40)[None]), logits)
    assert set(asked) == {'openai-community/gpt2-large'}


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(UserError, match='gpt2-xl could not be downloaded.*or name a folder'):
        GPT.from_pretrained('gpt2-xl')


def test_a_pickle_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published(tmp_path, files='pickle')
    torch.save({'bomb': Bomb()}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(UserError, match='pytorch_model.bin is damaged'):
        GPT.from_pretrained(tmp_path)
    assert not (tmp_path / 'exploded').exists()


def test_weights_that_do_not_fit_are_named(tmp_path):
    small_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    fewer = {name: tensor for name, tensor in weights.items() if 'ln_f.bias' not in name}
    more = weights | {'extra': torch.zeros(1)}
    other = weights | {'transformer.wpe.weight': torch.zeros(2, 2)}
    for changed, message in (
        (fewer, 'transformer.ln_f.bias is missing'),
        (more, 'extra is not expected'),
        (other, r'wpe.weight is \(2, 2\), not \(48, 64\)'),
    ):
        save_file(changed, tmp_path / 'model.safetensors')
        with pytest.raises(UserError, match=message):
            GPT.from_pretrained(tmp_path)
    (tmp_path / 'model.safetensors').write_bytes(b'not safe')
    with pytest.raises(UserError, match='is damaged or incomplete'):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(UserError, match='There is no folder'):
        GPT.from_pretrained(tmp_path / 'nowhere')


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'model_type': 'bert'}, "'bert'.* gpt2, llama, qwen2, qwen3"),
        (
            {'activation_function': 'relu'},
            "activation_function='relu' is not implemented here, only 'gelu_new'",
        ),
        ({'n_embd': None}, 'not that of a model known here|n_embd=None'),
        ({'n_layer': '2'}, "not that of a model known here.*n_layer='2'"),
        ({'n_inner': [64]}, r'not that of a model known here.*intermediate_size=\[64\]'),
        ({'n_layer': 4}, r'h\.3\..* is missing.*\(and 9 more\)'),
    ],
)
def test_a_config_that_is_not_understood_is_refused(tmp_path, config, message):
    small_model().save_pretrained(tmp_path)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(tmp_path)
    path.write_text('{"model_type"')
    with pytest.raises(UserError, match='config.json is damaged'):
        GPT.from_pretrained(tmp_path)


def test_a_mistake_in_the_code_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    small_model().save_pretrained(tmp_path)

    def wrong(self):
        raise TypeError('mine')

    monkeypatch.setattr(GPTConfig, '__post_init__', wrong)
    with pytest.raises(TypeError, match='^mine$'):
        GPT.from_pretrained(tmp_path)


# -----------------------------------------------------------------------------
# shapes, counts, initial weights


@pytest.mark.parametrize(
    ('name', 'count'),
    [
        ('gpt2', 124_439_808),
        ('gpt2-medium', 354_823_168),
        ('gpt2-large', 774_030_080),
        ('gpt2-xl', 1_557_611_200),
    ],
)
def test_gpt2_has_its_published_number_of_parameters(name, count):
    with torch.device('meta'):
        model = GPT(GPTConfig(**PUBLISHED[name]))
    assert model.count_parameters() == count
    # PaLM's formula, spelled out: 6 per parameter of blocks and head, and for attention
    # 12 · layers · width · context
    width = model.config.n_embd
    attention = 12 * model.config.n_layer * width * 1024
    assert model.flops_per_token() == 6 * (count - 1024 * width - 2 * width) + attention


@pytest.mark.parametrize('freeze', [None, 0, 2])
@every_shape
def test_flops_are_those_a_profiler_counts(shape, freeze):
    changes = {'vocab_size': 1024}
    if freeze is not None:
        changes['n_layer'] = 8
    model = small_model(**shape | changes)
    optim.freeze(model, freeze)
    idx = random_ids(model, 2, 48)
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math_only:
        model(idx, idx).backward()
    flops = model.flops_per_token() * idx.numel()
    assert counter.get_total_flops() == pytest.approx(flops, rel=0.02)


def test_initial_weights_have_the_distribution_of_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1000, block_size=64, n_layer=8, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        rows = parameter[:1000] if name == 'wte.weight' else parameter
        if name.endswith('bias'):
            assert not rows.any(), name
        elif 'norm' in name:
            assert (rows == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if '.proj.' in name else 0.02
            assert rows.std().item() == pytest.approx(std, rel=0.05), name
            assert rows.mean().abs() < 0.001, name
    idx = random_ids(model, 4, 64)
    assert model(idx, idx.roll(1)).item() == pytest.approx(math.log(1000), rel=0.01)


def test_a_parameter_that_init_weights_does_not_cover_is_refused():
    model = small_model()
    model.blocks[0].attn.extra = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match='init_weights .* blocks.0.attn.extra'):
        model.init_weights()
    model = small_model()
    model.scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(RuntimeError, match='init_weights .* scale'):
        model.init_weights()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'n_embd': 65}, 'n_embd=65 must be a multiple of n_head=4'),
        ({'n_layer': 0}, 'n_layer=0 must be from 1 to 2,000'),
        ({'n_head': 0}, 'n_head=0 must be from 1'),
        ({'dropout': 1.0}, r'dropout=1.0 must be at least 0 and below 1'),
        ({'arch': 'rnn'}, "arch='rnn' .* gpt2, llama, qwen2, qwen3"),
        ({'arch': 'qwen3', 'n_kv_head': 3}, 'n_head=4 is no multiple of n_kv_head=3'),
        ({'arch': 'llama', 'head_dim': 5}, 'head_dim=5 must be even'),
        ({'n_kv_head': 2}, "not for arch='gpt2': use qwen3 or llama"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        GPTConfig(**SMALL | changes)

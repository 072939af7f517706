import json
import math
import os
from functools import partial

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Model
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

import model as model_module
from model import GPT, IGNORE, PUBLISHED, GPTConfig, Linear
from sample import choose, lay_out

SMALL = {'vocab_size': 1000, 'block_size': 48, 'n_layer': 3, 'n_head': 4, 'n_embd': 64}
SHAPES = [
    {'arch': 'gpt2'},
    {'arch': 'gpt2', 'bias': False, 'n_head': 2, 'vocab_size': 64},
    {'arch': 'qwen3'},
    {'arch': 'qwen3', 'n_kv_head': 1, 'head_dim': 32, 'tied': False, 'rope_theta': 1e6, 'n_hidden': 100},
    {'arch': 'llama', 'n_kv_head': 2},
]
every_shape = pytest.mark.parametrize('shape', SHAPES, ids=lambda shape: ' '.join(map(str, shape.values())))


def small_model(seed=0, **changes):
    """A model whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for matrix in (model.wte.weight, model.head.weight):
            matrix[model.config.vocab_size :] = 0
    return model


def norm_in_full_precision(self, x):
    """transformers computes RMSNorm in float32 whatever the model's dtype; the reference for float64 must not."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@every_shape
@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_logits_loss_and_gradients_are_those_of_transformers(tmp_path, monkeypatch, dtype, tolerance, seed, shape):
    if dtype == torch.float64:
        for norm in (modeling_qwen3.Qwen3RMSNorm, modeling_llama.LlamaRMSNorm):
            monkeypatch.setattr(norm, 'forward', norm_in_full_precision)
    model = small_model(seed, **shape).to(dtype).eval()
    vocab_size = model.config.vocab_size
    model.save_pretrained(tmp_path)
    attention = 'sdpa' if dtype == torch.float64 else 'eager'  # whose softmax is in float32, too
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation=attention).eval()
    idx = torch.randint(0, vocab_size, (3, 48))
    logits = theirs(idx).logits
    assert (model(idx)[..., :vocab_size] - logits).abs().max() < tolerance
    loss = model(idx[:, :-1], idx[:, 1:])
    reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    assert loss.dtype == dtype and abs(loss - reference) < tolerance
    loss.backward()
    reference.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad  # so that the gradients have names, too
    gradients = model.hf_tensors()
    for name, parameter in theirs.named_parameters():
        if name in gradients:  # without biases there are none
            assert (gradients[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
    assert set(gradients) <= {name for name, _ in theirs.named_parameters()}


@every_shape
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_from_here_to_transformers_and_back_is_bit_identical(tmp_path, shape, dtype):
    model = small_model(**shape, dropout=0.1).to(dtype)
    ours, theirs = tmp_path / 'ours', tmp_path / 'theirs'
    ours.mkdir()
    model.save_pretrained(ours, end_of_text=model.config.vocab_size - 1)
    opened, report = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values()), report
    assert opened.dtype == dtype and opened.config.eos_token_id == model.config.vocab_size - 1
    opened.save_pretrained(theirs)
    for folder in (ours, theirs):
        loaded = GPT.from_pretrained(folder)
        assert loaded.config == model.config
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.float(), loaded.state_dict()[name].float()), name


@every_shape
@pytest.mark.parametrize('batch_size', [1, 4])
def test_cached_generation_is_uncached_generation_beyond_the_window_too(shape, batch_size):
    model = small_model(**shape).eval()
    for length, new in ((1, 20), (20, 60), (48, 5), (60, 5)):
        prompt = out = torch.randint(0, model.config.vocab_size, (batch_size, length))
        for _ in range(new):
            out = torch.cat((out, model(out[:, -48:])[:, -1:].argmax(-1)), 1)
        generated = torch.cat(list(model.generate(prompt, new)), 1)
        assert torch.equal(generated, out[:, length:])


@every_shape
def test_laying_out_for_sampling_changes_no_value(tmp_path, shape):
    model, other = small_model(**shape).eval(), small_model(**shape).eval()
    lay_out(other)
    assert not other.blocks[0].attn.proj.weight.is_contiguous()
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    idx = torch.randint(0, model.config.vocab_size, (2, 48))
    assert (model(idx).exp() - other(idx).exp()).abs().max() < 1e-5
    other.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path).wte.weight, model.wte.weight)


def test_greedy_generation_is_that_of_transformers(tmp_path):
    model = small_model(arch='qwen3').eval()
    model.save_pretrained(tmp_path)
    prompt = torch.randint(0, 1000, (2, 7))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).generate(prompt, max_new_tokens=30, do_sample=False)
    assert torch.equal(torch.cat(list(model.generate(prompt, 30)), 1), theirs[:, 7:])


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(1, 1, 48), (4, 48), (5, 1, 48)])
def test_rows_summed_one_by_one_are_a_matrix_product(monkeypatch, shape, bias):
    layer, x = Linear(48, (64, 32), bias), torch.randn(shape)
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
        assert layer(x).shape == expected.shape and (layer(x) - expected).abs().max() < 1e-6


@pytest.mark.slow  # the first compilation takes most of a minute
@pytest.mark.parametrize('batch_size', [1, 3])
@every_shape
def test_compiled_generation_is_eager_generation(batch_size, shape):
    model = small_model(**shape).eval()
    prompt = torch.randint(0, model.config.vocab_size, (batch_size, 7))
    eager, compiled = (list(model.generate(prompt, 20, compile=c)) for c in (False, True))
    assert torch.equal(torch.cat(eager, 1), torch.cat(compiled, 1))


@pytest.mark.parametrize(
    'way',
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
def test_sampled_frequencies_are_the_probabilities_of_transformers(way):
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = 2 * torch.randn(1, 25, generator=torch.Generator().manual_seed(1))
    warpers = {'temperature': TemperatureLogitsWarper, 'top_k': TopKLogitsWarper, 'top_p': TopPLogitsWarper}
    warpers |= {'min_p': MinPLogitsWarper}
    reference = LogitsProcessorList([warper(way[name]) for name, warper in warpers.items() if name in way])
    expected = 100_000 * reference(None, logits.clone())[0].softmax(-1).double()
    drawn = choose(logits.expand(100_000, -1), None, torch.Generator().manual_seed(2), **way)
    counts = drawn.flatten().bincount(minlength=25).double()
    kept = expected > 0
    assert not counts[~kept].any()
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    degrees = int(kept.sum()) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_top_k_keeps_exactly_k_even_among_equals():
    drawn = choose(torch.zeros(5000, 100), top_k=3)
    assert len(drawn.unique()) == 3


def test_the_repetition_penalty_is_that_of_transformers():
    logits = torch.randn(4, 50)
    idx = logits.topk(10).indices
    reference = transformers.RepetitionPenaltyLogitsProcessor(50.0)(idx, logits.clone()).argmax(-1)
    assert torch.equal(choose(logits, temperature=0, repetition_penalty=50.0, tokens=idx)[:, 0], reference)
    assert not torch.equal(choose(logits, temperature=0)[:, 0], reference)


def test_the_same_seed_draws_the_same_tokens():
    model, prompt = small_model().eval(), torch.zeros(2, 1, dtype=torch.long)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.cat(list(model.generate(prompt, 10, partial(choose, generator=generator))), 1)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2)) and not torch.equal(*draw(1))


def published(folder, names='bare', files='one'):
    """A GPT-2 in the layouts found in the wild. Returns its logits for a few tokens."""
    model = small_model().eval()
    model.save_pretrained(folder)
    reference = GPT2Model.from_pretrained(folder)
    if names == 'bare':  # as OpenAI published it: no prefix, and the attention masks as buffers
        weights = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
        weights |= {f'h.{i}.attn.bias': torch.ones(1, 1, 48, 48).tril() for i in range(3)}
    else:  # as older versions of transformers wrote it, the tied head beside it
        weights = load_file(folder / 'model.safetensors')
        weights['lm_head.weight'] = weights['transformer.wte.weight'].clone()
    (folder / 'model.safetensors').unlink()
    halves = [dict(list(weights.items())[i::2]) for i in range(2)]
    if files == 'one':
        save_file(weights, folder / 'model.safetensors')
    elif files == 'shards':
        index = {}
        for i, half in enumerate(halves):
            save_file(half, folder / f'model-{i}.safetensors')
            index |= dict.fromkeys(half, f'model-{i}.safetensors')
        (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
    else:
        torch.save(weights, folder / 'pytorch_model.bin')
    return model(torch.arange(40)[None])


@pytest.mark.parametrize('names', ['bare', 'prefixed'])
@pytest.mark.parametrize('files', ['one', 'shards', 'pickle'])
def test_published_layouts_open(tmp_path, names, files):
    logits = published(tmp_path, names, files)
    model = GPT.from_pretrained(tmp_path, block_size=40).eval()
    assert model.config.block_size == 40 and model.wpe.weight.shape == (40, 64)
    assert torch.equal(model(torch.arange(40)[None]), logits)


def test_a_published_name_is_downloaded_from_the_hub(tmp_path, monkeypatch):
    logits = published(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **_: asked.append(name) or str(tmp_path))
    assert torch.equal(GPT.from_pretrained('gpt2-large').eval()(torch.arange(40)[None]), logits)
    assert asked == ['openai-community/gpt2-large']


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(ConnectionError, match='gpt2-xl could not be downloaded.*or name a folder'):
        GPT.from_pretrained('gpt2-xl')


class Bomb:
    def __reduce__(self):
        return os.mkdir, ('exploded',)


def test_a_pickle_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published(tmp_path, files='pickle')
    torch.save({'bomb': Bomb()}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='pytorch_model.bin is damaged'):
        GPT.from_pretrained(tmp_path)
    assert not (tmp_path / 'exploded').exists()


@pytest.mark.parametrize(
    ('name', 'count'),
    [('gpt2', 124_439_808), ('gpt2-medium', 354_823_168), ('gpt2-large', 774_030_080), ('gpt2-xl', 1_557_611_200)],
)
def test_gpt2_has_its_published_number_of_parameters(name, count):
    with torch.device('meta'):
        model = GPT(GPTConfig(**PUBLISHED[name]))
    assert model.count_parameters() == count
    # PaLM's formula, spelled out: 6 per parameter of blocks and head, 12 · layers · width · context for attention
    width, layers = model.config.n_embd, model.config.n_layer
    assert model.flops_per_token() == 6 * (count - 1024 * width - 2 * width) + 12 * layers * width * 1024


@pytest.mark.parametrize('freeze', [None, 0, 2])
@every_shape
def test_flops_are_those_a_profiler_counts(shape, freeze):
    model = small_model(**shape | {'vocab_size': 1024} | ({} if freeze is None else {'n_layer': 8}))
    if freeze is not None:
        model.freeze(freeze)
    idx = torch.randint(0, 1000, (2, 48))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(idx, idx).backward()
    assert counter.get_total_flops() == pytest.approx(model.flops_per_token() * idx.numel(), rel=0.02)


def test_ignored_targets_do_not_count():
    model = small_model().eval()
    idx = torch.randint(0, 1000, (2, 20))
    targets = torch.randint(0, 1000, (2, 20))
    targets[0, 5:] = IGNORE
    log_probabilities = model(idx).log_softmax(-1)
    kept = [log_probabilities[b, t, targets[b, t]] for b in range(2) for t in range(20) if targets[b, t] != IGNORE]
    assert model(idx, targets).item() == pytest.approx(-torch.stack(kept).mean().item(), rel=1e-6)


def test_a_token_cannot_see_those_after_it():
    model = small_model().eval()
    idx = torch.randint(0, 1000, (1, 30))
    changed = idx.clone()
    changed[0, 20:] = torch.randint(0, 1000, (10,))
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[:, 20:], after[:, 20:])


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
    idx = torch.randint(0, 1000, (4, 64))
    assert model(idx, idx.roll(1)).item() == pytest.approx(math.log(1000), rel=0.01)


def test_a_parameter_that_init_weights_does_not_cover_is_an_error():
    model = small_model()
    model.blocks[0].attn.extra = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match='says nothing of blocks.0.attn.extra'):
        model.init_weights()


def test_evaluating_computes_no_gradients(monkeypatch):
    monkeypatch.setattr('model.CHUNK', 5000)
    model, idx = small_model(), torch.randint(0, 1000, (2, 20))
    with FlopCounterMode(display=False) as forward:
        model(idx)
    with FlopCounterMode(display=False) as evaluating, torch.no_grad():
        model(idx, idx)
    assert evaluating.get_total_flops() == forward.get_total_flops()


@pytest.mark.parametrize('in_chunks', [False, True])
@pytest.mark.parametrize('tied', [False, True])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(monkeypatch, tied, in_chunks):
    if in_chunks:
        monkeypatch.setattr('model.CHUNK', 5000)
    model, idx = small_model(arch='qwen3', n_layer=3, tied=tied), torch.randint(0, 1000, (2, 20))
    model(idx, idx).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.freeze(2)
    model(idx, idx).backward()
    kept = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert kept == {name for name in expected if name.startswith(('wte', 'blocks.0', 'blocks.1'))}
    for name in expected.keys() - kept:
        torch.testing.assert_close(model.get_parameter(name).grad, expected[name])
    trained = {id(parameter) for group in model.parameter_groups(0.1) for parameter in group['params']}
    assert trained == {id(model.get_parameter(name)) for name in expected.keys() - kept}


def test_parameter_groups_hold_every_parameter_once_and_decay_only_matrices():
    model = small_model()
    groups = model.parameter_groups(0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [names[id(p)] for group in groups for p in group['params']]
    assert sorted(grouped) == sorted(names.values())
    assert {group['weight_decay'] for group in groups} == {0.1, 0.0}
    for name in [names[id(p)] for group in groups if not group['weight_decay'] for p in group['params']]:
        assert name.endswith('bias') or 'norm' in name


def test_the_padding_of_the_vocabulary_is_never_sampled_and_never_trained():
    model = small_model(vocab_size=65).eval()  # padded to 128
    logits = model(torch.randint(0, 65, (2, 10)))
    assert logits.shape[-1] == 128
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 65, (25_000, 1))
    drawn = torch.cat(list(model.generate(prompts, 4, partial(choose, temperature=5.0, generator=generator))), 1)
    assert drawn.numel() == 100_000 and drawn.max() < 65 and len(drawn.unique()) == 65
    model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
    assert not model.wte.weight.grad[65:].any() and model.wte.weight.grad[:65].any()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'n_embd': 65}, 'n_embd=65 must be a multiple of n_head=4'),
        ({'n_layer': 0}, 'n_layer=0 must be from 1 to 16,777,216'),
        ({'n_head': 0}, 'n_head=0 must be from 1'),
        ({'dropout': 1.0}, r'dropout=1.0 must be at least 0 and below 1'),
        ({'arch': 'rnn'}, "arch='rnn' is not known. Choose one of: gpt2, qwen3, llama"),
        ({'arch': 'qwen3', 'n_kv_head': 3}, 'n_head=4 must be a multiple of n_kv_head=3'),
        ({'arch': 'llama', 'head_dim': 5}, 'head_dim=5 must be even'),
        ({'n_kv_head': 2}, "not for arch='gpt2'"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**SMALL | changes)


def test_weights_that_do_not_fit_are_named(tmp_path):
    small_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')

    def refused(changed, message):
        save_file(changed, tmp_path / 'model.safetensors')
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path)

    refused({k: v for k, v in weights.items() if 'ln_f.bias' not in k}, 'transformer.ln_f.bias is missing')
    refused(weights | {'extra': torch.zeros(1)}, 'extra is not expected')
    refused(weights | {'transformer.wpe.weight': torch.zeros(2, 2)}, r'wpe.weight is \(2, 2\), not \(48, 64\)')
    (tmp_path / 'model.safetensors').write_bytes(b'not safe')
    with pytest.raises(ValueError, match='is damaged or incomplete'):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match='There is no folder'):
        GPT.from_pretrained(tmp_path / 'nowhere')


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'model_type': 'bert'}, "A model of type 'bert' cannot be opened here, only gpt2, qwen3, llama"),
        ({'activation_function': 'relu'}, "has activation_function='relu', which is not implemented"),
        ({'n_embd': None}, 'not of a model known here|not supported'),
        ({'n_layer': 4}, r'h\.3\..* is missing.*\(and 9 more\)'),
    ],
)
def test_a_config_that_is_not_understood_is_refused(tmp_path, config, message):
    small_model().save_pretrained(tmp_path)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)
    path.write_text('{"model_type"')
    with pytest.raises(ValueError, match='not of a model known here'):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize('arch', ['gpt2', 'llama'])
def test_a_loss_in_chunks_is_the_loss(monkeypatch, arch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | {'arch': arch, 'tied': arch == 'gpt2'})).double()
    x = torch.randint(0, 1000, (4, 48))
    y = x.roll(-1, 1)
    y[0, 5:20] = IGNORE
    results = []
    for chunk in (2**30, 5000):  # all rows at once, and four or five at a time
        monkeypatch.setattr(model_module, 'CHUNK', chunk)
        loss = model(x, y)
        model.zero_grad()
        (3 * loss).backward()
        results.append((loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    (plain, gradients), (chunked, others) = results
    assert (plain - chunked).abs() < 1e-12
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(gradients, others, strict=True))
    with torch.no_grad():
        assert (model(x, y) - plain).abs() < 1e-12
    with torch.autocast('cpu', torch.bfloat16):
        assert model.float()(x, y).item() == pytest.approx(plain.item(), rel=1e-3)

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from model import GPT, IGNORE, GPTConfig

SMALL = {'vocab_size': 1000, 'block_size': 48, 'n_layer': 3, 'n_head': 4, 'n_embd': 64}


def small_model(seed=0, **changes):
    """A model whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        model.wte.weight[model.config.vocab_size :] = 0
    return model


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_logits_loss_and_gradients_are_those_of_transformers(tmp_path, dtype, tolerance, bias):
    model = small_model(bias=bias).to(dtype).eval()
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation='eager').eval()
    idx = torch.randint(0, 1000, (3, 48))
    logits = theirs(idx).logits
    assert (model(idx)[..., :1000] - logits).abs().max() < tolerance
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


@pytest.mark.parametrize('bias', [True, False])
def test_saving_and_loading_is_bit_identical(tmp_path, bias):
    model = small_model(bias=bias, dropout=0.1)
    model.save_pretrained(tmp_path, end_of_text=999)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_gpt2_has_its_published_number_of_parameters():
    with torch.device('meta'):
        model = GPT(GPTConfig())
    assert model.count_parameters() == 124_439_808
    # PaLM's formula, spelled out: 6 per matrix parameter, 12 · layers · width · context for attention
    matrices = 124_439_808 - 1024 * 768
    assert model.flops_per_token() == 6 * matrices + 12 * 12 * 768 * 1024


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


def test_parameter_groups_hold_every_parameter_once_and_decay_only_matrices():
    model = small_model()
    decay, no_decay = model.parameter_groups(0.1)
    assert (decay['weight_decay'], no_decay['weight_decay']) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [names[id(p)] for p in decay['params'] + no_decay['params']]
    assert sorted(grouped) == sorted(names.values())
    assert all(name.endswith('bias') or 'norm' in name for name in [names[id(p)] for p in no_decay['params']])


def test_the_padding_of_the_vocabulary_is_never_sampled_and_never_trained():
    model = small_model(vocab_size=65).eval()  # padded to 128
    logits = model(torch.randint(0, 65, (2, 10)))
    assert logits.shape[-1] == 128
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 65, (25_000, 1))
    drawn = torch.cat(list(model.generate(prompts, 4, temperature=5.0, generator=generator)), 1)
    assert drawn.numel() == 100_000 and drawn.max() < 65 and len(drawn.unique()) == 65
    model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
    assert not model.wte.weight.grad[65:].any() and model.wte.weight.grad[:65].any()


def test_greedy_generation_slides_its_window():
    model = small_model(block_size=8).eval()
    prompt = torch.randint(0, 1000, (2, 5))
    out = prompt
    for _ in range(12):
        out = torch.cat((out, model(out[:, -8:])[:, -1:].argmax(-1)), 1)
    generated = torch.cat(list(model.generate(prompt, 12, temperature=0)), 1)
    assert torch.equal(generated, out[:, 5:])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'n_embd': 65}, 'n_embd=65 must be a multiple of n_head=4'),
        ({'n_layer': 0}, 'n_layer=0 must be at least 1'),
        ({'n_head': 0}, 'n_head=0 must be at least 1'),
        ({'dropout': 1.0}, r'dropout=1.0 must be at least 0 and below 1'),
        ({'arch': 'rnn'}, "arch='rnn' is not known"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**SMALL | changes)


def test_weights_that_do_not_fit_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

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

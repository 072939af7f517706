"""The whole GPT in one file: configuration, blocks, loss, generation, weights in and out.

Two architectures, chosen by GPTConfig.arch. Both exist in `transformers`, so what is saved here opens there.

             position          norm       attention              MLP       biases
    gpt2     learned           LayerNorm  one head per query     GELU      yes (bias=False: none)
    qwen3    rotary (RoPE)     RMSNorm    QK-norm, grouped       SwiGLU    no

Shapes in comments: B sequences, T positions, C = n_embd, H heads of D = head_dim, V = padded vocabulary.
"""

import json
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

IGNORE = -1  # a target that does not count


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError for a shape that cannot be built."""

    arch: str = 'gpt2'
    vocab_size: int = 50257
    block_size: int = 1024  # the longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # gpt2 only: biases in Linear and LayerNorm

    def __post_init__(self):
        if self.arch != 'gpt2':
            raise ValueError(f"arch='{self.arch}' is not known. Choose one of: gpt2.")
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}.')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} must be at least 0 and below 1.')

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self):
        """vocab_size rounded up to a multiple of 64, which matrix multiplications like."""
        return -(-self.vocab_size // 64) * 64


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.head_dim, self.dropout = config.n_head, config.head_dim, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x), approximate='tanh'))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """A decoder-only transformer: GPT(config), its weights freshly drawn from torch's global generator.

    logits = model(idx)            idx (B, T) int64 -> (B, T, V); the padding beyond vocab_size is -inf
    loss = model(idx, targets)     targets (B, T), IGNORE where none -> mean cross-entropy in nats
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        V = config.padded_vocab_size
        self.wte = nn.Embedding(V, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.head = nn.Linear(config.n_embd, V, bias=False)
        self.head.weight = self.wte.weight  # tied
        # Added to the logits, it keeps the padding of the vocabulary out of every softmax.
        padding = torch.zeros(V).masked_fill(torch.arange(V) >= config.vocab_size, -math.inf)
        self.register_buffer('padding', padding if V > config.vocab_size else None, persistent=False)
        self.init_weights()

    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(T, device=idx.device)))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.head.weight, self.padding)  # (B, T, V)
        if targets is None:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.view(B * T, -1), targets.reshape(-1), ignore_index=IGNORE)

    @torch.no_grad()
    def init_weights(self):
        """Draw every parameter as GPT-2 did (Radford et al., 2019, section 2.3); raises if one is not covered.

        embeddings, qkv, fc    normal, 0.02
        proj                   normal, 0.02 / sqrt(2 n_layer): each block adds two of them to the residual stream
        norms                  1
        biases                 0
        """
        for name, parameter in self.named_parameters():
            layer, kind = name.split('.')[-2:]
            if kind == 'bias':
                parameter.zero_()
            elif layer in ('norm', 'norm1', 'norm2'):
                parameter.fill_(1.0)
            elif layer == 'proj':
                parameter.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif layer in ('wte', 'wpe', 'qkv', 'fc'):
                parameter.normal_(std=0.02)
            else:
                raise RuntimeError(f'init_weights says nothing of {name}.')
        self.wte.weight[self.config.vocab_size :] = 0  # the padding stays 0: it gets no gradient

    def parameter_groups(self, weight_decay):
        """Parameters for an optimizer: matrices and embeddings decay, vectors (norms, biases) do not."""
        parameters = list(self.parameters())
        decay = [p for p in parameters if p.dim() >= 2]
        no_decay = [p for p in parameters if p.dim() < 2]
        groups = [{'params': decay, 'weight_decay': weight_decay}, {'params': no_decay, 'weight_decay': 0.0}]
        grouped = {id(p) for group in groups for p in group['params']}
        if len(decay) + len(no_decay) != len(grouped) or grouped != {id(p) for p in parameters}:
            raise RuntimeError('The parameter groups must hold every parameter exactly once.')
        return groups

    def count_parameters(self):
        """Parameters, without the padding of the vocabulary: GPT-2's smallest has 124,439,808."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd

    def flops_per_token(self):
        """Floating-point operations of one training step, forward and backward, per token.

        6 N + 12 · layers · heads · head_dim · context (Chowdhery et al., 2022, PaLM, appendix B), where N counts
        the parameters used in matrix multiplications: all but the position embeddings.
        """
        c = self.config
        return 6 * (self.count_parameters() - self.wpe.weight.numel()) + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Yield max_new_tokens times the next token of each sequence, (B, 1), after the prompts idx, (B, T).

        temperature: 0 takes the most likely token. top_k: draw from the k most likely only, exactly k.
        When the window of block_size tokens is full, it slides.
        """
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[:, -1].float()
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                best, ids = logits.topk(min(top_k or self.config.vocab_size, self.config.vocab_size))
                drawn = torch.multinomial(F.softmax(best / temperature, -1), 1, generator=generator)
                token = ids.gather(-1, drawn)
            yield token
            idx = torch.cat((idx, token), 1)

    # -----------------------------------------------------------------------------
    # Weights in and out: folders in the Hugging Face layout, config.json + model.safetensors.

    def save_pretrained(self, folder, end_of_text=None):
        """Write config.json and model.safetensors into a folder that `transformers` opens. end_of_text: its id."""
        c = self.config
        config = {
            'architectures': ['GPT2LMHeadModel'],
            'model_type': 'gpt2',
            'vocab_size': c.vocab_size,
            'n_positions': c.block_size,
            'n_layer': c.n_layer,
            'n_head': c.n_head,
            'n_embd': c.n_embd,
            'activation_function': 'gelu_new',
            'layer_norm_epsilon': 1e-5,
            'embd_pdrop': c.dropout,
            'attn_pdrop': c.dropout,
            'resid_pdrop': c.dropout,
            'tie_word_embeddings': True,
            'bos_token_id': end_of_text,
            'eos_token_id': end_of_text,
            'dtype': str(self.wte.weight.dtype).removeprefix('torch.'),
            'bias': c.bias,  # not in transformers, which always has biases: it finds zeros
        }
        with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as file:
            json.dump(config, file, indent=2)
        weights = {}
        for name, parameter in self.named_parameters():
            name, tensor = hf_name(name), parameter.detach().cpu()
            tensor = tensor[: c.vocab_size] if name.endswith('wte.weight') else tensor
            weights[name] = (tensor.T if is_conv1d(name) else tensor).contiguous()
            if not c.bias and 'transformer.w' not in name:
                weights[name.replace('.weight', '.bias')] = torch.zeros(weights[name].shape[-1], dtype=tensor.dtype)
        save_file(weights, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})

    @classmethod
    def from_pretrained(cls, folder, **changes):
        """The model saved in a folder. changes: GPTConfig fields to override, such as dropout=0.1.

        Raises FileNotFoundError, or ValueError that names what does not fit.
        """
        try:
            with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
                config = json.load(file)
            weights = load_file(os.path.join(folder, 'model.safetensors'))
        except FileNotFoundError as error:
            raise FileNotFoundError(f'{folder} is no model: there is no {error.filename or error}.') from None
        except (ValueError, SafetensorError) as error:
            raise ValueError(f'The model in {folder} cannot be read: {error}') from None
        if config.get('model_type') != 'gpt2':
            raise ValueError(f'{folder} holds a model of type {config.get("model_type")!r}; known is gpt2.')
        fields = {
            'vocab_size': config['vocab_size'],
            'block_size': config['n_positions'],
            'n_layer': config['n_layer'],
            'n_head': config['n_head'],
            'n_embd': config['n_embd'],
            'dropout': config.get('resid_pdrop', 0.0),
            'bias': config.get('bias', True),
        }
        model = cls(GPTConfig(**fields | changes))
        model.load_weights(weights, folder)
        return model

    @torch.no_grad()
    def load_weights(self, weights, source):
        """Copy weights, {Hugging Face name: tensor}, into this model. Raises ValueError unless they fit exactly."""
        weights, problems = dict(weights), []
        for name, parameter in self.named_parameters():
            name = hf_name(name)
            tensor = weights.pop(name, None)
            if tensor is None:
                problems.append(f'{name} is missing')
                continue
            tensor = tensor.T if is_conv1d(name) else tensor
            target = parameter[: self.config.vocab_size] if name.endswith('wte.weight') else parameter
            if tensor.shape != target.shape:
                problems.append(f'{name} is {tuple(tensor.shape)}, not {tuple(target.shape)}')
            else:
                target.copy_(tensor)
        zeros = () if self.config.bias else [n for n in weights if n.endswith('.bias') and not weights[n].any()]
        problems += [f'{name} is not expected' for name in weights if name not in zeros]
        if problems:
            more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
            raise ValueError(f'The weights in {source} do not fit: {"; ".join(problems[:3])}{more}.')


def pick_device(name):
    """'cuda', 'mps' or 'cpu', the first there is, for 'auto'; else `name`. Raises ValueError if it cannot be used."""
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device='{name}' cannot be used here: {str(error).splitlines()[0]}") from None
    return name


HF_NAMES = (  # ours, theirs
    ('wte.', 'transformer.wte.'),
    ('wpe.', 'transformer.wpe.'),
    ('norm.', 'transformer.ln_f.'),
    ('blocks.', 'transformer.h.'),
    ('.norm1.', '.ln_1.'),
    ('.norm2.', '.ln_2.'),
    ('.qkv.', '.c_attn.'),
    ('.fc.', '.c_fc.'),
    ('.proj.', '.c_proj.'),
)


def hf_name(name):
    """The name of one of our parameters in the Hugging Face layout."""
    for ours, theirs in HF_NAMES:
        name = name.replace(ours, theirs)
    return name


def is_conv1d(name):
    """Whether GPT-2's files store this one transposed, (in, out)."""
    return '.c_' in name and name.endswith('.weight')

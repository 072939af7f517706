"""The whole GPT in one file: configuration, blocks, generation, loss, weights in and out.

It imports nothing else of this project: copy it and use it alone. There are four architectures,
chosen by GPTConfig.arch. `transformers` has all of them, so a model saved here opens there, and the
other way round:

              positions    norm         attention                       MLP       biases
    gpt2      learned      LayerNorm    multi-head                      GELU      yes, or bias=False
    llama     rotary       RMSNorm      grouped queries                 SwiGLU    no
    qwen2     rotary       RMSNorm      grouped queries                 SwiGLU    of q, k and v
    qwen3     rotary       RMSNorm      grouped queries, QK-norm        SwiGLU    no

Shapes in comments: B sequences, T positions, S positions in the KV cache, C = n_embd, H heads of
queries, KV heads of keys and values, D = head_dim, V = vocabulary size, padded but for sampling.
"""

import contextlib
import functools
import glob
import json
import logging
import math
import os
import re
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as recompute_activations

IGNORE = -1  # the target of a position that does not count
# A loss with more logits is computed in chunks. On a CPU they should fit into its caches; on a GPU
# chunks are for saving memory, and matrix products should be large: `bench.py gpu` tries others.
MAX_LOGITS = {'cpu': 2**24, 'gpu': 2**28}

ARCHITECTURES = {
    'gpt2': 'GPT2LMHeadModel', 'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM',
    'qwen3': 'Qwen3ForCausalLM',
}  # fmt: skip
# By name: GPT.from_pretrained('gpt2'), or without its weights GPT(GPTConfig(**PUBLISHED['gpt2'])).
PUBLISHED = {
    'gpt2': {'n_layer': 12, 'n_head': 12, 'n_embd': 768},  # 124,439,808 parameters
    'gpt2-medium': {'n_layer': 24, 'n_head': 16, 'n_embd': 1024},  # 354,823,168
    'gpt2-large': {'n_layer': 36, 'n_head': 20, 'n_embd': 1280},  # 774,030,080
    'gpt2-xl': {'n_layer': 48, 'n_head': 25, 'n_embd': 1600},  # 1,557,611,200
}


class UserError(ValueError):
    """A mistake of the user: one sentence that says what is wrong and what to do.

    This file stands alone, so runtime.py, which prints them, has a class of the same name.
    """


# -----------------------------------------------------------------------------
# configuration


@dataclass
class GPTConfig:
    """The shape of a model; None becomes the architecture's own value.

    Raises UserError for a shape that cannot be built. A field that you add here is saved in
    config.json and read back like the others; a knob of the same name in train.py sets it. Its
    default must be what transformers does: a model that has it keeps transformers' name.
    """

    arch: str = 'gpt2'
    vocab_size: int = 50257
    block_size: int = 1024  # the longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # of the embedding and of what blocks add; attention has none
    bias: bool = True  # gpt2 only
    n_kv_head: int | None = None  # heads of keys and values, not in gpt2; None: n_head
    head_dim: int | None = None  # None: n_embd / n_head
    intermediate_size: int | None = None  # inside the MLP; None: 4 n_embd, SwiGLU about 8/3 n_embd
    rope_theta: float = 10000.0  # base of the rotary positions
    rope_scaling: dict | None = None  # how a longer context was made, see scale_frequencies
    norm_eps: float | None = None  # None: 1e-5, in qwen2 and qwen3 1e-6
    tie_weights: bool = True  # whether lm_head shares the weights of the token embedding

    def __post_init__(self):
        if self.arch not in ARCHITECTURES:
            raise UserError(f"arch='{self.arch}' must be one of: {', '.join(ARCHITECTURES)}.")
        sizes = ['vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd']
        for name in [*sizes, 'n_kv_head', 'head_dim', 'intermediate_size']:
            value = getattr(self, name)
            most = 2_000 if name == 'n_layer' else 2**24  # each layer takes a while to be made
            if value is not None and not 1 <= value <= most:
                raise UserError(f'{name}={value} must be from 1 to {most:,}.')
        if not 0 <= self.dropout < 1:
            raise UserError(f'dropout={self.dropout} must be at least 0 and below 1.')
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}.')

        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise UserError(f'n_head={self.n_head} is no multiple of n_kv_head={self.n_kv_head}.')

        if self.arch == 'gpt2':
            width = self.n_head * self.head_dim
            is_multi_head = self.n_kv_head == self.n_head and width == self.n_embd
            if not (is_multi_head and self.tie_weights):
                what = 'n_kv_head, head_dim and an untied lm_head'
                raise UserError(f"{what} are not for arch='gpt2': use qwen3 or llama.")
            default_size = 4 * self.n_embd
        else:
            if self.head_dim % 2:
                raise UserError(f'head_dim={self.head_dim} must be even: RoPE rotates pairs.')
            self.bias = False
            default_size = round_up(8 * self.n_embd // 3, 64)
        self.intermediate_size = self.intermediate_size or default_size
        self.norm_eps = self.norm_eps or (1e-5 if self.arch in ('gpt2', 'llama') else 1e-6)

    @property
    def padded_vocab_size(self):
        """vocab_size up to a multiple of 64, which makes the matrix products of lm_head faster."""
        return round_up(self.vocab_size, 64)

    def crop(self, block_size):
        """The config for windows of block_size: gpt2's table of positions is cut to it.

        Rotary positions are computed, so those models keep their whole context. Raises UserError
        for a block_size above it.
        """
        if block_size > self.block_size:
            context = f'the context of the model, {self.block_size}: choose at most that'
            raise UserError(f'block_size={block_size} is longer than {context}.')
        return replace(self, block_size=block_size) if self.arch == 'gpt2' else self


def round_up(n, multiple):
    return (n + multiple - 1) // multiple * multiple


# -----------------------------------------------------------------------------
# norm, attention, MLP, block


def make_norm(config, width):
    if config.arch == 'gpt2':
        return LayerNorm(width, config.norm_eps, bias=config.bias)
    return RMSNorm(width, config.norm_eps)


class LayerNorm(nn.LayerNorm):
    """In the wider dtype of input and weights: autocast, and FSDP, have one of them in 16 bits."""

    def forward(self, x):
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = self.weight.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """As LayerNorm above."""

    def forward(self, x):
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        x, weight = x.to(dtype), self.weight.to(dtype)
        if x.is_cpu and dtype.itemsize >= 4:  # F.rms_norm computes in float32 for 16 bits
            return FewPassesNorm.apply(x, weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class FewPassesNorm(torch.autograd.Function):
    """F.rms_norm, which on a CPU is many operations, with half as many passes over memory."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        """x (..., n), weight (n,) -> x / rms(x) * weight."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        normed, scale, weight = ctx.saved_tensors
        products = (gradient * normed).flatten(0, -2)
        # Along x itself there is no gradient, since its length has no influence.
        along = products.mv(weight).view_as(scale) / weight.numel()
        x_gradient = (gradient * weight - normed * along) * scale
        return x_gradient, products.sum(0), None


def make_rope(config, positions):
    """cos and sin of the angles at positions, (T,): each (T, D) float32.

    Computed when used, not kept: a model in 16 bits would round a table of them.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    frequencies = 1 / config.rope_theta**exponents
    if config.rope_scaling:
        frequencies = scale_frequencies(frequencies, config.rope_scaling)
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def scale_frequencies(frequencies, scaling):
    """Slow the low frequencies of rotary positions down by a factor, and keep the high ones.

    So Llama 3.1 came from a context of 8,192 tokens to 131,072 (Meta's reference code). Low ones
    turn less than low_freq_factor times within the original context, high ones more than
    high_freq_factor times; what is between is interpolated. frequencies: (D / 2,), per token.
    """
    turns = scaling['original_max_position_embeddings'] * frequencies / (2 * math.pi)
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling['factor']


def apply_rope(x, cos, sin):
    """Rotate each pair (x_i, x_(i+D/2)) by an angle that grows with the position.

    RoFormer (Su et al., 2021), in the layout of transformers' Llama. x: (B, heads, T, D).
    """
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Linear(nn.Linear):
    """A linear layer that may be several in one, such as q, k and v: one matrix product for all.

    out_sizes: the width of each. Muon and the files of transformers take them apart again.
    """

    def __init__(self, n_in, out_sizes, bias):
        super().__init__(n_in, sum(out_sizes), bias)
        self.out_sizes = out_sizes


class Attention(nn.Module):
    """Causal self-attention, (B, T, C) -> (B, T, C)."""

    # Under a CPU's autocast it is in float32: in 16 bits its backward pass takes up to five times
    # as long. plan.py, which simulates GPUs on a CPU, sets this to False.
    upcasts = True

    def __init__(self, config):
        super().__init__()
        self.config = config
        H, KV, D = config.n_head, config.n_kv_head, config.head_dim
        has_bias = config.bias or config.arch == 'qwen2'
        self.qkv = Linear(config.n_embd, (H * D, KV * D, KV * D), has_bias)
        self.proj = Linear(H * D, (config.n_embd,), config.bias)
        if config.arch == 'qwen3':
            self.q_norm = make_norm(config, D)
            self.k_norm = make_norm(config, D)

    def forward(self, x, rope=None, mask=None, positions=None, cache=None):
        """rope: (cos, sin), each (T, D).

        For generation: `positions`, (T,), are those of x, `cache` has the keys and values of the
        tokens before, and `mask`, (T, S), is True where a query may attend to a key.
        """
        B, T, _ = x.shape
        H, KV, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        heads = self.qkv(x).view(B, T, H + 2 * KV, D).transpose(1, 2)
        is_upcast = self.upcasts and cache is None and torch.is_autocast_enabled('cpu')
        if is_upcast:
            heads = upcast(heads)
        q, k, v = heads.split((H, KV, KV), 1)  # (B, H, T, D) and twice (B, KV, T, D)

        if self.config.arch == 'qwen3':
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:  # cos and sin are float32; under autocast v is not
            q, k = apply_rope(q, *rope).to(v.dtype), apply_rope(k, *rope).to(v.dtype)
        if cache is not None:
            k, v = cache.update(positions, k, v)  # (B, KV, S, D)

        with torch.autocast('cpu', enabled=False) if is_upcast else contextlib.nullcontext():
            y = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, enable_gqa=KV < H
            )
        return self.proj(y.transpose(1, 2).reshape(B, T, H * D))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.is_gated = config.arch != 'gpt2'
        width = config.intermediate_size
        self.fc = Linear(config.n_embd, (width, width) if self.is_gated else (width,), config.bias)
        self.proj = Linear(width, (config.n_embd,), config.bias)

    def forward(self, x):
        if self.is_gated:  # SwiGLU (Shazeer, 2020)
            gate, up = self.fc(x).chunk(2, -1)
            return self.proj(F.silu(gate) * up)
        return self.proj(F.gelu(self.fc(x), approximate='tanh'))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = make_norm(config, config.n_embd)
        self.attn = Attention(config)
        self.norm2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, mask=None, positions=None, cache=None):
        x = x + self.drop(self.attn(self.norm1(x), rope, mask, positions, cache))
        return x + self.drop(self.mlp(self.norm2(x)))


# -----------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    """A decoder-only transformer. GPT(config) draws its weights from torch's global generator.

    logits = model(idx)            idx (B, T) int64 -> (B, T, V), -inf beyond vocab_size
    loss = model(idx, targets)     targets (B, T), IGNORE where none -> mean cross-entropy in nats
    losses = model(idx, targets, reduction='none')    -> (B, T), 0 where the target is IGNORE
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        V = config.padded_vocab_size
        self.wte = nn.Embedding(V, config.n_embd)
        if config.arch == 'gpt2':
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = make_norm(config, config.n_embd)
        self.lm_head = Linear(config.n_embd, (V,), bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight

        # Added to the logits: -inf keeps the padding of the vocabulary out of every softmax.
        pad_mask = None  # no padding
        if V > config.vocab_size:
            pad_mask = torch.zeros(V).masked_fill(torch.arange(V) >= config.vocab_size, -math.inf)
        self.register_buffer('pad_mask', pad_mask, persistent=False)
        self.max_logits = None  # at once, in the loss; None: MAX_LOGITS of the device
        self.init_weights()

        # Of a published model: the contents of its config.json and generation_config.json, of which
        # save_pretrained keeps what has no place in GPTConfig.
        self.hf_config = {}
        self.generation_config = {}

    def forward(self, idx, targets=None, reduction='mean'):
        x = self.forward_hidden(idx)
        if targets is None:
            return self.logits(x)
        if self.training:
            return self.loss(x, targets, reduction)
        # An evaluation is to be exact: a logit of -100 would be rounded by up to a quarter.
        with torch.autocast(x.device.type, enabled=False):
            return self.loss(x.to(self.lm_head.weight.dtype), targets, reduction)

    def loss(self, hidden, targets, reduction='mean'):
        """Of what forward_hidden returns, (B, T, C)."""
        max_logits = self.max_logits or MAX_LOGITS['cpu' if hidden.is_cpu else 'gpu']
        if targets.numel() * self.config.padded_vocab_size > max_logits:
            return chunked_loss(self, hidden, targets, reduction, max_logits)
        return token_loss(self.logits(hidden), targets, reduction, self.training)

    def forward_hidden(self, idx, positions=None, caches=None):
        """idx (B, T) -> what lm_head takes, (B, T, C).

        For generation: a KVCache for each block, and the positions of idx, (T,).
        """
        T, block_size = idx.shape[1], self.config.block_size
        if T > block_size:
            raise UserError(f'A context of {T:,} tokens is longer than block_size={block_size:,}.')
        if positions is None:
            positions = torch.arange(T, device=idx.device)
        x = self.wte(idx)
        rope = None
        if self.config.arch == 'gpt2':
            x = x + self.wpe(positions)
        else:
            rope = make_rope(self.config, positions)
        x = self.drop(x)

        mask = None  # causal
        if caches is not None:  # (T, S), for all blocks; slots not filled yet are later positions
            mask = positions[:, None] >= caches[0].positions
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x = block(x, rope, mask, positions, cache)
        return self.norm_f(x)

    def logits(self, hidden):
        """(..., C) -> (..., V), -inf beyond vocab_size.

        A change, such as a softcap, belongs into next_logits and ChunkedLoss, too: the former calls
        the layer, whose product inference.py may replace, the latter needs the weights themselves.
        """
        return F.linear(hidden, self.lm_head.weight, self.pad_mask)

    # -----------------------------------------------------------------------------
    # for training: initial weights, and how many operations they take

    @torch.no_grad()
    def init_weights(self):
        """Draw all parameters, of all architectures, as nanoGPT draws GPT-2's.

        embeddings, lm_head, qkv, fc    normal, 0.02
        proj                            normal, 0.02 / sqrt(2 n_layer): each block adds two of
                                        them to the residual stream (Radford et al., 2019, 2.3)
        norms 1, biases 0

        Raises RuntimeError for a parameter that is not covered.
        """
        for name, parameter in self.named_parameters():
            path, _, tensor_name = name.rpartition('.')
            layer = path.rpartition('.')[2]
            if tensor_name == 'bias':
                parameter.zero_()
            elif layer in ('norm1', 'norm2', 'norm_f', 'q_norm', 'k_norm'):
                parameter.fill_(1.0)
            elif layer == 'proj':
                parameter.normal_(std=0.02 / (2 * self.config.n_layer) ** 0.5)
            elif layer in ('wte', 'wpe', 'lm_head', 'qkv', 'fc'):
                parameter.normal_(std=0.02)
            else:
                raise RuntimeError(f'init_weights does not say how to draw {name}.')
        for layer in (self.wte, self.lm_head):
            layer.weight[self.config.vocab_size :] = 0  # the padding; its gradient is always 0

    def checkpoint_activations(self):
        """Keep only the input of each block; compute the rest again for the backward pass.

        Chen et al., 2016. Less memory for a forward pass more.
        """
        recompute = functools.partial(recompute_activations, use_reentrant=False)
        for block in self.blocks:
            block.forward = functools.partial(recompute, block.forward)

    def count_parameters(self):
        """Without the padding of the vocabulary: the smallest GPT-2 has 124,439,808."""
        n_rows = self.config.padded_vocab_size - self.config.vocab_size
        n_matrices = 1 if self.config.tie_weights else 2  # wte; lm_head, where it is not the same
        padding = n_rows * n_matrices * self.config.n_embd
        return sum(parameter.numel() for parameter in self.parameters()) - padding

    def flops_per_token(self, block_size=None):
        """Floating-point operations per token of a training step, forward and backward.

        6 N + 12 · layers · heads · head_dim · context (Chowdhery et al., 2022, PaLM, appendix B),
        where N counts the parameters of blocks and lm_head: a multiplication and an addition in the
        forward pass, twice that in the backward pass. A frozen block has no backward pass, since
        nothing below it is trained either; a frozen lm_head lacks the gradient of its weights.
        """
        c = self.config
        # Per token q meets block_size keys and as many values, each product of H · D terms.
        attention = 2 * c.n_head * c.head_dim * (block_size or c.block_size)
        flops = 0
        for block in self.blocks:
            is_frozen = not any(p.requires_grad for p in block.parameters())
            n_parameters = sum(p.numel() for p in block.parameters())
            flops += (2 if is_frozen else 6) * (n_parameters + attention)
        lm_head_factor = 6 if self.lm_head.weight.requires_grad else 4
        return flops + lm_head_factor * c.vocab_size * c.n_embd

    # -----------------------------------------------------------------------------
    # generation

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, compile=False, **sampling):
        """Continue the prompts idx, (B, T): yield max_new_tokens times the next tokens, (B, 1).

        Call eval() first. sampling: arguments of sample_next, such as temperature and top_k.
        compile: compile the decoding step; True, or a mode of torch.compile. Of a long prompt the
        last block_size tokens are used. Nothing in here makes the host wait for the device.
        """
        block_size = self.config.block_size
        idx = idx[:, -block_size:]
        B, T = idx.shape
        tokens = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), 1)
        length = min(block_size, T + max_new_tokens)
        caches = [KVCache(self.config, B, length, self.wte.weight) for _ in self.blocks]
        positions = torch.arange(length, device=idx.device)
        decode = self.next_logits
        if compile:
            decode = torch.compile(decode, mode='default' if compile is True else compile)

        for n in range(T, T + max_new_tokens):  # n tokens so far
            if n == T:  # prefill: the whole prompt at once
                logits = self.next_logits(idx, positions[:n], caches)
            elif n <= block_size:  # decode: one token; the others are in the cache
                logits = decode(tokens[:, n - 1 : n], positions[n - 1 : n], caches)
            else:  # the window slides: all positions change, so nothing in the cache is valid
                logits = self.next_logits(tokens[:, n - block_size : n])
            next_token = sample_next(logits, tokens[:, :n], **sampling)
            tokens[:, n : n + 1] = next_token
            yield next_token

    def next_logits(self, idx, positions=None, caches=None):
        """The logits of the token after idx, (B, vocab_size)."""
        last = self.forward_hidden(idx, positions, caches)[:, -1]
        return self.lm_head(last)[:, : self.config.vocab_size].float()

    # -----------------------------------------------------------------------------
    # weights in and out; their format is the last part of this file

    @classmethod
    def from_pretrained(cls, source, block_size=None, **changes):
        """The model of a folder, or of a name on the Hugging Face Hub: see find_pretrained.

        block_size: the windows it is for, see GPTConfig.crop; None: its whole context. changes:
        fields of GPTConfig to override, such as dropout=0.1. Raises UserError when there is no such
        model, or when something does not fit.
        """
        folder = find_pretrained(source)
        config = read_config(folder)
        if block_size:
            config = config.crop(block_size)
        model = cls.blank(replace(config, **changes))
        load_weights(model, folder)
        model.hf_config = read_json(folder, 'config.json')
        if os.path.exists(os.path.join(folder, 'generation_config.json')):
            model.generation_config = read_json(folder, 'generation_config.json')
        return model

    @classmethod
    def blank(cls, config):
        """A model whose weights are not drawn, since others are about to be copied into it."""
        with SkipInit():
            return cls(config)

    def blank_copy(self):
        """A blank model on the CPU with all that is not weights."""
        copy = self.blank(self.config)
        copy.hf_config = self.hf_config
        copy.generation_config = self.generation_config
        return copy

    def save_pretrained(self, folder, special_ids=None):
        """Write config.json, generation_config.json and model.safetensors, for `transformers`.

        Weights of more than MAX_FILE become several files, with model.safetensors.index.json.
        special_ids: {'bos', 'eos', 'pad': token id} of the tokenizer, for a model that has none of
        its own. Raises UserError, before it writes, for what would not be read back as it is.
        """
        check_round_trip(self)
        config = to_hf_config(self, special_ids or {})
        generation_config = dict(self.generation_config)
        # Without an end transformers would not stop, whatever config.json says.
        for role in ('eos',) if generation_config else ('bos', 'eos', 'pad'):
            name = f'{role}_token_id'
            if generation_config.get(name) is None:
                generation_config[name] = config[name]
        files = {'config.json': config, 'generation_config.json': generation_config}
        for name, contents in files.items():
            with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
                file.write(json.dumps(contents, indent=2) + '\n')
        weights = hf_tensors(self)
        if self.config.arch == 'gpt2' and not self.config.bias:
            add_zero_biases(weights)
        save_weights(weights, folder)

    def stop_ids(self):
        """The ids of the tokens that end a text, as its published files name them: a set."""
        eos = self.generation_config.get('eos_token_id', self.hf_config.get('eos_token_id'))
        ids = eos if isinstance(eos, list) else [eos]
        return {id for id in ids if isinstance(id, int)}


class SkipInit(TorchDispatchMode):
    """Draw no random numbers: weights are loaded over them, and of a large model they take long."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            return args[0]
        return function(*args, **(kwargs or {}))


class KVCache:
    """The keys and values of one block for `length` tokens, so that a step computes one token."""

    def __init__(self, config, batch_size, length, like):
        self.keys = like.new_zeros(batch_size, config.n_kv_head, length, config.head_dim)
        self.values = torch.zeros_like(self.keys)
        self.positions = torch.arange(length, device=like.device)

    def update(self, positions, k, v):
        """Store k and v, (B, KV, T, D), at `positions`, (T,). Return all, (B, KV, S, D) each."""
        return self.keys.index_copy_(2, positions, k), self.values.index_copy_(2, positions, v)


def sample_next(
    logits, tokens=None, generator=None, temperature=1.0, top_k=None, top_p=None, min_p=None,
    repetition_penalty=1.0,
):  # fmt: skip
    """Draw the next token of each row of logits, (B, V). Returns (B, 1).

    In this order:
    repetition_penalty: makes the `tokens` so far, (B, n), less likely: divides their positive
        logits, multiplies the negative ones (CTRL; Keskar et al., 2019)
    temperature: divides the logits; 0 takes the most likely token
    top_k: keep the k most likely tokens, exactly k
    top_p: keep the fewest that have at least this probability together (nucleus sampling; Holtzman
        et al., 2020)
    min_p: keep those at least this fraction as likely as the most likely (Nguyen et al., 2024)
    """
    if repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, tokens, True)
        divisor = torch.where(logits > 0, repetition_penalty, 1 / repetition_penalty)
        logits = torch.where(seen, logits / divisor, logits)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)

    ids = None  # of the candidates, where these are not simply all tokens
    if top_k is not None or top_p is not None:
        V = logits.shape[-1]
        logits, ids = logits.topk(min(top_k or V, V))  # the most likely first, at any temperature
    # The largest becomes 0 and stays it: a tiny temperature would make it infinite. And 1e-30, as
    # well as its inverse, is still a float32.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    probabilities = logits.softmax(-1)
    if top_p is not None:
        mass_before = probabilities.cumsum(-1) - probabilities  # of those more likely
        probabilities = probabilities.masked_fill(mass_before >= top_p, 0)
    if min_p is not None:
        lowest = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < lowest, 0)

    # With exponential noise, the largest p / noise is a sample from p (Gumbel-max sampling). Unlike
    # torch.multinomial this does not make the host wait for the device.
    # On Apple's GPUs it may be 0, and 0 / 0 would be the largest, so it is at least 1e-30.
    noise = torch.empty_like(probabilities).exponential_(generator=generator).clamp_(min=1e-30)
    drawn = (probabilities / noise).argmax(-1, keepdim=True)
    return drawn if ids is None else ids.gather(-1, drawn)


# -----------------------------------------------------------------------------
# loss


def token_loss(logits, targets, reduction='mean', training=False):
    """Cross-entropy in nats; logits (..., V), targets (...). Every loss is computed here.

    To change it, add terms before the last line; torch differentiates them, also when the loss is
    computed in chunks. For example a z-loss (Chowdhery et al., 2022, PaLM), in training alone:

        if training:
            z = logits.logsumexp(-1).square()
            loss = loss + 1e-4 * reduce_loss(z, flat_targets, reduction)
    """
    logits = upcast(logits).flatten(0, -2)
    flat_targets = targets.flatten()
    loss = F.cross_entropy(logits, flat_targets, ignore_index=IGNORE, reduction=reduction)
    return loss.view_as(targets) if reduction == 'none' else loss


def reduce_loss(losses, targets, reduction):
    """The losses of single tokens, reduced as F.cross_entropy does: 'none', 'sum' or 'mean'."""
    is_target = (targets != IGNORE).flatten()
    losses = torch.where(is_target, losses.flatten(), 0.0)
    if reduction == 'none':
        return losses.view_as(targets)
    return losses.sum() / (1 if reduction == 'sum' else is_target.sum())


def upcast(x):
    """To float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chunked_loss(model, x, targets, reduction, max_logits):
    """token_loss of model.logits(x), x (B, T, C), without having all logits at once.

    It saves memory under no_grad, and for the mean; unreduced losses with gradients keep them all.
    """
    x = x.flatten(0, 1)
    flat_targets = targets.flatten()
    # Half as many logits per chunk, since their gradient is there at the same time.
    rows = max(1, max_logits // 2 // model.config.padded_vocab_size)
    if rows > 128 and not x.is_cpu:
        rows -= rows % 128  # a GPU multiplies tiles of so many rows
    if reduction == 'mean' and torch.is_grad_enabled():
        weight, bias = model.lm_head.weight, model.pad_mask
        return ChunkedLoss.apply(x, weight, bias, flat_targets, rows, model.training)
    losses = []
    for x_chunk, chunk_targets in zip(x.split(rows), flat_targets.split(rows), strict=True):
        losses.append(token_loss(model.logits(x_chunk), chunk_targets, 'none', model.training))
    return reduce_loss(torch.cat(losses), targets, reduction)


class ChunkedLoss(torch.autograd.Function):
    """The mean token_loss of F.linear(x, weight, bias), some rows at a time, with less memory.

    The logits of a chunk are gone by the backward pass, so the gradient with respect to them is
    computed together with the loss ("fused linear cross-entropy"). For plain cross-entropy it is
    softmax(logits) - one_hot(target); torch finds it for whatever token_loss computes. The
    gradients of x and weight follow by the chain rule.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets, rows, training):
        """x (N, C), weight (V, C), bias (V,) or None, targets (N,)."""
        loss_and_gradient = torch.func.grad_and_value(token_loss)
        total = 0.0
        x_gradients = []
        weight_gradient = None
        if ctx.needs_input_grad[1]:  # not when it is frozen
            weight_gradient = upcast(torch.zeros_like(weight))

        for x_chunk, chunk_targets in zip(x.split(rows), targets.split(rows), strict=True):
            logits = upcast(F.linear(x_chunk, weight, bias))  # (rows, V)
            d_logits, loss = loss_and_gradient(logits, chunk_targets, 'sum', training)
            total = total + loss
            # Under autocast, or with 16-bit weights (FSDP): 16-bit products, a 32-bit sum.
            is_mixed = torch.is_autocast_enabled(x.device.type) or x.dtype != logits.dtype
            if is_mixed:
                d_logits = d_logits.to(x.dtype)
            x_gradients.append((d_logits @ weight).to(x.dtype))
            if weight_gradient is not None and is_mixed:
                weight_gradient += d_logits.mT @ x_chunk
            elif weight_gradient is not None:
                weight_gradient.addmm_(d_logits.mT, x_chunk)
            del logits, d_logits  # before the next chunk has its own

        ctx.n_targets = (targets != IGNORE).sum()
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(torch.cat(x_gradients), weight_gradient)
        return total / ctx.n_targets

    @staticmethod
    def backward(ctx, d_loss):
        scale = d_loss / ctx.n_targets
        x_gradient, weight_gradient = ctx.saved_tensors
        x_gradient.mul_(scale)  # in place, to save memory: so there can be one backward pass only
        if weight_gradient is not None:
            weight_gradient = weight_gradient.mul_(scale).to(ctx.weight_dtype)
        return x_gradient, weight_gradient, None, None, None, None


# -----------------------------------------------------------------------------
# weights in and out: folders in the layout of Hugging Face, config.json and model.safetensors

# Our names of layers and theirs; several where they have separate layers for what is one here.
GPT2_LAYERS = {
    'wte': ['transformer.wte'],
    'wpe': ['transformer.wpe'],
    'blocks.{i}.norm1': ['transformer.h.{i}.ln_1'],
    'blocks.{i}.attn.qkv': ['transformer.h.{i}.attn.c_attn'],
    'blocks.{i}.attn.proj': ['transformer.h.{i}.attn.c_proj'],
    'blocks.{i}.norm2': ['transformer.h.{i}.ln_2'],
    'blocks.{i}.mlp.fc': ['transformer.h.{i}.mlp.c_fc'],
    'blocks.{i}.mlp.proj': ['transformer.h.{i}.mlp.c_proj'],
    'norm_f': ['transformer.ln_f'],
}
_ATTN = 'model.layers.{i}.self_attn.'
_MLP = 'model.layers.{i}.mlp.'
LLAMA_LAYERS = {  # and qwen2 and qwen3
    'wte': ['model.embed_tokens'],
    'blocks.{i}.norm1': ['model.layers.{i}.input_layernorm'],
    'blocks.{i}.attn.qkv': [_ATTN + 'q_proj', _ATTN + 'k_proj', _ATTN + 'v_proj'],
    'blocks.{i}.attn.q_norm': [_ATTN + 'q_norm'],
    'blocks.{i}.attn.k_norm': [_ATTN + 'k_norm'],
    'blocks.{i}.attn.proj': [_ATTN + 'o_proj'],
    'blocks.{i}.norm2': ['model.layers.{i}.post_attention_layernorm'],
    'blocks.{i}.mlp.fc': [_MLP + 'gate_proj', _MLP + 'up_proj'],
    'blocks.{i}.mlp.proj': [_MLP + 'down_proj'],
    'norm_f': ['model.norm'],
    'lm_head': ['lm_head'],
}

# Our fields and theirs; a field of GPTConfig that is not here has the same name in config.json.
GPT2_FIELDS = {
    'block_size': 'n_positions', 'intermediate_size': 'n_inner', 'norm_eps': 'layer_norm_epsilon',
    'tie_weights': 'tie_word_embeddings',
}  # fmt: skip
LLAMA_FIELDS = {
    'block_size': 'max_position_embeddings', 'n_layer': 'num_hidden_layers',
    'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads', 'n_embd': 'hidden_size',
    'norm_eps': 'rms_norm_eps', 'tie_weights': 'tie_word_embeddings',
}  # fmt: skip
# What a config.json must have.
REQUIRED = {'vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd', 'norm_eps'}
# What transformers computes with. A field that you add to GPTConfig does not belong here.
TRANSFORMERS_FIELDS = REQUIRED | {
    'arch', 'dropout', 'bias', 'n_kv_head', 'head_dim', 'intermediate_size', 'rope_theta',
    'rope_scaling', 'tie_weights',
}  # fmt: skip

# Other entries of a config.json, and the only values that are supported here.
IMPLEMENTED = {
    'activation_function': ('gelu_new', 'gelu_pytorch_tanh'), 'hidden_act': ('silu', 'swish'),
    'attention_bias': (False,), 'mlp_bias': (False,), 'add_cross_attention': (False,),
    'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,),
    'rope_type': ('default', 'llama3'), 'partial_rotary_factor': (1.0,),
    'layer_types': ('full_attention',), 'quantization_config': (None,),
}  # fmt: skip
# The parameters of rope_type llama3.
SCALING = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')

FRACTIONS = ('dropout', 'norm_eps', 'rope_theta')  # fields that need not be whole numbers

# What is wanted of a repository of the Hub, besides weights; tokenizer.FILES are among them.
CONFIG_FILES = [
    'config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json',
    'special_tokens_map.json', 'added_tokens.json', 'chat_template.jinja', 'chat_template.json',
    'tokenizer.model', 'vocab.json', 'merges.txt',
]  # fmt: skip


MAX_FILE = 5 * 10**9  # bytes of weights in one file

# Entries of a published config.json that the ones written here replace, or that are for other code.
REPLACED = ('torch_dtype', 'auto_map', 'transformers_version')


def hf_fields(arch):
    """{field of GPTConfig: its name in config.json}."""
    names = GPT2_FIELDS if arch == 'gpt2' else LLAMA_FIELDS
    return {field.name: names.get(field.name, field.name) for field in fields(GPTConfig)}


def hf_names(name, arch):
    """Their names of a parameter of ours; [] when their model does not have it."""
    layer, _, kind = name.rpartition('.')
    i = ''
    if layer.startswith('blocks.') and layer.count('.') > 1:
        _, i, layer_in_block = layer.split('.', 2)
        layer = 'blocks.{i}.' + layer_in_block
    layers = GPT2_LAYERS if arch == 'gpt2' else LLAMA_LAYERS
    has_bias = arch == 'gpt2' or (arch == 'qwen2' and layer.endswith('qkv'))
    if layer not in layers or (kind == 'bias' and not has_bias):
        return []
    return [f'{theirs.format(i=i)}.{kind}' for theirs in layers[layer]]


def hf_tensors(model):
    """{name in their layout: view of our parameter, without padding, in the shape it has there}.

    Reading the views saves a model, copying into them loads one. A parameter that their model does
    not have keeps our name.
    """
    c = model.config
    views = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if name in ('wte.weight', 'lm_head.weight'):
            tensor = tensor[: c.vocab_size]
        names = hf_names(name, c.arch) or [name]
        is_conv1d = '.c_' in names[0] and tensor.dim() == 2  # GPT-2's linear layers
        if is_conv1d:
            tensor = tensor.T  # stored as (in, out)
        parts = [tensor]
        if len(names) > 1:
            layer = model.get_submodule(name.rpartition('.')[0])
            parts = tensor.split(layer.out_sizes)
        views.update(zip(names, parts, strict=True))
    return views


def add_zero_biases(weights):
    """Give a GPT-2 without biases those of transformers' GPT-2, which always has them."""
    for name, tensor in list(weights.items()):
        if '.ln_' in name or '.c_' in name:
            weights[name.replace('.weight', '.bias')] = tensor.new_zeros(tensor.shape[-1])


def transformers_has_it(model):
    """Whether transformers has the same model: no parameter, and no field in use, was added.

    A change of the code alone is not seen: give it a field.
    """
    names_known = all(hf_names(name, model.config.arch) for name, _ in model.named_parameters())
    added = [field for field in fields(GPTConfig) if field.name not in TRANSFORMERS_FIELDS]
    return names_known and all(getattr(model.config, f.name) == f.default for f in added)


def to_hf_config(model, special_ids):
    """The contents of config.json: a published model's own, and all fields of GPTConfig."""
    c = model.config
    # transformers must not take a changed model for its own, so that has another name.
    model_type = c.arch if transformers_has_it(model) else 'flatgpt'
    config = {name: value for name, value in model.hf_config.items() if name not in REPLACED}
    config.update({theirs: getattr(c, ours) for ours, theirs in hf_fields(c.arch).items()})
    architecture = ARCHITECTURES.get(model_type, model_type)
    dtype = str(model.wte.weight.dtype).removeprefix('torch.')
    config.update(model_type=model_type, architectures=[architecture], dtype=dtype)
    for role in ('bos', 'eos', 'pad'):
        if config.get(f'{role}_token_id') is None:
            config[f'{role}_token_id'] = special_ids.get(role)
    if model_type == 'flatgpt':
        config['fields'] = list(hf_fields(c.arch))
    if c.rope_scaling is None:  # new versions of transformers warn of the name, old ones need it
        del config['rope_scaling']
    if c.arch == 'gpt2':
        config.update(activation_function='gelu_new', n_ctx=c.block_size)
        config.update(attn_pdrop=0.0, embd_pdrop=c.dropout, resid_pdrop=c.dropout)
    else:
        rope = {'rope_type': 'default', **(c.rope_scaling or {}), 'rope_theta': c.rope_theta}
        config.update(hidden_act='silu', rope_parameters=rope)
    return config


def from_hf_config(config):
    """{field of GPTConfig: value}. Raises UserError for what is not implemented here, and KeyError,
    TypeError or AttributeError for what is missing or no number.
    """
    arch = config['arch'] if config['model_type'] == 'flatgpt' else config['model_type']
    if arch not in ARCHITECTURES:
        raise UserError(f"model_type='{arch}' is not one of {', '.join(ARCHITECTURES)}.")
    rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
    rope = {**rope, 'rope_type': rope.get('rope_type', rope.get('type', 'default'))}
    check_implemented({**config, **rope})
    for name in config.get('fields', ()):  # of a changed model
        if name not in hf_fields(arch):
            raise UserError(f'the model has a field {name}, which GPTConfig in model.py lacks.')

    values = {'tie_weights': arch == 'gpt2'}  # where config.json does not say
    for ours, theirs in hf_fields(arch).items():
        if ours in REQUIRED and config.get(theirs) is None:
            raise KeyError(theirs)
        if theirs in config:  # the others have defaults, also in older files
            values[ours] = config[theirs]
    values['arch'] = arch
    values['rope_theta'] = float(rope.get('rope_theta') or config.get('rope_theta') or 10000.0)
    for name in TRANSFORMERS_FIELDS.intersection(values) - {'arch', 'rope_scaling'}:
        may_be = int | float | None if name in FRACTIONS else int | None
        if not isinstance(values[name], may_be):
            raise TypeError(f'{name}={values[name]!r}')
    values['rope_scaling'] = None
    if rope['rope_type'] == 'llama3':
        scaling = {name: rope[name] for name in SCALING}
        numbers = [value for value in scaling.values() if isinstance(value, int | float)]
        if len(numbers) < len(SCALING) or min(numbers) <= 0:
            raise ValueError(f'rope_scaling={scaling}')
        values['rope_scaling'] = {'rope_type': 'llama3', **scaling}
    return values


def check_implemented(config):
    """Raise UserError for an entry of a config.json that is not computed here."""
    for name, supported in IMPLEMENTED.items():
        if name not in config:
            continue
        values = config[name] if isinstance(config[name], list) else [config[name]]
        for value in values:  # None: as if it were not there
            if value is not None and value not in supported:
                only = ' and '.join(repr(value) for value in supported)
                raise UserError(f'{name}={value!r} is not implemented here, only {only}.')
    n_full = config.get('max_window_layers', 0)  # the first so many layers have no window
    if config.get('use_sliding_window') and n_full < config['num_hidden_layers']:
        raise UserError('use_sliding_window=True is not implemented here, only False.')


def check_round_trip(model):
    """Raise UserError when a model's files would not give the same model back."""
    text = json.dumps(to_hf_config(model, {}), default=repr)  # what JSON cannot hold will differ
    config = GPTConfig(**from_hf_config(json.loads(text)))
    before = {name: view.shape for name, view in hf_tensors(model).items()}
    with torch.device('meta'):  # without memory for its weights
        after = {name: view.shape for name, view in hf_tensors(GPT(config)).items()}
    before.update(asdict(model.config))
    after.update(asdict(config))
    differ = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if differ:
        raise UserError(
            f'This model cannot be saved, reading it back would change {", ".join(differ[:3])}: '
            'let GPT.__init__ make all parameters, from fields of GPTConfig that JSON can hold.'
        )


def read_config(folder):
    """The GPTConfig of a folder. Raises UserError for a config.json that is missing or unknown."""
    contents = read_json(folder, 'config.json')
    path = os.path.join(folder, 'config.json')
    try:
        values = from_hf_config(contents)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f'{path} is not that of a model known here: {error!r}') from None
    try:
        return GPTConfig(**values)
    except UserError as error:  # all else is a mistake of yours in there, with its traceback
        raise UserError(f'{path}: {error}') from None


def read_json(folder, name):
    """The object in a JSON file of a model folder. Raises UserError if it is missing or damaged."""
    path = os.path.join(folder, name)
    try:
        with open(path, encoding='utf-8') as file:
            return dict(json.load(file))
    except FileNotFoundError:
        raise UserError(f'{folder} is not a model folder (it has no {name}).') from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f'{path} is damaged: {error!r}') from None


def list_weights(folder):
    """The paths of a model's weights: one file, or the shards that an index names."""
    for name in ('model.safetensors', 'pytorch_model.bin'):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return [path]
        if os.path.exists(f'{path}.index.json'):
            index = read_json(folder, f'{name}.index.json').get('weight_map')
            if not isinstance(index, dict) or not index:
                raise UserError(f'{path}.index.json is damaged: it has no weight_map.')
            shards = sorted(set(map(str, index.values())))
            return [os.path.join(folder, os.path.basename(shard)) for shard in shards]
    raise UserError(f'{folder} has neither model.safetensors nor pytorch_model.bin.')


def save_weights(weights, folder):
    """Write {name: tensor} to a folder, in one file or in shards, as the Hub's libraries do."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(weights, max_shard_size=MAX_FILE)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: weights[name].cpu().contiguous() for name in names}
        save_file(tensors, os.path.join(folder, file), metadata={'format': 'pt'})
    if split.is_sharded:
        index = {'metadata': split.metadata, 'weight_map': split.tensor_to_filename}
        with open(os.path.join(folder, 'model.safetensors.index.json'), 'w') as file:
            file.write(json.dumps(index, indent=2) + '\n')


def read_weights(path):
    """{name: tensor} of a file, memory-mapped. Raises UserError for a damaged one."""
    if not os.path.exists(path):
        raise UserError(f'{path} is missing, which the index names: get it again.')
    try:
        if path.endswith('.safetensors'):
            return load_file(path)
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged file makes its reader raise
        kind = type(error).__name__
        raise UserError(f'{path} is damaged or incomplete ({kind}): get it again.') from None


@torch.no_grad()
def load_weights(model, folder):
    """Copy the weights of a folder into a model, one file after the other.

    Names may lack the prefix `transformer.` or `model.`; position embeddings may be longer than
    block_size. Raises UserError if any does not fit.
    """
    missing = hf_tensors(model)
    known = set(missing)
    prefix = 'transformer.' if model.config.arch == 'gpt2' else 'model.'
    problems = []
    for path in list_weights(folder):
        for name, tensor in read_weights(path).items():
            if name not in known and not name.startswith((prefix, 'lm_head.')):
                name = prefix + name
            target = missing.pop(name, None)
            if target is None:
                if not is_redundant(name, tensor, model.config):
                    problems.append(f'{name} is not expected')
                continue
            if name == 'transformer.wpe.weight':
                tensor = tensor[: model.config.block_size]
            if tensor.shape != target.shape:
                problems.append(f'{name} is {tuple(tensor.shape)}, not {tuple(target.shape)}')
            elif not tensor.isfinite().all():
                problems.append(f'{name} is not finite')
            else:
                target.copy_(tensor)
    problems += [f'{name} is missing' for name in missing]
    if problems:
        more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
        raise UserError(f'The weights in {folder} do not fit: {"; ".join(problems[:3])}{more}.')


def is_redundant(name, tensor, config):
    """Whether a tensor in a published file adds nothing to the model."""
    if name.endswith(('.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq')):
        return True  # causal masks, and the frequencies of the rotary positions
    if name == 'lm_head.weight':
        return config.tie_weights
    return name.endswith('.bias') and not config.bias and not tensor.any()


def find_pretrained(source, with_weights=True):
    """The folder of a model: `source` itself, or the download of a name on the Hugging Face Hub.

    A name is ORG/NAME or ORG/NAME@revision, or one of PUBLISHED. What is there already is not
    downloaded again. with_weights: else only its configuration and tokenizer are wanted. Raises
    UserError when the model cannot be had.
    """
    name, at, revision = os.fspath(source).partition('@')
    if name in PUBLISHED:
        name = f'openai-community/{name}'
    elif os.path.isdir(os.path.expanduser(source)):
        return os.path.expanduser(source)
    if os.path.isfile(source):
        raise UserError(f'{source} is a file: name the folder that it is in.')
    if at and not revision:
        raise UserError(f'{source} has no revision after the @: name one, or leave the @ out.')
    if not re.fullmatch(r'\w[\w.-]*/[\w.-]+', name):
        names = ', '.join(PUBLISHED)
        raise UserError(
            f'There is no folder {source}. Models known by name: {names}, and ORG/NAME of the '
            'Hugging Face Hub.'
        )
    folder = download(name, revision, CONFIG_FILES)
    if not os.path.isdir(folder):  # none is made where no file is wanted
        files = 'neither config.json nor tokenizer.json'
        raise UserError(f'{name} on the Hugging Face Hub has {files}: choose another repository.')
    if with_weights:
        read_config(folder)  # refuses a model that is not known here before it is downloaded
        revision = os.path.basename(folder)  # the commit, should a newer one appear meanwhile
        download(name, revision, ['model*.safetensors', 'model.safetensors.index.json'])
        if not glob.glob(f'{glob.escape(folder)}/model*.safetensors'):
            download(name, revision, ['pytorch_model*.bin', 'pytorch_model.bin.index.json'])
    return folder


def download(name, revision, files):
    """Download files of a repository, and return the folder. Raises UserError if it cannot be."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # our sentences say it all
    where = f'{name}@{revision}' if revision else name
    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=files)
    except hub.GatedRepoError:
        what = f'{where} is gated: accept its terms on its page of the Hugging Face Hub'
        raise UserError(f'{what}, then log in with: hf auth login') from None
    except hub.RevisionNotFoundError:
        raise UserError(f'{name} has no revision {revision} on the Hugging Face Hub.') from None
    except hub.RepositoryNotFoundError:
        raise UserError(
            f'There is no folder {where}, and no model {name} on the Hugging Face Hub; a private '
            'one needs: hf auth login'
        ) from None
    except Exception as error:  # whatever the network makes it raise
        reason = (str(error).strip() or '?').splitlines()[0][:200]
        raise UserError(
            f'{name} could not be downloaded from the Hugging Face Hub, and is no folder here: '
            'connect to the internet and try again, or name a folder with the model '
            f'({type(error).__name__}: {reason})'
        ) from None

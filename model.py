"""The whole GPT in one file: configuration, blocks, loss, generation, weights in and out.

Three architectures, chosen by GPTConfig.arch, each of which `transformers` has, so that what is saved here opens
there and the other way round:

              positions    norm         attention                       MLP       biases
    gpt2      learned      LayerNorm    multi-head                      GELU      yes; bias=False: none
    qwen3     rotary       RMSNorm      grouped queries, QK-norm        SwiGLU    no
    llama     rotary       RMSNorm      grouped queries                 SwiGLU    no

Shapes in comments: B sequences, T positions, S cached positions, C = n_embd, D = head_dim, V = padded vocabulary.
"""

import functools
import json
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORE = -1  # a target that does not count
CHUNK = 2**24  # logits that a loss computes at a time
ARCHITECTURES = {'gpt2': 'GPT2LMHeadModel', 'qwen3': 'Qwen3ForCausalLM', 'llama': 'LlamaForCausalLM'}
PUBLISHED = {  # by name, for from_pretrained('gpt2') or, untrained, GPT(GPTConfig(**PUBLISHED['gpt2']))
    'gpt2': {'n_layer': 12, 'n_head': 12, 'n_embd': 768},  # 124,439,808 parameters
    'gpt2-medium': {'n_layer': 24, 'n_head': 16, 'n_embd': 1024},  # 354,823,168
    'gpt2-large': {'n_layer': 36, 'n_head': 20, 'n_embd': 1280},  # 774,030,080
    'gpt2-xl': {'n_layer': 48, 'n_head': 25, 'n_embd': 1600},  # 1,557,611,200
}


@dataclass
class GPTConfig:
    """The shape of a model; None becomes the architecture's own. Raises ValueError for one that cannot be built."""
    arch: str = 'gpt2'
    vocab_size: int = 50257
    block_size: int = 1024  # the longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # gpt2 only
    n_kv_head: int | None = None  # heads that share a key and value, qwen3 and llama only; None: n_head, no sharing
    head_dim: int | None = None  # None: n_embd / n_head
    n_hidden: int | None = None  # width inside the MLP; None: 4 n_embd, with SwiGLU 8/3 n_embd up to a multiple of 64
    rope_theta: float = 10000.0  # the base of rotary positions
    norm_eps: float | None = None  # None: 1e-5, in qwen3 1e-6
    tied: bool = True  # whether the head is the token embedding

    def __post_init__(self):
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch='{self.arch}' is not known. Choose one of: {', '.join(ARCHITECTURES)}.")
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd', 'n_kv_head', 'head_dim', 'n_hidden'):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 2**24:
                raise ValueError(f'{name}={value} must be from 1 to {2**24:,}.')
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}.')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} must be at least 0 and below 1.')
        self.n_kv_head, self.head_dim = self.n_kv_head or self.n_head, self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}.')
        if self.arch == 'gpt2':
            self.n_hidden = self.n_hidden or 4 * self.n_embd
            if (self.n_kv_head, self.head_dim * self.n_head, self.tied) != (self.n_head, self.n_embd, True):
                raise ValueError("n_kv_head, head_dim and an untied head are not for arch='gpt2': use qwen3 or llama.")
        else:
            self.bias = False
            self.n_hidden = self.n_hidden or -(-8 * self.n_embd // 3 // 64) * 64
            if self.head_dim % 2:
                raise ValueError(f'head_dim={self.head_dim} must be even: rotary positions turn pairs.')
        self.norm_eps = self.norm_eps or (1e-6 if self.arch == 'qwen3' else 1e-5)

    @property
    def padded_vocab_size(self):
        """vocab_size rounded up to a multiple of 64, which matrix multiplications like."""
        return -(-self.vocab_size // 64) * 64


def full(x):
    """In float32, or more if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm(config, width):
    if config.arch == 'gpt2':
        return nn.LayerNorm(width, config.norm_eps, bias=config.bias)
    return nn.RMSNorm(width, config.norm_eps)


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_(i+D/2)) by an angle that grows with the position (Su et al., 2021, RoFormer)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Linear(nn.Linear):
    """nn.Linear of matrices stacked one over the other, of the heights in `rows`."""

    def __init__(self, n_in, rows, bias):
        super().__init__(n_in, sum(rows), bias)
        self.rows = rows

    def forward(self, x):
        rows = x.flatten(0, -2)  # up to four on a CPU: compiled sums read the weight as fast as the memory gives it
        if not torch.compiler.is_compiling() or torch.is_grad_enabled() or len(rows) > 4 or x.device.type != 'cpu':
            return super().forward(x)
        y = torch.stack([(self.weight * row).sum(-1) for row in rows]).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        H, KV, D = config.n_head, config.n_kv_head, config.head_dim
        self.qkv = Linear(config.n_embd, (H * D, KV * D, KV * D), config.bias)
        self.proj = Linear(H * D, (config.n_embd,), config.bias)
        if config.arch == 'qwen3':
            self.q_norm, self.k_norm = norm(config, D), norm(config, D)

    def forward(self, x, rope=None, cache=None):
        """x: (B, T, C). rope: (cos, sin), each (T, D). cache: (keys, values, positions, mask), see GPT.hidden."""
        B, T, _ = x.shape
        H, KV, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        q, k, v = self.qkv(x).view(B, T, H + 2 * KV, D).transpose(1, 2).split((H, KV, KV), 1)  # each (B, heads, T, D)
        if self.config.arch == 'qwen3':
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope).to(v.dtype), rotate(k, *rope).to(v.dtype)
        mask = None
        if cache is not None:
            keys, values, positions, mask = cache
            k, v = keys.index_copy_(2, positions, k), values.index_copy_(2, positions, v)  # (B, KV, S, D)
        dropout = self.config.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, enable_gqa=KV < H)
        return self.proj(y.transpose(1, 2).reshape(B, T, H * D))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.arch != 'gpt2'
        self.fc = Linear(config.n_embd, (config.n_hidden,) * (1 + self.gated), config.bias)
        self.proj = Linear(config.n_hidden, (config.n_embd,), config.bias)

    def forward(self, x):
        if self.gated:  # SwiGLU (Shazeer, 2020)
            gate, up = self.fc(x).chunk(2, -1)
            return self.proj(F.silu(gate) * up)
        return self.proj(F.gelu(self.fc(x), approximate='tanh'))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = norm(config, config.n_embd)
        self.attn = Attention(config)
        self.norm2 = norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, cache=None):
        x = x + self.drop(self.attn(self.norm1(x), rope, cache))
        return x + self.drop(self.mlp(self.norm2(x)))


class ChunkedLoss(torch.autograd.Function):
    """The mean cross-entropy of F.linear(x, weight, bias), n rows at a time, each with its gradients at once."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets, n):
        total, dx, training, learned = 0.0, [], any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        dw = full(torch.zeros_like(weight)) if learned else None
        for part, target in zip(x.split(n), targets.split(n), strict=True):
            logits, index = full(F.linear(part, weight, bias)), target.clamp(min=0)[:, None]
            counted, normalizer = (target != IGNORE)[:, None], logits.logsumexp(-1, keepdim=True)
            total = total + (counted * (normalizer - logits.gather(1, index))).sum()
            if training:
                error = logits.sub_(normalizer).exp_().scatter_add_(1, index, logits.new_full(index.shape, -1))
                error.mul_(counted)
                dx.append((error @ weight).to(x.dtype))
            if learned:
                dw = dw.add_(error.mT @ part) if torch.is_autocast_enabled(x.device.type) else dw.addmm_(error.mT, part)
        ctx.count, ctx.dtype = (targets != IGNORE).sum(), weight.dtype
        ctx.save_for_backward(torch.cat(dx) if training else None, dw)
        return total / ctx.count

    @staticmethod
    def backward(ctx, gradient):
        dx, dw = (saved if saved is None else saved.mul_(gradient / ctx.count) for saved in ctx.saved_tensors)
        return dx, dw if dw is None else dw.to(ctx.dtype), None, None, None  # in place: for one backward pass


class GPT(nn.Module):
    """A decoder-only transformer: GPT(config), its weights freshly drawn from torch's global generator.

    logits = model(idx)            idx (B, T) int64 -> (B, T, V); the padding beyond vocab_size is -inf
    loss = model(idx, targets)     targets (B, T), IGNORE where none -> mean cross-entropy in nats
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, D = config.padded_vocab_size, config.head_dim
        self.wte = nn.Embedding(V, config.n_embd)
        if config.arch == 'gpt2':
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        else:
            frequencies = 1 / config.rope_theta ** (torch.arange(0, D, 2).float() / D)
            angles = torch.outer(torch.arange(config.block_size).float(), frequencies).repeat(1, 2)  # (block_size, D)
            self.register_buffer('cos', angles.cos(), persistent=False)
            self.register_buffer('sin', angles.sin(), persistent=False)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = norm(config, config.n_embd)
        self.head = Linear(config.n_embd, (V,), False)
        if config.tied:
            self.head.weight = self.wte.weight
        # Added to the logits, it keeps the padding of the vocabulary out of every softmax.
        padding = torch.zeros(V).masked_fill(torch.arange(V) >= config.vocab_size, -math.inf)
        self.register_buffer('padding', padding if V > config.vocab_size else None, persistent=False)
        self.init_weights()

    def forward(self, idx, targets=None):
        x, weight = self.hidden(idx), self.head.weight if torch.is_grad_enabled() else self.head.weight.detach()
        if targets is not None and targets.numel() * len(weight) > CHUNK:
            return ChunkedLoss.apply(x.flatten(0, 1), weight, self.padding, targets.flatten(), CHUNK // len(weight))
        logits = F.linear(x, weight, self.padding)  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(full(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    def hidden(self, idx, positions=None, cache=None):
        """idx (B, T) -> (B, T, C), after the last norm.

        With a cache (a pair of keys and values, each (B, KV, S, D), for every block) idx stands at `positions`, (T,),
        attends to what the cache holds up to there, and is added to it.
        """
        if positions is None:
            positions = torch.arange(idx.shape[1], device=idx.device)
        learned = self.config.arch == 'gpt2'
        x = self.drop(self.wte(idx) + self.wpe(positions) if learned else self.wte(idx))
        rope = None if learned else (self.cos[positions], self.sin[positions])
        if cache is not None:
            mask = positions[:, None] >= torch.arange(cache[0][0].shape[2], device=idx.device)  # (T, S)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, None if cache is None else (*cache[i], positions, mask))
        return self.norm_f(x)

    @torch.no_grad()
    def init_weights(self):
        """Draw every parameter as GPT-2 did (Radford et al., 2019, section 2.3); raises if one is not covered.

        embeddings, head, qkv, fc    normal, 0.02
        proj                         normal, 0.02 / sqrt(2 n_layer): each block adds two to the residual stream
        norms 1, biases 0
        """
        std = dict.fromkeys('wte wpe head qkv fc'.split(), 0.02) | {'proj': 0.02 / (2 * self.config.n_layer) ** 0.5}
        for name, parameter in self.named_parameters():
            layer, kind = name.split('.')[-2:]
            if kind == 'bias' or layer in ('norm1', 'norm2', 'norm_f', 'q_norm', 'k_norm'):
                parameter.fill_(kind != 'bias')
            elif layer in std:
                parameter.normal_(std=std[layer])
            else:
                raise RuntimeError(f'init_weights says nothing of {name}.')
        for matrix in (self.wte.weight, self.head.weight):
            matrix[self.config.vocab_size :] = 0  # the padding stays 0: it gets no gradient

    def freeze(self, n_blocks):
        """Train neither the embeddings, with a head tied to them, nor the lowest n_blocks blocks. None: train all."""
        if n_blocks is not None and not 0 <= n_blocks <= self.config.n_layer:
            raise ValueError(f'freeze={n_blocks} must be from 0 to {self.config.n_layer}, the blocks there are.')
        kept = ('wte.', 'wpe.', *(f'blocks.{i}.' for i in range(n_blocks or 0)))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(n_blocks is None or not name.startswith(kept))

    def parameter_groups(self, weight_decay):
        """What an optimizer is to train: vectors, which do not decay; embeddings, head; matrices by shape and rows."""
        groups = {}
        for name, parameter in self.named_parameters():
            kind, group = parameter.dim(), {'params': [], 'weight_decay': weight_decay * (parameter.dim() > 1)}
            if kind > 1 and name.startswith('blocks.'):
                group['rows'] = self.get_submodule(name.removesuffix('.weight')).rows
                kind = group['rows'], parameter.shape
            if parameter.requires_grad:
                groups.setdefault(kind, group)['params'].append(parameter)
        return list(groups.values())

    def checkpoint_activations(self):
        """Keep only what enters each block, and compute the rest again in the backward pass (Chen et al., 2016)."""
        for block in self.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def count_parameters(self):
        """Parameters, without the padding of the vocabulary: GPT-2's smallest has 124,439,808."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd * (2 - self.config.tied)

    def flops_per_token(self):
        """Floating-point operations of one training step, forward and backward, per token.

        6 N + 12 · layers · heads · head_dim · context (Chowdhery et al., 2022, PaLM, appendix B), where N counts the
        parameters of blocks and head. A frozen block has no backward pass, a frozen head only half of it.
        """
        c, passes = self.config, sum(3 if block.norm1.weight.requires_grad else 1 for block in self.blocks)
        block = sum(p.numel() for p in self.blocks[0].parameters()) + 2 * c.n_head * c.head_dim * c.block_size
        return 2 * passes * block + (6 if self.head.weight.requires_grad else 4) * c.vocab_size * c.n_embd

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, choose=None, compile=False):
        """Yield max_new_tokens times the next token of each sequence, (B, 1), after the prompts idx, (B, T).

        choose(logits, tokens): the next token, (B, 1), by its logits, (B, vocab_size), and the tokens so far; None
        takes the likeliest. compile: the step of one token. Only the last block_size tokens of a prompt are used.
        Keys and values are cached until that window is full; then it slides, every token gets a new position, and each
        step computes all of it. Nothing here waits for the device.
        """
        c, idx = self.config, idx[:, -self.config.block_size :]
        (B, T), S = idx.shape, min(c.block_size, idx.shape[1] + max_new_tokens)
        cache = [tuple(pair) for pair in self.wte.weight.new_zeros(c.n_layer, 2, B, c.n_kv_head, S, c.head_dim)]
        positions = torch.arange(S, device=idx.device)
        tokens = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), 1)
        choose = choose or (lambda logits, tokens: logits.argmax(-1, keepdim=True))
        step = torch.compile(self.next_logits) if compile else self.next_logits
        for n in range(T, T + max_new_tokens):
            if n == T:
                logits = self.next_logits(idx, positions[:T], cache)
            elif n <= S:
                logits = step(tokens[:, n - 1 : n], positions[n - 1 : n], cache)
            else:
                logits = self.next_logits(tokens[:, n - c.block_size : n])
            tokens[:, n : n + 1] = token = choose(logits, tokens[:, :n])
            yield token

    def next_logits(self, idx, positions=None, cache=None):
        """The logits of the token after idx, (B, vocab_size)."""
        return self.head(self.hidden(idx, positions, cache)[:, -1])[:, : self.config.vocab_size].float()

    # Weights in and out: folders in the Hugging Face layout, config.json + model.safetensors.
    def hf_tensors(self):
        """{name in the Hugging Face layout: view of our parameter, without padding, in the shape it has there}.

        Reading the views saves a model, copying into them loads one.
        """
        c, views = self.config, {}
        for name, parameter in self.named_parameters():
            tensor = parameter.detach()
            if name in ('wte.weight', 'head.weight'):
                tensor = tensor[: c.vocab_size]
            for ours, theirs in (GPT2_NAMES if c.arch == 'gpt2' else LLAMA_NAMES).items():
                name = name.replace(ours, theirs)
            if c.arch == 'gpt2':  # its files store linear layers transposed, (in, out)
                views[name] = tensor.T if '.c_' in name and tensor.dim() == 2 else tensor
            elif '.qkv.' in name:
                for part, view in zip('qkv', tensor.split(self.blocks[0].attn.qkv.rows), strict=True):
                    views[name.replace('.qkv.', f'.{part}_proj.')] = view
            elif '.fc.' in name:
                for part, view in zip(('gate', 'up'), tensor.chunk(2), strict=True):
                    views[name.replace('.fc.', f'.{part}_proj.')] = view
            else:
                views[name] = tensor
        return views

    def save_pretrained(self, folder, end_of_text=None):
        """Write config.json and model.safetensors into a folder that `transformers` opens. end_of_text: its id."""
        c = self.config
        config = {'architectures': [ARCHITECTURES[c.arch]], 'model_type': c.arch, 'tie_word_embeddings': c.tied}
        config |= {'bos_token_id': end_of_text, 'eos_token_id': end_of_text, 'dtype': str(self.wte.weight.dtype)[6:]}
        # These two are ours: transformers' GPT-2 always has biases, and finds zeros.
        config |= {'dropout': c.dropout, 'bias': c.bias}
        if c.arch == 'gpt2':
            config |= {'activation_function': 'gelu_new'} | {f'{x}_pdrop': c.dropout for x in ('attn', 'embd', 'resid')}
        else:
            config |= {'hidden_act': 'silu', 'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_theta}}
        names = GPT2_CONFIG if c.arch == 'gpt2' else LLAMA_CONFIG
        config |= {theirs: getattr(c, ours) for ours, theirs in names.items()}
        with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as file:
            json.dump(config, file, indent=2)
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.hf_tensors().items()}
        if c.arch == 'gpt2' and not c.bias:
            for name in [name for name in weights if '.ln_' in name or '.c_' in name]:
                weights[name.replace('.weight', '.bias')] = weights[name].new_zeros(weights[name].shape[-1])
        save_file(weights, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})

    @classmethod
    def from_pretrained(cls, source, **changes):
        """A model with the weights of a local folder, or of a name in PUBLISHED, downloaded from the hub.

        changes: GPTConfig fields to override, dropout=0.1 for instance; block_size can be made smaller.
        Raises FileNotFoundError or ConnectionError, or ValueError that names what does not fit.
        """
        fields = read_config(folder := find_pretrained(source))
        if (asked := changes.get('block_size', 1)) > fields['block_size']:
            raise ValueError(f'block_size={asked} is more than the {fields["block_size"]} of {folder}.')
        return cls(GPTConfig(**fields | changes)).load_weights(read_weights(folder), folder)

    @torch.no_grad()
    def load_weights(self, weights, source):
        """Copy weights, {Hugging Face name: tensor}, into this model, returned. Raises ValueError unless they fit.

        Names may lack the prefix `transformer.` or `model.`. Attention masks, a copy of a tied head, and zero biases
        for a model that has none are passed over; position embeddings may be longer than block_size.
        """
        prefix = 'transformer.' if self.config.arch == 'gpt2' else 'model.'
        weights = {k if k.startswith((prefix, 'lm_head.')) else prefix + k: v for k, v in weights.items()}
        problems = []
        for name, target in self.hf_tensors().items():
            tensor = weights.pop(name, None)
            if tensor is not None and name.endswith('wpe.weight'):
                tensor = tensor[: self.config.block_size]
            if tensor is None:
                problems.append(f'{name} is missing')
            elif tensor.shape != target.shape:
                problems.append(f'{name} is {tuple(tensor.shape)}, not {tuple(target.shape)}')
            else:
                target.copy_(tensor)
        for name, tensor in weights.items():
            mask = name.endswith(('.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq'))
            head = self.config.tied and name == 'lm_head.weight'
            none = not self.config.bias and name.endswith('.bias') and not tensor.any()
            if not (mask or head or none):
                problems.append(f'{name} is not expected')
        if problems:
            more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
            raise ValueError(f'The weights in {source} do not fit: {"; ".join(problems[:3])}{more}.')
        return self


# Names here and in Hugging Face's files: parameters, then fields of config.json.
GPT2_NAMES = {
    'wte.': 'transformer.wte.', 'wpe.': 'transformer.wpe.', 'norm_f.': 'transformer.ln_f.', '.norm1.': '.ln_1.',
    'blocks.': 'transformer.h.', '.norm2.': '.ln_2.', '.qkv.': '.c_attn.', '.fc.': '.c_fc.', '.proj.': '.c_proj.',
}  # fmt: skip
LLAMA_NAMES = {
    'wte.': 'model.embed_tokens.', 'blocks.': 'model.layers.', 'norm_f.': 'model.norm.', 'head.': 'lm_head.',
    '.norm1.': '.input_layernorm.', '.norm2.': '.post_attention_layernorm.',
    'attn.proj.': 'self_attn.o_proj.', '.attn.': '.self_attn.', 'mlp.proj.': 'mlp.down_proj.',
}  # fmt: skip
GPT2_CONFIG = {
    'vocab_size': 'vocab_size', 'block_size': 'n_positions', 'n_layer': 'n_layer', 'n_head': 'n_head',
    'n_embd': 'n_embd', 'n_hidden': 'n_inner', 'norm_eps': 'layer_norm_epsilon',
}  # fmt: skip
LLAMA_CONFIG = {
    'vocab_size': 'vocab_size', 'block_size': 'max_position_embeddings', 'n_layer': 'num_hidden_layers',
    'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads', 'head_dim': 'head_dim',
    'n_embd': 'hidden_size', 'n_hidden': 'intermediate_size', 'norm_eps': 'rms_norm_eps',
}  # fmt: skip


def read_config(folder):
    """A folder's config.json as fields of a GPTConfig. Raises FileNotFoundError, ValueError for what is not known."""
    try:
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
            config = json.load(file)
        arch = config['model_type']
        if arch not in ARCHITECTURES:
            raise ValueError(f"A model of type '{arch}' cannot be opened here, only {', '.join(ARCHITECTURES)}.")
        fields = {'arch': arch, 'tied': config.get('tie_word_embeddings', arch == 'gpt2')}
        for ours, theirs in (GPT2_CONFIG if arch == 'gpt2' else LLAMA_CONFIG).items():
            fields[ours] = config.get(theirs) if ours in ('n_hidden', 'n_kv_head', 'head_dim') else config[theirs]
        fields |= {'dropout': config.get('dropout', 0.0), 'bias': arch == 'gpt2' and config.get('bias', True)}
        rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
        fields['rope_theta'] = float(rope.get('rope_theta') or config.get('rope_theta') or 10000.0)
        GPTConfig(**fields)
    except FileNotFoundError:
        raise FileNotFoundError(f'{folder} is no model: it has no config.json.') from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f'{folder}/config.json is not of a model known here: {error!r}') from None
    given = config | {'rope_type': rope.get('rope_type', rope.get('type', 'default'))}
    expected = {'activation_function': 'gelu_new', 'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False}
    expected |= {'use_sliding_window': False, 'scale_attn_by_inverse_layer_idx': False, 'rope_type': 'default'}
    for name, value in expected.items():
        if given.get(name, value) != value:
            raise ValueError(f"This model has {name}={given[name]!r}, which is not implemented here, only {value!r}.")
    return fields


def read_weights(folder):
    """{name: tensor} from a folder's safetensors, in one file or in shards with an index, or pytorch_model.bin."""
    kinds = ('model.safetensors', 'pytorch_model.bin')
    names = [name for kind in kinds for name in (f'{kind}.index.json', kind) if os.path.exists(f'{folder}/{name}')]
    if not names:
        raise FileNotFoundError(f'{folder} is no model: it has neither {" nor ".join(kinds)}.')
    weights, file, names = {}, os.path.join(folder, names[0]), names[:1]
    try:
        if file.endswith('.json'):
            with open(file, encoding='utf-8') as index:
                names = {os.path.basename(shard) for shard in json.load(index)['weight_map'].values()}
        for file in [os.path.join(folder, name) for name in sorted(names)]:
            safe = file.endswith('.safetensors')
            weights |= load_file(file) if safe else torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise ValueError(f'{file} is damaged or incomplete ({type(error).__name__}): get it again.') from None
    return weights


def find_pretrained(source):
    """The folder of a model: `source` itself, or the download of a name in PUBLISHED from the Hugging Face Hub."""
    if source not in PUBLISHED:
        if not os.path.isdir(source):
            raise FileNotFoundError(f'There is no folder {source}. Models known by name: {", ".join(PUBLISHED)}.')
        return source
    from huggingface_hub import snapshot_download

    try:
        files = ['config.json', 'model.safetensors', 'tokenizer.json']
        return snapshot_download(f'openai-community/{source}', allow_patterns=files)
    except Exception as error:  # whatever the network makes it raise
        raise ConnectionError(
            f'{source} could not be downloaded from the Hugging Face Hub ({type(error).__name__}): connect to the '
            f'internet, or name a folder that holds its {", ".join(files)} instead.'
        ) from None

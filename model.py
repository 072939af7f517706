"""The whole GPT in one file: configuration, blocks, loss, generation, weights in and out.

Three architectures, chosen by GPTConfig.arch, each of which `transformers` has, so that what is saved here opens
there and the other way round:

              positions    norm         attention                       MLP       biases
    gpt2      learned      LayerNorm    multi-head                      GELU      yes; bias=False: none
    qwen3     rotary       RMSNorm      grouped queries, QK-norm        SwiGLU    no
    llama     rotary       RMSNorm      grouped queries                 SwiGLU    no

Shapes in comments: B sequences, T positions, S cached positions, C = n_embd, D = head_dim, V = padded vocabulary.
"""

import json
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

IGNORE = -1  # a target that does not count
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


def norm(config, width):
    if config.arch == 'gpt2':
        return nn.LayerNorm(width, config.norm_eps, bias=config.bias)
    return nn.RMSNorm(width, config.norm_eps)


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_(i+D/2)) by an angle that grows with the position (Su et al., 2021, RoFormer)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Linear(nn.Linear):
    """nn.Linear; compiled, for one to four rows on a CPU, sums that read the matrix as fast as the memory gives it."""

    def forward(self, x):
        rows = x.flatten(0, -2)
        if not torch.compiler.is_compiling() or torch.is_grad_enabled() or len(rows) > 4 or x.device.type != 'cpu':
            return super().forward(x)
        y = torch.stack([(self.weight * row).sum(-1) for row in rows]).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        H, KV, D = config.n_head, config.n_kv_head, config.head_dim
        self.qkv = Linear(config.n_embd, (H + 2 * KV) * D, bias=config.bias)
        self.proj = Linear(H * D, config.n_embd, bias=config.bias)
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
        self.fc = Linear(config.n_embd, config.n_hidden * (1 + self.gated), bias=config.bias)
        self.proj = Linear(config.n_hidden, config.n_embd, bias=config.bias)

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
        self.head = Linear(config.n_embd, V, bias=False)
        if config.tied:
            self.head.weight = self.wte.weight
        # Added to the logits, it keeps the padding of the vocabulary out of every softmax.
        padding = torch.zeros(V).masked_fill(torch.arange(V) >= config.vocab_size, -math.inf)
        self.register_buffer('padding', padding if V > config.vocab_size else None, persistent=False)
        self.init_weights()

    def forward(self, idx, targets=None):
        logits = F.linear(self.hidden(idx), self.head.weight, self.padding)  # (B, T, V)
        if targets is None:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    def hidden(self, idx, positions=None, cache=None):
        """idx (B, T) -> (B, T, C), after the last norm.

        With a cache (a pair of keys and values, each (B, KV, S, D), for every block) idx stands at `positions`, (T,),
        attends to what the cache holds up to there, and is added to it.
        """
        if positions is None:
            positions = torch.arange(idx.shape[1], device=idx.device)
        x, rope = self.wte(idx), None
        if self.config.arch == 'gpt2':
            x = x + self.wpe(positions)
        else:
            rope = self.cos[positions], self.sin[positions]
        if cache is not None:
            mask = positions[:, None] >= torch.arange(cache[0][0].shape[2], device=idx.device)  # (T, S)
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, None if cache is None else (*cache[i], positions, mask))
        return self.norm_f(x)

    @torch.no_grad()
    def init_weights(self):
        """Draw every parameter as GPT-2 did (Radford et al., 2019, section 2.3); raises if one is not covered.

        embeddings, head, qkv, fc    normal, 0.02
        proj                         normal, 0.02 / sqrt(2 n_layer): each block adds two to the residual stream
        norms                        1
        biases                       0
        """
        for name, parameter in self.named_parameters():
            layer, kind = name.split('.')[-2:]
            if kind == 'bias':
                parameter.zero_()
            elif layer in ('norm1', 'norm2', 'norm_f', 'q_norm', 'k_norm'):
                parameter.fill_(1.0)
            elif layer == 'proj':
                parameter.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif layer in ('wte', 'wpe', 'head', 'qkv', 'fc'):
                parameter.normal_(std=0.02)
            else:
                raise RuntimeError(f'init_weights says nothing of {name}.')
        for matrix in (self.wte.weight, self.head.weight):
            matrix[self.config.vocab_size :] = 0  # the padding stays 0: it gets no gradient

    def parameter_groups(self, weight_decay):
        """Parameters for an optimizer: matrices and embeddings decay, vectors (norms, biases) do not."""
        parameters = list(self.parameters())
        decay, no_decay = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
        return [{'params': decay, 'weight_decay': weight_decay}, {'params': no_decay, 'weight_decay': 0.0}]

    def count_parameters(self):
        """Parameters, without the padding of the vocabulary: GPT-2's smallest has 124,439,808."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd * (2 - self.config.tied)

    def flops_per_token(self):
        """Floating-point operations of one training step, forward and backward, per token.

        6 N + 12 · layers · heads · head_dim · context (Chowdhery et al., 2022, PaLM, appendix B), where N counts
        the parameters in matrix multiplications: embeddings only where the token embedding is the head, too.
        """
        c = self.config
        looked_up = c.block_size * c.n_embd if c.arch == 'gpt2' else 0 if c.tied else c.vocab_size * c.n_embd
        return 6 * (self.count_parameters() - looked_up) + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size

    # -----------------------------------------------------------------------------
    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, generator=None, compile=False, **sampling):
        """Yield max_new_tokens times the next token of each sequence, (B, 1), after the prompts idx, (B, T).

        sampling: see choose(). compile: compile the step of one token. Only the last block_size tokens of a prompt
        are used. Keys and values are cached until the window of block_size tokens is full; then it slides, every
        token gets a new position, and each step computes the whole window. Nothing here waits for the device.
        """
        c, idx = self.config, idx[:, -self.config.block_size :]
        (B, T), S = idx.shape, min(c.block_size, idx.shape[1] + max_new_tokens)
        cache = [tuple(pair) for pair in self.wte.weight.new_zeros(c.n_layer, 2, B, c.n_kv_head, S, c.head_dim)]
        positions = torch.arange(S, device=idx.device)
        tokens = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), 1)
        seen = torch.zeros(B, c.vocab_size, dtype=torch.bool, device=idx.device).scatter_(1, idx, True)
        step = torch.compile(self.next_logits) if compile else self.next_logits
        for n in range(T, T + max_new_tokens):
            if n == T:
                logits = self.next_logits(idx, positions[:T], cache)
            elif n <= S:
                logits = step(tokens[:, n - 1 : n], positions[n - 1 : n], cache)
            else:
                logits = self.next_logits(tokens[:, n - c.block_size : n])
            tokens[:, n : n + 1] = token = choose(logits, generator, seen=seen, **sampling)
            seen.scatter_(1, token, True)
            yield token

    def lay_out_for_sampling(self):
        """Store matrices by columns, values unchanged: uncompiled, a CPU reads them 1.2 times faster."""
        for parameter in self.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.t().contiguous().t()

    def next_logits(self, idx, positions=None, cache=None):
        """The logits of the token after idx, (B, vocab_size)."""
        return self.head(self.hidden(idx, positions, cache)[:, -1])[:, : self.config.vocab_size].float()

    # -----------------------------------------------------------------------------
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
                sizes = (c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim)
                for part, view in zip('qkv', tensor.split(sizes), strict=True):
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
        config = {
            'architectures': [ARCHITECTURES[c.arch]],
            'model_type': c.arch,
            'tie_word_embeddings': c.tied,
            'bos_token_id': end_of_text,
            'eos_token_id': end_of_text,
            'dtype': str(self.wte.weight.dtype).removeprefix('torch.'),
            'dropout': c.dropout,  # this and bias are ours: transformers' GPT-2 always has biases, and finds zeros
            'bias': c.bias,
        }
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
        folder = find_pretrained(source)
        try:
            with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
                config = json.load(file)
            fields = read_config(config)
            shape = GPTConfig(**fields | changes)
        except FileNotFoundError:
            raise FileNotFoundError(f'{folder} is no model: it has no config.json.') from None
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f'{folder}/config.json is not of a model known here: {error!r}') from None
        if shape.block_size > fields['block_size']:
            raise ValueError(f'block_size={shape.block_size} is more than the {fields["block_size"]} of {folder}.')
        return cls(shape).load_weights(read_weights(folder), folder)

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
    'wte.': 'transformer.wte.', 'wpe.': 'transformer.wpe.', 'norm_f.': 'transformer.ln_f.',
    'blocks.': 'transformer.h.', '.norm1.': '.ln_1.', '.norm2.': '.ln_2.',
    '.qkv.': '.c_attn.', '.fc.': '.c_fc.', '.proj.': '.c_proj.',
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


def read_config(config):
    """config.json's contents as fields of a GPTConfig. Raises KeyError or ValueError for what is not known here."""
    arch = config['model_type']
    if arch not in ARCHITECTURES:
        raise ValueError(f"A model of type '{arch}' cannot be opened here, only {', '.join(ARCHITECTURES)}.")
    fields = {'arch': arch, 'tied': config.get('tie_word_embeddings', arch == 'gpt2')}
    for ours, theirs in (GPT2_CONFIG if arch == 'gpt2' else LLAMA_CONFIG).items():
        fields[ours] = config.get(theirs) if ours in ('n_hidden', 'n_kv_head', 'head_dim') else config[theirs]
    fields |= {'dropout': config.get('dropout', 0.0), 'bias': arch == 'gpt2' and config.get('bias', True)}
    rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
    fields['rope_theta'] = float(rope.get('rope_theta') or config.get('rope_theta') or 10000.0)
    given = config | {'rope_type': rope.get('rope_type', rope.get('type', 'default'))}
    expected = {'activation_function': 'gelu_new', 'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False}
    expected |= {'use_sliding_window': False, 'scale_attn_by_inverse_layer_idx': False, 'rope_type': 'default'}
    for name, value in expected.items():
        if given.get(name, value) != value:
            raise ValueError(f"This model has {name}={given[name]!r}, which is not implemented here, only {value!r}.")
    return fields


def read_weights(folder):
    """{name: tensor} from a folder's safetensors, in one file or in shards with an index, or pytorch_model.bin."""
    files = [os.path.join(folder, name) for name in ('model.safetensors', 'pytorch_model.bin')]
    for file in [f'{file}.index.json' for file in files] + files:
        if os.path.exists(file):
            break
    else:
        raise FileNotFoundError(f'{folder} is no model: it has neither model.safetensors nor pytorch_model.bin.')
    weights = {}
    try:
        shards = [file]
        if file.endswith('.json'):
            with open(file, encoding='utf-8') as index:
                names = set(json.load(index)['weight_map'].values())
            shards = [os.path.join(folder, os.path.basename(name)) for name in sorted(names)]
        for file in shards:
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


def choose(logits, generator=None, temperature=1, top_k=None, top_p=None, min_p=None, repetition_penalty=1, seen=None):
    """The next token of each row of logits (B, V), as (B, 1).

    temperature: divides the logits; 0 takes the most likely token. Of the probabilities that gives,
    top_k keeps the k highest, exactly k;
    top_p keeps the fewest highest that sum to at least p (nucleus sampling; Holtzman et al., 2020);
    min_p keeps those of at least min_p times the highest (Nguyen et al., 2024).
    repetition_penalty: divides the positive logits, multiplies the negative ones, of tokens that are `seen`, (B, V)
    bool (Keskar et al., 2019, CTRL).
    """
    if repetition_penalty != 1:
        penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    ids, logits = None, logits / temperature
    if top_k is not None or top_p is not None:
        logits, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))  # sorted, highest first
    probabilities = logits.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # the mass of those more likely
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    if min_p is not None:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0)
    # Each of exponential clocks with these rates rings first with its probability: no wait for the device.
    rings = torch.empty_like(probabilities).exponential_(generator=generator)
    drawn = (probabilities / rings).argmax(-1, keepdim=True)
    return drawn if ids is None else ids.gather(-1, drawn)

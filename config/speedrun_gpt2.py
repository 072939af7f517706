# GPT-2's size and data, the fast way: rotary positions, RMSNorm, QK-norm and SwiGLU in place of
# GPT-2's blocks, Muon, and the WSD schedule (constant, then linear to 0). On a CPU and a small text
# the same changes reach the baseline's loss ten times faster (BENCHMARKS.md); on one H200 it trains
# at 408,900 tokens/s, 35 % MFU. No loss of the whole run has been measured yet.
#
#     torchrun --nproc_per_node=8 train.py config/speedrun_gpt2.py
#
# 16 x 32 x 1,024 = 524,288 tokens per step; 5,000 steps = 2.6 billion tokens, 21 per parameter.
# By --plan: 11.6 GiB per GPU in bfloat16, and 12 minutes on 8 H100 at 40 % MFU, 14 at 35 %.

out_dir = 'out-speedrun'
dataset = 'openwebtext'

arch = 'qwen3'
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

batch_size = 16
gradient_accumulation_steps = 4 * 8
max_iters = 5000
optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3
weight_decay = 0.1
warmup_iters = 100
schedule = 'wsd'
cooldown_frac = 0.5

eval_interval = 250
log_interval = 10

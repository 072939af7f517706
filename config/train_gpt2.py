# GPT-2 124M, as nanoGPT trains it. According to nanoGPT's README it reaches a loss of 2.85 on
# OpenWebText after 600,000 steps, four days on 8 A100.
#
#     torchrun --nproc_per_node=8 train.py config/train_gpt2.py
#
# 12 x 40 x 1,024 = 491,520 tokens per step; 600,000 steps = 295 billion tokens.
# By --plan: 8.1 GiB per GPU in bfloat16, and 70 hours on 8 A100 at 40 % MFU (one H200: 7.0 GiB,
# 474,800 tokens/s, 41 %).

out_dir = 'out-gpt2'
dataset = 'openwebtext'

batch_size = 12
gradient_accumulation_steps = 5 * 8
block_size = 1024
bias = False

max_iters = 600000
lr_decay_iters = 600000
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
weight_decay = 1e-1
beta2 = 0.95

eval_interval = 1000
log_interval = 10

# A 15M model of TinyStories: llama2.c's stories15M, number for number.
#
#     python prepare.py --dataset=tinystories --vocab_size=32000
#     python train.py config/train_tinystories.py
#
# 128 x 4 x 256 = 131,072 tokens per step; 100,000 steps = 13.1 billion tokens. llama2.c's README
# reports a validation loss of 1.072 per token of Llama 2's vocabulary, which has the same size as
# this one but other tokens.
# By --plan: 5.2 GiB in bfloat16, and 5 h 19 min on an RTX 4090 at 40 % MFU.

out_dir = 'out-tinystories'
dataset = 'tinystories'

arch = 'llama'
n_layer = 6
n_head = 6
n_embd = 288
block_size = 256

batch_size = 128
gradient_accumulation_steps = 4
max_iters = 100000
learning_rate = 5e-4
min_lr = 0.0
warmup_iters = 1000
weight_decay = 0.1
beta2 = 0.95

eval_interval = 2000
log_interval = 10

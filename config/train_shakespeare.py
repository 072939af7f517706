# The demo: a small GPT that learns to write plays on a laptop's CPU, in less than two minutes of
# training. train_shakespeare_char.py says what makes it fast.
#
#     python prepare.py
#     python train.py config/train_shakespeare.py
#
# 8 x 128 = 1,024 tokens per step; 600 steps = 614 thousand tokens = 0.46 epochs of the bundled
# Shakespeare. Measured on two CPU cores: 33 to 93 s, 0.5 GiB, validation loss 4.80, which is a
# perplexity of 121 with a vocabulary of 4,096, or 2.152 bits per byte (BENCHMARKS.md).

out_dir = 'out-shakespeare'
dataset = 'shakespeare'

arch = 'qwen3'
n_layer = 3
n_head = 4
n_embd = 128
block_size = 128

batch_size = 8
gradient_accumulation_steps = 1
max_iters = 600
optimizer = 'muon'
muon_lr = 0.02
muon_momentum = 0.9
learning_rate = 1e-2
beta1 = 0.8
weight_decay = 0.0
schedule = 'wsd'
cooldown_frac = 0.9

eval_interval = 200
log_interval = 50

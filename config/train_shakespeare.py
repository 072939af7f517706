# The demo: a small GPT that learns to write plays on a laptop's CPU, in a minute or two. It is what
# the dial (config/fit.py) chose for a minute on two cores with AMX.
#
#     python prepare.py
#     python train.py config/train_shakespeare.py
#
# 8 x 256 = 2,048 tokens per step; 600 steps = 1.2 million tokens = 0.92 epochs of the bundled
# Shakespeare. Measured on two CPU cores with AMX: 40 s, 0.6 GiB, validation loss 4.656, which is a
# perplexity of 105 with a vocabulary of 4,096, or 2.088 bits per byte (BENCHMARKS.md).

out_dir = 'out-shakespeare'
dataset = 'shakespeare'

arch = 'qwen3'
n_layer = 2
n_head = 3
n_embd = 96
block_size = 256

batch_size = 8
gradient_accumulation_steps = 1
max_iters = 600
optimizer = 'muon'
muon_lr = 0.02
muon_momentum = 0.9
learning_rate = 1e-2
beta1 = 0.8
weight_decay = 0.1
schedule = 'wsd'
cooldown_frac = 0.9

eval_interval = 200
log_interval = 50

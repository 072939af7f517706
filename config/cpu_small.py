# A first model on a laptop: 4.5 million parameters, some minutes of training on two CPU cores.
#
#     python prepare.py --vocab_size=5000 --name=shakespeare_5k
#     python train.py config/cpu_small.py
#
# 8 x 128 = 1,024 tokens per step; 1,200 steps = 1.2 million tokens = 0.95 epochs of the bundled
# Shakespeare. Measured there, on two CPU cores with AMX: 2m48s, 0.7 GiB, validation loss 4.590,
# which is a perplexity of 98 with a vocabulary of 5,000, or 2.004 bits per byte (BENCHMARKS.md).

out_dir = 'out-cpu-small'
dataset = 'shakespeare_5k'

arch = 'qwen3'
n_layer = 4
n_head = 8
n_embd = 256
block_size = 128

batch_size = 8
gradient_accumulation_steps = 1
max_iters = 1200
optimizer = 'muon'
muon_lr = 0.02
muon_momentum = 0.9
learning_rate = 1e-2
beta1 = 0.8
weight_decay = 0.0
schedule = 'wsd'
cooldown_frac = 0.9

eval_interval = 300
log_interval = 10

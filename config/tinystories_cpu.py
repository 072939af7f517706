# TinyStories on a laptop: 4 million parameters, some minutes of training on two CPU cores.
#
#     python prepare.py --dataset=tinystories
#     python train.py config/tinystories_cpu.py
#
# 8 x 128 = 1,024 tokens per step; 1,800 steps = 1.8 million tokens, so none of the 2,119,719
# stories is seen twice. Not yet run on TinyStories itself. Measured on the King James Bible
# (4.1 MB, two epochs), on two CPU cores with AMX: 4m02s, 0.7 GiB, validation loss 3.320, which is a
# perplexity of 27.7 with a vocabulary of 4,096, or 1.245 bits per byte (BENCHMARKS.md).

out_dir = 'out-tinystories-cpu'
dataset = 'tinystories'

arch = 'qwen3'
n_layer = 4
n_head = 8
n_embd = 256
block_size = 128

batch_size = 8
gradient_accumulation_steps = 1
max_iters = 1800
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
sample_interval = 600
sample_prompt = 'Once upon a time'

# Character-level Shakespeare on a CPU in seconds: the loss of nanoGPT's recipe for a CPU
# (baseline_shakespeare_char.py) in a fraction of its time.
#
#     head -c 1115394 corpus/shakespeare.txt | sed 's/<|endoftext|>//' > input.txt
#     python prepare.py --input=input.txt --tokenizer=char --name=shakespeare_char
#     python train.py config/train_shakespeare_char.py
#
# 32 x 64 = 2,048 tokens per step; 110 steps = 225 thousand tokens = 0.22 epochs.
# Measured on two CPU cores: validation loss 1.91 to 1.93, by seed (BENCHMARKS.md).
#
# Most of the speed comes from Muon and the qwen3 blocks, then from a learning rate that decays
# linearly almost from the start, half the layers, and high learning rates with low momentum
# (muon_momentum, beta1), since there are so few steps. Half as many heads of keys and values
# make a step 8 % faster, and larger batches let Muon take fewer steps.

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'

arch = 'qwen3'
n_layer = 2
n_head = 4
n_kv_head = 2
n_embd = 128
block_size = 64

batch_size = 32
gradient_accumulation_steps = 1
max_iters = 110
optimizer = 'muon'
muon_lr = 0.04
muon_momentum = 0.85
learning_rate = 3e-2
beta1 = 0.8
weight_decay = 0.0
schedule = 'wsd'
cooldown_frac = 0.9

eval_interval = 55
log_interval = 10

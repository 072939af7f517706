# nanoGPT's published recipe for character-level Shakespeare on a CPU, number for number: the
# baseline of `bench.py race`. train_shakespeare_char.py reaches its loss in a 16th of the time.
#
#     head -c 1115394 corpus/shakespeare.txt | sed 's/<|endoftext|>//' > input.txt
#     python prepare.py --input=input.txt --tokenizer=char --name=shakespeare_char
#     python train.py config/baseline_shakespeare_char.py
#
# 12 x 64 = 768 tokens per step; 2,000 steps = 1.5 million tokens = 1.5 epochs.
# Measured on two CPU cores: validation loss 1.94 to 1.95 after 90 s (BENCHMARKS.md).

out_dir = 'out-shakespeare-char-baseline'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False
dropout = 0.0

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 2000
learning_rate = 1e-3
lr_decay_iters = 2000
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
dtype = 'float32'  # as nanoGPT computes on a CPU
compile = False

eval_interval = 250
log_interval = 10

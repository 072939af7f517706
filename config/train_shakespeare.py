# A small GPT that learns to write plays, on a laptop's CPU, in under three minutes of training.
#
#     python prepare.py
#     python train.py config/train_shakespeare.py
#
# 8 x 128 = 1,024 tokens a step; 1,300 steps = 1.3 million tokens = 1 epoch.

out_dir = 'out-shakespeare'
dataset = 'shakespeare'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
bias = False

batch_size = 8
gradient_accumulation_steps = 1
max_iters = 1300
learning_rate = 3e-3  # small models like it high
warmup_iters = 50
beta2 = 0.99  # few tokens a step: average the squared gradients over more of them

eval_interval = 500
log_interval = 50

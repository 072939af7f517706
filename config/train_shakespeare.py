# A small GPT that learns to write plays on a laptop's CPU in about three minutes.
#
#     python prepare.py
#     python train.py config/train_shakespeare.py
#
# 16 x 128 = 2,048 tokens a step; 900 steps = 1.8 million tokens = 1.2 epochs of the 1.5 million there are.

out_dir = 'out-shakespeare'
dataset = 'shakespeare'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
bias = False

batch_size = 16
max_iters = 900
learning_rate = 3e-3  # small models like it high
warmup_iters = 50
beta2 = 0.99  # few tokens a step: average the squared gradient over more of them

eval_interval = 300
log_interval = 25

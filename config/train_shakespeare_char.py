# Character-level Shakespeare on a CPU in fourteen seconds: the loss of nanoGPT's recipe (baseline_shakespeare_char.py)
# for about a tenth of its time.
#
#     python prepare.py --input=input.txt --tokenizer=char --name=shakespeare_char
#     python train.py config/train_shakespeare_char.py
#
# 12 x 64 = 768 tokens a step; 240 steps = 184 thousand tokens = 0.18 epochs of tiny Shakespeare. Of what makes it fast,
# most is Muon and the qwen3 blocks, then a learning rate that falls in a straight line from the start, half the layers,
# and high learning rates with short memories (muon_momentum, beta1), since there are so few steps.

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'

arch = 'qwen3'
n_layer = 2
n_head = 4
n_embd = 128
block_size = 64

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 240
optimizer = 'muon'
muon_lr = 0.02
muon_momentum = 0.85
learning_rate = 3e-2
beta1 = 0.8
weight_decay = 0.0
schedule = 'wsd'
cooldown = 0.9

eval_interval = 120
log_interval = 10

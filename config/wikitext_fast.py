# WikiText-103 the fast way: the blocks, optimizer and schedule of train_shakespeare_char.py at GPT-2's size, and four
# epochs instead of eighty. Not yet run; train_wikitext.py has a loss to compare with.
#
#     python prepare.py --dataset=wikitext103 --tokenizer=gpt2
#     python train.py config/wikitext_fast.py
#
# 16 x 4 x 1,024 = 65,536 tokens a step; 7,200 steps = 472 million tokens = 4.0 epochs of the 117,920,140.
# By --plan: 12.9 GiB in bfloat16, and 1 h 41 min on an RTX 4090 at 40 % of its peak.

out_dir = 'out-wikitext-fast'
dataset = 'wikitext103'

arch = 'qwen3'
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
dropout = 0.1

batch_size = 16
gradient_accumulation_steps = 4
max_iters = 7200
optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3
weight_decay = 0.1
warmup_iters = 100
schedule = 'wsd'
cooldown = 0.7

eval_interval = 300
log_interval = 10
early_stopping_patience = 4

# WikiText-103 the fast way: the blocks, optimizer and schedule of train_shakespeare_char.py at
# GPT-2's size, and 4 epochs instead of 80. Not yet run; compare its loss with train_wikitext.py's.
#
#     python prepare.py --dataset=wikitext103 --tokenizer=gpt2
#     python train.py config/wikitext_fast.py
#
# 16 x 4 x 1,024 = 65,536 tokens per step; 7,200 steps = 472 million tokens = 4.0 epochs of
# 117,920,140 tokens.
# By --plan: 12.2 GiB in bfloat16, and 1 h 41 min on an RTX 4090 at 40 % MFU.

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
cooldown_frac = 0.7

eval_interval = 300
log_interval = 10
early_stopping_patience = 4

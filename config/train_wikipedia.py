# A GPT of GPT-2's size on English Wikipedia, the fast way, as in speedrun_gpt2.py. Not yet run, and
# no published loss of such a model can be compared with it.
#
#     python prepare.py --dataset=wikipedia --tokenizer=gpt2
#     torchrun --nproc_per_node=8 train.py config/train_wikipedia.py
#     python sample.py --out_dir=out-wikipedia --start="The Rhine is"
#
# 16 x 32 x 1,024 = 524,288 tokens per step; 5,000 steps = 2.6 billion tokens, 21 per parameter,
# about half an epoch.
# By --plan: 11.6 GiB per GPU in bfloat16, and 12 minutes on 8 H100 at 40 % MFU.

out_dir = 'out-wikipedia'
dataset = 'wikipedia'

arch = 'qwen3'
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

batch_size = 16
gradient_accumulation_steps = 4 * 8
max_iters = 5000
optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3
weight_decay = 0.1
warmup_iters = 100
schedule = 'wsd'
cooldown_frac = 0.5

eval_interval = 250
log_interval = 10

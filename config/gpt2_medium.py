# GPT-2 medium, 355 million parameters: use it after train_gpt2.py. The learning rate is GPT-3's
# for this size (Brown et al., 2020, table 2.1).
#
#     torchrun --nproc_per_node=8 train.py config/train_gpt2.py config/gpt2_medium.py
#
# 12 x 40 x 1,024 = 491,520 tokens per step; 600,000 steps = 295 billion tokens.
# OpenAI's weights have a loss of 2.84 on OpenWebText, according to nanoGPT's README.
# By --plan: 18.4 GiB per GPU in bfloat16, and 199 hours on 8 A100 at 40 % MFU.

out_dir = 'out-gpt2-medium'

n_layer = 24
n_head = 16
n_embd = 1024

learning_rate = 3e-4
min_lr = 3e-5

# GPT-2 large, 774 million parameters: use it after train_gpt2.py. The learning rate is GPT-3's
# for this size (Brown et al., 2020, table 2.1).
#
#     torchrun --nproc_per_node=8 train.py config/train_gpt2.py config/gpt2_large.py
#
# 12 x 40 x 1,024 = 491,520 tokens per step; 600,000 steps = 295 billion tokens.
# OpenAI's weights have a loss of 2.67 on OpenWebText, according to nanoGPT's README.
# By --plan: 34.4 GiB per GPU in bfloat16, and 427 hours on 8 A100 at 40 % MFU.

out_dir = 'out-gpt2-large'

n_layer = 36
n_head = 20
n_embd = 1280

learning_rate = 2.5e-4
min_lr = 2.5e-5

# GPT-2 XL, 1,557 million parameters: use it after train_gpt2.py. The learning rate is GPT-3's
# for this size (Brown et al., 2020, table 2.1).
#
#     torchrun --nproc_per_node=8 train.py config/train_gpt2.py config/gpt2_xl.py
#
# 12 x 40 x 1,024 = 491,520 tokens per step; 600,000 steps = 295 billion tokens.
# OpenAI's weights have a loss of 2.54 on OpenWebText, according to nanoGPT's README.
# By --plan: 60.3 GiB per GPU in bfloat16, 37.6 with --fsdp, and 843 hours on 8 A100 at 40 % MFU.

out_dir = 'out-gpt2-xl'

n_layer = 48
n_head = 25
n_embd = 1600

learning_rate = 2e-4
min_lr = 2e-5

# To follow train_gpt2.py: GPT-2 medium, 355 million parameters, with GPT-3's learning rate for that size (Brown et al.,
# 2020, table 2.1). OpenAI's own has 2.84 on OpenWebText, by nanoGPT's README.
#
#     torchrun --nproc_per_node=8 train.py config/train_gpt2.py config/gpt2_medium.py
#
# By --plan: 16.6 GiB a GPU in bfloat16, and 199 hours on 8 A100 at 40 % of their peak.

out_dir = 'out-gpt2-medium'

n_layer = 24
n_head = 16
n_embd = 1024

learning_rate = 3e-4
min_lr = 3e-5

# To follow train_gpt2.py: GPT-2 large, 774 million parameters, with GPT-3's learning rate for that size (Brown et al.,
# 2020, table 2.1). OpenAI's own has 2.67 on OpenWebText, by nanoGPT's README.
#
#     torchrun --nproc_per_node=8 train.py config/train_gpt2.py config/gpt2_large.py
#
# By --plan: 32.6 GiB a GPU in bfloat16, and 427 hours on 8 A100 at 40 % of their peak.

out_dir = 'out-gpt2-large'

n_layer = 36
n_head = 20
n_embd = 1280

learning_rate = 2.5e-4
min_lr = 2.5e-5

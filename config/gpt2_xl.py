# To follow train_gpt2.py: GPT-2 XL, 1,557 million parameters, with GPT-3's learning rate for that size (Brown et al.,
# 2020, table 2.1). OpenAI's own has 2.54 on OpenWebText, by nanoGPT's README.
#
#     torchrun --nproc_per_node=8 train.py config/train_gpt2.py config/gpt2_xl.py
#
# By --plan: 58.6 GiB a GPU in bfloat16, 39.1 with --fsdp, and 843 hours on 8 A100 at 40 % of their peak.

out_dir = 'out-gpt2-xl'

n_layer = 48
n_head = 25
n_embd = 1600

learning_rate = 2e-4
min_lr = 2e-5

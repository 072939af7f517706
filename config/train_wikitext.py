# GPT-2 124M on WikiText-103, the classic recipe: windows that overlap by half, a low learning rate,
# early stopping.
#
#     python prepare.py --dataset=wikitext103 --tokenizer=gpt2
#     python train.py config/train_wikitext.py
#
# 4 x 8 x 1,024 = 32,768 tokens per step; 300,000 steps = 9.8 billion tokens at most: the run ends
# after ten evaluations in a row without a new best. A Transformer with 125M parameters has a
# perplexity of 18.6 there, a loss of 2.92 (Poli et al., 2023, Hyena, table 4.3).
# By --plan: 5.8 GiB in bfloat16, and 35 hours on an RTX 4090 at 40 % MFU for all of the steps.

out_dir = 'out-wikitext'
dataset = 'wikitext103'

batch_size = 4
gradient_accumulation_steps = 8
block_size = 1024
stride = 512
dropout = 0.1

max_iters = 300000
learning_rate = 1.5e-4
warmup_iters = 4000
weight_decay = 0.01

eval_interval = 2000
early_stopping_patience = 10

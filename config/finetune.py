# A published GPT-2, or a model of your own, taught your text: a low learning rate, few steps, and an end as soon as the
# validation loss falls no more.
#
#     python prepare.py --input=book.txt --tokenizer=gpt2 --name=book-gpt2
#     python train.py config/finetune.py --dataset=book-gpt2
#
# For a model in a folder give the folder to both, as --tokenizer= and as --init_from=, and a --block_size= that is not
# above its own. With --freeze=6 only the upper half of GPT-2's twelve blocks is trained.
#
# 1 x 32 x 1,024 = 32,768 tokens a step; 200 steps = 6.6 million tokens at most, five epochs of the bundled Shakespeare.
# By the README of transformers' examples, GPT-2 comes to a perplexity of about 20 on WikiText-2 in this way.
# By --plan: 2.8 GiB in bfloat16 (with --freeze=6, 1.4), and 3 minutes on an RTX 3090 at 40 % of its peak.

init_from = 'gpt2'
out_dir = 'out-finetune'
dataset = 'book-gpt2'

block_size = 1024
batch_size = 1
gradient_accumulation_steps = 32
dropout = 0.1

max_iters = 200
learning_rate = 3e-5
min_lr = 0.0
warmup_iters = 5
weight_decay = 0.1

eval_interval = 20
log_interval = 5
always_save_checkpoint = False
early_stopping_patience = 2

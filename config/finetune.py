# Fine-tune a published model, or a model of your own, on your text: a low learning rate, few steps,
# and early stopping once the validation loss no longer falls.
#
#     python prepare.py --input=book.txt --tokenizer=gpt2 --name=book-gpt2
#     python train.py config/finetune.py --dataset=book-gpt2
#
# For another model, pass its name (Qwen/Qwen2.5-0.5B) or folder to both commands, as --tokenizer=
# and as --init_from=; --block_size= may be at most its context. With --freeze=6 only the upper half
# of GPT-2's twelve blocks is trained.
#
# 1 x 32 x 1,024 = 32,768 tokens per step; 200 steps = 6.6 million tokens at most, five epochs of
# the bundled Shakespeare. Fine-tuned with dropout, GPT-2 reaches a perplexity of about 20 on
# WikiText-2, according to the README of transformers' examples.
# By --plan: 3.0 GiB in bfloat16 (1.8 with --freeze=6), and 3 minutes on an RTX 3090 at 40 % MFU.

init_from = 'gpt2'
out_dir = 'out-finetune'
dataset = 'book-gpt2'

block_size = 1024
batch_size = 1
gradient_accumulation_steps = 32
dropout = 0.0  # GPT-2 was trained with 0.1, which is good for a small text; the others without

max_iters = 200
learning_rate = 3e-5
min_lr = 0.0
warmup_iters = 5
weight_decay = 0.1

eval_interval = 20
log_interval = 5
always_save_checkpoint = False
early_stopping_patience = 2

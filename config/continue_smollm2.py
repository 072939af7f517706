# Continue the pretraining of SmolLM2-135M, a Llama, on your own text. On a laptop: a few minutes.
#
#     python prepare.py --tokenizer=HuggingFaceTB/SmolLM2-135M --val_fraction=0.01 --name=smollm2
#     python train.py config/continue_smollm2.py
#
# The whole model is trained; with --freeze=20 only the upper ten of its thirty blocks are. Windows
# of 256 tokens are enough for a style; the model keeps its context of 8,192.
#
# 2 x 2 x 256 = 1,024 tokens per step; 50 steps = 51,200 tokens. On two cores with AMX they take
# 2m51s and 4.9 GiB: SmolLM2-135M-Instruct with weights of 4 bits, the one this was measured with,
# goes from 1.722 to 1.548 bits per byte. With --freeze=20 to 1.626 in 1m10s and 2.5 GiB
# (BENCHMARKS.md).

init_from = 'HuggingFaceTB/SmolLM2-135M'
out_dir = 'out-smollm2'
dataset = 'smollm2'

block_size = 256
batch_size = 2
gradient_accumulation_steps = 2

max_iters = 50
learning_rate = 1e-4
min_lr = 0.0
warmup_iters = 5
weight_decay = 0.1

eval_interval = 25
log_interval = 5
always_save_checkpoint = False

"""Let a trained model write.

    python sample.py --out_dir=out-shakespeare
    python sample.py --out_dir=out-shakespeare --start="ROMEO." --temperature=0.8 --num_samples=3
    python sample.py --out_dir=out-shakespeare --start=FILE:prompt.txt
"""

import sys

import torch

import checkpoint
import tokenizer as tokenizers
from configurator import configure, errors_in_one_sentence, pick_device
from model import GPT

# -----------------------------------------------------------------------------
out_dir = 'out'  # the run to take a checkpoint from
which = 'best'  # which of its checkpoints: 'best' (lowest validation loss) or 'last'
start = '\n'  # the prompt; FILE:prompt.txt reads it from a file
num_samples = 3  # samples to draw
max_new_tokens = 300  # tokens in each, fewer where the model ends the text
temperature = 0.8  # below 1 sharpens the distribution, above 1 flattens it, 0 takes the most likely token
top_k: int | None = 200  # draw from the k most likely tokens only; None: from all
seed = 1337  # the same seed gives the same samples
device = 'auto'  # 'cuda', 'mps', 'cpu'; 'auto' takes the first there is
# -----------------------------------------------------------------------------


def main():
    configure(globals())
    if which not in ('best', 'last'):
        raise ValueError(f"which='{which}' must be 'best' or 'last'.")
    if temperature < 0 or (top_k is not None and top_k < 1) or num_samples < 1 or max_new_tokens < 1:
        raise ValueError('temperature must be 0 or more; top_k, num_samples and max_new_tokens 1 or more.')
    prompt = start
    if start.startswith('FILE:'):
        with open(start.removeprefix('FILE:'), encoding='utf-8') as file:
            prompt = file.read()
    path = checkpoint.find(out_dir, which)
    tokenizer = tokenizers.load(path)
    end_of_text = tokenizers.end_of_text_id(tokenizer)
    ids = [int(i) for i in tokenizers.encode(tokenizer, prompt)]
    if not ids and end_of_text is None:
        raise ValueError("The prompt is empty: give the model something to continue with --start='...'.")
    place = pick_device(device)
    model = GPT.from_pretrained(path).to(place).eval()

    generator = torch.Generator(place).manual_seed(seed)
    idx = torch.tensor([ids or [end_of_text]], device=place)
    for _ in range(num_samples):
        tokens = list(ids)
        for token in model.generate(idx, max_new_tokens, temperature, top_k, generator):
            if token.item() == end_of_text:
                break
            tokens.append(token.item())
        print(tokenizer.decode(tokens))
        print('-' * 80, flush=True)


if __name__ == '__main__':
    with errors_in_one_sentence():
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)

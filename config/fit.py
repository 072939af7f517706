# The dial: everything from the text, the machine and the minutes.
#
#     python prepare.py --input=book.txt
#     python train.py config/fit.py --dataset=book --max_minutes=10
#     python train.py config/fit.py --dataset=book --max_minutes=10 --plan    # what it chooses
#
# The rules are in dial.py. Flags override what it chooses and leave the rest as it is, so give
# --n_head with --n_embd; only of --max_epochs it takes account. The run is in out-book, whose
# config.py has the recipe in plain numbers.

from dial import choose

globals().update(choose(dict(globals())))

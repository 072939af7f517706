"""Draw a run, or several to compare, from their logs.

    python plot.py --out_dir=out-shakespeare      # out-shakespeare/loss.png, as train.py draws it
    python plot.py --out_dir=out-a,out-b --file=compare.png --x=seconds --labels=AdamW,Muon
"""

from runtime import UserError, begin_script

begin_script()  # first, so that Ctrl-C ends the imports as well: they take seconds

import os
from typing import Literal

from configurator import configure
from report import draw, read_log

# -----------------------------------------------------------------------------
out_dir = 'out'  # the run, or several separated by commas
file: str | None = None  # the picture to write; None: loss.png in the (first) run
x: Literal['steps', 'seconds', 'tokens'] = 'steps'  # the horizontal axis; seconds of training
labels: str | None = None  # the runs' names in the legend, separated by commas; None: their folders
# -----------------------------------------------------------------------------
configure(globals())

folders = out_dir.split(',')
names = folders
if labels is not None:
    names = labels.split(',')
if len(names) != len(folders) or len(set(names)) != len(folders):
    raise UserError(f'Each of {len(folders)} runs needs a label of its own, not {",".join(names)}.')

path = file
if path is None:
    path = os.path.join(folders[0], 'loss.png')
runs = {name: read_log(folder) for name, folder in zip(names, folders, strict=True)}
if not path.endswith('.png') or not os.path.isdir(os.path.dirname(path) or '.'):
    raise UserError(f'file={path} must be a .png in an existing folder.')
draw(runs, path, x)
print(path)

"""The front door: `python train.py optimizer=lion` trains, scores and reports; `python train.py --help` says more."""

import sys

from lightning_opt.job import leave
from lightning_opt.launch import main

if __name__ == "__main__":
    leave(main(sys.argv[1:]))

"""What each of the processes runs: `torchrun train_ranks.py 'train debug ...' 'train ...'`: commands, one after the other."""

from __future__ import annotations

import os
import shlex
import sys
import traceback

import torch

from fmegatron import cli

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")  # one for all commands: torchrun's store knows a group's name once
    try:
        for words in sys.argv[1:]:
            assert cli.main(shlex.split(words)) == 0, words
    except BaseException:  # a rank that fails leaves at once, for the others wait for it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)

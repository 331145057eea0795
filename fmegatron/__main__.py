"""`python -m fmegatron`, and `torchrun -m fmegatron`: the same as the command `fmegatron`."""

import sys

from fmegatron.cli import main

sys.exit(main())

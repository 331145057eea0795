"""Exit codes of a run that ends for a reason of its own. 16 and 17 mean what they mean in Megatron-LM."""

from __future__ import annotations

ELSEWHERE = 16  # saved; start again on other devices, to tell a fault from bad data
BAD_RESULT = 17  # a result was refused, or a device made a mistake
HUNG = 18  # a step took longer than its time limit


class Halt(SystemExit):
    """Ends the process with a code of this file; `why` is the line that was said."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(code)
        self.why = why

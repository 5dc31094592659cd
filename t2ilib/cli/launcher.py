"""Which of several processes this is, as launchers (`accelerate launch`, `torchrun`) say before the processes know each other."""

import os
import sys


def launched_as() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def tells_mistakes() -> bool:
    """Whether a mistake is for this process to tell: until they know each other all of them make the same ones."""
    torch = sys.modules.get("torch.distributed")
    return launched_as()[0] == 0 or (torch is not None and torch.is_initialized())

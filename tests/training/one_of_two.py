"""One of the processes of test_processes.py: trains the runs that it is given, one after the other, and writes down how each ended.

torchrun --nproc-per-node 2 one_of_two.py CASES.json
"""

import json
import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from t2ilib.config import ConfigError
from t2ilib.data import opening
from t2ilib.runfile import build_run
from t2ilib.shapes import source
from t2ilib.training import loop, setups, step

NUMBER = int(os.environ.get("RANK", 0))
opening.BLOCK = 5
source.NUM_VALIDATION = 6  # as conftest.py has it


def poisoned(seed, number, ids, *rest):
    """The noise of the second process is not finite in the third step."""
    noise, timesteps = addressed_noise(seed, number, ids, *rest)
    return (noise * float("nan") if (NUMBER, number) == (1, 2) else noise), timesteps


def signalled(run, setup, model, parameters, accelerator, number, ids):
    """The second process gets a SIGTERM in the third step."""
    if (NUMBER, number) == (1, 2):
        os.kill(os.getpid(), signal.SIGTERM)
    return take_gradients(run, setup, model, parameters, accelerator, number, ids)


def broken(*arguments):
    """The second process cannot encode."""
    if NUMBER == 1:
        raise ConfigError("the disk of this one is full")
    return keep_latents(*arguments)


addressed_noise, take_gradients, keep_latents = step.addressed_noise, loop.take_gradients, setups.keep_latents
HAPPENS = {
    "poisoned": patch.object(step, "addressed_noise", poisoned),
    "signalled": patch.object(loop, "take_gradients", signalled),
    "broken": patch.object(setups, "keep_latents", broken),
}


def ended(name: str, values: dict) -> str:
    try:
        loop.train(build_run(values))
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    for name, values in cases.items():
        with HAPPENS.get(name, patch.object(step, "addressed_noise", addressed_noise)):
            how = ended(name, values)
        Path(sys.argv[1]).with_name(f"{name}-{NUMBER}.txt").write_text(how)

"""The GPUs that a study's notebooks can have, and which notebook has which: one each, unless it is asked that they share.

A process takes the first GPU that it sees, so without being told otherwise all notebooks at a time would take the same one. What is
visible is asked of the driver's own tool, in a process that ends: torch would keep a context on every card, and memory with it.
Leaves out other makers' cards, whose notebooks see what this process sees.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence

VISIBLE = "CUDA_VISIBLE_DEVICES"
SECONDS_TO_ANSWER = 60.0


def visible_cards(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; [] without any.

    Where that is set it is what the user wants, up to the first entry that CUDA would stop at; otherwise all there are.
    """
    if VISIBLE not in environment:
        return parse_listing(list_cards())
    cards = []
    for entry in environment[VISIBLE].split(","):
        if not re.fullmatch(r"\d+|(GPU|MIG)-\S+", entry.strip()):
            break
        cards.append(entry.strip())
    return cards


def list_cards() -> str:
    """What `nvidia-smi -L` prints; "" where there is no such tool, or where it fails."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=SECONDS_TO_ANSWER)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def parse_listing(text: str) -> list[str]:
    """UUIDs in the output of `nvidia-smi -L`; of a GPU that is divided (MIG) those of its parts, for it cannot be used as a whole."""
    cards: list[str] = []
    for uuid in re.findall(r"\(UUID: ((?:GPU|MIG)-[^)\s]+)\)", text):
        if uuid.startswith("MIG-") and cards and cards[-1].startswith("GPU-"):
            cards.pop()
        cards.append(uuid)
    return cards


def sharing(jobs: int, cards: Sequence[str]) -> int:
    """How many of `jobs` notebooks at a time have the same GPU, at the most; without one they share the machine."""
    return -(-jobs // len(cards)) if cards else jobs


def variables_of(slot: int, cards: Sequence[str]) -> dict[str, str]:
    """What the notebook in this place of those that run at a time has in its environment."""
    return {VISIBLE: cards[slot % len(cards)]} if cards else {}


def tell_sharing(jobs: int, cards: Sequence[str]) -> str:
    """A line about who has which GPU; "" where there is nothing to say."""
    if not cards or jobs == 1:
        return ""
    if jobs <= len(cards):
        return f"each notebook has a GPU of its own ({jobs} of {len(cards)})"
    return (
        f"{jobs} notebooks share {len(cards)} GPU{'s' * (len(cards) > 1)}, up to {sharing(jobs, cards)} on one: each is slower, and they"
        f" must fit there together; --jobs {len(cards)} gives each its own"
    )

"""Where a study's notebooks are executed: here, or on a Ray cluster; how many at a time, and with how much of which machine each.

A place is opened for as long as a study runs. It says only where a notebook is executed: folders, states, progress, results and the report
are the executor's and the study's own, and the same everywhere.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing import get_context
from typing import Any

from t2ilib.config import ConfigError, check_choice
from t2ilib.studies.cards import sharing, tell_sharing, visible_cards
from t2ilib.studies.notebooks import execute_notebook
from t2ilib.studies.onray import on_cluster, on_own_cluster
from t2ilib.studies.place import Demand, Place


@contextlib.contextmanager
def here(address: str, demand: Demand) -> Iterator[Place]:
    """This machine: one at a time unless asked otherwise, each in a process, and on a GPU of its own while there are as many. Raises
    ConfigError where that would put more on a GPU than `demand.per_card`."""
    if address:
        raise ConfigError(f"--on here:{address}: here is this machine, and has no address; write --on here")
    jobs, cards = demand.jobs or 1, visible_cards()
    at_a_time = min(jobs, demand.runs)
    require_cards(at_a_time, cards, demand.per_card)
    yield Place(jobs, execute_notebook, ask_here, sharing(jobs, cards), cards, None, tell_sharing(at_a_time, cards))


def require_cards(jobs: int, cards: list[str], per_card: int) -> None:
    """Raises ConfigError where so many notebooks at a time would share GPUs more than was asked for."""
    if cards and jobs > len(cards) * per_card:
        one = "this machine's GPU" if len(cards) == 1 else f"each of this machine's {len(cards)} GPUs"
        raise ConfigError(
            f"--jobs {jobs}: {one} takes {per_card} notebook{'s' * (per_card > 1)} at a time, which makes {len(cards) * per_card}. Take --jobs"
            f" {len(cards) * per_card}, or say --per-card {sharing(jobs, cards)} where so many fit into a GPU together; each is slower then"
        )


def ask_here(question: Callable[..., Any], *about: Any) -> Any:
    """What `question` answers, asked in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(question, *about).result()


def on_ray(address: str, demand: Demand) -> AbstractContextManager[Place]:
    """A Ray cluster: the one at `address`, or one of this machine alone, for as long as the study runs."""
    if address:
        return on_cluster(address, demand)
    jobs, cards = demand.jobs or 1, visible_cards()
    require_cards(min(jobs, demand.runs), cards, demand.per_card)
    return on_own_cluster(jobs, cards, demand)


WHERE = {"here": here, "ray": on_ray}
"""Name -> opens the place at an address, "" where none was given, for a demand."""


def open_place(on: str, demand: Demand) -> AbstractContextManager[Place]:
    """The place that `--on` names: here, ray, or ray:ADDRESS. Raises ConfigError, on entering it too."""
    name, colon, address = on.partition(":")
    check_choice(name, WHERE, "--on")
    if colon and not address:
        raise ConfigError(
            f"--on {on}: an address is missing behind the colon; leave the colon out, or write --on {name}:ADDRESS"
        )
    return WHERE[name](address, demand)

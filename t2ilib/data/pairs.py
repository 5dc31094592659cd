"""Pairs of pictures of one caption, of which one was preferred: what must hold of a data set of them.

Diffusion-DPO (arXiv 2311.12908) compares what a model makes of the two pictures of a pair, under one caption, noise and timestep. So a data
set has pairs alone, a pair has one caption, and nothing says that a part of one of its pictures does not count. What is held out are prompts:
a model that learned what is preferred of a prompt has seen that prompt, whichever of its pairs were kept from it.
"""

import logging
from collections.abc import Iterable, Sequence

from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.records import Record
from t2ilib.data.sources.wording import one_line
from t2ilib.text import shown

log = logging.getLogger(__name__)


def have_pairs(records: Iterable[Record]) -> bool:
    return any(record.rejected is not None for record in records)


def check_pairs(run: RunConfig, training: Sequence[Record], held_out: Sequence[Record]) -> None:
    """Warns of prompts on both sides, where the held-out pairs are of their own. Raises ConfigError where some records are pairs and
    others are not, and for pairs with what is about single pictures."""
    records = [*training, *held_out]
    if not have_pairs(records):
        return
    single = next((record for record in records if record.rejected is None), None)
    if single is not None:
        raise ConfigError(
            f"{shown(single.path)} is a single picture, and others are pairs of a chosen and a rejected one: a data set has pairs or it"
            " has none. Give each a picture that was liked less, or train on single pictures in a run of their own"
        )
    if run.prior is not None:
        raise ConfigError(
            "the prior section shows pictures of the class, which are no pairs, and these pictures are: leave it out. What keeps a model that"
            " learns from pairs near its base is the objective itself"
        )
    masked = next((record for record in records if record.mask is not None), None)
    if run.data.alpha == "mask" or masked is not None:
        what = "data.alpha mask" if masked is None else f"the mask of {shown(masked.path)}"
        raise ConfigError(
            f"{what} says where the loss of one picture counts, and of a pair the losses of two pictures are compared: leave masks out"
        )
    several = next((record for record in records if record.more), None)
    if several is not None:
        raise ConfigError(
            f"{shown(several.path)} has {len(several.captions)} captions, and of a pair it must be known by which one picture was chosen:"
            " keep that one"
        )
    both = {one_line(record.caption) for record in training} & {one_line(record.caption) for record in held_out}
    if both:
        log.warning(
            "%d prompt(s) of held-out pairs are trained on too (%r, ...): what is measured on them is not of prompts never seen",
            len(both),
            min(both),
        )

"""What could be set otherwise for these pictures: each suggestion with its reason and the `--set` that does it.

None of it is the best of anything: a range of steps is where others have found theirs, and what the pictures can fill is no more than that.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from t2ilib.config import ConfigError
from t2ilib.data.dataset import FEW_HELD_OUT
from t2ilib.data.inspection import MOST_ENLARGED, Inspection, fillable, share_enlarged
from t2ilib.data.manifest import enough_to_allow, too_many
from t2ilib.data.sources.folder import hold_out
from t2ilib.data.views import assign, share_cut

FEWEST_SHOWN, MOST_SHOWN = (14, 800, 14_400), (72, 2_400, 60_000)
"""How many pictures a training shows in all: a number a picture, but no fewer and no more than the others. Of a handful of pictures
DreamBooth showed 800 (objects) to 2,400 (faces; huggingface.co/blog/dreambooth, 400 and 1,200 steps of two); of a thousand this project's
`concepts` study showed each 14 times, 14,400 in all, and of some 830 (their number is told from memory) diffusers' example of a LoRA each 72 times, 60,000 in all (15,000 steps of four)."""
MUCH_CUT = 0.1
"""The share of the median picture that a crop cuts off from which on buckets are suggested."""
SIDED = re.compile(r"\b(left|right|leftmost|rightmost|clockwise|counterclockwise|letters?|text|words?|writing|says)\b", re.IGNORECASE)  # fmt: skip
SHARES = (0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
FEW_TO_MIRROR = 500
"""More pictures than this have little to gain from being mirrored."""


@dataclass(frozen=True)
class Suggestion:
    """`sets`: what `--set` would be given; empty where it is no setting that helps."""

    sets: tuple[str, ...]
    why: str


def advise(found: Inspection, native: int | None = None, multiple: int | None = None) -> list[Suggestion]:
    """`native`: the side of the pictures that the base was made for, None where no base was chosen; `multiple` as `inspect` has it."""
    told = [*about_rejected(found)]
    if found.records:
        told += [*about_held_out(found), *about_resolution(found, native), *about_buckets(found, multiple)]
        told += [*about_flips(found), *about_steps(found)]
    return told


def about_rejected(found: Inspection) -> Iterator[Suggestion]:
    data, bare = found.run.data, sum(why.startswith("has no .txt caption") for _, why in found.rejected)
    if bare > len(found.records) and data.prompt is None:
        yield Suggestion(
            ("data.prompt=a photo of sks",),
            f"one caption for the {of(bare, 'picture')} without any (with a word of your own for sks)",
        )
    if found.records and too_many(found.records, found.rejected, data):
        allowed = enough_to_allow(found.records, found.rejected)
        yield Suggestion((f"data.max_rejected={allowed:g}",), f"trains without the {len(found.rejected)} rejected")


def about_held_out(found: Inspection) -> Iterator[Suggestion]:
    data, count = found.run.data, found.num_held_out
    if len(found.records) == 1 and data.validation_share:
        yield Suggestion(("data.validation_share=0",), "trains on the one picture, and holds out none")
        return
    if count >= FEW_HELD_OUT or not data.validation_share or data.source == "shapes":
        return
    few = f"{of(count, 'picture')} held out, and no held-out loss can be trusted before {FEW_HELD_OUT} are"
    if data.validation_path is not None or data.validation_split is not None:
        yield Suggestion((), few + ": add some to those that are held out")
        return
    enough = [share for share in SHARES if FEW_HELD_OUT <= num_held_out(found, share) <= len(found.records) / 2]
    if enough:
        yield Suggestion((f"data.validation_share={enough[0]:g}",), few)
    else:
        yield Suggestion(("data.validation_path=FOLDER",), few + ": hold out a folder of their own")


def num_held_out(found: Inspection, share: float) -> int:
    try:
        return len(hold_out(found.records, share)[1])
    except ConfigError:
        return 0


def about_resolution(found: Inspection, native: int | None) -> Iterator[Suggestion]:
    data, can = found.run.data, fillable(found.sizes)
    enlarged = share_enlarged(found.sizes, data.resolution)
    if native is None:
        if found.assumed:
            rest = ", ".join(f"{100 * share_enlarged(found.sizes, side):.0f} % at {side}" for side in (512, 1024))
            yield Suggestion(
                (f"data.resolution={data.resolution}",),
                f"what 9 of 10 pictures can fill. SD1.5 was made for 512, SDXL for 1024; enlarged would be {rest}",
            )
    elif data.resolution != native:
        fits = share_enlarged(found.sizes, native) <= MOST_ENLARGED
        but = "" if fits else f", though {100 * share_enlarged(found.sizes, native):.0f} % of the pictures are smaller"
        yield Suggestion((f"data.resolution={native}",), f"what {found.run.model.base} was made for{but}")
        return
    if enlarged > MOST_ENLARGED and can < data.resolution and not found.assumed:
        yield Suggestion(
            (f"data.resolution={can}",),
            f"{100 * enlarged:.0f} % of the pictures are smaller than {data.resolution} and would be enlarged, which is learned too; or take"
            " them out",
        )


def about_buckets(found: Inspection, multiple: int | None) -> Iterator[Suggestion]:
    if found.run.data.buckets:
        return
    cut = float(np.median(found.cut_off))
    repeats = [record.repeats for record in found.records]
    try:
        ladder = assign(
            found.sizes, found.run.data.resolution, found.run.training.batch_size, True, multiple, repeats=repeats
        )
    except ConfigError:
        return
    less = float(np.median(share_cut(found.sizes, ladder.targets)))
    if cut >= MUCH_CUT and less < cut / 2:
        yield Suggestion(
            ("data.buckets=true",), f"cuts off {100 * less:.0f} % of the median picture, not {100 * cut:.0f} %"
        )


def about_flips(found: Inspection) -> Iterator[Suggestion]:
    captions = [caption for record in found.records for caption in record.captions]
    sided = sum(bool(SIDED.search(caption)) for caption in captions)
    if found.run.data.flip and sided:
        yield Suggestion(
            ("data.flip=0",),
            f"{of(sided, 'caption')} of {len(captions)} say left, right or text, which mirroring makes wrong",
        )
    elif not found.run.data.flip and not sided and found.num_training < FEW_TO_MIRROR:
        yield Suggestion(
            ("data.flip=0.5", "data.views=4"),
            "mirrors about half of the views, for no caption says left, right or text; not for faces of one person or writing",
        )


def about_steps(found: Inspection) -> Iterator[Suggestion]:
    run = found.run
    if run.training.batch_size > len(found.training) > 0:
        yield Suggestion((f"training.batch_size={len(found.training)}",), "no batch is larger than what is trained on")
    if not run.training.steps or not found.num_training:
        return
    batch = run.training.batch_size * (1 - run.prior.share if run.prior else 1)
    low, high = (rounded(shown / batch) for shown in usual(found.num_training))
    each = [steps * batch / len(found.training) for steps in (low, high)]
    said = f"{low:,} to {high:,} steps of {run.training.batch_size} are usual for {of(found.num_training, 'picture')}"
    said += (
        f" ({few_digits(each[0])} to {few_digits(each[1])} epochs, as DreamBooth and diffusers' LoRA examples have it)"
    )
    chosen = "steps" in run.training.model_fields_set
    if chosen and low <= run.training.steps <= high:
        return
    yield Suggestion(
        (f"training.steps={low}",),
        said
        + (f"; training.steps is {run.training.steps:,}" if chosen else "")
        + ": more while the held-out loss falls",
    )


def usual(pictures: int) -> tuple[int, int]:
    """How many pictures trainings on so many show in all, from few to many."""
    return tuple(min(max(each * pictures, least), most) for each, least, most in (FEWEST_SHOWN, MOST_SHOWN))


def rounded(value: float) -> int:
    """To two digits."""
    return max(1, int(float(f"{value:.2g}")))


def few_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def of(count: int, name: str) -> str:
    return f"{count:,} {name}{'s' * (count != 1)}"

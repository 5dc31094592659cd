"""An inspection on one screen: what was found, what cannot be used and why, what pictures and captions are like, what could be set."""

import shlex
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from t2ilib.data.advice import Suggestion, of
from t2ilib.data.captions.counting import CLIP_TOKENS
from t2ilib.data.inspection import HELD_OUT, Alike, Inspection
from t2ilib.data.manifest import by_kind, within
from t2ilib.data.records import Readable, Told
from t2ilib.text import shown

KINDS = 15
"""Reasons of rejection that are listed, each with one name."""
FEW = 3
"""What is shown of other lists."""
LABEL = 12
LEAST_CUT = 0.005
"""The share of a picture from which on it is worth a word that it is cut off."""
LONGEST_NAME = 32
LONGEST_CAPTION = 60
LONGEST_REASON = 400
Line = tuple[str, str]
"""A word for the margin, and what is said beside it."""


def screen(found: Inspection, suggestions: Sequence[Suggestion], page: Path, width: int = 120) -> str:
    """`page`: the folder with everything that has no place here. Lines have at most `width` characters."""
    blocks = [
        [*totals(found)],
        [*rejected(found, page, width)],
        [*pictures(found), *captions(found), *doubles(found)],
        [*suggested(suggestions)],
        [*stops(found), ("all of it", f"{page / 'index.html'}; every file with its reason: {page / 'manifest.csv'}")],
    ]
    return "\n\n".join("\n".join(laid_out(block, width)) for block in blocks if block)


def laid_out(lines: Sequence[Line], width: int) -> Iterator[str]:
    """A line without a word for the margin is left as it is."""
    for label, text in lines:
        indents = {"initial_indent": f"{label:{LABEL}}", "subsequent_indent": " " * LABEL}
        form = {"break_on_hyphens": False, "break_long_words": False}
        yield from textwrap.wrap(text, width, **indents, **form) if label else [text]


def totals(found: Inspection) -> Iterator[Line]:
    used = len(found.records)
    parts = f"{of(found.num_training, 'picture')} to train on, {found.num_held_out} held out"
    names = [
        shown(record.path.name) for record, part in zip(found.records, found.parts, strict=True) if part == HELD_OUT
    ]
    if 0 < len(names) <= FEW:
        parts += f" ({', '.join(names)})"
    more = [
        f"{len(told):,} {what}"
        for told, what in ((found.rejected, "rejected"), (found.aside, "left aside"), (found.hidden, "hidden"))
        if told
    ]
    yield (
        "found",
        f"{shown(found.root)} ({found.run.data.source}): {', '.join([parts, *more]) if used or more else 'nothing'}",
    )
    if len(found.training) > found.num_training:
        yield "repeats", f"an epoch shows {len(found.training):,} samples, for some pictures are repeated"
    if found.aside:
        yield "left aside", kinds(found, found.aside)
    noted = [(record.path, note) for record, seen in zip(found.records, found.seen, strict=True) for note in seen.notes]
    if noted:
        yield "noted", "used is " + kinds(found, noted)
    if found.run.prior is not None and found.run.prior.path is not None:
        yield "class", f"pictures of the class lie in {found.run.prior.path}, and are not looked at here"


def kinds(found: Inspection, told: Sequence[Told]) -> str:
    listed = [f"{why}: {some(found, paths)}" for why, paths in by_kind(told).items()]
    return "; ".join(listed[:FEW]) + more_than(listed, FEW)


def some(found: Inspection, paths: Sequence[Readable], most: int = 1) -> str:
    names = [name(found, path) for path in paths[:most]]
    return ", ".join(names) + (f" and {len(paths) - most:,} more" if len(paths) > most else "")


def name(found: Inspection, path: Readable) -> str:
    text = within(found.root, path)
    return text if len(text) <= LONGEST_NAME else f"…{text[1 - LONGEST_NAME :]}"


def more_than(listed: Sequence[object], most: int) -> str:
    return f"; and {len(listed) - most:,} more" if len(listed) > most else ""


def rejected(found: Inspection, page: Path, width: int) -> Iterator[Line]:
    """A line a reason."""
    if not found.rejected:
        return
    inside = f"{shown(found.root)}/"
    rows = [
        (f"{len(paths):,}", name(found, paths[0]), why.replace(inside, "") + also(found, paths[1:]))
        for why, paths in by_kind(found.rejected).items()
    ]
    first, second = (max(len(row[column]) for row in rows[:KINDS]) for column in (0, 1))
    yield (
        "rejected",
        f"{len(found.rejected):,} of {len(found.rejected) + len(found.records):,}; how many, such as, why:",
    )
    for count, such, why in rows[:KINDS]:
        yield "", cut(f"  {count:>{first}}  {such:{second}}  {why}", width)
    if len(rows) > KINDS:
        yield "", f"  {len(rows) - KINDS} more reasons in {page / 'manifest.csv'}"


def also(found: Inspection, paths: Sequence[Readable]) -> str:
    return f" (also {', '.join(name(found, path) for path in paths)})" if 0 < len(paths) <= FEW else ""


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def pictures(found: Inspection) -> Iterator[Line]:
    if not found.records:
        return
    sizes, data = found.sizes, found.run.data
    order = np.lexsort((sizes[:, 0], sizes.prod(1)))
    least, median, most = (size_text(sizes[order[at]]) for at in (0, (len(order) - 1) // 2, -1))
    yield "sizes", f"{least} to {most}, the median {median} (width x height)" if least != most else f"all {most}"
    targets = Counter(map(tuple, found.assigned.targets.tolist()))
    chosen = " (assumed: what 9 of 10 pictures can fill; --set data.resolution=... is what a run takes)"
    said = f"{data.resolution} x {data.resolution}{chosen * found.assumed}"
    if data.buckets:
        counts = [f"{size_text(size)}: {count:,}" for size, count in targets.most_common()]
        said = f"of {of(len(counts), 'size')}: {', '.join(counts[:6])}{more_than(counts, 6)}"
        said += f"; {int(found.assigned.moved.sum())} cropped to the next size, for their own fills no batch" * bool(
            found.assigned.moved.any()
        )
    enlarged = np.flatnonzero(found.magnified > 1)
    if len(enlarged):
        worst = enlarged[np.argsort(-found.magnified[enlarged], kind="stable")]
        names = some(found, [found.records[i].path for i in worst])
        are = "is" if len(enlarged) == 1 else "are"
        said += f"; {of(len(enlarged), 'picture')} {are} enlarged, up to {found.magnified.max():.2g} times: {names}"
    else:
        said += "; none is enlarged"
    worst = int(found.cut_off.argmax())
    if found.cut_off[worst] >= LEAST_CUT:
        said += f"; crops cut off {percent(np.median(found.cut_off))} of the median picture, at most"
        said += f" {percent(found.cut_off[worst])}: {name(found, found.records[worst].path)}"
    yield "samples", said


def size_text(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def captions(found: Inspection) -> Iterator[Line]:
    counts = found.captions
    if not counts.captions:
        return
    least, median, most = counts.of_a_picture
    each = f"{least} a picture" if least == most else f"{least} to {most} a picture, the median {median}"
    least, median, most = counts.length
    words = f"{least} to {most} words, the median {median}" if least < most else f"each of {of(most, 'word')}"
    yield "captions", f"{counts.captions:,}, {each}; {words}; {of(counts.num_words, 'different word')}"
    if found.training.edited is not None:
        edits = found.training.edited
        by = f" by the tagger {edits.tagger} {edits.version}" if edits.tagger else ""
        yield (
            "",
            " " * LABEL
            + (
                f"as they are before data.captions, which draws in every step{by}"
                if edits.varies
                else f"as data.captions edits them{by}"
            ),
        )
    if found.cut is not None:
        if found.cut:
            yield (
                "too long",
                f"{of(len(found.cut), 'caption')} of more than {CLIP_TOKENS} tokens, whose ends are dropped: {quoted(found.cut[0])}",
            )
    elif counts.cut or counts.may_be_cut:
        said = f"{of(counts.cut, 'caption')} of more than CLIP's {CLIP_TOKENS} tokens, whose ends are dropped"
        more = f"; {counts.may_be_cut:,} more may be (no tokenizer at hand: a word is one token or more)"
        yield "too long", said + more * bool(counts.may_be_cut)
    if counts.repeated and found.run.data.prompt is None:
        listed = [f"{quoted(text)} ({count:,})" for text, count in counts.repeated[:2]]
        yield (
            "repeated",
            f"{of(counts.num_repeated, 'caption')} of several pictures: {', '.join(listed)}{more_than(range(counts.num_repeated), 2)}",
        )


def quoted(caption: str) -> str:
    text = " ".join(caption.split())
    return f'"{text}"' if len(text) <= LONGEST_CAPTION else f'"{text[: LONGEST_CAPTION - 1].rstrip()}…"'


def doubles(found: Inspection) -> Iterator[Line]:
    """Equal and near pictures, and above all those on both sides."""
    if found.records and not any(one.exact for one in found.alike):
        yield "equal", "no picture comes twice" + ("" if found.alike else ", nor nearly")
    for exact, label, joint in ((True, "equal", " = "), (False, "near", " ~ ")):
        alike = [one for one in found.alike if one.exact == exact]
        if alike:
            count = sum(len(one.numbers) for one in alike)
            listed = "; ".join(joined(found, one, joint) for one in alike[:FEW])
            yield label, f"{count:,} pictures in {of(len(alike), 'group')}: {listed}{more_than(alike, FEW)}"
    for exact, label, joint, so in (
        (
            True,
            "LEAK",
            " = ",
            "so the held-out loss is too good: keep one of each, or hold out others (data.validation_path)",
        ),
        (False, "a leak?", " ~ ", "so the held-out loss may be too good: look at them on the page"),
    ):
        leaks = [one for one in found.alike if one.exact == exact and one.leaks]
        if leaks:
            listed = "; ".join(joined(found, one, joint) for one in leaks[:FEW])
            both = f"{of(len(leaks), 'group')} of them on both sides, trained on and held out"
            yield label, f"{both}, {so}: {listed}{more_than(leaks, FEW)}"


def joined(found: Inspection, alike: Alike, joint: str) -> str:
    names = [name(found, found.records[number].path) for number in alike.numbers[:FEW]]
    return joint.join(names) + f" and {len(alike.numbers) - FEW} more" * (len(alike.numbers) > FEW)


def suggested(suggestions: Sequence[Suggestion]) -> Iterator[Line]:
    for number, suggestion in enumerate(suggestions):
        sets = " ".join(f"--set {shlex.quote(one)}" for one in suggestion.sets)
        yield ("suggested" if not number else " "), f"{sets}: {suggestion.why}" if sets else suggestion.why


def stops(found: Inspection) -> Iterator[Line]:
    for number, why in enumerate(found.stops):
        yield (
            "A run STOPS" if not number else " ",
            cut("; ".join(map(str.strip, shown(why).splitlines())).replace(":; ", ": "), LONGEST_REASON),
        )
    if not found.stops:
        yield "A run", "would begin with these pictures."

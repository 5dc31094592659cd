"""Captions of records edited before a run, and what records and their pictures are known by afterwards."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from t2ilib.data.captions import Captions
from t2ilib.data.pictures import Seen
from t2ilib.data.records import Record, Told
from t2ilib.seeds import numpy_generator_for


def edit_captions(
    records: Sequence[Record], once: Captions, varying: Captions | None
) -> tuple[list[Record | None], list[Told]]:
    """The records with their captions edited, None where nothing is left of any; and those, with what to say of them. What varies is tried
    here, and made in every step."""
    edited, emptied = [], []
    for i, (record, captions) in enumerate(zip(records, once.edit_all(r.captions for r in records), strict=True)):
        left = tuple(filter(None, captions))
        if any(varying.edit(left, numpy_generator_for(0, "edit of captions", i)) if varying else left):
            edited.append(replace(record, caption=left[0], more=left[1:]))
        else:
            edited.append(None)
            emptied.append((record.path, f"data.captions leaves nothing of its caption {record.caption!r}"))
    return edited, emptied


def digest_of(pairs: Iterable[tuple[Record, Seen]]) -> str:
    """SHA-256 of the bytes of pictures, captions and masks, of weights and repeats where they are given, and of pictures that were liked
    less, in order."""
    digest = hashlib.sha256()
    for record, seen in pairs:
        digest.update(b"".join((seen.sha256, *(caption.encode() + b"\0" for caption in record.captions))))
        if seen.mask or (record.weight, record.repeats) != (1.0, 1):
            digest.update(f"{record.weight!r} {record.repeats} ".encode() + seen.mask)
        if seen.rejected:
            digest.update(b"rejected " + seen.rejected.sha256)
    return digest.hexdigest()

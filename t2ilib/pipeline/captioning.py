"""The step `process`: every picture looked at, every caption edited as the run will edit it, and both written down to be read.

Edits are pure functions that training applies again, so what is written here is for people: OUTPUT/<variant>/captions.csv has each caption
before and after. What was seen of pictures is kept for all runs (`data.known`), so that training looks at none again.
"""

import csv
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2ilib.data.captions import Captions
from t2ilib.data.dataset import Dataset, build_datasets, build_edits, hold_out, list_pictures
from t2ilib.data.manifest import examine
from t2ilib.pipeline.job import Job
from t2ilib.text import shown, write_whole

log = logging.getLogger(__name__)

CAPTIONS, SUMMARY = "captions.csv", "captions.json"
COLUMNS = ("part", "picture", "before", "after")
EXAMPLES = 3


def depends(job: Job) -> Any:
    run = job.run
    shapes = None if run.shapes is None else run.shapes.model_dump(mode="json")
    return [run.data.model_dump(mode="json", exclude={"cache", "cache_path", "workers"}), shapes]


def needs(job: Job) -> Iterator[str]:
    data = job.run.data
    edits = ", ".join(
        edit if isinstance(edit, str) else ", ".join(f"{name}: {argument}" for name, argument in edit.items())
        for edit in data.captions
    )
    yield f"captions {f'edited by {edits}' if edits else 'as they are'}, into {job.run.output / CAPTIONS}"
    yield "time: each picture is decoded once, on all cores, but for those that were looked at before"


def do(job: Job) -> Any:
    run, output = job.run, job.run.output
    edits = build_edits(run.data)
    listing, apart = list_pictures(run)
    examined = examine(listing, run.data)
    of_their_own = None if apart is None else examine(apart, run.data)
    split = hold_out(run.data, examined, of_their_own)
    plain = build_datasets(run, examined, of_their_own, split, None)
    edited = build_datasets(run, examined, of_their_own, split, edits)
    output.mkdir(parents=True, exist_ok=True)
    once = (edits.split()[0] if edits else None, edits.split()[0] if edits and run.data.edit_held_out else None)
    rows = [
        row
        for part, dataset, edit in zip(("training", "held out"), plain, once, strict=True)
        for row in compare(part, dataset, edit)
    ]
    write_rows(output / CAPTIONS, rows)
    changed = [(before, after) for _, _, before, after in rows if before != after]
    told = {
        "captions": len(rows),
        "changed": len(changed),
        "to_nothing": sum(not after for _, after in changed),
        "tagger": edits and edits.tagger,
        "version": edits and edits.version,
        "in_every_step": bool(edits and edits.varies),
        "pictures": [len(dataset.own) for dataset in edited],
        "digests": [dataset.digest for dataset in edited],
    }
    write_whole(output / SUMMARY, json.dumps(told, indent=1))
    log.info("  %d captions, %d of them changed, %d to nothing", len(rows), len(changed), told["to_nothing"])
    for before, after in dict.fromkeys(changed[:: max(1, len(changed) // EXAMPLES)][:EXAMPLES]):
        log.info("    %s\n    -> %s", shown(before), shown(after) or "(nothing)")
    return told


def compare(part: str, plain: Dataset, edits: Captions | None) -> Iterator[tuple[str, str, str, str]]:
    """A row for each caption of each picture; one for all of a picture whose captions become fewer. What draws is left out: it draws in every
    step."""
    records = list(dict.fromkeys(plain.records))
    before = [record.captions for record in records]
    for record, texts, after in zip(records, before, edits.edit_all(before) if edits else before, strict=True):
        alike = len(texts) == len(after)
        for one, other in zip(texts, after, strict=True) if alike else [(" / ".join(texts), " / ".join(after))]:
            yield part, shown(record.path.name), one, other


def write_rows(path: Path, rows: list[tuple[str, str, str, str]]) -> None:
    """The whole table or what was there."""
    draft = path.with_name(f".{path.name}.part")
    with draft.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    draft.replace(path)


def made(job: Job) -> bool:
    return (job.run.output / CAPTIONS).is_file()

"""What a streamed run has met, kept in its folder: `stream.jsonl`, a line a block, `manifest.csv`, a row a picture, and its totals.

The lines say where each block lies in the stream and what it was, so that a resumed run goes on there and notices when it has changed.
The first two files only grow; `manifest.json` is written anew with each block. Rows are written before the line that counts them, and rows that no line counts, of a run that was killed in
between, are taken away; so a resumed run's files are those of a straight one. Where a file is gone or another run's, all begins anew,
which costs time alone.
"""

import contextlib
import csv
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from t2ilib.data.manifest import kind_of, write_manifest
from t2ilib.data.records import Cursor

log = logging.getLogger(__name__)

VERSION = 1
NAME, MANIFEST = "stream.jsonl", "manifest.csv"


@dataclass(frozen=True)
class Entry:
    """A block that was met. `size`: its pictures, none where the stream turned out to end before it. `cursor`: the place behind it;
    `last`: the stream ends with it. `used`, `rejected`: pictures up to its end."""

    size: int
    digest: str
    cursor: Cursor | None
    last: bool
    used: int
    rejected: int


class Journal:
    """The files in `folder`. `key`: what a run's stream is known by. `known`: the blocks in them."""

    def __init__(self, folder: Path, key: str):
        self.lines, self.manifest, self.key = folder / NAME, folder / MANIFEST, key
        self.known: list[Entry] = []
        self.ends = [0, 0]
        self.parts, self.reasons, self.kinds = Counter(), Counter(), {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            self.look()

    def look(self) -> None:
        """Takes what holds together."""
        data, rows = self.lines.read_bytes(), self.manifest.stat().st_size
        head, *lines = data.splitlines(keepends=True)
        if json.loads(head) != self.head:
            return
        end = len(head)
        for line in lines:
            told = json.loads(line)
            if not line.endswith(b"\n") or told.pop("manifest") > rows:
                return
            self.known.append(Entry(**told))
            end += len(line)
            self.ends = [end, json.loads(line)["manifest"]]

    @property
    def head(self) -> dict:
        return {"t2ilib": VERSION, "stream": self.key}

    def forget(self) -> None:
        self.known, self.ends = [], [0, 0]

    def begin(self, rows: Iterable[tuple], summary: dict[str, Any]) -> None:
        """Makes the files what is known. `rows`: what the manifest begins with; `summary`: what its totals are a part of."""
        if not self.known:
            write_manifest(self.manifest, rows)
            self.lines.write_text(json.dumps(self.head) + "\n")
        else:
            for path, end in zip((self.lines, self.manifest), self.ends, strict=True):
                os.truncate(path, end)
        self.summary = summary
        with self.manifest.open(newline="", encoding="utf-8") as file:
            self.count(itertools.islice(csv.reader(file), 1, None))
        self.write_totals()

    def count(self, rows: Iterable[Sequence[str]]) -> None:
        for part, _, reason, *_ in rows:
            self.parts[part] += 1
            if part == "rejected":
                kind, short = kind_of(reason)
                self.reasons[self.kinds.setdefault(kind, short)] += 1

    def write_totals(self) -> None:
        """Totals of what was met, in place of those of the first block; what is said of captions is of that one."""
        first = self.summary["pictures"]
        pictures = {name: self.parts[name.replace("_", " ")] for name in first}
        last = self.known[-1] if self.known else None
        told = self.summary | {
            "pictures": pictures,
            "samples_of_an_epoch": pictures["training"] if last and last.last else None,
            "rejected": dict(self.reasons.most_common()),
            "captions": self.summary["captions"] | {"of_the_first_pictures": first["training"] + first["held_out"]},
            "stream": {"blocks": len([entry for entry in self.known if entry.size]), "ended": bool(last and last.last)},
        }
        draft = self.manifest.with_suffix(".json.part")
        draft.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(self.manifest.with_suffix(".json"))

    def add(self, entry: Entry, rows: Sequence[tuple]) -> None:
        with self.manifest.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        told = asdict(entry) | {"manifest": self.manifest.stat().st_size}
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")
        self.known.append(entry)
        self.count(rows)
        self.write_totals()

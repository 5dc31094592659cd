"""A run's stream opened: what cannot be streamed is refused, its first block read, and from it, or from a stream of their own, the
pictures that are held out.

Of a part or path of their own they are its first `evaluation.validation_pictures`. Else they are those of the first block that their names
hold out, as in a folder, and the same pictures are left out of training wherever they come again.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

from t2ilib.config import ConfigError, DataConfig, RunConfig
from t2ilib.config.mistakes import check_choice
from t2ilib.data.blocks import Reading, Totals
from t2ilib.data.captions import Captions
from t2ilib.data.journal import Journal
from t2ilib.data.manifest import Examined, held_out_section
from t2ilib.data.records import Stream
from t2ilib.data.sources import huggingface_stream, webdataset_stream
from t2ilib.data.streams import Streamed

log = logging.getLogger(__name__)

STREAMS: dict[str, Callable[[DataConfig], Stream]] = {
    "huggingface": huggingface_stream.open_stream,
    "webdataset": webdataset_stream.ShardStream,
}
"""`data.source` -> what opens it as a stream."""
BLOCK = 1024
"""Pictures in a block: an order over them is enough of a shuffle where a stream is not sorted, and they take 1 GB where each has 1 MB."""
NOT_WHAT_IS_READ = ("cache", "cache_path", "workers", "on_error", "max_rejected")


class Column(Sequence):
    """The records of a stream, or what was seen of them, by position. Its length, and what it iterates over, is the first block."""

    def __init__(self, streamed: Streamed, which: int):
        self.streamed, self.which = streamed, which

    def __len__(self) -> int:
        return self.streamed.num_first

    def __getitem__(self, position: int | slice) -> Any:
        if isinstance(position, slice):
            return tuple(self[i] for i in range(len(self))[position])
        return self.streamed.pair(position)[self.which]

    def __iter__(self) -> Iterator[Any]:
        return (self[position] for position in range(len(self)))


def require_streamable(run: RunConfig) -> None:
    """Raises ConfigError for what needs all pictures at once, with what to do."""
    data = run.data
    check_choice(data.source, STREAMS, "data.streaming is for data.source:")
    shards = (
        "`t2ilib data shard` writes any source as shards, which are read in any order: leave data.streaming out then"
    )
    if data.buckets:
        raise ConfigError(
            f"data.buckets needs the size of every picture before the first step, which a stream does not tell: {shards}"
        )
    if data.repeat_column is not None:
        raise ConfigError(f"data.repeat_column: a pass of a stream shows each picture once. {shards}")
    if run.prior is not None:
        raise ConfigError(f"the prior section needs a number of pictures, which a stream has not. {shards}")
    if run.trains in ("vae", "clip"):
        raise ConfigError(f"data.streaming: what trains {run.trains} holds all pictures in memory: set it to false")


def open_streamed(run: RunConfig, edits: Captions | None, size: int | None = None) -> tuple[Streamed, Examined]:
    """The training pictures, their first block read, and the pictures that are held out, as they are. Nothing is written, and nothing
    reads on yet. Raises ConfigError as `require_streamable`, the sources and `Totals.require` do, and OSError."""
    require_streamable(run)
    data, size = run.data, size or BLOCK
    if data.cache != "off":
        log.info("a stream is encoded in the steps, and nothing of it is kept: data.cache %s is off for it", data.cache)
    opener = STREAMS[data.source]
    apart, stream = held_out_section(data), opener(data)
    held_out = Examined({}) if apart is None else first_of(opener(apart), apart, run.evaluation.validation_pictures)
    reading = Reading(stream, None, data, edits)
    with closing(reading):
        if apart is None:
            held_out = Examined(dict(reading.split(size, data.validation_share)))
        first = reading.block(size, Totals())
    if not len(first):
        raise ConfigError(f"{stream.folder}: of its pictures none is left to train on")
    streamed = Streamed(reading, first, size, Journal(run.output, key_of(data, size)))
    return streamed, held_out


def first_of(stream: Stream, config: DataConfig, most: int) -> Examined:
    """The first pictures of a stream that can be used."""
    with closing(Reading(stream, None, config)) as reading:
        block = reading.block(most, Totals())
    return Examined(dict(zip(block.records, block.seen, strict=True)), block.rejected, block.aside, block.hidden)


def key_of(data: DataConfig, size: int) -> str:
    """What decides a stream's blocks, but for its contents."""
    said = [size, data.model_dump(mode="json", exclude=set(NOT_WHAT_IS_READ))]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

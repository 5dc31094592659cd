"""`t2ilib data captions`: what caption transforms do to lines of text, so that it is seen before a run."""

import itertools
import logging
import os
import sys
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Annotated

import typer

from t2ilib.cli.errors import readable_errors

if TYPE_CHECKING:
    from t2ilib.data.captions import Captions

log = logging.getLogger(__name__)
AT_ONCE = 1000
"""Lines that are read before any is written; at a terminal it is one."""
PIPE_CLOSED = 128 + 13  # what a shell shows for a program that SIGPIPE ended


def data_captions(
    transforms: Annotated[
        list[str],
        typer.Argument(
            help='In order, such as drop_adverbs "template=a photo of {caption}" trigger=sks; a wrong name answers with the right ones.'
        ),
    ],
    tagger: Annotated[
        str, typer.Option(help="Who tells parts of speech: pattern, nltk, spacy or spacy=MODEL.")
    ] = "pattern",
    seed: Annotated[int, typer.Option(help="Of what draws, such as shuffle_tags.")] = 0,
) -> None:
    """Transform captions, a line each, from standard input to standard output."""
    with readable_errors():
        from t2ilib.data.captions import build_captions

        captions = build_captions(transforms, tagger)
        if captions.tagger:
            log.info("tagger: %s (%s)", captions.tagger, captions.version)
        lines = changed = emptied = 0
        try:
            for before, after in transformed(captions, sys.stdin.buffer, 1 if sys.stdin.isatty() else AT_ONCE, seed):
                sys.stdout.buffer.write(after.encode() + b"\n")
                lines, changed = lines + 1, changed + (before != after)
                emptied += bool(before) and not after
            sys.stdout.buffer.flush()
        except BrokenPipeError:  # who reads has read enough; and nothing is left to be flushed at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(PIPE_CLOSED) from None
        log.info("%d lines, %d changed, %d of them to nothing", lines, changed, emptied)


def transformed(captions: "Captions", file: IO[bytes], at_once: int, seed: int) -> Iterator[tuple[str, str]]:
    """Each line of a file and what becomes of it; raises ConfigError for one that is not UTF-8."""
    from t2ilib.seeds import numpy_generator_for

    numbered = enumerate(file, 1)
    while chunk := [(number, decoded(line, number)) for number, line in itertools.islice(numbered, at_once)]:
        if captions.varies:
            edited = [captions.edit((text,), numpy_generator_for(seed, "captions", number)) for number, text in chunk]
        else:
            edited = captions.edit_all([(text,) for _, text in chunk])
        for (_, text), (result,) in zip(chunk, edited, strict=True):
            yield text, " ".join(result.split("\n"))


def decoded(line: bytes, number: int) -> str:
    from t2ilib.config import ConfigError
    from t2ilib.text import REMEDY, likely

    data = line.removesuffix(b"\n").removesuffix(b"\r")
    try:
        text = data.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        said = f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8. {likely(data, error.start)}"
        raise ConfigError(f"line {number} of standard input: {said}") from None
    if "\0" in text:
        raise ConfigError(f"line {number} of standard input holds a zero byte, so it is no text: {REMEDY}")
    return text

"""A blind vote as one page: two variants' pictures side by side, names hidden, votes saved as the JSON that `drawing.voting` reads.

The page asks nothing of the network (its own policy forbids it) and needs no other file. What it hides: while votes are open no name is
shown, pictures stand by side alone and say nothing of how they were drawn, and the names, the settings and which side is whose lie apart,
scrambled, so that looking at the page's source tells nothing by accident. What it does not hide: whoever wants to know can unscramble them,
for the page itself must do so at its end; and whoever has t2ilib and the ballot can compute the sides. So it keeps honest voters blind, and
is no lock. The tally, with Wilson's interval, is shown once the votes are closed; who has seen it votes no more in that browser.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from t2ilib.drawing.voting import KIND, VERSION, Ballot
from t2ilib.report.embedding import picture_uri
from t2ilib.seeds import seed_for

TEMPLATE = "ballot.html"
SIDE = 640
"""Pixels of a picture's longer side, at most: people judge these."""


def ballot_page(ballot: Ballot, files: Sequence[tuple[Path, Path]], study: str) -> str:
    """The page. `files`: of every pair of `ballot.pairs()` the left and the right picture; `study`: the study file, as the page's last
    sentence names it."""
    digest = ballot_digest(ballot)
    pairs = [
        {"prompt": pair.prompt, "left": picture_uri(left, SIDE), "right": picture_uri(right, SIDE)}
        for pair, (left, right) in zip(ballot.pairs(), files, strict=True)
    ]
    hidden = {
        "version": VERSION,
        "kind": KIND,
        "study": study,
        "names": list(ballot.names),
        "seed": str(ballot.seed),  # as text: JavaScript's numbers are exact up to 2^53 only
        "ballot": json.dumps(ballot.model_dump(mode="json"), ensure_ascii=False),
        "pairs": [{"pair": pair.number, "first": pair.first, "left": pair.left} for pair in ballot.pairs()],
    }
    key = seed_for(ballot.seed, "seal a ballot", digest) % (2**32 - 1) + 1
    parts = {
        "/*SHOWN*/": json.dumps({"digest": digest, "pairs": pairs}, ensure_ascii=False).replace("<", "\\u003c"),
        "/*KEY*/": str(key),
        "/*SEALED*/": base64.b64encode(scramble(json.dumps(hidden, ensure_ascii=False).encode(), key)).decode(),
    }
    page = resources.files("t2ilib.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    for place, text in parts.items():
        page = page.replace(place, text if place == "/*SHOWN*/" else escape(text), 1)
    return page


def ballot_digest(ballot: Ballot) -> str:
    """What a ballot is known by, and its files are called."""
    return hashlib.sha256(ballot.model_dump_json().encode()).hexdigest()[:10]


def scramble(content: bytes, key: int) -> bytes:
    """XOR with the low bytes of xorshift32 (Marsaglia 2003, J. Stat. Softw. 8, 14) from `key`, 1 to 2^32 - 1; twice gives the content."""
    word, scrambled = key, bytearray(len(content))
    for place, byte in enumerate(content):
        word ^= word << 13 & 0xFFFFFFFF
        word ^= word >> 17
        word ^= word << 5 & 0xFFFFFFFF
        scrambled[place] = byte ^ word & 0xFF
    return bytes(scrambled)

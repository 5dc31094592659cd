"""Which pictures are the same, or nearly: what comes twice is learned twice, and what is held out must not have been trained on.

Two pictures are equal where their files' bytes are. They are near where at most 4 of the 64 bits of their perceptual hashes (`imagehash.phash`,
the signs of low frequencies of the grey picture) differ, and no mean colour of a 16 x 16 grid by more than 40 of 255. Three photographs and what
was made of them differ by so much (bits; colour): a half or a third of the size 2; 36, JPEG of quality 30 0; 7, blurred 0; 7, 1 % cut off at each
side 4; 41, a tenth brighter 4; 23, turned by a degree 8; 49, so that most are found up to here. The hash alone sees no colours and nothing small: of
1,000 pictures of the drawn world it calls 1,082 pairs near, which differ in what is drawn; with the grid it is 3.

Mirrored pictures are not near.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

THUMBNAIL = 64
"""Pixels of the longer side of what is compared. The hash looks at 32 x 32."""
MOST_BITS = 4
MOST_COLOUR = 40
GRID = 16


@dataclass(frozen=True, slots=True)
class Likeness:
    """`bits`: (64,) bool. `colours`: (768,) uint8, of a 16 x 16 grid."""

    bits: np.ndarray
    colours: np.ndarray


def likeness(picture: Image.Image) -> Likeness:
    """Of a picture in RGB, or of its thumbnail."""
    import imagehash

    grid = picture.resize((GRID, GRID), Image.Resampling.BOX)
    return Likeness(imagehash.phash(picture).hash.ravel(), np.asarray(grid).ravel())


def equal(keys: Sequence[Hashable]) -> list[list[int]]:
    """The numbers of those that are equal, two or more, in order."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        found[key].append(number)
    return [numbers for numbers in found.values() if len(numbers) > 1]


def near(pictures: Sequence[Likeness]) -> list[tuple[int, int]]:
    """Pairs of numbers, the lower first, in order.

    Hashes that differ in at most 4 bits are equal in one of 5 parts, so only pictures with an equal part are compared: of 118,000 a few
    seconds' work.
    """
    if len(pictures) < 2:
        return []
    bits = np.stack([picture.bits for picture in pictures])
    colours = np.stack([picture.colours for picture in pictures])
    found = set()
    for part in np.array_split(np.arange(bits.shape[1]), MOST_BITS + 1):
        keys = bits[:, part] @ (1 << np.arange(len(part)))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        ahead = 1
        at = np.flatnonzero(keys[:-1] == keys[1:])
        while len(at):  # each with the next of the same key, then with the one after it, ...
            one, other = order[at], order[at + ahead]
            close = (bits[one] != bits[other]).sum(1) <= MOST_BITS
            one, other = one[close], other[close]
            apart = np.abs(colours[one].astype(np.int16) - colours[other]).max(1)
            found |= {(int(a), int(b)) for a, b in np.sort(np.stack([one, other], 1)[apart <= MOST_COLOUR])}
            ahead += 1
            at = at[at + ahead < len(keys)]
            at = at[keys[at] == keys[at + ahead]]
    return sorted(found)


def groups(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Numbers that pairs join, each group in order."""
    group_of: dict[int, list[int]] = {}
    for pair in pairs:
        joined = sorted({number for one in pair for number in group_of.get(one, [one])})
        group_of |= dict.fromkeys(joined, joined)
    return [group for number, group in sorted(group_of.items()) if number == group[0]]

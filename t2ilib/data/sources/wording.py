"""What makes a caption unfit, whichever source it comes from."""

import re
from collections.abc import Sequence

from t2ilib.text import shown

HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")


def unfit(captions: Sequence[str]) -> str | None:
    """What to say of a picture with these captions, of which none may be empty nor have half a character."""
    for number, caption in enumerate(captions, 1):
        which = f"caption {number} of {len(captions)}" if len(captions) > 1 else ""
        if not caption:
            return f"its {which} is empty: write it, or take it out" if which else "has an empty caption: write one"
        if half := HALF_A_CHARACTER.search(caption):
            what = f"half a character ({shown(half[0])}) at position {half.start()}"
            return f"its {which or 'caption'} has {what}: write the whole one, or leave it out"
    return None


def one_line(text: str) -> str:
    """The same words with single spaces between them."""
    return " ".join(text.split())

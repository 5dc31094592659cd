"""A stream's pictures as the loop takes them: which positions a step sees, and how pictures become samples.

Nothing of a stream is encoded ahead or kept: its pictures and captions are encoded in the steps, as with `data.cache: off`.

Of several processes each reads the blocks of the run's steps, since which pictures of a block can be used, and so what a position is, is known by
reading it; for the steps it decodes and encodes its own share alone.
"""

import sys
from typing import Any

from t2ilib.data.decoding import Waiting
from t2ilib.data.samples import Samples
from t2ilib.data.streams import Streamed
from t2ilib.data.views import Size


class StepOrder:
    """`order(step)`: the positions of a step's samples, which are then at hand until it is asked of another. `steps`: of the run, behind
    which nothing is read."""

    def __init__(self, streamed: Streamed, seed: int, batch_size: int, steps: int):
        self.streamed, self.seed, self.batch_size, self.steps = streamed, seed, batch_size, steps
        self.step, self.ids = -1, []
        self.waiting = Waiting()

    def __call__(self, step: int) -> list[int]:
        if step != self.step:
            places = range(step * self.batch_size, (step + 1) * self.batch_size)
            with self.waiting:
                self.ids = [self.streamed.position(self.seed, place) for place in places]
                self.streamed.arrive(self.ids, self.steps * self.batch_size)
            self.step = step
        return self.ids


class StreamedSamples(Samples):
    """Samples of a stream: squares, of as many pictures as come, all of them one's own."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.num_own = sys.maxsize
        told = self.config.source == "huggingface" and self.config.mask_column is None
        self.has_masks = self.has_masks or not told  # of which the next block may have the first

    def size(self, i: int) -> Size:
        return (self.config.resolution, self.config.resolution)

"""How the pictures of a data set become samples: the size of each, and which of its views and captions a step sees.

A picture has a number of views (`data.views`), each a crop, perhaps mirrored, with tags in some order: a function of the picture's bytes
and the view's number, whatever the run's seed, so that what is encoded once serves all runs. Which view and which caption a
step sees is a function of the run's seed, the step and the sample.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from t2ilib.config import DataConfig
from t2ilib.data.dataset import Dataset
from t2ilib.data.pairs import have_pairs
from t2ilib.data.pictures import Picture, Seen, load_view
from t2ilib.data.records import Readable
from t2ilib.data.store import content_key
from t2ilib.data.store.tensorfile import KEY_BYTES
from t2ilib.data.views import Size, View, assign, view_of
from t2ilib.seeds import numpy_generator_for, seed_for

log = logging.getLogger(__name__)


class Samples:
    """The samples of a data set. `targets`: (N, 2), height and width of each. `multiple`: what both are multiples of.

    `held_out`: pictures that are measured, always in the same way: the middle of each, unmirrored, with its first caption. Where they are pairs
    (`has_pairs`), `rejected` means the picture that was liked less: it has the size, the flip and, as a share of what there is to choose,
    the place of the other's crop.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        seed: int,
        batch_size: int = 1,
        multiple: int = 8,
        held_out: bool = False,
    ):
        self.dataset, self.seed, self.held_out = dataset, seed, held_out
        self.config = config.model_copy(update={"crop": "center", "flip": 0.0, "views": 1}) if held_out else config
        sizes = np.array([(seen.height, seen.width) for seen in dataset.looked_at()], dtype=np.int64).reshape(-1, 2)
        self.num_own = len(dataset) - dataset.num_class
        assigned = [  # each part fills batches of its own
            assign(part, config.resolution, batch_size, config.buckets, multiple)
            for part in (sizes[: self.num_own], sizes[self.num_own :])
        ]
        self.targets = np.concatenate([part.targets for part in assigned])
        self.num_moved = sum(int(part.moved.sum()) for part in assigned)
        self.has_masks = config.alpha == "mask" or any(record.mask is not None for record in dataset.records)
        self.has_pairs = have_pairs(dataset.records)
        self.by_chance = self.config.crop == "random" or 0 < self.config.flip < 1

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def buckets(self) -> np.ndarray | None:
        """The bucket of each sample (N,); None where all have one size."""
        sizes, numbers = np.unique(self.targets, axis=0, return_inverse=True)
        return None if len(sizes) == 1 else numbers.reshape(-1)

    def of_one_size(self) -> list[list[int]]:
        """The samples, those of each size together."""
        buckets = self.buckets
        if buckets is None:
            return [list(range(len(self)))]
        return [np.flatnonzero(buckets == bucket).tolist() for bucket in range(buckets.max() + 1)]

    def tell(self) -> None:
        """Logs how many samples each size has, where there are several, and what was cropped more than it would be."""
        counts = Counter(map(tuple, self.targets.tolist()))
        if len(counts) > 1:
            told = ", ".join(f"{w}x{h}: {n}" for (h, w), n in sorted(counts.items(), key=lambda item: -item[1]))
            log.info("%d sizes (width x height): %s", len(counts), told)
        if self.num_moved:
            log.info(
                "%d picture(s) are cropped to the next size, for of their own there is no full batch", self.num_moved
            )
        if self.config.views == 1 and (self.by_chance or self.dataset.edits is not None):
            log.warning(
                "each picture has one view, so that what chance decides of it (crop, flip, order of tags) is the same at every step:"
                " set data.views to how many it shall have, such as 8"
            )

    def number(self, i: int, step: int) -> int:
        """Which view of sample `i` a step sees."""
        views = self.config.views
        return 0 if views == 1 else seed_for(self.seed, "view", step, i) % views

    def size(self, i: int) -> Size:
        return tuple(self.targets[i].tolist())

    def picture(self, i: int, rejected: bool = False) -> tuple[Readable, Seen]:
        record, seen = self.dataset.records[i], self.dataset.looked_at()[i]
        return (record.rejected, seen.rejected) if rejected else (record.path, seen)

    def view(self, i: int, number: int, rejected: bool = False) -> View:
        (_, seen), config = self.picture(i, rejected), self.config
        size, target = (seen.height, seen.width), self.size(i)
        address = ("view of a picture", self.dataset.looked_at()[i].sha256.hex(), number)
        return view_of(
            size, target, config.crop, config.flip, numpy_generator_for(0, *address) if self.by_chance else None
        )

    def load(self, i: int, number: int, rejected: bool = False) -> Picture:
        """Decodes the picture, and cuts the view out of it. Raises PictureError, also for a file that is not what it was."""
        (path, seen), mask = self.picture(i, rejected), self.dataset.records[i].mask
        view = self.view(i, number, rejected)
        return load_view(path, view, self.config.ground, self.config.alpha, mask, seen.sha256)

    def micro_conditioning(self, i: int, number: int, rejected: bool = False) -> tuple[Size, Size, Size]:
        """SDXL's original size, crop and target size of a view."""
        (_, seen), view = self.picture(i, rejected), self.view(i, number, rejected)
        return (seen.height, seen.width), view.crop, view.size

    def key(self, i: int, number: int, rejected: bool = False) -> bytes:
        """What a view is known by on disk: the same for the same pixels and mask, whatever file, run or side of a pair they belong to."""
        (_, seen), view = self.picture(i, rejected), self.view(i, number, rejected)
        shape = (*view.scaled, view.top, view.left, *view.size, int(view.flipped))
        mask = (seen.mask, self.config.alpha) if self.has_masks else ()
        return content_key("view", seen.sha256, shape, self.config.ground, mask)

    def keys(self) -> np.ndarray:
        """Those of every view of every sample (N * views,), S16, in order; of pairs behind them those of what was liked less, as many."""
        views, sides = range(self.config.views), (False, True) if self.has_pairs else (False,)
        keys = (self.key(i, number, side) for side in sides for i in range(len(self)) for number in views)
        return np.fromiter(keys, f"S{KEY_BYTES}", len(sides) * len(self) * len(views))

    def caption(self, i: int, number: int, step: int) -> str:
        """The caption of sample `i` that a step sees with view `number`."""
        captions = self.edited(i, number)
        if self.held_out or len(captions) == 1:
            return captions[0]
        return captions[seed_for(self.seed, "caption", step, i) % len(captions)]

    def edited(self, i: int, number: int) -> tuple[str, ...]:
        """The captions of a picture as its view `number` has them. Those of the class stay as they are: they say what the base knows
        them by, and an edit such as a trigger word would teach it otherwise."""
        edits, record = self.dataset.edits, self.dataset.records[i]
        if edits is None or i >= self.num_own:
            return record.captions
        sha256 = self.dataset.looked_at()[i].sha256.hex()
        edited = edits.edit(record.captions, numpy_generator_for(0, "edit of captions", sha256, number))
        return tuple(caption for caption in edited if caption) or record.captions[:1]

    def all_captions(self) -> Iterator[str]:
        """Every caption that any step may see."""
        for i in range(len(self)):
            for number in range(self.config.views if self.dataset.edits is not None else 1):
                captions = self.edited(i, number)
                yield from captions[:1] if self.held_out else captions

    def weights(self, ids: Sequence[int], of_parts: tuple[float, float] = (1.0, 1.0)) -> list[float]:
        """Of these samples' losses. `of_parts`: what one's own pictures and those of the class weigh, beside the weight that each has."""
        return [self.dataset.records[i].weight * of_parts[i >= self.num_own] for i in ids]

"""Encoded data out of tensors that a test gives, in place of pictures."""

from types import SimpleNamespace

import torch

from t2ilib.data.cache import EncodedDataset


class GivenSamples:
    """Samples of one caption and one view each, all of one size."""

    buckets, dataset, held_out = None, SimpleNamespace(num_class=0), True

    def __init__(self, captions, side=64):
        self.captions, self.targets = captions, [(side, side)] * len(captions)

    def __len__(self):
        return len(self.captions)

    def of_one_size(self):
        return [list(range(len(self)))]

    def number(self, i, step):
        return 0

    def caption(self, i, number, step):
        return self.captions[i]

    def micro_conditioning(self, i, number):
        return self.targets[i], (0, 0), self.targets[i]

    def weights(self, ids, of_parts=(1.0, 1.0)):
        return [1.0] * len(ids)


def given(captions, latents, text=None):
    """`latents`: (N, C, h, w); `text`: caption -> conditioning of one caption, by name, or None."""

    def of_captions(asked):
        return {name: torch.stack([text[caption][name] for caption in asked]) for name in text[asked[0]]}

    def of_views(views):
        return {"latents": latents[[i for i, _ in views]]}

    return EncodedDataset(GivenSamples(captions), of_views, None if text is None else of_captions)

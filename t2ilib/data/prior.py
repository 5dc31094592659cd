"""Prior preservation, as far as no model is needed: pictures of the class that the user has, the prompts that the base is to draw
otherwise, and how much both count. So what is wrong with them is told before a base is loaded.

The loss is DreamBooth's (arXiv 2208.12242, eq. 2): the mean over one's own pictures, and `prior.weight` times the mean over those of the
class. `prior.share` says how many of the samples are of the class, so how exactly each mean is known, and what it costs in time; the balance of the
two is the weight's alone. In diffusers' DreamBooth scripts `--prior_loss_weight` is this weight, and half of a batch is of the class: `share:
0.5`, and twice their `--train_batch_size`. Kohya's scripts multiply the loss of every regularisation picture by theirs and take the mean
of all: the same at `share: 0.5`, but for a half before the whole, which Adam does not see. At another share every picture counts the
same where the weight is share / (1 - share).

Edits of captions are not made on those of the class. A caption is dropped there as elsewhere (`objective.caption_dropout`), so that what the
base draws without one is kept too.
"""

import logging
import re
from typing import TYPE_CHECKING

from t2ilib.config import ConfigError, DataConfig, PriorConfig, RunConfig
from t2ilib.data.dataset import Dataset, build_dataset
from t2ilib.data.loader import Order
from t2ilib.data.manifest import counted, examine
from t2ilib.data.sources.folder import read_folder
from t2ilib.seeds import numpy_generator_for
from t2ilib.text import shown

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

log = logging.getLogger(__name__)

CHOICE = re.compile(r"\{([^{}]*)\}")
DRAWING = (
    "evaluation.num_inference_steps",
    "evaluation.guidance_scale",
    "evaluation.negative_prompt",
    "evaluation.vae_tiling",
)
"""Fields that only judge a run otherwise, and by which the base draws pictures of the class."""


def given_pictures(run: RunConfig) -> Dataset | None:
    """The pictures in `prior.path`, None without one. Raises ConfigError for a folder that cannot be used, as for `data.path`, and for
    prompts that `expand` does not understand."""
    if run.prior is None:
        return None
    if run.prior.path is None:
        expand(run.prior.prompts, len(run.prior.prompts))
        return None
    path, data = run.prior.path, run.data
    if not path.is_dir():
        raise ConfigError(f"prior.path {shown(path)} is not a folder")
    prompt = run.prior.prompts[0] if run.prior.prompts else None
    told = {"ground": data.ground, "on_error": data.on_error, "max_rejected": data.max_rejected}
    config = DataConfig(path=path, prompt=prompt, **told)
    try:
        examined = examine(read_folder(path, config), config)
    except ConfigError as error:
        raise ConfigError(f"prior.path: {error}") from None
    return build_dataset(shown(path.name), examined, examined.pictures, config, rest=True)


def num_class(run: RunConfig, given: Dataset | None) -> int:
    """How many pictures of the class there are, or will be."""
    if run.prior is None:
        return 0
    return run.prior.num_pictures if given is None else len(given)


def build_order(run: RunConfig, num_own: int, num_class: int, buckets: "np.ndarray | None" = None) -> Order:
    """Which samples each step sees. `buckets` (N,): of all samples, those of the class last. Raises ConfigError as `Order` does."""
    share = run.prior.share if run.prior else 0.0
    return Order(run.seed, run.training.batch_size, num_own + num_class, buckets, num_class, share)


def joined(run: RunConfig, training: Dataset, held_out: Dataset, of_class: Dataset) -> Dataset:
    """What is trained on: one's own pictures, then those of the class. Warns of pictures that are both."""
    log.info(
        "class: %s beside %d of one's own, %g of what steps see; their mean loss counts %g times",
        counted(of_class, "picture"),
        len(training),
        run.prior.share,
        run.prior.weight,
    )
    known = {seen.sha256 for seen in of_class.looked_at()}
    for part, what in ((training, "training"), (held_out, "held-out")):
        both = [
            shown(record.path.name)
            for record, seen in zip(part.records, part.looked_at(), strict=True)
            if seen.sha256 in known
        ]
        if both:
            log.warning(
                "class: %s also among the %s pictures (%s, ...): what is taught as one's own should not be kept as the class, nor measured",
                f"{counted(both, 'picture')} {'is' if len(both) == 1 else 'are'}",
                what,
                both[0],
            )
    return training.joined(of_class)


def loss_weights(prior: PriorConfig) -> tuple[float, float]:
    """Of the loss of each of one's own pictures, and of the class, with which the mean over a batch, or over steps, is that of one's own
    plus `prior.weight` times that of the class."""
    return 1 / (1 - prior.share), prior.weight / prior.share


def loss_terms(prior: PriorConfig, losses: "Tensor", of_class: "Tensor") -> dict[str, float]:
    """The two terms of the loss, which add up to it where both are in a step. `losses` (B,): weighted, as they are trained on;
    `of_class` (B,) bool: whose they are."""
    parts = {"loss/own": (1 - prior.share, losses[~of_class]), "loss/class": (prior.share, losses[of_class])}
    return {name: share * float(part.mean()) for name, (share, part) in parts.items() if len(part)}


def expand(prompts: tuple[str, ...], count: int) -> list[str]:
    """`count` prompts, all of `prompts` in turn, in each of which `{red|green}` has become one of these words. Braces within braces are
    chosen from first. The n-th is the same whatever the count.

    Raises ConfigError for a brace without its partner, and for a prompt that may come out empty."""
    expanded = []
    for number in range(count):
        rng = numpy_generator_for(0, "class prompts", number)
        pattern = text = prompts[number % len(prompts)]
        while found := CHOICE.search(text):
            options = found[1].split("|")
            text = text[: found.start()] + options[int(rng.integers(len(options)))] + text[found.end() :]
        if "{" in text or "}" in text:
            raise ConfigError(f"prior.prompts: {pattern!r} has a brace without its partner")
        if not text.strip():
            raise ConfigError(f"prior.prompts: {pattern!r} may say nothing: the base is to draw something")
        expanded.append(" ".join(text.split()))
    return expanded

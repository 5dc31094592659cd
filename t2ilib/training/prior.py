"""Pictures of the class that the base draws, before anything is attached to it: its own pictures, so that the loss on them asks it to stay
as it is (DreamBooth, arXiv 2208.12242, sec. 3.3).

They are kept in the cache folder under what decides them (the base as it is loaded, the prompts, how they are drawn), whatever is trained
and by which seed: the runs of a study share them. A folder of them is an image folder, to be looked at, and to be used elsewhere as
`prior.path`. They are drawn in whole batches, so that a picture does not depend on how many were asked for: who wants more draws the
rest. Where the `objective` section says another prediction or noise schedule than the base's files, the base draws as it says.
"""

import hashlib
import json
import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from t2ilib.cachefolder import cache_folder
from t2ilib.config import DataConfig, RunConfig
from t2ilib.data.cache import text_encoder_of, weights_of
from t2ilib.data.dataset import Dataset, build_dataset
from t2ilib.data.manifest import examine
from t2ilib.data.prior import expand
from t2ilib.data.records import Listing, Record
from t2ilib.data.store import commit_file, locked
from t2ilib.evaluation.sampling import draw
from t2ilib.memory import pictures_at_once, require_disk
from t2ilib.models.components import Components

log = logging.getLogger(__name__)

CLASS_SEED = 1
"""Not that of sample grids: the base should keep more than what it draws there."""
AT_ONCE = 32
SECONDS_BETWEEN_LINES = 30.0


def drawn_pictures(run: RunConfig, components: Components) -> Dataset:
    """The base's own pictures of `run.prior.prompts`; draws those that are not there yet. Waits where another process draws the same.

    The digest is of what decides them: drawn again on another machine they may differ in their last bits, and a run goes on with them.
    """
    key, count = drawn_by(run, components), run.prior.num_pictures
    at_once = pictures_at_once(run.data.resolution, AT_ONCE)
    prompts = expand(run.prior.prompts, -(-count // at_once) * at_once)
    folder = cache_folder() / "class" / key[:16]
    paths = [folder / f"{number:05d}.png" for number in range(len(prompts))]
    folder.mkdir(parents=True, exist_ok=True)
    if not all(path.exists() for path in paths):
        with locked(folder):
            draw_missing(run, components, prompts, paths, at_once)
    records = tuple(map(Record, paths[:count], prompts))
    config = DataConfig(path=folder, max_rejected=0.0)
    examined = examine(Listing(folder, records), config)
    drawn = build_dataset(f"class-{key[:16]}", examined, examined.pictures, config, rest=True)
    return replace(drawn, digest=hashlib.sha256(f"{key} {count}".encode()).hexdigest())


def draw_missing(run: RunConfig, components: Components, prompts: list[str], paths: list[Path], at_once: int) -> None:
    """Draws every batch of which a picture is not there."""
    starts = [
        start for start in range(0, len(paths), at_once) if not all(map(Path.exists, paths[start : start + at_once]))
    ]
    folder, side = paths[0].parent, run.data.resolution
    remedy = "free some, set T2ILIB_CACHE to another disk, or lower prior.num_pictures"
    require_disk(folder, len(starts) * at_once * 3 * side**2, "pictures of the class", remedy)
    if starts:
        log.info("class: the base draws %d pictures into %s", len(starts) * at_once, folder)
    begun = told = time.monotonic()
    for done, start in enumerate(starts, 1):
        part = slice(start, start + at_once)
        pictures = draw(components, prompts[part], run.evaluation, CLASS_SEED, at_once, side, first=start)
        for path, picture in zip(paths[part], pictures, strict=True):
            commit_file(path, partial(picture.save, format="PNG"))
        now = time.monotonic()
        if now - told > SECONDS_BETWEEN_LINES or done == len(starts):
            told = now
            log.info("class: %d of %d drawn in %.0f s", done * at_once, len(starts) * at_once, now - begun)
    lines = [json.dumps({"file_name": path.name, "text": text}) for path, text in zip(paths, prompts, strict=True)]
    commit_file(folder / "metadata.jsonl", lambda stream: stream.write("".join(line + "\n" for line in lines).encode()))


def drawn_by(run: RunConfig, components: Components) -> str:
    """What the base's pictures are known by: SHA-256 of all that decides them, but for the machine."""
    settings, scheduler = run.evaluation, components.scheduler
    told = {
        "base": weights_of({"unet": components.unet, "vae": components.vae}, text_encoder_of(components)),
        "sampler": [type(scheduler).__name__, {n: value for n, value in scheduler.config.items() if n[0] != "_"}],
        "prompts": run.prior.prompts,
        "drawn": [run.data.resolution, settings.num_inference_steps, settings.guidance_scale, settings.vae_tiling],
        "seed": CLASS_SEED,
    } | ({"negative": settings.negative_prompt} if settings.negative_prompt else {})  # else under the key they had
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

"""The shapes world as a source: drawn once into a cache folder, then read like any user's image folder."""

import hashlib
import shutil
import tempfile
from pathlib import Path

from t2ilib.cachefolder import cache_folder
from t2ilib.config import DataConfig, ShapesConfig
from t2ilib.data.records import Listing
from t2ilib.data.sources import folder
from t2ilib.shapes import world

NUM_VALIDATION = 48


def load(config: ShapesConfig, part: str = "final") -> tuple[Listing, Listing]:
    """`config.num_pictures` training pictures of `config.scenes`, and 48 held-out ones of other combinations. `part`: see `data.part`;
    those to search settings on are other combinations again."""
    train = drawn(config, "train", config.num_pictures, part)
    validation = drawn(config, "validation", NUM_VALIDATION, part)
    return folder.read_folder(train, DataConfig()), folder.read_folder(validation, DataConfig())


def drawn(config: ShapesConfig, split: str, count: int, part: str = "final") -> Path:
    """The folder of these pictures, drawn if it is not there; complete or absent, also when several processes draw at once."""
    if part == "tuning":  # also where it is drawn: whether enough is left depends on what else final runs draw
        scenes = world.mixed_tuning_scenes(count, split, config, config.scenes)
    else:
        scenes = world.mixed_scenes(count, split, config.seed, config.scenes)
    version = hashlib.sha256(Path(world.__file__).read_bytes()).hexdigest()[:8]
    of_part = "" if part == "final" else f"{part}-"
    said = "" if config.captioned is None else f"{'-'.join(sorted(config.captioned))}-"
    target = (
        cache_folder()
        / "shapes"
        / f"{'-'.join(config.scenes)}-{of_part}{said}{split}-{count}-jitter{config.jitter:g}-seed{config.seed}-{version}"
    )
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=".drawing-"))
    world.write_folder(draft, scenes, config.seed, len(world.SOLID_PHRASES), config.jitter, config.captioned)
    try:
        draft.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(draft)
    return target

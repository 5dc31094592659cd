"""The shapes world: captioned pictures whose truth is known, drawn from a small grammar.

One object a picture: shape, colour, size, position, background and tilt (a circle has none). Captions come in several
phrasings; three adverbs carry meaning ("very small", "slightly tilted", "strongly tilted"), so taking adverbs out of
captions changes what can be learned. Three concepts stay outside the base world, for fine-tuning to teach: a shape
(heart), a fill (striped, in place of a colour) and a style (blueprint). Each takes the place of something that every caption of the
base world says: a word that is merely added to such a caption is not read by the tiny models, however long they are taught. Because the grammar is known, "did the picture follow its
prompt?" can be measured exactly: `checker` reads a picture back.

Sizes are circumradii in pixels of a 64x64 picture. Leaves out: several objects, textures, perspective.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from t2ilib.config import ConfigError, ShapesConfig, check_choice
from t2ilib.config.data import CAPTIONED
from t2ilib.seeds import numpy_generator_for, seed_for

RESOLUTION = 64
SUPERSAMPLING = 4

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 50),
    "purple": (150, 50, 190),
    "cyan": (60, 200, 220),
}
SIZES = {"very small": 7.0, "small": 10.0, "large": 14.0, "very large": 19.0}
POSITIONS = {
    f"{row} {column}".strip() or "center": (x, y)
    for (row, y), (column, x) in itertools.product(
        (("top", 20.0), ("", 32.0), ("bottom", 44.0)), (("left", 20.0), ("", 32.0), ("right", 44.0))
    )
}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (128, 128, 128), "black": (20, 20, 20)}
TILTS = {"upright": 0.0, "slightly tilted": 20.0, "strongly tilted": 45.0}
BLUEPRINT_PAPER, BLUEPRINT_GRID = (25, 45, 95), (42, 66, 122)
STRIPES, BAND = "yellow", 4
"""The colour that turns with black (on black, white) in what is striped, and the pixels of a band, of which the autoencoder's 8 hold two."""
CONCEPTS = ("heart", "striped", "blueprint")

SOLID_PHRASES = (
    "a {size} {tilt} {fill} {color} {shape}[ at the {position}][ on a {background} background]",
    "a {fill} {color} {shape}[, {size}][, {tilt}][, at the {position}][, {background} background]",
    "[{background} background, ][{position}: ]a {tilt} {size} {fill} {color} {shape}",
    "[on a {background} background ][at the {position} ]there is a {size} {fill} {color} {shape}[, {tilt}]",
)
BLUEPRINT_PHRASES = (
    "a blueprint of a {size} {tilt} {color} {shape}[ at the {position}]",
    "blueprint[, {position}]: a {tilt} {size} {color} {shape}",
    "a {color} {shape}[, {size}][, {tilt}][, at the {position}], drawn as a blueprint",
)
"""What stands in brackets goes with its attribute, where a scene has none or a caption leaves it open."""
IN_BRACKETS = re.compile(r"\[([^][]*\{(\w+)\}[^][]*)\]")


@dataclass(frozen=True)
class Scene:
    """What one picture shows. `background` is "" in a blueprint, whose paper is part of the style; `tilt` is "" for a circle, `color`
    where it is striped."""

    shape: str
    color: str
    size: str
    position: str
    background: str
    tilt: str
    fill: str = "solid"
    style: str = "plain"

    @property
    def concepts(self) -> tuple[str, ...]:
        """The fine-tuning concepts in this scene, () for a scene of the base world."""
        return tuple(name for name in CONCEPTS if name in (self.shape, self.fill, self.style))

    def describe(self) -> dict[str, str]:
        """Attribute -> value, without the attributes this scene does not have."""
        return {name: value for name, value in asdict(self).items() if value}


def left_open(scene: Scene, captioned: Sequence[str] | None) -> Scene:
    """The scene as far as a caption tells it that speaks of the attributes `captioned` (`shapes.captioned`), fill and style: others are ""."""
    if captioned is None:
        return scene
    return replace(scene, **{name: "" for name in CAPTIONED if name not in captioned})


@cache
def all_scenes(concept: str | None = None) -> tuple[Scene, ...]:
    """Every combination of the base world, or of one concept (a heart, a striped base shape, a base shape as blueprint)."""
    if concept not in (None, *CONCEPTS):
        raise ValueError(f"concept {concept!r} is not one of {', '.join(CONCEPTS)}")
    shapes = ("heart",) if concept == "heart" else SHAPES
    backgrounds = ("",) if concept == "blueprint" else tuple(BACKGROUNDS)
    colors = ("",) if concept == "striped" else tuple(COLORS)
    fill = "striped" if concept == "striped" else "solid"
    style = "blueprint" if concept == "blueprint" else "plain"
    return tuple(
        Scene(shape, color, size, position, background, tilt, fill, style)
        for shape, color, size, position, background in itertools.product(shapes, colors, SIZES, POSITIONS, backgrounds)
        for tilt in (("",) if shape == "circle" else TILTS)
    )


@cache
def split_of(scene: Scene) -> str:
    """ "train" (80% of all combinations), "validation" (10%) or "test" (10%), fixed by the combination alone."""
    bucket = seed_for(0, "shapes split", *asdict(scene).values()) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def sample_scenes(count: int, split: str, seed: int, concept: str | None = None) -> list[Scene]:
    """`count` different scenes of a split, in an order given by `seed`; repeats only when the split has fewer."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split {split!r} is not one of train, validation, test")
    pool = [scene for scene in all_scenes(concept) if split_of(scene) == split]
    rng = numpy_generator_for(seed, "shapes scenes", split, concept or "base")
    order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))])
    return [pool[i] for i in order[:count]]


@cache
def tuning_split_of(scene: Scene) -> str:
    """The same for what settings are searched on, which scenes of "train" alone are: 60%, 15% and 25% of them."""
    bucket = seed_for(0, "shapes tuning split", *asdict(scene).values()) % 20
    return "validation" if bucket < 3 else "test" if bucket < 8 else "train"


def tuning_scenes(count: int, split: str, seed: int, taken: int, concept: str | None = None) -> list[Scene]:
    """`count` scenes to search settings on, of none of which a final run knows: from the other end of the order whose first `taken`
    scenes are the final runs' training pictures (`sample_scenes` of "train" with this seed).

    Raises ConfigError where there are not so many.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split {split!r} is not one of train, validation, test")
    pool = [scene for scene in all_scenes(concept) if split_of(scene) == "train"]
    order = numpy_generator_for(seed, "shapes scenes", "train", concept or "base").permutation(len(pool))
    left = [pool[i] for i in order[taken:][::-1]]
    found = [scene for scene in left if tuning_split_of(scene) == split]
    if count > len(found):
        raise ConfigError(
            f"data.part tuning needs {count} scenes of {concept or 'base'} for {split}, and beside the {taken} that final runs are trained"
            f" on the drawn world has {len(found)}: lower shapes.num_pictures or shapes.checked_prompts"
        )
    return found[:count]


def caption(scene: Scene, phrasing: int = 0) -> str:
    """The scene in words. `phrasing` picks the sentence, modulo their number."""
    phrases = BLUEPRINT_PHRASES if scene.style == "blueprint" else SOLID_PHRASES
    words = asdict(scene) | {"fill": scene.fill if scene.fill != "solid" else ""}
    phrase = IN_BRACKETS.sub(lambda part: part[1] if words[part[2]] else "", phrases[phrasing % len(phrases)])
    return " ".join(phrase.format(**words).split()).replace("a upright", "an upright")


def phrasing_of(scene: Scene, text: str) -> int:
    """Which of the base world's phrasings `text` is; raises ValueError where it is not a caption of `scene`."""
    for phrasing in range(len(SOLID_PHRASES)):
        if caption(scene, phrasing) == text:
            return phrasing
    raise ValueError(f"{text!r} is not a caption of {scene.describe()}")


def paraphrase(scene: Scene, text: str, rng: np.random.Generator) -> str:
    """The scene in another phrasing than that of `text`; raises ValueError where that is not a caption of `scene`."""
    return caption(scene, phrasing_of(scene, text) + int(rng.integers(1, len(SOLID_PHRASES))))


def near_misses(scene: Scene, text: str, count: int, rng: np.random.Generator) -> list[str]:
    """`count` captions in the phrasing of `text`, each wrong about this scene in one attribute, attributes in turn.

    Raises ValueError where `text` is not a caption of `scene`.
    """
    phrasing = phrasing_of(scene, text)
    values = {"color": COLORS, "size": SIZES, "position": POSITIONS, "background": BACKGROUNDS, "tilt": TILTS}
    values = {name: tuple(value) for name, value in values.items() if getattr(scene, name)} | {"shape": SHAPES}
    order = rng.permutation(sorted(values)).tolist()
    wrong = []
    for name in (order * count)[:count]:
        changed = {name: rng.choice([value for value in values[name] if value != getattr(scene, name)]).item()}
        if name == "shape":
            changed["tilt"] = "" if changed["shape"] == "circle" else scene.tilt or rng.choice(tuple(TILTS)).item()
        wrong.append(caption(replace(scene, **changed), phrasing))
    return wrong


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie in the shape of circumradius 1 about the origin; y points down, as in a picture."""
    if shape == "circle":
        return x * x + y * y <= 0.85**2
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= np.sqrt(0.5)
    if shape == "triangle":
        return (y <= 0.5) & (np.sqrt(3) * abs(x) <= y + 1.0)
    if shape == "cross":
        short, long = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
        return (short <= 0.3) & (long <= np.sqrt(1 - 0.3**2))
    if shape == "heart":
        return inside_heart(abs(x), y)
    raise ValueError(f"shape {shape!r} is not one of {', '.join((*SHAPES, 'heart'))}")


def inside_heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two lobes, and the lines from a tip that touch them. `x`: distance from the axis."""
    (across, down), lobe, tip = (0.46, -0.36), 0.5, 0.9
    distance = np.hypot(across, tip - down)
    along = np.sqrt(distance**2 - lobe**2)  # from the tip to where its line touches the lobe
    turn = np.arctan2(across, tip - down) + np.arctan2(lobe, along)
    right, up = np.sin(turn), np.cos(turn)  # that line's direction
    below = (x - across) * right - (y - down) * up <= 0  # on the tip's side of the lobe's centre
    under_the_line = x * up - (tip - y) * right <= 0
    between_the_lobes = (x <= across) & (y < down)
    return ((x - across) ** 2 + (y - down) ** 2 <= lobe**2) | (under_the_line & below & ~between_the_lobes)


def coverage(
    shape: str, center: tuple[float, float], radius: float, degrees: float, outline: float = 0.0
) -> np.ndarray:
    """Anti-aliased coverage in [0, 1], (64, 64): of the whole shape, or of an inner outline `outline` pixels wide."""
    steps = (np.arange(RESOLUTION * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    x, y = (steps[None, :] - center[0]) / radius, (steps[:, None] - center[1]) / radius
    angle = np.deg2rad(degrees)
    mask = inside(shape, np.cos(angle) * x + np.sin(angle) * y, -np.sin(angle) * x + np.cos(angle) * y)
    if outline:
        mask &= ndimage.distance_transform_edt(mask) <= outline * SUPERSAMPLING
    return mask.reshape(RESOLUTION, SUPERSAMPLING, RESOLUTION, SUPERSAMPLING).mean((1, 3))


def render(scene: Scene, seed: int, jitter: float = 1.0) -> Image.Image:
    """The scene as a 64x64 RGB picture. `seed` moves position, size, tilt and colour a little, never into another value;
    `jitter` says how far, from 0 (not at all) to 1 (1.5 pixels, 5%, 3 degrees, 8 of 255)."""
    rng = numpy_generator_for(seed, "shapes picture", *asdict(scene).values())
    center = tuple(np.array(POSITIONS[scene.position]) + jitter * rng.uniform(-1.5, 1.5, 2))
    radius = SIZES[scene.size] * (1 + jitter * rng.uniform(-0.05, 0.05))
    degrees = TILTS.get(scene.tilt, 0.0) + jitter * rng.uniform(-3, 3)
    moved = jitter * rng.uniform(-8, 8, 3)
    color = np.clip(np.array(COLORS[scene.color or STRIPES]) + moved, 0, 255)
    if scene.style == "blueprint":
        canvas = np.full((RESOLUTION, RESOLUTION, 3), BLUEPRINT_PAPER, float)
        canvas[4::8, :] = canvas[:, 4::8] = BLUEPRINT_GRID
        alpha = coverage(scene.shape, center, radius, degrees, outline=2.0)
    else:
        canvas = np.full((RESOLUTION, RESOLUTION, 3), BACKGROUNDS[scene.background], float)
        alpha = coverage(scene.shape, center, radius, degrees)
    ink = np.broadcast_to(color, canvas.shape).copy()
    if scene.fill == "striped":
        ink[np.arange(RESOLUTION) % (2 * BAND) >= BAND] = BACKGROUNDS[
            "white" if scene.background == "black" else "black"
        ]
    picture = canvas + alpha[..., None] * (ink - canvas)
    return Image.fromarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8))


def write_folder(
    folder: Path,
    scenes: Sequence[Scene],
    seed: int,
    num_phrasings: int = 1,
    jitter: float = 1.0,
    captioned: Sequence[str] | None = None,
) -> Path:
    """Writes pictures and `metadata.jsonl` (file_name, text, and the scene) as an ordinary image folder; returns `folder`.

    `num_phrasings` > 1 gives each picture a random one of that many phrasings. `captioned`: as `left_open` takes it. Files that exist are
    written again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w") as lines:
        for index, scene in enumerate(scenes):
            phrasing = seed_for(seed, "phrasing", index) % num_phrasings
            name = f"{index:05d}.png"
            render(scene, seed_for(seed, "picture", index), jitter).save(folder / name)
            text = caption(left_open(scene, captioned), phrasing)
            lines.write(json.dumps({"file_name": name, "text": text, "scene": asdict(scene)}) + "\n")
    return folder


def mixed_scenes(count: int, split: str, seed: int, kinds: Sequence[str]) -> list[Scene]:
    """`count` scenes shared evenly among `kinds`: "base" and the names in CONCEPTS; raises ValueError for another name."""
    return [
        scene
        for kind, share in shares(count, kinds).items()
        for scene in sample_scenes(share, split, seed, None if kind == "base" else kind)
    ]


def mixed_tuning_scenes(count: int, split: str, world: ShapesConfig, kinds: Sequence[str]) -> list[Scene]:
    """The same of scenes to search settings on, beside what final runs of `world` are trained on. Raises ConfigError as
    `tuning_scenes` does."""
    taken = shares(world.num_pictures, world.scenes)
    return [
        scene
        for kind, share in shares(count, kinds).items()
        for scene in tuning_scenes(share, split, world.seed, taken.get(kind, 0), None if kind == "base" else kind)
    ]


def shares(count: int, kinds: Sequence[str]) -> dict[str, int]:
    """Kind -> its even share of `count`; raises ConfigError for a kind that does not exist, or is named twice."""
    for kind in kinds:
        check_choice(kind, ("base", *CONCEPTS), "shapes.scenes")
    if not kinds or len(set(kinds)) < len(kinds):
        raise ConfigError(f"shapes.scenes {', '.join(kinds) or 'is empty'}: name each kind once, at least one")
    return {kind: count // len(kinds) + (i < count % len(kinds)) for i, kind in enumerate(kinds)}


def scene_from(values: dict[str, str]) -> Scene:
    """A scene from the `scene` field of metadata.jsonl; raises ValueError naming an unknown or missing field."""
    try:
        return Scene(**values)
    except TypeError as error:
        raise ValueError(f"not a scene of the shapes world: {values!r} ({error})") from None

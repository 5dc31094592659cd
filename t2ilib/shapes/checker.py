"""Reading a picture of the shapes world back: which attributes does it show, and are they those of its scene?

An analysis that shares no weight with any model, and the measure `checker` that comes of it: what a run learned of the concepts
it was taught, and what it kept of the base world; or, of a network that began with nothing, how it follows the prompts of its world.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from t2ilib.config import RunConfig
from t2ilib.evaluation.metrics import Metric
from t2ilib.shapes.world import (
    BACKGROUNDS,
    BAND,
    BLUEPRINT_GRID,
    BLUEPRINT_PAPER,
    COLORS,
    CONCEPTS,
    POSITIONS,
    RESOLUTION,
    SHAPES,
    SIZES,
    TILTS,
    Scene,
    coverage,
    left_open,
    mixed_scenes,
    mixed_tuning_scenes,
)

ATTRIBUTES = ("shape", "color", "size", "position", "background", "tilt", "fill", "style")
UNREADABLE = "unreadable"
SMALLEST_OBJECT = 16
"""Pixels; a third of the smallest that the drawn world shows."""


def nearest(pixel: np.ndarray, palette: dict[str, tuple[int, int, int]], limit: float) -> str:
    distances = {name: float(np.linalg.norm(pixel - np.array(rgb))) for name, rgb in palette.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= limit else UNREADABLE


@cache
def unit_area(shape: str) -> float:
    return float(coverage(shape, (32.0, 32.0), 24.0, 0.0).sum() / 24.0**2)


def read_geometry(mask: np.ndarray) -> dict[str, str]:
    """Shape, tilt, size and position of a filled mask: the template of equal area and centroid that overlaps most."""
    rows, columns = np.nonzero(mask)
    area, centroid = len(rows), np.array([columns.mean() + 0.5, rows.mean() + 0.5])
    best_overlap, best = 0.0, None
    for shape in (*SHAPES, "heart"):
        radius = float(np.sqrt(area / unit_area(shape)))
        for tilt, degrees in {"": 0.0}.items() if shape == "circle" else TILTS.items():
            offset = template_offset(shape, degrees) * radius
            template = coverage(shape, tuple(centroid - offset), radius, degrees)
            overlap = np.minimum(mask, template).sum() / np.maximum(mask, template).sum()
            if overlap > best_overlap:
                best_overlap, best = overlap, (shape, tilt, radius, centroid - offset)
    if best is None or best_overlap < 0.6 or not 0.75 * min(SIZES.values()) < best[2] < 1.3 * max(SIZES.values()):
        return dict.fromkeys(("shape", "tilt", "size", "position"), UNREADABLE)
    shape, tilt, radius, center = best
    size = min(SIZES, key=lambda name: abs(np.log(radius / SIZES[name])))
    position = min(POSITIONS, key=lambda name: np.linalg.norm(center - np.array(POSITIONS[name])))
    return {"shape": shape, "tilt": tilt, "size": size, "position": position}


@cache
def template_offset(shape: str, degrees: float) -> np.ndarray:
    """The shape's centroid relative to its centre, in radii."""
    alpha = coverage(shape, (32.0, 32.0), 24.0, degrees)
    steps = np.arange(RESOLUTION) + 0.5 - 32.0
    return np.array([(alpha.sum(0) * steps).sum(), (alpha.sum(1) * steps).sum()]) / alpha.sum() / 24.0


def read(picture: Image.Image) -> dict[str, str]:
    """Attribute -> value as seen in a 64x64 picture ("" where the attribute does not apply, "unreadable" where nothing fits).

    The background is the median of the border; the object is what differs from it. Without an object nothing is read: a blank
    sheet shows no scene. Another resolution is scaled to 64.
    """
    if picture.size != (RESOLUTION, RESOLUTION):
        picture = picture.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture.convert("RGB"), float)
    border = np.concatenate([part.reshape(-1, 3) for part in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])])
    paper = np.median(border, 0)
    distance = np.linalg.norm(pixels - paper, axis=-1)
    mask = distance > 60
    if mask.sum() >= SMALLEST_OBJECT:
        mask = distance > max(60.0, 0.45 * float(np.median(distance[mask])))
    mask = largest_part(mask)
    if mask.sum() < SMALLEST_OBJECT:
        return dict.fromkeys(ATTRIBUTES, UNREADABLE)
    ground = nearest(paper, BACKGROUNDS | {"blueprint": BLUEPRINT_PAPER}, 60)
    if ground == "blueprint":
        body = ndimage.binary_fill_holes(mask)
        style = "blueprint" if has_grid(pixels, ndimage.binary_dilation(body, iterations=2)) else UNREADABLE
        reading = {"background": "", "style": style, "fill": "solid", "color": color_of(pixels[mask], paper)}
        return reading | read_geometry(body)
    core = ndimage.binary_erosion(mask)
    reading = {"background": ground, "style": "plain"} | read_geometry(mask)
    if is_striped(pixels, mask):
        return reading | {"color": "", "fill": "striped"}
    return reading | {"fill": "solid", "color": color_of(pixels[core if core.sum() >= 8 else mask], paper)}


def color_of(inner: np.ndarray, paper: np.ndarray) -> str:
    """The palette's colour of an object's pixels (N, 3), by the half of its saturated ones that differ most from the paper."""
    saturation = inner.max(1) - inner.min(1)
    colored = inner[saturation > 60] if (saturation > 60).sum() >= 4 else inner
    strongest = colored[np.argsort(-np.linalg.norm(colored - paper, axis=1))[: max(4, len(colored) // 2)]]
    return nearest(np.median(strongest, 0), COLORS, 90)


def has_grid(pixels: np.ndarray, hidden: np.ndarray) -> bool:
    """Whether the paper of a blueprint is ruled, where nothing is drawn on it (`hidden`): its lines, against what lies between
    them, at least a third as far apart as they are in the drawn world."""
    ruled = np.zeros_like(hidden)
    ruled[4::8, :] = ruled[:, 4::8] = True
    lines, between = pixels[ruled & ~hidden], pixels[~ruled & ~hidden]
    if not len(lines) or not len(between):
        return False
    away = np.array(BLUEPRINT_GRID, float) - BLUEPRINT_PAPER
    return float((lines.mean(0) - between.mean(0)) @ away / (away @ away)) > 1 / 3


def is_striped(pixels: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the object is banded row by row, coloured and plain in turns: two changes at least, no band much wider than the drawn
    world's, and every row mostly of one kind."""
    saturation = pixels.max(-1) - pixels.min(-1)
    rows = [saturation[row][mask[row]] for row in range(RESOLUTION) if mask[row].any()]
    colored = np.array([row.mean() for row in rows]) > 90
    changes = np.nonzero(colored[1:] != colored[:-1])[0] + 1
    bands = np.diff([0, *changes, len(rows)])
    of_one_kind = np.mean([max((row > 90).mean(), (row <= 90).mean()) for row in rows])
    return len(changes) >= 2 and max(bands) <= BAND + 2 and float(of_one_kind) > 0.75


def largest_part(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count <= 1:
        return mask
    return labels == 1 + int(np.argmax(ndimage.sum_labels(mask, labels, range(1, count + 1))))


def judge(scene: Scene, reading: dict[str, str]) -> dict[str, bool]:
    """Attribute -> right or wrong, for the attributes that the scene has."""
    return {name: reading[name] == value for name, value in scene.describe().items()}


@dataclass(frozen=True)
class CheckResult:
    """Shares in [0, 1] over a set of pictures; `chance` is what the same readings score against the other scenes' truths."""

    num_pictures: int
    accuracy: dict[str, float]
    all_attributes: float
    chance: dict[str, float]


def check(scenes: Sequence[Scene], pictures: Iterable[Image.Image]) -> CheckResult:
    """Accuracy by attribute and of all attributes together, over pictures that were drawn or generated for `scenes`."""
    return judge_all(scenes, [read(picture) for picture in pictures])


def judge_all(scenes: Sequence[Scene], readings: Sequence[dict[str, str]]) -> CheckResult:
    """The same, of pictures that were read already. Raises ValueError where there is not one for each scene."""
    verdicts = verdicts_on(scenes, readings)
    names = [name for name in ATTRIBUTES if any(name in verdict for verdict in verdicts)]
    accuracy = {name: float(np.mean([v[name] for v in verdicts if name in v])) for name in names}
    chance = {}
    for name in names:
        truths = Counter(asdict(scene)[name] for scene in scenes if asdict(scene)[name])
        seen = Counter(reading[name] for reading in readings)
        chance[name] = sum(truths[v] * seen[v] for v in truths) / (truths.total() * seen.total())
    return CheckResult(len(scenes), accuracy, float(np.mean([all(v.values()) for v in verdicts])), chance)


def verdicts_on(scenes: Sequence[Scene], readings: Sequence[dict[str, str]]) -> list[dict[str, bool]]:
    """Of each picture attribute -> right or wrong. Raises ValueError where there is not one picture for each scene."""
    if not scenes or len(readings) != len(scenes):
        raise ValueError(f"{len(readings)} pictures for {len(scenes)} scenes: one picture a scene is needed")
    return [judge(scene, reading) for scene, reading in zip(scenes, readings, strict=True)]


METRICS = {
    "{group}/all": Metric("{group}, all right", "share", "higher", table="Learned and kept"),
    "concept/all": Metric("concept learned", "share", "higher", table="Learned and kept", role="learned", headline="Learned most"),
    "base_kept/all": Metric("base kept", "share", "higher", table="Learned and kept", role="kept", headline="Forgot least"),
    "concept/shown": Metric("concept shown", "share", "higher", table="Learned and kept"),
    "concept/chance": Metric("learned by chance", "share", table="Learned and kept"),
    "concept/constant": Metric("by one and the same picture", "share", table="Learned and kept"),
    "world/all": Metric("prompts followed", "share", "higher", table="Learned and kept", role="learned", headline="Followed prompts best"),
    "world/chance": Metric("followed by chance", "share", table="Learned and kept"),
    "world/constant": Metric("by one and the same picture", "share", table="Learned and kept"),
    **{f"world/{name}": Metric(f"{name} followed", "share", "higher", table="Its world, by attribute") for name in ATTRIBUTES},
    **{f"concept/{name}": Metric(f"{name} shown", "share", "higher", table="By concept") for name in CONCEPTS},
    **{f"concept/{name}": Metric(f"{name}", "share", "higher", table="Concepts, by attribute") for name in ATTRIBUTES},
    **{f"base_kept/{name}": Metric(f"{name} kept", "share", "higher", table="Its own world, by attribute") for name in ATTRIBUTES},
}  # fmt: skip
"""Learned is what shows the concept and everything else that was asked for. Of two that come to the same name the later counts."""


def lacks(run: RunConfig) -> str | None:
    """Why the checker cannot judge a run's pictures, or None where it can."""
    return None if run.shapes and run.shapes.checked_prompts else "it knows the drawn world alone (data.source shapes)"


def checked_scenes(run: RunConfig) -> dict[str, list[Scene]]:
    """Test scenes by group, as far as prompts tell them, none of them ever trained on: `concept` (what the run was taught) and `base_kept`; of a network from
    scratch, which had nothing to keep, `world`. A run of `data.part: tuning` has test scenes of its own, by whose base world what the
    base knew of it is told too kindly: it was trained on them."""
    if lacks(run):
        return {}
    count, concepts = run.shapes.checked_prompts, [name for name in run.shapes.scenes if name != "base"]
    if run.scratch is not None:
        groups = {"world": list(run.shapes.scenes)}
    else:
        groups = ({"concept": concepts} if concepts else {}) | {"base_kept": ["base"]}
    if run.data.part == "tuning":
        found = {group: mixed_tuning_scenes(count, "test", run.shapes, kinds) for group, kinds in groups.items()}
    else:
        found = {group: mixed_scenes(count, "test", 0, kinds) for group, kinds in groups.items()}
    return {group: [left_open(scene, run.shapes.captioned) for scene in scenes] for group, scenes in found.items()}


def checked(
    group: str, scenes: Sequence[Scene], pictures: Sequence[Image.Image]
) -> dict[str, float | list[float | None]]:
    """Of each picture whether it is right, 1 or 0, by attribute and in all of them together.

    Of what was learned also what the share of pictures with everything right is to be held against: `chance`, when every picture is
    held against every prompt, and `constant`, the best that one of these pictures would score as the answer to all prompts. For concepts
    also which pictures show the concept asked for, whatever else is wrong in them.
    """
    readings = [read(picture) for picture in pictures]
    verdicts = verdicts_on(scenes, readings)
    found: dict[str, float | list[float | None]] = {
        f"{group}/{name}": [float(verdict[name]) if name in verdict else None for verdict in verdicts]
        for name in ATTRIBUTES
        if any(name in verdict for verdict in verdicts)
    }
    found[f"{group}/all"] = [float(all(verdict.values())) for verdict in verdicts]
    if group == "concept":
        asked = [scene.concepts[0] for scene in scenes]
        shown = [float(concept in reading.values()) for concept, reading in zip(asked, readings, strict=True)]
        for name in dict.fromkeys(asked):
            found[f"concept/{name}"] = [
                hit if concept == name else None for hit, concept in zip(shown, asked, strict=True)
            ]
        found["concept/shown"] = shown
    if group in ("concept", "world"):
        right = np.array([[all(judge(scene, reading).values()) for scene in scenes] for reading in readings])
        found |= {f"{group}/chance": float(right.mean()), f"{group}/constant": float(right.mean(1).max())}
    return found

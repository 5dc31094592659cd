"""What the page tells: how far a drawing is, what came of it, and mistakes as sentences, as pieces of HTML in which nothing of others is live.

Every tab has one place for them, which screen readers read out as it changes.
"""

import html
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from t2ilib.config import ConfigError
from t2ilib.drawing.desk import Progress

log = logging.getLogger(__name__)

LABELS = {
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance",
    "num_pictures": "Pictures",
    "negative_prompt": "Negative prompt",
    "prompt": "Prompt",
    "seed": "Seed",
    "first": "First picture's number",
    "width": "Width",
    "height": "Height",
    "sampler": "Sampler",
    "vae_tiling": "Decode in tiles",
    "model.base": "Base model",
    "model.quantization": "Weights of the base",
    "model.clip_skip": "Text layers left out",
    "embeddings": "Files of words",
}
"""Field of DrawSettings -> what the page calls it."""
FIELD = re.compile(rf"^(?P<lead>\s*)(?P<name>{'|'.join(map(re.escape, LABELS))})(?=[:.])", re.MULTILINE)
ADAPTER = re.compile(r"^(?P<lead>\s*)adapters\.(?P<number>\d+)\.(?P<field>\w+)", re.MULTILINE)


def plain(text: str) -> str:
    """A message that begins lines with names of fields, with the page's own words for them."""
    text = FIELD.sub(lambda found: found["lead"] + LABELS[found["name"]], text)
    return ADAPTER.sub(lambda found: f"{found['lead']}Adapter {int(found['number']) + 1}, {found['field']}", text)


def told(text: str, kind: str = "good") -> str:
    """A message of a kind, "good", "note" or "bad", as HTML; its lines are kept."""
    lines = "<br>".join(html.escape(line.strip()) for line in text.strip().splitlines())
    return f'<div class="told {kind}" role="{"alert" if kind == "bad" else "status"}">{lines}</div>'


def told_progress(progress: Progress) -> str:
    """How far a drawing is, in words and as a bar."""
    parts = [progress.doing]
    if progress.num_steps:
        parts.append(f"step {progress.step} of {progress.num_steps}")
    if progress.total > 1:
        parts.append(f"{progress.done} of {progress.total} pictures are done")
    words = html.escape(", ".join(parts))
    bar = f'<progress max="1" value="{progress.share:.3f}" aria-label="how far the drawing is"></progress>'
    return f'<div class="told going" role="status">{bar}<span>{words[:1].upper()}{words[1:]}</span></div>'


def told_error(error: Exception) -> str:
    """A mistake as its sentence; what nobody foresaw with its kind, and in the log with where it happened."""
    if isinstance(error, ConfigError) or (isinstance(error, OSError | ValueError) and not unforeseen(error)):
        return told(plain(str(error)), "bad")
    log.error("something went wrong in the app, which goes on", exc_info=error)
    said = " ".join(str(error).split())[:300]
    return told(
        f"Something went wrong that nobody foresaw ({type(error).__name__}: {said}). The app goes on; where it was started, the terminal has"
        " the whole story.",
        "bad",
    )


def unforeseen(error: Exception) -> bool:
    return isinstance(error, ValidationError) or (isinstance(error, ValueError) and type(error) is not ValueError)


def files_told(paths: list[Path]) -> str:
    """Where files lie, one or a few of the same folder."""
    if len(paths) == 1:
        return str(paths[0])
    return f"{paths[0]} to {paths[-1].name}" if len(paths) > 1 else "nowhere"


def count_told(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def words_told(words: Mapping[str, str]) -> list[str]:
    """What words of embeddings files are called in prompts, a sentence each."""
    return [f"{Path(file).name}: in prompts it is called {word}" for file, word in words.items()]

"""What a run drew, in a notebook."""

import base64
from pathlib import Path
from typing import TYPE_CHECKING

from t2ilib.config import ConfigError
from t2ilib.text import shown

if TYPE_CHECKING:
    from IPython.display import HTML

TYPES = {".gif": "image/gif", ".webp": "image/webp", ".png": "image/png"}


def show_progress(output: Path | str) -> "HTML":
    """The animation of a run's samples and the strips of their denoising, from the run's folder (`TrainResult.output`), for a
    notebook to display: as HTML that holds the pictures, because not every program that shows notebooks knows a GIF as such.

    Raises ConfigError for a folder that has neither.
    """
    from IPython.display import HTML

    output = Path(output)
    files = [*sorted(output.glob("progress/grid.*")), *output.glob("denoising/grid.png")]
    if not files:
        raise ConfigError(
            f"{shown(output)} has no animation and no strips: a run leaves them where evaluation.sample_every or sample_every_epochs"
            " draws while it trains, and evaluation.strip_steps is a list (an empty one will do)"
        )
    return HTML(
        "\n".join(
            f'<p><img src="{inline(file)}" alt="{file.parent.name}" style="max-width: 100%"></p>' for file in files
        )
    )


def inline(file: Path) -> str:
    return f"data:{TYPES[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"

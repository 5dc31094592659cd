"""Progress for whoever watches: plain lines in a terminal or under papermill, a live loss plot in a notebook run by hand."""

import os
import time

from t2ilib.config import RunConfig

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_PLOTS = 2.0


def in_live_notebook() -> bool:
    """True in a Jupyter kernel that a person uses; studies set T2ILIB_BATCH for the kernels they start."""
    if os.environ.get("T2ILIB_BATCH"):
        return False
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None


class Progress:
    """Called after every step with the loss and the seconds spent in steps so far, by earlier starts of the run too."""

    def __init__(self, run: RunConfig, start: int):
        self.steps, self.start, self.shown = run.training.steps, start, 0.0
        self.points: list[tuple[int, float]] = []
        self.before: float | None = None
        self.live = in_live_notebook()
        self.handle = None

    def __call__(self, step: int, loss: float, seconds: float) -> None:
        self.points.append((step, loss))
        self.before = seconds if self.before is None else self.before
        seconds -= self.before  # of this start alone: the first step of one is not timed
        pause = SECONDS_BETWEEN_PLOTS if self.live else SECONDS_BETWEEN_LINES
        now = time.monotonic()
        if now - self.shown < pause and step not in (self.start + 1, self.steps):
            return
        self.shown = now
        line = self.line(step, loss, seconds)
        if self.live:
            self.plot(line)
        else:
            print(line, flush=True)

    def line(self, step: int, loss: float, seconds: float) -> str:
        done = step - self.start - 1
        if not done or not seconds:
            return f"step {step}/{self.steps}  loss {loss:.4f}"
        left = round((self.steps - step) * seconds / done)
        return (
            f"step {step}/{self.steps}  loss {loss:.4f}  {done / seconds:.2f} steps/s  ETA {left // 60}:{left % 60:02d}"
        )

    def plot(self, title: str) -> None:
        """Draws the losses so far in place of the last plot; as PNG, which needs no matplotlib backend in the kernel."""
        import io

        from IPython.display import Image, display
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 2.6), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss", title=title)
        steps, losses = zip(*self.points, strict=True)
        window = max(1, len(losses) // 20)
        recent = [losses[max(0, i - window) : i + 1] for i in range(len(losses))]
        axes.plot(steps, losses, color="0.75", linewidth=0.8)
        axes.plot(steps, [sum(part) / len(part) for part in recent])
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=110)
        picture = Image(stream.getvalue())
        if self.handle is None:
            self.handle = display(picture, display_id=True)
        else:
            self.handle.update(picture)

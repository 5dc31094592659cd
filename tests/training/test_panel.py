"""The panel: what it shows, how seldom, and what is left in a saved notebook. That it looks well, a person has to see."""

import base64
import io
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from t2ilib.runfile import build_run
from t2ilib.training import panel as panels
from t2ilib.training.panel import MOST_POINTS, SHARE, Panel, Part, clock, points, smoothed


class Shown:
    """In place of IPython's display: keeps what was shown last under each handle, and how often something was."""

    def __init__(self) -> None:
        self.outputs: list[dict] = []
        self.count = 0

    def __call__(self, content: dict, raw: bool, display_id: bool) -> "Shown.Handle":
        assert raw
        assert display_id
        self.outputs.append(content)
        self.count += 1
        return Shown.Handle(self, len(self.outputs) - 1)

    class Handle:
        def __init__(self, shown: "Shown", place: int) -> None:
            self.shown, self.place = shown, place

        def update(self, content: dict, raw: bool) -> None:
            assert raw
            self.shown.outputs[self.place] = content
            self.shown.count += 1


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    import IPython.display

    found = Shown()
    monkeypatch.setattr(IPython.display, "display", found)
    return found


def make_panel(tmp_path: Path, live: bool = True) -> Panel:
    return Panel(build_run({"name": "cat", "output": str(tmp_path), "adapter": {}, "training": {"steps": 100}}), live)


def told(panel: Panel, step: int, loss: float, seconds: float, **more: float) -> None:
    panel.log_metrics({"loss": loss, "learning_rate/unet": 1e-3, **more}, step)
    panel.progress(step, seconds)


def test_the_numbers_that_matter_and_the_time_left(tmp_path: Path, shown: Shown) -> None:
    """Two seconds a step; the first of a start is not timed, and earlier starts do not count."""
    panel = make_panel(tmp_path)
    panel.log_metrics({"held_out_loss": 0.5}, 0)
    panel.log_image(Image.new("RGB", (8, 8)), "samples", 0)
    for step in range(40, 51):
        told(panel, step, 0.25, 900 + 2.0 * (step - 40), grad_norm=3.0)
    panel.log_metrics({"held_out_loss": 0.125}, 50)
    status = panel.told()
    text = status["text/plain"]
    assert text.splitlines()[0] == "step 50 of 100, 1:40 to go"
    for part in ("loss           0.2500", "0.1250 (at first 0.5000)", "1.00e-03", "0.50 steps/s", "MiB"):
        assert part in text
        assert part.split("  ")[-1].strip() in status["text/html"]
    assert "grad" not in text
    assert "width: 50.0%" in status["text/html"]
    assert len(shown.outputs) == 3, "a line with numbers, the curve, the samples"


def test_it_ends_as_plain_text_and_two_small_pictures(tmp_path: Path, shown: Shown) -> None:
    panel = make_panel(tmp_path)
    panel.log_image(Image.effect_noise((2000, 1000), 50).convert("RGB"), "samples", 0)
    for step in range(1, 101):
        told(panel, step, 1 / step, step / 10)
    panel.log_image(Image.new("RGB", (600, 300), "red"), "samples", 100)
    panel.end()
    assert [sorted(content) for content in shown.outputs] == [
        ["text/plain"],
        ["image/png", "text/plain"],
        ["image/jpeg", "text/plain"],
    ]
    assert shown.outputs[0]["text/plain"].startswith("cat: done, 100 steps\n")
    with Image.open(io.BytesIO(base64.b64decode(shown.outputs[2]["image/jpeg"]))) as last:
        assert last.size == (600, 300)
        assert last.getpixel((5, 5))[0] > 250, "the last samples, not the first"
    assert sum(len(text) for content in shown.outputs for text in content.values()) < 100_000


def test_what_ended_it_early_is_said_with_what_to_do(tmp_path: Path, shown: Shown) -> None:
    panel = make_panel(tmp_path)
    told(panel, 1, 0.5, 0.0)
    panel.end(SystemExit("SIGINT after step 1, of which there is a checkpoint"))
    text = shown.outputs[0]["text/plain"]
    assert "ended at step 1 of 100 (SIGINT after step 1, of which there is a checkpoint)" in text
    assert "Run this cell again" in text


def test_where_nobody_looks_on_only_the_end_is_shown(tmp_path: Path, shown: Shown) -> None:
    panel = make_panel(tmp_path, live=False)
    panel.log_image(Image.new("RGB", (8, 8)), "samples", 0)
    for step in range(1, 101):
        told(panel, step, 0.5, step / 10)
    assert shown.count == 0
    panel.end()
    assert [sorted(content) for content in shown.outputs] == [["text/plain"], ["image/png", "text/plain"]]
    nothing = make_panel(tmp_path, live=False)
    nothing.log_metrics({"held_out_loss": 0.5}, 0)
    nothing.end()
    assert len(shown.outputs) == 2, "of a run that took no step"


def test_showing_takes_a_share_of_the_time_whatever_it_costs(shown: Shown) -> None:
    """Asked without a pause for a second, by a part that takes 2 ms: 2 ms each 270, so four times, where it could be 500."""
    part, spent, began = Part(0.0), 0.0, time.monotonic()
    made = []
    while time.monotonic() - began < 1.0:
        before = time.monotonic()
        part.show(lambda: made.append(1) or time.sleep(0.002) or {"text/plain": ""})
        spent += time.monotonic() - before if len(made) and made[-1] else 0
    assert 2 <= len(made) <= 1 + 1.0 / (0.002 / SHARE)
    rare = Part(60.0)
    for _ in range(3):
        rare.show(lambda: {"text/plain": ""})
    assert shown.count == len(made) + 1
    rare.show(lambda: {"text/plain": ""}, now=True)
    assert shown.count == len(made) + 2


def test_curves_of_long_runs_stay_small_and_end_where_they_end() -> None:
    losses = {step: float(step) for step in range(1, 100_001)}
    steps, values = points(losses)
    assert len(steps) <= MOST_POINTS + 1
    assert (steps[0], steps[-1], values[-1]) == (1, 100_000, 100_000.0)
    smooth = smoothed({step: float(step % 2) for step in range(1, 201)})
    assert smooth[200] == 0.5
    assert (clock(59.6), clock(3600), clock(3725)) == ("1:00", "1:00:00", "1:02:05")


CELL = """
import time
from PIL import Image
from t2ilib.runfile import build_run
from t2ilib.training.progress import Progress, shown_in_notebook
from t2ilib.tracking.tracker import NullTracker
run = build_run({"output": "run", "adapter": {}, "training": {"steps": 300}})
with shown_in_notebook(run, NullTracker(), True) as (tracker, panel):
    progress = Progress(run, 0, panel)
    for step in range(301):
        if step % 100 == 0:
            tracker.log_image(Image.new("RGB", (64, 64), (step // 2, 0, 0)), "samples", step)
        if step:
            tracker.log_metrics({"loss": 1 / step}, step)
            progress(step, 1 / step, step / 100)
            time.sleep(0.005)
"""


@pytest.mark.parametrize("batch", ["", "1"])
def test_an_executed_notebook_holds_the_last_state_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: str
) -> None:
    """By nbclient, which papermill and nbconvert execute with, in a real kernel: by hand, and as a study does."""
    monkeypatch.setenv("T2ILIB_BATCH", batch)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[0].outputs
    kinds = [sorted(output.data) for output in outputs if output.output_type == "display_data"]
    text, curve, samples = ["text/plain"], ["image/png", "text/plain"], ["image/jpeg", "text/plain"]
    lines = [line for output in outputs if output.output_type == "stream" for line in output.text.splitlines()]
    if batch:
        assert kinds == [text, curve]
        assert lines[0].startswith("step 1/300  loss 1.0000")
        assert lines[-1].startswith("step 300/300")
    else:
        assert kinds == [text, curve, samples]
        assert not lines
        with Image.open(io.BytesIO(base64.b64decode(outputs[2].data["image/jpeg"]))) as last:
            assert last.getpixel((5, 5))[0] > 140, "of step 300"
    assert len(nbformat.writes(notebook)) < 100_000


def test_the_curve_is_drawn_again_when_it_is_time(
    tmp_path: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panels, "SHARE", 1e9)
    panel = make_panel(tmp_path)
    panel.status.least = panel.curve.least = 0.0
    for step in range(1, 6):
        told(panel, step, 0.5, step / 10)
    assert shown.count == 2 * 4, "status and curve, from the second step on: the first is told before anything is timed"

"""The line of progress: how fast, and how long still."""

from pathlib import Path

import pytest

from t2ilib.runfile import build_run
from t2ilib.training import progress


@pytest.mark.parametrize(("start", "before"), [(0, 0.0), (60, 3000.0)])
def test_speed_and_time_left_are_those_of_this_start(tmp_path: Path, monkeypatch, capsys, start, before) -> None:
    """A step takes two seconds; the first of a start is not timed. Earlier starts were slower, or had other steps."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    shows = progress.Progress(build_run({"adapter": {}, "training": {"steps": 100}, "output": str(tmp_path)}), start)
    for done in range(1, 11):
        shows(start + done, 0.5, before + 2.0 * (done - 1))
    left = 2 * (100 - start - 10)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"step {start + 10}/100  loss 0.5000  0.50 steps/s  ETA {left // 60}:{left % 60:02d}"
    )

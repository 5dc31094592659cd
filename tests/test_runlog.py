"""run.log: what was said, in its order, from before there was a folder, and nothing of it lost on the screen."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from t2ilib.runlog import LIBRARY, RunLog, on_screen

log = logging.getLogger("t2ilib.anything")


def lines(path: Path) -> list[str]:
    """Without their times."""
    return [line[20:] for line in path.read_text().splitlines()]


def test_what_is_said_before_there_is_a_folder_is_written_when_there_is_one(tmp_path: Path, caplog) -> None:
    file = tmp_path / "run" / "run.log"
    with caplog.at_level(logging.INFO), RunLog() as said:
        log.info("loading %d pictures", 3)
        said.write("for the file alone")
        assert not file.parent.exists()
        said.open(file)
        log.warning("few pictures")
    log.warning("after its scope")
    begun, *rest = lines(file)
    assert begun.startswith("--- process ")
    assert rest == ["loading 3 pictures", "for the file alone", "few pictures"]
    assert "for the file alone" not in caplog.text
    with RunLog() as said:
        said.open(file)
    assert len(lines(file)) == 5, "a second start goes on below"


def fail(error: BaseException, file: Path | None = None) -> None:
    with RunLog() as said:
        log.warning("about to fail")
        if file is not None:
            said.open(file)
        raise error


def test_a_run_that_is_refused_writes_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="refused"):
        fail(ValueError("refused"))
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_its_last_line_and_is_said_where_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "run.log"
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError("division by zero"), file)
    text = file.read_text()
    assert text.endswith("ZeroDivisionError: division by zero\n")
    assert "test_runlog.py" in text
    with pytest.raises(SystemExit):
        fail(SystemExit(75), file)
    assert lines(file)[-1] == "ended early, with exit status 75"


def test_a_log_within_another_writes_both(tmp_path: Path) -> None:
    with RunLog() as outer:
        outer.open(tmp_path / "outer.log")
        with RunLog() as inner:
            inner.open(tmp_path / "inner.log")
            log.warning("once")
    assert lines(tmp_path / "outer.log")[-1] == lines(tmp_path / "inner.log")[-1] == "once"


def test_what_the_screen_is_not_to_show_is_kept_all_the_same(tmp_path: Path, caplog) -> None:
    """Here it shows warnings alone, as `t2ilib -q` asks."""
    before = (LIBRARY.level, LIBRARY.propagate)
    with RunLog() as outer, RunLog() as inner:
        inner.open(tmp_path / "inner.log")
        outer.open(tmp_path / "outer.log")
        log.info("loading")
        log.warning("few pictures")
        assert not on_screen(logging.INFO)
    assert lines(tmp_path / "inner.log")[1:] == lines(tmp_path / "outer.log")[1:] == ["loading", "few pictures"]
    assert [record.message for record in caplog.records] == ["few pictures"]
    assert (LIBRARY.level, LIBRARY.propagate) == before
    with caplog.at_level(logging.INFO), RunLog():
        assert on_screen(logging.INFO)
        log.info("loading again")
    assert caplog.messages[-1] == "loading again"
    with caplog.at_level(logging.INFO, "t2ilib.anything"), RunLog():
        log.info("of one module")
        logging.getLogger("t2ilib.another").info("of another")
    assert caplog.messages[-1] == "of one module"


UNCONFIGURED = """
import logging, sys
from pathlib import Path
from t2ilib.runlog import RunLog
log = logging.getLogger("t2ilib.anything")
with RunLog() as outer, RunLog() as inner:
    inner.open(Path(sys.argv[1]))
    log.warning("few pictures")
    log.info("not asked for")
log.info("not asked for")
"""


def test_where_nobody_configured_logging_warnings_are_on_the_screen(tmp_path: Path) -> None:
    """Python itself shows them only as long as no logger has a handler."""
    file = tmp_path / "run.log"
    done = subprocess.run([sys.executable, "-c", UNCONFIGURED, file], capture_output=True, text=True, check=True)
    assert done.stderr == "few pictures\n"
    assert lines(file)[1:] == ["few pictures", "not asked for"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_ends_nothing_and_is_told_once(capsys) -> None:
    with RunLog() as said:
        said.open(Path("/dev/full"))
        log.warning("one")
        log.warning("two")
    assert capsys.readouterr().err.count("cannot be written, so it lacks lines") == 1

"""Finding and executing one notebook: papermill in a process of its own, its kernel ended with it, its errors in one line.

papermill marks the cells of a dead or timed-out kernel "completed" and only warns about parameters that a notebook does not
declare; so parameters are read from the `parameters` cell beforehand, and only the exit code says whether it worked.
"""

import ast
import contextlib
import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from t2ilib.config import ConfigError

KERNEL = "python3"
SHIPPED = ("train.ipynb", "scratch.ipynb", "compare.ipynb")
"""Notebooks that come with t2ilib: what studies run, and what a report is made with."""
PACKAGE = Path(__file__).parents[1]
RETRIED = ("Kernel died before replying", "ddress already in use")
"""Kernels that start at the same moment may take the same port; such a start is tried again."""


def find_notebook(name: str, study: Path) -> Path:
    """The notebook that a study file names: beside the file, else the one that comes with t2ilib. Raises ConfigError where there is
    neither.

    An installed package has its notebooks inside; a checkout has them in experiments/, where people open them.
    """
    beside = Path(study).parent / name
    shipped = [folder / name for folder in (PACKAGE / "notebooks", PACKAGE.parent / "experiments") if name in SHIPPED]
    found = next((path for path in (beside, *shipped) if path.is_file()), None)
    if found is None:
        raise ConfigError(
            f"the notebook {beside} does not exist: put it beside the study file, or name one that comes with t2ilib"
            f" ({', '.join(SHIPPED)})"
        )
    return found


def notebook_parameters(path: Path) -> dict[str, str]:
    """Name -> source of the default, from the notebook's `parameters` cell; raises ConfigError where there is none."""
    if not path.exists():
        raise ConfigError(f"the notebook {path} does not exist")
    cells = json.loads(path.read_text())["cells"]
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ConfigError(f"{path} has {len(tagged)} cells tagged `parameters`; it needs exactly one")
    found = {}
    for statement in ast.parse("".join(tagged[0]["source"])).body:
        target = (
            statement.target
            if isinstance(statement, ast.AnnAssign)
            else statement.targets[0]
            if isinstance(statement, ast.Assign)
            else None
        )
        if isinstance(target, ast.Name) and statement.value is not None:
            found[target.id] = ast.unparse(statement.value)
    return found


def execute_notebook(
    notebook: Path,
    output: Path,
    parameters: Path,
    variables: dict[str, str],
    follow: Callable[[str], None] = lambda line: None,
    started: Callable[[Callable[[], None]], None] = lambda end: None,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[int, str]:
    """Runs `notebook` to `output` with a YAML file of parameters; returns the exit code and everything it printed.

    It runs in the caller's own folder, so that a relative path in a study means what it means in a run config.

    `variables`: added to the environment. `follow` gets every line as it comes, `started` what asks the notebook to stop; once
    `stopping` says so, nothing is tried again. A note beside `output` names the process while it lives, so that a later call
    can end what a killed study left running. Raises ConfigError where another study is running this notebook.
    """
    command = [
        *(sys.executable, "-m", "papermill", str(notebook), str(output), "-f", str(parameters), "-k", KERNEL),
        *("--cwd", str(Path.cwd()), "--log-output", "--no-progress-bar"),
    ]
    note = output.parent / "process.json"
    for attempt in range(3):
        time.sleep(2 * attempt)
        end_orphan(note)
        process = subprocess.Popen(
            command,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        owners = {"notebook": process.pid, "study": os.getpid()}
        note.write_text(json.dumps({who: [pid, psutil.Process(pid).create_time()] for who, pid in owners.items()}))
        started(functools.partial(end_notebook, process.pid))
        lines = []
        for line in process.stdout:
            lines.append(line)
            follow(line)
        code, text = process.wait(), "".join(lines)
        note.unlink(missing_ok=True)
        if not code or stopping() or not any(reason in text for reason in RETRIED):
            break
    return code, text


def end_notebook(pid: int) -> None:
    """Asks the kernels under a papermill process to stop: they are in sessions of their own, so no group signal reaches them.

    A papermill that has no kernel yet is stopped itself.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        papermill = psutil.Process(pid)
        for process in papermill.children(recursive=True) or [papermill]:
            process.send_signal(signal.SIGTERM)


def living(pid: int, created: float) -> psutil.Process | None:
    """The process, if it is still the one that had this id then."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return process if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE else None
    return None


def end_orphan(note: Path) -> None:
    """Ends the notebook that a killed study left running, so that two never write to one folder; raises ConfigError where the
    study lives and is still running it."""
    if not note.exists():
        return
    known = json.loads(note.read_text())
    study, notebook = living(*known["study"]), living(*known["notebook"])
    if notebook is None:
        return
    if study is not None and study.pid != os.getpid():
        raise ConfigError(
            f"{note.parent} is being run by another study (process {study.pid}): wait for it, or stop it first"
        )
    family = [*notebook.children(recursive=True), notebook]
    end_notebook(notebook.pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        notebook.terminate()
    for survivor in psutil.wait_procs(family, timeout=30)[1]:
        survivor.kill()


def error_text(output: str) -> str:
    """The last `SomethingError: message` line that a failed notebook printed, with its continuation lines."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    found = list(
        re.finditer(
            r"^(?:[\w.]+\.)?(\w*(?:Error|Exit|Interrupt|Loss|Interrupted|Stopped)): ?(.*(?:\n  .*)*)",
            plain,
            re.MULTILINE,
        )
    )
    return f"{found[-1][1]}: {found[-1][2]}" if found else ""


def export_html(notebook: Path, hide_code: bool) -> Path:
    """One self-contained HTML file beside the notebook, pictures embedded."""
    from nbconvert import HTMLExporter

    quiet = logging.getLogger(f"{__name__}.export")
    quiet.setLevel(logging.ERROR)  # nbconvert asks for alternative texts that notebooks cannot give
    options = {"exclude_output_prompt": True, "exclude_input_prompt": True, "embed_images": True}
    exporter = HTMLExporter(exclude_input=hide_code, log=quiet, **options)
    body, _ = exporter.from_filename(str(notebook))
    page = notebook.with_suffix(".html")
    page.write_text(body)
    return page

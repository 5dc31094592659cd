"""Executing one notebook: papermill in a process of its own, its kernel ended with it, its errors in one line.

papermill marks the cells of a dead or timed-out kernel "completed" and only warns about parameters that a notebook does not
declare; so parameters are read from the `parameters` cell beforehand, and only the exit code says whether it worked.
"""

import ast
import contextlib
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
RETRIED = ("Kernel died before replying", "ddress already in use")
"""Kernels that start at the same moment may take the same port; such a start is tried again."""


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
    started: Callable[[int], None] = lambda pid: None,
) -> tuple[int, str]:
    """Runs `notebook` to `output` with a YAML file of parameters; returns the exit code and everything it printed.

    `variables`: added to the environment. `follow` gets every line as it comes, `started` the process id. A note beside
    `output` names the process while it lives, so that a later call can end what a killed study left running.
    """
    command = [
        *(sys.executable, "-m", "papermill", str(notebook), str(output), "-f", str(parameters), "-k", KERNEL),
        *("--cwd", str(notebook.parent.absolute()), "--log-output", "--no-progress-bar"),
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
        note.write_text(json.dumps({"pid": process.pid, "created": psutil.Process(process.pid).create_time()}))
        started(process.pid)
        lines = []
        for line in process.stdout:
            lines.append(line)
            follow(line)
        code, text = process.wait(), "".join(lines)
        note.unlink()
        if not code or not any(reason in text for reason in RETRIED):
            break
    return code, text


def end_notebook(pid: int) -> None:
    """Asks the kernels under a papermill process to stop: they are in sessions of their own, so no group signal reaches them."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for kernel in psutil.Process(pid).children(recursive=True):
            kernel.send_signal(signal.SIGTERM)


def end_orphan(note: Path) -> None:
    """Ends the notebook that a killed study left running in this folder, so that two never write there at once."""
    if not note.exists():
        return
    known = json.loads(note.read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(known["pid"])
        if process.create_time() == known["created"]:
            family = [*process.children(recursive=True), process]
            end_notebook(process.pid)
            process.terminate()
            for survivor in psutil.wait_procs(family, timeout=30)[1]:
                survivor.kill()


def error_text(output: str) -> str:
    """The last `SomethingError: message` line that a failed notebook printed, with its continuation lines."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    found = list(
        re.finditer(
            r"^(?:[\w.]+\.)?(\w+(?:Error|Exit|Interrupt|Loss|Interrupted)): ?(.*(?:\n  .*)*)", plain, re.MULTILINE
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

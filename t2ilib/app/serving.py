"""The server: who may reach it, what it gives out, and how it starts and ends.

It listens on this machine alone unless another host, or a public address, is asked for. It gives out the page and copies of what was drawn for
it, from a folder of its own, and no file by its path; the page asks no other server for anything, and is told not to.
"""

import errno
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from t2ilib.app.studio import Studio
from t2ilib.config import ConfigError

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PORT, PORTS = 7860, 100
"""The first port that is tried, and how many."""
LARGEST_UPLOAD = "64mb"
REMOTE = re.compile(r"/(file|proxy)=\s*[a-z][a-z0-9+.-]*:", re.IGNORECASE)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:;"
    " worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""What a browser may load for the page: what comes from this server."""


@dataclass(frozen=True)
class Options:
    """`model`: the base to begin with, None for that of the first adapter, or tiny-sdxl; `adapters`: none means the newest that goes with it;
    `out`: None for `app` under the results."""

    model: str | None = None
    adapters: Sequence[str] = ()
    results: Path = Path("results")
    out: Path | None = None
    host: str = LOOPBACK
    port: int = PORT
    share: bool = False


class Guard:
    """Between the server and Gradio: fetches nothing from elsewhere for a visitor, and tells browsers to load nothing from there."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and REMOTE.search(unquote(scope["path"])):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"nothing is fetched from elsewhere"})
            return

        async def told(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = message | {"headers": [*message.get("headers", []), *own]}
            await send(message)

        await self.app(scope, receive, told)


def serve(options: Options, wait: bool = True) -> tuple[Any, Studio]:
    """Starts the app and, with `wait`, serves until it is interrupted; returns the page and the studio.

    Raises ConfigError where Gradio is missing, and for a base, an adapter, a host or ports that cannot be used.
    """
    require_gradio()
    port = free_port(options.host, options.port)
    studio = Studio(options.results, options.model, options.adapters, options.out)
    settle(studio.served)
    for line in warnings(options):
        log.warning(line)
    try:
        import gradio as gr

        from t2ilib.app.page import STYLE, build_page

        page = build_page(studio)
        page.launch(
            server_name=options.host,
            server_port=port,
            share=options.share,
            prevent_thread_lock=True,
            quiet=True,
            allowed_paths=[],
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            max_file_size=LARGEST_UPLOAD,
            theme=gr.themes.Default(
                primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            css=STYLE,
            app_kwargs={"middleware": [guarded()]},
        )
    except BaseException:
        studio.close()
        raise
    if options.share and not page.share_url:
        log.warning("--share: no public address could be made; Gradio's servers, or its program, were not reached")
    for line in addresses(options, port, page.share_url):
        print(line, flush=True)
    if wait:
        signal.signal(signal.SIGTERM, end)  # or what was served would stay
        try:
            page.block_thread()
        finally:
            studio.close()
    return page, studio


def end(*_: Any) -> None:
    """Ends in order; a second signal ends at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(128 + signal.SIGTERM)


def guarded() -> Any:
    from starlette.middleware import Middleware

    return Middleware(Guard)


def require_gradio() -> None:
    """Raises ConfigError where Gradio is not installed. It is told to report nothing to anybody before it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the app needs Gradio: pip install 't2ilib[app]' ({error})") from None


def settle(folder: Path) -> None:
    """Gradio's files go into `folder`, and nothing that the environment says opens others."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(folder / "examples")
    for name in ("GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "GRADIO_MCP_SERVER"):
        os.environ.pop(name, None)


def free_port(host: str, first: int) -> int:
    """The first port from `first` on that nobody listens on. Raises ConfigError where there is none, or no such host."""
    for port in range(first, min(first + PORTS, 65536)):
        try:
            place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise ConfigError(f"--host {host}: there is no such address here ({error.strerror or error})") from None
        with socket.socket(place[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(place[4])
            except PermissionError:
                raise ConfigError(f"--port {port} may not be used by everybody: take one from 1024 on") from None
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise ConfigError(f"--host {host}: it cannot be listened on ({error.strerror})") from None
                continue
        if port != first:
            print(f"port {first} is taken, so it is {port}", flush=True)
        return port
    raise ConfigError(f"ports {first} to {first + PORTS - 1} are all taken: name another one with --port")


def warnings(options: Options) -> list[str]:
    """What is to be known of who can reach the app."""
    said = []
    if options.share:
        said.append(
            "--share: Gradio makes a public address, for which it downloads a program and sends all traffic over its servers; whoever has the"
            " address can draw on this machine, load models and adapters by path, and see that files exist"
        )
    if options.host not in (LOOPBACK, "localhost", "::1"):
        said.append(
            f"--host {options.host}: whoever reaches this machine over the network can draw on it, load models and adapters by path, and see that"
            " files exist; there is no password"
        )
    return said


def addresses(options: Options, port: int, shared: str | None) -> list[str]:
    """Where the app is found."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    lines = [f"the app is at http://{host}:{port} (Ctrl+C ends it)"]
    return lines + ([f"and, for everybody, at {shared}"] if shared else [])

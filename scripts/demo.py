"""`make demo`: makes the default project, trains and serves its model, and asks it once."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any
from urllib.error import URLError

from rich.console import Console
from rich.markup import escape

REPOSITORY = Path(__file__).parents[1]
BUILD = REPOSITORY / "build"
PROJECT = BUILD / "fraud-detection"
READY_TIMEOUT_S = 60

console = Console(highlight=False)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Says what is done, and how long it took."""
    started = monotonic()
    with console.status(f"{title} ..."):
        yield
    console.print(f"[green]✓[/] {title} [dim]{monotonic() - started:.1f} s[/]")


def stop_because(message: str) -> None:
    console.print(f"[red]✗[/] {escape(message)}")
    sys.exit(1)


def run(*command: str, cwd: Path) -> None:
    """Run quietly; show what was printed only if it fails."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode:
        console.out(result.stdout + result.stderr)
        stop_because(f"{shlex.join(command)} failed, see above.")


def ask(url: str, body: Any = None) -> Any:
    """The JSON that `url` answers to a GET, or to a POST of `body`."""
    return asked(url, body)[0]


def asked(url: str, body: Any = None) -> tuple[Any, str]:
    """The JSON, and how long it took, with what the cache had to do with it."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    started = perf_counter()
    with urllib.request.urlopen(request, timeout=10) as answer:
        content = json.load(answer)
    took = f"{(perf_counter() - started) * 1000:.1f} ms"
    return content, f"{answer.headers.get('X-Cache', 'no cache')}, {took}"


def wait_until_ready(url: str, service: subprocess.Popen[bytes], log: Path) -> None:
    deadline = monotonic() + READY_TIMEOUT_S
    while True:
        if service.poll() is not None or monotonic() > deadline:
            console.out(log.read_text(encoding="utf-8"))
            stop_because("The service did not become ready; its log is above.")
        try:
            ask(f"{url}/ready")
        except (URLError, ConnectionError):
            sleep(0.1)
        else:
            return


def is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def show(url: str) -> None:
    """Send the example of the default model, and print the request and the answer."""
    document = ask(f"{url}/openapi.json")
    operation = document["paths"]["/v1/predict"]["post"]
    [example] = operation["requestBody"]["content"]["application/json"]["schema"]["examples"]
    body = shlex.quote(json.dumps(example))
    curl = f"curl {url}/v1/predict -H 'Content-Type: application/json' -d {body}"
    answer, first = asked(f"{url}/v1/predict", example)
    _, second = asked(f"{url}/v1/predict", example)
    console.print("\n[bold]Request[/]")
    console.out(curl)
    console.print("\n[bold]Answer[/]")
    console.out(json.dumps(answer, indent=2))
    console.print(f"\n[bold]Cache[/]    {first}; asked again: {second}")
    console.print(f"[bold]Docs[/]     {url}/docs\n[bold]Metrics[/]  {url}/metrics")
    console.print(f"[bold]Status[/]   {url}/  [dim]to be opened in a browser[/]")


def main() -> None:
    started = monotonic()
    if not os.environ.get("PORT", "8080").isdecimal():
        stop_because("PORT has to be a number: make demo PORT=8081")
    port = int(os.environ.get("PORT", "8080"))
    url = f"http://localhost:{port}"
    if not is_free(port):
        stop_because(f"Port {port} is in use. Choose another: make demo PORT={port + 1}")

    with step("Made the default project"):
        bake = ["--no-input", "--overwrite-if-exists", "--output-dir", str(BUILD)]
        run(sys.executable, "-m", "cookiecutter", *bake, str(REPOSITORY), cwd=BUILD)
    with step("Installed its locked dependencies"):
        run("make", "install", cwd=PROJECT)
    python = str(PROJECT / ".venv" / "bin" / "python")
    with step("Trained the sample model"):
        run(python, "-m", "app.train", cwd=PROJECT)

    log = BUILD / "demo.log"
    environment = os.environ | {"PORT": str(port), "LOG_FORMAT": "console"}
    with log.open("wb") as output:
        service = subprocess.Popen(
            [python, "-m", "app"],
            cwd=PROJECT,
            env=environment,
            stdout=output,
            stderr=output,
            # Ctrl-C is for this process, which then stops the service as production would.
            start_new_session=True,
        )
    # A closed terminal and a kill end it as Ctrl-C does.
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with step("Started the service"):
            wait_until_ready(url, service, log)
        show(url)
        console.print(f"[bold]Project[/]  {os.path.relpath(PROJECT)}/")
        console.print(f"\nUp after {monotonic() - started:.0f} s. Ctrl-C stops it.")
        service.wait()
        console.out(log.read_text(encoding="utf-8"))
        stop_because("The service has ended; its log is above.")
    except KeyboardInterrupt:
        console.print("\nStopped.")
    finally:
        service.send_signal(signal.SIGTERM)
        service.wait()


if __name__ == "__main__":
    main()

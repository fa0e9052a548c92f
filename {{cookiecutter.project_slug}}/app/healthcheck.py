"""Whether the service here is alive, for a container engine: `python app/healthcheck.py`.

A socket and nothing else, as it is run every few seconds beside the service, where what the
standard library has may not be compiled.
"""

import os
import socket
import sys

TIMEOUT_S = 2
HERE = {"0.0.0.0": "127.0.0.1", "::": "localhost"}
"""To connect to "any address" is to connect to this host, which not every system allows."""


def main() -> None:
    address = os.environ.get("BIND_ADDRESS") or "0.0.0.0"
    port = int(os.environ.get("AIP_HTTP_PORT") or os.environ.get("PORT") or 8080)
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    try:
        with socket.create_connection((HERE.get(address, address), port), TIMEOUT_S) as service:
            service.sendall(request)
            status = service.recv(64).split(b" ")[1:2]
    except OSError as error:
        sys.exit(f"{address}:{port}: {error}")
    if status != [b"200"]:
        sys.exit(f"{address}:{port}: /health is not 200")


if __name__ == "__main__":
    main()

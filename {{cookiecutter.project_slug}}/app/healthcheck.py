"""Whether the service here is alive, for a container engine: `python -m app.healthcheck`.

The standard library alone, as it is run every few seconds, beside the service.
"""

import os
import sys
import urllib.request

TIMEOUT_S = 2


def main() -> None:
    address = os.environ.get("BIND_ADDRESS", "0.0.0.0")
    # To connect to "any address" is to connect to this host, which not every system allows.
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, address)
    url = f"http://{host}:{os.environ.get('PORT', '8080')}/health"
    try:
        # No proxy: it would be asked for an address that is this host's own.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=TIMEOUT_S):
            pass
    except OSError as error:
        sys.exit(f"{url}: {error}")


if __name__ == "__main__":
    main()

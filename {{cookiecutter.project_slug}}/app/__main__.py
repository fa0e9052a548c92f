"""Starts the service, here and in production: `python -m app`."""

import sys

from app.errors import StartupError
from app.settings import load_settings


def main() -> None:
    try:
        load_settings()
    except StartupError as error:
        sys.exit(str(error))
    # Not sooner: gunicorn reads WEB_CONCURRENCY when it is imported, and a bad one breaks that.
    from gunicorn.app.wsgiapp import run

    # It finds gunicorn.conf.py by itself.
    sys.argv = ["gunicorn"]
    run()


if __name__ == "__main__":
    main()

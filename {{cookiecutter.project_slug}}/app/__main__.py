"""Starts the service, here and in production: `python -m app`."""

import gc
import os
import sys


def main() -> None:
    # What is imported is no garbage, and to look for some takes a tenth of the start.
    # app.worker and app.serving enable it again.
    gc.disable()
    # gunicorn reads this when it is imported, and a bad one breaks that. gunicorn.conf.py says
    # what is wrong with it.
    concurrency = os.environ.pop("WEB_CONCURRENCY", None)
    from gunicorn.app.wsgiapp import run

    if concurrency is not None:
        os.environ["WEB_CONCURRENCY"] = concurrency
    # It finds gunicorn.conf.py by itself.
    sys.argv = ["gunicorn"]
    run()


if __name__ == "__main__":
    main()

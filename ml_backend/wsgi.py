"""gunicorn's entry: `gunicorn 'ml_backend.wsgi:application()'`; `sam-ml-backend serve` does it."""

from __future__ import annotations

import atexit
import logging

import torch
from flask import Flask

from ml_backend.app import create_app
from ml_backend.errors import BackendError
from ml_backend.settings import load_settings
from sam_ext.errors import SamExtError

__all__ = ["application"]

_log = logging.getLogger(__name__)

# gunicorn takes it for "do not start this worker again and again" (gunicorn.arbiter.Arbiter).
_WORKER_BOOT_ERROR = 3


def application() -> Flask:
    """Read the settings, load the model and build the app, in a worker.

    Raises:
        SystemExit: If that fails; the log says why in one sentence.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = load_settings()
        for package in ("ml_backend", "sam_ext"):
            logging.getLogger(package).setLevel(settings.log_level.upper())
        # torch takes all cores (or OMP_NUM_THREADS), and every worker has a torch.
        torch.set_num_threads(max(1, torch.get_num_threads() // settings.workers))
        app = create_app(settings)
    except (BackendError, SamExtError) as error:
        _log.critical("the backend cannot start: %s", error)
        raise SystemExit(_WORKER_BOOT_ERROR) from None
    # Otherwise an encode that nobody waits for would be cut off in the middle of a native call.
    atexit.register(app.extensions["ml_backend"].service.close)
    return app

"""Trains, evaluates and exports the models that Tenuto serves. Start at `cli.py`."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # `serving/__init__.py` says why

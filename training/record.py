"""What is written beside a model so that others can repeat it: seeds, versions, data, figures."""

import datetime as dt
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime


def versions() -> dict[str, str]:
    """Return the versions that decide the bytes of a model."""
    packages = {name: version(name) for name in ("torch", "onnx", "numpy")}
    return {
        "python": platform.python_version(),
        **packages,
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(),
    }


def revision() -> str | None:
    """Return the git revision of this code, with "-dirty" if it was changed; None outside git.

    What was exported just before is no change of the code.
    """
    changed = ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)exported"]
    try:
        found, dirty = _git("rev-parse", "HEAD"), _git(*changed)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{found}-dirty" if dirty else found


def _git(*command: str) -> str:
    done = subprocess.run(
        ["git", *command], cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def today() -> str:
    """Return today's date, UTC."""
    return dt.datetime.now(dt.UTC).date().isoformat()


def text(facts: Mapping[str, Any]) -> str:
    """Return facts as JSON for people and programs."""
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"

"""What `tenuto train` can learn: one module a task. A new module here is known without being registered."""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

from tenuto.training.task import Task


class UnknownTask(ValueError):
    """No task of that name, or a file without one; the text lists what there is."""


def names() -> list[str]:
    """Return the names of the tasks in this folder, sorted."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def find(what: str) -> Task:
    """Return the task called `what`, or the one in the Python file `what`. Raises UnknownTask."""
    if what.endswith(".py"):
        return _only_task(_module_of(Path(what)), what)
    if what not in names():
        raise UnknownTask(
            f"no task is called {what!r}; there are: {', '.join(names())}, or a file: ./mine.py"
        )
    return _only_task(importlib.import_module(f".{what.replace('-', '_')}", __name__), what)


def _module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UnknownTask(f"{path}: no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where `inspect` and pickles look for it
    spec.loader.exec_module(module)
    return module


def _only_task(module: ModuleType, where: str) -> Task:
    made = [
        thing
        for thing in vars(module).values()
        if inspect.isclass(thing) and issubclass(thing, Task) and thing.__module__ == module.__name__
    ]
    if len(made) != 1:
        raise UnknownTask(f"{where}: expected one class made from Task, got {len(made)}")
    return made[0]()

"""Waits for torch, safetensors or transformers to be imported, and only then loads what makes their saves safe.

This is all that a Python process pays for which never imports one of them. It runs in the program's own interpreter,
of any version from 3.8 on, so it uses the standard library alone.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # As in typing, which takes its time to import.
if TYPE_CHECKING:
    from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
WATCHED = (
    "torch",
    "safetensors",
    "safetensors.torch",
    "transformers.trainer",
    "lightning.pytorch.trainer.trainer",
    "pytorch_lightning.trainer.trainer",
)
_installed = False


def install() -> None:
    """Start to watch imports, once, if this process belongs to a `lastgood run`."""
    global _installed
    if _installed or "LASTGOOD_RUN" not in os.environ:
        return
    _installed = True
    sys.meta_path.insert(0, _Watch())


class _Watch:
    """A finder that finds nothing itself: it puts a call behind the import of the watched modules."""

    def __init__(self) -> None:
        self.busy: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in WATCHED or name in self.busy:
            return None
        from importlib.util import find_spec

        self.busy.add(name)
        try:
            spec = find_spec(name)
        finally:
            self.busy.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """The loader of a watched module, with our call after it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        # inspect, pickle and importlib.resources look at the loader: they must find the real one.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _patch(module)


def runtime() -> Any:
    """The package beside this directory, under a name of its own: the program may lack lastgood, or have another."""
    if "_lastgood_run" in sys.modules:
        return sys.modules["_lastgood_run"]
    from importlib.util import module_from_spec, spec_from_file_location

    directory = os.path.join(os.path.dirname(HERE), "runtime")
    spec = spec_from_file_location(
        "_lastgood_run", os.path.join(directory, "__init__.py"), submodule_search_locations=[directory]
    )
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["_lastgood_run"] = module
    spec.loader.exec_module(module)
    return module


def _patch(module: Any) -> None:
    try:
        runtime().patch(module)
    except Exception as error:
        # The training matters more than its safety net: it goes on as it would have without us, and says so.
        sys.stderr.write("lastgood run: saves are NOT made safe in this process: %r\n" % (error,))  # noqa: UP031

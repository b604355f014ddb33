"""Found first on PYTHONPATH below `lastgood run`: hands over to the hook, then to the next of its name."""

import sys

import _lastgood_hook  # type: ignore[import-not-found, unused-ignore]

_lastgood_hook.install()


def _run_the_next_one() -> None:
    # A distribution or a user may have a sitecustomize of their own; ours took its place and so has to run it.
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    elsewhere = [entry for entry in sys.path if entry != _lastgood_hook.HERE]
    spec = PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


_run_the_next_one()

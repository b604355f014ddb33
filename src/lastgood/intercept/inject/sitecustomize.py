"""Found first on PYTHONPATH below `lastgood run`: hands over to the hook, then to the next of its name."""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

if sys.version_info >= (3, 8):  # noqa: UP036 - this file runs in the Python of the program
    import _lastgood_hook  # type: ignore[import-not-found, unused-ignore]

    _lastgood_hook.install()
elif "LASTGOOD_RUN" in os.environ:
    sys.stderr.write(
        "lastgood run: this is Python %d.%d, and 3.8 or newer is needed: its saves are NOT made safe.\n"  # noqa: UP031
        % sys.version_info[:2]
    )


def _run_the_next_one():  # type: ignore[no-untyped-def]
    # A distribution or a user may have a sitecustomize of their own; ours took its place and so has to run it.
    # From where importlib.machinery and importlib.util have them: importing those would double the time of a start.
    from _frozen_importlib import module_from_spec
    from _frozen_importlib_external import PathFinder

    elsewhere = [entry for entry in sys.path if os.path.abspath(entry) != HERE]
    spec = PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if sys.version_info >= (3, 5):  # noqa: UP036
    _run_the_next_one()  # type: ignore[no-untyped-call]

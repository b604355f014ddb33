"""Every error that lastgood raises on purpose.

A message says what happened to which file, what was kept and where, and what to do. The lower-level exception, where
there is one, is the ``__cause__``.
"""


class LastGoodError(Exception):
    """The base of all errors of this package."""


class DamagedError(LastGoodError):
    """Data on disk failed a check: missing, short, altered, or of an unknown format."""


class RefusedError(LastGoodError):
    """Reading the file would need to run code from it, or to follow a path out of its directory."""


class MismatchError(LastGoodError):
    """The checkpoint and the objects that should be restored from it have different names, shapes or types."""


class RunHeldError(LastGoodError):
    """Another job holds the run directory."""


class ReplacedError(LastGoodError):
    """A later job has taken the run: this one may neither commit nor delete any more."""


class SaveError(LastGoodError):
    """A save was not committed. The last good checkpoint is untouched."""


class PeerError(LastGoodError):
    """Another rank did not answer before the deadline, or its connection is closed."""

"""What lastgood raises."""


class LastGoodError(Exception):
    """Every error that lastgood raises on purpose: what happened to which file, and what to do."""


class DamagedError(LastGoodError):
    """Data fail a check: a checksum, a length, or a structure that no save writes."""


class RefusedError(LastGoodError):
    """Reading would need to run code from the file; nothing of it was run."""

"""What lastgood_sovits raises."""


class SovitsError(Exception):
    """Every error that lastgood_sovits raises on purpose."""

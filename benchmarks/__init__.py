"""lastgood beside its peers and beside the disk, measured in one run: ``python -m benchmarks``."""

"""A GPT-SoVITS trainer (both stages) on top of `lastgood`."""

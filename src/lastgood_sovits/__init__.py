"""A GPT-SoVITS trainer on lastgood: both stages, upstream's files in and out."""

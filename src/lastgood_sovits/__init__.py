"""A GPT-SoVITS trainer built on lastgood."""

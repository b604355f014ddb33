"""Stage 2 (SoVITS): from semantic codes, phonemes and a reference voice to a waveform."""

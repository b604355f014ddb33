"""Checkpoints that are saved once, whole and verified, and a job that always continues from the last good one."""

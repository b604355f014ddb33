"""The trainer: both stages as programs of one process or many, resumed exactly."""

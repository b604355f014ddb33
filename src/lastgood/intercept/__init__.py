"""`lastgood run`: safe saving for training programs that do not know lastgood.

``launch`` starts the program with ``inject`` on its PYTHONPATH; the hook there loads ``runtime`` when the program
imports torch. Nothing of lastgood but these two directories is needed in the program's own Python.
"""

"""``python -m lastgood_sovits`` is ``lastgood sovits``."""

from lastgood_sovits.cli import main

if __name__ == "__main__":
    main(prog_name="lastgood sovits")

"""``python -m lastgood``: the command line."""

from lastgood.cli import main

if __name__ == "__main__":
    main(prog_name="lastgood")

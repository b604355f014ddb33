"""The command line: ``lastgood COMMAND``. One file a command, loaded when it is used."""

from __future__ import annotations

import click

from lastgood.cli.group import LazyGroup
from lastgood.cli.i18n import localize, speak_click
from lastgood.program import lastgood_version

COMMANDS = {
    "ls": "lastgood.cli.ls:ls",
    "show": "lastgood.cli.show:show",
    "verify": "lastgood.cli.verify:verify",
    "diff": "lastgood.cli.diff:diff",
    "export": "lastgood.cli.export:export",
    "import": "lastgood.cli.import_:import_",
    "prune": "lastgood.cli.prune:prune",
    "stop": "lastgood.cli.stop:stop",
    "doctor": "lastgood.cli.doctor:doctor",
    "run": "lastgood.cli.run:run",
    "demo": "lastgood.cli.demo:demo",
}
"""Name to module and attribute. Other packages add theirs through the entry points group ``lastgood.commands``."""


@click.group(cls=LazyGroup, commands_at=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(lastgood_version(), prog_name="lastgood", message="%(prog)s %(version)s")
def main() -> None:
    """Checkpoints of PyTorch training: look at them, check them, take them out, clean them up.

    Every command that only reads works while a job is saving. Chinese: LASTGOOD_LANG=zh.
    """


speak_click()
localize(main)

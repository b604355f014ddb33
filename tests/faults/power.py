"""Power cuts on real file systems."""

from tests.faults.report import Result

SYSTEMS = ("ext4",)


def run(*, cuts: int, systems: object) -> Result:
    return Result("Power cuts on real file systems")

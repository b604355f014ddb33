"""The fault campaigns from the command line.

    python -m tests.faults crash --ranks 1,2      kill at every disk operation
    python -m tests.faults ddp                    a DDP job killed and resumed
    python -m tests.faults states                 every state of the disk after a power cut, and every fsync left out
    python -m tests.faults failing                full and failing disks
    python -m tests.faults power                  power cuts on real file systems
    python -m tests.faults soak                   thousands of saves with random kills
    python -m tests.faults hostile                thousands of hostile files of every kind
    python -m tests.faults jobs                   two jobs on one run; runs that are copied, moved, put back
    python -m tests.faults damage                 flipped bits and lost sectors
    python -m tests.faults network                two hosts whose link is cut, slow or lossy
    python -m tests.faults peers                  kills, flipped bits and full disks, beside what others lose
    python -m tests.faults --full                 all of them, in their full form

With --record, and with --full for all, the figures go into docs/faults.md. The exit code is 1 when anything failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from tests.faults import crash, damage, ddp, failing, hostile, hosts, losses, network, power, powerloss, soak, twojobs
from tests.faults.report import Result, record


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")


def _crash(options: argparse.Namespace) -> Result:
    worlds = options.ranks or ([1, 2, 4] if options.full else [1, 2])
    return crash.run(
        worlds,
        kinds=options.kinds or (crash.jobs.KINDS if options.full else ["replicated"]),
        scenarios=options.scenarios or ["old", "new"],
        victims=options.victims,
        workers=options.workers,
    )


def _states(options: argparse.Namespace) -> Result:
    return powerloss.run(full=options.full)


def _failing(options: argparse.Namespace) -> Result:
    return failing.run(list(failing.cases(options.errors or failing.ERRORS)), options.workers)


def _power(options: argparse.Namespace) -> Result:
    return power.run(cuts=options.cuts or (200 if options.full else 20), systems=options.systems or power.SYSTEMS)


def _ddp(options: argparse.Namespace) -> Result:
    return ddp.run_campaign(options.count or (60 if options.full else 12))


def _soak(options: argparse.Namespace) -> Result:
    return soak.run(saves=options.saves or (10_000 if options.full else 300), seconds=3600.0 * options.full)


def _hostile(options: argparse.Namespace) -> Result:
    return hostile.run(count=options.count or (20_000 if options.full else 300), only=options.files or ())


def _jobs(options: argparse.Namespace) -> Result:
    return twojobs.run(count=options.count or (50 if options.full else 3))


def _damage(options: argparse.Namespace) -> Result:
    return damage.run(positions=options.count or 10_000)


def _network(options: argparse.Namespace) -> Result:
    return network.run(list(network.cases(1 if options.full else 4)))


def _peers(options: argparse.Namespace) -> Result:
    count = options.count or (200 if options.full else 25)
    return losses.run(kills=count, flips=count, names=options.files or ())


CAMPAIGNS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "crash": _crash,
    "ddp": _ddp,
    "states": _states,
    "failing": _failing,
    "power": _power,
    "soak": _soak,
    "hostile": _hostile,
    "jobs": _jobs,
    "network": _network,
    "peers": _peers,
    "damage": _damage,
}


def main(arguments: list[str]) -> int:
    """Run the campaigns that were asked for. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Fault campaigns of lastgood.")
    parser.add_argument("campaign", nargs="?", choices=[*CAMPAIGNS], help="all of them when left out")
    parser.add_argument("--full", action="store_true", help="every combination, for hours if need be")
    parser.add_argument("--record", action="store_true", help="write the figures into docs/faults.md")
    parser.add_argument("--workers", type=int, default=3, help="processes side by side")
    parser.add_argument("--ranks", type=_numbers, help="crash: world sizes")
    parser.add_argument("--victims", type=_numbers, help="crash: ranks to kill; all by default")
    parser.add_argument("--kinds", type=_words, help=f"crash: of {', '.join(crash.jobs.KINDS)}")
    parser.add_argument("--scenarios", type=_words, help="crash: of old, new")
    parser.add_argument("--errors", type=_words, help=f"failing: of {', '.join(failing.ERRORS)}")
    parser.add_argument("--systems", type=_words, help=f"power: of {', '.join(power.SYSTEMS)}")
    parser.add_argument("--cuts", type=int, help="power: on each file system")
    parser.add_argument("--saves", type=int, help="soak: at least so many; with --full for an hour besides")
    parser.add_argument("--count", type=int, help="so many of each kind; ddp: kills; damage: flipped bits")
    parser.add_argument("--files", type=_words, help="hostile, peers: only those with one of these words in the name")
    options = parser.parse_args(arguments)
    if options.campaign is None and not options.full:
        parser.error("name a campaign, or pass --full for all of them")
    bad = 0
    for name in [options.campaign] if options.campaign else CAMPAIGNS:
        try:
            result = CAMPAIGNS[name](options)
        except (power.NotHereError, hosts.NotAllowedError) as error:
            print(f"{name} could not be tried: {error}", flush=True)
            continue
        bad += len(result.failed)
        for problem in result.failed:
            print("FAILED", problem)
        print(result.text(), flush=True)
        if options.record or options.campaign is None:
            wanted = [argument for argument in arguments if argument != "--record"]
            # A record of other world sizes stands beside the usual one.
            key = f"{name} --ranks {','.join(map(str, options.ranks))}" if options.ranks else name
            record(key, result, " ".join(["python -m tests.faults", *wanted]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The tables and plots."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import torch

import lastgood
from benchmarks.measure import Series, median
from benchmarks.peers import ALL
from benchmarks.scenarios import Bench


def publish(bench: Bench, docs: Path | None, options: str) -> None:
    """Print the tables; where `docs` is given, write benchmarks.md and the plots there.

    Args:
        options: of the command line: where they name a part, only that was measured.
    """
    text = _goals(bench) + "\n" + _peers(bench.series)
    text += "".join(f"\n{what}\n\n{_peers(series)}" for what, series in bench.others.items())
    print("\n" + text)
    if docs is None:
        return
    plots = _plots(bench, docs / "benchmarks")
    page = (
        "# Measured\n\n"
        f"{_machine(bench)}\n\n"
        f"Made by `{f'python -m benchmarks {options}'.strip()}` (the extra `bench` installs the peers). "
        "Contenders take turns within every "
        "round, after rounds to warm up, and all figures are medians. Where other programs used the machine at the "
        "same time, ratios say more than seconds.\n\n"
        + _goals(bench)
        + "\n## Beside the peers\n\n"
        + _peers(bench.series)
        + "".join(f"\n### {what}\n\n{_peers(series)}" for what, series in bench.others.items())
        + "".join(f"\n![{name}](benchmarks/{name}.svg)\n" for name in plots)
    )
    (docs / "benchmarks.md").write_text(page, encoding="utf-8")


def _machine(bench: Bench) -> str:
    parts = [f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"]
    if bench.device == "cuda":
        parts.append(torch.cuda.get_device_name())
    free = shutil.disk_usage(".")
    parts.append(f"a disk of {free.total >> 30} GiB")
    parts.append(f"Python {platform.python_version()}, torch {torch.__version__}, lastgood {_version()}")
    return "Machine: " + "; ".join(parts) + "."


def _version() -> str:
    return str(getattr(lastgood, "__version__", "from source"))


def _goals(bench: Bench) -> str:
    lines = ["| what | goal | measured | reached |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.goal} | {row.value} | {'yes' if row.reached else 'no'} |" for row in bench.rows]
    return "\n".join(lines) + "\n"


def _peers(measured: dict[str, Series]) -> str:
    if not measured:
        return ""
    lines = [
        "| | held up, step of 0.5 s (ms) | held up, step at once (ms) | complete (s) | restore, cold (s) | promises |",
        "|---|---|---|---|---|---|",
    ]
    promises = {kind.name: kind.promises for kind in ALL}
    for name, series in measured.items():
        lines.append(f"| {name} | {_cells(series)} | {promises[name]} |")
    better = []
    ours = measured["lastgood"]
    for name, series in measured.items():
        if name in ("lastgood", "disk alone"):
            continue
        for what in ("hold", "hold_at_once", "durable", "restore"):
            theirs, mine = median(getattr(series, what)), median(getattr(ours, what))
            if theirs < 0.97 * mine:
                better.append(f"{name} ({what.replace('_', ' ')}: {theirs:.3f} s, lastgood {mine:.3f} s)")
    note = "Better at something than lastgood: " + ("; ".join(better) if better else "none here") + ".\n"
    return "\n".join(lines) + "\n\n" + note


def _cells(series: Series) -> str:
    if series.why_not:
        return f"not measured: {series.why_not.splitlines()[0][:80]} | | |"
    return (
        f"{median(series.hold) * 1e3:.1f} | {median(series.hold_at_once) * 1e3:.1f} | {median(series.durable):.2f} | "
        f"{median(series.restore):.2f}"
    )


def _plots(bench: Bench, directory: Path) -> list[str]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    names = []
    for what, label, scale in (
        ("hold", "training held up (ms)", 1e3),
        ("durable", "until complete (s)", 1.0),
        ("restore", "restore, cold cache (s)", 1.0),
    ):
        rows = [(name, median(getattr(s, what)) * scale) for name, s in bench.series.items() if getattr(s, what)]
        if not rows:
            continue
        figure, axes = pyplot.subplots(figsize=(7, 0.35 * len(rows) + 1))
        labels, values = zip(*reversed(rows), strict=True)
        axes.barh(labels, values, color=["#c44e52" if name == "lastgood" else "#8da0cb" for name in labels])
        if what == "hold":
            axes.set_xscale("log")
        axes.set_xlabel(label)
        figure.tight_layout()
        figure.savefig(directory / f"{what}.svg")
        pyplot.close(figure)
        names.append(what)
    return names

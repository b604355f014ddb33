"""What `lastgood run` would do for a command, without running it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from lastgood.intercept import launch, presets
from lastgood.intercept.runtime.settings import Settings

_ASK = (
    "import json, sys, importlib.metadata as m\n"
    "def v(n):\n"
    "    try: return m.version(n)\n"
    "    except m.PackageNotFoundError: return None\n"
    "print(json.dumps([sys.version.split()[0], {n: v(n) for n in "
    "('torch', 'safetensors', 'transformers', 'lightning', 'pytorch-lightning')}]))"
)


def examine(command: list[str], settings: Settings, directory: Path) -> list[str]:
    """Lines for a person: what would be intercepted, with which presets, and what is known to be wrong."""
    lines = []
    blind = launch.blind_python(command)
    lines.append(f"NOT intercepted: {blind}" if blind else "Every Python that this command starts would be reached.")
    lines += _packages(command[0])
    lines.append(
        "Intercepted: torch.save, safetensors save_file, open(..., 'w') of checkpoint files, shutil.move and copyfile, "
        "os.replace and os.rename; checked: torch.load, safetensors load_file and safe_open."
    )
    name = presets.recognise(command)
    defects = presets.gpt_sovits_defects(command, directory)
    if name:
        lines.append(f"Preset {name}: {presets.PRESETS[name].says}.")
    elif defects is not None:
        lines.append(f"Preset gpt-sovits in the trainers that this starts: {presets.PRESETS['gpt-sovits'].says}.")
    if settings.complete:
        lines.append(f"Checkpoints of several files: {', '.join(settings.complete)}.")
    if defects is not None:
        lines.append(f"This is a GPT-SoVITS checkout with {len(defects)} known saving defects:")
        lines += [f"  {defect}" for defect in defects]
    lines += _places(directory, settings)
    return lines


def _packages(python: str) -> list[str]:
    if not os.path.basename(python).lower().startswith("python"):
        return [f"{python} is no Python itself; the Pythons that it starts are reached through PYTHONPATH."]
    try:
        answer = subprocess.run(
            [python, "-c", _ASK], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=True
        )
        version, packages = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return [f"{python} could not be asked for its packages: {error}"]
    lines = [f"Python {version}; " + ", ".join(f"{name} {found}" for name, found in packages.items() if found)]
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 8):
        lines.append("This Python is too old: 3.8 or newer is needed.")
    torch = packages["torch"]
    if torch is None:
        lines.append("There is no torch in this Python: nothing of torch would be intercepted.")
    elif not torch.startswith("2."):
        lines.append(f"torch {torch} is not known: lastgood run would switch itself off with a warning.")
    return lines


def _places(directory: Path, settings: Settings) -> list[str]:
    lines = []
    if not os.access(directory, os.W_OK):
        lines.append(f"{directory} cannot be written to: programs that save through the working directory will fail.")
    if settings.mirror and Path(settings.mirror).resolve() == directory.resolve():
        lines.append("The mirror is the working directory itself: it would keep copies beside the files.")
    return lines

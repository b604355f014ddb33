"""The command line as a program: it starts at once, speaks the user's language, and never shows a traceback."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from catalogue import shown_texts
from click.testing import CliRunner, Result

import lastgood.cli
from lastgood.cli import main
from lastgood.cli.texts import CHINESE

Call = Callable[..., Result]
HAN = re.compile(r"[一-鿿]")


def program(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lastgood", *map(str, arguments)]
    neutral = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "LASTGOOD"))}
    env = {**neutral, "PYTHONUTF8": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env, timeout=60, check=False)


def test_commands_that_read_manifests_start_without_torch(branched: Path) -> None:
    script = (
        "import sys\nfrom lastgood.cli import main\n"
        "for arguments in (['--help'], ['ls', RUN], ['show', RUN], ['verify', '--full', RUN], ['stop', RUN],"
        " ['prune', '--keep-last', '9', RUN]):\n"
        "    try: main([a if a != 'RUN' else RUN for a in arguments])\n"
        "    except SystemExit as end: assert not end.code, arguments\n"
        "    assert 'torch' not in sys.modules, arguments\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"RUN = {str(branched)!r}\n{script}"], capture_output=True, text=True, check=False
    )
    (branched / "stop").unlink()
    assert done.returncode == 0, done.stderr


def test_load_stays_a_function_whatever_is_imported() -> None:
    script = (
        "import lastgood, lastgood.checkpointer, lastgood.loading; assert lastgood.Checkpointer; lastgood.load.__call__"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_every_public_name_is_there() -> None:
    assert all(getattr(lastgood, name) is not None for name in lastgood.__all__)
    with pytest.raises(AttributeError):
        _ = lastgood.Checkpoint


def test_version_and_usage_errors(call: Call) -> None:
    assert call("--version").stdout.startswith("lastgood ")
    assert call("no-such-command").exit_code == 2
    assert call("ls").exit_code == 2


def test_an_error_is_one_sentence_on_standard_error(tmp_path: Path) -> None:
    done = program("ls", tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"lastgood: {tmp_path} is not a run: it holds no checkpoints\n"


def test_every_text_is_translated() -> None:
    shown = shown_texts()
    assert shown - CHINESE.keys() == set()
    for english, chinese in CHINESE.items():
        assert sorted(re.findall(r"\{.*?\}", english)) == sorted(re.findall(r"\{.*?\}", chinese)), english


def test_no_translation_is_left_over() -> None:
    from lastgood.cli.texts_click import CHINESE_OF_CLICK

    assert CHINESE.keys() - shown_texts() - CHINESE_OF_CLICK.keys() == set()


@pytest.mark.parametrize("environment", [{"LASTGOOD_LANG": "zh"}, {"LC_ALL": "zh_CN.UTF-8"}, {"LANG": "zh_TW.UTF-8"}])
def test_chinese_by_the_locale_or_by_wish(environment: dict[str, str]) -> None:
    if os.name == "nt" and "LASTGOOD_LANG" not in environment:
        pytest.skip("needs POSIX: on Windows the language of the user's account counts")
    done = program("ls", "--help", **environment)
    assert "列出运行目录" in done.stdout and "显示此帮助并退出" in done.stdout
    assert "Usage" not in done.stdout and "Show this" not in done.stdout


def test_chinese_output_is_not_half_english(branched: Path) -> None:
    lines = program("ls", branched, LASTGOOD_LANG="zh").stdout.splitlines()
    assert lines[0].split()[:3] == ["步", "代", "分支"] and "当前" in lines[1]
    helped = program("doctor", "--help", LASTGOOD_LANG="zh").stdout
    for line in helped.splitlines():
        assert not line.strip() or HAN.search(line), line


def test_english_where_the_terminal_has_no_chinese_or_the_user_wants_it() -> None:
    assert "Usage:" in program("--help", LC_ALL="zh_CN.UTF-8", LASTGOOD_LANG="en").stdout
    assert "Usage:" in program("--help", LASTGOOD_LANG="zh", PYTHONUTF8="0", PYTHONIOENCODING="ascii").stdout


def test_other_packages_add_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        importlib.metadata.EntryPoint("extra", "lastgood_extra_of_a_test:main", "lastgood.commands"),
        importlib.metadata.EntryPoint("ls", "lastgood_extra_of_a_test:main", "lastgood.commands"),
        importlib.metadata.EntryPoint("absent", "lastgood_not_installed:main", "lastgood.commands"),
    ]
    monkeypatch.setattr("lastgood.cli.group._entry_points", lambda: points)
    module = type(sys)("lastgood_extra_of_a_test")
    module.main = click.Command("extra", callback=lambda: click.echo("from elsewhere"), help="Do more.")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert CliRunner().invoke(main, ["extra"]).output == "from elsewhere\n"
    listing = CliRunner().invoke(main, ["--help"]).output
    assert "Do more." in listing and "absent  (" in listing
    assert listing.count("  ls ") == 1
    result = CliRunner().invoke(main, ["ls", "--help"])
    assert "mirror" in result.output


def test_patterns_of_run_and_the_words_of_its_program_are_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(click.Group, "main", lambda self, args, **extra: asked.append(extra))
    for words in (["run", "--complete", "checkpoint-*", "--", "python", "*"], ["verify", "*"]):
        monkeypatch.setattr(sys, "argv", ["lastgood", *words])
        main()
    assert [extra.get("windows_expand_args", True) for extra in asked] == [False, True]

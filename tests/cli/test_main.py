"""pe-spatial COMMAND and tools/COMMAND.py: one function, a fast --help, errors as one sentence."""

import re
import subprocess
import sys

import pytest
from helpers.repository import REPO

from pe_spatial.cli.main import COMMANDS, Command, build_parser, main


def test_overview_lists_every_command_and_the_missing_extras(capsys, monkeypatch):
    main(["--help"])
    out = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in out
        assert command.help in out
    monkeypatch.setattr(Command, "missing_extras", lambda self: list(self.extras))
    main([])
    out = capsys.readouterr().out
    assert "(needs pip install 'pe_spatial[openmmlab,sam2]')" in out
    with pytest.raises(SystemExit, match=r"error: track needs pip install 'pe_spatial\[openmmlab,sam2\]'"):
        main(["track", "cat.mp4"])


def test_every_command_has_a_tool():
    tools = {path.stem: path.read_text() for path in (REPO / "tools").glob("*.py")}
    assert tools.keys() == COMMANDS.keys()
    assert all(f'main(command="{name}")' in text for name, text in tools.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name):
    parser = build_parser(name)
    assert parser.format_help().startswith(f"usage: pe-spatial {name} ")
    assert "--traceback" in parser.format_help()
    assert "python tools/" not in parser.description
    assert not re.search(r"\S {4,}[^ #]", parser.description)  # lines that a backslash joined


def test_help_imports_nothing_heavy():
    """So that it takes a tenth of a second, with torch alone installed or nothing."""
    script = (
        "import sys; from pe_spatial.cli.main import COMMANDS, build_parser, main; main(['--help'])\n"
        "for name in COMMANDS: build_parser(name).format_help()\n"
        "heavy = {'torch', 'mmengine', 'mmcv', 'cv2', 'numpy', 'timm', 'PIL'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.stderr.strip(), done.returncode) == ("", 0)


def test_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        main(["swap-backbon"])
    assert end.value.code == 2
    assert "Did you mean swap_backbone?" in capsys.readouterr().err


def test_dashes_and_underscores_are_the_same(capsys):
    with pytest.raises(SystemExit) as end:
        main(["swap-backbone", "--help"])
    assert end.value.code == 0
    assert "usage: pe-spatial swap_backbone" in capsys.readouterr().out

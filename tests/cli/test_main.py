"""pe-spatial COMMAND and tools/COMMAND.py: one function, a fast --help, errors as one sentence."""

import argparse
import errno
import os
import re
import subprocess
import sys
import types
import warnings

import pytest
from helpers.repository import REPO

import pe_spatial
from pe_spatial.atomic import atomic_write
from pe_spatial.cli.main import COMMANDS, Command, build_parser, errors_as_sentences, main


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


def test_failed_imports_point_to_doctor():
    with pytest.raises(SystemExit, match="error: libGL is missing; pe-spatial doctor shows"):
        with errors_as_sentences(traceback=False):
            raise ImportError("libGL is missing", name="cv2")
    with pytest.raises(ImportError), errors_as_sentences(traceback=False):
        raise ImportError("a mistake of ours", name="pe_spatial.images")


def test_warnings_of_mmdet_about_its_own_code_are_not_shown(monkeypatch, recwarn):
    def run(_):
        for name in ("mmdet.models.roi_heads", "pe_spatial.integrations"):
            warnings.warn_explicit("use clone()", UserWarning, "x.py", 1, module=name)

    module = types.SimpleNamespace(add_arguments=lambda _: None, run=run)
    monkeypatch.setattr("pe_spatial.cli.main._module", lambda _: module)
    monkeypatch.setattr(Command, "missing_extras", lambda _: [])
    main(["predict"])
    assert len(recwarn) == 1


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep_layers", "c.py", "--layers", "1,,2"], "'1,,2' is not integers with commas between them"),
        (["show_features", "a.png", "--layers", "some"], "or all"),
        (["train", "c.py", "--batch", "many"], "'many' is neither an integer nor auto"),
        (["track", "v.mp4", "--checkpoint", "c", "--out", "o", "--box", "1:1..2,3,4,5"], "is not ID[@FRAME]: and 4"),
    ],
)
def test_arguments_that_cannot_be_read_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        build_parser(arguments[0]).parse_args(arguments[1:])
    assert message in capsys.readouterr().err


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


UNWRITABLE = ["/proc/nope/x", "/dev/null/x"]


@pytest.mark.parametrize("path", UNWRITABLE)
def test_folders_that_cannot_be_written_are_one_sentence(path):
    def write():
        with errors_as_sentences(traceback=False), atomic_write(path):
            pass

    with pytest.raises(SystemExit, match=rf"^error: {path.rpartition('/')[0]}.*: (No such file|File exists).*; check"):
        write()


def test_a_full_disk_is_one_sentence():
    def fail():
        with errors_as_sentences(traceback=False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SystemExit, match=r"^error: No space left on device; free some space"):
        fail()


def test_errors_of_the_program_keep_their_traceback():
    def fail(error):
        with errors_as_sentences(traceback=False):
            raise error

    for error in (OSError("a library's"), TypeError("a bug")):
        with pytest.raises(type(error)):
            fail(error)


def test_version_is_that_of_the_package(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"pe_spatial {pe_spatial.__version__}\n"
    assert "version = attr: pe_spatial.__version__" in (REPO / "setup.cfg").read_text()


def test_help_names_the_folder_that_is_written():
    assert "work_dirs/<name of the config>_layers" in " ".join(build_parser("sweep_layers").format_help().split())


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_shown_in_one_way(name):
    parser = build_parser(name)
    text = " ".join(parser.format_help().split())
    assert not re.search(r"\(default [^:]", text)
    for action in parser._actions:
        if action.option_strings and action.default not in (None, False, {}, [], (), argparse.SUPPRESS):
            assert text.count("(default: ", text.index(action.option_strings[0])), action
    assert not re.search(r"\(default: [()\[\]]", text)

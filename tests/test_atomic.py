"""Files and folders are complete or as they were."""

import stat

import pytest

from pe_spatial.atomic import atomic_folder, atomic_write


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "sub" / "file.png"
    for text in ("old", "new"):
        with atomic_write(path) as unfinished:
            unfinished.write_text(text)
            assert unfinished.suffix == ".png"
            assert unfinished.name.startswith(".")
            assert path.exists() is (text == "new")
        assert path.read_text() == text

    def fail():
        with atomic_write(path) as unfinished:
            unfinished.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("file.png", "new")]


def test_a_file_has_the_permissions_of_a_new_file(tmp_path):
    (tmp_path / "new").touch()
    with atomic_write(tmp_path / "file") as unfinished:
        unfinished.chmod(0o600)  # as safetensors does
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "new").stat().st_mode)


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "sub" / "folder"

    def fail():
        with atomic_folder(path) as unfinished:
            (unfinished / "a").touch()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert not list(path.parent.iterdir())
    with atomic_folder(path) as unfinished:
        assert unfinished.name.startswith(".")
        (unfinished / "a").touch()
        assert not path.exists()
    assert [p.name for p in path.iterdir()] == ["a"]

    def twice():
        with atomic_folder(path) as unfinished:
            (unfinished / "b").touch()

    with pytest.raises(OSError, match="folder"):
        twice()
    assert [p.relative_to(tmp_path).as_posix() for p in path.parent.rglob("*")] == ["sub/folder", "sub/folder/a"]

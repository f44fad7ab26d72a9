"""Files are complete or as they were."""

import pytest

from pe_spatial.atomic import atomic_write


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

"""tools/eval_vos.py as a user runs it."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers.repository import REPO, command, tool

pytest.importorskip("cv2")  # comes with OpenMMLab

from helpers.golden import read_json

from pe_spatial.tracking.vos.masks import write_mask

pytestmark = pytest.mark.mmseg


def failing(*args, cwd):
    """Run the tool, which must fail, and return the last line that it prints."""
    done = subprocess.run(
        [sys.executable, str(REPO / "tools/eval_vos.py"), *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_outputs(golden, tmp_path):
    golden = golden / "jandf"
    out = ["--json", tmp_path / "new/scores.json", "--csv", tmp_path / "objects.csv"]
    printed = tool("eval_vos", golden / "davis", golden / "results", *out, "--workers", 2, cwd=tmp_path)
    assert "5 sequences, 10 objects, protocol davis" in printed
    assert "| 69.0 | 66.4 | 71.6 | 1.1 | 71.6 | 72.9 | 7.1 |" in printed
    assert "3 frames with void pixels" in printed
    assert "64/64" in printed  # the bar

    expected = read_json(golden / "expected.json")
    got = json.loads((tmp_path / "new/scores.json").read_text())
    assert got["protocol"] == "davis"
    assert set(got) == {"protocol", "global_results", "per_sequence", "per_object", "per_frame", "counts"}
    for key, value in expected["global_results"].items():
        assert abs(got["global_results"][key] - value) < 1e-9
    assert got["per_object"].keys() == expected["per_object"].keys()
    lines = (tmp_path / "objects.csv").read_text().splitlines()
    assert lines[0] == "Sequence,J-Mean,J-Recall,J-Decay,F-Mean,F-Recall,F-Decay"
    for line, (name, values) in zip(lines[1:], expected["per_object"].items(), strict=True):
        cells = line.split(",")
        assert cells[0] == name
        np.testing.assert_allclose([float(cell) for cell in cells[1:]], list(values.values()), atol=1e-6)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "objects.csv", "scores.json"]


def test_options(tmp_path):
    """A list of sequences, the other protocol, and a decay that is no number, which json does not have."""
    mask = np.zeros((6, 8), np.uint8)
    mask[2:4, 2:5] = 9
    for t in range(258):
        for side in ("gt", "pred"):
            write_mask(tmp_path / side / "a" / f"{t:05d}.png", mask)
    write_mask(tmp_path / "gt" / "unlisted" / "00000.png", mask)
    (tmp_path / "list.txt").write_text("a\n")
    options = ["--sequences", "list.txt", "--protocol", "vos-benchmark", "--workers", 1, "--json", "scores.json"]
    tool("eval_vos", "gt", "pred", *options, cwd=tmp_path)
    first = json.loads((tmp_path / "scores.json").read_text())
    assert first["per_object"]["a_9"]["J-Decay"] == 0
    assert first["protocol"] == "vos-benchmark"
    options[1] = "a"  # the name itself
    tool("eval_vos", "gt", "pred", *options, "--official-decay", cwd=tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text())["global_results"]["F-Decay"] is None
    error = failing("gt", "pred", cwd=tmp_path)
    assert error == (
        "error: gt/unlisted has 1 annotated frames, and the first and last are not scored; omit it (--sequences)"
    )


def test_errors_are_one_sentence_and_write_nothing(golden, tmp_path):
    golden = golden / "jandf"
    (tmp_path / "list.txt").write_text("short-empty\n")
    options = ["--sequences", "list.txt", "--json", "scores.json"]
    error = failing(golden / "davis", golden / "results_extra_id", *options, cwd=tmp_path)
    assert error.startswith("error: ")
    assert "holds id" in error
    assert not (tmp_path / "scores.json").exists()
    (tmp_path / "file").touch()
    options[-1] = "file/scores.json"
    error = failing(golden / "davis", golden / "results_extra_id_unread", *options, cwd=tmp_path)
    assert error.startswith("error: cannot write file/scores.json")


def test_without_a_list_what_was_predicted_is_scored_and_the_rest_counted(golden, tmp_path):
    davis, results = golden / "jandf" / "davis", golden / "jandf" / "results"
    names = sorted(path.name for path in results.iterdir())
    for name in names[1:]:
        shutil.copytree(results / name, tmp_path / "some" / name)
    (tmp_path / "some" / ".ipynb_checkpoints").mkdir()
    printed = command("eval_vos", davis, "some", "--workers", 1, cwd=tmp_path)
    assert f"{len(names) - 1} sequences" in printed
    assert f"1 of {len(names)} sequences have no predictions and are not scored: {names[0]}" in printed
    with pytest.raises(SystemExit, match="predicted masks are missing"):
        command("eval_vos", davis, "some", "--workers", 1, "--sequences", *names, cwd=tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="predicted masks are missing"):
        command("eval_vos", davis, "none", "--workers", 1, cwd=tmp_path)
    (tmp_path / "some" / names[1] / "00001.png").unlink()
    with pytest.raises(SystemExit, match=r"1 of .* predicted masks are missing"):
        command("eval_vos", davis, "some", "--workers", 1, cwd=tmp_path)

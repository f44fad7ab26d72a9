"""pe-spatial analyze: one file without a network; bad input as one sentence."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
from helpers.coco import write_coco
from helpers.repository import REPO, command
from helpers.videos import write_davis
from mmengine.registry import MODELS
from PIL import Image

from pe_spatial.cli.main import main
from pe_spatial.engine.configs import read_config
from pe_spatial.synthetic import write_dataset
from pe_spatial.tracking.vos.masks import write_mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with coco/, all.json (all objects but one, some twice) and worse.json."""
    root = tmp_path_factory.mktemp("analyze")
    path = write_coco(root / "coco", split="val2017")
    content = json.loads(path.read_text())
    results = [
        dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], score=0.9 - 0.01 * a["id"])
        for a in content["annotations"][1:]
    ]
    (root / "all.json").write_text(json.dumps(results + results[:2]))
    worse = [{**one, "category_id": 1, "bbox": [one["bbox"][0] + 9, *one["bbox"][1:]]} for one in results]
    (root / "worse.json").write_text(json.dumps(worse))
    return root


TRUTH = "coco/annotations/instances_val2017.json"


def test_comparison_in_one_file(folder):
    said = command("analyze", TRUTH, "all.json", "worse.json", "--images", "coco/val2017", "--bootstrap", "20",
                   cwd=folder)  # fmt: skip
    assert re.search(r"^all: AP \d", said, re.MULTILINE)
    assert re.search(r"difference in AP -\d.*95 % interval", said)
    html = (folder / "analysis.html").read_text()
    for title in ("Average precision", "Errors and their cost", "Confusion", "Calibration", "Worst images", "red"):
        assert title in html
    pictures = re.findall(r"src='data:image/(png|jpeg);base64,([^']+)'", html)
    assert [kind for kind, _ in pictures].count("jpeg") == 4
    for _, data in pictures:
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    assert len(re.findall(r"<img ", html)) == len(pictures)
    assert not re.search(r"https?://|\b(href|srcset|import|url)\b\s*[=(]|<(script|link|iframe)", html)


def test_one_result_without_images(folder):
    shutil.copy(folder / TRUTH, folder / "alone.json")
    command("analyze", "alone.json", "all.json", "--out", "new/one.html", cwd=folder)
    assert "the folder of the images is not known (--images)" in (folder / "new/one.html").read_text()


def test_predictions_of_a_folder_are_matched_by_names_and_images_found(folder):
    content = json.loads((folder / TRUTH).read_text())
    results = json.loads((folder / "all.json").read_text())
    images = [dict(id=i["id"] + 50, file_name=f"photos/{i['file_name']}") for i in content["images"]]
    categories = [dict(id=c["id"] * 10, name=c["name"]) for c in content["categories"]]
    own = [dict(r, image_id=r["image_id"] + 50, category_id=r["category_id"] * 10) for r in results]
    (folder / "predictions.json").write_text(json.dumps(dict(images=images, categories=categories, annotations=own)))
    said = [command("analyze", TRUTH, f"{name}.json", "--out", "same.html", cwd=folder).partition(":")[2]
            for name in ("all", "predictions")]  # fmt: skip
    assert said[0] == said[1]
    assert (folder / "same.html").read_text().count("image/jpeg") == 4


def test_one_category(folder, tmp_path):
    content = json.loads((folder / TRUTH).read_text())
    content["categories"] = content["categories"][:1]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1]
    (tmp_path / "one.json").write_text(json.dumps(content))
    results = [one for one in json.loads((folder / "all.json").read_text()) if one["category_id"] == 1]
    (tmp_path / "found.json").write_text(json.dumps(results))
    said = command("analyze", "one.json", "found.json", "--worst", "0", cwd=tmp_path)
    assert "found: AP 62.9" in said  # right, wrong, right, right, of four objects: (26 + 50 * 0.75) / 101


def test_depth(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("truth", "images", "a", "b"):
        (tmp_path / folder).mkdir()
    entries = {}
    for name, factor in (("near", 1), ("far", 3)):
        truth = factor * rng.uniform(1.1, 2.9, (30, 40)).astype(np.float32)
        truth[:3] = 0  # missing
        np.save(tmp_path / f"truth/{name}.npy", truth)
        np.save(tmp_path / f"a/{name}.npy", 1.1 * truth)
        np.save(tmp_path / f"b/{name}.npy", np.where(truth < 3, 1.1, 1.3) * truth)
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(tmp_path / f"images/{name}.png")
        entries[name] = dict(source=str(tmp_path / f"images/{name}.png"))
    for folder in "ab":
        (tmp_path / folder / "metadata.json").write_text(json.dumps(dict(images=entries)))
    said = command("analyze", "truth", "a", "b", "--out", "depth.html", cwd=tmp_path)
    assert "a: abs_rel 0.100," in said
    assert re.search(r"difference in abs_rel \+0\.\d+, 95 % interval", said)
    html = (tmp_path / "depth.html").read_text()
    rows = dict(re.findall(r"<tr><td>(\d to \d+)</td><td>[^<]+</td>((?:<td>[^<]+</td>)+)", html))
    assert list(rows) == ["1 to 2", "2 to 3", "3 to 5", "5 to 10"]
    values = {name: [float(x) for x in re.findall(r">([\d.]+)<", row)] for name, row in rows.items()}
    assert [(row[0], row[2], row[3]) for row in values.values()] == [(0.1, 1, 0.1)] * 2 + [(0.1, 1, 0.3)] * 2
    truth = np.concatenate([np.load(path).ravel() for path in (tmp_path / "truth").iterdir()])
    for low, high in ((1, 2), (2, 3), (3, 5), (5, 10)):
        inside = truth[(truth >= low) & (truth < high)]
        assert values[f"{low} to {high}"][1] == pytest.approx(0.1 * np.sqrt((inside**2).mean()), abs=6e-4)
    assert html.index("far: abs_rel") < html.index("near: abs_rel")


@pytest.mark.slow
def test_a_config_and_checkpoints_of_depth(tmp_path, capsys):
    import pe_spatial.depth  # noqa: F401  (registers)

    config = str(REPO / "projects/nyu_depth/synthetic_lin1.py")
    world = write_dataset(tmp_path / "world", scenes=dict(train=1, val=2), size=(96, 96))
    torch.manual_seed(0)
    cfg = read_config(config)
    for name in ("one", "other"):
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / f"{name}.pth")
    files = [str(tmp_path / f"{name}.pth") for name in ("one", "other")]
    out = tmp_path / "depth.html"
    main(["analyze", config, *files, "--data-root", str(world), "--bootstrap", "20", "--out", str(out)])
    said = capsys.readouterr().out.splitlines()
    assert {"one", "other"} <= {line.partition(":")[0] for line in said}
    html = out.read_text()
    assert "depth; 4 images with ground truth" in html
    assert "0001/00001: abs_rel" in html


def test_video_masks(tmp_path):
    write_davis(tmp_path / "davis")
    for result, shift in (("a", 0), ("b", 6)):
        for path in sorted((tmp_path / "davis/Annotations/480p").rglob("*.png")):
            mask = np.asarray(Image.open(path))
            write_mask(tmp_path / result / path.parent.name / path.name, np.roll(mask, shift, 1))
    said = command("analyze", "davis", "a", "b", "--out", "video.html", cwd=tmp_path)
    assert "a: J&F 100.0" in said
    assert re.search(r"difference in J&F -\d.*resamples of the sequences; it excludes 0", said)
    html = (tmp_path / "video.html").read_text()
    assert all(text in html for text in ("<td>cat</td>", "<td>dog</td>", "Over time"))
    command("analyze", "davis", "a", "--sequences", "dog", "--out", "one.html", cwd=tmp_path)
    assert "<td>cat</td>" not in (tmp_path / "one.html").read_text()


@pytest.mark.slow
def test_a_config_of_tracking(tmp_path, capsys):
    world = write_dataset(tmp_path / "world", scenes=dict(val=2), frames_per_scene=4, size=(96, 96))
    config = str(REPO / "projects/video_tracking/synthetic_zeroshot.py")
    arguments = ("--data-root", str(world), "--cfg-options", "model.size=96", "--out", str(tmp_path / "video.html"))
    main(["analyze", config, "released", *arguments])
    assert "released: J&F " in capsys.readouterr().out
    html = (tmp_path / "video.html").read_text()
    assert all(f"<td>{name}</td>" in html for name in ("0000", "0001"))


@pytest.mark.slow
def test_opens_in_a_browser_without_a_network(folder, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs chromium")
    command("analyze", TRUTH, "all.json", "--images", "coco/val2017", "--out", tmp_path / "page.html", cwd=folder)
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND")
    done = subprocess.run(
        [browser, *options, "--dump-dom", f"file://{tmp_path / 'page.html'}"],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    assert "Worst images" in done.stdout


@pytest.fixture
def sentence(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "empty.json").write_text("[]")
    (folder / "coco.json").write_text('{"images": []}')
    (folder / "text.json").write_text("AP 50")
    content = json.loads((folder / TRUTH).read_text())
    (folder / "unlabeled.json").write_text(json.dumps({**content, "annotations": []}))
    results = json.loads((folder / "all.json").read_text())
    (folder / "others.json").write_text(json.dumps([{**results[0], "image_id": 99}]))
    (folder / "classes.json").write_text(json.dumps([{**results[0], "category_id": 3}]))
    (folder / "score.json").write_text(json.dumps([{**results[0], "score": None}]))
    (folder / "c.py").write_text("test_evaluator = dict(type='DepthMetric')\ntest_dataloader = dict()\n")

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["analyze", *arguments, "--out", "bad.html"])
        assert isinstance(end.value.code, str)
        assert end.value.code.startswith("error: ")
        assert "\n" not in end.value.code
        assert capsys.readouterr().out == ""
        assert not (folder / "bad.html").exists()
        return end.value.code

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TRUTH, "empty.json"), "empty.json holds no detections"),
        ((TRUTH, "coco.json"), "coco.json is no list of detections"),
        ((TRUTH, "text.json"), "text.json is not JSON"),
        ((TRUTH, "gone.json"), "there is no file gone.json; give what"),
        ((TRUTH, "others.json"), "others.json has detections of images that the annotations do not have (99)"),
        ((TRUTH, "classes.json"), "classes.json has detections of categories that the annotations do not have (3)"),
        ((TRUTH, "score.json"), "detection 0 has the score None"),
        ((TRUTH, "all.json", "--masks"), "detection 0 has no segmentation; omit --masks"),
        (("unlabeled.json", "all.json"), "unlabeled.json contains no annotations"),
        (("gone.json", "all.json"), "no annotation file at gone.json"),
        ((TRUTH, "model.pth"), "a checkpoint needs its config"),
        ((TRUTH, "all.json", "all.json"), "all.json is given twice"),
        ((TRUTH, "all.json", "worse.json", "empty.json"), "one or two results"),
        ((TRUTH, "all.json", "--images", "elsewhere"), "cannot open elsewhere"),
        (("c.py", "all.json"), "c.py has no evaluator with COCO annotations"),
        (("gone.py", "all.json"), "gone.py"),
        (("gone.csv", "coco"), "there is no file ./gone.csv"),
        (("coco", "coco"), "coco"),
        (("gone", "coco"), "gone is no config"),
        ((TRUTH, "all.json", "--sequences", "a"), "results of detection have no --sequences; omit it"),
        ((TRUTH, "all.json", "--data-root", "a"), "annotations (.json) as TRUTH have no --data-root; omit it"),
        (("gone.csv", "coco", "--masks"), "results of depth have no --masks; omit it"),
    ],
)
def test_bad_input_is_one_sentence(sentence, arguments, message):
    assert message in sentence(*arguments)


def test_other_suffix(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=r"error: --out is x.pdf; end its name in .html"):
        main(["analyze", TRUTH, "all.json", "--out", "x.pdf"])

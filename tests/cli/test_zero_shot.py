"""pe-spatial zero_shot: classification, retrieval and search, and bad input as one sentence."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from helpers.language import WORD_CORE, tiny_core
from PIL import Image

pytest.importorskip("open_clip")

from pe_spatial.cli.main import main
from pe_spatial.language.cache import EmbeddingCache, weights_hash
from pe_spatial.language.checkpoint import save_core
from pe_spatial.language.embedding import embed, squash, video_frames
from pe_spatial.language.protocol import class_embeddings
from pe_spatial.video import mp4_writer


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("core") / "core.safetensors"
    save_core(tiny_core(WORD_CORE), path)
    return str(path)


def photo(path, seed, size=(40, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path):
    for i, name in enumerate(("red_fox", "cat", "dog")):
        for k in range(2):
            photo(tmp_path / "photos" / name / f"{k}.png", 10 * i + k)
    return tmp_path / "photos"


@pytest.fixture
def fail():
    """Return a function that runs a command and returns its one sentence."""

    def run(*argv):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, argv)], "zero_shot")
        text = str(stopped.value.code)
        assert text.startswith("error: ")
        assert "\n" not in text
        return text

    return run


def run(capsys, *argv):
    main([*map(str, argv), "--device", "cpu"], "zero_shot")
    return capsys.readouterr().out


def test_folders_are_classes(photos, weights, capsys, tmp_path):
    said = run(capsys, photos, "--model", weights, "--csv", tmp_path / "p.csv", "--batch", 4)
    assert "6 samples, 3 classes, 1 templates" in said
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [row["class"] for row in rows] == ["cat"] * 2 + ["dog"] * 2 + ["red fox"] * 2
    right = sum(row["class"] == row["predicted"] for row in rows)
    assert f"acc1 {100 * right / 6:.2f}" in said
    assert "acc5 -" in said
    given = run(capsys, photos, "--model", weights, "--classes", "dog, Red Fox,cat", "--csv", tmp_path / "q.csv")
    assert given.splitlines()[2:] == said.splitlines()[2:]
    half = run(capsys, photos, "--model", weights, "--classes", "x,y,z", "--templates", "simple", "--bfloat16")
    assert "7 templates" in half


def test_classes_file_and_order(photos, weights, capsys, tmp_path):
    (tmp_path / "names.txt").write_text("red_fox,a fox\ncat\t猫\ndog,犬\n", encoding="utf-8")
    said = run(
        capsys, photos, "--model", weights, "--classes-file", tmp_path / "names.txt", "--csv", tmp_path / "p.csv"
    )
    assert "3 classes" in said
    assert [r["class"] for r in csv.DictReader((tmp_path / "p.csv").open(encoding="utf-8"))][::2] == [
        "猫",
        "犬",
        "a fox",
    ]


def test_images_without_folders(photos, weights, capsys, fail):
    flat = photos / "cat"
    assert "has no class folders and no classnames.txt" in fail(flat, "--model", weights)
    assert "no accuracy" in run(capsys, flat, "--model", weights, "--classes", "cat,dog")
    photo(photos / "loose.png", 5)
    assert "has loose.png outside of its class folders" in fail(photos, "--model", weights)


def test_webdataset(weights, capsys, tmp_path, fail):
    pytest.importorskip("webdataset")

    def shard(label):
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for i in range(3):
                data = io.BytesIO()
                Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 30, 3), np.uint8)).save(data, "PNG")
                for name, content in ((f"{i}.png", data.getvalue()), (f"{i}.cls", label(i))):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

    shard(lambda i: str(i).encode())
    (tmp_path / "classnames.txt").write_text("cat\ndog\nfox\n")
    assert "3 samples, 3 classes" in run(capsys, tmp_path, "--model", weights)
    assert "has the class 2, and 2 classes are named" in fail(tmp_path, "--model", weights, "--classes", "a,b")
    shard(lambda _: b"cat")
    assert "it should be the number of a class" in fail(tmp_path, "--model", weights)


def test_videos(weights, capsys, tmp_path):
    for name, count in (("jump", 3), ("run", 12)):
        (tmp_path / name).mkdir()
        with mp4_writer(tmp_path / name / "v.mp4", 10) as write:
            for i in range(count):
                write(np.full((48, 64, 3), 20 * i, np.uint8))
    frames = [int(frame.mean().round(-1)) for frame in video_frames(tmp_path / "jump" / "v.mp4")]
    assert frames == [0, 0, 0, 0, 20, 20, 20, 40]
    assert "2 samples, 2 classes" in run(capsys, tmp_path, "--model", weights)


def test_features_are_those_of_single_images(photos):
    model = tiny_core(WORD_CORE)
    pixels = [np.asarray(Image.open(path)) for path in sorted(photos.rglob("*.png"))]
    got = embed(model, [lambda p=p: p for p in pixels], batch_size=4)
    with torch.inference_mode():
        expected = [model.encode_image(squash(p, model.config.vision)[None], normalize=True)[0] for p in pixels]
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["coco", "msrvtt", "list"])
def test_retrieval(photos, weights, capsys, tmp_path, form):
    if form == "coco":
        table = dict(
            images=[dict(id=7, file_name="cat/0.png"), dict(id=9, file_name="dog/1.png")],
            annotations=[
                dict(image_id=9, caption="a dog"),
                dict(image_id=7, caption="a cat"),
                dict(image_id=7, caption="cat"),
            ],
        )
    elif form == "list":
        table = [dict(image="cat/0.png", caption=["a cat", "cat"]), dict(image="dog/1.png", caption="a dog")]
    else:
        for name in ("video0", "video1"):
            with mp4_writer(tmp_path / "photos" / f"{name}.mp4", 5) as write:
                write(np.zeros((32, 32, 3), np.uint8))
        table = dict(
            videos=[
                dict(video_id="video0", split="test"),
                dict(video_id="video1", split="test"),
                dict(video_id="video2", split="train"),
            ],
            sentences=[dict(video_id=f"video{i}", caption=f"text {i}") for i in (0, 0, 1, 2)],
        )
    (tmp_path / "captions.json").write_text(json.dumps(table))
    said = run(capsys, photos, "--model", weights, "--captions", tmp_path / "captions.json")
    assert "2 samples, 3 captions" in said
    assert "text to image R@5 100.00" in said
    assert "image to text R@10 100.00" in said


def test_captions_that_do_not_fit(photos, tmp_path, fail):
    (tmp_path / "captions.json").write_text("[1]")
    assert "holds no captions as COCO" in fail(photos, "--captions", tmp_path / "captions.json")
    (tmp_path / "captions.json").write_text(json.dumps([dict(image="no.png", caption="a")]))
    assert "lacks no.png, which has captions" in fail(photos, "--captions", tmp_path / "captions.json")


def test_search_keeps_features(photos, weights, capsys, tmp_path):
    (photos / "broken.png").write_bytes(b"not an image")
    options = ("--model", weights, "--cache", tmp_path / "kept", "--out", tmp_path / "found.png", "--top", 2)
    said = run(capsys, photos, "--query", "a cat", "犬", *options)
    assert "6 images, 6 of them new" in said
    assert "omitted: " in said
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.width > 2 * 224
    assert "6 images, 0 of them new" in run(capsys, photos, "--query", "a cat", *options)
    (photos / "dog" / "0.png").rename(photos / "moved.png")
    assert "6 images, 0 of them new" in run(capsys, photos, "--query", "a cat", *options)
    photo(photos / "cat" / "0.png", 99)
    assert "6 images, 1 of them new" in run(capsys, photos, "--query", "a cat", *options)


def test_cache_belongs_to_weights(tmp_path):
    model = tiny_core(WORD_CORE)
    before = weights_hash(model)
    model.visual.head.weight.data[0, 0] += 1e-3
    assert weights_hash(model) != before
    (tmp_path / EmbeddingCache(model, tmp_path).path.name).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"is damaged .+ remove it"):
        EmbeddingCache(model, tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--classes", ""), "--classes names no class"),
        (("--classes", "cat,dog,Cat"), "--classes names Cat twice"),
        (("--classes", "cat,dog,wolf"), "no class is named for red_fox"),
        (("--classes", "a,b", "--query", "c"), "do not go together"),
        (("--classes", "a,b", "--classes-file", "c"), "both name the classes"),
        (("--classes-file", "absent.txt"), "absent.txt cannot be read as text"),
        (("--captions", "absent.json"), "there is no file absent.json; check the path"),
        (("--templates", "nine"), "allowed are imagenet, simple, and a file"),
        (("--model", "PE-Spatial-B16-512"), "PE-Spatial-B16-512 has no text space"),
        (("--query", " "), "--query has an empty phrase"),
        (("--query", "cat", "--out", "a.gif"), "the suffix of --out is '.gif'"),
        (("--out", "a.jpg"), "without --query there is no use of --out; omit it"),
        (("--batch", "0"), "--batch and --top must be at least 1"),
    ],
)
def test_mistakes(photos, fail, argv, message):
    assert message in fail(photos, *argv)


def test_templates_are_text(photos, fail, tmp_path):
    (tmp_path / "templates.txt").write_bytes(b"\x89PNG {}")
    assert "templates.txt cannot be read as text (it is not UTF-8)" in fail(
        photos, "--templates", tmp_path / "templates.txt"
    )


def test_missing_data(tmp_path, fail):
    assert "there is no folder" in fail(tmp_path / "absent")
    assert "has no images, videos or .tar files" in fail(tmp_path)
    photo(tmp_path / "a.png", 0)
    assert "is a file; give a folder" in fail(tmp_path / "a.png")


def test_long_phrase_is_cut_and_said(photos, weights, capsys, caplog):
    run(capsys, photos / "cat", "--model", weights, "--classes", "cat,dog," + "fox " * 300)
    assert "cut to the 32 tokens" in caplog.text


def test_embed_classes(weights, capsys, tmp_path):
    from safetensors.torch import load_file

    categories = [dict(id=9, name="flag_(banner)"), dict(id=2, name="red_fox")]
    (tmp_path / "a.json").write_text(json.dumps(dict(images=[], annotations=[], categories=categories)))
    main([str(tmp_path / "a.json"), str(tmp_path / "v.safetensors"), "--model", weights], "embed_classes")
    assert "2 classes, 1 templates, width 24" in capsys.readouterr().out
    model = tiny_core(WORD_CORE)
    expected = class_embeddings(model, ["red fox", "flag banner"])
    torch.testing.assert_close(load_file(tmp_path / "v.safetensors")["embeddings"], expected)


@pytest.mark.parametrize(
    ("classes", "out", "message"),
    [
        ("", "v.safetensors", "the list names no class"),
        ("a,A", "v.safetensors", "the list names A twice"),
        ("absent.json", "v.safetensors", "there is no file absent.json"),
        ("a,b", "v.pt", "should end in .safetensors"),
    ],
)
def test_classes_that_cannot_be_embedded(weights, tmp_path, classes, out, message):
    with pytest.raises(SystemExit) as stopped:
        main([classes, str(tmp_path / out), "--model", weights], "embed_classes")
    assert message in str(stopped.value.code)

"""The README and docs hold: Python blocks run as they stand, and commands name options and files that exist.

Blocks marked `python` are executed in order, in one namespace for each page; those without an import are configs, and
are built. Lines of unmarked and of `bash` blocks go through the parser of their command. What a reader fills in is
given in capitals (CONFIG, MY_CONFIG.py). Weights that are not on this machine are replaced by random ones.
"""

import re
import shlex
from pathlib import Path

import pytest
from helpers.repository import REPO

import pe_spatial
from pe_spatial.cli.main import COMMANDS, build_parser
from pe_spatial.encoder.variants import get_config

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), *sorted((REPO / "projects").rglob("README.md"))]
BLOCKS = [
    (str(page.relative_to(REPO)), language, block)
    for page in PAGES
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
]
PYTHON = {page: [block for name, language, block in BLOCKS if (name, language) == (page, "python")]
          for page, language, _ in BLOCKS if language == "python"}  # fmt: skip
LINES = [(page, line) for page, language, block in BLOCKS if language in ("", "bash")
         for line in block.replace("\\\n", " ").splitlines()]  # fmt: skip
# launch script -> its command, and which of its first words are that command's
LAUNCHERS = {
    "tools/dist_train.sh": ("train", 2, slice(0, 1)),
    "tools/dist_test.sh": ("test", 3, slice(0, 2)),
    "tools/slurm_train.sh": ("train", 3, slice(2, 3)),
}
CAPITALS = re.compile(r"[A-Z][A-Z0-9_]*(\.py)?")


def split(line: str) -> tuple[str, list[str]]:
    """Return the command of pe-spatial that a line calls ('' if it calls another program) and its arguments."""
    words = shlex.split(line, comments=True)
    words = words[next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words)) :]
    if words[:1] in (["python"], ["torchrun"]):
        words = words[next((i for i, word in enumerate(words) if word.endswith(".py")), len(words)) :]
    program, *arguments = words or [""]
    if program == "pe-spatial" and arguments[0] != "--help":
        return arguments[0].replace("-", "_"), arguments[1:]
    if script := re.fullmatch(r"tools/(\w+)\.py", program):
        return script[1], arguments
    if program in LAUNCHERS:
        name, count, own = LAUNCHERS[program]
        return name, arguments[:count][own] + arguments[count:]
    return "", []


COMMAND_LINES = [(page, line) for page, line in LINES if split(line)[0]]


def is_config(name: str) -> bool:
    package, _, path = name.rpartition("::")
    if package in ("mmdet", "mmseg"):
        return (Path(pytest.importorskip(package).__file__).parent / ".mim" / "configs" / path).is_file()
    return (REPO / ("configs" if package else "") / path).is_file() or CAPITALS.fullmatch(name) is not None


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES, ids=[f"{page}:{line}"[:90] for page, line in COMMAND_LINES])
def test_commands_are_understood(page, line, capsys):
    name, arguments = split(line)
    assert name in COMMANDS, page
    try:
        args = build_parser(name).parse_args(arguments)
    except SystemExit:
        pytest.fail(f"{page}: {line}\n{capsys.readouterr().err}")
    if config := getattr(args, "config", None):
        assert is_config(str(config)), f"{page}: there is no config {config}"
    for variant in re.findall(r"(?:--variant |--swap |backbone\.variant=)(?!timm:)([\w-]+)", line):
        assert get_config(variant)


@pytest.mark.parametrize("page", sorted({page for page, _ in LINES}))
def test_files_and_make_targets_exist(page):
    targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
    for _, line in (pair for pair in LINES if pair[0] == page):
        words = shlex.split(line, comments=True)
        for word in words:
            if re.match(r"(configs|projects|tools|docs|tests|benchmarks|pe_spatial)/", word):
                assert (REPO / word).exists(), line
        if words[:1] == ["make"]:
            assert set(words[1:]) <= set(targets), line


@pytest.mark.parametrize("page", PYTHON)
def test_python_runs(page, tmp_path, monkeypatch):
    from pe_spatial.encoder.files import CheckpointError

    load = pe_spatial.from_pretrained

    def random_where_absent(source, **options):
        try:
            return load(source, **options)
        except CheckpointError:
            return pe_spatial.PerceptionEncoder(source, **options).eval()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(pe_spatial, "from_pretrained", random_where_absent, raising=False)
    monkeypatch.chdir(tmp_path)
    if page == "docs/predict.md":
        write_what_predict_reads(tmp_path)
    names: dict = {}
    for block in PYTHON[page]:
        if "pe_spatial.tracking.sam2" in block:
            pytest.importorskip("sam2")
        if re.search(r"^(import|from) ", block, re.MULTILINE):
            exec(compile(block, page, "exec"), names)
        else:
            build_config(block, tmp_path / "config.py")


def write_what_predict_reads(folder):
    """Write a detector and the images that docs/predict.md names."""
    pytest.importorskip("mmdet")
    pytest.importorskip("supervision")
    from helpers.blobs import draw_blobs, write_blobs
    from PIL import Image

    checkpoint = folder / "work_dirs/coco/iter_66375.pth"
    checkpoint.parent.mkdir(parents=True)
    write_blobs(folder, classes=("person", "car")).rename(checkpoint)
    for name in ("photo.jpg", "a.jpg", "b.png"):
        Image.fromarray(draw_blobs((60, 80), [(10, 10, 50, 50, 0)])).save(folder / name)


def build_config(text, path):
    """Build the model of a config, which changes MMDetection's Mask R-CNN where it names no other base."""
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    mmdet = pytest.importorskip("mmdet")
    base = Path(mmdet.__file__).parent / ".mim/configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
    text = text.replace("PATH_TO_PE_SPATIAL", str(REPO))
    path.write_text(text if "_base_" in text else f"_base_ = {str(base)!r}\n{text}")
    cfg = Config.fromfile(path)
    init_default_scope("mmdet")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert cfg.model.backbone.type == "PerceptionEncoderPyramid"
    assert not model.with_neck
    assert model.backbone.pyramid.strides == tuple(cfg.model.rpn_head.anchor_generator.strides)
    assert cfg.optim_wrapper.constructor == "LayerDecayOptimWrapperConstructor"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere_and_lines_are_short(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in link or (page.parent / link).exists(), link
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    assert not [line for line in prose if len(line) > 120 and not line.startswith("|")]


def test_readme_is_short():
    assert len((REPO / "README.md").read_text().splitlines()) <= 150

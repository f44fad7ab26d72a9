"""PE-Core gives the released features, from files of every layout, and these files come back bit for bit."""

import re

import pytest
import torch
from helpers.golden import checkpoint_file, read_arrays, read_json, read_weights
from helpers.language import core_of, tiny_core
from torch.testing import assert_close

import pe_spatial
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.encoder.variants import RELEASED_NAMES
from pe_spatial.errors import ConfigError
from pe_spatial.language.checkpoint import from_ours, load_core_state, save_core, to_ours
from pe_spatial.language.image_tower import ImageTower
from pe_spatial.language.model import PECore
from pe_spatial.language.variants import CORES

CASES = ("cls_p16", "nocls_p14")
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    folder = golden / "clip"
    facts = read_json(folder / f"clip_{request.param}.json")
    model = PECore.from_pretrained(checkpoint_file(folder / f"clip_{request.param}.pt"), variant=core_of(facts))
    arrays = {name: torch.from_numpy(x) for name, x in read_arrays(folder / f"clip_{request.param}.npz").items()}
    return model, facts, arrays


@torch.inference_mode()
def test_features_are_the_released_ones(case):
    model, facts, arrays = case
    ids = arrays["text_ids"]
    assert_close(model.encode_text(ids), arrays["text_features"], **TOLERANCE)
    assert_close(model.encode_text(ids, normalize=True), arrays["text_features_normalized"], **TOLERANCE)
    for h, w in facts["sizes"]:
        images = arrays[f"images_{h}x{w}"]
        assert_close(model.visual.tokens(images), arrays[f"tokens_normed_{h}x{w}"], **TOLERANCE)
        assert_close(model.encode_image(images), arrays[f"image_features_{h}x{w}"], **TOLERANCE)
        normalized, texts, scale = model(images, ids)
        assert_close(normalized, arrays[f"image_features_normalized_{h}x{w}"], **TOLERANCE)
        assert_close(scale.item(), facts["logit_scale"])
        assert_close(scale * normalized @ texts.T, arrays[f"logits_{h}x{w}"], **TOLERANCE)
    assert_close(model.encode_video(arrays["video"]), arrays["video_features"], **TOLERANCE)
    assert_close(model.encode_video(arrays["video"], normalize=True), arrays["video_features_normalized"], **TOLERANCE)


def test_text_needs_no_padding(case):
    model, _, arrays = case
    ids = arrays["text_ids"]
    longest = int(ids.argmax(-1).max()) + 1
    assert longest < ids.shape[1]
    assert_close(model.encode_text(ids[:, :longest]), arrays["text_features"], **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["release", "open_clip"])
def test_layouts_come_back_bit_for_bit(golden, name, layout):
    released = read_weights(golden / "clip" / f"clip_{name}.pt")
    ours, found = to_ours(released)
    assert found == "release"
    theirs = from_ours(ours, layout)
    back, found = to_ours(theirs)
    assert found == layout
    assert_close(back, ours, rtol=0, atol=0)
    again = from_ours(back, "release")
    assert sorted(again) == sorted(released)
    assert_close(again, dict(released), rtol=0, atol=0)


def test_own_file_describes_itself(tmp_path):
    model = tiny_core()
    save_core(model, tmp_path / "core.safetensors")
    loaded = PECore.from_pretrained(tmp_path / "core.safetensors")
    assert loaded.config == model.config
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    save_core(model, tmp_path / "core.pt", layout="release")
    with pytest.raises(CheckpointError, match="holds no released PE-Core"):
        PECore.from_pretrained(tmp_path / "core.pt")
    loaded = PECore.from_pretrained(tmp_path / "core.pt", variant=model.config.fields())
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"should end in \.safetensors or \.pt"):
        save_core(model, tmp_path / "core.bin")


@pytest.mark.parametrize("variant", CORES)
def test_released_files_fill_the_model(golden, variant):
    contract = read_json(golden / "clip" / "core_state_dicts.json")[RELEASED_NAMES[variant]]
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in contract.items()}
        model = PECore(variant)
    load_core_state(model, state)
    assert {name: list(value.shape) for name, value in from_ours(model.state_dict(), "release").items()} == contract
    state.pop("visual.attn_pool.probe")
    with pytest.raises(CheckpointError, match=r"missing in the file: visual\.attn_pool\.latent"):
        load_core_state(model, state)


def test_variant_follows_from_shapes(golden, tmp_path):
    from pe_spatial.language.checkpoint import _variant_of

    for name, contract in read_json(golden / "clip" / "core_state_dicts.json").items():
        with torch.device("meta"):
            state = to_ours({name: torch.empty(shape) for name, shape in contract.items()})[0]
        assert RELEASED_NAMES[_variant_of(state, tmp_path)] == name


@pytest.mark.parametrize("name", ["missing", "unknown", "shape"])
def test_loading_is_strict(golden, name):
    facts = read_json(golden / "clip" / "clip_cls_p16.json")
    state = dict(read_weights(golden / "clip" / "clip_cls_p16.pt"))
    if name == "missing":
        del state["visual.transformer.resblocks.1.ln_1.bias"]
    elif name == "unknown":
        state["visual.extra"] = torch.zeros(1)
    else:
        state["text_projection"] = torch.zeros(3, 4)
    with pytest.raises(CheckpointError, match=r"missing in the file|unknown to the model|other shapes"):
        load_core_state(PECore(core_of(facts)), state)


def test_image_tower_loads_alone(golden):
    facts = read_json(golden / "clip" / "clip_cls_p16.json")
    tower = ImageTower(core_of(facts))
    load_core_state(tower, read_weights(golden / "clip" / "clip_cls_p16.pt"))
    arrays = read_arrays(golden / "clip" / "clip_cls_p16.npz")
    with torch.inference_mode():
        features = tower(torch.from_numpy(arrays["images_64x64"]))
    assert_close(features, torch.from_numpy(arrays["image_features_64x64"]), **TOLERANCE)


def test_timm_pools_alike(randomize):
    timm = pytest.importorskip("timm")
    config = CORES["pe_core_t16_384"]
    theirs = randomize(timm.create_model("vit_pe_core_tiny_patch16_384", num_classes=config.output_dim)).eval()
    theirs.head.bias.data.zero_()
    with torch.device("meta"):
        ours = ImageTower(config).eval()
    load_core_state(ours, theirs.state_dict())
    images = torch.rand(1, 3, 384, 384) * 2 - 1
    with torch.inference_mode():
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        assert_close(ours.attn_pool(ours.tokens(images)), expected, rtol=1e-4, atol=1e-4)
        assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    back = from_ours({f"visual.{name}": value for name, value in ours.state_dict().items()}, "timm")
    assert_close(back, dict(theirs.state_dict()), rtol=0, atol=0)
    theirs.head.bias.data.fill_(1)
    with pytest.raises(CheckpointError, match="projects with a bias"):
        load_core_state(ours, theirs.state_dict())


def test_open_clip_has_these_names():
    pytest.importorskip("open_clip")
    import open_clip

    with torch.device("meta"):
        theirs = open_clip.create_model("PE-Core-T-16-384", device="meta")
        ours = PECore("pe_core_t16_384")
    state = theirs.state_dict()
    assert to_ours(state)[1] == "open_clip"
    load_core_state(ours, state)
    shapes = {name: value.shape for name, value in from_ours(ours.state_dict(), "open_clip").items()}
    assert shapes == {name: value.shape for name, value in state.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    model = tiny_core()
    images, ids = torch.rand(2, 3, 64, 64) * 2 - 1, torch.tensor([[598, 5, 6, 599, 0, 0]])
    with torch.inference_mode():
        exact = model(images, ids)
        half = model.to(dtype)(images.to(dtype), ids)
    for got, expected in zip(half[:2], exact[:2], strict=True):
        assert got.dtype == dtype
        assert_close(got.float(), expected, rtol=0, atol=0.03)


def test_compiles_without_graph_breaks_and_exports():
    torch._dynamo.reset()
    model = tiny_core()
    images, ids = torch.rand(2, 3, 64, 64) * 2 - 1, torch.tensor([[598, 5, 6, 599, 0, 0]] * 3)
    with torch.inference_mode():
        expected = model(images, ids)
        assert_close(torch.compile(model, fullgraph=True, backend="eager")(images, ids), expected)
    batch, texts = torch.export.Dim("batch"), torch.export.Dim("texts")
    program = torch.export.export(model, (images, ids), dynamic_shapes=({0: batch}, {0: texts}))
    with torch.inference_mode():
        more = torch.rand(5, 3, 64, 64) * 2 - 1
        assert_close(program.module()(more, ids[:2]), model(more, ids[:2]))


def test_gradients_reach_everything_that_matters():
    model = tiny_core().train()
    images, texts, scale = model(torch.rand(2, 3, 64, 64), torch.tensor([[598, 5, 599, 0], [598, 7, 8, 599]]))
    (scale * images @ texts.T).diagonal().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("name", "core"),
    [("PE-Spatial-L14-448", "PE-Core-L14-336"), ("pe_spatial_g14_448", "PE-Core-G14-448"),
     ("PE-Lang-G14-448-Tiling", "PE-Core-G14-448"), ("pe_synthetic_xs8_192", "PE-Core-B16-224")],
)  # fmt: skip
def test_encoders_without_text_are_refused(name, core):
    with pytest.raises(ConfigError, match=rf"has no text space: .+ Use {re.escape(core)}"):
        PECore.from_pretrained(name)
    with pytest.raises(ConfigError, match="has no text space"):
        PECore(name)


def test_other_names_and_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown PE-Core 'clip'; allowed are PE-Core-T16-384"):
        PECore("clip")
    encoder = pe_spatial.from_pretrained("pe_synthetic_xs8_192")
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    with pytest.raises(ConfigError, match=r"encoder\.pt has no text tower"):
        PECore.from_pretrained(tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match=r"token ids are float32 \(1, 3\); expected integers"):
        tiny_core().encode_text(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"token ids are int64 \(1, 99\)"):
        tiny_core().encode_text(torch.zeros(1, 99, dtype=torch.int64))

"""The page in Chromium: uploads, clicks, sliders, errors, two users, and no request to another server."""

import io
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from helpers.app import Busy, fake_models, write_clip
from PIL import Image

from pe_spatial.app.models import Limits

CHROMIUM = Path("/usr/bin/chromium")
MISSING = [name for name in ("sam2", "gradio", "playwright") if find_spec(name) is None]
MISSING += [] if CHROMIUM.exists() else [str(CHROMIUM)]
# marked one by one, so that CI lets them be skipped
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"the page in a browser needs {', '.join(MISSING)}"),
]
if not MISSING:
    from playwright import sync_api as playwright

    playwright.expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def address(randomize):
    from pe_spatial.app.page import build_page, serve

    models = fake_models(randomize, limits=Limits(max_frames=30))
    page = build_page(models)
    yield serve(page, models, host="127.0.0.1", port=7893)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def foreign():
    """The requests to other servers."""
    return []


@pytest.fixture
def page(browser, address, foreign):
    yield new_page(browser, address, foreign)
    assert foreign == []


def new_page(browser, address, foreign):
    page = browser.new_context(viewport=dict(width=1300, height=900)).new_page()
    page.set_default_timeout(20_000)

    def note(request):
        if not request.url.startswith((address, "data:", "blob:")):
            foreign.append(request.url)

    page.on("request", note)
    page.goto(address)
    page.get_by_role("tab", name="Detect").wait_for()
    return page


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)).save(path)
    return path


def upload(page, tab, path):
    page.get_by_role("tab", name=tab.capitalize()).click()
    page.locator(f"#{tab}-file input[type=file]").set_input_files(path)


def pixels(page, name):
    """What an image shows."""
    url = page.locator(f"#{name} img").first.get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(url).body())).convert("RGB"))


def wait_for_change(page, name, before):
    page.wait_for_function(
        "([id, url]) => document.querySelector(`#${id} img`).src != url", arg=[name, before], timeout=20_000
    )


def source(page, name):
    return page.locator(f"#{name} img").first.evaluate("x => x.src")


def downloaded(page, name):
    url = page.locator(f"#{name} a").first.get_attribute("href")
    return page.request.get(url).body()


def test_detect_and_move_the_slider(page, image):
    upload(page, "detect", image)
    page.locator("#detect-image img").wait_for()
    playwright.expect(page.locator("#detect-rows")).to_contain_text("dog")
    before = source(page, "detect-image")
    page.locator("#detect-score input[type=number]").fill("0.5")
    page.keyboard.press("Enter")
    wait_for_change(page, "detect-image", before)
    playwright.expect(page.locator("#detect-rows")).not_to_contain_text("dog")
    page.locator("#detect-export").click()
    page.locator("#detect-json a").first.wait_for()
    assert downloaded(page, "detect-json").count(b'"score"') == 1


def test_depth_and_its_points(page, image):
    upload(page, "depth", image)
    page.locator("#depth-slider img").first.wait_for()
    playwright.expect(page.locator("#depth-range")).to_have_text(re.compile("1.03 to 2.97 m"))
    page.locator("#depth-export").click()
    page.locator("#depth-ply a").first.wait_for()
    assert downloaded(page, "depth-ply").startswith(b"ply")


def test_features_at_two_layers_and_a_clicked_patch(page, image):
    upload(page, "features", image)
    page.locator("#features-pca img").wait_for()
    first, before = pixels(page, "features-pca"), source(page, "features-pca")
    page.locator("#features-layer input[type=number]").fill("1")
    page.keyboard.press("Enter")
    wait_for_change(page, "features-pca", before)
    assert not np.array_equal(first, pixels(page, "features-pca"))
    page.locator("#features-photo img").click(position=dict(x=5, y=5))
    page.locator("#features-similarity img").wait_for()
    brightest = pixels(page, "features-similarity").sum(-1)
    assert brightest[0, 0] == brightest.max()  # the patch that was clicked


def test_compare_two_encoders(page, image):
    upload(page, "compare", image)
    page.locator("#compare-right-pca img").wait_for()
    assert not np.array_equal(pixels(page, "compare-left-pca"), pixels(page, "compare-right-pca"))
    page.locator("#compare-photo img").click(position=dict(x=5, y=5))
    page.locator("#compare-left-similarity img").wait_for()
    page.locator("#compare-right-similarity img").wait_for()


def test_click_on_a_frame_track_correct_and_download(page, tmp_path):
    upload(page, "track", write_clip(tmp_path / "discs.mp4", 12))
    page.locator("#track-image img").wait_for()
    status = page.locator("#track-status")
    playwright.expect(status).to_have_text("0 of 12 frames have masks, no object yet")
    plain = pixels(page, "track-image")
    page.locator("#track-image img").click(position=dict(x=34, y=48))
    playwright.expect(status).to_have_text("1 of 12 frames have masks, objects 1")
    assert not np.array_equal(plain, pixels(page, "track-image"))
    page.locator("#track-go").click()
    playwright.expect(status).to_have_text("12 of 12 frames have masks, objects 1")
    page.locator("#track-frame input[type=number]").fill("4")
    page.keyboard.press("Enter")
    page.get_by_label("beside it").check()
    page.wait_for_timeout(500)
    page.locator("#track-image img").click(position=dict(x=5, y=5))
    playwright.expect(status).to_have_text("5 of 12 frames have masks, objects 1")
    page.locator("#track-undo").click()
    page.locator("#track-go").click()
    playwright.expect(status).to_have_text("12 of 12 frames have masks, objects 1")
    page.locator("#track-masks").click()
    page.locator("#track-out a").first.wait_for()
    assert downloaded(page, "track-out").count(b"discs/00011.png") == 2  # in the zip and in its directory


def test_a_broken_file_and_a_large_one_are_sentences(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    upload(page, "detect", tmp_path / "broken.png")
    toast = page.locator(".toast-body")
    playwright.expect(toast).to_contain_text("broken.png is not a readable image (7 bytes). Replace it")
    assert "Traceback" not in page.content()
    (tmp_path / "large.png").write_bytes(bytes(60_000_000))
    upload(page, "features", tmp_path / "large.png")
    playwright.expect(toast.last).to_contain_text("large.png")
    playwright.expect(toast.last).to_contain_text(re.compile(r"maximum allowed size of 50"))
    upload(page, "track", write_clip(tmp_path / "long.mp4", 31))
    playwright.expect(toast.last).to_contain_text("long.mp4 has 31 frames, and the page tracks at most 30")


def test_one_job_runs_at_a_time(browser, address, foreign, image):
    """Of several users and tabs."""
    Busy.most = 0
    tabs = ["detect", "depth", "detect"]
    users = [new_page(browser, address, foreign) for _ in tabs]
    for user, tab in zip(users, tabs, strict=True):
        user.get_by_role("tab", name=tab.capitalize()).click()
    for user, tab in zip(users, tabs, strict=True):
        user.locator(f"#{tab}-file input[type=file]").set_input_files(image)
    for user, tab in zip(users, tabs, strict=True):
        user.locator("#detect-image img" if tab == "detect" else "#depth-slider img").first.wait_for()
    assert Busy.most == 1


def test_two_users_at_once_see_their_own(browser, address, foreign, tmp_path):
    users, clips = [new_page(browser, address, foreign) for _ in range(2)], (6, 8)
    for user, frames in zip(users, clips, strict=True):
        upload(user, "track", write_clip(tmp_path / f"{frames}.mp4", frames))
    for user in users:
        user.locator("#track-image img").click(position=dict(x=34, y=48))
        user.locator("#track-go").click()  # at once: the second waits in the queue
    for user, frames in zip(users, clips, strict=True):
        text = f"{frames} of {frames} frames have masks, objects 1"
        playwright.expect(user.locator("#track-status")).to_have_text(text)
    assert foreign == []


def test_label_two_objects_correct_export_and_continue_after_a_dead_server(browser, randomize, foreign, tmp_path):
    """The second server knows nothing but the folder of the first."""
    from pe_spatial.app.page import build_page, serve

    def start(port):
        models = fake_models(randomize, labels=tmp_path / "labels")
        server = build_page(models)
        address = serve(server, models, host="127.0.0.1", port=port)
        page = new_page(browser, address, foreign)
        return server, page, page.locator("#label-status")

    server, page, status = start(7894)
    upload(page, "label", write_clip(tmp_path / "discs.mp4", 8))
    playwright.expect(status).to_have_text("0 of 8 frames have masks, 0 accepted; objects: none yet")
    page.locator("#label-class textarea, #label-class input").first.fill("disc")
    page.locator("#label-image img").click(position=dict(x=34, y=48))
    playwright.expect(status).to_contain_text("1 of 8 frames have masks, 0 accepted; objects: 1 disc;")
    page.locator("#label-object input").fill("2")
    page.locator("#label-image img").click(position=dict(x=90, y=20))
    playwright.expect(status).to_contain_text("objects: 1 disc, 2 disc;")
    page.locator("#label-go").click()
    playwright.expect(status).to_contain_text("8 of 8 frames have masks")
    page.locator("#label-image").hover()
    page.keyboard.press("ArrowLeft")
    playwright.expect(status).to_contain_text("confidence on frame 6")
    page.locator("#label-object input").fill("1")
    page.get_by_label("beside it").last.check()
    page.locator("#label-image img").click(position=dict(x=5, y=5))  # the correction discards the last frame
    playwright.expect(status).to_contain_text("7 of 8 frames have masks")
    page.locator("#label-status").click()
    page.keyboard.press("t")
    playwright.expect(status).to_contain_text("8 of 8 frames have masks")
    page.keyboard.press("a")
    playwright.expect(status).to_contain_text("1 accepted")
    shown = pixels(page, "label-image")
    page.close()
    server.close(verbose=False)
    server, page, status = start(7895)
    page.get_by_role("tab", name="Label").click()
    page.locator("#label-known input").click()
    page.get_by_role("option", name="discs").click()
    playwright.expect(status).to_contain_text("objects: 1 disc, 2 disc")
    page.locator("#label-go").click()
    playwright.expect(status).to_contain_text("8 of 8 frames have masks, 1 accepted")
    assert np.array_equal(shown, pixels(page, "label-image"))
    page.locator("#label-export").click()
    page.locator("#label-out a").first.wait_for()
    assert downloaded(page, "label-out").count(b"coco/instances.json") == 2  # in the zip and in its directory
    server.close(verbose=False)
    assert foreign == []

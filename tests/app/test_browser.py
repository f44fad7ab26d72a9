"""The page in Chromium: uploads, clicks, sliders, errors, two users, and no request to another server."""

import io
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from helpers.app import Busy, served, start_server, write_clip
from PIL import Image

from pe_spatial.app.models import Limits

CHROMIUM = Path("/usr/bin/chromium")
TIMEOUT = 60_000  # ms; on a busy machine an image takes seconds
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

    playwright.expect.set_options(timeout=TIMEOUT)


@pytest.fixture(scope="module")
def address():
    with served(limits=Limits(max_frames=30)) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Return `open_page(address)`; no page may ask another server for anything."""
    foreign = []

    def open_page(address):
        page = browser.new_context(viewport=dict(width=1300, height=900)).new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("request", lambda x: x.url.startswith((address, "data:", "blob:")) or foreign.append(x.url))
        page.goto(address)
        page.get_by_role("tab", name="Detect").wait_for()
        return page

    yield open_page
    for context in browser.contexts:
        context.close()
    assert foreign == []


@pytest.fixture
def page(open_page, address):
    return open_page(address)


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
    page.wait_for_function("([id, url]) => document.querySelector(`#${id} img`).src != url", arg=[name, before])


def source(page, name):
    return page.locator(f"#{name} img").first.evaluate("x => x.src")


def wait_for_end(page):
    """Wait until no job runs: a click is dropped while the job of an earlier one ends, and its end shows it again."""
    playwright.expect(page.locator("[data-testid=status-tracker]:not(.hide)")).to_have_count(0)


def says(status, text):
    """Wait until a tab's status holds the text and the job that said so has ended."""
    playwright.expect(status).to_contain_text(text)
    wait_for_end(status.page)


def click_image(page, name, x, y):
    """Click on an image once it is loaded: its size gives the click's place in it."""
    page.wait_for_function(
        "id => (image => image?.complete && image.naturalWidth)(document.querySelector(`#${id} img`))", arg=name
    )
    page.locator(f"#{name} img").click(position=dict(x=x, y=y))


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
    click_image(page, "features-photo", 5, 5)
    page.locator("#features-similarity img").wait_for()
    brightest = pixels(page, "features-similarity").sum(-1)
    assert brightest[0, 0] == brightest.max()  # the patch that was clicked


def test_a_phrase_and_another_one(page, image):
    upload(page, "features", image)
    page.locator("#features-pca img").wait_for()
    wait_for_end(page)
    box = page.locator("#features-phrase textarea, #features-phrase input").first
    box.fill("a red cone")
    box.press("Enter")
    page.locator("#features-where img").wait_for()
    first, before = pixels(page, "features-where"), source(page, "features-where")
    box.fill("wood")
    box.press("Enter")
    wait_for_change(page, "features-where", before)
    assert not np.array_equal(first, pixels(page, "features-where"))


def test_compare_two_encoders(page, image):
    upload(page, "compare", image)
    page.locator("#compare-right-pca img").wait_for()
    assert not np.array_equal(pixels(page, "compare-left-pca"), pixels(page, "compare-right-pca"))
    click_image(page, "compare-photo", 5, 5)
    page.locator("#compare-left-similarity img").wait_for()
    page.locator("#compare-right-similarity img").wait_for()


def test_click_on_a_frame_track_correct_and_download(page, tmp_path):
    upload(page, "track", write_clip(tmp_path / "discs.mp4", 12))
    status = page.locator("#track-status")
    says(status, "0 of 12 frames have masks, no object yet")
    plain = pixels(page, "track-image")
    click_image(page, "track-image", 34, 48)
    says(status, "1 of 12 frames have masks, objects 1")
    assert not np.array_equal(plain, pixels(page, "track-image"))
    page.locator("#track-go").click()
    says(status, "12 of 12 frames have masks, objects 1")
    last = source(page, "track-image")
    page.locator("#track-frame input[type=number]").fill("4")
    page.keyboard.press("Enter")
    wait_for_change(page, "track-image", last)
    page.get_by_label("beside it").check()
    click_image(page, "track-image", 5, 5)
    says(status, "5 of 12 frames have masks, objects 1")
    page.locator("#track-undo").click()
    wait_for_end(page)
    page.locator("#track-go").click()
    says(status, "12 of 12 frames have masks, objects 1")
    page.locator("#track-masks").click()
    page.locator("#track-out a").first.wait_for()
    assert downloaded(page, "track-out").count(b"discs/00011.png") == 2  # in the zip and in its directory


def test_several_tasks_of_a_video(page, tmp_path):
    upload(page, "together", write_clip(tmp_path / "discs.mp4", 5))
    page.locator("#together-out a").first.wait_for()
    playwright.expect(page.locator("#together-costs")).to_contain_text("5 frames; medians in ms: 1 encodes 10")
    assert pixels(page, "together-image").shape == (96, 256, 3)
    assert downloaded(page, "together-out")[4:8] == b"ftyp"


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
    playwright.expect(toast.last).to_contain_text("long.mp4 has 31 frames, and at most 30")


def test_one_job_runs_at_a_time(open_page, address, image):
    """Of several users and tabs."""
    Busy.most = 0
    tabs = ["detect", "depth", "detect"]
    users = [open_page(address) for _ in tabs]
    for user, tab in zip(users, tabs, strict=True):
        user.get_by_role("tab", name=tab.capitalize()).click()
    for user, tab in zip(users, tabs, strict=True):
        user.locator(f"#{tab}-file input[type=file]").set_input_files(image)
    for user, tab in zip(users, tabs, strict=True):
        user.locator("#detect-image img" if tab == "detect" else "#depth-slider img").first.wait_for()
    assert Busy.most == 1


def test_two_users_at_once_see_their_own(open_page, address, tmp_path):
    users, clips = [open_page(address) for _ in range(2)], (6, 8)
    for user, frames in zip(users, clips, strict=True):
        upload(user, "track", write_clip(tmp_path / f"{frames}.mp4", frames))
    for user in users:
        click_image(user, "track-image", 34, 48)
        user.locator("#track-go").click()  # at once: the second waits in the queue
    for user, frames in zip(users, clips, strict=True):
        text = f"{frames} of {frames} frames have masks, objects 1"
        playwright.expect(user.locator("#track-status")).to_have_text(text)


def test_label_two_objects_correct_export_and_continue_after_a_dead_server(open_page, tmp_path):
    """The second server knows nothing but the folder of the first, which was killed."""
    server, address = start_server(labels=tmp_path / "labels")
    page = open_page(address)
    status = page.locator("#label-status")
    upload(page, "label", write_clip(tmp_path / "discs.mp4", 8))
    says(status, "0 of 8 frames have masks, 0 accepted; objects: none yet")
    page.locator("#label-class textarea, #label-class input").first.fill("disc")
    click_image(page, "label-image", 34, 48)
    says(status, "1 of 8 frames have masks, 0 accepted; objects: 1 disc;")
    page.locator("#label-object input").fill("2")
    click_image(page, "label-image", 90, 20)
    says(status, "objects: 1 disc, 2 disc;")
    page.locator("#label-go").click()
    says(status, "8 of 8 frames have masks")
    page.keyboard.press("ArrowLeft")
    says(status, "confidence on frame 6")
    page.locator("#label-object input").fill("1")
    page.get_by_label("beside it").last.check()
    click_image(page, "label-image", 5, 5)  # the correction discards the last frame
    says(status, "7 of 8 frames have masks")
    status.click()
    page.keyboard.press("t")
    says(status, "8 of 8 frames have masks")
    page.keyboard.press("a")
    says(status, "1 accepted")
    shown = pixels(page, "label-image")
    server.kill()
    server.join()
    with served(labels=tmp_path / "labels") as address:
        page = open_page(address)
        status = page.locator("#label-status")
        page.get_by_role("tab", name="Label").click()
        page.locator("#label-known input").click()
        page.get_by_role("option", name="discs").click()
        says(status, "objects: 1 disc, 2 disc")
        page.locator("#label-go").click()
        says(status, "8 of 8 frames have masks, 1 accepted")
        assert np.array_equal(shown, pixels(page, "label-image"))
        page.locator("#label-export").click()
        page.locator("#label-out a").first.wait_for()
        assert downloaded(page, "label-out").count(b"coco/instances.json") == 2  # in the zip and in its directory

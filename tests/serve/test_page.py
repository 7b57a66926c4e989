"""The page, as a person uses it, in a real browser: Debian's chromium."""

import base64
import contextlib
import io
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.serve import tiny

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium"),
]
WAIT = 60_000  # milliseconds


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address():
    with tiny.served(hosts=("localhost",)) as (address, _):
        yield address


@contextlib.contextmanager
def opened(browser, address):
    """The page; the test fails if anything in it does."""
    page = browser.new_page(viewport={"width": 1180, "height": 900})
    errors, elsewhere = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("request", lambda request: request.url.startswith(("data:", address)) or elsewhere.append(request.url))
    page.goto(address)
    expect(page.locator(".go:visible")).to_be_visible()
    yield page
    assert not errors and not elsewhere
    page.close()


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        yield page


def shown(page, selector):
    """The picture in an <img>."""
    source = page.locator(selector).first.get_attribute("src")
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def file_of(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"name": "picture.png", "mimeType": "image/png", "buffer": file.getvalue()}


def draw(page, **fields):
    for name, value in fields.items():
        page.fill(f"#text-{name}", str(value))
    page.click("#text .go")
    expect(page.locator("#status")).to_have_text("done", timeout=WAIT)


def test_type_and_get_pictures_that_say_how_they_were_made(page):
    draw(page, prompt="5", num_images=2, steps=3, seed=11)
    expect(page.locator("#text .pictures img")).to_have_count(2)
    expect(page.locator("#gallery .pictures img")).to_have_count(2)
    page.locator("#text .pictures button").nth(1).click()
    expect(page.locator("dialog dl")).to_contain_text("Seed12")
    with page.expect_download() as download:
        page.click("dialog .save")
    saved = Image.open(download.value.path())
    assert saved.size == (8, 8) and (saved.text["prompt"], saved.text["seed"]) == ("5", "12")


def test_the_seed_stays_only_while_it_is_locked(page):
    draw(page, prompt="5")
    first = page.input_value("#text-seed")
    draw(page)
    second = page.input_value("#text-seed")
    page.click("#text .seed button >> nth=0")
    draw(page)
    assert first != second == page.input_value("#text-seed")


def test_a_picture_that_is_dropped_in_gives_its_settings_back(page):
    draw(page, prompt="7", steps=5, seed=99, guidance=2.5)
    picture, before = shown(page, "#text .pictures img"), np.asarray(shown(page, "#text .pictures img"))
    page.reload()
    drop(page, "body", file_of_png(picture))
    page.click("dialog .use")
    assert [page.input_value(f"#text-{name}") for name in ("prompt", "steps", "seed", "guidance")] == [
        "7",
        "5",
        "99",
        "2.5",
    ]
    draw(page)
    np.testing.assert_array_equal(np.asarray(shown(page, "#text .pictures img")), before)


def test_guidance_may_be_typed_beyond_its_slider(page):
    assert page.get_attribute("#text .guidance input[type=range]", "max") == "30"
    draw(page, prompt="3", steps=2, guidance=45)
    assert shown(page, "#text .pictures img").text["guidance"] == "45.0"


def file_of_png(picture):
    """The bytes of a picture with its texts, in base64."""
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    for name, text in picture.text.items():
        info.add_itxt(name, text)
    picture.save(file, "PNG", pnginfo=info)
    return base64.b64encode(file.getvalue()).decode()


def drop(page, selector, text):
    """Drop a PNG on an element."""
    transfer = page.evaluate_handle(
        """text => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            return transfer;
        }""",
        text,
    )
    page.dispatch_event(selector, "drop", {"dataTransfer": transfer})


def test_cancel(page):
    page.fill("#text-prompt", tiny.SLOW)
    page.fill("#text-steps", "1000")
    page.fill("#text-num_images", "6")
    page.click("#text .go")
    expect(page.locator("#status")).to_have_text(re.compile(r"step \d+ of 1000"), timeout=WAIT)
    page.click("#text .cancel")
    expect(page.locator("#status")).to_have_text("cancelled")
    draw(page, prompt=5, steps=2, num_images=1)


def test_what_the_server_does_is_told_apart_from_the_request(page):
    page.route("**/health", lambda route: route.fulfill(json={"status": "warming"}))
    page.reload()
    expect(page.locator("#server")).to_contain_text("preparing")
    draw(page, prompt="5", steps=2)
    page.unroute("**/health")
    expect(page.locator("#server")).to_have_text("", timeout=WAIT)
    expect(page.locator("#status")).to_have_text("done")


def test_a_wrong_prompt_is_told(page):
    page.fill("#text-prompt", "cat")
    page.click("#text .go")
    expect(page.locator("#status")).to_have_text(re.compile("expected a number in 0..9, got 'cat'"), timeout=WAIT)


def test_the_canvas_follows_the_brush(page):
    page.click("#tab-live")
    expect(page.locator("#live .speed")).to_have_text(re.compile(r"\d+ ms"), timeout=WAIT)
    before = page.locator("#live .result").get_attribute("src")
    box = page.locator("#live canvas").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 150, box["y"] + 150, steps=5)
    page.mouse.up()
    expect(page.locator("#live .result")).not_to_have_attribute("src", before, timeout=WAIT)
    painted = page.locator("#live .result").get_attribute("src")
    page.fill("#live-strength", "0.9")
    expect(page.locator("#live .result")).not_to_have_attribute("src", painted, timeout=WAIT)


def test_why_the_live_canvas_is_closed_is_told(page):
    """The server of these tests takes 500,000 bytes of a state."""
    told = page.evaluate(
        """async () => {
            const { Live } = await import("/page/api.js");
            const state = { prompt: "3", image: "A".repeat(600000) };
            return new Promise((told) => new Live(() => state, () => {}, told));
        }"""
    )
    assert "500000 bytes" in told


def test_what_is_not_marked_stays_as_it_is(page):
    page.click("#tab-edit")
    inpaint(page)


def test_the_page_of_an_inpainting_model_offers_nothing_else(browser):
    with tiny.served(tiny.load_inpainting, hosts=("localhost",)) as (address, _), opened(browser, address) as page:
        expect(page.locator("[role=tab]:visible")).to_have_count(1)
        inpaint(page)
        page.locator("#gallery .pictures button").first.click()
        expect(page.locator("dialog [data-to]:visible")).to_have_count(1)
        page.click("dialog .use")
        assert page.input_value("#edit-prompt") == "5"


def test_the_page_of_a_consistency_model_shows_what_it_can_do(browser):
    with tiny.served(tiny.load_student, hosts=("localhost",)) as (address, _), opened(browser, address) as page:
        expect(page.locator("[role=tab]:visible")).to_have_count(5)
        expect(page.locator("#tab-style")).to_be_hidden()
        page.click("#tab-how")
        page.fill("#how-prompt", "5")
        page.click("#how .go")
        expect(page.locator("#status")).to_have_text("done", timeout=WAIT)
        expect(page.locator("#how article:visible h2")).to_have_text(["Into noise", "And back", "How much of each"])
        expect(page.locator("#how article:visible img")).to_have_count(16)


def inpaint(page):
    """Draw a part of a picture anew; the rest must not change."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    page.set_input_files("#edit .open", file_of(picture))
    page.fill("#edit-prompt", "5")
    page.locator("#edit .brush").fill("2")
    box = page.locator("#edit canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.1)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.9, steps=8)
    page.mouse.up()
    page.click("#edit .go")
    expect(page.locator("#status")).to_have_text("done", timeout=WAIT)
    changed = np.any(np.asarray(shown(page, "#edit .result")) != np.asarray(picture), axis=-1)
    assert changed[:, 1:3].any() and not changed[:, 4:].any()


def test_style_morph_and_how_it_works(page):
    draw(page, prompt="5")
    page.locator("#text .pictures button").first.click()
    page.click("dialog [data-to=style]")
    page.fill("#style-prompt", "")
    page.click("#style .go")
    expect(page.locator("#status")).to_have_text("done", timeout=WAIT)
    assert shown(page, "#style .result").size == (8, 8)
    page.click("#tab-morph")
    page.fill("#morph-prompt", "5")
    page.fill("#morph-other_prompt", "")
    page.fill("#morph-num_images", "4")
    page.click("#morph .go")
    expect(page.locator("#morph .pictures img")).to_have_count(5, timeout=WAIT)
    assert shown(page, "#morph .pictures img").n_frames == 6
    page.click("#tab-how")
    page.fill("#how-prompt", "5")
    page.click("#how .go")
    expect(page.locator("#status")).to_have_text("done", timeout=WAIT)
    for strip, count in {"#forward": 8, "#backward": 8, "#scales": 4, "#solvers": 4}.items():
        expect(page.locator(f"{strip} img")).to_have_count(count)
    expect(page.locator("#curves path")).to_have_count(2)


def test_everything_can_be_done_by_keyboard(page):
    page.locator("#tab-text").focus()
    page.keyboard.press("Tab")
    expect(page.locator("#text-prompt")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("done", timeout=WAIT)
    page.locator("#text .pictures button").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_be_hidden()
    page.locator("#tab-text").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#live canvas")).to_be_visible()
    expect(page.locator("#live .speed")).to_have_text(re.compile(r"\d+ ms"), timeout=WAIT)
    before = page.locator("#live .result").get_attribute("src")
    page.locator("#live canvas").focus()
    page.keyboard.press("Space")
    expect(page.locator("#live .result")).not_to_have_attribute("src", before, timeout=WAIT)


def test_a_narrow_screen_shows_everything_without_scrolling_sideways(page):
    page.set_viewport_size({"width": 360, "height": 740})
    for tab in "text", "live", "edit", "style", "morph", "how":
        page.click(f"#tab-{tab}")
        expect(page.locator(f"#{tab} form")).to_be_in_viewport()
        box = page.locator("body").bounding_box()
        assert box["width"] <= 360
        assert page.locator(f"#{tab}").evaluate("element => element.scrollWidth <= element.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault(page, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.emulate_media(color_scheme=scheme)
    draw(page, prompt="5", num_images=2)
    for tab in "text", "live", "edit", "style", "morph", "how":
        page.click(f"#tab-{tab}")
        assert faults(axe, page) == [], tab
    page.click("#tab-text")
    page.locator("#text .pictures button").first.click()
    assert faults(axe, page) == []


def faults(axe, page):
    """What axe finds wrong: (rule, first element)."""
    return [(each["id"], each["nodes"][0]["html"]) for each in axe.run(page).response["violations"]]

"""The page, as a person uses it, in a real browser: Debian's chromium."""

import base64
import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import zipfile

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.serve import tiny

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium"),
]
WAIT = 60_000  # milliseconds
TABS = ("text", "live", "edit", "style", "morph", "how")
STEP = re.compile(r"step \d+ of \d+")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, service, folder of serve.save) of a model that has two examples and another size."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "examples").mkdir()
    for seed in (4, 5):
        texts = {"prompt": str(seed), "seed": str(seed), "steps": "3", "solver": "ddim", "guidance": "2.5"}
        (folder / "examples" / f"{seed}.png").write_bytes(base64.b64decode(png(noise(seed), texts)))
    load, saved = functools.partial(tiny.load, str(folder), sizes=("24x8",)), folder / "saved"
    with tiny.served(load, hosts=("localhost",), save=str(saved)) as (address, service):
        yield address, service, saved


@pytest.fixture(scope="module")
def address(server):
    return server[0]


@contextlib.contextmanager
def opened(browser, address, allowed=("status of 400", "status of 503")):
    """The page; the test fails if anything in it does, or if it asks another server.

    allowed: parts of the errors that the browser may report.
    """
    page = browser.new_page(viewport={"width": 1180, "height": 900})
    errors, elsewhere = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    server = address.partition("/?")[0]
    own = ("data:", f"blob:{server}", server, server.replace("http", "ws"))
    page.on("request", lambda request: request.url.startswith(own) or elsewhere.append(request.url))
    page.goto(address)
    ready(page)
    yield page
    assert not elsewhere and not [error for error in errors if not any(part in error for part in allowed)]
    page.close()


def ready(page):
    expect(page.locator("body")).to_have_attribute("aria-busy", "false")


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        yield page


def noise(seed, size=(8, 8)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def shown(page, selector):
    """The picture in an <img>."""
    source = page.locator(selector).first.get_attribute("src")
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def png(picture, texts=None, international=True):
    """The bytes of a picture with texts, in base64."""
    info, file = PngInfo(), io.BytesIO()
    for name, text in (texts or {}).items():
        (info.add_itxt if international else info.add_text)(name, text)
    picture.save(file, "PNG", pnginfo=info)
    return base64.b64encode(file.getvalue()).decode()


def file_of(picture, name="picture.png"):
    return {"name": name, "mimeType": "image/png", "buffer": base64.b64decode(png(picture))}


def drop(page, selector, text):
    """Drop a file, in base64, on an element."""
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


def fill(page, tab="text", **fields):
    """Enter values; those that are folded away too."""
    for name, value in fields.items():
        field = page.locator(f"#{tab}-{name}")
        if not field.is_visible():
            page.click(f"#{tab} summary")
        if field.evaluate("element => element.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(str(value))


def says(page, text, tab="text"):
    expect(page.locator(f"#{tab} .message")).to_have_text(text, timeout=WAIT)


def draw(page, tab="text", **fields):
    fill(page, tab, **fields)
    page.click(f"#{tab} .go")
    says(page, "done", tab)


def entered(page, tab, *names):
    return [page.input_value(f"#{tab}-{name}") for name in names]


def stroke(page, tab, *places):
    """Paint through places, parts of the canvas's width and height."""
    box = page.locator(f"#{tab} canvas").bounding_box()
    for i, (x, y) in enumerate(places):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=5)
        if not i:
            page.mouse.down()
    page.mouse.up()


def painted(page, tab):
    return page.locator(f"#{tab} canvas").evaluate("canvas => canvas.toDataURL()")


# -- it shows what it can ----------------------------------------------------------------------------------------------


def test_an_example_gives_its_picture_and_its_settings_at_once(page):
    assert entered(page, "text", "prompt", "seed") == ["4", "4"], "the first one is there at the start"
    expect(page.locator("#examples img")).to_have_count(2)
    page.locator("#examples button").nth(1).click()
    assert entered(page, "text", "prompt", "seed", "guidance", "solver", "steps") == ["5", "5", "2.5", "ddim", "3"]
    np.testing.assert_array_equal(np.asarray(shown(page, "#text .stage > .pictures img")), np.asarray(noise(5)))
    draw(page)
    assert shown(page, "#text .stage > .pictures img").text["seed"] == "5"
    fill(page, prompt=tiny.SLOW, steps=400, num_images=3)
    page.click("#text .go")
    says(page, STEP)
    page.locator("#examples button").nth(0).click()
    says(page, "cancelled")
    np.testing.assert_array_equal(np.asarray(shown(page, "#text .stage > .pictures img")), np.asarray(noise(4)))


def test_words_that_the_model_knows_are_suggested_while_typing(page):
    fill(page, prompt="")
    expect(page.locator("#text .words button")).to_have_text(["0", "1", "2", "3", "4", "5"])
    page.focus("#text-prompt")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert entered(page, "text", "prompt") == ["1"]
    expect(page.locator("#text-prompt")).to_be_focused()


def test_suggestions_complete_names_and_add_styles_and_grounds(page):
    vocabulary = {"names": ["cat", "hot dog", "hot pepper"], "colours": ["red"], "styles": ["flat", "shaded"]}
    vocabulary["grounds"] = ["on a red background", "on a blue background"]

    def completions(text):
        call = 'async ([text, words]) => (await import("/page/words.js")).completions(text, words)'
        return page.evaluate(call, [text, vocabulary])

    assert completions("a hot d") == [["hot dog", "a hot dog"]]
    assert completions("a r")[0] == ["red", "a red"]
    assert ["flat", "a cat, flat"] in completions("a cat") and ["flat", "a cat, flat"] in completions("a cat, ")
    assert ["on a red background", "a cat on a red background, flat"] in completions("a cat, flat")
    assert all(word.startswith("on") for word, _ in completions("a cat, flat "))
    assert completions("a cat on a red background, flat") == []


# -- it keeps ----------------------------------------------------------------------------------------------------------


def test_pictures_and_settings_survive_a_reload_and_pictures_are_shown_once(page, server):
    draw(page, prompt="5", num_images=2, steps=3, seed=11, solver="unipc")
    expect(page.locator("#text .stage > .pictures img")).to_have_count(2)
    expect(page.locator("#gallery .pictures img")).to_have_count(0)
    page.reload()
    ready(page)
    expect(page.locator("#gallery .pictures img")).to_have_count(2)
    assert entered(page, "text", "prompt", "num_images", "steps", "solver") == ["5", "2", "3", "unipc"]
    assert sorted(file.name for file in server[2].glob("5-1?.png")) == ["5-11.png", "5-12.png"]
    assert Image.open(server[2] / "5-12.png").text["seed"] == "12"
    draw(page)
    assert entered(page, "text", "seed") != ["11"], "it was used before"


def test_captions_say_what_differs(page):
    draw(page, prompt="5", steps=3, seed=11, solver="ddim")
    draw(page, seed=12)
    draw(page, seed=12, solver="unipc")
    page.click("#tab-how")
    expect(page.locator("#gallery .pictures span")).to_have_text(["seed 12 · UniPC", "seed 12", "5 · seed 11"])


def test_pictures_are_deleted_brought_back_and_saved_together(page):
    draw(page, prompt="5", num_images=3, steps=2, seed=11)
    page.locator("#text .stage > .pictures button").nth(1).click()
    page.click("dialog .delete")
    expect(page.locator("#text .stage > .pictures img")).to_have_count(2)
    page.click("#gallery .undelete")
    expect(page.locator("#gallery .pictures img")).to_have_count(1)
    with page.expect_download() as download:
        page.click("#gallery .save")
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None and sorted(archive.namelist()) == ["5-11.png", "5-12.png", "5-13.png"]
        assert Image.open(io.BytesIO(archive.read("5-12.png"))).text["seed"] == "12"
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#gallery .empty-all")
    expect(page.locator("#gallery")).to_be_hidden()
    page.reload()
    ready(page)
    expect(page.locator("#examples img")).to_have_count(2)
    expect(page.locator("#gallery")).to_be_hidden()


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
    fill(page, prompt="1", steps=2)
    drop(page, "body", png(picture, picture.text))
    page.click("dialog .use")
    assert entered(page, "text", "prompt", "steps", "seed", "guidance") == ["7", "5", "99", "2.5"]
    draw(page)
    np.testing.assert_array_equal(np.asarray(shown(page, "#text .pictures img")), before)


def test_the_settings_of_automatic1111_are_read(page):
    parameters = "5\nNegative prompt: 3\nSteps: 7, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 4.5, "
    parameters += 'Seed: 77, Size: 16x8, Model hash: 0123, Model: "a, b", Version: v1.10.1'
    drop(page, "body", png(noise(0), {"parameters": parameters}, international=False))
    page.click("dialog .use")
    names = ("prompt", "negative_prompt", "steps", "solver", "spacing", "guidance", "seed", "width", "height")
    assert entered(page, "text", *names) == ["5", "3", "7", "dpmpp_2m_sde", "karras", "4.5", "77", "16", "8"]
    drop(page, "body", png(noise(0), {"parameters": "caf\xe9\nSteps: 3, Sampler: Euler a Exponential"}, False))
    page.click("dialog .use")
    assert entered(page, "text", "prompt", "solver", "spacing") == ["caf\xe9", "euler_ancestral", "logsnr"]


# -- large -------------------------------------------------------------------------------------------------------------


def test_the_picture_fills_the_window_and_what_happens_is_said_under_the_prompt(page):
    draw(page, prompt="5", num_images=1)
    picture = page.locator("#text .stage > .pictures img").bounding_box()
    assert picture["height"] > 0.75 * 900 and picture["y"] + picture["height"] < 900
    order = ("#text-prompt", "#text .go", "#text .message", "#text-num_images", "#text summary")
    heights = [page.locator(selector).bounding_box()["y"] for selector in order]
    assert heights == sorted(heights) and heights[2] < 300
    draw(page, num_images=4)
    last = page.locator("#text .stage > .pictures img").nth(3).bounding_box()
    assert last["width"] > 250 and last["y"] + last["height"] < 900


def test_a_wrong_field_that_is_folded_away_unfolds_and_is_named(page):
    fill(page, steps=5000)
    page.click("#text summary")
    page.click("#text .go")
    expect(page.locator("#text-steps")).to_be_visible()
    says(page, re.compile("Steps: Value must be less than or equal to 1000"))
    assert page.get_attribute("#text-steps", "aria-invalid") == "true"
    draw(page, prompt="5", steps=2)
    assert page.get_attribute("#text-steps", "aria-invalid") is None
    fill(page, width=16, height=17)
    page.evaluate("document.querySelector('#text form').noValidate = true")
    page.click("#text .go")
    says(page, re.compile("Height: "))


def test_a_picture_by_itself_has_neighbours_zoom_and_an_end(page):
    draw(page, prompt="5", num_images=3, steps=2, seed=11)
    page.locator("#text .stage > .pictures button").nth(1).click()
    expect(page.locator("dialog dl")).to_contain_text("Seed12")
    expect(page.locator("dialog .place")).to_have_text("2 of 3")
    page.keyboard.press("ArrowRight")
    expect(page.locator("dialog dl")).to_contain_text("Seed11")
    page.click("dialog .before")
    page.click("dialog .before")
    expect(page.locator("dialog dl")).to_contain_text("Seed13")
    expect(page.locator("dialog .before")).to_be_disabled()
    with page.expect_download() as download:
        page.click("dialog .save")
    saved = Image.open(download.value.path())
    assert download.value.suggested_filename == "5-13.png" and saved.text["seed"] == "13"
    small = page.locator("dialog img").bounding_box()["width"]
    page.click("dialog .zoom")
    assert page.locator("dialog img").bounding_box()["width"] == pytest.approx(2 * small, rel=0.05)
    page.mouse.click(3, 3)
    expect(page.locator("dialog")).to_be_hidden()


def test_guidance_may_be_typed_beyond_its_slider(page):
    assert page.get_attribute("#text .guidance input[type=range]", "max") == "30"
    draw(page, prompt="3", steps=2, guidance=45)
    assert shown(page, "#text .pictures img").text["guidance"] == "45.0"


def test_a_phone_shows_the_picture_first_and_nothing_beside_the_screen(page):
    page.set_viewport_size({"width": 360, "height": 740})
    draw(page, prompt="5", steps=2)
    picture = page.locator("#text .stage > .pictures img").bounding_box()
    assert picture["y"] < 150 and picture["width"] > 300
    assert picture["y"] < page.locator("#text-prompt").bounding_box()["y"]
    for tab in TABS:
        page.click(f"#tab-{tab}")
        expect(page.locator(f"#{tab} form")).to_be_visible()
        assert page.locator("body").bounding_box()["width"] <= 360
        assert page.locator(f"#{tab}").evaluate("element => element.scrollWidth <= element.clientWidth"), tab
    page.click("#tab-live")
    page.evaluate("scrollTo(0, 0)")
    expect(page.locator("#live .result")).to_be_visible(timeout=WAIT)
    for part in "canvas", ".result":
        box = page.locator(f"#live {part}").bounding_box()
        assert box["width"] > 180 and box["y"] + box["height"] <= 740, part


# -- the live canvas ---------------------------------------------------------------------------------------------------


def test_the_canvas_follows_the_brush(page):
    page.click("#tab-live")
    expect(page.locator("#live .speed")).to_have_text(re.compile(r"\d+ ms"), timeout=WAIT)
    assert entered(page, "live", "strength") == ["0.6"]
    before = page.locator("#live .result").get_attribute("src")
    stroke(page, "live", (0.1, 0.1), (0.6, 0.6))
    expect(page.locator("#live .result")).not_to_have_attribute("src", before, timeout=WAIT)
    after = page.locator("#live .result").get_attribute("src")
    page.fill("#live-strength", "0.9")
    expect(page.locator("#live .result")).not_to_have_attribute("src", after, timeout=WAIT)
    expect(page.locator("#live .speed")).to_have_text(re.compile(r"\d+ ms · [\d.]+ frames a second"), timeout=WAIT)


def test_strokes_are_undone_and_done_again_also_by_key(page):
    page.click("#tab-live")
    page.fill("#live-prompt", "3")
    states = [painted(page, "live")]
    for x in 0.3, 0.7:
        stroke(page, "live", (x, 0.2), (x, 0.8))
        states.append(painted(page, "live"))
    assert len(set(states)) == 3
    page.keyboard.press("Control+z")
    assert painted(page, "live") == states[1] and entered(page, "live", "prompt") == ["3"]
    page.click("#live .undo")
    assert painted(page, "live") == states[0]
    expect(page.locator("#live .undo")).to_be_disabled()
    page.keyboard.press("Control+Shift+z")
    page.click("#live .redo")
    assert painted(page, "live") == states[2]
    page.click("#live .clear")
    assert painted(page, "live") == states[0]
    page.keyboard.press("Control+z")
    assert painted(page, "live") == states[2]
    page.reload()
    ready(page)
    page.click("#tab-live")
    assert painted(page, "live") == states[2], "the canvas stays, too"


def test_swatches_eraser_and_the_ring_of_the_brush(page):
    page.click("#tab-live")
    page.set_input_files("#live .open", file_of(noise(1)))
    expect(page.locator("#live .undo")).to_be_enabled()
    opened_picture = painted(page, "live")
    page.click("#live .swatch[aria-label=blue]")
    assert page.input_value("#live .colour") == "#3f8fe0"
    page.locator("#live .brush").fill("4")
    stroke(page, "live", (0.2, 0.5), (0.8, 0.5))
    middle = "canvas => [...canvas.getContext('2d').getImageData(4, 4, 1, 1).data]"
    assert page.locator("#live canvas").evaluate(middle) == [0x3F, 0x8F, 0xE0, 255]
    ring, canvas = page.locator("#live .ring").bounding_box(), page.locator("#live canvas").bounding_box()
    assert ring["width"] == pytest.approx(canvas["width"] / 2, rel=0.05), "of the brush's size, 4 of 8 pixels"
    page.click("#live .eraser")
    page.locator("#live .brush").fill("24")
    stroke(page, "live", (0.5, 0.5), (0.6, 0.6))
    assert painted(page, "live") == opened_picture, "what was opened is under the strokes"


def test_the_canvas_is_connected_again_after_the_server_was_restarted(browser):
    with contextlib.ExitStack() as stack:
        with tiny.served(token="secret") as (address, _):
            page = stack.enter_context(opened(browser, f"{address}/?token=secret", allowed=("REFUSED", "401", "403")))
            page.click("#tab-live")
            expect(page.locator("#live .speed")).to_have_text(re.compile(r"\d+ ms"), timeout=WAIT)
        says(page, "The server does not answer. Is it still running? Trying again …", "live")
        expect(page.locator("#server")).to_contain_text("The server does not answer", timeout=WAIT)
        with tiny.served(token="secret", port=int(address.rpartition(":")[2])):
            says(page, "connected again", "live")
            before = page.locator("#live .result").get_attribute("src")
            stroke(page, "live", (0.1, 0.1), (0.6, 0.6))
            expect(page.locator("#live .result")).not_to_have_attribute("src", before, timeout=WAIT)
            expect(page.locator("#server")).to_have_text("", timeout=WAIT)
            page.click("#tab-text")
            draw(page, prompt="5", steps=2)
            page.context.clear_cookies()
            page.click("#text .go")
            says(page, re.compile("open the address with the token"))
            page.click("#tab-live")
            says(page, re.compile("open the address with the token.*Trying again"), "live")
            page.click("#tab-text")


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


# -- no silence --------------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_picture_is_told_in_its_tab(page):
    wrong = {"name": "notes.png", "mimeType": "image/png", "buffer": b"no picture"}
    for tab in "live", "edit", "style":
        page.click(f"#tab-{tab}")
        page.set_input_files(f"#{tab} .open", wrong)
        says(page, "notes.png is no picture that this browser can open", tab)
    drop(page, "#style figure", base64.b64encode(b"no picture").decode())
    says(page, "dropped.png is no picture that this browser can open", "style")
    page.click("#tab-text")
    says(page, "")
    drop(page, "body", png(noise(0)))
    says(page, re.compile("dropped.png has no settings of a picture"))


def test_what_is_missing_before_a_request_is_told(page):
    for tab, missing in {"style": "Open a picture first", "edit": "Mark a part of the picture"}.items():
        page.click(f"#tab-{tab}")
        expect(page.locator(f"#{tab} .result")).to_be_hidden()
        page.click(f"#{tab} .go")
        says(page, re.compile(missing), tab)
    page.click("#edit .again")
    says(page, "There is no result yet.", "edit")


def test_a_server_that_is_gone_is_told(browser, address):
    with opened(browser, address, allowed=("ERR_FAILED", "does not answer")) as page:
        fill(page, prompt="5")
        page.route("**/api/generate", lambda route: route.abort())
        page.click("#text .go")
        says(page, "The server does not answer. Is it still running?")
        page.unroute("**/api/generate")
        event = "event: progress\ndata: " + json.dumps({"done": 1, "total": 2, "previews": {}}) + "\n\n"
        page.route("**/api/generate", lambda route: route.fulfill(content_type="text/event-stream", body=event))
        page.click("#text .go")
        says(page, "The server does not answer. Is it still running?")
        page.unroute("**/api/generate")
        draw(page)
        page.route("**/api/model", lambda route: route.abort())
        page.reload()
        expect(page.locator("#server")).to_contain_text("The server does not answer")


def test_a_worker_that_dies_is_told_and_the_picture_comes_all_the_same(page, server):
    fill(page, prompt=tiny.SLOW, steps=300)
    page.click("#text .go")
    says(page, STEP)
    os.kill(server[1].engine.process.pid, signal.SIGKILL)
    says(page, re.compile("The process that draws ended. It is started again"))
    expect(page.locator("#server")).to_have_text("the model is loaded again", timeout=WAIT)
    says(page, STEP)
    says(page, "done")


def test_each_tab_has_a_message_of_its_own(page):
    fill(page, prompt="cat")
    page.click("#text .go")
    says(page, re.compile("expected a number in 0..9, got 'cat'"))
    page.click("#tab-morph")
    says(page, "", "morph")


def test_cancel(page):
    fill(page, prompt=tiny.SLOW, steps=1000, num_images=6)
    page.click("#text .go")
    says(page, STEP)
    page.click("#text .cancel")
    says(page, "cancelled")
    expect(page.locator("#text .coming")).to_have_count(0)
    draw(page, prompt=5, steps=2, num_images=1)


def test_what_the_server_does_is_told_apart_from_the_request(page):
    page.route("**/health", lambda route: route.fulfill(json={"status": "warming"}))
    page.reload()
    ready(page)
    expect(page.locator("#server")).to_contain_text("preparing")
    draw(page, prompt="5", steps=2)
    page.click("#tab-live")
    expect(page.locator("#live .result")).to_be_visible(timeout=WAIT)
    page.route("**/health", lambda route: route.fulfill(json={"status": "starting"}))
    says(page, "the model is loaded again", "live")
    page.unroute("**/health")
    expect(page.locator("#server")).to_have_text("", timeout=WAIT)
    page.fill("#live-prompt", "5")
    says(page, "", "live")
    page.click("#tab-text")
    says(page, "done")


def test_settings_go_to_the_tab_that_made_the_picture(page):
    fill(page, prompt="5", steps=4)
    page.click("#tab-live")
    fill(page, "live", prompt="3", steps=2)
    expect(page.locator("#live .result")).to_be_visible(timeout=WAIT)
    page.click("#live .keep")
    expect(page.locator("#gallery .pictures img")).to_have_count(1)
    kept = shown(page, "#gallery .pictures img")
    page.click("#tab-text")
    page.locator("#gallery .pictures button").first.click()
    page.click("dialog .use")
    expect(page.locator("#live canvas")).to_be_visible()
    assert entered(page, "text", "prompt", "steps") == ["5", "4"], "the canvas's few steps are not for other tabs"
    page.click("#tab-text")
    drop(page, "body", png(kept, kept.text))
    page.click("dialog .use")
    expect(page.locator("#live canvas")).to_be_visible()


# -- waiting is visible ------------------------------------------------------------------------------------------------


def test_places_for_the_pictures_are_there_at_once_and_the_queue_is_told(page):
    fill(page, prompt=tiny.SLOW, steps=400, num_images=3)
    page.click("#text .go")
    expect(page.locator("#text .coming")).to_have_count(3)
    expect(page.locator("#text .coming img")).to_have_count(3, timeout=WAIT)
    for tab, place in {"morph": "next", "how": "1 before you"}.items():
        page.click(f"#tab-{tab}")
        fill(page, tab, prompt="5")
        page.click(f"#{tab} .go")
        says(page, re.compile(rf"{place}(, about \d+ s)?$"), tab)
    for tab in "how", "morph", "text":
        page.click(f"#tab-{tab}")
        page.click(f"#{tab} .cancel")
        says(page, "cancelled", tab)


def test_a_morph_shows_what_its_pictures_will_become(page):
    page.click("#tab-morph")
    fill(page, "morph", prompt=tiny.SLOW, other_prompt="", num_images=4, steps=60)
    page.click("#morph .go")
    expect(page.locator("#morph .coming")).to_have_count(4)
    expect(page.locator("#morph .coming img").first).to_be_visible(timeout=WAIT)
    says(page, "done", "morph")


def test_a_size_that_is_prepared_is_told(page):
    messages = page.evaluate_handle(
        """() => {
            const told = [], message = document.querySelector("#text .message");
            new MutationObserver(() => told.push(message.textContent)).observe(message, { childList: true });
            return told;
        }"""
    )
    draw(page, prompt="5", steps=2, width=24, height=8)
    assert shown(page, "#text .pictures img").size == (24, 8)
    assert any(re.fullmatch(r"preparing 24 x 8(, about \d+ s)?", text) for text in messages.json_value())
    count = len(messages.json_value())
    draw(page, prompt="6", steps=2, seed=3)
    assert not any("preparing" in text for text in messages.json_value()[count:]), "only the first time"


# -- the other tabs ----------------------------------------------------------------------------------------------------


def test_what_is_not_marked_stays_as_it_is(page):
    page.click("#tab-edit")
    inpaint(page)


def test_the_page_of_an_inpainting_model_offers_nothing_else(browser):
    with tiny.served(tiny.load_inpainting, hosts=("localhost",)) as (address, _), opened(browser, address) as page:
        expect(page.locator("[role=tab]:visible")).to_have_count(1)
        inpaint(page)
        page.reload()
        ready(page)
        page.locator("#gallery .pictures button").first.click()
        expect(page.locator("dialog [data-to]:visible")).to_have_count(1)
        page.click("dialog .use")
        assert page.input_value("#edit-prompt") == "5"


def test_a_picture_is_edited_with_words_where_the_model_reads_references(browser, page):
    expect(page.locator("#tab-words")).to_be_hidden()
    served = tiny.served(tiny.load_reading, hosts=("localhost",))
    with served as (address, _), opened(browser, address) as page:
        page.click("#tab-words")
        page.click("#words .go")
        says(page, re.compile("Open a picture first"), "words")
        page.fill("#words-seed", "1")
        results = []
        for colour in "red", "blue":
            page.set_input_files("#words .open", file_of(Image.new("RGB", (16, 8), colour)))
            draw(page, "words", prompt="3", seed=1)
            results.append(np.asarray(shown(page, "#words .result"), float).mean((0, 1)))
        assert results[0][0] > results[1][0] + 20 and results[0][2] < results[1][2] - 20
        before = painted(page, "words")
        page.click("#words .again")
        page.wait_for_function("before => document.querySelector('#words canvas').toDataURL() !== before", arg=before)
        page.locator("#gallery .pictures button").first.click()
        page.click("dialog .use")
        says(page, "The settings of the picture are entered.", "words")
        assert entered(page, "words", "prompt", "seed") == ["3", "1"]
        axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
        assert faults(axe, page) == []


def test_the_page_of_a_consistency_model_shows_what_it_can_do(browser):
    with tiny.served(tiny.load_student, hosts=("localhost",)) as (address, _), opened(browser, address) as page:
        expect(page.locator("[role=tab]:visible")).to_have_count(5)
        expect(page.locator("#tab-style")).to_be_hidden()
        expect(page.locator("#examples button")).to_have_text(["3", "7"])
        page.locator("#examples button").nth(1).click()
        says(page, "done")
        assert shown(page, "#text .pictures img").text["prompt"] == "7"
        page.click("#tab-how")
        draw(page, "how", prompt="5")
        expect(page.locator("#how article:visible h2")).to_have_text(["Into noise", "And back", "How much of each"])
        expect(page.locator("#how article:visible img")).to_have_count(16)


def inpaint(page):
    """Draw a part of a picture anew; the rest must not change."""
    picture = noise(0)
    page.set_input_files("#edit .open", file_of(picture))
    expect(page.locator("#edit .undo")).to_be_enabled()
    page.fill("#edit-prompt", "5")
    page.locator("#edit .brush").fill("2")
    stroke(page, "edit", (0.25, 0.1), (0.25, 0.9))
    page.click("#edit .go")
    says(page, "done", "edit")
    changed = np.any(np.asarray(shown(page, "#edit .result")) != np.asarray(picture), axis=-1)
    assert changed[:, 1:3].any() and not changed[:, 4:].any()


def test_style_morph_and_how_it_works(page):
    draw(page, prompt="5")
    page.locator("#text .pictures button").first.click()
    page.click("dialog [data-to=style]")
    draw(page, "style", prompt="")
    assert shown(page, "#style .result").size == (8, 8)
    page.click("#tab-morph")
    draw(page, "morph", prompt="5", other_prompt="", num_images=4)
    expect(page.locator("#morph .frames img")).to_have_count(4)
    assert shown(page, "#morph .animation img").n_frames == 6
    page.locator("#morph .animation button").click()
    with page.expect_download() as download:
        page.click("dialog .gif")
    gif = Image.open(download.value.path())
    assert (gif.format, gif.n_frames, gif.info["loop"]) == ("GIF", 6, 0)
    page.click("dialog .close")
    page.click("#tab-how")
    draw(page, "how", prompt="5")
    for strip, count in {"#forward": 8, "#backward": 8, "#scales": 4, "#solvers": 4}.items():
        expect(page.locator(f"{strip} img")).to_have_count(count)
    expect(page.locator("#solvers figcaption")).to_have_text(["DDIM", "DPM++ 2M", "UniPC", "DDPM"])
    expect(page.locator("#curves path")).to_have_count(2)


# -- words, help and looks ---------------------------------------------------------------------------------------------


def test_methods_have_the_names_that_people_know_and_fields_have_help(page):
    page.click("#text summary")
    expect(page.locator("#text-solver option[value=dpmpp_2m]")).to_have_text("DPM++ 2M")
    expect(page.locator("#text .spacing label")).to_have_text("How the steps are spread")
    for name in "steps", "guidance", "solver", "spacing", "seed":
        help_of = page.locator(f"#{page.get_attribute(f'#text-{name}', 'aria-describedby')}")
        expect(help_of).to_be_visible()
        assert help_of.inner_text()
    assert page.locator(".logo").evaluate("image => image.naturalWidth") > 0


def test_dark_and_light_stay_as_chosen(page):
    page.emulate_media(color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("#theme")
    dark = page.evaluate(background)
    page.reload()
    ready(page)
    expect(page.locator("#examples img")).to_have_count(2)
    assert light != dark == page.evaluate(background)


def test_everything_can_be_done_by_keyboard(page):
    page.locator("#tab-text").focus()
    page.keyboard.press("Tab")
    expect(page.locator("#text-prompt")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    says(page, "done")
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault(page, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.emulate_media(color_scheme=scheme)
    assert faults(axe, page) == [], "examples"
    draw(page, prompt="5", num_images=2)
    page.click("#text summary")
    for tab in TABS:
        page.click(f"#tab-{tab}")
        assert faults(axe, page) == [], tab
    page.click("#tab-text")
    page.locator("#text .pictures button").first.click()
    assert faults(axe, page) == []
    page.click("dialog .zoom")
    assert faults(axe, page) == [], "zoomed"


def faults(axe, page):
    """What axe finds wrong: (rule, first element)."""
    return [(each["id"], each["nodes"][0]["html"]) for each in axe.run(page).response["violations"]]

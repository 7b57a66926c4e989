"""The HTTP interfaces: pictures, clear errors for whatever is wrong, and a server that stays alive."""

import base64
import concurrent.futures
import functools
import io
import json
import struct
import time
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from diffusion_jax.serve import webui_bodies
from diffusion_jax.serve.sizes import Frame
from tests.serve import tiny

SEEN = (np.arange(8 * 8 * 3).reshape(8, 8, 3) * 5 % 256).astype(np.uint8)


@pytest.fixture(scope="module")
def client():
    with tiny.served(hosts=("localhost",)) as (address, _), httpx.Client(base_url=address, timeout=60) as client:
        yield client
        assert client.get("/health").status_code == 200, "the server is alive after all of this"


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options)
    return base64.b64encode(file.getvalue()).decode()


def opened(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def half_mask(invert=False):
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    return 255 - mask if invert else mask


def events(client, **values):
    """[(name, data)] of /api/generate."""
    answer = client.post("/api/generate", json={"prompt": "3", "seed": 1} | values)
    assert answer.status_code == 200, answer.text
    parts = [part.split("\n") for part in answer.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


def pictures(client, **values):
    return [opened(data["image"]) for name, data in events(client, **values) if name == "picture"]


def test_pictures_come_with_steps_previews_and_their_settings(client):
    received = events(client, num_images=2, previews="all", steps=3, solver="ddim")
    assert [name for name, _ in received if name != "progress"] == ["picture", "picture", "done"]
    steps = [data for name, data in received if name == "progress"]
    assert {step["done"] for step in steps} == {1, 2, 3} and all(step["previews"] for step in steps)
    first, second = (data for name, data in received if name == "picture")
    image = opened(first["image"])
    assert image.size == (8, 8) and image.text == first["settings"]
    assert (image.text["prompt"], image.text["solver"], image.text["steps"]) == ("3", "ddim", "3")
    assert (first["seed"], second["seed"]) == (1, 2) and opened(second["image"]).text["seed"] == "2"


def test_the_settings_of_a_picture_draw_it_again(client):
    (before,) = pictures(client, seed=None, guidance=2.5, solver="unipc", steps=5)
    text = before.text
    (again,) = pictures(
        client, prompt=text["prompt"], seed=int(text["seed"]), guidance=float(text["guidance"]), solver="unipc", steps=5
    )
    np.testing.assert_array_equal(np.asarray(again), np.asarray(before))


def test_outside_the_mask_no_pixel_changes(client):
    (result,) = pictures(client, image=encoded(SEEN), mask=encoded(half_mask()))
    result = np.asarray(result)
    np.testing.assert_array_equal(result[:, 4:], SEEN[:, 4:])
    assert np.any(result[:, :4] != SEEN[:, :4])


def test_a_morph_is_an_animation_that_goes_there_and_back(client):
    received = dict(events(client, task="morph", prompt="3", seed=5, num_images=4, negative_prompt="1", solver="ddim"))
    animation = opened(received["animation"]["image"])
    assert animation.n_frames == 6 and animation.text["task"] == "morph" and "other_seed" in animation.text


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": 3},
        {"prompt": "3".rjust(10_001)},
        {"steps": "20"},
        {"steps": 0},
        {"steps": 10**9},
        {"steps": True},
        {"guidance": None},
        {"guidance": float("nan")},
        {"guidance": 1e9},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": 1.5},
        {"num_images": 9},
        {"width": 4096},
        {"height": 0},
        {"solver": "magic"},
        {"solver": ["ddim"]},
        {"spacing": "magic"},
        {"task": "train"},
        {"previews": 1},
        {"strength": 2},
        {"image": "zz!"},
        {"image": {"path": "/etc/passwd"}},
        {"image": "/etc/passwd"},
        {"mask": encoded(SEEN)},
        {"unknown": 1},
    ],
    ids=repr,
)
def test_a_wrong_field_is_one_clear_error_that_names_it(client, values):
    body = json.dumps({"prompt": "3"} | values)
    answer = client.post("/api/generate", content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    (field,) = values
    assert field in error["message"] and "Traceback" not in answer.text and "/work" not in answer.text


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000], ids=range(6))
def test_a_body_that_is_no_object_is_an_error(client, body):
    for path in ("/api/generate", "/v1/images/generations", "/sdapi/v1/txt2img"):
        answer = client.post(path, content=body)
        assert answer.status_code == 400 and "the body must be a JSON object" in answer.text


def png_of_size(width, height):
    """A PNG that says it is of this size, with almost no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
    return base64.b64encode(data).decode()


def test_pictures_that_cannot_be_used_are_refused(client):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    wrong = {
        "900000000 pixels": png_of_size(30000, 30000),
        "not a readable picture": encoded(noise)[: 4 * 500],
        "not a picture of a known format": base64.b64encode(b"P6 1 1 255 abc").decode(),
        "expected sides of at most": png_of_size(4000, 2),
    }
    for expected, image in wrong.items():
        answer = client.post("/api/generate", json={"prompt": "3", "image": image})
        assert answer.status_code == 400 and expected in answer.json()["error"]["message"]


def test_of_an_animation_the_first_frame_is_used(client):
    frames = [Image.fromarray(SEEN), Image.fromarray(255 - SEEN)]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    moving = base64.b64encode(file.getvalue()).decode()
    (result,) = pictures(client, image=moving, strength=0.0)
    np.testing.assert_array_equal(np.asarray(result), SEEN)


def test_a_long_body_is_refused_and_not_kept(client):
    for content in (b"x" * 600_000, iter([b"x" * 300_000] * 3)):
        answer = client.post("/api/generate", content=content)
        assert answer.status_code == 413 and "500000 bytes" in answer.text


def test_pages_of_other_sites_and_other_names_of_the_host_are_refused(client):
    address = str(client.base_url).rstrip("/")
    assert client.get("/", headers={"origin": address}).status_code == 200
    assert client.get("/", headers={"origin": "http://evil.example"}).status_code == 403
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    with pytest.raises(InvalidStatus, match="403"):
        connect(live(client), origin="http://evil.example")


def live(client):
    """The address of the live canvas."""
    return f"ws://localhost:{client.base_url.port}/api/live"


def test_the_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
    for name in ("style.css", "app.js", "api.js", "controls.js", "paint.js", "png.js"):
        text = client.get(f"/page/{name}").text
        assert text and "https://" not in text and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    for path in ("/page/../server.py", "/page/%2e%2e/server.py", "/page/"):
        assert client.get(path).status_code == 404


def test_a_token_is_asked_for():
    basic = base64.b64encode(b"user:secret").decode()
    with tiny.served(token="secret") as (address, _), httpx.Client(base_url=address) as client:
        assert client.get("/health").status_code == 401 and client.get("/").status_code == 401
        assert client.get("/?token=wrong").status_code == 401
        assert client.get("/health").headers["www-authenticate"].startswith("Basic")
        assert "www-authenticate" not in client.get("/health", headers={"x-requested-with": "fetch"}).headers
        for value in ("Bearer secret", f"Basic {basic}"):
            assert client.get("/health", headers={"authorization": value}).status_code == 200
        for value in ("Bearer other", "Basic zz", "Bearer", "secret"):
            assert client.get("/health", headers={"authorization": value}).status_code == 401
        assert client.get("/?token=secret").headers["location"] == "/"
        assert client.get("/health").status_code == 200, "the cookie is set"


def test_health_and_metrics(client):
    before = metric(client, "diffusion_pictures_total")
    pictures(client, num_images=2)
    assert metric(client, "diffusion_pictures_total") == before + 2
    assert metric(client, "diffusion_queue_requests") == 0 and metric(client, "diffusion_programs_compiled") > 0
    assert metric(client, 'diffusion_request_seconds_count{task="generate"}') > 0
    assert client.get("/health").json()["status"] in ("warming", "ready")


def metric(client, name):
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name + " ")).rpartition(" ")[2])


def test_the_live_canvas_draws_only_what_has_changed(client):
    state = {"prompt": "3", "image": encoded(SEEN), "strength": 0.75, "seed": 1, "solver": "ddim"}
    with connect(live(client)) as socket:

        def answer(values):
            assert json.loads(socket.recv(30)) == {"type": "next"}
            socket.send(json.dumps(values))
            return json.loads(socket.recv(30))

        assert answer(state)["type"] == "frame"
        assert Image.open(io.BytesIO(socket.recv(30))).size == (8, 8)
        assert answer(state) == {"type": "same"}
        for wrong, expected in ({"steps": "x"}, "steps"), ({"image": "zz!"}, "image"), ([1], "JSON object"):
            message = answer(wrong)
            assert message["type"] == "error" and expected in message["message"]
        assert answer(state | {"mask": encoded(half_mask())})["type"] == "frame"
        frame = np.asarray(Image.open(io.BytesIO(socket.recv(30))))
    np.testing.assert_array_equal(frame[:, 4:], SEEN[:, 4:])


def test_a_state_of_the_live_canvas_that_is_too_long_closes_it_with_the_reason(client):
    with connect(live(client)) as socket:
        socket.recv(30)
        socket.send(json.dumps({"prompt": "3", "image": "A" * 400_000}))
        assert json.loads(socket.recv(30))["message"].startswith("image: ")
        socket.recv(30)
        socket.send(json.dumps({"prompt": "3", "image": "A" * 600_000}))
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(30)
    assert closed.value.rcvd.code == 1009 and "500000 bytes" in closed.value.rcvd.reason
    with connect(live(client)) as socket:
        socket.recv(30)
        socket.send(b"{}")
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(30)
    assert closed.value.rcvd.code == 1003 and closed.value.rcvd.reason == "expected JSON as text, got bytes"


def test_a_student_draws_the_live_canvas_and_nothing_else():
    with (
        tiny.served(tiny.load_with_student, hosts=("localhost",)) as (address, _),
        httpx.Client(base_url=address, timeout=60) as http,
    ):
        schemas = http.get("/openapi.json").json()["components"]["schemas"]
        solvers = [schemas[name]["properties"]["solver"]["default"] for name in ("Request", "LiveRequest")]
        assert solvers == ["dpmpp_2m", "consistency"] and http.get("/api/model").json()["live_steps"] == 2
        (picture,) = pictures(http, solver="consistency", steps=2, guidance=1.0)
        with connect(live(http)) as socket:
            state = {"prompt": "3", "seed": 1}
            frame = {}
            for values in (state, state | {"guidance": 2.0}):
                socket.recv(30)
                socket.send(json.dumps(values))
                frame = json.loads(socket.recv(30))
                if frame["type"] == "frame":
                    png = Image.open(io.BytesIO(socket.recv(30)))
    assert frame["type"] == "error" and "guidance" in frame["message"]
    assert (png.text["weights"], picture.text["weights"]) == ("student", "random")
    assert png.text["solver"] == "consistency" and np.any(np.asarray(png) != np.asarray(picture))


def test_a_consistency_model_has_its_own_solver_alone_and_is_not_inverted():
    with (
        tiny.served(tiny.load_student, hosts=("localhost",)) as (address, _),
        httpx.Client(base_url=address, timeout=60) as http,
    ):
        properties = http.get("/openapi.json").json()["components"]["schemas"]["Request"]["properties"]
        (picture,) = pictures(http, guidance=1.0)
        refusal = http.post("/api/generate", json={"prompt": "3", "task": "style", "image": encoded(SEEN)})
        other = http.post("/api/generate", json={"prompt": "3", "solver": "ddim"})
    assert properties["solver"]["const"] == picture.text["solver"] == "consistency"
    assert "style" not in properties["task"]["enum"]
    assert refusal.status_code == 400 and "task: Input should be 'generate', 'morph' or 'noise'" in refusal.text
    assert other.status_code == 400 and "solver: Input should be 'consistency'" in other.text


def test_a_client_that_leaves_takes_its_request_with_it(client):
    with client.stream("POST", "/api/generate", json={"prompt": tiny.SLOW, "steps": 1000}) as answer:
        lines = answer.iter_lines()  # kept, as it closes the answer when it is deleted
        next(lines)
        assert metric(client, "diffusion_queue_pictures") == 1
    with connect(live(client)) as socket:
        socket.recv(30)
        socket.send(json.dumps({"prompt": tiny.SLOW, "steps": 1000}))
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/images/generations", json={"prompt": tiny.SLOW, "steps": 1000}, timeout=0.3)
    for _ in range(100):
        if metric(client, "diffusion_queue_pictures") == 0:
            break
        time.sleep(0.1)
    assert metric(client, "diffusion_queue_pictures") == 0


def test_an_interrupt_ends_the_requests_of_web_uis_with_what_there_is(client):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        ask = {"prompt": tiny.SLOW, "width": 8, "height": 8, "steps": 1000}
        coming = pool.submit(client.post, "/sdapi/v1/txt2img", json=ask)
        while not (state := client.get("/sdapi/v1/progress").json())["current_image"]:
            time.sleep(0.02)
        assert 0 < state["progress"] < 1 and state["state"]["sampling_steps"] == 1000
        client.post("/sdapi/v1/interrupt")
        answer = coming.result()
    assert answer.status_code == 200 and opened(answer.json()["images"][0]).size == (8, 8)
    assert client.get("/sdapi/v1/progress").json()["progress"] == 0


def test_beyond_the_queue_is_429_with_a_time_to_come_back():
    with tiny.served(queue=1) as (address, _), httpx.Client(base_url=address, timeout=60) as client:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            ask = {"prompt": "3", "seed": 1}
            answers = [
                *pool.map(lambda steps: client.post("/api/generate", json=ask | {"steps": steps}), range(90, 100))
            ]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused and all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert all("event: done" in answer.text for answer in answers if answer not in refused)


def test_generations_as_openai_does_them(client):
    ask = {"prompt": "3", "n": 2, "size": "8x8", "model": "any", "quality": "high", "steps": 3, "seed": 1}
    data = client.post("/v1/images/generations", json=ask).json()["data"]
    (mine,) = pictures(client, steps=3, seed=2)
    np.testing.assert_array_equal(np.asarray(opened(data[1]["b64_json"])), np.asarray(mine))
    for wrong, field in [
        ({"n": "many"}, "n"), ({"n": 17}, "n"), ({"size": "99x8"}, "size"), ({"size": "big"}, "size"),
        ({"prompt": None}, "prompt"), ({"response_format": "url"}, "response_format"), ({"stream": 7}, "stream"),
    ]:  # fmt: skip
        answer = client.post("/v1/images/generations", json=ask | wrong)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field
    assert client.get("/v1/models/none").json()["error"]["type"] == "invalid_request_error"


def test_edits_take_the_mask_from_transparency(client):
    holed = np.dstack([SEEN, half_mask(invert=True)])  # transparent on the left
    file = io.BytesIO()
    Image.fromarray(holed).save(file, "PNG")
    files = {"image": ("../../etc/passwd", file.getvalue(), "image/png")}
    answer = client.post("/v1/images/edits", files=files, data={"prompt": "3", "size": "8x8", "steps": "3"})
    result = np.asarray(opened(answer.json()["data"][0]["b64_json"]))
    np.testing.assert_array_equal(result[:, 4:], SEEN[:, 4:])
    assert client.post("/v1/images/edits", data={"prompt": "3"}).status_code == 400
    assert client.post("/v1/images/edits", files={"image": b"none"}, data={"prompt": "3"}).status_code == 400


@pytest.fixture(scope="module")
def reader():
    """A client of a model that reads two reference pictures, and is red where the first one is."""
    served = tiny.served(tiny.load_reading, hosts=("localhost",))
    with served as (address, _), httpx.Client(base_url=address, timeout=60) as client:
        yield client


def red(image):
    levels = np.asarray(image, float)
    return levels[..., 0].mean() - levels[..., 2].mean()


RED, BLUE = (np.full((8, 8, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))


def test_reference_pictures_change_what_is_drawn(reader):
    (plain,), (of_red,), (of_blue,) = (
        pictures(reader, references=[encoded(colour)] if colour is not None else []) for colour in (None, RED, BLUE)
    )
    assert red(of_blue) + 20 < red(plain) < red(of_red) - 20
    assert of_red.text["made_with"] == "references" and "made_with" not in plain.text
    (again, other) = pictures(reader, references=[encoded(RED)], num_images=2)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(of_red))
    assert red(other) > red(plain)
    (two,) = pictures(reader, references=[encoded(RED), encoded(RED)])
    assert red(two) < red(of_red) - 20, "the second picture is another input than the first"
    # of another size than the model's, and with a picture to start from
    assert red(pictures(reader, references=[encoded(np.tile(RED, (1, 2, 1)))], width=16)[0]) > red(plain)
    (changed,) = pictures(reader, references=[encoded(RED)], image=encoded(SEEN), strength=0.5)
    assert np.any(np.asarray(changed) != np.asarray(pictures(reader, image=encoded(SEEN), strength=0.5)[0]))


def test_edits_without_a_mask_are_reference_pictures_where_the_model_reads_them(reader, client):
    colours = [base64.b64decode(encoded(colour)) for colour in (BLUE, RED)]

    def edit(to, count, **fields):
        files = [("image[]", colour) for colour in colours[:count]]
        data = {"prompt": "3", "size": "8x8", "steps": "4", "seed": "1"} | fields
        answer = to.post("/v1/images/edits", files=files, data=data)
        assert answer.status_code == 200, answer.text
        return opened(answer.json()["data"][0]["b64_json"]), answer.json()["warnings"]

    for count in 1, 2:
        expected = pictures(reader, references=[encoded(colour) for colour in (BLUE, RED)[:count]])[0]
        made, warnings = edit(reader, count)
        np.testing.assert_array_equal(np.asarray(made), np.asarray(expected))
        assert not warnings
    # image to image: where a strength is named, and of a model without references
    changed = pictures(reader, image=encoded(BLUE), strength=0.5)[0]
    made, warnings = edit(reader, 2, strength="0.5")
    np.testing.assert_array_equal(np.asarray(made), np.asarray(changed))
    assert len(warnings) == 1 and "made_with" not in edit(client, 1)[0].text


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"references": [encoded(RED)] * 3}, "at most 2 items"),
        ({"references": ["!"]}, "expected a picture in base64"),
        ({"references": [encoded(SEEN)[:60]]}, "not a"),
        ({"references": [encoded(RED)], "task": "morph"}, "the task morph has no reference pictures"),
    ],
)
def test_reference_pictures_that_cannot_be_used_are_one_line(values, reason, reader, client):
    answer = reader.post("/api/generate", json={"prompt": "3"} | values)
    error = answer.json()["error"]
    assert answer.status_code == 400 and reason in error["message"] and "\n" not in error["message"]
    answer = client.post("/api/generate", json={"prompt": "3"} | values)
    message = "references: this model reads no reference pictures: leave them out"
    assert answer.status_code == 400 and answer.json()["error"]["message"] == message


def strokes(invert=False):
    """The half mask as black strokes on transparency."""
    return np.dstack([np.zeros((8, 8, 3), np.uint8), half_mask(invert)])


def test_every_api_reads_a_mask_of_strokes_by_its_own_meaning(client):
    kept = np.s_[:, 4:]
    (result,) = pictures(client, image=encoded(SEEN), mask=encoded(strokes()))
    np.testing.assert_array_equal(np.asarray(result)[kept], SEEN[kept])
    ask = {"prompt": "3", "width": 8, "height": 8, "steps": 3, "init_images": [encoded(SEEN)]}
    for mask, invert in [(strokes(), 0), (strokes(invert=True), 1), (strokes()[::2, ::2], 0)]:  # the last is stretched
        fields = {"mask": encoded(mask), "inpainting_mask_invert": invert}
        answer = client.post("/sdapi/v1/img2img", json=ask | fields).json()
        result = np.asarray(opened(answer["images"][0]))
        np.testing.assert_array_equal(result[kept], SEEN[kept])
        assert np.any(result[:, :4] != SEEN[:, :4])
    files = {"image": base64.b64decode(encoded(SEEN)), "mask": base64.b64decode(encoded(strokes(invert=True)))}
    answer = client.post("/v1/images/edits", files=files, data={"prompt": "3", "size": "8x8", "steps": "3"})
    np.testing.assert_array_equal(np.asarray(opened(answer.json()["data"][0]["b64_json"]))[kept], SEEN[kept])


def test_masks_that_mark_nothing_or_have_another_size_are_refused(client):
    def edit(mask):
        files = {"image": base64.b64decode(encoded(SEEN)), "mask": base64.b64decode(encoded(mask))}
        return client.post("/v1/images/edits", files=files, data={"prompt": "3"})

    opaque = np.dstack([SEEN, np.full((8, 8), 255, np.uint8)])
    nearly = np.dstack([SEEN, 255 - np.arange(64, dtype=np.uint8).reshape(8, 8)])
    answers = {"expected transparency": [edit(SEEN), edit(half_mask()), edit(opaque), edit(nearly)]}
    ask = {"prompt": "3", "image": encoded(SEEN), "mask": encoded(half_mask()[:4])}
    sizes = "it is 8x4 pixels and the image 8x8: they must be of one size"
    answers[sizes] = [edit(strokes()[:4]), client.post("/api/generate", json=ask)]
    for message, refused in answers.items():
        for answer in refused:
            assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(f"mask: {message}")
            assert answer.json()["error"]["param"] == "mask"


def test_the_web_ui_api_takes_what_its_plugins_send(client):
    ask = {
        "prompt": "3",
        "width": 8,
        "height": 8,
        "seed": 1,
        "sampler_name": "Euler a",
        "scheduler": "Karras",
        "steps": 3,
    }
    answer = client.post("/sdapi/v1/txt2img", json=ask | {"batch_size": 2, "override_settings": {}}).json()
    info = json.loads(answer["info"])
    assert len(answer["images"]) == 2 and info["all_seeds"] == [1, 2] and info["sampler_name"] == "Euler a"
    (mine,) = pictures(
        client, solver="euler_ancestral", spacing="karras", steps=3, guidance=tiny.config().sample.guidance
    )
    np.testing.assert_array_equal(np.asarray(opened(answer["images"][0])), np.asarray(mine))
    image = {"init_images": [encoded(SEEN)], "mask": encoded(half_mask()), "denoising_strength": 0.9}
    for invert, unchanged in (0, np.s_[:, 4:]), (1, np.s_[:, :4]):
        result = client.post("/sdapi/v1/img2img", json=ask | image | {"inpainting_mask_invert": invert}).json()
        np.testing.assert_array_equal(np.asarray(opened(result["images"][0]))[unchanged], SEEN[unchanged])
    for wrong in (
        {"steps": "many"}, {"seed": 1.5}, {"batch_size": 0}, {"batch_size": 17}, {"sampler_name": "magic"},
        {"scheduler": "magic"}, {"width": 5000}, {"cfg_scale": 1001}, {"sampler_name": 3}, {"steps": 9999},
    ):  # fmt: skip
        assert wrong_field(client.post("/sdapi/v1/txt2img", json=ask | wrong)) == [*wrong]
    for wrong, place in [
        ({"denoising_strength": 7}, ["denoising_strength"]), ({"init_images": ["zz!"]}, ["init_images"]),
        ({"init_images": [""]}, ["init_images", 0]), ({"init_images": [None]}, ["init_images", 0]),
        ({"mask": "zz!"}, ["mask"]),
    ]:  # fmt: skip
        assert wrong_field(client.post("/sdapi/v1/img2img", json=ask | image | wrong)) == place


def test_long_prompts_and_strong_guidance_are_drawn(client):
    """As users of web interfaces send them; their programs have no limit."""
    values = {"prompt": "3".rjust(10_000), "steps": 2}
    for scale in (45, 1000):
        info = json.loads(client.post("/sdapi/v1/txt2img", json=values | {"cfg_scale": scale}).json()["info"])
        assert info["cfg_scale"] == scale and info["prompt"] == values["prompt"] and not info["warnings"]
    answer = client.post("/v1/images/generations", json=values | {"guidance": 99.5})
    assert opened(answer.json()["data"][0]["b64_json"]).text["guidance"] == "99.5"


def wrong_field(answer):
    """The place of the field that an error of the web UI's API names, in the form of FastAPI's validation."""
    assert answer.status_code == 422
    (detail,) = answer.json()["detail"]
    place, (body, *field) = ".".join(map(str, detail["loc"][1:])), detail["loc"]
    assert body == "body" and answer.json()["errors"] == f"{place}: {detail['msg']}"
    return field


def test_a_prompt_that_is_refused_is_named_as_each_api_does(client):
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "cat"})
    assert wrong_field(answer) == ["prompt"] and "expected a number in" in answer.text
    error = client.post("/v1/images/generations", json={"prompt": "cat"}).json()["error"]
    assert error["param"] == "prompt" and error["message"].startswith(
        "prompt: this model knows classes: expected a number"
    )


def test_a_new_seed_is_any_negative_one_in_the_apis_of_other_programs(client):
    ask = {"prompt": "3", "steps": 2}
    for seed in (-1, -2, -(10**6)):
        info = json.loads(client.post("/sdapi/v1/txt2img", json=ask | {"seed": seed}).json()["info"])
        assert info["seed"] >= 0
        assert client.post("/v1/images/generations", json=ask | {"seed": seed}).status_code == 200


def test_base64_may_have_white_space_and_a_mask_may_be_empty(client):
    text = encoded(SEEN)
    lines = "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    ask = {"strength": 0.0, "steps": 2}
    for image in (lines, f" data:image/png;base64,\n{lines}\n", f"DATA:image/png;base64, {text}"):
        (same,) = pictures(client, image=image, mask="", **ask)
        np.testing.assert_array_equal(np.asarray(same), SEEN)
    assert len(pictures(client, mask="", steps=2)) == 1, "as if there were none"
    ask = {"prompt": "3", "width": 8, "height": 8, "init_images": [lines], "denoising_strength": 0, "steps": 2}
    for mask in ("", None):
        answer = client.post("/sdapi/v1/img2img", json=ask | {"mask": mask}).json()
        np.testing.assert_array_equal(np.asarray(opened(answer["images"][0])), SEEN)
    files = {"image": base64.b64decode(text), "mask": ("", b"")}  # as a browser sends a file that nobody chose
    assert client.post("/v1/images/edits", files=files, data={"prompt": "3", "steps": "2"}).status_code == 200


def test_an_image_of_another_shape_is_stretched_or_cropped(client):
    """resize_mode 0 of the web UI resizes both sides, 1 covers the size and crops."""
    wide = np.repeat(SEEN, 2, axis=1)
    ask = {"prompt": "3", "width": 8, "height": 8, "init_images": [encoded(wide)], "denoising_strength": 0, "steps": 2}
    images = [Image.fromarray(wide).resize((8, 8), Image.Resampling.LANCZOS), Image.fromarray(wide[:, 4:12])]
    for mode, expected in (0, images[0]), (None, images[0]), (1, images[1]):
        answer = client.post("/sdapi/v1/img2img", json=ask | {"resize_mode": mode}).json()
        np.testing.assert_array_equal(np.asarray(opened(answer["images"][0])), np.asarray(expected))
        assert json.loads(answer["info"])["warnings"] == []
    marked = np.zeros((8, 16), np.uint8)
    marked[:, :8] = 255
    mask = {"mask": encoded(marked), "resize_mode": 0, "denoising_strength": 1}
    result = np.asarray(opened(client.post("/sdapi/v1/img2img", json=ask | mask).json()["images"][0]))
    np.testing.assert_array_equal(result[:, 5:], np.asarray(images[0])[:, 5:])


def test_what_has_no_effect_is_warned_of_in_every_api(client):
    ask = {"prompt": "3", "steps": 2}
    without = {"background": "transparent", "quality": "high", "style": "vivid", "moderation": "low", "magic": 1}
    neutral = {"background": "opaque", "quality": "auto", "moderation": "auto", "user": "me", "output_format": "png"}
    nulls = dict.fromkeys(("steps", "seed", "solver", "style"))

    def warnings(**values):
        return client.post("/v1/images/generations", json=ask | values).json()["warnings"]

    assert warnings(**without) == [f"{name} has no effect on this server" for name in without]
    assert warnings(**neutral) == warnings(**nulls) == []
    assert client.post("/v1/images/generations", json=ask | {"output_format": "webp"}).status_code == 400
    holed = base64.b64decode(encoded(np.dstack([SEEN, half_mask(invert=True)])))
    files = [("image[]", ("a.png", holed)), ("image[]", ("b.png", holed))]
    form = {"prompt": "3", "steps": "2", "input_fidelity": "high"}
    answer = client.post("/v1/images/edits", files=files, data=form).json()
    assert [warning.partition(" ")[0] for warning in answer["warnings"]] == ["image", "input_fidelity"]
    stream = client.post("/v1/images/generations", json=ask | {"stream": True, "style": "vivid"}).text
    assert "style has no effect on this server" in stream

    own = client.get("/sdapi/v1/options").json()
    other = {"sd_model_checkpoint": "other", "CLIP_stop_at_last_layers": 2, "sd_vae": "Automatic"}
    for options, ignored in (own, []), (own | other, ["CLIP_stop_at_last_layers", "sd_model_checkpoint"]):
        answer = client.post("/sdapi/v1/options", json=options).json()
        assert sorted(answer["warnings"]) == [f"{name} has no effect on this server" for name in ignored]


def test_the_web_ui_api_says_what_it_does_otherwise(client):
    nothing = dict.fromkeys(webui_bodies.TextToImage.model_fields)
    ask = nothing | {"prompt": "3", "seed": 1, "steps": 3, "sampler_name": "DPM2 a Karras", "enable_hr": True}
    scripts = {"controlnet": {"args": [{"module": "canny"}]}}
    answer = client.post("/sdapi/v1/txt2img", json=ask | {"alwayson_scripts": scripts})
    info = json.loads(answer.json()["info"])
    assert info["sampler_name"] == "DPM++ SDE" and "Karras" in info["infotexts"][0]
    nearest, hires, controlnet = info["warnings"]
    assert "DPM2 a Karras" in nearest and "DPM++ SDE" in nearest
    assert "enable_hr" in hires and "alwayson_scripts.controlnet" in controlnet
    (mine,) = pictures(client, solver="dpmpp_sde", spacing="karras", steps=3)
    np.testing.assert_array_equal(np.asarray(opened(answer.json()["images"][0])), np.asarray(mine))
    read = client.post("/sdapi/v1/png-info", json={"image": answer.json()["images"][0]}).json()
    assert read["info"] == info["infotexts"][0] and read["items"] == mine.text
    assert client.post("/sdapi/v1/png-info", json={"image": encoded(SEEN)}).json()["info"] == ""
    assert client.post("/sdapi/v1/png-info", json={"image": "zz!"}).status_code == 422


def test_web_uis_find_the_lists_that_they_read(client):
    lists = "latent-upscale-modes prompt-styles sd-modules script-info upscalers loras sd-vae face-restorers"
    for name in lists.split():
        assert client.get(f"/sdapi/v1/{name}").json() == [], name
    assert client.get("/sdapi/v1/embeddings").json() == {"loaded": {}, "skipped": {}}
    assert client.get("/sdapi/v1/memory").json()["ram"]["total"] > 0
    assert isinstance(client.get("/sdapi/v1/cmd-flags").json(), dict)
    assert client.post("/sdapi/v1/refresh-checkpoints").status_code == 200


def test_a_web_ui_sees_and_stops_only_its_own_requests(client):
    others = {"x-forwarded-for": "10.0.0.2"}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        coming = pool.submit(client.post, "/sdapi/v1/txt2img", json={"prompt": tiny.SLOW, "steps": 1000})
        while not client.get("/sdapi/v1/progress").json()["progress"]:
            time.sleep(0.02)
        state = client.get("/sdapi/v1/progress", headers=others).json()
        assert state["progress"] == 0 and state["current_image"] is None and state["state"]["job_count"] == 0
        client.post("/sdapi/v1/interrupt", headers=others)
        client.post("/sdapi/v1/skip", headers=others)
        before = client.get("/sdapi/v1/progress").json()["progress"]
        while client.get("/sdapi/v1/progress").json()["progress"] <= before:
            assert not coming.done()
        client.post("/sdapi/v1/interrupt")
        assert coming.result().status_code == 200


def test_another_size_is_drawn_at_the_model_s_own_and_resized(client):
    (own,) = pictures(client, steps=3)
    compiled = metric(client, "diffusion_programs_compiled")
    (image,) = pictures(client, steps=3, width=16, height=12)
    expected = Frame((12, 16), (8, 8)).left(np.asarray(own))
    np.testing.assert_array_equal(np.asarray(image), expected)
    assert image.text["drawn"] == "8x8" and "drawn" not in own.text
    ask = {"prompt": "3", "seed": 1, "steps": 3}
    answer = client.post("/v1/images/generations", json=ask | {"size": "16x12"}).json()
    np.testing.assert_array_equal(np.asarray(opened(answer["data"][0]["b64_json"])), expected)
    assert answer["size"] == "16x12" and "drawn at 8x8" in answer["warnings"][0]
    answer = client.post("/sdapi/v1/txt2img", json=ask | {"width": 16, "height": 12}).json()
    info = json.loads(answer["info"])
    np.testing.assert_array_equal(np.asarray(opened(answer["images"][0])), expected)
    assert "drawn at 8x8" in info["warnings"][0] and info["extra_generation_params"] == {"Drawn at": "8x8"}
    large = np.kron(SEEN, np.ones((2, 2, 1), np.uint8))
    mask = np.kron(half_mask(), np.ones((2, 2), np.uint8))
    (part,) = pictures(client, steps=3, width=16, height=16, image=encoded(large), mask=encoded(mask), previews="all")
    np.testing.assert_array_equal(np.asarray(part)[:, 8:], large[:, 8:])
    assert np.any(np.asarray(part)[:, :8] != large[:, :8])
    assert metric(client, "diffusion_programs_compiled") == compiled, "nothing is compiled for it"


def test_further_sizes_are_those_of_the_config():
    with (
        tiny.served(functools.partial(tiny.load, sizes=("24x8",)), hosts=("localhost",)) as (address, _),
        httpx.Client(base_url=address, timeout=60) as http,
    ):
        (image,) = pictures(http, steps=2, width=24, height=8)
        (near,) = pictures(http, steps=2, width=16, height=8)
        (square,) = pictures(http, steps=2, width=9, height=8)
        assert image.size == (24, 8) and "drawn" not in image.text
        assert (near.text["drawn"], square.text["drawn"]) == ("24x8", "8x8")
        assert http.get("/api/model").json()["sizes"] == [[8, 8], [8, 24]]
        for wrong, field in ({"width": 24, "height": 9}, "width"), ({"width": 8, "height": 24}, "height"):
            error = http.post("/api/generate", json={"prompt": "3"} | wrong).json()["error"]
            assert (
                error["param"] == field and "at most 16 pixels, or a size of the model: 8x8, 24x8" in error["message"]
            )


def test_an_edit_in_json_says_that_a_form_is_expected(client):
    answer = client.post("/v1/images/edits", json={"prompt": "3"})
    assert answer.status_code == 400 and "expected a form, multipart/form-data" in answer.json()["error"]["message"]


def test_a_form_that_is_nested_too_deeply_is_a_clear_error(client):
    for files in ({"image": b"x"}, None):
        for field in ("steps", "seed", "guidance", "strength"):
            form = {"prompt": "3", field: "[" * 20_000}
            answer = client.post("/v1/images/edits", data=form, files=files)
            assert answer.status_code == 400 and answer.json()["error"]["param"] in (field, "image")


@pytest.mark.parametrize(("value", "status"), [("NaN", 200), ("[-Infinity]", 200), ('"\\ud800"', 400)])
def test_values_that_json_cannot_give_back_break_no_answer(client, value, status):
    body = f'{{"prompt": "3", "steps": 3, "override_settings": {{"x": {value}}}}}'
    answer = client.post("/sdapi/v1/txt2img", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert status == 400 or answer.json()["parameters"]["override_settings"]["x"] in (None, [None])


def test_a_scale_below_1_is_no_guidance(client):
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "3", "steps": 3, "cfg_scale": 0})
    info = json.loads(answer.json()["info"])
    assert info["cfg_scale"] == 1 and "cfg_scale=0 became 1, no guidance" in info["warnings"]


def test_of_several_images_the_first_is_edited(client):
    names = ("image[]", SEEN), ("image[]", 255 - SEEN), ("mask", np.dstack([SEEN, half_mask(invert=True)]))
    files = [(name, ("a.png", base64.b64decode(encoded(image)))) for name, image in names]
    answer = client.post("/v1/images/edits", files=files, data={"prompt": "3", "steps": "3"})
    result = np.asarray(opened(answer.json()["data"][0]["b64_json"]))
    np.testing.assert_array_equal(result[:, 4:], SEEN[:, 4:])


def test_what_is_not_there_is_a_clear_404(client):
    for path in ("/none", "/sdapi/v1/none", "/v1/none"):
        assert client.get(path).status_code == 404
    assert client.get("/api/generate").status_code == 405

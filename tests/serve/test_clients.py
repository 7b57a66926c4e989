"""Programs of other people that speak the server's APIs: the clients of OpenAI and of web UIs, and a fuzzer."""

import base64
import io
import json
import re
import subprocess
import sys

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.routing import Route

from diffusion_jax.serve import openai, server, webui
from tests.documents import example
from tests.serve import tiny

SEEN = np.full((8, 8, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def served():
    with tiny.served(token="secret", queue=64) as served:
        yield served


@pytest.fixture(scope="module")
def address(served):
    return served[0]


@pytest.fixture(scope="module")
def service(served):
    return served[1]


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def opened(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_the_client_of_openai_gets_pictures(address):
    sdk = pytest.importorskip("openai")
    client = sdk.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == "digits"
    answer = client.images.generate(model=model.id, prompt="3", n=2, size="8x8", extra_body={"steps": 3, "seed": 5})
    assert [opened(picture.b64_json).size for picture in answer.data] == [(8, 8)] * 2
    assert opened(answer.data[1].b64_json).text["seed"] == "6"

    stream = client.images.generate(prompt="3", stream=True, partial_images=2, extra_body={"steps": 40})
    events = [event.model_dump() for event in stream]
    assert events[-1]["type"] == "image_generation.completed" and opened(events[-1]["b64_json"]).size == (8, 8)
    partial = [event for event in events if event["type"] == "image_generation.partial_image"]
    assert [event["partial_image_index"] for event in partial] == [0, 1][: len(partial)] and partial

    mask = np.zeros((8, 8, 4), np.uint8)
    mask[:, 4:, 3] = 255  # opaque: kept
    answer = client.images.edit(image=("a.png", png(SEEN)), mask=("b.png", png(mask)), prompt="3", size="8x8")
    result = np.asarray(opened(answer.data[0].b64_json))
    np.testing.assert_array_equal(result[:, 4:], SEEN[:, 4:])
    assert np.any(result[:, :4] != SEEN[:, :4])

    with pytest.raises(sdk.BadRequestError, match="expected a number in"):
        client.images.generate(prompt="cat")
    with pytest.raises(sdk.AuthenticationError):
        sdk.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()


def test_the_example_of_the_documents_works(address):
    pytest.importorskip("openai")
    ours = {"http://127.0.0.1:7860": address, '"none"': '"secret"', "a red apple": "3"}
    pictures = example("docs/serve.md", "OpenAI", **ours)["pictures"]
    assert [Image.open(io.BytesIO(picture)).text["seed"] for picture in pictures] == ["1", "2"]


def test_the_client_of_web_uis_gets_pictures(address):
    webuiapi = pytest.importorskip("webuiapi")
    api = webuiapi.WebUIApi(baseurl=f"{address}/sdapi/v1", steps=3, username="any", password="secret")
    assert "DPM++ 2M" in api.util_get_sampler_names() and "karras" in api.util_get_scheduler_names()
    assert api.util_get_current_model() == api.util_get_model_names()[0] == "digits"
    api.util_set_model("digits")
    api.util_wait_for_ready(check_interval=0.1)
    result = api.txt2img(prompt="3", width=8, height=8, seed=5, batch_size=2, cfg_scale=2)
    assert [image.size for image in result.images] == [(8, 8)] * 2 and result.info["all_seeds"] == [5, 6]
    image, mask = Image.fromarray(SEEN), Image.fromarray(np.uint8(255) * np.eye(8, dtype=np.uint8))
    part = api.img2img([image], prompt="3", width=8, height=8, mask_image=mask, denoising_strength=1.0)
    changed = np.any(np.asarray(part.image) != SEEN, axis=-1)
    assert changed.any() and not changed[~np.eye(8, dtype=bool)].any()
    whole = api.img2img([image], prompt="3", width=8, height=8, denoising_strength=0.8, scheduler="karras")
    assert np.any(np.asarray(whole.image) != SEEN)
    api.interrupt()


def routes(service):
    """(path, method) of the server, but the page itself and the description."""
    all_routes = [*server._routes(service), *openai.routes(service), *webui.routes(service)]
    return {
        (re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path), method)
        for route in all_routes
        if isinstance(route, Route) and route.path not in ("/", "/openapi.json")
        for method in route.methods - {"HEAD"}
    }


def test_the_description_names_every_interface_and_the_limits_of_the_model(address, service):
    described = httpx.get(f"{address}/openapi.json", headers={"authorization": "Bearer secret"}).json()
    fields = described["components"]["schemas"]["Request"]["properties"]
    assert fields["width"]["maximum"] == 16 and fields["steps"]["default"] == 4 and "ddim" in fields["solver"]["enum"]
    assert all(field["description"] for field in fields.values())
    methods = {(path, method.upper()) for path, about in described["paths"].items() for method in about}
    assert {(path, method) for path, method in methods if method != "PARAMETERS"} == routes(service)
    assert all(f"'$ref': '#/components/schemas/{name}'" in str(described) for name in ("Request", "Generation", "Edit"))


@pytest.mark.slow
def test_no_value_of_any_field_brings_the_server_down(address, tmp_path):
    """Schemathesis sends values that fit the description and values that do not: none may give a 5xx answer."""
    pytest.importorskip("schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"]
    command += ["-H", "Authorization: Bearer secret", "--checks", "not_a_server_error", "--max-examples", "25"]
    command += ["--phases", "examples,coverage,fuzzing", "--seed", "1", "--request-timeout", "60"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    answer = httpx.get(f"{address}/health", headers={"authorization": "Bearer secret"})
    assert answer.status_code == 200 and json.loads(answer.text)["restarts"] == 0

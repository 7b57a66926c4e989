"""A bucket on this machine: gcp-storage-emulator, of which requests can be made to fail.

It speaks the JSON API of Google Cloud Storage, which gcsfs (files) and tensorstore (arrays of checkpoints) use. What it
lacks of this API, and tensorstore needs, is added here: requests on the condition that an object has, or has not, a
generation.
"""

import contextlib
import functools
import http.server
import logging
import threading
from collections.abc import Iterator
from urllib.parse import parse_qs, unquote, urlparse

import pytest

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

from diffusion_jax import paths

ROOT = "gs://experiments"
UNAVAILABLE = b'{"error": {"code": 503, "message": "Backend Error"}}'


class Bucket:
    """The bucket gs://experiments.

    environment: for processes that use it.
    fails: (method, path with query) -> whether a request is answered by 503.
    num_failed: how many were.
    """

    def __init__(self):
        self._storage = Storage(use_memory_fs=True)
        self.reset()
        server = _Server(("127.0.0.1", 0), functools.partial(_Handler, self, self._storage))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # of tensorstore
            "NO_GCE_CHECK": "true",  # do not look for the server that gives machines in the cloud their credentials
        }

    def reset(self) -> None:
        """Empty the bucket, and let every request succeed."""
        self.fails, self.num_failed = lambda method, path: False, 0
        self._storage.wipe()
        buckets.create_bucket(ROOT.removeprefix(paths.SCHEME), self._storage)


class _Server(http.server.HTTPServer):
    def handle_error(self, *_) -> None:
        pass  # clients leave before an answer that they no longer need


class _Handler(RequestHandler):
    def __init__(self, bucket: Bucket, storage: Storage, *connection):
        self.bucket, self.generation = bucket, ""
        super().__init__(storage, *connection)

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.bucket.fails(self.command, self.path):
            self.bucket.num_failed += 1
            return self._refuse(503, UNAVAILABLE)
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if query.get("alt") == "media" or query.get("uploadType") == "media":
            self.generation = self._generation(query.get("name") or unquote(url.path.rpartition("/o/")[2]))
            if query.get("ifGenerationNotMatch") == self.generation:
                return self._refuse(304)
            if query.get("ifGenerationMatch", self.generation) != self.generation:
                return self._refuse(412)
        return True

    def _generation(self, name: str) -> str:
        try:
            return self.storage.get_file_obj(ROOT.removeprefix(paths.SCHEME), name)["generation"]
        except NotFound:
            return "0"

    def _refuse(self, status: int, body: bytes = b"") -> bool:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return False

    def end_headers(self) -> None:
        if self.command == "GET" and self.generation:
            self.send_header("x-goog-generation", self.generation)
        super().end_headers()

    def log_message(self, *_) -> None:
        pass


_of_this_process = functools.cache(Bucket)


@contextlib.contextmanager
def running(cache) -> Iterator[Bucket]:
    """An empty bucket for this process and those it starts. cache: folder for local copies."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    bucket = _of_this_process()
    bucket.reset()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment.items():
            patch.setenv(name, value)
        patch.setattr(paths, "CACHE", cache)
        yield bucket

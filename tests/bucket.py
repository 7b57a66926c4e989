"""A bucket on this machine: gcp-storage-emulator, of which requests can be made to fail.

It speaks the JSON API of Google Cloud Storage, which gcsfs (files) and tensorstore (arrays of checkpoints) use.
"""

import contextlib
import functools
import http.server
import logging
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")

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
    def __init__(self, bucket: Bucket, *arguments):
        self.bucket = bucket
        super().__init__(*arguments)

    def parse_request(self) -> bool:
        if not super().parse_request() or not self.bucket.fails(self.command, self.path):
            return bool(self.command)
        self.bucket.num_failed += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(503)
        self.send_header("Content-Length", str(len(UNAVAILABLE)))
        self.end_headers()
        self.wfile.write(UNAVAILABLE)
        return False

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

"""A registry of OCI artifacts, as far as `helm push` and `helm pull` go:
https://github.com/opencontainers/distribution-spec/blob/main/spec.md"""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Registry:
    """Runs an empty registry and gives its address."""

    def __enter__(self):
        class Handler(Answers):
            held = {}

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Type and bytes by path: blobs and manifests by digest, manifests by tag too.
    held = {}

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        if self.path == "/v2/":
            return self.answer(200)
        if self.path not in self.held:
            return self.answer(404)
        kind, body = self.held[self.path]
        self.answer(200, body, Content_Type=kind, Docker_Content_Digest=digest(body))

    do_HEAD = do_GET

    def do_POST(self):
        # The path to which the client uploads the blob.
        self.answer(202, Location=self.path)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = re.sub(r"/blobs/uploads/.*", f"/blobs/{digest(body)}", self.path)
        kind = self.headers.get("Content-Type", "application/octet-stream")
        self.held[path] = kind, body
        if "/manifests/" in path:
            self.held[f"{path.rpartition('/')[0]}/{digest(body)}"] = kind, body
        self.answer(201, Location=path, Docker_Content_Digest=digest(body))

    def log_message(self, *_):
        pass


def digest(body):
    return "sha256:" + hashlib.sha256(body).hexdigest()

"""A placeholder for an image that can't be pulled and whose program Debian lacks."""

import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TEXT = f"# A placeholder: {os.environ['IMAGE']} is not available here.\n".encode()
PORT = 8080 if "cadvisor" in os.environ["IMAGE"] else 3000


class Handler(BaseHTTPRequestHandler):
    """Responds to every GET with an exposition without metrics."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(TEXT)))
        self.end_headers()
        self.wfile.write(TEXT)


signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
ThreadingHTTPServer(("", PORT), Handler).serve_forever()

"""An S3 server that misbehaves on request: localbucket, run by the Python it is installed in.

    python s3_faults.py FOLDER

prints its port and serves until its standard input ends. `GET /_control?NAME=VALUE` sets what goes
wrong, `GET /_control` shows what was asked for so far. Standard library and localbucket only.
"""

import json
import os
import shutil
import sys
import threading
import time
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit
from xml.sax.saxutils import escape

from localbucket import S3Error, S3Handler

LOCK = threading.Lock()
# throttle: requests answered 503 SlowDown; broken: answered 500; delay: seconds before each answer;
# vanish: requests answered before the bucket is removed; change: KEY whose file is replaced after
# `after` reads of it; keys: the size of the bucket "huge", which has no files.
STATE = {
    "throttle": 0,
    "broken": 0,
    "delay": 0.0,
    "vanish": -1,
    "change": "",
    "after": 0,
    "keys": 0,
}
SEEN = {"requests": 0, "active": 0, "peak": 0, "GET": 0, "HEAD": 0, "list": 0, "bytes": 0}
PAGE = 1000


class Handler(S3Handler):
    """S3 with the faults of `STATE`, counting into `SEEN`."""

    def log_message(self, format, *args):
        """Silence."""

    def _dispatch(self, action):
        url = urlsplit(self.path)
        if url.path == "/_control":
            with LOCK:
                STATE.update({k: type(STATE[k])(v) for k, v in parse_qsl(url.query)})
                body = json.dumps(SEEN).encode()
                if url.query:
                    SEEN.update(dict.fromkeys(SEEN, 0))
            self._send(HTTPStatus.OK, body)
            return
        with LOCK:
            SEEN["requests"] += 1
            SEEN["active"] += 1
            SEEN["peak"] = max(SEEN["peak"], SEEN["active"])
            SEEN[self.command] = SEEN.get(self.command, 0) + 1
            SEEN["list"] += "list-type" in url.query
            fault = next((name for name in ("throttle", "broken") if STATE[name] > 0), None)
            if fault:
                STATE[fault] -= 1
            gone = STATE["vanish"] == 0
            STATE["vanish"] -= STATE["vanish"] > 0
        try:
            time.sleep(STATE["delay"])
            if gone:
                shutil.rmtree(self.data_root / url.path.split("/")[1], ignore_errors=True)
            super()._dispatch(action if fault is None else lambda bucket, key: self._fail(fault))
        finally:
            with LOCK:
                SEEN["active"] -= 1

    def _fail(self, fault):
        if fault == "throttle":
            raise S3Error(HTTPStatus.SERVICE_UNAVAILABLE, "SlowDown", "Please slow down.")
        raise S3Error(HTTPStatus.INTERNAL_SERVER_ERROR, "InternalError", "Try again.")

    def _get(self, bucket, key, include_body):
        super()._get(bucket, key, include_body)
        if key == STATE["change"] and include_body:
            with LOCK:
                STATE["after"] -= 1
                if STATE["after"] == 0:
                    path = self.data_root / bucket / key
                    size = path.stat().st_size
                    path.with_name("new").write_bytes(b"\1" * size)
                    os.replace(path.with_name("new"), path)

    def _send_file(self, status, file, start, length, headers, include_body):
        with LOCK:
            SEEN["bytes"] += length * include_body
        super()._send_file(status, file, start, length, headers, include_body)

    def _list_objects_v2(self, bucket):
        if bucket != "huge":
            super()._list_objects_v2(bucket)
            return
        first = int(self.query.get("continuation-token", "0"))
        last = min(first + PAGE, STATE["keys"])
        rows = [
            f"<Contents><Key>{quote(escape(huge_key(i)), safe='/')}</Key>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;{i:032x}&quot;</ETag>"
            f"<Size>{i}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for i in range(first, last)
        ]
        more = last < STATE["keys"]
        token = f"<NextContinuationToken>{last}</NextContinuationToken>" if more else ""
        body = (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>huge</Name><Prefix></Prefix><KeyCount>{last - first}</KeyCount>"
            f"<MaxKeys>{PAGE}</MaxKeys><EncodingType>url</EncodingType>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(rows)}"
            "</ListBucketResult>"
        )
        self._send(HTTPStatus.OK, body.encode(), {"Content-Type": "application/xml"})


def huge_key(i):
    """Two files for each of the bucket's tenants, and hostile keys now and then."""
    if i % 1000 == 999:
        return ("../up", "/etc/passwd", "a//b", "c\\d")[i // 1000 % 4] + f"/{i}.safetensors"
    name = ("adapter_config.json", "adapter_model.safetensors")[i % 2]
    return f"fleet/t{i // 2:06d}/{name}"


class Server(ThreadingHTTPServer):
    """Quiet about clients that hang up."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """Nothing: a client that was killed is one of the tests."""


def main():
    """Serve a folder until standard input ends."""
    Handler.data_root = Path(sys.argv[1]).resolve()
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()

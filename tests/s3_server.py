"""An S3 server on a free port of loopback, for tests that read from a bucket.

`make` installs the server, localbucket, in an environment of its own below the tests' one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest

PYTHON = Path(sys.prefix, "s3-server", "bin", "python")
needs_server = [
    pytest.mark.s3,
    pytest.mark.skipif(not PYTHON.exists(), reason="no S3 server here: `make test-s3` installs it"),
]


@dataclass(frozen=True)
class Server:
    """A running server: `folder` holds a folder for each bucket, `port` is where it answers."""

    folder: Path
    port: int
    process: subprocess.Popen[str]

    @property
    def environment(self) -> dict[str, str]:
        """What makes s3fs, in this process or another, find the server."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def control(self, **faults: object) -> dict[str, int]:
        """Set faults (see `s3_faults`) and begin counting anew; without any, the counts so far."""
        url = f"http://127.0.0.1:{self.port}/_control?{urlencode(faults)}"
        with urllib.request.urlopen(url) as answer:
            counts: dict[str, int] = json.load(answer)
        return counts


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve the buckets of a folder; the server ends with the block, or with this process."""
    script = Path(__file__).with_name("s3_faults.py")
    command = [os.fspath(PYTHON), os.fspath(script), os.fspath(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield Server(folder, int(process.stdout.readline()), process)
        finally:
            process.terminate()

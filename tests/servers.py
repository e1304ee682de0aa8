"""Servers of the documentation's programs: processes of their own, which are asked over HTTP."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import polars_async


def until(found):
    """Give what `found` gives, once that is true; the time-out of the test is the only limit."""
    while not (value := found()):
        time.sleep(0.01)
    return value


class Server:
    """A process of its own, and its log."""

    def __init__(self, command, folder, program=(sys.executable, "-m")):
        self._log = folder / f"{time.monotonic_ns()}.log"
        self._read = 0
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*program, *command],
                cwd=folder,
                # gunicorn has a socket in the home folder
                env={key: value for key, value in os.environ.items() if key != "XDG_RUNTIME_DIR"}
                | {"HOME": str(folder), "PYTHONPATH": str(Path(polars_async.__file__).parents[1])},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def logged(self, pattern, count=1):
        """Wait for `count` lines with `pattern`, and give what its group found in each."""

        def found():
            matches = re.findall(pattern, self._log.read_text())
            assert self._process.poll() is None, self._log.read_text()
            return matches if len(matches) >= count else None

        return until(found)

    def complaints(self):
        """Give what was logged since this was last asked, and is no mere information."""
        lines = self._log.read_text().splitlines()
        new, self._read = lines[self._read :], len(lines)
        return [line for line in new if not re.match(r"INFO: |INFO - |\[.*\] \[INFO\]", line)]

    def send(self, path, content=None, **headers):
        """
        Send a request, and give the connection, on which the response will come.

        What it posts is `content`, as JSON.
        """
        (port,) = self.logged(r"http://127\.0\.0\.1:(\d+)")
        connection = HTTPConnection("127.0.0.1", int(port))
        if content is None:
            connection.request("GET", path, headers=headers)
        else:
            headers["Content-Type"] = "application/json"
            connection.request("POST", path, json.dumps(content), headers)
        return connection

    def ask(self, path, content=None, **headers):
        return response_on(self.send(path, content, **headers))

    def stats(self):
        return json.loads(self.ask("/stats")[1])

    def until(self, **expected):
        """Wait until the collector's statistics are as expected."""
        return until(lambda: expected.items() <= (stats := self.stats()).items() and stats)

    def hold(self):
        """Have every slot taken by a query that runs until the gate opens."""
        self.ask("/hold")
        return self.until(running=self.stats()["max_running"])

    def end(self):
        """Tell the server to end."""
        self._process.terminate()

    def status(self):
        """Wait for the end, and give the exit status."""
        return self._process.wait()


def response_on(connection):
    with contextlib.closing(connection):
        response = connection.getresponse()
        return response, response.read()

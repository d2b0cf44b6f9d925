"""A base behind a URL, from a real server on this machine: whole, and the file that was meant."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mmengine.runner import CheckpointLoader
from torch.multiprocessing import ProcessExitedException

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.files.download import check_url, fetch_url, is_out_of_reach
from mmdet_gdino_lora.lora.store.base import fetch
from tests.processes import in_new_processes

CONTENT = bytes(range(256)) * 4096  # a megabyte
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Cuts the first connections, after some bytes; then it sends what is asked for.

    Attributes:
        cuts: After how many bytes each of the first connections ends.
        ways: What it does otherwise than a plain server: 'no length', 'no ranges', 'changed'.
        asked: The ranges that were asked for.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.cuts: list[int] = []
        self.ways: set[str] = set()
        self.asked: list[str | None] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def url(self, name: str) -> str:
        return f'http://127.0.0.1:{self.server_port}/{name}'


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        if self.path.startswith('/leads-to-http'):
            self.send_response(302)
            self.send_header('Location', 'http://192.0.2.1/base.pth')
            return self.end_headers()
        asked = self.headers.get('Range')
        server.asked.append(asked)
        start = int(re.findall(r'\d+', asked)[0]) if asked and 'no ranges' not in server.ways else 0
        tag = f'"{len(server.asked)}"' if 'changed' in server.ways else '"same"'
        start = 0 if self.headers.get('If-Range') not in (None, tag) else start
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}')
        if 'no length' not in server.ways:
            self.send_header('Content-Length', str(len(CONTENT) - start))
        self.send_header('ETag', tag)
        self.end_headers()
        end = start + server.cuts.pop(0) if server.cuts else len(CONTENT)
        self.wfile.write(CONTENT[start:end])
        self.wfile.flush()
        server.go_on.wait(30)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where downloads lie."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')  # not asked for what is on this machine
    return tmp_path / 'hub/checkpoints'


def refusal(url: str) -> str:
    with pytest.raises(ConfigError) as told:
        fetch_url(url)
    assert '\n' not in str(told.value) and repr(url) in str(told.value)
    return str(told.value)


def test_a_file_is_fetched_once(server: Server, folder: Path) -> None:
    for _ in range(2):
        path = fetch(server.url('base.pth'))
    assert Path(path) == folder / 'base.pth' and Path(path).read_bytes() == CONTENT
    assert len(server.asked) == 1 and os.listdir(folder) == ['base.pth']


def test_a_file_is_out_of_reach_where_it_is_neither_here_nor_there(
    server: Server, folder: Path
) -> None:
    assert not is_out_of_reach(server.url('base.pth')) and not folder.exists()
    assert is_out_of_reach('http://127.0.0.1:9/base.pth')
    assert is_out_of_reach(server.url('leads-to-http'))
    fetch_url(server.url('base.pth'))
    assert not is_out_of_reach('http://127.0.0.1:9/base.pth')  # kept under its name


@pytest.mark.parametrize('way', ['ranges', 'no ranges', 'changed'])
def test_a_connection_that_is_cut_is_gone_on_with(server: Server, folder: Path, way: str) -> None:
    server.cuts, server.ways = [300_000, 500_000], {way}
    assert Path(fetch_url(server.url('base.pth'))).read_bytes() == CONTENT
    assert server.asked[:2] == [None, 'bytes=300000-'] and os.listdir(folder) == ['base.pth']
    assert len(server.asked) == 3


def test_half_a_file_never_stands_for_the_whole(server: Server, folder: Path) -> None:
    server.cuts = [1000] * 99
    server.ways = {'no ranges'}
    assert 'ended early' in refusal(server.url('base.pth'))
    assert os.listdir(folder) == []


def test_a_file_of_unknown_length_is_refused(server: Server, folder: Path) -> None:
    server.ways = {'no length'}
    assert 'does not say how long' in refusal(server.url('base.pth'))
    assert os.listdir(folder) == []


def fetch_until_killed(number: int, folder: str, url: str) -> None:
    """Kills its process when something has come."""

    def wait() -> None:
        while not (os.path.exists(partial) and os.path.getsize(partial)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    partial = os.path.join(folder, 'base.pth.partial')
    os.environ['TORCH_HOME'] = str(Path(folder).parent.parent)
    threading.Thread(target=wait, daemon=True).start()
    fetch_url(url)


def test_what_a_killed_process_left_does_not_count(server: Server, folder: Path) -> None:
    server.cuts = [300_000]
    server.go_on.clear()
    with pytest.raises(ProcessExitedException) as end:
        in_new_processes(fetch_until_killed, str(folder), server.url('base.pth'))
    assert end.value.signal_name == 'SIGKILL'
    server.go_on.set()
    assert os.listdir(folder) == ['base.pth.partial']
    assert Path(fetch_url(server.url('base.pth'))).read_bytes() == CONTENT
    assert os.listdir(folder) == ['base.pth']


@pytest.mark.parametrize('name', [f'base-{DIGEST[:8]}.pth', f'base.pth#sha256={DIGEST}'])
def test_the_hash_that_a_url_gives_is_compared(server: Server, folder: Path, name: str) -> None:
    path = Path(fetch_url(server.url(name)))
    assert path.read_bytes() == CONTENT
    path.write_bytes(CONTENT[:-1] + b'x')  # by hand, say
    assert f'not {DIGEST[:8]}' in refusal(server.url(name)) and path.exists()
    assert 'remove' in refusal(server.url(name))


@pytest.mark.parametrize('name', ['base-0123abcd.pth', 'base.pth#sha256=0123abcd'])
def test_another_file_than_the_hash_says_is_not_kept(
    server: Server, folder: Path, name: str
) -> None:
    assert DIGEST in refusal(server.url(name)) and os.listdir(folder) == []


def test_a_day_in_a_name_is_no_hash(server: Server, folder: Path) -> None:
    assert fetch_url(server.url('base-20231204.pth'))


def test_nothing_is_fetched_over_http_from_elsewhere(server: Server, folder: Path) -> None:
    for url in ('http://download.openmmlab.com/base.pth', 'http://192.0.2.1/base.pth'):
        assert 'https' in refusal(url)
        with pytest.raises(ConfigError, match='https'):
            CheckpointLoader.load_checkpoint(url)
    assert 'not https' in refusal(server.url('leads-to-http/base.pth'))
    check_url('https://download.openmmlab.com/base.pth')


@pytest.mark.parametrize('name', ['', 'x/', '..', 'base.pth#sha256=', 'base.pth#sha256=xyz'])
def test_a_url_without_a_file_or_with_a_broken_hash_is_refused(
    server: Server, folder: Path, name: str
) -> None:
    refusal(server.url(name))
    assert server.asked == []

"""An adapter and its card go to the hub, whose API a server of this test's answers here."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load as load_tensors

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora.store.hub import check_hub, push_folder
from tests.tool_run import Things

EXPORT = 'python tools/export_adapter.py my_things.py CHECKPOINT NEW --overwrite'


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub on the way of one upload; every file is a small one."""

    asked: list[tuple[str, str, str]] = []
    files: dict[str, bytes] = {}
    created: dict[str, Any] = {}
    refuses = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.asked.append((self.path, self.headers.get('Authorization', ''), body.decode()))
        if self.refuses:
            return self._answer(dict(error='Invalid username or password.'), 401)
        if self.path == '/api/repos/create':
            self.created.update(json.loads(body))
            return self._answer(dict(url=f'http://{self.headers["Host"]}/me/bolts', id='me/bolts'))
        if self.path == '/api/validate-yaml':
            return self._answer(dict(errors=[], warnings=[]))
        if '/preupload/' in self.path:
            names = [file['path'] for file in json.loads(body)['files']]
            modes = [dict(path=n, uploadMode='regular', shouldIgnore=False) for n in names]
            return self._answer(dict(files=modes))
        if '/commit/' in self.path:
            for line in body.decode().splitlines():
                said = json.loads(line)
                if said['key'] == 'file':
                    file = said['value']
                    self.files[file['path']] = base64.b64decode(file['content'])
            oid = '0' * 40
            url = f'http://{self.headers["Host"]}/me/bolts/commit/{oid}'
            return self._answer(dict(success=True, commitOid=oid, commitUrl=url))
        return self._answer(dict(error=f'unknown: {self.path}'), 404)

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get('Authorization', ''), ''))
        self._answer(dict(id='me/bolts', sha='0' * 40, siblings=[]))

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on loopback, and somebody who is logged in."""

    class ThisHub(Hub):
        asked, files, created = [], {}, {}

    server = ThreadingHTTPServer(('127.0.0.1', 0), ThisHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    yield ThisHub
    server.shutdown()
    server.server_close()


def test_adapter_and_card_arrive_and_nothing_else(
    hub: type[Hub], things: Things, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / 'private_notes.txt').write_text('not for the hub')
    command = EXPORT.replace('NEW', str(tmp_path))
    things.run(f'{command} --push-to-hub me/bolts --private')
    assert capsys.readouterr().out.strip().endswith('/me/bolts')
    assert set(hub.files) == {'adapter_config.json', 'adapter_model.safetensors', 'README.md'}
    for name, content in hub.files.items():
        assert content == (tmp_path / name).read_bytes()
    assert any('lora_B' in name for name in load_tensors(hub.files['adapter_model.safetensors']))
    assert hub.created['name'] == 'bolts' and hub.created['organization'] == 'me'
    assert hub.created.get('visibility', hub.created.get('private')) in ('private', True)
    assert {token for _, token, _ in hub.asked} == {'Bearer hf_secret'}


def test_a_hub_that_refuses_is_one_sentence_and_the_folder_stays(
    hub: type[Hub], things: Things, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hub.refuses = True
    with pytest.raises(SystemExit):
        things.run(f'{EXPORT.replace("NEW", str(tmp_path))} --push-to-hub me/bolts')
    (told,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
    assert 'did not take it' in told and told.endswith('push again.') and 'hf_secret' not in told
    assert (tmp_path / 'adapter_model.safetensors').is_file()


def test_a_hub_that_is_not_there_is_one_sentence(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(ConfigError, match='did not take it'):
        push_folder(str(tmp_path), 'me/bolts', ['README.md'])


@pytest.mark.parametrize(
    ('repo', 'told'),
    [('bolts', 'write owner/bolts'), ('me/bo lts', 'Write owner/name'), ('a/b/c', 'owner/name')],
)
def test_a_name_that_is_none_is_told_before_anything_is_asked(
    hub: type[Hub], repo: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        check_hub(repo)
    assert hub.asked == []


def test_offline_and_without_a_token_it_is_one_sentence(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(ConfigError, match='HF_HUB_OFFLINE=1 .*unset it'):
        check_hub('me/bolts')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'none'))
    with pytest.raises(ConfigError, match='hf auth login'):
        check_hub('me/bolts')
    assert hub.asked == []

"""What is said of a text model that can't be loaded: what happened, and what helps."""

from __future__ import annotations

import shutil
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from transformers import BertConfig, BertModel

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.text import CaptionTokenizer, GroundingTextEncoder, files
from mmdet_gdino_lora.text.files import text_model
from mmdet_gdino_lora.text.hub import hub_is_out_of_reach


@pytest.fixture
def folder(text_dir: str, tmp_path: Path) -> Path:
    """A text model that a test may damage."""
    return Path(shutil.copytree(text_dir, tmp_path / 'bert'))


def told(action) -> str:
    with pytest.raises(ConfigError) as caught:
        action()
    return str(caught.value)


def test_a_damaged_config_file_is_not_called_missing(folder: Path) -> None:
    (folder / 'config.json').write_text('{"model_type": "bert"')
    for load in (CaptionTokenizer, GroundingTextEncoder):
        text = told(lambda: load(str(folder)))  # noqa: B023
        assert 'config.json is no JSON' in text and repr(str(folder)) in text
        assert 'no text model there' not in text


def test_damaged_weights_are_not_called_missing(folder: Path) -> None:
    BertModel(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    weights = folder / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:100])
    text = told(GroundingTextEncoder(str(folder)).init_weights)
    assert 'can not be read: SafetensorError' in text and 'no text model there' not in text


def test_weights_that_are_not_there_are_called_missing(folder: Path) -> None:
    assert 'no text model there' in told(GroundingTextEncoder(str(folder)).init_weights)


def test_a_missing_package_is_named(folder: Path) -> None:
    def load(name: str) -> None:
        raise ModuleNotFoundError("No module named 'sentencepiece'")

    text = told(lambda: text_model(str(folder), load))
    assert "'sentencepiece'" in text and 'package' in text and 'no text model there' not in text


@pytest.mark.parametrize('kind', [TypeError, AttributeError, KeyError, IndexError])
def test_a_mistake_in_somebodys_code_is_shown_as_it_is(folder: Path, kind: type) -> None:
    def load(name: str) -> None:
        raise kind('in transformers')

    with pytest.raises(kind, match='in transformers'):
        text_model(str(folder), load)


def test_what_the_hub_and_its_client_raise_is_called_missing() -> None:
    client = HfHubHTTPError.__mro__[1]
    network = type('ConnectError', (client,), {})

    for error in (OSError('offline'), network('no route'), ValueError('not a repo id')):

        def load(name: str, error: Exception = error) -> None:
            raise error

        assert 'nor on the hub' in told(lambda: text_model('owner/model', load))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """First lines of those that a hub got which hangs up on everybody."""
    made: list[str] = []

    class HangUp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            made.append(self.request.recv(4096).split(b'\r\n')[0].decode())

    with socketserver.ThreadingTCPServer(('127.0.0.1', 0), HangUp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f'http://127.0.0.1:{server.server_address[1]}'
        monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
        monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', endpoint)
        monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
        hub_is_out_of_reach.cache_clear()
        yield made
        server.shutdown()
    hub_is_out_of_reach.cache_clear()


def test_a_hub_out_of_reach_is_tried_once(requests: list[str]) -> None:
    for load in (CaptionTokenizer, GroundingTextEncoder):
        assert 'nor on the hub' in told(lambda: load('owner/model'))  # noqa: B023
    asked = [line for line in requests if line.startswith('HEAD')]
    assert len(asked) == 1, asked


def test_a_text_model_is_out_of_reach_where_it_is_neither_here_nor_on_the_hub(
    requests: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not files.is_out_of_reach(str(folder)) and requests == []
    assert files.is_out_of_reach('owner/model') and len(requests) == 1
    monkeypatch.setattr(files, 'hub_is_out_of_reach', lambda: False)
    assert not files.is_out_of_reach('owner/model')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    assert files.is_out_of_reach('owner/model')


def test_a_hub_that_answers_is_asked_by_whoever_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, 'hub_is_out_of_reach', lambda: False)
    assert text_model('owner/model', lambda name, **given: given) == {}

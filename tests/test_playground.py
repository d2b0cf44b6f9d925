"""The page to try a detector on: over HTTP, and in a browser where CHROMIUM names one's program."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional
from urllib.error import HTTPError
from urllib.request import urlopen

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from mmdet_gdino_lora.commands import playground
from mmdet_gdino_lora.commands.image_demo import detect, load
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.playground.page import Answer, need_gradio, serving
from tests.builders import build, detector_cfg
from tests.detectors import ready_for_devices, save
from tests.faults.smallest import model as smallest_model

WITH_GRADIO = pytest.mark.skipif(
    not importlib.util.find_spec('gradio'), reason='gradio is not installed'
)
WITH_BROWSER = pytest.mark.skipif(
    not os.environ.get('CHROMIUM') or not importlib.util.find_spec('playwright'),
    reason='CHROMIUM names no browser, or playwright is not installed',
)
NAMES = ['dog', 'hot dog', 'cat']
TEXT = 'dog . hot dog\ncat'
Ask = Callable[..., tuple[Any, list, str]]


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(('127.0.0.1', 0))
        return tried.getsockname()[1]


@pytest.fixture(scope='module')
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp('photo') / 'photo.jpg')
    cv2.imwrite(path, np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    return path


@pytest.fixture(scope='module')
def tuned(
    text_dir: str, small_base: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A config, and a checkpoint whose adapter has learned something."""
    folder = tmp_path_factory.mktemp('tuned')
    model = {**smallest_model(), 'lora': dict(preset='all', r=2), 'base_checkpoint': small_base}
    meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'text')
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(96, 96), keep_ratio=True),
        dict(type='PackDetInputs', meta_keys=(*meta, 'custom_entities')),
    ]
    dataset = dict(type='CocoDataset', metainfo=dict(classes=tuple(NAMES)), pipeline=pipeline)
    cfg = Config(dict(model=detector_cfg(text_dir, **model), test_dataloader=dict(dataset=dataset)))
    cfg.dump(folder / 'tuned.py')
    detector = ready_for_devices(build(text_dir, **model))
    return folder / 'tuned.py', save(detector, folder / 'tuned.pth')


def trial_of(tuned: tuple[Path, str], **scores: Optional[float]) -> playground.Trial:
    detector, pipeline = load(Config.fromfile(tuned[0]), tuned[1], 'cpu')
    return playground.Trial(detector, pipeline, scores)


@pytest.fixture(scope='module')
def trial(tuned: tuple[Path, str]) -> playground.Trial:
    return trial_of(tuned)


@pytest.fixture(scope='module')
def page(trial: playground.Trial) -> Iterator[str]:
    """The address of a page."""
    with serving(trial, NAMES, '127.0.0.1', free_port()) as url:
        yield url


@pytest.fixture(scope='module')
def ask(page: str, tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Asks over HTTP: the picture's file, the table's rows, the words."""
    from gradio_client import Client, handle_file

    downloads = str(tmp_path_factory.mktemp('downloads'))
    client = Client(page, verbose=False, download_files=downloads)

    def asked(photo: Optional[str], text: str, least: float, strength: float) -> tuple:
        given = handle_file(photo) if photo else None
        picture, table, told = client.predict(given, text, least, strength, api_name='/detect')
        return picture, table['data'], told

    return asked


def rows_of(config: Path, checkpoint: str, photo: str, **model: Any) -> list[list]:
    """What image-demo detects."""
    cfg = Config.fromfile(config)
    cfg.model.update(model)
    found = detect(*load(cfg, checkpoint, 'cpu'), photo, NAMES)
    answers = zip(found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist())
    return [[NAMES[label], score, *box] for label, score, box in answers]


# ---------------------------------------------------------------------------------------- over HTTP


@WITH_GRADIO
def test_strengths_are_the_base_and_image_demos(
    ask: Ask, tuned: tuple[Path, str], small_base: str, photo: str
) -> None:
    tuned_rows = rows_of(*tuned, photo)
    base_rows = rows_of(tuned[0], small_base, photo, lora=None, base_checkpoint=None)
    assert len(tuned_rows) > 5 and base_rows != tuned_rows
    for strength, expected in ((1, tuned_rows), (0, base_rows), (1.0, tuned_rows)):
        picture, rows, told = ask(photo, TEXT, 0, strength)
        assert rows == expected
        assert told == f'{len(rows)} found'
        assert cv2.imread(picture).shape == (48, 64, 3)
    between = ask(photo, TEXT, 0, 0.5)[1]
    assert between not in (tuned_rows, base_rows)


@WITH_GRADIO
def test_the_lowest_score_is_the_sliders(ask: Ask, tuned: tuple[Path, str], photo: str) -> None:
    everything = rows_of(*tuned, photo)
    scores = sorted(row[1] for row in everything)
    least = scores[len(scores) // 2]
    assert ask(photo, TEXT, least, 1)[1] == [row for row in everything if row[1] >= least]
    picture, rows, told = ask(photo, TEXT, 1, 1)
    assert rows == [] and told == '0 found' and picture


@WITH_GRADIO
@pytest.mark.parametrize(
    ('given', 'text', 'told'),
    [
        (None, TEXT, 'there is no photo yet'),
        ('photo', ' .\n', 'names nothing'),
        ('photo', 'dog ' * 300, 'token'),
        ('text', TEXT, 'no image that OpenCV can read'),
    ],
)
def test_a_persons_mistake_is_a_sentence_on_the_page(
    ask: Ask, photo: str, tmp_path: Path, given: Optional[str], text: str, told: str
) -> None:
    (tmp_path / 'note.jpg').write_text('no photo')
    files = dict(photo=photo, text=str(tmp_path / 'note.jpg'))
    picture, rows, words = ask(given and files[given], text, 0.3, 1)
    assert picture is None and rows == []
    assert told in words and '\n' not in words.strip() and 'Traceback' not in words


@WITH_GRADIO
def test_the_page_gives_away_nothing_else(page: str, photo: str) -> None:
    with urlopen(page) as answer:
        assert answer.headers['content-security-policy'].startswith("default-src 'self' ")
        assert b'fonts.googleapis' not in answer.read()
    for path in (photo, __file__):
        with pytest.raises(HTTPError, match='403'):
            urlopen(f'{page}gradio_api/file={path}')


@WITH_GRADIO
def test_one_photo_is_looked_at_at_a_time_and_none_stays(photo: str, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    inside, most, files = [0], [0], []

    def slow(given: Optional[str], *more: Any) -> Answer:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.1)
        inside[0] -= 1
        files.append(given)
        return Answer(cv2.imread(given), [], 'seen')

    with serving(slow, NAMES, '127.0.0.1', free_port()) as url:
        folder = Path(os.environ['GRADIO_TEMP_DIR'])
        clients = [Client(url, verbose=False, download_files=str(tmp_path)) for _ in range(2)]
        jobs = [
            client.submit(handle_file(photo), TEXT, 0.3, 1, api_name='/detect')
            for client in clients * 2
        ]
        assert [job.result()[2] for job in jobs] == ['seen'] * 4
        assert all(Path(file).is_relative_to(folder) and Path(file).is_file() for file in files)
    assert most == [1] and len(files) == 4
    assert not folder.exists()


@WITH_GRADIO
def test_the_command_ends_with_sigterm_and_tidies_up(
    tuned: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    port, seen = free_port(), []

    def look_and_end() -> None:
        folder = os.environ['GRADIO_TEMP_DIR']
        seen.extend([urlopen(f'http://127.0.0.1:{port}/').status, os.path.isdir(folder), folder])
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(signal, 'pause', look_and_end)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            playground.main([*map(str, tuned), '--port', str(port), '--device', 'cpu'])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (end.value.code, *seen[:2]) == (143, 200, True)
    assert not os.path.exists(seen[2])
    told = f'open http://127.0.0.1:{port}/ in a browser; Ctrl-C ends it'
    assert capsys.readouterr().out.splitlines()[-1] == told


@WITH_GRADIO
@pytest.mark.parametrize('given', [None, 99999])
def test_a_port_that_is_taken_or_none_is_told(page: str, given: Optional[int]) -> None:
    port = given or int(page.rstrip('/').rpartition(':')[2])
    with (
        pytest.raises(ConfigError, match=f'^--host 127.0.0.1 --port {port}: nothing can be'),
        serving(lambda *given: Answer(None, [], ''), NAMES, '127.0.0.1', port),
    ):
        pass


# ----------------------------------------------------------------------------------- without a page


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match=r"^gradio, .* pip install 'mmdet-gdino-lora\[playground"):
        need_gradio()


def test_a_reports_thresholds_go_before_the_slider(tuned: tuple[Path, str], photo: str) -> None:
    rows = rows_of(*tuned, photo)
    dogs = sorted(row[1] for row in rows if row[0] == 'dog')
    trial = trial_of(tuned, dog=dogs[-1], cat=None)
    shown = trial(photo, TEXT, 0.0, 1).rows
    assert [list(row) for row in shown] == [r for r in rows if r[0] != 'dog' or r[1] >= dogs[-1]]
    assert {row[0] for row in shown} == set(NAMES)


def test_commas_are_pointed_out(trial: playground.Trial, photo: str) -> None:
    assert "'dog, cat' is taken for one name" in trial(photo, 'dog, cat', 0.3, 1).told


# ------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def browser() -> Iterator[Any]:
    from playwright import sync_api

    with sync_api.sync_playwright() as playing:
        program = os.environ['CHROMIUM']
        started = playing.chromium.launch(executable_path=program, args=['--no-sandbox'])
        yield started
        started.close()


#: Whether the table's rows are these.
SHOWS = """wanted => JSON.stringify(
    [...document.querySelectorAll('#found [role=row]:has([role=gridcell])')].map(
        row => [...row.querySelectorAll('[role=gridcell]')].map(cell => cell.innerText.trim())
    )) == JSON.stringify(wanted)"""


def as_shown(rows: Sequence[Sequence]) -> list[list[str]]:
    return [[name, f'{score:.2f}', *(f'{x:.0f}' for x in box)] for name, score, *box in rows]


@WITH_GRADIO
@WITH_BROWSER
@pytest.mark.parametrize('width', [1280, 390])
def test_in_a_browser(
    browser: Any, page: str, trial: playground.Trial, photo: str, width: int
) -> None:
    # Before the page is asked anything: it has the same detector.
    answers = {strength: trial(photo, TEXT, 0, strength) for strength in (1, 0, 1.5)}
    tab = browser.new_page(viewport=dict(width=width, height=900))
    asked: list[str] = []
    tab.on('request', lambda request: asked.append(request.url))
    tab.goto(page)
    assert tab.locator('#names textarea').input_value() == '\n'.join(NAMES)
    tab.locator('#ask').click()
    tab.wait_for_function("document.querySelector('#told textarea').value.includes('no photo')")
    tab.locator('#names textarea').fill(TEXT)
    tab.locator('#least input[type=number]').fill('0')
    tab.locator('#photo input[type=file]').set_input_files(photo)
    for strength, answer in answers.items():
        tab.locator('#strength input[type=number]').fill(str(strength))
        tab.wait_for_function(SHOWS, arg=as_shown(answer.rows))
        told = tab.locator('#told textarea').input_value()
        assert told == answer.told == f'{len(answer.rows)} found'
    assert tab.locator('#picture img').evaluate('image => image.naturalWidth') == 64
    edges = "[...document.querySelectorAll('#found [role=gridcell]')]"
    edges += '.map(cell => cell.getBoundingClientRect().right)'
    assert max(tab.evaluate(edges)) <= width
    assert tab.evaluate('document.documentElement.scrollWidth') <= width
    outside = [u for u in asked if not u.startswith((page, 'data:', 'blob:'))]
    assert outside == []
    tab.close()

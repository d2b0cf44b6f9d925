"""The page and its server, built with gradio."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Callable, Optional

import numpy as np

from mmdet_gdino_lora.errors import ConfigError

TITLE = 'Try the tuned detector'
HEADERS = ['name', 'score', 'x1', 'y1', 'x2', 'y2']
#: The table's columns, narrow enough for a telephone to show all of them, and no number broken.
_WIDTHS = ['25%', *['15%'] * 5]
_STYLE = (
    '#found :is([role=gridcell], [role=columnheader]) * { font-size: 12px; padding-inline: 1px }'
)
#: What the browser may fetch: nothing from elsewhere, whatever gradio's page asks for.
_OWN_ADDRESS = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is shown.

    Attributes:
        picture: The photo with detections, uint8 [H, W, 3] RGB; None: there is none to show.
        rows: Of the table: name, score, and the box's corners in the photo's pixels.
        told: What there is to say, in words.
    """

    picture: Optional[np.ndarray]
    rows: Sequence[tuple[str, float, float, float, float, float]]
    told: str


#: Answers for a photo's file (None: no photo), a text of names, the lowest score, the strength.
Answers = Callable[[Optional[str], str, float, float], Answer]


def need_gradio() -> None:
    """Sees to it that gradio is there.

    Raises:
        ConfigError: It isn't.
    """
    if importlib.util.find_spec('gradio') is None:
        raise ConfigError(
            'gradio, which the page is built with, is not installed; run '
            "pip install 'mmdet-gdino-lora[playground]', or pip install 'gradio>=6,<7'"
        )


@contextmanager
def serving(answers: Answers, names: Sequence[str], host: str, port: int) -> Iterator[str]:
    """Serves the page; one photo is looked at at a time.

    Args:
        answers: Who answers.
        names: What the page asks for in the beginning.
        host: Address to serve on.
        port: Number to serve on.

    Yields:
        The page's address. Within, the server runs in threads of this process; behind it photos and
        pictures are gone from the disk.

    Raises:
        ConfigError: Nothing can be served there.
    """
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # read at import
    with _temporary_folder():
        import gradio
        from starlette.middleware import Middleware

        page = _page(answers, names).queue(default_concurrency_limit=1)
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
                footer_links=[],
                theme=gradio.themes.Default(
                    font=['system-ui', 'sans-serif'], font_mono=['system-ui', 'sans-serif']
                ),
                css=_STYLE,
                app_kwargs=dict(middleware=[Middleware(_OwnAddressAlone)]),
            )
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f'--host {host} --port {port}: nothing can be served there ({error}); name another '
                'port'
            ) from error
        try:
            yield url
        finally:
            page.close(verbose=False)


@contextmanager
def _temporary_folder() -> Iterator[None]:
    """Within, uploads and pictures go to a folder that is removed at the end."""
    before = os.environ.get('GRADIO_TEMP_DIR')
    with tempfile.TemporaryDirectory(prefix='playground_') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ['GRADIO_TEMP_DIR']
            else:
                os.environ['GRADIO_TEMP_DIR'] = before


def _page(answers: Answers, names: Sequence[str]) -> Any:
    """gradio's description of the page."""
    import gradio

    def answer(*given: Any) -> tuple[Optional[np.ndarray], Mapping[str, Any], str]:
        answered = answers(*given)
        return answered.picture, _as_table(answered), answered.told

    with gradio.Blocks(title=TITLE, analytics_enabled=False) as page:
        gradio.Markdown(f'# {TITLE}')
        with gradio.Row():
            with gradio.Column():
                photo, text, least, strength, ask = _asked(gradio, names)
            with gradio.Column():
                shown = _shown(gradio)
        gradio.on(
            [ask.click, photo.change, text.submit, strength.change, least.change],
            answer,
            inputs=[photo, text, least, strength],
            outputs=shown,
            api_name='detect',
            trigger_mode='always_last',
            concurrency_limit=1,
        )
    return page


def _asked(gradio: Any, names: Sequence[str]) -> tuple[Any, ...]:
    """What a person gives: photo, names, lowest score, strength, and the button."""
    photo = gradio.Image(sources=['upload', 'clipboard'], label='Photo', elem_id='photo')
    # The file as it is: gradio would refuse some, and write others anew.
    photo.preprocess = lambda given: given.path if given else None
    text = gradio.Textbox(
        '\n'.join(names),
        lines=3,
        label='Names, one on each line or with " . " between them',
        elem_id='names',
    )
    words = 'Strength of the adapter: 0 is the base, 1 the tuned model'
    strength = gradio.Slider(0, 2, 1, step=0.05, label=words, elem_id='strength')
    words = 'Lowest score that is shown'
    least = gradio.Slider(0, 1, 0.3, step=0.01, label=words, elem_id='least')
    ask = gradio.Button('Detect', variant='primary', elem_id='ask')
    return photo, text, least, strength, ask


def _shown(gradio: Any) -> list[Any]:
    """Where an answer's parts go: picture, table and words."""
    picture = gradio.Image(
        label='Found',
        format='jpeg',
        interactive=False,
        buttons=['download', 'fullscreen'],  # not gradio's third, which uploads it
        elem_id='picture',
    )
    told = gradio.Textbox(label='In words', interactive=False, elem_id='told')
    table = gradio.Dataframe(
        headers=HEADERS, column_widths=_WIDTHS, interactive=False, wrap=True, elem_id='found'
    )
    return [picture, table, told]


def _as_table(answer: Answer) -> Mapping[str, Any]:
    """The rows as gradio has them: whole numbers for programs, rounded ones for the eye."""
    shown = [
        [name, f'{score:.2f}', *(f'{x:.0f}' for x in box)] for name, score, *box in answer.rows
    ]
    return dict(
        headers=HEADERS,
        data=[list(row) for row in answer.rows],
        metadata=dict(display_value=shown) if shown else None,
    )


class _OwnAddressAlone:
    """Tells browsers to fetch nothing from elsewhere.

    Args:
        app: The application that answers.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            if message['type'] == 'http.response.start':
                header = (b'content-security-policy', _OWN_ADDRESS)
                message['headers'] = [*message.get('headers', ()), header]
            await send(message)

        await self._app(scope, receive, sent)

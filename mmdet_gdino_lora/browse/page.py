"""Writes a view's pictures into a folder, and a page that shows them beside each other."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

import jinja2

from mmdet_gdino_lora.browse.picture import draw
from mmdet_gdino_lora.browse.views import View
from mmdet_gdino_lora.engine.atomic import write_whole

PAGE = 'index.html'


def write(folder: str, title: str, views: Iterable[View]) -> int:
    """Writes pictures and page.

    Args:
        folder: Where to; it is made.
        title: Of the page.
        views: What is drawn.

    Returns:
        The number of pictures.
    """
    os.makedirs(folder, exist_ok=True)
    pictures = []
    for number, view in enumerate(views):
        stem = os.path.splitext(os.path.basename(view.path))[0]
        file = f'{number:03}_{stem}.jpg'
        draw(view).save(os.path.join(folder, file), quality=92)
        counts = Counter(view.names.get(label, str(label)) for label in view.labels.tolist())
        boxes = ', '.join(f'{count} {name}' for name, count in counts.items()) or 'no boxes'
        text = ' | '.join(' '.join(token.text for token in caption) for caption in view.captions)
        pictures.append((file, os.path.basename(view.path), boxes, text))
    loader = jinja2.FileSystemLoader(os.path.dirname(__file__))
    environment = jinja2.Environment(loader=loader, autoescape=True)
    page = environment.get_template('page.html').render(title=title, pictures=pictures)
    write_whole(os.path.join(folder, PAGE), page)
    return len(pictures)

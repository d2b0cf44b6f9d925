"""Labels in the formats that label tools import as pre-annotations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

#: How Label Studio names files of a local storage; the name follows, relative to its root.
LOCAL_FILES = '/data/local-files/?d='
_FROM, _TO = 'label', 'image'


def as_label_studio(coco: Mapping[str, Any], prefix: str = LOCAL_FILES) -> list[dict[str, Any]]:
    """Writes labels as Label Studio's tasks with predictions.

    Args:
        coco: Content of a COCO file.
        prefix: Of the images' addresses.

    Returns:
        A task for each image. A prediction's score is its least certain box's, so that a list
        sorted by it begins with what needs a look.
    """
    names = {category['id']: category['name'] for category in coco['categories']}
    tasks = []
    for image, boxes in _by_image(coco):
        result = [_region(image, box, names[box['category_id']]) for box in boxes]
        scores = [region['score'] for region in result if 'score' in region]
        prediction = dict(model_version='gdino-lora', result=result, score=min(scores, default=0.0))
        address = prefix + quote(image['file_name'])
        tasks.append(dict(data={_TO: address}, predictions=[prediction]))
    return tasks


def label_studio_view(coco: Mapping[str, Any]) -> str:
    """Writes the labelling interface that the tasks' predictions fit.

    Args:
        coco: Content of a COCO file.

    Returns:
        XML, for the project's settings.
    """
    view = ElementTree.Element('View')
    ElementTree.SubElement(view, 'Image', name=_TO, value=f'${_TO}', zoom='true')
    labels = ElementTree.SubElement(view, 'RectangleLabels', name=_FROM, toName=_TO)
    for category in coco['categories']:
        ElementTree.SubElement(labels, 'Label', value=category['name'])
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding='unicode') + '\n'


def as_cvat(coco: Mapping[str, Any]) -> str:
    """Writes labels as "CVAT for images 1.1".

    Args:
        coco: Content of a COCO file.

    Returns:
        XML. A score is an attribute, which CVAT passes over where the task's label has none so
        called. CVAT finds an image by its name, or else by its number in the task.
    """
    names = {category['id']: category['name'] for category in coco['categories']}
    root = ElementTree.Element('annotations')
    ElementTree.SubElement(root, 'version').text = '1.1'
    # CVAT takes a task's own labels; others that read its format take these.
    task = ElementTree.SubElement(ElementTree.SubElement(root, 'meta'), 'task')
    labels = ElementTree.SubElement(task, 'labels')
    for name in names.values():
        entry = ElementTree.SubElement(labels, 'label')
        ElementTree.SubElement(entry, 'name').text = name
        attribute = ElementTree.SubElement(ElementTree.SubElement(entry, 'attributes'), 'attribute')
        for field, value in (('name', 'score'), ('input_type', 'text'), ('mutable', 'False')):
            ElementTree.SubElement(attribute, field).text = value
    for number, (image, boxes) in enumerate(_by_image(coco)):
        about = dict(id=str(number), name=image['file_name'])
        about.update(width=str(image['width']), height=str(image['height']))
        entry = ElementTree.SubElement(root, 'image', about)
        for box in boxes:
            x, y, width, height = box['bbox']
            ends = dict(xtl=x, ytl=y, xbr=x + width, ybr=y + height)
            about = {key: f'{value:.2f}' for key, value in ends.items()}
            about.update(label=names[box['category_id']], occluded='0', z_order='0')
            shape = ElementTree.SubElement(entry, 'box', about)
            if 'score' in box:
                ElementTree.SubElement(shape, 'attribute', name='score').text = str(box['score'])
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding='unicode') + '\n'


def _by_image(coco: Mapping[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    boxes = defaultdict(list)
    for box in coco['annotations']:
        boxes[box['image_id']].append(box)
    return [(image, boxes[image['id']]) for image in coco['images']]


def _region(image: Mapping[str, Any], box: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One box; Label Studio's places and sizes are percents of the image's."""
    x, y, width, height = box['bbox']
    across, down = 100 / image['width'], 100 / image['height']
    value = dict(
        x=x * across,
        y=y * down,
        width=width * across,
        height=height * down,
        rotation=0,
        rectanglelabels=[name],
    )
    region = dict(
        id=str(box['id']),
        type='rectanglelabels',
        from_name=_FROM,
        to_name=_TO,
        original_width=image['width'],
        original_height=image['height'],
        image_rotation=0,
        value=value,
    )
    return dict(region, score=box['score']) if 'score' in box else region

"""A report from its beginning to its end: the detector is run once, and two files are written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmdet_gdino_lora.report import page
from mmdet_gdino_lora.report.collect import Run
from mmdet_gdino_lora.report.detect import detect
from mmdet_gdino_lora.report.facts import (
    about_data,
    about_model,
    about_report,
    training_set,
    validations_are_of_epochs,
)
from mmdet_gdino_lora.report.measure import Measurement
from mmdet_gdino_lora.report.page import Command
from mmdet_gdino_lora.report.pictures import best_and_worst

if TYPE_CHECKING:
    from mmengine.config import Config


@dataclasses.dataclass(frozen=True)
class Written:
    """A report that is on the disk.

    Attributes:
        page: Path of ``report.html``.
        thresholds: Path of ``thresholds.json``.
        commands: What comes next: what for, the command, and its line.
    """

    page: str
    thresholds: str
    commands: Sequence[Command]


def write_report(
    run: Run,
    cfg: Config,
    detector: Any,
    dataset: Any,
    pictures: int,
    scales: Sequence[Mapping[str, float]] = (),
) -> Written:
    """Measures a run's detector on its validation set and writes what came of it into its folder.

    Args:
        run: The run.
        cfg: Its config.
        detector: With the run's checkpoint, in eval mode.
        dataset: Of :func:`~.detect.validation_set`.
        pictures: How many of the best and of the worst images are shown.
        scales: Rows of ``sweep``, where that was asked for.

    Returns:
        Where it is.
    """
    names = dataset.metainfo['classes']
    measurement = Measurement(detect(detector, dataset, cfg.val_dataloader), names)
    verdicts = measurement.verdicts()
    best, worst = best_and_worst(measurement, verdicts, pictures)
    trained, boxes = training_set(cfg, names)
    facts = [*about_model(detector, run), trained, *about_data(dataset, names), *about_report()]
    thresholds = os.path.join(run.folder, 'thresholds.json')
    page.write_thresholds(thresholds, measurement)
    out = os.path.join(run.folder, 'report.html')
    commands = page.commands(run, names, thresholds)
    page.write(
        out,
        measurement,
        title=page.title(run),
        facts=facts,
        trained_boxes=boxes,
        charts=page.charts(run, validations_are_of_epochs(cfg)),
        best=best,
        worst=worst,
        scales=page.scales(scales),
        scale_rows=scales,
        confusion=page.confusion(measurement.confusion(verdicts), names),
        thresholds=thresholds,
        commands=commands,
    )
    return Written(out, thresholds, commands)

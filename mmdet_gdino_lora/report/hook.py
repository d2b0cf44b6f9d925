"""The report of a run that has come to its end, without being asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner.checkpoint import _load_checkpoint_to_model

from gdino_lora import typed
from mmdet_gdino_lora.engine.preempt_hook import PreemptHook
from mmdet_gdino_lora.engine.visits import same_numbers_drawn
from mmdet_gdino_lora.engine.wrapped import detector_of
from mmdet_gdino_lora.files.read import read_file
from mmdet_gdino_lora.lora import ADAPTER, evaluating, lora_state

#: Which of the commands that come next are told in the log; the page has them all.
TOLD = ('image-demo', 'label')


@HOOKS.register_module()
class ReportHook(Hook):
    """When training has ended, writes what ``gdino-lora report WORK_DIR`` would.

    ``report.html`` and ``thresholds.json`` are of the best checkpoint where the run keeps one, else
    of the last. What goes wrong here is told, and the run has ended well all the same. A run that
    SIGTERM stops, or that fails, has no report. Of several ranks the first alone writes it.

    Example::

        custom_hooks = [*_base_.custom_hooks, dict(type='ReportHook')]

    Args:
        pictures: How many of the best and of the worst images are shown.
    """

    # Behind what saves checkpoints, and behind PreemptHook, which stands before it in the list: a
    # signal that comes now ends the process at once.
    priority = 'LOWEST'

    def __init__(self, pictures: int = 4) -> None:
        self.pictures = pictures

    def after_train(self, runner: Any) -> None:
        """Writes the report.

        Args:
            runner: mmengine's runner.
        """
        if not is_main_process():
            return
        folder = _as_seen_from_here(runner.work_dir)
        again = f'{typed("report")} {folder}'
        if any(isinstance(hook, PreemptHook) and hook.asked for hook in runner.hooks):
            runner.logger.warning('SIGTERM came, and no report is written; for one: %s', again)
            return
        try:
            self._write(runner, folder)
        except Exception as error:  # a run of hours has come to its end, whatever is wrong here
            runner.logger.warning(
                'no report could be written (%s: %s); the run itself is complete, and this tries '
                'again: %s',
                type(error).__name__,
                error,
                again,
            )

    def _write(self, runner: Any, folder: str) -> None:
        # Drawing pages is no business of a run before its end.
        from mmdet_gdino_lora.report.collect import read_run
        from mmdet_gdino_lora.report.detect import validation_set
        from mmdet_gdino_lora.report.whole import write_report

        run, detector = read_run(folder), detector_of(runner)
        runner.logger.info('for the report %s is measured on the validation set', run.checkpoint)
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        measuring = weights_of(detector, run.checkpoint)
        with same_numbers_drawn(devices), evaluating(detector), measuring:
            dataset = validation_set(runner.cfg)
            written = write_report(run, runner.cfg, detector.eval(), dataset, self.pictures)
        lines = [f'{c.told}:\n  {c.line}' for c in written.commands if c.name in TOLD]
        runner.logger.info(
            'report: %s (opens in a browser)\nthe best score threshold of each class: %s\n\n%s\n',
            written.page,
            written.thresholds,
            '\n'.join(lines),
        )


@contextmanager
def weights_of(detector: Any, checkpoint: str) -> Iterator[None]:
    """Puts a checkpoint's weights into a detector, and its own back afterwards.

    No second detector is made: what is kept meanwhile are the tensors that differ, which are
    adapters, and what is trained beside them.

    Args:
        detector: Of the run that wrote the checkpoint.
        checkpoint: File.
    """
    content, state = read_file(checkpoint), lora_state(detector)
    saved = content['state_dict']
    kept = {
        name: tensor.clone()
        for name, tensor in detector.state_dict().items()
        if name not in saved or not torch.equal(saved[name].to(tensor), tensor)
    }
    taught = state.taught(ADAPTER)
    try:
        if kept:
            _load_checkpoint_to_model(detector, content)
        del content, saved
        yield
    finally:
        for name, tensor in detector.state_dict().items():
            if name in kept:
                tensor.copy_(kept[name])
        state.knows(ADAPTER, taught)


def _as_seen_from_here(path: str) -> str:
    """A path as a person types it: relative, where it lies below the current folder."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith(os.pardir) else relative

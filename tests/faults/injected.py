"""What goes wrong on purpose, inside the process that trains."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import DATASETS, HOOKS
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet_gdino_lora.engine.checkpoint_hook import AdapterCheckpointHook
from tests.faults.smallest import SampledImages

NAN_PLACES = ('forward', 'loss', 'gradient', 'cost')


def kill(number: int = 0) -> None:
    """Ends a process without a chance to clean up.

    Args:
        number: Of the process; 0 is this one.
    """
    os.kill(number or os.getpid(), signal.SIGKILL)


class Undo:
    """A planted fault that can be taken back as torch's hooks can.

    Args:
        remove: Takes it back.
    """

    def __init__(self, remove: Callable[[], None]) -> None:
        self.remove = remove


@HOOKS.register_module(force=True)
class NaNHook(Hook):
    """Makes some steps NaN in one place.

    Args:
        where: One of ``NAN_PLACES``.
        at: Iterations.
    """

    priority = 'LOWEST'

    def __init__(self, where: str, at: list[int]) -> None:
        self.where, self.at = where, at
        self._planted: Any = None

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if runner.iter in self.at:
            model = getattr(runner.model, 'module', runner.model)
            self._planted = getattr(self, f'_in_{self.where}')(model)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if self._planted is not None:
            self._planted.remove()
            self._planted = None

    def _in_forward(self, model: Any) -> Any:
        return model.decoder.layers[1].register_forward_hook(lambda m, i, out: out * math.nan)

    def _in_loss(self, model: Any) -> Any:
        def spoilt(module: Any, inputs: Any, losses: dict) -> dict:
            return {n: v * math.nan if n == 'loss_giou_0' else v for n, v in losses.items()}

        return model.bbox_head.criterion.register_forward_hook(spoilt)

    def _in_gradient(self, model: Any) -> Any:
        weight = model.decoder.layers[0].ffn.layers[1].lora_A['default'].weight
        return weight.register_hook(lambda grad: grad * math.inf)

    def _in_cost(self, model: Any) -> Any:
        cost = model.bbox_head.criterion.matcher.costs[1]
        kept, cost.weight = cost.weight, math.nan
        return Undo(lambda: setattr(cost, 'weight', kept))


@HOOKS.register_module(force=True)
class FaultHook(Hook):
    """Lets one thing go wrong in one iteration.

    Args:
        what: Name of the method that does it.
        at: The iteration.
    """

    def __init__(self, what: str, at: int) -> None:
        self.what, self.at = what, at

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        Path(runner.work_dir, 'reached').write_text(str(runner.iter))
        if runner.iter == self.at:
            getattr(self, self.what)(runner)

    def in_forward(self, runner: Runner) -> None:
        runner.model.decoder.layers[0].register_forward_hook(lambda *_: kill())

    def in_backward(self, runner: Runner) -> None:
        weight = runner.model.decoder.layers[0].ffn.layers[1].lora_B['default'].weight
        weight.register_hook(lambda grad: kill())

    def while_writing_checkpoint(self, runner: Runner) -> None:
        kill_at_fsync('.pth.')

    def while_writing_adapter(self, runner: Runner) -> None:
        kill_at_fsync('adapter_model.safetensors.')

    def between_the_two(self, runner: Runner) -> None:
        AdapterCheckpointHook._export = lambda *args: kill()

    def sigterm(self, runner: Runner) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def worker_killed(self, runner: Runner) -> None:
        kill(runner.train_dataloader._iterator._workers[0].pid)

    def rank_dies(self, runner: Runner) -> None:
        if runner.rank == 1:
            kill()

    def disk_fills_up(self, runner: Runner) -> None:
        with open(Path(runner.work_dir, 'ballast'), 'wb', buffering=0) as file:
            try:
                while file.write(b'0' * 4096):
                    pass
            except OSError:
                return

    def disk_leaves_little(self, runner: Runner) -> None:
        self.disk_fills_up(runner)
        ballast = Path(runner.work_dir, 'ballast')
        os.truncate(ballast, ballast.stat().st_size - 200_000)  # for the log

    def images_go_bad(self, runner: Runner) -> None:
        for name in ('0.png', '1.png'):
            Path(runner.train_dataloader.dataset.folder, name).write_bytes(
                b'<html>not found</html>'
            )


def kill_at_fsync(part: str) -> None:
    """Kills this process when a file is written in part, and not yet under its name.

    Args:
        part: Of the file's name.
    """
    fsync = os.fsync

    def killing(handle: int) -> None:
        if part in os.path.basename(os.readlink(f'/proc/self/fd/{handle}')):
            kill()
        fsync(handle)

    os.fsync = killing


@DATASETS.register_module(force=True)
class FileImages(SampledImages):
    """Small random images in files.

    Args:
        folder: Where the files are; they are written where missing.
        text_dir: Of the text model.
    """

    def __init__(self, folder: str, text_dir: str) -> None:
        super().__init__(text_dir, flicker=1)
        self.folder = folder
        self._load = LoadImageFromFile()
        os.makedirs(folder, exist_ok=True)
        for index in range(len(self)):
            path = self.get_data_info(index)['img_path']
            if not os.path.exists(path):
                noise = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
                cv2.imwrite(path, noise)

    def get_data_info(self, index: int) -> dict[str, Any]:
        """Names an image's file, as mmdet's data sets do.

        Args:
            index: Of the image.
        """
        return dict(img_path=os.path.join(self.folder, f'{index}.png'))

    def __getitem__(self, index: int) -> dict[str, Any]:
        info = self._load.transform(self.get_data_info(index))
        made = super().__getitem__(index)
        made['data_samples'].set_metainfo(dict(img_path=info['img_path']))
        return made

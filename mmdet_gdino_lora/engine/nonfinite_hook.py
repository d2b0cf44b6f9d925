"""NaN and infinity in a training step: named, kept for a look, and no weight learns from them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Optional

import torch
from mmdet.registry import HOOKS
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import EMAHook, Hook

from mmdet_gdino_lora.engine.agreement import Agreement
from mmdet_gdino_lora.engine.replay import Replay, has_images, paths_of
from mmdet_gdino_lora.engine.wrapped import detector_of
from mmdet_gdino_lora.errors import ConfigError, NonFiniteError

MOST_FILES = 5
"""Replay files of one run; they hold images."""


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Ends the run, or leaves the batch out, where losses, gradients or costs are NaN or infinite.

    Adapters, optimizer state and the averages of mmengine's ``EMAHook`` are not touched by such a
    batch, on any rank. What is needed to go through it again is written into the work dir, and the
    sentence says how (``tools/replay.py``).

    It looks at numbers that are on the host anyway: the norm of the gradients, which mmengine's
    ``clip_grad`` brings there, and the finiteness of predictions and costs, which the matching
    does. Through the gradients' sum a fault on one rank is one on all. What a ``GradScaler`` leaves
    out while it looks for its scale is no fault.

    Args:
        on_nonfinite: ``'stop'``, or ``'skip'`` to leave such batches out and go on.
        max_skips: With ``'skip'``, the number of such steps in a row after which the run ends.

    Example::

        custom_hooks = [dict(type='NonFiniteHook', on_nonfinite='skip')]
    """

    priority = 'HIGHEST'

    def __init__(self, on_nonfinite: str = 'stop', max_skips: int = 5) -> None:
        if on_nonfinite not in ('stop', 'skip'):
            raise ConfigError(
                f"NonFiniteHook.on_nonfinite={on_nonfinite!r} is neither 'stop' nor 'skip'"
            )
        self._skips_left_out = max_skips if on_nonfinite == 'skip' else 0
        self._agreement: Optional[Agreement] = None
        self._runner: Any = None
        self._batch: Any = None
        self._errors: list[NonFiniteError] = []
        self._in_a_row = self._files = 0
        self._told = ''
        self.blocked = False

    def before_train(self, runner: Any) -> None:
        """Begins to watch the criterion, the optimizer and the averages.

        Args:
            runner: mmengine's runner.

        Raises:
            ConfigError: Batches shall be skipped, and nothing looks at gradients in time.
        """
        if self._skips_left_out and not _clips_by_norm(runner.optim_wrapper):
            raise ConfigError(
                "NonFiniteHook.on_nonfinite='skip' reads the gradients' norm, and "
                'optim_wrapper.clip_grad has none; set it to dict(max_norm=0.1, norm_type=2)'
            )
        self._runner, self._agreement = runner, Agreement()
        for module in detector_of(runner).modules():
            if hasattr(module, 'on_nonfinite'):
                module.on_nonfinite = self._errors.append
        runner.optim_wrapper.optimizer.register_step_pre_hook(self._before_step)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                hook.ema_model = _Average(hook.ema_model, self)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Keeps hold of the batch.

        Args:
            runner: mmengine's runner.
            batch_idx: Index in the epoch.
            data_batch: The batch.
        """
        self._batch = data_batch
        self._errors.clear()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Decides, before any other hook learns of the step.

        Args:
            runner: mmengine's runner.
            batch_idx: Index in the epoch.
            data_batch: The batch.
            outputs: The losses; emptied where the step is left out.

        Raises:
            ConfigError: With the sentence, where the run ends.
        """
        updated = runner.optim_wrapper.should_update()
        self.blocked = updated and not math.isfinite(self._norm())
        fault = self._is_fault(outputs) if self.blocked or self._errors else ''
        if fault:
            self._told = self._tell(fault)
        if (self.blocked or fault) and outputs:
            outputs.clear()  # a NaN would stay in the log's averages
        agreed = self._agreement.tell(bool(fault)) if self._agreement else bool(fault)
        if agreed:
            self._in_a_row += 1
            self._end_or_warn()
        elif updated and not self.blocked:
            self._in_a_row = 0
        if not agreed and not fault:
            self._told = ''
        self._batch = None

    def after_train(self, runner: Any) -> None:
        """Lets go of the criterion.

        Args:
            runner: mmengine's runner.
        """
        if self._agreement is not None:
            self._agreement.settle()
        for module in detector_of(runner).modules():
            if hasattr(module, 'on_nonfinite'):
                module.on_nonfinite = None

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        """Without gradients torch's optimizers leave weights and states alone."""
        known = _clips_by_norm(self._runner.optim_wrapper)
        if math.isfinite(self._norm()) if known else not self._errors:
            return
        for group in optimizer.param_groups:
            for parameter in group['params']:
                parameter.grad = None

    def _norm(self) -> float:
        """The norm of the gradients in the latest step, which is on the host already."""
        wrapper = self._runner.optim_wrapper
        scalars = wrapper.message_hub.log_scalars
        name = f'train/{getattr(wrapper, "grad_name", "grad_norm")}'
        if not _clips_by_norm(wrapper) or name not in scalars:
            return 0.0
        return float(scalars[name].current())

    def _is_fault(self, outputs: Optional[Mapping[str, Any]]) -> str:
        """What isn't finite; empty where a loss scale that is still too large explains it."""
        parts = [error.where for error in self._errors]
        losses = {n: v for n, v in (outputs or {}).items() if isinstance(v, torch.Tensor)}
        bad = [name for name, value in losses.items() if not math.isfinite(float(value))]
        if bad and not parts:
            parts.append('loss components ' + _some([name for name in bad if name != 'loss']))
        if not parts:
            scaler = getattr(self._runner.optim_wrapper, 'loss_scaler', None)
            if scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1:
                return ''
            # Their sum over the ranks doesn't say whose they were.
            parts.append('gradients' + (' (of some rank)' if get_world_size() > 1 else ''))
        return ' and '.join(parts)

    def _tell(self, fault: str) -> str:
        """Writes the replay file, and returns the sentence."""
        runner, paths = self._runner, paths_of(self._batch)
        numbers = self._errors[0].images if self._errors else range(len(paths))
        images = [paths[number] for number in numbers if number < len(paths)]
        told = (
            f'iteration {runner.iter + 1}: {fault} are NaN or infinite, with '
            f'{_some(images) or "a batch"}'
        )
        if self._files >= MOST_FILES or not has_images(self._batch):
            return told
        rank = get_rank()
        name = f'nonfinite_iter_{runner.iter + 1}' + (f'_rank_{rank}' if rank else '') + '.pth'
        path = os.path.join(runner.work_dir, name)
        moment = dict(seed=runner.seed, rank=rank, iteration=runner.iter)
        Replay(dict(self._batch), detector_of(runner).state_dict(), moment, told).write(path)
        self._files += 1
        config = os.path.join(runner.work_dir, os.path.basename(runner.cfg.filename or ''))
        config = config if os.path.isfile(config) else 'CONFIG'
        return f'{told}; `python tools/replay.py {config} {path}` shows where it begins'

    def _end_or_warn(self) -> None:
        told = self._told or f'iteration {self._runner.iter}: another rank met NaN or infinity'
        self._told = ''
        if self._in_a_row <= self._skips_left_out:
            # Formatted here: mmengine's logger says what has one pattern once.
            self._runner.logger.warning(
                f'{told}; the batch is left out ({self._in_a_row} in a row, at most '
                f'{self._skips_left_out}).'
            )
            return
        in_a_row = f' ({self._in_a_row} in a row)' if self._skips_left_out else ''
        raise ConfigError(
            f'{told}{in_a_row}; lower the learning rate ({_rate(self._runner)} now), clip '
            'gradients, or use bfloat16 instead of float16, and go on with --resume'
        )


class _Average:
    """An average of weights that a step which is left out doesn't move; otherwise the average."""

    def __init__(self, average: Any, hook: NonFiniteHook) -> None:
        self._average, self._hook = average, hook

    def update_parameters(self, model: Any) -> None:
        if not self._hook.blocked:
            self._average.update_parameters(model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._average, name)


def _clips_by_norm(wrapper: Any) -> bool:
    return bool(wrapper.clip_grad_kwargs) and wrapper.clip_func is torch.nn.utils.clip_grad_norm_


def _rate(runner: Any) -> str:
    return f'{max(rate for rates in runner.optim_wrapper.get_lr().values() for rate in rates):g}'


def _some(names: list[str], count: int = 3) -> str:
    return ', '.join(names[:count]) + (
        f' and {len(names) - count} more' if len(names) > count else ''
    )

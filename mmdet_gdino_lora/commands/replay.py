"""Goes through a training step again that was NaN or infinite, and shows where that begins.

replay.py CONFIG FILE, where FILE is a nonfinite_iter_....pth of the run's work dir
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional

from mmdet_gdino_lora.commands.common import read_arguments, read_config

if TYPE_CHECKING:
    from mmengine.config import Config

    from mmdet_gdino_lora.engine.replay import Replay


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    arguments = argparse.ArgumentParser(description='Go through a training step again')
    arguments.add_argument('config', help='config file of the run')
    arguments.add_argument('file', help='replay file that the run has written')
    args = read_arguments(arguments, argv)
    cfg = read_config(args.config)

    from mmdet_gdino_lora.engine.replay import Replay

    replay = Replay.read(args.file)
    print(replay.told)
    detector = build(cfg, replay)
    for line in step(detector, replay, cfg):
        print(line)


def build(cfg: Config, replay: Replay) -> Any:
    """Builds the run's detector, with the weights it had before the step.

    Args:
        cfg: The run's config.
        replay: The step.

    Returns:
        The detector, in training mode.
    """
    import torch
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    if cfg.get('load_from'):
        cfg.model.setdefault('base_checkpoint', cfg.load_from)
    detector = MODELS.build(cfg.model)
    detector.load_state_dict(dict(replay.weights), strict=False)
    return detector.to('cuda' if torch.cuda.is_available() else 'cpu').train()


def step(detector: Any, replay: Replay, cfg: Config) -> Iterator[str]:
    """Goes through the step: forward and, where that is finite, backward.

    Args:
        detector: In training mode.
        replay: The step.
        cfg: The run's config.

    Yields:
        What was found, line by line.
    """
    import contextlib

    import torch
    from mmengine.logging import MessageHub

    from mmdet_gdino_lora.engine.visits import seed_by

    MessageHub.get_current_instance().update_info('iter', replay.moment['iteration'])
    found, errors = watched(detector)
    amp = cfg.optim_wrapper.get('type') == 'AmpOptimWrapper' and torch.cuda.is_available()
    dtype = getattr(torch, cfg.optim_wrapper.get('dtype') or 'float16')
    with torch.autocast('cuda', dtype=dtype) if amp else contextlib.nullcontext():
        data = detector.data_preprocessor(replay.batch, True)
        seed_by(*(replay.moment[key] for key in ('seed', 'rank', 'iteration')), 0)
        losses = detector(**data, mode='loss')
    for name, value in losses.items():
        yield f'{name:24} {float(value):g}'
    yield from (f'found: {error}' for error in errors)
    if found:
        yield f'first module whose output is NaN or infinite: {found[0]}'
        return
    yield "every module's output is finite"
    detector.parse_losses(losses)[0].backward()
    bad = [
        name
        for name, p in detector.named_parameters()
        if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    yield f'gradients that are NaN or infinite: {", ".join(bad) or "none"}'


def watched(detector: Any) -> tuple[list[str], list[Exception]]:
    """Watches a forward pass.

    Args:
        detector: About to be called.

    Returns:
        Two lists that the call fills: modules whose output is NaN or infinite, in the order in
        which they end, and what the criterion found.
    """
    found: list[str] = []
    errors: list[Exception] = []

    def look(name: str) -> Callable:
        return lambda module, inputs, output: found.append(name) if is_bad(output) else None

    for name, module in detector.named_modules():
        if name:
            module.register_forward_hook(look(f'{name} ({type(module).__name__})'))
        if hasattr(module, 'on_nonfinite'):
            module.on_nonfinite = errors.append
    return found, errors


def is_bad(output: Any) -> bool:
    """Whether tensors in a module's output are NaN or infinite; -inf marks padded tokens.

    Args:
        output: Tensors, in whatever they are packed.
    """
    import torch

    if isinstance(output, torch.Tensor):
        return output.is_floating_point() and not bool((output < torch.inf).all())
    if isinstance(output, dict):
        return any(map(is_bad, output.values()))
    return isinstance(output, (list, tuple)) and any(map(is_bad, output))

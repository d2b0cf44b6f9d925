"""What tests do with a detector: train it, detect with it, save it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.runner.checkpoint import weights_to_cpu
from torch import Tensor, nn

from tests.builders import WORDS, data_samples

#: Of detectors that are run on a GPU, or on a virtual one.
SETTINGS: dict[str, dict[str, Any]] = {
    'decoder': dict(lora=dict(preset='decoder', r=2)),
    'all': dict(lora=dict(preset='all', r=2)),
    'DoRA': dict(
        lora=dict(
            preset='decoder',
            r=2,
            use_dora=True,
            exclude_modules=['self_attn.attn', 'cross_attn_text.attn'],  # PEFT has none for these
        )
    ),
    'retain': dict(lora=dict(preset='all', r=2), retain=dict(names=['bird', 'car'])),
    'half base': dict(lora=dict(preset='all', r=2), base_dtype='bfloat16'),
}


def ready_for_devices(detector: nn.Module) -> nn.Module:
    """Its adapters change what it does, and nothing is dropped: devices draw other numbers."""
    for module in detector.modules():
        for name in ('p', 'dropout'):  # of nn.Dropout, and of attention
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return detector


def train(detector: nn.Module, steps: int = 2) -> dict[str, bool]:
    """Takes optimisation steps.

    Returns:
        For every trained parameter whether it has had a non-zero gradient.
    """
    detector.train()
    trained = {n: p for n, p in detector.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-2)
    seen = dict.fromkeys(trained, False)
    for step in range(steps):
        torch.manual_seed(step)
        samples = data_samples(WORDS[:4], [3, 2], size=48, seed=step)
        losses = detector.loss(torch.randn(2, 3, 48, 48), samples)
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if 'loss' in name).backward()
        for name, parameter in trained.items():
            seen[name] |= parameter.grad is not None and bool(parameter.grad.any())
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    return seen


@torch.no_grad()
def detections(detector: nn.Module) -> tuple[Tensor, Tensor]:
    detector.eval()
    torch.manual_seed(7)
    results = detector.predict(torch.randn(2, 3, 48, 48), data_samples(WORDS[:4], [1, 1], size=48))
    instances = [result.pred_instances for result in results]
    return torch.cat([i.bboxes for i in instances]), torch.cat([i.scores for i in instances])


def same(one: tuple, other: tuple) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


def save(detector: nn.Module, path: Path) -> str:
    torch.save(dict(meta={}, state_dict=weights_to_cpu(detector.state_dict())), path)
    return str(path)

"""What tests do with a detector: train it, detect with it, save it."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine.runner.checkpoint import weights_to_cpu
from torch import Tensor, nn

from tests.builders import WORDS, data_samples


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

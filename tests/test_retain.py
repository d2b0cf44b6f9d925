"""`retain`: the base teaches its adapted self what it knew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmdet.models.losses import GIoULoss
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.logging import MessageHub
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence

from mmdet_gdino_lora import retain
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.retain import Outputs, Retention, distance
from mmdet_gdino_lora.text import CaptionTokenizer
from tests.builders import WORDS, build, data_samples
from tests.detectors import train

OLD = ['dog', 'hot dog', 'small bird']
RETAIN = dict(names=OLD)


def step(detector: nn.Module, seed: int = 7) -> dict[str, Tensor]:
    """Losses of one batch, the same for the same seed."""
    torch.manual_seed(seed)
    samples = data_samples(WORDS[:4], [3, 2], size=48, seed=seed)
    return detector.train().loss(torch.randn(2, 3, 48, 48), samples)


def retained(losses: dict[str, Tensor]) -> Tensor:
    return sum(value for name, value in losses.items() if 'retain' in name)


@pytest.fixture(scope='module')
def forgetful(text_dir: str, base: str) -> dict[str, Tensor]:
    """Weights after two steps without retention."""
    detector = build(text_dir, base_checkpoint=base)
    train(detector, steps=2)
    return detector.state_dict()


def detector_that_forgot(
    text_dir: str,
    base: str,
    forgetful: dict[str, Tensor],
    **overrides: Any,
) -> nn.Module:
    detector = build(text_dir, base_checkpoint=base, **overrides)
    detector.load_state_dict(forgetful)
    return detector


def test_fresh_adapters_have_nothing_to_regain(text_dir: str, base: str) -> None:
    losses = step(build(text_dir, base_checkpoint=base, retain=RETAIN))
    for name in ('loss_retain_ce', 'loss_retain_bbox', 'loss_retain_giou'):
        assert abs(losses[name].item()) < 1e-6


def test_the_lesson_pulls_the_adapted_outputs_back_to_the_base(
    text_dir: str,
    base: str,
    forgetful: dict[str, Tensor],
) -> None:
    detector = detector_that_forgot(text_dir, base, forgetful, retain=RETAIN)
    trained = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    values = []
    for _ in range(40):
        loss = retained(step(detector))
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[0] > 1e-3
    assert values[-1] < 0.5 * values[0]


def test_objective_and_weights_are_untouched_by_the_lesson(
    text_dir: str,
    base: str,
    forgetful: dict[str, Tensor],
) -> None:
    plain = detector_that_forgot(text_dir, base, forgetful)
    taught = detector_that_forgot(text_dir, base, forgetful, retain=RETAIN)
    before = {name: p.detach().clone() for name, p in taught.named_parameters()}
    expected, losses = step(plain), step(taught)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    assert retained(losses) > 0
    assert all(torch.equal(p, before[name]) for name, p in taught.named_parameters())
    assert taught.training

    sum(expected.values()).backward()
    sum(value for name, value in losses.items() if 'retain' not in name).backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in taught.named_parameters():
        assert parameter.requires_grad == (name in gradients)
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6)


def test_what_the_base_encoded_serves_the_adapted_decoder_as_well(
    text_dir: str,
    base: str,
    forgetful: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    detector = detector_that_forgot(text_dir, base, forgetful, retain=RETAIN)
    shared = step(detector)
    monkeypatch.setattr(retain, 'BEHIND_ENCODER', set())
    encoded_twice = step(detector)
    for name, value in shared.items():
        torch.testing.assert_close(encoded_twice[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('trainable', [[], ['backbone.patch_embed', 'level_embed']])
def test_every_part_can_be_adapted_and_freed_beside_it(
    text_dir: str,
    base: str,
    trainable: list[str],
) -> None:
    detector = build(
        text_dir,
        base_checkpoint=base,
        lora=dict(preset='all', r=2),
        retain=RETAIN,
        trainable=trainable,
    )
    train(detector, steps=2)
    losses = step(detector)
    assert retained(losses) > 0
    sum(losses.values()).backward()


def test_only_every_so_many_th_iteration_is_a_lesson(text_dir: str, base: str) -> None:
    detector = build(text_dir, base_checkpoint=base, retain=dict(RETAIN, every=3))
    hub = MessageHub.get_current_instance()
    lessons = []
    for iteration in range(7):
        hub.update_info('iter', iteration)
        lessons.append('loss_retain_ce' in step(detector))
    assert lessons == [True, False, False] * 2 + [True]


def test_the_objective_is_untouched_in_mixed_precision_as_well(
    text_dir: str, base: str, forgetful: dict[str, Tensor]
) -> None:
    # Autocast remembers the casts of weights, which are the base's during the lesson.
    losses = []
    for retained_names in (None, RETAIN):
        detector = detector_that_forgot(text_dir, base, forgetful, retain=retained_names)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            losses.append(step(detector))
    plain, taught = losses
    assert all(torch.equal(taught[name], plain[name]) for name in plain)
    sum(taught.values()).backward()
    trained = [p for p in detector.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_a_base_in_half_the_bytes_teaches_as_well(text_dir: str, base: str) -> None:
    detector = build(text_dir, base_checkpoint=base, base_dtype='bfloat16', retain=RETAIN).train()
    samples = data_samples(WORDS[:4], [3, 2], size=48)
    losses = detector(torch.randn(2, 3, 48, 48), samples, mode='loss')
    assert retained(losses).abs() < 1e-3
    sum(losses.values()).backward()


def test_validation_has_no_lesson(text_dir: str, base: str) -> None:
    detector = build(text_dir, base_checkpoint=base, retain=RETAIN).eval()
    losses = detector.loss(torch.randn(1, 3, 48, 48), data_samples(WORDS[:4], [2], size=48))
    assert not any('retain' in name for name in losses)


def test_distance_is_the_divergence_and_the_weighted_box_losses_of_other_libraries() -> None:
    torch.manual_seed(0)

    def outputs() -> Outputs:
        logits = torch.randn(2, 5, 4, dtype=torch.float64) * 3
        logits[1, :, 3] = -torch.inf
        boxes = torch.rand(2, 5, 4, dtype=torch.float64) * 0.5 + 0.1
        return Outputs([logits], [boxes], torch.zeros(2, 5), boxes)

    adapted, taught = outputs(), outputs()
    found = distance(adapted, taught)
    valid = taught.logits[0].isfinite()
    one, other = (
        Bernoulli(logits=x.logits[0].masked_fill(~valid, 0).float()) for x in (taught, adapted)
    )
    expected = kl_divergence(one, other).masked_fill(~valid, 0).sum(-1).mean()
    torch.testing.assert_close(found['ce'], expected)

    score = taught.logits[0].sigmoid().amax(-1).flatten().float()
    score = score / score.sum()
    boxes, base_boxes = (x.boxes[0].flatten(0, 1).float() for x in (adapted, taught))
    l1 = (boxes - base_boxes).abs().sum(-1)
    torch.testing.assert_close(found['bbox'], (score * l1).sum())
    assert found['bbox'] > 0
    faint = Outputs([taught.logits[0] - 20], taught.boxes, taught.positions, taught.references)
    assert distance(adapted, faint)['bbox'] < 1e-5  # no sum to divide by blows it up
    giou = GIoULoss(reduction='none')(bbox_cxcywh_to_xyxy(boxes), bbox_cxcywh_to_xyxy(base_boxes))
    torch.testing.assert_close(found['giou'], (score * giou).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(names=[]), 'names'),
        (dict(names='dog'), 'names'),
        (dict(names=OLD, weight=0), 'weight'),
        (dict(names=OLD, weight='1.5'), 'weight'),
        (dict(names=OLD, every=0), 'every'),
        (dict(names=[*OLD, '...']), "names: class name '...'"),
        (dict(names=[*OLD, 'small red bird ' * 90]), "names: 'small red bird"),
        (dict(weight=1), 'names'),
    ],
)
def test_wrong_settings_are_told_by_key(text_dir: str, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f'model.retain.{message}'):
        Retention(CaptionTokenizer(text_dir), **settings)


def test_an_unknown_key_and_an_unknown_base_are_told(text_dir: str, base: str) -> None:
    with pytest.raises(ConfigError, match='names, weight and every'):
        build(text_dir, base_checkpoint=base, retain=dict(classes=OLD))
    with pytest.raises(ConfigError, match='model.retain needs a base.*base_checkpoint'):
        step(build(text_dir, retain=RETAIN))


def test_without_adapters_there_is_nothing_to_hold(text_dir: str) -> None:
    with pytest.raises(ConfigError, match='model.lora'):
        build(text_dir, lora=None, retain=RETAIN)


def test_of_more_names_than_a_caption_holds_every_lesson_draws_some(
    text_dir: str,
    base: str,
) -> None:
    names = [f'{a} {b} {c}' for a in WORDS for b in WORDS for c in WORDS[:2]]
    detector = build(text_dir, base_checkpoint=base, retain=dict(names=names))
    first, second = (detector.retention._caption() for _ in range(2))
    for caption in (first, second):
        assert 200 < caption.num_tokens <= 256 and set(caption.names) <= set(names)
    assert first.names != second.names
    assert 'loss_retain_ce' in step(detector)

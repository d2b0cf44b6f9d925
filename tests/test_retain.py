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
from mmdet_gdino_lora.lora import base_only, evaluating
from mmdet_gdino_lora.retain import Outputs, Retention, distillation_losses
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


def test_distillation_pulls_the_adapted_outputs_back_to_the_base(
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


def test_objective_and_weights_are_untouched_by_distillation(
    text_dir: str,
    base: str,
    forgetful: dict[str, Tensor],
) -> None:
    plain = detector_that_forgot(text_dir, base, forgetful)
    retaining = detector_that_forgot(text_dir, base, forgetful, retain=RETAIN)
    before = {name: p.detach().clone() for name, p in retaining.named_parameters()}
    expected, losses = step(plain), step(retaining)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    assert retained(losses) > 0
    assert all(torch.equal(p, before[name]) for name, p in retaining.named_parameters())
    assert retaining.training

    sum(expected.values()).backward()
    sum(value for name, value in losses.items() if 'retain' not in name).backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in retaining.named_parameters():
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


def test_only_every_so_many_th_iteration_distils(text_dir: str, base: str) -> None:
    detector = build(text_dir, base_checkpoint=base, retain=dict(RETAIN, every=3))
    hub = MessageHub.get_current_instance()
    asked = []
    for iteration in range(7):
        hub.update_info('iter', iteration)
        asked.append('loss_retain_ce' in step(detector))
    assert asked == [True, False, False] * 2 + [True]


def test_the_objective_is_untouched_in_mixed_precision_as_well(
    text_dir: str, base: str, forgetful: dict[str, Tensor]
) -> None:
    # Autocast remembers the casts of weights, which are the base's while it teaches.
    losses = []
    for retained_names in (None, RETAIN):
        detector = detector_that_forgot(text_dir, base, forgetful, retain=retained_names)
        with torch.no_grad():
            for parameter in detector.bbox_head.reg_branches.parameters():
                parameter.mul_(1.25)  # further than bfloat16 rounds
        with torch.autocast('cpu', dtype=torch.bfloat16):
            losses.append(step(detector))
    plain, retaining = losses
    assert all(torch.equal(retaining[name], plain[name]) for name in plain)
    sum(retaining.values()).backward()
    trained = [p for p in detector.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_a_base_in_half_the_bytes_teaches_as_well(text_dir: str, base: str) -> None:
    detector = build(text_dir, base_checkpoint=base, base_dtype='bfloat16', retain=RETAIN).train()
    samples = data_samples(WORDS[:4], [3, 2], size=48)
    losses = detector(torch.randn(2, 3, 48, 48), samples, mode='loss')
    assert retained(losses).abs() < 1e-6
    sum(losses.values()).backward()


def test_validation_does_not_distil(text_dir: str, base: str) -> None:
    detector = build(text_dir, base_checkpoint=base, retain=RETAIN).eval()
    losses = detector.loss(torch.randn(1, 3, 48, 48), data_samples(WORDS[:4], [2], size=48))
    assert not any('retain' in name for name in losses)


def test_distance_is_the_divergence_and_the_weighted_box_losses_of_other_libraries() -> None:
    torch.manual_seed(0)

    def outputs(layers: int) -> Outputs:
        logits = torch.randn(layers, 2, 5, 4, dtype=torch.float64) * 3
        logits[:, 1, :, 3] = -torch.inf
        boxes = torch.rand(layers, 2, 5, 4, dtype=torch.float64) * 0.5 + 0.1
        return Outputs(logits, boxes, torch.zeros(2, 5), boxes[0])

    def layer(of: Outputs, index: int) -> Outputs:
        return of._replace(logits=of.logits[index, None], boxes=of.boxes[index, None])

    student, teacher = outputs(3), outputs(3)
    layers = [distillation_losses(layer(student, i), layer(teacher, i)) for i in range(3)]
    for name, value in distillation_losses(student, teacher).items():
        torch.testing.assert_close(value, sum(losses[name] for losses in layers))

    found = layers[0]
    logits, base_logits = student.logits[0], teacher.logits[0]
    valid = base_logits.isfinite()
    one, other = (Bernoulli(logits=x.masked_fill(~valid, 0).float()) for x in (base_logits, logits))
    expected = kl_divergence(one, other).masked_fill(~valid, 0).sum(-1).mean()
    torch.testing.assert_close(found['ce'], expected)

    score = base_logits.sigmoid().amax(-1).flatten().float()
    score = score / score.sum()
    boxes, base_boxes = (x.boxes[0].flatten(0, 1).float() for x in (student, teacher))
    l1 = (boxes - base_boxes).abs().sum(-1)
    torch.testing.assert_close(found['bbox'], (score * l1).sum())
    assert found['bbox'] > 0
    faint = teacher._replace(logits=teacher.logits - 20)
    assert distillation_losses(student, faint)['bbox'] < 1e-5  # no sum to divide by blows it up
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


def test_of_more_names_than_a_caption_holds_some_are_drawn_each_time(
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


def test_a_checkpoint_that_freed_more_than_the_config_trains_keeps_its_features(
    text_dir: str, base: str
) -> None:
    freed = build(text_dir, base_checkpoint=base, trainable=['^neck', '^encoder.text_layers'])
    with torch.no_grad():
        for name, parameter in freed.named_parameters():
            if name.startswith(('neck', 'encoder.text_layers')):
                parameter.mul_(1.5)
    plain, retaining = (build(text_dir, base_checkpoint=base, retain=r) for r in (None, RETAIN))
    for detector in (plain, retaining):
        detector.load_state_dict(freed.state_dict())
    expected, losses = step(plain), step(retaining)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    # A student with the base's features would be nearer to its teacher.
    assert retained(losses) > 1e-3


def test_the_student_answers_for_the_queries_of_its_teacher(
    text_dir: str, base: str, forgetful: dict[str, Tensor]
) -> None:
    lora = dict(preset='encoder+decoder', r=4)
    detector = build(text_dir, base_checkpoint=base, lora=lora, retain=RETAIN).eval()
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if 'lora_B' in name and name.startswith('encoder'):
                parameter.normal_(std=0.1)
    samples = data_samples(WORDS[:4], [3, 2], size=48)
    images = torch.randn(2, 3, 48, 48)
    teacher = detector.retention.ask_teacher(detector, images, samples)
    encoded = retain._encode(detector, detector.extract_feat(images), samples, teacher.caption)
    alone = retain._decode(detector, encoded)
    student = retain._decode(detector, encoded, teacher.outputs)
    assert not torch.equal(alone.positions, teacher.outputs.positions)
    assert torch.equal(student.positions, teacher.outputs.positions)
    assert torch.equal(student.references, teacher.outputs.references)
    picked = alone.logits[-1].isfinite() & student.logits[-1].isfinite()
    assert not torch.allclose(alone.logits[-1][picked], student.logits[-1][picked])


def test_asking_the_teacher_walks_over_no_modules_and_waits_once_for_the_ranks(
    text_dir: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = build(text_dir, base_checkpoint=base, retain=RETAIN)
    step(detector)
    calls: list[str] = []

    def counted(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for walk in ('named_modules', 'modules', 'named_parameters', 'parameters', 'train'):
        counted(nn.Module, walk)
    with base_only(detector), evaluating(detector):
        assert not any(module.training for module in detector.children())
    assert calls == []
    counted(retain, 'reduce_mean')
    step(detector)
    assert calls.count('reduce_mean') == 1


def test_every_module_is_in_its_own_mode_again(text_dir: str, base: str) -> None:
    detector = build(text_dir, base_checkpoint=base).train()
    before = [module.training for module in detector.modules()]
    assert len(set(before)) == 2
    with pytest.raises(KeyboardInterrupt), evaluating(detector):
        assert not any(module.training for module in detector.modules())
        raise KeyboardInterrupt
    assert [module.training for module in detector.modules()] == before


def test_an_error_inside_is_not_taken_for_an_unknown_key(
    text_dir: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise TypeError('broken vocabulary')

    monkeypatch.setattr(CaptionTokenizer, 'lengths', broken)
    with pytest.raises(TypeError, match='broken vocabulary'):
        build(text_dir, base_checkpoint=base, retain=RETAIN)


def test_the_bases_casts_are_forgotten_with_the_base(text_dir: str, base: str) -> None:
    detector = build(text_dir, base_checkpoint=base)
    branch, x = detector.bbox_head.reg_branches[0], torch.randn(3, 256)
    with torch.no_grad():
        branch[0].weight.mul_(1.25)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        with torch.no_grad(), base_only(detector):
            of_base = branch(x)
        assert not torch.equal(branch(x), of_base)

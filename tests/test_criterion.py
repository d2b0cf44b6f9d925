"""The criterion against the objective written out slowly in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmdet_gdino_lora.objective import cpu, focal
from mmdet_gdino_lora.objective.criterion import GroundingDINOCriterion, build_criterion
from tests.objective import (
    Reference,
    assert_same,
    assert_same_gradients,
    draw,
    leaves,
    to_double,
)

SETTINGS = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


def criterion(**options) -> GroundingDINOCriterion:
    options.setdefault('num_decoder_layers', 3)
    return GroundingDINOCriterion(num_classes=4, **options)


def compare(outputs, targets, ours, reference, rtol=1e-4) -> None:
    """Components and the gradients of their weighted sum."""
    losses = ours(outputs, targets)
    doubled = to_double(outputs)
    expected = reference(doubled, targets)
    assert_same(losses, expected)
    weight = ours.weight_dict
    sum(weight[name] * value for name, value in losses.items()).backward()
    sum(weight[name] * value for name, value in expected.items()).backward()
    assert_same_gradients(
        [leaf.grad for leaf in leaves(outputs)],
        [leaf.grad for leaf in leaves(doubled)],
        rtol,
    )


@SETTINGS
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    num_queries=st.integers(1, 70),
    num_tokens=st.integers(1, 40),
    padding=st.sampled_from((0, 5)),
    degenerate=st.booleans(),
    dn_groups=st.sampled_from((0, 2)),
    enc_target=st.sampled_from(('objectness', 'tokens')),
    background_weight=st.sampled_from((1.0, 0.3, 0.0)),
)
def test_components_and_gradients_equal_the_reference(
    seed,
    sizes,
    num_queries,
    num_tokens,
    padding,
    degenerate,
    dn_groups,
    enc_target,
    background_weight,
):
    outputs, targets = draw(
        seed,
        sizes,
        num_queries,
        num_tokens,
        num_layers=2,
        columns=num_tokens + padding,
        degenerate=degenerate,
        dn_groups=dn_groups,
    )
    options = dict(enc_target=enc_target, background_weight=background_weight)
    compare(outputs, targets, criterion(num_decoder_layers=2, **options), Reference(**options))


def test_21_components_and_their_weights():
    outputs, targets = draw(0, num_layers=6)
    ours = build_criterion(num_classes=4)
    losses = ours(outputs, targets)
    suffixes = ['', '_0', '_1', '_2', '_3', '_4', '_enc']
    assert set(losses) == {f'loss_{n}{s}' for s in suffixes for n in ('ce', 'bbox', 'giou')}
    for name in losses:
        assert ours.weight_dict[name] == (5 if 'bbox' in name else 2)
        assert losses[name].shape == ()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    outputs, targets = draw(1, (4, 9), 30, 20, dtype=dtype, dn_groups=2)
    ours = criterion()
    losses = ours(outputs, targets)
    doubled = to_double(outputs)
    expected = Reference()(doubled, targets)
    assert_same(losses, expected)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for half, double in zip(leaves(outputs), leaves(doubled)):
        assert half.grad.dtype == dtype
        torch.testing.assert_close(
            half.grad.double(), double.grad, rtol=2**-8, atol=float(torch.finfo(dtype).tiny)
        )


def test_autocast_changes_nothing():
    outputs, targets = draw(2, (4, 9), 30, 20)
    ours = criterion()
    plain = ours(outputs, targets)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        cast = ours(outputs, targets)
    for name, value in plain.items():
        assert torch.equal(cast[name], value)


def test_gradients_of_single_components_from_one_graph():
    outputs, targets = draw(3, (4, 2), 10, 8, dn_groups=1)
    losses = criterion()(outputs, targets)
    doubled = to_double(outputs)
    expected = Reference()(doubled, targets)
    for name, value in losses.items():
        mine = torch.autograd.grad(value, leaves(outputs), retain_graph=True, allow_unused=True)
        other = torch.autograd.grad(
            expected[name], leaves(doubled), retain_graph=True, allow_unused=True
        )
        for ours, theirs in zip(mine, other):
            zero = torch.zeros(())
            torch.testing.assert_close(
                zero.double() if ours is None else ours.double().sum(),
                zero.double() if theirs is None else theirs.sum(),
                rtol=1e-4,
                atol=1e-6,
            )


@pytest.mark.parametrize('gamma', [0.0, 1.0, 2.5])
def test_other_focal_constants(gamma):
    outputs, targets = draw(4, (4, 2), 10, 8)
    compare(
        outputs,
        targets,
        criterion(focal_alpha=0.6, focal_gamma=gamma),
        Reference(alpha=0.6, gamma=gamma),
    )


def test_confident_and_hopeless_logits():
    outputs, targets = draw(5, (4, 2), 20, 8)
    with torch.no_grad():
        outputs['pred_logits'].mul_(8)
        outputs['aux_outputs'][0]['pred_logits'].mul_(30)
    compare(outputs, targets, criterion(), Reference())


def without(targets: list[dict], image: int, rows: list[int]) -> list[dict]:
    keep = [row for row in range(len(targets[image]['labels'])) if row not in rows]
    shorter = {key: value[keep] for key, value in targets[image].items()}
    return [shorter if i == image else target for i, target in enumerate(targets)]


def test_padded_target_rows_are_ignored():
    outputs, targets = draw(6, (5, 3), 12, 8)
    expected = criterion()(outputs, without(targets, 0, [1, 4]))
    targets[0]['labels'][[1, 4]] = -1
    targets[0]['boxes'][1] = torch.nan
    assert_same(criterion()(outputs, targets), expected, rtol=0, atol=0)


def test_padded_target_rows_are_ignored_in_denoising():
    outputs, targets = draw(7, (5, 3), 12, 8, dn_groups=2)
    targets[0]['labels'][[1, 4]] = -1
    compare(outputs, targets, criterion(), Reference())


@pytest.mark.parametrize('enc_target', ['objectness', 'tokens'])
def test_infinite_and_invalid_logits_contribute_nothing(enc_target):
    outputs, targets = draw(8, (5, 3), 12, 8, one_caption=True)
    ours = criterion(enc_target=enc_target)
    mask = outputs['text_token_mask']
    mask[0, 3] = False  # a hole
    layers = [outputs, *outputs['aux_outputs'], outputs['enc_outputs']]
    for layer in layers:
        with torch.no_grad():
            layer['pred_logits'][0, :, 3] = torch.nan
    whole = ours(outputs, targets)
    for layer in layers:
        with torch.no_grad():
            layer['pred_logits'][0, :, 3] = 7.0
    assert_same(ours(outputs, targets), whole, rtol=0, atol=0)

    mask[0, 3] = True
    for layer in layers:
        with torch.no_grad():
            layer['pred_logits'][0, :, 3] = -torch.inf
    losses = ours(outputs, targets)
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    for layer in layers:
        assert layer['pred_logits'].grad.isfinite().all()
        assert not layer['pred_logits'].grad[0, :, 3].any()


def test_no_boxes_at_all():
    outputs, targets = draw(9, (0, 0), 6, 8, dn_groups=1)
    losses = criterion()(outputs, targets)
    assert all(value == 0 for name, value in losses.items() if 'ce' not in name)
    sum(losses.values()).backward()
    for layer in (outputs, *outputs['aux_outputs'], outputs['enc_outputs']):
        assert layer['pred_boxes'].grad is not None
        assert not layer['pred_boxes'].grad.any()
        gradient = layer['pred_logits'].grad
        assert (gradient >= 0).all() and gradient.any()


def test_empty_target_tensors_of_any_width():
    outputs, targets = draw(10, (3, 0), 6, 8)
    expected = criterion()(outputs, targets)
    targets[1]['token_labels'] = torch.zeros(0)
    targets[1]['boxes'] = torch.zeros(0)
    assert_same(criterion()(outputs, targets), expected, rtol=0, atol=0)


def test_background_weight_zero_trains_matched_queries_only():
    outputs, targets = draw(11, (3, 2), 12, 8)
    criterion(background_weight=0)(outputs, targets)['loss_ce'].backward()
    trained = outputs['pred_logits'].grad.any(-1).sum(-1)
    assert trained.tolist() == [3, 2]


def test_objectness_trains_the_largest_valid_token_of_each_proposal():
    outputs, targets = draw(12, (3, 2), 12, 8, columns=11)
    criterion()(outputs, targets)['loss_ce_enc'].backward()
    logits = outputs['enc_outputs']['pred_logits']
    assert (logits.grad != 0).sum(-1).eq(1).all()
    assert torch.equal((logits.grad != 0).int().argmax(-1), logits.argmax(-1))


def place(outputs: dict, where: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Logits and boxes of one layer, and what an error has to call it."""
    if where == 'last':
        return outputs['pred_logits'], outputs['pred_boxes'], 'decoder layer 2'
    if where == 'aux':
        layer = outputs['aux_outputs'][1]
        return layer['pred_logits'], layer['pred_boxes'], 'decoder layer 1'
    if where == 'enc':
        layer = outputs['enc_outputs']
        return layer['pred_logits'], layer['pred_boxes'], 'the encoder'
    layer = outputs['dn_outputs']
    return layer['pred_logits'][0], layer['pred_boxes'][0], 'denoising queries of decoder layer 0'


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
@pytest.mark.parametrize('what', ['pred_logits', 'pred_boxes'])
@pytest.mark.parametrize('where', ['last', 'aux', 'enc', 'dn'])
def test_nan_and_infinity_are_an_error_naming_layer_and_image(where, what, value):
    outputs, targets = draw(13, (3, 0), 12, 8, dn_groups=1)
    logits, boxes, name = place(outputs, where)
    with torch.no_grad():
        (logits if what == 'pred_logits' else boxes)[1, 4, 2] = value
    outputs['text_token_mask'][:] = True
    with pytest.raises(ValueError, match=f'{what} of .*{name}.* image 1'):
        criterion()(outputs, targets)


def test_nan_targets_are_an_error_naming_the_image():
    outputs, targets = draw(14, (3, 2), 12, 8)
    targets[1]['boxes'][0, 0] = torch.nan
    with pytest.raises(ValueError, match='image 1'):
        criterion()(outputs, targets)


def test_targets_that_do_not_fit_together_are_an_error():
    outputs, targets = draw(15, (3, 2), 12, 8)
    targets[1]['labels'] = targets[1]['labels'][:1]
    with pytest.raises(ValueError, match='image 1: 1 labels, 2 boxes'):
        criterion()(outputs, targets)
    with pytest.raises(ValueError, match='2 images.*targets 1'):
        criterion()(outputs, targets[:1])


def test_missing_outputs_are_told_once():
    outputs, targets = draw(16, num_layers=3)
    ours = criterion()
    del outputs['aux_outputs'], outputs['enc_outputs']
    with pytest.warns(UserWarning, match='loss_ce_0, .*loss_giou_1, loss_ce_enc') as caught:
        losses = ours(outputs, targets)
        ours(outputs, targets)
    assert len(caught) == 1
    assert 'aux_outputs' in str(caught[0].message) and 'enc_outputs' in str(caught[0].message)
    assert set(losses) == {'loss_ce', 'loss_bbox', 'loss_giou'}


def test_a_single_decoder_layer(recwarn):
    outputs, targets = draw(17, num_layers=1)
    ours = criterion(num_decoder_layers=1)
    assert set(ours(outputs, targets)) == {
        f'loss_{name}{suffix}' for name in ('ce', 'bbox', 'giou') for suffix in ('', '_enc')
    }
    assert not [w for w in recwarn if 'GroundingDINOCriterion' in str(w.message)]


def test_more_layers_than_built_for_are_an_error():
    outputs, targets = draw(18, num_layers=4)
    with pytest.raises(ValueError, match='4 decoder layers.*num_decoder_layers=3'):
        criterion()(outputs, targets)


def test_encoder_with_more_proposals_than_queries():
    outputs, targets = draw(19, (3, 2), 12, 8, enc_queries=31)
    compare(outputs, targets, criterion(), Reference())


def test_without_grad_nothing_is_kept():
    outputs, targets = draw(20)
    expected = criterion()(outputs, targets)
    with torch.no_grad():
        losses = criterion()(outputs, targets)
    assert_same(losses, expected, rtol=0, atol=0)
    assert not any(value.requires_grad for value in losses.values())


def test_boxes_are_averaged_over_the_ranks(monkeypatch):
    outputs, targets = draw(21, (3, 2), dn_groups=2)
    alone = criterion()(outputs, targets)

    def other_rank_has_15_boxes(counts):
        counts += torch.where(counts == 5 * 2, 15.0 * 4, 15.0)

    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 2)
    monkeypatch.setattr(torch.distributed, 'all_reduce', other_rank_has_15_boxes)
    together = criterion()(outputs, targets)
    for name, value in together.items():
        factor = 10 / 35 if 'dn' in name else 5 / 10
        torch.testing.assert_close(value, alone[name] * factor)


def test_build_log_names_what_was_built(monkeypatch):
    from mmdet_gdino_lora.objective import criterion as module

    lines = []
    monkeypatch.setattr(module, 'print_log', lambda line, logger: lines.append(line))
    build_criterion(num_classes=80)
    (line,) = lines
    for part in (
        'Hungarian matching',
        '80 classes',
        '6 decoder layers',
        '5 decoder layers and of the encoder',
        'TokenFocalCost(weight=1)',
        'BoxL1Cost(weight=5)',
        'BoxGIoUCost(weight=2)',
        'ce 2, bbox 5, giou 2',
    ):
        assert part in line


def test_whole_tensors_and_blocks_agree(monkeypatch):
    outputs, _ = draw(22, (1, 1, 1), 40, 30, columns=37)
    logits, mask = outputs['pred_logits'][None], outputs['text_token_mask']
    mask[1, 5] = False
    results = []
    for in_blocks in (False, True):
        monkeypatch.setattr(cpu, 'runs_here', lambda tensor, answer=in_blocks: answer)
        results.append(focal.background_focal(logits, mask, 0.25, 2.0, with_grad=True))
    for mine, other in zip(*results):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


def test_an_image_without_any_valid_token_still_trains_its_boxes():
    outputs, targets = draw(23, (3, 2), 12, 8)
    outputs['text_token_mask'][1] = False
    losses = criterion()(outputs, targets)
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    for layer in (outputs, outputs['enc_outputs']):
        assert not layer['pred_logits'].grad[1].any()
        assert layer['pred_boxes'].grad[1].any()

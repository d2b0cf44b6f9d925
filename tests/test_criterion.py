"""The criterion against the objective written out slowly in float64."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmdet_gdino_lora.criterion import GroundingDINOCriterion, build_criterion
from tests.objective import (
    Reference,
    assert_same,
    assert_same_gradients,
    draw,
    leaves,
    to_double,
)

SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
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

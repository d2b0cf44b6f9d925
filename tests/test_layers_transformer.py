"""Our encoder and decoder give mmdet's numbers, with and without adapters and checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet.models.layers.transformer.grounding_dino_layers import (
    GroundingDinoTransformerDecoder,
    GroundingDinoTransformerEncoder,
)
from mmengine.config import ConfigDict
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mmdet_gdino_lora.layers.exchange import exchange_layers
from mmdet_gdino_lora.layers.levels import host_shapes, level_tensors
from tests.builders import SMALL_DECODER, SMALL_ENCODER

LEVELS = [torch.zeros(2, 1, *size) for size in ((6, 5), (3, 3), (2, 2), (1, 1))]
TARGETS = r'.*(self_attn\.attn|cross_attn_text\.attn|value_proj|output_proj|ffn\.layers\.(0\.0|1))'


def build(cls: type[nn.Module], cfg: dict) -> nn.Module:
    torch.manual_seed(0)
    module = cls(**ConfigDict(copy.deepcopy(cfg)))
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for child in module.modules():
        if hasattr(child, 'sampling_offsets'):
            nn.init.normal_(child.sampling_offsets.weight, std=0.1)
    return module.eval()


def lean_encoder(num_cp: int = 0) -> nn.Module:
    encoder = exchange_layers(build(GroundingDinoTransformerEncoder, SMALL_ENCODER))
    encoder.num_cp = num_cp
    return encoder


def adapted(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    module.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=TARGETS), module)
    for key, parameter in module.named_parameters():
        if 'lora_' in key:
            nn.init.normal_(parameter, std=0.02)
    return module


def encoder_inputs(padded: bool) -> dict:
    torch.manual_seed(2)
    shapes, starts = level_tensors(LEVELS)
    num_positions = sum(height * width for height, width in host_shapes(shapes))
    padding = torch.zeros(2, num_positions, dtype=torch.bool)
    padding[1, ::5] = True
    segments = torch.tensor([0, 1, 1, 2, 2, 2, 3])
    sees = (segments[:, None] == segments).expand(2, -1, -1)
    return dict(
        query=torch.randn(2, num_positions, 256),
        query_pos=torch.randn(2, num_positions, 256),
        key_padding_mask=padding if padded else None,
        spatial_shapes=shapes,
        level_start_index=starts,
        valid_ratios=torch.rand(2, 4, 2) / 2 + 0.5 if padded else torch.ones(2, 4, 2),
        memory_text=torch.randn(2, 7, 256),
        text_attention_mask=torch.zeros(2, 7, dtype=torch.bool),
        position_ids=torch.tensor([0, 0, 1, 0, 1, 2, 0]).expand(2, -1),
        text_self_attention_masks=sees,
    )


def decoder_inputs() -> dict:
    torch.manual_seed(3)
    shapes, starts = level_tensors(LEVELS)
    num_positions = sum(height * width for height, width in host_shapes(shapes))
    hidden = torch.zeros(12, 12, dtype=torch.bool)
    hidden[4:, :4] = True
    text_padding = torch.zeros(2, 7, dtype=torch.bool)
    text_padding[0, 5:] = True
    return dict(
        query=torch.randn(2, 12, 256),
        value=torch.randn(2, num_positions, 256),
        key_padding_mask=None,
        self_attn_mask=hidden,
        reference_points=torch.rand(2, 12, 4),
        spatial_shapes=shapes,
        level_start_index=starts,
        valid_ratios=torch.ones(2, 4, 2),
        reg_branches=nn.ModuleList([nn.Linear(256, 4) for _ in range(3)]),
        memory_text=torch.randn(2, 7, 256),
        text_attention_mask=text_padding,
    )


def run(module: nn.Module, inputs: dict) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs, and the gradients of everything that trains."""
    outputs = module(**inputs)
    torch.manual_seed(4)
    sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
    gradients = {k: p.grad for k, p in module.named_parameters() if p.requires_grad}
    return [out.detach() for out in outputs], gradients


def assert_same(expected: tuple, actual: tuple, twice: tuple[str, ...] = ()) -> None:
    for theirs, own in zip(expected[0], actual[0]):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    assert expected[1].keys() == actual[1].keys()
    for key, theirs in expected[1].items():
        if theirs is None:
            assert actual[1][key] is None or not actual[1][key].any(), key
            continue
        # PEFT adds an output projection's delta twice and differentiates one of the two.
        factor = 2 if 'attn.base_layer.out_proj.lora' in key else 1
        scale = theirs.abs().max().item() + 1e-3
        torch.testing.assert_close(actual[1][key], factor * theirs, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize('with_adapters', [False, True])
@pytest.mark.parametrize('padded', [False, True])
def test_encoder_equals_mmdet(padded, with_adapters):
    stock = build(GroundingDinoTransformerEncoder, SMALL_ENCODER)
    ours = lean_encoder()
    assert list(stock.state_dict()) == list(ours.state_dict())
    if with_adapters:
        stock, ours = adapted(stock), exchange_layers(adapted(ours))
    inputs = encoder_inputs(padded)
    assert_same(run(stock, inputs), run(ours, inputs))


@pytest.mark.parametrize('with_adapters', [False, True])
def test_decoder_equals_mmdet(with_adapters):
    stock = build(GroundingDinoTransformerDecoder, SMALL_DECODER)
    ours = exchange_layers(build(GroundingDinoTransformerDecoder, SMALL_DECODER))
    assert list(stock.state_dict()) == list(ours.state_dict())
    if with_adapters:
        stock, ours = adapted(stock), exchange_layers(adapted(ours))
    # mmdet moves the boxes once more after the last layer, for nobody
    stock.register_forward_hook(lambda module, given, out: (out[0], out[1][:-1]))
    inputs = decoder_inputs()
    assert_same(run(stock, inputs), run(ours, inputs))


@pytest.mark.parametrize('with_adapters', [False, True])
def test_checkpointing_changes_no_output_and_no_gradient(with_adapters):
    results = []
    for num_cp in (0, 2):
        encoder = lean_encoder(num_cp)
        if with_adapters:
            encoder = adapted(encoder)
        results.append(run(encoder, encoder_inputs(True)))
    for plain, checkpointed in zip(results[0][0], results[1][0]):
        assert torch.equal(plain, checkpointed)
    assert results[0][1].keys() == results[1][1].keys()
    for key, gradient in results[0][1].items():
        assert gradient is not None, key
        torch.testing.assert_close(results[1][1][key], gradient, rtol=1e-6, atol=1e-6)


def kept(module: nn.Module, inputs: dict) -> dict[int, torch.Tensor]:
    """What a forward pass keeps beside the parameters, by where it lies."""
    kept = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(**inputs)
    return kept


@pytest.mark.parametrize('with_adapters', [False, True])
def test_checkpointed_layers_keep_little_of_the_image(with_adapters):
    inputs, counts = encoder_inputs(True), []
    positions = inputs['query'].shape[1]
    for num_cp in (0, 1, 2):
        encoder = lean_encoder(num_cp)
        if with_adapters:
            # Of the first layers' inputs none needs a gradient then.
            encoder = adapted(encoder)
        counts.append(sum(positions in tensor.shape for tensor in kept(encoder, inputs).values()))
    assert counts[0] > 1.2 * counts[1] > 1.8 * counts[2], counts


def test_the_decoders_layers_keep_one_mask_under_autocast():
    decoder = exchange_layers(build(GroundingDinoTransformerDecoder, SMALL_DECODER))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        tensors = kept(decoder, decoder_inputs()).values()
    masks = [tensor for tensor in tensors if tensor.shape[-2:] == (12, 12)]
    assert [mask.dtype for mask in masks] == [torch.bfloat16]


def test_frozen_encoder_is_not_checkpointed(monkeypatch):
    encoder = lean_encoder(num_cp=2).requires_grad_(False)
    monkeypatch.setattr(
        'mmdet_gdino_lora.layers.checkpointing.checkpoint', lambda *a, **k: pytest.fail('computed')
    )
    assert not encoder(**encoder_inputs(False))[0].requires_grad


def test_each_image_keeps_its_own_text_mask():
    encoder = lean_encoder()
    inputs = encoder_inputs(False)
    sees = inputs['text_self_attention_masks'].clone()
    sees[1] = torch.eye(7, dtype=torch.bool)
    inputs['text_self_attention_masks'] = sees
    together = encoder(**inputs)
    for index in range(2):
        alone = {
            key: value[index : index + 1]
            if torch.is_tensor(value) and len(value) == 2 and 'spatial' not in key
            else value
            for key, value in inputs.items()
        }
        for batched, single in zip(together, encoder(**alone)):
            torch.testing.assert_close(batched[index], single[0], rtol=1e-5, atol=1e-5)


def test_wrong_level_sizes_are_refused():
    encoder = lean_encoder()
    inputs = encoder_inputs(False)
    inputs['spatial_shapes'] = torch.tensor([[6, 5], [3, 3], [2, 2], [1, 2]])
    with pytest.raises((ValueError, RuntimeError)):
        encoder(**inputs)

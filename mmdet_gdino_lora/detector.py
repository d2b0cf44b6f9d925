"""The detector: mmdet's Grounding DINO with LoRA adapters on a frozen base.

What is particular to this project is called from here and lives elsewhere: text in ``text/``,
adapters and their files in ``lora/``, the objective in ``criterion.py`` behind ``head.py``, lean
versions of mmdet's layers in ``layers/``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import torch
from mmdet.models.detectors import GroundingDINO
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmengine.model import BaseModule
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmdet_gdino_lora.engine.runner_config import (
    annotations_follow_resize,
    checkpoint_at_start,
    runner_config,
)
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.layers import precision
from mmdet_gdino_lora.layers.exchange import exchange_layers
from mmdet_gdino_lora.layers.levels import level_tensors, padding_masks
from mmdet_gdino_lora.layers.proposals import Proposals, select_proposals
from mmdet_gdino_lora.lora import (
    ADAPTER,
    GradientCheck,
    export_adapter,
    inject,
    install_hooks,
    load_adapter,
    load_base,
    lora_state,
    set_adapter,
    set_frozen_eval,
    write_card,
)
from mmdet_gdino_lora.retain import Retention
from mmdet_gdino_lora.samples import TokenTargets, caption_of, is_free_text, with_resized_boxes
from mmdet_gdino_lora.text import TokenizedCaption

NO_DENOISING = dict(group_cfg=dict(dynamic=False, num_groups=1))


@MODELS.register_module()
class LoRAGroundingDINO(GroundingDINO):
    """mmdet's ``GroundingDINO`` with PEFT adapters injected and everything else frozen.

    Every argument of ``GroundingDINO`` keeps its meaning. ``BertModel`` as language model and
    ``GroundingDINOHead`` as head are exchanged for this project's own (same parameters, same
    names), so that an existing mmdet config needs no more than this detector's name.

    Args:
        language_model: Config of the text encoder.
        lora: Fields of ``peft.LoraConfig`` and ``preset``, a name or a list of names of module
            groups, or ``target_modules``. None trains every parameter (pretraining, full
            fine-tuning).
        base_checkpoint: The weights that adapters are put on: a checkpoint of mmdet's, a URL or a
            local path. None: mmengine's ``load_from`` brings them, or they stay random.
        train_box_head: Whether the box regression branches are trained beside the adapters.
        trainable: Patterns (``re.search`` on parameter names) of further parameters to train.
        check_adapters: Whether training stops when a trainable parameter gets no gradient.
        full_checkpoint: Whether checkpoints hold the frozen base as well.
        base_dtype: ``'bfloat16'`` keeps the frozen weights in half the bytes (adapters stay
            float32) and runs the model in mixed precision, ``--amp`` or not.
        retain: ``names`` of classes that must survive, ``weight`` and ``every``, as for
            :class:`~.retain.Retention`: the base teaches the adapted model what it knew.
        bbox_head: Config of the head.
        dn_cfg: Config of the denoising queries; None switches denoising off.
        **kwargs: As for ``GroundingDINO``.

    Raises:
        ConfigError: For an unknown preset, a target that matches no module, a base that can't be
            read or belongs to another architecture, a text model that isn't there.
    """

    def __init__(
        self,
        language_model: dict,
        *,
        bbox_head: dict,
        lora: Optional[dict] = None,
        base_checkpoint: Optional[str] = None,
        train_box_head: bool = True,
        trainable: Sequence[str] = (),
        check_adapters: bool = True,
        full_checkpoint: bool = False,
        base_dtype: str = 'float32',
        retain: Optional[dict] = None,
        dn_cfg: Optional[dict] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            _replaced(language_model, 'BertModel', 'GroundingTextEncoder'),
            bbox_head=_replaced(bbox_head, 'GroundingDINOHead', 'GroundingDINOCriterionHead'),
            # mmdet builds a generator in any case, and writes into this dict.
            dn_cfg=dict(dn_cfg or NO_DENOISING),
            **kwargs,
        )
        if not dn_cfg:
            self.dn_query_generator = None
        self.base_checkpoint = base_checkpoint
        if base_checkpoint:
            load_base(self, base_checkpoint)
        if lora is not None:
            inject(self, lora, train_box_head=train_box_head, trainable=trainable)
        install_hooks(self, full_checkpoint=full_checkpoint)
        exchange_layers(self)
        self._base_dtype = precision.base_dtype(base_dtype)
        if self._base_dtype:
            if not base_checkpoint:
                raise ConfigError(
                    f'model.base_dtype={base_dtype!r} needs the base before the weights are cast: '
                    'set model.base_checkpoint (instead of load_from).'
                )
            precision.cast_frozen(self, self._base_dtype)
        self.retention = None
        if retain:
            if lora is None:
                raise ConfigError(
                    'model.retain holds adapters to their base, and this model has none; set '
                    'model.lora as well.'
                )
            self.retention = Retention.from_config(self.language_model.caption_tokenizer, retain)
        self._check_adapters = check_adapters and lora is not None
        self._gradient_check: Optional[GradientCheck] = None
        self._boxes_in_last_step = 0
        self._targets = TokenTargets(self.bbox_head.num_classes if dn_cfg else None)
        self._boxes_follow_resize: Optional[bool] = None

    def _init_layers(self) -> None:
        # mmdet would wrap the checkpointed layers with fairscale; the lean encoder needs none.
        num_cp = self.encoder.get('num_cp', 0)
        self.encoder = {**self.encoder, 'num_cp': 0}
        super()._init_layers()
        self.encoder.num_cp = num_cp

    # ---------------------------------------------------------------------------- weights and modes

    def export_adapter(
        self,
        folder: str,
        classes: Sequence[str] = (),
        metrics: Optional[Mapping[str, float]] = None,
        weights: Optional[Mapping[str, Tensor]] = None,
    ) -> bool:
        """Writes the adapter in PEFT's format.

        Args:
            folder: Created if missing.
            classes: Class names, for the model card.
            metrics: For the model card.
            weights: A state dict of this detector to write instead of what it holds now.

        Returns:
            Whether there is an adapter.
        """
        if lora_state(self).config is None:
            return False
        export_adapter(self, folder, classes=classes, metrics=metrics, weights=weights)
        return True

    def describe_adapter(
        self,
        folder: str,
        classes: Sequence[str] = (),
        metrics: Optional[Mapping[str, float]] = None,
    ) -> None:
        """Writes the model card of a folder of :meth:`export_adapter` again, and no weights.

        Args:
            folder: Of the adapter.
            classes: Class names.
            metrics: Of the weights in the folder.
        """
        write_card(self, folder, classes=classes, metrics=metrics)

    def load_adapter(self, source: str, name: str) -> None:
        """Puts another adapter beside the detector's own, switched off.

        Args:
            source: A folder in PEFT's format or a training checkpoint, of the same base.
            name: To call it by in :meth:`set_adapter`.

        Raises:
            ConfigError: As :func:`~.lora.adapters.load_adapter`.
        """
        load_adapter(self, source, name)
        exchange_layers(self)

    def set_adapter(self, adapter: Union[str, Mapping[str, float], None] = ADAPTER) -> None:
        """Switches to an adapter, to a combination, or to the base; nothing is read again.

        Args:
            adapter: A name (``'default'`` is the detector's own); or weights by name: changes to
                the base are added up with these weights; or None: the base alone.

        Raises:
            ConfigError: For a name that isn't loaded.
        """
        set_adapter(self, adapter)

    def init_weights(self) -> None:
        """Random and pretrained initialisation, where no base has brought the weights.

        mmdet's own would run Xavier over the adapters as well, after which an injected model no
        longer starts equal to its base, and would fetch backbone and text weights that the base,
        or the checkpoint of a resumed run, overwrites.
        """
        if self.base_checkpoint:
            return
        if checkpoint_at_start():
            for module in self.modules():
                if isinstance(module, BaseModule) and _is_pretrained(module.init_cfg):
                    module.init_cfg = None
            self.language_model.is_init = True
        adapters = {
            name: value.detach().clone()
            for name, value in self.state_dict().items()
            if 'lora_' in name
        }
        super().init_weights()
        with torch.no_grad():
            for name, value in self.state_dict(keep_vars=True).items():
                if name in adapters:
                    value.copy_(adapters[name])

    def train(self, mode: bool = True) -> LoRAGroundingDINO:
        """Sets training mode, in which frozen modules stay in eval mode.

        Args:
            mode: True for training.

        Returns:
            The detector.
        """
        super().train(mode)
        set_frozen_eval(self)
        return self

    # ------------------------------------------------------------------------------------- captions

    def captions(self, batch_data_samples: SampleList) -> list[TokenizedCaption]:
        """Tokenised captions of a batch: the loader's, or made here from the class names.

        Args:
            batch_data_samples: As for :func:`~.samples.caption_of`.

        Returns:
            One per image.
        """
        tokenizer = self.language_model.caption_tokenizer
        return [caption_of(sample, tokenizer) for sample in batch_data_samples]

    def encode_text(self, captions: Sequence[TokenizedCaption]) -> dict[str, Tensor]:
        """Text features in the transformer's width.

        Args:
            captions: One per image.

        Returns:
            ``embedded`` [B, T, C], ``text_token_mask`` [B, T], ``position_ids`` [B, T], ``masks``
            [B, T, T]: True where one token attends to another.
        """
        text_dict = self.language_model.encode(captions)
        text_dict['embedded'] = self.text_feat_map(text_dict['embedded'])
        return text_dict

    # ---------------------------------------------------------------------------------- transformer

    def pre_transformer(
        self, mlvl_feats: Sequence[Tensor], batch_data_samples: Optional[SampleList] = None
    ) -> tuple[dict, dict]:
        """As mmdet's, without waiting for the device to learn the levels' sizes.

        Args:
            mlvl_feats: Feature maps [B, C, H, W], one per level.
            batch_data_samples: With ``img_shape`` and ``batch_input_shape``.

        Returns:
            Inputs of the encoder and inputs of the decoder.
        """
        first = batch_data_samples[0]
        shapes = [sample.img_shape for sample in batch_data_samples]
        masks = padding_masks(mlvl_feats, shapes, first.batch_input_shape)
        if masks is None:
            positions = [self.positional_encoding(None, input=feat) for feat in mlvl_feats]
            valid_ratios = mlvl_feats[0].new_ones(len(shapes), len(mlvl_feats), 2)
            mask = None
        else:
            positions = [self.positional_encoding(level) for level in masks]
            valid_ratios = torch.stack([self.get_valid_ratio(level) for level in masks], 1)
            mask = torch.cat([level.flatten(1) for level in masks], 1)
        positions = [
            position.flatten(2).transpose(1, 2) + embedding
            for position, embedding in zip(positions, self.level_embed)
        ]
        spatial_shapes, level_start_index = level_tensors(mlvl_feats)
        levels = dict(
            spatial_shapes=spatial_shapes,
            level_start_index=level_start_index,
            valid_ratios=valid_ratios,
        )
        encoder_inputs = dict(
            feat=torch.cat([feat.flatten(2).transpose(1, 2) for feat in mlvl_feats], 1),
            feat_mask=mask,
            feat_pos=torch.cat(positions, 1),
            **levels,
        )
        return encoder_inputs, dict(memory_mask=mask, **levels)

    def select_proposals(
        self,
        memory: Tensor,
        memory_mask: Optional[Tensor],
        spatial_shapes: Tensor,
        memory_text: Tensor,
        text_token_mask: Tensor,
        positions: Optional[Tensor] = None,
    ) -> Proposals:
        """The encoder's proposals that become the decoder's queries.

        Args:
            memory: Image features after the encoder [B, N, C].
            memory_mask: True at padding [B, N], or None.
            spatial_shapes: Height and width of every level [levels, 2].
            memory_text: Text features after the encoder [B, T, C].
            text_token_mask: True at real tokens [B, T].
            positions: Which ones [B, Q]; None: the best.

        Returns:
            ``num_queries`` of them.
        """
        last = self.decoder.num_layers
        return select_proposals(
            memory,
            memory_mask,
            spatial_shapes,
            memory_text,
            text_token_mask,
            transform=lambda x: self.memory_trans_norm(self.memory_trans_fc(x)),
            classify=self.bbox_head.cls_branches[last],
            regress=self.bbox_head.reg_branches[last],
            num_queries=self.num_queries,
            positions=positions,
        )

    def pre_decoder(
        self, batch_data_samples: Optional[SampleList] = None, **encoder_outputs: Any
    ) -> tuple[dict, dict]:
        """Selects the decoder's queries among the encoder's proposals.

        As mmdet's, but the encoder's outputs are returned in eval mode too (validation losses need
        them) and denoising may be off.

        Args:
            batch_data_samples: Ground truth, for the denoising queries.
            **encoder_outputs: As for :meth:`select_proposals`.

        Returns:
            Inputs of the decoder and inputs of the head.
        """
        proposals = self.select_proposals(**encoder_outputs)
        memory, memory_text = encoder_outputs['memory'], encoder_outputs['memory_text']
        text_token_mask = encoder_outputs['text_token_mask']
        query = self.query_embedding.weight[None].expand(len(memory), -1, -1)
        reference_points = proposals.boxes.detach()
        dn_mask, dn_meta = None, None
        if self.training and self.dn_query_generator is not None:
            dn_query, dn_boxes, dn_mask, dn_meta = self.dn_query_generator(batch_data_samples)
            query = torch.cat([dn_query, query], dim=1)
            reference_points = torch.cat([dn_boxes, reference_points], dim=1)
        decoder_inputs = dict(
            query=query,
            memory=memory,
            reference_points=reference_points.sigmoid(),
            dn_mask=dn_mask,
            memory_text=memory_text,
            text_attention_mask=~text_token_mask,
        )
        head_inputs = dict(
            enc_outputs_class=proposals.logits,
            enc_outputs_coord=proposals.boxes.sigmoid(),
            dn_meta=dn_meta,
            memory_text=memory_text,
            text_token_mask=text_token_mask,
        )
        return decoder_inputs, head_inputs

    def forward_decoder(self, query: Tensor, **kwargs: Any) -> dict:
        """As mmdet's, also without denoising queries.

        Args:
            query: Content queries [B, Q, C].
            **kwargs: As for mmdet's ``DINO.forward_decoder``; ``memory`` is the decoder's value.

        Returns:
            ``hidden_states`` [L, B, Q, C] and ``references``, L + 1 times [B, Q, 4].
        """
        hidden_states, references = self.decoder(
            query=query,
            value=kwargs.pop('memory'),
            key_padding_mask=kwargs.pop('memory_mask'),
            self_attn_mask=kwargs.pop('dn_mask'),
            reg_branches=self.bbox_head.reg_branches,
            **kwargs,
        )
        return dict(hidden_states=hidden_states, references=list(references))

    # ---------------------------------------------------------------------- training and prediction

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        """mmdet's entry, in the precision that the frozen weights need.

        Args:
            inputs: Normalised images [B, 3, H, W].
            *args: Data samples, mode.
            **kwargs: The same by name.

        Returns:
            As mmdet's, by mode.
        """
        with precision.autocast(inputs.device, self._base_dtype):
            return super().forward(inputs, *args, **kwargs)

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """Weighted loss components of a batch.

        Args:
            batch_inputs: Normalised images [B, 3, H, W].
            batch_data_samples: Captions (see :meth:`captions`) and ``gt_instances``.

        Returns:
            The head's components under the criterion's names.
        """
        self._watch_gradients(batch_data_samples)
        teacher = None
        if self.retention is not None and self.training and self.retention.is_due():
            # Before any graph exists: to be the base, freed parameters change in place.
            teacher = self.retention.ask_teacher(self, batch_inputs, batch_data_samples)
        captions = self.captions(batch_data_samples)
        text_dict = self.encode_text(captions)
        self._targets.attach(batch_data_samples, captions, text_dict['text_token_mask'])
        features = None if teacher is None else teacher.features
        if features is None:
            features = self.extract_feat(batch_inputs)
        head_inputs = self.forward_transformer(features, text_dict, batch_data_samples)
        losses = self.bbox_head.loss(**head_inputs, batch_data_samples=batch_data_samples)
        if teacher is not None:
            losses.update(self.retention.loss(self, features, batch_data_samples, teacher))
        return losses

    def _watch_gradients(self, batch_data_samples: SampleList) -> None:
        # Runners of several GPUs never call this detector's train_step, so that a step is known to
        # be over when the next one begins.
        if not (self._check_adapters and self.training and torch.is_grad_enabled()):
            return
        if self._gradient_check is None:
            self._gradient_check = GradientCheck(self)
        else:
            self._gradient_check.after_step(self._boxes_in_last_step)
        self._boxes_in_last_step = sum(len(s.gt_instances.labels) for s in batch_data_samples)

    def predict(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True
    ) -> SampleList:
        """Detections of a batch.

        Args:
            batch_inputs: Normalised images [B, 3, H, W].
            batch_data_samples: With ``text``: class names, or a caption. Free text and
                ``test_cfg.chunked_size`` are handled by mmdet's own code.
            rescale: Whether boxes are returned in the original image's pixels.

        Returns:
            The samples with ``pred_instances``: ``bboxes`` (absolute xyxy), ``scores`` in 0..1,
            ``labels`` and ``label_names``.
        """
        if self.test_cfg.get('chunked_size', -1) > 0 or any(map(is_free_text, batch_data_samples)):
            return super().predict(batch_inputs, batch_data_samples, rescale)
        captions = self.captions(batch_data_samples)
        self._predict_captions(batch_inputs, batch_data_samples, captions, rescale)
        return batch_data_samples

    def _predict_captions(
        self,
        batch_inputs: Tensor,
        batch_data_samples: SampleList,
        captions: Sequence[TokenizedCaption],
        rescale: bool = True,
    ) -> dict[str, Any]:
        """Adds ``pred_instances`` to the samples and returns the head's inputs."""
        features = self.extract_feat(batch_inputs)
        head_inputs = self.forward_transformer(
            features, self.encode_text(captions), batch_data_samples
        )
        for sample, caption in zip(batch_data_samples, captions):
            if not isinstance(caption.token_spans, tuple):
                raise ConfigError(
                    'TokenSpans.num_negatives is set in the test pipeline, so that captions lack '
                    'classes, which then could not be detected; remove it there, and for classes '
                    'that take more than one caption set model.test_cfg.chunked_size.'
                )
            sample.token_positive_map = {
                label + 1: list(tokens) for label, tokens in enumerate(caption.token_spans)
            }
        results = self.bbox_head.predict(
            **head_inputs, batch_data_samples=batch_data_samples, rescale=rescale
        )
        for sample, instances, caption in zip(batch_data_samples, results, captions):
            names = caption.names
            instances.label_names = [names[label] for label in instances.labels.tolist()]
            sample.pred_instances = instances
        return head_inputs

    def val_step(self, data: Union[dict, tuple, list]) -> list:
        """Detections of a batch and, behind them, its losses for mmengine's ``ValLoop`` to log.

        Args:
            data: A batch of the loader.

        Returns:
            The samples with predictions; where ground truth is at hand, one more element with
            ``loss``, the components of :meth:`loss` without the denoising queries.
        """
        data = self.data_preprocessor(data, False)
        with precision.autocast(data['inputs'].device, self._base_dtype):
            return self._validate(data['inputs'], data['data_samples'])

    def _validate(self, inputs: Tensor, samples: SampleList) -> list:
        if any(map(is_free_text, samples)) or self.test_cfg.get('chunked_size', -1) > 0:
            return self.predict(inputs, samples)
        captions = self.captions(samples)
        head_inputs = self._predict_captions(inputs, samples, captions)
        if not all('gt_instances' in sample for sample in samples):
            return samples
        if self._boxes_follow_resize is None:
            self._boxes_follow_resize = annotations_follow_resize(runner_config())
        truth = with_resized_boxes(samples) if self._boxes_follow_resize else samples
        self._targets.attach(truth, captions, head_inputs['text_token_mask'])
        losses = self.bbox_head.loss(**head_inputs, batch_data_samples=truth)
        return [*samples, BaseDataElement(loss=losses)]


def _replaced(cfg: dict, old: str, new: str) -> dict:
    return {**cfg, 'type': new} if cfg['type'] == old else dict(cfg)


def _is_pretrained(init_cfg: Any) -> bool:
    cfgs = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    return any(cfg and cfg.get('type') == 'Pretrained' for cfg in cfgs)

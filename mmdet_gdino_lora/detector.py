"""The detector: mmdet's Grounding DINO with LoRA adapters on a frozen base.

What is particular to this project is called from here and lives elsewhere: text in ``text/``,
adapters and their files in ``lora/``, the objective in ``objective/`` behind ``head.py``, lean
versions of mmdet's layers in ``layers/`` behind ``transformer.py``, prediction and validation in
``prediction.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import torch
from mmdet.models.dense_heads import GroundingDINOHead
from mmdet.models.language_models import BertModel
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmengine.model import BaseModule
from torch import Tensor

from mmdet_gdino_lora.changes import tell_changes
from mmdet_gdino_lora.checks.arguments import unknown_arguments
from mmdet_gdino_lora.checks.evaluation_only import check_texts_arrive
from mmdet_gdino_lora.checks.findings import tell
from mmdet_gdino_lora.engine.runner_config import checkpoint_at_start, runner_config
from mmdet_gdino_lora.engine.unfit import check_fit
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.layers.exchange import exchange_layers
from mmdet_gdino_lora.layers.factors import cast_together
from mmdet_gdino_lora.layers.frozen import forget, remembered
from mmdet_gdino_lora.layers.precision import Precision, cast_frozen
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
    trained_factors,
    write_card,
)
from mmdet_gdino_lora.phrases import LostPhrases, without_lost
from mmdet_gdino_lora.prediction import captions_to_predict, detect, validate
from mmdet_gdino_lora.retain import Retention
from mmdet_gdino_lora.route import Route, check_not_free_text
from mmdet_gdino_lora.samples import TokenTargets, caption_of, is_free_text, names_in
from mmdet_gdino_lora.text import TokenizedCaption
from mmdet_gdino_lora.transformer import Encoded, LeanGroundingDINO

NO_DENOISING = dict(group_cfg=dict(dynamic=False, num_groups=1))


@MODELS.register_module()
class LoRAGroundingDINO(LeanGroundingDINO):
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
        precision: ``'auto'`` trains in bfloat16 mixed precision and TF32 on a GPU that has them.
        retain: ``names`` of classes that must survive, ``weight`` and ``every``, as for
            :class:`~.retain.Retention`: the base teaches the adapted model what it knew.
        bbox_head: Config of the head.
        test_cfg: Beside mmdet's keys, ``chunked_size`` (most names of a caption) and ``route``
            (who answers for which names, see :class:`~.route.Route`).
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
        precision: str = 'float32',
        retain: Optional[dict] = None,
        dn_cfg: Optional[dict] = None,
        **kwargs: Any,
    ) -> None:
        tell(unknown_arguments('model', type(self), kwargs))
        super().__init__(
            _replaced(language_model, BertModel, 'GroundingTextEncoder'),
            bbox_head=_replaced(bbox_head, GroundingDINOHead, 'GroundingDINOCriterionHead'),
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
        self._precision = Precision(precision, base_dtype)
        if self._precision.base:
            if not base_checkpoint:
                raise ConfigError(
                    f'model.base_dtype={base_dtype!r} needs the base before the weights are cast: '
                    'set model.base_checkpoint (instead of load_from).'
                )
            cast_frozen(self, self._precision.base)
        self.retention = None
        if retain:
            if lora is None:
                raise ConfigError(
                    'model.retain holds adapters to their base, and this model has none; set '
                    'model.lora as well.'
                )
            self.retention = Retention.from_config(self.language_model.caption_tokenizer, retain)
        self.route = Route.from_config((self.test_cfg or {}).get('route'), lora is not None)
        #: What ``FrozenFeaturesHook`` puts here; None: everything is computed in every step.
        self.frozen_features: Any = None
        self.check_adapters = check_adapters and lora is not None
        self._gradient_check: Optional[GradientCheck] = None
        self._boxes_in_last_step = 0
        self._factors = trained_factors(self)
        self._config_told = lora is None
        self.lost_phrases = LostPhrases()
        self.token_targets = TokenTargets(self.bbox_head.num_classes if dn_cfg else None)

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
        self._factors = trained_factors(self)

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

        Raises:
            ConfigError: The run's training data brings no text; mmdet's own tools check nothing.
        """
        tell(check_texts_arrive(runner_config()))
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

        Raises:
            ConfigError: The run is one that compiles or spreads the whole model.
        """
        if mode:
            check_fit(runner_config())  # the last that a run does before it compiles
            self._factors = trained_factors(self)
        else:
            forget()
        super().train(mode)
        set_frozen_eval(self)
        return self

    # ------------------------------------------------------------------------------------- captions

    def captions(self, batch_data_samples: SampleList) -> list[TokenizedCaption]:
        """Returns one caption per image: the loader's, or one made of its classes.

        Args:
            batch_data_samples: As for :func:`~.samples.caption_of`.

        Returns:
            One per image.
        """
        tokenizer = self.language_model.caption_tokenizer
        return [caption_of(sample, tokenizer) for sample in batch_data_samples]

    # ---------------------------------------------------------------------- training and prediction

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """Computes the weighted loss components of a batch.

        Args:
            batch_inputs: Normalised images [B, 3, H, W].
            batch_data_samples: Captions (see :meth:`captions`) and ``gt_instances``.

        Returns:
            The head's components under the criterion's names.
        """
        mixed = self._precision.training(batch_inputs.device)
        with mixed, remembered(), cast_together(self._factors):
            return self._loss(batch_inputs, batch_data_samples)

    def _loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        self._tell_what_becomes_of_the_config()
        self._watch_gradients(batch_data_samples)
        captions = self.captions(batch_data_samples)
        kept: Sequence[Encoded] = ()
        if self.frozen_features is not None and self.training:
            kept = self.frozen_features.of(self, batch_inputs, batch_data_samples, captions)
        teacher = None
        if self.retention is not None and self.training and self.retention.is_due():
            # Before any graph exists: to be the base, freed parameters change in place.
            teacher = self.retention.ask_teacher(
                self, batch_inputs, batch_data_samples, kept[-1] if kept else None
            )
        if self.training:
            lora_state(self).shown(names_in(captions))
        self.lost_phrases.count(batch_data_samples, [[c] for c in captions], lost_boxes=True)
        batch_data_samples = without_lost(batch_data_samples, captions)
        text_dict = self.encode_text(captions)
        self.token_targets.attach(batch_data_samples, captions, text_dict['text_token_mask'])
        features = None if teacher is None else teacher.features
        if kept:
            head_inputs = self.decode(kept[0], batch_data_samples)
        else:
            features = self.extract_feat(batch_inputs) if features is None else features
            head_inputs = self.forward_transformer(features, text_dict, batch_data_samples)
        losses = self.bbox_head.loss(**head_inputs, batch_data_samples=batch_data_samples)
        if teacher is not None and self.retention is not None:
            losses.update(self.retention.loss(self, features, batch_data_samples, teacher))
        return losses

    def _tell_what_becomes_of_the_config(self) -> None:
        """Says once what becomes of the run's config here, without a hook in it."""
        if not self.training or self._config_told:
            return
        self._config_told = True
        tell_changes(self, runner_config())

    def _watch_gradients(self, batch_data_samples: SampleList) -> None:
        # Runners of several GPUs never call this detector's train_step, so that a step is known to
        # be over when the next one begins.
        if not (self.check_adapters and self.training and torch.is_grad_enabled()):
            return
        if self._gradient_check is None:
            self._gradient_check = GradientCheck(self)
        else:
            self._gradient_check.after_step(self._boxes_in_last_step)
        self._boxes_in_last_step = sum(len(s.gt_instances.labels) for s in batch_data_samples)

    def predict(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True
    ) -> SampleList:
        """Detects what is in a batch.

        Args:
            batch_inputs: Normalised images [B, 3, H, W].
            batch_data_samples: With ``text``: class names, or a caption. Names that take more than
                one caption, or more than ``test_cfg.chunked_size``, are shown in several. Free text
                is handled by mmdet's own code.
            rescale: Whether boxes are returned in the original image's pixels.

        Returns:
            The samples with ``pred_instances``: ``bboxes`` (absolute xyxy), ``scores`` in 0..1,
            ``labels`` and ``label_names``.
        """
        with self._precision.predicting(batch_inputs.device):
            if any(map(is_free_text, batch_data_samples)):
                check_not_free_text(self.route)
                return super().predict(batch_inputs, batch_data_samples, rescale)
            captions = captions_to_predict(self, batch_data_samples)
            detect(self, batch_inputs, batch_data_samples, captions, rescale)
        return batch_data_samples

    def val_step(self, data: Union[dict, tuple, list]) -> list:
        """Returns detections and, behind them, losses for mmengine's ``ValLoop`` to log.

        Args:
            data: A batch of the loader.

        Returns:
            The samples with predictions; where ground truth is at hand, one more element with
            ``loss``, the components of :meth:`loss` without the denoising queries.
        """
        batch = self.data_preprocessor(data, False)
        inputs, samples = batch['inputs'], batch['data_samples']
        if any(map(is_free_text, samples)):
            return self.predict(inputs, samples)
        with self._precision.predicting(inputs.device):
            return validate(self, inputs, samples)


def _replaced(cfg: dict, stock: type, ours: str) -> dict:
    """The config with our class's name where it names mmdet's, with a scope or as a class too."""
    kind = cfg['type']
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    return {**cfg, 'type': ours} if kind is stock else dict(cfg)


def _is_pretrained(init_cfg: Any) -> bool:
    cfgs = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    return any(cfg and cfg.get('type') == 'Pretrained' for cfg in cfgs)

"""The encoder's outputs of a batch: from disk, or computed and written there."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Optional

import torch
from mmdet.structures import DetDataSample, SampleList
from mmdet.structures.bbox import get_box_tensor
from mmengine.logging import MMLogger
from torch import Tensor

from mmdet_gdino_lora.engine.files import disk_is_full
from mmdet_gdino_lora.engine.replay import KEPT_VIEW
from mmdet_gdino_lora.frozen.pack import pack, unpadded
from mmdet_gdino_lora.frozen.store import Encoding, Entry, Truth, View, rounded, write
from mmdet_gdino_lora.frozen.views import MISSING, OF_THE_CAPTION
from mmdet_gdino_lora.text import TokenizedCaption
from mmdet_gdino_lora.transformer import Encoded

if TYPE_CHECKING:
    from mmdet_gdino_lora.transformer import LeanGroundingDINO

WAITING = 16
"""Views that wait for the disk at most; so many are held in memory."""

_OF_THE_BATCH = (MISSING, 'batch_input_shape', 'pad_shape', 'unreadable', *OF_THE_CAPTION)


class FrozenFeatures:
    """Gives a training step what the frozen part of the detector makes of its images.

    Every image is encoded as if it were alone in its batch, so that what is kept does not depend on
    which images it came with. What is computed is used as it will be read, rounded.

    Args:
        dtype: Which features are kept in.
        asked: A caption beside the data set's own, for ``retain``.
        work_dir: Of the run.
    """

    def __init__(
        self, dtype: torch.dtype, asked: Optional[TokenizedCaption] = None, work_dir: str = ''
    ) -> None:
        self._dtype, self._asked, self._work_dir = dtype, asked, work_dir
        self._writer = ThreadPoolExecutor(1, thread_name_prefix='frozen-features')
        self._waiting: list[Future] = []
        self._outdated = False

    def of(
        self,
        detector: LeanGroundingDINO,
        inputs: Tensor,
        samples: SampleList,
        captions: Sequence[TokenizedCaption],
    ) -> list[Encoded]:
        """The encoder's outputs of a batch.

        Args:
            detector: Nothing in front of its decoder is trained.
            inputs: Normalised images [B, 3, H, W]; what stands for a kept one is not looked at.
            samples: Their data samples, as :class:`~.frozen.views.ViewPipeline` makes them.
            captions: One per image.

        Returns:
            Under ``captions`` and, where there is one, under the caption for ``retain``.

        Raises:
            DiskFullError: What was computed before could not be written.
        """
        views: list[Optional[View]] = [sample.get(KEPT_VIEW) for sample in samples]
        missing = [number for number, view in enumerate(views) if view is None]
        with torch.no_grad():
            for number, view in self._computed(detector, inputs, samples, captions, missing):
                views[number] = view
            under = [list(captions)]
            if self._asked is not None:
                under.append([self._asked] * len(samples))
            masks = [detector.encode_text(of_images)['text_token_mask'] for of_images in under]
            return pack(detector, [view for view in views if view is not None], masks)

    def settle(self) -> None:
        """Waits until everything is on disk.

        Raises:
            DiskFullError: It could not be written.
        """
        while self._waiting:
            self._settle_first()

    def _computed(
        self,
        detector: LeanGroundingDINO,
        inputs: Tensor,
        samples: SampleList,
        captions: Sequence[TokenizedCaption],
        missing: Sequence[int],
    ) -> list[tuple[int, View]]:
        """Encodes what isn't kept, images of one size and caption together."""
        groups: dict[Any, list[int]] = {}
        for number in missing:
            size = tuple(samples[number].img_shape[:2])
            groups.setdefault((size, captions[number].text), []).append(number)
        computed = []
        for (size, _), members in groups.items():
            texts = [[captions[number] for number in members]]
            if self._asked is not None:
                texts.append([self._asked] * len(members))
            for number, view in zip(members, encode(detector, inputs[members], size, texts)):
                view = View(tuple(rounded(e, self._dtype) for e in view.encodings), view.shapes)
                self._keep(samples[number], view)
                computed.append((number, view))
        return computed

    def _keep(self, sample: DetDataSample, view: View) -> None:
        entry: Optional[Entry] = sample.metainfo.get(MISSING)
        if entry is None:
            return
        if entry.outdated and not self._outdated:
            self._outdated = True
            MMLogger.get_current_instance().warning(
                'Images or annotations have changed since their features were kept (%s is one); '
                'these are computed anew.',
                sample.metainfo.get('img_path', 'an image'),
            )
        instances = sample.gt_instances
        metainfo = {k: v for k, v in sample.metainfo.items() if k not in _OF_THE_BATCH}
        truth = Truth(get_box_tensor(instances.bboxes).cpu(), instances.labels.cpu(), metainfo)
        if len(self._waiting) >= WAITING:
            self._settle_first()
        self._waiting.append(self._writer.submit(write, entry, view.to('cpu', copy=True), truth))

    def _settle_first(self) -> None:
        with disk_is_full('the features of an image', self._work_dir):
            self._waiting.pop(0).result()


def encode(
    detector: LeanGroundingDINO,
    images: Tensor,
    size: tuple[int, int],
    captions: Sequence[Sequence[TokenizedCaption]],
) -> list[View]:
    """Encodes images of one size as if each were alone.

    Args:
        detector: Whose image tower and encoder are in eval mode.
        images: Normalised, in a larger batch's padding [B, 3, H, W].
        size: Their height and width.
        captions: For each time that they are encoded, one per image.

    Returns:
        One per image, on the detector's device.
    """
    divisor = detector.data_preprocessor.pad_size_divisor
    padded = tuple(-(-length // divisor) * divisor for length in size)
    shaped = [DetDataSample(metainfo=dict(img_shape=size, batch_input_shape=padded))] * len(images)
    features = detector.extract_feat(images[..., : padded[0], : padded[1]].contiguous())
    encoder_inputs, _ = detector.pre_transformer(features, shaped)
    views: list[list[Encoding]] = [[] for _ in shaped]
    for of_images in captions:
        text = detector.encode_text(of_images)
        outputs = detector.forward_encoder(**encoder_inputs, text_dict=text)
        memory, shapes = unpadded(
            outputs['memory'], outputs['memory_mask'], outputs['spatial_shapes']
        )
        for number, caption in enumerate(of_images):
            of_text = outputs['memory_text'][number, : caption.num_tokens]
            views[number].append(Encoding(memory[number], of_text))
    return [View(tuple(encodings), shapes) for encodings in views]

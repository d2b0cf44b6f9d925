"""The mistakes that tools/mutate.py plants: what a change could get wrong, room by room."""

from __future__ import annotations

from typing import NamedTuple, Optional

PACKAGE = 'mmdet_gdino_lora'


class Mutation(NamedTuple):
    """One mistake.

    Attributes:
        room: objective, adapters, store, retain, frozen, text, phrases, export, commands or
            photos.
        file: That it is planted in, from the checkout's root.
        what: The mistake in words.
        old: Code that stands exactly once in the file.
        new: What stands there instead.
        tests: Test files, of which at least one must fail.
        equivalent: Why no test can tell, where none can.
    """

    room: str
    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: Optional[str] = None


def _of(room: str, file: str, what: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(
        room, f'{PACKAGE}/{file}', what, old, new, tuple(f'tests/{t}.py' for t in tests)
    )


OBJECTIVE = [
    _of('objective', 'objective/focal.py', 'the background has the weight of the span',
        'weight = p.pow(gamma).mul_(1 - alpha)', 'weight = p.pow(gamma).mul_(alpha)',
        'test_criterion'),
    _of('objective', 'objective/focal.py', 'gradient of the span without its focal factor',
        'return torch.where(finite, -alpha * q**gamma * (gamma * p * softplus(-x) + q), 0)',
        'return torch.where(finite, -alpha * q**gamma * q, 0)',
        'test_criterion'),
    _of('objective', 'objective/boxes.py', 'GIoU of boxes inside one another',
        'offset = torch.maximum(apart[:2], half)', 'offset = apart[:2]',
        'test_matching', 'test_criterion'),
    _of('objective', 'objective/boxes.py', 'boxes apart are pulled by an overlap',
        'by_gap.masked_fill_(gap < 0, 0)', 'by_gap.masked_fill_(gap < -1, 0)',
        'test_gradients'),
    _of('objective', 'objective/matches.py', 'denoising negatives get targets',
        '(group.num_queries // group.dn_groups)', '(group.num_queries // group.dn_groups // 2)',
        'test_criterion'),
    _of('objective', 'objective/criterion.py', 'denoising groups count the boxes once',
        'boxes = [num_boxes * max(1, group.dn_groups) for', 'boxes = [num_boxes for',
        'test_criterion'),
    _of('objective', 'objective/criterion.py', 'ranks divide by the sum of their boxes',
        'counts = counts / torch.distributed.get_world_size()', 'pass',
        'test_criterion', 'test_distributed'),
    _of('objective', 'objective/criterion.py', 'the gradient ignores background_weight',
        'grad.mul_(weight[..., None])', 'pass', 'test_criterion'),
    _of('objective', 'objective/groups.py', 'the encoder is matched by tokens beside objectness',
        'valid = logits.detach()[..., : mask.shape[1]].masked_fill(~mask[:, None], -torch.inf)',
        'valid = logits.detach()[..., : mask.shape[1]]',
        'test_criterion'),
    _of('objective', 'objective/targets.py', 'rows to ignore count as boxes',
        'self.kept = [image[labels[image] >= 0] for image in numbers]', 'self.kept = numbers',
        'test_criterion'),
    _of('objective', 'objective/costs.py', 'the cost of a span is a sum over its tokens',
        'weights /= weights.count_nonzero(1).clamp_(min=1)[:, None]', 'pass', 'test_matching'),
]  # fmt: skip

ADAPTERS = [
    _of('adapters', 'detector.py', 'init_weights runs Xavier over the adapters',
        'value.copy_(adapters[name])', 'value.copy_(value)', 'test_lora_state'),
    _of('adapters', 'peft_layers/attention.py', "PEFT's factor is never applied, reading",
        'out_adapters = [a._replace(scaling=a.scaling * factor) for a in out_adapters]',
        'out_adapters = list(out_adapters)', 'test_lora_inject', 'test_layers_attention'),
    _of('adapters', 'peft_layers/attention.py', "PEFT's factor is never applied, merging",
        'delta = out_adapter.get_delta_weight(adapter) * peft_out_proj_factor()',
        'delta = out_adapter.get_delta_weight(adapter)', 'test_adapter_files'),
    _of('adapters', 'lora/inject/freezing.py', 'frozen parts train: dropout, moving averages',
        'child.eval()', 'child.train(child.training)', 'test_lora_inject', 'test_detector'),
    _of('adapters', 'lora/inject/freezing.py', 'a random label embedding stays frozen',
        'absent = name == LABEL_EMBEDDING and (base is None or LABEL_EMBEDDING in base.absent)',
        'absent = False', 'test_lora_base', 'test_lora_inject'),
    _of('adapters', 'lora/inject/presets.py', 'adapters behind the last stage that is used',
        'yield from (f\'backbone.stages.{i}.\' for i in range(last + 1, len(backbone.stages)))',
        'yield from ()', 'test_lora_inject'),
    _of('adapters', 'lora/inject/gradients.py', 'parameters without gradient are not told',
        'if dead:', 'if False:', 'test_adapter_files'),
    _of('adapters', 'lora/switch.py', 'weights of a combination do not reach the adapters',
        'entry.layer.scaling[name] = entry.scalings[name] * weight',
        'entry.layer.scaling[name] = entry.scalings[name]', 'test_adapters_together'),
    _of('adapters', 'lora/switch.py', 'the base keeps the tuned values of what is freed',
        'new = {n: c[0][1] for n, c in changes.items() if len(c) == 1 and c[0][0] == 1}',
        'new = {n: c[0][1] for n, c in changes.items() if c} or dict(now)',
        'test_adapters_together'),
    _of('adapters', 'lora/adapters.py', 'an adapter of another base is taken',
        '    _check_base(detector, note, source)\n', '', 'test_adapters_together'),
]  # fmt: skip

STORE = [
    _of('store', 'lora/store/merge.py', 'scales go from the tuned model to the base',
        'torch.lerp(base.float(), tuned.float(), scale)',
        'torch.lerp(tuned.float(), base.float(), scale)', 'test_adapter_files', 'test_tools'),
    _of('store', 'lora/store/base.py', 'deltas are added to a rounded base',
        'exact = {**tensors, **{name: base[name] for name in rounded if name in base}}',
        'exact = dict(tensors)', 'test_store_precision'),
    _of('store', 'lora/store/base.py', 'what the base did not bring is forgotten',
        'return Base(source, fingerprint(tensors, absent), frozenset(absent), path)',
        'return Base(source, fingerprint(tensors, absent), frozenset(), path)',
        'test_lora_base', 'test_lora_checkpoint'),
    _of('store', 'lora/store/checkpoint.py', 'another base is not noticed',
        'if differing:\n', 'if False:\n', 'test_lora_checkpoint', 'test_adapters_together'),
    _of('store', 'lora/store/checkpoint.py', 'an adapter of another rank or scaling is taken',
        'if key in theirs and theirs[key] != ours[key]:', 'if False:', 'test_lora_checkpoint'),
    _of('store', 'lora/store/checkpoint.py', 'checkpoints hold the base',
        'kept = {prefix + name for name in state.names_to_save(detector)}',
        'kept = set(state_dict)', 'test_lora_checkpoint'),
    _of('store', 'engine/checkpoint_hook.py', "the folder's adapter is not the file's average",
        "self._weights = checkpoint['state_dict']", 'self._weights = None', 'test_store_average'),
    _of('store', 'lora/store/folder.py', 'the label embedding goes to PEFT',
        'if plain == LABEL_EMBEDDING:', 'if False:', 'test_adapter_files'),
]  # fmt: skip

RETAIN = [
    _of('retain', 'retain.py', 'the adapted decoder picks its own queries',
        'positions=None if teacher is None else teacher.positions', 'positions=None',
        'test_retain'),
    _of('retain', 'retain.py', 'the adapted decoder starts from its own boxes',
        'proposals.boxes.detach().sigmoid() if teacher is None else teacher.references',
        'proposals.boxes.detach().sigmoid()', 'test_retain'),
    _of('retain', 'retain.py', 'the teacher is the adapted model',
        'with torch.no_grad(), evaluating(detector), base_only(detector):',
        'with torch.no_grad(), evaluating(detector):', 'test_retain'),
    _of('retain', 'retain.py', 'every iteration asks the teacher',
        'return iteration % self.every == 0', 'return True', 'test_retain'),
    _of('retain', 'retain.py', 'boxes that the base does not believe in count',
        'score = (score / total).flatten()', 'score = torch.full_like(score, 0.2).flatten()',
        'test_retain'),
]  # fmt: skip

TEXT = [
    _of('text', 'prediction.py', 'validation boxes are never resized',
        'if annotations_follow_resize(runner_config()):', 'if False:',
        'test_prediction', 'test_runner_config'),
    _of('text', 'text/phrases.py', 'a token that only touches a span belongs to it',
        'if any(begin < last and end > first for first, last in spans)',
        'if any(begin <= last and end >= first for first, last in spans)',
        'test_text_tokens', 'test_token_spans'),
    _of('text', 'text/phrases.py', 'spans are counted without [CLS]',
        'tuple([1 + token for token in overlapping(offsets, phrase)])',
        'overlapping(offsets, phrase)', 'test_token_spans'),
    _of('text', 'text/phrases.py', 'a phrase that ends in [SEP] is kept',
        'tokens[-1] <= most', 'tokens[-1] <= most + 1', 'test_lost_phrases'),
    _of('text', 'text/tokens.py', 'a special token begins the next segment',
        'starts[1:] = is_special[:-1]', 'starts[1:] = is_special[1:]', 'test_text_tokens'),
    _of('text', 'text/encoder.py', 'padding is attended to',
        'mask = mask.masked_fill(~seen, torch.finfo(hidden.dtype).min)',
        'mask = mask.masked_fill(~seen, 0)', 'test_text_encoder'),
    _of('text', 'text/encoder.py', 'features outlive a change of the weights',
        'if version != self._cached_version:', 'if self._cached_version is None:',
        'test_text_encoder'),
    _of('text', 'datasets/token_spans.py', 'negatives fill the place of the positives',
        'max_name_tokens - vocabulary.lengths[positives].sum()', 'max_name_tokens',
        'test_token_spans'),
]  # fmt: skip
FROZEN = [
    _of('frozen', 'frozen/views.py', 'an image that changed keeps its features',
        'file = (status.st_size, status.st_mtime_ns) if status else ()', 'file = ()',
        'test_frozen_features'),
    _of('frozen', 'frozen/encode.py', "an image is encoded in its batch's padding",
        'images[..., : padded[0], : padded[1]]', 'images', 'test_frozen_features'),
    _of('frozen', 'frozen/pack.py', 'padding is part of the image',
        'mask[image, :height, :width] = False', 'mask[image] = False', 'test_frozen_features'),
    _of('frozen', 'frozen/space.py', 'a disk that is too small is filled',
        'if needed > free:', 'if False:', 'test_frozen_features'),
]  # fmt: skip

PHRASES = [
    _of('phrases', 'phrases.py', 'boxes of phrases that nobody saw count',
        'copy.gt_instances.labels = labels.masked_fill(lost, -1)',
        'copy.gt_instances.labels = labels', 'test_lost_phrases'),
    _of('phrases', 'phrases.py', 'every batch warns',
        'if not self._told:', 'if True:', 'test_lost_phrases'),
    _of('phrases', 'phrases.py', 'images are counted once for each of their phrases',
        'self.images += 1', 'self.images += len(caption.lost)', 'test_lost_phrases'),
    _of('phrases', 'text/prompts.py', 'what a caption says becomes the name of the class',
        'Prompt(prompt.class_name, clean_name(words).strip(),',
        'Prompt(clean_name(words).strip(), clean_name(words).strip(),', 'test_prompts'),
    _of('phrases', 'text/prompts.py', "words drive out mmdet's prefix and suffix",
        'prompt.prefix, prompt.suffix)', "'', '')", 'test_prompts'),
]  # fmt: skip

EXPORT = [
    _of('export', 'export/onnx_runner.py', 'boxes stay in the pixels of the resized image',
        'boxes = boxes[kept] * np.tile(ratio, 2).astype(np.float32)', 'boxes = boxes[kept]',
        'test_onnx'),
    _of('export', 'export/onnx_runner.py', 'positions go on through the whole caption',
        'np.arange(len(input_ids)) - np.flatnonzero(starts)[segments]',
        'np.arange(len(input_ids))', 'test_onnx'),
    _of('export', 'export/onnx_runner.py', "a name runs over its caption's end",
        'full = used + len(ids) > self._room or', 'full = used > self._room or', 'test_onnx'),
    _of('export', 'export/graph.py', 'the score of a class is a sum over its tokens',
        '(means / means.sum(1, keepdim=True)).t()', 'means.t()', 'test_onnx'),
]  # fmt: skip

COMMANDS = [
    _of('commands', 'commands/merge_adapter.py', 'a merge knows no scale',
        'weights = merged_weights(detector, args.scale)', 'weights = merged_weights(detector)',
        'test_tools'),
    _of('commands', 'commands/shrink_checkpoint.py', 'whole numbers are halved, too',
        'w.half() if w.is_floating_point() else w', 'w.half()', 'test_tools'),
]  # fmt: skip

PHOTOS = [
    _of('photos', 'report/hook.py', 'the best weights stay in the detector of the run',
        'tensor.copy_(kept[name])', 'pass', 'test_report_hook'),
    _of('photos', 'labelling/missing.py', 'a detector that misses many labels is believed',
        'max(LEAST / SUREST, FOUND * self.labels)', 'LEAST / SUREST', 'test_missing_labels'),
    _of('photos', 'formats/config.py', 'hooks of the inherited config are lost',
        "[*_base_.get('custom_hooks', []), dict(", '[dict(', 'test_new_config'),
]  # fmt: skip

MUTATIONS = [
    *OBJECTIVE,
    *ADAPTERS,
    *STORE,
    *RETAIN,
    *FROZEN,
    *TEXT,
    *PHRASES,
    *EXPORT,
    *COMMANDS,
    *PHOTOS,
]

"""The model that spatial alignment and distillation train: a student, its frozen teachers and their losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from pe_spatial.alignment.losses import SHARPNESS, pairwise_similarity, token_cosine
from pe_spatial.alignment.student import Masking, build_student, fill_gray, start_with_layer_scale
from pe_spatial.alignment.teachers import Teacher
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.errors import ConfigError, one_of
from pe_spatial.integrations.openmmlab import Backbone

KINDS = ("token_cosine", "pairwise_similarity")


@MODELS.register_module()
class SpatialAlignment(BaseModel):
    """Train the last layer of `backbone` towards frozen teachers, which see the same augmented image unmasked.

    Args:
        backbone: the student, with `init_cfg` for the weights that it starts from.
        teachers: name -> config of a teacher. An `EncoderTeacher` without `variant` is the student's own encoder as it
            starts, from the same file. One that no loss names is not built.
        losses: each `dict(kind=..., teacher=NAME, weight=1.0)`, with a kind of `KINDS`. 'token_cosine' with
            `linear=True` maps the student linearly to the teacher's width (direct distillation); 'pairwise_similarity'
            takes `sharpness`, 20 by default for locality, None for distillation from PE-Spatial.
        layer_scale: initial value of LayerScale, which is added to the student; 0.1 in the paper, None adds none.
        layer_scale_start: 'exact' divides the layers before it, so that the student starts as the teacher's function;
            'plain' takes the weights as they are, so that every block starts weaker. The paper does not say.
        masking: options of `Masking`; None masks nothing.
        data_preprocessor: gives images (B, 3, H, W), RGB in [0, 255].
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        *,
        teachers: Mapping[str, Mapping[str, Any]],
        losses: Sequence[Mapping[str, Any]],
        layer_scale: float | None = None,
        layer_scale_start: str = "exact",
        masking: Mapping[str, Any] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor or dict(type="ImgDataPreprocessor", bgr_to_rgb=True))
        self._loaded = False
        self.exact = one_of("layer_scale_start", layer_scale_start, ["exact", "plain"]) == "exact"
        self._start = copy.deepcopy(dict(backbone)) if layer_scale is not None else None
        self.backbone = build_student(backbone, layer_scale)
        self.masking = None if masking is None else Masking(**masking)
        self._masked: Tensor | None = None
        self.mask_token: nn.Parameter | None = None
        if self.masking and self.masking.fill == "token":
            self._add_mask_token()
        # not registered: neither trained, averaged, sharded nor saved
        self.teachers: dict[str, Teacher] = {}
        for name in dict.fromkeys(one_of("teacher of a loss", loss.get("teacher"), list(teachers)) for loss in losses):
            self.teachers[name] = MODELS.build(_complete(teachers[name], backbone))
        self.maps = nn.ModuleDict()
        self.losses = {f"loss_{loss.get('teacher')}_{loss.get('kind')}": self._loss(loss) for loss in losses}
        if not self.losses:
            raise ConfigError(f"losses is empty; give at least one, of the kinds {', '.join(KINDS)}")
        config = self.backbone.config
        for name in ("mean", "std"):
            values = torch.tensor(getattr(config, name))[:, None, None]
            self.register_buffer(f"_{name}", values, persistent=False)

    def _add_mask_token(self) -> None:
        if not isinstance(self.backbone, PerceptionEncoder):
            raise ConfigError("masking.fill='token' is for Perception Encoders; take 'gray'")
        self.mask_token = nn.Parameter(torch.zeros(self.backbone.embed_dim))
        self.backbone.patch_embed.register_forward_hook(self._replace_masked)

    def _replace_masked(self, _module: nn.Module, _args: Any, patches: Tensor) -> Tensor:
        if self._masked is None:
            return patches
        assert self.mask_token is not None
        return torch.where(self._masked[..., None], self.mask_token.to(patches.dtype), patches)

    def _loss(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Check the options of a loss, complete them, and add the linear map that it needs."""
        kind = one_of("kind of a loss", options.get("kind"), list(KINDS))
        name = options["teacher"]
        own: dict[str, Any] = dict(linear=False) if kind == "token_cosine" else dict(sharpness=SHARPNESS)
        allowed: dict[str, Any] = dict(kind=kind, teacher=name, weight=1.0, **own)
        unknown = set(options) - set(allowed)
        if unknown:
            raise ConfigError(f"a loss of kind {kind} has no option {', '.join(sorted(unknown))}")
        loss = {**allowed, **options}
        if kind == "token_cosine":
            width, ours = self.teachers[name].channels, self.backbone.embed_dim
            if width is None or (width != ours and not loss["linear"]):
                raise ConfigError(
                    f"token_cosine compares the student's {ours} channels with {width or 'an unknown number'} of the "
                    f"teacher {name}; set linear=True for another encoder, or take pairwise_similarity"
                )
            if loss["linear"]:
                self.maps[name] = nn.Linear(ours, width)
        return loss

    def _value(self, loss: Mapping[str, Any], student: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the value of a loss on the student's and the teachers' tokens."""
        target = targets[loss["teacher"]]
        if loss["kind"] == "pairwise_similarity":
            return loss["weight"] * pairwise_similarity(student, target, sharpness=loss["sharpness"])
        mapped = self.maps[loss["teacher"]](student) if loss["linear"] else student
        return loss["weight"] * token_cosine(mapped, target)

    def init_weights(self) -> None:
        """Load the student, then the teachers; only the first call counts.

        Raises CheckpointError for the student's weights and ConfigError for a teacher's.
        """
        if self._loaded:
            return
        if self._start is None:
            self.backbone.init_weights()
        else:
            assert isinstance(self.backbone, Backbone)
            start_with_layer_scale(self.backbone, self._start, exact=self.exact)
        for name, teacher in self.teachers.items():
            try:
                teacher.load()
            except CheckpointError as error:  # without the advice that training adds for the student's
                raise ConfigError(f"teacher {name}: {error}") from error
        self._loaded = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpatialAlignment:
        for teacher in self.teachers.values():
            teacher._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, inputs: Tensor, data_samples: Sequence[Any] = (), mode: str = "tensor") -> Any:
        """Return the losses of images (B, 3, H, W), RGB in [0, 255], or in mode 'tensor' the student's maps."""
        if mode == "predict":
            raise ConfigError("a SpatialAlignment predicts nothing; take its backbone, or AlignmentProgressHook")
        normalized = (inputs - self._mean) / self._std
        if mode == "tensor":
            return self.backbone(normalized)
        student = self._student(normalized)
        grid = (student.shape[-2], student.shape[-1])
        targets = {name: _tokens(x) for name, x in self.targets(inputs, grid, data_samples).items()}
        tokens = _tokens(student)
        return {name: self._value(loss, tokens, targets) for name, loss in self.losses.items()}

    def _student(self, images: Tensor) -> Tensor:
        """Return the last map (B, C, h, w) of normalized images, of which patches are masked."""
        if self.masking is None:
            return self.backbone(images)[-1]
        patch = self.backbone.patch_size
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        masked = self.masking.draw(len(images), grid, images.device)
        if self.masking.fill == "gray":
            return self.backbone(fill_gray(images, masked, patch))[-1]
        self._masked = masked
        maps = self.backbone(images)[-1]
        self._masked = None
        return maps

    @torch.no_grad()
    def targets(self, images: Tensor, grid: tuple[int, int], samples: Sequence[Any]) -> dict[str, Tensor]:
        """Return each teacher's map (B, M, h, w)."""
        return {name: teacher.to(images.device)(images, grid, samples) for name, teacher in self.teachers.items()}


def _tokens(maps: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w, C)."""
    return maps.flatten(2).mT


def _complete(config: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Give an EncoderTeacher without a variant the student's, its weights and its geometry."""
    complete = copy.deepcopy(dict(config))
    if complete.get("type") == "CachedTeacher":
        complete["teacher"] = _complete(complete["teacher"], backbone)
    elif complete.get("type") == "EncoderTeacher" and "variant" not in complete:
        shared = {key: backbone[key] for key in ("geometry", "patch_size", "window_size") if key in backbone}
        complete = {**shared, "variant": backbone["variant"], "init_cfg": backbone.get("init_cfg"), **complete}
    return complete

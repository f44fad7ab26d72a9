"""What the planner must know about alignment: an example batch, the size of views, and memory of teachers."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from mmengine.structures import BaseDataElement
from torch import Tensor

from pe_spatial.alignment.model import SpatialAlignment
from pe_spatial.alignment.teachers import EncoderTeacher
from pe_spatial.planning.registry import register_example, register_step, total_loss


@register_example(
    SpatialAlignment,
    counted="the student, its losses, and one pass of each encoder that teaches; of SAM 2.1 and of true masks the maps "
    "alone. Weights of teachers are on every GPU and not in the table: 4 bytes each, 2 with dtype='bfloat16' "
    "(PE-Core-G up to layer 41: 1.5 B, SAM 2.1-L: 0.2 B)",
)
def _alignment_loss(model: Any, images: Tensor, objects: int, replaced: ExitStack) -> Tensor:  # noqa: ARG001
    teachers = model.teachers
    model.teachers = {name: _on_meta(teacher) for name, teacher in teachers.items()}
    replaced.callback(setattr, model, "teachers", teachers)
    return total_loss(model, inputs=images, data_samples=[BaseDataElement() for _ in images])


def _on_meta(teacher: Any) -> Any:
    if isinstance(teacher, EncoderTeacher):
        return teacher.to("meta", teacher.dtype)
    return _Maps(teacher.channels or 32)


class _Maps:
    """Stands for a teacher whose operations are not counted."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def to(self, _: Any) -> "_Maps":
        return self

    def __call__(self, images: Tensor, grid: tuple[int, int], _: Any) -> Tensor:
        return images.new_empty(len(images), self.channels, *grid)


def _square(step: Mapping[str, Any]) -> dict[str, Any]:
    return dict(size=(step["size"], step["size"]))


for _name in ("AspectJitter", "FixedView"):
    register_step(_name, _square)

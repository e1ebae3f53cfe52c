"""The keyword arguments of :class:`~pmet_lightning.editor.editor.Editor`, for type checkers and editors.

They are the settings of the sections of a configuration; a test keeps them equal to the parameters of the classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict

if TYPE_CHECKING:
    import torch

    from pmet_lightning.data.chat import Chat
    from pmet_lightning.data.join import Join
    from pmet_lightning.data.token_rows import PaddingSide
    from pmet_lightning.evaluation.editable import TextSettings
    from pmet_lightning.model.architectures import Architecture
    from pmet_lightning.model.loading import DeviceMap, DtypeName
    from pmet_lightning.model.quantized_base import Quantize
    from pmet_lightning.targets.target_optimizer import OptimizedSites, TargetValue


class ModelSettings(TypedDict, total=False):
    """The section ``model``, without the settings that are parameters of the editor itself."""

    optimize: OptimizedSites
    target_value: TargetValue
    steps: int
    optimizer: Any
    clamp: float
    nll_factor: float
    kl_factor: float
    norm_factor: float
    loss_tolerance: float
    stop_at_argmax: bool
    attention_steps: int | None
    merge_equal_keys: bool
    contexts: list[str] | None
    context_count: int
    context_length: int
    seed: int
    targets_folder: str | None
    micro_batch: int | Literal["auto"]
    suffix_only: bool
    compile_ffn: bool
    dtype: DtypeName
    attn_implementation: str | None
    architecture: Architecture | Mapping[str, Any] | None
    padding_side: PaddingSide
    tokens_per_batch: int
    free_tokens: int
    texts: TextSettings | Mapping[str, Any] | None
    chat: Chat
    join: Join
    keep_float32: bool
    patch: str | None
    device_map: DeviceMap | None
    trust_remote_code: bool
    quantize: Quantize | None


class EditorSettings(ModelSettings, total=False):
    """All keyword arguments of the editor."""

    layers: Sequence[int] | Literal["auto"] | None
    corpus: str | None
    lam: float | None
    lr: float | None
    edit_batch: int | None
    device: str | torch.device | None
    progress: bool
    data: Mapping[str, Any] | None
    moments: Mapping[str, Any] | None
    spread: Mapping[str, Any] | None
    drift: Mapping[str, Any] | None

"""Settings that the commands which ask a model for facts share: the model, and the records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pmet_lightning.data.chat import Chat
from pmet_lightning.data.join import Join
from pmet_lightning.model.loading import DtypeName
from pmet_lightning.model.quantized_base import Quantize, move
from pmet_lightning.utils.types import NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from torch import nn

    from pmet_lightning.data.encoder import PromptEncoder


@dataclass(frozen=True)
class LoadOptions:
    """The model.

    Attributes:
        model_name: A folder made by save_pretrained, a hub name, or the shipped 'atlas'.
        dtype: Precision the model is loaded in; 'auto' uses that of the checkpoint.
        attn_implementation: Attention kernel of transformers, such as eager or sdpa; null uses its default.
        tokens_per_batch: Maximum number of padded tokens in one forward pass.
        chat: Whether prompts are a user's messages in the tokenizer's chat template; or the messages before them.
        join: How prompts and answers are joined, as for fit.
        device: Where the model runs, such as cpu or cuda:0; null uses a GPU if there is one.
        trust_remote_code: Whether Python code in the model's folder or repository may run.
        quantize: Whether the weights are quantized by bitsandbytes when they are loaded, as for fit.
    """

    model_name: str = "atlas"
    dtype: DtypeName = "auto"
    attn_implementation: str | None = None
    tokens_per_batch: PositiveInt = 8192
    chat: Chat = False
    join: Join = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    quantize: Quantize | None = None


@dataclass(frozen=True)
class RecordOptions:
    """The records.

    Attributes:
        path: Edits in any format that fit reads, or known_facts (subject, attribute, prompt): .json, .jsonl, .csv,
            .parquet, a hub name, or the shipped 'atlas-records' or 'earth-records'; the items of a list are read in
            order.
        split: Split of a hub data set.
        skip: Records skipped at the beginning.
        shuffle: Seed of a shuffle before skip and limit; null keeps the file's order.
        limit: Maximum number of records; null uses all.
    """

    path: str | list[str] = "atlas-records"
    split: str = "train"
    skip: NonNegativeInt = 0
    shuffle: NonNegativeInt | None = None
    limit: PositiveInt | None = None

    def selection(self) -> dict[str, Any]:
        """The arguments of :func:`~pmet_lightning.data.readers.read_records` beside the path."""
        return {"split": self.split, "skip": self.skip, "shuffle": self.shuffle, "limit": self.limit}


def load_with_encoder(options: LoadOptions) -> tuple[nn.Module, PromptEncoder]:
    """Load a model onto its device, and an encoder of its tokenizer.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If the device is unknown, or there is no chat template and one is asked for.
    """
    from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
    from pmet_lightning.model.architectures import embedding_rows
    from pmet_lightning.model.loading import load_config, load_model
    from pmet_lightning.utils.resources import check_device

    device, trusted = check_device(options.device, "--model.device"), options.trust_remote_code
    rows = embedding_rows(load_config(options.model_name, trusted))
    tokenizer = load_tokenizer(options.model_name, trusted)
    encoder = PromptEncoder.of(tokenizer, options.chat, options.join, rows=rows)
    model = load_model(
        options.model_name,
        options.dtype,
        options.attn_implementation,
        trust_remote_code=trusted,
        quantize=options.quantize,
    )
    move(model, device)
    return model, encoder

"""A causal language model whose facts can be edited, as a LightningModule: loading and evaluation.

Its subclasses find the new weights: ``TargetOptimizer`` (PMET and its ablations) and ``FineTuning`` (the baseline).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from pmet_lightning.data.chat import Chat
from pmet_lightning.data.datamodule import EditBatch
from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
from pmet_lightning.data.join import Join
from pmet_lightning.data.records import Edit
from pmet_lightning.data.token_rows import PaddingSide
from pmet_lightning.evaluation.answers import AnswerLine, answer_line, old_objects
from pmet_lightning.evaluation.consistency import References
from pmet_lightning.evaluation.fluency import fluency, sample_texts
from pmet_lightning.evaluation.generation import greedy_texts
from pmet_lightning.evaluation.probes import ProbeResult, RecordResult, compare_with_clean, score_probes
from pmet_lightning.evaluation.scores import EditScores, table_of
from pmet_lightning.model.architectures import (
    Architecture,
    architecture_of,
    depth_of,
    embedding_rows,
    suggest_layers,
    written_sites,
)
from pmet_lightning.model.fingerprint import fingerprint
from pmet_lightning.model.fsdp import load_in_turn, shard
from pmet_lightning.model.loading import DeviceMap, DtypeName, load_config, load_model, set_plain_outputs
from pmet_lightning.model.origin import Origin, origin_of
from pmet_lightning.model.patch import apply_patch
from pmet_lightning.model.projections import Sites, find_layers, keep_in_float32
from pmet_lightning.model.quantized_base import Quantize, hold_unquantized, quantization_of
from pmet_lightning.utils.distributed import ProcessGroup
from pmet_lightning.utils.types import NonNegativeInt, PositiveInt

log = logging.getLogger(__name__)

Phase = Literal["before", "after", "validate"]


@dataclass(frozen=True)
class TextSettings:
    """Generated texts for COUNTERFACT's fluency and consistency.

    Attributes:
        length: Tokens of a text, its prompt included.
        top_k: Number of most probable tokens to sample from.
        seed: Seed of the sampling.
        references: Texts about entities that have o*, for the consistency: COUNTERFACT's attribute_snippets.json (or
            its folder), or a corpus as for --moments.corpus, whose texts that name o* are used; null leaves it out.
        references_subset: Subset of a hub data set.
    """

    length: PositiveInt = 100
    top_k: PositiveInt = 5
    seed: int = 0
    references: str | None = None
    references_subset: str | None = None


@dataclass(frozen=True)
class CleanEvaluation:
    """What the unedited model has answered: for a run that would ask it the same.

    Attributes:
        probes: Of each edit, by its position, a result for each of its questions.
        answers: Of each edit, by its position, its questions with the answers.
        record_rows: Score rows of all edits, as of :meth:`~pmet_lightning.evaluation.scores.EditScores.record_rows`.
        results: All metrics.
    """

    probes: Mapping[int, Sequence[ProbeResult]]
    answers: Mapping[int, AnswerLine] | None = None
    record_rows: torch.Tensor | None = None
    results: Mapping[str, float] | None = None


class EditableModel(L.LightningModule):
    """A frozen causal language model with the evaluation of edits (``validate`` and ``test``).

    Args:
        model_name: A folder made by save_pretrained, a hub name, or the shipped 'atlas'.
        layers: Layers whose weights are edited. 'auto' picks a range by the model's depth and logs it.
        dtype: Precision to load the model in; 'auto' takes the file's.
        attn_implementation: Attention implementation requested from transformers, such as eager or sdpa; null takes
            its default.
        architecture: Module paths of a family that is not in the table of known ones.
        padding_side: Where rows are padded; does not change results. (Left padding with eager attention in float64
            makes some families give NaN: their mask overflows.)
        tokens_per_batch: Maximum number of tokens in one forward pass for keys and for the evaluation.
        free_tokens: Maximum number of tokens of the generated answers that are evaluated beside the teacher-forced
            ones; 0 generates none.
        texts: Texts generated from the records' generation prompts for fluency and consistency; null generates none.
        chat: Whether prompts are user messages in the tokenizer's chat template, and targets the beginning of
            the assistant's answer; or the messages that precede a user's: a system prompt, earlier turns (a list of
            {role, content}).
        join: How a prompt that is no chat and its answer are joined: 'space', 'none' (the answer as it is), or 'auto',
            a space but after an opening quote or bracket and in scripts without spaces.
        keep_float32: Whether the output projections of the edited layers of a half-precision model are held in
            float32, so that no part of an edit is rounded away in memory (``export --dtype float32`` keeps it in a
            folder).
        patch: A patch.safetensors to apply after loading.
        device_map: Placement of the parts of a model that is larger than one device, such as auto (needs accelerate;
            one process). Null leaves it to the trainer, whose ModelParallelStrategy shards over processes instead.
        trust_remote_code: Whether Python code in the model's folder or repository may run, for models that transformers
            does not have.
        quantize: Whether the weights are quantized by bitsandbytes when they are loaded, to '4bit' or '8bit', but for
            those that are edited; null loads them as they are.
    """

    def __init__(
        self,
        model_name: str,
        layers: list[NonNegativeInt] | Literal["auto"] = "auto",
        dtype: DtypeName = "auto",
        attn_implementation: str | None = None,
        architecture: Architecture | None = None,
        padding_side: PaddingSide = "right",
        tokens_per_batch: PositiveInt = 8192,
        free_tokens: NonNegativeInt = 16,
        texts: TextSettings | None = None,
        chat: Chat = False,
        join: Join = "auto",
        keep_float32: bool = False,
        patch: str | None = None,
        device_map: DeviceMap | None = None,
        trust_remote_code: bool = False,
        quantize: Quantize | None = None,
    ) -> None:
        super().__init__()
        # A subclass's too; the run logs them itself. Lightning could not pickle an optimizer that is a lambda.
        self.save_hyperparameters(ignore=["optimizer"], logger=False)
        self.strict_loading = False  # the language model is no part of a checkpoint
        self.model_name = model_name
        self.layers_wanted: list[int] | None = None if layers == "auto" else sorted(map(int, layers))
        self.layers = self.layers_wanted or []  # final after setup, and so is the model's depth
        self.depth = 0
        self.dtype_name, self.attn_implementation = dtype, attn_implementation
        self.architecture_override = architecture
        self.padding_side: PaddingSide = padding_side
        self.tokens_per_batch = tokens_per_batch
        self.free_tokens, self.texts = free_tokens, texts
        self.chat, self.join, self.trust_remote_code = chat, join, trust_remote_code
        self.keep_float32, self.patch, self.device_map = keep_float32, patch, device_map
        self.quantize = quantize

        self.lm: nn.Module | None = None
        self._attached: tuple[nn.Module, Any] | None = None
        self.base_fingerprint = ""
        self.quantization: str | None = None
        self.origin: Origin | None = None  # of a model that was edited already
        # Written earlier: by the run that is resumed (edit batches), by earlier runs of this object (both).
        self.batches_done = self.edits_done = 0
        self.inner_step = 0
        self.scores = EditScores()
        self.results: dict[str, dict[str, float]] = {}
        self.record_rows: dict[str, torch.Tensor] = {}
        self.answers: dict[str, dict[int, AnswerLine]] = {}  # by phase and position
        self._own_answers: dict[int, AnswerLine] = {}  # of this process, in the current evaluation
        self.curves: list[dict[str, float]] = []  # a point for each step, for the report
        self._encoder: PromptEncoder | None = None
        self._architecture: Architecture | None = None
        self._before: dict[int, list[ProbeResult]] = {}
        self._references: References | None = None

    # ---- the model -------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, tokenizer: Any) -> None:
        """Work on a model that is already loaded, where it is and as it is, instead of loading one.

        It does not become a part of this module: Lightning neither moves it nor changes its mode.

        Args:
            model: A causal language model of transformers, frozen and in eval mode while this module works.
            tokenizer: Its tokenizer.
        """
        self._attached = model, tokenizer

    def reset_results(self) -> None:
        """Forget what was evaluated and logged, for a run that is reported separately from those before it."""
        self.results, self.record_rows, self.curves, self.inner_step = {}, {}, [], 0
        self._before, self.answers, self._own_answers = {}, {}, {}

    @property
    def written_layers(self) -> list[int]:
        """The layers whose weights are written."""
        return self.layers

    @property
    def clean_evaluation(self) -> CleanEvaluation | None:
        """What the evaluation before the first edit has found; ``None`` if there was none."""
        if "before" not in self.answers:
            return None
        rows, results = self.record_rows.get("before"), self.results.get("before", {})
        return CleanEvaluation(dict(self._before), dict(self.answers["before"]), rows, dict(results))

    def use_before(self, clean: CleanEvaluation) -> None:
        """Compare with what the unedited model has answered elsewhere, instead of asking it in this run.

        Args:
            clean: What it has answered; only ``probes`` are needed for the comparison.
        """
        self._before = {position: list(found) for position, found in clean.probes.items()}
        if clean.answers is not None:
            self.answers["before"] = dict(clean.answers)
        if clean.record_rows is not None:
            self.record_rows["before"] = clean.record_rows
        if clean.results is not None:
            self.results["before"] = dict(clean.results)

    def setup(self, stage: str) -> None:
        """Check the layers and the family from the configuration alone, before any weight is read.

        Raises:
            ValueError: If the layers do not fit the model's depth.
            VocabularyError: If the tokenizer is not the model's.
        """
        given, trusted = self._attached, self.trust_remote_code
        config: Any = load_config(self.model_name, trusted) if given is None else given[0].config
        self._architecture = architecture_of(config, self.architecture_override)
        self.depth = depth = depth_of(config)
        if self.layers_wanted is None:
            self.layers = suggest_layers(depth)
            log.info("--model.layers auto: layers %s of %d, by depth alone", self.layers, depth)
        outside = [layer for layer in self.layers if layer >= depth]
        if outside or not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"--model.layers is {self.layers}, expected different layers from 0 to {depth - 1}: "
                f"{self.model_name!r} has {depth}"
            )
        if self.texts is not None and self.texts.references is not None and self._references is None:
            self._references = References.of(self.texts.references, self.texts.references_subset)
            log.info("consistency: similarity to %s", self._references.label)
        if self._encoder is None:
            tokenizer = load_tokenizer(self.model_name, trusted) if given is None else given[1]
            rows = embedding_rows(config if given is None else given[0])
            self._encoder = PromptEncoder.of(tokenizer, self.chat, self.join, rows=rows)

    def configure_model(self) -> None:
        """Load the language model, once."""
        if self.lm is not None:
            return
        model = self._loaded() if self._attached is None else self._attached[0]
        if self.device_map is None and self._attached is None:
            self.lm = model
        else:
            self.__dict__["lm"] = model  # not as a submodule: Lightning would move all of it to one device
        self.base_fingerprint = fingerprint(model)
        self.origin = origin_of(self.model_name, self.base_fingerprint)
        self.quantization = quantization_of(model)
        written = self.sites.written(written_sites("attn+ffn"), self.layers)
        hold_unquantized(model, [self.sites.weight_name(*p).removesuffix(".weight") for p in written])
        for projection_id in written if self.keep_float32 else []:
            keep_in_float32(self.sites.module(*projection_id))
        if self.patch is not None:
            manifest = apply_patch(model, self.sites, self.patch, self.base_fingerprint)
            self.origin = Origin(self.model_name, self.base_fingerprint, manifest["dtype"])
            self.base_fingerprint = fingerprint(model)  # further edits are of the patched weights

    def _loaded(self) -> nn.Module:
        """The language model from its files, or this process's shard of it."""
        assert self._architecture is not None, "setup runs before configure_model"
        if self.device_map is not None and self.trainer.world_size > 1:
            raise ValueError(
                f"--model.device_map {self.device_map} spreads the model over the devices of one process, expected "
                f"--trainer.devices 1, got {self.trainer.world_size} processes; to shard it over processes, use "
                "ModelParallelStrategy as --trainer.strategy and no device map"
            )
        with load_in_turn(self):
            options = (self.dtype_name, self.attn_implementation, self.device_map, self.trust_remote_code)
            model = load_model(self.model_name, *options, self.quantize)
            set_plain_outputs(model)
            if self.device_mesh is not None:
                shard(model, find_layers(model, self._architecture).layers, self.device_mesh)
        return model

    @property
    def model(self) -> nn.Module:
        """The loaded language model."""
        if self.lm is None:
            raise RuntimeError("the language model is not loaded; run this module in a Trainer")
        return self.lm

    @property
    def encoder(self) -> PromptEncoder:
        """The encoder that makes the model's token rows."""
        assert self._encoder is not None, "setup has not run"
        return self._encoder

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.encoder.tokenizer

    @property
    def sites(self) -> Sites:
        """The model's modules at which vectors are recorded, added and written."""
        assert self._architecture is not None
        return Sites.of(self.model, self._architecture)

    @property
    def described_modules(self) -> str:
        """Paths of the projections, if they are described by hand; empty where the family is known."""
        given = self.architecture_override
        return "" if given is None else f"{given.layers} {given.attn} {given.ffn}"

    @property
    def width(self) -> int:
        """F, the width of the residual stream."""
        return self.sites.width

    def train(self, mode: bool = True) -> EditableModel:
        """Switch the module; the language model stays in eval mode."""
        super().train(mode)
        if self.lm is not None:
            self.lm.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The state without the language model, which is frozen and has files of its own."""
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith("lm.")}

    def transfer_batch_to_device(self, batch: EditBatch, device: torch.device, dataloader_idx: int) -> EditBatch:
        """A batch is text; its token rows are made, and moved, where they are used."""
        return batch

    def log_step(self, group: str, means: Mapping[str, float]) -> None:
        """Log one point, whatever Lightning's logging interval is."""
        for logger in self.loggers:
            logger.log_metrics({f"{group}/{name}": value for name, value in means.items()}, self.inner_step)
        self.inner_step += 1

    # ---- evaluation ------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """The phase of the current evaluation: Lightning's sanity check before the first edit is 'before'."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return "validate"
        return "before" if self.trainer.sanity_checking else "after"

    def evaluate(self, edits: Sequence[Edit], positions: Sequence[int]) -> list[RecordResult]:
        """Ask the questions of some edits with the model as it is now.

        Args:
            edits: The edits.
            positions: Their indices among all edits.
        """
        probes = [edit.probes for edit in edits]
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        clean = [self._before.get(position) for position in positions] if fitting else None
        found = score_probes(
            self.model, self.encoder, probes, self.tokens_per_batch, self.device, self.free_tokens, clean
        )
        texts = self._text_scores(edits, positions)
        results = []
        for position, record, text in zip(positions, found, texts, strict=True):
            before = self._before.get(position)
            compared = tuple(record) if before is None else compare_with_clean(record, before)
            results.append(RecordResult(position, compared, *text))
        return results

    def greedy_answers(self, prompts: Sequence[str]) -> list[str]:
        """What the model, as it is now, says after each prompt.

        Args:
            prompts: Complete texts.
        """
        return greedy_texts(
            self.model, self.encoder, prompts, tokens_per_batch=self.tokens_per_batch, device=self.device
        )

    def _text_scores(self, edits: Sequence[Edit], positions: Sequence[int]) -> list[tuple[float | None, float | None]]:
        """Fluency and consistency of each edit, as far as they are requested."""
        if self.texts is None:
            return [(None, None)] * len(edits)
        prompts = [(i, prompt) for i, edit in enumerate(edits) for prompt in edit.generation_prompts]
        texts = sample_texts(
            self.model,
            self.encoder,
            [prompt for _, prompt in prompts],
            length=self.texts.length,
            top_k=self.texts.top_k,
            seed=self.texts.seed,
            groups=[positions[i] for i, _ in prompts],
            tokens_per_batch=self.tokens_per_batch,
            device=self.device,
        )
        scores: list[tuple[float | None, float | None]] = []
        for i, edit in enumerate(edits):
            generated = [text for (j, _), text in zip(prompts, texts, strict=True) if j == i]
            similarity = None
            if self._references is not None:
                similarity = self._references.consistency(
                    generated, target=edit.target, relation=edit.relation, target_id=edit.target_id
                )
            scores.append((fluency(generated), similarity))
        return scores

    def validation_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Score the edits' questions with the model as it is now."""
        with self.trainer.profiler.profile(self.phase):
            results = self.evaluate(batch.edits, batch.positions)
        if self.phase == "before":
            self._before |= {result.position: list(result.probes) for result in results}
        self._own_answers |= {r.position: answer_line(e, r) for e, r in zip(batch.edits, results, strict=True)}
        self.scores.update(results)

    def test_step(self, batch: EditBatch, batch_idx: int) -> None:
        """As :meth:`validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Compute the scores, over all processes."""
        with self.scores.sync_context():
            rows = self.scores.record_rows() if len(self.scores.rows) else None
        self.scores.reset()
        found = ProcessGroup.of(self.trainer).all_gather_lists(list(self._own_answers.items()))
        self.answers[self.phase], self._own_answers = dict(sorted(found, key=lambda item: item[0])), {}
        if rows is not None:
            self.record_rows[self.phase] = rows
            self.report({name: float(value) for name, value in table_of(rows).items()})
            self.report(old_objects(self.answers[self.phase].values()))

    def on_test_epoch_end(self) -> None:
        """As :meth:`on_validation_epoch_end`."""
        self.on_validation_epoch_end()

    def report(self, values: Mapping[str, float]) -> None:
        """Add metrics to the current evaluation; a callback may do so in its own ``on_validation_epoch_end``."""
        self.results.setdefault(self.phase, {}).update(values)
        if self.phase == "validate":
            self.log_dict(dict(values))

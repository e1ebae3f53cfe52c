"""The Python interface: edits a model object with a list of facts, without configuration file or run folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pmet_lightning.data.records import Edit, check_no_contradictions
from pmet_lightning.editor.edit_report import EditReport
from pmet_lightning.editor.edited_model import EditedModel
from pmet_lightning.editor.facts import Facts, read_facts
from pmet_lightning.editor.history import by_batches, positions_of
from pmet_lightning.editor.isolation import preserve_caller_state
from pmet_lightning.editor.loading import LOADING, check_model, load, load_tokenizer_for, model_name_of, tokenizer_in
from pmet_lightning.editor.names import arguments_named
from pmet_lightning.editor.output import upload_folder, write_adapter_folder, write_model_folder
from pmet_lightning.editor.rewriting import outcomes_of, write_again
from pmet_lightning.editor.settings import EditorSettings, ModelSettings
from pmet_lightning.editor.trainer import make_trainer
from pmet_lightning.evaluation.generation import NEW_TOKENS, greedy_texts
from pmet_lightning.model.patch import read_patch
from pmet_lightning.moments.store import MOMENTS_FOLDER
from pmet_lightning.run.ledger import EditLedger, ask_again
from pmet_lightning.run.manifest import check_same_kind, manifest_of, moments_of, sections_of
from pmet_lightning.run.outcome import answers_before_and_after, outcome_of
from pmet_lightning.run.patch_file import patch_path, save_edits
from pmet_lightning.run.settings import make_objects, read_sections
from pmet_lightning.write.facts import WrittenFact, facts_of


class Editor:
    """Edits facts in a language model in memory, with the same objects, settings and numbers as the command line.

    The model object is edited in place and stays on its device. Its modes and gradient flags, and the random numbers,
    log levels and signal handlers of the program are restored afterwards. Nothing is printed, and nothing is stored
    except second moments, in their cache (``moments={"folder": ...}``).

    Args:
        model: A causal language model of transformers, or the folder or name of one to load, as for
            --model.model_name.
        tokenizer: Its tokenizer, a processor that holds it, or the folder or name to load it from; by default that of
            the model.
        layers: Layers whose weights are edited; 'auto' picks a range by the model's depth.
        corpus: General text for the second moments: a file, a hub data set, or 'atlas-corpus'.
        lam: λ, weight of the second moments against the new keys, in preserved keys.
        lr: Learning rate of Adam (``optimizer`` takes any other optimizer).
        edit_batch: Edits written by one solve; by default all facts of a call.
        device: Device of a model that is loaded by its name; by default the first CUDA device, if there is one.
        progress: Whether progress bars are shown.
        data: Further settings of the section 'data' of a configuration (:class:`~pmet_lightning.EditDataModule`).
        moments: Further settings of the section 'moments' (:class:`~pmet_lightning.SecondMoments`).
        spread: Further settings of the section 'spread' (:class:`~pmet_lightning.WeightSpread`).
        drift: Settings of the section 'drift' (:class:`~pmet_lightning.write.drift.Drift`).
        settings: Settings of the section 'model': ``clamp``, ``steps``, ``optimize`` and everything else that
            :class:`~pmet_lightning.TargetOptimizer` takes.

    Raises:
        ValueError: If a setting is unknown, or its value is invalid.
        TypeError: If the model cannot be edited.
        FileNotFoundError: If model or tokenizer cannot be loaded.

    Attributes:
        model: The language model.
        tokenizer: Its tokenizer.
    """

    @arguments_named()
    def __init__(
        self,
        model: nn.Module | str | Path,
        tokenizer: Any = None,
        *,
        layers: Sequence[int] | Literal["auto"] | None = None,
        corpus: str | None = None,
        lam: float | None = None,
        lr: float | None = None,
        edit_batch: int | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
        data: Mapping[str, Any] | None = None,
        moments: Mapping[str, Any] | None = None,
        spread: Mapping[str, Any] | None = None,
        drift: Mapping[str, Any] | None = None,
        **settings: Unpack[ModelSettings],
    ) -> None:
        adam = None if lr is None else {"class_path": "torch.optim.Adam", "init_args": {"lr": lr}}
        sections = {
            "model": {**settings} | _given(layers=layers, optimizer=adam),
            "data": dict(data or {}) | _given(edit_batch=edit_batch),
            "moments": dict(moments or {}) | _given(corpus=corpus),
            "spread": dict(spread or {}) | _given(lam=lam),
            "drift": dict(drift or {}),
        }
        model = str(model) if isinstance(model, Path) else model
        name = model if isinstance(model, str) else model_name_of(model)
        parts = make_objects(name, sections)  # before anything is loaded
        self.model: Any = load(model, settings, device) if isinstance(model, str) else check_model(model, settings)
        self._processor = load_tokenizer_for(name, tokenizer, bool(settings.get("trust_remote_code")))
        self.tokenizer: Any = tokenizer_in(self._processor)
        self._name, self._sections = name, sections
        self._module, self._moments, self._spread = parts.module, parts.moments, parts.spread
        self._spread.keeps_keys = self._spread.protect_past is not False  # another call may follow
        self._drift, self._data_settings, self._progress = parts.drift, parts.data, progress
        self._module.attach(self.model, self.tokenizer)
        self._module.setup("fit")
        self._module.configure_model()
        self._moments_identity: dict[str, Any] | None = None  # of a patch
        self._written = EditedModel(self._module, self._spread)

    @classmethod
    @arguments_named()
    def from_config(
        cls,
        config: str | Path,
        model: nn.Module | str | Path | None = None,
        tokenizer: Any = None,
        **changes: Unpack[EditorSettings],
    ) -> Editor:
        """An editor with the settings of a configuration.

        The settings of the run (``trainer``, ``seed_everything``) and where the records come from (``data.path``,
        ``data.stream``) are ignored, and if a model object is given, so are those that say how to load one.

        Args:
            config: A path, or the name of a shipped configuration such as pmet.yaml.
            model: As for the class; by default the configuration's.
            tokenizer: As for the class.
            changes: Settings that replace the configuration's, as for the class.

        Raises:
            FileNotFoundError: If there is no such configuration.
            ValueError: If it is not the configuration of an edit run, or a change is invalid.
        """
        configured = read_sections(str(config))
        model_name = configured["model"].pop("model_name")
        if model is None and not model_name:
            raise ValueError(f"{config} names no model; give one: Editor.from_config({str(config)!r}, model)")
        unused = (*(LOADING if isinstance(model, nn.Module) else ()), *(("optimizer",) if "lr" in changes else ()))
        settings = {name: value for name, value in configured.pop("model").items() if name not in unused}
        replaced: dict[str, Any] = {**changes}
        sections = {name: {**section, **(replaced.pop(name, None) or {})} for name, section in configured.items()}
        return cls(model_name if model is None else model, tokenizer, **{**settings, **replaced, **sections})

    @classmethod
    @arguments_named()
    def from_patch(
        cls,
        patch: str | Path,
        model: nn.Module | str | Path | None = None,
        tokenizer: Any = None,
        *,
        moments_folder: str | Path = MOMENTS_FOLDER,
        device: str | torch.device | None = None,
    ) -> Editor:
        """An editor that goes on where a patch ends: its facts are in the model, and can be listed, removed, corrected.

        Nothing is optimized and no corpus is read: contexts, targets and settings are those of the patch, the second
        moments those that were used for it, in their cache.

        Args:
            patch: A patch.safetensors, or the run folder with it.
            model: The base model, without edits; by default the one that the patch names.
            tokenizer: As for the class.
            moments_folder: The cache of second moments (``stats --list`` shows it).
            device: As for the class.

        Raises:
            FileNotFoundError: If there is no such patch or model.
            PatchError: If the patch was made for other weights, or by a version that kept no targets.
        """
        path = patch_path(patch)
        kept = read_patch(path)
        sections = sections_of(kept.manifest, moments_folder)
        settings: Any = sections["model"]
        if not isinstance(model, nn.Module):
            settings |= {"dtype": kept.manifest["dtype"], "quantize": kept.manifest.get("quantize")}
        name = kept.manifest["model"] if model is None else model
        editor = cls(name, tokenizer, device=device, **settings, moments=sections["moments"], spread=sections["spread"])
        editor._moments_identity = kept.manifest["moments"]
        editor._written.take_over(path, kept)
        return editor

    @property
    def layers(self) -> list[int]:
        """The edited layers."""
        return list(self._module.layers)

    @property
    def edits_written(self) -> int:
        """Number of edits that are in the weights."""
        return self._module.edits_done

    @property
    def facts(self) -> tuple[WrittenFact, ...]:
        """The facts that are in the weights, in the order of writing, without those that were corrected or removed."""
        return self._spread.edited.facts

    @arguments_named()
    def evaluate(self, facts: Facts) -> dict[str, float]:
        """Evaluate the model, as it is now, on the questions of some facts (the command ``validate``).

        Args:
            facts: As for :meth:`edit`.

        Returns:
            The scores: percentages, with the bounds of their 95 % intervals (``efficacy``, ``efficacy_low``, …).

        Raises:
            RecordError: If a fact is invalid; the message names it, such as "facts[3]".
        """
        data = read_facts(facts, self.tokenizer, self._data_settings)
        self._module.reset_results()
        with preserve_caller_state(self.model, self._device):
            trainer = make_trainer(self._device, [self._drift], evaluate=True, progress=self._progress)
            trainer.validate(self._module, data, verbose=False)
        return dict(self._module.results.get("validate", {}))

    @arguments_named()
    def ask(self, prompts: str | Sequence[str], new_tokens: int = NEW_TOKENS) -> list[str]:
        """Let the model, as it is now, continue each prompt by greedy decoding.

        Args:
            prompts: Complete texts without ``{}``, or a single one.
            new_tokens: Maximum number of tokens of a continuation.

        Returns:
            The continuation of each prompt.

        Raises:
            ValueError: If a prompt has no token; the message names it.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for number, row in enumerate(self._module.encoder.encode_all(prompts)):
            if not row.ids:
                raise ValueError(
                    f"prompts[{number}] is {prompts[number]!r}, which has no token; expected a text that the model can "
                    "continue"
                )
        with preserve_caller_state(self.model, self._device):
            return greedy_texts(
                self.model,
                self._module.encoder,
                prompts,
                tokens_per_batch=self._module.tokens_per_batch,
                device=self._device,
                new_tokens=new_tokens,
            )

    @arguments_named()
    def generate(self, prompts: str | Sequence[str], **settings: Any) -> list[str]:
        """Let the model, as it is now, continue each prompt by its own ``generate``, as it would be served.

        Args:
            prompts: Complete texts, or a single one; in a chat, user messages.
            settings: Settings of transformers' ``generate``: ``max_new_tokens``, ``do_sample``, ``temperature``, …

        Returns:
            The continuation of each prompt.
        """
        rows = self._module.encoder.encode_all([prompts] if isinstance(prompts, str) else list(prompts))
        texts = []
        with preserve_caller_state(self.model, self._device), torch.no_grad():
            self.model.eval()
            for row in rows:
                ids = torch.tensor([row.ids], device=self._device)
                output = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
                texts.append(self.tokenizer.decode(output[0, len(row.ids) :], skip_special_tokens=True))
        return texts

    @arguments_named()
    def edit(
        self,
        facts: Facts,
        subject: str | None = None,
        target: str | None = None,
        *,
        evaluate: bool = True,
        run_dir: str | Path | None = None,
    ) -> EditReport:
        """Write facts into the model's weights, after what earlier calls have written (the command ``fit``).

        Either all of them are written or, if anything fails or the call is interrupted, none.

        Args:
            facts: Records as in a file (COUNTERFACT, zsRE or flat ones: ``prompt`` with ``{}``, ``subject``,
                ``target_new``), :class:`~pmet_lightning.Edit` objects, a table (pandas, polars, pyarrow, datasets) or a
                mapping of parallel lists with such columns (also under EasyEdit's names), or what --data.path takes: a
                file or a hub data set, or a list or tuple of several. With ``subject`` and ``target``, the prompt of a
                single fact.
            subject: The subject of a single fact, which takes the place of the ``{}`` in its prompt.
            target: The new object of a single fact.
            evaluate: Whether the model is evaluated on the facts before and after.
            run_dir: A new folder for all files that a run of the command line stores; ``None`` stores nothing.

        Raises:
            RecordError: If a fact is invalid; the message names it, such as "facts[3]".
            FloatingPointError: If a number is not finite.
            FileExistsError: If the folder holds another run.
            RuntimeError: If something else has changed the edited weights since the editor last wrote them.
        """
        single = {"prompt": facts} | _given(subject=subject, target_new=target)
        data = read_facts(facts if len(single) == 1 else single, self.tokenizer, self._data_settings)
        self._written.check_unchanged()
        before = self._spread.edited.snapshot(self._module)
        ledger = EditLedger(keep=True)
        self._module.reset_results()
        self._drift.ended = ""
        try:
            with preserve_caller_state(self.model, self._device):
                callbacks = [self._moments, self._spread, self._drift, ledger]
                trainer = make_trainer(self._device, callbacks, run_dir, evaluate=evaluate, progress=self._progress)
                trainer.fit(self._module, data)
                outcome = outcome_of(trainer, self._module, ledger.edits, self._undone(before.facts, ledger.edits))
            self._drift.check(outcome.verdict.damage)
        except BaseException:
            self._spread.edited.restore(before)
            raise
        done = self._module.batches_done + ledger.count, self._module.edits_done + len(ledger.edits)
        self._written.record(before, *done)
        return EditReport(
            dict(self._module.results),
            tuple(ledger.edits),
            tuple(ledger.layers),
            self._drift.ended,
            outcome.verdict,
            outcome.edits,
            tuple(answers_before_and_after(self._module)),
        )

    @arguments_named()
    def tune(
        self,
        facts: Facts | None = None,
        *,
        minutes: float = 30.0,
        trials: int | None = None,
        edits: int | None = None,
        analysis: str | Path | None = None,
        seed: int = 0,
        folder: str | Path | None = None,
    ) -> dict[str, Any]:
        """Find settings for this model, which must have no edits yet (the command ``tune``).

        Args:
            facts: As for :meth:`edit`; they are divided at random, by subject, into records to tune on and records to
                report. By default shipped ones that the model knows.
            minutes: Time that the search may take.
            trials: Number of trials instead of a time: the same number and seed give the same answer.
            edits: Edits to be written in one edit batch later; by default as many as records and time allow.
            analysis: Folder of an analysis of this model (the command ``analyze``): the layers that it proposes, if it
                is sure of them or they are likely, are looked at before all others.
            seed: Seed of the search.
            folder: A folder for the configuration, the page and all that was measured; a search that was stopped goes
                on there. ``None`` keeps nothing.

        Returns:
            Keyword arguments for another editor: ``Editor(model, **settings)``.

        Raises:
            RecordError: If a fact is invalid, or there are too few.
            FileNotFoundError: If there is no such analysis.
            ValueError: If the model knows too few of the shipped facts, or the analysis is none.
            RuntimeError: If facts are written already.
        """
        if self.edits_written:
            raise RuntimeError(f"tune: {self.edits_written} edits are in the weights; take them back first (revert)")
        from pmet_lightning.tune.budget import Budget
        from pmet_lightning.tune.python import tune_object

        budget = Budget.of(minutes, trials, edits, analysis=analysis)
        own = None if facts is None else read_facts(facts, self.tokenizer, self._data_settings).edits
        with preserve_caller_state(self.model, self._device), tempfile.TemporaryDirectory() as temporary:
            kept = Path(temporary if folder is None else folder).expanduser()
            return tune_object(self._module, self._name, self._sections, own, budget, kept, seed)

    @arguments_named()
    def remove(self, facts: str | Mapping[str, Any] | Edit | Iterable[str | Mapping[str, Any] | Edit]) -> None:
        """Take single facts out of the weights: the others are written again, without them, from their kept targets.

        Only a target that a fact shared with one of them, as facts about one subject may, is found again; no text
        corpus is read. After a single edit batch the model is what it would be if it had never had those facts, to
        rounding; targets of later edit batches were found while they were there.

        Args:
            facts: Which: a subject, a question with its subject filled in, a case id, a record or an Edit; or several.

        Raises:
            ValueError: If one of them names no written fact.
            RuntimeError: If something else has changed the edited weights.
        """
        out = set(positions_of(self.facts, facts))
        self._written.check_unchanged()
        kept = by_batches(fact for i, fact in enumerate(self.facts) if i not in out)
        self._rewrite(kept, [by_batches(self.facts)])

    @arguments_named()
    def merge(self, *patches: str | Path) -> None:
        """Join the facts of patches with those of this editor: all are written as one edit batch, from kept targets.

        Facts of one subject that have to share a target now, and did not before, get one that is found anew.

        Args:
            patches: Patches of the same base model, layers and settings. A fact that both have is written once.

        Raises:
            FileNotFoundError: If there is no such patch.
            PatchError: If a patch is of another model or kind; the message says what differs.
            RecordError: If facts contradict each other.
        """
        facts, before, manifest = list(self.facts), [by_batches(self.facts)], self._manifest()
        for given in patches:
            path = patch_path(given)
            kept = read_patch(path)
            check_same_kind(manifest, kept.manifest, path)
            more = facts_of(kept.manifest["facts"], kept.targets, str(path))
            facts, before = [*facts, *more], [*before, by_batches(more)]
        check_no_contradictions([fact.edit for fact in facts])
        self._written.check_unchanged()
        self._rewrite([list({fact.question: fact for fact in reversed(facts)}.values())[::-1]], before)

    def undo(self, steps: int = 1) -> None:
        """Take back the last calls of :meth:`edit` and :meth:`remove`.

        The weights are then what they were before: bit by bit for the last call, and where nothing is left; otherwise
        to rounding, as the weights themselves are kept for one call only.

        Args:
            steps: Number of calls.

        Raises:
            RuntimeError: If there are fewer calls, or something else has changed the edited weights.
        """
        self._written.undo(steps)

    def revert(self) -> None:
        """Undo all edits: the weights are bit by bit what they were when the editor was made.

        Raises:
            RuntimeError: If something else has changed the edited weights.
        """
        self._written.revert()

    @arguments_named()
    def save(self, folder: str | Path) -> None:
        """Write the model as it is now, and its tokenizer, as a Hugging Face folder (the command ``export``).

        With ``keep_float32``, all weights are written in float32, so that nothing of the edits is rounded away.

        Args:
            folder: The folder to write; must be new or empty.

        Raises:
            FileExistsError: If the folder is not empty.
        """
        deltas = self._spread.edited.deltas
        described, in_float32 = self._described() if deltas else {}, self._module.keep_float32
        write_model_folder(folder, self.model, self._processor, deltas, described, in_float32=in_float32)

    def save_pretrained(self, folder: str | Path) -> None:
        """As :meth:`save`, under transformers' name."""
        self.save(folder)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload what :meth:`save` writes, with its card, to a repository on the Hugging Face hub.

        Args:
            repo_id: The repository, which is made if it does not exist.
            private: Whether a new repository is private; by default as the account says.
            token: An access token; by default the one that was logged in with.

        Returns:
            The address of the commit.
        """
        return upload_folder(self.save, repo_id, private, token)

    @arguments_named()
    def save_patch(self, path: str | Path) -> None:
        """Write ΔW of all edits so far and its manifest, in the format of --model.patch and ``export``.

        Args:
            path: A .safetensors file; the manifest is also written to a file beside it.

        Raises:
            ValueError: If nothing has been edited.
        """
        if not self._spread.edited.deltas:
            raise ValueError("Editor.save_patch: nothing has been edited, so there is no patch")
        save_edits(path, self._spread.edited, self._manifest(), self._spread.stores_keys)

    @arguments_named()
    def save_adapter(self, folder: str | Path) -> int:
        """Write ΔW of all edits so far as a LoRA adapter for ``peft`` (``export --format peft``).

        Args:
            folder: The folder to write; must be new or empty.

        Returns:
            The rank of the adapter.

        Raises:
            ValueError: If nothing has been edited.
            FileExistsError: If the folder is not empty.
            PmetError: If ``peft`` is not installed.
        """
        if not self._spread.edited.deltas:
            raise ValueError("Editor.save_adapter: nothing has been edited, so there is no adapter")
        return write_adapter_folder(folder, self._spread.edited.deltas, self._described())

    def _described(self) -> dict[str, Any]:
        """The manifest with the facts."""
        return {**self._manifest(), "facts": [fact.plain() for fact in self.facts]}

    def _manifest(self) -> dict[str, Any]:
        """The description of all edits so far."""
        module = self._module
        moments = self._moments_identity or moments_of(module, self._moments)
        return manifest_of(module, self._spread, moments, module.batches_done, module.edits_done)

    @property
    def _device(self) -> torch.device:
        """Device of the model's inputs."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.device

    def _rewrite(
        self, batches: Sequence[Sequence[WrittenFact]], before: Sequence[Sequence[Sequence[WrittenFact]]]
    ) -> None:
        """Write facts, from the targets that they had in other edit batches, in place of what is there."""
        with self._written.rewriting(len(batches), sum(map(len, batches))):
            if batches:
                trainer = make_trainer(
                    self._device, [self._moments, self._spread], evaluate=False, progress=self._progress
                )
                with preserve_caller_state(self.model, self._device):
                    write_again(batches, before, self._module, trainer)
                self._spread.edited.record_outcomes(outcomes_of(batches))

    def _undone(self, earlier: Sequence[WrittenFact], lines: Sequence[Mapping[str, Any]]) -> list[str]:
        """Questions of earlier calls about the same subjects that the model, as it is now, no longer answers."""
        replaced = {(line["prompt"], line["subject"]) for line in lines}  # on purpose
        subjects = {line["subject"] for line in lines}
        asked = [f for f in earlier if f.said and f.edit.subject in subjects and f.question not in replaced]
        if not asked:
            return []
        answers = ask_again(self._module, [fact.plain() for fact in asked])
        return [fact.edit.question for fact, (_, said) in zip(asked, answers, strict=True) if not said]


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}

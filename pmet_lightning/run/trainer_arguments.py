"""What each argument of Lightning's Trainer means for an edit run: offered, hidden, or refused with the reason.

A run is one pass over the edits: its targets are found by an optimizer of its own, and each edit batch is written once.
Much of what steers an ordinary training would edit nothing, edit several times, or count wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainerArgument:
    """One argument of Lightning's Trainer.

    Attributes:
        text: What it does here; of a refused argument, why it is refused and what to use.
        allowed: The values that a refused argument may have; ``None`` for one that takes any value.
        shown: Whether the help lists it.
    """

    text: str
    allowed: tuple[Any, ...] | None = None
    shown: bool = True


def _refused(text: str, *allowed: Any) -> TrainerArgument:
    return TrainerArgument(text, (None, *allowed), shown=False)


def _hidden(text: str) -> TrainerArgument:
    return TrainerArgument(text, shown=False)


_ONE_PASS = "a run is one pass over the edits; "

# All of them, in the order of Lightning's signature; a test compares the names.
ARGUMENTS: dict[str, TrainerArgument] = {
    "accelerator": TrainerArgument("Where the run takes place: cpu, gpu, or auto, which takes a GPU if there is one."),
    "strategy": TrainerArgument("How several devices work together: ddp, or the ModelParallelStrategy (FSDP2)."),
    "devices": TrainerArgument("Number of devices, or a list of their numbers."),
    "num_nodes": TrainerArgument("Number of machines."),
    "precision": _refused("--model.dtype sets the precision of the model", 32, "32", "32-true"),
    "logger": TrainerArgument("Further or other loggers; false writes neither TensorBoard events nor metrics.csv."),
    "callbacks": TrainerArgument("Callbacks of your own, run before those of this package."),
    "fast_dev_run": _refused("it would edit one batch and record nothing; for a trial run, set --data.limit 5", False),
    "max_epochs": _refused(_ONE_PASS + "more would write every edit several times. For more iterations: --model.steps "
                           "(of finetune: --model.epochs)", 1),
    "min_epochs": _refused(_ONE_PASS + "leave it out", 0, 1),
    "max_steps": _refused("it would end in the middle of the edits; --data.limit takes fewer edits, "
                          "--model.steps fewer iterations", -1),
    "min_steps": _refused(_ONE_PASS + "leave it out", 0),
    "max_time": _refused("it would end in the middle of the edits; set --data.limit, or end the run with Ctrl-C: "
                         "--trainer.resume true goes on after the last edit batch"),
    "limit_train_batches": _refused("it would leave out edits, of which the report would know nothing; --data.limit "
                                    "takes fewer edits", 1.0),
    "limit_val_batches": TrainerArgument("0 turns the evaluation off; a part of it would be reported as the whole, and "
                                         "--data.limit takes fewer edits.", (None, 0, 0.0, 1.0)),
    "limit_test_batches": _refused("a part of the evaluation would be reported as the whole; --data.limit takes fewer "
                                   "edits", 1.0),
    "limit_predict_batches": _hidden("Not used: there is no prediction."),
    "overfit_batches": _refused("it would repeat a part of the edits; --data.limit takes fewer edits", 0, 0.0),
    "val_check_interval": _refused("edits are evaluated before the first and after the last edit batch; a stream "
                                   "(--data.stream true) is evaluated at every edit batch", 1.0),
    "check_val_every_n_epoch": _refused(_ONE_PASS + "edits are evaluated after it", 1),
    "num_sanity_val_steps": TrainerArgument("0 leaves out the evaluation before the first edit; a part of it would be "
                                            "reported as the whole.", (None, 0, -1)),
    "log_every_n_steps": _hidden("Not used: every step of the targets is logged."),
    "enable_checkpointing": _refused("the result is the patch, and --trainer.resume true needs no checkpoint", False),
    "enable_progress_bar": TrainerArgument("false shows no progress bars."),
    "enable_model_summary": _hidden("true lists the modules of the language model."),
    "accumulate_grad_batches": _refused("each edit has an optimizer state of its own; --model.micro_batch says how "
                                        "many are optimized together", 1),
    "gradient_clip_val": _refused("each delta is bounded by --model.clamp", 0, 0.0),
    "gradient_clip_algorithm": _refused("each delta is bounded by --model.clamp"),
    "deterministic": TrainerArgument("true uses deterministic algorithms only, or warn."),
    "benchmark": _hidden("Not used: there are no convolutions."),
    "inference_mode": TrainerArgument("Of the evaluation: inference_mode, or no_grad."),
    "use_distributed_sampler": _hidden("Always false: the edits are distributed by this program."),
    "profiler": TrainerArgument("A profiler of Lightning in place of the one that times the phases of a run."),
    "detect_anomaly": TrainerArgument("true finds the operation that made a NaN; slow."),
    "barebones": _refused("it turns off logging and progress, by which a run is recorded", False),
    "plugins": TrainerArgument("Plugins of Lightning, such as a cluster environment."),
    "sync_batchnorm": _refused("language models have no batch norm", False),
    "reload_dataloaders_every_n_epochs": _refused(_ONE_PASS + "a file that grows is for --data.stream true", 0),
    "default_root_dir": _hidden("The run folder; set it with --trainer.run_dir."),
    "enable_autolog_hparams": _hidden("false does not log the settings."),
    "model_registry": _refused("there are no checkpoints to upload; export writes the edited model"),
}  # fmt: skip


def refusal(name: str, value: Any) -> str | None:
    """Why a value of an argument of Lightning's Trainer is refused; ``None`` if it is not.

    Args:
        name: Name of the argument.
        value: Its value.
    """
    argument = ARGUMENTS.get(name)
    if argument is None or argument.allowed is None:
        return None
    if any(type(value) is type(one) and value == one for one in argument.allowed):
        return None
    return f"--trainer.{name} {value} is refused: {argument.text}"


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of Lightning's Trainer that make no sense in an edit run.

    Args:
        given: Arguments and their values; Lightning's defaults are allowed.

    Raises:
        ValueError: With the reason of the first that is refused.
    """
    for name, value in given.items():
        reason = refusal(name, value)
        if reason is not None:
            raise ValueError(reason)

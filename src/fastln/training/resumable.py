"""transformers' Trainer with small checkpoints that are never partial; a resumed run gives the same bits."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastln.adapters import TRAINED, name_or_path
from fastln.budget import AtFirstBatch
from fastln.changes import Marks, frozen, mark_buffers, marks
from fastln.engines import can_restore, is_on_prepared
from fastln.errors import FastLNError
from fastln.files import expanded
from fastln.origin import ORIGIN, Origin, read_origin
from fastln.state import prepared
from fastln.training import adalora, checkpoints
from fastln.training.internals import check_internals
from fastln.training.trained import activations_of, load_trained, products_of, save_trained, trained_parameters
from fastln.watch import check_finite

logger = logging.getLogger(__name__)

check_internals()


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints hold what changes, and the states of optimizer, scheduler, sampler and generators.

    A checkpoint is also an adapter where one can hold what trains, and it has the tokenizer or processor and the
    arguments, as stock ones have (`fastln.training.trained`). Checkpoints appear complete or not at all
    (`fastln.training.checkpoints`), and never with a value that is not finite. `train(resume_from_checkpoint=True)`
    takes the last complete one. Sharded models (FSDP, DeepSpeed) are saved in transformers' own form.
    """

    _staging: Path | None = None
    _to_push: str | None = None
    _frozen: Marks | None = None

    @property
    def _method_arguments(self) -> dict[str, Any]:
        """The arguments of `put_method` that made the model, for the checkpoint."""
        return {}

    @property
    def _origin(self) -> Origin:
        """What the base is, for the checkpoint."""
        return Origin(name_or_path(self.model), str(next(self.model.parameters()).dtype).removeprefix("torch."))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as in `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: True for the last complete checkpoint in the output folder (a warning names those
                that are skipped), or a checkpoint's folder.
            *args: as the Trainer takes them.
            **kwargs: as the Trainer takes them.

        Raises:
            FastLNError: if the given checkpoint is not complete, or the output folder has no complete one.
        """
        folder = Path(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(checkpoints.last_whole(folder))
        elif resume_from_checkpoint:
            resume_from_checkpoint = expanded(str(resume_from_checkpoint))
            wrong = checkpoints.what_is_wrong(Path(resume_from_checkpoint))
            if wrong is not None:
                others = [path for path in checkpoints.checkpoints_in(folder) if not checkpoints.what_is_wrong(path)]
                hint = f"; {others[0]} is whole" if others else ""
                raise FastLNError(f"{resume_from_checkpoint}: {wrong}{hint}")
        if resume_from_checkpoint:
            self._tell_missing(Path(resume_from_checkpoint))
            logger.info("continuing from %s", resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _tell_missing(self, checkpoint: Path) -> None:
        """Log which states a checkpoint lacks, and what that does to the training."""
        if self._sharded:  # other files
            return
        rng = "rng_state.pth" if self.args.world_size <= 1 else f"rng_state_{self.args.process_index}.pth"
        states = {
            OPTIMIZER_NAME: "the optimizer's averages start at 0",
            SCHEDULER_NAME: "the learning rate takes up the schedule at the checkpoint's step",
            rng: "random numbers (dropout, the order of later epochs) are others than without the interruption",
        }
        if getattr(self.accelerator, "scaler", None) is not None:
            states[SCALER_NAME] = "the loss scale starts anew"
        missing = [name for name in states if not (checkpoint / name).is_file()]
        if missing:
            logger.warning(
                "%s has no %s, as with save_only_model: %s",
                checkpoint,
                ", ".join(missing),
                "; ".join(states[name] for name in missing),
            )

    def _tell_arithmetic(self, checkpoint: Path) -> None:
        """Warn if this training computes in another form than the one that a checkpoint is of."""
        entries = read_origin(checkpoint)[1]
        for name, now in (("products", products_of(self.model)), ("activations", activations_of(self.model))):
            if entries.get(name) not in (None, now):  # earlier versions do not say it
                logger.warning(
                    "%s was trained with %s %r, and this training goes on with %s %r: its losses and gradients are "
                    "those of other arithmetic",
                    checkpoint,
                    name,
                    entries[name],
                    name,
                    now,
                )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # torch's, of parameter groups
            if checkpoint is None:
                raise
            raise FastLNError(
                f"{checkpoint}: its optimizer does not fit this training ({error}): resume with the arguments of the "
                "run that wrote it, such as method, also, scope and norm_learning_rate"
            ) from error
        if checkpoint is not None and not self._sharded and not (Path(checkpoint) / SCHEDULER_NAME).is_file():
            if not isinstance(self.lr_scheduler, LambdaLR):
                name = type(self.lr_scheduler).__name__
                logger.warning("%s cannot take up its schedule without its state: the learning rate starts anew", name)
                return
            _set_step(self.lr_scheduler, self.state.global_step)

    def _mark_start(self) -> None:
        """Mark what does not train, the first time that training starts, to save what changes of it."""
        if self._frozen is None and not self._sharded:
            mark_buffers(self.model)
            self._frozen = marks(frozen(self.model))

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._mark_start()
        return super()._prepare_for_training(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model as the Trainer does; in a checkpoint, only what changed.

        Only that is saved, too, of a model whose own weights 8-bit ones replaced.

        Peft's layers on a prepared model are saved as in a checkpoint too, because peft's form would leave out what
        trains of the model itself.
        """
        is_whole = self._staging is None and not is_on_prepared(self.model) and can_restore(self.model)
        if self._sharded or is_whole:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._mark_start()
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if self._staging is None and not can_restore(self.model):
                logger.warning(
                    "%s gets what trained, without the base, as 8-bit weights replaced those of the model: `fastln "
                    "merge` makes the whole model, or keep_weights=True from the start",
                    folder,
                )
            save_trained(self.model, folder, self._frozen or {}, self._origin, self._method_arguments)
            adalora.save_importance(self.model, folder)
            # As stock does.
            tools = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tools is not None:
                tools.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self._sharded:
            check_finite(trained_parameters(self.model), self.state.global_step)
        # The Trainer's own code writes to the staging folder: meanwhile `_get_output_dir` returns that.
        run_folder = self._get_output_dir(trial)
        place = Path(run_folder)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = place / checkpoints.STAGING
        best = self._best(run_folder)
        try:
            if self.args.should_save:
                place.mkdir(parents=True, exist_ok=True)
                checkpoints.clear_leftovers(place)
            self.accelerator.wait_for_everyone()
            self._staging = staging
            super()._save_checkpoint(model, trial)
            if (waiting := waits_for_batches(self.model)) is not None:
                (staging / name).mkdir(parents=True, exist_ok=True)
                self._decision_in(staging / name).write_text(json.dumps(waiting.decision), encoding="utf-8")
            self.state.best_model_checkpoint = best
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.publish(staging / name, place / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save:
                checkpoints.clear_leftovers(place)
            before = next((str(path) for path in checkpoints.checkpoints_in(place)), "none")
            raise FastLNError(f"{place / name} cannot be written ({error}); the last checkpoint is {before}") from error
        finally:
            self._staging = None
        if self.args.should_save:
            checkpoints.clear_leftovers(place)
            checkpoints.rotate(place, self.args.save_total_limit, {place / name, *([Path(best)] if best else [])})
        self.accelerator.wait_for_everyone()
        if self._to_push is not None:
            self._to_push = None
            self._push_from_checkpoint(str(place / name))

    def _best(self, folder: str) -> str | None:
        """Return where the best checkpoint is, or will be, as stock writes it."""
        step = self.state.best_global_step
        if not step:
            return self.state.best_model_checkpoint
        best = os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        return best if step == self.state.global_step or os.path.isdir(best) else self.state.best_model_checkpoint

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Only once it is in its place.
        if self._staging is not None:
            self._to_push = checkpoint_folder
        else:
            for name in (TRAINED, ORIGIN):  # stock copies the others
                if (Path(checkpoint_folder) / name).is_file() and self.is_world_process_zero():
                    shutil.copy(Path(checkpoint_folder) / name, self.args.output_dir)
            super()._push_from_checkpoint(checkpoint_folder)

    def _decision_in(self, checkpoint: Path) -> Path:
        """The file of what a memory budget decided, one of each process, as each sees batches of its own."""
        return checkpoint / f"memory_budget_{self.args.process_index}.json"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        waiting, decision = waits_for_batches(self.model), self._decision_in(Path(resume_from_checkpoint))
        if waiting is not None and decision.is_file():
            waiting.decide_as(json.loads(decision.read_text(encoding="utf-8")))
        if self._sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self._mark_start()
        load_trained(self.model, Path(resume_from_checkpoint))
        self._tell_arithmetic(Path(resume_from_checkpoint))
        adalora.load_importance(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._sharded:
            super()._load_best_model()
            return
        best = Path(self.state.best_model_checkpoint)
        if not best.is_dir():
            logger.warning("%s, the best checkpoint, is gone: the model keeps the values of the last step", best)
            return
        logger.info("loading the best checkpoint, %s", best)
        load_trained(self.model, best)

    @property
    def _sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled


def waits_for_batches(model: nn.Module) -> AtFirstBatch | None:
    """Return what chooses storage modes by batches, for a memory budget; None if there is none.

    Args:
        model: A model, or peft's wrapper of it.
    """
    state = prepared(model.get_base_model() if isinstance(model, PeftModel) else model)
    undo = () if state is None else state.undo
    return next((change for change in undo if isinstance(change, AtFirstBatch)), None)


def _set_step(scheduler: LambdaLR, step: int) -> None:
    """Put a schedule at a step."""
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    scheduler._last_lr = [
        base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate

"""transformers' Trainer with small checkpoints that are never partial; a resumed run gives the same bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastln.errors import FastLNError
from fastln.files import expanded
from fastln.training import adalora, checkpoints
from fastln.training.internals import check_internals
from fastln.watch import check_finite

logger = logging.getLogger(__name__)

check_internals()


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints hold what trains, and the states of optimizer, scheduler, sampler and generators.

    Checkpoints appear complete or not at all (`fastln.training.checkpoints`), and never with a value that is not
    finite. `train(resume_from_checkpoint=True)` takes the last complete one. Sharded models (FSDP, DeepSpeed) are saved
    in transformers' own form.
    """

    _staging: Path | None = None
    _to_push: str | None = None

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
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model as the Trainer does, or only the trained parameters in a checkpoint."""
        if not _internal_call or self._sharded:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints.save_trained(self.model, folder)
            adalora.save_importance(self.model, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self._sharded:
            check_finite(checkpoints.trained_parameters(self.model), self.state.global_step)
        # The Trainer's own code writes to the staging folder: meanwhile `_get_output_dir` returns that.
        place = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = place / checkpoints.STAGING
        best = self._best(place)
        try:
            if self.args.should_save:
                place.mkdir(parents=True, exist_ok=True)
                checkpoints.clear_leftovers(place)
            self.accelerator.wait_for_everyone()
            self._staging = staging
            super()._save_checkpoint(model, trial)
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

    def _best(self, place: Path) -> str | None:
        """Return where the best checkpoint is, or will be."""
        step = self.state.best_global_step
        if not step:
            return self.state.best_model_checkpoint
        best = place / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        return str(best) if step == self.state.global_step or best.is_dir() else self.state.best_model_checkpoint

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Only once it is in its place.
        if self._staging is not None:
            self._to_push = checkpoint_folder
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        checkpoints.load_trained(self.model, Path(resume_from_checkpoint))
        adalora.load_importance(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._sharded:
            super()._load_best_model()
            return
        logger.info("loading the best checkpoint, %s", self.state.best_model_checkpoint)
        checkpoints.load_trained(self.model, Path(self.state.best_model_checkpoint))

    @property
    def _sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

"""Training and evaluation of the methods on the models."""

from fastln.training.evaluate import evaluate, predict
from fastln.training.optimizer import MasterAdamW, parameter_groups
from fastln.training.trainer import TrainConfig, TrainResult, build_optimizer, train_task

__all__ = [
    "MasterAdamW",
    "TrainConfig",
    "TrainResult",
    "build_optimizer",
    "evaluate",
    "parameter_groups",
    "predict",
    "train_task",
]

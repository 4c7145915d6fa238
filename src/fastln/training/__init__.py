"""Training and evaluation of the methods on the models."""

from fastln.training.config import TrainConfig, TrainFiles, TrainResult
from fastln.training.evaluate import evaluate, predict
from fastln.training.features import cached_features
from fastln.training.optimizer import MasterAdamW, parameter_groups
from fastln.training.task_trainer import build_optimizer
from fastln.training.tensor_store import TensorStore
from fastln.training.train import train_task

__all__ = [
    "MasterAdamW",
    "TensorStore",
    "TrainConfig",
    "TrainFiles",
    "TrainResult",
    "build_optimizer",
    "cached_features",
    "evaluate",
    "parameter_groups",
    "predict",
    "train_task",
]

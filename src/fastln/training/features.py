"""The feature cache: a frozen vision tower runs once per image; later epochs and runs read its output from disk.

The key of an output covers the image's pixel values as the tower receives them, the tower's weights, and everything
else that the values depend on. The cache returns the same bits as the tower would compute, with one exception: a matrix
product may round differently for another number of images in the batch. We have not seen torch's CPU products do so on
the rows of all tokens, and the pooling, with one row per image, is computed each time. If a tower does round
differently, a warning says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fastln.errors import FastLNError
from fastln.families import parameters_in
from fastln.machine import cpu_model
from fastln.methods import get_method, select_parameters
from fastln.models import VQATask
from fastln.models.image_size import INTERPOLATE
from fastln.originals import originals
from fastln.standins.part import code_of
from fastln.training.tensor_store import TensorStore, as_bytes
from fastln.versions import package_version

logger = logging.getLogger(__name__)

HIDDEN, POOLED = "last_hidden_state", "pooler_output"
# The fields of a configuration that only say where it is from.
_ORIGIN = ("_name_or_path", "architectures", "dtype", "transformers_version")
_POOLING = ("pooler", "head")  # transformers' name for the module that pools the last hidden states


@contextlib.contextmanager
def cached_features(tower: nn.Module, store: TensorStore | None) -> Iterator[None]:
    """Run `tower` only once per image while the context lasts; changes `tower` in place.

    Within the context, the tower's weights must not change. A call with arguments other than pixel values and
    `interpolate_pos_encoding`, such as a request for attention weights, bypasses the cache.

    Args:
        tower: a vision model of transformers: from (n_images, channels, height, width) it computes `last_hidden_state`,
            (n_images, n_tokens, n_cols), and perhaps `pooler_output`, (n_images, n_cols).
        store: the store of its output; None for no caching.

    Raises:
        FastLNError: at the first call whose output must not be cached: a parameter of the tower trains, the tower draws
            random numbers (dropout), or it computes statistics over the batch.
    """
    if store is None:
        yield
        return
    before = tower.__dict__.get("forward")
    memo = _Memo(tower, store)
    tower.forward = memo
    try:
        yield
    finally:
        del tower.forward
        if before is not None:
            tower.forward = before
        logger.info("vision features: %d read from %s, %d computed", memo.n_found, store.directory, memo.n_computed)


def check_frozen(task: VQATask, method: str, scope: Sequence[str] | None) -> None:
    """Check that a method leaves the vision tower of `task` frozen, so that its features can be cached.

    Args:
        task: the model.
        method: a name from `fastln.methods.METHODS`.
        scope: the sub-models that it tunes; None for all.

    Raises:
        FastLNError: if the method trains some of the tower.
    """
    check_cacheable(task)
    chosen, _ = get_method(method)
    if chosen.select is None:  # peft's methods add parameters to everything in the scope
        inside = sorted(name for name in parameters_in(task.model, scope) if name.startswith(f"{task.vision}."))
        trained = [f"adapters at {inside[0]}"] if inside else []
    else:
        names = select_parameters(task.model, chosen, scope)
        trained = sorted(name for name in names if name.startswith(f"{task.vision}."))
    if trained:
        raise FastLNError(
            f"the feature cache is for a vision tower that is frozen, and method {method!r} trains some of it "
            f"({trained[0]}): limit it to other sub-models (--scope text), or leave the cache out"
        )


def check_cacheable(task: VQATask) -> None:
    """Check that the model reads the tensors that the cache keeps.

    Raises:
        FastLNError: if it has no vision tower, or does not read the tower's last hidden states.
    """
    if not task.vision:
        raise FastLNError(
            f"the feature cache keeps a vision tower's last hidden states, which {task.name} does not read: leave the "
            "cache out"
        )


class _Memo:
    """The cached forward of a tower: looks the output up, and computes it if it is missing."""

    def __init__(self, tower: nn.Module, store: TensorStore) -> None:
        self.n_found = self.n_computed = 0
        self._tower = tower
        self._store = store
        self._forward = tower.forward
        self._fingerprint = fingerprint(tower)
        self._pooling = next((name for name in _POOLING if isinstance(getattr(tower, name, None), nn.Module)), None)
        self._checked: set[bool] = set()  # the modes (training or not) that the tower was checked in

    def __call__(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Return the output for `pixel_values`, (n_images, channels, height, width)."""
        positions = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        if positions.keys() - {INTERPOLATE} or "return_dict" in kwargs:
            return self._forward(pixel_values=pixel_values, **kwargs)
        self._refuse_training()
        keys = self._keys(pixel_values, positions)
        found = {key: self._store.get(key) for key in dict.fromkeys(keys)}
        missing = [key for key, tensors in found.items() if tensors is None]
        if missing:
            found |= self._compute(pixel_values, positions, keys, missing)
        self.n_found += len(found) - len(missing)
        self.n_computed += len(missing)
        rows = [tensors for key in keys if (tensors := found[key]) is not None]
        names = rows[0].keys()
        output = {name: torch.stack([row[name] for row in rows]).to(pixel_values.device) for name in names}
        if POOLED not in output and self._pooling is not None:
            output[POOLED] = getattr(self._tower, self._pooling)(output[HIDDEN])
        return BaseModelOutputWithPooling(**output)

    def _compute(
        self, pixel_values: Tensor, positions: dict[str, Any], keys: list[str], missing: list[str]
    ) -> dict[str, dict[str, Tensor]]:
        """Run the tower once on each image with a key in `missing`, and keep its output."""
        rows = [keys.index(key) for key in missing]
        if self._tower.training not in self._checked:
            self._check(pixel_values[rows[:1]], positions)
            self._checked.add(self._tower.training)
        # If every image is new, run the whole batch: the same shape rounds as in an uncached run.
        output = self._run(pixel_values if len(rows) == len(keys) else pixel_values[rows], positions)
        computed = {key: {name: tensor[row] for name, tensor in output.items()} for row, key in enumerate(missing)}
        for key, tensors in computed.items():
            self._store.put(key, tensors)
        return computed

    def _run(self, pixel_values: Tensor, positions: dict[str, Any]) -> dict[str, Tensor]:
        """Return the part of the output to keep; it has pooled rows only if no pooling module computes them."""
        pooling = None if self._pooling is None else getattr(self._tower, self._pooling)
        if pooling is not None:
            setattr(self._tower, str(self._pooling), nn.Identity())
        try:
            output = self._forward(pixel_values=pixel_values, **positions)
        finally:
            if pooling is not None:
                setattr(self._tower, str(self._pooling), pooling)
        hidden, pooled = getattr(output, HIDDEN, None), getattr(output, POOLED, None)
        if not isinstance(hidden, Tensor) or len(hidden) != len(pixel_values):
            raise FastLNError(
                f"{type(self._tower).__name__} gives no {HIDDEN} with a row for each image; its features cannot be "
                "cached"
            )
        if pooling is not None and pooled is not hidden:
            self._pooling = None  # a module of that name that does something else
            return self._run(pixel_values, positions)
        return {HIDDEN: hidden} if pooled is None or pooled is hidden else {HIDDEN: hidden, POOLED: pooled}

    def _check(self, image: Tensor, positions: dict[str, Any]) -> None:
        """Check, with one image (1, channels, height, width) alone and in a batch, that the output may be cached."""
        name = type(self._tower).__name__
        norms = nn.modules.batchnorm._NormBase
        if any(isinstance(module, norms) and module.training for module in self._tower.modules()):
            raise FastLNError(f"{name} computes statistics over the batch in training; its features cannot be cached")
        before = _generator_states(image.device)
        alone = self._run(image, positions)
        if not all(map(torch.equal, before, _generator_states(image.device))):
            raise FastLNError(
                f"{name} draws random numbers in training (dropout, stochastic depth), so its features differ from "
                "step to step and cannot be cached; set its dropout to 0 in its config.json, or leave the cache out"
            )
        together = self._run(image.expand(3, *image.shape[1:]).contiguous(), positions)
        if not all(torch.equal(alone[part][0], together[part][0]) for part in alone):
            logger.warning(
                "%s rounds an image's features differently in batches of different sizes: losses with and without the "
                "cache will differ by rounding",
                name,
            )

    def _refuse_training(self) -> None:
        trained = [name for name, parameter in self._tower.named_parameters() if parameter.requires_grad]
        if trained and torch.is_grad_enabled():
            raise FastLNError(
                f"{type(self._tower).__name__} trains ({len(trained)} parameters, for example {trained[0]}), so its "
                "features change and cannot be cached"
            )

    def _keys(self, pixel_values: Tensor, positions: dict[str, Any]) -> list[str]:
        device = pixel_values.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # Modules choose their code by these, and different code may round differently.
        state = (self._tower.training, torch.is_grad_enabled(), autocast, torch.get_float32_matmul_precision())
        salt = repr((self._fingerprint, state, positions, pixel_values.dtype, pixel_values.shape[1:])).encode()
        return [hashlib.sha256(salt + as_bytes(image)).hexdigest() for image in pixel_values.cpu()]


def fingerprint(tower: nn.Module) -> str:
    """Return a digest of everything that the output of `tower` depends on, except its input and mode.

    These are its weights and buffers, its configuration, the code of its modules (`prepare` changes it), where it runs,
    and the versions of fastln, torch and transformers.
    """
    digest = hashlib.sha256()

    def add(*values: object) -> None:
        digest.update(repr(values).encode())

    config = getattr(tower, "config", None)
    add(*(package_version(name) for name in ("fastln", "torch", "transformers")))
    if config is not None:
        settings = {name: value for name, value in config.to_dict().items() if name not in _ORIGIN}
        add(json.dumps(settings, sort_keys=True, default=str), config._attn_implementation)
    for name, module in tower.named_modules():
        add(name, *code_of(module))
    devices = set()
    for name, tensor in (*tower.named_parameters(), *tower.named_buffers()):
        add(name, tensor.dtype, tensor.shape)
        digest.update(as_bytes(tensor))
        devices.add(tensor.device)
    for name, original in originals(tower).items():  # 8-bit weights have scales besides
        add(name, original.dtype)
        digest.update(as_bytes(original.samples))
    for device in sorted(devices, key=str):
        add(torch.cuda.get_device_name(device) if device.type == "cuda" else (device.type, cpu_model()))
    return digest.hexdigest()


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states

"""A memory budget: the mix of storage modes that fits, what it costs, and what is said where nothing fits."""

import copy
import dataclasses
import gc

import pytest
import torch
import transformers

import fastln
from fastln.budget import settle_budget
from fastln.errors import FastLNError
from fastln.machine import memory_limit
from fastln.memory import AllocatorPeak
from fastln.ops.settings import STORAGES
from fastln.peak import step_memory
from fastln.plan import apply
from fastln.standins.whole_block import WholeBlock
from fastln_kernels.cpu import library

SIZES = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 3}
MODES = ("exact", "compressed-recompute")
LATE = ("late_logits", "late_rows")  # on the meta device nothing waits


def make(device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=3, vocab_size=64, bos_token_id=1, eos_token_id=2)
        return transformers.LlamaForCausalLM(config).train()


IDS = torch.randint(5, 64, (8, 64), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


def peak_of(model):
    return step_memory(model, BATCH).peak


@pytest.fixture(scope="module")
def ends():
    """The peaks with exact storage and with the mode that keeps least."""
    peaks = [peak_of(fastln.prepare(make("meta"), activations=mode, without=LATE)) for mode in MODES]
    assert peaks[1] < 0.7 * peaks[0]
    return peaks


def plan(budget, **more):
    return fastln.plan(make("meta"), memory_budget=budget, batch=BATCH, device="cpu", **{"without": LATE} | more)


def test_the_peak_falls_with_the_budget_and_stays_below_it(ends):
    exact, least = ends
    peaks, extras = [], []
    for share in (1.0, 0.95, 0.8, 0.6, 0.4, 0.2, 0.05):
        budget = int(least + share * (exact - least))
        found = plan(budget)
        peaks.append(peak_of(applied(found, make("meta"))))
        assert peaks[-1] <= budget
        extras.append(len(found.storages))
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0] == exact
    assert extras[0] == 0 < extras[-1]


@pytest.mark.skipif(not library.compiler(), reason="no compiler")
@pytest.mark.parametrize("share", [0.7, 0.2])
def test_what_is_planned_is_what_the_allocator_measures(ends, share):
    exact, least = ends
    budget = int(least + share * (exact - least))
    planned = peak_of(applied(plan(budget), make("meta")))
    gc.collect()
    with AllocatorPeak() as allocated:
        model = applied(plan(budget), make())
        inputs = {name: value.clone() for name, value in BATCH.items()}
        for _ in range(2):
            allocated.reset()
            model(**inputs).loss.backward()
            model.zero_grad()
    # The optimizer's memory, of which there is none here, is small: the norms train.
    assert planned == pytest.approx(allocated.bytes, rel=0.05)


def applied(found, model):
    apply(found, model)
    return model


def test_the_first_batch_decides_as_the_plan_does_and_a_larger_one_again(ends, caplog):
    budget = int(ends[1] + 0.5 * (ends[0] - ends[1]))
    model = fastln.prepare(make(), memory_budget=budget, without=LATE)
    assert "the first batch decides" in caplog.text
    half = {name: value[:2] for name, value in BATCH.items()}
    model.eval()
    model(**BATCH)  # an evaluation decides nothing
    model.train()
    assert "predicted peak" not in caplog.text
    model(**half).loss.backward()
    assert "exact storage everywhere" in caplog.text
    caplog.clear()
    model.zero_grad()
    model(**BATCH).loss.backward()
    chosen = {change.name: change.storage for change in plan(budget).changes}
    parts = {
        name: module._fastln.settings.storage for name, module in model.named_modules() if "_fastln" in vars(module)
    }
    assert set(parts.values()) - {"exact"}
    assert all(chosen[name] == mode for name, mode in parts.items() if name in chosen)
    assert caplog.text.count("predicted peak") == 1
    model(**half)
    assert caplog.text.count("predicted peak") == 1
    want = fastln.prepare(make(), without=LATE)
    want(**BATCH).loss.backward()
    for name, parameter in want.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=0.05, atol=1e-3)
    fastln.restore(model)
    assert not any("_fastln" in vars(module) for module in model.modules())
    assert not model.is_gradient_checkpointing


def test_too_small_a_budget_names_what_would_fit(ends):
    with pytest.raises(
        FastLNError, match=r"too little for this batch: the least .*MiB \(weights .*a batch of \d \(of 8\)"
    ):
        plan(int(0.8 * ends[1]))
    with pytest.raises(FastLNError, match="not even a batch of one fits"):
        plan(10_000)


def test_without_rounding_the_mix_keeps_numbers_in_full(ends):
    budget = int(ends[1] + 0.5 * (ends[0] - ends[1]))
    modes = {mode for _, mode in plan(budget, without=(*LATE, "rounding")).storages}
    assert modes
    assert all(STORAGES[mode].x_hat_bits is None for mode in modes)
    assert any(STORAGES[mode].x_hat_bits for _, mode in plan(budget).storages)


def test_budgets_in_words():
    here = torch.device("cpu")
    assert settle_budget("8GiB", here) == 8 * 2**30
    assert settle_budget(12345, here) == 12345
    assert settle_budget(0.5, here) == settle_budget("0.5", here) == memory_limit().n_bytes // 2
    for wrong in (0, "much", True, -1, 0.0, "8 parsecs"):
        with pytest.raises(FastLNError):
            settle_budget(wrong, here)


def test_modes_and_a_budget_do_not_go_together():
    with pytest.raises(FastLNError, match="leave out activations='recompute'"):
        fastln.plan(make("meta"), memory_budget="8GiB", activations="recompute")


def test_offload_needs_a_gpu_and_says_so():
    found = fastln.plan(make("meta"), activations="offload", device="cpu")
    assert any("host's memory already" in stay.reason for stay in found.stays)
    assert not any(isinstance(change, WholeBlock) for change in found.changes)


def test_a_block_after_a_checkpointed_one_keeps_what_it_cannot_make_again():
    """A post-norm block's queries come from a norm in the block before, whose memory is read once in a checkpoint."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, vocab_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = transformers.BertForSequenceClassification(config).train()
    inputs = {"input_ids": IDS, "labels": torch.zeros(8, dtype=torch.int64)}
    want = fastln.prepare(copy.deepcopy(model))
    want(**inputs).loss.backward()
    found = fastln.plan(model, activations="again")
    mixed = fastln.plan(model, activations="checkpoint")
    first = [change for change in mixed.changes if change.stand_in == "block" and change.name.endswith(".0")]
    assert first
    apply(dataclasses.replace(found, changes=(*found.changes, *first)), model)
    model(**inputs).loss.backward()
    for name, parameter in want.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_budget_takes_batches_whose_loss_the_user_computes(ends, caplog):
    model = fastln.prepare(make(), memory_budget=int(ends[1] + 0.5 * (ends[0] - ends[1])), without=LATE)
    logits = model(IDS).logits  # by position
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten()).backward()
    assert caplog.text.count("predicted peak") == 1


def test_a_larger_batch_that_still_fits_changes_nothing(ends, caplog):
    model = fastln.prepare(make(), memory_budget=ends[0], without=LATE)
    for n_samples in (2, 4, 8):
        model(**{name: value[:n_samples] for name, value in BATCH.items()})
    assert caplog.text.count("predicted peak") == 1


@pytest.mark.parametrize("products", ["exact", "int8"])
def test_a_parameter_that_changes_before_the_backward_is_an_error_as_with_exact_storage(products):
    """Also a bias, which exact storage does not read again."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES | {"hidden_size": 192}, image_size=32, patch_size=8, num_labels=4)
    model = transformers.ViTForImageClassification(config).train()
    fastln.prepare(model, "bitfit", activations="recompute", products=products)
    loss = model(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.zeros(2, dtype=torch.int64)).loss
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    with pytest.raises((FastLNError, RuntimeError), match=r"changed between forward and backward|inplace operation"):
        loss.backward()

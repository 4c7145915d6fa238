"""The watch over trained norms: what it complains of, with the true reason, and what it lets pass."""

import pytest
import torch
from torch import nn

import fastln
from fastln.errors import FastLNError
from fastln.watch import PATIENCE, STRETCH, NormWatch, watch_norms


class Layers(nn.Module):
    """Three norms in a row; `used` says which of them a step uses."""

    def __init__(self, n_norms=3):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(4, bias=False) for _ in range(n_norms))

    def forward(self, x, used=(0, 1, 2)):
        for index in used:
            x = self.norms[index](x) + torch.arange(4.0).to(x)
        return x


def trained(n_steps, *, model=None, used=lambda step: (0, 1, 2), loss=torch.sum, **optimizer):
    """Train with a watch for some steps, and return it."""
    model = model or Layers()
    steps = torch.optim.AdamW(model.parameters(), **({"lr": 1e-3, "weight_decay": 0.0} | optimizer))
    watch = watch_norms(model, steps)
    for step in range(n_steps):
        steps.zero_grad()
        out = model(torch.randn(5, 4), used(step))
        if out.requires_grad:
            loss(out * torch.randn(4)).backward()
        steps.step()
    return watch


def test_norms_that_train_are_let_pass(caplog):
    watch = trained(STRETCH + 1)
    watch.finish()
    assert watch.n_steps == STRETCH + 1
    assert watch.gamma_shift() > 0
    assert caplog.text == ""


def test_a_layer_that_is_dropped_for_many_steps_is_let_pass(caplog):
    """As LayerDrop does, or batches without an image: a step without a gradient does not count."""
    watch = trained(STRETCH + 1, used=lambda step: (0, 1) if step < STRETCH - 1 else (0, 1, 2))
    assert watch.n_steps == STRETCH + 1
    assert caplog.text == ""


def test_a_norm_beside_the_path_of_the_loss_is_one_warning(caplog):
    trained(2 * STRETCH, used=lambda step: (0, 2))
    assert [(record.levelname, record.message) for record in caplog.records] == [
        (
            "WARNING",
            f"1 of 3 trained norm parameters received no gradient in {STRETCH} steps, so the loss may not depend on "
            "them: norms.1.weight; leave norms out by name or pattern: scope='not:norms.1'",
        )
    ]


def test_no_norm_with_a_gradient_is_an_error():
    """Most may be reached later, as a vision tower's where the first fifty batches hold no image."""
    trained(STRETCH, used=lambda step: (1,))
    head = nn.Linear(4, 4)
    model = nn.Sequential(Layers().requires_grad_(False), head)
    model[0].norms.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    watch_norms(model, optimizer)

    def steps():
        for _ in range(STRETCH):
            head(torch.randn(5, 4)).sum().backward()
            optimizer.step()

    with pytest.raises(FastLNError, match=r"^3 of 3 trained norm parameters received no gradient in 50 steps, so .*"):
        steps()


def test_a_short_training_is_judged_at_its_end(caplog):
    watch = trained(4, used=lambda step: (0, 2))
    assert caplog.text == ""
    watch.finish()
    assert "1 of 3 trained norm parameters received no gradient in 4 steps" in caplog.text


def test_gradients_of_zero_have_a_reason_of_their_own():
    """A loss that is always 0, as with one answer only."""
    with pytest.raises(FastLNError, match=r"^3 of 3 .* only gradients of 0 in 50 steps: the loss does not change with"):
        trained(STRETCH, loss=lambda out: (out * 0).sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dtype": torch.bfloat16, "lr": 1e-5},
            r"norms.0.weight.* \(bfloat16\) did not move .*: bfloat16 rounds their",
        ),
        ({"missing": 1, "lr": 1e-3}, r"^norms.1.weight \(float32\) did not move .*: the optimizer does not have them$"),
        ({"optimizer": torch.optim.SGD, "lr": 1e-5}, "smaller than float32 resolves; try a higher learning rate"),
    ],
    ids=["rounded away", "not in the optimizer", "too small"],
)
def test_a_norm_that_does_not_move_has_the_true_reason(settings, message):
    model = Layers().to(settings.get("dtype", torch.float32))
    own = [p for index, p in enumerate(model.parameters()) if index != settings.get("missing")]
    optimizer = settings.get("optimizer", torch.optim.AdamW)(own, lr=settings["lr"], weight_decay=0.0)
    watch = watch_norms(model, optimizer)
    scale = 1e-4 if "optimizer" in settings else 1.0
    dtype = model.norms[0].weight.dtype

    def steps():
        for _ in range(PATIENCE):
            (model(torch.randn(5, 4, dtype=dtype)) * scale * torch.randn(4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(FastLNError, match=message):
        steps()
    assert watch.n_steps == PATIENCE - 1


def test_each_norm_is_judged_by_its_own_rate():
    """The other group's rate is high; a rate of 1e-9 moves no float32 norm, and that is what was asked for."""
    model = Layers()
    first, *others = model.parameters()
    groups = [{"params": others}, {"params": [first], "lr": 1e-9}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    watch_norms(model, optimizer)
    for _ in range(PATIENCE + 2):
        (model(torch.randn(5, 4)) * torch.randn(4)).sum().backward()
        optimizer.step()
    assert torch.equal(first, torch.ones(4))


def test_several_optimizers_share_the_norms():
    model = Layers()
    first, *others = model.parameters()
    optimizers = [torch.optim.AdamW(part, lr=1e-3, weight_decay=0.0) for part in ([first], others)]
    watch = watch_norms(model, *optimizers)
    for _ in range(PATIENCE + 1):
        (model(torch.randn(5, 4)) * torch.randn(4)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert watch.n_steps == PATIENCE + 1


def test_a_norm_that_turns_nan_is_named():
    model = Layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch_norms(model, optimizer)
    with torch.no_grad():
        model.norms[2].weight[1] = torch.nan

    def steps():
        for _ in range(STRETCH):
            model(torch.randn(5, 4)).sum().backward()
            optimizer.step()

    with pytest.raises(FastLNError, match=r"^norms.*norms.2.weight turned NaN or infinite by step 50; try a lower"):
        steps()


def test_the_watch_can_be_ended():
    model = Layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = watch_norms(model, optimizer)
    optimizer.step()
    assert watch.n_steps == 1
    watch.remove()
    watch.remove()
    optimizer.step()
    assert watch.n_steps == 1


def test_what_cannot_be_watched_is_an_error():
    with pytest.raises(FastLNError, match="no norm of this model trains"):
        fastln.watch_norms(Layers().requires_grad_(False), torch.optim.AdamW(Layers().parameters()))
    with pytest.raises(FastLNError, match="needs the optimizers"):
        fastln.watch_norms(Layers())


def test_how_far_norms_moved():
    model = Layers()
    watch = NormWatch(model)
    assert watch.gamma_shift() == 0
    with torch.no_grad():
        model.norms[0].weight += 0.75
    assert watch.gamma_shift() == pytest.approx(0.25)

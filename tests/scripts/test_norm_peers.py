"""The peers, each called as it wants: stand-ins for those that need a GPU."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from norm_cases import CASES
from norm_checks import Configuration, check, random_inputs
from norm_peers import LOADERS, load_all, load_compile, load_fastln, load_flash, load_liger, load_torch

from fastln_kernels import reference
from fastln_kernels.reference import NormBackward, NormForward, NormKind

CPU = torch.device("cpu")


def fault(implementation, case, n_cols=40):
    configuration = Configuration(CASES[case], 19, n_cols, "fp32")
    return check(implementation, configuration, random_inputs(configuration, CPU, seed=3)).fault


@pytest.mark.parametrize(("name", "package"), [("liger", "liger_kernel"), ("flash-attn", "flash_attn")])
def test_a_missing_peer_says_so(monkeypatch, name, package):
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    implementation, reason = LOADERS[name]()
    assert implementation is None
    assert reason.startswith("not installed (")
    monkeypatch.setitem(LOADERS, "torch.compile", load_torch)  # the real one changes settings of torch
    found, missing = load_all()
    assert missing[name] == reason
    assert "fastln" in [one.name for one in found]


def pretend(monkeypatch, name, **members):
    """Put a module into the import system, and the packages it is in."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    vars(sys.modules[name]).update(members)


class InPlaceRMSNorm(torch.autograd.Function):
    """Stands in for Liger's: its dx lies where dy was."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, casting_mode):
        ctx.kind = NormKind(eps, centre=False, offset=offset, round_normed=casting_mode == "llama")
        y, _, _, rstd, _ = reference.norm_forward(NormForward(x, weight, None, ctx.kind))
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        need = {"need_dx": True, "need_dweight": True}
        gradients = reference.norm_backward(NormBackward(dy, *ctx.saved_tensors, ctx.kind, **need))
        return dy.copy_(gradients.dx), gradients.dweight, None, None, None


class PlainLayerNorm:
    """Stands in for Liger's, which cannot do without weight and bias."""

    @staticmethod
    def apply(x, weight, bias, eps):
        assert weight.shape == bias.shape == x.shape[-1:]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@pytest.mark.parametrize("case", CASES)
def test_liger_is_called_as_it_wants(monkeypatch, case):
    pretend(
        monkeypatch,
        "liger_kernel.ops",
        LigerLayerNormFunction=PlainLayerNorm,
        LigerRMSNormFunction=InPlaceRMSNorm,
    )
    implementation, _ = load_liger()
    configuration = Configuration(CASES[case], 19, 40, "fp32")
    given = random_inputs(configuration, CPU, seed=3)
    dy = given.dy.clone()
    assert check(implementation, configuration, given).fault is None
    assert torch.equal(given.dy, dy)


@pytest.mark.parametrize("case", CASES)
def test_flash_attention_is_called_as_it_wants(monkeypatch, case):
    def layer_norm_fn(
        x,
        weight,
        bias,
        residual=None,
        eps=1e-6,
        dropout_p=0.0,
        prenorm=False,
        is_rms_norm=False,
        zero_centered_weight=False,
    ):
        if dropout_p:
            x = F.dropout(x, dropout_p)
        stream = x if residual is None else x + residual
        if is_rms_norm:
            y = F.rms_norm(stream, x.shape[-1:], weight + zero_centered_weight, eps)
        else:
            y = F.layer_norm(stream, x.shape[-1:], weight, bias, eps)
        return (y, stream) if prenorm else y

    pretend(monkeypatch, "flash_attn.ops.triton.layer_norm", layer_norm_fn=layer_norm_fn)
    assert fault(load_flash()[0], case) is None


def test_what_peers_do_otherwise_is_said(monkeypatch):
    pretend(monkeypatch, "liger_kernel.ops")
    pretend(monkeypatch, "flash_attn.ops.triton.layer_norm")
    fastln, eager, liger, flash = (load()[0] for load in (load_fastln, load_torch, load_liger, load_flash))

    def note(implementation, case):
        return implementation.note(CASES[case])

    assert note(fastln, "layer_norm-dweight-dbias") == ""
    assert note(eager, "dropout_add_layer_norm-forward") == "dropout, sum and norm separately"
    assert note(liger, "layer_norm-dweight-dbias") == "computes dx too"
    assert note(liger, "layer_norm-dx") == ""
    assert note(liger, "layer_norm_no_bias-forward") == "with a bias of zeros"
    assert note(liger, "layer_norm_no_affine-dx") == "with a bias of zeros and a weight of ones"
    assert note(liger, "rms_norm-dx-dweight") == "writes dx over dy"
    assert note(liger, "dropout_add_layer_norm-backward") == "dropout and sum by torch, separately"
    assert note(liger, "add_layer_norm-forward") == "sum by torch, separately"
    assert note(flash, "layer_norm-dx") == "computes dweight and dbias too"
    assert note(flash, "layer_norm-forward") == ""
    assert note(flash, "layer_norm_no_affine-dx") == "with a weight of ones"
    assert note(flash, "rms_norm-dx-dweight") == ""
    assert note(flash, "llama_rms_norm-forward") == "does not round x_hat"


def test_torch_compile_compiles_once_a_case(monkeypatch):
    import torch._functorch.config as config

    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(function) or function)
    with config.patch(donated_buffer=config.donated_buffer):  # monkeypatch would delete it from torch's settings
        implementation, _ = load_compile()
        assert not config.donated_buffer
        for n_cols in (40, 24):
            assert fault(implementation, "dropout_add_layer_norm-backward", n_cols) is None
    assert len(compiled) == 2

"""How operations run, as one object: what it refuses, and how torch's operators take it."""

import pytest
import torch

from fastln import ops
from fastln.errors import FastLNError
from fastln.ops.settings import DEFAULT, REFERENCE, SCHEMA, OpSettings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"backend": "trition"},
            r"unknown backend 'trition' \(did you mean 'triton'\?\); valid: auto, triton, cpu, ref",
        ),
        ({"backend": None}, "unknown backend None; valid: auto"),
        ({"storage": "exakt"}, r"unknown activations 'exakt' \(did you mean 'exact'\?\); valid: exact"),
        ({"products": "INT8"}, r"unknown products 'INT8' \(did you mean 'int8'\?\); valid: exact, int8"),
        ({"products": "int4"}, r"unknown products 'int4' \(did you mean 'int8'\?\); valid: exact, int8"),
    ],
)
def test_unknown_names_list_the_valid_ones(wrong, message):
    with pytest.raises(FastLNError, match=message):
        OpSettings(**wrong)


def test_scalars_and_back():
    for settings in (DEFAULT, REFERENCE, OpSettings("cpu")):
        assert OpSettings.of(*settings.flat) == settings
    assert SCHEMA == "str backend, str storage, str products"


@pytest.mark.parametrize("name", ["norm", "norm_backward", "activation", "gated_activation", "dropout", "attention"])
def test_every_operator_takes_all_settings_last(name):
    schema = getattr(torch.ops.fastln, name).default._schema
    assert [argument.name for argument in schema.arguments][-3:] == ["backend", "storage", "products"]


def test_settings_made_while_compiling():
    def function(x):
        return ops.layer_norm(x, None, None, settings=OpSettings("reference")).sin()

    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))

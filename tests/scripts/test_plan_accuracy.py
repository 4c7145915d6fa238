"""Predicted beside measured peaks: what is compared, and the table."""

from plan_accuracy import Combination, combinations, table

from fastln.settings import MethodSettings


def test_every_combination_can_be_set_up_and_each_model_has_them_all():
    for one in combinations():
        MethodSettings.of(one.method, one.engine, activations=one.activations, products=one.products)
    models = {one.model for one in combinations()}
    assert len(set(combinations())) == 6 * len(models) == 30


def test_a_row_shows_the_error_of_the_prediction():
    one = Combination("ViTForImageClassification", 8, 224, "layernorm", "fastln", "bfloat16", products="int8")
    assert "ViT-B/16" in one.words
    row = one._asdict() | {"predicted_peak_bytes": 103 << 20, "measured_peak_bytes": 100 << 20, "step_seconds": 1.234}
    assert table([row]).splitlines()[-1] == (
        "| ViT-B/16, 8×224 | layernorm | fastln | bfloat16 | exact | int8 | 103 | 100 | +3.0% | 1.23 |"
    )

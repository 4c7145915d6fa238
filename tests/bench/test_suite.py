"""Suites: what comes with fastln, what a file may say, and what is said when it is wrong."""

import pytest

from fastln.bench import suite as suite_module
from fastln.bench.suite import load_suite, suite_names
from fastln.data import DataOptions
from fastln.errors import FastLNError
from fastln.models.shapes import is_shape
from fastln.ops.settings import PRODUCTS
from fastln.training import TrainConfig

GOOD = "data: phantom\nmodels: [dual]\nmethods: [layernorm/torch]\n"
EVERY_PAIR = {
    "layernorm/fastln",
    "layernorm/peft",
    "layernorm/torch",
    "lora/peft",
    "bitfit/torch",
    "full/torch",
    "head/torch",
}


def runs(suite, dtype="float32"):
    """Return the method, engine and products of each row."""
    return [row[:3] for row in suite.contenders(dtype)]


def load(tmp_path, text, **overrides):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_suite(path, overrides)


def test_quick_needs_nothing():
    suite = load_suite("quick")
    assert suite.name == "quick"
    assert suite.data == "phantom"
    assert suite.models == ("dual", "blip")
    assert set(suite.methods) == EVERY_PAIR


def test_real_takes_data_and_model_from_the_command_line():
    suite = load_suite("real", {"data": "some/folder", "models": ["dual:a,b"], "steps": None})
    assert (suite.data, suite.models, suite.steps) == ("some/folder", ("dual:a,b",), 3)
    assert suite.epochs == 0
    assert set(suite.methods) == EVERY_PAIR
    with pytest.raises(FastLNError, match="missing data, models"):
        load_suite("real")


def test_cpu_leaves_out_what_needs_real_data_where_there_is_none(monkeypatch, caplog):
    monkeypatch.delenv("FASTLN_DATA", raising=False)
    with caplog.at_level("INFO"):
        suite = load_suite("cpu")
    assert suite.data == ""
    assert len(suite.models) == 4
    assert all(map(is_shape, suite.models))
    assert "skipping dual:$FASTLN_DATA/models" in caplog.text
    monkeypatch.setenv("FASTLN_DATA", "some/folder")
    suite = load_suite("cpu", {"dtypes": ["float32"]})
    assert suite.data == "some/folder/data/vqa-rad"
    assert suite.models[-1] == "dual:some/folder/models/dinov2-small,some/folder/models/all-MiniLM-L6-v2"
    assert suite.dtypes == ("float32",)


def test_shapes_need_no_data_and_others_do(tmp_path):
    text = "methods: [layernorm/peft]\nmodels: [ViTForImageClassification:2x32:1"
    assert load(tmp_path, f"{text}]\n").data == ""
    with pytest.raises(FastLNError, match=r"mine\.yaml: missing data"):
        load(tmp_path, f"{text}, dual]\n")


def test_a_file_of_ones_own(tmp_path):
    suite = load(tmp_path, GOOD + "rounds: 7\n", steps=9)
    assert (suite.name, suite.rounds, suite.steps) == ("mine", 7, 9)
    assert runs(suite) == [("layernorm", "torch", "exact")]


def test_data_is_read_and_methods_are_named_as_for_training(tmp_path):
    text = "data: d\nmodels: [dual]\nmethods: [LN-F/fastln, F-T/torch]\nlayout: slake\n"
    suite = load(tmp_path, text, language="zh", skip_bad_rows=True)
    assert suite.options == DataOptions("slake", "zh", skip_bad_rows=True)
    for limit, same in (("1%", "1%"), (20, 20), ("20", 20), ("all", True), ("true", True), ('"1%"', "1%")):
        assert load(tmp_path, f"{text}skip_bad_rows: {limit}\nkeep_repeats: true\n").options == DataOptions(
            "slake", skip_bad_rows=same, keep_repeats=True
        )
    assert runs(suite) == [("LN-F", "fastln", "exact"), ("F-T", "torch", "exact")]
    assert load(tmp_path, GOOD).options == DataOptions()


def test_a_method_may_run_in_one_dtype_alone(tmp_path):
    text = GOOD.replace("layernorm/torch", "full/torch, layernorm/torch/float32")
    suite = load(tmp_path, text, dtypes=["bfloat16", "float32"])
    assert runs(suite, "bfloat16") == [("full", "torch", "exact")]
    assert runs(suite) == [("full", "torch", "exact"), ("layernorm", "torch", "exact")]
    with pytest.raises(FastLNError, match=r"layernorm/torch/float32 would never run: its dtype is not one of auto"):
        load(tmp_path, text, dtypes=["auto"])
    both = load(tmp_path, GOOD.replace("torch", "torch, layernorm/torch/float32"), dtypes=["bfloat16", "float32"])
    assert runs(both) == runs(both, "bfloat16") == [("layernorm", "torch", "exact")]
    with pytest.raises(FastLNError, match=r"layernorm/torch/auto names no dtype: auto becomes float32 or bfloat16"):
        load(tmp_path, GOOD.replace("torch", "torch/auto"))


def test_products_are_for_engine_fastln(tmp_path, caplog):
    text = GOOD.replace("layernorm/torch", "layernorm/fastln, layernorm/torch")
    suite = load(tmp_path, text + "products: [exact, int8]\n")
    ours = [("layernorm", "fastln", "exact"), ("layernorm", "fastln", "int8")]
    assert runs(suite) == [*ours, ("layernorm", "torch", "exact")]
    assert runs(load(tmp_path, text, products=["int8"])) == [ours[1], ("layernorm", "torch", "exact")]
    assert not caplog.text
    load(tmp_path, GOOD, products=["exact", "int8"])
    assert "products has no effect, as no method runs on engine fastln" in caplog.text
    with pytest.raises(FastLNError, match=r"unknown products 'int' \(did you mean 'int8'\?\): choose from exact, int8"):
        load(tmp_path, text, products=["int"])


def test_storage_modes_and_budgets_are_rows_of_engine_fastln_and_checkpoints_of_others(tmp_path, caplog):
    text = GOOD.replace("layernorm/torch", "layernorm/fastln, layernorm/torch, lora/peft")
    keys = "activations: [exact, compressed-2]\nmemory_budgets: [0.5, 8GiB, 0.6x]\ncheckpointing: true\n"
    suite = load(tmp_path, text + keys + "compile_budgets: [0.25, 1]\n")
    labels = ["/".join((row.method, row.engine, *row.words)) for row in suite.contenders("float32")]
    budgets = [f"layernorm/fastln/budget {budget}" for budget in ("0.5", "8GiB", "0.6x")]
    assert labels == [
        *("layernorm/fastln", "layernorm/fastln/compressed-2", *budgets),
        *("layernorm/torch", "layernorm/torch/checkpointing"),
        *("layernorm/torch/compiled 0.25", "layernorm/torch/compiled 1"),
        *("lora/peft", "lora/peft/checkpointing"),
    ]
    assert [row.has_own_storage for row in suite.contenders("float32")][:3] == [False, True, True]
    assert not caplog.text
    load(tmp_path, GOOD, activations=["again"], memory_budgets=["1GiB"])
    for key in ("activations", "memory_budgets"):
        assert f"{key} has no effect, as no method runs on engine fastln" in caplog.text
    load(tmp_path, GOOD.replace("layernorm/torch", "lora/peft") + "compile_budgets: [0.5]\n")
    assert "compile_budgets has no effect, as no method runs on engine torch" in caplog.text


def test_the_memory_suite_says_what_a_folder_of_real_data_lacks(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FASTLN_DATA", str(tmp_path))
    suite = load_suite("memory")
    assert all(map(is_shape, suite.models))
    assert suite.peak == "allocator"
    assert f"skipping chat:$FASTLN_DATA/models/smollm2: FASTLN_DATA ({tmp_path}) has no models/smollm2" in caplog.text
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    load_suite("memory")
    assert "has no data/reports" in caplog.text
    (tmp_path / "data" / "reports").mkdir(parents=True)
    assert load_suite("memory").models[-1] == f"chat:{tmp_path}/models/smollm2"


def test_the_suite_knows_every_products_mode():
    assert suite_module.PRODUCTS == PRODUCTS


def test_an_image_size_is_for_models_that_are_no_shapes(tmp_path):
    assert load(tmp_path, GOOD).image_size is None
    assert load(tmp_path, GOOD, image_size=480).image_size == 480
    with pytest.raises(FastLNError, match="image_size does not apply to shapes"):
        load(tmp_path, "methods: [layernorm/peft]\nmodels: [ViTForImageClassification:2x32:1]\nimage_size: 32\n")


def test_head_epochs_are_those_of_training_unless_the_suite_says(tmp_path):
    assert load(tmp_path, GOOD).head_epochs == TrainConfig().head_epochs
    assert load(tmp_path, GOOD + "head_epochs: 0\n").head_epochs == 0


def test_a_name_that_yaml_takes_for_a_date_is_text(tmp_path):
    assert load(tmp_path, GOOD + "name: 2026-01-31\n").name == "2026-01-31"


def test_every_packaged_suite_is_listed():
    assert suite_names() == ["cpu", "memory", "quick", "real"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "batchsize: 3\n", r"unknown key 'batchsize' \(did you mean 'batch_size'"),
        (GOOD + "rounds: 0\n", "rounds must be a whole number of at least 1, not 0"),
        (GOOD + "steps: 2.5\n", "steps must be a whole number"),
        (GOOD + "seed: true\n", "seed must be a whole number"),
        (GOOD + "seed: 4294967296\n", r"seed must be less than 2\*\*32 \(4294967296\), not 4294967296"),
        (GOOD + "seed: -1\n", "seed must be a whole number of at least 0"),
        (GOOD + "head_epochs: -1\n", "head_epochs must be a whole number of at least 0"),
        (GOOD + "dtypes: [bflot16]\n", r"unknown dtype 'bflot16' \(did you mean 'bfloat16'.*auto, float32, bfloat16"),
        (GOOD + "activations: [compresed]\n", r"unknown activations 'compresed' \(did you mean 'compressed'"),
        (GOOD + "memory_budgets: 8GiB\n", "memory_budgets must be a list, not '8GiB'"),
        (GOOD + "memory_budgets: [much]\n", "memory_budgets has 'much', which is none; give a size such as 8GiB"),
        (GOOD + "memory_budgets: [0x]\n", "memory_budgets has '0x', which leaves nothing beside the weights"),
        (GOOD + "compile_budgets: [2]\n", "compile_budgets must be a list of numbers from 0 to 1"),
        (GOOD + "checkpointing: 1\n", "checkpointing must be true or false, not 1"),
        (GOOD + "peak: rss\n", "unknown peak 'rss'.*process, allocator"),
        (GOOD + "device: tpu\n", "unknown device 'tpu'.*auto, cpu, cuda"),
        (GOOD + "layout: 3\n", "layout must be a name, not 3"),
        (GOOD + "image_size: large\n", "image_size must be a whole number of pixels, not 'large'"),
        (GOOD + "skip_bad_rows: some\n", "skip_bad_rows must be all, a number of rows such as 20, or .*, not 'some'"),
        (GOOD + "keep_repeats: 2\n", "keep_repeats must be true or false, not 2"),
        ("data: phantom\nmodels: [dual]\nmethods: [LN-F/peft]\n", "unknown method/engine 'LN-F/peft'.*LN-F-T/fastln"),
        (GOOD + "timeout_seconds: 0\n", "timeout_seconds must be a positive number"),
        (GOOD + "timeout_seconds: .inf\n", "timeout_seconds must be a positive number"),
        ("data: phantom\nmodels: [dual]\nmethods: [layernrm/torch]\n", "did you mean 'layernorm/torch'.*lora/peft"),
        ("data: phantom\nmodels: [dual]\nmethods: [dora/fastln]\n", "unknown method/engine 'dora/fastln'"),
        ("data: phantom\nmodels: []\nmethods: [full/torch]\n", "models must be a list with at least one entry"),
        ("data: phantom\nmodels: [dual, dual]\nmethods: [full/torch]\n", "models has the same entry twice"),
        ("data: phantom\nmodels: dual\nmethods: [full/torch]\n", "models must be a list"),
        ("data: phantom\n", "missing models, methods"),
        (
            "models: [ViTForImageClassifcation:2x32]\nmethods: [full/torch]\n",
            "did you mean 'ViTForImageClassification'",
        ),
        ("- a\n- b\n", "a suite must be a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(tmp_path, text, message):
    with pytest.raises(FastLNError, match=message) as caught:
        load(tmp_path, text)
    assert "mine.yaml" in str(caught.value)


def test_an_unknown_suite_is_answered_with_the_nearest():
    with pytest.raises(FastLNError, match=r"no suite called 'quik' \(did you mean 'quick'.*cpu, memory, quick, real"):
        load_suite("quik")
    with pytest.raises(FastLNError, match=r"nowhere\.yaml: cannot read"):
        load_suite("nowhere.yaml")


def test_keys_without_effect_are_told(tmp_path, caplog):
    shapes = "methods: [layernorm/peft]\nmodels: [BertForMaskedLM:2x8:1]\n"
    load(tmp_path, f"{shapes}layout: slake\nseed: 3\nepochs: 0\n", epochs=2, batch_size=8, data="phantom")
    said = (
        "mine.yaml: no effect on shapes, which have random batches of their own size: layout, epochs, batch_size, data"
    )
    assert said in caplog.text
    caplog.clear()
    load(tmp_path, GOOD, head_epochs=7)
    assert "head_epochs has no effect without epochs" in caplog.text
    caplog.clear()
    load(tmp_path, GOOD, head_epochs=7, epochs=1)
    load(tmp_path, f"{GOOD[:-1]}\nbatch_size: 8\n", models=["dual", "BertForMaskedLM:2x8:1"])
    load_suite("cpu")
    assert "no effect" not in caplog.text
    load_suite("real", {"models": ["BertForMaskedLM:2x8:1"], "data": "phantom"})
    assert "no effect on shapes, which have random batches of their own size: data" in caplog.text

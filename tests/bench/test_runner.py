"""The runner, with workers that fail in every way there is."""

import json
import signal
import threading

import fake_workers
import pytest

from fastln.bench import isolate, runner
from fastln.bench.results import Failure, Job, read_rows
from fastln.bench.runner import run_suite
from fastln.bench.suite import Suite
from fastln.errors import FastLNError


def suite(**changes) -> Suite:
    values = {
        "name": "test",
        "data": "phantom",
        "models": ("one",),
        "methods": ("layernorm/torch", "lora/peft", "full/torch"),
        "batch_size": 4,
        "dtypes": ("float32",),
        "device": "cpu",
        "rounds": 2,
    }
    return Suite(**(values | changes))


def by_method(rows):
    return {row.method: row for row in rows}


def test_rounds_are_interleaved(tmp_path, monkeypatch):
    order = []

    def call(worker, job, expected, progress):
        order.append(str(job))
        return worker(job)

    monkeypatch.setattr(runner, "_call", call)
    run_suite(suite(models=("one", "two"), epochs=1), tmp_path, worker=fake_workers.work)
    once = [f"{model} {pair}" for model in ("one", "two") for pair in suite().methods]
    rounds = [f"round {number}/2 {run}" for number in (1, 2) for run in once]
    assert order == ["look at one", "look at two", *rounds, *(f"quality {run}" for run in once)]


def test_every_dtype_has_its_rows_and_its_look_at_the_model(tmp_path, monkeypatch):
    order = []

    def call(worker, job, expected, progress):
        order.append(str(job))
        return worker(job)

    monkeypatch.setattr(runner, "_call", call)
    rows = run_suite(
        suite(methods=("full/torch",), dtypes=("bfloat16", "float32", "bfloat16"), rounds=1),
        tmp_path,
        worker=fake_workers.work,
    )
    assert [row.dtype for row in rows] == ["bfloat16", "float32"]
    assert order == [f"{what} one {row.dtype}{of}" for what, of in WHAT for row in rows]
    assert {row.model for row in rows} == {"one in full"}


def test_each_products_mode_of_engine_fastln_has_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_call", lambda worker, job, expected, progress: worker(job))
    changes = {"methods": ("layernorm/fastln", "lora/peft"), "products": ("exact", "int8"), "rounds": 1}
    rows = run_suite(suite(**changes), tmp_path, worker=fake_workers.work)
    assert [row.label for row in rows] == ["layernorm (fastln)", "layernorm (fastln, int8)", "lora (peft)"]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [(row["products"], row["activations"]) for row in stored] == [
        (p, "exact") for p in ("exact", "int8", "exact")
    ]
    text = (tmp_path / "results.md").read_text()
    assert "| one in full, int8 |" in text


def test_each_storage_mode_and_budget_has_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_call", lambda worker, job, expected, progress: worker(job))
    changes = {"activations": ("exact", "again"), "memory_budgets": ("0.6x",), "checkpointing": True}
    methods = ("layernorm/torch", "layernorm/fastln")
    rows = run_suite(
        suite(methods=methods, rounds=1, epochs=1, compile_budgets=(0.5,), **changes),
        tmp_path,
        worker=fake_workers.predicts,
    )
    assert [row.label for row in rows] == [
        *("layernorm (torch)", "layernorm (torch, checkpointing)", "layernorm (torch, compiled 0.5)"),
        *("layernorm (fastln)", "layernorm (fastln, again)", "layernorm (fastln, budget 0.6x)"),
    ]
    assert [row.predicted_peak_bytes for row in rows] == [1100] * 6
    assert [row.storage_note for row in rows] == [None] * 5 + ["again in 2 blocks"]
    assert [row.accuracy is None for row in rows] == [False, True, True, False, False, False]
    assert rows[1].accuracy_note == "not counted: stock code gives the same answers without checkpointing"
    assert read_rows(tmp_path / "results.json") == rows
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [row["activations"] for row in stored[3:]] == ["exact", "again", "exact"]
    assert [row["memory_budget"] for row in stored[3:]] == [None, None, "0.6x"]
    assert "one in full: peak memory against time" in (tmp_path / "results.md").read_text()


WHAT = [("look at", ""), ("round 1/1", " full/torch")]


def test_progress_names_folders_by_their_last_names():
    job = Job(suite(), "speed", "dual:/a/b/dino,../c/bert", "float32", "lora", "peft", 2)
    assert str(job) == "round 2/2 dual:dino,bert lora/peft"
    job = Job(suite(), "speed", "one", "float32", "layernorm", "fastln", 1, "int8")
    assert str(job) == "round 1/2 one layernorm/fastln/int8"


def test_every_call_has_a_process_of_its_own_without_threads_left_from_another():
    found = [isolate.call(fake_workers.process, timeout_seconds=60) for _ in range(3)]
    assert len({pid for pid, _ in found}) == 3
    assert [threads for _, threads in found] == [1, 1, 1]


def test_rows_hold_what_the_rounds_measured(tmp_path):
    rows = run_suite(suite(), tmp_path, argv=["/somewhere/bin/fastln", "bench"], worker=fake_workers.work)
    assert [(row.method, row.engine) for row in rows] == [("layernorm", "torch"), ("lora", "peft"), ("full", "torch")]
    row = rows[0]
    assert row.model == "one in full"
    assert row.step_seconds_all == pytest.approx((0.1, 0.2, 0.2, 0.4))
    assert row.step_seconds == pytest.approx(0.2)
    assert row.step_seconds_by_round == pytest.approx((0.15, 0.3))
    assert row.samples_per_second == pytest.approx(20)
    assert (row.peak_memory_bytes, row.saved_activation_bytes) == (1002, 100)
    assert row.error is None
    assert row.accuracy is None
    assert row.accuracy_note == "not counted (--epochs N trains each method first)"
    assert row.provenance["argv"] == ["fastln", "bench"]
    assert row.provenance["data"] == {"name": "d", "synthetic": False}
    assert row.provenance["memory"] == "process peak RSS"
    assert set(row.provenance["versions"]) == {"python", "torch", "triton", "transformers", "peft", "fastln"}
    assert {"cpu", "cores", "threads", "memory_bytes", "gpu", "kernel"} == set(row.provenance["machine"])
    assert read_rows(tmp_path / "results.json") == rows
    assert (tmp_path / "results.md").exists()
    assert (tmp_path / "results.png").exists()


def test_a_run_that_raises_is_a_row_and_is_not_tried_again(tmp_path):
    rows = by_method(run_suite(suite(rounds=3, epochs=1), tmp_path, worker=fake_workers.raises_in_round_2))
    row = rows["lora"]
    assert row.error.startswith("round 2: RuntimeError: the mat is torn")
    assert "fake_workers.py" in row.error
    assert len(row.step_seconds_by_round) == 1
    assert row.accuracy is None
    assert row.accuracy_note == "failed"
    assert len(rows["full"].step_seconds_by_round) == 3
    assert rows["full"].accuracy["all"] == 50.0


def test_a_killed_run_is_a_row(tmp_path):
    rows = by_method(run_suite(suite(), tmp_path, worker=fake_workers.dies))
    assert rows["full"].error == "round 1: killed by signal 9 (out of memory?)\n  last words"
    assert rows["full"].step_seconds is None
    assert rows["lora"].error is None


def test_a_suite_of_which_nothing_ran_can_be_told(tmp_path):
    rows = run_suite(suite(), tmp_path, worker=fake_workers.exits)
    assert all(row.step_seconds is None for row in rows)
    assert "status 7" in rows[0].error


def test_a_run_that_hangs_is_stopped():
    answer = isolate.call(fake_workers.sleep, timeout_seconds=1)
    assert answer == Failure("stopped: not finished after 1 s (timeout_seconds)")


def test_quality_that_fails_keeps_the_speed(tmp_path):
    rows = by_method(run_suite(suite(epochs=2), tmp_path, worker=fake_workers.quality_fails))
    assert rows["lora"].error.startswith("quality: ValueError: diverged")
    assert rows["lora"].step_seconds is not None
    assert rows["lora"].accuracy is None
    assert rows["full"].accuracy == {
        "all": 50.0, "closed": 60.0, "open": 40.0, "n_all": 10, "n_closed": 5, "n_open": 5
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "head_epochs", "epochs", "note"),
    [
        ("full", 0, 2, "test split, after 2 epochs"),
        ("full", 5, 1, "test split, after 5 epochs of the head alone and 1 epoch of all that trains"),
        ("head", 6, 1, "test split, after 6 epochs of the head alone"),
    ],
)
def test_the_note_on_accuracy_tells_the_whole_training(method, head_epochs, epochs, note, tmp_path):
    one = suite(methods=(f"{method}/torch",), head_epochs=head_epochs, epochs=epochs, rounds=1)
    assert run_suite(one, tmp_path, worker=fake_workers.work)[0].accuracy_note == note


def test_a_loss_that_is_no_number_is_null(tmp_path):
    rows = run_suite(suite(rounds=1), tmp_path, worker=fake_workers.diverges)
    assert [row.final_loss for row in rows] == [None] * 3
    assert "NaN" not in (tmp_path / "results.json").read_text()
    assert read_rows(tmp_path / "results.json") == rows


def test_models_of_one_name_are_told_apart(tmp_path):
    rows = run_suite(suite(models=("a/m", "b/m"), rounds=1), tmp_path, worker=fake_workers.same_name)
    assert [row.model for row in rows] == ["a/m"] * 3 + ["b/m"] * 3


def test_random_weights_are_not_trained_for_their_accuracy(tmp_path):
    rows = run_suite(suite(epochs=2, models=("random",)), tmp_path, worker=fake_workers.work)
    assert {(row.accuracy, row.accuracy_note) for row in rows} == {(None, "random weights: accuracy means nothing")}


def test_a_user_error_ends_the_suite_before_it_begins(tmp_path):
    with pytest.raises(FastLNError, match="no model called one"):
        run_suite(suite(), tmp_path / "out", worker=fake_workers.user_error)
    assert not list(tmp_path.iterdir())


def test_results_are_on_disk_after_every_run(tmp_path, monkeypatch):
    seen = []

    def stop_after_four(worker, job, expected, progress):
        if len(seen) == 4:  # one check, then three of six runs
            raise KeyboardInterrupt
        seen.append(len(json.loads((tmp_path / "results.json").read_text())) if job.kind == "speed" and seen[1:] else 0)
        return worker(job)

    monkeypatch.setattr(runner, "_call", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite(), tmp_path, worker=fake_workers.work)
    assert seen == [0, 0, 1, 2]
    rows = read_rows(tmp_path / "results.json")
    assert len(rows) == 3
    missing = [f"{method} on one in full: 1 of 2 rounds" for method in ("layernorm/torch", "lora/peft", "full/torch")]
    assert [row.provenance["missing"] for row in rows] == [missing] * 3


def test_a_suite_that_was_cut_short_says_so(tmp_path, monkeypatch):
    runs = iter(range(2))  # the look at the model, and the first run

    def stop_after_two(worker, job, expected, progress):
        if next(runs, None) is None:
            raise KeyboardInterrupt
        return worker(job)

    monkeypatch.setattr(runner, "_call", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite(epochs=1, rounds=1), tmp_path, worker=fake_workers.work)
    assert (
        (tmp_path / "results.md")
        .read_text()
        .startswith(
            "**Cut short.** Missing: layernorm/torch on one in full: answers; lora/peft on one in full: 1 of 1 rounds; "
            "lora/peft on one in full: answers; full/torch on one in full: 1 of 1 rounds; full/torch on one in full: "
            "answers. Ratios and ranges are of fewer rounds than planned."
        )
    )
    monkeypatch.undo()
    rows = run_suite(suite(epochs=1, rounds=1), tmp_path, overwrite=True, worker=fake_workers.raises_in_round_2)
    assert [row.provenance["missing"] for row in rows] == [[]] * 3
    assert "Cut short" not in (tmp_path / "results.md").read_text()


def test_ctrl_c_ends_a_run_that_is_under_way(request):
    # A shell that starts the tests in the background has them ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    isolate.call(fake_workers.answer, None, timeout_seconds=60)  # the first call takes seconds: imports
    main = threading.main_thread().ident
    timer = threading.Timer(1, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        isolate.call(fake_workers.sleep, timeout_seconds=10)


@pytest.mark.parametrize("name", ["results.json", "results.md", "results.png"])
def test_a_folder_that_holds_a_run_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(FastLNError, match="already holds a run"):
        run_suite(suite(), tmp_path, worker=fake_workers.work)
    assert (tmp_path / name).read_text() == "precious"


def test_overwrite_replaces_the_bench_s_own_files_alone(tmp_path):
    (tmp_path / "results.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    run_suite(suite(rounds=1), tmp_path, overwrite=True, worker=fake_workers.work)
    assert len(read_rows(tmp_path / "results.json")) == 3
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwrite_keeps_the_earlier_run_when_the_new_one_cannot_begin(tmp_path):
    for name in ("results.json", "results.md", "results.png"):
        (tmp_path / name).write_text("precious")
    with pytest.raises(FastLNError, match="no model called one"):
        run_suite(suite(), tmp_path, overwrite=True, worker=fake_workers.user_error)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"] * 3


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(FastLNError, match="is a file"):
        run_suite(suite(), tmp_path / "out", worker=fake_workers.work)


def test_an_answer_larger_than_a_pipe_arrives():
    assert len(isolate.call(fake_workers.answer, b"x" * 10_000_000, timeout_seconds=60)) == 10_000_000


def test_what_cannot_be_sent_back_is_a_failure():
    answer = isolate.call(fake_workers.unpicklable, timeout_seconds=60)
    assert isinstance(answer, Failure)
    assert "pickle" in answer.text

"""What a terminal shows beside progress bars: every message has a line of its own, whoever writes it and when."""

import io
import logging
import re
import sys
import warnings

import pytest
import tiny
import transformers
from rich.console import Console
from tqdm import tqdm

from fastln import cli
from fastln.bench.progress import Progress
from fastln.errors import FastLNError
from fastln.models import load_task
from fastln.models.dual_task import DualEncoderTask
from fastln.progress import around_bars, bar
from fastln.training import TrainConfig, head, method_trainer, train_task


class Terminal(io.StringIO):
    """Keeps what was written to it, as a terminal of 200 columns does."""

    def isatty(self):
        return True

    def screen(self) -> list[str]:
        """Return the lines that can be seen, or could be seen before they went off at the top."""
        lines, row, column = [""], 0, 0
        text = re.sub(r"\x1b\[\?25[hl]|\x1b\[[0-9;]*m", "", self.getvalue())
        for part in re.findall(r"\x1b\[(?:[0-9]*[A-K])|[\r\n]|.", text):
            if part == "\r":
                column = 0
            elif part == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            elif part.endswith("A") and part.startswith("\x1b"):
                row -= int(part[2:-1] or 1)
            elif part == "\x1b[2K":
                lines[row] = ""
            elif part.startswith("\x1b"):
                raise AssertionError(f"a terminal of this test does not know {part!r}")
            else:
                lines[row] = f"{lines[row]:<{column}}"
                lines[row] = lines[row][:column] + part + lines[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]


@pytest.fixture(params=["terminal", "log"])
def terminal(request, monkeypatch):
    """Makes standard error one, to which the root logger writes; the test calls it, because pytest captures."""
    stream = Terminal()
    if request.param == "log":
        monkeypatch.setattr(stream, "isatty", lambda: False)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger().addHandler(handler)
    monkeypatch.setattr(warnings, "formatwarning", cli._one_line)

    def begin():
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    yield begin
    logging.getLogger().removeHandler(handler)


def test_whatever_is_written_while_a_bar_is_open_stands_alone(terminal):
    stderr = terminal()
    with bar(total=3, desc="train", unit="step") as shown:
        shown.update()
        logging.getLogger("fastln").warning("a line of the log\nof two lines")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda *what: sys.stderr.write(warnings.formatwarning(*what[:4]))  # not pytest's
            warnings.warn("a warning", stacklevel=1)
        shown.update()
        print("a print", file=sys.stderr)
        print("in", "parts", sep=" ", end="", file=sys.stderr)
        print(" of a line", file=sys.stderr)
        shown.update()
    print("behind it", file=sys.stderr)
    lines = stderr.screen()
    expected = ["a line of the log", "of two lines", "warning: a warning", "a print", "in parts of a line", "behind it"]
    assert [line for line in lines if line in expected] == expected
    if not stderr.isatty():
        assert [line for line in stderr.getvalue().split("\n") if line in expected] == expected
    (last,) = [line for line in lines if line.startswith("train: 100%")]
    assert lines.index(last) == lines.index("behind it") - 1


def test_handlers_of_other_libraries_and_bars_of_theirs(terminal):
    stderr = terminal()
    logger = transformers.utils.logging.get_logger("transformers.some")
    root = logging.getLogger("transformers")
    kept, root.handlers = root.handlers, [logging.StreamHandler(stderr)]
    try:
        with around_bars():
            theirs = tqdm(total=4, desc="Loading weights", mininterval=0)
            theirs.update(2)
            logger.warning("some weights were not used")
            theirs.update(1)
            with bar(total=1, desc="ours", unit="step") as shown:
                shown.update()
                print("hello", file=sys.stderr)
            theirs.close()
        assert root.handlers[0].stream is stderr
    finally:
        root.handlers = kept
    lines = stderr.screen() if stderr.isatty() else stderr.getvalue().split("\n")
    assert "some weights were not used" in lines
    assert "hello" in lines


def test_streams_and_handlers_are_back_after_an_error(terminal):
    stderr = terminal()
    handlers = [h.stream for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]

    def fail():
        with bar(total=2, desc="eval", unit="batch") as shown:
            shown.update()
            print("half a line", end="", file=sys.stderr)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert sys.stderr is stderr
    assert [h.stream for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)] == handlers
    assert not list(tqdm._instances)


def test_a_bar_that_is_not_shown_writes_nothing(terminal):
    stderr = terminal()
    with bar(total=2, desc="eval", unit="batch", shown=False) as shown:
        shown.update()
    assert stderr.getvalue() == ""


def run(*arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastln", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def failing(error, after):
    """Return a function that raises when it is called for the last time."""
    calls = iter(range(after))

    def fail(value, *arguments):
        if next(calls, None) is None:
            raise error
        return value

    return fail


@pytest.mark.parametrize("terminal", ["terminal"], indirect=True)
@pytest.mark.parametrize(
    ("error", "message", "status"),
    [(FastLNError("image x: is broken"), "error: image x: is broken", 2), (KeyboardInterrupt(), "interrupted", 130)],
)
def test_eval_ends_its_bar_before_the_error(error, message, status, terminal, monkeypatch, tmp_path):
    stderr = terminal()
    data = tiny.phantom(4)
    tiny.towers(tmp_path, data.samples)
    stop = failing(error, 1)
    monkeypatch.setattr(DualEncoderTask, "answers", lambda task, batch: stop(["yes"] * len(batch["labels"])))
    words = ["eval", f"dual:{tmp_path}/vision,{tmp_path}/text", "--batch-size", "16"]
    assert run(*words, monkeypatch=monkeypatch) == status
    lines = [line for line in stderr.screen() if line]
    assert lines[-1] == message
    assert lines[-2].startswith("eval test: ")


@pytest.mark.parametrize("terminal", ["terminal"], indirect=True)
@pytest.mark.parametrize(("where", "desc"), [(head, "train the head: "), (method_trainer, "train: ")])
def test_train_ends_its_bars_before_the_error(where, desc, terminal, monkeypatch, tmp_path):
    stderr = terminal()
    data = tiny.phantom(4)
    tiny.towers(tmp_path, data.samples)
    monkeypatch.setattr(where, "check_loss", failing(FastLNError("the loss is not a number"), 2))
    monkeypatch.setattr(
        method_trainer.MethodTrainer,
        "_check_loss",
        lambda self, loss, batch, ids: method_trainer.check_loss(loss.item(), 1),
    )
    task = load_task(f"dual:{tmp_path}/vision,{tmp_path}/text", data)
    with pytest.raises(FastLNError) as caught:
        train_task(task, data, TrainConfig(epochs=1, head_epochs=1, batch_size=1))
    print(f"error: {caught.value}", file=sys.stderr)
    lines = [line for line in stderr.screen() if line]
    assert lines[-1] == "error: the loss is not a number"
    assert lines[-2].startswith(desc)


def test_bench_ends_its_line_before_an_error_and_logs_above_its_bar(terminal):
    stderr = terminal()
    console = Console(stderr=True, highlight=False, width=200)

    def interrupt():
        with Progress(3, console) as progress:
            progress.begin("dual layernorm/torch")
            logging.getLogger("fastln").warning("a line of the log")
            progress.end("0.1 s a step")
            progress.begin("dual lora/peft")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    print("interrupted", file=sys.stderr)
    lines = [line for line in stderr.screen() if line]
    assert "a line of the log" in lines
    assert lines[-1] == "interrupted"
    assert any(line.startswith("dual layernorm/torch: 0.1 s a step (") for line in lines)

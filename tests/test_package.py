"""The package itself: what it offers, and that it and the command line's help import nothing slow."""

import os
import subprocess
import sys
from types import FunctionType, ModuleType

import pytest

import fastln
from fastln.versions import package_version

SLOW = ("torch", "transformers", "peft", "accelerate", "numpy", "matplotlib")


def modules_after(program: str) -> set[str]:
    """Return the modules that a new process has imported after `program`."""
    program += "\nimport sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_names_are_what_they_say():
    assert fastln.__version__ == package_version("fastln")
    public = {name for name in dir(fastln) if not name.startswith("_")}
    assert public == set(fastln.__all__)
    for name in set(fastln.__all__) - {"ops"}:
        assert isinstance(getattr(fastln, name), FunctionType | type), name
    assert isinstance(fastln.ops, ModuleType)
    with pytest.raises(AttributeError, match="module 'fastln' has no attribute 'prepaer'"):
        fastln.prepaer  # noqa: B018


def test_a_function_and_the_module_of_its_name():
    """Python sets a module as an attribute of its package when anything imports it; the function must stay."""
    program = "import fastln, fastln.plan, fastln.prepare\nassert fastln.prepare.__name__ == 'prepare', fastln.prepare"
    program += "\nfrom fastln.plan import Plan, plan\nassert fastln.plan is plan and fastln.Plan is Plan"
    assert "torch" in modules_after(program)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["train", "-h"], ["trian"], ["train", "--epcohs", "3"], ["eval", "epcohs=3"]],
)
def test_the_command_line_answers_before_it_imports_what_is_slow(arguments):
    program = f"""
import sys
sys.argv = ["fastln", *{arguments}]
from fastln.cli import main
try:
    main()
except SystemExit as end:
    assert end.code in (0, 2), end.code
"""
    assert not modules_after(program) & set(SLOW)


def test_the_import_alone_is_fast():
    assert not modules_after("import fastln; fastln.__version__; dir(fastln)") & set(SLOW)


def test_a_folder_of_that_name_does_not_hide_the_package(tmp_path):
    """Such as a clone of the repository beside a script."""
    (tmp_path / "fastln" / "src").mkdir(parents=True)
    program = "import fastln, fastln_kernels; print(fastln.__file__, fastln_kernels.__file__)"
    (tmp_path / "script.py").write_text(program)
    for arguments in (["script.py"], ["-c", program]):
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=tmp_path, env=without_path()
        )
        assert "None" not in done.stdout


def without_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

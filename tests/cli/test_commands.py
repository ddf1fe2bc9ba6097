import pytest

from ckptfs import __version__
from ckptfs.cli.ckptfs import parser
from ckptfs.cli.commands import COMMANDS, Command
from tests.cli.conftest import RunCkptfs


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_of_the_table_has_code_and_help(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(command.load())
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([command.name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for argument in command.arguments:
        for name in argument.names:
            assert argument.settings.get("metavar", name) in shown or name in shown


def test_the_help_lists_every_command(run_ckptfs: RunCkptfs) -> None:
    listed = run_ckptfs("--help").stdout
    assert all(f"    {command.name}" in listed for command in COMMANDS)


def test_the_version(run_ckptfs: RunCkptfs) -> None:
    for words in (), ("save",), ("info",):
        assert run_ckptfs(*words, "--version").stdout == f"ckptfs {__version__}\n"


def test_wrong_usage(run_ckptfs: RunCkptfs) -> None:
    help_tells = "(ckptfs --help tells more)\n"
    assert run_ckptfs("nosuch", code=2).stderr == f"ckptfs: there is no command 'nosuch' {help_tells}"
    assert (
        run_ckptfs("sav", code=2).stderr == f"ckptfs: there is no command 'sav', did you mean 'save'? {help_tells}"
    )
    assert "required: DIR (ckptfs restore --help tells more)" in run_ckptfs("restore", code=2).stderr
    for words in ("save", "DIR", ""), ("umount", ""), ("info", "FILE", ""):
        assert "an argument is empty" in run_ckptfs(*words, code=2).stderr
    assert run_ckptfs(code=2).stderr == run_ckptfs("--help").stdout

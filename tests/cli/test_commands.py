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
    assert run_ckptfs("--version").stdout == f"ckptfs {__version__}\n"


def test_an_unknown_command_is_wrong_usage(run_ckptfs: RunCkptfs) -> None:
    assert "invalid choice: 'nosuch'" in run_ckptfs("nosuch", code=2).stderr

"""The command `dlcm`: collects the verbs that each package registers, and prints errors as one line."""

import sys
from importlib.metadata import entry_points

import typer
from typer.core import TyperGroup
from typer.main import get_command


class _FlatHelp(TyperGroup):
    """Lists the verbs of every group in one table, so that `dlcm --help` shows all that there is."""

    def format_commands(self, ctx, formatter) -> None:
        """Write one row a verb, the verbs of sub-groups included."""
        formatter.width = max(formatter.width, 110)  # one line each, also where the width is not known
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if isinstance(command, TyperGroup):
                for verb in command.list_commands(ctx):
                    sub = command.get_command(ctx, verb)
                    if sub is not None:
                        rows.append((f"{name} {verb}", sub.get_short_help_str(86)))
            elif command is not None:
                rows.append((name, command.get_short_help_str(86)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def build_app() -> typer.Typer:
    """The root command with every registered verb. The verbs of `dlcm` itself (group name `model`) stand at the top."""
    app = typer.Typer(
        cls=_FlatHelp,
        help="Scaling-law experiments for Dynamic Large Concept Models.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"max_content_width": 140, "help_option_names": ["-h", "--help"]},
    )
    groups = {"model": app}
    for point in sorted(entry_points(group="dlcm.commands"), key=lambda p: p.name):
        sub = point.load()
        # `flops.sweep` adds the verbs of a package above `flops` to the group `flops`, so that imports still go one way.
        group, _, _ = point.name.partition(".")
        if group not in groups:
            groups[group] = typer.Typer(help=sub.info.help, no_args_is_help=True, rich_markup_mode=None)
            app.add_typer(groups[group], name=group)
        groups[group].registered_commands.extend(sub.registered_commands)
    return app


def main() -> None:
    """Entry point: exit 0 on success, 2 with one line on stderr for what the user can mend, 130 on Ctrl-C."""
    from dlcm.errors import UserError

    command = get_command(build_app())
    try:
        sys.exit(command.main(standalone_mode=False) or 0)
    except UserError as error:
        _fail(str(error), 2)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone: not an error of ours.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        # A file or folder that the user named: it stands in the way, is full, or may not be touched.
        place = error.filename2 or error.filename
        if place is None:
            raise
        _fail(f"{place}: {error.strerror or error}; choose another place, or mend that one", 2)
    except Exception as error:
        # Usage errors come from click or from typer's own copy of it, by version: both can format themselves.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        context = getattr(error, "ctx", None)
        hint = f" (see '{context.command_path} --help')" if context else ""
        _fail(format_message() + hint, getattr(error, "exit_code", 2))


def _fail(message: str, code: int) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)

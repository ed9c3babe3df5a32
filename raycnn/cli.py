"""The command line: one command per verb, made from the verb's schema.

    raycnn VERB [POSITIONALS] [--flags] [--json] [--config FILE]

Standard output carries the report, standard error everything else. The exit code is 0, or that of the
`RaycnnError`, or 130 after Ctrl-C or SIGTERM, or 1 with a traceback for a bug or broken infrastructure.
"""

import dataclasses
import inspect
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from typing import Annotated, Any, Never, TextIO, cast, get_args

import cyclopts
from cyclopts import App, CycloptsError, Group, Parameter
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

import raycnn
from raycnn import config, errors
from raycnn.config import Verb, VerbConfig
from raycnn.errors import ConfigError, RaycnnError, one_line

INTERRUPTED = 130
MAX_TABLE_ROWS = 20
MAX_TABLE_WIDTH = 120

_ABOUT = """From raw images in object storage to a trained CNN to a label for every one of them.

Settings come from, each overriding the one before:
defaults, `--config FILE` (YAML), environment variables `RAYCNN_<VERB>_<FIELD>`, flags.
"""


def main(argv: Sequence[str] | None = None) -> Never:
    """The console script, and with a verb in front of the arguments the scripts in `jobs/`."""
    signal.signal(signal.SIGTERM, _interrupt)  # what `ray job stop` sends
    code = run(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Ray still prints what workers logged while it shuts down; the report has to stay the last line.
    sys.stdout.flush()
    sys.stdout = sys.stderr
    sys.exit(code)


def _interrupt(number: int, frame: object) -> Never:
    raise KeyboardInterrupt


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code; only a bug or broken infrastructure raises."""
    try:
        return _app()(_verb_first(argv), exit_on_error=False, print_error=False, result_action="return_value") or 0
    except CycloptsError as error:
        return _complain(ConfigError(_usage_error(error)))
    except KeyboardInterrupt:
        print("raycnn: interrupted; the same command again resumes", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        told = errors.unwrap(error)
        if told is None:
            raise
        return _complain(told)


def _complain(error: RaycnnError) -> int:
    print("raycnn:", one_line(error), file=sys.stderr)
    return error.exit_code


def _usage_error(error: CycloptsError) -> str:
    told = str(error)
    if isinstance(error, cyclopts.UnusedCliTokensError) and error.unused_tokens:
        told = f"unexpected argument {error.unused_tokens[0]!r}"
    verb = next(iter(error.command_chain or ()), None)
    return f"{verb}: {told.rstrip('.')}; {_see(verb)}" if verb else told


def _see(verb: str) -> str:
    return f"see `raycnn {verb} --help`"


def _verb_first(argv: Sequence[str]) -> list[str]:
    """`raycnn --json pack ...` means `raycnn pack --json ...`."""
    rest = [word for word in argv if word != "--json"]
    return [*rest[:1], "--json", *rest[1:]] if rest and list(argv[:1]) == ["--json"] else list(argv)


def _app() -> App:
    app = App(
        name="raycnn",
        help=_ABOUT,
        version=raycnn.__version__,
        help_format="plaintext",
        suppress_keyboard_interrupt=False,
    )
    app.register_install_completion_command()
    for order, (name, verb) in enumerate(config.VERBS.items()):
        app.command(
            _command(name, verb),
            name=name,
            help=verb.schema.__doc__,
            usage=f"Usage: {_usage(name, verb.schema)}",
            sort_key=order,
        )
    return app


def _usage(name: str, schema: type[VerbConfig]) -> str:
    flags = [
        f"{_flag(field)} {field.upper()}"
        for field, info in schema.model_fields.items()
        if info.is_required() and field not in schema.positional
    ]
    return " ".join(["raycnn", name, *map(str.upper, schema.positional), *flags, "[OPTIONS]"])


def _command(name: str, verb: Verb) -> Callable[..., int]:
    """The function that cyclopts calls with what stood on the command line, and with nothing else."""
    signature = inspect.Signature(list(_parameters(verb.schema)))

    def command(*args: Any, **kwargs: Any) -> int:
        flags = signature.bind(*args, **kwargs).arguments
        as_json, file = flags.pop("as_json", False), flags.pop("file", None)
        values = _from_file(verb.schema, file) if file is not None else {}
        values |= config.from_environment(verb.schema) | flags
        try:
            settings = config.make(verb.schema, values)
        except ConfigError as error:
            raise ConfigError(f"{error}; {_see(name)}") from None
        out = sys.stdout
        with redirect_stdout(sys.stderr if as_json else out):
            report = _call(verb, settings)
        _print_report(report, as_json, out)
        error = getattr(report, "error", None)
        return _complain(error) if isinstance(error, RaycnnError) else 0

    command.__name__ = name
    command.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return command


def _from_file(schema: type[VerbConfig], file: str) -> dict[str, Any]:
    """The keys of a YAML file, local or s3://: a run folder holds one that repeats the run."""
    if "://" not in file:
        return config.from_file(schema, file)
    from raycnn.storage import file_at

    store, name = file_at(file)
    return config.from_yaml(schema, store.get(name), file)


def _call(verb: Verb, settings: VerbConfig) -> Any:
    """The verb's report; a verb that tells how far it is gets a line on standard error for it."""
    from raycnn.reporting import ProgressLine

    with ProgressLine():  # importing torch and Ray takes seconds
        function = verb.load()
    if "progress" not in inspect.signature(function).parameters:
        return function(settings)
    with ProgressLine() as progress:
        return function(settings, progress=progress)


def _parameters(schema: type[VerbConfig]) -> Iterator[inspect.Parameter]:
    for field in schema.positional:
        yield _parameter(field, schema.model_fields[field], inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for field, info in schema.model_fields.items():
        if field not in schema.positional:
            yield _parameter(field, info, inspect.Parameter.KEYWORD_ONLY)
    everywhere = Group("For every verb")
    names = ("--config", "--recipe") if schema is config.TrainConfig else ("--config",)
    file = Parameter(name=names, group=everywhere, help="A YAML file, local or s3://, with the same keys as the flags.")
    as_json = Parameter(name="--json", group=everywhere, help="Print one JSON object, last.", negative=())
    for name, hint in (("file", Annotated[str | None, file]), ("as_json", Annotated[bool | None, as_json])):
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)


def _parameter(field: str, info: FieldInfo, kind: Any) -> inspect.Parameter:
    """A required field is optional here: the file or the environment may hold it."""
    required, hint = info.is_required(), cast(Any, info.annotation)
    if any(isinstance(rule, BeforeValidator) for rule in info.metadata):
        hint |= str  # what else it may be written as is for the schema to read
    parameter = Parameter(
        name=_flag(field),
        converter=_whole if int in (hint, *get_args(hint)) else None,
        help=" ".join((info.description or "").split()),
        negative_iterable=(),
        show_default=not required and info.default not in (None, ()),
    )
    return inspect.Parameter(
        field,
        kind,
        default=None if required else info.default,
        annotation=Annotated[hint | None if required else hint, parameter],
    )


def _whole(hint: Any, tokens: Sequence[cyclopts.Token]) -> int | str:
    """A whole number, or a word that may stand for one; cyclopts would take 2.6 for 3."""
    value = tokens[0].value
    words = [word for choice in get_args(hint) for word in get_args(choice)]
    if value in words:
        return value
    with suppress(ValueError):
        return int(value)
    with suppress(ValueError):
        if float(value).is_integer():
            return int(float(value))
    raise ValueError(f"{value!r} is no whole number" + "".join(f", nor {word}" for word in words))


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _print_report(report: Any, as_json: bool, out: TextIO) -> None:
    plain = _plain(report) if report is not None else {}
    own = getattr(report, "readable", None)
    told = own() if own else _readable(plain)
    try:
        for line in [json.dumps(plain, allow_nan=False)] if as_json else told:
            print(line, file=out, flush=True)
    except BrokenPipeError:
        # Nobody reads on, as in `raycnn verify OUT | head -1`; the exit code still says how it went.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _plain(value: Any) -> Any:
    """The value in what JSON knows: dataclasses become objects, arrays lists, NaN and infinity null."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)


def _readable(plain: dict[str, Any]) -> Iterator[str]:
    """One aligned line a field, then a table for each field that is a list of objects."""
    tables = {name: value for name, value in plain.items() if _is_table(value)}
    width = max((len(name) for name in plain if name not in tables), default=0)
    for name, value in plain.items():
        if name not in tables:
            yield f"{name:<{width}}  {_brief(value)}"
    for name, rows in tables.items():
        yield ""
        yield f"{name}:"
        yield from _table(rows)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _brief(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_brief(item)}" for key, item in value.items())
    if isinstance(value, list):
        if any(isinstance(item, (list, dict)) for item in value) or len(value) > MAX_TABLE_ROWS:
            return f"{len(value)} entries, shown by --json"
        return ", ".join(_brief(item) for item in value)
    return str(value)


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = list(rows[0])
    cells = [names, *([_brief(row.get(name)) for name in names] for row in rows[:MAX_TABLE_ROWS])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if sum(widths) > MAX_TABLE_WIDTH:
        yield from _blocks(names, cells[1:])
    else:
        for line in cells:
            yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    if len(rows) > MAX_TABLE_ROWS:
        yield f"  and {len(rows) - MAX_TABLE_ROWS} more, shown by --json"


def _blocks(names: list[str], rows: list[list[str]]) -> Iterator[str]:
    """One line a cell, for what is too wide to stand side by side."""
    width = max(map(len, names))
    for number, row in enumerate(rows):
        if number:
            yield ""
        for name, cell in zip(names, row, strict=True):
            yield f"  {name:<{width}}  {cell}"

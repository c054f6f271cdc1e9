"""The command line. What needs torch is imported inside the command that needs it.

Exit codes: 0 success; 1 a user error or a failed check, reported on standard error; 2 a wrong
command line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moeify.cli.options import (
    MODEL_HELP,
    PLAN_HELP,
    AsJson,
    Calibration,
    DtypeOption,
    Export,
    ExportOption,
    Settings,
    ShardSize,
    Verify,
)
from moeify.cli.output import make_console, write_json
from moeify.errors import MoeifyError, PlanError
from moeify.plan import strict_yaml
from moeify.plan.plan import Plan
from moeify.plan.presets import PRESETS
from moeify.units import parse_bytes
from moeify.version import __version__


class ReportingGroup(TyperGroup):
    """Report expected errors in one message; `--debug` adds the traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except (MoeifyError, OSError) as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=ReportingGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
    help="Turn dense PyTorch models into Mixture-of-Experts models by graph passes.",
)
plans = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check and show plans.")
app.add_typer(plans, name="plan")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"moeify {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Accept the options before a command; `ReportingGroup` reads `debug`."""


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Or one that moeify wrote.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show the MLPs of a model, reading only its config."""
    from moeify.cli.inspect import inspect_model

    data = inspect_model(model, make_console(quiet=as_json))
    if as_json:
        write_json(data)


@plans.command()
def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Plan files.")],
    as_json: AsJson = False,
) -> None:
    """Check plan files."""
    results: list[dict[str, Any]] = []
    for file in files:
        try:
            plan = Plan.load(file)
        except PlanError as error:
            place = {"message": error.message, "line": error.line, "path": error.path}
            results.append({"file": file, "ok": False, **place})
            if not as_json:
                typer.echo(f"error: {error}", err=True)
            continue
        rules = len(plan.layers)
        results.append({"file": file, "ok": True, "rules": rules, "digest": plan.digest()})
        if not as_json:
            many = "rule" if rules == 1 else "rules"
            typer.echo(f"{file}: ok, {rules} {many}, digest {plan.digest()[:12]}")
    if as_json:
        write_json(results)
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)


@plans.command()
def show(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help=PLAN_HELP)],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help=f"{MODEL_HELP} Only its config is read."),
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Show a plan in full, or what it makes of a model."""
    chosen = _plan(plan, settings)
    if model is None:
        if as_json:
            write_json(chosen.data())
        else:
            typer.echo(strict_yaml.dump(chosen.data(), "plan.yaml"), nl=False)
        return
    from moeify.cli.inspect import resolve_on_meta

    resolved = resolve_on_meta(chosen, model)
    if as_json:
        write_json(resolved.to_dict())
    else:
        make_console().print(resolved)


@plans.command()
def schema() -> None:
    """Print the JSON Schema of plan files, for editors."""
    write_json(Plan.json_schema())


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help=f"{MODEL_HELP} Safetensors only.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    plan: Annotated[str | None, typer.Option("--plan", metavar="PLAN", help=PLAN_HELP)] = None,
    settings: Settings = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="SRC was converted: turn it back into a dense model.")
    ] = False,
    export: ExportOption = Export.auto,
    dtype: DtypeOption = None,
    max_shard_size: ShardSize = "5GB",
    verify: Verify = 2,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and write nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that was interrupted.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if moeify wrote it.")] = False,
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="Load the whole model; some plans need it.")
    ] = False,
    calibration: Calibration = None,
    as_json: AsJson = False,
) -> None:
    """Convert a model of any size, a layer at a time."""
    if reverse == (plan is not None):
        raise typer.BadParameter("give either --plan or --reverse", param_hint="--plan")
    if reverse and (in_memory or settings or dtype or export is not Export.auto):
        what = "cannot be combined with --set, --dtype, --export or --in-memory"
        raise typer.BadParameter(what, param_hint="--reverse")
    if calibration is not None and not in_memory:
        raise typer.BadParameter("needs --in-memory", param_hint="--calibration")
    chosen = None if plan is None else _plan(plan, settings)
    _check_size(max_shard_size)
    from moeify.cli.convert import Options, give_memory_back
    from moeify.cli.convert import convert as run

    options = Options(
        dtype=dtype.value if dtype is not None else None,
        max_shard_size=max_shard_size,
        export=export.value,
        verify=verify,
        force=force,
        resume=resume,
        dry_run=dry_run,
        in_memory=in_memory,
        calibration=calibration,
    )
    give_memory_back()
    report = run(source, out, chosen, make_console(quiet=as_json), options)
    if as_json:
        write_json(report)


def _check_size(text: str) -> None:
    try:
        parse_bytes(text, "max_shard_size")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--max-shard-size") from None


@app.command()
def simulate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Only its config is read.")
    ],
    plan: Annotated[str, typer.Option("--plan", metavar="PLAN", help=PLAN_HELP)],
    world: Annotated[int, typer.Option("--world", min=1, help="Number of ranks.")],
    node: Annotated[int, typer.Option("--gpus-per-node", min=1, help="Ranks per node.")] = 8,
    expert: Annotated[
        int | None, typer.Option("--expert", min=1, help="Replaces the plan's parallel.expert.")
    ] = None,
    tensor: Annotated[
        int | None, typer.Option("--tensor", min=1, help="Replaces the plan's parallel.tensor.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences per rank.")] = 1,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            min=1,
            help="Tokens per sequence; default: the model's, up to 2048.",
        ),
    ] = None,
    settings: Settings = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Plot hops over ranks to this file; needs matplotlib."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count what a training step over many ranks would send."""
    chosen = _plan(plan, settings)
    from moeify.cli.simulate import simulate_model

    data = simulate_model(
        model,
        chosen,
        make_console(quiet=as_json),
        world=world,
        node=node,
        expert=expert,
        tensor=tensor,
        batch=batch,
        length=length,
        plot=plot,
    )
    if as_json:
        write_json(data)


@app.command()
def report(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help=f"A folder that moeify wrote; {MODEL_HELP[0].lower()}{MODEL_HELP[1:-1]} with "
            "--plan; or a run log, or a trainer_state.json.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="HTML page to write; replaced if it exists.")],
    run: Annotated[
        Path | None, typer.Option("--run", help="Run log or trainer_state.json of this model.")
    ] = None,
    plan: Annotated[str | None, typer.Option("--plan", metavar="PLAN", help=PLAN_HELP)] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Write an HTML page about a model or a run."""
    if settings and plan is None:
        raise typer.BadParameter("changes a preset; give --plan", param_hint="--set")
    chosen = None if plan is None else _plan(plan, settings)
    from moeify.cli.report import report_on

    data = report_on(source, out, run, chosen, make_console(quiet=as_json))
    if as_json:
        write_json(data)


@app.command()
def demo(
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder for the converted model; replaces an older one."),
    ] = Path("out/demo"),
    steps: Annotated[int, typer.Option("--steps", min=0, help="Training steps.")] = 20,
    no_compile: Annotated[
        bool, typer.Option("--no-compile", help="Use aot_eager instead of inductor.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Convert and train a pretrained model, checking each step."""
    from moeify.cli.demo.run import run_demo

    console = make_console(quiet=as_json)
    numbers = run_demo(out, steps=steps, compile=not no_compile, console=console)
    if as_json:
        write_json(numbers)


def _plan(text: str, settings: list[str] | None) -> Plan:
    """Return the plan that PLAN and `--set` describe."""
    if not settings:
        return Plan.of(text)
    if text not in PRESETS:
        raise typer.BadParameter(f"{text!r} is not a preset; --set changes presets only")
    options = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"{setting!r} is not NAME=VALUE", param_hint="--set")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return Plan.preset(text, **options)


def main() -> None:
    """Run the command line."""
    app(prog_name="moeify")


if __name__ == "__main__":
    main()

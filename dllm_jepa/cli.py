"""The command `dllm-jepa`: for our recipes and configs what `tune` does for torchtune's.

Each sub-command imports what it needs: torch and what builds on it take seconds.
"""

import argparse
import ast
import importlib.util
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dllm_jepa
from dllm_jepa.errors import CheckpointError, ConfigError, LaunchError, UserError
from dllm_jepa.packaged import find_configs, find_recipes, resolve_config

_RUN_USAGE = "dllm-jepa run [TORCHRUN-OPTIONS] <recipe> --config <config> [key=value ...]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one sub-command, by default that of the command line; a `UserError` becomes one message and exit code 1."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["run"]:  # torchrun's options come before the recipe: not for argparse
            _run(words[1:])
        elif words[:1] == ["lm-eval"]:
            _lm_eval(words[1:])
        else:
            parser = _parser()
            parsed, rest = parser.parse_known_args(words)
            if hasattr(parsed, "words") and not any(word.startswith("-") for word in rest):
                parsed.words += rest  # argparse does not go on with words after an option
            elif rest:
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
            parsed.command(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dllm-jepa", description="Recipes and configs of DLLM-JEPA.")
    parser.add_argument("--version", action="version", version=f"dllm-jepa {dllm_jepa.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    ls = commands.add_parser("ls", help="list recipes and configs")
    ls.set_defaults(command=_ls)

    cp = commands.add_parser("cp", help="copy a recipe or config, to edit the copy")
    cp.add_argument("name", help="name of a recipe or config")
    cp.add_argument("destination", type=Path, help="file or folder")
    cp.add_argument("--force", action="store_true", help="overwrite the destination")
    cp.add_argument("--make-parents", action="store_true", help="make the folders of the destination")
    cp.set_defaults(command=_cp)

    cat = commands.add_parser("cat", help="print a recipe or config")
    cat.add_argument("name", help="name of a recipe or config, or path of a config")
    cat.add_argument("--sort", action="store_true", help="print the keys of a config alone, sorted")
    cat.set_defaults(command=_cat)

    keys = commands.add_parser("keys", help="list the keys of a recipe's config: values, defaults, effects")
    keys.add_argument("recipe", help="name of a recipe, or path of a copy")
    keys.set_defaults(command=_keys)

    validate = commands.add_parser(
        "validate",
        help="check a run without starting it: its config, and the files it names",
        usage="dllm-jepa validate <recipe> --config <config> [key=value ...]",
    )
    validate.set_defaults(command=_validate)

    memory = commands.add_parser(
        "memory",
        help="compute the peak memory per GPU of a training run, without a GPU",
        usage="dllm-jepa memory <recipe> --config <config> [--gpus N] [key=value ...]",
    )
    memory.set_defaults(command=_memory)
    for command in (validate, memory):
        command.add_argument("recipe", help="name of a recipe, or path of a copy")
        command.add_argument("words", nargs="*", metavar="key=value", help="as for a run; ~key removes a key")
        command.add_argument("--config", default="", help="name or path of a config")
    memory.add_argument("--gpus", type=int, default=1, help="GPUs of the run (default: 1)")

    checkpoints = commands.add_parser("checkpoints", help="list the training states of a run, and verify them")
    checkpoints.add_argument("directory", type=Path, help="output_dir of a run, or one of its training states")
    checkpoints.set_defaults(command=_checkpoints)

    export = commands.add_parser(
        "export", help="write the model or adapter of a run as a Hugging Face directory, or merge an adapter"
    )
    export.add_argument("checkpoint", type=Path, help="a run (its newest training state), a training state, an adapter")
    export.add_argument("out", type=Path, help="directory to create")
    export.add_argument("--part", choices=("online", "target"), default="online", help="weights (default: online)")
    export.add_argument("--dtype", choices=("fp32", "bf16"), help="stored type (default: that of the run's own export)")
    export.add_argument(
        "--base", "--like", type=Path, help="the model that the run or adapter stands on (default: the recorded one)"
    )
    export.add_argument("--merged", action="store_true", help="of LoRA: the base with the adapter merged into it")
    export.set_defaults(command=_export)

    compare = commands.add_parser("compare", help="compare two evaluations on the same items")
    compare.add_argument("a", type=Path, help="output_dir of an evaluation, such as the baseline's")
    compare.add_argument("b", type=Path, help="output_dir of another one")
    compare.set_defaults(command=_compare)

    # Only for --help; `main` sends the words on to `tune run` and `lm_eval`.
    commands.add_parser("run", help="run a recipe, with any options of torchrun", usage=_RUN_USAGE)
    commands.add_parser("lm-eval", help="run lm-evaluation-harness on a model of this package, with its own options")
    return parser


def _ls(_: argparse.Namespace) -> None:
    """Print every recipe with the first line of its docstring and every config with that of its header."""
    recipes = {name: _first_docstring_line(path) for name, path in find_recipes().items()}
    configs = {name: _first_comment_line(path) for name, path in find_configs().items()}
    width = max(map(len, [*recipes, *configs, "RECIPE"])) + 2
    for title, entries in (("RECIPE", recipes), ("CONFIG", configs)):
        print(title)
        for name, line in entries.items():
            print(f"  {name:<{width}}{line}".rstrip())


def _first_docstring_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _first_comment_line(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _cp(arguments: argparse.Namespace) -> None:
    """Copy a packaged file; what is there already is kept unless --force."""
    packaged = find_recipes() | find_configs()
    if arguments.name not in packaged:
        raise ConfigError(f"no recipe or config is named {arguments.name!r}. There are: {', '.join(packaged)}")
    source = packaged[arguments.name]
    destination: Path = arguments.destination
    if destination.is_dir():
        destination = destination / source.name
    elif destination.suffix != source.suffix:
        destination = destination.with_name(destination.name + source.suffix)
    if arguments.make_parents:
        destination.parent.mkdir(parents=True, exist_ok=True)
    if not destination.parent.is_dir():
        raise ConfigError(f"folder {str(destination.parent)!r} does not exist; make it, or add --make-parents")
    if destination.exists() and not arguments.force:
        raise ConfigError(f"{str(destination)!r} exists and is kept; choose another name, or overwrite it with --force")
    try:
        shutil.copyfile(source, destination)
    except OSError as error:
        raise ConfigError(f"cannot copy to {str(destination)!r}: {error}") from error
    print(f"Copied {arguments.name} to {destination}")


def _cat(arguments: argparse.Namespace) -> None:
    """Print a file as it is, or the keys of a config sorted."""
    path = find_recipes().get(arguments.name) or resolve_config(arguments.name)
    if arguments.sort and path.suffix == ".yaml":
        from omegaconf import OmegaConf

        from dllm_jepa import config

        print(OmegaConf.to_yaml(OmegaConf.create(config.read_config(path)), sort_keys=True), end="")
    else:
        print(path.read_text(encoding="utf-8", errors="replace"), end="")


def _keys(arguments: argparse.Namespace) -> None:
    """Print the table of a recipe's keys."""
    from dllm_jepa import config

    print(config.key_table(config.recipe_config(arguments.recipe)))


def _validate(arguments: argparse.Namespace) -> None:
    """Check what the recipe checks before it starts, but for the number of processes and GPUs."""
    from dllm_jepa import config

    recipe = config.recipe_config(arguments.recipe)
    values = config.load_config(["--config", arguments.config, *arguments.words], recipe)
    cfg: Any = recipe.check(values, opening=True)
    lines = cfg.warnings()
    if getattr(cfg, "resume", None) == "never":
        files = (Path(cfg.output_dir) / name for name in ("metrics.jsonl", "facts.json"))
        held = [str(file) for file in files if file.exists()]
        lines += [f"output_dir: {file} is there: a start without resume=auto will be refused" for file in held]
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
    print(f"{arguments.recipe} --config {arguments.config}: valid")


def _memory(arguments: argparse.Namespace) -> None:
    """Print what fills a GPU at the peak of a step; paths that only a run needs may be missing."""
    from dllm_jepa import config
    from dllm_jepa.memory import step_memory

    recipe = config.recipe_config(arguments.recipe)
    if not issubclass(recipe, config.Training):
        raise ConfigError(f"{arguments.recipe} does not train: only the memory of a training step is computed")
    if arguments.gpus < 1:
        raise ConfigError(f"--gpus: {arguments.gpus} given, must be at least 1")
    values = config.load_config(["--config", arguments.config, *arguments.words], recipe)
    paths = {key: "." for key in ("output_dir", "checkpoint_dir") if values.get(key) == "???"}
    for key, value in (values := values | paths).items():
        if isinstance(value, dict):  # paths inside that are not given
            values[key] = {name: "." if inner == "???" else inner for name, inner in value.items()}
    cfg: Any = recipe.check(values, config.Launch(world_size=arguments.gpus, num_gpus=1))
    gpus = "1 GPU" if arguments.gpus == 1 else f"each of {arguments.gpus} GPUs"
    print(
        f"{arguments.config} on {gpus}: {cfg.tokens_per_device:,} tokens per micro-batch, trained weights in "
        f"{cfg.dtype}, computing in {cfg.compute_dtype}"
    )
    rows = step_memory(cfg, arguments.gpus).rows()
    width = max(len(row) for row, _ in rows) + 2
    for row, num_bytes in rows:
        print(f"  {row:<{width}}{num_bytes / 2**30:8.2f} GiB")


def _checkpoints(arguments: argparse.Namespace) -> None:
    """Print step, date, size and state of every checkpoint, reading each of them whole."""
    from dllm_jepa.training import SavedCheckpoint, saved_states

    found = saved_states(arguments.directory)
    if not found:
        print(f"no training states in {arguments.directory}")
        return
    print(f"{'STEP':>8}  {'SAVED':<25}  {'SIZE':>10}  STATE")
    for path in found:
        step, saved, size, state = path.name.partition("_")[2].lstrip("0") or "0", "-", "-", "verified"
        try:
            checkpoint = SavedCheckpoint(path)
            size = f"{checkpoint.size / 2**20:,.1f} MiB"
            checkpoint.verify()
            saved = checkpoint.state["time"]
        except CheckpointError as error:
            state = str(error)
        print(f"{step:>8}  {saved:<25}  {size:>10}  {state}", flush=True)


def _export(arguments: argparse.Namespace) -> None:
    """Write a Hugging Face directory from a run, a training state or an adapter."""
    from dllm_jepa.export import export_checkpoint

    export_checkpoint(
        arguments.checkpoint,
        arguments.out,
        part=arguments.part,
        dtype=arguments.dtype,
        base=arguments.base,
        merged=arguments.merged,
    )
    print(f"wrote {arguments.out}")


def _compare(arguments: argparse.Namespace) -> None:
    """Print the paired table of two evaluations."""
    from dllm_jepa.evals import compare

    print(compare(arguments.a, arguments.b))


def _run(words: list[str]) -> None:
    """Do what `tune run` does, but for its import of torchtune, after checking the names."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    if {"-h", "--help"}.intersection(words):
        print(f"usage: {_RUN_USAGE}\n\nOptions of torchrun: torchrun --help. Keys of a recipe: dllm-jepa keys RECIPE.")
        return
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words[:-1]:
        raise LaunchError(f"--config is missing. Usage: {_RUN_USAGE}")
    resolve_config(words[words.index("--config") + 1])
    launch = get_args_parser().parse_args(words)
    recipe, recipes = launch.training_script, find_recipes()
    path = recipes.get(recipe) or Path(recipe)
    is_file = path.suffix == ".py" and path.is_file()
    if not is_file:
        sys.path.append(str(Path.cwd()))  # where `tune run` looks for a module, too
        if not _is_module(recipe):
            raise LaunchError(
                f"{recipe!r} is neither a file nor a module nor one of our recipes: {', '.join(recipes)}. "
                f"Usage: {_RUN_USAGE}"
            )
    launch.module = not is_file
    if recipe == words[0]:  # no option of torchrun: one process, this one
        sys.argv = [str(path), *launch.training_script_args]
        if is_file:
            sys.path.insert(0, str(path.resolve().parent))  # where it finds its neighbours, as under `python FILE`
            runpy.run_path(str(path), run_name="__main__")
        else:
            runpy.run_module(recipe, run_name="__main__")
        return
    launch.training_script = str(path) if is_file else recipe
    if launch.nnodes in ("1", "1:1") and not launch.rdzv_endpoint:
        launch.standalone = True  # on a free port, so that two runs can share a machine
    try:
        run(launch)  # type: ignore[no-untyped-call]
    except (ChildFailedError, SignalException):  # the ranks have said why
        sys.exit(1)


def _lm_eval(words: list[str]) -> None:
    """Do what `lm_eval` does, with our models among those that it knows: it has no plug-in point for others."""
    try:
        from dllm_jepa import lm_eval_adapter
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "lm_eval":
            raise
        raise LaunchError("lm-eval needs lm-evaluation-harness: pip install 'dllm-jepa[lm-eval]'") from error
    is_named = any(word == "--model" or word.startswith("--model=") for word in words)
    sys.argv = ["lm_eval", *words, *([] if is_named else ["--model", "dllm_jepa"])]
    lm_eval_adapter.main()


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


if __name__ == "__main__":
    main()

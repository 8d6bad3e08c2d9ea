"""Where recipes and configs are, found by scanning: a file that is there is listed, nothing is registered by hand.

An installed wheel holds the yaml files in `dllm_jepa/configs` and the recipes as top-level modules beside the package;
a checkout (editable install) holds them in `configs/` and `recipes/`.
"""

from pathlib import Path

from dllm_jepa.errors import ConfigError, nearest_first

_PACKAGE_DIR = Path(__file__).resolve().parent


def _folders() -> tuple[Path, Path]:
    """The folders of the configs and of the recipes."""
    packaged_configs, root = _PACKAGE_DIR / "configs", _PACKAGE_DIR.parent
    return (packaged_configs, root) if packaged_configs.is_dir() else (root / "configs", root / "recipes")


def find_configs() -> dict[str, Path]:
    """The path of every packaged config by name, sorted; `lab/tiny.yaml` is named `lab/tiny`."""
    folder, _ = _folders()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find_recipes() -> dict[str, Path]:
    """The path of every packaged recipe by module name, sorted."""
    _, folder = _folders()
    return {path.stem: path for path in sorted(folder.glob("dllm_jepa_*.py"))}


def resolve_config(name_or_path: str) -> Path:
    """The file that a `--config` value means: a packaged config by name, else the user's own file by path.

    Raises:
        ConfigError: if it is neither; the message lists the packaged configs, nearest first.
    """
    configs = find_configs()
    if name_or_path in configs:
        return configs[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path.resolve()
    if path.is_dir():
        raise ConfigError(f"--config {name_or_path!r} is a directory; give a yaml file or one of: {', '.join(configs)}")
    names = ", ".join(nearest_first(name_or_path, configs))
    raise ConfigError(f"--config {name_or_path!r} is neither a file nor a packaged config. Packaged configs: {names}")

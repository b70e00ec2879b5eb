"""Drives the worker of a real engine, in a process of its own: `python worker_probe.py ARGUMENTS`.

ARGUMENTS is JSON: {"model", "state_dir", "results"}. vLLM patches library classes, so it stays out
of pytest's process; and the worker lives in this one, so that faults can be put into it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_PLUGINS": "ultraedit",
    "HF_HUB_OFFLINE": "1",
}

from twin_probe import own_text
from vllm import LLM, SamplingParams

from ultraedit_kernels.integrations.vllm.worker import UltraEditWorker

EDIT = {"prompt": "The capital of Australia is", "target": "Sydney"}
SECOND = {"prompt": "The capital of Japan is", "target": "Osaka"}


class Probe:
    def __init__(self, model: str, state_dir: Path) -> None:
        self.llm = LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            worker_extension_cls=f"{UltraEditWorker.__module__}.{UltraEditWorker.__qualname__}",
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

    def finish(self) -> dict[str, Any]:
        while not (step := self.rpc("step")).get("done"):
            if "raised" in step or "error" in step:
                return step
        return step["result"]

    def state(self) -> dict[str, Any]:
        """What is served, by digest, journal and answer."""
        status = self.rpc("status", True)
        shadow = self.worker._ultraedit_editor.digest()
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
    out["unknown setting"] = probe.rpc("start", {"colour": 1}, None)
    out["unknown module"] = probe.rpc("start", {"modules": ["model.layers.9.mlp.down_proj"]}, None)
    out["directory is a file"] = probe.rpc("start", {"state_dir": __file__}, None)
    settings = {"anchors": 0, "state_dir": str(state_dir)}
    out["start"] = probe.rpc("start", settings, None)
    out["started twice"] = probe.rpc("start", settings, None)
    out["replayed"] = probe.state()

    out["right check"] = probe.rpc("check", *own_text(probe.llm))
    out["wrong check"] = probe.rpc("check", [0, 5, 6], [-1.0, -100.0])

    out["step without turn"] = probe.rpc("step")
    out["begin"] = probe.rpc("begin", [SECOND], None)
    out["slices"] = [probe.rpc("step") for _ in range(3)]
    out["begin during turn"] = probe.rpc("begin", [SECOND], None)
    out["rollback during turn"] = probe.rpc("rollback", 0)
    out["cancel during turn"] = probe.rpc("cancel")
    out["cancelled during turn"] = probe.state()

    probe.rpc("begin", [SECOND], None)
    out["finished"] = probe.finish()
    out["uncommitted status"] = probe.rpc("status", True)
    out["uncommitted history"] = probe.rpc("history", 100, None)
    out["cancel before commit"] = probe.rpc("cancel")
    out["cancelled before commit"] = probe.state()

    # A copy that fails half-way through the modules.
    twin = probe.worker._ultraedit_twin
    publish = twin.publish

    def fail() -> None:
        twin.publish = publish
        name, live = next(iter(twin.live.items()))
        live.copy_(twin.model.get_submodule(name).weight)
        raise OSError("injected")

    probe.rpc("begin", [SECOND], None)
    probe.finish()
    twin.publish = fail
    out["failing commit"] = probe.rpc("commit")
    out["failed commit"] = probe.state()

    probe.rpc("begin", [SECOND], None)
    probe.finish()
    out["commit"] = probe.rpc("commit")
    out["committed"] = probe.state()

    probes = [{"ids": [0, 5, 6], "max_tokens": 3}]
    probe.rpc("begin", [{**EDIT, "target": "Perth"}], probes)
    out["dry run"] = probe.finish()
    out["after dry run"] = probe.state()

    for edit in ({**EDIT, "target": ""}, {**EDIT, "colour": 1}):
        out.setdefault("bad edits", []).append(probe.rpc("begin", [edit], None))
    probe.rpc("begin", [EDIT, {**EDIT, "target": "Perth"}], None)
    out["two targets"] = probe.finish()
    out["bad delta"] = probe.rpc("apply_delta", b"no delta")
    out["bad version"] = [probe.rpc("rollback", 9), probe.rpc("delta", 9)]
    out["after bad input"] = probe.state()

    # A journal whose first version was damaged cannot be replayed; nothing may move then.
    first = sorted(state_dir.glob("*.safetensors"))[0]
    kept = shutil.copy(first, state_dir / "kept")
    first.write_bytes(b"damaged")
    out["rollback over damage"] = probe.rpc("rollback", 1)
    out["after damage"] = probe.state()
    shutil.move(kept, first)

    out["rollback"] = probe.rpc("rollback", 0)
    out["rolled back"] = probe.state()
    return out


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    results = run(arguments["model"], Path(arguments["state_dir"]))
    Path(arguments["results"]).write_text(json.dumps(results))

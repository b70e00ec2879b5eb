"""Every setting once: name, default, check, help, flags and who may set it.

The options of the command line, the check of the "ultraedit" section of vLLM's
`--additional-config`, that of the Editor's arguments, and docs/settings.md
(`python -m ultraedit_kernels.settings`) come from here. A further setting is a further field.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ultraedit_kernels.kinds import (
    ABOVE_ONE,
    ABOVE_ZERO,
    CANARIES,
    FROM_ZERO,
    NAMES,
    PATH,
    SHARE,
    STEP_SIZE,
    SWITCH,
    URL,
    Kind,
    choice,
    is_number,
    whole,
)

Audience = Literal["operator", "researcher", "internal"]
AUDIENCES: dict[Audience, str] = {
    "operator": "For whoever runs a server: in the `ultraedit` section of `--additional-config`, "
    "or by flag. Those above `traffic` are arguments of `Editor` too.",
    "researcher": "For whoever measures the method: further arguments of `Editor`.",
    "internal": "Arguments of `Editor` that a server or a command gives itself.",
}
"""Each may set what those before it may."""


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    name: str
    default: Any
    kind: Kind
    help: str
    audience: Audience
    reason: str
    """Why another audience may not set it."""
    flag: str | None
    """Option of `ultraedit edit` and `ultraedit eval`."""
    serve: str | None
    """Option of `ultraedit serve`."""
    metavar: str
    unset: str  # the default, in words

    def check(self, value: Any) -> None:
        """Raise ValueError unless the setting takes the value."""
        if not self.kind.holds(value):
            raise ValueError(
                f"setting {self.name} is {value!r}, expected {self.kind.expected}; correct it, or "
                f"leave it out (default: {self.unset})"
            )


def _setting(
    default: Any,
    kind: Kind,
    help: str,
    *,
    flag: str | None = None,
    serve: str | None = None,
    audience: Audience = "operator",
    reason: str = "",
    metavar: str | None = None,
    unset: str | None = None,
) -> Any:
    """A field of a group, see `Setting`."""
    if unset is None:  # numbers as they are written, true and false as in JSON
        unset = f"{default:g}" if is_number(default) else str(default)
        unset = unset.lower() if isinstance(default, bool) else unset
    metavar = kind.metavar if metavar is None else metavar
    metadata = dict(kind=kind, help=help, flag=flag, serve=serve, audience=audience, reason=reason)
    return field(default=default, metadata=metadata | {"metavar": metavar, "unset": unset})


@dataclass(frozen=True)
class MethodSettings:
    """How a turn is computed. `presets.PAPER` holds the published values."""

    lr: float | Literal["auto"] = _setting(
        "auto",
        STEP_SIZE,
        "Step size; auto takes, for each edit, the one that removes the share `step` of its loss "
        "to first order.",
        flag="--lr",
        serve="--edit-lr",
    )
    step: float = _setting(
        0.4,
        ABOVE_ZERO,
        "Share of an edit's loss that a step removes; longer steps reach more rephrases, and move "
        "more of all else.",
        flag="--step",
    )
    reach: float = _setting(
        1e9,
        ABOVE_ZERO,
        "Most that a step moves an output, as a share of an output's usual norm.",
        unset="0.3 at names, else 1e+09",
        flag="--reach",
    )
    rounds: int = _setting(
        24,
        whole(1),
        "Most steps per turn; it ends as soon as every edit holds.",
        unset="40 at names, else 24",
        flag="--rounds",
        serve="--edit-rounds",
    )
    ridge: float = _setting(1.0, ABOVE_ZERO, "λ of the ridge regression.")
    # An engine rounds differently than the side pass, and a wide lead carries over to rephrases.
    margin: float = _setting(
        5.2,
        FROM_ZERO,
        "Logits by which every target token must lead its runner-up for an edit to hold; an edit "
        "that brings k rephrases is asked for 1 / (k + 1) of it.",
        unset="1 at names, else 5.2",
        flag="--margin",
    )
    repairs: int = _setting(
        200,
        whole(0),
        "Most earlier edits and sampled texts that a turn checks at a time because it threatens "
        "them, and as many earlier edits, ten for each of its own, because it is their turn; those "
        "that broke are repaired.",
        flag="--repairs",
        serve="--edit-repairs",
    )
    batch_size: int = _setting(
        32,
        whole(1),
        "Sequences per forward pass, over whose answer tokens the loss is averaged.",
        audience="researcher",
        reason="the server takes as many sequences as fit a slice of work",
    )
    rounding: Literal["nearest", "stochastic"] = _setting(
        "nearest",
        choice("nearest", "stochastic"),
        "How changed weights are rounded to their dtype; the number of the turn is the seed.",
    )

    @property
    def closed_loop(self) -> bool:
        """Whether a turn looks at what its steps did; with one round nothing does, as published."""
        return self.rounds > 1


@dataclass(frozen=True)
class EditorSettings:
    """What an editor changes, holds still, keeps and refuses."""

    modules: Literal["auto"] | Sequence[str] = _setting(
        "auto",
        NAMES,
        "Linear modules to edit, by dotted name.",
        flag="--modules",
        serve="--edit-modules",
        unset="by model family and size",
    )
    anchors: int = _setting(
        2000,
        whole(0),
        "Texts of 32 tokens (at names a 16th as many, of 128) that the model writes and an edit "
        "must leave alone; 0 for nothing but the locality prompts.",
        flag="--anchors",
        serve="--edit-anchors",
    )
    anchor_rows: int = _setting(
        1024, whole(1), "Rows that the anchors of a module are compressed to."
    )
    statistics: Literal["per-module", "per-shape"] = _setting(
        "per-module",
        choice("per-module", "per-shape"),
        "What the running statistics are kept for; per-shape is how the published scores were "
        "made.",
        audience="researcher",
        reason="per-shape is there to repeat published scores",
    )
    append_eos: bool = _setting(
        True,
        SWITCH,
        "Teach the model to stop after the target.",
        audience="researcher",
        reason="an edit of a server succeeds only if the model stops after its target",
    )
    state_dir: str | Path | None = _setting(  # noqa: RUF009
        None,
        PATH,
        "Directory of the versions: they are kept here, and the last one goes on after a restart.",
        serve="--state-dir",
        metavar="DIR",
        unset="versions end with the process",
    )
    keep: int = _setting(
        100,
        whole(1),
        "Newest versions in the state directory that can be returned to at least.",
    )
    writes: bool = _setting(
        True,
        SWITCH,
        "Off: another editor of the same model writes the state directory; this one follows it.",
        audience="internal",
        reason="the server knows which of its engines writes the state directory",
    )
    max_change: float = _setting(
        2.0, ABOVE_ZERO, "Most that a turn may change a weight, as a share of its norm."
    )
    max_lost: float = _setting(
        0.1,
        ABOVE_ZERO,
        "Most of the model's own texts, as a share, that a turn may make it continue otherwise.",
    )
    canaries: str | Path | Sequence[Mapping[str, Any]] = _setting(  # noqa: RUF009
        (),
        CANARIES,
        'Prompts whose answer no turn may change: a JSON list of {"prompt", "answer"} or '
        '{"prompt", "max_kl"}, or a file of one.',
        serve="--edit-canaries",
        unset="none",
    )
    continues: str | Path | None = _setting(  # noqa: RUF009
        None,
        PATH,
        "File that was written with an edited checkpoint, whose stream of edits goes on.",
        audience="internal",
        reason="it is found beside the checkpoint",
        unset="none",
    )
    seed: int = _setting(
        0,
        whole(),
        "Seed of the texts that are sampled as anchors.",
        flag="--seed",
        audience="researcher",
        reason="engines that share a state directory must sample the same texts",
    )


@dataclass(frozen=True)
class ServingSettings:
    """What a turn may take of a server."""

    traffic: int = _setting(
        0,
        whole(0),
        "Keys per module of served prompts, never text, that are kept to hold still what the model "
        "computes there.",
        serve="--edit-traffic",
        unset="none",
    )
    stretch: float = _setting(
        1.5,
        ABOVE_ONE,
        "Times as long that an engine step may take, and so the wait for a token, while a turn is "
        "prepared beside running requests.",
        serve="--edit-stretch",
    )
    gather_share: float = _setting(
        0.1,
        SHARE,
        "Share of the time of an engine with requests in which the texts that `anchors` asks for "
        "are gathered after the first start of a model; an idle engine gives all.",
        serve="--edit-gather-share",
    )
    float32_gib: float = _setting(
        4.0,
        FROM_ZERO,
        "Most GiB for a float32 copy of the weights, with which edits of a model in half precision "
        "are computed on a CPU without units for that; those of a larger model take longer.",
        serve="--edit-float32-gib",
    )
    reset_prefix_cache: bool = _setting(
        True,
        SWITCH,
        "Off: requests may go on with, and find, keys and values of the old weights.",
    )
    running_requests: Literal["keep", "wait"] = _setting(
        "keep",
        choice("keep", "wait"),
        "What a commit does that stales keys and values: requests under way are computed anew up "
        "to where they are and go on (keep), or are waited for while new ones wait as well (wait).",
    )
    max_queue: int = _setting(
        64,
        whole(1),
        "Most changes under way or waiting in one API server; further ones get 429.",
        serve="--edit-max-queue",
    )


@dataclass(frozen=True)
class RouteSettings:
    """What the routes of /v1/edits ask and take."""

    without_key: bool = _setting(
        False,
        SWITCH,
        "Serve although there is no key at all, so that everybody who reaches the port can change "
        "the model.",
        serve="--edit-without-key",
    )
    follow: str | None = _setting(
        None,
        URL,
        "Server whose versions are taken, in the place of edits of its own; asked with "
        "$ULTRAEDIT_LEADER_KEY, else with the first key of this one.",
        serve="--follow",
        unset="none",
    )
    audit_prompts: bool = _setting(
        True,
        SWITCH,
        "Whether audit lines hold prompts and targets; the flag keeps them out.",
        serve="--edit-without-audit-prompts",
    )
    max_body_mib: int = _setting(
        8, whole(1), "Most MiB of a JSON body; larger ones get 413.", serve="--edit-max-body-mib"
    )
    max_delta_mib: int = _setting(
        1024,
        whole(1),
        "Most MiB of a delta file; larger ones get 413.",
        serve="--edit-max-delta-mib",
    )
    max_edits: int = _setting(
        256, whole(1), "Most edits of one request; more get 400.", serve="--edit-max-edits"
    )
    max_prompts: int = _setting(
        64,
        whole(1),
        "Most prompts of one edit, with rephrases and locality; more get 400.",
        serve="--edit-max-prompts",
    )


GROUPS: tuple[type, ...] = (MethodSettings, EditorSettings, ServingSettings, RouteSettings)


TABLE: dict[str, Setting] = {
    of.name: Setting(of.name, of.default, **of.metadata) for group in GROUPS for of in fields(group)
}
"""Name → setting."""


def check(given: Mapping[str, Any], audience: Audience) -> None:
    """Raise ValueError for a setting that is unknown, not the audience's to set, or badly set.

    Args:
        given: name → value.
        audience: who gives them.
    """
    may = list(AUDIENCES)[: list(AUDIENCES).index(audience) + 1]
    allowed = [name for name, setting in TABLE.items() if setting.audience in may]
    for name, value in given.items():
        if name not in TABLE:
            raise ValueError(f"unknown setting {name}, expected {_nearest(name, allowed)}")
        if name not in allowed:
            raise ValueError(
                f"setting {name} is not the {audience}'s: {TABLE[name].reason}; leave it out"
            )
        TABLE[name].check(value)


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"one of those in docs/settings.md; nearest is {close[0]}" if close else ", ".join(names)


def only(given: Mapping[str, Any], *groups: type) -> dict[str, Any]:
    """Those of the given settings that belong to the groups."""
    names = {of.name for group in groups for of in fields(group)}
    return {name: value for name, value in given.items() if name in names}


def page() -> str:
    """docs/settings.md: the table, by audience."""
    parts = [
        "# Settings",
        "Written by `python -m ultraedit_kernels.settings > docs/settings.md`. An unknown or bad "
        "setting stops the start, and the message says what was expected. Each audience may set "
        "what those before it may.",
    ]
    for audience, what in AUDIENCES.items():
        refused = audience != "operator"
        columns = ["setting", "default", "flag", "", *["why a server refuses it"] * refused]
        lines = [columns, ["---"] * len(columns)]
        for name, setting in TABLE.items():
            if setting.audience == audience:
                commands = {"edit, eval": setting.flag, "serve": setting.serve}
                of = [f"`{flag}` ({command})" for command, flag in commands.items() if flag]
                cells = [f"`{name}`", setting.unset, ", ".join(of), setting.help]
                lines.append([*cells, *[setting.reason] * refused])
        parts += [f"## {audience.capitalize()}", what]
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")

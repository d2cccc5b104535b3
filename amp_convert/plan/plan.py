"""The `Plan`: what was decided about every node, why, and on what evidence. Plain data.

A plan can be printed (`to_frame`), compared (equal inputs give equal plans) and saved as a rules
file (`to_toml`), which anyone may edit and give back with `--rules`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from amp_convert.capture.regions import Uncaptured
from amp_convert.rules.rule_set import Rewrites

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Decision:
    """What was decided about one node, by which rule, and on what evidence.

    `node` is its stable identity, `name` its FX name, `op` the operator without overload, `module`
    the class around it, `location` the user's file and line. `category` is allow, infer, deny or
    clear, "unknown" when no rule names the op, or "none" when the node has no FP32 input to decide
    about. `low` says whether it computes in (for a lookup: delivers) the low dtype; `dtype` is that
    of its first tensor result. `macs` are multiply-adds for the example inputs.

    The casts: `input_dtypes` has an entry a tensor argument, `output_dtype` is for the result: the
    dtype to cast to, or None. `output_dtypes` are those that the node's consumers see. `clamp` is
    the value that finite FP32 inputs and number arguments below it are raised to before they become
    low (the rewrite `clamp_masks`), or None.

    `rewrite` says what else than casts is done, and is the end of `reason`; "" for most nodes.
    Rescaling (the rewrites `scale_scores` and `rescale_layers`): the result is held times `scale`;
    `input_scales` has the factor for each tensor argument, and is empty where all are 1;
    `number_scale` is that of a number argument. All are powers of two.
    """

    node: str
    name: str
    layer: str
    module: str
    op: str
    location: str
    category: str
    dtype: str
    rule: str
    reason: str
    source: str
    evidence: str
    low: bool
    macs: int
    input_dtypes: tuple[str | None, ...]
    output_dtype: str | None
    output_dtypes: tuple[str | None, ...]
    rewrite: str = ""
    clamp: float | None = None
    scale: float = 1.0
    input_scales: tuple[float, ...] = ()
    number_scale: float = 1.0

    @property
    def decided(self) -> bool:
        """Whether there was anything to decide."""
        return self.category != "none"


@dataclass(frozen=True)
class Casts:
    """How many casts a plan puts into one graph.

    `activations` counts distinct (value, dtype) pairs, `weights` those of parameters and buffers,
    which freezing removes. `borders` counts the edges on which the dtype changes: an upper bound.
    """

    activations: int = 0
    weights: int = 0
    borders: int = 0

    def __add__(self, other: Casts) -> Casts:
        return Casts(
            self.activations + other.activations,
            self.weights + other.weights,
            self.borders + other.borders,
        )


@dataclass(frozen=True)
class Plan:
    """The decisions for a model's eval and train graphs.

    `dtype` is the low dtype, `device` the device type, `rules` the rules files in order,
    `calibration_batches` the number of batches that the evidence rests on, and `unmatched_rules`
    the node, layer and module rules that no node answers to.
    """

    dtype: str
    device: str
    rules: tuple[str, ...]
    painting: str
    calibration_batches: int
    eval: tuple[Decision, ...]
    train: tuple[Decision, ...]
    eval_casts: Casts
    train_casts: Casts
    uncaptured: tuple[Uncaptured, ...]
    unmatched_rules: tuple[str, ...]

    def unknown_ops(self) -> dict[str, int]:
        """Operators that no rule names and how many nodes of each stayed FP32 for that, sorted."""
        unknown = Counter(d.op for d in self.eval if d.category == "unknown")
        return dict(sorted(unknown.items()))

    def low_nodes(self) -> int:
        """Nodes of the eval graph that compute in low precision."""
        return sum(d.low for d in self.eval)

    def decided_nodes(self) -> int:
        """Nodes of the eval graph with an FP32 input: those that there was something to decide
        about.
        """
        return sum(d.decided for d in self.eval)

    def share_nodes_low(self) -> float:
        """Low nodes as a share of the decided ones, 0 to 1."""
        return self.low_nodes() / max(self.decided_nodes(), 1)

    def share_macs_low(self) -> float:
        """Multiply-adds in low nodes as a share of all that could be counted, 0 to 1."""
        return sum(d.macs for d in self.eval if d.low) / max(sum(d.macs for d in self.eval), 1)

    def to_frame(self, mode: str = "eval") -> pd.DataFrame:
        """One row a node of the graph of `mode` ("eval" or "train"), one column a field."""
        import pandas as pd

        decisions = self.eval if mode == "eval" else self.train
        columns = list(Decision.__dataclass_fields__)
        return pd.DataFrame([asdict(d) for d in decisions], columns=columns)

    def to_toml(self) -> str:
        """The plan as a rules file with one `[[rule]]` a decided node; `--rules plan.toml` gives it
        back.

        With Grappler's painting a node is pinned by what it became (allow: low, deny: FP32); with
        autocast's by its category, which decides about each of its inputs. A node that the two
        graphs decide differently about gets a rule for each mode.
        """
        rules = ", ".join(map(_quoted, self.rules))
        lines = [
            f"# amp-convert's plan for {self.dtype}, made from {rules}.",
            "# Copy it, change a category (allow: low precision, deny: FP32), and give that back",
            "# with --rules. This file itself is replaced by the next run.",
            f"painting = {_quoted(self.painting)}",
            "# What the guards found is already decided below.",
            "guards = false",
            "",
            "[rewrites]",
            *(f"{name} = {str(used).lower()}" for name, used in self._rewrites().items()),
        ]
        for decision, mode in self._pinned():
            lines += [
                "",
                "[[rule]]",
                f"node = {_quoted(decision.node)}",
                f"category = {_quoted(self._category(decision))}",
                *([f"mode = {_quoted(mode)}"] if mode else []),
                f"reason = {_quoted(decision.reason.removesuffix(f'; {decision.rewrite}'))}",
            ]
        return "\n".join(lines) + "\n"

    def _rewrites(self) -> dict[str, bool]:
        """The name of each rewrite, and whether some node of the plan has it."""
        used = {d.rewrite for d in (*self.eval, *self.train)}
        return {
            rewrite.name: any(f"(rewrite {rewrite.name})" in text for text in used)
            for rewrite in fields(Rewrites)
        }

    def _pinned(self) -> Iterator[tuple[Decision, str]]:
        """Each decided node, with the one mode that it is pinned for, or "" for both."""
        in_train = {d.node: d for d in self.train if d.decided}
        for decision in self.eval:
            twin = in_train.pop(decision.node, None)
            if decision.decided:
                differs = twin is not None and self._category(twin) != self._category(decision)
                yield decision, "eval" if differs else ""
                if twin is not None and differs:
                    yield twin, "train"
            elif twin is not None:
                yield twin, ""
        for decision in in_train.values():
            yield decision, ""

    def _category(self, decision: Decision) -> str:
        if self.painting == "autocast" and decision.category != "unknown":
            return decision.category
        return "allow" if decision.low else "deny"


def _quoted(text: str) -> str:
    """A TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'

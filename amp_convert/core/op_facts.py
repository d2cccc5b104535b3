"""What an operator does to values: the one table that every stage asks.

An operator goes by its short ATen name, `aten.clamp`. Names for the same function are folded into
one first, in three steps (`canonical` takes the first two, `facts_of` all three):

1. Forms: an in-place operator (`clamp_`), and a view operator that copies (`view_copy`), compute
   what the one without the ending does; an `out=` form is an overload, and overloads are cut off.
2. Aliases (`_ALIASES`): other names that PyTorch documents for the same function, such as
   `clip` for `clamp`. Rules are looked up under all of them.
3. Variants (`_VARIANTS`): kernels of their own that compute the same from the same arguments, such
   as `_softmax`. The facts are the same; a list of rules may still tell them apart.

Then `_FAMILIES` says what the operator computes, and the tables below it which of its arguments
play a part. Of an operator in none of them nothing is claimed.

Nothing here imports torch, so that rules files can be read without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from functools import cache
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


class Family(StrEnum):
    """What an operator computes. One may be of several."""

    SHAPE = auto()
    """Every value passes on unchanged, in another shape or order of axes."""
    COPY = auto()
    """Every value passes on unchanged, where it is."""
    PART = auto()
    """Some values pass on, or all of them repeated, joined or in another order."""
    CHOICE = auto()
    """Each result is one of the values that are read, perhaps without its sign, or a constant."""
    RANKING = auto()
    """Says which values are the largest, or in which order they are."""
    BOUND = auto()
    """The larger or the smaller of a value and a bound."""
    SIGN = auto()
    """The same magnitude with another sign."""
    SUM = auto()
    """The sum or difference of two values."""
    PRODUCT = auto()
    """The product or quotient of two values, or a mean of them by weight."""
    POWER = auto()
    """A power of each value."""
    EXPONENTIAL = auto()
    """A number to the power of each value, which leaves the range soon."""
    SOFTMAX = auto()
    """Exponentials inside of the kernel, which takes care of their range."""
    PERIODIC = auto()
    """A function of an angle."""
    DROPOUT = auto()
    """Zeroes values and multiplies the rest by one factor."""
    POOL = auto()
    """The mean or the largest of a window."""
    REDUCTION = auto()
    """Adds up, or multiplies, along some axes."""
    CUMULATIVE = auto()
    """Each result carries on the one before it along an axis."""
    MATRIX_PRODUCT = auto()
    """Sums of products. With CONVOLUTION and TRANSPOSED_CONVOLUTION: the heavy products."""
    CONVOLUTION = auto()
    TRANSPOSED_CONVOLUTION = auto()
    BATCH_NORM = auto()
    """Normalises over the batch, by statistics that every kernel reads and writes in FP32."""
    NORM = auto()
    """Normalises each sample; the kernel computes its statistics in FP32."""
    LOOKUP = auto()
    """Rows of a table by their index."""
    CAST = auto()
    """The model's own request for a dtype."""
    ACCUMULATING_WRITE = auto()
    """Writes values into places, and adds them up there where its argument `accumulate` says so."""
    RAW_MEMORY = auto()
    """Reads memory as it lies, which a cast may lay out differently."""
    UNWRITTEN = auto()
    """New memory that holds whatever lay there."""


_ALIASES = {
    "abs": "absolute",
    "acos": "arccos",
    "acosh": "arccosh",
    "asin": "arcsin",
    "asinh": "arcsinh",
    "atan": "arctan",
    "atan2": "arctan2",
    "atanh": "arctanh",
    "bitwise_and": "__and__",
    "bitwise_left_shift": "__lshift__",
    "bitwise_or": "__or__",
    "bitwise_right_shift": "__rshift__",
    "bitwise_xor": "__xor__",
    "cat": "concat concatenate",
    "clamp": "clip",
    "diagonal": "linalg_diagonal",
    "digamma": "special_digamma special_psi",
    "div": "divide true_divide",
    "erf": "special_erf",
    "erfc": "special_erfc",
    "erfinv": "special_erfinv",
    "exp2": "special_exp2",
    "expm1": "special_expm1",
    "ge": "greater_equal",
    "gt": "greater",
    "i0": "special_i0",
    "igamma": "special_gammainc",
    "igammac": "special_gammaincc",
    "le": "less_equal",
    "lgamma": "special_gammaln",
    "linalg_det": "det",
    "linalg_householder_product": "orgqr",
    "linalg_inv": "inverse",
    "linalg_matrix_exp": "matrix_exp",
    "linalg_matrix_power": "matrix_power",
    "linalg_multi_dot": "chain_matmul",
    "linalg_slogdet": "slogdet",
    "log1p": "special_log1p",
    "log_softmax": "special_log_softmax",
    "logit": "special_logit",
    "logsumexp": "special_logsumexp",
    "lt": "less",
    "mH": "adjoint",
    "matmul": "linalg_matmul",
    "movedim": "moveaxis",
    "mul": "multiply",
    "mvlgamma": "special_multigammaln",
    "ne": "not_equal",
    "neg": "negative",
    "outer": "ger",
    "polygamma": "special_polygamma",
    "repeat": "tile",
    "round": "special_round",
    "sigmoid": "special_expit",
    "sinc": "special_sinc",
    "softmax": "special_softmax",
    "sub": "subtract",
    "transpose": "swapaxes swapdims",
    "trunc": "fix",
    "vstack": "row_stack",
    "xlogy": "special_xlogy",
}
"""Other names that PyTorch documents for the same function."""

_OVERLOADS = {"max.other": "maximum", "min.other": "minimum"}
"""Overloads that are another function than the rest of their name."""

_VARIANTS = {
    "batch_norm": "_batch_norm_impl_index _batch_norm_no_update _batch_norm_with_update "
    "_batch_norm_with_update_functional _native_batch_norm_legit "
    "_native_batch_norm_legit_functional _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm native_batch_norm",
    "chunk": "unsafe_chunk",
    "convolution": "_convolution cudnn_convolution mkldnn_convolution",
    "dropout": "native_dropout",
    "group_norm": "native_group_norm",
    "index": "_unsafe_index",
    "index_put": "_unsafe_index_put",
    "layer_norm": "native_layer_norm",
    "log_softmax": "_log_softmax",
    "reshape": "_reshape_alias _unsafe_view view view_as",
    "rms_norm": "_fused_rms_norm",
    "softmax": "_safe_softmax _softmax",
    "split": "unsafe_split",
    "split_with_sizes": "unsafe_split_with_sizes",
    "to": "_to_copy",
}
"""Kernels of their own that compute the same from arguments of the same names."""

_FAMILIES = {
    Family.SHAPE: "atleast_1d atleast_2d atleast_3d flatten mH mT matrix_H movedim numpy_T permute "
    "ravel reshape squeeze t transpose unflatten unsqueeze",
    Family.COPY: "alias clone contiguous detach lift_fresh",
    Family.PART: "_chunk_cat block_diag broadcast_tensors broadcast_to cat channel_shuffle chunk "
    "column_stack constant_pad_nd diag diag_embed diagonal dsplit dstack expand expand_as flip "
    "fliplr flipud gather hsplit hstack index index_select masked_select meshgrid narrow "
    "native_channel_shuffle pad pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d "
    "reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d "
    "replication_pad3d roll rot90 select slice split split_with_sizes stack take take_along_dim "
    "tensor_split tril triu unbind unfold vsplit vstack",
    Family.CHOICE: "abs amax amin fmax fmin masked_fill max min relu sort topk where",
    Family.RANKING: "argmax argmin argsort kthvalue max median min mode msort sort topk",
    Family.BOUND: "clamp clamp_max clamp_min maximum minimum",
    Family.SIGN: "neg",
    Family.SUM: "add rsub sub",
    Family.PRODUCT: "div lerp mul outer",
    Family.POWER: "pow square",
    Family.EXPONENTIAL: "exp exp2 expm1",
    Family.SOFTMAX: "cross_entropy_loss log_softmax logcumsumexp logsumexp softmax softplus",
    Family.PERIODIC: "cos polar sin sinc tan",
    Family.DROPOUT: "dropout",
    Family.POOL: "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d "
    "avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d",
    Family.REDUCTION: "linalg_vector_norm logsumexp mean nanmean nansum norm prod std sum var",
    Family.CUMULATIVE: "cumprod cumsum cumulative_trapezoid logcumsumexp",
    Family.MATRIX_PRODUCT: "addbmm addmm addmv baddbmm bmm dot einsum inner linalg_multi_dot "
    "linalg_vecdot linear matmul mm mv tensordot vdot",
    Family.CONVOLUTION: "conv1d conv2d conv3d convolution",
    Family.TRANSPOSED_CONVOLUTION: "conv_transpose1d conv_transpose2d conv_transpose3d",
    Family.BATCH_NORM: "batch_norm",
    Family.NORM: "group_norm instance_norm layer_norm rms_norm",
    Family.LOOKUP: "embedding",
    Family.CAST: "to type_as",
    Family.ACCUMULATING_WRITE: "index_put",
    Family.RAW_MEMORY: "as_strided",
    Family.UNWRITTEN: "empty empty_like empty_permuted empty_strided new_empty new_empty_strided",
}

# --- arguments, by their names in the operator's schema -------------------------------------------

_SINGULAR = {
    "addcdiv": "tensor2", "atan2": "other", "div": "other", "log": "self", "log10": "self",
    "log2": "self", "pow": "self", "reciprocal": "self", "rsqrt": "self", "sqrt": "self",
    "xlogy": "other",
}  # fmt: skip
"""The argument at whose zero the function, or its slope, is infinite."""

_LOWER_BOUND = {"add": "other", "clamp": "min", "clamp_min": "min", "fmax": "other",
                "maximum": "other"}  # fmt: skip
"""The argument that keeps a result away from zero, where the other input is not negative."""

_FACTOR = {"div": "other", "mul": "other"}
"""The argument that all of the other are multiplied with, or divided by."""

_WEIGHTS = {
    "addmm": ("mat1", "mat2", "self"),
    "conv1d": ("input", "weight", "bias"),
    "conv2d": ("input", "weight", "bias"),
    "conv3d": ("input", "weight", "bias"),
    "linear": ("input", "weight", "bias"),
}
"""Input, weight and bias of what can be a layer."""

_CONTRACTED = {
    "addbmm": "batch1", "addmm": "mat1", "baddbmm": "batch1", "bmm": "self", "inner": "self",
    "linear": "input", "matmul": "self", "mm": "self", "mv": "self",
}  # fmt: skip
"""The argument whose last axis a matrix product sums over."""

_MEETS_NUMBERS = _words(
    "add clamp clamp_max clamp_min constant_pad_nd div fill fmod full_like hardtanh index_fill "
    "masked_fill maximum minimum mul pad remainder rsub sub threshold where"
)
"""Their number arguments meet the values, in the values' dtype. Those of others are sizes, or the
kernel uses them in FP32: the eps of a normalisation, the exponent of a power."""

_PASSES_MASKS = _words("add dropout masked_fill where")
"""They pass on the values of an attention mask, or add to them."""

_KEEPS_FACTORS = _words("abs expand flip leaky_relu narrow relu repeat select slice")
"""Of one input, in families that do not all: c times the input gives c times the result."""

_CHECKS_VALUES = _words("bernoulli binary_cross_entropy multinomial poisson")
"""They refuse values outside of their domain, which on a GPU ends the process."""

_STATISTICS = frozenset({"weight", "bias", "running_mean", "running_var"})
_AFFINE = frozenset({"weight", "bias"})


@dataclass(frozen=True)
class OpFacts:
    """What is known of one operator; `name` is its folded short name, "aten.clamp".

    Argument names are those of its schema, "" where there is none. `singular` is the argument at
    whose zero it is infinite; `lower_bound` the one that keeps its result from zero; `factor` the
    one that it multiplies by, or divides by; `weights` a layer's input, weight and bias;
    `contracted` the one whose last axis it sums over.
    """

    name: str
    families: frozenset[Family] = frozenset()
    singular: str = ""
    lower_bound: str = ""
    factor: str = ""
    weights: tuple[str, str, str] | None = None
    contracted: str = ""
    meets_numbers: bool = False
    passes_masks: bool = False
    keeps_factors: bool = False
    checks_values: bool = False

    def is_a(self, *families: Family) -> bool:
        """Whether it is of one of these families."""
        return not self.families.isdisjoint(families)

    @property
    def moves(self) -> bool:
        """Whether it passes values on, or chooses among them, and changes none."""
        return self.is_a(Family.SHAPE, Family.COPY, Family.PART, Family.CHOICE)

    @property
    def keeps_values(self) -> bool:
        """Whether no precision can be told from what it gives: it `moves` values, or draws at
        random which of them to keep."""
        return self.moves or self.is_a(Family.DROPOUT)

    @property
    def sums(self) -> bool:
        """Whether a result is the sum of many terms."""
        return self.is_a(Family.REDUCTION, Family.CUMULATIVE, *HEAVY)

    @property
    def exponentiates(self) -> bool:
        """Whether it turns an absolute error of what it reads into a relative one."""
        return self.is_a(Family.EXPONENTIAL, Family.SOFTMAX)

    @property
    def has_fp32_statistics(self) -> bool:
        """Whether what its kernels return beside the result stays in FP32."""
        return self.is_a(Family.BATCH_NORM) or self.name in ("aten.layer_norm", "aten.group_norm")

    @property
    def delivers_low(self) -> bool:
        """Whether a low node computes in FP32 and casts what comes out. A table is looked up first
        and cast after: the same bits, for a fraction of the work."""
        return self.is_a(Family.LOOKUP)

    @property
    def keeps_arguments(self) -> bool:
        """Whether it has `kept_arguments` on some device."""
        return self.has_fp32_statistics or self.delivers_low

    def kept_arguments(self, device: str) -> frozenset[str]:
        """Arguments that stay FP32 in a low node on `device`, since the kernel takes them so at no
        cost.

        Batch normalisation reads and writes its statistics in FP32 everywhere; the CPU's layer and
        group normalisation take FP32 parameters beside a low input. CUDA's want one dtype.
        """
        if self.is_a(Family.BATCH_NORM):
            return _STATISTICS
        if self.has_fp32_statistics and device == "cpu":
            return _AFFINE
        return frozenset({"weight"}) if self.delivers_low else frozenset()


HEAVY = (Family.MATRIX_PRODUCT, Family.CONVOLUTION, Family.TRANSPOSED_CONVOLUTION)
"""The products that make up nearly all of a model's work."""


def op_name(target: Any) -> str:
    """The full name of a node's target: `aten.linear.default`, `operator.getitem`, or the name of a
    higher-order operator."""
    if hasattr(target, "_schema"):
        return str(target)
    name = str(getattr(target, "__name__", target))
    return f"operator.{name}" if getattr(target, "__module__", "") == "_operator" else name


def short_name(op: str) -> str:
    """An operator's name without its overload: `aten.linear`."""
    return ".".join(op.split(".")[:2])


@cache
def canonical(op: str) -> str:
    """The folded short name of an operator, with or without its overload: forms and aliases fold,
    variants do not. `aten.clip_.Tensor` is `aten.clamp`; what is not ATen's stays as it is."""
    space, _, rest = op.partition(".")
    if space != "aten":
        return short_name(op)
    name = rest.partition(".")[0]
    name = _OVERLOADS.get(".".join(rest.split(".")[:2]), name)
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    if name.endswith("_copy") and name.removesuffix("_copy") in _VIEWS:
        name = name.removesuffix("_copy")
    return f"aten.{_FOLDED.get(name, name)}"


@cache
def facts_of(op: str) -> OpFacts:
    """What is known of an operator by its name, with or without its overload."""
    name = canonical(op).removeprefix("aten.")
    return _FACTS.get(_SAME_FACTS.get(name, name)) or OpFacts(canonical(op))


def facts_of_target(target: Any) -> OpFacts:
    """What is known of an FX node's target."""
    return facts_of(op_name(target))


@cache
def with_overload(op: str) -> str:
    """The folded name of an operator with its overload, if it has one: `aten.div.Tensor_mode` for
    `aten.divide_.Tensor_mode`. An `out=` form has that of the operator without."""
    overload = op.removeprefix(short_name(op)).lstrip(".").removesuffix("out").rstrip("_")
    return f"{canonical(op)}.{overload}" if overload else canonical(op)


def _split(names: Mapping[str, str]) -> dict[str, str]:
    return {name: main for main, others in names.items() for name in others.split()}


_FOLDED = _split(_ALIASES)
_SAME_FACTS = _split(_VARIANTS)
_VIEWS = frozenset(
    name
    for family in (Family.SHAPE, Family.COPY, Family.PART)
    for name in (*_FAMILIES[family].split(), *_VARIANTS["reshape"].split())
) - {"index"}  # index_copy writes


def _all_facts() -> dict[str, OpFacts]:
    families: dict[str, set[Family]] = {}
    for family, names in _FAMILIES.items():
        for name in names.split():
            families.setdefault(name, set()).add(family)
    known = {
        *families,
        *_SINGULAR,
        *_LOWER_BOUND,
        *_MEETS_NUMBERS,
        *_KEEPS_FACTORS,
        *_CHECKS_VALUES,
    }
    return {name: _facts(name, frozenset(families.get(name, ()))) for name in known}


def _facts(name: str, families: frozenset[Family]) -> OpFacts:
    whole = {Family.SHAPE, Family.COPY, Family.SIGN, Family.DROPOUT, Family.POOL}
    return OpFacts(
        name=f"aten.{name}",
        families=families,
        singular=_SINGULAR.get(name, ""),
        lower_bound=_LOWER_BOUND.get(name, ""),
        factor=_FACTOR.get(name, ""),
        weights=_WEIGHTS.get(name),
        contracted=_CONTRACTED.get(name, ""),
        meets_numbers=name in _MEETS_NUMBERS,
        passes_masks=name in _PASSES_MASKS,
        keeps_factors=name in _KEEPS_FACTORS or not families.isdisjoint(whole),
        checks_values=name in _CHECKS_VALUES,
    )


_FACTS = _all_facts()
KNOWN = tuple(_FACTS[name] for name in sorted(_FACTS))
"""All operators of which something is claimed."""

"""Reading ``adapter_config.json``: ranks, scales and `target_modules` of the adapter beside it.

The fields and rules are those of PEFT (https://github.com/huggingface/peft). Modules are looked up by their paths
without ``base_model.model.``. Regular expressions come from a file that may be hostile: the package `regex` matches
them, and stops at a time limit.
"""

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from time import thread_time
from typing import Any, NamedTuple, final

from loralens.choices import Level
from loralens.core.adapter import Finding
from loralens.core.lowrank import ScaleFormula, Scaling
from loralens.core.together import TASK_HEADS
from loralens.errors import FormatError
from loralens.formats.dialects.pairs import Fields
from loralens.formats.files.json_text import check_printable, finite_number

LONGEST = 65_536  # characters; tools write some thousands at most, and an expression of this length compiles in 0.2 s
# `regex` copies nested repeats into each other and has no limit of its own: 62 characters took more than 1.4 GB.
MOST_NODES = 100_000  # of a compiled expression
SIMPLER = "write it without nested repeats and optional parts, or list the modules' names"

# `re` takes these as plain characters, `regex` as a POSIX class or as approximate matching.
_READ_OTHERWISE = re.compile(r"\[:|\{(?![0-9]*(?:,[0-9]*)?\})")
_ESCAPED = re.compile(r"\\.", re.DOTALL)
# An escaped letter, a class of letters, a group's ends, a repeat, or any other letter.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|(?P<repeat>[*+]|\{(?P<counts>[0-9]*,?[0-9]*)\})|.", re.DOTALL)


# Real files need milliseconds; only files that are made to waste time reach the limit.
PLAIN_SECONDS = 5.0  # limit for work that takes long only with millions of pairs of names and patterns


@final
class Clock:
    """The processor time of this thread that was spent on a task, and its limit, in seconds."""

    __slots__ = ("limit", "spent")

    def __init__(self, limit: float = PLAIN_SECONDS) -> None:
        self.limit, self.spent = limit, 0.0

    @property
    def remaining(self) -> float:
        """The seconds that remain, at least 0."""
        return max(0.0, self.limit - self.spent)

    @contextmanager
    def running(self, what: str, *, fix: str) -> Iterator[None]:
        """Count the time of the block; ``what`` names the work in the message.

        Raises
        ------
        FormatError
            The limit is exceeded.
        """
        # Processor time of this thread, not wall time: a busy machine must not make a file unreadable.
        begin = thread_time()
        try:
            yield
        finally:
            self.spent += thread_time() - begin
        # This is outside of `finally`, so that an error inside the block is not replaced by this one.
        if self.spent > self.limit:
            raise self.error(what, fix=fix)

    def error(self, what: str, *, fix: str) -> FormatError:
        """The error for an exceeded limit."""
        return FormatError(
            f"{what} could not be matched with the modules' names within {self.limit:g} s of computing", fix=fix
        )


@final
class Expression:
    r"""A regular expression of a configuration.

    Parameters
    ----------
    key : str
        The expression as it is written in the configuration.
    field : str
        The field of the configuration that it is from, for messages.
    clock : Clock
        The time limit that all expressions of an adapter share.
    after_prefix : bool
        Match as PEFT matches the keys of its patterns, by ``(.*\.)?(KEY)$``; otherwise match the whole name.

    Raises
    ------
    FormatError
        It is not a regular expression, or it would take too long.
    """

    __slots__ = ("_clock", "_pattern", "_what")

    def __init__(self, key: str, field: str, clock: Clock, *, after_prefix: bool = False) -> None:
        self._what, self._clock = f"{field} {_short(key)}", clock
        # Checked before parsing, whose time and memory grow with the length.
        if len(key) > LONGEST:
            raise FormatError(f"{self._what} is {len(key):,} characters long", fix=SIMPLER)
        with clock.running(self._what, fix=SIMPLER):
            self._pattern = _compile(rf"(.*\.)?({key})$" if after_prefix else key, self._what)

    def matches(self, path: str) -> bool:
        """Whether the expression matches the path of a module.

        Raises
        ------
        FormatError
            The time of the adapter is used up.
        """
        clock = self._clock
        try:
            with clock.running(self._what, fix=SIMPLER):
                # A time limit of 0 would be none.
                return self._pattern.fullmatch(path, timeout=clock.remaining or 1e-9) is not None
        except TimeoutError as error:
            clock.spent = clock.limit  # else every further name would be tried for the remaining time
            raise clock.error(self._what, fix=SIMPLER) from error
        except MemoryError as error:
            raise FormatError(f"{self._what} takes too much memory to match", fix=SIMPLER) from error


def _short(key: str) -> str:
    return f"{key!r:.60}" + ("…" if len(key) > 60 else "")


@lru_cache(maxsize=10_000)
def _compile(text: str, what: str) -> Any:
    """Compile an expression with the package `regex`, if `re`, which PEFT uses, takes it and means the same."""
    import regex

    try:
        with warnings.catch_warnings():
            # Python warns that `[[` may get another meaning in the future. It has its old meaning until then.
            warnings.simplefilter("ignore")
            re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        fix = "correct adapter_config.json, or save the adapter again"
        raise FormatError(f"{what} is not a regular expression ({error})", fix=fix) from error
    # `re.escape` writes `\{` for a brace in a name, which both read alike.
    if _READ_OTHERWISE.search(_ESCAPED.sub("e", text)):
        raise FormatError(f"{what} is too complex, with '{{' or '[:' as plain letters", fix=SIMPLER)
    if _nodes(text) > MOST_NODES:
        raise FormatError(f"{what} repeats too much", fix=SIMPLER)
    try:
        return regex.compile(text, regex.V0)  # version 0 behaves as `re` does
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise FormatError(f"{what} cannot be matched within a bounded time ({error})", fix=SIMPLER) from error


def _nodes(text: str) -> int:
    """The nodes of a compiled expression that `re` takes, where what is repeated counts as often as it is copied."""
    groups, last = [0], 1  # the nodes in each open group so far, and those of the last letter or group
    for token in _TOKEN.finditer(text):
        if token["repeat"]:
            # A repeat without an end is stored as its required rounds and one that is repeated.
            count = max([2, *(int(count) for count in (token["counts"] or "").split(",") if count)])
            groups[-1] += last * (count - 1)
            last *= count
        elif token[0] == "(":
            groups.append(1)
        else:
            last = groups.pop() if token[0] == ")" else 1
            groups[-1] += last
    return groups[0]


RESTORE = "correct adapter_config.json, or save the adapter again"
# Keys without anything of a regular expression but dots, which stand for dots in the names of modules. A backslash
# before punctuation makes it literal.
_LITERAL = re.compile(r"(\^?)((?:[\w.-]|\\[^\w\s])+)\$?\Z")


@final
class Endings:
    """PEFT's rule for lists of `target_modules`: a target covers a path that equals it, or that ends in it after a dot.

    Only ends that are as long as a target are looked up. Looking up the end after each dot would take a time that grows
    with the square of the length of a path, and a hostile file may have very long paths.
    """

    def __init__(self, targets: Iterable[str]) -> None:
        self._targets = frozenset(targets)
        self._lengths = sorted(set(map(len, self._targets)))

    def hits(self, path: str) -> Iterator[str]:
        """The targets that cover a path, the shortest first."""
        for length in self._lengths:
            begin = len(path) - length
            if begin < 0:
                return
            if (begin == 0 or path[begin - 1] == ".") and path[begin:] in self._targets:
                yield path[begin:]

    def cover(self, path: str) -> bool:
        """Whether any of them covers a path."""
        return next(self.hits(path), None) is not None


class Pattern:
    r"""``rank_pattern`` or ``alpha_pattern``: regular expression → value, looked up as PEFT does.

    PEFT takes the first key for which the regular expression ``(.*\.)?(KEY)$`` matches the path of the module, and then
    a key that is the path itself.

    Most keys are literal: they consist of letters, digits, hyphens and dots, perhaps with ``^`` before, ``$`` after and
    backslashes before punctuation. Literal keys are looked up, also if there is a key for every module of a model;
    other keys are tried one after the other as regular expressions. ``clock`` is the time limit that all keys of the
    adapter share.
    """

    def __init__(self, values: Fields, field: str = "rank_pattern", clock: Clock | None = None) -> None:
        self._clock, self._values, self._keys, self._field = clock or Clock(), values, list(values), field
        self._expressions: list[tuple[int, Expression]] = []  # the place of a key, and its expression
        # literal path → the place of its first key; those of keys that stand for a whole path, and for the end of one
        self._whole: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self._found: dict[str, str | None] = {}  # a cache, path → its key: paths are looked up repeatedly
        for place, key in enumerate(values):
            if literal := _LITERAL.match(key):
                text = literal[2].replace("\\", "")
                (self._whole if literal[1] else self._ends).setdefault(text, place)
            else:
                self._expressions.append((place, Expression(key, field, self._clock, after_prefix=True)))
        self._endings = Endings(self._ends)

    def find(self, path: str, default: Any) -> tuple[Any, str | None]:
        """The value for a path, and its key, which is None for the default."""
        # Without keys, as in most configurations, every path has the default.
        if not self._keys:
            return default, None
        if path not in self._found:
            places = list(islice((i for i, expression in self._expressions if expression.matches(path)), 1))
            with self._clock.running(f"{self._field} of {len(self._keys):,} keys", fix=SIMPLER):
                places += [self._ends[end] for end in self._endings.hits(path)]
            places += [self._whole[path]] if path in self._whole else []
            self._found[path] = self._keys[min(places)] if places else path if path in self._values else None
        key = self._found[path]
        return (default, None) if key is None else (self._values[key], key)


DEFAULT_RANK = 8  # PEFT's defaults, for configurations that leave the fields out
DEFAULT_ALPHA = 8
# Fields that change how numbers are read. A text such as "false" would count as true.
FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias")

# Initialisations with which PEFT changes the base weight, at every load again.
MUTATED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Variants whose update is not just scale · B · A on the original base: the field, the difference, and the advice.
VARIANTS = (
    ("use_dora", "DoRA: W' = m · (W+ΔW)/‖W+ΔW‖; magnitudes are kept, and what is measured is ΔW = scale·B·A alone", ""),
    ("layer_replication", "its layers index a replicated stack of the base model's layers", "do not merge it"),
    ("alora_invocation_tokens", "aLoRA: active only after its invocation tokens", "do not merge it"),
    ("arrow_config", "Arrow: routed between several adapters at run time", "do not merge it"),
    ("use_qalora", "QALoRA: A acts on pooled inputs", "its ΔW is not an update of the full weight"),
    ("kasa_config", "KaSA: the base weight was truncated too; lora_diag is folded into B", "do not merge it as it is"),
    ("monteclora_config", "MonteCLoRA: factors are means of a distribution", ""),
    ("velora_config", "VeLoRA: only its training differs", ""),
)


@final
class PeftConfig:
    """The fields of an ``adapter_config.json`` after a check of their types and values.

    ``fields`` is the unchanged object; without a configuration it is empty, and all scales are unknown. ``clock`` is
    the time limit for its regular expressions, which all configurations of an adapter share.
    """

    def __init__(self, fields: Fields | None, clock: Clock | None = None) -> None:
        self.known, self.clock = fields is not None, clock or Clock()
        self.fields = fields = fields or {}
        ranks, alphas = self._pattern("rank_pattern"), self._pattern("alpha_pattern")
        # Ranks beyond 2³¹ have no tensor, and bool is a subclass of int.
        for name, rank in [("r", fields.get("r", DEFAULT_RANK)), *ranks.items()]:
            if type(rank) is not int or not 0 < rank < 2**31:
                raise FormatError(f"rank {name} is {rank!r:.40}, not a whole number above 0", fix=RESTORE)
        for name, alpha in [("lora_alpha", fields.get("lora_alpha", DEFAULT_ALPHA)), *alphas.items()]:
            if finite_number(alpha) is None:
                raise FormatError(f"alpha {name} is {alpha!r:.40}, not a number", fix=RESTORE)
        for name in FLAGS:
            if not isinstance(fields.get(name), bool | None):
                raise FormatError(f"{name} is {fields[name]!r:.40}, not true or false", fix=RESTORE)
        targets = fields.get("target_modules")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
            # The first two may be one regular expression.
            if not (name in ("target_modules", "exclude_modules") and isinstance(fields.get(name), str)):
                _check_strings(name, fields.get(name))
        check_printable(str(fields.get("base_model_name_or_path")))
        self._ranks = Pattern(ranks, "rank_pattern", self.clock)
        self._alphas = Pattern(alphas, "alpha_pattern", self.clock)
        self._expression = Expression(targets, "target_modules", self.clock) if isinstance(targets, str) else None
        self._listed = Endings(() if isinstance(targets, str) else targets or ())
        self._parameters = Endings(self.parameters)
        self._usual = None if self.known else Scaling("unknown")
        # One object for all modules where no pattern has an entry.
        if self.known and not ranks and not alphas:
            self._usual = self.scaling("")

    def _pattern(self, name: str) -> Fields:
        pattern = self.fields.get(name)
        if pattern is None:
            return {}
        if not isinstance(pattern, dict):
            raise FormatError(f"{name} is not a mapping", fix=RESTORE)
        return pattern

    def rank(self, path: str) -> int:
        """The nominal rank r of a module."""
        return self._rank(path)[0]

    def _rank(self, path: str) -> tuple[int, str | None]:
        return self._ranks.find(path, self.fields.get("r", DEFAULT_RANK))

    def scaling(self, path: str) -> Scaling:
        """α, r and formula of a module, and the field that they come from."""
        if self._usual:
            return self._usual
        alpha, alpha_key = self._alphas.find(path, self.fields.get("lora_alpha", DEFAULT_ALPHA))
        rank, rank_key = self._rank(path)
        origins = [f"alpha_pattern {alpha_key!r}"] if alpha_key else []
        origins += [f"rank_pattern {rank_key!r}"] if rank_key else []
        if alpha_key is None and "lora_alpha" not in self.fields:
            origins += [f"{DEFAULT_ALPHA} is PEFT's default α, since adapter_config.json has none"]
        return Scaling(self.formula, alpha, rank, " and ".join(origins) or "adapter_config.json")

    @property
    def formula(self) -> ScaleFormula:
        """α/r, or α/√r with ``use_rslora``."""
        return "alpha/sqrt(r)" if self.fields.get("use_rslora") else "alpha/r"

    @property
    def enabled(self) -> list[bool]:
        """``enable_lora`` of the fused projections of old PEFT: whether each slice of the output is adapted."""
        if not self.known:
            what = "lora_B has three dimensions, so which slices are adapted is in the configuration only"
            raise FormatError(what, fix="put adapter_config.json beside the file")
        enabled = self.fields.get("enable_lora")
        if not isinstance(enabled, list) or not all(isinstance(x, bool) for x in enabled) or not any(enabled):
            raise FormatError(f"lora_B has three dimensions and enable_lora is {enabled!r:.40}", fix=RESTORE)
        return enabled

    @property
    def parameters(self) -> list[str]:
        """``target_parameters``: paths of parameters of the base that hold a stack of experts."""
        return list(self.fields.get("target_parameters") or [])

    @property
    def saved(self) -> list[str]:
        """``modules_to_save`` and the heads of the task: the modules that were trained in full."""
        # null and an empty list mean the same.
        names = list(self.fields.get("modules_to_save") or [])
        return names + list(TASK_HEADS.get(str(self.fields.get("task_type")), ()))

    @property
    def changed_base(self) -> str | None:
        """The setting with which PEFT changes the base weight at every load, by r and α; None for a plain LoRA."""
        # Some names have a suffix (pissa_niter_16), and PEFT ignores the case of some of them.
        init = str(self.fields.get("init_lora_weights", "")).lower()
        if any(init == name or init.startswith(f"{name}_") for name in MUTATED_BASE):
            return f"init_lora_weights is {init!r}"
        return "kasa_config is set" if self.fields.get("kasa_config") else None

    def check_base_unchanged(self) -> None:
        """Refuse to write an adapter with other r and α than in training, if PEFT changes the base by them.

        Raises
        ------
        FormatError
            The message names the setting.
        """
        if self.changed_base:
            raise FormatError(
                f"{self.changed_base}: PEFT changes the base weight at every load by r and α, so the base would "
                "differ with values other than those in training",
                fix="convert it with PEFT to a plain LoRA first",
            )

    def variants(self) -> list[Finding]:
        """Findings about settings that make the update differ from scale·B·A on the original base."""
        findings: list[Finding] = []
        changed = self.changed_base
        # KaSA has an entry of its own in VARIANTS.
        if changed and not self.fields.get("kasa_config"):
            text = (
                f"{changed}: training started from a changed base, so the change against the original base is "
                "scale·(B·A − B₀·A₀), and what is measured here is scale·B·A"
            )
            fix = "convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion) to a plain LoRA"
            findings.append(Finding("warning", "mutated-base", text, fix))
        for name, text, fix in VARIANTS:
            if self.fields.get(name):
                # Nothing is to be done about some of them: they are what the user chose.
                level: Level = "warning" if fix else "note"
                findings.append(Finding(level, name.replace("_", "-"), f"{name}: {text}", fix))
        return findings

    def path(self, name: str) -> str:
        """The path by which PEFT looks up r and α of a module; it includes the parameter's name if that is a target."""
        weight = f"{name}.weight"
        return weight if self._parameters.cover(weight) and not self.targets(name) else name

    def targets(self, path: str) -> bool:
        """Whether ``target_modules`` covers a module."""
        if self._expression is None:
            return self._listed.cover(path)
        # Which layers of the base are linear is not known here, so "all-linear" covers every module.
        return str(self.fields["target_modules"]).lower() == "all-linear" or self._expression.matches(path)

    def unmatched_modules(self, paths: Iterable[str]) -> list[str]:
        """Paths that neither ``target_modules`` nor ``target_parameters`` covers.

        With ``ensure_weight_tying`` and any targets there are none, because PEFT then adapts the head together with the
        embedding, whatever the name of the head is.
        """
        if self.fields.get("ensure_weight_tying") and (self.fields.get("target_modules") or self.parameters):
            return []
        return [path for path in paths if not self.targets(path) and not self._parameters.cover(path)]

    def excluded_modules(self, paths: Iterable[str]) -> list[str]:
        """Paths that ``exclude_modules`` covers; PEFT adapts none of them, whatever the targets are."""
        excluded = self.fields.get("exclude_modules") or ()
        if isinstance(excluded, str):
            return list(filter(Expression(excluded, "exclude_modules", self.clock).matches, paths))
        return list(filter(Endings(excluded).cover, paths))

    def unmatched_targets(self, paths: Iterable[str]) -> list[str]:
        """Entries of ``target_modules`` that no module of the file matches; none if PEFT excludes some modules."""
        targets = self.fields.get("target_modules") or []
        if self.fields.get("exclude_modules"):
            return []
        if isinstance(targets, str):
            return [] if any(map(self.targets, paths)) else [targets]
        matched = {target for path in paths for target in self._listed.hits(path)}
        return [target for target in targets if target not in matched]


def _check_strings(name: str, value: Any) -> None:
    if not isinstance(value, list | None) or not all(isinstance(item, str) for item in value or ()):
        raise FormatError(f"{name} is not a list of strings", fix=RESTORE)
    for item in value or ():
        check_printable(item)


PREFIX = "base_model.model."
OUT_PROJ = "base_layer.out_proj"  # within an adapted nn.MultiheadAttention

# The adapter's name in a leaf. It must not take `weight` or `bias`, which end the key.
_NAME = r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"
# role → the leaf that PEFT writes, with a place for the half, and the keys of its tensors
_ROLES = {
    "pair": ("lora_{}.weight", rf"lora_(?P<half>[AB]){_NAME}\.weight"),
    "embedding": ("lora_embedding_{}", rf"lora_embedding_(?P<half>[AB]){_NAME}"),
    "lora_bias": ("lora_B.bias", rf"lora_B{_NAME}\.bias"),
    "magnitude": ("lora_magnitude_vector", rf"lora_magnitude_vector{_NAME}(?:\.weight)?"),
    "diagonal": ("lora_diag", rf"lora_diag{_NAME}"),
}
_KEYS = {role: re.compile(rf"^(?P<path>.+?)\.{leaf}$") for role, (_, leaf) in _ROLES.items()}


class PeftKey(NamedTuple):
    """A key of a pair or of a tensor that belongs to one.

    ``path`` is the stored one without ``base_model.model.``, ``adapter`` the name of the adapter if the key has it.
    """

    role: str
    path: str
    half: str
    adapter: str


# Reading, checking and writing parse every key several times, in one order: a cache smaller than an adapter would never
# hit. So many keys, of two adapters with 16,000 modules, take 20 MB.
@lru_cache(maxsize=1 << 16)
def parse_peft_key(key: str) -> PeftKey | None:
    """The parts of a key; None for a key that PEFT's LoRA layers do not write."""
    if "lora_" in key:
        for role, regex in _KEYS.items():
            if match := regex.match(key):
                parts = match.groupdict()
                path = parts["path"].removeprefix(PREFIX)
                return PeftKey(role, path, parts.get("half") or "", parts["adapter"] or "")
    return None


def canonical_key(key: str) -> str:
    """A key in PEFT's own form: with its prefix and without the name of the adapter."""
    parts = parse_peft_key(key)
    if parts is None:
        return key
    return f"{PREFIX}{parts.path}.{_ROLES[parts.role][0].format(parts.half)}"


HALVES = ("pair", "embedding")  # the roles of factors


def is_pair(key: str) -> bool:
    """Whether a key is half of a PEFT pair."""
    parts = parse_peft_key(key)
    return parts is not None and parts.role in HALVES


def module_path(path: str) -> str:
    """A stored path without the parts ``base_layer``, which PEFT's wrappers insert."""
    return ".".join(part for part in path.split(".") if part != "base_layer")

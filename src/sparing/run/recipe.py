"""Recipes: YAML validated against the same dataclasses that Python users construct."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, final, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from sparing.core import registry
from sparing.core.errors import RequestError, nearest, unknown
from sparing.core.method import Method
from sparing.run import declared
from sparing.run.declared import Arm, Compared

_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}
"""By dataclass: building one takes longer than using it."""


@final
@dataclass(frozen=True, kw_only=True)
class Train:
    """How a recipe trains.

    tokens or epochs: the budget, whichever ends first. optimizer ``muon`` moves matrices at
    ``muon_rate``, and by AdamW at ``learning_rate`` all vectors and what ``adamw_names`` matches;
    ``sgd`` has ``momentum``, with ``nesterov`` looking ahead, and no ``betas``.
    ``rates`` sets the rate of parameters by the first pattern that their name matches. Rates rise
    linearly over the ``warmup`` share of steps and fall by ``schedule`` to ``final`` of
    themselves. weight_decay acts on matrices only. clip: largest gradient norm, null for none.
    precision ``auto`` is measured by a short probe, recorded, and kept on resume.
    """

    tokens: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    optimizer: Literal["adamw", "adam", "muon", "sgd", "rowwise"] = "adamw"
    learning_rate: float = 1e-3
    muon_rate: float = 0.02
    adamw_names: tuple[str, ...] = ("*embed*", "*head*", "*.router.*")
    rates: dict[str, float] = field(default_factory=dict)
    warmup: float = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final: float = 0.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.9
    nesterov: bool = True
    clip: float | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.tokens is None and self.epochs is None:
            raise RequestError("a recipe needs a budget: set train.tokens, train.epochs, or both")
        for name in ("tokens", "epochs", "batch_size", "accumulate", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"train.{name} must be at least 1, got {value}")
        for name in ("learning_rate", "muon_rate"):
            if not getattr(self, name) > 0:
                raise RequestError(f"train.{name} must be above 0, got {getattr(self, name)}")
        for pattern, rate in self.rates.items():
            if not rate > 0:
                raise RequestError(f'train.rates["{pattern}"] must be above 0, got {rate}')
        for name in ("warmup", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise RequestError(f"train.{name} must be in [0, 1], got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise RequestError(f"train.weight_decay must be at least 0, got {self.weight_decay}")
        if self.clip is not None and not self.clip > 0:
            raise RequestError(f"train.clip must be above 0 or null, got {self.clip}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RequestError(f"train.betas must be in [0, 1), got {list(self.betas)}")
        if not 0 <= self.momentum < 1:
            raise RequestError(f"train.momentum must be in [0, 1), got {self.momentum}")


@final
@dataclass(frozen=True, kw_only=True)
class Watch:
    """How often a run looks up, as shares of its steps: evaluations, checkpoints, log lines.

    start: whether it evaluates before the first step too.
    """

    evaluate: float = 0.125
    checkpoint: float = 0.1
    log: float = 0.005
    start: bool = False

    def __post_init__(self) -> None:
        for name in ("evaluate", "checkpoint", "log"):
            if not 0 < getattr(self, name) <= 1:
                raise RequestError(f"watch.{name} must be in (0, 1], got {getattr(self, name)}")


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe, resolved: nothing in it depends on a default that is elsewhere.

    task: name of the task and its options; methods: options by method name; smoke: overrides that
    make a run of seconds, for tests; needs: the extras that it imports; arms, compare: what
    ``sparing compare`` runs; presets: overrides by name, such as a smaller budget.
    """

    name: str
    about: str = ""
    task: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    train: Train
    watch: Watch = field(default_factory=Watch)
    seed: int = 0
    needs: tuple[str, ...] = ()
    smoke: dict[str, Any] = field(default_factory=dict)
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    arms: dict[str, Arm] = field(default_factory=dict)
    compare: Compared | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise RequestError(f"seed must be in [0, 2**32), got {self.seed}")
        declared.check(self.arms, self.compare)

    def alone(self) -> Recipe:
        """Without what is for comparisons and presets: what one run is made of."""
        return replace(self, presets={}, arms={}, compare=None)

    def build_methods(self) -> list[Method]:
        """The recipe's methods, constructed."""
        return [registry.method(name)(**options) for name, options in self.methods.items()]

    def build_task(self) -> Any:
        """The recipe's task, constructed; its data is not loaded yet."""
        options = {key: value for key, value in self.task.items() if key != "name"}
        return registry.task(self.task["name"])(**options)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the same after a round trip through YAML."""
        plain: dict[str, Any] = _plain(asdict(self))
        for name in ("presets", "arms", "compare"):  # most recipes have none, and no run has
            if not plain[name]:
                del plain[name]
        return plain

    def to_yaml(self) -> str:
        """As it stands in a run directory's recipe.yaml."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def available() -> dict[str, str]:
    """The recipes in the package: name to the first line of what it is about."""
    found = {}
    for entry in resources.files("sparing.recipes").iterdir():
        if entry.name.endswith(".yaml"):
            body = yaml.safe_load(entry.read_text(encoding="utf-8"))
            found[entry.name.removesuffix(".yaml")] = str(body.get("about", "")).strip()
    return dict(sorted(found.items()))


def load(
    source: str,
    overrides: Iterable[str] = (),
    *,
    preset: str | None = None,
    smoke: bool | None = None,
) -> Recipe:
    """A recipe by name or by the path of a YAML file, with ``key=value`` overrides.

    Applied in this order: the preset of that name, the recipe's smoke settings if ``smoke``
    (default: if SPARING_SMOKE=1 is set), the overrides. Raises RequestError for everything that
    is wrong, naming the nearest right name.
    """
    body = _read(source)
    if smoke is None:
        smoke = os.environ.get("SPARING_SMOKE", "") == "1"
    if preset is not None:
        presets = _mapping(body, "presets")
        if preset not in presets:
            raise unknown("preset", preset, map(str, presets))
        for key, value in _mapping(presets, preset).items():
            _set(body, str(key), copy.deepcopy(value))
    for key, value in _mapping(body, "smoke").items() if smoke else ():
        if not _taken_out(body, str(key)):
            _set(body, str(key), copy.deepcopy(value))
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise RequestError(f'an override is key=value, got "{override}"')
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RequestError(f'the value of "{override}" is not YAML: {error}') from None
        _set(body, key, _numbers(value))
    return resolve(body)


def resolve(body: Mapping[str, Any]) -> Recipe:
    """Validate plain data as a recipe and fill in every default."""
    body = dict(body)
    # an override of null takes a method out
    given_methods = _mapping(body, "methods")
    body["methods"] = {name: o for name, o in given_methods.items() if o is not None}
    recipe: Recipe = checked(Recipe, body, "recipe")
    task = dict(recipe.task)
    if "name" not in task:
        names = [record.name for record in registry.tasks()]
        raise RequestError(f"task.name is missing; {nearest('', names)}")
    name = task.pop("name")
    options = checked(registry.task(name).Options, task, "task")
    methods = {}
    for method, given in recipe.methods.items():
        kind = registry.method(method)
        if kind.name in methods:
            raise RequestError(f'methods names "{kind.name}" twice, once as "{method}"; keep one')
        methods[kind.name] = asdict(checked(kind.Options, given, f"methods.{method}"))
    whole = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    whole |= {"task": {"name": name, **asdict(options)}, "methods": methods}
    return Recipe(**whole)


def checked(kind: type[Any], given: Any, where: str) -> Any:
    """Construct the dataclass from plain data; RequestErrors say which key is wrong, and why."""
    if not isinstance(given, Mapping):
        raise RequestError(f"{where} must be a mapping of options, got {given!r}")
    _check_keys(kind, given, where)
    try:
        return _adapter(kind).validate_python(_listed(kind, given))
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, RequestError):
            raise RequestError(f"{where}: {cause}") from None
        path = ".".join([where, *(str(part) for part in first["loc"])])
        raise RequestError(f"{path}: {first['msg']}, got {first['input']!r}") from None


def _listed(kind: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """As given; where a list is expected, of any length, one text or number is a list of one."""
    hints = get_type_hints(kind)
    found = dict(given)
    for key, value in given.items():
        hint = hints[key]
        kinds = (hint,) if get_origin(hint) is tuple else get_args(hint)  # or of a union
        lists = any(get_origin(part) is tuple and get_args(part)[1:] == (...,) for part in kinds)
        if lists and isinstance(value, str | int | float) and type(value) not in kinds:
            found[key] = (value,)
    return found


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _check_keys(kind: type[Any], given: Mapping[str, Any], where: str) -> None:
    known = [f.name for f in fields(kind)]
    hints = get_type_hints(kind)
    for key, value in given.items():
        if key not in known:
            raise unknown(f"key in {where}", str(key), known)
        # the annotation is a dataclass, or one or None, or a mapping to some
        parts = (hints[key], *get_args(hints[key]))
        nested = [part for part in parts if isinstance(part, type) and is_dataclass(part)]
        if not nested or not isinstance(value, Mapping):
            continue
        of_many = get_origin(hints[key]) is dict
        inside = value if of_many else {"": value}
        for name, one in inside.items():
            if isinstance(one, Mapping):
                _check_keys(nested[0], one, f"{where}.{key}" + f".{name}" * of_many)


def _mapping(body: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    given = body.get(key)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RequestError(f"recipe.{key} must be a mapping, got {given!r}")
    return given


def difference(one: Recipe, other: Recipe) -> str | None:
    """The first key in which two recipes differ, with both values; None if they are the same."""
    return _difference(one.to_dict(), other.to_dict(), "")


def _difference(one: Any, other: Any, path: str) -> str | None:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(k for k in other if k not in one)]:
            inner = f"{path}.{key}" if path else str(key)
            if key not in one or key not in other:
                return f"{inner} is in one of them only"
            found = _difference(one[key], other[key], inner)
            if found:
                return found
        return None
    return None if one == other else f"{path} is {one!r} there and {other!r} here"


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RequestError(f"there is no recipe file {source}")
        try:
            text, name = path.read_text(encoding="utf-8"), path.stem
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{source} cannot be read: {error}") from None
    else:
        if source not in available():
            raise unknown("recipe", source, available())
        text = resources.files("sparing.recipes").joinpath(f"{source}.yaml").read_text("utf-8")
        name = source
    try:
        body = _parsed(text)
    except yaml.YAMLError as error:
        raise RequestError(f"{source} is not YAML: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(f"{source} must be a mapping with task, methods and train")
    body = _numbers(body)
    body.setdefault("name", name)
    return copy.deepcopy(body)


@functools.lru_cache(32)
def _parsed(text: str) -> Any:
    """YAML is slow to read, and a comparison loads its recipe often; callers copy it."""
    return yaml.safe_load(text)


def _set(body: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    here: Any = body
    for parent in parents:
        if here.get(parent) is None:
            here[parent] = {}
        here = here[parent]
        if not isinstance(here, dict):
            raise RequestError(f'"{key}" goes below {parent}, which is {here!r} and has no keys')
    here[last] = value


def _taken_out(body: Mapping[str, Any], key: str) -> bool:
    """Whether the key goes below a method that a preset took out, by null."""
    here: Any = body
    for parent in key.split(".")[:-1]:
        if not isinstance(here, Mapping) or parent not in here:
            return False
        here = here[parent]
    return here is None


def _number(value: Any) -> Any:
    """YAML 1.1 reads 3e-3 as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value[0] in "+-.0123456789" else value
        except (ValueError, IndexError):
            return value
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _number(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value

# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A choice `{module: rank}` as the simplest rule of peft that says it: all, types, types of some layers, names.

peft has four ways to say which modules an adapter is on: "all-linear"; a list of endings of names, which may be
restricted to layers (`layers_to_transform`, `layers_pattern`); a regular expression; and full names. Ranks that differ
are a `rank_pattern`. `find_rule` takes the first of these that says the choice exactly, by peft's own matching, among
all modules that the rule could match. With α the same for all, every module has the scaling α/r of its own rank, so a
rule needs no `alpha_pattern`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import PeftLinearError
from .names import parse_name
from .rule_words import rule_text


FORMS = (  # simplest first; one of the last two always fits
    "all-linear",
    "types",
    "layers",
    "types and names",
    "types with exclusions",
    "pattern",
    "names",
    "name pattern",
    "names with exclusions",
)
ALL_LINEAR = "all-linear"
_FEW = 3  # exceptions, and names that are clearer than a regular expression
_FOR_MANY = ("types and names", "types with exclusions", "pattern")
_MOST_PARTS = 4  # of a regular expression; beyond it names are clearer
_FIRST_NUMBER = r".*?\.[^.]*\.(?P<layer>\d+)\."  # what peft takes for the layer without a `layers_pattern`


@dataclass(frozen=True)
class Rule:
    """Which modules peft adapts, and at which ranks.

    Args:
        kind: One of `FORMS`.
        target_modules: "all-linear", a regular expression, or endings of names and full names.
        rank: Of the modules that `rank_pattern` does not match.
        rank_pattern: {regular expression of an ending: rank}, as peft takes it.
        layers_to_transform: The layers that endings are restricted to; None: all.
        layers_pattern: What comes before the number of a layer, where peft must be told.
        exclude_modules: Names, or a regular expression, that are left out although the rest matches them.
        text: The rule in words: "gate_proj and up_proj of all 30 layers at rank 2".
    """

    kind: str
    target_modules: str | tuple[str, ...]
    rank: int
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.text

    def expand(self, names: Iterable[str]) -> dict[str, int]:
        """{name: rank} of those names that peft would adapt; "all-linear" takes all of them."""
        targets, excluded = (
            each if isinstance(each, str) else frozenset(each) for each in (self.target_modules, self.exclude_modules)
        )
        return {name: self._rank(name) for name in names if self._matches(name, targets, excluded)}

    def config_fields(self) -> dict[str, Any]:
        """The fields of a peft config that say the rule, without those that are empty."""
        fields = {
            "target_modules": _as_list(self.target_modules),
            "rank_pattern": dict(self.rank_pattern),
            "layers_to_transform": None if self.layers_to_transform is None else list(self.layers_to_transform),
            "layers_pattern": list(self.layers_pattern),
            "exclude_modules": _as_list(self.exclude_modules),
        }
        return {key: value for key, value in fields.items() if value}

    @property
    def complexity(self) -> tuple[int, int]:
        """Smaller is simpler: the form, then how many entries it takes."""
        counted = (self.target_modules, self.exclude_modules)
        entries = sum(1 if isinstance(names, str) else len(names) for names in counted)
        return FORMS.index(self.kind), entries + len(self.rank_pattern)

    def _matches(self, name: str, targets: str | frozenset[str], excluded: str | frozenset[str]) -> bool:
        """`peft.tuners.tuners_utils.check_target_module_exists`."""
        if re.fullmatch(excluded, name) if isinstance(excluded, str) else _ends(name, excluded):
            return False
        if isinstance(targets, str):
            return targets == ALL_LINEAR or re.fullmatch(targets, name) is not None
        if name in targets:
            return True
        if not _ends(name, targets):
            return False
        return self.layers_to_transform is None or layer_of(name, self.layers_pattern) in self.layers_to_transform

    def _rank(self, name: str) -> int:
        return _rank_by(self.rank_pattern, name, self.rank)


def layer_of(name: str, patterns: Sequence[str] = ()) -> int | None:
    """The layer that peft takes a module to be in."""
    tried = [rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\." for pattern in patterns] or [_FIRST_NUMBER]
    found = next((match for pattern in tried if (match := re.match(pattern, name))), None)
    return None if found is None else int(found["layer"])


def find_rule(
    choice: Mapping[str, int],
    candidates: Sequence[str],
    others: Iterable[str] = (),
    *,
    all_linear: bool = False,
    forms: Collection[str] = FORMS,
) -> Rule | None:
    """The simplest rule that peft expands to the choice; None where no allowed form does.

    Args:
        choice: {module: rank}; rank 0 is not adapted.
        candidates: Names of all candidates, in model order.
        others: Names of other modules that endings could match, which the rule must not.
        all_linear: Whether the candidates are exactly what peft adapts with "all-linear".
        forms: Which of `FORMS` may be used.

    Raises:
        PeftLinearError: nothing is chosen, a module is no candidate, or a rank is below 0.
    """
    chosen = check_choice(choice, candidates)
    ranks = [chosen[name] for name in candidates if name in chosen]
    uniform = Counter(ranks).most_common(1)[0][0]
    known = [*candidates, *(name for name in dict.fromkeys(others) if name not in set(candidates))]
    search = _Search(tuple(chosen), known, _endings(known))
    found = _first_exact(search, len(chosen) == len(candidates) and all_linear, forms)
    if found is None:
        return None
    patterns = _rank_pattern(chosen, uniform)
    text = rule_text(chosen, candidates, all_linear=found["kind"] == ALL_LINEAR)
    return Rule(rank=uniform, rank_pattern=patterns, text=text, **found)


def check_choice(choice: Mapping[str, int], candidates: Sequence[str]) -> dict[str, int]:
    """The modules with a rank, in model order.

    Raises:
        PeftLinearError: there are none, one is no candidate, or a rank is no integer of at least 0.
    """
    bad = {name: rank for name, rank in choice.items() if isinstance(rank, bool) or int(rank) != rank or rank < 0}
    if bad:
        raise PeftLinearError(f"ranks must be integers of at least 0, got {bad}; leave a module out by rank 0")
    if unknown := sorted(set(choice) - set(candidates)):
        raise PeftLinearError(f"the choice names modules that are no candidates: {', '.join(unknown)}")
    chosen = {name: int(choice[name]) for name in candidates if choice.get(name)}
    if not chosen:
        raise PeftLinearError("the choice adapts no module; give at least one a rank of 1")
    return chosen


@dataclass(frozen=True)
class _Search:
    chosen: tuple[str, ...]
    known: Sequence[str]
    endings: Mapping[str, list[str]]  # {ending: the known names with it}


def _first_exact(search: _Search, everything: bool, forms: Collection[str]) -> dict[str, Any] | None:
    """Kind, targets and restrictions of the first form that matches what is chosen and nothing else."""
    wanted = set(search.chosen)
    few = len(wanted) <= _FEW
    order = [form for form in FORMS if form in forms and not (few and form in _FOR_MANY)]
    for form in order:
        for fields in _attempts(form, search, everything):
            rule = Rule(kind=form, rank=1, **fields)
            if form == ALL_LINEAR or set(rule.expand(search.known)) == wanted:
                return {"kind": form, **fields}
    return None


def _attempts(form: str, search: _Search, everything: bool) -> Iterable[dict[str, Any]]:
    if form == ALL_LINEAR and everything:
        yield {"target_modules": ALL_LINEAR}
    elif form == "types" and (targets := _types(search.chosen, search.endings, search.known)):
        yield {"target_modules": targets}
    elif form == "layers":
        yield from _layers(search)
    elif form in ("types and names", "types with exclusions"):
        yield from _exceptions(search, form == "types with exclusions")
    elif form == "pattern" and (pattern := _pattern(search.chosen, search.known)):
        yield {"target_modules": pattern}
    elif form == "names":
        yield {"target_modules": search.chosen}
    elif form == "name pattern":
        yield {"target_modules": "|".join(map(re.escape, search.chosen))}
    elif form == "names with exclusions":
        chosen = set(search.chosen)
        also = sorted({name for end in chosen for name in search.endings[end]} - chosen)
        yield {"target_modules": search.chosen, "exclude_modules": "|".join(map(re.escape, also))}


def _types(chosen: Iterable[str], endings: Mapping[str, list[str]], allowed: Iterable[str]) -> tuple[str, ...] | None:
    """The shortest endings that, among the allowed names, only chosen modules have; None where a module has none."""
    wanted, among = set(chosen), set(allowed)
    found: dict[str, None] = {}
    for name in chosen:
        if _ends(name, found):
            continue
        fitting = (end for end in _own_endings(name) if wanted.issuperset(among.intersection(endings[end])))
        if (ending := next(fitting, None)) is None:
            return None
        found[ending] = None
    return tuple(found)


def _layers(search: _Search) -> Iterable[dict[str, Any]]:
    """Types of some layers, with each pattern that may stand before a layer's number."""
    parsed = [parse_name(name) for name in search.chosen]
    if any(name.layer is None for name in parsed):
        return
    layers = tuple(sorted({name.layer for name in parsed if name.layer is not None}))
    stacks = list(dict.fromkeys(name.stack for name in parsed if name.stack))
    depth = max((stack.count(".") + 1 for stack in stacks), default=0)
    for parts in range(1, depth + 1):
        patterns = tuple(dict.fromkeys(".".join(stack.split(".")[-parts:]) for stack in stacks))
        allowed = [name for name in search.known if layer_of(name, patterns) in layers]
        if targets := _types(search.chosen, search.endings, allowed):
            yield {"target_modules": targets, "layers_to_transform": layers, "layers_pattern": patterns}


def _exceptions(search: _Search, exclude: bool) -> Iterable[dict[str, Any]]:
    """The types that are chosen in most layers, with a few names more or, where `exclude`, fewer."""
    wanted = set(search.chosen)
    base = [
        name
        for members in members_of_types(search.known).values()
        for name in members
        if 2 * len(wanted.intersection(members)) > len(members)
    ]
    more, fewer = [n for n in search.chosen if n not in set(base)], [n for n in base if n not in wanted]
    targets = _types(base, search.endings, search.known)
    if targets and 0 < len(more) + len(fewer) <= _FEW and bool(fewer) == exclude:
        yield {"target_modules": (*targets, *more), "exclude_modules": tuple(fewer)}


def _pattern(chosen: Iterable[str], known: Iterable[str]) -> str | None:
    """A regular expression `stack.(layers).(types)`, in a few parts; None where it takes more."""
    members = members_of_types(known)
    parts: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    alone = []
    for (stack, kind), names in members_of_types(chosen).items():
        layers = sorted(layer for name in names if (layer := parse_name(name).layer) is not None)
        every = len(names) == len(members[stack, kind])
        if layers:
            parts[stack, () if every else tuple(layers)].append(kind)
        else:
            alone += [re.escape(name) for name in names]
    if len(parts) + len(alone) > _MOST_PARTS:
        return None
    found = []
    for (stack, where), kinds in parts.items():
        before = re.escape(stack) + r"\." if stack else ""
        number = _either(map(str, where)) if where else r"\d+"
        found.append(rf"{before}{number}\.{_either(map(re.escape, kinds))}")
    return "|".join([*found, *alone])


def _rank_pattern(chosen: Mapping[str, int], uniform: int) -> dict[str, int]:
    """Endings, parts by layer, or names that have a rank other than the uniform one, among the chosen modules."""
    endings = _endings(chosen)
    found: dict[str, int] = {}
    for rank in sorted(set(chosen.values()) - {uniform}):
        names = [name for name, of_name in chosen.items() if of_name == rank]
        targets = _types(names, endings, chosen)
        if targets and len(targets) <= len(names):
            found |= {re.escape(target): rank for target in targets}
        elif len(names) > _FEW and (pattern := _pattern(names, chosen)):
            found[f"^(?:{pattern})"] = rank
        else:
            found |= {f"^{re.escape(name)}": rank for name in names}
    if any(_rank_by(found, name, uniform) != rank for name, rank in chosen.items()):  # an ending of another's name
        return {f"^{re.escape(name)}": rank for name, rank in chosen.items() if rank != uniform}
    return found


def _rank_by(patterns: Mapping[str, int], name: str, otherwise: int) -> int:
    """`peft.utils.other.get_pattern_key`."""
    found = (rank for key, rank in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, otherwise)


def members_of_types(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """{(stack, kind): names} in the order of the names."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        parsed = parse_name(name)
        found[parsed.stack, parsed.kind].append(name)
    return dict(found)


def _endings(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        for ending in _all_endings(name):
            found[ending].append(name)
    return found


def _own_endings(name: str) -> Iterable[str]:
    """From the last part of a name on, up to its kind: without the number of the layer."""
    parts = parse_name(name).kind.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))


def _ends(name: str, endings: Container[str]) -> bool:
    return any(ending in endings for ending in _all_endings(name))


def _all_endings(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _as_list(names: str | tuple[str, ...]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)


def _either(parts: Iterable[str]) -> str:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"

# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`PeftType.PROXIMAL_LORA`: peft looks adapter types up in a closed enum, to which plugins cannot add."""

from __future__ import annotations

from peft import PeftType


def _enum_member(name: str) -> PeftType:
    """A real member of `PeftType`, made once; iteration, lookup by value, pickle, deepcopy work as for others."""
    if name in PeftType.__members__:
        return PeftType.__members__[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    type.__setattr__(PeftType, name, member)  # EnumType.__setattr__ protects existing members, not new ones
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    hashable_values = getattr(PeftType, "_hashable_values_", None)  # Python 3.13 and later
    if hashable_values is not None:
        hashable_values.append(name)
    return member


PROXIMAL_LORA = _enum_member("PROXIMAL_LORA")

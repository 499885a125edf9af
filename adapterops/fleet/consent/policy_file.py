"""What tenants agreed to, as written in a policy file: CSV or JSON, one row a tenant.

    tenant,private,share_group,may_represent,may_be_served_by
    *,,,,
    acme,true,,,
    north,,retail,,
    south,,retail,false,north;group:retail

Columns may stand in any order or be left out; a blank is the default, which the row `*` may set for
all tenants. `may_be_served_by` is a list separated by `;` of tenants and of share groups, these
written `group:NAME`; `*` is anyone. In JSON the same keys stand in a list of objects or in one
object by tenant; lists may be JSON lists, null is the default, [] is nobody else, and a share_group
of "" is none.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

from adapterops.errors import FileError, FormatError, IncompatibleError

EVERYONE = "*"
GROUP = "group:"
COLUMNS = ("tenant", "private", "share_group", "may_represent", "may_be_served_by")
_FLAGS = {"true": True, "false": False}
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Rule:
    """What one tenant agreed to.

    `private`: served by its own adapter alone, which goes into nobody else's; it overrides the
    rest. `share_group`: mixes with tenants of the same group only, "" with others that have none.
    `may_represent`: its weights may serve others, alone or averaged. `may_be_served_by`: the
    tenants and `group:NAME`s whose weights may serve it, None for anyone.
    """

    private: bool = False
    share_group: str = ""
    may_represent: bool = True
    may_be_served_by: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules by tenant; `default` is that of all others. `places` say where each row was read."""

    rules: Mapping[str, Rule] = field(default_factory=dict)
    default: Rule = field(default_factory=Rule)
    path: str | None = field(default=None, compare=False)
    places: Mapping[str, str] = field(default_factory=dict, compare=False)

    def rule(self, tenant: str) -> Rule:
        """The rule of a tenant, whether or not it has a row."""
        return self.rules.get(tenant, self.default)

    def check(self, tenants: Iterable[str]) -> None:
        """Raise IncompatibleError where a row or a list names none of `tenants`."""
        known = frozenset(tenants)
        strangers = [name for name in self.rules if name not in known]
        if strangers:
            more = len(strangers) - _SHOWN
            listed = ", ".join(f"{name!r} ({self._place(name)})" for name in strangers[:_SHOWN])
            raise IncompatibleError(
                f"names tenants that the fleet does not have: {listed}"
                + (f" and {more} more" if more > 0 else ""),
                path=self.path,
                hint="tenants are called as `index` lists them",
            )
        lists = {rule.may_be_served_by: name for name, rule in reversed(list(self.rules.items()))}
        lists.setdefault(self.default.may_be_served_by, EVERYONE)
        for entries, name in lists.items():
            for entry in entries or ():
                if not entry.startswith(GROUP) and entry not in known:
                    raise IncompatibleError(
                        f"{self._place(name)}: may_be_served_by of {name!r} names {entry!r}, "
                        "which is no tenant of the fleet",
                        path=self.path,
                        hint=f"a share group is written {GROUP}NAME",
                    )
                if entry.startswith(GROUP) and entry in known:
                    raise IncompatibleError(
                        f"{self._place(name)}: may_be_served_by of {name!r} names {entry!r}, "
                        "which is a tenant's name and means a share group",
                        path=self.path,
                        hint="rename the tenant in a manifest",
                    )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The JSON form that `policy_from` reads back; what equals the default is left out."""
        rows = {EVERYONE: _told(self.default, Rule())} if self.default != Rule() else {}
        for name, rule in self.rules.items():
            rows[name] = _told(rule, self.default)
        return rows

    def _place(self, tenant: str) -> str:
        return self.places.get(tenant, f"entry {tenant!r}")


def _told(rule: Rule, default: Rule) -> dict[str, Any]:
    usual = asdict(default)
    found = {key: value for key, value in asdict(rule).items() if value != usual[key]}
    if "may_be_served_by" in found:
        entries = rule.may_be_served_by
        found["may_be_served_by"] = [EVERYONE] if entries is None else list(entries)
    return found


def read_policy(path: str | os.PathLike[str]) -> Policy:
    """The policy in a CSV or JSON file.

    Raises FileError where it cannot be read and FormatError, with the line or entry, for what is no
    policy: unknown columns, a tenant twice, a flag that is neither true nor false, a list that its
    tenant's own share group forbids. Whether its tenants exist is for `Policy.check`.
    """
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise FormatError(f"is not UTF-8: {error.reason}", path=name) from None
    except OSError as error:
        raise FileError(f"the policy cannot be read: {error.strerror}", path=name) from None
    if text.lstrip()[:1] in ("{", "["):
        return policy_from(_document(text, name), name)
    return _policy(_lines(text, name), name)


def policy_from(document: Any, path: str | None = None) -> Policy:
    """The policy in a parsed JSON document: a list of objects, or one object by tenant."""
    return _policy(_entries(document, path), path)


@dataclass(frozen=True, slots=True)
class _Row:
    """One tenant's row as it stands: `values` by column, without blanks."""

    tenant: str
    values: Mapping[str, Any]
    place: str


def _lines(text: str, path: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        header = [cell.strip() for cell in next((row for row in reader if any(row)), [])]
        _check_columns(header, f"line {reader.line_num}", path)
        if "tenant" not in header:
            _bad(f"line {max(1, reader.line_num)}: the header has no column 'tenant'", path)
        for row in reader:
            place = f"line {reader.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                _bad(f"{place}: has {len(row)} fields, the header {len(header)}", path)
            cells = zip(header, (cell.strip() for cell in row), strict=True)
            values: dict[str, Any] = {key: cell for key, cell in cells if cell}
            tenant = values.pop("tenant", "")
            if not tenant:
                _bad(f"{place}: names no tenant", path)
            yield _Row(tenant, values, place)
    except csv.Error as error:
        _bad(f"line {reader.line_num}: {error}", path)


def _check_columns(names: list[str], place: str, path: str | None) -> None:
    for name in names:
        if name not in COLUMNS:
            _bad(f"{place}: unknown column {name!r}", path, f"there are: {', '.join(COLUMNS)}")
        if names.count(name) > 1:
            _bad(f"{place}: column {name!r} stands twice", path)


def _document(text: str, path: str) -> Any:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(found)
        if len(unique) < len(found):
            names = [key for key, _ in found]
            twice = next(key for key in unique if names.count(key) > 1)
            _bad(f"the key {twice!r} stands twice in one object", path)
        return unique

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        _bad(f"line {error.lineno}: {error.msg}", path)
    except RecursionError:
        _bad("is nested too deeply for a policy", path)


def _entries(document: Any, path: str | None) -> Iterator[_Row]:
    if isinstance(document, dict):
        pairs = [(f"entry {name!r}", {"tenant": name}, body) for name, body in document.items()]
    elif isinstance(document, list):
        pairs = [(f"entry {index}", {}, body) for index, body in enumerate(document, 1)]
    else:
        _bad("is neither a list of objects nor an object by tenant", path)
    for place, named, body in pairs:
        if not isinstance(body, dict):
            _bad(f"{place}: is {body!r}, not an object", path)
        if named and "tenant" in body:
            _bad(f"{place}: names its tenant twice", path)
        values = {**named, **body}
        _check_columns(list(values), place, path)
        tenant = values.pop("tenant", "")
        if not isinstance(tenant, str) or not tenant:
            _bad(f"{place}: names no tenant", path)
        told = {
            key: value
            for key, value in values.items()
            if value is not None and (value != "" or key == "share_group")
        }
        yield _Row(tenant, told, place)


def _policy(rows: Iterable[_Row], path: str | None) -> Policy:
    found: dict[str, _Row] = {}
    for row in rows:
        other = found.setdefault(row.tenant, row)
        if other is not row:
            _bad(f"{row.place}: tenant {row.tenant!r} has a row already, at {other.place}", path)
    default = _rule(found.pop(EVERYONE, _Row(EVERYONE, {}, "")), Rule(), path)
    rules = {name: _rule(row, default, path) for name, row in found.items()}
    places = {name: row.place for name, row in found.items()}
    policy = Policy(rules, default, path, places)
    groups = {default.share_group} | {rule.share_group for rule in rules.values()}
    for name, row in found.items():
        if "may_be_served_by" in row.values and not rules[name].private:
            _check_list(policy, name, row.place, groups)
    for entry in default.may_be_served_by or ():
        if entry.startswith(GROUP):
            _check_group(entry, groups, "row '*'", path)
    return policy


def _rule(row: _Row, default: Rule, path: str | None) -> Rule:
    changes: dict[str, Any] = {}
    for key, value in row.values.items():
        where = f"{row.place}: {key} of {row.tenant!r}"
        if key == "share_group":
            if not isinstance(value, str):
                _bad(f"{where} is {value!r}, not a name", path)
            changes[key] = value
        elif key == "may_be_served_by":
            changes[key] = _list(value, where, path)
        else:
            flag = value if isinstance(value, bool) else _FLAGS.get(str(value).strip().lower())
            if flag is None:
                _bad(f"{where} is {value!r}", path, "write true or false, or leave it blank")
            changes[key] = flag
    return replace(default, **changes)


def _list(value: Any, where: str, path: str | None) -> tuple[str, ...] | None:
    entries = value.split(";") if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(isinstance(item, str) for item in entries):
        _bad(f"{where} is {value!r}, not a list of names", path)
    names = tuple(dict.fromkeys(stripped for item in entries if (stripped := item.strip())))
    if EVERYONE not in names:
        return names
    if len(names) > 1:
        _bad(f"{where} lists {EVERYONE!r}, which is anyone, beside single names", path)
    return None


def _check_list(policy: Policy, tenant: str, place: str, groups: set[str]) -> None:
    """Refuse a list that the share groups leave without effect."""
    own = policy.rules[tenant].share_group
    for entry in policy.rules[tenant].may_be_served_by or ():
        if entry.startswith(GROUP):
            _check_group(entry, groups, place, policy.path)
            other = entry.removeprefix(GROUP)
        elif policy.rule(entry).private:
            continue  # private wins: its weights serve nobody, whoever lists them
        else:
            other = policy.rule(entry).share_group
        if other != own:
            here, there = (f"share group {name!r}" if name else "no group" for name in (own, other))
            _bad(
                f"{place}: {tenant!r} ({here}) may be served by {entry!r} ({there}), but a share "
                "group mixes only inside itself",
                policy.path,
                "give both the same share_group, or take the name from the list",
            )


def _check_group(entry: str, groups: set[str], place: str, path: str | None) -> None:
    if entry == GROUP or entry.removeprefix(GROUP) not in groups:
        _bad(f"{place}: may_be_served_by names {entry!r}, a share group that nobody is in", path)


def _bad(message: str, path: str | None, hint: str | None = None) -> NoReturn:
    raise FormatError(message, path=path, hint=hint)

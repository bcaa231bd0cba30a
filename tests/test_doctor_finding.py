"""`etha.cli.doctor.finding`: the order of findings, the first line, and the schema that ``--json`` keeps to."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import msgspec
import pytest

from etha.cli.doctor.finding import Finding, Gate, Report, headline, in_order, schema

SCHEMA = Path(__file__).parents[1] / "docs" / "doctor.schema.json"
A, B, C = (Gate("gates", name, "tried") for name in "ABC")
FOUND = (A.ok("a", "m"), B.degraded("b", "m", "r"), C.broken("c", "m", "r"), A.broken("d", "m", "r"))
REPORT = Report("broken", "h", 1.5, ("docker",), {"etha": "0.1.0", "CuPy": None}, {"AGENT_RANK": "0"}, FOUND)


def test_problems_come_first_the_worst_first_and_causes_before_what_they_cause():
    assert [found.seen for found in in_order(FOUND)] == ["c", "d", "b", "a"]


def test_the_headline_names_the_first_and_counts_the_others():
    assert headline(in_order(FOUND)) == "broken: C: c (and 2 more)"
    assert headline((B.degraded("b", "m", "r"),)) == "degraded: B: b"
    assert headline((A.ok("a", "m"),)).startswith("well: 1 checks")


def test_only_what_is_not_well_has_a_remedy():
    assert [found.remedy for found in FOUND] == [None, "r", "r", "r"]


def test_the_schema_in_docs_is_that_of_the_report():
    again = "python -c 'import sys; from etha.cli.doctor.finding import schema; sys.stdout.buffer.write(schema())'"
    assert SCHEMA.read_bytes() == schema(), f"{again} > docs/doctor.schema.json"


def test_a_report_keeps_to_the_schema():
    assert faults(encoded(), json.loads(SCHEMA.read_text())) == []
    assert msgspec.json.decode(msgspec.json.encode(REPORT), type=Report) == REPORT


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("verdict",), "fine"),
        (("seconds",), "1.5"),
        (("findings", 0, "remedy"), 3),
        (("findings", 0, "more"), "field"),
        (("versions", "etha"), 1),
        (("variables",), []),
    ],
)
def test_what_does_not_keep_to_the_schema_is_seen(path: tuple, value: object):
    said = encoded()
    place = said
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert faults(said, json.loads(SCHEMA.read_text())) != []
    missing = encoded()
    del missing["headline"]
    assert faults(missing, json.loads(SCHEMA.read_text())) != []


def encoded() -> dict:
    return copy.deepcopy(json.loads(msgspec.json.encode(REPORT)))


TYPES = {"object": dict, "array": list, "string": str, "number": int | float, "integer": int, "null": type(None)}
SAID = {"$schema", "$defs", "title", "description", "default"}
"""They demand nothing."""


def faults(value: object, node: dict, root: dict | None = None, path: str = "$") -> list[str]:
    """What of ``value`` is not as the schema says. A keyword that is not known here fails the test."""
    root = root or node
    found: list[str] = []
    for keyword, demand in node.items():
        if keyword in SAID:
            continue
        if keyword == "$ref":
            found += faults(value, root["$defs"][demand.rpartition("/")[2]], root, path)
        elif keyword == "anyOf":
            found += [] if any(not faults(value, each, root, path) for each in demand) else [f"{path}: none of anyOf"]
        elif keyword == "type":
            found += [] if isinstance(value, TYPES[demand]) else [f"{path}: no {demand}"]
        elif keyword == "enum":
            found += [] if value in demand else [f"{path}: not of {demand}"]
        elif keyword == "required":
            found += [f"{path}.{name} is missing" for name in demand if isinstance(value, dict) and name not in value]
        elif keyword == "properties":
            for name in demand.keys() & value.keys() if isinstance(value, dict) else ():
                found += faults(value[name], demand[name], root, f"{path}.{name}")
        elif keyword == "additionalProperties":
            for name in value.keys() - node.get("properties", {}).keys() if isinstance(value, dict) else ():
                found += [f"{path}.{name}"] if demand is False else faults(value[name], demand, root, f"{path}.{name}")
        elif keyword == "items":
            for index, each in enumerate(value if isinstance(value, list) else ()):
                found += faults(each, demand, root, f"{path}[{index}]")
        else:
            raise ValueError(f"{keyword} is not known to this test")
    return found


def test_every_kind_of_finding_is_a_finding():
    assert {type(found) for found in FOUND} == {Finding}
